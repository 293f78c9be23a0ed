"""SFT rows that do not fit, are malformed, or belong to another model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastrlhf import UserError
from tests import tiny
from tests.sft_runs import SINGLE, config, log, trainer

LONG = {"prompt": tiny.chat("the cat"), "response": " ".join(tiny.TEXTS[:3])}


def test_a_row_that_is_too_long_is_dropped_and_counted(tmp_path):
    t = trainer(config(max_tokens=32, output_dir=str(tmp_path / "run")), data=[*SINGLE, LONG])
    assert len(t.items) == len(SINGLE)
    assert "7 rows read, 6 used, dropped: 1 longer than max_tokens = 32" in log(tmp_path / "run")


def test_a_row_that_is_cut_ends_open_and_is_counted(tmp_path):
    cfg = config(max_tokens=32, overlong="truncate", output_dir=str(tmp_path / "run"))
    t = trainer(cfg, data=[*SINGLE, LONG])
    (whole,) = trainer(config(max_tokens=100), data=[LONG]).items
    cut = t.items[-1]
    assert cut.ids == whole.ids[:32] and cut.target == whole.target[:32]
    assert cut.ids[-1] != t.tokenizer.eos_token_id  # a made-up EOS would teach to stop there
    assert all(e.ids[-1] == t.tokenizer.eos_token_id for e in t.items[:-1])
    assert "7 rows read, 7 used; 1 cut to max_tokens = 32" in log(tmp_path / "run")


def test_a_prompt_that_leaves_no_room_is_dropped_and_counted(tmp_path):
    row = {"prompt": tiny.chat(" ".join(tiny.TEXTS)), "response": "no"}
    cfg = config(max_tokens=32, overlong="truncate", output_dir=str(tmp_path / "run"))
    assert len(trainer(cfg, data=[*SINGLE, row]).items) == len(SINGLE)
    assert "6 used, dropped: 1 with no reply within max_tokens = 32" in log(tmp_path / "run")


def test_nothing_left_is_an_error():
    with pytest.raises(UserError, match=r"data: nothing left.*1 rows read, 0 used.*raise max_tokens"):
        trainer(config(max_tokens=8), data=[LONG])


def write(path: Path, rows: list[object]) -> str:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return str(path)


BAD = {"promt": "the cat", "response": "no"}


def test_a_malformed_row_names_file_and_line(tmp_path):
    with pytest.raises(UserError, match=r"rows\.jsonl:2: .*prompt"):
        trainer(data=write(tmp_path / "rows.jsonl", [SINGLE[0], BAD]))


def test_malformed_rows_are_skipped_and_counted_on_request(tmp_path):
    path = write(tmp_path / "rows.jsonl", [SINGLE[0], BAD, '{"prompt": ', SINGLE[1]])
    t = trainer(config(skip_bad_rows=True, output_dir=str(tmp_path / "run")), data=path)
    assert len(t.items) == 2
    assert "4 rows read, 2 used, dropped: 2 malformed" in log(tmp_path / "run")


def test_a_row_longer_than_the_model_is_refused_before_training():
    rows = [{"text": " ".join(tiny.TEXTS * 2)}]
    with pytest.raises(UserError, match=r"max_tokens = 999: the longest row has \d+ tokens and .* 128 positions"):
        trainer(config(max_tokens=999), model=tiny.gpt2(), data=rows)


def test_a_tokenizer_of_another_model_is_refused_before_training():
    with pytest.raises(UserError, match=r"tokenizer: it writes token \d+ and the model has 100"):
        trainer(model=tiny.llama(vocab_size=100))
