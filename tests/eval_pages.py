"""Evaluations made in a moment, without a model, of texts that no page may take for markup."""

from __future__ import annotations

import random

from fastrlhf.data.feedback import Prompt
from fastrlhf.eval.figures import figures_of, judge
from fastrlhf.eval.phrases import REFUSALS, keyword_pattern
from fastrlhf.eval.run import Evaluation
from fastrlhf.eval.statistics import compare
from fastrlhf.inference import Reply
from tests.run_folders import HOSTILE, PROMPTS

MODELS = ["runs/" + "a-folder-with-a-long-name-" * 4 + "<b>/final", "runs/sft/final"]
WORDS = ["随便", "whatever", "x" * 200, "<script>"]


def evaluation(samples: int = 2) -> Evaluation:
    """Two models, the replies of one hostile, a reward and keywords."""
    draw = random.Random(0)
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    prompts = [Prompt(text) for text in HOSTILE[:-1]]
    prompts += [Prompt([*turns, {"role": "user", "content": question}]) for question, *_ in PROMPTS]
    words = {word: keyword_pattern(word) for word in WORDS}
    replies, scores = {}, {}
    for name, said in zip(MODELS, (HOSTILE, [text for _, *answers in PROMPTS for text in answers])):
        texts = [[draw.choice(said) for _ in range(samples)] for _ in prompts]
        groups = [[Reply(text, [1] * draw.randint(1, 60), draw.random() < 0.9) for text in group] for group in texts]
        scores[name] = [draw.choice([None, draw.gauss(0, 3)]) for _ in range(samples * len(prompts))]
        replies[name] = judge(prompts, groups, scores[name], REFUSALS, words)
    report = {
        "fastrlhf": "0",
        "models": MODELS,
        "prompts": "prompts.jsonl",
        "prompt_count": len(prompts),
        "sampling": {"n": samples, "temperature": 1.0, "seed": 0},
        "reward": "rules.py:f",
        "figures": {name: figures_of(replies[name], samples, WORDS, scored=True) for name in MODELS},
        "win_rate": compare(*scores.values(), samples, 0),
    }
    return Evaluation(report, prompts, replies)
