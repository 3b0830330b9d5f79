"""kill -9 of a live server and its learner at chosen moments of a step, and a disk that is full for a while.

Two clients chat and rate all the time. A round waits for its moment, which it sees in the files of the root, and kills:

    heard       a rating was acknowledged, and its step is not announced yet
    stepping    the step is announced and under way
    writing     its version is half written
    written     its version is whole, and `current` still names the one before
    pointed     `current` names it, and the server does not serve it yet
    full        nobody is killed: no file of the learner may grow from the middle of a step on, as on a full disk; the
                version before has to serve on, and once there is room the same step has to be made

Then what was killed is started again, the clients pause, what waits is learned, and everything is compared:

    nothing lost     every answer and rating that a client had an acknowledgement for is in the store, word for word
    learned once     the steps' events, one after the other, are the log: none missing, none twice
    one version      `current`, the server, and the log-probs of an answer under the weights on disk agree
    it goes on       a chat is answered, and nothing is left pending

At the end every version on disk is made again from its parent and its record, to the bit.

python -m benchmarks.crashes                                                     five million weights, a few minutes
python -m benchmarks.crashes --model models/smollm2-135m-instruct --kills 15     a model of yours
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import httpx

from benchmarks.cells import PAGES, RECORDS, ROOT, Records, markdown, write_section
from benchmarks.live import random_model
from benchmarks.served import Server

RUNS = ROOT / "runs" / "benchmarks" / "crashes"
RECORD = Records(RECORDS / "crashes")

Moment = Literal["heard", "stepping", "writing", "written", "pointed", "full"]
PLAN: tuple[tuple[Moment, tuple[str, ...]], ...] = (
    ("heard", ("learner",)), ("stepping", ("learner",)), ("writing", ("learner",)), ("written", ("learner",)),
    ("pointed", ("server",)), ("full", ()), ("writing", ("server",)), ("stepping", ("server", "learner")),
    ("written", ("server", "learner")), ("pointed", ("server", "learner")), ("heard", ("server", "learner")),
    ("stepping", ("server",)), ("pointed", ("learner",)), ("writing", ("server", "learner")), ("heard", ("server",)),
)  # fmt: skip
TALKERS = 2
WAIT = 600.0  # seconds for a moment to come, and for what waits to be learned
NEAR = 1e-3  # nats between a log-prob of the server's and one of the weights on disk
TEXTS = ("Name three colours.", "What do bees make?", "The first of May", "Is the sea salt?", "Say hello.")


# --- clients ---------------------------------------------------------------------------------------------------------


@dataclass
class Told:
    """What clients were told, and with that may rely on."""

    answers: dict[str, str] = field(default_factory=dict)  # completion id → its whole text
    begun: set[str] = field(default_factory=set)  # ids of streams that gave at least one byte
    feedback: dict[str, str] = field(default_factory=dict)  # idempotency key → event id
    faults: list[str] = field(default_factory=list)  # answers that no client should ever get


class Talker(threading.Thread):
    """A client that chats and rates while `talking`, until it is told to stop. What it sent without an answer it sends
    again."""

    def __init__(
        self, number: int, url: str, told: Told, talking: threading.Event, ending: threading.Event, tokens: int
    ) -> None:
        super().__init__(daemon=True)
        self.number, self.url, self.told, self.tokens = number, url, told, tokens
        self.talking, self.ending = talking, ending
        self.idle = threading.Event()
        self.draw = random.Random(number)

    def run(self) -> None:
        with httpx.Client(base_url=self.url, timeout=120) as client:
            for turn in itertools.count():
                while not self.talking.is_set() and not self.ending.is_set():
                    self.idle.set()
                    self.talking.wait(0.05)
                self.idle.clear()
                if self.ending.is_set():
                    return
                with contextlib.suppress(httpx.TransportError):
                    name = self.chat(client, stream=turn % 2 == 0)
                    if name is not None:
                        self.rate(client, name, f"t{self.number}n{turn}")
                time.sleep(0.3 * self.draw.random() if self.talking.is_set() else 0.0)

    def chat(self, client: httpx.Client, *, stream: bool) -> str | None:
        """The id of an answer; None when there was none."""
        messages = [{"role": "user", "content": self.draw.choice(TEXTS)}]
        body = {"model": "default", "messages": messages, "max_tokens": self.tokens, "stream": stream}
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
        kind, value = self.draw.choice(
            [("thumb", 1), ("thumb", -1), ("edit", "Red, green and blue."), ("comment", "hm")]
        )
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


# --- the moment ------------------------------------------------------------------------------------------------------


def version_in(root: Path) -> int:
    """What `current` names."""
    version: int = json.loads((root / "current").read_text(encoding="utf-8"))["version"]
    return version


def moment_of(root: Path) -> str:
    """Where the files say that the learner is: "idle", "stepping", "writing" or "written"."""
    pending = (
        [name for name in os.listdir(root / "pending") if name[0].isdigit()] if (root / "pending").exists() else []
    )
    if not pending:
        return "idle"
    names = os.listdir(root / "versions")
    if f"step-{min(pending)[:8]}" in names:
        return "written" if version_in(root) < int(min(pending)[:8]) else "idle"
    return "writing" if any(name.startswith(".staging-") for name in names) else "stepping"


@contextlib.contextmanager
def standing(pid: int) -> Iterator[None]:
    """A process stands still inside, so that what is seen of it is still so when it is killed."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


class Round:
    """Waits for a moment and acts in it. `seen` is where the files said the learner was when it happened."""

    def __init__(self, server: Server, told: Told, draw: random.Random) -> None:
        self.server, self.root, self.told, self.draw = server, server.root, told, draw
        self.seen = ""
        self.end = time.monotonic() + WAIT

    def kill(self, moment: Moment, who: Sequence[str]) -> None:
        if moment == "heard":
            heard = len(self.told.feedback)
            self._until(lambda: moment_of(self.root) == "idle" and len(self.told.feedback) > heard, 0.0005)
            self._act(who)
        elif moment == "pointed":
            before = version_in(self.root)
            self._until(lambda: version_in(self.root) != before, 0.0005)
            time.sleep(self.draw.random() * 0.2)  # anywhere in the change of the weights that answer
            self._act(who)
        else:
            self._catch(moment, lambda: self._act(who))

    def fill_the_disk(self) -> None:
        """No file that the learner writes may grow, until its step has failed on that."""
        learner = self._catch("stepping", lambda: None, last=lambda pid: _limit(pid, 0))
        serves = version_in(self.root)
        try:
            self._until(lambda: self.server.health()["learner"] == "failing", 0.1)
            assert self.server.health()["version"] == version_in(self.root) == serves, "another version serves"
            _ask(self.server, tokens=4)
        finally:
            with contextlib.suppress(ProcessLookupError):
                _limit(learner, resource.RLIM_INFINITY)

    def _catch(self, moment: str, act: Callable[[], None], last: Callable[[int], None] | None = None) -> int:
        """Let the learner run for half a millisecond at a time until it is there, and act while it stands still."""
        if moment in ("stepping", "writing"):
            self._until(lambda: moment_of(self.root) == moment, 0.0005)
            time.sleep(self.draw.random() * (1.0 if moment == "stepping" else 0.05))  # anywhere in it
        while True:
            self._until(lambda: moment_of(self.root) in ("writing", moment), 0.0002)
            learner = self.server.processes().get("learner")
            if learner is None:
                continue
            with contextlib.suppress(ProcessLookupError), standing(learner):
                if moment_of(self.root) == moment:
                    self.seen = moment
                    if last is not None:
                        last(learner)
                    act()
                    return learner
            time.sleep(0.0005)

    def _act(self, who: Sequence[str]) -> None:
        self.seen = moment_of(self.root)
        self.server.kill(*who)

    def _until(self, true: Callable[[], bool], every: float) -> None:
        while not true():
            if time.monotonic() > self.end:
                raise SystemExit(f"its moment does not come; {self.server.log} may say why")
            time.sleep(every)


def _limit(pid: int, size: int) -> None:
    """The largest size in bytes of a file that a process may still write."""
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def _ask(server: Server, tokens: int) -> str:
    """The id of a greedy answer."""
    body = {
        "model": "default", "messages": [{"role": "user", "content": TEXTS[0]}], "max_tokens": tokens, "temperature": 0,
    }  # fmt: skip
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=WAIT).raise_for_status().json()
    return str(answer["id"])


# --- the campaign ----------------------------------------------------------------------------------------------------


def campaign(
    model: Path, root: Path, *, kills: int, seed: int = 0, tokens: int = 8, flags: Sequence[str] = (),
    ahead: bool = False, tell: Callable[[str], None] = print,
) -> dict[str, Any]:  # fmt: skip
    """Kill a server on this model so many times. ahead: as in `Server`.

    Returns what happened. Raises AssertionError for a broken promise.
    """
    draw, told, talking, ending = random.Random(seed), Told(), threading.Event(), threading.Event()
    server = Server(root, ["--model", str(model), "--device", "cpu", *flags], ahead=ahead)
    server.start()
    rounds: list[dict[str, Any]] = []
    talkers = [Talker(number, server.url, told, talking, ending, tokens) for number in range(TALKERS)]
    for talker in talkers:
        talker.start()
    try:
        for number in range(kills):
            moment, who = PLAN[number % len(PLAN)]
            one = Round(server, told, draw)
            talking.set()
            if moment == "full":
                one.fill_the_disk()
            else:
                one.kill(moment, who)
            began = time.monotonic()
            if "server" in who:
                server.start()
            else:
                talking.clear()
            _until_up(server)
            back = time.monotonic() - began
            talking.clear()
            for talker in talkers:
                assert talker.idle.wait(WAIT), "a client waits for ever"
            _quiet(server)
            assert told.faults == [], told.faults
            _check_kept(root, told)
            difference = _check_one_version(server)
            rounds.append({
                "moment": moment, "killed": list(who), "seen": one.seen, "seconds_to_up": back,
                "version": version_in(root), "difference": difference,
            })  # fmt: skip
            tell(f"{number + 1}/{kills} {moment}, {' and '.join(who) or 'disk'}: version {version_in(root)} serves")
    finally:
        ending.set()
        talking.set()
        for talker in talkers:
            talker.join(60)
        server.stop()
    counts = _check_kept(root, told)
    again = _make_again(root)
    return {
        "rounds": rounds, "answers": len(told.answers), "feedback": len(told.feedback), "counts": counts,
        "versions": version_in(root), "made_again": again,
    }  # fmt: skip


def _until_up(server: Server) -> None:
    end = time.monotonic() + WAIT
    while server.health()["learner"] != "up":
        assert time.monotonic() < end, f"learning does not go on; {server.log} says why"
        time.sleep(0.1)


def _quiet(server: Server) -> None:
    """Wait until nothing is left to learn and what was learned serves."""
    end = time.monotonic() + WAIT
    while server.metric("events_pending") or server.health()["version"] != version_in(server.root):
        assert time.monotonic() < end, f"events stay pending, or a version unserved; {server.log} may say why"
        time.sleep(0.1)


def _check_kept(root: Path, told: Told) -> dict[str, int]:
    """Nothing that was acknowledged is lost, and nothing was learned twice. What became of the events."""
    from operant.live.storage.store import Store
    from operant.live.storage.versions import Versions

    with Store(root / "store.db", read_only=True) as store:
        for name, text in told.answers.items():
            stored = store.completion(name)
            assert stored is not None and stored.completion is not None, f"the answer {name} is lost"
            assert stored.completion.text == text and stored.completion.behavior_logprobs is not None
        assert not [name for name in told.begun if store.completion(name) is None], "a begun answer is lost"
        log = store.events_after(0, 10**6)
        kept = {event.idempotency_key: event.id for _, event in log}
        assert len(kept) == len(log), "a key is there twice"
        assert {key: kept.get(key) for key in told.feedback} == told.feedback, "a rating is lost"
        counts = store.counts()
    records = Versions(root).records()
    failed = [o.reason for r in records for o in r.outcomes.values() if o.reason.startswith("the step failed")]
    assert not failed, f"a rating was given up: {failed[0]}"
    assert [name for record in records for name in record.events] == [event.id for _, event in log]
    offset = 0
    for record in records:
        assert record.begin_offset == offset, "a step began elsewhere than the one before it ended"
        offset = record.consumed_offset
    assert counts["events"] == len(log) == counts["used"] + counts["superseded"] + counts["unused"], counts
    return {name: counts[name] for name in ("events", "used", "superseded", "unused")}


def _check_one_version(server: Server) -> float:
    """The largest difference, in nats, of a log-prob that the server gives and one of the weights on disk."""
    from operant.live.storage.store import Store
    from operant.live.storage.versions import Versions
    from operant.models.policy import Policy
    from operant.types import Trajectory

    name = _ask(server, tokens=8)
    versions = Versions(server.root)
    version = versions.pointer().version
    with Store(server.root / "store.db", read_only=True) as store:
        stored = store.completion(name)
    assert stored is not None and stored.completion is not None
    completion = stored.completion
    assert set(completion.policy_version.tolist()) == {version}, "another version answers than `current` names"
    policy = Policy.load(versions.model(version), device="cpu")
    policy.model.eval()
    rewards = completion.model_logprobs * 0
    batch = policy.batch_of([Trajectory(stored.prompt, completion, rewards, rewards == 0)])
    found = policy.logprobs(batch).logprobs[batch.action_mask].detach().numpy()
    difference = float(abs(found - completion.model_logprobs).max())
    assert difference < NEAR, f"the server's weights are not those of version {version} on disk: {difference} nats"
    return difference


def _make_again(root: Path) -> int:
    """How many versions are, bit for bit, what their records make of their parents."""
    command = [
        sys.executable,
        "-m",
        "operant.cli",
        "replay",
        "--verify",
        "true",
        "--root",
        str(root),
        "--device",
        "cpu",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    same = done.stdout.count("the same bits")
    assert done.returncode == 0 and same == len(done.stdout.strip().splitlines()), done.stdout + done.stderr
    return same


# --- the table -------------------------------------------------------------------------------------------------------


def write() -> None:
    lines: list[str] = []
    for file in sorted(RECORD.folder.glob("*.json")):
        lines += [*_tell(json.loads(file.read_text(encoding="utf-8"))), ""]
    text = "\n".join(lines).strip()
    print(text)
    if any("<!-- crashes -->" in page.read_text("utf-8") for page in PAGES.glob("*.md")):
        write_section("crashes", text)


def _tell(record: dict[str, Any]) -> list[str]:
    rounds, counts = record["rounds"], record["counts"]
    count = Counter((one["moment"], " and ".join(one["killed"]) or "nobody") for one in rounds)
    moments = list(dict.fromkeys(moment for moment, _ in count))
    victims = ("server", "learner", "server and learner", "nobody")
    rows = [[moment, *(str(count[moment, victim] or "–") for victim in victims)] for moment in moments]
    apart = max(one["difference"] for one in rounds)
    back = sorted(one["seconds_to_up"] for one in rounds)
    return [
        f"`{record['command']}`: {record['answers']} answers and {record['feedback']} ratings were acknowledged, none "
        f"was lost. Of {counts['events']} events {counts['used']} were used, {counts['superseded']} superseded and "
        f"{counts['unused']} unused, each in one step. After every round the server answered with the version on disk "
        f"(log-probs within {apart:.0e} nats); it was up again after {back[len(back) // 2]:.0f} s at the median, "
        f"{back[-1]:.0f} at most. {record['made_again']} versions on disk were made again to the bit, of "
        f"{record['versions']} in all. {record['machine']}.",
        "",
        markdown(["killed", *victims], rows),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="the folder of a model; five million random weights where left out")
    parser.add_argument("--name", help="of the record; the model's where left out")
    parser.add_argument("--kills", type=int, default=len(PLAN), help=f"rounds; {len(PLAN)} are every moment once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lora_rank", help="for operant serve, which chooses where this is left out")
    parser.add_argument("--write", action="store_true", help="only write the table")
    parser.add_argument("--ahead", action="store_true", help="go before other programs, on a busy machine (needs root)")
    parser.add_argument("flags", nargs="*", help="more flags for operant serve, after --")
    given = parser.parse_args()
    if not given.write:
        flags = [*(["--lora_rank", given.lora_rank] if given.lora_rank else []), *given.flags]
        name = given.name or " ".join([given.model.name if given.model else "small", *flags[:2]])
        told = [f"--{n} {getattr(given, n)}" for n in ("model", "lora_rank", "kills", "seed") if getattr(given, n)]
        command = " ".join(["python -m benchmarks.crashes", *told, *(["--", *given.flags] if given.flags else [])])
        root = RUNS / name.replace(" ", "-") / "live"
        shutil.rmtree(root.parent, ignore_errors=True)
        model = given.model.resolve() if given.model else random_model()
        found = campaign(model, root, kills=given.kills, seed=given.seed, flags=flags, ahead=given.ahead)
        RECORD.put(name.replace("--", ""), found | {"command": command})
    write()


if __name__ == "__main__":
    main()
