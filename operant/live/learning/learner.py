"""Learns step after step into a folder of versions: announce, step, gate, publish.

The version folders hold everything learned, and nothing else does: another learner can replace one that dies.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from operant.config import LearnerConfig, LiveConfig, WorkerConfig, check_settings
from operant.data.batch import to_device
from operant.data.prompts import settle_style
from operant.live.learning.anchors import Anchors, anchor_prompts
from operant.live.learning.events import EventSource
from operant.live.learning.execution import LoadedVersion, lesson_of, load_version, make_step, pulled_by
from operant.live.learning.gate import Verdict, fast_gate
from operant.live.learning.lesson import LearnerState, Lesson
from operant.live.learning.origin import Origin
from operant.live.learning.pace import keep_pace, settled
from operant.live.learning.step import StepResult, fingerprint, new_learner
from operant.live.storage.versions import Moved, Outcome, StepRecord, Versions
from operant.models.adapter import rank_of
from operant.models.policy import Policy, is_large
from operant.models.stem import blocks_of
from operant.types import OperantError, Trajectory

__all__ = ["LiveLearner", "expect_rank"]

RANK = 24  # of an adapter that nobody has chosen


class LiveLearner:
    """Learns from a store into a folder of versions. `say` gets one dictionary for each thing that happened."""

    def __init__(self, config: WorkerConfig, source: EventSource, say: Callable[[dict[str, Any]], None]) -> None:
        check_settings(config)
        self.config, self.source, self.say = config, source, say
        self.versions = Versions(config.root, config.keep)
        self.at: LoadedVersion | None = None
        self._anchors: Anchors | None = None
        self._pulled: Anchors | None = None
        self._kept_logits: dict[str, tuple[int, Tensor]] = {}
        self._origin_kept: tuple[int, Origin] | None = None
        self._like: Policy | None = None  # whose base the others stand on

    def start(self) -> None:
        """Begin a new root or complete what a crash left in this one.

        Raises OperantError when there is neither a version nor a model to begin with.
        """
        self.versions.clean()
        if self.versions.exists():
            expect_rank(self.versions, self.config)
            self.config = settled(self.config, self.versions.root)
        else:
            if not self.config.model:
                raise OperantError(f"{self.config.root} holds no version yet; give --model to begin with")
            policy = Policy.load(self.config.model, device=self.config.device, dtype=self.config.dtype)
            _choose_what_learns(policy, self.config)
            policy.model.eval()
            policy.keep_stem()
            settle_style(policy, self.config)  # every version is asked as this one
            keep_pace(self.versions.root, self.config, policy)
            self.config = settled(self.config, self.versions.root)
            (asked, others), longest = anchor_prompts(self.config, policy), self.config.anchor_tokens
            away = self.config.lora_orthogonal
            assert longest != "auto" and away != "auto"
            anchors = Anchors.of(policy, asked, max_tokens=longest, seed=self.config.seed)
            anchors.save(self.versions.root)
            if self.config.anchor_coef and others:
                pulled = Anchors.of(policy, others, max_tokens=longest, seed=self.config.seed)
                pulled.save_pulled(self.versions.root)
            if away:
                read = [prompt.tokens for prompt in others if len(prompt.tokens) > 1]
                texts = policy.batch_of_sequences([text[:-1] for text in read], [text[-1:] for text in read])
                policy.turn_adapter_away([anchors.batch, texts][: 2 if read else 1], away)
            first = LoadedVersion(0, 0, policy, new_learner(policy, self.config), LearnerState())
            begun = self.versions.begin(first.save, fingerprint(policy))
            policy.moved_to(Path(begun.path) / "model")
        self.versions.finish()
        self.versions.tidy()  # a crash may have come before it
        self.current()

    def current(self) -> LoadedVersion:
        """The version that serves now, loaded anew if it is another than the one in memory.

        Raises OperantError when it cannot be read.
        """
        pointer = self.versions.pointer()
        if self.at is None or self.at.moves != pointer.moves:
            self.at = None
            self.at = LoadedVersion.load(self.versions, pointer.version, pointer.moves, self.config, self._like)
            self._like = self.at.policy
        return self.at

    # --- a step -------------------------------------------------------------------------------------------------------

    def repeat(self, old: StepRecord, begin_offset: int, events: list[str]) -> None:
        """Make an earlier step again, from the version that serves, on these events. What it draws by and its
        coefficients stay what they were. Raises OperantError as `execute` does."""
        record = self._again(old, begin_offset, events)
        while not self.execute(record):
            pass

    def leave(self, old: StepRecord, begin_offset: int, events: list[str], reason: str) -> None:
        """Write down that these events of an earlier step are not learned again, and why."""
        record = self._again(old, begin_offset, events)
        record.outcomes = {name: Outcome("unused", reason) for name in events}
        self.publish_nothing(record, "nothing", reason, reload=False)

    def _again(self, old: StepRecord, begin_offset: int, events: list[str]) -> StepRecord:
        at = self.current()
        return dataclasses.replace(
            old, version=self.versions.next_version(), parent=at.version, moves=at.moves, events=events,
            begin_offset=begin_offset, again=old.version, state="pending", reason="", outcomes={}, replayed=[],
            forgotten=[], times={"queued": time.time()},
        )  # fmt: skip

    def execute(self, record: StepRecord) -> bool:
        """Announce, step, gate, publish. False when another version serves by now and the step has to begin again.

        Raises OperantError when the store lacks the events of the record, or a version cannot be read or written.
        """
        at, anchors = self.current(), self.anchors()
        lesson, config = self._announce(record, at, anchors)
        result = make_step(record, at, lesson, anchors, config, self._origin(record.pulled_to), self.pulled())
        record.outcomes = result.outcomes
        record.times["stepped"] = time.time()
        if result.anchor_logits is None:
            return self.publish_nothing(record, "nothing", _reason(result), reload=result.stats is not None)
        if at.anchor_logits is None:
            at.anchor_logits = result.anchor_logits[0]
        verdict = fast_gate(
            result.anchor_logits[1], self._logits_of("since"), self._logits_of("anchor"),
            anchors.tokens(config.tokens_per_microbatch), kl_parent=result.kl, kl_budget=config.kl_budget,
            drift_budget=config.drift_budget, likelihood_drop=config.likelihood_drop,
        )  # fmt: skip
        record.times["gated"] = time.time()
        if not verdict.passed:
            record.outcomes = _refused(result.outcomes, verdict)
            return self.publish_nothing(record, "refused", verdict.reason, reload=True)
        at.state = lesson.state
        return self._publish(record, at, result, verdict, config)

    def _announce(self, record: StepRecord, at: LoadedVersion, anchors: Anchors) -> tuple[Lesson, LiveConfig]:
        """Write down what the step begins with and will use, before it is made."""
        pointer = self.versions.pointer()
        record.parent, record.moves, record.fingerprint = at.version, at.moves, fingerprint(at.policy)
        record.anchor, record.since = pointer.anchor, pointer.since
        lesson, config = lesson_of(record, at, self.source, self.versions, self.config)
        record.replayed, record.forgotten, record.anchors = lesson.rehearsed, lesson.forgotten, list(anchors.ids)
        record.baselines = dict(at.state.baselines)
        record.times["begun"] = time.time()
        self.versions.announce(record)
        return lesson, config

    def _publish(
        self, record: StepRecord, at: LoadedVersion, result: StepResult, verdict: Verdict, config: LiveConfig
    ) -> bool:
        """Let the new version serve. False when another one serves by now."""
        assert result.stats is not None and result.anchor_logits is not None
        gate = {"passed": True, "scale": result.scale, **verdict.numbers, **result.stats.extra}
        try:
            published = self.versions.publish(record, at.save, gate)
        except Moved:
            self.at = None
            record.outcomes = {}
            return False
        at.policy.moved_to(Path(published.path) / "model")
        at.version, at.moves, at.anchor_logits = record.version, record.moves + 1, result.anchor_logits[1]
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

    def publish_nothing(
        self, record: StepRecord, state: Literal["nothing", "refused"], reason: str, *, reload: bool
    ) -> Literal[True]:
        """End a step that changes nothing. reload: the weights and the optimizer in memory have made it."""
        if reload:
            self.at = None
        record.state, record.reason = state, reason
        self.versions.settle(record)
        self.say({"step": record.version, "state": state, "events": record.events, "reason": reason})
        return True

    def look_ahead(self) -> None:
        """Load and compute what the next step would begin with, so that it has that at hand."""
        at = self.current()
        if at.anchor_logits is None:
            at.anchor_logits = self.anchors().logits(at.policy, self.config.tokens_per_microbatch)
        self._logits_of("since"), self._logits_of("anchor")
        if self.config.kl_coef or self.config.anchor_coef:
            origin = self._origin(self.versions.pointer().anchor)
            pulled = pulled_by(self.pulled(), at.policy, self.config, self.versions.next_version())
            if origin is not None and pulled is not None:
                origin.acting(to_device(pulled, at.policy.device))

    def read_ahead(self, answer: str) -> None:
        """Read an answer that was given just now, so that a rating of it finds what does not hang on the weights that
        learn: what comes out of the stem, and what the anchor version says."""
        found, policy = self.source.completion(answer), self.current().policy
        if found is None or found.completion is None or not len(found.completion.tokens) or not is_large(policy.model):
            return
        length = len(found.completion.tokens) + (0 if policy.has_encoder else len(found.prompt.tokens))
        origin = self._origin(self.versions.pointer().anchor) if self.config.kl_coef else None
        if origin is not None and length <= policy.max_length:
            none = np.zeros(len(found.completion.tokens))
            row = policy.batch_of([Trajectory(found.prompt, found.completion, none, none == 0)])
            origin.acting(to_device(row, policy.device))

    # --- what versions are measured on --------------------------------------------------------------------------------

    def anchors(self) -> Anchors:
        """What every version of this root is measured on."""
        if self._anchors is None:
            self._anchors = Anchors.load(self.versions.root, self.current().policy)
        return self._anchors

    def pulled(self) -> Anchors | None:
        """By which answers the steps of this root are pulled, some in each."""
        if self._pulled is None and self.config.anchor_coef:
            self._pulled = Anchors.load_pulled(self.versions.root, self.current().policy)
        return self._pulled

    def _logits_of(self, role: Literal["anchor", "since"]) -> Tensor:
        """The logits of the version that loss, or drift, is measured from, on the anchor answers."""
        version: int = getattr(self.versions.pointer(), role)
        if role not in self._kept_logits or self._kept_logits[role][0] != version:
            known = next((logits for number, logits in self._kept_logits.values() if number == version), None)
            if known is None and self.at is not None and self.at.version == version:
                known = self.at.anchor_logits
            if known is None:
                policy = load_version(self.versions, version, self.config, self._like)
                known = self.anchors().logits(policy, self.config.tokens_per_microbatch)
            self._kept_logits[role] = version, known
        return self._kept_logits[role][1]

    def _origin(self, version: int | None) -> Origin | None:
        """The version that steps are pulled to."""
        if version is None:
            return None
        if self._origin_kept is None or self._origin_kept[0] != version:
            self._origin_kept = version, Origin(load_version(self.versions, version, self.config, self._like))
        return self._origin_kept[1]


def _choose_what_learns(policy: Policy, config: LearnerConfig) -> None:
    """Put the adapter on a first version that `lora_rank` asks for."""
    rank = config.lora_rank
    if rank == "auto":
        rank = RANK if is_large(policy.model) and not policy.is_lora else 0
    elif rank == 0:
        policy.merge_adapter()
    if rank:
        policy.add_lora(rank, layers=_layers(policy, config.lora_layers), seed=config.seed)
    if config.dtype == "bf16-true" and not policy.is_lora:
        raise OperantError("--dtype bf16-true has no room for the small steps of a rating; give --lora_rank 8 too")


def _layers(policy: Policy, asked: int | Literal["auto"]) -> int:
    """How many blocks get an adapter, 0 for all: half of them where nobody has chosen."""
    if asked != "auto":
        return asked
    blocks = blocks_of(policy.model)
    return 0 if blocks is None else (len(blocks) + 1) // 2


def expect_rank(versions: Versions, config: LearnerConfig) -> None:
    """Raises OperantError where a root began with an adapter, or none, other than the settings ask for."""
    there = rank_of(versions.model(versions.pointer().version))
    if config.lora_rank not in ("auto", there):
        what = f"an adapter of rank {there}" if there else "all weights"
        raise OperantError(
            f"{config.root} learns {what}, as it began; leave --lora_rank out and it goes on so, or give another --root"
        )
    layers = settled(dataclasses.replace(config, lora_layers="auto"), versions.root).lora_layers
    if there and config.lora_layers not in ("auto", layers):
        where = f"the last {layers}" if layers else "all"
        raise OperantError(
            f"{config.root} learns an adapter on {where} blocks, as it began; leave --lora_layers out and it goes on "
            "so, or give another --root"
        )


def _refused(outcomes: Mapping[str, Outcome], verdict: Verdict) -> dict[str, Outcome]:
    """What became of the events of a version that the gate refused."""
    reason = f"the gate refused the version: {verdict.reason}"
    return {
        name: dataclasses.replace(o, state="unused", reason=reason, logprob_after=o.logprob_before)
        if o.state == "used" else o
        for name, o in outcomes.items()
    }  # fmt: skip


def _reason(result: StepResult) -> str:
    """Why a step published nothing, in the words of its events."""
    return "; ".join(dict.fromkeys(o.reason for o in result.outcomes.values() if o.reason))
