"""What happens when memory runs out: half the tokens in a micro-batch, and the work is done again.

The work is a whole mini-batch (or the experience of a whole rollout), so the maths never sees where it was cut: a loss
is a sum divided by the mini-batch's own count. Nothing is sampled anew and no optimizer step is taken back.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from fastrlhf.checkpoint.state import restore_rng, rng_tensors
from fastrlhf.config.base import StageConfig
from fastrlhf.config.errors import UserError
from fastrlhf.runtime import distributed

LOG = logging.getLogger(__name__)
T = TypeVar("T")
MOST_HALVINGS = 5  # in a run: 1/32 of the first budget
AUTO_MICRO_BATCH_TOKENS = {"cpu": 8192, "cuda": 16384}
# Other allocators than torch's own for CUDA raise a plain RuntimeError with one of these texts.
MESSAGES = (
    "CUDA out of memory",
    "CUDA error: out of memory",
    "Triton Error [CUDA]: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
)


def ran_out(error: BaseException) -> bool:
    """Tell whether an exception means that memory ran out: the one definition, of generation, forward, backward and
    optimizer."""
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in MESSAGES)


def free_bytes(device: torch.device) -> int:
    """Memory of the device that nobody uses, what torch's allocator keeps for itself included."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if "SC_AVPHYS_PAGES" not in getattr(os, "sysconf_names", {}):  # macOS and Windows do not tell
        return 2 << 30
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def total_bytes(device: torch.device) -> int:
    """Memory of the device, used or not."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return 8 << 30
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def token_budget(configured: int | None, device: torch.device) -> int:
    """Return `micro_batch_tokens`, or this device's default for `auto`."""
    return configured or AUTO_MICRO_BATCH_TOKENS.get(device.type, 8192)


class MemoryBackoff:
    """The tokens of a micro-batch, halved when memory runs out; at most `MOST_HALVINGS` times a run.

    report(kind, message, **fields) is told of every halving. spares: each gives memory back that is kept for speed
    alone, once, and says whether there was any; they come before a halving. Each rank halves its own; a checkpoint
    holds the lead's.
    workspace: bytes that the head's kernels may take, the same on all ranks and after a resume, since it decides in
    which order they add; None until a run begins, for what suits the device. chosen: tokens that a plan of the memory
    gives where the configuration says auto, kept after a resume too; None: it says how many, or the device's default
    is taken.
    """

    def __init__(self, config: StageConfig, device: torch.device, report: Callable[..., None]) -> None:
        self.config, self.report = config, report
        self.first_budget = token_budget(config.micro_batch_tokens, device)
        self.halvings = 0
        self.workspace: int | None = None
        self.chosen: int | None = None
        self.spares: list[Callable[[], bool]] = []

    def choose(self, plan: Callable[[], int | None]) -> None:
        """Take the tokens that plan() gives, unless the configuration or a checkpoint says how many."""
        if self.config.micro_batch_tokens is None and self.chosen is None:
            self._take(plan())

    def _take(self, tokens: int | None) -> None:
        self.chosen = tokens
        self.first_budget = tokens or self.first_budget

    def begin(self, workspace: int) -> None:
        """Fix the workspace of a run."""
        self.workspace = workspace

    @property
    def tokens(self) -> int:
        """The budget of `micro_batches` now."""
        return max(1, self.first_budget >> self.halvings)

    def attempt(self, work: Callable[[], T], undo: Callable[[], object] = lambda: None) -> T:
        """Return work(), done again as long as it runs out of memory; it asks for `tokens` anew each time.

        undo takes back what a work that was cut short left behind (gradients). Random numbers are drawn again from
        where they were. UserError with the cheapest fixes when the budget has been halved too often.
        """
        while True:
            random_numbers = rng_tensors()
            try:
                return work()
            except RuntimeError as error:
                if not ran_out(error):
                    raise
                message = str(error).strip().partition("\n")[0]
            # Only out here, where the exception and the frames that it keeps alive are gone, can memory come free.
            undo()
            spared = [spare() for spare in self.spares]
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if any(spared):
                LOG.warning("memory ran out: again without what generation kept for its next rollout (%s)", message)
            else:
                self._halve(message)
            restore_rng(random_numbers)

    def _halve(self, message: str) -> None:
        before = self.tokens
        if self.config.parallel == "fsdp" and distributed.size() > 1:
            raise UserError(
                f"micro_batch_tokens: memory ran out with {before} tokens, and with parallel=fsdp no rank tries again "
                f"alone; cheapest first: half as many, {', '.join(remedies(self.config)[:3])} ({message})"
            )
        if self.halvings == MOST_HALVINGS:
            raise UserError(
                f"micro_batch_tokens: memory ran out with {before} tokens too, after {self.halvings} halvings; "
                f"cheapest first: {', '.join(remedies(self.config)[:3])} ({message})"
            )
        self.halvings += 1
        sentence = f"memory ran out with micro-batches of {before} tokens: again with {self.tokens} ({message})"
        if not distributed.is_lead():  # whose events nobody would see
            LOG.warning("rank %d: %s", distributed.rank(), sentence)
        self.report("out_of_memory", sentence, before=before, after=self.tokens)

    def state(self) -> dict[str, int | None]:
        return {"halvings": self.halvings, "workspace": self.workspace, "chosen": self.chosen}

    def load_state(self, state: dict[str, int | None]) -> None:
        """Raises ValueError for a workspace or a budget that no run has; a checkpoint without one leaves it as it
        is."""
        workspace, chosen = state.get("workspace", self.workspace), state.get("chosen", self.chosen)
        for count, what in ((workspace, "a workspace of {!r} bytes"), (chosen, "micro-batches of {!r} tokens")):
            if count is not None and (type(count) is not int or count < 1):
                raise ValueError(what.format(count))
        self.halvings, self.workspace = state["halvings"], workspace
        if self.config.micro_batch_tokens is None:
            self._take(chosen)


def remedies(config: StageConfig) -> list[str]:
    """Settings that this run does not use yet and that save memory, the least costly first; three at least."""
    switches: dict[str, tuple[tuple[Any, ...], str]] = {  # what a field is where it saves nothing, what to set
        "gradient_checkpointing": ((False, None), "gradient_checkpointing=true"),
        "offload": ((False,), "offload=true"),
        "lora": ((None,), "lora=16"),
        "critic": (("separate",), "critic=shared_trunk"),
    }
    if getattr(config, "advantage", None) != "gae":
        del switches["critic"]
    fields = type(config).model_fields
    unused = [remedy for name, (off, remedy) in switches.items() if name in fields and getattr(config, name) in off]
    length = "max_new_tokens" if config.stage == "ppo" else "max_tokens"
    paged = [] if config.optimizer == "paged_adamw8bit" else ["optimizer=paged_adamw8bit"]
    return [*unused, f"a smaller {length}", *paged, "a smaller mini_batch_size", "a smaller model"]
