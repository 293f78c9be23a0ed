"""Between the forward and the backward of a micro-batch the host reads nothing of the device."""

from __future__ import annotations

import traceback
from collections import Counter
from functools import partial

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from tests.operators import waits_for_the_gpu
from tests.runs import experience_of, ppo_trainer

FORMS = {
    "separate": {},
    "shared trunk": {"critic": "shared_trunk"},
    "packed": {"packing": True},
    "sequence ratio": {"ratio_level": "sequence", "kl_in": "loss", "kl_coef": 0.1},
    "weighted": {"loss_aggregation": "sequence_mean", "importance_cap": 2.0},
}
trainer = partial(ppo_trainer, rollout_batch_size=6, mini_batch_size=6)


class Waits(TorchDispatchMode):
    """Operations for which a host waits until a GPU has done all before them. Operators of kernels are one each."""

    # Not ours: a check of numbers that on a GPU is not made, and transformers' look for packed rows, once a forward.
    ELSEWHERE = ("fastrlhf_kernels/checks.py", "transformers/masking_utils.py")

    def __init__(self):
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = waits_for_the_gpu(func, args, kwargs)
        if name and not any(frame.filename.endswith(self.ELSEWHERE) for frame in traceback.extract_stack()):
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("form", FORMS)
def test_micro_batches_wait_for_nothing(form):
    t = trainer(**FORMS[form])
    rollout = t.rollout(t.prompts[:6], 1, purpose="rollout")
    experience, epochs, _ = experience_of(t, rollout)
    mini_batch, counts = epochs[0][0], []
    for budget in (10_000, 1):  # one micro-batch, and one a row
        t.memory.first_budget = budget
        with Waits() as waits:
            t.learner.accumulate(rollout.rows, experience, mini_batch, policy=True, critic=t.critic is not None)
        counts.append(waits.found.total())
        t.learner.drop_gradients()
    assert len(rollout.rows.micro_batches(mini_batch, 1)) == 6
    assert counts[0] == counts[1], waits.found  # what a mini-batch waits for, however many micro-batches it has
