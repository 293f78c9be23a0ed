"""The base of every stage's typed configuration: shared fields, coercion, help texts, errors.

Every field is flat, means the same in every stage that has it, and its docstring is its help text. A mistake
is a UserError with one line a problem: the field, its value, what is expected. No torch is imported here.
"""

from __future__ import annotations

import difflib
import os
import types
from typing import Any, ClassVar, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fastrlhf.config.effects import idle_options
from fastrlhf.config.errors import ConfigError, shown, spelled
from fastrlhf.config.inputs import EXPECTED, INPUTS, MAX_COUNT, MAX_NUMBER, lora_options
from fastrlhf.config.plain_yaml import parse_value

Schedule = Literal["constant", "cosine", "linear", "inverse_sqrt"]


UNSHARDED = {  # fields that parallel = fsdp does not have, and why
    "quantize": "blocks of 4 or 8 bits are no shares of a weight, which fsdp cuts along its first dimension",
    "offload": "fsdp holds a share of the frozen models on each device, and gathers them as they are read",
    "ref_refresh_every": "copies a whole policy into the reference, and fsdp holds shares of both",
    "head_only": "trains a head on states that are read once, without the trunk that fsdp shares",
    "lm_coef": "reads the language model's head apart from the trunk, and fsdp gathers both together",
}


class StageConfig(BaseModel):
    """The fields and checks that SFT, reward model and PPO share."""

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
    parallel: Literal["ddp", "zero", "fsdp"] = "ddp"
    """of several ranks each has a model whole (ddp), its share of masters and moments (zero), of weights too (fsdp)"""
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
    gradient_checkpointing: bool | None = None
    """recompute activations in the backward pass: less memory, slower (auto: where a plan of a GPU needs it)"""
    compile: bool | None = None
    """train, in PPO decode too, through compiled layers: fewer, larger kernels (auto: on a GPU, where they can be)"""
    lora: Any = None
    """train low-rank adapters on the frozen model: a rank, or {r, alpha, target_modules}; alpha is 2 r by default"""
    quantize: Literal["nf4", "int8"] | None = None
    """with lora: hold the frozen weights in 4 or 8 bits (bitsandbytes)"""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """dtype of the weights (auto: bf16 on a CUDA device that supports it, else fp32)"""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flash_attention_4"] = "auto"
    """attention implementation (auto: the flash attention for the GPU that is installed, else sdpa, else eager)"""
    chat_template: str | None = None
    """default, chatml, moss, moss-rlhf-en, moss-rlhf-zh or a .jinja file; none: the tokenizer's own, else default"""
    prompt_format: Literal["auto", "chat", "raw"] = "auto"
    """a string prompt is a user's message or raw text (auto: as the model's folder says, else chat with a template)"""
    columns: dict[str, str] | None = None
    """columns under other names, dotted into nested ones: {prompt: question, response: answers.0.text}"""
    ignore_columns: list[str] | None = None
    """columns that are no part of the prompt, whatever their names say: left out of it and counted"""
    max_samples: int | None = Field(None, ge=1)
    """read only the first so many rows of each input of rows, the held-out ones too; none: all"""
    allow_drop: float = Field(0.5, ge=0, le=1)
    """share of the rows of a source that may be left out before the run stops; true: all, false: none"""
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
    accept_changed: list[str] | None = None
    """with resume: inputs and fields that need not be what the run was started with, by name"""

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise ConfigError(_problems(type(self), error, fields)) from None

    def replace(self, **changes: Any) -> StageConfig:
        """A copy with some fields changed, checked like a new one."""
        given = {name: getattr(self, name) for name in self.model_fields_set}
        return type(self)(**{**given, **changes})

    @field_validator("*", mode="before")
    @classmethod
    def _plain_value(cls, value: Any, info) -> Any:
        """YAML and the command line spell None as text; a boolean is not a number; a Path is its text; no text
        or path holds a NUL."""
        kinds, optional = _kinds(cls, info.field_name)
        if isinstance(value, bool) and bool not in kinds and Any not in kinds:
            raise ValueError("a boolean")
        is_path = isinstance(value, os.PathLike) and str in kinds
        value = os.fspath(value) if is_path else value
        if isinstance(value, str) and "\0" in value:
            raise ValueError("a NUL character")
        if is_path:
            return value
        if isinstance(value, str) and optional and value.lower() in ("none", "null", spelled(None, info.field_name)):
            return None
        if isinstance(value, str) and dict in kinds:
            return _mapping(value)
        if isinstance(value, str) and (tuple in kinds or list in kinds):
            return [part.strip() for part in value.strip("[]() ").split(",")]
        return value

    @field_validator("*")
    @classmethod
    def _in_reach(cls, value: Any, info) -> Any:
        """No number of a run is beyond fp32, and none that is counted to is beyond a billion."""
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and abs(number) > MAX_NUMBER:
                raise ValueError(f"at most {MAX_NUMBER:g}")
            if isinstance(number, int) and number > MAX_COUNT and info.field_name != "seed":
                raise ValueError(f"at most {MAX_COUNT}")
        return value

    @field_validator("allow_drop", mode="before")
    @classmethod
    def _share(cls, value: Any) -> Any:
        """true allows everything, false nothing."""
        words = {"true": 1.0, "false": 0.0}
        return words.get(str(value).lower(), value)

    @field_validator("lora")
    @classmethod
    def _lora(cls, value: Any) -> dict[str, Any] | None:
        return lora_options(value)

    @model_validator(mode="after")
    def _together(self) -> StageConfig:
        problems = [*self._contradictions(), *idle_options(self)]
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _contradictions(self) -> list[str]:
        wrong = []
        if self.resume and self.overwrite:
            wrong.append("resume = true: contradicts overwrite = true, which deletes what resume needs; use one")
        if not all(0 <= beta < 1 for beta in self.adam_betas):
            wrong.append(f"adam_betas = {spelled(self.adam_betas)}: both must be in [0, 1)")
        if self.quantize is not None and self.lora is None:
            wrong.append(f"quantize = {self.quantize}: quantised weights cannot be trained; set lora too")
        if self.parallel != "ddp" and self.optimizer != "adamw":
            blocks = f"holds its moments in blocks of whole weights, which {self.parallel} cuts into shares"
            wrong.append(f"optimizer = {self.optimizer}: {blocks}; use optimizer = adamw or parallel = ddp")
        if self.parallel == "fsdp":
            given = ((name, getattr(self, name, None), why) for name, why in UNSHARDED.items())
            wrong += [f"{name} = {spelled(value)}: {why}; use parallel = zero" for name, value, why in given if value]
        return wrong


def _mapping(text: str) -> Any:
    """A mapping as typed on the command line, with or without its braces; a text that is none stays."""
    try:
        value = parse_value(text if text.startswith("{") else f"{{{text}}}")
    except ValueError:
        return text
    return value if isinstance(value, dict) else text


CONFIGS: dict[str, type[StageConfig]] = {}  # by verb; stages.py fills it
_ELSEWHERE = {  # names of other libraries, of papers and of older versions
    "learning_rate": ("lr",),
    "kl_coef": ("beta", "init_kl_coef", "kl_loss_coef"),
    "kl_controller_target": ("kl_target",),
    "gae_lambda": ("lam", "lambda", "lambd"),
    "clip_range": ("cliprange", "clip_eps", "epsilon"),
    "clip_range_value": ("cliprange_value",),
    "mini_batch_size": ("batch_size", "per_device_train_batch_size"),
    "max_tokens": ("max_length", "max_seq_length", "cutoff_len"),
    "max_new_tokens": ("max_completion_length", "response_length"),
    "samples_per_prompt": ("num_generations",),
    "epochs": ("num_train_epochs",),
    "max_samples": ("max_train_samples", "train_max_samples"),
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
    list: "names with commas between",
    dict: "a mapping {field: column}",
}
_SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


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
        FieldHelp(name, spelled(fields[name].default, name), accepts(cls, name), str(fields[name].description))
        for name in names
    ]


def accepts(cls: type[StageConfig], name: str) -> str:
    """What a field takes, in words: "a whole number >= 1", "constant or cosine", "a number > 0, or none"."""
    kinds, optional = _kinds(cls, name)
    none = f", or {spelled(None, name)}" if optional and Any not in kinds else ""
    choices = [kind for kind in kinds if isinstance(kind, str)]
    if choices and bool in kinds:
        choices = ["true", "false", *choices]
    if choices:
        return (" or ".join(choices) if len(choices) < 3 else "one of " + ", ".join(choices)) + none
    if Any in kinds:
        return "a whole number, a mapping, or none"
    word = next(_WORDS[kind] for kind in kinds if kind in _WORDS)
    marks = cls.model_fields[name].metadata
    bounds = [f"{sign} {getattr(mark, key)}" for mark in marks for key, sign in _SIGNS.items() if hasattr(mark, key)]
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
    problems: list[tuple[str, str]] = []
    for problem in error.errors(include_url=False):
        name = str(problem["loc"][0]) if problem["loc"] else None
        if name is None:  # raised by _together: sentences already, a line each
            problems += [(line.split(" = ")[0], line) for line in str(problem["ctx"]["error"]).split("\n")]
        elif problem["type"] == "extra_forbidden":
            problems.append((name, unknown_field(cls, name)))
        elif name not in [known for known, _ in problems]:
            expected = EXPECTED if name == "lora" else accepts(cls, name)
            limit = str(problem.get("ctx", {}).get("error", ""))  # of _in_reach
            expected += f", {limit}" if limit.startswith("at most") else ""
            problems.append((name, f"{name} = {shown(given[name])}: expected {expected}"))
    return problems


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
