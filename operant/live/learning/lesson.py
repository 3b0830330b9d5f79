"""What the events of a step teach together: what stands, what each source's word counts, what is rehearsed.

    1. events that a later one replaces or takes back teach nothing; the others are read one by one (`events`)
    2. where several sources are needed, each has a weight by its reputation and by what it has had (`influence`)
    3. ratings stand against the baseline of their route, which is updated after use
    4. some earlier events are learned again beside the new ones, so that the step does not undo them: rehearsal
       (Robins 1995, Catastrophic Forgetting, Rehearsal and Pseudorehearsal)

`operant.live.learning.step` makes weights of it. Nothing here reads a clock, a file or a network.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch

from operant.algorithms import credit
from operant.config import LiveConfig
from operant.data.feedback_log import FeedbackLog, draw_named, subject, takes_back
from operant.live.learning import influence
from operant.live.learning.events import EventReader, LessonRow, Paired, Rated
from operant.live.storage.versions import Outcome
from operant.run.run import mixed_seed
from operant.types import Feedback, Ints, OperantError, Prompt

__all__ = ["LearnerState", "Lesson", "prepare", "weight_of"]

MEMORY = 256  # learned events that may be rehearsed
LEAST = 0.01  # weight that a rating is taken to have where influence is counted
# newest ones that reputation is read from, and those of one source: few enough that one does not push out all others,
# many enough that who is contradicted does not bury that under what it says of its own answers
OPINIONS, OWN_OPINIONS = 1024, 256
_GREEDY = "greedy completion has no propensity"
_DISTRUSTED = "what this source says of answers contradicts what others say of them; it counts again when they agree"
_OVER = (
    "over the cap: this source has had its share of what was learned lately, and others have to speak first; "
    "--influence_cap sets the share"
)


@dataclass(slots=True)
class LearnerState:
    """What outlives a step beside weights and optimizer: each route's baseline, and learned events to rehearse.

    An entry of `memory` is {"offset", "event"}. Where several sources are needed there are also `opinions` of what is
    good, {"thing", "source", "verdict", "event", "completion"}, and the `influence` that each source has had.
    """

    baselines: dict[str, float] = field(default_factory=dict)
    memory: list[dict[str, Any]] = field(default_factory=list)
    opinions: list[dict[str, Any]] = field(default_factory=list)
    influence: dict[str, float] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path) -> LearnerState:
        """Of a version's folder."""
        return cls(**json.loads((folder / "state.json").read_text(encoding="utf-8")))

    def reputations(self) -> dict[str, float]:
        """Of each source that has said what is good (`influence.reputations`)."""
        return influence.reputations((o["thing"], o["source"], o["verdict"]) for o in self.opinions)

    def event_ids(self) -> set[str]:
        """Of the events that the state rests on."""
        return {entry["event"]["id"] for entry in self.memory} | {opinion["event"] for opinion in self.opinions}

    def without(self, event_ids: set[str]) -> LearnerState:
        """The same, resting on none of these events."""
        return dataclasses.replace(
            self, memory=[entry for entry in self.memory if entry["event"]["id"] not in event_ids],
            opinions=[opinion for opinion in self.opinions if opinion["event"] not in event_ids],
        )  # fmt: skip


@dataclass(slots=True)
class Lesson:
    """What a step will learn, and what became of the events that it will not.

    state: after the step. rehearsed, forgotten: ids of earlier events that are learned again, or never again.
    """

    rated: list[Rated]
    paired: list[Paired]
    outcomes: dict[str, Outcome]
    state: LearnerState
    rehearsed: list[str]
    forgotten: list[str]

    @property
    def fresh(self) -> list[LessonRow]:
        """What is to be learned from the new events."""
        rows: list[LessonRow] = [*self.rated, *self.paired]
        return [row for row in rows if row.fresh]


# --- events → lesson --------------------------------------------------------------------------------------------------


def prepare(
    events: Sequence[tuple[int, Feedback]],
    reader: EventReader,
    state: LearnerState,
    config: LiveConfig,
    *,
    seed: int,
    learned: Mapping[str, int] | None = None,
) -> Lesson:
    """Read the events of a step, in the order of their offsets.

    Args:
        seed: draws the rehearsed events, together with the ids of what the step teaches.
        learned: event id → the version that has learned from it.

    Returns the lesson; its `state` is the one after the step, and has the new baselines.
    Raises OperantError when the scale of scores or beta would turn opinions round.
    """
    _check_scales(config)
    said = [event for _, event in events]
    rows, outcomes = _read_events(said, reader, state, learned or {})
    sources = _Sources.heard(said, rows, state, config) if config.min_sources > 1 else None
    if sources is not None:
        rows = sources.admit(rows, outcomes)
    baselines = _updated_baselines(rows, state.baselines, config)
    rows = _without_faults(rows, outcomes)
    memory = _still_standing(state.memory, said)
    rehearsed = _rehearse(memory, rows, reader, state.baselines, config, seed)
    all_opinions = state.opinions if sources is None else sources.opinions
    # what merely has no room any more is not among them: whether it has hangs on how much others said
    forgotten = state.event_ids() - LearnerState(memory=memory, opinions=all_opinions).event_ids()
    offsets = {event.id: offset for offset, event in events}
    memory = memory + [{"offset": offsets[r.event.id], "event": dataclasses.asdict(r.event)} for r in rows]
    had = state.influence
    if sources is not None:
        rehearsed, had = sources.share_out(rows, rehearsed)
    everything = [*rows, *rehearsed]
    return Lesson(
        rated=[row for row in everything if isinstance(row, Rated)],
        paired=[row for row in everything if isinstance(row, Paired)],
        outcomes=outcomes,
        state=LearnerState(
            baselines, sorted(memory, key=lambda m: m["offset"])[-MEMORY:], all_opinions[-OPINIONS:], had
        ),
        rehearsed=[row.event.id for row in rehearsed],
        forgotten=sorted(forgotten),
    )


def _check_scales(config: LiveConfig) -> None:
    if not config.score_low < config.score_high:
        raise OperantError(
            f"score_low is {config.score_low} and score_high {config.score_high}: correct --score_low or --score_high"
        )
    if not 0 < config.beta < math.inf:
        raise OperantError(f"beta is {config.beta}; it must be more than 0: correct --beta")


def _read_events(
    events: Sequence[Feedback], reader: EventReader, state: LearnerState, learned: Mapping[str, int]
) -> tuple[list[LessonRow], dict[str, Outcome]]:
    """What each event teaches, ratings before pairs; and what became of those that teach nothing."""
    # what is later is what was appended later, whatever the clocks of its writers said
    ordered = FeedbackLog()
    ordered.add(*(dataclasses.replace(event, time=float(place)) for place, event in enumerate(events)))
    standing = {event.id for event in ordered.standing()}
    taken_back = _taken_back(events)
    outcomes: dict[str, Outcome] = {}
    rows: list[LessonRow] = []
    for event in events:
        if event.kind == "retract":
            outcomes[event.id] = Outcome("unused", _retraction_reason(event, taken_back, state, learned))
        elif event.id not in standing:
            gone = event.id in taken_back
            outcomes[event.id] = Outcome("unused", "retracted") if gone else Outcome("superseded", "a later one stands")
        else:
            row = reader.read(event, state.baselines)
            if isinstance(row, str):
                outcomes[event.id] = Outcome("unused", row)
            else:
                rows.append(row)
    return sorted(rows, key=lambda row: isinstance(row, Paired)), outcomes


def _updated_baselines(
    rows: Sequence[LessonRow], baselines: Mapping[str, float], config: LiveConfig
) -> dict[str, float]:
    """The baselines after these rows were read against them. Spans have none."""
    whole = [row for row in rows if isinstance(row, Rated) and row.event.kind != "span"]
    return credit.updated_routes(
        baselines, [row.prompt.task for row in whole], torch.tensor([row.reward for row in whole], dtype=torch.float64),
        torch.ones(len(whole), dtype=torch.bool), midpoint=0.0, rate=config.baseline_rate,
        weights=[row.weight for row in whole],
    )  # fmt: skip


def weight_of(event: Feedback, value: float, config: LiveConfig) -> float:
    """Of a rating beside the others, where it says `value`: what blames weighs `bad_weight`. A span is weighed whole:
    who marks the bad words knows what was bad."""
    return config.bad_weight if value < 0 and event.kind != "span" else 1.0


def _without_faults(rows: Sequence[LessonRow], outcomes: dict[str, Outcome]) -> list[LessonRow]:
    """Without the ratings that were read and teach nothing all the same, whose outcomes are filled in."""
    kept = []
    for row in rows:
        reason = _fault(row)
        if isinstance(row, Rated) and reason:
            outcomes[row.event.id] = Outcome("unused", reason, advantage=row.advantage)
        else:
            kept.append(row)
    return kept


def _fault(row: LessonRow) -> str:
    """Why a row that was read teaches nothing all the same."""
    if isinstance(row, Paired):
        return ""
    if row.advantage == 0:
        return "advantage 0: the rating equals the baseline"
    sampling = row.completion.sampling
    if row.advantage < 0 and sampling is not None and sampling.temperature == 0:
        return _GREEDY  # to push a text down one must know how likely it was
    return ""


# --- retractions ------------------------------------------------------------------------------------------------------


def _taken_back(events: Sequence[Feedback]) -> dict[str, str]:
    """Event id → the later retraction, among these events, that takes it back."""
    found: dict[str, str] = {}
    for at, event in enumerate(events):
        if event.kind == "retract":
            found.update(
                (e.id, event.id)
                for e in events[:at]
                if e.kind != "retract" and takes_back(event, e.source, e.completion_id, e.id)
            )
    return found


def _retraction_reason(
    retraction: Feedback, taken_back: Mapping[str, str], state: LearnerState, learned: Mapping[str, int]
) -> str:
    """What a retraction came to."""
    now = [name for name, by in taken_back.items() if by == retraction.id]
    names = [str(retraction.value)] if retraction.value not in (None, "") else [
        e.id for e in map(_event_of, state.memory)
        if takes_back(retraction, e.source, e.completion_id, e.id)
    ]  # fmt: skip
    versions = sorted({learned[name] for name in names if name in learned})
    if versions:
        listed = ", ".join(map(str, versions))
        return f"taken back after version {listed} had learned from it; roll back to before that to forget it"
    return f"takes back {', '.join(now)}" if now else "there is nothing to take back"


# --- memory and rehearsal ---------------------------------------------------------------------------------------------


def _event_of(entry: Mapping[str, Any]) -> Feedback:
    values = dict(entry["event"])
    if values["span"] is not None:
        values["span"] = tuple(values["span"])
    return Feedback(**values)


def _still_standing(memory: Sequence[dict[str, Any]], events: Sequence[Feedback]) -> list[dict[str, Any]]:
    """The memory without what the new events take back or replace."""
    replaced = {subject(e) for e in events if e.kind != "retract"}
    retractions = [e for e in events if e.kind == "retract"]
    kept = []
    for entry in memory:
        event = _event_of(entry)
        if subject(event) not in replaced and not any(
            takes_back(r, event.source, event.completion_id, event.id) for r in retractions
        ):
            kept.append(entry)
    return kept


def _rehearse(
    memory: Sequence[dict[str, Any]],
    rows: Sequence[LessonRow],
    reader: EventReader,
    baselines: Mapping[str, float],
    config: LiveConfig,
    seed: int,
) -> list[LessonRow]:
    """Earlier events to learn again beside these rows. One whose completion is gone is passed over."""
    if not config.replay_events or not memory or not rows:
        return []
    names, times = [entry["event"]["id"] for entry in memory], [float(entry["event"]["time"]) for entry in memory]
    # a step is known by what it teaches, so that the draw is the same whether or not others have spoken
    seed = mixed_seed(seed, "replay", *(row.event.id for row in rows))
    drawn = []
    for i in draw_named(names, times, config.replay_events, seed=seed, half_life=3600 * config.half_life):
        row = reader.read(_event_of(memory[i]), baselines)
        if not isinstance(row, str) and not _fault(row):
            row.fresh = False
            drawn.append(row)
    return drawn


# --- several sources --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Sources:
    """How much each of several sources may move the step.

    opinions: all of them, with those of this step. reputations: of each source, 1 for one that is not in it.
    had: the influence that each has had before.
    """

    opinions: list[dict[str, Any]]
    reputations: Mapping[str, float]
    had: Mapping[str, float]
    config: LiveConfig

    @classmethod
    def heard(
        cls, events: Sequence[Feedback], rows: Sequence[LessonRow], state: LearnerState, config: LiveConfig
    ) -> _Sources:
        """With what these events say and take back."""
        opinions = _updated_opinions(state.opinions, events, rows)
        trust = LearnerState(opinions=opinions[-OPINIONS:]).reputations()
        return cls(opinions, trust, state.influence, config)

    def admit(self, rows: Sequence[LessonRow], outcomes: dict[str, Outcome]) -> list[LessonRow]:
        """The rows of sources that have a weight in this step, the ratings weighed for the baselines; the outcomes of
        the others are filled in."""
        given = self._weigh(rows, attrgetter("reward"))
        for row in rows:
            if given[row.event.source] <= 0:
                reason = _DISTRUSTED if self.reputations.get(row.event.source, 1.0) <= 0 else _OVER
                outcomes[row.event.id] = Outcome("unused", reason)
        kept = [row for row in rows if given[row.event.source] > 0]
        self._weigh([row for row in kept if isinstance(row, Rated)], attrgetter("reward"))
        return kept

    def share_out(
        self, rows: Sequence[LessonRow], rehearsed: Sequence[LessonRow]
    ) -> tuple[list[LessonRow], dict[str, float]]:
        """Weigh all rows of the step; the rehearsed ones that have a weight, and the influence that each source has
        had after the step."""
        given = self._weigh([*rows, *rehearsed], attrgetter("advantage"))
        kept = [row for row in rehearsed if row.weight > 0]
        return kept, influence.after(self.had, given, self.config.influence_window)

    def _weigh(self, rows: Sequence[LessonRow], value_of: Callable[[Rated], float]) -> dict[str, float]:
        """Weigh rows in place, so that each source has its share of the step however often it spoke; the shares.

        value_of: what tells whether a rating blames, its reward or its advantage.
        """
        config = self.config
        count = Counter(row.event.source for row in rows)
        mean = dict.fromkeys(sorted(count), 0.0)
        for row in rows:
            weight = max(LEAST, weight_of(row.event, value_of(row), config)) if isinstance(row, Rated) else 1.0
            mean[row.event.source] += weight / count[row.event.source]
        given = influence.shares(
            mean, self.reputations, self.had, cap=config.influence_cap, window=config.influence_window
        )
        for row in rows:
            row.part = len(count) * given[row.event.source] / mean[row.event.source]
            row.weight = row.part * len(rows) / (len(count) * count[row.event.source])
        return given


def _updated_opinions(
    known: Sequence[dict[str, Any]], events: Sequence[Feedback], rows: Sequence[LessonRow]
) -> list[dict[str, Any]]:
    """The opinions with those of these rows, and without what the events take back."""
    retractions = [e for e in events if e.kind == "retract"]
    kept = [
        opinion for opinion in known if not any(
            takes_back(r, opinion["source"], opinion["completion"], opinion["event"]) for r in retractions
        )
    ]  # fmt: skip
    by_subject = {(opinion["thing"], opinion["source"]): opinion for opinion in kept}
    for row in rows:
        thing, verdict = _opinion(row)
        if verdict:
            event = row.event
            by_subject.pop((thing, event.source), None)  # what is said again is new
            by_subject[thing, event.source] = {
                "thing": thing, "source": event.source, "verdict": verdict, "event": event.id,
                "completion": event.completion_id,
            }  # fmt: skip
    count: Counter[str] = Counter()
    newest = []
    for opinion in reversed(by_subject.values()):
        count[opinion["source"]] += 1
        if count[opinion["source"]] <= OWN_OPINIONS:
            newest.append(opinion)
    return newest[::-1]


def _opinion(row: LessonRow) -> tuple[str, int]:
    """What a row calls good (1) or bad (−1), or neither (0): an answer, by its words; of two answers, the one that
    comes first in an order of its own."""

    def name(prompt: Prompt, tokens: Ints) -> str:
        return hashlib.sha256(prompt.tokens.tobytes() + b"|" + tokens.astype("<i8").tobytes()).hexdigest()[:16]

    if isinstance(row, Paired):
        chosen, rejected = name(row.pair.prompt, row.pair.chosen), name(row.pair.prompt, row.pair.rejected)
        first, second = sorted((chosen, rejected))
        return f"{first} {second}", 0 if row.likelihood else 1 if chosen == first else -1
    if row.event.kind == "span":
        return "", 0
    return name(row.prompt, row.completion.tokens), (row.reward > 0) - (row.reward < 0)
