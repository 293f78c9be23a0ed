"""quickstart.yaml and field=value overrides, read into one typed config a stage."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fastrlhf.config.base import StageConfig
from fastrlhf.config.errors import ConfigError, UserError
from fastrlhf.config.recipe import parse_overrides, read_recipe
from fastrlhf.config.stages import CONFIGS

RECIPE = Path(__file__).parent / "quickstart.yaml"
GENERAL = {"seed": "0", "output_dir": "runs/quickstart", "overwrite": "false", "resume": "false"}


@dataclass(frozen=True)
class Settings:
    """What a quickstart runs with; stages: the configs of sft, reward and ppo, their folders inside output_dir."""

    seed: int
    output_dir: Path
    overwrite: bool
    resume: bool
    stages: dict[str, StageConfig]

    def yaml(self) -> str:
        """A recipe that `load_settings` reads back to the same values."""
        dumped = {
            name: config.model_dump(mode="json", exclude={*GENERAL}, exclude_none=True)
            for name, config in self.stages.items()
        }
        return yaml.safe_dump({"seed": self.seed, "output_dir": str(self.output_dir), **dumped}, sort_keys=False)


def load_settings(overrides: list[str]) -> Settings:
    """The packaged recipe (when resuming: the one in output_dir) with overrides such as "seed=1", "ppo.kl_coef=0.1".

    UserError names the field, its value and what is expected.
    """
    given = parse_overrides(overrides)
    resume = str(given.get("resume", "false")).lower() == "true"
    path = Path(given.get("output_dir", GENERAL["output_dir"])) / "config.yaml" if resume else RECIPE
    if not path.is_file():
        raise UserError(f"output_dir: {str(path.parent)!r} holds no quickstart to resume")
    values, _ = read_recipe(path)
    general: dict[str, Any] = GENERAL | {name: values[name] for name in GENERAL if name in values}
    stages: dict[str, dict[str, Any]] = {name: dict(values.get(name) or {}) for name in CONFIGS}
    for name, value in given.items():
        stage, dot, field = name.partition(".")
        if not dot and name in GENERAL:
            general[name] = value
        elif dot and stage in stages and field not in GENERAL:
            stages[stage][field] = value
        else:
            raise UserError(_unknown(name, stages))
    return _typed(general, stages)


def _unknown(name: str, stages: dict[str, dict[str, Any]]) -> str:
    if name.partition(".")[2] in GENERAL:
        return f"{name}: a quickstart has one {name.partition('.')[2]}; write {name.partition('.')[2]}=..."
    known = [*GENERAL, *(f"{stage}.{field}" for stage in stages for field in CONFIGS[stage].model_fields)]
    close = difflib.get_close_matches(name, known, 1) or [k for k in known if k.endswith(f".{name}")]
    hint = f"did you mean {' or '.join(close[:3])}?" if close else f"use {', '.join(GENERAL)} or STAGE.FIELD"
    return f"{name}: no such field; {hint}"


def _typed(general: dict[str, Any], stages: dict[str, dict[str, Any]]) -> Settings:
    """Values as the stages' own configs type them; a problem carries the stage's name."""
    configs, problems = {}, []
    for stage, fields in stages.items():
        shared = {**general, "output_dir": str(Path(general["output_dir"]) / stage)}
        try:
            configs[stage] = CONFIGS[stage](**fields, **shared)
        except ConfigError as error:
            for name, text in error.problems:
                problems.append((name, text if name in GENERAL else f"{stage}.{text}"))
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))  # one problem of a general field, not one a stage
    any_stage = configs["sft"]
    return Settings(any_stage.seed, Path(general["output_dir"]), any_stage.overwrite, any_stage.resume, configs)
