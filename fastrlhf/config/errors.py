"""The errors that a user can mend, and how they spell a value."""

from __future__ import annotations

from typing import Any

AUTO = (  # fields whose None is spelt auto
    *("micro_batch_tokens", "gradient_checkpointing", "packing", "probe", "compile", "loss_aggregation"),
    *("critic_learning_rate", "gae_lambda"),
)


class UserError(ValueError):
    """A mistake that the user can mend: the message says where it is, what was found and what to do."""


class ConfigError(UserError):
    """One or more wrong fields; problems holds (field name, sentence) pairs."""

    def __init__(self, problems: list[tuple[str, str]], where: dict[str, str] | None = None) -> None:
        self.problems = problems
        where = where or {}
        lines = [f"{where[name]}: {text}" if name in where else text for name, text in problems]
        super().__init__("\n".join(lines))


def spelled(value: Any, name: str = "") -> str:
    """A value as it is typed on the command line."""
    if value is None:
        return "auto" if name in AUTO else "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (tuple, list)):
        return ",".join(spelled(part) for part in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
