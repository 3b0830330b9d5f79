"""A step executed from its record and the weights of its parent: the first time, after a crash, and to prove a version.

With the same fingerprint the weights are the same to the last bit, with another one they lie within a tolerance.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from operant.algorithms.learner import Learner, Sgd
from operant.config import LearnerConfig, LiveConfig, ReplayConfig, WorkerConfig
from operant.live.learning.anchors import Anchors
from operant.live.learning.events import EventReader, EventSource, open_store
from operant.live.learning.lesson import LearnerState, Lesson, prepare
from operant.live.learning.origin import Origin
from operant.live.learning.pace import settled
from operant.live.learning.step import StepResult, fingerprint, new_learner, take_step
from operant.live.storage.versions import StepRecord, Versions
from operant.models.policy import Policy
from operant.run.run import mixed_seed
from operant.types import Batch, Feedback, OperantError

__all__ = [
    "LoadedVersion", "Verified", "lesson_of", "load_like", "load_version", "make_again", "make_step", "pulled_by",
    "verifiable", "verify_root", "verify_version",
]  # fmt: skip


@dataclass(slots=True)
class LoadedVersion:
    """A version in memory with what learning goes on with. anchor_logits: its own, once they are known."""

    version: int
    moves: int
    policy: Policy
    learner: Learner
    state: LearnerState
    anchor_logits: Tensor | None = None

    @classmethod
    def load(
        cls, versions: Versions, version: int, moves: int, config: WorkerConfig, like: Policy | None = None
    ) -> LoadedVersion:
        """From disk, as `load_version` does. Raises OperantError when it is not there, or broken."""
        path = Path(versions.get(version).path)
        policy = load_version(versions, version, config, like)
        learner = new_learner(policy, settled(config, versions.root))
        saved = torch.load(path / "learner.pt", map_location=policy.device, weights_only=True)
        learner.load_state_dict(saved["learner"])
        return cls(version, moves, policy, learner, LearnerState.load(path))

    def save(self, folder: Path) -> None:
        """Fill the folder of a version."""
        self.policy.save(folder / "model")
        torch.save({"learner": self.learner.state_dict()}, folder / "learner.pt")
        (folder / "state.json").write_text(json.dumps(dataclasses.asdict(self.state)), encoding="utf-8")


def lesson_of(
    record: StepRecord, at: LoadedVersion, source: EventSource, versions: Versions, config: LiveConfig
) -> tuple[Lesson, LiveConfig]:
    """The lesson of a record on the version that it begins with, a function of these alone.

    Raises OperantError when the store no longer holds the events that the record names.
    """
    coefficients: dict[str, Any] = dict(record.coefficients)
    config = dataclasses.replace(config, **coefficients)
    events = _events_of(record, source)
    # by their place in the log: what came later has not been said yet, also when the step is made again after it
    earlier = [r for r in versions.records() if r.begin_offset < record.begin_offset]
    forgotten = {name for r in earlier for name in r.forgotten}
    line = set(versions.ancestors(at.version))
    learned = {
        name: r.version for r in earlier if r.version in line and r.state == "published"
        for name, outcome in r.outcomes.items() if outcome.state == "used"
    }  # fmt: skip
    reader = EventReader(
        source.completion, at.policy.codec, config.score_low, config.score_high,
        encoder=at.policy.has_encoder, max_length=at.policy.max_length,
    )  # fmt: skip
    state = at.state.without(forgotten)
    return prepare(events, reader, state, config, seed=record.seed, learned=learned), config


def _events_of(record: StepRecord, source: EventSource) -> list[tuple[int, Feedback]]:
    """The events of a step, as the store has them. Raises OperantError when it lacks one of them."""
    wanted, after = set(record.events), record.begin_offset
    found: list[tuple[int, Feedback]] = []
    while len(found) < len(wanted) and (page := source.events_after(after, len(wanted))):
        found += [(offset, event) for offset, event in page if event.id in wanted]
        after = page[-1][0]
        if after >= record.consumed_offset:
            break
    if [event.id for _, event in found] != record.events:
        raise OperantError(
            f"the store does not hold the events of step {record.version} in their order; give the --store that it "
            "began with"
        )
    return found


def make_step(
    record: StepRecord,
    at: LoadedVersion,
    lesson: Lesson,
    anchors: Anchors,
    config: LiveConfig,
    origin: Origin | None,
    pulled: Anchors | None,
) -> StepResult:
    """`take_step` with the record's coefficients and seed, whatever the learner in memory was made with.

    origin: the version that `record.pulled_to` names. pulled: the answers of the root by which steps are pulled.
    """
    at.learner.lr = at.learner.critic_lr = config.lr
    if isinstance(at.learner.rule, Sgd):
        at.learner.rule.max_grad_norm = config.max_grad_norm
    torch.manual_seed(record.seed)
    return take_step(
        at.policy, at.learner, lesson, anchors, config, origin=origin,
        pulled=pulled_by(pulled, at.policy, config, record.version), anchor_logits=at.anchor_logits,
    )  # fmt: skip


def pulled_by(pulled: Anchors | None, policy: Policy, config: LiveConfig, version: int) -> Batch | None:
    """Those of a root's answers by which the step of this number is pulled, None where it is not."""
    if pulled is None or not config.anchor_coef:
        return None
    return pulled.some(policy, config.anchor_pulls, mixed_seed(config.seed, "pull", version))


def load_version(versions: Versions, version: int, config: LearnerConfig, like: Policy | None = None) -> Policy:
    """The weights of a version on disk, to compute with.

    like: another version in memory. Where an adapter learns, both stand on one base, and memory holds that once.
    Raises OperantError when they are not there, or broken.
    """
    folder = Path(versions.get(version).path) / "model"
    policy = load_like(like, folder, config.device, config.dtype)
    if like is None:
        policy.keep_stem()  # the others have it from this one
    return policy


def load_like(like: Policy | None, folder: Path, device: str, dtype: str) -> Policy:
    """A version's folder, to compute with, on the base of `like` where an adapter learns. Raises OperantError when it
    cannot be read."""
    if like is not None and like.is_lora:
        policy = like.twin()
        policy.restore(folder)
    else:
        policy = Policy.load(folder, device=device, dtype=dtype)
    policy.model.eval()
    return policy


def make_again(versions: Versions, version: int, source: EventSource, config: WorkerConfig) -> Policy:
    """The weights of a version, made again from its record and its parent: with the same fingerprint the same bits.

    Raises OperantError when the version was not published, its parent is not on disk, or the store has changed.
    """
    record = versions.record(version)
    if record.state != "published" or record.parent < 0:
        raise OperantError(f"version {version} was not made by a step; choose one that was")
    at = LoadedVersion.load(versions, record.parent, record.moves, config)
    lesson, used = lesson_of(record, at, source, versions, config)
    pulled_to = record.pulled_to
    origin = None if pulled_to is None else Origin(load_version(versions, pulled_to, config, at.policy))
    anchors, pulled = Anchors.load(versions.root, at.policy), Anchors.load_pulled(versions.root, at.policy)
    make_step(record, at, lesson, anchors, used, origin, pulled)
    if lesson.rehearsed != record.replayed:  # after the step, which leaves out what is too far, as the record does
        raise OperantError(f"the store lacks what step {version} learned again; give the --store that it began with")
    return at.policy


@dataclass(frozen=True, slots=True)
class Verified:
    """A version beside what its record makes again. difference: the largest of any weight, 0.0 for the same bits.

    same_fingerprint: whether it was made with today's libraries, kind of machine and `step.ARITHMETIC`; only then are
    the same bits to be expected.
    """

    version: int
    difference: float
    same_fingerprint: bool

    @property
    def same(self) -> bool:
        """Whether every weight has the same bits."""
        return self.difference == 0.0

    def differs(self, tolerance: float) -> bool:
        """Whether its record makes another: by any bit with the same fingerprint, else by more than the tolerance."""
        return self.difference > (0.0 if self.same_fingerprint else tolerance)


def verify_version(versions: Versions, version: int, source: EventSource, config: WorkerConfig) -> Verified:
    """Make a version again from its record and its parent, and compare every weight.

    Raises OperantError when its weights, its parent's or its events are not there.
    """
    again = make_again(versions, version, source, config)
    there = Policy.load(Path(versions.get(version).path) / "model", device=config.device, dtype=config.dtype)
    pairs = zip(again.model.parameters(), there.model.parameters(), strict=True)
    with torch.no_grad():
        difference = max(float((a - b).abs().max()) for a, b in pairs)
    return Verified(version, difference, versions.record(version).fingerprint == fingerprint(there))


def verifiable(config: ReplayConfig) -> list[StepRecord]:
    """The records of the versions that can be made again: `config.version`, or all that are published and on disk with
    their parents.

    Raises OperantError when there is no such version.
    """
    versions = Versions(config.root)
    if config.version is not None:
        return [versions.record(config.version)]
    there = {v.version for v in versions.all()}
    return [r for r in versions.records() if r.version in there and r.parent in there and r.state == "published"]


def verify_root(config: ReplayConfig, progress: Callable[[int, int], None] | None = None) -> list[Verified]:
    """`verify_version` each version that is `verifiable`. progress: called with (versions made again, versions in all).

    Raises OperantError when a version's weights, its parent's or its events are not there.
    """
    found, versions = verifiable(config), Versions(config.root)
    worker = WorkerConfig(root=config.root, device=config.device, dtype=config.dtype)
    source = open_store(config.store or str(versions.root / "store.db"))
    verified = []
    for record in found:
        torch.set_num_threads(int(record.fingerprint.get("threads", 1)))  # as the learner had them
        verified.append(verify_version(versions, record.version, source, worker))
        if progress is not None:
            progress(len(verified), len(found))
    return verified
