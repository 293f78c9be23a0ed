"""Rows in, from files or datasets, each with the place it came from; and the order in which they are used.

JSON and JSONL are read here, line by line, because a message must name the line of a fault; CSV through the
standard library, which leaves "NA" and "007" as they stand; Parquet, saved datasets and hub ids through
`datasets`. Every row is read, checked and counted: none disappears without a reason in Counts.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from fastrlhf.config import UserError
from fastrlhf.feedback import (
    BadRow,
    Conversation,
    DroppedRow,
    Feedback,
    Prompt,
    parse_conversation,
    parse_feedback,
    parse_prompt,
)

T = TypeVar("T")
SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet", ".csv")
MALFORMED = "malformed"
REPEATED = "repeat an earlier prompt"
# CSV columns whose cells are written as JSON.
_CSV_LISTS = ("messages", "conversations", "responses", "scores", "ranking", "history")
_CSV_MESSAGES = ("prompt", "chosen", "rejected", "completion")
_CSV_NUMBERS = ("score", "margin")


@dataclass
class Counts:
    """What became of the rows of one source. dropped: reason -> rows; noted: changes that kept the row."""

    read: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    noted: Counter[str] = field(default_factory=Counter)
    malformed: list[str] = field(default_factory=list)  # the first five messages of skipped rows

    @property
    def used(self) -> int:
        """Rows read and not dropped."""
        return self.read - sum(self.dropped.values())

    def add(self, reason: str, n: int = 1) -> None:
        """Count n rows as dropped for reason, e.g. "longer than 1024 tokens"."""
        if n:
            self.dropped[reason] += n

    def line(self) -> str:
        """ "2400 rows read, 2391 used, dropped: 6 longer than 1024 tokens, 3 malformed"."""
        text = f"{self.read} rows read, {self.used} used"
        if self.dropped:
            text += ", dropped: " + ", ".join(f"{n} {reason}" for reason, n in self.dropped.most_common())
        if self.noted:
            text += "; " + ", ".join(f"{n} {note}" for note, n in self.noted.most_common())
        return text


def read_rows(source: Any) -> Iterator[tuple[str, Any]]:
    """(where, row) of every row of source.

    source: a path (.json, .jsonl, both also .gz, .parquet, .csv), a folder (written by Dataset.save_to_disk, or
    one of such files), a hub id, a datasets.Dataset, or a list of rows. A line that is no JSON or no UTF-8 comes
    as a BadRow in the row's place, so that the caller may skip it. where is "file:line", "file row N" or
    "row N" (all from 1). Raises UserError: unreadable or unknown source, a file that is broken as a whole.
    """
    if isinstance(source, (str, Path)):
        path = Path(source).expanduser()
        if path.is_dir():
            yield from _read_folder(path)
        elif path.is_file():
            yield from _read_file(path)
        else:
            yield from _read_hub(str(source), path)
    elif hasattr(source, "keys"):
        yield from _numbered(_one_split(source, "the dataset"), "row")
    elif isinstance(source, Iterable):
        yield from _numbered(source, "row")
    else:
        raise UserError(f"data must be a path, a hub id, a dataset or a list of rows, not {type(source).__name__}")


def _numbered(rows: Iterable, name: str) -> Iterator[tuple[str, Any]]:
    return ((f"{name} {i}", row) for i, row in enumerate(rows, 1))


def _one_split(splits: Any, name: str) -> Any:
    """The train split of a dict of datasets, or its only one."""
    if "train" in splits or len(splits) == 1:
        return splits["train"] if "train" in splits else next(iter(splits.values()))
    raise UserError(f"{name} has the splits {', '.join(splits)} but no train; pass the dataset of one split")


def _read_hub(name: str, path: Path) -> Iterator[tuple[str, Any]]:
    looks_local = path.is_absolute() or name.startswith((".", "~")) or name.lower().endswith(SUFFIXES)
    if looks_local or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise UserError(f"{name}: no such file or folder")
    import datasets

    try:
        splits = datasets.load_dataset(name)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{name}: neither a file or folder here nor a dataset that can be loaded from the hub ({reason})"
        ) from error
    yield from _numbered(_one_split(splits, name), f"{name} row")


def _read_folder(path: Path) -> Iterator[tuple[str, Any]]:
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        import datasets

        loaded = datasets.load_from_disk(str(path))
        yield from _numbered(_one_split(loaded, str(path)) if hasattr(loaded, "keys") else loaded, f"{path} row")
        return
    files = sorted(p for p in path.iterdir() if p.is_file() and p.name.lower().endswith(SUFFIXES))
    if not files:
        raise UserError(f"{path}: the folder holds no data file ({', '.join(SUFFIXES)}) and no saved dataset")
    words = {p: set(re.split(r"[^a-z]+", p.name.lower())) for p in files}
    train = [p for p in files if "train" in words[p]]
    held_out = [p for p in files if words[p] & {"valid", "validation", "val", "test", "dev", "eval"}]
    if train and held_out:
        raise UserError(
            f"{path}: the folder holds {train[0].name} and {held_out[0].name}; name the file, so that nothing "
            "held out is trained on"
        )
    for file in files:
        yield from _read_file(file)


def _read_file(path: Path) -> Iterator[tuple[str, Any]]:
    name = path.name.lower()
    try:
        if name.endswith((".jsonl", ".jsonl.gz")):
            with _open(path) as file:
                yield from _json_lines(file, str(path))
        elif name.endswith((".json", ".json.gz")):
            with _open(path) as file:
                yield from _json(file.read(), str(path))
        elif name.endswith(".csv"):
            with _open(path) as file:
                yield from _csv(file.read(), str(path))
        elif name.endswith(".parquet"):
            yield from _parquet(path)
        else:
            raise UserError(f"{path}: unknown kind of file; use one of {', '.join(SUFFIXES)}")
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error


def _open(path: Path) -> Any:
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else open(path, "rb")


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadRow(where, f"not valid UTF-8 (byte {error.start} of the line); save the file as UTF-8") from error


def _json_lines(lines: Iterable[bytes], name: str) -> Iterator[tuple[str, Any]]:
    for number, data in enumerate(lines, 1):
        where = f"{name}:{number}"
        if not data.strip():
            continue
        try:
            row = json.loads(_decode(data, where))
        except BadRow as error:
            row = error
        except (json.JSONDecodeError, RecursionError) as error:
            row = BadRow(where, f"not valid JSON ({error}); every line must be one complete JSON value")
        yield where, row


def _json(data: bytes, name: str) -> Iterator[tuple[str, Any]]:
    """Rows of a JSON file: an array, one object, or JSON lines, which are often named .json."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise BadRow(f"{name}:{line}", "not valid UTF-8; save the file as UTF-8") from error
    if _is_json_lines(text):
        yield from _json_lines(data.split(b"\n"), name)
        return
    try:
        for position, row in _json_values(text):
            yield f"{name}:{text.count(chr(10), 0, position) + 1}", row
    except json.JSONDecodeError as error:
        raise BadRow(f"{name}:{error.lineno}", f"not valid JSON ({error.msg}, column {error.colno})") from error
    except RecursionError as error:
        raise BadRow(name, "not valid JSON (nested too deeply)") from error


def _is_json_lines(text: str) -> bool:
    first, _, rest = text.strip().partition("\n")
    if not rest:
        return False
    try:
        json.loads(first)
    except (json.JSONDecodeError, RecursionError):
        return False
    return True


def _json_values(text: str) -> Iterator[tuple[int, Any]]:
    """(position, value) of the elements of a JSON array, or of the one value of the text."""
    decode, skip = json.JSONDecoder().raw_decode, re.compile(r"\s*").match
    at = skip(text).end()
    if at == len(text):
        return
    closed = text[at] != "["
    if closed:
        value, end = decode(text, at)
        yield at, value
    else:
        end = skip(text, at + 1).end()
        closed = text[end : end + 1] == "]"
        while not closed:
            value, after = decode(text, end)
            yield end, value
            after = skip(text, after).end()
            closed = text[after : after + 1] == "]"
            if not closed and text[after : after + 1] != ",":
                raise json.JSONDecodeError("expected a comma or ]", text, after)
            end = after if closed else skip(text, after + 1).end()
        end += 1
    if skip(text, end).end() != len(text):
        raise json.JSONDecodeError("text behind the end of the value", text, skip(text, end).end())


def _csv(data: bytes, name: str) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(2**31 - 1)
    text = _decode(data, name)
    rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    number = 0
    try:
        for number, row in enumerate(rows, 1):
            where = f"{name} row {number}"
            if None in row:
                yield where, BadRow(where, f"has more cells than the header's {len(rows.fieldnames or ())}")
            else:
                yield where, {key: _cell(key, value) for key, value in row.items()}
    except csv.Error as error:
        raise BadRow(f"{name} row {number + 1}", f"not valid CSV ({error})") from error


def _cell(column: str, text: str | None) -> Any:
    """A CSV cell: empty is missing; lists, messages, numbers and booleans where the column asks for them."""
    if not text:
        return None
    if column in _CSV_NUMBERS:
        return _parsed(text, (int, float))
    if column == "label":
        return {"true": True, "1": True, "false": False, "0": False}.get(text.strip().lower(), text)
    if column in _CSV_LISTS:
        return _parsed(text, list)
    if column in _CSV_MESSAGES:
        value = _parsed(text, list)
        return value if isinstance(value, list) and value and isinstance(value[0], dict) else text
    return text


def _parsed(text: str, kind: type | tuple[type, ...]) -> Any:
    """The JSON value of text if it is of that kind, else text."""
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return text
    return value if isinstance(value, kind) else text


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import datasets

    try:
        # Streaming: no second copy of the file in a cache.
        rows = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        yield from _numbered(rows, f"{path} row")
    except (ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"{path}: not a readable Parquet file ({error})") from error


def _load(source: Any, parse: Callable[[Any, str], T], skip_bad_rows: bool, needs: str) -> tuple[list[T], Counts]:
    counts, items = Counts(), []
    for where, row in read_rows(source):
        counts.read += 1
        try:
            if isinstance(row, BadRow):
                raise row
            items.append(parse(row, where))
        except DroppedRow as error:
            counts.add(error.reason)
        except BadRow as error:
            if not skip_bad_rows:
                raise UserError(f"{error} (skip_bad_rows=true leaves such rows out)") from error
            counts.add(MALFORMED)
            if len(counts.malformed) < 5:
                counts.malformed.append(str(error))
    if not items:
        name = source if isinstance(source, (str, Path)) else f"the {type(source).__name__} given"
        first = f"; first: {counts.malformed[0]}" if counts.malformed else ""
        raise UserError(f"{name}: no usable row of {needs} ({counts.line()}{first})")
    return items, counts


def load_feedback(
    source: Any, *, score_range: tuple[float, float] = (1.0, 5.0), skip_bad_rows: bool = False
) -> tuple[list[Feedback], Counts]:
    """All feedback of a source (see read_rows) in its order, and what became of its rows.

    Raises UserError at the first bad row, naming file, line and field; with skip_bad_rows bad rows are counted
    as malformed instead. Raises it too when no usable row is left.
    """
    return _load(source, lambda row, where: parse_feedback(row, where, score_range), skip_bad_rows, "feedback")


def load_conversations(
    source: Any, *, format: str = "auto", skip_bad_rows: bool = False
) -> tuple[list[Conversation], Counts]:
    """All SFT examples of a source; format as in parse_conversation; errors as in load_feedback."""
    return _load(source, lambda row, where: parse_conversation(row, where, format), skip_bad_rows, "SFT data")


def load_prompts(source: Any, *, skip_bad_rows: bool = False) -> tuple[list[Prompt], Counts]:
    """All prompts of a source; errors as in load_feedback.

    Prompts that were cut and prompts that stand in the source more than once are kept and noted in Counts.
    """
    prompts, counts = _load(source, parse_prompt, skip_bad_rows, "prompts")
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.note:
            counts.noted[prompt.note] += 1
        key = _prompt_key(prompt, 0)
        counts.noted[REPEATED] += key in seen
        seen.add(key)
    counts.noted += Counter()  # drops the zeros
    return prompts, counts


def _prompt_key(item: Any, index: int) -> str:
    """What two items share that must not be torn apart: their prompt, or first message; else nothing."""
    prompt = getattr(item, "prompt", None) or getattr(item, "messages", None)
    return json.dumps(prompt, ensure_ascii=False) if prompt else str(index)


def split_heldout(items: Sequence[T], fraction: float, seed: int) -> tuple[list[T], list[T]]:
    """(train, held out), both in the order of items; the same for the same items, fraction and seed.

    Items with the same prompt (several judgements of it) stay together, so that held-out accuracy is measured on
    prompts that were not trained on; held out is therefore fraction * len(items) only up to the last group. With
    fraction > 0 and two items or more neither part is empty. Items that all share one prompt are split singly.
    """
    keys = [_prompt_key(item, i) for i, item in enumerate(items)]
    if len(set(keys)) < 2:
        keys = [str(i) for i in range(len(items))]
    sizes = Counter(keys)
    order = sorted(sizes)
    random.Random(f"held out {seed}").shuffle(order)
    held: set[str] = set()
    wanted = max(1, round(fraction * len(items))) if fraction > 0 and len(items) > 1 else 0
    taken = 0
    for key in order[:-1]:
        if taken >= wanted:
            break
        held.add(key)
        taken += sizes[key]
    train = [item for item, key in zip(items, keys) if key not in held]
    return train, [item for item, key in zip(items, keys) if key in held]


class Sampler:
    """An endless stream of indices 0..n-1 in which every epoch is one permutation.

    The permutation of an epoch depends on (seed, epoch, n) only, so epoch and cursor are the whole state.
    """

    def __init__(self, n: int, seed: int):
        if n < 1:
            raise ValueError(f"n must be at least 1, found {n}")
        self.n, self.seed, self.epoch, self.cursor = n, seed, 0, 0
        self._order = self._permutation()

    def _permutation(self) -> list[int]:
        order = list(range(self.n))
        random.Random(f"epoch {self.epoch} of seed {self.seed}").shuffle(order)
        return order

    def take(self, k: int) -> list[int]:
        """The next k indices; an epoch's end is crossed without a gap."""
        result: list[int] = []
        while len(result) < k:
            if self.cursor == self.n:
                self.epoch, self.cursor = self.epoch + 1, 0
                self._order = self._permutation()
            part = self._order[self.cursor : self.cursor + k - len(result)]
            self.cursor += len(part)
            result += part
        return result

    def state_dict(self) -> dict[str, int]:
        """JSON-able: n, seed, epoch, cursor."""
        return {"n": self.n, "seed": self.seed, "epoch": self.epoch, "cursor": self.cursor}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where state was taken. Raises UserError when the data or the seed is another."""
        for name in ("n", "seed"):
            if state[name] != getattr(self, name):
                what = "number of usable rows" if name == "n" else "seed"
                raise UserError(
                    f"the checkpoint was written with {what} {state[name]}, now it is {getattr(self, name)}; "
                    "resume with the same data and config"
                )
        self.epoch, self.cursor = state["epoch"], state["cursor"]
        self._order = self._permutation()


def pack(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices of lengths in bins of at most max_tokens tokens, by first-fit decreasing (Johnson 1973).

    Deterministic: equal lengths keep their order, bins are in the order they were opened. A tree over the bins'
    free space finds the first fit in O(log n). Raises ValueError: a length above max_tokens or below 1.
    """
    n = len(lengths)
    if n and not 1 <= min(lengths) <= max(lengths) <= max_tokens:
        raise ValueError(f"lengths must be in [1, {max_tokens}], found {min(lengths)} to {max(lengths)}")
    leaves = 1 << max(0, n - 1).bit_length()
    free = [max_tokens] * (2 * leaves)  # free[i] is the largest free space among the bins below node i
    bins: list[list[int]] = []
    for index in sorted(range(n), key=lambda i: -lengths[i]):
        node = 1
        while node < leaves:
            node = 2 * node if free[2 * node] >= lengths[index] else 2 * node + 1
        if node - leaves == len(bins):
            bins.append([])
        bins[node - leaves].append(index)
        free[node] -= lengths[index]
        while node > 1:
            node //= 2
            free[node] = max(free[2 * node], free[2 * node + 1])
    return bins


def fit(
    prompt_ids: list[int], response_ids: list[int], max_tokens: int, overlong: str
) -> tuple[list[int], list[int]] | None:
    """The example if it has at most max_tokens ids, else None (overlong "drop") or the reply cut ("truncate").

    A cut reply ends with a token of its own, never with an EOS it did not reach, which would teach to stop there.
    None also where the prompt alone leaves no room for a reply's token: prompts are never cut.
    """
    room = max_tokens - len(prompt_ids)
    if len(response_ids) <= room:
        return prompt_ids, response_ids
    if overlong == "drop" or room < 1:
        return None
    return prompt_ids, response_ids[:room]
