"""What only a GPU would show, shown without one: tensors that lie on a device that is not there.

Fake tensors have shapes, dtypes and devices and no numbers; an operation over two devices is an error, as it is there.
"""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastrlhf.models.heads import Head, head_logits
from fastrlhf.models.loading import scalar_model
from tests import tiny

GPU = torch.device("cuda", 0)


@pytest.mark.parametrize("rows", [(4,), (1, 8)], ids=["a token a row", "a sequence"])
@pytest.mark.parametrize(
    "states, weights", [("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "bfloat16")]
)
def test_logits_of_any_shape_and_dtype(rows, states, weights):
    with FakeTensorMode():
        hidden = torch.empty(*rows, 16, dtype=getattr(torch, states), device=GPU)
        weight = torch.empty(50, 16, dtype=getattr(torch, weights), device=GPU)
        logits = head_logits(Head(weight, torch.empty(50, device=GPU), 2.0, 30.0), hidden)
    assert (tuple(logits.shape), logits.dtype, logits.device) == ((*rows, 50), torch.float32, GPU)


def test_a_new_head_lies_where_the_trunk_does_that_it_shares():
    """Reward training from a causal LM."""
    model = scalar_model(tiny.llama().to("meta"), tiny.tokenizer(), seed=0, share=True)
    assert {p.device.type for p in model.parameters()} == {"meta"}
