"""Whether all ranks were started for the same run: the same fields, packages and rows.

Ranks that differ would not fail, they would train on what no single command says: each computes its share of the rows
as its own configuration has it. So they compare before any model is loaded.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Sequence

import torch

from fastrlhf.checkpoint.store import versions
from fastrlhf.config.base import StageConfig
from fastrlhf.config.errors import UserError
from fastrlhf.runtime import distributed


def check_same_run(config: StageConfig, rows: Iterable[Sequence[int]]) -> None:
    """UserError, the same in all ranks, that names the first rank which differs from the lead and in what. rows: token
    ids of all that the run reads, in order. Of one rank nothing is read."""
    if distributed.size() == 1:
        return
    fields = {name: json.dumps(value) for name, value in json.loads(config.model_dump_json()).items()}
    own = {"fields": fields, "packages": versions(), "rows": _digest(rows)}
    sent = torch.frombuffer(bytearray(json.dumps(own).encode()), dtype=torch.uint8)
    lead, *others = (json.loads(bytes(part.tolist())) for part in distributed.gather_each(sent))
    for rank, other in enumerate(others, start=1):
        for kind, remedy in (("fields", "start all ranks with one command"), ("packages", "install the same in both")):
            for name in sorted(lead[kind].keys() | other[kind].keys()):
                here, there = lead[kind].get(name), other[kind].get(name)
                if here != there:
                    raise UserError(f"{name}: rank {rank} has {there}, and rank 0 has {here}; {remedy}")
        if lead["rows"] != other["rows"]:
            raise UserError(
                f"data: rank {rank} reads other rows than rank 0, or through another tokenizer; give all ranks the "
                "same files"
            )


def _digest(rows: Iterable[Sequence[int]]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for row in rows:
        digest.update(array("q", [len(row), *row]).tobytes())
    return digest.hexdigest()
