"""The one place where chat templates are called: what they write for messages, or a sentence about why they cannot."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from fastrlhf.config.errors import UserError
from fastrlhf.config.limits import TEMPLATE_BYTES, TEMPLATE_CHARS, TEMPLATE_SECONDS, memory_limit, time_limit
from fastrlhf.data.checks import REASONING, Messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_REASONING = frozenset(REASONING)
REMEDY = "repair it, or name another with chat_template"
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
    """The chat template's text for the messages. Raises UserError where the template refuses them, takes longer than
    `seconds` or more memory than a text needs, or writes far more than the messages hold."""
    shown, is_plain = _shown(tokenizer, messages)
    slow = f"the chat template takes more than {seconds:g} s for a conversation of {len(messages)} messages"
    roles = ", ".join(str(m.get("role")) for m in messages)
    return _bounded(_called(tokenizer, shown, is_plain, add_generation_prompt, seconds, slow, roles), messages)


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
        both = [_shown(tokenizer, messages) for messages in conversations]
        shown, is_plain = [messages for messages, _ in both], all(plain for _, plain in both)
        slow = "the chat template is slow"
        texts = _called(tokenizer, shown, is_plain, add_generation_prompt, seconds, slow, "many")
        return [_bounded(text, messages) for text, messages in zip(texts, conversations)]
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


def _shown(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> tuple[Messages, bool]:
    """The messages as the template gets them, and whether they are plain. UserError for what it would not write."""
    if not tokenizer.chat_template:
        raise UserError('the tokenizer has no chat template: name one, e.g. chat_template="default"')
    if _is_plain(messages):
        return messages, True
    for number, message in enumerate(messages, 1):
        if _REASONING.isdisjoint(message):
            continue
        key = next((key for key in REASONING if key in message and key not in str(tokenizer.chat_template)), None)
        if key is not None:
            remedy = "remove it, or write it into the content"
            raise UserError(f"message {number} has {key}, which the chat template does not write; {remedy}")
    if not any("weight" in message for message in messages):
        return messages, False
    shown = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
    return shown, _is_plain(shown)


def _bounded(text: str, messages: Messages) -> str:
    """UserError for a text that is far longer than what the messages hold."""
    if len(text) <= TEMPLATE_CHARS:
        return text
    if len(text) > TEMPLATE_CHARS + 4 * sum(len(str(value)) for message in messages for value in message.values()):
        size = f"{len(text):,} characters for a conversation of {len(messages)} messages"
        raise UserError(f"the chat template writes {size}; {REMEDY}")
    return text


def _called(
    tokenizer: PreTrainedTokenizerBase,
    shown: Any,
    is_plain: bool,
    add_generation_prompt: bool,
    seconds: float,
    slow: str,
    roles: str,
) -> Any:
    """The text of one conversation, or those of a list of them, all of them plain or not."""
    from jinja2 import TemplateError, TemplateSyntaxError

    try:
        if _has_power(str(tokenizer.chat_template)):
            raise UserError(f"the chat template uses **, whose result may have no end; {REMEDY}")
        with time_limit(seconds, f"{slow}; {REMEDY}", SlowTemplate), memory_limit(TEMPLATE_BYTES):
            return _applied(tokenizer, shown, is_plain, add_generation_prompt)
    except UserError:
        raise
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError, MemoryError) as error:
        what = f"{type(error).__name__}: {error}"
        raise UserError(f"the chat template fails ({what}); repair it, or name another with chat_template") from error
    except TemplateSyntaxError as error:
        raise UserError(f"line {error.lineno} of the chat template is broken: {error.message}") from error
    except TemplateError as error:
        raise UserError(f"the chat template refuses a conversation of {roles}: {error}") from error


def _applied(tokenizer: PreTrainedTokenizerBase, shown: Any, is_plain: bool, add_generation_prompt: bool) -> Any:
    """tokenizer.apply_chat_template; of conversations that are plain dicts of texts by its compiled template alone,
    its globals put together once for all of them: a quarter of the time."""
    from transformers import PreTrainedTokenizerBase
    from transformers.utils import chat_template_utils

    several = bool(shown) and isinstance(shown[0], list)
    conversations = shown if several else [shown]
    names = ("apply_chat_template", "get_chat_template")
    is_stock = all(getattr(type(tokenizer), name) is getattr(PreTrainedTokenizerBase, name) for name in names)
    # What transformers may rename: then the way around it goes, nothing else.
    compiled_of = getattr(chat_template_utils, "_compile_jinja_template", None)
    if compiled_of is None or not is_stock or not is_plain:
        return tokenizer.apply_chat_template(shown, tokenize=False, add_generation_prompt=add_generation_prompt)
    template = compiled_of(tokenizer.get_chat_template())
    given = {"tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
    known = {**template.globals, **tokenizer.special_tokens_map, **given}
    context, texts = template.new_context(known, shared=True), []
    for messages in conversations:
        # One context for all, to make another takes longer than to write the text: what a conversation set is gone.
        context.vars.clear()
        context.exported_vars.clear()
        context.parent["messages"] = messages
        texts.append("".join(template.root_render_func(context)))
    return texts if several else texts[0]


def _is_plain(messages: Messages) -> bool:
    """Whether a conversation holds roles and texts alone, which a template cannot do anything with but write them."""
    for message in messages:
        if len(message) != 2 or type(message.get("role")) is not str or type(message.get("content")) is not str:
            return False
    return bool(messages)


@lru_cache(maxsize=32)
def _has_power(template: str) -> bool:
    """Whether a template raises to a power: no signal ends that, and jinja does it for constants before it runs."""
    from jinja2 import Environment

    operators = [value for _, kind, value in Environment().lex(template) if kind == "operator"]
    return any(b == "**" and a not in ("(", ",") for a, b in zip(["", *operators], operators))
