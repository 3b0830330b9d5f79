"""Many teach one model: reputation from agreement, the cap on each source, and steps that are made again alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from live import MemoryStore, anchors_of, answered, reader_of
from program import Program
from serving import learning, serving

from operant.config import LiveConfig, WorkerConfig
from operant.live.learning import influence, lesson
from operant.live.learning.execution import LoadedVersion, verify_version
from operant.live.learning.forget import forget
from operant.live.learning.influence import after, reputations, shares
from operant.live.learning.lesson import LearnerState, prepare
from operant.live.learning.step import new_learner, take_step
from operant.live.learning.worker import Worker
from operant.live.serving.access import Keys
from operant.live.storage.store import Origin, Store
from operant.models.policy import Policy
from operant.types import Feedback

Make = Callable[..., Policy]
HONEST = [f"h{i}" for i in range(9)]
MANY = [f"m{i}" for i in range(30)]


def said(things: range, *verdicts: tuple[str, int]) -> list[tuple[str, str, int]]:
    return [(f"t{thing}", source, verdict) for thing in things for source, verdict in verdicts]


# --- reputation -------------------------------------------------------------------------------------------------------


def test_two_who_contradict_each_other_are_trusted_alike_and_less() -> None:
    # r = (2 · 4 / (5 + 5 r) − 1) / 0.6, so 3 r² + 8 r − 3 = 0
    assert reputations(said(range(5), ("ann", 1), ("bob", -1))) == pytest.approx({"ann": 1 / 3, "bob": 1 / 3})
    assert reputations(said(range(5), ("ann", 1), ("bob", 1))) == {"ann": 1.0, "bob": 1.0}
    assert reputations([]) == {} and reputations([("t", "ann", 1)]) == {"ann": 1.0}


def test_reputation_is_the_posterior_of_agreeing_with_trusted_fellows() -> None:
    """Six agree on all of five things; one agrees with them on three. Against the posterior by integration."""
    fellows = [(name, 1) for name in HONEST[:6]]
    found = reputations([*said(range(5), *fellows), *said(range(3), ("eve", 1)), *said(range(3, 5), ("eve", -1))])
    assert [found[name] for name in HONEST[:6]] == pytest.approx([1.0] * 6)
    rate = (np.arange(200_000) + 0.5) / 200_000
    density = rate**3 * rate**18 * (1 - rate) ** 12  # the prior Beta(4, 1), and 18 of 30 meetings
    mean = (rate * density).sum() / density.sum()
    assert found["eve"] == pytest.approx((2 * mean - 1) / 0.6, abs=1e-6)
    assert 0.4 < found["eve"] < 0.5


def test_keys_that_agree_with_each_other_alone_gain_nothing() -> None:
    alone = reputations(said(range(1000), ("sybil1", 1), ("sybil2", 1)))
    assert alone == {"sybil1": 1.0, "sybil2": 1.0}  # what a key has that nobody has met
    crowd = [row for i in range(30) for row in said(range(2000 + i, 2001 + i), (HONEST[i % 9], 1), (HONEST[i % 8], 1))]
    meetings = [
        row for i in range(40) for row in said(range(3000 + i, 3001 + i), (HONEST[i % 9], 1), (f"sybil{i % 2}", -1))
    ]
    praise = said(range(1000), ("sybil0", 1), ("sybil1", 1))
    found = reputations([*crowd, *meetings, *praise])
    assert found["sybil0"] == found["sybil1"] == 0.0
    assert min(found[name] for name in HONEST) == 1.0
    # without the mutual praise they are no worse off, so it bought nothing
    assert reputations([*crowd, *meetings])["sybil0"] == 0.0


def test_honest_raters_who_err_one_time_in_ten_keep_their_weight() -> None:
    rng = np.random.default_rng(0)
    rows = []
    for thing in range(300):
        truth = rng.choice((1, -1))
        for source in rng.choice(20, 2, replace=False):
            wrong = source == 19 or rng.random() < 0.1
            rows.append((f"t{thing}", f"k{source:02}", int(-truth if wrong else truth)))
    found = reputations(rows)
    assert found.pop("k19") == 0.0
    assert np.mean(list(found.values())) > 0.9 and min(found.values()) > 0.5


# --- the cap ----------------------------------------------------------------------------------------------------------


def whole(*sources: str) -> dict[str, float]:
    """Sources all of whose ratings are learned at full weight."""
    return dict.fromkeys(sources, 1.0)


def test_who_blames_uses_up_as_little_as_is_learned_of_it() -> None:
    assert shares({"praises": 1.0, "blames": 0.2}, {}, {}, cap=1.0, window=20) == {"praises": 0.5, "blames": 0.1}
    # so of two who are heard as often, among many who blame, the one who praises is over its share sooner
    had = dict.fromkeys(MANY, 0.2)
    given = dict.fromkeys(("praises", "blames"), 0.0)
    for _ in range(10):
        new = shares({"praises": 1.0, "blames": 0.2}, {}, had, cap=0.1, window=50)
        had = after(had, new, window=50)
        given = {name: given[name] + new[name] for name in given}
    assert given["praises"] < 1 and given["blames"] > 0.5


def test_no_source_has_more_than_its_share_however_often_it_speaks() -> None:
    had: dict[str, float] = {}
    given_to: dict[str, float] = {}
    for step in range(600):
        given = shares(whole("loud", HONEST[step % 9]), {}, had, cap=0.2, window=20)
        before, had = had.get("loud", 0.0), after(had, given, window=20)
        # who comes new makes the part of all others smaller; then one waits
        assert had["loud"] <= max(before, max(0.2, 2 / len(had)) * max(2.0, sum(had.values()))) + 1e-9
        assert sum(had.values()) <= 20 + 1e-9
        if step >= 100:
            for source, share in given.items():
                given_to[source] = given_to.get(source, 0.0) + share
    assert given_to["loud"] / sum(given_to.values()) < 0.21
    assert given_to["h0"] / sum(given_to.values()) == pytest.approx(0.8 / 9, rel=0.05)


def test_two_who_take_turns_learn_at_full_weight_and_two_of_many_do_not_go_on_alone() -> None:
    had: dict[str, float] = {}
    for _ in range(200):
        given = shares(whole("ann", "bob"), {}, had, cap=0.1, window=10)
        assert given == pytest.approx({"ann": 0.5, "bob": 0.5})
        had = after(had, given, window=10)
    had = dict.fromkeys(MANY, 1.0) | {"x": 3.75, "y": 3.75}
    taken = []
    for _ in range(40):
        given = shares(whole("x", "y"), {}, had, cap=0.1, window=40)
        taken.append(sum(given.values()))
        had = after(had, given, window=40)
    assert sum(taken) < 1 and taken[-1] < 1e-6
    # nor do the first who come have the beginning for themselves
    had = dict.fromkeys(MANY, 0.003)
    assert shares(whole("x", "y"), {}, had, cap=0.1, window=50) == pytest.approx({"x": 0.5, "y": 0.5})
    assert sum(shares(whole("x", "y"), {}, had | {"x": 0.5, "y": 0.5}, cap=0.1, window=50).values()) < 0.1
    assert shares(whole("x"), {"x": 0.25}, {}, cap=1.0, window=20) == {"x": 0.25}


# --- in a step --------------------------------------------------------------------------------------------------------


def read(policy: Policy, store: MemoryStore, state: LearnerState | None = None, **settings: Any) -> Any:
    config = LiveConfig(**({"min_sources": 2, "replay_events": 0} | settings))
    return prepare(
        store.events_after(0, 1000), reader_of(policy, store, config), state or LearnerState(), config, seed=5
    )


def test_what_is_over_the_cap_is_not_learned_and_is_told_why(make_policy: Make) -> None:
    policy = make_policy("gpt2")
    store = answered(policy)
    store.add("c0", "thumb", 1, source="quiet")
    loud = store.add("c1", "thumb", 1, source="loud")
    # of a window of ten steps one source in ten may have one, and this one has had it
    had = LearnerState(influence=dict.fromkeys(MANY, 0.15) | {"loud": 1.2})
    lesson = read(policy, store, had, influence_window=10, influence_cap=0.1)
    assert [row.event.source for row in lesson.fresh] == ["quiet"]
    told = lesson.outcomes[loud.id]
    assert told.state == "unused" and told.reason.startswith("over the cap") and "--influence_cap" in told.reason
    assert loud.id not in {entry["event"]["id"] for entry in lesson.state.memory}
    near = LearnerState(influence=had.influence | {"loud": 0.5})
    part = read(policy, store, near, influence_window=10, influence_cap=0.1)
    weights = {row.event.source: row.weight for row in part.fresh}
    # a part of the half that it would have: I' = 0.5 (1 − A / 10) + a is a tenth of Σ I' = 5 (1 − A / 10) + A
    share = 0.1 * 0.5 / (1 - 0.1)
    assert weights == pytest.approx({"quiet": 1.0, "loud": 2 * share})
    assert part.state.influence["loud"] == pytest.approx(0.1 * sum(part.state.influence.values()))
    policy.model.eval()
    config = LiveConfig(min_sources=2, replay_events=0, influence_window=10)
    outcomes = take_step(policy, new_learner(policy, config), part, anchors_of(policy), config).outcomes
    assert outcomes[loud.id].state == "used" and outcomes[loud.id].reason.startswith("weighed 0.11: its source")
    assert outcomes["e1"].reason == ""
    # one owner has no cap, and nothing is kept of it
    alone = read(policy, store, had, min_sources=1, influence_window=10)
    assert [row.weight for row in alone.fresh] == [1.0, 1.0]
    assert alone.state.influence == had.influence and not alone.state.opinions


def test_an_opinion_that_has_no_room_is_not_told_as_forgotten(
    make_policy: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What others say decides what has room, and what is forgotten must not hang on others."""
    policy, state = make_policy("gpt2"), LearnerState()
    store = answered(policy)
    monkeypatch.setattr("operant.live.learning.lesson.OPINIONS", 2)
    state.opinions = [
        {"thing": f"t{i}", "source": "ann", "verdict": 1, "event": f"old{i}", "completion": "c9"} for i in range(2)
    ]
    for name, source in (("c0", "bob"), ("c1", "cat")):
        store.add(name, "thumb", 1, source=source)
    lesson = read(policy, store, state)
    assert [opinion["source"] for opinion in lesson.state.opinions] == ["bob", "cat"] and lesson.forgotten == []


def test_a_flood_of_own_answers_does_not_bury_who_contradicted_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two in league are contradicted by others in a few meetings, and then praise each other's answers at length."""

    def said(thing: str, source: str, verdict: int) -> dict[str, Any]:
        return {
            "thing": thing, "source": source, "verdict": verdict, "event": f"{thing} {source}", "completion": thing,
        }  # fmt: skip

    met = [said(f"t{i}", s, v) for i in range(9) for s, v in (("x", -1), ("y", -1), (HONEST[i], 1))]
    flood = [said(f"own{i}", s, 1) for i in range(100) for s in ("x", "y")]

    def reputation() -> float:
        return LearnerState(opinions=lesson._updated_opinions([*met, *flood], [], [])).reputations()["x"]

    assert reputation() == 0
    monkeypatch.setattr(lesson, "OWN_OPINIONS", 64)  # too few
    assert reputation() > 0.5


def test_whom_others_contradict_is_heard_and_not_learned_from(make_policy: Make) -> None:
    policy = make_policy("gpt2")
    store = answered(policy)
    for name in ("c0", "c1", "c2", "c3"):
        for source in ("ann", "bob", "cat"):
            store.add(name, "thumb", 1, source=source)
        store.add(name, "score", 0.1, source="eve")
    lesson = read(policy, store)
    assert lesson.state.reputations() == {"ann": 1.0, "bob": 1.0, "cat": 1.0, "eve": 0.0}
    assert {row.event.source for row in lesson.fresh} == {"ann", "bob", "cat"}
    reasons = {lesson.outcomes[e.id].reason for e in store.log if e.source == "eve"}
    assert len(reasons) == 1 and "contradicts" in reasons.pop()
    # nor does a crowd of bad words of hers move the baseline
    assert lesson.state.baselines == pytest.approx({"talk": 0.1})
    assert "eve" not in lesson.state.influence and len(lesson.state.opinions) == 16
    # who takes the words back is a newcomer again
    for name in ("c0", "c1", "c2", "c3"):
        store.add(name, "retract", None, source="eve")
    assert "eve" not in read(policy, store).state.reputations()
    state = LearnerState(opinions=lesson.state.opinions)
    store.log = store.log[-4:]
    taken = read(policy, store, state)
    assert "eve" not in taken.state.reputations()


def test_the_same_pair_seen_from_both_sides_is_one_thing(make_policy: Make) -> None:
    policy = make_policy("gpt2")
    store = answered(policy, 8)
    assert store.interactions["c0"].prompt.id == store.interactions["c4"].prompt.id
    store.add("c0", "comparison", "c4", source="ann")
    store.add("c4", "comparison", "c0", source="bob")
    one, other = read(policy, store).state.opinions
    assert one["thing"] == other["thing"] and one["verdict"] == -other["verdict"]


# --- the learner ------------------------------------------------------------------------------------------------------

ROUNDS = (
    (("c0", "ann", 1), ("c1", "bob", 1)), (("c0", "bob", 1), ("c0", "cat", -1), ("c2", "ann", -1)),
    (("c2", "bob", -1), ("c2", "cat", 1), ("c3", "ann", 1), ("c3", "cat", -1)), (("c1", "ann", 1), ("c3", "bob", 1)),
)  # fmt: skip


@pytest.fixture
def teach(make_policy: Make, tmp_path: Path) -> Iterator[Callable[..., Worker]]:
    stores: list[Store] = []
    policy = make_policy("gpt2")
    policy.save(tmp_path / "model")
    answers = answered(policy, 4)

    def make(name: str, without: str = "") -> Worker:
        root = tmp_path / name
        root.mkdir()
        store = Store(root / "store.db")
        stores.append(store)
        for key, stored in answers.interactions.items():
            store.begin(key, stored.prompt, stored.completion.sampling, Origin(user="ann"))
            store.complete(stored.completion, "complete")
        config = WorkerConfig(
            root=str(root), model=str(tmp_path / "model"), device="cpu", anchor_rows=2, anchor_tokens=4,
            drift_budget=1e3, likelihood_drop=1e3, keep=100, replay_events=0, min_sources=2, influence_window=5.0,
        )  # fmt: skip
        worker = Worker(config, store, lambda told: None)
        worker.start()
        number = 0
        for events in ROUNDS:
            for completion_id, source, value in events:
                number += 1
                if source != without:
                    event = Feedback(f"e{number}", completion_id, "thumb", value, source, f"k{number}", float(number))
                    store.add_feedback(event, body_hash=str(number))
            assert worker.once()
        store.reconcile(worker.versions.records())
        return worker

    yield make
    for store in stores:
        store.close()


def test_weighed_steps_are_made_again_alike_and_forgotten_wholly(teach: Callable[..., Worker]) -> None:
    here, never = teach("live"), teach("never", without="cat")
    state = here.current().state
    assert state.reputations()["cat"] < 0.7 and state.influence.keys() == {"ann", "bob", "cat"}
    store = here.source
    assert isinstance(store, Store)
    for record in here.versions.records():
        if record.state == "published" and record.version:
            assert verify_version(here.versions, record.version, store, here.config).same
    forget("cat", store, here.config)
    pointer, other = here.versions.pointer(), never.current()
    now = LoadedVersion.load(here.versions, pointer.version, pointer.moves, here.config)
    assert now.state.influence == other.state.influence and now.state.reputations() == other.state.reputations()
    pairs = zip(now.policy.model.parameters(), other.policy.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert "cat" not in (Path(here.versions.current().path) / "state.json").read_text()


def test_who_is_not_trusted_is_no_second_source(teach: Callable[..., Worker], monkeypatch: pytest.MonkeyPatch) -> None:
    worker = teach("live")
    store = worker.source
    assert isinstance(store, Store)
    for number, source in ((90, "ann"), (91, "bob")):
        store.add_feedback(Feedback(f"e{number}", "c1", "thumb", 1, source, f"k{number}", 9.0), body_hash=str(number))
    with monkeypatch.context() as patched:
        patched.setattr(influence, "reputations", lambda opinions: {"ann": 1.0, "bob": 0.0})
        assert not worker.once()
    assert worker.once()


# --- over HTTP --------------------------------------------------------------------------------------------------------


def test_sources_are_told_apart_to_operators_and_themselves_to_others(make_policy: Make, tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    keys = {name: Keys(file).add(name, ["chat", "rate"]) for name in ("ann", "bob")}
    keys["boss"] = Keys(file).add("boss", ["operate"])
    heads = {name: {"Authorization": f"Bearer {key}"} for name, key in keys.items()}
    with learning(make_policy("gpt2", context=128), tmp_path, mode="shared", keys=str(file)) as served:
        ask = {"model": "default", "messages": [{"role": "user", "content": "the cat sat"}], "max_tokens": 8}
        answer = served.http.post("/v1/chat/completions", json=ask, headers=heads["ann"]).json()
        for name, value in (("ann", 1), ("bob", -1)):
            body = {"completion_id": answer["id"], "kind": "thumb", "value": value}
            event = served.http.post("/v1/feedback", json=body, headers=heads[name]).json()
        for _ in range(6):  # the learner has to start first
            story = served.http.get(f"/v1/feedback/{event['id']}?wait=30", headers=heads["bob"]).json()
            if story["state"] != "pending" and (story["state"] != "used" or "served" in story["times"]):
                break
        assert story["state"] == "used", story
        rows = served.http.get("/v1/sources", headers=heads["boss"]).json()["data"]
        assert [row["source"] for row in rows] == ["ann", "bob"]
        assert [row["reward"] for row in rows] == [1.0, -1.0] and [row["events"] for row in rows] == [1, 1]
        assert all(0 < row["reputation"] < 1 for row in rows)
        # who blames is learned at a fifth
        assert [row["influence"] for row in rows] == pytest.approx([5 / 6, 1 / 6])
        assert served.http.get("/v1/sources", headers=heads["bob"]).json()["data"] == rows[1:]
        page = served.http.get("/metrics", headers=heads["boss"]).text
        assert 'operant_source_reward{source="bob"} -1.0' in page and 'operant_source_influence{source="ann"}' in page


def test_the_program_tells_sources_apart(make_policy: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(make_policy("gpt2", context=128), tmp_path) as served:
        answer = served.chat()
        served.rate(answer["id"], "score", 0.75, source="judge")
        served.rate(answer["id"], "thumb", -1)
        served.rate(answer["id"], "comment", "why?")
        rows = served.http.get("/v1/sources").json()["data"]
        assert [row["influence"] for row in rows] == [None] * len(rows)  # nobody's is kept, so nobody has had nothing
    told = Program(capsys)("feedback", "--store", tmp_path / "store.db", "--root", tmp_path / "live").out
    lines = [line.split() for line in told.splitlines() if line.startswith("  ")]
    assert lines[0][:3] == ["owner", "2", "pending,"] and "reward -1.00" in told and "reward 0.50" in told
