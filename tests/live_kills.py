"""A learner that is killed, with a real SIGKILL, at any of its durable writes.

    python live_kills.py ROOT STORE

ROOT holds version 0. A learner works on a copy of it until it has learned what is in STORE. Just before each of its
durable writes (a sync, a rename or a removal) the copy is copied again: that is what a process leaves that dies there.
Every state that differs from the one before it is then worked on by a learner of its own. Some learners are killed for
real, and leave files of the same names. The learners are forks of this process, since importing torch takes longer than
the tiny steps. There is no SQLAlchemy: a learner from a file needs none.

One line of JSON comes out: {"undisturbed": outcome, "writes": how many, "killed": {write: outcome, …}, "names": {write:
[by the copy, by the kill], …}} with outcome = {"weights", "learner", "state", "states", "outcomes", "current", "left"}.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

sys.modules["sqlalchemy"] = None  # type: ignore[assignment]
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # autograd's threads for a GPU would allow no forks

import torch  # noqa: E402

from operant.live.learning import worker  # noqa: E402
from operant.live.storage.versions import Versions  # noqa: E402

REAL = 12  # one of so many writes is a real kill as well
WATCHED = ((os, "fsync"), (os, "rename"), (os, "replace"), (Path, "unlink"), (shutil, "rmtree"))


def learn(root: Path, store: Path) -> None:
    told = sys.stdout
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - closed below
    try:
        worker.main(
            ["--root", str(root), "--store", str(store), "--once", "true", "--batch_size", "2", "--lr", "0.001",
             "--replay_events", "2", "--keep", "2", "--device", "cpu"]
        )  # fmt: skip
    finally:
        sys.stdout.close()
        sys.stdout = told


def watch(before: Callable[[int], None]) -> Callable[[], None]:
    """Call `before` with the number of each durable write from now on, until what is returned is called."""
    seen, kept = 0, [(owner, name, getattr(owner, name)) for owner, name in WATCHED]

    def watched(function: Any) -> Any:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            nonlocal seen
            seen += 1
            before(seen)
            return function(*arguments, **options)

        return wrapper

    def end() -> None:
        for owner, name, function in kept:
            setattr(owner, name, function)

    for owner, name, function in kept:
        setattr(owner, name, watched(function))
    return end


def fork(root: Path, store: Path, kill_at: int = 0) -> tuple[int, int]:
    """Let a fork learn, and die before the durable write of that number.

    Its process id, and its exit status or minus the signal.
    """
    child = os.fork()
    if child == 0:
        status = 3
        try:
            watch(lambda number: os.kill(os.getpid(), signal.SIGKILL) if number == kill_at else None)
            learn(root, store)
            status = 0
        finally:
            os._exit(status)
    return child, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def without(pid: int, names: Iterable[str]) -> list[str]:
    """Names of files, without the process id that those of unfinished ones have."""
    return sorted(name.replace(f"-{pid}", "") for name in names)


def outcome(root: Path) -> dict[str, Any]:
    versions = Versions(root)
    now = Path(versions.current().path)
    records = versions.records()
    return {
        "weights": hashlib.sha256((now / "model" / "model.safetensors").read_bytes()).hexdigest(),
        "learner": torch.load(now / "learner.pt", weights_only=True)["learner"],
        "state": (now / "state.json").read_text(),
        "states": [(r.version, r.parent, r.state, r.events, r.replayed) for r in records],
        "outcomes": [(name, o.state, o.reason, o.logprob_after) for r in records for name, o in r.outcomes.items()],
        "current": versions.current().version,
        "left": sorted(str(p.relative_to(root)) for p in (*(root / "pending").iterdir(), *root.rglob(".*"))),
    }


def main() -> None:
    torch.set_num_threads(1)
    root, store = Path(sys.argv[1]), Path(sys.argv[2])
    work, copies = root.parent / "work", root.parent / "copies"
    shutil.copytree(root, work)
    end = watch(lambda number: shutil.copytree(work, copies / str(number)))
    learn(work, store)
    end()
    undisturbed, writes = outcome(work), len(list(copies.iterdir()))
    killed, names, before = dict[int, Any](), dict[int, Any](), dict[str, bytes]()
    for number in range(1, writes + 1):
        copy = copies / str(number)
        found = files(copy)
        if number % REAL == 0:
            shutil.rmtree(work)
            shutil.copytree(root, work)
            pid, status = fork(work, store, number)
            assert status == -signal.SIGKILL, (number, status)
            names[number] = without(os.getpid(), found), without(pid, files(work))
        if found != before:
            assert fork(copy, store)[1] == 0, number
            killed[number] = outcome(copy)
        shutil.rmtree(copy)
        before = found
    print(json.dumps({"undisturbed": undisturbed, "writes": writes, "killed": killed, "names": names}))


if __name__ == "__main__":
    main()
