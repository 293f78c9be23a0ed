"""The embedded demo: SFT, reward model and PPO from scratch on two CPU cores, with a verdict. See `fastrlhf quickstart --help`."""

from __future__ import annotations

from fastrlhf.quickstart.judge import rule

__all__ = ["rule"]
