"""Replies of a model to label: sampled once, kept beside the output, read again when the work goes on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from fastrlhf import inference
from fastrlhf.checkpoint.atomic import sha256
from fastrlhf.config.errors import UserError
from fastrlhf.data.dataset import load_prompts
from fastrlhf.label.items import Item, Say, read_items, unusable
from fastrlhf.models.sources import locate


def replies_path(output: Path) -> Path:
    """Where the replies that are judged in `output` are kept: feedback.jsonl -> feedback.replies.jsonl."""
    return output.with_suffix(".replies.jsonl")


def sampled_items(prompts: str, policy: str, output: Path, say: Say, *, n: int, **sampling: Any) -> list[Item]:
    """Items with n replies of the policy to each prompt; sampling: the other options of `inference.sample`.

    The file of replies beside `output` has its rows as `generate --output` writes them, with token ids, model and hash.
    Where it is there already nothing is sampled. UserError where it came of other prompts, weights or settings.
    """
    path = replies_path(output)
    settings = {"policy": policy, "n": n, **sampling}
    if path.exists():
        _check(path, settings, policy)
    else:
        _sample(prompts, policy, path, settings, say)
    return read_items(path, prompts, say)


def _check(path: Path, settings: dict[str, Any], policy: str) -> None:
    """UserError where the replies in a file are not those that would be sampled now."""
    first = load_prompts(path)[0][0].columns
    before, remedy = first.get("sampled_with"), f"name another --output, or judge these replies with --replies {path}"
    if before != settings:
        raise UserError(f"--output: {path} holds replies sampled with {json.dumps(before)}; {remedy}")
    if first.get("model_hash") != weights_hash(policy):
        raise UserError(f"--policy: the weights of {policy!r} are no longer those that wrote {path}; {remedy}")


def _sample(prompts: str, policy: str, path: Path, settings: dict[str, Any], say: Say) -> None:
    inference.check_output(str(path), overwrite=False)
    asked = list({json.dumps(row.prompt): row for row in load_prompts(prompts)[0]}.values())
    options = {name: value for name, value in settings.items() if name != "policy"}
    replies = inference.sample_all(policy, asked, say, **options)
    digest = weights_hash(policy)
    about = {"model": policy, "model_hash": digest, "sampled_with": settings}
    rows = [
        {"prompt": prompt.prompt, "response": reply.text, "response_ids": reply.ids, **about}
        for prompt, sampled in zip(asked, replies, strict=True)
        for reply in sampled
        if unusable(reply.text) is None
    ]
    left_out = sum(map(len, replies)) - len(rows)
    if left_out:
        say(f"{left_out} replies are empty or hold a NUL character and are left out")
    inference.write_rows(str(path), rows)


def weights_hash(source: str) -> str | None:
    """SHA-256 over names and contents of a model's weight files; None: a hub id that is not in the cache."""
    where, extra = locate(source, "--policy")
    folder = Path(where)
    if not folder.is_dir():
        config = try_to_load_from_cache(where, "config.json")
        if not isinstance(config, str):
            return None
        folder = Path(config).parent
    files = [folder / extra["gguf_file"]] if extra else sorted(folder.glob("*.safetensors"))
    lines = "".join(f"{sha256(file)}  {file.name}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()
