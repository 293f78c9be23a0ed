"""Recipes: a YAML file (packaged or the user's own) and field=value overrides, read into inputs and config.

A recipe is flat: the trainer's arguments (policy, prompts, ...) stand beside the config's fields. --dry-run prints a
recipe again, and so is config.yaml of the run folder.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from fastrlhf.config import encodings
from fastrlhf.config.base import StageConfig, config_fields
from fastrlhf.config.errors import AUTO, ConfigError, UserError
from fastrlhf.config.inputs import DATA_SUFFIXES, HUB_ID, INPUTS, data_name, modelscope_id
from fastrlhf.config.plain_yaml import Loader, construct, parse_value
from fastrlhf.config.stages import CONFIGS

RECIPES = Path(__file__).parents[1] / "recipes"
NO_OUTPUT = "required on the command line; write output_dir=FOLDER"
MAX_BYTES = 1 << 20


def load_recipe(stage: str, source: str | None, overrides: list[str]) -> tuple[dict[str, Any], StageConfig]:
    """-> (inputs, config) of a stage from a packaged recipe's name or a YAML path, and overrides; source None: from the
    overrides alone.

    Relative paths stay relative to the current directory. UserError: one line a problem, with FILE:LINE or
    "command line", the field, the value and what is expected; one line for all the required inputs that are missing.
    """
    path = None if source is None else find_recipe(source)
    if path is not None and _is_packaged(path) and packaged_stage(path.stem) != stage:
        raise UserError(f"{path.stem}: a recipe of fastrlhf {packaged_stage(path.stem)}, not of {stage}")
    values, where = ({}, {}) if path is None else read_recipe(path)
    for name, value in parse_overrides(overrides).items():
        values[name], where[name] = value, "command line"
    inputs = {name: input_value(values.pop(name)) for name in INPUTS[stage] if name in values}
    problems = _missing_inputs(stage, inputs, values, path) + _wrong_inputs(stage, inputs)
    config = None
    try:
        config = CONFIGS[stage](**values)
    except ConfigError as error:
        problems = _for_a_command(error.problems, problems)
    if config is None or problems:
        raise ConfigError(problems, where)
    return {name: value for name, value in inputs.items() if value is not None}, config


def packaged_recipes() -> list[str]:
    """Names of the recipes that ship with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def packaged_recipe(name: str) -> str:
    """The commented YAML of a packaged recipe. UserError naming the nearest one where there is none."""
    names = packaged_recipes()
    if name not in names:
        close = difflib.get_close_matches(name, names, 1)
        hint = f"did you mean {close[0]}?" if close else f"packaged recipes: {', '.join(names)}"
        raise UserError(f"{name}: no packaged recipe; {hint}")
    return (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")


def packaged_stage(name: str) -> str:
    """The command that a packaged recipe is for, which its comments show."""
    return packaged_recipe(name).partition("fastrlhf ")[2].split()[0]


def stage_of(source: str | None, overrides: list[str]) -> str:
    """The command that a recipe is for: what a packaged one says, else the only one that has all of its fields.

    UserError where there is none, or more than one.
    """
    path = None if source is None else find_recipe(source)
    if path is not None and _is_packaged(path):
        return packaged_stage(path.stem)
    names = {*parse_overrides(overrides), *({} if path is None else read_recipe(path)[0])}
    stages = [stage for stage, cls in CONFIGS.items() if names <= {*INPUTS[stage], *cls.model_fields}]
    if len(stages) == 1:
        return stages[0]
    whose = f"may be of {' or '.join(stages)}" if stages else f"are of none of {', '.join(CONFIGS)}"
    raise UserError(f"{source or 'command line'}: its fields {whose}; say what it is for: --stage sft|reward|ppo")


def _is_packaged(path: Path) -> bool:
    return RECIPES.resolve() in path.resolve().parents


def find_recipe(source: str) -> Path:
    """The file of a recipe: a path that exists, else a packaged recipe's name."""
    path = Path(source).expanduser()
    if os.path.isfile(path):  # which says no, where Path.is_file raises: of a name that is too long
        return path
    if source in packaged_recipes():
        return RECIPES / f"{source}.yaml"
    what = "is a folder, not a recipe" if os.path.isdir(path) else "no such recipe"
    names = ", ".join(packaged_recipes())
    raise UserError(f"{source}: {what} (tried {path.absolute()}); packaged recipes: {names}; or write field=value only")


def read_recipe(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """-> (values by name, "FILE:LINE" by name) of a YAML file. UserError when it is no flat mapping of plain data."""
    text = _read_text(path)
    values: dict[str, Any] = {}
    where: dict[str, str] = {}
    try:
        loader = Loader(text)
        root = loader.get_single_node()
        for key, node in _pairs(root, path):
            name, line = str(key.value), f"{path}:{key.start_mark.line + 1}"
            if name in values:
                raise UserError(f"{line}: {name}: given twice, first in line {where[name].rpartition(':')[2]}")
            values[name], where[name] = _construct(loader, node, line), line
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{line}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {str(error).splitlines()[0]}") from None
    return values, where


def _construct(loader: Loader, node: yaml.Node, line: str) -> Any:
    try:
        return construct(loader, node)
    except ValueError as error:  # a date or a number that cannot be
        raise UserError(f"{line}: not a value: {error}") from None


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if len(data) > MAX_BYTES:
        raise UserError(f"{path}: larger than {MAX_BYTES} bytes, so it is no recipe; data belongs in a file of its own")
    try:
        return encodings.decode(data)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        problem = f"not UTF-8 text (byte {error.start}), so it is no recipe"
        raise UserError(f"{path}:{line}: {problem}; {encodings.remedy(error)}") from None


def _pairs(root: yaml.Node | None, path: Path) -> list[tuple[yaml.Node, yaml.Node]]:
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f'{path}:{root.start_mark.line + 1}: expected "field: value" lines')
    for key, _ in root.value:
        if not isinstance(key, yaml.ScalarNode):
            raise UserError(f"{path}:{key.start_mark.line + 1}: a field name must be a word")
    return root.value


def parse_overrides(overrides: list[str]) -> dict[str, Any]:
    """["kl_coef=0.1", ...] -> {"kl_coef": "0.1"}; the config types the values. Lists are written as in YAML."""
    values: dict[str, Any] = {}
    for override in overrides:
        name, equals, value = override.partition("=")
        name = name.strip().lstrip("-").replace("-", "_")
        if not equals or not name:
            raise UserError(f"command line: {override!r}: expected field=value")
        values[name] = value.strip()
    return values


def input_value(value: Any) -> Any:
    """An argument of a trainer as it is typed: none, a list or mapping in YAML, or a text (~ is the home folder)."""
    if isinstance(value, str):
        if value.lower() in ("none", "null", ""):
            return None
        if value.startswith(("[", "{")):
            try:
                return parse_value(value)
            except ValueError:
                return value
        if value.startswith("~"):
            return str(Path(value).expanduser())
    return value


def _missing_inputs(
    stage: str, inputs: Mapping[str, Any], fields: Mapping[str, Any], path: Path | None
) -> list[tuple[str, str]]:
    """One problem for all that a run needs and has not; nothing where only output_dir is missing (check_paths)."""
    specs = {name: spec for name, spec in INPUTS[stage].items() if inputs.get(name) is None}
    missing = [name for name, spec in specs.items() if spec.required]
    if not missing:
        return []
    if "ptx_data" in specs and _is_positive(fields.get("ptx_coef")):
        missing.append("ptx_data")
    if input_value(fields.get("output_dir")) is None:
        missing.append("output_dir")
    # A packaged recipe is nobody's to edit: what is missing there belongs on the command line.
    is_own = path is not None and not _is_packaged(path)
    first, *others = missing
    places = f"add it to {path} or to the command line" if is_own else "give it on the command line"
    what = specs[first].description
    if others:
        names = " and ".join(filter(None, [", ".join(others[:-1]), others[-1]]))
        places, what = f"{places}, and {names} too", f"fastrlhf {stage} --help says what each is"
    examples = " ".join(f"{name}=..." for name in missing)
    return [(first, f"{first}: required; {places}: {examples} ({what})")]


def _for_a_command(problems: list[tuple[str, str]], missing: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Problems of a config, after those of the inputs. Python may leave output_dir out, a command may not: there it is
    missing, not a reason to take save_every back."""
    kept = [(name, text) for name, text in problems if "output_dir = none writes nothing" not in text]
    return missing + kept or [("output_dir", f"output_dir: {NO_OUTPUT}")]


def _is_positive(value: Any) -> bool:
    try:
        return float(value or 0) > 0
    except (TypeError, ValueError):  # the config says so itself
        return False


def _wrong_inputs(stage: str, inputs: Mapping[str, Any]) -> list[tuple[str, str]]:
    problems = []
    for name, spec in INPUTS[stage].items():
        value = inputs.get(name)
        listed = isinstance(value, list) and spec.kind != "model" or isinstance(value, dict) and spec.kind == "reward"
        if value is not None and not isinstance(value, str) and not listed:
            problems.append((name, f"{name} = {value!r}: expected {spec.description}"))
    return problems


def check_paths(stage: str, inputs: Mapping[str, Any], config: StageConfig) -> None:
    """UserError for an output_dir that is missing or in use, and for every input that names no existing path.

    A value that can only be a hub id is left to the stage, which tries to load it.
    """
    named = {name: (inputs.get(name), spec.kind) for name, spec in INPUTS[stage].items()}
    if str(config.chat_template).endswith(".jinja"):
        named["chat_template"] = (config.chat_template, "file")
    wrong = {name: path_problem(value, kind) for name, (value, kind) in named.items() if isinstance(value, str)}
    wrong["output_dir"] = _output_problem(config)
    if getattr(config, "ptx_coef", 0) > 0 and inputs.get("ptx_data") is None:
        wrong["ptx_data"] = f"ptx_coef = {config.ptx_coef:g} needs rows to learn from; give ptx_data, or ptx_coef=0"
    problems = [(name, f"{name}: {problem}") for name, problem in wrong.items() if problem]
    if problems:
        raise ConfigError(problems)


def path_problem(value: str, kind: str) -> str | None:
    """Why a value cannot be a model, data, ...; None when it exists or may be a hub id, a module or a package."""
    if value.startswith("<"):
        return f"{value} was handed over in Python and has no name; go on from Python"
    if "://" in value:
        return None
    try:
        if kind != "function" and modelscope_id(data_name(value).path if kind == "data" else value) is not None:
            return None
    except UserError as error:
        return str(error)
    if kind in ("reward", "function") and ":" in value and not Path(value).exists():
        value = value.rpartition(":")[0]
        if not value.endswith(".py"):
            return None
    split = None
    if kind == "data":
        value, _, split = data_name(value)
    path = Path(value)
    if split is not None and path.is_file():
        return f"{value} is a file, which has no split {split!r}; a folder or a hub id may have"
    if path.exists():
        wrong = kind == "model" and path.is_file() and path.suffix != ".gguf"
        return f"{value} is a file, but neither a model folder nor a .gguf file" if wrong else None
    suffixes = (*DATA_SUFFIXES, ".txt", ".arrow") if kind == "data" else (".gguf", ".py", ".jinja")
    # "out/sft" looks like a hub id, but not where a folder "out" stands.
    beside = len(path.parts) > 1 and Path(path.parts[0]).is_dir()
    if HUB_ID.fullmatch(value) and not beside and not value.startswith(".") and not value.endswith(suffixes):
        return None
    return f"{value} does not exist{_nearest(path)}"


def _output_problem(config: StageConfig) -> str | None:
    if config.output_dir is None:
        return NO_OUTPUT
    path = Path(config.output_dir)
    if path.exists() and not path.is_dir():
        return f"{path} is a file; name a folder"
    if config.resume or config.overwrite or not path.is_dir() or next(path.iterdir(), None) is None:
        return None
    return f"{path} is not empty; name another folder, or use --overwrite (resume=true goes on with its run)"


def _nearest(path: Path) -> str:
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, siblings, 1)
    return f"; did you mean {path.parent / close[0]}?" if close else ""


class _Dumper(yaml.SafeDumper):
    """Plain data, paths as text, other objects as "<name>"; no aliases, which the loader refuses."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _named(dumper: yaml.SafeDumper, value: object) -> yaml.Node:
    return dumper.represent_str(f"<{getattr(value, '__qualname__', type(value).__qualname__)}>")


_Dumper.add_multi_representer(object, _named)
_Dumper.add_multi_representer(Path, lambda dumper, path: dumper.represent_str(str(path)))


def resolved_yaml(stage: str, inputs: Mapping[str, Any], config: StageConfig) -> str:
    """The recipe with every field filled in, as YAML that load_recipe reads back to the same values.

    Objects handed over in Python (a model, a function) cannot be written: they stand as "<...>".
    """
    named = {name: inputs[name] for name in INPUTS[stage] if inputs.get(name) is not None}
    dumped = config.model_dump(mode="json")
    dumped |= {name: "auto" for name in AUTO if name in dumped and dumped[name] is None}
    fields = {field.name: dumped[field.name] for field in config_fields(type(config))}
    return yaml.dump(named | fields, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)
