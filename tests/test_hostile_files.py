"""Files that others wrote and broke: one sentence each, never a traceback; nothing secret is printed."""

from __future__ import annotations

import gzip
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fastrlhf import UserError
from fastrlhf.checkpoint.store import CheckpointStore, manifest_text
from fastrlhf.cli import main
from fastrlhf.config import limits
from fastrlhf.data.rendering import render
from fastrlhf.data.rows import read_rows
from fastrlhf.models.adapter_folder import base_of
from fastrlhf.models.loading import check_source, load_tokenizer
from fastrlhf.runtime.console import Console, redact
from tests import tiny
from tests.checkpoints import store_with
from tests.checkpoints import tiny as tiny_model
from tests.runs import leave_after
from tests.stage_runs import build


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tiny.llama().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("text", ["[]", "{", '{"model_type": 5}', '{"model_type": "llama", "hidden_size": "big"}', "5"])
def test_a_broken_config_is_one_sentence(model: Path, text: str) -> None:
    (model / "config.json").write_text(text)
    with pytest.raises(UserError, match="policy: cannot load .*model"):
        check_source(str(model), "policy")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model": {"type": "no such"}}', '{"version": 5}'])
def test_a_broken_tokenizer_is_one_sentence(model: Path, text: str) -> None:
    (model / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match="tokenizer: cannot load .*model"):
        load_tokenizer(str(model))


def test_adapters_that_lead_back_to_themselves_are_named(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    for folder, base in ((a, b), (b, a)):
        folder.mkdir()
        config = {"peft_type": "LORA", "lora_alpha": 1, "base_model_name_or_path": str(base)}
        (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="a/adapter_config.json: base_model_name_or_path leads back to '.*a'"):
        base_of(a, "policy")
    config = {"peft_type": "LORA", "lora_alpha": 1, "base_model_name_or_path": str(a)}
    (a / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="leads back"):
        check_source(str(a), "policy")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ 1 / 0 }}", r"the chat template fails \(ZeroDivisionError"),
        ("{{ messages + 5 }}", r"the chat template fails \(TypeError"),
        ("{{ messages[0].nothing.here }}", "the chat template refuses"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "takes more than 0.2 s"),
    ],
)
def test_a_broken_or_endless_template_is_one_sentence(template: str, message: str) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(UserError, match=message):
        render(tokenizer, tiny.chat("the cat"), add_generation_prompt=True, seconds=0.2)
    assert signal.getsignal(signal.SIGALRM) is before and signal.getitimer(signal.ITIMER_REAL)[0] == 0


MANIFESTS = [
    {"format_version": 1},
    {"format_version": 1, "step": "1", "versions": {}, "files": {}},
    {"format_version": 1, "step": 1, "versions": {}, "files": []},
    {"format_version": 1, "step": 1, "versions": {}, "files": {"a": 5}},
    {"format_version": 1, "step": 1, "versions": {}, "files": {"../a": {"bytes": 1, "sha256": ""}}},
    {"format_version": 1, "step": 1, "versions": {}, "files": {}},
]


@pytest.mark.parametrize("manifest", MANIFESTS, ids=str)
def test_a_manifest_made_by_hand_is_damage(tmp_path: Path, manifest: dict) -> None:
    """Its own hash fits."""
    store = store_with(tmp_path, tiny_model())
    folder = store.latest().path
    (folder / "state.json").unlink()
    (folder / "MANIFEST.json").write_text(manifest_text(manifest))
    with pytest.warns(UserWarning, match="step-000001 is damaged and not used"):
        assert CheckpointStore(tmp_path).latest() is None


def test_a_checkpoint_without_what_every_run_writes_is_one_sentence(tmp_path: Path) -> None:
    leave_after(build("sft", output_dir=str(tmp_path), save_every=1), 1)
    store = CheckpointStore(tmp_path)
    store.save(9, models={}, tensors={}, state={"step": 9})
    with pytest.raises(UserError, match="step-000009/state.json: has no 'best'; start again"):
        build("sft", output_dir=str(tmp_path), resume=True)


def test_a_small_file_that_unpacks_to_blank_lines_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(b'{"text": "good"}\n' + b"\n" * limits.BLANK_BYTES + b'{"text": "good"}\n')
    assert len(list(read_rows(str(path)))) == 2
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(b'{"text": "good"}\n' + b" \n" * limits.BLANK_BYTES)
    with pytest.raises(UserError, match=r"rows.jsonl.gz:\d+: more than 1 MiB of blank lines; remove them"):
        list(read_rows(str(path)))


def test_a_small_file_that_unpacks_to_a_huge_row_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(b'{"text": "good"}\n' + b'{"text": "' + b"x" * (limits.ROW_BYTES + 1) + b'"}\n')
    with pytest.raises(UserError, match=r"rows.jsonl.gz:2: the row unpacks to more than 64 MiB"):
        list(read_rows(str(path)))
    with gzip.open(path) as file, pytest.raises(UserError, match="it unpacks to more than 1 MiB"):
        limits.bounded_content(file, "rows.json.gz", 1 << 20)


# ------------------------------------------------------------------------------------------------------ what is printed

TOKEN = "hf_" + "a1B2" * 8


@pytest.mark.parametrize(
    "url", ["https://h/x?token=abc", "https://h/x?a=1&api_key=abc", "https://h/x?X-Amz-Signature=abc&b=2", "u?sig=abc"]
)
def test_secrets_in_urls_are_covered(url: str) -> None:
    assert "abc" not in redact(f"see {url} there") and "there" in redact(f"see {url} there")
    assert redact("https://h/x?page=7&tokens_seen=5&author=me") == "https://h/x?page=7&tokens_seen=5&author=me"


def test_secrets_in_prompts_reach_neither_table_nor_log(capsys: pytest.CaptureFixture) -> None:
    lines: list[str] = []
    Console("ppo", 1, lines.append).table("samples", ["prompt", "response"], [[f"my key {TOKEN}", f"{TOKEN}!"]])
    said = "".join(lines) + capsys.readouterr().out
    assert "my key hf_***" in said and TOKEN not in said


def test_an_error_cannot_steer_the_terminal_or_tell_a_secret(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["sft", f"no\x1b[2Jsuch-{TOKEN}\x07"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and TOKEN not in said and not {"\x1b", "\x07"} & set(said)
    assert main(["sft", f"no\x1b[2Jsuch-{TOKEN}", "--debug"]) == 2
    said = capsys.readouterr().err
    assert "Traceback" in said and TOKEN not in said and "\x1b" not in said


BUG = """
import sys
import fastrlhf.cli as cli
def bug(verb, arguments):
    raise KeyError("\\x1b[2J {token}")
def disk(verb, arguments):
    open("/proc/no/such", "w")
cli.VERBS["bug"], cli.VERBS["disk"] = (bug, ""), (disk, "")
sys.exit(cli.main())
"""


@pytest.mark.parametrize(("verb", "code", "start"), [("bug", 1, "Traceback"), ("disk", 2, "error: /proc/no/such: No")])
def test_a_traceback_is_for_bugs_and_shows_no_secret(verb: str, code: int, start: str) -> None:
    command = [sys.executable, "-c", BUG.replace("{token}", TOKEN), verb]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == code and done.stderr.startswith(start), done.stderr
    assert TOKEN not in done.stderr and "\x1b" not in done.stderr
