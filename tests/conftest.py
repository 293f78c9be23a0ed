"""No test reaches the network; a skipped test of the real model, data or browser fails where .ci/run asks for it."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest

gc.disable()  # until all is imported and collected: nothing of it is garbage, and to look for some takes seconds
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("USE_HUB_KERNELS", "NO")
if os.environ.get("TRITON_INTERPRET") == "1":
    from tests.interpreter import patch_once

    patch_once()
REQUIRE_REAL = os.environ.get("FASTRLHF_REQUIRE_REAL") == "1"


TESTS = Path(__file__).parent
# Files of a quarter of a minute and more, though none of their tests is slow: `.ci/run` shows the slowest.
LONG = [
    TESTS / name
    for name in (
        "runtime/test_memory.py",
        "plan/test_plan.py",
        "test_trainer.py",
        "quickstart/test_quickstart.py",
        "models/test_quantization.py",
        "rl/test_roles.py",
        "rl/test_ptx.py",
        "rl/test_options.py",
        "rollout/test_rollout_models.py",
        "models/test_packing.py",
        "kernels/test_operators.py",
        "plan/test_speed.py",
    )
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, then the long ones: of several processes (`pytest -n`) none begins one last."""
    order = dict(zip(LONG, range(1, len(LONG) + 1))) | {i.path: 0 for i in items if i.get_closest_marker("slow")}
    items.sort(key=lambda item: order.get(item.path, len(LONG) + 1))


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # libraries complain of what is left at the end


@pytest.fixture(autouse=True)
def no_plan_in_dry_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dry run plans its memory, which takes seconds; tests/plan tries that."""
    monkeypatch.setattr("fastrlhf.cli._memory_of", lambda *_: "memory: not computed in tests")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = yield
    if REQUIRE_REAL and report.skipped and item.get_closest_marker("real"):
        report.outcome = "failed"
        report.longrepr = f"a real test was skipped, FASTRLHF_REQUIRE_REAL=1 forbids it: {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector):
    """A module that skips itself as a whole has no markers yet: under tests/real it may not."""
    report = yield
    if REQUIRE_REAL and report.skipped and "real" in collector.nodeid.split("/"):
        report.outcome = "failed"
        report.longrepr = f"a module of real tests was skipped: {report.longrepr}"
    return report
