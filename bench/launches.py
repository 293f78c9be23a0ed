"""What a PPO step starts, waits for and moves, by model and phase, counted without a GPU and without weights.

    python -m bench.launches [--json bench/results/launches.json] [MODEL ...]

The parts of a step run at the sizes of real models on tensors without numbers (as `fastrlhf plan` runs them) under a
dispatch mode that counts. operators: dispatched operations that compute or copy, each one kernel launch or more on a
GPU; views and empty tensors are none, and an operator of ours (the fused head, decoding attention, sampling) is one.
waits: operations whose result the host must see before it goes on (`.item()`, a boolean index, `nonzero`, `.tolist()`)
of what the models computed, which is on the device. reads: the same of ids, lengths and masks, which may lie on the
host. bytes: of the tensors that the operators read and write, as if nothing stayed in a cache.

Counted with 2 and with 4 decoder layers: the difference is a layer, what is left is the rest of the phase (embeddings,
head, losses, bookkeeping). The paths are those of a CPU: a GPU takes others where they are faster. The optimizer's step
is not in it. Phases: prefill (prompts, and the first token of each reply), decode (one token of all replies), reward (a
reward model of the same size), experience (old and reference log-probs, values), and the two updates, forward and
backward of a micro-batch.

Last, the kernels of a layer's decoding step compiled (`compile` of the configuration), read from the compiler's code
for a small model of the kind in bf16 (`bench.regions`), with the weights of products of one input apart and joined.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from transformers import Gemma2Config, LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from bench.models import QWEN
from bench.regions import of_model as compiled_regions
from fastrlhf.config.stages import PPOConfig
from fastrlhf.plan import phases
from fastrlhf.plan.counter import tensors_in
from fastrlhf.plan.unknown import UnknownNumbers
from fastrlhf.plan.work import GATHERS, NO_KERNEL, moved

LAYERS = (2, 4)
COMMON = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0, "max_position_embeddings": 2048}
CONFIG = {
    "rollout_batch_size": 32, "samples_per_prompt": 2, "mini_batch_size": 16, "micro_batch_tokens": 8192,
    "max_prompt_tokens": 256, "max_new_tokens": 256, "prompt_format": "raw", "dtype": "bf16", "eval_every": 0,
}  # fmt: skip


def _qwen2(name: str) -> tuple[type[PreTrainedConfig], dict[str, Any], int]:
    hidden, wide, layers, heads, groups, tied = QWEN[name]
    sizes = {"hidden_size": hidden, "intermediate_size": wide, "num_attention_heads": heads, "vocab_size": 151936}
    return Qwen2Config, {**sizes, "num_key_value_heads": groups, "tie_word_embeddings": tied}, layers


MODELS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any], int]] = {  # its sizes, and its decoder layers
    "smollm2-135m": (
        LlamaConfig,
        {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3,
         "vocab_size": 49152, "tie_word_embeddings": True},
        30,
    ),
    "qwen2.5-1.5b": _qwen2("qwen2.5-1.5b"),
    "qwen3-0.6b": (
        Qwen3Config,
        {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 8,
         "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True},
        28,
    ),
    "gemma2-2b": (
        Gemma2Config,
        {"hidden_size": 2304, "intermediate_size": 9216, "num_attention_heads": 8, "num_key_value_heads": 4,
         "head_dim": 256, "vocab_size": 256000},
        26,
    ),
}  # fmt: skip

NOTHING = NO_KERNEL | {"_local_scalar_dense", "item"}  # on the device
WAITS = {"_local_scalar_dense", "item", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "is_nonzero"}
READS = {Tensor.cpu, Tensor.numpy}


class Counts:
    """Of a phase."""

    def __init__(self) -> None:
        self.operators: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.reads: Counter[str] = Counter()
        self.bytes = 0

    def add(self, function: Any, args: Any, result: Any) -> None:
        name = function._schema.name.split("::")[1]
        if name in WAITS or (name.startswith("index") and _has_mask(args)):
            unknown = any(isinstance(t, FakeTensor) for t in tensors_in(*args))
            (self.waits if unknown else self.reads)[name] += 1
        if function.is_view or name.rstrip("_") in NOTHING:
            return
        self.operators[name] += 1
        read, written = list(tensors_in(*args)), list(tensors_in(result))
        if name in GATHERS:
            read = read[1:] + written
        self.bytes += sum(map(moved, read + written))


def _has_mask(args: Any) -> bool:
    indices = args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else ()
    return any(isinstance(index, Tensor) and index.dtype == torch.bool for index in indices)


class Reads(TorchFunctionMode):
    """Counts where the host reads what has no number here, so that on a GPU it is not on the host."""

    def __init__(self, counts: Counting) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function in READS and isinstance(args[0], FakeTensor) and self.counts.current is not None:
            self.counts.current.waits[function.__name__] += 1
        return function(*args, **(kwargs or {}))


class Counting(UnknownNumbers):
    """Runs without numbers, and counts in each phase what is dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Counts] = []
        self.current: Counts | None = None

    def begin(self) -> None:
        """A phase: what comes is counted in the last of `seen`."""
        self.current = Counts()
        self.seen.append(self.current)

    @contextmanager
    def phase(self) -> Iterator[None]:
        with super().phase(), Reads(self), mock.patch.object(FakeTensor, "tolist", self._listed(FakeTensor.tolist)):
            self.begin()
            yield
            self.current = None

    def _listed(self, original: Any) -> Any:
        """`tolist` as one wait, where fake tensors ask for every element."""

        def tolist(tensor: FakeTensor) -> Any:
            counts, self.current = self.current, None
            try:
                return original(tensor)
            finally:
                self.current = counts
                if counts is not None:
                    counts.waits["tolist"] += 1

        return tolist

    def run(self, function: Any, args: tuple, kwargs: dict) -> Any:
        result = super().run(function, args, kwargs)
        if self.current is not None:
            self.current.add(function, (*args, *kwargs.values()), result)
        return result


def counted(folder: str, config: PPOConfig) -> dict[str, Counts]:
    """The phases of a step of the model in a folder with its config.json."""
    made: list[Counting] = []
    last_token = phases._last_token

    def live() -> Counting:
        made.append(Counting())
        return made[-1]

    def decode(*arguments: Any) -> None:
        if len(made[-1].seen) == 1:  # behind full rows; the mean token, counted for the plan's time, is a phase already
            made[-1].begin()
        last_token(*arguments)

    with mock.patch.object(phases, "UnknownNumbers", live), mock.patch.object(phases, "_last_token", decode):
        measure = phases.Measurer("ppo", {"policy": folder, "reward": folder}, phases.Target())
        names = list(measure(config).phases)
    names = ["prefill", "decode", "mean token", *("reward" if name == "score" else name for name in names[1:])]
    found = dict(zip(names, made[-1].seen, strict=True))
    del found["mean token"]
    return found


def of_model(name: str, config: PPOConfig) -> dict[str, Any]:
    """Phase -> operators, waits and bytes of a layer, of the rest, and of the whole model."""
    kind, sizes, layers = MODELS[name]
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for few in LAYERS:
            architectures = [kind.__name__.replace("Config", "ForCausalLM")]
            shape = kind(**COMMON, **sizes, num_hidden_layers=few, architectures=architectures)
            shape.save_pretrained(folder)
            found.append(counted(folder, config))
    return {phase: _split(*(counts[phase] for counts in found), layers) for phase in found[0]}


def _split(few: Counts, many: Counts, layers: int) -> dict[str, Any]:
    more = LAYERS[1] - LAYERS[0]
    layer, total, rest = ({} for _ in range(3))
    for kind in ("operators", "waits", "reads", "bytes"):
        small, large = (
            count if isinstance(count, int) else count.total() for count in (getattr(few, kind), getattr(many, kind))
        )
        layer[kind] = _whole((large - small) / more)
        rest[kind] = small - LAYERS[0] * layer[kind]
        total[kind] = rest[kind] + layers * layer[kind]
    names = sorted(many.operators)
    operators = {name: _whole((many.operators[name] - few.operators[name]) / more) for name in names}
    operators = {name: count for name, count in operators.items() if count}
    waits = {"waits": dict(few.waits), "reads": dict(few.reads)}
    return {"layer": layer, "rest": rest, "total": total, "layer_operators": operators, "of_two_layers": waits}


def _whole(number: float) -> float:
    return int(number) if number == int(number) else number


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", metavar="MODEL", nargs="*", default=[], help=", ".join(MODELS))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    wrong = [name for name in args.models if name not in MODELS]
    if wrong:
        parser.error(f"MODEL {wrong[0]!r} is none of {', '.join(MODELS)}")
    results: dict[str, Any] = {}
    regions = {name: compiled_regions(MODELS[name][0], torch.bfloat16) for name in args.models or MODELS}
    head = f"{'model':14} {'phase':21} {'a layer':>8} {'the rest':>9} {'all':>7} {'waits':>6} {'reads':>6}"
    print(f"{head} {'MiB a layer':>12}")
    for name in args.models or MODELS:
        results[name] = of_model(name, PPOConfig(**CONFIG))
        for phase, row in results[name].items():
            counts = f"{row['layer']['operators']:8g} {row['rest']['operators']:9g} {row['total']['operators']:7g}"
            counts += f" {row['total']['waits']:6g} {row['total']['reads']:6g} {row['layer']['bytes'] / 2**20:12.1f}"
            print(f"{name:14} {phase:21} {counts}", flush=True)
        for form, region in regions[name].items():
            figure = f"{region['kernels']:8} kernels a layer, weights {form}"
            print(f"{name:14} {'decode, compiled':21} {figure}", flush=True)
        if args.json:
            record = {"torch": torch.__version__, "transformers": transformers.__version__, "config": CONFIG}
            record |= {"models": results, "regions": regions}
            args.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
