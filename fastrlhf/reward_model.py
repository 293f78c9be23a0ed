"""Stage 2: a reward model from human feedback: pairs, edits, K-way rankings and scores, mixed in one data set.

Each record weighs the same. Preferences: Plackett-Luce (for two responses Bradley-Terry), in fp32 through logsigmoid
and logsumexp, so that badly misranked pairs keep their gradient. Scores: squared error to the score in [-1, 1].
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastrlhf.config.errors import UserError
from fastrlhf.config.stages import RewardConfig
from fastrlhf.data.dataset import Counts, encode_rows, load_feedback, split_heldout
from fastrlhf.data.feedback import Feedback
from fastrlhf.data.templates import encode_prompt, encode_response, resolve_chat_template
from fastrlhf.models import heads, loading
from fastrlhf.models.backbone import load_scalar_backbone
from fastrlhf.models.lora import REWARD
from fastrlhf.models.saving import padding_tokenizer
from fastrlhf.rl.scorers import score_rows
from fastrlhf.runtime import batching, distributed
from fastrlhf.runtime.batching import Sampler
from fastrlhf.runtime.guards import UpdateGuard, check_rows
from fastrlhf.runtime.memory import Backoff
from fastrlhf.runtime.metrics import throughput
from fastrlhf.runtime.optim import Optimizer, Trained, lr_at, optimizer_options
from fastrlhf.trainer import Run, run_stage

MARGIN_EDGES = (-4.0, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 4.0)


@dataclass(frozen=True)
class Record:
    """One feedback record as token rows (prompt + response, one a response)."""

    rows: list[list[int]]
    feedback: Feedback


@dataclass
class RewardStep:
    metrics: dict[str, float]
    timings: dict[str, float]


def preference_loss(scores: Tensor, ranking: Sequence[Sequence[int]], margin: float | None = None) -> Tensor:
    """Negative log-likelihood of a ranking under Plackett-Luce, averaged over its stages; scores [K] fp32 -> 0-d.

    Stage g: each response of group g is preferred to all of later groups: -log(e^s_i / (e^s_i + sum_later e^s_j)).
    Ties are not compared with each other. K = 2 is Bradley-Terry, -logsigmoid(s_chosen - s_rejected - margin).
    """
    if len(scores) == 2 and len(ranking) == 2:
        best, worst = ranking[0][0], ranking[1][0]
        return -F.logsigmoid(scores[best] - scores[worst] - (margin or 0.0))
    terms = []
    for stage, group in enumerate(ranking[:-1]):
        later = torch.logsumexp(scores[[i for rest in ranking[stage + 1 :] for i in rest]], 0)
        terms += [-F.logsigmoid(scores[i] - later) for i in group]
    return torch.stack(terms).mean()


def record_loss(scores: Tensor, feedback: Feedback) -> Tensor:
    """Loss of one record from the scores [K] of its responses."""
    if feedback.kind == "score":
        return (scores - scores.new_tensor(feedback.scores)).square().mean()
    return preference_loss(scores, feedback.ranking, feedback.margin)


def ordered_pairs(feedback: Feedback) -> list[tuple[int, int]]:
    """(better, worse) index pairs that a record implies; score records compare responses with different scores."""
    if feedback.kind == "score":
        pairs = combinations(range(len(feedback.scores)), 2)
        ordered = [(i, j) if feedback.scores[i] > feedback.scores[j] else (j, i) for i, j in pairs]
        return [(i, j) for i, j in ordered if feedback.scores[i] != feedback.scores[j]]
    groups = feedback.ranking
    return [(i, j) for g, group in enumerate(groups) for i in group for rest in groups[g + 1 :] for j in rest]


class RewardTrainer:
    """Train a scalar-head model. Fields of the config: docs/api.md.

    model: a causal LM (its trunk gets a new head) or a reward model to go on with; folder, hub id, GGUF file or a
    loaded one. data, eval_data: whatever `load_feedback` reads. Raises UserError before any training for bad input.
    """

    def __init__(
        self,
        config: RewardConfig,
        *,
        model: str | PreTrainedModel,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        data: Any,
        eval_data: Any = None,
    ) -> None:
        self.config = config
        self.inputs = {"model": model, "tokenizer": tokenizer, "data": data, "eval_data": eval_data}
        self.tokenizer = loading.tokenizer_for(tokenizer, model)
        notes = [f"chat template: {resolve_chat_template(self.tokenizer, config.chat_template)}"]
        self.records, note = self._load(data, "data")
        notes.append(note)
        self.eval_records: list[Record] = []
        if eval_data is not None:
            self.eval_records, note = self._load(eval_data, "eval_data")
            notes.append(note)
        elif config.eval_fraction and len(self.records) > 1:
            self.records, self.eval_records = split_heldout(
                self.records, config.eval_fraction, config.seed, key=lambda r: json.dumps(r.feedback.prompt)
            )  # judgements of the same prompt stay together
        self.model, self.adapters = load_scalar_backbone(model, config, self.tokenizer)
        frozen = config.head_only or self.adapters is not None  # head_only: a linear model on frozen features
        loading.make_trainable(self.model, config.gradient_checkpointing, frozen=frozen)
        self.model.score.requires_grad_(True)
        if config.head_only:
            self.model.base_model.requires_grad_(False)
        check_rows(self.model, [row for r in self.records + self.eval_records for row in r.rows], config.max_tokens)
        self.tokenizer = padding_tokenizer(self.tokenizer)
        self.model.config.pad_token_id = self.tokenizer.pad_token_id
        ordered = any(ordered_pairs(r.feedback) for r in self.eval_records)
        self.best_metric = ("accuracy/eval", True) if ordered else ("loss/eval", False)
        self.device = self.model.device
        self.backoff = Backoff(config, self.device)
        trained = self.model if self.adapters is None else self._trained_parts()
        self.optimizer = Optimizer(trained, learning_rate=config.learning_rate, **optimizer_options(config))
        self.total_steps = config.total_steps or math.ceil(config.epochs * len(self.records) / config.mini_batch_size)
        self.sampler, self.guard = Sampler(len(self.records), config.seed), UpdateGuard()
        self.run = Run(self)
        self.backoff.report = self.run.tracker.event
        if self.adapters is not None:
            notes += self.adapters.notes(self.run.tracker.note)
        for text in notes:
            self.run.tracker.note(text)

    def _trained_parts(self) -> dict[str, Tensor]:
        """With lora: the adapter and the head."""
        head = {f"score.{name}": p for name, p in self.model.score.named_parameters()}
        return {**self.adapters.parameters(REWARD), **head}

    def _load(self, source: Any, role: str) -> tuple[list[Record], str]:
        config = self.config
        found, counts = load_feedback(source, score_range=config.score_range, skip_bad_rows=config.skip_bad_rows)
        encoded = encode_rows(found, lambda item: self._encode(item, counts), counts, self.config.skip_bad_rows)
        records = [record for _, record in encoded if record is not None]
        if not records:
            raise UserError(f"{role}: nothing left to train on ({counts.line()}); raise max_tokens")
        return records, f"{role}: {counts.line()}"

    def _encode(self, feedback: Feedback, counts: Counts) -> Record | None:
        prompt, limit = encode_prompt(self.tokenizer, feedback.prompt), self.config.max_tokens
        rows = [prompt + encode_response(self.tokenizer, feedback.prompt, r) for r in feedback.responses]
        if max(map(len, rows)) > limit:
            if self.config.overlong == "drop" or len(prompt) >= limit:
                what = "longer than" if self.config.overlong == "drop" else "with no reply within"
                counts.add(f"{what} max_tokens = {limit}")
                return None
            rows = [row[:limit] for row in rows]
            if len(rows) > 1 and all(row == rows[0] for row in rows):
                counts.add(f"with equal replies within max_tokens = {limit}")
                return None
            counts.noted[f"cut to max_tokens = {limit}"] += 1
        return Record(rows, feedback)

    # ------------------------------------------------------------------------------------------------- the user's end

    def __iter__(self) -> Iterator[RewardStep]:
        return self.run.steps()

    def train(self) -> dict[str, float]:
        """Run every remaining step -> the metrics of the last one."""
        summary: dict[str, float] = {}
        for step in self:
            summary = step.metrics
        return summary

    def save(self, folder: str | Path, *, adapter: bool = False) -> None:
        """An AutoModelForSequenceClassification folder (num_labels 1) with its tokenizer. adapter: the LoRA adapter and
        the head alone, as peft loads them; UserError without `lora`."""
        self.run.export(folder, adapter=adapter)

    # ------------------------------------------------------------------------------------------------------- one step

    def run_step(self) -> RewardStep:
        config = self.config
        records = [self.records[i] for i in self.sampler.take(config.mini_batch_size)]
        self.model.train()  # transformers checkpoints activations in this mode only; dropout is off in both
        with self.run.tracker.phase("update"):
            total, counts = self.backoff.attempt(partial(self._accumulate, records), undo=self.optimizer.zero_grad)
            distributed.add_up(total, counts)
            rate = lr_at(
                self.run.step, base=config.learning_rate, schedule=config.lr_schedule,
                warmup_steps=config.warmup_steps, total_steps=self.total_steps,
            )  # fmt: skip
            result = self.optimizer.step(rate)
        sentence = self.guard.record(result.applied, "reward model")
        if sentence is not None:
            self.run.tracker.event("non_finite_update", sentence, step=self.run.step + 1)
        metrics = {
            "loss/train": float(total),
            "grad_norm": result.grad_norm,
            "learning_rate": rate,
            "update/skipped": float(self.guard.skipped),
        }
        if counts[0]:
            metrics["accuracy/train"] = float(counts[1]) / float(counts[0])
        tokens = sum(len(row) for record in records for row in record.rows)
        return RewardStep(metrics, throughput("perf/tokens", tokens, self.device))

    def _accumulate(self, records: list[Record]) -> tuple[Tensor, Tensor]:
        """This rank's gradients of an optimizer step, micro-batch by micro-batch -> their loss; how many ordered pairs,
        and how many of them in the right order."""
        total, counts = torch.zeros((), device=self.device), torch.zeros(2)
        for group in self._groups(records):
            scores = heads.sequence_scores(self.model, [row for record in group for row in record.rows])
            parts = scores.split([len(record.rows) for record in group])
            losses = [record_loss(s, r.feedback) for s, r in zip(parts, group, strict=True)]
            loss = torch.stack(losses).sum() / len(records)
            loss.backward()
            total += loss.detach()
            for s, record in zip(parts, group, strict=True):
                values, ordered = s.tolist(), ordered_pairs(record.feedback)
                counts += torch.tensor([len(ordered), sum(values[i] > values[j] for i, j in ordered)])
        return total, counts

    def _groups(self, records: list[Record]) -> Iterator[list[Record]]:
        """This rank's records, in groups whose rows, padded to the longest of all, stay within the token budget.

        The responses of a record stay together, its loss needs them all. Longest first, as `micro_batches` has it.
        """
        mine = batching.own([len(r.rows) * max(map(len, r.rows)) for r in records])
        order = sorted((records[i] for i in mine), key=lambda r: -max(map(len, r.rows)))
        group: list[Record] = []
        for record in order:
            rows = sum(len(r.rows) for r in group) + len(record.rows)
            if group and rows * max(map(len, group[0].rows)) > self.backoff.tokens:
                yield group
                group = []
            group.append(record)
        if group:
            yield group

    # ------------------------------------------------------------------------------------- evaluation and checkpoints

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """On held-out records: loss, pair accuracy, mean margin, correlation with the scores; margins as an event."""
        if not self.eval_records:
            return {}
        self.model.eval()
        rows = [row for r in self.eval_records for row in r.rows]
        scores = torch.zeros(len(rows))
        mine = batching.own([len(row) for row in rows])
        own = [rows[i] for i in mine]
        scores[mine] = self.backoff.attempt(lambda: score_rows(self.model, own, self.backoff.tokens))
        distributed.add_up(scores)
        parts = scores.split([len(r.rows) for r in self.eval_records])
        both = list(zip(parts, (r.feedback for r in self.eval_records), strict=True))
        margins = [float(s[i] - s[j]) for s, f in both for i, j in ordered_pairs(f)]
        metrics = {"loss/eval": sum(float(record_loss(s, f)) for s, f in both) / len(both)}
        if margins:
            metrics["accuracy/eval"] = sum(m > 0 for m in margins) / len(margins)
            metrics["margin/eval"] = sum(margins) / len(margins)
            bins = margin_histogram(margins)
            text = ", ".join(f"{name}: {count}" for name, count in bins.items())
            self.run.tracker.event("margins", f"held-out margins (better - worse): {text}", histogram=bins)
        given = [(float(v), target) for s, f in both if f.kind == "score" for v, target in zip(s, f.scores)]
        if len({target for _, target in given}) > 1:
            metrics["correlation/eval"] = float(torch.corrcoef(torch.tensor(given, dtype=torch.float64).T)[0, 1])
        return metrics

    def trained(self) -> dict[str, Trained]:
        if self.adapters is None:
            return {"model": Trained(self.model, self.optimizer)}
        head = dict(self.model.score.named_parameters())
        return {"model": self.adapters.trained(REWARD, self.optimizer, self._trained_parts(), head)}

    def state(self) -> dict[str, Any]:
        parts = {"guard": self.guard, "backoff": self.backoff}
        return {"sampler": self.sampler.state_dict(), **{name: part.state() for name, part in parts.items()}}

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        return {}

    def load_state(self, state: dict[str, Any], tensors: Callable[[str], dict[str, Tensor]]) -> None:
        self.sampler.load_state_dict(state["sampler"])
        self.guard.load_state(state["guard"])
        self.backoff.load_state(state["backoff"])


def margin_histogram(margins: Sequence[float]) -> dict[str, int]:
    """Counts of margins between the edges of MARGIN_EDGES, lowest first; a margin on an edge counts above it."""
    edges = (-math.inf, *MARGIN_EDGES, math.inf)
    return {f"{a:g}..{b:g}": sum(a <= m < b for m in margins) for a, b in zip(edges, edges[1:])}


def main(inputs: dict[str, Any], config: RewardConfig) -> int:
    """`fastrlhf reward`: train and write output_dir/final -> exit code."""
    return run_stage(RewardTrainer, inputs, config)
