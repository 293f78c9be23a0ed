"""What stops a run that goes wrong or is asked to: too many skipped updates, signals."""

from __future__ import annotations

import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from fastrlhf.config.errors import UserError

IN_A_ROW = 3
IN_LAST = (5, 100)
SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")
HANGUP = getattr(signal, "SIGHUP", None)  # not on every system


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
