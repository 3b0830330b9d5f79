"""The routes for forgetting a source while the server goes on answering: ask for it, and look how far it is."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request
from pydantic import Field

from operant.live.api.service import ApiError, RequestBody, Service, caller_of, service_of
from operant.live.learning.forget import Forgotten, Plan, ask, forgotten
from operant.types import OperantError

__all__ = ["routes"]

routes = APIRouter(prefix="/v1/forget")

Wait = Annotated[float, Query(ge=0, le=600)]


class ForgetRequest(RequestBody):
    """Whom to forget: the name of their key, or the source that was given with their feedback."""

    source: str = Field(min_length=1, max_length=256)


@routes.post("")
async def begin_forgetting(request: Request, body: ForgetRequest, wait: Wait = 0.0) -> dict[str, Any]:
    """Begin to forget a source, and wait at most so many seconds until that is done.

    {"id", "state", "result"}: the state is "done" with {"events", "base", "redone", "dropped", "current"}, or how far
    it is. 404 for a source of which nothing is stored, 409 when it cannot be forgotten or another one is being
    forgotten.
    """
    service, _ = service_of(request), caller_of(request, "operate")
    if service.supervisor is None:
        raise ApiError(503, "nothing learns here, so nothing can be forgotten", code="no_learner")
    known = await service.io(service.store.events, source=body.source, limit=1)
    if not known and not await service.io(service.store.asked_by, body.source):
        raise ApiError(404, f"nothing of a source {body.source!r} is stored", param="source", code="not_found")
    try:
        plan = await asyncio.to_thread(ask, service.versions, body.source)
    except OperantError as error:
        raise ApiError(409, str(error), param="source") from error
    service.poke()
    return await _progress_reply(service, plan.number, wait)


@routes.get("/{number}")
async def forgetting_progress_reply(
    request: Request, number: Annotated[int, Path(ge=1, lt=1 << 31)], wait: Wait = 0.0
) -> dict[str, Any]:
    """How far the forgetting of this id is, or what it came to."""
    service, _ = service_of(request), caller_of(request, "operate")
    return await _progress_reply(service, number, wait)


async def _progress_reply(service: Service, number: int, wait: float) -> dict[str, Any]:
    until = time.monotonic() + wait
    while True:
        done, plan = await asyncio.to_thread(_look, service, number)
        if done is None and plan is None:
            raise ApiError(404, f"there is no forgetting {number}", code="not_found")
        if plan is not None and plan.stage == "refused":
            raise ApiError(409, plan.reason, code="refused")
        if done is not None or time.monotonic() >= until or service.stopping:
            stage = "done" if plan is None else plan.stage
            return {"object": "forgetting", "id": number, "state": stage, "result": done}
        await asyncio.sleep(0.05)


def _look(service: Service, number: int) -> tuple[Forgotten | None, Plan | None]:
    plan = Plan.read(service.versions)  # first, so that one that ends in between is not missed
    if plan is not None and plan.number == number:
        return None, plan
    return forgotten(service.versions, number), None
