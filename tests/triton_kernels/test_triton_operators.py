"""The operators with their Triton bodies: schema, fake functions, autograd registration."""

from __future__ import annotations

import pytest
import torch

from fastrlhf_kernels import loss_ops, ops


def cases(device):
    torch.manual_seed(0)
    n, width, vocabulary = 6, 16, 40
    make = lambda *shape: torch.randn(*shape, device=device)  # noqa: E731
    hidden, weight, logits = (
        t.requires_grad_() for t in (make(n, width), make(vocabulary, width), make(n, vocabulary))
    )
    labels, row, count = torch.arange(n, device=device), make(n), torch.tensor(5.0, device=device)
    mask = torch.arange(n, device=device) != 2
    head = (hidden, weight, labels, None, None, 0.9, 1.0, None, None, None, 1.0)
    clip = (0.2, 0.2, None)
    leaf, other = make(n).requires_grad_(), make(n).requires_grad_()
    return {
        "token_log_probs": (ops.token_log_probs, (logits, labels, None, 0.7, -100, True, True)),
        "linear_log_probs": (ops.linear_log_probs, (*head, -100, True, False, True)),
        "linear_ppo_loss": (
            loss_ops.linear_ppo_loss,
            (*head, row, row, mask, None, None, count, *clip, 0.0, "k3", 0.01, True, [True, True, False, False]),
        ),
        "token_ppo_loss": (
            loss_ops.token_ppo_loss,
            (logits, labels, None, 1.0, row, row, mask, None, None, count, *clip, 0.0, "k3", 0.01, True, True),
        ),
        "ppo_losses": (loss_ops.ppo_losses, (leaf, other, row, row, row, row, mask, None, count, *clip, 0.2)),
    }


@pytest.mark.parametrize("name", cases(torch.device("cpu")))
def test_opcheck(device, name):
    operator, arguments = cases(device)[name]
    torch.library.opcheck(operator, arguments)
