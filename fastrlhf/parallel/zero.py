"""parallel = zero: each rank trains its share of the weights (ZeRO, Rajbhandari et al. 2020, arXiv 1910.02054, stages 1
and 2 at the update).

Every rank holds all weights, so that rollouts, scoring and the forward pass are those of one process. What an update
needs besides is shared: fp32 masters and Adam's moments of a weight lie in one rank. The gradients of all micro-batches
are added up where they arise, in fp32, and then once an update summed over the ranks and scattered, a bucket at a time,
each freed at once; every rank updates its share, and the new weights are gathered in the dtype of the model. Gradients
and weights cross the wire once each, where `ddp` sends the fp32 gradients twice.

A weight's update looks at that weight alone (AdamW; the norm is summed over the ranks), so the shares change no number
but the order of sums. A checkpoint holds whole tensors under the names of `ddp`: it may go on with any number of ranks
and any `parallel`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastrlhf.parallel.shares import SharesOptimizer
from fastrlhf.runtime import distributed
from fastrlhf.runtime.distributed import BUCKET_ELEMENTS


class Piece(NamedTuple):
    """The elements start:stop of a flat parameter, which a rank trains. at: where they begin in its part of its
    bucket."""

    parameter: int
    start: int
    stop: int
    at: int


class Bucket(NamedTuple):
    """Parameters of one dtype that travel together: flat, behind each other, in equal parts of `part` elements, a rank
    each (behind the last one zeros). mine: this rank's pieces."""

    parameters: list[int]
    part: int
    mine: list[Piece]


def buckets_of(sizes: Sequence[int], dtypes: Sequence[torch.dtype], ranks: int, rank: int) -> list[Bucket]:
    """Parameters of these sizes and dtypes in buckets of at most BUCKET_ELEMENTS, or of a single larger one, with the
    pieces of one of the ranks."""
    groups: list[list[int]] = []
    filled = 0
    for index, size in enumerate(sizes):
        if not groups or filled + size > BUCKET_ELEMENTS or dtypes[index] != dtypes[groups[-1][-1]]:
            groups.append([])
            filled = 0
        groups[-1].append(index)
        filled += size
    buckets = []
    for group in groups:
        part = -(-sum(sizes[index] for index in group) // ranks)
        first, last, begins, mine = rank * part, (rank + 1) * part, 0, []
        for index in group:
            start, stop = max(first, begins), min(last, begins + sizes[index])
            if start < stop:
                mine.append(Piece(index, start - begins, stop - begins, start - first))
            begins += sizes[index]
        buckets.append(Bucket(group, part, mine))
    return buckets


class ZeroOptimizer(SharesOptimizer):
    """An `Optimizer` whose masters are this rank's pieces of the parameters."""

    def _make_masters(self) -> list[nn.Parameter]:
        sizes, dtypes = [p.numel() for p in self.params], [p.dtype for p in self.params]
        self.buckets = buckets_of(sizes, dtypes, distributed.size(), distributed.rank())
        self.pieces = [piece for bucket in self.buckets for piece in bucket.mine]
        self.owners = [piece.parameter for piece in self.pieces]
        self.in_fp32 = [p.dtype == torch.float32 for p in self.params]
        # The sums of a rank's own micro-batches, whole: an fp32 parameter's own gradient, else beside it.
        self.sums: list[Any] = [p if p.dtype == torch.float32 else SimpleNamespace(grad=None) for p in self.params]
        masters = [nn.Parameter(self._cut(i, self.params[owner]).float()) for i, owner in enumerate(self.owners)]
        device = self.params[0].device if self.params else None
        return masters or [nn.Parameter(torch.empty(0, device=device))]  # more ranks than there are weights

    def _owners_of_gradients(self) -> Sequence[Any]:
        return self.sums

    def _cut(self, share: int, whole: Tensor) -> Tensor:
        """Of a contiguous tensor a view."""
        return whole.detach().reshape(-1)[self.pieces[share].start : self.pieces[share].stop]

    # ------------------------------------------------------------------------------------------------------- an update

    @torch.no_grad()
    def _add_up_ranks(self) -> None:
        found = distributed.anywhere([each.grad is not None for each in self.sums])
        masters = dict(zip(self.pieces, self.masters))
        for bucket in self.buckets:
            if not any(found[index] for index in bucket.parameters):
                continue
            mine = distributed.sum_scattered(self._flat_gradients(bucket))
            for piece in bucket.mine:
                if found[piece.parameter]:
                    masters[piece].grad = mine[piece.at : piece.at + piece.stop - piece.start]

    def _flat_gradients(self, bucket: Bucket) -> Tensor:
        """The sums of a bucket behind each other, in equal parts; they are let go of."""
        device = self.params[bucket.parameters[0]].device
        flat = torch.zeros(bucket.part * distributed.size(), device=device)
        begins = 0
        for index in bucket.parameters:
            size = self.params[index].numel()
            if self.sums[index].grad is not None:
                flat[begins : begins + size] = self.sums[index].grad.reshape(-1)
                self.sums[index].grad = None
            begins += size
        return flat

    def _total_norm(self, grads: list[Tensor]) -> Tensor:
        squares = sum((grad.double().square().sum() for grad in grads), torch.zeros((), dtype=torch.float64))
        total = squares.float()
        distributed.all_reduce_sum(total)
        return total.sqrt()

    @torch.no_grad()
    def _copy_down(self) -> None:
        """Every rank's new weights into all of them."""
        for bucket in self.buckets:
            self._spread(bucket, self._whole(bucket, self.masters, self.params[bucket.parameters[0]].dtype))

    def _whole(self, bucket: Bucket, values: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """A bucket's values of all ranks, flat, from this one's (one a piece, in their order)."""
        of_piece = dict(zip(self.pieces, values))
        part = torch.zeros(bucket.part, dtype=dtype, device=self.params[bucket.parameters[0]].device)
        for piece in bucket.mine:
            part[piece.at : piece.at + piece.stop - piece.start] = of_piece[piece].detach()
        return distributed.gather_equal(part)

    def _spread(self, bucket: Bucket, whole: Tensor) -> None:
        begins = 0
        for index in bucket.parameters:
            param = self.params[index]
            param.copy_(whole[begins : begins + param.numel()].view(param.shape))
            begins += param.numel()

    def zero_grad(self) -> None:
        super().zero_grad()
        for each in self.sums:
            each.grad = None

    # ----------------------------------------------------------------------------------------------------- checkpoints

    def _gathered(self, values: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
        for bucket in self.buckets:
            flat, begins = self._whole(bucket, values, torch.float32), 0
            for index in bucket.parameters:
                param = self.params[index]
                if distributed.is_lead():
                    yield index, flat[begins : begins + param.numel()].view(param.shape).cpu()
                begins += param.numel()

    @torch.no_grad()
    def load_masters(self, tensors: dict[str, Tensor]) -> None:
        for share, (owner, master) in enumerate(zip(self.owners, self.masters)):
            whole = self.params[owner] if self.in_fp32[owner] else tensors[f"master.{owner}"]
            master.copy_(self._cut(share, whole))
