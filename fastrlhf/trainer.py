"""The run folder and the loop every stage shares: log, evaluate, checkpoint, resume, stop.

A stage owns the algorithm (`run_step`); this file owns everything around it, once. The loop is a generator, so that
the user can own it: `for step in trainer`.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import transformers
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fastrlhf.checkpoint.atomic import CheckpointError, replace_folder, settle
from fastrlhf.checkpoint.run_folder import described, identity, is_plain, prepare_folder, write_run_json, write_whole
from fastrlhf.checkpoint.state import (
    load_optimizer_tensors,
    load_parts,
    optimizer_tensors,
    restore_rng,
    rng_tensors,
    seed_rng,
)
from fastrlhf.checkpoint.store import Checkpoint, CheckpointStore
from fastrlhf.config.base import StageConfig
from fastrlhf.config.errors import UserError
from fastrlhf.config.recipe import resolved_yaml
from fastrlhf.data.templates import stop_token_ids
from fastrlhf.models.saving import write_model
from fastrlhf.runtime import distributed
from fastrlhf.runtime.guards import Interrupted, StopSignal
from fastrlhf.runtime.optim import Trained
from fastrlhf.runtime.tracking import Tracker

EXIT_INTERRUPTED = 75


transformers.utils.logging.disable_progress_bar()  # one line a weight file would drown the console


class Step(Protocol):
    """What a stage's run_step returns; metrics are determined by the seed, timings by the machine."""

    metrics: dict[str, float]
    timings: dict[str, float]


class Stage(Protocol):
    """What the loop needs from SFT, reward model and PPO."""

    config: StageConfig
    inputs: dict[str, Any]
    tokenizer: PreTrainedTokenizerBase
    total_steps: int
    best_metric: tuple[str, bool]  # name of the evaluation metric, whether higher is better

    def trained(self) -> dict[str, Trained]: ...
    def run_step(self) -> Step: ...
    def evaluate(self) -> dict[str, float]: ...
    def state(self) -> dict[str, Any]: ...
    def tensors(self) -> dict[str, dict[str, Tensor]]: ...  # of the checkpoint, beside those of `trained`
    def load_state(self, state: dict[str, Any], tensors: Callable[[str], dict[str, Tensor]]) -> None: ...


class Run:
    """One stage's run folder (or none: output_dir None) with its tracker, checkpoints and position.

    Of several ranks the lead alone writes and talks; all read the checkpoint they resume from.
    """

    def __init__(self, stage: Stage) -> None:
        self.stage, self.config = stage, stage.config
        self.step = 0
        self.best: float | None = None
        self.averaged: Callable[[], AbstractContextManager] = nullcontext  # inside, the weights to save
        self.dir = Path(self.config.output_dir) if self.config.output_dir else None
        self.store: CheckpointStore | None = None
        seed_rng(self.config.seed)  # for user reward functions too; a resumed run gets its own state back below
        lead = distributed.is_lead()
        with distributed.lead_first():
            checkpoint = self._open()
        resumed = None if not self.config.resume else checkpoint.state["bytes"] if checkpoint else {}
        folder = self.dir if lead else None
        self.tracker = Tracker(folder, self.config.stage, stage.total_steps, console=lead, resume_bytes=resumed)
        for note in self.store.notes if self.store else []:
            self.tracker.note(note)
        if checkpoint is not None:
            self._restore(checkpoint)
            if lead:
                self._write_recipe(self.dir)  # it may go further than it was first told to

    # ------------------------------------------------------------------------------------------------- the folder

    def _open(self) -> Checkpoint | None:
        if self.dir is None:
            return None
        lead = distributed.is_lead()
        if lead:
            prepare_folder(self.dir, overwrite=self.config.overwrite, resume=self.config.resume, verb=self.config.stage)
        self.store = CheckpointStore(self.dir)
        checkpoint = self.store.latest() if self.config.resume else None
        if lead and (checkpoint is None or not (self.dir / "run.json").exists()):
            self._describe()
        return checkpoint

    def _describe(self) -> None:
        """config.yaml and run.json, both or neither: a run killed here can be started again."""
        inputs = self._inputs()
        fresh = self.dir.absolute().with_name(f".tmp-{self.dir.absolute().name}")
        shutil.rmtree(fresh, ignore_errors=True)
        write_run_json(
            fresh,
            verb=self.config.stage,
            inputs=inputs,
            from_python=sorted(n for n, v in self.stage.inputs.items() if not is_plain(v)),
            seed=self.config.seed,
        )
        self._write_recipe(fresh)
        settle(fresh)
        if self.dir.exists():
            for name in ("config.yaml", "run.json"):
                os.replace(fresh / name, self.dir / name)
            fresh.rmdir()
        else:
            os.rename(fresh, self.dir)

    def _inputs(self) -> dict[str, Any]:
        return {name: described(value) for name, value in self.stage.inputs.items() if value is not None}

    def _write_recipe(self, folder: Path) -> None:
        """config.yaml, as a recipe that starts the same run anew in another folder."""
        again = self.config.replace(resume=False, overwrite=False)
        write_whole(folder / "config.yaml", resolved_yaml(again.stage, self._inputs(), again))

    # -------------------------------------------------------------------------------------------------- the loop

    def steps(self) -> Iterator[Step]:
        """Run the remaining steps. Raises Interrupted after a signal, once a checkpoint is written."""
        stage = self.stage
        with StopSignal() as stop:
            if self.step == 0 and self.config.eval_every:
                self.tracker.log(0, self._evaluate())
            while self.step < stage.total_steps:
                result = stage.run_step()
                self.step += 1
                total = stage.total_steps  # a step may find that it was the last
                if self.config.eval_every and (self.step % self.config.eval_every == 0 or self.step == total):
                    result.metrics.update(self._evaluate())
                self.tracker.log(self.step, result.metrics, result.timings)
                stopping = distributed.any_of(stop.requested)
                due = self.config.save_every and self.step % self.config.save_every == 0
                if due or stopping or self.step == total:
                    self._save()
                yield result
                if stopping and self.step < total:
                    where = f"; go on with: fastrlhf resume {self.dir}" if self.dir else ""
                    by = stop.name or "a signal to another rank"
                    raise Interrupted(f"stopped by {by} after step {self.step} of {total}{where}")

    def _evaluate(self) -> dict[str, float]:
        with self.tracker.phase("evaluate"):
            metrics = self.stage.evaluate()
        name, higher = self.stage.best_metric
        value = metrics.get(name)
        known = value is not None and math.isfinite(value)
        better = known and (self.best is None or (value > self.best if higher else value < self.best))
        if better and self.step > 0:
            self.best = value
            if self.dir is not None:
                try:
                    self.export_default(self.dir / "best")
                except CheckpointError as error:  # the older best model is still there
                    self.tracker.event("checkpoint", str(error))
        return metrics

    # ----------------------------------------------------------------------------------------- saving and resuming

    def export(self, folder: str | Path, *, adapter: bool = False) -> None:
        """The first trained model as a folder that stock transformers runs, replaced as a whole; adapter: its adapter
        alone, with tokenizer and generation config, as peft loads it. The lead writes. UserError where there is none.
        """
        first = next(iter(self.stage.trained().values()))
        if adapter and first.adapter is None:
            raise UserError("save: adapter=True needs a run with lora; this one trains all weights")
        if not distributed.is_lead():
            return
        model, tokenizer = first.model, self.stage.tokenizer
        stops = stop_token_ids(tokenizer, getattr(model, "generation_config", None))
        with self.averaged():
            weights = first.merged() if first.merged and not adapter else None
            write = first.adapter if adapter else None
            replace_folder(lambda target: write_model(target, model, tokenizer, stops, weights, write), Path(folder))

    def export_default(self, folder: Path) -> None:
        """`export`, but a quantised base is not merged unless it is asked for."""
        self.export(folder, adapter=self.config.quantize is not None)

    def _save(self) -> None:
        if self.store is None:
            return
        random = _rng_of_every_rank()
        if not distributed.is_lead():
            return
        trained = self.stage.trained()
        tensors, optimizers = {**random, **self.stage.tensors()}, {}
        for name, (_, optimizer, parts, *_) in trained.items():
            saved, optimizers[name] = optimizer_tensors(optimizer.inner, name)
            tensors[f"optimizer_{name}"] = {**saved, **optimizer.master_tensors()}
            if parts is not None:
                tensors[f"weights_{name}"] = {key: tensor.detach() for key, tensor in parts.items()}
        state = {
            "step": self.step,
            "best": self.best,
            "config": identity(self.config),
            "optimizers": optimizers,
            "stage": self.stage.state(),
            "bytes": self.tracker.bytes(),
        }
        models = {name: role.model for name, role in trained.items() if role.parts is None}
        try:
            with self.tracker.phase("save"):
                self.store.save(self.step, models=models, tensors=tensors, state=state, tokenizer=self.stage.tokenizer)
        except CheckpointError as error:
            if error.fatal:
                raise
            self.tracker.event("checkpoint", str(error))

    def _restore(self, checkpoint: Checkpoint) -> None:
        saved, now = checkpoint.state["config"], identity(self.config)
        changed = sorted(name for name in saved.keys() | now.keys() if saved.get(name) != now.get(name))
        if changed:
            name = changed[0]
            raise UserError(
                f"{name}: this run was started with {saved.get(name)!r} and would resume with {now.get(name)!r}; "
                "resume with the same value, or start a new output_dir"
            )
        for name, (model, optimizer, parts, *_) in self.stage.trained().items():
            if parts is None:
                checkpoint.load_model(name, model)
            else:
                load_parts(parts, checkpoint.tensors(f"weights_{name}"), str(checkpoint.path))
            tensors = checkpoint.tensors(f"optimizer_{name}")
            optimizer.load_masters(tensors)
            inner = {key: value for key, value in tensors.items() if not key.startswith("master.")}
            load_optimizer_tensors(optimizer.inner, inner, checkpoint.state["optimizers"][name])
        own = _rng_name(distributed.rank())  # a run may go on with more ranks than it had
        restore_rng(checkpoint.tensors(own if f"{own}.safetensors" in checkpoint.files else "rng"))
        self.step, self.best = checkpoint.state["step"], checkpoint.state["best"]
        self.stage.load_state(checkpoint.state["stage"], checkpoint.tensors)
        if distributed.is_lead():
            self.store.rotate(checkpoint.path)
        self.tracker.note(f"resumed from {checkpoint.path} at step {self.step} of {self.stage.total_steps}")


def _rng_name(rank: int) -> str:
    return f"rng_{rank}" if rank else "rng"


def _rng_of_every_rank() -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {_rng_name(rank): {} for rank in range(distributed.size())}
    for name, tensor in rng_tensors().items():
        for group, part in zip(found.values(), distributed.gather_each(tensor), strict=True):
            group[name] = part
    return found


def run_stage(trainer: type, inputs: dict[str, Any], config: StageConfig) -> int:
    """A whole stage for the command line: train, write output_dir/final (with lora and a base that is not quantised
    output_dir/adapter too; else final is the adapter) -> exit code 0, or 75 when interrupted."""
    if config.output_dir is None:
        raise UserError("output_dir: name the run folder, for example output_dir=runs/first")
    stage = trainer(config, **inputs)
    tracker = stage.run.tracker
    try:
        stage.train()
        with distributed.lead_first():  # nobody leaves before it is written
            stage.run.export_default(stage.run.dir / "final")
            if config.lora is not None and config.quantize is None:
                stage.run.export(stage.run.dir / "adapter", adapter=True)
        tracker.note(f"done: {stage.run.dir / 'final'}")
    except Interrupted as stopped:
        tracker.note(str(stopped))
        return EXIT_INTERRUPTED
    finally:
        tracker.close()
    return 0
