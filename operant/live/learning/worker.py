"""The learner as a process of its own, so that the server answers while it learns and serves on when it dies.

    python -m operant.live.learning.worker --root runs/live --store feedback.db --model runs/train/model

It reports in lines of JSON on standard output: {"ready": 2} when it begins, {"version": 3, …} when a version
serves, {"step": 4, "state": "nothing" | "refused", …} when a step published nothing, {"rolled_back": 5, "version": 2,
…} by the slow gate, and {"error": …} for a fault, after which it tries again. What it has consumed is in the version
folders, nowhere else.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from filelock import FileLock, Timeout

from operant.config import LearnerConfig, LiveConfig, WorkerConfig
from operant.data.prompts import given_style, load_fitting_prompts
from operant.data.rows import Fields, load_rows
from operant.live.learning.events import EventSource, open_store
from operant.live.learning.execution import load_version
from operant.live.learning.forget import Remaking
from operant.live.learning.gate import slow_gate, slow_metrics
from operant.live.learning.learner import LiveLearner
from operant.live.learning.step import fingerprint
from operant.live.storage.versions import Moved, Outcome, Pointer, StepRecord
from operant.models.policy import Policy
from operant.run.run import mixed_seed
from operant.types import OperantError, Prompt

__all__ = ["Worker", "heldout_prompts", "main"]

log = logging.getLogger(__name__)

EVERYTHING = 10_000  # events that are looked at while several sources are waited for
STORE_VARIABLE = "OPERANT_STORE"  # the environment variable that stands for --store where that is not given
LONGEST_PAUSE = 30.0  # seconds between tries after faults in a row
LONGEST_REST = 0.5  # seconds after a step

_NUMBERS = [f.name for f in dataclasses.fields(LiveConfig)]


class Worker(LiveLearner):
    """The learner that chooses for itself what to learn and when, until it is stopped."""

    def __init__(
        self, config: WorkerConfig, source: EventSource, say: Callable[[dict[str, Any]], None] | None = None
    ) -> None:
        super().__init__(config, source, say or _print)
        self._anchor_metrics: tuple[int, dict[str, float]] | None = None
        self._heldout: list[Prompt] | None = None
        self._remaking: Remaking | None = None

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

        One that lost too much is rolled back to the anchor version; one that lost nothing is the new anchor, so that
        what is lost in small steps adds up.
        """
        pointer = self.versions.pointer()
        if not self.config.heldout or pointer.version == pointer.anchor or self.versions.forgetting():
            return False
        if self.versions.slow(pointer.version) is not None:
            return False
        prompts = self._heldout_prompts()
        if self._anchor_metrics is None or self._anchor_metrics[0] != pointer.anchor:
            origin = load_version(self.versions, pointer.anchor, self.config, self.current().policy)
            self._anchor_metrics = pointer.anchor, slow_metrics(origin, prompts)[0]
        measured = slow_metrics(self.current().policy, prompts)[0]
        verdict = slow_gate(measured, self._anchor_metrics[1], self.config.tolerance)
        try:  # before it is noted, so that what a fault or a kill leaves undone is done by the next look
            if not verdict.passed:
                back = self._falls_back_to(pointer)
                self.versions.roll_back(back, moves=pointer.moves)
                self.say({"rolled_back": pointer.version, "version": back, "reason": verdict.reason})
            elif slow_gate(measured, self._anchor_metrics[1], 0.0).passed:
                self.versions.pass_anchor(pointer.version, moves=pointer.moves)
        except Moved:
            return True  # somebody has decided meanwhile, and what serves now is looked at anew
        self.versions.note_slow(pointer.version, {"anchor": pointer.anchor, **dataclasses.asdict(verdict)})
        return True

    def _falls_back_to(self, pointer: Pointer) -> int:
        """What serves instead of what the slow gate refused: the anchor version, or, where that one is only tried, what
        serves beside it."""
        trial = self.versions.trial() or {}
        tried = trial.get("candidate") is not None and trial["serving"] in self.versions.ancestors(pointer.version)
        return int(trial["serving"]) if tried else pointer.anchor

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
        pause = 0.0
        while not stopping:
            began = time.monotonic()
            try:
                busy = self.once() or self.judge()
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
            if self.config.once or not self._wait(max(pause, self.config.poll_seconds)):
                return

    def _wait(self, seconds: float) -> bool:
        """Until something may have come; False when the parent is gone."""
        if not self.config.watch_stdin:
            time.sleep(seconds)
            return True
        ready, _, _ = select.select([sys.stdin], [], [], seconds)
        return not ready or bool(os.read(sys.stdin.fileno(), 1 << 16))


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
