"""From bodies of requests to events."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from operant.live.storage.feedback import KINDS, BadFeedback, body_hash, parse
from operant.live.storage.store import StoredCompletion
from operant.types import Completion, Feedback, OperantError, Prompt

TEXT = "👍强化a good, a good day"


def stored(name: str = "c", asked: int = 1, text: str | None = TEXT) -> StoredCompletion:
    nothing = np.array([], np.int64)
    answer = None if text is None else Completion(name, "p", text, nothing, nothing)
    return StoredCompletion(name, Prompt("p", np.array([asked])), answer, "complete", "", "", 0, {}, {}, 0.0)


OTHERS = {"d": stored("d"), "far": stored("far", asked=2)}


def read(about: StoredCompletion | None = None, **body: Any) -> Feedback:
    return parse(
        {"completion_id": "c", **body}, about or stored(), OTHERS.get, source="ann", now=7.0, id="e",
        score_low=1, score_high=5,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "given", "value"),
    [
        ("thumb", 1, 1), ("thumb", -1, -1), ("thumb", True, 1), ("thumb", False, -1), ("thumb", "up", 1),
        ("thumb", "down", -1), ("score", 1, 1), ("score", 5.0, 5.0), ("score", 2.5, 2.5), ("edit", "", ""),
        ("edit", "better 好", "better 好"), ("comparison", "d", "d"), ("comment", "hm", "hm"), ("retract", None, None),
        ("retract", "e1", "e1"), ("retract", "", None),
    ],
)  # fmt: skip
def test_each_kind_has_its_value(kind: str, given: Any, value: Any) -> None:
    event = read(kind=kind, value=given, idempotency_key="k")
    assert event == Feedback("e", "c", kind, value, "ann", "k", 7.0)  # type: ignore[arg-type]
    assert type(event.value) is type(value)


@pytest.mark.parametrize(
    ("span", "characters"),
    [
        ({"start": 0, "end": 3}, (0, 3)), ({"start": 3, "end": len(TEXT)}, (3, len(TEXT))),
        ({"text": "强化"}, (1, 3)), ({"text": "day"}, (len(TEXT) - 3, len(TEXT))),
        ({"text": "a good", "start": 4}, (3, 9)), ({"text": "a good", "start": 10, "end": 17}, (11, 17)),
        ({"text": "a good", "start": 99}, (11, 17)), ({"text": "强化", "start": 2, "end": 4}, (1, 3)),
    ],
)  # fmt: skip
def test_a_span_is_found_in_the_text(span: dict[str, Any], characters: tuple[int, int]) -> None:
    event = read(kind="span", value=-0.5, span=span)
    assert event.span == characters and event.value == -0.5 and event.idempotency_key == ""
    if "text" in span:
        assert TEXT[slice(*characters)] == span["text"]
    if list(span) == ["text"]:
        assert read(kind="span", value=-0.5, text=span["text"]).span == characters


def test_one_letter_words_that_overlap_are_counted() -> None:
    with pytest.raises(BadFeedback, match="2 times"):
        read(stored(text="aaa"), kind="span", value=1, span={"text": "aa"})
    assert read(stored(text="aaa"), kind="span", value=1, span={"text": "aa", "start": 1}).span == (1, 3)


@pytest.mark.parametrize(
    ("param", "body"),
    [
        ("kind", {"kind": "like", "value": 1}), ("kind", {"value": 1}), ("kind", {"kind": ["thumb"], "value": 1}),
        ("valeu", {"kind": "thumb", "valeu": 1}), ("value", {"kind": "thumb"}),
        ("value", {"kind": "thumb", "value": 3}),
        ("value", {"kind": "score", "value": 0.9}), ("value", {"kind": "score", "value": 5.1}),
        ("value", {"kind": "score", "value": float("nan")}), ("value", {"kind": "score", "value": True}),
        ("value", {"kind": "score", "value": "3"}), ("value", {"kind": "score", "value": 10**400}),
        ("value", {"kind": "edit", "value": None}),
        ("value", {"kind": "comment", "value": 3}), ("value", {"kind": "retract", "value": 3}),
        ("value", {"kind": "comparison", "value": "c"}), ("value", {"kind": "comparison", "value": "nothing"}),
        ("value", {"kind": "comparison", "value": "far"}), ("value", {"kind": "comparison", "value": ["d"]}),
        ("value", {"kind": "span", "value": 2, "span": {"text": "day"}}),
        ("span", {"kind": "span", "value": 1}), ("span", {"kind": "span", "value": 1, "span": [0, 3]}),
        ("span", {"kind": "span", "value": 1, "span": {"start": 3}}),
        ("span", {"kind": "span", "value": 1, "span": {"start": 3, "end": 3}}),
        ("span", {"kind": "span", "value": 1, "span": {"start": -1, "end": 3}}),
        ("span", {"kind": "span", "value": 1, "span": {"start": 0, "end": len(TEXT) + 1}}),
        ("span", {"kind": "span", "value": 1, "span": {"start": True, "end": 3}}),
        ("span", {"kind": "span", "value": 1, "span": {"start": 0.0, "end": 3}}),
        ("span", {"kind": "span", "value": 1, "span": {"text": "a good"}}),
        ("span", {"kind": "span", "value": 1, "span": {"text": "nowhere", "start": 3}}),
        ("span", {"kind": "span", "value": 1, "span": {"text": ""}}),
        ("span", {"kind": "span", "value": 1, "span": {"text": 3}}),
        ("idempotency_key", {"kind": "thumb", "value": 1, "idempotency_key": "a\x00"}),
        ("idempotency_key", {"kind": "thumb", "value": 1, "idempotency_key": "\ud800"}),
        ("idempotency_key", {"kind": "thumb", "value": 1, "idempotency_key": 3}),
        ("idempotency_key", {"kind": "thumb", "value": 1, "idempotency_key": "k" * 513}),
    ],
)  # fmt: skip
def test_a_malformed_body_is_refused_by_the_name_of_its_field(param: str, body: dict[str, Any]) -> None:
    with pytest.raises(BadFeedback) as caught:
        read(**body)
    assert caught.value.param == param and isinstance(caught.value, OperantError)
    assert "\n" not in str(caught.value)


def test_an_answer_that_is_being_written_can_be_rated_as_a_whole_only() -> None:
    writing = stored(text=None)
    assert {read(writing, kind=kind, value=1).value for kind in ("thumb", "score")} == {1}
    with pytest.raises(BadFeedback, match="not written to its end"):
        read(writing, kind="span", value=1, span={"start": 0, "end": 1})


def test_a_body_is_the_same_without_its_key_and_in_any_order() -> None:
    one = {"kind": "thumb", "value": 1, "idempotency_key": "a"}
    assert body_hash(one) == body_hash({"value": 1, "kind": "thumb"}) == body_hash(one | {"idempotency_key": "b"})
    assert len({body_hash(one), body_hash(one | {"value": -1}), body_hash(one | {"tags": {}})}) == 3


def test_the_kinds_are_those_of_the_event() -> None:
    from typing import get_args, get_type_hints

    assert get_args(get_type_hints(Feedback)["kind"]) == KINDS
