"""A database that one process writes, and in it one thread, whose waiting calls share a commit."""

from __future__ import annotations

import logging
import os
import queue
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from filelock import FileLock, Timeout
from sqlalchemy import exc

from operant.config import install_line
from operant.live.storage.migrations import upgrade
from operant.live.storage.tables import REVISION, TABLES
from operant.types import OperantError

__all__ = ["Database", "StoreFault", "journal_mode"]

log = logging.getLogger(__name__)

LOCK_SECONDS = 5.0  # for a writer that was killed to be gone
BUSY_SECONDS = 10.0  # for other connections to let go of the database
GROUP = 256  # calls that share a commit, at most
_LOCK_KEY = 0x6F706572616E74  # "operant", PostgreSQL's advisory lock of the one writer


class StoreFault(OperantError):
    """The database cannot be read or written just now; nothing of the call was stored."""


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


def address(name: str) -> sa.URL:
    """The database that a store's name means: a file ending in .db, .sqlite or .sqlite3, or a URL.

    Raises OperantError for any other name.
    """
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


def connect(url: sa.URL, *, read_only: bool) -> sa.Engine:
    """An engine for the database. Raises OperantError when the package that speaks to it is missing."""
    if url.get_backend_name() == "postgresql":
        options: dict[str, Any] = {"connect_timeout": int(BUSY_SECONDS)}
        if read_only:
            options["options"] = "-c default_transaction_read_only=on"
        try:
            return sa.create_engine(url, connect_args=options, pool_pre_ping=True)
        except ImportError as error:
            raise OperantError(f"a PostgreSQL store needs psycopg: {install_line(extra='postgres')}") from error
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
    """The driver's own connection, whose calls begin no transaction."""
    plain = connection.connection.driver_connection
    assert isinstance(plain, sqlite3.Connection)
    return plain


def _cause(error: BaseException) -> str:
    """The first fault of a chain, in one line: that a rollback failed too is of no interest."""
    first, link = error, error.__context__
    while link is not None:
        first, link = (link if isinstance(link, exc.DBAPIError) else first), link.__context__
    original = first.orig if isinstance(first, exc.DBAPIError) else first
    return " ".join(str(original).split()) or type(first).__name__


_FAULTS = (exc.OperationalError, exc.InternalError, exc.InterfaceError)  # of the database, not of what is written


@dataclass(slots=True)
class _Call:
    run: Callable[[sa.Connection], Any]
    future: Future[Any] = field(default_factory=Future)


class Database:
    """The database at `url`, brought up to date when it is opened for writing.

    Every method may be called from any thread and raises StoreFault when the database cannot be read or written.
    Raises OperantError when another process writes it, or, with `read_only`, when there is none of today's revision.
    """

    def __init__(self, url: str | Path, *, read_only: bool = False) -> None:
        self._url = address(str(url))
        self.name = self._url.render_as_string()
        self.read_only = read_only
        self._sqlite = self._url.get_backend_name() == "sqlite"
        self._held = ExitStack()
        self._engine = connect(self._url, read_only=read_only)
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
                    raise self._newer()
                if now != REVISION:
                    upgrade(connection, REVISION)
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
        guard = self._held.enter_context(self._engine.connect().execution_options(isolation_level="AUTOCOMMIT"))
        until = time.monotonic() + LOCK_SECONDS
        while not guard.scalar(sa.select(sa.func.pg_try_advisory_lock(_LOCK_KEY))):
            if time.monotonic() > until:
                raise self._taken()
            time.sleep(0.05)
        self._guard = guard

    def _keep_lock(self) -> None:
        """A server that was started again has forgotten who writes."""
        try:
            self._guard.scalar(sa.select(1))
        except exc.DBAPIError:
            self._lock_server()

    def _taken(self) -> OperantError:
        return OperantError(f"another process writes {self.name}; stop that one, or give another --store")

    def _newer(self) -> OperantError:
        return OperantError(f"{self.name} was written by a newer operant; update this one")

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
        with self.reading() as connection:
            now = self._revision(connection)
        if now is None:
            raise OperantError(f"{self.name} holds no store; operant serve --store makes one")
        if now > REVISION:
            raise self._newer()
        if now < REVISION:
            raise OperantError(f"{self.name} was written by an older operant; operant serve brings it up to date")

    # --- transactions -------------------------------------------------------------------------------------------------

    def _fault(self, what: str, error: BaseException) -> StoreFault:
        cause = _cause(error)
        cure = {
            "full": "free some space there", "disk i/o": "see whether its disk is full or failing",
            "locked": "another program holds it: let that one finish", "unable to open": "give another --store",
            "not a database": "give another --store",
        }  # fmt: skip
        way = next((way for word, way in cure.items() if word in cause.lower()), "see that the database is up")
        return StoreFault(f"{self.name} cannot be {what} ({cause}); {way}, and try again")

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """One short transaction: what is read in it is of one moment. Raises OperantError once the store is closed."""
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
        if not self._sqlite:
            self._keep_lock()
        with self._engine.connect().execution_options(begin="BEGIN IMMEDIATE") as connection, connection.begin():
            yield connection

    def write(self, run: Callable[[sa.Connection], Any]) -> Any:
        """Let the writing thread do this, and wait for its commit.

        Raises OperantError when the store is closed, or open for reading only.
        """
        call = _Call(run)
        with self._closing:  # nothing may be put behind the end
            if self._closed:
                raise OperantError(f"{self.name} is closed")
            if self.read_only:
                raise OperantError(f"{self.name} is open for reading only")
            self._calls.put(call)
        return call.future.result()

    def expect_room(self, least: int) -> None:
        """Raises StoreFault when fewer bytes are free where an SQLite file is; a server minds its own disk."""
        if self._sqlite:
            assert self._url.database is not None
            if shutil.disk_usage(Path(self._url.database).parent).free < least:
                raise StoreFault(f"{self.name} cannot grow: the disk is full; free some space there")

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

    # --- care ---------------------------------------------------------------------------------------------------------

    def shrink(self) -> None:
        """Give the pages that nothing uses back to the disk. PostgreSQL does so by itself."""
        if not self._sqlite:
            return

        def run(connection: sa.Connection) -> None:
            for _ in range(connection.exec_driver_sql("PRAGMA freelist_count").scalar() or 0):
                connection.exec_driver_sql("PRAGMA incremental_vacuum")  # Python's driver takes one step: a page

        self.write(run)

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
            with self.reading() as connection:
                if self._sqlite:
                    with closing(sqlite3.connect(partial)) as target:
                        _plain(connection).backup(target)
                else:
                    _copy(connection, partial)
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.rename(path)
        except OSError as error:
            raise OperantError(f"{path} cannot be written ({error.strerror}); give another path") from error
        finally:
            partial.unlink(missing_ok=True)


def _copy(source: sa.Connection, file: Path) -> None:
    """All tables into a new SQLite file."""
    engine = connect(sa.URL.create("sqlite", database=str(file)), read_only=False)
    try:
        with engine.begin() as target:
            upgrade(target, REVISION)
            for table in TABLES.sorted_tables:
                for rows in source.execute(sa.select(table).order_by(*table.primary_key)).mappings().partitions(500):
                    target.execute(sa.insert(table), [dict(row) for row in rows])
    finally:
        engine.dispose()
