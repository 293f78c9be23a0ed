"""`python -m bench.ratings` on a tiny model and made-up ratings: every part, a run that goes on, what is refused."""

from __future__ import annotations

import json
import random
from itertools import combinations
from pathlib import Path
from statistics import fmean

import pytest

from bench import ratings, ratings_data, ratings_page, ratings_replies
from fastrlhf.models.saving import write_model
from tests import tiny

GOOD, BAD = ("thank you", "the answer is yes", "please"), ("no", "the answer is no", "moon")
SMALL = {"max_tokens": 48, "proxy": 24, "gold": 20, "test": 12, "reward_layers": 1, "adapted_layers": 1, "rank": 2,
         "reward_epochs": 1, "reward_warmup": 1, "sft": 8, "new_tokens": 5, "best_of": 4, "answers": 2, "steps": 3,
         "rollout": 4, "group": 2, "ppo_epochs": 1}  # fmt: skip


ROOT = Path(__file__).parents[2]


def rows(count: int = 64) -> list[dict]:
    draw, made = random.Random(0), []
    for number in range(count):
        worth = draw.choice((-2, 2))
        words = draw.choice(GOOD if worth > 0 else BAD)
        given = [max(-4, min(4, worth + draw.choice((-1, 0, 1)))) for _ in range(draw.randint(5, 9))]
        made.append({"id": number, "sentence": f"{words} {number}", "ratings": given, "mean": fmean(given)})
    return made


def write(path: Path, some: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in some))
    return str(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tiny")
    write_model(folder, tiny.llama(), tiny.tokenizer(), [1, *range(200, 320)])  # many a reply ends
    return str(folder)


def arguments(folder: Path, model: str, data: str, **changes: object) -> list[str]:
    sizes = [f"--{name.replace('_', '-')}={value}" for name, value in (SMALL | changes).items()]
    return [data, "--model", model, "--work", str(folder / "work"), "--dtype", "fp32", *sizes]


@pytest.fixture(scope="module")
def done(tmp_path_factory, model) -> Path:
    folder = tmp_path_factory.mktemp("ratings")
    data = write(folder / "rated.jsonl", rows())
    assert ratings.main([*arguments(folder, model, data), "--json", str(folder / "out.json")]) == 0
    return folder


def test_every_part_is_measured(done, capsys):
    report = json.loads((done / "out.json").read_text())
    parts = report["parts"]
    assert list(parts) == list(ratings.PARTS) and report["sizes"]["proxy"] == 24
    for name in ("proxy", "gold"):
        agreement = parts[name]["agreement"]
        assert agreement["records"] == 12 and agreement["people"]["people"] > 4
        assert agreement["people"]["halves"] < agreement["people"]["mean_of_all"] < agreement["people"]["ceiling"] < 1
        assert agreement["baselines"]["bag of words"].keys() & {"with_scores", "missing"}
    assert parts["proxy"]["agreement"]["people"] == parts["gold"]["agreement"]["people"]  # of the same test part
    start, curve = parts["best_of"]["start"], parts["best_of"]["curve"]
    assert [row["n"] for row in curve] == [1, 2, 4] and start["replies"] == 80 and 0.2 < start["finished"] < 1
    assert 0 < curve[2]["prompts"] < curve[0]["prompts"] <= 20  # a prompt without four replies that ended counts not
    assert curve[0]["proxy"]["mean"] < curve[1]["proxy"]["mean"] < curve[2]["proxy"]["mean"]
    for name in ("ppo", "grpo"):
        steps, end = parts[name]["steps"], parts[name]["end"]
        assert [row["step"] for row in steps] == [1, 2, 3] and abs(steps[0]["kl"]) < 1e-3
        assert end["replies"] == 40 and end["kl"]["mean"] != 0.0 and len(end["samples"]) == ratings_replies.SHOWN
    capsys.readouterr()
    assert (done / "work/ratings.svg").read_text().count("<circle") >= 2 * (3 + 3 + 3)


def test_a_cut_run_goes_on_at_the_part_that_is_missing(done, model, capsys):
    work, data = done / "work", str(done / "rated.jsonl")
    before = {name: (work / f"{name}.json").read_bytes() for name in ratings.PARTS}
    (work / "grpo.json").unlink()
    assert ratings.main(arguments(done, model, data)) == 0
    began = [line for line in capsys.readouterr().out.splitlines() if line.endswith("begins")]
    assert began == ["ratings: grpo begins"]
    again = json.loads((work / "grpo.json").read_text())
    kept = json.loads(before.pop("grpo"))
    for one in (again, kept):  # the same run, at another time
        one.pop("seconds")
        [row.pop("seconds") for row in one["steps"]]
    assert again == kept
    assert before == {name: (work / f"{name}.json").read_bytes() for name in before}


def test_parts_of_other_sizes_are_not_gone_on_with(done, model):
    with pytest.raises(SystemExit, match="holds parts made with rollout 4; name another folder"):
        ratings.main(arguments(done, model, str(done / "rated.jsonl"), rollout=8))


def test_minutes_end_a_run_of_the_policy(done, model, tmp_path, capsys):
    options = ratings.parse(arguments(done, model, str(done / "rated.jsonl")))
    judges = tuple(ratings_replies.Judge(options.work / name / "final", 1.0, 0.0, -1.0) for name in ("proxy", "gold"))
    found = ratings.train_policy("ppo", judges, options, 0.0)
    assert [row["step"] for row in found["steps"]] == [1, 2]
    assert "--minutes allow one more step, of 3" in capsys.readouterr().out


def test_no_sentence_is_in_two_parts(done, model, tmp_path):
    twice = rows(30) + rows(30)
    options = ratings.parse(arguments(tmp_path, model, write(tmp_path / "x.jsonl", twice), proxy=10, gold=10, test=10))
    parts = ratings_data.read(options.data, tiny.tokenizer(), options)
    said = [{row["response"] for row in some} for some in parts.values()]
    assert [len(some) for some in said] == [10, 10, 10] and not any(a & b for a, b in combinations(said, 2))
    assert {row["prompt"] for some in parts.values() for row in some} <= set(ratings_data.PROMPTS["train"])
    options.gold = 11
    with pytest.raises(SystemExit, match="30 different sentences below --max-tokens 48, not 10 proxy"):
        ratings_data.read(options.data, tiny.tokenizer(), options)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"sentence": "a"}, 'x.jsonl:1: expected "sentence" and "ratings", found sentence'),
        ({"sentence": "a", "ratings": []}, 'x.jsonl:1: field "ratings" must be a list of numbers'),
        ({"sentence": "a", "ratings": [1, 5]}, "x.jsonl:1: rating 5 is outside the declared range -4 to 4"),
        ({"ratings": [1]}, 'x.jsonl:1: expected "sentence" and "ratings", found ratings'),
        ({"sentence": 1, "ratings": [1]}, 'x.jsonl:1: field "sentence" must be text, found int 1'),
        ([1], 'x.jsonl:1: expected "sentence" and "ratings", found no object'),
    ],
)
def test_a_row_that_is_none_is_named(row, problem, tmp_path, model):
    options = ratings.parse(arguments(tmp_path, model, write(tmp_path / "x.jsonl", [row])))
    with pytest.raises(ValueError, match=problem):
        ratings_data.read(options.data, tiny.tokenizer(), options)


def test_best_of_n_is_the_mean_over_all_subsets():
    proxy, gold = [0.3, -1.0, 2.0, 0.5], [1.0, 7.0, -3.0, 2.0]
    for n in (1, 2, 4):
        chosen = [max(some, key=proxy.__getitem__) for some in combinations(range(4), n)]
        assert ratings_replies.expected_best_by(proxy, gold, n) == pytest.approx(fmean(gold[i] for i in chosen))
    [one, two, four] = ratings_replies.best_of_curve([(proxy, gold)], 4)
    assert one["gold"]["mean"] == fmean(gold) and four["gold"]["mean"] == -3.0 and four["proxy"]["mean"] == 2.0
    assert one["kl"] == 0.0 < two["kl"] < four["kl"]


def test_bf16_is_used_where_the_cpu_multiplies_it():
    assert ratings.dtype_of("fpu avx2 amx_bf16 amx_tile") == ratings.dtype_of("avx512_bf16") == "bf16"
    assert ratings.dtype_of("fpu avx2 avx512f") == ratings.dtype_of("") == "fp32"


def test_a_cut_reply_has_no_rating():
    judge = ratings_replies.Judge(Path("x"), 2.0, 1.0, -3.0)
    assert judge.ratings([0.5, -3.0, 1.0], [True, False, True]) == [2.0, None, 3.0]
    replies = ratings_replies.Replies(None, ["a", "b …", "c", "d"], [True, False, True, True], 2)
    assert replies.groups([1.0, None, 2.0, 3.0], [4.0, None, 5.0, 6.0]) == [([1.0], [4.0]), ([2.0, 3.0], [5.0, 6.0])]


def test_the_line_is_that_of_least_squares():
    assert ratings.line([0, 1, 2], [1, 3, 5]) == pytest.approx((2, 1))
    assert ratings.line([0, 1, 2, 3], [0, 0, 1, 1]) == pytest.approx((0.4, -0.1))
    assert ratings.line([1, 1], [0, 2]) == (0.0, 1.0)


def test_the_prompts_are_sixty_and_twenty_others():
    train, held_out = ratings_data.PROMPTS.values()
    assert (len(set(train)), len(set(held_out))) == (60, 20) and not set(train) & set(held_out)


def test_the_page_is_of_the_kept_figures(tmp_path):
    shipped = json.loads((ROOT / "bench/results/ratings_cpu.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs/ratings.md").read_text(encoding="utf-8")
    for table in ratings_page.tables(shipped).split("\n\n"):
        assert table in page
    ratings_page.draw(shipped, tmp_path / "drawn.svg")
    assert (tmp_path / "drawn.svg").read_bytes() == (ROOT / "docs/ratings.svg").read_bytes()
    changed = {name: size for name, size in shipped["sizes"].items() if size != _default(name)}
    for name, size in changed.items():
        assert f"--{name.replace('_', '-')} {size:g}" in page


def _default(name: str) -> object:
    return getattr(ratings.parse(["x"]), name) if name != "dtype" else "fp32"
