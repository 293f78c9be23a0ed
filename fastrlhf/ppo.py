"""Stage 3: PPO. One step, top to bottom: rollout -> score -> experience -> update.

Left out on purpose: no inference server (the training weights generate), no logits tensor (the fused linear loss), no
callbacks (iterate over the trainer). Formulas: Schulman et al. 2017 (clip), Stiennon et al. 2020 (KL in the reward,
separate critic initialised from the reward model), Zheng et al. 2023 (MOSS-RLHF).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastrlhf.config.stages import PPOConfig
from fastrlhf.data.encode import load_encoded_prompts, load_ptx
from fastrlhf.data.feedback import Prompt
from fastrlhf.data.templates import render_prompt, resolve_chat_template, stop_token_ids
from fastrlhf.models import loading
from fastrlhf.models.backbone import same_base
from fastrlhf.models.token_batch import resolve_packing, response_log_probs
from fastrlhf.rl import advantages, scorers
from fastrlhf.rl.advantages import KLController
from fastrlhf.rl.evaluation import Evaluation, eval_temperature
from fastrlhf.rl.experience import Experience, Rollout, length_mask, scatter
from fastrlhf.rl.hooks import Extras
from fastrlhf.rl.learner import Learner
from fastrlhf.rl.probe import run_probe, wanted
from fastrlhf.rl.roles import load_roles
from fastrlhf.rl.scorers import RewardModelScorer, Scorable, make_scorer, split_rewards
from fastrlhf.rollout import gather
from fastrlhf.rollout.engine import RolloutEngine
from fastrlhf.rollout.sampling import SamplingParams
from fastrlhf.runtime import distributed
from fastrlhf.runtime.batching import Sampler, derive_seed, minibatches
from fastrlhf.runtime.metrics import mean, mismatch_metrics, rollout_metrics, throughput
from fastrlhf.runtime.optim import Trained
from fastrlhf.trainer import Run, run_stage

EVAL_PROMPTS_SHOWN = 4


@dataclass
class PPOStep:
    """The result of one step: metrics the seed determines, timings the machine does, and the rollout itself."""

    metrics: dict[str, float]
    timings: dict[str, float]
    rollout: Rollout


class PPOTrainer:
    """PPO on a causal LM. See docs/api.md for the config; `for step in trainer` or `trainer.train()` runs it.

    Raises UserError before any training for a missing model, reward or prompt set, or an option that cannot work.
    """

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
        self.config, self.total_steps = config, config.total_steps
        self.inputs = {
            "policy": policy, "tokenizer": tokenizer, "reward": reward, "prompts": prompts,
            "ref_policy": ref_policy, "value_model": value_model, "eval_prompts": eval_prompts, "ptx_data": ptx_data,
            "judge": judge,
        }  # fmt: skip
        self.best_metric = ("reward/eval", True)
        self.evaluation = Evaluation(config, judge, prompts=eval_prompts is not None)
        self.tokenizer = loading.tokenizer_for(tokenizer, policy)
        template = resolve_chat_template(self.tokenizer, config.chat_template)
        notes = [f"chat template: {template}"]
        self.prompts, note = load_encoded_prompts(config, self.tokenizer, prompts, "prompts")
        self.eval_prompts, eval_note = load_encoded_prompts(config, self.tokenizer, eval_prompts, "eval_prompts")
        ptx_examples, ptx_note = load_ptx(config, self.tokenizer, ptx_data)
        notes += [n for n in (note, eval_note, ptx_note) if n]
        self._load_models(policy, reward, ref_policy, value_model)
        self.sampler = Sampler(len(self.prompts), config.seed)
        self.moments = advantages.RunningMoments()
        self.kl_controller = KLController(config)
        self.learner = Learner(config, self.policy, self.critic, self.roles.adapters)
        self.backoff = self.learner.backoff
        if isinstance(self.scorer, RewardModelScorer):
            self.scorer.backoff = self.backoff
        self.extras = Extras(config, self.roles, self.learner, ptx_examples)
        self.run = Run(self)
        self.run.averaged = self.extras.averaged
        self.learner.report = self.backoff.report = self.run.tracker.event
        if self.roles.adapters is not None:
            notes += self.roles.adapters.notes(self.run.tracker.note)
        for text in notes:
            self.run.tracker.note(text)

    def _load_models(self, policy: Any, reward: Any, ref_policy: Any, value_model: Any) -> None:
        config = self.config
        on_base = reward if config.lora is not None and same_base(policy, reward) else None
        self.scorer = make_scorer(
            reward, self.tokenizer, dtype=config.dtype, attention=config.attention,
            micro_batch_tokens=config.micro_batch_tokens, on_base=on_base is not None,
        )  # fmt: skip
        roles = self.roles = load_roles(config, self.tokenizer, self.scorer, policy, ref_policy, value_model, on_base)
        self.policy, self.critic = roles.policy, roles.critic
        self.value_model = None if self.critic is None else self.critic.trunk
        self.device = self.policy.device
        self.stop_ids = stop_token_ids(self.tokenizer, self.policy.generation_config)
        shared = self.critic is not None and self.critic.shares_trunk
        self.engine = RolloutEngine(self.policy, self.tokenizer, value_head=self.critic.head if shared else None)
        readers = [self.policy, self.ref_policy, self.value_model]
        self.packed = resolve_packing(config.packing, [model for model in readers if model is not None])
        if config.offload:
            for model in filter(None, (self.ref_policy, self.scorer.model)):
                roles.offload.park(model)

    @property
    def ref_policy(self) -> PreTrainedModel | None:
        """None: the policy's base, or an adapter on it."""
        return self.roles.ref_policy

    # ------------------------------------------------------------------------------------------------- the user's end

    def __iter__(self) -> Iterator[PPOStep]:
        if wanted(self.config, self.device) and self.run.step < self.total_steps:
            run_probe(self.learner, self.engine, packed=self.packed, note=self.run.tracker.note)
        return self.run.steps()

    def train(self) -> dict[str, float]:
        """Run every remaining step -> the metrics of the last one."""
        summary: dict[str, float] = {}
        for step in self:
            summary = step.metrics
        return summary

    def save(self, folder: str | Path, *, adapter: bool = False) -> None:
        """Weights (an adapter merged into them), tokenizer, chat template and generation config, as stock transformers
        loads them. adapter: the LoRA adapter alone, as peft loads it; UserError without `lora`."""
        self.run.export(folder, adapter=adapter)

    # ------------------------------------------------------------------------------------------------------- one step

    def run_step(self) -> PPOStep:
        config, phase = self.config, self.run.tracker.phase
        with phase("rollout"):
            picked = self.sampler.take(config.rollout_batch_size // config.samples_per_prompt)
            chosen = [self.prompts[i] for i in picked]
            rollout, generation = self._rollout(chosen, config.samples_per_prompt, purpose="rollout")
            self.engine.release()  # the update needs the memory
        with phase("score"):
            rollout.scores = self._score(rollout)
        with phase("advantages"), self.roles.offload.here(self.ref_policy):  # moved once, not for each micro-batch
            plan = self._plan(rollout)
            experience, metrics = self._experience(rollout, plan[0])
        with phase("update"):
            metrics |= self.learner.update(rollout, experience, plan, self.run.step)
            metrics |= self.extras.after_update(rollout, experience, self.run.step)
        self._after_kl(metrics["kl/ref"])
        metrics |= {
            "length/mean": mean([float(len(r)) for r in rollout.response_ids]),
            "length/finished": mean([float(f) for f in rollout.finished]),
            "update/skipped": float(self.learner.guard.skipped),
        }
        return PPOStep(metrics, throughput("perf/rollout_tokens", generation["new_tokens"], self.device), rollout)

    def _after_kl(self, kl: float) -> None:
        """The controller looks at the step's KL; beyond kl_budget this step is the last one."""
        self.kl_controller.update(kl)
        budget = self.config.kl_budget
        if budget is not None and kl > budget:
            self.total_steps = self.run.step + 1
            sentence = f"kl/ref = {kl:.3g} is above kl_budget = {budget:g}: this step is the last"
            self.run.tracker.event("kl_budget", sentence)

    def _rollout(
        self,
        chosen: list[tuple[Prompt, list[int]]],
        samples: int,
        *,
        purpose: str,
        engine: RolloutEngine | None = None,
        temperature: float | None = None,
    ) -> tuple[Rollout, dict[str, float]]:
        """Sample `samples` responses to each prompt with the current weights (engine: of another model)."""
        config = self.config
        params = SamplingParams(
            max_new_tokens=config.max_new_tokens,
            n=samples,
            temperature=config.temperature if temperature is None else temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            stop_token_ids=self.stop_ids,
            seed=derive_seed(config.seed, purpose, self.run.step if purpose == "rollout" else 0),
        )
        out = gather.generate(engine or self.engine, [ids for _, ids in chosen], params)
        rows = [pair for pair in chosen for _ in range(samples)]
        columns = {name: [p.columns.get(name) for p, _ in rows] for name in sorted(chosen[0][0].columns)}
        rollout = Rollout(
            prompts=[render_prompt(self.tokenizer, p.prompt) for p, _ in rows],
            raw_prompts=[p.prompt for p, _ in rows],
            samples_per_prompt=samples,
            columns=columns,
            prompt_ids=[ids for _, ids in rows],
            response_ids=out.response_ids,
            responses=[self.tokenizer.decode(ids, skip_special_tokens=True) for ids in out.response_ids],
            finished=out.finished,
            log_probs=out.log_probs,
            policy_log_probs=out.policy_log_probs,
            values=out.values,
            packed=self.packed,
        )
        return rollout, out.stats

    def _score(self, rollout: Rollout) -> list[float | None]:
        """-> scores; rewards of single tokens, where a function gives them, go to rollout.token_rewards."""
        names = ("prompts", "responses", "raw_prompts", "prompt_ids", "response_ids", "columns")
        batch = Scorable(**{name: getattr(rollout, name) for name in names})
        with self.roles.offload.here(self.scorer.model):
            rewards = scorers.score(self.scorer, batch, rollout.samples_per_prompt)
        scores, tokens = split_rewards(rewards, rollout.response_ids)
        rollout.token_rewards = tokens if self.scorer.per_token else None
        return scores

    def _plan(self, rollout: Rollout) -> list[list[list[int]]]:
        """The rows of each mini-batch of each epoch, of all ranks; depends on seed, step and their number only."""
        config, count = self.config, len(rollout.response_ids)
        plan = []
        for epoch in range(config.ppo_epochs):
            draw = torch.Generator().manual_seed(derive_seed(config.seed, "order", self.run.step, epoch))
            order = torch.randperm(count, generator=draw).tolist()
            plan.append(minibatches(count, config.mini_batch_size, order))
        return plan

    # ----------------------------------------------------------------------------------------------------- experience

    @torch.no_grad()
    def _forwards(self, rollout: Rollout, epoch: list[list[int]], mask: Tensor) -> list[Tensor | None]:
        """Old and reference log-probs, values [B, T], values of the state behind each response [B]; None: not needed.

        Computed over the very micro-batches of the first epoch, so that its ratio is exactly 1, not 1 + rounding. Only
        this rank's rows, zero elsewhere.
        """
        config, critic, fresh = self.config, self.critic, self.config.old_log_probs == "recompute"
        old, ref = torch.zeros(2, *mask.shape, device=self.device)
        decoded = critic is not None and critic.shares_trunk and not fresh
        values = None if critic is None or decoded else torch.zeros_like(old)
        ends = torch.zeros(len(mask), device=self.device) if config.bootstrap_truncated else None
        for rows in (rows for mini in epoch for rows in rollout.micro_batches(mini, self.backoff.tokens)):
            batch, own = rollout.tokens(rows, self.device), mask[rows]
            if fresh:
                hidden = batch.hidden(self.policy)
                old[rows] = scatter(response_log_probs(self.policy, batch, config.temperature, hidden), own)
                if critic is not None and critic.shares_trunk:
                    values[rows] = scatter(critic.read(hidden), own)
            if critic is not None and not critic.shares_trunk:
                values[rows] = scatter(critic.values(batch), own)
            if ends is not None:
                ends[rows] = critic.end_values(rollout, rows)
            with self.roles.reference() as model:
                ref[rows] = scatter(response_log_probs(model, batch, config.temperature), own)
        return [old, ref, values, ends]

    @torch.no_grad()
    def _experience(self, rollout: Rollout, epoch: list[list[int]]) -> tuple[Experience, dict[str, float]]:
        """What the update needs. epoch: the mini-batches of the first pass, as rows of all ranks."""
        config, fresh = self.config, self.config.old_log_probs == "recompute"
        mask = length_mask([len(r) for r in rollout.response_ids], self.device)
        rollout_log_probs = scatter(torch.cat(rollout.policy_log_probs).to(self.device), mask)
        computed = self.backoff.attempt(partial(self._forwards, rollout, epoch, mask))
        distributed.add_up(*(tensor for tensor in computed if tensor is not None))
        old, ref, values, ends = computed
        if values is None and self.critic is not None:  # decoding computed them
            values = scatter(torch.cat(rollout.values).to(self.device), mask)
        weights, mismatch = None, {}
        if not fresh:  # the ratio is against the sampler itself; the learner measures
            old = rollout_log_probs
        else:
            mismatch = mismatch_metrics(old[mask], rollout_log_probs[mask])
            if config.importance_cap is not None:  # sampled by decoding, old by training (Yao et al. 2025, TIS)
                weights = (old - rollout_log_probs).exp().clamp(max=config.importance_cap)
        raw = torch.tensor([float("nan") if s is None else s for s in rollout.scores], device=self.device)
        metrics = rollout_metrics(raw, old, ref, rollout_log_probs, rollout.log_probs, mask)
        counted = mask & raw.isfinite()[:, None]
        finished = torch.tensor(rollout.finished, device=self.device)
        shaped = advantages.shape_scores(raw, finished, config, self.moments, mask.sum(1).float())
        tokens = rollout.token_rewards  # in the scale of the scores
        tokens = tokens and scatter(torch.cat(tokens).to(self.device) / self.moments.std, mask)
        gains, returns = advantages.estimate(
            shaped, old, ref, values, counted, config, self.kl_controller.coef,
            token_rewards=tokens, bootstrap_values=ends,
        )  # fmt: skip
        metrics["kl/coef"] = self.kl_controller.coef
        return Experience(mask, counted, old, ref, values, gains, returns, weights), metrics | mismatch

    # ------------------------------------------------------------------------------------- evaluation and checkpoints

    def evaluate(self) -> dict[str, float]:
        """Sample one response to each held-out prompt, always from the same random numbers, and score it.

        Without eval_prompts the first training prompts are answered, for the table of samples only.
        """
        chosen = self.eval_prompts or self.prompts[:EVAL_PROMPTS_SHOWN]
        with self.extras.averaged():
            rollout, _ = self._rollout(chosen, 1, purpose="eval", temperature=eval_temperature(self.config))
        self.engine.release()  # a reward model may need the memory
        rollout.scores = self._score(rollout)
        shown = zip(rollout.prompts, rollout.responses, rollout.scores, strict=True)
        rows = [{"prompt": p, "response": r, "score": s} for p, r, s in shown]
        self.run.tracker.samples(self.run.step, rows[:EVAL_PROMPTS_SHOWN])
        if self.eval_prompts is None:
            return {}
        return self.evaluation.metrics(rollout, self._reference_replies, self.run.tracker.event)

    def _reference_replies(self, samples: int, *, purpose: str, temperature: float) -> Rollout:
        """Scored replies of the reference policy to the held-out prompts."""
        with self.roles.reference() as model:
            engine = RolloutEngine(model, self.tokenizer)
            rollout, _ = self._rollout(
                self.eval_prompts, samples, purpose=purpose, engine=engine, temperature=temperature
            )
            engine.release()
        rollout.scores = self._score(rollout)
        return rollout

    def trained(self) -> dict[str, Trained]:
        return self.learner.trained()

    def state(self) -> dict[str, Any]:
        parts = {"moments": self.moments, "kl": self.kl_controller, "learner": self.learner, "extras": self.extras}
        parts["evaluation"] = self.evaluation
        last = self.total_steps if self.total_steps != self.config.total_steps else None  # of a spent kl_budget
        return {
            "sampler": self.sampler.state_dict(), "last": last, **{name: part.state() for name, part in parts.items()}
        }  # fmt: skip

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        return self.extras.tensors()

    def load_state(self, state: dict[str, Any], tensors: Callable[[str], dict[str, Tensor]]) -> None:
        self.sampler.load_state_dict(state["sampler"])
        self.total_steps = state["last"] or self.total_steps
        self.moments.load_state(state["moments"])
        self.kl_controller.load_state(state["kl"])
        self.learner.load_state(state["learner"])
        self.evaluation.load_state(state["evaluation"])
        self.extras.load_state(state["extras"], tensors)


def main(inputs: dict[str, Any], config: PPOConfig) -> int:
    """`fastrlhf ppo`: train and write output_dir/final -> exit code."""
    return run_stage(PPOTrainer, inputs, config)
