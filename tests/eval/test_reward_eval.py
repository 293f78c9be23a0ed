"""`fastrlhf reward-eval` end to end on a tiny reward model: what is printed is in the JSON, and mistakes are a line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from fastrlhf import cli
from fastrlhf.agreement.words import first_sentence
from fastrlhf.inference import score
from tests import tiny
from tests.reward_runs import MIXED, PAIR, RANKING, SCORE

ROOT = Path(__file__).parents[2]
ROWS = [
    *(row | {"annotator": "ann" if n % 2 else "bob", "source": f"set {n % 2}"} for n, row in enumerate(MIXED)),
    PAIR | {"chosen": "no", "rejected": "the answer is yes", "annotator": "bob", "source": "set 1"},
]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("reward_eval")
    torch.manual_seed(1)
    LlamaForSequenceClassification(LlamaConfig(**tiny.SHAPE, num_labels=1)).save_pretrained(root / "rm")
    tiny.llama().save_pretrained(root / "policy")
    broken = LlamaForSequenceClassification(LlamaConfig(**tiny.SHAPE, num_labels=1))
    torch.nn.init.constant_(broken.score.weight, float("nan"))
    broken.save_pretrained(root / "broken")
    for name in ("rm", "policy", "broken"):
        tiny.tokenizer().save_pretrained(root / name)
    write(root / "rows.jsonl", ROWS)
    return root


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def run(workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)

    def command(*arguments: object) -> tuple[int, str, str]:
        code = cli.main(["reward-eval", *map(str, arguments)])
        out, err = capsys.readouterr()
        return code, out, err

    return command


def test_the_figures_are_of_the_model_s_own_scores(run, workplace):
    code, out, err = run("rm", "rows.jsonl", "--json", "found.json", "--overwrite")
    assert code == 0, err
    report = json.loads((workplace / "found.json").read_text(encoding="utf-8"))
    assert (report["model"], report["data"], report["records"]) == ("rm", "rows.jsonl", len(ROWS))
    ordered = [
        (PAIR["prompt"], row["chosen"], row["rejected"])
        for row in ROWS
        if row.get("prompt") == PAIR["prompt"] and "chosen" in row
    ]
    better = score("rm", [p for p, *_ in ordered], [b for _, b, _ in ordered])
    worse = score("rm", [p for p, *_ in ordered], [w for *_, w in ordered])
    assert sum(a > b for a, b in zip(better, worse)) == 1  # two judgements of a prompt, one the other turned round
    kinds = report["by"]["kind"]
    assert {kind: group["pairs"] for kind, group in kinds.items()} == {"edit": 1, "pair": 3, "ranking": 5, "score": 3}
    assert set(report["by"]["annotator"]) == {"ann", "bob"} and set(report["by"]["source"]) == {"set 0", "set 1"}
    assert f"{report['pairs']['accuracy']:.1%}" in out.splitlines()[1] and "of 12 pairs" in out
    for name, group in report["by"]["annotator"].items():
        assert any(
            line.startswith(f"  annotator: {name}") and f"{group['accuracy']:.1%}" in line for line in out.splitlines()
        )
    assert report["with_scores"]["replies"] == 4 and "correlation with people's scores (4 replies)" in out
    assert "7 rows read, 7 used" in err


def test_other_names_of_columns_and_another_scale_are_read(run, workplace):
    renamed = [
        {"q": "the cat", "response": text, "score": value} for text, value in (("yes", 10), ("no", 0), ("ok", 4))
    ]
    write(workplace / "other.jsonl", renamed)
    code, out, err = run("rm", "other.jsonl", "--columns", "{prompt: q}", "--score-range", "0,10")
    assert code == 0 and "correlation with people's scores (3 replies)" in out, err


def test_the_sentence_in_the_docs_is_the_kept_report_s():
    report = json.loads((ROOT / "bench/results/reward_eval_cpu.json").read_text(encoding="utf-8"))
    assert first_sentence(report) in (ROOT / "docs/eval.md").read_text(encoding="utf-8")


def test_every_option_stands_in_the_docs(run):
    _, out, _ = run("--help")
    page = (ROOT / "docs/eval.md").read_text(encoding="utf-8").partition("`fastrlhf reward-eval`")[2]
    options = set(re.findall(r"--[a-z-]+", out)) - {"--help", "--debug"}
    assert len(options) >= 9 and [option for option in options if f"`{option}`" not in page] == []


@pytest.mark.parametrize(
    ("arguments", "rows", "expected"),
    [
        (("policy", "rows.jsonl"), None, "FOLDER: 'policy' is no reward model (one score a text); train one"),
        (
            ("rm", "same.jsonl"),
            [SCORE, SCORE | {"response": "x"}],
            "no row orders two replies, and all 2 rows give the same",
        ),
        (("broken", "rows.jsonl"), None, "FOLDER: 'broken' gives rows.jsonl:1 a score that is not finite"),
        (("rm", "same.jsonl", "--score-range", "5,1"), [SCORE], "score_range = 5,1: the lowest score must be below"),
        (("rm", "none.jsonl"), None, "DATA: "),
        (("rm", "rows.jsonl", "--train", "none.jsonl"), None, "--train: "),
        (("rm", "rows.jsonl", "--json", "rows.jsonl"), None, "--json: rows.jsonl exists"),
        (("rm", "same.jsonl"), [RANKING, RANKING | {"ranking": [9]}], 'same.jsonl:2: field "ranking" must name each'),
        (("rm", "same.jsonl"), [PAIR | {"chosen": "yes " * 3000}], "same.jsonl:1: prompt and reply have"),
    ],
)
def test_mistakes_are_one_line(run, workplace, arguments, rows, expected):
    if rows is not None:
        write(workplace / "same.jsonl", rows)
    code, out, err = run(*arguments)
    assert code == 2 and expected in err and "Traceback" not in err
    assert len([line for line in err.splitlines() if "error" in line.lower() or expected in line]) == 1
