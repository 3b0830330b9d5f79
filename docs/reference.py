"""Writes docs/reference.md from the program: the help of every command and the docstring of every public name."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import operant

HERE = Path(__file__).parent
PROGRAM = [sys.executable, "-m", "operant.cli"]


def help_of(*arguments: str) -> str:
    # A fixed width and no colour, so that the page is the same on every terminal.
    environment = os.environ | {"COLUMNS": "110", "NO_COLOR": "1", "PYTHONHASHSEED": "0"}
    return subprocess.run(
        [*PROGRAM, *arguments], capture_output=True, text=True, check=True, env=environment
    ).stdout.strip()


def commands(text: str) -> list[str]:
    """The subcommands in the order of the program's own help."""
    found = re.search(r"\{([\w,-]+)\}", text)
    return found[1].split(",") if found else []


def signature(value: object) -> str:
    try:
        return str(inspect.signature(value))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return ""


def reference() -> str:
    program = help_of("--help")
    parts = [
        "# Reference",
        "Written by `make docs` from the program; do not edit.",
        "## Commands",
        f"```\n{program}\n```",
    ]
    for name in commands(program):
        parts += [f"### operant {name}", f"```\n{help_of(name, '--help', 'all')}\n```"]
    parts.append("## Python")
    for name in operant.__all__:
        value = getattr(operant, name)
        if callable(value):
            doc = inspect.getdoc(value) or ""
            parts += [f"### operant.{name}", f"```python\n{name}{signature(value)}\n```", f"```text\n{doc}\n```"]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    (HERE / "reference.md").write_text(reference(), encoding="utf-8")
