"""PPO-ptx: the gradient of the sum of both losses, in one optimizer step, from rows drawn in a fixed order."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fastrlhf import UserError
from tests import tiny
from tests.runs import PTX, TEXTS, copies, gradients_of, ppo_trainer, resumed_equals_whole, same

LONG = {"text": "the moon " * 60}


def language_model_loss(t, rows: list) -> torch.Tensor:
    """Mean over target tokens of full-logits cross-entropy, row by row in plain torch."""
    total, count = torch.zeros(()), 0
    for example in rows:
        ids, target = torch.tensor(example.ids), torch.tensor(example.target)
        logits = t.policy(ids[None]).logits[0, :-1]
        losses = F.cross_entropy(logits, ids[1:], reduction="none")[target[1:]]
        total, count = total + losses.sum(), count + len(losses)
    return total / count


@pytest.mark.parametrize("micro", [1, 10_000])
@pytest.mark.parametrize("form", [{}, {"critic": "shared_trunk", "temperature": 0.5}])
def test_the_gradient_is_that_of_ppo_plus_ptx_coef_times_the_language_model_loss(form, micro):
    """Text, prompt and response, messages; only their targets count, at temperature 1 whatever PPO samples at."""
    fields = {**form, "micro_batch_tokens": micro, "mini_batch_size": 6, "rollout_batch_size": 6, "max_grad_norm": 1e9}
    plain, t = ppo_trainer(**fields), ppo_trainer(**fields, ptx_coef=0.7, ptx_data=PTX)
    without, got = gradients_of(plain, plain.step), gradients_of(t, t.step)
    assert len(t.learner.ptx.examples) == 6  # all of them in one mini-batch
    (0.7 * language_model_loss(t, t.learner.ptx.examples)).backward()
    for a, b, p in zip(got, without, t.learner.policy_optimizer.params, strict=True):
        torch.testing.assert_close(a, b + p.grad, rtol=1e-4, atol=1e-5 * float(a.abs().max()) + 1e-7)
    assert max(float(p.grad.abs().max()) for p in t.policy.parameters()) > 1e-3


@pytest.mark.parametrize("aggregation", ["token_mean", "constant"])
def test_a_sequence_sum_weighs_a_row_as_the_policy_loss_weighs_a_response(aggregation):
    """The sum of a row's -log p, mean over rows, over the mean tokens of a response or over max_new_tokens."""
    fields = {"mini_batch_size": 6, "rollout_batch_size": 6, "max_grad_norm": 1e9, "loss_aggregation": aggregation}
    plain = ppo_trainer(**fields)
    t = ppo_trainer(**fields, ptx_coef=27.8, ptx_data=PTX, ptx_reduction="sequence_sum")
    without, step = gradients_of(plain, plain.step), t.engine.rollout
    sizes: list[int] = []

    def rollout(*args: object, **kwargs: object):  # noqa: ANN202
        result = step(*args, **kwargs)
        sizes.extend(len(ids) for ids in result.response_ids)
        return result

    t.engine.rollout = rollout
    got, rows = gradients_of(t, t.step), t.learner.ptx.examples
    per_response = 10 if aggregation == "constant" else sum(sizes) / len(sizes)
    targets = sum(sum(example.target) for example in rows)
    (27.8 * language_model_loss(t, rows) * targets / len(rows) / per_response).backward()
    for a, b, p in zip(got, without, t.learner.policy_optimizer.params, strict=True):
        torch.testing.assert_close(a, b + p.grad, rtol=1e-4, atol=1e-5 * float(a.abs().max()) + 1e-7)


def test_targets_are_what_sft_learns():
    """The reply of a conversation, every token but the first of a text."""
    t = ppo_trainer(ptx_coef=1.0, ptx_data=PTX)
    text, pair = t.learner.ptx.examples[0], t.learner.ptx.examples[4]
    assert text.target == [False] + [True] * (len(text.ids) - 1) and text.ids[-1] == t.tokenizer.eos_token_id
    learnt = [token for token, wanted in zip(pair.ids, pair.target) if wanted]
    assert t.tokenizer.decode(learnt) == " sat on the mat<|end|>"


def test_one_optimizer_step_for_both_losses_and_the_metric():
    t = ppo_trainer(ptx_coef=1.0, ptx_data=TEXTS, ppo_epochs=2)
    inner, losses = t.learner.policy_optimizer.inner, []

    @torch.no_grad()
    def measure(*_):  # before every update; a mini-batch draws all 4 rows
        losses.append(float(language_model_loss(t, t.learner.ptx.examples)))

    inner.register_step_pre_hook(measure)
    steps = [step.metrics for step in t]
    counts = {int(s["step"]) for s in inner.state.values()}
    assert counts == {2 * 2 * 2} and len(losses) == 8 and t.learner.policy_updates == 8
    want = [sum(part) / 4 for part in (losses[:4], losses[4:])]
    assert [m["ptx/loss"] for m in steps] == pytest.approx(want, rel=1e-5)
    assert t.learner.ptx.sampler.state() == {"n": 4, "seed": 0, "epoch": 7, "cursor": 4}  # 8 draws of 4 rows


def test_the_metric_is_the_mean_loss_a_target_token():
    t = ppo_trainer(ptx_coef=3.0, ptx_data=TEXTS, total_steps=1, rollout_batch_size=4)
    want = float(language_model_loss(t, t.learner.ptx.examples).detach())
    assert next(iter(t)).metrics["ptx/loss"] == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("form", [{}, {"lora": 4}, {"critic": "shared_trunk"}, {"lora": 4, "critic": "shared_trunk"}])
def test_the_mix_keeps_a_policy_at_its_texts(form):
    """The same run with a mix that weighs much knows the texts better."""
    losses = []
    for coef in (1e-9, 10.0):
        t = ppo_trainer(**form, ptx_coef=coef, ptx_data=TEXTS, total_steps=6)
        losses.append([step.metrics["ptx/loss"] for step in t])
    assert losses[1][-1] < losses[1][0] - 0.3 and losses[1][-1] < losses[0][-1] - 0.3


def test_a_warm_up_of_the_critic_draws_no_rows():
    t = ppo_trainer(ptx_coef=1.0, ptx_data=TEXTS, critic_warmup_steps=1)
    before, steps = copies(t.policy.parameters()), iter(t)
    assert "ptx/loss" not in next(steps).metrics and same(before, copies(t.policy.parameters()))
    assert t.learner.ptx.sampler.cursor == 0
    assert "ptx/loss" in next(steps).metrics


@pytest.mark.parametrize("form", [{}, {"lora": 2}])
def test_a_resumed_run_draws_the_same_rows(tmp_path, form):
    resumed_equals_whole(tmp_path, 1, **form, ptx_coef=1.0, ptx_data=PTX, total_steps=3)


def test_memory_that_runs_out_costs_no_row_of_the_mix():
    after = []
    for failures in (0, 1):
        t, left = ppo_trainer(ptx_coef=1.0, ptx_data=TEXTS), [failures]

        def full(*_: object, left: list[int] = left) -> None:
            if torch.is_grad_enabled() and left[0]:  # in an update
                left[0] -= 1
                raise torch.OutOfMemoryError("CUDA out of memory")

        t.policy.base_model.register_forward_pre_hook(full)
        loss = next(iter(t)).metrics["ptx/loss"]
        assert left == [0] and t.learner.memory.halvings == failures
        after.append((t.learner.ptx.state(), pytest.approx(loss, rel=1e-4)))
    assert after[0] == after[1]


def test_long_rows_are_dropped_and_counted(tmp_path):
    fields = {"max_prompt_tokens": 60, "ptx_coef": 1.0, "output_dir": str(tmp_path / "run")}
    t = ppo_trainer(**fields, ptx_data=[*TEXTS, LONG])
    assert len(t.learner.ptx.examples) == 4
    said = "ptx_data: 5 rows read, 4 used, dropped: 1 longer than max_prompt_tokens + max_new_tokens = 70"
    assert said in (tmp_path / "run" / "log.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ptx_coef": 2.0}, "ptx_data: ptx_coef = 2 needs rows"),
        ({"ptx_data": TEXTS}, "ptx_coef = 0: ptx_data would never be used"),
        ({"ptx_data": [LONG], "ptx_coef": 1.0, "max_prompt_tokens": 30}, "ptx_data: nothing left to train on"),
        ({"ptx_data": [{"promt": "a"}], "ptx_coef": 1.0}, "prompt"),
        ({"ptx_data": [LONG], "ptx_coef": 1.0}, r"max_prompt_tokens \+ max_new_tokens = 522: the longest row has"),
        ({"ptx_data": TEXTS, "ptx_coef": 1.0, "policy": tiny.llama(vocab_size=90)}, "tokenizer: it writes token"),
    ],
)
def test_mistakes_are_sentences(fields, message):
    with pytest.raises(UserError, match=message):
        ppo_trainer(**fields)
