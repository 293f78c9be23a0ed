"""bench.learning_speed without TRL: when a side has reached a reward, what is compared, and its own side's process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from bench import learning_speed, learning_speed_ours
from tests import tiny
from tests.runs import reward_trainer, sft_trainer


def points(*rewards: float, seconds: float = 1.0) -> list[dict[str, float]]:
    return [{"step": 2 * i, "seconds": 2 * i * seconds, "reward": r, "kl": 0.5 * i} for i, r in enumerate(rewards)]


def rows_of(seed: int, **sides: list[dict[str, float]]) -> list[dict]:
    return [{"side": side, "seed": seed, "points": made} for side, made in sides.items()]


def test_a_side_is_there_when_the_mean_of_its_last_points_is():
    lucky = points(0, 3, 0, 3, 3, 3)  # means of three: 0 1.5 1 2 2 3
    assert learning_speed.means(lucky) == [0, 1.5, 1, 2, 2, 3]
    assert learning_speed.reached(lucky, 2)["step"] == 6 and learning_speed.reached(lucky, 3)["seconds"] == 10
    assert learning_speed.reached(lucky, 3.1) is None and learning_speed.reached(lucky, -1)["step"] == 0


def test_the_given_reward_is_the_lowest_end_and_seeds_without_all_sides_wait():
    whole = rows_of(
        0, trl=points(0, 2, 4, 4, 4, seconds=2.0), separate=points(0, 2, 3, 3, 3), shared_trunk=points(0, 3, 3, 3, 6)
    )
    found = learning_speed.compared([*whole, *rows_of(1, trl=points(0, 9))])
    assert [f["seed"] for f in found] == [0] and found[0]["given"] == 3
    assert {side: found[0][side]["step"] for side in learning_speed.SIDES} == {
        "trl": 6, "separate": 8, "shared_trunk": 6,
    }  # fmt: skip
    text = learning_speed.table(whole)
    assert "separate: 0.67 of TRL's seconds" in text and "shared_trunk: 0.50 of TRL's seconds" in text
    assert "| 0 | 3.00 | trl | 6 | 12.0 | 1.5 | 2.00 | 4.00 |" in text
    assert "of TRL's seconds" not in learning_speed.table(rows_of(1, trl=points(0, 9)))


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    sft_trainer().save(folder / "sft/final")
    reward_trainer().save(folder / "reward/final")
    return folder


def test_the_judge_reads_each_row_to_its_own_end(models):
    model = AutoModelForSequenceClassification.from_pretrained(models / "reward/final")
    rows = [[5, 6, 7], [8, 9, 10, 11, 12, 13]]
    alone = [float(model(torch.tensor([row])).logits.detach()) for row in rows]
    assert alone[0] != alone[1]
    assert learning_speed.scored(models / "reward/final", rows) == pytest.approx(sum(alone) / 2, abs=1e-5)


@pytest.mark.parametrize("side", sorted(learning_speed_ours.FORMS))
def test_our_side_saves_policies_with_their_seconds(models, tmp_path, capsys, side):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": tiny.chat(f"the cat {i}")}) + "\n" for i in range(4)))
    task = learning_speed.TASK | {"rollout_batch_size": 4, "mini_batch_size": 4, "max_new_tokens": 4}
    spec = {"device": "cpu", "task": task, "steps": 2, "every": 1, "seed": 0, "side": side, "models": str(models)}
    learning_speed_ours.main(spec | {"folder": str(tmp_path / "saved"), "prompts": str(prompts)})
    made = json.loads(capsys.readouterr().out.splitlines()[-1])
    first, second = made["seconds"].values()
    assert list(made["seconds"]) == ["1", "2"] and 0 < first < second and made["versions"]["torch"]
    files = [tmp_path / "saved" / step / "model.safetensors" for step in ("1", "2")]
    assert files[0].read_bytes() != files[1].read_bytes() and (tmp_path / "saved/1/tokenizer_config.json").is_file()
