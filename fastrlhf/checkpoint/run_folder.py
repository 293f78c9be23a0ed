"""The folder of a run: refused, taken or gone on with; config.yaml and run.json, which say what runs in it."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from fastrlhf._version import __version__
from fastrlhf.checkpoint import lock, owned
from fastrlhf.checkpoint.atomic import settle
from fastrlhf.checkpoint.fingerprints import Fingerprint, Fingerprints, absolute, changes
from fastrlhf.checkpoint.store import Checkpoint, CheckpointStore
from fastrlhf.config.base import StageConfig
from fastrlhf.config.errors import UserError
from fastrlhf.config.inputs import INPUTS
from fastrlhf.config.recipe import resolved_yaml

INLINE_ITEMS = 100  # a longer list is data handed over in Python, not part of a recipe
# Fields a resumed run may change: they steer the run, not its numbers (a longer run goes on from where it was), or save
# memory and change no more than rounding.
MAY_CHANGE = {"output_dir", "resume", "overwrite", "accept_changed", "save_every", "total_steps", "epochs"}
MAY_CHANGE |= {"probe", "offload", "gradient_checkpointing", "micro_batch_tokens", "reward_timeout", "reward_retries"}
MAY_CHANGE |= {"allow_drop", "parallel"}
MAY_CHANGE |= {"chat_template"}  # its text is compared, among the inputs


class RunFolder:
    """The folder of a run. It is checked first, by `check_output_dir`, and taken last, by `open`: nothing is written or
    removed before everything else of the run is ready. path None: there is no folder, and nothing is written.

    inputs: the trainer's arguments beside the config, by name.
    """

    def __init__(self, config: StageConfig, inputs: dict[str, Any]) -> None:
        self.config, self.inputs = config, inputs
        self.path = Path(config.output_dir) if config.output_dir else None
        self.fingerprints: Fingerprints | None = None
        self._told = False

    def read_inputs(self, chat_template: Any) -> None:
        """Begin to hash what the run reads, in the process that leads. chat_template: as it was settled."""
        if self.path is not None:
            kinds = {name: spec.kind for name, spec in INPUTS[self.config.stage].items()}
            named = str(self.config.chat_template)
            file = Path(named) if named.endswith(".jinja") else None
            self.fingerprints = Fingerprints(self.inputs, kinds, {"chat_template": (file, chat_template)})

    def hashed(self) -> list[str]:
        """What was hashed and how long it took: to be said once."""
        lines = [] if self._told or self.fingerprints is None else [self.fingerprints.line()]
        self._told = True
        return lines

    def same(self, state: Mapping[str, Any]) -> list[str]:
        """Compare config and inputs with those in a checkpoint -> notes on what moved or cannot be compared.

        UserError with all that differs and is not accepted, or for an accepted name that there is not.
        """
        now = {} if self.fingerprints is None else self.fingerprints.result()
        saved = state.get("inputs") or {}
        changed, notes = changes({name: Fingerprint(*one) for name, one in saved.items()}, now) if now else ({}, [])
        before, here = state["config"], identity(self.config)
        fields = sorted((before.keys() | here.keys()) - MAY_CHANGE)
        for name in fields:
            then, value = before.get(name), here.get(name)
            if then != value:
                changed[name] = f"{name}: this run was started with {then!r} and would resume with {value!r}"
        accepted = set(self.config.accept_changed or ())
        unknown = sorted(accepted - {*fields, *saved, *now, *(name.partition(".")[0] for name in now)})
        if unknown and now:
            raise UserError(
                f"accept_changed: there is no {unknown[0]!r} that could differ; inputs: {', '.join(sorted(now))}; "
                f"fields: {', '.join(fields)}"
            )
        refused = [name for name in changed if not {name, name.partition(".")[0]} & accepted]
        if refused:
            raise UserError(
                "; ".join(changed[name] for name in refused) + "; resume with the same, start a new output_dir, or go "
                f"on with what differs: --accept-changed {','.join(refused)} (in a config accept_changed)"
            )
        return [*self.hashed(), *notes, *(f"accepted: {sentence}" for sentence in changed.values())]

    def open(self) -> tuple[CheckpointStore | None, Checkpoint | None]:
        """Take the folder in the process that leads -> its checkpoints, and the one to go on from."""
        if self.path is None:
            return None, None
        config = self.config
        try:
            if self.path.is_dir():
                lock.acquire(self.path)
            prepare_folder(self.path, overwrite=config.overwrite, resume=config.resume, verb=config.stage)
            store, checkpoint = self.read()
            if checkpoint is None or not (self.path / "run.json").exists():
                self._describe()
        except OSError as error:
            self.release()
            raise UserError(_no_folder(self.path, error)) from error
        except UserError:
            self.release()
            raise
        return store, checkpoint

    def take(self) -> None:
        """Lock the folder, which `open` took and `release` gave back, again."""
        if self.path is not None and self.path.is_dir():
            lock.acquire(self.path)

    def release(self) -> None:
        """Let other processes have the folder."""
        if self.path is not None:
            lock.release(self.path)

    def read(self) -> tuple[CheckpointStore | None, Checkpoint | None]:
        """The same for the processes that follow."""
        if self.path is None:
            return None, None
        store = CheckpointStore(self.path)
        if not self.config.resume:
            return store, None
        checkpoint = store.latest()
        if checkpoint is None:
            _check_nothing_lost(store, self.config.save_every)
        return store, checkpoint

    def write_recipe(self, folder: Path) -> None:
        """Write config.yaml, as a recipe that starts the same run anew in another folder."""
        again = self.config.replace(resume=False, overwrite=False, accept_changed=None)
        if str(again.chat_template).endswith(".jinja"):
            again = again.replace(chat_template=os.path.abspath(again.chat_template))
        write_whole(folder / "config.yaml", resolved_yaml(again.stage, self._named_inputs(), again))

    def _describe(self) -> None:
        """Write config.yaml and run.json, both or neither: a run killed here can be started again."""
        fresh = _beside(self.path.absolute())
        try:
            write_run_json(
                fresh,
                verb=self.config.stage,
                inputs=self._named_inputs(),
                from_python=sorted(name for name, value in self.inputs.items() if not is_plain(value)),
                seed=self.config.seed,
            )
            self.write_recipe(fresh)
            settle(fresh)
            if self.path.exists():
                for name in ("config.yaml", "run.json"):
                    os.replace(fresh / name, self.path / name)
                lock.release(fresh)
                fresh.rmdir()
            else:
                os.rename(fresh, self.path)
                lock.moved(fresh, self.path)
        finally:
            lock.release(fresh)

    def _named_inputs(self) -> dict[str, Any]:
        kinds = INPUTS[self.config.stage]
        given = {name: described(value) for name, value in self.inputs.items() if value is not None}
        return {name: absolute(value, kinds[name].kind) for name, value in given.items()}


def check_output_dir(config: StageConfig) -> None:
    """Refuse a run's folder that cannot be used (UserError), in the process that leads."""
    if config.output_dir:
        folder = Path(config.output_dir)
        check_folder(folder, overwrite=config.overwrite, resume=config.resume, verb=config.stage)


def _beside(path: Path) -> Path:
    """An empty folder beside a run folder, locked before anybody can see it under the run's name. What a start that was
    killed left there goes. UserError where it is in use, or holds anything else."""
    fresh = path.with_name(f".tmp-{path.name}")
    other: Path | None = fresh
    if not fresh.is_symlink() and (fresh.is_dir() or not fresh.exists()):
        fresh.mkdir(parents=True, exist_ok=True)
        folders = (path for path in fresh.iterdir() if path.is_dir())  # a start makes none
        other = owned.foreign(fresh) or next(folders, None)
    if other is not None:
        raise UserError(f"output_dir: {str(other)!r} was not written by a run; move it away")
    lock.acquire(fresh)
    for file in fresh.iterdir():
        if file.name != lock.LOCK:
            file.unlink()
    return fresh


def check_folder(folder: Path, *, overwrite: bool, resume: bool, verb: str | None = None) -> None:
    """Refuse a folder in use, or one that no run wrote.

    resume: the folder must hold a run (of `verb`, where given), or nothing yet.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir: {str(folder)!r} is a file; name a folder")
    if resume and not folder.is_dir():
        raise UserError(f"output_dir: {str(folder)!r} does not exist, so there is nothing to resume")
    try:
        names = {path.name for path in folder.iterdir()} - {lock.LOCK} if folder.is_dir() else set()
    except OSError as error:
        raise UserError(_no_folder(folder, error)) from error
    owned.check_no_link(folder)
    lock.check_free(folder)
    if resume:
        if names - {"config.yaml"} and not names & {"run.json", "checkpoints"}:  # config.yaml: killed between the two
            raise UserError(f"output_dir: {str(folder)!r} holds files that no run wrote; there is nothing to resume")
        was = _run_json(folder)["verb"] if "run.json" in names else verb
        if verb is not None and verb != was:
            raise UserError(f"output_dir: {str(folder)!r} holds a {was} run, which {verb} cannot go on with")
        return
    if not names:
        return
    if not overwrite:
        raise UserError(
            f"output_dir: {str(folder)!r} is not empty; name another folder, or use --overwrite (resume=true goes on)"
        )
    if "run.json" not in names:
        raise UserError(f"output_dir: {str(folder)!r} holds files that no run wrote; empty it by hand")
    _run_json(folder)  # of ours, or of another tool: then whose the other files are cannot be told
    for stage in owned.STAGE_FOLDERS:  # of a quickstart
        lock.check_free(folder / stage)
    other = owned.foreign(folder)
    if other is not None:
        raise UserError(
            f"output_dir: {str(other)!r} was not written by a run, so nothing in {str(folder)!r} is removed; "
            "move it away, or name another folder"
        )


def _no_folder(folder: Path, error: OSError) -> str:
    return (
        f"output_dir: {str(folder)!r} cannot be used ({error.strerror or error}); name a folder that can be written to"
    )


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a .jsonl file that can be read."""
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            yield row


def _check_nothing_lost(store: CheckpointStore, save_every: int) -> None:
    """UserError for a run to be resumed that has no checkpoint left but had one: to begin at step 0 would lose its
    steps. A run that was killed before its first checkpoint begins again, and a note says so."""
    steps = [row["step"] for row in _rows(store.run_dir / "metrics.jsonl") if isinstance(row.get("step"), int)]
    saved = any("time/save" in row for row in _rows(store.run_dir / "timings.jsonl"))
    done = max(steps, default=0)
    damaged = [note for note in store.notes if " is damaged " in note]
    if damaged or (done > 0 and (saved or done > save_every > 0)):
        what = "; ".join(damaged) or f"{store.folder} holds no checkpoint, and metrics.jsonl has {done} steps"
        raise UserError(
            f"resume: no checkpoint to go on from: {what}. Nothing was removed: put a checkpoint back, or start over "
            "with another output_dir or with --overwrite"
        )
    if done > 0:
        store.notes.append(f"no checkpoint was written in the {done} steps of this run yet: it begins again at step 0")


def prepare_folder(folder: Path, *, overwrite: bool, resume: bool, verb: str | None = None) -> None:
    """Check a folder and, to overwrite, empty it, its lock kept. Only what a run wrote is ever removed: a folder with
    any other file is refused."""
    check_folder(folder, overwrite=overwrite, resume=resume, verb=verb)
    if not overwrite or resume or not folder.is_dir():
        return
    try:  # run.json goes last: a folder that was emptied halfway is still known as a run's
        for path in sorted(folder.iterdir(), key=lambda path: path.name == "run.json"):
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != lock.LOCK:
                path.unlink()
    except OSError as error:
        raise UserError(f"output_dir: {str(folder)!r} cannot be emptied ({error})") from error


def write_run_json(folder: Path, *, verb: str, **fields: Any) -> None:
    """Write what `fastrlhf resume` and the report read first: the verb, the inputs, the versions."""
    folder.mkdir(parents=True, exist_ok=True)
    versions = {"fastrlhf": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    content = {"verb": verb, **fields, "versions": versions, "started": time.strftime("%Y-%m-%d %H:%M:%S")}
    cpu = f"CPU, {torch.get_num_threads()} threads"
    content["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
    write_whole(folder / "run.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a small file so that a reader finds the old one or the new one, whole."""
    fresh = path.with_name(f".tmp-{path.name}")
    with open(fresh, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)


def _run_json(folder: str | Path) -> dict[str, Any]:
    path = Path(folder) / "run.json"
    if not path.is_file():
        raise UserError(f"{str(folder)!r} is no run folder: it has no run.json")
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({error}); start again with another output_dir") from error
    if not isinstance(run, dict) or run.get("verb") not in (*owned.STAGE_FOLDERS, "quickstart"):
        raise UserError(f"{path}: not written by a run; name the run folder itself")
    return run


def read_run_json(folder: str | Path) -> dict[str, Any]:
    """Read run.json of a run folder. UserError when the folder is none, or holds objects only Python can pass again."""
    run = _run_json(folder)
    if run.get("from_python"):
        names = ", ".join(map(str, run["from_python"])) if isinstance(run["from_python"], list) else "its inputs"
        raise UserError(
            f"{str(folder)!r} was started from Python with objects for {names}; resume it from Python: build the same "
            "trainer with resume=True"
        )
    return run


def identity(config: StageConfig) -> dict[str, Any]:
    """The fields that determine a run's numbers, as JSON knows them."""
    fields = json.loads(config.model_dump_json())
    return {name: value for name, value in fields.items() if name not in MAY_CHANGE}


def is_plain(value: Any) -> bool:
    """True for what YAML can hold: names and paths, but no loaded models, functions or data sets."""
    if isinstance(value, (list, tuple)):
        return len(value) <= INLINE_ITEMS and all(is_plain(item) for item in value)
    if isinstance(value, dict):
        return all(isinstance(name, str) for name in value) and is_plain(list(value.values()))
    return value is None or isinstance(value, (str, int, float, Path))


def described(value: Any) -> Any:
    """A value as YAML can hold it: what is no plain data is named in angle brackets."""
    if is_plain(value):
        return str(value) if isinstance(value, Path) else value
    if isinstance(value, PreTrainedModel):
        return f"<loaded {type(value).__name__}>"
    return f"<{getattr(value, '__name__', type(value).__name__)}>"
