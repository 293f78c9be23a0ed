"""The operators with their Triton bodies: schema, fake functions, autograd registration."""

from __future__ import annotations

import pytest
import torch

from fastrlhf_kernels import loss_ops, ops
from fastrlhf_kernels.operands import Head, LossOptions, Need, Rows, Shaping, Tokens, flat


def cases(device):
    torch.manual_seed(0)
    n, width, vocabulary = 6, 16, 64  # a multiple of 64: what kept logits are padded with is nobody's
    make = lambda *shape: torch.randn(*shape, device=device)  # noqa: E731
    hidden, weight, logits = (
        t.requires_grad_() for t in (make(n, width), make(vocabulary, width), make(n, vocabulary))
    )
    labels, row, count = torch.arange(n, device=device), make(n), torch.tensor(5.0, device=device)
    mask = torch.arange(n, device=device) != 2
    head = Head(hidden, weight, labels, None, None, 0.9, 1.0, None, None, None, 1.0)
    tokens, options = Tokens(row, row, mask, None, None), LossOptions(0.2, 0.2, None, 0.0, "k3", 0.01)
    token_rows, leaf = Rows(logits, labels, None, 0.7), make(n).requires_grad_()
    many = torch.stack([labels, labels.flip(0), torch.full_like(labels, -100)], 1)
    two, shaping = make(3, 4), Shaping(make(3), make(3, 4), make(3, 4), 0.1, "k3")
    need = Need(True, True, False, False)
    return {
        "token_log_probs": (ops.token_log_probs, token_rows, -100, True, True),
        "token_log_probs_of_many": (ops.token_log_probs, token_rows._replace(labels=many), -100, True, True),
        "linear_log_probs": (ops.linear_log_probs, head, -100, True, False, 0, True),
        "linear_log_probs_kept": (ops.linear_log_probs, head, -100, True, False, 4, True),
        "linear_log_probs_of_many": (ops.linear_log_probs, head._replace(labels=many), -100, False, False, 4, True),
        "linear_ppo_loss": (loss_ops.linear_ppo_loss, head, tokens, count, options, True, need),
        "token_ppo_loss": (loss_ops.token_ppo_loss, token_rows, tokens, count, options, True, True),
        "ppo_policy_loss": (loss_ops.ppo_policy_loss, leaf, tokens, count, options, True),
        "ppo_value_loss": (loss_ops.ppo_value_loss, leaf, row, row, mask, None, count, 0.2, True),
        "gae": (ops.gae, two, two, two > 0, 1.0, 0.95, None, shaping, 1e-8, 1),
        "shape_rewards": (ops.shape_rewards, shaping, two > 0),
        "masked_whiten": (ops.masked_whiten, two, two > 0, True, 1e-8),
    }


@pytest.mark.parametrize("name", cases(torch.device("cpu")))
def test_opcheck(device, name):
    operator, *arguments = cases(device)[name]
    torch.library.opcheck(operator.registered, tuple(flat(arguments)))
