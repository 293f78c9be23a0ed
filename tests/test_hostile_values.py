"""Values and files of strangers that once ended in a traceback, a hang, or a write through their links."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

from fastrlhf import PPOConfig, SFTConfig, UserError
from fastrlhf.checkpoint import lock
from fastrlhf.checkpoint.atomic import recover
from fastrlhf.checkpoint.store import CheckpointStore
from fastrlhf.cli import main
from fastrlhf.config.limits import memory_limit
from fastrlhf.config.recipe import load_recipe
from fastrlhf.data.rendering import render
from fastrlhf.data.templates import stop_token_ids
from fastrlhf.models.adapter_folder import adapter_config, read_adapter
from fastrlhf.models.loading import check_source, is_scalar_model, load_policy, load_tokenizer
from fastrlhf.report import build_report
from fastrlhf.rl.functions import UserFunction
from fastrlhf.rl.scorers import read_reward
from fastrlhf.runtime.console import redact
from fastrlhf.runtime.tracking import Tracker
from tests import tiny
from tests.runs import leave_after
from tests.stage_runs import build

TOKEN = "hf_" + "a1B2" * 8


# -------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        (SFTConfig, {"lora": "[" * 3000}),
        (SFTConfig, {"lora": "{r: 8, alpha: .nan}"}),
        (SFTConfig, {"lora": {"r": 8, "alpha": float("inf")}}),
        (SFTConfig, {"lora": 10**20}),
        (SFTConfig, {"columns": "{a: " * 3000}),
        (SFTConfig, {"columns": "a: !!bool 5"}),
        (SFTConfig, {"output_dir": "a\0b"}),
        (SFTConfig, {"mini_batch_size": 10**23}),
        (SFTConfig, {"warmup_steps": 10**12}),
        (PPOConfig, {"rollout_batch_size": 10**12}),
        (PPOConfig, {"ppo_epochs": 10**21}),
        (PPOConfig, {"best_of_n": 10**11}),
        (PPOConfig, {"temperature": 1e308}),
        (PPOConfig, {"length_penalty": -1e308}),
        (SFTConfig, {"learning_rate": "1e300"}),
    ],
    ids=str,
)
def test_values_out_of_reach_are_refused(config: type, fields: dict) -> None:
    name = next(iter(fields))
    with pytest.raises(UserError, match=rf"^{name} = .*: expected ") as caught:
        config(**fields)
    assert len(str(caught.value)) < 300


def test_the_largest_seed_and_ordinary_numbers_stay() -> None:
    assert SFTConfig(seed=2**32 - 1, mini_batch_size=1_000_000, weight_decay=0.1).seed == 2**32 - 1


@pytest.mark.parametrize("value", ["[" * 3000, "[2020-99-99]", "[!!timestamp x]", "[&a [x], *a]"])
def test_an_input_that_is_no_plain_list_is_a_text(value: str) -> None:
    inputs, _ = load_recipe("sft", None, ["model=m", f"data={value}", "output_dir=o"])
    assert inputs["data"] == value


def test_a_tag_that_does_not_fit_its_value_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("model: m\ndata: d\nseed: !!timestamp x\n")
    with pytest.raises(UserError, match=r"r.yaml:3: not a value: timestamp 'x'"):
        load_recipe("sft", str(tmp_path / "r.yaml"), [])


def test_a_very_long_value_does_not_flood_the_terminal(capsys: pytest.CaptureFixture) -> None:
    assert main(["sft", "model=" + "x" * 100_000, "data=d.jsonl", "output_dir=o"]) == 2
    assert len(capsys.readouterr().err) < 9000


# -------------------------------------------------------------------------------------------------------------- models


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tiny.llama().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("name", "value"), [("num_hidden_layers", 0), ("num_hidden_layers", 10**9), ("max_position_embeddings", -1)]
)
def test_sizes_that_no_model_has(model: Path, name: str, value: int) -> None:
    change(model / "config.json", **{name: value})
    for load in (lambda: check_source(str(model), "policy"), lambda: load_policy(str(model))):
        with pytest.raises(UserError, match=f"policy: cannot load .*{name} is {value}; expected a whole number"):
            load()


def test_architectures_of_another_kind_are_no_classifier(model: Path) -> None:
    change(model / "config.json", architectures=[5])
    assert not is_scalar_model(str(model))


@pytest.mark.parametrize("value", ["x", [1, "x"], {"a": 1}, 1.5, -1, [True]])
def test_a_stop_that_is_no_token_id(value: object) -> None:
    generation = tiny.llama().generation_config
    generation.eos_token_id = value
    with pytest.raises(UserError, match="generation_config.json: eos_token_id is .*expected a token id"):
        stop_token_ids(tiny.tokenizer(), generation)


@pytest.mark.parametrize(
    "break_it",
    [
        lambda m: change(m / "tokenizer_config.json", model_max_length="x"),
        lambda m: change(m / "tokenizer.json", model={"type": "WordLevel", "vocab": {}, "unk_token": "x"}),
    ],
    ids=["model_max_length", "no words"],
)
def test_a_tokenizer_that_breaks_when_it_is_used(model: Path, break_it) -> None:
    break_it(model)
    with pytest.raises(UserError, match="tokenizer: cannot load .*model"):
        load_tokenizer(str(model))


def test_what_the_model_cannot_generate_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="with its reply up to 1016, and the policy has 128 positions; lower max_new"):
        build("ppo", max_new_tokens=1000)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"modules_to_save": 5}, "modules_to_save = 5"),
        ({"modules_to_save": [[1]]}, "modules_to_save = "),
        ({"alpha_pattern": [1]}, "alpha_pattern is "),
        ({"alpha_pattern": {"q": "x"}}, "q is 'x', where a number belongs"),
        ({"lora_alpha": 10**400}, "lora_alpha is 1000"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
    ],
    ids=str,
)
def test_the_config_of_an_adapter(tmp_path: Path, fields: dict, message: str) -> None:
    config = {"peft_type": "LORA", "lora_alpha": 1, "base_model_name_or_path": "m", **fields}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        adapter_config(tmp_path, "policy")


@pytest.mark.parametrize(("pattern", "message"), [("(a+", "pattern that is none"), ("(([a-z_.]+)+)+!", "more than")])
def test_patterns_of_an_adapter_that_are_none_or_have_no_end(tmp_path: Path, pattern: str, message: str) -> None:
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    sides = {f"{layer}.lora_A.weight": torch.ones(1, 4), f"{layer}.lora_B.weight": torch.ones(4, 1)}
    save_file(sides, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "lora_alpha": 1, "base_model_name_or_path": "m", "alpha_pattern": {pattern: 1}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"alpha_pattern .*{message}"):
        read_adapter(tmp_path, "policy")


# ----------------------------------------------------------------------------------------------------------- templates


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ 'x' * 5000000000 }}", "fails .MemoryError"),
        ("{{ '%99999999999d' % 5 }}", "fails .MemoryError"),
        ("{{ 'x'|center(4000000000) }}", "fails .MemoryError"),
        ("{{ 10**200000000 }}", r"uses \*\*, whose result may have no end"),
        ("{{ 'x' * 2000000 }}", "writes 2,000,000 characters for a conversation of 1 messages"),
        ("{{ ('a' * 20000000)|wordwrap(1)|length }}", "takes more than 0.2 s"),
    ],
)
def test_templates_that_ask_for_too_much(template: str, message: str) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    seconds = 0.2 if "0.2 s" in message else 60  # the others have an end of their own
    with pytest.raises(UserError, match=message):
        render(tokenizer, tiny.chat("the cat"), add_generation_prompt=True, seconds=seconds)


def test_two_stars_that_are_no_power_stay() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "**{{ dict(**{'a': 1}).a }}** {{ messages[0].content }}"
    assert render(tokenizer, tiny.chat("hi"), add_generation_prompt=True) == "**1** hi"


TOO_MUCH = 2 << 30  # more than what earlier tests may have left free in this process; nobody writes to it


def test_the_memory_limit_ends_with_its_block() -> None:
    with pytest.raises(MemoryError), memory_limit(64 << 20):
        numpy.empty(TOO_MUCH, numpy.uint8)
    assert len(numpy.empty(TOO_MUCH, numpy.uint8)) == TOO_MUCH


@pytest.mark.parametrize("reused", [False, True], ids=["closed", "another file's"])
def test_the_memory_limit_outlives_the_file_that_tells_it(tmp_path: Path, reused: bool) -> None:
    """Daemons close all files that they find, and the next one that is opened has the number."""
    with memory_limit(1 << 30):
        pass
    (tmp_path / "other").write_text("not a number " * 9)
    numbers = [n for n in map(int, os.listdir("/proc/self/fd")) if _target(n).endswith("/statm")]
    assert numbers
    with open(tmp_path / "other") as other:
        for number in numbers:
            os.dup2(other.fileno(), number)
        for number in [] if reused else numbers:
            os.close(number)
        with pytest.raises(MemoryError), memory_limit(64 << 20):
            numpy.empty(TOO_MUCH, numpy.uint8)
    for number in numbers if reused else []:
        os.close(number)


def _target(number: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{number}")
    except OSError:  # that of the listing
        return ""


# ------------------------------------------------------------------------------------------------------------- rewards


def test_rewards_that_no_float_holds_and_names_given_twice() -> None:
    function = UserFunction("reward function f", lambda prompts, responses: [10**400])
    with pytest.raises(UserError, match=r"reward function f, sample 0: 10000.* is not a number"):
        function.number(0, 10**400)
    same = [("a", 1.0, lambda prompts, responses: [0.0]), ("a", 1.0, lambda prompts, responses: [0.0])]
    with pytest.raises(UserError, match="'a' is the name of two entries"):
        read_reward(same, PPOConfig())


def test_a_cancelled_call_is_the_functions_error() -> None:
    async def cancelled(prompts: list[str], responses: list[str]) -> list[float]:
        raise asyncio.CancelledError

    with pytest.raises(UserError, match="reward function f, sample 0: raised CancelledError"):
        UserFunction("reward function f", cancelled)({"prompts": ["a"], "responses": ["b"]})


# --------------------------------------------------------------------------------------------------------- run folders


def run_folder(tmp_path: Path) -> Path:
    leave_after(build("sft", output_dir=str(tmp_path / "run"), save_every=1), 1)
    return tmp_path / "run"


@pytest.mark.parametrize("name", [".lock", "metrics.jsonl", "run.json", ".tmp-run.json", "log.txt"])
def test_nothing_is_written_through_a_link(tmp_path: Path, name: str) -> None:
    """A run folder of a stranger whose lock pointed to a file of the user's had that file overwritten."""
    victim, run = tmp_path / "victim", run_folder(tmp_path)
    before = (run / name).read_bytes() if (run / name).exists() else b"mine"
    victim.write_bytes(before)
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(victim)
    with pytest.raises(UserError, match=f"{name}' is a link"):
        build("sft", output_dir=str(run), resume=True)
    with pytest.raises(UserError, match=f"{name}' is a link"):
        build("sft", output_dir=str(run), overwrite=True)
    assert victim.read_bytes() == before


def test_the_lock_and_the_report_follow_no_link(tmp_path: Path) -> None:
    victim, run = tmp_path / "victim", run_folder(tmp_path)
    victim.write_text("mine")
    (run / ".lock").symlink_to(victim)
    with pytest.raises(OSError, match="symbolic link"):
        lock.acquire(run)
    (run / ".lock").unlink()
    (run / ".report.html.partial").symlink_to(victim)
    with pytest.raises(UserError, match="is a link"):
        build_report(run)
    assert victim.read_text() == "mine"


def test_only_our_own_half_written_folders_are_removed(tmp_path: Path) -> None:
    for name in (".tmp-mine", ".tmp-best-4711", ".tmp-remove-step-000001"):
        (tmp_path / name).mkdir()
    recover(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".tmp-mine"]


@pytest.mark.parametrize("text", ["[" * 100_000, '{"verb": 5}', '{"verb": "nosuch"}', '{"verb": ["sft"]}'])
def test_a_run_json_made_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    assert main(["resume", str(tmp_path)]) == 2
    assert f"{tmp_path}/run.json: " in capsys.readouterr().err


STATES = [
    {"step": "x"},
    {"step": -5},
    {"step": True},
    {"step": 77},
    {"last_step": "x"},
    {"unfinished": 5},
    {"config": 5},
    {"parts": {}},
    {"parts": {"guard": 5, "memory": 5, "sampler": 5}},
    {"bytes": {"metrics.jsonl": "x"}},
    {"optimizers": {}},
    {"tensors": ["nope"]},
]


def test_a_state_made_by_hand_is_one_sentence(tmp_path: Path) -> None:
    """Its hash fits."""
    run = run_folder(tmp_path)
    store = CheckpointStore(run)
    checkpoint = store.latest()
    tensors = {path.stem: load_file(path) for path in checkpoint.path.glob("*.safetensors")}
    for number, changed in enumerate(STATES, 2):
        state = checkpoint.state | {"step": number} | changed
        store.save(number, models={"model": tiny.llama()}, tensors=tensors, state=state)
        with pytest.raises(UserError, match=f"step-{number:06d}"):
            build("sft", output_dir=str(run), resume=True)


# ------------------------------------------------------------------------------------------------- texts, in and out


def test_texts_that_are_no_unicode_are_refused(
    model: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["generate", str(model), "--prompt", "caf\udce9"]) == 2
    assert main(["generate", str(model), "--prompt", "x", "--output", "a\0b"]) == 2
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("café\n".encode("latin-1")), encoding="utf-8"))
    assert main(["generate", str(model), "--prompts", "-"]) == 2
    said = capsys.readouterr().err
    assert '"--prompt" is not valid Unicode' in said and '"--output" contains a NUL' in said
    assert "stdin:1: not UTF-8 text; save the file as UTF-8" in said


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("{'Authorization': 'Bearer abcd12345678'}", "{'Authorization': 'Bearer ***'}"),
        ("authorization: Basic dXNlcjpwYXNz", "authorization: Basic ***"),
        ("x-api-key: abcdef123456", "x-api-key: ***"),
        ("Cookie: session=abcdef12345; a=b", "Cookie: ***; a=b"),
        ("with bearer abc.def-12345678", "with bearer ***"),
        ("eos_token: '<|endoftext|>' is the bearer token", "eos_token: '<|endoftext|>' is the bearer token"),
        ("Authorization failed: tokens: 123456789", "Authorization failed: tokens: 123456789"),
    ],
)
def test_credentials_in_headers_are_covered(text: str, shown: str) -> None:
    assert redact(text) == shown


def test_samples_hold_no_credential(tmp_path: Path) -> None:
    with Tracker(tmp_path, "ppo", 1, console=False) as tracker:
        tracker.samples(1, [{"prompt": f"key {TOKEN}", "response": f"{TOKEN}!", "score": 1.0, "more": [TOKEN]}])
    assert (
        TOKEN not in (tmp_path / "samples.jsonl").read_text() and "hf_***" in (tmp_path / "samples.jsonl").read_text()
    )


NOISE = """
import logging, sys, warnings
import fastrlhf.cli as cli
def noise(verb, arguments):
    warnings.warn("\\x1b[2J {token}")
    logging.getLogger("a.library").warning("\\x1b[2J %s", "{token}")
    try:
        raise KeyError("\\x1b[2J {token}")
    except KeyError:
        logging.getLogger("a.library").exception("failed")
    return 0
def memory(verb, arguments):
    raise MemoryError
cli.VERBS["noise"], cli.VERBS["memory"] = (noise, ""), (memory, "")
sys.exit(cli.main())
"""


def test_what_libraries_say_is_cleaned_too() -> None:
    command = [sys.executable, "-c", NOISE.replace("{token}", TOKEN), "noise"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.count("hf_***") >= 3, done.stderr
    assert TOKEN not in done.stderr and "\x1b" not in done.stderr


def test_memory_that_runs_out_is_no_bug() -> None:
    done = subprocess.run([sys.executable, "-c", NOISE, "memory"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: out of memory: "), done.stderr


def test_importing_the_package_changes_nobodys_logging() -> None:
    assert logging.getLogRecordFactory() is logging.LogRecord and warnings.formatwarning.__module__ == "warnings"
