"""The one thread that decodes: requests of all users in one batch for each resident version of the weights.

A request is pinned to the version it began with, and a cache to the weights that made it. At most two versions are
resident; when a third comes, one of them leaves and its rows are read again under the newest. Every token is recorded
with the version that drew it.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from operant.data.text import Codec
from operant.models.policy import LanguagePolicy
from operant.models.sampler import Sampler, room
from operant.types import Completion, OperantError, Prompt, SamplerProtocol, Sampling, TokenInfo

__all__ = ["Busy", "Engine", "NotResident", "OnText", "StepFailed", "TokenInfo", "empty_completion", "held_back"]

log = logging.getLogger(__name__)

RESIDENT = 2  # versions in memory that serve
AVERAGED = 10.0  # seconds over which rates are averaged

OnText = Callable[[str, str, TokenInfo], None]


class Busy(OperantError):
    """There is no room for this now. `retry_after`: seconds after which there may be."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class NotResident(OperantError):
    """The version that a request is pinned to is not in memory: `Engine.add` it first."""


def held_back(text: str, stop: Sequence[str]) -> int:
    """How many characters at the end of `text` may be the beginning of a stop string."""
    longest = min(len(text), max((len(s) for s in stop), default=0) - 1)
    for length in range(longest, 0, -1):
        tail = text[-length:]
        if any(len(s) > length and s.startswith(tail) for s in stop):
            return length
    return 0


class StepFailed(RuntimeError):
    """A decode step raised: what was under way on that version is lost, what comes after it is served."""


@dataclass(slots=True)
class _Output:
    """One completion asked for, and where it goes.

    version: that it is written under, once it has begun or is pinned. held: text that may yet be cut off. sent:
    characters that `on_text` was given.
    """

    future: Future[Completion]
    on_text: OnText | None
    stop: tuple[str, ...]
    version: int | None
    pinned: bool
    begun: bool = False
    held: str = ""
    sent: int = 0


@dataclass(slots=True)
class _Waiting:
    """What of one request has not begun: these ids, the first of them keyed sample `first`."""

    prompt: Prompt
    sampling: Sampling
    ids: list[str]
    version: int | None
    alternatives: int
    first: int = 0


@dataclass(frozen=True, slots=True)
class _Resident:
    """A version in memory: its weights, and what decodes with them."""

    policy: LanguagePolicy
    sampler: SamplerProtocol


@dataclass(slots=True)
class _Rates:
    """Moving averages over about AVERAGED seconds."""

    busy: float = 0.0
    finished: float = 0.0  # completions a second
    at: float = field(default_factory=time.monotonic)

    def pass_time(self, busy: float, finished: int = 0) -> None:
        now = time.monotonic()
        passed = max(now - self.at, 1e-9)
        old = math.exp(-passed / AVERAGED)
        self.busy = old * self.busy + (1 - old) * min(1.0, busy / passed)
        self.finished = old * self.finished + (1 - old) * finished / passed
        self.at = now

    def busy_now(self) -> float:
        return self.busy * math.exp(-max(0.0, time.monotonic() - self.at) / AVERAGED)


class Engine:
    """Serves a policy from a thread of its own. Every method may be called from any thread but that one.

    Once the engine is closed, `submit`, `load`, `add` and `drop` raise Busy.

    policy, version: what serves first. Weights must not change while they are resident.
    max_rows: completions decoded together. queue: completions that may wait beside them.
    threads: CPU threads of this thread's matrix work; 0 leaves torch's default. In torch this is a setting of each
        thread; one that has not computed yet takes the value that was set last.
    Raises OperantError for numbers that are out of range.
    """

    def __init__(
        self, policy: LanguagePolicy, version: int, *, max_rows: int = 64, queue: int = 256, threads: int = 0
    ) -> None:
        if max_rows < 1 or queue < 1 or threads < 0:
            raise OperantError(
                "max_rows and queue must be at least 1, threads 0 or more: correct the engine's settings"
            )
        self.max_rows, self.queue, self.threads = max_rows, queue, threads
        self._wake = threading.Condition()
        # these three are changed under the lock
        self._inbox: deque[Callable[[], None]] = deque()
        self._waits = 0  # completions that have not begun
        self._closed = False
        # the engine's thread alone changes what follows, and replaces what others read
        self._version = version
        self._residents: dict[int, _Resident] = {version: self._enter(policy, version)}  # oldest first
        self._requests: deque[_Waiting] = deque()
        self._outputs: dict[str, _Output] = {}
        self._fresh: dict[str, TokenInfo] = {}  # tokens of the step under way
        self._rates = _Rates()
        self._row_count = 0
        self._totals = {"tokens": 0, "completions": 0, "cancelled": 0, "faults": 0, "reread": 0}
        self._thread = threading.Thread(target=self._run, name="operant-engine", daemon=True)
        self._thread.start()

    # --- requests ------------------------------------------------------------------------------------------------

    def submit(
        self,
        prompt: Prompt,
        sampling: Sampling,
        *,
        ids: Sequence[str],
        version: int | None = None,
        preferred: int | None = None,
        on_text: OnText | None = None,
        top_logprobs: int = 0,
    ) -> list[Future[Completion]]:
        """Ask for one completion for each id, which share the reading of the prompt; the i-th is keyed sample i.

        Args:
            version: a resident version to which the request is pinned; None: the one that serves when it begins.
            preferred: a version that writes it if it is resident then, else the one that serves.
            on_text: called in the engine's thread as (id, piece, token) once for each token, with text that is final:
                what may turn out to be a stop string is held back. The pieces of a completion joined are its text,
                unless it is cancelled. It must not block; if it raises it is called no more.
            top_logprobs: how many `alternatives` each token comes with.

        Returns a future for each id, which `cancel` alone can end early. A future fails with StepFailed when decoding
        did, and with NotResident when the version left between this call and its turn.
        Raises Busy when too many completions wait, NotResident, and OperantError when the prompt is empty or too long.
        """
        self._check_request(prompt, sampling, len(ids), version)
        pinned, version = version is not None, preferred if version is None else version
        outputs = {i: _Output(Future(), on_text, sampling.stop, version, pinned) for i in ids}
        for output in outputs.values():
            output.future.set_running_or_notify_cancel()  # so that only `cancel` ends it
        request = _Waiting(prompt, sampling, list(ids), version, top_logprobs if on_text is not None else 0)

        def join() -> None:
            self._outputs.update(outputs)
            self._requests.append(request)

        with self._wake:
            if self._waits + len(outputs) > self.queue:
                raise Busy("too many requests are waiting; try again later", self._retry_after())
            self._post(join)
            self._waits += len(outputs)
        return [output.future for output in outputs.values()]

    def _check_request(self, prompt: Prompt, sampling: Sampling, count: int, version: int | None) -> None:
        """Raises what `submit` does of a request that can never begin."""
        if len(prompt.tokens) == 0:
            raise OperantError("the prompt is empty, so nothing predicts the first token; give some text")
        residents = self._residents
        serving = next(reversed(residents))  # read with them, not beside them
        resident = residents.get(serving if version is None else version)
        if resident is None:
            raise _not_resident(version)
        if room(resident.policy, prompt, sampling.max_tokens) < 1:
            raise OperantError(
                f"the prompt has {len(prompt.tokens)} tokens and the model holds {resident.policy.max_length} with the "
                "completion; shorten it"
            )
        if count > self.queue:
            raise OperantError(f"{count} completions are asked for and {self.queue} may wait; ask for fewer")

    def cancel(self, completion_id: str) -> None:
        """End one completion before its next token; its future resolves with what there is, stop reason "cancelled".
        An unknown id is no fault: it may have ended by itself."""
        with self._wake:
            if not self._closed:
                self._post(lambda: self._cancel(completion_id))

    # --- versions ------------------------------------------------------------------------------------------------

    def load(self, version: int, policy: LanguagePolicy | None = None) -> None:
        """From now on this version serves what begins; returns when that is so.

        One that is resident keeps the weights that it has, and needs no policy: without one, raises NotResident for
        any other. When a third comes, one has to leave: an idle one, else one
        to which nothing is pinned, else the oldest; what it has under way goes on under this one.
        """

        def serve() -> None:
            resident = self._residents.get(version)
            if resident is None:
                if policy is None:
                    raise _not_resident(version)
                resident = self._enter(policy, version)
            self._residents = {v: r for v, r in self._residents.items() if v != version} | {version: resident}
            self._version = version
            self._leave()

        self._call(serve)

    def add(self, version: int, policy: LanguagePolicy) -> None:
        """Make a version resident for what is pinned to it, beside the one that serves.

        Raises Busy while another version's pinned requests hold the place.
        """

        def enter() -> None:
            if version in self._residents:
                return
            if any(o.pinned and o.version not in (None, self._version) for o in self._outputs.values()):
                raise Busy("another pinned version is at work in this one's place; try again later", 1.0)
            now = self._residents[self._version]
            self._residents = self._residents | {version: self._enter(policy, version)}
            self._leave(version)
            self._residents = {v: r for v, r in self._residents.items() if r is not now} | {self._version: now}

        self._call(enter)

    def drop(self, versions: Sequence[int]) -> None:
        """Let these versions leave memory, but the one that serves; what they have under way goes on under that."""

        def leave() -> None:
            for version in set(self._residents) & set(versions) - {self._version}:
                self._let_go(version)

        self._call(leave)

    def resident(self) -> list[int]:
        """The versions in memory; the last one serves."""
        return list(self._residents)

    def stats(self) -> dict[str, Any]:
        """What it is doing: rows under way, completions queued, the version, totals since the start (of rows `reread`
        under newer weights, too), and the share of the last seconds that went into decode steps."""
        return {
            "version": self._version, "resident": self.resident(), "rows": self._row_count, "queued": self._waits,
            "busy_fraction": self._rates.busy_now(), **self._totals,
        }  # fmt: skip

    def close(self) -> None:
        """End everything, as `cancel` does, and the thread."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    # --- from any thread to the engine's -------------------------------------------------------------------------

    def _post(self, command: Callable[[], None]) -> None:
        """Have the engine's thread do this before its next step. Call it with the lock held."""
        if self._closed:
            raise Busy("the server is shutting down; try again later", 5.0)
        self._inbox.append(command)
        self._wake.notify()

    def _call(self, command: Callable[[], None]) -> None:
        """Have the engine's thread do this, and wait for it."""
        done: Future[None] = Future()

        def run() -> None:
            try:
                command()
            except BaseException as error:
                done.set_exception(error)
            else:
                done.set_result(None)

        with self._wake:
            self._post(run)
        done.result()

    def _retry_after(self) -> float:
        """Seconds in which what waits now will have begun, as far as the last seconds tell."""
        return float(math.ceil(min(60.0, max(1.0, self._waits / max(self._rates.finished, 0.1)))))

    # --- the engine's thread -------------------------------------------------------------------------------------

    def _run(self) -> None:
        if self.threads:
            torch.set_num_threads(self.threads)
        while True:
            with self._wake:
                while not (self._inbox or self._outputs or self._closed):
                    self._wake.wait()
                commands, self._inbox = self._inbox, deque()
                closed = self._closed
            try:
                for command in commands:
                    command()
                if closed:
                    for completion_id in list(self._outputs):
                        self._cancel(completion_id)
                    return
                self._admit()
                self._rates.pass_time(0.0)
                for version, resident in list(self._residents.items()):
                    if resident.sampler.pending:
                        self._step(version, resident)
            except Exception:  # what a step raises is caught in _step: this is a fault of the engine's own
                log.exception("the engine failed; every request under way fails with it")
                self._fail(list(self._outputs), StepFailed("the engine failed; the log says how"))
                self._requests.clear()
                self._residents = {v: self._enter(r.policy, v) for v, r in self._residents.items()}
            self._row_count = self._under_way()

    def _enter(self, policy: LanguagePolicy, version: int) -> _Resident:
        """A version with a sampler of its own, which is idle."""
        sampler = Sampler(policy, max_rows=self.max_rows, version=version, on_token=self._fresh_token)
        return _Resident(policy, sampler)

    def _under_way(self) -> int:
        return sum(resident.sampler.pending for resident in self._residents.values())

    def _fresh_token(self, completion_id: str, token: TokenInfo) -> None:
        self._fresh[completion_id] = token

    def _admit(self) -> None:
        """Give waiting requests to the samplers while there are rows free, first come, first served."""
        free = self.max_rows - self._under_way()
        while self._requests and free > 0:
            request = self._requests[0]
            begin, request.ids = request.ids[:free], request.ids[free:]
            if not request.ids:
                self._requests.popleft()
            if not begin:
                continue
            if request.version not in self._residents:
                if any(self._outputs[i].pinned for i in begin):
                    self._fail(begin, _not_resident(request.version))
                    continue
                request.version = self._version
            for completion_id in begin:
                self._outputs[completion_id].version = request.version
                self._outputs[completion_id].begun = True
            with self._wake:
                self._waits -= len(begin)
            try:
                self._residents[request.version].sampler.submit(
                    request.prompt, request.sampling, ids=begin, first_sample=request.first,
                    alternatives=request.alternatives,
                )  # fmt: skip
            except OperantError as error:  # a version that holds less
                self._fail(begin, error)
                continue
            request.first += len(begin)
            free -= len(begin)

    def _step(self, version: int, resident: _Resident) -> None:
        began = time.monotonic()
        self._fresh.clear()
        try:
            finished = {c.id: c for c in resident.sampler.step()}
        except Exception as error:
            log.exception("a decode step of version %d failed", version)
            self._totals["faults"] += 1
            # caches and rows may be half-way
            self._residents = self._residents | {version: self._enter(resident.policy, version)}
            lost = [i for i, output in self._outputs.items() if output.begun and output.version == version]
            self._fail(lost, StepFailed(f"a decode step failed ({type(error).__name__}: {error}); ask again"))
            return
        self._totals["tokens"] += len(self._fresh)
        for completion_id, token in self._fresh.items():
            self._send(completion_id, token, finished.get(completion_id))
        for completion_id, completion in finished.items():
            self._outputs.pop(completion_id).future.set_result(completion)
        self._totals["completions"] += len(finished)
        self._rates.pass_time(time.monotonic() - began, len(finished))

    def _send(self, completion_id: str, token: TokenInfo, finished: Completion | None) -> None:
        output = self._outputs[completion_id]
        if output.on_text is None:
            return
        if finished is not None:
            piece = finished.text[output.sent :]
        else:
            output.held += token.text
            final = len(output.held) - held_back(output.held, output.stop)
            piece, output.held = output.held[:final], output.held[final:]
        output.sent += len(piece)
        try:
            output.on_text(completion_id, piece, token)
        except Exception:  # often a client's event loop that has gone
            log.exception("the receiver of %s failed and is sent nothing more", completion_id)
            output.on_text = None

    def _cancel(self, completion_id: str) -> None:
        output = self._outputs.get(completion_id)
        if output is None:
            return
        completion: Completion | None = None
        if output.begun:
            assert output.version is not None
            completion = self._residents[output.version].sampler.cancel(completion_id)
        else:
            with self._wake:
                self._waits -= 1
            for request in self._requests:
                if completion_id in request.ids:
                    request.ids.remove(completion_id)
                    codec = self._residents[self._version].policy.codec
                    completion = empty_completion(completion_id, request.prompt, request.sampling, codec)
                    break
        assert completion is not None
        self._totals["cancelled"] += 1
        self._outputs.pop(completion_id).future.set_result(completion)

    def _fail(self, ids: Sequence[str], error: Exception) -> None:
        for completion_id in ids:
            output = self._outputs.pop(completion_id)
            if not output.begun:
                with self._wake:
                    self._waits -= 1
            output.future.set_exception(error)

    def _leave(self, entering: int | None = None) -> None:
        """Let versions go until no more are resident than may be; what they have under way goes to the serving one."""
        while len(self._residents) > RESIDENT:
            used = {v: [o for o in self._outputs.values() if o.version == v] for v in self._residents}
            leaving = min(
                (v for v in self._residents if v not in (self._version, entering)),
                key=lambda v: (bool(used[v]), any(o.pinned for o in used[v])),  # the first of equals is the oldest
            )
            self._let_go(leaving)

    def _let_go(self, leaving: int) -> None:
        sampler = self._residents[leaving].sampler
        self._residents = {v: r for v, r in self._residents.items() if v != leaving}
        self._totals["reread"] += sampler.pending
        self._residents[self._version].sampler.absorb(sampler)
        for output in self._outputs.values():
            if output.begun and output.version == leaving:
                output.version = self._version


def _not_resident(version: int | None) -> NotResident:
    return NotResident(f"version {version} is not in memory; it has to be loaded first")


def empty_completion(completion_id: str, prompt: Prompt, sampling: Sampling, codec: Codec) -> Completion:
    """A completion of no tokens, which ended before it began."""
    none, zero = np.empty(0, np.int64), np.empty(0, np.float32)
    return Completion(
        id=completion_id, prompt_id=prompt.id, text="", tokens=none, text_ends=none, text_reach=none,
        behavior_logprobs=zero, model_logprobs=zero, sampled=np.empty(0, np.bool_), policy_version=none,
        stop_reason="cancelled", sampling=sampling, tokenizer_hash=codec.hash, template_hash=codec.template_hash,
    )  # fmt: skip
