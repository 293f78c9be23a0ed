"""Token rows as tensors: prompt and response of PPO, examples of SFT, all through one index.

The value and the log-prob of the token at t are both read at the position before it in the trunk's output. One index,
made here, serves both: an off-by-one between them is the classic PPO bug. Rows are padded once, on the right, or
several sequences are joined in one row, where positions restart with every sequence. Flash attention finds the
sequences by that and computes each alone (its varlen form); transformers makes a block mask of it for SDPA and eager
attention, whose cost grows with the square of the row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastrlhf.config.errors import UserError
from fastrlhf.data.encode import Example
from fastrlhf.models.heads import Head, check_packing, head_logits, hidden_states, lm_head, right_padded
from fastrlhf.runtime.batching import assign_rows, micro_batches
from fastrlhf_kernels import linear_log_probs


class TargetRow(NamedTuple):
    """Token ids of one sequence, and the positions of those that a loss reads (position 0 is never predicted)."""

    ids: Sequence[int]
    targets: Sequence[int]


def target_row(example: Example) -> TargetRow:
    """Return an example of SFT as a row of a TokenBatch."""
    return TargetRow(example.ids, [position for position, target in enumerate(example.target) if target])


@dataclass(frozen=True)
class TokenBatch:
    """input_ids [B, L] int64, right padded; index [N] into B*L: what predicts each target token; labels [N].

    position_ids [B, L] restart with every sequence where a row holds several; None where each row holds one.
    """

    input_ids: Tensor
    index: Tensor
    labels: Tensor
    position_ids: Tensor | None = None

    @classmethod
    def build(cls, rows: Sequence[Sequence[TargetRow]], device: torch.device) -> TokenBatch:
        """Each row holds the sequences that are joined in it. N runs over the target tokens of all sequences in order,
        so it flattens [B, T] tensors under their mask. Without rows there is one of a token that predicts nothing, for
        the ranks that have some (`in_step`)."""
        rows = rows or [[TargetRow([0], [])]]
        width = max(sum(len(sequence.ids) for sequence in row) for row in rows)
        input_ids = torch.zeros(len(rows), width, dtype=torch.int64)
        # Behind joined sequences, which may be longer than the model has positions, the padding stays at position 0.
        positions = torch.zeros_like(input_ids)
        index: list[int] = []
        labels: list[int] = []
        for number, row in enumerate(rows):
            start = 0
            for ids, targets in row:
                end = start + len(ids)
                input_ids[number, start:end] = torch.tensor(ids)
                positions[number, start:end] = torch.arange(len(ids))
                index += [number * width + start + target - 1 for target in targets]
                labels += [ids[target] for target in targets]
                start = end
        joined = any(len(row) > 1 for row in rows)
        return cls(
            input_ids.to(device, non_blocking=True),  # else the host would wait for all that the device has to do
            torch.tensor(index, dtype=torch.int64).to(device, non_blocking=True),
            torch.tensor(labels, dtype=torch.int64).to(device, non_blocking=True),
            positions.to(device, non_blocking=True) if joined else None,
        )

    def hidden(self, model: PreTrainedModel) -> Tensor:
        """Return the states [N, H] that predict the target tokens; nothing else reaches a head."""
        return hidden_states(model, self.input_ids, self.position_ids).flatten(0, 1)[self.index]


def target_log_probs(
    model: PreTrainedModel,
    batch: TokenBatch,
    temperature: float = 1.0,
    hidden: Tensor | None = None,
    workspace: int | None = None,
) -> Tensor:
    """Return log p [N] fp32 of the target tokens at a temperature; no logits tensor is made.

    hidden [N, H]: `batch.hidden(model)`, where it is known. workspace: bytes, `MemoryBackoff.workspace` of a run.
    """
    hidden = batch.hidden(model) if hidden is None else hidden
    head = lm_head(model)  # behind the trunk, which gathers a sharded one
    options = {"temperature": temperature, "workspace": workspace, **head.kwargs()}
    return linear_log_probs(hidden, head.weight, batch.labels, **options)


def token_states(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """Return the final hidden states [L_i, H] of each token row, from one forward."""
    input_ids, lengths = right_padded(rows, model.config.pad_token_id or 0, model.device)
    hidden = hidden_states(model, input_ids)
    return [states[:length] for states, length in zip(hidden, lengths.tolist(), strict=True)]


def reply_log_probs(
    head: Head, states: Sequence[Tensor], rows: Sequence[TargetRow], workspace: int | None = None
) -> list[Tensor]:
    """Return log p [T_i] fp32 of the target tokens of each row, from its `token_states`; no logits tensor is made.

    workspace: as `target_log_probs` has it.
    """
    read = [s[[t - 1 for t in row.targets]] for s, row in zip(states, rows, strict=True)]
    labels = torch.tensor([row.ids[t] for row in rows for t in row.targets], device=read[0].device)
    log_probs = linear_log_probs(torch.cat(read), head.weight, labels, workspace=workspace, **head.kwargs())
    return list(log_probs.split([len(row.targets) for row in rows]))


@torch.no_grad()
def likeliest_tokens(model: PreTrainedModel, hidden: Tensor, block: int = 1 << 13) -> Tensor:
    """Return the id [N] int64 of the highest logit of each of hidden [N, H]; a block of the vocabulary at a time."""
    head = lm_head(model)
    best = torch.full((len(hidden),), -torch.inf, device=hidden.device)
    tokens = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
    for start in range(0, len(head.weight), block):
        part = slice(start, start + block)
        bias = None if head.bias is None else head.bias[part]
        value, index = head_logits(head._replace(weight=head.weight[part], bias=bias), hidden).max(-1)
        tokens = torch.where(value > best, index + start, tokens)  # of equal ones the lowest id
        best = torch.maximum(best, value)
    return tokens


@dataclass(frozen=True)
class TokenRows:
    """Prompts and responses of a rollout as token ids, prompt-major: all that learning reads of them.

    The ids are the sampled ones, never re-encoded text. joined: whether the rows of a micro-batch share one row.
    """

    prompt_ids: list[list[int]]
    response_ids: list[list[int]]
    joined: bool = False

    def __len__(self) -> int:
        return len(self.response_ids)

    def __getitem__(self, part: slice) -> TokenRows:
        return TokenRows(self.prompt_ids[part], self.response_ids[part], self.joined)

    def whole(self, row: int) -> list[int]:
        """Return prompt and response of a row, one behind the other."""
        return self.prompt_ids[row] + self.response_ids[row]

    def batch(self, rows: Sequence[int], device: torch.device) -> TokenBatch:
        """Return these rows as tensors; their targets are the response tokens."""
        sequences = []
        for row in rows:
            start, ids = len(self.prompt_ids[row]), self.whole(row)
            sequences.append(TargetRow(ids, range(start, len(ids))))
        return TokenBatch.build([sequences] if self.joined and sequences else [[s] for s in sequences], device)

    def micro_batches(self, rows: Sequence[int], budget: int) -> list[list[int]]:
        """Cut this rank's part of `rows` into groups of at most `budget` tokens.

        The groups depend on which rows these are, not on their order.
        """
        rows = sorted(rows)
        lengths = [len(self.prompt_ids[row]) + len(self.response_ids[row]) for row in rows]
        mine = assign_rows(lengths)
        groups = micro_batches([lengths[i] for i in mine], budget, joined=self.joined)
        return [[rows[mine[i]] for i in group] for group in groups]


def joined(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Join sequences in one row -> input_ids and position_ids [1, sum of lengths] int64; positions restart with every
    sequence."""
    ids = torch.tensor([[token for row in rows for token in row]], dtype=torch.int64)
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    return ids.to(device, non_blocking=True), positions.to(device, non_blocking=True)


def resolve_packing(wanted: bool | None, models: Sequence[PreTrainedModel]) -> bool:
    """Decide the option `packing` for the models that would read joined rows.

    auto (None): joined where all of them run a flash attention and keep sequences apart. UserError where it is wanted
    of a model that would let them see each other.
    """
    if wanted is None:
        flash = all("flash" in str(model.config._attn_implementation) for model in models)
        return flash and all(map(_keeps_apart, models))
    if wanted:
        for model in models:
            check_packing(model)
    return wanted


def _keeps_apart(model: PreTrainedModel) -> bool:
    try:
        check_packing(model)
    except UserError:
        return False
    return True
