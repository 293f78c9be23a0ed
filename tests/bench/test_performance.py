"""docs/performance.md says what the results say."""

from __future__ import annotations

import json
import re

from bench import performance


def test_the_document_is_as_the_results_have_it(capsys):
    assert performance.main(["--check"]) == 0, capsys.readouterr().out


def test_a_changed_figure_is_found_and_written_again(tmp_path, monkeypatch, capsys):
    before = performance.DOCUMENT.read_text()
    document = tmp_path / "performance.md"
    document.write_text(re.sub(r"\| 1\.05x \|", "| 9.99x |", before))
    monkeypatch.setattr(performance, "DOCUMENT", document)
    assert document.read_text() != before and performance.main(["--check"]) == 1
    assert performance.main([]) == 0 and document.read_text() == before


def test_what_a_gpu_printed_stands_in_the_text():
    printed = json.loads((performance.RESULTS / "h100_printed.json").read_text())
    lines = [line for run in printed["runs"] if "bench.rollout" in run["command"] for line in run["lines"]]
    rows = [re.search(r"bfloat16 +(\d+) fixed +(\d+) tok/s +floor (\S+) .*?(\S+x) generate", line) for line in lines]
    text = performance.DOCUMENT.read_text()
    for row in filter(None, rows):
        batch, rate, floor, ratio = row.groups()
        assert f"| {batch} | {rate} | {ratio.split()[0]} | {floor} |" in text
    assert len(list(filter(None, rows))) == 2 and "903 passed" in json.dumps(printed)
