"""Tokens a second of the rollout engine, beside transformers' `generate` on the same prompts and lengths.

    python -m bench.rollout                                    the tiny model and SmolLM2-135M on this CPU
    python -m bench.rollout --device cuda --json FILE          Qwen2.5 shapes with random weights, batch 16, 64, 256

Two workloads. fixed: one batch, every reply of `--new` tokens. ragged: four batches' worth of replies, lengths
log-normal around half of `--new` with the longest 4 times the median; `generate` decodes batch after batch, the engine
keeps as many slots and refills them. Both sides sample and are forced to the same lengths. The floor of a step is the
larger of two times, both rates measured in the same run: the bytes of the weights and of the keys and values in use
over the bandwidth of a copy, and two operations a weight and row over the rate of a large product of that dtype; the
prompts add the second for their tokens. `floor` is the share of it that the whole generation reached. `wasted` are
row-steps beyond one a token. Sides take turns; ratios are medians of the turns.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from bench.gpu_kernels import about, copy_bandwidth, keep, median_ms
from bench.models import END, IDS, QWEN, policy_of
from fastrlhf.rollout import decoder as decoding
from fastrlhf.rollout.engine import RolloutEngine
from fastrlhf.rollout.kv_cache import cache_bytes_per_token
from fastrlhf.rollout.sampling import SamplingParams
from fastrlhf_kernels import SampledTokens


def model_of(name: str, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    if name != "tiny":
        return policy_of(name, device, dtype)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=1000, hidden_size=64, intermediate_size=172, num_hidden_layers=4,
                         num_attention_heads=4, num_key_value_heads=2, **IDS)  # fmt: skip
    return LlamaForCausalLM(config).to(device, dtype).eval()


def ragged_lengths(count: int, most: int) -> list[int]:
    """Log-normal with median most / 4, cut at most, which one reply reaches."""
    draw = torch.Generator().manual_seed(0)
    lengths = (most / 4 * torch.exp(0.7 * torch.randn(count, generator=draw))).round().clamp(1, most)
    lengths[0] = most
    return lengths.long().tolist()


class Forced:
    """`sample_tokens` whose replies end after a given number of tokens and not before."""

    def __init__(self, lengths: list[int], device: torch.device) -> None:
        self.lengths, self.real = torch.tensor(lengths, device=device), decoding.sample_tokens

    def __call__(self, logits, *, offset, stream, **options) -> SampledTokens:
        drawn = self.real(logits, offset=offset, stream=stream, **options)
        tokens = torch.where(drawn.tokens == END, END + 1, drawn.tokens)
        return drawn._replace(tokens=torch.where(offset + 1 >= self.lengths[stream], END, tokens))


class Ends(StoppingCriteria):
    def __init__(self, lengths: torch.Tensor, prompt: int) -> None:
        self.lengths, self.prompt = lengths, prompt

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.shape[1] - self.prompt >= self.lengths


def engine_run(model, prompts, lengths, batch: int, compile: bool | None = False) -> Callable[[], dict[str, float]]:
    most = max(lengths)
    engine = RolloutEngine(model, max_batch_tokens=batch * (len(prompts[0]) + most), compile=compile)
    forced = Forced(lengths, model.device)

    def run() -> dict[str, float]:
        decoding.sample_tokens = forced
        try:
            out = engine.generate(prompts, SamplingParams(most, stop_token_ids=[END]))
        finally:
            decoding.sample_tokens = forced.real
        assert [len(reply) for reply in out.response_ids] == lengths
        return out.stats

    return run


def generate_run(model, prompts, lengths, batch: int, static: bool) -> Callable[[], None]:
    ids, limits = torch.tensor(prompts, device=model.device), torch.tensor(lengths, device=model.device)

    def run() -> None:
        for low in range(0, len(prompts), batch):
            part = ids[low : low + batch]
            ends = StoppingCriteriaList([Ends(limits[low : low + batch], part.shape[1])])
            with torch.no_grad():
                model.generate(part, attention_mask=torch.ones_like(part), do_sample=True, temperature=1.0, top_k=0,
                               top_p=1.0, max_new_tokens=int(limits[low : low + batch].max()), eos_token_id=None,
                               pad_token_id=0, stopping_criteria=ends,
                               cache_implementation="static" if static else None, disable_compile=True)  # fmt: skip

    return run


def seconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def product_rate(device: torch.device, dtype: torch.dtype, repetitions: int) -> float:
    """Operations a second of a large square product."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    return 2 * size**3 / (median_ms(lambda: a @ b, device, repetitions) / 1000)


def floor_seconds(model, prompt: int, lengths: list[int], batch: int, bandwidth: float, rate: float) -> float:
    """Reading the weights once a step of full batches, and each sequence's keys and values once a token, or computing
    with them, whichever takes longer; and the prompts' products."""
    weights = sum(p.numel() for p in model.parameters())
    if not model.config.tie_word_embeddings:  # the embeddings are looked up, not read
        weights -= model.get_input_embeddings().weight.numel()
    steps = max(max(lengths), sum(lengths) / batch)
    positions = sum(length * prompt + length * (length + 1) // 2 for length in lengths)
    read = (weights * model.dtype.itemsize * steps + positions * cache_bytes_per_token(model)) / bandwidth
    trunk = weights - model.get_output_embeddings().weight.numel()  # the head reads a prompt's last token only
    return max(read, 2 * weights * sum(lengths) / rate) + 2 * trunk * prompt * len(lengths) / rate


def measure(name: str, model, batch: int, options, bandwidth: float, rate: float) -> Iterator[dict[str, object]]:
    device = model.device
    for workload in ("fixed", "ragged"):
        count = batch if workload == "fixed" else 4 * batch
        lengths = [options.new] * count if workload == "fixed" else ragged_lengths(count, options.new)
        draw = torch.Generator().manual_seed(1)
        prompts = torch.randint(3, model.config.vocab_size, (count, options.prompt), generator=draw).tolist()
        compiled = options.compile and (None if device.type == "cuda" else True)
        ours = engine_run(model, prompts, lengths, batch, compiled)
        peers = {"engine, not compiled": engine_run(model, prompts, lengths, batch)} if options.compile else {}
        peers |= {"generate": generate_run(model, prompts, lengths, batch, False)}
        if options.static:
            peers["generate, static cache"] = generate_run(model, prompts, lengths, batch, True)
        stats = ours()
        for run in peers.values():
            run()
        times: dict[str, list[float]] = {"engine": [], **{peer: [] for peer in peers}}
        for _ in range(options.repetitions):
            times["engine"].append(seconds(ours, device))
            for peer, run in peers.items():
                times[peer].append(seconds(run, device))
        median = statistics.median(times["engine"])
        needed = sum(lengths) - len(lengths)
        row = {
            "model": name, "dtype": str(model.dtype).removeprefix("torch."), "batch": batch, "workload": workload,
            "replies": count, "tokens": sum(lengths), "tokens_per_s": sum(lengths) / median,
            "floor": floor_seconds(model, options.prompt, lengths, batch, bandwidth, rate) / median,
            "wasted": stats["decode_row_steps"] / needed - 1, "prefill_tokens": stats["prefill_tokens"],
            "ratios": {peer: statistics.median(b / a for a, b in zip(times["engine"], times[peer], strict=True))
                       for peer in peers}, "seconds": times,
        }  # fmt: skip
        yield row
        ratios = "  ".join(f"{ratio:.2f}x {peer}" for peer, ratio in row["ratios"].items())
        print(f"{name:14}{row['dtype']:9}{batch:5} {workload:7}{row['tokens_per_s']:10.0f} tok/s  floor "
              f"{row['floor']:.2f}  wasted {row['wasted']:+.1%}  prefill {row['prefill_tokens']:6}  {ratios}",
              flush=True)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.rollout", description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", help="tiny, smollm2, " + ", ".join(QWEN))
    parser.add_argument("--batch", nargs="+", type=int)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="default: fp32 on CPU, bf16 on a GPU")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--no-static", dest="static", action="store_false", help="without the static cache")
    parser.add_argument("--compile", action="store_true", help="with compiled layers, beside those that are not")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no GPU here", file=sys.stderr)
        return 3
    cuda = device.type == "cuda"
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, None: torch.bfloat16 if cuda else torch.float32}[
        options.dtype
    ]
    names = options.models or (list(QWEN) if cuda else ["tiny", "smollm2"])
    bandwidth, rate = copy_bandwidth(device, 10), product_rate(device, dtype, 10)
    print(
        about(device),
        f"threads {torch.get_num_threads()}, copy {bandwidth / 1e9:.1f} GB/s, "
        f"products {rate / 1e12:.2f} TFLOP/s, prompt {options.prompt}",
    )
    figures = {"machine": about(device), "bandwidth": bandwidth, "rate": rate}
    figures |= {"options": vars(options) | {"json": None}, "rows": []}
    for name in names:
        model = model_of(name, device, dtype)
        for batch in options.batch or ([16, 64, 256] if cuda else [16]):
            for row in measure(name, model, batch, options, bandwidth, rate):
                figures["rows"].append(row)
                keep(options.json, figures)
        del model
    return 0


if __name__ == "__main__":
    sys.exit(main())
