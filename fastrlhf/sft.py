"""Stage 1: supervised fine-tuning, and plain-text pretraining (`format: text`), through the fused linear log-prob.

The loss of an optimizer step is the mean over all its target tokens, however they are split into micro-batches or
packed into rows: neither changes the result.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastrlhf.config.inputs import check_arguments
from fastrlhf.config.stages import SFTConfig
from fastrlhf.data.encode import Example, target_count
from fastrlhf.eval_metrics import TokenPrediction
from fastrlhf.models.backbone import compile_layers, load_backbone
from fastrlhf.models.loading import make_trainable
from fastrlhf.models.lora import POLICY
from fastrlhf.models.token_batch import TokenBatch, likeliest_tokens, resolve_packing, target_log_probs, target_row
from fastrlhf.parallel import sharding
from fastrlhf.parallel.optimizers import make_optimizer
from fastrlhf.preflight.stages import Supervised, prepare_supervised
from fastrlhf.runtime import distributed
from fastrlhf.runtime.batching import assign_rows, micro_batches, pack
from fastrlhf.runtime.optim import TrainedRole
from fastrlhf.supervised import SupervisedTrainer
from fastrlhf.trainer import PlannedTokens, device_of, run_stage


class SFTTrainer(SupervisedTrainer):
    """Fine-tune a causal LM on conversations or text. Fields of the config: docs/api.md.

    model: folder, hub id, GGUF file, or a loaded model (trained in place). data, eval_data: whatever
    `load_conversations` reads. compute_metrics: see eval_metrics.py. Raises UserError before any training for what
    cannot work.
    """

    role, best_metric = "model", ("loss/eval", False)

    def __init__(
        self,
        config: SFTConfig,
        *,
        model: str | PreTrainedModel,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        data: Any,
        eval_data: Any = None,
        compute_metrics: Any = None,
    ) -> None:
        inputs = {"model": model, "tokenizer": tokenizer, "data": data, "eval_data": eval_data}
        inputs["compute_metrics"] = compute_metrics
        check_arguments(config, SFTConfig, inputs)
        ready: Supervised[Example] = prepare_supervised(config, **inputs)
        self.eval_examples, self.compute_metrics = ready.held_out, ready.compute_metrics
        super().__init__(
            config,
            items=ready.items,
            inputs=inputs,
            tokenizer=ready.tokenizer,
            device=device_of(model),
            said=ready.said,
        )

        self.model, self.adapters = load_backbone(model, config, [POLICY], self.tracker.note)
        ready.fits(self.model)
        make_trainable(self.model, config.gradient_checkpointing, frozen=self.adapters is not None)
        if sharding.wanted(config):
            sharding.shard(self.model)
        self.joined = resolve_packing(config.packing, [self.model])
        compile_layers(self.model.train(), config.compile, self.tracker.note)  # in the mode of `step`
        trained = self.model if self.adapters is None else self.adapters.parameters(POLICY)
        self.optimizer = make_optimizer(config, trained, self.memory, learning_rate=config.learning_rate)

    def accumulate(self, examples: Sequence[Example]) -> tuple[Tensor]:
        """Add this rank's gradients of an optimizer step, micro-batch by micro-batch -> their loss."""
        total, targets = torch.zeros((), device=self.device), target_count(examples)
        for batch in self.batches(examples):
            loss = -target_log_probs(self.model, batch, workspace=self.memory.workspace).sum() / targets
            loss.backward()
            total += loss.detach()
        return (total,)

    def batches(self, examples: Sequence[Example]) -> Iterator[TokenBatch]:
        """This rank's rows of one example each, or of several where packing is on, grouped under the token budget."""
        for rows in self.groups(examples):
            yield self.batch(examples, rows)

    def groups(self, examples: Sequence[Example]) -> Iterator[list[list[int]]]:
        """This rank's micro-batches: of each its rows, of a row the indices of its examples."""
        mine = assign_rows([len(e.ids) for e in examples])
        lengths = [len(examples[i].ids) for i in mine]
        rows = pack(lengths, self.config.max_tokens) if self.joined else [[i] for i in range(len(lengths))]
        sizes = [sum(lengths[i] for i in row) for row in rows]
        groups = micro_batches(sizes, self.memory.tokens)
        for group in sharding.in_step(self.model, groups):
            filled = [[mine[i] for i in rows[r]] for r in group]
            if filled and self.joined and "flash" in str(self.model.config._attn_implementation):
                filled = [[index for row in filled for index in row]]  # it keeps examples apart in one row only
            yield filled

    def batch(self, examples: Sequence[Example], rows: list[list[int]]) -> TokenBatch:
        return TokenBatch.build([[target_row(examples[i]) for i in row] for row in rows], self.device)

    def step_metrics(self, sums: Sequence[Tensor]) -> dict[str, float]:
        return {}

    def token_ids(self, item: Example) -> list[list[int]]:
        return [item.ids]

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """loss/eval in nats a target token, perplexity/eval = exp of it, over the held-out examples; and the user's."""
        if not self.eval_examples:
            return {}
        self.model.eval()
        total = torch.tensor(self.memory.attempt(self._held_out_loss), dtype=torch.float64)
        distributed.all_reduce_sum(total)
        loss = float(total) / target_count(self.eval_examples)
        metrics = {"loss/eval": loss, "perplexity/eval": math.exp(min(loss, 700.0))}
        if self.compute_metrics is not None:
            predictions = self.predictions(self.memory.attempt(self._held_out_tokens))
            metrics |= self.compute_metrics(predictions, [e.row for e in self.eval_examples], metrics)
        return metrics

    def _held_out_loss(self) -> float:
        """The summed loss of this rank's held-out examples."""
        total = 0.0
        for batch in self.batches(self.eval_examples):
            total += float(-target_log_probs(self.model, batch, workspace=self.memory.workspace).sum())
        return total

    def _held_out_tokens(self) -> Tensor:
        """[2, T] fp64 of all target tokens of the held-out examples, in their order: the likeliest id, log p of the
        true one; zero for those of other ranks."""
        examples = self.eval_examples
        counts = [sum(e.target) for e in examples]
        found = torch.zeros(2, sum(counts), dtype=torch.float64)
        places = list(torch.arange(sum(counts)).split(counts))
        for rows in self.groups(examples):
            batch = self.batch(examples, rows)
            hidden = batch.hidden(self.model)
            log_probs = target_log_probs(self.model, batch, 1.0, hidden, self.memory.workspace)
            part = torch.stack([likeliest_tokens(self.model, hidden).double(), log_probs.double()])
            found[:, torch.cat([torch.zeros(0, dtype=torch.int64), *(places[i] for row in rows for i in row)])] = (
                part.cpu()
            )
        return found

    def predictions(self, found: Tensor) -> list[TokenPrediction]:
        """What `compute_metrics` gets, from every rank's part of `_held_out_tokens`."""
        distributed.all_reduce_sum(found)
        counts = [sum(e.target) for e in self.eval_examples]
        parts = zip(self.eval_examples, found[0].split(counts), found[1].split(counts), strict=True)
        return [
            TokenPrediction(list(compress(e.ids, e.target)), ids.long().tolist(), log_probs.tolist())
            for e, ids, log_probs in parts
        ]

    def trained(self) -> dict[str, TrainedRole]:
        if self.adapters is None:
            return {"model": TrainedRole(self.model, self.optimizer)}
        return {"model": self.adapters.trained(POLICY, self.optimizer)}


def main(inputs: dict[str, Any], config: SFTConfig, tokens: PlannedTokens | None = None) -> int:
    """`fastrlhf sft`: train and write output_dir/final -> exit code."""
    return run_stage(SFTTrainer, inputs, config, tokens)
