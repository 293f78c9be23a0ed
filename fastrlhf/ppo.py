"""Stage 3: PPO. One step, top to bottom: rollout -> score -> experience -> update.

Left out on purpose: no inference server (the training weights generate), no logits tensor (the fused linear loss), no
callbacks (iterate over the trainer). Formulas: Schulman et al. 2017 (clip), Stiennon et al. 2020 (KL in the reward,
separate critic initialised from the reward model), Zheng et al. 2023 (MOSS-RLHF).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastrlhf.checkpoint.store import Checkpoint
from fastrlhf.config.inputs import check_arguments
from fastrlhf.config.stages import PPOConfig
from fastrlhf.data.encode import EncodedPrompt
from fastrlhf.data.prompt_format import disagreement
from fastrlhf.data.templates import stop_token_ids
from fastrlhf.models.token_batch import TokenRows, resolve_packing
from fastrlhf.parallel.sharding import dtype_of
from fastrlhf.preflight.stages import prepare_ppo
from fastrlhf.rl.advantages import KLController, RunningMoments
from fastrlhf.rl.alarms import Alarms
from fastrlhf.rl.critic import check_value_head
from fastrlhf.rl.critic_warmup import CriticPretraining
from fastrlhf.rl.evaluation import eval_temperature
from fastrlhf.rl.experience import Experience, make_experience, plan_epochs
from fastrlhf.rl.extras import ReferenceRefresh
from fastrlhf.rl.learner import Learner
from fastrlhf.rl.probe import probe_wanted, run_probe
from fastrlhf.rl.roles import load_roles
from fastrlhf.rollout.engine import RolloutEngine, position_limits
from fastrlhf.rollout.result import Rollout, ScoredRollout
from fastrlhf.rollout.sampling import SamplingParams
from fastrlhf.runtime import distributed
from fastrlhf.runtime.batching import ReplyLengths, Sampler, derive_seed
from fastrlhf.runtime.hardware import resolve_dtype
from fastrlhf.runtime.metrics import mean, throughput
from fastrlhf.runtime.optim import TrainedRole
from fastrlhf.trainer import PlannedTokens, Stateful, Step, TensorPart, Trainer, device_of, run_stage

EVAL_PROMPTS_SHOWN = 4


@dataclass
class PPOStep(Step):
    """The result of one step: metrics, timings, and the rollout with its scores."""

    rollout: ScoredRollout


class PPOTrainer(Trainer):
    """PPO on a causal LM. See docs/api.md for the config; `for step in trainer` or `trainer.train()` runs it.

    Raises UserError before any training for a missing model, reward or prompt set, or an option that cannot work.
    """

    best_metric = ("reward/eval", True)

    def __init__(
        self,
        config: PPOConfig,
        *,
        policy: str | PreTrainedModel,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        reward: Any,
        prompts: Any,
        ref_policy: str | PreTrainedModel | None = None,
        value_model: str | PreTrainedModel | None = None,
        eval_prompts: Any = None,
        ptx_data: Any = None,
        judge: Any = None,
    ) -> None:
        inputs = {
            "policy": policy,
            "tokenizer": tokenizer,
            "reward": reward,
            "prompts": prompts,
            "ref_policy": ref_policy,
            "value_model": value_model,
            "eval_prompts": eval_prompts,
            "ptx_data": ptx_data,
            "judge": judge,
        }
        # What the run reads.
        check_arguments(config, PPOConfig, inputs)
        ready = prepare_ppo(config, **inputs)
        tokenizer, self.evaluation = ready.tokenizer, ready.evaluation
        self.prompts, self.eval_prompts = ready.prompts, ready.eval_prompts
        self.reward_records = ready.reward_records

        # Services: run folder, tracker, memory policy, guard.
        super().__init__(
            config,
            inputs=inputs,
            tokenizer=tokenizer,
            total_steps=config.total_steps,
            device=device_of(policy),
            said=ready.said,
            rows=(ids for _, ids in (*self.prompts, *(self.eval_prompts or []))),
        )

        # Parts.
        self.moments, self.kl_controller = RunningMoments(), KLController(config)
        self.alarms = Alarms(self.tracker.event)
        roles = self.roles = load_roles(
            config,
            tokenizer,
            policy=policy,
            reward=ready.reward,
            ref_policy=ref_policy,
            value_model=value_model,
            memory=self.memory,
            device=self.device,
            report=self.tracker.note,
        )
        self.policy, self.critic, self.scorer = roles.policy, roles.critic, roles.scorer
        ready.fits(self.policy)
        for judge in (self.scorer, *(judge for _, judge in getattr(self.scorer, "parts", ()))):
            read_otherwise = disagreement(tokenizer, getattr(judge, "tokenizer", tokenizer), "reward")
            if read_otherwise:
                self.tracker.note(read_otherwise)
        shared = self.critic is not None and self.critic.shares_trunk
        head = self.critic.head if shared else None
        dtype = None if config.rollout_dtype is None else resolve_dtype(config.rollout_dtype)
        self.engine = RolloutEngine(self.policy, tokenizer, value_head=head, compile=config.compile, dtype=dtype)
        self.memory.spares += [self.engine.give_up, roles.offload.give_back]
        self.longest = _longest(config, [*self.prompts, *(self.eval_prompts or [])], self.policy)
        if not config.resume:  # a resumed run's checkpoint holds the result
            self.settle()
        readers = [model for model in (self.policy, roles.ref_policy, roles.value_model) if model is not None]
        self.joined = resolve_packing(config.packing, readers)
        self.sampler = Sampler(len(self.prompts), config.seed)
        self.lengths = ReplyLengths() if distributed.size() > 1 else None
        self.learner = Learner(
            config,
            roles,
            memory=self.memory,
            guard=self.guard,
            ptx_examples=ready.ptx_examples,
        )
        roles.compile_layers(config.compile, self.tracker.note)
        self.refresh = ReferenceRefresh(roles, config.ref_refresh_every) if config.ref_refresh_every else None
        self.pretraining: CriticPretraining | None = None
        if config.critic_pretrain_epochs:
            self.pretraining = CriticPretraining(config, self.learner, joined=self.joined)

    def settle(self) -> None:
        """Try how this run's longest sequences are generated, where that is not known yet. A run that was killed before
        its first checkpoint is resumed without knowing it."""
        note = self.engine.check(self.longest)
        if note:
            self.tracker.note(note)

    @property
    def ref_policy(self) -> PreTrainedModel | None:
        """The reference policy; None: it is the policy's base, or an adapter on it."""
        return self.roles.ref_policy

    @property
    def value_model(self) -> PreTrainedModel | None:
        """The model that the critic reads; None without a critic."""
        return self.roles.value_model

    # ------------------------------------------------------------------------------------------------------- one step

    def step(self) -> PPOStep:
        config, phase = self.config, self.tracker.phase
        with phase("rollout"):
            self.roles.offload.fetch(next(iter(self.scorer.models), self.ref_policy))
            indices = self.sampler.take(config.rollout_batch_size // config.samples_per_prompt)
            rollout = self._answers(indices)
        self.stop_together()
        with phase("score"):
            self.roles.offload.fetch(self.ref_policy)
            scores = self.scorer(rollout)
            self.alarms.after_scoring(rollout.scored(scores.values), self.steps_done + 1)
        self.stop_together()
        with phase("advantages"), self.roles.offload.here(self.ref_policy):  # moved once, not for each micro-batch
            epochs = plan_epochs(config, len(rollout.rows), self.steps_done)
            experience, metrics = make_experience(
                rollout,
                scores,
                self.roles,
                config,
                kl_coef=self.kl_controller.coef,
                moments=self.moments,
                first_epoch=epochs[0],
                memory=self.memory,
            )
        self.stop_together()
        with phase("update"):
            metrics |= self.learner.update(rollout.rows, experience, epochs, self.steps_done)
            metrics |= self._after_update(rollout.rows, experience)
        self.alarms.after_learning(metrics["rollout/mismatch"], dtype_of(self.engine.model), self._cause_of_mismatch)
        metrics |= {
            **({} if scores.spread is None else {"reward/ensemble_sd": scores.spread}),
            "length/mean": mean([float(len(ids)) for ids in rollout.response_ids]),
            "length/finished": mean([float(finished) for finished in rollout.finished]),
            "update/skipped": float(self.guard.updates_skipped),
            "update/left_out": float(self.guard.rows_left_out),
        }
        self.alarms.stop_if_runaway(metrics, config, self._last_checkpoint)
        self._after_kl(metrics["kl/ref"])
        self.steps_done += 1
        timings = throughput("perf/rollout_tokens", rollout.stats["new_tokens"], self.device)
        timings |= {} if rollout.idle is None else {"perf/rollout_idle": rollout.idle}
        return PPOStep(metrics, timings, rollout.scored(scores.values))

    def _answers(self, indices: Sequence[int]) -> Rollout:
        """The rollout of these prompts; of several ranks each samples what is expected to take it as long."""
        prompts, samples = [self.prompts[i] for i in indices], self.config.samples_per_prompt
        if self.lengths is None:
            return self.rollout(prompts, samples, purpose="rollout")
        expected = self.lengths.expected(indices, self.config.max_new_tokens)
        rollout = self.rollout(prompts, samples, purpose="rollout", expected=expected)
        self.lengths.note(indices, [len(ids) for ids in rollout.response_ids])
        return rollout

    def rollout(
        self,
        prompts: Sequence[EncodedPrompt],
        samples: int,
        *,
        purpose: str,
        engine: RolloutEngine | None = None,
        temperature: float | None = None,
        expected: Sequence[float] | None = None,
    ) -> Rollout:
        """Sample `samples` responses to each prompt with the current weights (engine: of another model). expected: see
        `RolloutEngine.rollout`."""
        config, engine = self.config, engine or self.engine
        params = SamplingParams(
            max_new_tokens=config.max_new_tokens,
            n=samples,
            temperature=config.temperature if temperature is None else temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            stop_token_ids=stop_token_ids(self.tokenizer, self.policy.generation_config),
            seed=derive_seed(config.seed, purpose, self.steps_done if purpose == "rollout" else 0),
        )
        rollout = engine.rollout(prompts, params, joined=self.joined, expected=expected)
        engine.release()  # scoring and the update need the memory
        return rollout

    def _after_update(self, rows: TokenRows, experience: Experience) -> dict[str, float]:
        """Passes of the critic at the end of its warm-up, and a reference that follows -> metrics."""
        metrics: dict[str, float] = {}
        warmup, done = self.config.critic_warmup_steps, self.steps_done + 1
        if self.pretraining is not None and done <= warmup:
            self.pretraining.keep(rows, experience)
            if done == warmup:
                metrics = self.pretraining.run()
        if self.refresh is not None and self.refresh.after_step(done):
            self.learner.policy_optimizer.forget_moments()
            sentence = f"the policy after step {done} is the reference now, and its optimizer starts anew"
            self.tracker.event("ref_refresh", sentence)
        return metrics

    def _cause_of_mismatch(self) -> str:
        """Why sampling and learning differ, as far as another try with the weights of now can tell."""
        name, difference = type(self.policy).__name__, self.engine.difference(self.longest)
        if not difference.agrees:
            return f"decoding of {name} differs from its plain forward by {difference}; stop the run, use another model"
        dtype = dtype_of(self.engine.model)
        if dtype == torch.float32:
            return (
                f"decoding of {name} agrees with its plain forward ({difference}), so its weights changed between "
                "sampling and learning; does a reward function or a hook write to them?"
            )
        return (
            f"decoding of {name} agrees with its plain forward within what {dtype} rounds ({difference}): "
            "as log-probs grow, so does their rounding; set importance_cap, which corrects for it, or "
            + ("dtype=fp32" if self.engine.model is self.policy else "leave rollout_dtype out")
        )

    def _last_checkpoint(self) -> str:
        """What there is to go on from, in words."""
        latest = None if self.store is None else self.store.latest()
        return "no checkpoint was written yet" if latest is None else f"the last checkpoint is {latest.path}"

    def _after_kl(self, kl: float) -> None:
        """The controller looks at the step's KL; beyond kl_budget this step is the last one."""
        self.kl_controller.update(kl)
        budget = self.config.kl_budget
        if budget is not None and kl > budget:
            self.last_step = self.steps_done + 1
            sentence = f"kl/ref = {kl:.3g} is above kl_budget = {budget:g}: this step is the last"
            self.tracker.event("kl_budget", sentence)

    def __iter__(self) -> Iterator[PPOStep]:
        if self.steps_done == 0:
            self.alarms.compare_prompts(self.prompts, self.eval_prompts)
            self.alarms.doubt_reward_models(self.reward_records)
        if probe_wanted(self.config, self.device) and self.steps_done < self.total_steps:
            run_probe(self.learner, self.engine, joined=self.joined, note=self.tracker.note)
        return super().__iter__()

    # ----------------------------------------------------------------------------------------------------- evaluation

    def evaluate(self) -> dict[str, float]:
        """Sample one response to each held-out prompt, always from the same random numbers, and score it.

        Without eval_prompts the first training prompts are answered, for the table of samples only.
        """
        prompts = self.eval_prompts or self.prompts[:EVAL_PROMPTS_SHOWN]
        with self.averaged():
            rollout = self.rollout(prompts, 1, purpose="eval", temperature=eval_temperature(self.config))
        replies = rollout.scored(self.scorer(rollout).values)
        shown = zip(replies.prompts, replies.responses, replies.scores, strict=True)
        rows = [{"prompt": p, "response": r, "score": s} for p, r, s in shown]
        self.tracker.samples(self.steps_done, rows[:EVAL_PROMPTS_SHOWN])
        if self.eval_prompts is None:
            return {}
        return self.evaluation.metrics(replies, self._reference_replies, self.tracker.event)

    def _reference_replies(self, samples: int, *, purpose: str, temperature: float) -> ScoredRollout:
        """Scored replies of the reference policy to the held-out prompts."""
        with self.roles.reference() as model:
            engine = RolloutEngine(model, self.tokenizer)
            rollout = self.rollout(self.eval_prompts, samples, purpose=purpose, engine=engine, temperature=temperature)
        return rollout.scored(self.scorer(rollout).values)

    # ---------------------------------------------------------------------------------------------------- checkpoints

    def averaged(self) -> AbstractContextManager[None]:
        return self.learner.averaged()

    def trained(self) -> dict[str, TrainedRole]:
        return self.learner.trained()

    def _restore(self, checkpoint: Checkpoint) -> None:
        if self.critic is not None and self.critic.shares_trunk:
            check_value_head(checkpoint.tensors("weights_value"), str(checkpoint.path))
        if self.lengths is not None:  # one process has none to save, nor had earlier versions
            checkpoint.state["parts"].setdefault("lengths", self.lengths.state())
        super()._restore(checkpoint)

    def parts(self) -> dict[str, Stateful]:
        parts = {
            "sampler": self.sampler,
            "moments": self.moments,
            "kl": self.kl_controller,
            "learner": self.learner,
            "ptx": self.learner.ptx,
            "evaluation": self.evaluation,
            "alarms": self.alarms,
            "engine": self.engine,
            "lengths": self.lengths,
        }
        return {name: part for name, part in parts.items() if part is not None}

    def tensor_parts(self) -> dict[str, TensorPart]:
        parts = {"ema": self.learner.average, "reference": self.refresh, "critic_pretraining": self.pretraining}
        return {name: part for name, part in parts.items() if part is not None}


def _longest(config: PPOConfig, prompts: Sequence[EncodedPrompt], policy: PreTrainedModel) -> int:
    """Tokens of the longest sequence that this run can sample."""
    longest = max(len(ids) for _, ids in prompts) + config.max_new_tokens
    return int(min(longest, position_limits(policy)))


def main(inputs: dict[str, Any], config: PPOConfig, tokens: PlannedTokens | None = None) -> int:
    """`fastrlhf ppo`: train and write output_dir/final -> exit code."""
    return run_stage(PPOTrainer, inputs, config, tokens)
