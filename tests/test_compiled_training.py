"""Training through compiled layers: what the layers compute, few graphs, a model that stays what it was.

torch's compiler makes C++ in one test. In the others a graph runs as it was traced, so that results are equal to the
bit: how graphs are chosen, called and told apart is what they look at.
"""

from __future__ import annotations

import copy
import math
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from bench.regions import kernels
from fastrlhf import SFTConfig
from fastrlhf.config.errors import UserError
from fastrlhf.config.inputs import lora_options
from fastrlhf.models import backbone
from fastrlhf.models.backbone import compile_layers
from fastrlhf.models.heads import hidden_states
from fastrlhf.models.loading import make_trainable
from fastrlhf.models.lora import Adapters
from fastrlhf.rollout.compiled import Compilation
from fastrlhf.runtime import regions
from fastrlhf.runtime.regions import is_compiled
from fastrlhf.trainer import Trainer
from tests import tiny
from tests.runs import ppo_trainer, reward_trainer, sft_trainer

SHAPES = [(2, 9), (4, 4), (1, 6), (3, 20), (32, 32), (1, 5), (7, 2)]
PACKED = [[3, 4], [6, 5, 2]]


def adapted(**changes: object) -> tuple[nn.Module, Adapters]:
    """A tiny llama with two adapters on its queries that compute something, checkpointed."""
    pytest.importorskip("peft")
    model = tiny.llama(**changes)
    options = lora_options({"r": 4, "target_modules": ["q_proj"]})
    adapters = Adapters(model, options, ["policy", "value"], 0, None, print)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    return make_trainable(model, True, frozen=True), adapters


def learnt(model: nn.Module, ids: Tensor, positions: Tensor | None = None) -> list[Tensor]:
    """The trunk's states, those of a forward without gradients, and the gradients of a function of them."""
    hidden = hidden_states(model, ids, positions)
    weights = torch.arange(hidden.numel()).sin().view_as(hidden)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    grads = torch.autograd.grad((hidden * weights).sum(), trained, allow_unused=True)
    with torch.no_grad():
        read = hidden_states(model, ids, positions)
    return [hidden.detach(), read, *(grad for grad in grads if grad is not None)]


def batches() -> list[tuple[Tensor, Tensor | None]]:
    draw = torch.Generator().manual_seed(0)
    padded = [(torch.randint(320, shape, generator=draw), None) for shape in SHAPES]
    packed = [torch.cat([torch.arange(length) for length in row])[None] for row in PACKED]
    return padded + [(torch.randint(320, row.shape, generator=draw), row) for row in packed]


def saved_tensors(run: Path) -> dict[str, bytes]:
    """The files with tensors of a run's newest checkpoint."""
    newest = max((run / "checkpoints").iterdir())
    return {str(file.relative_to(newest)): file.read_bytes() for file in newest.rglob("*.safetensors")}


def same(ours: list[Tensor], plain: list[Tensor]) -> bool:
    return len(ours) == len(plain) and all(map(torch.equal, ours, plain))


@pytest.fixture
def as_traced(monkeypatch):
    monkeypatch.setattr(regions, "BACKEND", "eager")


def test_checkpointed_layers_with_adapters_give_the_losses_and_gradients_that_they_give_as_they_are():
    model, _ = adapted(intermediate_size=32, num_key_value_heads=4)
    ids = batches()[3][0]
    plain, before = learnt(model, ids), counters["stats"]["unique_graphs"]
    random = torch.get_rng_state()
    with kernels() as graphs:
        compile_layers(model, True, pytest.fail)
    ours = learnt(model, ids)
    # Forward; the forward again, and backward. The attention's forward is one more, under an operator that holds random
    # numbers' state.
    assert [len(graph) for graph in graphs] == [15, 29], graphs
    assert counters["stats"]["unique_graphs"] == before + 1, "one graph of both layers, with and without gradients"
    assert len(ours) == len(plain) == 6 and torch.equal(ours[0], ours[1]) and not same(ours, plain)
    for one, other in zip(ours, plain, strict=True):
        assert (one - other).abs().max() <= 2e-5 * other.abs().max()
    assert torch.equal(random, torch.get_rng_state()) and all(p.grad is None for p in model.parameters())


def test_ragged_micro_batches_take_three_graphs_whatever_came_before(as_traced):
    """Of several rows, of one, of one with joined sequences; and a further one without an adapter."""
    model, adapters = adapted()
    plain, before = [learnt(model, *batch) for batch in batches()], counters["stats"]["unique_graphs"]
    compile_layers(model, True, pytest.fail)
    for batch, expected in zip(batches(), plain, strict=True):
        assert same(learnt(model, *batch), expected)
    assert counters["stats"]["unique_graphs"] == before + 3
    for role in (None, "policy"):
        with adapters.using(role), torch.no_grad():
            ours = hidden_states(model, batches()[0][0])
            with torch.inference_mode():  # as it is
                assert torch.equal(ours, hidden_states(model, batches()[0][0]))
    assert counters["stats"]["unique_graphs"] == before + 4


def test_the_graph_of_a_form_does_not_depend_on_its_first_sizes(monkeypatch):
    """Rows as many as tokens, and both as wide as something in the model, are so by chance: a resumed run begins with
    other micro-batches, and computes the same."""

    def graphs(shapes: list[tuple[int, int]]) -> list[str]:
        found: list[str] = []

        def keep(graph: torch.fx.GraphModule, _: object):
            found.append(graph.code)
            return graph

        monkeypatch.setattr(regions, "BACKEND", keep)
        monkeypatch.setattr(backbone, "TRIED", shapes[0])
        model = make_trainable(tiny.llama(num_hidden_layers=1), None)
        compile_layers(model, True, pytest.fail)
        for shape in shapes:
            hidden_states(model, torch.ones(shape, dtype=torch.int64)).sum().backward()
        return found

    first = graphs([(3, 5), (8, 8), (32, 32)])
    assert len(first) == 1 and first == graphs([(8, 8), (4, 8), (9, 31)])


MAKERS = pytest.mark.parametrize(
    ("make", "options", "compiled"),
    [
        (sft_trainer, {"lora": 2, "quantize": "nf4", "gradient_checkpointing": True, "packing": True}, 1),
        (reward_trainer, {"gradient_checkpointing": True}, 1),
        (ppo_trainer, {"offload": True}, 3),
        (ppo_trainer, {"critic": "shared_trunk", "critic_learning_rate": None, "ptx_coef": 1.0}, 2),
    ],
    ids=["sft", "reward", "ppo", "shared_trunk"],
)


def models(trainer: Trainer) -> list[nn.Module]:
    found = [role.model for role in trainer.trained().values()]
    found += [trainer.ref_policy] if hasattr(trainer, "ref_policy") else []
    return list({id(model): model for model in found if model is not None}.values())


@MAKERS
def test_a_stage_learns_the_same_and_saves_the_same_folder(as_traced, monkeypatch, tmp_path, make, options, compiled):
    """The very weights, so the first ratio is 1 here too; names, order and modules are those of the model."""
    for needed in ("peft", "bitsandbytes") if "quantize" in options else ():
        pytest.importorskip(needed)
    monkeypatch.setattr(Compilation, "settle", lambda self, *_: "")  # decoding stays as it is
    inputs = {"ptx_data": [{"text": "the cat sat on the mat"}] * 4} if "ptx_coef" in options else {}
    made = [make(**options, **copy.deepcopy(inputs), compile=value) for value in (False, True)]
    assert [sum(map(is_compiled, models(trainer))) for trainer in made] == [0, compiled]
    before = counters["stats"]["unique_graphs"]
    metrics = [trainer.train() for trainer in made]
    assert metrics[0] == pytest.approx(metrics[1], abs=0, nan_ok=True)
    for trainer, folder in zip(made, ("plain", "compiled"), strict=True):
        trainer.save(tmp_path / folder)
    plain, ours = made
    for one, other in zip(models(plain), models(ours), strict=True):
        assert list(one.state_dict()) == list(other.state_dict())
        assert [type(module) for module in one.modules()] == [type(module) for module in other.modules()]
        assert not [module for module in other.modules() if "forward" in vars(module)]
        assert all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))
    files = {path.name: path.read_bytes() for path in (tmp_path / "plain").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "compiled").iterdir()}
    assert counters["stats"]["unique_graphs"] <= before + 2 * compiled, "the trial compiled the most of them"


def test_a_resumed_run_has_the_same_bytes_and_copies_of_its_model_are_not_compiled(as_traced, tmp_path):
    options = {"total_steps": 2, "save_every": 1, "lr_schedule": "constant", "compile": True}
    folders = [tmp_path / "whole", tmp_path / "parts"]
    whole = sft_trainer(output_dir=str(folders[0]), **options)
    steps = iter(whole)
    next(steps)
    shutil.copytree(*folders)
    list(steps)
    resumed = sft_trainer(output_dir=str(folders[1]), resume=True, **options)
    assert resumed.steps_done == 1 and is_compiled(resumed.model)
    resumed.train()
    saved, again = (saved_tensors(folder) for folder in folders)
    assert len(saved) > 1 and saved == again
    copied = copy.deepcopy(whole.model)
    assert not is_compiled(copied) and copied.model.layers[0]._compiled_call_impl is None
    assert torch.equal(*(hidden_states(model.eval(), batches()[0][0]) for model in (copied, whole.model)))


def test_what_cannot_be_compiled_is_refused_or_stays_as_it_is(as_traced, monkeypatch):
    """So where layers do what no graph can, where compiled ones differ, where weights are shares, and where there is no
    compiler; auto says it once."""
    model = tiny.llama(num_hidden_layers=1)
    mlp = model.model.layers[0].mlp

    def reason() -> str:
        with pytest.raises(UserError) as raised:
            compile_layers(model, True, pytest.fail)
        assert not is_compiled(model) and model.model.layers[0]._compiled_call_impl is None
        return str(raised.value).removeprefix("compile = true: ").removesuffix("; use compile = auto or false")

    with monkeypatch.context() as patched:
        patched.setattr(mlp, "forward", lambda x: x if x.sum() > 0 else -x)
        assert reason().startswith("the trial of compiled layers fails for LlamaForCausalLM (Unsupported: ")
    with monkeypatch.context() as patched:
        patched.setattr(mlp, "forward", lambda x: x * (1 + torch.compiler.is_compiling()))
        assert reason() == "the layers of LlamaForCausalLM compute something else when they are compiled"
    with monkeypatch.context() as patched:
        patched.setattr(model.model.layers[0], "forward", mlp.forward)
        assert reason() == "the layers of LlamaForCausalLM have forwards that are not their own"
    with monkeypatch.context() as patched:
        patched.setattr(model.config, "_attn_implementation_internal", "flash_attention_2")
        assert reason() == "a flash attention parts the graph of a layer"
    model._gathered, told = True, []
    assert reason() == "its weights are sharded, and a layer's are gathered as it runs"
    monkeypatch.setattr(backbone, "rests", lambda *_: False)  # as on a GPU
    compile_layers(model, None, told.append)
    assert told == ["training is not compiled: its weights are sharded, and a layer's are gathered as it runs"]
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="no-such-compiler is not on the PATH; install it, or use compile = false"):
        sft_trainer(compile=True)
    told.clear()
    ppo_trainer().roles.compile_layers(None, told.append)  # one sentence for all models
    assert told == ["training is not compiled: torch.compile needs a compiler, and no-such-compiler is not on the PATH"]


def test_the_trial_allows_for_what_a_deep_model_in_bf16_rounds_and_for_no_more():
    draw = torch.Generator().manual_seed(0)
    exact, noise = torch.randn(2, 4096, generator=draw)
    for size, dtype, layers, expected in (
        (0.066, torch.bfloat16, 64, True),  # measured of a llama of 64 layers, compiled for a CPU
        (0.013, torch.bfloat16, 2, True),
        (0.3, torch.bfloat16, 64, False),
        (0.1, torch.bfloat16, 2, False),
        (0.01, torch.float32, 64, False),
        (math.nan, torch.float32, 64, False),
    ):
        assert backbone._within_rounding(exact + size * noise, exact, dtype, layers) is expected


def test_auto_leaves_a_cpu_as_it_is():
    for value in (None, False):
        trainer = sft_trainer(compile=value)
        assert not is_compiled(trainer.model) and SFTConfig().compile is None


def test_layers_that_change_too_often_are_refused_at_the_trial_and_go_on_as_they_are_later(
    as_traced, monkeypatch, caplog
):
    def too_often(*_: object) -> None:
        raise torch._dynamo.exc.FailOnRecompileLimitHit("8")

    several, one = batches()[0][0], batches()[2][0]
    model = tiny.llama()
    plain = [learnt(model, ids) for ids in (several, one)]
    with monkeypatch.context() as patched:
        patched.setattr(regions, "compiled", lambda _: too_often)
        with pytest.raises(UserError, match="the trial of compiled layers fails for LlamaForCausalLM .FailOnRecompile"):
            compile_layers(model, True, pytest.fail)
        assert not is_compiled(model)
    compile_layers(model, True, pytest.fail)
    monkeypatch.setattr(regions, "compiled", lambda _: too_often)  # of one row, which the trial has not seen
    assert all(same(learnt(model, ids), expected) for ids, expected in zip((several, one), plain, strict=True))
    said = "some layers of LlamaForCausalLM could not be compiled (FailOnRecompileLimitHit): they train as they are"
    assert [r.getMessage() for r in caplog.records if r.name.startswith("fastrlhf")] == [said]


def test_what_an_earlier_trainer_compiled_is_given_back_and_what_its_user_compiled_is_not(as_traced):
    model = tiny.llama()
    first, second = model.model.layers
    compile_layers(model, True, pytest.fail)
    assert is_compiled(model) and first._compiled_call_impl is not None
    second._compiled_call_impl = second._call_impl  # as nn.Module.compile does
    compile_layers(model, False, pytest.fail)
    assert not is_compiled(model) and first._compiled_call_impl is None and second._compiled_call_impl is not None
