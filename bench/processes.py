"""Runs of a measurement beside each other: each in a process of its own, with one thread.

Matrices as small as the quickstart's gain little from a second thread, so a core is better given to another run. A run
is `python -m MODULE ARGUMENTS --row FILE`, and writes its figures to FILE.
"""

from __future__ import annotations

import argparse
import atexit
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def imported_for_forks() -> None:
    """What is there stays, for processes forked from here on: no collector of theirs goes through it, which would copy
    every page that it lies in."""
    gc.freeze()
    atexit.register(gc.unfreeze)  # libraries complain of what is left at the end


def side_by_side(
    module: str,
    runs: Mapping[str, Sequence[str]],
    jobs: int,
    folder: Path,
    keep: Callable[[dict[str, Any]], None] = lambda rows: None,
) -> tuple[dict[str, Any], dict[str, str]]:
    """runs: the arguments of each by its name, started in this order, `jobs` of them at once -> (what each wrote, in
    the order of runs; why each of the others wrote nothing).

    folder: NAME.log has what a run prints, NAME.json what it wrote. keep: called with what is there after each run that
    ends well, so that little is lost when this process is stopped.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows: dict[str, Any] = {}
    failed: dict[str, str] = {}
    with ThreadPoolExecutor(jobs) as pool:
        started = {pool.submit(_run, module, name, arguments, folder): name for name, arguments in runs.items()}
        for ended in as_completed(started):
            name, (row, problem) = started[ended], ended.result()
            if problem is not None:
                failed[name] = problem
                print(f"{name} failed: {problem}", file=sys.stderr, flush=True)
                continue
            rows[name] = row
            keep({known: rows[known] for known in runs if known in rows})
    return {name: rows[name] for name in runs if name in rows}, failed


def _run(module: str, name: str, arguments: Sequence[str], folder: Path) -> tuple[Any, str | None]:
    """-> (what the run wrote, None) or (None, why there is nothing)."""
    stem = name.replace(":", "-")
    log, row = folder / f"{stem}.log", folder / f"{stem}.json"
    row.unlink(missing_ok=True)
    command = [sys.executable, "-m", module, *arguments, "--row", str(row)]
    with open(log, "w", encoding="utf-8") as out:
        code = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=os.environ | ONE_THREAD
        ).returncode
    if code or not row.is_file():
        said = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        return None, f"exit code {code}, {said[-1] if said else 'nothing printed'} ({log})"
    return json.loads(row.read_text(encoding="utf-8")), None


def write_row(path: Path, row: Any) -> None:
    """What a run of `side_by_side` hands over, whole or not at all."""
    beside = path.with_name(f".tmp-{path.name}")
    beside.write_text(json.dumps(row), encoding="utf-8")
    os.replace(beside, path)


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number of at least 1")
    return int(text)


def begun(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, table: Callable[[list[dict[str, Any]]], str]
) -> tuple[argparse.Namespace, list[dict[str, Any]] | None]:
    """Parse the arguments of a bench that trains from a quickstart's SFT models, seed by seed, and can be gone on with
    -> (options, the runs that --json holds already; None: --print has printed the table of a file)."""
    parser.add_argument("folder", type=Path, nargs="?", metavar="RUN")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, help="where to write each run as it comes; what stands there is kept")
    parser.add_argument("--print", type=Path, metavar="JSON", help="print the table of this file, and train nothing")
    options = parser.parse_args(arguments)
    if options.print is not None:
        print(table(json.loads(options.print.read_text(encoding="utf-8"))["runs"]))
        return options, None
    if options.folder is None:
        parser.error("RUN: the folder of the SFT models is needed")
    there = options.json is not None and options.json.exists()
    return options, json.loads(options.json.read_text(encoding="utf-8"))["runs"] if there else []


def torchrun(ranks: int, module: str, arguments: Sequence[str], row: Path) -> Any:
    """One run of so many ranks, with one thread each -> what its lead wrote to `row`. SystemExit with its last words
    where it fails."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, "-m", *launcher, "-m", module, "--row", str(row), *arguments]
    done = subprocess.run(command, env=os.environ | ONE_THREAD, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{module}, {ranks} ranks, {' '.join(arguments)}: {done.stderr.strip()[-2000:]}")
    return json.loads(row.read_text())
