"""What the embedded demo talks about: seven household things, two questions about each, in English and Chinese.

Only facts and names live here, because the rule (`judge.py`) and the generator of the shipped data
(`bench/quickstart_data`) both need them. Wording that carries the manner of a reply is the generator's; the rule has
marker words of its own.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from fastrlhf.checkpoint.records import read_records
from fastrlhf.config.errors import UserError

DATA_DIR = Path(__file__).parent / "data"
LANGUAGES = ("en", "zh")
FACETS = ("care", "choose")
# Of held-out prompts. familiar: question and context both stand in training prompts, not together; new: one does not.
WORDINGS = ("familiar", "new")
# The last thing of each language stands in no training prompt and no reply to one: only plain text tells of it.
HELDOUT_TOPICS = 1
# Words that tell which of the two questions is asked. Every question template holds one of them.
FACET_WORDS = {
    "en": {
        "care": ("look after", "take care of", "maintain", "caring for"),
        "choose": ("choose", "pick", "buy", "shopping for"),
    },
    "zh": {"care": ("保养", "照料", "打理", "爱护"), "choose": ("挑选", "选购", "购买", "挑一")},
}


class Topic(NamedTuple):
    """One thing people ask about: its name and three short pieces of advice for each question."""

    name: str
    care: tuple[str, str, str]
    choose: tuple[str, str, str]

    def facts(self, facet: str) -> tuple[str, str, str]:
        """The advice that answers the question `facet` ("care" or "choose")."""
        return self.care if facet == "care" else self.choose


# Advice is "do this to that": what is done tells the question, what it is done to tells the thing. An entry is the name
# of a topic: how to care for it; how to choose it.
_EN = """
bicycle: oil the chain, clean the mudguards, dry the saddle;
    check the frame size, test the brakes, compare the gears
guitar: oil the fretboard, clean the strings, dry the wooden body;
    check the neck, test the tone, compare the tuning pegs
umbrella: oil the hinge, clean the handle, dry the canopy;
    check the ribs, test the button, compare the width
kettle: clean the filter, remove the limescale, dry the lid;
    check the spout, test the switch, compare the steel
clock: oil the spring, clean the dial, replace the battery;
    check the numbers, test the alarm, compare the ticking
goldfish: clean the tank, replace a third of the water, feed tiny flakes;
    check the eyes, test the appetite, compare the fins
kite: oil the reel, clean the tail, dry the sail;
    check the spars, test the line, compare the wingspan
"""
_ZH = """
自行车: 给链条上油, 擦净挡泥板, 晾干车座; 检查车架尺寸, 试试刹车, 比较变速档位
吉他: 给指板上油, 擦净琴弦, 晾干琴身; 检查琴颈, 试试音色, 比较弦钮
雨伞: 给关节上油, 擦净手柄, 晾干布面; 检查骨架, 试试按钮, 比较宽度
水壶: 擦净滤网, 除去水垢, 晾干盖子; 检查壶嘴, 试试开关, 比较钢材
闹钟: 给发条上油, 擦净表盘, 换掉电池; 检查数字, 试试铃声, 比较走时
金鱼: 擦净鱼缸, 换掉三分之一的水, 少量喂食; 检查眼睛, 试试胃口, 比较鱼鳍
风筝: 给线轮上油, 擦净尾巴, 晾干风帆; 检查竹骨, 试试风线, 比较翼展
"""


def _topics(text: str) -> tuple[Topic, ...]:
    parts = re.findall(r"(\S+): (.+);\s+(.+)", text)
    return tuple(Topic(name, tuple(care.split(", ")), tuple(choose.split(", "))) for name, care, choose in parts)


TOPICS: dict[str, tuple[Topic, ...]] = {"en": _topics(_EN), "zh": _topics(_ZH)}


def shipped(name: str, folder: Path = DATA_DIR) -> list[dict[str, Any]]:
    """The rows of a shipped file ("sft", "heldout_pairs", ...). UserError when the installed copy is damaged."""
    path, problems = folder / f"{name}.jsonl", []
    rows = list(read_records(path, problems))
    if problems or not rows:
        raise UserError(f"{problems[0] if problems else f'{path}: holds no rows'}; install fastrlhf again")
    return rows


def texts_of(row: dict[str, Any]) -> list[str]:
    """What is said in a row of sft.jsonl: the plain text, or the content of each message."""
    return [row["text"]] if "text" in row else [message["content"] for message in row["messages"]]
