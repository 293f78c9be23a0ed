"""Evaluation on held-out prompts: quantiles, win rates against the SFT model, the best-of-n curve."""

from __future__ import annotations

import itertools
import json
import math
import random
from functools import partial

import numpy
import pytest
import torch

from fastrlhf import PPOConfig, RolloutEngine, SamplingParams, UserError
from fastrlhf.data.templates import stop_token_ids
from fastrlhf.preflight.dry_run import check_inputs
from fastrlhf.report import build_report
from fastrlhf.report.folder import StageRun, best_of_n
from fastrlhf.rl.evaluation import best_of_n_curve, expected_best, quantile, win_rate
from fastrlhf.runtime.batching import derive_seed
from tests import tiny
from tests.runs import PROMPTS, leave_after, letters, ppo_trainer, read, same, weights

HELD_OUT = [{"prompt": p, "wish": f"wish {i}"} for i, p in enumerate(PROMPTS[:4])]
LEARNING = {"learning_rate": 2e-2, "critic_learning_rate": 1e-3, "ppo_epochs": 2, "mini_batch_size": 8}
trainer = partial(ppo_trainer, **LEARNING, total_steps=3, eval_every=1, save_every=1, eval_prompts=HELD_OUT)


# ------------------------------------------------------------------------------------------------------------ formulas


def test_quantiles_are_numpys():
    values = [float(v) for v in numpy.random.default_rng(0).normal(size=37)]
    for q in (0.1, 0.5, 0.9):
        assert quantile(values, q) == pytest.approx(float(numpy.quantile(values, q)), rel=1e-12)
    assert quantile([2.0], 0.1) == 2.0 and math.isnan(quantile([], 0.5))


def test_ties_are_half_a_win_and_unscorable_prompts_count_not():
    assert win_rate([1.0, 2.0, 3.0, None, 5.0], [0.0, 2.0, 4.0, 0.0, None]) == 0.5
    assert win_rate([1.0, 1.0], [0.0, 1.0]) == 0.75
    assert math.isnan(win_rate([None], [1.0]))


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_the_expected_best_is_the_mean_over_all_subsets(n):
    scores = [0.3, -1.0, 2.5, 2.5, 0.0, 7.0, -4.0]
    subsets = list(itertools.combinations(scores, n))
    assert expected_best(scores, n) == pytest.approx(sum(map(max, subsets)) / len(subsets), rel=1e-12)
    assert expected_best(list(range(2000)), 1000) == pytest.approx(1000 * 2001 / 1001 - 1)


def test_the_kl_of_best_of_n_is_that_of_the_maximum_of_n_uniforms():
    """Density n u^(n-1) against 1 on [0, 1]: the integral of n u^(n-1) log(n u^(n-1)), by the midpoint rule."""
    curve = best_of_n_curve([[0.0] * 8], 8)
    assert [row["n"] for row in curve] == [1, 2, 4, 8] and curve[0]["kl"] == 0.0
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    for row in curve:
        density = row["n"] * u ** (row["n"] - 1)
        assert row["kl"] == pytest.approx(float((density * density.log()).mean()), abs=1e-6)


def test_the_curve_is_a_mean_over_prompts_with_enough_samples():
    curve = best_of_n_curve([[1.0, 2.0, None, 3.0], [None, None, 5.0, None]], 6)
    assert [row["n"] for row in curve] == [1, 2, 4]
    assert [row["reward"] for row in curve[:2]] == pytest.approx([(2 + 5) / 2, (2 + 3 + 3) / 3])
    assert math.isnan(curve[2]["reward"])


# ------------------------------------------------------------------------------------------------------------- a run


def test_the_sft_model_ties_with_itself_and_the_metrics_are_those_of_its_replies(tmp_path):
    t = trainer(output_dir=str(tmp_path / "run"), total_steps=2)
    prompts = [ids for _, ids in t.eval_prompts]
    t.train()
    first, *_, last = read(tmp_path / "run" / "metrics.jsonl")
    assert first["step"] == 0 and first["win_rate/reward"] == 0.5
    params = sampling(t)
    out = RolloutEngine(tiny.llama(), t.tokenizer).generate(prompts, params)
    replies = [t.tokenizer.decode(ids, skip_special_tokens=True) for ids in out.response_ids]
    scores = letters(None, replies)
    assert t.evaluation.baseline.responses == replies and t.evaluation.baseline.scores == scores
    for name, want in (("reward/eval", numpy.mean(scores)), ("reward/eval_p10", numpy.quantile(scores, 0.1)),
                       ("reward/eval_p50", numpy.median(scores)), ("reward/eval_p90", numpy.quantile(scores, 0.9)),
                       ("length/eval", numpy.mean([len(ids) for ids in out.response_ids]))):  # fmt: skip
        assert first[name] == pytest.approx(float(want))
    now = [row["score"] for row in read(tmp_path / "run" / "samples.jsonl") if row["step"] == 2]
    assert len(now) == 4 and last["win_rate/reward"] == win_rate(now, scores)


def sampling(t, temperature: float = 1.0) -> SamplingParams:
    """How replies to eval_prompts are sampled."""
    stops = stop_token_ids(t.tokenizer, t.policy.generation_config)
    return SamplingParams(10, temperature=temperature, stop_token_ids=stops, seed=derive_seed(0, "eval", 0))


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_evaluation_has_a_temperature_of_its_own(temperature):
    t = trainer(total_steps=1, eval_temperature=temperature)
    t.evaluate()
    out = t.engine.generate([ids for _, ids in t.eval_prompts], sampling(t, temperature))
    replies = [t.tokenizer.decode(ids, skip_special_tokens=True) for ids in out.response_ids]
    assert t.evaluation.baseline.responses == replies
    assert trainer(total_steps=1).evaluate() != t.evaluate()


def test_a_judge_gets_prompts_both_replies_and_columns():
    calls = []

    def judge(prompts, responses, baselines, wish):
        calls.append((prompts, responses, baselines, wish))
        return [1, None, 0.5, 0]

    t = trainer(judge=judge, total_steps=2, learning_rate=0.05)
    assert t.evaluate()["win_rate/judge"] == 0.5
    assert next(iter(t)).metrics["win_rate/judge"] == 0.5
    prompts, responses, baselines, wish = calls[-1]
    assert wish == [row["wish"] for row in HELD_OUT]
    assert all(asked in shown for asked, shown in zip(tiny.PROMPTS[:4], prompts, strict=True))
    assert baselines == t.evaluation.baseline.responses == calls[0][1] and responses != baselines


@pytest.mark.parametrize("returned, message", [
    ([1, 0, 2, 0], r"judge f, sample 2: 2 is outside \[0, 1\]"),
    ([1, 0, math.nan, 0], "judge f, sample 2: returned nan"),
    ([1, 0, "a", 0], "judge f, sample 2: 'a' is not a number"),
    ([1, 0], "judge f, sample 2: returned 2 scores for 4 responses"),
    (KeyError("k"), "judge f, sample 0: raised KeyError: 'k'"),
])  # fmt: skip
def test_a_judges_mistakes_name_it_and_the_sample(returned, message):
    def f(prompts, responses, baselines):
        if isinstance(returned, Exception):
            raise returned
        return returned

    with pytest.raises(UserError, match=message):
        trainer(judge=f).evaluate()


@pytest.mark.parametrize("inputs, message", [
    ({"judge": letters, "eval_prompts": None}, "judge: measured on held-out prompts; give eval_prompts"),
    ({"best_of_n": 4, "eval_prompts": None}, "best_of_n: measured on held-out prompts; give eval_prompts"),
    ({"judge": letters, "eval_every": 0}, "judge: measured in evaluations; set eval_every"),
    ({"best_of_n": 4, "eval_every": 0}, "best_of_n = 4: eval_every = 0 evaluates nothing.*set eval_every above 0"),
    ({"judge": 3}, "judge: 3 is neither a function"),
    ({"judge": "no_such_module_x:f"}, "judge: cannot import 'no_such_module_x'"),
])  # fmt: skip
def test_mistakes_are_found_before_training(inputs, message):
    with pytest.raises(UserError, match=message):
        trainer(**inputs)


def test_the_dry_run_finds_them_too(tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in tiny.PROMPTS))
    for part in (tiny.llama(), tiny.tokenizer()):
        part.save_pretrained(tmp_path / "model")
    named = {"policy": str(tmp_path / "model"), "reward": "fastrlhf.recipes.rewards:one_short_sentence"}
    inputs = {"prompts": str(prompts), "judge": "no_such_module_x:f", **named}
    with pytest.raises(UserError, match="judge: measured on held-out prompts; give eval_prompts"):
        check_inputs(inputs, PPOConfig())
    inputs["eval_prompts"] = str(prompts)
    with pytest.raises(UserError, match="judge: cannot import 'no_such_module_x'"):
        check_inputs(inputs, PPOConfig())
    assert len(check_inputs(inputs | {"judge": None}, PPOConfig(best_of_n=2, max_new_tokens=8))) > 2


def test_a_judge_by_reference(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def longer(prompts, responses, baselines):\n"
                    "    return [float(len(r) >= len(b)) for r, b in zip(responses, baselines)]\n")  # fmt: skip
    assert trainer(judge=f"{file}:longer").evaluate()["win_rate/judge"] == 1.0


def test_best_of_n_is_measured_once_before_training(tmp_path):
    run = tmp_path / "run"
    t = trainer(output_dir=str(run), best_of_n=5, total_steps=2)
    t.train()
    (event,) = [e for e in read(run / "events.jsonl") if e["kind"] == "best_of_n"]
    assert event["step"] == 0 and [row["n"] for row in event["curve"]] == [1, 2, 4]
    rewards = [row["reward"] for row in event["curve"]]
    assert rewards[0] < rewards[1] < rewards[2]
    again = trainer(best_of_n=5)
    drawn = again.rollout(again.eval_prompts, 5, purpose="best_of_n", temperature=1.0)  # its policy is the reference
    groups = [letters(None, drawn.responses[i : i + 5]) for i in range(0, 20, 5)]
    assert len(set(drawn.responses)) > 15
    assert event["curve"] == best_of_n_curve(groups, 5)
    drawn = build_report(run).read_text(encoding="utf-8").partition('<figure id="fig-reward-kl"')[2]
    figure, _, rest = drawn.partition("</figure>")
    assert "series-0-1" in figure and 'class="dashed"' in figure and "best of 1, 2, 4" in figure
    assert '<figure id="fig-win-rate"' in rest


@pytest.mark.parametrize("curve", [None, "<b>", [1, "x"], [{"kl": "a", "reward": 1.0}], [{"kl": 0.1, "reward": None}]])
def test_the_report_draws_no_curve_from_a_damaged_event(tmp_path, curve):
    event = {"kind": "best_of_n", "curve": curve}
    assert best_of_n(StageRun(tmp_path, "ppo", [], [], [], [event], {}, {})) == []


@pytest.mark.parametrize("form", [{}, {"lora": 4}, {"lora": 4, "critic": "shared_trunk"}, {"critic": "shared_trunk"}])
def test_the_baseline_is_the_reference_wherever_it_lives(form):
    """With adapters the reference is the base of the policy; evaluated late, it still answers as the SFT model did."""
    t = trainer(eval_every=0, total_steps=4, **{"learning_rate": 0.05, **form})
    t.train()
    metrics, fresh = t.evaluate(), trainer()
    fresh.evaluate()
    assert t.evaluation.baseline == fresh.evaluation.baseline
    assert t.evaluate() == metrics
    now = t.rollout(t.eval_prompts, 1, purpose="eval")
    assert now.responses != t.evaluation.baseline.responses


def test_evaluation_does_not_touch_the_training(tmp_path):
    """The same steps with and without, and no draw from any global generator."""
    plain = trainer(eval_every=0)
    without = [step.metrics for step in plain]
    watched = trainer(judge=lambda p, r, b: [0.5] * len(r), best_of_n=2)
    for step, metrics in zip(watched, without, strict=True):
        assert {name: step.metrics[name] for name in metrics} == metrics
    assert same(weights(plain.policy), weights(watched.policy))
    before = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    watched.evaluate()
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), numpy.random.get_state()[1].tolist())


def test_a_resumed_run_compares_with_the_same_replies(tmp_path):
    """Stopped after step 2 and resumed: the bytes of a run that was not; the reference answers once only."""

    def seen(prompts, responses):
        counts.append(len(responses))
        return letters(prompts, responses)

    fields = {
        "reward": seen,
        "best_of_n": 2,
        "total_steps": 4,
        "judge": lambda p, r, b: [float(a > c) for a, c in zip(r, b)],
    }
    counts: list[int] = []
    trainer(output_dir=str(tmp_path / "whole"), **fields).train()
    leave_after(trainer(output_dir=str(tmp_path / "cut"), **fields), 2)
    counts.clear()
    resumed = trainer(output_dir=str(tmp_path / "cut"), resume=True, **fields)
    kept = resumed.evaluation.baseline
    resumed.train()
    assert counts == [8, 4] * 2 and resumed.evaluation.baseline is kept
    for name in ("metrics", "events", "samples"):
        assert (tmp_path / "cut" / f"{name}.jsonl").read_bytes() == (tmp_path / "whole" / f"{name}.jsonl").read_bytes()
