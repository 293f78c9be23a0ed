"""report.html of a run: one file that opens offline and says what changed, how far it went and what to doubt.

Reads files only, so it works while a run trains, after it was killed, and on another machine.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Any

from fastrlhf.checkpoint.owned import check_no_link
from fastrlhf.config.language import Words, language_of
from fastrlhf.report.charts import figures, other_figures
from fastrlhf.report.folder import TITLES, StageRun, load, prompts, read_json
from fastrlhf.report.page import render
from fastrlhf.report.tables import commands, config, damage, events, facts, heldout, samples, time
from fastrlhf.report.verdict import head
from fastrlhf.report.words import CHINESE

TEXT_LIMIT = 700  # characters shown of a text


def build_report(run_dir: str | Path, language: str | None = None) -> Path:
    """Write run_dir/report.html -> its path. Equal files in the folder give equal bytes.

    language: of the page, zh or en; None: the one of the prompts in the folder. What the run wrote (messages of events,
    names of metrics and fields) stays as it is. Raises UserError when the folder is missing or holds no metrics.
    """
    run_dir = Path(run_dir)
    check_no_link(run_dir)
    stages = load(run_dir)[::-1]  # what came out first; how it came about below
    problems: list[str] = []
    verdict = read_json(run_dir / "verdict.json", problems)
    run = read_json(run_dir / "run.json", problems) or stages[0].run
    replies, reply_count = heldout(run_dir, problems)
    problems = [problem for problem in problems if problem not in stages[0].problems]  # a single stage names run.json
    words = Words(language or language_of([*prompts(stages), *(prompt for prompt, *_ in replies)]), CHINESE)
    html = render(
        "report.html",
        t=words,
        language="zh-CN" if words.language == "zh" else "en",
        title=run_dir.resolve().name,
        run_dir=run_dir,
        text_limit=TEXT_LIMIT,
        head=head(run_dir, stages, verdict, words),
        stages=[_section(stage, words) for stage in stages],
        heldout=replies,
        heldout_count=reply_count,
        notes=[*damage(problems, words), *(n for stage in stages for n in events(stage, words, named=len(stages) > 1))],
        commands=commands(run_dir, stages, run, words),
        facts=facts(run),
        command=f"fastrlhf report {shlex.quote(str(run_dir))}" + (f" --lang {language}" if language else ""),
    )
    target, partial = run_dir / "report.html", run_dir / ".report.html.partial"
    partial.write_text(html, encoding="utf-8")
    os.replace(partial, target)
    return target


def _section(stage: StageRun, words: Words) -> dict[str, Any]:
    """The values of one stage's parts of the page."""
    about = {"name": stage.name, "title": words(TITLES[stage.name]), "figures": figures(stage, words)}
    others, others_left = other_figures(stage, words)  # what the figures above left over
    values = {"samples": samples(stage, words), "time": time(stage, words), "config": config(stage)}
    return about | values | {"others": others, "others_left": others_left}


def main(run_dir: str | Path, language: str | None = None) -> int:
    """`fastrlhf report RUN_DIR [--lang zh|en]` -> exit code."""
    sys.stdout.write(f"{build_report(run_dir, language)}\n")
    return 0
