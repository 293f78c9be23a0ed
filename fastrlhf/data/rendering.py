"""The one call of a chat template: what it writes for messages, or a sentence about why it cannot."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from fastrlhf.config.errors import UserError
from fastrlhf.data.checks import REASONING, Messages
from fastrlhf.data.limits import TEMPLATE_BYTES, TEMPLATE_CHARS, TEMPLATE_SECONDS, memory_limit, time_limit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    *,
    add_generation_prompt: bool,
    seconds: float = TEMPLATE_SECONDS,
) -> str:
    """The chat template's text for the messages. Raises UserError where the template refuses them, takes longer than
    `seconds` or more memory than a text needs, or writes far more than the messages hold."""
    from jinja2 import TemplateError, TemplateSyntaxError

    if not tokenizer.chat_template:
        raise UserError('the tokenizer has no chat template: name one, e.g. chat_template="default"')
    for number, message in enumerate(messages, 1):
        key = next((key for key in REASONING if key in message and key not in str(tokenizer.chat_template)), None)
        if key is not None:
            remedy = "remove it, or write it into the content"
            raise UserError(f"message {number} has {key}, which the chat template does not write; {remedy}")
    shown = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
    most = TEMPLATE_CHARS + 4 * sum(len(str(value)) for message in messages for value in message.values())
    remedy, size = "repair it, or name another with chat_template", f"a conversation of {len(messages)} messages"
    try:
        if _has_power(str(tokenizer.chat_template)):
            raise UserError(f"the chat template uses **, whose result may have no end; {remedy}")
        slow = f"the chat template takes more than {seconds:g} s for {size}; {remedy}"
        with time_limit(seconds, slow), memory_limit(TEMPLATE_BYTES):
            text = tokenizer.apply_chat_template(shown, tokenize=False, add_generation_prompt=add_generation_prompt)
        if len(text) > most:
            raise UserError(f"the chat template writes {len(text):,} characters for {size}; {remedy}")
        return text
    except UserError:
        raise
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError, MemoryError) as error:
        what = f"{type(error).__name__}: {error}"
        raise UserError(f"the chat template fails ({what}); repair it, or name another with chat_template") from error
    except TemplateSyntaxError as error:
        raise UserError(f"line {error.lineno} of the chat template is broken: {error.message}") from error
    except TemplateError as error:
        roles = ", ".join(str(m.get("role")) for m in messages)
        raise UserError(f"the chat template refuses a conversation of {roles}: {error}") from error


@lru_cache(maxsize=32)
def _has_power(template: str) -> bool:
    """Whether a template raises to a power: no signal ends that, and jinja does it for constants before it runs."""
    from jinja2 import Environment

    operators = [value for _, kind, value in Environment().lex(template) if kind == "operator"]
    return any(b == "**" and a not in ("(", ",") for a, b in zip(["", *operators], operators))
