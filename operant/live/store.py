"""The durable log of the live loop: prompts, completions, feedback, and the ledger of what became of each event.

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
import os
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import DTypeLike, NDArray

try:
    import sqlalchemy as sa
    from sqlalchemy import exc
except ImportError as error:
    from operant.types import OperantError

    raise OperantError("the store needs SQLAlchemy: pip install 'operant[live]'") from error

from operant.live.migrations import upgrade
from operant.live.versions import Outcome, StepRecord
from operant.replay import subject
from operant.types import Completion, Feedback, OperantError, Prompt, Sampling

__all__ = [
    "Conflict", "EventStory", "Receipt", "Store", "StoreFault", "StoredCompletion", "UnknownCompletion", "journal_mode",
]  # fmt: skip

log = logging.getLogger(__name__)

REVISION = "0002"  # of the tables below
LOCK_SECONDS = 5.0  # for a writer that was killed to be gone
BUSY_SECONDS = 10.0  # for other connections to let go of the database
GROUP = 256  # calls that share a commit, at most
HELD_SECONDS = 600.0  # an event waits for its completion to be written, but not for ever
_LOCK_KEY = 0x6F706572616E74  # "operant", PostgreSQL's advisory lock of the one writer

Status = Literal["begun", "complete", "partial", "failed", "deleted"]
State = Literal["pending", "used", "superseded", "unused"]


class StoreFault(OperantError):
    """The database cannot be read or written just now; nothing of the call was stored."""


class UnknownCompletion(OperantError):
    """There is no such completion in the store."""


class Conflict(OperantError):
    """An idempotency key was used before for something else."""


# --- tables -----------------------------------------------------------------------------------------------------------


class Document(sa.types.TypeDecorator[Any]):
    """Any JSON value as text. NUL and lone surrogates, which a model may well write, survive in both databases."""

    impl = sa.Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: sa.Dialect) -> str:
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        try:
            text.encode()
        except UnicodeEncodeError:
            text = json.dumps(value, separators=(",", ":"))
        return text

    def process_result_value(self, value: str | None, dialect: sa.Dialect) -> Any:
        return None if value is None else json.loads(value)


class Array(sa.types.TypeDecorator[NDArray[Any]]):
    """A vector as the bytes of `kept`, read back as `dtype`."""

    impl = sa.LargeBinary
    cache_ok = True

    def __init__(self, kept: str, dtype: DTypeLike) -> None:
        super().__init__()
        self.kept, self.dtype = kept, np.dtype(dtype)

    def process_bind_param(self, value: NDArray[Any] | None, dialect: sa.Dialect) -> bytes | None:
        return None if value is None else np.asarray(value).astype(self.kept).tobytes()

    def process_result_value(self, value: bytes | None, dialect: sa.Dialect) -> NDArray[Any] | None:
        return None if value is None else np.frombuffer(value, self.kept).astype(self.dtype)


def _ints() -> Array:
    return Array("<i4", np.int64)


def _floats() -> Array:
    return Array("<f4", np.float32)


TABLES = sa.MetaData()
PROMPTS = sa.Table(
    "prompts", TABLES,
    sa.Column("key", sa.LargeBinary, primary_key=True),  # SHA-256 of the whole prompt
    sa.Column("tokens", _ints(), nullable=False),
    sa.Column("body", Document, nullable=False),
)  # fmt: skip
ARRAYS = {
    "tokens": _ints(), "text_ends": _ints(), "text_reach": _ints(), "behavior_logprobs": _floats(),
    "model_logprobs": _floats(), "sampled": Array("?", np.bool_), "policy_version": _ints(),
    "stream_rewards": _floats(),
}  # fmt: skip
COMPLETIONS = sa.Table(
    "completions", TABLES,
    sa.Column("number", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True),
    sa.Column("id", sa.Text, nullable=False, unique=True),
    sa.Column("prompt", sa.LargeBinary, sa.ForeignKey(PROMPTS.c.key), index=True),
    sa.Column("status", sa.Text, nullable=False),
    sa.Column("route", Document, nullable=False),
    sa.Column("user", Document, nullable=False),
    sa.Column("model_version", sa.BigInteger, nullable=False),
    sa.Column("created", sa.Double, nullable=False),
    sa.Column("sampling", Document, nullable=False),
    sa.Column("request", Document, nullable=False),
    sa.Column("metadata", Document, nullable=False),
    sa.Column("answer", Document),
    *(sa.Column(name, kind) for name, kind in ARRAYS.items()),
)  # fmt: skip
EVENTS = sa.Table(
    "events", TABLES,
    sa.Column("offset", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("id", sa.Text, nullable=False, unique=True),
    sa.Column("completion_id", sa.Text, sa.ForeignKey(COMPLETIONS.c.id), nullable=False, index=True),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("value", Document, nullable=False),
    sa.Column("span_start", sa.BigInteger),
    sa.Column("span_end", sa.BigInteger),
    sa.Column("source", sa.Text, nullable=False),
    sa.Column("idempotency_key", sa.Text, nullable=False),
    sa.Column("body_hash", sa.Text, nullable=False),
    sa.Column("time", sa.Double, nullable=False),
    sa.Column("received", sa.Double, nullable=False),
    sa.Column("tags", Document, nullable=False),
    sa.UniqueConstraint("source", "idempotency_key"),
)  # fmt: skip
STEPS = sa.Table(
    "steps", TABLES,
    sa.Column("version", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("parent", sa.BigInteger, nullable=False),
    sa.Column("consumed_offset", sa.BigInteger, nullable=False),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("times", Document, nullable=False),
    sa.Column("served", sa.Double),
)  # fmt: skip
OUTCOMES = sa.Table(
    "outcomes", TABLES,
    sa.Column(
        "offset", sa.BigInteger, sa.ForeignKey(EVENTS.c.offset, ondelete="CASCADE"), primary_key=True,
        autoincrement=False,
    ),
    sa.Column("version", sa.BigInteger, sa.ForeignKey(STEPS.c.version), nullable=False, index=True),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("advantage", sa.Double),
    sa.Column("logprob_before", sa.Double),
    sa.Column("logprob_after", sa.Double),
)  # fmt: skip


# --- what comes out ---------------------------------------------------------------------------------------------------


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


# --- the database -----------------------------------------------------------------------------------------------------


def journal_mode(version: tuple[int, ...]) -> tuple[str, str, str]:
    """(journal mode, synchronous, why) for this version of SQLite.

    From 3.7.0 to 3.51.2 a write-ahead log that is reset while two connections use it may corrupt the database; 3.50.7
    and 3.44.6 have the fix too (sqlite.org/wal.html, "The WAL-Reset Bug"). The rollback journal never had it, and with
    EXTRA its removal is durable too.
    """
    number = ".".join(map(str, version))
    if version >= (3, 51, 3) or (3, 50, 7) <= version < (3, 51) or (3, 44, 6) <= version < (3, 45):
        return "WAL", "FULL", f"SQLite {number} has the fix of the WAL-reset bug"
    return "DELETE", "EXTRA", f"SQLite {number} has the WAL-reset bug, so the rollback journal is used"


def _address(name: str) -> sa.URL:
    if name.endswith((".db", ".sqlite", ".sqlite3")) and "://" not in name:
        return sa.URL.create("sqlite", database=name)
    try:
        url = sa.make_url(name)
    except exc.ArgumentError:
        url = None
    kind = url.get_backend_name() if url is not None else ""
    if url is not None and kind == "sqlite" and url.database not in (None, "", ":memory:"):
        return url
    if url is not None and kind == "postgresql":
        return url.set(drivername="postgresql+psycopg")
    raise OperantError(
        f"{_without_password(name)} is no store; give --store FILE.db, sqlite:///FILE or postgresql://USER@HOST/NAME"
    )


def _without_password(name: str) -> str:
    scheme, middle, rest = name.rpartition("://")
    return f"{scheme}{middle}{rest.rpartition('@')[2]}"


def _connect(url: sa.URL, *, read_only: bool) -> sa.Engine:
    if url.get_backend_name() == "postgresql":
        options: dict[str, Any] = {"connect_timeout": int(BUSY_SECONDS)}
        if read_only:
            options["options"] = "-c default_transaction_read_only=on"
        try:
            return sa.create_engine(url, connect_args=options, pool_pre_ping=True)
        except ImportError as error:
            raise OperantError("a PostgreSQL store needs psycopg: pip install 'operant[postgres]'") from error
    engine = sa.create_engine(url, connect_args={"timeout": BUSY_SECONDS})
    synchronous = journal_mode(sqlite3.sqlite_version_info)[1]

    @sa.event.listens_for(engine, "connect")
    def settings(connection: sqlite3.Connection, _: Any) -> None:
        connection.isolation_level = None  # transactions begin below, so that savepoints are inside them
        connection.execute("PRAGMA foreign_keys=ON")
        connection.execute(f"PRAGMA synchronous={synchronous}")
        if read_only:  # not mode=ro, in which what a killed writer left could not be rolled back
            connection.execute("PRAGMA query_only=ON")

    @sa.event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        connection.exec_driver_sql(str(connection.get_execution_options().get("begin", "BEGIN")))

    return engine


def _plain(connection: sa.Connection) -> sqlite3.Connection:
    """The driver's own connection, outside of any transaction."""
    plain = connection.connection.driver_connection
    assert isinstance(plain, sqlite3.Connection)
    return plain


def _cause(error: BaseException) -> str:
    """The first fault of a chain, in one line: that a rollback failed too is of no interest."""
    while isinstance(error.__context__, exc.DBAPIError):
        error = error.__context__
    original = error.orig if isinstance(error, exc.DBAPIError) else error
    return " ".join(str(original).split()) or type(error).__name__


_FAULTS = (exc.OperationalError, exc.InternalError, exc.InterfaceError)  # of the database, not of what is written


@dataclass(slots=True)
class _Call:
    run: Callable[[sa.Connection], Any]
    future: Future[Any] = field(default_factory=Future)


class Store:
    """The store at `url`: a file ending in .db or .sqlite, sqlite:///FILE, or postgresql://…

    Every method may be called from any thread, blocks until it is done, and raises StoreFault when the database cannot
    be read or written. Opened for writing, it brings the tables up to date and marks answers that were being written
    when the last process died as failed.

    Raises OperantError when another process writes it, or, with `read_only`, when there is none of today's revision.
    """

    def __init__(self, url: str | Path, *, read_only: bool = False) -> None:
        self._url = _address(str(url))
        self.name = self._url.render_as_string()
        self.read_only = read_only
        self._sqlite = self._url.get_backend_name() == "sqlite"
        self._held = ExitStack()
        self._engine = _connect(self._url, read_only=read_only)
        self._held.callback(self._engine.dispose)
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._closing = threading.Lock()
        self._closed = False
        try:
            if read_only:
                self._expect_today()
            else:
                self._open()
        except BaseException:
            self._held.close()
            raise
        if not read_only:
            self._thread = threading.Thread(target=self._work, name="store", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Write what is waiting, and let go. Calls after this one raise OperantError."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
            self._calls.put(None)
        if not self.read_only:
            self._thread.join()
        self._held.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- opening ------------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        if self._sqlite:
            self._lock_file()
        try:
            if not self._sqlite:
                self._lock_server()
            with self._engine.connect() as connection:
                if self._sqlite:
                    self._set_journal(connection)
            with self._writing() as connection:
                now = self._revision(connection)
                if now is not None and now > REVISION:
                    raise OperantError(f"{self.name} was written by a newer operant; update this one")
                if now != REVISION:
                    upgrade(connection, REVISION)
                connection.execute(
                    sa.update(COMPLETIONS).where(COMPLETIONS.c.status == "begun").values(status="failed")
                )
        except (exc.DBAPIError, sqlite3.Error) as error:
            raise self._fault("opened", error) from error

    def _lock_file(self) -> None:
        assert self._url.database is not None
        file = Path(self._url.database)
        lock = FileLock(f"{file}.lock", timeout=LOCK_SECONDS)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._held.enter_context(lock)
        except Timeout:
            raise self._taken() from None
        except OSError as error:
            raise OperantError(f"{self.name} cannot be opened ({error.strerror}); give another --store") from error

    def _lock_server(self) -> None:
        connection = self._held.enter_context(self._engine.connect())
        connection = connection.execution_options(isolation_level="AUTOCOMMIT")
        until = time.monotonic() + LOCK_SECONDS
        while not connection.scalar(sa.select(sa.func.pg_try_advisory_lock(_LOCK_KEY))):
            if time.monotonic() > until:
                raise self._taken()
            time.sleep(0.05)

    def _taken(self) -> OperantError:
        return OperantError(f"another process writes {self.name}; stop that one, or give another --store")

    def _set_journal(self, connection: sa.Connection) -> None:
        mode, _, why = journal_mode(sqlite3.sqlite_version_info)
        plain = _plain(connection)
        plain.execute("PRAGMA auto_vacuum=INCREMENTAL")  # heeded by an empty file; then `prune` can shrink it
        now = plain.execute(f"PRAGMA journal_mode={mode}").fetchone()[0]
        log.info("%s: journal mode %s (%s)", self.name, now, why)

    def _revision(self, connection: sa.Connection) -> str | None:
        if not sa.inspect(connection).has_table("alembic_version"):
            return None
        found: str | None = connection.scalar(sa.text("SELECT version_num FROM alembic_version"))
        return found

    def _expect_today(self) -> None:
        if self._sqlite and not Path(str(self._url.database)).exists():
            raise OperantError(f"{self.name} is not there; operant serve --store makes one")
        with self._reading() as connection:
            now = self._revision(connection)
        if now is None:
            raise OperantError(f"{self.name} holds no store; operant serve --store makes one")
        if now != REVISION:
            which, what = ("newer", "update this one") if now > REVISION else ("older", "open it with operant serve")
            raise OperantError(f"{self.name} was written by an {which} operant; {what}".replace("an newer", "a newer"))

    # --- transactions -------------------------------------------------------------------------------------------------

    def _fault(self, what: str, error: BaseException) -> StoreFault:
        cause = _cause(error)
        cure = {
            "full": "free some space there", "disk i/o": "see whether its disk is full or failing",
            "locked": "another program holds it: let that one finish", "unable to open": "give another --store",
        }  # fmt: skip
        way = next((way for word, way in cure.items() if word in cause.lower()), "see that the database is up")
        return StoreFault(f"{self.name} cannot be {what} ({cause}); {way}, and try again")

    @contextmanager
    def _reading(self) -> Iterator[sa.Connection]:
        """One short transaction: what is read in it is of one moment."""
        if self._closed:
            raise OperantError(f"{self.name} is closed")
        try:
            with self._engine.connect() as connection:
                if not self._sqlite:
                    connection = connection.execution_options(isolation_level="REPEATABLE READ")
                yield connection
        except (exc.DBAPIError, sqlite3.Error) as error:
            raise self._fault("read", error) from error

    @contextmanager
    def _writing(self) -> Iterator[sa.Connection]:
        with self._engine.connect().execution_options(begin="BEGIN IMMEDIATE") as connection, connection.begin():
            yield connection

    def _write(self, run: Callable[[sa.Connection], Any]) -> Any:
        """Let the writing thread do this, and wait for its commit."""
        call = _Call(run)
        with self._closing:  # nothing may be put behind the end
            if self._closed:
                raise OperantError(f"{self.name} is closed")
            if self.read_only:
                raise OperantError(f"{self.name} is open for reading only")
            self._calls.put(call)
        return call.future.result()

    def _work(self) -> None:
        ending = False
        while not ending:
            group: list[_Call] = []
            waiting = self._calls.get()
            while True:
                if waiting is None:
                    ending = True
                    break
                group.append(waiting)
                if len(group) == GROUP:
                    break
                try:
                    waiting = self._calls.get_nowait()
                except queue.Empty:
                    break
            if group:
                self._commit(group)

    def _commit(self, group: Sequence[_Call]) -> None:
        done: list[tuple[_Call, Any, Exception | None]] = []
        begun = False
        try:
            with self._writing() as connection:
                begun = True
                for call in group:
                    try:
                        with connection.begin_nested():
                            done.append((call, call.run(connection), None))
                    except _FAULTS:
                        raise  # the transaction may be gone with the savepoint
                    except Exception as error:
                        done.append((call, None, error))
        except Exception as error:
            if begun and len(group) > 1:  # one that is too large for the disk, say, must not fail the others
                for call in group:
                    self._commit([call])
                return
            fault = self._fault("written", error) if isinstance(error, exc.DBAPIError) else error
            done = [(call, None, fault) for call in group]
        for call, result, failure in done:
            if failure is None:
                call.future.set_result(result)
            else:
                call.future.set_exception(failure)

    # --- interactions -------------------------------------------------------------------------------------------------

    def begin(
        self,
        completion_id: str,
        prompt: Prompt,
        sampling: Sampling | None,
        *,
        route: str = "",
        user: str = "",
        model_version: int = 0,
        request: Mapping[str, Any] | None = None,
        metadata: Mapping[str, str] | None = None,
        created: float | None = None,
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
            "id": completion_id, "status": "begun", "route": route, "user": user, "model_version": model_version,
            "created": time.time() if created is None else created, "request": dict(request or {}),
            "sampling": None if sampling is None else dataclasses.asdict(sampling), "metadata": dict(metadata or {}),
        }  # fmt: skip

        def run(connection: sa.Connection) -> None:
            if connection.scalar(sa.select(COMPLETIONS.c.number).where(COMPLETIONS.c.id == completion_id)):
                raise OperantError(f"there is a completion {completion_id} already; give each one its own id")
            key = _store_prompt(connection, prompt, body)
            connection.execute(sa.insert(COMPLETIONS).values(prompt=key, **row))

        self._write(run)

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
            if self._status(connection, completion.id) is None:
                raise UnknownCompletion(f"completion {completion.id} was not begun")
            raise OperantError(f"completion {completion.id} is written already")

        self._write(run)

    def completion(self, completion_id: str) -> StoredCompletion | None:
        with self._reading() as connection:
            row = connection.execute(_interactions().where(COMPLETIONS.c.id == completion_id)).first()
        return None if row is None else _stored(row)

    def set_metadata(self, completion_id: str, metadata: Mapping[str, str]) -> dict[str, str]:
        """Replace a completion's metadata. Raises UnknownCompletion."""
        there = sa.and_(COMPLETIONS.c.id == completion_id, COMPLETIONS.c.status != "deleted")

        def run(connection: sa.Connection) -> None:
            new = sa.update(COMPLETIONS).where(there).values(metadata=dict(metadata))
            if not connection.execute(new).rowcount:
                raise UnknownCompletion(_unknown(completion_id))

        self._write(run)
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
        with self._reading() as connection:
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
        found = {row.number: _stored(row) for row in rows}
        return [found[n] for n in numbers]

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

        gone: bool = self._write(run)
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
        (`replay.subject`) is that one again, and any other a new one, so that up, down, up are three.

        Raises UnknownCompletion; Conflict when the key was used for another body.
        """

        def run(connection: sa.Connection) -> Receipt:
            key = feedback.idempotency_key
            first = _repeated(connection, feedback, body_hash) if not key else connection.execute(
                _stories().where(EVENTS.c.source == feedback.source, EVENTS.c.idempotency_key == key)
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

        receipt: Receipt = self._write(run)
        return receipt

    def events_after(self, offset: int, limit: int) -> list[tuple[int, Feedback]]:
        """At most `limit` events in the order of their offsets, from the first after `offset`.

        They end before an event whose completion is still being written: its tokens would be missing.
        """
        query = sa.select(EVENTS, COMPLETIONS.c.status, COMPLETIONS.c.created).join(COMPLETIONS)
        with self._reading() as connection:
            rows = connection.execute(
                query.where(EVENTS.c.offset > offset).order_by(EVENTS.c.offset).limit(limit)
            ).all()
        found, recent = [], time.time() - HELD_SECONDS
        for row in rows:
            if row.status == "begun" and row.created > recent:
                break
            found.append((int(row.offset), _event(row)))
        return found

    def story(self, feedback_id: str) -> EventStory | None:
        """What became of an event; None when there is no such event."""
        with self._reading() as connection:
            row = connection.execute(_stories().where(EVENTS.c.id == feedback_id)).first()
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
        query = _stories().where(EVENTS.c.offset > after).order_by(EVENTS.c.offset).limit(limit)
        for column, value in (
            (EVENTS.c.completion_id, completion_id),
            (EVENTS.c.source, source),
            (EVENTS.c.kind, kind),
        ):
            if value is not None:
                query = query.where(column == value)
        if state is not None:
            query = query.where(sa.func.coalesce(OUTCOMES.c.state, "pending") == state)
        with self._reading() as connection:
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

        self._write(run)

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

        self._write(run)

    def counts(self) -> dict[str, Any]:
        """{"completions", "events", "pending", "used", "superseded", "unused", "reasons": {why unused: how many}}.

        events = pending + used + superseded + the sum of reasons.
        """
        total = sa.select(sa.func.count())
        with self._reading() as connection:
            events = connection.scalar(total.select_from(EVENTS)) or 0
            completions = connection.scalar(total.where(COMPLETIONS.c.status != "deleted")) or 0
            groups = connection.execute(
                sa.select(OUTCOMES.c.state, OUTCOMES.c.reason, sa.func.count()).group_by(
                    OUTCOMES.c.state, OUTCOMES.c.reason
                )
            ).all()
        told: dict[str, Any] = {"completions": completions, "events": events, "pending": events}
        told |= {"used": 0, "superseded": 0, "unused": 0, "reasons": {}}
        for state, reason, count in groups:
            told[state] += count
            told["pending"] -= count
            if state == "unused":
                told["reasons"][reason] = count
        return told

    # --- care ---------------------------------------------------------------------------------------------------------

    def ready(self) -> None:
        """Return when a transaction has been committed; raises StoreFault when none can be."""
        self._write(lambda connection: None)

    def backup(self, path: str | Path) -> None:
        """Copy the store, as it is at one moment and while it is used, to an SQLite file that operant can open.

        Raises OperantError when there is something at `path`, or it cannot be written.
        """
        path = Path(path)
        if path.exists():
            raise OperantError(f"{path} is there already; give another path for the backup")
        partial = path.with_name(f".{path.name}.partial")
        partial.unlink(missing_ok=True)
        try:
            with self._reading() as connection:
                if self._sqlite:
                    _plain(connection).execute("VACUUM INTO ?", (str(partial),))
                else:
                    _copy(connection, partial)
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.rename(path)
        except OSError as error:
            raise OperantError(f"{path} cannot be written ({error.strerror}); give another path") from error
        finally:
            partial.unlink(missing_ok=True)

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

        counts: dict[str, int] = self._write(run)
        if self._sqlite and counts["completions"]:
            self._write(lambda connection: connection.exec_driver_sql("PRAGMA incremental_vacuum").fetchall())
        return counts


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


def _stored(row: sa.Row[Any]) -> StoredCompletion:
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


def _stories() -> sa.Select[Any]:
    ledger = [OUTCOMES.c[n] for n in ("state", "reason", "version", "advantage", "logprob_before", "logprob_after")]
    return (
        sa.select(EVENTS, *ledger, STEPS.c.times, STEPS.c.served)
        .outerjoin(OUTCOMES, OUTCOMES.c.offset == EVENTS.c.offset)
        .outerjoin(STEPS, STEPS.c.version == OUTCOMES.c.version)
    )


def _event(row: sa.Row[Any]) -> Feedback:
    span = None if row.span_start is None else (row.span_start, row.span_end)
    return Feedback(
        row.id, row.completion_id, row.kind, row.value, row.source, row.idempotency_key, row.time, span
    )  # fmt: skip


def _story(row: sa.Row[Any]) -> EventStory:
    times = {"received": row.received, **(row.times or {})}
    if row.served is not None and row.state == "used":
        times["served"] = row.served
    return EventStory(
        row.offset, _event(row), row.tags, row.state or "pending", row.reason or "", row.version, row.advantage,
        row.logprob_before, row.logprob_after, times,
    )  # fmt: skip


def _repeated(connection: sa.Connection, feedback: Feedback, body_hash: str) -> sa.Row[Any] | None:
    """The event that this one says again."""
    said = _stories().where(EVENTS.c.source == feedback.source, EVENTS.c.completion_id == feedback.completion_id)
    for row in connection.execute(said.order_by(EVENTS.c.offset.desc())):
        if row.body_hash == body_hash:
            return row
        if row.kind == "retract" or subject(_event(row)) == subject(feedback):
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
    untold = Outcome("unused", "its step says nothing of it")
    query = sa.select(EVENTS.c.offset, EVENTS.c.id).where(EVENTS.c.id.in_(record.events))
    rows = [
        {"offset": offset, "version": record.version, **dataclasses.asdict(record.outcomes.get(name, untold))}
        for offset, name in connection.execute(query)
    ]
    if rows:
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


def _copy(source: sa.Connection, file: Path) -> None:
    """All tables into a new SQLite file."""
    engine = _connect(sa.URL.create("sqlite", database=str(file)), read_only=False)
    try:
        with engine.begin() as target:
            upgrade(target, REVISION)
            for table in TABLES.sorted_tables:
                for rows in source.execute(sa.select(table).order_by(*table.primary_key)).mappings().partitions(500):
                    target.execute(sa.insert(table), [dict(row) for row in rows])
    finally:
        engine.dispose()
