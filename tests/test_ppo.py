"""The invariants of a PPO step, on models small enough to run dozens of them."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastrlhf import PPOConfig, PPOTrainer, UserError
from fastrlhf.data.templates import stop_token_ids
from fastrlhf.models import heads, loading
from fastrlhf.models.token_batch import TokenRows, target_log_probs
from fastrlhf.rl.losses import token_weights
from fastrlhf.rl.scorers import Scores
from fastrlhf.rollout.result import Rollout
from tests import tiny
from tests.runs import experience_of

PROMPTS = [tiny.chat(p) for p in tiny.PROMPTS]


def reward(prompts: list[str], responses: list[str]) -> list[float]:
    """Something that varies: how many letters e, and a little of the length."""
    return [r.count("e") - 0.1 * len(r) for r in responses]


def config(**fields: object) -> PPOConfig:
    base = {
        "total_steps": 2,
        "rollout_batch_size": 8,
        "mini_batch_size": 4,
        "max_new_tokens": 10,
        "learning_rate": 1e-3,
        "critic_learning_rate": 1e-3,
        "eval_every": 0,
    }
    return PPOConfig(**{**base, **fields})


def trainer(cfg: PPOConfig | None = None, *, policy=None, tok=None, **inputs: object) -> PPOTrainer:
    inputs = {"reward": reward, "prompts": PROMPTS, **inputs}
    return PPOTrainer(cfg or config(), policy=policy or tiny.llama(), tokenizer=tok or tiny.tokenizer(), **inputs)


def weights(model) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ------------------------------------------------------------------------------------------------------- invariant 1


@pytest.mark.parametrize("policy", [tiny.llama, tiny.gpt2, lambda: tiny.gpt2(dropout=0.5)])
def test_the_first_update_has_ratio_exactly_one_and_kl_exactly_zero(policy):
    """Learned positions, and a model with dropout .5, included."""
    t = trainer(config(total_steps=1, ppo_epochs=1, mini_batch_size=8, learning_rate=1e-2), policy=policy())
    step = next(iter(t))
    assert step.metrics["kl/ref"] == 0.0
    assert step.metrics["policy/ratio"] == 1.0 and step.metrics["kl/approx"] == 0.0
    assert step.metrics["policy/clip_frac"] == 0.0
    assert step.metrics["rollout/mismatch"] < 1e-5  # decoding against the training forward


@pytest.mark.parametrize("micro_batch_tokens", [1, 30, 10_000])
def test_ratio_is_exactly_one_for_every_micro_batching(micro_batch_tokens):
    cfg = config(total_steps=1, ppo_epochs=1, mini_batch_size=8, micro_batch_tokens=micro_batch_tokens)
    assert next(iter(trainer(cfg))).metrics["policy/ratio"] == pytest.approx(1.0, abs=1e-7)
    assert next(iter(trainer(cfg))).metrics["kl/approx"] == 0.0


def test_metrics_and_weights_do_not_depend_on_the_micro_batch_size():
    runs = []
    for micro in (1, 45, 10_000):
        t = trainer(config(total_steps=2, micro_batch_tokens=micro, learning_rate=1e-4))
        runs.append(([s.metrics for s in t], weights(t.policy), weights(t.value_model)))
    metrics, policy, value = runs[0]
    for other_metrics, other_policy, other_value in runs[1:]:
        for a, b in zip(metrics, other_metrics, strict=True):
            for name in a:
                assert a[name] == pytest.approx(b[name], rel=1e-4, abs=2e-6), name
        for a, b in zip(policy + value, other_policy + other_value, strict=True):
            assert torch.allclose(a, b, atol=2e-5)


def test_gradients_agree_between_micro_batchings_to_1e6():
    """SGD-like check before Adam amplifies rounding: the clipped gradient norm of both models."""
    norms = []
    for micro in (1, 45, 10_000):
        cfg = config(total_steps=1, ppo_epochs=1, mini_batch_size=8, micro_batch_tokens=micro)
        step = next(iter(trainer(cfg)))
        norms.append((step.metrics["policy/grad_norm"], step.metrics["value/grad_norm"]))
    assert norms[0] == pytest.approx(norms[1], rel=1e-6) and norms[0] == pytest.approx(norms[2], rel=1e-6)


def test_padding_does_not_reach_any_result():
    """A row alone and beside a longer one: same log-probs and values, learned positions included."""
    for model in (tiny.llama(), tiny.gpt2()):
        critic = loading.scalar_model(model, tiny.tokenizer(), seed=0)
        rows = [([5, 6, 7], [8, 9, 1]), ([5] * 20, [4] * 15)]
        t = trainer(policy=model)

        def run(pairs, t=t, model=model, critic=critic):
            batch = TokenRows([p for p, _ in pairs], [r for _, r in pairs]).batch(range(len(pairs)), t.device)
            with torch.no_grad():
                return target_log_probs(model, batch, 1.0), heads.scalar_outputs(critic.score, batch.hidden(critic))

        for alone, padded in zip(run(rows[:1]), run(rows), strict=True):
            assert torch.allclose(alone, padded[:3], atol=1e-5)


# ---------------------------------------------------------------------------------------------------- invariants 2, 3


def test_number_of_optimizer_steps():
    cfg = config(total_steps=3, ppo_epochs=2, rollout_batch_size=8, mini_batch_size=3)  # 3 + 3 + 2
    t = trainer(cfg)
    t.train()
    assert t.learner.policy_updates == t.learner.critic_updates == 3 * 2 * 3
    counts = [int(s["step"]) for s in t.learner.policy_optimizer.inner.state.values()]
    assert set(counts) == {18}


def test_sampled_ids_reach_the_loss_unchanged():
    """Non-canonical token splits included: what was sampled is trained on, nothing is decoded and re-encoded."""
    t = trainer(config(total_steps=1, ppo_epochs=1, mini_batch_size=8))
    seen = []

    def watch(trunk: torch.nn.Module, args: tuple, read: dict[str, object]) -> None:
        if torch.is_grad_enabled():  # the update, not the rollout or the experience
            seen.extend(read["input_ids"].tolist())

    for model in (t.policy, t.value_model):
        model.base_model.register_forward_pre_hook(watch, with_kwargs=True)
    rollout = next(iter(t)).rollout
    width = max(map(len, seen))
    rows = [[*rollout.rows.whole(row), *[0] * width][:width] for row in range(8)]  # padded on the right
    padded = [[*ids, *[0] * width][:width] for ids in seen]
    assert sorted(padded) == sorted(rows * 2)
    reencoded = [t.tokenizer(text, add_special_tokens=False)["input_ids"] for text in rollout.responses]
    assert reencoded != rollout.response_ids  # a random model does sample non-canonical splits


def test_value_and_log_prob_are_read_where_the_token_is_predicted():
    prompts, responses = [[5, 6, 7], [4]], [[8, 9], [3, 2, 1]]
    batch = TokenRows(prompts, responses).batch(range(2), torch.device("cpu"))
    width = batch.input_ids.shape[1]
    assert batch.index.tolist() == [2, 3, width + 0, width + 1, width + 2]
    assert batch.labels.tolist() == [8, 9, 3, 2, 1]
    model = tiny.llama()
    logits = model(batch.input_ids[:1, :5]).logits[0].log_softmax(-1)
    want = torch.stack([logits[2, 8], logits[3, 9]])
    with torch.no_grad():
        got = target_log_probs(model, batch, 1.0)
    assert torch.allclose(got[:2], want, atol=1e-5)


def test_rollout_log_probs_match_a_teacher_forced_forward_at_the_temperature():
    t = trainer(config(total_steps=1, temperature=0.7))
    rollout = t.rollout(t.prompts[:3], 2, purpose="rollout")
    batch = rollout.rows.batch(range(6), t.device)
    with torch.no_grad():
        want = target_log_probs(t.policy, batch, 0.7)
    assert torch.allclose(torch.cat(rollout.policy_log_probs), want, atol=1e-4)


# ------------------------------------------------------------------------------------------------------- invariant 5


class LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor any operation made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def test_no_tensor_of_tokens_times_vocabulary_is_made_in_training():
    vocabulary = 6000
    policy = tiny.llama(vocab_size=vocabulary)
    cfg = config(total_steps=1, rollout_batch_size=64, mini_batch_size=64, ppo_epochs=1, max_new_tokens=24)
    t = trainer(cfg, policy=policy)
    rollout = t.rollout([t.prompts[i % len(t.prompts)] for i in range(64)], 1, purpose="rollout")
    scores = t.scorer(rollout)
    tokens = sum(len(r) for r in rollout.response_ids)
    with LargestTensor() as largest:
        experience, epochs, _ = experience_of(t, rollout, scores)
        t.learner.update(rollout.rows, experience, epochs, 0)
    assert tokens > 1200
    assert largest.numel < tokens * vocabulary / 3


# --------------------------------------------------------------------------------------------------------- behaviour


def test_learning_rate_zero_changes_nothing():
    t = trainer(config(total_steps=3, learning_rate=0.0, critic_learning_rate=0.0))
    before = weights(t.policy), weights(t.value_model)
    for step in t:
        assert step.metrics["kl/ref"] == 0.0
        assert step.metrics["kl/approx"] == pytest.approx(0.0, abs=1e-9)
    assert same(before[0], weights(t.policy)) and same(before[1], weights(t.value_model))


def test_it_learns_a_simple_reward():
    def letters(prompts, responses):
        return [sum(c.isascii() and c.isalpha() for c in r) / 10 for r in responses]

    cfg = config(
        total_steps=15, rollout_batch_size=32, mini_batch_size=16, learning_rate=4e-3, kl_coef=0.0, clip_range=0.3
    )
    rewards = [s.metrics["reward/mean"] for s in trainer(cfg, reward=letters)]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.2


def test_same_seed_same_run_other_seed_another():
    runs = [[s.rollout.response_ids for s in trainer(config(seed=seed))] for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


def test_truncated_responses_keep_their_last_token_and_pay_the_penalty():
    fields = {"whiten_advantages": False, "kl_coef": 0.0, "gae_lambda": 1.0}
    t = trainer(config(total_steps=1, max_new_tokens=2, missing_eos_penalty=7.0, **fields))
    rollout = next(iter(t)).rollout
    stops = stop_token_ids(t.tokenizer, t.policy.generation_config)
    cut = [r for r, f in zip(rollout.response_ids, rollout.finished, strict=True) if not f]
    assert cut and all(len(r) == 2 and r[-1] not in stops for r in cut)
    experience, *_ = experience_of(t, rollout, Scores(rollout.scores, None))
    for row, (score, done) in enumerate(zip(rollout.scores, rollout.finished, strict=True)):
        first = float((experience.advantages + experience.values)[row, 0])
        assert first == pytest.approx(score - (0.0 if done else 7.0), abs=1e-4)


def test_a_custom_stop_token_counts_as_finished(tmp_path):
    """generation_config may list several ids that end a reply; none of them is a missing EOS."""
    policy = tiny.llama()
    policy.generation_config.eos_token_id = [1, *range(5, 200)]
    t = trainer(config(total_steps=1, missing_eos_penalty=5.0), policy=policy)
    step = next(iter(t))
    assert step.metrics["length/finished"] > 0.8
    stops = stop_token_ids(t.tokenizer, policy.generation_config)
    assert all(r[-1] in stops for r, f in zip(step.rollout.response_ids, step.rollout.finished) if f)


def test_unscorable_responses_are_masked_out_and_counted():
    def picky(prompts, responses):
        return [None if i % 2 else 1.0 for i in range(len(responses))]

    t = trainer(config(total_steps=1, ppo_epochs=1), reward=picky)
    step = next(iter(t))
    assert step.metrics["reward/unscorable"] == 4 and step.metrics["reward/mean"] == 1.0
    experience, *_ = experience_of(t, step.rollout)
    assert not experience.response_mask[1::2].any() and experience.response_mask[::2].any()
    assert experience.advantages[1::2].abs().sum() == 0


def test_nothing_scorable_is_an_error_before_anything_is_learned():
    t = trainer(config(total_steps=1), reward=lambda prompts, responses: [None] * len(responses))
    before = weights(t.policy)
    with pytest.raises(UserError, match="reward: None for all 8 responses of step 1"):
        next(iter(t))
    assert same(before, weights(t.policy))


def test_columns_reach_reward_functions_that_ask_for_them():
    rows = [{"prompt": p, "answer": str(i), "unused": i} for i, p in enumerate(PROMPTS)]
    seen = {}

    def graded(prompts, responses, answer):
        seen.update(zip(prompts, answer, strict=True))
        return [0.0] * len(responses)

    t = trainer(config(total_steps=2), reward=[("graded", 1.0, graded), ("length", 0.5, reward)], prompts=rows)
    t.train()
    assert seen and all(tiny.PROMPTS[int(answer)] == prompt for prompt, answer in seen.items())


def test_a_non_finite_update_is_skipped_counted_and_named(tmp_path):
    t = trainer(config(total_steps=1, ppo_epochs=1, mini_batch_size=8, output_dir=str(tmp_path / "run")))
    before = weights(t.policy)
    poison = t.policy.lm_head.weight.register_hook(lambda grad: grad * math.nan)
    step = next(iter(t))
    poison.remove()
    assert same(before, weights(t.policy)) and not t.learner.policy_optimizer.inner.state
    assert step.metrics["update/skipped"] == 1
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert any(e["kind"] == "non_finite_update" and "policy" in e["message"] for e in events)


def test_three_non_finite_updates_in_a_row_stop_the_run():
    t = trainer(config(total_steps=5))
    t.policy.lm_head.weight.register_hook(lambda grad: grad * math.nan)
    with pytest.raises(UserError, match="not finite"):
        t.train()


def test_target_kl_stops_the_epochs():
    t = trainer(config(total_steps=1, ppo_epochs=8, learning_rate=3e-2, target_kl=0.01))
    step = next(iter(t))
    assert step.metrics["update/stopped_early"] == 1.0 and t.learner.policy_updates < 16


@pytest.mark.parametrize("form", [{}, {"critic": "shared_trunk", "critic_learning_rate": 1e-2}])
def test_target_kl_stops_before_the_update_that_exceeds_it(form):
    """The policy keeps the weights whose kl/approx was too much; the critic makes its update of that mini-batch."""

    def run(**fields: object) -> tuple:
        t = trainer(config(total_steps=1, ppo_epochs=4, learning_rate=1e-2, **form, **fields))
        seen, before, plain = [], [], t.learner._too_far

        def too_far(sums: list[float], stats: object) -> bool:
            seen.append(sums[1])
            before.append(weights(t.policy))
            return plain(sums, stats)

        t.learner._too_far = too_far
        return t, seen, before, next(iter(t)).metrics

    _, kls, before, metrics = run()
    assert "update/stopped_early" not in metrics and kls[0] == pytest.approx(0.0, abs=1e-9)
    first = next(i for i, kl in enumerate(kls) if kl > 0.5 * max(kls))
    target = max([*kls[:first], 0.4 * kls[first]]) / 1.5
    t, seen, _, metrics = run(target_kl=target)
    assert seen == kls[: first + 1] and t.learner.policy_updates == first and t.learner.critic_updates == first + 1
    assert same(weights(t.policy), before[first]) and metrics["update/stopped_early"] == 1.0
    assert metrics["kl/approx"] == pytest.approx(sum(seen) / len(seen))
    assert all(p.grad is None for p in t.policy.parameters())


def test_critic_warmup_trains_the_critic_alone():
    t = trainer(config(total_steps=3, critic_warmup_steps=2))
    before, critic = weights(t.policy), weights(t.value_model)
    steps = iter(t)
    next(steps), next(steps)
    assert same(before, weights(t.policy)) and not same(critic, weights(t.value_model))
    next(steps)
    assert not same(before, weights(t.policy))


@pytest.mark.parametrize("advantage", ["grpo", "dr_grpo", "rloo", "reinforce++"])
def test_estimators_without_a_critic_have_none(advantage):
    t = trainer(config(advantage=advantage, samples_per_prompt=4, critic_learning_rate=0))
    assert t.value_model is None and set(t.trained()) == {"policy"}
    before = weights(t.policy)
    metrics = t.train()
    assert not same(before, weights(t.policy)) and not any(name.startswith("value/") for name in metrics)


def test_kept_mass_is_reported_under_truncated_sampling():
    full, cut = (next(iter(trainer(config(top_k=k)))).metrics["rollout/kept_mass"] for k in (0, 3))
    assert full == pytest.approx(1.0, abs=1e-5) and cut < 0.9


def misreported() -> tuple[PPOTrainer, Rollout, Scores, torch.Tensor]:
    """A rollout whose decoding says other log-probs: half too likely by 1.5 nats, one too unlikely by 1; its first row
    has no score -> the differences too, token by token [B, T]."""
    t = trainer(reward=lambda prompts, responses: [None, *(float(len(r)) for r in responses[1:])])
    rollout = t.rollout([*t.prompts, *t.prompts[:2]], 1, purpose="rollout")
    shifts = torch.tensor([0.0, 1.5, -1.0, 1.5, 0.0, 1.5, 0.0, 1.5])
    wrong = [row + shift for row, shift in zip(rollout.policy_log_probs, shifts.tolist(), strict=True)]
    return t, replace(rollout, policy_log_probs=wrong), t.scorer(rollout), shifts


def check_mismatch(metrics: dict[str, float], shifts: torch.Tensor) -> None:
    w = (-shifts.double()).exp()
    assert metrics["rollout/mismatch"] == pytest.approx(float(shifts.abs().mean()), abs=1e-4)
    assert metrics["rollout/mismatch_max"] == pytest.approx(1.5, abs=1e-4)
    assert metrics["rollout/ess"] == pytest.approx(float(w.sum() ** 2 / (len(w) * w.square().sum())), abs=1e-4)


def test_what_decoding_and_training_differ_by_is_measured_and_weighted():
    t, rollout, scores, shifts = misreported()
    experience, epochs, metrics = experience_of(t, rollout, scores)
    mask = experience.token_mask
    of_token = shifts[:, None].expand(mask.shape)[mask]
    check_mismatch(metrics, of_token)
    expected = (-of_token).exp().clamp(max=t.config.importance_cap)  # exp(1) is capped
    assert t.config.importance_cap == 2.0
    assert torch.allclose(experience.weights[mask], expected, atol=1e-4)
    weights = token_weights(experience, epochs[0][0], t.config)
    assert torch.equal(experience.tokens([2, 3], weights).weights, experience.weights[2:4][mask[2:4]])


def test_with_old_log_probs_of_decoding_the_first_update_measures_the_difference():
    t, rollout, scores, shifts = misreported()
    t = trainer(config(old_log_probs="rollout", ppo_epochs=1, mini_batch_size=8, micro_batch_tokens=40))
    experience, epochs, metrics = experience_of(t, rollout, scores)
    assert experience.weights is None and "rollout/mismatch" not in metrics
    metrics = t.learner.update(rollout.rows, experience, epochs, 0)
    assert not experience.response_mask[0].any()  # the row without a score is in no update
    check_mismatch(metrics, shifts[:, None].expand(experience.token_mask.shape)[experience.response_mask])
    assert metrics["policy/ratio"] != 1.0


def test_bf16_trains_on_the_cpu(tmp_path):
    tiny.llama().save_pretrained(tmp_path / "m")
    tiny.tokenizer().save_pretrained(tmp_path / "m")
    cfg = config(total_steps=2, dtype="bf16", ppo_epochs=1, mini_batch_size=8)
    t = PPOTrainer(cfg, policy=str(tmp_path / "m"), reward=reward, prompts=PROMPTS)
    first, second = t
    assert t.policy.dtype == torch.bfloat16 and t.learner.policy_optimizer.masters[0].dtype == torch.float32
    assert first.metrics["kl/ref"] == 0.0 and first.metrics["policy/ratio"] == 1.0
    assert first.metrics["rollout/mismatch"] < 0.2 and second.metrics["kl/ref"] != 0.0
