"""The two READMEs: their links lead somewhere, and the examples of the kernels run as they stand."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "kernels/README.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize(
    "name", ["README.md", "kernels/README.md", "docs/api.md", "docs/overoptimisation.md", "CHANGELOG.md"]
)
def test_links_lead_to_files(name):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / name).read_text(encoding="utf-8"))
    assert [link for link in links if not ((ROOT / name).parent / link).exists()] == []


def test_there_are_three_examples():
    assert len(EXAMPLES) == 3


@pytest.mark.parametrize("code", EXAMPLES, ids=["token_log_probs", "sft", "ppo"])
def test_example_runs(code, tmp_path):
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
