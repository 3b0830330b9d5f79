"""The replies of OpenAI's API: chat and text completions, whole or in chunks, stored chats, and the model.

Values without a field in OpenAI's objects stand under `operant`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from fastapi import Request

from operant.data.text import Codec
from operant.live.api.answering import (
    feedback_url,
    last_version,
    model_part,
    operant_part,
    prompt_tokens,
    server_sent_event,
    tokens_written,
)
from operant.live.api.generation import Choice, Generation
from operant.live.api.service import ApiError, Service
from operant.live.storage.store import StoredCompletion
from operant.types import Completion, TokenInfo

__all__ = ["ChatForm", "CompletionReply", "TextForm", "render_model", "render_stored_chat", "token_logprobs"]

_FINISH = {"eos": "stop", "stop": "stop", "reward": "stop", "length": "length"}


# --- the two forms of a completion ------------------------------------------------------------------------------------


class ChatForm:
    """The objects of a chat completion. `whole` and `part` are their names, of an answer and of a chunk of one."""

    whole, part = "chat.completion", "chat.completion.chunk"

    def __init__(self, codec: Codec) -> None:
        self.codec = codec

    def opening(self) -> dict[str, Any]:
        """The first chunk of a choice."""
        return {"delta": {"role": "assistant", "content": "", "refusal": None}, "logprobs": None}

    def piece(self, text: str, tokens: Sequence[TokenInfo], start: int, wanted: int | None) -> dict[str, Any]:
        """A chunk of a choice. start: characters before it. wanted: alternatives to tell of each token, if any."""
        return {"delta": {"content": text}, "logprobs": self.logprobs(tokens, wanted)}

    def closing(self) -> dict[str, Any]:
        """The last chunk of a choice."""
        return {"delta": {}, "logprobs": None}

    def choice(self, text: str, tokens: Sequence[TokenInfo], wanted: int | None) -> dict[str, Any]:
        """A whole choice."""
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"message": message, "logprobs": self.logprobs(tokens, wanted)}

    def logprobs(self, tokens: Sequence[TokenInfo], wanted: int | None) -> dict[str, Any] | None:
        """Of the model itself: at temperature 1 and with nothing cut off."""
        if wanted is None:
            return None
        return {"content": token_logprobs(self.codec, tokens, wanted), "refusal": None}


class TextForm:
    """The objects of a text completion; its methods are `ChatForm`'s."""

    whole = part = "text_completion"

    def __init__(self, codec: Codec) -> None:
        self.codec = codec

    def opening(self) -> dict[str, Any]:
        return {"text": "", "logprobs": None}

    def piece(self, text: str, tokens: Sequence[TokenInfo], start: int, wanted: int | None) -> dict[str, Any]:
        return {"text": text, "logprobs": self.logprobs(tokens, wanted, start)}

    def closing(self) -> dict[str, Any]:
        return {"text": "", "logprobs": None}

    def choice(self, text: str, tokens: Sequence[TokenInfo], wanted: int | None) -> dict[str, Any]:
        return self.piece(text, tokens, 0, wanted)

    def logprobs(self, tokens: Sequence[TokenInfo], wanted: int | None, start: int) -> dict[str, Any] | None:
        """As `ChatForm.logprobs`; `start` is the place of the first token's text."""
        if wanted is None:
            return None
        columns: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        at = start
        for token in tokens:
            if not self.codec.is_text(token.token):
                continue
            columns["tokens"].append(self._name(token.token))
            columns["token_logprobs"].append(_json_logprob(token.model_logprob))
            columns["top_logprobs"].append(
                {self._name(other): _json_logprob(logprob) for other, logprob in token.alternatives[:wanted]}
            )
            columns["text_offset"].append(at)
            at += len(token.text)
        return columns

    def _name(self, token: int) -> str:
        """A token's text; one that is a part of a character is spelled as OpenAI spells it, so that names differ."""
        text = self.codec.token_bytes(token)
        try:
            return text.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in text)


def token_logprobs(codec: Codec, tokens: Sequence[TokenInfo], wanted: int) -> list[dict[str, Any]]:
    """The tokens of text with their log-probabilities. wanted: alternatives to tell of each."""

    def row(token: int, logprob: float) -> dict[str, Any]:
        text = codec.token_bytes(token)
        return {"token": text.decode("utf-8", "replace"), "logprob": _json_logprob(logprob), "bytes": list(text)}

    return [
        row(token.token, token.model_logprob)
        | {"top_logprobs": [row(other, logprob) for other, logprob in token.alternatives[:wanted]]}
        for token in tokens if codec.is_text(token.token)
    ]  # fmt: skip


def _json_logprob(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else -9999.0  # as OpenAI writes what cannot be drawn


# --- an answer, whole or in chunks ------------------------------------------------------------------------------------


class CompletionReply:
    """The answers of a request in one of the two forms (`answering.Reply`).

    usage: whether a stream counts its tokens in the end.
    """

    def __init__(self, request: Request, generation: Generation, form: ChatForm | TextForm, usage: bool) -> None:
        self._request, self._generation, self._form = request, generation, form
        self._usage: dict[str, Any] = {"usage": None} if usage else {}
        self._starts = [0] * len(generation.choices)

    def whole(self) -> dict[str, Any]:
        """The completion object."""
        generation, form = self._generation, self._form
        wanted = generation.request.top_logprobs
        rows = [
            {"index": choice.index, "completion_id": choice.id, "finish_reason": _finish_reason(choice.completion)}
            | form.choice(choice.completion.text if choice.completion else "", choice.tokens, wanted)
            for choice in generation.choices
        ]
        version = last_version(generation.choices[0].completion)
        return (
            self._head(form.whole)
            | {"choices": rows, "usage": _answer_usage(generation)}
            | {"operant": operant_part(self._request, generation, version)}
        )

    def opening(self) -> Iterable[bytes]:
        """The first chunk of each choice."""
        part = operant_part(self._request, self._generation)
        return [self._chunk(choice, self._form.opening(), operant=part) for choice in self._generation.choices]

    def piece(self, choice: Choice, text: str, tokens: Sequence[TokenInfo]) -> Iterable[bytes]:
        """A chunk of a choice."""
        wanted = self._generation.request.top_logprobs
        chunk = self._chunk(choice, self._form.piece(text, tokens, self._starts[choice.index], wanted))
        self._starts[choice.index] += len(text)
        return [chunk]

    def closing(self, choice: Choice) -> Iterable[bytes]:
        """The last chunk of a choice."""
        reason, version = _finish_reason(choice.completion), last_version(choice.completion)
        return [self._chunk(choice, self._form.closing(), reason, operant={"version": version})]

    def ending(self) -> Iterable[bytes]:
        """The chunk with the tokens of the answer, if they are counted, and the end."""
        if self._usage:
            usage = {"choices": [], "usage": _answer_usage(self._generation)}
            yield server_sent_event(self._head(self._form.part) | usage)
        yield b"data: [DONE]\n\n"

    def fault(self, error: ApiError) -> Iterable[bytes]:
        """The error as the clients look for it."""
        return [server_sent_event(error.body)]

    def _chunk(self, choice: Choice, content: dict[str, Any], finish: str | None = None, **more: Any) -> bytes:
        row = {"index": choice.index, "completion_id": choice.id, "finish_reason": finish} | content
        return server_sent_event(self._head(self._form.part) | {"choices": [row]} | self._usage | more)

    def _head(self, kind: str) -> dict[str, Any]:
        generation = self._generation
        return {
            "id": generation.id, "object": kind, "created": int(generation.created), "model": generation.service.name,
            "system_fingerprint": f"version-{generation.version}",
        }  # fmt: skip


def _finish_reason(completion: Completion | None) -> str | None:
    return None if completion is None else _FINISH.get(completion.stop_reason)


def _answer_usage(generation: Generation) -> dict[str, int]:
    return _token_usage(prompt_tokens(generation), [choice.completion for choice in generation.choices])


def _token_usage(asked: int, completions: Sequence[Completion | None]) -> dict[str, int]:
    written = tokens_written(completions)
    return {"prompt_tokens": asked, "completion_tokens": written, "total_tokens": asked + written}


# --- stored chats, and the model --------------------------------------------------------------------------------------


def render_stored_chat(service: Service, request: Request, rows: Sequence[StoredCompletion]) -> dict[str, Any]:
    """A stored chat as it was answered. rows: its choices; the first one is what the chat is stored as."""
    stored = rows[0]
    choices = [
        {
            "index": row.request.get("choice", 0), "completion_id": row.id, "logprobs": None,
            "finish_reason": _finish_reason(row.completion),
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
        "choices": choices, "usage": _token_usage(len(stored.prompt.tokens), [row.completion for row in rows]),
        "metadata": stored.metadata, "request_id": stored.id, "input_user": stored.user, "tools": None,
        "tool_choice": None, "response_format": None, "service_tier": "default",
        "temperature": sampling.temperature if sampling else None, "top_p": sampling.top_p if sampling else None,
        "seed": sampling.seed if sampling else None, "presence_penalty": 0.0, "frequency_penalty": 0.0,
        "operant": {
            "status": stored.status, "version": stored.model_version,
            "feedback_url": feedback_url(service, request, stored.id, stored.request.get("owner", "")),
        },
    }  # fmt: skip


def render_model(service: Service, name: str) -> dict[str, Any]:
    """The model that is served, under one of its names."""
    return {
        "id": name, "object": "model", "created": int(service.started), "owned_by": "operant",
        "operant": model_part(service),
    }  # fmt: skip
