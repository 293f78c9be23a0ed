"""The tracker: equal runs give equal bytes, resume leaves no row twice, hostile text stays text."""

from __future__ import annotations

import itertools
import json
import math
import os
import pty
import re
import subprocess
import sys
import unicodedata

import pytest
import torch

from fastrlhf.config.errors import UserError
from fastrlhf.runtime import console
from fastrlhf.runtime.console import Console, clean, duration, number, one_line, redact
from fastrlhf.runtime.tracking import Tracker

HOSTILE = {
    "ansi colour": "\x1b[31mred\x1b[0m",
    "ansi clear": "\x1b[2J\x1b[Hgone",
    "osc title": "\x1b]0;owned\x07after",
    "osc link": "\x1b]8;;https://evil.example\x1b\\click\x1b]8;;\x1b\\",
    "open osc": "\x1b]0;never ends",
    "dcs": "\x1bP1;2|payload\x1b\\after",
    "c1 csi": "\x9b31mred\x9d0;title\x9c",
    "bidi": "user\u202etxt.exe\u202c \u2066isolate\u2069 \u200fmark",
    "rich markup": "[bold red]loud[/bold red] [/nothing] [link=https://evil.example]x[/link] :smile:",
    "html": "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "line breaks": "a\nb\r\nc\u2028d\x85e\x0bf",
    "nul and bell": "\x00\x07\x08\x7f",
    "surrogate": "broken \ud83d here",
    "split escape": "\x1b\x1b[31m[31mnested",
    "one megabyte": "x" * 1_000_000,
    "megabyte of escapes": "\x1b]" * 500_000,
}


def rows(path):
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def run(folder, steps, *, resume=None, stage="ppo"):
    with Tracker(folder, stage, steps[-1], resume_bytes=resume) as tracker:
        for step in steps:
            with tracker.phase("rollout"):
                pass
            tracker.log(step, {"reward/mean": step / 7, "kl/ref": torch.tensor(0.125)}, {"perf/tokens_per_s": 1e3})
            tracker.samples(step, [{"prompt": "Hi", "response": f"你好 {step}", "score": step / 3}])
        return tracker.bytes()


def test_equal_runs_give_equal_bytes_and_exact_floats(tmp_path):
    lengths = run(tmp_path / "a", range(1, 6))
    run(tmp_path / "b", range(1, 6))
    for name in ("metrics.jsonl", "samples.jsonl", "events.jsonl"):
        content = (tmp_path / "a" / name).read_bytes()
        assert content == (tmp_path / "b" / name).read_bytes()
        assert lengths[name] == len(content)
    assert [row["reward/mean"] for row in rows(tmp_path / "a/metrics.jsonl")] == [s / 7 for s in range(1, 6)]


def test_metrics_row_is_sorted_whatever_the_callers_order(tmp_path):
    metrics = {"reward/mean": 1.5, "kl/ref": 0.25, "length/mean": 3}
    lines = set()
    for i, order in enumerate(itertools.permutations(metrics)):
        with Tracker(tmp_path / str(i), "ppo", 1) as tracker:
            tracker.log(1, {name: metrics[name] for name in order})
        lines.add((tmp_path / str(i) / "metrics.jsonl").read_text())
    assert lines == {'{"step": 1, "kl/ref": 0.25, "length/mean": 3, "reward/mean": 1.5}\n'}


def test_clock_values_stay_out_of_metrics(tmp_path):
    run(tmp_path, range(1, 3))
    assert set(rows(tmp_path / "metrics.jsonl")[0]) == {"step", "reward/mean", "kl/ref"}
    timing = rows(tmp_path / "timings.jsonl")[0]
    assert {"time/rollout", "time/step", "time/elapsed", "perf/tokens_per_s"} <= set(timing)


def test_non_finite_values_are_null_and_counted(tmp_path):
    with Tracker(tmp_path, "ppo", 1) as tracker:
        tracker.log(1, {"a": math.nan, "b": torch.tensor(math.inf), "c": 2.0, "d": None})
    assert rows(tmp_path / "metrics.jsonl") == [{"step": 1, "a": None, "b": None, "c": 2.0, "nonfinite": 2}]


@pytest.mark.parametrize("saved_at", [0, 3, 5])
def test_resume_cuts_back_to_the_checkpoint(tmp_path, saved_at):
    whole, part = tmp_path / "whole", tmp_path / "part"
    run(whole, range(1, 7))
    at_checkpoint = run(part, range(1, saved_at + 1)) if saved_at else {}
    run(part, range(saved_at + 1, 6 + 1), resume=at_checkpoint)
    with open(part / "metrics.jsonl", "ab") as torn:
        torn.write(b'{"step": 7, "rewa')  # killed while writing
    run(part, range(saved_at + 1, 7), resume=at_checkpoint)
    for name in ("metrics.jsonl", "samples.jsonl", "events.jsonl"):
        assert (part / name).read_bytes() == (whole / name).read_bytes()


def test_resume_keeps_the_first_sample_as_before(tmp_path, capsys):
    lengths = run(tmp_path, range(1, 3))
    capsys.readouterr()
    run(tmp_path, range(3, 4), resume=lengths)
    out = capsys.readouterr().out
    assert "response before" in out and "你好 1" in out and "你好 3" in out and "你好 2" not in out


def test_resume_keeps_time_already_spent_but_no_torn_line(tmp_path):
    lengths = run(tmp_path, range(1, 3))
    with open(tmp_path / "timings.jsonl", "ab") as file:
        file.write(b'{"step": 3, "time/ro')
    run(tmp_path, range(2, 4), resume=lengths)
    assert [row["step"] for row in rows(tmp_path / "timings.jsonl")] == [1, 2, 2, 3]


def test_resume_names_a_damaged_line_and_goes_on_from_the_last_step(tmp_path, capsys):
    run(tmp_path, range(1, 4))
    lengths = {}
    for name in ("metrics.jsonl", "samples.jsonl"):
        first, second, third = (tmp_path / name).read_bytes().splitlines()
        (tmp_path / name).write_bytes(b"\n".join([first, b"\x00" * len(second), third, b""]))
        lengths[name] = (tmp_path / name).stat().st_size
    capsys.readouterr()
    run(tmp_path, range(4, 5), resume=lengths)
    out, log = capsys.readouterr().out, (tmp_path / "log.txt").read_text()
    for name in lengths:
        said = f"skipped a damaged line: {tmp_path / name}:2: is not JSON"
        assert said in out and said in log
    assert "response before" in out and "你好 1" in out
    assert (tmp_path / "metrics.jsonl").read_bytes().splitlines()[-1].startswith(b'{"step": 4,')


def test_a_seeded_run_does_not_depend_on_when_rich_is_imported(tmp_path):
    """rich draws from the global `random` as it is imported, which the first table does."""
    code = f"""
import random, sys
from fastrlhf.runtime.tracking import Tracker
random.seed(1)
before = random.getstate()
with Tracker({str(tmp_path)!r}, "ppo", 1) as t:
    t.samples(1, [{{"prompt": "p", "response": "r", "score": 1.0}}])
assert "rich.style" in sys.modules
assert random.getstate() == before
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_these_tests_pass_in_reversed_order():
    code = f"""
import pytest, sys
class Reversed:
    def pytest_collection_modifyitems(self, items):
        items.reverse()
options = ["-q", "-p", "no:cacheprovider", "-k", "not reversed_order", {__file__!r}]
sys.exit(pytest.main(options, plugins=[Reversed()]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 60


def test_a_file_shorter_than_the_checkpoint_is_refused(tmp_path):
    lengths = run(tmp_path, range(1, 3))
    (tmp_path / "metrics.jsonl").write_bytes(b"")
    with pytest.raises(UserError, match=r"metrics\.jsonl: holds 0 bytes but the checkpoint was written at \d+"):
        Tracker(tmp_path, "ppo", 3, resume_bytes=lengths)


def test_a_new_run_starts_every_file_anew(tmp_path):
    run(tmp_path, range(1, 4))
    run(tmp_path, range(1, 2))
    assert len(rows(tmp_path / "metrics.jsonl")) == len(rows(tmp_path / "timings.jsonl")) == 1
    assert "step 3/3" not in (tmp_path / "log.txt").read_text()


def test_token_counts_become_rates(tmp_path):
    with Tracker(tmp_path, "ppo", 1, console=False, clock=itertools.count(0.0).__next__) as tracker:
        with tracker.phase("rollout"):
            pass
        tracker.log(1, {"a": 1.0}, {"perf/rollout_tokens": 600})
    timing = rows(tmp_path / "timings.jsonl")[0]
    assert timing["perf/rollout_tokens_per_s"] == 600 / timing["time/rollout"]
    assert timing["perf/tokens_per_s"] == 600 / timing["time/step"]
    assert timing["time/step"] > timing["time/rollout"]


def test_nested_phases_are_counted_once(tmp_path):
    with Tracker(tmp_path, "ppo", 1, console=False, clock=itertools.count(0.0).__next__) as tracker:
        with tracker.phase("update"), tracker.phase("save"):
            pass
        tracker.log(1, {"a": 1.0})
    timing = rows(tmp_path / "timings.jsonl")[0]
    assert timing["time/save"] > 0
    assert timing["time/update"] + timing["time/save"] <= timing["time/step"]


def test_time_after_the_last_step_is_not_lost(tmp_path):
    with Tracker(tmp_path, "sft", 1) as tracker:
        tracker.log(1, {"loss/train": 1.0})
        with tracker.phase("save"):
            pass
    assert "time/save" in rows(tmp_path / "timings.jsonl")[-1]


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with Tracker(None, "ppo", 1) as tracker:
        tracker.log(1, {"reward/mean": 0.5})
        tracker.event("alarm", "look")
        assert tracker.bytes() == {}
    assert list(tmp_path.iterdir()) == []
    assert "reward 0.5" in capsys.readouterr().out


def test_silent_on_request(tmp_path, capsys):
    with Tracker(tmp_path, "ppo", 1, console=False) as tracker:
        tracker.log(1, {"reward/mean": 0.5})
        tracker.note("quiet")
    assert capsys.readouterr().out == ""
    assert "quiet" in (tmp_path / "log.txt").read_text()


def test_tensorboard_holds_the_curves_and_purges_on_resume(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    at_checkpoint = None
    for place, steps in enumerate((range(1, 3), range(3, 6), range(3, 7))):  # the second was killed after step 5
        end = run(tmp_path, steps, resume=at_checkpoint)
        at_checkpoint = at_checkpoint or end
        # Readers sort the files by name. Those of one second differ in a counter of the process, where 10 is before 9.
        (made,) = (tmp_path / "tensorboard").glob("events.out.*")
        made.rename(made.with_name(f"{place}.tfevents"))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("kl/ref")] == [1, 2, 3, 4, 5, 6]
    assert "time/rollout" in events.Tags()["scalars"]


def test_without_tensorboard_one_line_names_the_extra(tmp_path, capsys, monkeypatch):
    for module in ("tensorboard", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)
    run(tmp_path, range(1, 4))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "TensorBoard" in line]
    assert "pip install 'fastrlhf[tensorboard]'" in line
    assert not (tmp_path / "tensorboard").exists() and len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_import_is_light():
    heavy = "{'torch', 'tensorboard', 'rich', 'transformers'}"
    code = f"import sys, fastrlhf.runtime.tracking; print(*sorted({heavy} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == ""


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def console_lines(step_seconds, steps, **kwargs):
    clock, lines = Clock(), []
    shown = Console("ppo", steps, lines.append, clock=clock, **kwargs)
    for step in range(1, steps + 1):
        clock.now += step_seconds
        shown.step(step, {"reward/mean": step / 10}, step_seconds, 1234.0)
    shown.close()
    return lines


@pytest.mark.parametrize(
    ("step_seconds", "expected"),
    [(0.0, [1, 40]), (0.5, [1, 5, 9, 13, 17, 21, 25, 29, 33, 37, 40]), (3.0, list(range(1, 41)))],
)
def test_plain_lines_are_throttled_but_first_and_last_show(step_seconds, expected):
    lines = console_lines(step_seconds, 40, enabled=False)
    assert [int(re.search(r"step (\d+)/40", line)[1]) for line in lines] == expected


def test_an_evaluation_of_nothing_is_no_line(capsys):
    with Tracker(None, "reward", 2) as tracker:
        tracker.log(0, {})
        tracker.log(2, {"loss/train": 1.0})
    assert [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()] == ["reward step 2/2"]


def test_a_quiet_event_is_for_the_report_alone(tmp_path, capsys):
    with Tracker(tmp_path, "reward", 2) as tracker:
        tracker.event("margins", "9 pairs", quiet=True, histogram={"0..1": 9})
    assert capsys.readouterr().out == ""
    assert json.loads((tmp_path / "events.jsonl").read_text())["histogram"] == {"0..1": 9}


def test_last_line_shows_when_a_run_ends_early():
    lines = []
    shown = Console("ppo", 100, lines.append, enabled=False, clock=Clock())
    for step in (1, 2, 3):
        shown.step(step, {}, 0.1)
    shown.close()
    assert [line.split("  ")[0] for line in lines] == ["ppo step 1/100", "ppo step 3/100"]


def test_eta_appears_after_three_steps_and_counts_what_is_left():
    lines = console_lines(60.0, 5, enabled=False)
    assert ["eta" in line for line in lines] == [False, False, True, True, False]
    assert lines[2].endswith("eta 2m00s")


def test_an_evaluation_before_training_is_no_step_for_the_eta():
    lines, clock = [], Clock()
    shown = Console("ppo", 10, lines.append, enabled=False, clock=clock)
    for step, seconds in ((0, 5000.0), (1, 60.0), (2, 60.0), (3, 60.0)):
        clock.now += seconds
        shown.step(step, {"reward/eval": 0.5} if step == 0 else {"reward/mean": 0.1 * step}, seconds)
    assert "eta" not in lines[2] and lines[3].endswith("eta 7m00s")


def test_a_figure_is_shown_once_with_the_next_line_that_is_printed():
    """An evaluation of a line that was held back is not lost, one that was printed is not repeated as if new."""
    lines, clock = [], Clock()
    shown = Console("ppo", 6, lines.append, enabled=False, clock=clock)
    for step, seconds in ((1, 9.0), (2, 0.1), (3, 9.0), (4, 9.0), (5, 9.0), (6, 9.0)):
        clock.now += seconds
        evaluated = {"reward/eval": 0.5 * step} if step in (2, 5) else {}
        shown.step(step, {"reward/mean": 0.1 * step, **evaluated}, seconds)
    assert [line.split()[2] for line in lines] == ["1/6", "3/6", "4/6", "5/6", "6/6"]
    assert [re.findall(r"eval reward (\S+)", line) for line in lines] == [[], ["1"], [], ["2.5"], []]


def test_a_stage_of_scores_shows_how_good_it_is(capsys):
    with Tracker(None, "reward", 1) as tracker:
        tracker.log(1, {"loss/train": 0.3, "correlation/eval": 0.71})
    assert "eval correlation 0.71" in capsys.readouterr().out


def test_stages_show_their_own_figures(capsys):
    with Tracker(None, "sft", 1) as tracker:
        tracker.log(1, {"loss/train": 1.2345, "grad/norm": 9.0, "learning_rate": 2e-5})
    with Tracker(None, "other", 1) as tracker:
        tracker.log(1, {"my/number": 4.0, "your/number": float("nan")})
    out = capsys.readouterr().out
    assert "loss 1.23" in out and "lr 2e-05" in out and "grad" not in out
    assert "my/number 4" in out and "your/number n/a" in out


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_clean_leaves_nothing_a_terminal_obeys(text):
    left = clean(text).replace("\n", "")
    assert not [c for c in left if unicodedata.category(c) in {"Cc", "Cs"}]
    assert not re.search("[\u202a-\u202e\u2066-\u2069\u200e\u200f\u061c]", left)
    assert "\n" not in one_line(text) and len(one_line(text)) <= console.CELL_CHARS


@pytest.mark.parametrize("text", ["你好，世界！", "naïve ½ [ok] <b>", "👩‍👩‍👧 नमस्ते", "مرحبا"])
def test_clean_leaves_honest_text_alone(text):
    assert clean(text) == text


def test_hostile_output_reaches_console_and_log_as_plain_text(tmp_path, capsys):
    with Tracker(tmp_path, "ppo", 2) as tracker:
        for step in (1, 2):
            for text in HOSTILE.values():
                tracker.samples(step, [{"prompt": text, "response": text, "score": 1.0}])
        for text in HOSTILE.values():
            tracker.event("alarm", text, detail=text)
            tracker.note(text)
    out, log = capsys.readouterr().out, (tmp_path / "log.txt").read_text()
    for shown in (out, log):
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", shown)
        assert "[bold red]loud[/bold red] [/nothing]" in shown and ":smile:" in shown
        assert len(shown) < 200_000
    assert out.splitlines()[0] in log.splitlines()[0]


def test_hostile_samples_come_back_exactly_and_are_safe_to_cat(tmp_path):
    with Tracker(tmp_path, "ppo", 1, console=False) as tracker:
        tracker.samples(1, [{"prompt": text, "response": text, "score": None} for text in HOSTILE.values()])
    content = (tmp_path / "samples.jsonl").read_bytes().decode()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]", content)
    assert [json.loads(line)["response"] for line in content.splitlines()] == list(HOSTILE.values())


SECRETS = [
    "hf_" + "a1B2" * 8,
    "sk-" + "proj-" + "x9" * 20,
    "AKIA" + "ABCDEFGH12345678",
    "ghp_" + "q" * 36,
]


@pytest.mark.parametrize("secret", SECRETS)
def test_credentials_do_not_reach_any_file(tmp_path, capsys, secret):
    hidden = secret[:6] + "\x1b[0m" + secret[6:]  # the escape must not hide the token from the filter
    with Tracker(tmp_path, "ppo", 1) as tracker:
        for text in (secret, hidden, f"see https://user:{secret}@example.org/x", f"WANDB_API_KEY={secret}"):
            tracker.note(text)
            tracker.event("alarm", text, detail={"list": [text]})
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    shown = capsys.readouterr().out + "".join(path.read_text(errors="replace") for path in files)
    assert secret[8:] not in shown.replace("\\u001b[0m", "")


def test_redact_leaves_other_text_alone():
    text = "loss 0.5; tokens: 1024; stop token: 151645; https://example.org/a@b; task-sk-1 eos_token: </s>"
    assert redact(text) == text


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.4, "0s"), (59.4, "59s"), (200, "3m20s"), (1500, "25m"), (3900, "1h05m")]
)
def test_duration(seconds, shown):
    assert duration(seconds) == shown


@pytest.mark.parametrize(
    ("value", "shown"), [(0.12345, "0.123"), (5123.4, "5123"), (51234, "51.2k"), (2e6, "2M"), (None, "n/a")]
)
def test_number(value, shown):
    assert number(value) == shown


SCRIPT = """
from fastrlhf.runtime.tracking import Tracker
with Tracker(None, "ppo", 3) as t:
    for step in (1, 2, 3):
        with t.phase("rollout"):
            t.note("[bold]kept[/bold]")
        t.log(step, {"reward/mean": 0.5}, {"perf/tokens_per_s": 99.0})
    t.event("alarm", "look")
"""


def in_terminal(**env):
    """stdout of SCRIPT when it is a terminal (a pseudo-terminal, 100 columns)."""
    leader, follower = pty.openpty()
    full = {key: value for key, value in os.environ.items() if key != "NO_COLOR"} | {"COLUMNS": "100"} | env
    process = subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=follower, stdin=follower, env=full)
    os.close(follower)
    chunks = []
    while True:
        try:
            chunk = os.read(leader, 65536)
        except OSError:  # the other end is closed
            break
        if not chunk:
            break
        chunks.append(chunk)
    os.close(leader)
    assert process.wait() == 0
    return b"".join(chunks).decode()


def test_terminal_gets_a_live_line_and_its_cursor_back():
    out = in_terminal(TERM="xterm-256color")
    assert "\x1b[2K" in out and "ppo 3/3" in out and "[bold]kept[/bold]" in out
    assert out.count("\x1b[?25l") == out.count("\x1b[?25h") == 1
    assert "\x1b[33malarm: look\x1b[0m" in out


@pytest.mark.parametrize("env", [{"NO_COLOR": "1", "TERM": "xterm-256color"}, {"TERM": "dumb"}])
def test_no_escape_byte_when_not_wanted(env):
    out = in_terminal(**env)
    assert "\x1b" not in out and "ppo step 3/3" in out


@pytest.mark.parametrize("stdout", ["pipe", "closed", "ascii"])
def test_odd_stdouts_do_not_stop_a_run(tmp_path, stdout):
    code = f"""
from fastrlhf.runtime.tracking import Tracker
with Tracker({str(tmp_path)!r}, "ppo", 3) as t:
    t.note("猫 is here")
    t.event("alarm", "still running")
"""
    env = os.environ | ({"PYTHONIOENCODING": "ascii"} if stdout == "ascii" else {})
    read_end, write_end = os.pipe()
    if stdout == "closed":
        os.close(read_end)
    process = subprocess.run([sys.executable, "-c", code], stdout=write_end, stderr=subprocess.PIPE, env=env)
    os.close(write_end)
    if stdout != "closed":
        out = os.read(read_end, 65536)
        os.close(read_end)
        assert b"\x1b" not in out and b"is here" in out
    assert b"Traceback" not in process.stderr
    assert rows(tmp_path / "events.jsonl")[0]["message"] == "still running"
    assert "猫" in (tmp_path / "log.txt").read_text()
