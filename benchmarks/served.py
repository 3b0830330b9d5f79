"""`operant serve` as a process of its own, and what it and its learner take of this machine."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

from benchmarks.cells import ROOT

TICKS = os.sysconf("SC_CLK_TCK")
READY_SECONDS = 600.0  # for a learner to get ready, on a busy machine


class Server:
    """`operant serve` on a root, started, killed and started again on the same port. Its words go to `log`.

    ahead: put it and its learner, as far apart from each other as they put themselves, before other programs.
    """

    def __init__(self, root: Path, flags: Sequence[str], *, ahead: bool = False) -> None:
        self.root, self.flags, self.ahead = root, list(flags), ahead
        self.log = root.parent / f"{root.name}.log"
        self.port, self.url = 0, ""
        self.process: subprocess.Popen[str]

    def start(self) -> None:
        """Returns when it serves and its learner is ready."""
        command = [sys.executable, "-m", "operant.cli", "serve", "--root", str(self.root), "--port", str(self.port)]
        self.root.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("a", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                [*command, *self.flags], stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT
            )
        assert self.process.stdout is not None
        found = None
        while found is None:
            line = self.process.stdout.readline()
            if not line:
                raise SystemExit(f"the server did not start; {self.log} says why")
            found = re.search(r"(http://[\w.\[\]]+:(\d+))/v1", line)
        self.url, self.port = found[1], int(found[2])
        end = time.monotonic() + READY_SECONDS
        while self.health()["learner"] != "up":
            if time.monotonic() > end:
                raise SystemExit(f"the learner does not get ready; {self.log} says why")
            time.sleep(0.2)
        if self.ahead:
            learner = self.processes()["learner"]
            step = min(os.getpriority(os.PRIO_PROCESS, learner), 19)
            _set_priority(self.process.pid, -20)
            _set_priority(learner, -20 + step)

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def kill(self, *names: str) -> None:
        """kill -9 of the server, of its learner, or of both. Returns when they are gone."""
        pids = self.processes()
        for name in names:
            with contextlib.suppress(ProcessLookupError, KeyError):
                os.kill(pids[name], signal.SIGKILL)
        if "server" in names:
            self.process.wait()
            assert self.process.stdout is not None
            self.process.stdout.close()
        while "server" not in names and self.processes().get("learner") == pids.get("learner", -1):
            time.sleep(0.005)

    def processes(self) -> dict[str, int]:
        """The process ids of the server and of its learner, where there is one."""
        found = {"server": self.process.pid}
        for file in Path(f"/proc/{self.process.pid}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                for child in file.read_text().split():
                    if b"operant.live.learning.worker" in Path(f"/proc/{child}/cmdline").read_bytes():
                        found["learner"] = int(child)
        return found

    def memory(self) -> dict[str, dict[str, float]]:
        """Resident MB of each process: `rss` counts a page that both have mapped twice, `pss` shares it out."""
        sizes = {}
        for name, pid in self.processes().items():
            with contextlib.suppress(OSError):
                text = Path(f"/proc/{pid}/smaps_rollup").read_text()
                found = {key.lower(): 1024e-6 * int(kib) for key, kib in re.findall(r"^(Rss|Pss):\s+(\d+)", text, re.M)}
                if found:
                    sizes[name] = found
        return sizes

    def health(self) -> dict[str, Any]:
        found: dict[str, Any] = httpx.get(f"{self.url}/health", timeout=60).json()
        return found

    def metric(self, name: str) -> float:
        text = httpx.get(f"{self.url}/metrics", timeout=60).text
        return float(next(line.split()[-1] for line in text.splitlines() if line.startswith(f"operant_{name} ")))


@contextlib.contextmanager
def serving(root: Path, *flags: str, ahead: bool = False) -> Iterator[Server]:
    """A server on a root, its learner ready, that is stopped at the end. ahead: as in `Server`."""
    server = Server(root, flags, ahead=ahead)
    server.start()
    try:
        yield server
    finally:
        server.stop()


def _set_priority(pid: int, niceness: int) -> None:
    """Of all threads of a process, and of its session where Linux shares the processor among sessions."""
    try:
        for thread in Path(f"/proc/{pid}/task").iterdir():
            os.setpriority(os.PRIO_PROCESS, int(thread.name), niceness)
        with contextlib.suppress(FileNotFoundError):
            Path(f"/proc/{pid}/autogroup").write_text(str(niceness))
    except PermissionError:
        raise SystemExit("going before other programs needs root; leave --ahead out on a quiet machine") from None


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


class Memory(threading.Thread):
    """Looks at the memory of the server and its learner until the block ends.

    `last` and `peak` are megabytes by process and kind; a peak of "together" is of one moment.
    """

    def __init__(self, server: Server, every: float = 1.0) -> None:
        super().__init__(daemon=True)
        self.server, self.every = server, every
        self.last: dict[str, dict[str, float]] = {}
        self.peak: dict[str, dict[str, float]] = {}
        self._ended = threading.Event()

    def __enter__(self) -> Memory:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.join()
        self.look()

    def run(self) -> None:
        while not self._ended.wait(self.every):
            self.look()

    def look(self) -> None:
        sizes = self.server.memory()
        kinds = ("rss", "pss")
        self.last = sizes | {"together": {kind: sum(size[kind] for size in sizes.values()) for kind in kinds}}
        for name, size in self.last.items():
            most = self.peak.setdefault(name, dict.fromkeys(kinds, 0.0))
            most.update({kind: max(most[kind], size[kind]) for kind in kinds})
