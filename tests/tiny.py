"""A tokenizer and models small enough to train inside a test, and feedback to train them on."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXTS = [
    "the cat sat on the mat and looked at the moon",
    "please tell me about the weather in the city",
    "thank you, the answer is yes; no, the answer is no",
    "今天北京的天气很好，谢谢您的提问。请问还有什么可以帮您？",
]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

# Of Llama and of all configurations that use its names; the ids are those of the tokenizer below.
SHAPE = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}


def tokenizer(*, pad_is_eos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 320 entries with EOS <|end|>, its own chat template, and a pad that may be the EOS."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(TEXTS, trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|end|>" if pad_is_eos else "<|pad|>"
    )
    made.chat_template = CHAT_TEMPLATE
    return made


def llama(*, seed: int = 0, vocab_size: int = 320, **changes: object) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SHAPE | {"vocab_size": vocab_size} | changes)).eval()


def gpt2(*, seed: int = 0, dropout: float = 0.0) -> GPT2LMHeadModel:
    """Learned positions: what left padding breaks."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=320, n_positions=128, n_embd=32, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=1,
        pad_token_id=0, resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, initializer_range=0.2,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


PROMPTS = ["the cat", "please tell me about the moon", "今天的天气", "thank you", "the answer is", "北京"]


def chat(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]
