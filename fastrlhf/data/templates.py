"""Chat templates, and the one place where text becomes token ids.

SFT, reward model and PPO all call encode_prompt and encode_response, so a prompt and a reply have the same
ids in every stage. A reply is encoded behind its prompt; where a token would straddle the border it is
encoded alone, because a policy generates from the prompt's ids and can never emit half a token. Nothing
here pads: masks come from lengths, so a tokenizer without a pad token is as good as any.

The rules are generators (see batches.py), so that a rollout's reply and a data set's rows go through the same ones:
encode_prompt, encode_response, encode_text and encode_conversation run one row, prompt_steps, replies_steps,
text_steps and conversation_steps are for many.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

from fastrlhf.config import encodings
from fastrlhf.config.errors import UserError
from fastrlhf.data.batches import Ids, Rendered, Steps, backend_of, encode_one
from fastrlhf.data.checks import Messages
from fastrlhf.data.foreign import open_transcript
from fastrlhf.data.prompt_format import as_asked, controls_of, decide
from fastrlhf.data.rendering import render

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

# Adjacent literals, no line breaks in between: text between jinja tags is part of what a template writes.
_DEFAULT = (
    "{% for m in messages %}{{ m['role'] | capitalize + ':\n' + m['content'] }}"
    "{{ eos_token + '\n\n' if m['role'] == 'assistant' else '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\n' }}{% endif %}"
)
_CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_MOSS = (
    "{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ m['content'] }}"
    "{% elif m['role'] == 'user' %}{{ '<|Human|>: ' + m['content'] + '<eoh>\n' }}"
    "{% elif m['role'] == 'tool' %}"
    "{{ '<|Results|>:' + ('' if m['content'].startswith('\n') else ' ') + m['content'] + '<eor>\n' }}"
    "{% elif m['content'].startswith('<|Inner Thoughts|>:') %}{{ m['content'] + '\n' }}"
    "{% else %}{{ '<|MOSS|>: ' + m['content'] + '<eom>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|MOSS|>:' }}{% endif %}"
)
_MOSS_RLHF = (
    "{{ bos_token | default('') }}{% set ns = namespace(system='') %}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{% set ns.system = m['content'] + '\n' %}"
    "{% elif m['role'] == 'assistant' %}{{ 'ASSISTANT' + m['content'] + eos_token }}"
    "{% else %}{{ 'HUMAN' + ns.system + m['content'] + eos_token }}{% set ns.system = '' %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT' }}{% endif %}"
)
PRESETS: dict[str, str] = {
    "default": _DEFAULT,
    "chatml": _CHATML,
    "moss": _MOSS,
    "moss-rlhf-en": _MOSS_RLHF.replace("HUMAN", "Human:").replace("ASSISTANT", "Assistant:"),
    "moss-rlhf-zh": _MOSS_RLHF.replace("HUMAN", "<|Human|>").replace("ASSISTANT", "<|MOSS|>"),
}
# The end of the assistant's turn in these presets; it must be one token, or no reply could ever stop.
_NEEDED_TOKEN = {"chatml": "<|im_end|>", "moss": "<eom>"}
_PROBE = "fastrlhf-probe"
_PROBES = {  # a conversation in which a turn of the role stands
    "system": ("system", "user"),
    "user": ("user", "assistant"),
    "assistant": ("user", "assistant"),
}
_known: WeakKeyDictionary = WeakKeyDictionary()
_TAIL = 256  # characters at the end of a prompt in which its last control token is looked for


def resolve_chat_template(tokenizer: PreTrainedTokenizerBase, name: str | None) -> str:
    """Set tokenizer.chat_template, which save_pretrained stores with the model; return a label for the log.

    name: a key of PRESETS, the path of a jinja file, or None: the tokenizer's own template, else "default".

    - "default", for any tokenizer that has an EOS: plain-text role tags on a line of their own, a blank line
      between turns, EOS at the end of the assistant's turn; BOS in front where the tokenizer adds one::

          System:\\nBe brief.\\n\\nUser:\\nHi\\n\\nAssistant:\\nHello<EOS>\\n\\n

    - "chatml": ``<|im_start|>role\\n...<|im_end|>\\n``.
    - "moss" (MOSS-003): ``{system}<|Human|>: ...<eoh>\\n<|MOSS|>: ...<eom>\\n``. A tool's answer is
      ``<|Results|>: ...<eor>\\n``; an assistant message that begins with ``<|Inner Thoughts|>:`` brings its
      own tags (thoughts and commands) and is written as it is.
    - "moss-rlhf-en" (MOSS-RLHF): ``<s>Human:...</s>Assistant:...</s>``; "moss-rlhf-zh":
      ``<s><|Human|>...</s><|MOSS|>...</s>``. They have no system turn: a system message is put in front of
      the next human text, on a line of its own.

    Raises UserError: unknown name, unreadable or broken template, a tokenizer without EOS or without the
    template's end-of-turn token. The tokenizer is unchanged then.
    """
    _need_eos(tokenizer)
    previous = tokenizer.chat_template
    label = name or ("the tokenizer's own" if previous else "default")
    if name is not None or not previous:
        tokenizer.chat_template = _preset(tokenizer, label) if label in PRESETS else _read_template(label)
    try:
        end_of_turn(tokenizer)
    except UserError as error:
        tokenizer.chat_template = previous
        raise UserError(f"chat_template {label!r}: {error}") from error
    return label


def settle_template(
    tokenizer: PreTrainedTokenizerBase, name: str | None, prompt_format: str = "auto"
) -> tuple[str, list[str]]:
    """Set the chat template and decide what string prompts are -> the template in words, and what the user should know.

    Raises UserError as resolve_chat_template.
    """
    has_template = name is not None or bool(tokenizer.chat_template)
    label = resolve_chat_template(tokenizer, name)
    note = decide(tokenizer, prompt_format, has_template=has_template)
    template = f"chat template {label}" if name or not has_template else "the tokenizer's chat template"
    return template, [note] if note else []


def _preset(tokenizer: PreTrainedTokenizerBase, name: str) -> str:
    token = _NEEDED_TOKEN.get(name)
    if token and token not in tokenizer.get_vocab():
        problem = f"chat_template {name!r} ends a turn with {token}, which is no token of this tokenizer"
        raise UserError(f'{problem}; use "default", or a model that knows the token')
    bos = tokenizer.bos_token_id
    adds_bos = bos is not None and tokenizer("a")["input_ids"][0] == bos
    return ("{{ bos_token }}" if adds_bos and name == "default" else "") + PRESETS[name]


def _read_template(name: str) -> str:
    path = Path(name)
    if not path.is_file():
        close = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "presets: " + ", ".join(PRESETS)
        raise UserError(f"chat_template {name!r} is neither a preset nor a file ({hint})")
    try:
        return encodings.decode(path.read_bytes()).replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        problem = f"a chat template must be UTF-8 text, byte {error.start} is not"
        raise UserError(f"{path}: {problem}; {encodings.remedy(error)}") from error


def _need_eos(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        problem = "the tokenizer has no EOS token, so no reply could ever end"
        token = 'a token of its vocabulary (e.g. "<|endoftext|>")'
        raise UserError(f"{problem}; set tokenizer.eos_token to {token} and save it with the model")
    return tokenizer.eos_token_id


class _Written(NamedTuple):
    """What the template writes around a content, from each of its control tokens on and up to each of them, the longest
    first; and whether its text begins with BOS."""

    heads: tuple[str, ...]
    tails: tuple[str, ...]
    begins_with_bos: bool


class _End(NamedTuple):
    """What a template writes behind a reply, as text and the id of its last token; None where it is no token."""

    text: str | None
    token: int | None


class _Known:
    """What a tokenizer and its template say of every row alike, each read at its first use."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, key: tuple) -> None:
        self.key = key
        self.bos: str | None = tokenizer.bos_token
        self.eos: int | None = tokenizer.eos_token_id
        self.end: _End | None = None
        self.written: dict[str, _Written] = {}
        self.borders: list[str] | None = None


def _known_of(tokenizer: PreTrainedTokenizerBase) -> _Known:
    key = (tokenizer.chat_template, tokenizer.eos_token, tokenizer.bos_token, len(tokenizer))
    known = _known.get(tokenizer)
    if known is None or known.key != key:
        known = _known[tokenizer] = _Known(tokenizer, key)
    return known


def known_of(tokenizer: PreTrainedTokenizerBase) -> _Known:
    """What the steps of every row need of a tokenizer that can end a reply. UserError where it cannot."""
    known = _known_of(tokenizer)
    if known.eos is None:
        _need_eos(tokenizer)
    return known


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The text that the template writes behind an assistant's content, up to and including the end-of-turn token.

    None where no special token stands there: EOS is appended to a reply then. Raises UserError where the
    template cannot be rendered or does not show the assistant's content.
    """
    return _end(tokenizer, _known_of(tokenizer)).text


def _end(tokenizer: PreTrainedTokenizerBase, known: _Known) -> _End:
    if known.end is not None:
        return known.end
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _PROBE}]
    _, shown, tail = render(tokenizer, messages, add_generation_prompt=False).partition(_PROBE)
    if not shown:
        raise UserError("the template does not show the assistant's content")
    # Every added token counts: many checkpoints add <|im_end|> without flagging it special.
    tokens = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()} - {""}
    # The earliest token, the longest of those that begin there.
    ends = sorted((tail.find(token), -len(token)) for token in tokens if token in tail)
    stop = tail[: ends[0][0] - ends[0][1]] if ends else None
    known.end = _End(stop, encode_one(tokenizer, _last_token(stop)) if stop else None)
    return known.end


def _last_token(text: str) -> Steps[int]:
    return (yield Ids(text))[-1]


def _bare(tokenizer: PreTrainedTokenizerBase, known: _Known, messages: Messages) -> Messages:
    """The messages without what the template writes at their ends too, control tokens and all: it would stand twice.
    What a tool says stays to the letter."""
    bare: Messages = []
    for message in messages:
        role, content = message["role"], message["content"]
        if role in _PROBES:
            written = known.written.get(role) or _written(tokenizer, known, role)
            if not bare and known.bos and written.begins_with_bos:
                content = content.removeprefix(known.bos) or content
            content = _without(content, written.heads, written.tails)
        bare.append(message if content is message["content"] else {**message, "content": content})
    return bare


def _without(content: str, heads: tuple[str, ...], tails: tuple[str, ...]) -> str:
    """The content without any of the heads and tails at its ends; as it is where nothing else would be left."""
    text = content
    while (bare := text.lstrip()).startswith(heads):
        text = bare.removeprefix(next(head for head in heads if bare.startswith(head))).lstrip("\n")
    while (bare := text.rstrip()).endswith(tails):
        text = bare.removesuffix(next(tail for tail in tails if bare.endswith(tail)))
    return text if text is content or text.strip() else content


def _written(tokenizer: PreTrainedTokenizerBase, known: _Known, role: str) -> _Written:
    """What the template writes around what a role says, rendered once for a template."""
    messages = [{"role": turn, "content": _PROBE if turn == role else "a"} for turn in _PROBES[role]]
    head = tail = ""
    with suppress(UserError):  # a role that the template refuses; rendering a conversation with it will say so
        head, _, tail = render(tokenizer, messages, add_generation_prompt=False).partition(_PROBE)
    controls, bos = controls_of(tokenizer), tokenizer.bos_token
    heads = {head[match.start() :].rstrip() for match in controls.finditer(head)} - {bos}
    tails = {tail[: match.end()].lstrip() for match in controls.finditer(tail)}
    if role == "assistant":
        tails |= {end for end in (_end(tokenizer, known).text, tokenizer.eos_token) if end}
    longest_first = (tuple(sorted(texts, key=len, reverse=True)) for texts in (heads, tails))
    known.written[role] = _Written(*longest_first, bool(bos) and head.startswith(bos))
    return known.written[role]


def _borders(tokenizer: PreTrainedTokenizerBase, known: _Known) -> list[str]:
    """The tokens of the template's generation prompt that cut a text wherever they stand: what is before one of them
    has no part in the ids from it on.

    Such are added tokens of a fast tokenizer, which it finds before it does anything else, the leftmost and of those
    the longest; not those that another may overlap, or whose neighbours decide whether they are found.
    """
    if known.borders is None:
        known.borders = []
        tail = ""
        if backend_of(tokenizer) is not None and not tokenizer.split_special_tokens:
            with suppress(UserError):  # a template that refuses this; rendering a row will say so
                tail = render(tokenizer, [{"role": "user", "content": _PROBE}], add_generation_prompt=True)
        added = [token for token in tokenizer.added_tokens_decoder.values() if not token.normalized] if tail else []
        for token in added:
            text = token.content
            others = [other.content for other in added if other.content != text]
            is_found = text in tail and text == text.strip() and not token.single_word
            if is_found and not any(map(partial(_hides, text), others)) and not _runs_into(text, text):
                known.borders.append(text)
    return known.borders


def _hides(text: str, other: str) -> bool:
    """Whether another token may be found in the place of one."""
    return text in other or _runs_into(other, text)


def _runs_into(first: str, second: str) -> bool:
    """Whether a part of the first at its end is one of the second at its beginning."""
    return any(first.endswith(second[:size]) for size in range(1, min(len(first), len(second))))


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str | Messages) -> list[int]:
    """Token ids of a prompt.

    A string that is raw text (see prompt_format.py) is tokenised as it is, with the special tokens its tokenizer puts
    in front (BOS; not a second one) but no EOS behind; messages, and strings that are a user's, go through the chat
    template with the generation prompt, without further special tokens.
    """
    return encode_one(tokenizer, prompt_steps(tokenizer, prompt))


def prompt_steps(tokenizer: PreTrainedTokenizerBase, prompt: str | Messages) -> Steps[list[int]]:
    """The steps of encode_prompt."""
    prompt = as_asked(tokenizer, prompt)
    if isinstance(prompt, str):
        return (yield from _plain(tokenizer, prompt))
    return (yield Ids((yield Rendered(_bare(tokenizer, _known_of(tokenizer), prompt), True))))


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a whole document: the text and EOS, which is not added to a text that ends with it."""
    return encode_one(tokenizer, text_steps(tokenizer, text))


def text_steps(tokenizer: PreTrainedTokenizerBase, text: str) -> Steps[list[int]]:
    """The steps of encode_text."""
    eos = _need_eos(tokenizer)
    ids = yield from _plain(tokenizer, _ended(tokenizer, text))
    return ids if ids[-1:] == [eos] else [*ids, eos]


def _ended(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """The text without blanks behind a token that ends it."""
    ends = tuple(filter(None, (tokenizer.eos_token, end_of_turn(tokenizer) if tokenizer.chat_template else None)))
    bare = text.rstrip()
    return bare if bare.endswith(ends) else text


def _plain(tokenizer: PreTrainedTokenizerBase, text: str) -> Steps[list[int]]:
    if not tokenizer.num_special_tokens_to_add():
        return (yield Ids(text))
    bare, ids = yield [Ids(text), Ids(text, special=True)]
    # Some tokenizers put EOS behind every text; a prompt that ends the document would ask for nothing.
    appended = ids[-1:] == [tokenizer.eos_token_id] and ids[len(ids) - len(bare) :] != bare
    ids = ids[:-1] if appended else ids
    # What a chat template wrote begins with BOS already.
    front = ids[: len(ids) - len(bare)]
    return bare if front and bare[: len(front)] == front else ids


def encode_response(tokenizer: PreTrainedTokenizerBase, prompt: str | Messages, response: str) -> list[int]:
    """Token ids of the reply alone, its stop token included.

    For messages they are what the chat template puts behind the generation prompt, up to and including the
    end-of-turn token; for a plain prompt, or a template without such a token, the text and EOS. A stop token that the
    reply ends with already is not added again.
    encode_prompt(prompt) + encode_response(prompt, response) is the sequence of every stage.
    Raises UserError: no EOS, or a template that rewrites the prompt or the reply when the two stand together.
    """
    _, [ids] = encode_one(tokenizer, replies_steps(tokenizer, prompt, [response]))
    return ids


def replies_steps(
    tokenizer: PreTrainedTokenizerBase, prompt: str | Messages, responses: Sequence[str], known: _Known | None = None
) -> Steps[tuple[list[int], list[list[int]]]]:
    """The steps of encode_prompt and of encode_response for each of the replies to that prompt -> ids of both.

    known: known_of(tokenizer), looked up once for many rows, between which nobody changes the tokenizer.
    """
    known, asked = known or known_of(tokenizer), as_asked(tokenizer, prompt)
    if isinstance(asked, str):
        replies = []
        stops = stop_token_ids(tokenizer)
        prompt_ids = yield from _plain(tokenizer, asked)
        for response in responses:
            response = _continued(tokenizer, asked, _ended(tokenizer, response))
            whole = yield from _plain(tokenizer, asked + response)
            ids = yield from _behind(prompt_ids, whole, response)
            replies.append(ids if ids and ids[-1] in stops else [*ids, known.eos])
        return prompt_ids, replies
    if isinstance(prompt, str) and open_transcript(prompt) is not None:  # as the replies of transcripts are read
        responses = [response.strip() or response for response in responses]
        responses = [response.removeprefix("Assistant:").lstrip() or response for response in responses]
    messages = [{"role": "assistant", "content": response} for response in responses]
    _, prompt_ids, replies = yield from _turns(
        tokenizer,
        known,
        _bare(tokenizer, known, asked),
        [_bare(tokenizer, known, [message])[0] for message in messages],
    )
    return prompt_ids, replies


def _continued(tokenizer: PreTrainedTokenizerBase, prompt: str, response: str) -> str:
    """The response without a head of its turn, control tokens and all, that the prompt ends with already."""
    bare, reply = prompt.rstrip(), response.lstrip()
    starts = [match.start() for match in controls_of(tokenizer).finditer(bare)]
    head = next((bare[start:] for start in starts[-4:] if reply.startswith(bare[start:])), "")
    return (head and reply.removeprefix(head).removeprefix(prompt[len(bare) :])) or response


def _behind(prompt_ids: list[int], whole: list[int], reply: str) -> Steps[list[int]]:
    """The reply's ids in whole; where a token straddles the border, the reply encoded alone: see the file's head."""
    n = len(prompt_ids)
    return whole[n:] if whole[:n] == prompt_ids else (yield Ids(reply))


def _turns(
    tokenizer: PreTrainedTokenizerBase, known: _Known, prompt: Messages, messages: Messages
) -> Steps[tuple[str, list[int], list[list[int]]]]:
    """Messages and replies to them, each by itself -> the text of the messages, its ids, and those of each reply."""
    text, *fulls = yield [Rendered(prompt, True), *[Rendered([*prompt, message], False) for message in messages]]
    stop = _end(tokenizer, known).text
    said = []
    for full, message in zip(fulls, messages, strict=True):
        said.append(full[(yield from _span(stop or "", full, text, prompt, message["content"]))])
    # From the prompt's last control token on: what stands before it has no part in a reply's ids.
    at = 0
    for border in _borders(tokenizer, known):
        at = max(at, text.rfind(border, -_TAIL))
    head = text[at:]
    prompt_ids, head_ids, *wholes = yield [Ids(text), Ids(head), *[Ids(head + reply) for reply in said]]
    replies = []
    for reply, whole in zip(said, wholes, strict=True):
        ids = yield from _behind(head_ids, whole, reply)
        complete = reply.endswith(stop) if stop else ids[-1:] == [known.eos]
        replies.append(ids if complete else [*ids, known.eos])
    return text, prompt_ids, replies


def _span(stop: str, full: str, head: str, before: Messages, content: str) -> Steps[slice]:
    """The part of full that is the reply to the messages before, whose text is head.

    stop: what ends a turn. The reply begins where the generation prompt ends. A finished turn may not repeat that (say,
    an empty thinking block): the policy continues the generation prompt, so its reply is then the content and what
    follows.
    Raises UserError naming the turn.
    """
    repeated = full.startswith(head)
    if not repeated:
        head = yield Rendered(before, False)
        if not full.startswith(head):
            turn = f"what stands before turn {len(before) + 1} once that turn is there"
            remedy = 'use another chat_template (e.g. "default") or single-turn data'
            raise UserError(f"the chat template rewrites {turn}, so the reply has no fixed place; {remedy}")
    for suffix in (stop, ""):  # "": a turn that ends differently from a plain reply, as MOSS commands do
        for text in (content, content.strip()):  # templates may strip
            at = full.find(text + suffix, len(head))
            if at >= 0 and not (stop and full.find(stop, len(head), at) >= 0):
                return slice(len(head) if repeated else at, at + len(text + suffix))
    raise UserError(f"the chat template changes the assistant's text in turn {len(before) + 1}; use another one")


def encode_conversation(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> tuple[list[int], list[bool]]:
    """(ids, mask) of a conversation that ends with an assistant turn.

    The mask is true on what the assistant says, the end-of-turn token of each of its turns included, and false on
    turns of weight 0. Of a tool's message of weight 1 (MOSS's results) the template's tags are learnt, not the content.
    ids equal encode_prompt(messages[:-1]) + encode_response(messages[:-1], last content). A token that straddles the
    border between a header and an earlier reply is not trained on.
    Raises UserError naming the turn where the template is not prefix-preserving.
    """
    return encode_one(tokenizer, conversation_steps(tokenizer, messages))


def conversation_steps(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> Steps[tuple[list[int], list[bool]]]:
    """The steps of encode_conversation."""
    known = known_of(tokenizer)
    *prompt, last = _bare(tokenizer, known, messages)
    text, prompt_ids, [response_ids] = yield from _turns(tokenizer, known, prompt, [last])
    stop = _end(tokenizer, known).text or ""
    mask = [False] * len(prompt_ids)
    spoken: dict[int, slice] = {}  # where the assistant's turns stand
    for turn, message in enumerate(prompt):
        if message["role"] == "assistant":
            before = prompt[:turn]
            head = yield Rendered(before, True)
            spoken[turn] = yield from _span(stop, text, head, before, message["content"])
    spans = [span for turn, span in spoken.items() if prompt[turn].get("weight") != 0]
    for turn, message in enumerate(prompt):
        if message["role"] == "tool" and message.get("weight") == 1:
            end = spoken[turn + 1].start if turn + 1 in spoken else len(text)
            spans += _around(text, message["content"], spoken[turn - 1].stop, end)
    for span in spans:
        # The text up to the span and the text up to its end, encoded alone, begin with the ids of the whole: as many
        # as they share stand before it, or before its end. A token that straddles its beginning is skipped.
        head_ids = yield Ids(text[: span.start])
        first = _common(prompt_ids, head_ids)
        first += first < len(head_ids)
        past = _common(prompt_ids, (yield Ids(text[: span.stop])))
        mask[first:past] = [True] * max(0, past - first)
    return prompt_ids + response_ids, mask + [last.get("weight") != 0] * len(response_ids)


def _around(text: str, content: str, start: int, end: int) -> list[slice]:
    """The parts of text[start:end] in front of a content, without the blanks between them, and behind it."""
    at = text.find(content, start, end)
    if at < 0:  # the template writes it otherwise: nothing of it is learnt
        return []
    return [slice(start, len(text[:at].rstrip(" "))), slice(at + len(content), end)]


def _common(a: list[int], b: list[int]) -> int:
    """Length of the common head of two lists."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def stop_token_ids(tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None = None) -> list[int]:
    """Ids that end a reply, sorted: EOS, all of generation_config.eos_token_id, the end-of-turn token."""
    ids = {_need_eos(tokenizer)}
    configured = generation_config.eos_token_id if generation_config is not None else None
    ends = configured if isinstance(configured, list) else [] if configured is None else [configured]
    if not all(type(token) is int and token >= 0 for token in ends):
        expected = "expected a token id or a list of them"
        raise UserError(f"generation_config.json: eos_token_id is {configured!r}; {expected}")
    ids.update(ends)
    end = _end(tokenizer, _known_of(tokenizer)).token if tokenizer.chat_template else None
    if end is not None:
        ids.add(end)
    return sorted(ids)


def render_prompt(prompt: str | Messages) -> str:
    """The text of a prompt as people read it and as reward functions get it.

    A string: itself; a single user message: its content; several messages: "role: content" lines.
    """
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n".join(f"{m['role']}: {m['content']}" for m in prompt)
