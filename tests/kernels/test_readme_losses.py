"""The losses that kernels/README.md writes with linear_loss: against float64, and against TRL's and Liger's own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import fastrlhf_kernels as kernels

README = (Path(__file__).parents[2] / "kernels/README.md").read_text(encoding="utf-8")
SHOWN: dict = {}
for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
    if "linear_loss(hidden" in block:
        exec(compile(block, "kernels/README.md", "exec"), SHOWN)
dpo, grpo, distill = (SHOWN[name] for name in ("dpo", "grpo", "distill"))
B, T, H, V = 4, 7, 12, 60


def problem(seed=0):
    torch.manual_seed(seed)
    hidden, weight = torch.randn(B, T, H).requires_grad_(), (torch.randn(V, H) / 2).requires_grad_()
    ids, mask = torch.randint(0, V, (B, T)), torch.arange(T) < torch.tensor([[7], [3], [5], [1]])
    near = naive(hidden, weight, ids).detach()
    old, ref = (near + torch.randn(B, T) / 4 for _ in range(2))
    return hidden, weight, ids, mask, torch.randn(B), old, ref


def naive(hidden, weight, ids, temperature=1.0):
    log_p = torch.log_softmax(hidden @ weight.T / temperature, -1)
    return log_p.gather(-1, ids if ids.ndim == hidden.ndim else ids[..., None]).view(ids.shape)


def agree(ours, theirs, leaves, wide=None, limit=2e-6) -> None:
    """The loss, and the gradients of hidden and weight."""
    assert abs(float(ours.detach()) - float(theirs.detach())) <= limit
    grads = torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, wide or leaves)
    for a, b in zip(*grads, strict=True):
        assert float((a.double() - b.double()).norm()) <= 1e-5 * float(b.norm())


def wide(*tensors):
    return [t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in tensors]


def test_dpo_is_the_papers():
    hidden, weight, ids, mask, _, _, ref = problem()
    ours = dpo(hidden, weight, ids.where(mask, -100), ref, beta=0.3)
    x, w, ref64 = wide(hidden, weight, ref)
    sums = [sum((naive(x, w, ids)[i, t] - ref64[i, t]) for t in range(T) if mask[i, t]) for i in range(B)]
    theirs = -sum(torch.log(torch.sigmoid(0.3 * (sums[i] - sums[i + 2]))) for i in range(2)) / 2
    agree(ours.loss, theirs, (hidden, weight), (x, w))
    margins = torch.stack([sums[0] - sums[2], sums[1] - sums[3]]).detach()
    torch.testing.assert_close(ours.stats["margin"].double(), margins, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_grpo_is_trls(level):
    """TRL 1.16, GRPOTrainer._compute_loss, written token by token."""
    hidden, weight, ids, mask, advantages, old, ref = problem()
    options = {"beta": 0.1, "eps": 0.15, "temperature": 0.8}
    ours = grpo(hidden, weight, ids, mask, advantages, old, ref, level=level, **options)
    x, w, old64, ref64 = wide(hidden, weight, old, ref)
    log_probs, total = naive(x, w, ids, 0.8), 0.0
    for i in range(B):
        length, of_row = int(mask[i].sum()), 0.0
        mean = (log_probs[i, :length] - old64[i, :length]).mean()
        for t in range(length):
            ratio = torch.exp(log_probs[i, t] - old64[i, t] if level == "token" else mean)
            pair = ratio * advantages[i], ratio.clamp(0.85, 1.15) * advantages[i]
            d = ref64[i, t] - log_probs[i, t]
            of_row = of_row - torch.min(*pair) + 0.1 * (torch.exp(d) - d - 1)
        total = total + of_row / length / B
    agree(ours.loss, total, (hidden, weight), (x, w))


def test_distillation_is_the_kl_of_the_teachers_tokens():
    hidden, weight, *_ = problem()
    teacher = torch.log_softmax(torch.randn(B, T, V), -1)
    top = teacher.topk(5, -1)
    ours = distill(hidden, weight, top.indices, top.values)
    x, w, values = wide(hidden, weight, top.values)
    p, q = torch.softmax(values, -1), torch.softmax(naive(x, w, top.indices), -1)
    agree(ours.loss, (p * (p / q).log()).sum(-1).mean(), (hidden, weight), (x, w))


def test_dpo_and_grpo_are_ligers():
    losses = pytest.importorskip("liger_kernel.chunked_loss", reason="Liger is not installed")
    hidden, weight, ids, mask, advantages, old, ref = problem()
    labels = ids.where(mask, -100)
    leaves = (hidden, weight)
    theirs = losses.LigerFusedLinearDPOLoss(beta=0.3, compiled=False, use_ref_model=False, average_log_prob=False)
    plain = dpo(hidden, weight, labels, torch.zeros(B, T), beta=0.3)  # without a reference, which it takes as a model
    agree(plain.loss, theirs(weight, hidden, labels)[0], leaves)
    for level in ("token", "sequence"):
        module = losses.LigerFusedLinearGRPOLoss(
            beta=0.1, epsilon_low=0.15, epsilon_high=0.15, temperature=0.8, compiled=False, use_ref_model=True,
            loss_type="grpo", importance_sampling_level=level,
        )  # fmt: skip
        given = (hidden, weight, ids, mask.float(), advantages)
        theirs = module(*given, ref_per_token_logps=ref, old_per_token_logps=old)[0]
        ours = grpo(hidden, weight, ids, mask, advantages, old, ref, beta=0.1, eps=0.15, level=level, temperature=0.8)
        agree(ours.loss, theirs, leaves)


def test_the_names_of_trl_give_what_trl_gives():
    utils = pytest.importorskip("trl.trainer.utils", reason="TRL is not installed")
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 90)
    for index in (torch.randint(0, 90, (2, 5)), torch.randint(0, 90, (2, 5, 4))):
        theirs = utils.selective_log_softmax(logits, index, temperature=0.7)
        torch.testing.assert_close(kernels.selective_log_softmax(logits, index, temperature=0.7), theirs)
    torch.testing.assert_close(kernels.entropy_from_logits(logits), utils.entropy_from_logits(logits))
