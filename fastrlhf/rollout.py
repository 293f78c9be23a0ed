"""Generation in the training process, with the very weights being trained.

Left out on purpose: beam search, repetition penalties and everything else of `generation_config`. A policy-gradient
step needs samples of the policy itself, and the log-probs they were drawn with.

Prompts are padded on the left inside a wave; positions and masks come from lengths, so a row is the same alone or in
a batch. Each prompt is computed once and its cache shared by its n samples. Finished rows leave the batch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from fastrlhf.models import Head, head_logits, lm_head
from fastrlhf_kernels import sample_tokens, token_log_probs

KEEP_ROWS = 0.75  # the batch is compacted when fewer than this share of its rows are unfinished: copying costs too


@dataclass(frozen=True)
class SamplingParams:
    """How to sample. temperature 0 is greedy; top_k 0 and top_p 1 are off; stop_token_ids None: the model's own."""

    max_new_tokens: int
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_token_ids: Sequence[int] | None = None
    min_new_tokens: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        checks = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "n": (self.n >= 1, "at least 1"),
            "temperature": (self.temperature >= 0, "0 (greedy) or more"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
            "top_k": (self.top_k >= 0, "0 (off) or more"),
            "min_new_tokens": (
                0 <= self.min_new_tokens <= self.max_new_tokens,
                "between 0 and max_new_tokens",
            ),
        }
        for name, (good, expected) in checks.items():
            if not good:
                raise ValueError(f"{name} must be {expected}, got {getattr(self, name)}")


@dataclass
class Generation:
    """Prompt-major results, n per prompt. log_probs: of the distribution sampled from; policy_log_probs: of the whole
    vocabulary at the same temperature (what the trainer recomputes). Both lists of 1-d fp32 CPU tensors.
    finished: ended by a stop token (which is included), not by max_new_tokens."""

    response_ids: list[list[int]]
    log_probs: list[Tensor]
    policy_log_probs: list[Tensor]
    finished: list[bool]
    stats: dict[str, float] = field(default_factory=dict)


class RolloutEngine:
    """Samples from a transformers causal LM in place: no copy of the weights, no server, nothing to synchronise."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        max_batch_tokens: int | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.max_batch_tokens = max_batch_tokens

    def generate(self, prompt_ids: list[list[int]], params: SamplingParams) -> Generation:
        """Sample params.n replies to each prompt.

        The tokens of sample j of prompt i depend on (weights, prompt, params, i, j) only: neither on the other
        prompts nor on how the batch is split. Raises ValueError before any forward for an empty prompt, a prompt that
        does not fit the model's positions with max_new_tokens, an unknown stop id, or a too small max_batch_tokens.
        """
        stops = self._stop_ids(params)
        self._check(prompt_ids, params, stops)
        rows = [_Row(prompt, i * params.n + j) for i, prompt in enumerate(prompt_ids) for j in range(params.n)]
        stats = {"prefill_tokens": 0, "decode_row_steps": 0, "new_tokens": 0, "waves": 0}
        with _inference(self.model):
            head = lm_head(self.model)
            if head.weight.dtype != torch.float32 and not head.weight.is_cuda:
                head = head._replace(weight=head.weight.float())  # once a rollout, not once a token
            for wave in self._waves(rows, params.max_new_tokens):
                _Wave(self.model, head, wave, params, stops, stats).run()
                stats["waves"] += 1
        stats["new_tokens"] = sum(len(row.tokens) for row in rows)
        return Generation(
            response_ids=[row.tokens for row in rows],
            log_probs=[torch.tensor(row.log_probs, dtype=torch.float32) for row in rows],
            policy_log_probs=[torch.tensor(row.policy_log_probs, dtype=torch.float32) for row in rows],
            finished=[row.finished for row in rows],
            stats=stats,
        )

    def _stop_ids(self, params: SamplingParams) -> list[int]:
        if params.stop_token_ids is not None:
            return list(params.stop_token_ids)
        found = [] if self.tokenizer is None else [self.tokenizer.eos_token_id]
        configured = getattr(self.model.generation_config, "eos_token_id", None)
        found += configured if isinstance(configured, list) else [configured]
        return sorted({token for token in found if token is not None})

    def _check(self, prompt_ids: list[list[int]], params: SamplingParams, stops: list[int]) -> None:
        config = self.model.config.get_text_config()
        vocabulary = lm_head(self.model).weight.shape[0]
        for token in stops:
            if not 0 <= token < vocabulary:
                raise ValueError(f"stop_token_ids: {token} is outside the vocabulary of {vocabulary} tokens")
        embeddings = self.model.get_input_embeddings().weight.shape[0]
        positions = getattr(config, "max_position_embeddings", None) or math.inf
        for index, prompt in enumerate(prompt_ids):
            if len(prompt) == 0:
                raise ValueError(f"prompt {index} is empty; a reply needs at least one token to start from")
            for token in (min(prompt), max(prompt)):
                if not 0 <= token < embeddings:
                    raise ValueError(
                        f"prompt {index} holds token {token}, outside the vocabulary of {embeddings} tokens"
                    )
            need = len(prompt) + params.max_new_tokens
            if need > positions:
                raise ValueError(
                    f"prompt {index} has {len(prompt)} tokens and max_new_tokens is {params.max_new_tokens}: {need} is "
                    f"more than the model's {positions} positions"
                )
            if self.max_batch_tokens is not None and need > self.max_batch_tokens:
                gib = need * _cache_bytes_per_token(self.model)
                raise ValueError(
                    f"max_batch_tokens={self.max_batch_tokens} is too small for prompt {index}: one sequence needs "
                    f"{need} tokens of cache ({gib} bytes)"
                )

    def _waves(self, rows: list[_Row], max_new_tokens: int) -> Iterator[list[_Row]]:
        """Rows in prompt-length order, as many at once as max_batch_tokens holds (left padding included)."""
        if not rows:
            return
        ordered = sorted(rows, key=lambda row: (-len(row.prompt), row.stream))
        start = 0
        while start < len(ordered):
            size = len(ordered) - start
            if self.max_batch_tokens is not None:
                size = self.max_batch_tokens // (len(ordered[start].prompt) + max_new_tokens)
            yield ordered[start : start + size]
            start += size


@dataclass
class _Row:
    """One response in the making. stream: its number in the rollout, the identity its random numbers come from."""

    prompt: list[int]
    stream: int
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    policy_log_probs: list[float] = field(default_factory=list)
    finished: bool = False


class _Wave:
    """One batch decoded together. State that changes with every token lives here and dies with it."""

    def __init__(
        self,
        model: PreTrainedModel,
        head: Head,
        rows: list[_Row],
        params: SamplingParams,
        stops: list[int],
        stats: dict[str, float],
    ) -> None:
        self.model, self.head, self.rows, self.params, self.stats = model, head, rows, params, stats
        self.stops = frozenset(stops)
        self.stop_tensor = torch.tensor(stops, dtype=torch.int64, device=model.device)
        self.streams = torch.tensor([row.stream for row in rows], device=model.device)
        self.cache = DynamicCache(config=model.config)

    def run(self) -> None:
        hidden = self._prefill()
        for position in range(self.params.max_new_tokens):
            tokens = self._sample(hidden, position)
            alive = [i for i, row in enumerate(self.rows) if not row.finished]
            if not alive or position + 1 == self.params.max_new_tokens:
                return
            if len(alive) <= KEEP_ROWS * len(self.rows):
                tokens = self._compact(alive, tokens)
            hidden = self._decode(tokens, position)

    def _prefill(self) -> Tensor:
        """The prompts, each distinct one once -> hidden state [rows, H] that predicts the first new token."""
        prompts = list(dict.fromkeys(tuple(row.prompt) for row in self.rows))
        longest = max(len(prompt) for prompt in prompts)
        device = self.model.device
        ids = torch.tensor([(0,) * (longest - len(p)) + p for p in prompts], device=device)
        lengths = torch.tensor([len(p) for p in prompts], device=device)
        columns = torch.arange(longest, device=device)
        mask = columns >= (longest - lengths)[:, None]
        hidden = self._forward(ids, mask, (columns - (longest - lengths)[:, None]).clamp(min=0))
        self.stats["prefill_tokens"] += int(lengths.sum())
        place = {prompt: i for i, prompt in enumerate(prompts)}
        index = torch.tensor([place[tuple(row.prompt)] for row in self.rows], device=device)
        if len(prompts) < len(self.rows):
            self.cache.reorder_cache(index)  # unlike batch_select_indices, linear-attention layers have it
        room = torch.ones(len(self.rows), self.params.max_new_tokens, dtype=torch.bool, device=device)
        self.mask = torch.cat([mask[index], room], dim=1)
        self.width, self.lengths = longest, lengths[index]
        return hidden[index]

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        output = self.model.base_model(
            input_ids=ids,
            attention_mask=mask.to(torch.int64),
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        )
        return output.last_hidden_state[:, -1]

    def _decode(self, tokens: Tensor, position: int) -> Tensor:
        self.stats["decode_row_steps"] += len(self.rows)
        mask = self.mask[:, : self.width + position + 1]
        return self._forward(tokens[:, None], mask, (self.lengths + position)[:, None])

    def _sample(self, hidden: Tensor, position: int) -> Tensor:
        """Draw one token a row, record it with its log-probs; finished rows only pad the batch until compaction."""
        params = self.params
        raw = head_logits(self.head, hidden)
        logits = raw
        if position < params.min_new_tokens and len(self.stops):
            logits = raw.index_fill(1, self.stop_tensor, -math.inf)
        sampled = sample_tokens(
            logits,
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            seed=params.seed,
            offset=position,
            stream=self.streams,
        )
        policy_log_probs = sampled.policy_log_probs
        if logits is not raw:  # the policy's own log-prob knows nothing of the suppressed stops
            policy_log_probs = token_log_probs(raw, sampled.tokens, temperature=params.temperature or 1.0)
        columns = zip(sampled.tokens.tolist(), sampled.log_probs.tolist(), policy_log_probs.tolist(), strict=True)
        for row, (token, log_prob, policy_log_prob) in zip(self.rows, columns, strict=True):
            if not row.finished:
                row.tokens.append(token)
                row.log_probs.append(log_prob)
                row.policy_log_probs.append(policy_log_prob)
                row.finished = token in self.stops
        return sampled.tokens

    def _compact(self, alive: list[int], tokens: Tensor) -> Tensor:
        index = torch.tensor(alive, device=tokens.device)
        self.cache.reorder_cache(index)  # unlike batch_select_indices, linear-attention layers have it
        self.mask, self.lengths, self.streams = self.mask[index], self.lengths[index], self.streams[index]
        self.rows = [self.rows[i] for i in alive]
        return tokens[index]


def derive_seed(*parts: object) -> int:
    """An independent 63-bit seed for each (seed, purpose, number ...): streams of different steps never overlap."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _cache_bytes_per_token(model: PreTrainedModel) -> int:
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * width * model.dtype.itemsize


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
