"""The processes of a run (ranks), one a device: how they share rows and add up what they computed.

`torchrun --nproc-per-node N -m fastrlhf ppo RECIPE` starts them; without it there is one, and nothing here does
anything. Every rank holds all weights and runs the same steps on its share of the rows; gradients and sums are added
over the ranks before anything is decided from them, so all decide alike and stay equal to the bit. The engine is
torch.distributed (gloo on CPU, NCCL on GPUs). Its DistributedDataParallel wrapper is not used: it hooks into a model's
own forward and backward, and the fused losses go round the first while fp32 master gradients replace the second.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor

from fastrlhf.runtime import launch
from fastrlhf.runtime.launch import RankLost

PATIENCE = timedelta(hours=6)  # the others wait while the lead saves or asks a judge; torchrun ends dead ranks
BUCKET_ELEMENTS = 1 << 23  # of the buffers that gradients travel in
_stores: list[dist.Store] = []  # of the process group, once there is one


def device() -> torch.device:
    """The device of this process, which also becomes torch's current one: the CUDA device of its number on this
    machine, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if size() == 1:
        return torch.device("cuda")
    torch.cuda.set_device(launch.local_rank())
    return torch.device("cuda", launch.local_rank())


def size() -> int:
    """How many ranks there are."""
    return launch.world_size()


def rank() -> int:
    """The number of this one, from 0."""
    return launch.rank()


def is_lead() -> bool:
    """True in the rank that writes files and talks."""
    return rank() == 0


def is_first_reporter() -> bool:
    """True in one process only: whichever asks first. For a message that several would print."""
    if not _stores:
        return launch.local_rank() == 0
    try:
        return _stores[0].add("fastrlhf/said", 1) == 1
    except RuntimeError:  # the store's process is the one that is gone
        return True


# ------------------------------------------------------------------------------------------------------- adding it up


@contextmanager
def _together() -> Iterator[None]:
    """Around what all ranks do at once: starts the process group; a rank that is gone is one sentence."""
    try:
        if not _stores:
            store, number, count = next(dist.rendezvous("env://"))
            if launch.most_restarts() > 0:
                store = _of_this_start(store, number, count)
            backend = "nccl" if device().type == "cuda" else "gloo"
            dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=PATIENCE)
            _stores.append(store)
        yield
    except RuntimeError as error:
        raise _lost(error) from error


def _of_this_start(store: dist.Store, number: int, count: int) -> dist.Store:
    """The part of the store that belongs to this start of the ranks. torchrun keeps one store over restarts, with the
    addresses that dead ranks have left there; a machine counts its own failures alone, so no number that all of them
    know says which start this is. Rank 0 draws a name for it and tells whoever asks, by a name of its own."""
    own = uuid4().hex
    if number > 0:
        store.set(f"fastrlhf/ask/{number}", own)
        name = store.get(f"fastrlhf/answer/{own}").decode()
        store.set(f"fastrlhf/told/{name}/{number}", "1")
        return dist.PrefixStore(name, store)
    waiting = set(range(1, count))
    while waiting:
        for other in sorted(waiting):
            ask, told = f"fastrlhf/ask/{other}", f"fastrlhf/told/{own}/{other}"
            if store.check([ask]):  # perhaps a dead one's; the live one will ask again
                store.set(f"fastrlhf/answer/{store.get(ask).decode()}", own)
            if store.check([told]):
                waiting.discard(other)
        time.sleep(0.02)
    return dist.PrefixStore(own, store)


def _lost(error: RuntimeError) -> RankLost:
    reason = str(error).strip().splitlines()[0][:200]
    return RankLost(f"another rank of this run is gone, so rank {rank()} ends too ({reason})")


@contextmanager
def inside_the_model() -> Iterator[None]:
    """Around work in which a sharded model talks to the other ranks: one that is gone is the same sentence. Any other
    error stays what it is."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, RankLost) or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        raise _lost(error) from error


def begin() -> None:
    """Start the process group, where none of the functions below has."""
    with _together():
        pass


def memory() -> float:
    """Bytes of this rank's device, on the rank where they are least; of a CPU infinite."""
    here = device()
    total = torch.cuda.get_device_properties(here).total_memory if here.type == "cuda" else float("inf")
    return float(gather(torch.tensor([total], dtype=torch.float64)).min())


def largest(count: int) -> int:
    """The largest of the ranks' numbers."""
    return int(gather(torch.tensor([count])).max())


def all_reduce_sum(*tensors: Tensor) -> None:
    """Sum each tensor over the ranks, in place."""
    if size() == 1:
        return
    with _together():
        for tensor in tensors:
            moved = tensor.to(device())
            dist.all_reduce(moved)
            if moved is not tensor:
                tensor.copy_(moved)


def any_of(flag: bool) -> bool:
    """Whether the flag is set in any rank."""
    if size() == 1:
        return flag
    seen = torch.tensor([float(flag)])
    all_reduce_sum(seen)
    return bool(seen.item())


def anywhere(flags: Sequence[bool]) -> list[bool]:
    """For each flag whether it is set in any rank; all give as many."""
    if size() == 1:
        return list(flags)
    seen = torch.tensor([float(flag) for flag in flags])
    all_reduce_sum(seen)
    return [count > 0 for count in seen.tolist()]


def sum_scattered(flat: Tensor) -> Tensor:
    """Sum a tensor [ranks * n] over the ranks -> this rank's n elements of it."""
    mine = flat.new_empty(len(flat) // size())
    with _together():
        dist.reduce_scatter_tensor(mine, flat)
    return mine


def gather_equal(part: Tensor) -> Tensor:
    """The ranks' tensors [n] behind each other, [ranks * n]; n is the same for all."""
    whole = part.new_empty(size() * len(part))
    with _together():
        dist.all_gather(list(whole.split(len(part))), part)
    return whole


def gather(tensor: Tensor) -> Tensor:
    """The ranks' tensors [n_r, ...] behind each other; n_r may differ, the rest may not."""
    return tensor if size() == 1 else torch.cat(gather_each(tensor))


def gather_each(tensor: Tensor) -> list[Tensor]:
    """The tensor [n_r, ...] of every rank, in their order; n_r may differ, the rest may not."""
    if size() == 1:
        return [tensor]
    sent = tensor.to(device(), torch.uint8 if tensor.dtype == torch.bool else tensor.dtype).contiguous()
    with _together():
        counts = torch.zeros(size(), dtype=torch.int64, device=sent.device)
        counts[rank()] = len(sent)
        dist.all_reduce(counts)
        sizes = counts.tolist()
        padded = sent.new_zeros(max(sizes), *sent.shape[1:])
        padded[: len(sent)] = sent
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
    return [part[:n].to(tensor.device, tensor.dtype) for part, n in zip(parts, sizes, strict=True)]


def wait_for_all() -> None:
    """Return once every rank is here."""
    if size() > 1:
        any_of(False)


@contextmanager
def lead_first() -> Iterator[None]:
    """The lead runs the block before the others do: it may make the files that they read."""
    if not is_lead():
        wait_for_all()
    yield
    if is_lead():
        wait_for_all()


@torch.no_grad()
def all_reduce_gradients(parameters: Sequence[Tensor]) -> None:
    """Sum the gradients over the ranks. One that no rank has stays None; a rank without rows counts as zeros."""
    if size() == 1:
        return
    wanted = [
        p for p, found in zip(parameters, anywhere([p.grad is not None for p in parameters]), strict=True) if found
    ]
    for p in wanted:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    for bucket in _buckets(wanted):
        flat = torch.cat([p.grad.flatten() for p in bucket])
        all_reduce_sum(flat)
        for p, summed in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
            p.grad.copy_(summed.view_as(p))


def _buckets(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Pieces of one dtype with at most BUCKET_ELEMENTS (or a single larger tensor)."""
    bucket: list[Tensor] = []
    filled = 0
    for p in parameters:
        if bucket and (filled + p.numel() > BUCKET_ELEMENTS or p.grad.dtype != bucket[0].grad.dtype):
            yield bucket
            bucket, filled = [], 0
        bucket.append(p)
        filled += p.numel()
    if bucket:
        yield bucket
