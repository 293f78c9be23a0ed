"""Kill a run with SIGKILL at random moments, resume it, and compare every byte with a run that was left alone.

    python -m bench.kill_resume --kills 6 [--stage sft|reward|ppo] [--seed 0] [--exec]
    python -m bench.kill_resume --sweep      # instead: killed once before every single change of the file system

Half of the kills fall at a random time, half at a random call that changes the file system (inside a save, a rotation,
an export). Runs go through the command line's `main` in processes forked from this one, which has imported torch
already; --exec starts real `python -m fastrlhf` processes instead (kills by time only). Then a run is stopped by
SIGTERM (exit code 75) and resumed, and one with another seed shows that the comparison can fail. Prints one JSON line
a stage; exit code 1 when any of this is not as promised.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from bench.processes import imported_for_forks
from fastrlhf import cli

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the promise is for the same thread count; forked children need 1
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
import transformers  # noqa: E402
import yaml  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402
from torch.utils import tensorboard  # noqa: E402, F401 (imported once here, not in every child)

from fastrlhf import ppo, reward_model, sft  # noqa: E402, F401 (the same)

for needed in ("sklearn.feature_extraction.text", "sklearn.linear_model"):  # the same, where it is installed
    with suppress(ImportError):
        importlib.import_module(needed)

STAGES = ("sft", "reward", "ppo")
CALLS = ("rename", "replace", "fsync", "mkdir", "chmod", "unlink", "rmdir")
WORDS = ["the", "cat", "sat", "on", "a", "mat", "near", "seven", "blue", "boats", "今天", "天气", "很好", "谢谢", "您"]
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
EXIT_INTERRUPTED = 75

READS = {
    "sft": {"model": "model", "data": "sft.jsonl"},
    "reward": {"model": "model", "data": "feedback.jsonl"},
    "ppo": {"policy": "model", "reward": "reward", "prompts": "prompts.jsonl", "eval_prompts": "heldout.jsonl"},
}
COMMON = {
    "learning_rate": 1e-3,
    "lr_schedule": "cosine",
    "warmup_steps": 2,
    "save_every": 2,
    "eval_every": 3,
    "dtype": "fp32",
}
FIELDS: dict[str, dict[str, Any]] = {
    "sft": {"eval_fraction": 0.2, "total_steps": 8, "mini_batch_size": 6, "packing": True},
    "reward": {"eval_fraction": 0.2, "total_steps": 8, "mini_batch_size": 6},
    "ppo": {
        "total_steps": 5,
        "rollout_batch_size": 8,
        "mini_batch_size": 4,
        "samples_per_prompt": 2,
        "max_new_tokens": 12,
        "reward_scaling": "running_norm",
        "critic_learning_rate": 1e-3,
    },
}


# --- what the runs read ---


def make_inputs(folder: Path) -> None:
    """Write a byte-level tokenizer, a random policy and reward model, feedback of every kind, and a recipe a stage."""
    rng = random.Random(0)
    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        [" ".join(WORDS)],
        trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|pad|>")
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    shape = {**SHAPE, "vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    policy = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, tie_word_embeddings=True))
    judge = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**shape, num_labels=1))
    for name, model in (("model", policy), ("reward", judge)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)

    def text(low: int, high: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))

    rows = {
        "sft": [{"prompt": text(1, 5), "response": text(1, 9)} for _ in range(40)],
        "feedback": [record for _ in range(12) for record in _feedback(text, rng)],
        "prompts": [{"prompt": text(1, 6)} for _ in range(10)],
        "heldout": [{"prompt": text(1, 6)} for _ in range(3)],
    }
    for name, records in rows.items():
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    for stage in STAGES:
        paths = {name: str(folder / value) for name, value in READS[stage].items()}
        (folder / f"{stage}.yaml").write_text(yaml.safe_dump({**COMMON, **FIELDS[stage], **paths}))


def _feedback(text: Callable[[int, int], str], rng: random.Random) -> Iterator[dict[str, Any]]:
    yield {"prompt": text(1, 5), "chosen": text(1, 8), "rejected": text(1, 8)}
    yield {"prompt": text(1, 5), "responses": [text(1, 8) for _ in range(3)], "ranking": [2, [0, 1]]}
    yield {"prompt": text(1, 5), "response": text(1, 8), "score": rng.randint(1, 5)}
    yield {"prompt": text(1, 5), "response": text(1, 8), "edited": text(1, 8)}


# --- processes ---


class Child:
    """One command in a process of its own session. `kill_at`: die by SIGKILL before that change of the file system."""

    def __init__(self, arguments: list[str], log: Path, *, kill_at: int = 0, real: bool = False):
        self.log = log
        if real:
            with log.open("ab") as out:
                command = [sys.executable, "-m", "fastrlhf", *arguments]
                self.process = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
                self.pid = self.process.pid
            return
        sys.stdout.flush(), sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._run(arguments, kill_at)

    def _run(self, arguments: list[str], kill_at: int) -> None:
        code = 70
        try:
            os.setsid()
            with self.log.open("ab", buffering=0) as out:
                os.dup2(out.fileno(), 1), os.dup2(out.fileno(), 2)
            calls = _count_calls(kill_at)
            code = cli.main(arguments)
            self.log.with_suffix(".calls").write_text(str(calls[0]))
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)

    def wait(self, seconds: float = 0) -> int:
        """Wait for the end -> exit code, or -9 after a kill. After `seconds` (if given) it is killed."""
        deadline = time.monotonic() + seconds
        while seconds and time.monotonic() < deadline:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
        if seconds:
            os.kill(self.pid, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def _count_calls(kill_at: int) -> list[int]:
    """Count the process's changes of the file system from here on; die just before number `kill_at` (0: never)."""
    calls = [0]

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return wrapper

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))
    return calls


# --- the experiment ---


class Experiment:
    """Runs of one stage over the same inputs; `reference` is the one that nobody killed."""

    def __init__(self, stage: str, inputs: Path, folder: Path, *, real: bool = False):
        self.stage, self.recipe, self.folder, self.real = stage, inputs / f"{stage}.yaml", folder, real
        self.reference = folder / "reference"
        folder.mkdir(parents=True)
        start = time.monotonic()
        self.finish(self.reference)
        self.seconds = time.monotonic() - start
        counted = self._log(self.reference).with_suffix(".calls")
        self.calls = int(counted.read_text()) if counted.exists() else 0

    def _log(self, run: Path) -> Path:
        return self.folder / f"{run.name}.txt"

    def child(self, run: Path, *fields: str, **how: Any) -> Child:
        """Start the run, or go on with it: what a user types after a crash."""
        if (run / "run.json").exists():
            arguments = ["resume", str(run)]
        else:
            arguments = [self.stage, str(self.recipe), f"output_dir={run}", *fields]
        return Child(arguments, self._log(run), real=self.real, **how)

    def finish(self, run: Path, *fields: str) -> Path:
        code = self.child(run, *fields).wait()
        if code != 0:
            raise RuntimeError(f"{run} ended with {code}:\n{self._log(run).read_text(errors='replace')[-3000:]}")
        return run

    def preempt(self, run: Path, step: int) -> tuple[int, int | None]:
        """SIGTERM once `step` steps are logged -> exit code, newest checkpoint; the run is then ended.

        A run that ended before the signal came says nothing: it is tried again, up to five times.
        """
        metrics = run / "metrics.jsonl"
        for _ in range(5):
            shutil.rmtree(run, ignore_errors=True)
            child = self.child(run)
            while not metrics.exists() or metrics.read_bytes().count(b"\n") < step + 1:  # step 0 is an evaluation
                time.sleep(0.002)
            os.kill(child.pid, signal.SIGTERM)
            code, newest = child.wait(), last_step(run)
            if newest != FIELDS[self.stage]["total_steps"]:
                break
        self.finish(run)
        return code, newest

    def interrupt(self, run: Path, rng: random.Random, kinds: list[str]) -> list[str]:
        """Kill the run once a kind ("time" or "call"), resuming in between, then let it end -> where each kill fell.

        The moments are uniform over what is left of the run, by its newest checkpoint.
        """
        where: list[str] = []
        for kind in kinds:
            left = 1 - (last_step(run) or 0) / FIELDS[self.stage]["total_steps"]
            when = rng.uniform(0, max(left, 0.1) * (self.calls if kind == "call" else self.seconds))
            while not self._kill(run, when, kind == "call"):
                shutil.rmtree(run)  # it was faster than the reference, and must be killed all the same
                when /= 2
            where.append(f"{kind} {when:.2f}, newest checkpoint {last_step(run)}")
        self.finish(run)
        return where

    def _kill(self, run: Path, when: float, by_call: bool) -> bool:
        """One process of the run, killed before its change `when` of the file system, or after `when` seconds."""
        if by_call:
            return self.child(run, kill_at=max(1, int(when))).wait() == -signal.SIGKILL
        return self.child(run).wait(max(0.01, when)) == -signal.SIGKILL

    def differences(self, run: Path) -> list[str]:
        """Files that are not byte for byte those of the reference run: results, last checkpoints, metrics, samples."""
        expected, actual = comparable(self.reference), comparable(run)
        names = sorted(expected.keys() | actual.keys())
        return [name for name in names if expected.get(name) != actual.get(name)]


def last_step(run: Path) -> int | None:
    return max((int(path.name[5:]) for path in run.glob("checkpoints/step-*")), default=None)


def comparable(run: Path) -> dict[str, bytes]:
    """Files that the seed alone determines, by relative path; no wall clock, log or recipe (it names the folder)."""
    kept = {"metrics.jsonl", "samples.jsonl", "events.jsonl"}
    folders = {"checkpoints", "final", "best"}
    paths = (path for path in sorted(run.rglob("*")) if path.is_file())
    parts = ((path, path.relative_to(run)) for path in paths)
    return {str(name): path.read_bytes() for path, name in parts if name.parts[0] in kept | folders}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=6, help="kills a stage (default 6)")
    parser.add_argument("--stage", choices=STAGES, action="append", help="only this stage; may be repeated")
    parser.add_argument("--seed", type=int, default=None, help="of the moments (default: drawn and printed)")
    parser.add_argument("--sweep", action="store_true", help="one run a change of the file system, killed before it")
    parser.add_argument("--exec", action="store_true", help="real processes instead of forked ones")
    args = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if args.seed is None else args.seed
    passed = True
    imported_for_forks()
    with tempfile.TemporaryDirectory() as temporary:
        make_inputs(Path(temporary))
        for stage in args.stage or STAGES:
            if args.sweep:
                row = sweep(stage, Path(temporary))
            else:
                row = examine(stage, Path(temporary), seed, args.kills, args.exec)
            passed &= row["passed"]
            print(json.dumps(row, ensure_ascii=False), flush=True)
    return 0 if passed else 1


def examine(stage: str, inputs: Path, seed: int, kills: int, real: bool) -> dict[str, Any]:
    """The whole experiment on one stage -> what main prints."""
    start, rng = time.monotonic(), random.Random(f"{seed} {stage}")
    experiment = Experiment(stage, inputs, inputs / f"runs-{stage}", real=real)
    folder = experiment.folder
    kinds = ["time"] * kills if real else ["time", "call", "call", "time"] * kills
    where, different = [], {}
    for first in range(0, kills, 2):  # two kills a run: the second one hits a run that was resumed
        run = folder / f"killed{first}"
        where += experiment.interrupt(run, rng, kinds[first : min(first + 2, kills)])
        different[run.name] = experiment.differences(run)
    code, newest = experiment.preempt(folder / "preempted", rng.randint(1, FIELDS[stage]["total_steps"] // 2))
    different["preempted"] = experiment.differences(folder / "preempted")
    control = experiment.differences(experiment.finish(folder / "control", "seed=1"))
    sees = {"metrics.jsonl", "final/model.safetensors"} <= set(control)
    return {
        "stage": stage,
        "seed": seed,
        "kills": where,
        "preempted": [code, newest],
        "files": len(comparable(experiment.reference)),
        "different": different,
        "control_differs_in": len(control),
        "passed": sees and not any(different.values()) and code == EXIT_INTERRUPTED,
        "seconds": round(time.monotonic() - start, 1),
    }


def sweep(stage: str, inputs: Path) -> dict[str, Any]:
    """One run for each change of the file system that the reference makes, killed just before it and resumed."""
    start = time.monotonic()
    experiment = Experiment(stage, inputs, inputs / f"sweep-{stage}")
    different: dict[str, list[str]] = {}
    for call in range(1, experiment.calls + 1):
        run = experiment.folder / f"call{call}"
        code = experiment.child(run, kill_at=call).wait()
        if code != -signal.SIGKILL:
            raise RuntimeError(f"{run} ended with {code} before call {call} of {experiment.calls}")
        names = experiment.differences(experiment.finish(run))
        different |= {run.name: names} if names else {}
        shutil.rmtree(run)
    return {
        "stage": stage,
        "kills": experiment.calls,
        "different": different,
        "passed": not different,
        "seconds": round(time.monotonic() - start, 1),
    }


if __name__ == "__main__":
    sys.exit(main())
