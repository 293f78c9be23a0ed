"""No kernel has a race, and the detector finds those of kernels that were spoiled on purpose: see bench/races.py."""

from __future__ import annotations

import importlib
import inspect
import json
import re
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

import fastrlhf_kernels as kernels
from bench import races
from fastrlhf_kernels import backend, layers
from fastrlhf_kernels.gpu import log_probs, tuning
from fastrlhf_kernels.operands import LossOptions, Rows, Tokens

pytestmark = pytest.mark.skipif(not backend.INTERPRET, reason="programs run in a chosen order in the interpreter alone")
RECORD = Path(races.__file__).parent / "results/compile_kernels.json"


def made(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape).to(dtype)


def head(n: int, vocabulary: int, dtype: torch.dtype = torch.float32):
    hidden, weight = made(n, 24, dtype=dtype).requires_grad_(), made(vocabulary, 24, dtype=dtype).requires_grad_()
    return hidden, weight, torch.randint(0, vocabulary, (n,))


def gradients(loss, *leaves):
    return (loss.detach(), *torch.autograd.grad(loss, leaves))


def rows_of_logits():
    logits, labels = made(3, 2600).requires_grad_(), torch.tensor([5, 2599, 1100])
    few = kernels.token_log_probs(logits, labels, return_entropy=True, backend="triton")
    many, label = made(40, 90).requires_grad_(), torch.randint(0, 90, (40,))
    plain = kernels.token_log_probs(many, label, backend="triton")
    return *gradients(sum(t.sum() for t in few), logits), *gradients(plain.sum(), many)


def ppo_over_its_logits():
    logits, labels, row = made(20, 1700), torch.randint(0, 1700, (20,)), made(20)
    tokens = Tokens(row - 8, row, torch.arange(20) != 3, None, None)
    options = LossOptions(0.2, 0.2, None, entropy_coef=0.1)
    out = logits.view(torch.bfloat16)[:, :1700]
    terms = log_probs.rows_ppo(Rows(logits, labels, None, 0.9), tokens, torch.tensor(4.0), options, out)
    return *terms, out.clone()


def linear():
    hidden, weight, labels = head(66, 300, torch.bfloat16)
    outputs = []
    for descriptors in (False, True):
        with tuning.pretend(tuning.INTERPRETER._replace(descriptors=descriptors)):
            found = kernels.linear_log_probs(hidden, weight, labels, return_entropy=True, backend="triton")
            outputs += gradients(sum(t.sum() for t in found), hidden, weight)
    return outputs


def linear_ppo():
    hidden, weight, labels = head(6, 300, torch.bfloat16)
    hidden.data[3] *= 40  # a row that moved far from its old log-prob
    old, mask = torch.full((6,), -6.0), torch.arange(6) != 5
    given = (hidden, weight, labels, old, made(6), mask)
    return gradients(kernels.linear_ppo_loss(*given, backend="triton").loss, hidden, weight)


def any_loss():
    hidden, weight, labels = head(20, 300)
    several = torch.stack([labels, labels.flip(0), labels], 1)  # one of them twice
    outputs = []
    for kept in (4 * 320 * 20, 4 * 320 * 10):
        given = (hidden, weight, several, lambda lp: lp.exp().mean())
        outputs += gradients(kernels.linear_loss(*given, workspace=kept, backend="triton").loss, hidden, weight)
    return outputs


def advantages():
    scores, mask = made(3), torch.rand(3, 70) < 0.9
    two = [made(3, 70) for _ in range(3)]
    shaped = kernels.shape_and_gae(scores, *two, mask, kl_coef=0.1, backend="triton")
    rewards = kernels.shape_rewards(scores, *two[:2], mask, kl_coef=0.1, backend="triton")
    return *shaped, rewards, kernels.masked_whiten(two[0], mask, backend="triton")


def losses_of_tokens():
    leaf, others, mask = made(3, 500).requires_grad_(), [made(3, 500) for _ in range(2)], torch.rand(3, 500) < 0.9
    policy = kernels.ppo_policy_loss(leaf, *others, mask, backend="triton")
    value = kernels.ppo_value_loss(leaf, *others, mask, backend="triton")
    return *gradients(policy.loss, leaf), *gradients(value.loss, leaf), *policy.stats.values(), *value.stats.values()


def sampling():
    logits = made(2, 600) * 2
    logits[1] = logits[1].round()
    draw = lambda **options: kernels.sample_tokens(logits, seed=5, backend="triton", **options)  # noqa: E731
    return *draw(top_k=20, top_p=0.9), *draw(top_p=0.9), *draw()


def decode():
    q, k, v = made(1, 4, 16), made(1, 300, 2, 16), made(1, 300, 2, 16)
    return [kernels.decode_attention(q, k, v, torch.tensor([290]), scale=0.2, backend="triton")]


def decoder_layer():
    x, pool, place = made(2, 4, 3, 16), torch.zeros(2, 2, 5, 4, 16), torch.tensor([1, 0])
    turn, weight = torch.rand(2, 3, 16), made(16)
    layers.store_tokens(x[:, :, 0], x[:, :, 1], *pool, place, place, backend="triton")
    turned = layers.rotate(x, x[:, :2], turn, turn, backend="triton")
    return *turned, layers.rms_norm(x, weight, 1e-6, backend="triton"), layers.silu_mul(x, x, backend="triton"), pool


CASES = {  # a call, and the kernels that it starts
    rows_of_logits: {"_forward", "_combine", "_backward"},
    ppo_over_its_logits: {"_ppo"},
    linear: {"_linear_forward", "_linear_backward", "_combine"},
    linear_ppo: {"_relative", "_again", "_scale"},
    any_loss: {"_forward", "_from_logits", "_linear_backward", "_add_labels"},
    advantages: {"_gae", "_whiten", "_shape_rewards", "_block_statistics"},
    losses_of_tokens: {"_policy", "_value", "_add_up"},
    sampling: {"_sums", "_candidates", "_histogram", "_settle", "_draw"},
    decode: {"_decode", "_combine_splits"},
    decoder_layer: {"_rms_norm", "_silu_mul", "_rotate", "_store_tokens"},
}


def run(case, order: str):
    torch.manual_seed(0)
    with races.watched(order, seed=1) as watch:
        return case(), watch


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_no_race_and_the_same_bits_in_every_order_of_programs(case):
    first, watch = run(case, "forward")
    assert watch.races == [] and set(watch.counts) == CASES[case]
    for order in ("reversed", "random"):
        again, watch = run(case, order)
        assert watch.races == []
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), order


def test_every_kernel_has_a_case():
    recorded = next(iter(json.loads(RECORD.read_text()).values()))
    assert set.union(*CASES.values()) == {name.split()[0] for name in recorded}


BARRIER = r"tl\.debug_barrier\(\)"
# case, module and kernel; the pattern of what stands there, what is put there, and what is reported
MUTANTS = {
    "a gradient over logits": (ppo_over_its_logits, "log_probs", "_ppo", BARRIER, "pass", "no barrier"),
    "E over logits": (linear_ppo, "linear_ppo_loss", "_relative", f"{BARRIER}  # E", "pass  #", "no barrier"),
    "a label before a row": (
        linear_ppo,
        "linear_ppo_loss",
        "_relative",
        f"{BARRIER}  # the",
        "pass  #",
        "no barrier",
    ),
    "the same of a far row": (linear_ppo, "linear_ppo_loss", "_again", BARRIER, "pass", "no barrier"),
    "ids read too early": (sampling, "sampling", "_candidates", BARRIER, "pass", "no barrier"),
    "results over what others read": (rows_of_logits, "terms", "_combine", BARRIER, "pass", "no barrier"),
    "stores for atomics": (
        *(sampling, "sampling", "_histogram"),
        *(r'atomic_add\((.*), sem="relaxed"', r"store(\1", "two threads"),
    ),
    "parts that all store": (sampling, "sampling", "_histogram", r", mask=part == 0\)", ")", "no order"),
    "rows without a mask": (losses_of_tokens, "ppo_losses", "_policy", r", mask=inside\)\n", ")\n", "outside"),
    "columns without a mask": (rows_of_logits, "log_probs", "_backward", r"mask=inside.*there", "", "no order"),
    "sums that overlap": (losses_of_tokens, "ppo_losses", "_policy", r"program \* 4", "program * 3", "no order"),
    "rows that overlap": (
        any_loss,
        "kept_logits",
        "_from_logits",
        r"rows \* out_s",
        "rows // 2 * out_s",
        "two threads",
    ),
    "two rows, one sum": (linear, "linear_log_probs", "_linear_forward", r"rows \* splits", "rows // 2", "two threads"),
    "splits, one place": (decode, "attention", "_decode", r"splits \+ split", "splits", "no order"),
}


def mutant(kernel, old: str, new: str, path: Path):
    """The kernel with another text; it needs a file, which the interpreter reads it from."""
    source, count = re.subn(old, new, inspect.getsource(kernel.fn))
    assert count
    path.write_text(source)
    names = dict(kernel.fn.__globals__)
    exec(compile(source, str(path), "exec"), names)
    return names[kernel.__name__]


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name, monkeypatch, tmp_path):
    case, module, kernel, old, new, report = MUTANTS[name]
    module = importlib.import_module(f"fastrlhf_kernels.gpu.{module}")
    monkeypatch.setattr(module, kernel, mutant(getattr(module, kernel), old, new, tmp_path / "mutant.py"))
    _, watch = run(case, "forward")
    found = [str(race) for race in watch.races if race.kernel == kernel]
    assert any(report in text for text in found), found


@triton.jit
def _toy(out, total, n, MODE: tl.constexpr):
    program, lane = tl.program_id(0), tl.arange(0, 4)
    if MODE == "apart":
        tl.store(out + program * 4 + lane, lane)
    elif MODE == "the same value":
        tl.store(out + program + lane * 0, program)
    elif MODE == "atomic":
        tl.atomic_add(total + lane * 0, lane)
    elif MODE == "atomic and read":
        tl.atomic_add(total, 1)
        tl.store(out + program, tl.load(total))
    elif MODE == "neighbour":
        tl.store(out + program, tl.load(out + (program + 1) % n))
    elif MODE == "two values":
        tl.store(out + program + lane * 0, lane)
    elif MODE == "read back":
        tl.store(out + program * 4 + lane, lane)
        tl.store(total + lane, tl.load(out + program * 4 + 3 - lane), mask=(lane >= 0) & (program == 0))
    elif MODE == "outside":
        tl.store(out + lane + 14, lane, mask=(lane >= 0) & (program == 0))


TOYS = {
    "apart": None,
    "the same value": None,
    "atomic": None,
    "atomic and read": "reads what others update atomically: and programs have no order",
    "neighbour": "and programs have no order",
    "two values": "two threads of one store",
    "read back": "another thread, and no barrier is between",
    "outside": "_toy, byte 64 of out: program 0 writes outside of it",
}


@pytest.mark.parametrize("order", races.ORDERS)
@pytest.mark.parametrize("mode", TOYS)
def test_what_is_a_race(mode, order):
    out, total = torch.zeros(16, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    with races.watched(order, seed=3) as watch:
        _toy[(4,)](out, total, 4, MODE=mode)
    texts = [str(race) for race in watch.races]
    assert texts == [] if TOYS[mode] is None else any(TOYS[mode] in text for text in texts), texts
    assert watch.counts["_toy"]["launches"] == 1 and watch.counts["_toy"]["programs"] == 4
    assert mode != "atomic" or int(total[0]) == 24
    assert mode != "apart" or out.tolist() == [0, 1, 2, 3] * 4
