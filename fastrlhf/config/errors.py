"""The errors that a user can mend."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake that the user can mend: the message says where it is, what was found and what to do."""


class ConfigError(UserError):
    """One or more wrong fields; problems holds (field name, sentence) pairs."""

    def __init__(self, problems: list[tuple[str, str]], where: dict[str, str] | None = None) -> None:
        self.problems = problems
        where = where or {}
        lines = [f"{where[name]}: {text}" if name in where else text for name, text in problems]
        super().__init__("\n".join(lines))
