"""Every refusal names the argument and says what was expected; every function refuses the same things."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch

import fastrlhf_kernels as kernels
from fastrlhf_kernels import backend
from fastrlhf_kernels.backend import choose_backend

H, W, Y = torch.zeros(3, 4), torch.zeros(7, 4), torch.tensor([0, 1, 6])
X, M = torch.zeros(2, 3), torch.ones(2, 3).bool()
Z = torch.zeros(3, 7)
PPO = (H, W, Y, torch.zeros(3), torch.zeros(3), torch.ones(3).bool())

REFUSED = [
    (kernels.linear_log_probs, (H, W, Y + 1), {}, "labels holds 7, outside [0, 7)"),
    (kernels.linear_log_probs, (H, W, Y - 1), {}, "labels holds -1"),
    (kernels.linear_log_probs, (H, W, Y), {"ignore_index": 0, "temperature": 0.0}, "temperature must be > 0, got 0.0"),
    (kernels.linear_log_probs, (H, W, Y), {"temperature": torch.tensor([1.0, -2.0, 1.0])}, "must be > 0, got -2"),
    (kernels.linear_log_probs, (H, W, Y), {"temperature": torch.ones(2)}, "temperature has shape (2,); expected (3,)"),
    (kernels.linear_log_probs, (H, W, Y), {"temperature": float("nan")}, "temperature must be finite"),
    (kernels.linear_log_probs, (H, W, Y.float()), {}, "labels must be int32 or int64, got torch.float32"),
    (kernels.linear_log_probs, (H, W, Y[:2]), {}, "labels has shape (2,); expected (3,)"),
    (kernels.linear_log_probs, (H[:, :3], W, Y), {}, "hidden has shape (3, 3); expected [..., 4]"),
    (kernels.linear_log_probs, (H, W[0], Y), {}, "weight has shape (4,); expected [V, H]"),
    (kernels.linear_log_probs, (H.int(), W, Y), {}, "hidden must be float32, bfloat16, float16 or float64"),
    (kernels.linear_log_probs, (H, W.to_sparse(), Y), {}, "weight must be a dense tensor"),
    (kernels.linear_log_probs, (H, W.to(torch.float8_e4m3fn), Y), {}, "weight must be float32"),
    (kernels.linear_log_probs, (H, W.tolist(), Y), {}, "weight must be a tensor, got list"),
    (kernels.linear_log_probs, (H, W.to("meta"), Y), {}, "weight is on meta but hidden is on cpu"),
    (kernels.linear_log_probs, (H, W, Y), {"bias": torch.zeros(4)}, "bias has shape (4,); expected (7,)"),
    (kernels.linear_log_probs, (H, W, Y), {"logit_softcap": 0.0}, "logit_softcap must be > 0"),
    (kernels.linear_log_probs, (H, W, Y), {"logit_scale": float("inf")}, "logit_scale must be finite"),
    (kernels.linear_log_probs, (H, W, Y), {"lora": (W, W)}, "lora must be (A [r, H], B [V, r], scale)"),
    (kernels.linear_log_probs, (H, W, Y), {"lora": (torch.zeros(2, 4), torch.zeros(7, 3), 1)}, "lora_B has shape"),
    (kernels.token_log_probs, (Z, Y + 1), {}, "labels holds 7"),
    (kernels.token_log_probs, (Z, Y[:, None]), {}, "labels has shape (3, 1); expected (3,)"),
    (kernels.token_log_probs, (Z[:, :0], Y), {}, "expected [..., V] with V >= 1"),
    (kernels.token_log_probs, (Z, Y), {"temperature": -1}, "temperature must be > 0, got -1"),
    (kernels.kl_estimate, (X, X, "k4"), {}, "estimator is 'k4'; expected one of 'k1', 'k2', 'k3', 'abs'"),
    (kernels.kl_estimate, (X, X[0]), {}, "ref_log_probs has shape (3,)"),
    (kernels.shape_rewards, (X[:, 0], X, X, M), {"kl_coef": None}, "kl_coef must be a number"),
    (kernels.shape_rewards, (X[0], X, X, M), {"kl_coef": 0.1}, "scores has shape (3,); expected (2,)"),
    (kernels.gae, (X, X, M.float()), {}, "response_mask must be bool or integer, got torch.float32"),
    (kernels.gae, (X, X[:, :2], M), {}, "response_mask has shape (2, 3); expected (2, 2)"),
    (kernels.gae, (X, X, M), {"gamma": 1.5}, "gamma must be in [0, 1], got 1.5"),
    (kernels.gae, (X, X, M), {"gae_lambda": -0.5}, "gae_lambda must be finite and >= 0"),
    (kernels.gae, (X, X, M), {"bootstrap_values": X}, "bootstrap_values has shape (2, 3)"),
    (kernels.gae, (X[0], X[0], M[0]), {}, "values has shape (3,); expected [B, T]"),
    (kernels.masked_whiten, (X, M[0]), {}, "mask has shape (3,)"),
    (kernels.masked_whiten, (X, M), {"eps": -1.0}, "eps must be finite and >= 0"),
    (kernels.ppo_policy_loss, (X, X, X, M), {"clip_range": -0.1}, "clip_range must be finite and >= 0, got -0.1"),
    (kernels.ppo_policy_loss, (X, X, X, M), {"clip_range_high": -0.1}, "clip_range_high must be"),
    (kernels.ppo_policy_loss, (X, X, X, M), {"clip_range": None}, "clip_range must be a number"),
    (kernels.ppo_policy_loss, (X, X, X, M), {"dual_clip": 0.5}, "dual_clip must be finite and >= 1"),
    (kernels.ppo_policy_loss, (X, X, X, M), {"normalizer": 0}, "normalizer must be > 0, got 0"),
    (kernels.ppo_policy_loss, (X, X, X, M), {"normalizer": torch.tensor(-1.0)}, "normalizer must be > 0, got -1.0"),
    (kernels.ppo_policy_loss, (X, X, X, M), {"normalizer": torch.ones(2)}, "normalizer has shape (2,)"),
    (kernels.ppo_policy_loss, (X, X, X, M), {"weights": torch.ones(2, 1)}, "weights has shape (2, 1); expected (2, 3)"),
    (kernels.ppo_value_loss, (X, X, X, M), {"clip_range": -1}, "clip_range must be"),
    (kernels.ppo_value_loss, (X, X, X.bool(), M), {}, "returns must be float32"),
    (kernels.linear_ppo_loss, (H, W, Y + 1, *PPO[3:]), {}, "labels holds 7"),
    (kernels.linear_ppo_loss, PPO, {"kl_coef": 0.1}, "kl_coef is 0.1 but ref_log_probs is not given"),
    (kernels.linear_ppo_loss, PPO, {"kl_estimator": "k9"}, "kl_estimator is 'k9'"),
    (kernels.linear_ppo_loss, (*PPO[:3], torch.zeros(3, 1), *PPO[4:]), {}, "old_log_probs has shape (3, 1)"),
    (kernels.sample_tokens, (Z[0],), {"seed": 1}, "logits has shape (7,); expected [B, V]"),
    (kernels.sample_tokens, (Z,), {"seed": 1, "top_p": 0.0}, "top_p must be in (0, 1], got 0.0"),
    (kernels.sample_tokens, (Z,), {"seed": 1, "top_p": 1.1}, "top_p must be in (0, 1], got 1.1"),
    (kernels.sample_tokens, (Z,), {"seed": 1, "top_k": -1}, "top_k must be >= 0, got -1"),
    (kernels.sample_tokens, (Z,), {"seed": 1, "temperature": -0.1}, "temperature must be finite and >= 0"),
    (kernels.sample_tokens, (Z,), {"seed": 1.5}, "seed must be an int, got float"),
    (kernels.sample_tokens, (Z,), {"seed": 1, "stream": torch.zeros(2).long()}, "stream has shape (2,); expected (3,)"),
    (kernels.sample_tokens, (Z,), {"seed": 1, "offset": torch.zeros(3)}, "offset must be int32 or int64"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("function", "arguments", "options", "message"), REFUSED, ids=lambda v: v if isinstance(v, str) else ""
)
def test_refused_in_a_sentence(function, arguments, options, message):
    with pytest.raises(ValueError) as refused:
        function(*arguments, **options)
    assert message in str(refused.value)
    assert type(refused.value) is ValueError


def test_validation_can_be_switched_off():
    log_probs = kernels.linear_log_probs(H, W, Y + 1, validate=False)
    assert log_probs[2].isnan() and torch.isfinite(log_probs[:2]).all()
    assert kernels.token_log_probs(Z, Y + 1, validate=False)[2].isnan()


FUNCTIONS = [f for f in (getattr(kernels, name) for name in kernels.__all__) if inspect.isfunction(f)]


def test_every_function_takes_backend_and_validate_and_has_a_docstring():
    assert len(FUNCTIONS) == 16
    for function in FUNCTIONS:
        parameters = inspect.signature(function).parameters
        assert parameters["backend"].default == "auto" and parameters["validate"].default is None
        assert function.__doc__ and parameters["backend"].kind == inspect.Parameter.KEYWORD_ONLY


def test_the_choice_of_backend(monkeypatch):
    monkeypatch.delenv("FASTRLHF_BACKEND", raising=False)
    assert choose_backend().name == choose_backend("torch").name == "torch"
    assert choose_backend("torch").reason and choose_backend().reason
    for call in (lambda: kernels.kl_estimate(X, X, backend="triton"),):
        with pytest.raises(ValueError, match='backend argument asks for "triton".*no Triton kernel yet'):
            call()
    with pytest.raises(ValueError, match="the backend argument is 'cuda'; expected one of"):
        kernels.gae(X, X, M, backend="cuda")
    monkeypatch.setenv("FASTRLHF_BACKEND", "cuda")
    with pytest.raises(ValueError, match="FASTRLHF_BACKEND is 'cuda'"):
        kernels.gae(X, X, M)
    kernels.gae(X, X, M, backend="torch")  # an explicit argument wins
    monkeypatch.setenv("FASTRLHF_BACKEND", "torch")
    assert "FASTRLHF_BACKEND" in choose_backend().reason


def machine(monkeypatch, **facts) -> None:
    """Pretend to be another machine: what the backend found out about it at import stands in these names."""
    for name, fact in facts.items():
        monkeypatch.setattr(backend, name, fact)


def test_triton_is_taken_for_gpu_tensors_and_refused_where_it_cannot_run(monkeypatch):
    on_gpu = SimpleNamespace(dtype=torch.bfloat16, device=torch.device("cuda", 0))
    for name in ("FASTRLHF_BACKEND", "TRITON_INTERPRET"):
        monkeypatch.delenv(name, raising=False)
    machine(monkeypatch, TRITON=True, INTERPRET=False, _new_enough=lambda index: True)
    assert choose_backend("auto", on_gpu) == ("triton", "the tensors are on a GPU")
    assert choose_backend("auto", on_gpu, kernel=False).name == "torch"
    double = SimpleNamespace(dtype=torch.float64, device=on_gpu.device)
    assert choose_backend("auto", double) == ("torch", "float64 runs in torch")
    with pytest.raises(ValueError, match="float64 runs in torch only"):
        choose_backend("triton", double)
    assert choose_backend("auto", X).name == "torch" and "the tensors are on cpu" in choose_backend("auto", X).reason
    with pytest.raises(ValueError, match="the tensors are on cpu .*TRITON_INTERPRET=1"):
        choose_backend("triton", X)
    machine(monkeypatch, INTERPRET=True)
    assert choose_backend("triton", X).name == "triton" and choose_backend("auto", X).name == "torch"
    machine(monkeypatch, _new_enough=lambda index: False)
    assert choose_backend("auto", on_gpu) == ("torch", "the GPU is older than sm_80")
    machine(monkeypatch, TRITON=False)
    assert choose_backend("auto", on_gpu).name == "torch"
    with pytest.raises(ValueError, match="pip install triton"):
        choose_backend("triton", on_gpu)


def test_masks_may_be_bool_or_any_integer():
    values = torch.randn(2, 3)
    mask = torch.tensor([[1, 0, 1], [1, 1, 0]])
    results = [
        kernels.gae(values, values, mask.to(t))[0]
        for t in (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    ]
    assert all(torch.equal(results[0], r) for r in results)
