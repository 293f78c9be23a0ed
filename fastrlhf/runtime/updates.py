"""Updates that are not finite: the rows that make them so are found and left out, and what remains is counted by role.

The norm of the gradients, which every update reads once, says whether it is finite. Only where it is not are the
gradients dropped and made of each row alone. Where some rows are at fault and some are not, the update is made once
more of the others, as if it had never had them: its normalizer is of the rows that it gets. Else it is skipped, and
weights and moments stay as they are.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, Literal, NamedTuple, TypeVar

from fastrlhf.config.errors import UserError
from fastrlhf.runtime.optim import Optimizer

Row, Result = TypeVar("Row"), TypeVar("Result")
Cause = Literal["weights", "rows", "sum"]
IN_A_ROW = 3
IN_LAST = (5, 100)
TEXT_SHOWN = 60  # characters of a row in the message; the fields of the event hold all of it
ROWS_WRITTEN = 32  # of one event
LEARNING_RATES = {"critic": "critic_learning_rate"}  # of the others: learning_rate
ADVICE: dict[Cause, str] = {
    "weights": "its weights hold NaN or infinity: begin with sound ones, or resume from an older checkpoint",
    "rows": "every row of it is: lower {rate}, or use dtype=fp32",
    "sum": "no row of it is by itself, their sum overflows: lower {rate}",
}


class Gradients(NamedTuple, Generic[Row, Result]):
    """Of an update: the rows they are of, what the work returned, their norm by role; the cause where one of these is
    not finite."""

    rows: list[Row]
    result: Result
    norms: dict[str, float]
    cause: Cause | None


class UpdateGuard:
    """Finds the rows that are not finite, and counts updates that were skipped. A single one is noise (an overflow); 3
    in a row or 5 among the last 100 of one role mean that the run is broken.

    report(kind, message, **fields) is told of both. decode: token ids as text.
    """

    def __init__(self, report: Callable[..., None], decode: Callable[[list[int]], str]) -> None:
        self.report, self.decode = report, decode
        self.rows_left_out = 0
        self.skipped: dict[str, int] = {}
        self.recent: dict[str, deque[bool]] = {}

    @property
    def updates_skipped(self) -> int:
        """Of all roles."""
        return sum(self.skipped.values())

    def gradients(
        self,
        rows: Sequence[Row],
        work: Callable[[list[Row]], Result],
        optimizers: Mapping[str, Optimizer],
        ids: Callable[[Row], Sequence[list[int]]],
        beside: Sequence[Row] = (),
    ) -> Gradients[Row, Result]:
        """Have work(rows) add up the gradients of an update of these roles, without the rows that are not finite.

        work is the same in every rank, as are its rows; ids: the token ids of a row, of one sequence or several.
        beside: rows that the update has besides its own; with none of its own left it is skipped.
        """
        own = len(rows)
        kept = rows = [*rows, *beside]
        result, norms = _made(kept, work, optimizers)
        if all(map(math.isfinite, norms.values())):
            return Gradients(kept, result, norms, None)
        faulty = []
        for row in rows:
            _drop(optimizers)
            alone = _made([row], work, optimizers)[1]
            faulty.append(not all(map(math.isfinite, alone.values())))
        _drop(optimizers)
        if any(faulty) and not all(faulty[:own]):
            kept = [row for row, bad in zip(rows, faulty, strict=True) if not bad]
            out = [row for row, bad in zip(rows, faulty, strict=True) if bad]
            self.leave_out([ids(row) for row in out], f"the update of the {' and '.join(optimizers)}")
            result, norms = _made(kept, work, optimizers)
            if all(map(math.isfinite, norms.values())):
                return Gradients(kept, result, norms, None)
        if not all(optimizer.finite() for optimizer in optimizers.values()):
            return Gradients(kept, result, norms, "weights")
        return Gradients(kept, result, norms, "rows" if all(faulty[:own]) else "sum")

    def leave_out(self, rows: Sequence[Sequence[list[int]]], place: str) -> None:
        """Count rows of token ids that are not finite, and write them down: the event holds text and ids of the first
        ROWS_WRITTEN."""
        self.rows_left_out += len(rows)
        texts = [[self.decode(ids) for ids in row] for row in rows[:ROWS_WRITTEN]]
        dumped = [{"texts": t, "ids": [list(ids) for ids in row]} for t, row in zip(texts, rows)]
        first = texts[0][0]
        what = f"{len(rows)} row{'s' * (len(rows) > 1)} left out of {place}: NaN or infinity in what the model makes of"
        message = f"{what} {first[:TEXT_SHOWN]!r}; the others are learned from"
        self.report("non_finite_row", message, rows=dumped)

    def record(self, role: str, applied: bool, cause: Cause | None) -> None:
        """Count an update. UserError when too many of the role were skipped."""
        recent = self.recent.setdefault(role, deque(maxlen=IN_LAST[1]))
        recent.append(not applied)
        if applied:
            return
        self.skipped[role] = self.skipped.get(role, 0) + 1
        advice = ADVICE[cause or "sum"].format(rate=LEARNING_RATES.get(role, "learning_rate"))
        tail = list(recent)[-IN_A_ROW:]
        if (len(tail) == IN_A_ROW and all(tail)) or sum(recent) >= IN_LAST[0]:
            many = f"{sum(recent)} of the last {len(recent)} updates of the {role} were not finite"
            raise UserError(f"{many}; in the last one {advice}")
        what = f"update of the {role} skipped, it is not finite; weights and moments are unchanged"
        self.report("non_finite_update", f"{what}; {advice}", role=role)

    def state(self) -> dict[str, Any]:
        recent = {role: list(marks) for role, marks in self.recent.items()}
        return {"rows_left_out": self.rows_left_out, "skipped": self.skipped, "recent": recent}

    def load_state(self, state: dict[str, Any]) -> None:
        self.rows_left_out, self.skipped = state["rows_left_out"], dict(state["skipped"])
        self.recent = {role: deque(marks, maxlen=IN_LAST[1]) for role, marks in state["recent"].items()}


def _made(
    rows: list[Row], work: Callable[[list[Row]], Result], optimizers: Mapping[str, Optimizer]
) -> tuple[Result, dict[str, float]]:
    result = work(rows)
    return result, {role: optimizer.gradient_norm() for role, optimizer in optimizers.items()}


def _drop(optimizers: Mapping[str, Optimizer]) -> None:
    for optimizer in optimizers.values():
        optimizer.zero_grad()
