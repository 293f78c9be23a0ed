"""Rows no model could read."""

from __future__ import annotations

import pytest

from fastrlhf import UserError
from fastrlhf.runtime.guards import check_rows
from tests import tiny


def test_rows_a_model_can_read():
    check_rows(tiny.gpt2(), [[0, 319], [5] * 128], 1000)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([0, 320], "tokenizer: it writes token 320 and the model has 320"),
        ([5] * 129, "max_tokens = 1000: the longest row has 129 tokens .* 128 positions; set max_tokens=128"),
    ],
)
def test_rows_a_model_cannot_read(row, message):
    with pytest.raises(UserError, match=message):
        check_rows(tiny.gpt2(), [[1], row], 1000)
