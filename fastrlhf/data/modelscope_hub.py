"""ModelScope: a model or data set of that hub is downloaded by its own package into its cache, and read as a folder."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from fastrlhf.config.errors import UserError
from fastrlhf.config.inputs import modelscope_id
from fastrlhf.config.outcome import outcome

UNUSED = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.onnx", "*.gguf"]  # weights that are not read


def modelscope_folder(text: str, role: str, *, data: bool = False) -> Path | None:
    """The folder of a model, or with `data` of a data set, that `text` names on ModelScope; None: it names none there.

    Downloaded once a process; what lies in modelscope's cache is not fetched again. Raises UserError as `modelscope_id`
    does, and where it cannot be downloaded.
    """
    name = modelscope_id(text)
    if name is None:
        return None
    folder, error = outcome(lambda: _downloaded(name, data))
    if error is not None or folder is None:
        kind = "data set" if data else "model"
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{role}: the {kind} {name!r} cannot be had from ModelScope ({reason})") from error
    return folder


@cache
def _downloaded(name: str, data: bool) -> Path:
    import modelscope  # of the user's choice; nothing of it is needed elsewhere

    if data:
        return Path(modelscope.dataset_snapshot_download(name))
    return Path(modelscope.snapshot_download(name, ignore_patterns=UNUSED))
