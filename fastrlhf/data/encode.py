"""Rows as the token ids that each stage learns from or asks for: SFT's and PPO's mix (ptx), judgements, prompts.

Every source of a run is read and encoded here, once, before anything else is done: `Encoder` does it for the run and
for --dry-run alike, and counts what became of every row.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, NamedTuple, TypeVar

from transformers import PreTrainedTokenizerBase

from fastrlhf.config.base import StageConfig
from fastrlhf.config.errors import UserError
from fastrlhf.config.stages import PPOConfig, RewardConfig, SFTConfig
from fastrlhf.data.batches import Ahead, Steps, encode_many
from fastrlhf.data.checks import BadRow, DroppedRow
from fastrlhf.data.dataset import Counts, load_conversations, load_feedback, load_prompts, reading
from fastrlhf.data.feedback import Conversation, Feedback, Prompt
from fastrlhf.data.prompt_format import Form, describe, form_of
from fastrlhf.data.templates import conversation_steps, known_of, prompt_steps, replies_steps, text_steps

Located = TypeVar("Located", Conversation, Feedback, Prompt)  # they know where they came from
E = TypeVar("E")
Progress = Callable[[str, int, int], None]  # role, rows encoded, rows in all


@dataclass(frozen=True)
class Example:
    """Token ids, and which of them are targets (the first never is: nothing predicts it); group: what it answers; row:
    what it was made of, where somebody asks for that."""

    ids: list[int]
    target: list[bool]
    group: str
    row: Conversation | None = None

    @property
    def rows(self) -> list[list[int]]:
        """The token rows of a forward pass, as every encoded item has them."""
        return [self.ids]


@dataclass(frozen=True)
class Record:
    """One feedback record as token rows (prompt + response, one a response). judgements: how many rows of the source it
    was made of, and how many records it weighs. prompt_tokens: of each row. smoothing: of its labels, in training."""

    rows: list[list[int]]
    feedback: Feedback
    judgements: int = 1
    prompt_tokens: int = 0
    smoothing: float = 0.0

    @property
    def group(self) -> str:
        """What it answers."""
        return repr(self.feedback.prompt)

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(map(len, self.rows))


class EncodedPrompt(NamedTuple):
    prompt: Prompt
    ids: list[int]

    @property
    def rows(self) -> list[list[int]]:
        return [self.ids]


@dataclass(frozen=True)
class Encoded(Generic[E]):
    """The rows of a source. role: its name; forms: a line for each form that its rows have, and how it was read.

    dropped: the share of its rows that was left out. sampled: of so many usable rows a sample was encoded; None: all.
    """

    role: str
    items: list[E]
    counts: Counts
    forms: list[str]
    dropped: float
    sampled: int | None = None

    def lengths(self) -> list[int]:
        """Tokens of each token row."""
        return [len(row) for item in self.items for row in item.rows]

    def highest(self) -> int:
        """The highest token id."""
        return max(max(row, default=0) for item in self.items for row in item.rows)


def target_count(examples: Iterable[Example]) -> int:
    """Number of target tokens of these examples; their summed loss is divided by it."""
    return sum(sum(example.target) for example in examples)


def example_steps(tokenizer: PreTrainedTokenizerBase, row: Conversation) -> Steps[Example]:
    """Loss on assistant tokens only, all turns of them; on every token of plain text, EOS included."""
    if row.text is not None:
        ids = yield from text_steps(tokenizer, row.text)
        target, group = [True] * len(ids), row.text
    elif row.messages is not None:
        ids, target = yield from conversation_steps(tokenizer, row.messages)
        roles = [message["role"] for message in row.messages]
        group = repr(row.messages[: roles.index("assistant")])
    else:
        prompt, [response] = yield from replies_steps(tokenizer, row.prompt, [row.response])
        ids, target = prompt + response, [False] * len(prompt) + [True] * len(response)
        group = repr(row.prompt)
    target[:1] = [False]
    return Example(ids, target, group)


def row_form(tokenizer: PreTrainedTokenizerBase, row: Conversation | Feedback | Prompt) -> Form:
    """What a row is, for the log."""
    if isinstance(row, Conversation):
        return "plain texts" if row.text is not None else form_of(tokenizer, row.prompt or row.messages)
    return form_of(tokenizer, row.prompt)


class Encoder:
    """Reads the sources of a run into token ids with the tokenizer of the model that learns, its template settled.

    template: what forms say of it. sample: encode so many rows of a source and no more (None: all), chosen by the
    seed. progress: is told how far it is.
    """

    def __init__(
        self,
        config: StageConfig,
        tokenizer: PreTrainedTokenizerBase,
        template: str = "its chat template",
        *,
        sample: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.config, self.tokenizer, self.template = config, tokenizer, template
        self.sample, self.progress = sample, progress

    def examples(self, source: Any, role: str, *, keep_rows: bool = False) -> Encoded[Example]:
        """SFT's rows; what is too long is dropped or cut and counted, never silently. Errors as `usable` has them.
        keep_rows: examples keep what they were made of."""
        config: SFTConfig = self.config

        def encode(row: Conversation) -> Steps[Example]:
            example = yield from example_steps(self.tokenizer, row)
            if len(example.ids) > config.max_tokens:
                example = _fitted(example, config, counts)
            return replace(example, row=row) if keep_rows else example

        ahead = self._ahead(encode)
        rows, counts = load_conversations(
            source, format=config.format, **reading(config, role), seen=ahead and ahead.put
        )
        return self.usable(rows, encode, counts, role, remedy="raise max_tokens", ahead=ahead)

    def records(self, source: Any, role: str) -> Encoded[Record]:
        """Judgements; what is too long is dropped or cut and counted, never silently. Errors as `usable` has them."""
        config: RewardConfig = self.config
        known = known_of(self.tokenizer)

        def encode(item: Feedback) -> Steps[Record]:
            prompt, replies = yield from replies_steps(self.tokenizer, item.prompt, item.responses, known)
            rows = [prompt + reply for reply in replies]
            if item.ranking is not None and replies.count(replies[0]) == len(replies):
                raise DroppedRow("with equal replies")  # which differ by tokens that end them, or by blanks
            fits = max(map(len, rows)) <= config.max_tokens
            rows = rows if fits else _cut_rows(rows, len(prompt), config, counts)
            return Record(rows, item, prompt_tokens=len(prompt))

        ahead = self._ahead(encode)
        rows, counts = load_feedback(
            source, score_range=config.score_range, **reading(config, role), seen=ahead and ahead.put
        )
        return self.usable(rows, encode, counts, role, remedy="raise max_tokens", ahead=ahead)

    def sft_replies(self, source: Any) -> Encoded[Example]:
        """sft_data of a reward model: the last reply of each row, read as those that it will judge. Rows without one
        are bad rows; what is too long is dropped and counted. Errors as `usable` has them."""
        config: RewardConfig = self.config

        def encode(row: Conversation) -> Steps[Example]:
            if row.text is not None:
                raise UserError("plain text has no reply that a reward model could judge; sft_data takes conversations")
            prompt, reply = row.prompt, row.response
            if row.messages is not None:
                prompt, reply = row.messages[:-1], row.messages[-1]["content"]
            ids, [response] = yield from replies_steps(self.tokenizer, prompt, [reply])
            if len(ids) + len(response) > config.max_tokens:
                raise DroppedRow(f"longer than max_tokens = {config.max_tokens}")
            target = [False] * len(ids) + [True] * len(response)
            return Example(ids + response, target, repr(prompt))

        ahead = self._ahead(encode)
        rows, counts = load_conversations(source, **reading(config, "sft_data"), seen=ahead and ahead.put)
        return self.usable(rows, encode, counts, "sft_data", remedy="raise max_tokens", ahead=ahead)

    def prompts(self, source: Any, role: str) -> Encoded[EncodedPrompt]:
        """PPO's prompts. UserError, naming the shortest, where none is short enough; else as `usable` has them."""
        limit, lengths = self.config.max_prompt_tokens, []

        def encode(prompt: Prompt) -> Steps[EncodedPrompt]:
            ids = yield from prompt_steps(self.tokenizer, prompt.prompt)
            lengths.append(len(ids))
            if len(ids) > limit:
                raise DroppedRow(f"longer than max_prompt_tokens = {limit}")
            return EncodedPrompt(prompt, ids)

        ahead = self._ahead(encode)
        rows, counts = load_prompts(source, **reading(self.config, role), seen=ahead and ahead.put)
        try:
            return self.usable(rows, encode, counts, role, ahead=ahead)
        except NothingLeft:
            if not lengths:
                raise
            problem = f"every prompt is longer than max_prompt_tokens = {limit} (the shortest: {min(lengths)})"
            raise UserError(f"{role}: {problem}; raise it") from None

    def ptx(self, source: Any) -> Encoded[Example]:
        """ptx_data; rows longer than a prompt and its reply together are dropped. Errors as `usable` has them."""
        limit = ptx_limit(self.config)

        def encode(row: Conversation) -> Steps[Example]:
            example = yield from example_steps(self.tokenizer, row)
            if len(example.ids) > limit:
                raise DroppedRow(f"longer than max_prompt_tokens + max_new_tokens = {limit}")
            return example

        ahead = self._ahead(encode)
        rows, counts = load_conversations(source, **reading(self.config, "ptx_data"), seen=ahead and ahead.put)
        return self.usable(rows, encode, counts, "ptx_data", remedy="raise max_prompt_tokens", ahead=ahead)

    def _ahead(self, encode: Callable[[Located], Steps[E]]) -> Ahead[Located, E] | None:
        """Begins with the rows of a source while it is being read; None: a sample will be taken of them."""
        return Ahead(self.tokenizer, encode) if self.sample is None else None

    def usable(
        self,
        rows: Sequence[Located],
        encode: Callable[[Located], Steps[E]],
        counts: Counts,
        role: str,
        *,
        remedy: str = "",
        ahead: Ahead[Located, E] | None = None,
    ) -> Encoded[E]:
        """Encode every row that can be used, and count the others. ahead: what was begun of the rows.

        encode may raise DroppedRow, e.g. "longer than max_tokens = 32", or cut a row and note that in counts. What the
        chat template refuses (UserError) is a bad row, named by its place. Raises UserError at the first bad row (with
        skip_bad_rows they are counted as malformed), and NothingLeft, naming role and remedy.
        """
        sampled = None
        before = 1 - counts.used / max(counts.read, 1)
        if self.sample is not None and len(rows) > self.sample:
            sampled = len(rows)
            chosen = random.Random(f"sample {self.config.seed}").sample(range(sampled), self.sample)
            rows = [rows[index] for index in sorted(chosen)]
        items, forms = [], []
        for number, (row, result) in enumerate(encode_many(self.tokenizer, rows, encode, ahead=ahead), 1):
            if isinstance(result, DroppedRow):
                counts.add(result.reason)
            elif isinstance(result, UserError):
                counts.add_bad(BadRow(row.where, str(result)), skip=self.config.skip_bad_rows)
            else:
                items.append(result)
                forms.append(row_form(self.tokenizer, row))
            if self.progress is not None:
                self.progress(role, number, len(rows))
        if not items:
            raise NothingLeft(f"{role}: nothing left to train on ({counts.line()}){remedy and '; ' + remedy}")
        dropped = round(before + (1 - before) * (1 - len(items) / len(rows)), 9)
        lines = describe(self.tokenizer, forms, role, self.template)
        return Encoded(role, items, counts, lines, dropped, sampled)


class NothingLeft(UserError):
    """No row of a source can be used."""


def _fitted(example: Example, config: SFTConfig, counts: Counts) -> Example:
    """Cut an over-long example, counted, or raise DroppedRow. A cut reply ends open: a made-up EOS would teach to stop
    there."""
    limit = config.max_tokens
    if config.overlong == "drop":
        raise DroppedRow(f"longer than max_tokens = {limit}")
    cut = Example(example.ids[:limit], example.target[:limit], example.group)
    if not any(cut.target):
        raise DroppedRow(f"with no reply within max_tokens = {limit}")
    counts.noted[f"cut to max_tokens = {limit}"] += 1
    return cut


def _cut_rows(rows: list[list[int]], prompt: int, config: RewardConfig, counts: Counts) -> list[list[int]]:
    """The same for the rows of a record, whose prompt has so many tokens."""
    limit = config.max_tokens
    if config.overlong == "drop" or prompt >= limit:
        what = "longer than" if config.overlong == "drop" else "with no reply within"
        raise DroppedRow(f"{what} max_tokens = {limit}")
    rows = [row[:limit] for row in rows]
    if len(rows) > 1 and all(row == rows[0] for row in rows):
        raise DroppedRow(f"with equal replies within max_tokens = {limit}")
    counts.noted[f"cut to max_tokens = {limit}"] += 1
    return rows


def check_ptx(config: PPOConfig, ptx_data: Any) -> None:
    """Raise UserError where one of ptx_coef and ptx_data stands without the other."""
    if config.ptx_coef > 0 and ptx_data is None:
        remedy = "give ptx_data, or ptx_coef=0"
        raise UserError(f"ptx_data: ptx_coef = {config.ptx_coef:g} needs rows to learn from; {remedy}")
    if config.ptx_coef == 0 and ptx_data is not None:
        raise UserError("ptx_coef = 0: ptx_data would never be used; set ptx_coef above 0 or leave ptx_data out")


def check_centring(config: RewardConfig, sft_data: Any) -> None:
    """Raise UserError where one of center_rewards and sft_data stands without the other."""
    if config.center_rewards and sft_data is None:
        raise UserError(
            "center_rewards = true: needs replies whose mean score is 0; give sft_data, what SFT learnt from"
        )
    if not config.center_rewards and sft_data is not None:
        raise UserError("center_rewards = false: sft_data would never be used; set center_rewards=true or leave it out")


def ptx_limit(config: PPOConfig) -> int:
    """The most tokens a row of ptx_data may have: as many as a prompt and its reply together."""
    return config.max_prompt_tokens + config.max_new_tokens
