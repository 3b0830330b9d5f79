"""Versions of the served policy on disk: where each came from, which one serves, and the record of every step.

    root/
      versions/step-00000042/   model/, learner.pt, record.json, gate.json; a whole checkpoint or none (checkpoint.py)
      records/00000041.json     the record of a step that published nothing, or whose weights are gone
      slow/00000042.json        what the slow gate found
      pending/00000043.json     what the step under way will use, written before it begins
      current                   {"version", "moves", "anchor", "since"}: what serves, how often that has moved, the last
                                version that the slow gate has passed, the version that drift is measured from
      pins.json                 {user: version}
      trials/now.json           what serves while `current` is tried (canary.py); only where versions are tried
      trials/00000042.json      what a trial found
      forgetting.json           what forgetting a source has come to (forget.py); `current.again` is then the pointer of
                                the steps that are made again

A record is written before its step, so that a step which a crash cut off is executed again on the same events and
comes to the same weights. A version's folder is the truth about what it consumed; `finish` completes what a crash left.
Pointers move under a lock, so the program, the server and the learner may all move them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock

from operant.run import checkpoint
from operant.run.files import replace_file
from operant.types import OperantError, PolicyVersion

log = logging.getLogger(__name__)

__all__ = ["Moved", "Outcome", "Pointer", "StepRecord", "Versions"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one event. `logprob_before`, `logprob_after`: log π(y|x) in nats at temperature 1 of the text that
    was rated (of an edit, the edited text; of a comparison, the preferred one; of a span, its tokens)."""

    state: Literal["used", "superseded", "unused"]
    reason: str = ""
    advantage: float | None = None
    logprob_before: float | None = None
    logprob_after: float | None = None


@dataclass(slots=True)
class StepRecord:
    """One step of the live learner, wholly determined by these fields and the weights of `parent`.

    begin_offset, consumed_offset: the events of the step are those of the store in (begin_offset, consumed_offset].
    moves: how often the current version had moved when the step began; a step is published only if it has not since.
    again: the earlier step that this one makes again without the events of a source that is forgotten, or -1.
    replayed: the events of earlier steps that were rehearsed, by the name that they have on disk.
    anchor, since: of the pointer when the step began (see `Pointer`), from which its gate measured; -1 is not known.
    state: "pending"; "published" (there is a version of this number); "refused" (by the gate); "nothing" (no event
        taught anything, or the step moved nothing). Every state but the first consumes the events.
    """

    version: int
    parent: int
    moves: int
    begin_offset: int
    consumed_offset: int
    events: list[str]
    seed: int
    coefficients: dict[str, float]
    fingerprint: dict[str, str]
    state: Literal["pending", "published", "refused", "nothing"] = "pending"
    reason: str = ""
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    replayed: list[str] = field(default_factory=list)
    anchors: list[str] = field(default_factory=list)
    forgotten: list[str] = field(default_factory=list)
    baselines: dict[str, float] = field(default_factory=dict)
    times: dict[str, float] = field(default_factory=dict)
    again: int = -1
    anchor: int = -1
    since: int = -1

    @property
    def pulled_to(self) -> int | None:
        """The version to which `LiveConfig.kl_coef` and `anchor_coef` pulled the step; None where the record knows of
        no pull."""
        pulls = self.coefficients.get("kl_coef") or self.coefficients.get("anchor_coef")
        return self.anchor if pulls and self.anchor >= 0 else None

    def to_json(self) -> str:
        """The text of the record's file."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False, indent=1)

    @classmethod
    def from_json(cls, text: str) -> StepRecord:
        """What `to_json` wrote, today or before; what was not written down then has its default."""
        values = json.loads(text)
        values["outcomes"] = {name: Outcome(**outcome) for name, outcome in values["outcomes"].items()}
        return cls(**values)


@dataclass(frozen=True, slots=True)
class Pointer:
    """What the file `current` says."""

    version: int
    moves: int
    anchor: int
    since: int = 0


class Moved(Exception):
    """The current version has changed since the step began: the step has to begin again on the new one."""


class Versions:
    """The versions under `root`. `keep`: how many of the newest stay on disk besides those in use (see `prune`).

    beside: move the pointer of what is made again, while what serves stays what it is.
    Raises OperantError when keep is below 1.
    """

    def __init__(self, root: str | Path, keep: int = 5, *, beside: bool = False) -> None:
        if keep < 1:
            raise OperantError(f"keep is {keep}; at least 1 version must stay on disk: correct --keep")
        self.root, self.keep = Path(root), keep
        self.folder = self.root / "versions"
        self.beside = beside
        self._records: dict[Path, StepRecord] = {}  # finished records never change

    # --- reading -------------------------------------------------------------------------------------------------

    def pointer(self) -> Pointer:
        """Which version serves. Raises OperantError when there is none."""
        try:
            return Pointer(**json.loads(self._pointer_file(self.beside).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise OperantError(
                f"{self.root} serves no version yet; start with python -m operant.live.learning.worker "
                f"--root {self.root} --model DIR --store FILE"
            ) from error

    def exists(self) -> bool:
        """Whether a version serves, so that `pointer` has something to say."""
        return self._pointer_file(self.beside).exists()

    def current(self) -> PolicyVersion:
        """The version that serves. Raises OperantError as `pointer` and `get` do."""
        return self.get(self.pointer().version)

    def serving(self, user: str) -> PolicyVersion:
        """The version that this user is pinned to, else the current one. Raises OperantError as `current` does."""
        return self.get(self.pins().get(user, self.pointer().version))

    def all(self) -> list[PolicyVersion]:
        """Every version whose weights are on disk, oldest first."""
        return [self._version(c) for c in self._folders().values()]

    def get(self, version: int) -> PolicyVersion:
        """One version. Raises OperantError when its weights are not there, or are broken."""
        found = self._folders().get(version)
        if found is None:
            raise self._absent(version)
        _expect_whole(version, found.path)
        return self._version(found)

    def model(self, version: int) -> Path:
        """The folder of a version's weights, checked. Raises OperantError as `get` does, and looks at nothing else."""
        found = self._folders().get(version)
        if found is None:
            raise self._absent(version)
        _expect_whole(version, found.path, within="model")
        return found.path / "model"

    def records(self) -> list[StepRecord]:
        """The record of every finished step, oldest first, also of those without weights: the whole lineage."""
        found: dict[int, StepRecord] = {}
        for number, c in self._folders().items():
            with contextlib.suppress(FileNotFoundError):  # gone meanwhile; its record was copied before
                found[number] = self._finished(c.path / "record.json")
        for file in (self.root / "records").glob("[0-9]*.json"):
            if int(file.stem) not in found:
                found[int(file.stem)] = self._finished(file)
        return [found[number] for number in sorted(found)]

    def record(self, version: int) -> StepRecord:
        """Raises OperantError when no step had this number."""
        found = {record.version: record for record in self.records()}
        if version not in found:
            raise OperantError(f"there is no version {version}; operant versions lists them")
        return found[version]

    def gate(self, version: int) -> dict[str, Any]:
        """What the gate measured of a version on disk."""
        path = Path(self.get(version).path)
        values: dict[str, Any] = json.loads((path / "gate.json").read_text(encoding="utf-8"))
        return values

    def overview(self) -> dict[str, Any]:
        """Everything at a glance, as plain data: {"current", "anchor", "pins", "versions": [one for each step]}."""
        now, there = self.pointer(), self._folders()
        rows = [
            {
                "version": r.version, "parent": r.parent if r.parent >= 0 else None, "state": r.state,
                "reason": r.reason, "events": len(r.events), "on_disk": r.version in there,
                "used": sum(o.state == "used" for o in r.outcomes.values()), "slow": self.slow(r.version),
                "trial": self.verdict(r.version),
            }
            for r in self.records()
        ]  # fmt: skip
        trial = self.trial()
        tried = None if trial is None else {"serving": trial["serving"], "candidate": trial.get("candidate")}
        return {"current": now.version, "anchor": now.anchor, "pins": self.pins(), "trial": tried, "versions": rows}

    def slow(self, version: int) -> dict[str, Any] | None:
        """What the slow gate found of a version, or None while it has not looked."""
        file = self._slow_file(version)
        if not file.exists():
            return None
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return found

    def note_slow(self, version: int, found: Mapping[str, Any]) -> None:
        """Keep what the slow gate found, beside the version, whose folder never changes."""
        replace_file(self._slow_file(version), json.dumps(dict(found), indent=1))

    def consumed(self) -> int:
        """The offset up to which events were consumed, whatever became of them and whatever was rolled back since."""
        return max((r.consumed_offset for r in self.records()), default=0)

    def next_version(self) -> int:
        """The number of the next step."""
        return 1 + max((r.version for r in self.records()), default=-1)

    def ancestors(self, version: int) -> list[int]:
        """`version`, its parent, and so on to the first."""
        parents = {r.version: r.parent for r in self.records()}
        line = [version]
        while parents.get(line[-1], -1) >= 0:
            line.append(parents[line[-1]])
        return line

    def pins(self) -> dict[str, int]:
        """The version that each pinned user is served."""
        try:
            pins: dict[str, int] = json.loads((self.root / "pins.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        return pins

    def plan(self) -> dict[str, Any] | None:
        """What `forget` has written down of a forgetting that is not finished."""
        try:
            plan: dict[str, Any] = json.loads(self.plan_file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return plan

    def forgetting(self) -> bool:
        """Whether a source is being forgotten, so that nothing may be learned and no pointer moved."""
        plan = self.plan()
        return plan is not None and plan["stage"] not in ("refused", "made")

    def keep_plan(self, plan: Mapping[str, Any]) -> None:
        """Write down what a forgetting has come to (see `plan`)."""
        with self._lock():  # the server asks for it while a learner may be starting
            replace_file(self.plan_file, json.dumps(dict(plan), ensure_ascii=False))

    @property
    def plan_file(self) -> Path:
        """The file that is there while a source is being forgotten."""
        return self.root / "forgetting.json"

    def trial(self) -> dict[str, Any] | None:
        """What `canary` has written down of what serves and what is tried; None where nothing is tried."""
        try:
            trial: dict[str, Any] = json.loads(self._now_tried.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return trial

    def keep_trial(self, trial: Mapping[str, Any] | None) -> None:
        """Write down what serves and what is tried (see `trial`); None ends it."""
        with self.trying():
            if trial is None:
                self._now_tried.unlink(missing_ok=True)
            else:
                replace_file(self._now_tried, json.dumps(dict(trial)))

    @contextlib.contextmanager
    def trying(self) -> Iterator[None]:
        """Nobody else, thread or process, changes the trial meanwhile. Reentrant; pointers may be moved within it, and
        it is never waited for while they are being moved."""
        self._now_tried.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.root / "trial.lock", is_singleton=True):
            yield

    @property
    def _now_tried(self) -> Path:
        return self.root / "trials" / "now.json"

    def verdict(self, version: int) -> dict[str, Any] | None:
        """What a trial found of a version, or None where it was not tried."""
        try:
            found: dict[str, Any] = json.loads(self._trial_file(version).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return found

    def note_trial(self, version: int, found: Mapping[str, Any]) -> None:
        """Keep what a trial found, beside the version, whose folder never changes."""
        replace_file(self._trial_file(version), json.dumps(dict(found), indent=1))

    def _trial_file(self, version: int) -> Path:
        return self.root / "trials" / f"{version:08d}.json"

    def _serve_at_once(self, version: int) -> None:
        """Whoever moves the pointer by hand means it to serve: what is tried is tried no more. Call it in `trying`."""
        trial = self.trial()
        if trial is not None:
            counts = {name: trial[name] for name in ("promoted", "refused")}
            self.keep_trial({"serving": version, **counts})

    # --- moving pointers -----------------------------------------------------------------------------------------

    def promote(self, version: int, *, moves: int | None = None) -> PolicyVersion:
        """Let a version serve. What learns next starts from it, with its optimizer.

        moves: of the pointer on which this was decided; raises Moved when it has moved since.
        Raises OperantError when the version is not on disk, is broken, or a source is being forgotten.
        """
        with self.trying():
            with self._lock():
                self._expect_leave()
                chosen = self.get(version)
                before = self._unmoved(moves)
                if version != before.version:
                    self._write_pointer(Pointer(version, before.moves + 1, before.anchor, since=version))
            self._serve_at_once(version)
        return chosen

    def roll_back(self, to: int | None = None, *, moves: int | None = None) -> PolicyVersion:
        """Serve an earlier version again: `to`, or the nearest ancestor on disk of the one that serves.

        The optimizer goes back with the weights; events stay consumed, and what they taught since is forgotten.
        Raises OperantError when there is nothing to go back to, and Moved as `promote` does.
        """
        if to is not None:
            return self.promote(to, moves=moves)
        with self.trying():
            now = int((self.trial() or {}).get("serving", self.pointer().version))
            there = self._folders()
            for ancestor in self.ancestors(now)[1:]:
                if ancestor in there:
                    return self.promote(ancestor, moves=moves)
        raise OperantError(f"version {now} has no ancestor on disk to roll back to; choose one with --promote N")

    def pass_anchor(self, version: int, *, moves: int | None = None) -> None:
        """The slow gate, or a person, has passed this version: from now on drift and loss are measured from it. Raises
        Moved and OperantError as `promote` does."""
        with self._lock():
            self._expect_leave()
            self.get(version)
            self._unmoved(moves)
            self._write_pointer(dataclasses.replace(self.pointer(), anchor=version, since=version))

    def follow(self, version: int) -> None:
        """From now on drift is measured from this version; what may be lost is still measured from the anchor.
        Raises OperantError as `get` does."""
        with self._lock():
            self.get(version)
            self._write_pointer(dataclasses.replace(self.pointer(), since=version))

    def put(self, pointer: Pointer) -> None:
        """Set the pointer as it is given. Raises OperantError as `get` does."""
        with self._lock():
            self.get(pointer.version)
            self._write_pointer(pointer)

    def serve_what_was_made_again(self) -> Pointer:
        """Let the last version that was made again serve, at once and with all that its pointer says."""
        made = Versions(self.root, self.keep, beside=True).pointer()
        with self.trying():
            self.put(made)
            self._serve_at_once(made.version)
        return made

    def pin(self, user: str, version: int | None) -> None:
        """Serve this user that version whatever is published; None lets them follow again. Raises OperantError as
        `get` does."""
        with self._lock():
            pins = self.pins()
            if version is None:
                pins.pop(user, None)
            else:
                self.get(version)
                pins[user] = version
            replace_file(self.root / "pins.json", json.dumps(pins, ensure_ascii=False, indent=1))

    # --- a step, from its record to its publication --------------------------------------------------------------

    def begin(self, write: Callable[[Path], None], fingerprint: Mapping[str, str]) -> PolicyVersion:
        """Version 0, the model as it comes in. write: fills a folder with model/ and learner.pt.

        Raises OperantError when a version serves already, or this one cannot be saved.
        """
        with self._lock():
            if self.exists():
                raise OperantError(f"{self.root} serves already; choose another --root, or leave --model out")
            record = StepRecord(
                version=0, parent=-1, moves=0, begin_offset=0, consumed_offset=0, events=[], seed=0, coefficients={},
                fingerprint=dict(fingerprint), state="published",
            )  # fmt: skip
            there = self._folders()
            if list(there) == [0]:  # of a start that was cut off, perhaps with another model
                checkpoint.delete(there.pop(0).path)
            if 0 not in there:
                self._save(record, write, {"passed": True, "reason": "the first version"})
            self._write_pointer(Pointer(0, 0, 0))
        return self.get(0)

    def announce(self, record: StepRecord) -> None:
        """Write down durably what the step will use, before it begins."""
        replace_file(self._pending_file(record.version), record.to_json())

    def pending(self) -> StepRecord | None:
        """The step that a crash cut off, if there is one."""
        for file in sorted((self.root / "pending").glob("[0-9]*.json")):
            with contextlib.suppress(FileNotFoundError):  # it has ended meanwhile
                return StepRecord.from_json(file.read_text(encoding="utf-8"))
        return None

    def publish(self, record: StepRecord, write: Callable[[Path], None], gate: Mapping[str, Any]) -> PolicyVersion:
        """Save the version of a finished step and let it serve; `tidy` then drops old ones.

        write: fills a folder with model/ and learner.pt. Raises Moved when another version serves than the step began
        with, before anything is written; OperantError when the disk is full, with the old version still serving.
        """
        with self._lock():
            if self.pointer().moves != record.moves:
                raise Moved
            record.state = "published"
            self._save(record, write, gate)
            self._write_pointer(dataclasses.replace(self.pointer(), version=record.version, moves=record.moves + 1))
            self._forget_pending(record.version)
        return self._version(self._folders()[record.version])

    def settle(self, record: StepRecord) -> None:
        """Keep the record of a finished step that publishes nothing. Raises ValueError for one that publishes."""
        if record.state not in ("refused", "nothing"):
            raise ValueError(f"a {record.state} step is not settled so")
        replace_file(self._record_file(record.version), record.to_json())
        self._forget_pending(record.version)

    def finish(self) -> StepRecord | None:
        """Complete what a crash left; returns the step that has to be executed again, if any.

        Call it with no other learner at work.
        """
        with self._lock():
            record = self.pending()
            if record is None or (record.again >= 0 and not self.beside):  # a forgetting goes on with its own
                return None
            if record.version in self._folders():
                now = self.pointer()
                if now.moves == record.moves:  # saved but not served yet
                    self._write_pointer(dataclasses.replace(now, version=record.version, moves=now.moves + 1))
            elif not self._record_file(record.version).exists():
                return record
            self._forget_pending(record.version)
        return None

    def clean(self) -> None:
        """Remove the half-written files of killed processes. Call it at start, with no other learner at work."""
        with self._lock():
            checkpoint.clean(self.root, "current", "current.again", "pins.json", "forgetting.json", "anchors.jsonl")
            for folder in (self.folder, *(self.root / name for name in ("records", "pending", "slow"))):
                checkpoint.clean(folder)
        with self.trying():  # the server writes here, with a learner or without
            checkpoint.clean(self.root / "trials")

    def prune(self) -> list[int]:
        """Drop the weights of old versions and return their numbers; their records stay.

        Kept are the `keep` newest, the current one and its nearest ancestor on disk (one roll-back is always possible),
        the anchor, the version that drift is measured from, whatever a user is pinned to, and the oldest, from which
        all others can be made again.
        """
        there = self._folders()
        trial = self.trial() or {}
        held = {min(there), *self.pins().values(), trial.get("serving"), trial.get("candidate")}
        for file in filter(Path.exists, map(self._pointer_file, (False, True))):
            now = Pointer(**json.loads(file.read_text(encoding="utf-8")))
            ancestor = next((a for a in self.ancestors(now.version)[1:] if a in there), now.version)
            held |= {now.version, now.anchor, now.since, ancestor}
        self._keep_records(there)
        gone = checkpoint.prune(self.folder, self.keep, [there[n].path for n in held if n in there])
        paths = {c.path: number for number, c in there.items()}
        return sorted(paths[path] for path in gone)

    def tidy(self) -> None:
        """`prune` after a publication, when what is new serves already. A fault is logged; the next one tries again."""
        with self._lock():
            try:
                self.prune()
            except (OperantError, OSError) as error:
                log.warning("old versions stay on disk: %s", error)

    def drop(self, numbers: Sequence[int]) -> None:
        """Delete the weights of these versions, those that are on disk; users who are pinned to one follow again. The
        records stay. Raises ValueError for the one that serves."""
        with self._lock():
            if self.pointer().version in numbers:
                raise ValueError(f"version {self.pointer().version} serves and cannot be dropped")
            pins = self.pins()
            if any(version in numbers for version in pins.values()):
                kept = {user: version for user, version in pins.items() if version not in numbers}
                replace_file(self.root / "pins.json", json.dumps(kept, ensure_ascii=False, indent=1))
            there = {number: c for number, c in self._folders().items() if number in numbers}
            self._keep_records(there)
            for c in there.values():
                checkpoint.delete(c.path)

    def drop_pending(self) -> None:
        """Leave the step that was announced and not finished: its events are still to be consumed."""
        with self._lock():
            record = self.pending()
            if record is not None and record.version not in self._folders():
                self._forget_pending(record.version)

    # --- files ---------------------------------------------------------------------------------------------------

    def _save(self, record: StepRecord, write: Callable[[Path], None], gate: Mapping[str, Any]) -> None:
        def fill(folder: Path) -> None:
            write(folder)
            (folder / "record.json").write_text(record.to_json(), encoding="utf-8")
            (folder / "gate.json").write_text(json.dumps(dict(gate), indent=1), encoding="utf-8")

        try:
            checkpoint.save(self.folder, record.version, fill, meta={"stage": "live"})
        except OperantError as error:
            cause = str(error).split(" while saving")[0]
            raise OperantError(
                f"version {record.version} could not be saved in {self.folder} ({cause}): the version before it serves "
                "on; free some space there, and the step is made again"
            ) from error

    def _absent(self, version: int) -> OperantError:
        there = ", ".join(map(str, self._folders())) or "none"
        return OperantError(f"the weights of version {version} are not on disk; choose one of those there: {there}")

    def _keep_records(self, there: Mapping[int, checkpoint.Checkpoint]) -> None:
        """A copy of each version's record outside of its folder, which is about to go. The folder is right about it."""
        for number, c in there.items():
            file, text = self._record_file(number), (c.path / "record.json").read_text(encoding="utf-8")
            if not file.exists() or file.read_text(encoding="utf-8") != text:
                replace_file(file, text)
                self._records.pop(file, None)

    def _folders(self) -> dict[int, checkpoint.Checkpoint]:
        found = {c.step: c for c in checkpoint.list_checkpoints(self.folder)}
        return {number: found[number] for number in sorted(found)}

    def _finished(self, file: Path) -> StepRecord:
        if file not in self._records:
            self._records[file] = StepRecord.from_json(file.read_text(encoding="utf-8"))
        return self._records[file]

    def _version(self, saved: checkpoint.Checkpoint) -> PolicyVersion:
        record = self._finished(saved.path / "record.json")
        gate = json.loads((saved.path / "gate.json").read_text(encoding="utf-8"))
        return PolicyVersion(
            version=record.version, parent=record.parent if record.parent >= 0 else None, step=record.version,
            path=str(saved.path), sha256=saved.sha256, consumed=tuple(record.events),
            verdict="passed" if gate.get("passed") else str(gate.get("reason", "")),
        )  # fmt: skip

    def _record_file(self, version: int) -> Path:
        return self.root / "records" / f"{version:08d}.json"

    def _slow_file(self, version: int) -> Path:
        return self.root / "slow" / f"{version:08d}.json"

    def _pending_file(self, version: int) -> Path:
        return self.root / "pending" / f"{version:08d}.json"

    def _forget_pending(self, version: int) -> None:
        self._pending_file(version).unlink(missing_ok=True)

    def _unmoved(self, moves: int | None) -> Pointer:
        """The pointer, unless it has moved since it had made so many moves: then Moved is raised."""
        now = self.pointer()
        if moves is not None and now.moves != moves:
            raise Moved
        return now

    def _write_pointer(self, pointer: Pointer) -> None:
        replace_file(self._pointer_file(self.beside), json.dumps(dataclasses.asdict(pointer)))

    def _pointer_file(self, beside: bool) -> Path:
        return self.root / ("current.again" if beside else "current")

    def _expect_leave(self) -> None:
        """Raises OperantError while a source is being forgotten: what serves is about to be made again."""
        if not self.beside and self.forgetting():
            raise OperantError("a source is being forgotten; move versions when that is done (operant versions tells)")

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        self.root.mkdir(parents=True, exist_ok=True)
        with FileLock(self.root / "versions.lock", is_singleton=True):  # reentrant
            yield


def _expect_whole(version: int, path: Path, within: str = "") -> None:
    fault = checkpoint.verify(path, within)
    if fault is not None:
        raise OperantError(f"version {version} is broken ({fault}); roll back with operant versions --promote N")
