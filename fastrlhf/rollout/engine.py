"""Generation in the training process, with the very weights being trained.

Left out on purpose: beam search, repetition penalties and everything else of `generation_config`. A policy-gradient
step needs samples of the policy itself, and the log-probs they were drawn with.

A rollout is decoded in slots of a cache (`decoder.py`, `kv_cache.py`): each distinct prompt is computed once, packed
with others; a sequence that ends leaves, and one that waits takes its place. Every sequence starts at position 0 of its
slot, so a row is the same alone or in company.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from fastrlhf.data.encode import EncodedPrompt
from fastrlhf.models.heads import Head, agree, head_logits, hidden_states, lm_head
from fastrlhf.rollout.attention import attending, uses_interface
from fastrlhf.rollout.cuda_graphs import cuda_capture
from fastrlhf.rollout.decoder import Decoder
from fastrlhf.rollout.gather import gather_generation
from fastrlhf.rollout.kv_cache import SlotCache, cache_bytes_per_token
from fastrlhf.rollout.result import Rollout, make_rollout
from fastrlhf.rollout.sampling import Generation, SamplingParams
from fastrlhf.rollout.slots import Row
from fastrlhf.runtime.batching import shard
from fastrlhf.runtime.memory import ran_out
from fastrlhf_kernels import token_log_probs

LOG = logging.getLogger(__name__)
STATS = ("prefill_tokens", "decode_row_steps", "decode_steps", "new_tokens", "waves")
MOST_SLOTS = 1024  # sequences decoded together, whatever the memory
SYNC_STEPS = 8  # tokens between two looks of the host on a GPU; on a CPU, where looking is free, it looks at each


class RolloutEngine:
    """Samples from a transformers causal LM in place: no copy of the weights, no server, nothing to synchronise."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        max_batch_tokens: int | None = None,
        value_head: nn.Linear | None = None,
    ) -> None:
        """max_batch_tokens: positions of the cache of keys and values, for prompts and new tokens of what decodes
        together; None: what half of the free memory holds. value_head [1, H] without bias: a critic on the model's
        trunk, read for each token on the way."""
        self.model, self.tokenizer, self.value_head = model, tokenizer, value_head
        self.max_batch_tokens = max_batch_tokens
        self.cache: SlotCache | None = None
        self._checked = False

    def generate(self, prompt_ids: list[list[int]], params: SamplingParams, *, first: int = 0) -> Generation:
        """Sample params.n replies to each prompt. first: number of the first prompt, where these are part of more.

        The tokens of sample j of prompt i depend on (weights, prompt, params, i, j) only: neither on the other
        prompts nor on how many decode together. Raises ValueError before any forward for an empty prompt, a prompt that
        does not fit the model's positions with max_new_tokens, an unknown stop id, or a too small max_batch_tokens;
        RuntimeError for a model whose attention cannot be cached this way. Where memory runs out, half as many
        sequences decode together, and half of those again down to one; those that had ended are kept. The next call
        starts from the memory that is free then.
        """
        params = replace(params, stop_token_ids=self._stop_ids(params))
        self.check(prompt_ids, params)
        rows = [
            Row(tuple(prompt), i * params.n + j) for i, prompt in enumerate(prompt_ids, first) for j in range(params.n)
        ]
        stats = dict.fromkeys(STATS, 0)
        if rows:
            self._decode(rows, params, stats)
        stats["new_tokens"] = sum(len(row.tokens) for row in rows)
        return Generation(
            response_ids=[row.tokens for row in rows],
            log_probs=[row.log_probs for row in rows],
            policy_log_probs=[row.policy_log_probs for row in rows],
            finished=[row.finished for row in rows],
            stats=stats,
            values=None if self.value_head is None else [row.values for row in rows],
        )

    def rollout(self, prompts: Sequence[EncodedPrompt], params: SamplingParams, *, joined: bool = False) -> Rollout:
        """Sample params.n replies to each prompt, over all ranks, and put texts and token rows together. joined: how a
        micro-batch of these rows is put together. Errors are those of `generate`."""
        mine = shard(len(prompts))
        part = self.generate([ids for _, ids in prompts[mine]], params, first=mine.start)
        whole = gather_generation(part, values=self.value_head is not None)
        return make_rollout(self.tokenizer, prompts, params.n, whole, joined=joined)

    def release(self) -> None:
        """Give the cache's memory back, for the update that follows; the next rollout makes it anew."""
        self.cache = None

    def _decode(self, rows: list[Row], params: SamplingParams, stats: dict[str, float]) -> None:
        """Fill the rows, in as many slots as memory holds: half of them as often as it runs out."""
        grouped: dict[tuple[int, ...], list[Row]] = {}  # equal prompts beside each other
        for row in rows:
            grouped.setdefault(row.prompt, []).append(row)
        rows = [row for group in grouped.values() for row in group]
        positions = max(map(len, grouped)) + params.max_new_tokens
        slots = self._slots(len(rows), positions)
        with _inference(self.model):
            head = lm_head(self.model)
            if head.weight.dtype != torch.float32 and not head.weight.is_cuda:
                head = head._replace(weight=head.weight.float())  # once a rollout, not once a token
            self._check_attention()
            while True:
                try:
                    self._run(rows, head, params, slots, positions, stats)
                    return
                except RuntimeError as error:
                    if slots == 1 or not ran_out(error):
                        raise
                # Only out here, where the exception and the frames that it keeps alive are gone, can memory come free.
                rows = [row for row in rows if not row.done]
                LOG.warning("generation ran out of memory with %d sequences: again with %d", slots, slots // 2)
                slots = min(slots // 2, len(rows))
                self.release()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()  # for the allocators beside torch's own

    def _run(self, rows, head: Head, params: SamplingParams, slots: int, positions: int, stats) -> None:
        # One slot more keeps the prompt whose samples are cut by the end of the slots (`Decoder`); it counts too.
        extra = int(len({row.prompt for row in rows}) < len(rows) > slots > 1)
        if extra and self.max_batch_tokens is not None and (slots + 1) * positions > self.max_batch_tokens:
            slots -= 1
        cache, self.cache = self.cache, None  # dropped where anything below fails
        if cache is None or not cache.fits(slots + extra, positions, self.model):
            cache = SlotCache(self.model.config.get_text_config().num_hidden_layers, slots + extra, positions)
        with attending(self.model, cache):
            self._decoder(head, cache, slots, params, stats).run(rows)
        if all(bool(row.log_probs.isfinite().all()) for row in rows):  # or NaN would outlive the weights it came from
            self.cache = cache

    def _decoder(self, head: Head, cache: SlotCache, slots: int, params: SamplingParams, stats) -> Decoder:
        options = {"value_head": self.value_head}
        if self.model.device.type == "cuda":
            options |= {"steps": SYNC_STEPS, "capture": cuda_capture()}
        return Decoder(self.model, head, cache, slots, params, stats, **options)

    def _slots(self, rows: int, positions: int) -> int:
        """Sequences that decode together."""
        tokens = self.max_batch_tokens
        if tokens is None:
            tokens = _free_bytes(self.model.device) // 2 // cache_bytes_per_token(self.model)
        return max(1, min(rows, MOST_SLOTS, tokens // positions))

    def _check_attention(self) -> None:
        """RuntimeError for a model whose cached steps do not give what its plain forward gives; once an engine.

        Models that use transformers' attention interface are watched in every prefill instead (`Decoder`).
        """
        config = self.model.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
        if kinds or config.is_encoder_decoder:
            what = ", ".join(sorted(kinds)) or "an encoder"
            raise RuntimeError(f"generation does not support {type(self.model).__name__}: it has {what}")
        if self._checked or uses_interface(self.model):
            return
        head, cache = lm_head(self.model), SlotCache(config.num_hidden_layers, 2, 8)
        probes = [Row((1, 2, 3), 0), Row((3, 1, 2, 3, 2), 1)]
        params = SamplingParams(2, temperature=0.0, stop_token_ids=())
        try:
            self._decoder(head, cache, 2, params, dict.fromkeys(STATS, 0)).run(probes)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError) as error:
            if ran_out(error):
                raise
            raise RuntimeError(
                f"{type(self.model).__name__} does not use transformers' attention interface and cannot be given a mask"
                f" by position ({type(error).__name__}: {error}); generation does not support it, use another model"
            ) from error
        for row in probes:
            ids = torch.tensor([row.prompt + tuple(row.tokens)], device=self.model.device)
            logits = head_logits(head, hidden_states(self.model, ids)[0, len(row.prompt) - 1 : -1])
            plain = token_log_probs(logits, ids[0, len(row.prompt) :]).cpu()
            if not agree(row.policy_log_probs, plain, self.model.dtype, log_probs=True):
                raise RuntimeError(
                    f"{type(self.model).__name__} does not use transformers' attention interface, and its cached steps "
                    "differ from its plain forward: generation would be wrong; use another model"
                )
        self._checked = True

    def _stop_ids(self, params: SamplingParams) -> list[int]:
        if params.stop_token_ids is not None:
            return list(params.stop_token_ids)
        configured = getattr(self.model.generation_config, "eos_token_id", None)
        ends = [*configured] if isinstance(configured, list) else [configured]
        ends.append(getattr(self.tokenizer, "eos_token_id", None))
        return sorted({token for token in ends if token is not None})

    def check(self, prompt_ids: list[list[int]], params: SamplingParams) -> None:
        """Raise what `generate` refuses before any forward. params: with its stop_token_ids."""
        config = self.model.config.get_text_config()
        vocabulary = lm_head(self.model).weight.shape[0]
        for token in params.stop_token_ids:
            if not 0 <= token < vocabulary:
                raise ValueError(f"stop_token_ids: {token} is outside the vocabulary of {vocabulary} tokens")
        embeddings = self.model.get_input_embeddings().weight.shape[0]
        positions, switch = _position_limits(config)
        for index, prompt in enumerate(prompt_ids):
            if len(prompt) == 0:
                raise ValueError(f"prompt {index} is empty; a reply needs at least one token to start from")
            token = min(prompt) if min(prompt) < 0 else max(prompt)
            if not 0 <= token < embeddings:
                raise ValueError(f"prompt {index} holds token {token}, outside the vocabulary of {embeddings} tokens")
            need = len(prompt) + params.max_new_tokens
            if need > positions:
                raise ValueError(
                    f"prompt {index} has {len(prompt)} tokens and max_new_tokens is {params.max_new_tokens}: {need} is "
                    f"more than the model's {positions} positions"
                )
            if need > switch:
                raise ValueError(
                    f"prompt {index} needs {need} positions: from {switch} on {type(self.model).__name__} turns all "
                    f"positions another way (rope_type {config.rope_parameters['rope_type']!r}), which cached keys "
                    "cannot follow; use shorter prompts or a smaller max_new_tokens"
                )
            if self.max_batch_tokens is not None and need > self.max_batch_tokens:
                raise ValueError(
                    f"max_batch_tokens={self.max_batch_tokens} is too small for prompt {index}: one sequence needs "
                    f"{need} tokens of cache ({need * cache_bytes_per_token(self.model)} bytes)"
                )


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


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if "SC_AVPHYS_PAGES" not in getattr(os, "sysconf_names", {}):  # macOS and Windows do not tell
        return 2 << 30
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def _inference(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode without gradients; every module's own mode is restored, even after an error."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True
