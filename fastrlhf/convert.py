"""`fastrlhf convert`: a folder that stock transformers does not load becomes one that it does, shard by shard.

Four kinds are told apart: moss-moon-003 (a CodeGen under another name), a reward model of MOSS-RLHF, differences to
another model's weights, and any model whose weights are pickled. No code that comes with a model runs.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import (
    AddedToken,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    CodeGenForCausalLM,
    GenerationConfig,
    GPT2Tokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from fastrlhf.checkpoint.atomic import replace_folder
from fastrlhf.checkpoint.weight_files import SHARD_BYTES, WEIGHT_FILE, Header, ShardWriter, WeightFiles
from fastrlhf.config.errors import UserError
from fastrlhf.data.templates import PRESETS, resolve_chat_template, stop_token_ids
from fastrlhf.models import moss
from fastrlhf.models.adapter_folder import is_adapter
from fastrlhf.models.saving import padding_token
from fastrlhf.models.sources import loaded

SUM_SHARD_BYTES = 512 << 20  # sums are made in memory
SUM_AT_ONCE = 1 << 23  # elements
KEPT = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".md", "LICENSE", "NOTICE")  # endings of files beside weights
CHECKSUM_TOLERANCE = 1e-5  # relative, as MOSS-RLHF compares
ROLE = "convert"


@dataclass(frozen=True)
class Plan:
    """What becomes of a folder. rename: a tensor's new name, None: left out. sums: names that are differences."""

    what: str
    files: WeightFiles
    config: dict[str, Any] | PreTrainedConfig
    rename: Callable[[str], str | None] = str
    base: WeightFiles | None = None
    sums: Collection[str] = ()
    tokenizer: PreTrainedTokenizerBase | None = None  # None: its files are copied
    template: str | None = None  # a chat template to write beside copied files
    stem: str = "model"


def convert(folder: str, out: str, base: str | None = None, checksum: float | None = None) -> list[str]:
    """Write `out`, a folder that stock transformers loads -> sentences on what was done.

    base: the folder that differences are added to. checksum: what all weights must sum up to. Raises UserError for what
    cannot be converted, before anything is written where reading configs and the heads of files tells; `out` appears
    whole or not at all, and must be empty or not be there.
    """
    source, target = Path(folder), Path(os.path.realpath(out))
    _check_folder(source, "FOLDER")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"OUT: {out} exists and is {'not empty' if target.is_dir() else 'a file'}; name another folder")
    if base is None and checksum is not None:
        raise UserError("--checksum: it is of differences added to their base; give --base, or leave it out")
    plan = _plan(source, base)
    _check_room(target, plan)
    lines = [f"{folder}: {plan.what}"]

    def write(tmp: Path) -> None:
        total = _write_weights(plan, tmp)
        _write_rest(plan, tmp)
        if plan.base is not None:
            lines.append(_checked_sum(total, checksum, plan.config))

    replace_folder(write, target)
    size = sum(path.stat().st_size for path in target.glob("*.safetensors"))
    return [*lines, f"{out}: {len(list(target.glob('*.safetensors')))} safetensors, {size / 2**30:.2f} GiB"]


def _check_folder(path: Path, name: str) -> None:
    if not path.is_dir():
        what = "is a file" if path.is_file() else "does not exist"
        raise UserError(f"{name}: the folder {str(path)!r} {what}; fetch a model of the hub to the disk first")
    if not (path / "config.json").is_file() and not is_adapter(path):
        gguf = "; a GGUF file is read as it is" if any(path.glob("*.gguf")) else ""
        raise UserError(f"{name}: {str(path)!r} holds no config.json, so it is no model folder{gguf}")


# ------------------------------------------------------------------------------------------------------ what it is


def _plan(source: Path, base: str | None) -> Plan:
    """What the folder is, from its config and the heads of its files. UserError for what cannot be converted."""
    if is_adapter(source):
        return _plan_pickles(source, WeightFiles(source), {}, base)
    config = moss.read_config(source)
    if config.get("model_type") == "moss":
        return _plan_moon(source, config, base)
    if str(config.get("model_type")) not in CONFIG_MAPPING:
        kind = f"model_type {config.get('model_type')!r}, which transformers does not know"
        code = "; it comes with code of its own (auto_map), which is never run" if "auto_map" in config else ""
        raise UserError(
            f"FOLDER: {str(source)!r} has {kind}{code}; of such folders only moss-moon-003 can be converted"
        )
    files = WeightFiles(source)
    reward = moss.has_reward_head(config, files.headers)
    if reward and moss.REWARD_HEAD not in files:
        raise UserError(f"FOLDER: {str(source)!r} is a LlamaRewardModel, but its weights hold no {moss.REWARD_HEAD}")
    stock = _stock_model(config, reward, str(source))
    differs = stock is not None and _is_difference(stock, files)
    if differs != (base is not None):
        raise UserError(_wrong_base_option(str(source), differs))
    if not (reward or differs):
        return _plan_pickles(source, files, config, base)
    whole = None if base is None else _base_files(source, base, files, config)
    sums = () if whole is None else _names_of_differences(stock, files)
    if whole is not None:
        _check_base(stock, files, whole, sums, base)
    rename = _reward_name if reward else _without_buffers
    _check_names(stock, files.headers, rename, str(source))
    what = "a reward model in MOSS-RLHF's layout, to a sequence classifier" if reward else f"a {type(stock).__name__}"
    if whole is not None:
        what += f"; {len(sums)} tensors are differences, added to those of {base}"
    template = _moss_rlhf_template(source) if reward or len(sums) < len(files.headers) else None
    stock.config.dtype = _dtype(files.headers)
    return Plan(what, files, stock.config, rename, whole, sums, template=template)


def _wrong_base_option(source: str, differs: bool) -> str:
    if differs:
        why = "likely holds differences to another model's weights, as its norm weights are near 0"
        return f"FOLDER: {source!r} {why}; name that model: --base FOLDER"
    return f"--base: the norm weights of {source!r} are not near 0, so they are no differences; leave --base out"


def _plan_moon(source: Path, config: dict[str, Any], base: str | None) -> Plan:
    if base is not None:
        raise UserError("--base: moss-moon-003 is published whole; leave --base out")
    if not moss.is_moon(config):
        raise UserError(
            f"FOLDER: {str(source)!r} has model_type 'moss' without n_embd and rotary_dim: a newer model of that name, "
            "on another trunk than moss-moon-003's; it cannot be converted"
        )
    packed = moss.is_packed(config, ())
    files = None if packed else WeightFiles(source)
    if packed or moss.is_packed(config, files.headers):
        raise UserError(
            f"FOLDER: {str(source)!r} is an int4 or int8 variant (wbits = {config.get('wbits')}): its weights are "
            "packed for a kernel of MOSS's own; convert the fp16 model, and load that with quantize=nf4 or int8"
        )
    with torch.device("meta"):
        model = loaded(ROLE, source, lambda: CodeGenForCausalLM(moss.codegen_config(config)))
    _check_names(model, files.headers, _without_buffers, str(source))
    tokenizer = _moon_tokenizer(source, model.config)
    model.config.dtype = _dtype(files.headers)
    model.config.architectures = [type(model).__name__]
    return Plan("moss-moon-003's layout, to CodeGen", files, model.config, _without_buffers, tokenizer=tokenizer)


def _plan_pickles(source: Path, files: WeightFiles, config: dict[str, Any], base: str | None) -> Plan:
    """Any model, or adapter, as it is, in safetensors."""
    if base is not None:
        raise UserError(f"--base: {str(source)!r} is an adapter, no folder of differences; leave --base out")
    if files.paths[0].suffix == ".safetensors":
        raise UserError(f"FOLDER: {str(source)!r} is in the stock layout with safetensors; it needs no conversion")
    known = [name for name in config.get("architectures") or [] if hasattr(transformers, str(name))]
    config = {name: value for name, value in config.items() if name != "auto_map"}
    if config and not known:  # as MOSS-RLHF's ["Llama"]
        config["architectures"] = [type(model).__name__ for model in [_causal_lm(config)] if model is not None]
    stem = "model" if config else "adapter_model"
    return Plan("pickled weights, to safetensors", files, config, stem=stem)


def _config_of(config: Mapping[str, Any], source: str) -> PreTrainedConfig:
    return loaded(ROLE, source, lambda: CONFIG_MAPPING[config["model_type"]].from_dict(dict(config)))


def _causal_lm(config: Mapping[str, Any], source: str = "config.json") -> PreTrainedModel | None:
    """A causal LM of this config without memory for weights; None where transformers has none of its kind."""
    try:
        stock = _config_of(config, source)
        with torch.device("meta"):
            return loaded(ROLE, source, lambda: AutoModelForCausalLM.from_config(stock))
    except UserError:
        return None


def _stock_model(config: Mapping[str, Any], reward: bool, source: str) -> PreTrainedModel | None:
    """The stock model that the weights are of, without memory for them."""
    if not reward:
        return _causal_lm(config, source)
    stock = _config_of(config, source)
    stock.num_labels = 1
    stock.id2label, stock.label2id = {0: "score"}, {"score": 0}
    if stock.pad_token_id is None or stock.pad_token_id == stock.eos_token_id:
        stock.pad_token_id = 0  # <unk>, with which MOSS-RLHF pads: no reply ends with it
    with torch.device("meta"):
        model = loaded(ROLE, source, lambda: AutoModelForSequenceClassification.from_config(stock))
    model.config.architectures = [type(model).__name__]
    return model


def _without_buffers(name: str) -> str | None:
    return None if moss.BUFFERS.search(name) else name


def _reward_name(name: str) -> str | None:
    if name.startswith("lm_head."):  # never read by a reward model
        return None
    return "score.weight" if name == moss.REWARD_HEAD else _without_buffers(name)


def _check_names(
    model: PreTrainedModel, headers: Mapping[str, Header], rename: Callable[[str], str | None], source: str
) -> None:
    """UserError where the weights are not those of the model, each of its tensors in its shape."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    given = {rename(name): header.shape for name, header in headers.items() if rename(name) is not None}
    tied = {"lm_head.weight"} if getattr(model.config, "tie_word_embeddings", False) else set()
    kind = type(model).__name__
    for name in sorted(expected.keys() - given.keys() - tied):
        raise UserError(f"FOLDER: {source!r} has no weights for {name!r} of {kind}; its files are not complete")
    for name in sorted(given.keys() - expected.keys()):
        raise UserError(f"FOLDER: {source!r} has weights {name!r}, which no {kind} of its config has")
    for name, shape in given.items():
        if shape != expected[name]:
            raise UserError(f"FOLDER: {name!r} is {list(shape)}; by config.json it would be {list(expected[name])}")


def _dtype(headers: Mapping[str, Header]) -> torch.dtype:
    """The dtype of most weights."""
    dtypes = [header.dtype for header in headers.values() if header.dtype.is_floating_point]
    return max(set(dtypes), key=dtypes.count) if dtypes else torch.float32


# ------------------------------------------------------------------------------------------------------ differences


def _is_difference(model: PreTrainedModel, files: WeightFiles) -> bool:
    """`moss.is_difference` of weights on the disk: only those of norms are read."""
    for name, parameter in list(model.named_parameters()):
        module, _, last = name.rpartition(".")
        if last == "weight" and moss.NORM.search(module) and parameter.dim() == 1 and name in files:
            norm, weight = model.get_submodule(module), files.get(name)
            if weight.shape == parameter.shape:
                norm.to_empty(device="cpu")
                state = {key: torch.zeros(value.shape) for key, value in norm.state_dict().items()}
                norm.float().load_state_dict({**state, "weight": weight.float()})
    return moss.is_difference(model)


def _base_files(source: Path, base: str, files: WeightFiles, config: Mapping[str, Any]) -> WeightFiles:
    _check_folder(Path(base), "--base")
    if Path(base).resolve() == source.resolve():
        raise UserError(f"--base: {base} is FOLDER itself; name the model that the differences were taken from")
    other = moss.read_config(Path(base)).get("model_type")
    if other != config.get("model_type"):
        raise UserError(f"--base: {base} is a {other!r}, the differences are of a {config.get('model_type')!r}")
    return WeightFiles(Path(base))


def _names_of_differences(model: PreTrainedModel, files: WeightFiles) -> list[str]:
    """MOSS-RLHF's: the tensors of layers. Where the final norm is near 0 too, everything is a difference."""
    norms = [name for name in files.headers if name.endswith("norm.weight") and not moss.NORM.search(name[:-7])]
    whole = any(float(files.get(name).float().abs().mean()) > moss.NEAR_ZERO for name in norms)
    names = [name for name in files.headers if _without_buffers(name) and name != moss.REWARD_HEAD]
    return [name for name in names if moss.LAYER.search(name)] if whole else names


def _check_base(
    model: PreTrainedModel, files: WeightFiles, base: WeightFiles, sums: Collection[str], source: str
) -> None:
    """UserError where the base cannot be the one that the differences were taken from."""
    for name in sums:
        if name not in base:
            raise UserError(f"--base: {source} has no {name!r}, so the differences were not taken from it")
        ours, theirs = files.headers[name].shape, base.headers[name].shape
        if ours != theirs:
            shapes = f"{name!r} is {list(theirs)} there and {list(ours)} here"
            raise UserError(f"--base: {source} is not what the differences were taken from: {shapes}")
    embedding = next(n for n, m in model.named_modules() if m is model.get_input_embeddings()) + ".weight"
    if embedding in sums or embedding not in files or embedding not in base:
        return
    ours, theirs = files.get(embedding), base.get(embedding)
    rows = min(len(ours), len(theirs), 4096)
    alike = _cosine(ours[:rows], theirs[:rows]) if ours.shape[1:] == theirs.shape[1:] else 0.0
    if alike < moss.SAME_BASE:
        why = f"its {embedding} has a cosine of {alike:.2f} with the one here, a fine-tuned one would be near 1"
        raise UserError(f"--base: {source} is likely not what the differences were taken from: {why}")


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0))


def _checked_sum(total: float, checksum: float | None, config: PreTrainedConfig) -> str:
    """A sentence on the sum of all weights. UserError where it is not the one given."""
    if checksum is not None and not abs(total - checksum) <= CHECKSUM_TOLERANCE * abs(checksum):
        raise UserError(
            f"--checksum: all weights sum up to {total:.6f}, not {checksum:.6f}: another base, or a damaged file"
        )
    published = moss.published_sum(total, config.to_dict())
    known = f", that of MOSS-RLHF's {published}" if published else ""
    return f"checksum: all weights sum up to {total:.6f}{known}"


# ---------------------------------------------------------------------------------------------------------- writing


def _check_room(target: Path, plan: Plan) -> None:
    """UserError where the disk has less room than the weights need."""
    headers = plan.files.headers
    needed = sum(torch.Size(h.shape).numel() * h.dtype.itemsize for name, h in headers.items() if plan.rename(name))
    place = next(parent for parent in target.parents if parent.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(f"OUT: {place} has {free / 2**30:.1f} GiB free, the weights need {needed / 2**30:.1f}")


def _write_weights(plan: Plan, folder: Path) -> float:
    """Write the weights -> with a base the sum of all of them, also of those left out."""
    writer = ShardWriter(folder, plan.stem, SUM_SHARD_BYTES if plan.base else SHARD_BYTES)
    total = 0.0
    for names in plan.files.shards():
        for name in names:
            if _without_buffers(name) is None:
                continue
            tensor = plan.files.get(name)
            if plan.base is not None:
                tensor, part = _summed(tensor, plan.base.get(name) if name in plan.sums else None)
                total += part
            new = plan.rename(name)
            full = new is not None and writer.add(new, tensor)
            del tensor
            if full or plan.base is not None:
                _release(plan)
        writer.flush()
        _release(plan)
    writer.close()
    return total


def _summed(tensor: Tensor, base: Tensor | None) -> tuple[Tensor, float]:
    """-> (tensor + base in the tensor's dtype, made in fp32; the sum of its elements). A few rows at a time."""
    if tensor.dim() == 0 or not tensor.is_floating_point():
        return (tensor if base is None else tensor + base), float(tensor.double().sum())
    result = tensor if base is None else torch.empty_like(tensor, memory_format=torch.contiguous_format)
    total, rows = 0.0, max(1, SUM_AT_ONCE * len(tensor) // max(1, tensor.numel()))
    for start in range(0, len(tensor), rows):
        part = slice(start, start + rows)
        exact = tensor[part].float()
        if base is not None:
            exact = exact + base[part].float()
            result[part] = exact
        total += float(exact.sum())
    return result, total


def _release(plan: Plan) -> None:
    plan.files.release()
    if plan.base is not None:
        plan.base.release()


def _write_rest(plan: Plan, folder: Path) -> None:
    """Config, tokenizer and what else lies beside the weights."""
    own = {"config.json"} if plan.tokenizer is None else {"config.json", "generation_config.json"}
    for path in sorted(plan.files.folder.iterdir()):
        weights = WEIGHT_FILE.fullmatch(path.name) or path.name.endswith(".index.json")
        of_tokenizer = plan.tokenizer is not None and not path.name.endswith((".md", "LICENSE", "NOTICE"))
        if path.is_file() and path.name.endswith(KEPT) and path.name not in own and not weights and not of_tokenizer:
            shutil.copyfile(path, folder / path.name)
    if isinstance(plan.config, PreTrainedConfig):
        plan.config.save_pretrained(folder)
    elif plan.config:
        (folder / "config.json").write_text(json.dumps(plan.config, indent=2) + "\n", encoding="utf-8")
    if plan.config:
        loaded(ROLE, plan.files.folder, lambda: AutoConfig.from_pretrained(folder, trust_remote_code=False))
    if plan.tokenizer is not None:
        _generation_config(plan).save_pretrained(folder)
        plan.tokenizer.save_pretrained(folder)
    if plan.template is not None:
        _write_legacy_tokenizer(folder, plan.template)


def _generation_config(plan: Plan) -> GenerationConfig:
    stops = stop_token_ids(plan.tokenizer)
    pad = padding_token(plan.tokenizer, stops, special=True)
    eos = stops if len(stops) > 1 else stops[0]
    return GenerationConfig(bos_token_id=plan.tokenizer.bos_token_id, eos_token_id=eos, pad_token_id=pad)


# -------------------------------------------------------------------------------------------------------- tokenizers


def _moon_tokenizer(source: Path, config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    """MOSS's byte-level BPE as a stock GPT2Tokenizer, the ends of its parts as special tokens, and, where replies end
    with <eom>, its chat template. UserError where files are missing or a token gets another id than they say."""
    for name in ("vocab.json", "merges.txt"):
        if not (source / name).is_file() and not (source / "tokenizer.json").is_file():
            raise UserError(f"FOLDER: {str(source)!r} has no {name}, which its tokenizer is made of; copy it there too")

    def load() -> tuple[PreTrainedTokenizerBase, dict[str, int]]:
        named = [source / name for name in ("tokenizer_config.json", "special_tokens_map.json")]
        states_eos = any(path.is_file() and "eos_token" in json.loads(path.read_text("utf-8")) for path in named)
        default = {} if states_eos else {"eos_token": moss.MOON_TOKENS[-1]}  # of MOSS's own class
        tokenizer = GPT2Tokenizer.from_pretrained(source, trust_remote_code=False, **default)
        ends = [token for token in moss.MOON_TOKENS if token in tokenizer.get_vocab()]
        # Plain added tokens in the files; special ones keep the blanks around them and are left out of shown replies.
        special = [AddedToken(token, special=True, normalized=False) for token in ends]
        tokenizer.add_special_tokens({"additional_special_tokens": special})
        tokenizer.init_kwargs.pop("auto_map", None)
        return tokenizer, dict(json.loads(added.read_text(encoding="utf-8"))) if added.is_file() else {}

    added = source / "added_tokens.json"
    tokenizer, stated = loaded("tokenizer", source, load)
    for token, index in stated.items():
        if tokenizer.convert_tokens_to_ids(token) != index:
            got = tokenizer.convert_tokens_to_ids(token)
            raise UserError(
                f"{added}: {token!r} is to be {index}, but behind vocab.json it is {got}; vocab.json is another's"
            )
    if len(tokenizer) > config.vocab_size:
        size = f"{len(tokenizer)} tokens, the model {config.vocab_size}"
        raise UserError(f"FOLDER: {str(source)!r}: its tokenizer has {size}; the files are of two models")
    if tokenizer.eos_token == moss.MOON_TOKENS[-1]:
        resolve_chat_template(tokenizer, "moss")
    return tokenizer


def _moss_rlhf_template(source: Path) -> str | None:
    """MOSS-RLHF's preset, the Chinese one where its tags are tokens; None: the folder has a template of its own."""
    files = list(source.glob("*token*.json"))
    texts = loaded("tokenizer", source, lambda: {path.name: path.read_text(encoding="utf-8") for path in files})
    if (source / "chat_template.jinja").is_file() or "chat_template" in texts.get("tokenizer_config.json", ""):
        return None
    chinese = any("<|Human|>" in text for text in texts.values())
    return "moss-rlhf-zh" if chinese else "moss-rlhf-en"


def _write_legacy_tokenizer(folder: Path, template: str) -> None:
    """The chat template beside the tokenizer's files, and `legacy`: text behind </s> gets the ids that MOSS-RLHF
    trained on; without it transformers gives others today."""
    (folder / "chat_template.jinja").write_text(PRESETS[template], encoding="utf-8")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"tokenizer_class": "LlamaTokenizer"}
    if not (folder / "tokenizer.json").is_file():
        config["legacy"] = True
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
