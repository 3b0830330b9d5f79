"""The learner as a process of its own, so that the server answers while it learns and serves on when it dies.

    python -m operant.live.learning.worker --root runs/live --store feedback.db --model runs/train/model

A line on a watched standard input wakes it. One with the id of an answer has it read that answer while there is nothing
else to do. It reports in lines of JSON on standard output: {"ready": 2} when it begins, {"version": 3, …} when a
version serves, {"step": 4, "state": "nothing" | "refused", …} when a step published nothing, {"rolled_back": 5,
"version": 2, …} by the slow gate, and {"error": …} for a fault, after which it tries again. What it has consumed is in
the version folders, nowhere else.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
import select
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from filelock import FileLock, Timeout

from operant.config import LearnerConfig, LiveConfig, WorkerConfig
from operant.data.prompts import given_style, load_fitting_prompts
from operant.data.rows import Fields, load_rows
from operant.live.learning.anchors import asked_in_chat
from operant.live.learning.events import EventSource, open_store
from operant.live.learning.execution import load_version
from operant.live.learning.forget import Remaking
from operant.live.learning.gate import Interrupted, Verdict, sense_gate, sense_metrics, slow_gate, slow_metrics
from operant.live.learning.learner import LiveLearner
from operant.live.learning.questions import QUESTIONS
from operant.live.learning.step import fingerprint
from operant.live.storage.versions import Moved, Outcome, Pointer, StepRecord
from operant.models.policy import Policy
from operant.rl.evaluate import FEWEST_PROMPTS
from operant.run.run import mixed_seed
from operant.types import OperantError, Prompt

__all__ = ["Worker", "heldout_prompts", "main"]

log = logging.getLogger(__name__)

EVERYTHING = 10_000  # events that are looked at while several sources are waited for
STORE_VARIABLE = "OPERANT_STORE"  # the environment variable that stands for --store where that is not given
LONGEST_PAUSE = 30.0  # seconds between tries after faults in a row
LONGEST_REST = 0.5  # seconds after a step
PUT_OFF = 32  # steps and interruptions after which the slow gate looks all the same, and lets events wait
NEWEST = 2  # answers that are read before somebody rates them
QUIET = 5.0  # seconds without a step before it looks at sense: who rates again at once waits for nothing
SENSE_TOKENS = 24  # of an answer by which sense is judged

# of the slow gate: what is no answer any more; too much, nothing, or a little lost on held-out prompts, or not asked
Found = Literal["senseless", "worse", "better", "sound"]

_NUMBERS = [f.name for f in dataclasses.fields(LiveConfig)]


class Worker(LiveLearner):
    """The learner that chooses for itself what to learn and when, until it is stopped."""

    def __init__(
        self, config: WorkerConfig, source: EventSource, say: Callable[[dict[str, Any]], None] | None = None
    ) -> None:
        super().__init__(config, source, say or _print)
        self._anchor_metrics: dict[str, tuple[int, dict[str, float]]] = {}
        self._heldout: list[Prompt] | None = None
        self._sense: list[Prompt] | None = None
        self._put_off = 0  # steps made, and looks left off, since the slow gate has looked
        self._remaking: Remaking | None = None
        self._answers: deque[str] = deque(maxlen=NEWEST)  # that were given and not read yet

    # --- a step -------------------------------------------------------------------------------------------------------

    def once(self) -> bool:
        """Make the step that a crash or fault left, or one of new events; False when there was nothing to do.

        While a source is being forgotten, the learner's part of that is done instead (see `forget`)."""
        if self.versions.forgetting():
            return self._forget()
        record = self.versions.finish() or self._next()
        if record is None:
            return False
        try:
            while not self.execute(record):
                pass
        except OperantError:
            self.at = None  # weights in memory may be half-way
            raise
        except Exception as error:
            if record.version in {version.version for version in self.versions.all()}:
                self.at = None
                raise  # it is published, whatever failed after that
            # the same events would fail again after every restart, and nothing would be learned any more
            log.exception("step %d failed", record.version)
            reason = f"the step failed: {type(error).__name__}: {error}"
            record.outcomes = {name: Outcome("unused", reason) for name in record.events}
            self.publish_nothing(record, "nothing", reason, reload=True)
        return True

    def _next(self) -> StepRecord | None:
        begin = self.versions.consumed()
        several = self.config.min_sources > 1
        events = self.source.events_after(begin, EVERYTHING if several else self.config.batch_size)
        if not events or len({event.source for _, event in events}) < self.config.min_sources:
            return None
        at = self.current()
        if several:  # of those who count
            trust = at.state.reputations()
            if len({e.source for _, e in events if trust.get(e.source, 1.0) > 0}) < self.config.min_sources:
                return None
        version = self.versions.next_version()
        return StepRecord(
            version=version, parent=at.version, moves=at.moves, begin_offset=begin, consumed_offset=events[-1][0],
            events=[event.id for _, event in events], seed=mixed_seed(self.config.seed, "live"),
            coefficients={name: getattr(self.config, name) for name in _NUMBERS}, fingerprint=fingerprint(at.policy),
            times={"queued": time.time()},
        )  # fmt: skip

    def _forget(self) -> bool:
        if self._remaking is None:
            self._remaking = Remaking(self.config, self.source)
        busy = self._remaking.once()
        if not self.versions.forgetting():
            self._remaking, self.at = None, None
            self.say({"forgotten": True})
        return busy

    # --- the slow gate ------------------------------------------------------------------------------------------------

    def judge(self) -> bool:
        """Let the slow gate look at the version that serves, if it has not yet; False when there is nothing to judge.
        Events that come meanwhile go first.

        A version whose answers to everyday questions are no answers any more is rolled back to the newest one before
        it that the gate has passed, or to the anchor version. One that lost too much on held-out prompts is rolled back
        to the anchor version; one that lost nothing there is the new anchor, so that what is lost in small steps adds
        up.
        """
        pointer = self.versions.pointer()
        if pointer.version == pointer.anchor or self.versions.forgetting():
            return False
        if not (self.config.heldout or self._sense_prompts()) or self.versions.slow(pointer.version) is not None:
            return False
        try:
            verdict, found = self._look_at(pointer, self._newcomers())
        except Interrupted:
            self._put_off += 1
            return self.once()
        self._put_off = 0
        try:  # before it is noted, so that what a fault or a kill leaves undone is done by the next look
            if not verdict.passed:
                back = self._falls_back_to(pointer, found)
                self.versions.roll_back(back, moves=pointer.moves)
                self.say({"rolled_back": pointer.version, "version": back, "reason": verdict.reason})
            elif found == "better":
                self.versions.pass_anchor(pointer.version, moves=pointer.moves)
        except Moved:
            return True  # somebody has decided meanwhile, and what serves now is looked at anew
        self.versions.note_slow(pointer.version, {"anchor": pointer.anchor, **dataclasses.asdict(verdict)})
        return True

    def is_time(self, quiet: float) -> bool:
        """Whether the slow gate may look, so many seconds after the last step."""
        at_once = bool(self.config.heldout) or self.config.once
        return at_once or quiet >= QUIET or self._put_off >= PUT_OFF

    def _look_at(self, pointer: Pointer, interrupted: Callable[[], bool]) -> tuple[Verdict, Found]:
        """Raises Interrupted when it says so."""
        numbers: dict[str, float] = {}
        if asked := self._sense_prompts():
            look = functools.partial(sense_metrics, prompts=asked, max_tokens=SENSE_TOKENS, interrupted=interrupted)
            sense = sense_gate(look(self.current().policy), self._of_anchor("sense", pointer.anchor, look))
            if not (sense.passed and self.config.heldout):
                return sense, "sound" if sense.passed else "senseless"
            numbers = sense.numbers
        prompts = self._heldout_prompts()

        def measure(policy: Policy) -> dict[str, float]:
            return slow_metrics(policy, prompts, interrupted=interrupted)[0]

        before, measured = self._of_anchor("heldout", pointer.anchor, measure), measure(self.current().policy)
        verdict = slow_gate(measured, before, self.config.tolerance)
        better = slow_gate(measured, before, 0.0).passed
        verdict = dataclasses.replace(verdict, numbers={**verdict.numbers, **numbers})
        return verdict, "worse" if not verdict.passed else "better" if better else "sound"

    def _of_anchor(self, what: str, version: int, measure: Callable[[Policy], dict[str, float]]) -> dict[str, float]:
        """What is measured of the anchor version, once."""
        if what not in self._anchor_metrics or self._anchor_metrics[what][0] != version:
            kept = self._origin_kept
            if kept is not None and kept[0] == version:
                policy = kept[1].policy
            else:
                policy = load_version(self.versions, version, self.config, self._like)
            self._anchor_metrics[what] = version, measure(policy)
        return self._anchor_metrics[what][1]

    def _newcomers(self) -> Callable[[], bool]:
        """Whether events have come since now, for which the slow gate has to leave off. It does not for ever."""
        begin = self.versions.consumed()
        waiting = self.source.events_after(begin, EVERYTHING)  # for other sources, or they would have been learned
        newest = waiting[-1][0] if waiting else begin
        return lambda: self._put_off < PUT_OFF and bool(self.source.events_after(newest, 1))

    def _falls_back_to(self, pointer: Pointer, found: Found) -> int:
        """What serves instead of what the slow gate refused: the anchor version; where only sense was lost, the newest
        before it that had passed; or, where the anchor version is only tried, what serves beside it."""
        trial = self.versions.trial() or {}
        line = self.versions.ancestors(pointer.version)
        if trial.get("candidate") is not None and trial["serving"] in line:
            return int(trial["serving"])
        if found == "senseless":
            there = {version.version for version in self.versions.all()}
            for version in line[1:]:
                if version == pointer.anchor:
                    break
                if version in there and (self.versions.slow(version) or {}).get("passed"):
                    return version
        return pointer.anchor

    def _sense_prompts(self) -> list[Prompt]:
        """What the slow gate asks a chat model whose anchors are shipped questions: others of these."""
        if self._sense is None:
            asked: list[Prompt] = []
            if self.config.sense_rows and self.anchors().are_questions:
                last = QUESTIONS[-self.config.sense_rows :]
                asked = asked_in_chat(self.current().policy, last, room=SENSE_TOKENS)
            self._sense = asked if len(asked) >= FEWEST_PROMPTS else []
        return self._sense

    def _heldout_prompts(self) -> list[Prompt]:
        if self._heldout is None:
            self._heldout = heldout_prompts(self.config, self.current().policy)
        return self._heldout

    # --- the loop -----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Learn until it is stopped: by SIGTERM, by the end of a watched standard input, or, once, when all is done."""
        stopping = False

        def stop(number: int, frame: FrameType | None) -> None:
            nonlocal stopping
            stopping = True

        signal.signal(signal.SIGTERM, stop)
        pause, stepped = 0.0, -QUIET
        while not stopping:
            began = time.monotonic()
            try:
                if busy := self.once():
                    self._put_off, stepped = self._put_off + 1, time.monotonic()
                elif self.is_time(began - stepped):
                    busy = self.judge()
                if not busy and not self.config.once and not self.versions.forgetting():
                    self.look_ahead()
                    if self._answers:
                        self.read_ahead(self._answers.pop())
                pause = 0.0
            except OperantError as error:
                if self.config.once:
                    raise
                self.say({"error": " ".join(str(error).split())})
                pause = min(LONGEST_PAUSE, max(2 * pause, 0.5))
                busy = False
            if busy:
                if not self.config.once:
                    time.sleep(min(LONGEST_REST, self.config.rest * (time.monotonic() - began)))
                continue
            if self.config.once or not self._wait(
                0.0 if self._answers and not pause else max(pause, self.config.poll_seconds)
            ):
                return

    def _wait(self, seconds: float) -> bool:
        """Until something may have come; False when the parent is gone."""
        if not self.config.watch_stdin:
            time.sleep(seconds)
            return True
        ready, _, _ = select.select([sys.stdin], [], [], seconds)
        told = os.read(sys.stdin.fileno(), 1 << 16) if ready else b"\n"
        self._answers += [name.decode(errors="replace") for name in told.split(b"\n") if name]
        return told != b""


def _print(news: dict[str, Any]) -> None:
    try:
        print(json.dumps(news, ensure_ascii=False), flush=True)
    except BrokenPipeError:  # the server is gone; what is done is on the disk
        raise SystemExit(1) from None


def heldout_prompts(config: LearnerConfig, policy: Policy) -> list[Prompt]:
    """What the slow gate asks. Raises OperantError when the file is missing, empty or has no such column."""
    prompts = load_fitting_prompts(
        load_rows(config.heldout, split="dev", limit=config.heldout_rows), policy,
        fields=Fields(prompt=config.prompt_field, references=config.reference_field),
        max_prompt_tokens=policy.max_length // 2, too_long="skip", **given_style(config),
    )  # fmt: skip
    if not prompts:
        raise OperantError(f"no prompt of {config.heldout} is short enough to be asked; give another --heldout")
    return prompts


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the learner. An OperantError, which the user can mend, becomes one line on stderr and exit status 1."""
    import jsonargparse

    parser = jsonargparse.ArgumentParser(prog="python -m operant.live.learning.worker", exit_on_error=False)
    parser.add_class_arguments(WorkerConfig, as_group=False)
    try:
        try:
            config = WorkerConfig(**parser.parse_args(arguments).as_dict())
        except (jsonargparse.ArgumentError, ValueError, TypeError) as error:
            raise OperantError(
                f"{' '.join(str(error).split())[:400]} (see python -m operant.live.learning.worker --help)"
            ) from None
        if config.threads:
            torch.set_num_threads(config.threads)
        worker = Worker(config, open_store(config.store or os.environ.get(STORE_VARIABLE, "")))
        lock = FileLock(Path(config.root) / "learner.lock", timeout=0)
        Path(config.root).mkdir(parents=True, exist_ok=True)
        try:
            with lock:
                worker.start()
                worker.say({"ready": worker.versions.pointer().version})
                worker.run()
        except Timeout:
            raise OperantError(
                f"another learner is at work in {config.root}; stop that one, or give another --root"
            ) from None
    except OperantError as error:
        print("operant:", " ".join(str(error).split()), file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
