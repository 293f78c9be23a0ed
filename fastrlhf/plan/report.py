"""A plan as people and as programs read it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fastrlhf.checkpoint.state import restore_rng, rng_tensors
from fastrlhf.config.base import StageConfig
from fastrlhf.config.outcome import outcome
from fastrlhf.plan.estimate import Plan, make_plan, parse_size
from fastrlhf.plan.phases import Target
from fastrlhf.plan.speed import Profile, profile_of, shares


def size(count: int) -> str:
    """Bytes in the unit that suits them."""
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if abs(count) >= 1 << power:
            return f"{count / (1 << power):.2f} {unit}"
    return f"{count} B"


def one_line(plan: Plan) -> str:
    """The peak in a sentence, for --dry-run."""
    where = "a CPU" if plan.target.gpu is None else "each GPU" if plan.target.gpus > 1 else "the GPU"
    verdict = "" if plan.fits is None else f", of {size(plan.target.gpu)}: {'fits' if plan.fits else 'does not fit'}"
    tokens = "" if plan.fits is None else f" with micro-batches of {plan.tokens} tokens"
    tokens += " and gradient checkpointing" if plan.fits is not None and plan.checkpointing else ""
    peak = f"{size(plan.peak)} of {where} at the {plan.phase} ({plan.dtype}){tokens}{verdict}"
    return f"memory: {peak}; computed, not run"


def before_a_run(stage: str, inputs: Mapping[str, Any], config: StageConfig, target: Target) -> tuple[str, Plan | None]:
    """-> the peak in a sentence, and on a GPU the plan, which says what auto is; None: not computed, as the sentence
    says. Random numbers go on from where they were."""
    random_numbers = rng_tensors()
    # A model's own code runs here on tensors without numbers, which it may not expect.
    plan, error = outcome(lambda: make_plan(stage, inputs, config, target, search=False))
    restore_rng(random_numbers)
    if error is not None:
        return f"memory: not computed: {str(error).strip().partition(chr(10))[0] or type(error).__name__}", None
    return one_line(plan), None if target.gpu is None else plan


def lines_of(plan: Plan) -> list[str]:
    """The whole plan: what each phase holds, what fits, what would make it fit."""
    measured = plan.measured
    rows = f"micro-batches of {measured.rows} x {measured.length} tokens"
    slots = f", {measured.slots} sequences decode together" if measured.slots else ""
    result = [one_line(plan), f"largest rows that the recipe allows: {rows}{slots}"]
    result += measured.notes
    for name, need in plan.needs.items():
        result += ["", f"{name}: {size(need.total)}"]
        result += [f"  {line:32} {size(count):>12}" for line, count in need.lines.items()]
    if plan.target.gpu is None:
        return [*result, "", "what fits: give --gpu-memory, for example --gpu-memory 24GiB"]
    most = plan.most_rows
    tokens = (
        f"micro_batch_tokens={most * measured.length} ({most} sequences)" if most else "none, not even one sequence"
    )
    result += ["", f"largest micro-batch that fits: {tokens}"]
    if plan.most_slots is not None:
        room = plan.most_slots
        result.append(f"largest rollout that fits: {room} sequences of {measured.length} tokens together")
    if plan.changes:
        result += ["", "to make it fit, the least costly first, each on top of those above it:"]
        result += [f"  {change.switch:32} {change.problem or size(change.peak):>12}" for change in plan.changes]
        if plan.changes[-1].peak is None or plan.changes[-1].peak > plan.target.gpu:
            result.append("  that is not enough: use shorter rows, a smaller model or a larger GPU")
    return result


def step_lines(plan: Plan, profile: Profile) -> list[str]:
    """What a step does, and how long that takes at least on a device."""
    parts = shares(plan.measured, plan.dtype, profile)
    tflops, gigabytes = profile.flops[plan.dtype] / 1e12, profile.bandwidth / 1e9
    peaks = f"{tflops:.4g} TFLOP/s in {plan.dtype}, {gigabytes:.4g} GB/s"
    result = [
        "",
        f"a step: at least {sum(part.seconds for part in parts.values()):.3g} s ({profile.name}: {peaks}); computed, "
        "not run",
        f"  {'part':24}{'times':>10}{'launches':>12}{'TFLOP':>10}{'GB':>10}{'s':>10}  mostly",
    ]
    for name, part in parts.items():
        figures = f"{part.flops / 1e12:>10.3g}{part.bytes / 1e9:>10.3g}{part.seconds:>10.3g}"
        result.append(f"  {name:24}{part.times:>10.4g}{part.launches:>12}{figures}  {part.bound}")
    return result


def as_json(plan: Plan, profile: Profile | None = None) -> dict[str, Any]:
    """All numbers in bytes, and in seconds."""
    step = None
    if profile is not None:
        parts = {name: part._asdict() for name, part in shares(plan.measured, plan.dtype, profile).items()}
        seconds = sum(part["seconds"] for part in parts.values())
        step = {"device": profile._asdict(), "seconds": seconds, "parts": parts}
    return {
        "stage": plan.stage,
        "computed": True,
        "dtype": plan.dtype,
        "gpu_memory": plan.target.gpu,
        "gpus": plan.target.gpus,
        "peak": plan.peak,
        "phase": plan.phase,
        "micro_batch_tokens": plan.tokens,
        "gradient_checkpointing": plan.checkpointing,
        "fits": plan.fits,
        "phases": {name: {"total": need.total, "lines": need.lines} for name, need in plan.needs.items()},
        "micro_batch": {"sequences": plan.measured.rows, "tokens": plan.measured.rows * plan.measured.length},
        "slots": plan.measured.slots or None,
        "largest_micro_batch": plan.most_rows,
        "largest_rollout": plan.most_slots,
        "changes": [vars(change) for change in plan.changes],
        "notes": plan.measured.notes,
        "step": step,
    }


def planned(
    stage: str,
    inputs: Mapping[str, Any],
    config: StageConfig,
    gpu_memory: str | None,
    gpus: int,
    as_data: bool,
    device: str | None = None,
    calibrate: bool = False,
) -> tuple[str, bool]:
    """-> what `fastrlhf plan` prints, and whether the run does not fit. gpu_memory None: this machine's GPU, where it
    has one. device: of PROFILES, or calibrate this machine's: how long a step takes."""
    profile = profile_of(device, calibrate)
    plan = make_plan(stage, inputs, config, target_of(gpu_memory, gpus), search=True)
    if as_data:
        return json.dumps(as_json(plan, profile), indent=1), plan.fits is False
    hint = ["", "how long a step takes: give --device, for example --device h100, or --calibrate"]
    lines = lines_of(plan) + (hint if profile is None else step_lines(plan, profile))
    return "\n".join(lines), plan.fits is False


def target_of(gpu_memory: str | None, gpus: int = 1) -> Target:
    """The device that a plan is for."""
    import torch

    if gpu_memory is not None:
        return Target(parse_size(gpu_memory, "--gpu-memory"), gpus)
    if torch.cuda.is_available():
        return Target(torch.cuda.get_device_properties(0).total_memory, gpus)
    return Target(None, gpus)
