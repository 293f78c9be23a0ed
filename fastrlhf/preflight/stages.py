"""What each stage checks and reads before anything else of it exists: rows become token ids, once, for the whole run.

The run's constructor starts from the result, and --dry-run prints its sentences. The order: the folder, the
options, the rows, then the models without their weights, what they and the rows ask of each other, and the disk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastrlhf.config.base import StageConfig
from fastrlhf.config.effects import BY_CRITIC
from fastrlhf.config.errors import UserError
from fastrlhf.config.limits import collector_paused
from fastrlhf.config.stages import PPOConfig, RewardConfig, SupervisedConfig
from fastrlhf.data.dataset import split_heldout
from fastrlhf.data.encode import Encoded, EncodedPrompt, Encoder, Example, Progress, Record, check_centring, check_ptx
from fastrlhf.data.templates import settle_template
from fastrlhf.eval_metrics import NO_HELD_OUT, EvalMetrics, load_eval_metrics
from fastrlhf.models.loading import check_scalar_form, is_scalar_model, skeleton, tokenizer_for
from fastrlhf.models.lora import target_layers
from fastrlhf.models.reward_folder import HeldOut
from fastrlhf.preflight.disk import Trained, check_folder, check_room, trained_bytes
from fastrlhf.preflight.fits import check_ids, check_limit
from fastrlhf.preflight.outline import sizes, supervised_steps
from fastrlhf.preflight.readout import check_readout
from fastrlhf.preflight.roles import (
    check_policy,
    check_readers,
    check_rollout_dtype,
    read_roles,
    readable_prompts,
    trained_roles,
)
from fastrlhf.preflight.rows import Sentences, check_dropped, describe_rows
from fastrlhf.reward.raters import Raters, check_scores, joined, raters_of
from fastrlhf.reward.strength import denoised
from fastrlhf.rl.evaluation import Evaluation
from fastrlhf.rl.roles import check_value_model
from fastrlhf.rl.scorers import check_ensemble, held_out_records, read_reward
from fastrlhf.runtime import distributed
from fastrlhf.runtime.console import RowProgress, number

SLOW_HEAD = 1e-3  # learning rate below which a value head from zero explains nothing in a run of some dozen steps
NO_RECORD = "reward: {} brings no record of held-out pairs, as `fastrlhf reward` writes one; try it on some of your own"
Item = TypeVar("Item", Example, Record)


@dataclass(frozen=True)
class Supervised(Generic[Item]):
    """What SFT and reward training start from. fits: raises UserError for a loaded model that cannot read the rows.
    sft_replies: what a reward model is centred on; else none. raters: how a reward model reads given scores."""

    tokenizer: PreTrainedTokenizerBase
    items: list[Item]
    held_out: list[Item]
    compute_metrics: EvalMetrics | None
    fits: Callable[[PreTrainedModel], None]
    said: Sentences
    sft_replies: list[Example]
    raters: Raters


@dataclass(frozen=True)
class Prepared:
    """What PPO starts from. reward: as `read_reward` has it, bound to the columns; reward_records: what is known of its
    models. fits: as in `Supervised`, for the policy."""

    tokenizer: PreTrainedTokenizerBase
    prompts: list[EncodedPrompt]
    eval_prompts: list[EncodedPrompt] | None
    ptx_examples: list[Example]
    reward: Any
    reward_records: dict[str, HeldOut | None]
    evaluation: Evaluation
    fits: Callable[[PreTrainedModel], None]
    said: Sentences


@collector_paused()
def prepare_supervised(
    config: SupervisedConfig,
    *,
    model: Any,
    tokenizer: Any = None,
    data: Any,
    sft_data: Any = None,
    eval_data: Any = None,
    compute_metrics: Any = None,
    sample: int | None = None,
    progress: Progress | None = None,
) -> Supervised:
    """Check and read what `fastrlhf sft` or `reward` starts from; model to compute_metrics are the trainer's arguments
    (sft_data: of a reward model alone).

    UserError for whatever would stop the run later. sample: rows of a source to encode at most (--dry-run).
    """
    check_folder(config)
    if config.stage == "reward":
        check_centring(config, sft_data)
    tokenizer = tokenizer_for(tokenizer, model)
    template, notes = settle_template(tokenizer, config.chat_template, config.prompt_format)
    learner = _learner(config, model)
    given = eval_data is not None
    metrics = load_eval_metrics(compute_metrics, config, held_out=given or config.eval_fraction > 0)

    encoder = Encoder(config, tokenizer, template, sample=sample, progress=progress or _progress())
    asked = metrics is not None  # for the rows of what is held out
    sources = [_read(encoder, data, "data", keep_rows=asked and not given)]
    if given:
        sources.append(_read(encoder, eval_data, "eval_data", keep_rows=asked))
    sft = [] if sft_data is None else [encoder.sft_replies(sft_data)]
    lengths = [max(encoded.lengths()) for encoded in (*sources, *sft)]
    fits = partial(_fits, config.max_tokens, max(lengths), max(encoded.highest() for encoded in (*sources, *sft)))
    said = _sentences(config, [*sources, *sft], notes, f"max_tokens = {config.max_tokens}")
    if learner is not None:
        fits(learner)
    if config.stage == "reward":
        check_readout(config, model, learner, held_out=given or config.eval_fraction > 0)

    items, held_out = sources[0].items, sources[1].items if len(sources) > 1 else []
    if len(sources) == 1 and config.eval_fraction:
        items, held_out = _split(items, config)
    if asked and not held_out:
        raise UserError(f"{NO_HELD_OUT}, and eval_fraction = {config.eval_fraction} of {len(items)} rows is none")
    raters = Raters()
    if config.stage == "reward":
        items, raters = _with_scores(items, config, said, whole=sources[0].sampled is None)
    steps = supervised_steps(config, len(items))
    mean = sum(len(row) for item in items for row in item.rows) / len(items)
    tokens = number(round(steps * config.mini_batch_size * mean))
    said.notes.append(f"in all: {steps} optimizer steps of {config.mini_batch_size} rows, {tokens} tokens")
    if learner is not None:
        _say_room(config, said, [trained_bytes(learner, config)], steps)
    return Supervised(tokenizer, items, held_out, metrics, fits, said, sft[0].items if sft else [], raters)


def _with_scores(
    items: list[Record], config: RewardConfig, said: Sentences, *, whole: bool
) -> tuple[list[Record], Raters]:
    """The records to learn from, scores of one prompt together, and how scores are read. whole: they are no sample."""
    if whole:
        check_scores(items, config.score_range)
        if config.lm_coef and not any(item.feedback.ranking for item in items):
            raise UserError(
                f"lm_coef = {config.lm_coef:g}: data has scores alone, and learns the text of the best reply of pairs, "
                "edits and rankings; use lm_coef=0"
            )
    items, note = denoised(items, config)
    if note is not None:
        said.notes.append(note)
    raters = raters_of(item.feedback for item in items)
    records = joined(items)
    gone, note = len(items) - len(records), raters.note()
    if note is not None:
        said.notes.append(note)
    if gone:
        said.notes.append(
            f"scores of replies to one prompt are learnt together: {len(items)} records became {len(records)}"
        )
    return records, raters


def _read(encoder: Encoder, source: Any, role: str, *, keep_rows: bool) -> Encoded:
    if encoder.config.stage == "sft":
        return encoder.examples(source, role, keep_rows=keep_rows)
    return encoder.records(source, role)


def _learner(config: SupervisedConfig, source: Any) -> PreTrainedModel | None:
    """The model that learns, without its weights. UserError where it cannot."""
    scalar = config.stage == "reward" and is_scalar_model(source)
    if scalar and config.lm_coef:
        raise UserError(
            f"lm_coef = {config.lm_coef:g}: model is a reward model, which has no language-model head; start from the "
            "causal LM, or use lm_coef=0"
        )
    model = skeleton(source, "model" if config.stage == "reward" else "policy", scalar=scalar)
    if model is not None and config.stage == "reward" and not scalar:
        check_scalar_form(model)
    if model is not None and config.lora is not None:
        target_layers(model, config.lora["target_modules"])
    return model


def _fits(max_tokens: int, longest: int, highest: int, model: PreTrainedModel) -> None:
    check_ids(model, highest)
    check_limit(model, longest, "max_tokens", max_tokens)


def _split(items: list[Item], config: SupervisedConfig) -> tuple[list[Item], list[Item]]:
    """What answers the same prompt stays together: it is measured on prompts that were not trained on."""
    train, held_out = split_heldout(items, config.eval_fraction, config.seed, key=lambda item: item.group)
    if config.stage == "sft" and not (train and held_out):
        raise UserError(f"eval_fraction = {config.eval_fraction}: {len(items)} examples cannot be split so")
    return train, held_out


@collector_paused()
def prepare_ppo(
    config: PPOConfig,
    *,
    policy: Any,
    tokenizer: Any = None,
    reward: Any,
    prompts: Any,
    ref_policy: Any = None,
    value_model: Any = None,
    eval_prompts: Any = None,
    ptx_data: Any = None,
    judge: Any = None,
    sample: int | None = None,
    progress: Progress | None = None,
) -> Prepared:
    """The same for `fastrlhf ppo`."""
    check_folder(config)
    evaluation = Evaluation(config, judge, prompts=eval_prompts is not None)
    check_ptx(config, ptx_data)
    check_rollout_dtype(config, policy)
    tokenizer = tokenizer_for(tokenizer, policy)
    template, notes = settle_template(tokenizer, config.chat_template, config.prompt_format)
    check_value_model(config, value_model)
    reward = read_reward(reward, config)
    check_ensemble(reward, config)

    encoder = Encoder(config, tokenizer, template, sample=sample, progress=progress or _progress())
    sources = [encoder.prompts(prompts, "prompts")]
    if eval_prompts is not None:
        sources.append(encoder.prompts(eval_prompts, "eval_prompts"))
    columns = {encoded.role: {c for prompt, _ in encoded.items for c in prompt.columns} for encoded in sources}
    if evaluation.judge is not None:
        evaluation.judge.bind(columns["eval_prompts"], "eval_prompts")
    reward = read_reward(reward, config, columns)
    roles = read_roles(config, tokenizer, policy=policy, reward=reward, ref_policy=ref_policy, value_model=value_model)
    sources = readable_prompts(config, roles, sources)
    ptx = [] if ptx_data is None else [encoder.ptx(ptx_data)]

    fits = partial(check_policy, config, sources, ptx)
    if roles.policy is not None:
        fits(roles.policy)
    check_readers(config, roles, tokenizer, sources)
    records = held_out_records(reward)
    unknown = [NO_RECORD.format(name) for name, record in records.items() if record is None]
    said = _sentences(config, sources, notes, f"max_prompt_tokens = {config.max_prompt_tokens}")
    more = _sentences(config, ptx, [], "")
    notes = said.notes + more.notes + unknown + _slow_critic(config) + sizes(config)
    said = Sentences(notes, said.warnings + more.warnings)
    _say_room(config, said, trained_roles(config, roles), config.total_steps)
    held_out = sources[1].items if len(sources) > 1 else None
    examples = ptx[0].items if ptx else []
    return Prepared(tokenizer, sources[0].items, held_out, examples, reward, records, evaluation, fits, said)


def _slow_critic(config: PPOConfig) -> list[str]:
    """A line where a shared trunk's head has the learning rate of a whole model, as recipes name it for one."""
    rate = config.critic_learning_rate
    if config.advantage != "gae" or config.critic != "shared_trunk" or not 0 < rate < SLOW_HEAD:
        return []
    return [
        f"critic_learning_rate = {rate:g} is slow for the new head of critic = shared_trunk, which starts from zero; "
        f"critic_learning_rate=auto is {BY_CRITIC['critic_learning_rate']['shared_trunk']:g}"
    ]


def _progress() -> Progress | None:
    return RowProgress() if distributed.is_lead() else None


def _sentences(config: StageConfig, sources: list[Encoded], notes: list[str], limit: str) -> Sentences:
    """UserError where too many rows of a source were left out."""
    warnings = [check_dropped(encoded, config) for encoded in sources]
    lines = [line for encoded in sources for line in describe_rows(encoded, limit)]
    return Sentences([*notes, *lines], [warning for warning in warnings if warning])


def _say_room(config: StageConfig, said: Sentences, roles: list[Trained], steps: int) -> None:
    saves = -(-steps // config.save_every) if config.save_every else 1
    room = check_room(config, roles, saves)
    if room is not None:
        said.notes.append(room)
