"""The durable store, on SQLite and on PostgreSQL alike."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import random
import resource
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from forks import PATIENCE
from postgres import binaries, empty, server

import operant
from operant.live.storage import database, migrations, tables
from operant.live.storage import store as module
from operant.live.storage.database import address, connect, journal_mode
from operant.live.storage.store import Conflict, Origin, Store, StoredCompletion, StoreFault, UnknownCompletion
from operant.live.storage.versions import Outcome, StepRecord
from operant.types import Completion, Feedback, OperantError, Prompt, Sampling

SAMPLING = Sampling(temperature=0.7, stop=("end", "。"), banned=(3, 4), seed=2**62)


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    if binaries() is None:
        pytest.skip("PostgreSQL's server programs are not installed")
    with server() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return str(tmp_path / "live.db")
    found: str = request.getfixturevalue("postgres")
    empty(found)
    return found


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    with Store(url) as opened:
        yield opened


def prompt(name: str = "p", **options: Any) -> Prompt:
    return Prompt(id=name, tokens=np.array([1, 2, 70000]), text=f"say {name}", **options)


def completion(name: str, **options: Any) -> Completion:
    values: dict[str, Any] = {
        "text": "ab", "tokens": np.array([5, 6]), "text_ends": np.array([1, 2]), "sampling": SAMPLING,
        "behavior_logprobs": np.array([-0.5, -1.25], np.float32), "model_logprobs": np.array([-1, -2], np.float32),
        "sampled": np.array([True, True]), "policy_version": np.array([0, 1]),
    }  # fmt: skip
    return Completion(id=name, prompt_id="p", **(values | options))


def converse(store: Store, *names: str, **options: Any) -> None:
    for name in names:
        store.begin(name, prompt(), SAMPLING, Origin(**options))
        store.complete(completion(name))


def event(name: str, about: str = "c", kind: Any = "thumb", value: Any = 1, **options: Any) -> Feedback:
    values: dict[str, Any] = {"source": "ann", "idempotency_key": f"key {name}", "time": 5.0}
    return Feedback(id=name, completion_id=about, kind=kind, value=value, **(values | options))


def rate(store: Store, name: str, *arguments: Any, **options: Any) -> int:
    return store.add_feedback(event(name, *arguments, **options), body_hash=name).offset


def record(version: int, events: dict[str, Outcome], consumed: int, **options: Any) -> StepRecord:
    values: dict[str, Any] = {
        "version": version, "parent": version - 1, "moves": version, "begin_offset": 0, "consumed_offset": consumed,
        "events": list(events), "seed": 0, "coefficients": {}, "fingerprint": {}, "state": "published",
        "outcomes": events, "times": {"queued": 1.0, "begun": 2.0, "stepped": 3.0, "gated": 4.0},
    }  # fmt: skip
    return StepRecord(**(values | options))


def same(one: Completion, other: Completion) -> bool:
    for entry in dataclasses.fields(Completion):
        a, b = getattr(one, entry.name), getattr(other, entry.name)
        if isinstance(a, np.ndarray):
            if a.dtype != b.dtype or not np.array_equal(a, b):
                return False
        elif a != b:
            return False
    return True


# --- interactions -----------------------------------------------------------------------------------------------------


def test_an_interaction_comes_back_as_it_was_written(store: Store, url: str) -> None:
    asked = prompt(
        "q",
        messages=({"role": "user", "content": "你好 \x00 \ud800 😀"},),
        references=("r",),
        task="talk",
        meta={"n": [1]},
    )
    store.begin(
        "c", asked, SAMPLING,
        Origin("talk", "ann\x00", model_version=3, request={"n": 1, "x": "\ud83d"}, metadata={"a": "b"}, created=9.0),
    )  # fmt: skip
    begun = store.completion("c")
    assert begun is not None and begun.status == "begun" and begun.completion is None
    written = completion(
        "c", text="a\x00\udc80b", text_reach=np.array([2, 2]), stream_rewards=np.array([0.5, 0], np.float32),
        stop_reason="stop", truncated=True, tokenizer_hash="t", template_hash="u", meta={"k": 1.5},
    )  # fmt: skip
    written.prompt_id = "q"
    store.complete(written, "partial")
    with Store(url, read_only=True) as reader:
        for source in (store, reader):
            found = source.completion("c")
            assert found is not None and found.completion is not None
            assert same(written, found.completion)
            assert np.array_equal(found.prompt.tokens, asked.tokens) and found.prompt.tokens.dtype == np.int64
            assert dataclasses.replace(found.prompt, tokens=asked.tokens) == asked
            assert found.completion.tokens.flags.writeable
            rest = dataclasses.replace(found, prompt=asked, completion=None)
            assert rest == StoredCompletion(
                "c", asked, None, "partial", "talk", "ann\x00", 3, {"a": "b"}, {"n": 1, "x": "\ud83d"}, 9.0
            )
    assert store.completion("other") is None


def test_arrays_that_are_not_there_stay_so(store: Store) -> None:
    store.begin("c", prompt(), None)
    bare = Completion("c", "p", "", np.array([], np.int64), np.array([], np.int64), stop_reason="cancelled")
    store.complete(bare, "failed")
    found = store.completion("c")
    assert found is not None and found.completion is not None and same(bare, found.completion)


def test_a_prompt_is_kept_once_and_others_of_the_same_id_apart(store: Store) -> None:
    converse(store, "a", "b")
    store.begin("c", prompt(task="other"), SAMPLING)
    tasks = [store.completion(name).prompt.task for name in "abc"]  # type: ignore[union-attr]
    assert tasks == ["", "", "other"]
    with store.database.reading() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(tables.PROMPTS)) == 2


def test_what_was_not_begun_or_is_written_already_is_refused(store: Store) -> None:
    with pytest.raises(UnknownCompletion, match="c was not begun"):
        store.complete(completion("c"))
    converse(store, "c")
    with pytest.raises(OperantError, match="c is written already"):
        store.complete(completion("c"))
    with pytest.raises(OperantError, match="a completion c already"):
        store.begin("c", prompt(), SAMPLING)
    with pytest.raises(OperantError, match="inputs beside its text"):
        store.begin("d", prompt(inputs=1), SAMPLING)


def test_completions_are_listed_by_metadata_in_pages(store: Store) -> None:
    for number in range(6):
        converse(store, f"c{number}", metadata={"odd": str(number % 2), 'a"b': "x"})

    def names(**options: Any) -> list[str]:
        return [found.id for found in store.list_completions(**options)]

    assert names() == ["c0", "c1", "c2", "c3", "c4", "c5"]
    assert names(limit=2, order="desc") == ["c5", "c4"]
    assert names(after="c1", limit=2, metadata={"odd": "1"}) == ["c3", "c5"]
    assert names(after="c3", order="desc", metadata={'a"b': "x", "odd": "0"}) == ["c2", "c0"]
    assert names(metadata={"odd": "2"}) == [] and names(prefix="c3") == ["c3"] and names(prefix="%") == []
    with pytest.raises(UnknownCompletion):
        names(after="nothing")
    assert store.set_metadata("c0", {"new": "1"}) == {"new": "1"}
    assert names(metadata={"new": "1"}) == ["c0"] and names(metadata={"odd": "0"}) == ["c2", "c4"]
    with pytest.raises(UnknownCompletion):
        store.set_metadata("nothing", {})


def test_deleting_leaves_the_facts_without_the_words(store: Store) -> None:
    converse(store, "c", "d")
    rate(store, "e1", "c", "edit", "secret")
    rate(store, "e2", "c", "thumb", -1)
    assert store.delete("c") and not store.delete("c") and not store.delete("nothing")
    assert store.completion("c") is None and store.completion("d") is not None
    assert [(e.value, e.kind) for _, e in store.events_after(0, 9)] == [(None, "edit"), (-1, "thumb")]
    assert store.counts()["events"] == 2 and store.counts()["completions"] == 1
    assert [found.id for found in store.list_completions()] == ["d"]
    with pytest.raises(UnknownCompletion):
        rate(store, "e3", "c")
    with pytest.raises(UnknownCompletion):
        store.set_metadata("c", {})
    store.begin("e", prompt(), SAMPLING)
    assert store.delete("e")
    store.complete(completion("e"))  # it was being written
    assert store.completion("e") is None
    store.delete("d")
    with store.database.reading() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(tables.PROMPTS)) == 0


# --- feedback ---------------------------------------------------------------------------------------------------------


def test_feedback_comes_back_in_the_order_of_its_offsets(store: Store) -> None:
    converse(store, "c", "d")
    given = [
        event("e1", "c", "score", 0.25), event("e2", "d", "span", -1, span=(3, 9)), event("e3", "c", "edit", "好\x00"),
        event("e4", "c", "comparison", "d", time=1.0), event("e5", "d", "retract", None),
    ]  # fmt: skip
    for one in given:
        store.add_feedback(one, body_hash="h", tags={"from": "test"})
    assert store.events_after(0, 10) == list(enumerate(given, start=1))
    assert store.events_after(2, 2) == [(3, given[2]), (4, given[3])]
    told = store.story("e2")
    assert told is not None and told.event == given[1] and told.tags == {"from": "test"} and told.offset == 2
    assert told.state == "pending" and list(told.times) == ["received"] and store.story("nothing") is None
    assert [s.event.id for s in store.events(completion_id="c", after=1, limit=2)] == ["e3", "e4"]
    assert [s.event.id for s in store.events(kind="span", source="ann")] == ["e2"] and store.events(source="bob") == []


def test_a_key_gives_the_first_receipt_again_and_belongs_to_its_source(store: Store) -> None:
    converse(store, "c")
    first = store.add_feedback(event("e1", idempotency_key="k"), body_hash="h")
    assert (first.id, first.state, first.duplicate, first.offset) == ("e1", "pending", False, 1)
    again = store.add_feedback(event("e2", idempotency_key="k"), body_hash="h")
    assert (again.id, again.duplicate, again.offset) == ("e1", True, 1)
    with pytest.raises(Conflict, match="'k'"):
        store.add_feedback(event("e3", idempotency_key="k"), body_hash="other")
    assert not store.add_feedback(event("e4", idempotency_key="k", source="bob"), body_hash="other").duplicate
    store.reconcile([record(1, {"e1": Outcome("used")}, 1)])
    assert store.add_feedback(event("e5", idempotency_key="k"), body_hash="h").state == "used"
    with pytest.raises(UnknownCompletion, match="no stored completion x"):
        rate(store, "e6", "x")
    assert [e.id for _, e in store.events_after(0, 9)] == ["e1", "e4"]


def test_without_a_key_only_the_last_word_can_be_repeated(store: Store) -> None:
    converse(store, "c", "d")

    def say(about: str, kind: Any, value: Any, **options: Any) -> bool:
        said = f"{kind} {value} {options}"
        name = f"e{store.counts()['events']}"
        feedback = event(name, about, kind, value, idempotency_key="", **options)
        return not store.add_feedback(feedback, body_hash=said).duplicate

    assert say("c", "thumb", 1) and not say("c", "thumb", 1)
    assert say("c", "comment", "x") and not say("c", "comment", "x")
    assert not say("c", "thumb", 1)  # a comment says nothing of the thumb
    assert say("c", "thumb", -1) and say("c", "thumb", 1) and say("d", "thumb", 1)
    assert (
        say("c", "span", 1, span=(0, 1)) and say("c", "span", 1, span=(1, 2)) and not say("c", "span", 1, span=(0, 1))
    )
    assert say("c", "retract", None) and not say("c", "retract", None) and say("c", "thumb", 1)
    assert not say("c", "thumb", 1) and say("c", "thumb", 1, source="bob")


def test_an_event_waits_until_its_completion_is_written(
    store: Store, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    converse(store, "a")
    store.begin("b", prompt(), SAMPLING)
    for name, about in (("e1", "a"), ("e2", "b"), ("e3", "a")):
        rate(store, name, about)
    assert [e.id for _, e in store.events_after(0, 9)] == ["e1"]
    monkeypatch.setattr(module, "HELD_SECONDS", -1.0)  # as if it had been begun long ago
    assert [e.id for _, e in store.events_after(0, 9)] == ["e1", "e2", "e3"]
    monkeypatch.undo()
    store.close()
    with Store(url) as after:  # the process that was writing it is gone
        assert after.completion("b").status == "failed"  # type: ignore[union-attr]
        assert [e.id for _, e in after.events_after(0, 9)] == ["e1", "e2", "e3"]


# --- the ledger -------------------------------------------------------------------------------------------------------


def test_every_event_can_be_asked_what_it_did(store: Store) -> None:
    converse(store, "c")
    for number in range(1, 6):
        rate(store, f"e{number}", source=f"s{number % 2}")
    records = [
        record(0, {}, 0, parent=-1, times={}),
        record(1, {"e1": Outcome("used", "", 0.5, -3.0, -2.0), "e2": Outcome("superseded", "a later one")}, 2),
        record(2, {"e3": Outcome("unused", "comment teaches nothing")}, 3, state="nothing", parent=1),
        record(3, {"e4": Outcome("unused")}, 4, outcomes={}, state="refused", parent=1),
        record(4, {"e5": Outcome("used")}, 5, state="pending"),
    ]
    for _ in range(2):  # the second time changes nothing
        store.reconcile(records)
        told = store.story("e1")
        assert told is not None
        assert (told.state, told.version, told.advantage) == ("used", 1, 0.5)
        assert (told.logprob_before, told.logprob_after) == (-3.0, -2.0)
        assert told.times == {"received": told.times["received"], "queued": 1, "begun": 2, "stepped": 3, "gated": 4}
        assert store.counts() == {
            "completions": 1, "events": 5, "pending": 1, "used": 1, "superseded": 1, "unused": 2,
            "reasons": {"comment teaches nothing": 1, "its step says nothing of it": 1},
        }  # fmt: skip
    assert [s.event.id for s in store.events(state="pending")] == ["e5"]
    assert [s.event.id for s in store.events(state="unused", source="s1")] == ["e3"]


def test_a_version_is_served_with_what_its_ancestors_learned(store: Store) -> None:
    converse(store, "c")
    for number in range(1, 5):
        rate(store, f"e{number}")
    parents = {1: 0, 2: 1, 3: 2, 4: 2}  # 3 was rolled back before anybody was served it
    store.reconcile([record(n, {f"e{n}": Outcome("used")}, n, parent=p) for n, p in parents.items()])

    def served() -> list[float | None]:
        return [store.story(f"e{n}").times.get("served") for n in parents]  # type: ignore[union-attr]

    store.served(9, 1.0)
    assert served() == [None] * 4
    store.served(1, 10.0)
    store.served(4, 20.0)
    store.served(1, 30.0)
    assert served() == [10.0, 20.0, None, 20.0]


def test_offsets_that_the_learner_has_consumed_are_not_given_again(store: Store) -> None:
    converse(store, "c")
    rate(store, "e1")
    store.reconcile([record(1, {"e1": Outcome("used"), "lost": Outcome("used")}, 7)])  # this is an older copy
    assert rate(store, "e2") == 8 and rate(store, "e3") == 9
    assert store.counts()["pending"] == 2


# --- one writer, many threads -----------------------------------------------------------------------------------------


def together(store: Store, calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """What each call, all made while the writing thread is busy, returns or raises."""
    gate, began = threading.Event(), threading.Event()

    def hold(connection: sa.Connection) -> None:
        began.set()
        assert gate.wait(20)

    outcomes: list[Any] = [None] * len(calls)

    def make(number: int) -> None:
        try:
            outcomes[number] = calls[number]()
        except OperantError as error:
            outcomes[number] = error

    threads = [threading.Thread(target=store.database.write, args=(hold,))]
    threads += [threading.Thread(target=make, args=(n,)) for n in range(len(calls))]
    threads[0].start()
    assert began.wait(20)
    for thread in threads[1:]:
        thread.start()
    while store.database._calls.qsize() < len(calls):
        time.sleep(0.01)
    gate.set()
    for thread in threads:
        thread.join(20)
    return outcomes


def test_calls_of_many_threads_share_commits_and_none_spoils_the_others(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    converse(store, "c")
    commits: list[int] = []
    real = store.database._commit
    monkeypatch.setattr(store.database, "_commit", lambda group: (commits.append(len(group)), real(group)))
    calls = [lambda n=n: rate(store, f"e{n}", "nothing" if n % 5 == 0 else "c") for n in range(20)]
    outcomes = together(store, calls)
    assert commits == [1, 20]
    assert [n for n, o in enumerate(outcomes) if isinstance(o, UnknownCompletion)] == [0, 5, 10, 15]
    offsets = {o: f"e{n}" for n, o in enumerate(outcomes) if isinstance(o, int)}
    assert sorted(offsets) == list(range(1, 17))
    assert {offset: e.id for offset, e in store.events_after(0, 99)} == offsets


def test_one_process_writes_and_others_read(store: Store, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "LOCK_SECONDS", 0.1)
    with pytest.raises(OperantError, match="another process writes"):
        Store(url)
    with Store(url, read_only=True) as reader:
        converse(store, "c")
        assert reader.completion("c") is not None
        with pytest.raises(OperantError, match="for reading only"):
            rate(reader, "e1")
        with pytest.raises(StoreFault, match="read"), reader.database.reading() as connection:
            connection.execute(sa.delete(tables.COMPLETIONS))
    store.ready()
    store.close()
    store.close()
    with pytest.raises(OperantError, match="closed"):
        store.ready()
    with pytest.raises(OperantError, match="closed"):
        store.completion("c")
    Store(url).close()


def killed(url: str, rounds: int, seed: int) -> dict[str, int]:
    script = Path(__file__).with_name("store_kills.py")
    environment = os.environ | {"PYTHONPATH": str(Path(operant.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, str(script), url, str(rounds), str(seed)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_killed_while_it_writes_it_has_lost_nothing_that_it_acknowledged(url: str) -> None:
    assert killed(url, 5, 1)["acknowledged"] > 20


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_killed_again_and_again_it_has_lost_nothing_that_it_acknowledged(url: str) -> None:
    result = killed(url, 40, 2)
    assert result["acknowledged"] > 500 and result["unacknowledged"] > 20


def test_a_full_disk_fails_the_call_and_the_store_goes_on(tmp_path: Path) -> None:
    with Store(tmp_path / "live.db") as store:
        converse(store, "c")
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (os.path.getsize(tmp_path / "live.db"), hard))
        try:
            with pytest.raises(StoreFault, match="cannot be written") as caught:
                rate(store, "e1", "c", "edit", "x" * 100_000)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "\n" not in str(caught.value) and "disk" in str(caught.value)
        assert rate(store, "e2") == 1 and [e.id for _, e in store.events_after(0, 9)] == ["e2"]


def test_what_does_not_fit_on_the_disk_does_not_take_its_fellows_along(tmp_path: Path) -> None:
    with Store(tmp_path / "live.db") as store:
        converse(store, "c")
        limit = "PRAGMA max_page_count={}"
        pages = store.database.write(lambda c: c.exec_driver_sql("PRAGMA page_count").scalar())
        store.database.write(lambda c: c.exec_driver_sql(limit.format(pages + 1)))
        words = ["a", "b", "x" * 100_000, "c"]
        outcomes = together(
            store, [lambda n=n, word=word: rate(store, f"e{n}", "c", "edit", word) for n, word in enumerate(words)]
        )
        assert isinstance(outcomes[2], StoreFault) and "free some space" in str(outcomes[2])
        assert sorted(o for n, o in enumerate(outcomes) if n != 2) == [1, 2, 3]
        store.database.write(lambda c: c.exec_driver_sql(limit.format(2**30)))
        assert rate(store, "e2", "c", "edit", "x" * 100_000) == 4


def test_a_database_that_another_program_holds_is_told_and_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.1)
    with Store(tmp_path / "live.db") as store:
        converse(store, "c")
        other = sqlite3.connect(tmp_path / "live.db", isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(StoreFault, match="locked"):
            rate(store, "e1")
        with pytest.raises(StoreFault, match="locked"):
            store.ready()
        other.execute("ROLLBACK")
        other.close()
        assert rate(store, "e1") == 1


def test_a_database_server_that_forgets_who_writes_is_told_again(
    postgres: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "LOCK_SECONDS", 0.1)
    empty(postgres)
    with Store(postgres) as store:
        converse(store, "c")
        engine = engine_of(postgres)
        with engine.begin() as connection:  # what its clients see of a restart
            connection.execute(
                sa.text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() "
                        "AND backend_type = 'client backend'")
            )  # fmt: skip
        engine.dispose()
        assert rate(store, "e1") == 1 and store.counts()["events"] == 1
        with pytest.raises(OperantError, match="another process writes"):
            Store(postgres)


# --- care -------------------------------------------------------------------------------------------------------------


def test_a_backup_is_of_one_moment_while_others_write(store: Store, tmp_path: Path) -> None:
    converse(store, "a")
    rate(store, "e0", "a")
    store.reconcile([record(1, {"e0": Outcome("used", "", 1.0)}, 1)])
    ending = threading.Event()
    failures: list[BaseException] = []

    def talk() -> None:
        try:
            for number in itertools.count(1):
                if ending.is_set():
                    return
                converse(store, f"c{number}")
                rate(store, f"e{number}", f"c{number}")
        except BaseException as error:
            failures.append(error)

    writer = threading.Thread(target=talk)
    writer.start()
    while store.counts()["events"] < 3:
        time.sleep(0.01)
    for number in range(2):
        store.backup(tmp_path / f"copy{number}.db")
    ending.set()
    writer.join(20)
    assert not failures
    sizes = []
    for number in range(2):
        with Store(tmp_path / f"copy{number}.db") as copy:
            found = copy.events_after(0, 10**6)
            assert [offset for offset, _ in found] == list(range(1, len(found) + 1))
            assert found == store.events_after(0, len(found))
            for _, said in found[-10:]:
                answer, original = copy.completion(said.completion_id), store.completion(said.completion_id)
                assert answer is not None and answer.completion is not None
                assert original is not None and original.completion is not None
                assert same(answer.completion, original.completion)
            assert copy.story("e0") == store.story("e0")
            assert rate(copy, "new", "a") == len(found) + 1
            converse(copy, "new")
            sizes.append(len(found))
    assert sizes[0] > 2 and sizes == sorted(sizes)
    with pytest.raises(OperantError, match="is there already"):
        store.backup(tmp_path / "copy0.db")
    with pytest.raises(OperantError, match="cannot be"):
        store.backup(tmp_path / "nowhere" / "copy.db")
    assert not [f.name for f in tmp_path.iterdir() if f.name.startswith(".")]


def test_what_is_old_goes_with_its_feedback_but_never_what_is_pending(store: Store) -> None:
    now = time.time()
    for number in range(8):
        name = f"c{number}"
        store.begin(name, prompt(f"p{number % 7}"), SAMPLING, Origin(created=now - 100 + number))
        if number != 7:
            store.complete(completion(name))
    converse(store, "young")
    rate(store, "e0", "c0")
    rate(store, "e1", "c1")
    rate(store, "e1b", "c1")
    rate(store, "e2", "c2", "comparison", "c3")
    store.reconcile([record(1, {"e0": Outcome("used"), "e1": Outcome("used")}, 2)])
    assert store.prune() == {"completions": 0, "events": 0}
    assert store.prune(max_age_s=1000) == {"completions": 0, "events": 0}
    # c1 has a pending event, c2 and c3 are compared in one, c7 is being written
    assert store.prune(max_age_s=50) == {"completions": 4, "events": 1}
    assert [c.id for c in store.list_completions()] == ["c1", "c2", "c3", "c7", "young"]
    assert store.story("e0") is None and store.counts()["used"] == 1 and store.counts()["pending"] == 2
    assert [offset for offset, _ in store.events_after(0, 9)] == [2, 3, 4] and rate(store, "e5", "young") == 5
    with store.database.reading() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(tables.PROMPTS)) == 5
    store.reconcile([record(2, {name: Outcome("unused", "x") for name in ("e1b", "e2", "e5")}, 5)])
    assert store.prune(max_age_s=50)["completions"] == 3
    assert [c.id for c in store.list_completions()] == ["c7", "young"]
    assert rate(store, "e6", "young") == 6  # offsets go on, whatever is gone


def test_the_oldest_go_until_the_rest_is_small_enough(store: Store, tmp_path: Path) -> None:
    for number in range(10):
        store.begin(f"c{number}", prompt(), SAMPLING)
        store.complete(completion(f"c{number}", text="x" * 20_000))
    rate(store, "e0", "c0")
    assert store.prune(max_bytes=10**6)["completions"] == 0
    file = tmp_path / "live.db"
    before = file.stat().st_size if file.exists() else 0
    assert store.prune(max_bytes=45_000)["completions"] == 8
    assert [c.id for c in store.list_completions()] == ["c0", "c9"]
    if before:
        assert file.stat().st_size < before / 2


def test_while_it_is_open_it_prunes_by_itself(tmp_path: Path) -> None:
    with Store(tmp_path / "live.db") as store:
        store.retain(0, 0)
        assert store._retaining is None
        converse(store, "a")
        store.retain(1e-9, 0, every_s=0.01)
        for name in "bc":
            until = time.monotonic() + PATIENCE
            while store.list_completions() and time.monotonic() < until:
                time.sleep(0.01)
            assert store.list_completions() == []
            converse(store, name)  # the next round finds it
    assert not store._retaining.is_alive()


def test_it_prunes_nothing_by_itself_while_that_is_forbidden(tmp_path: Path) -> None:
    asked, forbidden = threading.Semaphore(0), True

    def forgetting() -> bool:
        asked.release()
        return forbidden

    with Store(tmp_path / "live.db") as store:
        converse(store, "a")
        store.retain(1e-9, 0, every_s=0.01, unless=forgetting)
        for _ in range(3):  # who asks again has done what it did after the answer before
            assert asked.acquire(timeout=PATIENCE)
        assert len(store.list_completions()) == 1
        forbidden = False
        until = time.monotonic() + PATIENCE
        while store.list_completions() and time.monotonic() < until:
            time.sleep(0.01)
        assert store.list_completions() == []


@pytest.mark.parametrize("seed", range(3))
def test_events_in_are_pending_used_superseded_and_unused_by_reason(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    waiting: list[str] = []
    told: Counter[tuple[str, str]] = Counter()
    with Store(tmp_path / "live.db") as store:
        converse(store, "a", "b")
        for turn in range(40):
            if draw.random() < 0.7:
                rate(store, f"e{turn}", draw.choice("ab"), draw.choice(["thumb", "comment", "retract"]), None)
                waiting.append(f"e{turn}")
            else:
                some, waiting = waiting[:2], waiting[2:]
                possible: list[Any] = [("used", ""), ("superseded", "later"), ("unused", "x"), ("unused", "y")]
                ends = [draw.choice(possible) for _ in some]
                told.update(ends)
                store.reconcile([record(turn, {n: Outcome(*end) for n, end in zip(some, ends)}, 0)])
        counts = store.counts()
        assert counts["pending"] == len(waiting) == len(store.events(state="pending"))
        assert counts["used"] == told["used", ""] and counts["superseded"] == told["superseded", "later"]
        assert counts["reasons"] == {r: n for (state, r), n in told.items() if state == "unused"}
        assert counts["unused"] == sum(counts["reasons"].values())
        assert counts["events"] == counts["pending"] + counts["used"] + counts["superseded"] + counts["unused"]


# --- revisions --------------------------------------------------------------------------------------------------------


def engine_of(url: str) -> sa.Engine:
    return connect(address(url), read_only=False)


def test_the_migrations_make_the_tables_that_the_store_uses(store: Store, url: str) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext
    from alembic.script import ScriptDirectory

    folder = str(Path(migrations.__file__).parent)
    assert ScriptDirectory(folder, version_locations=[folder]).get_current_head() == tables.REVISION
    engine = engine_of(url)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, tables.TABLES) == []
    engine.dispose()


def test_a_store_of_revision_1_is_brought_up_to_date_with_its_data(url: str) -> None:
    engine = engine_of(url)
    with engine.begin() as connection:
        migrations.upgrade(connection, "0001")
        assert set(sa.inspect(connection).get_table_names()) == {"prompts", "completions", "events", "alembic_version"}
        say = connection.exec_driver_sql
        blob = "X'0100000002000000'" if engine.dialect.name == "sqlite" else "'\\x0100000002000000'"
        body = {"id": "p", "text": "hi", "messages": None, "references": [], "task": "", "meta": {}}
        answer = {
            "text": "ab", "stop_reason": "eos", "truncated": False, "tokenizer_hash": "", "template_hash": "",
            "meta": {},
        }  # fmt: skip
        say(f"INSERT INTO prompts VALUES ({blob}, {blob}, '{json.dumps(body)}')")
        say(
            'INSERT INTO completions (id, prompt, status, route, "user", model_version, created, sampling, request, '
            f"metadata, answer, tokens, text_ends) VALUES ('c', {blob}, 'complete', '\"\"', '\"ann\"', 3, 1.5, 'null', "
            f"'{{}}', '{{}}', '{json.dumps(answer)}', {blob}, {blob})"
        )
        say("INSERT INTO events VALUES (1, 'e1', 'c', 'thumb', '-1', NULL, NULL, 'ann', 'k', 'h', 2.5, 2.75, '{}')")
    engine.dispose()
    with pytest.raises(OperantError, match="older operant"):
        Store(url, read_only=True)
    with Store(url) as store:
        found = store.completion("c")
        assert found is not None and found.completion is not None and found.completion.tokens.tolist() == [1, 2]
        assert found.user == "ann" and found.prompt.text == "hi"
        assert store.events_after(0, 9) == [(1, Feedback("e1", "c", "thumb", -1, "ann", "k", 2.5))]
        assert rate(store, "e2") == 2
        store.reconcile([record(1, {"e1": Outcome("used")}, 1)])
        assert store.counts()["used"] == 1


def test_a_store_of_a_newer_operant_is_left_alone(url: str) -> None:
    Store(url).close()
    engine = engine_of(url)
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    engine.dispose()
    for read_only in (False, True):
        with pytest.raises(OperantError, match="a newer operant; update this one"):
            Store(url, read_only=read_only)


@pytest.mark.parametrize(
    "name", ["feedback.jsonl", "sqlite://", "sqlite:///:memory:", "mysql://u:secret@h/d", "", "a:b@c"]
)
def test_what_is_no_store_is_named_without_its_password(name: str) -> None:
    with pytest.raises(OperantError, match="is no store; give --store") as caught:
        Store(name)
    assert "secret" not in str(caught.value)


def test_a_store_that_cannot_be_reached_says_so_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "broken.db").write_text("this is no database " * 100)
    for name, words in (
        (str(tmp_path / "file" / "live.db"), "cannot be opened"),
        (str(tmp_path / "broken.db"), "not a database"),
        (f"postgresql://nobody:secret@/x?host={tmp_path}", "cannot be opened"),
    ):
        with pytest.raises(OperantError, match=words) as caught:
            Store(name)
        assert "\n" not in str(caught.value) and "secret" not in str(caught.value)
    with pytest.raises(OperantError, match="is not there"):
        Store(tmp_path / "none.db", read_only=True)
    sqlite3.connect(tmp_path / "empty.db").close()
    with pytest.raises(OperantError, match="holds no store"):
        Store(tmp_path / "empty.db", read_only=True)


def test_the_journal_mode_follows_the_version_of_sqlite(tmp_path: Path) -> None:
    fixed = [(3, 51, 3), (3, 52, 0), (4, 0, 0), (3, 50, 7), (3, 44, 6)]
    broken = [(3, 51, 2), (3, 51, 0), (3, 50, 6), (3, 45, 0), (3, 44, 5), (3, 40, 1), (3, 7, 0)]
    assert {journal_mode(v)[:2] for v in fixed} == {("WAL", "FULL")}
    assert {journal_mode(v)[:2] for v in broken} == {("DELETE", "EXTRA")}
    with Store(tmp_path / "live.db") as store, store.database.reading() as connection:
        mode, synchronous, _ = journal_mode(sqlite3.sqlite_version_info)
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == mode.lower()
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == {"FULL": 2, "EXTRA": 3}[synchronous]
