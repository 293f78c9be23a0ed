"""`fastrlhf plan`: its peaks are those of real runs, and what it says of a GPU is arithmetic that can be followed."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import BloomConfig, MixtralConfig

from bench import plan as bench
from fastrlhf import cli
from fastrlhf.cli import _memory_of
from fastrlhf.config.errors import UserError
from fastrlhf.config.recipe import stage_of
from fastrlhf.config.stages import CONFIGS
from fastrlhf.plan import estimate, report
from fastrlhf.plan.counter import LiveBytes, allocated
from fastrlhf.plan.estimate import Plan, make_plan, parse_size
from fastrlhf.plan.models import sized_config
from fastrlhf.plan.phases import Measured, Measurer, Phase, Target
from fastrlhf.plan.unknown import UnknownNumbers
from fastrlhf.runtime import hardware
from tests import tiny


@pytest.mark.parametrize("cell", ["sft/checkpointing", "ppo/shared_trunk", "ppo/rollout_dtype"])
def test_the_plan_is_within_five_percent_of_a_real_run(cell, folder):
    """bench.plan compares all cells, on a larger model."""
    result = bench.compared(cell, folder)
    assert abs(result["off_of_the_peak"]) <= bench.LIMIT
    assert all(off >= -bench.LIMIT for off in result["off"].values())  # no phase needs more than is planned


def test_the_counter_counts_a_storage_once_and_until_it_is_freed():
    with LiveBytes() as live:
        a = torch.zeros(1000)
        b = a.view(10, 100)[2:]
        assert live.now == live.peak == 4000 and live.rounded == 4096
        with live.phase():
            del a
            assert live.now == 4000
            del b
            assert live.now == 0 and live.peak == 4000
    assert allocated(1) == 512 and allocated((10 << 20) + 1) == 12 << 20


def test_unknown_numbers_are_one_and_the_others_are_computed():
    with UnknownNumbers() as live:
        weight = live.unknown(lambda: torch.zeros(4, 1024))
        ids = torch.tensor([3, 1])
        picked = weight[ids]
        assert float(picked.sum()) == 1.0 and bool((picked > 2).any()) and ids.tolist() == [3, 1]
        assert picked[:, torch.arange(1024) < 3].shape == (2, 3) and picked[0, :2].tolist() == [1.0, 1.0]
        written = torch.zeros(2, dtype=torch.int64)
        written += picked[:, 0].long()
        assert written.tolist() == [1, 1]
        assert live.now >= weight.nbytes + picked.nbytes == 6 * 4096


def test_a_copy_of_a_model_without_numbers_shares_their_mode():
    """A copy of the mode, which torch would make, corrupts memory when it is freed: plans of Gemma 2 crashed."""
    with UnknownNumbers() as live:
        model = live.unknown(lambda: torch.nn.Linear(3, 2))
        model.tied = model.weight
        live.unknown(lambda: model.register_buffer("scale", torch.ones(4)))
        made = copy.deepcopy(model)
        assert made.scale.fake_mode is made.weight.fake_mode is live.fake and made.tied is made.weight
        assert isinstance(made.weight, torch.nn.Parameter) and made.weight.requires_grad
        assert made.weight.untyped_storage()._cdata != model.weight.untyped_storage()._cdata
        assert [name for name, _ in made.named_parameters()] == ["weight", "bias"] and [*made.buffers()]


# ------------------------------------------------------------------------------------------------- what does not fit


def faked(monkeypatch, peak_of) -> None:
    """Phases of a made-up size: what the search does with them is what is tried."""

    class Measurer:
        def __init__(self, stage, inputs, target):
            self.stage, self.target = stage, target

        def __call__(self, config, slots=None):
            return measure(config)

    def measure(config):
        rows = max(1, min(config.mini_batch_size, config.micro_batch_tokens // 100))
        held = {"model: parameters": 100, "gradients": 50, "optimizer": 200}
        phase = Phase(peak_of(config, rows), peak_of(config, rows), trains=True)
        return Measured(held, {"update": phase}, rows, config.mini_batch_size, 100, (10, 4), 2, 10)

    monkeypatch.setattr(estimate, "Measurer", Measurer)


BESIDE = estimate.CONTEXT + estimate.CUBLAS


def test_the_largest_micro_batch_is_found_and_tried(monkeypatch):
    faked(monkeypatch, lambda config, rows: 1000 + rows * rows)
    config = CONFIGS["sft"](mini_batch_size=32, micro_batch_tokens=200)
    plan = make_plan("sft", {}, config, Target(BESIDE + 1000 + 20 * 20), search=True)
    assert plan.fits and plan.changes == [] and 1000 + plan.most_rows**2 <= 1400
    tight = make_plan("sft", {}, config, Target(BESIDE + 1002), search=True)
    assert not tight.fits and tight.most_rows == 1
    assert make_plan("sft", {}, config, Target(BESIDE + 1000), search=True).most_rows is None


def test_auto_is_the_largest_micro_batch_that_leaves_a_tenth_of_the_gpu_and_is_as_it_was_on_a_cpu(monkeypatch):
    faked(monkeypatch, lambda config, rows: (1 << 30) + rows * (1 << 24))
    config = CONFIGS["sft"](mini_batch_size=512)
    most = make_plan("sft", {}, config, Target(80 << 30), search=False)
    assert most.tokens == 16384 and most.measured.rows == 163
    room = BESIDE + (1 << 30) + 40 * (1 << 24)
    tight = make_plan("sft", {}, config, Target(int(room / estimate.AUTO_SHARE) + 1), search=False)
    assert tight.tokens == 4000 and tight.measured.rows == 40 and tight.peak == room
    assert "with micro-batches of 4000 tokens" in report.one_line(tight)
    config = config.model_copy(update={"gradient_checkpointing": False})
    none = make_plan("sft", {}, config, Target(BESIDE), search=False)
    assert none.tokens == 100 and none.fits is False  # the least there is; the run may need less than its limits
    assert make_plan("sft", {}, config, Target(), search=False).tokens == 8192
    stated = config.model_copy(update={"micro_batch_tokens": 9000})
    assert make_plan("sft", {}, stated, Target(room), search=False).tokens == 9000


def test_checkpointing_that_is_auto_is_on_where_micro_batches_would_be_small_or_nothing_fits(monkeypatch):
    faked(monkeypatch, lambda config, rows: (1 << 30) + rows * (1 << (20 if config.gradient_checkpointing else 24)))
    config = CONFIGS["sft"](mini_batch_size=512)

    def plan(rows, **fields):  # rows of 100 tokens fit without it
        memory = int((BESIDE + (1 << 30) + rows * (1 << 24)) / estimate.AUTO_SHARE) + 1
        return make_plan("sft", {}, config.model_copy(update=fields), Target(memory), search=False)

    assert (plan(41).tokens, plan(41).checkpointing) == (4100, False)
    assert (plan(40).tokens, plan(40).checkpointing) == (16384, True)  # 4000 tokens would fit
    assert "of 16384 tokens and gradient checkpointing" in report.one_line(plan(40))
    assert not plan(40, mini_batch_size=40).checkpointing  # a mini-batch is no larger
    assert (plan(40, gradient_checkpointing=False).tokens, plan(0).checkpointing) == (4000, True)
    assert plan(20, micro_batch_tokens=4000).checkpointing and not plan(20, micro_batch_tokens=2000).checkpointing
    assert report.as_json(plan(40))["gradient_checkpointing"]
    assert not make_plan("sft", {}, config, Target(), search=False).checkpointing  # on a CPU


def test_one_measurer_serves_several_sizes_and_gives_what_a_new_one_gives(folder):
    inputs, target = {"policy": folder, "reward": "module:f"}, Target(2 << 30)
    measure = Measurer("ppo", inputs, target)
    small = {"rollout_batch_size": 6, "mini_batch_size": 6, "max_prompt_tokens": 12, "max_new_tokens": 4}
    config = CONFIGS["ppo"](**{**bench.PPO, **small, "micro_batch_tokens": 32})
    wide = config.model_copy(update={"micro_batch_tokens": 64})
    first, second, again = measure(config), measure(wide), measure(config, 4)
    for got, new in (
        (second, Measurer("ppo", inputs, target)(wide)),
        (again, Measurer("ppo", inputs, target)(config, 4)),
    ):
        assert replace(got, phases={}) == replace(new, phases={})
        peaks = {name: phase.peak for name, phase in new.phases.items()}  # torch keeps constants of a KiB in all
        assert {name: phase.peak for name, phase in got.phases.items()} == pytest.approx(peaks, abs=4096)
    assert first.phases["update of the policy"].peak < second.phases["update of the policy"].peak


def test_a_run_on_a_gpu_says_its_peak_first_and_takes_its_micro_batches_from_it_and_a_resumed_one_those_of_the_first(
    folder, tmp_path, monkeypatch, capsys
):
    """The GPU is made up: its memory is all that the plan takes of it."""
    model = tmp_path / "model"
    tiny.llama().save_pretrained(model)
    tiny.tokenizer().save_pretrained(model)
    (tmp_path / "d.jsonl").write_text('{"text": "the cat sat on the mat"}\n' * 8)
    needed = make_plan(
        "sft",
        {"model": str(model)},
        CONFIGS["sft"](max_tokens=64, micro_batch_tokens=128),
        Target(1 << 30),
        search=False,
    )
    memory = int(needed.peak / estimate.AUTO_SHARE) + (1 << 14)
    monkeypatch.setattr(hardware, "gpu_alone", lambda: True)
    monkeypatch.setattr(report, "target_of", lambda given: Target(memory))
    given = [f"model={model}", f"data={tmp_path}/d.jsonl", "format=text", "eval_fraction=0", "max_tokens=64"]
    given += ["total_steps=1", "mini_batch_size=8", "dtype=bf16", f"output_dir={tmp_path}/run"]
    assert cli.main(["sft", *given]) == 0
    out = capsys.readouterr().out
    assert "with micro-batches of 128 tokens" in out and out.index("memory: ") < out.index("in all: ")
    assert "128 tokens and gradient checkpointing" in out  # more than that would not fit either way
    assert "gradient_checkpointing: true\n" in (tmp_path / "run/config.yaml").read_text()
    (state,) = (tmp_path / "run").glob("checkpoints/*/state.json")
    assert json.loads(state.read_text())["parts"]["memory"]["chosen"] == 128
    monkeypatch.setattr(report, "target_of", lambda given: Target(1 << 40))
    assert cli.main(["resume", str(tmp_path / "run")]) == 0
    assert "memory: " not in capsys.readouterr().out  # it is not even asked


def test_switches_come_in_the_order_of_their_cost_each_on_top_of_the_others_until_it_fits(monkeypatch):
    def peak(config, rows):
        return 10_000 - 3000 * config.gradient_checkpointing - 3000 * (config.lora is not None) + rows

    faked(monkeypatch, peak)
    monkeypatch.setattr(estimate, "installed", lambda package: True)
    config = CONFIGS["sft"](micro_batch_tokens=100, gradient_checkpointing=False)
    plan = make_plan("sft", {}, config, Target(BESIDE + 5000), search=True)
    assert [(c.switch, c.peak - BESIDE) for c in plan.changes] == [
        ("gradient_checkpointing=true", 7001),
        ("lora=16", 4001),
    ]
    monkeypatch.setattr(estimate, "installed", lambda package: False)
    first, second, *_ = make_plan("sft", {}, config, Target(BESIDE + 5000), search=True).changes
    assert first.peak and second.peak is None and "peft" in second.problem
    text = "\n".join(report.lines_of(plan))
    assert "does not fit" in text and "lora=16" in text and "CUDA context (assumed)" in text


def test_lines_add_up_to_the_total_and_several_gpus_share_the_rows(folder):
    inputs, fields = {"policy": folder, "reward": "module:f"}, {**bench.PPO, "dtype": "bf16", "offload": True}
    plan = make_plan("ppo", inputs, CONFIGS["ppo"](**fields), Target(2 << 30, gpus=4), search=False)
    assert plan.measured.count == 2 and plan.measured.slots == 4
    for name, need in plan.needs.items():
        phase = plan.measured.phases[name]
        assert need.lines["activations and the rest"] >= 0
        seen = sum(v for k, v in need.lines.items() if k not in BESIDE_TENSORS)
        assert seen == phase.peak - phase.parked - phase.cpu_only, name
    assert "parked in host memory" in plan.needs["rollout"].lines
    assert "buckets between GPUs" in plan.needs["update of the policy"].lines
    zero = CONFIGS["ppo"](**fields, parallel="zero")
    shared = make_plan("ppo", inputs, zero, Target(2 << 30, gpus=4), search=False)
    for name, need in plan.needs.items():
        held = {k: v for k, v in need.lines.items() if k in ("fp32 masters", "optimizer")}
        assert held and {k: shared.needs[name].lines[k] for k in held} == {k: -(-v // 4) for k, v in held.items()}
    data = report.as_json(plan)
    assert json.loads(json.dumps(data)) == data and data["fits"] and data["peak"] == plan.peak


def test_fsdp_shares_the_weights_too_and_gathers_what_runs(folder):
    inputs = {"policy": folder, "reward": "module:f"}
    config = CONFIGS["ppo"](**{**bench.PPO, "dtype": "bf16", "parallel": "fsdp"})
    plan = make_plan("ppo", inputs, config, Target(2 << 30, gpus=4), search=False)
    held = plan.measured.held
    lines = {name: need.lines for name, need in plan.needs.items()}
    for name in ("rollout", "experience", "update of the critic", "update of the policy"):
        assert "policy: parameters" not in lines[name]  # the shares of the masters are the weights
        assert lines[name]["fp32 masters"] == -(-held["fp32 masters"] // 4)
        assert lines[name]["reference: parameters"] == -(-held["reference: parameters"] // 4)
        assert lines[name]["activations and the rest"] >= 0
    assert lines["rollout"]["gathered weights"] == held["policy: parameters"]
    assert 0 < lines["experience"]["gathered weights"] <= sum(plan.measured.layered.values())
    assert lines.keys() == plan.measured.phases.keys()  # nothing is whole on a device while it is read
    small = make_plan("ppo", inputs, config, Target(held["policy: parameters"], gpus=4), search=False)
    assert small.needs["rollout"].lines["gathered weights"] == plan.measured.layered["policy"]


BESIDE_TENSORS = {
    "workspace of the fused head",
    "allocator rounding",
    "CUDA context (assumed)",
    "cuBLAS workspace (assumed)",
    "CUDA graphs (assumed)",
    "buckets between GPUs",
}


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "text, problem",
    [
        ("24", "its unit is missing"),
        ("24XB", "the unit 'XB' is not known"),
        ("much", "is no size"),
        ("0GiB", "no size"),
    ],
)
def test_a_size_without_a_unit_is_no_size(text, problem):
    with pytest.raises(UserError, match=f"^--gpu-memory: '{text}'.*{problem}.*GiB"):
        parse_size(text, "--gpu-memory")


def test_sizes_are_read_in_both_kinds_of_units():
    assert parse_size("1.5 GiB", "") == 3 << 29 and parse_size("80gb", "") == 80 * 10**9


@pytest.mark.parametrize("name", ["hidden_size", "num_hidden_layers", "vocab_size"])
def test_a_model_config_without_a_size_is_refused(name, folder, tmp_path):
    """transformers would take that of LLaMA-7B without a word."""
    config = json.loads((Path(folder) / "config.json").read_text())
    del config[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"^policy: config.json of .* has no {name}"):
        sized_config(str(tmp_path), "policy")


def test_a_gguf_file_has_no_sizes_without_its_weights(tmp_path, monkeypatch):
    monkeypatch.setattr("fastrlhf.models.sources.installed", lambda package: True)
    monkeypatch.setattr("fastrlhf.models.sources._missing_bytes", lambda *_: 0)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match="is a GGUF file.*name a folder"):
        sized_config(str(tmp_path / "m.gguf"), "policy")


def test_a_recipe_says_what_it_is_for():
    assert stage_of("sft", []) == "sft" and stage_of(None, ["policy=x"]) == "ppo"
    with pytest.raises(UserError, match="of sft or reward; say what it is for: --stage"):
        stage_of(None, ["model=x", "data=y"])
    with pytest.raises(UserError, match="of none of sft, reward, ppo"):
        stage_of(None, ["policy=x", "score_range=1,2"])


def test_the_verb_prints_the_plan_of_a_recipe_whose_rows_are_not_there(folder, capsys):
    given = [f"model={folder}", "max_tokens=64", "mini_batch_size=2", "format=text", "--gpu-memory", "2GiB", "--json"]
    assert cli.main(["plan", *given]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["stage"] == "sft" and plan["dtype"] == "bf16" and plan["fits"] and plan["largest_micro_batch"] == 2
    assert cli.main(["plan", *given[:-3], "--gpu-memory", "24"]) == 2
    assert "its unit is missing" in capsys.readouterr().err


def test_a_dry_run_says_the_peak_in_a_line_or_why_it_is_not_known(folder, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    config = CONFIGS["sft"](max_tokens=32, mini_batch_size=2)
    assert _memory_of("sft", {"model": str(tmp_path)}, config).startswith(
        "memory: not computed: policy: config.json of"
    )
    assert _memory_of("sft", {"model": folder}, config).endswith("of a CPU at the update (fp32); computed, not run")


def test_without_the_memory_of_a_gpu_there_is_a_peak_and_no_verdict(folder):
    config = CONFIGS["reward"](max_tokens=32, mini_batch_size=2)
    plan: Plan = make_plan("reward", {"model": folder}, config, Target(), search=True)
    assert report.one_line(plan).startswith("memory: ") and "of a CPU at the update (fp32)" in report.one_line(plan)
    assert "give --gpu-memory" in report.lines_of(plan)[-1]


def test_a_dry_run_goes_on_where_torch_knows_no_shape_or_the_model_decodes_without_a_cache(tmp_path):
    """Experts in fp32, whose kernel has a rule for shapes that takes bf16 alone; Bloom, which refuses the cache."""
    shape = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    MixtralConfig(**shape, **heads, intermediate_size=32, num_local_experts=2).save_pretrained(tmp_path / "experts")
    config = CONFIGS["sft"](max_tokens=16, mini_batch_size=2)
    line = _memory_of("sft", {"model": str(tmp_path / "experts")}, config)
    assert line.startswith("memory: not computed: torch cannot tell what aten._grouped_mm") or "computed, not" in line
    BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=4).save_pretrained(tmp_path / "bloom")
    config = CONFIGS["ppo"](
        rollout_batch_size=2, mini_batch_size=2, max_new_tokens=8, max_prompt_tokens=8, critic="shared_trunk"
    )
    line = _memory_of("ppo", {"policy": str(tmp_path / "bloom"), "reward": "rules.py:score"}, config)
    assert line.endswith("(fp32); computed, not run")
