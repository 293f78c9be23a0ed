"""Hidden states to a sampled token: the head's product with the sampler behind it, for the steps of a decode.

Without filters no logits are stored: `_linear_sums` leaves the maximum and the sum of exponentials of every block of
the vocabulary, and `_linear_draw` computes the logits of the one block again that holds the drawn point. Top-k and
top-p look at logits several times: then they are stored in fp32, and `triton_sampling.draw` takes over.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .triton_head import Head, head_logits
from .triton_launch import launch
from .triton_sampling import choose_block, draw, finish, outputs, uniform
from .triton_terms import LOG2E, finite


@triton.jit(do_not_specialize=["n"])
def _linear_sums(
    x, w, bias, v, lora_b, tops, totals, logits,
    n, vocabulary, width, rank, x_stride, w_stride, temperature, logit_scale, softcap, row_blocks, blocks, part_blocks,
    STORE: tl.constexpr, BIAS: tl.constexpr, LORA: tl.constexpr, SOFTCAP: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, LORA_PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)  # divided in 32 bits: a division in 64 is a call
    rows = (program % row_blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = rows < n
    scale = LOG2E / (tl.full((), 1.0, tl.float32) * temperature)
    first = (program // row_blocks) * part_blocks
    for block in range(first, tl.minimum(first + part_blocks, blocks)):
        columns = block * COLUMNS + tl.arange(0, COLUMNS).to(tl.int64)
        column_live = columns < vocabulary
        z, _ = head_logits(x, w, bias, v, lora_b, rows, columns, live, column_live, x_stride, w_stride, width, rank,
                           logit_scale, softcap, 0, 0, False, BIAS, LORA, SOFTCAP, WIDE, PRECISION, LORA_PRECISION,
                           ROWS, COLUMNS, DEPTH)  # fmt: skip
        if STORE:
            place = rows[:, None] * vocabulary + columns[None, :]
            tl.store(logits + place, z, mask=live[:, None] & column_live[None, :])
        else:
            z = tl.where(column_live[None, :], z, float("-inf"))
            top = tl.max(z, 1)
            e = tl.exp2((z - finite(top)[:, None]) * scale)
            tl.store(tops + rows * blocks + block, top, mask=live)
            tl.store(totals + rows * blocks + block, tl.sum(e, 1), mask=live)


@triton.jit(do_not_specialize=["seed"])
def _linear_draw(
    x, w, bias, v, lora_b, tops, totals, streams, offsets, tokens, log_probs, policy_log_probs,
    vocabulary, width, rank, x_stride, w_stride, temperature, logit_scale, softcap, blocks, seed,
    GREEDY: tl.constexpr, BIAS: tl.constexpr, LORA: tl.constexpr, SOFTCAP: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    scale = LOG2E / (tl.full((), 1.0, tl.float32) * temperature)
    u = uniform(seed.to(tl.uint64), tl.load(streams + row), tl.load(offsets + row))
    chosen, fraction, highest, mass = choose_block(tops, totals, row, u, blocks, scale, GREEDY, BLOCKS)
    column = chosen.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < vocabulary
    depth = tl.arange(0, DEPTH)
    z = tl.zeros((COLUMNS,), tl.float32)
    for low in range(0, width, DEPTH):
        here = low + depth < width
        a = tl.load(x + row * x_stride + low + depth, mask=here, other=0.0).to(tl.float32)
        b = tl.load(w + column[:, None] * w_stride + (low + depth)[None, :], mask=inside[:, None] & here[None, :],
                    other=0.0).to(tl.float32)  # fmt: skip
        z += tl.sum(a[None, :] * b, 1)
    if LORA:
        for low in range(0, rank, 16):
            narrow = low + tl.arange(0, 16)
            a = tl.load(v + row * rank + narrow, mask=narrow < rank, other=0.0)
            b = tl.load(lora_b + column[:, None] * rank + narrow[None, :],
                        mask=inside[:, None] & (narrow < rank)[None, :], other=0.0)  # fmt: skip
            z += tl.sum(a[None, :] * b, 1)
    if BIAS:
        z += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    z = z * logit_scale
    if SOFTCAP:
        z = softcap * (1.0 - 2.0 / (tl.exp(z * (2.0 / softcap)) + 1.0))
    finish(z, column, inside, row, fraction, highest, mass, mass, scale, tokens, log_probs, policy_log_probs,
           GREEDY, COLUMNS)  # fmt: skip


def linear_draw(head: Head, temperature: float, top_k: int, top_p: float, seed: int, offset: Tensor, stream: Tensor):
    """tokens [B] int64, log_probs [B] and policy_log_probs [B] in fp32, as `triton_sampling.draw` of the logits.

    Memory: 8 bytes a row and block of 64 or 128 tokens; with top-k or top-p 4 bytes a row and token.
    """
    n, vocabulary, width, rank, x_stride, w_stride = head.sizes()
    device = head.x.device
    chip = tuning.chip_of(device)
    tile = tuning.product_tile(chip, n, head.half, adapter=head.v is not None)
    tile = tuning.FP32_NARROW_TILE if tile == tuning.FP32_TILE else tile
    row_blocks, blocks = -(-n // tile.rows), -(-vocabulary // tile.columns)
    splits, columns = tuning.product_splits(chip, row_blocks, vocabulary, tile)
    store = temperature != 0 and (0 < top_k < vocabulary or top_p < 1)
    tops, totals = torch.empty(2, 0 if store else n, blocks, dtype=torch.float32, device=device)
    logits = torch.empty(n if store else 0, vocabulary, dtype=torch.float32, device=device)
    flags = head.flags()
    launch(
        _linear_sums, row_blocks * splits, device, *head.operands(), tops, totals, logits, *head.sizes(),
        *head.scalars(temperature or 1.0), row_blocks, blocks, columns // tile.columns, STORE=store, **flags,
        **tile.constants(), warps=tile.warps, stages=tile.stages,
    )  # fmt: skip
    if store:
        return draw(logits, temperature, top_k, top_p, seed, offset, stream)
    results = outputs(n, device)
    options = {name: flags[name] for name in ("BIAS", "LORA", "SOFTCAP")}
    launch(
        _linear_draw, n, device, *head.operands(), tops, totals, stream, offset, *results, vocabulary, width, rank,
        x_stride, w_stride, *head.scalars(temperature or 1.0), blocks, seed, GREEDY=temperature == 0, **options,
        COLUMNS=tile.columns, DEPTH=64, BLOCKS=triton.next_power_of_2(blocks), warps=4,
    )  # fmt: skip
    return results
