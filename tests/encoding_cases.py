"""Rows of every kind and tokenizers of every habit, whose token ids tests/data/golden_ids.json keeps."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tests import tiny

# Spelt out, so that no version of a trainer changes them. "at" joins "ca" + "t": a token over the border of a reply.
MERGES = [("h", "e"), ("Ġ", "t"), ("Ġt", "he"), ("a", "t"), ("o", "n"), ("Ġ", "m"), ("e", "r"), ("!", "!")]
SPECIAL = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<s>", "</s>"]
STRIPS = (  # strips what it is given, and shows a reply's thoughts only while it is the last turn
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def tokenizer(*, frame: str = "", template: str | None = tiny.CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """A byte-level BPE. frame: what it puts around a text, e.g. "<s> $A" or "<s> $A </s>"."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*SPECIAL, *alphabet, *("".join(pair) for pair in MERGES)]
    bpe = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, MERGES))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(SPECIAL)
    if frame:
        bpe.post_processor = processors.TemplateProcessing(single=frame, special_tokens=[("<s>", 5), ("</s>", 6)])
    eos, bos = ("</s>", "<s>") if frame else ("<|end|>", None)
    made = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=bos, eos_token=eos, pad_token="<|pad|>")
    made.chat_template = template
    return made


TOKENIZERS = {  # by name: a tokenizer, the chat_template and the prompt_format that a config names with it
    "chat": (lambda: tokenizer(), None, "auto"),
    "raw": (lambda: tokenizer(), None, "raw"),
    "base": (lambda: tokenizer(template=None), None, "auto"),
    "bos": (lambda: tokenizer(frame="<s> $A", template=None), None, "auto"),
    "bos and eos": (lambda: tokenizer(frame="<s> $A </s>", template=None), None, "auto"),
    "bos, default": (lambda: tokenizer(frame="<s> $A", template=None), "default", "auto"),
    "strips": (lambda: tokenizer(frame="<s> $A", template=STRIPS), None, "auto"),
    "moss-rlhf": (lambda: tokenizer(frame="<s> $A", template=None), "moss-rlhf-en", "chat"),
}


def said(*contents: str, system: str | None = None, **last: object) -> list[dict]:
    """A conversation, human first; last: keys of its last message."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    turns[-1] |= last
    return ([{"role": "system", "content": system}] if system else []) + turns


UNLEARNT = said("the moon?", "no", "the mat?", "on the mat!!")
UNLEARNT[1]["weight"] = 0
HH = "\n\nHuman: the cat?\n\nAssistant: on the mat\n\nHuman: and the moon?\n\nAssistant:"
PROMPTS = [
    "the ca",
    "the cat",
    " 今天 ",
    "<s>the cat",
    "<|user|>hello<|end|><|assistant|>",
    "the cat</s>",
    HH,
    said("the cat"),
    said("the cat", "on the mat", "and the moon"),
    said("<s>the cat", system="be brief"),
    said("  spaces  ", "ends <|end|>", "more"),
]
REPLIES = ["t sat on the mat", " the mat", "!!", "on the mat<|end|>", "  both  ", "</s>", "今天"]
CONVERSATIONS = [
    {"messages": said("the cat", "t sat on", "and?", "the mat", system="be brief")},
    {"messages": UNLEARNT},
    {"messages": said("a", "no<|end|>", "b", " the ", "c", "ends</s>")},
    {"text": "the cat sat on the mat"},
    {"text": "<s>the end</s>"},
    *({"prompt": prompt, "response": reply} for prompt in PROMPTS for reply in REPLIES),
]
FEEDBACK = [
    *({"prompt": p, "chosen": a, "rejected": b} for p in PROMPTS for a, b in zip(REPLIES, REPLIES[1:], strict=False)),
    *({"prompt": p, "responses": REPLIES, "ranking": [2, [0, 1], 3, 4, 5, 6]} for p in PROMPTS),
    *({"prompt": p, "response": REPLIES[0], "score": 3} for p in PROMPTS),
]
