"""Generation: the tokens of each prompt alone, log-probs the trainer recomputes, and nothing left behind."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from fastrlhf.models.heads import head_logits, hidden_states, lm_head
from fastrlhf.models.loading import frozen_copy
from fastrlhf.rollout.engine import RolloutEngine
from fastrlhf.rollout.sampling import Generation, SamplingParams
from fastrlhf.runtime.batching import derive_seed
from tests import tiny

EOS, PAD = 1, 0
RAGGED = [[7], [9, 40, 300, 12, 5, 77, 8, 130, 21, 6, 44], [250, 3], [11, EOS, 60, EOS, 90], [30] * 7]


def qwen2() -> PreTrainedModel:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**tiny.SHAPE, tie_word_embeddings=True)).eval()


def gemma2(window: int = 6) -> PreTrainedModel:
    """Softcapped logits and attention, and a window of 6 tokens on every second layer."""
    torch.manual_seed(0)
    config = Gemma2Config(
        **tiny.SHAPE, head_dim=8, sliding_window=window, final_logit_softcapping=3.0, query_pre_attn_scalar=1,
        tie_word_embeddings=False,
    )  # fmt: skip
    return Gemma2ForCausalLM(config).eval()


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": tiny.llama,
    "qwen2": qwen2,
    "gpt2": tiny.gpt2,
    "gemma2": gemma2,
}


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny.llama()


def sample(model: PreTrainedModel, prompts: list[list[int]], count: int = 12, **changes: object) -> Generation:
    fields = {"stop_token_ids": [], **changes}
    engine = RolloutEngine(model, max_batch_tokens=fields.pop("max_batch_tokens", None))
    return engine.generate(prompts, SamplingParams(count, **fields))


def alone(model: PreTrainedModel, prompt: list[int], count: int, stops: list[int]) -> list[int]:
    """transformers' own greedy search over one unpadded prompt: the oracle."""
    ids = torch.tensor([prompt])
    options = {"do_sample": False, "max_new_tokens": count, "eos_token_id": stops or None, "pad_token_id": PAD}
    with torch.no_grad():
        return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()


def teacher_forced(model: PreTrainedModel, prompt: list[int], response: list[int], temperature: float) -> torch.Tensor:
    """[T, V] log-softmax of the logits that predict each response token, in float64 from the stock forward."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits.double() / temperature, -1)


@contextmanager
def forwards(model: PreTrainedModel) -> Iterator[list[int]]:
    """The batch size of each forward of the trunk."""
    sizes: list[int] = []
    handle = model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    try:
        yield sizes
    finally:
        handle.remove()


# ------------------------------------------------------------------------------------------ the same tokens as alone


@pytest.mark.parametrize("name", MODELS)
def test_greedy_is_what_each_prompt_alone_gives(name):
    model = MODELS[name]()
    expected = [alone(model, prompt, 20, []) for prompt in RAGGED]
    later = {reply[i] for reply, i in zip(expected, (3, 5, 9, 1, 14), strict=True)}
    stops = sorted(later - {reply[0] for reply in expected})
    expected = [alone(model, prompt, 20, stops) for prompt in RAGGED]
    out = sample(model, RAGGED, 20, temperature=0, stop_token_ids=stops)
    assert out.response_ids == expected
    assert out.finished == [reply[-1] in stops for reply in expected]
    assert len({len(reply) for reply in expected}) > 1  # rows really left the batch at different times


def test_the_window_and_the_caps_of_gemma2_matter():
    """Or the model above would not test them."""
    plain, wide = gemma2(), gemma2(window=128)
    changed = gemma2()
    changed.config.final_logit_softcapping = None
    prompts = RAGGED[1:2]
    out = [sample(m, prompts, 20, temperature=0) for m in (plain, wide, changed)]
    assert out[0].response_ids != out[1].response_ids
    assert not torch.allclose(out[0].policy_log_probs[0], out[2].policy_log_probs[0], atol=1e-2)


@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_padding_that_is_the_end_token_changes_nothing(pad_is_eos):
    model, tokenizer = tiny.gpt2(), tiny.tokenizer(pad_is_eos=pad_is_eos)
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    out = RolloutEngine(model, tokenizer).generate(RAGGED, SamplingParams(8, temperature=0))
    assert out.response_ids == [alone(model, prompt, 8, [EOS]) for prompt in RAGGED]


# ------------------------------------------------------------------------------------------------------ stop tokens


def test_any_stop_id_ends_a_reply_and_stays_in_it(llama):
    free = sample(llama, RAGGED[:2], 10, temperature=0).response_ids
    second = free[0][4]  # not the first of the list, not the tokenizer's EOS
    cut = sample(llama, RAGGED[:2], 10, temperature=0, stop_token_ids=[EOS, second])
    assert cut.response_ids[0] == free[0][: free[0].index(second) + 1]
    assert cut.finished[0] is True
    assert cut.log_probs[0].shape == cut.policy_log_probs[0].shape == (len(cut.response_ids[0]),)


def test_a_reply_cut_by_max_new_tokens_is_not_finished(llama):
    out = sample(llama, RAGGED, 6)
    assert out.finished == [False] * 5
    assert [len(reply) for reply in out.response_ids] == [6] * 5


def test_a_stop_token_as_the_very_last_one_is_finished(llama):
    free = sample(llama, RAGGED[:1], 10, temperature=0).response_ids[0]
    last = free.index(free[5])
    out = sample(llama, RAGGED[:1], last + 1, temperature=0, stop_token_ids=[free[5]])
    assert out.finished == [True] and len(out.response_ids[0]) == last + 1


def test_the_default_stops_are_the_tokenizers_and_the_generation_configs(llama):
    model = frozen_copy(llama)
    free = sample(model, RAGGED[:2], 10, temperature=0).response_ids
    tokenizer = tiny.tokenizer()
    for configured in (free[0][3], [free[0][3], free[1][3]]):
        model.generation_config.eos_token_id = configured
        ids = configured if isinstance(configured, list) else [configured]
        out = RolloutEngine(model, tokenizer).generate(RAGGED[:2], SamplingParams(10, temperature=0))
        same = sample(model, RAGGED[:2], 10, temperature=0, stop_token_ids=[EOS, *ids])
        assert out.response_ids == same.response_ids and out.finished == same.finished
    model.generation_config.eos_token_id = None
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(free[0][3])
    out = RolloutEngine(model, tokenizer).generate(RAGGED[:1], SamplingParams(10, temperature=0))
    assert out.finished == [True]
    assert RolloutEngine(model).generate(RAGGED[:1], SamplingParams(10, temperature=0)).finished == [False]


def test_min_new_tokens_holds_stops_back_and_no_longer(llama):
    stops = list(range(160))  # half the vocabulary: a free reply ends at once
    prompts = RAGGED * 4
    free = sample(llama, prompts, 10, stop_token_ids=stops)
    held = sample(llama, prompts, 10, stop_token_ids=stops, min_new_tokens=3)
    assert min(len(reply) for reply in free.response_ids) == 1
    assert min(len(reply) for reply in held.response_ids) == 4
    for prompt, reply, drawn, policy in zip(
        prompts, held.response_ids, held.log_probs, held.policy_log_probs, strict=True
    ):
        table = teacher_forced(llama, prompt, reply, 1.0)
        chosen = table.gather(1, torch.tensor(reply)[:, None])[:, 0]
        torch.testing.assert_close(policy.double(), chosen, atol=1e-4, rtol=0)  # the policy's own, stops included
        left = table[:3, 160:].logsumexp(1)  # what it was drawn from: the rest, renormalised
        torch.testing.assert_close(drawn[:3].double(), chosen[:3] - left, atol=1e-4, rtol=0)
        torch.testing.assert_close(drawn[3:], policy[3:], atol=0, rtol=0)


# -------------------------------------------------------------------------------------------------------- log-probs


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
@pytest.mark.parametrize("name", MODELS)
def test_log_probs_are_those_of_a_teacher_forced_forward(name, temperature):
    model = MODELS[name]()
    out = sample(model, RAGGED, 10, n=2, temperature=temperature, stop_token_ids=[EOS, *range(20, 40)], seed=3)
    for i, reply in enumerate(out.response_ids):
        table = teacher_forced(model, RAGGED[i // 2], reply, temperature)
        chosen = table.gather(1, torch.tensor(reply)[:, None])[:, 0]
        for recorded in (out.log_probs[i], out.policy_log_probs[i]):
            assert recorded.dtype == torch.float32
            torch.testing.assert_close(recorded.double(), chosen, atol=1e-4, rtol=0)


@pytest.mark.parametrize("cut", [{"top_p": 0.6}, {"top_k": 5}, {"top_k": 20, "top_p": 0.7}])
def test_filters_renormalise_log_probs_but_not_policy_log_probs(llama, cut):
    out = sample(llama, RAGGED, 10, temperature=0.8, **cut)
    for prompt, reply, drawn, policy in zip(RAGGED, out.response_ids, out.log_probs, out.policy_log_probs, strict=True):
        table = teacher_forced(llama, prompt, reply, 0.8)
        chosen = table.gather(1, torch.tensor(reply)[:, None])[:, 0]
        torch.testing.assert_close(policy.double(), chosen, atol=1e-4, rtol=0)
        ordered = table.exp().sort(1, descending=True).values[:, : cut.get("top_k", 320)]
        before = ordered.cumsum(1) - ordered
        kept = torch.where(before < cut.get("top_p", 1.0) * ordered.sum(1, keepdim=True), ordered, 0)
        torch.testing.assert_close(drawn.double(), chosen - kept.sum(1).log(), atol=1e-4, rtol=0)
        assert (chosen.exp() >= kept.where(kept > 0, 1).amin(1) - 1e-6).all()  # inside the kept set
        assert (drawn > policy).any()


def test_greedy_log_probs_are_certain_and_the_policys_are_not(llama):
    out = sample(llama, RAGGED[:2], 5, temperature=0)
    table = teacher_forced(llama, RAGGED[1], out.response_ids[1], 1.0)
    assert out.log_probs[1].tolist() == [0.0] * 5
    torch.testing.assert_close(out.policy_log_probs[1].double(), table.amax(1), atol=1e-4, rtol=0)


def test_bf16_keeps_fp32_logits():
    """A head rounded to bf16 misses the fp32 head on the same states by 1e-2; this one must not."""
    model = tiny.llama().bfloat16()
    out = sample(model, RAGGED, 8)
    head = lm_head(model)
    for prompt, reply, policy in zip(RAGGED, out.response_ids, out.policy_log_probs, strict=True):
        with torch.no_grad():
            states = hidden_states(model, torch.tensor([prompt + reply]))[0, len(prompt) - 1 : -1]
            table = torch.log_softmax(head_logits(head, states), -1)
        chosen = table.gather(1, torch.tensor(reply)[:, None])[:, 0]
        assert table.dtype == torch.float32
        assert (policy - chosen).abs().mean() < 0.1  # the trunk itself is bf16 here


# ---------------------------------------------------------------------------------- who shares what with whom


def test_n_samples_share_one_prefill(llama):
    with forwards(llama) as sizes:
        out = sample(llama, RAGGED, 2, n=3)
    assert sizes == [1, 15]  # the prompts are packed into one row
    assert out.stats["prefill_tokens"] == sum(map(len, RAGGED))
    assert out.stats["new_tokens"] == 30


def test_equal_prompts_are_computed_once(llama):
    twins = [list(RAGGED[1]), list(RAGGED[1]), RAGGED[0]]
    out = sample(llama, twins, 8)
    assert out.stats["prefill_tokens"] == 12
    assert out.response_ids[0] != out.response_ids[1]  # two samples of one prompt


def test_samples_of_a_prompt_differ_and_are_prompt_major(llama):
    out = sample(llama, RAGGED, 8, n=4)
    assert len(out.response_ids) == 20
    assert all(len({tuple(reply) for reply in out.response_ids[i : i + 4]}) == 4 for i in range(0, 20, 4))
    for i, reply in enumerate(out.response_ids):
        chosen = teacher_forced(llama, RAGGED[i // 4], reply, 1.0).gather(1, torch.tensor(reply)[:, None])[:, 0]
        torch.testing.assert_close(out.log_probs[i].double(), chosen, atol=1e-4, rtol=0)


def test_the_seed_decides(llama):
    first, same, other = (sample(llama, RAGGED, n=2, seed=seed) for seed in (5, 5, 6))
    assert first.response_ids == same.response_ids
    assert all(map(torch.equal, first.log_probs, same.log_probs))
    assert first.response_ids != other.response_ids


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_waves_change_nothing(name):
    model = MODELS[name]()
    options = {"n": 3, "stop_token_ids": [EOS, *range(40, 60)], "seed": 2}
    whole = sample(model, RAGGED, 12, **options)
    split = sample(model, RAGGED, 12, max_batch_tokens=50, **options)
    assert whole.stats["waves"] == 1 and split.stats["waves"] > 5
    assert split.response_ids == whole.response_ids and split.finished == whole.finished
    for one, other in zip(whole.policy_log_probs, split.policy_log_probs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


def test_a_wave_holds_no_more_than_max_batch_tokens(llama):
    with forwards(llama) as sizes:
        sample(llama, RAGGED, 12, n=2, max_batch_tokens=50)
    assert max(sizes) <= 50 // (1 + 12)
    assert sizes[0] <= 50 // (11 + 12)  # the longest prompt's wave


def test_other_prompts_change_nothing(llama):
    few = sample(llama, RAGGED[:3], n=2, seed=1, stop_token_ids=[EOS, *range(40, 60)])
    more = sample(llama, RAGGED, n=2, seed=1, stop_token_ids=[EOS, *range(40, 60)])
    assert more.response_ids[:6] == few.response_ids


def test_finished_rows_leave_the_batch(llama):
    stops = list(range(0, 320, 4))  # a quarter of the vocabulary: most replies are short
    with forwards(llama) as sizes:
        out = sample(llama, RAGGED * 8, 24, stop_token_ids=stops)
    lengths = [len(reply) for reply in out.response_ids]
    steps = max(lengths) - 1
    assert out.stats["decode_row_steps"] == sum(sizes[1:])
    needed = sum(lengths) - len(lengths)
    assert needed <= out.stats["decode_row_steps"] <= 1.5 * needed < 0.6 * steps * len(lengths)
    assert sizes[-1] < 10 and len(sizes) == steps + 1


def test_no_prompts_no_replies(llama):
    with forwards(llama) as sizes:
        out = sample(llama, [])
    assert out.response_ids == [] and out.finished == [] and sizes == []


# ------------------------------------------------------------------------------------------------ nothing leaks in


def test_sampling_defaults_of_the_generation_config_never_leak(llama):
    model = frozen_copy(llama)
    before = sample(model, RAGGED, n=2, stop_token_ids=None)
    for name, value in {
        "do_sample": True, "temperature": 0.1, "top_p": 0.1, "top_k": 1, "min_p": 0.5, "repetition_penalty": 1.9,
        "no_repeat_ngram_size": 1, "min_new_tokens": 4, "suppress_tokens": list(range(2, 200)), "max_new_tokens": 2,
        "bad_words_ids": [[7]], "num_beams": 3, "forced_eos_token_id": 9,
    }.items():  # fmt: skip
        setattr(model.generation_config, name, value)
    after = sample(model, RAGGED, n=2, stop_token_ids=None)
    assert after.response_ids == before.response_ids
    assert all(map(torch.equal, after.log_probs, before.log_probs))


def test_weights_updated_in_place_are_seen(llama):
    model = frozen_copy(llama).bfloat16()  # bf16: the engine works on an fp32 copy of the head, made every time
    engine = RolloutEngine(model)
    before = engine.generate(RAGGED, SamplingParams(6, temperature=0)).response_ids
    for weight in (model.lm_head.weight, model.model.layers[0].mlp.up_proj.weight):
        kept = weight.detach().clone()
        weight.detach().mul_(-1)
        assert engine.generate(RAGGED, SamplingParams(6, temperature=0)).response_ids != before
        weight.detach().copy_(kept)
    assert engine.generate(RAGGED, SamplingParams(6, temperature=0)).response_ids == before


def state_of(model: PreTrainedModel) -> tuple:
    modes = [module.training for module in model.modules()]
    grads = [(p.requires_grad, p.grad is None, p.is_inference()) for p in model.parameters()]
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    return (
        modes,
        grads,
        hooks,
        model.config.to_dict(),
        model.generation_config.to_dict(),
        torch.get_rng_state().tolist(),
    )


@pytest.mark.parametrize("failing", [False, True])
def test_the_model_is_left_as_it_was(failing):
    model = tiny.llama().train()
    model.model.layers[1].eval()  # a mixed mode, as with a frozen part
    model.model.norm.requires_grad_(False)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    before = state_of(model)
    if failing:
        calls = []

        def fail(module, args, output):
            calls.append(1)
            if len(calls) == 4:
                raise RuntimeError("out of memory, say")

        handle = model.model.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            sample(model, RAGGED)
        handle.remove()
    else:
        sample(model, RAGGED)
    assert state_of(model) == before
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    model(torch.tensor(RAGGED[1:2])).logits.sum().backward()  # and it still trains
    assert model.lm_head.weight.grad is not None


def test_dropout_is_off_while_sampling():
    model = tiny.gpt2(dropout=0.5).train()
    out = sample(model, RAGGED, 8, temperature=0)
    assert model.training
    assert out.response_ids == [alone(model.eval(), prompt, 8, []) for prompt in RAGGED]


# ------------------------------------------------------------------------------------------ refused before any forward

BAD_PARAMS = {
    "max_new_tokens": 0,
    "n": 0,
    "temperature": -0.1,
    "top_p": 0.0,
    "top_k": -1,
    "min_new_tokens": -1,
}


@pytest.mark.parametrize("field", BAD_PARAMS)
def test_sampling_params_refuse_what_cannot_be(field):
    with pytest.raises(ValueError, match=f"^{field} must be .*, got {BAD_PARAMS[field]}"):
        SamplingParams(**{"max_new_tokens": 4, field: BAD_PARAMS[field]})


@pytest.mark.parametrize(("field", "value"), [("top_p", 1.01), ("temperature", math.nan), ("min_new_tokens", 5)])
def test_sampling_params_refuse_the_other_end(field, value):
    with pytest.raises(ValueError, match=field):
        SamplingParams(**{"max_new_tokens": 4, field: value})


@pytest.mark.parametrize(
    ("prompts", "changes", "message"),
    [
        ([[5], []], {}, "prompt 1 is empty"),
        ([[5], [5] * 100], {"count": 29}, r"prompt 1 has 100 tokens and max_new_tokens is 29: 129 .* 128 positions"),
        ([[5]], {"stop_token_ids": [320]}, "320 is outside the vocabulary of 320"),
        ([[5]], {"stop_token_ids": [-1]}, "-1 is outside"),
        ([[5], [5, 6]], {"max_batch_tokens": 13}, r"max_batch_tokens=13 .* prompt 1: .* 14 tokens .*\(3584 bytes"),
        ([[5], [5, 320]], {}, "prompt 1 .* 320, .* vocabulary of 320"),
        ([[-1]], {}, "prompt 0 .* -1, .* vocabulary of 320"),
    ],
)  # fmt: skip
def test_refused_before_any_forward(llama, prompts, changes, message):
    with forwards(llama) as sizes, pytest.raises(ValueError, match=message):
        sample(llama, prompts, changes.pop("count", 12), **changes)
    assert sizes == []


def test_a_prompt_that_just_fits_is_taken(llama):
    out = sample(llama, [[5] * 100], 28, max_batch_tokens=128)
    assert len(out.response_ids[0]) == 28


def test_derived_seeds_differ_and_stay():
    seeds = {derive_seed(seed, purpose, step) for seed in (0, 1) for purpose in ("rollout", "eval") for step in (0, 1)}
    assert len(seeds) == 8 and all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(0, "rollout", 1) == derive_seed(0, "rollout", 1) != derive_seed(0, "rollout1")
