"""From a generation to the response that a client gets, in the words of whichever API it speaks.

The checks that every request for answers passes stand here too. Values without a field in a vendor's objects stand
under `operant`; the headers `X-Operant-Version`, `X-Operant-Completion` and, for a chat that was cut, `X-Operant-Cut`
say the same of every answer, streamed or not.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any, Literal, Protocol

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from operant.live.api.generation import Choice, Generation
from operant.live.api.service import ApiError, Service
from operant.live.serving.access import Caller, is_reserved
from operant.live.storage.store import StoredCompletion
from operant.types import Completion, TokenInfo

__all__ = [
    "Reply", "admit", "check_model", "check_user", "choice_ids", "feedback_url", "last_version", "may_read",
    "model_part", "operant_part", "page_of", "prompt_tokens", "readable", "respond", "server_sent_event",
    "tokens_written",
]  # fmt: skip

EVENT_STREAM = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


# --- who asks, and for what -------------------------------------------------------------------------------------------


def check_model(service: Service, name: str) -> None:
    """Raises ApiError 404 for a model that is not served here."""
    if name not in (service.name, "default"):
        raise ApiError(
            404, f"the model {name[:100]!r} does not exist; there is {service.name!r}, also called 'default'",
            param="model", code="model_not_found",
        )  # fmt: skip


def check_user(caller: Caller, user: str | None, field: str = "user") -> None:
    """Raises ApiError 400 for a request in the name of what the server rates by itself. field: of the name."""
    if user and user != caller.name and is_reserved(user):
        raise ApiError(
            400, f"{field} names what the server rates by itself; give the name of somebody", param=field,
            code="reserved_name",
        )  # fmt: skip


def admit(service: Service, caller: Caller, user: str | None, answers: int = 1) -> None:
    """Count answers against the rate of the key, and of the user that it names. An operator's key asks for others."""
    names = [] if caller.may("operate") else [caller.name]
    if user and user != caller.name:
        names.append(f"{caller.name}/{user}")
    service.admit("chat", *names, cost=answers)


# --- sending an answer ------------------------------------------------------------------------------------------------


class Reply(Protocol):
    """How an API writes the answers of one generation: whole, or as server-sent events."""

    def whole(self) -> dict[str, Any]:
        """The response, when all choices are written."""

    def opening(self) -> Iterable[bytes]:
        """The events before the first text."""

    def piece(self, choice: Choice, text: str, tokens: Sequence[TokenInfo]) -> Iterable[bytes]:
        """The text that follows what was sent of the choice, and the tokens that brought it."""

    def closing(self, choice: Choice) -> Iterable[bytes]:
        """The events of a choice that is written."""

    def ending(self) -> Iterable[bytes]:
        """The last events of all."""

    def fault(self, error: ApiError) -> Iterable[bytes]:
        """What ends a stream that cannot go on."""


async def respond(request: Request, generation: Generation, reply: Reply) -> Response:
    """The response to a request whose generation has begun; a client that goes away frees its rows.

    Raises ApiError when an answer that was to be sent whole fails or is cut off.
    """
    if generation.request.streamed:
        headers = EVENT_STREAM | _headers(generation, generation.version)
        return StreamingResponse(_stream(generation, reply), media_type="text/event-stream", headers=headers)
    writing = asyncio.ensure_future(generation.all())
    leaving = asyncio.ensure_future(_wait_until_gone(request))
    try:
        await asyncio.wait({writing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not writing.done():
            generation.abandon()
        choices = await writing
    finally:
        leaving.cancel()
        if not writing.done():
            generation.abandon()
            writing.cancel()
    _refuse_cut_off(choices)
    return JSONResponse(reply.whole(), headers=_headers(generation, last_version(choices[0].completion)))


def _headers(generation: Generation, version: int | None) -> dict[str, str]:
    headers = {
        "X-Operant-Version": str(generation.version if version is None else version),
        "X-Operant-Completion": generation.id,
    }
    if generation.request.cut_messages:
        headers["X-Operant-Cut"] = str(generation.request.cut_messages)
    return headers


async def _wait_until_gone(request: Request) -> None:
    """Returns when the client has gone away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _refuse_cut_off(choices: Sequence[Choice]) -> None:
    if any(choice.completion is None or choice.completion.stop_reason == "cancelled" for choice in choices):
        raise ApiError(
            503, "the answer was cut off, as the server is stopping; what there is of it is recorded", code="stopping"
        )


async def _stream(generation: Generation, reply: Reply) -> AsyncIterator[bytes]:
    try:
        for event in reply.opening():
            yield event
        async for piece in generation.pieces():
            tokens = [piece.token] if piece.token is not None else []
            if piece.text or (tokens and generation.request.top_logprobs is not None):
                for event in reply.piece(piece.choice, piece.text, tokens):
                    yield event
            if piece.done:
                _refuse_cut_off([piece.choice])
                for event in reply.closing(piece.choice):
                    yield event
        for event in reply.ending():
            yield event
    except ApiError as error:
        for event in reply.fault(error):
            yield event
    finally:
        generation.abandon()


def server_sent_event(content: dict[str, Any], name: str = "") -> bytes:
    """One event of a stream, with its name if it has one."""
    event = f"event: {name}\n" if name else ""
    return f"{event}data: {json.dumps(content, ensure_ascii=False)}\n\n".encode("utf-8", "replace")


# --- what every API says of an answer ---------------------------------------------------------------------------------


def operant_part(request: Request, generation: Generation, version: int | None = None) -> dict[str, Any]:
    """What an answer says beside the vendor's fields: its version, how to rate it, what was left out of the chat.

    version: the one that wrote it; None is the one that it began with.
    """
    asked = generation.request
    part: dict[str, Any] = {"version": generation.version if version is None else version}
    if asked.stored:
        part["feedback_url"] = feedback_url(generation.service, request, generation.id, asked.owner)
    if asked.cut_messages:
        part["cut_messages"] = asked.cut_messages
        part["warning"] = (
            f"the chat is longer than the model's context: its oldest {asked.cut_messages} messages were left out"
        )
    return part


def model_part(service: Service) -> dict[str, Any]:
    """What the model's own entry says beside the vendor's fields. base: what version 0 was made from."""
    return {
        "version": service.version, "base": service.base or None, "max_length": service.max_length,
        "scores": [service.config.score_low, service.config.score_high],
        "conversation": service.written.style(service.codec).chat,  # without: every question stands alone
    }  # fmt: skip


def feedback_url(service: Service, request: Request, completion_id: str, source: str) -> str:
    """A link by which a browser can rate this answer without a key."""
    base = service.config.public_url or str(request.base_url)
    return f"{base.rstrip('/')}/f/{service.links.sign(completion_id, source)}"


def last_version(completion: Completion | None) -> int | None:
    """The version that wrote the last token, which is all of them unless one left the memory meanwhile."""
    if completion is None or completion.policy_version is None or not len(completion.tokens):
        return None
    return int(completion.policy_version[-1])


def prompt_tokens(generation: Generation) -> int:
    """Tokens of the prompts, each counted once."""
    return sum({id(choice.prompt): len(choice.prompt.tokens) for choice in generation.choices}.values())


def tokens_written(completions: Iterable[Completion | None]) -> int:
    """Tokens of these answers."""
    return sum(len(one.tokens) for one in completions if one is not None)


# --- stored answers ---------------------------------------------------------------------------------------------------


async def readable(service: Service, caller: Caller, completion_id: str, prefix: str) -> StoredCompletion | None:
    """The stored answer of this id, which begins with `prefix`, if the caller may read it. Another's is as unknown as
    one that there is not."""
    if not (completion_id.startswith(prefix) and completion_id.isprintable()):
        return None
    stored = await service.io(service.store.completion, completion_id)
    return stored if stored is not None and may_read(caller, stored) else None


def may_read(caller: Caller, stored: StoredCompletion) -> bool:
    """Whether a stored answer is the caller's own, or the caller an operator."""
    return caller.may("operate") or stored.request.get("owner") == caller.name


def choice_ids(stored: StoredCompletion) -> list[str]:
    """The ids of all choices of the response that this is the first of; a later choice stands for itself."""
    if stored.request.get("choice"):
        return [stored.id]
    return [stored.id, *(f"{stored.id}.{i}" for i in range(1, int(stored.request.get("choices", 1))))]


def page_of(rows: list[dict[str, Any]], after: str | None, limit: int, order: Literal["asc", "desc"]) -> dict[str, Any]:
    """A page of a short list, as OpenAI's clients go through it. Raises ApiError 404 for an unknown `after`."""
    rows = rows if order == "asc" else rows[::-1]
    ids = [row["id"] for row in rows]
    if after is not None:
        if after not in ids:
            raise ApiError(404, f"there is no {after[:100]!r} in this list", param="after")
        rows = rows[ids.index(after) + 1 :]
    page = rows[:limit]
    return {
        "object": "list", "data": page, "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None, "has_more": len(rows) > limit,
    }  # fmt: skip
