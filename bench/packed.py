"""Whether a rollout on a CPU gains from weights packed for oneDNN, the packing included.

    python -m bench.packed [--new 64 256] [--json bench/results/packed_cpu.json]

SmolLM2-135M, one batch, replies of `--new` tokens: the engine as it is, and the same with every linear layer of the
trunk packed when generation begins and dropped behind it. Sides take turns; seconds are of the process, so that other
work on the machine counts less; ratios are medians of the turns (above 1: packing gains). Greedy replies of both are
compared: where one parts from the other, `gap` is by how many nats the plain model prefers its own token, and `noise`
by how many nats the log-probs of what they agree on differ at most, so that a gap of that size is a tie.
`bf16` says whether this processor can run oneDNN's packed bf16 products (AVX512 or AVX-NE-CONVERT).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bench.gpu_kernels import about, keep
from bench.rollout import engine_run, model_of
from fastrlhf import RolloutEngine, SamplingParams


class Packed(nn.Module):
    """A linear layer whose weight oneDNN has laid out for products of `rows` rows."""

    def __init__(self, linear: nn.Linear, rows: int) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), rows)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


@contextmanager
def packed(model: PreTrainedModel, rows: int) -> Iterator[None]:
    """The trunk's linear layers are packed in this context."""
    owners = [
        (parent, name, child)
        for parent in model.base_model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear
    ]
    try:
        with torch.inference_mode():
            for parent, name, linear in owners:
                parent._modules[name] = Packed(linear, rows)
        yield
    finally:
        for parent, name, linear in owners:
            parent._modules[name] = linear


def seconds(run: Any) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def bf16_products() -> str:
    """Nothing where this processor has them, else what oneDNN says."""
    try:
        torch.ops.mkldnn._reorder_linear_weight(torch.zeros(16, 16, dtype=torch.bfloat16), 16)
    except RuntimeError as error:
        return str(error).split("\\n")[0]
    return ""


def partings(model: PreTrainedModel, prompts: list[list[int]], new: int) -> list[dict[str, float]]:
    """Where greedy replies of the packed model leave those of the plain one."""
    params = SamplingParams(new, temperature=0.0, stop_token_ids=[])
    plain = RolloutEngine(model).generate(prompts, params)
    with packed(model, len(prompts)):
        other = RolloutEngine(model).generate(prompts, params)
    found = []
    for row, prompt in enumerate(prompts):
        ours, theirs = plain.response_ids[row], other.response_ids[row]
        place = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)
        if place is None:
            continue
        with torch.no_grad():
            logits = model(torch.tensor([prompt + ours[:place]])).logits[0, -1]
        noise = (plain.policy_log_probs[row][:place] - other.policy_log_probs[row][:place]).abs()
        gap = float(logits[ours[place]] - logits[theirs[place]])
        found.append({"reply": row, "token": place, "gap": gap, "noise": float(noise.max()) if place else 0.0})
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.packed", description=__doc__.split("\n")[0])
    parser.add_argument("--new", nargs="+", type=int, default=[64, 256])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = torch.device("cpu")
    model = model_of("smollm2", device, torch.float32)
    draw = torch.Generator().manual_seed(1)
    prompts = torch.randint(3, model.config.vocab_size, (options.batch, options.prompt), generator=draw).tolist()
    figures: dict[str, Any] = {"machine": about(device), "batch": options.batch, "prompt": options.prompt}
    figures |= {"threads": torch.get_num_threads(), "bf16": bf16_products(), "rows": []}
    print(figures["machine"], "bf16:", figures["bf16"] or "yes")
    for new in options.new:
        run = engine_run(model, prompts, [new] * options.batch, options.batch)
        run()
        times: dict[str, list[float]] = {"plain": [], "packed": [], "packing": []}
        for _ in range(options.repetitions):
            times["plain"].append(seconds(run))
            start = time.process_time()
            with packed(model, options.batch):
                times["packing"].append(time.process_time() - start)
                run()
            times["packed"].append(time.process_time() - start)
        ratio = statistics.median(a / b for a, b in zip(times["plain"], times["packed"], strict=True))
        row = {"new": new, "ratio": ratio, "seconds": times, "partings": partings(model, prompts, min(new, 64))}
        figures["rows"].append(row)
        keep(options.json, figures)
        packing = statistics.median(times["packing"])
        print(f"{new} tokens: {ratio:.3f}x with packing ({packing:.2f} s); partings {row['partings']}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
