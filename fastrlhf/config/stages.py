"""The configurations of the three stages: fields, defaults, checks (recipe.py reads the YAML)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from fastrlhf.config.base import CONFIGS, Schedule, StageConfig
from fastrlhf.config.effects import BY_CRITIC, WITH_BASELINE

MOST_ROWS = 1_000_000  # of a step, which holds them all
MOST_PASSES = 10_000  # over them
MOST_HEADS = 1000  # of an ensemble


class SupervisedConfig(StageConfig):
    epochs: int = Field(1, ge=1)
    """passes over the data"""
    total_steps: int | None = Field(None, ge=1)
    """optimizer steps; given, it replaces epochs"""
    max_tokens: int = Field(1024, ge=2)
    """longest prompt plus response, in tokens"""
    overlong: Literal["drop", "truncate"] = "drop"
    """what happens to a row longer than max_tokens; either way it is counted and printed"""


class SFTConfig(SupervisedConfig):
    """Supervised fine-tuning: see docs/api.md."""

    stage = "sft"

    learning_rate: float = Field(2e-05, ge=0)
    """peak learning rate; 0 trains nothing"""
    lr_schedule: Schedule = "cosine"
    """shape of the learning rate after the warmup; cosine and linear fall to 0 at the last step"""
    mini_batch_size: int = Field(32, ge=1, le=MOST_ROWS)
    """sequences of one optimizer step, over all devices"""
    packing: bool | None = False
    """join sequences in rows without padding; they do not attend to each other (auto: where flash attention runs)"""
    format: Literal["auto", "text"] = "auto"
    """auto: conversations, loss on the assistant's tokens; text: plain text, loss on every token"""
    eval_fraction: float = Field(0.0, ge=0, lt=1)
    """share of data held out for evaluation when eval_data is not given"""


class RewardConfig(SupervisedConfig):
    """Reward model: see docs/api.md."""

    stage = "reward"

    learning_rate: float = Field(5e-06, ge=0)
    """peak learning rate; 0 trains nothing"""
    lr_schedule: Schedule = "cosine"
    """shape of the learning rate after the warmup; cosine and linear fall to 0 at the last step"""
    mini_batch_size: int = Field(32, ge=1, le=MOST_ROWS)
    """feedback records of one optimizer step, over all devices"""
    head_only: bool = False
    """train the scalar head alone on frozen features, read once: a linear reward model w'y + b"""
    readout: Literal["last", "mean", "auto"] | None = None
    """with head_only: y of the last token, or the mean; auto: held-out rows choose (none: the model's, else last)"""
    readout_layer: int | None = None
    """with head_only: the layer of y, 0 the embeddings (none: the model's, else -1, the last)"""
    ensemble: int | None = Field(None, le=MOST_HEADS)
    """heads on the one trunk, each with a start and bootstrap weights of the records of its own; none: one head"""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """share of preferences that are taken to be wrong; with weakest = smooth of the weakest alone"""
    lm_coef: float = Field(0.0, ge=0)
    """weight of the language-model loss on the best reply of pairs, edits and rankings (Secrets of RLHF: 1)"""
    weakest: Literal["keep", "flip", "smooth", "drop"] = "keep"
    """what becomes of the records of the lowest preference strength (column `strength`)"""
    weakest_share: float = Field(0.2, gt=0, lt=1)
    """share of the records with a strength that count as the weakest"""
    strength_margin: bool = False
    """preference strength above 0 is the margin of a pair that has none of its own"""
    center_rewards: bool = False
    """shift the scores of the saved model so that the replies of sft_data score 0 on average"""
    score_range: tuple[float, float] = (1.0, 5.0)
    """lowest and highest score that annotators could give"""
    eval_fraction: float = Field(0.1, ge=0, lt=1)
    """share of data held out for evaluation when eval_data is not given"""

    def _contradictions(self) -> list[str]:
        low, high = self.score_range
        wrong = super()._contradictions()
        if low >= high:
            wrong.append(f"score_range = {low:g},{high:g}: the lowest score must be below the highest")
        if self.head_only and self.lora is not None:
            wrong.append("head_only = true: trains no adapter; leave lora out")
        if self.readout == "auto" and self.readout_layer is not None:
            wrong.append(f"readout_layer = {self.readout_layer}: readout = auto chooses the layer too; leave it out")
        if self.ensemble is not None and self.ensemble < 2:
            wrong.append(f"ensemble = {self.ensemble}: one head has no other to differ from; use 2 or more, or none")
        if self.weakest == "smooth" and not self.label_smoothing:
            wrong.append("weakest = smooth: needs to know how much; set label_smoothing above 0")
        return wrong


class PPOConfig(StageConfig):
    """PPO from human feedback: see docs/api.md."""

    stage = "ppo"

    total_steps: int = Field(1000, ge=1)
    """PPO steps: one rollout and its updates each"""
    rollout_batch_size: int = Field(128, ge=1, le=MOST_ROWS)
    """responses of one step, over all devices"""
    samples_per_prompt: int = Field(1, ge=1)
    """responses to each prompt; divides rollout_batch_size"""
    ppo_epochs: int = Field(2, ge=1, le=MOST_PASSES)
    """passes over a rollout"""
    mini_batch_size: int = Field(32, ge=1, le=MOST_ROWS)
    """responses of one optimizer step, over all devices"""
    max_prompt_tokens: int = Field(512, ge=1)
    """longer prompts are dropped and counted"""
    max_new_tokens: int = Field(256, ge=1)
    """longest response"""
    temperature: float = Field(1.0, gt=0)
    """sampling temperature; log-probs are taken at it too"""
    top_p: float = Field(1.0, gt=0, le=1)
    """nucleus sampling; below 1 PPO's ratio is an approximation"""
    top_k: int = Field(0, ge=0)
    """sample from the k likeliest tokens; 0: all; above 0 PPO's ratio is an approximation"""
    learning_rate: float = Field(1e-06, ge=0)
    """peak learning rate of the policy; 0 trains nothing"""
    critic: Literal["separate", "shared_trunk"] = "separate"
    """the critic: a model of its own (with lora: an adapter of its own), or a small network on the policy's states"""
    critic_learning_rate: float | None = Field(None, ge=0, validate_default=True)
    """peak learning rate of the value model (auto: 5e-06, shared_trunk 0.005)"""
    advantage: Literal["gae", "grpo", "dr_grpo", "rloo", "reinforce++", "reinforce++-baseline"] = "gae"
    """estimator; all but gae do without a value model; all but gae and reinforce++ need samples_per_prompt >= 2"""
    gamma: float = Field(1.0, ge=0, le=1)
    """discount per token"""
    gae_lambda: float | None = Field(None, ge=0, le=1, validate_default=True)
    """lambda of generalised advantage estimation (auto: 0.95, shared_trunk 1)"""
    critic_gae_lambda: float | None = Field(None, ge=0, le=1)
    """lambda of the returns that the critic learns (VAPO: 1); none: gae_lambda"""
    length_adaptive_lambda: float | None = Field(None, gt=0)
    """VAPO: the policy's lambda is 1 - 1 / (this * tokens of the response), 0 at least; none: gae_lambda"""
    drop_equal_groups: bool = False
    """leave out the responses to a prompt that all have the same score; they count in no mean"""
    kl_coef: float = Field(0.05, ge=0)
    """weight of the KL to the reference policy"""
    kl_estimator: Literal["k1", "k2", "k3", "abs"] = "k1"
    """per-token KL estimate, d = log_probs - ref_log_probs: k1 d, k2 d*d/2, k3 exp(-d)-1+d, abs |d|"""
    kl_in: Literal["reward", "loss"] = "reward"
    """where the KL acts: in the token rewards or in the policy loss"""
    kl_gradient: Literal["exact", "published"] = "exact"
    """of the KL in the loss: that of the KL it estimates, or the estimator differentiated as it stands (GRPO's k3)"""
    kl_controller: Literal["fixed", "adaptive"] = "fixed"
    """adaptive: kl_coef follows kl_controller_target"""
    kl_controller_target: float = Field(6.0, gt=0)
    """kl/ref that the adaptive controller aims at, in nats a response (target_kl stops updates)"""
    kl_horizon: int = Field(10000, ge=1)
    """responses over which the adaptive controller corrects kl_coef"""
    kl_budget: float | None = Field(None, gt=0)
    """end the run once kl/ref is above this many nats a response"""
    target_kl: float | None = Field(None, gt=0)
    """make no update of a step once kl/approx exceeds 1.5 times this (kl_controller_target steers kl_coef)"""
    runaway_kl: float | None = Field(3.0, gt=0)
    """stop the run with an alarm once kl/ref is above this many nats a token for 3 steps; none: never"""
    runaway_entropy: float | None = Field(3.0, gt=1)
    """the same where policy/entropy is above this many times that of the first step and 1 nat above it; none: never"""
    clip_range: float = Field(0.2, ge=0)
    """the policy ratio is clipped to 1 - clip_range .. 1 + clip_range"""
    clip_range_high: float | None = Field(None, ge=0)
    """the upper side of the ratio clip; none: clip_range"""
    policy_loss: Literal["clip", "cispo"] = "clip"
    """clip: no gradient beyond the clip (PPO); cispo: the ratio, clipped and detached, weighs every token's gradient"""
    dual_clip: float | None = Field(None, gt=1)
    """where the advantage is negative the loss stops at -dual_clip * advantage"""
    ratio_level: Literal["token", "sequence"] = "token"
    """what the clip compares: each token's ratio, or the geometric mean over a response (GSPO)"""
    loss_aggregation: Literal["token_mean", "sequence_mean", "constant"] | None = Field(None, validate_default=True)
    """mean of tokens, mean of responses' means, or sum / max_new_tokens (auto: dr_grpo constant, else token_mean)"""
    clip_range_value: float | None = Field(0.2, ge=0)
    """value clip around the old values; none: no clip"""
    vf_coef: float = Field(1.0, ge=0)
    """weight of the value loss"""
    entropy_coef: float = Field(0.0, ge=0)
    """weight of the entropy bonus"""
    ptx_coef: float = Field(0.0, ge=0)
    """weight of the language-model loss on ptx_data, mini_batch_size rows in each optimizer step"""
    ptx_reduction: Literal["token_mean", "sequence_sum"] = "token_mean"
    """mean of target tokens, or mean of rows' sums in units of the policy loss of a whole response (InstructGPT)"""
    whiten_advantages: bool | Literal["group"] = True
    """shift and scale advantages to mean 0 and variance 1 over the step, or over a prompt's group (gae, reinforce++)"""
    reward_scaling: Literal["none", "running_std", "running_norm"] = "none"
    """divide scores by their running deviation (running_norm: subtract the running mean first)"""
    reward_ensemble: Literal["mean", "min", "mean_minus_sd"] = "mean"
    """score of a reward model with several heads: their mean, the lowest, or mean - reward_sd_coef * deviation"""
    reward_sd_coef: float = Field(1.0, ge=0)
    """how many standard deviations over the heads mean_minus_sd subtracts"""
    reward_clip: float | None = Field(None, gt=0)
    """scores are clipped to +-this, after the scaling"""
    advantage_clip: float | None = Field(None, gt=0)
    """advantages are clipped to +-this, after the whitening"""
    reward_timeout: float | None = Field(None, gt=0)
    """seconds that one call of a reward function or judge may take; none: any"""
    reward_retries: int = Field(3, ge=0)
    """further tries of a call that failed for the network, after 1, 2, 4 ... seconds"""
    missing_eos_penalty: float | None = Field(None, ge=0)
    """subtracted from the score of a response without a stop token"""
    missing_eos_score: float | None = None
    """the score of a response without a stop token, in place of its own (after scaling and clip)"""
    length_penalty: float = 0.0
    """subtracted from the score for each token of the response; negative: a bonus"""
    overlong_penalty: int | None = Field(None, ge=1)
    """DAPO: over the last so many tokens before max_new_tokens the score falls by up to 1"""
    bootstrap_truncated: bool = False
    """a response cut by max_new_tokens goes on with the critic's value of its end, instead of 0"""
    critic_warmup_steps: int = Field(0, ge=0)
    """first steps that train the value model alone"""
    critic_pretrain_epochs: int = Field(0, ge=0, le=MOST_PASSES)
    """passes of the value model over the stored rollouts of the warm-up, at its end"""
    critic_max_grad_norm: float | None = Field(None, gt=0)
    """max_grad_norm of the value model; none: the same as the policy's"""
    old_log_probs: Literal["recompute", "rollout"] = "recompute"
    """old log-probs from a training forward pass (ratio exactly 1 at first) or from the rollout (faster)"""
    importance_cap: float | None = Field(2.0, ge=1)
    """with recomputed old log-probs, tokens weigh min(pi_old / pi_rollout, this); none: 1"""
    importance_mask: tuple[float, float] | None = None
    """tokens whose pi_old / pi_rollout is outside low,high weigh 0 (IcePop: 0.5,5); none: no token is left out"""
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """evaluate and save an average of the policy's weights, of this decay an update; none: the last weights"""
    ref_refresh_every: int = Field(0, ge=0)
    """steps after which the policy of then becomes the reference; 0: never"""
    packing: bool | None = None
    """join sequences in rows without padding; they do not attend to each other (auto: where flash attention runs)"""
    probe: bool | None = None
    """before step 1, an update on the longest sequences allowed: memory runs out at once or never (auto: on a GPU)"""
    rollout_dtype: Literal["bf16"] | None = None
    """decode with a copy of the fp32 policy in bf16, made anew for each rollout; none: with the policy itself"""
    offload: bool = False
    """hold the reference and the reward model in host memory between their phases"""
    eval_temperature: float | None = Field(None, ge=0)
    """sampling temperature of the evaluation; 0: greedy; none: temperature"""
    best_of_n: int = Field(0, ge=0, le=MOST_PASSES)
    """before step 1, the reward of the best of 1, 2, 4 ... up to so many samples of the reference; 0: not measured"""

    @field_validator(*BY_CRITIC)
    @classmethod
    def _by_critic(cls, value: float | None, info: ValidationInfo) -> float:
        """What the form of the critic needs. Resolved here, config.yaml says what runs."""
        return BY_CRITIC[info.field_name][info.data.get("critic", "separate")] if value is None else value

    @field_validator("loss_aggregation")
    @classmethod
    def _aggregation(cls, value: str | None, info: ValidationInfo) -> str:
        """Dr.GRPO comes with a sum of its own. Resolved here, config.yaml says what runs."""
        return value or ("constant" if info.data.get("advantage") == "dr_grpo" else "token_mean")

    def _contradictions(self) -> list[str]:
        wrong = super()._contradictions()
        per_prompt, batch = self.samples_per_prompt, self.rollout_batch_size
        if batch % per_prompt:
            wrong.append(f"samples_per_prompt = {per_prompt}: must divide rollout_batch_size = {batch}")
        if self.mini_batch_size > batch:
            wrong.append(f"mini_batch_size = {self.mini_batch_size}: above rollout_batch_size = {batch}")
        if self.advantage in WITH_BASELINE and per_prompt < 2:
            wrong.append(f"advantage = {self.advantage}: compares responses; set samples_per_prompt >= 2")
        if self.ema_decay is not None and self.parallel != "ddp":
            wrong.append(f"ema_decay = {self.ema_decay:g}: averages whole weights; use parallel = ddp, or no average")
        if self.rollout_dtype is not None:
            wrong += [f"rollout_dtype = {self.rollout_dtype}: {why}" for why in self._needs_the_policy_itself()]
        if self.overlong_penalty is not None and self.overlong_penalty > self.max_new_tokens:
            wrong.append(f"overlong_penalty = {self.overlong_penalty}: above max_new_tokens = {self.max_new_tokens}")
        if self.whiten_advantages == "group" and per_prompt < 2:
            wrong.append("whiten_advantages = group: a group needs samples_per_prompt >= 2")
        if self.missing_eos_score is not None and self.missing_eos_penalty is not None:
            score = f"missing_eos_score = {self.missing_eos_score:g}"
            wrong.append(f"{score}: replaces what missing_eos_penalty = {self.missing_eos_penalty:g} lowers; use one")
        if self.policy_loss == "cispo" and self.ratio_level == "sequence":
            wrong.append("policy_loss = cispo: weighs each token by its own ratio; use ratio_level = token")
        if self.ptx_reduction == "sequence_sum" and self.loss_aggregation == "sequence_mean":
            wrong.append(
                "ptx_reduction = sequence_sum: with loss_aggregation = sequence_mean no response has a sum to compare "
                "with; use token_mean in one of them"
            )
        both = self.length_adaptive_lambda is not None and self.critic_gae_lambda is not None
        if both and self.gae_lambda not in (BY_CRITIC["gae_lambda"][self.critic], 1.0):
            replaced = "length_adaptive_lambda and critic_gae_lambda replace it for both policy and critic"
            wrong.append(f"gae_lambda = {self.gae_lambda:g}: {replaced}; leave it at auto")
        low, high = self.importance_mask or (0.0, 1.0)
        if self.importance_mask is not None and not 0 <= low < 1 < high:
            wrong.append(f"importance_mask = {low:g},{high:g}: must hold the ratio 1, as in 0.5,5")
        if self.critic_warmup_steps >= self.total_steps:
            warmup = f"critic_warmup_steps = {self.critic_warmup_steps}"
            wrong.append(f"{warmup}: leaves the policy none of total_steps = {self.total_steps}")
        return wrong

    def _needs_the_policy_itself(self) -> Iterator[str]:
        """What a copy of the policy cannot decode for."""
        if self.old_log_probs == "rollout":
            yield "old_log_probs = rollout takes its log-probs for the policy's; use recompute"
        if self.advantage == "gae" and self.critic == "shared_trunk":
            yield "critic = shared_trunk takes its values from decoding; use critic = separate"
        if self.quantize is not None:
            yield f"quantize = {self.quantize} holds the weights in blocks, which have no other dtype; leave one out"
        if self.parallel == "fsdp":
            yield "parallel = fsdp gathers the policy itself for a rollout; use parallel = zero"
        if self.dtype == self.rollout_dtype:
            yield f"dtype = {self.dtype} is that of the policy already; use dtype = fp32, or leave rollout_dtype out"


CONFIGS |= {c.stage: c for c in (SFTConfig, RewardConfig, PPOConfig)}


def updates_per_step(config: PPOConfig) -> int:
    """Optimizer steps of each role in a PPO step: ppo_epochs * ceil(rollout_batch_size / mini_batch_size)."""
    return config.ppo_epochs * -(-config.rollout_batch_size // config.mini_batch_size)


def policy_updates(config: PPOConfig) -> int:
    """Optimizer steps of the policy in a run; it stays as it is while the critic warms up."""
    return (config.total_steps - config.critic_warmup_steps) * updates_per_step(config)


def pretraining_updates(config: PPOConfig) -> int:
    """Optimizer steps of the critic over the stored rollouts of its warm-up, in all passes."""
    rows = config.critic_warmup_steps * config.rollout_batch_size
    return config.critic_pretrain_epochs * -(-rows // config.mini_batch_size)


def critic_updates(config: PPOConfig) -> int:
    """Optimizer steps of the critic in a run, those over the stored rollouts included."""
    return config.total_steps * updates_per_step(config) + pretraining_updates(config)
