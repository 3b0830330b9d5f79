"""What was said, and what one event teaches: each rating, edit and comparison read against what is stored.

    thumb, score   reward r in [−1, 1], advantage A = r − b with b the exponential mean of the route's earlier ratings
    span           its value is the advantage of the tokens it marks; all others get no gradient
    edit           a DPO pair, the edited text over the original, and the edited text's likelihood
    comparison     a DPO pair

Events come from an `EventSource`: the store, or a growing file (`FeedbackFile`). Reading one reads no clock.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from operant.data.feedback_log import FeedbackLog
from operant.data.preferences import Preference, reward_of
from operant.data.text import Codec, chars_to_tokens
from operant.live.storage.feedback import Interaction
from operant.types import Bools, Completion, Feedback, Ints, OperantError, Prompt

__all__ = ["EventReader", "EventSource", "FeedbackFile", "LessonRow", "Paired", "Rated", "open_store"]


# --- where events come from -------------------------------------------------------------------------------------------


class EventSource(Protocol):
    """What learning needs of the store. Offsets are those of an append-only log, ascending and never used again."""

    def completion(self, completion_id: str) -> Interaction | None:
        """A completion with its prompt, or None when there is none of this id."""
        ...

    def events_after(self, offset: int, limit: int) -> Sequence[tuple[int, Feedback]]:
        """At most `limit` events by their offsets, from the first after `offset`."""
        ...


@dataclass(slots=True)
class _LoggedInteraction:
    id: str
    prompt: Prompt
    completion: Completion | None


class FeedbackFile:
    """An `EventSource` over a growing file of prompts, completions and feedback (`feedback_log.line_of`).

    Offsets are line numbers. A last line without an end is not read yet: somebody is writing it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._log = FeedbackLog()
        self._events: list[tuple[int, Feedback]] = []
        self._read = self._lines = 0

    def completion(self, completion_id: str) -> Interaction | None:
        """A completion with its prompt; None while one of them is not in the file.

        Raises OperantError when a line is no record.
        """
        self._refresh()
        completion = self._log.completions.get(completion_id)
        prompt = self._log.prompts.get(completion.prompt_id) if completion is not None else None
        return None if prompt is None else _LoggedInteraction(completion_id, prompt, completion)

    def events_after(self, offset: int, limit: int) -> Sequence[tuple[int, Feedback]]:
        """At most `limit` events, from the first on a line after `offset`. Raises OperantError as `completion` does."""
        self._refresh()
        first = bisect.bisect_right(self._events, offset, key=lambda pair: pair[0])
        return self._events[first : first + limit]

    def _refresh(self) -> None:
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                try:
                    one = FeedbackLog.from_lines([line.decode()])
                except (OperantError, UnicodeDecodeError) as error:
                    raise OperantError(
                        f"line {self._lines + 1} of {self.path} is no prompt, completion or feedback; mend that line"
                    ) from error
                self._read += len(line)
                self._lines += 1
                for event in one.events.values():
                    if event.id not in self._log.events:
                        self._log.add(event)
                        self._events.append((self._lines, event))
                self._log.add(*one.prompts.values(), *one.completions.values())


def open_store(name: str) -> EventSource:
    """A database (see `store.Store`), or a file of JSON Lines, to read from.

    Raises OperantError when the name is empty, or names no store that can be read.
    """
    if not name:
        raise OperantError("--store is missing; give the database, or the file of JSON Lines, that holds the feedback")
    if name.endswith(".jsonl"):
        return FeedbackFile(name)
    from operant.live.storage.store import Store  # needs SQLAlchemy, which a file of JSON Lines does not

    return Store(name, read_only=True)


# --- what one event teaches -------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Rated:
    """A text to say more or less often.

    reward: what was said, in [−1, 1]. advantage: the reward minus the baseline of its route; of a span, the reward.
    marked: bool[T], the tokens of the completion that learn; the advantage is theirs.
    weight: beside the other rows of the step. part: of what an equal part for its source would give it.
    fresh: of a new event, and not rehearsed.
    logprobs, plain: float32[K], log π of the K tokens that the policy drew, as the step begins, at the temperature
        that they were drawn at and at 1. They are looked up once, where something hangs on them: of a new event, and of
        a text to be said less often.
    """

    event: Feedback
    prompt: Prompt
    completion: Completion
    reward: float
    advantage: float
    marked: Bools
    weight: float = 1.0
    part: float = 1.0
    fresh: bool = True
    logprobs: Tensor | None = None
    plain: Tensor | None = None


@dataclass(slots=True)
class Paired:
    """A text preferred to another; `likelihood` says whether it is also simply made likelier (see `Rated`).

    logprobs: float32[K] of the chosen text and of the rejected one, as the step begins; looked up once.
    """

    event: Feedback
    pair: Preference
    likelihood: bool
    weight: float = 1.0
    part: float = 1.0
    fresh: bool = True
    logprobs: tuple[Tensor, Tensor] | None = None


LessonRow = Rated | Paired


@dataclass(frozen=True, slots=True)
class EventReader:
    """Reads what one event teaches a policy with this codec.

    find: a stored interaction by the id of its completion, or None.
    score_low, score_high: what scores run from and to.
    encoder: whether the policy is an encoder-decoder. max_length: the most tokens that it holds.
    """

    find: Callable[[str], Interaction | None]
    codec: Codec
    score_low: float
    score_high: float
    encoder: bool
    max_length: int

    def read(self, event: Feedback, baselines: Mapping[str, float]) -> LessonRow | str:
        """What an event teaches, or why it teaches nothing. baselines: of each route, 0 for one that has none yet."""
        if event.kind == "comment":
            return "comment teaches nothing"
        found = self.find(event.completion_id)
        if found is None:
            return "completion unknown"
        completion = found.completion
        if completion is None or not len(completion.tokens):
            return "tokens missing"
        if completion.tokenizer_hash not in ("", self.codec.hash):
            return "completion of another tokenizer"
        if event.kind in ("edit", "comparison"):
            return self._read_pair(event, found.prompt, completion)
        if completion.behavior_logprobs is None:
            return "log-probs missing"
        if self._too_long(found.prompt, completion.tokens):
            return "longer than the model holds"
        drawn = np.ones(len(completion.tokens), np.bool_) if completion.sampled is None else completion.sampled
        if event.kind == "span":
            return _read_span(event, found.prompt, completion, drawn)
        if not drawn.any():
            return "no token that the policy wrote"
        reward = reward_of(event.kind, event.value, self.score_low, self.score_high)
        if reward is None:
            if event.kind == "thumb":
                return "thumb is neither up nor down"
            return f"score outside {self.score_low:g} to {self.score_high:g}"
        advantage = reward - baselines.get(found.prompt.task, 0.0)
        return Rated(event, found.prompt, completion, reward, advantage, drawn)

    def _read_pair(self, event: Feedback, prompt: Prompt, completion: Completion) -> Paired | str:
        """An edit or a comparison, as `FeedbackLog.preferences` reads it."""
        log = FeedbackLog()
        sides = [(prompt, completion)]
        if event.kind == "comparison":
            other = self.find(str(event.value))
            if other is None:
                return "the other completion is unknown"
            if other.completion is None or not len(other.completion.tokens):
                return "tokens of the other completion missing"
            sides.append((other.prompt, other.completion))
        for asked, answer in sides:
            # two requests with the same words are one prompt, whatever ids they had
            name = asked.tokens.tobytes().hex()
            log.add(dataclasses.replace(asked, id=name), dataclasses.replace(answer, prompt_id=name))
        log.add(event)
        pairs = log.preferences(self.codec, encoder=self.encoder)
        if not pairs:
            return next(iter(log.left_out))
        pair = dataclasses.replace(pairs[0], prompt=prompt)
        if self._too_long(prompt, pair.chosen) or self._too_long(prompt, pair.rejected):
            return "longer than the model holds"
        return Paired(event, pair, event.kind == "edit")

    def _too_long(self, prompt: Prompt, tokens: Ints) -> bool:
        """tokens: int64[T]. Of an encoder-decoder each side has its own places."""
        asked, answered = len(prompt.tokens), len(tokens)
        return (max(asked, answered) if self.encoder else asked + answered) > self.max_length


def _read_span(event: Feedback, prompt: Prompt, completion: Completion, drawn: Bools) -> Rated | str:
    """drawn: bool[T], the tokens that the policy wrote."""
    if event.span is None:
        return "span without characters"
    start, end = event.span
    if not 0 <= start < end <= len(completion.text):
        return "span outside the text"
    first, last = chars_to_tokens(completion.text_ends, start, end, completion.text_reach)
    marked = np.zeros(len(completion.tokens), np.bool_)
    marked[first:last] = True
    value = _finite_number(event.value)
    if value is None or not -1 <= value <= 1:
        return "span value outside -1 to 1"
    if not (marked & drawn).any():
        return "the span marks no token that the policy wrote"
    return Rated(event, prompt, completion, value, value, marked & drawn)


def _finite_number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
