"""The work of `fastrlhf generate` and `fastrlhf score`, once their arguments are parsed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedTokenizerBase

from fastrlhf.config.errors import UserError
from fastrlhf.data.templates import encode_prompt, stop_token_ids
from fastrlhf.models.loading import load_policy, load_reward_model, load_tokenizer
from fastrlhf.rl.scorers import score_texts
from fastrlhf.rollout.engine import RolloutEngine
from fastrlhf.rollout.result import reply_texts
from fastrlhf.rollout.sampling import SamplingParams


def generate(source: str, prompts: Sequence[str], *, raw: bool = False, **sampling: float) -> list[str]:
    """Replies in the order of the prompts, n to each; sampling: the fields of SamplingParams.

    UserError for settings that cannot be and for prompts that are empty or too long for the model.
    """
    try:
        params = SamplingParams(**sampling)
        tokenizer = load_tokenizer(source)
        prompt_ids = [encode_prompt(tokenizer, prompt) for prompt in _as_asked(tokenizer, prompts, raw)]
        model = load_policy(source)
        params = replace(params, stop_token_ids=stop_token_ids(tokenizer, model.generation_config))
        out = RolloutEngine(model, tokenizer).generate(prompt_ids, params)
    except ValueError as error:
        raise UserError(str(error)) from error
    return reply_texts(tokenizer, out)


def score(source: str, prompts: Sequence[str], responses: Sequence[str], *, raw: bool = False) -> list[float]:
    """A reward model's raw score of each (prompt, response)."""
    tokenizer = load_tokenizer(source)
    model = load_reward_model(source)
    with torch.inference_mode():
        return score_texts(model, tokenizer, _as_asked(tokenizer, prompts, raw), list(responses))


def _as_asked(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], raw: bool) -> list[str | list[dict]]:
    """A prompt is a user's message where the tokenizer has a chat template, a text to continue where it has none."""
    chat = tokenizer.chat_template is not None and not raw
    return [[{"role": "user", "content": prompt}] if chat else prompt for prompt in prompts]
