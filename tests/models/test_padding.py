"""Which token pads: one that ends no reply, by hand-made tokenizers."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fastrlhf.models import loading, saving
from fastrlhf.models.saving import padding_token
from tests import tiny

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
EOS, OTHER, THIRD = (len(BYTES) + i for i in (2, 3, 4))


def tokenizer(special: tuple[str, ...] = ("<eos>",), **roles: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE of the bytes, "Ġt", which is a token for " t", and "th"; then the special tokens, EOS first."""
    vocabulary = {token: i for i, token in enumerate([*BYTES, "Ġt", "th"])}
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ġ", "t"), ("t", "h")]))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.add_special_tokens(list(special))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>", **roles)


THREE = ("<eos>", "<one>", "<two>")
SPELT_ELSEWHERE = len(BYTES)  # "Ġt": the highest id that is no stop and is not spelt as its text


@pytest.mark.parametrize(
    ("given", "stops", "token"),
    [
        (tokenizer(THREE, pad_token="<two>", unk_token="<one>"), {EOS}, THIRD),
        (tokenizer(THREE, pad_token="<eos>", unk_token="<two>", bos_token="<one>"), {EOS}, THIRD),
        (tokenizer(THREE, unk_token="<two>", bos_token="<one>"), {EOS}, THIRD),
        (tokenizer(THREE, pad_token="<eos>", bos_token="<two>"), {EOS}, THIRD),
        (tokenizer(THREE, pad_token="<one>", unk_token="<eos>", bos_token="<two>"), {EOS, OTHER}, THIRD),
        (tokenizer(THREE, pad_token="<eos>", bos_token="<one>"), {EOS, OTHER}, THIRD),
        (tokenizer(THREE, pad_token="<eos>"), {EOS}, OTHER),
        (tokenizer(pad_token="<eos>"), {EOS}, SPELT_ELSEWHERE),
        (tokenizer(), {EOS, SPELT_ELSEWHERE, BYTES.index("Ġ")}, max(i for i, b in enumerate(BYTES) if ord(b) > 126)),
        (tokenizer(pad_token="<eos>"), set(range(EOS + 1)), EOS),
    ],
    ids=["own pad", "pad is eos: unk", "no pad: unk", "no unk: bos", "pad and unk are stops: bos",
         "bos is a stop: added", "nothing but eos and added", "GPT-2", "GPT-2, another", "all stops"],
)  # fmt: skip
def test_the_padding_token(given, stops, token):
    assert padding_token(given, stops) == token
    assert token in stops or padding_token(given, stops | {token}) != token


def test_a_tokenizer_all_of_whose_tokens_are_their_text_pads_with_its_last():
    words = {"a": 0, "b": 1, "<eos>": 2}
    given = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, "a")), eos_token="<eos>")
    given.unk_token = None
    assert padding_token(given, {2}) == 1


def test_generation_pads_with_special_tokens_only():
    """It prints others; EOS where there is none."""
    assert padding_token(tokenizer(pad_token="<eos>"), {EOS}, special=True) == EOS
    assert padding_token(tokenizer(THREE, pad_token="<eos>"), {EOS}, special=True) == OTHER


@pytest.mark.parametrize(("special", "padding"), [(("<eos>",), EOS), (THREE, OTHER)])
def test_saved_folders_name_it(tmp_path, special, padding):
    given = tokenizer(special, pad_token="<eos>")
    policy = tiny.llama()
    saving.write_model(tmp_path / "policy", policy, given, [EOS])
    saved = json.loads((tmp_path / "policy" / "generation_config.json").read_text())
    assert saved["pad_token_id"] == padding and saved["eos_token_id"] == EOS
    assert loading.load_tokenizer(str(tmp_path / "policy")).pad_token_id == EOS  # the policy's stays as it was
    scorer = loading.scalar_model(policy, given, seed=0)
    assert scorer.config.pad_token_id == padding_token(given, {EOS}) != EOS
    saving.write_model(tmp_path / "scorer", scorer, given, [EOS])
    assert loading.load_tokenizer(str(tmp_path / "scorer")).pad_token_id == scorer.config.pad_token_id
