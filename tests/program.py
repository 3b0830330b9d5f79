"""Running the program inside the test's process, on small files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from operant.cli import main

ON_CPU = ("--device", "cpu")
QUIET_RUN = (*ON_CPU, "--threads", "1", "--tensorboard", "false")
WORDS = "red blue green cat dog house sun moon".split()


@dataclass(slots=True)
class Outcome:
    """What the program did: exit status (0 when it returned), standard output, and its lines of standard error."""

    status: int
    out: str
    err: list[str]


class Program:
    """`program("eval", "--limit", 2, …)` runs a command; `fault(…)` runs one that must fail in the one proper way."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *arguments: object) -> Outcome:
        self.capsys.readouterr()
        status = 0
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as stop:
            status = int(stop.code or 0)
        out, err = self.capsys.readouterr()
        return Outcome(status, out, err.splitlines())

    def fault(self, *arguments: object) -> str:
        """The one line. Nothing else stands on standard error and nothing on standard output."""
        outcome = self(*arguments)
        assert outcome.status == 1, outcome
        assert len(outcome.err) == 1 and outcome.err[0].startswith("operant: "), outcome.err
        assert outcome.out == ""
        return outcome.err[0].removeprefix("operant: ")


def pairs(count: int = 40) -> list[dict[str, str]]:
    """Three words, and the same in the other order."""
    rows = []
    for i in range(count):
        words = [WORDS[(i * k + i // 8) % len(WORDS)] for k in (1, 3, 5)]
        rows.append({"prompt": " ".join(words), "completion": " ".join(reversed(words))})
    return rows


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
