"""A process that forks runs of the program and makes each meet its fate at a chosen event.

Importing torch takes longer than the tiny runs of the fault campaign, so it is done once: every job is a fork of this
process, a real one, which a real SIGKILL ends. A job is a line of JSON:

    {"argv": [...], "cwd": "...", "kind": "disk", "number": 7, "after": false, "action": "kill", "counts": "file"}

At event `number` of its kind, before or after it, the fork kills itself ("kill") or finds that no file can grow any
more ("full"). Answers: one line of JSON {"status": exit status or minus the signal, "told": what it printed}.
`counts` names a file for how many events of each kind there were.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import resource
import select
import signal
import sys
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

# kind → the functions whose calls are its events, as "module:path"
EVENTS = {
    "start": (
        "operant.run.runlog:_acquire", "operant.run.files:replace_file", "operant.models.policy:Policy.__init__",
        "operant.algorithms.learner:Learner.__init__", "operant.run.run:Run.attach",
    ),
    "disk": ("os:fsync", "os:rename", "os:replace", "shutil:rmtree", "operant.models.policy:Policy.save"),
    "log": ("operant.run.runlog:RunLog.log", "operant.run.runlog:RunLog._write", "operant.run.run:Run.record"),
    "learn": ("operant.algorithms.learner:Learner.step", "operant.algorithms.learner:Adam.step"),
    "sample": ("operant.models.sampler:Sampler.step", "operant.models.sampler:Sampler.load"),
    "reward": (
        "operant.rewards.runner:RewardRunner.run", "operant.rewards.runner:RewardRunner._run_leaf",
        "operant.rewards.runner:combined", "operant.rewards.runner:_Process.receive",
    ),
    "finish": (
        "operant.run.run:Run._finish", "operant.run.run:_replace", "operant.run.runlog:RunFolder.finish",
        "operant.run.run:write_report",
    ),
}  # fmt: skip


class Fate:
    """Counts events and, at the chosen one, acts."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        self.counts: Counter[str] = Counter()

    def watch(self) -> None:
        for kind, names in EVENTS.items():
            for name in names:
                module, _, path = name.partition(":")
                owner: Any = importlib.import_module(module)
                *parents, last = path.split(".")
                for parent in parents:
                    owner = getattr(owner, parent)
                setattr(owner, last, self.watched(getattr(owner, last), kind))

    def watched(self, function: Any, kind: str) -> Any:
        @functools.wraps(function)
        def wrapper(*args: Any, **options: Any) -> Any:
            self.counts[kind] += 1
            chosen = kind == self.job.get("kind") and self.counts[kind] == self.job.get("number")
            if chosen and not self.job.get("after"):
                self.act()
            value = function(*args, **options)
            if chosen and self.job.get("after"):
                self.act()
            return value

        return wrapper

    def act(self) -> None:
        if self.job["action"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))


def run_job(job: dict[str, Any]) -> int:
    os.chdir(job["cwd"])
    sys.path.insert(0, job["cwd"])
    fate = Fate(job)
    fate.watch()
    status = 0
    try:
        importlib.import_module("operant.cli").main(job["argv"])
    except SystemExit as stop:
        status = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
        status = 99
    sys.stdout.flush()
    sys.stderr.flush()
    if "counts" in job:
        Path(job["counts"]).write_text(json.dumps(fate.counts))
    return status


def drain(end: int) -> str:
    """What is in the pipe. A reward worker that outlives its killed parent may hold it open for a second more."""
    data = b""
    while select.select([end], [], [], 0)[0] and (piece := os.read(end, 1 << 16)):
        data += piece
    return data.decode(errors="replace")


def main() -> None:
    import torch

    torch.set_num_threads(1)
    for module in (
        "operant.cli", "operant.rl.loop", "operant.stages", "operant.rewards.runner", "safetensors.torch",
        "transformers.models.gpt2.modeling_gpt2", "transformers.models.auto.modeling_auto", "jsonargparse", "sacrebleu",
    ):  # fmt: skip
        importlib.import_module(module)
    policy, run = importlib.import_module("operant.models.policy"), importlib.import_module("operant.run.run")
    policy.SIZES["gpt2"]["tiny"] = (1, 2, 16, 32)
    run.write_report = lambda folder: Path(folder, "report.html").write_text("drawing takes longer than the run")
    for line in sys.stdin:
        ours, theirs = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(ours)
            os.dup2(theirs, 1)
            os.dup2(theirs, 2)
            os._exit(run_job(json.loads(line)))
        os.close(theirs)
        _, status = os.waitpid(pid, 0)
        print(json.dumps({"status": os.waitstatus_to_exitcode(status), "told": drain(ours)}), flush=True)
        os.close(ours)


if __name__ == "__main__":
    main()
