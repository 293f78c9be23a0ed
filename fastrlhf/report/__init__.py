"""report.html of a run: one file that opens offline and says what changed, how far it went and what to doubt.

Reads files only, so it works while a run trains, after it was killed, and on another machine.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from fastrlhf.report.charts import stage_section
from fastrlhf.report.folder import load, read_json
from fastrlhf.report.page import page
from fastrlhf.report.tables import config, environment, events, samples, time
from fastrlhf.report.verdict import head


def build_report(run_dir: str | Path) -> Path:
    """Write run_dir/report.html -> its path. Equal files in the folder give equal bytes.

    Raises UserError when the folder is missing or holds no metrics.
    """
    run_dir = Path(run_dir)
    stages = load(run_dir)
    verdict = read_json(run_dir / "verdict.json")
    shown = list(reversed(stages))  # what came out first; how it came about below
    sections = [
        head(run_dir, shown, verdict),
        samples(run_dir, shown),
        *(stage_section(stage) for stage in shown),
        time(shown),
        config(shown),
        events(shown),
        environment(run_dir, shown),
    ]
    body = "\n".join(section for section in sections if section)
    target = run_dir / "report.html"
    partial = run_dir / ".report.html.partial"
    partial.write_text(page(f"{run_dir.resolve().name}: fastrlhf report", body), encoding="utf-8")
    os.replace(partial, target)
    return target


def main(run_dir: str | Path) -> int:
    """`fastrlhf report RUN_DIR` -> exit code."""
    sys.stdout.write(f"{build_report(run_dir)}\n")
    return 0
