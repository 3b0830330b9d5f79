"""The benchmarks measure for hours, so what is tested here is that they would start."""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
NAMES = sorted(file.stem for file in (ROOT / "benchmarks").glob("*.py") if file.stem != "__init__")


@pytest.fixture
def benchmark(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT))
    try:
        return importlib.import_module(f"benchmarks.{request.param}")
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in ("benchmarks", "operant"):
            raise
        pytest.skip(f"{error.name} is not installed")


@pytest.mark.parametrize("benchmark", NAMES, indirect=True)
def test_a_benchmark_finds_what_it_imports_also_late(benchmark: Any) -> None:
    """The imports inside functions too: they run only after a model has been trained."""
    tree = ast.parse(Path(benchmark.__file__).read_text(encoding="utf-8"))
    asked = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    for node in asked:
        if str(node.module).split(".")[0] in ("benchmarks", "operant"):
            module = importlib.import_module(str(node.module))
            for name in node.names:
                assert hasattr(module, name.name), f"line {node.lineno}: {node.module} has no {name.name}"


@pytest.mark.parametrize("benchmark", NAMES, indirect=True)
def test_a_benchmark_says_what_it_does(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert benchmark.__doc__
    if not hasattr(benchmark, "main"):
        return
    monkeypatch.setattr(sys, "argv", [benchmark.__name__, "--help"])
    with pytest.raises(SystemExit) as left:
        benchmark.main()
    assert left.value.code == 0 and "usage" in capsys.readouterr().out


def test_no_benchmark_imports_one_that_imports_it() -> None:
    """Also late: a circle that rests on an import inside a function is a circle."""
    imports: dict[str, set[str]] = {}
    for name in NAMES:
        tree = ast.parse((ROOT / "benchmarks" / f"{name}.py").read_text(encoding="utf-8"))
        imports[name] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module == "benchmarks":
                imports[name] |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and str(node.module).startswith("benchmarks."):
                imports[name].add(str(node.module).split(".")[1])
    while imports:
        ends = {name for name, others in imports.items() if not others & imports.keys()}
        assert ends, f"these import each other: {sorted(imports)}"
        imports = {name: others for name, others in imports.items() if name not in ends}
