"""The embedded demo: its data, its rule, and the whole run with shortened stages."""

from __future__ import annotations

import contextlib
import io
import json
import re
import subprocess
import sys
from collections import Counter
from random import Random

import pytest

from bench.quickstart_data.__main__ import main as quickstart_data
from fastrlhf import UserError, inference, quickstart
from fastrlhf.data.templates import encode_prompt
from fastrlhf.models.loading import load_reward_model, load_tokenizer
from fastrlhf.quickstart import judge, verdict
from fastrlhf.quickstart.content import DATA_DIR, FACETS, TOPICS, shipped, texts_of
from fastrlhf.quickstart.run import TRAINERS, make
from fastrlhf.quickstart.settings import load_settings
from fastrlhf.quickstart.verdict import Replies, shuffled
from fastrlhf.rl.scorers import score_rows
from fastrlhf.runtime.batching import derive_seed

VERDICT_KEYS = set(
    [
        "seed",
        "rate_before_sft",
        "rate_sft",
        "rate_ppo",
        "rate_ppo_shuffled",
        "rate_ppo_familiar",
        "rate_ppo_new",
        "rate_sft_new_topic",
        "rate_ppo_new_topic",
        "considerate_ppo",
        "kl_sequence_mean",
        "distinct2_sft",
        "distinct2_ppo",
        "rm_pair_accuracy",
        "length_sft",
        "length_ppo",
        "best_of",
        "rate_best_of",
        "on_topic_best_of",
        "kl_best_of",
        "length_best_of",
        "seconds",
        "passed",
    ]
)


TRAINING = ("sft", "feedback", "ppo_prompts")
EVERY = 9  # of the held-out rows, which the verdict of a short run is about


def prompt_of(row: dict) -> str:
    return (row.get("prompt") or row["messages"])[0]["content"]


def test_the_shipped_data_is_what_the_generator_writes(capsys):
    assert quickstart_data(["--check"]) == 0
    assert "nothing differs" in capsys.readouterr().out


def test_the_check_names_a_file_that_was_changed_one_too_many_and_one_missing(tmp_path, capsys):
    assert quickstart_data([str(tmp_path)]) == 0
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {p.name: p.read_bytes() for p in DATA_DIR.iterdir()}
    with open(tmp_path / "sft.jsonl", "ab") as file:
        file.write(b"{}\n")
    (tmp_path / "feedback.jsonl").unlink()
    (tmp_path / "more.jsonl").write_bytes(b"")
    assert quickstart_data([str(tmp_path), "--check"]) == 1
    assert "feedback.jsonl, more.jsonl, sft.jsonl differs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": 1}\n{"a', "sft.jsonl:2: is not JSON"),
        ("", "sft.jsonl: holds no rows"),
        (None, "sft.jsonl: holds no rows"),
    ],
)
def test_a_damaged_copy_of_the_shipped_data_is_named(tmp_path, text, expected):
    if text is not None:
        (tmp_path / "sft.jsonl").write_text(text)
    with pytest.raises(UserError, match=f"{expected}.*; install fastrlhf again"):
        shipped("sft", tmp_path)


def kind(row: dict) -> str:
    return next(k for k in ("chosen", "ranking", "score", "edited") if k in row)


def test_all_four_kinds_in_both_languages():
    counts = Counter((kind(row), judge.language_of(prompt_of(row))) for row in shipped("feedback"))
    assert len(counts) == 8 and min(counts.values()) > 50 and len(shipped("feedback")) > 1500


def test_six_hundred_scores_and_more_use_the_whole_scale():
    counts = Counter(row["score"] for row in shipped("feedback") if "score" in row)
    assert sum(counts.values()) >= 600 and set(counts) == {1, 2, 3, 4, 5} and min(counts.values()) >= 50


def conversations() -> list[tuple[str, str]]:
    """Prompt and reply of every row of SFT that has them; the others are plain text."""
    return [(prompt_of(row), row["messages"][1]["content"]) for row in shipped("sft") if "messages" in row]


def test_sft_learns_greetings_and_plain_text_in_both_languages_but_not_the_ones_held_out():
    texts = [row["text"] for row in shipped("sft") if "text" in row]
    for language, greeting, hello in (("zh", "你好，世界！", "你好，"), ("en", "Hello, world!", "Hello,")):
        own = [text for text in texts if judge.language_of(text) == language]
        assert len(own) > 100 and sum(text.startswith(hello) for text in own) >= 10
        assert {text[-1] for text in own} <= set(".!?。！？")
        said = [said for row in shipped("sft") for said in texts_of(row)]
        assert not any(text.startswith(greeting) for text in said) and not any(greeting in text for text in said)


def test_a_thing_stands_in_plain_text_alone_and_in_no_training_prompt_or_reply():
    for language in judge.LANGUAGES:
        name = TOPICS[language][-1].name
        for file in TRAINING:
            lines = [json.dumps(row, ensure_ascii=False) for row in shipped(file) if "text" not in row]
            assert not any(name in line.lower() for line in lines), file
        asked = [prompt_of(row) for row in shipped("heldout_topic_prompts")]
        asked = [prompt for prompt in asked if judge.language_of(prompt) == language]
        assert len(asked) == 48 and all(name in prompt for prompt in asked)
        known = [row["text"] for row in shipped("sft") if name in row.get("text", "").lower()]
        for facet in FACETS:
            assert all(any(fact in text.lower() for text in known) for fact in TOPICS[language][-1].facts(facet))


def test_sft_replies_have_faults_of_content_and_of_manner_so_that_ppo_has_both_to_mend():
    kept = [(judge.about_what_was_asked(*said), judge.considerate(said[1])) for said in conversations()]
    right, kind_ones = (sum(column) / len(kept) for column in zip(*kept))
    assert 0.8 < right < 0.9 and 0.45 < kind_ones < 0.55


def test_half_of_the_held_out_prompts_are_of_new_wording_and_the_other_half_s_frames_are_known():
    trained = [prompt_of(row) for name in TRAINING for row in shipped(name) if "text" not in row]
    held_out = shipped("heldout_prompts")
    assert Counter(row["wording"] for row in held_out) == {"familiar": 144, "new": 144}
    for language in judge.LANGUAGES:
        topics = sorted((topic.name for topic in TOPICS[language]), key=len, reverse=True)

        def frame(text, topics=topics):
            return re.sub("|".join(topics), "X", re.sub(r"\ban? ", "a ", text))

        def parts(text, language=language):  # a context is a sentence of its own, where there is one
            sentences = re.findall(r".+?[.?!。？！]+", frame(text))
            return [" ".join(sentences[1:]).strip(), sentences[0]] if len(sentences) > 1 else [sentences[0]]

        known = {part for text in trained if judge.language_of(text) == language for part in parts(text)}
        for row in held_out:
            text = prompt_of(row)
            if judge.language_of(text) == language:
                assert all(part in known for part in parts(text)) == (row["wording"] == "familiar"), text


def test_held_out_prompts_are_new():
    held_out = {prompt_of(row) for row in shipped("heldout_prompts")}
    for name in TRAINING:
        assert not held_out & {prompt_of(row) for row in shipped(name) if "text" not in row}, name


def test_the_rule_tells_every_fault_from_a_good_reply():
    pairs = shipped("heldout_pairs")
    assert all(judge.rule(prompt_of(row), row["chosen"]) for row in pairs)
    assert not any(judge.rule(prompt_of(row), row["rejected"]) for row in pairs)
    assert len({row["fault"] for row in pairs}) >= 5


def test_the_rule_depends_on_the_prompt():
    good = [(prompt_of(row), row["chosen"]) for row in shipped("heldout_pairs")]
    Random(0).shuffle(good)
    moved = shuffled(len(good), 0)
    assert sorted(moved) == list(range(len(good))) and all(i != j for i, j in enumerate(moved))
    assert sum(judge.rule(good[j][0], good[i][1]) for i, j in enumerate(moved)) / len(good) <= 0.1


def test_the_annotators_are_not_the_rule_in_any_kind_of_feedback():
    """They are noisy: of the replies that the rule tells apart, they order 3 to 15 in 100 the other way in each kind;
    scores of replies that keep the rule reach below those of some that do not."""
    turned = {"chosen": [], "ranking": [], "edited": []}
    for row in shipped("feedback"):
        if "score" not in row:
            best_first = [row["responses"][i] for i in row["ranking"]] if "ranking" in row else []
            best_first = best_first or [row.get("chosen") or row["edited"], row.get("rejected") or row["response"]]
            kept = [judge.rule(prompt_of(row), reply) for reply in best_first]
            turned[kind(row)] += [b for i, a in enumerate(kept) for b in kept[i + 1 :] if a != b]
    for name, wrong in turned.items():
        assert len(wrong) > 300 and 0.03 < sum(wrong) / len(wrong) < 0.15, name
    scored = [
        (judge.rule(prompt_of(row), row["response"]), row["score"]) for row in shipped("feedback") if "score" in row
    ]
    assert min(s for right, s in scored if right) < 3 < max(s for right, s in scored if not right)


def test_a_cjk_character_is_never_merged_with_another():
    from fastrlhf.quickstart.model import build_tokenizer

    tokenizer = build_tokenizer([text for row in shipped("sft")[:300] for text in texts_of(row)])
    text = "请问雨伞应该怎么保养？ How do I dry an umbrella?"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    for token in (tokenizer.decode([i]) for i in range(len(tokenizer))):
        assert sum("\u4e00" <= c <= "\u9fff" for c in token) <= 1, token


def test_the_rule_is_importable_without_torch():
    code = "import sys; from fastrlhf.quickstart.judge import rule; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """A run left between its stages and its verdict, and resumed -> folder, exit code, PPO's weights before."""
    patch = pytest.MonkeyPatch()
    patch.setattr(verdict, "shipped", lambda name: shipped(name)[::EVERY])
    out = tmp_path_factory.mktemp("quickstart") / "run"
    short = [
        "sft.total_steps=3",
        "reward.total_steps=2",
        "reward.epochs=1",
        "reward.mini_batch_size=4",
        "reward.eval_fraction=0.02",
        "ppo.total_steps=1",
    ]
    small = ["ppo.rollout_batch_size=4", "ppo.mini_batch_size=4", "ppo.max_new_tokens=8", "ppo.eval_every=0"]
    assert make(load_settings([f"output_dir={out}", "seed=3", *short, *small]), TRAINERS) == 0
    left = (out / "ppo/final/model.safetensors").read_bytes()
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = quickstart.main([f"output_dir={out}", "resume=true"])
    patch.undo()
    (out / "printed.txt").write_text(printed.getvalue(), encoding="utf-8")
    return out, code, left


def test_the_verdict_stage_says_what_it_is_at_and_an_aim_is_no_failed_bar(short_run):
    printed = (short_run[0] / "printed.txt").read_text(encoding="utf-8")
    stage = printed.partition("--- verdict -> ")[2].partition("held-out prompts, 4 of")[0]
    steps = [line.removeprefix("verdict: ") for line in stage.splitlines() if line.startswith("verdict: ")]
    told = [s.split()[1] for s in steps if s.startswith("the ")]
    assert told == [
        "base",
        "SFT",
        "reward",
        "PPO",
        "KL",
        "SFT",
        "reward",
        "SFT",
        "PPO",
    ]  # best of 8, then the new topic
    bars = printed.partition("\nverdict, seed 3")[2].splitlines()[1:]
    assert [line.split()[0] for line in bars if line.startswith("  ")][-9:] == ["aim"] * 3 + ["also"] * 6
    assert "low" not in {line.split()[0] for line in bars if line.startswith("  ")}


def test_the_run_writes_verdict_replies_model_and_report(short_run):
    out, code, _ = short_run
    found = json.loads((out / "verdict.json").read_text())
    assert set(found) >= VERDICT_KEYS and found["seed"] == 3
    assert code == 1 and found["passed"] is False  # three steps align nothing, and the verdict says so
    answers = [json.loads(line) for line in (out / "heldout.jsonl").read_text(encoding="utf-8").splitlines()]
    asked = [prompt_of(row) for row in shipped("heldout_prompts")[::EVERY]]
    assert [answer["prompt"] for answer in answers] == asked and len(asked) == 32
    assert set(answers[0]) == {"prompt", "response_sft", "response_ppo"}
    rate = sum(judge.rule(row["prompt"], row["response_ppo"]) for row in answers) / len(answers)
    assert found["rate_ppo"] == pytest.approx(rate)
    assert (out / "report.html").stat().st_size > 10_000


def test_the_baseline_is_the_sft_model_s_reply_that_the_reward_model_likes_best(short_run):
    out, *_ = short_run
    config, rows = load_settings([f"output_dir={out}", "resume=true"]).stages["ppo"], shipped("heldout_prompts")[::96]
    prompts = [row["prompt"][0]["content"] for row in rows]
    wordings = [row["wording"] for row in rows]
    sft = Replies(None, prompts, wordings, [""] * 3, [[0]] * 3, [[0]] * 3)
    chosen = verdict.best_of(verdict.Before(out, rows, sft, sft, {}), config)
    assert chosen.prompts == prompts and len(chosen.texts) == len(chosen.response_ids) == 3
    seed = derive_seed(config.seed, "verdict")
    how = {"max_new_tokens": config.max_new_tokens, "temperature": config.temperature, "seed": seed}
    drawn = list(inference.sample(str(out / "sft/final"), [row["prompt"] for row in rows], n=8, **how))
    model, tokenizer = load_reward_model(str(out / "reward/final")), load_tokenizer(str(out / "sft/final"))
    for row, ids, replies in zip(rows, chosen.response_ids, drawn, strict=True):
        asked = encode_prompt(tokenizer, row["prompt"])
        scores = score_rows(model.eval(), [asked + reply.ids for reply in replies], 4096)
        assert ids == replies[int(scores.argmax())].ids


def test_the_model_runs_in_the_stock_pipeline(short_run):
    from transformers import pipeline

    out, *_ = short_run
    run = pipeline("text-generation", model=str(out / "final"), device="cpu")
    text = run("你好，世界！", max_new_tokens=4)[0]["generated_text"]
    assert text.startswith("你好，世界！")
    chat = run([{"role": "user", "content": "雨伞应该怎么保养？"}], max_new_tokens=4)[0]["generated_text"]
    assert chat[-1]["role"] == "assistant"


def test_resume_of_a_finished_run_keeps_its_models(short_run):
    out, _, left = short_run
    for folder in ("ppo/final", "final"):
        assert (out / folder / "model.safetensors").read_bytes() == left
    printed = (out / "printed.txt").read_text(encoding="utf-8")
    kept = [line.split(":")[0] for line in printed.splitlines() if "done before, kept" in line]
    assert kept == ["sft", "reward", "ppo"]


def test_a_wrong_field_is_named_before_anything_runs(tmp_path):
    with pytest.raises(UserError, match="ppo.kl_coeff"):
        quickstart.main([f"output_dir={tmp_path / 'x'}", "ppo.kl_coeff=1"])
    assert not (tmp_path / "x").exists()


def test_a_wrong_general_field_is_said_once_not_once_a_stage():
    with pytest.raises(UserError) as error:
        load_settings(["seed=x", "ppo.kl_coef=y"])
    assert str(error.value).count("seed") == 1 and "ppo.kl_coef" in str(error.value)
