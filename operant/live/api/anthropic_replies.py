"""The replies of Anthropic's Messages API: an answer whole and as events, and the model."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Sequence
from typing import Any

from fastapi import Request

from operant.live.api.answering import (
    last_version,
    model_part,
    operant_part,
    prompt_tokens,
    server_sent_event,
    tokens_written,
)
from operant.live.api.generation import Choice, Generation
from operant.live.api.service import ApiError, Service, anthropic_error_body
from operant.types import Completion, TokenInfo

__all__ = ["PREFIX", "MessageReply", "render_anthropic_model"]

PREFIX = "msg_"  # of the ids of messages
_STOP = {"eos": "end_turn", "stop": "stop_sequence", "reward": "end_turn", "length": "max_tokens"}


class MessageReply:
    """The answer of a request in the form of the Messages API (`answering.Reply`)."""

    def __init__(self, request: Request, generation: Generation) -> None:
        self._request, self._generation = request, generation

    def whole(self) -> dict[str, Any]:
        """The message."""
        completion = self._generation.choices[0].completion
        assert completion is not None
        return self._message(completion) | {"content": [{"type": "text", "text": completion.text}]}

    def opening(self) -> Iterable[bytes]:
        """The message without its text, and its one block."""
        yield _event("message_start", message=self._message(None))
        yield _event("content_block_start", index=0, content_block={"type": "text", "text": ""})

    def piece(self, choice: Choice, text: str, tokens: Sequence[TokenInfo]) -> Iterable[bytes]:
        """More of the text."""
        return [_event("content_block_delta", index=0, delta={"type": "text_delta", "text": text})]

    def closing(self, choice: Choice) -> Iterable[bytes]:
        """The end of the block, and why it ended there."""
        message = self._message(choice.completion)
        yield _event("content_block_stop", index=0)
        yield _event(
            "message_delta", delta={name: message[name] for name in ("stop_reason", "stop_sequence")},
            usage=message["usage"], operant={"version": message["operant"]["version"]},
        )  # fmt: skip
        yield _event("message_stop")

    def ending(self) -> Iterable[bytes]:
        """Nothing: the one message has ended."""
        return []

    def fault(self, error: ApiError) -> Iterable[bytes]:
        """The error as the clients look for it."""
        return [server_sent_event(anthropic_error_body(error.status, error.message), "error")]

    def _message(self, completion: Completion | None) -> dict[str, Any]:
        """The message without its content; None is one under way."""
        generation = self._generation
        return {
            "id": generation.id, "type": "message", "role": "assistant", "model": generation.service.name,
            "content": [], "stop_reason": None if completion is None else _STOP.get(completion.stop_reason),
            "stop_sequence": None if completion is None else self._stop_sequence(completion),
            "usage": {
                "input_tokens": prompt_tokens(generation), "output_tokens": tokens_written([completion]),
                "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0,
            },
            "operant": operant_part(self._request, generation, last_version(completion)),
        }  # fmt: skip

    def _stop_sequence(self, completion: Completion) -> str | None:
        """The stop string that ended an answer. Its tokens are in the record, and its text is not."""
        if completion.stop_reason != "stop" or completion.sampling is None:
            return None
        written = self._generation.service.codec.decode(completion.tokens)[len(completion.text) :]
        return next((stop for stop in completion.sampling.stop if written.startswith(stop)), None)


def render_anthropic_model(service: Service, name: str) -> dict[str, Any]:
    """The model that is served, under one of its names, in Anthropic's form."""
    created = datetime.datetime.fromtimestamp(int(service.started), datetime.UTC)
    return {
        "type": "model", "id": name, "display_name": name, "created_at": created.isoformat().replace("+00:00", "Z"),
        "lifecycle": "active", "max_input_tokens": service.max_length, "max_tokens": service.max_length,
        "operant": model_part(service),
    }  # fmt: skip


def _event(name: str, **content: Any) -> bytes:
    return server_sent_event({"type": name} | content, name)
