"""The layouts of MOSS and MOSS-RLHF checkpoints, and what stock transformers calls their parts.

moss-moon-003 comes with code of its own, but is CodeGen tensor for tensor: the same names, the same order of q, k and v
in qkv_proj, the same rotary positions. A reward model of MOSS-RLHF is a LLaMA with `reward_head.weight`, which
transformers calls `score.weight`. MOSS-RLHF publishes differences to LLaMA-7B: of the tensors of its layers alone;
embeddings, final norm and heads are whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CodeGenConfig, GPTJConfig, GPTJForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from fastrlhf.checkpoint.weight_files import tensor_names, weight_files
from fastrlhf.config.errors import UserError
from fastrlhf.parallel.mapped import derived

COMMAND = "fastrlhf convert"
MOON_FIELDS = (
    "vocab_size", "n_positions", "n_ctx", "n_embd", "n_layer", "n_head", "rotary_dim", "n_inner",
    "activation_function", "resid_pdrop", "embd_pdrop", "attn_pdrop", "layer_norm_epsilon", "initializer_range",
    "use_cache", "bos_token_id", "eos_token_id", "tie_word_embeddings",
)  # fmt: skip
MOON_TOKENS = ("<eoh>", "<eot>", "<eoc>", "<eor>", "<eom>")  # the ends of MOSS's parts; the tags before them are text
QKV_BLOCKS = 4
REWARD_HEAD = "reward_head.weight"
BUFFERS = re.compile(r"\.(causal_mask|rotary_emb\.inv_freq)$")  # saved by older code, computed by today's
LAYER = re.compile(r"(^|\.)(layers|h|blocks)\.\d+\.")
NORM = re.compile(LAYER.pattern + r".*(norm|ln_)[^.]*$")
NEAR_ZERO = 0.05  # LLaMA-7B's norms are 0.3 in the median; fine-tuning moves them by hundredths
SAME_BASE = 0.5  # cosine of a fine-tuned embedding and its base's: near 1; of two models' of the same shape: near 0
# Sums of all weights that MOSS-RLHF publishes, with or without the rotary buffers that transformers once saved.
PUBLISHED_SUMS = {
    "reward model (en)": 50810.703125,
    "SFT model (en)": 50874.84765625,
    "reward model (zh)": 49954.0859375,
}


# ------------------------------------------------------------------------------------------------ what a folder is


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder; UserError where it cannot be read or is no mapping."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        what = "there is none" if isinstance(error, FileNotFoundError) else f"damaged ({error})"
        raise UserError(f"{path}: {what}; a model folder needs its config.json") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected a mapping, found {type(config).__name__}")
    return config


def is_moon(config: Mapping[str, Any]) -> bool:
    """Whether a config is of moss-moon-003's kind; newer models of that name have another trunk."""
    return config.get("model_type") == "moss" and "n_embd" in config and "rotary_dim" in config


def is_packed(config: Mapping[str, Any], names: Collection[str]) -> bool:
    """Whether a MOSS folder is an int4 or int8 variant."""
    return config.get("wbits") not in (None, 16, 32) or any(name.endswith((".qweight", ".qzeros")) for name in names)


def has_reward_head(config: Mapping[str, Any], names: Collection[str]) -> bool:
    """Whether a folder is a reward model of MOSS-RLHF."""
    return REWARD_HEAD in names or "LlamaRewardModel" in (config.get("architectures") or [])


def check_stock(source: str, role: str, *, weights: bool = True) -> None:
    """UserError naming `fastrlhf convert` for a folder in a layout that it turns into one that loads; reads no weights.

    Without this transformers would ask for code of strangers, or drop the head of a reward model without a word.
    weights: false where the folder is only to give its tokenizer.
    """
    folder = Path(source)
    if not (folder / "config.json").is_file():
        return
    try:
        config = read_config(folder)
    except UserError as error:
        raise UserError(f"{role}: cannot load {source!r}: {error}") from error
    if config.get("model_type") == "moss":
        why = "is in MOSS's own layout, which needs code of its own (auto_map)"
        raise UserError(f"{role}: {source!r} {why}; {_remedy(source)}")
    if weights and has_reward_head(config, tensor_names(folder)):
        refuse_reward_head(source, role)
    if weights and any(path.suffix == ".bin" for path in weight_files(folder)):
        why = "holds pickled weights (.bin), which are not read, and no safetensors"
        raise UserError(f"{role}: {source!r} {why}; {_remedy(source)}")


def refuse_reward_head(source: str, role: str) -> NoReturn:
    """The UserError for a model with the head of MOSS-RLHF's reward models."""
    raise UserError(f"{role}: {source!r} is a reward model in MOSS-RLHF's layout ({REWARD_HEAD}); {_remedy(source)}")


def remedy_for(source: str, error: str) -> str | None:
    """What to do about an error of transformers over code of a model's own or pickled weights; None: another error."""
    if "trust_remote_code" in error or "custom code" in error:
        known = f"of such models `{COMMAND}` knows moss-moon-003"
        return (
            f"it needs code of its own (auto_map), which is never run; {known}, else take one that transformers knows"
        )
    if "no file named" in error.lower() and "safetensors" in error:
        return f"it has no safetensors; if its weights are pickled (.bin), {_remedy(source)}"
    return None


def _remedy(source: str) -> str:
    return f"convert it first: {COMMAND} {source if Path(source).exists() else 'FOLDER'} OUT"


# --------------------------------------------------------------------------------------------------------- moss-moon


def codegen_config(config: Mapping[str, Any]) -> CodeGenConfig:
    """The CodeGen that a moss-moon config describes."""
    return CodeGenConfig(**{name: config[name] for name in MOON_FIELDS if name in config})


@torch.no_grad()
def gptj_of(model: PreTrainedModel) -> GPTJForCausalLM:
    """A CodeGen as the GPT-J that computes the same: of the two, transformers has a sequence classifier of GPT-J only.

    CodeGen lays the rows of q, v and k out in four blocks of heads, GPT-J has a matrix of each; all else is equal. The
    other weights are shared with the model.
    """
    names = [*MOON_FIELDS, "pad_token_id"]
    fields = {name: getattr(model.config, name) for name in names if hasattr(model.config, name)}
    config = GPTJConfig(**fields | dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0))
    with no_init_weights():  # in the model's dtype, in which its table of positions is computed too
        other = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    weights = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not name.endswith("attn.qkv_proj.weight"):
            weights[name] = derived(parameter, lambda values: values)
            continue
        for part, letter in enumerate("qvk"):
            weights[name.replace("qkv_", f"{letter}_")] = derived(parameter, partial(_part, part))
    other.load_state_dict({**other.state_dict(), **weights}, assign=True)
    return other.eval()


def _part(number: int, qkv: Tensor) -> Tensor:
    """The rows of q, v or k (0, 1, 2) in CodeGen's weight of all three."""
    return qkv.view(QKV_BLOCKS, 3, -1, qkv.shape[1])[:, number].reshape(-1, qkv.shape[1])


# ------------------------------------------------------------------------------------------------------- differences


@torch.no_grad()
def is_difference(model: PreTrainedModel) -> bool:
    """Whether the weights are likely differences to another model's: the norms of most layers pass nothing on.

    Norms are asked for what they do, not for their weights: some architectures scale by 1 + weight.
    """
    scales = []
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if NORM.search(name) and isinstance(weight, Tensor) and weight.dim() == 1 and not weight.is_meta:
            scales.append(_scale(module, weight))
    return bool(scales) and sorted(scales)[len(scales) // 2] < NEAR_ZERO


def _scale(norm: nn.Module, weight: Tensor) -> float:
    """Root mean square of what a norm makes of 1, -1, 1, -1 ..., whose mean is 0 and whose square is 1."""
    signs = torch.ones_like(weight)
    signs[1::2] = -1
    return float(norm(signs).float().square().mean().sqrt())


def check_no_difference(model: PreTrainedModel, source: str, role: str) -> None:
    """UserError for a loaded model whose weights are likely differences."""
    if is_difference(model):
        raise UserError(
            f"{role}: {source!r} likely holds differences to another model's weights, as its norm weights are near 0; "
            f"add them to that model: {COMMAND} {source} OUT --base FOLDER"
        )


def published_sum(total: float, config: Mapping[str, Any]) -> str | None:
    """Which published model all weights sum up to, with or without the rotary buffers; None: none of them."""
    size = int(config["hidden_size"]) // int(config["num_attention_heads"])
    buffers = int(config["num_hidden_layers"]) * sum(10000.0 ** (-i / size) for i in range(0, size, 2))
    for name, published in PUBLISHED_SUMS.items():
        if any(abs(value - published) <= 1e-5 * published for value in (total, total + buffers)):
            return name
    return None
