"""The clock of both sides of `bench.ppo_step`: process CPU seconds on a CPU, wall seconds on a GPU; and peak memory."""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers


class Clock:
    """Seconds of steps, and of phases inside them; the first step is the warm-up and is left out."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.steps: list[float] = []
        self.phases: list[dict[str, float]] = []
        self._now: dict[str, float] = {}
        self._mark = 0.0
        self.imports_mib = self.peak_mib()  # made before the models: what Python and the libraries take

    def now(self) -> float:
        if self.device.type != "cuda":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = self.now()
        yield
        self.add(name, self.now() - start)

    def add(self, name: str, seconds: float) -> None:
        self._now[name] = self._now.get(name, 0.0) + seconds

    def start(self) -> None:
        """The first step begins."""
        self._mark = self.now()

    def step(self) -> None:
        """A step ends, and the next one begins."""
        now = self.now()
        self.steps.append(now - self._mark)
        self._now["other"] = self.steps[-1] - sum(self._now.values())
        self.phases.append(self._now)
        self._mark, self._now = now, {}
        if len(self.steps) == 1 and self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def peak_mib(self) -> float:
        """Of this process: resident memory on a CPU (of its own, not of the process that started it), allocated on a
        GPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        status = Path("/proc/self/status")
        if status.exists():  # getrusage inherits the peak of the parent through exec
            line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
            return int(line.split()[1]) / 2**10
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def versions() -> dict[str, str]:
    """Of what both sides run on."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": sys.version.split()[0],
    }


def report(clock: Clock, what: dict[str, object]) -> None:
    """One line of JSON: medians over the measured steps."""
    kept = clock.phases[1:]
    figures = {
        "seconds": statistics.median(clock.steps[1:]),
        "steps": clock.steps,
        "phases": {name: statistics.median(p.get(name, 0.0) for p in kept) for name in kept[0]},
        "peak_mib": clock.peak_mib(),
        "imports_mib": clock.imports_mib,
        "versions": versions(),
        "device": torch.cuda.get_device_name(clock.device) if clock.device.type == "cuda" else "cpu",
    }
    print(json.dumps(figures | what))
