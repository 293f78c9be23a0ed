"""The embedded demo: SFT, reward model and PPO from scratch on two CPU cores. Importing it loads no torch."""

from __future__ import annotations

import time


def main(overrides: list[str]) -> int:
    """`fastrlhf quickstart [field=value ...]` -> exit code: 0 passed, 1 not passed, 75 interrupted."""
    started = time.monotonic()
    from fastrlhf.quickstart.run import run

    return run(overrides, started)
