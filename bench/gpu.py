"""All that a GPU has to show, in the order of what is missed most, for a machine that is there for minutes.

    python -m bench.gpu --out FOLDER [--minutes 10] [--only step kernels ...]

Each part is a command of its own with a share of the minutes. What it prints goes to FOLDER/PART.log as it comes, its
figures to FOLDER/PART.json row by row; a part that is cut or fails costs nothing of the others. Before the clock runs,
install the packages, and run `python -m bench.ppo_step` once, which installs TRL beside them. Exit code: 1 where a part
failed, 3 without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent.resolve()


class Part(NamedTuple):
    """A command, where OUT stands for the folder, and its share of the time."""

    command: Sequence[str]
    share: float


def _step(form: str) -> list[str]:
    spec = {
        "side": form,
        "model": "qwen2.5-0.5b",
        "device": "cuda",
        "batch": 16,
        "prompt": 128,
        "new": 128,
        "epochs": 2,
    }
    return ["-m", "bench.ppo_step_ours", json.dumps(spec | {"steps": 2})]


KERNEL_TESTS = ["tests/triton_kernels", "tests/kernels", "tests/gpu", "tests/rollout", "tests/models/test_bf16.py"]
PROCESSES = str(max(1, min(12, (os.cpu_count() or 1) - 1)))
PARTS = {
    "step": Part(_step("separate"), 0.08),
    "step_shared_trunk": Part(_step("shared_trunk"), 0.08),
    "kernels": Part(
        ["-m", "bench.gpu_kernels", "--shapes", "8192x1536x151936", "8192x896x151936", "--repetitions", "10",
         "--json", "OUT/kernels.json"], 0.14,
    ),
    "rollout": Part(
        ["-m", "bench.rollout", "--device", "cuda", "--models", "qwen2.5-0.5b", "--batch", "64", "16", "--no-static",
         "--compile", "--repetitions", "1", "--json", "OUT/rollout.json"], 0.14,
    ),
    "tests": Part(
        ["-m", "pytest", "-q", "-n", PROCESSES, "--dist", "worksteal", "-k", "not sanitizer", *KERNEL_TESTS], 0.18
    ),
    "quickstart": Part(
        ["-m", "fastrlhf", "quickstart", "seed=0", "output_dir=OUT/quick", "overwrite=true", "sft.total_steps=300",
         "reward.total_steps=200", "ppo.total_steps=5"], 0.1,
    ),
    "doctor": Part(["-m", "fastrlhf", "doctor", "OUT/quick/sft/final"], 0.03),
    "beside_trl": Part(
        ["-m", "bench.ppo_step", "--peer", "trl", "--model", "qwen2.5-0.5b", "--device", "cuda", "--forms", "separate",
         "shared_trunk", "--repetitions", "1", "--steps", "1", "--json", "OUT/beside_trl.json"], 0.25,
    ),
}  # fmt: skip


def run(parts: Mapping[str, Part], folder: Path, seconds: float) -> dict[str, str]:
    """Run the parts one after the other -> how each ended: "done", "cut" or "exit code N"."""
    folder.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    ended: dict[str, str] = {}
    for name, part in parts.items():
        command = [word.replace("OUT", str(folder)) for word in part.command]
        began, limit = time.monotonic(), part.share * seconds
        with open(folder / f"{name}.log", "w") as log:
            child = subprocess.Popen(
                [sys.executable, *command], cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
            )
            try:
                code = child.wait(limit)
                ended[name] = "done" if code == 0 else f"exit code {code}"
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
                ended[name] = "cut"
        took = time.monotonic() - began
        print(f"{name:20}{ended[name]:14}{took:7.0f} s of {limit:.0f}", flush=True)
        (folder / "parts.json").write_text(json.dumps(ended, indent=1) + "\n")
    return ended


def main(arguments: Sequence[str] | None = None, parts: Mapping[str, Part] = PARTS) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of logs and figures")
    parser.add_argument("--minutes", type=float, default=10.0, help="for all parts together")
    parser.add_argument(
        "--only", nargs="+", choices=tuple(parts), help="these parts; each keeps its share of the minutes"
    )
    options = parser.parse_args(arguments)
    if not Path("/dev/nvidia0").exists():
        print("no GPU here", file=sys.stderr)
        return 3
    chosen = {name: part for name, part in parts.items() if options.only is None or name in options.only}
    ended = run(chosen, options.out.resolve(), options.minutes * 60)
    return int(any(how != "done" for how in ended.values()))


if __name__ == "__main__":
    sys.exit(main())
