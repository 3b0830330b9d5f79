from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
import sacrebleu
from potentials import prefixes
from rouge_score.rouge_scorer import RougeScorer

from operant.rewards import (
    Bleu,
    Chrf,
    Edit,
    Exact,
    RewardRunner,
    Rouge,
    potential_diagnostics,
    potential_rewards,
    potentials_before,
)
from operant.rewards.metrics import rouge_words
from operant.rewards.potentials import NgramCounts, potential_values
from operant.types import Completion, OperantError, Prompt, Trajectory

TEXTS = [
    "",
    " ",
    "the cat sat on the mat .",
    "the the the the the the the",
    "  Hello,   world!\tIt's 3.14 (or 3,000) — “quoted” 5-6 x-\ny end-\n\nnext 2014.",
    "in 2014. they said: 5. 7 and .5 , , . .",
    "&quot;a &amp; b&quot; <skipped> a-<skipped>\nb &lt;x&gt;",
    "我们今天去了北京，天气很好。我们我们我们 3.5 度 ABC公司",
    "東京に行きました。とても楽しかったです！コンピューター",
    "混ざった text と emoji 👩‍👩‍👧‍👦👍🏽 ok ❤️ naïve Straße ΑΣ ΣΑΣ’Α",
    "\u3000全角　スペース 2014.\u3000終 10. 年",
    "a\u00a0b\u2003c\u2028d",
    "한국어 문장 입니다. 정말요?",
    "नमस्ते दुनिया สวัสดีชาวโลก",
]
REFERENCES = [
    ("the cat sat on the mat .",),
    ("the cat is on the mat", "there is a cat on the mat today ."),
    ("Hello, world! It's 3.14 or 3,000 x-\ny 2014.", "", "in 2014. they said 5."),
    ("我们昨天去了北京。天气很好 3.5 度", "今天我们去北京，天气好 2014. ABC公司"),
    ("東京へ行きました。楽しかった 👍🏽 👩‍👩‍👧‍👦 text emoji Straße ασ",),
    ("",),
    ("a b c d &quot;a <skipped> b 한국어 문장 नमस्ते दुनिया สวัสดี",),
]


def completion(text: str, seed: int = 0, *, piece: int = 4) -> Completion:
    """`text` cut into random byte tokens with an EOS, so that characters are spread over several tokens."""
    rng = random.Random(seed)
    data = text.encode()
    cuts, ends = 0, []
    while cuts < len(data):
        cuts = min(len(data), cuts + rng.randint(1, piece))
        ends.append(len(data[:cuts].decode(errors="ignore")))
    ends.append(len(text))
    return Completion("c", "p", text, np.arange(len(ends)), np.array(ends, dtype=np.int64))


BLEUS = [
    {},
    {"tokenize": "zh"},
    {"tokenize": "zh", "lowercase": True},
    {"tokenize": "intl"},
    {"tokenize": "char", "smooth_method": "add-k"},
    {"tokenize": "none", "smooth_method": "floor", "smooth_value": 0.2},
    {"smooth_method": "none", "max_ngram_order": 2, "effective_order": False, "lowercase": True},
    {"tokenize": "ja-mecab"},
    {"tokenize": "ko-mecab"},
]


@pytest.mark.parametrize("options", BLEUS, ids=str)
def test_bleu_prefix_is_sacrebleu_on_every_closed_prefix(options, caplog):
    metric = Bleu(potential="prefix", **options)
    reference_options = {"effective_order": True} | options
    scorer = sacrebleu.BLEU(**reference_options)
    checked = 0
    for references in REFERENCES:
        for text in TEXTS + [other for row in REFERENCES for other in row]:
            for closed, value in prefixes(metric, references, text):
                assert value == pytest.approx(scorer.sentence_score(closed, references).score / 100, abs=1e-12), closed
                checked += 1
            whole = scorer.sentence_score(text, references).score / 100
            assert metric.measure(text, references) == pytest.approx(whole, abs=1e-12)
    assert checked > 400


def test_the_lower_case_of_a_sigma_waits_for_the_letters_after_it():
    metric = Bleu(potential="prefix", tokenize="zh", lowercase=True)
    scorer = sacrebleu.BLEU(tokenize="zh", lowercase=True, effective_order=True)
    references = ("ασ ’ α b",)
    seen = list(prefixes(metric, references, "ΑΣ’Α b "))
    assert seen[-1][1] == pytest.approx(1.0)
    for closed, value in seen:
        assert value == pytest.approx(scorer.sentence_score(closed, references).score / 100, abs=1e-12)


@pytest.mark.parametrize("tokenize", ["13a", "zh", "intl", "none", "char"])
def test_bleu_prefix_on_random_awkward_lines(tokenize):
    rng = random.Random(7)
    pieces = [
        "a",
        "B",
        "5",
        ".",
        ",",
        "-",
        "\n",
        " ",
        "\t",
        "'",
        "&amp;",
        "<skipped>",
        "我",
        "。",
        "é",
        "👍",
        "\u3000",
        "Σ",
        "’",
        "%",
    ]
    metric = Bleu(potential="prefix", tokenize=tokenize, smooth_method="floor")
    scorer = sacrebleu.BLEU(tokenize=tokenize, effective_order=True, smooth_method="floor")
    for _ in range(400):
        text = "".join(rng.choices(pieces, k=rng.randint(1, 14)))
        references = tuple("".join(rng.choices(pieces, k=12)) for _ in range(rng.randint(1, 2)))
        for closed, value in prefixes(metric, references, text + " a"):
            assert value == pytest.approx(scorer.sentence_score(closed, references).score / 100, abs=1e-12), (
                closed,
                text,
            )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"word_order": 2},
        {"lowercase": True},
        {"whitespace": True},
        {"eps_smoothing": True, "char_order": 3, "beta": 1},
    ],
    ids=str,
)
def test_chrf_prefix_is_sacrebleu_on_every_closed_prefix(options):
    metric = Chrf(potential="prefix", **options)
    scorer = sacrebleu.CHRF(**options)
    checked = 0
    for references in REFERENCES:
        for text in TEXTS:
            for closed, value in prefixes(metric, references, text):
                assert value == pytest.approx(scorer.sentence_score(closed, references).score / 100, abs=1e-12), closed
                checked += 1
            whole = scorer.sentence_score(text, references).score / 100
            assert metric.measure(text, references) == pytest.approx(whole, abs=1e-12)
    assert checked > 400


class Words:
    def tokenize(self, text):
        return rouge_words(text)


@pytest.mark.parametrize("variant", ["1", "2", "L"])
@pytest.mark.parametrize("stem", [False, True])
def test_rouge_prefix_is_rouge_score_on_every_closed_prefix(variant, stem):
    class Stemmed:
        def tokenize(self, text):
            return rouge_words(text, use_stemmer=stem)

    metric = Rouge(potential="prefix", variant=variant, use_stemmer=stem)
    scorer = RougeScorer([metric.name], tokenizer=Stemmed())
    checked = 0
    for references in REFERENCES:
        for text in [*TEXTS, "running dogs are ran by the runners of the cats sitting"]:
            for closed, value in prefixes(metric, references, text):
                whole = scorer.score_multi(references, closed)[metric.name].fmeasure
                assert value == pytest.approx(whole, abs=1e-12), closed
                checked += 1
    assert checked > 400


def test_rouge_equals_the_default_tokenizer_on_english_and_keeps_other_scripts():
    texts = ["The quick brown_fox's 2 dogs, running!", "a quick dog ran; foxes' 22", "fox"]
    for variant in ("1", "2", "L"):
        for stem in (False, True):
            default = RougeScorer([f"rouge{variant}"], use_stemmer=stem)
            for text in texts:
                expected = default.score_multi(texts[:2], text)[f"rouge{variant}"].fmeasure
                assert Rouge(variant=variant, use_stemmer=stem).measure(text, texts[:2]) == pytest.approx(expected)
    assert rouge_words("我爱 ABC公司 コンピューター Straße 👍🏽❤️ 3.5") == [
        "我", "爱", "abc", "公", "司", *"コンピューター", "straße", "👍", "❤", "3", "5",
    ]  # fmt: skip
    assert Rouge(variant="1").measure("我爱你", ["我爱他"]) == pytest.approx(2 / 3)


@pytest.mark.parametrize("lowercase", [False, True])
def test_edit_prefix_is_the_measure_of_every_prefix(lowercase):
    metric = Edit(dense=True, lowercase=lowercase)
    for references in REFERENCES:
        for text in TEXTS:
            for closed, value in prefixes(metric, references, text):
                assert value == pytest.approx(metric.measure(closed, references), abs=1e-12)


DENSE = [
    Bleu(potential="prefix"),
    Bleu(potential="matched"),
    Bleu(potential="matched", tokenize="zh"),
    Bleu(potential="prefix", tokenize="ja-mecab"),
    Bleu(potential="matched", tokenize="ja-mecab"),
    Chrf(potential="prefix"),
    Chrf(potential="matched", word_order=2),
    Rouge(potential="prefix", variant="2"),
    Rouge(potential="matched"),
    Rouge(potential="matched", variant="1"),
    Edit(dense=True),
]


@pytest.mark.parametrize("metric", DENSE, ids=lambda metric: f"{metric.name}-{metric.kind}")
def test_dense_rewards_telescope(metric):
    for seed, references in enumerate(REFERENCES):
        prompt = Prompt("p", np.zeros(1, dtype=np.int64), references=references)
        for text in TEXTS:
            row = completion(text, seed)
            rewards = metric(prompt, row)
            assert rewards.dtype == np.float64 and rewards.shape == row.tokens.shape
            difference = metric.measure(text, references) - metric.measure("", references)
            assert abs(rewards.sum() - difference) < 1e-9


def test_a_text_that_comes_again_is_measured_once():
    """Half of the completions of a group are often the same; another way into tokens is another potential."""
    asked = []

    @dataclasses.dataclass(frozen=True)
    class Counted(Chrf):
        def measure(self, text, references):
            asked.append(text)
            return super().measure(text, references)

    prompt = Prompt("p", np.zeros(1, dtype=np.int64), references=("the cat sat on the mat",))
    rows = [completion("the cat sat", seed) for seed in (1, 1, 2)]
    with RewardRunner(Counted(dense=True), workers=0) as runner:
        first, second, third = (t.rewards for t in runner.run([(prompt, row) for row in rows]))
    assert asked.count("the cat sat") == 2
    assert np.array_equal(first, second) and first is not second
    assert len(third) != len(first) and third.sum() == pytest.approx(first.sum())


@pytest.mark.parametrize("metric", DENSE, ids=lambda metric: f"{metric.name}-{metric.kind}")
def test_a_potential_never_reads_ahead(metric):
    """Φ_t of a completion is Φ_t of its continuation: committed text only, and nothing later changes it."""
    for references in REFERENCES[:5]:
        for text in TEXTS:
            row = completion(text)
            values = potential_values(metric.tracker(references), text, row.text_ends, 0.0)
            for t, end in enumerate(row.text_ends):
                cut = text[: int(end)]
                other = potential_values(metric.tracker(references), cut + "zz", row.text_ends[: t + 1], 0.0)
                assert other[t] == pytest.approx(values[t], abs=1e-12)


def test_matched_potentials_by_hand():
    references = ("the cat sat down",)
    bleu = Bleu(potential="matched", max_ngram_order=2)
    (_, one), (_, two), (_, three) = prefixes(bleu, references, "the cat ran ")
    # 1 of 4 words; no pair of 3 yet, smoothed to half a match
    assert one == pytest.approx((1 / 4 * (1 / (2 * 3))) ** 0.5)
    assert two == pytest.approx((2 / 4 * 1 / 3) ** 0.5)
    assert three == pytest.approx(two)
    rouge = Rouge(potential="matched", variant="1")
    assert [value for _, value in prefixes(rouge, references, "the cat ran off home now ")] == pytest.approx(
        [1 / 4, 2 / 4, 2 / 4, 2 / 4, 2 / 5, 2 / 6]
    )
    chrf = Chrf(potential="matched", char_order=2)
    assert [value for _, value in prefixes(chrf, ("abc",), "abcab")] == pytest.approx(
        [(1 / 3 + 0) / 2, (2 / 3 + 1 / 2) / 2, 1.0, (3 / 4 + 2 / 3) / 2, (3 / 5 + 2 / 4) / 2]
    )


def test_an_open_word_holds_the_potential():
    references = ("hello world again",)
    row = Completion("c", "p", "hello world", np.arange(4), np.array([3, 5, 8, 11]))
    metric = Bleu(potential="matched", max_ngram_order=1)
    values = potential_values(metric.tracker(references), row.text, row.text_ends, 0.0)
    assert values == pytest.approx([0, 0, 1 / 3, 1 / 3])
    final = metric.measure(row.text, references)
    rewards = potential_rewards(values, final, 0.0, row)
    assert rewards == pytest.approx([0, 0, 1 / 3, final - 1 / 3])
    row.sampled = np.array([True, True, True, False])
    assert potential_rewards(values, final, 0.0, row) == pytest.approx([0, 0, final, 0])


def test_a_cut_off_last_character_is_not_valued_before_the_end():
    row = Completion("c", "p", "ab\ufffd", np.arange(3), np.array([1, 2, 2]))
    rewards = Chrf(dense=True)(Prompt("p", np.zeros(1, dtype=np.int64), references=("ab👍",)), row)
    assert rewards[0] > 0 and rewards[1] > 0
    assert rewards.sum() == pytest.approx(Chrf().measure(row.text, ("ab👍",)), abs=1e-9)


@pytest.mark.parametrize(
    "metric", [Bleu(potential="prefix"), Bleu(potential="matched", tokenize="zh"), Chrf(dense=True)]
)
def test_the_work_is_linear_in_the_length(metric, monkeypatch):
    """Counts n-gram updates, not seconds: ten times the text is ten times the updates."""
    calls = {"n": 0}
    for name in ("push", "pop"):
        original = getattr(NgramCounts, name)

        def counted(self, *args, original=original):
            calls["n"] += 1
            return original(self, *args)

        monkeypatch.setattr(NgramCounts, name, counted)

    def work(repeats):
        calls["n"] = 0
        text = "the cat 我们 sat . " * repeats
        row = completion(text)
        potential_values(metric.tracker(("the cat sat on the mat 我们",)), text, row.text_ends, 0.0)
        return calls["n"]

    work(1)
    assert work(200) < 10.5 * work(20)


def test_metrics_without_a_potential_and_unknown_potentials_are_refused():
    with pytest.raises(OperantError, match="no dense form"):
        Exact(dense=True)
    with pytest.raises(OperantError, match="no potential 'matchd'; use matched or prefix"):
        Bleu(potential="matchd")
    assert Bleu().cost == "linear" and Bleu(tokenize="ja-mecab").cost == "quadratic"
    assert Rouge().cost == Edit().cost == "linear*reference"


def test_potential_diagnostics():
    prompt = Prompt("p", np.zeros(1, dtype=np.int64))

    def trajectory(rewards, observed=True):
        size = len(rewards)
        row = Completion("c", "p", "", np.arange(size), np.zeros(size, dtype=np.int64))
        return Trajectory(prompt, row, np.array(rewards, dtype=float), np.full(size, observed))

    assert potentials_before(np.array([1.0, 2.0, 4.0])) == pytest.approx([0, 1, 3])
    # Φ is known from the sixth of ten tokens on: no variation before, full correlation after.
    rows = [trajectory([0] * 5 + [m] + [0] * 4) for m in (0.1, 0.5, 0.3)]
    rows.append(trajectory([np.nan] * 10, observed=False))
    deciles = potential_diagnostics(rows)
    assert len(deciles) == 10
    assert np.isnan(deciles[:6]).all()
    assert deciles[6:] == pytest.approx([1.0] * 4)
    # An early promise that the end takes back is anti-correlated with the end.
    assert potential_diagnostics([trajectory([m, -2 * m]) for m in (1.0, 2.0)])[9] == pytest.approx(-1.0)
    assert np.isnan(potential_diagnostics([])).all()


def test_dense_rewards_through_the_runner():
    prompt = Prompt("p", np.zeros(1, dtype=np.int64), references=("the cat sat on the mat",))
    rows = [completion(text) for text in ("the cat sat on a mat", "a dog ran")]
    with RewardRunner(Bleu(dense=True), workers=1) as runner:
        first, second = runner.run([(prompt, row) for row in rows])
    assert first.observed.all() and np.count_nonzero(first.rewards) > 2
    assert first.parts == {"bleu": pytest.approx(first.rewards.sum())}
    assert first.rewards.sum() > second.rewards.sum() >= 0
