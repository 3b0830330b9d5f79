"""The live loop over real HTTP, on this machine: a model of five million weights that people talk to and rate.

    click     seconds from a rating to the weights that learned it serving, the fast gate included, one after the other
    latency   of chats at a load that keeps the sampler half busy: while nobody rates and the server has the machine for
              itself, and while every answer is rated, in turns
    soak      ten minutes at a fixed load with ratings: memory and failures
    fuzz      schemathesis against the server's own OpenAPI (pip install schemathesis): failures

Every cell starts `operant serve` as a process of its own. `others` in a record says how many cores other programs took.

python -m benchmarks.live
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import itertools
import math
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx

from benchmarks.cells import RECORDS, ROOT, Cell, Records, carry_out, command_line, markdown, write_section

RUNS = ROOT / "runs" / "benchmarks" / "live"
RECORD = Records(RECORDS / "live")
CELLS = ("click", "latency", "soak", "fuzz")

TOKENS = 32  # of an answer: random weights end none earlier
CLICKS, WARM_UP = 60, 5
TURNS, TURN_SECONDS = 3, 60.0  # of each kind, of the latency cell
HALF_BUSY = 0.5
SOAK_SECONDS, SOAK_RATED = 600.0, 5  # every fifth answer is rated
TICKS = os.sysconf("SC_CLK_TCK")


# --- the server ------------------------------------------------------------------------------------------------------


def model() -> Path:
    """Five million random weights and a vocabulary of a thousand, made once."""
    folder = RUNS / "model"
    if not folder.exists():
        from operant.data.text import Codec
        from operant.models.policy import Policy
        from operant.recipes.quickstart_task import make_task

        task = make_task(0, labelled=0, prompts=10, dev=0, test=0, raw=2000)
        policy = Policy.new("gpt2", "small", Codec.train_bpe(task.raw, vocab_size=1000), max_length=256, device="cpu")
        policy.save(folder)
    return folder


@dataclasses.dataclass
class Server:
    url: str
    pid: int

    def processes(self) -> dict[str, int]:
        """The server and its learner."""
        found = {"server": self.pid}
        for file in Path(f"/proc/{self.pid}/task").glob("*/children"):
            for child in file.read_text().split():
                if b"operant.live.learning.worker" in Path(f"/proc/{child}/cmdline").read_bytes():
                    found["learner"] = int(child)
        return found

    def memory(self) -> dict[str, float]:
        """Resident MiB."""
        sizes = {}
        for name, pid in self.processes().items():
            with contextlib.suppress(OSError):
                found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
                sizes[name] = int(found[1]) / 1024 if found else math.nan
        return sizes

    def metric(self, name: str) -> float:
        text = httpx.get(f"{self.url}/metrics", timeout=30).text
        return float(next(line.split()[-1] for line in text.splitlines() if line.startswith(f"operant_{name} ")))


@contextlib.contextmanager
def serving(name: str, *flags: str) -> Iterator[Server]:
    """`operant serve` on a folder of its own, its learner ready."""
    root = RUNS / name
    shutil.rmtree(root, ignore_errors=True)
    root.parent.mkdir(parents=True, exist_ok=True)
    # random weights wander further than a model that has something to lose; drift is not what is measured
    settings = ["--model", str(model()), "--root", str(root), "--port", "0", "--drift_budget", "100",
                "--likelihood_drop", "100", "--device", "cpu"]  # fmt: skip
    command = [sys.executable, "-m", "operant.cli", "serve", *settings, *flags]
    with (RUNS / f"{name}.log").open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT)
    assert process.stdout is not None
    try:
        found = None
        while found is None:
            line = process.stdout.readline()
            if not line:
                raise SystemExit(f"the server did not start; {RUNS / name}.log says why")
            found = re.search(r"(http://[\w.:\[\]]+)/v1", line)
        server = Server(found[1], process.pid)
        end = time.monotonic() + 120
        while httpx.get(f"{server.url}/health", timeout=30).json()["learner"] != "up":
            if time.monotonic() > end:
                raise SystemExit(f"the learner does not get ready; {RUNS / name}.log says why")
            time.sleep(0.2)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


class Others:
    """How many cores everything but this process, the server and its learner took, since it was made."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.begin = self._now()

    def _now(self) -> tuple[float, float, float]:
        user, nice, system, _idle, _wait, irq, soft, *_ = map(
            int, Path("/proc/stat").read_text().splitlines()[0].split()[1:]
        )
        own = 0
        for pid in (os.getpid(), *self.server.processes().values()):
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                own += int(fields[11]) + int(fields[12])
        return time.monotonic(), (user + nice + system + irq + soft) / TICKS, own / TICKS

    def cores(self) -> float:
        (began, all_then, own_then), (now, all_now, own_now) = self.begin, self._now()
        return round(max(0.0, (all_now - all_then) - (own_now - own_then)) / (now - began), 2)


def settings_of(server: Server) -> dict[str, Any]:
    return {"usable_cores": len(os.sched_getaffinity(0)), "processes": sorted(server.processes())}


# --- talking to it ---------------------------------------------------------------------------------------------------


def chat_body(number: int) -> dict[str, Any]:
    words = random.Random(number).choices(
        "the first day of May at noon costs four dollars and three days".split(), k=12
    )
    return {
        "model": "default", "messages": [{"role": "user", "content": " ".join(words)}], "max_tokens": TOKENS,
        "seed": number,
    }  # fmt: skip


def rating_of(number: int, answer: dict[str, Any]) -> dict[str, Any]:
    return {"completion_id": answer["id"], "kind": "thumb", "value": 1 if number % 2 else -1}


@dataclasses.dataclass
class Load:
    """Chats that arrive by a Poisson process whatever the server does. rated: every so many answers one is; 0: none."""

    server: Server
    rate: float
    seconds: float
    rated: int
    seed: int
    latencies: list[float] = dataclasses.field(default_factory=list)
    statuses: Counter[str] = dataclasses.field(default_factory=Counter)

    async def run(self, beside: Callable[[], Awaitable[None]] | None = None) -> None:
        draw = random.Random(self.seed)
        limits = httpx.Limits(max_connections=200, max_keepalive_connections=200)
        async with httpx.AsyncClient(base_url=self.server.url, timeout=60, limits=limits) as client:
            watch = asyncio.create_task(beside()) if beside is not None else None
            begin, at, tasks, number = time.monotonic(), 0.0, [], 0
            while (at := at + draw.expovariate(self.rate)) < self.seconds:
                await asyncio.sleep(max(0.0, begin + at - time.monotonic()))
                tasks.append(asyncio.create_task(self._one(client, number)))
                number += 1
            await asyncio.gather(*tasks)
            if watch is not None:
                watch.cancel()

    async def _one(self, client: httpx.AsyncClient, number: int) -> None:
        began = time.monotonic()
        answer = await self._post(client, "/v1/chat/completions", chat_body(number))
        if answer is None:
            return
        self.latencies.append(time.monotonic() - began)
        if self.rated and number % self.rated == 0:
            await self._post(client, "/v1/feedback", rating_of(number // self.rated, answer))

    async def _post(self, client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        try:
            response = await client.post(path, json=body)
        except httpx.HTTPError as error:
            self.statuses[type(error).__name__] += 1
            return None
        self.statuses[str(response.status_code)] += 1
        return response.json() if response.status_code == 200 else None


def quantiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)

    def at(share: float) -> float:
        return ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)]

    return {"p50": at(0.5), "p95": at(0.95), "max": ordered[-1], "count": len(ordered)}


# --- cells -----------------------------------------------------------------------------------------------------------


def click() -> dict[str, Any]:
    """One person: a chat, a thumb, and what it did, `CLICKS` times."""
    stages = ("received", "queued", "begun", "stepped", "gated", "served")
    rows: list[dict[str, float]] = []
    states: Counter[str] = Counter()
    with serving("click") as server, httpx.Client(base_url=server.url, timeout=60) as client:
        others = Others(server)
        for number in range(WARM_UP + CLICKS):
            answer = client.post("/v1/chat/completions", json=chat_body(number)).raise_for_status().json()
            clicked = time.time()
            receipt = client.post("/v1/feedback", json=rating_of(number, answer)).raise_for_status().json()
            acknowledged = time.time()
            story = client.get(f"/v1/feedback/{receipt['id']}", params={"wait": 30}).raise_for_status().json()
            if number < WARM_UP:
                continue
            states[story["state"] + (f": {story['reason']}" if story["reason"] else "")] += 1
            times = story["times"]
            if "served" in times:
                row = {"total": times["served"] - clicked, "acknowledged": acknowledged - clicked}
                row |= {f"{a}→{b}": times[b] - times[a] for a, b in itertools.pairwise(stages)}
                rows.append(row)
        told = {name: quantiles([row[name] for row in rows]) for name in rows[0]}
        return {"seconds": told, "states": dict(states), "others": others.cores(), **settings_of(server)}


def half_busy(server: Server) -> float:
    """Chats a second that keep the sampler half busy while nobody rates."""
    rate = 4.0
    for seed in range(4):
        load = Load(server, rate, 20.0, 0, 1000 + seed)
        seen: list[float] = []

        async def look(seen: list[float] = seen) -> None:
            await asyncio.sleep(12)
            while True:
                seen.append(await asyncio.to_thread(server.metric, "busy_fraction"))
                await asyncio.sleep(1)

        asyncio.run(load.run(look))
        busy = statistics.fmean(seen)
        rate *= min(3.0, max(0.3, HALF_BUSY / max(busy, 0.02)))
    return rate


def latency() -> dict[str, Any]:
    """The same arrivals without and with ratings, in turns, so that a machine that changes changes both."""
    latencies: dict[str, list[float]] = {"alone": [], "learning": []}
    taken: dict[str, list[float]] = {"alone": [], "learning": []}
    busy: dict[str, list[float]] = {"alone": [], "learning": []}
    statuses: Counter[str] = Counter()
    steps = 0.0
    with serving("latency") as server:
        rate = half_busy(server)
        for turn in range(TURNS):
            for kind, rated in (("alone", 0), ("learning", 1)):
                quiet(server)
                others, before = Others(server), server.metric("serving_version")
                load = Load(server, rate, TURN_SECONDS, rated, turn)

                async def look(kind: str = kind) -> None:
                    await asyncio.sleep(15)
                    while True:
                        busy[kind].append(await asyncio.to_thread(server.metric, "busy_fraction"))
                        await asyncio.sleep(5)

                asyncio.run(load.run(look))
                latencies[kind] += load.latencies
                statuses += load.statuses
                taken[kind].append(others.cores())
                if rated:
                    steps += server.metric("serving_version") - before
        found: dict[str, Any] = {kind: quantiles(values) for kind, values in latencies.items()}
        found |= {"busy": {k: statistics.fmean(v) for k, v in busy.items()}, "others": taken, "rate": rate}
        found |= {"versions_a_minute": steps / (TURNS * TURN_SECONDS / 60), "statuses": dict(statuses)}
        return found | {"ratio_p95": found["learning"]["p95"] / found["alone"]["p95"], **settings_of(server)}


def quiet(server: Server) -> None:
    """Wait until the learner has nothing more to learn."""
    end = time.monotonic() + 120
    while server.metric("events_pending") and time.monotonic() < end:
        time.sleep(0.5)


def soak() -> dict[str, Any]:
    """Memory over ten minutes at a fixed load."""
    with serving("soak") as server:
        rate = 0.5 * half_busy(server)
        others, points = Others(server), list[dict[str, float]]()
        load = Load(server, rate, SOAK_SECONDS, SOAK_RATED, 7)
        begin = time.monotonic()

        async def look() -> None:
            while True:
                points.append({"at": time.monotonic() - begin, **server.memory()})
                await asyncio.sleep(5)

        asyncio.run(load.run(look))
        served = server.metric("serving_version")
        late = [p for p in points if p["at"] > SOAK_SECONDS / 4]  # what fills caches is over by then
        slopes = {}
        for name in ("server", "learner"):
            pairs = [(p["at"] / 60, p[name]) for p in late if name in p]
            slopes[name] = statistics.linear_regression(*zip(*pairs)).slope
        return {
            "seconds": SOAK_SECONDS, "rate": rate, "statuses": dict(load.statuses), "versions": served,
            "latency": quantiles(load.latencies), "first_mib": late[0], "last_mib": late[-1],
            "slope_mib_a_minute": slopes, "points": points, "others": others.cores(), **settings_of(server),
        }  # fmt: skip


def fuzz() -> dict[str, Any]:
    """Schemathesis, an open program: what fails is in its report beside the server's log."""
    program = shutil.which("schemathesis") or str(Path(sys.executable).with_name("schemathesis"))
    if not Path(program).exists():
        raise SystemExit("schemathesis is not installed: pip install schemathesis")
    with serving("fuzz") as server:
        report = RUNS / "fuzz.txt"
        command = [
            program, "run", f"{server.url}/openapi.json", "--checks", "not_a_server_error", "--max-examples", "100",
            "--seed", "1", "--request-timeout", "30", "--workers", "1", "--no-color",
        ]  # fmt: skip
        with report.open("w") as file:
            code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False, cwd=RUNS).returncode
        text = report.read_text()
        count = re.search(r"(\d+) generated", text) or re.search(r"Test cases:\s*(\d+)", text)
        alive = httpx.get(f"{server.url}/health", timeout=30).status_code == 200
        failures = len(set(re.findall(r"^_+ (.+?) _+$", text, re.MULTILINE)))
        return {
            "exit_status": code, "cases": int(count[1]) if count else None, "failing_operations": failures,
            "alive": alive, "tail": text.strip().splitlines()[-12:],
        }  # fmt: skip


MEASURES: dict[str, Callable[[], dict[str, Any]]] = {
    "click": click,
    "latency": latency,
    "soak": soak,
    "fuzz": fuzz,
}


# --- the table -------------------------------------------------------------------------------------------------------


def write() -> None:
    lines = [
        "`python -m benchmarks.live`: five million weights (gpt2, small), answers of 32 tokens, `operant serve` as it "
        f"comes, one thread for the learner. {RECORD.machines()}."
    ]
    for name, tell in (("click", _tell_click), ("latency", _tell_latency), ("soak", _tell_soak), ("fuzz", _tell_fuzz)):
        if RECORD.has(name):
            lines += ["", *tell(RECORD.get(name))]
    write_section("live", "\n".join(lines))
    print("\n".join(lines))


def _tell_click(record: dict[str, Any]) -> list[str]:
    rows = [[name, f"{q['p50']:.3f}", f"{q['p95']:.3f}"] for name, q in record["seconds"].items()]
    told = ", ".join(f"{count} {state}" for state, count in record["states"].items())
    return [
        f"One rating after the other ({told}) on {record['usable_cores']} cores, of which other programs took "
        f"{record['others']:.2f}. Seconds from the click, and between the times that `GET /v1/feedback/{{id}}` tells:",
        "", markdown(["", "p50, s", "p95, s"], rows),
    ]  # fmt: skip


def _tell_latency(record: dict[str, Any]) -> list[str]:
    rows = [
        [
            words, f"{record[kind]['p50']:.3f}", f"{record[kind]['p95']:.3f}", str(record[kind]["count"]),
            f"{record['busy'][kind]:.2f}", f"{statistics.fmean(record['others'][kind]):.2f}",
        ]
        for kind, words in (("alone", "nobody rates"), ("learning", "every answer is rated"))
    ]  # fmt: skip
    return [
        f"Chats that arrive at random, {record['rate']:.1f} a second, in turns of {TURN_SECONDS:.0f} s on "
        f"{record['usable_cores']} cores; while rated, {record['versions_a_minute']:.0f} versions a minute. The ratio "
        f"of the p95 is {record['ratio_p95']:.2f}.",
        "", markdown(["", "p50, s", "p95, s", "chats", "sampler busy", "cores taken by others"], rows),
    ]  # fmt: skip


def _tell_soak(record: dict[str, Any]) -> list[str]:
    slope, first, last = record["slope_mib_a_minute"], record["first_mib"], record["last_mib"]
    sizes = "; ".join(
        f"the {name} from {first[name]:.0f} to {last[name]:.0f} MiB ({slope[name]:+.2f} a minute)"
        for name in ("server", "learner")
    )
    told = ", ".join(f"{count} with {status}" for status, count in sorted(record["statuses"].items()))
    return [
        f"Ten minutes at {record['rate']:.1f} chats a second, every fifth rated, {record['versions']:.0f} versions: "
        f"answers {told}. Resident memory after the first quarter: {sizes}.",
    ]


def _tell_fuzz(record: dict[str, Any]) -> list[str]:
    bad = record["failing_operations"]
    verdict = "no server error" if record["exit_status"] == 0 else f"{bad} operations with a server error"
    return [f"Schemathesis against `/openapi.json`, {record['cases']} cases: {verdict}."]


def measure(name: str) -> None:
    RECORD.put(name, MEASURES[name]())


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--only", nargs="+", choices=CELLS, default=list(CELLS), help="these cells alone")
    given: argparse.Namespace = parser.parse_args()
    carry_out(
        given, "benchmarks.live", cells=lambda: [Cell(name) for name in given.only],
        done=lambda cell: RECORD.has(cell.name), measure=measure, write=write, records=RECORD, runs=RUNS,
    )  # fmt: skip


if __name__ == "__main__":
    main()
