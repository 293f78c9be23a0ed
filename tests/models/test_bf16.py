"""bf16 weights on the CPU in every stage: fp32 masters take what bf16 would round away, ratios are within its noise."""

from __future__ import annotations

import pytest
import torch

from fastrlhf import PPOConfig, PPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from fastrlhf.models import saving
from tests import tiny
from tests.runs import PROMPTS, letters

PAIRS = [{"prompt": p, "chosen": "the answer is yes", "rejected": "no"} for p in PROMPTS]
FORMS = {
    "separate": {},
    "packed": {"packing": True},
    "shared trunk": {"critic": "shared_trunk"},
    "lora": {"lora": 4},
    "no critic": {"advantage": "rloo", "samples_per_prompt": 2, "critic_learning_rate": 0},
}
TINY_STEP = 1e-6  # AdamW's first step moves a weight by it; bf16 between 0.25 and 0.5 has steps of 1/512


@pytest.fixture
def policy(tmp_path) -> str:
    saving.write_model(tmp_path / "policy", tiny.llama(), tiny.tokenizer(), [1])
    return str(tmp_path / "policy")


def masters_moved(optimizer, before: list[torch.Tensor]) -> float:
    """Share of the fp32 masters that an update of TINY_STEP moved; the bf16 weights are their rounding."""
    assert optimizer.masters and all(p.dtype == torch.float32 for p in optimizer.masters)
    for param, master in zip(optimizer.params, optimizer.masters, strict=True):
        assert torch.equal(param, master.to(param.dtype))
    pairs = list(zip(optimizer.masters, before, strict=True))
    assert max(float((a - b).detach().abs().max()) for a, b in pairs) < 3 * TINY_STEP
    return sum(int((a != b).sum()) for a, b in pairs) / sum(b.numel() for b in before)


@pytest.mark.parametrize("form", FORMS)
def test_ppo(policy, form):
    cfg = PPOConfig(
        total_steps=1, rollout_batch_size=8, mini_batch_size=4, ppo_epochs=1, max_new_tokens=8, eval_every=0,
        dtype="bf16", learning_rate=TINY_STEP, critic_learning_rate=TINY_STEP, **FORMS[form],
    )  # fmt: skip
    t = PPOTrainer(cfg, policy=policy, reward=letters, prompts=PROMPTS)
    assert t.policy.dtype == torch.bfloat16 and t.policy.lm_head.weight.dtype == torch.bfloat16
    optimizers = t.learner.optimizers()
    before = [[p.detach().clone() for p in o.masters] for o in optimizers]
    rounded = [[p.detach().clone() for p in o.params] for o in optimizers]
    metrics = next(iter(t)).metrics
    assert metrics["policy/ratio"] == pytest.approx(1.0, abs=2e-3) and metrics["kl/ref"] == 0.0
    assert metrics["rollout/mismatch"] < 0.1 and metrics["rollout/ess"] > 0.9
    for optimizer, old, low in zip(optimizers, before, rounded, strict=True):
        moved = masters_moved(optimizer, old)
        assert moved > 0.3
        halves = [(a, b) for a, b in zip(optimizer.params, low, strict=True) if a.dtype == torch.bfloat16]
        large = sum(int((b.abs() > 0.01).sum()) for _, b in halves)
        changed = sum(int(((a != b) & (b.abs() > 0.01)).sum()) for a, b in halves)
        assert changed <= 0.1 * large  # the steps are below what bf16 can show


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_the_other_stages(policy, stage):
    fields = {"total_steps": 1, "mini_batch_size": 4, "eval_every": 0, "dtype": "bf16", "learning_rate": TINY_STEP,
              "lr_schedule": "constant", "eval_fraction": 0.0}  # fmt: skip
    if stage == "sft":
        rows = [{"prompt": r["prompt"], "response": r["chosen"]} for r in PAIRS]
        t = SFTTrainer(SFTConfig(**fields), model=policy, data=rows)
    else:
        t = RewardTrainer(RewardConfig(**fields), model=policy, data=PAIRS)
    assert t.model.dtype == torch.bfloat16
    before = [p.detach().clone() for p in t.optimizer.masters]
    loss = t.train()["loss/train"]
    assert 0.1 < loss < 20 and masters_moved(t.optimizer, before) > 0.3


def test_a_half_precision_policy_follows_its_fp32_twin(policy):
    """Losses and gradient norms of the first update agree to bf16's noise; both answer with the likeliest token."""
    found = []
    for dtype in ("fp32", "bf16"):
        cfg = PPOConfig(total_steps=1, rollout_batch_size=8, mini_batch_size=8, ppo_epochs=1, max_new_tokens=1,
                        top_k=1, eval_every=0, dtype=dtype)  # fmt: skip
        t = PPOTrainer(cfg, policy=policy, reward=lambda p, r: [float(len(x)) for x in p], prompts=PROMPTS)
        found.append(next(iter(t)))
    assert found[0].rollout.response_ids == found[1].rollout.response_ids
    for name in ("policy/grad_norm", "policy/entropy", "value/loss"):
        assert found[1].metrics[name] == pytest.approx(found[0].metrics[name], rel=0.05)
    assert found[1].metrics["policy/entropy"] != found[0].metrics["policy/entropy"]
