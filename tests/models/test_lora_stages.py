"""LoRA in SFT and reward training, the folders it writes, and PPO that starts from them."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, pipeline

from fastrlhf import UserError, inference
from fastrlhf.config.errors import ConfigError
from fastrlhf.config.stages import RewardConfig
from fastrlhf.models import heads, loading
from fastrlhf.models.adapter_folder import read_adapter
from fastrlhf.models.token_batch import target_log_probs
from fastrlhf.rl.scorers import AdapterScorer
from fastrlhf.sft import main as sft_main
from tests import lora_runs as runs
from tests import tiny
from tests.runs import experience_of, train_keeping

MODELS = pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
STAGES = pytest.mark.parametrize("stage", [runs.sft, runs.reward_model])


def scores(model, rows=((3, 4, 5), (9, 8, 7, 6))) -> torch.Tensor:
    with torch.no_grad():
        return heads.sequence_scores(model, rows)


# ------------------------------------------------------------------------------------------------- training


@STAGES
@MODELS
def test_an_adapter_trains_and_the_base_keeps_its_bytes(stage, make):
    t = stage(make(), total_steps=6)
    base = {k: v.clone() for k, v in t.model.state_dict().items() if "lora_" not in k and "score" not in k}
    losses = [step.metrics["loss/train"] for step in t]
    assert losses[-1] < losses[0]
    assert all(torch.equal(base[k], v) for k, v in t.model.state_dict().items() if k in base)
    moved = [p for n, p in t.trained()["model"].parts.items() if "lora_B" in n]
    assert len(moved) == len(t.adapters.layers) > 0 and all(float(p.detach().abs().sum()) > 0 for p in moved)


def test_the_first_loss_is_that_of_full_training():
    """B starts at 0; the gradient of B is then that of W times A^T, by hand."""
    t, full = (
        runs.sft(tiny.llama(), lora={"r": 2, "alpha": 6}, total_steps=1),
        runs.sft(tiny.llama(), lora=None, total_steps=1),
    )
    grads = {}
    for trainer in (t, full):
        batch = next(trainer.batches(trainer.items[:4]))
        (-target_log_probs(trainer.model, batch).sum()).backward()
        grads[trainer] = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
    name = "model.layers.1.mlp.up_proj"
    down = t.model.get_submodule(name).lora_A["policy"].weight
    want = 3.0 * grads[full][f"{name}.weight"] @ down.T
    torch.testing.assert_close(grads[t][f"{name}.lora_B.policy.weight"], want, rtol=1e-4, atol=1e-6)
    assert t.train()["loss/train"] == pytest.approx(full.train()["loss/train"], rel=1e-6)


@STAGES
def test_checkpoints_hold_the_adapter_alone_and_resume_exactly(stage, tmp_path):
    fields = {"save_every": 1, "total_steps": 4}
    through = stage(tiny.llama(), **fields, output_dir=str(tmp_path / "through"))
    train_keeping(through, 2, tmp_path / "resumed")
    again = stage(tiny.llama(), **fields, output_dir=str(tmp_path / "resumed"), resume=True)
    assert again.steps_done == 2
    again.train()
    a, b = (t.trained()["model"].parts for t in (through, again))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    held = {f.name for f in (tmp_path / "resumed" / "checkpoints" / "step-000004").rglob("*.safetensors")}
    assert held == {"weights_model.safetensors", "optimizer_model.safetensors", "rng.safetensors"}
    for name in ("metrics.jsonl", "checkpoints/step-000004/weights_model.safetensors"):
        assert (tmp_path / "through" / name).read_bytes() == (tmp_path / "resumed" / name).read_bytes()


def test_head_only_and_lora_contradict_each_other():
    with pytest.raises(ConfigError, match="head_only = true: trains no adapter; leave lora out"):
        RewardConfig(lora=4, head_only=True)


# ------------------------------------------------------------------------------------------------- folders


@MODELS
def test_sft_folders_load_in_peft_transformers_and_here(make, tmp_path):
    peft = pytest.importorskip("peft")
    base = runs.base(tmp_path / "base", make)
    t = runs.sft(base)
    t.train()
    want = runs.logits(t.model)
    t.save(tmp_path / "merged")
    t.save(tmp_path / "adapter", adapter=True)
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    peft_model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    models = [
        AutoModelForCausalLM.from_pretrained(tmp_path / "merged"),
        peft_model,
        loading.load_policy(str(tmp_path / "adapter")),
        loading.load_policy(str(tmp_path / "merged")),
    ]
    for model in models:
        torch.testing.assert_close(runs.logits(model), want, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(runs.logits(make()), want, atol=1e-2)
    assert loading.load_policy(str(tmp_path / "adapter")).generation_config.eos_token_id == 1
    assert AutoTokenizer.from_pretrained(tmp_path / "adapter").chat_template == tiny.CHAT_TEMPLATE


@MODELS
def test_reward_folders_load_in_peft_transformers_and_here(make, tmp_path):
    peft = pytest.importorskip("peft")
    base = runs.base(tmp_path / "base", make)
    t = runs.reward_model(base)
    t.train()
    want = scores(t.model)
    t.save(tmp_path / "merged")
    t.save(tmp_path / "adapter", adapter=True)
    stock = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    peft_model = peft.PeftModel.from_pretrained(stock, tmp_path / "adapter").base_model.model
    head = peft_model.score.modules_to_save["default"]
    with torch.no_grad():
        stock_scores = heads.sequence_scores(peft_model, [(3, 4, 5), (9, 8, 7, 6)], head)
    torch.testing.assert_close(stock_scores, want, rtol=1e-4, atol=1e-4)
    for folder in ("merged", "adapter"):
        torch.testing.assert_close(
            scores(loading.load_reward_model(str(tmp_path / folder))), want, rtol=1e-4, atol=1e-4
        )
        assert loading.is_scalar_model(str(tmp_path / folder))
    again = runs.reward_model(str(tmp_path / "adapter"), total_steps=1)  # a reward model to go on with
    torch.testing.assert_close(scores(again.model), want, rtol=1e-5, atol=1e-5)


def test_the_command_line_writes_both_folders_and_reads_them(tmp_path, capsys):
    base = runs.base(tmp_path / "base")
    out = tmp_path / "run"
    config = runs.SFTConfig(**runs.COMMON, output_dir=str(out))
    assert sft_main({"model": base, "data": runs.ROWS}, config) == 0
    assert json.loads((out / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == base
    sampling = {"n": 1, "max_new_tokens": 8, "temperature": 0.0}
    sources = (str(out / "final"), str(out / "adapter"), base)
    final, adapter, before = (list(inference.sample(source, ["the cat"], **sampling)) for source in sources)
    assert final == adapter != before
    assert pipeline("text-generation", str(out / "final"))("the cat", max_new_tokens=2)
    rm = runs.reward_model(base)
    rm.train()
    rm.save(tmp_path / "rm", adapter=True)
    rm.save(tmp_path / "rm_merged")
    given = [inference.score(str(tmp_path / name), ["the cat"], ["yes"])[0] for name in ("rm", "rm_merged")]
    assert given[0] == pytest.approx(given[1], abs=1e-4)


def test_an_adapter_over_an_adapter_is_written_as_one(tmp_path):
    """A = [A1; A2], B = [s1 B1, s2 B2]: the joined adapter is the sum, also where ranks and layers differ."""
    base = runs.base(tmp_path / "base")
    first = runs.sft(base, lora={"r": 2, "alpha": 6, "target_modules": ["q_proj", "up_proj"]})
    first.train()
    first.save(tmp_path / "first", adapter=True)
    second = runs.sft(str(tmp_path / "first"), lora={"r": 3, "alpha": 4, "target_modules": ["up_proj", "o_proj"]})
    torch.testing.assert_close(runs.logits(second.model), runs.logits(first.model), rtol=0, atol=0)
    second.train()
    second.save(tmp_path / "second", adapter=True)
    second.save(tmp_path / "merged")
    want = runs.logits(second.model)
    joined = read_adapter(tmp_path / "second", "policy")
    assert joined.base == base
    ranks = {name.rpartition(".")[2]: low.down.shape[0] for name, low in joined.layers.items()}
    assert ranks == {"q_proj": 2, "up_proj": 5, "o_proj": 3}
    peft = pytest.importorskip("peft")
    stock = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "second")
    for model in (stock, loading.load_policy(str(tmp_path / "second")), loading.load_policy(str(tmp_path / "merged"))):
        torch.testing.assert_close(runs.logits(model), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; only LORA"),
        ({"use_dora": True}, "use_dora = True cannot be read; merge the adapter with peft"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save = \['lm_head'\] cannot be read"),
        ({"base_model_name_or_path": None}, "names no base_model_name_or_path"),
        ({"base_model_name_or_path": "/no/such/folder"}, "'/no/such/folder' does not exist"),
        ({"task_type": "SEQ_CLS"}, "without the weights of its head"),
    ],
)
def test_what_cannot_be_read_of_an_adapter_is_named(tmp_path, change, said):
    t = runs.sft(runs.base(tmp_path / "base"), total_steps=1)
    t.save(tmp_path / "adapter", adapter=True)
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    load = loading.load_reward_model if "task_type" in change else loading.load_policy
    with pytest.raises(UserError, match=said):
        load(str(tmp_path / "adapter"))


def test_an_adapter_of_another_model_is_refused(tmp_path):
    t = runs.sft(runs.base(tmp_path / "base"), total_steps=1)
    t.save(tmp_path / "adapter", adapter=True)
    for make, said in (
        (tiny.gpt2, "no linear layer 'model.layers.0"),
        (lambda: tiny.llama(hidden_size=16), "is for a"),
    ):
        make().save_pretrained(tmp_path / "base")
        for load in (loading.load_policy, runs.sft):
            with pytest.raises(UserError, match=said):
                load(str(tmp_path / "adapter"))


# ------------------------------------------------------------------------------------------------- PPO


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """base; sft: an adapter on it; rm: a reward adapter on it, of the rank that `ppo` takes; over: one over sft."""
    root = tmp_path_factory.mktemp("folders")
    found = {"base": runs.base(root / "base", hidden_size=64, vocab_size=640)}
    for name, stage, source in (("sft", runs.sft, "base"), ("rm", runs.reward_model, "base"),
                                ("over", runs.reward_model, "sft")):  # fmt: skip
        t = stage(found[source], total_steps=4)
        t.train()
        t.save(root / name, adapter=True)
        found[name] = str(root / name)
    return found


@pytest.mark.parametrize("lora", [4, None])
def test_the_reference_is_the_sft_policy_not_the_bare_base(folders, lora):
    """Step 0: ratio exactly 1, KL exactly 0; and the policy computes what the SFT run ended with."""
    t = runs.ppo(folders["sft"], lora=lora, mini_batch_size=8, total_steps=1)
    want = runs.logits(loading.load_policy(folders["sft"]))
    torch.testing.assert_close(runs.logits(t.policy), want, rtol=1e-4, atol=1e-4)
    with t.roles.reference() as model:
        assert torch.equal(runs.logits(model), runs.logits(t.policy))
    assert not torch.allclose(want, runs.logits(loading.load_policy(folders["base"])), atol=1e-2)
    metrics = t.train()
    assert metrics["policy/ratio"] == 1.0 and metrics["kl/ref"] == 0.0
    with t.roles.reference() as model:  # the update moved the policy alone
        torch.testing.assert_close(runs.logits(model), want, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(runs.logits(t.policy), want, atol=1e-3)


def test_ppo_over_an_sft_adapter_exports_both(folders, tmp_path):
    t = runs.ppo(folders["sft"], total_steps=1)
    runs.stir(t.roles.adapters, "policy")
    t.save(tmp_path / "merged")
    t.save(tmp_path / "adapter", adapter=True)
    for folder in ("merged", "adapter"):
        got = runs.logits(loading.load_policy(str(tmp_path / folder)))
        torch.testing.assert_close(got, runs.logits(t.policy), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("policy", "reward"), [("base", "rm"), ("sft", "rm"), ("sft", "over")])
def test_a_reward_adapter_scores_over_the_policys_base(folders, policy, reward):
    t = runs.ppo(folders[policy], folders[reward], critic="shared_trunk", lora=1)
    assert t.scorer.model is None and t.scorer.adapters is t.roles.adapters
    runs.stir(t.roles.adapters, "policy")  # what the policy learns is nothing to the reward model
    rollout = t.rollout(t.prompts, 1, purpose="rollout")
    alone = loading.load_reward_model(folders[reward])
    want = scores(alone, [p + r for p, r in zip(rollout.prompt_ids, rollout.response_ids, strict=True)])
    torch.testing.assert_close(torch.tensor(t.scorer(rollout).values), want, rtol=1e-4, atol=1e-4)
    frozen = {n: p.clone() for n, p in t.roles.adapters.parameters("reward").items()}
    t.train()
    assert all(torch.equal(frozen[n], p) for n, p in t.roles.adapters.parameters("reward").items())
    assert not any(p.requires_grad for p in t.roles.adapters.parameters("reward").values())


@pytest.mark.parametrize("reward", ["rm", runs.letters], ids=["adapter", "function"])
def test_all_roles_together_take_little_more_than_one_model(folders, reward, tmp_path):
    model = runs.held_bytes(loading.load_policy(folders["base"]))
    if reward == "rm":
        runs.reward_model(folders["base"], lora=1).save(tmp_path / "rm", adapter=True)
        reward = str(tmp_path / "rm")
    one = runs.ppo(folders["base"], reward, critic="shared_trunk", lora=1)
    assert one.ref_policy is None and one.critic.trunk is one.policy
    held = runs.held_bytes(*runs.roles_of(one)) - runs.held_bytes(one.critic.head)  # 4 H: large beside this model
    assert model < held <= 1.1 * model
    apart = runs.ppo(folders["base"], folders["rm"], lora=None)
    assert runs.held_bytes(*runs.roles_of(apart)) > 3 * model  # those of reward model and critic have no output head


def test_the_adapter_of_another_base_gets_a_model_of_its_own(folders, tmp_path):
    other = runs.base(tmp_path / "other", seed=1, hidden_size=64, vocab_size=640)
    t = runs.ppo(other, folders["rm"], total_steps=1)
    assert not isinstance(t.scorer, AdapterScorer) and t.scorer.model is not None
    t.train()


def test_the_critic_starts_from_the_reward_adapter(folders):
    """V at the last token is the score, where layers and ranks agree; else the head is 0."""
    t = runs.ppo(folders["base"], folders["rm"])
    row = [5, 6, 7, 8]
    with torch.no_grad(), t.critic.active():
        value = t.critic.read(heads.hidden_states(t.policy, torch.tensor([row]))[0, -1])
    assert float(value) == pytest.approx(float(scores(loading.load_reward_model(folders["rm"]), [row])), abs=1e-5)
    assert t.critic.head.weight.requires_grad and t.critic.head is not t.scorer.head
    metrics = t.train()
    assert metrics["value/grad_norm"] > 0
    for fields, policy in (({"lora": 2}, "base"), ({}, "sft")):
        other = runs.ppo(folders[policy], folders["rm"], **fields)
        assert float(other.critic.head.weight.detach().abs().sum()) == 0.0


@pytest.mark.parametrize("form", [{}, {"critic": "shared_trunk"}])
def test_ppo_with_every_adapter_resumes_exactly(folders, tmp_path, form):
    fields = {**form, "save_every": 1, "total_steps": 3}
    through = runs.ppo(folders["sft"], folders["rm"], **fields, output_dir=str(tmp_path / "through"))
    train_keeping(through, 1, tmp_path / "resumed")
    again = runs.ppo(folders["sft"], folders["rm"], **fields, output_dir=str(tmp_path / "resumed"), resume=True)
    assert again.steps_done == 1
    again.train()
    states = [t.policy.state_dict() for t in (through, again)]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert (tmp_path / "through/metrics.jsonl").read_bytes() == (tmp_path / "resumed/metrics.jsonl").read_bytes()


def test_reference_and_policy_go_through_one_call_path(folders):
    """Both are `target_log_probs` of the same model object: as many forwards of it, none of another."""
    t = runs.ppo(folders["sft"], critic="shared_trunk", total_steps=1)
    rollout = t.rollout(t.prompts, 1, purpose="rollout")
    seen = []
    layer = next(iter(t.roles.adapters.layers.values()))

    def note(*_: object) -> None:
        seen.append(() if layer.disable_adapters else tuple(layer.active_adapters))

    t.policy.base_model.register_forward_hook(note)
    experience_of(t, rollout)
    assert len(seen) > 2 and seen == [("sft", "policy"), ("sft",)] * (len(seen) // 2)
