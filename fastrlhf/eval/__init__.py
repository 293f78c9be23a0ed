"""`fastrlhf eval`: what a model's replies to a file of prompts are like: refusals, keywords, scripts, repetition,
length, reward, and how often they beat another model's.

    phrases.py scripts.py statistics.py -> figures.py -> run.py -> table.py, page.py
    run.py, table.py -> best_of.py: of N replies the one that a reward prefers (`fastrlhf generate --best-of`)
    reward_model.py: how far a reward model agrees with people (`fastrlhf reward-eval`, fastrlhf/agreement)
    cross_fit.py: how strong judgements are to ensembles that have not learnt them (`fastrlhf reward --cross-fit`)

Nothing of it is imported by training.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastrlhf import inference
from fastrlhf.config.errors import UserError
from fastrlhf.eval.page import page_of
from fastrlhf.eval.phrases import REFUSALS, read_keywords, read_refusals
from fastrlhf.eval.run import evaluate
from fastrlhf.eval.table import lines


def main(
    model: str,
    prompts: str,
    *,
    against: str | None,
    reward: object,
    refusals: str | None,
    keywords: str | None,
    outputs: Mapping[str, str | None],
    overwrite: bool,
    reading: Mapping[str, Any],
    say: Callable[[str], None],
    tell: Callable[[str], None],
    **sampling: Any,
) -> int:
    """Evaluate, print, write -> exit code. UserError for what cannot be, before any sampling where it can be known.

    outputs: the paths of "--json" and of "--report"; reading: how `read_prompts` reads the prompts; say: prints a line
    of the result, tell: one of the progress; sampling: options of `inference.sample`.
    """
    paths = {option: path for option, path in outputs.items() if path is not None}
    for option, path in paths.items():
        inference.check_output(path, overwrite, option)
    if len({Path(path).expanduser().resolve() for path in paths.values()}) < len(paths):
        raise UserError(f"--report: {paths['--report']} is the file of --json too; name two files")
    patterns = REFUSALS if refusals is None else read_refusals(refusals)
    words = {} if keywords is None else read_keywords(keywords)
    rows = inference.read_prompts(prompts, **reading)
    evaluation = evaluate(
        model,
        rows,
        source=prompts,
        against=against,
        reward=reward,
        refusals=patterns,
        keywords=words,
        say=tell,
        **sampling,
    )
    for line in lines(evaluation.report):
        say(line)
    makers = {
        "--json": lambda: json.dumps(evaluation.document(), ensure_ascii=False, indent=1, default=str) + "\n",
        "--report": lambda: page_of(evaluation),
    }
    for option, path in paths.items():
        inference.write_file(path, makers[option](), option)
        say(f"{option.removeprefix('--')}: {path}")
    return 0
