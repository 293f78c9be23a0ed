"""Ids of ModelScope: with a prefix or a variable they load as hub ids do; `modelscope` itself is a fake here."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForSequenceClassification

from fastrlhf import cli
from fastrlhf.checkpoint.fingerprints import absolute, path_of
from fastrlhf.config.errors import UserError
from fastrlhf.config.inputs import modelscope_id
from fastrlhf.config.recipe import load_recipe
from fastrlhf.data import sources
from fastrlhf.data.dataset import load_conversations, load_prompts
from fastrlhf.models.adapter_folder import adapter_config
from fastrlhf.models.backbone import same_base
from fastrlhf.models.loading import load_policy, load_reward_model, load_tokenizer
from tests import tiny

# The signatures are those of modelscope 1.40.
FAKE = """
import json, os

HUB, CALLS = os.path.join(os.path.dirname(__file__), "hub"), []


def snapshot_download(model_id=None, revision=None, cache_dir=None, *, ignore_patterns=None):
    return _folder("models", model_id, ignore_patterns)


def dataset_snapshot_download(dataset_id=None, revision=None, cache_dir=None):
    return _folder("datasets", dataset_id, None)


def _folder(kind, name, left_out):
    CALLS.append((kind, name, left_out))
    folder = os.path.join(HUB, kind, name)
    if not os.path.isdir(folder):
        raise ValueError("The model or data set " + name + "\\n does not exist on modelscope.cn")
    return folder
"""
CHAT = [{"role": "user", "content": "雨伞应该怎么保养？"}]


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """A hub with tiny/llama, and the data set tiny/rows of two splits and a config; the current folder is empty."""
    package = tmp_path / "packages" / "modelscope"
    model, rows = package / "hub/models/tiny/llama", package / "hub/datasets/tiny/rows"
    for folder in (model, rows / "more", tmp_path / "here"):
        folder.mkdir(parents=True)
    (package / "__init__.py").write_text(FAKE)
    tiny.llama().save_pretrained(model)
    tiny.tokenizer().save_pretrained(model)
    for name, reply in (("train", "晾干。"), ("test", "收好。"), ("more/train", "再说。")):
        row = {"messages": [*CHAT, {"role": "assistant", "content": reply}]}
        (rows / f"{name}.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    card = "configs:\n- config_name: default\n  data_files:\n  - {split: train, path: train.jsonl}\n"
    card += "  - {split: test, path: test.jsonl}\n- config_name: more\n  data_files: more/train.jsonl\n"
    (rows / "README.md").write_text(f"---\n{card}---\n")
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.delitem(sys.modules, "modelscope", raising=False)
    sources._downloaded.cache_clear()
    yield package / "hub"
    sys.modules.pop("modelscope", None)
    sources._downloaded.cache_clear()


def replies(source: str) -> list[str]:
    return [conversation.messages[-1]["content"] for conversation in load_conversations(source)[0]]


def test_a_data_set_is_read_by_split_and_config_as_one_of_the_hub(hub, monkeypatch):
    for prefix, value in (("modelscope:", "0"), ("", "1")):
        monkeypatch.setenv("FASTRLHF_USE_MODELSCOPE", value)
        assert replies(f"{prefix}tiny/rows") == ["晾干。"]
        assert replies(f"{prefix}tiny/rows:test") == ["收好。"]
        assert replies(f"{prefix}tiny/rows:more:train") == ["再说。"]
        with pytest.raises(UserError, match=f"{prefix}tiny/rows:valid"):
            replies(f"{prefix}tiny/rows:valid")


def test_a_model_is_downloaded_once_without_the_weights_that_are_not_read(hub, monkeypatch):
    monkeypatch.setenv("FASTRLHF_USE_MODELSCOPE", "1")
    for source in ("modelscope:tiny/llama", "tiny/llama"):
        assert load_policy(source).config.vocab_size == 320
        assert load_tokenizer(source).eos_token_id is not None
    calls = [call for call in sys.modules["modelscope"].CALLS if call[:2] == ("models", "tiny/llama")]
    assert len(calls) == 1 and "*.bin" in calls[0][2]


def test_a_run_and_its_resume_name_them(hub, capsys):
    model, data = "modelscope:tiny/llama", "modelscope:tiny/rows:test"
    fields = ["total_steps=1", "mini_batch_size=1", "eval_every=0", "lora=2", "allow_drop=true"]
    Path("modelscope").mkdir()  # a folder of that name is not meant
    assert cli.main(["sft", f"model={model}", f"data={data}", "output_dir=run", *fields]) == 0, capsys.readouterr().err
    config = Path("run/config.yaml").read_text()
    assert f"model: {model}" in config and f"data: {data}" in config
    folder = hub / "models/tiny/llama"
    assert adapter_config("run/adapter", "policy")["base_model_name_or_path"] == str(folder)  # which peft can load
    assert path_of(model, "model", "model") == (folder, "")
    assert absolute(model, "model") == model
    with (folder / "config.json").open("a") as file:
        file.write("\n")
    assert cli.main(["resume", "run"]) == 2
    assert "model" in capsys.readouterr().err


def test_a_reward_model_of_the_hub_is_no_python_module(hub, capsys):
    rows = '{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "b", "chosen": "c", "rejected": "d"}\n'
    Path("pairs.jsonl").write_text(rows)
    fields = ["total_steps=1", "mini_batch_size=2", "eval_fraction=0", "eval_every=0", "lora=2"]
    arguments = ["model=modelscope:tiny/llama", "data=pairs.jsonl", "output_dir=rm", *fields]
    assert cli.main(["reward", *arguments]) == 0, capsys.readouterr().err
    assert same_base("modelscope:tiny/llama", "rm/adapter")
    Path("rm/final").rename(hub / "models/tiny/rm")
    arguments = ["policy=modelscope:tiny/llama", "reward=modelscope:tiny/rm", "prompts=modelscope:tiny/rows:test"]
    fields = ["rollout_batch_size=2", "mini_batch_size=2", "max_new_tokens=2", "total_steps=1", "output_dir=ppo"]
    assert cli.main(["ppo", *arguments, *fields, "--dry-run"]) == 0, capsys.readouterr().err
    assert cli.main(["ppo", *arguments, *fields]) == 0, capsys.readouterr().err


def test_an_adapter_is_refused_with_the_folder_to_name(hub):
    (hub / "models/tiny/lora").mkdir()
    (hub / "models/tiny/lora/adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=f"is an adapter; name its folder, {hub}/models/tiny/lora"):
        load_policy("modelscope:tiny/lora")


def test_what_is_not_on_the_hub_is_one_sentence(hub):
    with pytest.raises(UserError, match="policy: the model 'tiny/none' cannot be had from ModelScope .*not exist on"):
        load_policy("modelscope:tiny/none")
    with pytest.raises(UserError, match="data: the data set 'tiny/none' cannot be had from ModelScope") as error:
        load_prompts("modelscope:tiny/none:train")
    assert "\n" not in str(error.value)


def test_a_folder_here_comes_before_the_hub(hub, monkeypatch):
    monkeypatch.setenv("FASTRLHF_USE_MODELSCOPE", "1")
    Path("tiny/rows").mkdir(parents=True)
    Path("tiny/rows/train.jsonl").write_text('{"prompt": "x", "response": "here"}\n')
    assert load_conversations("tiny/rows")[0][0].response == "here"
    assert replies("modelscope:tiny/rows") == ["晾干。"]
    assert modelscope_id("gpt2") is None and modelscope_id("a/b/c") is None  # ids there have an owner


@pytest.mark.parametrize("kind", ["model", "data"])
def test_without_the_package_one_sentence_says_how_to_get_it(kind, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "modelscope", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    values = {"model": "x/y", "data": "x/z"} | {kind: "modelscope:a/b"}
    overrides = [f"{name}={value}" for name, value in values.items()] + [f"output_dir={tmp_path / 'run'}"]
    with pytest.raises(UserError, match=f"{kind}: modelscope:a/b is an id of ModelScope, .* pip install modelscope"):
        from fastrlhf.config.recipe import check_paths

        check_paths("sft", *load_recipe("sft", None, overrides))
    monkeypatch.setenv("FASTRLHF_USE_MODELSCOPE", "1")
    with pytest.raises(UserError, match=r"a/b is an id of ModelScope \(FASTRLHF_USE_MODELSCOPE=1\), which needs"):
        modelscope_id("a/b")


@pytest.mark.parametrize(
    ("text", "value", "says"),
    [
        ("modelscope:llama", "", "an id of ModelScope is written modelscope:ORG/NAME"),
        ("modelscope:../secrets", "", "an id of ModelScope is written modelscope:ORG/NAME"),
        ("modelscope:a/b/c", "", "an id of ModelScope is written modelscope:ORG/NAME"),
        ("a/b", "yes", "FASTRLHF_USE_MODELSCOPE = 'yes': expected 1 or 0"),
    ],
)
def test_other_forms_are_refused(text, value, says, monkeypatch):
    monkeypatch.setenv("FASTRLHF_USE_MODELSCOPE", value)
    with pytest.raises(UserError, match=says):
        modelscope_id(text)


def test_the_centre_of_a_reward_model_is_read_there_too(hub):
    """It is in every score; without it a score for replies without an end, or a clip, means something else."""
    folder = hub / "models/tiny/rm"
    scalar = LlamaForSequenceClassification(LlamaConfig(**tiny.SHAPE, num_labels=1))
    scalar.save_pretrained(folder)
    (folder / "score_bias.json").write_text('{"bias": 0.5}')
    assert float(load_reward_model("modelscope:tiny/rm").score.bias.detach()) == 0.5
