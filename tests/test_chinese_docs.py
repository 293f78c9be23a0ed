"""The Chinese documents say what the English ones say: headings, commands, numbers, names, tables and links."""

from __future__ import annotations

import re
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PAIRS = {"README.md": "README.zh-CN.md"} | {
    f"docs/{name}.md": f"docs/zh/{name}.md" for name in ("label", "data", "options", "api", "ratings")
}
TRANSLATED = {ROOT / english: ROOT / chinese for english, chinese in PAIRS.items()}
ESCAPED = "\0"  # stands for a \| inside a table's cell


class Section(NamedTuple):
    """A heading and what stands below it until the next one.

    text: without the targets of links and without fences, tables included. tables: rows of cells. fences: (language,
    code).
    """

    heading: str
    text: str
    tables: list[list[list[str]]]
    fences: list[tuple[str, str]]
    links: list[Path | str]


def sections(path: Path) -> list[Section]:
    blocks: list[list[str]] = [["", ""]]
    fence = None
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.strip().startswith("```"):
            fence = None if fence else line
        if fence is None and re.match(r"#+ ", line):
            blocks.append([line, ""])
        else:
            blocks[-1][1] += line + "\n"
    return [_section(heading, body, path) for heading, body in blocks]


def _section(heading: str, body: str, path: Path) -> Section:
    fences = [(m[2], re.sub(rf"^{m[1]}", "", m[3], flags=re.MULTILINE)) for m in _FENCE.finditer(body)]
    body = re.sub(r"<!--.*?-->", "", _FENCE.sub("", body), flags=re.DOTALL)
    targets = [t for t in re.findall(r"\]\(([^)]+)\)", body) if not _is_other_language(t)]
    text = re.sub(r"\]\([^)]+\)", "]", body)
    return Section(heading, text, _tables(text), fences, [_target(target, path) for target in targets])


_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)


def _is_other_language(target: str) -> bool:
    in_folder = target.startswith(("zh/", "../")) and target.partition("#")[0].endswith(".md")  # no figure
    return target in ("README.md", "README.zh-CN.md") or in_folder


def _target(target: str, path: Path) -> Path | str:
    """Where a link leads: an address, or the file, in its Chinese form where there is one."""
    if target.startswith("http"):
        return target
    name = (path.parent / target.partition("#")[0]).resolve()
    return TRANSLATED.get(name, name)


def _tables(text: str) -> list[list[list[str]]]:
    tables: list[list[list[str]]] = [[]]
    for line in text.splitlines():
        if line.strip().startswith("|"):
            cells = line.replace("\\|", ESCAPED).strip().strip("|").split("|")
            tables[-1].append([cell.strip() for cell in cells])
        elif tables[-1]:
            tables.append([])
    return [table for table in tables if table]


def numbers(text: str) -> Counter[str]:
    """The figures of a text; what stands within names (fp32, kl_v2) is none of them."""
    return Counter(re.findall(r"(?<![\w.])\d+(?:,\d{3})*(?:\.\d+)*(?:e-?\d+)?", text))


def names(text: str) -> set[str]:
    """What stands in code."""
    return set(re.findall(r"`([^`]+)`", text.replace("\n", " ")))


def without_comments(language: str, code: str) -> str:
    return re.sub(r"[ \t]*#[^\n]*", "", code) if language in ("sh", "python", "yaml") else code


def in_tree(code: str) -> list[str]:
    """The files, folders, options and commands that a drawing names."""
    return re.findall(r"[\w./-]+\.py\b|\w+/|--[\w-]+|`[^`]+`", code)


_CJK = re.compile(r"[\u3400-\u9fff]")


def pairs() -> list[tuple[str, Section, Section]]:
    found = []
    for english, chinese in PAIRS.items():
        both = zip(sections(ROOT / english), sections(ROOT / chinese), strict=False)
        found += [(f"{chinese}: {theirs.heading or 'top'}", ours, theirs) for ours, theirs in both]
    return found


@pytest.mark.parametrize("english", PAIRS)
def test_every_heading_has_its_counterpart(english):
    ours, theirs = ([s.heading for s in sections(ROOT / name)] for name in (english, PAIRS[english]))
    levels = [[heading.partition(" ")[0] for heading in headings] for headings in (ours, theirs)]
    assert levels[0] == levels[1]
    assert [names(heading) for heading in ours] == [names(heading) for heading in theirs]
    untranslated = [heading for heading in theirs if heading and not _CJK.search(heading) and not names(heading)]
    assert len(untranslated) <= 2, untranslated  # "fastrlhf", "compute_metrics"


@pytest.mark.parametrize(("where", "ours", "theirs"), pairs(), ids=[where for where, *_ in pairs()])
def test_a_section_says_the_same(where, ours, theirs):
    assert [language for language, _ in ours.fences] == [language for language, _ in theirs.fences]
    for (language, code), (_, other) in zip(ours.fences, theirs.fences):
        what = in_tree if language == "text" and _CJK.search(other) else partial(without_comments, language)
        assert what(code) == what(other)
    assert names(ours.text) == names(theirs.text)
    assert numbers(ours.text) == numbers(theirs.text)
    assert sorted(map(str, ours.links)) == sorted(map(str, theirs.links))
    assert [[len(row) for row in table] for table in ours.tables] == [[len(r) for r in t] for t in theirs.tables]
    for table, translated in zip(ours.tables, theirs.tables):
        for row, other in zip(table, translated):
            coded = [index for index, cell in enumerate(row) if re.fullmatch(r"`[^`]*`(, `[^`]*`)*", cell)]
            assert [row[i] for i in coded] == [other[i].replace("、", ", ") for i in coded]  # an option, a default


@pytest.mark.parametrize("english", PAIRS)
def test_each_document_leads_to_the_other(english):
    for name, other in ((english, PAIRS[english]), (PAIRS[english], english)):
        targets = re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / name).read_text(encoding="utf-8"))
        files = {(ROOT / name).parent.joinpath(target).resolve() for target in targets}
        assert (ROOT / other).resolve() in files
        assert [file for file in files if not file.exists()] == []


@pytest.mark.parametrize("chinese", PAIRS.values())
def test_anchors_are_there(chinese):
    for target in re.findall(r"\]\((?!https?:)([^)]*#[^)]+)\)", (ROOT / chinese).read_text(encoding="utf-8")):
        name, _, anchor = target.partition("#")
        headings = [s.heading.lstrip("# ").lower() for s in sections((ROOT / chinese).parent / name or ROOT / chinese)]
        assert anchor in [re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in headings]


def test_rows_of_the_same_field_read_the_same_in_every_stage():
    """A translation is written once: where the English rows are equal, the Chinese ones are."""
    seen: dict[str, str] = {}
    for _, ours, theirs in pairs():
        for table, translated in zip(ours.tables, theirs.tables):
            for row, other in zip(table, translated):
                if row[0].startswith("`"):
                    assert seen.setdefault("|".join(row), "|".join(other)) == "|".join(other)


def test_a_missing_option_a_changed_number_and_a_lost_command_are_noticed():
    ours = _section("## A", "`a` 3\n\n```sh\nx  # why\n```\n\n| `b` | 1 \\| 2 |\n|---|---|\n", ROOT / "README.md")
    assert names(ours.text) == {"a", "b"} and numbers(ours.text) == {"3": 1, "1": 1, "2": 1}
    assert ours.tables[0][0] == ["`b`", f"1 {ESCAPED} 2"] and without_comments(*ours.fences[0]) == "x\n"
    assert numbers("fp32, 1.5x, 2,000 and 1e-4.") == {"1.5": 1, "2,000": 1, "1e-4": 1}
