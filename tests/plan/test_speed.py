"""`fastrlhf plan --device`: what a step does, and how long that takes at least."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from bench import plan as bench
from fastrlhf import cli
from fastrlhf.config.errors import UserError
from fastrlhf.config.stages import CONFIGS
from fastrlhf.plan import speed
from fastrlhf.plan.phases import Measured, Measurer, Part, Target
from fastrlhf.plan.speed import GRAPH_LAUNCH, LAUNCH, PROFILES, Profile, profile_of, shares
from fastrlhf.plan.unknown import UnknownNumbers
from fastrlhf.plan.work import LOGIT_BYTES, Work
from fastrlhf_kernels import linear_log_probs, linear_ppo_loss
from tests.plan.conftest import SMALL


def done(live: UnknownNumbers, work) -> Work:
    with live.phase():
        work()
    return live.work


def test_operators_are_counted_by_what_they_do():
    with UnknownNumbers() as live:
        table, a = live.unknown(lambda: (torch.zeros(1000, 16), torch.zeros(8, 16)))
        ids = torch.tensor([3, 1])
        assert done(live, lambda: a @ a.T).launched == {(2 * 8 * 8 * 16, 2 * 512 + 256): 1}
        assert done(live, lambda: a.view(16, 8)[2:].T).launches == 0  # launches nothing
        assert done(live, lambda: a + 1).launched == {(0, 1024): 1}
        assert done(live, lambda: torch.nn.functional.embedding(ids, table)).bytes == 16 + 2 * 128  # two rows
        assert done(live, lambda: float(a.sum())).launches == 1  # the number is no launch


def test_attention_is_two_products_and_half_of_them_where_it_is_causal():
    with UnknownNumbers() as live:
        q = live.unknown(lambda: torch.zeros(2, 3, 5, 16))
        whole = done(live, lambda: nn.functional.scaled_dot_product_attention(q, q, q))
        causal = done(live, lambda: nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True))
    assert whole.flops == 4 * 2 * 3 * 5 * 5 * 16 and causal.flops == whole.flops // 2


def test_the_head_is_one_product_and_with_its_gradients_three():
    n, width, vocabulary = 6, 16, 96
    product = 2 * n * width * vocabulary
    with UnknownNumbers() as live:
        hidden, weight, tokens = live.unknown(
            lambda: (
                torch.zeros(n, width, requires_grad=True),
                torch.zeros(vocabulary, width, requires_grad=True),
                torch.zeros(n),
            )
        )
        labels, mask = torch.zeros(n, dtype=torch.int64), torch.ones(n, dtype=torch.bool)
        with torch.no_grad():
            assert done(live, lambda: linear_log_probs(hidden, weight, labels)).flops == product
        assert done(live, lambda: linear_log_probs(hidden, weight, labels).sum().backward()).flops == 4 * product
        loss = done(live, lambda: linear_ppo_loss(hidden, weight, labels, tokens, tokens, mask))
    assert loss.flops == 3 * product and loss.bytes > LOGIT_BYTES * n * vocabulary


def test_an_update_does_six_operations_a_weight_and_token(folder):
    """Kaplan et al. 2020: 6 N a token of a forward and backward pass, N without the embedding; and attention's."""
    config = CONFIGS["sft"](**bench.SUPERVISED, format="text")
    measured = Measurer("sft", {"model": folder}, Target())(config)
    part, tokens = measured.step["update"], measured.rows * measured.length
    layers = [32 * (32 + 2 * 16 + 32) + 3 * 32 * 64] * SMALL["num_hidden_layers"]
    head = 512 * 32
    expected = tokens * 6 * (sum(layers) + head) + 2 * 6 * 2 * measured.rows * measured.length**2 * 32
    assert part.work.flops == pytest.approx(expected, rel=0.1)
    assert part.times == 8 / measured.rows
    adam = measured.step["optimizer"].work
    weights = sum(layers) + head * 2 + 32 * 5
    assert adam.launches == 1 and adam.bytes == pytest.approx(32 * weights, rel=0.01)


def test_a_step_takes_the_longest_of_launch_arithmetic_and_bytes_of_each_operator():
    profile = Profile("made up", {"fp32": 1e12, "bf16": 2e12}, 1e9)
    work = Work({(10**9, 10): 2, (10, 10**7): 3, (1, 1): 4})  # 1 ms of arithmetic, 10 ms of bytes, a launch
    measured = Measured({}, {}, 1, 1, 1, (1, 1), 1, 1, step={"a": Part(work, 2.5), "b": Part(work, 1, in_graph=True)})
    a, b = shares(measured, "fp32", profile).values()
    assert a.seconds == pytest.approx(2.5 * (0.002 + 0.03 + 4 * LAUNCH)) and a.bound == "bandwidth"
    assert (a.launches, a.flops, a.bytes) == (22, 2.5 * work.flops, 2.5 * work.bytes)
    assert b.seconds == pytest.approx(0.002 + 0.03 + 4 * GRAPH_LAUNCH)
    assert shares(measured, "bf16", profile)["b"].seconds == pytest.approx(0.001 + 0.03 + 4 * GRAPH_LAUNCH)


def test_a_step_of_ppo_has_its_parts_as_often_as_they_run(folder):
    fields = {"rollout_batch_size": 12, "mini_batch_size": 6, "ppo_epochs": 3, "micro_batch_tokens": 256}
    config = CONFIGS["ppo"](**{**bench.PPO, **fields})  # two sequences of 128 tokens at once
    measured = Measurer("ppo", {"policy": folder, "reward": folder}, Target())(config, 4)
    times = {name: part.times for name, part in measured.step.items()}
    assert times == {
        "prefill": 1, "decode": 32 * 3, "score": 6, "experience": 6, "update of the critic": 18,
        "update of the policy": 18, "optimizer": 6,
    }  # fmt: skip
    assert [name for name, part in measured.step.items() if part.in_graph] == ["decode"]
    token = measured.phases["rollout"].token
    longer = Measurer("ppo", {"policy": folder, "reward": folder}, Target())(
        config.model_copy(update={"max_new_tokens": 64}), 4
    )
    assert longer.phases["rollout"].token.bytes > token.bytes and longer.step["decode"].times == 64 * 3


def test_the_command_prints_a_step(folder, capsys):
    arguments = ["plan", "--stage", "sft", f"model={folder}", "max_tokens=64", "--device", "h100"]
    assert cli.main([*arguments, "--gpu-memory", "80GB"]) == 0
    lines = capsys.readouterr().out.splitlines()
    line = next(line for line in lines if line.startswith("a step"))
    assert "(H100 SXM, published: 989 TFLOP/s in bf16, 3350 GB/s); computed, not run" in line
    assert [text.split()[0] for text in lines[lines.index(line) + 2 :]] == ["update", "optimizer"]
    assert cli.main([*arguments, "--gpu-memory", "80GB", "--json"]) == 0
    step = json.loads(capsys.readouterr().out)["step"]
    assert f"at least {step['seconds']:.3g} s" in line
    assert step["seconds"] == pytest.approx(sum(part["seconds"] for part in step["parts"].values()))


def test_this_machine_can_be_measured(monkeypatch):
    monkeypatch.setattr(speed, "TRIALS", 1)
    found = profile_of(None, True)
    assert found.flops.keys() == {"bf16", "fp32"} and min(*found.flops.values(), found.bandwidth, found.launch) > 0
    assert profile_of("h200", False) is PROFILES["h200"] and profile_of(None, False) is None


@pytest.mark.parametrize(
    ("name", "calibrate", "message"),
    [
        ("h1000", False, "--device: 'h1000' is not known; use one of a10, a100, .*, or --calibrate"),
        ("h100", True, "--device: h100: --calibrate measures this machine instead; give one of the two"),
    ],
)
def test_a_device_that_is_not_known_is_one_sentence(name, calibrate, message):
    with pytest.raises(UserError, match=message):
        profile_of(name, calibrate)
