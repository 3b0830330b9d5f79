"""What every route of the server shares: the parts of the live loop, who listens to it, and the form of an error."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import math
import secrets
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, Protocol, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, model_validator

from operant.config import ServeConfig
from operant.data.prompts import PromptFormat
from operant.data.text import Codec
from operant.live.serving.access import OWNER, Caller, Keys, Links, Role
from operant.live.serving.canary import Canary
from operant.live.serving.engine import Engine
from operant.live.serving.limits import RateLimits, What
from operant.live.serving.metrics import Metrics
from operant.live.serving.supervisor import Supervisor
from operant.live.storage.store import Conflict, State, Store, StoredCompletion, UnknownCompletion
from operant.live.storage.versions import Versions
from operant.models.generation import Generation
from operant.types import Completion, Feedback, OperantError, Prompt, Sampling

__all__ = [
    "MESSAGES", "ApiError", "GenerationRequest", "Listener", "ReadAhead", "RequestBody", "Service", "StrictModel",
    "Way", "anthropic_error_body", "caller_of", "error_response", "new_id", "service_of", "speaks_anthropic",
]  # fmt: skip

log = logging.getLogger(__name__)

T = TypeVar("T")

MESSAGES = "/v1/messages"  # of Anthropic's API

# callers that wait for one commit together; each holds a thread while it waits
STORE_THREADS = 64


class ApiError(Exception):
    """A refusal, which the client gets in the form of its vendor."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The response in OpenAI's form."""
        return error_body(self.status, self.message, self.param, self.code)


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The body of an error as OpenAI's clients read it."""
    kind = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}.get(
        status, "invalid_request_error" if status < 500 else "server_error"
    )
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(scope: Mapping[str, Any], error: ApiError) -> JSONResponse:
    """The response to a request that fails, in the form that its client reads."""
    body = anthropic_error_body(error.status, error.message) if speaks_anthropic(scope) else error.body
    return JSONResponse(body, error.status, error.headers)


def anthropic_error_body(status: int, message: str) -> dict[str, Any]:
    """The body of an error as Anthropic's clients read it."""
    kind = {
        401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large",
        429: "rate_limit_error", 503: "overloaded_error",
    }.get(status, "invalid_request_error" if status < 500 else "api_error")  # fmt: skip
    return {"type": "error", "error": {"type": kind, "message": message}}


def speaks_anthropic(scope: Mapping[str, Any]) -> bool:
    """Whether a request is one of Anthropic's API: by its path, or by the header that its clients send."""
    path: str = scope["path"]
    return path == MESSAGES or path.startswith(f"{MESSAGES}/") or any(
        name == b"anthropic-version" for name, _ in scope["headers"]
    )  # fmt: skip


def new_id(prefix: str) -> str:
    """An id that nobody can guess: "chatcmpl-" and 24 hexadecimal digits, for instance."""
    return f"{prefix}{secrets.token_hex(12)}"


class StrictModel(BaseModel):
    """An object of JSON without fields that nothing knows, nor values that would have to be converted."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class RequestBody(StrictModel):
    """The body of a request. Its texts can be written as UTF-8: a lone surrogate is half a character."""

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, body: Any) -> Any:
        try:
            json.dumps(body, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("a text holds half a character (a lone surrogate); send whole ones") from None
        return body


# --- who listens ------------------------------------------------------------------------------------------------------

Way = Literal["api", "metadata", "link", "rule", "reward"]  # by which feedback comes in; the last two are the server's


@dataclasses.dataclass(frozen=True, slots=True)
class GenerationRequest:
    """What a request for answers asks for, beside its prompts.

    owner: the name of the key that asks. user: whom the answer is for, the owner unless the request names another.
    stored: whether it is written down. kind: which API asks. n: answers to each prompt. model: as the request named
    it. streamed: sent piece by piece. top_logprobs: alternatives sent with each token; None sends no log-probabilities.
    cut_messages: how many of a chat's were left out, as it is longer than the context. kept: what else of the request
    its API wants to know again of a stored answer: plain data, and nothing that somebody said.
    """

    sampling: Sampling
    owner: str
    user: str
    kind: Literal["chat", "text", "response", "message"]
    model: str
    n: int = 1
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)
    stored: bool = True
    streamed: bool = False
    top_logprobs: int | None = None
    cut_messages: int = 0
    kept: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Listener(Protocol):
    """Hears what happens on a server. A subclass writes the methods that it needs.

    An exception in a method is logged. It harms no answer, no receipt and no other listener (`Service.tell`).
    """

    async def on_begun(
        self, service: Service, request: GenerationRequest, prompt: Prompt, completion_ids: Sequence[str]
    ) -> None:
        """Answers to a prompt are under way; nothing of them is sent before this returns."""
        return

    async def on_answered(
        self, service: Service, request: GenerationRequest, prompt: Prompt, completion: Completion
    ) -> None:
        """An answer is written to its end and, if it is stored, recorded. Nobody waits for this."""
        return

    async def on_rated(self, service: Service, event: Feedback, stored: StoredCompletion, way: Way) -> None:
        """An event about an answer is committed; its receipt is sent when this returns."""
        return


class ReadAhead(Listener):
    """Tells the learner of each answer that is stored, so that it is read before somebody rates it."""

    async def on_answered(
        self, service: Service, request: GenerationRequest, prompt: Prompt, completion: Completion
    ) -> None:
        """Name the answer to the learner."""
        if request.stored:
            service.poke(completion.id)


@dataclasses.dataclass(kw_only=True)
class Service:
    """The parts of the live loop that the routes work with. `supervisor` is None where nothing learns.

    codec, encoder, max_length: the policy's tokens, whether it reads prompts with an encoder, and how many tokens it
    holds. They are the same for every version, since all are of one family.
    generation: how the model is meant to be sampled. written: how prompts are written for it.
    base: the name of what version 0 was made from, "" where nothing tells it.
    keys: without any, nobody is asked for one. canary: None where versions serve everybody without a trial.
    listeners: hear of every prompt, answer and rating, all at once.
    """

    engine: Engine
    codec: Codec
    encoder: bool
    max_length: int
    store: Store
    versions: Versions
    supervisor: Supervisor | None
    config: ServeConfig
    links: Links
    generation: Generation = dataclasses.field(default_factory=Generation)
    base: str = ""
    written: PromptFormat = dataclasses.field(init=False)
    keys: Keys = dataclasses.field(default_factory=lambda: Keys(None))
    canary: Canary | None = None
    listeners: list[Listener] = dataclasses.field(default_factory=list)
    metrics: Metrics = dataclasses.field(default_factory=Metrics)
    limits: RateLimits = dataclasses.field(init=False)
    stopping: bool = False
    started: float = dataclasses.field(default_factory=time.time)
    # answers under way and records being written, which a stop waits for
    tasks: set[asyncio.Task[Any]] = dataclasses.field(default_factory=set)
    _threads: ThreadPoolExecutor = dataclasses.field(
        default_factory=lambda: ThreadPoolExecutor(STORE_THREADS, "operant-store")
    )

    def __post_init__(self) -> None:
        config = self.config
        self.written = PromptFormat.of(config, encoder=self.encoder)
        counted = config.mode == "shared"  # nobody's own server counts what they say
        self.limits = RateLimits(config.chat_rate if counted else 0.0, config.feedback_rate if counted else 0.0)

    @property
    def name(self) -> str:
        """Of the model that is served, as a request names it."""
        return self.config.name

    @property
    def version(self) -> int:
        """The version that serves what begins now."""
        serving: int = self.engine.stats()["version"]
        return serving

    async def io(self, call: Callable[..., T], *arguments: Any, **options: Any) -> T:
        """A call to the store, off the event loop. Raises ApiError 503 for trouble of the storage, and the store's
        UnknownCompletion and Conflict as they are."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, lambda: call(*arguments, **options))
        except (UnknownCompletion, Conflict):
            raise  # it is the request that is wrong
        except OperantError as error:
            log.error("storage: %s", error)
            self.metrics.storage_faults.inc()
            raise ApiError(
                503, f"storage: {error}", code="storage_unavailable", headers={"Retry-After": "5"}
            ) from error

    async def tell(self, call: Callable[[Listener], Coroutine[Any, Any, None]]) -> None:
        """Make this call to every listener, all at once. Never raises: what a listener raises is logged."""

        async def tell_one(listener: Listener) -> None:
            try:
                await call(listener)
            except Exception:
                log.exception("the listener %s failed", type(listener).__name__)

        await asyncio.gather(*(tell_one(listener) for listener in self.listeners))

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """A task that outlives the request that began it."""
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    def admit(self, what: What, *names: str, cost: float = 1.0) -> None:
        """Count against the rate of each of these names. Raises ApiError 429 for the first that is over it."""
        for name in names:
            seconds = self.limits.wait(what, name, cost)
            if seconds > 0:
                self.metrics.limited.labels(what).inc()
                raise ApiError(
                    429, f"too much {what} of {name[:100]!r} in a minute; come again in {math.ceil(seconds)} s",
                    code="rate_limit_exceeded", headers={"Retry-After": str(math.ceil(seconds))},
                )  # fmt: skip

    async def waits_for(self, event_id: str, state: State, stored: StoredCompletion | None) -> str:
        """What an event about that answer waits for, in words; "" for one that waits no more."""
        if state != "pending":
            return ""
        if self.supervisor is None:
            return "a learner, and none runs here"
        if stored is not None and stored.completion is None:
            return "the end of its answer"
        return await self.io(self.supervisor.waits_for, event_id)

    def poke(self, answer: str = "") -> None:
        """Tell the learner that something has come: feedback, or an answer of this id."""
        if self.supervisor is not None:
            self.supervisor.poke(answer)

    def close(self) -> None:
        """End the threads that wait for the store."""
        self._threads.shutdown(wait=True)


def service_of(request: Request) -> Service:
    """The parts that the application of this request is made of."""
    service: Service = request.app.state.service
    return service


def caller_of(request: Request, role: Role) -> Caller:
    """Who asks. Raises ApiError 403 when their key may not do this."""
    caller: Caller = getattr(request.state, "caller", OWNER)
    if not caller.may(role):
        raise ApiError(403, f"this key may not {role}; ask for one with that role", code="insufficient_permissions")
    return caller
