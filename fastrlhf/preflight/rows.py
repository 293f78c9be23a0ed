"""What is said of a source's rows before a run: what became of them, how long they are, and too many left out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fastrlhf.config.base import StageConfig
from fastrlhf.config.errors import UserError
from fastrlhf.data.encode import Encoded
from fastrlhf.runtime.console import number

WARN_ABOVE = 0.05  # share of a source's rows left out
PERCENTILES = (10, 50, 90, 99)


@dataclass(frozen=True)
class Sentences:
    """What people are told: notes, and what is shown in yellow."""

    notes: list[str]
    warnings: list[str]


def percentiles(lengths: Iterable[int], ranks: Sequence[int] = PERCENTILES) -> list[int]:
    """The lengths at these ranks: the smallest that so many percent of them do not exceed."""
    ordered = sorted(lengths)
    return [ordered[max(0, -(-rank * len(ordered) // 100) - 1)] for rank in ranks]


def describe_rows(encoded: Encoded, longest_too: str = "") -> list[str]:
    """Sentences on what became of the rows, the forms they had, and the lengths of what is used.

    longest_too: what the longest stands beside, e.g. "max_tokens = 1024".
    """
    lengths = encoded.lengths()
    ranks = ", ".join(f"{rank} %: {value}" for rank, value in zip(PERCENTILES, percentiles(lengths), strict=True))
    limit = f" ({longest_too})" if longest_too else ""
    sample = f", of a sample of {len(encoded.items)} rows" if encoded.sampled else ""
    tokens = f"{encoded.role}: {number(sum(lengths))} tokens{sample}; a row has {ranks}, longest: {max(lengths)}{limit}"
    return [f"{encoded.role}: {encoded.counts.line()}", *encoded.forms, tokens]


def check_dropped(encoded: Encoded, config: StageConfig) -> str | None:
    """A warning where many rows of a source were left out, else None. UserError above `allow_drop`."""
    share, counts = encoded.dropped, encoded.counts
    if share <= min(WARN_ABOVE, config.allow_drop):
        return None
    why = ", ".join(f"{n} {reason}" for reason, n in counts.dropped.most_common())
    problem = f"{encoded.role}: {share:.0%} of the rows are left out: {why}"
    if share > config.allow_drop:
        first = f" (the first: {counts.malformed[0]})" if counts.malformed else ""
        remedy = f"mend the rows or the limits, or allow it with allow_drop={min(1.0, -(-share * 100 // 1) / 100):g}"
        raise UserError(f"{problem}{first}; {remedy} (now {config.allow_drop:g})")
    return problem if share > WARN_ABOVE else None
