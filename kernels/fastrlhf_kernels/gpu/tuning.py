"""What a chip offers, and the tile shapes that are shipped for it."""

from __future__ import annotations

from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

import torch

from ..backend import INTERPRET


class Chip(NamedTuple):
    """A target of the compiler: name, warp size, multiprocessors, shared memory of a block in bytes, and whether it
    copies blocks of tensors by descriptor (TMA).
    """

    name: str
    warp: int
    multiprocessors: int
    shared: int
    descriptors: bool = False


class Tile(NamedTuple):
    """Rows and columns of a block of elements, warps, pipeline stages, the depth of a step of a matrix product, whether
    its epilogue takes one half of the columns after the other (registers), and how many blocks a multiprocessor holds.
    """

    rows: int
    columns: int
    warps: int
    stages: int = 2
    depth: int = 64
    halves: bool = False
    resident: int = 1

    def constants(self) -> dict[str, int]:
        return {"ROWS": self.rows, "COLUMNS": self.columns, "DEPTH": self.depth}


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("sm_80", 32, 108, 163 * 1024),
        Chip("sm_86", 32, 84, 99 * 1024),
        Chip("sm_89", 32, 142, 99 * 1024),
        Chip("sm_90", 32, 132, 227 * 1024, True),
        Chip("sm_100", 32, 148, 227 * 1024, True),
        Chip("gfx942", 64, 304, 64 * 1024),
    )
}
# (kernel, chip) -> bytes of stack that are accepted, and why; at most two (bench/compile_kernels.py)
STACK_ALLOWED: dict[tuple[str, str], tuple[int, str]] = {
    ("_gae", "sm_80"): (8, "Triton 3.6 only: two registers, spilled to reach the next step of occupancy"),
}
INTERPRETER = Chip("interpreter", 32, 2, 1 << 30)
_chosen: Chip | None = None
_chips: dict[int, Chip] = {}


@contextmanager
def pretend(chip: Chip):
    """Launchers choose their tiles for `chip` in this context, whatever the machine has."""
    global _chosen
    before, _chosen = _chosen, chip
    try:
        yield chip
    finally:
        _chosen = before


def chip_of(device: torch.device) -> Chip:
    """The chip of a device: one of CHIPS with the device's own number of multiprocessors; read once a device."""
    if _chosen is not None:
        return _chosen
    if INTERPRET:
        return INTERPRETER
    index = torch.cuda.current_device() if device.index is None else device.index
    if index not in _chips:
        _chips[index] = _read(index)
    return _chips[index]


def _read(index: int) -> Chip:
    about = torch.cuda.get_device_properties(index)
    name = about.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{about.major}{about.minor}"
    return chip_named(name)._replace(multiprocessors=about.multi_processor_count)


def chip_named(name: str) -> Chip:
    """The chip of a name such as "sm_103" or "gfx950": one of CHIPS, or what is like it as far as is known."""
    if name in CHIPS:
        return CHIPS[name]
    if name.startswith("gfx"):
        like = "gfx942"
    else:
        like = "sm_100" if name in ("sm_101", "sm_103") else "sm_86"  # 99 KiB of shared memory fit all others
    return CHIPS[like]._replace(name=name)


# --- elementwise sweeps over rows of logits ---

ROW_TILES = {  # most columns at once that stay in registers: kernels of one read (forward) and of read and write
    "sm_80": Tile(1, 4096, 8),
    "sm_90": Tile(1, 4096, 8),
    "sm_100": Tile(1, 4096, 8),
    "gfx942": Tile(1, 4096, 8),
    "interpreter": Tile(16, 1024, 4),
}


def row_tile(chip: Chip, columns: int) -> Tile:
    """Tile of a sweep over rows of `columns` elements: short rows share a program, long ones are looped over."""
    shipped = ROW_TILES.get(chip.name, ROW_TILES["sm_80"])
    width = min(shipped.columns, max(16, 1 << (columns - 1).bit_length()))
    rows = min(16, shipped.rows * shipped.columns // width)
    return Tile(rows, width, max(1, min(shipped.warps, rows * width // 512)))


def row_splits(chip: Chip, programs: int, columns: int, tile: Tile) -> int:
    """Parts into which the columns of a row go, so that few rows still fill the chip: a power of two, at most 64."""
    wanted = -(-4 * chip.multiprocessors // max(1, programs))
    possible = -(-columns // tile.columns)
    return max(1, min(64, 1 << (wanted - 1).bit_length(), 1 << (possible - 1).bit_length()))


# --- matrix products with the softmax behind them ---

PRODUCT_TILES = {  # half precision: (long batches, decode-sized batches). Pointer loads: 128 columns spill on sm_100
    "sm_80": (Tile(128, 128, 8, 3), Tile(16, 128, 4, 4, 128)),
    "sm_86": (Tile(128, 128, 8, 2), Tile(16, 128, 4, 2, 128)),
    "sm_89": (Tile(128, 128, 8, 2), Tile(16, 128, 4, 2, 128)),
    "sm_90": (Tile(128, 128, 8, 3), Tile(16, 128, 4, 4, 128)),
    "sm_100": (Tile(128, 64, 8, 3), Tile(16, 128, 4, 4, 128)),
    "gfx942": (Tile(128, 128, 8, 1), Tile(16, 128, 4, 1, 128)),
    "interpreter": (Tile(64, 256, 4, 1, 64), Tile(16, 256, 4, 1, 64)),
}
DESCRIPTOR_TILES = {  # the same with tensor descriptors, and for the backward
    "sm_90": (Tile(128, 256, 8, 3, halves=True), Tile(128, 128, 8, 3, halves=True, resident=2)),
    "sm_100": (Tile(128, 64, 8, 4), Tile(128, 64, 8, 3)),
    "interpreter": (Tile(64, 256, 4, 1, 64, halves=True), Tile(64, 128, 4, 1, 64, halves=True)),
}
ADAPTER_TILE = Tile(128, 64, 8, 3)  # with LoRA: the fp32 operands of the adapter need registers too
FP32_TILE = Tile(32, 64, 8, 2, 32)  # IEEE fp32 has no tensor core: larger tiles spill
FP32_NARROW_TILE = Tile(32, 32, 8, 2, 32)  # storing the sums of every block, or an adapter, costs registers too


def product_tile(
    chip: Chip, n: int, half: bool, *, adapter=False, batch_invariant=False, backward=False, described=False
) -> Tile:
    """Tile of a product with the head for `n` rows, `half`: of bf16 or fp16; batch_invariant: the same for every n;
    described: its operands are tensor descriptors.
    """
    if not half and chip.name != "interpreter":
        return FP32_NARROW_TILE if adapter else FP32_TILE
    long, short = PRODUCT_TILES.get(chip.name, PRODUCT_TILES["sm_86"])
    if n <= 16 and not batch_invariant and not backward:
        return short
    if adapter and chip.name != "interpreter":
        return ADAPTER_TILE
    return DESCRIPTOR_TILES.get(chip.name, DESCRIPTOR_TILES["sm_100"])[backward] if described else long


@lru_cache(maxsize=4096)
def product_splits(
    chip: Chip, blocks: int, vocabulary: int, tile: Tile, *, batch_invariant: bool = False
) -> tuple[int, int]:
    """(parts of the vocabulary, columns of a part) with which `blocks` blocks of rows end soonest on this chip.

    Programs run in waves of as many as the chip holds, and a wave that is hardly begun costs a whole one. Of all parts
    of at least 512 columns, at most 128 (one block of rows: of a tile, at most 1,024, as the weight is read once and
    every multiprocessor must read a share) those with the fewest tiles one after the other, give or take 2 %, and of
    those the fewest.
    batch_invariant: parts of 4,096 columns, whatever the number of rows.
    """
    if batch_invariant:
        equal = -(-vocabulary // max(1, min(vocabulary // 4096, 1024)))
        columns = -(-equal // tile.columns) * tile.columns
        return -(-vocabulary // columns), columns
    slots, tiles = chip.multiprocessors * tile.resident, -(-vocabulary // tile.columns)
    most, smallest = (1024, 1) if blocks <= 1 else (128, max(1, 512 // tile.columns))
    waves = {
        part: -(-max(1, blocks) * -(-tiles // part) // slots) * part
        for part in range(min(tiles, max(smallest, -(-tiles // most))), tiles + 1)
    }
    enough = 1.02 * min(waves.values())
    part = max(part for part, cost in waves.items() if cost <= enough)
    return -(-tiles // part), part * tile.columns


# --- decode attention ---


def attention_tile(chip: Chip, size: int, element_size: int) -> Tile:
    """Tile for heads of `size` numbers: 16 query heads, positions of a step, and the size as a power of two."""
    depth = max(16, 1 << (size - 1).bit_length())
    warps = 8 if depth > 128 else 4
    if element_size == 4:  # IEEE fp32 has no tensor core: larger tiles spill
        return Tile(16, max(16, min(32, 2048 // depth)), warps, 1 if depth > 128 else 2, depth)
    return Tile(16, max(16, min(64, 8192 // depth)), warps, 2, depth)  # keys and values of 32 KiB a stage


def attention_splits(chip: Chip, programs: int, positions: int) -> int:
    """Parts of the positions, of at least 128: two programs a multiprocessor, if there are not that many anyway."""
    wanted = -(-2 * chip.multiprocessors // max(1, programs))
    return max(1, min(wanted, positions // 128, 64))
