"""Feedback on an answer becomes a committed event, whichever way it comes in."""

from __future__ import annotations

import re
import time
from typing import Any

from operant.live.api.service import ApiError, Service, Way, new_id
from operant.live.storage import feedback
from operant.live.storage.store import StoredCompletion

__all__ = ["PEOPLE", "find_completion", "is_id", "record"]

PEOPLE: tuple[Way, ...] = ("api", "metadata", "link")  # ways by which people rate; the others are the server's own
_ID = re.compile(r"[\w.:-]{1,200}", re.ASCII)


def is_id(text: str) -> bool:
    """Whether this may be the id of a completion or an event."""
    return _ID.fullmatch(text) is not None


async def find_completion(service: Service, completion_id: str) -> StoredCompletion | None:
    """The stored answer of this id, if there is one. Raises ApiError 503 when the store cannot be read."""
    if not is_id(completion_id):
        return None
    return await service.io(service.store.completion, completion_id)


async def record(
    service: Service, body: dict[str, Any], stored: StoredCompletion, source: str, way: Way
) -> dict[str, Any]:
    """Validate and commit one event, wake the learner and tell the listeners; the receipt.

    body: as `storage.feedback.parse` reads it. source: whose word it is. way: by which it came in.
    Raises BadFeedback for what is no feedback, Conflict for an idempotency key that was used for something else, and
    ApiError: 422 for the retraction of what this source has not said, 429 when people say more than their rate, 503
    when the store cannot be written.
    """
    if way in PEOPLE:
        service.admit("feedback", source)
    others: dict[str, StoredCompletion | None] = {}
    if body.get("kind") == "comparison" and isinstance(body.get("value"), str):
        others[body["value"]] = await find_completion(service, body["value"])
    if body.get("kind") == "retract" and (name := body.get("value")):
        retracted = await service.io(service.store.story, name) if isinstance(name, str) and is_id(name) else None
        if retracted is None or (retracted.event.source, retracted.event.completion_id) != (source, stored.id):
            raise ApiError(422, f"value: you have said nothing {str(name)[:100]!r} about this answer", param="value")
    config = service.config
    event = feedback.parse(
        body, stored, others.get, source=source, now=time.time(), id=new_id("fb-"), score_low=config.score_low,
        score_high=config.score_high,
    )  # fmt: skip
    tags = dict(body.get("tags") or {})
    receipt = await service.io(service.store.add_feedback, event, body_hash=feedback.body_hash(body), tags=tags)
    if not receipt.duplicate:
        service.metrics.feedback.labels(event.kind, way).inc()
        service.poke()
        await service.tell(lambda listener: listener.on_rated(service, event, stored, way))
    waiting_for = await service.waits_for(receipt.id, receipt.state, stored)
    return {
        "id": receipt.id, "object": "feedback", "completion_id": stored.id, "kind": event.kind, "source": source,
        "state": receipt.state, "duplicate": receipt.duplicate, "offset": receipt.offset, "waiting_for": waiting_for,
    }  # fmt: skip
