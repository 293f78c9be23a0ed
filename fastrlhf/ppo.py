"""Stage 3: PPO. One step, top to bottom: rollout -> score -> experience -> update.

Left out on purpose: no inference server (the training weights generate), no logits tensor (the fused linear loss), no
callbacks (iterate over the trainer). Formulas: Schulman et al. 2017 (clip), Stiennon et al. 2020 (KL in the reward,
separate critic initialised from the reward model), Zheng et al. 2023 (MOSS-RLHF).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastrlhf import advantages, models
from fastrlhf.adapters import POLICY
from fastrlhf.batch import Experience, Rollout, length_mask, minibatches, scatter
from fastrlhf.config import PPOConfig, UserError
from fastrlhf.data import Sampler, encode_rows, load_prompts
from fastrlhf.feedback import Prompt
from fastrlhf.folders import replace_folder
from fastrlhf.kl_control import KLController
from fastrlhf.learner import Learner, response_log_probs
from fastrlhf.optim import Trained, micro_batches, token_budget
from fastrlhf.rewards import Scorable, make_scorer
from fastrlhf.roles import load_roles
from fastrlhf.rollout import RolloutEngine, SamplingParams, derive_seed
from fastrlhf.run import Run, run_stage
from fastrlhf.stats import distinct_2, mean, mismatch_metrics, rollout_metrics, throughput
from fastrlhf.templates import encode_prompt, render_prompt, resolve_chat_template, stop_token_ids

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
        self.tokenizer = models.tokenizer_for(tokenizer, policy)
        template = resolve_chat_template(self.tokenizer, config.chat_template)
        notes = [f"chat template: {template}"]
        self.prompts, note = self._load_prompts(prompts, "prompts")
        self.eval_prompts, eval_note = (None, "") if eval_prompts is None else self._load_prompts(
            eval_prompts, "eval_prompts"
        )  # fmt: skip
        notes += [n for n in (note, eval_note) if n]
        self._load_models(policy, reward, ref_policy, value_model)
        self.sampler = Sampler(len(self.prompts), config.seed)
        self.moments = advantages.RunningMoments()
        self.kl_controller = KLController(config)
        self.learner = Learner(config, self.policy, self.critic, self.roles.adapters)
        self.run = Run(self)
        self.learner.report = self.run.tracker.event
        for text in notes:
            self.run.tracker.note(text)

    def _load_models(self, policy: Any, reward: Any, ref_policy: Any, value_model: Any) -> None:
        config = self.config
        how = (config.dtype, config.attention)
        self.scorer = make_scorer(
            reward,
            self.tokenizer,
            dtype=how[0],
            attention=how[1],
            micro_batch_tokens=config.micro_batch_tokens,
        )
        roles = self.roles = load_roles(config, self.tokenizer, self.scorer, policy, ref_policy, value_model)
        self.policy, self.ref_policy, self.critic = roles.policy, roles.ref_policy, roles.critic
        self.value_model = None if self.critic is None else self.critic.trunk
        self.device = self.policy.device
        self.stop_ids = stop_token_ids(self.tokenizer, self.policy.generation_config)
        shared = self.critic is not None and self.critic.shares_trunk
        self.engine = RolloutEngine(self.policy, self.tokenizer, value_head=self.critic.head if shared else None)
        self.budget = token_budget(config.micro_batch_tokens, self.device)

    def _load_prompts(self, source: Any, role: str) -> tuple[list[tuple[Prompt, list[int]]], str]:
        prompts, counts = load_prompts(source, skip_bad_rows=self.config.skip_bad_rows)
        limit = self.config.max_prompt_tokens
        rows = encode_rows(
            prompts, lambda p: encode_prompt(self.tokenizer, p.prompt), counts, self.config.skip_bad_rows
        )
        encoded = list(rows)
        kept = [pair for pair in encoded if len(pair[1]) <= limit]
        if len(kept) < len(encoded):
            counts.add(f"longer than max_prompt_tokens = {limit}", len(encoded) - len(kept))
        if not kept:
            if not encoded:
                raise UserError(f"{role}: nothing left to train on ({counts.line()})")
            shortest = min(len(ids) for _, ids in encoded)
            raise UserError(
                f"{role}: every prompt is longer than max_prompt_tokens = {limit} (the shortest: {shortest}); raise it"
            )
        return kept, f"{role}: {counts.line()}"

    # ------------------------------------------------------------------------------------------------- the user's end

    def __iter__(self) -> Iterator[PPOStep]:
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
        if not adapter:
            self.run.export(folder)
        elif self.roles.adapters is None:
            raise UserError("save: adapter=True needs a run with lora; this one trains all weights")
        else:
            base = self.policy.config._name_or_path
            replace_folder(lambda target: self.roles.adapters.write(target, POLICY, base), Path(folder))

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
        with phase("advantages"):
            plan = self._plan(rollout)
            experience, metrics = self._experience(rollout, plan[0])
        with phase("update"):
            metrics |= self.learner.update(rollout, experience, plan, self.run.step)
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
        self, chosen: list[tuple[Prompt, list[int]]], samples: int, *, purpose: str
    ) -> tuple[Rollout, dict[str, float]]:
        """Sample `samples` responses to each prompt with the current weights."""
        config = self.config
        params = SamplingParams(
            max_new_tokens=config.max_new_tokens,
            n=samples,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            stop_token_ids=self.stop_ids,
            seed=derive_seed(config.seed, purpose, self.run.step if purpose == "rollout" else 0),
        )
        out = self.engine.generate([ids for _, ids in chosen], params)
        rows = [pair for pair in chosen for _ in range(samples)]
        columns = {name: [p.columns.get(name) for p, _ in rows] for name in sorted(chosen[0][0].columns)}
        rollout = Rollout(
            prompts=[render_prompt(self.tokenizer, p.prompt) for p, _ in rows],
            raw_prompts=[p.prompt for p, _ in rows],
            columns=columns,
            prompt_ids=[ids for _, ids in rows],
            response_ids=out.response_ids,
            responses=[self.tokenizer.decode(ids, skip_special_tokens=True) for ids in out.response_ids],
            finished=out.finished,
            log_probs=out.log_probs,
            policy_log_probs=out.policy_log_probs,
            values=out.values,
        )
        return rollout, out.stats

    def _score(self, rollout: Rollout) -> list[float | None]:
        names = ("prompts", "responses", "raw_prompts", "prompt_ids", "response_ids", "columns")
        return self.scorer(Scorable(**{name: getattr(rollout, name) for name in names}))

    def _plan(self, rollout: Rollout) -> list[list[list[list[int]]]]:
        """Row numbers as [epoch][mini-batch][micro-batch][row]; depends on seed, step and lengths only."""
        config, count = self.config, len(rollout.response_ids)
        lengths = [len(p) + len(r) for p, r in zip(rollout.prompt_ids, rollout.response_ids, strict=True)]
        plan = []
        for epoch in range(config.ppo_epochs):
            draw = torch.Generator().manual_seed(derive_seed(config.seed, "order", self.run.step, epoch))
            order = torch.randperm(count, generator=draw).tolist()
            cut = minibatches(count, config.mini_batch_size, order)
            plan.append([[[m[i] for i in g] for g in micro_batches([lengths[r] for r in m], self.budget)] for m in cut])
        return plan

    # ----------------------------------------------------------------------------------------------------- experience

    @torch.no_grad()
    def _experience(self, rollout: Rollout, epoch: list[list[list[int]]]) -> tuple[Experience, dict[str, float]]:
        """Old and reference log-probs, values, advantages.

        Computed over the very micro-batches of the first epoch, so that its ratio is exactly 1, not 1 + rounding.
        """
        config = self.config
        mask = length_mask([len(r) for r in rollout.response_ids], self.device)
        rollout_log_probs = scatter(torch.cat(rollout.policy_log_probs).to(self.device), mask)
        old, ref = torch.zeros_like(rollout_log_probs), torch.zeros_like(rollout_log_probs)
        critic, fresh = self.critic, config.old_log_probs == "recompute"
        values = None if critic is None else torch.zeros_like(old)
        if critic is not None and critic.shares_trunk and not fresh:  # decoding computed them
            values = scatter(torch.cat(rollout.values).to(self.device), mask)
        for rows in (rows for mini in epoch for rows in mini):
            batch, own = rollout.tokens(rows, self.device), mask[rows]
            if fresh:
                hidden = batch.hidden(self.policy)
                old[rows] = scatter(response_log_probs(self.policy, batch, config.temperature, hidden), own)
                if critic is not None and critic.shares_trunk:
                    values[rows] = scatter(critic.read(hidden), own)
            if critic is not None and not critic.shares_trunk:
                values[rows] = scatter(critic.values(batch), own)
            with self.roles.reference() as model:
                ref[rows] = scatter(response_log_probs(model, batch, config.temperature), own)
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
        gains, returns = advantages.estimate(shaped, old, ref, values, counted, config, self.kl_controller.coef)
        metrics["kl/coef"] = self.kl_controller.coef
        return Experience(mask, counted, old, ref, values, gains, returns, weights), metrics | mismatch

    # ------------------------------------------------------------------------------------- evaluation and checkpoints

    def evaluate(self) -> dict[str, float]:
        """Sample one response to each held-out prompt, always from the same random numbers, and score it.

        Without eval_prompts the first training prompts are answered, for the table of samples only.
        """
        rollout, _ = self._rollout(self.eval_prompts or self.prompts[:EVAL_PROMPTS_SHOWN], 1, purpose="eval")
        scores = self._score(rollout)
        shown = zip(rollout.prompts, rollout.responses, scores, strict=True)
        rows = [{"prompt": p, "response": r, "score": s} for p, r, s in shown]
        self.run.tracker.samples(self.run.step, rows[:EVAL_PROMPTS_SHOWN])
        if self.eval_prompts is None:
            return {}
        return {
            "reward/eval": mean([s for s in scores if s is not None]),
            "length/eval": mean([float(len(r)) for r in rollout.response_ids]),
            "length/finished_eval": mean([float(f) for f in rollout.finished]),
            "distinct2/eval": distinct_2(rollout.responses),
        }

    def trained(self) -> dict[str, Trained]:
        return self.learner.trained()

    def state(self) -> dict[str, Any]:
        parts = {"moments": self.moments, "kl": self.kl_controller, "learner": self.learner}
        return {"sampler": self.sampler.state_dict(), **{name: part.state() for name, part in parts.items()}}

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        return {}

    def load_state(self, state: dict[str, Any], tensors: Callable[[str], dict[str, Tensor]]) -> None:
        self.sampler.load_state_dict(state["sampler"])
        self.moments.load_state(state["moments"])
        self.kl_controller.load_state(state["kl"])
        self.learner.load_state(state["learner"])


def main(inputs: dict[str, Any], config: PPOConfig) -> int:
    """`fastrlhf ppo`: train and write output_dir/final -> exit code."""
    return run_stage(PPOTrainer, inputs, config)
