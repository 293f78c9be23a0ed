"""The PPO losses against the float64 reference, their identities, and masks over poison."""

from __future__ import annotations

import pytest
import torch

import fastrlhf_kernels as kernels
from fastrlhf_kernels import reference
from fastrlhf_kernels.eager import chunked
from fastrlhf_kernels.operands import Head, LossOptions, Need, Tokens

NEAR = {"atol": 1e-12, "rtol": 1e-10}
POLICY = {
    "plain": {},
    "clip_higher": {"clip_range": 0.1, "clip_range_high": 0.4},
    "dual_clip": {"dual_clip": 1.5},
    "weights": {"weights": True, "normalizer": 3.5},
    "no_clip": {"clip_range": 0.0, "normalizer": torch.tensor(7)},
}


def batch(shape=(3, 8), dtype=torch.float64, seed=0):
    """log_probs (a leaf), old_log_probs, advantages, mask."""
    torch.manual_seed(seed)
    old = -2 * torch.rand(shape, dtype=dtype)
    log_probs = (old + 0.4 * torch.randn(shape, dtype=dtype)).requires_grad_()
    return log_probs, old, torch.randn(shape, dtype=dtype), torch.rand(shape) > 0.3


def with_weights(options: dict, shape=(3, 8), dtype=torch.float64) -> dict:
    return options | {"weights": torch.rand(shape, dtype=dtype)} if options.get("weights") is True else options


@pytest.mark.parametrize("options", POLICY.values(), ids=POLICY.keys())
def test_policy_loss_agrees_with_the_reference(options):
    log_probs, old, advantages, mask = batch()
    options = with_weights(options)
    ours = kernels.ppo_policy_loss(log_probs, old, advantages, mask, **options)
    theirs, stats = reference.ppo_policy_loss(log_probs, old, advantages, mask, **options)
    torch.testing.assert_close(ours.loss, theirs, **NEAR)
    grads = [torch.autograd.grad(3 * loss, log_probs)[0] for loss in (ours.loss, theirs)]
    torch.testing.assert_close(*grads, **NEAR)
    assert ours.stats.keys() == stats.keys()
    for name, value in stats.items():
        assert ours.stats[name].ndim == 0 and not ours.stats[name].requires_grad
        torch.testing.assert_close(ours.stats[name], value, **NEAR)


@pytest.mark.parametrize(
    "options", [{}, {"clip_range": None}, {"weights": True, "normalizer": 3.5, "clip_range": 0.05}]
)
def test_value_loss_agrees_with_the_reference(options):
    values, old, returns, mask = batch(seed=1)
    options = with_weights(options)
    ours = kernels.ppo_value_loss(values, old, returns, mask, **options)
    theirs, stats = reference.ppo_value_loss(values, old, returns, mask, **options)
    torch.testing.assert_close(ours.loss, theirs, **NEAR)
    torch.testing.assert_close(*(torch.autograd.grad(loss, values)[0] for loss in (ours.loss, theirs)), **NEAR)
    for name, value in stats.items():
        torch.testing.assert_close(ours.stats[name], value.detach(), **NEAR)


def test_explained_variance_from_the_sums():
    values, old, returns, mask = batch(seed=2)
    parts = [kernels.ppo_value_loss(values[i], old[i], returns[i], mask[i]).stats for i in range(3)]
    total = {name: sum(part[name] for part in parts) for name in parts[0]}
    mean = total["sum_return"] / total["count"]
    explained = 1 - total["sum_sq_error"] / (total["sum_return_sq"] - total["count"] * mean**2)
    error = (returns - values.detach())[mask]
    torch.testing.assert_close(explained, 1 - (error**2).mean() / returns[mask].var(unbiased=False), **NEAR)


def test_ratio_one():
    log_probs, _, advantages, mask = batch()
    result = kernels.ppo_policy_loss(log_probs, log_probs.detach(), advantages, mask)
    torch.testing.assert_close(result.loss, -advantages[mask].mean(), **NEAR)
    assert result.stats["ratio"] == 1 and result.stats["clip_frac"] == 0 and result.stats["approx_kl"] == 0
    (grad,) = torch.autograd.grad(result.loss, log_probs)
    torch.testing.assert_close(grad, torch.where(mask, -advantages / mask.sum(), 0), **NEAR)


def test_clipped_tokens_have_no_gradient_and_the_others_all_of_it():
    """A > 0 above the range, A < 0 below it: nothing. The other two corners: -A ratio."""
    ratio = torch.tensor([1.5, 0.5, 1.5, 0.5, 1.0], dtype=torch.float64)
    advantages = torch.tensor([1.0, -1.0, -1.0, 1.0, 1.0], dtype=torch.float64)
    log_probs = ratio.log().requires_grad_()
    result = kernels.ppo_policy_loss(log_probs, torch.zeros(5), advantages, torch.ones(5).bool(), normalizer=1.0)
    (grad,) = torch.autograd.grad(result.loss, log_probs)
    torch.testing.assert_close(grad, torch.tensor([0, 0, 1.5, -0.5, -1.0], dtype=torch.float64), **NEAR)
    torch.testing.assert_close(result.loss, torch.tensor(-1.2 + 0.8 + 1.5 - 0.5 - 1.0, dtype=torch.float64), **NEAR)
    assert result.stats["clip_frac"] == 2
    wider = kernels.ppo_policy_loss(
        log_probs, torch.zeros(5), advantages, torch.ones(5).bool(), clip_range_high=0.6, normalizer=1.0
    )
    torch.testing.assert_close(
        torch.autograd.grad(wider.loss, log_probs)[0][0], torch.tensor(-1.5, dtype=torch.float64), **NEAR
    )


def test_the_whole_gradient_at_the_edge_of_the_clip_range():
    """clip_range 0 and ratio 1: both branches are equal, and the gradient is that of the unclipped one."""
    log_probs = torch.zeros(2).requires_grad_()
    loss = kernels.ppo_policy_loss(
        log_probs, torch.zeros(2), torch.tensor([1.0, -1.0]), torch.ones(2).bool(), clip_range=0.0
    ).loss
    assert torch.autograd.grad(loss, log_probs)[0].tolist() == [-0.5, 0.5]
    values = torch.tensor([1.0]).requires_grad_()
    loss = kernels.ppo_value_loss(values, torch.ones(1), torch.zeros(1), torch.ones(1).bool(), clip_range=0.0).loss
    assert loss == 0.5 and torch.autograd.grad(loss, values)[0] == 1


def test_dual_clip_bounds_the_loss_of_negative_advantages():
    log_probs = torch.tensor([3.0, 3.0]).requires_grad_()
    advantages = torch.tensor([-2.0, 2.0])
    result = kernels.ppo_policy_loss(
        log_probs, torch.zeros(2), advantages, torch.ones(2).bool(), dual_clip=3.0, normalizer=1
    )
    torch.testing.assert_close(result.loss, torch.tensor(6.0 - 2.4))
    assert (torch.autograd.grad(result.loss, log_probs)[0] == 0).all()


def test_masked_entries_are_never_multiplied_in():
    log_probs, old, advantages, mask = batch(dtype=torch.float32)
    weights = torch.rand(3, 8)
    results = []
    for poison in (0.0, torch.nan, torch.inf, -torch.inf, 1e4):
        tensors = [torch.where(mask, t.detach(), poison) for t in (log_probs, old, advantages, weights)]
        leaf = tensors[0].requires_grad_()
        policy = kernels.ppo_policy_loss(leaf, *tensors[1:3], mask, weights=tensors[3])
        value = kernels.ppo_value_loss(leaf, *tensors[1:3], mask.int(), weights=tensors[3])
        grads = [torch.autograd.grad(x.loss, leaf)[0] for x in (policy, value)]
        assert all((grad[~mask] == 0).all() for grad in grads)
        results.append((policy.loss, value.loss, *grads, *policy.stats.values(), *value.stats.values()))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_what_the_mask_keeps_propagates():
    for poison in (torch.nan, torch.inf):
        advantages = torch.tensor([1.0, poison])
        result = kernels.ppo_policy_loss(torch.zeros(2), torch.zeros(2), advantages, torch.ones(2).bool())
        assert not torch.isfinite(result.loss)
        assert not torch.isfinite(
            kernels.ppo_value_loss(torch.zeros(2), torch.zeros(2), advantages, torch.ones(2).bool()).loss
        )


@pytest.mark.parametrize("log_ratio", [1000.0, -1000.0, torch.inf])
def test_extreme_ratios(log_ratio):
    log_probs = torch.tensor([log_ratio / 2, log_ratio / 2]).requires_grad_()
    advantages = torch.tensor([1.0, 0.0])
    result = kernels.ppo_policy_loss(log_probs, -log_probs.detach(), advantages, torch.ones(2).bool(), normalizer=1.0)
    assert result.loss == (-1.2000000476837158 if log_ratio > 0 else 0.0)
    assert (torch.autograd.grad(result.loss, log_probs)[0] == 0).all()


def test_empty_masks_and_no_tokens():
    for shape, mask in (((2, 3), torch.zeros(2, 3)), ((0, 3), torch.zeros(0, 3)), ((0,), torch.zeros(0))):
        mask = mask.bool()
        x = torch.full(shape, torch.nan).requires_grad_()
        for result in (kernels.ppo_policy_loss(x, x, x, mask), kernels.ppo_value_loss(x, x, x, mask)):
            assert result.loss == 0 and all(value == 0 for value in result.stats.values())
            assert (torch.autograd.grad(result.loss, x)[0] == 0).all()
        hidden = torch.full((*shape, 4), torch.nan).requires_grad_()
        weight = torch.randn(9, 4).requires_grad_()
        labels = torch.full(shape, 10**9)
        result = kernels.linear_ppo_loss(hidden, weight, labels, x, x, mask, entropy_coef=0.1)
        assert result.loss == 0 and all((value == 0).all() for value in result.stats.values())
        for grad in torch.autograd.grad(result.loss, (hidden, weight)):
            assert (grad == 0).all()


def test_micro_batches_add_up():
    """With the normalizer of the whole batch, losses, statistics and gradients are sums over any partition."""
    log_probs, old, advantages, mask = batch((8, 5))
    count = mask.sum()
    whole = kernels.ppo_policy_loss(log_probs, old, advantages, mask)
    (grad,) = torch.autograd.grad(whole.loss, log_probs)
    for size in (1, 3, 8):
        parts = [
            kernels.ppo_policy_loss(*(t[i : i + size] for t in (log_probs, old, advantages, mask)), normalizer=count)
            for i in range(0, 8, size)
        ]
        torch.testing.assert_close(sum(p.loss for p in parts), whole.loss, **NEAR)
        for name, value in whole.stats.items():
            torch.testing.assert_close(sum(p.stats[name] for p in parts), value, **NEAR)
        (summed,) = torch.autograd.grad(sum(p.loss for p in parts), log_probs)
        torch.testing.assert_close(summed, grad, **NEAR)


# --- linear_ppo_loss --------------------------------------------------------------------------------------------------

LINEAR = {
    "plain": {},
    "clip": {"clip_range": 0.05, "clip_range_high": 0.3, "dual_clip": 1.2, "weights": True, "normalizer": 5.0},
    "entropy": {"entropy_coef": 0.3},
    "kl_k1": {"kl_coef": 0.2, "kl_estimator": "k1"},
    "kl_k2": {"kl_coef": 0.2, "kl_estimator": "k2"},
    "kl_k3": {"kl_coef": 0.2},
    "kl_abs": {"kl_coef": 0.2, "kl_estimator": "abs", "entropy_coef": -0.1},
    "head": {"bias": True, "temperature": "per token", "logit_scale": 0.8, "logit_softcap": 4.0, "lora": True},
    "all": {"bias": True, "temperature": 0.7, "logit_softcap": 4.0, "lora": True, "kl_coef": 0.1, "entropy_coef": 0.1},
}


def linear_problem(options: dict, shape=(2, 6), width=9, vocabulary=70, dtype=torch.float64, grad=True):
    torch.manual_seed(0)
    hidden = torch.randn(*shape, width, dtype=dtype).requires_grad_(grad)
    weight = torch.randn(vocabulary, width, dtype=dtype).requires_grad_(grad)
    labels, mask = torch.randint(0, vocabulary, shape), torch.rand(shape) > 0.25
    options, leaves = dict(options), [hidden, weight]
    if options.get("bias"):
        options["bias"] = torch.randn(vocabulary, dtype=dtype).requires_grad_(grad)
        leaves.append(options["bias"])
    if options.get("lora"):
        pair = [torch.randn(*s, dtype=dtype).requires_grad_(grad) for s in ((2, width), (vocabulary, 2))]
        options["lora"] = (*pair, 0.4)
        leaves += pair
    if options.get("temperature") == "per token":
        options["temperature"] = torch.rand(shape, dtype=dtype) + 0.5
    head = {k: v for k, v in options.items() if k in ("bias", "lora", "temperature", "logit_scale", "logit_softcap")}
    with torch.no_grad():
        log_probs = reference.linear_log_probs(hidden, weight, labels, **head)
    old = log_probs + 0.3 * torch.randn(shape, dtype=dtype)
    if "kl_coef" in options:
        options["ref_log_probs"] = log_probs + 0.2 * torch.randn(shape, dtype=dtype)
    return leaves, labels, old, torch.randn(shape, dtype=dtype), mask, with_weights(options, shape, dtype)


@pytest.mark.parametrize("options", LINEAR.values(), ids=LINEAR.keys())
def test_linear_ppo_loss_agrees_with_the_reference(options):
    leaves, labels, old, advantages, mask, options = linear_problem(options)
    ours = kernels.linear_ppo_loss(*leaves[:2], labels, old, advantages, mask, **options)
    theirs, stats = reference.linear_ppo_loss(*leaves[:2], labels, old, advantages, mask, **options)
    torch.testing.assert_close(ours.loss, theirs, **NEAR)
    assert ours.stats.keys() == stats.keys()
    for name, value in stats.items():
        assert not ours.stats[name].requires_grad
        torch.testing.assert_close(ours.stats[name], value, **NEAR)
    grads = [torch.autograd.grad(-2.5 * loss, leaves) for loss in (ours.loss, theirs)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, **NEAR)


@pytest.mark.parametrize("tiles", [chunked.Tiles(1, 70), chunked.Tiles(3, 8), chunked.Tiles(100, 33)])
def test_chunks_do_not_change_the_result(tiles):
    leaves, labels, old, advantages, _, options = linear_problem(LINEAR["all"], shape=(11,))
    head = Head(*leaves[:2], labels, leaves[2], None, 0.7, 1.0, 4.0, *leaves[3:], 0.4)
    settings = LossOptions(0.2, 0.2, None, 0.1, "k3", 0.1)
    tokens = Tokens(old, advantages, torch.ones(11).bool(), None, options["ref_log_probs"])
    count = torch.tensor(11.0, dtype=torch.float64)
    with torch.no_grad():
        loss, log_probs, entropy, grads = chunked.ppo_sweep(
            chunked.ScaledHead.build(head), labels, tokens, count, settings, Need(*[True] * 4), tiles
        )
    exact_loss, stats = reference.linear_ppo_loss(*leaves[:2], labels, old, advantages, torch.ones(11), **options)
    torch.testing.assert_close((loss - 0.1 * entropy).mean(), exact_loss, **NEAR)
    torch.testing.assert_close(log_probs, stats["log_probs"], **NEAR)
    exact_grads = torch.autograd.grad(exact_loss, leaves)
    for a, b in zip(grads.finish(), exact_grads, strict=True):
        torch.testing.assert_close(a, b, **NEAR)


def test_linear_ppo_loss_is_the_two_functions_in_a_row():
    leaves, labels, old, advantages, mask, _ = linear_problem({}, dtype=torch.float32)
    fused = kernels.linear_ppo_loss(*leaves, labels, old, advantages, mask)
    log_probs, entropy = kernels.linear_log_probs(*leaves, labels, return_entropy=True)
    composed = kernels.ppo_policy_loss(log_probs, old, advantages, mask)
    torch.testing.assert_close(fused.loss, composed.loss)
    torch.testing.assert_close(fused.stats["log_probs"], torch.where(mask, log_probs, 0).detach())
    torch.testing.assert_close(fused.stats["token_entropy"], torch.where(mask, entropy, 0).detach())
    torch.testing.assert_close(fused.stats["entropy"], entropy[mask].mean().detach())
    for name, value in composed.stats.items():
        torch.testing.assert_close(fused.stats[name], value)
    grads = [torch.autograd.grad(x.loss, leaves) for x in (fused, composed)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_masked_rows_of_linear_ppo_loss_may_hold_anything():
    leaves, labels, old, advantages, mask, _ = linear_problem({}, dtype=torch.float32)
    results = []
    for poison in (0.0, torch.nan, torch.inf):
        hidden = torch.where(mask[..., None], leaves[0].detach(), poison).requires_grad_()
        weight = leaves[1].detach().clone().requires_grad_()
        others = [torch.where(mask, t, poison) for t in (old, advantages, old)]
        wrong = torch.where(mask, labels, -(10**9))
        result = kernels.linear_ppo_loss(
            hidden, weight, wrong, *others[:2], mask, ref_log_probs=others[2], kl_coef=0.1, entropy_coef=0.1
        )
        result.loss.backward()
        assert (hidden.grad[~mask] == 0).all() and (result.stats["log_probs"][~mask] == 0).all()
        results.append((result.loss.detach(), *result.stats.values(), hidden.grad, weight.grad))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("frozen", [(), (0,), (1,), (0, 1, 2, 3, 4), (3, 4), (2,)])
def test_linear_ppo_loss_computes_only_what_is_wanted(frozen):
    leaves, labels, old, advantages, mask, options = linear_problem(LINEAR["all"])
    wanted = torch.autograd.grad(
        reference.linear_ppo_loss(*leaves[:2], labels, old, advantages, mask, **options)[0], leaves
    )
    for i in frozen:
        leaves[i].requires_grad_(False)
    result = kernels.linear_ppo_loss(*leaves[:2], labels, old, advantages, mask, **options)
    assert result.loss.requires_grad == (len(frozen) < 5)
    if result.loss.requires_grad:
        result.loss.backward()
    for i, (leaf, grad) in enumerate(zip(leaves, wanted, strict=True)):
        if i in frozen:
            assert leaf.grad is None
        else:
            torch.testing.assert_close(leaf.grad, grad, **NEAR)


def test_backward_twice_through_a_retained_graph():
    leaves, labels, old, advantages, mask, _ = linear_problem({}, dtype=torch.float32)
    loss = kernels.linear_ppo_loss(*leaves, labels, old, advantages, mask).loss
    loss.backward(retain_graph=True)
    first = [leaf.grad.clone() for leaf in leaves]
    loss.backward(retain_graph=True)
    (loss * 2).backward()
    for leaf, grad in zip(leaves, first, strict=True):
        torch.testing.assert_close(leaf.grad, 4 * grad)


def test_half_gradients_of_linear_ppo_loss_keep_fp32_until_the_end():
    """A loss scale of 2**16 must not act on gradients that fp16 has already flushed to zero."""
    leaves, labels, old, advantages, mask, _ = linear_problem({}, dtype=torch.float32)
    half = [leaf.detach().half().requires_grad_() for leaf in leaves]
    loss = kernels.linear_ppo_loss(*half, labels, old, advantages, mask, normalizer=1e7).loss
    (loss * 2.0**16).backward()
    exact_leaves = [leaf.detach().double().requires_grad_() for leaf in half]
    exact_loss, _ = reference.linear_ppo_loss(
        *exact_leaves, labels, old.double(), advantages.double(), mask, normalizer=1e7
    )
    for leaf, grad in zip(half, torch.autograd.grad(exact_loss * 2.0**16, exact_leaves), strict=True):
        assert leaf.grad.dtype == torch.float16
        assert float((leaf.grad.double() - grad).norm() / grad.norm()) < 1e-3


def test_step_zero_has_ratio_exactly_one():
    """old_log_probs from linear_ppo_loss itself with the same rows: on the CPU the ratio is 1 to the bit. (Triton sums
    relative to the old log-probs, tests/triton_kernels has its bound.)"""
    leaves, labels, old, advantages, mask, _ = linear_problem({}, shape=(40,), dtype=torch.float32)
    first = kernels.linear_ppo_loss(*leaves, labels, old, advantages, mask, backend="torch")
    again = kernels.linear_ppo_loss(*leaves, labels, first.stats["log_probs"], advantages, mask, backend="torch")
    assert again.stats["ratio"] == 1 and again.stats["approx_kl"] == 0 and again.stats["clip_frac"] == 0


def test_a_mask_with_one_token():
    """The loss is that of the token itself, and nothing else has a gradient."""
    log_probs, old, advantages, mask = batch(dtype=torch.float32)
    mask[:], mask[1, 4] = False, True
    for function in (kernels.ppo_policy_loss, kernels.ppo_value_loss):
        tensors = [torch.where(mask, t.detach(), torch.nan) for t in (log_probs, old, advantages)]
        leaf, one = tensors[0].requires_grad_(), [t.detach()[1:2, 4:5].double() for t in (log_probs, old, advantages)]
        result = function(leaf, *tensors[1:], mask)
        exact_leaf = one[0].requires_grad_()
        exact, stats = getattr(reference, function.__name__)(exact_leaf, *one[1:], torch.ones(1, 1))
        torch.testing.assert_close(result.loss.double(), exact.detach(), atol=1e-6, rtol=1e-5)
        for name, value in stats.items():
            torch.testing.assert_close(result.stats[name].double(), value.detach().double(), atol=1e-6, rtol=1e-5)
        (grad,) = torch.autograd.grad(result.loss, leaf)
        (exact_grad,) = torch.autograd.grad(exact, exact_leaf)
        torch.testing.assert_close(grad[1, 4].double(), exact_grad[0, 0], atol=1e-6, rtol=1e-5)
        assert (grad[~mask] == 0).all()
