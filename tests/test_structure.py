"""No construct that hides a failure, and a list of what grew long: what keeps the code readable is counted."""

from __future__ import annotations

import ast
import functools
import inspect
import io
import os
import re
import shutil
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

import fastrlhf
import fastrlhf_kernels
from tests.conftest import LONG

ROOT = Path(__file__).parents[1]
FILE_LINES, FUNCTION_LINES = 500, 60
SHIPPED = [*(ROOT / "fastrlhf").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
SOURCES = SHIPPED + [
    path for folder in ("tests", "bench") for path in (ROOT / folder).rglob("*.py") if ".venvs" not in path.parts
]
BOUNDARY = "fastrlhf/config/outcome.py"  # where code of others is called, which may raise anything
# Where an environment variable may be read, and which.
ENVIRONMENT = {
    "fastrlhf/config/inputs.py": {"FASTRLHF_USE_MODELSCOPE"},
    "fastrlhf/runtime/console.py": {"NO_COLOR", "TERM"},
    "fastrlhf/runtime/launch.py": {
        "WORLD_SIZE",
        "RANK",
        "LOCAL_RANK",
        "TORCHELASTIC_RESTART_COUNT",
        "TORCHELASTIC_MAX_RESTARTS",
    },
    "fastrlhf/runtime/regions.py": {"CC", "CXX"},  # as triton and torch read them
    "kernels/fastrlhf_kernels/backend.py": {"FASTRLHF_BACKEND", "TRITON_INTERPRET"},
}


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def is_triton_kernel(function: ast.AST) -> bool:
    return any("jit" in ast.unparse(decorator) for decorator in getattr(function, "decorator_list", []))


def long_ones() -> list[str]:
    """Files over FILE_LINES, functions over FUNCTION_LINES; the lines of docstrings and Triton kernels do not count."""
    found = []
    for path in SOURCES:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        found += [f"{name(path)}: {lines} lines"] if lines > FILE_LINES else []
        found += [f"{name(path)}: {text}" for text in long_functions(tree(path))]
    return found


def long_functions(module: ast.Module) -> list[str]:
    found, nodes = [], list(module.body)
    for node in nodes:
        if not hasattr(node, "body") or _lines(node) <= FUNCTION_LINES:  # what it holds is shorter still
            continue
        nodes += [inner for name in ("body", "orelse", "finalbody") for inner in getattr(node, name, [])]
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        first = node.body[0]
        lines = _lines(node) - (_lines(first) if ast.get_docstring(node) is not None else 0)
        found += [f"{node.name}, {lines} lines"] if lines > FUNCTION_LINES and not is_triton_kernel(node) else []
    return found


def _lines(node: ast.stmt) -> int:
    return node.end_lineno - node.lineno + 1


def test_long_files_and_functions_are_listed_for_a_reader_to_look_at(capsys):
    """A list, not a limit: a hundred lines that belong together are not three files of thirty."""
    with capsys.disabled():
        for line in long_ones():
            print(f"\nlong, to look at: {line}", end="")


def test_the_counter_counts():
    body = "\n".join("    x = 1" for _ in range(FUNCTION_LINES - 1))
    assert long_functions(ast.parse(f"def f():\n{body}\n    y = 2")) == ["f, 61 lines"]
    assert long_functions(ast.parse(f"def f():\n{body}")) == []
    assert long_functions(ast.parse(f'def f():\n    """a\n    b"""\n{body}')) == []
    assert long_functions(ast.parse(f"@triton.jit\ndef f():\n{body}\n    y = 2")) == []


def blind_handlers(module: ast.Module) -> list[int]:
    blind = {"Exception", "BaseException"}
    return [
        node.lineno
        for node in ast.walk(module)
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or blind & {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)})
    ]


@pytest.mark.parametrize("path", SHIPPED, ids=name)
def test_no_failure_is_swallowed(path):
    """No blind except but where code of others runs, no `except: pass`, no assert for what a user can cause, no
    deferred work."""
    module = tree(path)
    assert len(blind_handlers(module)) == (2 if name(path) == BOUNDARY else 0)
    silent = [
        node.lineno
        for node in ast.walk(module)
        if isinstance(node, ast.ExceptHandler) and all(isinstance(line, ast.Pass) for line in node.body)
    ]
    assert silent == [], "an exception that is ignored needs contextlib.suppress, which names it"
    comments = [
        token.string
        for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline)
        if token.type == tokenize.COMMENT
    ]
    assert [c for c in comments if re.search(r"\b(TODO|FIXME|XXX|HACK)\b", c)] == []
    assert [n.lineno for n in ast.walk(module) if isinstance(n, ast.Raise) and "NotImplemented" in ast.unparse(n)] == []


def test_the_blind_except_finder_finds():
    for clause in ("except:", "except Exception:", "except (OSError, BaseException) as e:"):
        assert blind_handlers(ast.parse(f"try:\n    x\n{clause}\n    y"))
    assert not blind_handlers(ast.parse("try:\n    x\nexcept (OSError, ValueError):\n    y"))


def environment_reads(module: ast.Module) -> set[str]:
    """Names given to os.environ[...], os.environ.get(...), os.getenv(...); "?" where it is no constant."""
    names = set()
    for node in ast.walk(module):
        read = getattr(node, "func" if isinstance(node, ast.Call) else "value", None)
        if not isinstance(node, (ast.Call, ast.Subscript)) or not isinstance(read, (ast.Name, ast.Attribute)):
            continue
        asked = r"(os\.)?(environ\.\w+|getenv)" if isinstance(node, ast.Call) else r"(os\.)?environ"
        if re.fullmatch(asked, ast.unparse(read)):
            key = node.args[0] if isinstance(node, ast.Call) and node.args else getattr(node, "slice", None)
            names.add(key.value if isinstance(key, ast.Constant) else "?")
    return names


@pytest.mark.parametrize("path", SHIPPED, ids=name)
def test_the_environment_is_read_in_few_places(path):
    assert environment_reads(tree(path)) <= ENVIRONMENT.get(name(path), set())
    if name(path) != "fastrlhf/cli.py":
        arguments = [n for n in ast.walk(tree(path)) if isinstance(n, ast.Attribute) and n.attr == "argv"]
        assert "sys.argv" not in map(ast.unparse, arguments)


def test_the_environment_finder_finds():
    code = "os.environ['A']\nos.environ.get('B', 1)\nos.getenv('C')\nenviron[x]\nother.get('D')"
    assert environment_reads(ast.parse(code)) == {"A", "B", "C", "?"}


def public() -> list[tuple[str, object]]:
    """What `import fastrlhf` and `import fastrlhf_kernels` offer, with the methods of its classes."""
    offered = [(f"{m.__name__}.{n}", getattr(m, n)) for m in (fastrlhf, fastrlhf_kernels) for n in m.__all__]
    found = [(n, thing) for n, thing in offered if callable(thing)]
    for n, thing in list(found):
        if inspect.isclass(thing) and thing.__module__.startswith("fastrlhf"):
            found += [(f"{n}.{k}", v) for k, v in vars(thing).items() if inspect.isfunction(v) and k[0] != "_"]
    return found


@pytest.mark.parametrize(("where", "thing"), public(), ids=[n for n, _ in public()])
def test_what_is_public_is_documented_and_typed(where, thing):
    if where.count(".") == 1:  # methods may speak for themselves
        assert (inspect.getdoc(thing) or "").strip(), "a docstring says shapes, units and errors"
    if inspect.isfunction(thing):
        signature = inspect.signature(thing)
        untyped = [p.name for p in signature.parameters.values() if p.annotation is p.empty and p.name != "self"]
        assert untyped == [] and signature.return_annotation is not signature.empty


def test_tests_do_not_mock_our_own_code():
    """A test that replaces what it tests proves nothing."""
    for path in (ROOT / "tests").rglob("*.py"):
        imported = {alias.name for node in ast.walk(tree(path)) if isinstance(node, ast.Import) for alias in node.names}
        froms = {node.module for node in ast.walk(tree(path)) if isinstance(node, ast.ImportFrom)}
        assert not {m for m in imported | froms if m and m.startswith(("unittest.mock", "mock", "pytest_mock"))}, name(
            path
        )


def test_the_files_that_begin_first_are_there():
    assert LONG and [path for path in LONG if not path.is_file()] == []


@pytest.mark.parametrize(("required", "outcome"), [("1", "1 skipped, 1 error"), ("0", "2 skipped")])
def test_a_skipped_test_of_the_real_thing_fails_where_it_is_required(tmp_path, required, outcome):
    """What .ci/run relies on: FASTRLHF_REQUIRE_REAL=1 forbids to skip a test marked real, and no other."""
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = real: x\n")
    skip = "@pytest.mark.skipif(True, reason='absent')\ndef test_{}(): ...\n"
    (tmp_path / "test_it.py").write_text(
        f"import pytest\n@pytest.mark.real\n{skip.format('real')}{skip.format('other')}"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    environment = os.environ | {"FASTRLHF_REQUIRE_REAL": required, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert outcome in done.stdout and done.returncode == int(required), done.stdout
