"""Rows from every kind of source with their places, counts without silent drops, held-out split."""

from __future__ import annotations

import csv
import gzip
import json
from collections import Counter
from pathlib import Path

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrlhf.config.errors import UserError
from fastrlhf.data.dataset import Counts, load_conversations, load_feedback, load_prompts, split_heldout
from fastrlhf.data.rows import read_rows

REAL = Path(__file__).parents[3] / "shared" / "data"
ROWS = [
    {"prompt": "Hi", "chosen": "Hello!", "rejected": "What?"},
    {"prompt": [{"role": "user", "content": "你好"}], "responses": ["好", "嗯"], "ranking": [0, 1]},
    {"prompt": "NA", "response": "007", "score": 4},
    {"prompt": 'a,\n"b"', "response": "None", "edited": "nan"},
]


def write(path: Path, rows: list) -> Path:
    """rows in the format of path's suffix."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    array = json.dumps(rows, ensure_ascii=False, indent=1)
    if path.name.endswith(".parquet"):
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    elif path.name.endswith(".csv"):
        names = list(dict.fromkeys(name for row in rows for name in row))
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            for row in rows:
                writer.writerow({k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()})
    elif path.name.endswith(".gz"):
        path.write_bytes(gzip.compress((lines if ".jsonl" in path.name else array).encode()))
    else:
        path.write_text(lines if path.name.endswith(".jsonl") else array, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("f.jsonl", [":1", ":2", ":3", ":4"]),
        ("f.jsonl.gz", [":1", ":2", ":3", ":4"]),
        ("f.json", [":2", ":7", ":23", ":28"]),
        ("f.json.gz", [":2", ":7", ":23", ":28"]),
        ("f.csv", [" row 1", " row 2", " row 3", " row 4"]),
    ],
)
def test_mixed_feedback_is_the_same_from_every_format(name, places, tmp_path):
    path = write(tmp_path / name, ROWS)
    items, counts = load_feedback(path)
    assert [item.kind for item in items] == ["pair", "ranking", "score", "edit"]
    assert [item.where for item in items] == [f"{path}{place}" for place in places]
    assert items[1].prompt == ROWS[1]["prompt"] and items[1].ranking == ((0,), (1,))
    assert (items[2].prompt, items[2].responses, items[2].scores) == ("NA", ("007",), (0.5,))
    assert (items[3].prompt, items[3].responses) == ('a,\n"b"', ("nan", "None"))
    assert counts.line() == "4 rows read, 4 used"


def test_parquet_saved_folder_and_dataset_give_the_same(tmp_path):
    rows = [{**ROWS[0], "margin": None}, {**ROWS[0], "margin": 1.5, "rejected": "嗯"}]
    path = write(tmp_path / "f.parquet", rows)
    saved = datasets.Dataset.from_list(rows)
    saved.save_to_disk(str(tmp_path / "saved"))
    both = datasets.DatasetDict({"train": saved, "test": saved.select([0])})
    both.save_to_disk(str(tmp_path / "dict"))
    sources = {
        f"{path} row": path,
        f"{tmp_path / 'saved'} row": str(tmp_path / "saved"),
        f"{tmp_path / 'dict'} row": tmp_path / "dict",
        "row": saved.with_format("numpy"),
    }
    for place, source in sources.items():
        items, _ = load_feedback(source)
        assert [(i.where, i.responses, i.margin) for i in items] == [
            (f"{place} 1", ("Hello!", "What?"), None),
            (f"{place} 2", ("Hello!", "嗯"), 1.5),
        ]
    assert [i.where for i in load_feedback(both)[0]] == ["row 1", "row 2"]
    assert [i.where for i in load_feedback(rows)[0]] == ["row 1", "row 2"]
    with pytest.raises(UserError, match="splits a, b but no train"):
        load_feedback(datasets.DatasetDict({"a": saved, "b": saved}))


def test_messages_survive_parquet(tmp_path):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "ok"}]
    items, _ = load_conversations(write(tmp_path / "f.parquet", [{"messages": messages}] * 3))
    assert [item.messages for item in items] == [messages] * 3


def test_json_is_an_object_an_array_or_lines(tmp_path):
    one = tmp_path / "one.json"
    one.write_text('\n {"prompt":\n "a"}\n', encoding="utf-8")
    assert list(read_rows(one)) == [(f"{one}:2", {"prompt": "a"})]
    lines = tmp_path / "lines.json"
    lines.write_text('\ufeff["a"]\r\n\r\n["b"]\r\n', encoding="utf-8")
    assert list(read_rows(lines)) == [(f"{lines}:1", ["a"]), (f"{lines}:3", ["b"])]
    packed = tmp_path / "packed.json"
    packed.write_text('[["a"],\n["b"]\n,["c"]]', encoding="utf-8")
    assert list(read_rows(packed)) == [(f"{packed}:1", ["a"]), (f"{packed}:2", ["b"]), (f"{packed}:3", ["c"])]
    separators = tmp_path / "separators.jsonl"  # a line separator of Unicode ends no line
    separators.write_text('"a\u2028b"\n"c"', encoding="utf-8")
    assert list(read_rows(separators)) == [(f"{separators}:1", "a\u2028b"), (f"{separators}:2", "c")]


@given(st.lists(st.one_of(st.text(), st.lists(st.integers()), st.dictionaries(st.text(), st.floats(0, 1)))))
@settings(max_examples=40, deadline=None)
def test_any_array_is_read_as_json_reads_it(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("json") / "f.json"
    for indent in (None, 2):
        path.write_text(json.dumps(rows, indent=indent), encoding="utf-8")
        assert [row for _, row in read_rows(path)] == rows


BROKEN = {
    "broken line": ("f.jsonl", b'{"prompt": "a"}\n{"prompt": "b\n', ":2: not valid JSON"),
    "two values on a line": ("f.jsonl", b'"a"\n"b" "c"\n', ":2: not valid JSON (Extra data)"),
    "not UTF-8": ("f.jsonl", b'"a"\n\n"caf\xe9"\n', ":3: byte 5 of the line is not valid UTF-8"),
    "NUL": ("f.jsonl", b'"a"\n{"prompt": "b\\u0000"}', ':2: field "prompt" contains a NUL character at position 1'),
    "lone surrogate": ("f.jsonl", b'"a"\n{"prompt": "b\\ud800"}', ':2: field "prompt" is not valid Unicode'),
    "nested too deeply": ("f.jsonl", b"[" * 100_000, ":1: not valid JSON (nested too deeply)"),
    "endless number": ("f.jsonl", b'"a"\n' + b"1" * 5000, ":2: not valid JSON (a number with too many digits)"),
    "endless number in an array": ("f.json", b'[\n"a",\n' + b"1" * 5000 + b"]", ": not valid JSON (a number with too"),
    "array cut off": ("f.json", b'[\n"a",\n"b"\n', ":4: not valid JSON (expected a comma or ]"),
    "comma at the end": ("f.json", b'[\n"a",\n]', ":3: not valid JSON"),
    "text behind": ("f.json", b'["a"]\n  x', ":2: not valid JSON"),
    "array not UTF-8": ("f.json", b'[\n"a",\n"\xff"]', ":3: byte 2 of the line is not valid UTF-8"),
    "too many cells": ("f.csv", b"prompt,answer\na,1\nb,2,3\n", " row 2: has more cells than the header's 2"),
    "open quote": ("f.csv", b'prompt\na\n"b\n', " row 2: not valid CSV"),
    "CSV not UTF-8": ("f.csv", b"prompt\na\ncaf\xe9\n", ":3: byte 4 of the line is not valid UTF-8"),
    "empty cell": ("f.csv", b"prompt,answer\na,1\n,2\n", ' row 2: field "prompt" is missing'),
}


def broken(name: str, folder: Path) -> tuple[Path, str]:
    """The file of that name in BROKEN, and how the message about it begins."""
    file, content, says = BROKEN[name]
    path = folder / file
    path.write_bytes(content)
    return path, f"{path}{says}"


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_row_is_named_by_file_and_line(name, tmp_path):
    path, says = broken(name, tmp_path)
    with pytest.raises(UserError) as error:
        load_prompts(path)
    assert str(error.value).startswith(says) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["broken line", "not UTF-8", "NUL", "too many cells", "empty cell"])
def test_skip_bad_rows_counts_them(name, tmp_path):
    path, says = broken(name, tmp_path)
    items, counts = load_prompts(path, skip_bad_rows=True)
    assert [item.prompt for item in items] == ["a"]
    assert (counts.read, counts.used, counts.dropped) == (2, 1, {"malformed": 1})
    assert counts.malformed[0].startswith(says) and counts.malformed[0] in counts.line()


def test_skip_bad_rows_never_leaves_nothing():
    with pytest.raises(UserError, match="no usable row of prompts .2 rows read, 0 used, dropped: 2 malformed; first"):
        load_prompts([{"promt": "a"}, 3], skip_bad_rows=True)


UNREADABLE = {
    "nowhere.jsonl": (None, "no such file or folder"),
    "./nowhere": (None, "no such file or folder"),
    "nobody/nothing-like-this": (None, "nor a dataset that can be loaded from the hub"),
    "f.txt": (b"a", "unknown kind of file; use one of .json"),
    "cut.jsonl.gz": (gzip.compress(b'"a"\n' * 1000)[:-9], "cannot be read"),
    "no.jsonl.gz": (b'"a"\n', "cannot be read"),
    "no.parquet": (b"PAR1 not", "not a readable Parquet file"),
    "empty.jsonl": (b"\n\n", "no usable row of feedback (0 rows read, 0 used)"),
    "empty.json": (b"", "no usable row of feedback (0 rows read, 0 used)"),
    "list.json": (b"[ ]", "no usable row of feedback (0 rows read, 0 used)"),
    "head.csv": (b"prompt,chosen\n", "no usable row of feedback (0 rows read, 0 used)"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_source_that_cannot_be_read_is_named_and_says_why(name, tmp_path, monkeypatch):
    content, says = UNREADABLE[name]
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(name).write_bytes(content)
    with pytest.raises(UserError) as error:
        load_feedback(name, skip_bad_rows=True)
    assert str(error.value).startswith(f"{name}: ") and says in str(error.value)


@pytest.mark.parametrize("source", [7, None, b"f", {"prompt": ["a"]}])
def test_a_source_of_the_wrong_type_is_refused(source):
    with pytest.raises(UserError, match=f"not {type(source).__name__}"):
        load_prompts(source)


def test_a_folder_of_files_is_read_in_order_of_their_names(tmp_path):
    for name, prompt in (("b.jsonl", "b"), ("a.json", "a"), ("notes.md", "x")):
        (tmp_path / name).write_text(json.dumps([prompt]) if name != "b.jsonl" else json.dumps(prompt))
    prompts, _ = load_prompts(tmp_path)
    assert [p.prompt for p in prompts] == ["a", "b"]


def test_a_folder_with_train_and_held_out_files_is_refused(tmp_path):
    for name in ("train.jsonl", "valid.jsonl"):
        (tmp_path / name).write_text('"a"')
    with pytest.raises(UserError, match="train.jsonl and valid.jsonl; name the file"):
        load_prompts(tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="holds no data file"):
        load_prompts(empty)


def test_counts_add_up_and_notes_keep_the_row():
    rows = ["a", "a", ["x", "y"], {"messages": [{"role": "user", "content": "x"}]}]
    prompts, counts = load_prompts(rows)
    assert len(prompts) == counts.used == 4
    assert counts.noted == {"prompts cut behind their last human turn": 1, "repeat an earlier prompt": 2}
    counts = Counts(read=2400)
    counts.add("malformed", 3)
    counts.add("longer than 1024 tokens", 6)
    counts.add("longer than 1024 tokens", 0)
    assert counts.line() == "2400 rows read, 2391 used, dropped: 6 longer than 1024 tokens, 3 malformed"


def test_dropped_rows_are_counted_in_strict_mode_too():
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    items, counts = load_feedback([pair, {**pair, "rejected": "a"}, pair])
    assert [item.where for item in items] == ["row 1", "row 3"]
    assert counts.line() == "3 rows read, 2 used, dropped: 1 chosen equals rejected"


# ---------------------------------------------------------------------------------------------------------------- split


@given(
    keys=st.lists(st.integers(0, 9), min_size=1, max_size=60),
    fraction=st.floats(0, 1),
    seed=st.integers(0, 9),
)
@settings(max_examples=100, deadline=None)
def test_held_out_groups_stay_together_and_nothing_is_lost(keys, fraction, seed):
    items = list(enumerate(keys))
    train, held_out = split_heldout(items, fraction, seed, key=lambda item: item[1])
    assert sorted(train + held_out) == items and train == sorted(train) and held_out == sorted(held_out)
    groups = len(set(keys))
    if groups > 1:
        assert not {k for _, k in train} & {k for _, k in held_out}
        assert bool(held_out) == (fraction > 0) and train
        assert len(held_out) <= max(round(fraction * len(items)), min(Counter(keys).values()))
    assert (train, held_out) == split_heldout(items, fraction, seed, key=lambda item: item[1])


def test_the_held_out_share_is_exact_and_depends_on_the_seed():
    train, held_out = split_heldout(range(100), 0.1, 0)
    assert (len(train), len(held_out)) == (90, 10)
    assert held_out != split_heldout(range(100), 0.1, 1)[1]
    assert split_heldout(range(100), 0.0, 0) == (list(range(100)), [])
    assert split_heldout(["a"], 0.5, 0) == (["a"], [])


# ------------------------------------------------------------------------------------------------------- the real files

EMPTY_TURN, NOT_LIKED = "transcripts with an empty last turn", "replies that were not liked"
CUT, REPEATED = "prompts cut behind their last human turn", "repeat an earlier prompt"


def real(name: str) -> Path:
    if not (REAL / name).exists():
        pytest.skip("../shared/data is not there")
    return REAL / name


@pytest.mark.real
@pytest.mark.parametrize(
    ("load", "name", "read", "dropped", "noted"),
    [
        (load_conversations, "alpaca_zh_demo.json", 1000, {}, {}),
        (load_prompts, "alpaca_zh_demo.json", 1000, {}, {REPEATED: 8}),
        (load_feedback, "dpo_en_demo.json", 300, {}, {}),
        (load_conversations, "dpo_en_demo.json", 300, {}, {}),
        (load_prompts, "dpo_en_demo.json", 300, {}, {REPEATED: 5}),
        (load_feedback, "dpo_zh_demo.json", 300, {}, {}),
        (load_prompts, "dpo_zh_demo.json", 300, {}, {REPEATED: 11}),
        (load_feedback, "hh_harmless_1000.jsonl.gz", 1000, {EMPTY_TURN: 3}, {}),
        (load_conversations, "hh_harmless_1000.jsonl.gz", 1000, {EMPTY_TURN: 3}, {}),
        (load_prompts, "hh_harmless_1000.jsonl.gz", 1000, {EMPTY_TURN: 3}, {}),
        (load_feedback, "kto_en_demo.json", 300, {}, {}),
        (load_conversations, "kto_en_demo.json", 300, {NOT_LIKED: 150}, {}),
        (load_prompts, "kto_en_demo.json", 300, {}, {CUT: 300, REPEATED: 3}),
        (load_prompts, "moss_rlhf_ppo/train.json", 31, {}, {CUT: 20}),
        (load_prompts, "moss_rlhf_ppo/valid.json", 31, {}, {CUT: 20}),
        (load_conversations, "moss_sft", 30, {}, {}),
        (load_prompts, "moss_sft", 30, {}, {CUT: 30}),
    ],
)
def test_real_files_are_read_to_the_last_row(load, name, read, dropped, noted):
    items, counts = load(real(name))
    print(f"{name}: {counts.line()}")
    assert (counts.read, counts.dropped, counts.noted) == (read, dropped, noted)
    assert len(items) == counts.used == read - sum(dropped.values())


@pytest.mark.real
def test_real_moss_rlhf_lists_as_sft_need_a_reply():
    path = real("moss_rlhf_ppo/train.json")
    with pytest.raises(UserError, match=r"train.json:82: a conversation must end with a reply"):
        load_conversations(path)
    items, counts = load_conversations(path, skip_bad_rows=True)
    assert (len(items), counts.dropped) == (20, {"malformed": 11})


@pytest.mark.real
def test_real_hh_texts_are_all_there():
    """Nothing of a transcript is lost in the split but tags and the blanks around turns."""
    path = real("hh_harmless_1000.jsonl.gz")
    rows = [row for _, row in read_rows(path)]
    for item in load_feedback(path)[0]:
        row = rows[int(item.where.rsplit(":", 1)[1]) - 1]
        for text, reply in zip((row["chosen"], row["rejected"]), item.responses):
            turns = [*(m["content"] for m in item.prompt), reply]
            bare = text.replace("\n\nHuman:", "").replace("\n\nAssistant:", "")
            assert "".join("".join(turns).split()) == "".join(bare.split())
