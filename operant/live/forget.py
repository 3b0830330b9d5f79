"""Steps made again from their records: to prove a version, and to make what serves as if somebody had never spoken.

To forget a source is more than to take an event back. Every version whose weights its feedback has touched is dropped;
from the last one before its first use on, the steps are made again, with their own seeds and coefficients, on the
events that are left; the events stay in the store as facts without content, so that offsets and counts hold.

With the same fingerprint, and with `replay_events` 0, the weights are bit for bit those that the same events would have
made without the source; otherwise the draw of earlier ratings that are learned again may differ, though never to one of
the source. What people have read in the meantime cannot be unsampled, nor what other sources said because
of it; both are beyond this.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from operant import checkpoint
from operant.config import WorkerConfig
from operant.live.learning import EventSource, fingerprint
from operant.live.store import Store
from operant.live.versions import Versions
from operant.live.worker import Worker, replayed
from operant.policy import Policy
from operant.types import OperantError

__all__ = ["Forgotten", "Verified", "forget", "verify"]

PLAN = "forgetting.json"
TOMBSTONES = "forgotten"
PAGE = 1000


@dataclass(frozen=True, slots=True)
class Verified:
    """A version beside what its record makes again. difference: the largest of any weight, 0.0 for the same bits."""

    version: int
    difference: float
    same_fingerprint: bool

    @property
    def same(self) -> bool:
        return self.difference == 0.0


def verify(versions: Versions, version: int, source: EventSource, config: WorkerConfig) -> Verified:
    """Make a version again from its record and its parent, and compare every weight.

    Raises OperantError when its weights, its parent's or its events are not there.
    """
    again = replayed(versions, version, source, config)
    there = Policy.load(Path(versions.get(version).path) / "model", device=config.device, dtype=config.dtype)
    pairs = zip(again.model.parameters(), there.model.parameters(), strict=True)
    with torch.no_grad():
        difference = max(float((a - b).abs().max()) for a, b in pairs)
    return Verified(version, difference, versions.record(version).fingerprint == fingerprint(there))


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
class _Plan:
    """Written before anything is touched, so that a kill in the middle is gone on from. begun: the number of the first
    version that is made again."""

    source: str
    events: list[str]
    base: int | None
    redo: list[int]
    drop: list[int]
    begun: int


def forget(
    source: str, store: Store, config: WorkerConfig, progress: Callable[[int, int], None] | None = None
) -> Forgotten:
    """Forget a source: its feedback, what it asked, and what the weights have learned from it.

    Call it with no server and no learner at work. One that was cut off is finished first, whatever is asked.
    progress: called with (steps made again, steps in all).

    Raises OperantError when nothing of the source is known, and when no version before its first use is on disk.
    """
    versions = Versions(config.root, config.keep)
    file = versions.root / PLAN
    done: Forgotten | None = None
    if file.exists():
        begun = _Plan(**json.loads(file.read_text(encoding="utf-8")))
        done = _carry_out(begun, versions, store, config, progress)
        if begun.source == source:
            return done
    plan = _plan(source, versions, store)
    checkpoint.replace_file(file, json.dumps(dataclasses.asdict(plan), ensure_ascii=False))
    return _carry_out(plan, versions, store, config, progress)


def _plan(source: str, versions: Versions, store: Store) -> _Plan:
    own: list[str] = []
    after = 0
    while page := store.events(source=source, after=after, limit=PAGE) if source else []:
        own += [story.event.id for story in page]
        after = page[-1].offset
    if not own and not store.asked_by(source):
        raise OperantError(f"nothing of a source {source!r} is stored; operant feedback lists the sources that are")
    records, there = versions.records(), {v.version for v in versions.all()}
    touched = {r.version for r in records if r.state == "published" and not set(own).isdisjoint(r.events)}
    published = [r.version for r in records if r.state == "published"]
    drop = [v for v in published if v in there and not touched.isdisjoint(versions.ancestors(v))]
    line = versions.ancestors(versions.pointer().version)
    base, redo = None, []
    if first := [v for v in line if v in touched]:
        before = versions.ancestors(min(first))[1:]
        base = next((v for v in before if v in there), None)
        if base is None:
            raise OperantError(
                f"no version from before {min(first)}, the first that learned from {source!r}, is on disk; begin "
                "another --root with the model"
            )
        # also what the gate refused or moved nothing then: without the source it may be otherwise
        redo = [
            r.version for r in records
            if r.parent in line and r.parent >= base and (r.version in line or r.state != "published")
        ]  # fmt: skip
    return _Plan(source, own, base, redo, drop, versions.next_version())


def _carry_out(
    plan: _Plan, versions: Versions, store: Store, config: WorkerConfig, progress: Callable[[int, int], None] | None
) -> Forgotten:
    """Every part may be done again: a kill between two of them loses nothing."""
    versions.drop_pending()  # a step that no version came from yet: its events are still to be consumed
    store.forget(plan.source)
    redone = {r.again: r.version for r in versions.records() if r.version >= plan.begun and r.again >= 0}
    if plan.base is not None:
        if not redone and versions.pointer().version != plan.base:
            versions.promote(plan.base)
        if versions.pointer().anchor in plan.drop:
            versions.pass_anchor(plan.base)
        worker = Worker(config, store, lambda told: None)
        worker.start()
        for number, old in enumerate(plan.redo, start=1):
            if old not in redone:
                worker.repeat(versions.record(old), set(plan.events))
            if progress is not None:
                progress(number, len(plan.redo))
    versions.drop(plan.drop)
    left = {v.version for v in versions.all()}
    dropped = [v for v in plan.drop if v not in left]  # also those that made room for newer ones on the way
    store.reconcile(versions.records())
    store.served(versions.pointer().version, time.time())
    made = sum(1 for r in versions.records() if r.version >= plan.begun and r.again >= 0)
    told = Forgotten(len(plan.events), plan.base, made, dropped, versions.pointer().version)
    _write_tombstone(versions.root / TOMBSTONES / f"{plan.begun:08d}.json", told)
    (versions.root / PLAN).unlink()
    return told


def _write_tombstone(file: Path, told: Forgotten) -> None:
    """That something was forgotten, and nothing of what or whom."""
    values: dict[str, Any] = {"time": time.time(), **dataclasses.asdict(told)}
    checkpoint.replace_file(file, json.dumps(values, indent=1))
