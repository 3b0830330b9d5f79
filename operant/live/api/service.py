"""What every route of the server shares: the parts of the live loop, and how a fault is told to a client."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import math
import secrets
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import Request

from operant.config import ServeConfig
from operant.data.text import Codec
from operant.live.serving.access import OWNER, Caller, Keys, Links, Role
from operant.live.serving.limits import RateLimits, What
from operant.live.storage.store import Conflict, UnknownCompletion
from operant.live.storage.versions import Versions
from operant.types import OperantError

if TYPE_CHECKING:
    from operant.live.api.automatic import Automatic
    from operant.live.api.implicit import Implicit
    from operant.live.serving.canary import Canary
    from operant.live.serving.engine import Engine
    from operant.live.serving.metrics import Metrics
    from operant.live.serving.supervisor import Supervisor
    from operant.live.storage.store import Store

__all__ = ["ApiError", "Service", "caller_of", "fault", "new_id", "service_of"]

log = logging.getLogger(__name__)

T = TypeVar("T")

# callers that wait for one commit together; each holds a thread while it waits
STORE_THREADS = 64


class ApiError(Exception):
    """A refusal that the client is told in OpenAI's form."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        return fault(self.status, self.message, self.param, self.code)


def fault(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The body of an error as OpenAI's clients read it."""
    kind = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}.get(
        status, "invalid_request_error" if status < 500 else "server_error"
    )
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def new_id(kind: str) -> str:
    """An id that nobody can guess: "chatcmpl-" and 24 hexadecimal digits, for instance."""
    return f"{kind}-{secrets.token_hex(12)}"


@dataclasses.dataclass
class Service:
    """The parts of the live loop that the routes work with. `supervisor` is None where nobody learns.

    codec, encoder, max_length: of every version, as they are of one family: what the policy's tokens are, whether it
    reads prompts with an encoder, and how many tokens it holds.
    """

    engine: Engine
    codec: Codec
    encoder: bool
    max_length: int
    store: Store
    versions: Versions
    supervisor: Supervisor | None
    config: ServeConfig
    keys: Keys
    links: Links
    metrics: Metrics
    limits: RateLimits
    implicit: Implicit | None = None
    automatic: Automatic | None = None
    canary: Canary | None = None
    stopping: bool = False
    started: float = dataclasses.field(default_factory=time.time)
    # answers under way and records being written, which a stop waits for
    tasks: set[asyncio.Task[Any]] = dataclasses.field(default_factory=set)
    _threads: ThreadPoolExecutor = dataclasses.field(
        default_factory=lambda: ThreadPoolExecutor(STORE_THREADS, "operant-store")
    )

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def version(self) -> int:
        """The version that serves what begins now."""
        serving: int = self.engine.stats()["version"]
        return serving

    async def io(self, call: Callable[..., T], *arguments: Any, **options: Any) -> T:
        """A call to the store, off the event loop. Trouble of the storage is the client's 503."""
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

    def spawn(self, work: Any) -> asyncio.Task[Any]:
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

    def poke(self) -> None:
        """Tell the learner that something has come."""
        if self.supervisor is not None:
            self.supervisor.poke()

    def close(self) -> None:
        self._threads.shutdown(wait=True)


def service_of(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def caller_of(request: Request, role: Role) -> Caller:
    """Who asks. Raises ApiError 403 when their key may not do this."""
    caller: Caller = getattr(request.state, "caller", OWNER)
    if not caller.may(role):
        raise ApiError(403, f"this key may not {role}; ask for one with that role", code="insufficient_permissions")
    return caller
