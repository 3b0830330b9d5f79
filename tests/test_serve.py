"""`operant serve` as a whole: a rating over HTTP becomes weights that serve, and nothing is lost when it dies."""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from forks import PATIENCE, Forked
from live import logprob
from program import Program
from serving import HELLO, SAME_PACKAGE, Process, Served, learning

from operant.config import ServeConfig, install_line
from operant.live.serve import live
from operant.live.storage.versions import Versions
from operant.models.policy import Policy
from operant.types import OperantError


@pytest.fixture(scope="module")
def taught(policy: Policy, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with learning(policy, tmp_path_factory.mktemp("taught")) as running:
        yield running


def story(served: Served | Process, receipt: Any) -> Any:
    """What became of an event, once that is known: on a busy machine a learner may take a while to start."""
    for _ in range(6):
        told = served.http.get(f"/v1/feedback/{receipt['id']}", params={"wait": 30}).json()
        if told["state"] != "pending":
            return told
    raise AssertionError(told)


def total(served: Served, name: str) -> float:
    """log π of a stored answer under the weights that serve now."""
    stored = served.store.completion(name)
    assert stored is not None and stored.completion is not None
    version = served.http.get("/v1/versions").json()["serving"]
    policy = Policy.load(Path(served.service.versions.get(version).path) / "model", device="cpu")
    return float(logprob(policy, stored.prompt, stored.completion.tokens).sum())


# --- a rating becomes weights -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [1, -1])
def test_one_thumb_over_http_moves_the_served_model_the_right_way(taught: Served, value: int) -> None:
    answer = taught.client().chat.completions.create(model="default", messages=HELLO, max_tokens=8)
    before = total(taught, answer.id)
    told = story(taught, taught.rate(answer.id, "thumb", value))
    assert told["state"] == "used" and "served" in told["times"], told
    after = total(taught, answer.id)
    assert (after - before) * value > 0
    assert told["logprob_before"] == pytest.approx(before, abs=1e-3)
    assert told["logprob_after"] == pytest.approx(after, abs=1e-3)
    assert told["advantage"] * value > 0 and f"version {told['version']}" in told["told"]
    times = [told["times"][name] for name in ("received", "queued", "begun", "stepped", "gated", "served")]
    assert times == sorted(times) and told["seconds"] == pytest.approx(times[-1] - times[0])
    again = taught.chat()
    assert again["operant"]["version"] == told["version"] == taught.http.get("/health").json()["version"]
    stored = taught.store.completion(again["id"])
    assert set(stored.completion.policy_version.tolist()) == {told["version"]}


def test_every_kind_is_learned_or_says_why_not_and_the_ledger_adds_up(taught: Served) -> None:
    answer = taught.chat(n=2, max_tokens=12, seed=6)
    name, text = answer["id"], answer["choices"][0]["message"]["content"]
    used = [
        taught.rate(name, "score", 0.9), taught.rate(name, "edit", "the cat sat on the mat"),
        taught.rate(f"{name}.1", "comparison", name), taught.rate(name, "span", -1, span={"start": 0, "end": 3}),
    ]  # fmt: skip
    metadata = taught.client().chat.completions.update(f"{name}.1", metadata={"feedback": "down"})
    used.append({"id": metadata.operant["feedback"][0]})
    linked = taught.http.post(taught.chat()["operant"]["feedback_url"], json={"kind": "thumb", "value": 1}).json()
    for told in (story(taught, receipt) for receipt in (*used, linked)):
        assert told["state"] == "used" and told["version"] > 0, told
        assert told["logprob_after"] is not None and told["seconds"] > 0
    for receipt in (taught.rate(name, "comment", "fine"), taught.rate(name, "edit", text)):
        told = story(taught, receipt)
        assert told["state"] == "unused" and told["reason"] and told["reason"] in told["told"]
    told = story(taught, taught.rate(name, "retract", used[0]["id"]))
    assert str(story(taught, used[0])["version"]) in told["reason"], told
    counts = taught.store.counts()
    assert counts["events"] == sum(counts[state] for state in ("pending", "used", "superseded", "unused"))
    assert sum(counts["reasons"].values()) == counts["unused"] and counts["pending"] == 0


def test_a_roll_back_over_http_serves_the_parent_and_learning_goes_on_from_it(taught: Served) -> None:
    name = taught.chat()["id"]
    before = total(taught, name)
    version = story(taught, taught.rate(name, "thumb", 1))["version"]
    parent = taught.service.versions.record(version).parent
    assert taught.http.post("/v1/versions/rollback").json() == {"current": parent, "serving": parent}
    assert taught.chat()["operant"]["version"] == parent
    assert total(taught, name) == pytest.approx(before, abs=1e-6)
    other = story(taught, taught.rate(taught.chat()["id"], "thumb", 1))["version"]
    assert taught.service.versions.record(other).parent == parent
    promoted = taught.http.post(f"/v1/versions/{version}/promote").json()
    assert promoted == {"current": version, "serving": version}
    rows = {row["version"]: row for row in taught.http.get("/v1/versions").json()["versions"]}
    assert rows[version]["parent"] == rows[other]["parent"] == parent and rows[version]["state"] == "published"


def test_a_user_is_served_what_they_are_pinned_to(taught: Served) -> None:
    assert taught.http.get("/v1/versions").json()["serving"] > 0
    taught.http.post("/v1/versions/pins", json={"user": "ann", "version": 0}).raise_for_status()
    answer = taught.chat(user="ann", max_tokens=4)
    stored = taught.store.completion(answer["id"])
    assert answer["operant"]["version"] == 0 and set(stored.completion.policy_version.tolist()) == {0}
    assert taught.chat(user="bob")["operant"]["version"] > 0
    taught.http.post("/v1/versions/pins", json={"user": "ann", "version": None}).raise_for_status()
    assert taught.chat(user="ann")["operant"]["version"] > 0


def test_the_learner_is_told_of_each_answer_that_is_stored(taught: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    told: queue.Queue[str] = queue.Queue()
    monkeypatch.setattr(taught.service.supervisor, "poke", told.put)
    taught.chat(store=False)
    stored = taught.chat()
    assert told.get(timeout=PATIENCE) == stored["id"] and told.empty()


def test_chats_are_answered_while_versions_come(taught: Served) -> None:
    """Each answer is wholly of the version that it began with, and none is refused."""
    stop, answers = threading.Event(), list[str]()

    def talk() -> None:
        with httpx.Client(base_url=taught.url, timeout=PATIENCE) as http:
            while not stop.is_set():
                body = {"model": "default", "messages": HELLO, "max_tokens": 30}
                response = http.post("/v1/chat/completions", json=body)
                answers.append(response.json()["id"] if response.status_code == 200 else response.text)

    threads = [threading.Thread(target=talk) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        receipts = [taught.rate(taught.chat()["id"], "thumb", value) for value in (1, -1, 1)]
        versions = {story(taught, receipt)["version"] for receipt in receipts}
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert versions and len(answers) > 3
    for name in answers:
        stored = taught.store.completion(name)
        assert stored is not None and stored.status == "complete", name
        assert len(set(stored.completion.policy_version.tolist())) == 1


def test_a_learner_that_is_killed_stops_no_answer_and_comes_again(taught: Served) -> None:
    supervisor = taught.service.supervisor
    assert supervisor is not None and supervisor.pid is not None
    pid = supervisor.pid
    os.kill(pid, signal.SIGKILL)
    name = taught.chat()["id"]
    receipt = taught.rate(name, "thumb", 1)
    assert story(taught, receipt)["state"] == "used"
    assert supervisor.pid not in (None, pid) and taught.http.get("/health").json()["status"] == "ok"
    (one,) = [r for r in taught.service.versions.records() if receipt["id"] in r.events and r.state == "published"]
    assert one.version == story(taught, receipt)["version"]


def test_the_async_stock_client_closes_the_circle(taught: Served) -> None:
    import asyncio

    async def circle() -> Any:
        async with openai.AsyncOpenAI(base_url=f"{taught.url}/v1", api_key="unused") as client:
            stream = await client.chat.completions.create(model="default", messages=HELLO, max_tokens=5, stream=True)
            names = {chunk.id async for chunk in stream}
            told = await client.chat.completions.update(names.pop(), metadata={"feedback": "up"})
            return told.operant["feedback"][0]

    assert story(taught, {"id": asyncio.run(circle())})["state"] == "used"


@pytest.mark.slow
def test_in_shared_mode_a_version_needs_two_sources(policy: Policy, tmp_path: Path) -> None:
    with learning(policy, tmp_path, mode="shared") as shared:
        name = shared.chat()["id"]
        first = shared.rate(name, "thumb", 1, source="ann")
        again = shared.rate(shared.chat()["id"], "thumb", 1, source="ann")
        time.sleep(2)
        assert shared.http.get(f"/v1/feedback/{first['id']}").json()["state"] == "pending"
        second = shared.rate(name, "thumb", 1, source="bob")
        assert story(shared, second)["state"] == story(shared, first)["state"] == "used"
        assert story(shared, again)["version"] == story(shared, first)["version"]


@pytest.mark.slow
def test_what_the_gate_refuses_is_not_served_and_the_click_is_told_why(policy: Policy, tmp_path: Path) -> None:
    with learning(policy, tmp_path, drift_budget=1e-12) as strict:
        told = story(strict, strict.rate(strict.chat()["id"], "thumb", 1))
        assert told["state"] == "unused" and "the gate refused" in told["reason"] and "KL" in told["told"]
        assert told["logprob_after"] == told["logprob_before"]
        assert strict.http.get("/v1/versions").json()["serving"] == 0
        rows = {row["version"]: row["state"] for row in strict.http.get("/v1/versions").json()["versions"]}
        assert rows == {0: "published", told["version"]: "refused"}
        assert strict.chat()["operant"]["version"] == 0


# --- begin, stop, begin again -----------------------------------------------------------------------------------------


@pytest.mark.timeout(900)
def test_the_program_serves_stops_at_once_and_loses_nothing_to_kill_9(
    policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy.save(tmp_path / "model")
    page = tmp_path / "page"
    os.mkfifo(page)
    monkeypatch.setitem(SAME_PACKAGE, "BROWSER", f"{sys.executable} -c \"open('{page}', 'w').write('%s')\"")
    body = {"model": "default", "messages": HELLO, "max_tokens": 100, "logit_bias": {"2": -100}}
    with Process(tmp_path, "--model", str(tmp_path / "model"), "--open", "true", anew=True) as first:
        assert page.read_text() == f"{first.url}/"  # what the browser was given
        (curl,) = [line for line in first.said.splitlines() if line.startswith("  curl ")]
        assert '"model": "default"' in curl and f"{first.url}/\n" in first.said
        done = subprocess.run(["bash", "-c", curl], capture_output=True, text=True, check=True)
        name = json.loads(done.stdout)["id"]
        rating = {"completion_id": name, "kind": "thumb", "value": 1}
        receipt = first.http.post("/v1/feedback", json=rating).json()
        with first.http.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as stream:
            cut = json.loads(next(stream.iter_lines()).removeprefix("data: "))["id"]
            learners = psutil.Process(first.process.pid).children(recursive=True)
            first.process.kill()
            first.process.wait()
    assert learners and not psutil.wait_procs(learners, timeout=300)[1]  # they leave with their parent, in their time
    with Process(tmp_path, "--model", str(tmp_path / "model")) as second:
        told = story(second, receipt)
        assert told["state"] == "used", told
        assert second.http.get(f"/v1/chat/completions/{name}").json()["choices"][0]["message"]["content"] is not None
        lost = second.http.get(f"/v1/chat/completions/{cut}").json()
        assert lost["operant"]["status"] in ("failed", "partial", "complete")  # the last if it was the faster
        assert second.http.post("/v1/feedback", json=rating).json() == {
            **receipt, "state": "used", "duplicate": True, "waiting_for": "",
        }  # fmt: skip
        status, err = second.stop(signal.SIGINT)
        assert (status, err) == (0, "")
        log = (tmp_path / "live" / "serve.log").read_text()
        assert "journal mode" in log and "the cat sat" not in log
    records = [r for r in Versions(tmp_path / "live").records() if receipt["id"] in r.events]
    assert len(records) == 1 and Versions(tmp_path / "live").pointer().version == told["version"]


@pytest.mark.slow
def test_sigterm_ends_it_too_and_a_second_server_is_refused(policy: Policy, tmp_path: Path) -> None:
    policy.save(tmp_path / "model")
    with Process(tmp_path, "--model", str(tmp_path / "model"), "--implicit", "math:copysign") as first:
        again = subprocess.run(
            [sys.executable, "-m", "operant.cli", "serve", "--root", str(tmp_path / "live"), "--port", "0"],
            capture_output=True, text=True, env=SAME_PACKAGE,
        )  # fmt: skip
        assert again.returncode == 1 and "another server is at work" in again.stderr
        assert len(again.stderr.splitlines()) == 1
        status, err = first.stop(signal.SIGTERM)
        assert (status, err) == (0, "")


def test_what_cannot_be_served_is_told_in_one_line(
    policy: Policy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = Program(capsys)
    root = ("--root", tmp_path / "live")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert "choose another --port" in program.fault("serve", *root, "--model", "x", "--port", port)
    assert "operant keys --add" in program.fault("serve", *root, "--host", "0.0.0.0")
    assert "--model is missing" in program.fault("serve", *root, "--port", 0)
    assert str(tmp_path / "none") in program.fault("serve", *root, "--port", 0, "--model", tmp_path / "none")
    assert "no_such_module" in program.fault("serve", *root, "--port", 0, "--implicit", "no_such_module:f")
    assert "no function" in program.fault("serve", *root, "--port", 0, "--implicit", "math:pi")
    assert "--port" in program.fault("serve", "--port", 99999)
    assert "is no store" in program.fault("serve", *root, "--port", 0, "--store", "mysql://x")
    assert not Versions(tmp_path / "live").exists()
    policy.save(tmp_path / "model")
    (tmp_path / "wrong.jsonl").write_text('{"foo": 1}\n')
    begun = ("serve", *root, "--port", 0, "--model", tmp_path / "model", "--anchor_rows", 1, "--anchor_tokens", 2)
    for rows, told in (("none.jsonl", "none.jsonl"), ("wrong.jsonl", "'prompt'")):
        assert told in program.fault(*begun, "--heldout", tmp_path / rows)


def test_an_extra_that_is_missing_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "fastapi" else find(name, *a))
    assert f"fastapi: {install_line(extra='live')}" in Program(capsys).fault("serve", "--root", tmp_path / "live")


def test_a_large_model_says_what_it_does_while_it_starts(
    policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    policy.save(tmp_path / "model")
    monkeypatch.setattr("subprocess.Popen", Forked)
    options: dict[str, Any] = {"model": str(tmp_path / "model"), "anchor_rows": 2, "anchor_tokens": 4, "device": "cpu"}
    with live(ServeConfig(root=str(tmp_path / "quiet"), **options)):
        assert capsys.readouterr().out == ""
    monkeypatch.setattr("operant.models.policy.SMALL", 1)
    reading = "reading version 0 …"
    beginning = f"beginning {tmp_path / 'live'} with {options['model']}; "
    for lines in ([beginning, reading], [reading]):
        with live(ServeConfig(root=str(tmp_path / "live"), **options)):
            told = capsys.readouterr().out.splitlines()
        assert [line.startswith(expected) for line, expected in zip(told, lines, strict=True)] == [True] * len(lines)


def test_a_root_goes_on_with_its_own_model_only(
    policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("model", "other"):
        policy.save(tmp_path / name)
    monkeypatch.setattr("subprocess.Popen", Forked)
    options: dict[str, Any] = {"root": str(tmp_path / "live"), "anchor_rows": 2, "anchor_tokens": 4, "device": "cpu"}
    with live(ServeConfig(model=str(tmp_path / "model"), **options)):
        pass
    with (
        pytest.raises(OperantError, match="give another --root"),
        live(ServeConfig(model=str(tmp_path / "other"), **options)),
    ):
        pass
    with live(ServeConfig(**options)) as running:
        assert running.versions.pointer().version == 0
