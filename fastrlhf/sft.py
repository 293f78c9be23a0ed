"""Stage 1: supervised fine-tuning, and plain-text pretraining (`format: text`), through the fused linear log-prob.

The loss of an optimizer step is the mean over all its target tokens, however they are split into micro-batches or
packed into rows: neither changes the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastrlhf.config.errors import UserError
from fastrlhf.config.stages import SFTConfig
from fastrlhf.data.dataset import Counts, encode_rows, load_conversations, split_heldout
from fastrlhf.data.encode import Example, encode_example, target_count
from fastrlhf.data.templates import resolve_chat_template
from fastrlhf.models import loading
from fastrlhf.models.backbone import load_backbone
from fastrlhf.models.lora import POLICY
from fastrlhf.models.token_batch import Batch, resolve_packing, target_log_probs
from fastrlhf.runtime import batching, distributed
from fastrlhf.runtime.batching import Sampler, micro_batches, pack
from fastrlhf.runtime.guards import UpdateGuard, check_rows
from fastrlhf.runtime.memory import Backoff
from fastrlhf.runtime.metrics import throughput
from fastrlhf.runtime.optim import Optimizer, Trained, lr_at, optimizer_options
from fastrlhf.trainer import Run, run_stage


@dataclass
class SFTStep:
    metrics: dict[str, float]
    timings: dict[str, float]


class SFTTrainer:
    """Fine-tune a causal LM on conversations or text. Fields of the config: docs/api.md.

    model: folder, hub id, GGUF file, or a loaded model (trained in place). data, eval_data: whatever
    `load_conversations` reads. Raises UserError before any training for what cannot work.
    """

    def __init__(
        self,
        config: SFTConfig,
        *,
        model: str | PreTrainedModel,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        data: Any,
        eval_data: Any = None,
    ) -> None:
        self.config = config
        self.inputs = {"model": model, "tokenizer": tokenizer, "data": data, "eval_data": eval_data}
        self.best_metric = ("loss/eval", False)
        self.tokenizer = loading.tokenizer_for(tokenizer, model)
        notes = [f"chat template: {resolve_chat_template(self.tokenizer, config.chat_template)}"]
        self.examples, note = self._load(data, "data")
        notes.append(note)
        self.eval_examples: list[Example] = []
        if eval_data is not None:
            self.eval_examples, note = self._load(eval_data, "eval_data")
            notes.append(note)
        elif config.eval_fraction:
            self.examples, self.eval_examples = _split(self.examples, config)
        self.model, self.adapters = load_backbone(model, config, [POLICY])
        check_rows(self.model, [e.ids for e in self.examples + self.eval_examples], config.max_tokens)
        self.packed = resolve_packing(config.packing, [self.model])
        loading.make_trainable(self.model, config.gradient_checkpointing, frozen=self.adapters is not None)
        self.device = self.model.device
        self.backoff = Backoff(config, self.device)
        trained = self.model if self.adapters is None else self.adapters.parameters(POLICY)
        self.optimizer = Optimizer(trained, learning_rate=config.learning_rate, **optimizer_options(config))
        self.total_steps = config.total_steps or math.ceil(config.epochs * len(self.examples) / config.mini_batch_size)
        self.sampler, self.guard = Sampler(len(self.examples), config.seed), UpdateGuard()
        self.run = Run(self)
        self.backoff.report = self.run.tracker.event
        if self.adapters is not None:
            notes += self.adapters.notes(self.run.tracker.note)
        for text in notes:
            self.run.tracker.note(text)

    def _load(self, source: Any, role: str) -> tuple[list[Example], str]:
        """Rows as examples; what is too long is dropped or cut and counted, never silently."""
        config = self.config
        rows, counts = load_conversations(source, format=config.format, skip_bad_rows=config.skip_bad_rows)
        examples = []
        encode = partial(encode_example, self.tokenizer)
        for _, example in encode_rows(rows, encode, counts, config.skip_bad_rows):
            if len(example.ids) > config.max_tokens:
                example = _fitted(example, config, counts)
                if example is None:
                    continue
            examples.append(example)
        if not examples:
            raise UserError(f"{role}: nothing left to train on ({counts.line()}); raise max_tokens")
        return examples, f"{role}: {counts.line()}"

    # ------------------------------------------------------------------------------------------------- the user's end

    def __iter__(self) -> Iterator[SFTStep]:
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

    def run_step(self) -> SFTStep:
        config = self.config
        examples = [self.examples[i] for i in self.sampler.take(config.mini_batch_size)]
        self.model.train()  # transformers checkpoints activations in this mode only; dropout is off in both
        with self.run.tracker.phase("update"):
            total = self.backoff.attempt(partial(self._accumulate, examples), undo=self.optimizer.zero_grad)
            distributed.add_up(total)
            rate = lr_at(
                self.run.step, base=config.learning_rate, schedule=config.lr_schedule,
                warmup_steps=config.warmup_steps, total_steps=self.total_steps,
            )  # fmt: skip
            result = self.optimizer.step(rate)
        sentence = self.guard.record(result.applied, "model")
        if sentence is not None:
            self.run.tracker.event("non_finite_update", sentence, step=self.run.step + 1)
        metrics = {
            "loss/train": float(total),
            "grad_norm": result.grad_norm,
            "learning_rate": rate,
            "update/skipped": float(self.guard.skipped),
        }
        return SFTStep(metrics, throughput("perf/tokens", sum(len(e.ids) for e in examples), self.device))

    def _accumulate(self, examples: Sequence[Example]) -> Tensor:
        """This rank's gradients of an optimizer step, micro-batch by micro-batch -> their loss."""
        total, targets = torch.zeros((), device=self.device), target_count(examples)
        for batch in self._batches(examples):
            loss = -self._log_probs(batch).sum() / targets
            loss.backward()
            total += loss.detach()
        return total

    def _batches(self, examples: Sequence[Example]) -> Iterator[Batch]:
        """This rank's rows of one example each, or of several where packing is on, grouped under the token budget."""
        examples = [examples[i] for i in batching.own([len(e.ids) for e in examples])]
        lengths = [len(e.ids) for e in examples]
        rows = pack(lengths, self.config.max_tokens) if self.packed else [[i] for i in range(len(lengths))]
        sizes = [sum(lengths[i] for i in row) for row in rows]
        for group in micro_batches(sizes, self.backoff.tokens):
            filled = [[examples[i] for i in rows[r]] for r in group]
            if self.packed and "flash" in str(self.model.config._attn_implementation):
                filled = [[example for row in filled for example in row]]  # it keeps examples apart in one row only
            yield Batch.build(filled, self.device)

    def _log_probs(self, batch: Batch) -> Tensor:
        return target_log_probs(self.model, batch)

    # ------------------------------------------------------------------------------------- evaluation and checkpoints

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """loss/eval in nats a target token, perplexity/eval = exp of it, over the held-out examples."""
        if not self.eval_examples:
            return {}
        self.model.eval()
        batches, nll = partial(self._batches, self.eval_examples), lambda batch: float(-self._log_probs(batch).sum())
        total = torch.tensor(self.backoff.attempt(lambda: float(sum(map(nll, batches())))), dtype=torch.float64)
        distributed.add_up(total)
        loss = float(total) / target_count(self.eval_examples)
        return {"loss/eval": loss, "perplexity/eval": math.exp(min(loss, 700.0))}

    def trained(self) -> dict[str, Trained]:
        if self.adapters is None:
            return {"model": Trained(self.model, self.optimizer)}
        return {"model": self.adapters.trained(POLICY, self.optimizer)}

    def state(self) -> dict[str, Any]:
        parts = {"guard": self.guard, "backoff": self.backoff}
        return {"sampler": self.sampler.state_dict(), **{name: part.state() for name, part in parts.items()}}

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        return {}

    def load_state(self, state: dict[str, Any], tensors: Callable[[str], dict[str, Tensor]]) -> None:
        self.sampler.load_state_dict(state["sampler"])
        self.guard.load_state(state["guard"])
        self.backoff.load_state(state["backoff"])


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
