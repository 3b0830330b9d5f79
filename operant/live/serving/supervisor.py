"""Keeps the learner process running and serves its versions; a learner that dies stops no answer.

The file `current` names the version to serve. The learner, `operant versions`, or the server's own route writes it.
A version is loaded beside the engine's thread. If it cannot be loaded, the engine keeps the one it has, and says why.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, Literal, Protocol

import operant
from operant.config import WorkerConfig
from operant.live.learning.execution import load_like
from operant.live.learning.forget import Plan, empty, finish
from operant.live.learning.worker import STORE_VARIABLE
from operant.live.serving.canary import Canary
from operant.live.serving.engine import Busy, Engine
from operant.live.storage.versions import StepRecord, Versions
from operant.models.policy import Policy
from operant.types import OperantError

__all__ = ["EventLedger", "Supervisor", "arguments_of"]

log = logging.getLogger(__name__)

POLL_SECONDS = 0.2  # between looks at `current`, which other processes move too
LEARNER_POLL_SECONDS = 0.5  # feedback wakes the learner; it looks by itself for answers that end after their rating
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds before a learner that died is started again, and before a load
STEADY_SECONDS = 60.0  # after which a learner's death is the first one again
TRY_SECONDS = 5.0  # before a candidate takes its place in memory again
STOP_SECONDS = 10.0  # for the learner to end its step
# threads that wait for each other sleep: where answers have the cores, one that spins keeps the others from them
SHARED = {"OMP_WAIT_POLICY": "passive"}
STARTING, NICENESS = 5, 10  # how far the learner steps back, while it starts and once it learns: answers come first

State = Literal["starting", "up", "failing", "restarting", "stopped"]


class EventLedger(Protocol):
    """What the supervisor writes into the store (`storage.store.Store`)."""

    def reconcile(self, records: Iterable[StepRecord]) -> None: ...

    def served(self, version: int, at: float) -> None: ...

    def forget(self, source: str) -> int: ...


def arguments_of(config: WorkerConfig) -> list[str]:
    """The learner's command line: every setting that is not the default, but the store. Its address may hold a
    password, so it goes by the environment (`worker.STORE_VARIABLE`): everybody on a machine may read command lines."""
    found = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value != field.default and value is not None and field.name != "store":
            found.append(f"--{field.name}={json.dumps(value) if isinstance(value, bool | dict) else value}")
    return found


def _step_back(pid: int, niceness: int) -> None:
    """Give a process a lower priority than this one's."""
    with contextlib.suppress(OSError):  # it is gone already
        os.setpriority(os.PRIO_PROCESS, pid, niceness)
        # where Linux shares the processor among sessions, the learner's own session has a niceness too
        Path(f"/proc/{pid}/autogroup").write_text(str(niceness))


class _Backoff:
    """Pauses that double with each failure in a row."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.pause, self.until = FIRST_PAUSE, 0.0

    def failed(self) -> float:
        """The seconds to wait now."""
        pause = self.pause
        self.until, self.pause = time.monotonic() + pause, min(LONGEST_PAUSE, 2 * pause)
        return pause

    @property
    def over(self) -> bool:
        return time.monotonic() >= self.until


class Supervisor:
    """Runs `python -m operant.live.learning.worker` and serves what `config.root` says is current, until it is closed.

    config: the learner's settings. store: the ledger of what became of each event.
    command: runs instead of the learner, with the same lines on standard output. canary: says what of `current` serves.
    like: a policy with an adapter, on whose base all versions stand. niceness: how far the learner steps back once it
    learns.
    """

    def __init__(
        self, config: WorkerConfig, engine: Engine, store: EventLedger, *, command: Sequence[str] | None = None,
        canary: Canary | None = None, like: Policy | None = None, niceness: int = NICENESS,
    ) -> None:  # fmt: skip
        self.config = dataclasses.replace(
            config, watch_stdin=True, once=False, poll_seconds=max(config.poll_seconds, LEARNER_POLL_SECONDS)
        )
        learner = [sys.executable, "-m", "operant.live.learning.worker", *arguments_of(self.config)]
        self.command = learner if command is None else list(command)
        self.versions = Versions(config.root, config.keep)
        self.restarts, self.niceness = 0, niceness
        self._engine, self._store, self._canary, self._like = engine, store, canary, like
        self._process: subprocess.Popen[bytes] | None = None
        self._ready = False
        self._faults = {"learner": "", "version": "", "ledger": "", "forgetting": ""}
        self._entered: set[int] = set()  # steps that the ledger has
        self._noted = -1  # the version that the ledger has as served
        self._records_came = True
        self._try_again = 0.0
        self._closing, self._look = threading.Event(), threading.Event()
        self._pipe, self._adding, self._reuse = threading.Lock(), threading.Lock(), threading.Lock()
        self._loaded: dict[int, Policy] = {}  # by the version that each serves, or served last
        self._threads = [
            threading.Thread(target=run, name=f"operant-{name}", daemon=True)
            for name, run in (("learner", self._keep_running), ("versions", self._follow))
        ]
        for thread in self._threads:
            thread.start()

    # --- from any thread ---------------------------------------------------------------------------------------------

    @property
    def pid(self) -> int | None:
        """Of the learner process, while there is one."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    @property
    def alive(self) -> bool:
        """Whether there is a learner process."""
        return self.pid is not None

    @property
    def fault(self) -> str:
        """What is wrong now with the learner, the version that should be served, or the ledger; or ""."""
        return "; ".join(filter(None, self._faults.values()))

    @property
    def state(self) -> State:
        """Of learning and of serving what was learned: "failing" is an attempt that `fault` tells of, made again."""
        if self._closing.is_set():
            return "stopped"
        if self.alive and self._ready:
            return "failing" if self.fault else "up"
        return "restarting" if self._faults["learner"] else "starting"

    def waits_for(self, event_id: str) -> str:
        """What an event that nothing was made of yet waits for, in words."""
        if self.fault:
            return f"the learner, which failed and tries again: {self.fault}"
        if self.state == "starting":
            return "the learner, which is starting"
        if self.versions.forgetting():
            return "a source that is being forgotten"
        step = self.versions.pending()
        if step is not None:
            return "its step, which is being made" if event_id in step.events else "the step before its own"
        if self.config.min_sources > 1:
            return f"ratings of {self.config.min_sources} sources"
        return "its turn"

    def poke(self, answer: str = "") -> None:
        """Tell the learner, at once, that feedback was committed, or that this answer is stored. Never waits and never
        fails."""
        with self._pipe:
            process = self._process
            if process is not None and process.stdin is not None:
                # a full pipe holds enough to wake it; a learner that is gone looks when it begins again
                with contextlib.suppress(OSError, ValueError):
                    os.write(process.stdin.fileno(), f"{answer}\n".encode())

    def make_resident(self, version: int) -> None:
        """Load a version beside the current one, for requests that are pinned to it.

        Raises OperantError when it is not on disk or broken, and `engine.Busy` while there is no room for it.
        """
        with self._adding:  # several requests of one user load it once
            if version not in self._engine.resident():
                self._enter(version, self._engine.add)

    def close(self) -> None:
        """Let the learner end its step, and leave the engine with what it serves."""
        learner, following = self._threads
        with self._pipe:
            self._closing.set()
            if self._process is not None:
                self._process.terminate()
        self.poke()  # it looks at once whether it should stop
        self._look.set()
        following.join()
        learner.join(STOP_SECONDS)
        if learner.is_alive() and self._process is not None:
            self._process.kill()  # no harm: the next one makes the step again
        learner.join()

    def look(self) -> None:
        """Look at once at what is to serve. Never waits."""
        self._look.set()

    # --- the learner process -----------------------------------------------------------------------------------------

    def _keep_running(self) -> None:
        backoff = _Backoff()
        while not self._closing.is_set():
            began = time.monotonic()
            try:
                fault = self._run_once()
            except OSError as error:
                fault = f"the learner cannot be started ({error})"
            self._ready = False
            if self._closing.is_set():
                return
            self._faults["learner"] = fault
            if time.monotonic() - began > STEADY_SECONDS:
                backoff.reset()
            pause = backoff.failed()
            log.warning("%s; it is started again in %g s", fault, pause)
            self._closing.wait(pause)
            self.restarts += 1

    def _run_once(self) -> str:
        """One life of the learner; how it ended."""
        here = str(Path(operant.__file__).parents[1])
        path = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH", ""))))
        with self._pipe:
            if self._closing.is_set():
                return ""
            process = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                env=os.environ
                | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", STORE_VARIABLE: self.config.store}
                | ({} if self.config.threads == 1 else SHARED),
                start_new_session=True,  # Ctrl-C is for the server, which lets the learner end its step
            )  # fmt: skip
            assert process.stdin is not None and process.stdout is not None
            os.set_blocking(process.stdin.fileno(), False)
            _step_back(process.pid, min(STARTING, self.niceness))
            self._process = process
        try:
            words = self._listen(process.stdout, process.pid)
            status = process.wait()
        finally:
            with self._pipe:
                process.stdin.close()
            process.stdout.close()
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        return f"the learner {how}" + (f": {words}" if words else "")

    def _listen(self, output: IO[bytes], pid: int) -> str:
        """Do as the learner's lines say until they end; its last words."""
        words = ""
        for line in output:
            text = line.decode(errors="replace").strip()
            try:
                message = json.loads(text)
            except ValueError:
                message = text
            if isinstance(message, dict):
                fault = self._faults["learner"] = str(message.get("error", ""))
                if fault:
                    log.warning("learner: %s", fault)
                if not self._ready:
                    _step_back(pid, self.niceness)
                self._ready = self._records_came = True
                self._look.set()
            elif text:
                words = text
                log.warning("learner: %s", text)
        return words

    # --- what is served ----------------------------------------------------------------------------------------------

    def _follow(self) -> None:
        """Serve what `current` names, and tell the ledger; what serves goes on serving whatever fails here."""
        loads, entries, forgettings = _Backoff(), _Backoff(), _Backoff()
        wanted = -1
        while not self._closing.is_set():
            self._look.wait(POLL_SECONDS)
            self._look.clear()
            moves = self._moves()
            if moves != wanted:  # somebody may have mended it
                wanted = moves
                loads.reset()
            self._attempt("version", loads, self._serve_current)
            self._attempt("ledger", entries, self._update_ledger)
            self._attempt("forgetting", forgettings, self._forget)

    def _attempt(self, what: str, backoff: _Backoff, work: Callable[[], None]) -> None:
        if not backoff.over:
            return
        try:
            work()
        except Exception as error:
            fault = " ".join(str(error).split()) or type(error).__name__
            if fault != self._faults[what]:
                known = isinstance(error, OperantError)
                log.warning("version %d serves on: %s", self._serving, fault, exc_info=None if known else error)
            self._faults[what] = fault
            backoff.failed()
        else:
            self._faults[what] = ""
            backoff.reset()

    @property
    def _serving(self) -> int:
        version: int = self._engine.stats()["version"]
        return version

    def _moves(self) -> int:
        try:
            return self.versions.pointer().moves
        except OperantError:
            return -1

    def _wanted(self) -> tuple[int, int | None]:
        """(what is to serve, what is to be tried beside it)."""
        if self._canary is not None:
            return self._canary.look()
        return self.versions.pointer().version, None

    def _serve_current(self) -> None:
        version, candidate = self._wanted()
        if candidate is not None and candidate not in self._engine.resident() and time.monotonic() >= self._try_again:
            self._try_again = time.monotonic() + TRY_SECONDS
            with contextlib.suppress(Busy):  # somebody who is pinned is being answered in its place
                self.make_resident(candidate)
        if version != self._serving:
            if version in self._engine.resident():
                self._engine.load(version)
            else:
                self._enter(version, self._engine.load)
            self._records_came = True

    def _update_ledger(self) -> None:
        """Enter the records that are new, and the version that serves."""
        serving, at = self._serving, time.time()
        if not self._records_came and self._noted == serving:
            return
        self._records_came = False
        try:
            new = [record for record in self.versions.records() if record.version not in self._entered]
            if new:
                self._store.reconcile(new)
                self._entered.update(record.version for record in new)
            if self._noted != serving:
                self._store.served(serving, at)
                self._noted = serving
        except BaseException:
            self._records_came = True
            raise

    def _forget(self) -> None:
        """The part in a forgetting that is the store's and the engine's; the learner's is its own (see `forget`)."""
        plan = Plan.read(self.versions)
        if plan is not None and plan.stage == "planned":
            empty(plan, self.versions, self._store)
            self.poke()
        elif plan is not None and plan.stage == "made" and self._serving == self._wanted()[0]:
            self._records_came = True
            self._update_ledger()
            self._engine.drop(plan.drop)
            finish(plan, self.versions)

    def _enter(self, version: int, take: Callable[[int, Policy], None]) -> None:
        """Give the engine the weights of a version on disk, checked against their hashes.

        They are read into a policy that the engine has let go, where there is one: making another takes five times as
        long, and all that time keeps the decoding thread from the interpreter.
        """
        folder = self.versions.model(version)
        with self._reuse:
            resident = self._engine.resident()
            free = next((v for v in self._loaded if v not in resident), None)
            policy = None if free is None else self._loaded.pop(free)
        if policy is None:
            policy = load_like(self._like, folder, self.config.device, self.config.dtype)
        else:
            policy.restore(folder)
        take(version, policy)
        with self._reuse:
            self._loaded[version] = policy
