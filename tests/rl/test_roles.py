"""One backbone, several roles: the critic on the policy's trunk, LoRA adapters over a frozen base."""

from __future__ import annotations

import copy
import sys
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM

from fastrlhf import PPOConfig, PPOTrainer, RolloutEngine, SamplingParams, UserError
from fastrlhf.config.inputs import lora_options
from fastrlhf.models import heads
from fastrlhf.models.heads import ValueHead
from fastrlhf.models.lora import Adapters
from fastrlhf.rl.losses import normalizer_of, policy_loss, token_weights, value_loss
from tests import tiny
from tests.runs import (
    copies,
    experience_of,
    gradients_of,
    last_layer,
    leave_after,
    ppo_trainer,
    resumed_equals_whole,
    storages,
)

FORMS = {
    "shared_trunk": {"critic": "shared_trunk"},
    "lora": {"lora": 4},
    "lora, shared_trunk": {"lora": {"r": 4, "alpha": 16}, "critic": "shared_trunk"},
}


trainer = partial(ppo_trainer, total_steps=3)


def plain_weights(t: PPOTrainer) -> dict[str, torch.Tensor]:
    """The base's tensors under the names of the plain model."""
    state = t.policy.state_dict()
    return {k.replace(".base_layer.", "."): v.clone() for k, v in state.items() if "lora_" not in k}


@pytest.mark.parametrize("old", ["recompute", "rollout"])
@pytest.mark.parametrize("form", FORMS)
def test_the_first_update_has_ratio_one_and_no_kl(form, old):
    t = trainer(**FORMS[form], total_steps=1, ppo_epochs=1, mini_batch_size=8, old_log_probs=old)
    metrics = next(iter(t)).metrics
    exact = 0.0 if old == "recompute" else 1e-6
    assert metrics["policy/ratio"] == pytest.approx(1.0, abs=exact)
    assert metrics["kl/ref"] == pytest.approx(0.0, abs=10 * exact)
    assert metrics["rollout/mismatch_max"] < 1e-4


@pytest.mark.parametrize("form", FORMS)
def test_every_form_learns_and_what_is_frozen_keeps_its_bytes(form):
    def letters(prompts, responses):
        return [sum(map(str.isalpha, r)) / 10 for r in responses]

    fields = {"total_steps": 12, "ppo_epochs": 6, "kl_coef": 0.0, "rollout_batch_size": 32, "mini_batch_size": 32}
    fields |= {"runaway_kl": None}  # nothing holds it, and a random reference says every token alike
    if "lora" in FORMS[form]:  # adapters on a tiny random model move its rewards less than chance does
        fields |= {"total_steps": 3, "ppo_epochs": 2}
    t = trainer(**FORMS[form], **fields, reward=letters)
    before = plain_weights(t)
    steps = [step.metrics for step in t]
    rewards = [metrics["reward/mean"] for metrics in steps]
    if "lora" not in FORMS[form]:
        assert sum(rewards[6:]) > sum(rewards[:6]) + 0.3
    assert steps[-1]["kl/ref"] > 0 and float(last_layer(t).weight.detach().abs().sum()) > 0
    kept = all(torch.equal(before[k], v) for k, v in plain_weights(t).items())
    assert kept == ("lora" in FORMS[form])
    if t.roles.adapters is not None:
        moved = [
            float(p.detach().abs().sum()) for n, p in t.roles.adapters.parameters("policy").items() if "lora_B" in n
        ]
        assert len(moved) == 14 and all(size > 0 for size in moved)


def test_one_forward_and_one_backward_give_both_gradients_and_the_value_loss_ends_at_the_head():
    """Shared trunk: the trunk's gradient is that of the policy loss alone, the head's that of vf_coef * value loss."""
    t = trainer(critic="shared_trunk", vf_coef=0.3, total_steps=1, max_grad_norm=1e9)
    torch.nn.init.normal_(last_layer(t).weight)
    rollout = t.rollout([t.prompts[i] for i in range(4)] * 2, 1, purpose="rollout")
    experience, epochs, _ = experience_of(t, rollout)
    mini, trained = epochs[0][0], [*t.policy.parameters(), *t.critic.head.parameters()]
    normalizer, weights = normalizer_of(experience.response_mask, mini), token_weights(experience, mini, t.config)
    groups = rollout.rows.micro_batches(mini, t.memory.tokens)
    for group in groups:
        batch, tokens = rollout.rows.batch(group, t.device), experience.tokens(group, weights)
        hidden, head = batch.hidden(t.policy), heads.lm_head(t.policy)
        policy_loss(hidden, batch, tokens, t.config, head=head, normalizer=normalizer).loss.backward()
        states, targets = batch.hidden(t.policy).detach(), experience.value_tokens(group)
        values = t.critic.head(states)
        (0.3 * value_loss(values, targets, t.config, normalizer=normalizer).loss).backward()
    want = [p.grad.clone() for p in trained]
    t.learner.drop_gradients()
    forwards = []
    t.policy.base_model.register_forward_hook(lambda *_: forwards.append(1))
    got = gradients_of(t, lambda: t.learner.update(rollout.rows, experience, epochs, 0), trained)
    assert len(forwards) == len(groups)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))


def test_a_warm_up_on_a_shared_trunk_trains_the_head_alone():
    t = trainer(critic="shared_trunk", critic_warmup_steps=2)
    before, losses = plain_weights(t), []
    for step in t:
        losses.append(step.metrics["value/loss"])
        if len(losses) == 2:
            assert all(torch.equal(before[k], v) for k, v in plain_weights(t).items())
            assert float(last_layer(t).weight.detach().abs().sum()) > 0
    assert not all(torch.equal(before[k], v) for k, v in plain_weights(t).items())


@pytest.mark.parametrize("form", [f for f in FORMS if "shared" in f])
def test_decoding_hands_over_the_values_a_training_forward_gives(form):
    t = trainer(**FORMS[form], old_log_probs="rollout", rollout_batch_size=12, mini_batch_size=12)
    torch.nn.init.normal_(last_layer(t).weight)
    rollout = t.rollout([t.prompts[i] for i in range(6)], 2, purpose="rollout")
    batch = rollout.rows.batch(list(range(12)), t.device)
    torch.testing.assert_close(torch.cat(rollout.values), t.critic.values(batch).detach(), rtol=1e-4, atol=1e-4)
    forwards = []
    t.policy.base_model.register_forward_hook(lambda *_: forwards.append(1))
    experience_of(t, rollout)
    assert len(forwards) == ("lora" in FORMS[form])  # the reference alone, where it is the policy's base


def test_lora_holds_one_copy_of_the_weights_for_every_role():
    base = sum(p.numel() * 4 for p in {id(p): p for p in tiny.llama(hidden_size=64).parameters()}.values())
    forms = {"separate": {}, "shared_trunk": {"critic": "shared_trunk"}, "lora": {"lora": 1}}
    forms["both"] = {**forms["lora"], **forms["shared_trunk"]}
    head = (4 * 64 * 64 + 10 * 64 + 1) * 4 / base  # of a shared trunk: two norms, 4 H x H with its bias, 4 H, a bias
    sizes = {
        name: storages(trainer(policy=tiny.llama(hidden_size=64), **fields)) / base for name, fields in forms.items()
    }
    assert sizes["separate"] > 2.5 and sizes["shared_trunk"] < 2.01 + head
    assert sizes["both"] <= 1.1 + head and sizes["lora"] < 1.2


def test_policy_critic_and_reference_are_told_apart():
    """Each adapter moves its own role only."""
    t = trainer(lora=4)
    ids = torch.arange(3, 11)[None]

    def read():
        with torch.no_grad():
            policy = heads.hidden_states(t.policy, ids)
            with t.critic.active():
                critic = heads.hidden_states(t.policy, ids)
            with t.roles.reference() as model:
                return policy, critic, heads.hidden_states(model, ids)

    first = read()
    assert torch.equal(first[0], first[1]) and torch.equal(first[0], first[2])
    with torch.no_grad():
        for role in ("policy", "value"):
            for p in t.roles.adapters.parameters(role).values():
                p.add_(torch.randn_like(p) * 0.1)
            moved = [not torch.equal(a, b) for a, b in zip(first, read(), strict=True)]
            assert moved == [True, role == "value", False]


def test_generation_applies_the_adapter_and_leaves_every_byte():
    """Greedy tokens equal those of the merged model in stock transformers; base and adapter are bit-identical after."""
    t = trainer(lora=4)
    with torch.no_grad():
        for p in t.roles.adapters.parameters("policy").values():
            p.add_(torch.randn_like(p) * 0.2)
    before = {k: v.clone() for k, v in t.policy.state_dict().items()}
    prompts = [ids for _, ids in t.prompts]
    params = SamplingParams(12, temperature=0.0, stop_token_ids=[])
    out = RolloutEngine(t.policy, t.tokenizer).generate(prompts, params)
    assert all(torch.equal(before[k], v) for k, v in t.policy.state_dict().items())
    merged = tiny.llama()
    merged.load_state_dict(t.roles.adapters.merged("policy"))
    plain = RolloutEngine(tiny.llama(), t.tokenizer).generate(prompts, params)
    for prompt, response in zip(prompts, out.response_ids, strict=True):
        ids = torch.tensor([prompt])
        want = merged.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, eos_token_id=None
        )
        assert response == want[0, len(prompt) :].tolist()
    assert out.response_ids != plain.response_ids


def test_saved_folders_load_in_stock_transformers_and_peft(tmp_path):
    peft = pytest.importorskip("peft")
    t = trainer(lora=4)
    t.train()
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        want = t.policy(ids).logits
        t.save(tmp_path / "merged")
        t.save(tmp_path / "adapter", adapter=True)
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        adapted = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path / "adapter")
        torch.testing.assert_close(merged(ids).logits, want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(adapted(ids).logits, want, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(tiny.llama()(ids).logits, want, atol=1e-2)
    with pytest.raises(UserError, match="adapter=True needs a run with lora"):
        trainer().save(tmp_path / "none", adapter=True)


@pytest.mark.parametrize("form", FORMS)
def test_a_resumed_run_ends_with_the_same_bytes(form, tmp_path):
    fields = {**FORMS[form], "ppo_epochs": 2, "save_every": 2, "total_steps": 4}
    files = resumed_equals_whole(tmp_path, 2, **fields)
    assert ("weights_policy.safetensors" in files) == ("lora" in FORMS[form])
    assert "weights_value.safetensors" in files and {
        "optimizer_policy.safetensors",
        "optimizer_value.safetensors",
    } < set(files)


def test_gradient_checkpointing_gives_the_same_update():
    ends = []
    for checkpointing in (False, True):
        t = trainer(lora=4, gradient_checkpointing=checkpointing, total_steps=2)
        t.train()
        ends.append(copies(p for role in ("policy", "value") for p in t.roles.adapters.parameters(role).values()))
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_gpt2_and_chosen_layers():
    t = trainer(policy=tiny.gpt2(), lora={"r": 2, "target_modules": ["c_attn"]}, total_steps=2)
    assert len(t.roles.adapters.layers) == 2
    before = copy.deepcopy(t.roles.adapters.merged("policy"))
    t.train()
    after = t.roles.adapters.merged("policy")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"transformer.h.{i}.attn.c_attn.weight" for i in (0, 1)}


def test_mistakes_are_sentences(monkeypatch):
    with pytest.raises(UserError, match="value_model: advantage = rloo has no critic; leave value_model out"):
        trainer(advantage="rloo", samples_per_prompt=2, critic_learning_rate=0, value_model="does/not/exist")
    with pytest.raises(UserError, match=r"lora = .*: expected a rank, or \{r: rank"):
        PPOConfig(lora={"r": 8, "dropout": 0.1})
    with pytest.raises(UserError, match="value_model: with critic = shared_trunk the critic reads the policy's base"):
        trainer(critic="shared_trunk", value_model=tiny.llama())
    with pytest.raises(UserError, match="no linear layer is called 'nope'; the model has down_proj, gate_proj"):
        trainer(lora={"r": 4, "target_modules": ["nope"]})
    with pytest.raises(UserError, match="critic = shared_trunk: advantage = rloo has no critic"):
        PPOConfig(critic="shared_trunk", advantage="rloo", samples_per_prompt=2)
    for wrong in (0, "x", {"rank": 4}, {"r": True}, {"r": 2, "alpha": -1}, {"r": 2, "target_modules": []}, "[", 2.5):
        with pytest.raises(UserError, match="lora"):
            PPOConfig(lora=wrong)
    with pytest.raises(UserError, match="the model has adapters already"):
        model = tiny.llama()
        for _ in range(2):
            Adapters(model, lora_options(2), ["policy"], 0, None, print)
    monkeypatch.setitem(sys.modules, "peft", None)  # as where it is not installed
    with pytest.raises(UserError, match="pip install peft"):
        trainer(lora=4)


@pytest.mark.parametrize("text", [8, "8", "{r: 8}", {"r": 8, "alpha": 16}])
def test_every_spelling_of_lora(text):
    assert PPOConfig(lora=text).lora == {"r": 8, "alpha": 16, "target_modules": None}


# ----------------------------------------------------------------------------------------- the head of a shared trunk


def test_the_head_of_a_shared_trunk_by_hand():
    """V = w silu(U norm(h) + u) + b in float64; 0 at first; the same bits for a seed, others for another."""
    head, other = ValueHead(8, seed=3), ValueHead(8, seed=4)
    hidden = torch.randn(5, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert torch.equal(head(hidden), torch.zeros(5)) and head(hidden).dtype == torch.float32
    assert torch.equal(head.up.weight, ValueHead(8, seed=3).up.weight)
    assert not torch.equal(head.up.weight, other.up.weight) and float(head.up.weight.detach().abs().max()) <= 8**-0.5
    torch.nn.init.normal_(head.out.weight, generator=torch.Generator().manual_seed(2))
    wide = {name: p.detach().double() for name, p in head.named_parameters()}
    h = hidden.double()
    h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    z = (h * wide["norm.weight"] + wide["norm.bias"]) @ wide["up.weight"].T + wide["up.bias"]
    want = (z * z.sigmoid()) @ wide["out.weight"][0] + wide["out.bias"]
    torch.testing.assert_close(head(hidden).double(), want, rtol=1e-5, atol=1e-6)
    assert ValueHead.size(8) == sum(p.numel() for p in head.parameters()) == 4 * 8 * 8 + 10 * 8 + 1


@pytest.mark.parametrize("form", [f for f in FORMS if "shared" in f])
def test_a_wrong_value_moves_the_head_and_no_layer_of_the_policy(form):
    """Without advantages and KL only the value loss is left: the policy keeps every bit whatever its size."""
    t = trainer(
        **FORMS[form], total_steps=2, kl_coef=0.0, whiten_advantages=False, advantage_clip=1e-30, vf_coef=100.0,
        reward=lambda prompts, responses: [50.0] * len(responses), max_grad_norm=1e9,
    )  # fmt: skip
    assert t.learner.value_optimizer.max_grad_norm == 1e9 and t.config.critic_learning_rate == 1e-2
    head, policy = copies(t.critic.head.parameters()), copies(t.learner.policy_optimizer.params)
    hidden = {id(p) for p in t.learner.value_optimizer.params}
    assert hidden == {id(p) for p in t.critic.head.parameters()}
    gradients = []
    t.learner.policy_optimizer.inner.register_step_pre_hook(
        lambda *_: gradients.extend(float(p.grad.abs().max()) for p in t.learner.policy_optimizer.params)
    )
    t.train()
    assert max(gradients) < 1e-25 and policy is not None
    assert not any(torch.equal(a, b) for a, b in zip(head, copies(t.critic.head.parameters()), strict=True))


def test_the_form_of_the_critic_brings_its_own_defaults():
    shared = PPOConfig(critic="shared_trunk")
    assert (shared.critic_learning_rate, shared.gae_lambda) == (5e-3, 1.0)
    assert (PPOConfig().critic_learning_rate, PPOConfig().gae_lambda) == (5e-6, 0.95)
    given = PPOConfig(critic="shared_trunk", critic_learning_rate=1e-4, gae_lambda=0.9)
    assert (given.critic_learning_rate, given.gae_lambda) == (1e-4, 0.9)
    assert PPOConfig().replace(critic="shared_trunk").critic_learning_rate == 5e-3
    assert PPOConfig(critic="shared_trunk", gae_lambda="auto", critic_learning_rate="auto") == shared


def test_a_rate_for_a_whole_model_is_told_of(capsys):
    trainer(critic="shared_trunk", critic_learning_rate=4e-5)
    said = "critic_learning_rate = 4e-05 is slow for the new head of critic = shared_trunk"
    assert said in capsys.readouterr().out
    trainer(critic="shared_trunk", critic_learning_rate="auto")
    trainer(critic_learning_rate=4e-5)
    assert "is slow" not in capsys.readouterr().out


@pytest.mark.parametrize("form", [f for f in FORMS if "shared" in f])
def test_the_head_of_a_shared_trunk_survives_a_resume(tmp_path, form):
    resumed_equals_whole(tmp_path, 1, **FORMS[form], total_steps=2)


class LinearHead(torch.nn.Linear):
    """The head that a shared trunk had before."""

    def __init__(self, hidden: int, **_: object) -> None:
        super().__init__(hidden, 1, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden).squeeze(-1)


def test_a_checkpoint_with_the_linear_head_of_earlier_versions_is_refused_in_a_sentence(tmp_path, monkeypatch):
    fields = {"critic": "shared_trunk", "output_dir": str(tmp_path), "save_every": 1}
    with monkeypatch.context() as earlier:
        earlier.setattr("fastrlhf.rl.critic.ValueHead", LinearHead)
        leave_after(trainer(**fields), 1)
    with pytest.raises(UserError, match=r"step-0*1: its critic = shared_trunk is one linear layer.*another output_dir"):
        trainer(**fields, resume=True)
