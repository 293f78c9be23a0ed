"""Weak scaling of a PPO step over processes of this machine, and the bytes between them, counted and computed.

    python -m bench.scaling [--json FILE] [--model tiny] [--ranks 1 2] [--batch 8] [--steps 5]
    python -m bench.scaling --computed          the cost model alone, for a 7B model on 8 and 64 GPUs

Every rank has `--batch` responses a step, whatever their number, so that a step of N ranks would take as long as one of
1 if nothing crossed between them and every rank had a machine of its own; here they share its cores, one thread each.
`efficiency` is the median step of 1 rank over that of N, `communicating` the share of the step that a rank spends in
collectives, waiting for slower ranks included. Bytes are those that one rank sends in a step: of a sum of n bytes over
N ranks 2 (N - 1) / N n (a ring), of a scattered sum or of a gathering half of that. The model (docs/scaling.md) knows
gradients and weights; what else crosses (rows of token ids, log-probs, sums of metrics) is `rest`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bench.gpu_kernels import about
from bench.models import classifier_of, policy_of, prompts_of, tokenizer_of
from bench.ppo_step_ours import WholeReplies
from bench.processes import torchrun
from fastrlhf import PPOConfig, PPOTrainer
from fastrlhf.parallel.mapped import layers_of
from fastrlhf.runtime import distributed

LENGTHS = {"max_prompt_tokens": 16, "max_new_tokens": 24}
# Qwen2.5-7B, bf16, policy and critic; outer: embeddings, head and last norm.
SEVEN_B = {"parameters": 7_615_616_512, "outer": 2 * 152064 * 3584 + 3584, "roles": 2, "updates": 8, "width": 2}
# Bytes a second of a GPU, assumed: 350 GB/s by NVLink inside a machine of 8, 45 GB/s (400 Gbit/s) between machines.
LINKS = {8: 350e9, 64: 45e9}
# Of each collective: times (N - 1) / N of the whole, and where in its call the whole is. `*_single`: torch 2.13 on.
SENT = {
    "all_reduce": (2, 0, "tensor"),
    "reduce_scatter_tensor": (1, 1, "input"),
    "reduce_scatter_single": (1, 1, "input"),
    "all_gather": (1, 0, "tensor_list"),
    "all_gather_into_tensor": (1, 0, "output_tensor"),
    "all_gather_single": (1, 0, "output_tensor"),
}


def computed(parameters: int, ranks: int, parallel: str, *, updates: int, width: int, outer: int = 0) -> float:
    """Bytes that one rank sends in the updates of a step, for a role of so many trained parameters of `width` bytes.

    ddp sums fp32 gradients; zero scatters that sum and gathers the new weights; fsdp gathers them for the forward and
    for the backward pass, of one micro-batch a rank; the `outer` ones of them, which are outside of layers, once.
    """
    each = {"ddp": 2 * 4, "zero": 4 + width, "fsdp": 4 + 2 * width}[parallel]
    once = width * outer if parallel == "fsdp" else 0
    return updates * (parameters * each - once) * (ranks - 1) / ranks


def read(parameters: int, ranks: int, *, width: int) -> float:
    """Bytes that one rank sends where fsdp gathers a model once, to generate, to score, or for the old, reference's and
    critic's outputs."""
    return parameters * width * (ranks - 1) / ranks


def held(parameters: int, ranks: int, parallel: str, *, width: int) -> float:
    """Bytes of a trained role on one rank: weights, fp32 sums of gradients, masters (of weights that are no fp32) and
    moments. With fsdp shares of fp32 masters, moments and sums of gradients, scattered in each micro-batch."""
    if parallel == "fsdp":
        return parameters * (4 + 8 + 4) / ranks
    own = (0 if width == 4 else 4) + 8
    return parameters * (width + 4 + own / (ranks if parallel == "zero" else 1))


class Counted:
    """The collectives of this process: how often, bytes sent, seconds inside."""

    def __init__(self) -> None:
        self.bytes: Counter[str] = Counter()
        self.seconds = 0.0
        for name in SENT:
            if hasattr(dist, name):
                setattr(dist, name, self._counted(name, getattr(dist, name)))

    def _counted(self, name: str, call: Any) -> Any:
        factor, place, argument = SENT[name]

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            tensor = args[place] if len(args) > place else kwargs[argument]
            size = sum(part.nbytes for part in tensor) if isinstance(tensor, list) else tensor.nbytes
            self.bytes[name] += round(factor * size * (distributed.size() - 1) / distributed.size())
            began = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - began

        return wrapper


def trainer_of(options: argparse.Namespace) -> PPOTrainer:
    policy = policy_of(options.model, torch.device("cpu"), torch.float32)
    vocabulary, batch = policy.config.vocab_size, options.batch * distributed.size()
    config = PPOConfig(
        **LENGTHS, total_steps=options.steps + 1, rollout_batch_size=batch, mini_batch_size=batch, ppo_epochs=1,
        learning_rate=3e-6, critic_learning_rate=3e-6, save_every=0, eval_every=0, parallel=options.parallel,
    )  # fmt: skip
    trainer = PPOTrainer(
        config, policy=policy, tokenizer=tokenizer_of(vocabulary), reward=classifier_of(policy, 1),
        prompts=prompts_of(vocabulary, 8 * batch, LENGTHS["max_prompt_tokens"]), value_model=classifier_of(policy, 2),
    )  # fmt: skip
    trainer.engine = WholeReplies(trainer.policy, trainer.tokenizer, value_head=trainer.engine.value_head)
    return trainer


def expected(trainer: PPOTrainer, parallel: str) -> float:
    """Bytes that the cost model has for a step of `trainer`."""
    ranks, roles, sent = distributed.size(), trainer.roles, 0.0
    for role in trainer.trained().values():
        size = sum(p.numel() for p in role.optimizer.params)
        layers = sum(p.numel() for layer in layers_of(role.model) for p in layer.parameters())
        sent += computed(size, ranks, parallel, updates=1, width=4, outer=size - layers)
        if parallel == "fsdp":  # an update finds what is outside of layers where experience has left it
            sent -= read(size - layers, ranks, width=4)
    if parallel == "fsdp" and ranks > 1:
        once = [trainer.policy, *trainer.scorer.models]  # a rollout, scores
        once += [trainer.policy, roles.ref_policy, roles.value_model]  # old and reference's log-probs, values
        sent += sum(read(sum(p.numel() for p in model.parameters()), ranks, width=4) for model in once)
    return sent


def run_rank(options: argparse.Namespace) -> None:
    """What one rank measures; the lead writes it."""
    torch.set_num_threads(1)
    trainer, counted = trainer_of(options), Counted()
    parameters = {name: sum(p.numel() for p in role.optimizer.params) for name, role in trainer.trained().items()}
    steps: list[dict[str, Any]] = []
    began = time.perf_counter()
    for _ in trainer:
        now = time.perf_counter()
        steps.append({"seconds": now - began, "inside": counted.seconds, "bytes": dict(counted.bytes)})
        counted.bytes.clear()
        counted.seconds, began = 0.0, now
    steps = steps[1:]  # the first one allocates
    model = expected(trainer, options.parallel)
    sent = sum(steps[-1]["bytes"].values())
    row = {
        "ranks": distributed.size(), "parallel": options.parallel, "parameters": parameters,
        "seconds": statistics.median(step["seconds"] for step in steps),
        "communicating": statistics.median(step["inside"] / step["seconds"] for step in steps),
        "bytes": steps[-1]["bytes"], "sent": sent, "computed": round(model), "rest": sent - round(model),
    }  # fmt: skip
    if distributed.is_lead():
        options.row.write_text(json.dumps(row))
    distributed.wait_for_all()


def measure(ranks: int, parallel: str, arguments: list[str]) -> dict[str, Any]:
    """One run of so many ranks -> what its lead wrote."""
    with tempfile.TemporaryDirectory() as folder:
        return torchrun(ranks, "bench.scaling", ["--parallel", parallel, *arguments], Path(folder) / "row.json")


def predictions() -> list[dict[str, Any]]:
    """A 7B model in bf16, policy and critic, 8 updates a step; computed, nothing ran."""
    sizes = {name: SEVEN_B[name] for name in ("updates", "width", "outer")}
    rows = []
    for ranks, link in LINKS.items():
        for parallel in ("ddp", "zero", "fsdp"):
            sent = SEVEN_B["roles"] * computed(SEVEN_B["parameters"], ranks, parallel, **sizes)
            kept = held(SEVEN_B["parameters"], ranks, parallel, width=SEVEN_B["width"])
            row = {"gpus": ranks, "parallel": parallel, "sent": sent, "seconds": sent / link, "a trained role": kept}
            rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown of the runs."""
    lines = [
        "| ranks | parallel | step, s | efficiency | communicating | sent, MB | model, MB | rest, MB |",
        "|---" * 8 + "|",
    ]
    one = next((row["seconds"] for row in rows if row["ranks"] == 1), None)
    for row in rows:
        efficiency = "" if one is None else f"{one / row['seconds']:.2f}"
        amounts = " | ".join(f"{row[name] / 1e6:.2f}" for name in ("sent", "computed", "rest"))
        timed = f"{row['seconds']:.2f} | {efficiency} | {100 * row['communicating']:.0f} %"
        lines.append(f"| {row['ranks']} | {row['parallel']} | {timed} | {amounts} |")
    return "\n".join(lines)


def predicted_table(rows: list[dict[str, Any]]) -> str:
    """Markdown of `predictions`."""
    lines = [
        "| GPUs | parallel | sent a GPU and step, GB | at the assumed link, s | a trained role, GB |",
        "|---" * 5 + "|",
    ]
    for row in rows:
        amounts = f"{row['sent'] / 1e9:.0f} | {row['seconds']:.1f} | {row['a trained role'] / 1e9:.1f}"
        lines.append(f"| {row['gpus']} | {row['parallel']} | {amounts} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=["tiny", "smollm2"], default="tiny")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch", type=int, default=8, help="responses of a rank in a step")
    parser.add_argument("--steps", type=int, default=5, help="timed steps behind a first one")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("--computed", action="store_true", help="the cost model alone")
    parser.add_argument("--parallel", choices=["ddp", "zero", "fsdp"], default="ddp", help=argparse.SUPPRESS)
    parser.add_argument("--row", type=Path, help=argparse.SUPPRESS)  # of a rank: where its lead writes
    options = parser.parse_args()
    if options.row is not None:
        run_rank(options)
        return 0
    computed_rows = predictions()
    if options.computed:
        print(predicted_table(computed_rows))
        return 0
    machine = about(torch.device("cpu")) | {"cores": os.cpu_count(), "load before": os.getloadavg()[0]}
    print(machine)
    arguments = ["--model", options.model, "--batch", str(options.batch), "--steps", str(options.steps)]
    runs = [(n, parallel) for n in options.ranks for parallel in (("ddp",) if n == 1 else ("ddp", "zero", "fsdp"))]
    rows = [measure(ranks, parallel, arguments) for ranks, parallel in runs]
    print(table(rows), predicted_table(computed_rows), sep="\n\n")
    if options.json:
        sizes = {"model": options.model, "batch": options.batch, "steps": options.steps, **LENGTHS}
        figures = {"machine": machine, "sizes": sizes, "rows": rows, "computed": computed_rows}
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
