"""Many rows encoded at once: a fast tokenizer takes a list of texts on all cores, and one text at a time on one.

A fast tokenizer lets go of Python while it works, so some chunks of rows are with it while another is with the
template. How a row becomes token ids is written as a generator: it yields a request (the ids of a text, the text that
the chat template writes), or a list of such that do not need each other's answers, and is sent the answer, or theirs.
`encode_one` answers each request by itself; `encode_many` collects those of many rows, so that the same rules serve a
reply in a rollout and a data set of a million rows.
"""

from __future__ import annotations

import operator
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from fastrlhf.config.errors import UserError
from fastrlhf.data.checks import DroppedRow, Messages
from fastrlhf.data.rendering import render, render_many

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

T, Row = TypeVar("T"), TypeVar("Row")
ROWS = 512  # encoded together: enough for all cores, and a bad row is found soon
CHUNKS = 4  # of ROWS at once: while the tokenizer has the texts of some, the template writes those of another
TEXTS = 256  # given to the tokenizer in one call: what it says of more does not fit the processor's caches
AHEAD = 96  # of ROWS with the tokenizer while their source is still being read
CALLS = 2  # at once: while the ids of one become Python's, the tokenizer works for the other


class Ids(NamedTuple):
    """Asks for the token ids of a text; special: with what the tokenizer puts around it (BOS, EOS)."""

    text: str
    special: bool = False


class Rendered(NamedTuple):
    """Asks for the chat template's text of a conversation; generation_prompt: up to where the assistant speaks."""

    messages: Messages
    generation_prompt: bool


Request = Ids | Rendered
Steps = Generator[Request | list[Request], Any, T]  # yields requests, is sent their answers, returns T


def encode_one(tokenizer: PreTrainedTokenizerBase, steps: Steps[T]) -> T:
    """Run one row's steps to their end. Raises what they raise, and UserError for what the template refuses."""
    answer = None
    while True:
        try:
            request = steps.send(answer)
        except StopIteration as end:
            return end.value
        answer = (_answers if type(request) is list else _answer)(tokenizer, request)


def _answers(tokenizer: PreTrainedTokenizerBase, requests: list[Request]) -> list[Any]:
    texts = {flag: [one.text for one in requests if one[1] == flag and type(one) is Ids] for flag in (False, True)}
    ids = {special: iter(_tokenize(tokenizer, asked, special)) for special, asked in texts.items()}
    return [next(ids[one[1]]) if type(one) is Ids else _answer(tokenizer, one) for one in requests]


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
    wanted = _wanted(texts, special)
    backend = backend_of(tokenizer) if wanted else None
    ids = _encoded(backend, wanted, special) if backend is not None else _called(tokenizer, wanted, special)
    return _in_order(texts, wanted, ids)


def _wanted(texts: list[str], special: bool) -> list[str]:
    return list(dict.fromkeys(texts if special else filter(None, texts)))


def _in_order(texts: list[str], wanted: list[str], ids: Iterable[list[int]]) -> list[list[int]]:
    known = dict(zip(wanted, ids, strict=True))
    return [known.get(text, []) for text in texts]


def _encoded(backend: Tokenizer, texts: list[str], special: bool) -> list[list[int]]:
    """Without offsets, which nobody asks for: half of the time of the tokenizer's own call."""
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=special)]


def _called(tokenizer: PreTrainedTokenizerBase, texts: list[str], special: bool) -> list[list[int]]:
    # verbose=False: a text above the model's maximum is counted by the stage, not warned about here.
    return list(tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]) if texts else []


class Ahead(Generic[Row, T]):
    """The first rows of a source that is still being read: their texts are with the tokenizer already, which works
    beside this thread. No row's steps are sent ids before `encode_many` has all rows."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, encode: Callable[[Row], Steps[T]], size: int | None = None
    ) -> None:
        self._tokenizer, self._encode, self._size = tokenizer, encode, size or ROWS
        self._rows: list[Row] = []
        self._chunks: deque[_Chunk[Row, T]] = deque()
        self._beside = ThreadPoolExecutor(CALLS)
        self._works = backend_of(tokenizer) is not None  # another is called in this thread

    def put(self, row: Row) -> None:
        """The next row of the source."""
        if not self._works or len(self._chunks) == AHEAD:
            return
        self._rows.append(row)
        if len(self._rows) == self._size:
            chunk = _Chunk(self._tokenizer, self._rows, self._encode, self._beside)
            while chunk.waits_for_texts:
                chunk.go_on()
            self._chunks.append(chunk)
            self._rows = []

    def of(self, rows: list[Row]) -> deque[_Chunk[Row, T]]:
        """The chunks that rows begin with; none where the source has come to other rows than those that were put."""
        begun = chain.from_iterable(chunk.rows for chunk in self._chunks)
        count = sum(len(chunk.rows) for chunk in self._chunks)
        same = count <= len(rows) and all(map(operator.is_, begun, rows))
        return self._chunks if same else deque()


def encode_many(
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[Row],
    encode: Callable[[Row], Steps[T]],
    size: int = ROWS,
    ahead: Ahead[Row, T] | None = None,
) -> Iterator[tuple[Row, T | DroppedRow | UserError]]:
    """(row, what its steps return, or the DroppedRow or UserError they raise) in the order of the rows, `size` of them
    together. ahead: what was begun of them, with the same tokenizer and the same steps."""
    running: deque[_Chunk[Row, T]] = deque() if ahead is None else ahead.of(rows)
    remaining = islice(iter(rows), sum(len(chunk.rows) for chunk in running), None)
    with ThreadPoolExecutor(CALLS) as beside:
        while True:
            while len(running) < CHUNKS and (chunk := list(islice(remaining, size))):
                running.append(_Chunk(tokenizer, chunk, encode, beside))
            if not running:
                return
            # One whose ids are there; where all wait for theirs, the first, which waits too.
            next((chunk for chunk in running if chunk.ready), running[0]).go_on()
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
        self.results: list[Any] = [None] * len(rows)
        self._steps = [encode(row) for row in rows]
        # Rows that wait, and what each has asked for: at first nothing.
        self._asking: list[tuple[int, Any]] = [(index, None) for index in range(len(rows))]
        self._answers: dict[tuple[type, bool], Iterable[Any]] = {}  # of all of them, by what they asked for
        self._refused = False  # the template one of them
        self._futures: list[Future] = []
        self.go_on()

    @property
    def done(self) -> bool:
        return not self._asking

    @property
    def waits_for_texts(self) -> bool:
        """Whether its rows have asked for what the template writes, and for nothing else."""
        return bool(self._asking) and all(kind is Rendered for kind, _ in self._answers)

    @property
    def ready(self) -> bool:
        """Whether nothing that its rows asked for is still being worked on."""
        return all(future.done() for future in self._futures)

    def go_on(self) -> None:
        """Send every row its answers and ask for what it needs next, up to where they wait for the tokenizer."""
        answers = {kind: iter(given) for kind, given in self._answers.items()}
        asked: dict[tuple[type, bool], list[Any]] = defaultdict(list)
        asking, self._asking = self._asking, []
        for index, request in asking:
            steps, error = self._steps[index], None
            if request is None:
                answer = None
            elif type(request) is list:
                answer = [next(answers[type(one), one[1]]) for one in request]
                if self._refused:
                    error = next((one for one in answer if isinstance(one, UserError)), None)
            else:
                answer = next(answers[type(request), request[1]])
                error = answer if isinstance(answer, UserError) else None
            try:
                request = steps.send(answer) if error is None else steps.throw(error)
            except StopIteration as end:
                self.results[index] = end.value
                continue
            except (DroppedRow, UserError) as reason:
                self.results[index] = reason
                continue
            self._asking.append((index, request))
            for one in request if type(request) is list else (request,):
                asked[type(one), one[1]].append(one[0])
        self._futures, self._refused = [], False
        # The tokenizer first: it works while the template does.
        kinds = sorted(asked, key=lambda kind: kind[0] is Rendered)
        self._answers = {kind: self._ask(*kind, asked[kind]) for kind in kinds}

    def _ask(self, kind: type, flag: bool, asked: list[Any]) -> Iterable[Any]:
        """The answers, waited for where they are read; a UserError in place of one that the template refuses."""
        if kind is Rendered:
            texts = render_many(self.tokenizer, asked, add_generation_prompt=flag)
            self._refused = self._refused or not all(type(text) is str for text in texts)
            return texts
        wanted = _wanted(asked, flag)
        backend = backend_of(self.tokenizer) if wanted else None
        if backend is None:
            return _in_order(asked, wanted, _called(self.tokenizer, wanted, flag))
        slices = (wanted[start : start + TEXTS] for start in range(0, len(wanted), TEXTS))
        futures = [self.beside.submit(_encoded, backend, texts, flag) for texts in slices]
        self._futures += futures
        return _arriving(asked, wanted, futures)


def _arriving(texts: list[str], wanted: list[str], futures: list[Future]) -> Iterator[list[int]]:
    """The ids of each text, of which the tokenizer encodes slices beside this thread."""
    yield from _in_order(texts, wanted, chain.from_iterable(future.result() for future in futures))
