"""The benchmarks measure for hours, so what is tested here is that they would start."""

from __future__ import annotations

import ast
import importlib
import importlib.util
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


def test_mutants_change_what_runs_and_leave_documentation_types_and_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.mutants import changes, mutated, places

    source = """
'''1'''
Kinds = Literal[2]
def f(x: int = 3) -> Literal[4]:
    '''5'''
    assert x != 6, "x is 6"
    if x < 7:
        raise ValueError(f"{x + 8}")
    x.clamp(min=9)
    return not x
"""
    tree = ast.parse(source)
    found = [mutated("f.py", tree, place, new) for place in places(tree) for new in changes(place[0])]
    assert [mutant.change.split("  →  ") for mutant in found] == [
        ["3", "4"],
        ["if x < 7:", "if not x < 7:"],
        ["x < 7", "x <= 7"],
        ["7", "8"],
        ["x.clamp(min=9)", "deleted"],
        ["x.clamp(min=9)", "x.clamp()"],
        ["x.clamp(min=9)", "x"],
        ["9", "10"],
        ["not x", "x"],
    ]
    assert len({mutant.source for mutant in found}) == len(found)
    assert [mutant.lines for mutant in found[:3]] == [(4, 10), (7, 7), (7, 7)]


def test_the_seed_decides_which_mutants_there_are_and_one_is_imported_in_place_of_its_module(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.mutants import TARGETS, TESTS, Mutant, Mutated, chosen

    first = chosen(seed=1, count=12)
    assert first == chosen(seed=1, count=12) != chosen(seed=2, count=12)
    assert len(first) == 12 and {mutant.file for mutant in first} == set(TARGETS)
    for mutant in first:
        assert mutant.source != ast.unparse(ast.parse((ROOT / mutant.file).read_text("utf-8")))
        compile(mutant.source, mutant.file, "exec")
    finder = Mutated(Mutant("operant/types.py", 1, "", "Batch = 'changed'", (1, 1)))
    assert finder.find_spec("operant.config", None) is None
    spec = finder.find_spec("operant.types", None)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.Batch == "changed" and module.__file__ == str(ROOT / "operant" / "types.py")
    assert all((ROOT / line).exists() for line in TESTS.read_text("utf-8").splitlines())
