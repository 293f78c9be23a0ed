"""What happens when memory runs out: half the tokens in a micro-batch, and the work is done again.

The work is a whole mini-batch (or the experience of a whole rollout), so the maths never sees where it was cut: a loss
is a sum divided by the mini-batch's own count. Nothing is sampled anew and no optimizer step is taken back.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from fastrlhf.checkpoint.state import restore_rng, rng_tensors
from fastrlhf.config.base import StageConfig
from fastrlhf.config.errors import UserError
from fastrlhf.runtime import distributed

LOG = logging.getLogger(__name__)
T = TypeVar("T")
MOST_HALVINGS = 5  # of a run: 1/32 of the first budget
# What other allocators than torch's own for CUDA say; they raise a plain RuntimeError.
SAID = (
    "CUDA out of memory", "CUDA error: out of memory", "Triton Error [CUDA]: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED", "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
)  # fmt: skip


class Backoff:
    """The tokens of a micro-batch, halved when memory runs out; at most `MOST_HALVINGS` times a run.

    report(kind, message, **fields) is told of every halving. Each rank halves its own; a checkpoint holds the lead's.
    """

    def __init__(self, config: StageConfig, device: torch.device) -> None:
        self.config = config
        self.first = token_budget(config.micro_batch_tokens, device)
        self.halvings = 0
        self.report: Callable[..., None] = lambda kind, message, **fields: None

    @property
    def tokens(self) -> int:
        """The budget of `micro_batches` now."""
        return max(1, self.first >> self.halvings)

    def attempt(self, work: Callable[[], T], undo: Callable[[], object] = lambda: None) -> T:
        """work(), and again as long as it runs out of memory; it asks for `tokens` anew each time.

        undo: takes back what a work that was cut short left behind (gradients). Random numbers are drawn again from
        where they were. UserError with the cheapest fixes when the budget has been halved too often.
        """
        while True:
            random_numbers = rng_tensors()
            try:
                return work()
            except RuntimeError as error:
                if not ran_out(error):
                    raise
                said = str(error).strip().partition("\n")[0]
            # Only out here, where the exception and the frames that it keeps alive are gone, can memory come free.
            undo()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self._halve(said)
            restore_rng(random_numbers)

    def _halve(self, said: str) -> None:
        before = self.tokens
        if self.halvings == MOST_HALVINGS:
            raise UserError(
                f"micro_batch_tokens: memory ran out with {before} tokens too, after {self.halvings} halvings; "
                f"cheapest first: {', '.join(remedies(self.config)[:3])} ({said})"
            )
        self.halvings += 1
        sentence = f"memory ran out with micro-batches of {before} tokens: again with {self.tokens} ({said})"
        if not distributed.is_lead():  # whose events nobody would see
            LOG.warning("rank %d: %s", distributed.rank(), sentence)
        self.report("out_of_memory", sentence, before=before, after=self.tokens)

    def state(self) -> dict[str, int]:
        return {"halvings": self.halvings}

    def load_state(self, state: dict[str, int]) -> None:
        self.halvings = state["halvings"]


def ran_out(error: BaseException) -> bool:
    """Whether an exception means that memory ran out."""
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in SAID)


def remedies(config: StageConfig) -> list[str]:
    """Settings that this run does not use yet and that save memory, the least costly first; three at least."""
    wanted: dict[str, Any] = {"gradient_checkpointing": True, "offload": True, "lora": 16, "critic": "shared_trunk"}
    unused = {"gradient_checkpointing": False, "offload": False, "lora": None, "critic": "separate"}
    if getattr(config, "advantage", None) != "gae":
        del wanted["critic"]
    fields = type(config).model_fields
    found = [f"{name}={value}" for name, value in wanted.items() if getattr(config, name, None) == unused[name]]
    found = [text.replace("True", "true") for text in found]
    length = "max_new_tokens" if "max_new_tokens" in fields else "max_tokens"
    paged = [] if config.optimizer == "paged_adamw8bit" else ["optimizer=paged_adamw8bit"]
    return [*found, f"a smaller {length}", *paged, "a smaller mini_batch_size", "a smaller model"]


AUTO_MICRO_BATCH_TOKENS = {"cpu": 8192, "cuda": 16384}


def token_budget(configured: int | None, device: torch.device) -> int:
    """`micro_batch_tokens`, or this device's default for `auto`."""
    return configured or AUTO_MICRO_BATCH_TOKENS.get(device.type, 8192)
