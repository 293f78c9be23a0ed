"""linear_loss: any function of log-probs against a float64 reference, its products counted, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastrlhf_kernels as kernels
from fastrlhf_kernels import backend, ops, reference

HEADS = {
    "plain": {},
    "head": {"bias": True, "temperature": "per row", "logit_scale": 0.8, "logit_softcap": 4.0, "lora": True},
}
ROW = 128 * 4  # bytes of a row of fp32 logits of a vocabulary of 70, which is stored as 128 columns
IGNORED = 7  # a column of the vocabulary too


def problem(head: str, several: int = 0, n: int = 11, dtype=torch.float32, vocabulary: int = 70):
    """(leaves, labels, options, loss_fn): a loss that couples tokens, labels and entropies; some labels are ignored."""
    torch.manual_seed(1)
    make = lambda *shape: (torch.randn(*shape, dtype=torch.float64) / 2).to(dtype).requires_grad_()  # noqa: E731
    leaves = {"hidden": make(n, 9), "weight": make(vocabulary, 9)}
    options = {name: value for name, value in HEADS[head].items() if isinstance(value, float)}
    if "bias" in HEADS[head]:
        leaves |= {"bias": make(vocabulary), "a": make(3, 9), "b": make(vocabulary, 3)}
        options["temperature"] = torch.rand(n) + 0.5
    labels = torch.randint(8, vocabulary, (n, several) if several else (n,))
    labels[3] = IGNORED
    if several > 2:
        labels[5, 1], labels[6, 2] = IGNORED, labels[6, 0]  # one ignored, one twice
    return leaves, labels, options | {"ignore_index": IGNORED}, Loss(n)


class Loss:
    """The square of a mean, a product of tokens far apart, and the entropies."""

    def __init__(self, n: int):
        self.advantages = torch.linspace(-1, 2, n)

    def __call__(self, log_probs, entropy):
        advantages = self.advantages.to(log_probs).view(-1, *[1] * (log_probs.ndim - 1))
        first, second = log_probs.flatten()[:4], log_probs.flatten()[-4:]
        loss = (advantages * log_probs).mean() ** 2 + (first * second).tanh().sum() + 0.3 * entropy.mean().sin()
        return loss, {"mean": log_probs.mean(), "note": "kept as it is"}


def arguments(leaves: dict, options: dict) -> tuple[list[torch.Tensor], dict]:
    more = dict(options)
    if "a" in leaves:
        more |= {"bias": leaves["bias"], "lora": (leaves["a"], leaves["b"], 0.4)}
    return [leaves["hidden"], leaves["weight"]], more


def exact(leaves, labels, options, loss_fn):
    """Loss and gradients in float64, from all logits."""
    leaves = {name: t.detach().double().requires_grad_() for name, t in leaves.items()}
    (hidden, weight), options = arguments(leaves, options)
    ignore_index, temperature = options.pop("ignore_index"), options.pop("temperature", None)
    columns = labels if labels.ndim == 2 else labels[:, None]
    keep = columns != ignore_index
    live = keep.any(1)
    logits = reference.linear_logits(hidden, weight, live, **options)
    log_p = torch.log_softmax(logits if temperature is None else logits / temperature.double()[:, None], -1)
    log_probs = log_p.gather(1, columns).where(keep, 0.0).view(labels.shape)
    loss, stats = loss_fn(log_probs, -(log_p.exp() * log_p).sum(1).where(live, 0.0))
    return loss.detach(), torch.autograd.grad(loss, list(leaves.values())), log_probs.detach()


@pytest.mark.parametrize("workspace", [None, 6 * ROW, ROW], ids=["all rows kept", "some", "one"])
@pytest.mark.parametrize("several", [0, 1, 5])
@pytest.mark.parametrize("head", HEADS)
def test_loss_and_gradients_are_those_of_all_logits(head, several, workspace):
    leaves, labels, options, loss_fn = problem(head, several)
    (hidden, weight), more = arguments(leaves, options)
    loss, stats = kernels.linear_loss(hidden, weight, labels, loss_fn, return_entropy=True, workspace=workspace, **more)
    want, gradients, log_probs = exact(leaves, labels, options, loss_fn)
    assert abs(float(loss.detach()) - float(want)) <= 2e-6
    assert float((stats["log_probs"].double() - log_probs).abs().max()) <= 5e-6
    assert (stats["log_probs"][labels == IGNORED] == 0).all() and stats["note"] == "kept as it is"
    assert not stats["mean"].requires_grad and stats["token_entropy"].shape == (11,)
    for ours, theirs in zip(torch.autograd.grad(loss, list(leaves.values())), gradients, strict=True):
        assert float((ours.double() - theirs).norm()) <= 1e-5 * float(theirs.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("workspace", [None, 6 * ROW])
@pytest.mark.parametrize("several", [0, 5])
def test_half_precision_rounds_gradients_alone(several, workspace, dtype):
    """The bounds of `linear_ppo_loss`: the loss as exact as in fp32, gradients rounded to the dtype."""
    leaves, labels, options, loss_fn = problem("head", several, dtype=dtype)
    (hidden, weight), more = arguments(leaves, options)
    loss, stats = kernels.linear_loss(hidden, weight, labels, loss_fn, return_entropy=True, workspace=workspace, **more)
    want, gradients, log_probs = exact(leaves, labels, options, loss_fn)
    assert loss.dtype == torch.float32 and abs(float(loss.detach()) - float(want)) <= 1e-5
    assert float((stats["log_probs"].double() - log_probs).abs().max()) <= 2e-5
    limit = 1.2e-2 if dtype == torch.bfloat16 else 2e-3
    for leaf, ours, theirs in zip(
        leaves.values(), torch.autograd.grad(loss, list(leaves.values())), gradients, strict=True
    ):
        assert ours.dtype == leaf.dtype and float((ours.double() - theirs).norm()) <= limit * float(theirs.norm())


@pytest.mark.parametrize("several", [0, 3])
def test_float64_to_rounding(several):
    leaves, labels, options, loss_fn = problem("head", several, dtype=torch.float64)
    options["temperature"] = options["temperature"].double()
    want, gradients, _ = exact(leaves, labels, options, loss_fn)
    (hidden, weight), more = arguments(leaves, options)
    for workspace in (None, 4 * 2 * ROW):
        loss, _ = kernels.linear_loss(hidden, weight, labels, loss_fn, return_entropy=True, workspace=workspace, **more)
        torch.testing.assert_close(loss, want, atol=1e-12, rtol=1e-10)
        for a, b in zip(torch.autograd.grad(loss, list(leaves.values())), gradients, strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-9)


class Products(TorchDispatchMode):
    """Multiplications in matrix products, inside our operators too."""

    def __init__(self):
        super().__init__()
        self.multiplied = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastrlhf":  # run its body under this mode; calling it would hide the body
            with self:
                return getattr(ops, func._schema.name.split("::")[1]).run(*args)
        name = func._schema.name.split("::")[1]
        if name in ("mm", "addmm", "addmm_"):
            a, b = args[-2:]
            self.multiplied += a.shape[0] * a.shape[1] * b.shape[1]
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(backend.INTERPRET, reason="tests/triton_kernels counts launches too")
@pytest.mark.parametrize(("workspace", "expected"), [(None, 3.0), (32 * 512 * 4, 3.5), (512 * 4, 4 - 1 / 64)])
def test_three_products_and_a_fourth_for_rows_that_are_not_kept(workspace, expected):
    hidden, weight = torch.randn(64, 16).requires_grad_(), torch.randn(512, 16).requires_grad_()
    labels = torch.randint(0, 512, (64,))
    with Products() as products:
        kernels.linear_loss(hidden, weight, labels, torch.mean, workspace=workspace).loss.backward()
    assert products.multiplied == expected * 64 * 16 * 512
    with Products() as products, torch.no_grad():
        kernels.linear_loss(hidden, weight, labels, torch.mean)
    assert products.multiplied == 64 * 16 * 512
    with Products() as products:
        kernels.linear_log_probs(hidden, weight, labels).mean().backward()
    assert products.multiplied == 4 * 64 * 16 * 512


def test_the_loss_of_ppo_is_that_of_the_fused_function():
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 6, 8).requires_grad_(), torch.randn(50, 8).requires_grad_()
    labels, old, advantages = torch.randint(0, 50, (2, 6)), torch.randn(2, 6) - 4, torch.randn(2, 6)
    mask = torch.rand(2, 6) > 0.2
    loss, stats = kernels.linear_loss(
        hidden, weight, labels.where(mask, -100), lambda lp: kernels.ppo_policy_loss(lp, old, advantages, mask)
    )
    fused = kernels.linear_ppo_loss(hidden, weight, labels, old, advantages, mask)
    torch.testing.assert_close(loss, fused.loss)
    torch.testing.assert_close(stats["clip_frac"], fused.stats["clip_frac"])
    for a, b in zip(*(torch.autograd.grad(one, (hidden, weight)) for one in (loss, fused.loss)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_on_a_cpu_the_log_probs_are_those_of_linear_log_probs_to_the_bit():
    """So that a ratio to log-probs from there is exactly one at the first step."""
    torch.manual_seed(0)
    hidden, weight, labels = torch.randn(40, 24).requires_grad_(), torch.randn(900, 24), torch.randint(0, 900, (40,))
    for return_entropy in (False, True):
        options = {"return_entropy": return_entropy, "backend": "torch"}
        fn = (lambda lp, h: lp.sum()) if return_entropy else torch.sum
        stats = kernels.linear_loss(hidden, weight, labels, fn, **options).stats
        plain = kernels.linear_log_probs(hidden, weight, labels, **options)
        assert torch.equal(stats["log_probs"], plain[0] if return_entropy else plain)


def test_gradients_flow_to_what_the_loss_closes_over_and_backward_may_come_twice():
    torch.manual_seed(0)
    hidden, weight = torch.randn(6, 4).requires_grad_(), torch.randn(20, 4)
    labels, beta = torch.randint(0, 20, (6,)), torch.tensor(0.7, requires_grad=True)
    loss, stats = kernels.linear_loss(hidden, weight, labels, lambda lp: (beta * lp).mean())
    loss.backward(retain_graph=True)
    once = hidden.grad.clone()
    torch.testing.assert_close(beta.grad, stats["log_probs"].mean())
    loss.backward()
    torch.testing.assert_close(hidden.grad, 2 * once)


def test_rows_that_do_not_count_may_hold_nan_and_there_may_be_none():
    torch.manual_seed(0)
    hidden, weight = torch.randn(4, 3, 8), torch.randn(30, 8).requires_grad_()
    labels = torch.randint(0, 30, (4, 3, 2))
    labels[1] = -100
    hidden[1] = torch.nan
    hidden.requires_grad_()
    loss, stats = kernels.linear_loss(hidden, weight, labels, torch.sum)
    loss.backward()
    assert torch.isfinite(weight.grad).all() and (hidden.grad[1] == 0).all() and (stats["log_probs"][1] == 0).all()
    assert hidden.grad[0].abs().sum() > 0
    for shape in ((0,), (0, 3), (2, 0, 3)):
        empty = torch.zeros(*shape[:-1], 8) if len(shape) > 1 else torch.zeros(0, 8)
        empty.requires_grad_()
        weight.grad = None
        loss, _ = kernels.linear_loss(empty, weight, torch.zeros(shape, dtype=torch.int64), torch.sum)
        loss.backward()
        assert loss == 0 and (weight.grad == 0).all()


H, W, Y = torch.zeros(3, 4).requires_grad_(), torch.zeros(7, 4), torch.tensor([0, 1, 6])
ONES = torch.ones((), requires_grad=True)
FUNCTIONS = {  # what is wrong with them -> the function, and what is said
    "detaches": (lambda lp: lp.detach().mean(), "a loss without a gradient to log_probs"),
    "another graph": (lambda lp: ONES * lp.detach().mean(), "a loss without a gradient to log_probs"),
    "a loss a token": (lambda lp: -lp, "loss_fn returned a tensor of shape (3,) and torch.float32"),
    "a number": (lambda lp: 1.0, "must return a 0-d tensor or (0-d tensor, dict), got float"),
    "three things": (lambda lp: (lp.mean(), 1, 2), "got (Tensor, int, int)"),
    "stats that are none": (lambda lp: (lp.mean(), 1), "got (Tensor, int)"),
    "a mask": (lambda lp: (lp > 0).any(), "of shape () and torch.bool; expected a 0-d loss"),
    "another shape": (lambda lp: lp.unsqueeze_(0).mean(), "changed the shape of log_probs in place, from (3,)"),
    "wants entropies": (lambda lp, h: lp.mean(), "return_entropy is False; pass return_entropy=True"),
    "other parameters": (lambda a, b, c: a.mean(), "as loss_fn(log_probs), but its parameters are (a, b, c)"),
    "no function": ("dpo", "loss_fn must be a function of log_probs, got str"),
}
ARGUMENTS = [
    ({"return_entropy": True, "loss_fn": lambda lp: lp.mean()}, "takes log_probs alone, but return_entropy is True"),
    ({"workspace": 100}, "workspace is 100 bytes, less than one row of logits, 256 bytes for a vocabulary of 7"),
    ({"workspace": 0.5}, "workspace must be a number of bytes, got float"),
    ({"labels": Y[:2]}, "labels has shape (2,); expected (3,), the shape of hidden without its last dimension (and"),
    ({"labels": Y[None, :, None]}, "labels has shape (1, 3, 1); expected (3,)"),
    ({"labels": Y[:, None] + 1}, "labels holds 7, outside [0, 7)"),
    ({"labels": Y[:, None], "temperature": torch.ones(3, 1)}, "temperature has shape (3, 1); expected (3,)"),
]
REFUSED = [({"loss_fn": function}, message) for function, message in FUNCTIONS.values()] + ARGUMENTS


@pytest.mark.parametrize(("given", "message"), REFUSED, ids=[*FUNCTIONS, *(next(iter(a)) for a, _ in ARGUMENTS)])
def test_refused_in_a_sentence(given, message):
    given = {"labels": Y, "loss_fn": torch.mean} | given
    with pytest.raises(ValueError) as refused:
        kernels.linear_loss(H, W, given.pop("labels"), given.pop("loss_fn"), **given)
    assert message in str(refused.value), str(refused.value)


def test_a_detached_loss_is_nothing_wrong_where_no_gradient_is_wanted():
    with torch.no_grad():
        assert float(kernels.linear_loss(H, W, Y, lambda lp: lp.detach().sum()).loss) < 0
    assert float(kernels.linear_loss(H.detach(), W, Y, torch.sum).loss) < 0


# --- names of TRL ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_selective_log_softmax_and_entropy_from_logits(dtype):
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 90).to(dtype).requires_grad_()
    wide = logits.detach().double().requires_grad_()
    for index in (torch.randint(0, 90, (2, 5)), torch.randint(0, 90, (2, 5, 4)).sort().values):
        weights = torch.linspace(-1, 1, index.numel()).view(index.shape)
        log_probs = kernels.selective_log_softmax(logits, index, 0.7)
        columns = index if index.ndim == 3 else index[..., None]
        want = torch.log_softmax(wide / 0.7, -1).gather(-1, columns).view(index.shape)
        assert log_probs.shape == index.shape and float((log_probs - want).abs().max()) <= 2e-6
        grads = [torch.autograd.grad((t * weights).sum(), z)[0] for t, z in ((log_probs, logits), (want, wide))]
        assert float((grads[0] - grads[1]).norm() / grads[1].norm()) <= (1e-2 if dtype == torch.bfloat16 else 1e-6)
    entropy = kernels.entropy_from_logits(logits)
    want = -(torch.softmax(wide, -1) * torch.log_softmax(wide, -1)).sum(-1)
    assert entropy.shape == (2, 5) and float((entropy - want).abs().max()) <= 2e-6
    torch.autograd.grad(entropy.sum(), logits)
    with pytest.raises(ValueError, match="labels holds 90"):
        kernels.selective_log_softmax(logits, torch.full((2, 5, 1), 90))
    with pytest.raises(ValueError, match=r"labels has shape \(5, 4\); expected \(2, 5\)"):
        kernels.selective_log_softmax(logits, torch.zeros(5, 4, dtype=torch.int64))
