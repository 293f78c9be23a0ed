"""The command line: every verb works end to end on a tiny model, every mistake is a short message and exit code 2."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from fastrlhf import __version__, cli
from fastrlhf.config.inputs import INPUTS
from fastrlhf.config.recipe import load_recipe, packaged_recipes, read_recipe
from fastrlhf.config.stages import CONFIGS
from tests import tiny

REWARD = "def length(prompts, responses):\n    return [float(len(r)) for r in responses]\n"
RECIPES = {
    "sft": "model: base\ndata: sft.jsonl\noutput_dir: out/sft\nmini_batch_size: 4\ntotal_steps: 2\nmax_tokens: 64\n",
    "reward": "model: base\ndata: pairs.jsonl\noutput_dir: out/rm\nmini_batch_size: 4\ntotal_steps: 2\nmax_tokens: 64",
    "ppo": "policy: base\nreward: rules.py:length\nprompts: prompts.jsonl\noutput_dir: out/ppo\nrollout_batch_size: 4\n"
    "mini_batch_size: 4\ntotal_steps: 2\nmax_new_tokens: 6\nmax_prompt_tokens: 32\n",
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder with a tiny base model, a recipe and data for each stage."""
    root = tmp_path_factory.mktemp("cli")
    tiny.llama().save_pretrained(root / "base")
    tiny.tokenizer().save_pretrained(root / "base")
    rows = {
        "sft": [{"prompt": p, "response": "the answer is yes"} for p in tiny.PROMPTS],
        "pairs": [{"prompt": p, "chosen": "the answer is yes", "rejected": "no"} for p in tiny.PROMPTS * 3],
        "prompts": [{"prompt": p} for p in tiny.PROMPTS],
        "bad": [{"prompt": "good"}, {"promt": "bad"}],
    }
    for name, lines in rows.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (root / "rules.py").write_text(REWARD)
    (root / "exits.py").write_text("raise SystemExit(0)\n")
    (root / "typo.py").write_text("def f(:\n")
    (root / "asks.py").write_text("def f(prompts, responses, answer):\n    return [0.0] * len(responses)\n")
    (root / "blind.py").write_text("def f(prompts, responses):\n    return [None] * len(responses)\n")
    (root / "text.txt").write_text("no model")
    (root / "none.jsonl").write_text("")
    for stage, text in RECIPES.items():
        (root / f"{stage}.yaml").write_text(text)
    return root


@pytest.fixture
def run(workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)

    def command(*arguments: str) -> tuple[int, str, str]:
        code = cli.main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return command


# --------------------------------------------------------------------------------------------------------------- works


@pytest.fixture(scope="module")
def trained(workplace) -> Path:
    """The three stages, run once by the command line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workplace)
        for stage in RECIPES:
            assert cli.main([stage, f"{stage}.yaml"]) == 0
    return workplace / "out"


def test_each_stage_leaves_a_model_and_a_recipe(trained, run):
    for stage, folder in (("sft", "sft"), ("reward", "rm"), ("ppo", "ppo")):
        assert (trained / folder / "final" / "model.safetensors").is_file()
        code, out, _ = run(stage, trained / folder / "config.yaml", "output_dir=elsewhere", "--dry-run")
        assert code == 0 and "output_dir: elsewhere" in out
    assert not Path("elsewhere").exists()


def test_generate_prints_the_reply_and_nothing_else(trained, run):
    greedy = ("generate", trained / "ppo/final", "--temperature", "0", "--max-new-tokens", "5", "--prompt", "the cat")
    code, out, _ = run(*greedy)
    assert code == 0 and out == run(*greedy)[1]
    assert run(*greedy, "--raw")[1] != out, "--raw should leave the chat template out"
    code, out, _ = run(*greedy[:-2], "--prompt", "a", "--prompt", "b", "--samples", "2", "--temperature", "1")
    assert code == 0 and [line for line in out.split("\n") if line.startswith("--- ")] == ["--- a"] * 2 + ["--- b"] * 2


def test_more_samples_than_can_be_made_together_are_refused(trained, run):
    code, _, err = run("generate", trained / "ppo/final", "--prompt", "a", "--samples", "1000000000")
    assert code == 2 and "--samples: 1000000000 replies to a prompt; at most 1024, more of them with another" in err


def test_resume_without_config_yaml_says_that_it_is_missing(tmp_path, run):
    (tmp_path / "run.json").write_text('{"verb": "sft"}')
    code, _, err = run("resume", tmp_path)
    assert code == 2 and f"{tmp_path}/config.yaml is missing, which says what the run was started with" in err


def test_score_prints_one_number_a_pair(trained, run):
    pairs = ("--prompt", "the cat", "--response", "yes", "--prompt", "the cat", "--response", "the answer is no")
    code, out, _ = run("score", trained / "rm/final", *pairs)
    scores = [float(line) for line in out.splitlines()]
    assert code == 0 and len(scores) == 2 and scores[0] != scores[1]
    assert [float(s) for s in run("score", trained / "rm/final", *pairs[:4])[1].split()] == pytest.approx(
        scores[:1], abs=1e-5
    )
    assert run("score", trained / "rm/final", *pairs, "--raw")[1] != out


GREEDY = ("--temperature", "0", "--max-new-tokens", "5")


def rows_of(path: str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def test_generate_takes_a_file_and_leaves_a_file_that_score_takes(trained, run):
    asked = [{"prompt": "the cat", "id": 7}, {"prompt": tiny.chat("今天的天气"), "id": 8}]
    Path("asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    files = ("--prompts", "asked.jsonl", "--output", "made/replies.jsonl", "--samples", "2")
    code, out, err = run("generate", trained / "ppo/final", *GREEDY, *files)
    assert (code, out) == (0, "4 rows -> made/replies.jsonl\n"), err
    rows = rows_of("made/replies.jsonl")
    assert [(row["prompt"], row["id"]) for row in rows] == [(row["prompt"], row["id"]) for row in asked for _ in "12"]
    one = run("generate", trained / "ppo/final", *GREEDY, "--prompt", "the cat")[1]
    assert rows[0]["response"] + "\n" == one, "a file's text is encoded as one of the command line"

    code, out, err = run("score", trained / "rm/final", "--prompts", "made/replies.jsonl", "--output", "scores.jsonl")
    assert (code, out) == (0, "4 rows -> scores.jsonl\n"), err
    scored = rows_of("scores.jsonl")
    assert [{**row, "score": 0} for row in scored] == [{**row, "score": 0} for row in rows]
    pair = ("--prompt", "the cat", "--response", rows[0]["response"])
    assert float(run("score", trained / "rm/final", *pair)[1]) == pytest.approx(scored[0]["score"], abs=1e-4)
    assert [p.name for p in Path("made").iterdir()] == ["replies.jsonl"]


def test_score_takes_rows_with_several_responses(trained, run):
    Path("many.jsonl").write_text(
        '{"prompt": "the cat", "responses": ["yes", ""]}\n{"prompt": "b", "completion": "no"}'
    )
    code, out, err = run("score", trained / "rm/final", "--prompts", "many.jsonl")
    assert code == 0 and len(out.splitlines()) == 3, err
    assert run("score", trained / "rm/final", "--prompts", "many.jsonl", "--output", "many_scores.jsonl")[0] == 0
    rows = rows_of("many_scores.jsonl")
    assert [(row["prompt"], row["response"]) for row in rows] == [("the cat", "yes"), ("the cat", ""), ("b", "no")]
    assert [f"{row['score']:.4f}" for row in rows] == [f"{float(line):.4f}" for line in out.splitlines()]


def test_a_split_with_columns_of_other_names_serves_runs_and_score(trained, run):
    Path("asked/data").mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        row = {"question": f"the cat {split}", "answer": "yes", "tools": "look"}
        Path(f"asked/data/{split}-00000-of-00001.jsonl").write_text(f"{json.dumps(row)}\n" * 3)
    named = ("columns={prompt: question, response: answer}", "ignore_columns=tools")
    data = ("data=asked:train", "eval_data=asked:test", "max_samples=2", "output_dir=new")
    code, out, err = run("sft", "model=base", *data, *named, "--dry-run")
    assert code == 0 and all(f"# {name}: 2 rows read (max_samples), 2 used" in out for name in ("data", "eval_data")), (
        err
    )
    assert "data: asked:train" in out and "max_samples: 2" in out
    code, _, err = run("sft", "model=base", "data=asked:dev", "output_dir=new", "--dry-run")
    assert code == 2 and "asked: no split 'dev'; there are train, test" in err
    options = ("--columns={prompt: question, response: answer}", "--ignore-columns", "tools")
    code, out, err = run("score", trained / "rm/final", "--prompts", "asked:test", *options)
    assert code == 0 and len(out.split()) == 3, err
    code, _, err = run("score", trained / "rm/final", "--prompts", "asked:test")
    assert code == 2 and "columns={prompt: NAME} reads it from another column" in err


@pytest.mark.parametrize(
    ("text", "asked"), [("the cat\n\n[b] c\n", ["the cat", "[b] c"]), ('{"prompt": "x"}\n\n{"messages": []}\n', None)]
)
def test_prompts_come_from_stdin_too(trained, run, monkeypatch, text, asked):
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    code, out, err = run("generate", trained / "ppo/final", *GREEDY, "--prompts", "-")
    if asked is None:
        assert code == 2 and "stdin:3: " in err
    else:
        assert code == 0 and [line[4:] for line in out.splitlines() if line.startswith("--- ")] == asked, err


def test_an_output_file_is_only_replaced_when_asked(trained, run):
    Path("kept.jsonl").write_text("mine")
    kept = ("generate", trained / "ppo/final", *GREEDY, "--prompt", "the cat", "--output", "kept.jsonl")
    code, _, err = run(*kept)
    assert code == 2 and "kept.jsonl exists; name another file, or use --overwrite" in err
    assert Path("kept.jsonl").read_text() == "mine"
    assert run(*kept, "--overwrite")[0] == 0 and rows_of("kept.jsonl")[0]["prompt"] == "the cat"


def test_generate_names_score_for_a_reward_model(trained, run):
    code, out, err = run("generate", trained / "rm/final", "--prompt", "the cat")
    assert code == 2 and len(err.splitlines()) == 1 and out == ""
    assert "is a reward model, which writes no text" in err and "fastrlhf score" in err


def test_resume_of_a_finished_run_is_done_at_once(trained, run):
    before = (trained / "ppo/metrics.jsonl").read_bytes()
    code, out, _ = run("resume", trained / "ppo")
    assert code == 0 and out.startswith(f"fastrlhf {__version__} resume: ")
    assert (trained / "ppo/metrics.jsonl").read_bytes() == before


def test_report_writes_one_page(trained, run):
    code, out, _ = run("report", trained / "ppo")
    assert code == 0 and (trained / "ppo/report.html").is_file() and "report.html" in out


def test_overwrite_starts_again_and_the_fields_win_over_the_recipe(trained, run):
    code, out, err = run("sft", "sft.yaml", "output_dir=out/again", "total_steps=1", "seed=5")
    assert code == 0, err
    code, _, err = run("sft", "sft.yaml", "output_dir=out/again")
    assert code == 2 and "out/again is not empty; name another folder, or use --overwrite" in err
    assert run("sft", "sft.yaml", "--overwrite", "output_dir=out/again", "total_steps=1")[0] == 0
    assert "seed: 0" in Path("out/again/config.yaml").read_text()


@pytest.mark.parametrize("stage", RECIPES)
def test_a_stage_runs_without_a_recipe_file_as_with_it(trained, run, stage):
    fields = [line.replace(": ", "=") for line in RECIPES[stage].splitlines()]
    code, out, err = run(stage, *fields, f"output_dir=out/plain-{stage}")
    folder = "rm" if stage == "reward" else stage
    assert code == 0, err
    assert out.startswith(f"fastrlhf {__version__} {stage}: base -> out/plain-{stage}\n")
    written, plain = (read_recipe(Path(f"out/{name}/config.yaml"))[0] for name in (folder, f"plain-{stage}"))
    assert plain == written | {"output_dir": f"out/plain-{stage}"}


def test_a_recipe_may_stand_behind_its_overrides_and_have_an_equals_sign_in_its_name(run):
    Path("a=b.yaml").write_text(RECIPES["sft"])
    for arguments in (["seed=3", "sft.yaml"], ["a=b.yaml", "seed=3"]):
        code, out, err = run("sft", *arguments, "output_dir=new", "--dry-run")
        assert code == 0 and "seed: 3" in out, err
    assert run("sft", "x=" + "y" * 5000)[0] == run("sft", "y" * 5000)[0] == 2


def test_recipes_lists_each_in_a_line_and_prints_one_that_runs(run):
    code, out, _ = run("recipes")
    listed = {line.split()[1]: line.split()[0] for line in out.splitlines()}
    assert code == 0 and listed["sft"] == "sft" and listed["reward"] == "reward" and listed["ppo-max"] == "ppo"
    assert list(listed) == packaged_recipes() and all(line.endswith(".") for line in out.splitlines())
    for name, stage in listed.items():
        code, text, _ = run("recipes", name)
        assert code == 0 and text.startswith("# ") and f"fastrlhf {stage} {name}" in text
        Path("mine.yaml").write_text(text, encoding="utf-8")
        inputs = [f"{i}=base" for i, spec in INPUTS[stage].items() if spec.required or i == "ptx_data"]
        packaged, mine = (load_recipe(stage, source, [*inputs, "output_dir=o"])[1] for source in (name, "mine.yaml"))
        assert packaged == mine


@pytest.mark.parametrize(
    "arguments", [["reward", "reward", "data=pairs.jsonl"], ["ppo", "instructgpt"], ["sft", "sft"]]
)
def test_what_is_missing_beside_a_packaged_recipe_is_one_line_that_edits_no_package(run, arguments):
    code, _, err = run(*arguments)
    assert code == 2 and len(err.splitlines()) == 1 and "site-packages" not in err and "recipes/" not in err
    needed = [name for name, spec in INPUTS[arguments[0]].items() if spec.required] + ["output_dir"]
    for name in {*needed} - {argument.partition("=")[0] for argument in arguments[2:]}:
        assert f" {name}=..." in err
    code, _, err = run("sft", "sft", "model=base", "data=sft.jsonl", "save_every=5")
    assert (code, err) == (2, "error: output_dir: required on the command line; write output_dir=FOLDER\n")


def test_dry_run_prints_a_recipe_that_is_its_own_fixed_point(run, tmp_path):
    for stage, text in RECIPES.items():
        (tmp_path / f"{stage}.yaml").write_text(text.replace("output_dir: out/", "output_dir: new/"))
        code, out, err = run(stage, tmp_path / f"{stage}.yaml", "--dry-run", "--skip-bad-rows", "seed=3")
        assert code == 0 and "skip_bad_rows: true\nseed: 3\n" in out and " rows read, " in out, err
        (tmp_path / "again.yaml").write_text(out, encoding="utf-8")
        assert run(stage, tmp_path / "again.yaml", "--dry-run")[1] == out
    assert not Path("new").exists()


# ---------------------------------------------------------------------------------------------------------------- help


def test_overview_names_every_verb_and_only_verbs_that_work(run):
    code, out, _ = run("--help")
    assert code == 0 and run() == (0, out, "")
    assert [line.split()[0] for line in out.split("\n\n")[2].splitlines()] == list(cli.VERBS)
    assert run("--version") == (0, f"fastrlhf {__version__}\n", "")
    for verb in cli.VERBS:
        code, out, _ = run(verb, "--help")
        assert code == 0 and out.startswith(f"usage: fastrlhf {verb}"), verb


@pytest.mark.parametrize("stage", CONFIGS)
def test_help_of_a_stage_shows_every_field_with_default_and_meaning(run, stage, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    _, out, _ = run(stage, "--help")
    for name, given in INPUTS[stage].items():
        assert f"  {name} " in out and given.description in out
    for name, field in CONFIGS[stage].model_fields.items():
        (line,) = [line for line in out.splitlines() if line.startswith(f"  {name}=")]
        assert field.description in line and not line.split()[0].endswith("=")


# -------------------------------------------------------------------------------------------------------------- errors

MISTAKES = {
    "unknown verb": (["pqo"], "pqo: no such command; did you mean ppo?"),
    "unknown verb, nothing near": (["bake"], "use one of quickstart, sft"),
    "verb of a later version": (["chat", "x"], "chat: no such command"),
    "no arguments": (["ppo"], "policy: required; give it on the command line, and reward, prompts and"),
    "recipe of another command": (["ppo", "sft"], "sft: a recipe of fastrlhf sft, not of ppo"),
    "packaged recipe, nothing with it": (
        ["ppo", "ppo-max", "prompts=prompts.jsonl"],
        "policy: required; give it on the command line, and reward and ptx_data too: policy=... reward=... ptx_data",
    ),
    "no such packaged recipe": (["recipes", "grpp"], "grpp: no packaged recipe; did you mean grpo?"),
    "missing recipe": (["ppo", "nope.yaml"], "nope.yaml: no such recipe (tried /"),
    "field as an option": (["ppo", "ppo.yaml", "--kl-coef", "0.1"], "a field is written kl_coef=VALUE"),
    "unknown option": (["report", "out", "--pdf"], "--pdf: no such option; see fastrlhf report --help"),
    "override without value": (["ppo", "ppo.yaml", "kl_coef"], "'kl_coef': expected field=value"),
    "unknown field": (["ppo", "ppo.yaml", "kl_coeff=1"], "command line: kl_coeff: no such field; did you mean kl_coef"),
    "recipe of another stage": (["sft", "ppo.yaml"], "ppo.yaml:1: policy: belongs to fastrlhf ppo, not to sft"),
    "wrong type": (["ppo", "ppo.yaml", "seed=x"], "command line: seed = 'x': expected a whole number"),
    "contradiction": (["ppo", "ppo.yaml", "--overwrite", "resume=true"], "contradicts overwrite = true"),
    "no base to quantise": (["ppo", "ppo.yaml", "quantize=nf4"], "quantize = nf4: quantised weights cannot be trained"),
    "ptx without data": (["ppo", "ppo.yaml", "ptx_coef=1"], "ptx_data: ptx_coef = 1 needs rows to learn from"),
    "missing model": (["ppo", "ppo.yaml", "policy=./bse"], "policy: ./bse does not exist; did you mean base?"),
    "missing data": (["sft", "sft.yaml", "data=sftt.jsonl"], "sftt.jsonl does not exist; did you mean sft.jsonl?"),
    "missing reward file": (["ppo", "ppo.yaml", "reward=rule.py:f"], "rule.py does not exist; did you mean rules.py?"),
    "missing reward function": (["ppo", "ppo.yaml", "reward=rules.py:size"], "'rules.py' has no function 'size'"),
    "reward file alone": (["ppo", "ppo.yaml", "reward=rules.py"], "rules.py is a file; name the function in it"),
    "reward that exits": (["ppo", "ppo.yaml", "reward=exits.py:f"], "cannot load exits.py:1: called sys.exit(0)"),
    "reward with a typo": (["ppo", "ppo.yaml", "reward=typo.py:f"], "reward: cannot load typo.py:1: SyntaxError: "),
    "reward of a column": (["ppo", "ppo.yaml", "reward=asks.py:f"], "argument 'answer' is no column of prompts"),
    "missing reward module": (["ppo", "ppo.yaml", "reward=no_such_module:f"], "reward: cannot import 'no_such_module'"),
    "bad row": (["ppo", "ppo.yaml", "prompts=bad.jsonl"], "bad.jsonl:2: "),
    "empty data": (["ppo", "ppo.yaml", "prompts=none.jsonl"], "none.jsonl"),
    "model is a file": (["sft", "sft.yaml", "model=text.txt"], "text.txt is a file, but neither"),
    "model folder without config": (["sft", "sft.yaml", "model=out"], "'out' holds no config.json"),
    "resume nothing": (["resume", "base"], "'base' is no run folder: it has no run.json"),
    "report nothing": (["report", "base"], "base"),
    "generate without prompt": (["generate", "base"], "arguments are required: --prompt"),
    "generate from nothing": (["generate", "./nope", "--prompt", "x"], "FOLDER: ./nope does not exist"),
    "generate with a wrong number": (["generate", "base", "--prompt", "x", "--top-p", "2"], "top_p must be in (0, 1]"),
    "generate with no number": (["generate", "base", "--prompt", "x", "--top-k", "x"], "invalid int value: 'x'"),
    "generate from an empty text": (["generate", "base", "--prompt", "", "--raw"], "prompt 0 is empty"),
    "generate too much": (["generate", "base", "--prompt", "x", "--max-new-tokens", "999"], "more than the model"),
    "generate both ways": (["generate", "base", "--prompt=x", "--prompts=bad.jsonl"], "one is enough: --prompt or"),
    "generate from a bad row": (["generate", "base", "--prompts=bad.jsonl"], "bad.jsonl:2: "),
    "generate into a folder": (["generate", "base", "--prompt=x", "--output=base"], "base is a folder; name a file"),
    "generate below a file": (
        ["generate", "base", "--prompt=x", "--output=text.txt/a"],
        "text.txt/a cannot be written",
    ),
    "score rows without responses": (["score", "base", "--prompts=prompts.jsonl"], 'prompts.jsonl:1: field "response"'),
    "score both ways": (["score", "base", "--prompts=sft.jsonl", "--response=x"], "--response: the rows of --prompts"),
    "score by a policy": (["score", "base", "--prompt", "x", "--response", "y"], "'base' is no sequence classifier"),
    "score without response": (["score", "base", "--prompt", "x"], "arguments are required: --response"),
    "score unequal": (["score", "base", "--prompt=x", "--prompt=y", "--response=z"], "2 --prompt but 1 --response"),
    "quickstart field": (["quickstart", "sed=1"], "sed"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_exit_code_2_and_a_few_lines(run, mistake):
    arguments, said = MISTAKES[mistake]
    changes = [] if len(arguments) < 2 or arguments[0] not in RECIPES else ["output_dir=fresh"]
    code, _, err = run(*arguments, *changes)
    assert code == 2
    assert err.startswith("error: ") and said in err
    assert len(err.splitlines()) <= 4 and "Traceback" not in err
    assert not Path("fresh").exists() or not any(Path("fresh").iterdir()), "an error before training leaves nothing"


def test_rewards_that_are_all_none_are_exit_code_2_and_the_runs_first_sentence(run):
    changes = ["reward=blind.py:f", "output_dir=out/blind", "eval_every=1", "eval_prompts=prompts.jsonl"]
    code, out, err = run("ppo", "ppo.yaml", *changes)
    assert code == 2 and err.startswith("error: reward: None for all 4 responses of step 1") and "Traceback" not in err
    assert "alarm: the reward could not judge 4 of 4 responses (None)" in out
    assert run("report", "out/blind")[0] == 0
    assert 'id="verdict">Alarms: ' in Path("out/blind/report.html").read_text()


def test_many_mistakes_are_cut_to_four_lines(run):
    code, _, err = run("ppo", "ppo.yaml", "a_=1", "b_=1", "c_=1", "d_=1", "e_=1", "seed=x")
    assert code == 2 and len(err.splitlines()) == 4 and err.endswith("... and 3 more\n")


def test_an_option_without_effect_is_named_with_its_place(run):
    rloo = ("output_dir=fresh", "advantage=rloo", "samples_per_prompt=2")
    code, _, err = run("ppo", "ppo.yaml", *rloo, "gae_lambda=0.9")
    assert code == 2 and err.startswith("error: command line: gae_lambda = 0.9: advantage = rloo has no critic, so ")


def test_debug_shows_the_traceback_too(run):
    code, _, err = run("ppo", "ppo.yaml", "seed=x", "--debug")
    assert code == 2 and "Traceback" in err and err.splitlines()[-1].startswith("error: command line: seed")


def test_a_bug_is_not_called_a_user_error(run, monkeypatch):
    """A ValueError of ours or of a library is no UserError: it keeps its traceback, and python exits with 1."""
    monkeypatch.setitem(cli.VERBS, "zz", (lambda verb, arguments: int("x"), "a verb with a bug"))
    with pytest.raises(ValueError, match="invalid literal"):
        run("zz")


def test_the_process_exits_with_the_code(workplace):
    done = subprocess.run(
        [sys.executable, "-m", "fastrlhf", "ppo", "nope"], cwd=workplace, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith("error: nope: no such recipe")


def test_a_reply_that_the_terminal_cannot_show_is_no_crash(workplace):
    """An ASCII-only stream gets escapes."""
    code = "import sys; from fastrlhf import cli; cli.VERBS['zz'] = (None, '你好'); sys.exit(cli.main(['--help']))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env={"PYTHONIOENCODING": "ascii"}
    )
    assert done.returncode == 0 and "  \\u4f60\\u597d\n" in done.stdout, done.stderr
