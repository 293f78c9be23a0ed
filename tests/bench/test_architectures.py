"""The survey of architectures: what was recorded meets its bars, and a handful of them again."""

from __future__ import annotations

import json
import mmap
from collections import Counter
from pathlib import Path

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from bench import architectures

ROOT = Path(__file__).parents[2]
RECORDED = json.loads((ROOT / "bench/results/architectures_cpu.json").read_text())


def test_the_recorded_survey_meets_its_bars():
    rows = RECORDED["rows"]
    verdicts = Counter(row["verdict"] for row in rows.values())
    assert verdicts["wrong"] == verdicts["crashed"] == 0 and verdicts["exact"] >= architectures.LEAST_EXACT
    assert {name: verdicts[name] for name in verdicts} == {n: c for n, c in RECORDED["counts"].items() if n != "cached"}
    assert all(row["nats"] <= architectures.EXACT for row in rows.values() if row["verdict"] == "exact")
    assert all(row["reason"] for row in rows.values() if row["verdict"] != "exact" or not row["cached"])
    assert len(rows) > 150 and RECORDED["versions"]["transformers"]


@pytest.mark.parametrize(
    ("name", "verdict", "cached", "reason"),
    [
        ("llama", "exact", True, ""),
        ("gemma2", "exact", True, ""),
        ("falcon", "exact", True, ""),
        ("gpt_neo", "exact", False, "differs from its plain forward by"),
        ("bloom", "exact", False, "its decoding fails"),
        ("bert", "refused", None, "policy: BertLMHeadModel computes its logits"),
        ("xlnet", "refused", None, "policy: XLNetLMHeadModel is not causal: changing a later token"),
    ],
)
def test_a_handful(name, verdict, cached, reason):
    if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        pytest.skip("not in this version of transformers")
    row = architectures.apart(name)
    assert row["verdict"] == verdict and reason in row.get("reason", "")
    assert cached is None or row["cached"] is cached


def test_the_limit_of_memory_does_not_count_what_the_process_had_before():
    """A process of many tests maps more than a model may take: its copies still have all that a model may."""
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    with mmap.mmap(-1, architectures.BYTES, flags=private, prot=mmap.PROT_READ):  # not to be written: no page of it
        assert architectures.apart("falcon")["verdict"] == "exact"
