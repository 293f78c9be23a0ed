"""`fastrlhf label`: people score, rank and edit a model's replies in the browser; what they say trains a reward model.

    items.py, sampling.py -> workbench.py (judgement.py, store.py) -> server.py (security.py), page/; summary.py

Needs the extra `label` (Starlette, uvicorn, krippendorff). Nothing of it is imported by training.
"""

from __future__ import annotations

import importlib.util
import os
import webbrowser
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fastrlhf.checkpoint import lock
from fastrlhf.config.errors import UserError
from fastrlhf.config.language import Words, language_of
from fastrlhf.runtime.console import clean

EXTRA = ("starlette", "uvicorn", "krippendorff")


def main(
    prompts: str | None,
    *,
    output: str,
    policy: str | None,
    replies: str | None,
    annotators: Sequence[str],
    per_prompt: int,
    host: str,
    port: int,
    language: str | None,
    open_browser: bool,
    say: Callable[[str], None],
    **sampling: Any,
) -> int:
    """Serve the page until Ctrl-C -> exit code. say: prints a line. sampling: options of `inference.sample`, of the
    policy only. UserError for what cannot be, before any sampling where it can be known."""
    _check_installed()
    from fastrlhf.label.items import read_items, user_text
    from fastrlhf.label.security import is_loopback
    from fastrlhf.label.server import addresses, bind, serve
    from fastrlhf.label.workbench import Workbench, check_annotators

    def tell(line: str) -> None:
        say(clean(line))

    check_annotators(annotators)
    if per_prompt < 1:
        raise UserError(f"--annotators-per-prompt: {per_prompt} must be at least 1")
    target = _output(output)
    with bind(host, port) as listener, _taken(target):  # what is in use is said before the sampling
        if replies is not None:
            items = read_items(replies, prompts, tell)
        else:
            from fastrlhf.label.sampling import sampled_items

            items = sampled_items(prompts, policy, target, tell, **sampling)
        workbench = Workbench(items, annotators, target, tell, per_prompt=per_prompt)
        language = language or language_of(user_text(item.prompt) for item in items)
        address_of = addresses(workbench, listener, host)
        tell(f"{len(items)} prompts, {sum(len(item.replies) for item in items)} replies -> {output}; Ctrl-C ends")
        if not is_loopback(host):
            tell("other machines can reach this; whoever has an address judges in its name, and nothing is encrypted")
        for name, address in address_of.items():
            tell(f"  {name}: {address}")
        if open_browser and not _opened(address_of[annotators[0]]):
            tell("no browser could be opened here; open the address above in one")
        with suppress(KeyboardInterrupt):  # how it is meant to end
            serve(workbench, listener, language, host)
        judged = len(workbench.log.rows)
        workbench.close()
    tell(f"{judged} rows in {output}; next: fastrlhf reward model=FOLDER data={output} output_dir=runs/reward")
    return 0


def print_summary(path: str, language: str | None, say: Callable[[str], None]) -> int:
    """Print what the judgements in a file say together -> exit code. language: zh or en; None: that of the prompts."""
    _check_installed()
    from fastrlhf.label.items import user_text
    from fastrlhf.label.summary import CHINESE, lines, read_judgements, summarize

    rows = read_judgements(path)
    language = language or language_of(user_text(row["prompt"]) for row in rows)
    for line in lines(summarize(rows), Words(language, CHINESE)):
        say(clean(line))
    return 0


def _check_installed() -> None:
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"fastrlhf label needs {', '.join(missing)}: pip install 'fastrlhf[label]'")


def _output(output: str) -> Path:
    target = Path(output).expanduser()
    if target.suffix != ".jsonl":
        raise UserError(f"--output: {output} must end with .jsonl: judgements are added line by line")
    if target.is_dir():
        raise UserError(f"--output: {output} is a folder; name a file")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output: {output} cannot be written: {error.strerror}") from error
    return Path(os.path.realpath(target))


@contextmanager
def _taken(target: Path) -> Iterator[None]:
    """The output is this process's; UserError where it is another's."""
    lock.acquire(target)
    try:
        yield
    finally:
        lock.release(target)


def _opened(address: str) -> bool:
    try:
        return webbrowser.open(address)
    except webbrowser.Error:
        return False
