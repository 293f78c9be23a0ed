"""`fastrlhf doctor`: all green where all is well; a fault planted in each area turns its line red, with what to do."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterable
from types import SimpleNamespace

import pytest
import torch

import fastrlhf_kernels
from fastrlhf import cli, doctor
from fastrlhf.config.errors import UserError
from fastrlhf.doctor import Line
from fastrlhf.plan.counter import LiveBytes
from fastrlhf_kernels import reference
from tests import runs, tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny.llama().save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    (path / "pairs.jsonl").write_text("\n".join(json.dumps(row) for row in runs.PAIRS))
    return path


def red(lines: Iterable[Line]) -> dict[str, str]:
    """What is red, and what to do about it; every red line says that."""
    faults = {line.what: line.do for line in lines if line.fault}
    assert all(faults.values())
    return faults


def test_a_sound_model_and_its_rows_are_green(folder, capsys):
    given = ["doctor", str(folder), "--data", str(folder / "pairs.jsonl")]
    assert cli.main([*given, "--json"]) == 0
    lines = [Line(**line) for line in json.loads(capsys.readouterr().out)]
    assert red(lines) == {}
    areas = {line.area for line in lines}
    assert areas == {"versions", "machine", "folder", "tokenizer", "model", "kernels", "data"}
    assert f"{len(lines)} green, 0 red" in doctor.table(lines)
    held = {line.what: line.found for line in lines if line.area == "model"}
    assert held["KL to the reference"].startswith("0.0e+00") and held["ratio of step 0, off 1"].startswith("0.0e+00")


def test_an_old_package_and_a_missing_one(monkeypatch):
    asked = ["torch>=99", "no-such-package>=1", "other-package>=1; extra == 'more'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: asked)
    lines = list(doctor.check_versions())
    assert red(lines) == {"torch": "pip install 'torch>=99'", "no-such-package": "pip install 'no-such-package>=1'"}
    assert lines[-1].found == "other-package"


def test_a_backend_that_cannot_be_and_a_full_disk_and_memory(monkeypatch, folder):
    monkeypatch.setenv("FASTRLHF_BACKEND", "metal")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=1))
    monkeypatch.setattr(doctor, "free_bytes", lambda device: 10)
    assert [*red(doctor.check_machine(str(folder)))] == ["kernels", "memory", "disk"]


def test_pickles_and_code_of_strangers(tmp_path):
    (tmp_path / "config.json").write_text('{"auto_map": {"AutoModel": "m.Model"}}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    faults = red(doctor.check_folder(str(tmp_path)))
    assert [*faults] == ["pickles", "auto_map"] and "fastrlhf convert" in faults["pickles"]


TEMPLATES = {
    "generation prompt": "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}",
    "prefix": "{{ messages | length }}" + tiny.CHAT_TEMPLATE,  # writes the prompt anew with each turn
    "EOS": tiny.CHAT_TEMPLATE,
}


@pytest.mark.parametrize("what", TEMPLATES)
def test_a_template_with_a_fault(what, monkeypatch):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = TEMPLATES[what]
    if what == "EOS":  # the ends of replies are masked
        whole = doctor.encode_conversation
        monkeypatch.setattr(doctor, "encode_conversation", lambda *a: (whole(*a)[0], [False] * len(whole(*a)[0])))
    assert what in red(doctor.check_tokenizer(tokenizer))


def test_a_tokenizer_that_loses_text():
    from tokenizers import normalizers

    tokenizer = tiny.tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert [*red(doctor.check_tokenizer(tokenizer))] == ["round trip"]


def test_padding_with_eos_is_no_fault():
    lines = list(doctor.check_tokenizer(tiny.tokenizer(pad_is_eos=True)))
    assert red(lines) == {} and "pad is EOS" in lines[0].found


@pytest.mark.parametrize("name", ["gae", "sample_tokens", "linear_ppo_loss", "decode_attention"])
def test_a_kernel_that_computes_something_else(name, monkeypatch):
    right = getattr(fastrlhf_kernels, name)

    def wrong(*args, **options):
        result = right(*args, **options)
        if not isinstance(result, tuple):
            return result * 1.01
        return type(result)(result[0] * 2, *result[1:]) if hasattr(result, "_fields") else (result[0] * 2, *result[1:])

    monkeypatch.setattr(fastrlhf_kernels, name, wrong)
    assert [what.split(",")[0] for what in red(doctor.check_kernels(tiny.llama()))] == [name]


def test_a_model_whose_numbers_change_from_call_to_call():
    model = tiny.llama()
    layer = model.model.layers[0].mlp
    layer.register_forward_hook(lambda *_: _[2] + torch.randn_like(_[2]))
    faults = red(doctor.check_invariants(model, tiny.tokenizer()))
    assert {"KL to the reference", "ratio of step 0, off 1", "micro-batches alone and together"} <= faults.keys()


def test_a_model_that_generates_otherwise_than_it_trains():
    model = tiny.llama()
    model.model.layers[0].register_forward_hook(lambda module, args, out: out + 0.1 * out.shape[1])
    faults = red(doctor.check_invariants(model, tiny.tokenizer()))
    assert "generation" in faults


def test_packed_rows_that_see_each_other(monkeypatch):
    def refuse(model):
        raise UserError("packing: they see each other")

    monkeypatch.setattr(doctor, "check_packing", refuse)
    assert [*red(doctor.check_invariants(tiny.llama(), tiny.tokenizer()))] == ["packing"]


def test_rows_that_no_stage_can_read(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n')
    faults = red(doctor.check_data(str(tmp_path / "rows.jsonl"), tiny.tokenizer()))
    assert [*faults] == ["for fastrlhf reward", "for fastrlhf sft", "for fastrlhf ppo"]


def test_peers_lists_the_bench_commands_and_wants_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    lines = list(doctor.check_peers())
    assert [*red(lines)] == ["GPU for bench"] and "python -m bench.kernels" in [line.found for line in lines]


def test_a_model_that_is_not_there(capsys):
    assert cli.main(["doctor", "./nowhere"]) == 2
    assert "MODEL: ./nowhere does not exist" in capsys.readouterr().err


def test_a_template_that_refuses_to_open_a_reply_is_a_line():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template += "{% if add_generation_prompt %}{{ raise_exception('no reply') }}{% endif %}"
    found = {line.what: line for line in doctor.check_tokenizer(tokenizer)}
    assert found["generation prompt"].fault and "no reply" in found["generation prompt"].found
    assert "chat_template=default" in found["generation prompt"].do


def test_no_copy_of_a_large_head_is_made_in_float64_and_no_table_of_the_vocabulary_by_itself():
    """V = 150,000 with H = 4096 would take 4.9 GB for each copy, and 180 GB for the table."""
    model = tiny.llama(vocab_size=20_000, hidden_size=256)
    head = model.get_input_embeddings().weight.nbytes
    with LiveBytes() as live:
        lines = list(doctor.check_kernels(model))
    assert red(lines) == {} and len(lines) == 13
    assert live.peak < 4 * head


@pytest.mark.parametrize("name", ["linear_log_probs", "linear_ppo_loss"])
def test_gradients_in_blocks_are_those_of_the_whole_specification(name, monkeypatch):
    monkeypatch.setattr(doctor, "BLOCK", 7)
    draw = torch.Generator().manual_seed(0)
    states, weight = (torch.randn(n, 6, generator=draw, dtype=torch.float64) for n in (4, 30))
    flat = [torch.randn(4, generator=draw, dtype=torch.float64) for _ in range(2)]
    rest = (torch.tensor([1, 29, 0, 7]), *([] if name == "linear_log_probs" else [*flat, torch.ones(4).bool()]))
    monkeypatch.setattr(fastrlhf_kernels, name, getattr(reference, name))
    assert doctor._gradients_off(name, states, weight, rest) < 1e-14

    def doubled(hidden, weight, *rest):
        return getattr(reference, name)(hidden, torch.cat([weight[:21], 2 * weight[21:] - weight[21:].detach()]), *rest)

    monkeypatch.setattr(fastrlhf_kernels, name, doubled)  # the same loss, another gradient in a later block
    assert doctor._gradients_off(name, states, weight, rest) > 1e-3
