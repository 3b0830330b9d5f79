"""The routes of feedback: the native call, the story of each event, the record of each source, and signed links."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import html
import json
import time
from typing import Annotated, Any, Literal
from urllib.parse import parse_qsl

from fastapi import APIRouter, Query, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from pydantic import Field

from operant.live.api.intake import find_completion, is_id, record
from operant.live.api.service import ApiError, RequestBody, Service, StrictModel, caller_of, service_of
from operant.live.learning.sources import by_source
from operant.live.serving.access import is_reserved
from operant.live.storage.store import EventStory, StoredCompletion

__all__ = ["routes"]

routes = APIRouter()

Kind = Literal["score", "thumb", "edit", "comparison", "span", "comment", "retract"]
LONGEST_WAIT = 30.0  # seconds that a request for a story may wait
LOOK_AGAIN = 0.05


class Characters(StrictModel):
    """The characters of the answer that a span is about: by their places (code points), by their words, or both."""

    start: int | None = None
    end: int | None = None
    text: str | None = None


class FeedbackRequest(RequestBody):
    """What somebody says about an answer."""

    completion_id: str
    kind: Kind
    value: bool | int | float | str | None = None
    span: Characters | None = None
    text: str | None = None
    source: str | None = None
    tags: dict[str, str] | None = Field(None, max_length=16)
    idempotency_key: str | None = None


# --- the native call --------------------------------------------------------------------------------------------------


@routes.post("/v1/feedback")
async def add_feedback(request: Request, body: FeedbackRequest) -> dict[str, Any]:
    """Say something about an answer. It is committed when this returns; GET it by its id to see what it did.

    403 for another source than one's own without the role operate, 404 for an answer that is not stored, 409 for an
    idempotency key that was used for something else, 422 for what is no feedback.
    """
    service, caller = service_of(request), caller_of(request, "rate")
    source = caller.name
    if body.source is not None and body.source != source:
        if not caller.may("operate"):
            raise ApiError(
                403, "only a key with the role operate may speak for another source", param="source",
                code="insufficient_permissions",
            )  # fmt: skip
        if is_reserved(body.source):
            raise ApiError(
                422, "source names what the server rates by itself; give the name of somebody", param="source",
                code="reserved_name",
            )  # fmt: skip
        source = body.source
    if not source:
        raise ApiError(422, "source must not be empty", param="source")
    stored = await find_completion(service, body.completion_id)
    if stored is None:
        raise ApiError(
            404, f"there is no stored completion {body.completion_id[:100]!r}; take its id from the response, which is "
            "stored unless it was asked for with store: false", param="completion_id", code="not_found",
        )  # fmt: skip
    return await record(service, body.model_dump(exclude_unset=True), stored, source, "api")


@routes.get("/v1/feedback")
async def list_feedback(
    request: Request,
    completion_id: str | None = None,
    source: str | None = None,
    kind: Kind | None = None,
    state: Literal["pending", "used", "superseded", "unused"] | None = None,
    after: Annotated[int, Query(ge=0, lt=1 << 62)] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> dict[str, Any]:
    """Events and their stories by their offsets, from the first after `after`: an operator's all, else one's own.

    403 for another source's without the role operate.
    """
    service, caller = service_of(request), caller_of(request, "rate")
    if not caller.may("operate"):
        if source not in (None, caller.name):
            raise ApiError(403, "a key without the role operate sees its own feedback only", param="source")
        source = caller.name
    if not all(is_id(name) or name.isprintable() for name in (completion_id or "", source or "")):
        return {"object": "list", "data": [], "has_more": False}
    rows = await service.io(
        service.store.events, completion_id=completion_id, source=source, kind=kind, state=state, after=after,
        limit=limit + 1,
    )  # fmt: skip
    told = [await _rendered(service, row) for row in rows[:limit]]
    return {"object": "list", "data": told, "has_more": len(rows) > limit}


@routes.get("/v1/feedback/{feedback_id}")
async def feedback_story(
    request: Request, feedback_id: str, wait: Annotated[float, Query(ge=0, le=LONGEST_WAIT)] = 0.0
) -> dict[str, Any]:
    """What did my click do? With `wait`, the answer waits so many seconds at most until that is known.

    404 for an event that there is not, or that is another's.
    """
    service, caller = service_of(request), caller_of(request, "rate")
    until = time.monotonic() + wait
    while True:
        story = await service.io(service.store.story, feedback_id) if is_id(feedback_id) else None
        if story is None or not (caller.may("operate") or story.event.source == caller.name):
            raise ApiError(404, f"there is no feedback {feedback_id[:100]!r}", code="not_found")
        if is_settled(story) or time.monotonic() >= until or service.stopping:
            return await _rendered(service, story)
        await asyncio.sleep(LOOK_AGAIN)


def is_settled(story: EventStory) -> bool:
    """Whether nothing more will become of it: it was not used, or what it taught is served."""
    return story.state != "pending" and (story.state != "used" or "served" in story.times)


async def _rendered(service: Service, story: EventStory) -> dict[str, Any]:
    waits = story.state == "pending"
    stored = await service.io(service.store.completion, story.event.completion_id) if waits else None
    return render_story(story, await service.waits_for(story.event.id, story.state, stored))


def render_story(story: EventStory, waiting_for: str = "") -> dict[str, Any]:
    """What became of an event, or what it waits for, as plain data."""
    event, times = story.event, story.times
    seconds = times["served"] - times["received"] if {"served", "received"} <= times.keys() else None
    return {
        "id": event.id, "object": "feedback", "completion_id": event.completion_id, "kind": event.kind,
        "value": event.value, "span": None if event.span is None else {"start": event.span[0], "end": event.span[1]},
        "source": event.source, "tags": story.tags, "offset": story.offset, "state": story.state,
        "reason": story.reason, "version": story.version, "advantage": story.advantage,
        "logprob_before": story.logprob_before, "logprob_after": story.logprob_after, "times": times,
        "seconds": seconds, "waiting_for": waiting_for, "told": _in_a_sentence(story, seconds, waiting_for),
    }  # fmt: skip


def _in_a_sentence(story: EventStory, seconds: float | None, waiting_for: str) -> str:
    """What became of it, for a person."""
    if story.state == "pending":
        return "waiting to be learned" + (f", for {waiting_for}" if waiting_for else "")
    if story.state != "used":
        return f"{story.state}: {story.reason}" if story.reason else story.state
    when = "learned, and not served yet" if seconds is None else f"learned in {seconds:.1f} s"
    moved = ""
    if story.logprob_before is not None and story.logprob_after is not None:
        moved = f"; log-probability of the text {_nats(story.logprob_before)} → {_nats(story.logprob_after)}"
    part = f"; {story.reason}" if story.reason else ""
    return f"{when}, version {story.version}{moved}{part}"


def _nats(logprob: float) -> str:
    """A log-probability for a person: −0.04 is 96% and not the certainty that −0.0 would be."""
    return f"{logprob:.1f}" if logprob <= -0.1 else f"{logprob:.2f}"


@routes.get("/v1/sources")
async def sources(request: Request) -> dict[str, Any]:
    """What each source has said, what became of it and how much its word counts: everybody, or, to a key without the
    role operate, the key itself."""
    service, caller = service_of(request), caller_of(request, "rate")
    config = service.config
    rows = await service.io(
        by_source, service.store, service.versions, score_low=config.score_low, score_high=config.score_high
    )
    return {
        "object": "list", "data": [row for row in rows if caller.may("operate") or row["source"] == caller.name]
    }  # fmt: skip


# --- signed links -----------------------------------------------------------------------------------------------------

STYLE = (
    "body{font:1.1rem/1.5 system-ui,sans-serif;max-width:38rem;margin:2rem auto;padding:0 1rem;color:#1a1a1a;"
    "background:#fff}blockquote{margin:1rem 0;padding:.75rem 1rem;border-left:4px solid #767676;white-space:pre-wrap;"
    "overflow-wrap:anywhere}button{font:inherit;padding:.6rem 1.2rem;margin-right:.6rem;border:1px solid #1a1a1a;"
    "border-radius:.4rem;background:#f3f3f3;color:#1a1a1a}button:focus-visible{outline:3px solid #0b57d0}"
)
_STYLE_HASH = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
PAGE_POLICY = (
    f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)


def _link_html(body: str, status: int = 200) -> HTMLResponse:
    content = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Rate this answer</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="robots" content="noindex">'
        f"<style>{STYLE}</style></head><body><main>{body}</main></body></html>"
    )
    return HTMLResponse(content.encode("utf-8", "replace"), status, {"Content-Security-Policy": PAGE_POLICY})


async def _linked(request: Request, token: str) -> tuple[StoredCompletion, str]:
    service = service_of(request)
    try:
        completion_id, source = service.links.read(token)
    except TimeoutError:
        raise ApiError(410, "this link has expired", code="link_expired") from None
    except ValueError:
        raise ApiError(404, "this link is not genuine", code="bad_link") from None
    stored = await find_completion(service, completion_id)
    if stored is None:
        raise ApiError(404, "the answer is no longer stored", code="not_found")
    return stored, source


@routes.get("/f/{token}", response_class=HTMLResponse)
async def link_link_html(request: Request, token: str) -> Response:
    """The answer with two buttons. Looking at it rates nothing: mail programs look at links by themselves."""
    try:
        stored, _ = await _linked(request, token)
    except ApiError as error:
        return _link_html(f"<p>{html.escape(error.message)}.</p>", error.status)
    text = stored.completion.text if stored.completion is not None else "(not written yet)"
    return _link_html(
        f"<h1>Rate this answer</h1><p>{html.escape(stored.prompt.text)}</p><blockquote>{html.escape(text)}</blockquote>"
        '<form method="post"><button name="value" value="1">&#128077; Good</button>'
        '<button name="value" value="-1">&#128078; Bad</button></form>'
    )


@routes.post("/f/{token}")
async def link_rating(request: Request, token: str) -> Response:
    """Rate the answer of a link: {"kind": …, "value": …} as JSON, or a form with `value` 1 or −1.

    404 for a link that was not signed here, 410 for one that has expired, 422 for what is no feedback.
    """
    service = service_of(request)
    as_json = request.headers.get("content-type", "").partition(";")[0].strip() == "application/json"
    try:
        stored, source = await _linked(request, token)
        raw = await request.body()
        body: dict[str, Any]
        if as_json:
            try:
                given = json.loads(raw)
                json.dumps(given, ensure_ascii=False).encode()
            except (ValueError, RecursionError):
                raise ApiError(400, "the body is no JSON", code="invalid_json") from None
            if not isinstance(given, dict):
                raise ApiError(422, 'the body is an object such as {"kind": "thumb", "value": 1}')
            if given.keys() & {"completion_id", "source"}:
                raise ApiError(422, "a link is for one answer and one source; leave completion_id and source out")
            body = {"completion_id": stored.id} | given
        else:
            given = dict(parse_qsl(raw.decode("utf-8", "replace")))
            if given.get("value") not in ("1", "-1"):
                raise ApiError(422, "value is 1 or -1", param="value")
            body = {"completion_id": stored.id, "kind": "thumb", "value": int(given["value"])}
        _check_tags(body)
        receipt = await record(service, body, stored, source, "link")
    except ApiError as error:
        if as_json:
            raise
        return _link_html(f"<p>{html.escape(error.message)}.</p>", error.status)
    if as_json:
        return JSONResponse(receipt)
    return _link_html("<h1>Thank you</h1><p>Your rating is recorded, and the model learns from it.</p>")


def _check_tags(body: dict[str, Any]) -> None:
    tags = body.get("tags")
    if tags is not None and not (
        isinstance(tags, dict) and len(tags) <= 16 and all(isinstance(value, str) for value in tags.values())
    ):
        raise ApiError(422, "tags is an object of at most 16 texts", param="tags")
