"""Versions are proved from their records, and a source is forgotten as if it had never spoken."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from live import answered
from program import Program

from operant.config import LearnerConfig, WorkerConfig
from operant.live.learning import execution, learner, step
from operant.live.learning import forget as forgetting
from operant.live.learning.execution import LoadedVersion, verify_version
from operant.live.learning.forget import forget
from operant.live.learning.worker import Worker
from operant.live.storage.store import Origin, Store
from operant.live.storage.versions import Versions
from operant.models.policy import Policy
from operant.types import Feedback, OperantError

SAID = (
    ("c0", "ann", "thumb", 1), ("c1", "ann", "thumb", -1), ("c2", "bob", "thumb", 1), ("c3", "ann", "edit", "a dog"),
    ("c1", "bob", "edit", "one two"), ("c3", "bob", "comment", "why?"), ("c2", "ann", "score", 0.9),
    ("c0", "bob", "retract", None), ("c1", "cat", "thumb", 1),
)  # fmt: skip
# three sources in turn, who contradict, correct and retract themselves; c3 is bob's question
LONG = (
    ("c0", "ann", "thumb", 1), ("c1", "cat", "score", 0.2), ("c3", "ann", "thumb", 1), ("c2", "cat", "thumb", -1),
    ("c0", "bob", "thumb", -1), ("c1", "ann", "edit", "a dog"), ("c2", "bob", "edit", "one two"),
    ("c2", "ann", "thumb", 1), ("c1", "cat", "score", 0.9), ("c0", "cat", "comparison", "c4"),
    ("c3", "cat", "thumb", 1), ("c0", "bob", "retract", None), ("c0", "ann", "retract", None),
    ("c1", "bob", "score", 0.7), ("c0", "ann", "thumb", -1), ("c2", "cat", "retract", None),
    ("c1", "ann", "score", 0.6), ("c2", "ann", "comment", "hm"), ("c0", "cat", "edit", "the red"),
    ("c2", "bob", "thumb", 1), ("c1", "cat", "thumb", 1), ("c2", "ann", "edit", "ran"),
)  # fmt: skip


@dataclasses.dataclass
class World:
    """What people said to one tiny model, learned event by event."""

    store: Store
    config: WorkerConfig

    @property
    def versions(self) -> Versions:
        return Versions(self.config.root, self.config.keep)

    def serving(self) -> LoadedVersion:
        pointer = self.versions.pointer()
        return LoadedVersion.load(self.versions, pointer.version, pointer.moves, self.config)


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Roots that have learned, under the name of what they have learned."""
    return tmp_path_factory.mktemp("copies")


@pytest.fixture
def world(make_policy: Callable[..., Policy], tmp_path: Path, copies: Path) -> Iterator[Callable[..., World]]:
    """world(name, without=…): the same, without what these have said. One that was made before is copied."""
    stores: list[Store] = []
    policy = make_policy("gpt2")
    policy.save(tmp_path / "model")
    answers = answered(policy, 5)  # c4 is another answer to the prompt of c0

    def make(
        name: str, without: Sequence[str] = (), said: Sequence[tuple[str, str, str, Any]] = SAID, together: int = 1,
        anew: bool = False, **settings: Any,
    ) -> World:  # fmt: skip
        root = tmp_path / name
        copy = copies / hashlib.sha256(repr((without, said, together, settings)).encode()).hexdigest()
        if copy.exists() and not anew:
            shutil.copytree(copy, root)
        root.mkdir(exist_ok=True)
        store = Store(root / "store.db")
        stores.append(store)
        config = WorkerConfig(
            **{"root": str(root), "model": str(tmp_path / "model"), "device": "cpu", "anchor_rows": 2,
               "anchor_tokens": 4, "drift_budget": 1e3, "likelihood_drop": 1e3, "keep": 100}
            | settings
        )  # fmt: skip
        if copy.exists() and not anew:
            return World(store, config)
        for number, (key, stored) in enumerate(answers.interactions.items()):
            asker = "bob" if number == 3 else "eve"
            store.begin(key, stored.prompt, stored.completion.sampling, Origin(user=asker))
            store.complete(stored.completion, "complete")
        worker = Worker(config, store, lambda told: None)
        worker.start()
        gone = "bob" in without
        for first in range(0, len(said), together):
            for number, (completion_id, source, kind, value) in list(enumerate(said))[first : first + together]:
                if source not in without and not (gone and completion_id == "c3"):
                    event = Feedback(f"e{number}", completion_id, kind, value, source, f"k{number}", float(number))
                    store.add_feedback(event, body_hash=str(number))
            worker.once()
        store.reconcile(worker.versions.records())
        if not anew:
            shutil.copytree(root, copy, ignore=shutil.ignore_patterns("*.db*", "*.lock"))
            store.backup(copy / "store.db")
        return World(store, config)

    yield make
    for store in stores:
        store.close()


@pytest.fixture
def program(capsys: pytest.CaptureFixture[str]) -> Program:
    return Program(capsys)


def same(one: LoadedVersion, other: LoadedVersion) -> bool:
    weights = zip(one.policy.model.parameters(), other.policy.model.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in weights)


def test_a_version_is_proved_from_its_record(world: Callable[..., World]) -> None:
    here = world("live")
    published = [r.version for r in here.versions.records() if r.state == "published" and r.version]
    assert len(published) >= 4
    for version in published:
        assert verify_version(here.versions, version, here.store, here.config).same
    last = here.versions.get(published[-1])
    weights = Path(last.path) / "model"
    policy = Policy.load(weights, device="cpu")
    with torch.no_grad():
        next(policy.model.parameters()).view(-1)[0] += 0.25
    policy.model.save_pretrained(weights)
    versions = here.versions
    versions.get = lambda version: (
        dataclasses.replace(last) if version == last.version else Versions.get(versions, version)
    )  # type: ignore[method-assign]
    assert verify_version(versions, last.version, here.store, here.config).difference == pytest.approx(0.25)


@pytest.mark.parametrize(("recorded", "alarm"), [(None, False), (step.ARITHMETIC, True), (step.ARITHMETIC + 1, False)])
def test_the_bits_are_expected_of_the_same_arithmetic_alone(
    world: Callable[..., World], program: Program, monkeypatch: pytest.MonkeyPatch, recorded: int | None, alarm: bool
) -> None:
    """A record from before the number was kept, or of another number, is held to the tolerance."""

    def fingerprint(policy: Policy) -> dict[str, str]:
        known = step.fingerprint(policy)
        there = known.pop("arithmetic")
        assert there == str(step.ARITHMETIC)
        return known if recorded is None else known | {"arithmetic": str(recorded)}

    with monkeypatch.context() as patch:
        patch.setattr(learner, "fingerprint", fingerprint)
        here = world("live", said=SAID[:1], anew=True)
    assert here.versions.record(1).fingerprint.get("arithmetic") == (None if recorded is None else str(recorded))
    here.store.close()
    made_again = execution.make_again

    def nudged(*arguments: Any) -> Policy:
        """What a learner with another order of its sums would have come to."""
        policy = made_again(*arguments)
        with torch.no_grad():
            next(policy.model.parameters()).view(-1)[0] += 1e-6
        return policy

    monkeypatch.setattr(execution, "make_again", nudged)
    verified = program("replay", "--root", here.config.root)
    assert verified.status == alarm and ("with other libraries or by another operant" in verified.out) is not alarm
    assert ("version 1 is not what its record makes" in verified.err[-1]) is alarm


def test_what_serves_after_a_forget_is_as_if_the_source_had_never_spoken(world: Callable[..., World]) -> None:
    here, never = world("live"), world("never", without=("bob",))
    assert not same(here.serving(), never.serving())
    before = here.versions.pointer().version
    told = forget("bob", here.store, here.config)
    now, other = here.serving(), never.serving()
    assert same(now, other) and now.state.baselines == other.state.baselines
    assert now.learner.state_dict() == other.learner.state_dict()
    # the versions that had learned from bob are gone, and those from before are not
    assert before in told.dropped and told.current > before and told.base is not None
    there = {v.version for v in here.versions.all()}
    assert not there & set(told.dropped) and {0, told.base} <= there
    with pytest.raises(OperantError, match="not on disk"):
        here.versions.promote(before)
    # and each that was made again is proved by its own record
    for record in here.versions.records():
        if record.again >= 0 and record.state == "published":
            assert verify_version(here.versions, record.version, here.store, here.config).same


@pytest.mark.parametrize("where", ["named", "inner"])
def test_versions_of_an_adapter_lie_alone_and_keep_every_promise(
    where: str, world: Callable[..., World], tmp_path: Path
) -> None:
    """Roll-back, retention, replay and forgetting, on a base that is named or one that goes along with the adapter."""
    policy = Policy.load(tmp_path / "model", device="cpu")
    policy.add_lora(rank=2)
    if where == "inner":
        policy._origin = None
    policy.save(tmp_path / "adapter")
    of_adapter = {"model": str(tmp_path / "adapter"), "lr": 0.5}
    here, never = world("live", anew=True, **of_adapter), world("never", without=("bob",), anew=True, **of_adapter)
    published = [r.version for r in here.versions.records() if r.state == "published" and r.version]
    assert len(published) >= 4 and not same(here.serving(), never.serving())
    weights = [file for file in Path(here.config.root).rglob("*.safetensors") if "base" not in file.parts]
    assert len(weights) == 1 + len(published) and {file.name for file in weights} == {"adapter_model.safetensors"}
    bases = {file.stat().st_ino for file in Path(here.config.root).rglob("base/*.safetensors")}
    assert len(bases) == (where == "inner")  # one file on the disk, with a name in each version
    for version in published:
        assert verify_version(here.versions, version, here.store, here.config).same
    few = Versions(here.config.root, keep=1)
    few.prune()
    kept = {v.version for v in few.all()}
    assert len(kept) < 1 + len(published)
    serving = here.serving()
    few.roll_back()
    assert few.pointer().version in kept and not same(here.serving(), serving)
    few.promote(serving.version)
    assert same(here.serving(), serving)
    told = forget("bob", here.store, here.config)
    assert same(here.serving(), never.serving()) and told.dropped
    if where == "named":
        (tmp_path / "model").rename(tmp_path / "gone")
        with pytest.raises(OperantError, match=r"the base of .*, .*/model from there, is gone"):
            here.serving()


def remembered(at: LoadedVersion) -> list[dict[str, Any]]:
    return [entry["event"] for entry in at.state.memory]


@pytest.mark.parametrize(("whom", "half_life"), [("ann", 0.0), ("bob", 0.0), ("cat", 0.001)])
def test_with_the_default_settings_it_is_bit_for_bit_as_if_the_source_had_never_spoken(
    world: Callable[..., World], whom: str, half_life: float
) -> None:
    here = world("live", said=LONG, half_life=half_life)
    never = world("never", without=(whom,), said=LONG, half_life=half_life)
    assert here.config.replay_events == LearnerConfig().replay_events == "auto"
    said = {f"e{number}" for number, (_, source, _, _) in enumerate(LONG) if source == whom}
    before = {record.version: set(record.replayed) for record in here.versions.records()}
    assert any(said & replayed for replayed in before.values())
    told = forget(whom, here.store, here.config)
    now, other = here.serving(), never.serving()
    assert same(now, other) and now.state.baselines == other.state.baselines
    assert remembered(now) == remembered(other) and now.learner.state_dict() == other.learner.state_dict()
    again = [r for r in here.versions.records() if r.version not in before and r.state == "published"]
    drawn = [r.replayed for r in never.versions.records() if r.state == "published" and r.version]
    assert [r.replayed for r in again] == drawn[len(drawn) - len(again) :] and sum(map(len, drawn)) > 20
    assert told.redone > len(again) > 3
    for record in again:
        assert verify_version(here.versions, record.version, here.store, here.config).same


def test_two_are_forgotten_one_after_the_other(world: Callable[..., World]) -> None:
    here = world("live", said=LONG)
    never = world("never", without=("ann", "bob"), said=LONG)
    forget("bob", here.store, here.config)
    forget("ann", here.store, here.config)
    now, other = here.serving(), never.serving()
    assert same(now, other) and remembered(now) == remembered(other)
    assert {event["source"] for event in remembered(now)} == {"cat"}


def test_steps_of_several_sources_are_made_again_with_those_that_are_left(world: Callable[..., World]) -> None:
    """A step needs two sources; one that is left with fewer is learned with the next one."""
    settings: dict[str, Any] = {"said": LONG[:18], "together": 3, "min_sources": 2}
    here, never = world("live", **settings), world("never", without=("bob",), **settings)
    forget("bob", here.store, here.config)
    now, other = here.serving(), never.serving()
    assert same(now, other) and remembered(now) == remembered(other) and now.state.baselines == other.state.baselines
    assert now.state.opinions == other.state.opinions and now.state.influence == other.state.influence
    merged = [r for r in here.versions.records() if r.again >= 0 and len(r.events) > 3]
    assert merged  # of which one part alone had too few sources


def test_what_the_gate_measures_from_is_made_again_too(world: Callable[..., World]) -> None:
    """With a small budget for drift some versions are refused, and which depends on how many others there are."""
    settings: dict[str, Any] = {"said": LONG, "drift_versions": 3, "drift_budget": 0.028, "lr": 0.03}
    here, never = world("live", **settings), world("never", without=("bob",), **settings)
    states = [r.state for r in here.versions.records()]
    assert "refused" in states and here.versions.pointer().since
    forget("bob", here.store, here.config)
    assert same(here.serving(), never.serving())
    unheard = [[f"e{number}"] for number, row in enumerate(LONG) if row[0] == "c3"]  # about what bob has asked
    again = [r for r in here.versions.records() if r.version >= len(states) and r.events not in unheard]
    told = [(r.events, r.state) for r in never.versions.records() if r.version]
    assert [(r.events, r.state) for r in again] == told[len(told) - len(again) :] and len(again) > 10
    since, other = here.versions.pointer().since, never.versions.pointer().since
    assert here.versions.record(since).events == never.versions.record(other).events


def test_nothing_of_what_was_said_or_asked_stays(world: Callable[..., World], tmp_path: Path) -> None:
    here = world("live")
    forget("bob", here.store, here.config)
    stories = here.store.events(limit=100)
    gone = [s for s in stories if not s.event.source]
    assert len(stories) == len(SAID) and len(gone) == sum(source == "bob" for _, source, _, _ in SAID)
    assert all(s.event.value is None and s.state == "unused" and "forgotten" in s.reason for s in gone)
    assert all(s.advantage is None and s.logprob_before is None for s in gone)
    assert here.store.completion("c3") is None and here.store.completion("c0") is not None
    counts = here.store.counts()
    told = counts["pending"] + counts["used"] + counts["superseded"] + sum(counts["reasons"].values())
    assert counts["events"] == told == len(SAID) and counts["pending"] == 0
    (tombstone,) = (tmp_path / "live" / "forgotten").iterdir()
    assert "bob" not in tombstone.read_text() and json.loads(tombstone.read_text())["events"] == 4
    assert not (tmp_path / "live" / "forgetting.json").exists()
    with pytest.raises(OperantError, match="nothing of a source 'bob'"):
        forget("bob", here.store, here.config)


def test_what_follows_learns_on_from_it(world: Callable[..., World]) -> None:
    here = world("live")
    forget("bob", here.store, here.config)
    worker = Worker(here.config, here.store, lambda told: None)
    worker.start()
    assert not worker.once()  # nothing is learned twice
    here.store.add_feedback(Feedback("new", "c0", "thumb", -1, "cat", "k", 99.0), body_hash="new")
    assert worker.once()
    assert here.versions.records()[-1].events == ["new"]


@pytest.mark.parametrize("cut", [1, 3, 4, 5, 7, 9, 13, 14, 15, 17])
def test_a_forget_that_was_cut_off_is_finished(
    world: Callable[..., World], monkeypatch: pytest.MonkeyPatch, cut: int
) -> None:
    """Stopped at the cut-th durable move, and begun again."""
    here = world("live")
    moves = 0

    class Stopped(BaseException):
        pass

    def stopping(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def moved(*arguments: Any, **options: Any) -> Any:
            nonlocal moves
            moves += 1
            if moves == cut:
                raise Stopped
            return real(*arguments, **options)

        monkeypatch.setattr(owner, name, moved)

    for owner, name in (
        (forgetting.Plan, "write"), (Store, "forget"), (Versions, "put"), (Versions, "announce"), (Versions, "publish"),
        (Versions, "settle"), (Versions, "serve_what_was_made_again"), (Versions, "drop"), (Store, "reconcile"),
        (forgetting, "finish"),
    ):  # fmt: skip
        stopping(owner, name)
    with pytest.raises(Stopped):
        forget("bob", here.store, here.config)
    moves = -1000
    assert forget("bob", here.store, here.config).redone >= 1
    assert same(here.serving(), world("never", without=("bob",)).serving())
    assert len(list((Path(here.config.root) / "forgotten").iterdir())) == 1


def test_a_source_that_taught_nothing_leaves_the_weights_alone(world: Callable[..., World]) -> None:
    here = world("live")
    here.store.add_feedback(Feedback("x", "c0", "comment", "hm", "dan", "k", 99.0), body_hash="x")
    worker = Worker(here.config, here.store, lambda told: None)
    worker.start()
    worker.once()
    before = here.versions.pointer()
    told = forget("dan", here.store, here.config)
    assert told.base is None and told.dropped == [] and here.versions.pointer() == before


def test_the_program_forgets_and_verifies(world: Callable[..., World], program: Program) -> None:
    here = world("live")
    here.store.close()
    root = here.config.root
    assert "the same bits" in program("replay", "--verify", "--root", root).out
    told = json.loads(program("forget", "--root", root, "--source", "bob", "--json").out)
    assert told["events"] == 4 and told["redone"] >= 3
    shown = json.loads(program("replay", "--root", root, "--json").out)
    assert shown["versions"] and all(one["same"] for one in shown["versions"])
    assert "nothing of a source 'bob'" in program.fault("forget", "--root", root, "--source", "bob")
