"""What the ranks of tests/runtime/test_ranks.py run: `python -m tests.rank_runs FOLDER RANKS:FORM,FORM...`.

The ranks are forked from one process that has imported all that they use, which takes longer than their runs. The
environment is torchrun's. The lead writes. Last, two ranks of `fastrlhf ppo`: in FOLDER/mistake its reward function
raises, in FOLDER/killed and FOLDER/restarted it kills rank 1, under torchrun's own agents.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.distributed.tensor import DTensor

from bench.processes import imported_for_forks
from fastrlhf import PPOConfig, PPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer, cli
from fastrlhf.config.errors import UserError
from fastrlhf.models.loading import scalar_model
from fastrlhf.parallel import sharding
from fastrlhf.parallel.vocabulary import shard_vocabulary, vocabulary_parallel_log_probs
from fastrlhf.runtime import distributed, launch
from fastrlhf.runtime.guards import Interrupted
from fastrlhf_kernels import linear_log_probs, linear_ppo_loss, ppo_policy_loss
from tests import rank_checks, tiny

PROMPTS = [tiny.chat(p) for p in tiny.PROMPTS]
PAIRS = [{"prompt": p, "chosen": "the answer is yes", "rejected": "no"} for p in PROMPTS]
RANKED = [{"prompt": p, "responses": ["yes", "no", "thank you"], "ranking": [2, [0, 1]]} for p in PROMPTS]
SCORED = [{"prompt": p, "response": "thank you", "score": 1 + i % 5} for i, p in enumerate(PROMPTS)]
PPO = {"total_steps": 2, "rollout_batch_size": 10, "samples_per_prompt": 2, "mini_batch_size": 5, "max_new_tokens": 10,
       "learning_rate": 1e-3, "critic_learning_rate": 1e-3, "eval_every": 2, "micro_batch_tokens": 60,
       "reward_scaling": "running_norm", "gae_lambda": 1.0, "lr_schedule": "cosine", "ppo_epochs": 1}  # fmt: skip
FORMS = {
    "separate": {"ppo_epochs": 2},
    "shared_trunk": {
        "critic": "shared_trunk",
        "old_log_probs": "rollout",
        "kl_controller": "adaptive",
        "packing": True,
    },
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
    "tied": {
        "total_steps": 3,
        "eval_every": 0,
        "ptx_coef": 0.5,
        "critic_warmup_steps": 1,
        "gradient_checkpointing": True,
    },
    "rloo": {"advantage": "rloo", "critic_learning_rate": 0, "kl_in": "loss", "loss_aggregation": "sequence_mean"},
}
SMALL = ("shared_trunk+fsdp", "tied+fsdp")
SUPERVISED = {"total_steps": 2, "mini_batch_size": 4, "learning_rate": 1e-3, "eval_every": 2, "micro_batch_tokens": 40}
LINEAR = {**SUPERVISED, "head_only": True, "readout": "auto"}


def reward(prompts: list[str], responses: list[str]) -> list[float | None]:
    return [None if len(r) == 7 else r.count("e") - 0.1 * len(r) for r in responses]


def token_reward(prompts: list[str], responses: list[str], response_ids: list[list[int]]) -> list:
    return [None if len(ids) == 7 else [0.01 * token for token in ids] for ids in response_ids]


def judge(prompts: list[str], responses: list[str], baselines: list[str]) -> list[float]:
    return [float(len(r) > len(b)) for r, b in zip(responses, baselines, strict=True)]


def build(form: str, out: Path):
    """The trainer of a form; FORM+zero, FORM+fsdp: with that parallel, and with fsdp of models that lie in folders."""
    name, _, parallel = form.partition("+")

    def saved(model: torch.nn.Module) -> str:
        place = out / f"{form}-{type(model).__name__}"
        if distributed.is_lead():
            model.save_pretrained(place, max_shard_size="100KB")
            tiny.tokenizer().save_pretrained(place)
        distributed.wait_for_all()
        return str(place)

    return trainer_of(name, parallel or "ddp", saved if parallel == "fsdp" else lambda model: model)


def trainer_of(form: str, parallel: str, given: Callable[[torch.nn.Module], torch.nn.Module | str]):
    """given: what a trainer is given for a model."""
    shared = {"parallel": parallel}
    tokenizer = tiny.tokenizer()
    if form == "sft":
        rows = [{"prompt": r["prompt"], "response": r["chosen"]} for r in PAIRS]
        config, model = SFTConfig(**SUPERVISED, **shared, packing=True), given(tiny.llama())
        return SFTTrainer(config, model=model, tokenizer=tokenizer, data=rows, eval_data=rows[:3])
    if form == "reward":
        config, model = RewardConfig(**SUPERVISED, **shared), given(tiny.llama())
        return RewardTrainer(config, model=model, tokenizer=tokenizer, data=PAIRS + RANKED, eval_data=PAIRS[:3])
    if form == "linear":
        config, data = RewardConfig(**LINEAR, **shared), PAIRS + RANKED + SCORED
        return RewardTrainer(config, model=tiny.llama(), tokenizer=tokenizer, data=data, eval_data=PAIRS[:3])
    config = PPOConfig(**{**PPO, **FORMS[form]}, **shared)
    held = {"prompts": PROMPTS, "eval_prompts": PROMPTS[:4]}
    if "ptx_coef" in FORMS[form]:
        held["ptx_data"] = [{"prompt": r["prompt"], "response": r["chosen"]} for r in PAIRS]
    scored = {"reward": token_reward, "judge": judge} if form == "tokens" else {"reward": reward}
    policy = given(tiny.llama(tie_word_embeddings=form == "tied"))
    if form == "tied":  # whose critic starts from the reward model
        scored["reward"] = given(scalar_model(tiny.llama(seed=3), tokenizer, seed=4))
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
    config = PPOConfig(**{**PPO, "eval_every": 0, "save_every": 1, "output_dir": str(folder), **fields})
    return PPOTrainer(config, policy=policy or tiny.llama(), tokenizer=tiny.tokenizer(), reward=noisy, prompts=PROMPTS)


def check_resume(out: Path) -> None:
    """A run left after step 1 and resumed ends with the bytes of one that ran through, in every rank."""
    through = noisy_run(out / "through")
    through.train()
    first = iter(noisy_run(out / "resumed"))
    next(first)
    first.close()
    random.seed(99)
    again = noisy_run(out / "resumed", resume=True)
    again.train()
    assert fingerprint(weights(through)) == fingerprint(weights(again))
    distributed.wait_for_all()
    assert (out / "through" / "metrics.jsonl").read_bytes() == (out / "resumed" / "metrics.jsonl").read_bytes()


def check_shares(out: Path, parallel: str) -> None:
    """The same with shares of the optimizer and bf16 weights; what step 1 left stays in PARALLEL-left, for one
    process. Where the weights are shares too, the lead's checkpoint and export are whole all the same."""

    def run(folder: str, **fields: object) -> PPOTrainer:
        return noisy_run(out / folder, **{"parallel": parallel, "policy": tiny.llama().bfloat16(), **fields})

    through = run(f"{parallel}-through")
    through.train()
    first = iter(run(f"{parallel}-left"))
    next(first)
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
    timings = [json.loads(row) for row in (out / f"{parallel}-through/timings.jsonl").read_text().splitlines()]
    idle = [row["perf/rollout_idle"] for row in timings if row.get("perf/rollout_tokens")]
    assert len(idle) == again.steps_done == 2 and all(0 <= share < 1 for share in idle)
    assert "nats apart" not in (out / f"{parallel}-through/log.txt").read_text()  # what bf16 rounds is no alarm
    if parallel == "fsdp":
        again.save(out / "exported")
        other = run("zero-left", resume=True)  # which two ranks with zero have left
        assert other.steps_done == 1
        check_that_no_memory_for_a_whole_model_is_said(other.policy)


def check_that_no_memory_for_a_whole_model_is_said(model: torch.nn.Module) -> None:
    def fails() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    model.unshard = fails
    try:
        with sharding.gathered(model):
            raise AssertionError("gathered")
    except UserError as error:
        assert "gather a model, and memory ran out as all" in str(error)
    del model.unshard
    with sharding.gathered(model):  # and it can be gathered behind it
        assert not any(isinstance(p, DTensor) for p in model.parameters())


def check_signal(out: Path) -> None:
    """A signal to one rank while step 2 is scored stops all of them before its update, with a checkpoint of step 1,
    which no other reason would save; resume makes the step again."""
    trainer = noisy_run(out / "signalled", save_every=2)
    CALLS_LEFT.append(2)
    try:
        trainer.train()
    except Interrupted as stopped:
        assert trainer.steps_done == 1, str(stopped)
    else:
        raise AssertionError("not stopped")
    CALLS_LEFT.clear()
    distributed.wait_for_all()
    again = noisy_run(out / "signalled", resume=True, save_every=2)
    assert again.steps_done == 1
    again.train()
    distributed.wait_for_all()
    assert (out / "through" / "metrics.jsonl").read_bytes() == (out / "signalled" / "metrics.jsonl").read_bytes()


def check_same_run_is_asked_for() -> None:
    """What rank 1 has otherwise than rank 0 is named in both, before a model is loaded."""
    rank, rows = distributed.rank(), [{"prompt": r["prompt"], "response": r["chosen"]} for r in PAIRS]
    cases = {
        "learning_rate: rank 1 has 0.002, and rank 0 has 0.001; start": {"learning_rate": 1e-3 + 1e-3 * rank},
        "data: rank 1 reads other rows than rank 0": {"data": rows[rank:]},
        "torch: rank 1 has 0.0, and rank 0 has ": {"version": "0.0"},
    }
    for said, given in cases.items():
        fields = {**SUPERVISED, **given}
        data, version, kept = fields.pop("data", rows), fields.pop("version", None), torch.__version__
        if version and rank == 1:
            torch.__version__ = version
        try:
            SFTTrainer(SFTConfig(**fields), model=tiny.llama(), tokenizer=tiny.tokenizer(), data=data)
        except UserError as error:
            assert said in str(error), str(error)
        else:
            raise AssertionError(said)
        finally:
            torch.__version__ = kept


def check_vocabulary(vocabulary: int, **fields: object) -> None:
    """Log-probs, entropies, a PPO loss and every gradient of a head split over the ranks are those of the whole one."""
    torch.manual_seed(5)
    n, width = 11, 16
    hidden, labels = torch.randn(n, width), torch.randint(0, vocabulary, (n,))
    weight, bias = torch.randn(vocabulary, width), torch.randn(vocabulary)
    old, advantages, mask = torch.randn(n) - 3.0, torch.randn(n), torch.arange(n) % 4 != 1
    shard = shard_vocabulary(weight, bias)
    rows = slice(shard.start, shard.start + len(shard.weight))
    whole = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    parts = [t.clone().requires_grad_() for t in (hidden, shard.weight, shard.bias)]
    split = shard._replace(weight=parts[1], bias=parts[2])
    ignored = labels.where(torch.arange(n) != 2, -100)
    three = {**fields, "workspace": 4 * 3 * max(1, len(shard.weight))}  # tokens at a time
    log_probs, entropy = vocabulary_parallel_log_probs(parts[0], split, ignored, **three)
    again, again_entropy = vocabulary_parallel_log_probs(parts[0], split, labels, **three)
    ours = ppo_policy_loss(again, old, advantages, mask).loss - 0.1 * again_entropy[mask].sum() / mask.sum()
    (ours + (log_probs * advantages + entropy).sum()).backward()
    kwargs = {"bias": whole[2], **fields}
    expected = linear_log_probs(whole[0], whole[1], ignored, return_entropy=True, **kwargs)
    theirs = linear_ppo_loss(*whole[:2], labels, old, advantages, mask, entropy_coef=0.1, **kwargs).loss
    (theirs + (expected[0] * advantages + expected[1]).sum()).backward()
    torch.testing.assert_close((log_probs, entropy, ours), (*expected, theirs), rtol=1e-5, atol=1e-5)
    grads = (parts[0].grad, parts[1].grad, parts[2].grad)
    torch.testing.assert_close(grads, (whole[0].grad, whole[1].grad[rows], whole[2].grad[rows]), rtol=1e-4, atol=1e-5)


def check_vocabularies() -> None:
    check_vocabulary(50, temperature=0.7)
    check_vocabulary(5, logit_softcap=3.0, logit_scale=0.5, temperature=torch.linspace(0.5, 2.0, 11))  # a rank has none


def check_non_finite(parallel: str) -> None:
    """NaN in one rank alone, whatever its rows: all ranks skip the update, and go on from the same weights."""
    rows = [{"prompt": r["prompt"], "response": r["chosen"]} for r in PAIRS]
    config = SFTConfig(**{**SUPERVISED, "eval_every": 0, "parallel": parallel})
    trainer = SFTTrainer(config, model=tiny.llama(), tokenizer=tiny.tokenizer(), data=rows)
    layer, before = trainer.model.base_model.layers[1].mlp, fingerprint(weights(trainer))
    broken = layer.register_forward_hook(lambda _, __, out: out * (math.nan if distributed.rank() == 1 else 1.0))
    steps = iter(trainer)
    next(steps)
    assert trainer.guard.updates_skipped == 1 and fingerprint(weights(trainer)) == before
    broken.remove()
    next(steps)
    assert trainer.guard.updates_skipped == 1 and fingerprint(weights(trainer)) != before
    steps.close()
    prints = distributed.gather(torch.tensor([fingerprint(weights(trainer))])).tolist()
    assert len(set(prints)) == 1


def lose_a_rank(parallel: str) -> None:
    """Rank 1 dies by SIGKILL in the forward pass of step 2; rank 0 must end with RankLost, exit code 3 here."""
    rows = [{"prompt": r["prompt"], "response": r["chosen"]} for r in PAIRS]
    config = SFTConfig(**{**SUPERVISED, "eval_every": 0, "parallel": parallel})
    trainer = SFTTrainer(config, model=tiny.llama(), tokenizer=tiny.tokenizer(), data=rows)

    def die(*_: object) -> None:
        if distributed.rank() == 1 and trainer.steps_done == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    trainer.model.base_model.layers[1].register_forward_pre_hook(die)
    try:
        trainer.train()
    except launch.RankLost:
        os._exit(3)


def command(place: Path, *arguments: str) -> None:
    """The command line's own run in a folder; what this rank says there, and its exit code, go to said-RANK."""
    os.chdir(place)
    with open(f"said-{os.environ['RANK']}", "w", encoding="utf-8") as said, contextlib.redirect_stderr(said):
        print("exit code", cli.main([*arguments]), file=said)
    # The first rank holds the store by which they agree who speaks. torchrun holds it until all ranks have ended.
    ended, files = time.monotonic() + 60, [Path(f"said-{rank}") for rank in range(int(os.environ["WORLD_SIZE"]))]
    while time.monotonic() < ended and not all(f.exists() and "exit code" in f.read_text("utf-8") for f in files):
        time.sleep(0.05)


def elastic(place: Path, nodes: int, restarts: int, *arguments: str, code: int) -> None:
    """The command line's own run in a folder by what torchrun calls, on two ranks of so many "machines", which meet at
    a port; each is to end with this exit code. The ranks are forked, as everywhere here."""
    port, context, began = free_port(), multiprocessing.get_context("fork"), time.time()
    machines = [context.Process(target=as_node, args=(place, nodes, restarts, port, arguments)) for _ in range(nodes)]
    for machine in machines:
        machine.start()
    for machine in machines:
        machine.join(120)
        if machine.is_alive():
            machine.terminate()  # its agent ends its rank
            machine.join()
    if [machine.exitcode for machine in machines] != [code] * nodes:
        sys.exit(f"{place.name}: the launchers ended with {[machine.exitcode for machine in machines]}")
    (place / "seconds").write_text(str(time.time() - began))


def as_node(place: Path, nodes: int, restarts: int, port: int, arguments: Sequence[str]) -> None:
    """torchrun --nnodes NODES --nproc-per-node 2/NODES --max-restarts RESTARTS --rdzv-endpoint 127.0.0.1:PORT"""
    config = LaunchConfig(
        min_nodes=nodes, max_nodes=nodes, nproc_per_node=2 // nodes, max_restarts=restarts, run_id="ranks",
        rdzv_backend="c10d", rdzv_endpoint=f"127.0.0.1:{port}", local_addr="127.0.0.1", start_method="fork",
    )  # fmt: skip
    try:
        elastic_launch(config, spoken)(place, *arguments)
    except ChildFailedError:
        sys.exit(1)


def spoken(place: Path, *arguments: str) -> None:
    """A rank of `elastic`; what it says is added to said-RANK."""
    os.chdir(place)
    with open(f"said-{os.environ['RANK']}", "a", encoding="utf-8") as said, contextlib.redirect_stderr(said):
        code = cli.main([*arguments])
    sys.exit(code)


def main(out: Path, forms: Iterable[str]) -> None:
    check_vocabularies()
    if distributed.size() == 2:  # of one process tests/test_resume.py says it
        check_resume(out)
        check_signal(out)
        check_shares(out, "zero")
        check_shares(out, "fsdp")
        rank_checks.check_layer_by_layer()
        rank_checks.check_balance()
        for parallel in ("zero", "fsdp"):
            rank_checks.check_that_no_rank_holds_a_whole_model_to_write_it(out, parallel)
        rank_checks.check_that_a_full_disk_stops_no_other_rank(out)
        rank_checks.check_exports_of_adapters(out)
        rank_checks.check_that_no_rank_reads_a_whole_model(out)
        check_same_run_is_asked_for()
        for parallel in ("ddp", "zero", "fsdp"):
            check_non_finite(parallel)
    for form in forms:
        before, after, steps = run(form, out)
        prints = distributed.gather(torch.tensor([fingerprint(after)])).tolist()
        assert len(set(prints)) == 1, f"{form}: the ranks' weights differ"
        if distributed.is_lead():
            (out / f"{form}.json").write_text(json.dumps(steps))
            save_file({n: after[n] - before[n] for n in after}, out / f"{form}.safetensors")


def run(form: str, out: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], list[dict]]:
    """Weights before and after, and what each step says. Two forms are run as where memory is short."""
    small = rank_checks.small_memory() if form in SMALL else contextlib.nullcontext()
    with small:
        trainer = build(form, out)
        if form in SMALL:  # nor do whole sums of gradients fit
            trainer.policy._sums_whole = False
        before, steps = weights(trainer), []
        for step in trainer:
            ids = step.rollout.response_ids if form.partition("+")[0] in FORMS else None
            steps.append({"ids": ids, "metrics": step.metrics})
    return before, weights(trainer), steps


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def fork(ranks: int, work: Callable[..., None], *arguments: object, codes: Sequence[int] = ()) -> None:
    """Do the work in so many ranks. Ends the process where one of them does not end with its exit code (0)."""
    port = free_port()
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=as_rank, args=(rank, ranks, port, work, *arguments)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60 if codes else None)
    if [process.exitcode for process in processes] != list(codes or [0] * ranks):
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
    # What a run imports where it needs it: here once, not in every rank.
    for needed in ("peft", "sklearn.feature_extraction.text", "sklearn.linear_model", "torch.distributed.fsdp"):
        importlib.import_module(needed)
    importlib.import_module("torch.utils.tensorboard")
    torch.set_num_threads(1)
    imported_for_forks()
    place = Path(sys.argv[1])
    for group in sys.argv[2:]:
        count, _, named = group.partition(":")
        (place / count).mkdir()
        fork(int(count), main, place / count, named.split(","))
    fork(2, command, place / "mistake", "ppo", "r.yaml", "reward=mine.py:broken")
    fork(2, command, place / "through", "ppo", "r.yaml", "reward=mine.py:kind", "parallel=fsdp")
    elastic(place / "killed", 2, 0, "ppo", "r.yaml", "reward=mine.py:killer", "parallel=zero", code=1)
    elastic(place / "restarted", 1, 1, "ppo", "r.yaml", "reward=mine.py:killer", "parallel=fsdp", code=0)
    fork(4, check_vocabularies)
    for parallel in ("zero", "fsdp"):
        fork(2, lose_a_rank, parallel, codes=(3, -signal.SIGKILL))
