"""The tables of docs/performance.md, from what the bench commands wrote to bench/results.

    python -m bench.performance            writes the tables into the document, between their marks
    python -m bench.performance --check    exit code 1 where the document says something else

A table whose results are not there says so. Nothing is measured here.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from bench import learning_speed

ROOT = Path(__file__).parent.parent.resolve()
RESULTS, DOCUMENT = ROOT / "bench/results", ROOT / "docs/performance.md"
MARK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
GIB = 2**30


def read(name: str) -> dict[str, Any] | None:
    path = RESULTS / name
    return json.loads(path.read_text()) if path.exists() else None


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines)


def machine(about: dict[str, Any]) -> str:
    return ", ".join(f"{name} {about[name]}" for name in ("device", "torch", "triton", "commit") if about.get(name))


def head_kernels() -> str:
    """Hidden states to gradients on a GPU: one table a shape."""
    found = read("kernels_gpu.json")
    if found is None:
        return "Not measured yet."
    shapes = list(dict.fromkeys(row["shape"] for row in found["rows"] if " H=" in row["shape"]))
    parts = [machine(found["machine"])]
    for shape in shapes:
        rows = [row for row in found["rows"] if row["shape"] == shape]
        body = [
            (row["name"], f"{row['ms']:.1f}", f"{row['floor_ms'] / row['ms']:.2f}", f"{row['extra'] / GIB:.2f}")
            for row in rows
        ]
        parts.append(f"{shape}\n\n" + markdown(("", "ms", "share of the floor", "extra GiB"), body))
    return "\n\n".join(parts)


def small_kernels() -> str:
    """Kernels on logits and tokens on a GPU."""
    found = read("kernels_gpu.json")
    if found is None:
        return "Not measured yet."
    rows = [row for row in found["rows"] if " H=" not in row["shape"]]
    body = [
        (
            f"{row['name']} ({row['shape']})" if "[" not in row["name"] else row["name"],
            f"{row['ms']:.3f}",
            f"{row['graph_ms']:.3f}" if "graph_ms" in row else "",
            f"{row['floor_ms']:.3f}",
        )
        for row in rows
    ]
    return markdown(("", "ms", "ms, replayed from a graph", "floor, ms"), body)


def rollout(name: str) -> str:
    found = read(name)
    if found is None:
        return "Not measured yet."
    rates = [f"{found['bandwidth'] / 1e9:.0f} GB/s"]
    rates += [f"{found['rate'] / 1e12:.1f} TFLOP/s"] if "rate" in found else []
    peers = list(found["rows"][0]["ratios"])
    body = [
        (
            row["model"], row["dtype"], row["batch"], row["workload"], f"{row['tokens_per_s']:.0f}",
            f"{row['floor']:.2f}", *(f"{row['ratios'][peer]:.2f}x" for peer in peers),
        )
        for row in found["rows"]
    ]  # fmt: skip
    head = ("model", "dtype", "batch", "replies", "tokens/s", "share of the floor", *(f"beside {p}" for p in peers))
    return f"{machine(found['machine'])}; {', '.join(rates)}\n\n" + markdown(head, body)


def ppo_step(*names: str) -> str:
    """A step beside TRL's: one table a result."""
    parts = []
    for name in names:
        found = read(name)
        if found is None:
            continue
        spec, seconds = found["spec"], found["rounds"][0]["trl"]["seconds"]
        about = machine(found["machine"] | {"torch": found["versions"]["torch"]})
        title = (
            f"{spec['model']}: {spec['batch']} replies of {spec['new']} tokens, {spec['epochs']} epochs; {about}; "
            f"rounds: {len(found['rounds'])}; TRL's step takes {seconds:.2f} s"
        )
        body = [
            (
                row["form"], f"{row['seconds']:.2f}", f"{row['speed']:.2f}x",
                *(f"{row['phases'][phase]:.2f}x" for phase in ("rollout", "experience", "update")),
                f"{row['memory']:.2f}x", f"{row['peak_mib'] / 1024:.2f}",
            )
            for row in found["ratios"]
        ]  # fmt: skip
        head = ("form", "seconds", "speed", "rollout", "experience", "update", "memory", "peak GiB")
        parts.append(f"{title}\n\n{markdown(head, body)}")
    return "\n\n".join(parts) or "Not measured yet."


def to_the_same_reward() -> str:
    """Seconds of PPO to a given reward, beside TRL."""
    found = read("learning_speed_cpu.json")
    return learning_speed.table(found["runs"]) if found else "Not measured yet."


TABLES: dict[str, Callable[[], str]] = {
    "head_kernels": head_kernels,
    "small_kernels": small_kernels,
    "rollout_gpu": lambda: rollout("rollout_gpu.json"),
    "rollout_cpu": lambda: rollout("rollout_cpu.json"),
    "ppo_step_gpu": lambda: ppo_step("ppo_step_gpu_qwen2.5-0.5b.json", "ppo_step_gpu_qwen2.5-1.5b.json"),
    "ppo_step_cpu": lambda: ppo_step("ppo_step_cpu_tiny.json", "ppo_step_cpu_smollm2.json"),
    "learning_speed": to_the_same_reward,
}


def written(text: str) -> str:
    """The document with its tables as the results have them. KeyError for a table that nobody makes."""
    return MARK.sub(lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n\n{found[3]}", text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.performance", description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where the document differs")
    options = parser.parse_args(arguments)
    before = DOCUMENT.read_text()
    after = written(before)
    if options.check:
        print("docs/performance.md is as the results have it" if before == after else "run python -m bench.performance")
        return int(before != after)
    DOCUMENT.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
