"""linear_sample_tokens: the tokens of the fp32 logits, with every option of the head, in torch and in Triton."""

from __future__ import annotations

import pytest
import torch

import fastrlhf_kernels as kernels
from fastrlhf_kernels import backend, reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() and not backend.INTERPRET else "cpu")
HEADS = [
    {},
    {"bias": True},
    {"logit_scale": 0.3, "logit_softcap": 4.0},
    {"lora": True, "bias": True},
]
SETTINGS = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.6, "top_k": 7},
    {"top_p": 0.8},
    {"temperature": 1.4, "top_k": 40, "top_p": 0.9},
]


def problem(n, width, vocabulary, options, dtype=torch.float32):
    torch.manual_seed(n + vocabulary)
    make = lambda *shape: torch.randn(*shape, device=DEVICE).to(dtype)  # noqa: E731
    hidden, weight, options = make(n, width), 3 * width**-0.5 * make(vocabulary, width), dict(options)
    if options.pop("bias", False):
        options["bias"] = make(vocabulary)
    if options.pop("lora", False):
        options["lora"] = (make(3, width) * width**-0.5, make(vocabulary, 3), 2.0)
    return hidden, weight.to(dtype), options


def exact_logits(hidden, weight, bias=None, logit_scale=1.0, logit_softcap=None, lora=None):
    """float64 on the CPU."""
    x, w = hidden.double().cpu(), weight.double().cpu()
    z = x @ w.T
    if bias is not None:
        z = z + bias.double().cpu()
    if lora is not None:
        z = z + lora[2] * (x @ lora[0].double().cpu().T) @ lora[1].double().cpu().T
    z = logit_scale * z
    return z if logit_softcap is None else logit_softcap * torch.tanh(z / logit_softcap)


CASES = [({}, head) for head in HEADS] + [(setting, {}) for setting in SETTINGS[1:]] + [(SETTINGS[-1], HEADS[-1])]


@pytest.mark.parametrize(("settings", "options"), CASES, ids=str)
@pytest.mark.parametrize(("n", "vocabulary"), [(1, 1), (5, 300), (17, 1000)])
def test_tokens_are_those_of_the_logits(n, vocabulary, settings, options):
    hidden, weight, options = problem(n, 24, vocabulary, options)
    place = {"seed": -3, "offset": torch.arange(n, device=DEVICE) * 5, "stream": torch.arange(n, device=DEVICE) + 9}
    ours = kernels.linear_sample_tokens(hidden, weight, **options, **settings, **place)
    place = {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in place.items()}
    tokens, log_probs, policy = reference.sample_tokens(exact_logits(hidden, weight, **options), **settings, **place)
    assert torch.equal(ours.tokens.cpu(), tokens)
    torch.testing.assert_close(ours.log_probs.cpu(), log_probs.float(), atol=5e-6, rtol=1e-5)
    torch.testing.assert_close(ours.policy_log_probs.cpu(), policy.float(), atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_operands_give_fp32_log_probs(dtype):
    hidden, weight, _ = problem(20, 48, 500, {}, dtype)
    ours = kernels.linear_sample_tokens(hidden, weight, seed=4)
    exact = reference.sample_tokens(exact_logits(hidden, weight), seed=4)
    assert torch.equal(ours.tokens.cpu(), exact[0])
    assert ours.log_probs.dtype == torch.float32
    torch.testing.assert_close(ours.log_probs.cpu(), exact[1].float(), atol=5e-6, rtol=1e-5)


def test_autocast_does_not_round_the_logits():
    hidden, weight, _ = problem(8, 48, 500, {})
    plain = kernels.linear_sample_tokens(hidden, weight, seed=4)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        cast = kernels.linear_sample_tokens(hidden, weight, seed=4)
    for a, b in zip(plain, cast, strict=True):
        assert torch.equal(a, b)


def test_no_rows_and_strided_operands():
    hidden, weight, _ = problem(6, 32, 200, {})
    assert kernels.linear_sample_tokens(hidden[:0], weight, seed=1).tokens.shape == (0,)
    wide = torch.stack([weight.T, weight.T]).transpose(1, 2)[0]  # columns are not dense
    rows = torch.stack([hidden, hidden], 1)[:, 1]
    plain = kernels.linear_sample_tokens(hidden, weight, seed=1)
    for a, b in zip(plain, kernels.linear_sample_tokens(rows, wide, seed=1), strict=True):
        torch.testing.assert_close(a, b)


def test_compiles_and_passes_opcheck():
    hidden, weight, _ = problem(4, 16, 90, {})
    run = torch.compile(
        lambda x, w: kernels.linear_sample_tokens(x, w, seed=2, top_k=9), fullgraph=True, backend="eager"
    )
    assert torch.equal(run(hidden, weight).tokens, kernels.linear_sample_tokens(hidden, weight, seed=2, top_k=9).tokens)
    rows = torch.arange(4, device=DEVICE)
    triton = backend.choose_backend("auto", hidden).name == "triton"
    arguments = (hidden, weight, None, 1.0, None, None, None, 1.0, 1.0, 0, 1.0, 5, rows, rows, triton)
    torch.library.opcheck(torch.ops.fastrlhf.linear_sample_tokens.default, arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(2, 3, 4)}, "hidden has shape (2, 3, 4); expected [B, H]"),
        ({"weight": torch.zeros(5, 3)}, "hidden has shape (2, 4); expected [..., 3] to fit weight [V, 3]"),
        ({"bias": torch.zeros(4)}, "bias has shape (4,); expected (5,)"),
        ({"top_p": 2.0}, "top_p must be in (0, 1], got 2.0"),
        ({"temperature": -1.0}, "temperature must be finite and >= 0"),
        ({"stream": torch.zeros(3).long()}, "stream has shape (3,); expected (2,), the shape of the rows of hidden"),
        ({"weight": torch.zeros(5, 4, dtype=torch.float8_e4m3fn)}, "weight must be float32, bfloat16, float16"),
    ],
)
def test_bad_arguments(change, message):
    arguments = {"hidden": torch.zeros(2, 4), "weight": torch.zeros(5, 4), "seed": 1} | change
    hidden, weight = arguments.pop("hidden"), arguments.pop("weight")
    with pytest.raises(ValueError) as error:
        kernels.linear_sample_tokens(hidden, weight, **arguments)
    assert message in str(error.value)
