"""What the ranks of tests/runtime/test_ranks.py run: `python -m tests.rank_runs FOLDER RANKS:FORM,FORM...`.

The ranks are forked from one process that has imported torch and transformers, which takes longer than their runs. The
environment is torchrun's; torchrun itself starts the ranks of the test that kills one. The lead writes. Last, two ranks
of `fastrlhf ppo` in FOLDER/mistake, whose reward function raises.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from fastrlhf import PPOConfig, PPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer, cli
from fastrlhf.models.loading import scalar_model
from fastrlhf.runtime import distributed
from fastrlhf.runtime.guards import Interrupted
from tests import tiny

PROMPTS = [tiny.chat(p) for p in tiny.PROMPTS]
PAIRS = [{"prompt": p, "chosen": "the answer is yes", "rejected": "no"} for p in PROMPTS]
RANKED = [{"prompt": p, "responses": ["yes", "no", "thank you"], "ranking": [2, [0, 1]]} for p in PROMPTS]
SCORED = [{"prompt": p, "response": "thank you", "score": 1 + i % 5} for i, p in enumerate(PROMPTS)]
PPO = {"total_steps": 2, "rollout_batch_size": 10, "samples_per_prompt": 2, "mini_batch_size": 5, "max_new_tokens": 10,
       "learning_rate": 1e-3, "critic_learning_rate": 1e-3, "eval_every": 2, "micro_batch_tokens": 60,
       "reward_scaling": "running_norm", "gae_lambda": 1.0, "lr_schedule": "cosine"}  # fmt: skip
FORMS = {
    "separate": {},
    "shared_trunk": {"critic": "shared_trunk", "old_log_probs": "rollout", "kl_controller": "adaptive"},
    "lora": {"lora": 4, "critic": "shared_trunk"},
    "tokens": {"bootstrap_truncated": True, "best_of_n": 2},
    "extras": {
        "total_steps": 5,  # two of warm-up, a refresh behind the fourth
        "ptx_coef": 0.5,
        "ema_decay": 0.9,
        "ref_refresh_every": 2,
        "critic_warmup_steps": 2,
        "critic_pretrain_epochs": 2,
    },
    "tied": {"total_steps": 5, "ptx_coef": 0.5, "critic_warmup_steps": 1, "gradient_checkpointing": True},
    "rloo": {"advantage": "rloo", "critic_learning_rate": 0, "kl_in": "loss", "loss_aggregation": "sequence_mean"},
}
SUPERVISED = {"total_steps": 2, "mini_batch_size": 4, "learning_rate": 1e-3, "eval_every": 2, "micro_batch_tokens": 40}
LINEAR = {**SUPERVISED, "head_only": True, "readout": "auto"}


def reward(prompts: list[str], responses: list[str]) -> list[float | None]:
    return [None if len(r) == 7 else r.count("e") - 0.1 * len(r) for r in responses]


def token_reward(prompts: list[str], responses: list[str], response_ids: list[list[int]]) -> list:
    return [None if len(ids) == 7 else [0.01 * token for token in ids] for ids in response_ids]


def judge(prompts: list[str], responses: list[str], baselines: list[str]) -> list[float]:
    return [float(len(r) > len(b)) for r, b in zip(responses, baselines, strict=True)]


def build(form: str):
    """The trainer of a form; FORM+zero, FORM+fsdp: with that parallel."""
    form, _, parallel = form.partition("+")
    shared = {"parallel": parallel or "ddp"}
    tokenizer = tiny.tokenizer()
    if form == "sft":
        rows = [{"prompt": r["prompt"], "response": r["chosen"]} for r in PAIRS]
        return SFTTrainer(
            SFTConfig(**SUPERVISED, **shared), model=tiny.llama(), tokenizer=tokenizer, data=rows, eval_data=rows[:3]
        )
    if form == "reward":
        config = RewardConfig(**SUPERVISED, **shared)
        return RewardTrainer(config, model=tiny.llama(), tokenizer=tokenizer, data=PAIRS + RANKED, eval_data=PAIRS[:3])
    if form == "linear":
        config, data = RewardConfig(**LINEAR, **shared), PAIRS + RANKED + SCORED
        return RewardTrainer(config, model=tiny.llama(), tokenizer=tokenizer, data=data, eval_data=PAIRS[:3])
    config = PPOConfig(**{**PPO, **FORMS[form]}, **shared)
    held = {"prompts": PROMPTS, "eval_prompts": PROMPTS[:4]}
    if "ptx_coef" in FORMS[form]:
        held["ptx_data"] = [{"prompt": r["prompt"], "response": r["chosen"]} for r in PAIRS]
    scored = {"reward": token_reward, "judge": judge} if form == "tokens" else {"reward": reward}
    policy = tiny.llama(tie_word_embeddings=form == "tied")
    if form == "tied":  # whose critic starts from the reward model
        scored["reward"] = scalar_model(tiny.llama(seed=3), tokenizer, seed=4)
    return PPOTrainer(config, policy=policy, tokenizer=tokenizer, **held, **scored)


def weights(trainer) -> dict[str, torch.Tensor]:
    """Everything that was trained."""
    return {
        f"{role}.{name}": (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
        for role, part in trainer.trained().items()
        for name, tensor in (part.parts or part.model.state_dict()).items()
    }


def fingerprint(tensors: dict[str, torch.Tensor]) -> int:
    digest = hashlib.sha256(b"".join(t.float().numpy().tobytes() for t in tensors.values())).digest()
    return int.from_bytes(digest[:7], "big")


CALLS_LEFT: list[int] = []  # of `noisy`, until rank 1 gets a signal


def noisy(prompts: list[str], responses: list[str]) -> list[float]:
    """Draws random numbers, as a user's function may: each rank has its own state of the generator."""
    if CALLS_LEFT:
        CALLS_LEFT[0] -= 1
        if CALLS_LEFT[0] == 0 and distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
    return [len(r) + random.random() for r in responses]


def noisy_run(folder: Path, *, policy: torch.nn.Module | None = None, **fields: object) -> PPOTrainer:
    config = PPOConfig(
        **{**PPO, "total_steps": 4, "eval_every": 0, "save_every": 2, "output_dir": str(folder), **fields}
    )
    return PPOTrainer(config, policy=policy or tiny.llama(), tokenizer=tiny.tokenizer(), reward=noisy, prompts=PROMPTS)


def check_resume(out: Path) -> None:
    """A run left after step 2 and resumed ends with the bytes of one that ran through, in every rank."""
    through = noisy_run(out / "through")
    through.train()
    first = iter(noisy_run(out / "resumed"))
    next(first), next(first)
    first.close()
    random.seed(99)
    again = noisy_run(out / "resumed", resume=True)
    again.train()
    assert fingerprint(weights(through)) == fingerprint(weights(again))
    distributed.wait_for_all()
    assert (out / "through" / "metrics.jsonl").read_bytes() == (out / "resumed" / "metrics.jsonl").read_bytes()


def check_shares(out: Path, parallel: str) -> None:
    """The same with shares of the optimizer and bf16 weights; what step 2 left stays in PARALLEL-left, for one
    process. Where the weights are shares too, the lead's checkpoint and export are whole all the same."""

    def run(folder: str, **fields: object) -> PPOTrainer:
        return noisy_run(out / folder, **{"parallel": parallel, "policy": tiny.llama().bfloat16(), **fields})

    through = run(f"{parallel}-through")
    through.train()
    first = iter(run(f"{parallel}-left"))
    next(first), next(first)
    first.close()
    distributed.wait_for_all()
    if distributed.is_lead():
        shutil.copytree(out / f"{parallel}-left", out / f"{parallel}-resumed")
    distributed.wait_for_all()
    again = run(f"{parallel}-resumed", resume=True)
    again.train()
    assert fingerprint(weights(through)) == fingerprint(weights(again))
    optimizers = [o for t in (through, again) for o in t.learner.optimizers()]
    assert all(sum(m.numel() for m in o.masters) < 0.6 * sum(p.numel() for p in o.params) for o in optimizers)
    distributed.wait_for_all()
    rows = [(out / f"{parallel}-{name}/metrics.jsonl").read_bytes() for name in ("through", "resumed")]
    assert rows[0] == rows[1]
    if parallel == "fsdp":
        again.save(out / "exported")
        other = run("zero-left", resume=True)  # which two ranks with zero have left
        assert other.steps_done == 2


def check_signal(out: Path) -> None:
    """A signal to one rank while step 2 is scored stops all of them before its update, with a checkpoint of step 1;
    resume makes the step again."""
    trainer = noisy_run(out / "signalled")
    CALLS_LEFT.append(2)
    try:
        trainer.train()
    except Interrupted as stopped:
        assert trainer.steps_done == 1, str(stopped)
    else:
        raise AssertionError("not stopped")
    CALLS_LEFT.clear()
    distributed.wait_for_all()
    again = noisy_run(out / "signalled", resume=True)
    assert again.steps_done == 1
    again.train()
    distributed.wait_for_all()
    assert (out / "through" / "metrics.jsonl").read_bytes() == (out / "signalled" / "metrics.jsonl").read_bytes()


def command(place: Path, *arguments: str) -> None:
    """The command line's own run in a folder; what this rank says there, and its exit code, go to said-RANK."""
    os.chdir(place)
    with open(f"said-{os.environ['RANK']}", "w", encoding="utf-8") as said, contextlib.redirect_stderr(said):
        print("exit code", cli.main([*arguments]), file=said)
    # The first rank holds the store by which they agree who speaks. torchrun holds it until all ranks have ended.
    ended, files = time.monotonic() + 60, [Path(f"said-{rank}") for rank in range(int(os.environ["WORLD_SIZE"]))]
    while time.monotonic() < ended and not all(f.exists() and "exit code" in f.read_text("utf-8") for f in files):
        time.sleep(0.05)


def main(out: Path, forms: Iterable[str]) -> None:
    if distributed.size() == 2:  # of one process tests/test_resume.py says it
        check_resume(out)
        check_signal(out)
        check_shares(out, "zero")
        check_shares(out, "fsdp")
    for form in forms:
        trainer = build(form)
        before = weights(trainer)
        steps = []
        for step in trainer:
            ids = step.rollout.response_ids if form.partition("+")[0] in FORMS else None
            steps.append({"ids": ids, "metrics": step.metrics})
        after = weights(trainer)
        prints = distributed.gather(torch.tensor([fingerprint(after)])).tolist()
        assert len(set(prints)) == 1, f"{form}: the ranks' weights differ"
        if distributed.is_lead():
            (out / f"{form}.json").write_text(json.dumps(steps))
            save_file({n: after[n] - before[n] for n in after}, out / f"{form}.safetensors")


def fork(ranks: int, work: Callable[..., None], *arguments: object) -> None:
    """Do the work in so many ranks. Ends the process where one of them fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=as_rank, args=(rank, ranks, port, work, *arguments)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        sys.exit(f"{ranks} ranks ended with {[process.exitcode for process in processes]}")


def as_rank(rank: int, ranks: int, port: int, work: Callable[..., None], *arguments: object) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(ranks),
        LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    work(*arguments)


if __name__ == "__main__":
    torch.set_num_threads(1)
    place = Path(sys.argv[1])
    for group in sys.argv[2:]:
        count, _, named = group.partition(":")
        (place / count).mkdir()
        fork(int(count), main, place / count, named.split(","))
    fork(2, command, place / "mistake", "ppo", "r.yaml", "reward=mine.py:broken")
