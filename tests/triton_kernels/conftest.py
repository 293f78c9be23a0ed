"""These tests run Triton kernels: on a GPU, or in the interpreter (TRITON_INTERPRET=1, in a pytest of its own)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from fastrlhf_kernels import backend

CAN_RUN = backend.TRITON and (backend.INTERPRET or torch.cuda.is_available())
HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if CAN_RUN:
        return
    if os.environ.get("FASTRLHF_REQUIRE_TRITON") == "1":
        raise pytest.UsageError("FASTRLHF_REQUIRE_TRITON=1, but no Triton kernel can run here: set TRITON_INTERPRET=1")
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="Triton kernels need a GPU or TRITON_INTERPRET=1"))


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu" if backend.INTERPRET else "cuda")
