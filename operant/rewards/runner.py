"""Rewards in parallel, each call under a time limit that holds.

Rewards that pickle run in worker processes, started once; one that hangs is killed, with whatever it started, and
replaced. Rewards that do not pickle (lambdas, closures) run in daemon threads: one that hangs is abandoned,
since a thread cannot be killed. The built-in linear metrics run in place: sending them away would cost more than
computing them. So do batched rewards that say so: a model has its device here, and a judge its own time limits. Only
the leaves of a combination are sent; the combination itself is computed here, so its state is in
one place.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any

from operant.rewards.combine import Combination, combined, leaves, streamed_by
from operant.rewards.seam import Limited, StreamTimeout, as_reward, missing_trajectory
from operant.rewards.worker import call, raised
from operant.types import Completion, OperantError, Prompt, StreamingReward, Trajectory

# Longer texts leave the fast path: there even a linear metric deserves a process that can be killed.
IN_PLACE_CHARACTERS = 5_000
# A reward that carries more than this (a model in a closure) is not copied into every worker.
LARGEST_PICKLE = 32 * 2**20
START_LIMIT = 300.0

Pair = tuple[Prompt, Completion]
Outcome = tuple[Any, str | None]


class RewardRunner:
    """Runs a reward over batches of completions.

    reward: anything that `as_reward` takes. workers: processes (and threads) at work at once; None uses every core but
    one, 0 keeps everything in threads of this process. time_limit: seconds for one call; a batched reward's one call
    judges the whole batch.

    counts: how often a reward was missing, by reason ("raised", "timeout", "nan", "infinite", "none", "wrong_length",
    "wrong_type", "bad_span", "no_tokens", "crashed", "stuck"). details: the first message of each reason.
    Close it, or use it as a context manager, to end its processes.

    Raises OperantError for a time limit or a number of workers that cannot be, and what `as_reward` cannot take.
    """

    def __init__(self, reward: Any, *, workers: int | None = None, time_limit: float = 10.0) -> None:
        if time_limit <= 0:
            raise OperantError(f"a reward's time limit must be above 0 seconds, not {time_limit}")
        if workers is not None and workers < 0:
            raise OperantError(f"the number of reward workers must be 0 or more, not {workers}")
        self.reward = as_reward(reward)
        self.time_limit = float(time_limit)
        self.workers = max(1, (os.cpu_count() or 2) - 1) if workers is None else workers
        self.counts: Counter[str] = Counter()
        self.details: dict[str, str] = {}
        self.rewarded = 0
        self._leaves = list(leaves(self.reward))
        self._pickles: dict[int, bytes | None] = {}
        self._abandoned: list[threading.Thread] = []
        self._pool = _Pool(self.workers, self.time_limit)
        # No sockets to pass to a child elsewhere.
        self._processes_work = os.name == "posix" and self.workers > 0

    def __enter__(self) -> RewardRunner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the worker processes. The runner starts new ones when it is used again."""
        self._pool.close()

    def run(self, pairs: Sequence[Pair], *, update: bool = True, scaled: bool = True) -> list[Trajectory]:
        """Trajectories in the order of `pairs`; one whose reward is missing has nothing observed and says why.

        update: whether running normalisations learn from this batch. scaled: whether they are applied. Both are False
        in evaluation, whose rewards must mean the same at every step. Never raises for what a reward function does;
        raises OperantError when worker processes cannot be started.
        """
        pairs = list(pairs)
        if not pairs:
            return []
        rows = [self._run_leaf(index, pairs) for index in range(len(self._leaves))]
        trajectories = combined(self.reward, iter(rows), update=update, scaled=scaled)
        for trajectory in trajectories:
            self.tally(trajectory)
        return trajectories

    def tally(self, trajectory: Trajectory) -> None:
        """Count one rewarded completion, also one that was paid elsewhere: by an environment, or by a log."""
        if trajectory.missing is None and trajectory.observed.all():
            self.rewarded += 1
            return
        detail = trajectory.missing or "partial: some tokens of the completion have no reward"
        reason = detail.split(":", 1)[0]
        self.counts[reason] += 1
        self.details.setdefault(reason, detail)

    @property
    def stream(self) -> StreamingReward | None:
        """What a sampler pays while it writes, each call under the time limit; None where nothing streams."""
        return Limited(self.reward, self.time_limit) if self.reward.streaming else None

    def spent(self) -> dict[str, float]:
        """What rewards that count their cost have spent so far: {"judge/tokens_in": …, "model/seconds": …}."""
        return {
            f"{leaf.name}/{name}": float(value)
            for leaf in self._leaves
            for name, value in getattr(leaf, "spent", {}).items()
        }

    def explain(self) -> str:
        """One line on the missing rewards: how many, why, and the first message of the most frequent reason."""
        if not self.counts:
            return "no reward is missing"
        reason, _ = self.counts.most_common(1)[0]
        each = ", ".join(f"{count} {name}" for name, count in self.counts.most_common())
        total = sum(self.counts.values())
        return f"{total} of {total + self.rewarded} rewards are missing ({each}); first: {self.details[reason]}"

    def state_dict(self) -> dict[str, Any]:
        """Counts and running statistics, for exact resume."""
        state = self.reward.state_dict() if isinstance(self.reward, Combination) else None
        return {"reward": state, "counts": dict(self.counts), "details": dict(self.details), "rewarded": self.rewarded}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict()`. Raises OperantError when it belongs to another reward."""
        if isinstance(self.reward, Combination):
            if state["reward"] is None:
                raise OperantError(f"the saved state has nothing for '{self.reward.name}'; resume with the same reward")
            self.reward.load_state_dict(state["reward"])
        self.counts, self.details = Counter(state["counts"]), dict(state["details"])
        self.rewarded = int(state["rewarded"])

    def _run_leaf(self, index: int, pairs: list[Pair]) -> list[Trajectory]:
        leaf = self._leaves[index]
        if leaf.batched:
            jobs: list[tuple[Any, Any]] = [([prompt for prompt, _ in pairs], [completion for _, completion in pairs])]
        else:
            jobs = list(pairs)
        outcomes: list[Outcome | None] = [None] * len(jobs)
        remote = []
        for i, (prompt, completion) in enumerate(jobs):
            if leaf.streaming:
                jobs[i] = prompt, streamed_by(completion, index)
                if "stream_fault" in completion.meta:  # already tried, while the text was written
                    outcomes[i] = (None, _stream_reason(completion.meta["stream_fault"]))
                    continue
            if leaf.in_process and (leaf.batched or len(completion.text) <= IN_PLACE_CHARACTERS):
                outcomes[i] = call(leaf, prompt, completion)
            else:
                remote.append(i)
        if remote:
            run = self._run_processes if self._pickle(index) is not None else self._run_threads
            run(index, jobs, remote, outcomes)
        if leaf.batched:
            (outcome,) = outcomes
            assert outcome is not None
            values, reason = outcome
            outcomes = [(value, None) for value in values] if reason is None else [(None, reason)] * len(pairs)
        return [_trajectory(leaf.name, *pair, outcome) for pair, outcome in zip(pairs, outcomes, strict=True)]

    def _pickle(self, index: int) -> bytes | None:
        if index not in self._pickles:
            self._pickles[index] = _pickle_for_worker(self._leaves[index]) if self._processes_work else None
        return self._pickles[index]

    def _run_processes(
        self, index: int, jobs: list[tuple[Any, Any]], remote: list[int], outcomes: list[Outcome | None]
    ) -> None:
        payloads: dict[int, bytes] = {}
        for i in remote:
            # Where the prompt's inputs hold something alive, the reward is computed here.
            with contextlib.suppress(Exception):
                payloads[i] = _pickled(jobs[i])
        if len(payloads) < len(remote):
            self._run_threads(index, jobs, [i for i in remote if i not in payloads], outcomes)
        for i, outcome in self._pool.run(index, self._pickle(index), payloads).items():
            outcomes[i] = outcome

    def _run_threads(
        self, index: int, jobs: list[tuple[Any, Any]], remote: list[int], outcomes: list[Outcome | None]
    ) -> None:
        leaf = self._leaves[index]
        results: queue.SimpleQueue[tuple[int, Outcome]] = queue.SimpleQueue()
        waiting = list(reversed(remote))
        deadlines: dict[int, float] = {}
        threads: dict[int, threading.Thread] = {}

        def work(i: int) -> None:
            try:
                outcome: Outcome = call(leaf, *jobs[i])
            except BaseException as error:  # sys.exit ends a thread, and nobody would hear of it
                outcome = None, raised(error)
            results.put((i, outcome))

        while waiting or deadlines:
            while waiting and len(deadlines) < max(1, self.workers):
                i = waiting.pop()
                self._abandoned = [thread for thread in self._abandoned if thread.is_alive()]
                if (stuck := len(self._abandoned)) >= 16:
                    outcomes[i] = (None, f"stuck: {stuck} calls have not returned; make the reward importable")
                    continue
                deadlines[i] = time.monotonic() + self.time_limit
                threads[i] = threading.Thread(target=work, args=(i,), daemon=True, name=f"reward-{leaf.name}")
                threads[i].start()
            if not deadlines:
                break
            try:
                i, outcome = results.get(timeout=max(0.0, min(deadlines.values()) - time.monotonic()))
                # An answer that comes after its limit finds its place taken.
                if deadlines.pop(i, None) is not None:
                    outcomes[i] = outcome
            except queue.Empty:
                now = time.monotonic()
                for i in [i for i, deadline in deadlines.items() if now >= deadline]:
                    del deadlines[i]
                    self._abandoned.append(threads[i])
                    outcomes[i] = (None, f"timeout: over {self.time_limit:g} s")


class _Pool:
    """Worker processes, started when there is work for them and kept for the next batch.

    failures: workers that died before they took a job; then something is wrong with the machine, not with a completion.
    """

    def __init__(self, size: int, time_limit: float) -> None:
        self.size, self.time_limit = size, time_limit
        self.processes: list[_Process] = []
        self.failures = 0

    def close(self) -> None:
        for process in self.processes:
            process.kill()
        self.processes.clear()

    def run(self, index: int, reward: bytes | None, payloads: Mapping[int, bytes]) -> dict[int, Outcome]:
        """The outcome of each payload, a pickled job, under reward number `index`, pickled as `reward`.

        Raises OperantError when workers cannot be started.
        """
        self._start(min(self.size, len(payloads)))
        waiting, idle = list(payloads)[::-1], list(self.processes)
        busy: dict[Connection, tuple[_Process, int]] = {}
        outcomes: dict[int, Outcome] = {}
        try:
            while waiting or busy:
                while idle and waiting:
                    process, i = idle.pop(), waiting.pop()
                    process.job = (index, reward, payloads[i])
                    busy[process.connection] = (process, i)
                    process.dispatch(self.time_limit)
                for finished in (self._answered, self._overdue):
                    for process, i, outcome in finished(busy):
                        del busy[process.connection]
                        outcomes[i] = outcome
                        idle.append(process if process.alive else self._replace(process))
        except BaseException:
            # An interrupted batch leaves answers under way that the next batch must not read.
            self.close()
            raise
        return outcomes

    def _start(self, count: int) -> None:
        self.failures = 0
        for process in [process for process in self.processes if process.popen.poll() is not None]:
            self._replace(process)
        while len(self.processes) < count:
            self.processes.append(_Process())

    def _answered(self, busy: Mapping[Connection, tuple[_Process, int]]) -> list[tuple[_Process, int, Outcome]]:
        """Wait until the next deadline at most; what has come by then."""
        pause = max(0.0, min(process.deadline for process, _ in busy.values()) - time.monotonic())
        found = []
        for connection in wait(list(busy), timeout=pause):
            assert isinstance(connection, Connection)
            process, i = busy[connection]
            outcome = process.receive(self.time_limit)
            if outcome is not None:
                self.failures += not (process.alive or process.ready)
                found.append((process, i, outcome))
        return found

    def _overdue(self, busy: Mapping[Connection, tuple[_Process, int]]) -> list[tuple[_Process, int, Outcome]]:
        now = time.monotonic()
        found: list[tuple[_Process, int, Outcome]] = []
        for process, i in busy.values():
            if now >= process.deadline:
                process.alive = False
                self.failures += not process.ready
                found.append((process, i, (None, f"timeout: over {self.time_limit:g} s")))
        return found

    def _replace(self, process: _Process) -> _Process:
        process.kill()
        self.processes.remove(process)
        if self.failures >= 3:
            raise OperantError(
                "reward workers die while starting; run the rewards in this process with 0 reward workers"
            )
        self.processes.append(_Process())
        return self.processes[-1]


class _Process:
    """One worker process and the job it has."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        paths = [os.path.abspath(path or os.getcwd()) for path in sys.path]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-u", "-c", "from operant.rewards.worker import main; main()", str(theirs.fileno())]
        try:
            # Its own session, so that killing it reaches what the reward has started.
            self.popen = subprocess.Popen(
                command,
                env=environment,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                # What a reward prints is no part of the program's output, which may be JSON.
                stdout=2,
                start_new_session=True,
            )
        except OSError as error:
            raise OperantError(f"cannot start a reward worker: {error}; use fewer reward workers") from None
        finally:
            theirs.close()
        self.connection: Connection = Connection(ours.detach())
        self.ready = False
        self.alive = True
        self.job: tuple[Any, ...] | None = None
        self.known: set[int] = set()
        self.deadline = time.monotonic() + START_LIMIT

    def dispatch(self, limit: float) -> None:
        """Send the job, once the process is up; the clock of the limit starts when the reward does."""
        if not self.ready or self.job is None:
            return
        index, data, payload = self.job
        try:
            new = index not in self.known
            self.connection.send((index, data if new else None, payload, limit))
            # Loading a reward may import half the world, which is not the call's fault.
            self.deadline = time.monotonic() + (START_LIMIT if new else limit)
        except OSError:
            # The worker died between jobs; receive() finds the closed socket.
            self.deadline = time.monotonic() + limit

    def receive(self, limit: float) -> Outcome | None:
        """The outcome, or None while there is none yet."""
        assert self.job is not None
        try:
            message = self.connection.recv()
        except (EOFError, OSError):
            self.alive = False
            return None, f"crashed: the worker process ended with {self.popen.wait()}"
        if message == "ready":
            self.ready = True
            self.dispatch(limit)
            return None
        if message[0] == "loaded":
            self.known.add(self.job[0])
            self.deadline = time.monotonic() + limit
            return None
        if message[0] == "unloadable":
            return None, f"{message[1]} (while loading the reward in a worker; use 0 reward workers)"
        return message[0], message[1]

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait()
        self.connection.close()


def _stream_reason(fault: str) -> str:
    name, _, message = fault.partition(": ")
    return f"timeout: {message}" if name == StreamTimeout.__name__ else f"raised: {fault}"


def _trajectory(name: str, prompt: Prompt, completion: Completion, outcome: Outcome | None) -> Trajectory:
    assert outcome is not None
    placed, reason = outcome
    if reason is None:
        rewards, observed, reason = placed
        if reason is None:
            return Trajectory(prompt, completion, rewards, observed, {name: float(rewards[observed].sum())}, None)
    return missing_trajectory(prompt, completion, name, reason)


def _pickle_for_worker(reward: Any) -> bytes | None:
    """The reward in a form that another interpreter can load, or None: it must run in a thread."""
    try:
        data = _pickled(reward)
    except Exception:
        return None
    return data if len(data) <= LARGEST_PICKLE else None


def _pickled(value: Any) -> bytes:
    data = pickle.dumps(value)
    if b"__main__" in data:
        # The worker's __main__ is another one: send functions and classes of scripts and notebooks by value.
        import cloudpickle

        data = cloudpickle.dumps(value)
    return data
