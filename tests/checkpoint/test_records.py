"""The reader of the files that a run wrote: a damaged line ends nothing and is named."""

from __future__ import annotations

import pytest

from fastrlhf.checkpoint.records import read_records

GOOD = b'{"step": 1, "a": "\xe4\xbd\xa0\xe5\xa5\xbd"}\n'


def read(path, required=None):
    problems = []
    rows = list(read_records(path, problems, required))
    return rows, [problem.removeprefix(f"{path}:") for problem in problems]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"step": 2, "rewa', "is not JSON (Unterminated string starting at character 13)"),
        (b"garbage", "is not JSON (Expecting value at character 1)"),
        (b"\x00\x00\x00\x00", "is not JSON (Expecting value at character 1)"),
        (b"[1, 2]", "is no JSON object but a list"),
        (b"17", "is no JSON object but a int"),
        (b'{"step": 2, "a": "\xff\xfe"}', "is not UTF-8"),
        (b"[" * 100_000, "cannot be read (maximum recursion depth exceeded"),
        (b'{"step": ' + b"1" * 5000 + b"}", "cannot be read (Exceeds the limit"),
    ],
    ids=["torn", "garbage", "zeros", "list", "number", "no UTF-8", "nested", "5000 digits"],
)
@pytest.mark.parametrize("last", [True, False], ids=["as the last line", "in the middle"])
def test_a_damaged_line_is_named_and_the_others_are_read(tmp_path, line, problem, last):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(GOOD + line + (b"" if last else b"\n" + GOOD))
    rows, problems = read(path)
    assert rows == [{"step": 1, "a": "你好"}] * (1 if last else 2)
    assert len(problems) == 1 and problems[0].startswith(f"2: {problem}")


def test_a_row_without_what_its_reader_needs_is_named(tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": "1", "prompt": "p"}\n{"step": 3, "prompt": "p"}\n')
    rows, problems = read(path, {"step": int, "prompt": str})
    assert rows == [{"step": 3, "prompt": "p"}]
    assert problems == ["1: has no str 'prompt'", "2: has no int 'step'"]


@pytest.mark.parametrize("content", [None, b"", b"\n \n"], ids=["missing", "empty", "blank lines"])
def test_a_missing_or_empty_file_has_no_rows_and_no_problems(tmp_path, content):
    path = tmp_path / "events.jsonl"
    if content is not None:
        path.write_bytes(content)
    assert read(path) == ([], [])
