"""The routes of OpenAI's API: chat and text completions, models, stored completions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from operant.live.api.generation import Choice, Generation
from operant.live.api.intake import record
from operant.live.api.openai_replies import (
    ChatForm,
    Chunks,
    TextForm,
    render_answer,
    render_model,
    render_stored_chat,
    server_sent_event,
)
from operant.live.api.openai_requests import (
    ChatRequest,
    CompletionRequest,
    MetadataUpdate,
    TextRequest,
    chat_prompt,
    check_metadata,
    parse_sampling,
    rating_bodies,
    refuse_unsupported,
    text_prompts,
)
from operant.live.api.service import ApiError, GenerationRequest, Service, caller_of, new_id, service_of
from operant.live.serving.access import Caller, is_reserved
from operant.live.storage.store import StoredCompletion

__all__ = ["routes"]

routes = APIRouter(prefix="/v1")

TEXT_MAX_TOKENS = 16  # what a text completion has when it does not say, as OpenAI's
EVENT_STREAM = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


@routes.post("/chat/completions")
async def chat_completions(request: Request, body: ChatRequest) -> Response:
    """Answer a chat. Choices carry `completion_id`, by which they are rated."""
    service, caller = service_of(request), caller_of(request, "chat")
    metadata = _check_request(service, caller, body)
    codec = service.codec
    _admit(service, caller, body, body.n or 1)
    prompt = chat_prompt(body.messages, codec, service.written, route=metadata.get("route", ""))
    wanted = GenerationRequest(
        parse_sampling(body, service, service.config.max_tokens), caller.name, body.user or caller.name, "chat",
        body.model, body.n or 1, metadata, stored=body.store is not False, streamed=bool(body.stream),
        top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )  # fmt: skip
    generation = Generation(service, new_id("chatcmpl"), wanted)
    await generation.begin([prompt])
    return await _respond(request, generation, body, ChatForm(codec))


@routes.post("/completions")
async def text_completions(request: Request, body: TextRequest) -> Response:
    """Go on with texts, or token ids, exactly as they are given."""
    service, caller = service_of(request), caller_of(request, "chat")
    metadata = _check_request(service, caller, body)
    codec = service.codec
    prompts = text_prompts(body, codec, encoder=service.encoder, route=metadata.get("route", ""))
    _admit(service, caller, body, len(prompts) * (body.n or 1))
    wanted = GenerationRequest(
        parse_sampling(body, service, TEXT_MAX_TOKENS), caller.name, body.user or caller.name, "text",
        body.model, body.n or 1, metadata, stored=body.store is not False, streamed=bool(body.stream),
        top_logprobs=body.logprobs,
    )  # fmt: skip
    generation = Generation(service, new_id("cmpl"), wanted)
    await generation.begin(prompts)
    return await _respond(request, generation, body, TextForm(codec))


def _check_request(service: Service, caller: Caller, body: CompletionRequest) -> dict[str, str]:
    """What can be said without looking at the prompt; the request's metadata. Raises ApiError for what is refused."""
    if body.model not in (service.name, "default"):
        raise ApiError(
            404, f"the model {body.model[:100]!r} does not exist; there is {service.name!r}, also called 'default'",
            param="model", code="model_not_found",
        )  # fmt: skip
    if body.user and body.user != caller.name and is_reserved(body.user):
        raise ApiError(
            400, "user names what the server rates by itself; give the name of somebody", param="user",
            code="reserved_name",
        )  # fmt: skip
    refuse_unsupported(body)
    return check_metadata(body.metadata)


def _admit(service: Service, caller: Caller, body: CompletionRequest, answers: int) -> None:
    """Count answers against the rate of the key, and of the user that it names. An operator's key asks for others."""
    names = [] if caller.may("operate") else [caller.name]
    if body.user and body.user != caller.name:
        names.append(f"{caller.name}/{body.user}")
    service.admit("chat", *names, cost=answers)


# --- sending an answer ------------------------------------------------------------------------------------------------


async def _respond(
    request: Request, generation: Generation, body: CompletionRequest, form: ChatForm | TextForm
) -> Response:
    if body.stream:
        usage = bool(body.stream_options and body.stream_options.include_usage)
        return StreamingResponse(
            _stream(generation, Chunks(request, generation, form, usage), usage), media_type="text/event-stream",
            headers=EVENT_STREAM,
        )  # fmt: skip
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
    return JSONResponse(render_answer(request, generation, form))


async def _wait_until_gone(request: Request) -> None:
    """Returns when the client has gone away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _refuse_cut_off(choices: Sequence[Choice]) -> None:
    if any(choice.completion is None or choice.completion.stop_reason == "cancelled" for choice in choices):
        raise ApiError(
            503, "the answer was cut off, as the server is stopping; what there is of it is recorded", code="stopping"
        )


async def _stream(generation: Generation, chunks: Chunks, usage: bool) -> AsyncIterator[bytes]:
    try:
        for choice in generation.choices:
            yield chunks.opening(choice)
        async for piece in generation.pieces():
            tokens = [piece.token] if piece.token is not None else []
            if piece.text or (tokens and generation.request.top_logprobs is not None):
                yield chunks.piece(piece.choice, piece.text, tokens)
            if piece.done:
                _refuse_cut_off([piece.choice])
                yield chunks.closing(piece.choice)
        if usage:
            yield chunks.usage()
        yield b"data: [DONE]\n\n"
    except ApiError as error:
        yield server_sent_event(error.body)
    finally:
        generation.abandon()


# --- models -----------------------------------------------------------------------------------------------------------


@routes.get("/models")
async def models(request: Request) -> dict[str, Any]:
    """The model that is served, under its own name and as `default`."""
    service = service_of(request)
    names = dict.fromkeys((service.name, "default"))
    return {"object": "list", "data": [render_model(service, name) for name in names]}


@routes.get("/models/{name:path}")
async def model(request: Request, name: str) -> dict[str, Any]:
    """One of these. 404 for another name."""
    service = service_of(request)
    if name not in (service.name, "default"):
        raise ApiError(404, f"the model {name[:100]!r} does not exist", param="model", code="model_not_found")
    return render_model(service, name)


# --- stored completions -----------------------------------------------------------------------------------------------


@routes.get("/chat/completions")
async def stored_completions(
    request: Request,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "asc",
    model: str | None = None,
) -> dict[str, Any]:
    """The stored chats of this key, those with `metadata[name]=value` when that is asked for."""
    service, caller = service_of(request), caller_of(request, "chat")
    wanted = {
        name[len("metadata[") : -1]: value
        for name, value in request.query_params.items()
        if name.startswith("metadata[") and name.endswith("]")
    }
    if after is not None:
        await _readable_chat(service, caller, after)
    found: list[StoredCompletion] = []
    if model in (None, service.name, "default"):
        place = after
        while len(found) <= limit:
            rows = await service.io(
                service.store.list_completions, place, limit + 1, wanted or None, order, prefix="chatcmpl-"
            )
            found += [row for row in rows if _is_first(row) and _may_read(caller, row)]
            if len(rows) <= limit:
                break
            place = rows[-1].id
    data = [await _render_stored(service, request, row) for row in found[:limit]]
    ids = [row["id"] for row in data]
    return {
        "object": "list", "data": data, "first_id": ids[0] if ids else None, "last_id": ids[-1] if ids else None,
        "has_more": len(found) > limit,
    }  # fmt: skip


@routes.get("/chat/completions/{completion_id}")
async def stored_completion(request: Request, completion_id: str) -> dict[str, Any]:
    """One of these. 404 for one that there is not, or that is another's."""
    service, caller = service_of(request), caller_of(request, "chat")
    return await _render_stored(service, request, await _readable_chat(service, caller, completion_id))


@routes.get("/chat/completions/{completion_id}/messages")
async def stored_messages(
    request: Request,
    completion_id: str,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "asc",
) -> dict[str, Any]:
    """What was asked. 404 for a chat that there is not, or that is another's, and for an unknown `after`."""
    service, caller = service_of(request), caller_of(request, "chat")
    stored = await _readable_chat(service, caller, completion_id)
    rows = [{"id": f"{completion_id}-{i}", **m, "name": None} for i, m in enumerate(stored.prompt.messages or ())]
    if order == "desc":
        rows.reverse()
    ids = [row["id"] for row in rows]
    if after is not None:
        if after not in ids:
            raise ApiError(404, f"there is no message {after[:100]!r}", param="after")
        rows = rows[ids.index(after) + 1 :]
    page = rows[:limit]
    return {
        "object": "list", "data": page, "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None, "has_more": len(rows) > limit,
    }  # fmt: skip


@routes.post("/chat/completions/{completion_id}")
async def update_completion(request: Request, completion_id: str, update: MetadataUpdate) -> dict[str, Any]:
    """Replace the metadata. Entries named feedback, score, edit and comment rate the answer."""
    service, caller = service_of(request), caller_of(request, "chat")
    metadata = check_metadata(update.metadata)
    stored = await _readable_chat(service, caller, completion_id)
    events = rating_bodies(completion_id, metadata)
    if events:
        caller_of(request, "rate")
    receipts = [await record(service, body, stored, caller.name, "metadata") for body in events]
    await service.io(service.store.set_metadata, completion_id, metadata)
    reply = await _render_stored(service, request, await _readable_chat(service, caller, completion_id))
    if receipts:
        reply["operant"]["feedback"] = [receipt["id"] for receipt in receipts]
    return reply


@routes.delete("/chat/completions/{completion_id}")
async def delete_completion(request: Request, completion_id: str) -> dict[str, Any]:
    """Empty a stored chat for good. What a version has learned from it is not unlearned by this."""
    service, caller = service_of(request), caller_of(request, "chat")
    stored = await _readable_chat(service, caller, completion_id)
    for name in _choice_ids(stored):
        await service.io(service.store.delete, name)
    return {"id": completion_id, "object": "chat.completion.deleted", "deleted": True}


async def _readable_chat(service: Service, caller: Caller, completion_id: str) -> StoredCompletion:
    """A stored chat that the caller may read. Another's is as unknown as one that there is not."""
    stored = None
    if completion_id.startswith("chatcmpl-") and completion_id.isprintable():
        stored = await service.io(service.store.completion, completion_id)
    if stored is None or not _may_read(caller, stored):
        raise ApiError(404, f"there is no stored completion {completion_id[:100]!r}", code="not_found")
    return stored


def _may_read(caller: Caller, stored: StoredCompletion) -> bool:
    return caller.may("operate") or stored.request.get("owner") == caller.name


def _is_first(stored: StoredCompletion) -> bool:
    return not stored.request.get("choice")


def _choice_ids(stored: StoredCompletion) -> list[str]:
    """The ids of all choices of the response that this is the first of; a later choice stands for itself."""
    if not _is_first(stored):
        return [stored.id]
    return [stored.id, *(f"{stored.id}.{i}" for i in range(1, int(stored.request.get("choices", 1))))]


async def _render_stored(service: Service, request: Request, stored: StoredCompletion) -> dict[str, Any]:
    others = [await service.io(service.store.completion, name) for name in _choice_ids(stored)[1:]]
    return render_stored_chat(service, request, [stored, *(other for other in others if other is not None)])
