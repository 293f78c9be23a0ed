"""What the three stages share: how a run is built, its loop, evaluation, checkpoints, resuming, stopping.

A trainer is built in one order. Its inputs are read first: rows become token ids, what cannot work is refused. Then
come the services (run folder, tracker, memory policy, guard), then the parts, each complete after its constructor.
Last, when `__init__` is done, the run folder is taken and a resumed run gets its state back. A stage owns the algorithm
(`step`); this file owns everything around it, once. The loop is a generator, so that the user can own it:
`for step in trainer`.
"""

from __future__ import annotations

import copy
import math
from abc import ABCMeta, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastrlhf.checkpoint.atomic import CheckpointError, export_folder
from fastrlhf.checkpoint.run_folder import RunFolder, check_output_dir, identity
from fastrlhf.checkpoint.state import load_parts, restore_rng, rng_tensors, seed_rng
from fastrlhf.checkpoint.store import Checkpoint, CheckpointStore
from fastrlhf.checkpoint.weight_files import Streamed
from fastrlhf.config.base import StageConfig
from fastrlhf.config.errors import UserError
from fastrlhf.data.templates import stop_token_ids
from fastrlhf.models.heads import agreed_workspace
from fastrlhf.models.saving import write_model
from fastrlhf.parallel import sharding
from fastrlhf.parallel.same_run import check_same_run
from fastrlhf.parallel.shares import Gathering
from fastrlhf.preflight.rows import Sentences
from fastrlhf.runtime import distributed
from fastrlhf.runtime.guards import Interrupted, StopNow, StopSignal
from fastrlhf.runtime.memory import MemoryBackoff
from fastrlhf.runtime.optim import TrainedRole
from fastrlhf.runtime.tracking import Tracker
from fastrlhf.runtime.updates import UpdateGuard

EXIT_INTERRUPTED = 75
PlannedTokens = Callable[[], int | None]
_NONE = type(None)
STATE = {  # what state.json of a checkpoint holds
    **{"step": (int,), "last_step": (int, _NONE), "best": (int, float, _NONE), "config": (dict,), "parts": (dict,)},
    **{"optimizers": (dict,), "tensors": (list,), "bytes": (dict,), "unfinished": (dict, _NONE), "inputs": (dict,)},
}


@dataclass
class Step:
    """The result of one step: metrics that the seed determines, timings that the machine does."""

    metrics: dict[str, float]
    timings: dict[str, float]


class Stateful(Protocol):
    """A part whose state, as JSON can hold it, is in every checkpoint."""

    def state(self) -> Any: ...
    def load_state(self, state: Any) -> None: ...


class TensorPart(Protocol):
    """A part with tensors in every checkpoint (none: it is left out)."""

    def tensors(self) -> dict[str, Tensor]: ...
    def load_tensors(self, tensors: dict[str, Tensor]) -> None: ...


class _BegunWhenBuilt(ABCMeta):
    """Begins a trainer after its constructor, so that no part is restored before every part is there."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        trainer = super().__call__(*args, **kwargs)
        trainer._begin()
        return trainer


class Trainer(metaclass=_BegunWhenBuilt):
    """Services, loop and checkpoints of a stage. Of several ranks the lead alone writes and talks; all read the
    checkpoint they resume from.

    A stage's constructor reads its inputs, calls this one, then makes its parts. steps_done counts the steps of the
    whole run. Left out: callbacks (iterate over the trainer), registries, plugins.
    """

    best_metric: ClassVar[tuple[str, bool]]  # name of the evaluation metric, whether higher is better

    def __init__(
        self,
        config: StageConfig,
        *,
        inputs: dict[str, Any],
        tokenizer: PreTrainedTokenizerBase,
        total_steps: int,
        device: torch.device,
        said: Sentences,
        rows: Iterable[Sequence[int]],
    ) -> None:
        """inputs: the trainer's arguments by name. said: about the inputs, for the console and log.txt. rows: token ids
        of what the run reads."""
        check_same_run(config, rows)
        self.config, self.tokenizer, self.device = config, tokenizer, device
        self.planned_steps, self.steps_done = total_steps, 0
        self.last_step: int | None = None  # where a step finds that it is the last one
        self.best: float | None = None
        self._unfinished: dict[str, float] | None = None  # metrics of a step whose evaluation has not ended
        self._end: dict[str, Any] | None = None  # state at the end of the last step; None: weights have changed since
        self._saved_end: dict[str, Any] | None = None  # the one that the last checkpoint holds
        self._stop: StopSignal | None = None  # while the loop runs
        self._stopping = False
        self.run_folder = RunFolder(config, inputs)
        if distributed.is_lead():  # another rank may get here when the lead has taken the folder already
            check_output_dir(config)
            self.run_folder.read_inputs(tokenizer.chat_template)
        self.store: CheckpointStore | None = None
        self.tracker = Tracker(None, config.stage, total_steps, console=distributed.is_lead())
        self.memory = MemoryBackoff(config, device, self.tracker.event)
        self.guard = UpdateGuard(self.tracker.event, tokenizer.decode)
        for note in said.notes:
            self.tracker.note(note)
        for warning in said.warnings:
            self.tracker.event("dropped_rows", warning)

    @property
    def total_steps(self) -> int:
        """Steps of the whole run: those planned, or fewer where it ends early."""
        return self.planned_steps if self.last_step is None else self.last_step

    @property
    def folder(self) -> Path | None:
        """The run folder; None: nothing is written."""
        return self.run_folder.path

    # ------------------------------------------------------------------------------------------- what a stage provides

    @abstractmethod
    def step(self) -> Step:
        """Make one step of the algorithm and count it in steps_done."""

    @abstractmethod
    def evaluate(self) -> dict[str, float]:
        """Measure on held-out data -> metrics; none where there is no such data."""

    @abstractmethod
    def trained(self) -> dict[str, TrainedRole]:
        """The roles being trained; the first one is exported."""

    @abstractmethod
    def parts(self) -> dict[str, Stateful]:
        """Parts with a state of their own, beside guard and memory, by the name in a checkpoint."""

    def tensor_parts(self) -> dict[str, TensorPart]:
        """Parts with tensors of their own, beside what `trained` holds, by the name in a checkpoint."""
        return {}

    def settle(self) -> None:
        """Find out, once all parts have their state, what the run asks of its models and no checkpoint told."""

    def beside_the_model(self) -> dict[str, str]:
        """Texts that `save` writes into the model's folder, by file name."""
        return {}

    def averaged(self) -> AbstractContextManager[None]:
        """Have the trained model hold the weights that are evaluated and saved, inside."""
        return nullcontext()

    # ------------------------------------------------------------------------------------------------- the user's end

    def __iter__(self) -> Iterator[Step]:
        if distributed.is_lead():
            self.run_folder.take()
        try:
            with distributed.inside_the_model():
                yield from self._steps()
        finally:
            self.run_folder.release()

    def train(self) -> dict[str, float]:
        """Run every remaining step -> the metrics of the last one."""
        summary: dict[str, float] = {}
        for step in self:
            summary = step.metrics
        return summary

    def save(self, folder: str | Path, *, adapter: bool = False) -> None:
        """Write the first trained model as a folder that stock transformers loads, replaced as a whole: weights (an
        adapter merged into them), tokenizer, chat template and generation config.

        A folder that holds anything but an earlier export is refused with a UserError that names it. adapter: the LoRA
        adapter alone, as peft loads it (with the head of a reward model); UserError without `lora`. The lead of several
        ranks writes; with parallel = fsdp all of them call it.
        """
        first = next(iter(self.trained().values()))
        if adapter and first.adapter is None:
            raise UserError("save: adapter=True needs a run with lora; this one trains all weights")
        with self.averaged():
            with sharding.gathered(first.model, layered=True):
                texts = self.beside_the_model() if distributed.is_lead() else {}
            write_adapter, gathering = first.adapter() if adapter else None, Gathering({})
            if not adapter and sharding.is_sharded(first.model):
                gathering = Gathering({"model": sharding.state_in_parts(first.model, first.merged)})
            try:
                if distributed.is_lead():
                    self._export(folder, first, texts, write_adapter, gathering)
            finally:
                gathering.finish()

    def _export(
        self,
        folder: str | Path,
        role: TrainedRole,
        texts: dict[str, str],
        adapter: Callable[[Path], None] | None,
        gathering: Gathering,
    ) -> None:
        """Write what `save` has prepared."""
        stops = stop_token_ids(self.tokenizer, getattr(role.model, "generation_config", None))
        weights = role.merged() if adapter is None and role.merged and not gathering.left else None

        def write(target: Path) -> None:
            parts = gathering.take("model") if gathering.left else weights
            write_model(target, role.model, self.tokenizer, stops, parts, adapter)
            for name, text in texts.items():
                (target / name).write_text(text, encoding="utf-8")

        export_folder(write, folder)

    def save_as_trained(self, folder: Path) -> None:
        """`save`, but a quantised base is not merged unless it is asked for."""
        self.save(folder, adapter=self.config.quantize is not None)

    # ------------------------------------------------------------------------------------------------------- the loop

    def _steps(self) -> Iterator[Step]:
        """Run the remaining steps. Raises Interrupted after a signal, once a checkpoint is written.

        Until a step changes weights they are those of the end of the last one. Whatever ends the loop before that (an
        exception of a reward, memory that runs out, a signal) has that end saved, and resume makes the step anew.
        """
        with ExitStack() as stack:
            self._stop = stack.enter_context(StopSignal(self._describe_stop))
            stack.push(self._on_the_way_out)
            self._end = self._state_of_the_end()
            if self.steps_done == 0 and self.config.eval_every:
                self._finish_step({}, {})
            elif self._unfinished is not None:  # it was stopped in this evaluation
                self._finish_step(self._unfinished, {})
                self._stop_if_asked()
            while self.steps_done < self.total_steps:
                self.stop_together()  # it came after the step or in the user's loop
                self.tracker.begin(self.steps_done + 1)
                with self._at_once():
                    result = self.step()
                self._finish_step(result.metrics, result.timings)
                yield result
                self._stop_if_asked()

    def stop_together(self) -> None:
        """Stop here, before the update of a step, where a signal came to any rank; a step calls it between its parts.
        One rank alone stops at once."""
        if self._stop is not None and distributed.any_of(self._stop.requested):
            raise StopNow

    def _at_once(self) -> AbstractContextManager[None]:
        """Let signals stop the work inside. Ranks have to stop together: several of them do in `stop_together`."""
        return self._stop.at_once() if distributed.size() == 1 else nullcontext()

    def _finish_step(self, metrics: dict[str, float], timings: dict[str, float]) -> None:
        """Evaluate where that is due, write the row of the step, save where that is due."""
        config, done = self.config, self.steps_done
        last = done == self.total_steps  # a step may find that it was the last
        if config.eval_every and (done % config.eval_every == 0 or last):
            self._unfinished = {name: getattr(value, "item", lambda v=value: v)() for name, value in metrics.items()}
            self._end = self._state_of_the_end()
            metrics.update(self._evaluate())
        self.tracker.log(done, metrics, timings)
        self._unfinished = None
        self._end = self._state_of_the_end()
        self._stopping = distributed.any_of(self._stop.requested)
        if done > 0 and (self._stopping or last or (config.save_every and done % config.save_every == 0)):
            self._save()

    def _stop_if_asked(self) -> None:
        if self._stopping and self.steps_done < self.total_steps:
            raise self._interrupted(self._stop)

    def _interrupted(self, stop: StopSignal) -> Interrupted:
        done, by = self.steps_done, stop.name or "a signal to another rank"
        where = f"; go on with: fastrlhf resume {self.folder}" if self.folder else ""
        return Interrupted(f"stopped by {by} after step {done} of {self.total_steps}{where}")

    def _describe_stop(self, now: bool) -> str:
        """Say what a signal leads to."""
        first = "stopping now, without the step that was begun" if now else "waiting for the end of the step"
        if distributed.size() > 1 and self._end is not None:
            first = "waiting for all ranks to come to the end of this part of the step"
        return first if self.store is None else f"{first}, then writing a checkpoint"

    def _update_begins(self, *_: object) -> None:
        """Called before an optimizer changes a weight: the step is ended from here on."""
        if self._stop is not None:
            self._end = None
            self._stop.hold()

    def _state_of_the_end(self) -> dict[str, Any]:
        """Everything that a step changes before its update, as it is after the last one."""
        state = {
            "step": self.steps_done,
            "last_step": self.last_step,
            "best": self.best,
            "unfinished": self._unfinished,
            "parts": {name: part.state() for name, part in self._all_parts().items()},
            "bytes": self.tracker.lengths(),
        }
        return {**copy.deepcopy(state), "rng": rng_tensors()}

    def _on_the_way_out(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        """Go back to the end of the last step and save it, where the loop is left in the middle of a step by an
        exception that came before the update. Several ranks save together where they stopped together; where one of
        them failed they cannot."""
        stop, self._stop = self._stop, None
        if kind in (None, GeneratorExit, Interrupted) or issubclass(kind, CheckpointError) or stop.insisted:
            return
        if self._end is None or (distributed.size() > 1 and kind is not StopNow):
            return
        self._go_back(self._end)
        unsaved = distributed.any_of(self._end is not self._saved_end)
        if self.steps_done > 0 and unsaved:  # before the first step nothing is lost
            self._save()
        if kind is StopNow:
            raise self._interrupted(stop) from None
        if self.store is not None and self._end is self._saved_end:
            self.tracker.note(f"step {self.steps_done} of {self.total_steps} is saved: fastrlhf resume goes on from it")

    def _go_back(self, end: dict[str, Any]) -> None:
        for role in self.trained().values():
            role.optimizer.zero_grad()
        self.steps_done, self.last_step, self.best = end["step"], end["last_step"], end["best"]
        self._unfinished = end["unfinished"]
        for name, part in self._all_parts().items():
            part.load_state(copy.deepcopy(end["parts"][name]))
        restore_rng(end["rng"])
        self.tracker.begin(self.steps_done)

    def _evaluate(self) -> dict[str, float]:
        with self.tracker.phase("evaluate"), self._at_once():
            metrics = self.evaluate()
        name, higher = self.best_metric
        value = metrics.get(name)
        known = value is not None and math.isfinite(value)
        better = known and (self.best is None or (value > self.best if higher else value < self.best))
        if better and self.steps_done > 0:
            self.best = value
            if self.folder is not None:
                try:
                    self.save_as_trained(self.folder / "best")
                except UserError as error:  # the disk, or another's file: the older best model is still there
                    self.tracker.event("checkpoint", str(error))
        return metrics

    # ----------------------------------------------------------------------------------------- checkpoints and resume

    def _begin(self) -> None:
        """Take the run folder, open its files, and get the state of a resumed run back."""
        config, lead = self.config, distributed.is_lead()
        for role in self.trained().values():
            role.optimizer.inner.register_step_pre_hook(self._update_begins)
        seed_rng(config.seed)  # for user reward functions too; a resumed run gets its own state back below
        with distributed.lead_first():
            self.store, checkpoint = self.run_folder.open() if lead else self.run_folder.read()
        self.memory.begin(agreed_workspace(self.device))  # a resumed run gets that of its first machine back below
        try:
            if checkpoint is not None:
                _check_state(checkpoint)
                with _as_saved(checkpoint):
                    notes = self.run_folder.same(checkpoint.state)
            if lead and self.folder is not None:
                resumed = checkpoint.state["bytes"] if checkpoint else {}
                self.tracker.open(self.folder, resumed if config.resume else None)
            for note in self.store.notes if self.store else []:
                self.tracker.note(note)
            if checkpoint is not None:
                for note in notes:
                    self.tracker.note(note)
                with _as_saved(checkpoint):
                    self._restore(checkpoint)
                if lead:
                    self.run_folder.write_recipe(self.folder)  # it may go further than it was first told to
            self.settle()
        except UserError:
            self.run_folder.release()
            raise

    def _all_parts(self) -> dict[str, Stateful]:
        return {"guard": self.guard, "memory": self.memory, **self.parts()}

    def _save(self) -> None:
        if self.store is None:
            return
        end = self._end
        random = _rng_of_every_rank()
        trained = self.trained()
        states = {name: role.optimizer.checkpoint(name) for name, role in trained.items()}
        gathering = _to_gather(trained, {name: tensors for name, (tensors, _) in states.items()})
        try:
            if distributed.is_lead():
                self._write(end, random, states, gathering)
        finally:
            gathering.finish()

    def _write(
        self,
        end: dict[str, Any],
        random: dict[str, dict[str, Tensor]],
        states: dict[str, tuple[dict[str, Tensor] | Streamed, dict[str, Any]]],
        gathering: Gathering,
    ) -> None:
        """Write a checkpoint of the end of a step."""
        trained = self.trained()
        for note in self.run_folder.hashed():
            self.tracker.note(note)
        self.tracker.sync()
        groups = {name: part.tensors() for name, part in self.tensor_parts().items()}
        groups = {name: group for name, group in groups.items() if group}
        tensors, optimizers = {**random, **groups}, {}
        for name, role in trained.items():
            for key, group in _groups_of(name, role, states[name][0]).items():
                streamed = isinstance(group, Streamed)
                tensors[key] = group._replace(parts=gathering.take(key)) if streamed else group
            optimizers[name] = states[name][1]
        state = {
            **{name: end[name] for name in ("step", "last_step", "best", "unfinished", "parts", "bytes")},
            "config": identity(self.config),
            "inputs": self.run_folder.fingerprints.result(),
            "optimizers": optimizers,
            "tensors": sorted(groups),
        }
        models = {name: role.model for name, role in trained.items() if role.parts is None}
        weights = {
            name: (sharding.state_bytes(model), gathering.take(name))
            for name, model in models.items()
            if sharding.is_sharded(model)
        }
        try:
            with self.tracker.phase("save"):
                held = {"models": models, "weights": weights, "tensors": tensors}
                self.store.save(self.steps_done, **held, state=state, tokenizer=self.tokenizer)
            self._saved_end = end
        except CheckpointError as error:
            if error.fatal:
                raise
            self.tracker.event("checkpoint", str(error))

    def _restore(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.state
        for name, role in self.trained().items():
            if role.parts is None:
                sharding.load_model(checkpoint, name, role.model)
            else:
                saved = checkpoint.tensors(f"weights_{name}")
                load_parts(*sharding.shares(role.parts, saved), str(checkpoint.path))
            role.optimizer.restore(checkpoint.tensors(f"optimizer_{name}"), state["optimizers"][name])
        mine = _rng_name(distributed.rank())  # a run may go on with more ranks than it had
        restore_rng(checkpoint.tensors(mine if f"{mine}.safetensors" in checkpoint.files else "rng"))
        self.steps_done, self.best = state["step"], state["best"]
        self.last_step, self._unfinished = state["last_step"], state.get("unfinished")
        for name, part in self._all_parts().items():
            saved = state["parts"][name]
            part.load_state(_of_other_rows(saved, part.state()) if self.config.accept_changed else saved)
        parts = self.tensor_parts()
        for name in state["tensors"]:
            parts[name].load_tensors(checkpoint.tensors(name))
        if distributed.is_lead():
            self.store.rotate(checkpoint.path)
        self.tracker.note(f"resumed from {checkpoint.path} at step {self.steps_done} of {self.total_steps}")


def _to_gather(trained: dict[str, TrainedRole], optimizers: dict[str, dict[str, Tensor] | Streamed]) -> Gathering:
    """What of a checkpoint no rank has whole, in the order in which it is written: models, then groups of tensors."""
    sources: dict[str, Iterator[dict[str, Tensor]]] = {
        name: sharding.state_in_parts(role.model)
        for name, role in trained.items()
        if role.parts is None and sharding.is_sharded(role.model)
    }
    for name, role in trained.items():
        groups = _groups_of(name, role, optimizers[name])
        sources |= {key: iter(group.parts) for key, group in groups.items() if isinstance(group, Streamed)}
    return Gathering(sources)


def _groups_of(
    name: str, role: TrainedRole, optimizer: dict[str, Tensor] | Streamed
) -> dict[str, dict[str, Tensor] | Streamed]:
    """The groups of tensors that a checkpoint holds of a role, by name."""
    groups: dict[str, dict[str, Tensor] | Streamed] = {f"optimizer_{name}": optimizer}
    if role.parts is not None:
        groups[f"weights_{name}"] = sharding.streamed(role.parts)
    return groups


def device_of(model: object) -> torch.device:
    """The device that a model is trained on: its own where it is loaded already, else this process's."""
    return model.device if isinstance(model, PreTrainedModel) else distributed.device()


def run_stage(
    trainer: type[Trainer], inputs: dict[str, Any], config: StageConfig, tokens: PlannedTokens | None = None
) -> int:
    """Run a whole stage for the command line: train, write output_dir/final (with lora and a base that is not quantised
    output_dir/adapter too; else final is the adapter) -> exit code 0, or 75 when interrupted, or when the
    disk is full, with a checkpoint to go on from. tokens: what `micro_batch_tokens: auto` is, None for the device's
    default; asked where no checkpoint says it."""
    if config.output_dir is None:
        raise UserError("output_dir: name the run folder, for example output_dir=runs/first")
    stage = trainer(config, **inputs)
    if tokens is not None:
        stage.memory.choose(tokens)
    try:
        stage.train()
        with distributed.inside_the_model():
            stage.save_as_trained(stage.folder / "final")
            if config.lora is not None and config.quantize is None:
                stage.save(stage.folder / "adapter", adapter=True)
        distributed.wait_for_all()  # nobody leaves before it is written
        stage.tracker.note(f"done: {stage.folder / 'final'}")
    except Interrupted as stopped:
        stage.tracker.note(str(stopped))
        return EXIT_INTERRUPTED
    except CheckpointError as error:  # of the third save that failed in a row, or of the export
        if stage.store.latest() is None:
            raise
        stage.tracker.note(f"{error}; make room and go on with: fastrlhf resume {stage.folder}")
        return EXIT_INTERRUPTED
    finally:
        stage.tracker.close()
    return 0


def _check_state(checkpoint: Checkpoint) -> None:
    """UserError for a checkpoint made by hand: what no run leaves out is missing, or no run writes."""
    state = {"unfinished": None, **checkpoint.state} if isinstance(checkpoint.state, dict) else {}
    for name, kinds in sorted(STATE.items()):
        if type(state.get(name, Ellipsis)) not in kinds:
            found = f"no {name!r}" if name not in state else f"a {name!r} that no run writes"
            raise UserError(f"{checkpoint.path}/state.json: has {found}; start again with another output_dir")
    if state["step"] != checkpoint.step:
        raise UserError(
            f"{checkpoint.path}/state.json: is of step {state['step']}; start again with another output_dir"
        )
    if not all(type(length) is int and length >= 0 for length in state["bytes"].values()):
        raise UserError(f"{checkpoint.path}/state.json: 'bytes' holds no lengths; start again with another output_dir")


@contextmanager
def _as_saved(checkpoint: Checkpoint) -> Iterator[None]:
    """UserError where what is in a checkpoint cannot be taken back: files made by hand, whose hashes fit."""
    try:
        yield
    except UserError:
        raise
    except (TypeError, ValueError, LookupError, AttributeError, SafetensorError) as error:
        what = f"{type(error).__name__}: {error}"
        remedy = "start again with another output_dir"
        raise UserError(f"{checkpoint.path}: not as a run writes it ({what}); {remedy}") from error


def _of_other_rows(saved: Any, now: Any) -> Any:
    """The state of a part for rows whose change was accepted: where there are more or fewer, a sampler begins its next
    epoch."""
    if not isinstance(now, dict) or now.keys() != {"n", "seed", "epoch", "cursor"}:
        return saved
    same = all(saved[name] == now[name] for name in ("n", "seed"))
    return saved if same else {**now, "epoch": saved["epoch"] + 1}


def _rng_name(rank: int) -> str:
    return f"rng_{rank}" if rank else "rng"


def _rng_of_every_rank() -> dict[str, dict[str, Tensor]]:
    groups: dict[str, dict[str, Tensor]] = {_rng_name(rank): {} for rank in range(distributed.size())}
    for name, tensor in rng_tensors().items():
        for group, part in zip(groups.values(), distributed.gather_each(tensor), strict=True):
            group[name] = part
    return groups
