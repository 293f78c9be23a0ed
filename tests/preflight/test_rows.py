"""What is said of the rows: their lengths, and a warning or an end where too many are left out."""

from __future__ import annotations

import json

import pytest

from fastrlhf import RewardConfig, SFTConfig
from fastrlhf.config.errors import UserError
from fastrlhf.preflight.rows import percentiles
from tests import runs, tiny

LONG = {"prompt": tiny.chat("the cat"), "response": tiny.TEXTS[0] * 4}


def rows(long: int, of: int) -> list[dict]:
    return [LONG] * long + [runs.ROWS[0]] * (of - long)


def test_percentiles_are_lengths_that_occur():
    assert percentiles(range(1, 101)) == [10, 50, 90, 99]
    assert percentiles([7]) == [7, 7, 7, 7] and percentiles([1, 9], (50, 51, 100)) == [1, 9, 9]


def test_a_run_says_its_lengths_steps_and_tokens(tmp_path):
    t = runs.sft_trainer(data=rows(0, 8), output_dir=str(tmp_path / "run"), epochs=3, total_steps=None)
    length = len(t.items[0].ids)
    log = (tmp_path / "run" / "log.txt").read_text()
    assert f"data: {8 * length} tokens; a row has 10 %: {length}, 50 %: {length}" in log
    assert f"in all: 6 optimizer steps of 4 rows, {24 * length} tokens" in log
    assert "data: 8 conversations: through the tokenizer's chat template" in log
    assert "output_dir: about " in log and not (tmp_path / "run" / "events.jsonl").read_text()


def test_more_than_a_twentieth_left_out_is_a_warning(tmp_path):
    runs.sft_trainer(data=rows(1, 20), output_dir=str(tmp_path / "few"))
    assert not (tmp_path / "few" / "events.jsonl").read_text()
    runs.sft_trainer(data=rows(2, 20), output_dir=str(tmp_path / "run"))
    event = json.loads((tmp_path / "run" / "events.jsonl").read_text())
    assert event["kind"] == "dropped_rows"
    assert event["message"] == "data: 10% of the rows are left out: 2 longer than max_tokens = 64"


@pytest.mark.parametrize("make", [runs.sft_trainer, runs.reward_trainer, runs.ppo_trainer])
def test_more_than_half_left_out_stops_the_run(make):
    data = [runs.PAIRS[0]] * 4 + [{"prompt": tiny.chat(tiny.TEXTS[0] * 4), "chosen": "a", "rejected": "b"}] * 6
    name, limit = ("prompts", {"max_prompt_tokens": 20}) if make is runs.ppo_trainer else ("data", {})
    with pytest.raises(
        UserError, match=rf"{name}: 60% of the rows are left out: 6 longer than .* allow_drop=0.6 \(now"
    ):
        make(**{name: data}, **limit)
    make(**{name: data}, **limit, allow_drop=0.6)


def test_held_out_rows_count_for_themselves():
    with pytest.raises(UserError, match="eval_data: 100% of the rows|eval_data: 75% of the rows are left out"):
        runs.sft_trainer(eval_data=rows(3, 4))


@pytest.mark.parametrize(("given", "share"), [(True, 1.0), ("true", 1.0), (False, 0.0), ("0.9", 0.9), (0, 0.0)])
def test_allow_drop_is_a_share_or_a_word(given, share):
    assert SFTConfig(allow_drop=given).allow_drop == share


def test_allow_drop_is_a_share():
    with pytest.raises(UserError, match="allow_drop = 2: expected a number >= 0 and <= 1"):
        RewardConfig(allow_drop=2)
