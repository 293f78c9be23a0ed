"""Many rows encoded at once: a fast tokenizer takes a list of texts on all cores, and one text at a time on one.

How a row becomes token ids is written as a generator: it yields a request (the ids of a text, the text that the chat
template writes) and is sent the answer. `encode_one` answers each request by itself; `encode_many` collects those of
many rows, so that the same rules serve a reply in a rollout and a data set of a million rows.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from fastrlhf.config.errors import UserError
from fastrlhf.data.checks import DroppedRow, Messages
from fastrlhf.data.rendering import render, render_many

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T, Row = TypeVar("T"), TypeVar("Row")
ROWS = 1024  # encoded together: enough for all cores, and a bad row is found soon


class Ids(NamedTuple):
    """Asks for the token ids of a text; special: with what the tokenizer puts around it (BOS, EOS)."""

    text: str
    special: bool = False


class Rendered(NamedTuple):
    """Asks for the chat template's text of a conversation; generation_prompt: up to where the assistant speaks."""

    messages: Messages
    generation_prompt: bool


Request = Ids | Rendered
Steps = Generator[Request, Any, T]  # yields requests, is sent their answers, returns T


def encode_one(tokenizer: PreTrainedTokenizerBase, steps: Steps[T]) -> T:
    """Run one row's steps to their end. Raises what they raise, and UserError for what the template refuses."""
    answer = None
    while True:
        try:
            request = steps.send(answer)
        except StopIteration as end:
            return end.value
        answer = _answer(tokenizer, request)


def _answer(tokenizer: PreTrainedTokenizerBase, request: Request) -> Any:
    if isinstance(request, Rendered):
        return render(tokenizer, request.messages, add_generation_prompt=request.generation_prompt)
    return _tokenize(tokenizer, [request.text], request.special)[0]


def _tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str], special: bool) -> list[list[int]]:
    """Token ids of each text; none of an empty one, unless special tokens are asked for."""
    wanted = texts if special else [text for text in texts if text]
    # verbose=False: a text above the model's maximum is counted by the stage, not warned about here.
    how: dict[str, bool] = {"add_special_tokens": special, "verbose": False}
    if tokenizer.is_fast:  # what is not asked for is a third of its time
        how |= {"return_attention_mask": False, "return_token_type_ids": False}
    ids = iter(tokenizer(wanted, **how)["input_ids"] if wanted else [])
    return [next(ids) if special or text else [] for text in texts]


def encode_many(
    tokenizer: PreTrainedTokenizerBase, rows: Iterable[Row], encode: Callable[[Row], Steps[T]], size: int = ROWS
) -> Iterator[tuple[Row, T | DroppedRow | UserError]]:
    """(row, what its steps return, or the DroppedRow or UserError they raise) in the order of the rows, `size` of them
    together."""
    remaining = iter(rows)
    while chunk := list(islice(remaining, size)):
        yield from zip(chunk, _together(tokenizer, [encode(row) for row in chunk]), strict=True)


def _together(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Steps[T]]) -> list[Any]:
    results: list[Any] = [None] * len(rows)
    answers: dict[int, Any] = dict.fromkeys(range(len(rows)))
    while answers:
        requests: dict[int, Request] = {}
        for index, answer in answers.items():
            try:
                refused = isinstance(answer, UserError)
                requests[index] = rows[index].throw(answer) if refused else rows[index].send(answer)
            except StopIteration as end:
                results[index] = end.value
            except (DroppedRow, UserError) as error:
                results[index] = error
        answers = _answers(tokenizer, requests)
    return results


def _answers(tokenizer: PreTrainedTokenizerBase, requests: dict[int, Request]) -> dict[int, Any]:
    """The answers by row; a UserError in place of one that the template refuses."""
    groups: dict[tuple[type, bool], list[int]] = {}
    for index, request in requests.items():
        groups.setdefault((type(request), request[1]), []).append(index)
    answers: dict[int, Any] = {}
    for (kind, flag), indices in groups.items():
        asked = [requests[index][0] for index in indices]
        if kind is Ids:
            found = _tokenize(tokenizer, asked, flag)
        else:
            found = render_many(tokenizer, asked, add_generation_prompt=flag)
        answers.update(zip(indices, found, strict=True))
    return answers
