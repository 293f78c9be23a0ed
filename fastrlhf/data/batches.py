"""Many rows encoded at once: a fast tokenizer takes a list of texts on all cores, and one text at a time on one.

A fast tokenizer lets go of Python while it works, so one chunk of rows is with it while another is with the template.
How a row becomes token ids is written as a generator: it yields a request (the ids of a text, the text that the chat
template writes) and is sent the answer. `encode_one` answers each request by itself; `encode_many` collects those of
many rows, so that the same rules serve a reply in a rollout and a data set of a million rows.
"""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from fastrlhf.config.errors import UserError
from fastrlhf.data.checks import DroppedRow, Messages
from fastrlhf.data.rendering import render, render_many

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

T, Row = TypeVar("T"), TypeVar("Row")
ROWS = 1024  # encoded together: enough for all cores, and a bad row is found soon
CHUNKS = 2  # of ROWS at once: while the tokenizer has the texts of one, the template writes those of the other


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


@contextmanager
def collector_paused() -> Iterator[None]:
    """Python's cycle collector off: it goes through all rows again and again, which are no cycles, while their number
    grows."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


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


def backend_of(tokenizer: PreTrainedTokenizerBase) -> Tokenizer | None:
    """What a fast tokenizer's own call gives its texts to, set as that sets it; None for one of another kind, and for
    a class that has a call of its own."""
    from transformers import PreTrainedTokenizerFast

    names = ("__call__", "_encode_plus")
    known = all(getattr(type(tokenizer), name, None) is getattr(PreTrainedTokenizerFast, name, "") for name in names)
    if not tokenizer.is_fast or not known:
        return None
    backend = tokenizer.backend_tokenizer
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    if backend.encode_special_tokens != tokenizer.split_special_tokens:
        backend.encode_special_tokens = tokenizer.split_special_tokens
    return backend


def _tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str], special: bool) -> list[list[int]]:
    """Token ids of each text; none of an empty one, unless special tokens are asked for."""
    return _started(tokenizer, texts, special, None)()


def _started(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], special: bool, beside: Executor | None
) -> Callable[[], list[list[int]]]:
    """The same; waits for the ids of the texts, which a tokenizer that can encodes beside this thread."""
    wanted = list(dict.fromkeys(texts if special else filter(None, texts)))
    backend = backend_of(tokenizer) if wanted else None
    if backend is not None and beside is not None:
        future = beside.submit(_encoded, backend, wanted, special)
        return lambda: _in_order(texts, wanted, future.result())
    ids = _encoded(backend, wanted, special) if backend is not None else _called(tokenizer, wanted, special)
    return lambda: _in_order(texts, wanted, ids)


def _in_order(texts: list[str], wanted: list[str], ids: list[list[int]]) -> list[list[int]]:
    known = dict(zip(wanted, ids, strict=True))
    return [known.get(text, []) for text in texts]


def _encoded(backend: Tokenizer, texts: list[str], special: bool) -> list[list[int]]:
    """Without offsets, which nobody asks for: half of the time of the tokenizer's own call."""
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=special)]


def _called(tokenizer: PreTrainedTokenizerBase, texts: list[str], special: bool) -> list[list[int]]:
    # verbose=False: a text above the model's maximum is counted by the stage, not warned about here.
    return list(tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]) if texts else []


def encode_many(
    tokenizer: PreTrainedTokenizerBase, rows: Iterable[Row], encode: Callable[[Row], Steps[T]], size: int = ROWS
) -> Iterator[tuple[Row, T | DroppedRow | UserError]]:
    """(row, what its steps return, or the DroppedRow or UserError they raise) in the order of the rows, `size` of them
    together."""
    remaining = iter(rows)
    running: deque[_Chunk[Row, T]] = deque()
    with ThreadPoolExecutor(1) as beside:
        while True:
            while len(running) < CHUNKS and (chunk := list(islice(remaining, size))):
                running.append(_Chunk(tokenizer, chunk, encode, beside))
            if not running:
                return
            for chunk in running:
                chunk.go_on()
            while running and running[0].done:
                first = running.popleft()
                yield from zip(first.rows, first.results, strict=True)


class _Chunk(Generic[Row, T]):
    """Rows that are encoded together: each step of them all is one list of texts for the tokenizer or the template."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        rows: list[Row],
        encode: Callable[[Row], Steps[T]],
        beside: Executor,
    ) -> None:
        self.tokenizer, self.rows, self.beside = tokenizer, rows, beside
        self.steps = [encode(row) for row in rows]
        self.results: list[Any] = [None] * len(rows)
        indices = list(range(len(rows)))
        self.asked: list[tuple[list[int], Callable[[], list[Any]]]] = [(indices, lambda: [None] * len(indices))]

    @property
    def done(self) -> bool:
        return not self.asked

    def go_on(self) -> None:
        """Send every row the answer to its request and ask for its next, up to where they wait for the tokenizer."""
        requests: dict[tuple[type, bool], dict[int, Request]] = {}
        for indices, answers in self.asked:
            for index, answer in zip(indices, answers(), strict=True):
                request = self._next(index, answer)
                if request is not None:
                    requests.setdefault((type(request), request[1]), {})[index] = request
        # The tokenizer first: it works while the template does.
        kinds = sorted(requests, key=lambda kind: kind[0] is Rendered)
        self.asked = [(list(requests[kind]), self._ask(*kind, list(requests[kind].values()))) for kind in kinds]

    def _next(self, index: int, answer: Any) -> Request | None:
        """A row's next request; None: it has its result."""
        steps = self.steps[index]
        try:
            return steps.throw(answer) if isinstance(answer, UserError) else steps.send(answer)
        except StopIteration as end:
            self.results[index] = end.value
        except (DroppedRow, UserError) as error:
            self.results[index] = error
        return None

    def _ask(self, kind: type, flag: bool, requests: list[Request]) -> Callable[[], list[Any]]:
        """Waits for the answers; a UserError in place of one that the template refuses."""
        asked = [request[0] for request in requests]
        if kind is Ids:
            return _started(self.tokenizer, asked, flag, self.beside)
        return render_many(self.tokenizer, asked, add_generation_prompt=flag).copy
