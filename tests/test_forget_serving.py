"""A source is forgotten while the server goes on answering, over HTTP and by the program, and kill -9 loses nothing."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from forks import PATIENCE
from program import Program
from serving import Served, Server, free_port, learning

from operant.config import WorkerConfig
from operant.live.learning.execution import verify_version
from operant.live.learning.forget import Plan, ask, forget, forgotten
from operant.live.storage.store import Store
from operant.live.storage.versions import Versions
from operant.models.policy import Policy
from operant.types import OperantError

BODY = {"model": "default", "messages": [{"role": "user", "content": "the cat sat"}], "max_tokens": 6}
SAID = (
    ("ann", "thumb", 1), ("bob", "thumb", -1), ("cat", "edit", "a dog"), ("ann", "score", 0.2), ("bob", "edit", "two"),
    ("cat", "thumb", 1), ("ann", "edit", "one"),
)  # fmt: skip


@pytest.fixture
def taught(policy: Policy, tmp_path: Path) -> Iterator[Served]:
    """A server that has learned from three people."""
    with learning(policy, tmp_path, drift_budget=1e3, likelihood_drop=1e3, keep=100) as running:
        talk(running.http)
        yield running


def talk(http: httpx.Client) -> None:
    for number, (source, kind, value) in enumerate(SAID):
        asked = http.post("/v1/chat/completions", json=BODY | {"user": "bob" if number == 3 else "eve"}).json()
        body = {"completion_id": asked["id"], "kind": kind, "value": value, "source": source}
        receipt = http.post("/v1/feedback", json=body).json()
        assert story(http, receipt["id"])["state"] != "pending"


def story(http: httpx.Client, name: str) -> Any:
    """What became of an event, once that is known."""
    until = time.monotonic() + PATIENCE
    while (told := http.get(f"/v1/feedback/{name}", params={"wait": 30}).json())["state"] == "pending":
        assert time.monotonic() < until, told
    return told


def copied(served_store: Store, root: Path, to: Path) -> tuple[Store, WorkerConfig]:
    """The same root, without a server."""
    shutil.copytree(root, to, ignore=shutil.ignore_patterns("*.db*", "*.lock"))
    served_store.backup(to / "store.db")
    return Store(to / "store.db"), WorkerConfig(root=str(to), device="cpu", keep=100)


def weights(versions: Versions) -> list[torch.Tensor]:
    policy = Policy.load(Path(versions.current().path) / "model", device="cpu")
    return [p.detach() for p in policy.model.parameters()]


def test_it_is_forgotten_over_http_while_everybody_is_answered(taught: Served, tmp_path: Path) -> None:
    versions = taught.service.versions
    store, config = copied(taught.store, versions.root, tmp_path / "copy")
    with store:
        expected = forget("bob", store, config)
    before = versions.pointer().version
    taught.http.post("/v1/versions/pins", json={"user": "eve", "version": before})
    statuses: list[int] = []
    ending = threading.Event()

    def chat() -> None:
        with httpx.Client(base_url=taught.url, timeout=PATIENCE) as client:
            while not ending.is_set():
                statuses.append(client.post("/v1/chat/completions", json=BODY).status_code)

    talker = threading.Thread(target=chat)
    talker.start()
    told = taught.http.post("/v1/forget", params={"wait": PATIENCE}, json={"source": "bob"}).json()
    ending.set()
    talker.join()
    assert told["state"] == "done" and set(statuses) == {200} and len(statuses) > 3
    result = told["result"]
    assert result["events"] == 2 and result["redone"] >= 4 and before in result["dropped"]
    assert result["redone"] == expected.redone and result["base"] == expected.base
    assert all(torch.equal(a, b) for a, b in zip(weights(versions), weights(Versions(config.root)), strict=True))
    # what had learned from it is gone from the disk and from memory, and nobody can have it back
    now = taught.http.get("/v1/versions").json()
    assert now["current"] == now["serving"] == result["current"] and now["pins"] == {}
    assert not set(result["dropped"]) & (
        {row["version"] for row in now["versions"] if row["on_disk"]} | set(now["resident"])
    )
    assert taught.fault("POST", f"/v1/versions/{before}/promote", 409)
    assert (
        taught.http.post("/v1/chat/completions", json=BODY | {"user": "eve"}).json()["operant"]["version"]
        == now["current"]
    )
    rows = taught.http.get("/v1/feedback", params={"limit": 100}).json()["data"]
    assert [row["source"] for row in rows if not row["source"]] == ["", ""]
    assert "bob" not in json.dumps(rows) and taught.store.counts()["pending"] == 0
    # learning goes on from it
    name = taught.http.post("/v1/chat/completions", json=BODY).json()["id"]
    receipt = taught.http.post("/v1/feedback", json={"completion_id": name, "kind": "edit", "value": "ran"}).json()
    told_of = story(taught.http, receipt["id"])
    assert told_of["state"] == "used" and versions.record(told_of["version"]).parent == result["current"]
    again = taught.http.get(f"/v1/forget/{told['id']}").json()
    assert again == told
    assert taught.fault("POST", "/v1/forget", 404, json={"source": "bob"})["code"] == "not_found"
    assert taught.fault("GET", "/v1/forget/99", 404)


def test_the_program_asks_the_server_that_is_at_work(
    taught: Served, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    program, root = Program(capsys), taught.service.versions.root
    told = json.loads(program("forget", "--root", root, "--source", "ann", "--json").out)
    assert told["events"] == 3 and told["redone"] >= 3
    assert taught.http.get("/health").json()["version"] == told["current"]
    for record in taught.service.versions.records():
        if record.again >= 0 and record.state == "published":
            config = WorkerConfig(root=str(root), device="cpu")
            assert verify_version(taught.service.versions, record.version, taught.store, config).same
    assert "nothing of a source 'ann'" in program.fault("forget", "--root", root, "--source", "ann")
    assert taught.service.versions.plan() is None


def test_meanwhile_nobody_moves_versions_and_one_at_a_time_is_forgotten(policy: Policy, tmp_path: Path) -> None:
    with learning(policy, tmp_path) as running:
        versions = running.service.versions
        Plan("ann", 1, stage="emptied", begun=1).write(versions)  # as between two steps that are made again
        assert "forgotten" in running.fault("POST", "/v1/versions/0/promote", 409)["message"]
        with pytest.raises(OperantError, match="another source"):
            ask(versions, "bob")
        with pytest.raises(OperantError, match="this source"):  # what ann has said since would stay
            ask(versions, "ann")
        until = time.monotonic() + PATIENCE
        while (done := forgotten(versions, 1)) is None:
            assert time.monotonic() < until
            time.sleep(0.05)
        assert done.base is None and versions.plan() is None
        assert running.http.post("/v1/versions/0/promote").status_code == 200


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kill_9_in_the_middle_is_gone_on_from(policy: Policy, tmp_path: Path) -> None:
    policy.save(tmp_path / "model")
    server = Server(tmp_path / "live", tmp_path / "model", free_port())
    server.start()
    versions = Versions(tmp_path / "live")
    try:
        with httpx.Client(base_url=server.url, timeout=PATIENCE) as http:
            talk(http)
        with Store(tmp_path / "live" / "store.db", read_only=True) as read:
            store, config = copied(read, tmp_path / "live", tmp_path / "copy")
        with store:
            for source in ("bob", "cat"):
                forget(source, store, config)
        for source, stages in (("bob", ("asked", "emptied")), ("cat", ("planned", "made"))):
            with httpx.Client(base_url=server.url, timeout=PATIENCE) as http:
                number = http.post("/v1/forget", json={"source": source}).json()["id"]
            for stage in stages:
                until = time.monotonic() + PATIENCE
                while (plan := Plan.read(versions)) is not None and plan.stage != stage and time.monotonic() < until:
                    time.sleep(0.001)
                server.kill("both")
                server.start()
            until = time.monotonic() + PATIENCE
            while forgotten(versions, number) is None:
                assert time.monotonic() < until, server.log.read_text()[-2000:]
                time.sleep(0.1)
        with httpx.Client(base_url=server.url, timeout=PATIENCE) as http:
            assert http.get("/health").json()["version"] == versions.pointer().version
            rows: list[Any] = http.get("/v1/feedback", params={"limit": 100}).json()["data"]
        assert {row["source"] for row in rows} == {"", "ann"} and len(rows) == len(SAID)
    finally:
        server.kill("both")
    assert all(torch.equal(a, b) for a, b in zip(weights(versions), weights(Versions(config.root)), strict=True))
    assert versions.plan() is None and not (versions.root / "current.again").exists()
