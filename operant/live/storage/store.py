"""The durable log of the live loop: prompts, completions, feedback, and the ledger of what each event did.

SQLite by default, PostgreSQL by URL. One process writes, and in it one thread: calls that wait at the same time share a
transaction, each in a savepoint of its own, and every call returns after the commit. So what was acknowledged survives
kill -9, and offsets have no gaps. Any process may read.

The learner's records (`versions.StepRecord`) are the truth about what was consumed; `Store.reconcile` fills the ledger
from them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import sqlalchemy as sa

from operant.data.feedback_log import subject
from operant.data.preferences import reward_of
from operant.live.storage.database import Database, StoreFault
from operant.live.storage.feedback import FORGOTTEN
from operant.live.storage.tables import ARRAYS, COMPLETIONS, EVENTS, OUTCOMES, PROMPTS, STEPS
from operant.live.storage.versions import Outcome, StepRecord
from operant.types import Completion, Feedback, OperantError, Prompt, Sampling

__all__ = [
    "Conflict", "EventStory", "Origin", "Receipt", "Store", "StoreFault", "StoredCompletion", "UnknownCompletion",
]  # fmt: skip

log = logging.getLogger(__name__)

HELD_SECONDS = 600.0  # an event waits for its completion to be written, but not for ever
ROOM = 1 << 20  # bytes that have to be free for the store to be ready
GONE = Outcome("unused", "forgotten: its source has taken everything back")

Status = Literal["begun", "complete", "partial", "failed", "deleted"]
State = Literal["pending", "used", "superseded", "unused"]


class UnknownCompletion(OperantError):
    """There is no such completion in the store."""


class Conflict(OperantError):
    """An idempotency key was used before for something else."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Who asked for a completion, of which version, and how. created: seconds since the epoch; None is now."""

    route: str = ""
    user: str = ""
    model_version: int = 0
    request: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    created: float | None = None


@dataclass(frozen=True, slots=True)
class StoredCompletion:
    """One interaction. `completion` is None until it is written, and when the answer was lost with its process.

    status: "begun" while it is being written; "complete"; "partial" (the client went away); "failed".
    created: seconds since the epoch.
    """

    id: str
    prompt: Prompt
    completion: Completion | None
    status: Status
    route: str
    user: str
    model_version: int
    metadata: dict[str, str]
    request: dict[str, Any]
    created: float


@dataclass(frozen=True, slots=True)
class Receipt:
    """That an event is stored. duplicate: it was before, under this id; state is today's."""

    id: str
    state: State
    duplicate: bool
    offset: int


@dataclass(frozen=True, slots=True)
class EventStory:
    """An event and what became of it (see `versions.Outcome`). `version` is the number of its step.

    times: seconds since the epoch, those that are known of received, queued, begun, stepped, gated, served.
    """

    offset: int
    event: Feedback
    tags: dict[str, str]
    state: State
    reason: str = ""
    version: int | None = None
    advantage: float | None = None
    logprob_before: float | None = None
    logprob_after: float | None = None
    times: dict[str, float] = field(default_factory=dict)


class Store:
    """The store at `url`: a file ending in .db or .sqlite, sqlite:///FILE, or postgresql://…

    Every method may be called from any thread, blocks until it is done, and raises StoreFault when the database cannot
    be read or written. Opened for writing, it brings the tables up to date and marks answers that were being written
    when the last process died as failed.

    Raises OperantError when another process writes it, or, with `read_only`, when there is none of today's revision.
    """

    def __init__(self, url: str | Path, *, read_only: bool = False) -> None:
        self.database = Database(url, read_only=read_only)
        self.name = self.database.name
        self._closing = threading.Event()
        self._retaining: threading.Thread | None = None
        if not read_only:
            lost = sa.update(COMPLETIONS).where(COMPLETIONS.c.status == "begun").values(status="failed")
            self.database.write(lambda connection: connection.execute(lost))

    def close(self) -> None:
        """Write what is waiting, and let go. Calls after this one raise OperantError."""
        self._closing.set()
        if self._retaining is not None:
            self._retaining.join()
        self.database.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- interactions -------------------------------------------------------------------------------------------------

    def begin(
        self,
        completion_id: str,
        prompt: Prompt,
        sampling: Sampling | None,
        origin: Origin = Origin(),
    ) -> None:
        """Write down that this completion is being written, before a byte of it leaves.

        Raises OperantError when the id is taken, or the prompt has inputs beside its text.
        """
        if prompt.inputs is not None:
            raise OperantError(f"prompt {prompt.id} has inputs beside its text, which the store does not hold")
        body = {
            "id": prompt.id, "text": prompt.text, "messages": prompt.messages, "references": prompt.references,
            "task": prompt.task, "meta": prompt.meta,
        }  # fmt: skip
        row = {
            "id": completion_id, "status": "begun", "route": origin.route, "user": origin.user,
            "model_version": origin.model_version, "created": time.time() if origin.created is None else origin.created,
            "request": dict(origin.request), "metadata": dict(origin.metadata),
            "sampling": None if sampling is None else dataclasses.asdict(sampling),
        }  # fmt: skip

        def run(connection: sa.Connection) -> None:
            if connection.scalar(sa.select(COMPLETIONS.c.number).where(COMPLETIONS.c.id == completion_id)):
                raise OperantError(f"there is a completion {completion_id} already; give each one its own id")
            key = _store_prompt(connection, prompt, body)
            connection.execute(sa.insert(COMPLETIONS).values(prompt=key, **row))

        self.database.write(run)

    def complete(self, completion: Completion, status: Literal["complete", "partial", "failed"] = "complete") -> None:
        """Write down the answer, before its last byte leaves.

        Raises UnknownCompletion when it was not begun, and OperantError when it is written already.
        """
        answer = {
            "text": completion.text, "stop_reason": completion.stop_reason, "truncated": completion.truncated,
            "tokenizer_hash": completion.tokenizer_hash, "template_hash": completion.template_hash,
            "meta": completion.meta,
        }  # fmt: skip
        values = {name: getattr(completion, name) for name in ARRAYS} | {"answer": answer, "status": status}
        if completion.sampling is not None:
            values["sampling"] = dataclasses.asdict(completion.sampling)
        under_way = sa.and_(COMPLETIONS.c.id == completion.id, COMPLETIONS.c.status == "begun")

        def run(connection: sa.Connection) -> None:
            if connection.execute(sa.update(COMPLETIONS).where(under_way).values(**values)).rowcount:
                return
            status = self._status(connection, completion.id)
            if status is None:
                raise UnknownCompletion(f"completion {completion.id} was not begun")
            if status != "deleted":  # while it was written, somebody wanted it gone
                raise OperantError(f"completion {completion.id} is written already")

        self.database.write(run)

    def completion(self, completion_id: str) -> StoredCompletion | None:
        """An interaction by the id of its completion; None when there is none, or it was deleted."""
        with self.database.reading() as connection:
            row = connection.execute(_interactions().where(COMPLETIONS.c.id == completion_id)).first()
        return None if row is None else _completion_of_row(row)

    def set_metadata(self, completion_id: str, metadata: Mapping[str, str]) -> dict[str, str]:
        """Replace a completion's metadata. Raises UnknownCompletion."""
        there = sa.and_(COMPLETIONS.c.id == completion_id, COMPLETIONS.c.status != "deleted")

        def run(connection: sa.Connection) -> None:
            new = sa.update(COMPLETIONS).where(there).values(metadata=dict(metadata))
            if not connection.execute(new).rowcount:
                raise UnknownCompletion(_unknown(completion_id))

        self.database.write(run)
        return dict(metadata)

    def list_completions(
        self,
        after: str | None = None,
        limit: int = 20,
        metadata: Mapping[str, str] | None = None,
        order: Literal["asc", "desc"] = "asc",
        prefix: str = "",
    ) -> list[StoredCompletion]:
        """Completions by the time of their begin, of these metadata, with ids that begin with `prefix`.

        Raises UnknownCompletion when there is no completion `after`.
        """
        number = COMPLETIONS.c.number
        first = sa.select(number, COMPLETIONS.c.metadata).where(
            COMPLETIONS.c.status != "deleted", COMPLETIONS.c.id.startswith(prefix, autoescape=True)
        )
        with self.database.reading() as connection:
            if after is not None:
                place = connection.scalar(sa.select(number).where(COMPLETIONS.c.id == after))
                if place is None:
                    raise UnknownCompletion(_unknown(after))
                first = first.where(number > place if order == "asc" else number < place)
            wanted = (metadata or {}).items()
            numbers: list[int] = []
            for row in connection.execute(first.order_by(number if order == "asc" else number.desc())):
                if len(numbers) >= limit:
                    break
                if wanted <= row.metadata.items():
                    numbers.append(row.number)
            rows = connection.execute(_interactions().where(number.in_(numbers))).all()
        found = {row.number: _completion_of_row(row) for row in rows}
        return [found[n] for n in numbers]

    def names(self) -> list[tuple[str, dict[str, str]]]:
        """The id and the metadata of every completion, oldest first."""
        query = sa.select(COMPLETIONS.c.id, COMPLETIONS.c.metadata).where(COMPLETIONS.c.status != "deleted")
        with self.database.reading() as connection:
            return [(row.id, row.metadata) for row in connection.execute(query.order_by(COMPLETIONS.c.number))]

    def delete(self, completion_id: str) -> bool:
        """Empty a completion, its prompt and what people wrote about it, for good; False when there was none.

        The events stay as facts without words, so that offsets and counts hold.
        """

        def run(connection: sa.Connection) -> bool:
            if self._status(connection, completion_id) in (None, "deleted"):
                return False
            emptied = dict.fromkeys(ARRAYS) | {
                "status": "deleted", "prompt": None, "answer": sa.null(), "request": {}, "metadata": {}, "user": "",
            }  # fmt: skip
            connection.execute(sa.update(COMPLETIONS).where(COMPLETIONS.c.id == completion_id).values(**emptied))
            words = EVENTS.c.kind.in_(("edit", "comment"))
            about = sa.update(EVENTS).where(EVENTS.c.completion_id == completion_id)
            connection.execute(about.values(tags={}))
            connection.execute(about.where(words).values(value=None))
            _drop_prompts(connection)
            return True

        gone: bool = self.database.write(run)
        return gone

    def _status(self, connection: sa.Connection, completion_id: str) -> Status | None:
        found: Status | None = connection.scalar(
            sa.select(COMPLETIONS.c.status).where(COMPLETIONS.c.id == completion_id)
        )
        return found

    # --- feedback -----------------------------------------------------------------------------------------------------

    def add_feedback(self, feedback: Feedback, *, body_hash: str, tags: Mapping[str, str] | None = None) -> Receipt:
        """Append an event. An idempotency key that the source has used before gives the first receipt again.

        An empty key is filled in: an event that repeats the last thing that its source said of the same subject
        (`feedback_log.subject`) is that one again, and any other a new one, so that up, down, up are three.

        Raises UnknownCompletion; Conflict when the key was used for another body.
        """

        def run(connection: sa.Connection) -> Receipt:
            key = feedback.idempotency_key
            first = _repeated(connection, feedback, body_hash) if not key else connection.execute(
                _story_query().where(EVENTS.c.source == feedback.source, EVENTS.c.idempotency_key == key)
            ).first()  # fmt: skip
            if first is not None:
                if first.body_hash != body_hash:
                    raise Conflict(
                        f"{feedback.source} has used the idempotency key {key!r} for something else; give each its own"
                    )
                return Receipt(first.id, first.state or "pending", True, first.offset)
            if self._status(connection, feedback.completion_id) in (None, "deleted"):
                raise UnknownCompletion(_unknown(feedback.completion_id))
            last = sa.select(sa.func.coalesce(sa.func.max(EVENTS.c.offset), 0)).scalar_subquery()
            consumed = sa.select(sa.func.coalesce(sa.func.max(STEPS.c.consumed_offset), 0)).scalar_subquery()
            # an older copy of the store must not give an offset again that the learner has consumed
            offset = 1 + max(connection.execute(sa.select(last, consumed)).one())
            start, end = feedback.span or (None, None)
            connection.execute(
                sa.insert(EVENTS).values(
                    offset=offset, id=feedback.id, completion_id=feedback.completion_id, kind=feedback.kind,
                    value=feedback.value, span_start=start, span_end=end, source=feedback.source,
                    idempotency_key=key or f"{offset}-{body_hash}", body_hash=body_hash, time=feedback.time,
                    received=time.time(), tags=dict(tags or {}),
                )
            )  # fmt: skip
            return Receipt(feedback.id, "pending", False, offset)

        receipt: Receipt = self.database.write(run)
        return receipt

    def events_after(self, offset: int, limit: int) -> list[tuple[int, Feedback]]:
        """At most `limit` events in the order of their offsets, from the first after `offset`.

        They end before an event whose completion is still being written: its tokens would be missing. What a forgotten
        source said is not among them.
        """
        query = sa.select(EVENTS, COMPLETIONS.c.status, COMPLETIONS.c.created).join(COMPLETIONS)
        with self.database.reading() as connection:
            there = EVENTS.c.offset > offset, EVENTS.c.source != FORGOTTEN
            rows = connection.execute(query.where(*there).order_by(EVENTS.c.offset).limit(limit)).all()
        found, recent = [], time.time() - HELD_SECONDS
        for row in rows:
            if row.status == "begun" and row.created > recent:
                break
            found.append((int(row.offset), _event_of_row(row)))
        return found

    def asked_by(self, user: str) -> bool:
        """Whether a completion of this user is stored."""
        query = sa.select(COMPLETIONS.c.number).where(COMPLETIONS.c.user == user, COMPLETIONS.c.status != "deleted")
        with self.database.reading() as connection:
            return bool(user) and connection.execute(query.limit(1)).first() is not None

    def said_by_or_to(self, source: str) -> list[str]:
        """Ids, in the order of their offsets, of what a source has said and of what anybody has said about answers that
        it, as a user, has asked for."""
        asked = sa.select(COMPLETIONS.c.id).where(COMPLETIONS.c.user == source, COMPLETIONS.c.status != "deleted")
        columns = EVENTS.c.id, EVENTS.c.source, EVENTS.c.completion_id, EVENTS.c.kind, EVENTS.c.value
        with self.database.reading() as connection:
            answers = set(connection.scalars(asked)) if source else set()
            rows = connection.execute(
                sa.select(*columns).order_by(EVENTS.c.offset).where(
                    sa.or_(EVENTS.c.source == source, EVENTS.c.completion_id.in_(asked), EVENTS.c.kind == "comparison")
                )
            ).all()  # fmt: skip
        return [
            row.id for row in rows
            if row.source == source or row.completion_id in answers
            or (row.kind == "comparison" and row.value in answers)
        ]  # fmt: skip

    def forget(self, source: str) -> int:
        """Empty everything that a source has said and, as a user, asked; the number of its events.

        Events stay as facts: an offset, a kind and a time, of the source "", unused. Answers go as by `delete`.
        """
        asked = sa.select(COMPLETIONS.c.id).where(COMPLETIONS.c.user == source, COMPLETIONS.c.status != "deleted")
        with self.database.reading() as connection:
            names = list(connection.scalars(asked))
        for name in names:
            self.delete(name)

        def run(connection: sa.Connection) -> int:
            own = sa.select(EVENTS.c.offset).where(EVENTS.c.source == source)
            offsets = list(connection.scalars(own))
            connection.execute(sa.delete(OUTCOMES).where(OUTCOMES.c.offset.in_(own)))
            for offset in offsets:
                connection.execute(
                    sa.update(EVENTS).where(EVENTS.c.offset == offset).values(
                        source=FORGOTTEN, value=None, span_start=None, span_end=None, tags={}, body_hash="",
                        idempotency_key=f"forgotten-{offset}",
                    )
                )  # fmt: skip
            first = connection.scalar(sa.select(sa.func.min(STEPS.c.version)))
            if first is not None and offsets:
                gone = dataclasses.asdict(GONE)
                connection.execute(sa.insert(OUTCOMES), [{"offset": o, "version": first, **gone} for o in offsets])
            return len(offsets)

        count: int = self.database.write(run)
        return count

    def story(self, feedback_id: str) -> EventStory | None:
        """What became of an event; None when there is no such event."""
        with self.database.reading() as connection:
            row = connection.execute(_story_query().where(EVENTS.c.id == feedback_id)).first()
        return None if row is None else _story(row)

    def events(
        self,
        *,
        completion_id: str | None = None,
        source: str | None = None,
        kind: str | None = None,
        state: State | None = None,
        after: int = 0,
        limit: int = 100,
    ) -> list[EventStory]:
        """Events by their offsets, from the first after `after`, of what is asked for."""
        query = _story_query().where(EVENTS.c.offset > after).order_by(EVENTS.c.offset).limit(limit)
        for column, value in (
            (EVENTS.c.completion_id, completion_id),
            (EVENTS.c.source, source),
            (EVENTS.c.kind, kind),
        ):
            if value is not None:
                query = query.where(column == value)
        if state is not None:
            query = query.where(sa.func.coalesce(OUTCOMES.c.state, "pending") == state)
        with self.database.reading() as connection:
            return [_story(row) for row in connection.execute(query)]

    # --- the ledger ---------------------------------------------------------------------------------------------------

    def reconcile(self, records: Iterable[StepRecord]) -> None:
        """Fill the ledger from the learner's finished records. Those that are in it already change nothing."""
        finished = [record for record in records if record.state != "pending"]

        def run(connection: sa.Connection) -> None:
            there = set(connection.scalars(sa.select(STEPS.c.version)))
            for record in finished:
                if record.version not in there:
                    _enter(connection, record)

        self.database.write(run)

    def served(self, version: int, at: float) -> None:
        """That requests are served by this version since then; call it after `reconcile`.

        What its ancestors learned is served with it, if it was not before.
        """

        def run(connection: sa.Connection) -> None:
            ancestor = version
            while True:
                query = sa.select(STEPS.c.parent, STEPS.c.served).where(STEPS.c.version == ancestor)
                step = connection.execute(query).first()
                if step is None or step.served is not None:
                    return
                connection.execute(sa.update(STEPS).where(STEPS.c.version == ancestor).values(served=at))
                ancestor = step.parent

        self.database.write(run)

    def counts(self) -> dict[str, Any]:
        """{"completions", "events", "pending", "used", "superseded", "unused", "reasons": {why unused: how many}}.

        events = pending + used + superseded + the sum of reasons.
        """
        total = sa.select(sa.func.count())
        with self.database.reading() as connection:
            events = connection.scalar(total.select_from(EVENTS)) or 0
            completions = connection.scalar(total.where(COMPLETIONS.c.status != "deleted")) or 0
            groups = connection.execute(
                sa.select(OUTCOMES.c.state, OUTCOMES.c.reason, sa.func.count()).group_by(
                    OUTCOMES.c.state, OUTCOMES.c.reason
                )
            ).all()
        found: dict[str, Any] = {"completions": completions, "events": events, "pending": events}
        found |= {"used": 0, "superseded": 0, "unused": 0, "reasons": {}}
        for state, reason, count in groups:
            found[state] += count
            found["pending"] -= count
            if state == "unused":
                found["reasons"][reason] = count
        return found

    def sources(self, *, score_low: float = 0.0, score_high: float = 1.0) -> list[dict[str, Any]]:
        """For each source {"source", "events", "pending", "used", "superseded", "unused", "reward"}, the most talkative
        first. reward: mean of its thumbs and scores on [−1, 1], None where there are none."""
        state = sa.func.coalesce(OUTCOMES.c.state, "pending").label("state")
        said = EVENTS.c.source, EVENTS.c.kind, EVENTS.c.value, state
        query = sa.select(*said, sa.func.count().label("times")).outerjoin(OUTCOMES).group_by(*said)
        found: dict[str, dict[str, Any]] = {}
        rewards: dict[str, list[float]] = {}
        with self.database.reading() as connection:
            rows = connection.execute(query.where(EVENTS.c.source != FORGOTTEN)).all()
        for source, kind, value, became, times in rows:
            row = found.setdefault(
                source,
                {"source": source, "events": 0, "pending": 0, "used": 0, "superseded": 0, "unused": 0, "reward": None},
            )
            row["events"] += times
            row[became] += times
            number = reward_of(kind, value, score_low, score_high)
            if number is not None:
                summed = rewards.setdefault(source, [0.0, 0.0])
                summed[0] += times * number
                summed[1] += times
        for source, (total, count) in rewards.items():
            found[source]["reward"] = total / count
        return sorted(found.values(), key=lambda row: (-row["events"], row["source"]))

    # --- care ---------------------------------------------------------------------------------------------------------

    def ready(self) -> None:
        """Return when an answer could be written down; raises StoreFault when none can be."""
        self.database.write(lambda connection: None)
        self.database.expect_room(ROOM)

    def backup(self, path: str | Path) -> None:
        """Copy the store, as it is at one moment and while it is used, to an SQLite file that operant can open.

        Raises OperantError when there is something at `path`, or it cannot be written.
        """
        self.database.backup(path)

    def prune(self, max_age_s: float = 0.0, max_bytes: int = 0) -> dict[str, int]:
        """Remove old interactions with their feedback; {"completions", "events"}: how many are gone.

        Those begun more than max_age_s seconds ago go, and the oldest until what prompts and answers take is at most
        max_bytes; 0 leaves that rule out. What a pending event is about, and what is being written, stays.
        """

        def run(connection: sa.Connection) -> dict[str, int]:
            gone = _prunable(connection, max_age_s, max_bytes)
            events = 0
            for first in range(0, len(gone), 500):
                some = gone[first : first + 500]
                events += connection.execute(sa.delete(EVENTS).where(EVENTS.c.completion_id.in_(some))).rowcount
                connection.execute(sa.delete(COMPLETIONS).where(COMPLETIONS.c.id.in_(some)))
            _drop_prompts(connection)
            return {"completions": len(gone), "events": events}

        counts: dict[str, int] = self.database.write(run)
        if counts["completions"]:
            self.database.shrink()
        return counts

    def retain(
        self, max_age_s: float, max_bytes: int, every_s: float = 3600.0, *, unless: Callable[[], bool] = lambda: False
    ) -> None:
        """Prune by these rules, now and every so many seconds, until the store is closed; not while `unless` is true,
        but soon after it."""

        def run() -> None:
            while True:
                if unless():
                    if self._closing.wait(min(every_s, 10.0)):
                        return
                    continue
                try:
                    gone = self.prune(max_age_s, max_bytes)
                except OperantError as error:
                    log.warning("what is old stays for now: %s", error)
                else:
                    log.info("removed what is old: %s", gone)
                if self._closing.wait(every_s):
                    return

        if max_age_s or max_bytes:
            self._retaining = threading.Thread(target=run, name="store-retention", daemon=True)
            self._retaining.start()


# --- queries ----------------------------------------------------------------------------------------------------------


def _unknown(completion_id: str) -> str:
    return f"there is no stored completion {completion_id}; take its id from the response, with store not false"


def _store_prompt(connection: sa.Connection, prompt: Prompt, body: Mapping[str, Any]) -> bytes:
    """The key of a prompt, which is written once however often it is asked."""
    key = hashlib.sha256(prompt.tokens.astype("<i8").tobytes() + json.dumps(body, sort_keys=True).encode()).digest()
    if connection.scalar(sa.select(sa.true()).where(PROMPTS.c.key == key)) is None:
        connection.execute(sa.insert(PROMPTS).values(key=key, tokens=prompt.tokens, body=body))
    return key


def _drop_prompts(connection: sa.Connection) -> None:
    """Those that nothing asks any more."""
    asked = sa.exists().where(COMPLETIONS.c.prompt == PROMPTS.c.key)
    connection.execute(sa.delete(PROMPTS).where(~asked))


def _interactions() -> sa.Select[Any]:
    asked = PROMPTS.c.tokens.label("prompt_tokens"), PROMPTS.c.body.label("prompt_body")
    return sa.select(COMPLETIONS, *asked).join(PROMPTS)


def _completion_of_row(row: sa.Row[Any]) -> StoredCompletion:
    body = dict(row.prompt_body)
    messages = None if body["messages"] is None else tuple(body["messages"])
    body |= {"messages": messages, "references": tuple(body["references"])}
    prompt = Prompt(tokens=row.prompt_tokens, **body)
    completion = None
    if row.answer is not None:
        drawn: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in (row.sampling or {}).items()}
        sampling = Sampling(**drawn) if drawn else None
        arrays = {name: getattr(row, name) for name in ARRAYS}
        completion = Completion(id=row.id, prompt_id=prompt.id, sampling=sampling, **row.answer, **arrays)
    return StoredCompletion(
        row.id, prompt, completion, row.status, row.route, row.user, row.model_version, row.metadata, row.request,
        row.created,
    )  # fmt: skip


def _story_query() -> sa.Select[Any]:
    ledger = [OUTCOMES.c[n] for n in ("state", "reason", "version", "advantage", "logprob_before", "logprob_after")]
    return (
        sa.select(EVENTS, *ledger, STEPS.c.times, STEPS.c.served)
        .outerjoin(OUTCOMES, OUTCOMES.c.offset == EVENTS.c.offset)
        .outerjoin(STEPS, STEPS.c.version == OUTCOMES.c.version)
    )


def _event_of_row(row: sa.Row[Any]) -> Feedback:
    span = None if row.span_start is None else (row.span_start, row.span_end)
    return Feedback(
        row.id, row.completion_id, row.kind, row.value, row.source, row.idempotency_key, row.time, span
    )  # fmt: skip


def _story(row: sa.Row[Any]) -> EventStory:
    times = {"received": row.received, **(row.times or {})}
    if row.served is not None and row.state == "used":
        times["served"] = row.served
    return EventStory(
        row.offset, _event_of_row(row), row.tags, row.state or "pending", row.reason or "", row.version, row.advantage,
        row.logprob_before, row.logprob_after, times,
    )  # fmt: skip


def _repeated(connection: sa.Connection, feedback: Feedback, body_hash: str) -> sa.Row[Any] | None:
    """The event that this one says again."""
    said = _story_query().where(EVENTS.c.source == feedback.source, EVENTS.c.completion_id == feedback.completion_id)
    for row in connection.execute(said.order_by(EVENTS.c.offset.desc())):
        if row.body_hash == body_hash:
            return row
        if row.kind == "retract" or subject(_event_of_row(row)) == subject(feedback):
            return None
    return None


def _enter(connection: sa.Connection, record: StepRecord) -> None:
    """A step and what became of its events. An event that the record does not tell of was consumed all the same."""
    connection.execute(
        sa.insert(STEPS).values(
            version=record.version, parent=record.parent, consumed_offset=record.consumed_offset, state=record.state,
            times=record.times,
        )
    )  # fmt: skip
    unsaid = Outcome("unused", "its step says nothing of it")
    query = sa.select(EVENTS.c.offset, EVENTS.c.id, EVENTS.c.source).where(EVENTS.c.id.in_(record.events))
    rows = [
        {
            "offset": offset, "version": record.version,
            **dataclasses.asdict(GONE if source == FORGOTTEN else record.outcomes.get(name, unsaid)),
        }
        for offset, name, source in connection.execute(query)
    ]  # fmt: skip
    if rows:
        # a step that is made again says anew what became of them
        connection.execute(sa.delete(OUTCOMES).where(OUTCOMES.c.offset.in_([row["offset"] for row in rows])))
        connection.execute(sa.insert(OUTCOMES), rows)


def _prunable(connection: sa.Connection, max_age_s: float, max_bytes: int) -> list[str]:
    """Ids of the completions that go, oldest first."""
    waiting = sa.select(EVENTS.c.completion_id, EVENTS.c.kind, EVENTS.c.value).outerjoin(OUTCOMES)
    held: set[Any] = set()
    for name, kind, value in connection.execute(waiting.where(OUTCOMES.c.offset.is_(None))):
        held |= {name, value} if kind == "comparison" else {name}
    columns = [PROMPTS.c.body, PROMPTS.c.tokens]
    columns += [COMPLETIONS.c[name] for name in ("sampling", "request", "metadata", "answer", *ARRAYS)]
    taken: sa.ColumnElement[int] = sa.literal(0)
    for column in columns:
        taken = taken + sa.func.coalesce(sa.func.length(column), 0)
    rows = connection.execute(
        sa.select(COMPLETIONS.c.id, COMPLETIONS.c.status, COMPLETIONS.c.created, taken.label("taken"))
        .outerjoin(PROMPTS)
        .order_by(COMPLETIONS.c.number)
    ).all()
    total, oldest, gone = sum(row.taken for row in rows), time.time() - max_age_s, []
    for row in rows:
        if row.id in held or row.status == "begun":
            continue
        if (max_age_s and row.created < oldest) or (max_bytes and total > max_bytes):
            gone.append(row.id)
            total -= row.taken
    return gone
