"""Kernels that a compiled decoder layer starts in a step of decoding, read from the code that torch's compiler writes.

On a CPU the compiler writes C++ and a GPU's Triton, but what it fuses is decided before: a line that starts a fused
loop, a library's product or an operator of ours is one kernel on either. (A GPU's decoding attention is one more where
it splits long sequences.)
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch._inductor.graph import GraphLowering

STARTS = re.compile(r"^\s+(?:\w+ = )?(cpp_fused\w*|triton_\w+|extern_kernels\.\w+|torch\.ops\.\w+\.\w+\.\w+)\(", re.M)


@contextmanager
def kernels() -> Iterator[list[list[str]]]:
    """-> what each graph that is compiled in this context starts, in order; no cache of graphs is read."""
    graphs: list[list[str]] = []

    def look(code: str) -> None:
        graphs.append(STARTS.findall(code))

    caches = (
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    )
    with caches[0], caches[1], mock.patch.object(GraphLowering, "save_output_code", look):
        yield graphs
