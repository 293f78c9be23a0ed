"""The work of `fastrlhf generate` and `fastrlhf score`, once their arguments are parsed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedTokenizerBase

from fastrlhf.config.errors import UserError
from fastrlhf.data.prompt_format import decide
from fastrlhf.data.templates import encode_prompt, stop_token_ids
from fastrlhf.models.loading import load_policy, load_reward_model, load_tokenizer
from fastrlhf.rl.scorers import score_texts
from fastrlhf.rollout.engine import RolloutEngine
from fastrlhf.rollout.sampling import SamplingParams


def generate(source: str, prompts: Sequence[str], *, raw: bool = False, **sampling: float) -> list[str]:
    """Replies in the order of the prompts, n to each; sampling: the fields of SamplingParams.

    UserError for settings that cannot be and for prompts that are empty or too long for the model.
    """
    try:
        params = SamplingParams(**sampling)
        tokenizer = load_tokenizer(source)
        _decide(tokenizer, raw)
        prompt_ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
        model = load_policy(source)
        params = replace(params, stop_token_ids=stop_token_ids(tokenizer, model.generation_config))
        out = RolloutEngine(model, tokenizer).generate(prompt_ids, params)
    except ValueError as error:
        raise UserError(str(error)) from error
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in out.response_ids]


def score(source: str, prompts: Sequence[str], responses: Sequence[str], *, raw: bool = False) -> list[float]:
    """A reward model's raw score of each (prompt, response)."""
    tokenizer = load_tokenizer(source)
    _decide(tokenizer, raw)
    model = load_reward_model(source)
    with torch.inference_mode():
        return score_texts(model, tokenizer, list(prompts), list(responses))


def _decide(tokenizer: PreTrainedTokenizerBase, raw: bool) -> None:
    """Read string prompts as training did: what the folder says, else messages where there is a chat template."""
    decide(tokenizer, "raw" if raw else "auto", has_template=bool(tokenizer.chat_template))
