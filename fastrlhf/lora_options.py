"""`lora` of the configuration: a rank, or a mapping of what peft's LoraConfig is given. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

EXPECTED = "a rank, or {r: rank, alpha: number (default 2 r), target_modules: [names] (default: every linear layer)}"


def lora_options(value: Any) -> dict[str, Any] | None:
    """8, "8", {"r": 8}, "{r: 8, alpha: 16}" -> {"r", "alpha", "target_modules"}; None stays None.

    There is no dropout: PPO compares log-probs of several forwards of the same weights. Raises ValueError.
    """
    if isinstance(value, str):
        try:
            value = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ValueError(EXPECTED) from None
    if value is None:
        return None
    options = {"r": value} if isinstance(value, int) else dict(value) if isinstance(value, Mapping) else {}
    rank, unknown = options.get("r"), options.keys() - {"r", "alpha", "target_modules"}
    if unknown or isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(EXPECTED)
    alpha, targets = options.get("alpha", 2 * rank), options.get("target_modules")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or alpha <= 0:
        raise ValueError(EXPECTED)
    if targets is not None and not (
        isinstance(targets, (list, tuple)) and targets and all(isinstance(t, str) for t in targets)
    ):
        raise ValueError(EXPECTED)
    return {"r": rank, "alpha": alpha, "target_modules": None if targets is None else list(targets)}
