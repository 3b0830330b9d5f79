"""Feedback out to files and in from other tools' exports."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from program import Program

from operant.data.feedback_log import FeedbackLog
from operant.data.preferences import load_preferences, load_ratings
from operant.data.prompts import load_prompts
from operant.data.rows import load_rows
from operant.data.text import Codec
from operant.live.storage.exchange import Scale, export, export_rows, load
from operant.live.storage.store import Origin, Store
from operant.rl.logged import read_logged
from operant.types import Completion, Feedback, OperantError, Prompt, Sampling


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "live.db") as opened:
        yield opened


def answer(store: Store, name: str, text: str, asked: str = "hi", **options: Any) -> None:
    messages = options.pop("messages", None)
    prompt = Prompt(f"p-{asked}", np.array([1, 2]), text="" if messages else asked, messages=messages, task="talk")
    store.begin(name, prompt, Sampling(seed=3), Origin(**options))
    ones = np.arange(3)
    logprobs = np.array([-1, -2, -3], np.float32)
    store.complete(Completion(name, prompt.id, text, ones, ones, behavior_logprobs=logprobs, policy_version=ones + 4))


def rate(store: Store, name: str, about: str, kind: Any, value: Any, **options: Any) -> None:
    settings: dict[str, Any] = {"source": "ann", "idempotency_key": name, "time": 9.0}
    store.add_feedback(Feedback(name, about, kind, value, **(settings | options)), body_hash=name)


def talked(store: Store, **options: Any) -> None:
    for name, text in (("a", "first"), ("b", "second"), ("c", "third")):
        answer(store, name, text, **options)
    rate(store, "e1", "a", "thumb", -1)
    rate(store, "e2", "a", "edit", "better", time=3.0)
    rate(store, "e3", "b", "comparison", "c")
    rate(store, "e4", "b", "score", 0.75, source="bob")
    rate(store, "e5", "b", "span", -1, span=(0, 3))
    rate(store, "e6", "a", "edit", "best", time=1.0)  # appended later, so it stands, whatever its clock said
    rate(store, "e7", "c", "comment", "hm")
    rate(store, "e8", "a", "thumb", 1, source="bob")
    rate(store, "e9", "a", "retract", "e8", source="bob")
    rate(store, "e10", "c", "score", 0.5)


# --- out --------------------------------------------------------------------------------------------------------------


def test_lines_hold_everything_and_come_back(store: Store, tmp_path: Path) -> None:
    talked(store)
    assert export(store, tmp_path / "all.jsonl") == 1 + 3 + 10
    replay = FeedbackLog.from_lines((tmp_path / "all.jsonl").read_text().splitlines(keepends=True))
    assert list(replay.events.values()) == [event for _, event in store.events_after(0, 99)]
    with Store(tmp_path / "other.db") as other:
        assert load(other, tmp_path / "all.jsonl") == {"completions": 3, "events": 10}
        assert other.events_after(0, 99) == store.events_after(0, 99)
        for name in "abc":
            one, two = store.completion(name), other.completion(name)
            assert one is not None and two is not None and one.completion is not None and two.completion is not None
            assert np.array_equal(one.completion.behavior_logprobs, two.completion.behavior_logprobs)  # type: ignore[arg-type]
            assert two.completion.sampling == Sampling(seed=3) and two.model_version == 4 and two.route == "talk"
        assert load(other, tmp_path / "all.jsonl") == {"completions that were there": 3, "events that were there": 10}
    with pytest.raises(OperantError, match="is there already"):
        export(store, tmp_path / "all.jsonl")
    with pytest.raises(OperantError, match="cannot be written"):
        export(store, tmp_path / "nowhere" / "all.jsonl")


def test_events_without_their_answers_are_counted(store: Store, tmp_path: Path) -> None:
    talked(store)
    export(store, tmp_path / "all.jsonl")
    lines = (tmp_path / "all.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "some.jsonl").write_text("".join(line for line in lines if not line.startswith('{"prompt"')))
    with Store(tmp_path / "other.db") as other:
        assert load(other, tmp_path / "some.jsonl") == {
            "completions without their prompt": 3, "about completions that are not in the store": 10,
        }  # fmt: skip


def test_pairs_and_ratings_are_what_other_trainers_read(store: Store, tmp_path: Path, codec: Codec) -> None:
    talked(store)
    assert export(store, tmp_path / "pairs", "pairs") == 2
    pairs = datasets.load_from_disk(str(tmp_path / "pairs"))
    assert list(pairs) == [
        {"prompt": "hi", "chosen": "second", "rejected": "third"},
        {"prompt": "hi", "chosen": "best", "rejected": "first"},
    ]
    read = load_preferences(load_rows(tmp_path / "pairs"), codec)
    assert [codec.decode(pair.chosen) for pair in read] == ["second", "best"]
    assert export(store, tmp_path / "ratings", "ratings") == 2
    ratings = list(datasets.load_from_disk(str(tmp_path / "ratings")))
    assert ratings == [
        {"prompt": "hi", "completion": "first", "label": False}, {"prompt": "hi", "completion": "second", "label": True}
    ]  # fmt: skip
    assert [r.desirable for r in load_ratings(load_rows(tmp_path / "ratings"), codec)] == [False, True]
    assert [row["label"] for row in export_rows(store, "ratings", scale=Scale(midpoint=0.8))] == [False, False, False]


def test_chats_stay_chats_unless_a_text_is_among_them(store: Store) -> None:
    asked = ({"role": "system", "content": "be"}, {"role": "user", "content": "hi"})
    talked(store, messages=asked)
    said = {"prompt": list(asked), "completion": [{"role": "assistant", "content": "first"}], "label": False}
    assert export_rows(store, "ratings")[0] == said
    assert export_rows(store, "pairs")[1]["chosen"] == [{"role": "assistant", "content": "best"}]
    answer(store, "d", "fourth", asked="plain")
    rate(store, "e11", "d", "thumb", 1)
    assert [row["prompt"] for row in export_rows(store, "ratings")] == ["be\nhi", "be\nhi", "plain"]


def test_rewards_are_a_log_to_learn_from(store: Store, tmp_path: Path, codec: Codec) -> None:
    text = "one two"
    tokens = codec.encode(text, eos=True)
    size = len(tokens)
    assert size > 3
    ends = codec.text_and_ends(tokens)[1]
    for name in "abc":
        prompt = Prompt(f"p-{name}", np.array([5, 6, 7]), text="asked as it was", task="talk")
        store.begin(name, prompt, Sampling())
        logprobs = -np.arange(size, dtype=np.float32)
        store.complete(Completion(name, prompt.id, text, tokens, ends, behavior_logprobs=logprobs))
    rate(store, "e1", "a", "thumb", 1)
    rate(store, "e2", "a", "score", 2.0, source="bob")  # the lower half of 0 to 8: -0.5
    rate(store, "e3", "b", "span", -1, span=(0, 3))
    rate(store, "e4", "b", "comment", "hm")
    rate(store, "e5", "c", "thumb", -1)
    rate(store, "e6", "c", "retract", None)
    rate(store, "e7", "c", "edit", "better", source="bob")
    assert export(store, tmp_path / "rewards", "rewards", scale=Scale(high=8.0)) == 2
    rows = load_rows(tmp_path / "rewards")
    first, second = (np.array(row["reward"]) for row in rows)
    assert first.tolist() == [0.0] * (size - 1) + [0.25]  # the mean of two sources
    said = int(np.searchsorted(ends, 3)) + 1  # tokens of "one"
    np.testing.assert_allclose(second, [-1 / said] * said + [0.0] * (size - said))
    prompts = load_prompts(rows, codec)
    for (prompt, completion, reward), row in zip(read_logged(rows, prompts, codec), rows, strict=True):
        assert prompt.tokens.tolist() == [5, 6, 7] and prompt.text == "asked as it was"
        assert completion.tokens.tolist() == tokens.tolist() and completion.text == text
        assert completion.behavior_logprobs is not None
        assert completion.behavior_logprobs.tolist() == (-np.arange(size)).tolist() and reward == row["reward"]
    outside = export_rows(store, "rewards", scale=Scale(high=1.0))  # bob's score says nothing now
    assert outside[0]["reward"][-1] == 1.0


def test_every_event_is_a_row_of_the_log(store: Store, tmp_path: Path) -> None:
    talked(store)
    store.delete("b")
    assert export(store, tmp_path / "events", "events") == 10
    rows = list(datasets.load_from_disk(str(tmp_path / "events")))
    assert rows[1] == {
        "id": "e2", "completion_id": "a", "prompt": "hi", "completion": "first", "kind": "edit", "number": None,
        "text": "better", "start": None, "end": None, "source": "ann", "time": 3.0, "state": "pending",
    }  # fmt: skip
    assert rows[4]["number"] == -1 and rows[4]["end"] == 3 and rows[4]["completion"] is None
    assert len(export_rows(store, "pairs")) == 1  # what was deleted is in none
    store.delete("a")
    with pytest.raises(OperantError, match="nothing of that form"):
        export(store, tmp_path / "pairs", "pairs")


# --- in ---------------------------------------------------------------------------------------------------------------


def loaded(store: Store, tmp_path: Path, tool: str, rows: Any, **options: Any) -> list[tuple[Any, ...]]:
    """(completion, kind, value, source, time) of each event, after a file of these rows was taken in twice."""
    file = tmp_path / f"{tool}.json"
    file.write_text(json.dumps(rows))
    counts = load(store, file, tool, **options)
    events = store.events_after(0, 99)
    assert counts["events"] == len(events)
    again = load(store, file, tool, **options)
    assert again["events"] == 0 and again["events that were there"] == len(events)
    return [(e.completion_id, e.kind, e.value, e.source, e.time) for _, e in events]


def test_tensorzero(store: Store, tmp_path: Path) -> None:
    inference, when = "0196374b-04a3-7013-9049-e59ed5fe3f74", 0x0196374B04A3 / 1000
    answer(store, inference, "x")
    about = {"target_id": inference, "id": "0196374b-04a3-7013-9049-e59ed5fe3f75", "tags": {"author": "Alice"}}
    names = iter("abcdefgh")

    def row(**cells: Any) -> dict[str, Any]:
        return about | {"id": about["id"][:-1] + next(names)} | cells

    blocks = json.dumps([{"type": "text", "text": "good "}, {"type": "tool_call"}, {"type": "text", "text": "one"}])
    demonstration = row(inference_id=inference, value=blocks, tags={})
    del demonstration["target_id"]
    rows = [
        row(metric_name="liked", value=True, timestamp="2025-04-15 02:33:58"), row(metric_name="liked", value=False),
        row(metric_name="rating", value=0.25), row(target_type="inference", value="hm"), demonstration,
        demonstration | {"id": "json", "value": json.dumps({"raw": '{"a":1}', "parsed": {"a": 1}})},
        row(metric_name="liked", value=True, target_id="0196374b-04a3-7013-9049-000000000000"),
        row(metric_name="liked", value=None),
    ]  # fmt: skip
    assert loaded(store, tmp_path, "tensorzero", rows) == [
        (inference, "thumb", 1, "Alice", 1744684438.0), (inference, "thumb", -1, "Alice", when),
        (inference, "score", 0.25, "Alice", when), (inference, "comment", "hm", "Alice", when),
        (inference, "edit", "good one", "tensorzero", when), (inference, "edit", '{"a":1}', "tensorzero", 0.0),
    ]  # fmt: skip
    assert load(store, tmp_path / "tensorzero.json", "tensorzero") == {
        "events that were there": 6, "about completions that are not in the store": 1, "saying nothing": 1,
    }  # fmt: skip


def test_a_key_that_its_source_has_used_for_something_else_is_counted(store: Store, tmp_path: Path) -> None:
    answer(store, "c", "x")
    row = {"target_id": "c", "metric_name": "m"}
    loaded(store, tmp_path, "tensorzero", [row | {"id": "1", "value": 1.5}])
    rate(store, "mine", "c", "thumb", 1, source="tensorzero", idempotency_key="tensorzero-2")
    (tmp_path / "more.json").write_text(json.dumps([row | {"id": "2", "value": 1.5}]))
    assert load(store, tmp_path / "more.json", "tensorzero") == {"with a key that was used for something else": 1}


def test_one_metric_of_another_tool_can_be_chosen(store: Store, tmp_path: Path) -> None:
    answer(store, "c", "x")
    rows = [{"id": n, "target_id": "c", "metric_name": m, "value": 1.5} for n, m in (("1", "good"), ("2", "cost"))]
    assert [e[2] for e in loaded(store, tmp_path, "tensorzero", rows, metric="good")] == [1.5]
    assert load(store, tmp_path / "tensorzero.json", "tensorzero", metric="good")["of another metric"] == 1


def test_langsmith(store: Store, tmp_path: Path) -> None:
    run = str(uuid.uuid4())
    answer(store, "c", "x", metadata={"langsmith_run_id": run, "note": run[:3]})
    row = {
        "created_at": "2025-01-01T00:00:01+00:00", "modified_at": "2025-01-01T00:00:01+00:00", "session_id": "s",
        "run_id": run, "key": "user_score", "score": None, "value": None, "comment": None, "correction": None,
        "feedback_source": {"type": "api", "metadata": {}, "user_id": None},
    }  # fmt: skip
    ann = {"feedback_source": {"type": "app", "user_id": "ann"}}
    rows = [
        row | {"id": "1", "score": 0.5}, row | {"id": "2", "score": True} | ann,
        row | {"id": "3", "value": "👎", "comment": "bad"}, row | {"id": "4", "value": "so so"},
        row | {"id": "5", "score": 0, "correction": {"score": 1}}, row | {"id": "6", "correction": {"output": "right"}},
        row | {"id": "7", "correction": "right again"}, row | {"id": "8"},
        row | {"id": "9", "score": 1, "run_id": run[:3]},
    ]  # fmt: skip
    when = 1735689601.0
    assert loaded(store, tmp_path, "langsmith", rows) == [
        ("c", "score", 0.5, "langsmith api", when), ("c", "thumb", 1, "ann", when),
        ("c", "thumb", -1, "langsmith api", when), ("c", "comment", "bad", "langsmith api", when),
        ("c", "comment", "so so", "langsmith api", when), ("c", "score", 1, "langsmith api", when),
        ("c", "edit", "right", "langsmith api", when), ("c", "edit", "right again", "langsmith api", when),
    ]  # fmt: skip


def test_langfuse(store: Store, tmp_path: Path) -> None:
    answer(store, "whole", "x", metadata={"trace_id": "t1"})
    answer(store, "part", "x", metadata={"observation_id": "o1"})
    api = {
        "traceId": "t1",
        "observationId": None,
        "name": "n",
        "source": "API",
        "timestamp": "2025-01-01T00:00:01.500Z",
    }
    exported = {
        "trace_id": "t1",
        "observation_id": "o1",
        "source": "ANNOTATION",
        "timestamp": "2025-01-01 00:00:01.500000",
    }
    rows = [
        api | {"id": "1", "dataType": "NUMERIC", "value": 0.9, "comment": "fine"},
        api | {"id": "2", "dataType": "BOOLEAN", "value": 0, "stringValue": "False", "authorUserId": "ann"},
        api | {"id": "3", "dataType": "CATEGORICAL", "value": None, "stringValue": "good"},
        api | {"id": "4", "dataType": "CATEGORICAL", "value": "partly"},
        api | {"id": "5", "dataType": "CORRECTION", "value": 0, "stringValue": "right"},
        exported | {"id": "6", "data_type": "BOOLEAN", "value": 1, "string_value": "True", "author_user_id": "bob"},
        exported | {"id": "7", "data_type": "NUMERIC", "value": 3, "string_value": None, "comment": None},
        exported | {"id": "8", "data_type": "TEXT", "value": 0, "string_value": "words"},
        exported | {"id": "9", "data_type": "NUMERIC", "value": None},
    ]  # fmt: skip
    when = 1735689601.5
    pages = {"data": rows, "meta": {"page": 1, "limit": 50, "totalItems": 9, "totalPages": 1}}
    assert loaded(store, tmp_path, "langfuse", pages) == [
        ("whole", "score", 0.9, "langfuse api", when), ("whole", "comment", "fine", "langfuse api", when),
        ("whole", "thumb", -1, "ann", when), ("whole", "thumb", 1, "langfuse api", when),
        ("whole", "comment", "partly", "langfuse api", when), ("whole", "edit", "right", "langfuse api", when),
        ("part", "thumb", 1, "bob", when), ("part", "score", 3, "langfuse annotation", when),
        ("part", "comment", "words", "langfuse annotation", when),
    ]  # fmt: skip


# --- the program ------------------------------------------------------------------------------------------------------


def test_the_program_looks_exports_loads_backs_up_and_prunes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    program = Program(capsys)
    path = str(tmp_path / "live.db")
    feedback = ["feedback", "--store", path]
    with Store(path) as store:
        talked(store)
        told = json.loads(program(*feedback, "--json").out)
        assert told["events"] == told["pending"] == 10 and told["completions"] == 3
        assert json.loads(program(*feedback, "--event", "e3", "--json").out)["event"]["value"] == "c"
        assert "pairs" in program(*feedback, "--export", str(tmp_path / "pairs"), "--form", "pairs").out
        assert program(*feedback, "--export", str(tmp_path / "all.jsonl")).out.split() == ["lines", "14"]
        assert "copy.db" in program(*feedback, "--backup", str(tmp_path / "copy.db")).out
        assert "another process writes" in program.fault(*feedback, "--max_age_days", "1")
        assert "no feedback e99" in program.fault(*feedback, "--event", "e99")
    copy = ["feedback", "--store", str(tmp_path / "copy.db"), "--json"]
    assert json.loads(program(*copy, "--load", str(tmp_path / "all.jsonl")).out) == {
        "completions that were there": 3, "events that were there": 10,
    }  # fmt: skip
    assert json.loads(program(*copy, "--max_bytes", "1").out) == {"completions": 0, "events": 0}  # all is pending
    monkeypatch.chdir(tmp_path)
    assert "runs/live/store.db is not there" in program.fault("feedback")
    with Store(tmp_path / "runs" / "live" / "store.db") as store:
        talked(store)
    assert json.loads(program("feedback", "--json").out)["events"] == 10
    assert json.loads(program("feedback", "--root", "runs/live", "--json").out)["events"] == 10
    assert "give one of them" in program.fault(*feedback, "--load", "x", "--backup", "y")
    assert "is not there" in program.fault("feedback", "--store", str(tmp_path / "none.db"))
    assert "cannot be read" in program.fault(*feedback, "--load", str(tmp_path / "none.jsonl"))
    (tmp_path / "no.jsonl").write_bytes(b"\xf8\xff")
    assert "is no text" in program.fault(*feedback, "--load", str(tmp_path / "no.jsonl"))
    assert "no prompt, completion or feedback" in program.fault(*feedback, "--load", __file__)
