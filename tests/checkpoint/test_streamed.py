"""Weights and tensors that are written as they come: the files that are written of all of them at once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from fastrlhf.checkpoint import weight_files
from fastrlhf.checkpoint.state import load_optimizer_tensors, optimizer_tensors
from fastrlhf.checkpoint.weight_files import Header, Streamed, save_in_parts
from fastrlhf.parallel.shares import Gathering
from tests import tiny


def test_streamed_tensors_are_the_file_of_all_at_once(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    tensors = {f"policy.{i}.exp_avg": torch.randn(i + 1, 3, generator=draw) for i in range(12)}
    tensors |= {"half": torch.randn(5, generator=draw).bfloat16(), "step": torch.tensor(4.0), "none": torch.zeros(0, 2)}
    tensors |= {"yes": torch.tensor([True, False]), "long": torch.arange(3), 'a "name"': torch.ones(2).half()}
    save_file(tensors, tmp_path / "whole.safetensors")
    headers = {name: Header(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    for order in (list(tensors), list(reversed(tensors))):
        parts = (
            {name: tensors[name].t().contiguous().t() if tensors[name].ndim == 2 else tensors[name]} for name in order
        )
        streamed = Streamed(headers, parts)
        assert streamed.nbytes == sum(tensor.nbytes for tensor in tensors.values())
        streamed.write(tmp_path / "streamed.safetensors")
        assert (tmp_path / "streamed.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("part", "said"),
    [({}, "b did not come"), ({"b": torch.zeros(3)}, "b is not as"), ({"a": torch.zeros(2)}, "a is not as")],
)
def test_other_tensors_than_were_announced_are_no_file(tmp_path: Path, part: dict, said: str) -> None:
    headers = {name: Header((2,), torch.float32) for name in "ab"}
    with pytest.raises(RuntimeError, match=said):
        Streamed(headers, [{"a": torch.zeros(2)}, part]).write(tmp_path / "x.safetensors")


def parts_of(model: PreTrainedModel) -> list[dict[str, torch.Tensor]]:
    state, layers = model.state_dict(), {}
    for name in list(state):
        if ".layers." in name:
            layers.setdefault(name.split(".layers.")[1].partition(".")[0], {})[name] = state.pop(name)
    return [*layers.values(), state]


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_in_parts_is_the_folder_of_the_whole_or_several_files(tmp_path: Path, monkeypatch, tied: bool) -> None:
    model = tiny.llama(tie_word_embeddings=tied).bfloat16()
    model.save_pretrained(tmp_path / "whole")
    expected = load_file(tmp_path / "whole" / "model.safetensors")
    for name, size in (("one", weight_files.PART_BYTES), ("several", 1)):
        monkeypatch.setattr(weight_files, "PART_BYTES", size)
        (tmp_path / name).mkdir()
        save_in_parts(model, tmp_path / name, iter(parts_of(model)))
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "one" / file.name).read_bytes() == file.read_bytes()
    assert len(list((tmp_path / "one").iterdir())) == len(list((tmp_path / "whole").iterdir()))
    files = sorted(path.name for path in (tmp_path / "several").glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]  # two layers, and the rest
    found = {name: tensor for file in files for name, tensor in load_file(tmp_path / "several" / file).items()}
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    index = json.loads((tmp_path / "several" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == expected.keys() and not list((tmp_path / "several").glob(".*"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "several")
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))


def test_what_ranks_gather_is_taken_in_its_order_and_run_through_to_the_end() -> None:
    made: list[str] = []

    def parts(name: str) -> Iterator[dict[str, torch.Tensor]]:
        for number in range(3):
            made.append(f"{name}{number}")
            yield {f"{name}{number}": torch.zeros(1)}

    gathering = Gathering({"a": parts("a"), "b": parts("b"), "c": parts("c")})
    assert [name for part in gathering.take("a") for name in part] == ["a0", "a1", "a2"]
    with pytest.raises(RuntimeError, match="c is asked for, and it is the turn of b"):
        next(gathering.take("c"))
    next(reader := gathering.take("b"))
    reader.close()  # as where the disk is full
    gathering.finish()
    assert made == ["a0", "a1", "a2", "b0", "b1", "b2", "c0", "c1", "c2"]
    gathering.finish()


def test_shares_are_read_from_the_mapped_file(tmp_path: Path) -> None:
    """An optimizer that only stands in takes what is mapped as it is; one that trains, a copy."""
    weight = torch.nn.Parameter(torch.ones(8))
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.ones(8)
    optimizer.step()
    tensors, data = optimizer_tensors(optimizer, "p")
    save_file(tensors, tmp_path / "p.safetensors")
    mapped = load_file(tmp_path / "p.safetensors")
    for copy in (False, True):
        other = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(8))])
        load_optimizer_tensors(other, mapped, data, copy=copy)
        (state,) = other.state.values()
        assert torch.equal(state["exp_avg"], tensors["p.0.exp_avg"])
        assert (state["exp_avg"].data_ptr() == mapped["p.0.exp_avg"].data_ptr()) != copy
