from __future__ import annotations

import ast
import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
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
    ours = [
        requirement
        for name in ("clients", "dev", "gguf", "gym", "korean", "live", "postgres")
        for requirement in extras[name]
    ]
    for requirement in project["dependencies"] + ours:
        name, bound = re.fullmatch(r"([\w-]+)(?:\[[\w,]+\])?(?:>=([\d.]+))?", requirement).groups()
        if name == "operant":
            continue
        assert name in pins, f"{name} is not in constraints.txt"
        assert [int(n) for n in pins[name].split(".")[:3]] >= [int(n) for n in bound.split(".")], requirement


def layers(contract: str) -> list[str]:
    """The rooms of one contract of import-linter, the first of them first."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (found,) = [c["layers"] for c in contracts if c["containers"] == [contract]]
    return [name.strip("()") for name in reversed(found)]


def rooms(folder: Path) -> set[str]:
    """What a newcomer sees in a folder of the package."""
    return {path.stem for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()} - {
        "__init__"
    }


@pytest.mark.parametrize("page", ["README.md", "README.zh-CN.md"])
def test_the_architecture_tree_shows_every_room_in_the_order_of_the_contract(page: str) -> None:
    tree = re.search(r"^operant/\n((?: .*\n)+)", (ROOT / page).read_text("utf-8"), re.MULTILINE)[1]
    shown = [line[2:].split()[0] for line in tree.splitlines() if not line.startswith("   ")]
    assert [name.removesuffix("/").removesuffix(".py") for name in shown] == layers("operant")
    assert {name.removesuffix("/").removesuffix(".py") for name in shown} == rooms(ROOT / "operant")
    for name in shown:
        assert (ROOT / "operant" / name).is_dir() == name.endswith("/")
    within = [line[4:].split()[0] for line in tree.splitlines() if re.match(r" {4}\S", line)]
    assert [name.removesuffix("/").removesuffix(".py") for name in within] == layers("operant.live")
    assert set(layers("operant.live")) == rooms(ROOT / "operant" / "live")


def git(*arguments: str) -> list[str]:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode > 1:
        pytest.skip("not in a clone of git")
    return done.stdout.splitlines()


def test_no_pattern_of_gitignore_hides_a_module_and_the_built_page_is_not_kept() -> None:
    sources = [str(path.relative_to(ROOT)) for path in (ROOT / "operant").rglob("*.py")]
    assert git("check-ignore", "--no-index", *sources) == []
    # rooms that later changes bring, and folders that hold what is made
    to_come = ["operant/sandbox/x.py", "operant/runs/x.py", "operant/build/x.py", "tests/models/x.py"]
    assert git("check-ignore", "--no-index", *to_come) == []
    made = ["runs/x", "build/x", "models/x", "operant/live/static/index.html"]
    assert git("check-ignore", "--no-index", *made) == made


def test_the_wheel_holds_every_module_and_what_they_read(tmp_path: Path) -> None:
    from hatchling.builders.wheel import WheelBuilder

    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    data = [path for path in (ROOT / "operant").rglob("*") if path.suffix in (".py", ".css", ".html", ".js", ".typed")]
    assert {str(path.relative_to(ROOT)) for path in data if "__pycache__" not in path.parts} <= held
    assert "operant/run/report.css" in held
    assert not [name for name in held if name.startswith(("tests/", "benchmarks/"))]


def test_the_reference_is_what_the_program_says_today() -> None:
    spec = importlib.util.spec_from_file_location("reference_page", ROOT / "docs" / "reference.py")
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    assert (ROOT / "docs" / "reference.md").read_text("utf-8") == page.reference(), "run `make docs`"


Function = ast.FunctionDef | ast.AsyncFunctionDef
NAMES_ITS_SHAPES = ("algorithms", "models")
SHAPE = re.compile(r"\b(float|int|bool)\d*\[[^]]+\]|[\[(][BSNTPKV…](, [BSNTPKV…])*[\])]")  # float32[B, S], [N, T]


def test_what_raises_says_so() -> None:
    """A public function or method with a `raise OperantError` of its own says when; of a constructor, its class."""
    silent = []
    for room in (path.name for path in (ROOT / "operant").iterdir() if path.is_dir()):  # cli.py speaks to people
        for where, function, own, of_class in public_functions(room):
            about = own + of_class if function.name in ("__init__", "__post_init__") else own
            if raises_operant_error(function) and "OperantError" not in about:
                silent.append(where)
    assert not silent, "\n".join(silent)


def test_what_takes_or_gives_tensors_names_their_axes() -> None:
    """Each function for itself; a method may leave it to its class, where one name has one shape throughout."""
    silent = []
    for room in NAMES_ITS_SHAPES:
        for where, function, own, of_class in public_functions(room):
            given = [*function.args.args, *function.args.kwonlyargs]
            notes = [ast.unparse(note) for note in [function.returns, *(g.annotation for g in given)] if note]
            if any(re.search(r"\bTensor\b", note) for note in notes) and not SHAPE.search(own + of_class):
                silent.append(where)
    assert not silent, "\n".join(silent)


def public_functions(room: str) -> Iterator[tuple[str, Function, str, str]]:
    """(where, function or method, its docstring, its class's) of all that is public in a room."""
    for path in sorted((ROOT / "operant" / room).rglob("*.py")):
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, Function):
                owners: list[tuple[str, ast.stmt, str]] = [("", node, "")]
            elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                owners = [(f"{node.name}.", method, ast.get_docstring(node) or "") for method in node.body]
            else:
                continue
            for owner, function, of_class in owners:
                if isinstance(function, Function) and not re.match(r"_(?!_(init|post_init|call)__)", function.name):
                    where = f"{path.relative_to(ROOT)}:{function.lineno} {owner}{function.name}"
                    yield where, function, ast.get_docstring(function) or "", of_class


def raises_operant_error(function: Function) -> bool:
    """In its own body: a function inside it speaks for itself."""
    inside: list[ast.AST] = list(function.body)
    while inside:
        node = inside.pop()
        if isinstance(node, ast.Raise) and node.exc is not None and ast.unparse(node.exc).startswith("OperantError("):
            return True
        if not isinstance(node, Function | ast.Lambda | ast.ClassDef):
            inside += ast.iter_child_nodes(node)
    return False


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_installing_shows_that_something_happens() -> None:
    """Minutes of silence look like a hang: each phase says what it is, and pip shows its own progress."""
    told = subprocess.run(["make", "-n", "-B", "install"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    phases = [line for line in told.splitlines() if "pip install" in line]
    assert len(phases) >= 2 and not [line for line in phases if "--quiet" in line]
    assert [told.count(f'echo "{n}/3 ') for n in (1, 2, 3)] == [1, 1, 1]


def test_no_test_file_imports_from_another() -> None:
    """What several need stands in a file beside them, such as runs.py, so that a test file can be deleted alone."""
    for file in sorted((ROOT / "tests").glob("*.py")):
        found = re.findall(r"^\s*(?:from|import) (test_\w+)", file.read_text(encoding="utf-8"), re.MULTILINE)
        assert not found, f"{file.name} imports from {found}"
