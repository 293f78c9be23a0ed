"""Step time and bytes of state of the optimizers, and how far the 8-bit ones end from fp32 AdamW.

    python -m bench.optimizers [--json FILE]         8.4M parameters, on this machine's CPU

Arms take turns; a time is the median of the turns. `state` counts what the optimizer keeps a parameter, its scales
included. `drift` is |w - w_adamw| / |w_adamw - w_0| after 50 steps on a small regression, same start and data.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn

from bench.gpu_kernels import about
from fastrlhf.runtime.optim import Optimizer

NAMES = ("adamw", "adamw8bit", "paged_adamw8bit")
DRIFT_STEPS = 50


def made(name: str, model: nn.Module, learning_rate: float = 1e-3) -> Optimizer:
    return Optimizer(model, name=name, learning_rate=learning_rate, max_grad_norm=0.0)


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of the state's tensors, without step counts and the tables of levels that all parameters share."""
    entries = (item for entry in optimizer.inner.state.values() for item in entry.items())
    return sum(
        value.nbytes
        for key, value in entries
        if isinstance(value, torch.Tensor) and key != "step" and not key.startswith("qmap")
    )


def timed(repetitions: int) -> dict[str, dict[str, float]]:
    arms, times = {}, {name: [] for name in NAMES}
    for name in NAMES:
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(8)))
        arms[name] = (model, made(name, model))
    for turn in range(repetitions + 1):
        for name, (model, optimizer) in arms.items():
            for p in model.parameters():
                p.grad = torch.full_like(p, 1e-3)
            start = time.perf_counter()
            optimizer.inner.step()
            if turn:  # the first makes the state
                times[name].append(time.perf_counter() - start)
    rows = {}
    for name, (model, optimizer) in arms.items():
        parameters = sum(p.numel() for p in model.parameters())
        rows[name] = {"ms": 1e3 * statistics.median(times[name]), "state": state_bytes(optimizer) / parameters}
    for row in rows.values():
        row["times_adamw"] = row["ms"] / rows["adamw"]["ms"]
    return rows


def trained(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """-> the weights at the start and after DRIFT_STEPS steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 2048), nn.Tanh(), nn.Linear(2048, 512))
    x, y = torch.randn(256, 512), torch.randn(256, 512)
    optimizer = made(name, model, 1e-3)
    start = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    for _ in range(DRIFT_STEPS):
        (model(x) - y).square().mean().backward()
        optimizer.step(1e-3)
    return start, torch.cat([p.detach().flatten() for p in model.parameters()])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.optimizers", description=__doc__.split("\n")[0])
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    options = parser.parse_args()
    rows = timed(options.repetitions)
    start, reference = trained("adamw")
    machine = about(torch.device("cpu")) | {"threads": torch.get_num_threads()}
    print(machine)
    for name, row in rows.items():
        row["drift"] = float((trained(name)[1] - reference).norm() / (reference - start).norm())
        speed = f"{row['ms']:8.1f} ms {row['times_adamw']:6.1f}x adamw"
        print(f"{name:16}{speed} {row['state']:6.2f} bytes a parameter  drift {row['drift']:.1%}")
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
