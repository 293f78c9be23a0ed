"""`fastrlhf convert`: what comes in MOSS's, MOSS-RLHF's or pickled layouts, and what stock transformers makes of it."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    CodeGenForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Tokenizer,
)

from bench.convert import peak_of, write_checkpoint
from fastrlhf import UserError
from fastrlhf.cli import main
from fastrlhf.convert import convert
from fastrlhf.models.loading import check_source, load_policy, load_reward_model, load_tokenizer
from fastrlhf.rl.scorers import score_texts
from tests import moss_folders, tiny
from tests.moss_folders import FIELDS, META, write_bins, write_difference, write_json, write_llama, write_moon

ENDS = ["<eoh>", "<eot>", "<eoc>", "<eor>", "<eom>"]
TEXT = META + "<|Human|>: 雨伞应该怎么保养？<eoh>\n<|MOSS|>: Dry it, 再收起来。<eom>\n"


@pytest.fixture(scope="module")
def moon(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("moon")
    write_moon(folder / "given")
    convert(str(folder / "given"), str(folder / "out"))
    return folder


@pytest.fixture
def given(moon, tmp_path) -> Path:
    return Path(shutil.copytree(moon / "given", tmp_path / "given"))


def error_of(call, *arguments: object, **options: object) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------- moss-moon-003


def logits_by_the_facts(weights: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """MOSS's forward as its modelling code is described, in plain torch: q, v, k in four blocks of rows, interleaved
    rotary positions on the first rotary_dim of a head, attention and MLP side by side."""
    heads, width, turned, blocks = FIELDS["n_head"], FIELDS["n_embd"], FIELDS["rotary_dim"], 4
    size, length = width // heads, ids.shape[0]
    angle = torch.arange(length)[:, None] * 10000.0 ** (-torch.arange(0, turned, 2) / turned)
    sin, cos = angle.sin()[:, None], angle.cos()[:, None]

    def rotate(x: torch.Tensor) -> torch.Tensor:
        even, odd = x[..., :turned:2], x[..., 1:turned:2]
        pairs = torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)
        return torch.cat([pairs, x[..., turned:]], -1)

    x = weights["transformer.wte.weight"][ids]
    for i in range(FIELDS["n_layer"]):
        own = {k.removeprefix(f"transformer.h.{i}."): w for k, w in weights.items() if f".h.{i}." in k}
        y = F.layer_norm(x, [width], own["ln_1.weight"], own["ln_1.bias"])
        qkv = own["attn.qkv_proj.weight"].view(blocks, 3, heads // blocks, size, width)
        q, k, v = ((y @ qkv[:, j].reshape(width, width).T).view(length, heads, size) for j in (0, 2, 1))
        scores = torch.einsum("qhd,khd->hqk", rotate(q), rotate(k)) / math.sqrt(size)
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
        mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).reshape(length, width)
        inner = F.gelu(y @ own["mlp.fc_in.weight"].T + own["mlp.fc_in.bias"], approximate="tanh")
        x = x + mixed @ own["attn.out_proj.weight"].T + inner @ own["mlp.fc_out.weight"].T + own["mlp.fc_out.bias"]
    x = F.layer_norm(x, [width], weights["transformer.ln_f.weight"], weights["transformer.ln_f.bias"])
    return x @ weights["lm_head.weight"].T + weights["lm_head.bias"]


def test_moss_becomes_a_stock_codegen_with_the_same_logits(moon):
    model = AutoModelForCausalLM.from_pretrained(moon / "out").eval()
    weights = {k: v for i in (1, 2) for k, v in torch.load(_shard(moon / "given", i), weights_only=True).items()}
    ids = torch.tensor([5, 300, 17, 17, 260, 3, 99])
    with torch.no_grad():
        expected, given = logits_by_the_facts(weights, ids), model(ids[None]).logits[0]
    assert type(model) is CodeGenForCausalLM and (given - expected).abs().max() < 1e-5 < given.abs().max()
    assert {k: bool((weights[k] == v).all()) for k, v in model.state_dict().items()} == dict.fromkeys(
        model.state_dict(), True
    )
    config = json.loads((moon / "out/config.json").read_text())
    assert config["model_type"] == "codegen" and config["architectures"] == ["CodeGenForCausalLM"]
    assert config["dtype"] == "float32" and not {"auto_map", "wbits", "groupsize"} & config.keys()
    assert not list((moon / "out").glob("*.py")) and not list((moon / "out").glob("*.bin"))
    assert not any("causal_mask" in name for path in (moon / "out").glob("*.safetensors") for name in load_file(path))


def _shard(folder: Path, number: int) -> Path:
    return folder / f"pytorch_model-{number:05d}-of-00002.bin"


def test_its_tokenizer_is_stock_gpt2_with_the_five_ends(moon):
    ours = AutoTokenizer.from_pretrained(moon / "out")
    vocab = json.loads((moon / "given/vocab.json").read_text(encoding="utf-8"))
    merges = (moon / "given/merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    stock = GPT2Tokenizer(vocab=vocab, merges=[tuple(merge.split(" ")) for merge in merges])
    stock.add_special_tokens({"additional_special_tokens": moss_folders.ENDS})
    for text in (TEXT, *tiny.TEXTS, "  two  blanks\n\n", "a<eoh>\n", "x<eot> <eoc>\n<eor>"):
        assert ours(text)["input_ids"] == stock(text)["input_ids"] and ours.decode(ours(text)["input_ids"]) == text
    assert ours.eos_token == "<eom>" and ours.eos_token_id == len(vocab) + moss_folders.ENDS.index("<eom>")
    assert {token: ours.tokenize(f"a{token}b")[1] for token in ENDS} == dict(zip(ENDS, ENDS))
    asked = ours.apply_chat_template(
        [{"role": "system", "content": META}, {"role": "user", "content": "Hi"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert asked == f"{META}<|Human|>: Hi<eoh>\n<|MOSS|>:"
    assert "auto_map" not in (moon / "out/tokenizer_config.json").read_text()


@pytest.mark.parametrize("change", [{"wbits": 4}, {"wbits": 8}, "qweight"])
def test_packed_variants_are_refused_with_the_reason(given, tmp_path, change):
    if change == "qweight":
        packed = {f"transformer.h.0.attn.qkv_proj.{part}": torch.zeros(4, 4).int() for part in ("qweight", "qzeros")}
        write_bins(given, packed, 2)
    else:
        config = json.loads((given / "config.json").read_text())
        write_json(given / "config.json", config | change)
    assert "int4 or int8 variant" in error_of(convert, str(given), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def _drop_shard(folder: Path) -> None:
    _shard(folder, 2).unlink()


def _drop_shard_and_index(folder: Path) -> None:
    _shard(folder, 2).unlink()
    (folder / "pytorch_model.bin.index.json").unlink()


def _drop_tensor(folder: Path) -> None:
    weights = torch.load(_shard(folder, 1), weights_only=True)
    weights.pop("transformer.wte.weight")
    torch.save(weights, _shard(folder, 1))


def _truncate(folder: Path) -> None:
    _shard(folder, 1).write_bytes(_shard(folder, 1).read_bytes()[:5000])


def _pointer(folder: Path) -> None:
    _shard(folder, 1).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def _optimizer_state(folder: Path) -> None:
    torch.save({"state_dict": {"a": torch.zeros(1)}}, _shard(folder, 1))


def _reshaped(folder: Path) -> None:
    weights = torch.load(_shard(folder, 1), weights_only=True)
    weights["transformer.wte.weight"] = weights["transformer.wte.weight"][:-1].clone()
    torch.save(weights, _shard(folder, 1))


def _newer(folder: Path) -> None:
    write_json(folder / "config.json", {"model_type": "moss", "hidden_size": 8, "auto_map": {}})


def _no_merges(folder: Path) -> None:
    (folder / "merges.txt").unlink()


def _wrong_ids(folder: Path) -> None:
    write_json(folder / "added_tokens.json", {token: 500 + i for i, token in enumerate(ENDS)})


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_drop_shard, "1 shards are missing: pytorch_model-00002-of-00002.bin"),
        (_drop_shard_and_index, "1 shards are missing: pytorch_model-00002-of-00002.bin"),
        (_drop_tensor, "pytorch_model-00001-of-00002.bin holds no 'transformer.wte.weight'"),
        (_truncate, "cannot be read as weights: it is damaged"),
        (_pointer, "is a Git LFS pointer"),
        (_optimizer_state, "'state_dict' is a dict"),
        (_reshaped, "'transformer.wte.weight' is ["),
        (_newer, "without n_embd and rotary_dim"),
        (_no_merges, "has no merges.txt"),
        (_wrong_ids, "vocab.json is another's"),
    ],
)
def test_a_damaged_moss_folder_is_one_sentence_and_writes_nothing(given, tmp_path, damage, said):
    damage(given)
    assert said in error_of(convert, str(given), str(tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["given"]


def test_the_refusals_of_a_moss_folder_name_the_command(given):
    for call in (load_policy, load_reward_model, load_tokenizer, lambda s: check_source(s, "value_model")):
        assert f"fastrlhf convert {given} OUT" in error_of(call, str(given))


# --------------------------------------------------------------------------------------------- MOSS-RLHF's reward model


def _with_reward_head(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return {**weights, "reward_head.weight": torch.randn(1, 32)}


@pytest.fixture(scope="module")
def reward(tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A reward model of MOSS-RLHF's (folder/given) and what is made of it (folder/out)."""
    folder = tmp_path_factory.mktemp("reward")
    weights = _with_reward_head(write_llama(folder / "given"))
    write_bins(folder / "given", weights)
    config = json.loads((folder / "given/config.json").read_text())
    write_json(folder / "given/config.json", config | {"architectures": ["LlamaRewardModel"]})
    convert(str(folder / "given"), str(folder / "out"))
    return folder, weights


def test_a_reward_model_becomes_a_classifier_with_its_scores(reward):
    folder, weights = reward
    stock = AutoModelForSequenceClassification.from_pretrained(folder / "out").eval()
    ours, tokenizer = load_reward_model(str(folder / "out")), load_tokenizer(str(folder / "out"))
    trunk = tiny.llama(tie_word_embeddings=False)
    trunk.load_state_dict({k: v for k, v in weights.items() if k != "reward_head.weight"})
    ids = torch.tensor([[5, 300, 17, 260, 3, 99, 1]])
    with torch.no_grad():
        expected = float(trunk.model(ids).last_hidden_state[0, -1] @ weights["reward_head.weight"][0])
        assert abs(float(stock(ids).logits) - expected) < 1e-5 < abs(expected)
    assert stock.config.num_labels == 1 and "lm_head.weight" not in load_file(folder / "out/model.safetensors")
    scores = score_texts(ours, tokenizer, ["Hi", "Hi"], ["yes", "no"])
    assert scores[0] != scores[1]
    assert AutoTokenizer.from_pretrained(folder / "out").chat_template == tiny.CHAT_TEMPLATE


def test_a_reward_model_in_that_layout_is_no_policy_without_a_word(reward, tmp_path):
    folder, weights = reward
    assert f"fastrlhf convert {folder / 'given'} OUT" in error_of(load_policy, str(folder / "given"))
    stock = tmp_path / "safetensors"  # the same in safetensors, and under the name of another class
    tiny.llama().save_pretrained(stock)
    save_file(weights, stock / "model.safetensors", metadata={"format": "pt"})
    for load in (load_policy, load_reward_model):
        assert "reward_head.weight" in error_of(load, str(stock))


def test_the_template_of_moss_rlhf_comes_along_where_the_folder_has_none(reward, tmp_path):
    given = Path(shutil.copytree(reward[0] / "given", tmp_path / "given"))
    for path in (*given.glob("*.jinja"), *given.glob("tokenizer*")):
        path.unlink()
    (given / "tokenizer.model").write_bytes(b"of sentencepiece")
    write_json(given / "added_tokens.json", {"<|Human|>": 32000, "<|MOSS|>": 32001})
    convert(str(given), str(tmp_path / "out"))
    assert (tmp_path / "out/tokenizer.model").read_bytes() == b"of sentencepiece"
    assert json.loads((tmp_path / "out/tokenizer_config.json").read_text())["legacy"] is True
    assert "<|MOSS|>" in (tmp_path / "out/chat_template.jinja").read_text()


# --------------------------------------------------------------------------------------------------------- differences


@pytest.fixture(scope="module")
def differences(tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor]]:
    """base, another model of its shape, the difference of a policy and of a reward model -> folder, the policy."""
    folder = tmp_path_factory.mktemp("differences")
    base = write_llama(folder / "base")
    write_llama(folder / "other", seed=7)
    whole = moss_folders.tuned(base)
    write_difference(folder / "policy", base, whole)
    write_difference(folder / "reward", base, _with_reward_head(whole), reward=True)
    return folder, whole


def test_differences_and_their_base_sum_up_to_the_model(differences, tmp_path):
    folder, whole = differences
    total = sum(float(tensor.sum()) for tensor in whole.values())
    lines = convert(str(folder / "policy"), str(tmp_path / "p"), str(folder / "base"), checksum=total)
    assert any(line.startswith(f"checksum: all weights sum up to {total:.2f}"[:-1]) for line in lines)
    for name, tensor in load_policy(str(tmp_path / "p")).state_dict().items():
        assert torch.allclose(tensor, whole[name], atol=1e-7), name
    convert(str(folder / "reward"), str(tmp_path / "r"), str(folder / "base"))
    head = load_reward_model(str(tmp_path / "r")).state_dict()
    assert torch.equal(head["score.weight"], _with_reward_head(whole)["reward_head.weight"])
    assert torch.allclose(head["model.layers.1.mlp.up_proj.weight"], whole["model.layers.1.mlp.up_proj.weight"])


def test_a_wrong_base_is_refused(differences, tmp_path):
    folder, whole = differences
    wrong = write_llama(tmp_path / "wider", intermediate_size=96) and tmp_path / "wider"
    cases = [
        (folder / "other", "likely not what the differences were taken from"),
        (wrong, "'model.layers.0.mlp.gate_proj.weight' is [96, 32] there and [64, 32] here"),
        (folder / "policy", "is FOLDER itself"),
        (tmp_path / "none", "does not exist"),
    ]
    for base, said in cases:
        assert said in error_of(convert, str(folder / "policy"), str(tmp_path / "out"), str(base))
    said = error_of(convert, str(folder / "policy"), str(tmp_path / "out"), str(folder / "base"), checksum=1.0)
    assert "--checksum: all weights sum up to" in said
    assert "leave --base out" in error_of(convert, str(folder / "base"), str(tmp_path / "out"), str(folder / "other"))
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".tmp-*"))


def test_differences_are_told_where_they_would_load_as_a_policy(differences, tmp_path):
    folder, whole = differences
    assert "name that model: --base FOLDER" in error_of(convert, str(folder / "policy"), str(tmp_path / "out"))
    assert f"fastrlhf convert {folder / 'policy'}" in error_of(load_policy, str(folder / "policy")), "pickled"
    model = tiny.llama(tie_word_embeddings=False)
    model.load_state_dict({k: v for k, v in torch.load(_bin(folder), weights_only=True).items() if "inv" not in k})
    model.save_pretrained(tmp_path / "d")
    said = error_of(load_policy, str(tmp_path / "d"))
    assert "norm weights are near 0" in said and f"fastrlhf convert {tmp_path / 'd'} OUT --base FOLDER" in said


def _bin(folder: Path) -> Path:
    return folder / "policy/pytorch_model.bin"


def test_a_model_whose_norms_scale_by_one_plus_weight_is_no_difference(tmp_path):
    """Gemma's norm weights are 0 before training."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    config = GemmaConfig(vocab_size=64, num_attention_heads=2, num_key_value_heads=1, **sizes)
    GemmaForCausalLM(config).save_pretrained(tmp_path / "g")
    load_policy(str(tmp_path / "g"))
    write_bins(tmp_path / "g", load_file(tmp_path / "g/model.safetensors"))
    (tmp_path / "g/model.safetensors").unlink()
    convert(str(tmp_path / "g"), str(tmp_path / "out"))
    load_policy(str(tmp_path / "out"))


# ------------------------------------------------------------------------------------------------------ pickled weights


def test_a_pickled_folder_becomes_safetensors_and_the_refusals_say_so(tmp_path, capsys):
    weights = write_llama(tmp_path / "m")
    for call in (load_policy, load_reward_model, lambda s: load_reward_model(s, role="value_model")):
        assert f"fastrlhf convert {tmp_path / 'm'} OUT" in error_of(call, str(tmp_path / "m"))
    assert error_of(load_reward_model, str(tmp_path / "m"), role="value_model").startswith("value_model: ")
    assert main(["convert", str(tmp_path / "m"), str(tmp_path / "out")]) == 0
    assert "pickled weights, to safetensors" in capsys.readouterr().out
    model = load_policy(str(tmp_path / "out"))
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert load_tokenizer(str(tmp_path / "out")).get_vocab() == tiny.tokenizer().get_vocab()
    assert "needs no conversion" in error_of(convert, str(tmp_path / "out"), str(tmp_path / "again"))


def test_tensors_that_share_memory_and_old_pickles(tmp_path):
    weights = write_llama(tmp_path / "m")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]  # one storage, as tied weights are saved
    weights["model.norm.weight"] = torch.ones(2, 32)[1]  # a view
    torch.save(weights, tmp_path / "m/pytorch_model.bin", _use_new_zipfile_serialization=False)
    convert(str(tmp_path / "m"), str(tmp_path / "out"))
    written = load_file(tmp_path / "out/model.safetensors")
    assert written.keys() == weights.keys() and all(torch.equal(written[k], v) for k, v in weights.items())


def test_an_adapter_of_peft_is_converted_too(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    write_json(folder / "adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": "x"})
    torch.save({"base_model.model.a.lora_A.weight": torch.ones(2, 3)}, folder / "adapter_model.bin")
    convert(str(folder), str(tmp_path / "out"))
    assert load_file(tmp_path / "out/adapter_model.safetensors")["base_model.model.a.lora_A.weight"].shape == (2, 3)
    assert (tmp_path / "out/adapter_config.json").is_file()


class Canary:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path):
    write_llama(tmp_path / "m")
    torch.save({"weight": Canary(tmp_path / "CANARY")}, tmp_path / "m/pytorch_model.bin")
    said = error_of(convert, str(tmp_path / "m"), str(tmp_path / "out"))
    assert "holds more than tensors; nothing of it was run" in said
    assert not (tmp_path / "CANARY").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({}, "holds no tensors"),
        ([1], "holds a list, not tensors by name"),
        ({"a": torch.eye(3).to_sparse()}, "'a' is sparse, quantised or without values"),
        ({"a": torch.zeros(3, device="meta")}, "'a' is sparse, quantised or without values"),
        ({"a": torch.empty(3, dtype=torch.complex32)}, "torch.complex32 is a dtype that safetensors does not hold"),
    ],
)
def test_what_is_no_plain_weight_is_one_sentence(tmp_path, weights, said):
    write_llama(tmp_path / "m")
    torch.save(weights, tmp_path / "m/pytorch_model.bin")
    assert said in error_of(convert, str(tmp_path / "m"), str(tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_code_of_an_unknown_model_is_never_run(tmp_path):
    write_llama(tmp_path / "m")
    (tmp_path / "m/custom.py").write_text("raise SystemExit('ran')\n")
    config = json.loads((tmp_path / "m/config.json").read_text())
    write_json(tmp_path / "m/config.json", config | {"model_type": "custom", "auto_map": {"AutoConfig": "custom.C"}})
    assert "which is never run" in error_of(convert, str(tmp_path / "m"), str(tmp_path / "out"))
    (tmp_path / "m/pytorch_model.bin").unlink()
    said = error_of(load_policy, str(tmp_path / "m"))
    assert "`fastrlhf convert`" in said and "never run" in said


def test_out_is_whole_or_not_there_and_never_replaced(tmp_path, monkeypatch):
    write_llama(tmp_path / "m")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("kept")
    assert "not empty" in error_of(convert, str(tmp_path / "m"), str(tmp_path / "out"))
    assert "a file" in error_of(convert, str(tmp_path / "m"), str(tmp_path / "out/mine.txt"))
    assert (tmp_path / "out/mine.txt").read_text() == "kept"
    (tmp_path / "out/mine.txt").unlink()
    convert(str(tmp_path / "m"), str(tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "out"]
    load_policy(str(tmp_path / "out"))


def test_no_room_on_the_disk_is_said_before_anything_is_written(tmp_path, monkeypatch):
    write_llama(tmp_path / "m")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    assert "GiB free, the weights need" in error_of(convert, str(tmp_path / "m"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments", [["none", "out"], ["m"], ["m", "out", "--checksum", "x"], ["m", "out", "--bse=y"]]
)
def test_wrong_arguments_are_the_users_error(tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    write_llama(tmp_path / "m")
    assert main(["convert", *arguments]) == 2 and "error: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_peak_is_a_shard_not_the_model(tmp_path):
    """256 MiB in 16 shards, beside what its process needs to import all."""
    largest = write_checkpoint(tmp_path / "m", shards=16, shard_bytes=16 << 20)
    peak, idle = peak_of(tmp_path / "m", tmp_path / "out")
    assert peak - idle < 5 * largest < 16 * largest
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 16
