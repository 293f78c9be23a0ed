"""Every public kernel beside the same formula in torch, and the libraries that are installed, through pytest-benchmark.

    pytest bench --benchmark-only                                        a table a function, the fastest first
    pytest bench --benchmark-only -k linear --benchmark-json FILE

Forward, and the backward where there is one. On a GPU the sizes are Qwen2.5-1.5B's, and a call ends when the device has
done it; on a CPU they are small. The time beside a GPU's floor: `python -m bench.gpu_kernels`; memory, and arms in
processes of their own: `python -m bench.kernels`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import fastrlhf_kernels as kernels
from bench import peers
from fastrlhf_kernels import layers, reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GPU = DEVICE.type == "cuda"
TOKENS, WIDTH, VOCABULARY = (8192, 1536, 151936) if GPU else (128, 128, 4096)
BATCH, LENGTH, ROWS = (64, 1024, 64) if GPU else (8, 64, 8)
DTYPE = torch.bfloat16 if GPU else torch.float32


class Case(NamedTuple):
    """A function's arguments: tensors made on demand, by position, and options; leaves: places of those that take a
    gradient. other: the same in torch, where `reference` has no such function."""

    arguments: Sequence[Callable[[], Tensor]]
    options: dict[str, Any] = {}  # noqa: RUF012
    leaves: Sequence[int] = ()
    other: Callable[..., Any] | None = None
    module: Any = kernels


@cache
def numbers(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0, seed: int = 0) -> Tensor:
    draw = torch.Generator(DEVICE).manual_seed(seed)
    return (torch.randn(shape, generator=draw, device=DEVICE) * scale).to(dtype)


@cache
def whole(high: int, *shape: int) -> Tensor:
    draw = torch.Generator(DEVICE).manual_seed(1)
    return torch.randint(0, high, shape, generator=draw, device=DEVICE)


def constant(value: float, *shape: int) -> Callable[[], Tensor]:
    return lambda: torch.full(shape, value, device=DEVICE)


def clipped(log_probs: Tensor) -> Tensor:
    ratio, advantages = (log_probs + 9.0).exp(), numbers(TOKENS)
    return -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()


def any_loss_in_torch(hidden: Tensor, weight: Tensor, labels: Tensor, loss_fn: Callable[[Tensor], Tensor]) -> Tensor:
    return loss_fn(reference.linear_log_probs(hidden, weight, labels))


HEAD = (
    partial(numbers, TOKENS, WIDTH, dtype=DTYPE),
    partial(numbers, VOCABULARY, WIDTH, dtype=DTYPE, scale=WIDTH**-0.5),
    partial(whole, VOCABULARY, TOKENS),
)
OF_TOKENS = (constant(-9.0, TOKENS), partial(numbers, TOKENS), constant(1, TOKENS))
LOGITS = (partial(numbers, TOKENS, VOCABULARY, dtype=DTYPE), partial(whole, VOCABULARY, TOKENS))
X, Y, Z = (partial(numbers, BATCH, LENGTH, scale=0.1, seed=seed) for seed in range(3))
SCORES, MASK = partial(numbers, BATCH), lambda: numbers(BATCH, LENGTH) < 0.8
CACHE = [partial(numbers, ROWS, 512, 2, 64, dtype=DTYPE, seed=seed) for seed in range(2)]
HEADS = [partial(numbers, ROWS, count, 1, 64, dtype=DTYPE) for count in (14, 2)]
TURN = partial(numbers, 1, 1, 64, dtype=DTYPE)
CASES = {
    "linear_log_probs": Case(HEAD, {}, (0, 1)),
    "linear_ppo_loss": Case((*HEAD, *OF_TOKENS), {}, (0, 1)),
    "linear_loss": Case((*HEAD, lambda: clipped), {}, (0, 1), any_loss_in_torch),
    "token_log_probs": Case(LOGITS, {}, (0,)),
    "token_ppo_loss": Case(
        (*LOGITS, *OF_TOKENS),
        {},
        (0,),
        lambda z, y, *rest: reference.ppo_policy_loss(reference.token_log_probs(z, y), *rest),
    ),
    "selective_log_softmax": Case(LOGITS, {}, (0,), reference.token_log_probs),
    "entropy_from_logits": Case(
        LOGITS[:1], {}, (0,), lambda z: torch.distributions.Categorical(logits=z.float()).entropy()
    ),
    "kl_estimate": Case((X, Y), {"estimator": "k3"}, (0,)),
    "shape_rewards": Case((SCORES, X, Y, MASK), {"kl_coef": 0.1}),
    "gae": Case((X, Y, MASK)),
    "shape_and_gae": Case((SCORES, X, Y, Z, MASK), {"kl_coef": 0.1}),
    "masked_whiten": Case((X, MASK)),
    "ppo_policy_loss": Case((X, Y, Z, MASK), {}, (0,)),
    "ppo_value_loss": Case((X, Y, Z, MASK), {}, (0,)),
    "sample_tokens": Case((partial(numbers, ROWS, VOCABULARY),), {"seed": 1, "top_k": 50, "top_p": 0.9}),
    "decode_attention": Case(
        (partial(numbers, ROWS, 14, 64, dtype=DTYPE), *CACHE, lambda: torch.full((ROWS,), 512, device=DEVICE)),
        {"scale": 0.125},
    ),
    "rms_norm": Case(
        (partial(numbers, ROWS, 896, dtype=DTYPE), partial(numbers, 896, dtype=DTYPE)), {"eps": 1e-6}, module=layers
    ),
    "silu_mul": Case([partial(numbers, ROWS, 4864, dtype=DTYPE, seed=seed) for seed in range(2)], module=layers),
    "rotate": Case((*HEADS, TURN, TURN), module=layers),
    "store_tokens": Case(
        (
            *(partial(numbers, ROWS, 2, 64, dtype=DTYPE, seed=s) for s in (2, 3)),
            *CACHE,
            *[partial(whole, ROWS, ROWS)] * 2,
        ),
        module=layers,
    ),
}


def call_of(name: str, who: str) -> Callable[[], Any]:
    """What is timed. ImportError or AttributeError for a library that is not here."""
    case = CASES[name]
    tensors = [make() for make in case.arguments]
    leaves = [tensors[place].detach().requires_grad_() for place in case.leaves]
    for place, leaf in zip(case.leaves, leaves, strict=True):
        tensors[place] = leaf
    if who == "ours":
        quiet = {} if case.module is layers else {"validate": False}
        run = partial(getattr(case.module, name), *tensors, **case.options, **quiet)
    elif who != "torch":
        hidden, weight, labels, old, advantages, _ = tensors
        run = partial(peers.arm(who), hidden, weight, labels, advantages, old)
    elif case.module is layers:
        run = partial(getattr(layers, name), *tensors, **case.options, backend="torch")
    else:
        run = partial(case.other or getattr(reference, name), *tensors, **case.options)

    def call() -> Any:
        result = run()
        if leaves:
            loss = getattr(result, "loss", result)
            loss = loss[0] if isinstance(loss, tuple) else loss
            result = torch.autograd.grad(loss.sum(), leaves)
        if GPU:
            torch.cuda.synchronize()
        return result

    return call


def pairs() -> list[tuple[str, str]]:
    return [(name, who) for name in CASES for who in ("ours", "torch")] + [("linear_ppo_loss", p) for p in peers.ARMS]


@pytest.mark.parametrize("name, who", pairs())
def test_kernel(benchmark, name, who):
    try:
        call = call_of(name, who)
    except (ImportError, AttributeError) as error:
        pytest.skip(f"{who} does not run here: {error}")
    benchmark.group = name
    benchmark(call)
