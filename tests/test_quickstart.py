"""The quickstart's whole way, on so little that it learns nothing: what it writes, prints and refuses."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from program import Program, read_rows

from operant.models.policy import Policy
from operant.recipes import quickstart as module
from operant.recipes.quickstart_task import make_task


@pytest.fixture
def program(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Program:
    """The program with a short pretraining, a short fine-tuning and small held-out sets."""
    monkeypatch.setattr(module, "make_task", functools.partial(make_task, dev=8, test=12, raw=200))
    for name, most in (("pretrain", 2), ("sft", 4)):
        stage = getattr(module, name)

        def short(config: Any, *, _stage: Any = stage, _most: int = most, **given: Any) -> Any:
            return _stage(dataclasses.replace(config, steps=min(_most, config.steps), eval_every=2), **given)

        monkeypatch.setattr(module, name, short)
    return Program(capsys)


def test_it_writes_and_prints_what_it_promises(program: Program, tmp_path: Path) -> None:
    out = tmp_path / "quick"
    command = ("quickstart", "--labelled", 20, "--prompts", 40, "--minutes", 0.01, "--threads", 1, "--device", "cpu",
               "--seed", 2, "--out", out)  # fmt: skip
    told = program(*command)
    assert told.status == 0, told
    results = json.loads((out / "results.json").read_text())
    assert list(results) == ["pretrained", "finetuned", "continued", "rewarded"]
    for row in results.values():
        assert row.keys() == {"bleu", "chrf", "exact"} and all(0 <= value <= 100 for value in row.values())
    for title in ("pretrained", "fine-tuned", "fine-tuned further", "with instant reward"):
        assert re.search(rf"^{title}  +\d", told.out, re.MULTILINE)
    assert "</html>" in (out / "report.html").read_text() and list((out / "curves").glob("*.png"))
    assert Policy.load(out / "model", device="cpu").family == "decoder"
    assert [len(read_rows(out / "data" / f"{name}.jsonl")) for name in ("labelled", "prompts", "test")] == [20, 40, 12]

    _, _, try_next = told.out.partition("Try next:\n")
    commands = [shlex.split(line.strip())[1:] for line in try_next.splitlines() if line.strip()]
    assert [words[0] for words in commands] == ["sample", "eval", "train", "serve"]
    for words in commands[:2]:  # they work as printed
        assert program(*words, "--device", "cpu").status == 0
    assert program(*commands[2], "--steps", 1, "--out", tmp_path / "mine", "--device", "cpu").status == 0
    assert "operant keys --add" in program.fault(*commands[3], "--root", tmp_path / "live", "--host", "0.0.0.0")

    assert "already holds a run" in program.fault(*command)
    assert json.loads((out / "results.json").read_text()) == results


def test_more_phrases_than_there_are(program: Program, tmp_path: Path) -> None:
    line = program.fault("quickstart", "--prompts", 10**8, "--out", tmp_path / "quick")
    assert "between 1 and 100000" in line and not (tmp_path / "quick").exists()
