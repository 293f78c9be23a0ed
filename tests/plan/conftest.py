"""The model that is planned: a folder with its configuration alone."""

from __future__ import annotations

import pytest
from transformers import LlamaConfig

from bench import plan as bench

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 512}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """Of a Llama with the sizes of SMALL."""
    path = tmp_path_factory.mktemp("config")
    LlamaConfig(**{**bench.SHAPE, **SMALL}, architectures=["LlamaForCausalLM"]).save_pretrained(path)
    return str(path)
