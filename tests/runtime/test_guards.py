"""Skipped updates: what is left untouched, what is counted, when a run is given up; rows no model could read."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastrlhf import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer, UserError
from fastrlhf.runtime.guards import UpdateGuard
from tests import tiny

COMMON = {"mini_batch_size": 4, "learning_rate": 1e-3, "eval_every": 0, "lr_schedule": "constant"}
ROWS = {
    "sft": [{"prompt": tiny.chat(p), "response": "yes"} for p in tiny.PROMPTS],
    "reward": [{"prompt": tiny.chat(p), "chosen": "yes", "rejected": "no"} for p in tiny.PROMPTS],
}


def trainer(stage: str, **fields: object) -> SFTTrainer | RewardTrainer:
    config, kind = {"sft": (SFTConfig, SFTTrainer), "reward": (RewardConfig, RewardTrainer)}[stage]
    fields = {**COMMON, "eval_fraction": 0.0, **fields}
    return kind(config(**fields), model=tiny.llama(), tokenizer=tiny.tokenizer(), data=ROWS[stage])


def poison(t: SFTTrainer | RewardTrainer, when: Callable[[], bool] = lambda: True) -> None:
    """Let the gradient of the embedding be NaN."""
    weight = t.model.get_input_embeddings().weight
    weight.register_hook(lambda grad: grad * math.nan if when() else grad)


def snapshot(t: SFTTrainer | RewardTrainer) -> list[Tensor]:
    """Weights, moments and step counts."""
    moments = [value for state in t.optimizer.inner.state.values() for value in state.values()]
    return [x.detach().clone() for x in [*t.model.parameters(), *moments]]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# --------------------------------------------------------------------------------------------------------- UpdateGuard


def feed(guard: UpdateGuard, pattern: str) -> list[str | None]:
    """. an applied update, x a skipped one."""
    return [guard.record(mark == ".", "policy") for mark in pattern]


@pytest.mark.parametrize(
    "pattern",
    ["x", "xx.xx", "." * 200 + "xx", "x" + "." * 30 + "x" + "." * 30 + "x" + "." * 30 + "x", ("x" + "." * 24) * 20],
)
def test_few_skipped_updates_are_tolerated(pattern):
    """Two in a row, and four among any hundred."""
    guard = UpdateGuard()
    said = feed(guard, pattern)
    assert guard.skipped == pattern.count("x")
    assert [s is not None for s in said] == [mark == "x" for mark in pattern]


@pytest.mark.parametrize(
    ("pattern", "sentence"),
    [
        ("xxx", "3 of the last 3 updates"),
        ("..xx.xxx", "5 of the last 8 updates"),
        ("....xxx", "3 of the last 7 updates"),
        ("x.x.x.x.x", "5 of the last 9 updates"),
        ("." * 500 + ("x" + "." * 23) * 4 + "x", "5 of the last 100 updates"),
    ],
)
def test_too_many_skipped_updates_stop_the_run_at_the_last_one(pattern, sentence):
    guard = UpdateGuard()
    feed(guard, pattern[:-1])
    with pytest.raises(UserError, match=rf"{sentence} were not finite \(last: critic\); lower learning_rate"):
        guard.record(False, "critic")


def test_the_sentence_names_what_was_skipped():
    assert "update of the critic skipped" in UpdateGuard().record(False, "critic")


@pytest.mark.parametrize("cut", range(9))
def test_a_resumed_guard_stops_where_the_uninterrupted_one_does(cut):
    pattern = "x.xx..x.x"
    whole, first, second = UpdateGuard(), UpdateGuard(), UpdateGuard()
    feed(whole, pattern[:-1])
    feed(first, pattern[:cut])
    second.load_state(json.loads(json.dumps(first.state())))
    feed(second, pattern[cut:-1])
    assert second.state() == whole.state() and second.skipped == 4
    with pytest.raises(UserError):
        second.record(False, "policy")


def test_the_memory_of_a_guard_is_bounded_after_loading_too():
    guard = UpdateGuard()
    guard.load_state({"skipped": 4, "recent": [True] * 4 + [False] * 96})
    feed(guard, "." * 4)
    assert len(guard.recent) == 100 and feed(guard, "x") != [None]


# ------------------------------------------------------------------------------------------------------- in a trainer


@pytest.mark.parametrize("stage", ["sft", "reward"])
@pytest.mark.parametrize("micro_batch_tokens", [None, 1])
def test_a_non_finite_update_changes_nothing_and_is_written_down(stage, micro_batch_tokens, tmp_path):
    """Weights, moments and step count are bit for bit those of before, and the next update is as if none had been."""
    t = trainer(stage, total_steps=3, micro_batch_tokens=micro_batch_tokens, output_dir=str(tmp_path / "run"))
    poison(t, lambda: t.steps_done == 1)
    steps = iter(t)
    next(steps)
    before = snapshot(t)
    skipped = next(steps)
    assert same(before, snapshot(t))
    assert skipped.metrics["update/skipped"] == 1 and math.isnan(skipped.metrics["grad_norm"])
    assert all(p.grad is None for p in t.model.parameters())
    last = next(steps)
    assert not same(before, snapshot(t))
    assert last.metrics["update/skipped"] == 1 and math.isfinite(last.metrics["grad_norm"])
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [(e["kind"], e["step"]) for e in events] == [("non_finite_update", 2)]
    assert "weights and moments are unchanged" in events[0]["message"]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["grad_norm"] is None for r in rows] == [False, True, False] and rows[1]["nonfinite"] == 1


def test_a_non_finite_loss_is_skipped_and_never_hidden(tmp_path):
    """A weight that is infinite: the loss itself is NaN, and the file says null, not 0."""
    t = trainer("sft", total_steps=2, output_dir=str(tmp_path / "run"))
    with torch.no_grad():
        t.model.lm_head.weight[7, 0] = math.inf
    before = snapshot(t)
    step = next(iter(t))
    assert not math.isfinite(step.metrics["loss/train"]) and same(before, snapshot(t))
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert row["loss/train"] is None and row["nonfinite"] == 2


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_three_in_a_row_stop_the_run(stage):
    t = trainer(stage, total_steps=9)
    poison(t)
    before, done = snapshot(t), []
    with pytest.raises(UserError, match="3 of the last 3 updates were not finite"):
        for step in t:
            done.append(step)
    assert len(done) == 2 and same(before, snapshot(t))
