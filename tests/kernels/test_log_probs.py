"""token_log_probs and linear_log_probs against the float64 reference, and the inputs that break such kernels."""

from __future__ import annotations

import pytest
import torch

import fastrlhf_kernels as kernels
from fastrlhf_kernels import backend, reference
from fastrlhf_kernels.eager import chunked
from fastrlhf_kernels.operands import Head, Need

OPTIONS = {
    "plain": {},
    "bias": {"bias": True},
    "temperature": {"temperature": 0.7, "logit_scale": 1.3},
    "per_token_temperature": {"temperature": "per token"},
    "softcap": {"logit_softcap": 3.0},
    "lora": {"lora": True},
    "everything": {"bias": True, "temperature": "per token", "logit_scale": 0.8, "logit_softcap": 4.0, "lora": True},
}


def problem(vocabulary: int = 300, width: int = 17, shape: tuple[int, ...] = (3, 7), dtype=torch.float32, **options):
    """(hidden, weight, labels, options) with random tensors for the options that are tensors."""
    torch.manual_seed(0)
    hidden = torch.randn(*shape, width, dtype=dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, dtype=dtype).requires_grad_()
    labels = torch.randint(0, vocabulary, shape)
    if options.get("bias"):
        options["bias"] = torch.randn(vocabulary, dtype=dtype).requires_grad_()
    if options.get("temperature") == "per token":
        options["temperature"] = torch.rand(shape) + 0.5
    if options.get("lora"):
        a, b = torch.randn(3, width, dtype=dtype), torch.randn(vocabulary, 3, dtype=dtype)
        options["lora"] = (a.requires_grad_(), b.requires_grad_(), 0.3)
    return hidden, weight, labels, options


def exact(value):
    """The same arguments in float64, detached, requiring gradients where the original did."""
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.detach().double().requires_grad_(value.requires_grad)
    if isinstance(value, dict):
        return {name: exact(item) for name, item in value.items()}
    return tuple(exact(item) for item in value) if isinstance(value, tuple) else value


def scaled_head(hidden, weight, labels) -> chunked.ScaledHead:
    return chunked.ScaledHead.build(Head(hidden, weight, labels, None, None, 1.0, 1.0, None, None, None, 1.0))


def leaves(*values) -> list[torch.Tensor]:
    found = []
    for value in values:
        if isinstance(value, torch.Tensor) and value.requires_grad:
            found.append(value)
        elif isinstance(value, (dict, tuple)):
            found += leaves(*(value.values() if isinstance(value, dict) else value))
    return found


def close(ours, theirs, tolerance: float) -> None:
    """Largest error relative to the largest entry (or to 1)."""
    error = float((ours.detach().double() - theirs.detach().double()).abs().max()) if ours.numel() else 0.0
    assert error <= tolerance * max(1.0, float(theirs.detach().abs().max())), error


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_linear_log_probs_agrees_with_the_reference(options, dtype):
    hidden, weight, labels, options = problem(dtype=dtype, **options)
    labels[0, 2] = -100
    tolerance = 1e-12 if dtype == torch.float64 else 3e-6
    grads_out = torch.randn(2, *labels.shape, dtype=torch.float64)
    ours = kernels.linear_log_probs(hidden, weight, labels, return_entropy=True, **options)
    arguments = exact((hidden, weight))
    exact_options = exact(options)
    theirs = reference.linear_log_probs(*arguments, labels, return_entropy=True, **exact_options)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == dtype
        close(a, b, tolerance)
    ours = sum((a * g).sum() for a, g in zip(ours, grads_out, strict=True))
    theirs = sum((a * g).sum() for a, g in zip(theirs, grads_out, strict=True))
    inputs, exact_inputs = leaves(hidden, weight, options), leaves(arguments, exact_options)
    assert len(inputs) == len(exact_inputs) >= 2
    for a, b in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, exact_inputs), strict=True):
        close(a, b, tolerance * 4)


@pytest.mark.parametrize("temperature", [1.0, 0.05, 5.0, "per token"])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (2, 2, 3)])
def test_token_log_probs_agrees_with_the_reference(shape, temperature):
    torch.manual_seed(0)
    logits = torch.randn(*shape, 41, dtype=torch.float64).requires_grad_()
    labels = torch.randint(0, 41, shape)
    temperature = torch.rand(shape) + 0.5 if temperature == "per token" else temperature
    before = logits.detach().clone()
    ours = kernels.token_log_probs(logits, labels, temperature=temperature, return_entropy=True)
    theirs = reference.token_log_probs(logits, labels, temperature=temperature, return_entropy=True)
    close(torch.stack(ours), torch.stack(theirs), 1e-12)
    only = kernels.token_log_probs(logits, labels, temperature=temperature)
    close(only, theirs[0], 1e-12)
    weights = torch.randn(2, *shape, dtype=torch.float64)
    for pair in ((ours, theirs), ((only, only * 0), (theirs[0], theirs[0] * 0))):
        grads = [torch.autograd.grad((torch.stack(x) * weights).sum(), logits, retain_graph=True)[0] for x in pair]
        close(*grads, 1e-10)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("vocabulary", [1, 2, 127, 129, 1000, 1536])
@pytest.mark.parametrize("width", [1, 16, 64])
def test_sizes_that_fit_no_tile(vocabulary, width):
    for rows in (1, 127):
        hidden, weight, labels, _ = problem(vocabulary, width, (rows,))
        log_probs = kernels.linear_log_probs(hidden, weight, labels)
        close(log_probs, reference.linear_log_probs(hidden.double(), weight.double(), labels), 1e-5)
        assert (log_probs <= 1e-6).all()


def test_log_probs_over_all_labels_sum_to_one():
    hidden, weight, _, _ = problem(50, 8, (1,))
    every = kernels.linear_log_probs(hidden.expand(50, 8), weight, torch.arange(50))
    assert float(every.detach().logsumexp(0).abs()) < 1e-6


@pytest.mark.parametrize(
    "tiles", [chunked.Tiles(1, 1), chunked.Tiles(4, 64), chunked.Tiles(5, 7), chunked.Tiles(99, 999)]
)
def test_tiles_do_not_change_the_result(tiles):
    hidden, weight, labels, _ = problem(130, 9, (11,), torch.float64)
    labels[3] = 10**6  # out of range: NaN, whatever the tiles
    head = scaled_head(hidden.detach(), weight.detach(), labels)
    log_probs, entropy, m, s = chunked.sweep_forward(head, labels, tiles, entropy=True)
    safe = torch.where(labels < 130, labels, 0)
    exact_log_probs, exact_entropy = reference.linear_log_probs(hidden, weight, safe, return_entropy=True)
    assert log_probs[3].isnan()
    close(log_probs[labels < 130], exact_log_probs[labels < 130], 1e-12)
    close(entropy, exact_entropy, 1e-12)
    g, ge = torch.randn(2, 11, dtype=torch.float64)
    need = Need(True, True, False, False)
    grads = chunked.sweep_backward(head, safe, g, ge, entropy, m, s, tiles, need, torch.float64)
    dx, dw, *_ = grads.finish()
    exact_grads = torch.autograd.grad((exact_log_probs * g + exact_entropy * ge).sum(), (hidden, weight))
    close(dx, exact_grads[0], 1e-11)
    close(dw, exact_grads[1], 1e-11)


@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_huge_logits(scale):
    torch.manual_seed(1)
    logits = torch.randn(4, 30) * scale
    labels = logits.argmax(1)
    log_probs, entropy = kernels.token_log_probs(logits, labels, return_entropy=True)
    assert torch.equal(log_probs, torch.zeros(4)) and torch.equal(entropy, torch.zeros(4))
    hidden, eye = logits[:, :8], torch.eye(8)
    assert torch.equal(kernels.linear_log_probs(hidden, eye, hidden.argmax(1)), torch.zeros(4))


def test_logits_far_below_zero_and_all_equal():
    """A running maximum that starts at 0 instead of -inf fails here (verl, SkyRL)."""
    logits = torch.full((3, 1536), -5000.0)
    uniform = torch.full((3,), -torch.log(torch.tensor(1536.0)))
    hidden, weight = torch.ones(3, 1), torch.full((1536, 1), -5000.0)
    labels = torch.tensor([0, 700, 1535])
    for log_probs, entropy in (
        kernels.token_log_probs(logits, labels, return_entropy=True),
        kernels.linear_log_probs(hidden, weight, labels, return_entropy=True),
    ):
        close(log_probs, uniform, 1e-5)
        close(entropy, -uniform, 1e-5)


def test_suppressed_tokens():
    """Logits of -inf: a whole stretch of the vocabulary, the target itself, a whole row."""
    torch.manual_seed(0)
    bias = torch.zeros(700)
    bias[64:640] = -torch.inf
    hidden, weight = torch.randn(4, 8).requires_grad_(), torch.randn(700, 8).requires_grad_()
    labels = torch.tensor([3, 650, 100, 0])
    logits = (hidden @ weight.T + bias).detach().requires_grad_()
    exact_log_probs = torch.log_softmax(logits.double(), -1).gather(1, labels[:, None])[:, 0]
    for tensors, results in (
        ((logits,), kernels.token_log_probs(logits, labels, return_entropy=True)),
        ((hidden, weight), kernels.linear_log_probs(hidden, weight, labels, bias=bias, return_entropy=True)),
    ):
        log_probs, entropy = results
        assert log_probs[2] == -torch.inf and torch.isfinite(entropy).all()
        close(log_probs[[0, 1, 3]], exact_log_probs[[0, 1, 3]], 1e-5)
        for grad in torch.autograd.grad(log_probs[[0, 1, 3]].sum() + entropy.sum(), tensors):
            assert torch.isfinite(grad).all() and grad.abs().sum() > 0
    nothing = torch.full((2, 5), -torch.inf)
    assert kernels.token_log_probs(nothing, torch.tensor([0, 1])).isnan().all()
    nan = kernels.linear_log_probs(hidden, weight, labels, bias=torch.full((700,), -torch.inf))
    assert nan.isnan().all()


def test_softcap_saturates_quietly():
    hidden, weight = torch.full((2, 4), 50.0).requires_grad_(), torch.randn(20, 4).requires_grad_()
    log_probs, entropy = kernels.linear_log_probs(
        hidden, weight, torch.tensor([0, 19]), logit_softcap=30.0, logit_scale=100.0, return_entropy=True
    )
    for grad in torch.autograd.grad(log_probs.sum() + entropy.sum(), (hidden, weight)):
        assert torch.isfinite(grad).all()
    assert (log_probs >= -60 - 3.1).all()


def test_ignored_rows_are_zero_and_untouched_by_nan():
    hidden, weight, labels, _ = problem(40, 8, (2, 5))
    labels[0, :3], labels[1, 4] = -100, -100
    ignored = labels == -100
    poisoned = hidden.detach().clone()
    poisoned[ignored] = torch.nan
    poisoned[0, 1] = torch.inf
    results = []
    for h in (hidden.detach().clone(), poisoned):
        w = weight.detach().clone().requires_grad_()
        log_probs, entropy = kernels.linear_log_probs(h.requires_grad_(), w, labels, return_entropy=True)
        (log_probs.sum() + entropy.sum()).backward()
        results.append((log_probs.detach(), entropy.detach(), h.grad, w.grad))
        assert (log_probs[ignored] == 0).all() and (entropy[ignored] == 0).all() and (h.grad[ignored] == 0).all()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    logits = torch.randn(2, 5, 40)
    logits[ignored] = torch.nan
    logits.requires_grad_()
    log_probs, entropy = kernels.token_log_probs(logits, labels, return_entropy=True)
    (log_probs.sum() + entropy.sum()).backward()
    assert (log_probs[ignored] == 0).all() and (logits.grad[ignored] == 0).all()
    assert torch.isfinite(logits.grad).all() and torch.isfinite(log_probs).all()


@pytest.mark.parametrize("ignore_index", [-100, -1, 3])
def test_ignore_index_and_label_dtype(ignore_index):
    hidden, weight, labels, _ = problem(40, 8, (6,))
    labels[2] = ignore_index
    results = [
        kernels.linear_log_probs(hidden, weight, labels.to(t), ignore_index=ignore_index)
        for t in (torch.int32, torch.int64)
    ]
    assert torch.equal(*results) and results[0][2] == 0
    everything = torch.full((6,), ignore_index)
    log_probs = kernels.linear_log_probs(hidden, weight, everything, ignore_index=ignore_index)
    assert (log_probs == 0).all()
    for grad in torch.autograd.grad(log_probs.sum(), (hidden, weight)):
        assert (grad == 0).all()


def test_no_rows():
    hidden, weight = torch.zeros(0, 4).requires_grad_(), torch.randn(9, 4).requires_grad_()
    labels = torch.zeros(0, dtype=torch.int64)
    log_probs, entropy = kernels.linear_log_probs(hidden, weight, labels, return_entropy=True)
    assert log_probs.shape == entropy.shape == (0,)
    grads = torch.autograd.grad(log_probs.sum(), (hidden, weight))
    assert grads[0].shape == (0, 4) and (grads[1] == 0).all()
    logits = torch.zeros(0, 3, 9).requires_grad_()
    assert torch.autograd.grad(kernels.token_log_probs(logits, torch.zeros(0, 3).long()).sum(), logits)[0].shape == (
        0,
        3,
        9,
    )


def test_strides():
    torch.manual_seed(0)
    base, table = torch.randn(3, 8, 12), torch.randn(24, 60)
    labels = torch.randint(0, 30, (3, 7))
    cases = [
        (base[:, :-1], table.T[::2, ::2]),  # a slice that cannot be viewed as rows; every other row and column
        (base.transpose(0, 1)[:7].transpose(0, 1), torch.randn(12, 30).T),
        (base[:1, :1].expand(3, 7, 12), torch.randn(30, 40)[:, :12]),
    ]
    for hidden, weight in cases:
        exact_log_probs = reference.linear_log_probs(hidden.double(), weight.double(), labels)
        hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        log_probs = kernels.linear_log_probs(hidden, weight, labels)
        close(log_probs, exact_log_probs, 1e-5)
        dense = [t.detach().contiguous().requires_grad_() for t in (hidden, weight)]
        same = torch.autograd.grad(kernels.linear_log_probs(*dense, labels).sum(), dense)
        for a, b in zip(torch.autograd.grad(log_probs.sum(), (hidden, weight)), same, strict=True):
            close(a, b, 1e-5)
    logits = torch.randn(3, 8, 60)[:, :-1, ::2].requires_grad_()
    log_probs = kernels.token_log_probs(logits, labels)
    close(log_probs, reference.token_log_probs(logits.double(), labels), 1e-5)
    dense = logits.detach().contiguous().requires_grad_()
    grads = [torch.autograd.grad(kernels.token_log_probs(z, labels).sum(), z)[0] for z in (logits, dense)]
    close(*grads, 1e-6)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both", "bias", "lora"])
def test_only_the_gradients_that_are_wanted(frozen):
    hidden, weight, labels, options = problem(40, 8, (6,), bias=True, lora=True)
    full = torch.autograd.grad(
        kernels.linear_log_probs(hidden, weight, labels, **options).sum(), leaves(hidden, weight, options)
    )
    tensors = {
        "hidden": hidden,
        "weight": weight,
        "bias": options["bias"],
        "A": options["lora"][0],
        "B": options["lora"][1],
    }
    groups = {"both": ("hidden", "weight"), "lora": ("A", "B")}
    for name in groups.get(frozen, (frozen,)):
        tensors[name].requires_grad_(False)
    kernels.linear_log_probs(hidden, weight, labels, **options).sum().backward()
    for (_, tensor), grad in zip(tensors.items(), full, strict=True):
        if tensor.requires_grad:
            close(tensor.grad, grad, 1e-6)
        else:
            assert tensor.grad is None
    with torch.no_grad():
        assert not kernels.linear_log_probs(hidden, weight, labels, **options).requires_grad


def test_gradients_of_zero_and_infinity_stay_in_their_rows():
    logits = torch.randn(3, 7).requires_grad_()
    log_probs = kernels.token_log_probs(logits, torch.tensor([0, 1, 2]))
    (grad,) = torch.autograd.grad(log_probs, logits, torch.tensor([0.0, torch.inf, 2.0]))
    assert (grad[0] == 0).all() and not torch.isfinite(grad[1]).any() and torch.isfinite(grad[2]).all()


def test_tied_embedding():
    """The weight is the embedding too: its gradient is the sum of both uses."""
    torch.manual_seed(0)
    weight, ids = torch.randn(30, 8, dtype=torch.float64).requires_grad_(), torch.randint(0, 30, (9,))
    grads = []
    for lib in (kernels, reference):
        hidden = torch.tanh(weight[ids])
        grads.append(torch.autograd.grad(lib.linear_log_probs(hidden[:-1], weight, ids[1:]).sum(), weight)[0])
    close(*grads, 1e-12)


def test_lora_is_the_merged_weight():
    hidden, weight, labels, options = problem(60, 8, (5,), torch.float64, lora=True)
    a, b, scale = options["lora"]
    merged = kernels.linear_log_probs(hidden, weight + scale * b @ a, labels)
    close(kernels.linear_log_probs(hidden, weight, labels, **options), merged, 1e-12)


def test_invariances():
    hidden, weight, labels, _ = problem(90, 8, (10,), torch.float64)
    base = kernels.linear_log_probs(hidden, weight, labels)
    shifted = kernels.linear_log_probs(hidden, weight, labels, bias=torch.full((90,), 7.0, dtype=torch.float64))
    close(shifted, base, 1e-12)
    order, rows = torch.randperm(90), torch.randperm(10)
    close(kernels.linear_log_probs(hidden, weight[order], order.argsort()[labels]), base, 1e-12)
    close(kernels.linear_log_probs(hidden[rows], weight, labels[rows]), base[rows], 1e-12)
    close(
        kernels.linear_log_probs(hidden / 0.7, weight, labels),
        kernels.linear_log_probs(hidden, weight, labels, temperature=0.7),
        1e-12,
    )


def test_the_logit_gradient_sums_to_zero():
    logits = torch.randn(6, 200, dtype=torch.float64).requires_grad_()
    log_probs, entropy = kernels.token_log_probs(logits, torch.arange(6), return_entropy=True)
    (grad,) = torch.autograd.grad((log_probs * torch.randn(6) + entropy).sum(), logits)
    close(grad.sum(1), torch.zeros(6), 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_are_exact(dtype):
    """fp32 logits of half inputs: the error is that of fp32, far below what rounding the logits would cost."""
    hidden, weight, labels, _ = problem(500, 64, (40,), torch.float32)
    hidden, weight = (t.detach().to(dtype).requires_grad_() for t in (hidden, weight))
    log_probs, entropy = kernels.linear_log_probs(hidden, weight, labels, return_entropy=True)
    assert log_probs.dtype == entropy.dtype == torch.float32
    exact_inputs = exact((hidden, weight))
    theirs = reference.linear_log_probs(*exact_inputs, labels, return_entropy=True)
    close(log_probs, theirs[0], 2e-6)
    close(entropy, theirs[1], 1e-5)
    grads = torch.autograd.grad(log_probs.sum(), (hidden, weight))
    for ours, exact_grad in zip(grads, torch.autograd.grad(theirs[0].sum(), exact_inputs), strict=True):
        assert ours.dtype == dtype
        assert (
            float((ours.double() - exact_grad).norm() / exact_grad.norm()) < 2.0**-8
        )  # one rounding to bf16 at the end
    mixed = kernels.linear_log_probs(hidden, weight.float(), labels)
    assert torch.equal(mixed, log_probs)
    logits = (hidden @ weight.T).detach().requires_grad_()
    ours = kernels.token_log_probs(logits, labels)
    close(ours, torch.log_softmax(logits.double(), -1).gather(1, labels[:, None])[:, 0], 2e-6)
    assert torch.autograd.grad(ours.sum(), logits)[0].dtype == dtype


def test_weight_gradient_from_many_blocks_is_unbiased():
    """64 blocks of rows into a bf16 dW: summed in fp32, rounded once. Accumulating in bf16 is 100 times worse."""
    torch.manual_seed(0)
    hidden = (torch.randn(64 * 16, 32) + 0.5).bfloat16()
    weight, labels = torch.randn(96, 32).bfloat16(), torch.randint(0, 96, (64 * 16,))
    head = scaled_head(hidden, weight, labels)
    tiles = chunked.Tiles(16, 96)
    _, _, m, s = chunked.sweep_forward(head, labels, tiles, entropy=False)
    need = Need(False, True, False, False)
    g = torch.ones(len(labels))
    dw = chunked.sweep_backward(head, labels, g, None, None, m, s, tiles, need, torch.bfloat16).dw
    exact_weight = weight.double().requires_grad_()
    theirs = reference.linear_log_probs(hidden.double(), exact_weight, labels).sum()
    (exact_dw,) = torch.autograd.grad(theirs, exact_weight)
    error = (dw.double() - exact_dw) / exact_dw.abs().mean()
    assert float(torch.cosine_similarity(dw.double().flatten(), exact_dw.flatten(), 0)) > 0.99999
    assert abs(float(error.mean())) < 1e-4


@pytest.mark.skipif(backend.INTERPRET, reason="NumPy's product gives a row other bits in another place")
def test_batch_invariant_log_probs_are_bitwise_the_same():
    hidden, weight, labels, _ = problem(3000, 96, (150,))
    together = kernels.linear_log_probs(hidden, weight, labels, batch_invariant=True)
    for rows in (slice(0, 1), slice(17, 20), slice(3, 150, 7), slice(86, 150)):
        alone = kernels.linear_log_probs(hidden[rows], weight, labels[rows], batch_invariant=True)
        assert torch.equal(alone, together[rows])
    close(together, kernels.linear_log_probs(hidden, weight, labels), 1e-6)


def test_the_same_bits_every_run():
    hidden, weight, labels, _ = problem(900, 33, (64,))
    runs = []
    for _ in range(2):
        log_probs = kernels.linear_log_probs(hidden, weight, labels)
        runs.append((log_probs, *torch.autograd.grad(log_probs.sum(), (hidden, weight))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_row_without_any_finite_logit_is_nan_and_stays_alone():
    """Results and gradients of the other rows are those that they have without it."""
    torch.manual_seed(0)
    logits, labels = torch.randn(5, 700), torch.tensor([3, 699, 0, 5, 8])
    logits[2] = -torch.inf
    leaf, others = logits.clone().requires_grad_(), [0, 1, 3, 4]
    results = kernels.token_log_probs(leaf, labels, return_entropy=True)
    (grad,) = torch.autograd.grad(sum(t.sum() for t in results), leaf)
    alone = logits[others].requires_grad_()
    expected = kernels.token_log_probs(alone, labels[others], return_entropy=True)
    (expected_grad,) = torch.autograd.grad(sum(t.sum() for t in expected), alone)
    for ours, theirs in zip(results, expected, strict=True):
        assert ours[2].isnan()
        close(ours[others], theirs, 1e-6)
    assert torch.isfinite(grad[others]).all()
    close(grad[others], expected_grad, 1e-6)
    exact = reference.token_log_probs(logits.double(), labels)
    assert exact.isnan().tolist() == results[0].isnan().tolist()


def test_a_row_of_hidden_states_without_any_finite_logit_stays_alone():
    torch.manual_seed(0)
    hidden, weight, labels = torch.randn(5, 8), torch.rand(300, 8) + 0.1, torch.arange(5)
    hidden[2] = -torch.inf
    leaf, others = hidden.clone().requires_grad_(), [0, 1, 3, 4]
    log_probs = kernels.linear_log_probs(leaf, weight, labels)
    (grad,) = torch.autograd.grad(log_probs.sum(), leaf)
    exact = reference.linear_log_probs(hidden.double(), weight.double(), labels)
    assert exact.isnan().tolist() == log_probs.isnan().tolist() == [row == 2 for row in range(5)]
    close(log_probs[others], exact[others], 1e-5)
    assert torch.isfinite(grad[others]).all()
    ignored = labels.clone()
    ignored[2] = -100  # left out, it reaches not even the gradient that all rows share
    leaf, shared = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    kernels.linear_log_probs(leaf, shared, ignored).sum().backward()
    assert torch.isfinite(shared.grad).all() and (leaf.grad[2] == 0).all()
