"""What decoding remembers: of each response in the making, and of the slots that they decode in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


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


class Slots:
    """The state of each slot, on the device: row i of every tensor belongs to the sequence in slot i.

    The tensors are written in place and never replaced, because a CUDA graph reads them by address. Rows behind the
    last sequence hold what earlier sequences left there.
    """

    def __init__(self, slots: int, max_new_tokens: int, device: torch.device) -> None:
        def whole(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        self.lengths = whole(slots)  # tokens of prompt and response whose keys and values the cache holds
        self.streams = whole(slots)  # `Row.stream`
        self.counts = whole(slots)  # response tokens drawn
        self.last = whole(slots)  # the token drawn last, which the next forward reads
        self.ended = whole(slots).bool()  # the response is complete
        # The column behind the last token takes what is drawn for sequences that have ended, until the host looks.
        columns = max_new_tokens + 1
        self.tokens = whole(slots, columns)
        self.log_probs, self.policy_log_probs, self.values = torch.zeros(3, slots, columns, device=device)

    def reset(self) -> None:
        """As new, at the same addresses."""
        for state in vars(self).values():
            state.zero_()

    def enter(self, rows: Sequence[Row], first: int) -> None:
        """Rows that start with their prompts computed, in the slots from `first` on."""
        new, device = slice(first, first + len(rows)), self.lengths.device
        self.lengths[new] = torch.tensor([len(row.prompt) for row in rows], device=device)
        self.streams[new] = torch.tensor([row.stream for row in rows], device=device)
        self.counts[new] = 0
        self.ended[new] = False

    def results(self, slots: Sequence[int]) -> Iterator[tuple[list[int], Tensor, Tensor, Tensor]]:
        """tokens, log_probs, policy_log_probs and values of each of these slots, on the CPU."""
        sizes = self.counts[slots].tolist()
        columns = (self.tokens, self.log_probs, self.policy_log_probs, self.values)
        tokens, *scores = (state[slots].cpu() for state in columns)
        for i, size in enumerate(sizes):
            yield tokens[i, :size].tolist(), *(score[i, :size].clone() for score in scores)

    def move(self, targets: Sequence[int], sources: Sequence[int]) -> None:
        """Everything that is known of the sequences in the slots `sources` goes to the slots `targets`."""
        for state in vars(self).values():
            state[targets] = state[sources]
