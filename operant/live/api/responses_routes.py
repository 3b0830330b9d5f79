"""The routes of OpenAI's Responses API: answers, stored answers, and what they were asked with."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response
from pydantic import BeforeValidator, Field

from operant.live.api.answering import admit, check_model, check_user, page_of, readable, respond
from operant.live.api.asking import (
    AnswerRequest,
    ChatMessage,
    chat_prompt,
    check_metadata,
    content_text,
    parse_sampling,
    refuse,
)
from operant.live.api.generation import Generation
from operant.live.api.responses_replies import PREFIX, ResponseReply, render_stored_response
from operant.live.api.service import ApiError, GenerationRequest, Service, StrictModel, caller_of, new_id, service_of
from operant.live.serving.access import Caller
from operant.live.storage.store import StoredCompletion

__all__ = ["routes"]

routes = APIRouter(prefix="/v1/responses")

LOGPROBS = "message.output_text.logprobs"
# what else may be included is of tools and of reasoning, of which there is nothing here to include
INCLUDABLE = (
    LOGPROBS, "code_interpreter_call.outputs", "computer_call_output.output.image_url", "file_search_call.results",
    "message.input_image.image_url", "reasoning.encrypted_content", "web_search_call.action.sources",
    "web_search_call.results",
)  # fmt: skip


# --- what is asked ----------------------------------------------------------------------------------------------------


def _as_items(value: Any) -> Any:
    """A text is the user's one message."""
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


def _known_item(value: Any) -> Any:
    kind = value.get("type", "message") if isinstance(value, dict) else "message"
    if kind != "message":
        raise ValueError(f"this server reads messages; it cannot read an item of type {str(kind)[:40]!r}")
    return value


class InputMessage(StrictModel):
    """One turn of the input. id, status and phase are what an answer carries when it is sent back."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(lambda value: content_text(value, ("input_text", "output_text")))]
    type: Literal["message"] = "message"
    id: str | None = None
    status: str | None = None
    phase: str | None = None


class TextSettings(StrictModel):
    """How the text of an answer is written."""

    format: Any = None
    verbosity: str | None = None


class StreamOptions(StrictModel):
    """What a stream holds beside the answer."""

    include_obfuscation: bool | None = None


class ResponseRequest(AnswerRequest):
    """An answer to a text or to a chat."""

    input: Annotated[list[Annotated[InputMessage, BeforeValidator(_known_item)]], BeforeValidator(_as_items)] = Field(
        min_length=1
    )
    instructions: str | None = None
    previous_response_id: str | None = None
    max_output_tokens: int | None = Field(None, ge=1, le=1 << 20)
    truncation: Literal["auto", "disabled"] | None = None
    include: list[str] | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    user: str | None = Field(None, max_length=256)
    metadata: dict[str, str] | None = None
    stream_options: StreamOptions | None = None
    # of these the answer does not depend on the value: accepted, so that clients which always send them work
    parallel_tool_calls: bool | None = None
    max_tool_calls: int | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: Any = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    # read only to be refused by name where they ask for something
    background: bool | None = None
    context_management: Any = None
    conversation: Any = None
    image: Any = None
    moderation: Any = None
    prompt: Any = None
    reasoning: dict[str, Any] | None = None
    text: TextSettings | None = None
    tool_choice: Any = None
    tools: list[Any] | None = None


def _refuse_unsupported(body: ResponseRequest) -> None:
    """Raises ApiError 400 with the name of what this server cannot do."""
    if body.tools:
        refuse("tools", "the models served here call no tools; leave it out")
    if body.tool_choice not in (None, "none", "auto"):
        refuse("tool_choice", "the models served here call no tools; leave it out")
    if body.background:
        refuse("background", "an answer is written while its request waits; leave it out or give false")
    if body.conversation is not None:
        refuse("conversation", "chats go on by previous_response_id, or with all their turns as input")
    for name in ("context_management", "image", "moderation", "prompt"):
        if getattr(body, name) is not None:
            refuse(name, "leave it out")
    if body.text is not None and body.text.format not in (None, {"type": "text"}):
        refuse("text.format", 'nothing makes the answer follow a format; leave it out or give {"type": "text"}')
    for name, value in (body.reasoning or {}).items():
        if name != "effort" and value is not None:
            refuse(
                f"reasoning.{name}", "the models served here have no reasoning apart from their answer; leave it out"
            )
    for name in body.include or ():
        if name not in INCLUDABLE:
            refuse("include", f"there is no {name[:60]!r}")
    if body.top_logprobs and LOGPROBS not in (body.include or ()):
        raise ApiError(400, f'top_logprobs needs include: ["{LOGPROBS}"]', param="top_logprobs", code="invalid_value")
    if body.stream_options is not None and not body.stream:
        raise ApiError(
            400, "stream_options is for streaming; give stream: true", param="stream_options", code="invalid_value"
        )


def _turns_of(body: ResponseRequest, earlier: list[ChatMessage]) -> list[ChatMessage]:
    """The whole chat: the instructions, what was said before, and the input."""
    begin = [{"role": "system", "content": body.instructions}] if body.instructions else []
    return [*begin, *earlier] + [
        {"role": "system" if one.role == "developer" else one.role, "content": one.content} for one in body.input
    ]


# --- answers ----------------------------------------------------------------------------------------------------------


@routes.post("")
async def create_response(request: Request, body: ResponseRequest) -> Response:
    """Answer a text or a chat. The response's id is the one by which the answer is rated."""
    service, caller = service_of(request), caller_of(request, "chat")
    check_model(service, body.model)
    check_user(caller, body.user)
    _refuse_unsupported(body)
    metadata = check_metadata(body.metadata)
    admit(service, caller, body.user)
    earlier = await _earlier_turns(service, caller, body.previous_response_id)
    sampling = parse_sampling(body, service, body.max_output_tokens or service.config.max_tokens)
    cut = None if body.truncation is None else body.truncation == "auto"
    prompt, cut_messages = chat_prompt(
        _turns_of(body, earlier),
        service,
        sampling.max_tokens,
        route=metadata.get("route", ""),
        cut=cut,
        field="input",
    )
    kept = {
        "instructions": bool(body.instructions), "previous_response_id": body.previous_response_id,
        "max_output_tokens": body.max_output_tokens, "top_logprobs": body.top_logprobs or 0,
        "truncation": body.truncation or ("auto" if service.config.long_chats == "cut" else "disabled"),
    }  # fmt: skip
    wanted = GenerationRequest(
        sampling, caller.name, body.user or caller.name, "response", body.model, 1, metadata,
        stored=body.store is not False, streamed=bool(body.stream), cut_messages=cut_messages, kept=kept,
        top_logprobs=(body.top_logprobs or 0) if LOGPROBS in (body.include or ()) else None,
    )  # fmt: skip
    generation = Generation(service, new_id(PREFIX), wanted)
    await generation.begin([prompt])
    return await respond(request, generation, ResponseReply(request, generation))


async def _earlier_turns(service: Service, caller: Caller, previous: str | None) -> list[ChatMessage]:
    """The chat that ended with an earlier response, without the instructions of that one, as OpenAI has it.

    Raises ApiError 400 for a response that is not stored, is another's, or is not written.
    """
    if previous is None:
        return []
    stored = await readable(service, caller, previous, PREFIX)
    if stored is None or stored.prompt.messages is None:
        raise ApiError(
            400, f"there is no stored response {previous[:100]!r} to go on from; send all turns as input",
            param="previous_response_id", code="previous_response_not_found",
        )  # fmt: skip
    if stored.completion is None or stored.status == "failed":
        raise ApiError(
            400, f"the response {previous[:100]!r} is not written; send all turns as input",
            param="previous_response_id", code="previous_response_not_found",
        )  # fmt: skip
    return [*_input_of(stored), {"role": "assistant", "content": stored.completion.text}]


def _input_of(stored: StoredCompletion) -> list[dict[str, Any]]:
    """The messages that a response was asked with, without its instructions."""
    messages = list(stored.prompt.messages or ())
    return messages[1:] if stored.request.get("instructions") else messages


# --- stored answers ---------------------------------------------------------------------------------------------------


@routes.get("/{response_id}")
async def stored_response(request: Request, response_id: str, stream: bool = False) -> dict[str, Any]:
    """One of these. 404 for one that there is not, or that is another's; 400 for a stream of what is written."""
    service, caller = service_of(request), caller_of(request, "chat")
    if stream:
        refuse("stream", "a stored response is sent whole; leave it out")
    return render_stored_response(service, request, await _readable_response(service, caller, response_id))


@routes.get("/{response_id}/input_items")
async def input_items(
    request: Request,
    response_id: str,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> dict[str, Any]:
    """What was asked. 404 for a response that there is not, or that is another's, and for an unknown `after`."""
    service, caller = service_of(request), caller_of(request, "chat")
    stored = await _readable_response(service, caller, response_id)
    rows = [
        {
            "id": f"{response_id}-{i}", "type": "message", "role": one["role"], "status": "completed",
            "content": [
                {"type": "output_text" if one["role"] == "assistant" else "input_text", "text": one["content"]}
            ],
        }
        for i, one in enumerate(_input_of(stored))
    ]  # fmt: skip
    return page_of(rows, after, limit, order)


@routes.delete("/{response_id}")
async def delete_response(request: Request, response_id: str) -> dict[str, Any]:
    """Empty a stored response for good. What a version has learned from it is not unlearned by this."""
    service, caller = service_of(request), caller_of(request, "chat")
    stored = await _readable_response(service, caller, response_id)
    await service.io(service.store.delete, stored.id)
    return {"id": stored.id, "object": "response", "deleted": True}


async def _readable_response(service: Service, caller: Caller, response_id: str) -> StoredCompletion:
    """A stored response that the caller may read. Raises ApiError 404 for any other."""
    stored = await readable(service, caller, response_id, PREFIX)
    if stored is None:
        raise ApiError(404, f"there is no stored response {response_id[:100]!r}", code="not_found")
    return stored
