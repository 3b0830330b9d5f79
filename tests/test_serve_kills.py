"""`operant serve` under load and kill -9 of the server and its learner: nothing is lost, nothing is learned twice."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
import torch
from serving import Server, free_port

from operant.config import WorkerConfig
from operant.live.learning.execution import LoadedVersion, make_again
from operant.live.storage.store import Store
from operant.live.storage.versions import Versions
from operant.models.policy import Policy

ROUNDS = 20
TALKERS = 3


@dataclass
class Told:
    """What clients were told, and with that may rely on."""

    answers: dict[str, str] = field(default_factory=dict)  # completion id → its whole text
    begun: set[str] = field(default_factory=set)  # ids of streams that gave at least one byte
    feedback: dict[str, str] = field(default_factory=dict)  # idempotency key → event id
    faults: list[str] = field(default_factory=list)  # answers that no client should ever get


class Talker(threading.Thread):
    """A client that chats and rates until it is told to stop. What it sent without an answer it sends again."""

    def __init__(self, number: int, url: str, told: Told, ending: threading.Event) -> None:
        super().__init__(daemon=True)
        self.number, self.url, self.told, self.ending = number, url, told, ending
        self.draw = random.Random(number)

    def run(self) -> None:
        with httpx.Client(base_url=self.url, timeout=20) as client:
            for turn in itertools.count():
                if self.ending.is_set():
                    return
                with contextlib.suppress(httpx.TransportError):
                    name = self.chat(client, stream=turn % 2 == 0)
                    if name is not None:
                        self.rate(client, name, f"t{self.number}n{turn}")

    def chat(self, client: httpx.Client, *, stream: bool) -> str | None:
        """The id of an answer; None when there was none."""
        words = self.draw.choice(["the cat sat", "a dog ran", "one two"])
        body = {"model": "default", "messages": [{"role": "user", "content": words}], "max_tokens": 8, "stream": stream}
        if not stream:
            response = client.post("/v1/chat/completions", json=body)
            if not self.fine(response):
                return None
            choice, name = response.json()["choices"][0], str(response.json()["id"])
            self.told.answers[name] = choice["message"]["content"]
            return name
        name, text = None, ""
        with client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                response.read()
                self.fine(response)
                return None
            for line in response.iter_lines():
                if line == "data: [DONE]":
                    assert name is not None
                    self.told.answers[name] = text
                elif line.startswith("data: "):
                    chunk = json.loads(line[6:])
                    name = str(chunk["id"])
                    self.told.begun.add(name)
                    text += "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
        return name

    def rate(self, client: httpx.Client, name: str, key: str) -> None:
        kind, value = self.draw.choice([("thumb", 1), ("thumb", -1), ("edit", "the red house"), ("comment", "hm")])
        body = {"completion_id": name, "kind": kind, "value": value, "idempotency_key": key}
        while not self.ending.is_set():
            try:
                response = client.post("/v1/feedback", json=body)
            except httpx.TransportError:
                time.sleep(0.1)  # the server is gone; whether it had heard is not known
                continue
            if self.fine(response):
                self.told.feedback[key] = response.json()["id"]
            return

    def fine(self, response: httpx.Response) -> bool:
        if response.status_code >= 400:
            self.told.faults.append(f"{response.status_code} {response.text[:200]}")
        return response.status_code < 400


@pytest.fixture
def server(tmp_path: Path, make_policy: Callable[..., Policy]) -> Iterator[Server]:
    make_policy("gpt2", context=128).save(tmp_path / "model")
    made = Server(tmp_path / "live", tmp_path / "model", free_port())
    made.start()
    yield made
    if made.process.poll() is None:
        made.kill("both")


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_killed_under_load_nothing_is_lost_nothing_learned_twice_and_the_weights_are_those_of_the_records(
    server: Server, tmp_path: Path
) -> None:
    told, ending, draw, versions = Told(), threading.Event(), random.Random(1), Versions(tmp_path / "live")
    talkers = [Talker(number, server.url, told, ending) for number in range(TALKERS)]
    for talker in talkers:
        talker.start()
    for number in range(ROUNDS):
        heard, steps = len(told.feedback) + draw.randrange(1, 8), len(versions.records()) + draw.randrange(1, 3)
        until = time.monotonic() + 60
        while len(told.feedback) < heard or len(versions.records()) < steps:
            assert time.monotonic() < until, f"nothing is learned any more: {server.log.read_text()[-2000:]}"
            time.sleep(0.02)
        time.sleep(draw.random())  # in the middle of anything
        what = ("server", "learner", "both", "server")[number % 4]
        server.kill(what)
        if what != "learner":
            server.start()
    ending.set()
    for talker in talkers:
        talker.join(60)
    until = time.monotonic() + 120
    with httpx.Client(base_url=server.url, timeout=30) as client:
        while client.get("/v1/feedback", params={"state": "pending", "limit": 1}).json()["data"]:
            assert time.monotonic() < until, "events stay pending"
            time.sleep(0.2)
    server.stop()
    assert told.faults == []
    assert len(told.feedback) > 2 * ROUNDS and len(told.answers) > 2 * ROUNDS

    with Store(tmp_path / "live" / "store.db", read_only=True) as store:
        for name, text in told.answers.items():
            stored = store.completion(name)
            assert stored is not None and stored.completion is not None, f"the answer {name} is lost"
            assert stored.completion.text == text and stored.completion.behavior_logprobs is not None
        assert not [name for name in told.begun if store.completion(name) is None], "a begun answer is lost"
        log = store.events_after(0, 10**6)
        kept = {event.idempotency_key: event.id for _, event in log}
        assert len(kept) == len(log), "a key is there twice"
        assert {key: kept.get(key) for key in told.feedback} == told.feedback
        counts = store.counts()
        assert counts["pending"] == 0 and counts["used"] > 0
        assert counts["events"] == len(log) == counts["used"] + counts["superseded"] + counts["unused"]
        check_records(versions, store, [event.id for _, event in log])
    print(
        f"\n{ROUNDS} kills: {len(told.answers)} answers, {len(told.feedback)} of {len(log)} events acknowledged, "
        f"{counts['used']} used, {versions.current().version} steps"
    )


def check_records(versions: Versions, store: Store, log: list[str]) -> None:
    """Every event was consumed once, in order, and every version is what its record makes of its parent."""
    records = versions.records()
    assert [name for record in records for name in record.events] == log
    offset = 0
    for record in records:
        assert record.begin_offset == offset, "a step began elsewhere than the one before it ended"
        offset = record.consumed_offset
    config = WorkerConfig(device="cpu")
    published = [record.version for record in records if record.state == "published" and record.parent >= 0]
    assert published
    for version in published:
        again = make_again(versions, version, store, config).trainable_parameters()
        saved = LoadedVersion.load(versions, version, 0, config).policy.trainable_parameters()
        assert all(torch.equal(a, b) for a, b in zip(again, saved, strict=True)), f"version {version} is another one"
