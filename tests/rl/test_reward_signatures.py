"""How a user's function is called: by the names of its arguments, as TRL, verl and OpenRLHF call theirs, or by
position; what it may return, and what becomes of one that fails, hangs or exits."""

from __future__ import annotations

import asyncio
import time
from functools import partial

import numpy
import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
)

from fastrlhf import PPOConfig, UserError
from fastrlhf.models.loading import scalar_model
from fastrlhf.models.offload import Offload
from fastrlhf.models.saving import write_model
from fastrlhf.models.token_batch import TokenRows
from fastrlhf.rl.functions import UserFunction, load_function
from fastrlhf.rl.scorers import FunctionScorer, Scorer, make_scorer, read_reward
from fastrlhf.rollout.result import Texts
from fastrlhf.runtime.memory import MemoryBackoff
from tests import tiny
from tests.runs import PROMPTS, ppo_trainer

RAW = [tiny.chat("one"), "two", tiny.chat("three")]
TEXTS = Texts(["one", "two", "three"], RAW, ["a", "bb", "ccc"], {})
ROWS = TokenRows([[3]] * 3, [[5, 1], [6, 7, 1], [8]])
COLUMNS = {"answer": ["x", "y", "z"], "id": [7, 8, 9]}


def judged(function: object, **columns: list) -> list:
    texts = Texts(TEXTS.prompts, TEXTS.raw_prompts, TEXTS.responses, columns or COLUMNS)
    return FunctionScorer([("mine", 1.0, function)]).judge(texts, ROWS)


def make(reward: object, **fields: object) -> Scorer:
    config, device = PPOConfig(**fields), torch.device("cpu")
    return make_scorer(reward, tiny.tokenizer(), config, MemoryBackoff(config, device, print), Offload(device))


class Seen:
    """Keeps what a function was called with."""

    def __call__(self, **arguments: object) -> list[float]:
        vars(self).update(arguments)
        return [0.0] * 3


# -------------------------------------------------------------------------------------------------------------- by name


def test_the_order_of_known_names_is_free():
    assert judged(lambda responses, prompts: [f"{p}{r}" == "onea" for p, r in zip(prompts, responses)])[0] == 1.0
    assert judged(lambda responses, answer: [r + a == "bby" for r, a in zip(responses, answer)]) == [0, 1, 0]
    assert judged(lambda answer, completions: [len(c) for c in completions]) == [1, 2, 1]
    assert judged(lambda responses: [len(r) for r in responses]) == [1, 2, 3]


def test_names_of_ones_own_are_the_prompts_and_the_responses():
    assert judged(lambda p, r, answer: [p + r + a == "twobby" for p, r, a in zip(p, r, answer)]) == [0, 1, 0]
    assert judged(lambda prompt, response: [len(r) for r in response], response=["data"] * 3) == [1, 2, 3]
    assert judged(lambda prompts, output: [len(r) for r in output], output=["data"] * 3) == [1, 2, 3]
    assert judged(lambda *lists, **columns: [len(r) for r in lists[1]]) == [1, 2, 3]


def test_columns_that_nobody_named_come_through_kwargs_only():
    seen = {}
    judged(lambda prompts, responses, answer, **rest: seen.update(rest) or [0.0] * 3)
    assert seen == {"id": [7, 8, 9]}
    assert judged(lambda prompts, responses, level=4: [level] * 3) == [4, 4, 4]


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda prompts, responses, anwser: 0, "argument 'anwser' is no column of the data set; columns: answer, id;"),
        (lambda p, r, anwser: 0, "argument 'anwser' is no column of the data set; columns: answer, id;"),
        (lambda completions, solution, **rest: 0, r"\(completions, solution\)"),
        (
            lambda texts, answer: 0,
            r"its first arguments are \(texts, answer\), but by position they are \(prompts, resp",
        ),
        (lambda prompts, answer: 0, r"its first arguments are \(prompts, answer\)"),
        (lambda response, prompt: 0, r"its first arguments are \(response, prompt\)"),
        (lambda text: 0, r"it takes text, and by position it gets \(prompts, responses\)"),
        (lambda: 0, "it takes no arguments"),
    ],
)
def test_an_argument_that_would_get_nothing_or_the_wrong_thing_lists_the_columns(function, said):
    with pytest.raises(UserError, match=said) as caught:
        judged(function)
    assert "columns: answer, id" in str(caught.value)


def test_columns_of_any_name_reach_kwargs():
    seen = {}
    columns = {"": [1, 2, 3], "a b": [1, 2, 3], "self": [4, 5, 6], "class": [7, 8, 9]}
    judged(lambda prompts, responses, **rest: seen.update(rest) or [0.0] * 3, **columns)
    assert seen == columns


def test_a_column_that_these_rows_lack_is_none():
    def reward(prompts, responses, rare):
        return [r is None for r in rare]

    columns = {"prompts": ["rare", "id"], "eval_prompts": ["rare"]}
    assert make(read_reward(reward, PPOConfig(), columns)).judge(TEXTS, ROWS) == [1, 1, 1]


@pytest.mark.parametrize("lacking", ["prompts", "eval_prompts"])
def test_arguments_are_bound_before_a_model_is_loaded(lacking):
    rows = [{"prompt": p, "answer": "x"} for p in PROMPTS]
    given = {"prompts": rows, "eval_prompts": rows[:2], lacking: PROMPTS}
    with pytest.raises(UserError, match=f"argument 'answer' is no column of {lacking}; columns: none"):
        ppo_trainer(reward=lambda prompts, responses, answer: [0.0] * 8, policy="no/such-model", **given)


# -------------------------------------------------------------------------------------------------- TRL, verl, OpenRLHF


def test_trl_gets_messages_where_prompts_are_messages_and_every_column():
    seen = {}

    def reward(prompts, completions, **kwargs):
        seen.update(kwargs, prompts=prompts, completions=completions)
        return [None, 1.0, 0.5]

    assert judged(reward) == [None, 1.0, 0.5]
    assert seen["prompts"] == RAW
    assert seen["completions"] == [
        [{"role": "assistant", "content": "a"}],
        "bb",
        [{"role": "assistant", "content": "ccc"}],
    ]
    assert seen["answer"] == ["x", "y", "z"] and seen["completion_ids"] == ROWS.response_ids

    def accuracy(completions, answer, **kwargs):
        return [float(a == "y" and kwargs["prompts"][1] == "two") for a in answer]

    assert judged(accuracy) == [0, 1, 0]
    everything = Seen()
    judged(everything)
    assert vars(everything).keys() == {"prompts", "completions", "completion_ids", "answer", "id"}
    assert judged(lambda completion_ids, **kwargs: [len(ids) for ids in completion_ids]) == [[0, 2], [0, 0, 3], [1]]


def test_verl_is_called_for_one_sample_at_a_time():
    calls = []

    def compute_score(data_source, solution_str, ground_truth, extra_info=None):
        calls.append((data_source, solution_str, ground_truth, extra_info))
        return {"score": len(solution_str), "acc": True} if ground_truth == "4" else 0.5

    rows = {"data_source": ["gsm8k"] * 3, "reward_model": [{"style": "rule", "ground_truth": t} for t in "345"]}
    assert judged(compute_score, **rows) == [0.5, 2.0, 0.5]
    assert calls == [("gsm8k", r, t, {}) for r, t in zip(TEXTS.responses, "345")]
    calls.clear()
    judged(compute_score, data_source=["a"] * 3, ground_truth=[1, 2, 3], extra_info=[{"i": i} for i in range(3)])
    assert calls[2] == ("a", "ccc", 3, {"i": 2})
    with pytest.raises(UserError, match="sample 1: raised ZeroDivisionError"):
        judged(lambda solution_str: 1 / (len(solution_str) - 2))
    with pytest.raises(UserError, match="'ground_truth' is no column of the data set; columns: answer, data_source"):
        judged(compute_score, data_source=["a"] * 3, answer=[1] * 3)


def test_verl_in_batches():
    def compute_scores(data_sources, solution_strs, ground_truths, extra_infos):
        return [{"score": float(s + t == "bby")} for s, t in zip(solution_strs, ground_truths, strict=True)]

    assert judged(compute_scores, data_source=["a"] * 3, ground_truth=["x", "y", "z"]) == [0, 1, 0]


def test_openrlhf_gets_prompt_and_reply_as_one_text():
    def reward_func(queries, prompts, labels):
        assert queries == ["onea", "twobb", "threeccc"] and prompts == TEXTS.prompts
        return {"rewards": torch.tensor([label == "y" for label in labels]), "extra_logs": {"n": torch.ones(3)}}

    assert judged(reward_func) == [0, 1, 0]
    assert judged(reward_func, label=["y", "n", "n"]) == [1, 0, 0]
    with pytest.raises(UserError, match="'labels' is no column of the data set; columns: id"):
        judged(reward_func, id=[1, 2, 3])


# --------------------------------------------------------------------------------------------- what comes out of a call


@pytest.mark.parametrize(
    "result",
    [
        torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16, requires_grad=True),
        torch.tensor([[1.0], [2.0], [3.0]]),
        numpy.array([1, 2, 3]),
        (1, 2, 3),
        [numpy.float32(1), torch.tensor(2.0), 3],
        iter([1, 2, 3]),
        {"rewards": [1, 2, 3]},
    ],
)
def test_lists_tensors_and_arrays_of_the_right_count(result):
    assert judged(lambda p, r: result) == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("result", [0.5, numpy.float64(0.5), torch.tensor(0.5), numpy.array([0.5])])
def test_a_scalar_is_the_score_of_one_sample(result):
    scorer = FunctionScorer([("mine", 1.0, lambda p, r: result)])
    assert scorer.judge(TEXTS[:1], ROWS[:1]) == [0.5]
    with pytest.raises(UserError, match="reward function mine"):
        judged(lambda p, r: result)


@pytest.mark.parametrize("result", [None, 0.5, "good", {"a": 1}, {1.0, 2.0, 3.0}])
def test_what_is_no_list_is_shown(result):
    with pytest.raises(UserError, match="reward function mine: returned .*; return a list with a number"):
        judged(lambda p, r: result)


@pytest.mark.parametrize("result", ["1", b"1", numpy.str_("1"), {"score": "1"}, 1j, 10**400, [1], torch.ones(2), ...])
def test_what_is_no_number_is_refused_even_where_float_would_read_it(result):
    with pytest.raises(UserError, match="reward function mine, sample 0: .* is not a number"):
        judged(lambda p, r: [result] * 3)


class Fails:
    """An object of a user's that fails wherever it is read."""

    def __iter__(self):
        raise LookupError("no entries")

    def __float__(self):
        raise SystemExit(0)


def test_a_result_that_fails_as_it_is_read_is_the_functions_failure():
    def ends(prompts, responses):
        yield 1.0
        raise SystemExit(0)

    async def later(prompts, responses):
        return ends(prompts, responses)

    for function, said in (
        (ends, r"sample 0: called sys.exit\(0\)"),
        (later, r"sample 0: called sys.exit\(0\)"),
        (lambda p, r: Fails(), "sample 0: raised LookupError: no entries"),
        (lambda p, r: torch.ones(3, device="meta"), "sample 0: raised NotImplementedError"),
        (lambda p, r: [Fails()] * 3, "sample 0: .*Fails object.* is not a number"),
    ):
        with pytest.raises(UserError, match=f"reward function mine, {said}"):
            judged(function)
    assert judged(lambda p, r: (float(len(x)) for x in r)) == [1.0, 2.0, 3.0]


def test_a_generator_is_read_within_the_time():
    def slow(prompts, responses):
        time.sleep(20)
        yield from [1, 2, 3]

    with pytest.raises(UserError, match="no result within reward_timeout = 0.1 seconds"):
        make(slow, reward_timeout=0.1).judge(TEXTS, ROWS)


def test_async_functions_are_awaited_all_on_one_loop():
    loops = set()

    async def reward(prompts, responses):
        loops.add(asyncio.get_running_loop())
        await asyncio.sleep(0)
        return [float(len(r)) for r in responses]

    async def compute_score(solution_str):
        await asyncio.wait_for(gate.wait(), 5)
        return len(solution_str)

    async def opened_by_the_last(solution_str):
        arrived.append(solution_str)
        if len(arrived) == 3:
            gate.set()
        return await compute_score(solution_str)

    gate, arrived = asyncio.Event(), []
    assert judged(reward) == judged(reward) == [1, 2, 3] and len(loops) == 1
    assert judged(opened_by_the_last) == [1, 2, 3]  # all three at once, or the gate would stay shut

    async def inside() -> list:  # as a notebook has it
        return judged(reward)

    assert asyncio.run(inside()) == [1, 2, 3]


def test_an_async_function_that_fails_exits_or_hangs_is_named():
    async def fails(prompts, responses):
        raise KeyError("x") if "bb" in responses else SystemExit(0)

    with pytest.raises(UserError, match="sample 0: raised KeyError"):
        judged(fails)

    async def is_cancelled(prompts, responses):
        raise asyncio.CancelledError

    async def makes_tasks(prompts, responses):
        return await asyncio.gather(*(asyncio.create_task(fails([], r)) for r in responses))

    for function, said in ((is_cancelled, "raised CancelledError"), (makes_tasks, r"called sys.exit\(0\)")):
        with pytest.raises(UserError, match=f"reward function mine, sample 0: {said}"):
            judged(function)

    async def hangs(prompts, responses):
        await asyncio.sleep(60)

    with pytest.raises(UserError, match="no result within reward_timeout = 0.05 seconds"):
        make(hangs, reward_timeout=0.05).judge(TEXTS, ROWS)
    assert judged(lambda p, r: [1, 2, 3]) == [1, 2, 3]


def test_functions_get_copies():
    columns = {"tests": [{"cases": [1]}, {"cases": [2]}, {"cases": [3]}]}

    def greedy(prompts, responses, tests, response_ids):
        for lists in (prompts, responses, response_ids):
            lists.clear()
        for test in tests:
            test["cases"].append(0)
        return [0.0] * 3

    judged(greedy, **columns)
    assert columns == {"tests": [{"cases": [1]}, {"cases": [2]}, {"cases": [3]}]}
    assert TEXTS.responses == ["a", "bb", "ccc"] and ROWS.response_ids == [[5, 1], [6, 7, 1], [8]]


# ------------------------------------------------------------------------------------------ failures, time, the network


def test_sys_exit_is_an_error():
    with pytest.raises(UserError, match=r"reward function mine, sample 0: called sys.exit\(0\)"):
        judged(lambda p, r: exit_with(0))


def test_a_long_message_of_many_lines_is_one_line():
    with pytest.raises(UserError) as caught:
        judged(lambda p, r: int("x\ny" * 1000))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def exit_with(code: int) -> None:
    raise SystemExit(code)


def test_a_call_without_an_end_is_an_error_soon():
    start = time.monotonic()
    with pytest.raises(UserError, match="a batch of 3 samples: no result within reward_timeout = 0.1 seconds; raise"):
        make(lambda prompts, responses: time.sleep(20), reward_timeout=0.1).judge(TEXTS, ROWS)
    assert time.monotonic() - start < 10
    quick = make(lambda prompts, responses: [1, 2, 3], reward_timeout=5)
    assert quick.judge(TEXTS, ROWS) == [1, 2, 3]
    with pytest.raises(UserError, match=r"sample 0: called sys.exit\(3\)"):
        make(lambda prompts, responses: exit_with(3), reward_timeout=5).judge(TEXTS, ROWS)


class RequestException(OSError):
    """As requests has it."""


class HTTPStatusError(Exception):
    """As httpx has it."""

    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.response = type("Response", (), {"status_code": status})


class HTTPError(HTTPStatusError):
    pass


@pytest.mark.parametrize(
    "error",
    [ConnectionResetError("gone"), TimeoutError(), RequestException("no route"), HTTPError(503), HTTPError(429)],
)
def test_errors_of_the_network_are_tried_again(error):
    calls = []

    def flaky(prompts, responses):
        calls.append(len(responses))
        responses.clear()  # each try gets lists of its own
        if len(calls) < 3:
            raise error
        return [1, 2, 3]

    function = partial(UserFunction, "mine", flaky, pause=0.001)
    assert FunctionScorer([("mine", 1.0, function(retries=2))]).judge(TEXTS, ROWS) == [1, 2, 3]
    calls.clear()
    with pytest.raises(UserError, match=rf"a batch of 3 samples: raised {type(error).__name__}: .*\(2 tries\)"):
        FunctionScorer([("mine", 1.0, function(retries=1))]).judge(TEXTS, ROWS)
    assert calls == [3, 3]


@pytest.mark.parametrize("error", [KeyError("x"), HTTPError(404), HTTPError(401), FileNotFoundError("x")])
def test_other_errors_are_not_tried_again(error):
    def fails(prompts, responses):
        calls.append(len(responses))
        raise error

    calls = []
    scorer = FunctionScorer([("mine", 1.0, UserFunction("mine", fails, retries=5, pause=9))])
    with pytest.raises(UserError, match="raised"):
        scorer.judge(TEXTS, ROWS)
    assert calls == [3, 1]  # the second: to name the sample


def test_the_fields_reach_the_function():
    (part,) = read_reward(lambda prompts, responses: [], PPOConfig(reward_timeout=7, reward_retries=4))
    assert (part.source.timeout, part.source.retries) == (7, 4)


# ------------------------------------------------------------------------------------------------------------- the file


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def f(:\n", r"mine.py:1: SyntaxError: invalid syntax"),
        ("x = 1\nimport no_such_module_x\n", r"mine.py:2: ModuleNotFoundError: No module named 'no_such_module_x'"),
        ("from math import no_such_name\n", r"mine.py:1: ImportError: cannot import name 'no_such_name'"),
        ("\n\n1 / 0\n", r"mine.py:3: ZeroDivisionError: division by zero"),
        ("import sys\nsys.exit(0)\n", r"mine.py:2: called sys.exit\(0\)"),
    ],
)
def test_a_file_that_does_not_load_is_one_line(tmp_path, text, said):
    file = tmp_path / "mine.py"
    file.write_text(text)
    with pytest.raises(UserError, match=said) as caught:
        make(f"{file}:f")
    assert "\n" not in str(caught.value) and str(caught.value).startswith("reward: ")


def test_a_file_without_a_function_says_which_it_has(tmp_path):
    file = tmp_path / "rules.py"
    file.write_text("import no_such_module_x\ndef brevity(p, r): ...\nasync def polite(p, r): ...\ndef _own(): ...\n")
    for reward in (str(file), file, [["short", 1.0, str(file)]]):
        with pytest.raises(UserError, match=r"rules.py is a file; .* FILE.py:FUNCTION \(it has brevity, polite\)"):
            make(reward)
    with pytest.raises(UserError, match="the file 'none.py' does not exist"):
        make("none.py")


def test_a_file_may_have_dataclasses_and_import_its_neighbours(tmp_path):
    (tmp_path / "my_helpers_of_rewards.py").write_text("FACTOR = 2.0\n")
    (tmp_path / "mine.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "from my_helpers_of_rewards import FACTOR\n\n"
        "@dataclass\nclass Rule:\n    factor: float\n\n"
        "def twice(prompts, responses):\n    return [Rule(FACTOR).factor * len(r) for r in responses]\n"
    )
    assert load_function(f"{tmp_path}/mine.py:twice")(["p"], ["ab"]) == [4.0]


# ----------------------------------------------------------------------------------------------------- sums with models


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """A reward model, and classifiers of three labels: of one class each, and of several."""
    root, tokenizer = tmp_path_factory.mktemp("models"), tiny.tokenizer()
    model = scalar_model(tiny.llama(), tokenizer, seed=3)
    write_model(root / "rm", model, tokenizer, [1])
    model.score = torch.nn.Linear(model.score.in_features, 3, bias=False)
    model.config.num_labels = 3
    model.config.id2label = {0: "rude", 1: "plain", 2: "kind"}
    model.config.label2id = {"rude": 0, "plain": 1, "kind": 2}
    write_model(root / "classes", model, tokenizer, [1])
    model.config.problem_type = "multi_label_classification"
    write_model(root / "labels", model, tokenizer, [1])
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    labels = {"id2label": {0: "rude", 1: "plain", 2: "kind"}, "num_labels": 3, "pad_token_id": 0}
    torch.manual_seed(0)
    encoder = BertForSequenceClassification(BertConfig(**shape, **labels, vocab_size=40, max_position_embeddings=6))
    encoder.save_pretrained(root / "encoder")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "bb", "ccc"]
    (root / "encoder" / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab_file=str(root / "encoder" / "vocab.txt")).save_pretrained(root / "encoder")
    return {name: str(root / name) for name in ("rm", "classes", "labels", "encoder")}


def test_a_sum_of_reward_models_and_functions(folders):
    scorer = make([["rm", 2.0, folders["rm"]], {"name": "short", "weight": -1, "function": lambda p, r: [1, None, 3]}])
    alone = make(folders["rm"]).judge(TEXTS, ROWS)
    assert scorer.judge(TEXTS, ROWS) == [pytest.approx(2 * alone[0] - 1), None, pytest.approx(2 * alone[2] - 3)]
    assert len(scorer.models) == 1 and not scorer.per_token


@pytest.mark.parametrize("kind", ["classes", "labels"])
@pytest.mark.parametrize("label", ["kind", 2, "2"])
def test_a_classifier_of_several_labels_scores_by_one_of_them(folders, kind, label):
    scorer = make([{"name": "kind", "model": folders[kind], "label": label}])
    model = AutoModelForSequenceClassification.from_pretrained(folders[kind]).eval()
    for row, score in enumerate(scorer.judge(TEXTS, ROWS)):
        logits = model(torch.tensor([ROWS.whole(row)])).logits[0]
        want = torch.nn.functional.logsigmoid(logits) if kind == "labels" else logits.log_softmax(-1)
        assert score == pytest.approx(float(want[2]), abs=1e-5)


def test_one_classifier_stands_without_a_list(folders):
    """Its label in whatever case; a label 0 is a label; it is called after its label."""
    listed = make([{"model": folders["classes"], "label": "rude"}]).judge(TEXTS, ROWS)
    for label in ("rude", "Rude", 0, "0"):
        assert make({"model": folders["classes"], "label": label}).judge(TEXTS, ROWS) == listed
    assert [part.name for part in read_reward({"model": folders["rm"]}, PPOConfig())] == [repr(folders["rm"])]
    assert [part.name for part in read_reward({"model": folders["classes"], "label": 0}, PPOConfig())] == ["0"]


def test_an_encoder_reads_the_reply_alone_with_its_own_tokenizer(folders):
    """At most as much of it as it has positions for."""
    texts = Texts(["one"] * 3, RAW, ["a", "bb a", "ccc bb a bb a bb a bb"], {})
    scores = make([{"name": "kind", "model": folders["encoder"], "label": "kind"}]).judge(texts, ROWS)
    model = BertForSequenceClassification.from_pretrained(folders["encoder"]).eval()
    for ids, score in zip([[2, 4, 3], [2, 5, 4, 3], [2, 6, 5, 4, 5, 3]], scores, strict=True):
        assert score == pytest.approx(float(model(torch.tensor([ids])).logits[0].log_softmax(-1)[2]), abs=1e-5)
    loaded = [{"name": "kind", "model": model, "label": "kind"}]
    with pytest.raises(UserError, match="BertForSequenceClassification reads tokens of its own; give its folder"):
        make(loaded)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"name": "a", "model": "CLASSES", "label": "nice"}, "label 'nice' of .* is none of: rude, plain, kind"),
        ({"name": "a", "model": "CLASSES"}, "has the labels rude, plain, kind; name one: "),
        ({"name": "a", "function": len, "label": 1}, "'a' is a function and has no labels"),
        ({"name": "a", "wieght": 2, "function": len}, "no such field: wieght"),
        ({"name": "a", "weight": 2}, "one of model and function is needed"),
        ({"name": "a", "weight": "two", "function": len}, "'a' has the weight 'two'; expected a number"),
        (["a", 1.0, "no/such-model"], "no/such-model"),
    ],
)
def test_a_wrong_entry_is_named(folders, entry, said):
    if isinstance(entry, dict) and entry.get("model") == "CLASSES":
        entry = {**entry, "model": folders["classes"]}
    with pytest.raises(UserError, match=said):
        make([entry])


def test_a_run_with_such_a_sum(folders):
    kind = {"name": "kind", "weight": 0.5, "model": folders["classes"], "label": "kind"}
    t = ppo_trainer(reward=[{"name": "rm", "model": folders["rm"]}, kind], offload=True, total_steps=1)
    rollout = next(iter(t)).rollout
    alone = [make(reward).judge(rollout.texts, rollout.rows) for reward in (folders["rm"], [{**kind, "weight": 1}])]
    assert rollout.scores == pytest.approx([a + 0.5 * b for a, b in zip(*alone, strict=True)], abs=1e-5)


# ---------------------------------------------------------------------------------------------------- what rewards read


def test_no_text_holds_the_stop_token_that_ended_the_reply():
    """It is an added token here, which the tokenizer does not call special."""
    tokenizer, policy = tiny.tokenizer(), tiny.llama()
    tokenizer.add_tokens(["<END>"])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '<END>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    policy.resize_token_embeddings(len(tokenizer))
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        head = policy.lm_head.weight
        head[-1] = 4 * head.abs().max() * torch.sign(torch.randn(head.shape[1], generator=draw))
    t = ppo_trainer(policy=policy, tokenizer=tokenizer, max_new_tokens=20)
    rollout = t.rollout(t.prompts, 4, purpose="rollout")
    ended = [ids[-1] == len(tokenizer) - 1 for ids in rollout.response_ids]
    assert any(ended) and not any("<END>" in text for text in rollout.responses)
    for text, ids, finished in zip(rollout.responses, rollout.response_ids, rollout.finished, strict=True):
        assert text == tokenizer.decode(ids[: len(ids) - finished], skip_special_tokens=True)
