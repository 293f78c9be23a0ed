"""What the kernels take on a GPU, beside torch, torch.compile, Liger and TRL, and beside the floor of the same run.

    python -m bench.gpu_kernels --json bench/results/kernels_gpu.json

Medians of CUDA events with the L2 cache cleared before each repetition; where a call is a few launches, so that the
host takes longer than the device, `graph` is the same call replayed from a CUDA graph: the device alone. The floor of a
row is what this GPU needs for the same work without any of ours: for logits the bytes read and written over the
measured copy bandwidth, for the head cuBLAS's time for the matrix products (3 for the fused loss, 4 for a forward and a
backward that computes the logits anew). `fraction` is floor / ours. `--device cpu` with small sizes tries the script
itself; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import fastrlhf_kernels as kernels
from bench import peers

SHAPES = ("8192x896x151936", "8192x1536x151936", "8192x3584x151936", "8192x576x49152")  # N, H, V
Row = tuple[str, float, Callable[[], object]]  # name, floor in ms, call


def median_ms(call: Callable[[], object], device: torch.device, repetitions: int) -> float:
    scratch = torch.empty(1 << 26 if device.type == "cuda" else 1, dtype=torch.int32, device=device)
    for _ in range(3):
        call()
    times = []
    for _ in range(repetitions):
        scratch.zero_()
        if device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            call()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end))
        else:
            start = time.perf_counter()
            call()
            times.append((time.perf_counter() - start) * 1000)
    return statistics.median(times)


def replayed(call: Callable[[], object], device: torch.device) -> Callable[[], object] | None:
    """The call as a CUDA graph; None without a GPU."""
    if device.type != "cuda":
        return None
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def extra_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Peak memory above what was held before; None where there is no CUDA allocator."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def backward_of(loss: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(loss(*inputs), inputs)


def naive(hidden, weight, labels):
    return torch.log_softmax((hidden @ weight.T).float(), -1).gather(1, labels[:, None])[:, 0]


def head_rows(n: int, width: int, vocabulary: int, device: torch.device, options) -> Iterator[Row]:
    """Hidden states to log-probs and to the PPO loss."""
    torch.manual_seed(0)
    hidden = torch.randn(n, width, device=device).bfloat16().requires_grad_()
    weight = (torch.randn(vocabulary, width, device=device) * 3 * width**-0.5).bfloat16().requires_grad_()
    labels = torch.randint(0, vocabulary, (n,), device=device)
    advantages, old = torch.randn(n, device=device), torch.full((n,), -11.0, device=device)
    mask = torch.ones_like(labels)
    with torch.no_grad():
        product = median_ms(lambda: hidden @ weight.T, device, options.repetitions)
    print(f"one product by cuBLAS: {product:.2f} ms = {2e-9 * n * width * vocabulary / product:.0f} TFLOP/s")

    def ours(h, w):
        return (kernels.linear_log_probs(h, w, labels, validate=False) * advantages).sum()

    def ppo(h, w):
        return kernels.linear_ppo_loss(h, w, labels, old, advantages, mask, validate=False).loss

    def forward():
        with torch.no_grad():
            return kernels.linear_log_probs(hidden, weight, labels, validate=False)

    yield "linear_log_probs forward", product, forward
    yield "linear_log_probs forward+backward", 4 * product, backward_of(ours, hidden, weight)
    yield "linear_ppo_loss forward+backward", 3 * product, backward_of(ppo, hidden, weight)
    for name, run in (("torch", naive), ("torch.compile", torch.compile(naive))):
        loss = lambda h, w, run=run: (run(h, w, labels) * advantages).sum()  # noqa: E731
        yield f"{name} forward+backward", 3 * product, backward_of(loss, hidden, weight)
    for name in ("liger", "trl", "cce", "quack"):
        try:
            run = peers.arm(name)
        except (ImportError, AttributeError) as error:
            print(f"{name} does not run here: {type(error).__name__}: {error}")
            continue
        loss = lambda h, w, run=run: run(h, w, labels, advantages, old)  # noqa: E731
        yield f"{name} forward+backward", 3 * product, backward_of(loss, hidden, weight)


def logits_rows(n: int, vocabulary: int, device: torch.device, bandwidth: float) -> Iterator[Row]:
    """Kernels on logits that exist."""
    logits = torch.randn(n, vocabulary, device=device).bfloat16().requires_grad_()
    labels = torch.randint(0, vocabulary, (n,), device=device)
    one, mask = torch.ones(n, device=device), torch.ones_like(labels)
    read = logits.numel() * 2 / bandwidth * 1000

    def forward():
        with torch.no_grad():
            return kernels.token_log_probs(logits, labels, validate=False)

    def fused():
        kernels.token_ppo_loss(logits, labels, one, one, mask, validate=False).loss.backward()
        logits.grad = None

    yield "token_log_probs forward", read, forward
    yield "token_ppo_loss", 2 * read, fused


def sampler_rows(vocabulary: int, device: torch.device, bandwidth: float) -> Iterator[Row]:
    rows = torch.randn(64, vocabulary, device=device)
    for name, filters in (("plain", {}), ("top_k=50", {"top_k": 50}), ("top_p=0.9", {"top_p": 0.9})):
        call = lambda filters=filters: kernels.sample_tokens(rows, seed=1, validate=False, **filters)  # noqa: E731
        yield f"sample_tokens {name}", rows.numel() * 4 / bandwidth * 1000, call


def token_rows(device: torch.device, bandwidth: float) -> Iterator[Row]:
    """One launch over [B, T] tokens, and decode attention."""
    x = torch.randn(64, 1024, device=device)
    mask, leaf = torch.rand(64, 1024, device=device) < 0.8, torch.randn(64, 1024, device=device)
    size = x.numel() * 4 / bandwidth * 1000
    yield "gae [64, 1024]", 4.25 * size, lambda: kernels.gae(x, leaf, mask)
    yield "ppo_policy_loss [64, 1024]", 4.25 * size, lambda: kernels.ppo_policy_loss(x, leaf, x, mask, validate=False)
    yield "ppo_value_loss [64, 1024]", 4.25 * size, lambda: kernels.ppo_value_loss(x, leaf, x, mask, validate=False)
    q = torch.randn(256, 12, 128, device=device).bfloat16()
    cache = torch.randn(2, 256, 512, 2, 128, device=device).bfloat16()
    lengths = torch.full((256,), 512, dtype=torch.int32, device=device)
    attend = lambda: kernels.decode_attention(q, *cache, lengths, scale=0.09, validate=False)  # noqa: E731
    yield "decode_attention B=256 T=512", cache.numel() * 2 / bandwidth * 1000, attend


def copy_bandwidth(device: torch.device, repetitions: int) -> float:
    """Bytes a second, read and written, of a copy of 1 GiB (64 MiB on CPU)."""
    a = torch.empty(1 << (28 if device.type == "cuda" else 24), device=device)
    b = torch.empty_like(a)
    return 2 * a.numel() * 4 / (median_ms(lambda: b.copy_(a), device, repetitions) / 1000)


def keep(path: Path | None, figures: dict[str, object]) -> None:
    """Write what there is so far: a machine that is lent for minutes may be gone before the last row."""
    if path is not None:
        path.write_text(json.dumps(figures, indent=1, default=str) + "\n")


def about(device: torch.device) -> dict[str, object]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    versions = {"torch": torch.__version__, "commit": commit, "python": sys.version.split()[0]}
    try:
        import triton

        versions["triton"] = triton.__version__
    except ImportError:
        pass
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {"device": name} | versions


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_kernels", description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="NxHxV")
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no GPU here; --device cpu with small --shapes tries the script", file=sys.stderr)
        return 3
    device = torch.device(options.device)
    figures: dict[str, object] = {"machine": about(device), "rows": []}
    bandwidth = copy_bandwidth(device, options.repetitions)
    print(figures["machine"], f"copy {bandwidth / 1e9:.0f} GB/s")

    def table(title: str, rows: Iterator[Row], *, small: bool = False) -> None:
        """small: the host is slower than the device."""
        print(f"\n{title}\n{'':36}{'ms':>9}{'floor':>9}{'fraction':>10}{'extra MiB':>11}{'graph' if small else '':>9}")
        for name, floor, call in rows:
            milliseconds, extra = median_ms(call, device, options.repetitions), extra_bytes(call, device)
            memory = "-" if extra is None else f"{extra / 2**20:.0f}"
            row = {"shape": title, "name": name, "ms": milliseconds, "floor_ms": floor, "extra": extra}
            line = f"{name:36}{milliseconds:9.3f}{floor:9.3f}{floor / milliseconds:10.2f}{memory:>11}"
            replay = replayed(call, device) if small else None
            if replay is not None:
                row["graph_ms"] = median_ms(replay, device, options.repetitions)
                line += f"{row['graph_ms']:9.3f}"
            print(line, flush=True)
            figures["rows"].append(row)
            keep(options.json, figures)

    for shape in options.shapes:
        n, width, vocabulary = (int(part) for part in shape.split("x"))
        table(f"N={n} H={width} V={vocabulary} bf16", head_rows(n, width, vocabulary, device, options))
    n, _, vocabulary = (int(part) for part in options.shapes[0].split("x"))
    table(f"N={n} V={vocabulary} bf16 logits", logits_rows(n, vocabulary, device, bandwidth))
    table(f"sampling, B=64 V={vocabulary} fp32", sampler_rows(vocabulary, device, bandwidth), small=True)
    table("tokens and decoding", token_rows(device, bandwidth), small=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
