"""What the launchers would start on cards that are not here: on `meta` tensors, with a recorder in the GPU's place."""

from __future__ import annotations

import heapq
import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="the launchers import it")

from fastrlhf_kernels import backend
from fastrlhf_kernels.gpu import attention, linear_log_probs, linear_ppo_loss, log_probs, sampling, tuning
from fastrlhf_kernels.gpu.launch import recorded
from fastrlhf_kernels.operands import Head, LossOptions, Need, Rows, Tokens

CHIPS = [f"sm_{number}" for number in (80, 86, 87, 89, 90, 100, 101, 103, 110, 120, 121, 200)]
CHIPS += ["gfx90a", "gfx942", "gfx950", "gfx1100", "gfx_new"]


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def head_of(n: int, vocabulary: int, width: int, dtype: torch.dtype) -> Head:
    operands = (meta(n, width, dtype=dtype), meta(vocabulary, width, dtype=dtype), meta(n, dtype=torch.int64))
    return Head(*operands, None, None, 1.0, 1.0, None, None, None, 1.0)


def step(n: int, vocabulary: int, width: int, dtype: torch.dtype) -> None:
    """What a training step launches for the head, from hidden states and from logits."""
    head, row = head_of(n, vocabulary, width, dtype), meta(n)
    tokens = Tokens(row, row, meta(n, dtype=torch.bool), None, None)
    options, need = LossOptions(0.2, 0.2, None), Need(True, True, False, False)
    linear_log_probs.linear_forward(head, entropy=True)
    linear_log_probs.linear_backward(head, row, None, None, row, row, need)
    linear_ppo_loss.linear_ppo(head, tokens, meta(), options, need)
    rows = Rows(meta(n, vocabulary, dtype=dtype), head.labels, None, 1.0)
    log_probs.rows_forward(rows, -100, True)
    log_probs.rows_backward(rows, -100, row, None, row, row, row)
    log_probs.rows_ppo(rows, tokens, meta(), options, rows.logits)


@pytest.mark.parametrize("name", CHIPS)
def test_every_card_has_tiles_for_every_shape(name):
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    with tuning.pretend(tuning.chip_named(name)), recorded() as launches:
        for n, dtype in itertools.product((0, 1, 17, 4096), dtypes):
            step(n, 151936 if n > 1 else 32001, 896, dtype)
        step(300, 2, 44, torch.bfloat16)
        for batch, dtype in itertools.product((1, 64), dtypes):
            index, logits = meta(batch, dtype=torch.int64), meta(batch, 50257, dtype=dtype)
            sampling.draw(logits, 0.7, 50, 0.9, 1, index, index)
            q, cache = meta(batch, 8, 64, dtype=dtype), meta(batch, 700, 2, 64, dtype=dtype)
            attention.attend(q, cache, cache, meta(batch, dtype=torch.int32), 0.1, None, None)
    started = {launch.kernel.fn.__name__ for launch in launches}
    assert {"_linear_forward", "_linear_backward", "_relative", "_again", "_ppo", "_forward", "_backward"} <= started


@pytest.mark.parametrize("descriptors", [False, True])
def test_an_unknown_card_with_descriptors_too(descriptors):
    with tuning.pretend(tuning.Chip("sm_999", 32, 100, 100 * 1024, descriptors)), recorded() as launches:
        step(300, 32001, 896, torch.bfloat16)
    assert launches[0].constants["DESCRIPTORS"] is descriptors


def test_a_descriptor_is_never_of_an_expanded_row():
    head = head_of(64, 1000, 64, torch.bfloat16)
    expanded = head._replace(hidden=meta(1, 64, dtype=torch.bfloat16).expand(64, 64))
    for given, described in ((head, True), (expanded, False)):
        with tuning.pretend(tuning.CHIPS["sm_90"]), recorded() as launches:
            linear_log_probs.linear_forward(given, entropy=False)
        assert launches[0].constants["DESCRIPTORS"] is described


class Operations(TorchDispatchMode):
    """What torch itself would start on a device: everything but views and empty tensors."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        view = any(argument.alias_info and not argument.alias_info.is_write for argument in func._schema.arguments)
        if "empty" not in name and not view:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("top_k", "top_p", "most"),
    [(0, 1.0, 2), (50, 1.0, 4), (50, 0.9, 4), (1, 1.0, 4), (256, 0.9, 4), (0, 0.9, 8), (20_000, 1.0, 8)],
)
@pytest.mark.parametrize("vocabulary", [32001, 151936, 256000])
@pytest.mark.parametrize("chip", [chip for chip in tuning.CHIPS.values()], ids=lambda chip: chip.name)
def test_launches_of_a_step_of_sampling(chip, vocabulary, top_k, top_p, most):
    index, logits = meta(64, dtype=torch.int64), meta(64, vocabulary, dtype=torch.bfloat16)
    with tuning.pretend(chip), recorded() as launches, Operations() as started:
        sampling.draw(logits, 0.7, top_k, top_p, 1, index, index)
    most = 14 if chip.warp == 64 and top_k == 256 and vocabulary > 50_000 else most  # a program there holds half of it
    assert len(launches) + len(started.names) <= most, (launches, started.names)
    assert len(launches) >= 2


def efficiency(chip: tuning.Chip, blocks: int, vocabulary: int, tile: tuning.Tile) -> float:
    """The ideal time over that of programs which each go to the first free place, in tiles."""
    parts, columns = tuning.product_splits(chip, blocks, vocabulary, tile)
    places = [0] * (chip.multiprocessors * tile.resident)
    for part in range(parts):
        work = -(-min(columns, vocabulary - part * columns) // tile.columns)
        for _ in range(blocks):
            heapq.heapreplace(places, places[0] + work)
    return blocks * -(-vocabulary // tile.columns) / len(places) / max(places)


@pytest.mark.parametrize("n", [256, 300, 512, 700, 1024, 2048, 3456, 4096, 6144, 8192, 16384])
@pytest.mark.parametrize("name", ["sm_80", "sm_90", "sm_100"])
def test_no_wave_of_programs_is_hardly_begun(name, n):
    chip = tuning.CHIPS[name]
    tile = tuning.product_tile(chip, n, True, described=chip.descriptors)
    assert efficiency(chip, -(-n // tile.rows), 151936, tile) >= 0.95
    assert efficiency(chip, -(-n // tile.rows), 256000, tile) >= 0.94


def test_parts_cover_the_vocabulary_without_an_empty_one():
    for chip in tuning.CHIPS.values():
        for blocks, vocabulary in itertools.product((0, 1, 3, 64), (1, 100, 4097, 50257, 151936)):
            tile = tuning.product_tile(chip, 128 * blocks, True)
            for invariant in (False, True):
                parts, columns = tuning.product_splits(chip, blocks, vocabulary, tile, batch_invariant=invariant)
                assert columns % tile.columns == 0 and (parts - 1) * columns < vocabulary <= parts * columns


@pytest.mark.skipif(backend.INTERPRET, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("vocabulary", [151936, 50257])
def test_ragged_micro_batches_compile_each_kernel_once_or_twice(vocabulary):
    """A compilation takes seconds: none may wait for a batch of a certain size in the middle of a run."""
    from bench.compile_kernels import specialised

    generator = torch.Generator().manual_seed(0)
    with tuning.pretend(tuning.CHIPS["sm_90"]), recorded() as launches:
        for n in torch.randint(300, 4097, (60,), generator=generator).tolist():
            step(n, vocabulary, 896, torch.bfloat16)
    kernels: dict[str, list] = {}
    for launch in launches:
        kind = (specialised(launch), launch.constants, launch.warps, launch.stages)
        seen = kernels.setdefault(launch.kernel.fn.__name__, [])
        if kind not in seen:
            seen.append(kind)
    assert len(kernels) >= 5
    assert {name: len(kinds) for name, kinds in kernels.items() if len(kinds) > 2} == {}


@pytest.mark.parametrize("vocabulary", [50257, 32001, 1000, 3])
def test_rows_of_an_odd_vocabulary_start_at_multiples_of_64(vocabulary):
    """So that cuBLAS and the kernels move 16 bytes at once."""
    head, row = head_of(300, vocabulary, 64, torch.bfloat16), meta(300)
    need = Need(True, True, False, False)
    with tuning.pretend(tuning.CHIPS["sm_90"]), recorded() as launches:
        linear_log_probs.linear_backward(head, row, None, None, row, row, need)
        tokens = Tokens(row, row, meta(300, dtype=torch.bool), None, None)
        linear_ppo_loss.linear_ppo(head, tokens, meta(), LossOptions(0.2, 0.2, None), need)
    strides = [launch.arguments[4] for launch in launches if launch.kernel.fn.__name__ == "_linear_backward"]
    strides += [launch.arguments[0].logits_stride for launch in launches if launch.kernel.fn.__name__ == "_relative"]
    assert len(strides) >= 2 and all(stride % 64 == 0 for stride in strides)
