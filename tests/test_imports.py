"""Who may import whom, and what an import costs: one direction, no circle, no torch before it is needed."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

import fastrlhf

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fastrlhf"
KERNELS = ROOT / "kernels" / "fastrlhf_kernels"
# A room is a folder, or a file that stands alone. Each may import what stands right of it, never what stands left.
RULE = (
    ("__main__",),
    ("cli",),
    ("quickstart",),
    ("label", "eval"),
    ("inference", "convert", "report", "plan", "doctor"),  # verbs of their own, never imported by training
    ("ppo", "reward_model", "sft"),
    ("supervised",),
    ("trainer",),
    ("preflight",),
    ("eval_metrics", "agreement", "reward"),
    ("rl",),
    ("rollout",),
    ("models",),
    ("parallel",),
    ("runtime",),
    ("checkpoint",),
    ("data",),
    ("config",),
    ("_version",),
)
FLOOR = {room: floor for floor, rooms in enumerate(RULE) for room in rooms}
NO_ROOMS = {"__init__", "recipes"}  # the lazy public names; data, and a reward function that a recipe names
TRAINING = ("ppo", "reward_model", "sft")
VERB_FOLDERS = (
    "fastrlhf.report",
    "fastrlhf.quickstart",
    "fastrlhf.label",
    "fastrlhf.eval",
)  # a verb is its folder's `main`
USERS_OF_KERNELS = {"models", "rollout", "rl", "plan", "doctor"}  # the last two plan and check them
FILES_IN_A_FOLDER = range(4, 14)
REPORT_NEEDS = {"fastrlhf", "jinja2"}
HEAVY = ("torch", "transformers", "datasets", "pydantic", "yaml", "rich", "jinja2", "numpy", "triton")


@functools.cache
def imports(source: str, module: str, *, package: bool = False) -> frozenset[str]:
    """Absolute names of everything a module imports, inside functions too; `from a import b` gives a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".")
            here = parts[: len(parts) - node.level + package] if node.level else []
            base = ".".join([*here, *([node.module] if node.module else [])])
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found |= {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
    return frozenset(found)


def modules() -> dict[str, Path]:
    """Dotted name -> file of every module of fastrlhf; a folder's `__init__` under the folder's own name."""
    files = PACKAGE.rglob("*.py")
    return {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in files}


def file_graph() -> dict[str, set[str]]:
    """Module -> modules of fastrlhf that it imports."""
    found = modules()
    edges = {}
    for name, path in found.items():
        package = path.name == "__init__.py"
        edges[name] = {i for i in imports(path.read_text(encoding="utf-8"), name, package=package) if i in found}
    return edges


def room(module: str) -> str:
    """fastrlhf.ppo -> ppo, fastrlhf.rl.learner -> rl, fastrlhf itself -> __init__."""
    return module.split(".")[1] if "." in module else "__init__"


def graph() -> dict[str, set[str]]:
    """Room -> rooms that it imports; `fastrlhf` alone in `from fastrlhf.rl import critic` is no import of a room."""
    edges: dict[str, set[str]] = {room(module): set() for module in modules()}
    for module, imported in file_graph().items():
        edges[room(module)] |= {room(i) for i in imported if "." in i} - {room(module)}
    return {name: others for name, others in edges.items() if name not in NO_ROOMS}


def circle(edges: dict[str, set[str]]) -> list[str]:
    """One circle of a graph, or []."""
    done: set[str] = set()

    def walk(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        found = next((c for c in (walk(n, [*path, node]) for n in sorted(edges[node])) if c), [])
        done.add(node)
        return found

    return next((c for c in (walk(node, []) for node in sorted(edges)) if c), [])


def reachable(edges: dict[str, set[str]], start: str) -> set[str]:
    seen, todo = set(), [start]
    while todo:
        for node in edges[todo.pop()] - seen:
            seen.add(node)
            todo.append(node)
    return seen


def test_the_finders_find():
    source = "import a.b\nfrom c import d\nfrom . import e\nfrom .f import g\nimportlib.import_module('h')"
    found = {"a.b", "c", "c.d", "p", "p.e", "p.f", "p.f.g", "h"}
    assert imports(source, "p.m") == found == imports(source, "p", package=True)
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_there_is_no_circle():
    assert circle(graph()) == []
    inner = {
        module: {i for i in imported if not module.startswith(f"{i}.")} for module, imported in file_graph().items()
    }
    assert circle(inner) == []


def test_every_room_imports_only_what_stands_right_of_it():
    for name, imported in graph().items():
        wrong = {other for other in imported if FLOOR[other] <= FLOOR[name]}
        assert not wrong, f"{name} imports {wrong}, which stands left of it or beside it"


def test_nothing_is_imported_from_the_init_of_a_folder():
    """`from fastrlhf.rl import critic` names a file; a name of an `__init__` would tie its files together."""
    known = modules()
    folders = {m for m, p in known.items() if p.name == "__init__.py" and room(m) not in ("report", "quickstart")}
    for module, path in known.items():
        found = imports(path.read_text(encoding="utf-8"), module, package=path.name == "__init__.py")
        from_init = {i for i in found if i.rpartition(".")[0] in folders and i not in known}
        assert room(module) in NO_ROOMS | {"cli"} or not from_init, f"{module} imports {from_init}"


def test_folders_hold_four_to_thirteen_files():
    for folder in {path.parent for path in PACKAGE.rglob("*.py")} - {PACKAGE, PACKAGE / "recipes"}:
        count = len([path for path in folder.glob("*.py") if path.name != "__init__.py"])
        assert count in FILES_IN_A_FOLDER, f"{folder.name} holds {count} files"


def test_training_never_reaches_a_verb_of_its_own():
    edges = graph()
    for stage in TRAINING:
        assert not {n for n in reachable(edges, stage) if FLOOR[n] < FLOOR[stage]}
    for path in (PACKAGE / "report").glob("*.py"):
        third_party = {n.split(".")[0] for n in imports(path.read_text(encoding="utf-8"), "fastrlhf.report")}
        assert third_party - set(sys.stdlib_module_names) - {"__future__"} <= REPORT_NEEDS, path.name


def test_only_the_maths_imports_the_kernels():
    users = {
        room(module)
        for module, path in modules().items()
        if any(n.split(".")[0] == "fastrlhf_kernels" for n in imports(path.read_text(encoding="utf-8"), "fastrlhf.x"))
    }
    assert users == USERS_OF_KERNELS


@pytest.mark.parametrize("path", sorted(KERNELS.rglob("*.py")), ids=lambda path: path.name)
def test_kernels_import_torch_triton_and_the_standard_library_only(path):
    module = ".".join(path.relative_to(KERNELS.parent).with_suffix("").parts)
    found = {n.split(".")[0] for n in imports(path.read_text(encoding="utf-8"), module)}
    allowed = {"torch", "triton", "fastrlhf_kernels", "__future__", *sys.stdlib_module_names}
    assert found <= allowed, found - allowed


def test_the_kernels_folder_is_no_package():
    """`kernels` is the import name of another library, which transformers imports."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded_by(code: str) -> set[str]:
    report = f"; import sys; print('LOADED', *[m for m in {HEAVY!r} if m in sys.modules])"
    return set(python(code + report).rpartition("LOADED")[2].split())


@pytest.mark.parametrize(
    "code",
    [
        "import fastrlhf",
        "import fastrlhf; fastrlhf.__version__; dir(fastrlhf)",
        "from fastrlhf.cli import main; main(['--help'])",
        "from fastrlhf.cli import main; main([])",
        "from fastrlhf.cli import main; main(['--version'])",
    ],
)
def test_import_and_help_load_nothing_heavy(code):
    assert loaded_by(code) == set()


@pytest.mark.parametrize(
    "code",
    [
        "import fastrlhf; fastrlhf.PPOConfig(kl_coef=0.1)",
        "from fastrlhf.cli import main; main(['ppo', '--help'])",
        "from fastrlhf.cli import main; main(['ppo', 'no-such-recipe'])",
    ],
)
def test_configs_and_the_help_of_a_stage_load_no_torch(code):
    assert loaded_by(code) <= {"pydantic", "yaml"}


def test_the_report_is_drawn_without_torch():
    assert not loaded_by("import fastrlhf.report") & {"torch", "transformers", "datasets"}


def test_public_names_are_there():
    assert sorted(fastrlhf.__all__) == sorted({*fastrlhf._HOME, "__version__"}) == dir(fastrlhf)
    for public in fastrlhf.__all__:
        assert getattr(fastrlhf, public) is not None
    with pytest.raises(AttributeError, match="no attribute 'PPOTrainr'"):
        fastrlhf.PPOTrainr  # noqa: B018
