"""A PPO step of fastrlhf beside one of TRL 1.12's PPOTrainer, the last release of TRL that has PPO.

    python -m bench.ppo_step --peer trl --model tiny --json bench/results/ppo_step_cpu_tiny.json        8 minutes
    python -m bench.ppo_step --peer trl --model smollm2 --json bench/results/ppo_step_cpu_smollm2.json  45 minutes
    python -m bench.ppo_step --peer trl --model qwen2.5-0.5b --device cuda --json FILE                  a GPU
    python -m bench.ppo_step --peer trl --model qwen2.5-1.5b --device cuda --json FILE

The same weights, prompts, lengths and epochs on both sides: policy, frozen reference, reward model and value model of
one size, AdamW, one mini-batch of the whole batch. Every run is a process of its own with one thread; the sides take
turns, in the opposite order every second round. The clock is the process's CPU time (a GPU: wall time), the first step
is dropped, a process counts with the median of its steps. A ratio is TRL / ours in one round; the median of the rounds
is held against the bars. Memory is each process's peak (a GPU: allocated). Python, torch and the libraries are in it,
0.41 GiB of ours and 0.54 GiB of TRL's. With the tiny model ours alone are 0.36x of TRL's whole peak, so
`memory_above_imports` is printed too, and the bar of LoRA's memory is held on smollm2 only.

Forms of fastrlhf: `separate` does what TRL does and one thing more, old log-probs by a training forward (its default);
`separate_rollout` exactly the same work; `shared_trunk` has the critic on the policy's trunk and takes log-probs and
values from the rollout; `shared_trunk_bf16` is that with every model in bf16 and fp32 master weights;
`shared_trunk_lora` trains adapters of rank 16 instead, the reference is their base. All have the reward model.

Prints a line of JSON a process, then the ratios. Exit code: 0, 1 where a bar is missed, 3 where TRL cannot be
installed or the GPU is missing, 4 where a side fails.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.peers import environment

PEER = "trl"
PEER_PACKAGES = ("trl-1.12.0", "trl==1.12.0", "accelerate==1.15.0")
FORMS = ("separate", "separate_rollout", "shared_trunk", "shared_trunk_bf16", "shared_trunk_lora")
GPU_FORMS = ("separate", "separate_rollout", "shared_trunk", "shared_trunk_lora")
MODELS = ("tiny", "smollm2", "qwen2.5-0.5b", "qwen2.5-1.5b")
SIZES = {  # responses a step, tokens of a prompt, tokens of a response, responses in a forward of TRL's update
    "cpu": (8, 32, 64, 8),
    "cuda": (16, 128, 128, 4),
}
STEPS = {"tiny": 4, "smollm2": 1}  # measured in a process
# What a form must reach on a CPU: (TRL's seconds / ours at least, our memory / TRL's at most), None: reported only.
Bar = tuple[float | None, float | None]
BARS: dict[str, dict[str, Bar]] = {
    "tiny": {"separate": (1.4, 0.8), "shared_trunk": (1.7, None)},
    "smollm2": {"separate": (1.0, 0.8), "shared_trunk": (1.7, None), "shared_trunk_lora": (None, 0.45)},
}
PHASES = ("rollout", "experience", "update")
Round = dict[str, dict[str, Any]]  # side -> what its process reported
Run = Callable[[str], dict[str, Any]]


class ChildFailed(RuntimeError):
    """A side's process ended with an error; the message holds its last lines."""


def child(pythons: dict[str, Path], spec: dict[str, Any], module: str = "bench.ppo_step") -> Run:
    """-> a function that runs one side in its process: MODULE_trl or MODULE_ours."""
    root = Path(__file__).parent.parent.resolve()
    given = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []  # what this process was told, too
    path = os.pathsep.join([str(root), str(root / "kernels"), *given])
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1") if spec["device"] == "cpu" else {}

    def run(side: str) -> dict[str, Any]:
        which = PEER if side == PEER else "ours"
        command = [str(pythons[which]), "-m", f"{module}_{which}", json.dumps({**spec, "side": side})]
        done = subprocess.run(
            command, cwd=root, env=os.environ | threads | {"PYTHONPATH": path}, capture_output=True, text=True
        )
        if done.returncode != 0:
            raise ChildFailed(f"{side}: exit code {done.returncode}\n{done.stderr[-2000:]}")
        return json.loads(done.stdout.splitlines()[-1])

    return run


def rounds(sides: Sequence[str], count: int, run: Run, show: Callable[[str], None]) -> list[Round]:
    """`count` rounds in which every side runs once, in the opposite order every second round."""
    found: list[Round] = []
    for number in range(count):
        done: Round = {}
        for side in sides if number % 2 == 0 else reversed(sides):
            done[side] = run(side)
            show(json.dumps({"side": side, "round": number, **done[side]}))
        found.append(done)
    return found


def ratios(found: Sequence[Round], form: str) -> dict[str, Any]:
    """Medians over the rounds: TRL's seconds / ours, in all and by phase, our peak memory / TRL's."""

    def median(of: Callable[[dict[str, Any], dict[str, Any]], float]) -> float:
        return statistics.median(of(done[PEER], done[form]) for done in found)

    each = [done[PEER]["seconds"] / done[form]["seconds"] for done in found]
    return {
        "form": form,
        "seconds": statistics.median(done[form]["seconds"] for done in found),
        "speed": statistics.median(each),
        "speeds": each,
        "phases": {p: median(lambda peer, ours, p=p: peer["phases"][p] / ours["phases"][p]) for p in PHASES},
        "memory": median(lambda peer, ours: ours["peak_mib"] / peer["peak_mib"]),
        "memory_above_imports": median(lambda peer, ours: _models_mib(ours) / _models_mib(peer)),
        "peak_mib": statistics.median(done[form]["peak_mib"] for done in found),
    }


def _models_mib(report: dict[str, Any]) -> float:
    """What a process took beyond Python and the libraries."""
    return report["peak_mib"] - report["imports_mib"]


def missed(row: dict[str, Any], bar: Bar) -> list[str]:
    """A sentence for each bar that a row of `ratios` does not reach."""
    speed, memory = bar
    wrong = []
    if speed is not None and not row["speed"] >= speed:  # NaN is a miss
        wrong.append(f"{row['form']}: {row['speed']:.2f}x of TRL's speed, the bar is {speed:g}x")
    if memory is not None and not row["memory"] <= memory:
        wrong.append(f"{row['form']}: {row['memory']:.2f}x of TRL's memory, the bar is {memory:g}x")
    return wrong


def judge(found: Sequence[Round], forms: Sequence[str], bars: dict[str, Bar]) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of ratios, and what is missed."""
    rows = [ratios(found, form) for form in forms]
    return rows, [sentence for row in rows for sentence in missed(row, bars.get(row["form"], (None, None)))]


def table(found: Sequence[Round], rows: Sequence[dict[str, Any]]) -> str:
    def seconds(side: str, name: str) -> float:
        return statistics.median(done[side]["phases"].get(name, 0.0) for done in found)

    peer = statistics.median(done[PEER]["seconds"] for done in found)
    memory = statistics.median(done[PEER]["peak_mib"] for done in found)
    parts = "  ".join(f"{name} {seconds(PEER, name):.3f}" for name in (*PHASES, "gc"))
    lines = [f"{'TRL 1.12':18}{peer:9.3f} s {memory:8.0f} MiB   {parts}"]
    for row in rows:
        form, by_phase = row["form"], row["phases"]
        parts = "  ".join(f"{name} {seconds(form, name):.3f} ({by_phase[name]:.2f}x)" for name in PHASES)
        lines.append(
            f"{form:18}{row['seconds']:9.3f} s {row['peak_mib']:8.0f} MiB   {row['speed']:.2f}x speed "
            f"({min(row['speeds']):.2f} to {max(row['speeds']):.2f}), {row['memory']:.2f}x memory "
            f"({row['memory_above_imports']:.2f}x above imports)   {parts}"
        )
    return "\n".join(lines)


def machine() -> dict[str, object]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] \
        if info.exists() else []  # fmt: skip
    return {"cpu": names[0] if names else platform.processor(), "cores": os.cpu_count(), "commit": commit}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.ppo_step", description=__doc__.split("\n")[0])
    parser.add_argument("--peer", choices=(PEER,), default=PEER)
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument("--device", choices=tuple(SIZES), default="cpu")
    parser.add_argument("--forms", nargs="+", choices=FORMS, help="default: all of them")
    parser.add_argument("--repetitions", type=int, default=5, help="rounds in which every side runs once")
    parser.add_argument("--steps", type=int, help="measured in a process, after one that is dropped")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--prompt", type=int)
    parser.add_argument("--new", type=int)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--peer-micro", type=int, help="responses in a forward of TRL's update")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    options = parser.parse_args(arguments)
    for name, size in zip(("batch", "prompt", "new", "peer_micro"), SIZES[options.device], strict=True):
        if getattr(options, name) is None:
            setattr(options, name, size)
    options.steps = options.steps or STEPS.get(options.model, 2)
    options.forms = options.forms or list(FORMS if options.device == "cpu" else GPU_FORMS)
    return options


def main(arguments: Sequence[str] | None = None, packages: Sequence[str] = PEER_PACKAGES) -> int:
    """packages: of `environment`, what the peer's processes need."""
    options = parse(arguments)
    try:
        pythons = {PEER: environment(*packages), "ours": Path(sys.executable)}
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 3
    names = ("model", "device", "batch", "prompt", "new", "epochs", "steps", "peer_micro")
    spec = {name: getattr(options, name) for name in names}
    try:
        return compare(options, spec, child(pythons, spec))
    except ChildFailed as error:
        print(error, file=sys.stderr)
        return 4


def compare(options: argparse.Namespace, spec: dict[str, Any], run: Run) -> int:
    """Run the rounds, print, write -> exit code."""
    if options.device == "cuda" and not Path("/dev/nvidia0").exists():
        print("no GPU here", file=sys.stderr)
        return 3
    ended: list[Any] = []

    def show(line: str) -> None:
        """A machine that is lent for minutes may be gone before the last process: what ended is kept at once."""
        print(line, flush=True)
        ended.append(json.loads(line))
        if options.json:
            partial = {"machine": machine() | {"device": ended[0]["device"]}, "spec": spec, "processes": ended}
            options.json.write_text(json.dumps(partial, indent=1) + "\n")

    found = rounds([PEER, *options.forms], options.repetitions, run, show)
    bars = BARS.get(options.model, {}) if options.device == "cpu" else {}
    rows, wrong = judge(found, options.forms, bars)
    for row in rows:
        print(json.dumps(row))
    print(table(found, rows))
    for sentence in wrong:
        print(f"MISSED  {sentence}")
    if options.json:
        about = machine() | {"device": found[0][PEER]["device"]}
        figures = {"machine": about, "versions": found[0][PEER]["versions"], "spec": spec, "ratios": rows,
                   "missed": wrong, "rounds": found}  # fmt: skip
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
