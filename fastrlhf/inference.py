"""The work of `fastrlhf generate` and `fastrlhf score`, once their arguments are parsed.

Their prompts come from the command line or from rows of a file or of stdin; what they make goes to the screen or, as
JSON Lines, into a file that appears whole or not at all.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from fastrlhf.checkpoint.atomic import fsync
from fastrlhf.checkpoint.records import json_line
from fastrlhf.config import encodings
from fastrlhf.config.errors import UserError
from fastrlhf.data.checks import BadRow, DroppedRow, Messages, text_of
from fastrlhf.data.columns import Columns
from fastrlhf.data.dataset import Reading, load_prompts
from fastrlhf.data.feedback import Conversation, Prompt, parse_conversation, parse_prompt
from fastrlhf.data.prompt_format import decide
from fastrlhf.data.templates import encode_prompt, stop_token_ids
from fastrlhf.models.loading import is_scalar_model, load_policy, load_reward_model, load_tokenizer, skeleton
from fastrlhf.rl.scorers import score_texts
from fastrlhf.rollout.engine import RolloutEngine
from fastrlhf.rollout.result import reply_texts
from fastrlhf.rollout.sampling import SamplingParams

if TYPE_CHECKING:
    from typing_extensions import Unpack

STDIN = "-"
REPLIES_AT_ONCE = 64  # between two looks at the clock
PROGRESS_S = 2.0
MOST_SAMPLES = 1024  # replies to a prompt: they are decoded together


Asked = str | Messages | Prompt  # what is replied to


class Reply(NamedTuple):
    """A sampled reply: its text, its token ids with the stop token that ended it, and whether one did."""

    text: str
    ids: list[int]
    finished: bool


def check_sampling(
    source: str, prompts: Sequence[Asked], *, role: str = "FOLDER", raw: bool = False, **sampling: float
) -> None:
    """UserError for what `sample` would refuse, before any weights are loaded: whoever samples from two models tells of
    both first. role: how an error calls the model."""
    _check_writes(source, role)
    _check_samples(**sampling)
    try:
        params = SamplingParams(stop_token_ids=[], **sampling)
    except ValueError as error:
        raise UserError(str(error)) from error
    tokenizer = reading_tokenizer(source, raw)
    model = skeleton(source, role)
    if model is None:  # a GGUF file: its sizes come with its weights
        return
    try:
        prompt_ids, names = _encoded(tokenizer, prompts)
        RolloutEngine(model, tokenizer).check_prompts(prompt_ids, params, names)
    except ValueError as error:
        raise UserError(f"{role}: {error}") from error


def _encoded(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Asked]) -> tuple[list[list[int]], list[str]]:
    """The ids of each prompt, and what an error calls it: by its row where it has one."""
    asked = [prompt.prompt if isinstance(prompt, Prompt) else prompt for prompt in prompts]
    places = [prompt.where if isinstance(prompt, Prompt) else "" for prompt in prompts]
    names = [f"{where}: the prompt" if where else f"prompt {index}" for index, where in enumerate(places)]
    return [encode_prompt(tokenizer, prompt) for prompt in asked], names


def _check_writes(source: str, role: str) -> None:
    if is_scalar_model(source):
        raise UserError(
            f"{role}: {source!r} is a reward model, which writes no text; judge replies with fastrlhf score"
        )


def _check_samples(*, n: int = 1, **_: float) -> None:
    if n > MOST_SAMPLES:
        raise UserError(f"--samples: {n} replies to a prompt; at most {MOST_SAMPLES}, more of them with another --seed")


def sample(
    source: str, prompts: Sequence[Asked], *, raw: bool = False, at_once: int | None = None, **sampling: float
) -> Iterator[list[Reply]]:
    """Yield the replies to each prompt in turn, decoded `at_once` prompts together (None: all), which changes none of
    them; sampling: the fields of SamplingParams. A Prompt knows its row, which errors name.

    UserError, before the first reply, for a reward model, for settings that cannot be and for prompts that are empty or
    too long for the model.
    """
    _check_writes(source, "FOLDER")
    _check_samples(**sampling)
    try:
        params = SamplingParams(**sampling)
        tokenizer = reading_tokenizer(source, raw)
        prompt_ids, names = _encoded(tokenizer, prompts)
        model = load_policy(source)
        params = replace(params, stop_token_ids=stop_token_ids(tokenizer, model.generation_config))
        engine = RolloutEngine(model, tokenizer)
        engine.check_prompts(prompt_ids, params, names)
        size = at_once or len(prompt_ids) or 1
        for first in range(0, len(prompt_ids), size):
            numbers = range(len(prompt_ids))[first : first + size]
            out = engine.generate([prompt_ids[i] for i in numbers], params, numbers=numbers)
            replies = list(map(Reply, reply_texts(tokenizer, out), out.response_ids, out.finished))
            yield from (replies[i : i + params.n] for i in range(0, len(replies), params.n))
    except ValueError as error:
        raise UserError(str(error)) from error


def sample_all(
    source: str, prompts: Sequence[Asked], say: Callable[[str], None], *, n: int, **options: float
) -> list[list[Reply]]:
    """The n replies to each prompt; `say` is told how far it is. options and errors: those of `sample`."""
    replies, began, said = [], time.monotonic(), 0.0
    at_once = max(1, REPLIES_AT_ONCE // max(1, n))
    for sampled in sample(source, prompts, at_once=at_once, n=n, **options):
        replies.append(sampled)
        now = time.monotonic()
        if len(replies) == len(prompts) or len(replies) % at_once == 0 and now - said >= PROGRESS_S:
            say(f"sampled {n} replies to {len(replies)} of {len(prompts)} prompts, {now - began:.0f} s")
            said = now
    return replies


def score(
    source: str, prompts: Sequence[str | Messages], responses: Sequence[str], *, raw: bool = False
) -> list[float]:
    """A reward model's raw score of each (prompt, response)."""
    tokenizer = reading_tokenizer(source, raw)
    model = load_reward_model(source)
    with torch.inference_mode():
        return score_texts(model, tokenizer, list(prompts), list(responses))


def reading_tokenizer(source: str, raw: bool) -> PreTrainedTokenizerBase:
    """The tokenizer of a model. It reads string prompts as training did: what the folder says, else messages where
    there is a chat template; raw: as they are."""
    tokenizer = load_tokenizer(source)
    decide(tokenizer, "raw" if raw else "auto", has_template=bool(tokenizer.chat_template))
    return tokenizer


# ---------------------------------------------------------------------------------------------------------------- rows


def row_for_sft(prompt: Prompt, reply: str, **marks: Any) -> tuple[dict[str, Any], str | None]:
    """The row of a reply, and why SFT would not read it as this prompt and this reply; None: it does.

    The row has the columns of the prompt, then prompt, response and marks. Columns are left out that SFT would take for
    a reply, a judgement or a part of the prompt; where it would not read the reply alone, all of them.
    """
    said = {"prompt": prompt.prompt, "response": reply}
    where = prompt.where or "command line"
    try:
        read = parse_conversation(said, where)
    except BadRow as error:
        return {**said, **marks}, str(error)
    if not _is(read, prompt, reply):
        problem = f'{where}: field "response" reads as a conversation of its own, or the prompt as another one'
        return {**said, **marks}, problem
    # One after the other: some columns have a meaning only beside another (both replies of a comparison).
    row: dict[str, Any] = {}
    for name, value in prompt.columns.items():
        # Rows of one judgement_id are one: two replies would be.
        if name not in said and name != "judgement_id" and _reads({**row, name: value, **said, **marks}, prompt, reply):
            row[name] = value
    return {**row, **said, **marks}, None


def rows_of_replies(replies: Iterable[tuple[Prompt, str]], say: Callable[[str], None]) -> list[dict[str, Any]]:
    """A row a reply, which SFT reads as this prompt and this reply; `say` is told of the columns that are left out for
    its sake (see row_for_sft). A reply that it would not read, such as an empty one, is kept, with the columns that it
    would read beside another."""
    rows, left_out = [], set[str]()
    for prompt, reply in replies:
        row, problem = row_for_sft(prompt, reply)
        if problem is not None:
            row = {**row_for_sft(prompt, "a reply")[0], "response": reply}
        left_out |= prompt.columns.keys() - row.keys()
        rows.append(row)
    if left_out:
        say(columns_left_out(left_out))
    return rows


def columns_left_out(names: Iterable[str]) -> str:
    """What people are told of them."""
    return f"columns left out, which SFT would read beside prompt and response: {', '.join(sorted(names))}"


def _reads(row: dict[str, Any], prompt: Prompt, reply: str) -> bool:
    with suppress(BadRow, DroppedRow):
        return _is(parse_conversation(row, prompt.where), prompt, reply)
    return False


def _is(read: Conversation, prompt: Prompt, reply: str) -> bool:
    """Whether this is the prompt and the reply to it."""
    if isinstance(prompt.prompt, str):
        return (read.prompt, read.response) == (prompt.prompt, reply)
    return read.messages == [*prompt.prompt, {"role": "assistant", "content": reply}]


def read_prompts(source: str, **how: Unpack[Reading]) -> list[Prompt]:
    """The prompts of a file (any form of load_prompts), or of stdin ("-"): JSON Lines, or a text a line.

    UserError at the first bad row, naming file and line, and where there is no prompt.
    """
    if source != STDIN:
        return load_prompts(source, **how)[0]
    lines = [(f"stdin:{n}", line.strip()) for n, line in enumerate(_stdin_lines(), 1) if line.strip()]
    are_rows = bool(lines) and lines[0][1].startswith("{")
    prompts, names = [], Columns(how.get("columns"), how.get("ignore_columns"))
    left_out = (DroppedRow, BadRow) if how.get("skip_bad_rows") else DroppedRow
    for where, line in lines:
        with suppress(left_out):
            prompts.append(parse_prompt(names.of(_json(where, line)) if are_rows else line, where))
    names.check()
    if not prompts:
        raise UserError("stdin: no prompts; write a text or a JSON row a line")
    return prompts


def _stdin_lines() -> list[str]:
    """The lines of stdin. Its bytes are read: what its text layer makes of them depends on the locale."""
    data = sys.stdin.buffer.read() if hasattr(sys.stdin, "buffer") else sys.stdin.read().encode()
    try:
        return encodings.decode(data).split("\n")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"stdin:{line}: not UTF-8 text; {encodings.remedy(error)}") from error


def _json(where: str, line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        raise BadRow(where, "not valid JSON; the first line is, so every line must be one JSON value") from None


def checked(text: str, option: str) -> str:
    """A text of the command line, which may be empty. UserError where the shell's bytes are no UTF-8."""
    return text_of(text, "command line", option, empty=True)


def check_output(path: str, overwrite: bool, option: str = "--output") -> None:
    """UserError, before a model works for it, for a file that is there and is to stay, or that cannot be written."""
    checked(path, option)
    target = Path(path).expanduser()
    if target.is_dir():
        raise UserError(f"{option}: {path} is a folder; name a file")
    if target.exists() and not overwrite:
        raise UserError(f"{option}: {path} exists; name another file, or use --overwrite")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option}: {path} cannot be written: {error.strerror}") from error
    if not os.access(target.parent, os.W_OK):
        raise UserError(f"{option}: {path} cannot be written: the folder {target.parent} is read-only")


def write_rows(path: str, rows: Iterable[Mapping[str, Any]], option: str = "--output") -> None:
    """JSON Lines under `path`, whole or not at all. UserError for what the disk refuses."""
    write_file(path, "".join(map(json_line, rows)), option)


def write_file(path: str, text: str, option: str = "--output") -> None:
    """A text under `path`, whole or not at all. UserError for what the disk refuses."""
    target = Path(path).expanduser()
    beside = target.with_name(f".tmp-{target.name}-{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8", errors="backslashreplace")
        fsync(beside)
        os.replace(beside, target)
    except OSError as error:
        raise UserError(f"{option}: {path} cannot be written: {error.strerror}") from error
    finally:
        beside.unlink(missing_ok=True)
