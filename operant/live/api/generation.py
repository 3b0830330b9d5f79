"""Answers under way: asked of the engine, recorded before the first byte and before the last, sent piece by piece.

The work belongs to the server and not to the request. A client that goes away frees its rows, and the text written by
then is recorded all the same.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from operant.live.api.service import ApiError, GenerationRequest, Service
from operant.live.serving.engine import Busy, NotResident, empty_completion
from operant.live.storage.store import Origin
from operant.types import Completion, OperantError, Prompt, TokenInfo

__all__ = ["Choice", "Generation", "Piece"]

log = logging.getLogger(__name__)

# what a request calls its prompt, by its kind
PROMPT_FIELDS = {"chat": "messages", "text": "prompt", "response": "input", "message": "messages"}


@dataclass(slots=True)
class Choice:
    """One answer. `completion` is there when it is written to its end."""

    index: int
    id: str
    prompt: Prompt
    future: Future[Completion]
    text: str = ""
    tokens: list[TokenInfo] = field(default_factory=list)
    completion: Completion | None = None
    fault: str | None = None
    begun: bool = False  # its stub is committed


@dataclass(frozen=True, slots=True)
class Piece:
    """What a token added to a choice; `token` is None for text that came without one. `done`: it is written and
    recorded, and nothing follows."""

    choice: Choice
    text: str
    token: TokenInfo | None = None
    done: bool = False


class Generation:
    """The choices of one request.

    id: of the response; choice 0 has it too, choice i > 0 has f"{id}.{i}".
    """

    def __init__(self, service: Service, id: str, request: GenerationRequest) -> None:
        self.service, self.id, self.request = service, id, request
        self.created = time.time()
        self.choices: list[Choice] = []
        self.version = 0
        self.preferred: int | None = None  # the candidate, of a user who is answered by it
        self._pieces: asyncio.Queue[Piece | ApiError] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._begun = asyncio.Event()  # each stub is committed, or has failed to be

    # --- beginning ----------------------------------------------------------------------------------------------------

    async def begin(self, prompts: Sequence[Prompt]) -> None:
        """Ask the engine for `request.n` answers to each prompt; returns when every answer's stub is committed.

        Raises ApiError: 429 when too much is waiting, 400 for a prompt that does not fit, 503 when nothing can be
        written down, with nothing left under way.
        """
        service = self.service
        if service.stopping:
            raise ApiError(503, "the server is stopping", code="stopping", headers={"Retry-After": "5"})
        stubs = None
        try:
            version = await self._pinned()
            for prompt in prompts:
                self._submit(prompt, version)
            stubs = service.spawn(self._stubs())  # not the request's, which may end before they are committed
            await asyncio.shield(stubs)
            for prompt in prompts:
                await self._tell_begun(prompt)
        except BaseException:
            if stubs is None:
                self._begun.set()
            self.abandon()
            raise

    async def _pinned(self) -> int | None:
        """The version that this user is pinned to, made resident; None when they follow what is current."""
        service, user = self.service, self.request.user
        self.version = service.version
        pinned = service.versions.pins().get(user)
        if pinned is None:
            candidate = None if service.canary is None else service.canary.version_for(user)
            if candidate is not None and candidate in service.engine.resident():
                self.version = self.preferred = candidate
            return None
        if pinned not in service.engine.resident():
            if service.supervisor is None:
                raise ApiError(503, f"version {pinned}, to which {user} is pinned, is not in memory")
            try:
                await asyncio.to_thread(service.supervisor.make_resident, pinned)
            except Busy as error:
                raise _busy(error) from error
            except OperantError as error:
                raise ApiError(503, f"the version that {user} is pinned to cannot be served: {error}") from error
        self.version = pinned
        return pinned

    def _submit(self, prompt: Prompt, version: int | None) -> None:
        first, request = len(self.choices), self.request
        ids = [self.id if i == 0 else f"{self.id}.{i}" for i in range(first, first + request.n)]
        on_text = self._on_text if request.streamed or request.top_logprobs is not None else None
        try:
            futures = self.service.engine.submit(
                prompt, request.sampling, ids=ids, version=version, preferred=self.preferred, on_text=on_text,
                top_logprobs=request.top_logprobs or 0,
            )  # fmt: skip
        except Busy as error:
            self.service.metrics.refused.inc()
            raise _busy(error) from error
        except NotResident as error:
            raise ApiError(503, str(error), headers={"Retry-After": "1"}) from error
        except OperantError as error:
            raise ApiError(
                400, str(error), param=PROMPT_FIELDS[request.kind], code="context_length_exceeded"
            ) from error
        for i, (name, future) in enumerate(zip(ids, futures)):
            choice = Choice(first + i, name, prompt, future)
            self.choices.append(choice)
            self.service.spawn(self._finish(choice))

    async def _stubs(self) -> None:
        try:
            if self.request.stored:
                done = await asyncio.gather(*(self._stub(c) for c in self.choices), return_exceptions=True)
                for fault in done:
                    if isinstance(fault, BaseException):
                        raise fault
        finally:
            self._begun.set()

    async def _stub(self, choice: Choice) -> None:
        request = self.request
        kept = {
            "kind": request.kind, "model": request.model, "n": request.n, "owner": request.owner,
            "choice": choice.index, "choices": len(self.choices), **request.kept,
        }  # fmt: skip
        await self.service.io(
            self.service.store.begin, choice.id, choice.prompt, request.sampling,
            Origin(choice.prompt.task, request.user, self.version, kept, request.metadata, self.created),
        )  # fmt: skip
        choice.begun = True

    async def _tell_begun(self, prompt: Prompt) -> None:
        ids = [choice.id for choice in self.choices if choice.prompt is prompt]
        await self.service.tell(lambda listener: listener.on_begun(self.service, self.request, prompt, ids))

    # --- under way ----------------------------------------------------------------------------------------------------

    def _on_text(self, id: str, text: str, token: TokenInfo) -> None:
        # in the engine's thread; choices are looked up in the loop, as the first token may come before submit returns
        self._loop.call_soon_threadsafe(self._take, id, text, token)

    def _take(self, id: str, text: str, token: TokenInfo) -> None:
        number = 0 if id == self.id else int(id.rpartition(".")[2])
        choice = self.choices[number]
        choice.text += text
        choice.tokens.append(token)
        if self.request.streamed:
            self._pieces.put_nowait(Piece(choice, text, token))

    async def _finish(self, choice: Choice) -> None:
        """Wait for the engine and write the answer down, whatever became of the request."""
        service, request = self.service, self.request
        status = "complete"
        try:
            completion = await asyncio.wrap_future(choice.future)
            status = "partial" if completion.stop_reason == "cancelled" else "complete"
        except Exception as error:
            log.error("%s: %s", choice.id, error)
            choice.fault = f"the answer could not be written: {error}"
            status, completion = "failed", empty_completion(choice.id, choice.prompt, request.sampling, service.codec)
        await self._begun.wait()
        if request.stored and not choice.begun:
            return  # nobody has its id
        if request.stored:
            try:
                await service.io(service.store.complete, completion, status)
            except ApiError as error:
                choice.fault = error.message
                self._pieces.put_nowait(error)
                return
            except OperantError as error:  # it was never begun, or somebody has deleted it since
                log.warning("%s: %s", choice.id, error)
        if choice.fault is None:
            choice.completion = completion
            if status == "complete":
                service.spawn(service.tell(lambda to: to.on_answered(service, request, choice.prompt, completion)))
        service.metrics.count_answer(completion, status, time.time() - self.created)
        if choice.fault is not None:
            self._pieces.put_nowait(ApiError(500, choice.fault, code="generation_failed"))
            return
        rest = completion.text[len(choice.text) :] if request.streamed else ""
        self._pieces.put_nowait(Piece(choice, rest, done=True))

    async def pieces(self) -> AsyncIterator[Piece]:
        """The pieces of all choices as they come, a done one last for each. Raises ApiError when one fails."""
        left = len(self.choices)
        try:
            while left:
                piece = await self._pieces.get()
                if isinstance(piece, ApiError):
                    raise piece
                left -= piece.done
                yield piece
        finally:
            if left:
                self.abandon()

    async def all(self) -> list[Choice]:
        """All choices, written and recorded. Raises ApiError when one fails."""
        async for _ in self.pieces():
            pass
        return self.choices

    def abandon(self) -> None:
        """Free the rows; what is written is recorded by the tasks that wait for it."""
        for choice in self.choices:
            if not choice.future.done():
                self.service.engine.cancel(choice.id)


def _busy(error: Busy) -> ApiError:
    seconds = max(1, round(error.retry_after + 0.5))
    return ApiError(429, str(error), code="rate_limit_exceeded", headers={"Retry-After": str(seconds)})
