"""Which of several ways to compute the same thing is fastest here: measured once, on request, and remembered.

FASTRLHF_AUTOTUNE=1 asks for it. The answers are kept in $XDG_CACHE_HOME/fastrlhf/autotune.json (~/.cache/...), one a
question; the question names the chip, the shape and the versions, so another machine asks again.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

REPETITIONS = 5
answers: dict[str, str] = {}


def wanted() -> bool:
    return os.environ.get("FASTRLHF_AUTOTUNE") == "1"


def cache_file() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastrlhf" / "autotune.json"


def fastest(question: str, ways: dict[str, Callable[[], object]], device: torch.device) -> str:
    """The name of the way with the least median time; from memory or the cache file where `question` was answered."""
    if question not in answers:
        answers.update(_stored())
    if answers.get(question) not in ways:
        for way in ways.values():
            way()  # compiles
        times = {name: _median(way, device) for name, way in ways.items()}
        answers[question] = min(times, key=times.__getitem__)
        _store()
    return answers[question]


def _median(way: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(REPETITIONS):
        _wait(device)
        start = time.perf_counter()
        way()
        _wait(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _stored() -> dict[str, str]:
    """Answers on disk; a file that cannot be read is as good as none."""
    try:
        found = json.loads(cache_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _store() -> None:
    path = cache_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            json.dump(_stored() | answers, file, indent=1, sort_keys=True)
        os.replace(file.name, path)
    except OSError:
        return  # a home that cannot be written: measured again next time
