"""What stops a run that would go wrong or is told to: rows the model cannot read, signals."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, Any

from fastrlhf.config.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")
HANGUP = getattr(signal, "SIGHUP", None)  # not on every system


class Interrupted(Exception):  # noqa: N818
    """The run was asked to stop and has saved a checkpoint; exit code 75, `fastrlhf resume` goes on."""


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


class StopNow(BaseException):
    """Raised by a signal where the work of the step can be dropped; `except Exception` in a reward does not end it."""


class StopSignal:
    """While active, SIGTERM, SIGHUP, SIGUSR1 and Ctrl-C ask the loop to stop.

    Inside `at_once` the signal raises StopNow; elsewhere it sets `requested` only, and the loop stops at its next safe
    point. Either way stderr is told what is done and waited for: `describe(now)` says it. A second SIGTERM or Ctrl-C
    raises KeyboardInterrupt. SIGHUP stays ignored under nohup. Outside the main thread Python delivers no signals and
    nothing is installed.
    """

    def __init__(self, describe: Callable[[bool], str] | None = None) -> None:
        self.requested = False
        self.name: str | None = None  # of the last signal, for the log
        self._describe = describe or (lambda now: "stopping")
        self._raises = False
        self._insists = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
            for number in numbers:
                if number != HANGUP or signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            if handler is not None:  # None: installed by C code, cannot be put back from Python
                signal.signal(number, handler)
        self._previous.clear()

    @property
    def insisted(self) -> bool:
        """Whether a second SIGTERM or Ctrl-C came: nothing is waited for any more."""
        return self._insists > 1

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Let a signal raise StopNow inside, until `hold`."""
        self._raises = not self.requested  # what goes on after a signal is to be ended
        try:
            yield
        finally:
            self._raises = False

    def hold(self) -> None:
        """From here to the end of `at_once` what was begun is ended first."""
        self._raises = False

    def _receive(self, number: int, _: FrameType | None) -> None:
        self._insists += number in (signal.SIGINT, signal.SIGTERM)
        if self.insisted:
            raise KeyboardInterrupt
        first, self.requested = not self.requested, True
        self.name = signal.Signals(number).name
        if first:
            with suppress(OSError, ValueError, RuntimeError):  # stderr is closed, or was being written to
                sys.stderr.write(f"{self.name}: {self._describe(self._raises)}; once more ends at once\n")
                sys.stderr.flush()
        if self._raises:
            self._raises = False
            raise StopNow
