"""Where the numbers of a run go: JSON lines, TensorBoard and the console.

`metrics.jsonl`, `samples.jsonl` and `events.jsonl` hold what a run's seed determines, written so that equal
runs give equal bytes and a resumed run can cut them back to its checkpoint. What a clock measures goes to
`timings.jsonl`. Left out: other trackers (read metrics.jsonl); ranks other than 0 (they pass run_dir=None and
console=False).
"""

from __future__ import annotations

import atexit
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from fastrlhf.checkpoint.records import read_records
from fastrlhf.config.errors import UserError
from fastrlhf.runtime.console import Console, clean, number, redact

if TYPE_CHECKING:
    from tensorboard.compat.proto.summary_pb2 import Summary
    from torch.utils.tensorboard import SummaryWriter


METRICS, SAMPLES, EVENTS = "metrics.jsonl", "samples.jsonl", "events.jsonl"
TIMINGS, LOG = "timings.jsonl", "log.txt"
TABLE_ROWS = 3
RATES = (  # tokens that a stage counts, the seconds they took, the rate written beside them
    ("perf/rollout_tokens", "time/rollout", "perf/rollout_tokens_per_s"),
    ("perf/rollout_tokens", "time/step", "perf/tokens_per_s"),
    ("perf/tokens", "time/step", "perf/tokens_per_s"),
)
EARLY_LINES = 1000  # held back for a folder that may never be opened
WAITING_LINES = 10_000  # of one file, while the disk is full
REMEMBERED_PROMPTS = 512  # "before" texts held in memory
# Legal in a JSON string, but obeyed by terminals or a line end to str.splitlines: written as \uXXXX.
_ESCAPE = re.compile(r"[\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff]")


class Tracker:
    """Records one stage of a run and shows it.

    run_dir: a folder (made if missing), or None for the console alone, until `open`. total_steps: steps of the stage.
    resume_bytes: what `bytes()` returned when the checkpoint was written ({} when there is none yet); the
    files are cut back to it, so that no step stands there twice. None starts every file anew. clock: seconds.
    Raises UserError when a file is shorter than the checkpoint says.
    """

    def __init__(
        self,
        run_dir: Path | str | None,
        stage: str,
        total_steps: int,
        *,
        console: bool = True,
        resume_bytes: dict[str, int] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.run_dir = None if run_dir is None else Path(run_dir)
        self.stage, self.total_steps = stage, total_steps
        self._files: dict[str, BinaryIO] = {}
        self._before: dict[str, tuple[str, float | None]] = {}
        self._step = self._first_step = 0
        self._early: list[tuple[str, bytes]] = []  # lines for files that are not open yet
        self._waiting: dict[str, list[bytes]] = {}  # lines that a full disk did not take, by file
        self._failing: set[str] = set()  # files of which the console was told that they cannot be written
        self._writer: SummaryWriter | None = None
        self._tensorboard_broken = False
        self._stack: list[str] = []
        self._seconds: dict[str, float] = {}
        self._clock = clock
        self._start = self._mark_time = clock()
        self._step_start: float | None = None  # set by the first phase: loading models is not part of step 1
        self._console = Console(stage, total_steps, self._log_line, enabled=console, clock=clock)
        atexit.register(self.close)  # gives the terminal back after an exception nobody caught
        if run_dir is not None:
            self.open(run_dir, resume_bytes)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self, run_dir: Path | str, resume_bytes: dict[str, int] | None = None) -> None:
        """Write into the files of a run folder from here on, and what was said before too: a run takes its folder only
        when everything else is ready. Arguments and errors are those of the constructor."""
        self.run_dir = Path(run_dir)
        problems: list[str] = []
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            self._open_files(self.run_dir, resume_bytes)
        except OSError as error:
            where = error.filename or self.run_dir
            raise UserError(f"{where}: cannot be written ({error.strerror}); free the disk or name a folder") from error
        self._recall(self.run_dir, problems)
        self._first_step = self._step
        early, self._early = self._early, []
        for name, line in early:
            self._append(name, line)
        for problem in problems:
            self._console.line(f"skipped a damaged line: {problem}", style="yellow")

    def _open_files(self, run_dir: Path, resume_bytes: dict[str, int] | None) -> None:
        for name in (METRICS, SAMPLES, EVENTS, TIMINGS, LOG):
            file = open(run_dir / name, "ab", buffering=0)  # noqa: SIM115 - one write a line, closed in close()
            self._files[name] = file
            if resume_bytes is None:
                file.truncate(0)
            elif name in (METRICS, SAMPLES, EVENTS):
                _cut(file, run_dir / name, resume_bytes.get(name, 0))
            else:  # time already spent stays counted, and said; only a line torn by a kill goes
                file.truncate((run_dir / name).read_bytes().rfind(b"\n") + 1)

    def _recall(self, run_dir: Path, problems: list[str]) -> None:
        """The last step and the first responses of the run that goes on."""
        for row in read_records(run_dir / METRICS, problems, {"step": int}):
            self._step = row["step"]
        for row in read_records(run_dir / SAMPLES, problems, {"prompt": str, "response": str}):
            self._remember(row)

    def begin(self, step: int) -> None:
        """From here on what happens belongs to this step, counted from 1; `log` ends it."""
        self._step = step

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the seconds inside as `time/<name>`; a phase within a phase pauses the outer one.

        GPU work is counted where the host waits for it: nothing is synchronised here.
        """
        self._mark()
        if self._step_start is None:
            self._step_start = self._mark_time
        self._stack.append(name)
        self._console.phase(name)
        try:
            yield
        finally:
            self._mark()
            self._stack.pop()
            self._console.phase(self._stack[-1] if self._stack else "")

    def _mark(self) -> None:
        now = self._clock()
        if self._stack:
            self._seconds[self._stack[-1]] = self._seconds.get(self._stack[-1], 0.0) + now - self._mark_time
        self._mark_time = now

    def log(self, step: int, metrics: Mapping[str, Any], timings: Mapping[str, Any] | None = None) -> None:
        """Record step `step` (counted from 1; 0 is the evaluation before training).

        metrics: numbers that the seed alone determines (Python or 0-d tensors); NaN and infinities are
        written as null and counted under "nonfinite"; None is left out. timings: what the machine decides, as
        `mem/peak_gib`. Added here: phase seconds, `time/step` (since the last step), `time/elapsed` (s),
        `mem/host_peak_gib`, and tokens per second when timings count `perf/rollout_tokens` or `perf/tokens`.
        """
        row = _finite(metrics)
        self._step = step
        self._write(METRICS, {"step": step, **row})
        measured = self._measured(timings or {})
        self._write(TIMINGS, {"step": step, **measured})
        self._tensorboard(step, {**row, **measured})
        self._console.step(step, row, measured["time/step"], measured.get("perf/tokens_per_s"))
        self._step_start = self._clock()  # opening TensorBoard is not part of the next step

    def _measured(self, timings: Mapping[str, Any]) -> dict[str, float | None]:
        self._mark()
        now = self._mark_time
        seconds = {f"time/{name}": spent for name, spent in self._seconds.items()}
        self._seconds.clear()
        start = self._start if self._step_start is None else self._step_start
        seconds |= {"time/step": now - start, "time/elapsed": now - self._start}
        measured = {**seconds, "mem/host_peak_gib": _host_peak_gib(), **timings}
        for tokens, time_name, rate in RATES:
            if tokens in measured and measured.get(time_name, 0.0) > 0.0:
                measured.setdefault(rate, float(measured[tokens]) / measured[time_name])
        return _finite(measured)

    def samples(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Record sample texts, rows of {prompt, response, score}, and show a few.

        The table sets the first response recorded for the same prompt beside the one of now. Other fields are
        recorded too. What is shaped like a credential is in neither.
        """
        header = ["prompt", "response before", "score before", "response now", "score now"]
        shown, again = [], False
        for row in (_plain(row, redact) for row in rows):
            self._write(SAMPLES, {"step": step, **row})
            if len(shown) < TABLE_ROWS:
                again |= row["prompt"] in self._before
                before, score = self._before.get(row["prompt"], ("", None))
                shown.append([row["prompt"], before, _score(score), row["response"], _score(row.get("score"))])
            self._remember(row)
        if shown and not again:
            header, shown = ["prompt", "response", "score"], [[p, now, score] for p, _, _, now, score in shown]
        if shown:
            self._console.table(f"samples at {self.stage} step {step}", header, shown)

    def _remember(self, row: Mapping[str, Any]) -> None:
        if len(self._before) < REMEMBERED_PROMPTS:
            self._before.setdefault(row["prompt"], (row["response"], row.get("score")))

    def event(self, kind: str, message: str, *, quiet: bool = False, **fields: Any) -> None:
        """Record something that happened (an alarm, a skipped update, a resume) and say it on the console, unless it is
        quiet: for the report, and told by a figure of the step's line."""
        row = {"step": self._step, "kind": kind, "message": _safe(message), **_plain(fields, _safe)}
        self._write(EVENTS, row)
        if not quiet:
            self._console.line(f"{kind}: {message}", style="yellow")

    def note(self, message: str) -> None:
        """Print a plain line (console and log.txt)."""
        for line in message.splitlines() or [""]:
            self._console.line(line)

    def bytes(self) -> dict[str, int]:
        """`lengths`, synced to disk; for the checkpoint."""
        self.sync()
        return self.lengths()

    def lengths(self) -> dict[str, int]:
        """Lengths of metrics.jsonl, samples.jsonl and events.jsonl, whole lines all. Lines that wait for room are tried
        once more first: a checkpoint that does not count them would lose them at resume."""
        for name in self._files:
            self._write_waiting(name)
        open_ones = [name for name in (METRICS, SAMPLES, EVENTS) if name in self._files]
        return {name: os.fstat(self._files[name].fileno()).st_size for name in open_ones}

    def sync(self) -> None:
        """Force what was written to the disk."""
        for name in (METRICS, SAMPLES, EVENTS):
            if name in self._files:
                try:
                    os.fsync(self._files[name].fileno())
                except OSError as error:
                    self._say_once(name, f"{self.run_dir / name}: not forced to the disk ({error.strerror})")

    def close(self) -> None:
        """Write what is held back, close the files, give the terminal back. May be called twice."""
        atexit.unregister(self.close)
        self._mark()
        if self._seconds and self._files:  # a save after the last step still belongs to the run's time
            rest = {f"time/{name}": spent for name, spent in self._seconds.items()}
            self._write(TIMINGS, {"step": self._step, **_finite(rest)})
        self._seconds.clear()
        self._console.close()
        if self._writer is not None:
            with suppress(OSError):  # a second copy of the curves
                self._writer.close()
            self._writer = None
        for name in self._files:
            self._write_waiting(name)
        files, self._files = self._files, {}
        for file in files.values():
            file.close()

    def _write(self, name: str, row: Mapping[str, Any]) -> None:
        self._append(name, _json_line(row))

    def _log_line(self, line: str) -> None:
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        self._append(LOG, f"{stamp}  {line}\n".encode("utf-8", "replace"))

    def _append(self, name: str, line: bytes) -> None:
        if name in self._files:
            waiting = self._waiting.setdefault(name, [])
            if len(waiting) < WAITING_LINES:
                waiting.append(line)
            self._write_waiting(name)
        elif self.run_dir is None and len(self._early) < EARLY_LINES:
            self._early.append((name, line))

    def _write_waiting(self, name: str) -> None:
        """Write the lines that wait for a file, each whole or not at all; where the disk is full the rest waits."""
        waiting = self._waiting.get(name, [])
        while waiting:
            problem = _write_whole(self._files[name], waiting[0])
            if problem is not None:
                self._say_once(name, f"{self.run_dir / name}: not written ({problem}); its lines wait")
                return
            waiting.pop(0)
        self._failing.discard(name)

    def _say_once(self, name: str, sentence: str) -> None:
        """Tell the console that a file cannot be written: once, until it can again."""
        known = name in self._failing
        self._failing.add(name)
        if not known:
            self._console.line(sentence, style="yellow")

    def _tensorboard(self, step: int, values: Mapping[str, float | None]) -> None:
        if self.run_dir is None or self._tensorboard_broken:
            return
        try:
            if self._writer is None:
                from torch.utils.tensorboard import SummaryWriter

                purge = self._first_step + 1 if self._first_step else None
                self._writer = SummaryWriter(str(self.run_dir / "tensorboard"), max_queue=1000, purge_step=purge)
            self._writer.file_writer.add_summary(_summary(values), step)
        except ImportError as error:
            self._tensorboard_broken = True
            extra = "pip install 'fastrlhf[tensorboard]'"
            self.note(f"TensorBoard files are not written ({error}): {extra}; metrics.jsonl has the same curves")
        except OSError as error:  # a second copy of the curves is not worth a run
            self._tensorboard_broken = True
            self.event("tensorboard", f"TensorBoard files are no longer written ({error}); metrics.jsonl goes on")


def _summary(values: Mapping[str, float | None]) -> Summary:
    """All scalars of a step as one record: an add_scalar for each takes 3.5 times the CPU time."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    found = [Summary.Value(tag=name, simple_value=value) for name, value in values.items() if value is not None]
    return Summary(value=found)


def _json_line(row: Mapping[str, Any]) -> bytes:
    """One line of JSON: `step` first, the other keys sorted, floats by repr, UTF-8 kept readable."""
    ordered = {"step": row["step"], **{key: row[key] for key in sorted(row) if key != "step"}}
    text = json.dumps(ordered, ensure_ascii=False, allow_nan=False)
    text = _ESCAPE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
    return text.encode("utf-8", "backslashreplace") + b"\n"  # a lone surrogate becomes its JSON escape


def _finite(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers as plain Python; a non-finite one is null and counted, never hidden; None is left out."""
    row = {name: _number(metrics[name]) for name in sorted(metrics) if metrics[name] is not None}
    bad = sum(value is None for value in row.values())
    return {**row, "nonfinite": bad} if bad else row


def _plain(value: Any, text: Callable[[str], str] = str) -> Any:
    """`value` as something JSON can hold: non-finite numbers null, strings through `text`."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item, text) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, text) for item in value]
    if value is None or isinstance(value, (bool, int)):
        return value
    return _number(value) if hasattr(value, "__float__") else text(str(value))


def _number(value: Any) -> float | None:
    """A plain int or float; None for NaN and infinities, which JSON does not know."""
    plain = int(value) if isinstance(value, int) else float(value)
    return plain if math.isfinite(plain) else None


def _safe(text: str) -> str:
    return redact(clean(text))  # cleaned first: an escape could hide a credential


def _score(score: Any) -> str:
    return "" if score is None else number(_plain(score))


def _write_whole(file: BinaryIO, line: bytes) -> str | None:
    """Append a line, or leave the file as it was -> what the disk said, or None. One write may take a part only."""
    before, written = os.fstat(file.fileno()).st_size, 0
    try:
        while written < len(line):
            written += file.write(line[written:]) or 0
    except OSError as error:
        with suppress(OSError):
            file.truncate(before)
        return error.strerror or str(error)
    return None


def _cut(file: BinaryIO, path: Path, length: int) -> None:
    size = os.fstat(file.fileno()).st_size
    if size < length:
        raise UserError(
            f"{path}: holds {size} bytes but the checkpoint was written at {length}; "
            "restore the file, or start again with overwrite=true"
        )
    file.truncate(length)
    if length and path.read_bytes()[length - 1 :] != b"\n":  # torn when the checkpoint was written
        file.write(b"\n")


def _host_peak_gib() -> float | None:
    try:
        import resource
    except ImportError:  # not a POSIX system
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20
