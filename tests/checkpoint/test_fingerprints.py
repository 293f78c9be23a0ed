"""A resumed run proves that it reads what it was started with: data, models, rewards and fields."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from fastrlhf import PPOConfig, PPOTrainer, UserError, cli
from fastrlhf.checkpoint.fingerprints import Fingerprints
from fastrlhf.trainer import Trainer
from tests import tiny
from tests.runs import leave_after
from tests.stage_runs import build

REWARD = "def length(prompts, responses):\n    return [float(len(r)) for r in responses]\n"


@pytest.fixture(scope="module")
def origin(tmp_path_factory) -> Path:
    """What a PPO run reads, by relative paths, and its folder after the first step."""
    root = tmp_path_factory.mktemp("origin") / "place"
    for name in ("model", "judge"):
        tiny.llama().save_pretrained(root / name)
        tiny.tokenizer().save_pretrained(root / name)
    (root / "rows.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in tiny.PROMPTS), encoding="utf-8")
    (root / "rules.py").write_text(REWARD)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        ppo().train()
    return root


@pytest.fixture
def place(origin, tmp_path, monkeypatch) -> Path:
    """A copy of it that may be changed."""
    place = tmp_path / "place"
    shutil.copytree(origin, place)
    monkeypatch.chdir(place)
    return place


def ppo(inputs: dict | None = None, **fields: object) -> PPOTrainer:
    sizes = {"rollout_batch_size": 2, "mini_batch_size": 2, "max_new_tokens": 3, "learning_rate": 1e-3, "ppo_epochs": 1}
    config = PPOConfig(**{"total_steps": 1, "output_dir": "run", "eval_every": 0, **sizes, **fields})
    named = {"policy": "model", "reward": "rules.py:length", "prompts": "rows.jsonl"}
    return PPOTrainer(config, **named | (inputs or {}))


def resumed(inputs: dict | None = None, **fields: object) -> PPOTrainer:
    return ppo(inputs, resume=True, total_steps=2, **fields)


def change_a_row(place: Path) -> None:
    text = (place / "rows.jsonl").read_text(encoding="utf-8")
    (place / "rows.jsonl").write_text(text.replace("the cat", "the dog"), encoding="utf-8")


def change_a_weight(place: Path) -> None:
    weights = load_file(place / "model" / "model.safetensors")
    weights["model.norm.weight"][3] += 1e-3
    save_file(weights, place / "model" / "model.safetensors", {"format": "pt"})


def change_the_reward(place: Path) -> None:
    (place / "rules.py").write_text(REWARD.replace("float(len(r))", "-float(len(r))"))


CHANGES = {"prompts": change_a_row, "policy": change_a_weight, "reward": change_the_reward}


def test_nothing_changed_and_the_paths_are_absolute_in_the_checkpoint(origin, place, capsys):
    state = json.loads((place / "run/checkpoints/step-000001/state.json").read_text())
    paths = {name: path for name, (path, *_) in state["inputs"].items()}
    assert paths == {
        "policy": str(origin / "model"), "reward": str(origin / "rules.py"), "prompts": str(origin / "rows.jsonl"),
        "chat_template": None,
    }  # fmt: skip
    assert all(len(digest) == 64 for _, digest, _ in state["inputs"].values())
    capsys.readouterr()
    assert resumed().steps_done == 1
    said = capsys.readouterr().out
    assert "hashed policy, reward, prompts, chat_template: 0." in said and " MB in 0." in said


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_input_is_refused_and_accepted_by_name(name, place):
    CHANGES[name](place)
    before = {p: p.read_bytes() for p in (place / "run").rglob("*") if p.is_file()}
    with pytest.raises(UserError, match=rf"^{name}: /.* is not what this run was started with") as caught:
        resumed()
    assert str(caught.value).count("this run was started with") == 1
    assert f"--accept-changed {name} " in str(caught.value)
    assert {p: p.read_bytes() for p in (place / "run").rglob("*") if p.is_file()} == before
    t = resumed(accept_changed=[name])
    assert t.steps_done == 1
    t.train()
    assert resumed().steps_done == 2, "what was accepted is what the run goes on with"


def test_all_that_differs_is_one_error_fields_too(place):
    for change in CHANGES.values():
        change(place)
    with pytest.raises(UserError) as caught:
        resumed(kl_coef=0.5, accept_changed=["reward"])
    text = str(caught.value)
    assert "\n" not in text and "--accept-changed policy,prompts,kl_coef " in text
    assert "kl_coef: this run was started with 0.05 and would resume with 0.5" in text
    assert resumed(kl_coef=0.5, accept_changed=["policy", "prompts", "reward", "kl_coef"]).steps_done == 1


def test_an_unknown_name_lists_the_names(place):
    with pytest.raises(
        UserError, match="there is no 'polcy' .*; inputs: chat_template, policy, prompts, reward; fields"
    ):
        resumed(accept_changed=["polcy"])
    with pytest.raises(UserError, match="accept_changed = data: resume = false goes on with no run"):
        ppo(accept_changed=["data"])


def test_a_folder_that_was_moved_is_the_same(origin, place, capsys):
    os.rename(place / "model", place / "elsewhere")
    assert resumed({"policy": "elsewhere"}).steps_done == 1
    said = capsys.readouterr().out
    assert f"policy: {place / 'elsewhere'}, which was {origin / 'model'} then, has the same content" in said
    shutil.copytree(place / "elsewhere", place / "model")
    change_a_weight(place)
    with pytest.raises(UserError, match=r"^policy: /.*model, which was /.*model then, is not what"):
        resumed()


def test_an_input_more_or_less_is_a_difference(place):
    with pytest.raises(UserError, match="^ref_policy: this run was started without and would resume with it"):
        resumed({"ref_policy": "judge"})
    ppo({"ref_policy": "judge"}, output_dir="other").train()
    with pytest.raises(UserError, match="^ref_policy: this run was started with and would resume without it"):
        resumed(output_dir="other")


def test_the_command_line_goes_on_from_any_folder(place, tmp_path, monkeypatch, capsys):
    """What config.yaml names is absolute; a file that changed is refused there too, and accepted by name."""
    ppo(overwrite=True).train()
    run = str(place / "run")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["resume", run]) == 0
    change_the_reward(place)
    assert cli.main(["resume", run]) == 2
    assert "error: reward: " in capsys.readouterr().err
    assert cli.main(["resume", run, "--accept-changed", "reward,prompts"]) == 0
    assert "accept_changed: null" in (place / "run" / "config.yaml").read_text()
    stage = ["ppo", f"{run}/config.yaml", "resume=true", "--accept-changed"]
    assert cli.main([*stage, "nothing"]) == 2 and "there is no 'nothing'" in capsys.readouterr().err


def test_other_rows_that_are_accepted_begin_an_epoch(tmp_path):
    """More or fewer of them."""
    leave_after(build("sft", output_dir=str(tmp_path)), 2)
    rows = [{"prompt": "the cat", "response": " sat"}] * 5
    with pytest.raises(UserError, match="^data: what was given is not what this run was started with"):
        build("sft", output_dir=str(tmp_path), resume=True, inputs={"data": rows})
    t = build("sft", output_dir=str(tmp_path), resume=True, inputs={"data": rows}, accept_changed=["data"])
    assert t.sampler.state() == {"n": 5, "seed": 0, "epoch": 2, "cursor": 0}
    t.train()


# ------------------------------------------------------------------------------------------------------ what is hashed

KINDS = {"model": "model", "data": "data", "reward": "reward"}


def digests(**inputs: object) -> dict[str, str | None]:
    return {name: one.digest for name, one in Fingerprints(inputs, KINDS, {}).result().items()}


def same_twice(make: Callable[[], dict[str, object]]) -> dict[str, str | None]:
    first = digests(**make())
    assert digests(**make()) == first
    return first


def test_models_that_were_loaded_are_compared_by_every_weight():
    def one(seed: int = 0, swap: bool = False, dtype: torch.dtype = torch.float32) -> str:
        model = tiny.llama(seed=seed).to(dtype)
        weight = model.lm_head.weight.data
        if swap:
            weight[0, :2] = weight[0, :2].flip(0)
        return same_twice(lambda: {"model": model})["model"]

    assert len({one(), one(seed=1), one(swap=True), one(dtype=torch.bfloat16)}) == 4


def test_entries_of_a_weighted_list_and_the_base_of_an_adapter(origin, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(origin / "model")}))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    entries = [["short", 1.0, f"{origin}/rules.py:length"], {"name": "good", "weight": 2, "model": str(tmp_path)}]
    found = same_twice(lambda: {"reward": entries})
    assert found.keys() == {"reward", "reward.short", "reward.good", "reward.good.base"} and None not in found.values()
    entries[0][1] = 0.5
    heavier = digests(reward=entries)
    assert [name for name in found if found[name] != heavier[name]] == ["reward"]


def a_reward(prompts: list[str], responses: list[str]) -> list[float]:
    return [0.0] * len(responses)


def test_what_python_hands_over_is_compared_where_it_can_be(origin, tmp_path):
    rows = [{"prompt": "天", "response": "b"}, {"prompt": [{"role": "user", "content": "a"}], "response": "c"}]
    assert same_twice(lambda: {"data": rows})["data"] != digests(data=rows[:1])["data"] is not None
    assert digests(reward=a_reward)["reward"] == digests(reward=partial(a_reward))["reward"] is not None
    line = Fingerprints({"data": iter(rows), "reward": len, "model": "no/such-model"}, KINDS, {}).line()
    assert "not checked at a resume: data (a list_iterator can be read only once), reward (its source is not" in line
    assert "model (from the hub)" in line
    (tmp_path / "two.py").write_text(REWARD + REWARD.replace("length", "other"))
    both = [digests(reward=f"{tmp_path}/two.py:{name}")["reward"] for name in ("length", "other")]
    assert len({*both, None}) == 3, "another function of the same file"
    module = digests(reward="fastrlhf.recipes.rewards:one_short_sentence")
    assert module["reward"] is not None and digests(data=f"{origin}/rows.jsonl:train")["data"] is not None


def test_files_that_no_loader_reads_may_change(origin, tmp_path):
    shutil.copytree(origin / "model", tmp_path / "model")
    before = digests(model=str(tmp_path / "model"))
    (tmp_path / "model" / "README.md").write_text("a card")
    assert digests(model=str(tmp_path / "model")) == before
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ messages }}")
    assert digests(model=str(tmp_path / "model")) != before


def test_a_trainer_without_a_folder_hashes_nothing():
    t: Trainer = build("sft")
    assert t.run_folder.fingerprints is None


def test_a_model_of_the_hub_is_its_revision(tmp_path, monkeypatch):
    """As the cache of the hub has it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    home = tmp_path / "models--ours--tiny"
    for revision in ("a1", "b2"):
        (home / "snapshots" / revision).mkdir(parents=True)
        (home / "snapshots" / revision / "config.json").write_text("{}")
    (home / "refs").mkdir()
    seen = []
    for revision in ("a1", "b2"):
        (home / "refs" / "main").write_text(revision)
        seen.append(digests(model="ours/tiny")["model"])
    assert seen == ["revision a1", "revision b2"]
