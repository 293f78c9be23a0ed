"""Whether generation says what training says: decoding, step by step, against one plain forward of the same tokens.

A model is tried once, with rows of several lengths up to the longest sequence of the run, so that every window, mask
and position that the run can reach is reached here: first over the cache of keys and values, and where that is off,
without one (`recompute.py`). What is off both ways is refused.

The result belongs to the model object, where every engine of this process finds it; its weights change, but not what
they compute. A checkpoint keeps it under a digest of what decides it beside the weights: class, config, dtype,
attention, device and the versions of the libraries. A resumed run of the same digest does not try again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from fastrlhf.config.errors import UserError
from fastrlhf.models.heads import UNSUPPORTED, head_logits, hidden_states, lm_head
from fastrlhf.rollout.attention import attending
from fastrlhf.rollout.compiled import Regions
from fastrlhf.rollout.fused import fused
from fastrlhf.rollout.kv_cache import SlotCache
from fastrlhf.rollout.recompute import RecomputedTrunk, TokenCache
from fastrlhf.rollout.trunk import CachedTrunk
from fastrlhf.runtime.memory import ran_out

T = TypeVar("T")
STEPS = 4  # tokens decoded behind each prompt
EXACT_LIMIT = 1e-3  # nats, of any token's log-prob, in fp32
ROUNDED_LIMIT = 0.15  # nats, in bf16 and fp16: the mean over a row of what its own tokens are off by


class Parity(NamedTuple):
    """How a model is generated from. cached: over keys and values; positions: of the longest sequence that was tried;
    reason: why not cached, nothing where it is."""

    digest: str
    positions: int
    cached: bool
    reason: str = ""


class Difference(NamedTuple):
    """Decoding against the plain forward, where they differ most: nats at a position of a row of `length` tokens."""

    nats: float
    position: int
    length: int
    agrees: bool

    def __str__(self) -> str:
        return f"{self.nats:.2g} nats at position {self.position} of {self.length}"


_known: WeakKeyDictionary[PreTrainedModel, Parity] = WeakKeyDictionary()


def known_parity(model: PreTrainedModel) -> Parity | None:
    """What was found of this model object, if anything was."""
    return _known.get(model)


def keep_parity(model: PreTrainedModel, state: list[Any] | None) -> None:
    """Take the result of an earlier process, where it is of a model like this one."""
    if state is not None and state[0] == digest(model):
        _known[model] = Parity(*state)


def digest(model: PreTrainedModel) -> str:
    """What decides how a model computes, beside its weights."""
    config = {key: value for key, value in model.config.to_dict().items() if not key.startswith("_")}
    facts = [
        f"{type(model).__module__}.{type(model).__qualname__}",
        config,
        [str(model.dtype), str(model.config._attn_implementation), model.device.type],
        [torch.__version__, transformers.__version__],
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def find_parity(model: PreTrainedModel, positions: int) -> Parity:
    """Try the model, which is in evaluation mode and takes no gradients here, with sequences of up to `positions`
    tokens. UserError, with the numbers, for one that generates otherwise than it trains."""
    problem = unsupported(model)
    if problem is not None:
        raise UserError(f"policy: {problem}; use another model")
    name, reasons = type(model).__name__, []
    for cached in (True, False):
        reason = unfit(model) if cached else ""
        if not reason:
            reason = trouble(model, positions, cached)
        if not reason:
            _known[model] = Parity(digest(model), positions, cached, "; ".join(reasons))
            return _known[model]
        reasons.append(reason)
    raise UserError(
        f"policy: {name} cannot be generated from: {reasons[0]}; without a cache, {reasons[1]}; use another model"
    )


def unsupported(model: PreTrainedModel) -> str | None:
    """Why a model cannot generate here, as far as its configuration tells; `check` looks at its weights."""
    if model.config.get_text_config().is_encoder_decoder:
        return f"generation does not support {type(model).__name__}: it has an encoder"
    return None


def unfit(model: PreTrainedModel) -> str:
    """Why no cache of keys and values is tried."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    return f"it has {', '.join(sorted(kinds))}, which a cache of keys and values does not serve" if kinds else ""


def trouble(model: PreTrainedModel, positions: int, cached: bool, regions: Regions | None = None) -> str:
    """What is wrong with generating this way; nothing where it is exact."""
    difference, failure = _tried(lambda: compare(model, positions, cached, regions))
    if difference is None:
        return failure
    return "" if difference.agrees else f"its decoding differs from its plain forward by {difference}"


def refusal(model: PreTrainedModel) -> str:
    """Why decoding over a cache fails on a prompt of a token and one more; nothing where it runs. Its numbers are not
    looked at."""
    row, cache = torch.zeros(2, dtype=torch.int64), make_cache(model, True, 1, 2)
    return _tried(lambda: _decoded(model, [row], [1], 1, cache))[1]


def _tried(work: Callable[[], T]) -> tuple[T | None, str]:
    """-> (what work gives, ""), or (None, how decoding failed)."""
    try:
        return work(), ""
    except UNSUPPORTED as error:
        if ran_out(error):
            raise
        lines = str(error).strip().splitlines() or [""]
        return None, f"its decoding fails ({type(error).__name__}: {lines[0]})"


def make_cache(model: PreTrainedModel, cached: bool, slots: int, positions: int) -> SlotCache | TokenCache:
    """The slots that sequences decode in."""
    if not cached:
        return TokenCache(slots, positions, model.device)
    return SlotCache(model.config.get_text_config().num_hidden_layers, slots, positions)


def trunk_over(
    model: PreTrainedModel, cache: SlotCache | TokenCache, regions: Regions | None = None
) -> CachedTrunk | RecomputedTrunk:
    """The model's trunk as decoding runs it. regions: its compiled layers."""
    return RecomputedTrunk(model, cache) if isinstance(cache, TokenCache) else CachedTrunk(model, cache, regions)


@contextmanager
def decoding(model: PreTrainedModel, cache: SlotCache | TokenCache, regions: Regions | None = None) -> Iterator[None]:
    """The context in which such a trunk runs."""
    with ExitStack() as stack:
        if regions is None:  # it sees to its own parts
            stack.enter_context(fused(model))
        if isinstance(cache, SlotCache):
            stack.enter_context(attending(model, cache))
        yield


def compare(model: PreTrainedModel, positions: int, cached: bool, regions: Regions | None = None) -> Difference:
    """Decode known tokens behind prompts of four lengths, two near `positions` and two short that are one prompt, and
    read the same tokens in one forward each.

    In fp32 no token's log-prob may be off by more than EXACT_LIMIT; in less precise dtypes the mean of each row over
    what the model's own choice of tokens is off by, by no more than ROUNDED_LIMIT. A decoding that gives NaN agrees
    with nothing.
    """
    head = lm_head(model)
    steps = min(STEPS, positions - 1)
    longest = positions - steps
    short = min(3, longest)
    vocabulary = min(len(head.weight), len(model.get_input_embeddings().weight))
    draw = torch.Generator().manual_seed(0)
    sizes = [longest, max(1, longest - 3), short, short]
    rows = [torch.randint(vocabulary, (size + steps,), generator=draw) for size in sizes]
    rows[3][:short] = rows[2][:short]  # two samples of one prompt
    ours = _decoded(model, rows, sizes, steps, make_cache(model, cached, len(rows), positions), regions)
    worst, agrees = Difference(-1.0, 0, 0, True), True
    for row, size, states in zip(rows, sizes, ours, strict=True):
        plain = hidden_states(model, row[None].to(model.device))[0, size - 1 :]
        nats, within = _off(head_logits(head, states), head_logits(head, plain), model.dtype)
        agrees &= within
        most = int(nats.argmax())
        if not float(nats[most]) <= worst.nats:
            worst = Difference(float(nats[most]), size - 1 + most, len(row), agrees)
    return worst._replace(agrees=agrees)


def _decoded(
    model: PreTrainedModel,
    rows: list[Tensor],
    sizes: list[int],
    steps: int,
    cache: SlotCache | TokenCache,
    regions: Regions | None = None,
) -> list[Tensor]:
    """Hidden states [steps + 1, H] of each row from the end of its prompt on, as decoding computes them."""
    trunk, device = trunk_over(model, cache, regions), model.device
    prompts = [tuple(row[:size].tolist()) for row, size in zip(rows, sizes, strict=True)]
    with decoding(model, cache, regions):
        # One after the other where they are equal (positions of a token or two): a prompt has one slot.
        slot_of = {prompt: slot for slot, prompt in reversed(list(enumerate(prompts)))}
        states = trunk.prefill(slot_of)
        for slot, prompt in enumerate(prompts):
            if slot_of[prompt] != slot:
                cache.copy([slot_of[prompt]], [slot], len(prompt))
        columns = [torch.stack([states[prompt] for prompt in prompts])]
        for step in range(steps):
            lengths = torch.tensor([size + step for size in sizes], device=device)
            tokens = torch.stack([row[size + step] for row, size in zip(rows, sizes, strict=True)]).to(device)
            columns.append(trunk.step(tokens, lengths, int(max(sizes)) + step + 1).clone())
    return list(torch.stack(columns, 1))


def _off(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> tuple[Tensor, bool]:
    """Nats [n] that logits [n, V] are off by, and whether that is within what the dtype rounds."""
    ours, theirs = ours.log_softmax(-1), theirs.log_softmax(-1)
    off = (ours - theirs).abs()
    if dtype == torch.float32:
        nats = off.amax(-1)
        return nats, bool(nats.max() <= EXACT_LIMIT)
    nats = (theirs.exp() * off).sum(-1)
    return nats, bool(nats.mean() <= ROUNDED_LIMIT)
