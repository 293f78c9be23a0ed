"""Rows given from Python: what has rows is read, what is none is refused; nothing is iterated blindly."""

from __future__ import annotations

import io
from collections import UserDict, deque
from pathlib import Path
from types import MappingProxyType

import datasets
import numpy
import pandas
import pyarrow
import pytest
import torch

from fastrlhf import PPOConfig, PPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer, UserError
from fastrlhf.data.dataset import load_feedback, load_prompts
from tests import tiny
from tests.runs import PROMPTS, ROWS

PAIR = [{"prompt": "the cat", "n": 1}, {"prompt": "the moon", "n": 2}]
MESSAGE = {"role": "user", "content": "the cat"}


class Polars:
    """A table of polars, which is not installed with the tests."""

    def __iter__(self):
        raise AssertionError("iterating gives columns")

    def to_dicts(self) -> list[dict]:
        return PAIR


class Lazy:
    def lazy(self) -> Lazy:
        return self

    def collect(self) -> Polars:
        return Polars()


@pytest.mark.parametrize(
    "source",
    [
        tuple(PAIR),
        deque(PAIR),
        iter(PAIR),
        (row for row in PAIR),
        map(dict, PAIR),
        numpy.array(PAIR, dtype=object),
        [UserDict(row) for row in PAIR],
        [MappingProxyType(row) for row in PAIR],
        pandas.DataFrame(PAIR),
        pandas.DataFrame(PAIR, index=["x", "y"]),
        pyarrow.table({"prompt": ["the cat", "the moon"], "n": [1, 2]}),
        Polars(),
        Lazy(),
        datasets.Dataset.from_list(PAIR),
        datasets.Dataset.from_list(PAIR).with_format("torch"),
        datasets.DatasetDict(train=datasets.Dataset.from_list(PAIR)),
        datasets.Dataset.from_list(PAIR).to_iterable_dataset(),
    ],
    ids=lambda source: type(source).__name__,
)
def test_what_has_rows_is_read(source):
    prompts, counts = load_prompts(source)
    assert [(p.prompt, p.columns) for p in prompts] == [("the cat", {"n": 1}), ("the moon", {"n": 2})]
    assert all(type(p.prompt) is str and type(p.columns["n"]) is int for p in prompts) and counts.read == 2


@pytest.mark.parametrize("texts", [pandas.Series(["a", "b"]), numpy.array(["a", "b"]), pyarrow.array(["a", "b"])])
def test_arrays_of_texts_are_prompts(texts):
    assert [(type(p.prompt), p.prompt) for p in load_prompts(texts)[0]] == [(str, "a"), (str, "b")]


def test_what_is_missing_in_a_table_is_none_and_arrays_in_it_are_lists():
    frame = pandas.DataFrame(
        {
            "prompt": [numpy.array([MESSAGE], dtype=object), (MESSAGE,)],
            "response": ["yes", "no"],
            "score": [numpy.float32(4), numpy.int64(2)],
            "edited": [None, float("nan")],
            "rank": [1.5, float("nan")],
        }
    )
    rows, _ = load_feedback(frame)
    assert [(r.prompt, r.responses, r.scores) for r in rows] == [
        ([MESSAGE], ("yes",), (0.5,)),
        ([MESSAGE], ("no",), (-0.5,)),
    ]
    assert [p.columns["rank"] for p in load_prompts(frame)[0]] == [1.5, None]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({"prompt": "the cat", "n": 1}, "not dict; one row goes into a list, columns into datasets.Dataset.from_dict"),
        (MappingProxyType({"prompt": ["the cat"]}), "not mappingproxy; one row goes into a list"),
        ({}, "not dict"),
        ({"a", "b"}, "not set; a set has no order"),
        (frozenset(["a"]), "a set has no order"),
        (b"rows.jsonl", "not bytes"),
        (bytearray(b"rows"), "not bytearray"),
        (memoryview(b"rows"), "not memoryview"),
        (io.StringIO("a"), "not StringIO; give the path of the file"),
        (numpy.array("a"), "an array of 0 dimensions"),
        (torch.zeros(2, 2), "an array of 2 dimensions"),
        (torch.zeros(2), "row 1: a row must be a JSON object"),
        (range(3), "row 1: a row must be a JSON object"),
        (pandas.DataFrame, "the class DataFrame"),
        (3, "not int"),
        (print, "not builtin_function_or_method"),
        (["the cat", b"the moon"], "row 2: a row must be a JSON object"),
    ],
)
def test_what_has_none_is_refused(source, said):
    with pytest.raises(UserError, match=said):
        load_prompts(source)


@pytest.mark.parametrize("kind", [str, Path])
def test_a_list_of_files_is_no_list_of_prompts(kind, tmp_path):
    with pytest.raises(UserError, match="data is a list of file names .*rows.jsonl, .*, not of rows"):
        load_prompts((kind(tmp_path / "rows.jsonl"),))
    assert load_prompts(["rows.jsonl", "a text"])[1].used == 2


# ---------------------------------------------------------------------------------------------------- other arguments


@pytest.mark.parametrize("wrong", [3, b"x", ["folder"], {"a": 1}, torch.nn.Linear(1, 1), object(), ""])
@pytest.mark.parametrize("name", ["policy", "tokenizer", "ref_policy", "value_model"])
def test_a_model_of_another_type_is_refused_by_name(name, wrong):
    inputs = {"policy": "no/such-model", "reward": len, "prompts": PROMPTS, name: wrong}
    with pytest.raises(UserError, match=rf"^{name}: (expected a folder, a hub id or a loaded|is empty; )"):
        PPOTrainer(PPOConfig(), **inputs)


def test_what_is_missing_and_what_is_wrong_is_one_message():
    with pytest.raises(UserError) as caught:
        PPOTrainer({"total_steps": 1}, policy=None, reward=None, prompts=None, tokenizer=7)
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines] == ["config", "policy", "reward", "prompts", "tokenizer"]
    assert lines[0] == "config: expected a PPOConfig, found dict" and lines[1].startswith("policy: missing; ")
    for trainer, config in ((SFTTrainer, RewardConfig()), (RewardTrainer, SFTConfig()), (SFTTrainer, None)):
        with pytest.raises(UserError, match=r"^config: expected a (SFT|Reward)Config, found \w+$"):
            trainer(config, model=tiny.llama(), tokenizer=tiny.tokenizer(), data=ROWS)


def test_paths_are_taken_where_texts_are(tmp_path):
    config = SFTConfig(output_dir=tmp_path / "run", chat_template=tmp_path / "a.jinja")
    assert (config.output_dir, config.chat_template) == (str(tmp_path / "run"), str(tmp_path / "a.jinja"))
    tiny.llama().save_pretrained(tmp_path / "m")
    tiny.tokenizer().save_pretrained(tmp_path / "m")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "the cat", "response": "yes"}\n')
    trainer = SFTTrainer(SFTConfig(total_steps=1), model=tmp_path / "m", data=tmp_path / "rows.jsonl")
    assert len(trainer.items) == 1
