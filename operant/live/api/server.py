"""The HTTP server: the vendors' APIs, feedback, versions, health and metrics over one engine, store and learner."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from operant import __version__
from operant.live.api import (
    anthropic_routes,
    feedback_routes,
    forget_routes,
    openai_routes,
    page_routes,
    responses_routes,
    versions_routes,
)
from operant.live.api.service import ApiError, Service, caller_of, error_response, service_of
from operant.live.learning.sources import by_source
from operant.live.serving.access import OWNER, Caller, is_loopback
from operant.live.storage.feedback import BadFeedback
from operant.live.storage.store import Conflict, UnknownCompletion
from operant.types import OperantError

__all__ = ["create_app", "drain"]

log = logging.getLogger(__name__)

NOBODY = Caller("", frozenset())
HEADERS = {
    b"x-content-type-options": b"nosniff",
    b"x-frame-options": b"DENY",
    b"referrer-policy": b"same-origin",
    b"cross-origin-resource-policy": b"same-origin",
    b"content-security-policy": b"default-src 'none'; frame-ancestors 'none'",
    b"cache-control": b"no-store",
}


def create_app(service: Service) -> FastAPI:
    """The application of these parts. It drains and closes the service when it ends."""

    @contextlib.asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        yield
        await drain(service)
        service.close()

    app = FastAPI(
        title="operant", version=__version__, lifespan=life, docs_url=None, redoc_url=None, redirect_slashes=False
    )
    app.state.service = service
    for module in (
        openai_routes, responses_routes, anthropic_routes, feedback_routes, versions_routes, forget_routes, page_routes
    ):  # fmt: skip
        app.include_router(module.routes)
    app.add_api_route("/health", health, methods=["GET"])
    app.add_api_route("/ready", ready, methods=["GET"])
    app.add_api_route("/metrics", metrics, methods=["GET"])
    _handle_errors(app)
    app.add_middleware(Entrance, service=service)
    return app


async def drain(service: Service, seconds: float | None = None) -> None:
    """Refuse new answers, let those under way end within `seconds`, then cut them off; all of it is recorded."""
    service.stopping = True
    patience = service.config.drain_seconds if seconds is None else seconds
    pending = set(service.tasks)
    if pending:
        _, pending = await asyncio.wait(pending, timeout=patience)
    if pending:
        await asyncio.to_thread(service.engine.close)
        await asyncio.wait(pending, timeout=10.0)


# --- state ------------------------------------------------------------------------------------------------------------


async def health(request: Request) -> dict[str, Any]:
    """That the process answers, what it serves, and how the learner is."""
    service = service_of(request)
    learner = "none" if service.supervisor is None else service.supervisor.state
    return {"status": "ok", "model": service.name, "version": service.version, "learner": learner}


async def ready(request: Request) -> Response:
    """200 when a chat would be answered and written down. Raises ApiError 503 with the reason otherwise."""
    service = service_of(request)
    if service.stopping:
        raise ApiError(503, "the server is stopping", code="stopping")
    await service.io(service.store.ready)
    return JSONResponse({"status": "ready", "version": service.version})


async def metrics(request: Request) -> Response:
    """What Prometheus reads."""
    service = service_of(request)
    caller_of(request, "operate")
    stats = service.engine.stats()
    now = {
        "serving_version": float(stats["version"]), "resident_versions": float(len(stats["resident"])),
        "rows": float(stats["rows"]), "queued": float(stats["queued"]), "busy_fraction": float(stats["busy_fraction"]),
        "learner_up": float(service.supervisor is not None and service.supervisor.alive),
    }  # fmt: skip
    if service.canary is not None:
        trial = (await asyncio.to_thread(service.canary.trial)).summary()
        trial["candidate"] = -1 if trial["candidate"] is None else trial["candidate"]
        now |= {f"canary_{name}": float(value or 0) for name, value in trial.items() if name != "serving"}
    with contextlib.suppress(ApiError):  # what else there is to say is said while the store is away
        counts = await service.io(service.store.counts)
        now |= {f"events_{name}": float(counts[name]) for name in ("pending", "used", "superseded", "unused")}
        rows = await service.io(
            by_source, service.store, service.versions, score_low=service.config.score_low,
            score_high=service.config.score_high,
        )  # fmt: skip
        service.metrics.set_sources(rows)
    return Response(service.metrics.render(now), media_type="text/plain; version=0.0.4; charset=utf-8")


# --- errors -----------------------------------------------------------------------------------------------------------


def _handle_errors(app: FastAPI) -> None:
    def reply(
        request: Request, status: int, message: str, param: str | None = None, code: str | None = None, **headers: str
    ) -> Response:
        return error_response(request.scope, ApiError(status, message, param=param, code=code, headers=headers))

    @app.exception_handler(ApiError)
    async def _(request: Request, error: ApiError) -> Response:
        return error_response(request.scope, error)

    @app.exception_handler(BadFeedback)
    async def _(request: Request, error: BadFeedback) -> Response:
        return reply(request, 422, str(error), error.param, "invalid_value")

    @app.exception_handler(UnknownCompletion)
    async def _(request: Request, error: UnknownCompletion) -> Response:
        return reply(request, 404, str(error), code="not_found")

    @app.exception_handler(Conflict)
    async def _(request: Request, error: Conflict) -> Response:
        return reply(request, 409, str(error), "idempotency_key", "idempotency_conflict")

    @app.exception_handler(OperantError)
    async def _(request: Request, error: OperantError) -> Response:
        log.error("%s", error)
        return reply(request, 503, str(error), **{"Retry-After": "5"})

    @app.exception_handler(HTTPException)
    async def _(request: Request, error: HTTPException) -> Response:
        code = "request_too_large" if error.status_code == 413 else None
        return reply(request, error.status_code, str(error.detail), code=code, **dict(error.headers or {}))

    @app.exception_handler(RequestValidationError)
    async def _(request: Request, error: RequestValidationError) -> Response:
        errors = error.errors()
        if any(one["type"] == "json_invalid" for one in errors):
            return reply(request, 400, "the body is no JSON", code="invalid_json")
        param, message = _describe_first(errors)
        status = 422 if request.url.path.startswith("/v1/feedback") else 400
        return reply(request, status, message, param, "invalid_value")

    @app.exception_handler(Exception)
    async def _(request: Request, error: Exception) -> Response:
        return reply(request, 500, "the server failed; its log says how")


_BRANCHES = ("str", "int", "float", "bool", "none", "list", "dict", "constrained")


def _describe_first(errors: Sequence[Any]) -> tuple[str | None, str]:
    """(the field, what is wrong with it), of the first fault. Alternatives of one field come together."""

    def field(error: Any) -> str:
        name = ""
        for part in error["loc"][1:]:
            if isinstance(part, str) and (part in _BRANCHES or "[" in part or "-" in part):
                break
            name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else part
        return name

    first = errors[0]
    name = field(first)
    if first["type"] == "extra_forbidden":
        return name, f"Unrecognized request argument supplied: {name}"
    if first["type"] == "missing":
        return name or None, f"{name or 'the body'} is missing" + ("" if name else "; send a JSON object")
    words = dict.fromkeys(
        one["msg"].removeprefix("Value error, ").removeprefix("Input should be ") for one in errors[:20]
        if field(one).split("[")[0] == name.split("[")[0]
    )  # fmt: skip
    should = "" if first["type"] == "value_error" else "should be "
    return name or None, f"{name or 'the body'}: {should}{' or '.join(words)}"


# --- before and after every route -------------------------------------------------------------------------------------


class Entrance:
    """Who comes in, with how much, and what every response carries.

    A page of another site, or a name that somebody made resolve to this machine (DNS rebinding), must not use a server
    that asks for no key: so the names of this machine alone are answered to, and no other origin may write.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service
        self._public = origin_host(service.config.public_url) or None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun = time.monotonic()
        answered = False

        async def sending(message: Message) -> None:
            nonlocal answered
            if message["type"] == "http.response.start":
                answered = True
                given = {name.lower() for name, _ in message["headers"]}
                message["headers"] = [*message["headers"], *((n, v) for n, v in HEADERS.items() if n not in given)]
                self._count(scope, message["status"], time.monotonic() - begun)
            await send(message)

        try:
            self._check(scope)
        except ApiError as error:
            await error_response(scope, error)(scope, receive, sending)
            return
        await self.app(scope, self._limited(receive), sending)

    def _count(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "other")
        self.service.metrics.requests.labels(route, str(status)).inc()
        self.service.metrics.request_seconds.labels(route).observe(seconds)

    def _check(self, scope: Scope) -> None:
        """Raises ApiError for who or what may not come in. Nothing of the body has been read yet."""
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get(b"host", "")
        guarded = self._guarded()
        if not guarded and not self._is_ours(host):
            raise ApiError(
                403, f"this server does not answer to the name {host[:100]!r}; give --public_url if it should",
                code="unknown_host",
            )  # fmt: skip
        writes = scope["method"] not in ("GET", "HEAD", "OPTIONS")
        origin = headers.get(b"origin")
        if writes and origin is not None and origin_host(origin) not in (host.lower(), self._public):
            raise ApiError(403, "pages of other sites may not use this server", code="cross_origin")
        length = headers.get(b"content-length", "")
        if length.isdigit() and int(length) > self.service.config.max_body:
            raise self._too_large()
        path: str = scope["path"]
        caller: Caller | None = NOBODY if guarded else OWNER
        if guarded and (path.startswith("/v1/") or path == "/metrics"):
            scheme, _, key = headers.get(b"authorization", "").partition(" ")
            if scheme.lower() != "bearer":
                key = headers.get(b"x-api-key", "")  # as Anthropic's clients send it
            caller = self.service.keys.caller(key.strip()) if key.strip() else None
            if caller is None:
                raise ApiError(
                    401, "give a valid API key, as in Authorization: Bearer KEY, or x-api-key: KEY",
                    code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"},
                )  # fmt: skip
        scope.setdefault("state", {})["caller"] = caller
        has_body = length not in ("", "0") or b"transfer-encoding" in headers
        kind = headers.get(b"content-type", "").partition(";")[0].strip().lower()
        if writes and has_body and path.startswith("/v1/") and kind != "application/json":
            raise ApiError(415, "send JSON, with Content-Type: application/json", code="unsupported_media_type")

    def _guarded(self) -> bool:
        try:
            return self.service.keys.needed
        except OperantError as error:
            log.error("%s", error)
            raise ApiError(503, "the file of keys cannot be read", headers={"Retry-After": "5"}) from error

    def _is_ours(self, host: str) -> bool:
        name, public = hostname(f"//{host}"), hostname(self.service.config.public_url)
        return is_loopback(name) or name.endswith(".localhost") or (name != "" and name == public)

    def _too_large(self) -> ApiError:
        return ApiError(
            413, f"the request is too large; at most {self.service.config.max_body} bytes are read",
            code="request_too_large", headers={"Connection": "close"},
        )  # fmt: skip

    def _limited(self, receive: Receive) -> Receive:
        """A body without a length is counted as it comes."""
        read = 0

        async def limited() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.service.config.max_body:
                error = self._too_large()
                raise HTTPException(error.status, error.message, error.headers)
            return message

        return limited


def hostname(url: str) -> str:
    """The name in a URL, "" when there is none."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def origin_host(origin: str) -> str:
    """Name and port of an origin, "" for the opaque one."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""
