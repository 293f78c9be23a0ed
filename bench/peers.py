"""Other libraries' hidden -> log-prob and hidden -> PPO loss, run beside ours where they run.

`python_of_peers` makes `bench/.venvs/peers` once: a virtual environment that sees the packages of the one that asks,
plus Liger and TRL without their dependencies. Each arm answers like those of `bench.kernels`: a function of hidden
[N, H], weight [V, H], labels [N], advantages [N], old log-probs [N] that returns a loss to differentiate.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path

import torch

PACKAGES = ("liger-kernel==0.8.5", "trl==1.16.0")
ARMS = ("liger", "trl", "torch_lce")
LABELS = {
    "liger": "Liger 0.8.5 LigerFusedLinearGRPOLoss, chunks of 256 tokens, not compiled",
    "trl": "TRL 1.16 ChunkedLogProbFunction, 8,192 columns at a time",
    "torch_lce": "torch F.linear_cross_entropy, 256 rows at a time",
}


def python_of_peers() -> Path:
    """The interpreter of the environment; RuntimeError with pip's words where it cannot be made."""
    folder = Path(__file__).parent.resolve() / ".venvs" / "peers"
    python = folder / "bin" / "python"
    done = folder / "installed.txt"
    if done.exists() and done.read_text().split() == list(PACKAGES):
        return python
    venv.create(folder, with_pip=True, clear=True)
    root = Path(__file__).parent.parent.resolve()
    ours = [sysconfig.get_path("purelib"), str(root), str(root / "kernels")]
    site = next((folder / "lib").glob("python*/site-packages"))
    (site / "asking.pth").write_text("\n".join(ours) + "\n")
    made = subprocess.run(
        [str(python), "-m", "pip", "install", "-q", "--no-deps", *PACKAGES], capture_output=True, text=True
    )
    if made.returncode != 0:
        raise RuntimeError(f"cannot install {' '.join(PACKAGES)}: {made.stderr.strip()[-400:]}")
    done.write_text("\n".join(PACKAGES) + "\n")
    return python


def arm(name: str) -> Callable[..., torch.Tensor]:
    """The peer's function. ImportError or AttributeError where this machine's versions do not have it."""
    return {"liger": _liger, "trl": _trl, "torch_lce": _torch_lce}[name]()


def _liger():
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(beta=0.0, compiled=False, use_ref_model=False, loss_type="bnpo")

    def run(hidden, weight, labels, advantages, old):
        rows = min(256, len(labels))  # its chunks are sequences: as many tokens in each as suits a CPU

        def cut(t):
            return t.view(-1, rows, *t.shape[1:])

        mask = torch.ones_like(cut(labels))
        return loss(cut(hidden), weight, cut(labels), mask, cut(advantages)[:, 0], old_per_token_logps=cut(old))[0]

    return run


def _trl():
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    def run(hidden, weight, labels, advantages, old):
        log_probs = ChunkedLogProbFunction.apply(hidden, weight, None, labels, 1.0, 8192, None, 1.0, ())[0]
        return (log_probs * advantages).sum()

    return run


def _torch_lce():
    function = torch.nn.functional.linear_cross_entropy  # torch 2.13
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=256)

    def run(hidden, weight, labels, advantages, old):
        return function(hidden, weight, labels, reduction="sum", options=options)

    return run


if __name__ == "__main__":
    print(python_of_peers())
    sys.exit(0)
