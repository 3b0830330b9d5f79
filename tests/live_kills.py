"""A process that forks learners and kills each, with a real SIGKILL, at one of its durable writes.

    python live_kills.py ROOT STORE

ROOT holds version 0. Importing torch takes longer than the tiny steps, so it is done once. Every learner works on a
copy of ROOT until it has learned what is in STORE; the first undisturbed, then one for each durable write (a sync, a
rename or a removal), killed just before it, and started again. One line of JSON comes out: {"undisturbed": outcome,
"killed": [outcome, …]} with outcome = {"weights", "optimizer", "states", "outcomes", "current", "left"}.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

WATCHED = ((os, "fsync"), (os, "rename"), (os, "replace"), (Path, "unlink"), (shutil, "rmtree"))


def learn(root: Path, store: Path, kill_at: int, counts: Path) -> None:
    """Run the learner; before the durable write of that number, die. Never returns."""
    from operant.live.learning import worker

    seen = 0

    def watched(function: Any) -> Any:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return wrapper

    for owner, name in WATCHED:
        setattr(owner, name, watched(getattr(owner, name)))
    status = 0
    try:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - the fork is about to end
        worker.main(
            ["--root", str(root), "--store", str(store), "--once", "true", "--batch_size", "2", "--lr", "0.001",
             "--replay_events", "2", "--keep", "2", "--device", "cpu"]
        )  # fmt: skip
        counts.write_text(str(seen))
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 3
    os._exit(status)


def fork(root: Path, store: Path, kill_at: int) -> tuple[int, int]:
    """(exit status or minus the signal, durable writes that were made)."""
    counts = root.parent / "counts"
    child = os.fork()
    if child == 0:
        learn(root, store, kill_at, counts)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return code, int(counts.read_text()) if code == 0 else 0


def outcome(root: Path) -> dict[str, Any]:
    import torch

    from operant.live.storage.versions import Versions

    versions = Versions(root)
    now = Path(versions.current().path)
    saved = torch.load(now / "learner.pt", weights_only=True)["learner"]
    records = versions.records()
    return {
        "weights": hashlib.sha256((now / "model" / "model.safetensors").read_bytes()).hexdigest(),
        "learner": saved,
        "state": (now / "state.json").read_text(),
        "states": [(r.version, r.parent, r.state, r.events, r.replayed) for r in records],
        "outcomes": [(name, o.state, o.reason, o.logprob_after) for r in records for name, o in r.outcomes.items()],
        "current": versions.current().version,
        "left": sorted(str(p.relative_to(root)) for p in (*(root / "pending").iterdir(), *root.rglob(".*"))),
    }


def main() -> None:
    import torch

    torch.set_num_threads(1)
    for module in (  # imported once, before the forks
        "operant.live.learning.worker", "jsonargparse", "transformers.models.auto.modeling_auto",
        "transformers.models.gpt2.modeling_gpt2",
    ):  # fmt: skip
        importlib.import_module(module)

    root, store = Path(sys.argv[1]), Path(sys.argv[2])
    work = root.parent / "work"
    shutil.copytree(root, work)
    code, writes = fork(work, store, 0)
    assert code == 0, code
    undisturbed, killed = outcome(work), []
    for number in range(1, writes + 1):
        shutil.rmtree(work)
        shutil.copytree(root, work)
        code, _ = fork(work, store, number)
        assert code == -signal.SIGKILL, (number, code)
        code, _ = fork(work, store, 0)
        assert code == 0, (number, code)
        killed.append(outcome(work))
    print(json.dumps({"undisturbed": undisturbed, "killed": killed}))


if __name__ == "__main__":
    main()
