"""The live loop over real HTTP, on this machine: a model of five million weights that people talk to and rate.

    click     seconds from a rating to the weights that learned it serving, the fast gate included, one after the other;
              the first one of a server (cold) apart. Also what a version takes on disk, and memory
    latency   of chats at a load that keeps the sampler half busy: while nobody rates and the server has the machine for
              itself, and while every answer is rated, in turns
    soak      ten minutes at a fixed load with ratings: memory and failures
    fuzz      schemathesis against the server's own OpenAPI (pip install schemathesis): failures

Every cell starts `operant serve` as a process of its own. `others` in a record says how many cores other programs took.

python -m benchmarks.live
python -m benchmarks.live --model models/smollm2-135m-instruct       a model of yours: click and latency, answers of 60
                          --lora_rank auto --ratings 10 --rounds 3   tokens; flags after -- go to operant serve
"""

from __future__ import annotations

import argparse
import asyncio
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
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from benchmarks.cells import (
    PAGES,
    RECORDS,
    ROOT,
    Cell,
    Records,
    carry_out,
    command_line,
    markdown,
    spread,
    write_section,
)
from benchmarks.served import Memory, Others, Server, serving

RUNS = ROOT / "runs" / "benchmarks" / "live"
CELLS = ("click", "latency", "soak", "fuzz")
STAGES = ("received", "queued", "begun", "stepped", "gated", "served")

HALF_BUSY = 0.5
SOAK_SECONDS, SOAK_RATED = 600.0, 5  # every fifth answer is rated
PATIENCE = 600.0  # seconds for one rating to be learned


# --- what is measured ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Subject:
    """A model, how it is served and rated, and where what is measured of it is kept.

    model: a folder; None is five million random weights, made here.
    name: of these records among those of the same model. flags: for `operant serve`.
    ahead: the server goes before other programs, where the machine is not quiet. tokens: of an answer.
    warm_up: ratings of a round that do not count, the first of which is the cold one. ratings: of a round that count.
    rounds: of a server begun anew and rated, and turns of each kind of the latencies. reading: seconds between an
    answer and its click.
    """

    model: Path | None
    name: str
    flags: tuple[str, ...]
    tokens: int
    warm_up: int
    ratings: int
    rounds: int
    turn_seconds: float
    records: Records
    runs: Path
    ahead: bool
    reading: float

    @classmethod
    def given(cls, given: argparse.Namespace) -> Subject:
        flags = tuple(given.flags)
        if given.lora_rank is not None:
            flags = ("--lora_rank", given.lora_rank, *flags)
        if given.threads is not None:
            flags = ("--threads", str(given.threads), *flags)
        if given.model is None:
            # random weights wander further than a model that has something to lose; drift is not what is measured
            flags = ("--drift_budget", "100", "--likelihood_drop", "100", *flags)
            return cls(
                None, "", flags, tokens=given.tokens or 32, warm_up=5, ratings=given.ratings or 60,
                rounds=given.rounds or 1, turn_seconds=given.seconds, records=Records(RECORDS / "live"), runs=RUNS,
                ahead=given.ahead, reading=given.reading,
            )  # fmt: skip
        model = given.model.resolve()
        name = given.name or (f"lora_rank {given.lora_rank}" if given.lora_rank not in (None, "0") else "all weights")
        place = Path(model.name) / name.replace(" ", "-")
        return cls(
            model, name, flags, tokens=given.tokens or 60, warm_up=1, ratings=given.ratings or 10,
            rounds=given.rounds or 3, turn_seconds=given.seconds, records=Records(RECORDS / "live_models" / place),
            runs=RUNS / place, ahead=given.ahead, reading=given.reading,
        )  # fmt: skip

    @contextmanager
    def served(self, name: str) -> Iterator[Server]:
        """This model on a root of its own, begun anew."""
        root = self.runs / name
        shutil.rmtree(root, ignore_errors=True)
        model = str(self.model or random_model())
        with serving(root, "--model", model, "--device", "cpu", *self.flags, ahead=self.ahead) as server:
            yield server

    def chat_body(self, number: int) -> dict[str, Any]:
        return {
            "model": "default", "messages": [{"role": "user", "content": self._question(number)}],
            "max_tokens": self.tokens, "seed": number,
        }  # fmt: skip

    def _question(self, number: int) -> str:
        if self.model is None:
            words = "the first day of May at noon costs four dollars and three days".split()
            return " ".join(random.Random(number).choices(words, k=12))
        first, second = random.Random(number).sample(THINGS, 2)
        return f"Tell me in detail, in several paragraphs, about {first} and about {second}."


THINGS = (
    "the sea", "bicycles", "bread", "volcanoes", "chess", "the moon", "bees", "bridges", "tea", "railways", "wool",
    "lighthouses", "the violin", "snow", "paper", "deserts", "clocks", "rice", "glass", "whales", "maps", "salt",
)  # fmt: skip


def random_model() -> Path:
    """Five million random weights, which end no answer early, and a vocabulary of a thousand, made once."""
    folder = RUNS / "model"
    if not folder.exists():
        from operant.data.text import Codec
        from operant.models.policy import Policy
        from operant.recipes.quickstart_task import make_task

        task = make_task(0, labelled=0, prompts=10, dev=0, test=0, raw=2000)
        policy = Policy.new("gpt2", "small", Codec.train_bpe(task.raw, vocab_size=1000), max_length=256, device="cpu")
        policy.save(folder)
    return folder


def settings_of(server: Server) -> dict[str, Any]:
    return {"usable_cores": len(os.sched_getaffinity(0)), "processes": sorted(server.processes())}


def load_of_machine() -> float:
    """Processes that ran or wanted to, the mean over the last minute."""
    return os.getloadavg()[0]


# --- talking to it ---------------------------------------------------------------------------------------------------


def rating_of(number: int, answer: dict[str, Any]) -> dict[str, Any]:
    return {"completion_id": answer["id"], "kind": "thumb", "value": 1 if number % 2 else -1}


@dataclasses.dataclass
class Load:
    """Chats that arrive by a Poisson process whatever the server does. rated: every so many answers one is; 0: none."""

    subject: Subject
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
        async with httpx.AsyncClient(base_url=self.server.url, timeout=PATIENCE, limits=limits) as client:
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
        answer = await self._post(client, "/v1/chat/completions", self.subject.chat_body(number))
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


def quantiles(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)

    def at(share: float) -> float:
        return ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)]

    return {"p50": at(0.5), "p95": at(0.95), "max": ordered[-1], "count": len(ordered)}


# --- cells -----------------------------------------------------------------------------------------------------------


def click(subject: Subject) -> dict[str, Any]:
    """One person: a chat, a thumb, and what it did; again and again, on a server begun anew in each round."""
    rounds = [_round_of_clicks(subject) for _ in range(subject.rounds)]
    rows = [row for one in rounds for row in one["rows"]]
    if not rows:
        raise SystemExit(f"no rating was learned: {[one['states'] for one in rounds]}")
    told = {name: quantiles([row[name] for row in rows]) for name in rows[0]}
    states = sum((one.pop("states") for one in rounds), Counter[str]())
    tokens = [row.pop("tokens") for row in rows]
    told.pop("tokens")
    return {
        "seconds": told, "states": dict(states), "tokens": quantiles(tokens), "rounds": rounds,
        "others": statistics.fmean(one["others"] for one in rounds), **rounds[-1]["settings"],
    }  # fmt: skip


def _round_of_clicks(subject: Subject) -> dict[str, Any]:
    rows: list[dict[str, float]] = []
    states: Counter[str] = Counter()
    cold: dict[str, float] | None = None
    load = [load_of_machine()]
    with subject.served("click") as server, httpx.Client(base_url=server.url, timeout=PATIENCE) as client:
        with Memory(server) as memory:
            others = Others(server)
            for number in range(subject.warm_up + subject.ratings):
                state, row = _click(client, subject, number)
                if number == 0:
                    cold = row
                if number >= subject.warm_up:
                    states[state] += 1
                    rows += [row] if row is not None else []
            taken = others.cores()
        load.append(load_of_machine())
        return {
            "rows": rows, "states": states, "cold": cold, "load": load, "others": taken,
            "disk_mb": _disk_of_a_version(server.root), "memory_mb": memory.last, "peak_mb": memory.peak,
            "settings": settings_of(server),
        }  # fmt: skip


def _click(client: httpx.Client, subject: Subject, number: int) -> tuple[str, dict[str, float] | None]:
    """What became of one rating, and the seconds from the click to each stage where it was learned and serves."""
    answer = client.post("/v1/chat/completions", json=subject.chat_body(number)).raise_for_status().json()
    time.sleep(subject.reading)
    clicked = time.time()
    receipt = client.post("/v1/feedback", json=rating_of(number, answer)).raise_for_status().json()
    acknowledged, story = time.time(), receipt
    while story["state"] == "pending" or (story["state"] == "used" and "served" not in story["times"]):
        if time.time() - clicked > PATIENCE:
            raise SystemExit(f"a rating waits since {PATIENCE:g} s: {story}")
        story = client.get(f"/v1/feedback/{receipt['id']}", params={"wait": 30}).raise_for_status().json()
    times, row = story["times"], None
    if "served" in times:
        row = {"total": times["served"] - clicked, "acknowledged": acknowledged - clicked}
        row |= {f"{a}→{b}": times[b] - times[a] for a, b in itertools.pairwise(STAGES)}
        row |= {"tokens": answer["usage"]["completion_tokens"]}
    return story["state"] + (f": {story['reason']}" if story["reason"] else ""), row


def _disk_of_a_version(root: Path) -> float:
    """The most MB that a version after the first has for itself: a file that earlier ones have too is theirs."""
    own, seen = [], set[int]()
    for folder in sorted((root / "versions").glob("step-*")):
        found = {file.stat().st_ino: file.stat().st_size for file in folder.rglob("*") if file.is_file()}
        own.append(1e-6 * sum(size for inode, size in found.items() if inode not in seen))
        seen |= found.keys()
    return max(own[1:], default=math.nan)


def half_busy(subject: Subject, server: Server) -> float:
    """Chats a second that keep the sampler half busy while nobody rates."""
    alone = []
    for number in range(3):
        began = time.monotonic()
        httpx.post(f"{server.url}/v1/chat/completions", json=subject.chat_body(number), timeout=PATIENCE)
        alone.append(time.monotonic() - began)
    rate = HALF_BUSY / statistics.median(alone)
    for seed in range(2):
        load = Load(subject, server, rate, max(20.0, 4 / rate), 0, 1000 + seed)
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


def latency(subject: Subject) -> dict[str, Any]:
    """The same arrivals without and with ratings, in turns, so that a machine that changes changes both."""
    turns: list[dict[str, Any]] = []
    statuses: Counter[str] = Counter()
    steps = 0.0
    with subject.served("latency") as server:
        rate = half_busy(subject, server)
        for number in range(subject.rounds):
            for kind, rated in (("alone", 0), ("learning", 1)):
                quiet(server)
                others, before = Others(server), server.metric("serving_version")
                load, busy = Load(subject, server, rate, subject.turn_seconds, rated, number), list[float]()

                async def look(busy: list[float] = busy) -> None:
                    await asyncio.sleep(min(15.0, subject.turn_seconds / 2))
                    while True:
                        busy.append(await asyncio.to_thread(server.metric, "busy_fraction"))
                        await asyncio.sleep(5)

                asyncio.run(load.run(look))
                statuses += load.statuses
                turns.append({
                    "kind": kind, "latencies": load.latencies, "busy": statistics.fmean(busy),
                    "others": others.cores(), "load": load_of_machine(),
                })  # fmt: skip
                if rated:
                    steps += server.metric("serving_version") - before
        by_kind = {kind: [turn for turn in turns if turn["kind"] == kind] for kind in ("alone", "learning")}
        found: dict[str, Any] = {
            kind: quantiles([seconds for turn in those for seconds in turn["latencies"]])
            for kind, those in by_kind.items()
        }
        for what in ("others", "load"):
            found[what] = {kind: [turn[what] for turn in those] for kind, those in by_kind.items()}
        found["busy"] = {kind: statistics.fmean(turn["busy"] for turn in those) for kind, those in by_kind.items()}
        pairs = zip(*([quantiles(turn["latencies"]) for turn in those] for those in by_kind.values()), strict=True)
        found["ratios"] = [{q: learning[q] / alone[q] for q in ("p50", "p95")} for alone, learning in pairs]
        found |= {"versions_a_minute": steps / (subject.rounds * subject.turn_seconds / 60), "rate": rate}
        found |= {"statuses": dict(statuses), "turn_seconds": subject.turn_seconds}
        return found | {"ratio_p95": found["learning"]["p95"] / found["alone"]["p95"], **settings_of(server)}


def quiet(server: Server) -> None:
    """Wait until the learner has nothing more to learn."""
    end = time.monotonic() + PATIENCE
    while server.metric("events_pending") and time.monotonic() < end:
        time.sleep(0.5)


def soak(subject: Subject) -> dict[str, Any]:
    """Memory over ten minutes at a fixed load."""
    with subject.served("soak") as server:
        rate = 0.5 * half_busy(subject, server)
        others, points = Others(server), list[dict[str, float]]()
        load = Load(subject, server, rate, SOAK_SECONDS, SOAK_RATED, 7)
        begin = time.monotonic()

        async def look() -> None:
            while True:
                sizes = {name: size["rss"] / 1.048576 for name, size in server.memory().items()}  # MiB, as ever
                points.append({"at": time.monotonic() - begin, **sizes})
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


def fuzz(subject: Subject) -> dict[str, Any]:
    """Schemathesis, an open program: what fails is in its report beside the server's log."""
    program = shutil.which("schemathesis") or str(Path(sys.executable).with_name("schemathesis"))
    if not Path(program).exists():
        raise SystemExit("schemathesis is not installed: pip install schemathesis")
    with subject.served("fuzz") as server:
        report = subject.runs / "fuzz.txt"
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


MEASURES: dict[str, Callable[[Subject], dict[str, Any]]] = {
    "click": click,
    "latency": latency,
    "soak": soak,
    "fuzz": fuzz,
}


# --- the tables: one of each cell for the random weights, one of all records side by side for a model -----------------


def write(subject: Subject) -> None:
    if subject.model is None:
        section, text = "live", _tell(subject.records)
    else:
        section, text = f"live {subject.model.name}", _compare(subject.records.folder.parent)
    print(text)
    if subject.model is None or any(f"<!-- {section} -->" in page.read_text("utf-8") for page in PAGES.glob("*.md")):
        write_section(section, text)


def _tell(records: Records) -> str:
    lines = [
        "`python -m benchmarks.live`: five million weights (gpt2, small), answers of 32 tokens, `operant serve` as it "
        f"comes, one thread for the learner. {records.machines()}."
    ]
    for name, tell in (("click", _tell_click), ("latency", _tell_latency), ("soak", _tell_soak), ("fuzz", _tell_fuzz)):
        if records.has(name):
            lines += ["", *tell(records.get(name))]
    return "\n".join(lines)


def _tell_click(record: dict[str, Any]) -> list[str]:
    rows = [[name, f"{q['p50']:.3f}", f"{q['p95']:.3f}"] for name, q in record["seconds"].items()]
    told = ", ".join(f"{count} {state}" for state, count in record["states"].items())
    return [
        f"One rating after the other ({told}) on {record['usable_cores']} cores, of which other programs took "
        f"{record['others']:.2f}. Seconds from the click, and between the times that `GET /v1/feedback/{{id}}` tells:",
        "", markdown(["", "p50, s", "p95, s"], rows), *_tell_size(record),
    ]  # fmt: skip


def _tell_size(record: dict[str, Any]) -> list[str]:
    if "rounds" not in record:  # measured before these were
        return []
    one = record["rounds"][-1]
    sizes = ", ".join(f"{name} {size['rss']:.0f} MB" for name, size in one["peak_mb"].items())
    cold = f"The first click of the server took {one['cold']['total']:.2f} s. " if one["cold"] else ""
    return ["", f"{cold}A version takes {one['disk_mb']:.1f} MB of disk. Resident memory, at most: {sizes}."]


def _tell_latency(record: dict[str, Any]) -> list[str]:
    rows = [
        [
            words, f"{record[kind]['p50']:.3f}", f"{record[kind]['p95']:.3f}", str(record[kind]["count"]),
            f"{record['busy'][kind]:.2f}", f"{statistics.fmean(record['others'][kind]):.2f}",
        ]
        for kind, words in (("alone", "nobody rates"), ("learning", "every answer is rated"))
    ]  # fmt: skip
    turn = record.get("turn_seconds", 60.0)
    return [
        f"Chats that arrive at random, {record['rate']:.1f} a second, in turns of {turn:.0f} s on "
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


def _compare(folder: Path) -> str:
    """Everything that was measured of one model, a column for each of its records."""
    columns = [Records(place) for place in sorted(folder.iterdir()) if any(place.glob("*.json"))]
    found = {
        records.folder.name.replace("-", " "): {
            name: records.get(name) for name in ("click", "latency") if records.has(name)
        }
        for records in columns
    }
    found = dict(sorted(found.items(), key=lambda item: _some(item[1])["time"]))
    lines = [f"- {name}: `{_some(cells)['command']}`" for name, cells in found.items()]
    rows: dict[str, list[str]] = {}
    for cells in found.values():
        figures = _figures(cells)
        for what in figures:
            rows.setdefault(what, [])
    for what, row in rows.items():
        row += [_figures(cells).get(what, "–") for cells in found.values()]
    machines = sorted({records.machines() for records in columns})
    table = markdown(["", *found], [[what, *row] for what, row in rows.items()])
    return "\n".join([*lines, "", table, "", f"Measured on {'; '.join(machines)}."])


def _some(cells: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return next(iter(cells.values()))


def _figures(cells: dict[str, dict[str, Any]]) -> dict[str, str]:
    """The rows of one column."""
    told: dict[str, str] = {}
    if "click" in cells:
        record = cells["click"]
        rounds = record["rounds"]
        told["click → served, p50 / p95, s"] = _two(record["seconds"]["total"])
        told["the first click of a server, s"] = spread([one["cold"]["total"] for one in rounds if one["cold"]])
        for name, quantile in record["seconds"].items():
            if name != "total":
                told[f"· {name}"] = _two(quantile)
        told["ratings that count"] = ", ".join(f"{count} {state}" for state, count in record["states"].items())
        told["tokens of a rated answer, median"] = f"{record['tokens']['p50']:.0f}"
        told["disk a version, MB"] = spread([one["disk_mb"] for one in rounds])
        for name in ("server", "learner", "together"):
            peaks = [[one["peak_mb"][name][kind] for one in rounds] for kind in ("rss", "pss")]
            told[f"memory, {name}, at most: resident / its share of what is mapped, MB"] = " / ".join(
                spread(values, 0) for values in peaks
            )
        told["cores that other programs took, clicks"] = spread([one["others"] for one in rounds], 2)
        told["load of the machine, clicks"] = spread([x for one in rounds for x in one["load"]])
    if "latency" in cells:
        record = cells["latency"]
        told["chats while nobody rates, p50 / p95, s"] = _two(record["alone"])
        told["chats while every answer is rated, p50 / p95, s"] = _two(record["learning"])
        for q in ("p50", "p95"):
            told[f"ratio of the {q}"] = spread([ratio[q] for ratio in record["ratios"]], 2)
        told["chats of each kind"] = f"{record['alone']['count']}, {60 * record['rate']:.0f} a minute"
        told["versions a minute"] = f"{record['versions_a_minute']:.1f}"
        others = [spread(record["others"][kind], 2) for kind in ("alone", "learning")]
        told["cores that other programs took, chats: nobody rates / rated"] = " / ".join(others)
        loads = [spread(record["load"][kind]) for kind in ("alone", "learning")]
        told["load of the machine, chats: nobody rates / rated"] = " / ".join(loads)
    return told


def _two(quantile: dict[str, float]) -> str:
    return f"{quantile['p50']:.2f} / {quantile['p95']:.2f}"


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--only", nargs="+", choices=CELLS, help="these cells alone")
    parser.add_argument("--model", type=Path, help="the folder of a model to measure instead")
    parser.add_argument("--name", help="of the column of a model; its kind of weights where left out")
    parser.add_argument("--lora_rank", help="for operant serve, which chooses where this is left out")
    parser.add_argument("--threads", type=int, help="for operant serve, which chooses where this is left out")
    parser.add_argument("--tokens", type=int, help="of an answer (32; of a model 60)")
    parser.add_argument("--ratings", type=int, help="that count, in a round (60; of a model 10)")
    parser.add_argument("--rounds", type=int, help="servers rated, and turns of each kind of the latencies (1; 3)")
    parser.add_argument("--seconds", type=float, default=60.0, help="of a turn")
    parser.add_argument("--reading", type=float, default=0.0, help="seconds between an answer and its click")
    parser.add_argument("--ahead", action="store_true", help="go before other programs, on a busy machine (needs root)")
    parser.add_argument("flags", nargs="*", help="more flags for operant serve, after --")
    given = parser.parse_args()
    subject = Subject.given(given)
    given.only = given.only or (CELLS[:2] if subject.model else CELLS)
    # what the cells, in processes of their own, are to be told
    taken = ("model", "name", "lora_rank", "threads", "tokens", "ratings", "rounds", "seconds", "reading")
    options = [f"--{name}={value}" for name in taken if (value := getattr(given, name)) is not None]
    options += ["--ahead"] if given.ahead else []
    told = [f"--{name} {getattr(given, name)}" for name in taken if getattr(given, name) != parser.get_default(name)]
    told += ["--ahead"] if given.ahead else []
    command = " ".join(["python -m benchmarks.live", *told, *(["--", *given.flags] if given.flags else [])])
    now = {"time": time.time()}  # columns of one table stand in this order
    carry_out(
        given, "benchmarks.live", cells=lambda: [Cell(name) for name in given.only],
        done=lambda cell: subject.records.has(cell.name),
        measure=lambda name: subject.records.put(name, MEASURES[name](subject) | {"command": command} | now),
        write=lambda: write(subject), records=subject.records, runs=subject.runs,
        options=[*options, "--", *given.flags],
    )  # fmt: skip


if __name__ == "__main__":
    main()
