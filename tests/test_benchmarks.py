"""The benchmarks measure for hours, so what is tested here is that they would start."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import re
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


@pytest.mark.parametrize("benchmark", ["live"], indirect=True)
def test_the_live_benchmark_tells_latency_memory_disk_and_chats_of_a_model(benchmark: Any, tmp_path: Path) -> None:
    from benchmarks.cells import Records

    two = {"p50": 2.0, "p95": 4.0, "max": 4.0, "count": 2}
    size = {name: {"rss": 900.0, "pss": 700.0} for name in ("server", "learner", "together")}
    one = {"cold": {"total": 7.0}, "disk_mb": 13.0, "peak_mb": size, "others": 0.5, "load": [1.0, 3.0]}
    click = {
        "seconds": {"total": two, "received→queued": two}, "states": {"used": 2}, "tokens": two | {"p50": 60.0},
        "rounds": [one, one | {"disk_mb": 15.0, "cold": {"total": 9.0}}], "command": "click", "time": 1.0,
    }  # fmt: skip
    each = {"alone": [0.0], "learning": [1.0]}
    latency = {
        "alone": two, "learning": two | {"p95": 6.0}, "ratios": [{"p50": 1.0, "p95": 1.5}, {"p50": 1.0, "p95": 1.2}],
        "rate": 0.5, "versions_a_minute": 3.0, "load": each, "others": each, "command": "chats", "time": 2.0,
    }  # fmt: skip
    for name, cells in (("before", {"click": click, "latency": latency}), ("after", {"click": click | {"time": 3.0}})):
        for cell, record in cells.items():
            Records(tmp_path / name).put(cell, record)
    told = benchmark._compare(tmp_path)
    rows = dict(re.findall(r"^\| (.*?) \| (.* \| .*) \|$", told, re.MULTILINE))
    assert rows[""] == "before | after"
    assert rows["click → served, p50 / p95, s"] == "2.00 / 4.00 | 2.00 / 4.00"
    assert rows["the first click of a server, s"] == "8.0 [7.0, 9.0] | 8.0 [7.0, 9.0]"
    assert rows["· received→queued"] == "2.00 / 4.00 | 2.00 / 4.00"
    assert rows["disk a version, MB"] == "14.0 [13.0, 15.0] | 14.0 [13.0, 15.0]"
    together = "memory, together, at most: resident / its share of what is mapped, MB"
    assert rows[together] == " | ".join(["900 [900, 900] / 700 [700, 700]"] * 2)
    assert rows["ratio of the p95"] == "1.35 [1.20, 1.50] | –"
    assert "- before: `click`" in told


@pytest.mark.parametrize("benchmark", ["live"], indirect=True)
def test_a_version_takes_of_the_disk_what_no_earlier_one_has(benchmark: Any, tmp_path: Path) -> None:
    for name, size in (("step-00000000", 10), ("step-00000001", 3_000_000), ("step-00000002", 5_000_000)):
        (tmp_path / "versions" / name / "model").mkdir(parents=True)
        (tmp_path / "versions" / name / "model" / "adapter").write_bytes(bytes(size))
        if name > "step-00000000":
            os.link(tmp_path / "versions" / "step-00000000" / "base", tmp_path / "versions" / name / "base")
        else:
            (tmp_path / "versions" / name / "base").write_bytes(bytes(9_000_000))
    assert benchmark._disk_of_a_version(tmp_path) == 5.0


@pytest.mark.parametrize("benchmark", ["crashes"], indirect=True)
def test_the_crash_campaign_sees_in_the_files_where_a_learner_is(
    benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from operant.config import WorkerConfig
    from operant.live.storage.versions import StepRecord, Versions

    seen = []

    def write(folder: Path) -> None:
        seen.append(benchmark.moment_of(tmp_path))
        (folder / "model").mkdir()

    versions = Versions(tmp_path)
    versions.begin(write, {})
    coefficients = {"lr": WorkerConfig().lr}
    record = StepRecord(1, 0, 0, 0, 1, ["e"], seed=0, coefficients=coefficients, fingerprint={})
    seen.append(benchmark.moment_of(tmp_path))
    versions.announce(record)
    seen.append(benchmark.moment_of(tmp_path))
    point = versions._write_pointer

    def move(pointer: Any) -> None:
        seen.append(benchmark.moment_of(tmp_path))
        point(pointer)
        seen.append((benchmark.moment_of(tmp_path), benchmark.version_in(tmp_path)))

    monkeypatch.setattr(versions, "_write_pointer", move)
    versions.publish(record, write, {"passed": True})
    assert seen == ["idle", "idle", "stepping", "writing", "written", ("idle", 1)]
