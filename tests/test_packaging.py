"""The wheel: two import packages, their data, nothing else; it runs from another folder."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fastrlhf

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, so that the working tree keeps no build/ folder."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("fastrlhf", "kernels", "tests", "docs"):
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), "."]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def metadata(wheel) -> str:
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(f"fastrlhf-{fastrlhf.__version__}.dist-info/METADATA").decode()


@pytest.fixture(scope="module")
def files(wheel) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_top_level_is_our_two_packages(files):
    """`kernels` in particular is another library's import name."""
    info = f"fastrlhf-{fastrlhf.__version__}.dist-info"
    assert {name.split("/")[0] for name in files} == {"fastrlhf", "fastrlhf_kernels", info}


def test_every_source_file_is_in_the_wheel(files):
    for base in (ROOT, ROOT / "kernels"):
        for path in base.glob("fastrlhf*/**/*.py"):
            assert path.relative_to(base).as_posix() in files


def test_data_is_in_the_wheel(files):
    assert {"fastrlhf/py.typed", "fastrlhf_kernels/py.typed"} <= files
    data = [*(ROOT / "fastrlhf/recipes").glob("*.yaml"), *(ROOT / "fastrlhf/quickstart").rglob("*.[jy][sa][om]*")]
    data += [*(ROOT / "fastrlhf/report/templates").iterdir(), *(ROOT / "fastrlhf/label/page").iterdir()]
    assert {"recipes", "data", "templates", "page"} <= {path.parent.name for path in data}
    for path in data:
        assert path.relative_to(ROOT).as_posix() in files, path


def test_it_runs_from_the_wheel_alone(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = (
        "import fastrlhf, fastrlhf_kernels, pathlib\n"
        "from fastrlhf.config.recipe import packaged_recipes, read_recipe, RECIPES\n"
        f"root = pathlib.Path({str(tmp_path)!r})\n"
        "assert all(root in pathlib.Path(m.__file__).parents for m in (fastrlhf, fastrlhf_kernels))\n"
        "from fastrlhf.quickstart.content import shipped\n"
        "from fastrlhf.report import build_report\n"
        "assert shipped('sft')\n"
        "pathlib.Path('metrics.jsonl').write_text('{\"step\": 1, \"loss/train\": 0.5}')\n"
        "assert '</svg>' in build_report('.').read_text()\n"
        "assert packaged_recipes() and all(read_recipe(RECIPES / f'{n}.yaml') for n in packaged_recipes())\n"
        "print(fastrlhf.__version__)"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and done.stdout.strip() == fastrlhf.__version__, done.stderr


def test_the_wheel_says_what_it_is(wheel, metadata):
    assert f"Version: {fastrlhf.__version__}\n" in metadata and "License-Expression: Apache-2.0\n" in metadata
    for extra in ("8bit", "flash", "lora", "gguf", "tensorboard", "track", "triton", "label", "test"):
        assert f"Provides-Extra: {extra}\n" in metadata
    with zipfile.ZipFile(wheel) as archive:
        (scripts,) = [archive.read(n).decode() for n in archive.namelist() if n.endswith("entry_points.txt")]
    assert "fastrlhf = fastrlhf.cli:main" in scripts


def test_a_plain_install_brings_neither_triton_nor_tensorboard(metadata):
    """torch for CUDA brings its own triton; a CPU has no use for that gigabyte. The tests want both."""
    needs = [
        line.removeprefix("Requires-Dist: ") for line in metadata.splitlines() if line.startswith("Requires-Dist: ")
    ]
    base = {re.match(r"[\w.-]+", line)[0] for line in needs if "extra ==" not in line}
    assert "torch" in base and not base & {"triton", "tensorboard"}
    for name in ("triton", "tensorboard"):
        extras = [re.search(r'extra == "(\w+)"', line)[1] for line in needs if line.startswith(name)]
        assert sorted(extras) == sorted([name, "test"])
    for place in ("POSIX :: Linux", "MacOS"):
        assert f"Classifier: Operating System :: {place}\n" in metadata


def test_a_stage_runs_without_triton_and_tensorboard(tmp_path):
    code = (
        "import sys\n"
        "sys.modules.update(triton=None, tensorboard=None)\n"
        "from tests import tiny\n"
        "tiny.llama().save_pretrained('base'); tiny.tokenizer().save_pretrained('base')\n"
        'open(\'d.jsonl\', \'w\').write(\'{"prompt": "the cat", "response": "yes"}\\n\' * 4)\n'
        "from fastrlhf import cli\n"
        "fields = 'model=base data=d.jsonl output_dir=out total_steps=1 mini_batch_size=2 max_tokens=64'\n"
        "sys.exit(cli.main(['sft', *fields.split()]))"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/final/model.safetensors").is_file()
    assert done.stdout.count("fastrlhf[tensorboard]") == 1


def test_the_changelog_and_the_version_agree():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## \[([^\]]+)\]", text, re.MULTILINE)
    assert versions[0] in ("Unreleased", fastrlhf.__version__)


def test_every_third_party_import_is_declared(metadata):
    """What the package imports at run time is a dependency or an extra."""
    from tests.test_imports import imports  # the finder and its own test live there

    found = set()
    for base in (ROOT, ROOT / "kernels"):
        for path in base.glob("fastrlhf*/**/*.py"):
            module = ".".join(path.relative_to(base).with_suffix("").parts)
            found |= {n.split(".")[0] for n in imports(path.read_text(encoding="utf-8"), module)}
    third_party = found - set(sys.stdlib_module_names) - {"fastrlhf", "fastrlhf_kernels", "__future__"}
    declared = {n.lower().replace("-", "_") for n in re.findall(r"^Requires-Dist: ([\w.-]+)", metadata, re.MULTILINE)}
    provides = {"yaml": "pyyaml", "sklearn": "scikit_learn"}
    # typing_extensions comes with pydantic, numpy, packaging and tokenizers with transformers, huggingface_hub and
    # pyarrow with datasets.
    missing = {n for n in third_party if provides.get(n, n) not in declared} - {
        "numpy",
        "typing_extensions",
        "packaging",
        "tokenizers",
        "huggingface_hub",
        "pyarrow",
    }
    assert missing == set()
