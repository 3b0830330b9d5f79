"""Feedback on an answer: from a request's body to an event, and the exchange of events with other tools."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from operant.data.preferences import good_or_bad
from operant.types import Completion, Feedback, OperantError, Prompt

__all__ = ["FORGOTTEN", "KINDS", "BadFeedback", "Interaction", "body_hash", "parse"]

FORGOTTEN = ""  # the source of what a forgotten one said
KINDS = ("score", "thumb", "edit", "comparison", "span", "comment", "retract")
_FIELDS = {"completion_id", "kind", "value", "span", "text", "source", "tags", "idempotency_key"}
_LONGEST_NAME = 512  # characters of a key or a source


class BadFeedback(OperantError):
    """A body that is no feedback. `param` names the field at fault."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


class Interaction(Protocol):
    """A stored interaction, as far as it is rated and learned from. `completion` is None while there are no tokens."""

    @property
    def id(self) -> str: ...  # of the completion

    @property
    def prompt(self) -> Prompt: ...

    @property
    def completion(self) -> Completion | None: ...


def body_hash(body: Mapping[str, Any]) -> str:
    """What has to be the same for the same idempotency key to mean the same feedback: SHA-256 of the rest, in hex."""
    rest = {name: value for name, value in body.items() if name != "idempotency_key"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def parse(
    body: Mapping[str, Any],
    stored: Interaction,
    look: Callable[[str], Interaction | None],
    *,
    source: str,
    now: float,
    id: str,
    score_low: float = 0.0,
    score_high: float = 1.0,
) -> Feedback:
    """The event that a request's body says about a stored completion.

    kind and value:
        thumb: up or down, as 1 or −1 (true and false, "up" and "down" are read too).
        score: a number from score_low to score_high.
        edit: the corrected text.
        comparison: the id of a completion of the same prompt, to which this one is preferred.
        span: a number from −1 to 1 about the characters `span`: {"start", "end"} in code points, {"text"}, the quoted
            words, which must occur once, or both: of several places of the words, the one nearest to start.
        comment: a text.
        retract: the id of the event that is taken back, or null for all that the source said of the completion.

    Args:
        look: another completion by its id.
        source, now, id: who said it, when (seconds since the epoch), and the new event's id.

    An idempotency key that is missing stays empty; the store fills it in. An event that teaches nothing is an event.
    Raises BadFeedback for a body that is malformed.
    """
    _check_fields(body)
    kind, key = body.get("kind"), body.get("idempotency_key") or ""
    if kind not in KINDS:
        raise BadFeedback(f"kind is {kind!r}; give one of {', '.join(KINDS)}", "kind")
    _check_name("idempotency_key", key)
    _check_name("source", source)
    given, span = body.get("value"), None
    value: float | str | None
    if kind == "thumb":
        value = _thumb(given)
    elif kind == "score":
        value = _number_within(given, score_low, score_high, "a score")
    elif kind == "span":
        value, span = _number_within(given, -1.0, 1.0, "a span"), _characters(body, stored)
    elif kind == "retract":
        value = _retracted(given)
    elif kind == "comparison":
        value = _other_completion(given, stored, look)
    else:
        value = _expect_text(given, kind)
    return Feedback(id, stored.id, kind, value, source, key, now, span)


_A = {"edit": "an edit", "comparison": "a comparison", "comment": "a comment"}


def _check_fields(body: Mapping[str, Any]) -> None:
    for name in body:
        if name not in _FIELDS:
            raise BadFeedback(f"{name} is no field of feedback; there are {', '.join(sorted(_FIELDS))}", name)


def _check_name(name: str, text: Any) -> None:
    if not (isinstance(text, str) and len(text) <= _LONGEST_NAME and (text.isprintable() or text == "")):
        raise BadFeedback(
            f"{name} must be a text of at most {_LONGEST_NAME} characters without control characters", name
        )


def _thumb(given: Any) -> float:
    good = good_or_bad(given)
    if good is None:
        raise BadFeedback(f"value of a thumb is {given!r}; give 1 or -1", "value")
    return 1 if good else -1


def _number_within(given: Any, low: float, high: float, what: str) -> float:
    if isinstance(given, bool) or not isinstance(given, int | float) or not low <= given <= high:
        raise BadFeedback(f"value of {what} is {given!r}; give a number from {low:g} to {high:g}", "value")
    return given


def _retracted(given: Any) -> str | None:
    if given is not None and not isinstance(given, str):
        raise BadFeedback("value of a retraction must be the id of an event, or null", "value")
    return given or None


def _expect_text(given: Any, kind: str) -> str:
    if not isinstance(given, str):
        raise BadFeedback(f"value of {_A[kind]} must be a text", "value")
    return given


def _other_completion(given: Any, stored: Interaction, look: Callable[[str], Interaction | None]) -> str:
    """The id of another completion of the same prompt."""
    name = _expect_text(given, "comparison")
    if name == stored.id:
        raise BadFeedback("a completion cannot be preferred to itself; value is the id of the other one", "value")
    other = look(name)
    if other is None:
        raise BadFeedback(f"there is no stored completion {name!r} to compare with", "value")
    if not np.array_equal(other.prompt.tokens, stored.prompt.tokens):
        raise BadFeedback(f"{name} answers another prompt; compare two answers to the same one", "value")
    return name


def _characters(body: Mapping[str, Any], stored: Interaction) -> tuple[int, int]:
    """The code points [start, end) that a span is about."""
    if stored.completion is None:
        raise BadFeedback("the answer is not written to its end; rate a span of it when it is", "span")
    text = stored.completion.text
    given = body.get("span") or {}
    if not isinstance(given, Mapping):
        raise BadFeedback('span must be an object such as {"start": 0, "end": 5} or {"text": "words"}', "span")
    quoted = given.get("text", body.get("text"))
    start, end = given.get("start"), given.get("end")
    for name, number in (("start", start), ("end", end)):
        if number is not None and (isinstance(number, bool) or not isinstance(number, int)):
            raise BadFeedback(f"span.{name} is {number!r}; give a whole number of characters", "span")
    if quoted is not None:
        return _quoted(quoted, text, start)
    if start is None or end is None:
        raise BadFeedback("span needs start and end, or text", "span")
    if not 0 <= start < end <= len(text):
        raise BadFeedback(f"span {start} to {end} is not within the {len(text)} characters of the answer", "span")
    return start, end


def _quoted(words: Any, text: str, start: int | None) -> tuple[int, int]:
    if not isinstance(words, str) or not words:
        raise BadFeedback("the quoted text of a span must not be empty", "span")
    places, place = [], text.find(words)
    while place >= 0:
        places.append(place)
        place = text.find(words, place + 1)
    if not places:
        raise BadFeedback("the quoted text is not in the answer; quote it letter for letter", "span")
    if start is None and len(places) > 1:
        raise BadFeedback(f"the quoted text is in the answer {len(places)} times; give start too", "span")
    at = places[0] if start is None else min(places, key=lambda p: abs(p - start))
    return at, at + len(words)
