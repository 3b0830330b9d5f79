"""What requests for answers have in common, whichever API they are of: how to draw, and a chat as a prompt that fits.

An argument that the server cannot honour is refused by name. Nothing that would change the answer is silently ignored.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import secrets
from collections.abc import Sequence
from typing import Any, NoReturn

from pydantic import Field

from operant.live.api.service import ApiError, RequestBody, Service
from operant.types import OperantError, Prompt, Sampling

__all__ = [
    "AnswerRequest", "ChatMessage", "chat_prompt", "check_metadata", "check_stops", "content_id", "content_text",
    "parse_sampling", "refuse",
]  # fmt: skip

GREEDY_BELOW = 1e-3  # a temperature under this is greedy decoding in every digit, and would overflow the logits
MAX_STOPS = 16
ANSWER_SHARE = 4  # a chat is cut so that an answer has what it asks for, and no more than a quarter of the context

ChatMessage = dict[str, str]  # role and content, as a chat template reads them


class AnswerRequest(RequestBody):
    """What a request for answers has in every API. top_k, seed and store are extensions where an API lacks them."""

    model: str
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=1 << 20)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    stream: bool | None = None
    store: bool | None = None


def refuse(name: str, why: str) -> NoReturn:
    """Raises ApiError 400 for a parameter that this server cannot honour."""
    raise ApiError(400, f"{name} cannot be honoured: {why}", param=name, code="unsupported_parameter")


def content_text(value: Any, kinds: Sequence[str] = ("text",)) -> Any:
    """The text of a message's content, which may also come as a list of parts of these kinds.

    Raises ValueError for no content, and for a part that is no text.
    """
    if value is None:
        raise ValueError("a message needs content, a text")
    if not isinstance(value, list):
        return value
    example = f'{{"type": "{kinds[0]}", "text": "Hello"}}'
    texts = []
    for part in value:
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise ValueError(f"a part of a message is an object such as {example}")
        if part["type"] not in kinds:
            raise ValueError(f"this model reads text; it cannot read a part of type {part['type'][:40]!r}")
        if not isinstance(part.get("text"), str):
            raise ValueError(f"a text part needs its text, as in {example}")
        texts.append(part["text"])
    return "".join(texts)


def check_metadata(metadata: dict[str, str] | None) -> dict[str, str]:
    """OpenAI's limits: 16 pairs, keys of 64 and values of 512 characters. Raises ApiError 400 beyond."""
    given = dict(metadata or {})
    if len(given) > 16:
        raise ApiError(400, f"metadata has {len(given)} entries; at most 16 are kept", param="metadata")
    for name, value in given.items():
        if len(name) > 64 or len(value) > 512:
            raise ApiError(
                400, f"metadata {name[:64]!r} is too long: names have at most 64 characters, values 512",
                param="metadata",
            )  # fmt: skip
    return given


# --- what the sampler is asked ----------------------------------------------------------------------------------------


def check_stops(given: str | Sequence[str] | None, name: str = "stop") -> tuple[str, ...]:
    """The stop strings of a request, each once. name: as the API calls them. Raises ApiError 400 for too many or long
    ones."""
    stops = [given] if isinstance(given, str) else list(given or [])
    if len(stops) > MAX_STOPS or not all(0 < len(stop) <= 256 for stop in stops):
        raise ApiError(
            400, f"{name} is at most {MAX_STOPS} strings of 1 to 256 characters", param=name, code="invalid_value"
        )
    return tuple(dict.fromkeys(stops))


def parse_sampling(
    request: AnswerRequest,
    service: Service,
    max_tokens: int,
    *,
    stops: tuple[str, ...] = (),
    banned: tuple[int, ...] = (),
) -> Sampling:
    """The request's settings, and where it says nothing the server's, or else the model's own (`Generation.settings`).
    Without a seed one is drawn, so that what was sampled can always be sampled again.

    max_tokens: of an answer. stops: from `check_stops`. banned: tokens that are never drawn.
    """
    config = service.config
    asked = (("temperature", request.temperature), ("top_p", request.top_p), ("top_k", request.top_k))
    given: Any = [getattr(config, name) if value is None else value for name, value in asked]
    temperature, top_p, top_k = service.generation.settings(*given, chat=service.written.style(service.codec).chat)
    return Sampling(
        temperature=temperature if temperature >= GREEDY_BELOW else 0.0,
        top_p=top_p,
        top_k=top_k,
        max_tokens=max_tokens,
        stop=stops,
        banned=banned,
        seed=secrets.randbits(53) if request.seed is None else request.seed,
    )


# --- a chat as a prompt -----------------------------------------------------------------------------------------------


def chat_prompt(
    chat: Sequence[ChatMessage],
    service: Service,
    max_tokens: int,
    *,
    route: str = "",
    cut: bool | None = None,
    field: str = "messages",
) -> tuple[Prompt, int]:
    """The prompt of a chat, written as fine-tuning saw prompts, and how many of its messages were left out of it.

    It is written through the chat template, or, where there is none, as the contents joined by newlines between prefix
    and separator. A chat that is longer than the context loses its oldest turns: system messages at its begin stay,
    what follows them begins with a user's message, and an answer finds room for `max_tokens` or a quarter of the
    context. Where even the last turn leaves less, it has what there is. A chat of which no turn can go is left whole,
    and so is one that is not to be cut; the engine refuses it where it does not fit.

    cut: whether to leave turns out; None is as the server's settings say. field: where the chat stands in the request.
    Raises ApiError 400 for a chat that the template refuses.
    """
    messages = list(chat)

    def write(part: list[ChatMessage]) -> Prompt:
        try:
            return _write(part, service, route)
        except OperantError as error:
            raise ApiError(400, str(error), param=field, code="invalid_value") from error

    whole = write(messages)
    if cut is None:
        cut = service.config.long_chats == "cut"
    holds = service.max_length - (not service.encoder)  # an encoder's prompt shares its room with no answer
    most = (
        holds if service.encoder else service.max_length - min(max_tokens, max(1, service.max_length // ANSWER_SHARE))
    )
    if not cut or len(whole.tokens) <= most:
        return whole, 0
    head = next((i for i, one in enumerate(messages) if one["role"] != "system"), len(messages))
    starts = [i for i in range(head + 1, len(messages)) if messages[i]["role"] == "user"]
    prompts: dict[int, Prompt] = {}

    def length(start: int) -> int:
        if start not in prompts:
            prompts[start] = write(messages[:head] + messages[start:])
        return len(prompts[start].tokens)

    for limit in (most,) if len(whole.tokens) <= holds else (most, holds):
        place = bisect.bisect_left(starts, True, key=lambda start: length(start) <= limit)
        if place < len(starts):
            return prompts[starts[place]], starts[place] - head
    return whole, 0


def _write(messages: list[ChatMessage], service: Service, route: str) -> Prompt:
    codec, written = service.codec, service.written
    style = written.style(codec)
    if style.chat:
        tokens, text = written.encode_chat(messages, codec), codec.chat_text(messages, style=style).text
    else:
        contents = "\n".join(message["content"] for message in messages)
        tokens = written.encode(contents, codec)
        text = f"{style.prefix}{contents}{'' if written.encoder else style.separator}"
    return Prompt(id=content_id(messages), tokens=tokens, text=text, messages=tuple(messages), task=route)


def content_id(content: Any) -> str:
    """16 hexadecimal digits of the content's SHA-256: the same prompt and seed give the same text."""
    return hashlib.sha256(json.dumps(content, ensure_ascii=True, sort_keys=True).encode()).hexdigest()[:16]
