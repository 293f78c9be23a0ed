"""Several ranks (gloo, on the CPU) against one process: the same tokens, the same losses, the same weights."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fastrlhf import cli
from fastrlhf.config.errors import UserError
from fastrlhf.parallel import mapped, sharding, zero
from fastrlhf.runtime import batching, distributed
from tests import rank_runs, tiny

ROOT = Path(__file__).parents[2]
FORMS = [*rank_runs.FORMS, "sft", "reward", "linear"]
ZERO = ["separate+zero", "lora+zero", "sft+zero", "reward+zero"]
FSDP = ["lora+fsdp", "shared_trunk+fsdp", "sft+fsdp"]
SHOWN = {  # 3 divides nothing
    1: FORMS,
    2: [*(form for form in FORMS if form != "tied"), *ZERO, *FSDP],
    3: ["extras", "reward", "shared_trunk+zero", "reward+fsdp", "tied+fsdp"],
}


APART = ("mistake", "through", "killed", "restarted")


def started(*command: str, cwd: Path = ROOT, timeout: float = 600) -> subprocess.CompletedProcess:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[int | str, Path]:
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "1").mkdir()
    rank_runs.main(folder / "1", SHOWN[1])
    for name in APART:
        tell(folder / name)
    groups = (f"{ranks}:{','.join(SHOWN[ranks])}" for ranks in (2, 3))
    done = started(sys.executable, "-m", "tests.rank_runs", str(folder), *groups)
    assert done.returncode == 0, done.stderr[-3000:]
    return {ranks: folder / str(ranks) for ranks in (1, 2, 3)} | {name: folder / name for name in APART}


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "form"), [(ranks, form) for ranks in (2, 3) for form in SHOWN[ranks]])
def test_ranks_give_what_one_process_gives(runs, form, ranks):
    """10 responses of 5 prompts in mini-batches of 5: neither divides by the ranks."""
    whole = form.partition("+")[0]
    one, many = (json.loads((runs[n] / f"{name}.json").read_text()) for n, name in ((1, whole), (ranks, form)))
    assert len(one) == len(many) == {"extras": 5, "tied": 3}.get(whole, 2)
    for a, b in zip(one, many, strict=True):
        assert a["ids"] == b["ids"]
        assert a["metrics"].keys() == b["metrics"].keys()
        for name, value in a["metrics"].items():
            if math.isnan(value):
                assert math.isnan(b["metrics"][name])
            else:
                assert b["metrics"][name] == pytest.approx(value, rel=1e-5, abs=5e-6), (
                    name
                )  # kl/ref: sums of differences
    moved, other = (load_file(runs[n] / f"{name}.safetensors") for n, name in ((1, whole), (ranks, form)))
    gap = math.sqrt(sum(float((moved[n] - other[n]).square().sum()) for n in moved))
    assert gap <= 1e-3 * math.sqrt(sum(float(t.square().sum()) for t in moved.values()))


@pytest.mark.parametrize("parallel", ["zero", "fsdp"])
def test_one_process_goes_on_from_what_shares_were_saved_as(runs, parallel):
    """Of two ranks: weights, masters and moments of the checkpoint come back whole, and are saved so."""
    left = runs[2] / f"{parallel}-left"
    trainer = rank_runs.noisy_run(left, resume=True, parallel="ddp", policy=tiny.llama().bfloat16())
    assert trainer.steps_done == 1
    for name, role in trainer.trained().items():
        saved = load_file(left / "checkpoints" / "step-000001" / f"optimizer_{name}.safetensors")
        back, _ = role.optimizer.checkpoint(name)
        assert back.keys() == saved.keys() and any(key.startswith("master.") for key in saved)
        assert all(torch.equal(back[key], saved[key]) for key in saved)
        for param, master in zip(role.optimizer.params, role.optimizer.masters, strict=True):
            assert torch.equal(param, master.to(param.dtype))
    trainer.train()


def test_shares_are_exported_as_one_model_of_their_dtype(runs):
    """Weights, names, class and dtype of the last checkpoint, which one process has read above."""
    exported, saved = runs[2] / "exported", runs[2] / "fsdp-resumed" / "checkpoints" / "step-000002" / "policy"
    model = AutoModelForCausalLM.from_pretrained(exported)
    assert type(model) is type(tiny.llama()) and model.dtype == torch.bfloat16
    assert json.loads((exported / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    weights, last = (load_file(folder / "model.safetensors") for folder in (exported, saved))
    assert weights.keys() == last.keys() and all(torch.equal(weights[name], last[name]) for name in last)


def test_a_model_that_cannot_be_sharded_is_refused_in_a_sentence():
    model = tiny.llama()
    with pytest.raises(UserError, match="a rank's share of LlamaForCausalLM takes .* use more GPUs, lora"):
        sharding._check_memory(model, mapped.layers_of(model), 1e5)
    sharding._check_memory(model, mapped.layers_of(model), 1e9)
    assert len(mapped.layers_of(model)) == model.config.num_hidden_layers
    model.model.norm.bfloat16()
    with pytest.raises(UserError, match="trained weights are bfloat16 and float32, which it cannot mix"):
        sharding.shard(model)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_every_element_is_one_rank_s(ranks, monkeypatch):
    monkeypatch.setattr(zero, "BUCKET_ELEMENTS", 50)
    sizes = [7, 1, 90, 3, 3, 49, 2, 64]
    dtypes = [torch.float32] * 3 + [torch.bfloat16] * 3 + [torch.float32] * 2
    seen = [[0] * size for size in sizes]
    for rank in range(ranks):
        for bucket in zero.buckets_of(sizes, dtypes, ranks, rank):
            assert len({dtypes[index] for index in bucket.parameters}) == 1
            total = sum(sizes[index] for index in bucket.parameters)
            assert total <= 50 or len(bucket.parameters) == 1
            assert bucket.part == -(-total // ranks)
            for piece in bucket.mine:
                begins = sum(sizes[index] for index in bucket.parameters if index < piece.parameter)
                assert rank * bucket.part + piece.at == begins + piece.start
                for element in range(piece.start, piece.stop):
                    seen[piece.parameter][element] += 1
    assert all(set(counts) == {1} for counts in seen)


KILLER = """
import os, signal
from pathlib import Path

def killer(prompts, responses):
    last = Path("run/checkpoints/step-000001").is_dir()
    if int(os.environ["RANK"]) == 1 and last and not Path("died").exists():
        Path("died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return [float(len(r)) for r in responses]

def kind(prompts, responses):
    return [float(len(r)) for r in responses]

def broken(prompts, responses):
    raise KeyError("no such answer")
"""
RECIPE = """policy: model
prompts: [the cat, thank you, the answer is, please]
output_dir: run
total_steps: 3
rollout_batch_size: 4
mini_batch_size: 4
max_new_tokens: 6
save_every: 1
eval_every: 0
"""


def tell(place: Path) -> None:
    """Write what `fastrlhf ppo r.yaml reward=mine.py:...` reads there."""
    tiny.llama().save_pretrained(place / "model")
    tiny.tokenizer().save_pretrained(place / "model")
    (place / "mine.py").write_text(KILLER)
    (place / "r.yaml").write_text(RECIPE)


def errors(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith("error: ")]


def test_a_killed_rank_ends_all_with_one_message_and_the_run_goes_on(runs, monkeypatch):
    """Two "machines" that meet through torchrun's rendezvous; SIGKILL in the middle of step 2 of the command line's own
    run; then one process resumes it (2 ranks -> 1)."""
    place = runs["killed"]
    assert float((place / "seconds").read_text()) < 60
    (error,) = errors("".join((place / f"said-{rank}").read_text(encoding="utf-8") for rank in range(2)))
    assert "another rank of this run is gone" in error and "fastrlhf resume" in error
    (place / "run" / "config.yaml").write_text((place / "run" / "config.yaml").read_text().replace("killer", "kind"))
    monkeypatch.chdir(place)
    assert cli.main(["resume", "run", "--accept-changed", "reward"]) == 0
    assert steps_of(place) == [1, 2, 3] and (place / "run" / "final" / "model.safetensors").exists()


def test_a_killed_rank_is_started_again_and_the_run_ends_as_one_that_nobody_killed(runs):
    """--max-restarts 1: the same command resumes. A second kill would be the end."""
    place = runs["restarted"]
    assert (place / "died").exists() and steps_of(place) == [1, 2, 3]
    assert len(errors((place / "said-0").read_text(encoding="utf-8"))) <= 1  # the agent may end rank 0 first
    for file in ("metrics.jsonl", "final/model.safetensors"):
        assert (place / "run" / file).read_bytes() == (runs["through"] / "run" / file).read_bytes()


def steps_of(place: Path) -> list[int]:
    return [json.loads(row)["step"] for row in (place / "run" / "metrics.jsonl").read_text().splitlines()]


def test_a_mistake_of_the_user_is_said_once(runs):
    said = [(runs["mistake"] / f"said-{rank}").read_text(encoding="utf-8") for rank in range(2)]
    assert all(text.endswith("exit code 2\n") for text in said)
    (error,) = errors("".join(said))
    assert "reward function broken, sample 0: raised KeyError" in error


@pytest.mark.parametrize("count", [0, 1, 2, 5, 7, 100])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_rows_are_shared_whole_and_evenly(count, ranks, monkeypatch):
    sizes = [1 + (i * i) % 11 for i in range(count)]
    pieces, rows, loads = [], [], []
    for rank in range(ranks):
        monkeypatch.setenv("WORLD_SIZE", str(ranks))
        monkeypatch.setenv("RANK", str(rank))
        pieces += range(count)[batching.shard(count)]
        mine = batching.assign_rows(sizes)
        rows += mine
        loads.append(sum(sizes[i] for i in mine))
    assert pieces == list(range(count)) and sorted(rows) == list(range(count))
    assert max(loads) - min(loads) <= max(sizes, default=0)


def test_one_process_needs_no_group():
    tensor = torch.arange(3.0)
    distributed.all_reduce_sum(tensor)
    assert torch.equal(tensor, torch.arange(3.0)) and distributed.gather(tensor) is tensor
    assert distributed.any_of(True) and not distributed.any_of(False) and not torch.distributed.is_initialized()
