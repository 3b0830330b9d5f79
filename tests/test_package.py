from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

import operant

ROOT = Path(__file__).parent.parent


def test_public_names_are_sorted_and_load() -> None:
    assert operant.__all__ == sorted(operant.__all__)
    for name in operant.__all__:
        assert getattr(operant, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = operant.nothing


def test_importing_the_package_loads_no_heavy_library() -> None:
    code = "import sys, operant; print(sorted({'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_help_loads_no_torch() -> None:
    code = (
        "import sys\nfrom operant.cli import main\nsys.argv = ['operant', '--help']\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "train" in done.stdout


def test_every_module_imports_on_its_own() -> None:
    for path in sorted((ROOT / "operant").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        module = import_module(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
        assert module.__doc__, f"{module.__name__} does not say what it is"


def test_every_dependency_is_pinned_to_a_version_that_the_bound_allows() -> None:
    pins = dict(re.findall(r"^([\w.-]+)==([\w.]+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    pins = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    ours = [requirement for name in ("dev", "gym", "korean", "live", "postgres") for requirement in extras[name]]
    for requirement in project["dependencies"] + ours:
        name, bound = re.fullmatch(r"([\w-]+)(?:\[[\w,]+\])?(?:>=([\d.]+))?", requirement).groups()
        if name == "operant":
            continue
        assert name in pins, f"{name} is not in constraints.txt"
        assert [int(n) for n in pins[name].split(".")[:3]] >= [int(n) for n in bound.split(".")], requirement


def test_the_architecture_tree_names_every_module() -> None:
    tree = (ROOT / "README.md").read_text("utf-8"), (ROOT / "README.zh-CN.md").read_text("utf-8")
    for path in (ROOT / "operant").iterdir():
        if path.name.startswith("_") or path.name == "py.typed":
            continue
        name = f"{path.name}/" if path.is_dir() else path.name
        assert all(name in text for text in tree), f"{name} is missing from the tree in README.md or README.zh-CN.md"


def test_the_reference_is_what_the_program_says_today() -> None:
    spec = importlib.util.spec_from_file_location("reference_page", ROOT / "docs" / "reference.py")
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    assert (ROOT / "docs" / "reference.md").read_text("utf-8") == page.reference(), "run `make docs`"
