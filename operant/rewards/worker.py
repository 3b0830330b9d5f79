"""A worker process that runs rewards, started by the runner with the number of a socket.

It is a fresh interpreter, not a fork, so it inherits no locks, threads or GPU context, and it needs no
`if __name__ == "__main__"` in the user's script. Messages on the socket: (index, pickled reward or None, pickled
(prompt, completion), seconds) → (value, reason). The runner kills the process when a reward overstays its time; a
process that outlives its runner ends itself.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import signal
import sys
import threading
import time
from multiprocessing.connection import Connection
from typing import Any

from operant.rewards.seam import token_rewards

SLACK = 5.0  # seconds after the time limit in which the runner, if it lives, has killed the process


def call(reward: Any, prompt: Any, completion: Any) -> tuple[Any, str | None]:
    """(value, reason): the value in a form that travels between processes, or why it is missing.

    `prompt` and `completion` are lists for a batched reward, whose value is a list with one such pair for each.
    """
    try:
        value = reward(prompt, completion)
        if not isinstance(completion, list):
            return token_rewards(value, completion), None
        values = list(value)
        if len(values) != len(completion):
            return None, f"wrong_length: {len(values)} rewards for {len(completion)} completions; return one for each"
        return [token_rewards(item, row) for item, row in zip(values, completion, strict=True)], None
    except Exception as error:
        return None, raised(error)


def raised(error: BaseException) -> str:
    """The reason of a missing reward whose function raised."""
    message = " ".join(str(error).split())[:300]
    return f"raised: {type(error).__name__}{': ' + message if message else ''}"


def main() -> None:
    """Answer jobs until the runner closes the socket or ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    nowhere = open(os.devnull, "w")  # noqa: SIM115
    connection = Connection(int(sys.argv[1]))
    rewards: dict[int, Any] = {}
    connection.send("ready")
    while True:
        try:
            index, data, payload, limit = connection.recv()
        except (EOFError, OSError):
            return
        if data is not None:
            try:
                rewards[index] = pickle.loads(data)
            except Exception as error:
                connection.send(("unloadable", raised(error)))
                continue
            connection.send(("loaded", None))
        try:
            prompt, completion = pickle.loads(payload)
        except Exception as error:
            connection.send((None, raised(error)))
            continue
        # A reward that holds the interpreter's lock, such as a regular expression, keeps `watch` from running.
        faulthandler.dump_traceback_later(limit + SLACK, exit=True, file=nowhere)
        outcome = call(rewards[index], prompt, completion)
        faulthandler.cancel_dump_traceback_later()
        connection.send(outcome)
