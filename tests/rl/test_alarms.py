"""Alarms that a run is worthless: when each is told, how often, and that a resumed run goes on counting."""

from __future__ import annotations

import html
import json
import math
import random
import re

import pytest
import torch

from fastrlhf import PPOConfig, UserError
from fastrlhf.data.encode import EncodedPrompt
from fastrlhf.data.feedback import Prompt
from fastrlhf.models.reward_folder import HeldOut
from fastrlhf.models.token_batch import TokenRows
from fastrlhf.report import build_report
from fastrlhf.rl.alarms import Alarms, r_squared
from fastrlhf.rollout.result import ScoredRollout, Texts
from fastrlhf.runtime.tracking import Tracker
from tests import tiny
from tests.runs import PROMPTS, leave_after, ppo_trainer, read


class Run:
    """Steps of a run without models: what was told of each."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []
        self.alarms = Alarms(lambda kind, message, alarm, step: self.told.append((alarm, message)))
        self.step = 0

    def see(self, *scores: float | None, group: int = 1, lengths: list[int] | None = None) -> list[str]:
        """-> the alarms of one more step."""
        count, self.step = len(scores), self.step + 1
        ids = [[5] * n for n in lengths or [4] * count]
        texts = Texts(["p"] * count, ["p"] * count, ["r"] * count, {})
        rows, logs = TokenRows([[3]] * count, ids), [torch.zeros(1)] * count
        self.told.clear()
        rollout = ScoredRollout(rows, texts, group, [True] * count, logs, logs, None, {}, list(scores))
        self.alarms.after_scoring(rollout, self.step)
        return [alarm for alarm, _ in self.told]


def test_more_than_half_unscorable_is_told_when_it_begins():
    run = Run()
    assert run.see(1.0, None, 2.0, None) == []
    assert run.see(1.0, None, None, None) == ["unscorable"] and "3 of 4 responses" in run.told[0][1]
    assert run.see(None, None, None, 2.0) == []
    assert run.see(1.0, 2.0, 3.0, None) == []
    assert run.see(1.0, None, None, None) == ["unscorable"]


def test_nothing_scorable_is_an_error():
    run = Run()
    run.see(1.0, 2.0)
    with pytest.raises(UserError, match="None for all 2 responses of step 2"):
        run.see(None, None)
    assert [alarm for alarm, _ in run.told] == ["unscorable"]


def test_rewards_constant_for_three_steps():
    run = Run()
    assert run.see(0.0, 0.0) + run.see(0.0, 0.0) == []
    assert run.see(0.0, 0.0, None) == ["constant_rewards"] and "constant for 3 steps" in run.told[0][1]
    assert run.see(0.0, 0.0) + run.see(0.0, 1.0) + run.see(2.0, 2.0) + run.see(2.0, 2.0) == []
    assert run.see(2.0, 2.0 + 1e-9) == ["constant_rewards"]


def test_steps_of_one_response_are_compared_with_each_other():
    run = Run()
    assert [run.see(float(i)) for i in range(5)] == [[]] * 5
    assert [run.see(4.0) for _ in range(3)] == [[], [], ["constant_rewards"]]


def test_over_half_of_the_groups_without_variance_in_three_steps():
    run = Run()
    flat, half = (1.0, 1.0, 0.0, 0.0, 0.0, 1.0), (1.0, 1.0, 0.0, 1.0)
    assert run.see(*flat, group=2) + run.see(*flat, group=2) == []
    assert run.see(*flat, group=2) == ["flat_groups"] and "2 of 3 prompts" in run.told[0][1]
    assert run.see(*half, group=2) + run.see(*flat, group=2) + run.see(*flat, group=2) == []
    assert [run.see(*flat) for _ in range(4)] == [[]] * 4  # one response to a prompt: there are no groups


def test_length_that_explains_the_reward():
    draw, run = random.Random(0), Run()
    lengths = [draw.randint(1, 90) for _ in range(32)]
    rewards = [n / 10 + draw.random() for n in lengths]
    assert run.see(*rewards, lengths=lengths) == []  # 32 replies are too few
    assert run.see(*rewards, lengths=lengths) == ["length"] and "% of the variance" in run.told[0][1]
    assert run.see(*rewards, lengths=lengths) == []
    noise, other = [draw.random() for _ in range(64)], Run()
    assert other.see(*noise, lengths=[draw.randint(1, 90) for _ in range(64)]) == []
    assert other.see(*noise, lengths=[7] * 64) == []


def test_r_squared_is_the_squared_correlation():
    pairs = [(1.0, 2.0), (2.0, 1.0), (3.0, 5.0), (4.0, 3.5)]
    want = float(torch.corrcoef(torch.tensor(pairs, dtype=torch.float64).T)[0, 1]) ** 2
    assert r_squared(pairs) == pytest.approx(want) and r_squared([(1.0, 1.0)] * 3) == 0.0


def test_held_out_prompts_that_are_trained_on():
    prompts = [EncodedPrompt(Prompt(str(i)), [i, 1]) for i in range(100)]
    heldout = [EncodedPrompt(Prompt(str(i)), [i, 1]) for i in range(95, 115)]
    run = Run()
    run.alarms.compare_prompts(prompts, None)
    run.alarms.compare_prompts(prompts[:96], heldout)  # 1 of 20: 5 % are not more than 5 %
    assert run.told == []
    run.alarms.compare_prompts(prompts, heldout)
    assert [alarm for alarm, _ in run.told] == ["known_prompts"] and "5 of 20 eval_prompts (25%)" in run.told[0][1]


def runaway(run: Run, kl: float, entropy: float | None, **fields: object) -> str | None:
    """-> what ends the run in one more step of replies of 10 tokens, if anything does."""
    run.step += 1
    run.alarms.step = run.step
    metrics = {"kl/ref": kl, "length/mean": 10.0} | ({} if entropy is None else {"policy/entropy": entropy})
    try:
        run.alarms.stop_if_runaway(metrics, PPOConfig(**fields), lambda: "the last checkpoint is X")
    except UserError as error:
        return str(error)
    return None


def test_a_policy_that_runs_away_is_stopped_after_three_steps():
    run = Run()
    assert [runaway(run, kl, 0.2) for kl in (0.0, 31.0, 35.0, 29.0, 35.0, 40.0)] == [None] * 6  # 29: begins anew
    said = runaway(run, 45.0, 0.2)
    assert said.startswith("the policy has run away: kl/ref is 4.5 nats a token (runaway_kl = 3), for 3 steps; stopped")
    assert "after step 7, which is not saved (the last checkpoint is X): lower learning_rate" in said
    assert run.told == [("runaway", said)]
    assert [runaway(Run(), 1e6, 0.2, runaway_kl=None) for _ in range(4)] == [None] * 4


def test_entropy_runs_away_from_that_of_the_first_step():
    """0.2 nats at first: three times that is 0.6, but 1 nat more is 1.2; of 2 nats it is 6."""
    run, high = Run(), Run()
    assert [runaway(run, 0.0, entropy) for entropy in (None, 0.2, 1.1, 1.3, 1.3)] == [None] * 5
    assert "policy/entropy is 1.4 nats, from 0.2 in the first step (runaway_entropy = 3)" in runaway(run, 0.0, 1.4)
    assert [runaway(high, 0.0, entropy) for entropy in (2.0, 5.9, 5.9, 5.9, 5.9)] == [None] * 5
    off = Run()
    assert [runaway(off, 0.0, entropy, runaway_entropy=None) for entropy in (0.2, 9.0, 9.0, 9.0)] == [None] * 4


@pytest.mark.parametrize("form", [{}, {"critic": "shared_trunk"}, {"advantage": "rloo", "samples_per_prompt": 2}])
def test_a_run_that_runs_away_ends_and_its_last_weights_are_not_saved(tmp_path, form):
    t = ppo_trainer(**form, runaway_kl=1e-6, total_steps=9, save_every=2, output_dir=str(tmp_path))
    with pytest.raises(UserError, match=r"the policy has run away: kl/ref is .*the last checkpoint is .*step-0*2"):
        t.train()
    (alarm,) = [event for event in read(tmp_path / "events.jsonl") if event["kind"] == "alarm"]
    assert alarm["alarm"] == "runaway" and alarm["step"] == 4  # kl/ref is 0 in the first step, then three of them
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("step*")) == ["step-000002"]


def flat_groups(run: Run) -> None:
    for _ in range(3):
        run.see(1.0, 1.0, 0.0, 0.0, group=2)


def known_prompts(run: Run) -> None:
    prompts = [EncodedPrompt(Prompt("p"), [1])]
    run.alarms.compare_prompts(prompts, prompts)


def of_length(run: Run) -> None:
    run.see(*map(float, range(64)), lengths=list(range(1, 65)))


ALARMS = {
    "unscorable": (lambda run: run.see(1.0, None, None), "could not judge 2 of 3 responses"),
    "constant_rewards": (lambda run: [run.see(2.0, 2.0) for _ in range(3)], "constant for 3 steps (now 2 for all"),
    "flat_groups": (flat_groups, "2 of 2 prompts have the same reward"),
    "known_prompts": (known_prompts, "1 of 1 eval_prompts (100%) are among the training prompts"),
    "length": (of_length, "explains 100% of the variance of its reward"),
    "reward_model": (
        lambda run: run.alarms.doubt_reward_models({"'rm'": HeldOut(40, 9, 38, accuracy=0.5)}),
        "the reward model 'rm' ranks 50.0% of 38 held-out pairs as people did",
    ),
}


@pytest.mark.parametrize("alarm", ALARMS)
def test_every_alarm_is_a_line_an_event_of_its_step_and_the_first_sentence_of_the_report(alarm, tmp_path, capsys):
    run, (cause, sentence) = Run(), ALARMS[alarm]
    with Tracker(tmp_path, "ppo", 5) as tracker:
        run.alarms = Alarms(tracker.event)
        tracker.log(1, {"reward/mean": 0.5})
        cause(run)
    [event] = read(tmp_path / "events.jsonl")
    assert (event["kind"], event["alarm"], event["step"]) == ("alarm", alarm, run.step)
    assert f"\nalarm: {event['message']}\n" in capsys.readouterr().out and sentence in event["message"]
    first = html.unescape(re.search(r'id="verdict">(.*?)</h1>', build_report(tmp_path).read_text(), re.S)[1])
    assert first.startswith(f"Alarm: {event['message']} (step {run.step}). Reward stayed")


def test_several_alarms_stand_before_what_a_run_claims(tmp_path):
    with Tracker(tmp_path, "ppo", 1, console=False) as tracker:
        tracker.log(1, {"reward/mean": 0.5})
        for alarm, message, step in (("a", "first", 1), ("b", "second", 2), ("a", "again", 3)):
            tracker.event("alarm", message, alarm=alarm, step=step)
    assert 'id="verdict">Alarms: again (step 3); second (step 2). Reward ' in build_report(tmp_path).read_text()


def test_a_reward_model_is_doubted_for_what_its_training_measured():
    run = Run()
    good = HeldOut(40, 9, 38, accuracy=0.6, correlation=0.0)
    run.alarms.doubt_reward_models({"a": None, "b": good, "c": HeldOut(9, 1, correlation=0.4)})
    assert run.told == []
    for record, said in (
        (HeldOut(0), "has no held-out rows"),
        (HeldOut(9), "is not measured on its 9 held-out rows"),
        (HeldOut(9, 1, 9, accuracy=0.59, correlation=0.9), "ranks 59.0% of 9 held-out pairs"),
        (HeldOut(9, 1, correlation=0.3), "gives held-out replies scores that correlate 0.30 with"),
    ):
        run = Run()
        run.alarms.doubt_reward_models({"a": good, "b": record})
        [(alarm, message)] = run.told
        assert alarm == "reward_model" and message.startswith(f"the reward model b {said}")


def test_a_run_writes_its_alarms_and_a_resumed_one_goes_on_counting(tmp_path):
    def run(name: str, **fields: object):
        return ppo_trainer(
            reward=lambda prompts, responses: [1.0] * len(responses),
            eval_prompts=PROMPTS[:1],
            output_dir=str(tmp_path / name),
            total_steps=4,
            save_every=1,
            **fields,
        )

    run("whole").train()
    whole = read(tmp_path / "whole" / "events.jsonl")
    assert [(e["kind"], e["alarm"]) for e in whole] == [("alarm", "known_prompts"), ("alarm", "constant_rewards")]
    leave_after(run("parts"), 2)
    run("parts", resume=True).train()
    assert json.dumps(read(tmp_path / "parts" / "events.jsonl")) == json.dumps(whole)


def mismatches(dtype: torch.dtype, *steps: float) -> list[tuple[str, str]]:
    """What is told of steps with such a mean mismatch."""
    run = Run()
    for mismatch in steps:
        run.alarms.after_learning(mismatch, dtype, lambda: "because")
    return run.told


def test_in_fp32_a_mean_mismatch_above_a_thousandth_of_a_nat_is_an_alarm():
    assert mismatches(torch.float32, 9e-4, 9e-4, math.nan) == []
    ((alarm, message),) = mismatches(torch.float32, 0.0, 1.1e-3, 2e-3)
    assert alarm == "mismatch" and "0.0011 nats apart" in message and message.endswith("because")
    assert len(mismatches(torch.float32, 2e-3, 1e-6, 2e-3)) == 2


def test_in_bf16_three_steps_in_a_row_above_three_times_the_first_are():
    assert mismatches(torch.bfloat16, 0.02, 0.05, 0.05, 0.05, 0.05) == []
    assert mismatches(torch.bfloat16, 0.02, 0.07, 0.07, 0.05, 0.07, 0.07) == []
    ((_, message),) = mismatches(torch.bfloat16, 0.02, 0.07, 0.08, 0.09, 0.09)
    assert "0.09 nats apart" in message and "0.06 for 3 steps" in message
    assert mismatches(torch.bfloat16, 0.0, 2e-3, 2e-3, 2e-3) == []  # three times nothing is no limit


@pytest.mark.parametrize("old", ["recompute", "rollout"])
def test_decoding_that_goes_wrong_in_a_run_is_an_alarm_that_says_so(tmp_path, old):
    """Planted in the second step: the trunk gives another state wherever it reads keys and values of a cache."""
    policy, wrong = tiny.llama(), []

    def spoil(module, args, kwargs, output):
        if wrong and kwargs["use_cache"]:
            output.last_hidden_state = output.last_hidden_state * 0.9

    policy.base_model.register_forward_hook(spoil, with_kwargs=True)
    t = ppo_trainer(policy=policy, output_dir=str(tmp_path / "run"), total_steps=3, old_log_probs=old, advantage="grpo",
                    samples_per_prompt=2)  # fmt: skip
    for step in t:
        assert (step.metrics["rollout/mismatch"] > 1e-3) is bool(wrong)
        wrong.append(1)
    (event,) = [e for e in read(tmp_path / "run" / "events.jsonl") if e["kind"] == "alarm" and e["alarm"] == "mismatch"]
    assert "decoding of LlamaForCausalLM differs from its plain forward by" in event["message"]
    assert "nats at position" in event["message"]


def test_weights_that_change_between_sampling_and_learning_are_an_alarm(tmp_path):
    """Planted in the reward function."""
    policy = tiny.llama()

    def reward(prompts, responses):
        with torch.no_grad():
            policy.lm_head.weight.mul_(1.01)
        return [float(len(r)) for r in responses]

    t = ppo_trainer(policy=policy, reward=reward, output_dir=str(tmp_path / "run"), total_steps=1)
    t.train()
    (event,) = [e for e in read(tmp_path / "run" / "events.jsonl") if e["kind"] == "alarm" and e["alarm"] == "mismatch"]
    assert "agrees with its plain forward" in event["message"] and "does a reward function" in event["message"]
