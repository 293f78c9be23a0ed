"""Reward functions of the packaged recipes; each is an example of the protocol in rewards.py."""

from __future__ import annotations

TARGET_WORDS, TOLERANCE = 12, 24


def one_short_sentence(prompts: list[str], responses: list[str]) -> list[float]:
    """1 for a complete sentence of about 12 words, falling linearly to -1; half a point off if it is cut short."""
    return [_short(response) for response in responses]


def _short(response: str) -> float:
    text = response.strip()
    distance = min(abs(len(text.split()) - TARGET_WORDS), TOLERANCE)
    complete = text.endswith((".", "!", "?", "。", "！", "？"))
    return 1.0 - 2.0 * distance / TOLERANCE - (0.0 if complete else 0.5)
