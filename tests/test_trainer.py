"""What every stage shares: how a trainer is built, its run folder and its loop; what is resumed, saved and said."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import fastrlhf
from fastrlhf import PPOConfig, PPOTrainer, SFTConfig, SFTTrainer, UserError
from fastrlhf.checkpoint.atomic import CheckpointError
from fastrlhf.checkpoint.run_folder import read_run_json, write_run_json
from fastrlhf.config.recipe import load_recipe
from fastrlhf.runtime.guards import Interrupted
from fastrlhf.trainer import EXIT_INTERRUPTED, run_stage
from tests import tiny
from tests.runs import PROMPTS, leave_after, read
from tests.stage_runs import COMMON, PAIRS, STAGES, Trainer, build, differing

resource = pytest.importorskip("resource")


# --------------------------------------------------------------------------------------------------- what describes it


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A model folder and a data file, as the command line names them."""
    root = tmp_path_factory.mktemp("base")
    tiny.llama().save_pretrained(root / "model")
    tiny.tokenizer().save_pretrained(root / "model")
    rows = [{"prompt": r["prompt"], "response": r["chosen"]} for r in PAIRS]
    (root / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return root


def test_run_json_and_config_yaml_of_a_run_by_name(tmp_path, base):
    """config.yaml starts the same run again, in another folder."""
    inputs = {"model": str(base / "model"), "data": str(base / "rows.jsonl")}
    (tmp_path / "empty").mkdir()
    cfg = SFTConfig(**COMMON, output_dir=str(tmp_path / "empty"), resume=True, seed=7)
    SFTTrainer(cfg, **inputs)
    run = read_run_json(tmp_path / "empty")
    assert (run["verb"], run["inputs"], run["from_python"], run["seed"]) == ("sft", inputs, [], 7)
    assert run["versions"]["fastrlhf"] == fastrlhf.__version__
    assert run["versions"] | {"torch": torch.__version__, "transformers": transformers.__version__} == run["versions"]
    found, again = load_recipe("sft", str(tmp_path / "empty" / "config.yaml"), [f"output_dir={tmp_path / 'next'}"])
    assert found == inputs and again == cfg.replace(resume=False, output_dir=str(tmp_path / "next"))
    SFTTrainer(again, **found)


def test_an_overwriting_run_does_not_pass_that_on(tmp_path, base):
    cfg = SFTConfig(**COMMON, output_dir=str(tmp_path), overwrite=True)
    SFTTrainer(cfg, model=str(base / "model"), data=str(base / "rows.jsonl"))
    assert not load_recipe("sft", str(tmp_path / "config.yaml"), [])[1].overwrite


def test_objects_are_described_and_only_python_can_resume_them(tmp_path):
    build("ppo", output_dir=str(tmp_path / "run"))
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["from_python"] == ["policy", "reward", "tokenizer"]  # short lists of rows are part of the recipe
    assert run["inputs"]["reward"] == "<letters>" and run["inputs"]["policy"] == "<loaded LlamaForCausalLM>"
    assert "reward: <letters>" in (tmp_path / "run" / "config.yaml").read_text()
    with pytest.raises(UserError, match="started from Python with objects for policy, reward, .*resume=True"):
        read_run_json(tmp_path / "run")


ONE_SENTENCE = "fastrlhf.recipes.rewards:one_short_sentence"


@pytest.mark.parametrize(("count", "named"), [(3, []), (3000, ["prompts"])])
def test_a_short_list_is_part_of_the_recipe_and_a_long_one_is_data(tmp_path, base, count, named):
    prompts, config = ["the cat"] * count, PPOConfig(total_steps=1, max_new_tokens=8, output_dir=str(tmp_path / "run"))
    policy = str(base / "model")
    PPOTrainer(config, policy=policy, reward=[["a", 1.0, ONE_SENTENCE]], prompts=prompts)
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["from_python"] == named and run["inputs"]["reward"] == [["a", 1.0, ONE_SENTENCE]]
    inputs, _ = load_recipe("ppo", str(tmp_path / "run" / "config.yaml"), [])
    assert inputs["prompts"] == (prompts if count == 3 else "<list>")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "is no run folder: it has no run.json"),
        ('{"verb": "sf', "run.json: damaged"),
        ("[]", "run.json: not written by a run"),
    ],
)
def test_a_folder_that_is_no_run(tmp_path, text, message):
    if text is not None:
        (tmp_path / "run.json").write_text(text)
    with pytest.raises(UserError, match=message):
        read_run_json(tmp_path)


def test_write_run_json_makes_the_folder(tmp_path):
    write_run_json(tmp_path / "a" / "b", verb="quickstart", seed=3)
    assert read_run_json(tmp_path / "a" / "b")["seed"] == 3
    assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == ["run.json"]


# -------------------------------------------------------------------------------------------------------- construction

ALL_STAGES = pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
MODEL = {"sft": "model", "reward": "model", "ppo": "policy"}


class Witness:
    """A part that remembers what its trainer had when its state came back."""

    def __init__(self, t: Trainer) -> None:
        self.trainer, self.seen = t, []

    def state(self) -> int:
        return self.trainer.steps_done

    def load_state(self, state: int) -> None:
        self.seen.append((state, self.trainer.made_last))


def extended(stage: str) -> type[Trainer]:
    """A trainer with one more part and an attribute that its constructor makes last."""
    base = STAGES[stage][1]

    class Extended(base):
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **kwargs)
            self.witness = Witness(self)
            self.tracker.event("early", "said before the run folder is taken")
            self.made_last = "made last"

        def parts(self) -> dict:
            return {**super().parts(), "witness": self.witness}

    return Extended


@ALL_STAGES
def test_a_trainer_is_restored_when_its_constructor_is_done(stage, tmp_path):
    """A subclass's too: its parts find everything that it makes."""
    kind = extended(stage)
    first = build(stage, kind=kind, output_dir=str(tmp_path / "run"))
    leave_after(first, 2)
    resumed = build(stage, kind=kind, output_dir=str(tmp_path / "run"), resume=True)
    assert resumed.steps_done == 2 and resumed.witness.seen == [(2, "made last")] and first.witness.seen == []


def test_what_happens_before_the_folder_is_taken_is_written_down_too(tmp_path):
    t = build("sft", kind=extended("sft"), output_dir=str(tmp_path / "run"))
    t.tracker.close()
    assert [(e["kind"], e["step"]) for e in read(tmp_path / "run" / "events.jsonl")] == [("early", 0)]
    lines = (tmp_path / "run" / "log.txt").read_text().splitlines()
    assert "rows read" in lines[0] and lines[-1].endswith("early: said before the run folder is taken")


class Failing(SFTTrainer):
    """Fails in the last line of its constructor."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        raise UserError("not this time")


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@ALL_STAGES
def test_a_constructor_that_fails_makes_no_folder(stage, tmp_path):
    with pytest.raises(UserError, match="/no/such/model"):
        build(stage, inputs={MODEL[stage]: "/no/such/model"}, output_dir=str(tmp_path / "run"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "failure", [{"kind": Failing}, {"inputs": {"model": "/no/such/model"}}], ids=["late", "missing model"]
)
def test_a_constructor_that_fails_removes_nothing_of_the_run_it_would_overwrite(failure, tmp_path):
    build("sft", output_dir=str(tmp_path / "run"), total_steps=2).train()
    before = files_of(tmp_path)
    assert len(before) > 10
    with pytest.raises(UserError, match="not this time|/no/such/model"):
        build("sft", **failure, output_dir=str(tmp_path / "run"), overwrite=True)
    assert files_of(tmp_path) == before


@ALL_STAGES
def test_a_folder_in_use_is_refused_before_a_model_is_loaded(stage, tmp_path):
    """The model is not there either, which nobody finds out."""
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="output_dir: .* is not empty"):
        build(stage, inputs={MODEL[stage]: "/no/such/model"}, output_dir=str(tmp_path))


# -------------------------------------------------------------------------------------------------------------- resume


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Callable[[str], tuple[Path, Trainer]]:
    """Runs that nothing interrupted, by stage."""
    done: dict[str, tuple[Path, Trainer]] = {}

    def run(stage: str) -> tuple[Path, Trainer]:
        if stage not in done:
            folder = tmp_path_factory.mktemp(stage) / "run"
            done[stage] = folder, build(stage, output_dir=str(folder))
            done[stage][1].train()
        return done[stage]

    return run


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
@pytest.mark.parametrize("left_after", [1, 2, 3])
def test_a_resumed_run_ends_as_the_uninterrupted_one(stage, left_after, tmp_path, whole):
    """Left before the first checkpoint, on one, and behind one: weights, optimizer, metrics and best/ to the bit."""
    folder, uninterrupted = whole(stage)
    run = tmp_path / "run"
    leave_after(build(stage, output_dir=str(run)), left_after)
    resumed = build(stage, output_dir=str(run), resume=True)
    assert resumed.steps_done == left_after // 2 * 2
    resumed.train()
    assert resumed.steps_done == 4 and differing(resumed, uninterrupted) == []
    assert resumed.best == uninterrupted.best is not None
    for name in ("metrics.jsonl", "events.jsonl", "samples.jsonl", "best/model.safetensors"):
        assert (run / name).read_bytes() == (folder / name).read_bytes(), name
    assert resumed.train() == {}  # nothing is left to do


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        ("sft", {"learning_rate": 2e-3}, "learning_rate: this run was started with 0.001 and would resume with 0.002"),
        ("sft", {"seed": 1}, "seed: this run was started with 0 and would resume with 1"),
        ("reward", {"head_only": True}, "head_only: this run was started with False and would resume with True"),
        ("ppo", {"kl_coef": 0.1}, "kl_coef: this run was started with 0.05 and would resume with 0.1; resume with the"),
    ],
)
def test_a_changed_field_is_named(stage, changes, message, tmp_path):
    leave_after(build(stage, output_dir=str(tmp_path)), 2)
    before = (tmp_path / "config.yaml").read_text()
    with pytest.raises(UserError, match=message):
        build(stage, output_dir=str(tmp_path), resume=True, **changes)
    assert (tmp_path / "config.yaml").read_text() == before


def test_a_run_may_be_made_longer_and_remembers(tmp_path):
    """With a constant learning rate, 2 steps and 2 more are 4."""
    build("sft", output_dir=str(tmp_path / "run"), total_steps=2, lr_schedule="constant").train()
    longer = build("sft", output_dir=str(tmp_path / "run"), lr_schedule="constant", save_every=1, resume=True)
    assert longer.steps_done == 2 and len(list(longer)) == 2
    at_once = build("sft", lr_schedule="constant")
    at_once.train()
    assert differing(longer, at_once) == []
    recipe = (tmp_path / "run" / "config.yaml").read_text()
    assert "total_steps: 4" in recipe and "save_every: 1" in recipe and "resume: false" in recipe


def test_other_data_is_refused(tmp_path):
    leave_after(build("sft", output_dir=str(tmp_path)), 2)
    rows = [{"prompt": "the cat", "response": " sat"}] * 3
    cfg = SFTConfig(**COMMON, output_dir=str(tmp_path), resume=True)
    with pytest.raises(UserError, match="^data: what was given is not .*; eval_data: this run was started with and"):
        SFTTrainer(cfg, model=tiny.llama(), tokenizer=tiny.tokenizer(), data=rows)


# ------------------------------------------------------------------------------------------------- signals and failures


def signalled(t: Trainer, at: int, number: int = signal.SIGTERM) -> Trainer:
    """Send a signal to this process, once, in the middle of the update of step `at`."""
    sent: list[int] = []

    def send(*_: object) -> None:
        if not sent and t.steps_done == at - 1:
            sent.append(number)
            os.kill(os.getpid(), number)

    next(iter(t.trained().values())).optimizer.inner.register_step_pre_hook(send)
    return t


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_ends_the_step_saves_and_interrupts(number, tmp_path):
    handler = signal.getsignal(number)
    run, seen = tmp_path / "run", []
    t = signalled(build("sft", output_dir=str(run), save_every=0), 1, number)
    name = signal.Signals(number).name
    with pytest.raises(Interrupted, match=rf"stopped by {name} after step 1 of 4; go on with: fastrlhf resume {run}"):
        seen.extend(t)
    assert len(seen) == 1 and [p.name for p in (run / "checkpoints").iterdir()] == ["step-000001"]
    assert signal.getsignal(number) is handler
    assert build("sft", output_dir=str(run), save_every=0, resume=True).steps_done == 1


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_an_interrupted_and_resumed_run_is_the_uninterrupted_one(stage, tmp_path, whole):
    folder, uninterrupted = whole(stage)
    with pytest.raises(Interrupted):
        signalled(build(stage, output_dir=str(tmp_path / "run")), 3).train()
    resumed = build(stage, output_dir=str(tmp_path / "run"), resume=True)
    assert resumed.steps_done == 3
    resumed.train()
    assert differing(resumed, uninterrupted) == []
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (folder / "metrics.jsonl").read_bytes()


class Lost(Exception):
    """What a reward function may raise."""


def leaves_once(t: Trainer, at: int, how: object, *, evaluating: bool = False) -> Trainer:
    """Leave the work of step `at` (or the evaluation after it) once, before any update: by an exception or a signal."""
    real = t.rollout if isinstance(t, PPOTrainer) else t.accumulate
    left = []

    def work(*args: object, **kwargs: object) -> object:
        if not left and t.steps_done == at - (not evaluating) and (kwargs.get("purpose") == "eval") == evaluating:
            left.append(random.random() + float(torch.rand(())))  # draws that must be undone
            if isinstance(how, BaseException):
                raise how
            os.kill(os.getpid(), how)
            pytest.fail("not at once")
        return real(*args, **kwargs)

    setattr(t, "rollout" if isinstance(t, PPOTrainer) else "accumulate", work)
    return t


STOPS = [signal.SIGTERM, signal.SIGHUP, signal.SIGINT]
WAYS = [Lost("reward"), UserError("reward"), torch.OutOfMemoryError("rollout"), SystemExit(0), *STOPS]


@pytest.mark.parametrize("how", WAYS, ids=str)
@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_whatever_ends_a_step_before_its_update_has_the_last_step_saved(stage, how, tmp_path, whole):
    """Byte for byte: step 4 is made anew, by another process or by the same trainer."""
    if stage == "sft" and isinstance(how, torch.OutOfMemoryError):
        pytest.skip("the policy for memory makes it again from smaller pieces")
    folder, uninterrupted = whole(stage)
    t = leaves_once(build(stage, output_dir=str(tmp_path / "run")), 4, how)
    with pytest.raises(type(how) if isinstance(how, BaseException) else Interrupted):
        t.train()
    assert t.steps_done == 3 and (tmp_path / "run" / "checkpoints" / "step-000003").is_dir()
    random.seed(7), torch.manual_seed(7)
    resumed = build(stage, output_dir=str(tmp_path / "run"), resume=True)
    assert resumed.steps_done == 3
    resumed.train()
    t.train()
    for run in (resumed, t):
        assert differing(run, uninterrupted) == []
    checkpoint = Path("checkpoints", "step-000004", "rng.safetensors")
    assert (tmp_path / "run" / checkpoint).read_bytes() == (folder / checkpoint).read_bytes()


@pytest.mark.parametrize("at", [2, 4])
def test_an_evaluation_that_is_stopped_is_made_when_the_run_goes_on(at, tmp_path, whole):
    """The row of its step is written then, the last step's too."""
    folder, uninterrupted = whole("ppo")
    t = leaves_once(build("ppo", output_dir=str(tmp_path / "run")), at, signal.SIGTERM, evaluating=True)
    with pytest.raises(Interrupted, match=f"after step {at} of 4"):
        t.train()
    assert read(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == at - 1
    resumed = build("ppo", output_dir=str(tmp_path / "run"), resume=True)
    assert resumed.steps_done == at
    resumed.train()
    assert differing(resumed, uninterrupted) == [] and resumed.best == uninterrupted.best
    for name in ("metrics.jsonl", "samples.jsonl", "best/model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (folder / name).read_bytes(), name


def test_an_exception_in_the_middle_of_an_update_saves_nothing(tmp_path):
    t = build("sft", output_dir=str(tmp_path / "run"), save_every=0)
    optimizer = next(iter(t.trained().values())).optimizer

    def fail(*_: object) -> None:
        if t.steps_done == 1:
            raise Lost

    optimizer.inner.register_step_post_hook(fail)
    with pytest.raises(Lost):
        t.train()
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_the_first_signal_says_what_is_waited_for(tmp_path, capfd):
    with pytest.raises(Interrupted):
        signalled(build("sft", output_dir=str(tmp_path / "run")), 1, signal.SIGINT).train()
    said = "SIGINT: waiting for the end of the step, then writing a checkpoint; once more ends at once"
    assert said in capfd.readouterr().err
    with pytest.raises(Interrupted):
        leaves_once(build("sft"), 1, signal.SIGINT).train()
    assert "SIGINT: stopping now, without the step that was begun; once more" in capfd.readouterr().err


def test_a_signal_in_the_last_step_lets_the_run_finish(tmp_path):
    t = signalled(build("sft", output_dir=str(tmp_path / "run"), total_steps=2), 2)
    assert t.train()["loss/train"] > 0 and t.steps_done == 2


def test_a_signal_without_a_folder_stops_too():
    with pytest.raises(Interrupted, match="stopped by SIGTERM after step 1 of 4$"):
        signalled(build("sft"), 1).train()


def from_files(base: Path, hook: Callable[[Trainer], object]) -> Callable[..., Trainer]:
    """What run_stage builds: a trainer from a model folder, with something done to it first."""

    def made(config: SFTConfig, **inputs: object) -> SFTTrainer:
        t = SFTTrainer(config, **inputs)
        hook(t)
        return t

    return made


def test_the_exit_code_of_an_interrupted_stage_is_75(tmp_path, base, capsys):
    inputs = {"model": str(base / "model"), "data": str(base / "rows.jsonl")}
    cfg = SFTConfig(**COMMON, output_dir=str(tmp_path / "run"))
    assert run_stage(from_files(base, lambda t: signalled(t, 1)), inputs, cfg) == EXIT_INTERRUPTED == 75
    assert "stopped by SIGTERM after step 1 of 4" in capsys.readouterr().out
    assert not (tmp_path / "run" / "final").exists()
    assert run_stage(SFTTrainer, inputs, cfg.replace(resume=True)) == 0
    assert f"done: {tmp_path / 'run' / 'final'}" in capsys.readouterr().out
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final").config.vocab_size == 320
    assert [row["step"] for row in read(tmp_path / "run" / "metrics.jsonl")] == [0, 1, 2, 3, 4]


def test_run_stage_needs_an_output_dir(base):
    with pytest.raises(UserError, match="output_dir: name the run folder"):
        run_stage(SFTTrainer, {"model": str(base / "model"), "data": str(base / "rows.jsonl")}, SFTConfig())


class FullDisk:
    """While active no file of this process may grow beyond `limit` bytes: weights fail, JSON lines go on."""

    def __init__(self, limit: int = 30_000) -> None:
        self.limit = limit

    def __enter__(self) -> None:
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, self.before[1]))

    def __exit__(self, *_: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


def test_a_checkpoint_that_fails_does_not_stop_training(tmp_path, whole):
    """The second one is written again; the numbers of the run are those of a run on a sound disk."""
    folder, uninterrupted = whole("sft")
    t = build("sft", output_dir=str(tmp_path / "run"))
    steps = iter(t)
    next(steps)
    with FullDisk():
        next(steps)  # step 2: evaluation exports best/, then the checkpoint is due
    assert not (tmp_path / "run" / "best").exists() and list((tmp_path / "run" / "checkpoints").iterdir()) == []
    list(steps)
    events = [e for e in read(tmp_path / "run" / "events.jsonl") if e["kind"] == "checkpoint"]
    assert ["best" in e["message"] for e in events] == [True, False]
    assert "step-000002 was not written" in events[1]["message"] and "training can go on" in events[1]["message"]
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000004"]
    assert differing(t, uninterrupted) == []
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (folder / "metrics.jsonl").read_bytes()


def test_the_third_failed_checkpoint_in_a_row_stops_the_run(tmp_path):
    t = build("sft", output_dir=str(tmp_path / "run"), save_every=1, eval_every=0)
    done = []
    with FullDisk(), pytest.raises(CheckpointError, match="the third failure in a row"):
        done.extend(t)
    assert t.steps_done == 3 and len(read(tmp_path / "run" / "metrics.jsonl")) == 3


def test_lines_that_a_full_disk_did_not_take_are_written_whole_when_there_is_room(tmp_path, whole, capsys):
    """What happened meanwhile is said on the console; the files are those of a run on a sound disk."""
    folder, _ = whole("sft")
    t = build("sft", output_dir=str(tmp_path / "run"))
    steps = iter(t)
    next(steps)
    sizes = [(tmp_path / "run" / name).stat().st_size for name in ("metrics.jsonl", "events.jsonl")]
    with FullDisk(sizes[0] + 10):  # a part of a line has room
        t.tracker.event("alarm", "seen while the disk was full" + "." * sizes[0])
        next(steps)
        assert (tmp_path / "run" / "metrics.jsonl").stat().st_size == sizes[0]
        assert (tmp_path / "run" / "events.jsonl").stat().st_size == sizes[1]
    said = capsys.readouterr().out
    assert "seen while the disk was full" in said and said.count("metrics.jsonl: not written (File too large)") == 1
    list(steps)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (folder / "metrics.jsonl").read_bytes()
    assert [e["kind"] for e in read(tmp_path / "run" / "events.jsonl")][0] == "alarm"


def test_a_line_torn_before_the_checkpoint_ends_nothing(tmp_path, capsys):
    t = build("sft", output_dir=str(tmp_path / "run"), save_every=1)
    steps = iter(t)
    next(steps)
    with open(tmp_path / "run" / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 2, "lo')
    leave_after(t, 1)
    again = build("sft", output_dir=str(tmp_path / "run"), save_every=1, resume=True)
    assert "skipped a damaged line" in capsys.readouterr().out
    again.train()
    assert [
        json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-2:]
    ] == [
        3,
        4,
    ]


@pytest.mark.parametrize(("sound", "code"), [(1, EXIT_INTERRUPTED), (0, None)])
def test_three_failed_saves_end_with_75_where_there_is_a_checkpoint(sound, code, tmp_path, base, capsys):
    """Else with an error of the user's, which the command line ends with 2."""
    inputs = {"model": str(base / "model"), "data": str(base / "rows.jsonl")}
    cfg = SFTConfig(**{**COMMON, "total_steps": 9, "save_every": 1, "eval_every": 0}, output_dir=str(tmp_path / "run"))
    full = FullDisk()

    def fill(t: Trainer) -> None:
        optimizer = next(iter(t.trained().values())).optimizer
        optimizer.inner.register_step_pre_hook(lambda *_: full.__enter__() if t.steps_done == sound else None)

    try:
        if code is None:
            with pytest.raises(UserError, match="was not written .* the third failure in a row"):
                run_stage(from_files(base, fill), inputs, cfg)
        else:
            assert run_stage(from_files(base, fill), inputs, cfg) == code
    finally:
        full.__exit__()
    said = capsys.readouterr().out
    assert (f"make room and go on with: fastrlhf resume {tmp_path / 'run'}" in said) == (code is not None)


# ----------------------------------------------------------------------------------------------- metrics, best, exports


def test_the_files_of_a_run(whole):
    folder, _ = whole("ppo")
    names = {p.name for p in folder.iterdir()}
    assert names == {
        "config.yaml", "run.json", "metrics.jsonl", "timings.jsonl", "events.jsonl", "samples.jsonl", "log.txt",
        "tensorboard", "checkpoints", "best",
    }  # fmt: skip
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step-000002", "step-000004"]
    rows = read(folder / "metrics.jsonl")
    assert [r["step"] for r in rows] == [0, 1, 2, 3, 4]
    assert [r["step"] for r in rows if "reward/eval" in r] == [0, 2, 4]
    assert not any(name.startswith(("time/", "perf/", "mem/")) for r in rows for name in r)
    assert all("time/update" in r for r in read(folder / "timings.jsonl")[1:5])


def test_evaluation_and_checkpoints_keep_their_own_pace(tmp_path):
    t = build("sft", output_dir=str(tmp_path / "run"), total_steps=5, eval_every=3, save_every=4)
    evaluated = [t.steps_done for step in t if "loss/eval" in step.metrics]
    assert evaluated == [3, 5]
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-000004", "step-000005"]


def test_save_every_0_saves_at_the_end_and_eval_every_0_never_evaluates(tmp_path):
    t = build("sft", output_dir=str(tmp_path / "run"), save_every=0, eval_every=0)
    assert all("loss/eval" not in step.metrics for step in t)
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000004"]
    assert [r["step"] for r in read(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4]
    assert not (tmp_path / "run" / "best").exists()


def test_a_first_evaluation_that_measured_nothing_is_not_the_best(tmp_path):
    """A reward that can judge no held-out reply at first: NaN is neither better nor worse than what follows."""
    answers = [None, None, 1.0, 2.0]

    def reward(prompts: list[str], responses: list[str]) -> list[float | None]:
        held_out = len(responses) == 1
        return [answers[min(t.steps_done, 3)] if held_out else 1.0] * len(responses)

    cfg = PPOConfig(
        total_steps=3, rollout_batch_size=2, mini_batch_size=2, max_new_tokens=3, eval_every=1, save_every=0,
        output_dir=str(tmp_path / "run"),
    )  # fmt: skip
    held = {"prompts": PROMPTS, "eval_prompts": PROMPTS[:1]}
    t = PPOTrainer(cfg, policy=tiny.llama(), tokenizer=tiny.tokenizer(), reward=reward, **held)
    t.train()
    assert t.best == 2.0


@pytest.mark.parametrize(
    ("stage", "kind"), [("sft", AutoModelForCausalLM), ("reward", AutoModelForSequenceClassification)]
)
def test_an_export_is_whole_and_replaces_the_old_one(stage, kind, tmp_path):
    t = build(stage)
    t.save(tmp_path / "out")
    t.train()
    t.save(tmp_path / "out")
    model = kind.from_pretrained(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), t.model.parameters(), strict=True))
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tiny.CHAT_TEMPLATE
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_export_that_fails_leaves_the_old_one(tmp_path):
    t = build("sft")
    t.save(tmp_path / "out")
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    t.train()
    with FullDisk(), pytest.raises(CheckpointError, match="could not write"):
        t.save(tmp_path / "out")
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
