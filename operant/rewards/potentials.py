"""Dense rewards from a metric of whole texts: potentials (Ng, Harada & Russell 1999, at γ = 1).

A potential Φ_t values the committed text after token t; `r_t = Φ_t − Φ_{t−1}` with `Φ_{−1} = M('')`, and the last
sampled token also pays `M(y) − Φ_last`, so that Σ r_t = M(y) − M('') exactly. Two kinds of Φ:

prefix: the metric itself on the committed text.
matched: clipped n-gram matches over the larger of the two n-gram counts, without a brevity penalty, so that it grows as
    the reference is matched instead of jumping near the end.

Committed text consists of closed units of the metric: what later tokens can still change (an open word, a cut-off
character) is not valued yet and Φ holds. A word closes at white space; in scripts written without spaces each character
closes; for plain chrF, whose units are characters, every character does.

Each tracker below feeds characters once and keeps counts, so a completion costs O(T) (n-grams) or O(T·|reference|)
(longest common subsequence, edit distance), never a recomputation per prefix. `RecomputedTracker` is the exception, for
tokenizers that look at the whole sentence (MeCab, SentencePiece).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from operant.rewards.calibration import pearson
from operant.rewards.seam import last_sampled
from operant.types import Completion, Doubles, Ints, Trajectory

Gram = tuple[Hashable, ...]


class Tracker(Protocol):
    """The potential of a growing text. `closed` is the number of characters that `value()` has taken into account."""

    closed: int

    def feed(self, text: str) -> None:
        """Go on with the next committed characters."""
        ...

    def value(self) -> float:
        """Φ of the closed characters so far, in [0, 1]."""
        ...


class NgramCounts:
    """Clipped n-gram matches of a growing list of units against fixed reference counts; push and pop cost O(orders).

    `correct[k]` and `total[k]` belong to order `orders[k]`.
    """

    def __init__(self, reference: Counter[Gram], orders: Sequence[int]) -> None:
        self.reference = reference
        self.orders = tuple(orders)
        self.units: list[Hashable] = []
        self.seen: Counter[Gram] = Counter()
        self.correct = [0] * len(self.orders)
        self.total = [0] * len(self.orders)

    def push(self, unit: Hashable) -> None:
        self.units.append(unit)
        for k, n in enumerate(self.orders):
            if len(self.units) >= n:
                gram = tuple(self.units[-n:])
                self.seen[gram] += 1
                self.total[k] += 1
                if self.seen[gram] <= self.reference.get(gram, 0):
                    self.correct[k] += 1

    def pop(self) -> None:
        for k, n in enumerate(self.orders):
            if len(self.units) >= n:
                gram = tuple(self.units[-n:])
                if self.seen[gram] <= self.reference.get(gram, 0):
                    self.correct[k] -= 1
                self.seen[gram] -= 1
                self.total[k] -= 1
        self.units.pop()


def count_ngrams(units: Sequence[Hashable], orders: Iterable[int]) -> Counter[Gram]:
    """How often each n-gram of the given orders stands in `units`."""
    return Counter(tuple(units[i : i + n]) for n in orders for i in range(len(units) - n + 1))


class WordTracker:
    """Splits a growing text into words exactly as a whole-line tokenizer would, and counts their n-grams.

    A line tokenizer may treat the last word of a line differently from the same word in the middle ("2014." keeps its
    dot at the end of the line under `zh` and `intl`). So the last closed word is counted in its end-of-line form and
    exchanged for its mid-line form when the next word closes.

    tokenize: (chunk, first, last) -> words of one white-space-free chunk in that place of the line.
    closes: (pending characters, character) -> "space" when the character ends the pending chunk and is no part of any,
        "unit" when it ends the pending chunk and is a chunk of its own, "" when it belongs to the pending chunk.
    """

    def __init__(
        self,
        counts: NgramCounts,
        tokenize: Callable[[str, bool, bool], Sequence[str]],
        closes: Callable[[list[str], str], str],
        score: Callable[[NgramCounts], float],
    ) -> None:
        self.counts, self.tokenize, self.closes, self.score = counts, tokenize, closes, score
        self.closed = 0
        self._seen = 0
        self._pending: list[str] = []
        self._last: tuple[str, bool] | None = None
        self._provisional = 0
        self._first = True
        self._leading = ""

    def feed(self, text: str) -> None:
        for character in text:
            self._seen += 1
            kind = self.closes(self._pending, character)
            if kind == "":
                self._pending.append(character)
                continue
            if self._pending:
                self._close("".join(self._pending))
                self._pending.clear()
            if kind == "unit":
                self._close(character)
            elif self._first:
                self._leading += character
            self.closed = self._seen

    def _close(self, chunk: str) -> None:
        if self._last is not None:
            for _ in range(self._provisional):
                self.counts.pop()
            for word in self.tokenize(*self._last, False):
                self.counts.push(word)
        chunk = self._leading + chunk
        self._leading = ""
        self._last = (chunk, self._first)
        self._first = False
        words = self.tokenize(*self._last, True)
        self._provisional = len(words)
        for word in words:
            self.counts.push(word)

    def value(self) -> float:
        return self.score(self.counts)


class CharacterTracker:
    """chrF's counts: character n-grams, and word n-grams for chrF++, against each reference.

    hold: wait for white space before counting (needed when lower-casing or counting words); otherwise each character
    counts at once. words: chunk -> words. score: (character counts, word counts) per reference -> value.
    """

    def __init__(
        self,
        counts: list[tuple[NgramCounts, NgramCounts]],
        *,
        hold: bool,
        lowercase: bool,
        whitespace: bool,
        words: Callable[[str], list[str]],
        score: Callable[[list[tuple[NgramCounts, NgramCounts]]], float],
    ) -> None:
        self.counts, self.hold, self.lowercase, self.whitespace = counts, hold, lowercase, whitespace
        self.words, self.score = words, score
        self.closed = 0
        self._seen = 0
        self._pending: list[str] = []

    def feed(self, text: str) -> None:
        for character in text:
            self._seen += 1
            space = character.isspace()
            if self.hold and not space:
                self._pending.append(character)
                continue
            chunk = "".join(self._pending)
            self._pending.clear()
            if self.lowercase:
                chunk = chunk.lower()
            for unit in chunk + (character if self.whitespace or not space else ""):
                for characters, _ in self.counts:
                    characters.push(unit)
            if chunk:
                for _, words in self.counts:
                    if words.orders:
                        for word in self.words(chunk):
                            words.push(word)
            self.closed = self._seen

    def value(self) -> float:
        return self.score(self.counts)


class RunTracker:
    """ROUGE's words: runs of letters and digits, and single characters of scripts without spaces.

    classify: character -> "single", "start" (may begin a run or go on with one), "mark" (may go on with one) or "".
    push: takes each closed word. score: () -> value.
    """

    def __init__(self, classify: Callable[[str], str], push: Callable[[str], None], score: Callable[[], float]) -> None:
        self.classify, self.push, self.score = classify, push, score
        self.closed = 0
        self._seen = 0
        self._pending: list[str] = []

    def feed(self, text: str) -> None:
        for character in text:
            self._seen += 1
            kind = self.classify(character)
            if kind == "start" or (kind == "mark" and self._pending):
                self._pending.append(character)
                continue
            if self._pending:
                self.push("".join(self._pending))
                self._pending.clear()
            if kind == "single":
                self.push(character)
            self.closed = self._seen

    def value(self) -> float:
        return self.score()


class LcsRow:
    """Length of the longest common subsequence of a growing list with a fixed one; a push costs O(|reference|)."""

    def __init__(self, reference: Sequence[str]) -> None:
        self._codes = {word: i for i, word in enumerate(dict.fromkeys(reference))}
        self._reference = np.array([self._codes[word] for word in reference], dtype=np.int64)
        self._row = np.zeros(len(reference) + 1, dtype=np.int64)
        self.units = 0

    def push(self, word: str) -> None:
        self.units += 1
        code = self._codes.get(word)
        if code is not None:
            self._row[1:] = np.maximum(self._row[1:], (self._row[:-1] + 1) * (self._reference == code))
            np.maximum.accumulate(self._row, out=self._row)

    @property
    def length(self) -> int:
        return int(self._row[-1])


class EditRow:
    """Levenshtein distance of a growing text to a fixed one; a push costs O(|reference|)."""

    def __init__(self, reference: str) -> None:
        self._reference = np.array([ord(character) for character in reference], dtype=np.int64)
        self._places = np.arange(len(reference) + 1, dtype=np.int64)
        self._row = self._places.copy()
        self.units = 0

    def push(self, character: str) -> None:
        self.units += 1
        row = self._row + 1
        np.minimum(row[1:], self._row[:-1] + (self._reference != ord(character)), out=row[1:])
        self._row = np.minimum.accumulate(row - self._places) + self._places

    @property
    def similarity(self) -> float:
        longest = max(self.units, len(self._reference))
        return 1.0 - int(self._row[-1]) / longest if longest else 1.0


class EditTracker:
    """Edit similarity, each character closed as it comes; the best of several references."""

    def __init__(self, references: Sequence[str], *, fold: Callable[[str], str]) -> None:
        self._rows = [EditRow(fold(reference)) for reference in references]
        self._fold = fold
        self.closed = 0

    def feed(self, text: str) -> None:
        for character in text:
            for row in self._rows:
                for unit in self._fold(character):
                    row.push(unit)
            self.closed += 1

    def value(self) -> float:
        return max(row.similarity for row in self._rows)


class RecomputedTracker:
    """Measures every closed prefix anew: O(T·|y|), for tokenizers that look at the whole sentence."""

    def __init__(self, measure: Callable[[str], float], closes: Callable[[str], bool]) -> None:
        self._measure, self._closes = measure, closes
        self._text = ""
        self.closed = 0

    def feed(self, text: str) -> None:
        start = len(self._text)
        self._text += text
        for offset, character in enumerate(text, start + 1):
            if self._closes(character):
                self.closed = offset

    def value(self) -> float:
        return self._measure(self._text[: self.closed])


def potential_values(tracker: Tracker, text: str, ends: Ints, empty: float) -> Doubles:
    """Φ_t for every token: float64[T].

    text, ends: a completion's text and its int64[T] committed characters after each token. empty: M(''), which Φ holds
    until a first unit has closed.
    """
    values = np.empty(len(ends), dtype=np.float64)
    position, value = 0, empty
    for t, end in enumerate(ends):
        stop = min(int(end), len(text))
        if stop > position:
            before = tracker.closed
            tracker.feed(text[position:stop])
            position = stop
            if tracker.closed > before:
                value = tracker.value()
        values[t] = value
    return values


def potential_rewards(values: Doubles, final: float, empty: float, completion: Completion) -> Doubles:
    """Token rewards from a potential, r_t = Φ_t − Φ_{t−1} with Φ_{−1} = `empty`; the sum is `final − empty`.

    values: float64[T], Φ_t. final: M(y). empty: M(''). The last sampled token also pays `final − Φ_last`.
    Source: Ng, Harada & Russell 1999, with γ = 1. Raises ValueError when the completion has no sampled token.
    """
    end = last_sampled(completion)
    if end is None:
        raise ValueError("a completion without a sampled token cannot carry rewards")
    rewards = np.diff(values, prepend=empty)
    rewards[end] += final - values[-1]
    return rewards


def potentials_before(rewards: Doubles) -> Doubles:
    """Φ_{t−1} − M('') for every token t, from dense rewards: their exclusive cumulative sum, float64[T]."""
    return np.concatenate([np.zeros(1), np.cumsum(rewards)[:-1]]) if len(rewards) else np.zeros(0)


def potential_diagnostics(trajectories: Iterable[Trajectory]) -> list[float]:
    """How well the potential foretells the metric: corr(Φ_{t−1}, M(y)) at each tenth of the completion, 10 numbers.

    Decile d is read at token t = ⌊(d + ½)·T/10⌋ of each observed trajectory, so completions of any length count once.
    Φ_{t−1} − M('') is the exclusive cumulative sum of the rewards and M(y) − M('') their sum. NaN where there are fewer
    than two trajectories or one side does not vary.
    """
    rows, finals = [], []
    for trajectory in trajectories:
        size = len(trajectory.rewards)
        if size and trajectory.observed.all():
            before = potentials_before(trajectory.rewards)
            rows.append([before[int((d + 0.5) * size / 10)] for d in range(10)])
            finals.append(float(trajectory.rewards.sum()))
    potentials, metrics = np.array(rows).reshape(-1, 10), np.array(finals)
    # rounding leaves constants with a spread of a few ulp, which is no variation
    noise = 1e-12 * float(np.abs(np.append(potentials, metrics)).max(initial=0.0))
    return [pearson(column, metrics, noise=noise, undefined=math.nan) for column in potentials.T]


def dense_rewards(metric: Any, prompt_references: Sequence[str], completion: Completion) -> Doubles:
    """Token rewards of a metric with `measure(text, references)` and `tracker(references)`: float64[T].

    metric: a value that can be hashed, such as a frozen dataclass, since what it measured is kept for a while.
    """
    ends = np.ascontiguousarray(completion.text_ends, np.int64).tobytes()
    values, final, empty = _measured(metric, tuple(prompt_references), completion.text, ends)
    return potential_rewards(values, final, empty, completion)


@lru_cache(maxsize=1 << 10)
def _measured(metric: Any, references: tuple[str, ...], text: str, ends: bytes) -> tuple[Doubles, float, float]:
    """(Φ_t float64[T], M(y), M('')). Half of a group's completions are often the same text, each met once here."""
    empty = metric.measure("", references)
    final = metric.measure(text, references)
    values = potential_values(metric.tracker(references), text, np.frombuffer(ends, np.int64), empty)
    values.flags.writeable = False
    return values, final, empty
