"""What the kernels cost and how exact they are, measured here and now.

    python -m bench.kernels                  time and memory of hidden -> log-prob or PPO loss, forward + backward
    python -m bench.kernels --peers          the same beside Liger, TRL and torch's own (installed once, bench/.venvs)
    python -m bench.kernels --errors         error of every operation against float64
    python -m bench.kernels --sampling       milliseconds of one sampled token a row
    python -m bench.kernels --import-time    what `import fastrlhf_kernels` adds to `import torch`

Every arm of the first table runs in a process of its own. Memory is the high-water mark of resident memory above what
the process held with its inputs made (weight gradients included: they are outputs). Times are medians of repetitions
that take turns, so that whatever else the machine does falls on all arms; a ratio is the median over the turns of an
arm's seconds divided by those of naive torch (log_softmax + gather) in the same turn.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

import fastrlhf_kernels as kernels
from bench import peers
from fastrlhf_kernels import reference

BARS = {  # tokens -> arm -> memory and time, as ratios to naive
    1024: {"linear_log_probs": (0.35, 1.10), "linear_ppo_loss": (0.45, 0.75)},
    2048: {"linear_log_probs": (0.2, 1.15), "linear_ppo_loss": (0.2, 1.15)},
}
ARMS = ("naive", "linear_log_probs", "linear_ppo_loss")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=2048, help="N")
    parser.add_argument("--hidden", type=int, default=576, help="H")
    parser.add_argument("--vocabulary", type=int, default=49152, help="V")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("--errors", action="store_true")
    parser.add_argument("--sampling", action="store_true")
    parser.add_argument("--import-time", action="store_true")
    parser.add_argument("--peers", action="store_true", help="other libraries beside ours")
    parser.add_argument("--worker", choices=(*ARMS, *peers.ARMS), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def machine() -> dict[str, object]:
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
    return {"cpu": model, "cores": os.cpu_count(), "load": os.getloadavg()[0], "torch": torch.__version__}


# --- time and memory --------------------------------------------------------------------------------------------------


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def problem(n: int, width: int, vocabulary: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    hidden = torch.randn(n, width, dtype=dtype).requires_grad_()
    weight = (torch.randn(vocabulary, width, dtype=dtype) * width**-0.5).requires_grad_()
    return hidden, weight, torch.randint(0, vocabulary, (n,)), torch.randn(n), torch.full((n,), -11.0)


def arm(name: str) -> Callable[..., torch.Tensor]:
    """The scalar whose gradient is taken."""

    def naive(hidden, weight, labels, advantages, old):
        log_probs = torch.log_softmax((hidden @ weight.T).float(), -1).gather(1, labels[:, None])[:, 0]
        return (log_probs * advantages).sum()

    def linear_log_probs(hidden, weight, labels, advantages, old):
        return (kernels.linear_log_probs(hidden, weight, labels) * advantages).sum()

    def linear_ppo_loss(hidden, weight, labels, advantages, old):
        return kernels.linear_ppo_loss(hidden, weight, labels, old, advantages, torch.ones_like(labels)).loss

    return {"naive": naive, "linear_log_probs": linear_log_probs, "linear_ppo_loss": linear_ppo_loss}[name]


def worker(options: argparse.Namespace) -> None:
    """Answer each line on stdin with one forward + backward: a JSON line with seconds and bytes."""
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    try:
        run = (peers.arm if options.worker in peers.ARMS else arm)(options.worker)
        run(*problem(256, options.hidden, 1024, dtype)).backward()  # libraries load their code and buffers
    except (ImportError, AttributeError) as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}))
        return
    inputs = problem(options.tokens, options.hidden, options.vocabulary, dtype)
    print(json.dumps({"ready": True}), flush=True)
    for _ in sys.stdin:
        for tensor in inputs:
            tensor.grad = None
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
        start = time.perf_counter()
        run(*inputs).backward()
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "bytes": resident("VmHWM") - before}), flush=True)


def interpreters(with_peers: bool) -> dict[str, str]:
    """The arms, and the Python that runs each."""
    chosen = dict.fromkeys(ARMS, sys.executable)
    if with_peers:
        chosen |= dict.fromkeys(peers.ARMS, sys.executable)
        try:
            chosen |= dict.fromkeys(("liger", "trl"), str(peers.python_of_peers()))
        except RuntimeError as error:
            print(error)
    return chosen


def time_and_memory(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Seconds, peak extra bytes and the ratios of both to naive, for each arm."""
    sizes = [f"--{name}={getattr(options, name)}" for name in ("tokens", "hidden", "vocabulary", "dtype", "threads")]
    processes = {}
    for name, python in interpreters(options.peers).items():
        command = [python, "-m", "bench.kernels", "--worker", name, *sizes]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        ready = json.loads(process.stdout.readline() or '{"error": "it ended"}')
        if "error" in ready:
            print(f"{name} does not run here: {ready['error']}")
        else:
            processes[name] = process
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in processes}
    for _ in range(options.repetitions + 1):  # the first is warm-up
        for name, process in processes.items():
            process.stdin.write("\n")
            process.stdin.flush()
            samples[name].append(json.loads(process.stdout.readline()))
    for process in processes.values():
        process.stdin.close()
        process.wait()
    turns = {name: [row["seconds"] for row in rows[1:]] for name, rows in samples.items()}
    naive_bytes = statistics.median(row["bytes"] for row in samples["naive"])
    return {
        name: {
            "seconds": statistics.median(turns[name]),
            "time_ratio": statistics.median(a / b for a, b in zip(turns[name], turns["naive"], strict=True)),
            "peak_bytes": max(row["bytes"] for row in rows),
            "memory_ratio": max(row["bytes"] for row in rows) / naive_bytes,  # our worst against its median
        }
        for name, rows in samples.items()
    }


def compare(options: argparse.Namespace) -> dict[str, object]:
    figures = time_and_memory(options)
    ok, bars = True, BARS.get(options.tokens, {})
    print(
        f"N={options.tokens} H={options.hidden} V={options.vocabulary} {options.dtype}, forward + backward, "
        f"{options.threads} threads, median of {options.repetitions}"
    )
    print(f"{'':18}{'seconds':>9}{'ratio':>8}{'bar':>7}{'extra MiB':>11}{'ratio':>8}{'bar':>7}")
    for name, row in figures.items():
        memory, seconds = bars.get(name, (math.inf, math.inf))
        ok &= row["time_ratio"] <= seconds and row["memory_ratio"] <= memory
        print(
            f"{name:18}{row['seconds']:9.2f}{row['time_ratio']:8.2f}{seconds:7.2f}"
            f"{row['peak_bytes'] / 2**20:11.0f}{row['memory_ratio']:8.2f}{memory:7.2f}"
        )
    for name in figures:
        if name in peers.LABELS:
            print(f"{name}: {peers.LABELS[name]}")
    if bars:
        print("bars hold" if ok else "BARS MISSED")
    return {"arms": figures, "bars_hold": ok}


# --- exactness --------------------------------------------------------------------------------------------------------


def error_rows() -> Iterator[tuple[str, str, str, float, float]]:
    """(operation, input dtype, shapes, largest error of the results, relative error of the gradients)."""
    n, width, vocabulary = 256, 576, 8192
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        hidden = torch.randn(n, width).to(dtype).requires_grad_()
        weight = (torch.randn(vocabulary, width) * 3 * width**-0.5).to(dtype).requires_grad_()
        logits = (torch.randn(n, vocabulary) * 3).to(dtype).requires_grad_()
        labels = torch.randint(0, vocabulary, (n,))
        advantages, old, mask = torch.randn(n), torch.full((n,), -11.0), torch.rand(n) > 0.2
        size = f"N={n} H={width} V={vocabulary}"

        def linear(lib, h, w, labels=labels):
            log_probs, entropy = lib.linear_log_probs(h, w, labels, return_entropy=True)
            return torch.stack([log_probs, entropy]).mean(1)

        def from_logits(lib, z, labels=labels):
            log_probs, entropy = lib.token_log_probs(z, labels, return_entropy=True)
            return torch.stack([log_probs, entropy]).mean(1)

        def ppo(lib, h, w, labels=labels, old=old, advantages=advantages, mask=mask):
            wide = [t.to(h.dtype) if h.dtype == torch.float64 else t for t in (old, advantages)]
            return lib.linear_ppo_loss(h, w, labels, *wide, mask, entropy_coef=0.01)[0]

        def any_loss(lib, h, w, labels=labels, advantages=advantages):
            def loss_fn(log_probs, entropy):  # of all tokens at once, as a sequence-level ratio is
                return (log_probs.mean() + 11).exp() * (log_probs * advantages).mean() - 0.01 * entropy.mean()

            if lib is kernels:
                return lib.linear_loss(h, w, labels, loss_fn, return_entropy=True).loss
            return loss_fn(*lib.linear_log_probs(h, w, labels, return_entropy=True))

        for name, function, inputs in (
            ("token_log_probs", from_logits, (logits,)),
            ("linear_log_probs", linear, (hidden, weight)),
            ("linear_ppo_loss", ppo, (hidden, weight)),
            ("linear_loss", any_loss, (hidden, weight)),
        ):
            exact_inputs = [t.detach().double().requires_grad_() for t in inputs]
            ours, exact = function(kernels, *inputs), function(reference, *exact_inputs)
            grads = torch.autograd.grad(ours.sum(), inputs)
            exact_grads = torch.autograd.grad(exact.sum(), exact_inputs)
            relative = max(float((a.double() - b).norm() / b.norm()) for a, b in zip(grads, exact_grads, strict=True))
            yield name, str(dtype)[6:], size, float((ours - exact).detach().abs().max()), relative


def token_error_rows() -> Iterator[tuple[str, str, float]]:
    """Largest error of a token's log-prob against float64, beside plain torch in the same dtype."""
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        hidden, weight = torch.randn(256, 576).to(dtype), (torch.randn(8192, 576) * 3 * 576**-0.5).to(dtype)
        labels = torch.randint(0, 8192, (256,))
        exact = reference.linear_log_probs(hidden.double(), weight.double(), labels)
        plain = torch.log_softmax((hidden @ weight.T).float(), -1).gather(1, labels[:, None])[:, 0]
        for name, value in (("linear_log_probs", kernels.linear_log_probs(hidden, weight, labels)), ("torch", plain)):
            yield name, str(dtype)[6:], float((value - exact).abs().max())


def errors() -> dict[str, object]:
    rows, tokens = list(error_rows()), list(token_error_rows())
    print(f"{'operation':18}{'inputs':>10}{'result':>10}{'gradient':>10}   against float64 on the same inputs")
    for name, dtype, size, result, gradient in rows:
        print(f"{name:18}{dtype:>10}{result:10.1e}{gradient:10.1e}   {size}")
    print(f"\n{'log-prob of a token':18}{'inputs':>9}{'largest error':>16}")
    for name, dtype, error in tokens:
        print(f"{name:18}{dtype:>10}{error:16.1e}")
    return {"errors": rows, "token_errors": tokens}


# --- sampling, import -------------------------------------------------------------------------------------------------


def median_ms(call: Callable[[], object], repetitions: int) -> float:
    call()
    seconds = []
    for _ in range(repetitions):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds) * 1000


def multinomial(logits: torch.Tensor) -> torch.Tensor:
    return torch.multinomial(torch.softmax(logits, -1), 1)


def sampling() -> dict[str, object]:
    settings = {"plain": {}, "T=0.7": {"temperature": 0.7}, "k=50": {"top_k": 50}, "p=0.9": {"top_p": 0.9}}
    settings["k=50 p=0.9"] = settings["k=50"] | settings["p=0.9"]
    print(f"{'B':>5}{'V':>8}" + "".join(f"{name:>13}" for name in settings) + f"{'multinomial':>13}   ms a call")
    rows = []
    for batch, vocabulary in ((64, 2048), (128, 2048), (64, 49152), (128, 49152)):
        torch.manual_seed(0)
        logits = torch.randn(batch, vocabulary) * 4
        count = 100 if vocabulary < 10000 else 10
        times = [median_ms(partial(kernels.sample_tokens, logits, seed=1, **kw), count) for kw in settings.values()]
        times.append(median_ms(partial(multinomial, logits), count))
        print(f"{batch:5}{vocabulary:8}" + "".join(f"{t:13.2f}" for t in times))
        rows.append((batch, vocabulary, *times))
    return {"sampling_ms": rows}


def import_time() -> dict[str, object]:
    code = "import torch, time; s = time.perf_counter(); import fastrlhf_kernels; print(time.perf_counter() - s)"
    seconds = [float(subprocess.check_output([sys.executable, "-c", code], text=True)) for _ in range(7)]
    print(f"import fastrlhf_kernels after torch: {statistics.median(seconds) * 1000:.0f} ms (median of {len(seconds)})")
    return {"import_ms": statistics.median(seconds) * 1000}


def main() -> int:
    options = parse()
    if options.worker:
        worker(options)
        return 0
    torch.set_num_threads(options.threads)
    figures: dict[str, object] = {"machine": machine()}
    print("{cpu}, {cores} cores, load {load:.1f}, torch {torch}\n".format(**figures["machine"]))
    chosen = {"errors": errors, "sampling": sampling, "import_time": import_time}
    wanted = [run for name, run in chosen.items() if getattr(options, name)]
    for run in wanted or [lambda: compare(options)]:
        figures |= run()
        print()
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0 if figures.get("bars_hold", True) else 1


if __name__ == "__main__":
    sys.exit(main())
