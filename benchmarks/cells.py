"""Cells of a table: each measured once, kept as one small JSON file, skipped when it is there."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGES = ROOT / "docs" / "results"
RECORDS = ROOT / "benchmarks" / "records"


@dataclass(frozen=True, slots=True)
class Cell:
    """One number or curve of a table. `needs`: cells whose results it starts from."""

    name: str
    needs: tuple[str, ...] = ()


class Records:
    """What was measured: a folder with one JSON file a cell."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str) -> Path:
        return self.folder / (name.replace("/", ".").replace(" ", "-") + ".json")

    def has(self, name: str) -> bool:
        return self.path(name).exists()

    def get(self, name: str) -> dict[str, Any]:
        return json.loads(self.path(name).read_text(encoding="utf-8"))

    def machines(self) -> str:
        """Where they were measured."""
        files = sorted(self.folder.glob("*.json"))
        return "; ".join(sorted({json.loads(file.read_text(encoding="utf-8"))["machine"] for file in files}))

    def put(self, name: str, values: dict[str, Any]) -> None:
        """Written whole or not at all: a cell that was interrupted is measured again."""
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = path.with_suffix(".part")
        staged.write_text(json.dumps(values | {"machine": machine()}, indent=1) + "\n", encoding="utf-8")
        os.replace(staged, path)


def command_line(description: str | None, seeds: Sequence[int] = (0, 1, 2)) -> argparse.ArgumentParser:
    """The flags of every benchmark that is made of cells."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(seeds))
    parser.add_argument("--jobs", type=int, default=1, help="cells at once, one thread each")
    parser.add_argument("--fresh", action="store_true", help="throw away what was measured before, and measure here")
    parser.add_argument("--list", action="store_true", help="say which cells are there")
    parser.add_argument("--write", action="store_true", help="only write the tables")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    return parser


def carry_out(
    given: argparse.Namespace,
    module: str,
    *,
    cells: Callable[[], Sequence[Cell]],
    done: Callable[[Cell], bool],
    measure: Callable[[str], None],
    write: Callable[[], None],
    records: Records,
    runs: Path,
    options: Sequence[str] = (),
) -> None:
    """Do what the command line asks of a benchmark. runs: the folder of its runs, where their logs are. options: of
    this command line, for the process of each cell.

    Exits with 1 and the names when cells failed; what was measured is written all the same.
    """
    if given.cell:
        measure(given.cell)
        return
    if given.list:
        for cell in cells():
            print("there  " if done(cell) else "missing", cell.name)
        return
    if given.fresh:
        shutil.rmtree(runs, ignore_errors=True)
        shutil.rmtree(records.folder, ignore_errors=True)
    failed = [] if given.write else run_cells(module, cells, done, given.jobs, options)
    write()
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}; their runs stand under {runs}")


def run_cells(
    module: str, cells: Callable[[], Sequence[Cell]], done: Callable[[Cell], bool], jobs: int,
    options: Sequence[str] = (),
) -> list[str]:  # fmt: skip
    """Run `python -m MODULE --cell NAME OPTIONS` for every cell that is not done, `jobs` at once.

    cells: asked again after each end, since later cells may depend on what earlier ones measured.
    Returns the names that failed.
    """
    failed: list[str] = []
    running: dict[Future[int], Cell] = {}
    with ThreadPoolExecutor(jobs) as pool:
        while True:
            under_way = {c.name for c in running.values()}
            for cell in cells():
                if len(running) >= jobs:
                    break
                blocked = cell.name in under_way or cell.name in failed or done(cell)
                if blocked or not all(done(Cell(n)) for n in cell.needs):
                    continue
                print(f"{cell.name} …", flush=True)
                command = [sys.executable, "-m", module, "--cell", cell.name, *options]
                running[pool.submit(_run, command)] = cell
                under_way.add(cell.name)
            if not running:
                return failed
            ended, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in ended:
                cell = running.pop(future)
                if future.result() != 0:
                    failed.append(cell.name)
                    print(f"{cell.name} failed", file=sys.stderr, flush=True)


def _run(command: list[str]) -> int:
    return subprocess.run(command, cwd=ROOT, check=False).returncode


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Median with the lowest and the highest: one number hides what a seed does."""
    middle = f"{statistics.median(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; the first column is text, the others are numbers."""
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def machine() -> str:
    import torch

    processor = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists() and (found := re.search(r"model name\s*: (.+)", info.read_text())):
        processor = found[1]
    if torch.cuda.is_available():
        processor = torch.cuda.get_device_name()
    return f"{processor}, {os.cpu_count()} cores, torch {torch.__version__}, Python {platform.python_version()}"


def write_section(name: str, text: str, pages: Path = PAGES) -> None:
    """Replace what stands between `<!-- NAME -->` and `<!-- /NAME -->` on the page of docs/results that has them."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    for page in sorted(pages.glob("*.md")):
        whole = page.read_text(encoding="utf-8")
        if begin in whole and end in whole:
            before, _, rest = whole.partition(begin)
            _, _, after = rest.partition(end)
            page.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")
            return
    raise SystemExit(f"no page in {pages} has a section {begin} … {end}; add the two lines where the table belongs")
