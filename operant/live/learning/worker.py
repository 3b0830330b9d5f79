"""The learner as a process of its own, so that the server answers while it learns and serves on when it dies.

    python -m operant.live.learning.worker --root runs/live --store feedback.db --model runs/train/model

It tells what it does in lines of JSON on standard output: {"ready": 2} when it begins, {"version": 3, …} when a version
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
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from operant.algorithms.learner import Learner, Sgd
from operant.config import LearnerConfig, LiveConfig, WorkerConfig, check_settings
from operant.data.feedback_log import FeedbackLog, line_of
from operant.data.prompts import load_fitting_prompts
from operant.data.rows import Fields, load_rows
from operant.live.learning.events import EventReader, EventSource, open_store
from operant.live.learning.gate import Anchors, divergence, fast_gate, likelihood, slow_gate, slow_metrics
from operant.live.learning.lesson import LearnerState, Lesson, prepare
from operant.live.learning.step import StepResult, fingerprint, new_learner, take_step
from operant.live.storage.versions import Moved, Outcome, Pointer, StepRecord, Versions
from operant.models.policy import Policy
from operant.run.files import replace_file
from operant.run.run import mixed_seed
from operant.types import Completion, Feedback, OperantError, Prompt

if TYPE_CHECKING:
    from operant.live.learning.forget import Remaking

__all__ = ["Worker", "compare", "main", "make_again"]

log = logging.getLogger(__name__)

EVERYTHING = 10_000  # events that are looked at while several sources are waited for
STORE_VARIABLE = "OPERANT_STORE"  # the environment variable that stands for --store where that is not given
LONGEST_PAUSE = 30.0  # seconds between tries after faults in a row
LONGEST_REST = 0.5  # seconds after a step

_NUMBERS = [f.name for f in dataclasses.fields(LiveConfig)]


# --- a version, and a step from it ------------------------------------------------------------------------------------


@dataclass(slots=True)
class Learning:
    """A version in memory with what learning goes on with. anchor_logits: its own, once they are known."""

    version: int
    moves: int
    policy: Policy
    learner: Learner
    state: LearnerState
    anchor_logits: Tensor | None = None

    @classmethod
    def load(cls, versions: Versions, version: int, moves: int, config: WorkerConfig) -> Learning:
        path = Path(versions.get(version).path)
        policy = load_version(versions, version, config)
        learner = new_learner(policy, config)
        saved = torch.load(path / "learner.pt", map_location=policy.device, weights_only=True)
        learner.load_state_dict(saved["learner"])
        return cls(version, moves, policy, learner, LearnerState.load(path))

    def save(self, folder: Path) -> None:
        self.policy.save(folder / "model")
        torch.save({"learner": self.learner.state_dict()}, folder / "learner.pt")
        (folder / "state.json").write_text(json.dumps(dataclasses.asdict(self.state)), encoding="utf-8")


def run_record(
    record: StepRecord, at: Learning, source: EventSource, versions: Versions, config: LiveConfig
) -> tuple[Lesson, LiveConfig]:
    """The lesson of a record on the version that it begins with, a function of these alone.

    Raises OperantError when the store no longer holds the events that the record names.
    """
    coefficients: dict[str, Any] = dict(record.coefficients)
    config = dataclasses.replace(config, **coefficients)
    events = events_of(record, source)
    # by their place in the log: what came later has not been said yet, also when the step is made again after it
    earlier = [r for r in versions.records() if r.begin_offset < record.begin_offset]
    forgotten = {name for r in earlier for name in r.forgotten}
    line = set(versions.ancestors(at.version))
    learned = {
        name: r.version for r in earlier if r.version in line and r.state == "published"
        for name, outcome in r.outcomes.items() if outcome.state == "used"
    }  # fmt: skip
    reader = EventReader(
        source.completion, at.policy.codec, config.score_low, config.score_high,
        encoder=at.policy.has_encoder, max_length=at.policy.max_length,
    )  # fmt: skip
    state = at.state.without(forgotten)
    return prepare(events, reader, state, config, seed=record.seed, learned=learned), config


def events_of(record: StepRecord, source: EventSource) -> list[tuple[int, Feedback]]:
    """The events of a step, as the store has them. Raises OperantError when it lacks one of them."""
    wanted, after = set(record.events), record.begin_offset
    found: list[tuple[int, Feedback]] = []
    while len(found) < len(wanted) and (page := source.events_after(after, len(wanted))):
        found += [(offset, event) for offset, event in page if event.id in wanted]
        after = page[-1][0]
        if after >= record.consumed_offset:
            break
    if [event.id for _, event in found] != record.events:
        raise OperantError(
            f"the store does not hold the events of step {record.version} in their order; give the --store that it "
            "began with"
        )
    return found


def make_step(
    record: StepRecord, at: Learning, lesson: Lesson, anchors: Anchors, config: LiveConfig, origin: Policy | None
) -> StepResult:
    """`take_step` with the record's coefficients and seed, whatever the learner in memory was made with.

    origin: the version that `record.pulled_to` names.
    """
    at.learner.lr = at.learner.critic_lr = config.lr
    if isinstance(at.learner.rule, Sgd):
        at.learner.rule.max_grad_norm = config.max_grad_norm
    torch.manual_seed(record.seed)
    return take_step(
        at.policy, at.learner, lesson, anchors, config, origin=origin, anchor_logits=at.anchor_logits
    )  # fmt: skip


def load_version(versions: Versions, version: int, config: LearnerConfig) -> Policy:
    """The weights of a version on disk, to compute with. Raises OperantError when they are not there, or broken."""
    path = Path(versions.get(version).path)
    policy = Policy.load(path / "model", device=config.device, dtype=config.dtype)
    policy.model.eval()
    return policy


def make_again(versions: Versions, version: int, source: EventSource, config: WorkerConfig) -> Policy:
    """The weights of a version, made again from its record and its parent: with the same fingerprint the same bits.

    Raises OperantError when the version was not published, its parent is not on disk, or the store has changed.
    """
    record = versions.record(version)
    if record.state != "published" or record.parent < 0:
        raise OperantError(f"version {version} was not made by a step; choose one that was")
    at = Learning.load(versions, record.parent, record.moves, config)
    lesson, used = run_record(record, at, source, versions, config)
    origin = None if record.pulled_to is None else load_version(versions, record.pulled_to, config)
    make_step(record, at, lesson, _load_anchors(versions.root, at.policy), used, origin)
    if lesson.rehearsed != record.replayed:  # after the step, which leaves out what is too far, as the record does
        raise OperantError(f"the store lacks what step {version} learned again; give the --store that it began with")
    return at.policy


@torch.no_grad()
def compare(versions: Versions, one: int, other: int) -> dict[str, Any]:
    """Two versions on the anchor answers: KL(other‖one) and mean log-probability per token, and their common ancestor.

    Raises OperantError when one of them is not on disk.
    """
    policies = [Policy.load(Path(versions.get(v).path) / "model", device="cpu") for v in (one, other)]
    for policy in policies:
        policy.model.eval()
    anchors, room = _load_anchors(versions.root, policies[0]), LiveConfig().tokens_per_microbatch
    first, second = (anchors.logits(policy, room) for policy in policies)
    tokens, line = anchors.tokens(room), versions.ancestors(one)
    return {
        "versions": [one, other],
        "common_ancestor": next(v for v in versions.ancestors(other) if v in line),
        "kl": divergence(second, first),
        "likelihood": [likelihood(first, tokens), likelihood(second, tokens)],
    }


def _anchor_file(root: Path) -> Path:
    return root / "anchors.jsonl"


def _load_anchors(root: Path, policy: Policy) -> Anchors:
    with _anchor_file(root).open(encoding="utf-8") as file:
        kept = FeedbackLog.from_lines(file)
    answers = list(kept.completions.values())
    return Anchors(policy, [kept.prompts[a.prompt_id] for a in answers], [a.tokens for a in answers])


def heldout_prompts(config: LearnerConfig, policy: Policy) -> list[Prompt]:
    """What the slow gate asks. Raises OperantError when the file is missing, empty or has no such column."""
    prompts = load_fitting_prompts(
        load_rows(config.heldout, split="dev", limit=config.heldout_rows), policy,
        fields=Fields(prompt=config.prompt_field, references=config.reference_field),
        max_prompt_tokens=policy.max_length // 2, too_long="skip",
    )  # fmt: skip
    if not prompts:
        raise OperantError(f"no prompt of {config.heldout} is short enough to be asked; give another --heldout")
    return prompts


# --- the process ------------------------------------------------------------------------------------------------------


class Worker:
    """Learns from a store into a folder of versions. `say` gets one dictionary for each thing that happened."""

    def __init__(
        self, config: WorkerConfig, source: EventSource, say: Callable[[dict[str, Any]], None] | None = None
    ) -> None:
        check_settings(config)
        self.config, self.source = config, source
        self.say = say or _print
        self.versions = Versions(config.root, config.keep)
        self.at: Learning | None = None
        self._anchors: Anchors | None = None
        self._kept_logits: dict[str, tuple[int, Tensor]] = {}
        self._anchor_metrics: tuple[int, dict[str, float]] | None = None
        self._heldout: list[Prompt] | None = None
        self._origin_kept: tuple[int, Policy] | None = None
        self._remaking: Remaking | None = None

    def start(self) -> None:
        """Begin a new root or complete what a crash left in this one.

        Raises OperantError when there is neither a version nor a model to begin with.
        """
        self.versions.clean()
        if not self.versions.exists():
            if not self.config.model:
                raise OperantError(f"{self.config.root} holds no version yet; give --model to begin with")
            policy = Policy.load(self.config.model, device=self.config.device, dtype=self.config.dtype)
            policy.model.eval()
            self._write_anchors(policy)
            first = Learning(0, 0, policy, new_learner(policy, self.config), LearnerState())
            self.versions.begin(first.save, fingerprint(policy))
        self.versions.finish()
        self.versions.tidy()  # a crash may have come before it
        self.current()

    def current(self) -> Learning:
        """The version that serves now, loaded anew if it is another than the one in memory."""
        pointer = self.versions.pointer()
        if self.at is None or self.at.moves != pointer.moves:
            self.at = None
            self.at = Learning.load(self.versions, pointer.version, pointer.moves, self.config)
        return self.at

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
            while not self._execute(record):
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
            self._publish_nothing(record, "nothing", reason, reload=True)
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
        from operant.live.learning import forget

        if self._remaking is None:
            self._remaking = forget.Remaking(self.config, self.source)
        busy = self._remaking.once()
        if not self.versions.forgetting():
            self._remaking, self.at = None, None
            self.say({"forgotten": True})
        return busy

    def repeat(self, old: StepRecord, begin_offset: int, events: list[str]) -> None:
        """Make an earlier step again, from the version that serves, on these events. What it draws by and its
        coefficients stay what they were."""
        record = self._again(old, begin_offset, events)
        while not self._execute(record):
            pass

    def leave(self, old: StepRecord, begin_offset: int, events: list[str], reason: str) -> None:
        """Write down that these events of an earlier step are not learned again, and why."""
        record = self._again(old, begin_offset, events)
        record.outcomes = {name: Outcome("unused", reason) for name in events}
        self._publish_nothing(record, "nothing", reason, reload=False)

    def _again(self, old: StepRecord, begin_offset: int, events: list[str]) -> StepRecord:
        at = self.current()
        return dataclasses.replace(
            old, version=self.versions.next_version(), parent=at.version, moves=at.moves, events=events,
            begin_offset=begin_offset, again=old.version, state="pending", reason="", outcomes={}, replayed=[],
            forgotten=[], times={"queued": time.time()},
        )  # fmt: skip

    def _execute(self, record: StepRecord) -> bool:
        """Announce, step, gate, publish. False when another version serves by now and the step has to begin again."""
        at = self.current()
        record.parent, record.moves, record.fingerprint = at.version, at.moves, fingerprint(at.policy)
        pointer = self.versions.pointer()
        record.anchor, record.since = pointer.anchor, pointer.since
        lesson, config = run_record(record, at, self.source, self.versions, self.config)
        anchors = self._measured_on()
        record.replayed, record.forgotten, record.anchors = lesson.rehearsed, lesson.forgotten, list(anchors.ids)
        record.baselines = dict(at.state.baselines)
        record.times["begun"] = time.time()
        self.versions.announce(record)
        taught = make_step(record, at, lesson, anchors, config, self._origin(record.pulled_to))
        record.outcomes = taught.outcomes
        record.times["stepped"] = time.time()
        if taught.anchor_logits is None:
            return self._publish_nothing(record, "nothing", _why(taught), reload=taught.stats is not None)
        before, after = taught.anchor_logits
        verdict = fast_gate(
            after, before, self._logits_of("since"), self._logits_of("anchor"),
            anchors.tokens(config.tokens_per_microbatch), kl_budget=config.kl_budget,
            drift_budget=config.drift_budget, likelihood_drop=config.likelihood_drop,
        )  # fmt: skip
        record.times["gated"] = time.time()
        if not verdict.passed:
            for name, outcome in list(taught.outcomes.items()):
                if outcome.state == "used":
                    record.outcomes[name] = Outcome(
                        "unused", f"the gate refused the version: {verdict.reason}", outcome.advantage,
                        outcome.logprob_before, outcome.logprob_before,
                    )  # fmt: skip
            return self._publish_nothing(record, "refused", verdict.reason, reload=True)
        at.state = lesson.state
        assert taught.stats is not None
        gate = {"passed": True, "scale": taught.scale, **verdict.numbers, **taught.stats.extra}
        try:
            self.versions.publish(record, at.save, gate)
        except Moved:
            self.at = None
            record.outcomes = {}
            return False
        at.version, at.moves, at.anchor_logits = record.version, record.moves + 1, after
        self._follow(record.version, config.drift_versions)
        self.say({"version": record.version, "parent": record.parent, "events": record.events, "gate": gate})
        self.versions.tidy()
        return True

    def _follow(self, version: int, after: int) -> None:
        """Measure drift from this version on, once so many were published since the one that it is measured from."""
        since = self.versions.pointer().since
        line = self.versions.ancestors(version)
        if since not in line[:after]:
            self.versions.follow(version)

    def _publish_nothing(self, record: StepRecord, state: Any, reason: str, *, reload: bool) -> bool:
        if reload:
            self.at = None  # the optimizer has seen a step that is not kept
        record.state, record.reason = state, reason
        self.versions.settle(record)
        self.say({"step": record.version, "state": state, "events": record.events, "reason": reason})
        return True

    # --- what versions are measured on --------------------------------------------------------------------------------

    def _measured_on(self) -> Anchors:
        if self._anchors is None:
            self._anchors = _load_anchors(self.versions.root, self.current().policy)
        return self._anchors

    def _logits_of(self, role: Literal["anchor", "since"]) -> Tensor:
        """The logits of the version that loss, or drift, is measured from, on the anchor answers."""
        version: int = getattr(self.versions.pointer(), role)
        if role not in self._kept_logits or self._kept_logits[role][0] != version:
            known = next((logits for number, logits in self._kept_logits.values() if number == version), None)
            if known is None:
                policy = load_version(self.versions, version, self.config)
                known = self._measured_on().logits(policy, self.config.tokens_per_microbatch)
            self._kept_logits[role] = version, known
        return self._kept_logits[role][1]

    def _origin(self, version: int | None) -> Policy | None:
        """The version that steps are pulled to."""
        if version is None:
            return None
        if self._origin_kept is None or self._origin_kept[0] != version:
            self._origin_kept = version, load_version(self.versions, version, self.config)
        return self._origin_kept[1]

    def _write_anchors(self, policy: Policy) -> None:
        config = self.config
        if config.anchors:
            rows = load_rows(config.anchors, split="train", limit=config.anchor_rows)
            prompts = load_fitting_prompts(
                rows, policy, fields=Fields(prompt=config.prompt_field, references=config.reference_field),
                room=config.anchor_tokens, too_long="skip",
            )  # fmt: skip
        else:  # what the model says of itself: an end of text is what stands before a text
            bare = np.array([policy.codec.eos_id], np.int64)
            prompts = [Prompt(id=f"anchor-{i}", tokens=bare) for i in range(config.anchor_rows)]
        anchors = Anchors.of(policy, prompts, max_tokens=config.anchor_tokens, seed=config.seed)
        lines = []
        for i, (prompt, answer) in enumerate(zip(anchors.prompts, anchors.answers, strict=True)):
            kept = Completion(f"anchor-answer-{i}", prompt.id, "", answer, np.zeros(len(answer), np.int64))
            lines += [line_of(dataclasses.replace(prompt, references=())), line_of(kept)]
        replace_file(_anchor_file(self.versions.root), "".join(lines))

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
            origin = load_version(self.versions, pointer.anchor, self.config)
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
        """Learn until told to stop: by SIGTERM, by the end of a watched standard input, or, once, when all is done."""
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


def _print(told: dict[str, Any]) -> None:
    try:
        print(json.dumps(told, ensure_ascii=False), flush=True)
    except BrokenPipeError:  # the server is gone; what is done is on the disk
        raise SystemExit(1) from None


def _why(taught: StepResult) -> str:
    """Why a step published nothing, in the words of its events."""
    reasons = dict.fromkeys(o.reason for o in taught.outcomes.values() if o.reason)
    return "; ".join(reasons)


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
