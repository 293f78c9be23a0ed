"""`compute_metrics`: what a user's function is given, what it may return, and where its numbers go."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from fastrlhf import UserError
from fastrlhf.cli import main
from fastrlhf.eval_metrics import TokenPrediction
from tests import tiny
from tests.runs import PAIRS, ROWS, reward_trainer, sft_trainer

EVAL = {"eval_every": 1, "total_steps": 1, "save_every": 0}


class Kept:
    """A function that keeps what it was called with."""

    def __call__(self, predictions: list, rows: list) -> dict[str, float]:
        self.predictions, self.rows = predictions, rows
        return {"count": len(rows), "mine/eval": torch.tensor(0.5)}


def metrics_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("packing", [False, True])
def test_sft_gives_tokens_the_likeliest_ones_and_log_probs_of_each_row(tmp_path, packing):
    kept, model = Kept(), tiny.llama()
    text = {"text": tiny.TEXTS[0]}
    rows = [*ROWS, text]
    t = sft_trainer(
        model=model, eval_data=rows, compute_metrics=kept, packing=packing, output_dir=str(tmp_path / "r"), **EVAL
    )
    t.train()
    step0, step1 = metrics_of(tmp_path / "r")
    assert step0["count"] == step1["count"] == 7 and step1["mine/eval"] == 0.5
    said = [[*row["prompt"], {"role": "assistant", "content": row["response"]}] for row in ROWS]
    assert [row.get("messages") for row in kept.rows] == [*said, None] and kept.rows[-1]["text"] == text["text"]
    total = 0.0
    for example, (tokens, predicted, log_probs) in zip(t.eval_examples, kept.predictions, strict=True):
        logits = model(torch.tensor([example.ids])).logits[0, :-1].float()
        places = [i - 1 for i, learnt in enumerate(example.target) if learnt]
        assert tokens == [example.ids[i + 1] for i in places]
        assert predicted == logits[places].argmax(-1).tolist()
        want = logits.log_softmax(-1)[places, tokens]
        assert log_probs == pytest.approx(want.tolist(), abs=1e-4)
        total -= sum(log_probs)
    count = sum(len(p.tokens) for p in kept.predictions)
    assert isinstance(kept.predictions[0], TokenPrediction) and step1["loss/eval"] == pytest.approx(total / count)


def test_a_reward_model_gives_the_scores_of_each_response(tmp_path):
    kept = Kept()
    ranked = {"prompt": tiny.chat("北京"), "responses": ["a", "bb", "ccc"], "ranking": [2, [0, 1]]}
    scored = {"prompt": tiny.chat("the cat"), "response": "yes", "score": 4}
    t = reward_trainer(eval_data=[*PAIRS, ranked, scored], compute_metrics=kept, output_dir=str(tmp_path / "r"), **EVAL)
    t.train()
    assert [len(scores) for scores in kept.predictions] == [2] * 6 + [3, 1]
    assert kept.rows[0]["responses"] == [PAIRS[0]["chosen"], PAIRS[0]["rejected"]]
    assert kept.rows[6]["ranking"] == [[2], [0, 1]] and kept.rows[7]["scores"] == [0.5]
    right = [s[0] > s[1] for s in kept.predictions[:6]]
    right += [kept.predictions[6][2] > s for s in kept.predictions[6][:2]]
    assert metrics_of(tmp_path / "r")[-1]["accuracy/eval"] == pytest.approx(sum(right) / 8)


@pytest.mark.parametrize("trainer", [sft_trainer, reward_trainer])
def test_it_changes_no_other_number(tmp_path, trainer):
    rows = ROWS if trainer is sft_trainer else PAIRS
    runs = []
    for name, function in (("with", lambda p, r: {"n": 1}), ("without", None)):
        trainer(eval_data=rows, compute_metrics=function, output_dir=str(tmp_path / name), **EVAL).train()
        runs.append(metrics_of(tmp_path / name))
    assert [{k: v for k, v in row.items() if k != "n"} for row in runs[0]] == runs[1]


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ({"a": math.nan}, "'a' is nan; expected a finite number"),
        ({"a": math.inf}, "'a' is inf; expected a finite number"),
        ({"a": None}, "'a' is None; expected a finite number"),
        ({"a": "0.5"}, "'a' is '0.5'; expected a finite number"),
        ({"a": torch.ones(2)}, "'a' is tensor(*expected a finite number"),
        ({"loss/eval": 1.0}, "'loss/eval', a metric of that name is there"),
        ({"step": 1.0}, "'step', a metric of that name is there"),
        ({3: 1.0}, "returned the name 3"),
        ([1.0], "return a mapping of names to numbers"),
        (None, "returned None; return a mapping"),
    ],
)
def test_what_is_no_mapping_to_numbers_is_named(returned, said):
    def figures(predictions, rows):
        return returned

    t = sft_trainer(eval_data=ROWS, compute_metrics=figures, **EVAL)
    with pytest.raises(UserError) as caught:
        t.train()
    text = str(caught.value)
    assert text.startswith("compute_metrics figures: ") and all(part in text for part in said.split("*"))


def test_an_exception_of_the_function_is_one_sentence():
    def figures(predictions, rows):
        return {"a": rows[99]}

    with pytest.raises(UserError, match=r"compute_metrics figures: .*IndexError"):
        sft_trainer(eval_data=ROWS, compute_metrics=figures, **EVAL).train()


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"compute_metrics": 3, "eval_data": ROWS}, "3 is neither a function nor"),
        ({"compute_metrics": lambda p: {}, "eval_data": ROWS}, r"is called with \(predictions, rows\)"),
        ({"compute_metrics": lambda p, r: {}}, "give eval_data, or eval_fraction"),
        ({"compute_metrics": lambda p, r: {}, "eval_data": ROWS, "eval_every": 0}, "set eval_every above 0"),
        ({"compute_metrics": "none.py:f", "eval_data": ROWS}, "compute_metrics: the file 'none.py'"),
    ],
)
def test_what_could_not_be_called_is_refused_before_training(inputs, said):
    with pytest.raises(UserError, match=said):
        sft_trainer(**{**EVAL, **inputs})


def test_a_recipe_names_a_function_of_a_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny.llama().save_pretrained("m")
    tiny.tokenizer().save_pretrained("m")
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    Path("mine.py").write_text("def figures(predictions, rows):\n    return {'rows': len(rows)}\n")
    fields = ["model=m", "data=rows.jsonl", "eval_data=rows.jsonl", "output_dir=r", "eval_every=1", "max_tokens=64"]
    fields += ["total_steps=1", "compute_metrics=mine.py:figures"]
    assert main(["sft", *fields, "--dry-run"]) == 0 and main(["sft", *fields]) == 0
    assert metrics_of(Path("r"))[-1]["rows"] == 6
    again = [*fields[:-1], "compute_metrics=mine.py:nothing", "output_dir=r2"]
    assert main(["sft", *again, "--dry-run"]) == 2
    assert "has no function 'nothing'" in capsys.readouterr().err
