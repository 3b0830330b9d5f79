"""Would the tests of the inner loop notice? Small faults are put into the mathematics, and `make test-fast` hunts them.

Each mutant changes one place of credit, objectives, batch or learner: an operator, a number, a condition, a call, an
argument, a statement. The seed decides which places. A mutant is caught when a test of `tests/fast.txt` fails, or does
not end. Documentation, types, assertions and messages of errors are not changed, nor what makes no difference on a CPU.

The working tree is never written to: each mutant lives in a process of its own, forked after the libraries are loaded.
First the tests run on the code as it is, which says which of them reach which line; a mutant meets those only. What was
found is kept in runs/mutants.json, so a run that was interrupted goes on; when the code or the tests change, so does
what has to be asked again.

Examples:
    python -m benchmarks.mutants                       # a hundred, seed 0: ten minutes on one core
    python -m benchmarks.mutants --seed 7 --count 40
    python -m benchmarks.mutants --list                # only say what would be changed
"""

from __future__ import annotations

import argparse
import ast
import copy
import hashlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import random
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import CodeType, FrameType, ModuleType
from typing import Any

from benchmarks.cells import ROOT, markdown

TARGETS = (
    "operant/algorithms/credit.py",
    "operant/algorithms/objectives.py",
    "operant/data/batch.py",
    "operant/algorithms/learner.py",
)
TESTS = ROOT / "tests" / "fast.txt"
FOUND = ROOT / "runs" / "mutants.json"
MEMORY = 8 << 30  # bytes: a loop that never ends may also grow
QUIET = "-q --no-header -p no:cacheprovider -p no:xdist -W ignore::pytest.PytestAssertRewriteWarning".split()

SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Add: ast.Sub, ast.Sub: ast.Add,
    ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
OPPOSITES = {"min": "max", "max": "min", "any": "all", "all": "any", "minimum": "maximum", "maximum": "minimum"}
NO_VALUES = {"torch", "nn", "np", "math", "dataclasses", "contextlib", "functional", "time", "warnings", "self"}
# no difference on a CPU, or none but an error where there was one
SAME_CALLS = {"to", "cpu", "float", "double", "contiguous", "expand_as"}
SAME_KEYWORDS = {"strict", "device", "dtype", "set_to_none", "fused"}

Place = tuple[ast.AST, ast.stmt, ast.FunctionDef | None]  # a node, and the innermost statement and function around it


@dataclass(frozen=True, slots=True)
class Mutant:
    """One change of one file. lines: from the first to the last of those that a test must reach to notice it."""

    file: str
    line: int
    change: str
    source: str
    lines: tuple[int, int]

    @property
    def key(self) -> str:
        return hashlib.sha256(f"{self.file}\0{self.source}".encode()).hexdigest()[:16]


def places(tree: ast.Module) -> Iterator[Place]:
    """The places that a mutant may change."""

    def walk(node: ast.AST, statement: ast.stmt, function: ast.FunctionDef | None) -> Iterator[Place]:
        if isinstance(node, (ast.Raise, ast.Assert, ast.JoinedStr, ast.Import, ast.ImportFrom)):
            return
        if isinstance(node, ast.ClassDef) and any(isinstance(b, ast.Name) and b.id == "Protocol" for b in node.bases):
            return
        if isinstance(node, ast.stmt):
            statement = node
        if isinstance(node, ast.Assign) and function is None and isinstance(node.value, ast.Subscript):
            return  # the name of a type
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "warnings.warn":
            return
        yield node, statement, function
        if isinstance(node, ast.FunctionDef):
            function = node
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from walk(child, statement, function)

    for statement in tree.body:
        yield from walk(statement, statement, None)


def changes(node: ast.AST) -> list[ast.AST | None]:
    """What can stand in a node's place; None deletes it."""
    fresh: Any = copy.deepcopy(node)
    match fresh:
        case ast.BinOp() | ast.BoolOp() if type(fresh.op) in SWAPS:
            fresh.op = SWAPS[type(fresh.op)]()
            return [fresh]
        case ast.AugAssign():
            fresh.op = SWAPS[type(fresh.op)]()
            return [fresh, None]
        case ast.Compare(ops=[op]):
            fresh.ops = [SWAPS[type(op)]()]
            return [fresh]
        case ast.UnaryOp(op=ast.Not() | ast.Invert() | ast.USub()):
            return [fresh.operand]
        case ast.Constant(value=bool(value)):
            return [ast.Constant(not value)]
        case ast.Constant(value=int() | float() as value):
            return [ast.Constant(value + 1)]
        case ast.If() | ast.While():
            fresh.test = ast.UnaryOp(ast.Not(), fresh.test)
            return [fresh]
        case ast.IfExp():
            fresh.body, fresh.orelse = fresh.orelse, fresh.body
            return [fresh]
        case ast.Return(value=ast.Tuple(elts=[_, _])):
            fresh.value.elts.reverse()
            return [fresh]
        case ast.Call():
            return calls(fresh)
        case ast.Expr(value=ast.Call()) | ast.Break() | ast.Continue():
            return [None]
        case ast.Assign(targets=[ast.Subscript() | ast.Attribute()]):
            return [None]
    return []


def calls(node: ast.Call) -> list[ast.AST | None]:
    """A call without one of its keywords, of the opposite function, or not made: `x.clamp(min=1)` becomes `x`."""
    found: list[ast.AST | None] = []
    for i, keyword in enumerate(node.keywords):
        if keyword.arg and keyword.arg not in SAME_KEYWORDS:
            found.append(ast.Call(node.func, node.args, node.keywords[:i] + node.keywords[i + 1 :]))
    match node.func:
        case ast.Name(id=name) if name in OPPOSITES:
            found.append(ast.Call(ast.Name(OPPOSITES[name]), node.args, node.keywords))
        case ast.Attribute(value=value, attr=name):
            if name in OPPOSITES:
                found.append(ast.Call(ast.Attribute(value, OPPOSITES[name]), node.args, node.keywords))
            names = {n.id for n in ast.walk(value) if isinstance(n, ast.Name)}
            if name not in SAME_CALLS and not names <= NO_VALUES:
                found.append(value)
    return found


class Replace(ast.NodeTransformer):
    """The tree with one node in another's place; a statement that is gone leaves `pass`."""

    def __init__(self, old: ast.AST, new: ast.AST | None) -> None:
        self.old, self.new = old, new if new is not None else ast.Pass()

    def visit(self, node: ast.AST) -> Any:
        return self.new if node is self.old else self.generic_visit(node)


def reached(node: ast.AST, statement: ast.stmt, function: ast.FunctionDef | None) -> tuple[int, int]:
    """The lines that run when a changed place matters: its statement's, a header's alone, all of a function whose
    default it is, and every line where it stands outside of functions."""
    if isinstance(statement, ast.FunctionDef):
        return statement.lineno, statement.end_lineno or statement.lineno
    if function is None:
        return 1, sys.maxsize
    body = getattr(statement, "body", None)
    last = body[0].lineno - 1 if body else statement.end_lineno or statement.lineno
    return statement.lineno, max(statement.lineno, last)


def mutated(file: str, tree: ast.Module, place: Place, new: ast.AST | None) -> Mutant:
    node, statement, _ = place
    whole = copy.deepcopy(tree, {id(node): node})  # a copy that holds the node itself, to be found in it
    source = ast.unparse(ast.fix_missing_locations(Replace(node, new).visit(whole)))
    was, now = (ast.unparse(n).split("\n")[0] if n else "deleted" for n in (node, new))
    return Mutant(file, getattr(node, "lineno", statement.lineno), f"{was}  →  {now}", source, reached(*place))


def chosen(seed: int, count: int) -> list[Mutant]:
    """`count` mutants, shared out over the files by how many places each has, no two at one place."""
    trees = {file: ast.parse((ROOT / file).read_text("utf-8")) for file in TARGETS}
    found = {
        file: [(place, ways) for place in places(tree) if (ways := changes(place[0]))] for file, tree in trees.items()
    }
    size, before = sum(map(len, found.values())), 0
    draw, picked = random.Random(seed), []
    for file, here in found.items():
        share = round(count * (before + len(here)) / size) - round(count * before / size)
        before += len(here)
        for i in sorted(draw.sample(range(len(here)), min(share, len(here)))):
            place, ways = here[i]
            picked.append(mutated(file, trees[file], place, draw.choice(ways)))
    return picked


# --- running the tests in a process of its own -----------------------------------------------------------------------


class Mutated(importlib.abc.MetaPathFinder, importlib.machinery.SourceFileLoader):
    """Imports one module from a changed source, as if it stood in its file."""

    def __init__(self, mutant: Mutant) -> None:
        name = mutant.file.removesuffix(".py").replace("/", ".")
        importlib.machinery.SourceFileLoader.__init__(self, name, str(ROOT / mutant.file))
        self.source = mutant.source

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.name:
            return None
        return importlib.util.spec_from_file_location(fullname, self.path, loader=self)

    def get_code(self, fullname: str) -> CodeType:
        return compile(self.source, str(self.path), "exec")


class Reach:
    """A plugin of pytest: which lines of the four files each test runs, and how long it takes."""

    def __init__(self) -> None:
        self.lines: dict[str, set[tuple[str, int]]] = {}
        self.seconds: dict[str, float] = {}
        self.here: set[tuple[str, int]] = set()
        self.files = {str(ROOT / file): file for file in TARGETS}

    def trace(self, frame: FrameType, event: str, _: Any) -> Any:
        return self.trace_lines if frame.f_code.co_filename in self.files else None

    def trace_lines(self, frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            self.here.add((self.files[frame.f_code.co_filename], frame.f_lineno))
        return self.trace_lines

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.here = self.lines[nodeid] = set()
        self.seconds[nodeid] = time.process_time()
        sys.settrace(self.trace)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        sys.settrace(None)
        self.seconds[nodeid] = time.process_time() - self.seconds[nodeid]


class Only:
    """A plugin of pytest: these tests, in this order."""

    def __init__(self, tests: Sequence[str]) -> None:
        self.order = {test: i for i, test in enumerate(tests)}

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = sorted((i for i in items if i.nodeid in self.order), key=lambda i: self.order[i.nodeid])


def load_libraries() -> None:
    """Everything slow that is not ours: the processes of the mutants have it from the start."""
    import hypothesis
    import torch
    import transformers

    torch.set_num_threads(1)
    for name in ("numpy", "peft", "rouge_score.rouge_scorer", "sacrebleu"):
        importlib.import_module(name)
    for family in ("bart", "gpt2", "llama", "marian", "t5"):
        importlib.import_module(f"{transformers.__name__}.models.{family}.modeling_{family}")
    # the same examples each time, and none looked for that is smaller
    phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]
    hypothesis.settings.register_profile("mutants", derandomize=True, database=None, phases=phases)
    hypothesis.settings.load_profile("mutants")


def run_tests(arguments: Sequence[str], plugin: Any, mutant: Mutant | None, seconds: int | None) -> tuple[int, Any]:
    """pytest in a forked process: (its exit status, or the signal's below zero; what the plugin has).

    seconds: of processor time, after which the process is ended.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        status = 70
        try:
            os.close(read)
            if seconds is not None:
                resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
                resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
            if mutant is not None:
                nothing = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nothing, 1)
                os.dup2(nothing, 2)
                sys.meta_path.insert(0, Mutated(mutant))
            import pytest

            status = int(pytest.main([*arguments, *QUIET], plugins=[plugin]))
            if isinstance(plugin, Reach):
                reach = {name: sorted(lines) for name, lines in plugin.lines.items()}
                with os.fdopen(write, "w") as out:
                    json.dump([reach, plugin.seconds, time.process_time()], out)
        finally:
            os._exit(status)
    os.close(write)
    with os.fdopen(read) as given:
        said = given.read()
    _, ended = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(ended), json.loads(said) if said else None


def hunt(mutants: Sequence[Mutant], found: dict[str, str]) -> Iterator[tuple[Mutant, str]]:
    """Each mutant with the verdict: caught, survived, or not reached (no test runs its line, so it survived)."""
    arguments = [line for line in TESTS.read_text("utf-8").splitlines() if line]
    status, said = run_tests(arguments, Reach(), None, None)
    if status != 0:
        raise SystemExit("the tests fail on the code as it is")
    reach, seconds, whole = said
    print(f"the tests as they are, traced: {whole:.0f} s of processor time", flush=True)
    for mutant in mutants:
        if mutant.key not in found:
            first, last = mutant.lines
            tests = [t for t, at in reach.items() if any(f == mutant.file and first <= n <= last for f, n in at)]
            tests.sort(key=lambda t: seconds[t])
            files = [a for a in arguments if any(t.startswith(a.split("::")[0] + "::") for t in tests)]
            found[mutant.key] = "not reached"
            if tests:
                limit = 20 + 2 * int(sum(seconds[t] for t in tests))  # what was traced took longer as it was
                status, _ = run_tests([*files, "-x", "--timeout=60"], Only(tests), mutant, limit)
                if status == 5:
                    raise SystemExit(f"no test was found among {', '.join(tests)}")
                found[mutant.key] = "survived" if status == 0 else "caught"
        yield mutant, found[mutant.key]


def asked_of() -> str:
    """A digest of the code and the tests: what was found holds as long as neither changes."""
    files = [TESTS, *sorted((ROOT / "operant").rglob("*.py")), *sorted((ROOT / "tests").glob("*.py"))]
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()[:16]


def table(verdicts: Sequence[tuple[Mutant, str]]) -> str:
    rows = []
    for file in (*TARGETS, "all"):
        of = [verdict for mutant, verdict in verdicts if file in (mutant.file, "all")]
        counts = [of.count(name) for name in ("caught", "survived", "not reached")]
        rows.append([file, str(len(of)), *map(str, counts)])
    return markdown(["file", "mutants", "caught", "survived", "not reached"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="decides which places are changed, and how")
    parser.add_argument("--count", type=int, default=100, help="mutants in all")
    parser.add_argument("--fresh", action="store_true", help="forget what was found before")
    parser.add_argument("--list", action="store_true", help="only say what would be changed")
    given = parser.parse_args()
    mutants = chosen(given.seed, given.count)
    if given.list:
        print("\n".join(f"{m.file}:{m.line}  {m.change}" for m in mutants))
        return
    os.chdir(ROOT)
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.dont_write_bytecode = True
    asked = asked_of()
    kept = json.loads(FOUND.read_text("utf-8")) if FOUND.exists() and not given.fresh else {}
    found: dict[str, str] = kept.get(asked, {})
    FOUND.parent.mkdir(exist_ok=True)
    load_libraries()
    verdicts = []
    for mutant, verdict in hunt(mutants, found):
        verdicts.append((mutant, verdict))
        FOUND.write_text(json.dumps({asked: found}), encoding="utf-8")
        print(f"{len(verdicts):3} {verdict:11}  {mutant.file}:{mutant.line}  {mutant.change}", flush=True)
    print(f"\nseed {given.seed}\n\n{table(verdicts)}")
    if missed := [(m, v) for m, v in verdicts if v != "caught"]:
        print("\nnot caught:\n" + "\n".join(f"  {m.file}:{m.line}  {m.change}  ({v})" for m, v in missed))


if __name__ == "__main__":
    main()
