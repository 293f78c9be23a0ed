"""The report in Chinese: one table of strings that is complete, no English of ours, a language by the data."""

from __future__ import annotations

import ast
import json
import re
import string
from pathlib import Path

import pytest

from fastrlhf import cli
from fastrlhf.config.language import Words, language_of
from fastrlhf.label import summary
from fastrlhf.report import build_report, charts, folder, tables, verdict
from fastrlhf.report.words import CHINESE
from tests.report.test_report import read
from tests.run_folders import HOSTILE, PPO_FIGURES, write_killed, write_quickstart, write_stage

ROOT = Path(__file__).parents[2] / "fastrlhf"
PHASES = {
    "rollout",
    "scoring",
    "advantages",
    "update",
    "evaluate",
    "save",
    "other",
}  # shown by the names of the metrics
CJK = re.compile(r"[\u3400-\u9fff]")


def asked_in(path: Path) -> set[str]:
    """The English texts that a module or template gives to the table: literals, or constants of the module."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return set(re.findall(r'\bt\("([^"]+)"', text))
    tree, asked = ast.parse(text), set()
    constants = {
        node.targets[0].id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "words":
            value = node.args[0]
            value = constants.get(value.id, value) if isinstance(value, ast.Name) else value
            asked |= {value.value} if isinstance(value, ast.Constant) else set()
    return asked


def in_tables() -> set[str]:
    """The English texts of the tables that the report's modules translate where they show them."""
    of_charts = [chart for stage in charts.CHARTS.values() for chart in stage]
    units = {unit for chart in of_charts for unit, *_ in chart.panels}
    tiles = {text for stage in verdict.TILES.values() for _, *texts in stage for text in texts} - {""}
    quickstart = {tile for tile in re.findall(r'^        \("([A-Z][^"]+)",', _source(verdict), re.MULTILINE)}
    notes = set(re.findall(r'(?:_percent|figure_of), "(\{bar\}[^"]*)"\)', _source(verdict)))
    notes |= {text for name, _, note in verdict.BEFORE_AND_AFTER for text in (name, note)}
    titles = {chart.title for chart in of_charts} | set(folder.TITLES.values())
    return titles | units | set(charts.HINTS.values()) | tiles | quickstart | notes | set(tables.MACHINE.values())


def _source(module) -> str:
    return Path(module.__file__).read_text(encoding="utf-8")


def test_the_report_finds_every_text_in_its_table_and_the_table_holds_no_other():
    files = [*(ROOT / "report").glob("*.py"), *(ROOT / "report/templates").iterdir()]
    asked = set().union(*map(asked_in, files)) | in_tables() | PHASES
    assert asked - CHINESE.keys() == set() and CHINESE.keys() - asked == set()
    assert asked_in(ROOT / "label/summary.py") | {"score", "rank", "edit"} == summary.CHINESE.keys()


@pytest.mark.parametrize("table", [CHINESE, summary.CHINESE], ids=["report", "label --summary"])
def test_both_languages_name_the_same_values(table):
    def names(text: str) -> list[str]:
        return sorted(name for _, name, *_ in string.Formatter().parse(text) if name is not None)

    assert {english: chinese for english, chinese in table.items() if names(english) != names(chinese)} == {}
    untranslated = {english for english, chinese in table.items() if not CJK.search(chinese)}
    assert untranslated <= {"PPO", ".", "nats per token", "Distinct-2, PPO / SFT", ", "} | {
        "  {opposite} of {pairs}: {prompt}"
    }


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Folders of every kind, each with its page in Chinese."""
    root = tmp_path_factory.mktemp("zh")
    folders = {stage: write_stage(root / stage, stage, 30) for stage in ("sft", "reward", "ppo")}
    folders |= {"quickstart": write_quickstart(root / "quickstart"), "killed": write_killed(root / "killed")}
    return {name: read(build_report(path, "zh")) for name, path in folders.items()}


@pytest.mark.parametrize("name", ["sft", "reward", "ppo", "quickstart", "killed"])
def test_a_chinese_page_has_no_english_of_ours(pages, name):
    page = pages[name]
    assert ("html", "lang", "zh-CN") in page.attributes
    # Whole texts of the page that the table has in English; the words that a run may write itself are not ours.
    shown = {text.strip() for text in page.texts} | {
        value for _, name, value in page.attributes if name == "data-label"
    }
    ours = {text for text in CHINESE if text != CHINESE[text] and " " in text} | {
        "Samples",
        "Prompt",
        "Before",
        "Value",
    }
    assert shown & ours == set()
    headings = ["样例：训练前后", "耗时与内存", "配置", "事件与警报", "再跑一次"]
    assert [heading for heading in headings if heading not in page.text] == []


def test_the_sentence_and_the_figures_are_chinese(pages):
    assert re.search(
        r"经过 30 步 PPO，留出集奖励从 \S+ 升至 \S+，与参考策略的 KL 为 \S+ nats；回复长度从", pages["ppo"].text
    )
    assert "通过：对留出提示的回复，PPO 之后有 93% 符合隐藏规则，SFT 之后为 52%。" in pages["quickstart"].text
    assert "留出偏好对给出与人一致的排序" in pages["reward"].text and "−1 至 0" in pages["reward"].text
    assert "训练损失从" in pages["sft"].text and "留出集困惑度为" in pages["sft"].text
    assert "尚未完成（第" in pages["killed"].text and "起点" in pages["ppo"].text and "得分" in pages["ppo"].text
    assert set(PPO_FIGURES) <= set(pages["ppo"].ids())


def test_texts_of_strangers_are_as_inert_as_on_the_english_page(pages):
    for tag in ("script", "img", "iframe", "svg onload"):
        assert tag not in pages["killed"].tags
    assert any(text[:20] in pages["killed"].text for text in HOSTILE)


@pytest.mark.parametrize(
    ("prompts", "language"),
    [
        (["雨伞应该怎么保养？", "How do I dry an umbrella?", "什么是茶？"], "zh-CN"),
        (["雨伞应该怎么保养？", "How do I dry an umbrella?"], "en"),
        (["How do I dry an umbrella?"], "en"),
        (["12 + 30 ="], "en"),
        ([], "en"),
    ],
)
def test_the_language_is_that_of_the_recorded_prompts_unless_it_is_named(tmp_path, prompts, language, capsys):
    run = write_stage(tmp_path / "run", "sft", 2)
    rows = [{"step": 0, "prompt": prompt, "response": "ok"} for prompt in prompts]
    (run / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def shown(*options: str) -> list[str]:
        assert cli.main(["report", str(run), *options]) == 0
        return [value for tag, name, value in read(run / "report.html").attributes if (tag, name) == ("html", "lang")]

    assert shown() == [language]
    assert shown("--lang", "zh") == ["zh-CN"] and shown("--lang", "en") == ["en"]
    assert "--lang en" in read(run / "report.html").text  # the command that writes the same page anew
    assert cli.main(["report", str(run), "--lang", "fr"]) == 2
    assert "invalid choice: 'fr'" in capsys.readouterr().err


def test_a_stage_without_recorded_prompts_speaks_the_language_of_its_data(tmp_path):
    run = write_stage(tmp_path / "run", "sft", 2)
    row = {"messages": [{"role": "user", "content": "什么是茶？"}, {"role": "assistant", "content": "热水泡的叶子。"}]}
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("data: data/sft.jsonl", f"data: {data}"))
    assert ("html", "lang", "zh-CN") in read(build_report(run)).attributes
    data.unlink()
    assert ("html", "lang", "en") in read(build_report(run)).attributes


def test_a_summary_speaks_the_language_of_its_prompts_unless_it_is_named(tmp_path, capsys):
    rows = [
        {"prompt": "什么是茶？", "responses": ["a", "b"], "scores": [4, 1], "judgement_id": name, "annotator": name}
        for name in ("安", "博")
    ]
    path = tmp_path / "f.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for options, said in (([], "2 次标注（2 打分），共 1 个提示"), (["--lang", "en"], "2 judgements (2 score) of 1")):
        assert cli.main(["label", "--summary", str(path), *options]) == 0
        assert said in capsys.readouterr().out


def test_words_and_languages():
    assert Words("zh", {"a {n}": "甲 {n}"})("a {n}", n="{x}") == "甲 {x}" and Words("en", {})("a {n}", n=1) == "a 1"
    assert Words("zh", {"a": "甲"}).known("b") == "b"
    with pytest.raises(KeyError):
        Words("zh", {})("a")
    assert (
        language_of([]) == language_of(["これはペンです。漢字もある。"]) == "en" and language_of(["漢字", "12"]) == "zh"
    )
