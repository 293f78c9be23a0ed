"""Updates that are not finite: the row that costs it, what is left untouched and counted, when a run is given up."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForSequenceClassification

from fastrlhf import PPOConfig, PPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer, UserError
from fastrlhf.data.encode import Example
from fastrlhf.rl.extras import PretrainingMix
from fastrlhf.rollout.result import Rollout
from fastrlhf.runtime.updates import UpdateGuard
from tests import tiny
from tests.runs import experience_of, last_layer, letters, read
from tests.stage_runs import differing, everything, unequal

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


class Told(list):
    """What a guard reports."""

    def __call__(self, kind: str, message: str, **fields: object) -> None:
        self.append((kind, message, fields))


def guard_of(told: Told | None = None) -> UpdateGuard:
    return UpdateGuard(Told() if told is None else told, tiny.tokenizer().decode)


def feed(guard: UpdateGuard, pattern: str, role: str = "policy") -> None:
    """. an applied update, x a skipped one."""
    for mark in pattern:
        guard.record(role, mark == ".", "sum")


@pytest.mark.parametrize(
    "pattern",
    ["x", "xx.xx", "." * 200 + "xx", "x" + "." * 30 + "x" + "." * 30 + "x" + "." * 30 + "x", ("x" + "." * 24) * 20],
)
def test_few_skipped_updates_are_tolerated(pattern):
    """Two in a row, and four among any hundred."""
    told = Told()
    guard = guard_of(told)
    feed(guard, pattern)
    assert guard.skipped == {"policy": pattern.count("x")} and len(told) == pattern.count("x")


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
    guard = guard_of()
    feed(guard, pattern[:-1], "critic")
    with pytest.raises(UserError, match=rf"{sentence} of the critic were not finite; .* lower critic_learning_rate"):
        guard.record("critic", False, "rows")


def test_policy_and_critic_are_counted_apart():
    told = Told()
    guard = guard_of(told)
    for _ in range(2):
        feed(guard, "x")
        feed(guard, "x", "critic")
    assert guard.skipped == {"policy": 2, "critic": 2} and guard.updates_skipped == 4
    assert [fields["role"] for _, _, fields in told] == ["policy", "critic"] * 2
    with pytest.raises(UserError, match="3 of the last 3 updates of the policy were not .* lower learning_rate"):
        feed(guard, "x")


@pytest.mark.parametrize(
    ("cause", "advice"),
    [
        ("weights", "its weights hold NaN or infinity: begin with sound ones, or resume from an older checkpoint"),
        ("rows", "every row of it is: lower critic_learning_rate, or use dtype=fp32"),
        ("sum", "no row of it is by itself, their sum overflows: lower critic_learning_rate"),
    ],
)
def test_the_advice_fits_the_cause(cause, advice):
    told = Told()
    guard_of(told).record("critic", False, cause)
    kind, message, _ = told[0]
    assert kind == "non_finite_update" and "update of the critic skipped" in message and message.endswith(advice)


@pytest.mark.parametrize("cut", range(9))
def test_a_resumed_guard_stops_where_the_uninterrupted_one_does(cut):
    pattern = "x.xx..x.x"
    whole, first, second = guard_of(), guard_of(), guard_of()
    feed(whole, pattern[:-1])
    feed(first, pattern[:cut])
    second.load_state(json.loads(json.dumps(first.state())))
    feed(second, pattern[cut:-1])
    assert second.state() == whole.state() and second.updates_skipped == 4
    with pytest.raises(UserError):
        feed(second, "x")


def test_the_memory_of_a_guard_is_bounded_after_loading_too():
    guard, recent = guard_of(), {"policy": [True] * 4 + [False] * 96}
    guard.load_state({"rows_left_out": 0, "skipped": {"policy": 4}, "recent": recent})
    feed(guard, "....x")
    assert len(guard.recent["policy"]) == 100


def test_what_is_written_of_a_row_is_text_and_ids():
    told, ids = Told(), tiny.tokenizer()("the cat sat", add_special_tokens=False)["input_ids"]
    guard = guard_of(told)
    guard.leave_out([[ids], [ids, ids]], "the step")
    kind, message, fields = told[0]
    assert kind == "non_finite_row" and message.startswith("2 rows left out of the step: NaN or infinity in what the")
    assert fields["rows"][1] == {"texts": ["the cat sat"] * 2, "ids": [ids] * 2} and guard.rows_left_out == 2


# ------------------------------------------------------------------------------------------------- a row that costs it

ALONE = 4  # <|system|>, which one prompt of each data set has
POISONED = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the moon"}]
LENGTHS = ["no", "yes; no", "the answer is yes", "the moon looked at the cat", "谢谢您的提问。请问"]  # all differ
PROMPTS = [tiny.chat(p) for p in ("the cat", "please tell me about the moon", "今天的天气", "thank you, the")]


def poisoned(model: nn.Module, *, backward: bool = False, on: Callable[[], bool] = lambda: True) -> None:
    """Let one token be NaN: in the forward pass, or its gradient alone."""

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        here = (inputs[0] == ALONE)[..., None]
        if not on():
            return None
        if not backward:
            return output.masked_fill(here, math.nan)
        if output.requires_grad:
            output.register_hook(lambda grad: grad.masked_fill(here, math.nan))
        return None

    model.get_input_embeddings().register_forward_hook(hook)


def supervised(stage: str, *, row: bool, **fields: object) -> SFTTrainer | RewardTrainer:
    """A trainer of five rows, or of six with the one that is to be poisoned; all rows are one mini-batch."""
    prompts, replies = [*PROMPTS, tiny.chat("北京")], LENGTHS
    if row:
        prompts, replies = [*prompts, POISONED], [*replies, "the weather in the city is the answer"]
    config, kind = {"sft": (SFTConfig, SFTTrainer), "reward": (RewardConfig, RewardTrainer)}[stage]
    name = "response" if stage == "sft" else "chosen"
    worse = {"rejected": "北"} if stage == "reward" else {}
    data = [{"prompt": p, name: r, **worse} for p, r in zip(prompts, replies, strict=True)]
    fields = {**COMMON, "mini_batch_size": len(data), "total_steps": 2, "eval_fraction": 0.0, **fields}
    return kind(config(**fields), model=tiny.llama(), tokenizer=tiny.tokenizer(), data=data)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "gradient"])
@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_one_nan_costs_its_row_and_nothing_else(stage, backward, tmp_path):
    """Weights, moments and loss are to the bit those of a run that never had the row."""
    whole, run = supervised(stage, row=False), tmp_path / "run"
    t = supervised(stage, row=True, output_dir=str(run))
    if stage == "reward":  # a new head begins from all rows that a run has
        with torch.no_grad():
            whole.model.score.weight.copy_(t.model.score.weight)
    poisoned(t.model, backward=backward)
    losses = [[step.metrics["loss/train"] for step in trainer] for trainer in (t, whole)]
    assert losses[0] == losses[1] and differing(t, whole) == []
    assert t.guard.rows_left_out == 2 and t.guard.updates_skipped == 0
    events = read(run / "events.jsonl")
    events = [e for e in events if e["kind"] != "alarm"]  # nothing is held out, which reward training says at the start
    assert [(e["kind"], e["step"]) for e in events] == [("non_finite_row", 1), ("non_finite_row", 2)]
    assert all("<|system|>be brief" in text for text in events[0]["rows"][0]["texts"])
    assert f"left out of the update of the {t.role}: NaN" in events[0]["message"]
    assert [row["update/left_out"] for row in read(run / "metrics.jsonl")] == [1, 2]


def ppo(**fields: object) -> PPOTrainer:
    sizes = {"rollout_batch_size": 5, "mini_batch_size": 5, "max_new_tokens": 4, "total_steps": 3, "ppo_epochs": 2}
    learning = {"learning_rate": 1e-3, "eval_every": 0}
    if fields.get("advantage", "gae") == "gae":
        learning["critic_learning_rate"] = 1e-3
    inputs = {"reward": fields.pop("reward", letters), "prompts": [*PROMPTS, POISONED]}
    if "ptx_coef" in fields:
        inputs["ptx_data"] = [{"text": text} for text in tiny.TEXTS]
    config = PPOConfig(**{**sizes, **learning, **fields})
    return PPOTrainer(config, policy=tiny.llama(), tokenizer=tiny.tokenizer(), **inputs)


def first_rollout(t: PPOTrainer) -> tuple[Rollout, int]:
    """The rollout of step 1, and its row of the poisoned prompt."""
    rollout = t.rollout(t.prompts, 1, purpose="rollout")
    return rollout, next(i for i, ids in enumerate(rollout.rows.prompt_ids) if ALONE in ids)


FORMS = {
    "separate": {},
    "shared trunk": {"critic": "shared_trunk"},
    "no critic": {"advantage": "reinforce++"},
    "pretraining mix": {"ptx_coef": 1.0},
}


@pytest.mark.parametrize("form", FORMS)
def test_a_nan_in_the_update_of_ppo_costs_its_row(form):
    """The first update drops it, those after it do not have it; policy, critic and moments are as if there was none."""
    weights = []
    for poison in (True, False):
        t = ppo(**FORMS[form])
        rollout, row = first_rollout(t)
        experience, epochs, _ = experience_of(t, rollout)
        if poison:
            for model in {t.policy, t.value_model} - {None}:
                poisoned(model, backward=True)
        else:
            epochs = [[[i for i in mini_batch if i != row] for mini_batch in epoch] for epoch in epochs]
        metrics = t.learner.update(rollout.rows, experience, epochs, 0)
        weights.append((everything(t), metrics, t.guard.state()))
    assert unequal(weights[0][0], weights[1][0]) == [] and weights[0][1] == weights[1][1]
    assert weights[0][2]["rows_left_out"] == 1 and weights[0][2]["skipped"] == {}


def test_a_nan_in_the_pretraining_mix_costs_its_row():
    """The update is that of a mix that never had it."""
    policies = []
    for poison in (True, False):
        t = ppo(ptx_coef=1.0, ppo_epochs=1)
        rollout, row = first_rollout(t)
        experience, epochs, _ = experience_of(t, rollout)
        epochs = [[[i for i in mini_batch if i != row] for mini_batch in epoch] for epoch in epochs]
        if poison:
            ids = rollout.rows.prompt_ids[row]
            bad = Example(ids, [False] + [True] * (len(ids) - 1), "")
            t.learner.ptx = PretrainingMix(t.config, [*t.learner.ptx.examples, bad])
            poisoned(t.policy, backward=True)
        else:
            t.learner.ptx.rows = 4  # all of them, as with the fifth
        metrics = t.learner.update(rollout.rows, experience, epochs, 0)
        assert t.guard.rows_left_out == poison and t.guard.skipped == {}
        policies.append((t.policy.state_dict(), metrics["ptx/loss"]))
    (with_it, loss), (without, same_loss) = policies
    assert loss == pytest.approx(same_loss, rel=1e-5)
    for name, tensor in with_it.items():
        torch.testing.assert_close(tensor, without[name], rtol=1e-4, atol=1e-5)


def test_an_update_without_a_row_of_its_own_left_is_skipped():
    """However many rows of the mix are sound."""
    t = ppo(ptx_coef=1.0, ppo_epochs=1)
    rollout, row = first_rollout(t)
    experience, _, _ = experience_of(t, rollout)
    poisoned(t.policy, backward=True)
    before = {name: tensor.clone() for name, tensor in t.policy.state_dict().items()}
    t.learner.update(rollout.rows, experience, [[[row]]], 0)
    assert t.guard.skipped == {"policy": 1}
    assert all(torch.equal(tensor, before[name]) for name, tensor in t.policy.state_dict().items())


@pytest.mark.parametrize("form", ["separate", "shared trunk", "no critic"])
def test_a_nan_in_the_experience_of_ppo_costs_its_row(form):
    """Advantages are whitened without it: the step is that of a reply which the reward could not judge."""
    seen = []
    for poison in (True, False):
        t = ppo(**FORMS[form])
        rollout, row = first_rollout(t)
        scores = t.scorer(rollout)
        if poison:
            for model in {t.policy, t.value_model} - {None}:
                poisoned(model)
        else:
            scores.values[row] = None
        experience, epochs, metrics = experience_of(t, rollout, scores)
        assert list(experience.left_out) == [row] * poison
        others = [i for i in range(len(rollout.rows)) if i != row]
        if not poison:
            epochs = [[[i for i in mini_batch if i != row] for mini_batch in epoch] for epoch in epochs]
        t.learner.update(rollout.rows, experience, epochs, 0)
        seen.append((everything(t), experience.advantages[others], metrics["reward/mean"], t.guard.rows_left_out))
    assert unequal(seen[0][0], seen[1][0]) == [] and torch.equal(seen[0][1], seen[1][1])
    assert seen[0][2] == seen[1][2] and [count for *_, count in seen] == [1, 0]


def test_a_run_goes_on_around_a_row_that_is_nan_in_one_step(tmp_path):
    """Events carry the step that they are of; a step later the row is learned from again."""
    t = ppo(output_dir=str(tmp_path))
    poisoned(t.policy, on=lambda: t.steps_done == 1)
    steps = [step.metrics for step in t]
    assert [step["update/left_out"] for step in steps] == [0, 1, 1] and steps[-1]["update/skipped"] == 0
    assert all(math.isfinite(value) for step in steps for value in step.values())
    events = [e for e in read(tmp_path / "events.jsonl") if e["kind"] == "non_finite_row"]
    assert [e["step"] for e in events] == [2] and "be brief" in events[0]["rows"][0]["texts"][0]


@pytest.mark.parametrize("huge", [1e30, 1e300])
def test_a_reward_too_large_to_be_squared_costs_its_row(huge):
    """It would be infinite in the whitening and in the critic's loss, so NaN in every row."""

    def reward(prompts: list[str], responses: list[str]) -> list[float]:
        return [huge if "brief" in str(p) else float(len(r)) for p, r in zip(prompts, responses, strict=True)]

    t = ppo(reward=reward)
    steps = [step.metrics for step in t]
    assert steps[-1]["update/left_out"] == 3 and steps[-1]["update/skipped"] == 0
    assert all(math.isfinite(value) for step in steps for value in step.values())
    assert all(bool(p.isfinite().all()) for p in t.policy.parameters())


def test_a_reward_model_that_says_nan_judged_nothing():
    config = tiny.llama().config
    config.num_labels = 1
    t = ppo(reward=LlamaForSequenceClassification(config))
    poisoned(t.scorer.model)
    rollout, row = first_rollout(t)
    assert [value is None for value in t.scorer(rollout).values] == [i == row for i in range(5)]


def test_updates_of_policy_and_critic_that_are_skipped_are_told_apart(tmp_path):
    """Two of each, in turn, end no run."""
    t = ppo(output_dir=str(tmp_path), ppo_epochs=1, total_steps=3)
    for weight in (t.policy.lm_head.weight, last_layer(t).weight):
        weight.register_hook(lambda grad: grad * math.nan if t.steps_done < 2 else grad)
    t.train()
    assert t.guard.skipped == {"critic": 2, "policy": 2}
    events = [e for e in read(tmp_path / "events.jsonl") if e["kind"] == "non_finite_update"]
    assert [(e["step"], e["role"]) for e in events] == [(1, "critic"), (1, "policy"), (2, "critic"), (2, "policy")]
    assert "lower critic_learning_rate, or use dtype=fp32" in events[0]["message"]


def test_rows_that_overflow_only_together_are_not_at_fault():
    t = supervised("sft", row=False, total_steps=1)
    weight, many = t.model.get_input_embeddings().weight, 25  # tokens: more than one row has
    weight.register_hook(lambda grad: grad * 1e30 if grad.any(1).sum() > many else grad)
    step = next(iter(t))
    assert step.metrics["update/skipped"] == 1 and t.guard.rows_left_out == 0


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
    events = [e for e in events if e["kind"] != "alarm"]
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
    assert "its weights hold NaN or infinity" in (tmp_path / "run" / "events.jsonl").read_text()
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert row["loss/train"] is None and row["nonfinite"] == 2


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_three_in_a_row_stop_the_run(stage):
    t = trainer(stage, total_steps=9)
    poison(t)
    before, done = snapshot(t), []
    with pytest.raises(UserError, match="3 of the last 3 updates of the (reward )?model were not finite"):
        for step in t:
            done.append(step)
    assert len(done) == 2 and same(before, snapshot(t))
