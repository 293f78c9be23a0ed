"""The counts of bench.launches: what is a launch and what is none; the committed ones are those of the code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from transformers import LlamaConfig

from bench import launches
from fastrlhf.config.stages import PPOConfig

RECORD = Path(launches.__file__).parent / "results/launches.json"
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
         "vocab_size": 512}  # fmt: skip


def test_views_are_no_launches_and_what_the_host_waits_for_is_named():
    with launches.Counting() as live:
        weight = live.unknown(lambda: torch.empty(8, 4))
        known = torch.arange(8)
        with live.phase():
            product = weight.T[1:] @ weight  # a view of a view, and one product [3, 4]
            product.add_(1.0)
            torch.empty(100)
            assert float(product.sum()) == 1.0 and product[0].tolist() == [1.0] * 4
            assert int(known.max()) == 7 and len(known[known > 3]) == 4
    (counts,) = live.seen
    assert counts.operators == {"mm": 1, "add_": 1, "sum": 1, "max": 1, "gt": 1, "index": 1}
    assert counts.waits == {"_local_scalar_dense": 1, "tolist": 1}
    assert counts.reads == {"_local_scalar_dense": 1, "index": 1}
    of_product, of_sum = 4 * (3 * 8 + 8 * 4 + 3 * 4), 4 * (12 + 1)
    assert counts.bytes == of_product + 2 * 4 * 12 + of_sum + (8 * 8 + 8) + (8 * 8 + 8) + (8 + 2 * 8 * 4)


@pytest.fixture(scope="module")
def small() -> dict:
    """A small Llama: what a layer starts does not depend on its sizes, or bench.launches would not be of use."""
    patch = pytest.MonkeyPatch()
    patch.setitem(launches.MODELS, "small", (LlamaConfig, SMALL, 6))
    config = launches.CONFIG | {"rollout_batch_size": 4, "mini_batch_size": 4, "max_prompt_tokens": 12}
    try:
        return launches.of_model("small", PPOConfig(**config | {"max_new_tokens": 6}))
    finally:
        patch.undo()


def test_a_layer_starts_whole_operators_and_waits_for_nothing(small):
    assert set(small) == {"prefill", "decode", "reward", "experience", "update of the critic", "update of the policy"}
    for row in small.values():
        layer = row["layer"]
        assert type(layer["operators"]) is int and sum(row["layer_operators"].values()) == layer["operators"]
        assert layer["waits"] == layer["reads"] == 0
        assert row["total"]["operators"] == row["rest"]["operators"] + 6 * layer["operators"]
    assert small["experience"]["layer"]["operators"] == 3 * small["reward"]["layer"]["operators"]
    assert small["decode"]["total"]["waits"] == 0


def test_the_committed_counts_are_those_of_this_code(small):
    """Of a layer of a Llama, with these versions: python -m bench.launches --json bench/results/launches.json."""
    record = json.loads(RECORD.read_text())
    if (record["torch"], record["transformers"]) != (torch.__version__, transformers.__version__):
        pytest.skip(f"counted with torch {record['torch']} and transformers {record['transformers']}")
    for phase, row in record["models"]["smollm2-135m"].items():
        if phase != "prefill":  # whose copies are as many as there are prompts
            assert small[phase]["layer_operators"] == row["layer_operators"], phase


def test_compiled_layers_are_at_most_fourteen_kernels_and_joined_twelve():
    """As recorded; tests/rollout/test_compiled.py counts those of a Llama anew. Qwen3 norms its heads too."""
    for name, forms in json.loads(RECORD.read_text())["regions"].items():
        normed = 2 if name.startswith("qwen3") else 0
        assert all(len(form["starts"]) == form["kernels"] for form in forms.values())
        assert forms["apart"]["kernels"] <= 14 + normed and forms["joined"]["kernels"] <= 12, name
