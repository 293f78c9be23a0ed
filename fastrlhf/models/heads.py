"""The four roles as transformers models: their trunks and heads, run apart from each other.

A policy is a causal LM; reward and value models are `AutoModelForSequenceClassification` with one label. Both kinds
are used through `hidden_states` (the trunk) and their head: no logits tensor [tokens, vocabulary] is ever made in
training.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from fastrlhf.config.errors import UserError
from fastrlhf.parallel.sharding import dtype_of, is_whole, settle
from fastrlhf.parallel.vocabulary import project
from fastrlhf.runtime import distributed
from fastrlhf.runtime.memory import ran_out
from fastrlhf_kernels.workspace import default_workspace

# What the code of a model raises that is asked for what it does not support.
UNSUPPORTED = (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError, AssertionError)


class Head(NamedTuple):
    """The way from a hidden state [..., H] to logits [..., V]: softcap(scale * (h W^T + b))."""

    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    logit_softcap: float | None

    def kwargs(self) -> dict:
        """The keyword arguments of the linear functions of `fastrlhf_kernels`."""
        return {"bias": self.bias, "logit_scale": self.logit_scale, "logit_softcap": self.logit_softcap}


def agreed_workspace(device: torch.device) -> int:
    """Return the bytes that the head's kernels may take in a run: their default, on the rank where it is least. It is
    fixed when the run begins, since it decides in which order they add."""
    return int(distributed.gather(torch.tensor([default_workspace(device)])).min())


def lm_head(model: PreTrainedModel) -> Head:
    """The output head of a causal LM. Raises UserError for a model that has none."""
    linear = model.get_output_embeddings()
    if not isinstance(linear, nn.Linear):
        raise UserError(f"policy: {type(model).__name__} has no language-model head; pass a causal LM")
    config = model.config.get_text_config()
    factor = getattr(config, "logit_scale", None) or 1.0  # Cohere
    divisor = getattr(config, "logits_scaling", None) or 1.0  # Granite
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(linear.weight, linear.bias, float(factor) / float(divisor), softcap)


def agree(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> bool:
    """Whether two ways through a model of this dtype compute the same hidden states or logits, compared to the largest
    of `theirs`; what is NaN agrees with nothing."""
    limit = (1e-3 if dtype == torch.float32 else 0.05) * theirs.abs().max()
    return bool((ours - theirs).abs().max() <= limit)


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """UserError for a model that cannot be a policy: its logits are not what `lm_head` says, so that it would be
    trained on another distribution; it looks at tokens that come later; its forward is another one altogether."""
    name, head = type(model).__name__, lm_head(model)
    try:
        embeddings, vocabulary = len(model.get_input_embeddings().weight), len(head.weight)
        if vocabulary > embeddings:  # it could say what it cannot read
            raise UserError(
                f"policy: {name} has {vocabulary} output tokens and {embeddings} input embeddings; use another model"
            )
        ids = torch.arange(8, device=model.device)[None] % vocabulary
        other = ids.clone()
        other[:, -2:] = (ids[:, -2:] + 1) % vocabulary
        hidden, changed = hidden_states(model, ids), hidden_states(model, other)
        ours, theirs = head_logits(head, hidden), model(input_ids=ids, use_cache=False).logits.float()
    except UNSUPPORTED as error:
        if ran_out(error) or isinstance(error, UserError):
            raise
        lines = str(error).strip().splitlines() or [""]
        raise UserError(
            f"policy: {name} cannot be trained as a causal LM: trying it on token ids fails "
            f"({type(error).__name__}: {lines[0]}); use another model"
        ) from error
    if not agree(changed[:, :-2], hidden[:, :-2], model.dtype):
        decoder = ', or set "is_decoder": true in its config.json' if hasattr(model.config, "is_decoder") else ""
        raise UserError(
            f"policy: {name} is not causal: changing a later token changes what it says of earlier ones, so its "
            f"log-probs are those of no text it could write; use a causal LM{decoder}"
        )
    if ours.shape != theirs.shape or not agree(ours, theirs, model.dtype):
        raise UserError(
            f"policy: {name} computes its logits in a way that is not supported; use a causal LM whose "
            "logits are its last hidden state times its output embeddings"
        )


@torch.no_grad()
def check_packing(model: PreTrainedModel) -> None:
    """UserError for a model that ignores restarting positions, so that packed sequences would see each other."""
    ids = torch.arange(6, device=model.device)[None]
    packed = hidden_states(model, ids, torch.tensor([[0, 1, 2, 0, 1, 2]], device=model.device))[0, 3:]
    alone = hidden_states(model, ids[:, 3:])[0]
    settle(model)  # or an optimizer that is made next would have what is gathered in the place of its shares
    if not agree(packed, alone, dtype_of(model)):
        raise UserError(f"packing: {type(model).__name__} would let packed examples see each other; use packing=false")


def head_logits(head: Head, hidden: Tensor) -> Tensor:
    """Logits [..., V] of hidden [..., H] in fp32, accumulated in fp32 whatever the dtype: for a few rows."""
    logits = project(hidden, head.weight)
    if head.bias is not None:
        logits = logits + head.bias.float()
    if head.logit_scale != 1.0:
        logits = logits * head.logit_scale
    if head.logit_softcap is not None:
        logits = torch.tanh(logits / head.logit_softcap) * head.logit_softcap
    return logits


def right_padded(rows: Sequence[Sequence[int]], fill: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """-> input_ids [B, L] int64 padded on the right, lengths [B] int64. Without rows there is one of padding, for the
    ranks that have some (`in_step`), and no length."""
    lengths = [len(row) for row in rows]
    longest = max(lengths, default=1)
    padded = [list(row) + [fill] * (longest - len(row)) for row in rows] or [[fill]]
    ids = torch.tensor(padded, dtype=torch.int64)
    return ids.to(device), torch.tensor(lengths, dtype=torch.int64, device=device)


def hidden_states(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
    """Final hidden states [B, L, H] of the trunk, after its last norm.

    input_ids [B, L] is padded on the right: a causal model never attends from a token to the padding behind it, so no
    mask is needed and position t of every row is exactly t (pitfall: left padding shifts learned positions).
    position_ids [B, L] that restart inside a row mark packed sequences, which then do not see each other. A model whose
    trunk takes none counts from 0 itself.
    """
    inputs = {"input_ids": input_ids, "use_cache": False}
    if position_ids is None and takes_positions(model):
        position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    if position_ids is not None:
        inputs["position_ids"] = position_ids
    return _trunk(model, inputs)


def _trunk(model: PreTrainedModel, inputs: dict[str, Any]) -> Any:
    """The last hidden states, or those of all layers where `inputs` ask for them."""
    if not is_whole(model):
        return model.trunk(**inputs)
    output = model.base_model(**inputs)
    return output.hidden_states if inputs.get("output_hidden_states") else output.last_hidden_state


def takes_positions(model: PreTrainedModel) -> bool:
    """Whether the trunk is told the position of each token."""
    return "position_ids" in inspect.signature(model.base_model.forward).parameters


class ValueHead(nn.Module):
    """A critic on states that it cannot change: LayerNorm, Linear [4 H, H], SiLU, Linear [1, 4 H]; fp32.

    A linear head on a policy's states explains no returns, because nothing bends the states to them; one hidden layer
    does (docs/options.md has the figures). The last layer starts from zero: V = 0 before a return was seen. The first
    is drawn from `seed` as nn.Linear draws its own, U(-1/sqrt(H), 1/sqrt(H)), the same on every rank.
    """

    WIDTH = 4

    def __init__(self, hidden: int, *, seed: int, device: torch.device | str = "cpu") -> None:
        super().__init__()
        how = {"device": device, "dtype": torch.float32}
        self.norm = nn.LayerNorm(hidden, **how)
        self.up, self.out = nn.Linear(hidden, self.WIDTH * hidden, **how), nn.Linear(self.WIDTH * hidden, 1, **how)
        draw, bound = torch.Generator().manual_seed(seed), hidden**-0.5
        with torch.no_grad():
            for tensor in (self.up.weight, self.up.bias):
                tensor.copy_(torch.empty(tensor.shape).uniform_(-bound, bound, generator=draw))
            self.out.weight.zero_()
            self.out.bias.zero_()

    @classmethod
    def size(cls, hidden: int) -> int:
        """Parameters of a head on states of this width."""
        return cls.WIDTH * hidden * (hidden + 2) + 2 * hidden + 1

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden [..., H] of any dtype -> values [...] fp32."""
        return self.out(F.silu(self.up(self.norm(hidden.float())))).squeeze(-1)


def scalar_outputs(head: nn.Linear | ValueHead, hidden: Tensor) -> Tensor:
    """A scalar head in fp32: hidden [..., H] -> [...]."""
    if isinstance(head, ValueHead):
        return head(hidden)
    weight, bias = head.weight.float(), head.bias
    return F.linear(hidden.float(), weight, None if bias is None else bias.float()).squeeze(-1)


POOLINGS = ("last", "mean")


class Readout(NamedTuple):
    """What a scalar head reads of a row: the states of its last token, or the mean of those of all its tokens.

    pooling: one of POOLINGS. layer: of transformers' `hidden_states`, 0 the embeddings, -1 the last one, after the
    trunk's norm.
    """

    pooling: str = "last"
    layer: int = -1

    def __str__(self) -> str:
        return f"{'the last token' if self.pooling == 'last' else 'the mean of all tokens'} of layer {self.layer}"

    def check(self, layers: int, where: str) -> None:
        """UserError where a trunk of so many layers has no such one. where: what names it, as the error begins."""
        if not -layers - 1 <= self.layer <= layers:
            raise UserError(
                f"{where} = {self.layer}: the model has {layers} layers; use 0 (the embeddings) to {layers}, or "
                f"{-layers - 1} to -1 from the end"
            )


def readout_of(model: PreTrainedModel) -> Readout:
    """What the head `score` of a reward model reads: where stock transformers reads too, if nothing else is said."""
    return getattr(model, "score_readout", Readout())


def sequence_scores(model: PreTrainedModel, rows: Sequence[Sequence[int]], head: nn.Linear | None = None) -> Tensor:
    """Score [B] fp32 of each token row, as the model's readout has it. head: None for the model's own, `score`."""
    return scalar_outputs(head or model.score, row_states(model, rows, readout_of(model)))


def row_states(model: PreTrainedModel, rows: Sequence[Sequence[int]], readout: Readout) -> Tensor:
    """What a readout gives of each token row: hidden states [B, H], means of them in fp32."""
    if readout == Readout():
        return last_hidden(model, rows)
    [states] = states_of_layers(model, rows, [readout])
    return states


def states_of_layers(
    model: PreTrainedModel, rows: Sequence[Sequence[int]], readouts: Sequence[Readout]
) -> list[Tensor]:
    """`row_states` of several readouts, from one forward."""
    input_ids, lengths = right_padded(rows, model.config.pad_token_id or 0, model.device)
    inputs = {"input_ids": input_ids, "use_cache": False, "output_hidden_states": True}
    if takes_positions(model):
        inputs["position_ids"] = torch.arange(input_ids.shape[1], device=model.device).expand_as(input_ids)
    layers = _trunk(model, inputs)
    ends = torch.arange(len(rows), device=model.device), lengths - 1
    kept = torch.arange(input_ids.shape[1], device=model.device) < lengths[:, None]
    return [
        layers[layer][ends]
        if pooling == "last"
        else layers[layer][: len(rows)].float().masked_fill(~kept[..., None], 0.0).sum(1) / lengths[:, None]
        for pooling, layer in readouts
    ]


def last_hidden(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> Tensor:
    """Final hidden state [B, H] at the last token of each row (found by length, never by looking for padding)."""
    input_ids, lengths = right_padded(rows, model.config.pad_token_id or 0, model.device)
    hidden = hidden_states(model, input_ids)
    return hidden[torch.arange(len(rows), device=hidden.device), lengths - 1]
