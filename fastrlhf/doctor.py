"""`fastrlhf doctor`: one table of what a run stands on, green or red, and what to do about each red line.

Nothing is changed and nothing is trained. What a check needs of a model (its kernels at this vocabulary and width, its
log-probs in every form that training reads them in) is computed by the code that a run would use.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from packaging.requirements import Requirement
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import fastrlhf_kernels as kernels
from fastrlhf.checkpoint.quiet import quiet_loading
from fastrlhf.config.errors import UserError
from fastrlhf.config.stages import PPOConfig, RewardConfig, SFTConfig
from fastrlhf.data.encode import Encoder
from fastrlhf.data.rendering import render
from fastrlhf.data.templates import (
    encode_conversation,
    encode_prompt,
    encode_response,
    settle_template,
    stop_token_ids,
)
from fastrlhf.models.heads import check_packing, lm_head
from fastrlhf.models.loading import frozen_copy, is_scalar_model, load_policy, load_reward_model, load_tokenizer
from fastrlhf.models.sources import locate
from fastrlhf.models.token_batch import TokenRows, target_log_probs
from fastrlhf.preflight.rows import check_dropped, describe_rows
from fastrlhf.rl.scorers import score_rows
from fastrlhf.rollout.engine import RolloutEngine, position_limits
from fastrlhf.runtime.distributed import device as local_device
from fastrlhf.runtime.hardware import resolve_attention, resolve_dtype
from fastrlhf.runtime.memory import free_bytes
from fastrlhf_kernels import reference
from fastrlhf_kernels.backend import OLDEST, TRITON, choose_backend

LEAST_DISK = 1 << 30
SAMPLE = 2000  # rows of --data that are encoded
ROWS, TOKENS = 8, 6  # of the kernels' trial
BLOCK = 4096  # rows of the head that are in float64 at a time: all of them would be 4.9 GB at V = 150,000, H = 4096
EXACT, ROUNDED = 1e-4, 1e-2  # of the largest number: fp32 results; gradients that are kept in bf16 or fp16
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")
SAMPLES = ["Hello, world!", "今天北京的天气很好。", "def f(x):\n    return x  # naïve 🙂"]
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER = "Paris."
BENCHES = ("bench.gpu_kernels", "bench.kernels", "bench.rollout", "bench.ppo_step", "bench.optimizers")


class Line(NamedTuple):
    """A line of the table. fault: whether it is red; found: what is there; do: what to do, where there is something."""

    area: str
    what: str
    fault: bool
    found: str
    do: str = ""


def examine(model: str | None, data: str | None, *, peers: bool = False) -> list[Line]:
    """Every line, area by area. UserError for a model that is not there at all; what is wrong with one is a line."""
    lines = [*check_versions(), *check_machine(model)]
    tokenizer = loaded = None
    if model is not None:
        lines += check_folder(model)
        tokenizer, line = _try(lambda: load_tokenizer(model), "tokenizer", "loads", "use a folder with its tokenizer")
        lines += [line] if tokenizer is None else check_tokenizer(tokenizer)
        loaded, line = _try(lambda: _load(model), "model", "loads", "mend the folder, or name another model")
        lines.append(line)
    lines += check_kernels(loaded)
    if loaded is not None:
        lines += check_invariants(loaded, tokenizer)
    if data is not None:
        lines += check_data(data, tokenizer)
    return [*lines, *(check_peers() if peers else [])]


def _try(work: Callable[[], Any], area: str, what: str, remedy: str) -> tuple[Any, Line]:
    """What work gives, or None with a red line of the UserError that it raised."""
    try:
        result = work()
    except UserError as error:
        return None, Line(area, what, True, str(error).splitlines()[0], remedy)
    return result, Line(area, what, False, type(result).__name__)


def _load(source: str) -> PreTrainedModel:
    with quiet_loading():
        return load_reward_model(source) if is_scalar_model(source) else load_policy(source)


# ------------------------------------------------------------------------------------------------------- the machine


def check_versions() -> Iterator[Line]:
    """Python and every package that the installed distribution asks for; of the extras, what is missing."""
    yield Line("versions", "python", False, platform.python_version())
    try:
        asked = [Requirement(text) for text in importlib.metadata.requires("fastrlhf") or []]
    except importlib.metadata.PackageNotFoundError:
        yield Line("versions", "fastrlhf", False, "not installed, run from its folder: versions are not compared")
        asked = [Requirement(name) for name in ("torch", "transformers", "datasets", "triton")]
    missing, seen = [], set()
    for requirement in asked:
        if (requirement.name, extra := _is_extra(requirement)) in seen:
            continue
        seen.add((requirement.name, extra))
        if not extra and requirement.marker is not None and not requirement.marker.evaluate():
            continue
        name = requirement.name
        remedy = f"pip install '{name}{requirement.specifier}'"
        try:
            there = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if extra or not requirement.specifier:
                missing.append(name)
            else:
                yield Line("versions", name, True, "not installed", remedy)
            continue
        good = requirement.specifier.contains(there, prereleases=True)
        found = there if good else f"{there}, asked for {requirement.specifier}"
        yield Line("versions", name, not good, found, "" if good else remedy)
    if missing:
        yield Line("versions", "not installed", False, ", ".join(sorted({*missing})), "only for what needs them")


def _is_extra(requirement: Requirement) -> bool:
    return requirement.marker is not None and "extra" in str(requirement.marker)


def check_machine(model: str | None) -> Iterator[Line]:
    device = local_device()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    dtype = resolve_dtype("auto", device)
    yield Line("machine", "device", False, f"{device}: {name}, dtype auto is {str(dtype).removeprefix('torch.')}")
    try:
        backend = choose_backend("auto", torch.zeros(1, device=device))
        yield Line("machine", "kernels", False, f"{backend.name}: {backend.reason}")
    except ValueError as error:
        yield Line("machine", "kernels", True, str(error), "unset FASTRLHF_BACKEND, or install what it asks for")
    yield Line("machine", "attention", False, f"auto is {resolve_attention('auto', device, dtype)} on {device.type}")
    weights = _weight_bytes(model)
    free, disk = free_bytes(device), shutil.disk_usage(".").free
    short = free < weights
    yield Line(
        "machine",
        "memory",
        short,
        f"{free / 2**30:.1f} GiB free{f', the weights are {weights / 2**30:.1f}' if weights else ''}",
        "free some, or take a smaller model; fastrlhf plan says what a run needs" if short else "",
    )
    least = max(LEAST_DISK, weights)
    full = disk < least
    remedy = f"make room for {least / 2**30:.1f} GiB at least: a checkpoint holds the weights" if full else ""
    yield Line("machine", "disk", full, f"{disk / 2**30:.1f} GiB free here", remedy)


def _weight_bytes(model: str | None) -> int:
    folder = Path(model or "")
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) if model and folder.is_dir() else 0


def check_peers() -> Iterator[Line]:
    ready = torch.cuda.is_available() and TRITON and torch.cuda.get_device_capability() >= OLDEST
    found = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    remedy = "" if ready else f"needs a GPU of compute capability {OLDEST[0]}.{OLDEST[1]} or later, and triton"
    yield Line("peers", "GPU for bench", not ready, found, remedy)
    for bench in BENCHES:
        yield Line("peers", "command", False, f"python -m {bench}")


# -------------------------------------------------------------------------------------------------- a folder, its words


def check_folder(source: str) -> Iterator[Line]:
    """What would run code of strangers, were it read: it is not, here; other tools may."""
    where, _ = locate(source, "model")
    folder = Path(where)
    if not folder.is_dir():
        yield Line("folder", "files", False, f"{source}: no folder here; a hub id is read as safetensors only")
        return
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
    remedy = "fastrlhf convert FOLDER OUT writes safetensors of weights; delete the rest" if pickles else ""
    yield Line("folder", "pickles", bool(pickles), ", ".join(pickles) or "none", remedy)
    code = [file.name for file in sorted(folder.glob("*config.json")) if "auto_map" in _json(file)]
    remedy = "the code that it names is never run here; take auto_map out, or another model" if code else ""
    yield Line("folder", "auto_map", bool(code), f"in {', '.join(code)}" if code else "none", remedy)


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> Iterator[Line]:
    area = "tokenizer"
    same = tokenizer.pad_token_id is not None and tokenizer.pad_token_id == tokenizer.eos_token_id
    yield Line(
        area, "padding", False, "pad is EOS: masks come from lengths, EOS is learned" if same else "apart from EOS"
    )
    lost = [text for text in SAMPLES if tokenizer.decode(_ids(tokenizer, text), skip_special_tokens=True) != text]
    remedy = "texts change on their way: check the normalizer and the decoder of tokenizer.json" if lost else ""
    yield Line(area, "round trip", bool(lost), f"{lost[0]!r} does not come back" if lost else "text comes back", remedy)
    notes, line = _try(
        lambda: settle_template(tokenizer, None), area, "chat template", "mend it, or chat_template=default"
    )
    if notes is None:
        yield line
        return
    yield Line(area, "chat template", False, notes[0])
    if tokenizer.chat_template:
        texts, line = _try(
            lambda: [render(tokenizer, QUESTION, add_generation_prompt=begin) for begin in (True, False)],
            area,
            "generation prompt",
            "mend the template, or use chat_template=default",
        )
        if texts is None:
            yield line
            return
        asked, bare = texts
        silent = asked == bare
        remedy = "have the template open the assistant's turn under add_generation_prompt" if silent else ""
        found = "none: a reply would go on in the user's turn" if silent else repr(asked.removeprefix(bare))[:40]
        yield Line(area, "generation prompt", silent, found, remedy)
    yield from _turns(tokenizer)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _turns(tokenizer: PreTrainedTokenizerBase) -> Iterator[Line]:
    """The prompt's ids begin the whole conversation's, and the reply ends in a stop token that is learned."""

    def read() -> tuple[list[int], list[int], list[int], list[bool]]:
        whole = encode_conversation(tokenizer, [*QUESTION, {"role": "assistant", "content": ANSWER}])
        return encode_prompt(tokenizer, QUESTION), encode_response(tokenizer, QUESTION, ANSWER), *whole

    remedy = "have the template write a turn the same whatever follows it, or use chat_template=default"
    result, line = _try(read, "tokenizer", "prefix", remedy)
    if result is None:
        yield line
        return
    prompt, reply, ids, target = result
    broken = ids[: len(prompt)] != prompt or ids[len(prompt) : len(prompt) + len(reply)] != reply
    found = "another prompt with its reply than without" if broken else "the prompt begins the conversation"
    yield Line("tokenizer", "prefix", broken, found, remedy if broken else "")
    stops = stop_token_ids(tokenizer)
    learned = [token for token, learn in zip(ids, target) if learn]
    deaf = not learned or learned[-1] not in stops
    found = "the end of a reply is no target: replies would never end" if deaf else f"a reply ends in {learned[-1]}"
    yield Line("tokenizer", "EOS", deaf, found, "have the template end a reply with EOS" if deaf else "")


# ------------------------------------------------------------------------------------------------------------- kernels


def check_kernels(model: PreTrainedModel | None) -> Iterator[Line]:
    """Every public function against its float64 specification, at the model's vocabulary, width and dtype."""
    device, dtype, vocabulary, hidden = local_device(), resolve_dtype("auto"), 1000, 64
    heads, groups, size = 4, 2, 16
    if model is not None:
        device, dtype = model.device, model.dtype
        vocabulary, hidden = model.get_input_embeddings().weight.shape
        config = model.config.get_text_config()
        heads = getattr(config, "num_attention_heads", None) or heads
        groups = getattr(config, "num_key_value_heads", None) or heads
        size = config.to_dict().get("head_dim") or hidden // heads
    at = f"V={vocabulary} H={hidden} {str(dtype).removeprefix('torch.')}"
    for name, off, rounded in _trials(vocabulary, hidden, (heads, groups, size), device, dtype):
        limit = ROUNDED if rounded and dtype != torch.float32 else EXACT
        wrong = not off <= limit
        remedy = "FASTRLHF_BACKEND=torch runs without the kernels; please report it with this line" if wrong else ""
        yield Line("kernels", name, wrong, f"{off:.1e} off at {at}, limit {limit:g}", remedy)


def _off(ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> float:
    """The largest difference, compared to the largest number of each; NaN is off by infinity."""
    return max((_off_in_parts([pair]) for pair in zip(ours, theirs, strict=True)), default=0.0)


def _off_in_parts(parts: Iterable[tuple[Tensor, Tensor]]) -> float:
    """`_off` of one tensor, which comes in parts: (ours, theirs) of each."""
    apart, largest = 0.0, 1.0
    for ours, theirs in parts:
        if ours.numel():
            a, b = ours.detach().double().cpu(), theirs.detach().double().cpu()
            difference = float((a - b).abs().max())
            apart = max(apart, difference if difference == difference else float("inf"))
            largest = max(largest, float(b.abs().max()))
    return apart / largest


def _trials(
    vocabulary: int, hidden: int, attention: tuple[int, int, int], device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, float, bool]]:
    """(name, how far off the specification, whether the results are kept in the model's dtype)."""
    draw = torch.Generator().manual_seed(0)

    def random(*shape: int, kept: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=draw) * scale).to(device, kept)

    def both(function: str, *args: Any, **options: Any) -> float:
        ours = getattr(kernels, function)(*args, **options)
        theirs = getattr(reference, function)(*map(_wide, args), **{k: _wide(v) for k, v in options.items()})
        return _off(_flat(ours), _flat(theirs))

    states = random(ROWS, hidden, kept=dtype, scale=hidden**-0.5)
    weight = torch.empty(vocabulary, hidden, device=device, dtype=dtype)
    for rows in _blocks(vocabulary):
        weight[rows] = random(len(weight[rows]), hidden)
    labels = torch.randint(vocabulary, (ROWS,), generator=draw).to(device)
    logits = random(ROWS, vocabulary)
    mask = (torch.arange(TOKENS) < torch.tensor([TOKENS, 3])[:, None]).to(device)
    rows = [random(2, TOKENS, scale=0.1) for _ in range(4)]
    flat = [random(ROWS, scale=0.1) for _ in range(3)]
    counted = torch.ones(ROWS, dtype=torch.bool, device=device)
    yield "token_log_probs", both("token_log_probs", logits, labels), False
    ours = kernels.linear_log_probs(states, weight, labels, return_entropy=True)
    theirs = reference.token_log_probs(_wide_logits(states, weight), labels, return_entropy=True)
    yield "linear_log_probs", _off(_flat(ours), _flat(theirs)), False
    yield "linear_log_probs, gradients", _gradients_off("linear_log_probs", states, weight, (labels,)), True
    tokens = (labels, flat[0] - 8, flat[1], counted)
    yield "linear_ppo_loss, gradients", _gradients_off("linear_ppo_loss", states, weight, tokens), True
    yield "kl_estimate", both("kl_estimate", rows[0], rows[1], "k3"), False
    score = random(2)
    yield "shape_rewards", both("shape_rewards", score, rows[0], rows[1], mask, kl_coef=0.1), False
    yield "gae", both("gae", rows[0], rows[1], mask, gamma=0.99, gae_lambda=0.95), False
    yield "masked_whiten", both("masked_whiten", rows[0], mask), False
    shaped = both("shape_and_gae", score, rows[0], rows[1], rows[2], mask, kl_coef=0.1)
    yield "shape_and_gae", shaped, False
    yield "ppo_policy_loss", both("ppo_policy_loss", rows[0], rows[1], rows[2], mask), False
    yield "ppo_value_loss", both("ppo_value_loss", rows[0], rows[1], rows[2], mask), False
    drawn = both("sample_tokens", logits[:2], temperature=0.7, top_k=50, top_p=0.9, seed=1)
    yield "sample_tokens", drawn, False
    heads, groups, size = attention
    query = random(2, heads, size, kept=dtype)
    keys, values = (random(2, TOKENS, groups, size, kept=dtype) for _ in range(2))
    lengths = torch.tensor([TOKENS, 3], device=device)
    yield "decode_attention", both("decode_attention", query, keys, values, lengths, scale=size**-0.5), True


def _wide(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _flat(result: Any) -> list[Tensor]:
    """The tensors of a result; statistics are left to the tests."""
    parts = result if isinstance(result, tuple) else (result,)
    return [part for part in parts if isinstance(part, Tensor)]


def _blocks(vocabulary: int) -> Iterator[slice]:
    return (slice(first, first + BLOCK) for first in range(0, vocabulary, BLOCK))


def _wide_logits(states: Tensor, weight: Tensor) -> Tensor:
    """The logits [N, V] in float64, of which no whole weight is."""
    return torch.cat([states.double() @ weight[rows].double().T for rows in _blocks(len(weight))], 1)


def _gradients_off(name: str, states: Tensor, weight: Tensor, rest: tuple) -> float:
    """`_off` of the gradients of hidden [N, H] and weight [V, H]; those of the specification come from its gradient of
    the logits, a block of the vocabulary at a time."""
    states, weight = (t.detach().requires_grad_() for t in (states, weight))
    result = getattr(kernels, name)(states, weight, *rest)
    (result[0] if isinstance(result, tuple) else result.sum()).backward()
    with torch.no_grad():
        logits = _wide_logits(states, weight)
    labels, *more = map(_wide, rest)
    log_probs = reference.token_log_probs(logits.requires_grad_(), labels)
    (reference.ppo_policy_loss(log_probs, *more)[0] if more else log_probs.sum()).backward()
    hidden, of_hidden = states.detach().double(), torch.zeros_like(states, dtype=torch.float64)

    def parts() -> Iterator[tuple[Tensor, Tensor]]:
        for rows in _blocks(len(weight)):
            of_hidden.addmm_(logits.grad[:, rows], weight.detach()[rows].double())
            yield weight.grad[rows], logits.grad[:, rows].T @ hidden

    of_weight = _off_in_parts(parts())
    return max(of_weight, _off([states.grad], [of_hidden]))


# ----------------------------------------------------------------------------------------------------------- the model


def check_invariants(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[Line]:
    """What must hold before step 1: docs/api.md calls them the invariants of step 0."""
    if is_scalar_model(model):
        yield from _scores(model)
        return
    remedy = "training would learn from noise: use dtype=fp32, attention=eager, or another model"
    vocabulary, limit = len(lm_head(model).weight), int(min(position_limits(model), 64))
    draw = torch.Generator().manual_seed(0)
    lengths = [(limit // 4, limit // 2), (limit // 8, limit // 4), (1, limit // 8)]
    ids = [[torch.randint(vocabulary, (n,), generator=draw).tolist() for n in pair] for pair in lengths]
    rows = TokenRows([prompt for prompt, _ in ids], [response for _, response in ids])
    every = list(range(len(ids)))
    together = _log_probs(model, rows, [every])
    with torch.inference_mode():
        copied, again = _log_probs(frozen_copy(model), rows, [every]), _log_probs(model, rows, [every])
    off = _apart(copied, together)
    close = 0.0 if model.device.type == "cpu" else 1e-3
    yield _held("KL to the reference", off, close, remedy)
    yield _held("ratio of step 0, off 1", _apart(again, together), close, remedy)
    limit_ = 1e-4 if model.dtype == torch.float32 else 0.15
    alone = _log_probs(model, rows, [[i] for i in every])
    yield _held("micro-batches alone and together", _apart(alone, together), limit_, remedy)
    packs, line = _try(lambda: check_packing(model) or True, "model", "packing", "use packing=false with this model")
    if packs is None:
        yield line
    else:
        joined = TokenRows(rows.prompt_ids, rows.response_ids, joined=True)
        yield _held(
            "packed and padded", _apart(_log_probs(model, joined, [every]), together), limit_, "use packing=false"
        )
    engine = RolloutEngine(model, tokenizer)
    note, line = _try(lambda: engine.check(limit), "model", "generation", "use another model")
    if note is None:
        yield line
        return
    difference = engine.difference(limit)
    found = f"off the training forward by {difference}" + (f"; {note}" if note else "")
    yield Line("model", "generation", not difference.agrees, found, "" if difference.agrees else "use another model")


def _log_probs(model: PreTrainedModel, rows: TokenRows, groups: list[list[int]]) -> Tensor:
    return torch.cat([target_log_probs(model, rows.batch(group, model.device)).detach() for group in groups])


def _apart(ours: Tensor, theirs: Tensor) -> float:
    off = float((ours - theirs).abs().max())
    return off if off == off else float("inf")


def _held(what: str, off: float, limit: float, remedy: str) -> Line:
    wrong = not off <= limit
    return Line("model", what, wrong, f"{off:.1e} nats, limit {limit:g}", remedy if wrong else "")


def _scores(model: PreTrainedModel) -> Iterator[Line]:
    rows = [[1, 2, 3, 4, 5], [3, 2], [4, 4, 1]]
    together = score_rows(model, rows, 1 << 10)
    alone = torch.cat([score_rows(model, [row], 1 << 10) for row in rows])
    limit = 1e-4 if model.dtype == torch.float32 else 0.15
    off = _apart(alone, together)
    remedy = "a score must not depend on the other rows: use dtype=fp32 or another model" if not off <= limit else ""
    yield Line("model", "scores alone and together", not off <= limit, f"{off:.1e}, limit {limit:g}", remedy)


# ---------------------------------------------------------------------------------------------------------------- rows


def check_data(source: str, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[Line]:
    """What each stage makes of the rows, as its preflight reads them. Red where no stage can use them."""
    if tokenizer is None:
        yield Line(
            "data", source, True, "rows are read with the model's tokenizer", "name a MODEL whose tokenizer loads"
        )
        return
    readers = {
        "reward": (RewardConfig(), Encoder.records),
        "sft": (SFTConfig(), Encoder.examples),
        "ppo": (PPOConfig(), Encoder.prompts),
    }
    refused = []
    for stage, (config, read) in readers.items():

        def encode(config: Any = config, read: Any = read) -> list[str]:
            template, _ = settle_template(tokenizer, None)
            encoded = read(Encoder(config, tokenizer, template, sample=SAMPLE), source, "data")
            warning = check_dropped(encoded, config)
            return [*describe_rows(encoded), *([warning] if warning else [])]

        notes, line = _try(encode, "data", f"for fastrlhf {stage}", "")
        if notes is None:
            refused.append(line)
        else:
            yield from (Line("data", f"for fastrlhf {stage}", False, note) for note in notes)
    for line in refused:  # a file of one stage is none of the others'
        remedy = "mend the row that it names, or the columns: docs/data.md has the forms" if len(refused) == 3 else ""
        yield line._replace(fault=len(refused) == len(readers), do=remedy)


# --------------------------------------------------------------------------------------------------------------- result


def table(lines: Sequence[Line]) -> str:
    """The lines under each other, and how many are red."""
    width, name = max(len(line.area) for line in lines), max(len(line.what) for line in lines)
    text = []
    for area, what, fault, found, remedy in lines:
        text.append(f"{'FAIL' if fault else 'ok':4} {area:{width}} {what:{name}} {found}")
        if remedy:
            text.append(f"{'':4} {'':{width}} {'':{name}} -> {remedy}")
    red = sum(line.fault for line in lines)
    return "\n".join([*text, f"{len(lines) - red} green, {red} red"])
