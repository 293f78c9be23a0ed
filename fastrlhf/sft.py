"""Stage 1: supervised fine-tuning, and plain-text pretraining (`format: text`), through the fused linear log-prob.

The loss of an optimizer step is the mean over all its target tokens, however they are split into micro-batches or
packed into rows: neither changes the result.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastrlhf.config.errors import UserError
from fastrlhf.config.inputs import check_arguments
from fastrlhf.config.stages import SFTConfig
from fastrlhf.data.dataset import Counts, encode_rows, load_conversations, reading, split_heldout
from fastrlhf.data.encode import Example, encode_example, row_form, target_count
from fastrlhf.data.prompt_format import describe
from fastrlhf.data.templates import settle_template
from fastrlhf.models.backbone import load_backbone
from fastrlhf.models.loading import make_trainable, tokenizer_for
from fastrlhf.models.lora import POLICY
from fastrlhf.models.token_batch import TokenBatch, resolve_packing, target_log_probs, target_row
from fastrlhf.runtime import distributed
from fastrlhf.runtime.batching import assign_rows, micro_batches, pack
from fastrlhf.runtime.guards import check_rows
from fastrlhf.runtime.optim import TrainedRole, make_optimizer
from fastrlhf.trainer import SupervisedTrainer, device_of, run_stage


class SFTTrainer(SupervisedTrainer):
    """Fine-tune a causal LM on conversations or text. Fields of the config: docs/api.md.

    model: folder, hub id, GGUF file, or a loaded model (trained in place). data, eval_data: whatever
    `load_conversations` reads. Raises UserError before any training for what cannot work.
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
    ) -> None:
        inputs = {"model": model, "tokenizer": tokenizer, "data": data, "eval_data": eval_data}
        check_arguments(config, SFTConfig, inputs)
        tokenizer = tokenizer_for(tokenizer, model)
        template, notes = settle_template(tokenizer, config.chat_template, config.prompt_format)
        examples, note = load_examples(config, tokenizer, data, "data", template)
        notes.append(note)
        self.eval_examples: list[Example] = []
        if eval_data is not None:
            self.eval_examples, note = load_examples(config, tokenizer, eval_data, "eval_data", template)
            notes.append(note)
        elif config.eval_fraction:
            examples, self.eval_examples = _split(examples, config)
        device = device_of(model)
        super().__init__(config, items=examples, inputs=inputs, tokenizer=tokenizer, device=device, notes=notes)

        self.model, self.adapters = load_backbone(model, config, [POLICY], self.tracker.note)
        check_rows(self.model, [e.ids for e in examples + self.eval_examples], config.max_tokens)
        self.joined = resolve_packing(config.packing, [self.model])
        make_trainable(self.model, config.gradient_checkpointing, frozen=self.adapters is not None)
        trained = self.model if self.adapters is None else self.adapters.parameters(POLICY)
        self.optimizer = make_optimizer(config, trained, self.memory, learning_rate=config.learning_rate)

    def accumulate(self, examples: Sequence[Example]) -> tuple[Tensor]:
        """Add this rank's gradients of an optimizer step, micro-batch by micro-batch -> their loss."""
        total, targets = torch.zeros((), device=self.device), target_count(examples)
        for batch in self.batches(examples):
            loss = -target_log_probs(self.model, batch).sum() / targets
            loss.backward()
            total += loss.detach()
        return (total,)

    def batches(self, examples: Sequence[Example]) -> Iterator[TokenBatch]:
        """This rank's rows of one example each, or of several where packing is on, grouped under the token budget."""
        examples = [examples[i] for i in assign_rows([len(e.ids) for e in examples])]
        lengths = [len(e.ids) for e in examples]
        rows = pack(lengths, self.config.max_tokens) if self.joined else [[i] for i in range(len(lengths))]
        sizes = [sum(lengths[i] for i in row) for row in rows]
        for group in micro_batches(sizes, self.memory.tokens):
            filled = [[target_row(examples[i]) for i in rows[r]] for r in group]
            if self.joined and "flash" in str(self.model.config._attn_implementation):
                filled = [[example for row in filled for example in row]]  # it keeps examples apart in one row only
            yield TokenBatch.build(filled, self.device)

    def step_metrics(self, sums: Sequence[Tensor]) -> dict[str, float]:
        return {}

    def token_ids(self, item: Example) -> list[list[int]]:
        return [item.ids]

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """loss/eval in nats a target token, perplexity/eval = exp of it, over the held-out examples."""
        if not self.eval_examples:
            return {}
        self.model.eval()
        total = torch.tensor(self.memory.attempt(self._held_out_loss), dtype=torch.float64)
        distributed.all_reduce_sum(total)
        loss = float(total) / target_count(self.eval_examples)
        return {"loss/eval": loss, "perplexity/eval": math.exp(min(loss, 700.0))}

    def _held_out_loss(self) -> float:
        """The summed loss of this rank's held-out examples."""
        total = 0.0
        for batch in self.batches(self.eval_examples):
            total += float(-target_log_probs(self.model, batch).sum())
        return total

    def trained(self) -> dict[str, TrainedRole]:
        if self.adapters is None:
            return {"model": TrainedRole(self.model, self.optimizer)}
        return {"model": self.adapters.trained(POLICY, self.optimizer)}


def load_examples(
    config: SFTConfig, tokenizer: PreTrainedTokenizerBase, source: Any, role: str, template: str
) -> tuple[list[Example], str]:
    """Rows as examples; what is too long is dropped or cut and counted, never silently."""
    rows, counts = load_conversations(source, format=config.format, **reading(config, role))
    examples, forms = [], []
    encode = partial(encode_example, tokenizer)
    for row, example in encode_rows(rows, encode, counts, config.skip_bad_rows):
        if len(example.ids) > config.max_tokens:
            example = _fitted(example, config, counts)
            if example is None:
                continue
        examples.append(example)
        forms.append(row_form(tokenizer, row))
    if not examples:
        raise UserError(f"{role}: nothing left to train on ({counts.line()}); raise max_tokens")
    return examples, "\n".join([f"{role}: {counts.line()}", *describe(tokenizer, forms, role, template)])


def _fitted(example: Example, config: SFTConfig, counts: Counts) -> Example | None:
    """Drop or cut an over-long example, counted. A cut reply ends open: a made-up EOS would teach to stop there."""
    if config.overlong == "drop":
        counts.add(f"longer than max_tokens = {config.max_tokens}")
        return None
    cut = Example(example.ids[: config.max_tokens], example.target[: config.max_tokens], example.group)
    if not any(cut.target):
        counts.add(f"with no reply within max_tokens = {config.max_tokens}")
        return None
    counts.noted[f"cut to max_tokens = {config.max_tokens}"] += 1
    return cut


def _split(examples: list[Example], config: SFTConfig) -> tuple[list[Example], list[Example]]:
    """Examples that answer the same prompt stay together: perplexity is measured on prompts not trained on."""
    train, heldout = split_heldout(examples, config.eval_fraction, config.seed, key=lambda e: e.group)
    if not train or not heldout:
        raise UserError(f"eval_fraction = {config.eval_fraction}: {len(examples)} examples cannot be split so")
    return train, heldout


def main(inputs: dict[str, Any], config: SFTConfig) -> int:
    """`fastrlhf sft`: train and write output_dir/final -> exit code."""
    return run_stage(SFTTrainer, inputs, config)
