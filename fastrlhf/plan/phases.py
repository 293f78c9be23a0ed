"""A stage's own parts, built and run as a run does it, on the largest rows that the recipe allows.

Nothing here imitates training: the trainers are the trainers, and what runs are their own `accumulate`, `judge`,
`make_experience` and `generate`. `UnknownNumbers` makes that free of weights, memory and time.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fastrlhf.config.base import StageConfig
from fastrlhf.config.stages import PPOConfig
from fastrlhf.data.encode import Example, Record
from fastrlhf.data.feedback import Feedback
from fastrlhf.models import loading
from fastrlhf.models.heads import Readout, head_logits, lm_head
from fastrlhf.models.reward_folder import kept_readout
from fastrlhf.models.token_batch import TokenRows
from fastrlhf.parallel.mapped import layers_of
from fastrlhf.plan.counter import storage_bytes
from fastrlhf.plan.models import WORD, model_without_weights, parameters_of, stand_in_tokenizer
from fastrlhf.plan.unknown import UnknownNumbers
from fastrlhf.plan.work import Work, of_update
from fastrlhf.ppo import PPOTrainer
from fastrlhf.preflight.fits import positions_of
from fastrlhf.preflight.readout import asked_readout
from fastrlhf.reward_model import RewardTrainer
from fastrlhf.rl.experience import make_experience
from fastrlhf.rl.functions import is_function_reference
from fastrlhf.rl.probe import MOMENT_BYTES, longest, moments_to_come
from fastrlhf.rl.scorers import Scores
from fastrlhf.rollout.engine import MOST_SLOTS, RolloutEngine
from fastrlhf.rollout.kv_cache import cache_bytes_per_token
from fastrlhf.rollout.parity import decoding, known_parity, trunk_over
from fastrlhf.rollout.result import Rollout, Texts
from fastrlhf.rollout.sampling import SamplingParams
from fastrlhf.runtime.optim import Optimizer
from fastrlhf.sft import SFTTrainer

ELSEWHERE = {  # fields that say what is read, written or shown: none of it is planned
    "output_dir": None, "resume": False, "overwrite": False, "accept_changed": None, "eval_every": 0, "save_every": 0,
    "columns": None, "ignore_columns": None, "max_samples": None, "chat_template": None, "prompt_format": "raw",
    "format": "text", "eval_fraction": 0.0, "probe": False, "best_of_n": 0, "ref_refresh_every": 0,
    "critic_pretrain_epochs": 0, "optimizer": "adamw", "readout": None, "readout_layer": None,
    "weakest": "keep", "strength_margin": False, "lm_coef": 0.0, "ensemble": None,
    "reward_ensemble": "mean", "compile": False,
}  # fmt: skip
LEFT_OUT = {  # options of reward training, and what of them is not in a plan
    "lm_coef": "lm_coef: its head and the log-probs of the best replies are left out of these figures",
    "ensemble": "ensemble: its heads are counted as one, which leaves out 16 H bytes for each further one",
}
PAIR = Feedback("pair", WORD, (WORD, WORD), ranking=((0,), (1,)))


@dataclass(frozen=True)
class Target:
    """What a plan is for. gpu: memory in bytes of each of `gpus` GPUs; None: this machine's CPU."""

    gpu: int | None = None
    gpus: int = 1

    def dtype(self, name: str) -> str:
        """`dtype` of a recipe, resolved: auto is bf16 on a GPU."""
        return name if name != "auto" else "fp32" if self.gpu is None else "bf16"


@dataclass(frozen=True)
class Phase:
    """The most bytes alive at a time; rounded: as a GPU's allocator hands them out.

    Of them, cache: keys and values; parked: of models that wait in host memory; cpu_only: what only a CPU needs. head:
    rows that the fused head reads at once, and whether to a PPO loss. trains: it makes gradients. work: what it does
    with one micro-batch, or with all prompts of a rollout; token: what a decoding step does.
    """

    peak: int
    rounded: int
    cache: int = 0
    parked: int = 0
    cpu_only: int = 0
    head: tuple[int, bool] | None = None
    trains: bool = False
    work: Work = field(default_factory=Work)
    token: Work = field(default_factory=Work)


@dataclass(frozen=True)
class Part:
    """What a step does so many times. in_graph: launched from a CUDA graph on a GPU."""

    work: Work
    times: float
    in_graph: bool = False


@dataclass
class Measured:
    """held: bytes that stay from step to step, by name; phases: by name, in the order of a step. rows: sequences of a
    micro-batch, of `count` in a mini-batch of a GPU, each of `length` tokens; slots: sequences that decode together,
    each with `slot_bytes` of keys and values; shape: vocabulary and width of the head; largest: bytes of the largest
    gradient; step: what a step of training does, by name. layered: by role, bytes of its weights that parallel = fsdp
    gathers at a time, layer by layer; recast: the roles whose weights it holds in fp32 alone, as their masters."""

    held: dict[str, int]
    phases: dict[str, Phase]
    rows: int
    count: int
    length: int
    shape: tuple[int, int]
    layers: int
    largest: int
    slots: int = 0
    slot_bytes: int = 0
    layered: dict[str, int] = field(default_factory=dict)
    recast: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    step: dict[str, Part] = field(default_factory=dict)


class Measurer:
    """Measures one stage of one recipe. What it has built serves other sizes of micro-batches and rollouts too."""

    def __init__(self, stage: str, inputs: Mapping[str, Any], target: Target) -> None:
        self.stage, self.inputs, self.target = stage, inputs, target
        self._built: tuple[StageConfig, _Supervised | _PPO] | None = None

    def __call__(self, config: StageConfig, slots: int | None = None) -> Measured:
        """Run the stage's parts without numbers, in micro-batches of `micro_batch_tokens`. slots: sequences that decode
        together; None: all of a step's.

        UserError as the trainers have it, for a model whose size is not known, and for one that cannot be run so.
        """
        tokens = config.micro_batch_tokens
        config = _of_one(config, self.target).model_copy(update={"dtype": self.target.dtype(config.dtype)})
        config = config.model_copy(update={"micro_batch_tokens": None})
        if self._built is None or self._built[0] != config:
            live = UnknownNumbers()
            with live:
                if isinstance(config, PPOConfig):
                    self._built = config, _PPO(live, self.inputs, config)
                else:
                    self._built = config, _Supervised(live, self.stage, self.inputs, config)
        built = self._built[1]
        with built.live:
            built.trainer.memory.first_budget = tokens or built.trainer.memory.first_budget
            return built.measured(slots)


def _of_one(config: StageConfig, target: Target) -> StageConfig:
    """What one of several GPUs does: its share of the rows, the whole of the models."""
    shares = {"mini_batch_size": -(-config.mini_batch_size // target.gpus)}
    if isinstance(config, PPOConfig):
        prompts = config.rollout_batch_size // config.samples_per_prompt
        shares["rollout_batch_size"] = -(-prompts // target.gpus) * config.samples_per_prompt
        shares["mini_batch_size"] = min(shares.values())
    return config.model_copy(update=shares)


def _stand_in(config: StageConfig) -> StageConfig:
    fields = type(config).model_fields
    update = {name: value for name, value in ELSEWHERE.items() if name in fields}
    return config.model_copy(update=update)


@contextmanager
def _building() -> Iterator[None]:
    """What trainers say of rows that stand in is of no use, and whether logits are as they should be no shape tells."""
    quiet = (redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()))
    with quiet[0], quiet[1], mock.patch.object(loading, "check_head", lm_head):
        yield


def _built(live: UnknownNumbers, config: StageConfig, source: str, role: str, scalar: bool) -> Any:
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.dtype]
    model = model_without_weights(live, source, role, scalar=scalar, dtype=dtype, attention=config.attention)
    if scalar and loading.is_scalar_model(source):
        model.score_readout = kept_readout(source)
    live.add(parameters_of(model))
    return model


# ---------------------------------------------------------------------------------------------------------- SFT, reward


class _Supervised:
    """A trainer of SFT or of a reward model without numbers."""

    def __init__(self, live: UnknownNumbers, stage: str, inputs: Mapping[str, Any], config: Any) -> None:
        self.live, self.config, self.reward = live, config, stage == "reward"
        model = _built(live, config, str(inputs["model"]), "model" if self.reward else "policy", scalar=self.reward)
        pair = {"prompt": WORD, "chosen": WORD, "rejected": f"{WORD} {WORD}"}
        rows = [pair] if self.reward else [{"text": f"{WORD} {WORD}"}]
        with _building():
            kind = RewardTrainer if self.reward else SFTTrainer
            self.trainer = kind(_stand_in(config), model=model, tokenizer=stand_in_tokenizer(), data=rows)
        if self.reward and config.head_only and not loading.is_scalar_model(str(inputs["model"])):
            # What auto chooses takes the states of all layers, as each but the last does.
            self.trainer.model.score_readout = Readout("mean", 0) if config.readout == "auto" else asked_readout(config)
        self.length = min(config.max_tokens, positions_of(model) or config.max_tokens)
        self.moments = [moments_to_come(self.trainer.optimizer, config)]
        self.trainer.model.train()  # as a step does

    def measured(self, slots: int | None) -> Measured:
        trainer, length, count = self.trainer, self.length, self.config.mini_batch_size
        if self.reward:
            items = [Record([[1] * length] * 2, PAIR)] * count
            groups = list(trainer.micro_batches(items))
            first, size, count = groups[0], 2 * len(groups[0]), 2 * count
            trainer.items, trainer.features = first, None  # whose features head_only reads
        else:
            items = [Example([1] * length, [False] + [True] * (length - 1), "")] * count
            groups = list(trainer.groups(items))
            size = sum(map(len, groups[0]))
            first = items[:size]
        with self.live.phase(), _gradients_of_others(self.live, [trainer.optimizer], len(groups)):
            trainer.accumulate(first)
        head = None if self.reward else (size * (length - 1), False)
        notes = [note for name, note in LEFT_OUT.items() if getattr(self.config, name, None)]
        update = Phase(self.live.peak, self.live.rounded_peak, head=head, trains=True, work=self.live.work.copy())
        step = {"update": Part(update.work, count / size), "optimizer": _optimizer([trainer.optimizer], 1)}
        models = {"model": trainer.model}
        held = _held_by_roles(models, [trainer.optimizer], self.config)
        shape = _shape(trainer.model, [trainer.optimizer]) | _layers(models)
        return Measured(held, {"update": update}, size, count, length, notes=notes, step=step, **shape)


@contextmanager
def _gradients_of_others(live: UnknownNumbers, optimizers: Sequence[Optimizer], groups: int) -> Iterator[None]:
    """Inside, the gradients of the micro-batches before are there, where a mini-batch has several; none is after."""
    if groups > 1:
        for optimizer in optimizers:
            for master in optimizer.masters:
                master.grad = live.unknown(partial(torch.zeros_like, master, requires_grad=False))
    yield
    for optimizer in optimizers:
        optimizer.zero_grad()


# ------------------------------------------------------------------------------------------------------------------ PPO


class _PPO:
    """A PPO trainer without numbers, and its phases one after the other."""

    def __init__(self, live: UnknownNumbers, inputs: Mapping[str, Any], config: PPOConfig) -> None:
        self.live, self.config, self.notes = live, config, []
        policy = _built(live, config, str(inputs["policy"]), "policy", scalar=False)
        others = {
            role: _built(live, config, str(inputs[role]), role, scalar=role == "value_model")
            for role in ("ref_policy", "value_model")
            if inputs.get(role) is not None
        }
        if config.ptx_coef:
            size = min(config.max_prompt_tokens + config.max_new_tokens, positions_of(policy) or 10**9)
            others["ptx_data"] = [{"text": " ".join([WORD] * (size - 1))}] * config.mini_batch_size
        with _building():
            self.trainer = PPOTrainer(
                _stand_in(config),
                policy=policy,
                tokenizer=stand_in_tokenizer(),
                reward=self._reward(inputs["reward"]),
                prompts=[WORD],
                **others,
            )
        self.prompt, self.response = longest(config, self.trainer.engine)
        self.length = self.prompt + self.response
        self.count = config.rollout_batch_size
        self.rollouts: dict[int, Phase] = {}  # by their slots
        self.updates: dict[int, dict[str, Phase]] = {}  # the other phases, by the tokens of a micro-batch
        self.moments = [moments_to_come(optimizer, config) for optimizer in self.trainer.learner.optimizers()]

    def _reward(self, reward: Any) -> Any:
        """Models without weights in the places of models, a function of no cost in those of functions."""
        if isinstance(reward, str):
            return self._judge(reward)
        parts = []
        for index, part in enumerate(reward if isinstance(reward, list) else [reward]):
            named = dict(zip(("name", "weight", "model"), part)) if isinstance(part, (list, tuple)) else dict(part)
            source = str(named.get("model") or named.get("function"))
            if named.get("label") is not None:
                self.notes.append(f"reward {source}: a classifier by label is counted with one label")
            parts.append((f"{index}", 1.0, self._judge(source)))
        return parts

    def _judge(self, source: str) -> Any:
        if is_function_reference(source):
            return _no_reward
        return _built(self.live, self.config, source, "reward", scalar=True)

    def measured(self, slots: int | None) -> Measured:
        trainer, roles = self.trainer, self.trainer.roles
        slots = max(1, min(self.count, MOST_SLOTS, slots or self.count))
        if slots not in self.rollouts:
            self.rollouts[slots] = self._rollout(slots)
        rollout, tokens = self._stand_in_rollout(), trainer.memory.tokens
        groups = rollout.rows.micro_batches(list(range(self.config.mini_batch_size)), tokens)
        if tokens not in self.updates:
            self.updates[tokens] = self._updates(rollout, sorted(groups[0]), len(groups))
        phases = {"rollout": self.rollouts[slots], **self.updates[tokens]}
        head = None if trainer.critic is None else trainer.critic.head
        models = {
            "policy": trainer.policy,
            "reference": roles.ref_policy,
            "critic": roles.value_model,
            "value head": head,
        }
        models |= {f"reward model {i or ''}".strip(): model for i, model in enumerate(roles.scorer.models)}
        optimizers = trainer.learner.optimizers()
        held = _held_by_roles(models, optimizers, self.config, average=trainer.learner.average)
        return Measured(
            held,
            phases,
            rows=len(groups[0]),
            count=self.config.mini_batch_size,
            length=self.length,
            slots=slots,
            slot_bytes=phases["rollout"].cache // slots,
            notes=self.notes,
            step=self._step(phases, len(groups[0]), slots),
            **_shape(trainer.policy, optimizers),
            **_layers(models),
        )

    def _step(self, phases: dict[str, Phase], rows: int, slots: int) -> dict[str, Part]:
        """What a step does: its phases on all responses, those that train in every epoch. rows: of a micro-batch."""
        config, rollout = self.config, phases["rollout"]
        parts = {
            "prefill": Part(rollout.work, 1),
            "decode": Part(rollout.token, self.response * self.count / slots, in_graph=True),
        }
        for name, phase in phases.items():
            if phase is not rollout:
                parts[name] = Part(phase.work, self.count / rows * (config.ppo_epochs if phase.trains else 1))
        updates = config.ppo_epochs * self.count / config.mini_batch_size
        return {**parts, "optimizer": _optimizer(self.trainer.learner.optimizers(), updates)}

    def _updates(self, rollout: Rollout, rows: list[int], groups: int) -> dict[str, Phase]:
        """Every phase but the rollout, with one micro-batch of `rows`, of `groups` in a mini-batch."""
        trainer, phases = self.trainer, {}
        away = {role: storage_bytes(parameters_of(model)) for role, model in self._parked().items()}
        phases["score"] = self._phase(lambda: trainer.scorer(self._part(rollout, len(rows))), away, "reward")
        made: list[Any] = []

        def experience() -> None:
            options = {"kl_coef": self.config.kl_coef, "moments": trainer.moments, "memory": trainer.memory}
            scores = Scores([1.0] * self.count, None)
            made.append(make_experience(rollout, scores, trainer.roles, self.config, first_epoch=[rows], **options)[0])

        tokens = len(rows) * self.response
        phases["experience"] = self._phase(experience, away, "reference", head=(tokens, False))
        learner = trainer.learner
        for name, which in self._passes().items():
            head = (tokens, True) if which["policy"] else None
            mixed = learner.ptx.draw() if which["policy"] and learner.ptx is not None else ()
            trained = [learner.policy_optimizer] if which["policy"] else []
            trained += [learner.value_optimizer] if which["critic"] else []
            work = partial(learner.accumulate, rollout.rows, made[0], rows, mixed, **which)
            with _gradients_of_others(self.live, trained, groups):
                phases[name] = self._phase(work, away, None, head=head, trains=True)
        return phases

    def _parked(self) -> dict[str, Any]:
        """The models that wait in host memory."""
        if not self.config.offload:
            return {}
        roles = self.trainer.roles
        return {"reference": roles.ref_policy, **{f"reward{i}": m for i, m in enumerate(roles.scorer.models)}}

    def _passes(self) -> dict[str, dict[str, bool]]:
        critic = self.trainer.critic
        if critic is None:
            return {"update": {"policy": True, "critic": False}}
        if critic.shares_trunk:
            return {"update": {"policy": True, "critic": True}}
        return {
            "update of the critic": {"policy": False, "critic": True},
            "update of the policy": {"policy": True, "critic": False},
        }

    def _phase(
        self,
        work: Callable[[], object],
        away: dict[str, int],
        here: str | None,
        *,
        head: tuple[int, bool] | None = None,
        trains: bool = False,
    ) -> Phase:
        """here: the role that is fetched for the phase."""
        with self.live.phase():
            work()
        waiting = sum(size for role, size in away.items() if here is None or not role.startswith(here))
        peak, rounded = self.live.peak, self.live.rounded_peak
        return Phase(peak, rounded, parked=waiting, head=head, trains=trains, work=self.live.work.copy())

    def _rollout(self, slots: int) -> Phase:
        """The prompts of all slots and their first token; then, over the same cache, a token behind full rows."""
        trainer, config = self.trainer, self.config
        positions = slots * self.length
        head = trainer.engine.value_head
        policy = trainer.engine.model  # a copy of the policy, where rollouts have a dtype of their own
        engine = RolloutEngine(policy, trainer.tokenizer, max_batch_tokens=positions, value_head=head)
        ids = trainer.policy.get_input_embeddings().weight.shape[0]
        prompts = [[i % ids] * self.prompt for i in range(self.count // config.samples_per_prompt)]  # each is computed
        params = SamplingParams(
            max_new_tokens=self.response,
            n=config.samples_per_prompt,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            stop_token_ids=[0],  # whether the first token is one is not known, so it is: every row ends there
        )
        with self.live.phase():
            engine.generate(prompts, params)
            prefill = self.live.work.copy()
            _last_token(engine, slots, self.length)
            peak, rounded = self.live.peak, self.live.rounded_peak
        with self.live.phase():  # a row is half as long as it gets when its mean token is decoded
            _last_token(engine, slots, self.prompt + max(1, self.response // 2))
        token = self.live.work.copy()
        engine.release()
        away = sum(storage_bytes(parameters_of(model)) for model in self._parked().values())
        cached = known_parity(policy).cached
        cache = positions * (cache_bytes_per_token(policy) if cached else 8)
        # A CPU decodes with an fp32 copy of the head; a GPU multiplies it as it is.
        copy = 4 * lm_head(policy).weight.numel() if policy.dtype != torch.float32 else 0
        return Phase(peak, rounded, cache, away, copy, work=prefill, token=token)

    def _stand_in_rollout(self) -> Rollout:
        count, response = self.count, self.response
        rows = TokenRows([[1] * self.prompt] * count, [[1] * response] * count, self.trainer.joined)
        texts = Texts([WORD] * count, [WORD] * count, [WORD] * count, {})
        flat = [torch.zeros(response)] * count
        shared = self.trainer.critic is not None and self.trainer.critic.shares_trunk
        return Rollout(
            rows, texts, self.config.samples_per_prompt, [True] * count, flat, flat, flat if shared else None, {}
        )

    def _part(self, rollout: Rollout, rows: int) -> Rollout:
        texts, kept = rollout.texts[:rows], rollout.rows[:rows]
        flat = rollout.log_probs[:rows]
        return Rollout(kept, texts, 1, rollout.finished[:rows], flat, flat, None, {})


@torch.inference_mode()
def _last_token(engine: RolloutEngine, slots: int, length: int) -> None:
    """The last token of every slot, over the cache that a rollout has left."""
    model, cache = engine.model, engine.cache
    with decoding(model, cache):
        trunk = trunk_over(model, cache)
        hidden = trunk.step(torch.ones(slots, dtype=torch.int64), torch.full((slots,), length - 1), length)
        head_logits(lm_head(model), hidden)


def _no_reward(prompts: list[str], responses: list[str]) -> list[float]:
    return [1.0] * len(responses)


# --------------------------------------------------------------------------------------------------------- what is held


def _shape(model: Any, optimizers: Sequence[Optimizer]) -> dict[str, Any]:
    embeddings = model.get_output_embeddings()
    weight = model.get_input_embeddings().weight if embeddings is None else embeddings.weight
    return {
        "shape": tuple(weight.shape),
        "layers": model.config.get_text_config().num_hidden_layers,
        "largest": max(4 * m.numel() for optimizer in optimizers for m in optimizer.masters),
    }


def _optimizer(optimizers: Sequence[Optimizer], times: float) -> Part:
    """The updates of all roles, so many of each."""
    work = Work()
    for optimizer in optimizers:
        for param, master in zip(optimizer.params, optimizer.masters, strict=True):
            work += of_update(master.numel(), param.element_size())
    return Part(Work({(work.flops, work.bytes): 1}), times)  # one fused launch, or few


def _layers(models: Mapping[str, Any]) -> dict[str, Any]:
    """`layered` and `recast` of these roles. Beside what is outside of the layers two of them are there: the next one
    is gathered while one runs."""

    def size(part: Any) -> int:
        return sum(p.numel() * p.element_size() for p in part.parameters())

    layered, recast, seen = {}, set(), set()
    for role, model in models.items():
        if id(model) in seen or not hasattr(model, "config"):  # a shared trunk, or a head alone
            continue
        seen.add(id(model))
        layers = [size(layer) for layer in layers_of(model)]
        layered[role] = size(model) - sum(layers) + sum(sorted(layers)[-2:])
        if all(p.requires_grad and p.dtype != torch.float32 for p in model.parameters()):
            recast.add(role)
    return {"layered": layered, "recast": recast}


def _held_by_roles(
    models: Mapping[str, Any], optimizers: Sequence[Optimizer], config: StageConfig, *, average: Any = None
) -> dict[str, int]:
    """Bytes by what they are; a storage that two roles share counts for the first."""
    held: dict[str, int] = {}
    seen: set[int] = set()

    def put(name: str, tensors: Sequence[Tensor]) -> None:
        new = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
        held[name] = held.get(name, 0) + sum(size for key, size in new.items() if key not in seen)
        seen.update(new)

    for role, model in models.items():
        named = [] if model is None else [*model.named_parameters(), *model.named_buffers()]
        put(f"{role}: parameters", [t for name, t in named if "lora_" not in name])
        put(f"{role}: adapters", [t for name, t in named if "lora_" in name])
    trained = [master for optimizer in optimizers for master in optimizer.masters]
    put("fp32 masters", trained)
    if average is not None:
        put("averaged weights (ema)", average.weights)
    held["optimizer"] = MOMENT_BYTES[config.optimizer] * sum(m.numel() for m in trained)
    each = [sum(4 * m.numel() for m in optimizer.masters) for optimizer in optimizers]
    shared = isinstance(config, PPOConfig) and config.critic == "shared_trunk"
    held["gradients"] = sum(each) if shared else max(each)
    return {name: size for name, size in held.items() if size}
