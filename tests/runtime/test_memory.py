"""Memory runs out in the middle of a step: half the micro-batch, the same step again, the same bytes as if it had been
half from there on."""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from fastrlhf import PPOConfig, PPOTrainer, RewardConfig, SFTConfig, UserError
from fastrlhf.models import heads, loading
from fastrlhf.models.token_batch import TokenRows
from fastrlhf.rl.experience import Experience, MiniBatch
from fastrlhf.runtime import distributed
from fastrlhf.runtime.memory import MOST_HALVINGS, MemoryBackoff, ran_out, remedies, token_budget
from fastrlhf.runtime.optim import Optimizer
from tests import tiny
from tests.runs import PROMPTS, experience_of, leave_after, letters, read
from tests.stage_runs import build, differing, everything, unequal

CPU = torch.device("cpu")
BUDGET = 52  # tokens: 2 or 3 micro-batches a mini-batch


def unheard(kind: str, message: str, **fields: object) -> None:
    """A report that nobody reads."""


def trainer(reward: object = letters, **fields: object) -> PPOTrainer:
    base = {"total_steps": 2, "rollout_batch_size": 12, "mini_batch_size": 4, "max_new_tokens": 10, "eval_every": 0,
            "learning_rate": 1e-3, "critic_learning_rate": 1e-3, "micro_batch_tokens": BUDGET,
            "reward_scaling": "running_std"}  # fmt: skip
    cfg = PPOConfig(**{**base, **fields})
    return PPOTrainer(cfg, policy=tiny.llama(), tokenizer=tiny.tokenizer(), reward=reward, prompts=PROMPTS)


def run_out(model: torch.nn.Module, number: int, *, when: Callable[[], bool], backward: bool = False) -> list[int]:
    """Raise OutOfMemoryError once, in forward `number` (or its backward) of those for which when() holds -> the count
    of those forwards, in a list."""
    seen = []

    def fail(grad: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore lines")

    def hook(module: torch.nn.Module, args: object, output: object) -> None:
        if not when():
            return
        seen.append(1)
        if len(seen) == number + 1:
            if not backward:
                fail(output.last_hidden_state)
            output.last_hidden_state.register_hook(fail)

    model.register_forward_hook(hook)
    return seen


def training() -> bool:
    return torch.is_grad_enabled()


def reading() -> bool:
    """The policy in the experience phase; decoding runs in inference mode."""
    return not torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


# ------------------------------------------------------------------------------------------------------- in the update

PLACES = [(0, 0), (0, 1), (2, 1), (3, 0), (4, 1), (5, 0), (5, 1)]  # mini-batch, micro-batch
FORMS = {
    "policy alone": {"advantage": "rloo", "samples_per_prompt": 2, "critic_learning_rate": 0},
    "shared trunk": {"critic": "shared_trunk"},
    "lora, packed": {"lora": 4, "critic": "shared_trunk", "packing": True},
    "critic": {},  # memory runs out in the critic
    "rollout": {"old_log_probs": "rollout"},
}


class Planned(NamedTuple):
    """What the update of a form's first step reads; every trainer of the form makes the same."""

    rows: TokenRows
    experience: Experience
    mini_batches: list[MiniBatch]

    def update(self, t: PPOTrainer, first: int, end: int) -> dict[str, float]:
        return t.learner.update(self.rows, self.experience, [self.mini_batches[first:end]], 0)


@functools.cache
def built(form: str) -> PPOTrainer:
    return trainer(**FORMS[form])


def fresh(form: str) -> PPOTrainer:
    """A new trainer of a form that has done nothing; a copy is made in a tenth of the time."""
    return copy.deepcopy(built(form))


@functools.cache
def planned(form: str) -> Planned:
    t = fresh(form)
    rollout = t.rollout([t.prompts[i % len(t.prompts)] for i in range(12)], 1, purpose="rollout")
    experience, epochs, _ = experience_of(t, rollout)
    return Planned(rollout.rows, experience, [mini_batch for epoch in epochs for mini_batch in epoch])


@functools.cache
def begun(form: str, index: int) -> PPOTrainer:
    """A trainer before mini-batch `index`, to be copied."""
    t = fresh(form) if index == 0 else copy.deepcopy(begun(form, index - 1))
    if index > 0:
        planned(form).update(t, index - 1, index)
    return t


@functools.cache
def half_from(form: str, index: int) -> dict[str, torch.Tensor]:
    """The end of an update whose budget is half from mini-batch `index` on."""
    t = copy.deepcopy(begun(form, index))
    t.memory.halvings = 1
    if index < 6:
        planned(form).update(t, index, 6)
    return everything(t)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("form", ["policy alone", "shared trunk", "lora, packed", "critic"])
def test_an_update_cut_short_goes_on_with_the_bytes_of_half_the_budget(form, backward):
    """At several places: mini-batches before it as they were; it and all later ones as if they had been planned so."""
    plan = planned(form)
    groups = [plan.rows.micro_batches(mini_batch, BUDGET) for mini_batch in plan.mini_batches]
    assert len(groups) == 6 and all(len(g) > 1 for g in groups), "several micro-batches, to fail between"
    for i, j in PLACES[:: 3 if backward else 1 if form == "policy alone" else 2]:
        first = 0 if i == 5 else max(0, i - 1)  # the mini-batch before it is enough, or all
        t = copy.deepcopy(begun(form, first))
        model = t.critic.trunk if form == "critic" else t.policy
        run_out(model.base_model, sum(map(len, groups[first:i])) + j, when=training, backward=backward)
        plan.update(t, first, 6)
        assert t.memory.tokens == BUDGET // 2
        assert unequal(everything(t), half_from(form, i)) == [], (i, j)
    assert unequal(half_from(form, 6), half_from(form, 0)), "rounding must tell the two budgets apart"


def test_statistics_of_an_update_cut_short_are_counted_once():
    results = []
    for number in (None, 3):
        t = fresh("rollout")
        if number is not None:
            run_out(t.policy.base_model, number, when=training)
        results.append(planned("rollout").update(t, 0, 6))
        assert t.learner.policy_updates == t.learner.critic_updates == 6
    assert results[0] == pytest.approx(results[1], rel=1e-3, abs=1e-5)


# --------------------------------------------------------------------------------------------------- before the update


@pytest.fixture(scope="module")
def half(tmp_path_factory) -> tuple[PPOTrainer, Path]:
    """A run whose budget is half from the start."""
    folder = tmp_path_factory.mktemp("half")
    t = trainer(micro_batch_tokens=BUDGET // 2, ppo_epochs=1, output_dir=str(folder))
    t.train()
    return t, folder


@pytest.mark.parametrize(("who", "number"), [(w, n) for w in ("policy", "critic", "reference") for n in (0, 1, 4)])
def test_an_experience_cut_short_gives_the_run_of_half_the_budget(tmp_path, half, who, number):
    t = trainer(ppo_epochs=1, output_dir=str(tmp_path))
    model = {"policy": t.policy, "critic": t.critic.trunk, "reference": t.ref_policy}[who]
    run_out(model.base_model, number, when=(lambda: True) if who == "reference" else reading)
    t.train()
    assert differing(t, half[0]) == []
    assert read(tmp_path / "metrics.jsonl") == read(half[1] / "metrics.jsonl")
    (event,) = (row for row in read(tmp_path / "events.jsonl") if row["kind"] == "out_of_memory")
    assert (event["before"], event["after"]) == (52, 26)
    first_line = "CUDA out of memory. Tried to allocate 2.00 GiB."
    assert event["message"] == f"memory ran out with micro-batches of 52 tokens: again with 26 ({first_line})"


def test_scoring_cut_short_gives_the_run_of_half_the_budget():
    ends = []
    for budget, number in ((BUDGET // 2, None), (BUDGET, 2)):
        t = trainer(loading.scalar_model(tiny.llama(seed=3), tiny.tokenizer(), seed=1), micro_batch_tokens=budget)
        if number is not None:
            run_out(t.scorer.model.base_model, number, when=lambda: True)
        ends.append((t, [step.rollout.scores for step in t]))
        assert t.memory.tokens == BUDGET // 2
    assert ends[0][1] == ends[1][1] and differing(ends[0][0], ends[1][0]) == []


@pytest.mark.parametrize("stage", ["sft", "reward"])
@pytest.mark.parametrize("number", [0, 1])
def test_the_other_stages_go_on_with_the_bytes_of_half_the_budget(stage, number):
    ours, theirs = build(stage, micro_batch_tokens=60, eval_every=0), build(stage, micro_batch_tokens=30, eval_every=0)
    seen = run_out(ours.model.base_model, number, when=training)
    ours.train(), theirs.train()
    assert ours.memory.halvings == 1 and len(seen) > 4 and differing(ours, theirs) == []


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_an_evaluation_cut_short_is_done_again(stage):
    ours, plain = build(stage, micro_batch_tokens=30), build(stage, micro_batch_tokens=30)
    want = plain.evaluate()
    run_out(ours.model.base_model, 1, when=lambda: True)
    assert ours.evaluate() == pytest.approx(want, rel=1e-5) and ours.memory.tokens == 15


def test_a_resumed_run_has_the_same_micro_batches(tmp_path):
    """The halving is part of the checkpoint: otherwise the resumed run would round differently."""
    fields = {"total_steps": 3, "save_every": 1, "ppo_epochs": 1}
    through = trainer(**fields, output_dir=str(tmp_path / "through"))
    run_out(through.policy.base_model, 5, when=training)
    through.train()
    first = trainer(**fields, output_dir=str(tmp_path / "resumed"))
    run_out(first.policy.base_model, 5, when=training)
    leave_after(first, 1)
    again = trainer(**fields, output_dir=str(tmp_path / "resumed"), resume=True)
    assert again.steps_done == 1 and again.memory.tokens == BUDGET // 2
    again.train()
    assert differing(through, again) == []
    for name in ("metrics.jsonl", "events.jsonl"):
        assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "through" / name).read_bytes()


# ---------------------------------------------------------------------------------------- in an optimizer's first step

NO_MEMORY = "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"


class Momentum(torch.optim.Optimizer):
    """Updates parameter by parameter, as bitsandbytes does. Runs out of memory once, when parameter `number` gets its
    state, which is only half made then (None: never)."""

    def __init__(self, params: list[torch.nn.Parameter], number: int | None) -> None:
        super().__init__(params, {"lr": 0.0})
        self.number = number

    @torch.no_grad()
    def step(self) -> None:
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["step"] = 0
                if len(self.state) - 1 == self.number:
                    self.number = None
                    raise RuntimeError(NO_MEMORY)
                state["moment"] = torch.zeros_like(parameter)
            state["step"] += 1
            state["moment"].mul_(0.9).add_(parameter.grad)
            parameter.sub_(self.param_groups[0]["lr"] * state["moment"] / state["step"])


def before_all(optimizer: Optimizer, allocations: list[None]) -> None:
    """Memory runs out before anything is done."""
    tries = []

    def once(*_: object) -> None:
        tries.append(1)
        if len(tries) == 1:
            raise RuntimeError(NO_MEMORY)

    optimizer.inner.register_step_pre_hook(once)


def between_moments(optimizer: Optimizer, allocations: list[None]) -> None:
    """Memory runs out between the two moments of the third parameter: AdamW has made state, and updated nothing."""
    tries = []

    def arm(*_: object) -> None:
        tries.append(1)
        if len(tries) == 1:
            allocations.extend([None] * 6)

    optimizer.inner.register_step_pre_hook(arm)


def after_some(optimizer: Optimizer, allocations: list[None]) -> None:
    """Memory runs out when some parameters are updated already."""
    optimizer.inner.number = 3


@pytest.fixture
def allocations(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """As long as it has entries, torch.zeros_like takes one; the last one is an allocation that fails."""
    left, zeros_like = [], torch.zeros_like

    def make(*args: object, **kwargs: object) -> torch.Tensor:
        if left:
            left.pop()
            if not left:
                raise RuntimeError(NO_MEMORY)
        return zeros_like(*args, **kwargs)

    monkeypatch.setattr(torch, "zeros_like", make)
    return left


@pytest.mark.parametrize("failure", [before_all, between_moments, after_some])
@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_a_first_step_without_memory_keeps_its_gradients_and_updates_nothing_twice(stage, failure, allocations):
    """The end is that of a run whose budget was half from this very step on, and which never ran out."""
    ends = []
    for fail in (True, False):
        t = build(stage, micro_batch_tokens=60, eval_every=0, total_steps=2)
        optimizer = list(t.trained().values())[-1].optimizer  # of PPO the critic's: the policy steps after it
        if failure is after_some:
            optimizer.inner = Momentum(optimizer.masters, None)
        if fail:
            failure(optimizer, allocations)
        else:
            optimizer.inner.register_step_pre_hook(lambda *_, t=t: setattr(t.memory, "halvings", 1))
        metrics = t.train()
        assert t.memory.tokens == 30 and allocations == []
        ends.append((metrics, everything(t)))
    assert ends[0][0] == ends[1][0] and unequal(ends[0][1], ends[1][1]) == []


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_a_later_step_does_not_go_through_the_back_off(stage):
    """It allocates nothing: an error there is no reason for smaller micro-batches."""
    t, tries = build(stage, eval_every=0), []

    def fail_later(*_: object) -> None:
        tries.append(1)
        if len(tries) == 2:
            raise RuntimeError(NO_MEMORY)

    next(iter(t.trained().values())).optimizer.inner.register_step_pre_hook(fail_later)
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        t.train()
    assert len(tries) == 2 and t.memory.halvings == 0


# ------------------------------------------------------------------------------------------------------------ by itself


def test_after_five_halvings_the_cheapest_fixes_are_named(tmp_path):
    t = trainer(micro_batch_tokens=64, output_dir=str(tmp_path))
    before = [p.detach().clone() for p in t.policy.parameters()]

    def always(module: object, args: object, output: object) -> None:
        if training():
            raise torch.OutOfMemoryError("no memory")

    t.policy.base_model.register_forward_hook(always)
    with pytest.raises(UserError) as caught:
        t.train()
    assert str(caught.value) == (
        "micro_batch_tokens: memory ran out with 2 tokens too, after 5 halvings; cheapest first: "
        "gradient_checkpointing=true, offload=true, lora=16 (no memory)"
    )
    events = read(tmp_path / "events.jsonl")
    assert [row["after"] for row in events] == [32, 16, 8, 4, 2] and len(events) == MOST_HALVINGS
    assert all(map(torch.equal, before, t.policy.parameters())) and all(p.grad is None for p in t.policy.parameters())


def test_a_rank_of_fsdp_does_not_try_again_alone(monkeypatch):
    """The others would wait for it in the middle of a layer."""
    config = SFTConfig(parallel="fsdp", micro_batch_tokens=64)
    monkeypatch.setenv("WORLD_SIZE", "2")
    backoff = MemoryBackoff(config, CPU, unheard)

    def fails() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with pytest.raises(UserError, match="ran out with 64 tokens, and with parallel=fsdp no rank tries again alone"):
        backoff.attempt(fails)
    assert backoff.halvings == 0


def test_remedies_are_those_not_in_use():
    ppo = PPOConfig(gradient_checkpointing=True, offload=True)
    assert remedies(ppo)[:3] == ["lora=16", "critic=shared_trunk", "a smaller max_new_tokens"]
    small = PPOConfig(gradient_checkpointing=True, offload=True, lora=4, advantage="rloo", samples_per_prompt=2)
    assert remedies(small)[0] == "a smaller max_new_tokens"
    for cfg in (SFTConfig(), RewardConfig()):
        assert remedies(cfg)[:3] == ["gradient_checkpointing=true", "lora=16", "a smaller max_tokens"]


def test_random_numbers_are_drawn_again_and_memory_is_free_before_the_next_try():
    backoff, drawn, alive = MemoryBackoff(SFTConfig(micro_batch_tokens=7), CPU, unheard), [], []

    class Large:
        """Stands for activations that only the frames of the failed work hold."""

    def work() -> float:
        held = Large()
        alive.append(weakref.ref(held))
        drawn.append(float(torch.rand(())))
        if len(drawn) < 3:
            raise torch.OutOfMemoryError("no memory")
        return drawn[-1]

    freed = []
    assert backoff.attempt(work, undo=lambda: freed.append(alive[-1]() is None)) == drawn[0]
    assert drawn == [drawn[0]] * 3 and freed == [True, True]
    assert backoff.tokens == 1 and backoff.halvings == 2


def test_what_is_kept_for_speed_goes_before_the_budget_is_halved():
    backoff, kept = MemoryBackoff(SFTConfig(micro_batch_tokens=8), CPU, unheard), ["a cache"]
    backoff.spares.append(lambda: bool(kept) and bool(kept.pop()))
    tries = []

    def work() -> str:
        tries.append((backoff.tokens, len(kept)))
        if len(tries) < 3:
            raise torch.OutOfMemoryError("no memory")
        return "done"

    assert backoff.attempt(work) == "done" and tries == [(8, 1), (8, 0), (4, 0)]


def test_the_real_allocator_is_understood():
    backoff, tries = MemoryBackoff(SFTConfig(), CPU, unheard), []

    def work() -> str:
        tries.append(backoff.tokens)
        if len(tries) == 1:
            torch.empty(1 << 55, dtype=torch.uint8)
        return "done"

    assert backoff.attempt(work) == "done" and tries == [8192, 4096]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("anything"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_only_memory_is_tried_again(error, expected):
    assert ran_out(error) is expected
    backoff, calls = MemoryBackoff(SFTConfig(), CPU, unheard), []

    def work() -> None:
        calls.append(1)
        if len(calls) == 1:
            raise error

    if expected:
        backoff.attempt(work)
        assert len(calls) == 2
    else:
        with pytest.raises(RuntimeError, match="illegal|mat1"):
            backoff.attempt(work)
        assert len(calls) == 1 and backoff.halvings == 0


def test_token_budget():
    assert token_budget(77, torch.device("cpu")) == 77
    assert token_budget(None, torch.device("cpu")) == token_budget(None, torch.device("mps")) == 8192
    assert token_budget(None, torch.device("cuda")) == 16384


def test_the_workspace_of_a_run_is_the_least_of_all_ranks_and_stays(monkeypatch):
    monkeypatch.setattr(heads, "default_workspace", lambda device: 7 << 20)
    assert heads.agreed_workspace(CPU) == 7 << 20
    sent = []
    monkeypatch.setattr(
        distributed, "gather", lambda own: sent.append(own) or torch.tensor([9 << 20, 5 << 20, 7 << 20])
    )
    assert heads.agreed_workspace(CPU) == 5 << 20 and sent[0].tolist() == [7 << 20]
    backoff = MemoryBackoff(SFTConfig(), CPU, unheard)
    assert backoff.workspace is None  # where no run is: what suits the device
    backoff.begin(5 << 20)
    saved = backoff.state()
    resumed = MemoryBackoff(SFTConfig(), CPU, unheard)
    resumed.begin(1 << 30)
    resumed.load_state(saved)
    assert saved == {"halvings": 0, "workspace": 5 << 20, "chosen": None} and resumed.workspace == 5 << 20
    resumed.load_state({"halvings": 1})  # of a checkpoint from before there was one
    assert resumed.workspace == 5 << 20 and resumed.halvings == 1
    for wrong in (0, -1, 2.5, "1GiB", True):
        with pytest.raises(ValueError, match="a workspace of"):
            resumed.load_state({"halvings": 0, "workspace": wrong})


def test_micro_batches_that_a_plan_chose_are_those_of_the_resumed_run_too():
    began, asked = MemoryBackoff(SFTConfig(), CPU, unheard), []
    began.choose(lambda: 640)
    assert began.tokens == 640
    resumed = MemoryBackoff(SFTConfig(), CPU, unheard)
    resumed.load_state(began.state())
    resumed.choose(lambda: asked.append(1) or 7)
    assert resumed.tokens == 640 and not asked
    stated = MemoryBackoff(SFTConfig(micro_batch_tokens=99), CPU, unheard)
    stated.load_state(began.state())
    stated.choose(lambda: asked.append(1) or 7)
    assert stated.tokens == 99 and not asked
    unknown = MemoryBackoff(SFTConfig(), CPU, unheard)
    unknown.load_state({"halvings": 0, "workspace": 1})  # of a checkpoint from before there was one
    unknown.choose(lambda: None)
    assert unknown.tokens == token_budget(None, CPU)
    with pytest.raises(ValueError, match="micro-batches of '9' tokens"):
        resumed.load_state({"halvings": 0, "chosen": "9"})
