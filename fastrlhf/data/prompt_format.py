"""Whether a string prompt is a user's message or raw text: one decision for all stages, kept with the tokenizer.

It stands in tokenizer_config.json, which save_pretrained writes and stock transformers reads over, so that generate,
score and the next stage read a prompt as the one before did.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal
from weakref import WeakKeyDictionary

from fastrlhf.config.errors import UserError
from fastrlhf.data.checks import Messages
from fastrlhf.data.foreign import is_transcript, open_transcript
from fastrlhf.data.rendering import render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KEY = "fastrlhf_prompt_format"
# "auto: ..." is what auto came to: a prompt that carries marks of the template is raw then, a transcript is messages.
Decision = Literal["chat", "raw", "auto: chat", "auto: raw"]
DECISIONS = ("chat", "raw", "auto: chat", "auto: raw")
Form = Literal["conversations", "string prompts", "transcripts", "raw prompts", "rendered prompts", "plain texts"]

_CONTROL = re.compile(r"<.+>|\[.+\]|\|.+\|", re.DOTALL)
_controls: WeakKeyDictionary = WeakKeyDictionary()


def decision_of(tokenizer: PreTrainedTokenizerBase) -> Decision | None:
    """The decision that came with the tokenizer; None: it is of no folder of ours."""
    decision = tokenizer.init_kwargs.get(KEY)
    if decision not in (None, *DECISIONS):
        raise UserError(f"tokenizer_config.json: {KEY} = {decision!r}: expected one of {', '.join(DECISIONS)}")
    return decision


def decide(tokenizer: PreTrainedTokenizerBase, prompt_format: str, *, has_template: bool) -> str | None:
    """Write the decision into the tokenizer -> a sentence where the folder that it comes from says something else.

    prompt_format: auto, chat or raw. auto: what the folder says, else chat where there is a template of its own or one
    is named (has_template), else raw.
    """
    kept = decision_of(tokenizer)
    wanted = prompt_format if prompt_format != "auto" else kept or ("auto: chat" if has_template else "auto: raw")
    tokenizer.init_kwargs[KEY] = wanted
    if kept is None or kept.split()[-1] == wanted.split()[-1]:
        return None
    return (
        f"prompt_format = {prompt_format}: this run reads string prompts so, the model's folder says {kept.split()[-1]}"
    )


def disagreement(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, role: str) -> str | None:
    """A sentence where a model of another folder was trained to read string prompts otherwise; None where not."""
    ours, theirs = decision_of(tokenizer), decision_of(other)
    if ours is None or theirs is None or ours.split()[-1] == theirs.split()[-1]:
        return None
    return f"{role}: its folder says prompt_format = {theirs.split()[-1]}, this run reads prompts as {ours.split()[-1]}"


def as_asked(tokenizer: PreTrainedTokenizerBase, prompt: str | Messages) -> str | Messages:
    """The prompt as it is encoded: messages, which go through the chat template, or a string, which is raw text.

    A tokenizer without a decision leaves a prompt as it is.
    """
    if not isinstance(prompt, str):
        return prompt
    decision = decision_of(tokenizer)
    if decision in (None, "raw") or not tokenizer.chat_template:
        return prompt
    if decision.startswith("auto") and not is_transcript(prompt) and is_rendered(tokenizer, prompt):
        return prompt
    turns = open_transcript(prompt)
    if turns is not None:
        return turns
    return [{"role": "user", "content": prompt}] if decision in ("chat", "auto: chat") else prompt


def is_rendered(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Whether a text holds a control token, begins as the template's user turn or ends as its prompts for a reply."""
    pattern, head, tail = _marks(tokenizer)
    bare = text.strip()
    return bool(pattern.search(text) or head and bare.startswith(head) or tail and bare.endswith(tail))


def _marks(tokenizer: PreTrainedTokenizerBase) -> tuple[re.Pattern[str], str, str]:
    """The control tokens, and what the template writes before a user's text and behind it."""
    key = (str(tokenizer.chat_template), len(tokenizer))
    cached_key, marks = _controls.get(tokenizer, (None, None))
    if cached_key != key:
        # Whitespace and abbreviations are added tokens of some tokenizers; what looks like a tag is a control token.
        added = {token for token in tokenizer.get_added_vocab() if _CONTROL.fullmatch(token)}
        tokens = {*tokenizer.all_special_tokens, *added} - {tokenizer.unk_token, ""}
        pattern = "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True) if token.strip())
        controls = re.compile(pattern or r"(?!)")
        head = tail = ""
        if tokenizer.chat_template:
            probe = "fastrlhf-probe"
            turn = [{"role": "user", "content": probe}]
            rendered = render(tokenizer, turn, add_generation_prompt=True)
            head, _, tail = rendered.partition(probe)
            head, tail = _mark(controls, head), _mark(controls, tail.rstrip().rpartition("\n")[2])
        marks = (controls, head, tail)
        _controls[tokenizer] = (key, marks)
    return marks


def _mark(controls: re.Pattern[str], text: str) -> str:
    """A mark of who speaks, "User:" or "[/INST]", without the control tokens around it; "": a bare word is none."""
    mark = controls.sub("", text).strip()
    return mark if mark and not mark[-1].isalnum() else ""


def form_of(tokenizer: PreTrainedTokenizerBase, prompt: str | Messages) -> Form:
    """What a prompt is, for the log."""
    if not isinstance(prompt, str):
        return "conversations"
    asked = as_asked(tokenizer, prompt)
    if isinstance(asked, list):
        return "string prompts" if open_transcript(prompt) is None else "transcripts"
    return "rendered prompts" if decision_of(tokenizer) == "auto: chat" else "raw prompts"


def controls_of(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Finds the control tokens in a text: special tokens, and added ones that look like a tag."""
    return _marks(tokenizer)[0]


def describe(tokenizer: PreTrainedTokenizerBase, forms: Iterable[Form], role: str, template: str) -> list[str]:
    """A line for each form of the rows: how many, and how they are read. template: its label.

    A model that learns from conversations alone chats afterwards: the decision that is saved with it says so.
    """
    counts = Counter(forms)
    if role in ("data", "prompts") and set(counts) == {"conversations"} and decision_of(tokenizer) == "auto: raw":
        tokenizer.init_kwargs[KEY] = "auto: chat"
    through = f"through {template}"
    how = {
        "conversations": through,
        "string prompts": through,
        "transcripts": f"{through}, as messages",
        "raw prompts": "raw text, without a chat template",
        "rendered prompts": "raw text, because they hold control tokens or role marks of the template",
        "plain texts": "learnt as they are",
    }
    return [f"{role}: {count} {form}: {how[form]}" for form, count in counts.most_common()]
