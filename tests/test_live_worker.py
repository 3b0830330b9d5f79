"""The learner process: from events to versions, roll-backs, gates, faults, kills at every durable write."""

from __future__ import annotations

import dataclasses
import json
import os
import select
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forks import PATIENCE, Forked
from live import MemoryStore, Stored, answered, logprob
from program import Program

import operant
from operant.config import ServeConfig, WorkerConfig
from operant.data.feedback_log import line_of
from operant.live.learning.anchors import Anchors
from operant.live.learning.events import FeedbackFile, open_store
from operant.live.learning.execution import LoadedVersion, load_version, make_again
from operant.live.learning.gate import divergence, likelihood
from operant.live.learning.questions import QUESTIONS
from operant.live.learning.worker import Worker, main
from operant.live.serving.canary import Canary
from operant.live.storage.store import Store
from operant.live.storage.versions import Versions
from operant.models.policy import Policy
from operant.models.stem import Stem
from operant.types import OperantError

Make = Callable[..., Policy]
# a process of its own imports what the tests import
SAME_PACKAGE = os.environ | {"PYTHONPATH": str(Path(operant.__file__).parents[1])}


@dataclasses.dataclass
class Loop:
    """A worker on a tiny model, its store, and what it told."""

    store: MemoryStore
    worker: Worker
    told: list[dict[str, Any]]

    @property
    def versions(self) -> Versions:
        return self.worker.versions

    def rate(self, *arguments: Any, **options: Any) -> str:
        """Add an event and learn it."""
        event = self.store.add(*arguments, **options)
        assert self.worker.once()
        return event.id

    def again(self) -> Loop:
        """Another process on the same folder."""
        told: list[dict[str, Any]] = []
        worker = Worker(self.worker.config, self.store, told.append)
        worker.start()
        return Loop(self.store, worker, told)

    def total(self, name: str) -> float:
        stored = self.store.interactions[name]
        assert stored.completion is not None
        return float(logprob(self.worker.current().policy, stored.prompt, stored.completion.tokens).sum())


def started(tmp_path: Path, policy: Policy, **options: Any) -> Loop:
    """A worker on this policy, which has answered a few prompts."""
    policy.save(tmp_path / "model")
    settings: dict[str, Any] = {
        "root": str(tmp_path / "live"), "model": str(tmp_path / "model"), "device": "cpu", "anchor_rows": 3,
        "anchor_tokens": 6, "lr": 1e-3,
    }  # fmt: skip
    store, told = answered(policy), list[dict[str, Any]]()
    worker = Worker(WorkerConfig(**(settings | options)), store, told.append)
    worker.start()
    return Loop(store, worker, told)


@pytest.fixture
def make_loop(tmp_path: Path, make_policy: Make) -> Callable[..., Loop]:
    return lambda family="gpt2", **options: started(tmp_path, make_policy(family), **options)


@pytest.fixture
def program(capsys: pytest.CaptureFixture[str]) -> Program:
    return Program(capsys)


def weights(policy: Policy) -> list[torch.Tensor]:
    return [p.detach().clone() for p in policy.model.parameters()]


def same(one: Policy, other: Policy) -> bool:
    return all(torch.equal(a, b) for a, b in zip(weights(one), weights(other), strict=True))


def as_saved(loop: Loop, version: int) -> LoadedVersion:
    return LoadedVersion.load(loop.versions, version, 0, loop.worker.config)


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_each_rating_publishes_a_version_that_has_learned_it(family: str, make_loop: Callable[..., Loop]) -> None:
    loop = make_loop(family)
    before = loop.total("c1")
    name = loop.rate("c1", "thumb", 1)
    assert loop.total("c1") > before
    assert loop.told[-1]["version"] == 1 and loop.told[-1]["events"] == [name] and loop.told[-1]["gate"]["passed"]
    record = loop.versions.record(1)
    assert record.outcomes[name].state == "used" and record.anchors and record.coefficients["kl_budget"] == 0.02
    assert record.fingerprint["torch"] == torch.__version__
    assert list(record.times) == ["queued", "begun", "stepped", "gated"]
    assert not loop.worker.once()  # nothing is learned twice
    assert same(as_saved(loop, 1).policy, loop.worker.current().policy)


@pytest.mark.parametrize("anew", [False, True])
def test_an_answer_of_a_version_that_is_gone_is_learned_from(make_loop: Callable[..., Loop], anew: bool) -> None:
    """Its tokens and the log-probabilities that they were drawn with are in the record: no weights are needed."""
    loop = make_loop(keep=1)
    loop.rate("c0", "edit", "the cat sat on the mat")
    drawn = answered(loop.worker.current().policy, seed=7).interactions
    loop.store.interactions |= {
        f"of-1-{name}": dataclasses.replace(one, id=f"of-1-{name}") for name, one in drawn.items()
    }
    for name in ("c1", "c2", "c3"):
        loop.rate(name, "thumb", 1)
    loop.versions.tidy()
    assert 1 not in [version.version for version in loop.versions.all()]
    loop = loop.again() if anew else loop
    before = loop.total("of-1-c2")
    event = loop.rate("of-1-c2", "thumb", -1)
    outcome = loop.versions.record(5).outcomes[event]
    assert (outcome.state, loop.told[-1]["version"]) == ("used", 5) and loop.told[-1]["gate"]["passed"]
    assert loop.total("of-1-c2") < before == pytest.approx(outcome.logprob_before, abs=1e-3)


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_a_process_that_starts_anew_learns_what_one_that_ran_on_would(
    family: str, make_loop: Callable[..., Loop], tmp_path: Path
) -> None:
    loop = make_loop(family, replay_events=2)
    events = [("c0", "thumb", 1), ("c1", "edit", "the cat"), ("c2", "score", 0.1), ("c3", "thumb", -1)]
    for event in events[:2]:
        loop.rate(*event)
    shutil.copytree(tmp_path / "live", tmp_path / "copy")
    for event in events[2:]:
        loop.rate(*event)
    ran_on = weights(loop.worker.current().policy)
    other = Worker(dataclasses.replace(loop.worker.config, root=str(tmp_path / "copy"), batch_size=1), loop.store)
    other.say = lambda told: None
    other.start()
    assert other.once() and other.once() and not other.once()
    assert all(torch.equal(a, b) for a, b in zip(ran_on, weights(other.current().policy), strict=True))


def test_looking_ahead_changes_nothing_and_leaves_less_to_do(
    make_loop: Callable[..., Loop], monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, made = make_loop(), list[str]()
    loop.worker.look_ahead()
    real = Anchors.logits
    monkeypatch.setattr(Anchors, "logits", lambda *given: made.append("logits") or real(*given))
    monkeypatch.setattr("operant.live.learning.learner.load_version", lambda *given: made.append("load"))
    loop.rate("c1", "thumb", 1)
    assert made == [] and loop.told[-1]["version"] == 1
    monkeypatch.undo()
    assert same(make_again(loop.versions, 1, loop.store, loop.worker.config), loop.worker.current().policy)


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_an_adapter_learns_and_all_versions_stand_on_one_base(
    family: str, make_loop: Callable[..., Loop], tmp_path: Path
) -> None:
    loop = make_loop(family, lora_rank=2, lr=0.1, replay_events=2)
    before = loop.total("c1")
    loop.rate("c1", "thumb", 1)
    assert loop.total("c1") > before + 0.01
    loop.rate("c2", "thumb", -1)
    loop.rate("c1", "thumb", 1)
    now = loop.worker.current().policy
    frozen = {p.data_ptr() for p in now.model.parameters() if not p.requires_grad}
    for other in (loop.worker._origin(0).policy, load_version(loop.versions, 1, loop.worker.config, now)):  # type: ignore[union-attr]
        assert frozen <= {p.data_ptr() for p in other.model.parameters()}
    for version in (0, 1, 2, 3):
        folder = Path(loop.versions.get(version).path) / "model"
        assert (folder / "adapter_model.safetensors").exists() and not (folder / "base").exists()
        assert json.loads((folder / "base.json").read_text())["path"].endswith("/model")
    # what one process made another makes again, bit for bit
    assert same(make_again(loop.versions, 3, loop.store, loop.worker.config), now)
    other = loop.again()
    assert same(other.worker.current().policy, now)
    with pytest.raises(OperantError, match="learns an adapter of rank 2, as it began; leave --lora_rank out"):
        Worker(dataclasses.replace(loop.worker.config, lora_rank=0), loop.store).start()
    Worker(dataclasses.replace(loop.worker.config, lora_rank="auto"), loop.store).start()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_an_adapter_on_the_upper_blocks_learns_from_what_comes_out_of_the_others(
    family: str, make_loop: Callable[..., Loop]
) -> None:
    """And is pulled by other answers of the model that it began as. What one process made another makes again."""
    options = {"lora_rank": 2, "lr": 0.1, "replay_events": 2, "anchor_coef": 0.5, "anchor_pulls": 2, "batch_size": 1}
    loop = make_loop(family, **options)
    assert loop.worker.current().policy.stem_depth == 1
    assert (loop.versions.root / "pulled.jsonl").exists()
    before = loop.total("c1")
    loop.rate("c1", "thumb", 1)
    assert loop.total("c1") > before + 0.01
    loop.rate("c2", "thumb", -1)
    loop.rate("c0", "edit", "the cat")
    record = loop.versions.record(3)
    assert record.fingerprint["stem"] == "1" and record.coefficients["anchor_coef"] == 0.5
    now = loop.worker.current().policy
    assert same(make_again(loop.versions, 3, loop.store, loop.worker.config), now)
    other = loop.again()
    assert other.worker.current().policy.stem_depth == 1
    other.worker.look_ahead()
    loop.worker.look_ahead()
    loop.rate("c3", "thumb", 1)
    assert same(make_again(loop.versions, 4, loop.store, loop.worker.config), loop.worker.current().policy)
    whole = Worker(dataclasses.replace(loop.worker.config, anchor_coef=0.0), loop.store)  # what is said now counts now
    whole.say = lambda told: None
    whole.start()
    loop.store.add("c3", "thumb", -1)
    assert whole.once() and whole.versions.record(5).coefficients["anchor_coef"] == 0.0
    assert same(make_again(loop.versions, 4, loop.store, loop.worker.config), as_saved(loop, 4).policy)


def test_an_answer_is_read_before_it_is_rated(make_loop: Callable[..., Loop], monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"lora_rank": 2, "lr": 0.1, "batch_size": 1}
    loop, read = make_loop("llama", **options), list[str]()
    stem, split = Stem._read, Policy.split
    monkeypatch.setattr(Stem, "_read", lambda *given: read.append("stem") or stem(*given))
    monkeypatch.setattr(Policy, "split", lambda *given: read.append("anchor") or split(*given))
    loop.worker.look_ahead()
    read.clear()
    loop.worker.read_ahead("c1")
    assert read == []  # a small model reads as fast when it is rated
    monkeypatch.setattr("operant.live.learning.learner.is_large", lambda model: True)
    loop.worker.read_ahead("c1")
    assert sorted(read) == ["anchor", "stem"]
    loop.rate("c1", "thumb", 1)
    assert sorted(read) == ["anchor", "stem"]  # and not again
    assert same(make_again(loop.versions, 1, loop.store, loop.worker.config), loop.worker.current().policy)
    loop.store.interactions["none"] = Stored("none", loop.store.interactions["c1"].prompt, None)
    for name in ("none", "unknown", "c\ufffd"):
        loop.worker.read_ahead(name)


def test_the_blocks_of_an_adapter_are_a_setting(make_loop: Callable[..., Loop], tmp_path: Path) -> None:
    for layers, depth in (("auto", 1), (0, 0), (1, 1), (2, 0)):
        loop = make_loop(root=str(tmp_path / f"of-{layers}"), lora_rank=2, lora_layers=layers)
        assert loop.worker.current().policy.stem_depth == depth
        assert json.loads((loop.versions.root / "pace.json").read_text())["lora_layers"] == (1 if depth else 0)
        Worker(dataclasses.replace(loop.worker.config, lora_layers="auto"), loop.store).start()
        Worker(dataclasses.replace(loop.worker.config, lora_layers=1 if depth else 0), loop.store).start()
        there = "the last 1 blocks" if depth else "all blocks"
        with pytest.raises(OperantError, match=f"learns an adapter on {there}, as it began; leave --lora_layers out"):
            Worker(dataclasses.replace(loop.worker.config, lora_layers=0 if depth else 1), loop.store).start()
    assert make_loop("t5", root=str(tmp_path / "t5"), lora_rank=2).worker.current().policy.stem_depth == 0
    with pytest.raises(OperantError, match="leave --lora_layers out"):
        make_loop("t5", root=str(tmp_path / "none"), lora_rank=2, lora_layers=1)


def test_a_large_model_learns_an_adapter_unless_somebody_says_otherwise(
    make_loop: Callable[..., Loop], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert not make_loop(root=str(tmp_path / "small")).worker.current().policy.is_lora
    monkeypatch.setattr("operant.models.policy.SMALL", 1000)
    assert make_loop(root=str(tmp_path / "large")).worker.current().policy.is_lora
    assert not make_loop(root=str(tmp_path / "whole"), lora_rank=0).worker.current().policy.is_lora
    # a root from before goes on as it is
    old = dataclasses.replace(make_loop(root=str(tmp_path / "small")).worker.config)
    assert not Worker(old, MemoryStore()).current().policy.is_lora
    with pytest.raises(OperantError, match="learns all weights, as it began"):
        Worker(dataclasses.replace(old, lora_rank=4), MemoryStore()).start()


def test_the_replay_of_a_record_gives_the_same_bits(make_loop: Callable[..., Loop]) -> None:
    loop = make_loop(replay_events=2)
    loop.rate("c0", "thumb", 1)
    loop.rate("c1", "thumb", 1)
    loop.rate("c0", "retract", None)  # later, and must not change what version 2 was
    loop.rate("c2", "edit", "one two")
    # a learner with other settings replays with the record's
    config = dataclasses.replace(loop.worker.config, lr=0.5, max_grad_norm=9.0, replay_events=0, beta=3.0)
    for version in (1, 2, 4):
        again = make_again(loop.versions, version, loop.store, config)
        assert same(again, as_saved(loop, version).policy)
        assert not same(again, as_saved(loop, loop.versions.record(version).parent).policy)
    assert loop.versions.record(2).replayed == ["e1"] and loop.versions.record(4).replayed == ["e2"]
    with pytest.raises(OperantError, match="not made by a step"):
        make_again(loop.versions, 3, loop.store, config)
    loop.store.log[0] = dataclasses.replace(loop.store.log[0], id="swapped")
    with pytest.raises(OperantError, match="does not hold the events of step 1"):
        make_again(loop.versions, 1, loop.store, config)


def test_rolling_back_forgets_what_was_learned_since_and_brings_the_optimizer_back(
    make_loop: Callable[..., Loop],
) -> None:
    loop = make_loop()
    loop.rate("c0", "thumb", 1)
    first = weights(loop.worker.current().policy)
    optimizer = loop.worker.current().learner.state_dict()
    assert optimizer["steps"] == 1
    loop.rate("c1", "thumb", -1)
    loop.versions.roll_back()
    assert not loop.worker.once()  # what was consumed stays so
    now = loop.worker.current()
    assert all(torch.equal(a, b) for a, b in zip(first, weights(now.policy), strict=True))
    assert now.learner.state_dict() == optimizer
    loop.rate("c2", "thumb", 1)
    assert loop.versions.current().version == 3 and loop.versions.current().parent == 1


def test_a_roll_back_during_a_step_begins_the_step_again(
    make_loop: Callable[..., Loop], monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = make_loop()
    loop.rate("c0", "thumb", 1)
    from operant.live.learning import execution

    real, calls = execution.take_step, []

    def interrupted(*arguments: Any, **known: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            loop.versions.roll_back(0)
        return real(*arguments, **known)

    monkeypatch.setattr(execution, "take_step", interrupted)
    loop.rate("c1", "thumb", 1)
    assert len(calls) == 2
    record = loop.versions.record(2)
    assert record.parent == 0 and loop.versions.current().version == 2
    assert same(make_again(loop.versions, 2, loop.store, loop.worker.config), loop.worker.current().policy)


def test_a_step_that_teaches_nothing_publishes_nothing_and_says_so(make_loop: Callable[..., Loop]) -> None:
    loop = make_loop()
    before = weights(loop.worker.current().policy)
    name = loop.rate("c0", "comment", "hm")
    assert loop.told == [{"step": 1, "state": "nothing", "events": [name], "reason": "comment teaches nothing"}]
    assert loop.versions.current().version == 0 and loop.versions.record(1).outcomes[name].state == "unused"
    assert all(torch.equal(a, b) for a, b in zip(before, weights(loop.worker.current().policy), strict=True))
    loop.rate("c0", "thumb", 1)
    assert loop.versions.current().version == 2 and loop.versions.current().parent == 0


def test_what_is_taken_back_without_a_step_is_not_learned_again(make_loop: Callable[..., Loop]) -> None:
    loop = make_loop(replay_events=4)
    loop.rate("c0", "thumb", 1)
    name = loop.rate("c0", "retract", None)
    assert "version 1 had learned" in loop.versions.record(2).outcomes[name].reason
    loop.versions.promote(0)
    loop.versions.promote(1)
    loop.rate("c1", "thumb", 1)
    assert loop.versions.record(3).replayed == []


def test_the_gate_refuses_drift_and_the_old_version_serves_on(make_loop: Callable[..., Loop]) -> None:
    loop = make_loop(kl_budget=0.02, drift_budget=0.01, lr=0.1, replay_events=0)
    for turn in range(12):
        loop.rate(f"c{turn % 4}", "thumb", 1 if turn % 2 else -1, source=f"s{turn}")
        if loop.told[-1].get("state") == "refused":
            break
    refused = loop.told[-1]
    assert refused["state"] == "refused" and "drift" in refused["reason"]
    record = loop.versions.record(refused["step"])
    (result,) = record.outcomes.values()
    assert result.state == "unused" and "the gate refused" in result.reason
    assert result.logprob_after == result.logprob_before
    now = loop.versions.current().version
    assert now < refused["step"] and now > 0
    assert same(loop.worker.current().policy, as_saved(loop, now).policy)  # not the refused weights
    assert loop.worker.current().learner.steps == as_saved(loop, now).learner.steps
    loop.versions.pass_anchor(now)  # measured from here there is room again
    loop.rate("c0", "thumb", 1, source="late")
    assert loop.told[-1].get("version")


def test_drift_is_a_rate_and_what_is_lost_is_not(make_loop: Callable[..., Loop]) -> None:
    loop = make_loop(drift_versions=3, drift_budget=99.0, likelihood_drop=99.0)
    since = []
    for turn in range(7):
        loop.rate(f"c{turn % 4}", "thumb", 1, source=f"s{turn}")
        since.append(loop.versions.pointer().since)
    assert since == [0, 0, 3, 3, 3, 6, 6] and loop.versions.pointer().anchor == 0
    at, anchors = loop.worker.current(), loop.worker.anchors()
    parts = [anchors.logits(as_saved(loop, n).policy, 8192) for n in (7, 6, 0)]
    told = loop.versions.gate(7)
    assert told["kl_drift"] == pytest.approx(divergence(parts[0], parts[1]), rel=1e-6)
    lost = likelihood(parts[2], anchors.tokens(8192)) - likelihood(parts[0], anchors.tokens(8192))
    assert told["likelihood_lost"] == pytest.approx(lost, rel=1e-4)
    assert {version.version for version in loop.versions.all()} >= {0, 6}
    # a version that a person chooses is where drift begins; the process that starts anew goes on from there
    loop.versions.promote(0)
    assert loop.versions.pointer().since == 0 and at.version == 7
    again = loop.again()
    again.rate("c0", "thumb", 1, source="late")
    assert again.versions.pointer().since == 0 and again.told[-1]["gate"]["kl_drift"] < told["kl_drift"] + 1


def test_hostile_ratings_are_stopped_before_the_language_is_gone(make_loop: Callable[..., Loop]) -> None:
    """Somebody praises one token over and over, each step small enough, drift measured anew all the time."""
    loop = make_loop(drift_versions=1, likelihood_drop=0.1, replay_events=7, lr=0.05)
    stored = loop.store.interactions["c0"]
    assert stored.completion is not None
    same_token = np.full_like(stored.completion.tokens, stored.completion.tokens[0])
    stored.completion = dataclasses.replace(stored.completion, tokens=same_token)
    states = []
    for turn in range(60):
        loop.rate("c0", "thumb", 1, source=f"s{turn}")
        states.append(loop.told[-1].get("state", "published"))
        if states.count("refused") == 10:
            break
    assert states[0] == "published" and "refused" in states
    refused = next(told for told in loop.told if told.get("state") == "refused")
    assert "likelihood" in refused["reason"]
    anchors = loop.worker.anchors()
    lost = likelihood(anchors.logits(as_saved(loop, 0).policy, 8192), anchors.tokens(8192)) - likelihood(
        anchors.logits(loop.worker.current().policy, 8192), anchors.tokens(8192)
    )
    assert lost <= 0.1


def test_several_sources_are_waited_for_where_they_are_asked_for(make_loop: Callable[..., Loop]) -> None:
    loop = make_loop(min_sources=2, batch_size=1)
    for name in ("c0", "c1", "c2"):
        loop.store.add(name, "thumb", 1, source="loud")
    assert not loop.worker.once()
    loop.store.add("c3", "thumb", -1, source="quiet")
    assert loop.worker.once()
    assert loop.told[-1]["events"] == ["e1", "e2", "e3", "e4"]


def test_a_full_disk_is_told_and_the_step_is_made_when_there_is_room(
    make_loop: Callable[..., Loop], monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = make_loop()
    real = Policy.save

    def full(self: Policy, path: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Policy, "save", full)
    loop.store.add("c0", "thumb", 1)
    with pytest.raises(OperantError, match="the disk is full"):
        loop.worker.once()
    assert loop.versions.current().version == 0
    monkeypatch.setattr(Policy, "save", real)
    assert loop.worker.once() and not loop.worker.once()
    assert loop.versions.current().version == 1 and loop.versions.record(1).outcomes["e1"].state == "used"
    assert same(make_again(loop.versions, 1, loop.store, loop.worker.config), loop.worker.current().policy)


def test_an_event_on_which_the_step_fails_is_told_and_does_not_stop_the_others(
    make_loop: Callable[..., Loop], monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = make_loop(batch_size=1)
    from operant.live.learning import execution

    def failing(*arguments: Any, **known: Any) -> Any:
        raise RuntimeError("shapes differ")

    before = weights(loop.worker.current().policy)
    with monkeypatch.context() as patch:
        patch.setattr(execution, "take_step", failing)
        name = loop.rate("c0", "thumb", 1)
    assert loop.versions.record(1).outcomes[name].reason == "the step failed: RuntimeError: shapes differ"
    assert all(torch.equal(a, b) for a, b in zip(before, weights(loop.worker.current().policy), strict=True))
    loop.rate("c0", "thumb", 1)
    assert loop.versions.current().version == 2


def test_a_new_process_finishes_the_step_of_a_dead_one_with_its_settings(make_loop: Callable[..., Loop]) -> None:
    loop = make_loop()
    event = loop.store.add("c0", "thumb", 1)
    record = loop.worker._next()
    assert record is not None
    loop.versions.announce(record)
    loop.store.add("c1", "thumb", 1)
    loop.worker.config = dataclasses.replace(loop.worker.config, lr=1e-5)
    other = loop.again()
    assert other.worker.once()
    assert other.told[-1]["version"] == 1 and other.told[-1]["events"] == [event.id]
    assert other.versions.record(1).coefficients["lr"] == 1e-3
    assert other.worker.once() and other.told[-1]["events"] == ["e2"]


def test_the_slow_gate_rolls_back_what_lost_too_much_and_moves_the_anchor_for_what_lost_nothing(
    make_loop: Callable[..., Loop], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": text, "reference": "the cat"} for text in ("the cat", "a dog")]
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    loop = make_loop(heldout=str(tmp_path / "held.jsonl"), reference_field="reference")
    assert not loop.worker.judge()  # the anchor itself
    from operant.live.learning import worker

    values = {0: 40.0, 1: 41.0, 2: 39.0, 3: 30.0}
    asked: list[int] = []

    def measured(policy: Policy, prompts: Any, **options: Any) -> Any:
        assert [p.references for p in prompts] == [("the cat",)] * 2
        number = next(v.version for v in loop.versions.all() if same(as_saved(loop, v.version).policy, policy))
        asked.append(number)
        return {"bleu": values[number]}, []

    monkeypatch.setattr(worker, "slow_metrics", measured)
    loop.rate("c0", "thumb", 1)
    assert loop.worker.judge() and not loop.worker.judge()
    assert loop.versions.pointer().anchor == 1
    loop.rate("c1", "thumb", 1)
    assert loop.worker.judge()
    assert loop.versions.pointer().anchor == 1 and loop.versions.pointer().version == 2  # within the tolerance
    loop.rate("c2", "thumb", 1)
    assert loop.worker.judge()
    assert loop.versions.pointer().version == 1
    assert loop.told[-1]["rolled_back"] == 3 and "bleu is 30" in loop.told[-1]["reason"]
    found = loop.versions.slow(3)
    assert found is not None and not found["passed"]
    assert same(loop.worker.current().policy, as_saved(loop, 1).policy)


def judging(loop: Loop, values: dict[int, float], monkeypatch: pytest.MonkeyPatch, during: Any = None) -> None:
    """The slow gate finds these BLEUs of versions; `during` happens while it measures what serves."""
    from operant.live.learning import worker

    def measured(policy: Policy, prompts: Any, **options: Any) -> Any:
        number = next(v.version for v in loop.versions.all() if same(as_saved(loop, v.version).policy, policy))
        if number == loop.versions.pointer().version and during is not None:
            during()
        return {"bleu": values[number]}, []

    monkeypatch.setattr(worker, "slow_metrics", measured)


@pytest.fixture
def make_judged(make_loop: Callable[..., Loop], tmp_path: Path) -> Callable[..., Loop]:
    (tmp_path / "held.jsonl").write_text(json.dumps({"prompt": "the cat", "reference": "sat"}) + "\n")
    return lambda: make_loop(heldout=str(tmp_path / "held.jsonl"), reference_field="reference")


def test_a_roll_back_of_the_slow_gate_that_could_not_be_made_is_made_later(
    make_judged: Callable[..., Loop], monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = make_judged()
    loop.rate("c0", "thumb", 1)
    plan = {"source": "x", "number": 1, "stage": "asked"}
    judging(loop, {0: 40.0, 1: 10.0}, monkeypatch, lambda: loop.versions.keep_plan(plan))
    with pytest.raises(OperantError, match="being forgotten"):
        loop.worker.judge()
    loop.versions.plan_file.unlink()
    judging(loop, {0: 40.0, 1: 10.0}, monkeypatch)
    assert loop.worker.judge() and loop.versions.pointer().version == 0
    found = loop.versions.slow(1)
    assert found is not None and not found["passed"]


@pytest.mark.parametrize("bleu", [41.0, 10.0])
def test_what_a_person_decides_while_the_slow_gate_measures_stands(
    bleu: float, make_judged: Callable[..., Loop], monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = make_judged()
    loop.rate("c0", "thumb", 1)
    loop.rate("c1", "thumb", 1)
    judging(loop, {0: 40.0, 1: 40.0, 2: bleu}, monkeypatch, loop.versions.roll_back)
    assert loop.worker.judge()
    pointer = loop.versions.pointer()
    assert (pointer.version, pointer.anchor) == (1, 0) and loop.versions.slow(2) is None


def test_what_is_tried_and_found_bad_does_not_take_down_what_serves(
    make_judged: Callable[..., Loop], monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = make_judged()
    loop.rate("c0", "thumb", 1)
    canary = Canary(loop.versions, ServeConfig(canary_share=0.1))
    loop.rate("c1", "thumb", 1)
    assert canary.look() == (1, 2)
    judging(loop, {0: 40.0, 2: 10.0}, monkeypatch)
    assert loop.worker.judge() and canary.look() == (1, None)


def test_a_fault_after_a_version_was_published_leaves_it_published(
    make_loop: Callable[..., Loop], monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = make_loop()
    event = loop.store.add("c0", "thumb", 1)

    def gone(told: dict[str, Any]) -> None:
        raise RuntimeError("nobody listens")

    loop.worker.say = gone
    with pytest.raises(RuntimeError, match="nobody listens"):
        loop.worker.once()
    assert not list((loop.versions.root / "records").glob("00000001.json"))
    record = loop.again().versions.record(1)
    assert record.state == "published" and record.outcomes[event.id].state == "used"


def test_the_slow_gate_measures_generation(make_loop: Callable[..., Loop], tmp_path: Path) -> None:
    (tmp_path / "held.jsonl").write_text(json.dumps({"prompt": "the cat", "reference": "sat"}) + "\n")
    loop = make_loop(heldout=str(tmp_path / "held.jsonl"), reference_field="reference", tolerance=1.0)
    loop.rate("c0", "thumb", 1)
    assert loop.worker.judge()
    found = loop.versions.slow(1)
    assert found is not None and {"bleu", "chrf", "length", "distinct2"} <= set(found["numbers"])


@pytest.fixture
def make_chat_loop(tmp_path: Path, chat_policy: Policy) -> Callable[..., Loop]:
    """A worker on a tiny model of chats, anchored by its answers to shipped questions."""
    return lambda **options: started(tmp_path, chat_policy, **options)


SOUND = {"repeated": 0.1, "length": 20.0, "empty": 0.0, "commonest": 0.125}


def sensing(loop: Loop, senseless: set[int], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The slow gate finds that these versions repeat themselves; the versions that it has asked."""
    from operant.live.learning import worker

    asked: list[int] = []

    def measured(policy: Policy, prompts: Any, **options: Any) -> dict[str, float]:
        assert [p.text for p in prompts] == list(QUESTIONS[-8:])
        asked.append(next(v.version for v in loop.versions.all() if same(as_saved(loop, v.version).policy, policy)))
        return SOUND | ({"repeated": 0.9} if asked[-1] in senseless else {})

    monkeypatch.setattr(worker, "sense_metrics", measured)
    return asked


def test_what_lost_its_sense_is_rolled_back_to_the_newest_that_had_it_without_held_out_prompts(
    make_chat_loop: Callable[..., Loop], monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = make_chat_loop()
    asked = sensing(loop, {3}, monkeypatch)
    assert not loop.worker.judge()  # the anchor itself
    for number in (1, 2, 3):
        loop.rate(f"c{number}", "thumb", 1)
        assert loop.worker.judge() and not loop.worker.judge()
        assert loop.versions.pointer().anchor == 0  # sense alone moves no anchor
    assert asked == [1, 0, 2, 3]
    assert loop.versions.pointer().version == 2
    assert loop.told[-1]["rolled_back"] == 3 and "repeat themselves" in loop.told[-1]["reason"]
    found = loop.versions.slow(3)
    assert found is not None and not found["passed"] and found["numbers"]["sense_repeated"] == 0.9
    loop.rate("c0", "thumb", 1)
    assert loop.versions.record(4).parent == 2  # learning goes on from there


def test_where_no_version_before_had_passed_the_anchor_version_serves_again(
    make_chat_loop: Callable[..., Loop], monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = make_chat_loop()
    sensing(loop, {2}, monkeypatch)
    loop.rate("c0", "thumb", 1)
    loop.rate("c1", "thumb", 1)
    assert loop.worker.judge() and loop.versions.pointer().version == 0


def test_the_slow_gate_leaves_off_for_new_events_but_not_for_ever(
    make_chat_loop: Callable[..., Loop], monkeypatch: pytest.MonkeyPatch
) -> None:
    from operant.live.learning import worker

    loop, said = make_chat_loop(), 0
    look = worker.sense_metrics

    def disturbed(policy: Policy, prompts: Any, **options: Any) -> dict[str, float]:
        nonlocal said
        said += 1
        loop.store.add(f"c{said % 4}", "thumb", 1 if said % 2 else -1)  # while it looks
        return look(policy, prompts, **options)

    monkeypatch.setattr(worker, "sense_metrics", disturbed)
    loop.rate("c0", "thumb", 1)
    for number in range(1, worker.PUT_OFF + 1):
        newest = loop.versions.next_version()
        assert loop.worker.judge()  # the event was learned instead
        assert said == number and loop.versions.next_version() == newest + 1
    serving = loop.versions.pointer().version
    assert loop.versions.slow(serving) is None
    newest = loop.versions.next_version()
    assert loop.worker.judge()
    assert loop.versions.slow(serving) is not None and loop.versions.next_version() == newest


def test_sense_is_looked_at_in_quiet_and_where_there_is_none_after_many_steps(
    make_chat_loop: Callable[..., Loop],
) -> None:
    from operant.live.learning import worker

    loop = make_chat_loop()
    assert loop.worker.is_time(worker.QUIET) and not loop.worker.is_time(worker.QUIET / 2)
    loop.worker._put_off = worker.PUT_OFF
    assert loop.worker.is_time(0.0)
    for options in ({"once": True}, {"heldout": "rows.jsonl"}):  # who asked for it does not wait
        assert Worker(dataclasses.replace(loop.worker.config, **options), loop.store).is_time(0.0)


@pytest.mark.parametrize("options", [{"sense_rows": 0}, {"chat": False}])
def test_nobody_looks_where_sense_is_not_asked_for_or_anchors_are_no_questions(
    options: dict[str, Any], make_chat_loop: Callable[..., Loop]
) -> None:
    loop = make_chat_loop(**options)
    loop.rate("c0", "thumb", 1)
    assert loop.versions.pointer().version == 1 and not loop.worker.judge() and loop.versions.slow(1) is None


# --- the log ----------------------------------------------------------------------------------------------------------


def log_of(store: MemoryStore, path: Path) -> None:
    with path.open("a") as file:
        for stored in store.interactions.values():
            assert stored.completion is not None
            file.write(line_of(stored.prompt) + line_of(stored.completion))
        for event in store.log:
            file.write(line_of(event))


def test_a_growing_file_is_read_as_far_as_it_is_written(make_policy: Make, tmp_path: Path) -> None:
    store = answered(make_policy("gpt2"))
    path = tmp_path / "log.jsonl"
    log = FeedbackFile(path)
    assert log.events_after(0, 5) == [] and log.completion("c0") is None
    log_of(store, path)
    found = log.completion("c1")
    assert found is not None and found.completion is not None and found.prompt.id == "p1"
    line = line_of(store.add("c0", "thumb", 1))
    with path.open("a") as file:
        file.write(line[:20])
    assert log.events_after(0, 5) == []
    with path.open("a") as file:
        file.write(line[20:] + line + line_of(store.add("c1", "edit", "猫")))
    first, second = log.events_after(0, 5)
    assert (first[1], second[1]) == tuple(store.log) and second[0] == first[0] + 2  # the repeated line is no event
    assert log.events_after(first[0], 5) == [second] and log.events_after(0, 1) == [first]
    assert FeedbackFile(path).events_after(0, 5) == [first, second]
    with path.open("a") as file:
        file.write("nonsense\n")
    with pytest.raises(OperantError, match=r"line \d+ of .*log.jsonl is no prompt"):
        log.events_after(0, 5)
    with pytest.raises(OperantError, match=r"--store FILE.db"):
        open_store(str(tmp_path / "log.txt"))


def test_it_learns_from_a_database_that_another_process_writes(make_loop: Callable[..., Loop], tmp_path: Path) -> None:
    loop = make_loop()
    path = str(tmp_path / "live.db")
    with pytest.raises(OperantError, match="is not there"):
        open_store(path)
    with Store(path) as written:
        for name, found in loop.store.interactions.items():
            assert found.completion is not None
            written.begin(name, found.prompt, found.completion.sampling)
            written.complete(found.completion)
        read = open_store(path)
        loop.worker.source = read
        for kind, value in (("thumb", 1), ("edit", "the cat"), ("comment", "hm")):
            written.add_feedback(loop.store.add("c1", kind, value), body_hash="")
        assert loop.worker.once() and not loop.worker.once()
        # what it learned is what it learns from the same events in memory
        again = make_again(loop.versions, 1, loop.store, loop.worker.config)
        assert same(again, loop.worker.current().policy) and not same(again, as_saved(loop, 0).policy)
        assert written.counts()["pending"] == 3
        written.reconcile(loop.versions.records())
        told = [(s.state, s.version, s.reason) for s in written.events()]
        assert told == [("used", 1, ""), ("used", 1, ""), ("unused", 1, "comment teaches nothing")]
        first = written.story("e1")
        assert first is not None and first.logprob_before is not None and first.logprob_after is not None
        assert first.logprob_after > first.logprob_before and "received" in first.times
        assert isinstance(read, Store)
        read.close()


# --- the process and the program --------------------------------------------------------------------------------------


@pytest.mark.timeout(900)
def test_killed_at_every_durable_write_it_loses_no_event_and_learns_none_twice(
    make_loop: Callable[..., Loop], tmp_path: Path
) -> None:
    """And it needs no SQLAlchemy, which is of the extra `live`: it learns from a file of JSON Lines."""
    loop = make_loop()
    loop.store.add("c0", "thumb", 1)
    loop.store.add("c1", "comment", "hm")
    loop.store.add("c2", "comment", "so")
    loop.store.add("c3", "comment", "la")
    loop.store.add("c1", "edit", "the cat")
    log_of(loop.store, tmp_path / "log.jsonl")
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("live_kills.py")), loop.worker.config.root,
         str(tmp_path / "log.jsonl")],
        capture_output=True, text=True, check=False, env=SAME_PACKAGE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    clean = result["undisturbed"]
    assert [state[2] for state in clean["states"]] == ["published", "published", "nothing", "published"]
    assert [name for name, *_ in clean["outcomes"]] == ["e2", "e1", "e3", "e4", "e5"] and clean["left"] == []
    assert clean["current"] == 3
    assert result["writes"] > 40 and len(result["killed"]) > 20 and len(result["names"]) > 3
    for number, (by_the_copy, by_the_kill) in result["names"].items():
        assert by_the_copy == by_the_kill, f"killed at write {number}"
    for number, outcome in result["killed"].items():
        assert outcome == clean, f"killed at write {number}"


def start(loop: Loop, store: Path, *flags: str) -> subprocess.Popen[str]:
    arguments = [
        sys.executable,
        "-m",
        "operant.live.learning.worker",
        "--root",
        loop.worker.config.root,
        "--store",
        str(store),
    ]
    return Forked(
        [*arguments, "--device", "cpu", "--lr", "0.001", *flags], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env=SAME_PACKAGE,
    )  # fmt: skip


def test_the_process_wakes_tells_and_leaves_with_its_parent(make_loop: Callable[..., Loop], tmp_path: Path) -> None:
    loop = make_loop()
    path = tmp_path / "log.jsonl"
    log_of(loop.store, path)
    with start(loop, path, "--watch_stdin", "true", "--poll_seconds", "60") as process:
        assert process.stdin is not None and process.stdout is not None
        assert json.loads(process.stdout.readline()) == {"ready": 0}
        process.stdin.write("c1\nunknown\n\n")  # answers, before anybody rates them
        process.stdin.flush()
        with path.open("a") as file:
            file.write(line_of(loop.store.add("c0", "thumb", 1)))
        process.stdin.write("\n")
        process.stdin.flush()
        assert select.select([process.stdout], [], [], 60)[0]
        assert json.loads(process.stdout.readline())["version"] == 1
        with pytest.raises(SystemExit):  # one learner at a time
            main(["--root", loop.worker.config.root, "--store", str(path), "--once", "true"])
        process.stdin.close()
        assert process.wait(timeout=PATIENCE) == 0
    assert loop.versions.current().version == 1


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--root", "new", "--store", "log.jsonl", "--once", "true"], "give --model to begin with"),
        (["--root", "new", "--once", "true"], "--store is missing"),
        (["--root", "new", "--store", "log.jsonl", "--lr", "-1"], "lr is -1.0; it must be 0 or more"),
        (["--sotre", "x"], "sotre"),
    ],
)
def test_faults_of_the_process_are_one_line(
    flags: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(flags)
    error = capsys.readouterr().err
    assert stop.value.code == 1 and told in error and error.count("\n") == 1


def test_the_program_lists_compares_promotes_rolls_back_and_pins(
    make_loop: Callable[..., Loop], program: Program
) -> None:
    loop = make_loop()
    loop.rate("c0", "thumb", 1)
    loop.rate("c1", "comment", "hm")
    loop.rate("c1", "thumb", -1)
    root = ["versions", "--root", loop.worker.config.root]
    listed = json.loads(program(*root, "--json").out)
    assert listed["current"] == 3 and [row["state"] for row in listed["versions"]] == [
        "published", "published", "nothing", "published",
    ]  # fmt: skip
    lines = program(*root).out.splitlines()
    assert len(lines) == 4 and "current" in lines[3] and "anchor" in lines[0] and "comment teaches nothing" in lines[2]
    assert json.loads(program(*root, "--roll_back", "--json").out)["current"] == 1
    assert json.loads(program(*root, "--promote", "3", "--json").out)["current"] == 3
    assert json.loads(program(*root, "--anchor", "1", "--json").out)["anchor"] == 1
    assert json.loads(program(*root, "--pin", "ann", "--version", "1", "--json").out)["pins"] == {"ann": 1}
    assert "pinned by ann" in program(*root).out.splitlines()[1]
    assert json.loads(program(*root, "--unpin", "ann", "--json").out)["pins"] == {}
    compared = json.loads(program(*root, "--compare", "[1, 3]", "--json").out)
    assert compared["kl"] > 0 and compared["common_ancestor"] == 1
    assert json.loads(program(*root, "--compare", "[1, 1]", "--json").out)["kl"] == 0
    assert "give one of them" in program.fault(*root, "--roll_back", "--promote", "1")
    assert "--pin needs --version" in program.fault(*root, "--pin", "ann")
    assert "takes two versions" in program.fault(*root, "--compare", "[1]")
    assert "not on disk" in program.fault(*root, "--promote", "8")
    assert "serves no version yet" in program.fault("versions", "--root", "nowhere")
