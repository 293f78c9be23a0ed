"""The report: it misses no figure, survives a kill, and takes no text for markup (tests/real opens it in a browser)."""

from __future__ import annotations

import json
import math
import random
import re
from html.parser import HTMLParser

import pytest

from fastrlhf.config.errors import UserError
from fastrlhf.report import build_report, main
from fastrlhf.report.figures import Panel, Scale, Series, bars, curves, path_plot
from fastrlhf.report.folder import ends
from fastrlhf.report.page import render
from fastrlhf.runtime.tracking import Tracker
from tests.run_folders import (
    PPO_FIGURES,
    PROMPTS,
    RM_FIGURES,
    SFT_FIGURES,
    VERDICT,
    ppo_metrics,
    write_killed,
    write_quickstart,
    write_stage,
)

SVG_ATTRIBUTES = {
    *("class", "cx", "cy", "d", "dx", "height", "id", "opacity", "points", "r", "role", "style", "text-anchor"),
    *("transform", "viewbox", "width", "x", "xmlns", "y", "aria-label"),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return build_report(write_stage(tmp_path_factory.mktemp("run") / "ppo", "ppo", 120))


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    return build_report(write_quickstart(tmp_path_factory.mktemp("run") / "quickstart"))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    return build_report(write_killed(tmp_path_factory.mktemp("run") / "killed"))


class Page(HTMLParser):
    """The elements of a page; fails on one that is closed wrongly or left open."""

    VOID = {"meta", "br", "img", "link", "input", "hr"}

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.attributes, self.texts = [], [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return " ".join(self.texts)

    def ids(self):
        return [value for _, name, value in self.attributes if name == "id"]


def read(path):
    return Page(path.read_text(encoding="utf-8"))


def figures(path):
    html = path.read_text(encoding="utf-8")
    return {m[1]: m[0] for m in re.finditer(r'<figure id="([^"]+)".*?</figure>', html, flags=re.DOTALL)}


def test_every_figure_of_a_ppo_run_is_drawn(finished):
    drawn = figures(finished)
    assert list(drawn)[:5] == PPO_FIGURES
    assert "fig-diversity" in drawn and "fig-entropy" in drawn and "fig-explained-var" in drawn
    for name, markup in drawn.items():
        assert 'class="missing"' not in markup and "<svg" in markup, name
        assert re.search(r'id="[^"]*series-0-0"', markup), name


def test_a_quickstart_folder_shows_all_stages_and_the_bars(quickstart):
    assert set(PPO_FIGURES + SFT_FIGURES + RM_FIGURES) <= set(figures(quickstart))
    text = read(quickstart).text
    assert "Passed: 93% of replies to held-out prompts keep the hidden rule after PPO, 52% after SFT." in text
    assert text.count("✓") == 9 and "✗" not in text
    assert "After SFT" in text and "别担心" in text and "Margins on held-out pairs" in text


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"kl_sequence_mean": 12.5}, 'KL per response</div><div class="value">12.5 ✗'),
        ({"length_ppo": 12.0}, 'Length, PPO / SFT</div><div class="value">0.50 ✗'),
        ({"rm_pair_accuracy": 0.7}, 'Reward-model accuracy</div><div class="value">70% ✗'),
        ({"rate_ppo_new": 0.83}, 'Rule in new wording</div><div class="value">83% ✗'),
        ({"on_topic_ppo": 0.9}, 'Replies on topic, PPO less SFT</div><div class="value">-7% ✗'),
        ({"rate_ppo_shuffled": None}, 'Rule with prompts shuffled</div><div class="value">n/a ✗'),
    ],
)
def test_a_missed_bar_is_marked(tmp_path, changed, expected):
    write_stage(tmp_path / "sft", "sft", 2)
    (tmp_path / "verdict.json").write_text(json.dumps(VERDICT | changed | {"passed": False}))
    html = build_report(tmp_path).read_text()
    assert "Not passed: 93%" in html and html.count("✗") == html.count('class="tile bad"') == 1
    assert f'<div class="tile bad"><div class="name">{expected}' in html


def test_what_stands_beside_the_bars_is_shown_where_the_verdict_has_it(tmp_path):
    write_stage(tmp_path / "sft", "sft", 2)
    (tmp_path / "verdict.json").write_text(json.dumps(VERDICT))
    html = build_report(tmp_path).read_text()
    assert 'Best of 8 SFT replies</div><div class="value">91.5%<' in html and "at most 1.20 nats" in html
    text = re.sub(r"<[^>]+>| +|\n", " ", html)
    for name, values in (
        ("Replies on topic", ("97%", "96%")),
        ("Replies considerate", ("54%", "98.5%")),
        ("Rule, a topic without training prompts", ("12.5%", "25%")),
    ):
        assert re.search(rf"{name}\s+{values[0]}\s+\S*\s*{values[1]}", text), name
    missing = {"best_of", "rate_best_of", "kl_best_of", "considerate_ppo", "rate_ppo_new_topic"}
    (tmp_path / "verdict.json").write_text(json.dumps({k: v for k, v in VERDICT.items() if k not in missing}))
    html = build_report(tmp_path).read_text()
    assert "Best of" not in html and "considerate" not in html and "without training" not in html


def test_an_aim_that_was_not_reached_is_no_failed_bar(tmp_path):
    write_stage(tmp_path / "sft", "sft", 2)
    missed = {
        "rate_ppo_new": 0.86,
        "rate_ppo_familiar": 0.94,
        "rm_pair_accuracy_by_fault": {"rude": 0.99, "vague": 0.7},
    }
    (tmp_path / "verdict.json").write_text(json.dumps(VERDICT | missed))
    html = build_report(tmp_path).read_text()
    assert "✗" not in html and 'class="tile bad"' not in html and html.count("✓") == 9
    assert 'Rule in familiar wording</div><div class="value">94%<' in html and "aim 95%: training" in html
    assert 'Rule in new wording</div><div class="value">86% ✓<' in html and "worst kind of fault 70%, aim 85%" in html


@pytest.mark.parametrize(("stage", "expected"), [("sft", SFT_FIGURES), ("reward", RM_FIGURES)])
def test_single_stage_folders(tmp_path, stage, expected):
    report = build_report(write_stage(tmp_path / "run", stage, 30))
    shown = figures(report)
    assert [name for name in shown if name in expected] == expected
    assert "missing" not in "".join(shown.values())


@pytest.mark.parametrize("name", ["finished", "quickstart", "hostile"])
def test_one_small_inert_file(request, name):
    report = request.getfixturevalue(name)
    page = read(report)
    assert report.stat().st_size < 2_000_000
    active = {
        "script",
        "img",
        "iframe",
        "object",
        "embed",
        "link",
        "base",
        "form",
        "input",
        "video",
        "audio",
        "foreignobject",
    }
    assert active & set(page.tags) == set()
    for tag, attribute, value in page.attributes:
        assert not attribute.startswith("on"), (tag, attribute)
        assert "//" not in value and "javascript:" not in value, (tag, attribute, value)
        if attribute in ("href", "src", "xlink:href"):
            assert value.startswith("#"), (tag, value)
    assert ("meta", "content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes
    assert len(page.ids()) == len(set(page.ids()))
    anchors = {value[1:] for tag, attribute, value in page.attributes if attribute == "href"}
    assert anchors <= set(page.ids())
    style = re.search(r"<style>(.*?)</style>", report.read_text(), flags=re.DOTALL)[1]
    assert "url(" not in style and "@import" not in style


@pytest.mark.parametrize(
    ("rewards", "diversity", "expected"),
    [
        ((0.0, 2.0, 3.0), (0.4, 0.3, 0.1), True),
        ((0.0, 2.0, 3.0), (0.4, 0.3, 0.3), False),  # fewer distinct replies, but not copies
        ((3.0, 2.0, 1.0), (0.4, 0.3, 0.1), False),  # a collapse that no reward pays for is another illness
        ((0.0,), (0.4,), False),
    ],
)
def test_reward_up_and_diversity_down_is_called_over_optimisation(tmp_path, rewards, diversity, expected):
    with Tracker(tmp_path, "ppo", 20, console=False) as tracker:
        for i, (reward, distinct) in enumerate(zip(rewards, diversity, strict=True)):
            tracker.log(10 * i, {"reward/mean": reward, "reward/eval": reward, "distinct2/eval": distinct})
    report = build_report(tmp_path)
    said = "Over-optimisation: the reward rose while distinct-2 of the held-out replies fell from 0.40 to 0.10."
    assert (said in read(report).text) == expected
    assert ('class="tile bad"><div class="name">Distinct-2' in report.read_text()) == expected
    drawn = figures(report)["fig-diversity"]
    assert "series-0-0" in drawn and "series-1-0" in drawn and "distinct-2, held out" in drawn


def test_hostile_texts_are_shown_as_texts(hostile):
    html, text = hostile.read_text(encoding="utf-8"), read(hostile).text
    assert "<script>document.title='owned'</script>" in text
    assert "</div></table><img src=x onerror=alert(1)>" in text
    assert "&lt;b&gt; &#60;script&#62;" in text
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", html)
    assert "more characters" in text


def test_a_killed_run_is_reported_with_its_resume_command(hostile):
    text = read(hostile).text
    assert "Not finished (step 37 of 500): held-out reward rose from" in text
    assert f"fastrlhf resume {hostile.parent}" in text


def test_commands_fit_how_the_run_was_started(tmp_path, quickstart):
    assert "fastrlhf quickstart seed=0 output_dir=NEW_FOLDER" in read(quickstart).text
    assert "fastrlhf resume" not in read(quickstart).text
    folder = write_stage(tmp_path / "a run", "sft", 3)
    assert f"fastrlhf sft '{folder}/config.yaml' output_dir=NEW_FOLDER" in read(build_report(folder)).text
    (folder / "run.json").write_text(json.dumps({"verb": "sft", "from_python": ["model", "data"]}))
    assert "started from Python with objects for model, data" in read(build_report(folder)).text


def test_a_run_torn_anywhere_still_gets_a_report(tmp_path):
    folder = write_stage(tmp_path / "run", "ppo", 12)
    at = {}
    for name in ("metrics", "timings", "samples", "events"):
        with open(folder / f"{name}.jsonl", "ab") as file:
            file.write(b'{"step": 13, "rewa\xff')
        at[name] = len((folder / f"{name}.jsonl").read_bytes().splitlines())
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(b'\n[1, 2]\n{"step": "x"}\n' + b"[" * 100_000)
    (folder / "config.yaml").write_text("seed: [1, &a")
    (folder / "run.json").write_text("{")
    (folder / "heldout.jsonl").write_text("1\n")
    text = read(build_report(folder)).text
    assert "in 12 PPO steps" in text
    named = {f"{folder}/{name}.jsonl:{line}: is not UTF-8" for name, line in at.items()} | {
        f"{folder}/metrics.jsonl:{at['metrics'] + 1}: is no JSON object but a list",
        f"{folder}/metrics.jsonl:{at['metrics'] + 2}: has no int 'step'",
        f"{folder}/metrics.jsonl:{at['metrics'] + 3}: cannot be read",
        f"{folder}/config.yaml",
        f"{folder}/run.json: is not JSON",
        f"{folder}/heldout.jsonl:1: is no JSON object but a int",
    }
    assert [problem for problem in named if problem not in text] == []
    assert text.count("damaged") == len(named)


def test_hundreds_of_damaged_lines_are_counted_and_the_first_named(tmp_path):
    folder = write_stage(tmp_path / "run", "sft", 3)
    with open(folder / "events.jsonl", "ab") as file:
        file.write(b"garbage\n" * 300)
    text = read(build_report(folder)).text
    assert "events.jsonl:1: is not JSON" in text and "events.jsonl:300" not in text
    assert "280 more lines or files" in text


def test_a_number_that_no_float_can_hold_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        f'{{"step": 1, "reward/mean": 0.5, "kl/ref": 1{"0" * 400}}}\n{{"step": 2, "reward/mean": 1e999}}\n'
    )
    shown = figures(build_report(tmp_path))
    assert 'class="missing"' in shown["fig-kl"] and shown["fig-reward"].count("<circle") == 1


def test_metrics_alone_are_enough(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "kl/ref": 0.0, "reward/mean": 0.5}\n')
    shown = figures(build_report(tmp_path))
    assert 'class="missing"' not in shown["fig-reward"] and 'class="missing"' in shown["fig-loss"]
    assert "no step recorded policy/loss or value/loss" in shown["fig-loss"]


def test_a_metric_that_was_never_finite_is_a_loud_gap(tmp_path):
    folder = write_stage(tmp_path / "run", "ppo", 12)
    with Tracker(folder, "ppo", 3, console=False) as tracker:
        for step in (1, 2, 3):
            (folder / "config.yaml").write_text("total_steps: 3\n")
            tracker.log(step, {"reward/mean": math.nan, "kl/ref": 0.1 * step, "policy/loss": 0.0, "length/mean": 3.0})
    report = build_report(folder)
    assert 'class="missing"' in figures(report)["fig-reward"] and 'class="missing"' in figures(report)["fig-reward-kl"]
    text = read(report).text
    assert "No reward was recorded in 3 PPO steps." in text and "not finite" in text and "at step 1, 2, 3" in text


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "no such folder"),
        ({}, "holds no metrics"),
        ({"metrics.jsonl": ""}, "expected metrics.jsonl with at least"),
    ],
)
def test_folders_without_a_run_are_refused(tmp_path, content, expected):
    folder = tmp_path / "run"
    if content is not None:
        folder.mkdir()
        for name, text in content.items():
            (folder / name).write_text(text)
    with pytest.raises(UserError, match=expected) as error:
        main(folder)
    assert str(folder) in str(error.value)


def test_main_prints_the_path(finished, capsys):
    assert main(str(finished.parent)) == 0
    assert capsys.readouterr().out == f"{finished}\n"


def test_the_same_files_give_the_same_bytes(finished):
    before = finished.read_bytes()
    assert build_report(finished.parent).read_bytes() == before
    assert [path.name for path in finished.parent.glob(".report*")] == []


def test_long_runs_stay_small(tmp_path):
    draw = random.Random(0)
    with open(tmp_path / "metrics.jsonl", "w") as file:
        for step in range(1, 10_001):
            file.write(json.dumps({"step": step, **ppo_metrics(step / 10_000, draw)}) + "\n")
    assert build_report(tmp_path).stat().st_size < 1_000_000


def test_credentials_stay_out(tmp_path):
    folder = write_stage(tmp_path / "run", "ppo", 3)
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("policy: out/sft", "policy: https://me:hunter22@host/sft"))
    token = "hf_" + "aB3" * 10
    (folder / "run.json").write_text(json.dumps({"verb": "ppo", "argv": [f"--token={token}"], "WANDB_API_KEY": token}))
    html = build_report(folder).read_text()
    assert "hunter22" not in html and token not in html and "https://***@host/sft" in html


def test_changed_fields_stand_beside_their_defaults(finished):
    html = finished.read_text()
    assert re.search(r"learning_rate</td><td[^>]*><code>0.0003</code></td><td[^>]*><code>1e-06</code>", html)
    section = html[html.index('<section id="config">') : html.index("The whole config.yaml")]
    assert "eval_every" in section and "gae_lambda" not in section and "loss_aggregation" not in section


def test_time_is_shared_out_by_phase(finished):
    section = finished.read_text().split('<section id="time">')[1].split("</section>")[0]
    shares = [int(share) for share in re.findall(r">(\d+)%<", section)]
    assert section.index("update") < section.index("rollout") < section.index("scoring")
    assert 97 <= sum(shares) <= 103


def test_samples_show_the_first_and_the_last_response(finished):
    section = finished.read_text().split('<section id="samples">')[1].split("</section>")[0]
    for prompt, before, after in PROMPTS:
        assert prompt in section and section.index(before) < section.index(after)
    assert section.count("▲ score") == len(PROMPTS)


@pytest.mark.parametrize(
    ("values", "expected"), [([1.0], (1, 1, 1)), ([1.0, 3.0], (1, 3, 1)), ([0.0] * 30 + [1.0] * 10, (0, 1, 4))]
)
def test_ends_are_means_of_a_tenth(values, expected):
    assert ends(list(enumerate(values))) == expected


def test_curves_keep_both_ends_and_are_deterministic():
    points = [(step, math.sin(step / 500)) for step in range(5000)]
    plots = [curves("fig-x", "t", [Panel("u", [Series("s", points, True)])], "step") for _ in range(2)]
    assert plots[0] == plots[1]
    (panel,) = plots[0]["panels"]
    (line,) = panel["lines"]
    ends = [tuple(map(float, line["points"].split()[i].split(","))) for i in (0, -1)]
    assert 300 <= len(line["marks"]) <= 400
    assert [line["marks"][i][:2] for i in (0, -1)] == ends
    assert ends[0][0] - panel["left"] == pytest.approx(panel["right"] - ends[1][0], abs=0.2)


@pytest.mark.parametrize(
    ("low", "high", "whole", "expected"),
    [
        (0.0, 1.0, False, [0.0, 0.2, 0.4, 0.6000000000000001, 0.8, 1.0]),
        (1.0, 120.0, True, [25, 50, 75, 100]),
        (0.9, 3.1, True, [1, 2, 3]),
        (-1.2, 13.0, True, [0, 5, 10]),
        (2.5e-9, 6.0e-9, False, [3e-9, 4e-9, 5e-9, 6e-9]),
        (-1e300, 1e300, False, [-1e300, -5e299, 0.0, 5e299, 1e300]),
    ],
)
def test_ticks_are_round_numbers_within_the_axis(low, high, whole, expected):
    assert Scale(low, high, 0, 100).ticks(5, whole=whole) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("values", [[0.25] * 5, [1e300, -1e300], [1.7e308, -1.7e308], [5e-324, 0.0], [7.0]])
def test_every_finite_value_finds_its_place(values):
    plot = curves("fig-x", "t", [Panel("u", [Series("s", list(enumerate(values)))])], "step")
    (panel,) = plot["panels"]
    for x, y, *_ in panel["lines"][0]["marks"]:
        assert panel["left"] <= x <= panel["right"] and panel["top"] <= y <= panel["bottom"]
    assert panel["y_ticks"] and "nan" not in repr(plot) and "inf" not in repr(plot)


def test_the_path_of_reward_against_kl_names_its_ends_and_dashes_what_is_beside_it():
    points, beside = [(0.1 * i, math.sqrt(i)) for i in range(30)], [(0.0, 0.0), (0.5, 3.0)]
    (panel,) = path_plot("fig-x", "t", points, "KL", "score", beside)["panels"]
    path, other = panel["lines"]
    opacities = [opacity for *_, opacity in path["marks"]]
    assert opacities == sorted(opacities) and opacities[0] < 0.2 and opacities[-2] > 0.9 and opacities[-1] == 1
    assert [name for _, _, name, _ in panel["texts"]] == ["start", "end"]
    assert other["style"] == "dashed" and len(other["marks"]) == 2 and other["colour"] != path["colour"]


def test_bars_are_as_high_as_their_counts():
    (panel,) = bars("fig-x", "t", [("< −1", True, 0), ("−1 to 0", True, 10), ("≥ 0", False, 20)], "margin", "pairs")[
        "panels"
    ]
    heights = [box[3] for line in panel["lines"] for box in line["bars"]]
    assert len(heights) == 2 and heights[1] == pytest.approx(2 * heights[0], abs=0.2), "nothing is drawn for none"
    assert [label for _, label in panel["x_ticks"]] == ["< −1", "−1 to 0", "≥ 0"]
    assert panel["lines"][0]["colour"] != panel["lines"][1]["colour"]


def test_what_a_template_shows_is_escaped_and_cleaned_wherever_it_stands():
    hostile = "\"'<b>\x1b[31m\u202e hf_" + "aB3" * 10
    line = {
        "label": hostile,
        "colour": hostile,
        "points": hostile,
        "style": hostile,
        "raw": "",
        "marks": [],
        "bars": [],
    }
    (panel,) = bars("fig-x", "t", [("0 to 1", False, 1)], "x", "u")["panels"]
    panel |= {"lines": [line], "unit": hostile, "x_label": hostile, "texts": [(0, 0, hostile, hostile)], "legend": True}
    svg = render("standalone.svg", figure={"id": hostile, "title": hostile, "width": 1, "height": 1, "panels": [panel]})
    assert Page(svg).tags.count("b") == 0 and "<b>" not in svg and "aB3" not in svg
    assert not re.search("[\x1b\u202e]", svg)
    assert {name for _, name, _ in Page(svg).attributes} <= SVG_ATTRIBUTES


def test_samples_come_from_all_of_the_held_out_prompts(tmp_path):
    rows = [{"prompt": f"ask {i}", "response_sft": "a", "response_ppo": "b"} for i in range(240)]
    (tmp_path / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_stage(tmp_path / "sft", "sft", 2)
    html = build_report(tmp_path).read_text(encoding="utf-8")
    assert re.findall(r"ask (\d+)<", html) == [str(i) for i in range(0, 240, 20)]
    assert "12 of 240 held-out prompts" in html
