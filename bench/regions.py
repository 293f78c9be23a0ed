"""Kernels that a compiled decoder layer starts in a step of decoding, read from the code that torch's compiler writes.

On a CPU the compiler writes C++ and a GPU's Triton, but what it fuses is decided before: a line that starts a fused
loop, a library's product or an operator of ours is one kernel on either. (A GPU's decoding attention is one more where
it splits long sequences.)
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch._inductor.graph import GraphLowering
from transformers import AutoModelForCausalLM, PreTrainedConfig

from fastrlhf import RolloutEngine
from fastrlhf.rollout import compiled

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


def of_model(kind: type[PreTrainedConfig], dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    """What a step of a layer starts and how many kernels these are, with the weights of q, k, v and of gate, up apart
    and joined; of several kinds of layers the most. The model is small: what is fused does not depend on its sizes."""
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    ids = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    found = {}
    for form, share in (("apart", 0.0), ("joined", 1.0)):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(kind(**sizes, **heads, **ids)).to(dtype).eval()
        with mock.patch.object(compiled, "JOINED_SHARE", share), kernels() as graphs:
            RolloutEngine(model, compile=True).check(32)
        starts = max(graphs, key=len)
        found[form] = {"kernels": len(starts), "starts": starts}
    return found
