"""The routes of OpenAI's API: chat and text completions, models, stored completions."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import Field

from operant.data.text import Codec
from operant.live.api.feedback_api import from_metadata, record
from operant.live.api.generation import Ask, Choice, Generation
from operant.live.api.openai_api import (
    Asked,
    ChatRequest,
    CompletionRequest,
    TextRequest,
    chat_prompt,
    check_metadata,
    refuse_unsupported,
    sampling_of,
    text_prompts,
)
from operant.live.api.service import ApiError, Service, caller_of, new_id, service_of
from operant.live.serving.access import Caller
from operant.live.storage.store import StoredCompletion
from operant.types import Completion, TokenInfo

__all__ = ["routes"]

routes = APIRouter(prefix="/v1")

TEXT_MAX_TOKENS = 16  # what a text completion has when it does not say, as OpenAI's
EVENT_STREAM = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
_FINISH = {"eos": "stop", "stop": "stop", "reward": "stop", "length": "length"}


@routes.post("/chat/completions")
async def chat_completions(request: Request, asked: ChatRequest) -> Response:
    """Answer a chat. Choices carry `completion_id`, by which they are rated."""
    service, caller = service_of(request), caller_of(request, "chat")
    metadata = _check(service, asked)
    _admit(service, caller, asked, asked.n or 1)
    config, codec = service.config, service.codec
    prompt = chat_prompt(
        asked.messages, codec, encoder=service.encoder, prefix=config.prefix, separator=config.separator,
        route=metadata.get("route", ""),
    )  # fmt: skip
    generation = Generation(
        service, new_id("chatcmpl"), sampling_of(asked, config.max_tokens, codec.vocab_size),
        user=asked.user or caller.name, owner=caller.name, stored=asked.store is not False,
        request=_kept(asked, "chat"), metadata=metadata, streamed=bool(asked.stream),
        top_logprobs=(asked.top_logprobs or 0) if asked.logprobs else None,
    )  # fmt: skip
    await generation.begin([Ask(prompt, asked.n or 1)])
    if service.implicit is not None and generation.stored:
        service.implicit.continued(generation, asked.messages)
    return await _respond(request, generation, asked, Chat(codec))


@routes.post("/completions")
async def text_completions(request: Request, asked: TextRequest) -> Response:
    """Go on with texts, or token ids, exactly as they are given."""
    service, caller = service_of(request), caller_of(request, "chat")
    metadata = _check(service, asked)
    codec = service.codec
    prompts = text_prompts(asked, codec, encoder=service.encoder, route=metadata.get("route", ""))
    _admit(service, caller, asked, len(prompts) * (asked.n or 1))
    generation = Generation(
        service, new_id("cmpl"), sampling_of(asked, TEXT_MAX_TOKENS, codec.vocab_size),
        user=asked.user or caller.name, owner=caller.name, stored=asked.store is not False,
        request=_kept(asked, "text"), metadata=metadata, streamed=bool(asked.stream), top_logprobs=asked.logprobs,
    )  # fmt: skip
    await generation.begin([Ask(prompt, asked.n or 1) for prompt in prompts])
    return await _respond(request, generation, asked, Text(codec))


def _check(service: Service, asked: CompletionRequest) -> dict[str, str]:
    """What can be said without looking at the prompt; the request's metadata."""
    if asked.model not in (service.name, "default"):
        raise ApiError(
            404, f"the model {asked.model[:100]!r} does not exist; there is {service.name!r}, also called 'default'",
            param="model", code="model_not_found",
        )  # fmt: skip
    refuse_unsupported(asked)
    return check_metadata(asked.metadata)


def _admit(service: Service, caller: Caller, asked: CompletionRequest, answers: int) -> None:
    """Count answers against the rate of the key, and of the user that it names. An operator's key asks for others."""
    names = [] if caller.may("operate") else [caller.name]
    if asked.user and asked.user != caller.name:
        names.append(f"{caller.name}/{asked.user}")
    service.admit("chat", *names, cost=answers)


def _kept(asked: CompletionRequest, kind: str) -> dict[str, Any]:
    """What of a request is stored beside its prompt and its sampling."""
    return {"kind": kind, "model": asked.model, "n": asked.n or 1}


# --- what an answer looks like ----------------------------------------------------------------------------------------


class Chat:
    """The forms of a chat completion."""

    whole, part = "chat.completion", "chat.completion.chunk"

    def __init__(self, codec: Codec) -> None:
        self.codec = codec

    def opening(self) -> dict[str, Any]:
        return {"delta": {"role": "assistant", "content": "", "refusal": None}, "logprobs": None}

    def piece(self, text: str, tokens: Sequence[TokenInfo], start: int, logprobs: int | None) -> dict[str, Any]:
        return {"delta": {"content": text}, "logprobs": self.logprobs(tokens, logprobs)}

    def closing(self) -> dict[str, Any]:
        return {"delta": {}, "logprobs": None}

    def choice(self, text: str, tokens: Sequence[TokenInfo], logprobs: int | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"message": message, "logprobs": self.logprobs(tokens, logprobs)}

    def logprobs(self, tokens: Sequence[TokenInfo], wanted: int | None) -> dict[str, Any] | None:
        """Of the model itself: at temperature 1 and with nothing cut off."""
        if wanted is None:
            return None
        content = [
            self._token(token.token, token.model_logprob)
            | {"top_logprobs": [self._token(other, logprob) for other, logprob in token.alternatives[:wanted]]}
            for token in tokens if self.codec.is_text(token.token)
        ]  # fmt: skip
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.codec.token_bytes(token)
        return {"token": text.decode("utf-8", "replace"), "logprob": _finite(logprob), "bytes": list(text)}


class Text:
    """The forms of a text completion."""

    whole = part = "text_completion"

    def __init__(self, codec: Codec) -> None:
        self.codec = codec

    def opening(self) -> dict[str, Any]:
        return {"text": "", "logprobs": None}

    def piece(self, text: str, tokens: Sequence[TokenInfo], start: int, logprobs: int | None) -> dict[str, Any]:
        return {"text": text, "logprobs": self.logprobs(tokens, logprobs, start)}

    def closing(self) -> dict[str, Any]:
        return {"text": "", "logprobs": None}

    def choice(self, text: str, tokens: Sequence[TokenInfo], logprobs: int | None) -> dict[str, Any]:
        return self.piece(text, tokens, 0, logprobs)

    def logprobs(self, tokens: Sequence[TokenInfo], wanted: int | None, start: int) -> dict[str, Any] | None:
        if wanted is None:
            return None
        told: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        at = start
        for token in tokens:
            if not self.codec.is_text(token.token):
                continue
            told["tokens"].append(self._name(token.token))
            told["token_logprobs"].append(_finite(token.model_logprob))
            told["top_logprobs"].append(
                {self._name(other): _finite(logprob) for other, logprob in token.alternatives[:wanted]}
            )
            told["text_offset"].append(at)
            at += len(token.text)
        return told

    def _name(self, token: int) -> str:
        """A token's text; one that is a part of a character is spelled as OpenAI spells it, so that names differ."""
        text = self.codec.token_bytes(token)
        try:
            return text.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in text)


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else -9999.0  # as OpenAI tells what cannot be drawn


def _usage(prompt_tokens: int, completions: Sequence[Completion | None]) -> dict[str, int]:
    written = sum(len(c.tokens) for c in completions if c is not None)
    return {
        "prompt_tokens": prompt_tokens, "completion_tokens": written, "total_tokens": prompt_tokens + written
    }  # fmt: skip


def _usage_of(generation: Generation) -> dict[str, int]:
    asked = {id(choice.prompt): len(choice.prompt.tokens) for choice in generation.choices}
    return _usage(sum(asked.values()), [choice.completion for choice in generation.choices])


def feedback_url(service: Service, request: Request, completion_id: str, source: str) -> str:
    """A link by which a browser can rate this answer without a key."""
    base = service.config.public_url or str(request.base_url)
    return f"{base.rstrip('/')}/f/{service.links.sign(completion_id, source)}"


def _head(request: Request, generation: Generation, kind: str) -> dict[str, Any]:
    service = generation.service
    return {
        "id": generation.id, "object": kind, "created": int(generation.created), "model": service.name,
        "system_fingerprint": f"version-{generation.version}",
    }  # fmt: skip


def _about(request: Request, generation: Generation, version: int | None = None) -> dict[str, Any]:
    told: dict[str, Any] = {"version": generation.version if version is None else version}
    if generation.stored:
        told["feedback_url"] = feedback_url(generation.service, request, generation.id, generation.owner)
    return {"operant": told}


async def _respond(request: Request, generation: Generation, asked: CompletionRequest, form: Chat | Text) -> Response:
    if asked.stream:
        include_usage = bool(asked.stream_options and asked.stream_options.include_usage)
        return StreamingResponse(
            _stream(request, generation, form, include_usage), media_type="text/event-stream", headers=EVENT_STREAM
        )
    writing = asyncio.ensure_future(generation.all())
    leaving = asyncio.ensure_future(_gone(request))
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
    _check_whole(choices)
    rows = [
        {"index": choice.index, "completion_id": choice.id, "finish_reason": _finish(choice)}
        | form.choice(choice.completion.text if choice.completion else "", choice.tokens, generation.top_logprobs)
        for choice in choices
    ]
    return JSONResponse(
        _head(request, generation, form.whole)
        | {"choices": rows, "usage": _usage_of(generation)}
        | _about(request, generation, _version(choices[0]))
    )


async def _gone(request: Request) -> None:
    """Returns when the client has gone away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _check_whole(choices: Sequence[Choice]) -> None:
    if any(choice.completion is None or choice.completion.stop_reason == "cancelled" for choice in choices):
        raise ApiError(
            503, "the answer was cut off, as the server is stopping; what there is of it is recorded", code="stopping"
        )


def _version(choice: Choice) -> int | None:
    """The version that wrote the last token, which is all of them unless one left the memory meanwhile."""
    completion = choice.completion
    if completion is None or completion.policy_version is None or not len(completion.tokens):
        return None
    return int(completion.policy_version[-1])


def _finish(choice: Choice) -> str | None:
    return _FINISH.get(choice.completion.stop_reason) if choice.completion is not None else None


async def _stream(
    request: Request, generation: Generation, form: Chat | Text, include_usage: bool
) -> AsyncIterator[bytes]:
    head = _head(request, generation, form.part)
    usage: dict[str, Any] = {"usage": None} if include_usage else {}

    def chunk(choice: Choice, rest: dict[str, Any], finish: str | None = None, **more: Any) -> bytes:
        row = {"index": choice.index, "completion_id": choice.id, "finish_reason": finish} | rest
        return _event(head | {"choices": [row]} | usage | more)

    try:
        for choice in generation.choices:
            yield chunk(choice, form.opening(), **_about(request, generation))
        starts = [0] * len(generation.choices)
        async for piece in generation.pieces():
            choice = piece.choice
            tokens = [piece.token] if piece.token is not None else []
            if piece.text or (tokens and generation.top_logprobs is not None):
                yield chunk(choice, form.piece(piece.text, tokens, starts[choice.index], generation.top_logprobs))
                starts[choice.index] += len(piece.text)
            if piece.done:
                _check_whole([choice])
                yield chunk(choice, form.closing(), _finish(choice), operant={"version": _version(choice)})
        if include_usage:
            yield _event(head | {"choices": [], "usage": _usage_of(generation)})
        yield b"data: [DONE]\n\n"
    except ApiError as error:
        yield _event(error.body)
    finally:
        generation.abandon()


def _event(content: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n".encode("utf-8", "replace")


# --- models -----------------------------------------------------------------------------------------------------------


@routes.get("/models")
async def models(request: Request) -> dict[str, Any]:
    """The model that is served, under its own name and as `default`."""
    service = service_of(request)
    return {"object": "list", "data": [_model(service, name) for name in dict.fromkeys((service.name, "default"))]}


@routes.get("/models/{name:path}")
async def model(request: Request, name: str) -> dict[str, Any]:
    service = service_of(request)
    if name not in (service.name, "default"):
        raise ApiError(404, f"the model {name[:100]!r} does not exist", param="model", code="model_not_found")
    return _model(service, name)


def _model(service: Service, name: str) -> dict[str, Any]:
    return {
        "id": name, "object": "model", "created": int(service.started), "owned_by": "operant",
        "operant": {
            "version": service.version, "max_length": service.max_length,
            "scores": [service.config.score_low, service.config.score_high],
            "conversation": bool(service.codec.tokenizer.chat_template),  # without: every question stands alone
        },
    }  # fmt: skip


# --- stored completions -----------------------------------------------------------------------------------------------


class MetadataUpdate(Asked):
    metadata: dict[str, str] | None = Field(...)


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
        await _stored(service, caller, after)
    found: list[StoredCompletion] = []
    if model in (None, service.name, "default"):
        place = after
        while len(found) <= limit:
            rows = await service.io(
                service.store.list_completions, place, limit + 1, wanted or None, order, prefix="chatcmpl-"
            )
            found += [row for row in rows if _is_whole(row) and _may_read(caller, row)]
            if len(rows) <= limit:
                break
            place = rows[-1].id
    data = [await _whole(service, request, row) for row in found[:limit]]
    ids = [row["id"] for row in data]
    return {
        "object": "list", "data": data, "first_id": ids[0] if ids else None, "last_id": ids[-1] if ids else None,
        "has_more": len(found) > limit,
    }  # fmt: skip


@routes.get("/chat/completions/{completion_id}")
async def stored_completion(request: Request, completion_id: str) -> dict[str, Any]:
    service, caller = service_of(request), caller_of(request, "chat")
    return await _whole(service, request, await _stored(service, caller, completion_id))


@routes.get("/chat/completions/{completion_id}/messages")
async def stored_messages(
    request: Request,
    completion_id: str,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "asc",
) -> dict[str, Any]:
    """What was asked."""
    service, caller = service_of(request), caller_of(request, "chat")
    stored = await _stored(service, caller, completion_id)
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
    stored = await _stored(service, caller, completion_id)
    events = from_metadata(completion_id, metadata)
    if events:
        caller_of(request, "rate")
    receipts = [await record(service, body, stored, caller.name, "metadata") for body in events]
    await service.io(service.store.set_metadata, completion_id, metadata)
    told = await _whole(service, request, await _stored(service, caller, completion_id))
    if receipts:
        told["operant"]["feedback"] = [receipt["id"] for receipt in receipts]
    return told


@routes.delete("/chat/completions/{completion_id}")
async def delete_completion(request: Request, completion_id: str) -> dict[str, Any]:
    """Empty a stored chat for good. What a version has learned from it is not unlearned by this."""
    service, caller = service_of(request), caller_of(request, "chat")
    stored = await _stored(service, caller, completion_id)
    for name in _names(stored):
        await service.io(service.store.delete, name)
    return {"id": completion_id, "object": "chat.completion.deleted", "deleted": True}


async def _stored(service: Service, caller: Caller, completion_id: str) -> StoredCompletion:
    """A stored chat that the caller may read. Another's is as unknown as one that there is not."""
    stored = None
    if completion_id.startswith("chatcmpl-") and completion_id.isprintable():
        stored = await service.io(service.store.completion, completion_id)
    if stored is None or not _may_read(caller, stored):
        raise ApiError(404, f"there is no stored completion {completion_id[:100]!r}", code="not_found")
    return stored


def _may_read(caller: Caller, stored: StoredCompletion) -> bool:
    return caller.may("operate") or stored.request.get("owner") == caller.name


def _is_whole(stored: StoredCompletion) -> bool:
    return not stored.request.get("choice")


def _names(stored: StoredCompletion) -> list[str]:
    """The ids of all choices of the response that this is the first of; a later choice stands for itself."""
    if not _is_whole(stored):
        return [stored.id]
    return [stored.id, *(f"{stored.id}.{i}" for i in range(1, int(stored.request.get("choices", 1))))]


async def _whole(service: Service, request: Request, stored: StoredCompletion) -> dict[str, Any]:
    """A stored chat as it was answered."""
    others = [await service.io(service.store.completion, name) for name in _names(stored)[1:]]
    rows = [stored, *(other for other in others if other is not None)]
    choices = [
        {
            "index": row.request.get("choice", 0), "completion_id": row.id, "logprobs": None,
            "finish_reason": _FINISH.get(row.completion.stop_reason) if row.completion is not None else None,
            "message": {
                "role": "assistant", "refusal": None,
                "content": row.completion.text if row.completion is not None else None,
            },
        }
        for row in rows
    ]  # fmt: skip
    sampling = stored.completion.sampling if stored.completion is not None else None
    return {
        "id": stored.id, "object": "chat.completion", "created": int(stored.created), "model": service.name,
        "choices": choices, "usage": _usage(len(stored.prompt.tokens), [row.completion for row in rows]),
        "metadata": stored.metadata, "request_id": stored.id, "input_user": stored.user, "tools": None,
        "tool_choice": None, "response_format": None, "service_tier": "default",
        "temperature": sampling.temperature if sampling else None, "top_p": sampling.top_p if sampling else None,
        "seed": sampling.seed if sampling else None, "presence_penalty": 0.0, "frequency_penalty": 0.0,
        "operant": {
            "status": stored.status, "version": stored.model_version,
            "feedback_url": feedback_url(service, request, stored.id, stored.request.get("owner", "")),
        },
    }  # fmt: skip
