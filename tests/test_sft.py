"""SFT: what is learnt, that how it is batched changes nothing, and that no row is lost unsaid."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from fastrlhf import SFTTrainer, UserError
from fastrlhf.data.encode import Example
from fastrlhf.models.token_batch import TokenBatch, target_row
from tests import tiny
from tests.sft_runs import (
    DATA,
    MODELS,
    MULTI,
    SINGLE,
    config,
    distance,
    log,
    one_step,
    settled,
    stock,
    targets,
    trainer,
    weights,
)

# -------------------------------------------------------------------------------------------------- loss and gradients


@MODELS
def test_loss_and_gradients_are_those_of_transformers(make):
    model = make()
    own = copy.deepcopy(model)
    expected = stock(own, trainer(model=copy.deepcopy(model)).items)
    expected.backward()
    loss, grads, _ = one_step(config(), model)
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    assert distance(grads, [p.grad for p in own.parameters()]) < 1e-5


@MODELS
@pytest.mark.parametrize(
    "fields",
    [
        {"micro_batch_tokens": 1},
        {"micro_batch_tokens": 64},
        {"packing": True},
        {"packing": True, "micro_batch_tokens": 1},
        {"packing": True, "micro_batch_tokens": 128, "max_tokens": 40},
        {"packing": True, "max_tokens": 1000},
        {"gradient_checkpointing": True},
    ],
    ids=str,
)
def test_batching_changes_nothing(make, fields):
    """Packed rows of 1000 tokens, too, on a model with 128 learned positions."""
    loss, grads, after = one_step(config(), make())
    other_loss, other_grads, other_after = one_step(config(**fields), make())
    assert other_loss == pytest.approx(loss, rel=1e-6)
    assert distance(other_grads, grads) < 1e-6
    assert distance(settled(other_after, grads), settled(after, grads)) < 1e-6


@MODELS
def test_order_of_a_batch_changes_nothing(make):
    loss, grads, after = one_step(config(), make())
    other_loss, other_grads, other_after = one_step(config(), make(), DATA[::-1])
    assert other_loss == pytest.approx(loss, rel=1e-6)
    assert distance(other_grads, grads) < 1e-6
    assert distance(settled(other_after, grads), settled(after, grads)) < 1e-6


def test_the_mean_is_over_tokens_not_over_micro_batches():
    """A long and a short reply: the mean of the two means would be another number."""
    data = [SINGLE[3], SINGLE[1]]
    long, short = trainer(data=data).items
    losses = [stock(tiny.llama(), [e]).item() for e in (long, short)]
    sizes = [sum(e.target) for e in (long, short)]
    expected = sum(a * n for a, n in zip(losses, sizes)) / sum(sizes)
    loss, *_ = one_step(config(mini_batch_size=2, micro_batch_tokens=1), tiny.llama(), data)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert abs(expected - sum(losses) / 2) > 1e-3


def test_packing_is_resolved_and_checked_as_in_ppo():
    """auto: not without flash attention; true: not for a model whose packed rows would see each other."""
    assert trainer(config(packing=None)).joined is False and trainer(config(packing=True)).joined is True
    leaking = tiny.llama()
    forward = leaking.model.forward
    leaking.model.forward = lambda *args, position_ids=None, **kwargs: forward(*args, **kwargs)
    with pytest.raises(UserError, match="packing: LlamaForCausalLM would let packed .* packing=false"):
        trainer(config(packing=True), model=leaking)


def test_flash_attention_gets_packed_examples_in_one_row():
    """It finds the borders between examples only where the batch is a single row."""
    t = trainer(config(packing=True, max_tokens=40))
    assert max(len(b.input_ids) for b in t.batches(t.items)) > 1
    t.model.config._attn_implementation = "flash_attention_2"
    batches = list(t.batches(t.items))
    assert all(len(b.input_ids) == 1 for b in batches)
    assert sum(b.input_ids.numel() for b in batches) == sum(len(e.ids) for e in t.items)


def test_packed_rows_restart_positions_and_predict_nothing_across_the_border():
    first, second = Example([5, 6, 7], [False, True, True], ""), Example([8, 9], [False, True], "")
    first, second = target_row(first), target_row(second)
    batch = TokenBatch.build([[first, second], [second]], torch.device("cpu"))
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9], [8, 9, 0, 0, 0]]
    assert batch.position_ids[0].tolist() == [0, 1, 2, 0, 1]
    assert batch.index.tolist() == [0, 1, 3, 5] and batch.labels.tolist() == [6, 7, 9, 9]


class LargestTensor(TorchDispatchMode):
    """The largest tensor that any operation returns while this is active."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("packing", [False, True])
def test_no_tensor_of_tokens_times_vocabulary_is_made(packing):
    vocabulary = 12000
    rows = [{"text": " ".join(tiny.TEXTS[:2])} for _ in range(48)]
    cfg = config(mini_batch_size=48, max_tokens=128, packing=packing)
    t = trainer(cfg, model=tiny.llama(vocab_size=vocabulary, hidden_size=16, intermediate_size=16), data=rows)
    tokens = sum(sum(e.target) for e in t.items)
    with LargestTensor() as largest:
        t.step()
    assert tokens > 1000
    assert largest.numel < tokens * vocabulary / 3


# ------------------------------------------------------------------------------------------------------ what is learnt


def test_only_what_the_assistant_says_is_a_target():
    t = trainer(data=[MULTI])
    assert targets(t, t.items[0]) == "the weather<|end|>no, the answer<|end|>"
    (batch,) = t.batches(t.items)
    assert t.tokenizer.decode(batch.labels) == targets(t, t.items[0])
    assert batch.input_ids.flatten()[batch.index + 1].tolist() == batch.labels.tolist()


def test_a_plain_prompt_is_no_target_and_its_reply_ends():
    for prompt_format, prompt in (("raw", "the cat sat"), ("auto", "<|user|>the cat sat<|end|><|assistant|>")):
        t = trainer(config(prompt_format=prompt_format), data=DATA[-1:])
        assert targets(t, t.items[0]) == " on the mat<|end|>"
        assert t.tokenizer.decode(t.items[0].ids) == f"{prompt} on the mat<|end|>"


def test_text_is_learnt_whole_and_ends():
    t = trainer(config(format="text"), data=[{"text": tiny.TEXTS[0]}])
    (example,) = t.items
    assert t.tokenizer.decode(example.ids) == tiny.TEXTS[0] + "<|end|>"
    assert example.target == [False] + [True] * (len(example.ids) - 1)  # nothing predicts the first token


def test_the_template_named_is_used_and_said(tmp_path):
    t = trainer(config(chat_template="default", output_dir=str(tmp_path / "run")), data=SINGLE[:1])
    assert t.tokenizer.decode(t.items[0].ids) == "User:\nthe cat\n\nAssistant:\nthe answer is yes<|end|>"
    assert "data: 1 conversations: through chat template default" in log(tmp_path / "run")


def test_the_console_says_template_and_counts(capsys):
    trainer()
    printed = capsys.readouterr().out
    assert "data: 7 conversations: through the tokenizer's chat template" in printed
    assert "data: 8 rows read, 8 used" in printed


# ----------------------------------------------------------------------------------------------------- held-out rows


@pytest.mark.parametrize("packing", [False, True])
def test_eval_loss_and_perplexity(packing):
    t = trainer(config(packing=packing, learning_rate=0), eval_data=[*SINGLE[:3], MULTI])
    expected = stock(tiny.llama(), t.eval_examples).item()
    found = t.evaluate()
    assert found["loss/eval"] == pytest.approx(expected, rel=1e-6)
    assert found["perplexity/eval"] == pytest.approx(math.exp(expected), rel=1e-5)


def test_held_out_rows_are_not_trained_on_and_prompts_stay_together():
    rows = [{"prompt": tiny.chat(f"the answer is {i // 2}"), "response": "no" * (i % 2 + 1)} for i in range(20)]
    t = trainer(config(eval_fraction=0.3), data=rows)
    train, held = ({e.group for e in part} for part in (t.items, t.eval_examples))
    assert len(t.items) == 14 and len(t.eval_examples) == 6 and t.sampler.n == 14
    assert not train & held and len(train | held) == 10
    again = trainer(config(eval_fraction=0.3), data=rows)
    assert again.eval_examples == t.eval_examples
    assert trainer(config(eval_fraction=0.3, seed=1), data=rows).eval_examples != t.eval_examples


def test_a_split_that_leaves_nothing_is_refused():
    with pytest.raises(UserError, match="eval_fraction = 0.5: 1 examples cannot be split"):
        trainer(config(eval_fraction=0.5), data=SINGLE[:1])


def test_the_best_model_is_kept(tmp_path):
    """Trained towards one answer and measured on another, the last evaluation is the worst."""
    run = tmp_path / "run"
    cfg = config(total_steps=3, eval_every=1, learning_rate=0.1, output_dir=str(run))
    t = trainer(cfg, data=SINGLE[:1], eval_data=SINGLE[2:3])
    seen = [(step.metrics["loss/eval"], weights(t.model)) for step in t]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [0, 1, 2, 3] and [r["loss/eval"] for r in rows[1:]] == [
        loss for loss, _ in seen
    ]
    lowest, expected = min(seen, key=lambda pair: pair[0])
    assert lowest < seen[-1][0]
    best = AutoModelForCausalLM.from_pretrained(run / "best")
    assert all(torch.equal(a, b) for a, b in zip(expected, weights(best), strict=True))


# ------------------------------------------------------------------------------------------------------------ training


def test_the_loss_goes_down():
    losses = [step.metrics["loss/train"] for step in trainer(config(total_steps=25, learning_rate=1e-2))]
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"total_steps": 3}, 3),
        ({"total_steps": None, "epochs": 2, "mini_batch_size": 3}, 6),
        ({"total_steps": None}, 1),
    ],
)
def test_number_of_optimizer_steps(fields, expected):
    """Two epochs of 8 rows in mini-batches of 3 are 6 steps, whatever the micro-batches."""
    t = trainer(config(**fields, micro_batch_tokens=32))
    done = []
    t.optimizer.inner.register_step_post_hook(lambda *_: done.append(1))
    assert t.total_steps == len(list(t)) == len(done) == expected


def test_every_epoch_uses_every_row_once():
    t = trainer(config(total_steps=None, epochs=3, mini_batch_size=4))
    seen = [i for _ in range(t.total_steps) for i in t.sampler.take(4)]
    assert sorted(seen) == sorted([*range(8)] * 3)


def test_the_learning_rate_follows_warmup_and_schedule():
    rates = [s.metrics["learning_rate"] for s in trainer(config(total_steps=4, warmup_steps=2, lr_schedule="linear"))]
    assert rates == pytest.approx([5e-4, 1e-3, 1e-3, 5e-4])


def test_gradients_are_clipped():
    free, clipped = (trainer(config(max_grad_norm=norm)) for norm in (1e9, 0.01))
    norms = []
    clipped.optimizer.inner.register_step_post_hook(
        lambda *_: norms.append(math.sqrt(sum(float(p.grad.square().sum()) for p in clipped.optimizer.params)))
    )
    assert clipped.train()["grad_norm"] == pytest.approx(free.train()["grad_norm"]) and norms == pytest.approx([0.01])


def test_a_loaded_model_is_trained_in_place():
    model = tiny.llama()
    before, t = weights(model), trainer(model=model)
    t.train()
    assert t.model is model and distance(weights(model), before) > 0


def test_learning_rate_zero_changes_nothing():
    model = tiny.llama()
    before = weights(model)
    trainer(config(learning_rate=0.0, total_steps=2), model=model).train()
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))


def test_same_seed_same_run_other_seed_another():
    def losses(seed: int) -> list[float]:
        return [s.metrics["loss/train"] for s in trainer(config(total_steps=3, mini_batch_size=2, seed=seed))]

    assert losses(0) == losses(0) != losses(1)


def test_dropout_is_off():
    quiet, noisy = (one_step(config(), tiny.gpt2(dropout=p)) for p in (0.0, 0.5))
    assert quiet[0] == noisy[0] and distance(quiet[2], noisy[2]) == 0


@MODELS
def test_gradient_checkpointing_really_recomputes(make):
    calls = []
    t = trainer(config(gradient_checkpointing=True, eval_every=1), model=make(), eval_data=SINGLE)
    t.evaluate()  # leaves the model in another mode
    body = t.model.base_model
    inner = (body.layers[0] if hasattr(body, "layers") else body.h[0]).mlp
    inner.register_forward_pre_hook(lambda *_: calls.append(1))
    t.step()
    assert len(calls) == 2


def test_bf16_trains_on_the_cpu(tmp_path):
    tiny.llama().save_pretrained(tmp_path / "m")
    tiny.tokenizer().save_pretrained(tmp_path / "m")
    cfg = config(total_steps=15, learning_rate=3e-3, dtype="bf16")
    t = SFTTrainer(cfg, model=str(tmp_path / "m"), data=DATA)
    assert t.model.dtype == torch.bfloat16 and t.optimizer.masters[0].dtype == torch.float32
    losses = [step.metrics["loss/train"] for step in t]
    exact = stock(tiny.llama(), t.items).item()
    assert losses[0] == pytest.approx(exact, rel=0.02) and losses[-1] < 0.8 * losses[0]


# -------------------------------------------------------------------------------------------------------- what is left


def test_the_saved_folder_runs_in_stock_transformers(tmp_path):
    t = trainer(config(total_steps=40, learning_rate=1e-2), data=SINGLE)
    t.train()
    t.save(tmp_path / "out")
    model, tokenizer = (cls.from_pretrained(tmp_path / "out") for cls in (AutoModelForCausalLM, AutoTokenizer))
    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(t.model), strict=True))
    assert tokenizer.chat_template == tiny.CHAT_TEMPLATE and model.generation_config.eos_token_id == 1
    run = pipeline("text-generation", model=str(tmp_path / "out"))
    reply = run(tiny.chat("今天的天气"), max_new_tokens=30, do_sample=False)[0]["generated_text"][-1]
    assert reply == {"role": "assistant", "content": "谢谢您的提问。"}
    assert run("the cat", max_new_tokens=3)[0]["generated_text"].startswith("the cat")


def test_a_model_without_a_head_is_refused():
    with pytest.raises(UserError, match="has no language-model head"):
        trainer(model=tiny.llama().model)


def test_a_loaded_model_needs_its_tokenizer():
    with pytest.raises(UserError, match="tokenizer: a loaded model needs its tokenizer"):
        trainer(tokenizer=None)
