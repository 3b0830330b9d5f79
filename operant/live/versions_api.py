"""The routes for versions: what was published, promote, roll back, pin."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request
from pydantic import Field

from operant.live.access import Caller
from operant.live.openai_api import Asked
from operant.live.service import ApiError, Service, caller_of, service_of
from operant.types import OperantError

__all__ = ["routes"]

routes = APIRouter(prefix="/v1/versions")

SERVED_WITHIN = 10.0  # seconds that a call which moves the pointer waits until requests are served by it

Number = Annotated[int, Path(ge=0, lt=1 << 31)]


class Pin(Asked):
    """A user who is served `version` whatever is published; null lets them follow again."""

    user: str = Field(min_length=1, max_length=256)
    version: int | None = Field(ge=0, lt=1 << 31)


@routes.get("")
async def versions(request: Request) -> dict[str, Any]:
    """{"current", "anchor", "serving", "resident", "learner", "trial", "versions": [one for each step]}.

    Operators also see who is pinned, and what the learner fails at.
    """
    service = service_of(request)
    caller: Caller = request.state.caller
    told = await asyncio.to_thread(service.versions.overview)
    stats = service.engine.stats()
    supervisor = service.supervisor
    learner = {"state": "none"} if supervisor is None else {"state": supervisor.state, "fault": supervisor.fault}
    if service.canary is not None:
        told["trial"] = (await asyncio.to_thread(service.canary.trial)).told()
    if not caller.may("operate"):
        told.pop("pins")
        learner.pop("fault", None)
    return {"object": "list", "serving": stats["version"], "resident": stats["resident"], "learner": learner, **told}


@routes.post("/{version}/promote")
async def promote(request: Request, version: Number) -> dict[str, Any]:
    """Let a version serve; what learns next starts from it."""
    service, _ = service_of(request), caller_of(request, "operate")
    return await _move(service, lambda: service.versions.promote(version))


@routes.post("/rollback")
async def roll_back(request: Request) -> dict[str, Any]:
    """Serve the nearest ancestor of the current version again, its optimizer included."""
    service, _ = service_of(request), caller_of(request, "operate")
    return await _move(service, service.versions.roll_back)


@routes.post("/pins")
async def pin(request: Request, pin: Pin) -> dict[str, Any]:
    service, _ = service_of(request), caller_of(request, "operate")
    try:
        await asyncio.to_thread(service.versions.pin, pin.user, pin.version)
        return {"pins": await asyncio.to_thread(service.versions.pins)}
    except OperantError as error:
        raise ApiError(409, str(error), param="version") from error


async def _move(service: Service, move: Any) -> dict[str, Any]:
    """Move the pointer and wait until that version serves."""
    try:
        chosen = await asyncio.to_thread(move)
    except OperantError as error:
        raise ApiError(409, str(error), param="version") from error
    until = time.monotonic() + (SERVED_WITHIN if service.supervisor is not None else 0.0)
    while service.version != chosen.version and time.monotonic() < until and not service.stopping:
        await asyncio.sleep(0.02)
    return {"current": chosen.version, "serving": service.version}
