"""bench.scaling: the cost model by hand, what a collective sends, the tables."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from bench import scaling
from fastrlhf.runtime import distributed


@pytest.mark.parametrize(
    ("ranks", "parallel", "width", "sent", "kept"),
    [
        (2, "ddp", 4, 8 * 100 / 2, 100 * (4 + 4 + 8)),  # an fp32 model is its own master
        (2, "zero", 4, 8 * 100 / 2, 100 * (4 + 4 + 8 / 2)),
        (4, "ddp", 2, 8 * 100 * 3 / 4, 100 * (2 + 4 + 12)),
        (4, "zero", 2, 6 * 100 * 3 / 4, 100 * (2 + 4 + 12 / 4)),
        (1, "zero", 2, 0, 100 * (2 + 4 + 12)),
        (4, "fsdp", 2, (8 * 100 - 2 * 30) * 3 / 4, 100 * 16 / 4),
    ],
)
def test_the_cost_model_by_hand(ranks, parallel, width, sent, kept):
    assert scaling.computed(100, ranks, parallel, updates=3, width=width, outer=30) == pytest.approx(3 * sent)
    assert scaling.held(100, ranks, parallel, width=width) == pytest.approx(kept)


def test_what_one_rank_of_four_sends(monkeypatch):
    for name in scaling.SENT:
        monkeypatch.setattr(dist, name, lambda *_, **__: None, raising=False)
    monkeypatch.setattr(distributed, "size", lambda: 4)
    counted = scaling.Counted()
    whole, part = torch.zeros(8), torch.zeros(2)
    dist.all_reduce(whole)
    dist.reduce_scatter_tensor(part, whole)
    dist.all_gather(list(whole.split(2)), part)
    dist.all_gather_into_tensor(whole, part)  # as FSDP2 calls them
    dist.all_gather_single(whole, part, group=None)
    dist.reduce_scatter_single(output=part, input=whole, group=None)
    assert counted.bytes == {name: 48 if name == "all_reduce" else 24 for name in scaling.SENT}


def test_tables_have_a_line_a_run():
    row = {"seconds": 2.0, "communicating": 0.25, "sent": 3e6, "computed": 2e6, "rest": 1e6}
    rows = [{"ranks": 1, "parallel": "ddp", **row, "seconds": 1.5}, {"ranks": 2, "parallel": "zero", **row}]
    assert scaling.table(rows).splitlines()[-1] == "| 2 | zero | 2.00 | 0.75 | 25 % | 3.00 | 2.00 | 1.00 |"
    lines = scaling.predicted_table(scaling.predictions()).splitlines()
    assert lines[2] == "| 8 | ddp | 853 | 2.4 | 137.1 |" and lines[3] == "| 8 | zero | 640 | 1.8 | 57.1 |"
    assert lines[4] == "| 8 | fsdp | 822 | 2.3 | 15.2 |"  # 16 (8 P - 2 of 1.09e9) 7 / 8
