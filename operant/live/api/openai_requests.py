"""Requests of OpenAI's API, read: prompts and settings for the sampler, and feedback.

An argument that the server cannot honour is refused by name. Nothing that would change the answer is silently ignored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BeforeValidator, Field, ValidationInfo

from operant.data.text import Codec
from operant.live.api.asking import (
    AnswerRequest,
    ChatMessage,
    check_stops,
    content_id,
    content_text,
    parse_sampling,
    refuse,
)
from operant.live.api.service import ApiError, RequestBody, Service, StrictModel
from operant.types import Ints, Prompt, Sampling

__all__ = [
    "ChatRequest", "CompletionRequest", "Message", "MetadataUpdate", "TextRequest", "completion_sampling",
    "rating_bodies", "refuse_unsupported", "text_prompts", "turns_of",
]  # fmt: skip

MAX_CHOICES = 128
MAX_PROMPTS = 64


def _message_text(value: Any, info: ValidationInfo) -> Any:
    """The text of a content. An assistant's may be null: it has said nothing, as before a call that it made."""
    return "" if value is None and info.data.get("role") == "assistant" else content_text(value)


class Message(StrictModel):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_message_text)] = Field(None, validate_default=True)
    name: str | None = None
    refusal: None = None
    annotations: list[Any] | None = None  # what an answer of OpenAI's client carries when it is sent back
    audio: None = None
    tool_calls: list[Any] | None = Field(None, max_length=0)
    function_call: None = None
    completion_id: str | None = None


class MetadataUpdate(RequestBody):
    """What replaces the metadata of a stored chat."""

    metadata: dict[str, str] | None = Field(...)


class StreamOptions(StrictModel):
    """What a stream holds beside the answer."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class CompletionRequest(AnswerRequest):
    """What both kinds of request have."""

    max_tokens: int | None = Field(None, ge=1, le=1 << 20)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stop: str | list[str] | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, max_length=256)
    metadata: dict[str, str] | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    # of these the answer does not depend on the value: accepted, so that clients which always send them work
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: str | None = None


class ChatRequest(CompletionRequest):
    """An answer to a chat."""

    messages: list[Message] = Field(min_length=1, max_length=2048)
    max_completion_tokens: int | None = Field(None, ge=1, le=1 << 20)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    prompt_cache_retention: str | None = None
    verbosity: str | None = None
    # read only to be refused by name
    tools: list[Any] | None = None
    tool_choice: Any = None
    functions: list[Any] | None = None
    function_call: Any = None
    response_format: Any = None
    modalities: list[Any] | None = None
    audio: Any = None
    prediction: Any = None
    web_search_options: Any = None


class TextRequest(CompletionRequest):
    """A continuation of texts, or of token ids."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=5)
    best_of: int | None = Field(None, ge=1)
    echo: bool | None = None
    suffix: str | None = None


# --- what cannot be honoured ------------------------------------------------------------------------------------------


def refuse_unsupported(request: CompletionRequest) -> None:
    """Raises ApiError 400 with the name of what this server cannot do."""
    for name in ("frequency_penalty", "presence_penalty"):
        if getattr(request, name):
            refuse(name, "answers are drawn from the model's own distribution; leave it out or give 0")
    if isinstance(request, ChatRequest):
        for name in ("tools", "functions"):
            if getattr(request, name):
                refuse(name, "the models served here call no tools; leave it out")
        for name in ("tool_choice", "function_call"):
            if getattr(request, name) not in (None, "none", "auto"):
                refuse(name, "the models served here call no tools; leave it out")
        if request.response_format is not None and request.response_format != {"type": "text"}:
            refuse("response_format", 'nothing makes the answer follow a format; leave it out or give {"type": "text"}')
        if request.modalities is not None and request.modalities != ["text"]:
            refuse("modalities", 'answers are text; leave it out or give ["text"]')
        for name in ("audio", "prediction", "web_search_options"):
            if getattr(request, name) is not None:
                refuse(name, "leave it out")
        if request.top_logprobs and not request.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs", code="invalid_value")
    if isinstance(request, TextRequest):
        if request.echo:
            refuse("echo", "the prompt is not sent back; leave it out")
        if request.suffix:
            refuse("suffix", "text is written forwards only; leave it out")
        if request.best_of is not None and request.best_of != (request.n or 1):
            refuse("best_of", "all that is written is returned; give n, and the same best_of or none")
    if request.stream_options is not None and not request.stream:
        raise ApiError(
            400, "stream_options is for streaming; give stream: true", param="stream_options", code="invalid_value"
        )


def rating_bodies(completion_id: str, metadata: dict[str, str]) -> list[dict[str, Any]]:
    """The feedback in a stored completion's metadata: {"feedback": "up", "down" or a score}, {"score": "0.7"},
    {"edit": …}, {"comment": …}; each as the body of a native call. Raises ApiError 422 for a score that is no number.
    """
    events: list[dict[str, Any]] = []
    for name in ("feedback", "score"):
        given = metadata.get(name)
        if given is None:
            continue
        if name == "feedback" and given in ("up", "down"):
            events.append({"completion_id": completion_id, "kind": "thumb", "value": 1 if given == "up" else -1})
            continue
        try:
            value = float(given)
        except ValueError:
            words = '"up", "down" or a number' if name == "feedback" else "a number"
            raise ApiError(422, f"{name} is {given[:40]!r}; give {words}", param=f"metadata.{name}") from None
        events.append({"completion_id": completion_id, "kind": "score", "value": value})
    events += [
        {"completion_id": completion_id, "kind": name, "value": metadata[name]}
        for name in ("edit", "comment") if name in metadata
    ]  # fmt: skip
    return events


# --- what the sampler is asked ----------------------------------------------------------------------------------------


def completion_sampling(request: CompletionRequest, service: Service, default_max: int) -> Sampling:
    """`parse_sampling` of a completion.

    default_max: tokens of an answer when the request does not say.
    Raises ApiError 400 for stop strings or a logit_bias that cannot be honoured.
    """
    limit = getattr(request, "max_completion_tokens", None) or request.max_tokens or default_max
    banned = _banned(request.logit_bias or {}, service.codec.vocab_size)
    return parse_sampling(request, service, limit, stops=check_stops(request.stop), banned=banned)


def _banned(bias: dict[str, float], vocab_size: int) -> tuple[int, ...]:
    """The tokens that `logit_bias` bans, which is all that it can do here."""
    banned = []
    for name, value in bias.items():
        if not (name.isascii() and name.isdigit() and len(name) < 10 and int(name) < vocab_size):
            raise ApiError(
                400, f"logit_bias names tokens by their ids, 0 to {vocab_size - 1}; {name[:20]!r} is none",
                param="logit_bias", code="invalid_value",
            )  # fmt: skip
        if value == -100:
            banned.append(int(name))
        elif value != 0:
            raise ApiError(
                400, "logit_bias can only ban tokens (-100); other values cannot be honoured",
                param="logit_bias", code="unsupported_parameter",
            )  # fmt: skip
    if len(banned) >= vocab_size:
        raise ApiError(400, "logit_bias bans every token", param="logit_bias", code="invalid_value")
    return tuple(sorted(banned))


def turns_of(messages: Sequence[Message]) -> list[ChatMessage]:
    """Messages as a chat template reads them."""
    return [
        {"role": "system" if message.role == "developer" else message.role, "content": message.content}
        for message in messages
    ]


def text_prompts(request: TextRequest, codec: Codec, *, encoder: bool, route: str = "") -> list[Prompt]:
    """The prompts of a text completion: texts exactly as given, or token ids.

    Raises ApiError 400 for too many prompts, or token ids that there are not.
    """
    given = request.prompt
    if isinstance(given, str):
        several: list[Any] = [given]
    elif given and isinstance(given[0], int):
        several = [given]
    else:
        several = list(given)
    if not 1 <= len(several) <= MAX_PROMPTS:
        raise ApiError(400, f"prompt is 1 to {MAX_PROMPTS} texts", param="prompt", code="invalid_value")
    prompts = []
    for one in several:
        if isinstance(one, str):
            tokens, text = codec.encode_prompt(one, encoder=encoder), one
        else:
            tokens, text = _given_tokens(one, codec), codec.decode(one)
        prompts.append(Prompt(id=content_id(one), tokens=tokens, text=text, task=route))
    return prompts


def _given_tokens(ids: Sequence[int], codec: Codec) -> Ints:
    if not ids or not all(0 <= i < codec.vocab_size for i in ids):
        raise ApiError(
            400, f"a prompt of token ids has at least one, each from 0 to {codec.vocab_size - 1}",
            param="prompt", code="invalid_value",
        )  # fmt: skip
    return np.asarray(ids, np.int64)
