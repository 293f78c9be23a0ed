"""Other libraries' hidden -> log-prob and hidden -> PPO loss, run beside ours where they run.

They live in `bench/.venvs/peers`, an environment of their own. Each arm answers like those of `bench.kernels`: a
function of hidden [N, H], weight [V, H], labels [N], advantages [N], old log-probs [N] that returns a loss.
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


def environment(name: str, *packages: str) -> Path:
    """The Python of `bench/.venvs/NAME`, made once: it sees our packages and those of the environment that asks, and
    before them `packages`, without their dependencies. RuntimeError with pip's words where they cannot be installed.
    """
    folder = Path(__file__).parent.resolve() / ".venvs" / name
    python, done = folder / "bin" / "python", folder / "installed.txt"
    if done.exists() and done.read_text().split() == list(packages):
        return python
    venv.create(folder, with_pip=False, clear=True)
    root = Path(__file__).parent.parent.resolve()
    site = next((folder / "lib").glob("python*/site-packages"))
    (site / "asking.pth").write_text(f"{sysconfig.get_path('purelib')}\n{root}\n{root / 'kernels'}\n")
    pip = [sys.executable, "-m", "pip", "--python", str(python)]  # ours: to give it one takes longer than most installs
    command = [*pip, "install", "-q", "--no-deps", "--ignore-installed", *packages]
    made = subprocess.run(command, capture_output=True, text=True)
    if made.returncode != 0:
        raise RuntimeError(f"cannot install {' '.join(packages)}: {made.stderr.strip()[-400:]}")
    done.write_text("\n".join(packages) + "\n")
    return python


def python_of_peers() -> Path:
    """The interpreter that has the other libraries."""
    return environment("peers", *PACKAGES)


def arm(name: str) -> Callable[..., torch.Tensor]:
    """The peer's function. ImportError or AttributeError where this machine's versions do not have it."""
    return {"liger": _liger, "trl": _trl, "torch_lce": _torch_lce, "cce": _cce, "quack": _quack}[name]()


def _liger():
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    gpu = torch.cuda.is_available()
    loss = LigerFusedLinearGRPOLoss(beta=0.0, compiled=gpu, use_ref_model=False, loss_type="bnpo")

    def run(hidden, weight, labels, advantages, old):
        rows = min(1024 if gpu else 256, len(labels))  # its chunks are sequences: as many tokens as suit the machine

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


def _cce():
    from cut_cross_entropy import linear_cross_entropy

    def run(hidden, weight, labels, advantages, old):
        return -(linear_cross_entropy(hidden, weight, labels, reduction="none") * advantages).sum()

    return run


def _quack():
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    def run(hidden, weight, labels, advantages, old):  # it knows no weights of tokens: the plain mean
        return chunked_linear_cross_entropy(hidden, weight, labels)

    return run
