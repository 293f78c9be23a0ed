"""From what the phases hold to what a device needs: what no tensor shows, the peak, and what would lower it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from fastrlhf.config.base import UNSHARDED, StageConfig
from fastrlhf.config.errors import UserError
from fastrlhf.config.inputs import lora_options
from fastrlhf.config.stages import PPOConfig
from fastrlhf.parallel.sharding import SUMS_SHARE, fits_whole
from fastrlhf.plan.phases import Measured, Measurer, Phase, Target
from fastrlhf.runtime.distributed import BUCKET_ELEMENTS
from fastrlhf.runtime.hardware import installed
from fastrlhf.runtime.memory import AUTO_MICRO_BATCH_TOKENS
from fastrlhf_kernels.workspace import CPU_WORKSPACE, SHARE, head_workspace

UNITS = {"GIB": 1 << 30, "GB": 10**9, "MIB": 1 << 20, "MB": 10**6, "TIB": 1 << 40, "TB": 10**12}
CONTEXT = 600 << 20  # assumed: CUDA's context with the modules of torch, cuBLAS and Triton in it
CUBLAS = 32 << 20  # torch's cuBLAS workspace of a stream on sm_90 and later; 8 MiB before
GRAPH_NODE = 2048  # assumed: bytes of a recorded launch
LAUNCHES = 40  # of a layer in a decoding step
BUCKETS = 14  # CUDA graphs of a rollout at most
AUTO_SHARE = 0.9  # of the memory that micro_batch_tokens: auto fills; what fragmentation takes no plan knows
ENOUGH = 4096  # tokens of a micro-batch that keep a GPU busy: with fewer, gradient_checkpointing: auto is on
CLOSE = 0.97  # of the memory: a micro-batch that fills so much is large enough
FREE_SHARE = 2  # a rollout's cache takes half of what is free
SHARED_BY_ZERO = ("fp32 masters", "optimizer")  # of several GPUs each holds its share


def parse_size(text: str, field: str) -> int:
    """24GiB, 80GB, 1.5 TiB -> bytes. UserError for a number without its unit, and for what is none."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or float(match[1]) <= 0:
        raise UserError(f"{field}: {text!r} is no size; write one such as 24GiB or 80GB")
    if match[2].upper() not in UNITS:
        unit = f"the unit {match[2]!r} is not known" if match[2] else "its unit is missing"
        raise UserError(f"{field}: {text!r}: {unit}; write one such as {match[1]}GiB or {match[1]}GB")
    return int(float(match[1]) * UNITS[match[2].upper()])


@dataclass(frozen=True)
class Need:
    """A phase on its device. lines: bytes by what they are, which add up to `total`."""

    lines: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.lines.values())


@dataclass(frozen=True)
class Change:
    """Switches on top of the recipe, and the peak with them. problem: why it was not computed."""

    switch: str
    peak: int | None
    problem: str = ""


@dataclass(frozen=True)
class Plan:
    """measured: what the phases hold; needs: of each phase. most_rows: sequences of the largest micro-batch that fits,
    most_slots: sequences that fit into a rollout together; None: no memory was given, or none fits."""

    stage: str
    target: Target
    dtype: str
    measured: Measured
    needs: dict[str, Need]
    changes: list[Change]
    tokens: int  # of a micro-batch: what the recipe says, or auto is
    checkpointing: bool = False  # the same of gradient_checkpointing
    most_rows: int | None = None
    most_slots: int | None = None

    @property
    def peak(self) -> int:
        return max(need.total for need in self.needs.values())

    @property
    def phase(self) -> str:
        """The phase of the peak."""
        return max(self.needs, key=lambda name: self.needs[name].total)

    @property
    def fits(self) -> bool | None:
        """None: no memory was given."""
        return None if self.target.gpu is None else self.peak <= self.target.gpu


def make_plan(stage: str, inputs: Mapping[str, Any], config: StageConfig, target: Target, *, search: bool) -> Plan:
    """Plan a stage's memory. search: look for what fits, and for what would make it fit; it runs the parts again, some
    ten times. UserError as `measure` has it."""
    measure = Measurer(stage, inputs, target)
    config, plan = _settled(measure, config)
    if target.gpu is None or not search:
        return plan
    peak_of = partial(_peak_of_rows, measure, config, plan.measured.length)
    most_rows = _most_rows(plan, peak_of, target.gpu, plan.measured.count)
    changes = [] if plan.fits else list(_changes(measure, config))
    return replace(plan, changes=changes, most_rows=most_rows, most_slots=_most_slots(plan))


def _settled(measure: Measurer, config: StageConfig) -> tuple[StageConfig, Plan]:
    """What is auto, chosen for the target, and the plan with it. Checkpointing costs a forward pass: it is on where the
    run does not fit without, or in micro-batches that would leave the GPU idle."""
    auto, target = config.micro_batch_tokens is None, measure.target
    choose = (
        config.gradient_checkpointing is None and target.gpu is not None and not getattr(config, "head_only", False)
    )
    room = 0 if target.gpu is None else int(AUTO_SHARE * target.gpu)
    for checkpointing in (False, True) if choose else (bool(config.gradient_checkpointing),):
        tried = _for(config, target).model_copy(update={"gradient_checkpointing": checkpointing})
        plan = _plan(measure, tried)
        if auto and target.gpu is not None and plan.peak > room:
            peak_of = partial(_peak_of_rows, measure, tried, plan.measured.length)
            rows = _most_rows(plan, peak_of, room, plan.measured.rows) or 1
            tried = tried.model_copy(update={"micro_batch_tokens": rows * plan.measured.length})
            plan = _plan(measure, tried)
        small = plan.tokens < ENOUGH and plan.measured.rows < plan.measured.count
        if plan.peak <= room and not (auto and small):
            break
    return tried, plan


def _plan(measure: Measurer, config: StageConfig) -> Plan:
    measured, needs = _needs(measure, config)
    target = measure.target
    dtype = target.dtype(config.dtype)
    chosen = {"tokens": config.micro_batch_tokens, "checkpointing": config.gradient_checkpointing}
    return Plan(measure.stage, target, dtype, measured, needs, [], **chosen)


def _for(config: StageConfig, target: Target) -> StageConfig:
    """`micro_batch_tokens: auto` at its most on the target."""
    tokens = config.micro_batch_tokens or AUTO_MICRO_BATCH_TOKENS["cpu" if target.gpu is None else "cuda"]
    return config.model_copy(update={"micro_batch_tokens": tokens})


def _needs(measure: Measurer, config: StageConfig) -> tuple[Measured, dict[str, Need]]:
    measured, target = measure(config), measure.target
    needs = _need_of_phases(measured, config, target)
    if measured.slots and target.gpu is not None:  # a rollout takes as many slots as half of the free memory holds
        rollout = measured.phases["rollout"]
        free = target.gpu - (needs["rollout"].total - rollout.cache)
        slots = max(1, min(measured.slots, free // FREE_SHARE // measured.slot_bytes))
        if slots < measured.slots:
            measured = measure(config, slots)
            needs = _need_of_phases(measured, config, target)
    return measured, needs


def _need_of_phases(measured: Measured, config: StageConfig, target: Target) -> dict[str, Need]:
    return {name: _need(measured, name, phase, config, target) for name, phase in measured.phases.items()}


def _is_of_weights(line: str) -> bool:
    return line.endswith((": parameters", ": adapters"))


def _shared(lines: dict[str, int], measured: Measured, phase: str, config: StageConfig, target: Target) -> None:
    """What of a phase several GPUs share, in place: with zero masters and moments, with fsdp weights too, of which it
    gathers some for the phase, and sums of gradients that are not kept whole."""
    names = [name for name in SHARED_BY_ZERO if name in lines]
    if config.parallel == "fsdp" and target.gpus > 1:
        weights = {name: size for name, size in lines.items() if _is_of_weights(name)}
        names += weights
        sums = measured.held["gradients"]
        if "gradients" in lines and target.gpu is not None and SUMS_SHARE * sums > target.gpu:
            lines["gradients"] = -(-lines["gradients"] // target.gpus)
        for role in measured.recast:
            lines.pop(f"{role}: parameters", None)
    if config.parallel != "ddp":
        shares = {name: -(-lines[name] // target.gpus) for name in names if name in lines}
        lines |= shares
        if config.parallel == "fsdp" and target.gpus > 1:
            lines["gathered weights"] = _gathered(weights, measured, phase, sum(shares.values()), target)


def _gathered(weights: dict[str, int], measured: Measured, phase: str, shares: int, target: Target) -> int:
    """Bytes that parallel = fsdp gathers at a time in a phase, beside the shares: models that ranks run alone are whole
    where that fits, all others in layers."""
    alone = {"rollout": "policy", "score": "reward model"}.get(phase)
    if alone is not None:
        whole = sum(size for name, size in weights.items() if name.startswith(alone))
        if fits_whole(shares, whole, target.gpu or float("inf")):
            return whole
    return sum(size for role, size in measured.layered.items() if role.startswith(alone or ""))


def _need(measured: Measured, name: str, phase: Phase, config: StageConfig, target: Target) -> Need:
    """What stays, then what the phase adds, then what no tensor shows."""
    cuda = target.gpu is not None
    lines = {name: size for name, size in measured.held.items() if name != "gradients"}
    rest = phase.peak - sum(lines.values())
    if phase.cache:
        lines["keys and values"] = phase.cache
        rest -= phase.cache
    if phase.trains:
        lines["gradients"] = min(measured.held["gradients"], max(0, rest))
        rest -= lines["gradients"]
    _shared(lines, measured, name, config, target)
    if cuda:
        rest -= phase.cpu_only
        lines["parked in host memory"] = -phase.parked
    lines["activations and the rest"] = rest
    if phase.head is not None:
        rows, ppo = phase.head
        size = 2 if target.dtype(config.dtype) == "bf16" else 4
        limit = target.gpu // SHARE if cuda else CPU_WORKSPACE
        head = {"cuda": cuda, "ppo": ppo, "size": size, "workspace": limit}
        lines["workspace of the fused head"] = head_workspace(rows, *measured.shape, **head)
    if cuda:
        lines["allocator rounding"] = phase.rounded - phase.peak
        lines["CUDA context (assumed)"] = CONTEXT
        lines["cuBLAS workspace (assumed)"] = CUBLAS
        if phase.cache:
            lines["CUDA graphs (assumed)"] = GRAPH_NODE * LAUNCHES * BUCKETS * measured.layers
        if target.gpus > 1 and phase.trains:
            bucket = max(4 * BUCKET_ELEMENTS, measured.largest)
            if config.parallel == "fsdp":  # the fp32 gradients of what is gathered, and as much again to be scattered
                bucket = 2 * max(measured.layered.values()) * (1 if target.dtype(config.dtype) == "fp32" else 2)
            lines["buckets between GPUs"] = min(measured.held["gradients"], bucket)
    return Need({name: size for name, size in lines.items() if size})


# ------------------------------------------------------------------------------------------------ what fits, what would


def _peak(measure: Measurer, config: StageConfig) -> int:
    return max(need.total for need in _needs(measure, config)[1].values())


def _peak_of_rows(measure: Measurer, config: StageConfig, length: int, rows: int) -> int:
    return _peak(measure, config.model_copy(update={"micro_batch_tokens": rows * length}))


def _most_rows(plan: Plan, peak_of: Callable[[int], int], room: int, last: int) -> int | None:
    """Sequences of the largest micro-batch that fits into `room` bytes, from one to `last`; None: not even one does.

    Memory is about linear in them: a line through two that are known, and a look at what it says.
    """
    here = plan.measured.rows
    known = {here: plan.peak}
    other = last if plan.peak <= room else 1
    if other != here:
        known[other] = peak_of(other)
    low, high = min(known), max(known)
    if known[high] <= room:
        return high
    if known[low] > room:
        return None
    while high - low > 1:
        guess = low + int((room - known[low]) * (high - low) / max(1, known[high] - known[low]))
        guess = min(max(guess, low + 1), high - 1)
        known[guess] = peak_of(guess)
        low, high = (guess, high) if known[guess] <= room else (low, guess)
        if low == guess and known[low] >= CLOSE * room:
            break
    return low


def _most_slots(plan: Plan) -> int | None:
    """Sequences whose keys and values fit beside everything else of a rollout."""
    if not plan.measured.slots:
        return None
    rollout = plan.needs["rollout"]
    free = plan.target.gpu - rollout.total + rollout.lines.get("keys and values", 0)
    return max(0, free // plan.measured.slot_bytes)


def _changes(measure: Measurer, config: StageConfig) -> Iterator[Change]:
    """The switches that this run does not use, the least costly first, each on top of those before it, up to the one
    that makes it fit."""
    for switch, fields, package in _switches(config, measure.target.gpus):
        if package is not None and not installed(package):
            yield Change(switch, None, f"needs the package {package} here too, to be computed")
            continue
        config = config.model_copy(update=fields)
        peak = _peak(measure, config)
        yield Change(switch, peak)
        if peak <= measure.target.gpu:
            return


def _switches(config: StageConfig, gpus: int) -> Iterator[tuple[str, dict[str, Any], str | None]]:
    """(as it is typed, the fields, the package that it needs)."""
    ppo = isinstance(config, PPOConfig)
    averages = ppo and config.ema_decay is not None
    zero = gpus > 1 and config.parallel == "ddp" and config.optimizer == "adamw" and not averages
    if zero:
        yield "parallel=zero", {"parallel": "zero"}, None
    if not config.gradient_checkpointing:
        yield "gradient_checkpointing=true", {"gradient_checkpointing": True}, None
    if config.lora is None and not getattr(config, "head_only", False):
        yield "lora=16", {"lora": lora_options(16)}, "peft"
    if config.quantize is None:
        yield "quantize=nf4", {"quantize": "nf4"}, "bitsandbytes"
    if config.optimizer == "adamw" and config.parallel == "ddp" and not zero:
        yield "optimizer=adamw8bit", {"optimizer": "adamw8bit"}, None
    if ppo and not config.offload:
        yield "offload=true", {"offload": True}, None
    if ppo and config.advantage == "gae" and config.critic == "separate":
        yield "critic=shared_trunk", {"critic": "shared_trunk"}, None
    given = [name for name in UNSHARDED if getattr(config, name, None)]
    if gpus > 1 and config.parallel != "fsdp" and config.optimizer == "adamw" and not averages and not given:
        # In place of what it does not take, which stands above.
        without = {"quantize": None, **({"offload": False} if ppo else {})}
        yield "parallel=fsdp, without quantize and offload", {"parallel": "fsdp", "optimizer": "adamw", **without}, None
