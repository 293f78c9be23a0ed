"""The pretraining mix of PPO (ptx): the language-model loss on rows of ptx_data, in the policy's own optimizer step."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastrlhf import distributed
from fastrlhf.config import PPOConfig, UserError
from fastrlhf.data import Sampler, encode_rows, load_conversations
from fastrlhf.examples import Batch, Example, encode_example, target_count, target_log_probs
from fastrlhf.guards import check_rows
from fastrlhf.optim import micro_batches


class PretrainingMix:
    """loss = PPO's + ptx_coef * mean over target tokens of -log p(token), of mini_batch_size rows an optimizer step.

    Ouyang et al. 2022, eq. 2 (gamma is ptx_coef): the gradients of both losses are summed and clipped together, and one
    optimizer step follows. MOSS-RLHF's released code steps once for each. Log-probs are at temperature 1: these rows
    were not sampled.
    """

    def __init__(self, config: PPOConfig, examples: list[Example], model: PreTrainedModel) -> None:
        """UserError for rows with tokens or positions that the model has not."""
        check_rows(model, [e.ids for e in examples], _limit(config), field="max_prompt_tokens + max_new_tokens")
        self.examples, self.coef, self.rows = examples, config.ptx_coef, config.mini_batch_size
        self.sampler = Sampler(len(examples), config.seed)

    def backward(self, model: PreTrainedModel, budget: int) -> Tensor:
        """Add the next rows' share to the gradients -> their mean loss, nats a target token, without ptx_coef; of this
        rank's rows, so that the ranks' sum is the whole. budget: tokens of a micro-batch.

        Where the memory runs out the same rows are drawn again at the next call.
        """
        before = self.sampler.state_dict()
        try:
            return self._backward(model, budget, [self.examples[i] for i in self.sampler.take(self.rows)])
        except RuntimeError:  # of which running out of memory is one
            self.sampler.load_state_dict(before)
            raise

    def _backward(self, model: PreTrainedModel, budget: int, examples: list[Example]) -> Tensor:
        targets, total = target_count(examples), torch.zeros((), device=model.device)
        mine = [examples[i] for i in distributed.own([len(e.ids) for e in examples])]
        for group in micro_batches([len(e.ids) for e in mine], budget):
            batch = Batch.build([[mine[i]] for i in group], model.device)
            loss = -target_log_probs(model, batch).sum() / targets
            (self.coef * loss).backward()
            total += loss.detach()
        return total

    def state(self) -> dict[str, Any]:
        return self.sampler.state_dict()

    def load_state(self, state: dict[str, Any]) -> None:
        self.sampler.load_state_dict(state)


def check_ptx(config: PPOConfig, ptx_data: Any) -> None:
    """UserError where one of ptx_coef and ptx_data stands without the other."""
    if config.ptx_coef > 0 and ptx_data is None:
        raise UserError(
            f"ptx_data: ptx_coef = {config.ptx_coef:g} needs rows to learn from; give ptx_data, or ptx_coef=0"
        )
    if config.ptx_coef == 0 and ptx_data is not None:
        raise UserError("ptx_coef = 0: ptx_data would never be used; set ptx_coef above 0 or leave ptx_data out")


def load_ptx(config: PPOConfig, tokenizer: PreTrainedTokenizerBase, ptx_data: Any) -> tuple[list[Example], str]:
    """ptx_data as examples, and what became of its rows; nothing without ptx. What is longer than max_prompt_tokens +
    max_new_tokens is dropped and counted. UserError where nothing is left."""
    check_ptx(config, ptx_data)
    if ptx_data is None:
        return [], ""
    rows, counts = load_conversations(ptx_data, skip_bad_rows=config.skip_bad_rows)
    encoded = encode_rows(rows, partial(encode_example, tokenizer), counts, config.skip_bad_rows)
    examples, limit = [example for _, example in encoded], _limit(config)
    kept = [example for example in examples if len(example.ids) <= limit]
    counts.add(f"longer than max_prompt_tokens + max_new_tokens = {limit}", len(examples) - len(kept))
    if not kept:
        raise UserError(f"ptx_data: nothing left to train on ({counts.line()}); raise max_prompt_tokens")
    return kept, f"ptx_data: {counts.line()}"


def _limit(config: PPOConfig) -> int:
    return config.max_prompt_tokens + config.max_new_tokens
