"""What the events of a step teach: each rating, edit and comparison read against what was said before.

    thumb, score   reward r in [−1, 1], advantage A = r − b with b the exponential mean of the route's earlier ratings,
                   begun at 0, the scale's midpoint, and updated after use
    span           its value is the advantage of the tokens it marks; all others get no gradient
    edit           a DPO pair, the edited text over the original, and the edited text's likelihood
    comparison     a DPO pair
    retract        takes events back that are not learned yet, and says which version has learned the others

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
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from operant.algorithms import credit
from operant.config import LiveConfig
from operant.data.preferences import Preference, reward_of
from operant.data.replay import Replay, draw_named, subject
from operant.data.text import Codec, chars_to_tokens
from operant.live.learning import influence
from operant.live.storage.versions import Outcome
from operant.run.run import mixed_seed
from operant.types import Bools, Completion, Feedback, Ints, OperantError, Prompt

__all__ = ["EventSource", "LearnerState", "Lesson", "Paired", "Rated", "StoredCompletion", "prepare", "weight_of"]

MEMORY = 256  # learned events that may be drawn again
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


class StoredCompletion(Protocol):
    """What learning needs of a stored interaction; `completion` is None while there are no tokens."""

    @property
    def prompt(self) -> Prompt: ...

    @property
    def completion(self) -> Completion | None: ...


class EventSource(Protocol):
    """What learning needs of the store. Offsets are those of an append-only log, ascending and never used again."""

    def completion(self, completion_id: str) -> StoredCompletion | None: ...

    def events_after(self, offset: int, limit: int) -> Sequence[tuple[int, Feedback]]: ...


@dataclass(slots=True)
class LearnerState:
    """What outlives a step beside weights and optimizer: each route's baseline, and learned events that may come again.

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


@dataclass(slots=True)
class Rated:
    """A text to say more or less often. marked: bool[T], the tokens that learn; advantage is theirs.

    weight: beside the other rows of the step. part: of what an equal part for its source would give it.
    logprobs: float32[K], log π of the tokens that the policy drew, as the step begins; looked up once.
    """

    event: Feedback
    prompt: Prompt
    completion: Completion
    advantage: float
    marked: Bools
    weight: float = 1.0
    part: float = 1.0
    fresh: bool = True
    logprobs: Tensor | None = None


@dataclass(slots=True)
class Paired:
    """A text preferred to another; `likelihood` says whether it is also simply made likelier."""

    event: Feedback
    pair: Preference
    likelihood: bool
    weight: float = 1.0
    part: float = 1.0
    fresh: bool = True


@dataclass(slots=True)
class Lesson:
    """What a step will learn, and what became of the events that it will not.

    state: after the step. replayed, forgotten: ids of earlier events that are learned again, or never again.
    """

    rated: list[Rated]
    paired: list[Paired]
    outcomes: dict[str, Outcome]
    state: LearnerState
    replayed: list[str]
    forgotten: list[str]

    @property
    def taught(self) -> list[Rated | Paired]:
        """What is to be learned from the new events."""
        rows: list[Rated | Paired] = [*self.rated, *self.paired]
        return [row for row in rows if row.fresh]


# --- events → what is taught -----------------------------------------------------------------------------------------


def prepare(
    events: Sequence[tuple[int, Feedback]],
    look: Callable[[str], StoredCompletion | None],
    codec: Codec,
    state: LearnerState,
    config: LiveConfig,
    *,
    encoder: bool,
    max_length: int,
    seed: int,
    learned: Mapping[str, int] | None = None,
) -> Lesson:
    """Read the events of a step, in the order of their offsets.

    Args:
        look: a completion by its id, or None.
        encoder, max_length: of the policy.
        seed: draws the replayed events, together with the ids of what the step teaches.
        learned: event id → the version that has learned from it.

    Returns the lesson; its `state` is the one after the step, and has the new baselines.
    """
    if not config.score_low < config.score_high:
        raise OperantError(
            f"score_low is {config.score_low} and score_high {config.score_high}: correct --score_low or --score_high"
        )
    if not 0 < config.beta < math.inf:
        raise OperantError(f"beta is {config.beta}; it must be more than 0: correct --beta")
    offsets = {event.id: offset for offset, event in events}
    # what is later is what was appended later, whatever the clocks of its writers said
    ordered = Replay()
    ordered.add(*(dataclasses.replace(e, time=float(offset)) for offset, e in events))
    standing = {e.id for e in ordered.standing()}
    taken_back = _taken_back([e for _, e in events])
    outcomes: dict[str, Outcome] = {}
    rated: list[Rated] = []
    paired: list[Paired] = []
    for _, event in events:
        if event.kind == "retract":
            outcomes[event.id] = Outcome("unused", _told_of(event, events, taken_back, state, learned or {}))
        elif event.id not in standing:
            gone = event.id in taken_back
            outcomes[event.id] = Outcome("unused", "retracted") if gone else Outcome("superseded", "a later one stands")
        else:
            row = _understood(event, look, codec, config, encoder, max_length)
            if isinstance(row, str):
                outcomes[event.id] = Outcome("unused", row)
            elif isinstance(row, Paired):
                paired.append(row)
            else:
                rated.append(row)
    several = config.min_sources > 1
    said = _opinions(state.opinions, [e for _, e in events], [*rated, *paired]) if several else state.opinions
    opinions = said[-OPINIONS:]
    trust = dataclasses.replace(state, opinions=opinions).reputations() if several else {}
    if several:
        _leave_out_who_may_not(rated, paired, trust, state.influence, config, outcomes)
        _weigh(rated, trust, state.influence, config)
    baselines = _against_baselines(rated, state.baselines, config)
    for row in list(rated):
        reason = _fault(row)
        if reason:
            outcomes[row.event.id] = Outcome("unused", reason, advantage=row.advantage)
            rated.remove(row)
    memory = _remembered(state.memory, [e for _, e in events])
    known = state.baselines
    rows: list[Rated | Paired] = [*rated, *paired]
    # a step is known by what it teaches, so that the draw is the same whether or not others have spoken
    seed = mixed_seed(seed, "replay", *(row.event.id for row in rows))
    replayed = _recalled(memory, look, codec, config, encoder, max_length, seed, known) if rows else []
    # what merely has no room any more is not among them: whether it has hangs on how much others said
    forgotten = sorted(_ids(state) - _ids(LearnerState(memory=memory, opinions=said)))
    memory = memory + [{"offset": offsets[r.event.id], "event": dataclasses.asdict(r.event)} for r in rows]
    had = state.influence
    if several:
        given = _weigh([*rows, *replayed], trust, had, config)
        replayed = [row for row in replayed if row.weight > 0]
        had = influence.after(had, given, config.influence_window)
    return Lesson(
        rated=rated + [r for r in replayed if isinstance(r, Rated)],
        paired=paired + [r for r in replayed if isinstance(r, Paired)],
        outcomes=outcomes,
        state=LearnerState(baselines, sorted(memory, key=lambda m: m["offset"])[-MEMORY:], opinions, had),
        replayed=[r.event.id for r in replayed],
        forgotten=forgotten,
    )


def _understood(
    event: Feedback,
    look: Callable[[str], StoredCompletion | None],
    codec: Codec,
    config: LiveConfig,
    encoder: bool,
    max_length: int,
) -> Rated | Paired | str:
    """What an event teaches, with the reward as its advantage; or why it teaches nothing."""
    if event.kind == "comment":
        return "comment teaches nothing"
    found = look(event.completion_id)
    if found is None:
        return "completion unknown"
    completion = found.completion
    if completion is None or not len(completion.tokens):
        return "tokens missing"
    if completion.tokenizer_hash not in ("", codec.hash):
        return "completion of another tokenizer"
    if event.kind in ("edit", "comparison"):
        return _pair(event, found.prompt, completion, look, codec, encoder, max_length)
    if completion.behavior_logprobs is None:
        return "log-probs missing"
    if _length(found.prompt, completion.tokens, encoder) > max_length:
        return "longer than the model holds"
    everything = np.ones(len(completion.tokens), np.bool_) if completion.sampled is None else completion.sampled
    if event.kind == "span":
        marked = _marked(event, completion)
        if isinstance(marked, str):
            return marked
        value = _number(event.value)
        if value is None or not -1 <= value <= 1:
            return "span value outside -1 to 1"
        if not (marked & everything).any():
            return "the span marks no token that the policy wrote"
        return Rated(event, found.prompt, completion, value, marked & everything)
    if not everything.any():
        return "no token that the policy wrote"
    reward = reward_of(event.kind, event.value, config.score_low, config.score_high)
    if reward is None:
        fits = f"score outside {config.score_low:g} to {config.score_high:g}"
        return "thumb is neither up nor down" if event.kind == "thumb" else fits
    return Rated(event, found.prompt, completion, reward, everything)


def _pair(
    event: Feedback,
    prompt: Prompt,
    completion: Completion,
    look: Callable[[str], StoredCompletion | None],
    codec: Codec,
    encoder: bool,
    max_length: int,
) -> Paired | str:
    """An edit or a comparison, as `Replay.preferences` reads it."""
    replay = Replay()
    sides = [(prompt, completion)]
    if event.kind == "comparison":
        other = look(str(event.value))
        if other is None:
            return "the other completion is unknown"
        if other.completion is None or not len(other.completion.tokens):
            return "tokens of the other completion missing"
        sides.append((other.prompt, other.completion))
    for asked, answer in sides:
        # two requests with the same words are one prompt, whatever ids they had
        name = asked.tokens.tobytes().hex()
        replay.add(dataclasses.replace(asked, id=name), dataclasses.replace(answer, prompt_id=name))
    replay.add(event)
    pairs = replay.preferences(codec, encoder=encoder)
    if not pairs:
        return next(iter(replay.left_out))
    pair = dataclasses.replace(pairs[0], prompt=prompt)
    if max(_length(prompt, tokens, encoder) for tokens in (pair.chosen, pair.rejected)) > max_length:
        return "longer than the model holds"
    return Paired(event, pair, event.kind == "edit")


def _length(prompt: Prompt, tokens: Ints, encoder: bool) -> int:
    """Places that are taken: of an encoder-decoder, on the longer side."""
    return max(len(prompt.tokens), len(tokens)) if encoder else len(prompt.tokens) + len(tokens)


def _marked(event: Feedback, completion: Completion) -> Bools | str:
    if event.span is None:
        return "span without characters"
    start, end = event.span
    if not 0 <= start < end <= len(completion.text):
        return "span outside the text"
    first, last = chars_to_tokens(completion.text_ends, start, end, completion.text_reach)
    marked = np.zeros(len(completion.tokens), np.bool_)
    marked[first:last] = True
    return marked


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _against_baselines(rated: Sequence[Rated], table: Mapping[str, float], config: LiveConfig) -> dict[str, float]:
    """Turn rewards of whole answers into advantages, in place; the baselines after that. Spans have no baseline."""
    whole = [row for row in rated if row.event.kind != "span"]
    if not whole:
        return dict(table)
    routes = [row.prompt.task for row in whole]
    rewards = torch.tensor([row.advantage for row in whole], dtype=torch.float64)
    given = credit.route_baselines(table, routes, 0.0)
    for row, advantage in zip(whole, (rewards - given).tolist(), strict=True):
        row.advantage = advantage
    valid = torch.ones(len(whole), dtype=torch.bool)
    weights = [row.weight for row in whole]
    return credit.updated_routes(
        table, routes, rewards, valid, midpoint=0.0, rate=config.baseline_rate, weights=weights
    )  # fmt: skip


def weight_of(row: Rated, config: LiveConfig) -> float:
    """Of a rating beside the others. A span is weighed whole: who marks the bad words knows what was bad."""
    return config.bad_weight if row.advantage < 0 and row.event.kind != "span" else 1.0


def _fault(row: Rated) -> str:
    """Why a rating that was understood teaches nothing all the same."""
    if row.advantage == 0:
        return "advantage 0: the rating equals the baseline"
    sampling = row.completion.sampling
    if row.advantage < 0 and sampling is not None and sampling.temperature == 0:
        return _GREEDY  # to push a text down one must know how likely it was
    return ""


def _takes_back(retraction: Feedback, event: Feedback) -> bool:
    """Whether a retraction is about that event (see `Replay.standing`)."""
    return (
        event.kind != "retract" and event.source == retraction.source
        and event.completion_id == retraction.completion_id and retraction.value in (None, "", event.id)
    )  # fmt: skip


def _taken_back(events: Sequence[Feedback]) -> dict[str, str]:
    """Event id → the later retraction, among these events, that takes it back."""
    found: dict[str, str] = {}
    for at, event in enumerate(events):
        if event.kind == "retract":
            found.update((e.id, event.id) for e in events[:at] if _takes_back(event, e))
    return found


def _told_of(
    retraction: Feedback,
    events: Sequence[tuple[int, Feedback]],
    taken_back: Mapping[str, str],
    state: LearnerState,
    learned: Mapping[str, int],
) -> str:
    """What a retraction came to."""
    now = [name for name, by in taken_back.items() if by == retraction.id]
    names = [str(retraction.value)] if retraction.value not in (None, "") else [
        e.id for e in map(_event_of, state.memory) if _takes_back(retraction, e)
    ]  # fmt: skip
    versions = sorted({learned[name] for name in names if name in learned})
    if versions:
        listed = ", ".join(map(str, versions))
        return f"taken back after version {listed} had learned from it; roll back to before that to forget it"
    return f"takes back {', '.join(now)}" if now else "there is nothing to take back"


def _event_of(entry: Mapping[str, Any]) -> Feedback:
    values = dict(entry["event"])
    if values["span"] is not None:
        values["span"] = tuple(values["span"])
    return Feedback(**values)


def _remembered(memory: Sequence[dict[str, Any]], events: Sequence[Feedback]) -> list[dict[str, Any]]:
    """The memory without what the new events take back or replace."""
    replaced = {subject(e) for e in events if e.kind != "retract"}
    retractions = [e for e in events if e.kind == "retract"]
    kept = []
    for entry in memory:
        event = _event_of(entry)
        if subject(event) not in replaced and not any(_takes_back(r, event) for r in retractions):
            kept.append(entry)
    return kept


def _recalled(
    memory: Sequence[dict[str, Any]],
    look: Callable[[str], StoredCompletion | None],
    codec: Codec,
    config: LiveConfig,
    encoder: bool,
    max_length: int,
    seed: int,
    baselines: Mapping[str, float],
) -> list[Rated | Paired]:
    """Earlier events to learn again, against today's baselines. One whose completion is gone is passed over."""
    if not config.replay_events or not memory:
        return []
    names, times = [entry["event"]["id"] for entry in memory], [float(entry["event"]["time"]) for entry in memory]
    rows = []
    for i in draw_named(names, times, config.replay_events, seed=seed, half_life=3600 * config.half_life):
        row = _understood(_event_of(memory[i]), look, codec, config, encoder, max_length)
        if isinstance(row, str):
            continue
        if isinstance(row, Rated) and row.event.kind != "span":
            row.advantage -= baselines.get(row.prompt.task, 0.0)
            if _fault(row):
                continue
        row.fresh = False
        rows.append(row)
    return rows


# --- several sources -------------------------------------------------------------------------------------------------


def _ids(state: LearnerState) -> set[str]:
    """Of the events that a state still rests on."""
    return {entry["event"]["id"] for entry in state.memory} | {opinion["event"] for opinion in state.opinions}


def _opinions(
    known: Sequence[dict[str, Any]], events: Sequence[Feedback], rows: Sequence[Rated | Paired]
) -> list[dict[str, Any]]:
    """The opinions with those of these rows, and without what the events take back."""
    retractions = [e for e in events if e.kind == "retract"]
    kept = [
        opinion for opinion in known if not any(
            r.source == opinion["source"] and r.completion_id == opinion["completion"]
            and r.value in (None, "", opinion["event"]) for r in retractions
        )
    ]  # fmt: skip
    by_subject = {(opinion["thing"], opinion["source"]): opinion for opinion in kept}
    for row in rows:
        thing, verdict = _verdict(row)
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


def _verdict(row: Rated | Paired) -> tuple[str, int]:
    """What a rating calls good (1) or bad (−1), or neither (0): an answer, by its words; of two answers, the one that
    comes first in an order of its own. To be asked while the advantage is the reward yet."""

    def name(prompt: Prompt, tokens: Ints) -> str:
        return hashlib.sha256(prompt.tokens.tobytes() + b"|" + tokens.astype("<i8").tobytes()).hexdigest()[:16]

    if isinstance(row, Paired):
        chosen, rejected = name(row.pair.prompt, row.pair.chosen), name(row.pair.prompt, row.pair.rejected)
        first, second = sorted((chosen, rejected))
        return f"{first} {second}", 0 if row.likelihood else 1 if chosen == first else -1
    if row.event.kind == "span":
        return "", 0
    return name(row.prompt, row.completion.tokens), (row.advantage > 0) - (row.advantage < 0)


def _leave_out_who_may_not(
    rated: list[Rated], paired: list[Paired], trust: Mapping[str, float], had: Mapping[str, float], config: LiveConfig,
    outcomes: dict[str, Outcome],
) -> None:  # fmt: skip
    """Drop, and tell, what comes from sources that have no weight in this step."""
    rows: list[Rated | Paired] = [*rated, *paired]
    given = _weigh(rows, trust, had, config)
    for row in rows:
        if given[row.event.source] <= 0:
            reason = _DISTRUSTED if trust.get(row.event.source, 1.0) <= 0 else _OVER
            outcomes[row.event.id] = Outcome("unused", reason)
    rated[:] = [row for row in rated if row.event.id not in outcomes]
    paired[:] = [row for row in paired if row.event.id not in outcomes]


def _weigh(
    rows: Sequence[Rated | Paired], trust: Mapping[str, float], had: Mapping[str, float], config: LiveConfig
) -> dict[str, float]:
    """Weigh rows in place, so that each source has its share of the step however often it spoke; the shares."""
    count = Counter(row.event.source for row in rows)
    mean = dict.fromkeys(sorted(count), 0.0)
    for row in rows:
        weight = max(LEAST, weight_of(row, config)) if isinstance(row, Rated) else 1.0
        mean[row.event.source] += weight / count[row.event.source]
    given = influence.shares(mean, trust, had, cap=config.influence_cap, window=config.influence_window)
    for row in rows:
        row.part = len(count) * given[row.event.source] / mean[row.event.source]
        row.weight = row.part * len(rows) / (len(count) * count[row.event.source])
    return given
