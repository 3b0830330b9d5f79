"""Twenty keys teach one served model; some of them want the opposite of what the others like.

`operant serve --mode shared` with twenty keys. In each round one key asks, and it and another one rate the answer; all
honest keys have one liking and are wrong one time in ten.

    crowd       every key is honest
    adversary   one key always says the opposite, and in every round asks and rates one answer more
    sybils      two keys, a tenth, do so, and each praises and blames with the other

Wanted: the satisfaction (see `benchmarks.population`) that honest keys reach is within 0.05 of the crowd's. The cells
belong to `python -m benchmarks.population --kinds crowd adversary sybils`.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.cells import markdown
from benchmarks.population_text import Liking, questions
from benchmarks.pupil import ANCHORS, Measure, Served

__all__ = ["COMMAND", "INTRUDERS", "KEYS", "ROUNDS", "Crowd", "table", "taught"]

COMMAND = "`python -m benchmarks.population --kinds crowd adversary sybils`"

INTRUDERS = {"crowd": 0, "adversary": 1, "sybils": 2}
KEYS, ROUNDS, EVERY, NOISE = 20, 150, 50, 0.1
PATIENCE = 30.0  # seconds for a round to be learned; without a quorum it waits for the next one


class Crowd:
    """The keys, who asks and reads in each round, and what each says. Intruders are the last keys."""

    def __init__(self, liking: Liking, kind: str, seed: int) -> None:
        self.liking = liking
        self.names = [f"key{number:02d}" for number in range(KEYS)]
        self.bad = self.names[KEYS - INTRUDERS[kind] :]
        self.rng = random.Random(f"crowd {liking.name} {seed}")
        self.asked = questions(held_out=False)

    def turn(self) -> tuple[str, str, str]:
        """(who asks, who reads along, what is asked)."""
        author, reader = self.rng.sample(self.names, 2)
        return author, reader, self.rng.choice(self.asked)[0]

    def says(self, name: str, text: str) -> int:
        """The thumb of this key."""
        wrong = name in self.bad or self.rng.random() < NOISE
        return 1 if self.liking.liked(text) != wrong else -1


def taught(model: Path, liking: Liking, kind: str, seed: int) -> dict[str, Any]:
    """The rounds of one crowd, with the honest keys' satisfaction on the way."""
    from operant.live.serving.access import Keys

    crowd = Crowd(liking, kind, seed)
    with tempfile.TemporaryDirectory() as scratch:
        anchors, file = Path(scratch) / "anchors.jsonl", Path(scratch) / "keys.json"
        some = random.Random("anchors").sample(questions(held_out=False), ANCHORS)
        anchors.write_text("".join(json.dumps({"prompt": q}) + "\n" for q, _, _ in some), encoding="utf-8")
        keys = {name: Keys(file).add(name, ("chat", "rate")) for name in crowd.names}
        program = Served(model, Path(scratch) / "live", anchors, seed=seed, mode="shared", keys=file)
        try:
            return {
                "liking": liking.name,
                **rounds(program, crowd, keys, Measure(program.policy().codec, liking), seed),
            }
        finally:
            program.close()


def rounds(program: Any, crowd: Crowd, keys: dict[str, str], look: Measure, seed: int) -> dict[str, Any]:
    def call(name: str, method: str, path: str, **options: Any) -> Any:
        """The body of the answer, or None when the key was over its rate."""
        options["headers"] = {"Authorization": f"Bearer {keys[name]}"}
        response = program.http.request(method, path, **options)
        return None if response.status_code == 429 else response.raise_for_status().json()

    def ask(name: str, question: str, number: int) -> Any:
        return call(name, "POST", "/v1/chat/completions", json={
            "model": "default", "messages": [{"role": "user", "content": question}], "seed": number,
            "temperature": 1.0, "max_tokens": 96,
        })  # fmt: skip

    said: list[tuple[str, str]] = []  # (who, event)
    limited = 0

    def rate(name: str, answer: Any) -> str:
        nonlocal limited
        body = {
            "completion_id": answer["id"],
            "kind": "thumb",
            "value": crowd.says(name, answer["choices"][0]["message"]["content"]),
        }
        told = call(name, "POST", "/v1/feedback", json=body)
        if told is None:
            limited += 1
            return ""
        said.append((name, told["id"]))
        return str(told["id"])

    curve = [{"rounds": 0, **look(program.policy())}]
    for number in range(1, ROUNDS + 1):
        author, reader, question = crowd.turn()
        if crowd.bad:
            loud = crowd.bad[number % len(crowd.bad)]
            extra = ask(loud, crowd.rng.choice(crowd.asked)[0], 10_000 * (seed + 1) + number)
            for name in crowd.bad if extra is not None else ():
                rate(name, extra)
        answer = ask(author, question, 1000 * seed + number)
        events = [rate(name, answer) for name in (author, reader)]
        until = time.monotonic() + PATIENCE
        while not {author, reader} & set(crowd.bad) and events[0] and time.monotonic() < until:
            story = call(author, "GET", f"/v1/feedback/{events[0]}", params={"wait": 5})
            if story["state"] not in ("pending", "used") or "served" in story["times"]:
                break
        if number % EVERY == 0:
            curve.append({"rounds": number, **look(program.policy())})
            print(f"{crowd.liking.name} {len(crowd.bad)} {curve[-1]}", flush=True)
    became: dict[str, Counter[str]] = {"honest": Counter(), "intruders": Counter()}
    for name, event in said:
        story = call(name, "GET", f"/v1/feedback/{event}")
        told = story["state"] if story["state"] != "unused" else f"unused: {story['reason'][:40]}"
        became["intruders" if name in crowd.bad else "honest"][told] += 1
    return {"became": {who: dict(count) for who, count in became.items()}, "limited": limited, "curve": curve,
            "sources": sources(program.root)}  # fmt: skip


def table(crowds: Mapping[tuple[str, str], Mapping[int, dict[str, Any]]]) -> str:
    """A row for each crowd. crowds: (family, kind) → the records by seed."""
    head = ["who teaches", "seed", "before", f"after {EVERY}", f"after {ROUNDS}", "to the crowd's", "sense",
            "intruders: used / not", "their reputation", "their share", "the least honest reputation"]  # fmt: skip
    rows = []
    for (family, kind), records in crowds.items():
        for seed, record in records.items():
            first, *_, last = record["curve"]
            half = next(point for point in record["curve"] if point["rounds"] == EVERY)
            honest = crowds[family, "crowd"].get(seed)
            away = "" if honest is None or kind == "crowd" else (
                f"{last['satisfaction'] - honest['curve'][-1]['satisfaction']:+.2f}"
            )  # fmt: skip
            told = record["became"]["intruders"]
            bad = [f"key{number:02d}" for number in range(KEYS - INTRUDERS[kind], KEYS)]
            theirs = [record["sources"].get(name, {"reputation": 1.0, "share": 0.0}) for name in bad]
            least = min(source["reputation"] for name, source in record["sources"].items() if name not in bad)
            rows.append([
                f"{family}: {record['liking']}, {kind}", str(seed), f"{first['satisfaction']:.2f}",
                f"{half['satisfaction']:.2f}", f"{last['satisfaction']:.2f}", away,
                f"{first['sense']:.2f} → {last['sense']:.2f}",
                f"{told.get('used', 0)} / {sum(told.values()) - told.get('used', 0)}" if bad else "",
                ", ".join(f"{source['reputation']:.2f}" for source in theirs),
                f"{sum(source['share'] for source in theirs):.3f}" if bad else "", f"{least:.2f}",
            ])  # fmt: skip
    return markdown(head, rows)


def sources(root: Path) -> dict[str, dict[str, float]]:
    """What each key's word counts for at the end, and what it has had."""
    from operant.live.learning.lesson import LearnerState
    from operant.live.storage.versions import Versions

    state = LearnerState.load(Path(Versions(root).current().path))
    trust, whole = state.reputations(), sum(state.influence.values())
    return {
        name: {"reputation": trust.get(name, 1.0), "share": state.influence.get(name, 0.0) / whole}
        for name in sorted(trust.keys() | state.influence.keys())
    }
