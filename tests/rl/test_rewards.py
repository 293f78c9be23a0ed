"""The reward protocol: what a user's function may return, and how its mistakes are reported."""

from __future__ import annotations

import math

import pytest
import torch

from fastrlhf import PPOConfig, UserError
from fastrlhf.models.loading import scalar_model
from fastrlhf.models.offload import Offload
from fastrlhf.models.token_batch import TokenRows
from fastrlhf.rl.functions import is_function_reference, load_function
from fastrlhf.rl.scorers import FunctionScorer, Scorer, make_scorer, score_rows
from fastrlhf.rollout.result import Texts
from fastrlhf.runtime.memory import MemoryBackoff
from tests import tiny


def replies(count: int = 4, **columns: list) -> tuple[Texts, TokenRows]:
    texts, prompts = [f"reply {i}" for i in range(count)], [f"prompt {i}" for i in range(count)]
    ids = [[5, 6]] * count
    return Texts(prompts, prompts, texts, columns), TokenRows(ids, ids)


def make(reward: object) -> Scorer:
    """The scorer of what a user passes as `reward`."""
    config, device = PPOConfig(), torch.device("cpu")
    return make_scorer(reward, tiny.tokenizer(), config, MemoryBackoff(config, device, print), Offload(device))


def score(function, **columns):
    return FunctionScorer([("mine", 1.0, function)]).judge(*replies(**columns))


def test_numbers_and_none_pass():
    assert score(lambda p, r: [1, 2.5, None, torch.tensor(3.0)]) == [1.0, 2.5, None, 3.0]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0, 2.0, 3.0], "reward function mine, sample 3: returned 3 scores for 4"),
        ([1.0] * 5, "reward function mine, sample 4: returned 5 scores for 4"),
        ([1.0, math.nan, 1.0, 1.0], "reward function mine, sample 1: returned nan"),
        ([1.0, 1.0, math.inf, 1.0], "reward function mine, sample 2: returned inf"),
        ([1.0, 1.0, 1.0, "good"], "reward function mine, sample 3: 'good' is not a number"),
    ],
)
def test_bad_results_name_the_function_and_the_sample(returned, message):
    with pytest.raises(UserError, match=message):
        score(lambda p, r: returned)


def test_an_exception_names_the_function_the_sample_and_its_cause():
    def fails(prompts, responses):
        return [float(r.split()[1]) if r != "reply 2" else {}["missing"] for r in responses]

    with pytest.raises(UserError, match="reward function mine, sample 2: raised KeyError") as caught:
        score(fails)
    assert isinstance(caught.value.__cause__, KeyError)


def test_an_exception_of_the_batch_alone_says_so():
    def fails(prompts, responses):
        if len(responses) > 1:
            raise RuntimeError("too many")
        return [0.0]

    with pytest.raises(UserError, match="a batch of 4 samples: raised RuntimeError: too many"):
        score(fails)


def test_an_interrupt_is_no_mistake_of_the_function():
    def stop(prompts, responses):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(stop)


def test_columns_by_name():
    assert score(lambda p, r, answer: [float(a) for a in answer], answer=[1, 2, 3, 4], other=[0] * 4) == [1, 2, 3, 4]
    seen = {}
    score(lambda p, r, **columns: seen.update(columns) or [0.0] * 4, answer=[1, 2, 3, 4], other=[0] * 4)
    assert set(seen) == {"answer", "other"}


def test_weighted_sum_and_none_of_one_is_none_of_all():
    functions = [("a", 2.0, lambda p, r: [1, 1, None, 1]), ("b", -0.5, lambda p, r: [2, 4, 6, None])]
    assert FunctionScorer(functions).judge(*replies()) == [1.0, 0.0, None, None]


def test_functions_by_reference(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def brevity(prompts, responses):\n    return [-len(r) for r in responses if r != 'no reply']\n")
    scorer = make(f"{file}:brevity")
    assert scorer.judge(*replies()) == [-7.0] * 4
    texts = Texts(["a"] * 2, ["a"] * 2, ["reply", "no reply"], {})
    with pytest.raises(UserError, match="reward function brevity, sample 1: returned 1 scores for 2 responses"):
        scorer.judge(texts, TokenRows([[5]] * 2, [[6]] * 2))
    packaged = load_function("fastrlhf.recipes.rewards:one_short_sentence")
    good = "This sentence has exactly twelve words in it, as it should have."
    assert packaged([""] * 3, [good, good[:-1], "word " * 60]) == pytest.approx([1.0, 0.5, -1.5])
    mixed = make([["short", 0.5, f"{file}:brevity"]])
    assert mixed.judge(*replies()) == [-3.5] * 4


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("/no/file.py:f", "/no/file.py"),
        ("no_such_module_x:f", "no_such_module_x"),
        ("fastrlhf.recipes.rewards:nothing", "no function 'nothing'"),
    ],
)
def test_missing_functions_are_named(reference, message):
    with pytest.raises(UserError, match=message):
        make(reference)


def test_what_is_a_function_reference(tmp_path):
    assert is_function_reference("a.b:c") and is_function_reference("x.py:f")
    assert not is_function_reference("org/model") and not is_function_reference("package://a/b")
    assert not is_function_reference(len)


@pytest.mark.parametrize("reward", [3, [], [("only", "two")]])
def test_anything_else_is_refused_with_what_is_accepted(reward):
    with pytest.raises(UserError, match="none of: a reward-model folder"):
        make(reward)


def test_a_mapping_with_an_unknown_field_names_those_there_are():
    with pytest.raises(UserError, match="no such field: a; an entry has name, weight, model or function, label"):
        make({"a": 1})


def test_scores_do_not_depend_on_the_micro_batches():
    model = scalar_model(tiny.llama(), tiny.tokenizer(), seed=3)
    rows = [[5 + i] * (3 + 7 * i) for i in range(6)]
    alone = torch.stack([score_rows(model, [row], 10_000)[0] for row in rows])
    for budget in (1, 50, 10_000):
        assert torch.allclose(score_rows(model, rows, budget), alone, atol=1e-5)
