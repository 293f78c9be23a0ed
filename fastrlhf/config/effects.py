"""The options that other options switch off: one table for all stages, so that nothing is accepted and then ignored.

Such an option is refused where its value is neither its default (a resolved recipe names every field) nor one that asks
for nothing. The table is of choices. A size or a rate that keeps an option from showing, such as learning_rate = 0 or a
limit that is never met, switches nothing off.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from pydantic import BaseModel

from fastrlhf.config.errors import spelled

GROUP_ESTIMATORS = ("grpo", "dr_grpo", "rloo")
WITH_BASELINE = (*GROUP_ESTIMATORS, "reinforce++-baseline")  # the mean of the responses to a prompt
REINFORCE = ("reinforce++", "reinforce++-baseline")
CRITIC = """critic critic_learning_rate critic_max_grad_norm critic_warmup_steps critic_pretrain_epochs
bootstrap_truncated clip_range_value vf_coef gae_lambda critic_gae_lambda length_adaptive_lambda"""
BY_CRITIC = {  # what auto means, by the form of the critic
    "critic_learning_rate": {"separate": 5e-6, "shared_trunk": 5e-3},
    "gae_lambda": {"separate": 0.95, "shared_trunk": 1.0},
}


class Idle(NamedTuple):
    """While `choice` has one of `values` (None: any value but none), nothing reads the `options`.

    because: completes "CHOICE = VALUE ..."; instead: what to do about the choice.
    """

    choice: str
    values: tuple[Any, ...] | None
    because: str
    instead: str
    options: str


IDLE = [
    Idle("advantage", (*GROUP_ESTIMATORS, *REINFORCE), "has no critic", "use advantage = gae", CRITIC),
    Idle("advantage", GROUP_ESTIMATORS, "compares whole responses", "use advantage = gae", "gamma whiten_advantages"),
    Idle("advantage", ("gae", "reinforce++"), "compares no group", "use advantage = grpo", "drop_equal_groups"),
    Idle(
        "gamma",
        (0,),
        "looks at no later reward",
        "set gamma above 0",
        "gae_lambda critic_gae_lambda length_adaptive_lambda bootstrap_truncated",
    ),
    Idle("critic_warmup_steps", (0,), "stores no rollouts", "set that above 0", "critic_pretrain_epochs"),
    Idle(
        "kl_coef", (0,), "only measures the KL", "set kl_coef above 0", "kl_in kl_estimator kl_controller kl_gradient"
    ),
    Idle("kl_in", ("loss",), "holds kl_coef fixed", "use kl_in = reward", "kl_controller"),
    Idle("kl_in", ("reward",), "takes no gradient of it", "use kl_in = loss", "kl_gradient"),
    Idle("policy_loss", ("cispo",), "clips no loss", "use policy_loss = clip", "dual_clip"),
    Idle("ptx_coef", (0,), "learns no ptx_data", "set ptx_coef above 0", "ptx_reduction"),
    Idle("reward_ensemble", ("mean", "min"), "subtracts nothing", "use mean_minus_sd", "reward_sd_coef"),
    Idle("kl_controller", ("fixed",), "steers nothing", "use adaptive", "kl_controller_target kl_horizon"),
    Idle(
        "old_log_probs",
        ("rollout",),
        "compares with the sampler itself",
        "use recompute",
        "importance_cap importance_mask",
    ),
    Idle("eval_every", (0,), "evaluates nothing", "set eval_every above 0", "eval_temperature best_of_n"),
    Idle("output_dir", (None,), "writes nothing", "set output_dir", "save_every overwrite resume"),
    Idle("resume", (False,), "goes on with no run", "use resume = true", "accept_changed"),
    Idle("total_steps", None, "replaces epochs", "leave total_steps out", "epochs"),
    Idle("head_only", (False,), "trains what the last token's state is made of", "use true", "readout readout_layer"),
    Idle(
        "head_only",
        (True,),
        "trains nothing below the head",
        "use false there",
        "gradient_checkpointing compile lm_coef",
    ),
    Idle("weakest", ("keep",), "leaves all records as they are", "use flip, smooth or drop", "weakest_share"),
]
ASKS_FOR_NOTHING = {  # beside the default
    "critic_learning_rate": 0,
    "vf_coef": 0,
    "clip_range_value": None,
    "gae_lambda": 1,
    "whiten_advantages": False,
    "importance_cap": None,
    "compile": False,
    "save_every": 0,
}


def idle_options(config: BaseModel) -> Iterator[str]:
    """A sentence for each option of `config` that was given and does nothing, with the first row that says why."""
    fields, named = type(config).model_fields, set()
    for row in IDLE:
        chosen = getattr(config, row.choice, None)
        if chosen is None if row.values is None else chosen not in row.values:
            continue
        because = f"{row.choice} = {spelled(chosen, row.choice)} {row.because}, so this has no effect"
        for name in row.options.split():
            if name not in fields or name in named:
                continue
            value, default = getattr(config, name), fields[name].default
            resolved = BY_CRITIC[name][config.critic] if name in BY_CRITIC else default
            if value not in (default, resolved, ASKS_FOR_NOTHING.get(name, default)):
                named.add(name)
                remedy = f"leave it at {spelled(default, name)} or {row.instead}"
                yield f"{name} = {spelled(value, name)}: {because}; {remedy}"
