"""Generation in the training process, with the very weights being trained.

Left out on purpose: beam search, repetition penalties and everything else of `generation_config`. A policy-gradient
step needs samples of the policy itself, and the log-probs they were drawn with.

A rollout is decoded in slots of a cache (`decoder.py`, `kv_cache.py`): each distinct prompt is computed once, packed
with others; a sequence that ends leaves, and one that waits takes its place. Every sequence starts at position 0 of its
slot, so a row is the same alone or in company.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from fastrlhf.config.errors import UserError
from fastrlhf.data.encode import EncodedPrompt
from fastrlhf.models.heads import Head, ValueHead, lm_head
from fastrlhf.parallel.sharding import dtype_of, gathered, is_layered, reading
from fastrlhf.rollout.compiled import Compilation, Regions
from fastrlhf.rollout.cuda_graphs import Capture, StepGraphs, cuda_capture
from fastrlhf.rollout.decoder import Decoder, replayable
from fastrlhf.rollout.kv_cache import SlotCache, cache_bytes_per_token
from fastrlhf.rollout.parity import (
    Difference,
    compare,
    decoding,
    digest,
    find_parity,
    keep_parity,
    known_parity,
    make_cache,
    trouble,
    trunk_over,
)
from fastrlhf.rollout.recompute import RecomputedTrunk, TokenCache
from fastrlhf.rollout.result import Rollout, gather_generation, idle_share, make_rollout
from fastrlhf.rollout.sampling import Generation, SamplingParams
from fastrlhf.rollout.slots import Row, Slots
from fastrlhf.rollout.trunk import CachedTrunk
from fastrlhf.runtime import distributed
from fastrlhf.runtime.batching import dealt
from fastrlhf.runtime.memory import free_bytes, ran_out

LOG = logging.getLogger(__name__)
STATS = ("prefill_tokens", "decode_row_steps", "decode_steps", "new_tokens", "waves")
MOST_SLOTS = 1024  # sequences decoded together, whatever the memory
TOKEN_BYTES = 8  # of a position without keys and values
TRIED_POSITIONS = 64  # of the sequences on which compiled layers are tried; windows and masks are not theirs
SYNC_STEPS = 8  # tokens between two looks of the host on a GPU; on a CPU, where looking is free, it looks at each


@dataclass
class Kept:
    """What one rollout may leave to the next: trunk and cache, the state of the slots, graphs of its steps."""

    trunk: CachedTrunk | RecomputedTrunk
    slots: Slots
    graphs: StepGraphs | None = None

    def fits(self, slots: int, extra: int, positions: int, new_tokens: int, model: PreTrainedModel) -> bool:
        """Whether it serves a rollout of this size, with as many slots as `extra` behind those that decode."""
        has, columns = self.slots.tokens.shape
        enough = has >= slots and columns > new_tokens and has + extra <= self.trunk.cache.slots
        return enough and self.trunk.cache.fits(slots + extra, positions, model)


class RolloutEngine:
    """Samples from a transformers causal LM in place: no copy of the weights (but for `dtype`), no server, nothing to
    synchronise."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        max_batch_tokens: int | None = None,
        value_head: ValueHead | None = None,
        compile: bool | None = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        """max_batch_tokens: positions of the cache of keys and values, for prompts and new tokens of what decodes
        together; None: what half of the free memory holds. value_head: a critic on the model's trunk, read
        for each token on the way. compile: decoder layers decode compiled (`compiled.py`), which takes some seconds
        once: worth it for many rollouts; None: on a GPU, where it can be. UserError for true without a compiler.
        dtype: of a copy of the model that decodes in its place, its weights made anew from the model's for each call;
        None, or the model's own: no copy. UserError beside a value_head, which would read another trunk."""
        self.source = self.model = model
        if dtype is not None and dtype != dtype_of(model):
            if value_head is not None:
                raise UserError(f"dtype = {dtype}: a copy of the model decodes, whose states no value_head has learnt")
            self.model = model = in_dtype(model, dtype)
        self.tokenizer, self.value_head = tokenizer, value_head
        self.max_batch_tokens = max_batch_tokens
        self.compilation = Compilation(model, compile)
        self.keeps = model.device.type == "cuda"  # cache, state and graphs over `release`
        self.capture: Callable[[], Capture] | None = cuda_capture if self.keeps else None  # how steps are recorded
        self._kept: Kept | None = None
        self.busy = 0.0  # seconds that the last `generate` took this rank for its own rows
        self._released: int | None = None  # the allocator's retries when something was kept over `release`

    @property
    def cache(self) -> SlotCache | TokenCache | None:
        """What the next rollout finds, if anything."""
        return None if self._kept is None else self._kept.trunk.cache

    def generate(
        self, prompt_ids: list[list[int]], params: SamplingParams, *, numbers: Sequence[int] | None = None
    ) -> Generation:
        """Sample params.n replies to each prompt. numbers: of each prompt, where these are part of more; None: from 0.

        The tokens of sample j of prompt i depend on (weights, prompt, params, i, j) only: neither on the other
        prompts nor on how many decode together. Raises UserError before any forward for an empty prompt, a prompt that
        does not fit the model's positions with max_new_tokens, an unknown stop id, or a too small max_batch_tokens;
        UserError as `check` does, which is called where it was not. Where memory runs out, half as many sequences
        decode together, and half of those again down to one; those that had ended are kept. The next call starts from
        the memory that is free then.
        """
        params = replace(params, stop_token_ids=self._stop_ids(params))
        self.check_prompts(prompt_ids, params)
        self._follow()
        numbers = range(len(prompt_ids)) if numbers is None else numbers
        numbered = zip(numbers, prompt_ids, strict=True)
        rows = [Row(tuple(prompt), i * params.n + j) for i, prompt in numbered for j in range(params.n)]
        stats = dict.fromkeys(STATS, 0)
        began = time.perf_counter()
        with gathered(self.model):  # also in a rank without a row
            if rows:
                self._decode(rows, params, stats)
            self.busy = time.perf_counter() - began
        stats["new_tokens"] = sum(len(row.tokens) for row in rows)
        return Generation(
            response_ids=[row.tokens for row in rows],
            log_probs=[row.log_probs for row in rows],
            policy_log_probs=[row.policy_log_probs for row in rows],
            finished=[row.finished for row in rows],
            stats=stats,
            values=None if self.value_head is None else [row.values for row in rows],
        )

    def rollout(
        self,
        prompts: Sequence[EncodedPrompt],
        params: SamplingParams,
        *,
        joined: bool = False,
        expected: Sequence[float] | None = None,
    ) -> Rollout:
        """Sample params.n replies to each prompt, over all ranks, and put texts and token rows together. joined: how a
        micro-batch of these rows is put together. expected: tokens of a reply to each prompt, by which the prompts are
        dealt to the ranks; None: max_new_tokens. Errors are those of `generate`."""
        replies = expected or [params.max_new_tokens] * len(prompts)
        shares = dealt([len(ids) + params.n * reply for (_, ids), reply in zip(prompts, replies, strict=True)])
        mine = shares[distributed.rank()]
        part = self.generate([prompts[i][1] for i in mine], params, numbers=mine)
        generation = gather_generation(part, shares, params.n, values=self.value_head is not None)
        idle = idle_share(self.busy)
        return make_rollout(self.tokenizer, prompts, params.n, generation, joined=joined, idle=idle)

    def check(self, positions: int) -> str:
        """Settle, once for a model, how it is generated from in sequences of up to `positions` tokens (`parity.py`) ->
        a sentence where that is slow, else nothing. UserError for a model that would generate otherwise than it trains.
        """
        known, slow = known_parity(self.model), ""
        if known is not None and known.positions >= positions and self.compilation.settled:
            return ""
        with _inference(self.model):
            if known is None or known.positions < positions:
                known = find_parity(self.model, positions)
                if not known.cached:
                    slow = (
                        f"generation reads every sequence anew for each token, which is slow: "
                        f"{type(self.model).__name__} cannot be cached ({known.reason})"
                    )
            return "; ".join(filter(None, (slow, self.compilation.settle(known.cached, self._trouble))))

    def _trouble(self, regions: Regions) -> str:
        """What is wrong with decoding through compiled layers."""
        return trouble(self.model, int(min(TRIED_POSITIONS, position_limits(self.model))), True, regions)

    def difference(self, positions: int) -> Difference:
        """Decoding against the plain forward with the weights as they are, in sequences of up to `positions` tokens."""
        self._follow()
        with _inference(self.model):
            return compare(self.model, positions, known_parity(self.model).cached, self.compilation.regions)

    def state(self) -> list[Any] | None:
        """What `check` found, for a checkpoint."""
        known = known_parity(self.model)
        return None if known is None else list(known)

    def load_state(self, state: list[Any] | None) -> None:
        keep_parity(self.model, state)

    def release(self) -> None:
        """Give the memory of the cache back, for the update that follows; the next rollout makes it anew. On a GPU it
        stays, with state and graphs, until memory was short once (`give_up`)."""
        if self.keeps and self._kept is not None:
            self._released = _allocator_retries(self.model.device)
        else:
            self._drop()

    def give_up(self) -> bool:
        """Memory is short: keep nothing over `release` from now on -> whether there was anything to give back."""
        held, self.keeps = self._kept is not None, False
        self._drop()
        return held

    @torch.no_grad()
    def _follow(self) -> None:
        """The copy's weights are the model's, in its dtype; in their places, which recorded graphs read."""
        if self.model is not self.source:
            for mine, theirs in zip(self.model.parameters(), self.source.parameters(), strict=True):
                mine.copy_(theirs)

    def _drop(self) -> None:
        self._kept = self._released = None
        self.compilation.drop()

    def _decode(self, rows: list[Row], params: SamplingParams, stats: dict[str, float]) -> None:
        """Fill the rows, in as many slots as memory holds: half of them as often as it runs out."""
        grouped: dict[tuple[int, ...], list[Row]] = {}  # equal prompts beside each other
        for row in rows:
            grouped.setdefault(row.prompt, []).append(row)
        rows = [row for group in grouped.values() for row in group]
        positions = max(map(len, grouped)) + params.max_new_tokens
        self._check_longer(positions)
        slots = self._slots(len(rows), positions)
        with _inference(self.model):
            head = lm_head(self.model)
            if head.weight.dtype != torch.float32 and not head.weight.is_cuda:
                head = head._replace(weight=head.weight.float())  # once a rollout, not once a token
            while True:
                try:
                    self._run(rows, head, params, slots, positions, stats)
                    return
                except RuntimeError as error:
                    if slots == 1 or not ran_out(error):
                        raise
                    if is_layered(self.model):  # the others wait in the middle of a forward
                        raise UserError(
                            f"parallel = fsdp: memory ran out with {slots} sequences, and while layers are gathered as "
                            "they run no rank tries again alone; use a smaller max_new_tokens, or more GPUs"
                        ) from error
                # Only out here, where the exception and the frames that it keeps alive are gone, can memory come free.
                rows = [row for row in rows if not row.done]
                LOG.warning("generation ran out of memory with %d sequences: again with %d", slots, slots // 2)
                slots = min(slots // 2, len(rows))
                self._drop()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()  # for the allocators beside torch's own

    def _run(self, rows, head: Head, params: SamplingParams, slots: int, positions: int, stats) -> None:
        # One slot more keeps the prompt whose samples are cut by the end of the slots (`Decoder`); it counts too.
        extra = int(len({row.prompt for row in rows}) < len(rows) > slots > 1)
        if extra and self.max_batch_tokens is not None and (slots + 1) * positions > self.max_batch_tokens:
            slots -= 1
        kept = self._prepared(slots, extra, positions, params)
        with decoding(self.model, kept.trunk.cache, self.compilation.regions):
            self._decoder(head, kept, slots, params, stats).run(rows)
        if all(bool(row.log_probs.isfinite().all()) for row in rows):  # or NaN would outlive the weights it came from
            self._kept = kept

    def _prepared(self, slots: int, extra: int, positions: int, params: SamplingParams) -> Kept:
        """What the rollout before this one left, where it serves; else made anew. Dropped where what follows fails."""
        kept, self._kept = self._kept, None
        if self._released is not None and _allocator_retries(self.model.device) > self._released:
            LOG.warning("the GPU's memory is short: the cache of keys and values is made anew for each rollout")
            self.give_up()
            kept = None
        self._released = None
        self.compilation.refresh()
        if kept is None or not kept.fits(slots, extra, positions, params.max_new_tokens, self.model):
            kept = None  # its memory first
            cache = make_cache(self.model, known_parity(self.model).cached, slots + extra, positions)
            trunk = trunk_over(self.model, cache, self.compilation.regions)
            kept = Kept(trunk, Slots(slots, params.max_new_tokens, self.model.device))
        if self.capture is None or isinstance(kept.trunk.cache, TokenCache) or is_layered(self.model):
            return kept
        weights = [*self.model.parameters(), *self.model.buffers(), *self.compilation.tensors()]
        addresses = [tensor.data_ptr() for tensor in weights]
        if kept.graphs is None or kept.graphs.holds != addresses:
            step, most = replayable(kept.trunk, kept.slots), len(kept.slots.lengths)
            kept.graphs = StepGraphs(step, most, self.capture(), addresses)
        return kept

    def _bytes_per_token(self) -> int:
        known = known_parity(self.model)
        return TOKEN_BYTES if known is not None and not known.cached else cache_bytes_per_token(self.model)

    def _check_longer(self, positions: int) -> None:
        """`check` for sequences that are longer than those it knows, with room: few calls need another."""
        known = known_parity(self.model)
        if known is None or known.positions < positions:
            room = int(min(position_limits(self.model), 1 << (positions - 1).bit_length()))
            sentence = self.check(max(positions, room))
            if sentence and known is None:
                LOG.warning(sentence)
        elif not self.compilation.settled:
            with _inference(self.model):
                sentence = self.compilation.settle(known.cached, self._trouble)
            if sentence:
                LOG.warning(sentence)

    def _decoder(self, head: Head, kept: Kept, slots: int, params, stats) -> Decoder:
        steps = SYNC_STEPS if self.model.device.type == "cuda" else 1
        options = {"size": slots, "value_head": self.value_head, "steps": steps, "graphs": kept.graphs}
        return Decoder(kept.trunk, head, kept.slots, params, stats, **options)

    def _slots(self, rows: int, positions: int) -> int:
        """Sequences that decode together."""
        tokens = self.max_batch_tokens
        if tokens is None:
            kept = 0 if self.cache is None else self.cache.slots * self.cache.positions
            tokens = (free_bytes(self.model.device) // self._bytes_per_token() + kept) // 2
        return max(1, min(rows, MOST_SLOTS, tokens // positions))

    def _stop_ids(self, params: SamplingParams) -> list[int]:
        if params.stop_token_ids is not None:
            return list(params.stop_token_ids)
        configured = getattr(self.model.generation_config, "eos_token_id", None)
        ends = [*configured] if isinstance(configured, list) else [configured]
        ends.append(getattr(self.tokenizer, "eos_token_id", None))
        return sorted({token for token in ends if token is not None})

    def check_prompts(
        self, prompt_ids: list[list[int]], params: SamplingParams, names: Sequence[str] | None = None
    ) -> None:
        """Raise what `generate` refuses before any forward. params: with its stop_token_ids. names: what an error calls
        each prompt; None: "prompt 0" and so on."""
        config = self.model.config.get_text_config()
        vocabulary = lm_head(self.model).weight.shape[0]
        for token in params.stop_token_ids:
            if not 0 <= token < vocabulary:
                raise UserError(f"stop_token_ids: {token} is outside the vocabulary of {vocabulary} tokens")
        embeddings = self.model.get_input_embeddings().weight.shape[0]
        positions, switch = _position_limits(config)
        for index, prompt in enumerate(prompt_ids):
            name = names[index] if names is not None else f"prompt {index}"
            if len(prompt) == 0:
                raise UserError(f"{name} is empty; a reply needs at least one token to start from")
            token = min(prompt) if min(prompt) < 0 else max(prompt)
            if not 0 <= token < embeddings:
                raise UserError(f"{name} holds token {token}, outside the vocabulary of {embeddings} tokens")
            need = len(prompt) + params.max_new_tokens
            if need > positions:
                raise UserError(
                    f"{name} has {len(prompt)} tokens and max_new_tokens is {params.max_new_tokens}: {need} is "
                    f"more than the model's {positions} positions"
                )
            if need > switch:
                raise UserError(
                    f"{name} needs {need} positions: from {switch} on {type(self.model).__name__} turns all "
                    f"positions another way (rope_type {config.rope_parameters['rope_type']!r}), which cached keys "
                    "cannot follow; use shorter prompts or a smaller max_new_tokens"
                )
            if self.max_batch_tokens is not None and need > self.max_batch_tokens:
                raise UserError(
                    f"max_batch_tokens={self.max_batch_tokens} is too small for {name}: one sequence needs "
                    f"{need} tokens of cache ({need * self._bytes_per_token()} bytes)"
                )


@torch.no_grad()
def in_dtype(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A copy of the model with parameters of another dtype, tied where its own are, that takes no gradients. Buffers
    stay: the frequencies of positions are fp32 in every model, as `from_pretrained` has it."""
    kept = tuple(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    made = {}  # by the identity of the model's own: what deepcopy takes for it
    for name, own in model.named_parameters():
        other = own.dtype if any(part in name for part in kept) else dtype
        made[id(own)] = torch.nn.Parameter(own.detach().to(other, copy=True), requires_grad=False)
    twin = copy.deepcopy(model, made)
    twin.config.dtype = dtype
    known = known_parity(model)
    if known is not None:
        keep_parity(twin, [digest(twin), *known[1:]])
    return twin


def position_limits(model: PreTrainedModel) -> float:
    """Tokens of the longest sequence that can be generated; inf where the model sets no end."""
    return min(_position_limits(model.config.get_text_config()))


def _position_limits(config: PreTrainedConfig) -> tuple[float, float]:
    """The model's positions, and from how many on it turns them all another way."""
    positions = getattr(config, "max_position_embeddings", None) or math.inf
    rope = getattr(config, "rope_parameters", None) or {}
    changing = rope.get("rope_type") in ("longrope", "dynamic")  # frequencies that depend on the longest sequence
    switch = rope.get("original_max_position_embeddings") if changing else None
    return positions, math.inf if switch is None else switch


def _allocator_retries(device: torch.device) -> int:
    """How often a GPU's memory had to be given back before it sufficed."""
    return torch.cuda.memory_stats(device)["num_alloc_retries"] if device.type == "cuda" else 0


@contextmanager
def _inference(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode without gradients; every module's own mode is restored, even after an error."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with gathered(model), reading(model):
            yield
    finally:
        for module in training:
            module.training = True
