"""Where a model comes from (folder, hub id, GGUF file, `package://NAME/FILE`), and transformers' loader with its errors
in one sentence. Safetensors only, no code of the model's own."""

from __future__ import annotations

import io
import math
import os
import struct
import sys
from collections.abc import Callable
from contextlib import nullcontext, redirect_stderr
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError
from transformers import PreTrainedModel

from fastrlhf.checkpoint.quiet import quiet_loading
from fastrlhf.config.errors import UserError
from fastrlhf.config.outcome import outcome
from fastrlhf.data.sources import is_packaged, modelscope_folder, packaged_file
from fastrlhf.models import adapter_folder, moss
from fastrlhf.runtime.hardware import installed

T = TypeVar("T")


# Of the values in a GGUF header by their type: bytes of one. 8 is a text, 9 a list.
_GGUF_VALUES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


@lru_cache(maxsize=32)
def _missing_bytes(path: str, size: int, _: int) -> int:
    """Bytes, at least, that a GGUF file of this size lacks of what its header says; 0: none, or a header of another
    kind. To read it as far as it goes takes transformers a minute. _: when the file was changed.

    Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian).
    """
    from gguf import GGML_QUANT_SIZES

    with open(path, "rb") as file:

        def numbers(form: str) -> tuple[int, ...]:
            data = file.read(struct.calcsize(f"<{form}"))
            return struct.unpack(f"<{form}", data)

        def skip(kind: int) -> None:
            if kind == 9:
                kind, count = numbers("IQ")
                if kind in _GGUF_VALUES:
                    file.seek(count * _GGUF_VALUES[kind], os.SEEK_CUR)
                    return
                for _ in range(count):
                    skip(kind)
                    if file.tell() > size:
                        raise struct.error
                return
            file.seek(numbers("Q")[0] if kind == 8 else _GGUF_VALUES[kind], os.SEEK_CUR)

        try:
            magic, version, tensors, values = numbers("4sIQQ")
            if magic != b"GGUF" or version not in (2, 3):
                return 0
            alignment, ends = 32, [0]
            for _ in range(values):
                key = file.read(numbers("Q")[0])
                (kind,) = numbers("I")
                if key == b"general.alignment" and kind == 4:
                    (alignment,) = numbers("I")
                else:
                    skip(kind)
            for _ in range(tensors):
                file.seek(numbers("Q")[0], os.SEEK_CUR)
                (dimensions,) = numbers("I")
                *shape, kind, offset = numbers(f"{dimensions}QIQ")
                block, width = GGML_QUANT_SIZES[kind]
                ends.append(offset + math.prod(shape) // block * width)
            start = -(-file.tell() // alignment) * alignment
        except struct.error:  # the header itself is cut
            return max(1, file.tell() - size)
        except (LookupError, OSError, OverflowError, MemoryError, RecursionError):  # a kind that is not known here
            return 0
    return max(0, start + max(ends) - size)


def locate(source: str, role: str) -> tuple[str, dict]:
    """-> (what from_pretrained takes, extra arguments). Folders, hub ids, GGUF files, `package://NAME/FILE`, ids of
    ModelScope, which are downloaded: then their folder."""
    text = str(source)
    if is_packaged(text):
        text = str(packaged_file(text, role))
    downloaded = modelscope_folder(text, role)
    if downloaded is not None:
        text = str(downloaded)
        if adapter_folder.is_adapter(text):
            raise UserError(f"{role}: {source} is an adapter; name its folder, {text}, to load it with its base")
    path = Path(text)
    if text.endswith(".gguf"):
        if not path.is_file():
            raise UserError(f"{role}: the GGUF file {text!r} does not exist")
        if not (installed("gguf") and installed("accelerate")):
            raise UserError(f"{role}: {text!r} is a GGUF file and needs `pip install gguf accelerate`")
        stat = path.stat()
        missing = _missing_bytes(text, stat.st_size, stat.st_mtime_ns)
        if missing:
            raise UserError(f"{role}: the GGUF file {text!r} is cut short by {missing} bytes or more; get it again")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        ggufs = sorted(path.glob("*.gguf"))
        if not (path / "config.json").exists() and ggufs:
            return locate(str(ggufs[0]), role)
        if not (path / "config.json").exists() and not adapter_folder.is_adapter(path):
            raise UserError(f"{role}: the folder {text!r} holds no config.json, so it is no model folder")
    elif text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise UserError(f"{role}: the folder {text!r} does not exist")
    return text, {}


def load_pretrained(auto: type, source: str, role: str, **kwargs: object) -> PreTrainedModel:
    where, extra = locate(source, role)
    options = {"output_loading_info": True, **extra, **kwargs}
    if not extra:  # a folder or hub id: safetensors only, a pickle can run code
        options["use_safetensors"] = True
        moss.check_stock(where, role)
    # Reading a GGUF file draws a bar of its own, which into a file is a line a tensor.
    silent = redirect_stderr(io.StringIO()) if extra and not sys.stderr.isatty() else nullcontext()
    with silent, quiet_loading():
        model, info = loaded(role, source, lambda: auto.from_pretrained(where, trust_remote_code=False, **options))
    if moss.REWARD_HEAD in info["unexpected_keys"]:  # of a hub id, whose files were not looked into
        moss.refuse_reward_head(str(source), role)
    if info["missing_keys"]:  # transformers would fill them with random numbers
        missing = sorted(info["missing_keys"])[0]
        raise UserError(f"{role}: {str(source)!r} has no weights for {missing!r}; it is no {type(model).__name__}")
    return model


def loaded(role: str, source: object, load: Callable[[], T]) -> T:
    """What a library makes of files of others: whatever it raises over them is one UserError. `load` calls the library
    and nothing of ours."""
    result, error = outcome(load)
    if error is not None:
        remedy = moss.remedy_for(str(source), str(error))
        raise UserError(f"{role}: cannot load {str(source)!r}: {remedy or reason(error)}") from error
    return result


def reason(error: BaseException) -> str:
    """The first line of an error, with its type where the text alone says little."""
    lines = str(error).strip().splitlines() or [""]
    plain = isinstance(error, (OSError, ValueError, RuntimeError, SafetensorError)) and lines[0]
    return lines[0] if plain else f"{type(error).__name__}: {lines[0]}"
