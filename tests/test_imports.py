"""Who may import whom, and what an import costs: one direction, no circle, no torch before it is needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fastrlhf

ROOT = Path(__file__).parents[1]
KERNELS = ROOT / "kernels" / "fastrlhf_kernels"
STAGES = {"sft", "reward_model", "ppo"}
TOP = {"cli", "__main__"}  # may import anything; imported by nothing
VERBS = STAGES | {"report", "quickstart", "inference", "dry_run"}  # imported by the command line only
MAY_IMPORT_VERBS = {"cli": VERBS, "__main__": VERBS, "quickstart": STAGES | {"report"}}
USERS_OF_KERNELS = {
    "cached_attention",
    "decoding",
    "learner",
    "rollout",
    "models",
    "sft",
    "advantages",
    "kl_loss",
    "sequence_ratio",
}
REPORT_NEEDS = {"fastrlhf", "matplotlib"}
HEAVY = ("torch", "transformers", "datasets", "pydantic", "yaml", "rich", "matplotlib", "numpy", "triton")


def imports(source: str, module: str, *, package: bool = False) -> set[str]:
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
    return found


def noun(path: Path, base: Path) -> str:
    """fastrlhf/ppo.py -> ppo; a folder is one noun: fastrlhf/quickstart/judge.py -> quickstart."""
    return path.relative_to(base).parts[0].removesuffix(".py")


def graph() -> dict[str, set[str]]:
    """noun -> nouns of fastrlhf that it imports (the package's own __init__, which is lazy, is left out)."""
    base = ROOT / "fastrlhf"
    edges: dict[str, set[str]] = {noun(path, base): set() for path in base.rglob("*.py")}
    for path in base.rglob("*.py"):
        here = noun(path, base)
        if here == "__init__":
            continue
        dotted = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for name in imports(path.read_text(encoding="utf-8"), dotted, package=path.name == "__init__.py"):
            parts = name.split(".")
            if parts[0] == "fastrlhf" and len(parts) > 1 and parts[1] in edges and parts[1] != here:
                edges[here].add(parts[1])
    return edges


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


def test_no_stage_imports_a_stage_and_nothing_below_imports_a_verb():
    for name, imported in graph().items():
        assert not imported & TOP or name == "__main__", f"{name} imports the command line"
        assert imported & VERBS <= MAY_IMPORT_VERBS.get(name, set()), f"{name} imports {imported & VERBS}"


def test_training_never_reaches_the_report():
    edges = graph()
    for stage in STAGES & set(edges):
        assert not {n for n in reachable(edges, stage) if n.startswith("report")}
    for path in (ROOT / "fastrlhf").glob("report*.py"):
        third_party = {n.split(".")[0] for n in imports(path.read_text(encoding="utf-8"), "fastrlhf.report")}
        assert third_party - set(sys.stdlib_module_names) - {"__future__"} <= REPORT_NEEDS, path.name


def test_only_the_maths_imports_the_kernels():
    users = {
        noun(path, ROOT / "fastrlhf")
        for path in (ROOT / "fastrlhf").rglob("*.py")
        if any(n.split(".")[0] == "fastrlhf_kernels" for n in imports(path.read_text(encoding="utf-8"), "fastrlhf.x"))
    }
    assert users <= USERS_OF_KERNELS


@pytest.mark.parametrize("path", sorted(KERNELS.rglob("*.py")), ids=lambda path: path.name)
def test_kernels_import_torch_triton_and_the_standard_library_only(path):
    found = {n.split(".")[0] for n in imports(path.read_text(encoding="utf-8"), f"fastrlhf_kernels.{path.stem}")}
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


def test_the_kernels_work_without_everything_else():
    blocked = ("triton", "transformers", "datasets", "bitsandbytes", "flash_attn", "pydantic", "fastrlhf")
    python(
        f"import sys; sys.modules.update(dict.fromkeys({blocked!r}))\n"
        "import torch, fastrlhf_kernels as k\n"
        "z = torch.randn(3, 7); assert k.token_log_probs(z, torch.tensor([0, 1, 2])).shape == (3,)\n"
    )


def test_public_names_are_there():
    assert sorted(fastrlhf.__all__) == sorted({*fastrlhf._HOME, "__version__"}) == dir(fastrlhf)
    for public in fastrlhf.__all__:
        assert getattr(fastrlhf, public) is not None
    with pytest.raises(AttributeError, match="no attribute 'PPOTrainr'"):
        fastrlhf.PPOTrainr  # noqa: B018
