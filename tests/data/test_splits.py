"""NAME:SPLIT and NAME:CONFIG:SPLIT of folders and hub ids, packed files, and the first rows of an input."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
from functools import partial
from pathlib import Path

import datasets
import pyarrow
import pytest

from fastrlhf import PPOConfig, RewardConfig, SFTConfig
from fastrlhf.config.errors import UserError
from fastrlhf.config.inputs import DataName, data_name
from fastrlhf.config.recipe import path_problem
from fastrlhf.data import limits
from fastrlhf.data.dataset import load_conversations, load_feedback, load_prompts, reading
from fastrlhf.data.rows import read_rows
from fastrlhf.data.sources import files_of
from fastrlhf.inference import read_prompts


def fill(folder: Path, *names: str) -> Path:
    """Files of one row each, which is the file's own name."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".parquet"):
            datasets.Dataset.from_list([{"prompt": name}]).to_parquet(str(path))
        else:
            path.write_text(json.dumps({"prompt": name}), encoding="utf-8")
    return folder


def prompts(source: object) -> list[str]:
    return [prompt.prompt for prompt in load_prompts(source)[0]]


FOLDERS = {  # files, what stands behind the folder's name, the files that are read
    "shards": (("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"), ":train", [0]),
    "the other shards": (("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"), ":test", [1]),
    "shards of one split": (("data/train-00000-of-00002.json", "data/train-00001-of-00002.json"), "", [0, 1]),
    "hashed shards": (
        ("data/train_sft-00000-of-00001-ab12.json", "data/train_gen-00000-of-00001.json"),
        ":train_sft",
        [0],
    ),
    "any name of a shard": (("data/harmless-00000-of-00001.json", "data/helpful-00000-of-00001.json"), ":helpful", [1]),
    "files": (("train.jsonl", "valid.jsonl", "dataset_infos.json"), ":train", [0]),
    "another word for a split": (("train.jsonl", "valid.jsonl"), ":validation", [1]),
    "as the file is named": (("train.jsonl", "valid.jsonl"), ":valid", [1]),
    "a word of several": (("alpaca_train.jsonl", "alpaca_test.jsonl"), ":test", [1]),
    "a name of several words": (("train_sft.jsonl", "train_prefs.jsonl"), ":train_prefs", [1]),
    "numbered": (("train-1.jsonl", "train-2.jsonl", "eval.jsonl"), ":train", [0, 1]),
    "one level down": (("sub/train.jsonl.x", "data/train.jsonl"), "", [1]),
    "folders of splits": (("train/0.jsonl", "train/1.jsonl", "test/0.jsonl"), ":train", [0, 1]),
    "config": (("main/train.jsonl", "main/test.jsonl", "socratic/train.jsonl"), ":socratic:train", [2]),
    "config in data": (("data/Alpaca-7B/train.jsonl", "data/other/train.jsonl"), ":Alpaca-7B:train", [0]),
    "config and folders of splits": (("default/train/0.jsonl", "default/test/0.jsonl"), ":train", [0]),
    "the only config": (("main/train.jsonl", "main/test.jsonl"), ":test", [1]),
    "beside a config": (("train.jsonl", "preference/preference.jsonl"), ":train", [0]),
    "not below the folder": (("a.jsonl", "b.jsonl", "old/c.jsonl", ".cache/x/d.jsonl"), "", [0, 1]),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_split_of_a_folder_is_read_as_the_hub_lays_it_out(name, tmp_path):
    files, suffix, wanted = FOLDERS[name]
    fill(tmp_path / "d", *files)
    assert prompts(f"{tmp_path / 'd'}{suffix}") == [files[i] for i in wanted]
    assert path_problem(f"{tmp_path / 'd'}{suffix}", "data") is None


REFUSED = {
    ":tset": "no split 'tset'; there are train, test",
    ":main:train": "no config 'main'; there is none, only splits",
    "": "holds train.jsonl and test.jsonl; name the file or a split, .*d:train, .*splits: train, test",
    ":train[:10%]": "a split is read whole; max_samples=N takes its first N rows",
}


@pytest.mark.parametrize("suffix", REFUSED)
def test_a_split_that_is_not_there_lists_those_that_are(suffix, tmp_path):
    fill(tmp_path / "d", "train.jsonl", "test.jsonl")
    with pytest.raises(UserError, match=REFUSED[suffix]):
        load_prompts(f"{tmp_path / 'd'}{suffix}")


def test_a_config_that_is_to_be_chosen_is_listed(tmp_path):
    fill(tmp_path / "d", "main/train.jsonl", "socratic/train.jsonl")
    for suffix in ("", ":train"):
        with pytest.raises(UserError, match="there are the configs main, socratic; name one, .*d:CONFIG:SPLIT"):
            load_prompts(f"{tmp_path / 'd'}{suffix}")
    with pytest.raises(UserError, match="no config 'mian'; there are main, socratic"):
        load_prompts(f"{tmp_path / 'd'}:mian:train")
    with pytest.raises(UserError, match=r"d:main: no split 'test'; there are train"):
        load_prompts(f"{tmp_path / 'd'}:main:test")


def test_shards_of_several_splits_are_never_mixed(tmp_path):
    fill(tmp_path, "data/train_sft-00000-of-00001.json", "data/train_gen-00000-of-00001.json")
    for suffix in ("", ":train"):
        with pytest.raises(UserError, match="train_gen, train_sft"):
            load_prompts(f"{tmp_path}{suffix}")
    fill(tmp_path / "d", "train.json", "data/train.json")
    assert prompts(tmp_path / "d") == ["train.json"]
    with pytest.raises(UserError, match="both train.json and data.train.json hold train; name the file"):
        load_prompts(f"{tmp_path / 'd'}:train")


def test_what_the_system_refuses_is_named(tmp_path):
    path = fill(tmp_path, "a.jsonl") / "a.jsonl"
    with pytest.raises(UserError, match="a.jsonl: cannot be read .Not a directory"):
        files_of(path)


def test_splits_of_saved_datasets(tmp_path):
    one, two = (datasets.Dataset.from_list([{"prompt": text}], split=text) for text in ("train", "test"))
    both = datasets.DatasetDict({"train": one, "test": two})
    both.save_to_disk(str(tmp_path / "d"))
    both.save_to_disk(str(tmp_path / "configs" / "main"))
    two.save_to_disk(str(tmp_path / "single"))
    assert prompts(f"{tmp_path / 'd'}") == prompts(f"{tmp_path / 'd'}:train") == ["train"]
    assert prompts(f"{tmp_path / 'd'}:test") == prompts(f"{tmp_path / 'configs'}:main:test") == ["test"]
    assert prompts(tmp_path / "single") == prompts(f"{tmp_path / 'single'}:test") == ["test"]
    refused = {
        "d:dev": "no split 'dev'; there are train, test",
        "single:train": "no split 'train'; it is one split test",
    }
    for name, says in {**refused, "d:main:train": "no config 'main'; a saved dataset has none"}.items():
        with pytest.raises(UserError, match=says):
            load_prompts(f"{tmp_path / name}")


def test_a_hub_id_is_asked_for_its_config_and_split(monkeypatch):
    asked = []

    def load_dataset(name, config=None, split=None):
        asked.append((name, config, split))
        if split == "tset":
            raise ValueError("Unknown split \"tset\". Should be one of ['train', 'test'].")
        if config is None and name == "o/gsm8k":
            raise ValueError(
                "Config name is missing.\nPlease pick one among the available configs: ['main', 'socratic']"
            )
        rows = datasets.Dataset.from_list([{"prompt": "a"}], split=split)
        return rows if split else datasets.DatasetDict({"a": rows, "b": rows})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    [prompt], _ = load_prompts("o/sums:main:test")
    assert prompt.where == "o/sums:main:test row 1" and prompts("o/sums:train_sft") == ["a"]
    assert asked == [("o/sums", "main", "test"), ("o/sums", None, "train_sft")]
    refused = {
        "o/sums:tset": r"o/sums:tset: .*Should be one of \['train', 'test'\]",
        "o/gsm8k:train": r"available configs: \['main', 'socratic'\]",
        "o/sums": "splits a, b but no train; name one, o/sums:a",
    }
    for name, says in refused.items():
        assert path_problem(name, "data") is None
        with pytest.raises(UserError, match=says):
            load_prompts(name)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("rows.jsonl", DataName("rows.jsonl")),
        ("o/name", DataName("o/name")),
        ("o/name:train", DataName("o/name", None, "train")),
        ("o/name:main:train.clean", DataName("o/name", "main", "train.clean")),
        (r"C:\rows\a.jsonl", DataName(r"C:\rows\a.jsonl")),
        ("C:/rows/a.jsonl", DataName("C:/rows/a.jsonl")),
        ("C:a.jsonl", DataName("C:a.jsonl")),
        (r"C:\rows:train", DataName(r"C:\rows", None, "train")),
        ("hf://datasets/a", DataName("hf://datasets/a")),
    ],
)
def test_what_a_name_with_colons_means(text, name):
    assert data_name(text) == name


def test_a_path_that_is_there_is_a_path_whatever_colons_it_has(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path, "a:train/x.jsonl", r"C:\rows.jsonl", "day:1/train.jsonl", "day:1/test.jsonl", "b:train")
    assert prompts("a:train") == ["a:train/x.jsonl"] and prompts(r"C:\rows.jsonl") == [r"C:\rows.jsonl"]
    assert prompts("day:1:test") == ["day:1/test.jsonl"]
    for says in (load_prompts, lambda name: path_problem(name, "data") and load_prompts(name)):
        with pytest.raises(UserError, match=r"rows.jsonl is a file, which has no split 'train'"):
            says(r"C:\rows.jsonl:train")
    assert "a/missing does not exist" in path_problem("./a/missing:train", "data")


def test_every_input_of_rows_takes_a_split(tmp_path):
    fill(tmp_path / "p", "train.jsonl", "test.jsonl")
    assert [p.prompt for p in read_prompts(f"{tmp_path / 'p'}:test")] == ["test.jsonl"]  # generate and score
    for split in ("train", "test"):
        row = {"prompt": "a", "chosen": split, "rejected": "no"}
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(row), encoding="utf-8")
    assert load_feedback(f"{tmp_path}:test")[0][0].responses[0] == "test"
    assert load_conversations(f"{tmp_path}:test")[0][0].response == "test"


def test_a_list_of_files_is_no_list_of_texts():
    for files in (["a.jsonl", "b.jsonl.zst"], [Path("a.txt")]):
        with pytest.raises(UserError, match="data is a list of file names .a.*, not of rows; name one of them"):
            load_prompts(files)
    assert prompts(["What is in a.jsonl", "Hi"]) == ["What is in a.jsonl", "Hi"]


def test_prompts_of_generate_and_score_are_mapped_as_those_of_a_run(tmp_path, monkeypatch):
    lines = '{"question": "a", "tools": [1]}\n{"question": 3}\n{"question": "b"}\n'
    (tmp_path / "q.jsonl").write_text(lines, encoding="utf-8")
    how = {"columns": {"prompt": "question"}, "ignore_columns": ["tools"]}
    for source in (str(tmp_path / "q.jsonl"), "-"):
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        assert [p.prompt for p in read_prompts(source, skip_bad_rows=True, **how)] == ["a", "b"]
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        with pytest.raises(UserError, match=':2: field "prompt" must be'):
            read_prompts(source, **how)
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        with pytest.raises(UserError, match="columns = prompt: qestion: no row has such a column|:1: .*is missing"):
            read_prompts(source, columns={"prompt": "qestion"})


# --------------------------------------------------------------------------------------------------------------- files


def zstd(data: bytes) -> bytes:
    return pyarrow.compress(data, codec="zstd", asbytes=True)


PACKERS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}
ROWS = [{"prompt": "a"}, {"prompt": "b"}]
LINES = b'{"prompt": "a"}\n{"prompt": "b"}\n'


@pytest.mark.parametrize("kind", [".jsonl", ".ndjson", ".json", ".csv"])
@pytest.mark.parametrize("packed", ["", *PACKERS])
def test_files_are_read_packed_or_not(kind, packed, tmp_path):
    pack = PACKERS.get(packed, bytes)
    path = tmp_path / f"rows{kind}{packed}"
    path.write_bytes(pack(b"prompt\na\nb\n" if kind == ".csv" else LINES))
    places = [f"{path} row 1", f"{path} row 2"] if kind == ".csv" else [f"{path}:1", f"{path}:2"]
    assert list(read_rows(path)) == list(zip(places, ROWS))
    assert path_problem(f"missing{kind}{packed}", "data") is not None


@pytest.mark.parametrize("packed", PACKERS)
def test_a_packed_file_that_is_broken_is_named(packed, tmp_path):
    path = tmp_path / f"rows.jsonl{packed}"
    for content in (b"none of it", PACKERS[packed](LINES * 1000)[:-9]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"rows.jsonl{packed}: cannot be read \("):
            list(read_rows(path))
    path.write_bytes(PACKERS[packed](LINES) + PACKERS[packed](b'{"prompt": "c"\n'))  # parts that are put together
    with pytest.raises(UserError, match=rf"rows.jsonl{packed}:3: not valid JSON"):
        load_prompts(path)


@pytest.mark.parametrize(("packed", "pack"), [(".xz", partial(lzma.compress, preset=0)), (".zst", zstd)])
def test_the_size_of_a_packed_row_has_a_limit(packed, pack, tmp_path):
    """Of gzip: tests/test_hostile_files.py."""
    path = tmp_path / f"rows.ndjson{packed}"
    path.write_bytes(pack(LINES) + pack(b"[" + b" " * limits.ROW_BYTES + b"]\n"))
    with pytest.raises(UserError, match=rf"rows.ndjson{packed}:3: the row unpacks to more than 64 MiB"):
        list(read_rows(path))


# --------------------------------------------------------------------------------------------------------- max_samples


def test_max_samples_takes_the_first_rows_and_looks_at_no_other(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(LINES + b"no JSON\n")
    items, counts = load_prompts(path, max_samples=2)
    assert [item.prompt for item in items] == ["a", "b"]
    assert counts.line() == "2 rows read (max_samples), 2 used"
    assert load_prompts(ROWS, max_samples=3)[1].line() == "2 rows read, 2 used"
    pairs = [{"prompt": "a", "chosen": "b", "rejected": text} for text in ("b", "c", "d")]
    assert (
        load_feedback(pairs, max_samples=2)[1].line()
        == "2 rows read (max_samples), 1 used, dropped: 1 chosen equals rejected"
    )
    assert [item.prompt for item in load_conversations(pairs, max_samples=2)[0]] == ["a"]


@pytest.mark.parametrize("config", [SFTConfig, RewardConfig, PPOConfig])
def test_max_samples_holds_for_every_input_of_a_stage(config):
    for role in ("data", "eval_data", "prompts", "eval_prompts", "ptx_data"):
        assert reading(config(max_samples="3"), role)["max_samples"] == 3
        assert reading(config(), role)["max_samples"] is None
    with pytest.raises(UserError, match="max_samples = 0: expected a whole number >= 1, or none"):
        config(max_samples=0)
