"""Versions on disk: lineage, pointers, what is kept, a full disk, and what a crash leaves."""

from __future__ import annotations

import dataclasses
import errno
import json
from pathlib import Path
from typing import Any

import pytest

from operant.live.storage.versions import Moved, Outcome, Pointer, StepRecord, Versions
from operant.run.files import replace_file
from operant.types import OperantError


def write(text: str) -> Any:
    def fill(folder: Path) -> None:
        (folder / "model").mkdir()
        (folder / "model" / "weights").write_text(text)
        (folder / "learner.pt").write_text(f"optimizer of {text}")

    return fill


def begun(tmp_path: Path, keep: int = 5) -> Versions:
    versions = Versions(tmp_path / "live", keep)
    versions.begin(write("v0"), {"torch": "x"})
    return versions


def record_of(versions: Versions, **options: Any) -> StepRecord:
    now = versions.pointer()
    number = versions.next_version()
    values: dict[str, Any] = {
        "version": number, "parent": now.version, "moves": now.moves, "begin_offset": versions.consumed(),
        "consumed_offset": versions.consumed() + 2, "events": [f"e{number}"], "seed": 7, "coefficients": {"lr": 0.5},
        "fingerprint": {"torch": "x"}, "outcomes": {f"e{number}": Outcome("used", "", 1.0, -2.0, -1.0)},
    }  # fmt: skip
    return StepRecord(**(values | options))


def step(versions: Versions) -> int:
    record = record_of(versions)
    versions.announce(record)
    versions.publish(record, write(f"v{record.version}"), {"passed": True})
    versions.tidy()
    return record.version


def weights(versions: Versions, number: int) -> str:
    return (Path(versions.get(number).path) / "model" / "weights").read_text()


def test_a_record_survives_json() -> None:
    record = StepRecord(
        3, 1, 2, 4, 6, ["a", "b"], 5, {"lr": 0.1}, {"torch": "x"}, outcomes={"a": Outcome("unused", "no")}
    )
    assert StepRecord.from_json(record.to_json()) == record


def test_a_version_is_published_serves_and_knows_where_it_came_from(tmp_path: Path) -> None:
    versions = begun(tmp_path)
    assert versions.current().version == 0 and versions.current().parent is None
    assert [step(versions), step(versions)] == [1, 2]
    now = versions.current()
    assert (now.version, now.parent, now.consumed, now.verdict) == (2, 1, ("e2",), "passed")
    assert weights(versions, 2) == "v2" and versions.consumed() == 4 and versions.pending() is None
    again = Versions(tmp_path / "live")
    assert [v.version for v in again.all()] == [0, 1, 2] and again.ancestors(2) == [2, 1, 0]
    assert again.record(2).outcomes["e2"].logprob_after == -1.0 and again.gate(2) == {"passed": True}
    with pytest.raises(OperantError, match="serves already"):
        versions.begin(write("v0"), {})


def test_nothing_serves_before_the_first_version(tmp_path: Path) -> None:
    with pytest.raises(OperantError, match="serves no version yet"):
        Versions(tmp_path).current()


def test_rolling_back_brings_the_optimizer_and_not_the_events_back(tmp_path: Path) -> None:
    versions = begun(tmp_path)
    step(versions), step(versions)
    back = versions.roll_back()
    assert back.version == 1 and (Path(back.path) / "learner.pt").read_text() == "optimizer of v1"
    assert versions.consumed() == 4 and versions.next_version() == 3
    assert step(versions) == 3
    assert versions.current().parent == 1 and versions.ancestors(3) == [3, 1, 0]
    assert versions.roll_back(2).version == 2 and versions.current().version == 2
    versions.promote(0)
    with pytest.raises(OperantError, match="no ancestor on disk"):
        versions.roll_back()
    with pytest.raises(OperantError, match="not on disk; choose one of those there: 0, 1, 2, 3"):
        versions.promote(9)


def test_a_step_begun_before_a_roll_back_is_not_published_over_it(tmp_path: Path) -> None:
    versions = begun(tmp_path)
    step(versions)
    record = record_of(versions)
    versions.announce(record)
    versions.roll_back()
    versions.promote(1)  # there and back again is a move all the same
    with pytest.raises(Moved):
        versions.publish(record, write("late"), {"passed": True})
    assert versions.current().version == 1 and [v.version for v in versions.all()] == [0, 1]
    assert versions.pending() is not None


def test_a_user_is_pinned_and_freed(tmp_path: Path) -> None:
    versions = begun(tmp_path)
    step(versions)
    versions.pin("ann", 0)
    step(versions)
    assert versions.serving("ann").version == 0 and versions.serving("bob").version == 2
    versions.pin("ann", None)
    assert versions.serving("ann").version == 2
    with pytest.raises(OperantError, match="not on disk"):
        versions.pin("ann", 77)


def test_old_weights_go_and_their_records_stay(tmp_path: Path) -> None:
    versions = begun(tmp_path, keep=2)
    step(versions)
    versions.pin("ann", 1)
    versions.pass_anchor(0)
    for _ in range(5):
        step(versions)
    assert [v.version for v in versions.all()] == [0, 1, 5, 6]  # anchor, pinned, the newest two
    assert [r.version for r in versions.records()] == list(range(7))
    versions.pass_anchor(6)
    versions.roll_back(5)
    step(versions)  # 7, from 5
    # the parent of the current one stays for a roll-back, though two newer ones are kept, and the first for good
    assert [v.version for v in versions.all()] == [0, 1, 5, 6, 7]
    assert versions.roll_back().version == 5
    fresh = Versions(tmp_path / "live", 2)
    assert fresh.consumed() == 14 and fresh.ancestors(7) == [7, 5, 4, 3, 2, 1, 0]
    with pytest.raises(OperantError, match="at least 1 version"):
        Versions(tmp_path, 0)


def test_a_full_disk_is_a_clear_error_and_the_old_version_serves_on(tmp_path: Path) -> None:
    versions = begun(tmp_path)
    step(versions)
    record = record_of(versions)
    versions.announce(record)

    def full(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OperantError, match=r"version 2 could not be saved.*disk is full.*serves on.*free some space"):
        versions.publish(record, full, {"passed": True})
    assert versions.current().version == 1 and weights(versions, 1) == "v1"
    assert sorted(p.name for p in versions.folder.iterdir()) == ["latest", "step-00000000", "step-00000001"]
    assert versions.finish() is not None  # and the step is still to be made
    versions.publish(record, write("v2"), {"passed": True})
    assert versions.current().version == 2


def test_a_full_disk_while_a_record_is_written_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "current"
    replace_file(file, "old")

    def full(path: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("operant.run.files.sync", full)
    with pytest.raises(OperantError, match="the disk is full while writing"):
        replace_file(file, "new")
    assert file.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["current"]


def test_what_a_crash_leaves_is_completed(tmp_path: Path) -> None:
    versions = begun(tmp_path)
    # after the announcement: the step has to be made again
    record = record_of(versions)
    versions.announce(record)
    assert versions.finish() == record and versions.pending() == record
    # after the folder, before the pointer: it serves
    versions._save(record, write("v1"), {"passed": True})
    assert versions.current().version == 0
    assert versions.finish() is None
    assert versions.current().version == 1 and versions.pending() is None
    # after the pointer, before the announcement is gone; then somebody rolled back: that stands
    record = record_of(versions)
    versions.publish(record, write("v2"), {"passed": True})
    versions.announce(record)
    versions.roll_back()
    assert versions.finish() is None and versions.current().version == 1 and versions.pending() is None
    # a step that published nothing and whose announcement is still there
    record = record_of(versions, state="nothing")
    versions.announce(record)
    replace_file(versions._record_file(record.version), record.to_json())
    assert versions.finish() is None and versions.pending() is None
    assert versions.consumed() == record.consumed_offset == 6


def test_a_first_start_that_was_cut_off_is_made_anew_with_the_model_of_the_next_one(tmp_path: Path) -> None:
    versions = begun(tmp_path)
    (tmp_path / "live" / "current").unlink()
    versions.begin(write("again"), {})
    assert weights(versions, 0) == "again"


def test_a_root_that_lost_its_pointer_keeps_its_versions(tmp_path: Path) -> None:
    versions = begun(tmp_path)
    step(versions)
    (tmp_path / "live" / "current").unlink()
    versions.begin(write("again"), {})
    assert [weights(versions, number) for number in (0, 1)] == ["v0", "v1"] and versions.current().version == 0


def test_a_decision_about_a_pointer_that_has_moved_is_not_carried_out(tmp_path: Path) -> None:
    versions = begun(tmp_path)
    for _ in range(2):
        step(versions)
    seen = versions.pointer().moves
    versions.roll_back()
    for decide in (versions.promote, versions.roll_back, versions.pass_anchor):
        with pytest.raises(Moved):
            decide(2, moves=seen)
    assert versions.pointer() == Pointer(1, seen + 1, 0, since=1)
    versions.pass_anchor(1, moves=seen + 1)
    assert versions.pointer().anchor == 1


def test_a_copy_of_a_record_that_is_wrong_is_mended_before_its_version_goes(tmp_path: Path) -> None:
    versions = begun(tmp_path, keep=2)
    step(versions)
    wrong = dataclasses.replace(versions.record(1), state="nothing", reason="the step failed", outcomes={})
    replace_file(versions._record_file(1), wrong.to_json())
    for _ in range(5):
        step(versions)
    assert 1 not in versions._folders()
    for found in (versions.record(1), Versions(versions.root).record(1)):
        assert found.state == "published" and found.outcomes["e1"].state == "used"


def test_a_kill_while_a_step_is_made_again_leaves_no_step_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = begun(tmp_path)
    for _ in range(3):
        step(versions)
    versions.keep_plan({"source": "x", "number": 1, "stage": "emptied"})
    beside = Versions(versions.root, beside=True)
    beside.put(Pointer(0, 0, 0))
    again = record_of(versions, parent=0, moves=0, again=2)
    beside.announce(again)
    with monkeypatch.context() as patch:
        patch.setattr(beside, "_write_pointer", dies)
        with pytest.raises(Killed):
            beside.publish(again, write("again"), {"passed": True})
    assert Versions(versions.root).finish() is None  # the start of the next learner
    beside = Versions(versions.root, beside=True)
    assert beside.finish() is None
    assert beside.pointer().version == again.version and versions.pointer().version == 3
    assert versions.pending() is None


def test_records_are_read_while_versions_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = begun(tmp_path, keep=1)
    for _ in range(3):
        step(versions)
    other = Versions(versions.root, keep=1)
    there = other._folders()

    def listed() -> Any:
        step(versions)  # whose `tidy` drops what has just been listed
        return there

    monkeypatch.setattr(other, "_folders", listed)
    assert [record.version for record in other.records()][:4] == [0, 1, 2, 3]


class Killed(BaseException):
    """As kill -9 ends a process: nothing that comes after it is done."""


def dies(*given: Any) -> None:
    raise Killed


def test_a_step_that_publishes_nothing_consumes_its_events(tmp_path: Path) -> None:
    versions = begun(tmp_path)
    record = record_of(versions, state="refused", reason="the gate")
    versions.announce(record)
    versions.settle(record)
    assert versions.current().version == 0 and versions.consumed() == 2 and versions.next_version() == 2
    assert versions.record(1).reason == "the gate" and versions.pending() is None
    with pytest.raises(ValueError, match="pending"):
        versions.settle(record_of(versions))
    with pytest.raises(OperantError, match="no version 8"):
        versions.record(8)


def test_broken_weights_do_not_serve(tmp_path: Path) -> None:
    versions = begun(tmp_path)
    step(versions)
    (Path(versions.current().path) / "learner.pt").write_text("optimizer of vX")
    assert versions.model(1).is_dir()  # what serves is whole
    with pytest.raises(OperantError, match=r"version 1 is broken \(learner.pt has been changed\)"):
        versions.current()
    assert versions.roll_back().version == 0
    assert json.loads((tmp_path / "live" / "current").read_text()) == {
        "version": 0,
        "moves": 2,
        "anchor": 0,
        "since": 0,
    }
