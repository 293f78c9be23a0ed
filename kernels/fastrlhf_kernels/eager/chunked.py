"""The lean torch path: log-probs and the PPO loss from hidden states, without a [tokens, vocabulary] tensor.

One tile of logits at a time lives in a buffer that is written over. `linear_log_probs` sweeps the vocabulary in
slices (outer loop) and the tokens in blocks (inner loop): a slice of W is read and upcast once a sweep, dW is written
once, and the backward computes its tiles anew. `linear_ppo_loss` sweeps the tokens in chunks over the whole
vocabulary, so that exp() runs once and the gradients cost two more matrix products, three in all.

Everything is computed in fp32 (float64 for float64 inputs); products of bf16 or fp16 numbers are exact in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..checks import wide
from ..operands import Head, LossOptions, Need, Tokens
from .losses import policy_terms

MIB = 1 << 20
FLOOR = -1e4  # stands in for -inf in differences of logits: exp() of it is 0, and 0 * FLOOR is 0 where 0 * -inf is NaN


@dataclass(frozen=True)
class Tiles:
    """Rows and columns of one tile of logits."""

    rows: int
    columns: int


def sweep_tiles(
    n: int,
    vocabulary: int,
    hidden: int,
    *,
    cuda: bool,
    entropy: bool = False,
    batch_invariant: bool = False,
    workspace: int = 1 << 30,
) -> Tiles:
    """Tiles of the sweep over slices of the vocabulary: 48 MiB at most on CPU, the entropy's second tile included, and
    never more than the workspace.

    Large, because every parallel region ends in a barrier, and on a machine that others use too a barrier waits for
    a thread that is not running: fewer regions are worth more than tiles that fit a cache.
    """
    if batch_invariant:  # a fixed shape: what else is in the batch must not change the order of summation
        return Tiles(64, min(vocabulary, 16384))
    budget = min((256 if cuda else 48) * MIB, workspace) // (8 if entropy else 4)
    rows = max(1, min(n, 16384 if cuda else 2048, budget // 512))
    columns = min(max(512, budget // rows), max(512, 32 * MIB // 4 // hidden))  # bounds the fp32 copy of a slice too
    return Tiles(rows, max(1, min(vocabulary, columns // 64 * 64)))


def chunk_tiles(vocabulary: int, *, cuda: bool, workspace: int = 1 << 30) -> Tiles:
    """Tiles of the three-product sweep: `rows` tokens over the whole vocabulary, exponentials by `columns` of it.

    128 MiB of fp32 logits at most (1 GiB on a GPU) and never more than the workspace; fewer than 256 rows make thin
    matrix products.
    """
    most = min((1024 if cuda else 128) * MIB, workspace) // 4 // vocabulary
    rows = max(1, min(most, 2048 if cuda else max(256, 16 * MIB // 4 // vocabulary)))
    return Tiles(rows, min(vocabulary, max(512, (256 if cuda else 16) * MIB // 4 // rows)))


@dataclass
class ScaledHead:
    """The head with its scalars folded into the small operand: z = f(u), u = x W^T + factor * bias^T + v B^T.

    x = factor * hidden, and `factor` [n] holds logit_scale and temperature: z = u without a softcap, and
    z = cap * tanh(u) with one (`cap` [n, 1] = softcap / temperature). v = lora_scale * x A^T.
    """

    x: Tensor
    factor: Tensor
    weight: Tensor
    bias: Tensor | None
    cap: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None
    lora_scale: float
    v: Tensor | None

    @property
    def suppresses(self) -> bool:
        """Whether logits may be -inf: only a bias brings that."""
        return self.bias is not None

    @classmethod
    def build(cls, head: Head) -> ScaledHead:
        """In the dtype of computation; the weight stays as it is."""
        dtype, softcap = wide(head.hidden, head.weight), head.logit_softcap
        x = head.hidden.to(dtype)
        if head.temperatures is None:
            temperature = x.new_full((len(x),), head.temperature)
        else:
            temperature = head.temperatures.to(dtype)
        if softcap is None:
            cap, factor = None, head.logit_scale / temperature
            neutral = head.temperatures is None and head.temperature == head.logit_scale
        else:
            cap = (softcap / temperature)[:, None]
            factor = torch.full_like(temperature, head.logit_scale / softcap)
            neutral = softcap == head.logit_scale
        x = x if neutral else x * factor[:, None]
        bias, a, b = (None if t is None else t.to(dtype) for t in (head.bias, head.lora_a, head.lora_b))
        v = None if a is None else head.lora_scale * (x @ a.T)
        return cls(x, factor, head.weight, bias, cap, a, b, head.lora_scale, v)

    def slices(self, columns: int) -> Iterator[tuple[int, int, Tensor]]:
        """(first column, last column + 1, those rows of W in the dtype of computation)."""
        for lo in range(0, len(self.weight), columns):
            w = self.weight[lo : lo + columns]
            yield lo, lo + len(w), w.to(self.x.dtype)

    def rows(self, cut: slice) -> ScaledHead:
        """The same head on some of the rows."""
        cap, v = (None if t is None else t[cut] for t in (self.cap, self.v))
        return replace(self, x=self.x[cut], factor=self.factor[cut], cap=cap, v=v)

    def logits(self, w: Tensor, lo: int, hi: int, out: Tensor) -> Tensor:
        """z of columns lo..hi written into `out` [n, hi - lo]."""
        torch.mm(self.x, w.T, out=out)
        if self.bias is not None:
            out.addr_(self.factor, self.bias[lo:hi])
        if self.v is not None:
            out.addmm_(self.v, self.lora_b[lo:hi].T)
        return out if self.cap is None else out.tanh_().mul_(self.cap)


class Gradients:
    """fp32 sums of the gradients somebody needs, filled tile by tile from du (the gradient of u)."""

    def __init__(self, head: ScaledHead, need: Need, weight_dtype: torch.dtype):
        """weight_dtype: the dtype that dW is kept in."""
        x = head.x
        self.head = head
        self.dx = torch.zeros_like(x) if need.hidden else None
        make = torch.empty if len(x) else torch.zeros  # the first tile writes it, so it need not be cleared
        self.dw = make(head.weight.shape, dtype=weight_dtype, device=x.device) if need.weight else None
        self.db = x.new_zeros(len(head.weight)) if need.bias else None
        self.dlora_b = torch.zeros_like(head.lora_b) if need.lora else None
        self.dv = torch.zeros_like(head.v) if head.v is not None and (need.hidden or need.lora) else None

    def add(self, du: Tensor, w: Tensor, columns: slice, rows: slice, head: ScaledHead) -> None:
        """One tile, all but dW: du [rows, columns], w the slice of W, head the rows of the head."""
        if self.dx is not None:
            self.dx[rows].addmm_(du, w)
        if self.db is not None:
            self.db[columns].addmv_(du.T, head.factor)
        if self.dlora_b is not None:
            self.dlora_b[columns].addmm_(du.T, head.v)
        if self.dv is not None:
            self.dv[rows].addmm_(du, head.lora_b[columns])

    def add_weight(self, du: Tensor, columns: slice, first: bool, head: ScaledHead) -> None:
        """dW of a tile, where dW is kept in the dtype of computation; `first`: nothing is there yet."""
        if self.dw is None:
            return
        if first:
            torch.mm(du.T, head.x, out=self.dw[columns])
        else:
            self.dw[columns].addmm_(du.T, head.x)

    def finish(self) -> tuple[Tensor | None, ...]:
        """The HEAD_GRADIENTS: dhidden [n, H], dW, dbias, dA, dB."""
        head, da = self.head, None
        if self.dlora_b is not None:
            da = head.lora_scale * (self.dv.T @ head.x)
        if self.dx is not None:
            if self.dv is not None:
                self.dx.addmm_(self.dv, head.lora_a, alpha=head.lora_scale)
            self.dx.mul_(head.factor[:, None])
        return self.dx, self.dw, self.db, da, self.dlora_b


def _by_column(buffer: Tensor, rows: int, columns: int) -> Tensor:
    """A tile [rows, columns] with its rows side by side: the product with a slice of W is a quarter faster that way.

    Every sweep uses it: sums over the vocabulary run in one order, and equal weights give equal bits.
    """
    return buffer[: rows * columns].view(columns, rows).T


def _by_row(buffer: Tensor, rows: int, columns: int) -> Tensor:
    return buffer[: rows * columns].view(rows, columns)


def inside_slice(labels: Tensor, lo: int, hi: int) -> tuple[Tensor, Tensor]:
    """Which labels [n] or [n, K] fall into columns lo..hi, and where in the tile ([n, 1 or K], 0 for others)."""
    inside = (labels >= lo) & (labels < hi)
    column = torch.where(inside, labels - lo, 0)
    return inside, column if labels.ndim == 2 else column[:, None]


def at_labels(z: Tensor, column: Tensor, labels: Tensor) -> Tensor:
    """The entries of z in the columns of the labels, in the labels' shape."""
    return z.gather(1, column).view(labels.shape)


def sum_of_labels(per_label: Tensor) -> Tensor:
    """What belongs to labels [n] or [n, K], summed over those of a row: [n]."""
    return per_label if per_label.ndim == 1 else per_label.sum(1)


def add_at_labels(z: Tensor, column: Tensor, inside: Tensor, values: Tensor) -> None:
    """values of the labels added to the entries of z in their columns."""
    z.scatter_add_(1, column, torch.where(inside, values, 0).view(column.shape))


def sweep_forward(
    head: ScaledHead, labels: Tensor, tiles: Tiles, *, entropy: bool, pad: bool = False, kept: Tensor | None = None
):
    """log-prob, entropy, running maximum and sum of exp(z - maximum), each [n], in one sweep over the vocabulary.

    The online softmax of Milakov and Gimelshein (2018); t sums exp(z - m) * (z - m) for the entropy. With labels [n, K]
    the log-probs are [n, K]. kept [k, V]: where the logits of the first k rows stay.
    """
    n, x, several = len(labels), head.x, labels.ndim == 2
    m, s, t = x.new_full((n,), -torch.inf), x.new_zeros(n), x.new_zeros(n)
    target = x.new_full(labels.shape, torch.nan)  # stays NaN for a label outside [0, V)
    buffer = x.new_empty(tiles.rows * tiles.columns)
    spare = torch.empty_like(buffer) if entropy else buffer
    for lo, hi, w in head.slices(tiles.columns):
        for cut in row_blocks(n, tiles.rows, kept):
            part = head.rows(cut)
            size = cut.stop - cut.start
            # batch-invariant: every row of a tile is multiplied by the same instructions only where rows are rows
            lay = _by_row if pad else _by_column
            rows = tiles.rows if pad else size
            tile = lay(buffer, rows, hi - lo)
            z = _tile(part, w, lo, hi, tile if kept is None or cut.start >= len(kept) else kept[cut, lo:hi], size)
            inside, column = inside_slice(labels[cut], lo, hi)
            target[cut] = torch.where(inside, at_labels(z, column, labels[cut]), target[cut])
            old = m[cut]
            new = torch.maximum(old, z.amax(1))
            base = torch.where(new == -torch.inf, 0, new)
            z = torch.sub(z, base[:, None], out=tile[:size])
            if entropy and head.suppresses:
                z.clamp_(min=FLOOR)
            e = torch.exp(z, out=lay(spare, rows, hi - lo)[:size])
            shift = (old - base).clamp(min=FLOOR)
            decay = shift.exp()
            if entropy:
                t[cut] = decay * (t[cut] + s[cut] * shift) + z.mul_(e).sum(1)
            s[cut] = decay * s[cut] + e.sum(1)
            m[cut] = new
    base = torch.where(m == -torch.inf, 0, m)
    log_s = s.log()
    log_probs = (target - base[:, None]) - log_s[:, None] if several else (target - base) - log_s
    return log_probs, (log_s - t / s if entropy else None), m, s


def row_blocks(n: int, rows: int, kept: Tensor | None) -> Iterator[slice]:
    """Blocks of at most `rows` of n rows, none of which is half kept."""
    border = 0 if kept is None else min(n, len(kept))
    for begin, end in ((0, border), (border, n)):
        for first in range(begin, end, rows):
            yield slice(first, min(end, first + rows))


def _tile(part: ScaledHead, w: Tensor, lo: int, hi: int, out: Tensor, size: int) -> Tensor:
    """The logits of a block of rows; a last, shorter block is padded with zero rows to the shape of `out`."""
    if len(out) == size:
        return part.logits(w, lo, hi, out)
    extra = len(out) - size
    grow = {name: getattr(part, name) for name in ("x", "factor", "cap", "v")}
    grow = {k: None if t is None else torch.cat([t, t.new_zeros(extra, *t.shape[1:])]) for k, t in grow.items()}
    return replace(part, **grow).logits(w, lo, hi, out)[:size]


def sweep_backward(
    head: ScaledHead,
    labels,
    g,
    ge,
    entropy,
    m,
    s,
    tiles: Tiles,
    need: Need,
    weight_dtype,
    kept: Tensor | None = None,
) -> Gradients:
    """Gradients for dL/dlogp = g and dL/dentropy = ge (or None): dz = 1[y] g - p (g + ge (log p + entropy)).

    kept [k, V]: the logits of the first k rows, which are not computed anew. With labels and g [n, K] the gradient of a
    row is the sum over its labels.
    """
    n, x, whole = len(labels), head.x, sum_of_labels(g)
    grads, narrow = Gradients(head, need, weight_dtype), weight_dtype != x.dtype
    base, log_s = torch.where(m == -torch.inf, 0, m)[:, None], s.log()
    buffer = x.new_empty(tiles.rows * tiles.columns)
    spare = torch.empty_like(buffer) if ge is not None else None
    for lo, hi, w in head.slices(tiles.columns):
        dw = None
        for cut in row_blocks(n, tiles.rows, kept):
            part = head.rows(cut)
            shape = (cut.stop - cut.start, hi - lo)
            tile = _by_column(buffer, *shape)
            again = kept is None or cut.start >= len(kept)
            z = part.logits(w, lo, hi, tile) if again else kept[cut, lo:hi]
            slope = None if part.cap is None else (z / part.cap).square_().neg_().add_(1)  # d tanh
            z = torch.sub(z, base[cut], out=tile)
            if ge is None:
                du = z.exp_().mul_((-whole[cut] / s[cut])[:, None])
            else:
                z = z.clamp_(min=FLOOR) if head.suppresses else z
                e = torch.exp(z, out=_by_column(spare, *shape))
                z.add_((entropy[cut] - log_s[cut])[:, None]).mul_(ge[cut, None]).add_(whole[cut, None])
                du = z.mul_(e).mul_((-1 / s[cut])[:, None])
            inside, column = inside_slice(labels[cut], lo, hi)
            add_at_labels(du, column, inside, g[cut])
            if slope is not None:
                du.mul_(slope).mul_(part.cap)
            grads.add(du, w, slice(lo, hi), cut, part)
            if not narrow:
                grads.add_weight(du, slice(lo, hi), cut.start == 0, part)
            elif grads.dw is not None:  # summed in fp32 over the rows of this slice, then rounded once
                dw = torch.mm(du.T, part.x) if dw is None else dw.addmm_(du.T, part.x)
        if dw is not None:
            grads.dw[lo:hi] = dw
    return grads


def chunk_terms(head: ScaledHead, labels: Tensor, z: Tensor, spare: Tensor, columns: int):
    """z [c, V] becomes exp(z - m) in place. Returns log-prob, entropy, m and the sum of z, each [c]."""
    c, vocabulary = z.shape
    for lo, hi, w in head.slices(vocabulary if head.weight.dtype == z.dtype else columns):
        head.logits(w, lo, hi, z[:, lo:hi])
    m = z.amax(1)
    inside, column = inside_slice(labels, 0, vocabulary)
    target = torch.where(inside, z.gather(1, column)[:, 0] - m, torch.nan)
    s, t = torch.zeros_like(m), torch.zeros_like(m)
    for lo in range(0, vocabulary, columns):
        e = z[:, lo : lo + columns]
        d = torch.sub(e, m[:, None], out=_by_column(spare, *e.shape))
        d = d.clamp_(min=FLOOR) if head.suppresses else d
        s += torch.exp(d, out=e).sum(1)
        t += d.mul_(e).sum(1)
    return target - s.log(), s.log() - t / s, m, s


def chunk_gradient(head: ScaledHead, labels, z: Tensor, m, s, entropy, g, ge: Tensor | None, columns: int) -> Tensor:
    """exp(z - m) in `z` becomes the gradient of u, in place (the formula of `sweep_backward`; ge 0-d or None)."""
    for lo in range(0, z.shape[1], columns):
        e = z[:, lo : lo + columns]
        log_e = None if ge is None and head.cap is None else e.log().clamp_(min=FLOOR)
        slope = None
        if head.cap is not None:
            slope = (log_e + m[:, None]).div_(head.cap).clamp_(-1, 1).square_().neg_().add_(1)
        if ge is None:
            e.mul_((-g / s)[:, None])
        else:
            e.mul_(log_e.add_((entropy - s.log())[:, None]).mul_(ge).add_(g[:, None])).mul_((-1 / s)[:, None])
        inside, column = inside_slice(labels, lo, lo + e.shape[1])
        e.scatter_add_(1, column, torch.where(inside, g, 0)[:, None])
        if slope is not None:
            e.mul_(slope).mul_(head.cap)
    return z


def ppo_sweep(head: ScaledHead, labels, tokens: Tokens, count, options: LossOptions, need: Need, tiles: Tiles):
    """Loss terms [n] of every token and the gradients, in one sweep: log-prob -> loss -> gradient of the logits.

    Three matrix products a chunk: logits, then dx and dW from the same buffer.
    """
    n, x = len(labels), head.x
    log_probs, entropy, loss = (x.new_empty(n) for _ in range(3))
    grads = Gradients(head, need, x.dtype)
    ge = None if options.entropy_coef == 0 else -options.entropy_coef / count
    size = min(n, tiles.rows)
    buffer, spare = x.new_empty(size * len(head.weight)), x.new_empty(size * tiles.columns)
    for first in range(0, n, tiles.rows):
        cut = slice(first, min(n, first + tiles.rows))
        part = head.rows(cut)
        z = _by_column(buffer, cut.stop - cut.start, len(head.weight))
        log_probs[cut], entropy[cut], m, s = chunk_terms(part, labels[cut], z, spare, tiles.columns)
        loss[cut], g = policy_terms(log_probs[cut], tokens.map(lambda t, cut=cut: t[cut]), options)
        chunk_gradient(part, labels[cut], z, m, s, entropy[cut], g / count, ge, tiles.columns)
        for lo, hi, w in head.slices(len(head.weight) if head.weight.dtype == z.dtype else tiles.columns):
            grads.add(z[:, lo:hi], w, slice(lo, hi), cut, part)
            grads.add_weight(z[:, lo:hi], slice(lo, hi), first == 0, part)
    return loss, log_probs, entropy, grads


def linear_forward(
    head: Head, *, entropy: bool, batch_invariant: bool = False, kept: Tensor | None = None
) -> tuple[Tensor | None, ...]:
    """log-prob, entropy (or None), maximum and sum of exponentials, each [n]; kept: as `sweep_forward` takes it."""
    n, cuda = len(head.labels), head.weight.is_cuda
    fixed = {"batch_invariant": batch_invariant, "workspace": head.workspace}
    tiles = sweep_tiles(n, *head.weight.shape, cuda=cuda, entropy=entropy, **fixed)
    part, labels = ScaledHead.build(head), head.labels.long()
    return sweep_forward(part, labels, tiles, entropy=entropy, pad=batch_invariant, kept=kept)


def linear_backward(
    head: Head, g: Tensor | None, ge: Tensor | None, entropy, m: Tensor, s: Tensor, need: Need, kept: Tensor | None
):
    """The HEAD_GRADIENTS for dL/dlogp = g and dL/dentropy = ge, each [n] or None; None where not needed."""
    n, weight, dtype = len(head.labels), head.weight, m.dtype
    cuda, entropic = weight.is_cuda, ge is not None
    tiles = sweep_tiles(n, *weight.shape, cuda=cuda, entropy=entropic, workspace=head.workspace)
    g = m.new_zeros(head.labels.shape) if g is None else g.to(dtype)
    ge = None if ge is None else ge.to(dtype)
    part, labels = ScaledHead.build(head), head.labels.long()
    return sweep_backward(part, labels, g, ge, entropy, m, s, tiles, need, weight.dtype, kept).finish()


def linear_ppo(head: Head, tokens: Tokens, count: Tensor, options: LossOptions, need: Need):
    """(loss terms, log-probs, entropies) of the tokens, each [n], and the HEAD_GRADIENTS."""
    tiles = chunk_tiles(len(head.weight), cuda=head.weight.is_cuda, workspace=head.workspace)
    part, labels = ScaledHead.build(head), head.labels.long()
    *terms, gradients = ppo_sweep(part, labels, tokens, count, options, need, tiles)
    return *terms, gradients.finish()
