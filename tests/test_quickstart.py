"""The quickstart's whole way, on so little that it learns nothing: what it writes, prints and refuses."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import shlex
import signal
from pathlib import Path
from typing import Any

import pytest
from program import Program, read_rows

from operant.models.policy import Policy
from operant.recipes import quickstart as module
from operant.recipes.quickstart_task import make_task
from operant.run.run import Run

SIZES = ("--labelled", 20, "--prompts", 40, "--threads", 1, "--device", "cpu", "--seed", 2)


@pytest.fixture
def program(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Program:
    """The program with short stages and small held-out sets."""
    monkeypatch.setattr(module, "make_task", functools.partial(make_task, dev=8, test=12, raw=200))
    monkeypatch.setattr(module, "MAX_TOKENS", 6)
    monkeypatch.setattr(module, "REWARD_STEPS", 2)
    monkeypatch.setattr(module, "FEWEST_STEPS", 1)
    for name, most in (("pretrain", 2), ("sft", 4)):
        stage = getattr(module, name)

        def short(config: Any, *, _stage: Any = stage, _most: int = most, **given: Any) -> Any:
            return _stage(dataclasses.replace(config, steps=min(_most, config.steps), eval_every=2), **given)

        monkeypatch.setattr(module, name, short)
    return Program(capsys)


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.draws("quick")
def test_it_writes_and_prints_what_it_promises(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, measure, measured = tmp_path / "quick", module.evaluate, []
    monkeypatch.setattr(module, "evaluate", lambda *given, **more: measured.append(given) or measure(*given, **more))
    command = ("quickstart", *SIZES, "--out", out)
    told = program(*command)
    assert told.status == 0, told
    assert len(measured) == 4  # each row once; the answers that are shown are of those
    results = json.loads((out / "results.json").read_text())
    assert list(results) == ["pretrained", "finetuned", "continued", "rewarded"]
    for row in results.values():
        assert row.keys() == {"bleu", "chrf", "exact"} and all(0 <= value <= 100 for value in row.values())
    for title in ("pretrained", "fine-tuned", "fine-tuned further", "with instant reward"):
        assert re.search(rf"^{title}  +\d", told.out, re.MULTILINE)
    assert "20 labelled pairs, 4 steps\n" in told.out and "reward, and the pairs, 2 steps\n" in told.out
    assert "</html>" in (out / "report.html").read_text() and list((out / "curves").glob("*.png"))
    assert not list(out.glob("*/report.html"))  # the circle's has the curves, which take seconds to draw
    assert Policy.load(out / "model", device="cpu").family == "decoder"
    assert [len(read_rows(out / "data" / f"{name}.jsonl")) for name in ("labelled", "prompts", "test")] == [20, 40, 12]

    _, _, try_next = told.out.partition("Try next:\n")
    commands = [shlex.split(line.strip())[1:] for line in try_next.splitlines() if line.strip()]
    assert [words[0] for words in commands] == ["sample", "eval", "train", "serve"]
    for words in commands[:2]:  # they work as printed
        assert program(*words, "--device", "cpu").status == 0
    assert program(*commands[2], "--steps", 1, "--out", tmp_path / "mine", "--device", "cpu").status == 0
    assert "operant keys --add" in program.fault(*commands[3], "--root", tmp_path / "live", "--host", "0.0.0.0")

    before = files(out)
    again = program(*command)
    assert again.status == 0 and "This circle is closed" in again.out and f"--out {out}-2" in again.out
    table = told.out[told.out.index("on held-out prompts  ") :].partition("\n\n")[0]
    assert table in again.out and files(out) == before
    assert "with seed 2, not 3" in program.fault(*command[:-4], "--seed", 3, "--out", out)


def test_ctrl_c_ends_the_whole_of_it_and_the_same_command_goes_on(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No stage is interrupted in both, so that each shows what the other should have come to."""
    command = ("quickstart", *SIZES, "--out")
    record, results = Run.record, []
    for moment, rows in (("finetuned", 1), ("rewarded", 3)):
        out = tmp_path / moment

        def interrupt(run: Run, *given: Any, _folder: str = module.FOLDERS[moment], **more: Any) -> None:
            record(run, *given, **more)
            if run.folder.path.name == _folder and run.step == 1:
                os.kill(os.getpid(), signal.SIGINT)

        with monkeypatch.context() as patch:
            patch.setattr(Run, "record", interrupt)
            stopped = program(*command, out)
        assert stopped.status == 130 and "the same command goes on" in "\n".join(stopped.err)
        assert len(json.loads((out / "results.json").read_text())) == rows
        went_on = program(*command, out)
        assert went_on.status == 0, went_on
        results.append(json.loads((out / "results.json").read_text()))
    assert results[0] == results[1] and len(results[0]) == 4


def test_a_stage_that_was_cut_short_says_so(program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REWARD_STEPS", 50)
    monkeypatch.setattr(module, "FEWEST_STEPS", 20)
    told = program("quickstart", *SIZES, "--minutes", 1e-4, "--out", tmp_path / "quick")
    assert told.status == 0, told
    assert "the pairs, 1 steps, cut short by the time limit of 0.0001 minutes" in told.out
    assert "Only 1 reward steps of 50: too few to conclude from" in told.out


def test_more_phrases_than_there_are(program: Program, tmp_path: Path) -> None:
    line = program.fault("quickstart", "--prompts", 10**8, "--out", tmp_path / "quick")
    assert "between 1 and 100000" in line and not (tmp_path / "quick").exists()
