"""A live server over real HTTP inside the test's process: a tiny model, and a store."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import openai
from forks import PATIENCE, Forked

import operant
from operant.config import ServeConfig
from operant.live.api.server import create_app
from operant.live.api.service import Listener, Service
from operant.live.learning.worker import Worker
from operant.live.serve import _learner_config, _links, live, server_of
from operant.live.serving.access import Keys
from operant.live.serving.engine import Engine
from operant.live.storage.store import Store
from operant.live.storage.versions import Versions
from operant.models.policy import Policy


@dataclasses.dataclass
class Served:
    """A server that listens, what it works with, and clients for it."""

    url: str
    service: Service
    http: httpx.Client
    server: Any
    clients: dict[Any, openai.OpenAI] = dataclasses.field(default_factory=dict)

    @property
    def store(self) -> Store:
        return self.service.store

    def client(self, key: str = "unused", **options: Any) -> openai.OpenAI:
        """The stock client, with only base_url and key changed."""
        if (key, *options) not in self.clients:
            self.clients[key, *options] = openai.OpenAI(
                base_url=f"{self.url}/v1", api_key=key, **({"max_retries": 0} | options)
            )  # fmt: skip
        return self.clients[key, *options]

    def chat(self, text: str = "the cat sat", **options: Any) -> Any:
        """The body of a chat's answer."""
        given = {"model": "default", "messages": [{"role": "user", "content": text}], "max_tokens": 8}
        response = self.http.post("/v1/chat/completions", json=given | options)
        assert response.status_code == 200, response.text
        return response.json()

    def rate(self, completion_id: str, kind: str, value: Any, **options: Any) -> Any:
        body = {"completion_id": completion_id, "kind": kind, "value": value} | options
        response = self.http.post("/v1/feedback", json=body)
        assert response.status_code == 200, response.text
        return response.json()

    def fault(self, method: str, path: str, status: int, **options: Any) -> Any:
        """The error of a request that has to fail so, in OpenAI's form."""
        response = self.http.request(method, path, **options)
        assert response.status_code == status, (response.status_code, response.text)
        error = response.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"} and error["message"]
        assert "\n" not in error["message"]
        return error


@contextlib.contextmanager
def listening(server: Any) -> Iterator[str]:
    """Run a server on a free port in a thread; its address."""
    server.config.port = 0
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        if not thread.is_alive():
            raise RuntimeError("the server did not start")
        thread.join(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


@contextlib.contextmanager
def serving(
    policy: Policy, folder: Path, *, keys: Keys | None = None, listeners: Sequence[Listener] = (), **settings: Any
) -> Iterator[Served]:
    """A server without a learner, on version 0 of this policy."""
    config = ServeConfig(
        **{"root": str(folder / "live"), "anchor_rows": 2, "anchor_tokens": 4, "drain_seconds": 2.0, "max_tokens": 16}
        | settings
    )
    store = Store(folder / "store.db")
    versions = Versions(config.root)
    if not versions.exists():
        policy.save(folder / "model")
        worker_config = dataclasses.replace(_learner_config(config, ""), model=str(folder / "model"), device="cpu")
        Worker(worker_config, store).start()
    store.reconcile(versions.records())
    engine = Engine(policy, versions.pointer().version, max_rows=config.max_rows, queue=config.queue)
    app = create_app(
        Service(
            engine=engine, codec=policy.codec, encoder=policy.has_encoder,
            max_length=policy.max_length, store=store, versions=versions, supervisor=None, config=config,
            links=_links(config), keys=keys or Keys(None), listeners=list(listeners),
        )
    )  # fmt: skip
    try:
        server = server_of(app, config)
        with listening(server) as url, httpx.Client(base_url=url, timeout=PATIENCE) as http:
            running = Served(url, app.state.service, http, server)
            yield running
            for client in running.clients.values():
                client.close()
    finally:
        engine.close()
        store.close()


@contextlib.contextmanager
def learning(policy: Policy, folder: Path, **settings: Any) -> Iterator[Served]:
    """All of `operant serve` but its own process: the learner is a real one."""
    if not (folder / "model").exists():
        policy.save(folder / "model")
    config = ServeConfig(
        **{
            "root": str(folder / "live"), "model": str(folder / "model"), "anchor_rows": 2, "anchor_tokens": 4,
            "drain_seconds": 2.0, "device": "cpu", "threads": 1, "lr": 1e-3,
        }
        | settings
    )  # fmt: skip
    with mock.patch("subprocess.Popen", Forked), live(config) as running:
        server = server_of(running.app, config)
        with listening(server) as url, httpx.Client(base_url=url, timeout=PATIENCE) as http:
            served = Served(url, running.app.state.service, http, server)
            yield served
            for client in served.clients.values():
                client.close()


# --- the program in a process of its own ------------------------------------------------------------------------------

HELLO = [{"role": "user", "content": "the cat sat"}]
SAME_PACKAGE = os.environ | {"PYTHONPATH": str(Path(operant.__file__).parents[1]), "PYTHONUNBUFFERED": "1"}


class Process:
    """`operant serve` as a user starts it. anew: by an interpreter that imports all of it."""

    def __init__(self, folder: Path, *more: str, anew: bool = False) -> None:
        command = [
            sys.executable, "-m", "operant.cli", "serve", "--root", str(folder / "live"), "--port", "0",
            "--anchor_rows", "2", "--anchor_tokens", "4", "--device", "cpu", "--lr", "0.001", "--threads", "1", *more,
        ]  # fmt: skip
        self.process = (subprocess.Popen if anew else Forked)(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=SAME_PACKAGE, cwd=folder
        )
        assert self.process.stdout is not None
        self.said = self.process.stdout.readline()
        assert "learns at http://127.0.0.1:" in self.said, self.process.communicate()
        while not self.said.endswith("Ctrl-C stops it.\n"):
            self.said += self.process.stdout.readline()
        self.url = self.said.split("learns at ")[1].split("/v1")[0]
        self.http = httpx.Client(base_url=self.url, timeout=PATIENCE)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()
        self.process.kill()
        self.process.communicate()

    def stop(self, number: int) -> tuple[int, str]:
        self.process.send_signal(number)
        _, err = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, err


class Server:
    """The program in a process of its own."""

    def __init__(self, root: Path, model: Path, port: int) -> None:
        self.url, self.log = f"http://127.0.0.1:{port}", root.parent / "server.log"
        self.arguments = [
            sys.executable, "-m", "operant.cli", "serve", "--root", str(root), "--model", str(model),
            "--port", str(port), "--device", "cpu", "--threads", "1", "--lr", "0.0005", "--anchor_rows", "2",
            "--anchor_tokens", "6", "--drift_budget", "1000", "--likelihood_drop", "1000", "--keep", "100000",
        ]  # fmt: skip

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.arguments, stdout=log, stderr=log, env=SAME_PACKAGE)
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until and self.process.poll() is None:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/ready", timeout=5).status_code == 200:
                    return
            time.sleep(0.1)
        raise AssertionError(f"the server did not come up: {self.log.read_text()[-2000:]}")

    def learner(self) -> int | None:
        """The process id of the learner that this server has started."""
        for children in Path(f"/proc/{self.process.pid}/task").glob("*/children"):
            for pid in children.read_text().split():
                with contextlib.suppress(OSError):
                    if b"operant.live.learning.worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                        return int(pid)
        return None

    def kill(self, what: str) -> None:
        learner = self.learner() if what != "server" else None
        if learner is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(learner, signal.SIGKILL)
        if what != "learner":
            self.process.kill()
            self.process.wait(20)

    def stop(self) -> None:
        self.process.terminate()
        assert self.process.wait(PATIENCE) == 0, self.log.read_text()[-2000:]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
