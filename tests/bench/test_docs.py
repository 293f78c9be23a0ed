"""Numbers in documents have sources, and the check that holds them to it fails where one has none."""

from __future__ import annotations

import json

import pytest

from bench import docs, performance


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A root with results and one file of the program; -> a function that writes a document and checks it."""
    (tmp_path / "bench/results").mkdir(parents=True)
    rows = [{"name": "a", "rate": 0.9631, "seconds": 61.0}, {"name": "b", "rate": 0.8872, "seconds": 120.0}]
    figures = {"runs": rows, "said": ["2 failed, 903 passed"], "bytes": 3 * 2**30, "interval_90": [-0.02353, 0.0135]}
    (tmp_path / "bench/results/x.json").write_text(json.dumps(figures))
    (tmp_path / "limits.py").write_text("MOST = 64 * 2**20  # the middle 95 %\nWORST = -0.05\n")
    monkeypatch.setattr(docs, "ROOT", tmp_path)

    def check(text: str) -> list[str]:
        document = tmp_path / "d.md"
        document.write_text(text, encoding="utf-8")
        return docs.unsourced(document)

    return check


def test_every_number_of_the_documents_has_a_source(capsys):
    assert docs.main(["--check"]) == 0, capsys.readouterr().out


X = "<!-- numbers: bench/results/x.json"


@pytest.mark.parametrize(
    "text",
    [
        f"{X}(runs.rate) -->\nRates of 0.963 and 0.89, 96 % and 88.7 %; in the mean 0.925.",
        f"{X}(runs.rate)\n     bench/results/x.json(runs.seconds) -->\n| a | b |\n|---|---|\n| 0.9631 | 61 s |\n",
        f"{X}(said) -->\n- 903 passed,\n- 2 s\n",
        f"{X}(bytes, interval_90) -->\nIt takes 3.00 GiB (90 % interval -0.024 .. +0.0135).",
        "<!-- numbers: limits.py -->\nA row above 64 MiB is refused; 95 % of them, 0.05 at worst.",
        "`max_samples: 1000` reads the first 1000 rows.",
        "`a 17`\n\n```sh\nx --n 44\n```\n\n<!-- table: head_kernels -->\n0.123\n<!-- end -->\n",
        "| option | what |\n|---|---|\n| `a` | 0.55 of 12 rows |\n",
        "Python 3.10, torch 2.11, bf16, 8-bit, 2-norm, H100, k1, seeds 0, 1 and 12, on 2026-11-26; MOSS 2023, eq. 13,",
        "Schulman et al. 2017, sec. 3.12, arXiv:2307.04964 ([figure 11](x_12.md)): [0, 1], 3 of them, exit code 1.",
    ],
)
def test_a_number_with_a_source_and_what_is_no_figure_pass(place, text):
    assert place(text) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("The rate is 0.973.", "d.md:1: 0.973 has no source"),
        ("Faster by 3x, in 6 minutes.", "d.md:1: 3 x has no source"),
        ("| a |\n|---|\n| 41 |", "d.md:3: 41 has no source"),
        (f"{X}(runs.rate) -->\nOne.\n\nThe next paragraph: 0.963.", "d.md:4: 0.963 has no source"),
        (f"{X}(runs.rate) -->\nA rate of 0.964.", "d.md:2: 0.964 is not in the sources"),
        (f"{X}(runs.rate) -->\nA rate of -0.963.", "d.md:2: -0.963 is not in the sources"),
        (f"{X}(runs.rate) -->\n61 s", "d.md:2: 61 s is not in the sources"),
        ("<!-- numbers: limits.py -->\n63 MiB", "d.md:2: 63 MiB is not in the sources"),
        (f"{X} -->\n0.963", "x.json: name the keys"),
        (f"{X}(runs.lost) -->\n0.963", "x.json holds no number at runs.lost"),
        ("<!-- numbers: lost.py -->\n12", "No such file"),
        ("<!-- numbers: limits.py(WORST) -->\n12", "keys are of JSON files"),
        ("<!-- numbers: bench/docs.py -->\n", "No such file"),  # a comment that stands before nothing is read too
    ],
)
def test_a_number_without_a_source_or_with_a_wrong_one_is_named(place, text, said):
    assert any(said in line for line in place(text)), place(text)


def test_a_table_that_differs_from_the_results_is_found_and_written_again(tmp_path, monkeypatch, capsys):
    before = performance.DOCUMENT.read_text(encoding="utf-8")
    document = tmp_path / "performance.md"
    document.write_text(before.replace("| 1.05x |", "| 9.99x |"), encoding="utf-8")
    monkeypatch.setattr(docs, "DOCUMENTS", [document])
    monkeypatch.setattr(docs, "CHINESE", [])
    assert docs.main(["--check"]) == 1
    assert "performance.md: a table differs" in capsys.readouterr().out
    assert docs.main([]) == 0 and document.read_text(encoding="utf-8") == before
