"""An option that another one switches off is refused in a sentence, and every option has its place in the table."""

from __future__ import annotations

import pytest

from fastrlhf.config.base import StageConfig
from fastrlhf.config.effects import ASKS_FOR_NOTHING, IDLE
from fastrlhf.config.errors import UserError, spelled
from fastrlhf.config.recipe import load_recipe, resolved_yaml
from fastrlhf.config.stages import CONFIGS, PPOConfig, RewardConfig, SFTConfig

# Fields that act whatever the others are. A new field stands here or in the table, with the choices that switch it off.
SHARED = """learning_rate lr_schedule warmup_steps max_grad_norm parallel optimizer micro_batch_tokens adam_betas
adam_eps weight_decay lora quantize dtype attention chat_template prompt_format columns
ignore_columns max_samples allow_drop skip_bad_rows seed eval_every output_dir"""
SUPERVISED = "total_steps max_tokens overlong mini_batch_size eval_fraction"
ALWAYS = {
    SFTConfig: f"{SHARED} {SUPERVISED} gradient_checkpointing packing format compile",
    RewardConfig: f"""{SHARED} {SUPERVISED} head_only score_range center_rewards ensemble label_smoothing weakest
    strength_margin""",
    PPOConfig: f"""{SHARED} gradient_checkpointing compile total_steps rollout_batch_size samples_per_prompt ppo_epochs
    mini_batch_size max_prompt_tokens max_new_tokens temperature top_p top_k advantage kl_coef kl_budget target_kl
    clip_range clip_range_high policy_loss ratio_level loss_aggregation entropy_coef ptx_coef reward_scaling reward_clip
    reward_timeout reward_retries advantage_clip missing_eos_penalty length_penalty overlong_penalty old_log_probs
    ema_decay ref_refresh_every packing probe offload runaway_kl runaway_entropy missing_eos_score
    reward_ensemble rollout_dtype""",
}
GIVEN = {  # a value of each option of the table that asks for something
    "critic": "shared_trunk",
    "critic_learning_rate": 1e-3,
    "critic_max_grad_norm": 0.5,
    "critic_warmup_steps": 1,
    "critic_pretrain_epochs": 2,
    "bootstrap_truncated": True,
    "clip_range_value": 0.5,
    "vf_coef": 0.1,
    "gae_lambda": 0.9,
    "critic_gae_lambda": 0.9,
    "length_adaptive_lambda": 0.05,
    "drop_equal_groups": True,
    "kl_gradient": "published",
    "dual_clip": 3.0,
    "ptx_reduction": "sequence_sum",
    "importance_mask": (0.5, 5.0),
    "gamma": 0.9,
    "whiten_advantages": "group",
    "kl_in": "loss",
    "kl_estimator": "k3",
    "kl_controller": "adaptive",
    "kl_controller_target": 3.0,
    "kl_horizon": 100,
    "importance_cap": 1.5,
    "eval_temperature": 0.5,
    "best_of_n": 4,
    "save_every": 5,
    "overwrite": True,
    "resume": True,
    "accept_changed": ["data"],
    "epochs": 3,
    "reward_sd_coef": 2.0,
    "lm_coef": 1.0,
    "weakest_share": 0.1,
    "gradient_checkpointing": True,
    "compile": True,
    "readout": "mean",
    "readout_layer": 3,
}
ACTING = {
    "kl_controller": "adaptive",
    "critic_warmup_steps": 1,
    "output_dir": "run",
    "resume": True,
    "reward_ensemble": "mean_minus_sd",
    "weakest": "flip",
}  # where no default lets it act
NEEDED = {
    "accept_changed": {"output_dir": "run"},
    "advantage": {"samples_per_prompt": 2},
    "whiten_advantages": {"samples_per_prompt": 2},
    "drop_equal_groups": {"samples_per_prompt": 2, "advantage": "grpo"},
    "kl_gradient": {"kl_in": "loss"},
    "ptx_reduction": {"ptx_coef": 1.0},
    "readout": {"head_only": True},
    "readout_layer": {"head_only": True},
}
CASES = [
    (cls, row.choice, value, name)
    for row in IDLE
    for value in row.values or (7,)
    for name in row.options.split()
    for cls in CONFIGS.values()
    if {row.choice, name} <= set(cls.model_fields)
]


def case_name(value: object) -> str:
    return value.__name__ if isinstance(value, type) else str(value)


def given(cls: type[StageConfig], choice: str, value: object, name: str) -> dict[str, object]:
    """The option and the choice that switches it off, the option's other choices as they let it act."""
    choices = {row.choice for row in IDLE if name in row.options.split()} - {choice, "advantage"}
    acting = {c: ACTING[c] for c in choices & ACTING.keys() if choice != "advantage"}
    needed = {} if (choice, name) == ("kl_coef", "kl_gradient") else NEEDED.get(name, {})  # kl_in is idle then too
    return {**NEEDED.get(choice, {}), **needed, **acting, choice: value, name: GIVEN[name]}


@pytest.mark.parametrize(("cls", "choice", "value", "name"), CASES, ids=case_name)
def test_an_option_that_a_choice_switches_off_is_refused_and_named(cls, choice, value, name):
    fields = given(cls, choice, value, name)
    with pytest.raises(UserError) as caught:
        cls(**fields)
    (line,) = [line for line in str(caught.value).splitlines() if line.startswith(f"{name} = ")]
    assert line.startswith(f"{name} = {spelled(GIVEN[name])}: {choice} = {spelled(value, choice)} ")
    assert ", so this has no effect; leave it at " in line and len(line) < 160
    del fields[name]
    cls(**fields)
    cls(**fields, **{name: cls.model_fields[name].default})
    if name in ASKS_FOR_NOTHING:
        cls(**fields, **{name: ASKS_FOR_NOTHING[name]})


@pytest.mark.parametrize("name", GIVEN)
def test_the_option_is_accepted_where_nothing_switches_it_off(name):
    for cls in CONFIGS.values():
        choices = {row.choice for row in IDLE if name in row.options.split()} & set(cls.model_fields)
        if name in cls.model_fields:
            acting = {choice: ACTING[choice] for choice in choices if choice in ACTING}
            assert getattr(cls(**{**NEEDED.get(name, {}), **acting, name: GIVEN[name]}), name) == GIVEN[name]


CRITIC = """critic critic_learning_rate critic_max_grad_norm critic_warmup_steps critic_pretrain_epochs
bootstrap_truncated clip_range_value vf_coef gae_lambda critic_gae_lambda length_adaptive_lambda"""
SWITCHED_OFF = [
    (PPOConfig, {"advantage": "grpo", "samples_per_prompt": 2}, f"{CRITIC} gamma whiten_advantages"),
    (PPOConfig, {"advantage": "dr_grpo", "samples_per_prompt": 2}, f"{CRITIC} gamma whiten_advantages"),
    (PPOConfig, {"advantage": "rloo", "samples_per_prompt": 2}, f"{CRITIC} gamma whiten_advantages"),
    (PPOConfig, {"advantage": "reinforce++", "samples_per_prompt": 2}, f"{CRITIC} drop_equal_groups"),
    (PPOConfig, {"advantage": "reinforce++-baseline", "samples_per_prompt": 2}, CRITIC),
    (PPOConfig, {"gamma": 0}, "gae_lambda critic_gae_lambda length_adaptive_lambda bootstrap_truncated"),
    (PPOConfig, {"policy_loss": "cispo"}, "dual_clip"),
    (PPOConfig, {"ptx_coef": 0}, "ptx_reduction"),
    (PPOConfig, {"advantage": "gae"}, "drop_equal_groups"),
    (PPOConfig, {"kl_in": "reward"}, "kl_gradient"),
    (PPOConfig, {"critic_warmup_steps": 0}, "critic_pretrain_epochs"),
    (PPOConfig, {"kl_coef": 0}, "kl_in kl_estimator kl_controller kl_gradient"),
    (PPOConfig, {"kl_in": "loss"}, "kl_controller"),
    (PPOConfig, {"kl_controller": "fixed"}, "kl_controller_target kl_horizon"),
    (PPOConfig, {"old_log_probs": "rollout"}, "importance_cap importance_mask"),
    (PPOConfig, {"eval_every": 0}, "eval_temperature best_of_n"),
    (SFTConfig, {"total_steps": 9}, "epochs"),
    (RewardConfig, {"total_steps": 9}, "epochs"),
    (RewardConfig, {"head_only": False}, "readout readout_layer"),
    (RewardConfig, {"head_only": True}, "gradient_checkpointing compile lm_coef"),
    (RewardConfig, {"weakest": "keep"}, "weakest_share"),
    (PPOConfig, {"reward_ensemble": "min"}, "reward_sd_coef"),
    *((cls, {"output_dir": None}, "save_every overwrite resume") for cls in CONFIGS.values()),
]


@pytest.mark.parametrize(("cls", "choice", "options"), SWITCHED_OFF, ids=case_name)
def test_a_choice_switches_off_these_options_and_no_other(cls, choice, options):
    """Written out once more, beside the table. Everything else is as lets most options act."""
    acting = {name: value for name, value in {**ACTING, "samples_per_prompt": 2}.items() if name in cls.model_fields}
    refused = set()
    for name in GIVEN.keys() & cls.model_fields.keys() - choice.keys():
        try:
            cls(**{**acting, **NEEDED.get(name, {}), **choice, name: GIVEN[name]})
        except UserError as error:
            refused |= {name} & {line.split(" = ")[0] for line in str(error).splitlines()}
    assert refused == set(options.split())


@pytest.mark.parametrize("cls", ALWAYS, ids=lambda cls: cls.__name__)
def test_every_field_always_acts_or_stands_in_the_table(cls):
    in_table = {name for row in IDLE if row.choice in cls.model_fields for name in row.options.split()}
    always = set(ALWAYS[cls].split())
    assert (in_table & set(cls.model_fields)) | always == set(cls.model_fields)
    assert not in_table & always
    assert {row.choice for row in IDLE} | in_table <= {name for c in CONFIGS.values() for name in c.model_fields}


@pytest.mark.parametrize(
    "fields",
    [
        {"advantage": "rloo", "samples_per_prompt": 2, "kl_coef": 0, "eval_every": 0},
        {"old_log_probs": "rollout", "importance_cap": None},
        {"advantage": "dr_grpo", "samples_per_prompt": 4, "whiten_advantages": False, "vf_coef": 0},
    ],
)
def test_a_resolved_recipe_names_every_field_and_loads_again(tmp_path, fields):
    config = PPOConfig(**fields)
    path = tmp_path / "config.yaml"
    path.write_text(resolved_yaml("ppo", {"policy": "p", "reward": "r", "prompts": "d"}, config), encoding="utf-8")
    assert load_recipe("ppo", str(path), [])[1] == config == config.replace()


def test_a_replaced_choice_switches_off_what_was_given_and_no_default():
    assert PPOConfig().replace(advantage="grpo", samples_per_prompt=2).vf_coef == 1.0
    with pytest.raises(UserError, match="gae_lambda = 0.9: advantage = grpo has no critic"):
        PPOConfig(gae_lambda=0.9).replace(advantage="grpo", samples_per_prompt=2)


def test_the_sentences_come_one_for_each_option():
    """gae_lambda and bootstrap_truncated stand in two rows that hold here."""
    with pytest.raises(UserError) as caught:
        PPOConfig(advantage="reinforce++", gamma=0, gae_lambda=0.5, bootstrap_truncated=True, vf_coef=2)
    names = [line.split()[0] for line in str(caught.value).splitlines()]
    assert sorted(names) == ["bootstrap_truncated", "gae_lambda", "vf_coef"]
