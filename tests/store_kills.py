"""Processes that write to a store and are killed, with a real SIGKILL, at any instant.

    python store_kills.py URL ROUNDS SEED

Each round forks a process in which four threads write interactions and feedback as fast as they can, and tell through
a pipe what was acknowledged. After a seeded number of acknowledgements, or a seeded moment of the opening, it is
killed; the next round opens the same store. Every acknowledged row must then be there, exactly as it was told, once,
with offsets from 1 on without a gap. What was sent and not acknowledged is sent again, with its key. One line of JSON
comes out: {"rounds", "acknowledged", "unacknowledged", "repeated": how many of those had been stored all the same}.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
from typing import Any

import numpy as np

from operant.live.storage.store import Store
from operant.types import Completion, Feedback, Prompt

THREADS = 4


def interaction(name: str) -> tuple[Prompt, Completion]:
    length = 1 + sum(name.encode()) % 50
    tokens = np.arange(length)
    prompt = Prompt("p", np.arange(3), text="hi")
    return prompt, Completion(name, "p", name * length, tokens, tokens, behavior_logprobs=-tokens.astype(np.float32))


def event(name: str) -> Feedback:
    return Feedback(f"f-{name}", name, "edit", name * 20, "ann", name, 0.0)


def write(url: str, told: int, number: int, again: list[str]) -> None:
    """Never returns: it is killed."""
    store = Store(url)

    def tell(what: str, name: str, offset: int = 0, duplicate: bool = False) -> None:
        os.write(told, f"{what} {name} {offset} {int(duplicate)}\n".encode())

    def rate(name: str) -> None:
        os.write(told, f"sent {name} 0 0\n".encode())
        receipt = store.add_feedback(event(name), body_hash=name)
        tell("rated", name, receipt.offset, receipt.duplicate)

    def talk(thread: int) -> None:
        for name in again[thread::THREADS]:
            rate(name)
        turn = 0
        while True:
            name = f"r{number}t{thread}n{turn}"
            prompt, completion = interaction(name)
            store.begin(name, prompt, None)
            tell("begun", name)
            store.complete(completion, "partial")
            tell("complete", name)
            rate(name)
            turn += 1

    threads = [threading.Thread(target=talk, args=(n,)) for n in range(THREADS)]
    for thread in threads:
        thread.start()
    threads[0].join()
    os._exit(3)


def one_round(url: str, number: int, draw: random.Random, again: list[str]) -> list[list[str]]:
    """What the process told before it was killed."""
    read, told = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(read)
            write(url, told, number, again)
        finally:
            os._exit(4)
    os.close(told)
    acknowledged = 0 if draw.random() < 0.25 else draw.randrange(1, 60)
    if not acknowledged:
        time.sleep(draw.random() * 0.1)
    with os.fdopen(read, "rb") as pipe:
        lines = []
        while sum(not line.startswith(b"sent") for line in lines) < acknowledged:
            line = pipe.readline()
            assert line, "the writing process ended by itself"
            lines.append(line)
        time.sleep(draw.random() * 0.003)
        os.kill(child, signal.SIGKILL)
        lines += pipe.readlines()
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    return [line.decode().split() for line in lines]


def check(url: str, told: list[list[str]]) -> None:
    """That everything that was acknowledged, in all rounds, is there."""
    with Store(url, read_only=True) as store:
        found = store.events_after(0, 10**9)
        assert [offset for offset, _ in found] == list(range(1, len(found) + 1)), "offsets have a gap"
        by_name = {e.completion_id: (offset, e) for offset, e in found}
        assert len(by_name) == len(found), "an event is there twice"
        for what, name, offset, _ in told:
            if what == "sent":
                continue
            stored = store.completion(name)
            assert stored is not None, f"{name} is lost"
            if what == "complete":
                completion = interaction(name)[1]
                assert stored.status == "partial" and stored.completion is not None, f"the answer {name} is lost"
                assert stored.completion.text == completion.text
                assert np.array_equal(stored.completion.tokens, completion.tokens)
                assert np.array_equal(stored.completion.behavior_logprobs, completion.behavior_logprobs)  # type: ignore[arg-type]
            if what == "rated":
                assert by_name[name] == (int(offset), event(name)), f"the feedback on {name} is lost or another"


def main() -> None:
    url, rounds, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    draw = random.Random(seed)
    Store(url).close()
    result: dict[str, Any] = {"rounds": rounds, "acknowledged": 0, "unacknowledged": 0, "repeated": 0}
    everything: list[list[str]] = []
    again: list[str] = []
    for number in range(rounds):
        told = one_round(url, number, draw, again)
        everything += told
        rated = {name for what, name, *_ in told if what == "rated"}
        sent = {name for what, name, *_ in told if what == "sent"} | set(again)
        again = sorted(sent - rated)
        result["acknowledged"] += sum(what != "sent" for what, *_ in told)
        result["unacknowledged"] += len(again)
        result["repeated"] += sum(what == "rated" and duplicate == "1" for what, _, _, duplicate in told)
        check(url, everything)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
