"""The worst case before step 1: it is the largest there can be, it fails first, and nothing of it stays."""

from __future__ import annotations

import random
from functools import partial

import numpy
import pytest
import torch

from fastrlhf import PPOConfig, UserError
from fastrlhf.checkpoint.state import rng_tensors
from fastrlhf.rl.probe import longest, probe_wanted, run_probe
from tests import tiny
from tests.runs import copies, ppo_trainer, read, same
from tests.stage_runs import differing

FORMS = {
    "separate": {},
    "packed": {"packing": True},
    "shared trunk": {"critic": "shared_trunk"},
    "lora": {"lora": 4},
    "no critic": {"advantage": "rloo", "samples_per_prompt": 2},
    "ptx": {"ptx_coef": 0.5, "ptx_data": [{"text": t} for t in ("the cat", "thank you", "the moon", "yes", "no")]},
    "sequence ratio": {"ratio_level": "sequence", "loss_aggregation": "sequence_mean", "kl_in": "loss"},
}


def noisy(prompts: list[str], responses: list[str]) -> list[float]:
    """Draws from the global generators, as a user's function may."""
    return [len(r) + random.random() + float(numpy.random.rand()) + float(torch.rand(())) for r in responses]


trainer = partial(ppo_trainer, max_prompt_tokens=30, probe=True, dtype="fp32", reward=noisy)


@pytest.mark.parametrize("form", FORMS)
def test_a_run_has_the_same_bytes_with_and_without_it(tmp_path, form):
    runs = {}
    for probe in (True, False):
        folder = tmp_path / str(probe)
        runs[probe] = t = trainer(**FORMS[form], probe=probe, output_dir=str(folder))
        t.train()
    assert differing(runs[True], runs[False]) == []
    for name in ("metrics.jsonl", "events.jsonl", "samples.jsonl"):
        assert (tmp_path / "True" / name).read_bytes() == (tmp_path / "False" / name).read_bytes()
    lines = {probe: (tmp_path / str(probe) / "log.txt").read_text() for probe in (True, False)}
    assert "probe: an update on 4 sequences of 40 tokens fits (" in lines[True] and "probe" not in lines[False]


@pytest.mark.parametrize("form", FORMS)
def test_no_weight_no_moment_no_gradient_and_no_random_number_is_left(form):
    t = trainer(**FORMS[form])
    optimizers = t.learner.optimizers()
    before = copies(p for o in optimizers for p in o.masters)
    generators, modes = rng_tensors(), [module.training for module in t.policy.modules()]
    run_probe(t.learner, t.engine, joined=t.joined, note=lambda line: None)
    after = [p for o in optimizers for p in o.masters]
    assert same(before, after) and all(p.grad is None for p in t.policy.parameters())
    assert all(p.grad is None for p in after) and all(len(o.inner.state) == 0 for o in optimizers)
    assert all(torch.equal(generators[name], now) for name, now in rng_tensors().items())
    assert t.engine.cache is None and modes == [module.training for module in t.policy.modules()]
    assert t.learner.policy_updates == t.learner.critic_updates == 0


def test_the_pretraining_mix_is_part_of_the_update_and_none_of_its_rows_is_used_up(monkeypatch):
    t = trainer(**FORMS["ptx"])
    before, drawn, backward = t.learner.ptx.state(), [], t.learner.ptx.backward
    monkeypatch.setattr(t.learner.ptx, "backward", lambda *given: drawn.append(len(given[2])) or backward(*given))
    run_probe(t.learner, t.engine, joined=t.joined, note=lambda line: None)
    assert drawn == [t.config.mini_batch_size] and t.learner.ptx.state() == before


@pytest.mark.parametrize(
    ("tokens", "packing", "shape"),
    [(10_000, False, (4, 40)), (90, False, (2, 40)), (90, True, (1, 80)), (1, False, (1, 40)), (1, True, (1, 40))],
)
def test_it_is_the_largest_micro_batch_and_the_largest_rollout(tokens, packing, shape):
    """Rows of full length, as many as the budget and the mini-batch hold; the cache of a whole rollout."""
    t = trainer(micro_batch_tokens=tokens, packing=packing)
    t.engine.check(40)  # the run's prompts are shorter than those of the probe
    seen: dict[str, list] = {"policy": [], "critic": [], "cache": []}

    def watch(name: str):  # noqa: ANN202
        def hook(module, args, kwargs):
            if torch.is_grad_enabled():
                seen[name].append(tuple(kwargs["input_ids"].shape))

        return hook

    t.policy.base_model.register_forward_pre_hook(watch("policy"), with_kwargs=True)
    t.critic.trunk.base_model.register_forward_pre_hook(watch("critic"), with_kwargs=True)
    t.policy.base_model.register_forward_hook(
        lambda module, args, kwargs, output: seen["cache"].extend(
            (cache.slots, cache.positions, layer.keys.numel())
            for cache in [kwargs.get("cache", kwargs.get("past_key_values"))]
            for layer in ([] if cache is None else cache.layers[:1])
        ),
        with_kwargs=True,
    )
    run_probe(t.learner, t.engine, joined=t.joined, note=lambda line: None)
    assert seen["policy"] == seen["critic"] == [shape]
    assert seen["cache"] == [(8, 40, 8 * 40 * 2 * 8)]  # slots, positions; times 2 heads of 8
    assert t.memory.halvings == 0


def test_memory_that_runs_out_halves_the_budget_before_step_1(tmp_path):
    t = trainer(micro_batch_tokens=160, output_dir=str(tmp_path))
    rows = []

    def limited(module: object, args: object, kwargs: dict) -> None:
        if torch.is_grad_enabled():
            rows.append(len(kwargs["input_ids"]))
            if rows[-1] > 1:
                raise torch.OutOfMemoryError("no memory")

    t.critic.trunk.base_model.register_forward_pre_hook(limited, with_kwargs=True)
    steps = iter(t)
    assert rows == [4, 2, 1] and t.memory.tokens == 40
    events = [row for row in read(tmp_path / "events.jsonl") if row["kind"] == "out_of_memory"]
    assert [(row["step"], row["before"], row["after"]) for row in events] == [(0, 160, 80), (0, 80, 40)]
    assert "an update on 1 sequences of 40 tokens fits" in (tmp_path / "log.txt").read_text()
    steps.close()


def test_what_can_never_fit_ends_before_step_1():
    rolled = []
    t = trainer(reward=lambda prompts, responses: rolled.append(1) or noisy(prompts, responses))

    def never(module: object, args: object) -> None:
        if torch.is_grad_enabled():
            raise torch.OutOfMemoryError("no memory")

    t.policy.base_model.register_forward_pre_hook(never)
    with pytest.raises(UserError, match="after 5 halvings; cheapest first: gradient_checkpointing=true"):
        t.train()
    assert rolled == []


def test_lengths_stay_within_the_models_positions():
    assert longest(trainer().config, trainer().engine) == (30, 10)
    t = trainer(max_prompt_tokens=500)  # the model has 128
    assert longest(t.config, t.engine) == (118, 10)
    run_probe(t.learner, t.engine, joined=False, note=lambda line: None)
    t = trainer(policy=tiny.gpt2(), max_prompt_tokens=500, max_new_tokens=112)
    assert longest(t.config, t.engine) == (16, 112)
    turning = tiny.llama(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0,
                                          "original_max_position_embeddings": 64})  # fmt: skip
    t = trainer(policy=turning, max_prompt_tokens=500)
    assert longest(t.config, t.engine) == (54, 10)
    run_probe(t.learner, t.engine, joined=False, note=lambda line: None)


def test_auto_is_on_a_gpu_only():
    assert probe_wanted(PPOConfig(), torch.device("cuda")) and not probe_wanted(PPOConfig(), torch.device("cpu"))
    assert probe_wanted(PPOConfig(probe=True), torch.device("cpu")) and not probe_wanted(
        PPOConfig(probe=False), torch.device("cuda")
    )


def test_a_finished_run_is_not_probed_again(tmp_path):
    fields = {"total_steps": 1, "output_dir": str(tmp_path)}
    trainer(**fields).train()
    trainer(**fields, resume=True).train()
    assert (tmp_path / "log.txt").read_text().count("probe:") == 1
