"""The command for a GPU that is there for minutes: every part has its time, and none takes another's."""

from __future__ import annotations

import json
import os
import re

import pytest

from bench import gpu


def test_parts_are_cut_and_fail_alone(tmp_path, capsys):
    parts = {
        "slow": gpu.Part(["-c", "import time; print('first row', flush=True); time.sleep(60)"], 0.2),
        "wrong": gpu.Part(["-c", "import sys; sys.exit('no such kernel')"], 1.0),
        "good": gpu.Part(["-c", "import bench, fastrlhf_kernels.backend; open('OUT/row', 'w').write('1')"], 10.0),
    }
    ended = gpu.run(parts, tmp_path / "out", 5.0)
    assert ended == {"slow": "cut", "wrong": "exit code 1", "good": "done"}
    assert (tmp_path / "out/slow.log").read_text() == "first row\n" and (tmp_path / "out/row").read_text() == "1"
    assert "no such kernel" in (tmp_path / "out/wrong.log").read_text()
    assert json.loads((tmp_path / "out/parts.json").read_text()) == ended
    assert re.search(r"slow +cut +\d+ s of 1\n", capsys.readouterr().out)


@pytest.mark.skipif(os.path.exists("/dev/nvidia0"), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path / "out")]) == 3 and "no GPU" in capsys.readouterr().err


def test_the_shares_are_a_whole_and_the_commands_exist():
    assert sum(part.share for part in gpu.PARTS.values()) == pytest.approx(1.0)
    for part in gpu.PARTS.values():
        module = part.command[1]
        assert module in ("pytest", "fastrlhf") or (gpu.ROOT / (module.replace(".", "/") + ".py")).exists()
    assert all((gpu.ROOT / path).exists() for path in gpu.KERNEL_TESTS)
