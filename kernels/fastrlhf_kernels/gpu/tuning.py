"""What a chip offers, and the tile shapes that are shipped for it."""

from __future__ import annotations

from contextlib import contextmanager
from typing import NamedTuple

import torch

from ..backend import INTERPRET


class Chip(NamedTuple):
    """A target of the compiler: name, warp size, multiprocessors, shared memory of a block in bytes, whether it
    copies blocks of tensors by descriptor (TMA), and the least hidden size from which the cuBLAS product and a softmax
    pass beat exponentials in the product's epilogue (`linear_ppo_loss.py`), as `python -m bench.gpu_kernels` measures
    it. 0: from the first; no chip was measured yet.
    """

    name: str
    warp: int
    multiprocessors: int
    shared: int
    descriptors: bool = False
    softmax_from: int = 0


class Tile(NamedTuple):
    """Rows and columns of a block of elements, warps, pipeline stages, and the depth of a step of a matrix product."""

    rows: int
    columns: int
    warps: int
    stages: int = 2
    depth: int = 64

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
    ("_exponential_terms", "sm_100"): (8, "the same, in a pass over rows that hardly ever have to be computed again"),
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
    if torch.version.hip:
        name = about.gcnArchName.split(":")[0]
        base = CHIPS.get(name, CHIPS["gfx942"])
    else:
        name = f"sm_{about.major}{about.minor}"
        base = CHIPS.get(name, CHIPS["sm_100"] if about.major == 10 else CHIPS["sm_86"])  # 99 KiB fits all others
    return base._replace(name=name, multiprocessors=about.multi_processor_count)


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
    "sm_90": (Tile(128, 256, 8, 3), Tile(128, 128, 8, 3)),
    "sm_100": (Tile(128, 64, 8, 4), Tile(128, 64, 8, 3)),
    "interpreter": (Tile(64, 256, 4, 1, 64), Tile(64, 128, 4, 1, 64)),
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
    return DESCRIPTOR_TILES[chip.name][backward] if described else long


def product_splits(
    chip: Chip, blocks: int, vocabulary: int, tile: Tile, *, batch_invariant: bool = False
) -> tuple[int, int]:
    """(parts of the vocabulary, columns of a part): four waves of programs if parts of 4,096 columns allow it.

    A handful of rows (one block) may be split finer: there the weight is read once, and every multiprocessor must
    read a share of it. batch_invariant: parts of 4,096 columns, whatever the number of rows.
    """
    least = tile.columns if blocks == 1 else 4096
    wanted = -(-4 * chip.multiprocessors // max(1, blocks))
    splits = vocabulary // 4096 if batch_invariant else min(wanted, vocabulary // least)
    splits = max(1, min(splits, 1024))
    least = -(-vocabulary // splits)
    columns = -(-least // tile.columns) * tile.columns
    return -(-vocabulary // columns), columns


def ppo_plan(chip: Chip, width: int) -> str:
    """ "exponentials" or "softmax": the former where it was measured to be faster."""
    return "exponentials" if width < chip.softmax_from else "softmax"


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
