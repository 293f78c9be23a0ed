"""What the embedded demo talks about: six household things, two questions about each, in English and Chinese.

Only facts and names live here, because the generator (`generate.py`) and the rule (`judge.py`) both need them. Wording
that carries the manner of a reply is in `generate.py`; the rule has marker words of its own.
"""

from __future__ import annotations

from typing import NamedTuple

LANGUAGES = ("en", "zh")
FACETS = ("care", "choose")

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


_EN = (
    Topic(
        "bicycle",
        ("oil the chain", "pump up the tyres", "wipe mud off the frame"),
        ("check the frame size", "try the brakes", "compare the gears"),
    ),
    Topic(
        "guitar",
        ("loosen the strings a little", "store it in a hard case", "polish the wood gently"),
        ("listen to the tone", "feel the neck", "ask for nylon strings"),
    ),
    Topic(
        "umbrella",
        ("dry it open", "grease the hinge", "roll it loosely"),
        ("count the ribs", "test the button", "prefer a wide canopy"),
    ),
    Topic(
        "kettle",
        ("boil vinegar against scale", "empty it at night", "rinse the filter"),
        ("prefer a steel body", "inspect the spout", "ask about automatic shutdown"),
    ),
    Topic(
        "clock",
        ("replace the old battery", "clean the dial", "turn the hands forward"),
        ("prefer a quiet tick", "look for big numbers", "try the alarm"),
    ),
    Topic(
        "goldfish",
        ("change a third of the tank", "feed tiny pinches", "run an air pump"),
        ("look for bright eyes", "see how it swims", "check the fins"),
    ),
)

_ZH = (
    Topic("自行车", ("给链条上油", "把轮胎打足气", "擦净车架上的泥"), ("看车架尺寸", "试试刹车", "比较变速档位")),
    Topic("吉他", ("把琴弦松一点", "放进硬琴盒", "轻擦木面"), ("听听音色", "摸摸琴颈", "选尼龙弦")),
    Topic("雨伞", ("撑开晾干", "给关节上油", "松松地卷好"), ("数一数骨架", "按按开关", "选宽大的伞面")),
    Topic("水壶", ("煮醋除水垢", "晚上把水倒空", "冲洗滤网"), ("选不锈钢的", "看看壶嘴", "问有没有自动断电")),
    Topic("闹钟", ("换掉旧电池", "擦干净表盘", "顺着拨指针"), ("选走时安静的", "看数字大不大", "试试铃声")),
    Topic("金鱼", ("换三分之一的缸水", "少量喂食", "开增氧泵"), ("看眼睛亮不亮", "看游得稳不稳", "检查鱼鳍")),
)

TOPICS: dict[str, tuple[Topic, ...]] = {"en": _EN, "zh": _ZH}
