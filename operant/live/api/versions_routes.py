"""The routes for versions: what was published, promote, roll back, pin."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Request
from pydantic import BaseModel, ConfigDict, Field

from operant.live.api.service import ApiError, RequestBody, Service, caller_of, service_of
from operant.live.serving.access import Caller
from operant.run.notices import Series, notices
from operant.types import OperantError

__all__ = ["routes"]

routes = APIRouter(prefix="/v1/versions")

OPTIMISED = ("bleu", "chrf", "rougeL", "exact")  # none is, by people's ratings; whoever holds rows out wants them kept
SERVED_WITHIN = 10.0  # seconds that a call which moves the pointer waits until requests are served by it

Number = Annotated[int, Path(ge=0, lt=1 << 31)]


class PinRequest(RequestBody):
    """A user who is served `version` whatever is published; null lets them follow again."""

    user: str = Field(min_length=1, max_length=256)
    version: int | None = Field(ge=0, lt=1 << 31)


# --- what is answered ------------------------------------------------------------------------------------------------


class Reply(BaseModel):
    """A part of what is answered: every field that there is, and no other."""

    model_config = ConfigDict(extra="forbid")


class RatedReply(Reply):
    """Answers of each version whose rating counts in a trial."""

    serving: int
    candidate: int


class TrialReply(Reply):
    """How far the trial of a version is. It is decided by e-values, which may be looked at after every pair."""

    serving: int = Field(description="the version that serves meanwhile")
    candidate: int | None = Field(description="the version on trial; null while none is")
    kind: Literal["canary", "shadow"] = Field(description="canary: it answers some users. shadow: it answers unseen")
    share: float = Field(description="of the users (canary) or of the answers (shadow) that it answers")
    rated: RatedReply = Field(
        description="answers of each whose rating counts; one source counts five times in a trial"
    )
    pairs: int = Field(description="ratings of one that were set against one of the other")
    difference: float | None = Field(description="mean of candidate − serving, rewards on [0, 1]; null without pairs")
    e_better: float = Field(description="evidence that it is not worse by `margin` or more")
    e_worse: float = Field(description="evidence that it is worse")
    needed: float = Field(description="it serves when e_better reaches this, and is refused when e_worse does")
    margin: float = Field(description="by how much worse it must not be, rewards on [0, 1]")
    most_pairs: int = Field(description="it is refused when so many pairs have decided nothing")
    promoted: int = Field(description="trials so far that ended so")
    refused: int = Field(description="trials so far that ended so")


class VerdictReply(Reply):
    """How the trial of a version ended."""

    verdict: Literal["promoted", "refused"]
    reason: str
    kind: Literal["canary", "shadow"]
    against: int = Field(description="the version that served")
    time: float = Field(description="when, in seconds since 1970")
    alpha: float = Field(description="the significance: e-values decide at 1/alpha")
    margin: float
    pairs: int
    difference: float
    e_better: float
    e_worse: float


class SlowGateReply(Reply):
    """What the slow gate found in answers: to shipped questions (`sense_…`), to held-out prompts."""

    model_config = ConfigDict(extra="allow")

    passed: bool


class VersionReply(Reply):
    """A step of the learner, and what became of it."""

    version: int
    parent: int | None
    state: str = Field(description="published, refused by the gate, or nothing, where there was nothing to learn")
    reason: str
    events: int = Field(description="events that the step consumed")
    used: int = Field(description="those of them that it learned from")
    on_disk: bool = Field(description="whether its weights are kept")
    slow: SlowGateReply | None = Field(description="null while it has not looked")
    trial: VerdictReply | None = Field(description="null where no trial of it has ended")


class NoticeReply(Reply):
    """A sign that what serves is losing what the first version could, as reports of runs show it."""

    kind: Literal["collapse", "idle"]
    name: str
    text: str


class LearnerReply(Reply):
    """How the learner is."""

    state: str
    fault: str | None = Field(None, description="what it fails at; operators only")


class VersionsReply(Reply):
    """What serves, what is tried, and every step."""

    object: Literal["list"]
    current: int = Field(description="the version that learning goes on from; without a trial it serves, too")
    anchor: int = Field(description="the version that what may be lost is measured from")
    serving: int
    resident: list[int] = Field(description="versions whose weights are in memory")
    learner: LearnerReply
    trial: TrialReply | None = Field(description="null where the server tries no versions")
    pins: dict[str, int] | None = Field(None, description="user to version; operators only")
    notices: list[NoticeReply] = Field(description="signs of collapse of the version that serves, held out")
    versions: list[VersionReply]


@routes.get("", responses={200: {"model": VersionsReply}})
async def versions(request: Request) -> dict[str, Any]:
    """What serves, what is on trial and how far that is, and every step with its verdict."""
    service = service_of(request)
    caller: Caller = request.state.caller
    overview = await asyncio.to_thread(service.versions.overview)
    stats = service.engine.stats()
    supervisor = service.supervisor
    learner = {"state": "none"} if supervisor is None else {"state": supervisor.state, "fault": supervisor.fault}
    if service.canary is not None:
        overview["trial"] = await asyncio.to_thread(service.canary.summary)
    if not caller.may("operate"):
        overview.pop("pins")
        learner.pop("fault", None)
    return {
        "object": "list",
        "serving": stats["version"],
        "resident": stats["resident"],
        "learner": learner,
        "notices": [dataclasses.asdict(notice) for notice in notices(held_out(overview, stats["version"]), OPTIMISED)],
        **overview,
    }


def held_out(overview: Mapping[str, Any], serving: int) -> dict[str, Series]:
    """What the slow gate measured of the version that serves and of its ancestors, as the series of a run."""
    rows = {row["version"]: row for row in overview["versions"]}
    line, number = [], serving
    while number in rows:
        line.append(rows[number])
        number = -1 if rows[number]["parent"] is None else rows[number]["parent"]
    series: dict[str, Series] = {}
    for row in reversed(line):
        for name, value in ((row["slow"] or {}).get("numbers") or {}).items():
            series.setdefault(f"eval/{name}", []).append((row["version"], float(value)))
    return series


@routes.post("/{version}/promote")
async def promote(request: Request, version: Number) -> dict[str, Any]:
    """Let a version serve; what learns next starts from it. 409 for one that cannot."""
    service, _ = service_of(request), caller_of(request, "operate")
    return await _move(service, lambda: service.versions.promote(version))


@routes.post("/rollback")
async def roll_back(request: Request) -> dict[str, Any]:
    """Serve the nearest ancestor of the version that serves again, its optimizer included."""
    service, _ = service_of(request), caller_of(request, "operate")
    return await _move(service, service.versions.roll_back)


@routes.post("/pins")
async def pin(request: Request, body: PinRequest) -> dict[str, Any]:
    """Serve a user one version, whatever is published, or let them follow again. 409 for one that is not on disk."""
    service, _ = service_of(request), caller_of(request, "operate")
    try:
        await asyncio.to_thread(service.versions.pin, body.user, body.version)
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
