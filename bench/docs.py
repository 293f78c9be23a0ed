"""Every number of README.md and docs/*.md has a source: what a command wrote, or a constant of the program.

    python -m bench.docs            writes the generated tables into the documents, between their marks
    python -m bench.docs --check    writes nothing; exit code 1 for a table that differs and a number without a source

A comment before a paragraph, list or table says where its numbers come from; it holds up to the next blank line:

    <!-- numbers: bench/results/critics_cpu.json(runs.rate_ppo, difference.kl_ratio) bench/critics.py -->

Sources are JSON files under bench/results with the keys that are meant, and files of the program. A number has to be,
at the digits that are printed, the value of such a key, in a list of rows also the least, the greatest or the mean of
its values, over all rows or over those that share a name or a seed; where the value is a text, a number of that text. A
file of the program has to hold it as a number or in a comment. `<!-- table: NAME -->` ... `<!-- end -->` is made from
the JSON as a whole, in the Chinese documents too; a test holds their other numbers to the English ones.

These need no source, as they are no figures: what stands in code, there or again in the same paragraph; versions and
names with a digit in them (Python 3.10, bf16, 2-norm); years, dates, numbers of equations, figures, sections, papers
and seeds; whole numbers of one digit that no unit follows; tables of options, fields, metrics and columns, which other
tests hold to the program.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from io import StringIO
from itertools import combinations
from pathlib import Path
from statistics import fmean
from tokenize import COMMENT as COMMENT_TOKEN
from tokenize import generate_tokens
from typing import Any, NamedTuple

from bench import critics, denoise, kinds, label_study, overoptimise, performance, quickstart, ratings_page, scaling
from bench import verdict as recipes

ROOT = Path(__file__).parent.parent.resolve()
RESULTS = ROOT / "bench/results"
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CHINESE = [ROOT / "README.zh-CN.md", *sorted((ROOT / "docs/zh").glob("*.md"))]
COMMENT = re.compile(r"<!--(.*?)-->", re.DOTALL)
MARKED = re.compile(r"\s*numbers:(.*)", re.DOTALL)
SOURCE = re.compile(r"([^\s()]+)(?:\(([^()]*)\))?")
NAMES_IN = ("option", "field", "argument", "metric", "column", "columns", "rows of")  # heads of tables of names
UNITS = re.compile(
    r"[ -]?(%|x\b|m?s\b|us\b|h\b|seconds?|minutes?|hours?|[KMGT]i?B\b|[MB]\b|bytes?|nats?|tokens?/s|points?"
    r"|[GT]B/s|TFLOP/s)"
)
NUMBER = re.compile(r"(?<![\w.,/^-])([-+]?)(\d[\d,]*\d(?:\.\d+)?|\d+(?:\.\d+)?(?:e-?\d+)?)(?!\w*-?[A-Za-z_]\w)")
_MORE = r"(?:(?:,| and|, and| to) \d[\d.]*)*"  # ", 1 and 2"
PLAIN = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e-?\d+)?(?!\w*[A-Za-z_]{2})")  # of texts: "903 passed", "5.12x"
CODE = re.compile(r"(`+)([^`]+?)\1")
NO_FIGURES = [
    re.compile(pattern)
    for pattern in (
        r"\]\([^)]*\)",  # where a link leads
        r"arXiv:\S+|\b\d{4}-\d\d-\d\d\b|\b(?:19[5-9]\d|200[1-9]|20[1-3]\d)\b",
        rf"\b(?:eq|fig|sec|app|[Tt]able|[Ss]ection|[Ff]igure)s?\b\.? [A-Z]?\.?\d[\d.]*{_MORE}",
        r"\b[A-Z][a-z]+ 1[89]\d\d\b",  # an author's year
        rf"\bseeds? \d+{_MORE}|\(\d(?:, \d)+\)",
        r"\b(?:Python|TRL|torch|[Tt]riton|transformers|CUDA|Apache|Tulu) ?-?\d[\d.]*",
        r"^\s*\d+\. ",
    )
]


class Number(NamedTuple):
    """A number as a document prints it. unit: what follows it, "" for none."""

    line: int
    text: str
    value: float
    digits: int  # behind the point
    unit: str


class Source(NamedTuple):
    """A file and, of a JSON, the keys that are meant."""

    path: Path
    keys: tuple[str, ...]


def _blank(match: re.Match[str]) -> str:
    """As many characters and lines, none of them a digit."""
    return re.sub(r"[^\n]", " ", match[0])


class Block(NamedTuple):
    """A paragraph, list or table. first: its first line, from 0. lines: code and comments are blanked. code: what its
    spans of code hold. sources: what the comments before it name."""

    first: int
    lines: list[str]
    code: str
    sources: list[Source]


def blocks(text: str) -> Iterator[Block]:
    """Every block of a document; fenced code and generated tables are none."""
    text = re.sub(r"^( *)```.*?^ *```$", _blank, text, flags=re.DOTALL | re.MULTILINE)
    text = performance.MARK.sub(_blank, text)
    marks = {text.count("\n", 0, found.end()): found[1] for found in COMMENT.finditer(text)}
    text = COMMENT.sub(lambda found: re.sub(r"[^\n]", "\0", found[0]), text)
    blanked, whole = CODE.sub(_blank, text).split("\n"), text.split("\n")
    first = 0
    for last, line in enumerate([*whole, ""]):
        if line.strip():
            continue
        if last > first:
            code = " ".join(found[2] for found in CODE.finditer("\n".join(whole[first:last])))
            comments = [MARKED.match(marks[at]) for at in range(first, last) if at in marks]
            sources = [source for found in comments if found for source in _sources(found[1])]
            yield Block(first, [line.replace("\0", " ") for line in blanked[first:last]], code, sources)
        first = last + 1


def _sources(text: str) -> list[Source]:
    """What a comment names."""
    found = SOURCE.findall(" ".join(text.split()))
    return [Source(ROOT / path, tuple(key.strip() for key in keys.split(",") if key.strip())) for path, keys in found]


def numbers(block: Block) -> list[Number]:
    """The figures of a block."""
    rows = [line for line in block.lines if line.strip()]
    if rows and rows[0].lstrip().startswith("|"):
        head = rows[0].strip().strip("|").split("|")[0].strip()
        if head in NAMES_IN:
            return []
    found = []
    for offset, line in enumerate(block.lines):
        for pattern in NO_FIGURES:
            line = pattern.sub(_blank, line)
        for match in NUMBER.finditer(line):
            unit = UNITS.match(line, match.end())
            text = match[2].replace(",", "")
            value = float(match[1] + text)
            one_digit = re.fullmatch(r"\d", text) and not unit
            if not one_digit:
                digits = len(text.partition(".")[2]) if "e" not in text else 12
                found.append(Number(block.first + offset + 1, match[0], value, digits, unit[1] if unit else ""))
    return found


# ----------------------------------------------------------------------------------------------------- what sources say


def reached(value: Any, path: Sequence[str]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """What lies at a path, through every row of a list on the way -> (the names and seeds of these rows, value)."""
    if isinstance(value, list) and not (value and path and path[0].isdecimal()):
        for row in value:
            fields = row.items() if isinstance(row, dict) else ()
            names = tuple(f"{k}={v}" for k, v in fields if isinstance(v, str) or k.endswith(("seed", "judgements")))
            for more, found in reached(row, path):
                yield (*names, *more), found
    elif not path:
        yield (), value
    elif isinstance(value, dict) and path[0] == "*":
        for name, inner in value.items():
            for more, found in reached(inner, path[1:]):
                yield (f"*={name}", *more), found
    elif isinstance(value, dict) and path[0] in value:
        yield from reached(value[path[0]], path[1:])
    elif isinstance(value, list) and path[0].isdecimal() and int(path[0]) < len(value):
        yield from reached(value[int(path[0])], path[1:])


def measured(path: Path, key: str) -> list[float]:
    """The numbers that a key of a JSON stands for. ValueError where it has none."""
    rows = list(reached(json.loads(path.read_text(encoding="utf-8")), key.split(".")))
    texts = [value for _, value in rows if isinstance(value, str)]
    values = [float(found) for text in (*texts, key.replace("_", " ")) for found in PLAIN.findall(text)]
    figures = [(names, float(value)) for names, value in rows if isinstance(value, (int, float))]
    groups: dict[tuple[str, ...], list[float]] = {(): [value for _, value in figures]}
    for names, value in figures:
        for name in {*((name,) for name in names), *combinations(names, 2), names}:
            groups.setdefault(name, []).append(value)
    for group in filter(None, groups.values()):
        values += [*group, min(group), max(group), fmean(group)]
    if not values:
        raise ValueError(f"{path.relative_to(ROOT)} holds no number at {key}")
    return values


def constants(path: Path) -> list[float]:
    """The numbers of a file of the program and of its comments, with what a product or power makes (64 * 2**20)."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return [float(found) for found in PLAIN.findall(text)]
    told = [token.string for token in generate_tokens(StringIO(text).readline) if token.type == COMMENT_TOKEN]
    values = [float(found) for comment in told for found in PLAIN.findall(comment)]
    for node in ast.walk(ast.parse(text)):
        if (value := _constant(node)) is not None:
            values += [value, -value]  # "0.05 worse" is a bar of -0.05
    return values


def _constant(node: ast.AST) -> float | None:
    """The value of a number, or of a product, power or shift of two; None for all else."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return float(node.value)
    if not isinstance(node, ast.BinOp) or type(node.op) not in MADE_BY:
        return None
    left, right = _constant(node.left), _constant(node.right)
    if left is None or right is None or (abs(right) > 64 and not isinstance(node.op, ast.Mult)):
        return None
    return MADE_BY[type(node.op)](left, right)


MADE_BY = {ast.Mult: float.__mul__, ast.Pow: float.__pow__, ast.LShift: lambda left, right: left * 2**right}

SCALES = {  # of a unit: what a value is multiplied by, to be a number in it
    "%": (1.0, 100.0),
    "KiB": (1.0, 2.0**-10),
    "MiB": (1.0, 2.0**-20),
    "GiB": (1.0, 2.0**-10, 2.0**-30),
    "M": (1.0, 1e-6),
}


def is_one_of(number: Number, values: Iterable[float]) -> bool:
    """Whether a value, in the number's unit and at its digits, is the number."""
    tolerance = 0.5 * 10.0**-number.digits * (1 + 1e-9)
    scaled = (value * scale for value in values for scale in SCALES.get(number.unit, (1.0,)))
    return any(abs(value - number.value) <= tolerance for value in scaled)


def unsourced(document: Path) -> list[str]:
    """What is wrong with a document's numbers, a line each."""
    name, wrong = document.name, []
    for block in blocks(document.read_text(encoding="utf-8")):
        values = [float(found) for found in PLAIN.findall(block.code)]
        for source in block.sources:
            try:
                values += _stated(source)
            except (OSError, ValueError) as error:
                wrong.append(f"{name}:{block.first + 1}: {error}")
        for number in numbers(block):
            if not is_one_of(number, values):
                said = "is not in the sources that the comment before it names" if block.sources else "has no source"
                wrong.append(f"{name}:{number.line}: {f'{number.text} {number.unit}'.strip()} {said}")
    return wrong


REMEDY = (
    "write <!-- numbers: bench/results/FILE.json(KEY, KEY) --> before the paragraph of a number without a source, or "
    "the file of the program whose constant it is; bench/docs.py says how"
)


def _stated(source: Source) -> list[float]:
    """The numbers of a source. OSError or ValueError where it has none."""
    if source.path.suffix == ".json":
        if not source.keys:
            raise ValueError(f"{source.path.name}: name the keys that are meant, {source.path.name}(KEY, KEY)")
        return [value for key in source.keys for value in measured(source.path, key)]
    if source.keys:
        raise ValueError(f"{source.path.name}: keys are of JSON files")
    return constants(source.path)


# ----------------------------------------------------------------------------------------------- tables, and the verb


def _of(name: str, make: Callable[[dict[str, Any]], str]) -> Callable[[], str]:
    """A table from a file of results."""

    def made() -> str:
        found = performance.read(name)
        return make(found) if found and found["runs"] else "Not measured yet."

    return made


def _of_scaling(make: Callable[[list[dict[str, Any]]], str], key: str) -> str:
    """A table of docs/scaling.md."""
    found = performance.read("scaling_cpu.json")
    return make(found[key]) if found else "Not measured yet."


def _of_ratings(number: int) -> str:
    """One of the three tables of docs/ratings.md."""
    return ratings_page.tables(performance.read("ratings_cpu.json")).split("\n\n")[number]


TABLES: dict[str, Callable[[], str]] = {
    **performance.TABLES,
    "critics": _of("critics_cpu.json", lambda found: critics.table(found["runs"], found["difference"])),
    "denoise": _of("denoise_cpu.json", lambda found: denoise.table(found["runs"])),
    "kinds": _of("kinds_cpu.json", lambda found: kinds.table(found["runs"])),
    "labels": _of("label_study.json", lambda found: label_study.table(found["runs"])),
    "label_faults": _of("label_study.json", lambda found: label_study.fault_table(found["runs"])),
    "overoptimisation_in_words": _of("overoptimisation_cpu.json", lambda found: overoptimise.in_words(found["runs"])),
    "overoptimisation": _of("overoptimisation_cpu.json", lambda found: overoptimise.table(found["runs"])),
    "quickstart": _of("quickstart_cpu.json", lambda found: quickstart.table(found["runs"])),
    "quickstart_zh": _of("quickstart_cpu.json", lambda found: quickstart.table(found["runs"], quickstart.IN_CHINESE)),
    "ratings_models": partial(_of_ratings, 0),
    "ratings_ways": partial(_of_ratings, 1),
    "ratings_samples": partial(_of_ratings, 2),
    "scaling": partial(_of_scaling, scaling.table, "rows"),
    "scaling_computed": partial(_of_scaling, scaling.predicted_table, "computed"),
    "verdict": _of("verdict_cpu.json", lambda found: recipes.table(found["runs"], short=False)),
}


def written(text: str) -> str:
    """A document with its tables as the results have them. KeyError for a table that nobody makes."""
    return performance.MARK.sub(lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n\n{found[3]}", text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.docs", description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where something is wrong")
    options = parser.parse_args(arguments)
    wrong = []
    for document in DOCUMENTS + CHINESE:
        before = document.read_text(encoding="utf-8")
        after = written(before)
        if options.check:
            wrong += [f"{document.name}: a table differs from the results; run python -m bench.docs"] * (
                before != after
            )
            wrong += unsourced(document) if document in DOCUMENTS else []
        elif before != after:
            document.write_text(after, encoding="utf-8")
    print(*wrong, sep="\n", end="\n" if wrong else "")
    if options.check:
        print(f"{len(wrong)} found; {REMEDY}" if wrong else "every number has a source")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
