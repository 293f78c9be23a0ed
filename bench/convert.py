"""The peak memory of `fastrlhf convert`: a pickled checkpoint in shards, converted by a process of its own.

    python -m bench.convert [--shards 8] [--shard-mib 256] [--differences]

The checkpoint is a LLaMA with random weights, bf16. Its process reports its own peak (resource.getrusage) and
what that was once everything was imported. --differences: to a base of the same shards.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
WIDTH = 1024
# One process: its peak once everything is imported, and at the end.
RUN = """
import resource, sys
from fastrlhf.convert import convert
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
idle = peak()
convert(*sys.argv[1:])
print(peak(), idle)
"""
# A process begins with the peak of the one that starts it, so that one is small.
LAUNCH = "import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', *sys.argv[1:]]))"
UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes


def write_checkpoint(folder: Path, shards: int, shard_bytes: int, *, difference: bool = False) -> int:
    """A LLaMA folder of pickled shards of about this size -> bytes of the largest file."""
    folder.mkdir(parents=True)
    norms, layer = ("input_layernorm", "post_attention_layernorm"), 4 * WIDTH * WIDTH
    inner = (shard_bytes // 2 - layer) // (3 * WIDTH)
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": WIDTH, "intermediate_size": inner,
        "num_hidden_layers": shards, "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 320,
        "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    weight_map: dict[str, str] = {}
    for i in range(shards):
        shapes = {f"self_attn.{x}_proj": (WIDTH, WIDTH) for x in "qkvo"}
        shapes |= {"mlp.gate_proj": (inner, WIDTH), "mlp.up_proj": (inner, WIDTH), "mlp.down_proj": (WIDTH, inner)}
        shapes |= dict.fromkeys(norms, (WIDTH,))
        tensors = {f"model.layers.{i}.{name}.weight": _random(shape, difference) for name, shape in shapes.items()}
        if i == 0:
            tensors["model.embed_tokens.weight"] = tensors["lm_head.weight"] = _random((320, WIDTH), False)
            tensors["lm_head.weight"] = tensors["lm_head.weight"].clone()
            tensors["model.norm.weight"] = torch.ones(WIDTH, dtype=torch.bfloat16)
        name = f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin"
        torch.save(tensors, folder / name)
        weight_map |= dict.fromkeys(tensors, name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return max(path.stat().st_size for path in folder.glob("*.bin"))


def _random(shape: tuple[int, ...], difference: bool) -> Tensor:
    """Uniform around 1 for norms, around 0 else; the same embedding in every checkpoint."""
    generator = torch.Generator().manual_seed(len(shape) + shape[0])
    values = torch.rand(shape, generator=generator, dtype=torch.float32) * 0.02 - 0.01
    return (values + (len(shape) == 1 and not difference)).bfloat16()


def peak_of(folder: Path, out: Path, base: Path | None = None) -> tuple[int, int]:
    """(peak of a process that converts, its peak once all is imported), in bytes."""
    arguments = [str(path) for path in (folder, out, base) if path is not None]
    command = [sys.executable, "-c", LAUNCH, RUN, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    peak, idle = (int(value) * UNIT for value in done.stdout.split()[-2:])
    return peak, idle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--shard-mib", type=int, default=256)
    parser.add_argument("--differences", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, size = Path(name), args.shard_mib << 20
        largest = write_checkpoint(folder / "m", args.shards, size, difference=args.differences)
        base = folder / "base" if args.differences else None
        if base is not None:
            write_checkpoint(base, args.shards, size)
        total = sum(path.stat().st_size for path in (folder / "m").glob("*.bin"))
        began = time.perf_counter()
        peak, idle = peak_of(folder / "m", folder / "out", base)
        seconds = time.perf_counter() - began
    mib = [f"{value / 2**20:.0f} MiB" for value in (total, largest, peak, idle, largest + 2**30)]
    print(f"checkpoint {mib[0]} in {args.shards} shards, the largest {mib[1]}; {seconds:.0f} s")
    print(f"peak {mib[2]} (importing alone {mib[3]}); largest shard + 1 GiB: {mib[4]}")
    if peak >= largest + 2**30:
        sys.exit("the peak is above the largest shard plus 1 GiB")


if __name__ == "__main__":
    main()
