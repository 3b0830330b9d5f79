from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forks import PATIENCE

import operant
from operant.config import install_line
from operant.run import runlog
from operant.run.runlog import RunFolder, RunLog, read_jsonl
from operant.types import OperantError

CONFIG = "reward: bleu\nlr: 0.001\nsteps: 100\nsampling: {temperature: 1.0, top_p: 1.0}\nlayers: [1, 2]\n"


def tree(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def fails(match: str, *args: object, **options: object) -> str:
    with pytest.raises(OperantError, match=match) as caught:
        RunFolder.open(*args, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_new_run_has_its_configuration_and_folders(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path / "runs" / "one", CONFIG) as folder:
        assert folder.path == tmp_path / "runs" / "one"
        assert not folder.resumed
        assert (folder.path / "config.yaml").read_text() == CONFIG
        assert folder.checkpoints.is_dir()
        assert folder.curves.is_dir()
        assert json.loads((folder.path / "run.json").read_text())["started"] > 0


def test_a_started_run_is_refused_and_untouched(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path, CONFIG) as folder:
        (folder.checkpoints / "step-00000000").mkdir()
    before = tree(tmp_path)
    fails("already holds a run.*--resume.*--out", tmp_path, CONFIG)
    assert tree(tmp_path) == before
    RunFolder.open(tmp_path, CONFIG, resume=True).close()  # the refusal gave the lock back


@pytest.mark.parametrize("what", ["killed", "failed"])
def test_a_run_that_took_no_step_is_no_run(tmp_path: Path, what: str) -> None:
    with RunFolder.open(tmp_path, CONFIG) as folder:
        (folder.checkpoints / ".staging-00000000-12").mkdir()
        (folder.path / "metrics.jsonl").touch()
        if what == "failed":
            (folder.checkpoints / "step-00000000").mkdir()
            (folder.path / "report.html").write_text("why")
            folder.finish("every reward was missing", failed=True, updates=0)
    (tmp_path / "notes.txt").write_text("mine")
    with RunFolder.open(tmp_path, "reward: chrf\n") as folder:
        assert not folder.resumed and list(folder.checkpoints.iterdir()) == []
    assert set(tree(tmp_path)) == {"notes.txt", "config.yaml", "run.json"}
    assert (tmp_path / "config.yaml").read_text() == "reward: chrf\n"
    assert "stop_reason" not in (tmp_path / "run.json").read_text()


@pytest.mark.parametrize("kept", ["checkpoint", "log", "model", "updates", "healthy"])
def test_a_run_that_has_anything_to_lose_is_refused(tmp_path: Path, kept: str) -> None:
    with RunFolder.open(tmp_path, CONFIG) as folder:
        if kept == "checkpoint":
            (folder.checkpoints / "step-00000000").mkdir()
        elif kept == "log":
            (folder.path / "metrics.jsonl").write_text('{"step": 0}\n')
        elif kept == "model":
            (folder.path / "model").mkdir()
        else:
            folder.finish("done", failed=kept == "updates", updates=int(kept == "updates"))
    fails("already holds a run", tmp_path, CONFIG)


def test_a_folder_with_other_files_only_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    RunFolder.open(tmp_path, CONFIG).close()
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_overwrite_throws_the_run_away_and_nothing_else(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path, CONFIG) as folder, RunLog(folder, tensorboard=False) as log:
        log.log(1, {"train/loss": 1.0})
        (folder.checkpoints / "step-00000001").mkdir()
        (folder.path / "model").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    with RunFolder.open(tmp_path, "reward: chrf\n", overwrite=True) as folder:
        folder.keep()
        assert not folder.resumed
        assert list(folder.checkpoints.iterdir()) == []
    assert not (tmp_path / "metrics.jsonl").exists()
    assert not (tmp_path / "model").exists()
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "config.yaml").read_text() == "reward: chrf\n"


def test_resume_without_a_run_makes_nothing(tmp_path: Path) -> None:
    fails("no run to resume in", tmp_path / "typo", CONFIG, resume=True)
    assert not (tmp_path / "typo").exists()


def test_resume_and_overwrite_exclude_each_other(tmp_path: Path) -> None:
    RunFolder.open(tmp_path, CONFIG).close()
    fails("exclude each other", tmp_path, CONFIG, resume=True, overwrite=True)


def test_out_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    fails("is a file, not a folder", tmp_path / "file", CONFIG)
    fails("cannot write in .*choose another --out", tmp_path / "file" / "deeper", CONFIG)
    fails("cannot write in .*name too long.*choose another --out", tmp_path / ("x" * 300), CONFIG)


def test_resume_with_another_configuration_names_the_keys(tmp_path: Path) -> None:
    RunFolder.open(tmp_path, CONFIG).close()
    before = tree(tmp_path)
    other = "reward: chrf\nlr: 0.001\nsteps: 100\nsampling: {temperature: 0.7, top_p: 1.0}\nlayers: [1, 2]\nnew: 3\n"
    message = fails("cannot resume", tmp_path, other, resume=True)
    assert "reward: was 'bleu', now 'chrf'" in message
    assert "sampling.temperature: was 1.0, now 0.7" in message
    assert "new: was 'absent', now 3" in message
    assert "lr" not in message
    assert "top_p" not in message
    assert tree(tmp_path) == before


def test_resume_allows_free_keys_and_keeps_the_new_values(tmp_path: Path) -> None:
    RunFolder.open(tmp_path, CONFIG).close()
    longer = CONFIG.replace("steps: 100", "steps: 900")
    with RunFolder.open(tmp_path, longer, resume=True) as folder:
        assert folder.resumed
    assert (tmp_path / "config.yaml").read_text() == longer
    fails("steps: was 900, now 100", tmp_path, CONFIG, resume=True, free_keys=())
    RunFolder.open(
        tmp_path, longer.replace("top_p: 1.0", "top_p: 0.9"), resume=True, free_keys={"sampling.top_p"}
    ).close()


def test_resume_takes_what_was_resolved_as_what_was_asked(tmp_path: Path) -> None:
    """A run keeps the number, an older one kept `auto`; asked for as `auto` again, both go on."""
    for number, kept in enumerate(("lr: 0.1\n", "lr: auto\n")):
        out = tmp_path / str(number)
        RunFolder.open(out, kept).close()
        RunFolder.open(out, "lr: 0.1\n", asked_yaml="lr: auto\n", resume=True).close()
        assert (out / "config.yaml").read_text() == "lr: 0.1\n"
        fails("lr: was 0.1, now 0.2", out, "lr: 0.2\n", asked_yaml="lr: auto\n", resume=True)


def test_resume_reads_a_configuration_of_any_age(tmp_path: Path) -> None:
    RunFolder.open(tmp_path, "old_name: 3\n").close()
    before = tree(tmp_path)

    def current(stored: Mapping[str, Any]) -> dict[str, Any]:
        return {"young": 1.0, "name": stored["old_name"]}

    fails("young: was 1.0, now 0.1", tmp_path, "name: 3\nyoung: 0.1\n", resume=True, current=current)
    assert tree(tmp_path) == before
    RunFolder.open(tmp_path, "name: 3\nyoung: 1.0\n", resume=True, current=current).close()
    assert (tmp_path / "config.yaml").read_text() == "name: 3\nyoung: 1.0\n"


def test_a_free_key_is_free_in_any_section(tmp_path: Path) -> None:
    RunFolder.open(tmp_path, "stage: {steps: 1}\n").close()
    with RunFolder.open(tmp_path, "stage: {steps: 2}\n", resume=True) as folder:
        assert folder.resumed
    assert "steps: 2" in (tmp_path / "config.yaml").read_text()
    fails("steps: was 2, now 3", tmp_path, "stage: {steps: 3}\n", resume=True, free_keys=())


def test_discard_takes_back_what_open_made_and_nothing_else(tmp_path: Path) -> None:
    folder = RunFolder.open(tmp_path / "new", CONFIG)
    folder.discard()
    assert not (tmp_path / "new").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    RunFolder.open(tmp_path / "mine", CONFIG).discard()
    assert tree(tmp_path) == {"mine/notes.txt": "mine"}
    RunFolder.open(tmp_path / "mine", CONFIG).close()


def test_what_was_to_be_replaced_is_there_again_when_the_new_run_never_began(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path, CONFIG) as folder, RunLog(folder, tensorboard=False) as log:
        log.log(1, {"train/loss": 1.0})
        (folder.path / "model").mkdir()
        (folder.path / "model" / "weights").write_text("precious")
        folder.finish("done", updates=1)
    before = tree(tmp_path)
    RunFolder.open(tmp_path, "reward: chrf\n", overwrite=True).discard()
    assert tree(tmp_path) == before
    assert RunFolder.open(tmp_path, CONFIG, resume=True).finished


@pytest.mark.parametrize("moment", ["moving", "opened", "begun"])
def test_a_process_that_is_killed_while_it_replaces_a_run_leaves_one_of_the_two(tmp_path: Path, moment: str) -> None:
    with RunFolder.open(tmp_path, CONFIG) as folder:
        (folder.path / "model").mkdir()
        (folder.path / "model" / "weights").write_text("old")
        folder.finish("done", updates=1)
    before = tree(tmp_path)
    if moment == "moving":
        (tmp_path / ".replaced").mkdir()
        (tmp_path / "run.json").rename(tmp_path / ".replaced" / "run.json")
    else:
        with RunFolder.open(tmp_path, "reward: chrf\n", overwrite=True) as folder:
            if moment == "begun":
                (folder.checkpoints / "step-00000000").mkdir()
    if moment == "begun":
        RunFolder.open(tmp_path, "reward: chrf\n", resume=True).close()
        assert not (tmp_path / "model").exists() and not (tmp_path / ".replaced").exists()
        return
    fails("already holds a run", tmp_path, "reward: bleu\n")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", ["config.yaml", "model/weights.bin", "checkpoints/mine.bin", "results.json"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_a_run_would_replace_and_no_run_made_is_refused_and_kept(
    tmp_path: Path, name: str, overwrite: bool
) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    told = fails("holds no run, but", tmp_path, CONFIG, overwrite=overwrite)
    assert name.split("/")[0] in told and tree(tmp_path) == {name: "mine"}


def test_a_value_that_becomes_a_section_differs(tmp_path: Path) -> None:
    RunFolder.open(tmp_path, "a: {}\nb: null\n").close()
    message = fails("cannot resume", tmp_path, "a: {x: 1}\nb: null\n", resume=True)
    assert "a.x" in message


def test_the_stop_reason_is_kept_and_cleared_by_resume(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path, CONFIG) as folder:
        folder.finish("target reached", best_step=40)
    facts = json.loads((tmp_path / "run.json").read_text())
    assert (facts["stop_reason"], facts["best_step"]) == ("target reached", 40)
    assert facts["finished"] >= facts["started"]
    with RunFolder.open(tmp_path, CONFIG, resume=True):
        facts = json.loads((tmp_path / "run.json").read_text())
    assert "stop_reason" not in facts
    assert len(facts["resumed"]) == 1


HOLDER = """
import sys, time
from operant.run.runlog import RunFolder
folder = RunFolder.open(sys.argv[1], "a: 1")
print("held", flush=True)
time.sleep(600)
"""


def test_the_lock_against_a_second_live_process(tmp_path: Path) -> None:
    """Refused while the other lives, whatever is asked; free once it is killed, without cleaning by hand."""
    environment = {**os.environ, "PYTHONPATH": str(Path(operant.__file__).parents[1])}
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        for options in ({}, {"resume": True}, {"overwrite": True}):
            message = fails("already in use", tmp_path / "run", "a: 1", **options)
            assert f"(process {holder.pid})" in message
        assert (tmp_path / "run" / "config.yaml").read_text() == "a: 1"
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate(timeout=PATIENCE)
    RunFolder.open(tmp_path / "run", "a: 1", resume=True).close()


def test_a_child_that_outlives_the_run_does_not_hold_the_lock(tmp_path: Path) -> None:
    """Reward workers are forked; one that hangs must not lock the folder for the next run."""
    script = """
import os, signal, sys, time
from operant.run.runlog import RunFolder
folder = RunFolder.open(sys.argv[1], "a: 1")
child = os.fork()
if child == 0:
    os.close(1)
    time.sleep(600)
print(child, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    environment = {**os.environ, "PYTHONPATH": str(Path(operant.__file__).parents[1])}
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True, env=environment
    )
    orphan = int(run.stdout)
    try:
        os.kill(orphan, 0)
        with RunFolder.open(tmp_path / "run", "a: 1", resume=True) as folder:
            assert folder.resumed
    finally:
        os.kill(orphan, signal.SIGKILL)


def test_the_lock_within_one_process(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path, "a: 1") as folder:
        fails("already in use", tmp_path, "a: 1", resume=True)
        folder.close()
        with RunFolder.open(tmp_path, "a: 1", resume=True) as again:
            assert again.resumed
            fails("already in use", tmp_path, "a: 1", resume=True)


def test_a_full_disk_at_the_start_is_one_line_and_frees_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        fails("the disk is full.*choose another --out", tmp_path, "a: 1")
    assert set(os.listdir(tmp_path)) <= {".lock"}
    RunFolder.open(tmp_path, "a: 1").close()


def test_metrics_are_one_json_object_a_line_as_soon_as_logged(tmp_path: Path) -> None:
    with RunLog(tmp_path, tensorboard=False) as log:
        log.log(1, {"train/loss": np.float32(0.5), "train/kl_ref": float("nan"), "a": float("inf"), "b": -np.inf})
        line = (tmp_path / "metrics.jsonl").read_text()
        row = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        assert line.endswith("\n")
    assert (row["step"], row["train/loss"]) == (1, 0.5)
    assert (row["train/kl_ref"], row["a"], row["b"]) == ("NaN", "Infinity", "-Infinity")
    assert np.isnan(float(row["train/kl_ref"]))


def test_resume_drops_later_steps_so_that_none_is_logged_twice(tmp_path: Path) -> None:
    with RunLog(tmp_path, tensorboard=False) as log:
        for step in range(1, 8):
            log.log(step, {"train/loss": 1 / step})
            log.samples(step, [{"text": f"数字 {step}"}])
    kept = (tmp_path / "metrics.jsonl").read_bytes().split(b"\n")[:4]
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 8, "train/lo')  # killed in the middle of a write
    with RunLog(tmp_path, tensorboard=False, resume_step=4) as log:
        log.log(5, {"train/loss": 0.2})
        log.samples(5, [{"text": "again"}])
    assert [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert (tmp_path / "metrics.jsonl").read_bytes().split(b"\n")[:4] == kept
    assert [row["text"] for row in read_jsonl(tmp_path / "samples.jsonl")] == [
        *(f"数字 {i}" for i in (1, 2, 3, 4)),
        "again",
    ]


def test_a_cut_last_line_is_dropped_before_appending(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "tr')
    with RunLog(tmp_path, tensorboard=False) as log:
        log.log(2, {})
    assert [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2]


def test_samples_take_arrays_and_missing_rewards(tmp_path: Path) -> None:
    with RunLog(tmp_path, tensorboard=False) as log:
        log.samples(3, [{"prompt": "é", "reward": None, "rewards": np.array([0.5, np.nan]), "references": ("a", "b")}])
    (row,) = read_jsonl(tmp_path / "samples.jsonl")
    assert row == {"step": 3, "prompt": "é", "reward": None, "rewards": [0.5, "NaN"], "references": ["a", "b"]}
    assert "é" in (tmp_path / "samples.jsonl").read_text()


def test_a_full_disk_while_logging_is_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    log = RunLog(tmp_path, tensorboard=False)
    log._metrics.close()
    log._metrics = open("/dev/full", "w", buffering=1)  # noqa: SIM115
    with pytest.raises(OperantError, match=r"No space left on device.*--resume"):
        log.log(1, {"a": 1.0})
    log.close()
    assert "/dev/full" in caplog.text


def test_a_missing_file_reads_as_empty(tmp_path: Path) -> None:
    assert read_jsonl(tmp_path / "absent.jsonl") == []


def test_tensorboard_holds_the_same_numbers(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with RunLog(tmp_path) as log:
        for step in (1, 2, 3):
            log.log(step, {"train/loss": 1 / step})
    with RunLog(tmp_path, resume_step=2) as log:
        log.log(3, {"train/loss": 9.0})
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, round(e.value, 4)) for e in events.Scalars("train/loss")] == [(1, 1.0), (2, 0.5), (3, 9.0)]


def test_without_tensorboard_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with RunLog(tmp_path) as log:
        log.log(1, {"a": 1.0})
    assert "pip install tensorboard" in log.lacks
    assert read_jsonl(tmp_path / "metrics.jsonl")[0]["a"] == 1.0


def test_wandb_asked_for_and_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(OperantError, match=re.escape(install_line(extra="wandb"))):
        RunLog(tmp_path, wandb="project")


def test_wandb_gets_configuration_and_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    run = types.SimpleNamespace(log=lambda m, step: seen.append((step, m)), finish=lambda: seen.append("finished"))
    fake = types.SimpleNamespace(init=lambda **options: seen.append(options["config"]) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with RunFolder.open(tmp_path, "lr: 3\n") as folder, RunLog(folder, tensorboard=False, wandb="p") as log:
        log.log(4, {"a": 1.0})
    assert seen == [{"lr": 3}, (4, {"a": 1.0}), "finished"]


def test_plain_progress_lines(tmp_path: Path) -> None:
    stream = io.StringIO()
    log = RunLog(tmp_path, tensorboard=False)
    with log, log.progress(4, "train", start=1, stream=stream, every=0.0) as bar:
        bar.advance(tokens=500, shown={"reward": 0.31234, "phase": "warm-up"})
        bar.advance(shown={"reward": 0.5}, missing={"timeout": 2, "raised": 1, "nan": 0})
        bar.note("saved step 3")
        bar.advance()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("train 2/4 (50%) · ETA 0:0")
    assert "tokens/s · reward 0.3123 · phase warm-up" in lines[0]
    assert lines[1].endswith("reward 0.5 · phase warm-up · missing raised 1, timeout 2")
    assert lines[2] == "saved step 3"
    assert lines[3].startswith("train 4/4 (100%) · elapsed")


@pytest.mark.parametrize(
    ("limit", "line"),
    [
        (100.0, "train 20/~50 (40%) · ETA 1:00"),  # half a step a second: the clock ends it before step 1000
        (1e6, "train 20/1000 (2%) · ETA 32:40"),
        (30.0, "train 20/~20 (100%) · elapsed 0:40"),
        (None, "train 20/1000 (2%) · ETA 32:40"),
    ],
)
def test_the_time_left_is_that_of_what_ends_the_run(
    limit: float | None, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(runlog.time, "monotonic", lambda: now[0])
    bar = runlog.Progress(1000, "train", seconds=limit, stream=io.StringIO(), every=1e9)
    now[0] = 40.0
    bar.advance(20)
    assert bar.line() == line


def test_a_limit_of_processor_time_is_not_read_off_the_wall(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine takes four times as long, and no step less."""
    wall, spent = [0.0], [7.0]
    monkeypatch.setattr(runlog.time, "monotonic", lambda: wall[0])
    bar = runlog.Progress(
        50, "train", seconds=100.0, clock=lambda: spent[0], stream=io.StringIO(), every=1e9
    )  # fmt: skip
    wall[0], spent[0] = 160.0, 47.0
    bar.advance(20)
    assert bar.line() == "train 20/50 (40%) · ETA 4:00"
    wall[0], spent[0] = 320.0, 87.0
    bar.advance(10)
    assert bar.line() == "train 30/~38 (79%) · ETA 1:20"


def test_a_broken_off_run_prints_where_it_was_once(tmp_path: Path) -> None:
    stream = io.StringIO()

    def broken_off() -> None:
        log = RunLog(tmp_path, tensorboard=False)
        with log, log.progress(None, "pretrain", stream=stream, every=1e9) as bar:
            bar.advance(3)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken_off()
    (line,) = stream.getvalue().splitlines()
    assert line.startswith("pretrain 3 · elapsed")


def test_a_live_line_on_a_terminal(tmp_path: Path) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with RunLog(tmp_path, tensorboard=False) as log, log.progress(10, "train", stream=stream) as bar:
        bar.advance(4, tokens=100, shown={"reward": 0.25})
        bar.note("[note] kept as it is")
    assert "4/10" in stream.getvalue()
    assert "reward 0.25" in stream.getvalue()
    assert "[note] kept as it is" in stream.getvalue()
