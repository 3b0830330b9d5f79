"""The replies of OpenAI's Responses API: an answer whole, as events, and as it is stored."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastapi import Request

from operant.live.api.answering import (
    feedback_url,
    last_version,
    operant_part,
    server_sent_event,
    tokens_written,
)
from operant.live.api.generation import Choice, Generation
from operant.live.api.openai_replies import token_logprobs
from operant.live.api.service import ApiError, Service
from operant.live.storage.store import StoredCompletion
from operant.types import Completion, Prompt, Sampling, TokenInfo

__all__ = ["PREFIX", "ResponseReply", "render_stored_response"]

PREFIX = "resp_"  # of the ids of responses


class ResponseReply:
    """The answer of a request in the form of the Responses API (`answering.Reply`)."""

    def __init__(self, request: Request, generation: Generation) -> None:
        self._request, self._generation = request, generation
        self._choice = generation.choices[0]
        self._item = _item_id(generation.id)
        self._place = {"item_id": self._item, "output_index": 0, "content_index": 0}
        self._count = 0

    def whole(self) -> dict[str, Any]:
        """The response object."""
        return self._response(self._choice.completion)

    def opening(self) -> Iterable[bytes]:
        """The response, its one message and the text part of it, all empty."""
        begun = self._response(None)
        yield self._event("response.created", response=begun)
        yield self._event("response.in_progress", response=begun)
        message = _message(self._item, "in_progress", [])
        yield self._event("response.output_item.added", output_index=0, item=message)
        yield self._event("response.content_part.added", **self._place, part=_text_part("", []))

    def piece(self, choice: Choice, text: str, tokens: Sequence[TokenInfo]) -> Iterable[bytes]:
        """More of the text."""
        return [
            self._event("response.output_text.delta", **self._place, delta=text, logprobs=self._logprobs(tokens) or [])
        ]

    def closing(self, choice: Choice) -> Iterable[bytes]:
        """The end of the text, of the message and of the response."""
        completion = choice.completion
        assert completion is not None
        response = self._response(completion)
        (message,) = response["output"]
        (part,) = message["content"]
        logprobs = part.get("logprobs", [])
        yield self._event("response.output_text.done", **self._place, text=completion.text, logprobs=logprobs)
        yield self._event("response.content_part.done", **self._place, part=part)
        yield self._event("response.output_item.done", output_index=0, item=message)
        yield self._event(f"response.{response['status']}", response=response)

    def ending(self) -> Iterable[bytes]:
        """Nothing: the response itself was the end."""
        return []

    def fault(self, error: ApiError) -> Iterable[bytes]:
        """The response, failed."""
        failed = self._response(None) | {
            "status": "failed", "error": {"code": "server_error", "message": error.message},
        }  # fmt: skip
        return [self._event("response.failed", response=failed)]

    def _event(self, name: str, **content: Any) -> bytes:
        event = server_sent_event({"type": name, "sequence_number": self._count} | content, name)
        self._count += 1
        return event

    def _response(self, completion: Completion | None) -> dict[str, Any]:
        """The response object of an answer; None is one under way."""
        generation = self._generation
        asked, service, now = generation.request, generation.service, int(time.time())
        logprobs = self._logprobs(self._choice.tokens)
        response = _render(
            service, generation.id, self._choice.prompt, completion, asked.sampling, asked.kept, logprobs
        )
        return response | {
            "created_at": int(generation.created), "completed_at": now if response["status"] == "completed" else None,
            "store": asked.stored, "metadata": dict(asked.metadata),
            "user": asked.user if asked.user != asked.owner else None,
            "operant": operant_part(self._request, generation, last_version(completion)),
        }  # fmt: skip

    def _logprobs(self, tokens: Sequence[TokenInfo]) -> list[dict[str, Any]] | None:
        wanted = self._generation.request.top_logprobs
        return None if wanted is None else token_logprobs(self._generation.service.codec, tokens, wanted)


def render_stored_response(service: Service, request: Request, stored: StoredCompletion) -> dict[str, Any]:
    """A stored response as it was answered."""
    completion, owner = stored.completion, stored.request.get("owner", "")
    sampling = completion.sampling if completion is not None else None
    response = _render(service, stored.id, stored.prompt, completion, sampling, stored.request, None) | {
        "created_at": int(stored.created), "store": True, "metadata": stored.metadata,
        "user": stored.user if stored.user != owner else None,
        "operant": {
            "status": stored.status, "version": stored.model_version,
            "feedback_url": feedback_url(service, request, stored.id, owner),
        },
    }  # fmt: skip
    if stored.status == "failed":
        response |= {"status": "failed", "error": {"code": "server_error", "message": "the answer was not written"}}
    return response


def _render(
    service: Service,
    id: str,
    prompt: Prompt,
    completion: Completion | None,
    sampling: Sampling | None,
    kept: Mapping[str, Any],
    logprobs: list[dict[str, Any]] | None,
) -> dict[str, Any]:
    """What a response says of its prompt and its answer, None while that is not written. kept: of its request."""
    status, output, usage, reason = "in_progress", [], None, None
    if completion is not None:
        reason = {"length": "max_output_tokens"}.get(completion.stop_reason)
        cut_off = reason is not None or completion.stop_reason == "cancelled"
        status = "incomplete" if cut_off else "completed"
        output = [_message(_item_id(id), status, [_text_part(completion.text, logprobs)])]
        usage = _usage(len(prompt.tokens), tokens_written([completion]))
    first = prompt.messages[0]["content"] if prompt.messages and kept.get("instructions") else None
    return {
        "id": id, "object": "response", "status": status, "background": False, "completed_at": None, "error": None,
        "incomplete_details": {"reason": reason} if reason else None, "instructions": first,
        "max_output_tokens": kept.get("max_output_tokens"), "max_tool_calls": None, "model": service.name,
        "output": output, "parallel_tool_calls": True, "previous_response_id": kept.get("previous_response_id"),
        "reasoning": {"effort": None, "summary": None}, "service_tier": "default",
        "temperature": sampling.temperature if sampling else None, "text": {"format": {"type": "text"}},
        "tool_choice": "auto", "tools": [], "top_logprobs": kept.get("top_logprobs", 0),
        "top_p": sampling.top_p if sampling else None, "truncation": kept.get("truncation", "disabled"),
        "usage": usage,
    }  # fmt: skip


def _item_id(response_id: str) -> str:
    """Of the message of a response."""
    return f"msg_{response_id.removeprefix(PREFIX)}"


def _message(id: str, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "message", "id": id, "status": status, "role": "assistant", "content": content}


def _text_part(text: str, logprobs: list[dict[str, Any]] | None) -> dict[str, Any]:
    part: dict[str, Any] = {"type": "output_text", "text": text, "annotations": []}
    return part if logprobs is None else part | {"logprobs": logprobs}


def _usage(asked: int, written: int) -> dict[str, Any]:
    return {
        "input_tokens": asked, "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": written, "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": asked + written,
    }  # fmt: skip
