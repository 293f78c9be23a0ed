"""How long a step takes at least: what its parts do, over what a device can do. Computed, never measured.

Each operator takes the longest of its launch, its arithmetic at the device's peak and its bytes at the device's
bandwidth (the roofline of Williams et al. 2009); a step is their sum. Published peaks are seldom reached and nothing
that crosses between GPUs is in it, so a run takes longer.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import torch

from fastrlhf.config.errors import UserError
from fastrlhf.plan.phases import Measured, Part

LAUNCH, GRAPH_LAUNCH = 5e-6, 2.5e-6  # assumed, seconds: from Python, and from a CUDA graph
TRIALS = 5


class Profile(NamedTuple):
    """What a device can do: floating-point operations a second of dense products by dtype (products of fp32 without
    TF32), bytes a second of its memory, seconds of a launch and of one in a graph."""

    name: str
    flops: dict[str, float]
    bandwidth: float
    launch: float = LAUNCH
    graph_launch: float = GRAPH_LAUNCH


def _published(name: str, bf16: float, fp32: float, bandwidth: float) -> Profile:
    return Profile(f"{name}, published", {"bf16": bf16 * 1e12, "fp32": fp32 * 1e12}, bandwidth * 1e9)


# TFLOP/s of dense bf16 products with fp32 sums, of fp32, and GB/s: NVIDIA's data sheets and architecture papers.
PROFILES = {
    "a10": _published("A10", 125, 31.2, 600),
    "a100": _published("A100 80 GB SXM", 312, 19.5, 2039),
    "a100-40gb": _published("A100 40 GB SXM", 312, 19.5, 1555),
    "b200": _published("B200 SXM", 2250, 75, 7700),
    "h100": _published("H100 SXM", 989, 67, 3350),
    "h100-pcie": _published("H100 PCIe", 756, 51, 2000),
    "h200": _published("H200 SXM", 989, 67, 4800),
    "l4": _published("L4", 121, 30.3, 300),
    "l40s": _published("L40S", 362, 91.6, 864),
    "rtx3090": _published("GeForce RTX 3090", 71, 35.6, 936),
    "rtx4090": _published("GeForce RTX 4090", 165.2, 82.6, 1008),
    "rtx5090": _published("GeForce RTX 5090", 209.5, 104.8, 1792),
}


class Share(NamedTuple):
    """A part of a step on a device. seconds: at least, over all its times; bound: what most of them are spent on."""

    times: float
    launches: int
    flops: int
    bytes: int
    seconds: float
    bound: str


def profile_of(name: str | None, calibrate: bool) -> Profile | None:
    """The device that a step is computed for; None: none is named. UserError for an unknown one."""
    if name is not None and calibrate:
        raise UserError(f"--device: {name}: --calibrate measures this machine instead; give one of the two")
    if name is not None and name not in PROFILES:
        raise UserError(f"--device: {name!r} is not known; use one of {', '.join(PROFILES)}, or --calibrate")
    return calibrated() if calibrate else None if name is None else PROFILES[name]


def shares(measured: Measured, dtype: str, profile: Profile) -> dict[str, Share]:
    """A step by its parts. dtype: fp32 or bf16, of the products."""
    return {name: _share(part, profile.flops[dtype], profile) for name, part in measured.step.items()}


def _share(part: Part, flops_per_second: float, profile: Profile) -> Share:
    launch = profile.graph_launch if part.in_graph else profile.launch
    spent = {"launches": 0.0, "arithmetic": 0.0, "bandwidth": 0.0}
    for (flops, size), count in part.work.launched.items():
        takes = {"launches": launch, "arithmetic": flops / flops_per_second, "bandwidth": size / profile.bandwidth}
        bound = max(takes, key=takes.__getitem__)
        spent[bound] += count * takes[bound]
    work, times = part.work, part.times
    total = [round(times * value) for value in (work.launches, work.flops, work.bytes)]
    return Share(times, *total, times * sum(spent.values()), max(spent, key=spent.__getitem__))


# ------------------------------------------------------------------------------------------------------ this machine


def calibrated() -> Profile:
    """This machine's GPU, or its CPU with the threads that torch uses: large products, a large copy and many small
    operators, medians of 5, a second or two."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    width, size = (8192, 1 << 30) if cuda else (1024, 1 << 27)
    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32}
    flops = {name: _products(device, dtype, width) for name, dtype in dtypes.items()}
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    copied = 2 * size / _seconds(lambda: target.copy_(source), device)
    small = torch.ones(8, device=device)
    launch = _seconds(lambda: [small.add_(1) for _ in range(1000)], device) / 1000
    name = torch.cuda.get_device_name() if cuda else f"this CPU, {torch.get_num_threads()} threads"
    return Profile(f"{name}, measured now", flops, copied, launch, min(launch, GRAPH_LAUNCH) if cuda else launch)


def _products(device: torch.device, dtype: torch.dtype, width: int) -> float:
    a, b = (torch.ones(width, width, device=device, dtype=dtype) for _ in range(2))
    return 2 * width**3 / _seconds(lambda: a @ b, device)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    def once() -> float:
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    once()
    return median(once() for _ in range(TRIALS))
