"""The fields of the three stages are frozen, documented and used; every mistake in one is a sentence."""

from __future__ import annotations

import ast
import copy
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrlhf.config.base import StageConfig, config_fields
from fastrlhf.config.errors import UserError
from fastrlhf.config.inputs import INPUTS
from fastrlhf.config.recipe import check_paths, load_recipe, packaged_recipes, read_recipe, resolved_yaml
from fastrlhf.config.stages import CONFIGS, PPOConfig, RewardConfig, SFTConfig

ROOT = Path(__file__).parents[2]

COMMON = """learning_rate lr_schedule warmup_steps max_grad_norm parallel optimizer adam_betas adam_eps weight_decay
micro_batch_tokens gradient_checkpointing compile lora quantize dtype
attention chat_template prompt_format columns ignore_columns max_samples allow_drop skip_bad_rows seed save_every
eval_every output_dir overwrite resume accept_changed"""
SUPERVISED = "epochs total_steps max_tokens overlong mini_batch_size eval_fraction"
FROZEN = {
    SFTConfig: f"{COMMON} {SUPERVISED} packing format",
    RewardConfig: f"""{COMMON} {SUPERVISED} head_only readout readout_layer score_range center_rewards ensemble
    label_smoothing lm_coef weakest weakest_share strength_margin""",
    PPOConfig: f"""{COMMON} total_steps rollout_batch_size samples_per_prompt ppo_epochs mini_batch_size
    max_prompt_tokens max_new_tokens temperature top_p top_k critic_learning_rate gamma gae_lambda kl_coef kl_estimator
    kl_in target_kl clip_range clip_range_high dual_clip importance_cap clip_range_value vf_coef entropy_coef ptx_coef
    whiten_advantages reward_scaling reward_clip reward_timeout reward_retries advantage_clip missing_eos_penalty
    critic critic_warmup_steps advantage old_log_probs ema_decay kl_controller kl_controller_target kl_horizon
    kl_budget ratio_level loss_aggregation length_penalty overlong_penalty bootstrap_truncated
    critic_pretrain_epochs critic_max_grad_norm ref_refresh_every packing probe offload eval_temperature
    rollout_dtype
    best_of_n critic_gae_lambda length_adaptive_lambda drop_equal_groups kl_gradient runaway_kl runaway_entropy
    policy_loss ptx_reduction missing_eos_score importance_mask reward_ensemble reward_sd_coef""",
}


def refusal(cls: type[StageConfig], **fields: object) -> str:
    with pytest.raises(UserError) as caught:
        cls(**fields)
    return str(caught.value)


# -------------------------------------------------------------------------------------------------------------- fields


@pytest.mark.parametrize("cls", FROZEN, ids=lambda cls: cls.__name__)
def test_the_set_of_fields_is_frozen(cls):
    """A new field needs a reason: it is added here, in docs/api.md and in the changelog, or not at all."""
    assert sorted(cls.model_fields) == sorted(FROZEN[cls].split())


@pytest.mark.parametrize("cls", FROZEN, ids=lambda cls: cls.__name__)
def test_every_field_has_a_default_and_a_meaning(cls):
    cls()
    for field in config_fields(cls):
        assert len(field.description) > 8 and field.description != "None", field.name


def test_defaults_are_the_documented_ones():
    ppo = PPOConfig()
    assert (ppo.learning_rate, ppo.critic_learning_rate, ppo.lr_schedule) == (1e-6, 5e-6, "constant")
    assert (ppo.total_steps, ppo.rollout_batch_size, ppo.mini_batch_size, ppo.ppo_epochs) == (1000, 128, 32, 2)
    assert (ppo.max_prompt_tokens, ppo.max_new_tokens) == (512, 256)
    assert (ppo.temperature, ppo.top_p, ppo.top_k, ppo.gamma, ppo.gae_lambda) == (1.0, 1.0, 0, 1.0, 0.95)
    assert (ppo.kl_coef, ppo.kl_estimator, ppo.kl_in, ppo.target_kl) == (0.05, "k1", "reward", None)
    assert (ppo.clip_range, ppo.clip_range_value, ppo.vf_coef, ppo.entropy_coef) == (0.2, 0.2, 1.0, 0.0)
    assert (SFTConfig().learning_rate, SFTConfig().lr_schedule) == (2e-5, "cosine")
    assert (RewardConfig().learning_rate, RewardConfig().lr_schedule) == (5e-6, "cosine")
    assert (RewardConfig().score_range, RewardConfig().eval_fraction) == ((1.0, 5.0), 0.1)


def table(head: list[str], rows: list[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


@pytest.mark.parametrize("stage", CONFIGS)
def test_the_reference_says_what_the_code_says(stage):
    """On failure: paste the printed tables into docs/api.md."""
    fields = [(f"`{f.name}`", f"`{f.default}`", f.accepts, f.description) for f in config_fields(CONFIGS[stage])]
    inputs = [(f"`{n}`", "yes" if i.required else "no", i.description) for n, i in INPUTS[stage].items()]
    expected = [
        table(["argument", "required", "meaning"], inputs),
        table(["field", "default", "accepts", "meaning"], fields),
    ]
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    section = text.split(f"`fastrlhf {stage}`")[1].split("\n## ")[0]
    for wanted in expected:
        assert wanted in section, f"docs/api.md, section of {stage}, should hold\n{wanted}"


def test_no_field_is_parsed_and_ignored():
    """Every field is read somewhere outside fastrlhf/config."""
    read = set()
    for path in (ROOT / "fastrlhf").rglob("*.py"):
        if path.parent.name != "config":
            tree = ast.parse(path.read_text(encoding="utf-8"))
            read |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for cls in CONFIGS.values():
        assert sorted(set(cls.model_fields) - read) == []


# -------------------------------------------------------------------------------------------------------------- checks


@pytest.mark.parametrize(
    ("cls", "fields", "said"),
    [
        (PPOConfig, {"kl_coef": -1}, "kl_coef = -1: expected a number >= 0"),
        (PPOConfig, {"kl_coeff": 0.1}, "kl_coeff: no such field; did you mean kl_coef?"),
        (PPOConfig, {"beta": 0.1}, "beta: no such field; did you mean kl_coef?"),
        (PPOConfig, {"kl_target": 0.1}, "kl_target: no such field; did you mean kl_controller_target?"),
        (SFTConfig, {"lr": 0.1}, "lr: no such field; did you mean learning_rate?"),
        (PPOConfig, {"num_generations": 4}, "did you mean samples_per_prompt?"),
        (RewardConfig, {"kl_coef": 0.1}, "kl_coef: belongs to fastrlhf ppo, not to reward"),
        (PPOConfig, {"policy": "gpt2"}, "policy: an argument of the trainer, not a field of PPOConfig"),
        (PPOConfig, {"zzz": 1}, "zzz: no such field; fastrlhf ppo --help lists them all"),
        (PPOConfig, {"seed": "x"}, "seed = 'x': expected a whole number >= 0"),
        (PPOConfig, {"seed": True}, "seed = True: expected a whole number"),
        (PPOConfig, {"kl_coef": False}, "kl_coef = False: expected a number"),
        (PPOConfig, {"ppo_epochs": 2.5}, "ppo_epochs = 2.5: expected a whole number >= 1"),
        (PPOConfig, {"temperature": 0}, "temperature = 0: expected a number > 0"),
        (PPOConfig, {"temperature": float("nan")}, "temperature = nan: expected a number > 0"),
        (PPOConfig, {"learning_rate": float("inf")}, "learning_rate = inf: expected a number >= 0"),
        (PPOConfig, {"top_p": 1.5}, "top_p = 1.5: expected a number > 0 and <= 1"),
        (PPOConfig, {"lr_schedule": "cosin"}, "expected one of constant, cosine, linear, inverse_sqrt"),
        (PPOConfig, {"lr_schedule": False}, "lr_schedule = False: expected one of constant"),
        (PPOConfig, {"kl_in": "rewards"}, "kl_in = 'rewards': expected reward or loss"),
        (PPOConfig, {"micro_batch_tokens": 0}, "micro_batch_tokens = 0: expected a whole number >= 1, or auto"),
        (PPOConfig, {"target_kl": "auto"}, "target_kl = 'auto': expected a number > 0, or none"),
        (PPOConfig, {"total_steps": None}, "total_steps = None: expected a whole number >= 1"),
        (PPOConfig, {"output_dir": 7}, "output_dir = 7: expected text, or none"),
        (PPOConfig, {"overwrite": "maybe"}, "overwrite = 'maybe': expected true or false"),
        (PPOConfig, {"clip_range": [1] * 99}, "..."),
        (RewardConfig, {"score_range": "1"}, "score_range = '1': expected two numbers low,high"),
        (RewardConfig, {"score_range": [5, 1]}, "score_range = 5,1: the lowest score must be below the highest"),
        (
            PPOConfig,
            {"resume": True, "overwrite": True, "output_dir": "x"},
            "resume = true: contradicts overwrite = true",
        ),
        (PPOConfig, {"samples_per_prompt": 3}, "samples_per_prompt = 3: must divide rollout_batch_size = 128"),
        (PPOConfig, {"rollout_batch_size": 16}, "mini_batch_size = 32: above rollout_batch_size = 16"),
        (PPOConfig, {"advantage": "grpo"}, "advantage = grpo: compares responses; set samples_per_prompt >= 2"),
        (PPOConfig, {"quantize": "nf4"}, "quantize = nf4: quantised weights cannot be trained; set lora too"),
        (PPOConfig, {"quantize": "fp4"}, "quantize = 'fp4': expected nf4 or int8, or none"),
        (SFTConfig, {"parallel": "zero", "optimizer": "adamw8bit"}, "use optimizer = adamw or parallel = ddp"),
        (PPOConfig, {"parallel": "zero", "ema_decay": 0.9}, "averages whole weights; use parallel = ddp"),
        (PPOConfig, {"parallel": "fdsp"}, "expected one of ddp, zero, fsdp"),
        (PPOConfig, {"parallel": "fsdp", "lora": 4, "quantize": "nf4"}, "cuts along its first dimension; use parallel"),
        (PPOConfig, {"parallel": "fsdp", "offload": True}, "as they are read; use parallel = zero"),
        (PPOConfig, {"parallel": "fsdp", "ema_decay": 0.9}, "averages whole weights; use parallel = ddp"),
        (PPOConfig, {"parallel": "fsdp", "ref_refresh_every": 2}, "fsdp holds shares of both; use parallel = zero"),
        (RewardConfig, {"parallel": "fsdp", "head_only": True}, "without the trunk that fsdp shares"),
        (RewardConfig, {"parallel": "fsdp", "lm_coef": 1.0}, "fsdp gathers both together; use parallel = zero"),
        (SFTConfig, {"parallel": "fsdp", "optimizer": "adamw8bit"}, "which fsdp cuts into shares; use optimizer"),
        (PPOConfig, {"whiten_advantages": "x"}, "expected one of true, false, group"),
        (PPOConfig, {"whiten_advantages": "group"}, "a group needs samples_per_prompt >= 2"),
        (PPOConfig, {"packing": "x"}, "packing = 'x': expected true or false, or auto"),
        (PPOConfig, {"critic_warmup_steps": 9, "total_steps": 9}, "leaves the policy none of total_steps = 9"),
    ],
)
def test_a_mistake_is_one_sentence(cls, fields, said):
    message = refusal(cls, **fields)
    assert said in message
    assert len(message.splitlines()) == 1 and len(message) < 160


def test_all_mistakes_are_told_at_once():
    lines = refusal(PPOConfig, kl_coef=-1, seed="x", lr=1).splitlines()
    assert [line.split()[0].rstrip(":") for line in lines] == ["seed", "kl_coef", "lr"]


@pytest.mark.parametrize(
    ("cls", "name", "value", "meant"),
    [
        (PPOConfig, "learning_rate", "1e-5", 1e-5),
        (PPOConfig, "learning_rate", 1, 1.0),
        (PPOConfig, "total_steps", "12", 12),
        (PPOConfig, "clip_range_value", "none", None),
        (PPOConfig, "clip_range_value", "null", None),
        (PPOConfig, "micro_batch_tokens", "auto", None),
        (PPOConfig, "whiten_advantages", "false", False),
        (PPOConfig, "whiten_advantages", "no", False),
        (PPOConfig, "whiten_advantages", "True", True),
        (PPOConfig, "packing", "auto", None),
        (SFTConfig, "packing", "auto", None),
        (PPOConfig, "loss_aggregation", "auto", "token_mean"),
        (PPOConfig, "lora", "none", None),
        (RewardConfig, "score_range", "0, 10", (0.0, 10.0)),
        (RewardConfig, "score_range", "[-1,1]", (-1.0, 1.0)),
        (RewardConfig, "score_range", [1, 7], (1.0, 7.0)),
    ],
)
def test_text_becomes_the_type_of_the_field(cls, name, value, meant):
    got = getattr(cls(**{name: value}), name)
    assert got == meant and type(got) is type(meant)


def test_a_field_may_be_a_switch_or_a_word():
    assert PPOConfig(whiten_advantages="group", samples_per_prompt=2).whiten_advantages == "group"


def test_packing_means_the_same_in_every_stage_that_has_it():
    fields = [cls.model_fields["packing"] for cls in (SFTConfig, PPOConfig)]
    assert fields[0].annotation == fields[1].annotation and fields[0].description == fields[1].description


def test_dr_grpo_brings_its_own_sum_and_a_given_one_is_used(recipe):
    """Liu et al. 2025: constant by default. config.yaml says what runs, also after an estimator is replaced."""
    dr_grpo = {"advantage": "dr_grpo", "samples_per_prompt": 2}
    assert [PPOConfig(**f).loss_aggregation for f in ({}, dr_grpo)] == ["token_mean", "constant"]
    assert PPOConfig().replace(**dr_grpo).loss_aggregation == "constant"
    assert PPOConfig(**dr_grpo, loss_aggregation="token_mean").loss_aggregation == "token_mean"
    written = resolved_yaml("ppo", {"policy": "p", "reward": "r", "prompts": "d"}, PPOConfig(**dr_grpo))
    assert load_recipe("ppo", recipe(written), [])[1] == PPOConfig(**dr_grpo)
    assert "loss_aggregation: constant\n" in written


def test_configs_are_values():
    config = PPOConfig(seed=3)
    assert config == copy.deepcopy(config) == config.replace(seed=3) != config.replace(seed=4)
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 5
    with pytest.raises(UserError, match="seed = -1"):
        config.replace(seed=-1)
    with pytest.raises(TypeError):
        PPOConfig(3)


# ------------------------------------------------------------------------------------------------------------- recipes

MINIMAL = "policy: some/model\nreward: some/judge\nprompts: p.jsonl\n"


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(text: str | bytes) -> str:
        Path("r.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return "r.yaml"

    return write


def test_a_recipe_is_inputs_and_config(recipe):
    source = recipe(MINIMAL + "learning_rate: 1e-5  # a string in YAML 1.1\nwhiten_advantages: no\n")
    inputs, config = load_recipe("ppo", source, ["kl-coef=0.1", "seed=7", "policy=other", "tokenizer=none"])
    assert inputs == {"policy": "other", "reward": "some/judge", "prompts": "p.jsonl"}
    assert config == PPOConfig(learning_rate=1e-5, whiten_advantages=False, kl_coef=0.1, seed=7)


def test_rewards_and_rows_may_be_lists(recipe):
    source = recipe("policy: p\nreward: [[len, 1, a.py:f], [fmt, 0.5, b.py:g]]\nprompts: [hello, 你好]\n")
    inputs, _ = load_recipe("ppo", source, [])
    assert inputs["reward"] == [["len", 1, "a.py:f"], ["fmt", 0.5, "b.py:g"]]
    inputs, _ = load_recipe("ppo", source, ["prompts=[a, b]"])
    assert inputs["prompts"] == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "overrides", "said"),
    [
        (MINIMAL + "kl_coeff: 1\n", [], "r.yaml:4: kl_coeff: no such field; did you mean kl_coef?"),
        (MINIMAL + "kl_coef: -1\n", [], "r.yaml:4: kl_coef = -1: expected"),
        (MINIMAL, ["kl_coef=-1"], "command line: kl_coef = '-1': expected a number >= 0"),
        (MINIMAL + "polcy: x\n", [], "r.yaml:4: polcy: no such field; did you mean policy?"),
        (MINIMAL + "kl_coef: 1\nkl_coef: 2\n", [], "r.yaml:5: kl_coef: given twice, first in line 4"),
        (MINIMAL, ["kl_coef"], "command line: 'kl_coef': expected field=value"),
        (MINIMAL, ["=3"], "command line: '=3': expected field=value"),
        ("policy: x\nprompts: y\n", [], "reward: required; add it to r.yaml or to the command line"),
        (MINIMAL + "ref_policy: 3\n", [], "r.yaml:4: ref_policy = 3: expected"),
        ("- policy: x\n", [], 'r.yaml:1: expected "field: value" lines'),
        ("just text", [], 'expected "field: value" lines'),
        ("", [], "policy: required"),
        ("a: [1\n", [], "r.yaml:2: not valid YAML"),
        ("a: b: c\n", [], "r.yaml:1: not valid YAML"),
        ("[1]: 2\n", [], "r.yaml:1: a field name must be a word"),
        ("seed: 2024-99-99\n", [], "r.yaml:1: not a value"),
        ("seed: \x00\n", [], "r.yaml: not valid YAML"),
        (b"seed: \xff\xfe\n", [], "r.yaml:1: not UTF-8 text (byte 6)"),
    ],
)
def test_a_wrong_recipe_names_file_line_and_field(recipe, text, overrides, said):
    with pytest.raises(UserError) as caught:
        load_recipe("ppo", recipe(text), overrides)
    assert said in str(caught.value)


def test_a_recipe_that_is_not_there(recipe, tmp_path):
    with pytest.raises(UserError) as caught:
        load_recipe("ppo", "nope", [])
    assert str(tmp_path / "nope") in str(caught.value) and "packaged recipes: " in str(caught.value)
    for name in packaged_recipes():
        assert name in str(caught.value)
    with pytest.raises(UserError, match="is a folder"):
        load_recipe("ppo", str(tmp_path), [])


def test_a_packaged_recipe_is_found_by_name_and_a_file_of_that_name_wins(recipe, tmp_path):
    for name in packaged_recipes():
        assert read_recipe(ROOT / "fastrlhf" / "recipes" / f"{name}.yaml")[0]
        (tmp_path / name).write_text(MINIMAL)
        assert load_recipe("ppo", name, [])[0]["policy"] == "some/model"


VALUES = {
    "seed": st.integers(0, 2**32 - 1),
    "learning_rate": st.floats(0, 1e3, allow_subnormal=False),
    "kl_coef": st.floats(0, 10),
    "micro_batch_tokens": st.none() | st.integers(1, 10**9),
    "target_kl": st.none() | st.floats(1e-9, 1e9),
    "clip_range_value": st.none() | st.floats(0, 1),
    "whiten_advantages": st.booleans(),
    "lr_schedule": st.sampled_from(["constant", "cosine", "linear", "inverse_sqrt"]),
    "output_dir": st.none() | st.text(st.characters(categories=["L", "N", "P", "Zs"]), min_size=1, max_size=20),
}


@given(st.fixed_dictionaries({}, optional=VALUES), st.text("aé你.:/~-#'\"\\ []{}&*!", min_size=1, max_size=12))
@settings(max_examples=60, deadline=None)
def test_the_resolved_recipe_reads_back_to_the_same_run(tmp_path_factory, fields, name):
    path = tmp_path_factory.mktemp("r") / "config.yaml"
    spelled = ("none", "null", "auto")
    fields["output_dir"] = None if str(fields.get("output_dir")).lower() in spelled else fields.get("output_dir")
    config = PPOConfig(**fields)
    inputs = {"policy": "p/" + name, "reward": [["a", 0.5, "f.py:g"]], "prompts": ["hi", "你好"]}
    path.write_text(resolved_yaml("ppo", inputs, config), encoding="utf-8")
    assert load_recipe("ppo", str(path), []) == (inputs, config)


def test_the_resolved_recipe_holds_every_field(recipe):
    inputs = {"model": Path("m"), "data": [{"text": "x"}]}
    values, _ = read_recipe(Path(recipe(resolved_yaml("sft", inputs, SFTConfig()))))
    assert set(values) == {"model", "data", *SFTConfig.model_fields}
    assert values["micro_batch_tokens"] == "auto" and values["model"] == "m"


def test_objects_from_python_are_named_but_not_read_back(recipe):
    inputs = {"policy": object(), "reward": refusal, "prompts": "p.jsonl"}
    text = resolved_yaml("ppo", inputs, PPOConfig(output_dir="out"))
    inputs, config = load_recipe("ppo", recipe(text), [])
    Path("p.jsonl").write_text("{}")
    with pytest.raises(UserError, match="<object> was handed over in Python") as caught:
        check_paths("ppo", inputs, config)
    assert "reward: <refusal>" in str(caught.value)


# --------------------------------------------------------------------------------------------------------------- paths


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("policy", "./base", "policy: ./base does not exist"),
        ("policy", "/nowhere/base", "policy: /nowhere/base does not exist"),
        ("policy", "out/stf", "policy: out/stf does not exist; did you mean out/sft?"),
        ("policy", "model.gguf", "policy: model.gguf does not exist"),
        ("policy", "rows.jsonl", "policy: rows.jsonl is a file, but neither a model folder nor a .gguf file"),
        ("policy", "a/b/c", "policy: a/b/c does not exist"),
        ("prompts", "row.jsonl", "prompts: row.jsonl does not exist; did you mean rows.jsonl?"),
        ("eval_prompts", "nope.csv", "eval_prompts: nope.csv does not exist"),
        ("reward", "rewards.py:f", "reward: rewards.py does not exist; did you mean reward.py?"),
        ("reward", "./rm", "reward: ./rm does not exist"),
        ("chat_template", "mine.jinja", "chat_template: mine.jinja does not exist"),
        ("output_dir", "rows.jsonl", "output_dir: rows.jsonl is a file; name a folder"),
        ("output_dir", "out", "output_dir: out is not empty; name another folder, or use --overwrite"),
        ("output_dir", None, "output_dir: required on the command line"),
    ],
)
def test_a_path_that_is_not_there(recipe, name, value, said):
    Path("out/sft").mkdir(parents=True)
    Path("rows.jsonl").touch()
    Path("reward.py").touch()
    inputs = {"policy": "org/model", "reward": "reward.py:f", "prompts": "rows.jsonl"}
    config = PPOConfig(**{"output_dir": "new"} | ({name: value} if name in PPOConfig.model_fields else {}))
    inputs |= {name: value} if name in INPUTS["ppo"] else {}
    with pytest.raises(UserError) as caught:
        check_paths("ppo", inputs, config)
    assert said in str(caught.value) and len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("policy", ["gpt2", "org/model-1.5", "out/sft", "package://some_package/x.gguf"])
@pytest.mark.parametrize("reward", ["org/judge", "reward.py:f", "some.module:f", [["a", 1, "b:c"]]])
def test_what_may_be_there_passes(recipe, policy, reward):
    Path("out/sft").mkdir(parents=True)
    Path("empty").mkdir()
    Path("reward.py").touch()
    inputs = {"policy": policy, "reward": reward, "prompts": "org/prompts"}
    for changes in (
        {"output_dir": "empty"},
        {"output_dir": "out", "overwrite": True},
        {"output_dir": "out", "resume": True},
    ):
        check_paths("ppo", inputs, PPOConfig(chat_template="chatml", **changes))
