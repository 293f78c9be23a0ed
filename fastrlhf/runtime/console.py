"""The words a person sees while a stage runs: one live status line on a terminal, plain lines everywhere else.

Left out on purpose: progress bars per batch, colour themes, a full-screen dashboard. Text that a model, a
data set or a user's function wrote passes `clean` and is never read as console markup.
"""

from __future__ import annotations

import io
import math
import os
import random
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live
    from rich.progress import Progress
    from rich.table import Table
    from rich.text import Text


# Shown in this order when the stage logs them; everything else is in metrics.jsonl and the report.
HEADLINES = {
    "reward/mean": "reward",
    "reward/eval": "eval reward",
    "kl/ref": "kl",
    "policy/clip_frac": "clip",
    "policy/entropy": "entropy",
    "loss/train": "loss",
    "loss/eval": "eval loss",
    "perplexity/eval": "eval ppl",
    "accuracy/train": "accuracy",
    "accuracy/eval": "eval accuracy",
    "correlation/eval": "eval correlation",
    "length/mean": "len",
    "learning_rate": "lr",
}
PHASES = {"ppo": ("rollout", "score", "advantages", "update", "save")}
PLAIN_INTERVAL_S = 2.0
BAR_INTERVAL_S = 0.25
LIVE_INTERVAL_S = 10.0  # lines kept above the live line: rarer, since the line itself is always current
STEPS_BEFORE_ETA = 3
CELL_CHARS = 240
_ESCAPES = re.compile(
    r"(?:\x1b\]|\x9d)[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)"  # OSC (titles, links) with its terminator
    r"|(?:\x1b[PX^_]|[\x90\x98\x9e\x9f])[^\x1b\x9c]*(?:\x1b\\|\x9c)"  # DCS, SOS, PM, APC
    r"|(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"  # CSI: colours, cursor movement, erase
    r"|\x1b[ -/]*[0-~]"  # two-byte escapes
)
_BREAKS = re.compile(r"\r\n?|[\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")
_CONTROLS = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff]")
_SURROGATES = re.compile(r"[\ud800-\udfff]")
_ASSIGNED = r"['\"]?\s*[:=]\s*['\"]?"
_IN_URLS = r"[\w-]*(?:token|key|secret|password|passwd|pwd|auth|sig|signature|credential|code|session)"
_HEADER = r"(?:(?:proxy-)?authorization|cookie|[\w-]*(?:api-?key|-token|-secret))['\"]?\s*[:=]\s*b?['\"]?"
_SECRETS = (
    (re.compile(r"\b(hf_|sk-|gh[pousr]_|github_pat_|xox[abp]-)[A-Za-z0-9_-]{12,}"), r"\1***"),
    (re.compile(r"\bAKIA[0-9A-Z]{16}\b"), "AKIA***"),
    (re.compile(r"(://)[^/\s@]+@"), r"\1***@"),
    (re.compile(rf"(?i)([?&#;](?:{_IN_URLS})=)[^\s&#'\"]+"), r"\1***"),
    (re.compile(rf"(?i)\b({_HEADER}(?:(?:bearer|basic|token)\s+)?)[^\s'\",;}}]{{6,}}"), r"\1***"),
    (re.compile(r"(?i)\b(bearer\s+)(?=\S*\d)[\w.~+/=-]{8,}"), r"\1***"),
    (re.compile(rf"(?i)\b(\w*(?:_token|api_?key|password|secret))({_ASSIGNED})(?!<)[^\s'\",}}]{{6,}}"), r"\1\2***"),
)


def clean(text: str) -> str:
    """Remove what a terminal would obey: ANSI/OSC sequences, C0/C1 controls, bidi and invisible characters.

    Every kind of line break becomes a newline, a tab becomes a space, a lone surrogate U+FFFD. Joiners that
    scripts and emoji need (U+200C, U+200D) stay. Linear in the length of `text`.
    """
    text = _BREAKS.sub("\n", _ESCAPES.sub("", text)).replace("\t", " ")
    return _SURROGATES.sub("\ufffd", _CONTROLS.sub("", text))


def redact(text: str) -> str:
    """Replace what is shaped like a credential (tokens, keys, user info in URLs) by ***."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


def one_line(text: str, limit: int = CELL_CHARS) -> str:
    """`clean` text on one line of at most `limit` characters; a visible mark stands for each line break."""
    # Cut first: a reply of a megabyte must not cost more than a short one.
    short = clean(text[: 8 * limit]).replace("\n", " ⏎ ")
    return short if len(short) <= limit and len(text) <= 8 * limit else short[: limit - 1] + "…"


def duration(seconds: float) -> str:
    """Seconds as people say them: 45s, 3m20s, 25m, 1h05m."""
    whole = int(seconds + 0.5)
    minutes = whole // 60
    if whole < 60:
        return f"{whole}s"
    if whole < 600:
        return f"{minutes}m{whole % 60:02d}s"
    return f"{minutes}m" if whole < 3600 else f"{minutes // 60}h{minutes % 60:02d}m"


def number(value: float | None) -> str:
    """Three significant digits (four from 100 on), thousands as k or M; `n/a` for a value that was not finite."""
    if value is None:
        return "n/a"
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.3g}M"
    if size >= 1e4:
        return f"{value / 1e3:.3g}k"
    return f"{value:.4g}" if size >= 100 else f"{value:.3g}"


class Console:
    """Prints the lines of one stage to stdout and to `log` (a function that takes one finished line).

    Live when stdout is a terminal and neither NO_COLOR nor TERM=dumb asks for calm; then a status line is
    redrawn four times a second. Otherwise at most one plain line every two seconds, always the first and the
    last step, and no escape byte. A closed stdout never stops a run: printing ends, the log goes on.
    """

    def __init__(
        self,
        stage: str,
        total_steps: int,
        log: Callable[[str], None],
        *,
        enabled: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stage = stage
        self.total_steps = total_steps
        self._log = log
        self._enabled = enabled
        self._clock = clock
        self._shown: dict[str, float | None] = {}
        self._others: dict[str, float | None] = {}  # shown for a stage that logs none of the HEADLINES
        self._speed: float | None = None
        self._step = 0
        self._seconds: deque[float] = deque(maxlen=20)
        self._phase = ""
        self._phase_start = clock()
        self._pending = ""
        self._last_line = -math.inf
        self._live: Live | None = None
        if enabled and _wants_live():
            self._live = self._start_live()

    def _start_live(self) -> Live:
        rich = _rich()
        screen = rich.console.Console(highlight=False, markup=False, emoji=False)
        live = rich.live.Live(console=screen, get_renderable=self._status, refresh_per_second=4, transient=True)
        live.start()
        return live

    def phase(self, name: str) -> None:
        """The part of the step that runs from now on ("" between parts)."""
        self._phase, self._phase_start = name, self._clock()

    def step(
        self,
        step: int,
        metrics: Mapping[str, float | None],
        seconds: float,
        tokens_per_s: float | None = None,
    ) -> None:
        """Take the figures of a finished step, which took `seconds`; print its line if one is due."""
        now = self._clock()
        self._step = step
        if step == 0 and not metrics:  # nothing is held out
            return
        if step > 0:  # step 0 is the evaluation before training
            self._seconds.append(seconds)
        if not self._pending:  # a line held back shows what it had, with the next step's; one that was printed is old
            self._shown = {}
        self._shown |= {name: metrics[name] for name in HEADLINES if name in metrics}
        self._others = dict(list(metrics.items())[:3])
        self._speed = tokens_per_s if tokens_per_s is not None else self._speed
        self._pending = self._step_line(seconds)
        interval = PLAIN_INTERVAL_S if self._live is None else LIVE_INTERVAL_S
        if now - self._last_line >= interval or step >= self.total_steps:
            self._flush_step()

    def _flush_step(self) -> None:
        if self._pending:
            self._last_line = self._clock()
            self.line(self._pending)
            self._pending = ""

    def _figures(self) -> list[str]:
        shown = self._shown or self._others
        figures = [f"{HEADLINES.get(name, name)} {number(value)}" for name, value in shown.items()]
        return figures if self._speed is None else [*figures, f"{number(self._speed)} tok/s"]

    def _eta(self) -> str:
        if len(self._seconds) < STEPS_BEFORE_ETA or self._step >= self.total_steps:
            return ""
        # The first step pays for compilation and caches; the mean over the latest ones forgets it.
        return duration(sum(self._seconds) / len(self._seconds) * (self.total_steps - self._step))

    def _step_line(self, seconds: float) -> str:
        eta = self._eta()
        parts = [f"{self.stage} step {self._step}/{self.total_steps}", *self._figures(), f"{seconds:.2f} s"]
        return "  ".join([*parts, f"eta {eta}"] if eta else parts)

    def _status(self) -> Text:
        text = _rich().text.Text(no_wrap=True, overflow="ellipsis")
        text.append(f"{self.stage} {self._step}/{self.total_steps}  ", style="bold")
        chain = PHASES.get(self.stage, ())
        if self._live is not None and self._live.console.width >= 130 and self._phase in chain:
            for i, name in enumerate(chain):
                text.append(" ▸ " if i else "", style="dim")
                text.append(name, style="bold cyan" if name == self._phase else "dim")
        elif self._phase:
            text.append(self._phase, style="bold cyan")
        if self._phase:
            text.append(f" {duration(self._clock() - self._phase_start)}  ", style="dim")
        if eta := self._eta():
            text.append(f"eta {eta}  ", style="green")
        text.append("  ".join(self._figures()))  # last: what a narrow terminal cuts off
        return text

    def line(self, text: str, *, style: str = "") -> None:
        """One line for people, cleaned and without credentials, on stdout and in the log."""
        text = one_line(redact(clean(text[:16_000])), 2000)  # cleaned first: an escape could hide a credential
        self._log(text)
        self._print(text, lambda: _rich().text.Text(text, style=style))

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A small table; every cell is cleaned, shortened and taken literally."""
        table = _table(title, header, [[one_line(redact(clean(cell[:16_000]))) for cell in row] for row in rows])
        page = io.StringIO()
        plain = _rich().console.Console(file=page, width=110, color_system=None, force_terminal=False, highlight=False)
        plain.print(table)
        lines = [line.rstrip() for line in page.getvalue().splitlines()]
        for line in lines:
            self._log(line)
        self._print("\n".join(lines), lambda: table)

    def _print(self, text: str, for_rich: Callable[[], RenderableType]) -> None:
        """What `for_rich` gives, above the live line; `text` where there is none."""
        if not self._enabled:
            return
        try:
            if self._live is not None:
                self._live.console.print(for_rich())
                return
            encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
            sys.stdout.write(text.encode(encoding, "replace").decode(encoding) + "\n")
            sys.stdout.flush()
        except (OSError, ValueError):  # the reader of the pipe went away, or stdout was closed: train on
            self._enabled = False

    def close(self) -> None:
        """Print the last step's line if it was held back; give the terminal back."""
        self._flush_step()
        if self._live is not None:
            self._live.stop()


class RowProgress:
    """How far the rows of a source are encoded: a bar on a terminal, elsewhere a line every LIVE_INTERVAL_S seconds;
    nothing where it is done before the first is due."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._last, self._role = clock, clock(), ""
        self._interval = LIVE_INTERVAL_S
        self._bar: Progress | None = None

    def __call__(self, role: str, done: int, total: int) -> None:
        """Rows of the source `role`, those encoded and all."""
        now = self._clock()
        if role != self._role:
            self._role, self._last = role, now
            self._interval = BAR_INTERVAL_S if _wants_live() else LIVE_INTERVAL_S
        if done == total:
            self._end()
        elif now - self._last >= self._interval:
            self._last = now
            self._show(role, done, total)

    def _show(self, role: str, done: int, total: int) -> None:
        if not _wants_live():
            with suppress(OSError, ValueError):  # the reader of the pipe went away
                sys.stdout.write(f"{role}: {done} of {total} rows encoded\n")
                sys.stdout.flush()
            return
        if self._bar is None:
            rich = _rich()
            screen = rich.console.Console(highlight=False, markup=False, emoji=False)
            self._bar = rich.progress.Progress(
                *rich.progress.Progress.get_default_columns(), console=screen, transient=True, auto_refresh=False
            )
            self._bar.start()
            self._bar.add_task(f"{role}: rows encoded", total=total)
        self._bar.update(self._bar.task_ids[0], completed=done, refresh=True)

    def _end(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def yellow(text: str) -> str:
    """The text as a terminal shows warnings; elsewhere as it is."""
    return f"\x1b[33m{text}\x1b[0m" if _wants_live() else text


def _wants_live() -> bool:
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb" and sys.stdout.isatty()


@cache  # a second call could set `random` back while the run draws from it: the live line has its own thread
def _rich() -> ModuleType:
    """The library, imported when something is first drawn with it.

    It draws from the global `random` as it is imported; the state is put back, so that a seeded run does not depend on
    when that was.
    """
    state = random.getstate()
    import rich.box
    import rich.console
    import rich.live
    import rich.progress
    import rich.table
    import rich.text

    random.setstate(state)
    return rich


def _table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    rich = _rich()
    box, text = rich.box.SIMPLE_HEAD, rich.text.Text
    table = rich.table.Table(title=text(title), title_justify="left", box=box, show_lines=len(rows) > 1, pad_edge=False)
    for name in header:
        is_score = name.startswith("score")
        table.add_column(text(name), justify="right" if is_score else "left", no_wrap=is_score, overflow="fold")
    for row in rows:
        table.add_row(*map(text, row))
    return table
