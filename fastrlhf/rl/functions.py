"""A user's functions (rewards, judges): found by name, called as their arguments ask, their mistakes reported.

An error names the role and the function ("reward function brevity"), the sample, and what was wrong. A function may be
written for this package, or for TRL (completions, **kwargs), verl (compute_score, one sample a call) or OpenRLHF
(queries, prompts, labels); the names of its arguments say which.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import logging
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from fastrlhf.config.calls import NoEnd, Outcome, is_network_error, run, said
from fastrlhf.config.errors import UserError, shown
from fastrlhf.config.inputs import MODELSCOPE
from fastrlhf.config.outcome import outcome

LOG = logging.getLogger(__name__)
# By name a reward function may ask for these, beside its prompts and the columns of the data set.
TOKEN_LISTS = ("response_ids", "completion_ids")
REPLIES = ("responses", "completions", *TOKEN_LISTS)
REWARD_LISTS = ("prompts", "responses")
# Names in the caller's lists that no argument has: prompts as the data has them, prompt and response as one text; and
# an empty mapping for each.
MESSAGES, QUERIES, EMPTY = "@messages", "@queries", "@empty"
LABELS = ("labels", "label", "answer", "answers", "ground_truth", "solution", "reference", "target")
LONGEST_PAUSE = 60.0  # seconds


@dataclass(frozen=True)
class Call:
    """How a function is called. positional: the lists by position; named: by parameter, what it gets; one_by_one: a
    call for each sample, with entries in place of lists."""

    positional: tuple[str, ...]
    named: dict[str, str]
    one_by_one: bool = False


@dataclass(frozen=True)
class UserFunction:
    """what: as errors call it; lists: what it gets by position where its first arguments have names of its own.

    columns: of the data set, beside those of the samples of a call. timeout: seconds of a call, None: any. retries: of
    a call that failed for the network, after `pause` seconds, then twice as long each time.
    """

    what: str
    function: Callable[..., Any]
    lists: tuple[str, ...] = REWARD_LISTS
    columns: frozenset[str] = frozenset()
    timeout: float | None = None
    retries: int = 0
    pause: float = 1.0

    def takes(self, *names: str) -> bool:
        """Whether a parameter has one of these very names."""
        return any(parameter.name in names for parameter in _parameters(self.function))

    def bind(self, columns: Iterable[str], role: str = "the data set") -> Call:
        """How to call it for a data set of these columns. UserError for an argument that would get nothing, or surely
        the wrong thing; role: what it calls the data set."""
        parameters, columns = _parameters(self.function), sorted({*self.columns, *columns})
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        names, takes_rest = {p.name for p in named}, any(p.kind is p.VAR_KEYWORD for p in parameters)
        rest = columns if takes_rest else []
        offered = {name: name for name in (*columns, *self.lists)}
        if self.lists == REWARD_LISTS:
            foreign = self._foreign(names, columns)
            if foreign is not None:
                foreign = self._named(named, offered | foreign, rest, columns, role)
                return Call((), foreign, one_by_one="solution_str" in names)
            offered |= {name: name for name in REPLIES}
        first = [p for p in parameters if p.kind is not p.VAR_KEYWORD][: len(self.lists)]
        sees_replies = bool(names & set(REPLIES)) or (takes_rest and self.lists == REWARD_LISTS)
        if all(p in named and p.name in offered for p in first) and sees_replies and not _is_habit(first):
            if not names & {"responses", "response_ids"}:  # TRL's: messages where the data has them
                offered["prompts"] = MESSAGES
                rest = [*rest, "prompts", "completions", "completion_ids"] if takes_rest else rest
            return Call((), self._named(named, offered, rest, columns, role))
        self._check_positions(parameters, first, columns)
        later = [p for p in named if p not in first]
        return Call(self.lists, self._named(later, offered, [c for c in rest if c not in names], columns, role))

    def _foreign(self, names: set[str], columns: list[str]) -> dict[str, str] | None:
        """What the arguments of verl and of OpenRLHF get, by name; None: the function is written for neither."""
        plural = "s" if "solution_strs" in names else ""
        if f"solution_str{plural}" in names:
            truth = next((c for c in ("ground_truth", "reward_model") if c in columns), None)
            sources = {"solution_str": "responses", "extra_info": "extra_info" if "extra_info" in columns else EMPTY}
            if "data_source" in columns:
                sources["data_source"] = "data_source"
            if truth:
                sources["ground_truth"] = truth if truth == "ground_truth" else "reward_model.ground_truth"
            return {f"{name}{plural}": source for name, source in sources.items()}
        if {"queries", "prompts"} <= names:
            label = next((name for name in LABELS if name in columns), None)
            return {"queries": QUERIES} | ({"labels": label} if label else {})
        return None

    def _named(
        self,
        parameters: list[inspect.Parameter],
        offered: dict[str, str],
        rest: Sequence[str],
        columns: list[str],
        role: str,
    ) -> dict[str, str]:
        """What each of these parameters gets, and, through **kwargs, what none of them asks for."""
        named = {}
        for parameter in parameters:
            if parameter.name in offered:
                named[parameter.name] = offered[parameter.name]
            elif parameter.default is parameter.empty:
                beside = ", ".join(name for name in offered if name not in columns)
                raise UserError(
                    f"{self.what}: its argument {parameter.name!r} is no column of {role}; columns: "
                    f"{', '.join(columns) or 'none'}; beside them it may ask for {beside}"
                )
        return named | {name: offered.get(name, name) for name in rest if name not in named}

    def _check_positions(
        self, parameters: list[inspect.Parameter], first: list[inspect.Parameter], columns: list[str]
    ) -> None:
        """UserError where what a function would get by position contradicts the names of its arguments."""
        if any(p.kind is p.VAR_POSITIONAL for p in first):
            return
        asked, given = [p.name for p in first], ", ".join(self.lists)
        positional = [p for p in first if p.kind is not p.KEYWORD_ONLY]
        if len(positional) < len(self.lists):
            raise UserError(
                f"{self.what}: it takes {', '.join(p.name for p in parameters) or 'no arguments'}, and by position it "
                f"gets ({given}); name its arguments so, or after columns: {', '.join(columns) or 'none'}"
            )
        swapped = _means(asked[0], "responses") or _means(asked[1], "prompts")
        column = asked[1] in columns and not _means(asked[1], "responses")
        if swapped or column:
            raise UserError(
                f"{self.what}: its first arguments are ({', '.join(asked)}), but by position they are ({given}); name "
                f"them prompts, responses or completions; columns: {', '.join(columns) or 'none'}"
            )

    def __call__(self, lists: Mapping[str, list]) -> list[Any]:
        """One entry a sample. lists: by name, an entry a sample each; the function gets copies.

        UserError for an exception of the function (sys.exit too), naming the first sample it also fails on alone, for a
        call without an end, and for a wrong count.
        """
        count = len(lists[self.lists[0]])
        call = self.bind(name for name in lists if not name.startswith("@") and name not in (*REPLIES, *self.lists))
        result, (entries, error), tries = self._attempts(call, lists, range(count))
        if isinstance(error, NoEnd):
            raise UserError(
                f"{self.what}, a batch of {count} samples: no result within reward_timeout = {self.timeout:g} seconds; "
                "raise reward_timeout, or give the calls it waits for a time limit of their own"
            ) from error
        if error is not None:
            sample = None if is_network_error(error) else self._blame(call, lists, count)
            where = f"sample {sample}" if sample is not None else f"a batch of {count} samples"
            again = f" ({tries} tries)" if tries > 1 else ""
            raise UserError(f"{self.what}, {where}: {said(error)}{again}") from error
        if entries is None:
            raise UserError(f"{self.what}: returned {shown(result)}; return a list with a number (or None) a response")
        if len(entries) != count:
            where, returned = f"sample {min(len(entries), count)}", f"returned {len(entries)} scores"
            remedy = "return one number (or None) for each"
            raise UserError(f"{self.what}, {where}: {returned} for {count} responses; {remedy}")
        return entries

    def once(self, *arguments: object) -> Any:
        """Call it with these very arguments -> whatever it returns. UserError for an exception of the function."""
        result, (_, error) = run(lambda: self.function(*arguments), lambda result: result, self.timeout)
        if error is not None:
            raise UserError(f"{self.what}: {said(error)}") from error
        return result

    def number(self, index: int, score: object, token: int | None = None) -> float:
        """`score` as a finite float. index, token: whose it is, for the UserError."""
        where = f"{self.what}, sample {index}" + ("" if token is None else f", token {token}")
        value, error = (None, None) if isinstance(score, (str, bytes)) else outcome(lambda: float(score))
        if value is None:
            raise UserError(f"{where}: {shown(score)} is not a number") from error
        if not math.isfinite(value):
            raise UserError(f"{where}: returned {value}; return None for a response that cannot be judged")
        return value

    def _attempts(self, call: Call, lists: Mapping[str, list], samples: Sequence[int]) -> tuple[Any, Outcome, int]:
        """-> what the last try returned, its entries or error, and the number of tries. Errors of the network are tried
        again."""
        for attempt in range(self.retries + 1):
            result, (entries, error) = self._once(call, lists, samples)
            if error is None or attempt == self.retries or not is_network_error(error):
                return result, (entries, error), attempt + 1
            pause = min(self.pause * 2**attempt, LONGEST_PAUSE)
            LOG.warning("%s: %s; again in %g s", self.what, said(error), pause)
            time.sleep(pause)
        raise AssertionError("unreachable: the last attempt returns")

    def _once(self, call: Call, lists: Mapping[str, list], samples: Sequence[int]) -> tuple[Any, Outcome]:
        """Call it for these samples, with copies: see calls.run. The entries are None where it returned no list."""

        def column(source: str) -> list:
            name, _, leaf = source.partition(".") if source not in lists else (source, "", "")
            if name not in lists:
                return [{} if name == EMPTY else None for _ in samples]
            entries = [_copy(lists[name][i]) for i in samples]
            return [entry.get(leaf) if isinstance(entry, Mapping) else None for entry in entries] if leaf else entries

        positional = [column(name) for name in call.positional]
        named = {name: column(source) for name, source in call.named.items()}

        def work() -> Any:
            if not call.one_by_one:
                return self.function(*positional, **named)
            rows = [{name: entries[i] for name, entries in named.items()} for i in range(len(samples))]
            return [self.function(**row) for row in rows]

        return run(work, lambda result: _entries(result, len(samples)), self.timeout)

    def _blame(self, call: Call, lists: Mapping[str, list], count: int) -> int | None:
        """The first sample the function also fails on alone."""
        return next((i for i in range(count) if self._once(call, lists, [i])[1][1] is not None), None)


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # some builtins do not say
        return list(inspect.signature(lambda *lists: None).parameters.values())


def _means(name: str, what: str) -> bool:
    """Whether an argument's name says that it holds prompts, or responses."""
    stems = {"prompts": ("prompt", "quer"), "responses": ("respons", "completion", "repl", "output", "generat")}
    return name.lower().startswith(stems[what])


def _is_habit(first: list[inspect.Parameter]) -> bool:
    """Whether these are (prompts, response), or output: the policy's by habit, even where a column is called so."""
    names = [p.name for p in first]
    return len(names) > 1 and not {*names} & {*REPLIES} and _means(names[1], "responses")


def _copy(value: Any) -> Any:
    """A copy of lists and mappings, so that a function cannot change the data set."""
    if isinstance(value, dict):
        return {key: _copy(entry) for key, entry in value.items()}
    return [_copy(entry) for entry in value] if isinstance(value, list) else value


def _entries(result: Any, count: int) -> list[Any] | None:
    """What a function returned, as a list; None for what is none. Mappings are those of OpenRLHF and verl."""
    result = _plain(result)
    if hasattr(result, "tolist"):  # tensors (of any device), arrays, series
        shape = getattr(result, "shape", ())
        flat = math.prod(shape) == count and hasattr(result, "reshape")
        result = (result.reshape(-1) if flat else result).tolist()
    if count == 1 and isinstance(result, (int, float)):
        return [result]
    if isinstance(result, (str, bytes, Mapping, set)) or not isinstance(result, Iterable):
        return None
    return [_plain(entry) for entry in result]


def _plain(value: Any) -> Any:
    """The scores of a mapping; anything else as it is."""
    if isinstance(value, Mapping):
        return next((value[name] for name in ("rewards", "scores", "reward", "score") if name in value), value)
    return value


# ------------------------------------------------------------------------------------------------------------ by name


def name_of(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", type(function).__name__)


def is_function_reference(source: object) -> bool:
    """True for `module:function` and `file.py:function`, not for a folder, an id of a hub or `package://...`."""
    if not isinstance(source, str) or "://" in source or source.startswith(MODELSCOPE):
        return False
    return ":" in source and not Path(source).exists()


def check_no_bare_file(source: object, role: str = "reward") -> None:
    """UserError for FILE.py without a function: with those that stand in it."""
    if not isinstance(source, (str, Path)) or not str(source).endswith(".py"):
        return
    path, nodes = Path(source), []
    if not path.is_file():
        raise UserError(f"{role}: the file {str(source)!r} does not exist")
    with suppress(SyntaxError, ValueError):  # which loading it will tell
        nodes = ast.parse(path.read_bytes()).body
    names = [node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    public = ", ".join(name for name in names if name[0] != "_")
    example = f"FILE.py:FUNCTION{public and f' (it has {public})'}"
    raise UserError(f"{role}: {source} is a file; name the function in it: {example}")


def load_function(reference: str, role: str = "reward") -> Callable[..., Any]:
    """`package.module:function` or `path/to/file.py:function`. UserError names the role and what is missing or wrong in
    the file, in a line."""
    where, _, attribute = reference.rpartition(":")
    if where.endswith(".py") and not Path(where).is_file():
        raise UserError(f"{role}: the file {where!r} of {reference!r} does not exist")
    module, error = outcome(lambda: _load_file(where) if where.endswith(".py") else _import(where))
    if error is not None:
        raise UserError(_not_imported(error, where, reference, role)) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise UserError(f"{role}: {where!r} has no function {attribute!r}")
    return function


def _load_file(where: str) -> ModuleType:
    path = Path(where)
    name = f"fastrlhf_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickles of its classes look for it there
    _reach(path.resolve().parent)  # for what lies beside it
    spec.loader.exec_module(module)
    return module


def _import(where: str) -> ModuleType:
    _reach(Path.cwd())
    return importlib.import_module(where)


def _reach(folder: Path) -> None:
    """Let imports find what lies in a folder, behind everything else."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _not_imported(error: BaseException, where: str, reference: str, role: str) -> str:
    if isinstance(error, ModuleNotFoundError) and not where.endswith(".py"):
        return f"{role}: cannot import {where!r} of {reference!r}: {error}"
    here = os.path.abspath(where) if where.endswith(".py") else ""
    if isinstance(error, SyntaxError):
        file = where if error.filename is None or os.path.abspath(error.filename) == here else error.filename
        return f"{role}: cannot load {file}:{error.lineno}: {type(error).__name__}: {error.msg}"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if os.path.abspath(f.filename) == here]
    line = f":{frames[-1].lineno}" if frames else ""
    return f"{role}: cannot load {where}{line}: {said(error).removeprefix('raised ')}"
