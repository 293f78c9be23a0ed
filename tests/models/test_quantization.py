"""Quantised bases: the formats by hand, gradients, training and generation of every stage, what is saved."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from fastrlhf import RolloutEngine, SamplingParams, UserError
from fastrlhf.config.errors import ConfigError
from fastrlhf.config.stages import SFTConfig
from fastrlhf.models import heads, loading
from fastrlhf.models.quantization import BLOCK, QuantizedLinear, quantization_note, quantize_trunk, quantized_layers
from fastrlhf.models.token_batch import target_log_probs
from tests import lora_runs as runs
from tests import tiny
from tests.runs import train_keeping

MISSING = [name for name in ("bitsandbytes", "peft") if find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {MISSING}")
KINDS = pytest.mark.parametrize("kind", ["nf4", "int8"])
NF4 = [  # Dettmers et al. 2023, appendix E
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def oracle(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """Quantised and back in float64, from the papers."""
    w = weight.double()
    if kind == "int8":
        scale = w.half().double().abs().amax(1, keepdim=True)
        return (w.half().double() * 127 / scale).round() * scale / 127
    blocks = w.reshape(-1, BLOCK)
    scale = blocks.abs().amax(1, keepdim=True)
    table = torch.tensor(NF4, dtype=torch.float64)
    nearest = ((blocks / scale)[..., None] - table).abs().argmin(-1)
    return (table[nearest] * scale).reshape(w.shape)


@KINDS
def test_dequantised_weights_are_those_of_the_papers(kind):
    torch.manual_seed(0)
    weight = torch.randn(96, 128)
    got = QuantizedLinear(weight, None, kind).dense(torch.float32)
    off = (got.double() - oracle(weight, kind)).abs()
    assert float((off > 1e-5).double().mean()) < 1e-3  # a value halfway between two levels may go either way
    level = 0.16 if kind == "nf4" else 1 / 127
    assert float(off.max()) <= level * float(weight.abs().max())
    error = float((got - weight).norm() / weight.norm())
    assert (0.08 < error < 0.10) if kind == "nf4" else error < 0.01


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_gradient_are_those_of_the_dense_weight(kind, dtype):
    """Exactly, in training as in evaluation: PPO's first ratio is 1."""
    torch.manual_seed(0)
    layer = QuantizedLinear(torch.randn(48, 64), torch.randn(48).to(dtype), kind)
    dense, x = layer.dense(dtype), torch.randn(2, 5, 64, dtype=dtype, requires_grad=True)
    out = layer(x)
    assert torch.equal(out, F.linear(x, dense, layer.bias)) and out.dtype == dtype
    grad = torch.randn_like(out)
    out.backward(grad)
    torch.testing.assert_close(x.grad, grad @ dense)
    with torch.inference_mode():
        assert torch.equal(layer.eval()(x), out)
    assert layer.weight.grad is None and not layer.weight.requires_grad


@pytest.mark.parametrize(("kind", "low", "high"), [("nf4", 0.5, 0.6), ("int8", 1.0, 1.1)])
def test_bytes_of_a_weight(kind, low, high):
    model = tiny.llama(hidden_size=64, intermediate_size=128)
    dense = {n: p.numel() for n, p in model.base_model.named_parameters() if n.endswith("proj.weight")}
    quantize_trunk(model, kind, model.device)
    layers = quantized_layers(model)
    assert len(layers) == 14 and isinstance(model.lm_head, nn.Linear) and not isinstance(model.lm_head, QuantizedLinear)
    held = sum(t.nbytes for layer in layers.values() for t in (*layer.parameters(), *layer.buffers()))
    assert low < held / sum(dense.values()) < high
    assert f"14 linear layers in {kind}" in quantization_note(model)


@KINDS
@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
@pytest.mark.parametrize("stage", [runs.sft, runs.reward_model])
def test_every_stage_trains_an_adapter_over_a_quantised_base(stage, make, kind):
    t = stage(make(), quantize=kind, total_steps=6)
    before = {n: layer.weight.clone() for n, layer in quantized_layers(t.model).items()}
    losses = [step.metrics["loss/train"] for step in t]
    assert len(before) in (14, 8) and losses[-1] < losses[0]
    assert all(torch.equal(before[n], layer.weight) for n, layer in quantized_layers(t.model).items())


@KINDS
@pytest.mark.parametrize("form", [{}, {"critic": "shared_trunk"}, {"gradient_checkpointing": True}])
def test_ppo_over_a_quantised_base_starts_at_ratio_one(kind, form):
    t = runs.ppo(tiny.llama(), quantize=kind, mini_batch_size=8, **form)
    steps = [step.metrics for step in t]
    assert steps[0]["policy/ratio"] == 1.0 and steps[0]["kl/ref"] == 0.0 and steps[1]["kl/ref"] != 0
    assert all(step["rollout/mismatch_max"] < 1e-4 for step in steps)  # decoding computes what training does


@KINDS
def test_generation_reads_the_quantised_layers(kind):
    """Greedy tokens of the engine are those of stock `generate` on the merged weights; no byte changes."""
    t = runs.ppo(tiny.llama(), quantize=kind)
    runs.stir(t.roles.adapters, "policy")
    before = {k: v.clone() for k, v in t.policy.state_dict().items()}
    prompts = [ids for _, ids in t.prompts]
    out = RolloutEngine(t.policy).generate(prompts, SamplingParams(10, temperature=0.0, stop_token_ids=[]))
    assert all(torch.equal(before[k], v) for k, v in t.policy.state_dict().items())
    merged = tiny.llama()
    merged.load_state_dict(t.roles.adapters.merged("policy"))
    for prompt, response in zip(prompts, out.response_ids, strict=True):
        ids = torch.tensor([prompt])
        want = merged.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False,
                               eos_token_id=None)  # fmt: skip
        assert response == want[0, len(prompt) :].tolist()


@KINDS
@pytest.mark.parametrize("build", [runs.sft, runs.reward_model, runs.ppo])
def test_a_resumed_run_ends_with_the_same_bytes(build, kind, tmp_path):
    """The base is quantised again from its folder, to the same bytes; checkpoints hold no part of it."""
    base, fields = runs.base(tmp_path / "base"), {"quantize": kind, "save_every": 1, "total_steps": 3}
    train_keeping(build(base, **fields, output_dir=str(tmp_path / "through")), 1, tmp_path / "resumed")
    again = build(base, **fields, output_dir=str(tmp_path / "resumed"), resume=True)
    assert again.steps_done == 1
    again.train()
    for name in ("metrics.jsonl", *(f"checkpoints/step-000003/{f.name}" for f in
                 (tmp_path / "through/checkpoints/step-000003").glob("*.safetensors"))):  # fmt: skip
        assert (tmp_path / "through" / name).read_bytes() == (tmp_path / "resumed" / name).read_bytes(), name


@KINDS
@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
def test_the_run_folder_holds_the_adapter_and_merging_states_its_loss(kind, make, tmp_path):
    from fastrlhf.sft import SFTTrainer
    from fastrlhf.trainer import run_stage

    base, out = runs.base(tmp_path / "base", make), tmp_path / "run"
    config = SFTConfig(**runs.COMMON | {"quantize": kind, "lora": {"r": 4, "target_modules": targets(make)}},
                       output_dir=str(out), dtype="bf16")  # fmt: skip
    run_stage(SFTTrainer, {"model": base, "data": runs.ROWS}, config)
    assert (out / "final" / "adapter_model.safetensors").exists() and not list(out.glob("final/model*"))
    assert not (out / "adapter").exists()
    assert f"in {kind}, " in (out / "log.txt").read_text(encoding="utf-8")

    t = SFTTrainer(config.replace(resume=True), model=base, data=runs.ROWS)
    t.save(tmp_path / "merged")
    said = (out / "log.txt").read_text(encoding="utf-8")
    assert "merged into the dequantised base: rounding to bfloat16 changes" in said
    rounding = float(said.split("these weights by ")[1].split(" of their")[0])
    assert 1e-4 < rounding < 4e-3  # half a unit in the last place of bf16 is 2^-9 at most
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        a, b = (heads.hidden_states(model, ids).float() for model in (t.model, merged))
    assert float((a - b).norm() / a.norm()) < 0.05
    with pytest.raises(UserError, match="quantised already|no adapter|adapters already"):
        runs.sft(t.model)


def targets(make) -> list[str]:
    """Some layers only: the others are dequantised too."""
    return ["q_proj", "down_proj"] if make is tiny.llama else ["c_attn"]


def test_merged_weights_by_hand():
    """fp32: the dequantised weight plus (alpha / r) B A, and the dequantised weight where no adapter is."""
    t = runs.sft(tiny.gpt2(), quantize="nf4", lora={"r": 2, "alpha": 6, "target_modules": ["c_attn"]})
    runs.stir(t.adapters, "policy")
    merged, layer = t.adapters.merged("policy"), t.model.transformer.h[0].attn.c_attn
    delta = 3.0 * layer.lora_B["policy"].weight @ layer.lora_A["policy"].weight
    want = layer.base_layer.dense(torch.float32) + delta
    torch.testing.assert_close(merged["transformer.h.0.attn.c_attn.weight"], want.t())
    plain = t.model.transformer.h[1].mlp.c_fc
    assert torch.equal(merged["transformer.h.1.mlp.c_fc.weight"], plain.dense(torch.float32).t())
    assert merged.keys() == tiny.gpt2().state_dict().keys()


def test_one_quantised_base_serves_every_role(tmp_path):
    base = runs.base(tmp_path / "base", hidden_size=128, intermediate_size=256)
    rm = runs.reward_model(base, lora=1, quantize="nf4")
    rm.save(tmp_path / "rm", adapter=True)
    t = runs.ppo(base, str(tmp_path / "rm"), lora=1, quantize="nf4", critic="shared_trunk")
    t.train()
    model = loading.load_policy(base)
    quantize_trunk(model, "nf4", model.device)
    held = runs.held_bytes(*runs.roles_of(t)) - runs.held_bytes(t.critic.head)  # 4 H: large beside this model
    assert held < 0.5 * runs.held_bytes(loading.load_policy(base))
    assert held < 1.25 * runs.held_bytes(model)  # rank 1 is 1/16 of a layer of 4 bits here


def test_reference_scoring_uses_the_quantised_base():
    t = runs.ppo(tiny.llama(), quantize="nf4", critic="shared_trunk")
    runs.stir(t.roles.adapters, "policy")
    rollout = t.rollout(t.prompts, 1, purpose="rollout")
    batch, plain = rollout.rows.batch(range(6), t.device), tiny.llama()
    quantize_trunk(plain, "nf4", plain.device)
    with torch.no_grad(), t.roles.reference() as model:
        assert torch.equal(target_log_probs(model, batch, 1.0), target_log_probs(plain, batch, 1.0))


def test_refused_by_name(monkeypatch):
    with pytest.raises(ConfigError, match="quantize = nf4: quantised weights cannot be trained; set lora too"):
        SFTConfig(quantize="nf4")
    model = tiny.llama()
    model.base_model.layers[0].mlp.up_proj.weight = nn.Parameter(torch.zeros(64, 32, dtype=torch.int8), False)
    with pytest.raises(UserError, match="quantised already; load it in bf16"):
        quantize_trunk(model, "nf4", model.device)
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    with pytest.raises(UserError, match="quantize: 'nf4' needs `pip install bitsandbytes`"):
        QuantizedLinear(torch.ones(2, 64), None, "nf4")


def test_bitsandbytes_is_imported_without_asking_the_hub(tmp_path):
    """A stand-in for the package `kernels` writes a file where it is asked for a kernel."""
    (tmp_path / "kernels.py").write_text(f"def get_kernel(*a, **k):\n    open({str(tmp_path / 'asked')!r}, 'w')\n")
    code = (
        "import sys; from fastrlhf.runtime.hardware import bitsandbytes; b = bitsandbytes('x', 'y'); "
        "assert 'kernels' not in sys.modules; import kernels; assert kernels.get_kernel; "
        "assert b.functional.dequantize_4bit and b.optim.AdamW8bit"
    )
    root = Path(__file__).parents[2]
    path = f"import sys; sys.path[:0] = [{str(root)!r}, {str(tmp_path)!r}]; "
    done = subprocess.run([sys.executable, "-c", path + code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "asked").exists() and "kernels-community" not in done.stderr
