"""Passes of the critic over the stored rollouts of its warm-up; the critic's own clip norm and schedule."""

from __future__ import annotations

import pytest
import torch

from fastrlhf import PPOConfig
from fastrlhf.config.stages import critic_updates, policy_updates, pretraining_updates
from fastrlhf.rl.critic_warmup import CriticPretraining, token_rewards
from fastrlhf.rl.experience import ValueExperience
from fastrlhf.runtime.optim import lr_at
from fastrlhf_kernels import gae, shape_rewards
from tests.runs import copies, leave_after, ppo_trainer, resumed_equals_whole, same

FORMS = {"separate": {}, "shared trunk": {"critic": "shared_trunk"}, "lora": {"lora": 4}}
WARM = {"critic_warmup_steps": 3, "total_steps": 4}


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 0.95), (0.9, 0.5), (0.97, 0.0), (1.0, 1.0)])
def test_rewards_come_back_from_returns_and_values(gamma, gae_lambda):
    """The inverse of GAE: lengths 1 to 6, a row that does not count, a value behind a cut response."""
    draw = torch.Generator().manual_seed(0)
    lengths = torch.tensor([6, 1, 4, 5])
    token_mask = torch.arange(6) < lengths[:, None]
    mask = token_mask & torch.tensor([True, True, False, True])[:, None]
    log_probs, ref, values = (torch.randn(4, 6, generator=draw) for _ in range(3))
    scores = torch.randn(4, generator=draw)
    rewards = shape_rewards(scores, log_probs, ref, mask, kl_coef=0.1)
    config = PPOConfig(gamma=gamma, gae_lambda=gae_lambda)
    options = {"gamma": gamma, "gae_lambda": gae_lambda}
    _, returns = gae(rewards, values, mask, **options)
    got = token_rewards(ValueExperience(token_mask, mask, values, returns), config)
    torch.testing.assert_close(got, rewards.where(mask, 0.0), rtol=1e-5, atol=2e-6)
    after = torch.tensor([2.0, 0.0, 0.0, -3.0])
    _, returns = gae(rewards, values, mask, **options, bootstrap_values=after)
    cut = token_rewards(ValueExperience(token_mask, mask, values, returns), config)
    last = torch.nn.functional.one_hot(lengths - 1, 6) * (gamma * after)[:, None]
    torch.testing.assert_close(cut, (rewards + last).where(mask, 0.0), rtol=1e-5, atol=5e-6)


class Watch:
    """What is stored in the warm-up of a trainer, and what each pass gets, with the critic as it is at its start."""

    def __init__(self, t):
        self.learner, self.stored, self.passes = t.learner, [], []
        pretraining = CriticPretraining(t.config, self, joined=False)
        self.keep_rows, pretraining.keep = pretraining.keep, self.keep
        t.pretraining = pretraining  # a patch: a run shows neither the rewards that it stores nor the order of a pass

    def __getattr__(self, name):
        return getattr(self.learner, name)

    def keep(self, rows, experience):
        self.stored.append((rows, experience))
        self.keep_rows(rows, experience)

    def update_critic(self, rows, experience, mini_batches):
        with torch.no_grad():
            values = torch.cat([self.critic.values(rows.batch([i], self.device)) for i in range(len(rows))])
        critic = copies(self.critic.parameters().values())
        self.passes.append((rows, experience, [sorted(mini) for mini in mini_batches], values, critic))
        return self.learner.update_critic(rows, experience, mini_batches)


@pytest.mark.parametrize("form", FORMS)
def test_each_pass_is_valued_anew_and_trained_in_shuffled_mini_batches(form):
    """By hand: values before a pass, their returns by the recursion of GAE in float64, rows of every update."""
    t = ppo_trainer(**FORMS[form], **WARM, critic_pretrain_epochs=2, mini_batch_size=5, gamma=0.9, gae_lambda=0.8)
    watch = Watch(t)
    stored, seen = watch.stored, watch.passes
    before = copies(t.learner.policy_optimizer.params)
    leave_after(t, 3)
    assert same(before, copies(t.learner.policy_optimizer.params)), "the policy is frozen"
    assert len(stored) == 3 and len(seen) == 2 and not same(seen[0][4], seen[1][4])
    ids = [rows.whole(i) for rows, _ in stored for i in range(len(rows))]
    rewards = [r for _, e in stored for r in rewards_by_hand(e, 0.9, 0.8)]
    for rows, experience, plan, now, _ in seen:
        assert [rows.whole(i) for i in range(len(rows))] == ids
        assert [len(mini) for mini in plan] == [5, 5, 5, 5, 4] and sorted(sum(plan, [])) == list(range(24))
        torch.testing.assert_close(experience.values[experience.token_mask], now, rtol=1e-4, atol=1e-5)
        for i, row in enumerate(rewards):
            value, gain, wanted = 0.0, 0.0, []
            for reward, v in reversed(list(zip(row, experience.values[i].double().tolist()[: len(row)], strict=True))):
                gain = reward + 0.9 * value - v + 0.9 * 0.8 * gain
                value = v
                wanted.insert(0, gain + v)
            got = experience.returns[i, : len(row)].double()
            torch.testing.assert_close(got, torch.tensor(wanted).double(), rtol=1e-4, atol=1e-4)
    assert seen[0][2] != seen[1][2], "another order in each pass"
    assert t.pretraining.parts == [], "dropped afterwards"


def rewards_by_hand(experience, gamma: float, gae_lambda: float) -> list[list[float]]:
    """r_t = A_t - gamma lambda A_{t+1} + V_t - gamma V_{t+1}, a token at a time."""
    found = []
    for i, length in enumerate(experience.token_mask.sum(1).tolist()):
        values = [*experience.values[i, :length].double().tolist(), 0.0]
        returns = [*experience.returns[i, :length].double().tolist(), 0.0]
        gains = [r - v for r, v in zip(returns, values, strict=True)]
        found.append(
            [gains[t] - gamma * gae_lambda * gains[t + 1] + values[t] - gamma * values[t + 1] for t in range(length)]
        )
    return found


@pytest.mark.parametrize("form", ["separate", "lora"])
def test_the_critic_explains_more_when_ppo_starts(form):
    """Of a reward that the prompt tells: the first step behind the warm-up, without passes and with twenty."""
    fields = {**FORMS[form], **WARM, "critic_learning_rate": 3e-3, "rollout_batch_size": 16, "mini_batch_size": 16,
              "clip_range_value": None, "reward": lambda prompts, _: [2.0 * ("the" in p) for p in prompts]}  # fmt: skip
    plain, passes = ([s.metrics for s in ppo_trainer(**fields, critic_pretrain_epochs=n)] for n in (0, 20))
    assert passes[3]["value/explained_var"] > 0.9 and plain[3]["value/explained_var"] < 0.0
    assert passes[3]["value/loss"] < 0.1 * plain[3]["value/loss"]
    assert passes[2]["value/pretrain_loss"] < passes[2]["value/pretrain_loss_first"]
    assert passes[2]["value/pretrain_explained_var"] > passes[2]["value/explained_var"]
    assert [[n for n in m if "pretrain" in n] for m in passes] == [[], [], [
        "value/pretrain_loss_first", "value/pretrain_loss", "value/pretrain_explained_var"], []]  # fmt: skip
    assert passes[1] == plain[1] and passes[3]["reward/mean"] == plain[3]["reward/mean"]


def test_the_number_of_updates_is_what_the_schedule_falls_over():
    """3 warm-up steps of 8 in mini-batches of 5 (2 a step), 2 passes over 24 (5 each), 1 step of both."""
    t = ppo_trainer(**WARM, critic_pretrain_epochs=2, mini_batch_size=5, ppo_epochs=2, lr_schedule="linear")
    rates: tuple[list[float], list[float]] = ([], [])
    for seen, each in zip(rates, t.learner.optimizers(), strict=True):
        each.inner.register_step_pre_hook(lambda inner, *_, seen=seen: seen.append(inner.param_groups[0]["lr"]))
    t.train()
    assert t.learner.critic_updates == critic_updates(t.config) == 4 * 4 + 2 * 5
    assert t.learner.policy_updates == policy_updates(t.config) == 4
    assert pretraining_updates(t.config) == 10
    policy, critic = rates
    assert policy == pytest.approx([1e-2 * (1 - i / 4) for i in range(4)])
    assert critic == pytest.approx([1e-2 * (1 - i / 26) for i in range(26)])
    assert lr_at(26, base=1e-2, schedule="linear", warmup_steps=0, total_steps=26) == 0.0


def test_an_unscorable_response_is_in_no_pass():
    """Its tokens move nothing: the passes end with the same critic whatever they are."""

    def picky(prompts, responses):
        return [None if i % 2 else float(len(r)) for i, r in enumerate(responses)]

    t = ppo_trainer(**WARM, critic_pretrain_epochs=1, reward=picky)
    watch = Watch(t)
    t.train()
    ((_, experience, *_),) = watch.passes
    assert not experience.response_mask[1::2].any() and experience.response_mask[::2].any(1).all()
    assert experience.returns[1::2].abs().sum() == 0


@pytest.mark.parametrize(("form", "steps"), [("separate", 2), ("separate", 3), ("shared trunk", 3), ("lora", 2)])
def test_a_run_resumed_in_its_warm_up_ends_with_the_same_bytes(form, steps, tmp_path):
    files = resumed_equals_whole(tmp_path, steps, **FORMS[form], **WARM, critic_pretrain_epochs=2)
    stored = [sorted((tmp_path / "parts" / "checkpoints").glob(f"step-00000{n}/critic_pre*")) for n in (3, 4)]
    assert stored == [[], []] and "critic_pretraining.safetensors" not in files


def test_the_stored_rollouts_are_in_the_checkpoint_while_the_warm_up_lasts(tmp_path):
    leave_after(ppo_trainer(**WARM, critic_pretrain_epochs=1, save_every=1, output_dir=str(tmp_path / "run")), 2)
    folders = sorted(p.parent.name for p in (tmp_path / "run" / "checkpoints").glob("*/critic_pretraining.safetensors"))
    assert folders == ["step-000001", "step-000002"]


def test_the_critic_clips_at_its_own_norm():
    """The norm of the gradient that reaches each optimizer is what was clipped to."""
    for own, expected in ((None, 0.5), (0.01, 0.01)):
        t = ppo_trainer(max_grad_norm=0.5, critic_max_grad_norm=own, mini_batch_size=8, total_steps=1)
        norms: list[float] = []

        def keep(inner, *_, norms=norms):  # behind the step: it clips as it reads
            grads = [p.grad for p in inner.param_groups[0]["params"] if p.grad is not None]
            norms.append(sum(float(grad.double().square().sum()) for grad in grads) ** 0.5)

        for each in t.learner.optimizers():
            each.inner.register_step_post_hook(keep)
        metrics = next(iter(t)).metrics
        assert metrics["value/grad_norm"] > 0.5 and metrics["policy/grad_norm"] > 0.5
        assert norms == pytest.approx([expected, 0.5], rel=1e-3)  # the critic steps first
