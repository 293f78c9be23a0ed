"""One rollout being decoded: slots that sequences enter, and leave when they end, so that no step is spent on them.

    admit: prompts that wait are computed, packed, each distinct one once, and take free slots
    sample: a token a slot, its log-probs written beside it; forward: the tokens through the model
    harvest: finished sequences leave, and the last slots move into the holes

All state a step needs lies on the device; the host looks every `SYNC_STEPS` steps, on CPU (where looking is free) each.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from fastrlhf.models.heads import Head, head_logits
from fastrlhf.rollout.attention import cache_argument, uses_interface
from fastrlhf.rollout.cuda_graphs import StepGraphs, cuda_capture
from fastrlhf.rollout.kv_cache import Segment, SlotCache
from fastrlhf_kernels import sample_tokens, token_log_probs

PREFILL_TOKENS = 8192  # prompts of one forward; a longer prompt goes alone
SYNC_STEPS = 8  # on a GPU


@dataclass(frozen=True)
class Sampling:
    """What decoding must know of `SamplingParams`, and the ids that end a reply."""

    max_new_tokens: int
    min_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int
    stops: tuple[int, ...]


@dataclass(eq=False)
class Row:
    """One response in the making. stream: its number in the rollout, the identity its random numbers come from."""

    prompt: tuple[int, ...]
    stream: int
    tokens: list[int] = field(default_factory=list)
    log_probs: Tensor | None = None
    policy_log_probs: Tensor | None = None
    values: Tensor | None = None
    finished: bool = False

    @property
    def done(self) -> bool:
        return self.log_probs is not None


class Decoder:
    """Decodes rows in the slots of a cache. One instance a rollout."""

    def __init__(
        self, model: PreTrainedModel, head: Head, cache: SlotCache, slots: int, sampling: Sampling,
        stats: dict[str, float], value_head: nn.Linear | None = None,
    ) -> None:  # fmt: skip
        """slots: how many rows decode together; a cache with one more keeps the prompt whose samples still wait.
        value_head: read beside the model's own, from the hidden state that predicts each token."""
        self.model, self.head, self.cache, self.slots = model, head, cache, slots
        self.sampling, self.stats = sampling, stats
        self.interface, self.argument = uses_interface(model), cache_argument(model)
        device, most = model.device, sampling.max_new_tokens

        def integers(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        self.places, self.lengths, self.streams = torch.arange(slots, device=device), integers(slots), integers(slots)
        self.counts, self.last, self.ended = integers(slots), integers(slots), integers(slots).bool()
        self.hidden: Tensor | None = None
        # one column more than tokens: rows that ended between two looks of the host write there
        self.tokens = integers(slots, most + 1)
        self.log_probs, self.policy_log_probs, self.values = torch.zeros(3, slots, most + 1, device=device)
        self.value_head = value_head
        self.stops = torch.tensor(sampling.stops, dtype=torch.int64, device=device)
        self.steps = SYNC_STEPS if device.type == "cuda" else 1
        self.rows: list[Row] = []  # row of slot i
        self.longest = 0  # no slot holds more tokens
        self.graphs: StepGraphs | None = None
        if device.type == "cuda":
            self.graphs = StepGraphs(partial(self._step, longest=cache.positions), slots, cuda_capture())
        self.stash: tuple[tuple[int, ...], Tensor] | None = None  # a prompt whose samples still wait, its hidden state

    def run(self, rows: Sequence[Row]) -> None:
        """Fill `tokens`, `log_probs`, `policy_log_probs` and `finished` of every row; equal prompts stand together."""
        waiting = deque(rows)
        while waiting or self.rows:
            if waiting and (not self.rows or self.slots - len(self.rows) >= min(len(waiting), -(-self.slots // 8))):
                self._admit(waiting)
            for step in range(self.steps):
                if step:
                    self._forward()
                self._sample()
            self._harvest()
            if self.rows:
                self._forward()

    # ------------------------------------------------------------------------------------------------ prompts

    def _admit(self, waiting: deque[Row]) -> None:
        """The next rows take the slots behind the last one; their prompts are computed."""
        first = len(self.rows)
        rows = [waiting.popleft() for _ in range(min(self.slots - first, len(waiting)))]
        self.rows += rows
        self.stats["waves"] += 1
        groups: dict[tuple[int, ...], list[int]] = {}
        for slot, row in enumerate(rows, first):
            groups.setdefault(row.prompt, []).append(slot)
        states: dict[tuple[int, ...], Tensor] = {}
        keeper = self.cache.slots - 1  # the stash's slot; with a single slot that slot itself
        if self.stash is not None and self.stash[0] in groups:
            prompt, states[self.stash[0]] = self.stash
            self.cache.copy(keeper, [slot for slot in groups[prompt] if slot != keeper], len(prompt))
        new = [prompt for prompt in groups if prompt not in states]
        for prompts in self._chunks(new):
            states |= self._prefill(prompts, [groups[prompt][0] for prompt in prompts])
        for prompt in new:
            self.cache.copy(groups[prompt][0], groups[prompt][1:], len(prompt))
        self.stash = None
        if waiting and waiting[0].prompt in groups:
            prompt = waiting[0].prompt
            self.stash = (prompt, states[prompt])
            if groups[prompt][0] != keeper:
                self.cache.copy(groups[prompt][0], [keeper], len(prompt))
        added = torch.stack([states[row.prompt] for row in rows])
        self.hidden = added if first == 0 else torch.cat([self.hidden[:first], added])
        self._fill(rows, first)

    def _fill(self, rows: list[Row], first: int) -> None:
        cut, device = slice(first, first + len(rows)), self.lengths.device
        lengths = [len(row.prompt) for row in rows]
        self.longest = max(self.longest, *lengths)
        self.lengths[cut] = torch.tensor(lengths, device=device)
        self.streams[cut] = torch.tensor([row.stream for row in rows], device=device)
        self.counts[cut], self.ended[cut] = 0, False

    @staticmethod
    def _chunks(prompts: list[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
        """Prompts in the order of their lengths, at most PREFILL_TOKENS together."""
        chunks: list[list[tuple[int, ...]]] = []
        room = 0
        for prompt in sorted(prompts, key=len):
            if not chunks or len(prompt) > room:
                chunks.append([])
                room = PREFILL_TOKENS
            chunks[-1].append(prompt)
            room -= len(prompt)
        return chunks

    def _prefill(self, prompts: list[tuple[int, ...]], slots: list[int]) -> dict[tuple[int, ...], Tensor]:
        """Keys and values of the prompts into their slots -> each one's last hidden state."""
        segments: list[Segment] = []
        for prompt, slot in zip(prompts, slots, strict=True):
            if not segments or segments[-1].length != len(prompt):
                start = segments[-1].start + segments[-1].length * len(segments[-1].slots) if segments else 0
                segments.append(Segment(start, len(prompt), []))
            segments[-1].slots.append(slot)
        self.stats["prefill_tokens"] += sum(map(len, prompts))
        packed = [token for prompt in prompts for token in prompt]
        if self.interface:
            positions = [place for prompt in prompts for place in range(len(prompt))]
            hidden = self._trunk(segments, [packed], [positions])[0]
        else:  # prompts of one length at a time: without padding no mask is needed
            parts = []
            for start, length, chosen in segments:
                ids = [packed[start + i * length : start + (i + 1) * length] for i in range(len(chosen))]
                alone = [Segment(0, length, chosen)]
                parts.append(self._trunk(alone, ids, [list(range(length))] * len(ids)).flatten(0, 1))
            hidden = torch.cat(parts)
        ends = torch.tensor([len(prompt) for prompt in prompts], device=hidden.device).cumsum(0) - 1
        return dict(zip(prompts, hidden[ends], strict=True))

    def _trunk(self, segments: list[Segment], ids: list[list[int]], positions: list[list[int]]) -> Tensor:
        cache, device = self.cache, self.model.device
        cache.prefill(segments)
        before = cache.calls
        output = self.model.base_model(
            input_ids=torch.tensor(ids, device=device), position_ids=torch.tensor(positions, device=device),
            use_cache=True, **{self.argument: cache},
        )  # fmt: skip
        if self.interface and cache.calls - before != len(cache.layers):
            raise RuntimeError(
                f"{type(self.model).__name__} called its attention {cache.calls - before} times for {len(cache.layers)}"
                " layers: it does not attend the way generation needs, and its tokens would be wrong"
            )
        return output.last_hidden_state

    # ------------------------------------------------------------------------------------------------ tokens

    def _sample(self) -> None:
        """Draw a token in every slot and write it down with its log-probs; slots that ended write behind the end."""
        sampling, count = self.sampling, len(self.rows)
        counts, ended = self.counts[:count], self.ended[:count]
        raw = logits = head_logits(self.head, self.hidden)
        if sampling.min_new_tokens and len(self.stops):
            held = torch.zeros_like(raw[:, 0]).masked_fill_(counts < sampling.min_new_tokens, -math.inf)
            logits = raw.index_add(1, self.stops, held[:, None].expand(-1, len(self.stops)))
        sampled = sample_tokens(
            logits, temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p, seed=sampling.seed,
            offset=counts, stream=self.streams[:count],
        )  # fmt: skip
        policy = sampled.policy_log_probs
        if logits is not raw:  # the policy's own log-prob knows nothing of the suppressed stops
            own = token_log_probs(raw, sampled.tokens, temperature=sampling.temperature or 1.0)
            policy = torch.where(counts < sampling.min_new_tokens, own, policy)
        place = (self.places[:count], torch.where(ended, sampling.max_new_tokens, counts))
        self.tokens[place], self.log_probs[place], self.policy_log_probs[place] = (
            sampled.tokens,
            sampled.log_probs,
            policy,
        )
        if self.value_head is not None:
            self.values[place] = F.linear(self.hidden.float(), self.value_head.weight.float())[:, 0]
        self.last[:count] = sampled.tokens
        counts += (~ended).long()
        if len(self.stops):
            ended |= (sampled.tokens[:, None] == self.stops).any(1)
        ended |= counts >= sampling.max_new_tokens

    def _forward(self) -> None:
        """The last tokens through the model: hidden states that predict the next ones."""
        count = computed = len(self.rows)
        self.longest += 1
        if self.graphs is None:
            self.hidden = self._step(count, min(self.longest, self.cache.positions))
        else:
            self.hidden, computed = self.graphs.run(count)
        self.stats["decode_row_steps"] += computed
        self.stats["decode_steps"] += 1
        self.lengths[:count] += (~self.ended[:count]).long()

    def _step(self, count: int, longest: int) -> Tensor:
        """The last token of the first `count` slots -> their hidden states. Reads and writes fixed addresses only."""
        lengths, cache = self.lengths[:count], self.cache
        cache.decode(self.places[:count], lengths, longest)
        mask = {} if self.interface else {"attention_mask": cache.mask(None, self.model.dtype)}
        output = self.model.base_model(
            input_ids=self.last[:count, None], position_ids=lengths[:, None].clone(), use_cache=True,
            **{self.argument: cache}, **mask,
        )  # fmt: skip
        return output.last_hidden_state[:, -1]

    def _harvest(self) -> None:
        """Rows that ended leave; the rows of the last slots move into the holes."""
        count = len(self.rows)
        holes = self.ended[:count].nonzero()[:, 0].tolist()
        if not holes:
            return
        sizes = self.counts[holes].tolist()
        tokens, log_probs, policy, values = (
            t[holes].cpu() for t in (self.tokens, self.log_probs, self.policy_log_probs, self.values)
        )
        for i, (slot, size) in enumerate(zip(holes, sizes, strict=True)):
            row = self.rows[slot]
            row.tokens = tokens[i, :size].tolist()
            row.log_probs, row.policy_log_probs = log_probs[i, :size].clone(), policy[i, :size].clone()
            row.values = values[i, :size].clone()
            row.finished = row.tokens[-1] in self.sampling.stops
        gone = set(holes)
        kept = count - len(holes)
        moves = list(zip([slot for slot in holes if slot < kept], [s for s in range(kept, count) if s not in gone],
                         strict=True))  # fmt: skip
        for target, source in moves:
            self.cache.copy(source, [target], self._held(source))
            self.rows[target] = self.rows[source]
        del self.rows[kept:]
        if moves:
            targets, sources = (list(part) for part in zip(*moves, strict=True))
            for state in (self.lengths, self.streams, self.counts, self.last, self.ended, self.tokens, self.log_probs,
                          self.policy_log_probs, self.values):  # fmt: skip
                state[targets] = state[sources]
        if self.rows and self.lengths.device.type == "cpu":
            self.longest = int(self.lengths[: len(self.rows)].max())
        elif not self.rows:
            self.longest = 0

    def _held(self, slot: int) -> int:
        """Tokens in a slot's cache, or a bound on them that needs no look at the device."""
        return int(self.lengths[slot]) if self.lengths.device.type == "cpu" else self.longest
