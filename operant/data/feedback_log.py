"""A feedback log: what people said of completions, joined to these, from which preference batches are filled.

Pure: it reads lines from any iterable and writes lines that the caller stores. One line is one record, so that a file
of them grows by appending, and a line that a crash cut off in the middle is the last one and harmless.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from operant.data.preferences import Preference, Rating, good_or_bad
from operant.data.text import Codec
from operant.types import Completion, Feedback, OperantError, Prompt, Sampling

__all__ = ["FeedbackLog", "Replay", "draw_examples", "draw_named", "line_of", "subject", "takes_back"]

Record = Prompt | Completion | Feedback

_NAMES: dict[str, type[Any]] = {"prompt": Prompt, "completion": Completion, "feedback": Feedback}
_ARRAYS = {
    "tokens": np.int64, "text_ends": np.int64, "text_reach": np.int64, "policy_version": np.int64,
    "behavior_logprobs": np.float32, "model_logprobs": np.float32, "stream_rewards": np.float32, "sampled": np.bool_,
}  # fmt: skip
_TUPLES = {"messages", "references", "span"}


def draw_examples(times: Sequence[float], count: int, *, seed: int, step: int, half_life: float = 0.0) -> list[int]:
    """Which of the items to learn from in a step: at most `count` different ones, a function of what is given alone.

    times: float[N], seconds; when each item was said. half_life: an item half_life seconds older than another is half
    as likely to be drawn next; 0 draws uniformly. Ages are counted from the newest item, not from the clock.

    Raises OperantError when there is nothing to draw from.
    """
    if not len(times):
        raise OperantError("there is no feedback to draw from: collect feedback first, or lower what is asked of it")
    rng = np.random.default_rng([seed, step])
    if half_life <= 0:
        return [int(i) for i in rng.permutation(len(times))[:count]]
    # Gumbel top-k (Vieira 2014): without replacement, by weights that may be too small to be numbers
    ages = max(times) - np.asarray(times, np.float64)
    keys = -math.log(2.0) * ages / half_life + rng.gumbel(size=len(times))
    return [int(i) for i in np.argsort(-keys, kind="stable")[:count]]


def draw_named(
    names: Sequence[str], times: Sequence[float], count: int, *, seed: int, half_life: float = 0.0
) -> list[int]:
    """`draw_examples` by a priority that each item has of itself: the `count` items of the largest

        ln 2 · t_i / half_life − ln(−ln u_i),   u_i in (0, 1) from SHA-256 of (seed, name_i)

    (Gumbel top-k, Vieira 2014; without a half-life the first term is left out). Whether other items are there changes
    no priority: with some of them gone, those that are left come in the same order. Equal priorities go by name.
    """

    def priority(i: int) -> tuple[float, str]:
        digest = hashlib.sha256(f"{seed}\x00{names[i]}".encode("utf-8", "surrogatepass")).digest()
        uniform = (int.from_bytes(digest[:6], "big") + 0.5) / 2.0**48
        age = math.log(2.0) * times[i] / half_life if half_life > 0 else 0.0
        return age - math.log(-math.log(uniform)), names[i]

    return sorted(range(len(names)), key=priority, reverse=True)[:count]


def line_of(record: Record) -> str:
    """A record as one line of JSON, newline included.

    Raises OperantError for a prompt with pictures or audio, or with `meta` that JSON cannot hold.
    """
    name = next(name for name, kind in _NAMES.items() if isinstance(record, kind))
    values = {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}
    if values.pop("inputs", None) is not None:
        raise OperantError(f"prompt {record.id} has inputs beside its text, which a line of JSON cannot hold")
    for key, value in values.items():
        if isinstance(value, np.ndarray):
            values[key] = value.tolist()
        elif isinstance(value, Sampling):
            values[key] = dataclasses.asdict(value)
    try:
        return json.dumps({name: values}, ensure_ascii=False) + "\n"
    except (TypeError, ValueError) as error:
        raise OperantError(f"the {name} {record.id} cannot be written as JSON ({error}); leave that out") from error


def _record(name: str, values: dict[str, Any]) -> Record:
    for key, value in values.items():
        if value is None:
            continue
        if key in _ARRAYS and not (key == "sampled" and isinstance(value, bool)):
            values[key] = np.asarray(value, _ARRAYS[key])
        elif key in _TUPLES:
            values[key] = tuple(value)
        elif key == "sampling":
            lists = {k: tuple(v) for k, v in value.items() if isinstance(v, list)}
            values[key] = Sampling(**(value | lists))
    record: Record = _NAMES[name](**values)
    return record


@dataclass(slots=True)
class FeedbackLog:
    """Feedback joined to completions and prompts. Records may come in any order, and again.

    `left_out` counts, by reason, the events that the last call of `preferences` or `ratings` could not use.
    """

    prompts: dict[str, Prompt] = field(default_factory=dict)
    completions: dict[str, Completion] = field(default_factory=dict)
    events: dict[str, Feedback] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)
    _keys: dict[tuple[str, str], Feedback] = field(default_factory=dict)

    @classmethod
    def from_lines(cls, lines: Iterable[str]) -> FeedbackLog:
        """What `lines` wrote. A last line without an end that is no JSON is what a crash left, and is dropped.

        Raises OperantError, with the number of the line, for any other line that is no record.
        """
        log = cls()
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                ((name, values),) = json.loads(line).items()
                record = _record(name, values)
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                if isinstance(error, json.JSONDecodeError) and not line.endswith("\n"):
                    break
                raise OperantError(
                    f"line {number} of the feedback log is no prompt, completion or feedback ({error}); "
                    "remove that line"
                ) from error
            log.add(record)
        return log

    def lines(self) -> Iterator[str]:
        """Every record as a line of JSON. Raises OperantError for one that JSON cannot hold, as `line_of` does."""
        for records in (self.prompts, self.completions, self.events):
            for record in records.values():
                yield line_of(record)

    def add(self, *records: Record) -> None:
        """Take records in. One that is there already changes nothing.

        Raises OperantError for an event whose idempotency key was used by its source for another event.
        """
        for record in records:
            if isinstance(record, Prompt):
                self.prompts.setdefault(record.id, record)
            elif isinstance(record, Completion):
                self.completions.setdefault(record.id, record)
            else:
                first = self._keys.setdefault((record.source, record.idempotency_key), record)
                if _body(first) != _body(record):
                    raise OperantError(
                        f"{record.source} used the idempotency key {record.idempotency_key!r} for two different "
                        "events; give each event its own"
                    )
                self.events.setdefault(first.id, first)

    def standing(self) -> list[Feedback]:
        """The events in force, by time. A source's later rating, edit or comparison of the same completion supersedes
        its earlier one; `retract` takes back the event that its value names, or all of the source's about the
        completion."""
        ordered = sorted(self.events.values(), key=lambda e: (e.time, e.id))
        last: dict[tuple[Any, ...], Feedback] = {}
        for event in ordered:
            if event.kind == "retract":
                gone = [key for key, e in last.items() if takes_back(event, e.source, e.completion_id, e.id)]
                for key in gone:
                    del last[key]
            else:
                key = subject(event)
                last.pop(key, None)
                last[key] = event
        return list(last.values())

    def preferences(self, codec: Codec, *, encoder: bool = False) -> list[Preference]:
        """Pairs, by time: of an edit, the edited text over what the policy wrote; of a comparison, the completion that
        the event is about over the one whose id is its value. Tokens are int64[T].

        Only an edit is tokenised here; what the policy wrote is taken as it was recorded.
        """
        self.left_out.clear()
        pairs = []
        for event in self.standing():
            if event.kind not in ("edit", "comparison"):
                continue
            found = self._found(event.completion_id, codec)
            if found is None:
                continue
            prompt, completion = found
            if event.kind == "edit":
                text = str(event.value or "")
                if not text.strip() or text == completion.text:
                    self.left_out["edits that are empty" if not text.strip() else "edits that change nothing"] += 1
                    continue
                chat = prompt.messages is not None and codec.usual_style.chat
                chosen = codec.encode_answers([text], chat=chat, target=encoder)[0]
                rejected = completion.tokens
            else:
                other = self._found(str(event.value), codec)
                if other is None:
                    continue
                if other[0].id != prompt.id:
                    self.left_out["comparisons across prompts"] += 1
                    continue
                chosen, rejected = completion.tokens, other[1].tokens
            if np.array_equal(chosen, rejected):
                self.left_out["pairs of the same text"] += 1
                continue
            pairs.append(Preference(prompt, chosen, rejected, event.time))
        return pairs

    def ratings(self, codec: Codec, *, midpoint: float = 0.5) -> list[Rating]:
        """Completions that are good or bad, by time: of a thumb, what it says; of a score, whether it is above or
        below `midpoint`. A score of exactly that says neither."""
        self.left_out.clear()
        ratings = []
        for event in self.standing():
            if event.kind not in ("thumb", "score"):
                continue
            found = self._found(event.completion_id, codec)
            if found is None:
                continue
            good = good_or_bad(event.value) if event.kind == "thumb" else _above(event.value, midpoint)
            if good is None:
                self.left_out[f"{event.kind}s that are neither good nor bad"] += 1
            elif not len(found[1].tokens):
                self.left_out["completions without a token"] += 1
            else:
                ratings.append(Rating(found[0], found[1].tokens, good, event.time))
        return ratings

    def _found(self, name: str, codec: Codec) -> tuple[Prompt, Completion] | None:
        """A completion that can be learned from, with its prompt; None, and counted, otherwise."""
        completion = self.completions.get(name)
        prompt = self.prompts.get(completion.prompt_id) if completion is not None else None
        if completion is None or prompt is None:
            self.left_out["completions that are not there"] += 1
        elif completion.tokenizer_hash not in ("", codec.hash):
            self.left_out["completions of another tokenizer"] += 1
        elif completion.sampled is not None and not completion.sampled[codec.first_id is not None :].all():
            self.left_out["completions with tokens that the policy did not write"] += 1
        else:
            return prompt, completion
        return None


Replay = FeedbackLog
"""The name that `operant` has given it first, and still knows."""


def _body(event: Feedback) -> tuple[Any, ...]:
    return event.completion_id, event.kind, event.value, event.span


def takes_back(retraction: Feedback, source: str, completion_id: str, event_id: str) -> bool:
    """Whether a retraction takes back what a source said of a completion in the event of that id: one names an event,
    or nothing, which is all that its source said of the completion. The event must be an earlier one, and no retraction
    itself."""
    return (
        retraction.source == source and retraction.completion_id == completion_id
        and retraction.value in (None, "", event_id)
    )  # fmt: skip


def subject(event: Feedback) -> tuple[Any, ...]:
    """What an event is an opinion on: a later one of the same source and subject replaces it."""
    if event.kind in ("score", "thumb"):
        return event.source, "rating", event.completion_id
    if event.kind == "comparison":
        return event.source, "comparison", *sorted((event.completion_id, str(event.value)))
    if event.kind == "comment":
        return event.source, "comment", event.id
    return event.source, event.kind, event.completion_id, event.span


def _above(value: Any, midpoint: float) -> bool | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return None if math.isnan(number) or number == midpoint else number > midpoint
