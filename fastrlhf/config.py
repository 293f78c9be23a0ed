"""Typed configuration of the three stages: fields, defaults, checks (recipe.py reads the YAML).

Every field is flat, means the same in every stage that has it, and its docstring is its help text. A mistake
is a UserError with one line a problem: the field, its value, what is expected. No torch is imported here.
"""

from __future__ import annotations

import difflib
import types
from typing import Any, ClassVar, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fastrlhf.inputs import INPUTS
from fastrlhf.lora_options import lora_options


class UserError(ValueError):
    """A mistake that the user can mend: the message says where it is, what was found and what to do."""


class ConfigError(UserError):
    """One or more wrong fields; problems holds (field name, sentence) pairs."""

    def __init__(self, problems: list[tuple[str, str]], where: dict[str, str] | None = None) -> None:
        self.problems = problems
        where = where or {}
        lines = [f"{where[name]}: {text}" if name in where else text for name, text in problems]
        super().__init__("\n".join(lines))


Schedule = Literal["constant", "cosine", "linear", "inverse_sqrt"]


class StageConfig(BaseModel):
    """What SFT, reward model and PPO have in common."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
    stage: ClassVar[str]

    learning_rate: float = Field(ge=0)
    """peak learning rate; 0 trains nothing"""
    lr_schedule: Schedule = "constant"
    """shape of the learning rate after the warmup; cosine and linear fall to 0 at the last step"""
    warmup_steps: int = Field(0, ge=0)
    """optimizer steps over which the learning rate rises from 0 to its peak"""
    max_grad_norm: float = Field(1.0, gt=0)
    """gradients are scaled down to this global 2-norm"""
    optimizer: Literal["adamw", "adamw8bit", "paged_adamw8bit"] = "adamw"
    """AdamW; the 8-bit ones need bitsandbytes: pip install 'fastrlhf[8bit]'"""
    micro_batch_tokens: int | None = Field(None, ge=1)
    """tokens in one forward pass of a device (auto: chosen by device); memory only, never the result"""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """decay of AdamW's running means of the gradient and of its square"""
    adam_eps: float = Field(1e-8, gt=0)
    """added to the root of AdamW's second moment"""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decoupled decay of the weights"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, slower"""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """dtype of the weights (auto: bf16 on a CUDA device that supports it, else fp32)"""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flash_attention_4"] = "auto"
    """attention implementation (auto: the flash attention for the GPU that is installed, else sdpa)"""
    chat_template: str | None = None
    """default, chatml, moss, moss-rlhf-en, moss-rlhf-zh or a .jinja file; none: the tokenizer's own, else default"""
    skip_bad_rows: bool = False
    """drop and count malformed data rows instead of stopping at the first one"""
    seed: int = Field(0, ge=0, lt=2**32)
    """seed of every random choice"""
    save_every: int = Field(100, ge=0)
    """steps between checkpoints; 0: only at the end"""
    eval_every: int = Field(100, ge=0)
    """steps between evaluations on held-out data; 0: never"""
    output_dir: str | None = Field(None, min_length=1)
    """run folder; none (only from Python): nothing is written"""
    overwrite: bool = False
    """empty an output_dir that already holds a run"""
    resume: bool = False
    """go on from the newest checkpoint in output_dir"""

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise ConfigError(_problems(type(self), error, fields)) from None

    def replace(self, **changes: Any) -> StageConfig:
        """A copy with some fields changed, checked like a new one."""
        return type(self)(**{**self.model_dump(), **changes})

    @field_validator("*", mode="before")
    @classmethod
    def _plain_value(cls, value: Any, info) -> Any:
        """YAML and the command line spell None as text; a boolean is not a number."""
        kinds, optional = _kinds(cls, info.field_name)
        if isinstance(value, bool) and bool not in kinds and Any not in kinds:
            raise ValueError("a boolean")
        if isinstance(value, str) and optional and value.lower() in ("none", "null", _spelled(None, info.field_name)):
            return None
        if isinstance(value, str) and tuple in kinds:
            return [part.strip() for part in value.strip("[]() ").split(",")]
        return value

    @model_validator(mode="after")
    def _together(self) -> StageConfig:
        problems = self._contradictions()
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _contradictions(self) -> list[str]:
        wrong = []
        if self.resume and self.overwrite:
            wrong.append("resume = true: contradicts overwrite = true, which deletes what resume needs; use one")
        if not all(0 <= beta < 1 for beta in self.adam_betas):
            wrong.append(f"adam_betas = {_spelled(self.adam_betas)}: both must be in [0, 1)")
        return wrong


class _SupervisedConfig(StageConfig):
    epochs: int = Field(1, ge=1)
    """passes over the data"""
    total_steps: int | None = Field(None, ge=1)
    """optimizer steps; given, it replaces epochs"""
    max_tokens: int = Field(1024, ge=2)
    """longest prompt plus response, in tokens"""
    overlong: Literal["drop", "truncate"] = "drop"
    """what happens to a row longer than max_tokens; either way it is counted and printed"""


class SFTConfig(_SupervisedConfig):
    """Supervised fine-tuning: see docs/api.md."""

    stage = "sft"

    learning_rate: float = Field(2e-05, ge=0)
    """peak learning rate; 0 trains nothing"""
    lr_schedule: Schedule = "cosine"
    """shape of the learning rate after the warmup; cosine and linear fall to 0 at the last step"""
    mini_batch_size: int = Field(32, ge=1)
    """sequences of one optimizer step, over all devices"""
    packing: bool = False
    """join short sequences into rows of max_tokens; they do not attend to each other"""
    format: Literal["auto", "text"] = "auto"
    """auto: conversations, loss on the assistant's tokens; text: plain text, loss on every token"""
    eval_fraction: float = Field(0.0, ge=0, lt=1)
    """share of data held out for evaluation when eval_data is not given"""


class RewardConfig(_SupervisedConfig):
    """Reward model: see docs/api.md."""

    stage = "reward"

    learning_rate: float = Field(5e-06, ge=0)
    """peak learning rate; 0 trains nothing"""
    lr_schedule: Schedule = "cosine"
    """shape of the learning rate after the warmup; cosine and linear fall to 0 at the last step"""
    mini_batch_size: int = Field(32, ge=1)
    """feedback records of one optimizer step, over all devices"""
    head_only: bool = False
    """train the scalar head alone on frozen features: a linear reward model"""
    score_range: tuple[float, float] = (1.0, 5.0)
    """lowest and highest score that annotators could give"""
    eval_fraction: float = Field(0.1, ge=0, lt=1)
    """share of data held out for evaluation when eval_data is not given"""

    def _contradictions(self) -> list[str]:
        low, high = self.score_range
        wrong = super()._contradictions()
        if low >= high:
            wrong.append(f"score_range = {low:g},{high:g}: the lowest score must be below the highest")
        return wrong


class PPOConfig(StageConfig):
    """PPO from human feedback: see docs/api.md."""

    stage = "ppo"

    total_steps: int = Field(1000, ge=1)
    """PPO steps: one rollout and its updates each"""
    rollout_batch_size: int = Field(128, ge=1)
    """responses of one step, over all devices"""
    samples_per_prompt: int = Field(1, ge=1)
    """responses to each prompt; divides rollout_batch_size"""
    ppo_epochs: int = Field(2, ge=1)
    """passes over a rollout"""
    mini_batch_size: int = Field(32, ge=1)
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
    critic_learning_rate: float = Field(5e-06, ge=0)
    """peak learning rate of the value model"""
    gamma: float = Field(1.0, ge=0, le=1)
    """discount per token"""
    gae_lambda: float = Field(0.95, ge=0, le=1)
    """lambda of generalised advantage estimation"""
    kl_coef: float = Field(0.05, ge=0)
    """weight of the KL to the reference policy"""
    kl_estimator: Literal["k1", "k2", "k3", "abs"] = "k1"
    """per-token KL estimate, d = log_probs - ref_log_probs: k1 d, k2 d*d/2, k3 exp(-d)-1+d, abs |d|"""
    kl_in: Literal["reward", "loss"] = "reward"
    """where the KL acts: in the token rewards or in the policy loss"""
    kl_controller: Literal["fixed", "adaptive"] = "fixed"
    """adaptive: kl_coef follows kl_target"""
    kl_target: float = Field(6.0, gt=0)
    """kl/ref that the adaptive controller aims at, in nats a response"""
    kl_horizon: int = Field(10000, ge=1)
    """responses over which the adaptive controller corrects kl_coef"""
    kl_budget: float | None = Field(None, gt=0)
    """end the run once kl/ref is above this many nats a response"""
    target_kl: float | None = Field(None, gt=0)
    """stop the updates of a step when kl/approx exceeds 1.5 times this"""
    clip_range: float = Field(0.2, ge=0)
    """the policy ratio is clipped to 1 - clip_range .. 1 + clip_range"""
    clip_range_high: float | None = Field(None, ge=0)
    """the upper side of the ratio clip; none: clip_range"""
    dual_clip: float | None = Field(None, gt=1)
    """where the advantage is negative the loss stops at -dual_clip * advantage"""
    ratio_level: Literal["token", "sequence"] = "token"
    """what the clip compares: each token's ratio, or the geometric mean over a response (GSPO)"""
    loss_aggregation: Literal["token_mean", "sequence_mean", "constant"] = "token_mean"
    """policy loss: mean over tokens, mean over responses of their token means, or sum over max_new_tokens (Dr.GRPO)"""
    clip_range_value: float | None = Field(0.2, ge=0)
    """value clip around the old values; none: no clip"""
    vf_coef: float = Field(1.0, ge=0)
    """weight of the value loss"""
    entropy_coef: float = Field(0.0, ge=0)
    """weight of the entropy bonus"""
    ptx_coef: float = Field(0.0, ge=0)
    """weight of the pretraining loss; only 0 in this version"""
    whiten_advantages: bool = True
    """shift and scale the advantages of a step to mean 0 and variance 1 (gae and reinforce++)"""
    reward_scaling: Literal["none", "running_std", "running_norm"] = "none"
    """divide scores by their running deviation (running_norm: subtract the running mean first)"""
    reward_clip: float | None = Field(None, gt=0)
    """scores are clipped to +-this, after the scaling"""
    advantage_clip: float | None = Field(None, gt=0)
    """advantages are clipped to +-this, after the whitening"""
    missing_eos_penalty: float | None = Field(None, ge=0)
    """subtracted from the score of a response without a stop token"""
    length_penalty: float = 0.0
    """subtracted from the score for each token of the response; negative: a bonus"""
    overlong_penalty: int | None = Field(None, ge=1)
    """DAPO: over the last so many tokens before max_new_tokens the score falls by up to 1"""
    critic: Literal["separate", "shared_trunk"] = "separate"
    """the critic: a model of its own (with lora: an adapter of its own), or a head on the policy's trunk"""
    critic_warmup_steps: int = Field(0, ge=0)
    """first steps that train the value model alone"""
    advantage: Literal["gae", "grpo", "dr_grpo", "rloo", "reinforce++"] = "gae"
    """estimator; all but gae do without a value model; grpo, dr_grpo and rloo need samples_per_prompt >= 2"""
    old_log_probs: Literal["recompute", "rollout"] = "recompute"
    """old log-probs from a training forward pass (ratio exactly 1 at first) or from the rollout (faster)"""
    importance_cap: float | None = Field(2.0, ge=1)
    """with recomputed old log-probs, tokens weigh min(pi_old / pi_rollout, this); none: 1"""
    lora: Any = None
    """train low-rank adapters on the frozen model: a rank, or {r, alpha, target_modules}; alpha is 2 r by default"""
    quantize: Any = None
    """quantised frozen weights; only none in this version"""
    ema_decay: float | None = None
    """average of the policy weights; only none in this version"""

    @field_validator("lora")
    @classmethod
    def _lora(cls, value: Any) -> dict[str, Any] | None:
        return lora_options(value)

    def _contradictions(self) -> list[str]:
        wrong = super()._contradictions() + self._not_yet()
        per_prompt, batch = self.samples_per_prompt, self.rollout_batch_size
        if batch % per_prompt:
            wrong.append(f"samples_per_prompt = {per_prompt}: must divide rollout_batch_size = {batch}")
        if self.mini_batch_size > batch:
            wrong.append(f"mini_batch_size = {self.mini_batch_size}: above rollout_batch_size = {batch}")
        if self.advantage in ("grpo", "dr_grpo", "rloo") and per_prompt < 2:
            wrong.append(f"advantage = {self.advantage}: compares responses; set samples_per_prompt >= 2")
        if self.kl_in == "loss" and self.kl_coef == 0:
            wrong.append("kl_in = loss: has no effect with kl_coef = 0; set kl_coef above 0 or leave kl_in out")
        if self.advantage != "gae" and self.critic == "shared_trunk":
            wrong.append(f"critic = shared_trunk: advantage = {self.advantage} has no critic; leave critic out")
        if self.kl_controller == "adaptive" and (self.kl_in == "loss" or self.kl_coef == 0):
            wrong.append("kl_controller = adaptive: steers kl_coef in the reward; use kl_in = reward, kl_coef > 0")
        if self.overlong_penalty is not None and self.overlong_penalty > self.max_new_tokens:
            wrong.append(f"overlong_penalty = {self.overlong_penalty}: above max_new_tokens = {self.max_new_tokens}")
        warmup = f"critic_warmup_steps = {self.critic_warmup_steps}"
        if self.advantage != "gae" and self.critic_warmup_steps:
            wrong.append(f"{warmup}: advantage = {self.advantage} has no critic; set it to 0")
        if self.critic_warmup_steps >= self.total_steps:
            wrong.append(f"{warmup}: leaves the policy none of total_steps = {self.total_steps}")
        return wrong

    def _not_yet(self) -> list[str]:
        """Fields whose other values belong to later versions: refused, never parsed and ignored."""
        only = {"ptx_coef": 0.0, "quantize": None, "ema_decay": None}
        wrong = [(name, getattr(self, name), use) for name, use in only.items() if getattr(self, name) != use]
        return [
            f"{name} = {_shown(value)}: not available in this version; use {name} = {_spelled(use)}"
            for name, value, use in wrong
        ]


CONFIGS: dict[str, type[StageConfig]] = {c.stage: c for c in (SFTConfig, RewardConfig, PPOConfig)}


_ELSEWHERE = {  # what other libraries and papers call it
    "learning_rate": ("lr",),
    "kl_coef": ("beta", "init_kl_coef", "kl_loss_coef"),
    "gae_lambda": ("lam", "lambda", "lambd"),
    "clip_range": ("cliprange", "clip_eps", "epsilon"),
    "clip_range_value": ("cliprange_value",),
    "mini_batch_size": ("batch_size", "per_device_train_batch_size"),
    "max_tokens": ("max_length", "max_seq_length", "cutoff_len"),
    "max_new_tokens": ("max_completion_length", "response_length"),
    "samples_per_prompt": ("num_generations",),
    "epochs": ("num_train_epochs",),
    "ppo_epochs": ("num_ppo_epochs",),
    "total_steps": ("max_steps",),
    "save_every": ("save_steps",),
    "eval_every": ("eval_steps",),
}
_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    tuple: "two numbers low,high",
}


class FieldHelp(NamedTuple):
    """One line of the help: name, default as it is typed, what is accepted, meaning."""

    name: str
    default: str
    accepts: str
    description: str


def config_fields(cls: type[StageConfig]) -> list[FieldHelp]:
    """Every field of a stage's config: its own fields first, then those shared by all stages."""
    fields = cls.model_fields
    names = [name for name in fields if name not in StageConfig.model_fields] + list(StageConfig.model_fields)
    return [
        FieldHelp(name, _spelled(fields[name].default, name), accepts(cls, name), str(fields[name].description))
        for name in names
    ]


def accepts(cls: type[StageConfig], name: str) -> str:
    """What a field takes, in words: "a whole number >= 1", "constant or cosine", "a number > 0, or none"."""
    kinds, optional = _kinds(cls, name)
    none = f", or {_spelled(None, name)}" if optional and Any not in kinds else ""
    choices = [kind for kind in kinds if isinstance(kind, str)]
    if choices:
        return (" or ".join(choices) if len(choices) < 3 else "one of " + ", ".join(choices)) + none
    word = next((_WORDS[kind] for kind in kinds if kind in _WORDS), "none")
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    bounds = [
        f"{sign} {getattr(mark, key)}"
        for mark in cls.model_fields[name].metadata
        for key, sign in signs.items()
        if hasattr(mark, key)
    ]
    return f"{word} {' and '.join(bounds)}".rstrip() + none


def unknown_field(cls: type[StageConfig], name: str) -> str:
    """Sentence for a name that is no field of cls: whose it is, or the nearest name."""
    owner = next((c for c in CONFIGS.values() if name in c.model_fields or name in INPUTS[c.stage]), None)
    if name in INPUTS[cls.stage]:
        return f"{name}: an argument of the trainer, not a field of {cls.__name__}"
    if owner:
        return f"{name}: belongs to fastrlhf {owner.stage}, not to {cls.stage}"
    nearest = next((ours for ours, theirs in _ELSEWHERE.items() if name in theirs), None)
    if nearest not in cls.model_fields:
        close = difflib.get_close_matches(name, [*cls.model_fields, *INPUTS[cls.stage]], 1)
        nearest = close[0] if close else None
    if nearest:
        return f"{name}: no such field; did you mean {nearest}?"
    return f"{name}: no such field; fastrlhf {cls.stage} --help lists them all"


def _problems(cls: type[StageConfig], error: ValidationError, given: dict[str, Any]) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for problem in error.errors(include_url=False):
        name = str(problem["loc"][0]) if problem["loc"] else None
        if name is None:  # raised by _together: sentences already, a line each
            found += [(line.split(" = ")[0], line) for line in str(problem["ctx"]["error"]).split("\n")]
        elif problem["type"] == "extra_forbidden":
            found.append((name, unknown_field(cls, name)))
        elif name not in [known for known, _ in found]:
            found.append((name, f"{name} = {_shown(given[name])}: expected {accepts(cls, name)}"))
    return found


def _kinds(cls: type[StageConfig], name: str) -> tuple[list[Any], bool]:
    """(types or choices of a field, whether it may be None)."""
    annotation = cls.model_fields[name].annotation
    options = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    kinds: list[Any] = []
    for option in options:
        if get_origin(option) is Literal:
            kinds += get_args(option)
        elif option is not type(None):
            kinds.append(get_origin(option) or option)
    return kinds, type(None) in options or Any in options


def _spelled(value: Any, name: str = "") -> str:
    """A value as it is typed on the command line."""
    if value is None:
        return "auto" if name == "micro_batch_tokens" else "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (tuple, list)):
        return ",".join(_spelled(part) for part in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
