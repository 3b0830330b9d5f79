"""A private PostgreSQL server for the tests, on a socket in a temporary folder."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def binaries() -> Path | None:
    """The folder of initdb and postgres, or None."""
    found = shutil.which("initdb")
    folders = [Path(found).resolve().parent] if found else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda p: float(p.parent.name), reverse=True)
    return next((f for f in folders if (f / "initdb").exists() and (f / "postgres").exists()), None)


@contextmanager
def server() -> Iterator[str]:
    """A server without durable settings; gives the URL of its one database."""
    programs = binaries()
    assert programs is not None
    root = Path(tempfile.mkdtemp(prefix="operant-pg-", dir="/tmp"))  # a socket's path must be short
    user = pwd.getpwuid(os.getuid()).pw_name
    account = {}
    if os.getuid() == 0:  # postgres refuses to run as root
        other = pwd.getpwnam("postgres" if _has("postgres") else "nobody")
        account = {"user": other.pw_uid, "group": other.pw_gid, "extra_groups": []}
        os.chown(root, other.pw_uid, other.pw_gid)
        user = other.pw_name
    data = root / "data"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.STDOUT, "cwd": root}
    options = ["-A", "trust", "-U", user, "-E", "UTF8", "--no-locale", "--no-sync"]
    process = None
    try:
        subprocess.run([programs / "initdb", "-D", data, *options], check=True, **account, **quiet)
        process = subprocess.Popen(
            [programs / "postgres", "-D", data, "-k", root, "-c", "listen_addresses=", "-c", "fsync=off",
             "-c", "shared_buffers=16MB", "-c", "max_connections=60"],
            **account, **quiet,
        )  # fmt: skip
        _wait_for(process, root, user)
        yield f"postgresql://{user}@/postgres?host={root}"
    finally:
        if process is not None:
            process.send_signal(signal.SIGQUIT)  # waits for no client, and writes nothing that is thrown away
            process.wait(20)
        shutil.rmtree(root, ignore_errors=True)


def empty(url: str) -> None:
    """Throw everything in the database away."""
    import psycopg

    with psycopg.connect(url) as connection:
        connection.execute("DROP SCHEMA public CASCADE")
        connection.execute("CREATE SCHEMA public")


def _wait_for(process: subprocess.Popen[bytes], root: Path, user: str) -> None:
    import psycopg

    while process.poll() is None:
        try:
            psycopg.connect(host=str(root), user=user, dbname="postgres").close()
            return
        except psycopg.OperationalError:  # it is starting up
            time.sleep(0.05)
    raise RuntimeError(f"PostgreSQL ended with status {process.returncode}")


def _has(name: str) -> bool:
    try:
        pwd.getpwnam(name)
    except KeyError:
        return False
    return True
