"""Optimizer steps: fp32 master weights, schedules, gradient clipping."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from fastrlhf.checkpoint.state import load_optimizer_tensors, optimizer_tensors
from fastrlhf.runtime import distributed
from fastrlhf.runtime.hardware import bitsandbytes
from fastrlhf.runtime.memory import MemoryBackoff

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fastrlhf.checkpoint.weight_files import Streamed

NORM_ELEMENTS = 1 << 16  # of a gradient, whose squares a CPU adds up at once


def lr_at(step: int, *, base: float, schedule: str, warmup_steps: int, total_steps: int) -> float:
    """Learning rate of optimizer step `step` (0-based): linear warm-up from base/warmup, then the schedule.

    constant; cosine and linear fall to 0 at total_steps; inverse_sqrt is base * sqrt(warmup / step) (MOSS-RLHF).
    """
    if step < warmup_steps:
        return base * (step + 1) / warmup_steps
    if schedule == "constant":
        return base
    if schedule == "inverse_sqrt":
        start = max(warmup_steps, 1)
        return base * math.sqrt(start / max(step + 1, start))
    done = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    done = min(max(done, 0.0), 1.0)
    return base * (1.0 - done if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done)))


def _build(name: str, params: list[nn.Parameter], **options: object) -> torch.optim.Optimizer:
    if name == "adamw":
        return torch.optim.AdamW(params, fused=True, **options)
    kinds = bitsandbytes(f"optimizer: {name!r}", "use 'adamw'").optim
    kinds = {"adamw8bit": kinds.AdamW8bit, "paged_adamw8bit": kinds.PagedAdamW8bit}
    return kinds[name](params, **options)


class StepResult(NamedTuple):
    """grad_norm before clipping; applied is False when the update was skipped because it was not finite."""

    grad_norm: float
    applied: bool


class Optimizer:
    """AdamW over fp32 weights, whatever dtype the model computes in.

    Parameters in bf16 keep an fp32 master copy here: an update of 1e-6 relative size would vanish in bf16. Their
    gradients are moved into the fp32 master's after every backward, so micro-batches add up in fp32 as well. Where two
    optimizers are made of one model (SFT, then PPO), the later one gets the gradients.
    """

    def __init__(
        self,
        model: nn.Module | Mapping[str, nn.Parameter],
        *,
        name: str,
        learning_rate: float,
        max_grad_norm: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        memory: MemoryBackoff | None = None,
    ) -> None:
        """model: whose parameters are trained, those that take gradients; or the parameters by name. memory: the policy
        for a first step, the one that allocates, that runs out of memory; None: it is an error like any other."""
        self.max_grad_norm, self.memory = max_grad_norm, memory
        parameters = model.parameters() if isinstance(model, nn.Module) else model.values()
        self.params = [p for p in parameters if p.requires_grad]
        self.masters = self._make_masters()
        self.inner = _build(
            name, self.masters, lr=learning_rate, betas=tuple(betas), eps=eps, weight_decay=weight_decay
        )
        for param, owner in zip(self.params, self._owners_of_gradients(), strict=True):
            if owner is not param:
                if hasattr(param, "_to_master"):
                    param._to_master.remove()
                param._to_master = param.register_post_accumulate_grad_hook(_add_to(owner))

    def _make_masters(self) -> list[nn.Parameter]:
        """What the inner optimizer trains, in fp32."""
        return [p if p.dtype == torch.float32 else nn.Parameter(p.detach().float()) for p in self.params]

    def _owners_of_gradients(self) -> Sequence[Any]:
        """Of each parameter that whose `grad` adds up its micro-batches in fp32."""
        return self.masters

    def step(self, learning_rate: float) -> StepResult:
        """`gradient_norm`, then `apply`."""
        return self.apply(learning_rate, self.gradient_norm())

    def gradient_norm(self) -> float:
        """Add up the ranks' gradients -> their norm, by which `apply` clips them to max_grad_norm (0: no clipping)."""
        self._add_up_ranks()
        return float(self._total_norm([p.grad for p in self.masters if p.grad is not None]))

    def _add_up_ranks(self) -> None:
        distributed.all_reduce_gradients(self.masters)

    def _total_norm(self, grads: list[Tensor]) -> Tensor:
        if not grads:
            return torch.zeros(())
        # A CPU adds a tensor's squares up one after the other in fp32: of ten million, their norm is off by 4e-4.
        pieces = [
            piece for grad in grads for piece in (grad.flatten().split(NORM_ELEMENTS) if grad.is_cpu else (grad,))
        ]
        return nn.utils.get_total_norm(pieces)

    def apply(self, learning_rate: float, norm: float) -> StepResult:
        """Update, unless the gradient norm is not finite: then the gradients are dropped."""
        finite = math.isfinite(norm)
        if finite:
            for group in self.inner.param_groups:
                group["lr"] = learning_rate
            self._clip(norm)
            self._step_inner()
            self._copy_down()
        self.zero_grad()
        return StepResult(norm, finite)

    def _clip(self, norm: float) -> None:
        """Scale gradients of this norm down to max_grad_norm. torch's AdamW does it as it reads them, so no pass over
        them is spent; nor where nothing is to be clipped."""
        factor = self.max_grad_norm / (norm + 1e-6) if self.max_grad_norm > 0 else 1.0
        if isinstance(self.inner, torch.optim.AdamW):
            where = self.masters[0].device  # filled there: a copy from the host would wait
            self.inner.grad_scale = torch.full((), 1.0 / factor, device=where) if factor < 1.0 else None
        elif factor < 1.0:
            torch._foreach_mul_([p.grad for p in self.masters if p.grad is not None], factor)

    def _step_inner(self) -> None:
        """Step the inner optimizer. Its first step allocates the moments: where memory runs out there, the gradients
        stay, caches are freed and it is done again for the parameters that have not been updated yet."""
        allocates = any(p.grad is not None and p not in self.inner.state for p in self.masters)
        if self.memory is None or not allocates:
            self.inner.step()
            return
        undo = partial(self._forget_failed_step, self._step_counts())
        self.memory.attempt(self.inner.step, undo=undo)

    def _step_counts(self) -> list[float]:
        """How often each parameter has been updated."""
        return [float(self.inner.state.get(master, {}).get("step", 0)) for master in self.masters]

    def _forget_failed_step(self, before: list[float]) -> None:
        """What the failed step has updated must not be updated twice: some optimizers go parameter by parameter. State
        that it only began to make goes, or the next try would take it for whole. before: step counts before it."""
        for master, old, new in zip(self.masters, before, self._step_counts(), strict=True):
            if new > old:
                master.grad = None
            elif new == 0:
                self.inner.state.pop(master, None)

    def forget_moments(self) -> None:
        """Start anew from the weights as they are: the next step is the first one of its moments."""
        self.inner.state.clear()

    def finite(self) -> bool:
        """Whether every weight is."""
        return all(bool(master.isfinite().all()) for master in self.masters)

    def zero_grad(self) -> None:
        for param in (*self.params, *self.masters):
            param.grad = None

    @torch.no_grad()
    def _copy_down(self) -> None:
        pairs = [(p, m) for p, m in zip(self.params, self.masters, strict=True) if m is not p]
        if pairs:
            torch._foreach_copy_(*map(list, zip(*pairs, strict=True)))  # a launch for many tensors

    def master_tensors(self) -> dict[str, Tensor]:
        """The fp32 masters of low-precision parameters, for the checkpoint (empty for an fp32 model)."""
        pairs = enumerate(zip(self.params, self.masters, strict=True))
        return {f"master.{i}": m.detach() for i, (p, m) in pairs if m is not p}

    def checkpoint(self, prefix: str) -> tuple[dict[str, Tensor] | Streamed, dict[str, Any]]:
        """State and masters for a checkpoint, as (tensors, JSON), the same for any number of ranks and any `parallel`.
        All ranks call it, and run through what is streamed; what the lead gets is whole."""
        tensors, data = optimizer_tensors(self.inner, prefix)
        return {**tensors, **self.master_tensors()}, data

    def restore(self, tensors: dict[str, Tensor], data: dict[str, Any]) -> None:
        """Put back what `checkpoint` took. UserError where it is of another model or optimizer."""
        self.load_masters(tensors)
        self._load_state({key: value for key, value in tensors.items() if not key.startswith("master.")}, data)

    def _load_state(self, tensors: dict[str, Tensor], data: dict[str, Any]) -> None:
        load_optimizer_tensors(self.inner, tensors, data)

    @torch.no_grad()
    def load_masters(self, tensors: dict[str, Tensor]) -> None:
        for index, (param, master) in enumerate(zip(self.params, self.masters, strict=True)):
            if master is not param:
                master.copy_(tensors[f"master.{index}"])


class TrainedRole(NamedTuple):
    """A role that is trained: its model, its optimizer, and what is saved of it.

    parts: the tensors a checkpoint holds, by name (an adapter, a head); None: the whole model. merged: the weights of
    the model as it is exported, of a sharded one those that are gathered; None: its own. adapter: gathers the adapter
    alone, which all ranks do together, and returns what writes it into a folder; None: there is none.
    """

    model: PreTrainedModel
    optimizer: Optimizer
    parts: dict[str, Tensor] | None = None
    merged: Callable[[], dict[str, Tensor]] | None = None
    adapter: Callable[[], Callable[[Path], None]] | None = None


def _add_to(owner: Any) -> Callable[[Tensor], None]:
    """A hook that moves a parameter's gradient to where it is added up in fp32."""

    def move(param: Tensor) -> None:
        grad = param.grad.float()
        owner.grad = grad if owner.grad is None else owner.grad.add_(grad)
        param.grad = None

    return move
