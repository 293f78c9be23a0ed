"""Decoding steps as CUDA graphs: a small model's step is a thousand launches, which take longer than its work.

One graph a bucket of batch sizes, good for sequences of any length: lengths are read on the device, and the grids of
the kernels depend on shapes only. A graph holds addresses: it is good as long as cache, state and weights stay where
they are, which the engine looks at before each rollout. All are recorded at once, the largest first: the smaller ones
find their memory in its pool. Drawing tokens stays outside: its seed, another one each rollout, is a number of the
launch.

No GPU has confirmed this file's figures or its choice of what is a capture error.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from fastrlhf.config.limits import collector_paused
from fastrlhf.runtime.memory import ran_out

LOG = logging.getLogger(__name__)
Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]


def bucket_of(count: int, most: int) -> int:
    """The batch size that `count` rows are padded to: 1, 2, 4, 8, 12, 16, 24, 32, 48 ..., at most `most`."""
    power = 1 << (count - 1).bit_length()
    between = power * 3 // 4
    return min(most, between if power > 8 and between >= count else power)


def buckets(most: int) -> list[int]:
    """All batch sizes that up to `most` rows are padded to, the largest first."""
    return sorted({bucket_of(count, most) for count in range(1, most + 1)}, reverse=True)


def cuda_capture() -> Capture:
    """-> a function that records a step: (replay, the tensor that each replay fills). The graphs share one pool."""
    pool, side = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def capture(step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()  # compiles kernels, fills caches: what must not happen while recording
            graph = torch.cuda.CUDAGraph()
            torch.cuda.synchronize()
            # A graph that goes while another is recorded breaks the record. (torch.cuda.graph collects first, and
            # empties the allocator: most of the time of a capture, once a bucket and rollout.)
            with collector_paused():
                graph.capture_begin(pool=pool)
                try:
                    hidden = step()
                finally:
                    graph.capture_end()
        torch.cuda.current_stream().wait_stream(side)
        return graph.replay, hidden

    return capture


class StepGraphs:
    """Runs `step(rows)` by replaying a graph of its bucket; eagerly, with a logged reason, where it cannot be recorded.

    Only what CUDA refuses while it records is such a reason: an operation that waits for the GPU, or allocates outside
    the pool. Every other error is one (a kernel that does not compile, an illegal address, no memory).
    """

    def __init__(self, step: Callable[[int], Tensor], most: int, capture: Capture, holds: Sequence[int] = ()) -> None:
        """most: rows of the largest step. holds: the addresses of the weights that it reads."""
        self.step, self.most, self.capture, self.holds = step, most, capture, holds
        self.graphs: dict[int, tuple[Callable[[], None], Tensor]] = {}
        self.failed = False

    def run(self, count: int) -> tuple[Tensor, int]:
        """-> (hidden states of the first `count` rows, rows computed)."""
        if not self.graphs and not self.failed:
            self._record()
        if self.failed:
            return self.step(count), count
        bucket = bucket_of(count, self.most)
        replay, hidden = self.graphs[bucket]
        replay()
        return hidden[:count], bucket

    def _record(self) -> None:
        try:
            for bucket in buckets(self.most):
                self.graphs[bucket] = self.capture(partial(self.step, bucket))
        except RuntimeError as error:
            self.graphs.clear()  # some alone would tie up their pool for nothing
            if ran_out(error) or "captur" not in str(error).lower():
                raise
            self.failed = True
            LOG.warning("decoding without CUDA graphs: %s", str(error).strip().split("\n")[0])
