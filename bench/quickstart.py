"""`fastrlhf quickstart` for several seeds, its figures in one file, and how each model goes on with plain text.

    python -m bench.quickstart [--seeds 1 2 3] [--jobs 3] [--work runs/verdict]
                               [--json bench/results/quickstart_cpu.json]

A seed's run is the command as a user types it, in WORK/seed-N, kept or gone on with where it is there; bench.verdict
and bench.overoptimise find its SFT and reward model there. The greeting is what `pipeline("text-generation",
model=FOLDER)` makes of GREETING, which no row of the training data holds: DRAWN samples a model. Exit code 1 when a
seed does not pass.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from transformers import pipeline, set_seed

from bench.kernels import machine
from bench.processes import positive, side_by_side, write_row
from fastrlhf import quickstart
from fastrlhf.quickstart import verdict
from fastrlhf.quickstart.content import shipped, texts_of
from fastrlhf.quickstart.model import build_model, build_tokenizer

# PPO takes 26 steps at kl_coef 0.25: at 0.15 seed 3's replies had 0.51 of SFT's distinct-2, with 34 steps 0.58.
GREETING = "你好，世界！"
DRAWN = 8
KEPT = "bench.json"


def continuations(folder: Path, text: str, count: int) -> list[str]:
    """What the stock pipeline adds to a text, `count` times, sampled as the model's generation config says."""
    set_seed(0)
    run = pipeline("text-generation", model=str(folder), device="cpu")
    return [made["generated_text"].removeprefix(text) for (made,) in run([text] * count)]


def one(seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of the run of a seed, in this process; those of a run that ended are kept in its folder."""
    out = options.work / f"seed-{seed}"
    if (out / KEPT).exists():
        return json.loads((out / KEPT).read_text(encoding="utf-8"))
    began = time.process_time()
    given = [f"output_dir={out}", *(["resume=true"] if (out / "run.json").exists() else [f"seed={seed}"])]
    code = quickstart.main(given)
    if code not in (0, 1):
        raise SystemExit(code)
    figures = json.loads((out / "verdict.json").read_text(encoding="utf-8"))
    figures["threads"] = torch.get_num_threads()
    if "resume=true" not in given:  # else these are not of a whole run
        figures["cpu_seconds"] = round(time.process_time() - began, 1)
    figures |= {"greeting": continuations(out / "final", GREETING, DRAWN)}
    write_row(out / KEPT, figures)
    return figures


IN_CHINESE = {
    "measured": "度量",
    "bar": "标准",
    "aim": "目标",
    "seed": "种子",
    " missed": " 未达到",
    "rule holds before SFT": "SFT 之前符合规则",
    "rule holds after SFT": "SFT 之后符合规则",
    "rule holds after PPO": "PPO 之后符合规则",
    "... when prompts are shuffled": "……打乱提示之后",
    "KL to the SFT model, nats a reply": "相对 SFT 模型的 KL，nats/回复",
    "distinct-2 against SFT's": "distinct-2，相对 SFT",
    "mean length against SFT's": "平均长度，相对 SFT",
    "reward model, clean held-out pairs": "奖励模型，干净的留出偏好对",
    "rule holds after PPO, frames that training has": "PPO 之后符合规则，训练中有的句式",
    "... wording that no training prompt has": "……训练提示中没有的措辞",
    "about what was asked, share after PPO less before": "切题的比例，PPO 之后减之前",
    "rule holds after PPO, wording that no training prompt has": "PPO 之后符合规则，训练提示中没有的措辞",
    "reward model, its worst kind of fault": "奖励模型，最弱的一类错误",
    f"rule holds, best of {verdict.BEST_OF} SFT replies by the reward model": (
        f"符合规则，奖励模型从 {verdict.BEST_OF} 条 SFT 回复中选出的一条"
    ),
    "... its KL to the SFT model, nats a reply at most": "……其相对 SFT 模型的 KL，nats/回复，至多",
    "PPO replies about what was asked, either manner": "PPO 回复切题，不论态度",
    "PPO replies considerate, whatever they say": "PPO 回复体贴，不论内容",
    "rule holds, a topic that no training prompt has": "符合规则，训练提示中没有的话题",
    "... considerate there, whatever they say": "……其中体贴的，不论内容",
}


def table(runs: list[dict[str, Any]], words: Mapping[str, str] = MappingProxyType({})) -> str:
    """A Markdown table: a line a bar, an aim or what stands beside, a column a seed; a bar that was missed says so.
    words: translations of its texts."""

    def line(what: str, bar: str, cells: Iterable[str]) -> str:
        return f"| {words.get(what, what)} | {bar} | " + " | ".join(cells) + " |"

    def word(text: str) -> str:
        return words.get(text, text)

    judged = [verdict.judge(run) + verdict.judge_parts(run) for run in runs]
    aims, beside = [verdict.aims(run) for run in runs], [verdict.beside(run) for run in runs]
    lines = [line("measured", word("bar"), (f"{word('seed')} {run['seed']}" for run in runs))]
    lines.append("|---|---|" + "---|" * len(runs))
    lines.append(line("rule holds before SFT", "", (f"{run['rate_before_sft']:.3f}" for run in runs)))
    for i, (what, _, bar, _) in enumerate(judged[0]):
        lines.append(line(what, bar, (f"{run[i][1]:.3f}{'' if run[i][3] else word(' missed')}" for run in judged)))
    for i, (what, _, aim, _) in enumerate(aims[0]):
        lines.append(line(what, f"{word('aim')} {aim}", (f"{run[i][1]:.3f}" for run in aims)))
    for i, (what, *_) in enumerate(beside[0]):
        lines.append(line(what, "", (f"{run[i][1]:.3f} ({run[i][2]})" for run in beside)))
    return "\n".join(lines)


def about(jobs: int) -> dict[str, Any]:
    """What is the same for every seed: the machine, how many rows ship, the size of the model, the KL of best of n."""
    rows = {name: len(shipped(name)) for name in ("sft", "feedback", "heldout_prompts", "heldout_topic_prompts")}
    texts = [text for row in shipped("sft") for text in texts_of(row)]
    size = {"parameters": build_model(build_tokenizer(texts), seed=0).num_parameters()}
    kl = {"best_of": verdict.BEST_OF, "kl_best_of": verdict.BEST_OF_KL}
    return {"machine": machine() | {"jobs": jobs}, "prompt": GREETING} | rows | size | kl


def write(options: argparse.Namespace, runs: list[dict[str, Any]], **more: Any) -> None:
    """--json, where it is asked for."""
    if options.json:
        text = json.dumps(about(options.jobs) | more | {"runs": runs}, indent=1, ensure_ascii=False)
        options.json.write_text(text + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.quickstart", description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--work", type=Path, default=Path("runs/verdict"), help="where the runs are made and kept")
    parser.add_argument("--jobs", type=positive, default=1, help="runs at once, each in a process with one thread")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # of `processes`: the run of this seed, its figures to --row
    parser.add_argument("--row", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.only:
        write_row(options.row, one(int(options.only), options))
        return 0
    runs = {str(seed): ["--work", str(options.work), "--only", str(seed)] for seed in options.seeds}
    found, failed = side_by_side("bench.quickstart", runs, options.jobs, options.work / "runs")
    if not found:
        print("no run ended; nothing is written", file=sys.stderr)
        return 1
    rows = list(found.values())
    write(options, rows, **({"failed": failed} if failed else {}))
    print(table(rows))
    for row in rows:
        print(f"seed {row['seed']}: {GREETING} -> {' | '.join(row['greeting'])}")
    return 0 if not failed and all(row["passed"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
