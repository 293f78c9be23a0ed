"""Stage 2: a reward model from human feedback: pairs, edits, K-way rankings and scores, mixed in one data set.

Each record weighs the same. Preferences: Plackett-Luce (for two responses Bradley-Terry), in fp32 through logsigmoid
and logsumexp, so that badly misranked pairs keep their gradient. Scores: weighted squared error to each person's own
scale, read off the raw output through a learnt scale and offset (reward/link.py), and the order that they imply.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastrlhf.agreement.figures import figures
from fastrlhf.agreement.pairs import can_tell
from fastrlhf.agreement.words import first_sentence
from fastrlhf.config.inputs import check_arguments
from fastrlhf.config.stages import RewardConfig
from fastrlhf.data.encode import Record
from fastrlhf.models.backbone import compile_layers, load_scalar_backbone
from fastrlhf.models.heads import Readout, readout_of, scalar_outputs, sequence_scores
from fastrlhf.models.loading import is_scalar_model, make_trainable
from fastrlhf.models.lora import REWARD
from fastrlhf.models.reward_folder import (
    BIAS_FILE,
    HEADS_FILE,
    HELD_OUT_FILE,
    LINK_FILE,
    READOUT_FILE,
    Heads,
    HeldOut,
    bias_text,
    heads_of,
    link_of,
    readout_text,
)
from fastrlhf.models.saving import padding_tokenizer
from fastrlhf.models.token_batch import TargetRow, reply_log_probs, token_states
from fastrlhf.parallel import sharding
from fastrlhf.parallel.optimizers import make_optimizer
from fastrlhf.preflight.readout import asked_readout
from fastrlhf.preflight.stages import Supervised, prepare_supervised
from fastrlhf.reward.ensemble import bootstrap, over_heads, widen
from fastrlhf.reward.features import Features, KeptReadout, choose_readout
from fastrlhf.reward.head import SAMPLED, settle_head
from fastrlhf.reward.link import ScoreLink
from fastrlhf.reward.raters import records_with_scores
from fastrlhf.rl.scorers import score_rows
from fastrlhf.runtime import distributed
from fastrlhf.runtime.batching import assign_rows, micro_batches
from fastrlhf.runtime.optim import TrainedRole
from fastrlhf.supervised import SupervisedTrainer
from fastrlhf.trainer import PlannedTokens, Stateful, Step, device_of, run_stage

CENTRED_ON = 1000  # replies; their mean is then known to 3 % of the deviation of scores
MARGIN_EDGES = (-4.0, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 4.0)


class RewardTrainer(SupervisedTrainer):
    """Train a scalar-head model. Fields of the config: docs/api.md.

    model: a causal LM (its trunk gets a new head) or a reward model to go on with; folder, hub id, GGUF file or a
    loaded one. data, eval_data: whatever `load_feedback` reads. sft_data: conversations, for center_rewards, which
    draws CENTRED_ON of their replies (models/reward_folder.py). compute_metrics: see eval_metrics.py. Raises UserError
    before any training for bad input.
    """

    role = "reward model"

    def __init__(
        self,
        config: RewardConfig,
        *,
        model: str | PreTrainedModel,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        data: Any,
        sft_data: Any = None,
        eval_data: Any = None,
        compute_metrics: Any = None,
    ) -> None:
        inputs = {"model": model, "tokenizer": tokenizer, "data": data, "sft_data": sft_data, "eval_data": eval_data}
        inputs["compute_metrics"] = compute_metrics
        check_arguments(config, RewardConfig, inputs)
        ready: Supervised[Record] = prepare_supervised(config, **inputs)
        self.eval_records, self.compute_metrics = ready.held_out, ready.compute_metrics
        self.held_out = HeldOut(len(self.eval_records))
        draw, replies = random.Random(f"center_rewards {config.seed}"), ready.sft_replies
        self.sft_replies = draw.sample(replies, min(CENTRED_ON, len(replies)))
        ordered = any(r.feedback.ordered_pairs() for r in self.eval_records)
        self.best_metric = ("accuracy/eval", True) if ordered else ("loss/eval", False)
        super().__init__(
            config,
            items=ready.items,
            inputs=inputs,
            tokenizer=padding_tokenizer(ready.tokenizer),
            device=device_of(model),
            said=ready.said,
        )

        loaded = load_scalar_backbone(model, config, ready.tokenizer, self.tracker.note)
        self.model, self.adapters, language_head = loaded
        self.language_head = language_head if config.lm_coef else None
        frozen = config.head_only or self.adapters is not None  # head_only: a linear model on frozen features
        make_trainable(self.model, config.gradient_checkpointing, frozen=frozen)
        self.model.score.requires_grad_(True)
        if config.head_only:
            self.model.base_model.requires_grad_(False)
        ready.fits(self.model)
        self.model.config.pad_token_id = self.tokenizer.pad_token_id
        new = not is_scalar_model(model)
        self.link = ScoreLink(ready.raters, config.score_range, None if new else link_of(self._source(model)))
        self.has_scores = bool(records_with_scores(self.items))
        self.features: Features | None = None
        if config.head_only:
            self._linear(new)
        rows = [row for item in self.items for row in item.rows]
        rows = random.Random(f"head {config.seed}").sample(rows, min(SAMPLED, len(rows)))
        drawn, beside = new, None
        if config.ensemble is not None:
            known = None if new else heads_of(self._source(model))
            drawn, beside = known is None, widen(self.model, config.ensemble, config.seed, new=new, known=known)
        if sharding.wanted(config):
            sharding.shard(self.model)
        if drawn:
            settle_head(self.model, rows, beside)
        if not config.head_only:
            compile_layers(self.model.train(), config.compile, self.tracker.note)  # in the mode of `step`
        trained = self.model if self.adapters is None else self._trained_parts()
        self.optimizer = make_optimizer(config, trained, self.memory, learning_rate=config.learning_rate)

    def _linear(self, new: bool) -> None:
        """Make the model r(y) = w'y + b with y where the config says. new: its head is."""
        config, head = self.config, self.model.score
        if new and config.readout == "auto":
            many = (self.items, self.eval_records, self.link)
            tried = self.memory.attempt(lambda: choose_readout(self.model, *many, self.memory.tokens, config.seed))
            chosen, stock = tried[0], next(t for t in tried if t.readout == Readout())
            self.tracker.note(
                f"readout = auto: {chosen.readout}, of {len(tried)}: loss {chosen.loss:.3f} of a held-out record, "
                f"where {stock.readout} has {stock.loss:.3f}; figures on the same rows are a little too good"
            )
            self.model.score_readout = chosen.readout
        elif new:
            self.model.score_readout = asked_readout(config)
            layers = self.model.config.get_text_config().num_hidden_layers  # a GGUF file tells only now
            self.model.score_readout.check(layers, "readout_layer")
        if head.bias is None:
            head.bias = nn.Parameter(torch.zeros(1, device=head.weight.device, dtype=head.weight.dtype))
        head.bias.requires_grad_(self.has_scores)  # of pairs it would learn the rounding of gradients that are 0

    @staticmethod
    def _source(model: str | PreTrainedModel) -> str:
        """Where a reward model came from."""
        return model.config._name_or_path if isinstance(model, PreTrainedModel) else str(model)

    def _trained_parts(self) -> dict[str, Tensor]:
        """The parameters that train with lora: the adapter and the head."""
        head = {f"score.{name}": p for name, p in self.model.score.named_parameters()}
        return {**self.adapters.parameters(REWARD), **head}

    def accumulate(self, records: list[Record]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Add this rank's gradients of an optimizer step, micro-batch by micro-batch -> their loss; how many ordered
        pairs, and how many of them in the right order; the gradient of the link of scores; the language-model loss of
        lm_coef summed over best replies, and their number."""
        total, counts, language = torch.zeros((), device=self.device), torch.zeros(2), torch.zeros(2)
        self.link.take_gradient()  # of a try that ran out of memory
        if self.config.head_only:
            self._features()  # by all ranks together, also those without a record here
        weight = sum(record.judgements for record in records)
        for group in self.micro_batches(records):
            scores, replies = self._forward(group)
            parts = scores.split([len(record.rows) for record in group])
            losses = [self._record_loss(s, r) for s, r in zip(parts, group, strict=True)]
            loss = torch.stack(losses).sum() / weight if losses else scores.sum()  # 0, of a rank that only keeps step
            if replies:  # eq. 2 of Zheng et al. 2023, a reply's mean over its tokens
                losses = [-record.judgements * log_probs.mean() for record, log_probs in replies]
                loss = loss + self.config.lm_coef * torch.stack(losses).sum() / weight
                language += torch.tensor([-sum(float(p.detach().mean()) for _, p in replies), len(replies)])
            loss.backward()
            total += loss.detach()
            for s, record in zip(parts, group, strict=True):
                values, ordered = over_heads(s).tolist(), record.feedback.ordered_pairs()
                counts += torch.tensor([len(ordered), sum(values[i] > values[j] for i, j in ordered)])
        return total, counts, self.link.take_gradient(), language

    def _forward(self, group: list[Record]) -> tuple[Tensor, list[tuple[Record, Tensor]]]:
        """Raw outputs of all rows of a micro-batch; with lm_coef the log-probs of the tokens of each best reply."""
        rows = [row for record in group for row in record.rows]
        if self.language_head is None:
            return self._raw(rows), []
        states = token_states(self.model, rows)
        scores = scalar_outputs(self.model.score, torch.stack([row_states[-1] for row_states in states]))
        best, first = [], 0
        for record in group:
            if record.feedback.ranking is not None:
                best.append((record, first + record.feedback.ranking[0][0]))
            first += len(record.rows)
        if not best:
            return scores, []
        targets = [TargetRow(rows[i], range(max(1, record.prompt_tokens), len(rows[i]))) for record, i in best]
        chosen = [states[i] for _, i in best]
        log_probs = reply_log_probs(self.language_head, chosen, targets, self.memory.workspace)
        return scores, [(record, p) for (record, _), p in zip(best, log_probs, strict=True)]

    def _record_loss(self, scores: Tensor, record: Record) -> Tensor:
        """Loss of a record as it counts in a mini-batch; of an ensemble the mean over its heads, each with a weight."""
        loss = record.judgements * self.link.loss(scores, record.feedback, record.smoothing)
        if self.config.ensemble is None:
            return loss
        return (loss * loss.new_tensor(bootstrap(record, self.config.ensemble, self.config.seed))).mean()

    def _raw(self, rows: list[list[int]]) -> Tensor:
        """Raw outputs [B] fp32 of token rows, of an ensemble [B, M], to be differentiated; with head_only from features
        that were kept."""
        if not self.config.head_only:
            return sequence_scores(self.model, rows)
        return scalar_outputs(self.model.score, self._features().of(rows).to(self.device))

    def _features(self) -> Features:
        """What the frozen trunk says of all rows of the run, read at the first need: a checkpoint brings its trunk."""
        if self.features is None:
            rows = [row for record in (*self.items, *self.eval_records) for row in record.rows]
            rows += [example.ids for example in self.sft_replies]
            self.model.eval()
            self.features = self.memory.attempt(lambda: Features(self.model, rows, self.memory.tokens))
            self.tracker.note(f"head_only: the features of {len(rows)} rows are read once and kept")
        return self.features

    @torch.no_grad()
    def _scores(self, rows: list[list[int]]) -> Tensor:
        """Raw outputs [B] fp32 on the CPU of rows of the run, means over heads; one rank may ask alone."""
        if self.features is not None:
            return over_heads(self._raw(rows)).cpu()
        return over_heads(self.memory.attempt(lambda: score_rows(self.model, rows, self.memory.tokens)))

    def updated(self, sums: Sequence[Tensor], rate: float) -> None:
        if self.has_scores and self.config.learning_rate:
            self.link.step(sums[2], rate / self.config.learning_rate)

    def micro_batches(self, records: list[Record]) -> Iterator[list[Record]]:
        """This rank's records, grouped under the token budget; the responses of a record stay together, its loss needs
        them all."""
        mine = [records[i] for i in assign_rows([len(r.rows) * r.longest for r in records])]
        lengths, counts = [r.longest for r in mine], [len(r.rows) for r in mine]
        groups = micro_batches(lengths, self.memory.tokens, counts=counts)
        for group in sharding.in_step(self.model, groups):
            yield [mine[i] for i in group]

    def step_metrics(self, sums: Sequence[Tensor]) -> dict[str, float]:
        pairs, right = sums[1].tolist()
        metrics = {"accuracy/train": right / pairs} if pairs else {}
        log_loss, replies = sums[3].tolist()
        return metrics | ({"loss/lm": log_loss / replies} if replies else {})

    def token_ids(self, item: Record) -> list[list[int]]:
        return item.rows

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """On held-out records: loss, pair accuracy, mean margin, correlation with the scores, the user's own;
        margins as an event."""
        if not self.eval_records:
            return {}
        self.model.eval()
        if self.config.head_only:
            self._features()
        scores = self._held_out_scores()
        parts = scores.split([len(r.rows) for r in self.eval_records])
        both = list(zip(parts, (r.feedback for r in self.eval_records), strict=True))
        margins = [float(s[i] - s[j]) for s, f in both for i, j in f.ordered_pairs()]
        metrics = {"loss/eval": sum(float(self.link.loss(s, f)) for s, f in both) / len(both)}
        if margins:
            metrics["accuracy/eval"] = sum(m > 0 for m in margins) / len(margins)
            metrics["margin/eval"] = sum(margins) / len(margins)
            wrong = sum(m <= 0 for m in margins)
            message = f"held-out pairs: {wrong} of {len(margins)} ranked the wrong way round or not at all"
            self.tracker.event("margins", message, quiet=True, histogram=margin_histogram(margins))
        given = [(float(v), target) for s, f in both if f.kind == "score" for v, target in zip(s, f.scores)]
        if len({target for _, target in given}) > 1:
            metrics["correlation/eval"] = float(torch.corrcoef(torch.tensor(given, dtype=torch.float64).T)[0, 1])
        self._remember(metrics, len(margins))
        if self.steps_done == self.total_steps and distributed.is_lead():
            self._agreement([s.tolist() for s, _ in both])
        if self.compute_metrics is not None:
            metrics |= self.compute_metrics([s.tolist() for s, _ in both], [f for _, f in both], metrics)
        return metrics

    def _remember(self, metrics: dict[str, float], pairs: int) -> None:
        """Keep what goes into the model's folder; an alarm where the run ends with a model that ranks no better than
        chance."""
        correlation = metrics.get("correlation/eval")
        if correlation is not None and not math.isfinite(correlation):  # one score for all
            correlation = 0.0
        accuracy = metrics.get("accuracy/eval")
        self.held_out.load_state(
            {"step": self.steps_done, "pairs": pairs, "accuracy": accuracy, "correlation": correlation}
        )
        if self.steps_done == self.total_steps:
            self._alarm()

    def _agreement(self, scores: list[list[float]]) -> None:
        """The figures of `fastrlhf reward-eval` on the held-out rows, as an event; the bag of words learns from the
        rows that the model did."""
        records, training = [r.feedback for r in self.eval_records], [r.feedback for r in self.items]
        if not can_tell(records):
            return
        report = figures(records, scores, training=training, seed=self.config.seed)
        self.tracker.event("agreement", f"held-out rows: {first_sentence(report)}", figures=report)

    def _alarm(self) -> None:
        doubt = self.held_out.doubt()
        if doubt is not None:
            message = f"the reward model {doubt}; PPO against it learns its mistakes"
            self.tracker.event("alarm", message, alarm="reward_model")

    def _held_out_scores(self) -> Tensor:
        """Scores on the CPU of every response of the held-out records, each by the rank that it belongs to."""
        rows = [row for r in self.eval_records for row in r.rows]
        mine = assign_rows([len(row) for row in rows])
        rows_of_this_rank = [rows[i] for i in mine]
        scores = torch.zeros(len(rows))
        scores[mine] = self._scores(rows_of_this_rank)
        distributed.all_reduce_sum(scores)
        return scores

    def __iter__(self) -> Iterator[Step]:
        if self.steps_done == 0 and not (self.eval_records and self.config.eval_every):
            self._alarm()
        return super().__iter__()

    def parts(self) -> dict[str, Stateful]:
        own = {"held_out": self.held_out, "score_link": self.link, "readout": KeptReadout(self.model)}
        return {**super().parts(), **own}

    def beside_the_model(self) -> dict[str, str]:
        texts = {HELD_OUT_FILE: self.held_out.text()}
        if self.config.ensemble is not None:
            texts[HEADS_FILE] = Heads.of(self.model.score).text()
        if self.has_scores:
            texts[LINK_FILE] = self.link.text()
        if readout_of(self.model) != Readout():
            texts[READOUT_FILE] = readout_text(readout_of(self.model))
        bias = self.model.score.bias
        learnt = 0.0 if bias is None else float(bias.detach().mean())
        if self.sft_replies or learnt:
            texts[BIAS_FILE] = bias_text(self._mean_of_sft(), len(self.sft_replies), learnt)
        unread = [file for file in (READOUT_FILE, BIAS_FILE) if file in texts]
        if unread:
            files = " and ".join(unread)
            self.tracker.note(f"stock transformers does not read {files} beside the weights, and scores otherwise")
        return texts

    def _mean_of_sft(self) -> float:
        """The mean raw output of the SFT replies, which centres the weights as they are; 0 without any. Only the rank
        that writes them asks."""
        if not self.sft_replies:
            return 0.0
        rows = [example.ids for example in self.sft_replies]
        self.model.eval()
        mean = float(self._scores(rows).double().mean())
        self.tracker.note(f"center_rewards: {len(rows)} replies of sft_data score {mean:.3g} on average, now 0")
        return mean

    def _stock_weights(self) -> dict[str, Tensor]:
        """The weights as stock transformers has them, without a bias of the head."""
        return {name: tensor for name, tensor in sharding.state_dict(self.model).items() if name != "score.bias"}

    def trained(self) -> dict[str, TrainedRole]:
        head = dict(self.model.score.named_parameters())
        stock = None if self.model.score.bias is None else self._stock_weights
        role = TrainedRole(self.model, self.optimizer, merged=stock)
        if self.adapters is not None:
            shown = None if self.config.ensemble is None else _mean_of_heads
            role = self.adapters.trained(REWARD, self.optimizer, self._trained_parts(), head, shown)
        if self.config.ensemble is not None:  # what stock code reads is their mean
            weights, heads = role.merged or partial(sharding.state_dict, self.model), {f"score.{name}" for name in head}
            role = role._replace(
                merged=lambda: {n: _mean_of_heads(t) if n in heads else t for n, t in weights().items()}
            )
        return {"model": role}


def _mean_of_heads(weights: Tensor) -> Tensor:
    """[M, ...] of an ensemble's heads -> [1, ...]."""
    return weights.detach().mean(0, keepdim=True)


def margin_histogram(margins: Sequence[float]) -> dict[str, int]:
    """Counts of margins between the edges of MARGIN_EDGES, lowest first; a margin on an edge counts above it."""
    edges = (-math.inf, *MARGIN_EDGES, math.inf)
    return {f"{a:g}..{b:g}": sum(a <= m < b for m in margins) for a, b in zip(edges, edges[1:])}


def main(inputs: dict[str, Any], config: RewardConfig, tokens: PlannedTokens | None = None) -> int:
    """`fastrlhf reward`: train and write output_dir/final -> exit code."""
    return run_stage(RewardTrainer, inputs, config, tokens)
