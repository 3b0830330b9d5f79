"""Steps made again from their records: to prove a version, and to serve weights as if a source had never spoken.

To forget a source is more than to take an event back. Every version whose weights its feedback, or feedback on answers
to its prompts, has touched is dropped. From the last version before its first use on, the steps are made again, with
their own coefficients, on the events that are left. The events stay in the store as facts without content, so that
offsets and counts hold. The old version serves until all is made, and is then replaced at once.

With the same fingerprint the weights are bit for bit those that the same steps would have made without the source:
which earlier ratings a step learns again is drawn by priorities that no other source changes
(`feedback_log.draw_named`), and baselines, memory, and what the gate measures from are made again too. In `shared`
mode, events of a step in which too few sources are left are learned with the next one. What people have read in the
meantime cannot be unsampled, nor what other sources said because of it; both are beyond this.

A forgetting is a file that moves through stages, each written down when it is done, so that a kill between any two
loses nothing: "asked"; "planned" (by the learner, between two steps); "emptied" (the store, by the one process that
writes it); "made" (by the learner: the steps again, the new version serving, the old weights deleted); or "refused".
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from filelock import FileLock, Timeout

from operant.config import ForgetConfig, WorkerConfig
from operant.live.learning.events import EventSource
from operant.live.learning.learner import LiveLearner
from operant.live.storage.feedback import FORGOTTEN
from operant.live.storage.versions import Pointer, StepRecord, Versions
from operant.run.files import replace_file
from operant.types import Feedback, OperantError

if TYPE_CHECKING:  # it needs SQLAlchemy, which a learner from a file of JSON Lines does without
    from operant.live.storage.store import Store

__all__ = ["Forgotten", "Plan", "Remaking", "ask", "empty", "finish", "forget", "forget_from", "forgotten"]

TOMBSTONES = "forgotten"
TOO_FEW = "without the source that is forgotten, too few sources have spoken"


@dataclass(frozen=True, slots=True)
class Forgotten:
    """What was done. base: the version from which steps were made again, None where no weights had been touched.
    redone: the steps that were. dropped: versions whose weights are gone. current: what serves now."""

    events: int
    base: int | None
    redone: int
    dropped: list[int]
    current: int


@dataclass(slots=True)
class Plan:
    """The file `forgetting.json`.

    number: of the tombstone. begun: the first version that is made again. pointer: of the base, as its next step found
    it. was: what served, with its pointer. steps: what is made again.
    """

    source: str
    number: int
    stage: Literal["asked", "planned", "emptied", "made", "refused"] = "asked"
    reason: str = ""
    begun: int = 0
    events: int = 0
    pointer: dict[str, int] | None = None
    was: dict[str, int] = field(default_factory=dict)
    steps: list[dict[str, Any]] = field(default_factory=list)
    drop: list[int] = field(default_factory=list)
    done: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, versions: Versions) -> Plan | None:
        """The plan of a root; None where nobody is being forgotten."""
        values = versions.plan()
        return None if values is None else cls(**values)

    def write(self, versions: Versions) -> None:
        """Keep the plan, durably."""
        versions.keep_plan(dataclasses.asdict(self))


class Emptied(Protocol):
    """What forgetting writes into the store."""

    def forget(self, source: str) -> int:
        """Empty what a source has said and asked; the number of its events."""
        ...


# --- the whole of it --------------------------------------------------------------------------------------------------


def ask(versions: Versions, source: str) -> Plan:
    """Write down that a source is to be forgotten; a server at work does the rest, and so does `forget`.

    Raises OperantError when there is no source, or another one is being forgotten.
    """
    if not source:
        raise OperantError("--source is missing; give whom to forget")
    with FileLock(versions.root / "forgetting.lock"):
        there = Plan.read(versions)
        if there is not None and there.stage != "refused":
            if there.source == source and there.stage in ("asked", "planned"):
                return there
            which = "this" if there.source == source else "another"  # what this one has said since would stay
            raise OperantError(f"{which} source is being forgotten; ask again when that is done")
        numbers = [int(file.stem) for file in (versions.root / TOMBSTONES).glob("[0-9]*.json")]
        plan = Plan(source, 1 + max(numbers, default=0))
        plan.write(versions)
    return plan


def forget(
    source: str, store: Store, config: WorkerConfig, progress: Callable[[int, int], None] | None = None
) -> Forgotten:
    """Forget a source: its feedback, what it asked, and what the weights have learned from it.

    Call it with no server and no learner at work. One that was cut off is finished first, whatever is asked.
    progress: called with (steps made again, steps in all).

    Raises OperantError when nothing of the source is known, and when no version before its first use is on disk.
    """
    versions = Versions(config.root, config.keep)
    begun = Plan.read(versions)
    done = None
    if begun is not None and begun.stage != "refused":
        done = _carry_out(versions, store, config, progress)
        if begun.source == source:
            return done
    ask(versions, source)
    return _carry_out(versions, store, config, progress)


def forget_from(config: ForgetConfig, progress: Callable[[int, int], None] | None = None) -> Forgotten:
    """Forget a source as `config` says: `forget`, or, where a server is at work, that one does it when it is asked.

    progress: called with (steps made again, steps in all).

    Raises OperantError when there is no source or no such folder, when a learner is at work without a server, and when
    the source cannot be forgotten.
    """
    if not config.source:
        raise OperantError("--source is missing; give whom to forget")
    root = Path(config.root)
    if not root.is_dir():
        raise OperantError(f"{config.root} is no folder; give --root, the one that operant serve writes")
    from operant.live.storage.store import Store

    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(FileLock(root / "server.lock", timeout=0))
        except Timeout:
            return _forgotten_by_the_server(config, progress)
        torch.set_num_threads(config.threads)
        try:
            stack.enter_context(FileLock(root / "learner.lock", timeout=0))
        except Timeout:
            raise OperantError(f"a learner is at work in {config.root}; stop it first") from None
        store = stack.enter_context(Store(config.store or root / "store.db"))
        worker = WorkerConfig(root=config.root, device=config.device, dtype=config.dtype)
        return forget(config.source, store, worker, progress)


def _forgotten_by_the_server(config: ForgetConfig, progress: Callable[[int, int], None] | None) -> Forgotten:
    """Ask the server that is at work in this root, by a file as all processes do, and wait until it is done."""
    versions = Versions(config.root)
    asked = ask(versions, config.source)
    while True:
        if (done := forgotten(versions, asked.number)) is not None:
            return done
        plan = Plan.read(versions)
        if plan is not None and plan.number == asked.number:
            if plan.stage == "refused":
                versions.plan_file.unlink()
                raise OperantError(plan.reason)
            if plan.steps and progress is not None:
                made = sum(r.again >= 0 and r.version >= plan.begun for r in versions.records())
                progress(min(made, len(plan.steps)), len(plan.steps))
        time.sleep(0.1)


def _carry_out(
    versions: Versions, store: Store, config: WorkerConfig, progress: Callable[[int, int], None] | None
) -> Forgotten:
    remaking = Remaking(config, store, progress)
    while True:
        plan = Plan.read(versions)
        assert plan is not None
        if plan.stage == "refused":
            versions.plan_file.unlink()
            raise OperantError(plan.reason)
        if plan.stage == "planned":
            empty(plan, versions, store)
        elif plan.stage == "made":
            store.reconcile(versions.records())
            store.served(versions.pointer().version, time.time())
            return finish(plan, versions)
        else:
            remaking.once()


# --- the part of the process that writes the store --------------------------------------------------------------------


def empty(plan: Plan, versions: Versions, store: Emptied) -> None:
    """Empty what the source has said and asked. It may be done again."""
    store.forget(plan.source)
    plan.stage = "emptied"
    plan.write(versions)


def finish(plan: Plan, versions: Versions) -> Forgotten:
    """Leave a tombstone: that something was forgotten, and nothing of what or whom."""
    values = {"time": time.time(), **plan.done}
    replace_file(versions.root / TOMBSTONES / f"{plan.number:08d}.json", json.dumps(values, indent=1))
    (versions.root / "current.again").unlink(missing_ok=True)
    versions.plan_file.unlink()
    return Forgotten(**plan.done)


def forgotten(versions: Versions, number: int) -> Forgotten | None:
    """What the forgetting of that number came to, once it is done."""
    try:
        values = json.loads((versions.root / TOMBSTONES / f"{number:08d}.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    del values["time"]
    return Forgotten(**values)


# --- the learner's part -----------------------------------------------------------------------------------------------


class Remaking:
    """The learner's part of a forgetting. Call `once` with no other learner at work, until the stage is "made".

    progress: called with (steps made again, steps in all).
    """

    def __init__(
        self, config: WorkerConfig, source: EventSource, progress: Callable[[int, int], None] | None = None
    ) -> None:
        self.config, self.source, self.progress = config, source, progress
        self.versions = Versions(config.root, config.keep)
        self._learner: LiveLearner | None = None

    def once(self) -> bool:
        """Plan, or make one step again, or serve what was made; False when another has to do its part first."""
        plan = Plan.read(self.versions)
        assert plan is not None
        if plan.stage == "asked":
            try:
                _plan(plan, self.versions, self.source)
                plan.stage = "planned"
            except OperantError as error:
                plan.stage, plan.reason = "refused", str(error)
            plan.write(self.versions)
            return True
        if plan.stage != "emptied":
            return False
        if plan.pointer is None:
            self._serve(plan)
            return True
        if self._learner is None:
            self._learner = self._begin(plan)
        redone = self._redone(plan)
        number = next((n for n, step in enumerate(plan.steps) if step["old"][-1] not in redone), None)
        if self.progress is not None and plan.steps:
            self.progress(len(plan.steps) if number is None else number, len(plan.steps))
        if number is None:
            self._as_it_was(plan, Pointer(**plan.was), len(plan.steps))
            self._serve(plan)
            return True
        step, old = plan.steps[number], self._old(plan, number)
        if number:
            self._as_it_was(plan, Pointer(old.parent, old.moves, old.anchor, old.since), number)
        if step["enough"]:
            self._learner.repeat(old, step["begin"], step["events"])
        else:
            self._learner.leave(old, step["begin"], step["events"], TOO_FEW)
        return True

    def _begin(self, plan: Plan) -> LiveLearner:
        learner = LiveLearner(self.config, self.source, lambda news: None)
        learner.versions = Versions(self.config.root, self.config.keep, beside=True)
        assert plan.pointer is not None
        if not learner.versions.exists():
            learner.versions.put(Pointer(**plan.pointer))
        learner.start()
        learner.versions.drop_pending()  # a step that was cut off is made again from the plan
        return learner

    def _redone(self, plan: Plan) -> dict[int, StepRecord]:
        return {r.again: r for r in self.versions.records() if r.version >= plan.begun and r.again >= 0}

    def _old(self, plan: Plan, number: int) -> StepRecord:
        """The record of a step that is made again: of its last part."""
        return self.versions.record(plan.steps[number]["old"][-1])

    def _as_it_was(self, plan: Plan, found: Pointer, number: int) -> None:
        """Move the pointer as somebody, or the slow gate, moved it before the step of that number: `found` is what that
        one found. What the learner itself moves, it has moved again."""
        assert self._learner is not None and plan.pointer is not None
        side = self._learner.versions
        now = side.pointer()
        moved = found.moves != _moves_after(self.versions.record(found.version))
        moves = _moves_after(self.versions.record(now.version)) + moved
        anchor, since = now.anchor, now.version if moved else now.since
        before = self._old(plan, number - 1).anchor if number else plan.pointer["anchor"]
        if found.anchor >= 0 and before >= 0 and found.anchor != before:
            anchor, since = self._stands_for(plan, found.anchor), self._stands_for(plan, found.since)
        wanted = Pointer(now.version, moves, anchor, since)
        if wanted != now:
            side.put(wanted)

    def _stands_for(self, plan: Plan, version: int) -> int:
        """What was made again of an earlier version, or of the nearest before it of which there is something."""
        assert plan.pointer is not None
        redone, base = self._redone(plan), plan.pointer["version"]
        line = set(self.versions.ancestors(plan.was["version"])) - set(self.versions.ancestors(base))
        while version in line:
            again = redone.get(version)
            if again is not None and again.state == "published":
                return again.version
            version = self.versions.record(version).parent
        return base if version in plan.drop else version

    def _serve(self, plan: Plan) -> None:
        """Let what was made serve, at once; delete the weights that the source has touched."""
        if plan.pointer is not None:
            self.versions.serve_what_was_made_again()
        self.versions.drop(plan.drop)
        left = {v.version for v in self.versions.all()}
        done = Forgotten(
            plan.events, None if plan.pointer is None else plan.pointer["version"], len(self._redone(plan)),
            [v for v in plan.drop if v not in left], self.versions.pointer().version,
        )  # fmt: skip
        plan.done, plan.stage = dataclasses.asdict(done), "made"
        plan.write(self.versions)
        self._learner = None


def _moves_after(record: StepRecord) -> int:
    """How often the pointer had moved once that version was published."""
    return record.moves + (record.version > 0)


def _plan(plan: Plan, versions: Versions, source: EventSource) -> None:
    """What forgetting takes, from the records and the store."""
    from operant.live.storage.store import Store

    if not isinstance(source, Store):
        raise OperantError("feedback in a file of JSON Lines cannot be emptied; take its lines out of the file")
    versions.finish()
    versions.drop_pending()  # a step that no version came from yet: its events are still to be consumed
    touching = set(source.said_by_or_to(plan.source))
    own = {name for name in touching if (story := source.story(name)) and story.event.source == plan.source}
    if not own and not source.asked_by(plan.source):
        raise OperantError(
            f"nothing of a source {plan.source!r} is stored; operant feedback lists the sources that are"
        )
    records, there = versions.records(), {v.version for v in versions.all()}
    pointer = versions.pointer()
    touched = {r.version for r in records if r.state == "published" and not touching.isdisjoint(r.events)}
    published = [r.version for r in records if r.state == "published"]
    plan.begun, plan.events, plan.was = versions.next_version(), len(own), dataclasses.asdict(pointer)
    plan.drop = [v for v in published if v in there and not touched.isdisjoint(versions.ancestors(v))]
    line = versions.ancestors(pointer.version)
    first = min((v for v in line if v in touched), default=None)
    if first is None:
        return
    bases = [v for v in versions.ancestors(first)[1:] if v in there]
    if not bases:
        raise OperantError(
            f"no version from before {first}, the first that learned from {plan.source!r}, is on disk; begin another "
            "--root with the model"
        )
    kept = there - set(plan.drop)
    # the nearest of which also what the gate measured from is there; one that is not known is the base itself
    base = next((b for b in bases if _measured_from(records, line, b) <= kept), bases[0])
    redo = _since(records, line, base)
    anchor, since = redo[0].anchor, redo[0].since
    moved = redo[0].moves - _moves_after(versions.record(base)) != 0
    plan.pointer = dataclasses.asdict(
        Pointer(
            base, _moves_after(versions.record(base)) + moved,
            anchor if anchor in kept else base, since if since in kept else base,
        )
    )  # fmt: skip
    plan.steps = _steps_to_redo(redo, own, touching, source)


def _since(records: list[StepRecord], line: list[int], base: int) -> list[StepRecord]:
    """The steps since a version, in order, also those that the gate refused or that moved nothing then: without the
    source it may be otherwise. One that was made again before is there once."""
    redone = [r for r in records if r.again >= 0]
    return [
        r for r in records
        if r.parent in line and r.parent >= base and (r.version in line or r.state != "published")
        and not any(
            q.version > r.version and q.begin_offset <= r.begin_offset and r.consumed_offset <= q.consumed_offset
            for q in redone
        )
    ]  # fmt: skip


def _measured_from(records: list[StepRecord], line: list[int], base: int) -> set[int]:
    first = _since(records, line, base)[0]
    return {v for v in (first.anchor, first.since) if v >= 0}


def _steps_to_redo(redo: list[StepRecord], own: set[str], touching: set[str], store: Store) -> list[dict[str, Any]]:
    """The steps to make again, without the source's events. A step left with too few sources waits for the next, as its
    events would have. A step left without events is dropped."""
    steps: list[dict[str, Any]] = []
    waiting: list[StepRecord] = []
    events: list[Feedback] = []
    for record in redo:
        left = [event for event in _left(record, store) if event.id not in own]
        if not left:
            continue
        waiting.append(record)
        events += left
        needed = int(record.coefficients.get("min_sources", 1))
        enough = len({event.source for event in events if event.id not in touching}) >= needed
        if enough or needed <= 1:
            steps.append(_step(waiting, events, True))
            waiting, events = [], []
    if waiting:
        steps.append(_step(waiting, events, False))
    return steps


def _step(records: list[StepRecord], events: list[Feedback], enough: bool) -> dict[str, Any]:
    return {
        "old": [r.version for r in records], "begin": records[0].begin_offset,
        "events": [event.id for event in events], "enough": enough,
    }  # fmt: skip


def _left(record: StepRecord, store: Store) -> list[Feedback]:
    """The events of a step, without those of sources that were forgotten before."""
    found = []
    for name in record.events:
        story = store.story(name)
        if story is None:
            raise OperantError(
                f"what step {record.version} learned was removed from the store by age or size, so the steps since "
                "cannot be made again; begin another --root with the model"
            )
        if story.event.source != FORGOTTEN:
            found.append(story.event)
    return found
