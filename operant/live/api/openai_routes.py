"""The routes of OpenAI's API: chat and text completions, models, stored completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from operant.live.api.answering import admit, check_model, check_user, choice_ids, may_read, page_of, readable, respond
from operant.live.api.anthropic_replies import render_anthropic_model
from operant.live.api.asking import chat_prompt, check_metadata
from operant.live.api.generation import Generation
from operant.live.api.intake import record
from operant.live.api.openai_replies import (
    ChatForm,
    CompletionReply,
    TextForm,
    render_model,
    render_stored_chat,
)
from operant.live.api.openai_requests import (
    ChatRequest,
    CompletionRequest,
    MetadataUpdate,
    TextRequest,
    completion_sampling,
    rating_bodies,
    refuse_unsupported,
    text_prompts,
    turns_of,
)
from operant.live.api.service import (
    ApiError,
    GenerationRequest,
    Service,
    caller_of,
    new_id,
    service_of,
    speaks_anthropic,
)
from operant.live.serving.access import Caller
from operant.live.storage.store import StoredCompletion

__all__ = ["routes"]

routes = APIRouter(prefix="/v1")

TEXT_MAX_TOKENS = 16  # what a text completion has when it does not say, as OpenAI's


@routes.post("/chat/completions")
async def chat_completions(request: Request, body: ChatRequest) -> Response:
    """Answer a chat. Choices carry `completion_id`, by which they are rated."""
    service, caller = service_of(request), caller_of(request, "chat")
    metadata = _check_request(service, caller, body)
    admit(service, caller, body.user, body.n or 1)
    sampling = completion_sampling(body, service, service.config.max_tokens)
    prompt, cut = chat_prompt(
        turns_of(body.messages), service, sampling.max_tokens, route=metadata.get("route", "")
    )  # fmt: skip
    wanted = GenerationRequest(
        sampling, caller.name, body.user or caller.name, "chat", body.model, body.n or 1, metadata,
        stored=body.store is not False, streamed=bool(body.stream), cut_messages=cut,
        top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )  # fmt: skip
    generation = Generation(service, new_id("chatcmpl-"), wanted)
    await generation.begin([prompt])
    return await respond(request, generation, _reply(request, generation, body, ChatForm(service.codec)))


@routes.post("/completions")
async def text_completions(request: Request, body: TextRequest) -> Response:
    """Go on with texts, or token ids, exactly as they are given."""
    service, caller = service_of(request), caller_of(request, "chat")
    metadata = _check_request(service, caller, body)
    prompts = text_prompts(body, service.codec, encoder=service.encoder, route=metadata.get("route", ""))
    admit(service, caller, body.user, len(prompts) * (body.n or 1))
    wanted = GenerationRequest(
        completion_sampling(body, service, TEXT_MAX_TOKENS), caller.name, body.user or caller.name, "text",
        body.model, body.n or 1, metadata, stored=body.store is not False, streamed=bool(body.stream),
        top_logprobs=body.logprobs,
    )  # fmt: skip
    generation = Generation(service, new_id("cmpl-"), wanted)
    await generation.begin(prompts)
    return await respond(request, generation, _reply(request, generation, body, TextForm(service.codec)))


def _check_request(service: Service, caller: Caller, body: CompletionRequest) -> dict[str, str]:
    """What can be said without looking at the prompt; the request's metadata. Raises ApiError for what is refused."""
    check_model(service, body.model)
    check_user(caller, body.user)
    refuse_unsupported(body)
    return check_metadata(body.metadata)


def _reply(
    request: Request, generation: Generation, body: CompletionRequest, form: ChatForm | TextForm
) -> CompletionReply:
    return CompletionReply(request, generation, form, bool(body.stream_options and body.stream_options.include_usage))


# --- models -----------------------------------------------------------------------------------------------------------


@routes.get("/models")
async def models(request: Request) -> dict[str, Any]:
    """The model that is served, under its own name and as `default`; to Anthropic's clients in their form."""
    service = service_of(request)
    data = [_render_model(request, service, name) for name in dict.fromkeys((service.name, "default"))]
    if not speaks_anthropic(request.scope):
        return {"object": "list", "data": data}
    return {"data": data, "has_more": False, "first_id": data[0]["id"], "last_id": data[-1]["id"]}


@routes.get("/models/{name:path}")
async def model(request: Request, name: str) -> dict[str, Any]:
    """One of these. 404 for another name."""
    service = service_of(request)
    check_model(service, name)
    return _render_model(request, service, name)


def _render_model(request: Request, service: Service, name: str) -> dict[str, Any]:
    render = render_anthropic_model if speaks_anthropic(request.scope) else render_model
    return render(service, name)


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
            found += [row for row in rows if not row.request.get("choice") and may_read(caller, row)]
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
    return page_of(rows, after, limit, order)


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
    for name in choice_ids(stored):
        await service.io(service.store.delete, name)
    return {"id": completion_id, "object": "chat.completion.deleted", "deleted": True}


async def _readable_chat(service: Service, caller: Caller, completion_id: str) -> StoredCompletion:
    """A stored chat that the caller may read. Raises ApiError 404 for any other."""
    stored = await readable(service, caller, completion_id, "chatcmpl-")
    if stored is None:
        raise ApiError(404, f"there is no stored completion {completion_id[:100]!r}", code="not_found")
    return stored


async def _render_stored(service: Service, request: Request, stored: StoredCompletion) -> dict[str, Any]:
    others = [await service.io(service.store.completion, name) for name in choice_ids(stored)[1:]]
    return render_stored_chat(service, request, [stored, *(other for other in others if other is not None)])
