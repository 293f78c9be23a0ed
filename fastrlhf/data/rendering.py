"""The one place where chat templates are called: what they write for messages, or a sentence about why they cannot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastrlhf.config.errors import UserError
from fastrlhf.data.checks import REASONING, Messages
from fastrlhf.data.limits import TEMPLATE_SECONDS, time_limit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


SLOW_ALLOWED = 3  # conversations of a batch for which the template may take too long; then it is the template's fault


class SlowTemplate(UserError):
    """The template took longer than its limit."""


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    *,
    add_generation_prompt: bool,
    seconds: float = TEMPLATE_SECONDS,
) -> str:
    """The chat template's text for the messages. Raises UserError where the template refuses them, or takes longer than
    `seconds`."""
    shown = _shown(tokenizer, messages)
    slow = f"the chat template takes more than {seconds:g} s for a conversation of {len(messages)} messages"
    roles = ", ".join(str(m.get("role")) for m in messages)
    return _called(tokenizer, shown, add_generation_prompt, seconds, slow, roles)


def render_many(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Messages],
    *,
    add_generation_prompt: bool,
    seconds: float = TEMPLATE_SECONDS,
) -> list[str | UserError]:
    """`render` of each, in one call of the template; a UserError in the place of one that it refuses.

    Raises SlowTemplate where several take longer than `seconds`.
    """
    try:
        shown = [_shown(tokenizer, messages) for messages in conversations]
        return _called(tokenizer, shown, add_generation_prompt, seconds, "the chat template is slow", "many")
    except UserError:  # of one of them: each by itself
        return _one_by_one(tokenizer, conversations, add_generation_prompt, seconds)


def _one_by_one(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Messages], add_generation_prompt: bool, seconds: float
) -> list[str | UserError]:
    texts: list[str | UserError] = []
    slow = 0
    for messages in conversations:
        try:
            texts.append(render(tokenizer, messages, add_generation_prompt=add_generation_prompt, seconds=seconds))
        except UserError as error:
            slow += isinstance(error, SlowTemplate)
            if slow == SLOW_ALLOWED:
                raise
            texts.append(error)
    return texts


def _shown(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> Messages:
    """The messages as the template gets them. UserError for what it would not write."""
    if not tokenizer.chat_template:
        raise UserError('the tokenizer has no chat template: name one, e.g. chat_template="default"')
    for number, message in enumerate(messages, 1):
        key = next((key for key in REASONING if key in message and key not in str(tokenizer.chat_template)), None)
        if key is not None:
            remedy = "remove it, or write it into the content"
            raise UserError(f"message {number} has {key}, which the chat template does not write; {remedy}")
    return [{key: value for key, value in message.items() if key != "weight"} for message in messages]


def _called(
    tokenizer: PreTrainedTokenizerBase, shown: Any, add_generation_prompt: bool, seconds: float, slow: str, roles: str
) -> Any:
    """The text of one conversation, or those of a list of them."""
    from jinja2 import TemplateError, TemplateSyntaxError

    try:
        with time_limit(seconds, f"{slow}; repair it, or name another with chat_template", SlowTemplate):
            return tokenizer.apply_chat_template(shown, tokenize=False, add_generation_prompt=add_generation_prompt)
    except UserError:
        raise
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError, MemoryError) as error:
        what = f"{type(error).__name__}: {error}"
        raise UserError(f"the chat template fails ({what}); repair it, or name another with chat_template") from error
    except TemplateSyntaxError as error:
        raise UserError(f"line {error.lineno} of the chat template is broken: {error.message}") from error
    except TemplateError as error:
        raise UserError(f"the chat template refuses a conversation of {roles}: {error}") from error
