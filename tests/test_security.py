"""Files from strangers (models, recipes, data) are read as data: nothing in them runs."""

from __future__ import annotations

import ast
import json
import pickle
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers

from fastrlhf.cli import main
from fastrlhf.config.errors import UserError
from fastrlhf.config.recipe import MAX_BYTES, load_recipe
from fastrlhf.models.loading import check_source, load_policy, load_reward_model, load_tokenizer
from tests import tiny

ROOT = Path(__file__).parents[1]
SOURCES = [
    path
    for folder in ("fastrlhf", "kernels", "bench")
    for path in (ROOT / folder).rglob("*.py")
    if ".venvs" not in path.parts
]
FORBIDDEN_CALLS = {
    "eval": "runs text as code",
    "exec": "runs text as code",
    "compile": "runs text as code",
    "__import__": "imports by a name from data",
    "os.system": "runs a shell",
    "os.popen": "runs a shell",
    "torch.load": "unpickles",
    "yaml.load": "builds objects",
    "yaml.load_all": "builds objects",
    "yaml.unsafe_load": "builds objects",
    "yaml.full_load": "builds objects",
    "np.load": "may unpickle",
    "numpy.load": "may unpickle",
}
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def forbidden(source: str) -> list[str]:
    problems = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            tensors_only = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
            if called in FORBIDDEN_CALLS and not (called == "torch.load" and tensors_only):
                problems.append(f"line {node.lineno}: {called} {FORBIDDEN_CALLS[called]}")
            for keyword in node.keywords:
                on = not (isinstance(keyword.value, ast.Constant) and keyword.value.value is False)
                if keyword.arg in ("shell", "trust_remote_code") and on:
                    problems.append(f"line {node.lineno}: {keyword.arg} that is not False")
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            problems += [f"line {node.lineno}: imports {n}" for n in names if n.split(".")[0] in FORBIDDEN_MODULES]
    return problems


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_construct_that_runs_data(path):
    assert forbidden(path.read_text(encoding="utf-8")) == []


def test_the_finder_finds():
    calls = (
        "eval(x)",
        "torch.load(f)",
        "torch.load(f, weights_only=flag)",
        "yaml.load(f)",
        "f(shell=True)",
        "subprocess.run('x', shell=1)",
    )
    imports = ("import pickle", "from dill import loads", "import a.b, shelve")
    for bad in (*calls, *imports, "g(trust_remote_code=flag)"):
        assert forbidden(bad), bad
    harmless = (
        "model.eval()",
        "re.compile(x)",
        "torch.compile(f)",
        "torch.load(f, weights_only=True)",
        "yaml.safe_load(f)",
        "g(trust_remote_code=False)",
    )
    for good in harmless:
        assert not forbidden(good), good


def test_every_load_refuses_remote_code_in_so_many_words():
    """Only an Auto class would look for code; `kind`, in checkpoint/store.py, is the concrete class of a live model."""
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if called.endswith(".from_pretrained") and called != "kind.from_pretrained":
                arguments = {k.arg: ast.unparse(k.value) for k in node.keywords}
                in_a_dict = None in arguments and "'trust_remote_code': False" in ast.unparse(tree)
                assert arguments.get("trust_remote_code") == "False" or in_a_dict, f"{path.name}:{node.lineno}"


# ------------------------------------------------------------------------------------------------------------- recipes

RECIPE = "policy: a\nreward: b\nprompts: c\n"
BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(f'*{chr(ord(name) - 1)}' for _ in range(10))}]\n" for name in "bcdefghi"
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed: !!python/object/apply:os.system ['touch CANARY']\n", "r.yaml:1: not valid YAML"),
        ("seed: !!python/name:os.system\n", "r.yaml:1: not valid YAML"),
        ("output_dir: !!python/object/new:type {}\n", "r.yaml:1: not valid YAML"),
        ("!!python/object/apply:os.system ['touch CANARY']\n", "expected"),
        ("? !!python/object/apply:os.system ['touch CANARY']\n: 1\n", "r.yaml:1: a field name must be a word"),
        (BOMB, "r.yaml:2: not valid YAML: aliases"),
        ("a: &a {b: *a}\n", "r.yaml:1: not valid YAML: aliases"),
        ("x: &x {seed: 1}\n<<: *x\n", "r.yaml:2: not valid YAML: aliases"),
        ("seed: " + "[" * 5000 + "]" * 5000, "r.yaml:1: not valid YAML: nested deeper than 20"),
        ("seed: " + "{a: " * 5000, "r.yaml:1: not valid YAML: nested deeper than 20"),
        ("seed: " + "9" * 5000, "r.yaml:1: "),
        ("# " + "x" * MAX_BYTES, f"r.yaml: larger than {MAX_BYTES} bytes"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else None,
)
def test_a_hostile_recipe_is_refused_at_once(tmp_path, monkeypatch, text, said):
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(text)
    began = time.process_time()
    with pytest.raises(UserError) as caught:
        load_recipe("ppo", "r.yaml", [])
    assert said in str(caught.value) and len(str(caught.value)) < 1000
    assert time.process_time() - began < 10, "seconds, where an expanded bomb takes hours"
    assert [path.name for path in tmp_path.iterdir()] == ["r.yaml"]


def test_a_hostile_override_is_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(RECIPE)
    hostile = "!!python/object/apply:os.system ['touch CANARY']"
    assert load_recipe("ppo", "r.yaml", [f"output_dir={hostile}"])[1].output_dir == hostile
    inputs, _ = load_recipe("ppo", "r.yaml", [f"prompts=[{hostile}]"])
    assert inputs["prompts"] == f"[{hostile}]" and not Path("CANARY").exists()


# -------------------------------------------------------------------------------------------------------------- models


class Canary:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny.llama().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(model_folder, tmp_path) -> Path:
    return Path(shutil.copytree(model_folder, tmp_path / "m"))


def test_the_canary_sings(tmp_path):
    pickle.loads(pickle.dumps(Canary(tmp_path / "CANARY")))  # noqa: S301
    assert (tmp_path / "CANARY").exists()


@pytest.mark.parametrize("load", [load_policy, load_reward_model, lambda source: check_source(source, "policy")])
def test_code_that_comes_with_a_model_does_not_run(folder, load):
    canary = folder / "CANARY"
    (folder / "custom.py").write_text(f"import pathlib\npathlib.Path({str(canary)!r}).touch()\nclass C: pass\n")
    config = json.loads((folder / "config.json").read_text())
    parts = ("AutoConfig", "AutoModelForCausalLM", "AutoModelForSequenceClassification")
    config |= {"model_type": "custom", "auto_map": {part: "custom.C" for part in parts}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as caught:
        load(str(folder))
    assert not canary.exists() and str(folder) in str(caught.value)


def test_code_that_comes_with_a_tokenizer_does_not_run(folder):
    canary = folder / "CANARY"
    (folder / "custom.py").write_text(f"import pathlib\npathlib.Path({str(canary)!r}).touch()\nclass C: pass\n")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "C", "auto_map": {"AutoTokenizer": [None, "custom.C"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    try:
        load_tokenizer(str(folder))
    except UserError as error:
        assert "cannot load" in str(error)
    assert not canary.exists() and "custom" not in sys.modules


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.bin", "training_args.bin", "optimizer.pt", "rng_state.pth"]
)
def test_pickles_in_a_model_folder_are_not_read(folder, name):
    """Beside safetensors they are ignored; in their place they are refused."""
    canary = folder / "CANARY"
    torch.save({"weight": Canary(canary)}, folder / name)
    load_policy(str(folder))
    assert not canary.exists()
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="policy"):
        load_policy(str(folder))
    assert not canary.exists()


def test_an_honest_pickle_is_refused_too(folder):
    """Weights are read from safetensors or GGUF only: whether a pickle is honest cannot be known before it is read."""
    torch.save(tiny.llama().state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="safetensors"):
        load_policy(str(folder))


def test_a_chat_template_from_a_model_cannot_reach_python(folder, tmp_path, capsys):
    """jinja runs in transformers' sandbox: the attempt is an error or text, never a call."""
    canary = tmp_path / "CANARY"
    template = "{{ cycler.__init__.__globals__.os.system('touch " + str(canary) + "') }}{{ messages[0].content }}"
    (folder / "chat_template.jinja").write_text(template)
    code = main(["generate", str(folder), "--prompt", "x", "--max-new-tokens", "2"])
    assert not canary.exists() and code in (0, 2), capsys.readouterr().err


def test_transformers_is_new_enough_for_these_promises():
    assert tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 11)
