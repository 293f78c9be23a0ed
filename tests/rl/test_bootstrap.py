"""bootstrap_truncated: what a response cut by max_new_tokens still had ahead of it is the critic's value of its end."""

from __future__ import annotations

import pytest
import torch

from fastrlhf import PPOConfig, UserError
from fastrlhf.models.heads import scalar_outputs
from tests import tiny
from tests.runs import experience_of, last_layer, ppo_trainer

FORMS = {
    "separate": {},
    "gpt2": {},
    "lora": {"lora": 4},
    "shared_trunk": {"critic": "shared_trunk"},
    "shared_trunk, rollout": {"critic": "shared_trunk", "old_log_probs": "rollout"},
    "lora, shared_trunk, rollout": {"lora": 4, "critic": "shared_trunk", "old_log_probs": "rollout"},
}
ROWS = list(range(8))


def experience(form: str, on: bool, micro: int = 10_000):
    """-> trainer, rollout of 8 rows of which some are cut, experience. gamma 1, lambda 0: A_t = r_t + V' - V_t."""
    policy = tiny.gpt2() if form == "gpt2" else tiny.llama()
    policy.generation_config.eos_token_id = [1, *range(100, 112)]  # so that some replies end and others are cut
    options = {"gae_lambda": 0.0, "whiten_advantages": False, "kl_coef": 0.0, "bootstrap_truncated": on}
    sizes = {"mini_batch_size": 8, "max_new_tokens": 24, "max_prompt_tokens": 104, "micro_batch_tokens": micro}
    t = ppo_trainer(**FORMS[form], **options, **sizes, policy=policy, reward=lambda p, r: [1.0] * len(r))
    torch.nn.init.normal_(last_layer(t).weight, generator=torch.Generator().manual_seed(5))
    rollout = t.rollout([t.prompts[i % 6] for i in ROWS], 1, purpose="rollout")
    assert set(rollout.finished) == {True, False}
    return t, rollout, experience_of(t, rollout)[0]


@pytest.mark.parametrize("form", FORMS)
def test_a_cut_response_goes_on_with_the_value_of_its_end(form):
    t, rollout, on = experience(form, True)
    _, again, off = experience(form, False)
    assert again.response_ids == rollout.response_ids
    with torch.no_grad(), t.critic.active():
        for row in ROWS:
            ids, last = rollout.rows.whole(row), len(rollout.response_ids[row]) - 1
            hidden = t.critic.trunk.base_model(torch.tensor([ids])).last_hidden_state
            value = scalar_outputs(t.critic.head, hidden)[0]
            before, after = value[-2], 0.0 if rollout.finished[row] else value[-1]
            assert float(on.advantages[row, last]) == pytest.approx(float(1.0 + after - before), abs=1e-4)
            assert float(on.returns[row, last]) == pytest.approx(float(1.0 + after), abs=1e-4)
            assert torch.equal(on.advantages[row, :last], off.advantages[row, :last])
            if rollout.finished[row]:
                assert torch.equal(on.advantages[row], off.advantages[row])
            else:
                assert abs(float(after)) > 0.01


@pytest.mark.parametrize("form", ["separate", "shared_trunk, rollout"])
def test_micro_batches_do_not_matter(form):
    whole, split = (experience(form, True, micro)[2].advantages for micro in (10_000, 1))
    torch.testing.assert_close(whole, split, rtol=1e-5, atol=1e-5)


def test_a_cut_response_that_fills_the_models_positions():
    """104 of GPT-2's 128 positions are the prompt, 24 the reply: the value of its end needs no position more."""
    t, rollout, _ = experience("gpt2", True)
    rows = [[5] * (128 - len(ids)) + ids for ids in rollout.response_ids]
    values = t.critic.end_values(rows, rollout.finished)
    assert values.isfinite().all() and [float(v) == 0.0 for v in values] == rollout.finished


def test_it_needs_a_critic():
    with pytest.raises(UserError, match="bootstrap_truncated = true: advantage = reinforce"):
        PPOConfig(advantage="reinforce++", bootstrap_truncated=True)
