"""One rollout being decoded: slots that sequences enter, and leave when they end, so that no step is spent on them.

    forward: the last tokens through the model; admit: prompts that wait take free slots, each distinct one is computed
    once; sample: a token a slot, its log-probs written beside it; harvest: finished sequences leave, and the last
    slots move into the holes

The sequences always fill the first slots, so that a step is a forward of so many rows and no slot in it is idle. All
state that a step needs lies on the device (`Slots`); the host looks at it in every harvest only.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from fastrlhf.models.heads import Head, ValueHead, head_logits
from fastrlhf.rollout.cuda_graphs import StepGraphs
from fastrlhf.rollout.recompute import RecomputedTrunk
from fastrlhf.rollout.sampling import SamplingParams
from fastrlhf.rollout.slots import Row, Slots
from fastrlhf.rollout.trunk import CachedTrunk, Prompt
from fastrlhf_kernels import SampledTokens, sample_tokens, token_log_probs


def replayable(trunk: CachedTrunk | RecomputedTrunk, slots: Slots) -> Callable[[int], Tensor]:
    """The step of the first so many slots, at fixed addresses and good for every length: it looks at all positions."""
    return partial(_step, trunk, slots, trunk.cache.positions)


def _step(trunk: CachedTrunk | RecomputedTrunk, slots: Slots, longest: int, count: int) -> Tensor:
    return trunk.step(slots.last[:count], slots.lengths[:count], longest)


class Decoder:
    """Decodes rows in the slots of a cache. One instance a rollout."""

    def __init__(
        self,
        trunk: CachedTrunk | RecomputedTrunk,
        head: Head,
        slots: Slots,
        params: SamplingParams,
        stats: dict[str, float],
        *,
        size: int | None = None,
        value_head: ValueHead | None = None,
        steps: int = 1,
        graphs: StepGraphs | None = None,
    ) -> None:
        """slots: of this rollout alone while it runs; size: how many of them decode together (None: all). A cache with
        one more keeps the prompt whose samples still wait. params: with its stop_token_ids resolved. value_head: read
        beside the model's own, from the hidden state that predicts each token. steps: tokens between two looks of the
        host. graphs: of `replayable(trunk, slots)`."""
        self.trunk, self.cache, self.head, self.value_head = trunk, trunk.cache, head, value_head
        self.params, self.steps, self.stats = params, steps, stats
        self.stops = torch.tensor(params.stop_token_ids, dtype=torch.int64, device=trunk.slots.device)
        self.slots, self.size, self.graphs = slots, size or len(slots.lengths), graphs
        slots.reset()
        self.rows: list[Row] = []  # row of slot i
        self.hidden: Tensor | None = None  # [rows, H], what the next tokens are drawn from
        # No slot holds more tokens. Exact where the host may read lengths for nothing; elsewhere it counts its own
        # steps, and the bound grows until all slots are empty.
        self.longest = 0
        self.stash: tuple[Prompt, Tensor] | None = None  # a prompt whose samples still wait, its last hidden state

    def run(self, rows: Sequence[Row]) -> None:
        """Fill `tokens`, `log_probs`, `policy_log_probs` and `finished` of every row; equal prompts stand together."""
        waiting = deque(rows)
        while waiting or self.rows:
            if self.rows:
                self._forward()
            if self._may_enter(len(waiting)):
                self._admit(waiting)
            self._sample()
            for _ in range(self.steps - 1):
                self._forward()
                self._sample()
            self._harvest()

    # ------------------------------------------------------------------------------------------------ prompts

    def _may_enter(self, waiting: int) -> bool:
        """Prompts are computed in a forward of their own, so rows enter together: an eighth of the slots at least, or
        all that wait. Where every slot is empty there is nothing to wait for."""
        free = self.size - len(self.rows)
        return waiting > 0 and (free == self.size or free >= min(waiting, math.ceil(self.size / 8)))

    def _admit(self, waiting: deque[Row]) -> None:
        """The next rows take the slots behind the last one in use; the prompts among them are computed."""
        first = len(self.rows)
        rows = [waiting.popleft() for _ in range(min(self.size - first, len(waiting)))]
        groups: dict[Prompt, list[int]] = {}  # the slots of each prompt's samples
        for slot, row in enumerate(rows, first):
            groups.setdefault(row.prompt, []).append(slot)
        states = self._unstash(groups)
        new = {prompt: slots[0] for prompt, slots in groups.items() if prompt not in states}
        self.stats["prefill_tokens"] += sum(map(len, new))
        self.stats["waves"] += 1
        states |= self.trunk.prefill(new)
        others = [(slot, other) for prompt, slot in new.items() for other in groups[prompt][1:]]  # start from a copy
        if others:
            self.cache.copy(*zip(*others, strict=True), max(len(p) for p in new if len(groups[p]) > 1))
        if waiting and waiting[0].prompt in groups:
            self._keep(waiting[0].prompt, groups[waiting[0].prompt][0], states)
        added = torch.stack([states[row.prompt] for row in rows])
        self.hidden = added if first == 0 else torch.cat([self.hidden[:first], added])
        self.rows += rows
        self.slots.enter(rows, first)
        self.longest = max(self.longest, *(len(row.prompt) for row in rows))

    # Equal prompts stand together in the queue, so at most one prompt is cut by the end of the free slots: some of its
    # samples decode and others wait. It is stashed: its keys and values in the keeper, the last slot of the cache, and
    # its hidden state here. Decoding writes behind the prompt and the engine gives the cache a slot more than decode,
    # so the keeper stays as it is. With a single slot that slot is the keeper: the next sample starts over in place.

    def _keep(self, prompt: Prompt, slot: int, states: dict[Prompt, Tensor]) -> None:
        self.stash, keeper = (prompt, states[prompt]), self.cache.slots - 1
        if slot != keeper:
            self.cache.copy([slot], [keeper], len(prompt))

    def _unstash(self, groups: dict[Prompt, list[int]]) -> dict[Prompt, Tensor]:
        """The stashed prompt into the slots of its samples -> its hidden state, or nothing; the stash is empty then."""
        stash, self.stash, keeper = self.stash, None, self.cache.slots - 1
        if stash is None or stash[0] not in groups:
            return {}
        prompt, hidden = stash
        targets = [slot for slot in groups[prompt] if slot != keeper]
        self.cache.copy([keeper] * len(targets), targets, len(prompt))
        return {prompt: hidden}

    # ------------------------------------------------------------------------------------------------ tokens

    def _forward(self) -> None:
        """The last tokens through the model: hidden states that predict the next ones."""
        count = computed = len(self.rows)
        self.longest += 1
        if self.graphs is None:
            self.hidden = _step(self.trunk, self.slots, min(self.longest, self.cache.positions), count)
        else:
            self.hidden, computed = self.graphs.run(count)
        self.stats["decode_row_steps"] += computed
        self.stats["decode_steps"] += 1
        self.slots.lengths[:count] += (~self.slots.ended[:count]).long()

    def _sample(self) -> None:
        """Draw a token in every slot and write it down with its log-probs; slots that ended write behind the end."""
        slots, count, most = self.slots, len(self.rows), self.params.max_new_tokens
        counts, ended = slots.counts[:count], slots.ended[:count]
        drawn = self._draw(head_logits(self.head, self.hidden), counts, slots.streams[:count])
        column = (self.trunk.slots[:count], torch.where(ended, most, counts))
        slots.tokens[column] = drawn.tokens
        slots.log_probs[column] = drawn.log_probs
        slots.policy_log_probs[column] = drawn.policy_log_probs
        if self.value_head is not None:
            slots.values[column] = self.value_head(self.hidden)
        slots.last[:count] = drawn.tokens
        counts += (~ended).long()
        if len(self.stops):
            ended |= (drawn.tokens[:, None] == self.stops).any(1)
        ended |= counts >= most

    def _draw(self, logits: Tensor, counts: Tensor, streams: Tensor) -> SampledTokens:
        """A token a row; as long as `counts` is below min_new_tokens, none of the stops."""
        p = self.params
        filters = {"temperature": p.temperature, "top_k": p.top_k, "top_p": p.top_p}
        draw = partial(sample_tokens, **filters, seed=p.seed, offset=counts, stream=streams)
        if not (p.min_new_tokens and len(self.stops)):
            return draw(logits)
        early = counts < p.min_new_tokens
        shift = torch.zeros_like(logits[:, 0]).masked_fill_(early, -math.inf)
        drawn = draw(logits.index_add(1, self.stops, shift[:, None].expand(-1, len(self.stops))))
        # The policy's own log-prob, which the trainer recomputes, knows nothing of stops that were held back.
        policy = token_log_probs(logits, drawn.tokens, temperature=p.temperature or 1.0)
        return drawn._replace(policy_log_probs=torch.where(early, policy, drawn.policy_log_probs))

    def _harvest(self) -> None:
        """Rows that ended leave; the rows of the last slots move into the holes."""
        count = len(self.rows)
        holes = self.slots.ended[:count].nonzero()[:, 0].tolist()
        if not holes:
            return
        for slot, result in zip(holes, self.slots.results(holes), strict=True):
            row = self.rows[slot]
            row.tokens, row.log_probs, row.policy_log_probs, row.values = result
            row.finished = row.tokens[-1] in self.params.stop_token_ids
        kept = count - len(holes)
        targets = [slot for slot in holes if slot < kept]
        sources = sorted({*range(kept, count)} - {*holes})  # as many: what is kept of the slots behind
        on_cpu = self.slots.lengths.device.type == "cpu"
        for target, source in zip(targets, sources, strict=True):
            self.rows[target] = self.rows[source]
        del self.rows[kept:]
        if targets:
            self.cache.copy(sources, targets, int(self.slots.lengths[sources].max()) if on_cpu else self.longest)
            self.slots.move(targets, sources)
        if not self.rows:
            self.longest = 0
        elif on_cpu:
            self.longest = int(self.slots.lengths[:kept].max())
