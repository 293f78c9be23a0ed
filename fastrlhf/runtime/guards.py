"""What stops a run that goes wrong or would: rows the model cannot read, too many skipped updates, interruption."""

from __future__ import annotations

import signal
import threading
from collections import deque
from collections.abc import Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

from fastrlhf.config.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


IN_A_ROW = 3
IN_LAST = (5, 100)


class Interrupted(Exception):  # noqa: N818
    """The run was asked to stop and has saved a checkpoint; exit code 75, `fastrlhf resume` goes on."""


class UpdateGuard:
    """Counts updates skipped for a non-finite loss or gradient; the weights of a skipped update are untouched.

    A single one is noise (an overflow); 3 in a row or 5 among the last 100 mean that the run is broken.
    """

    def __init__(self) -> None:
        self.skipped = 0
        self.recent: deque[bool] = deque(maxlen=IN_LAST[1])

    def record(self, applied: bool, what: str) -> str | None:
        """-> a sentence about a skipped update, or None. UserError when there are too many."""
        self.recent.append(not applied)
        if applied:
            return None
        self.skipped += 1
        tail = list(self.recent)[-IN_A_ROW:]
        if (len(tail) == IN_A_ROW and all(tail)) or sum(self.recent) >= IN_LAST[0]:
            raise UserError(
                f"{sum(self.recent)} of the last {len(self.recent)} updates were not finite (last: {what}); "
                "lower learning_rate, or look for infinite rewards"
            )
        return f"update of the {what} skipped: its loss or gradient is not finite; weights and moments are unchanged"

    def state(self) -> dict:
        return {"skipped": self.skipped, "recent": list(self.recent)}

    def load_state(self, state: dict) -> None:
        self.skipped = state["skipped"]
        self.recent = deque(state["recent"], maxlen=IN_LAST[1])


def check_rows(
    model: PreTrainedModel, rows: Sequence[Sequence[int]], max_tokens: int, field: str = "max_tokens"
) -> None:
    """UserError for token rows that would fail in the middle of a run: ids or positions that the model has not.

    field: the name of what bounds their length, for the sentence.
    """
    vocabulary, highest = model.get_input_embeddings().weight.shape[0], max(map(max, rows))
    if highest >= vocabulary:
        raise UserError(
            f"tokenizer: it writes token {highest} and the model has {vocabulary}; use the model's own tokenizer"
        )
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(map(len, rows))
    if positions is not None and longest > positions:
        raise UserError(
            f"{field} = {max_tokens}: the longest row has {longest} tokens and the model has {positions} positions; "
            f"set {field}={positions}"
        )


class StopSignal:
    """While active, SIGTERM, SIGUSR1 and Ctrl-C only set `requested`; the loop saves and leaves at its next
    safe point.

    A second Ctrl-C raises KeyboardInterrupt at once. Outside the main thread Python delivers no signals and
    nothing is installed.
    """

    def __init__(self) -> None:
        self.requested = False
        self.name: str | None = None  # of the last signal, for the log
        self._interrupts = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            if handler is not None:  # None: installed by C code, cannot be put back from Python
                signal.signal(number, handler)
        self._previous.clear()

    def _receive(self, number: int, _: FrameType | None) -> None:
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            raise KeyboardInterrupt
        self.requested = True
        self.name = signal.Signals(number).name
