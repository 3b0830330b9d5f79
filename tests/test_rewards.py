from __future__ import annotations

import os
import signal
import sys
import threading
import time

import numpy as np
import pytest
import sacrebleu

import operant.rewards as rewards_package
from operant.rewards import (
    Bleu,
    Chrf,
    Clip,
    Edit,
    Exact,
    Format,
    Gate,
    Length,
    Limited,
    Product,
    Repetition,
    Reward,
    RewardRunner,
    Rouge,
    RunningNorm,
    Stop,
    Streaming,
    Sum,
    Ter,
    as_reward,
    check_references,
    corpus_metrics,
    distinct_n,
    has_potential,
    optimised_metrics,
    reward_by_name,
    reward_names,
    reward_trajectory,
    run_stream,
)
from operant.types import Completion, OperantError, Prompt, Span


def prompt(*references: str, id: str = "p") -> Prompt:
    return Prompt(id, np.zeros(1, dtype=np.int64), references=references)


def completion(text: str) -> Completion:
    """One token per character and an EOS."""
    ends = np.array([*range(1, len(text) + 1), len(text)], dtype=np.int64)
    return Completion("c", "p", text, np.arange(len(ends)), ends)


def test_exports_are_sorted_and_exist():
    assert rewards_package.__all__ == sorted(rewards_package.__all__)
    assert all(hasattr(rewards_package, name) for name in rewards_package.__all__)


# Placement


def test_a_number_stands_on_the_last_sampled_token():
    row = completion("ab")
    for value in (2, 2.0, np.float32(2), np.array(2.0), True + 1):
        trajectory = reward_trajectory(prompt(), row, "r", value)
        assert trajectory.rewards.tolist() == [0, 0, 2] and trajectory.observed.all() and trajectory.parts == {"r": 2.0}
    row.sampled = np.array([True, True, False])
    assert reward_trajectory(prompt(), row, "r", 2).rewards.tolist() == [0, 2, 0]


def test_a_sequence_is_taken_as_it_is():
    trajectory = reward_trajectory(prompt(), completion("ab"), "r", [1, 2, 3])
    assert trajectory.rewards.tolist() == [1, 2, 3] and trajectory.rewards.dtype == np.float64
    trajectory = reward_trajectory(prompt(), completion("ab"), "r", np.array([1, 2, 3]))
    assert trajectory.rewards.tolist() == [1, 2, 3]
    trajectory = reward_trajectory(prompt(), completion("ab"), "r", [1, None, 3])
    assert trajectory.observed.tolist() == [True, False, True] and trajectory.parts == {"r": 4.0}
    assert np.isnan(trajectory.rewards[1]) and trajectory.missing is None


def test_spans_are_spread_over_their_tokens():
    # An emoji written by three tokens, between two letters.
    row = Completion("c", "p", "a👍b", np.arange(6), np.array([1, 1, 1, 2, 3, 3]))
    trajectory = reward_trajectory(prompt(), row, "r", [Span(1, 2, 3.0), Span(0, 1, -1.0)])
    assert trajectory.rewards.tolist() == [-1, 1, 1, 1, 0, 0]
    assert reward_trajectory(prompt(), row, "r", []).rewards.tolist() == [0] * 6
    row.sampled = np.array([True, False, True, True, True, True])
    assert reward_trajectory(prompt(), row, "r", [Span(1, 2, 3.0)]).rewards.tolist() == [0, 0, 1.5, 1.5, 0, 0]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "none"),
        (float("nan"), "nan"),
        (float("inf"), "infinite"),
        ("0.5", "wrong_type"),
        ({"reward": 1}, "wrong_type"),
        (..., "wrong_type"),
        ({1.0}, "wrong_type"),
        (10**400, "wrong_type"),
        ([1.0, 2.0], "wrong_length"),
        ([1.0, "x", 2.0], "wrong_type"),
        ([1.0, float("nan"), 2.0], "nan"),
        ([None, None, None], "none"),
        ([Span(1, 9, 1.0)], "bad_span"),
        ([Span(1, 1, 1.0)], "bad_span"),
    ],
    ids=str,
)
def test_missing_values(value, reason):
    trajectory = reward_trajectory(prompt(), completion("ab"), "r", value)
    assert trajectory.missing.split(":")[0] == reason
    assert not trajectory.observed.any() and np.isnan(trajectory.rewards).all() and trajectory.parts == {"r": None}


def test_an_empty_completion_carries_no_reward():
    row = Completion("c", "p", "", np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))
    assert reward_trajectory(prompt(), row, "r", 1.0).missing.startswith("no_tokens")


# Metrics


def test_metrics_by_hand():
    references = ("the cat sat", "a dog")
    assert Exact().measure(" a dog\n", references) == 1.0 and Exact().measure("A dog", references) == 0.0
    assert Exact(lowercase=True).measure("A dog", references) == 1.0
    assert Edit().measure("a dig", references) == pytest.approx(4 / 5)
    assert Length().measure("one two three four", references) == pytest.approx(3 / 4)
    assert Length(target=2).measure("one", ()) == 0.5 and Length(target=4, unit="characters").measure("我们", ()) == 0.5
    assert Length(target=0).measure("", ()) == 1.0
    assert Repetition().measure("a b a b a b") == pytest.approx(2 / 5) and Repetition().measure("a") == 1.0
    assert Format(pattern=r"\d+").measure("12") == 1.0 and Format(pattern=r"\d+").measure("12 ") == 0.0
    assert Format(pattern=r"\d+", match="search").measure("a 12") == 1.0
    assert Ter().measure("the cat sat", references) == 1.0 and Ter().measure("x y z w v u t", references) == 0.0
    expected = 1 - sacrebleu.sentence_ter("the cat", list(references)).score / 100
    assert Ter().measure("the cat", references) == pytest.approx(expected) and 0 < expected < 1
    for metric in (Bleu(), Bleu(tokenize="zh"), Chrf(), Chrf(word_order=2), Rouge(), Rouge(variant="1"), Ter(), Edit()):
        assert metric.measure("我们 the cat sat down", ("我们 the cat sat down",)) == pytest.approx(1.0)


def test_metrics_need_references():
    with pytest.raises(OperantError, match="'bleu' compares with references and prompt 'q' has none"):
        Bleu()(prompt(id="q"), completion("a"))
    with pytest.raises(OperantError, match="2 of 3 prompts have none"):
        check_references(Sum([Repetition(), Chrf()]), [prompt("a"), prompt(), prompt()])
    check_references(Sum([Repetition(), Length(target=3)]), [prompt()])
    with pytest.raises(OperantError):
        check_references(Length(), [prompt()])


def test_unspaced_references_warn_about_the_tokenizer(caplog):
    check_references(Bleu(), [prompt("我们今天去了北京")])
    assert "use zh or ja-mecab" in caplog.text
    caplog.clear()
    check_references(Sum([Bleu(tokenize="zh")]), [prompt("我们今天去了北京")])
    check_references(Bleu(), [prompt("we went to Beijing")])
    assert not caplog.text


def test_corpus_metrics_are_sacrebleus():
    texts = ["the cat sat on the mat", "a dog ran away", "the the"]
    references = [["the cat sat on a mat"], ["a dog ran", "the dog ran away"], ["the the"]]
    names = ("bleu", "chrf", "chrf++", "ter", "exact", "rougeL", "edit")
    found = corpus_metrics(texts, references, names)
    streams = [[row[0] for row in references], [None, "the dog ran away", None]]
    assert found["bleu"] == pytest.approx(sacrebleu.BLEU().corpus_score(texts, streams).score)
    assert found["chrf"] == pytest.approx(sacrebleu.CHRF().corpus_score(texts, streams).score)
    assert found["exact"] == pytest.approx(1 / 3)
    assert found["length"] == pytest.approx(12 / 3) and found["distinct1"] == pytest.approx(9 / 12)
    assert found["distinct2"] == pytest.approx(9 / 9)
    chinese = corpus_metrics(["我们去北京"], [["我们去上海"]], ("bleu",), tokenize="zh")
    assert 0 < chinese["bleu"] < 100
    for bad in ([], ["x"]):
        with pytest.raises(OperantError):
            corpus_metrics(bad, [[]] * len(bad))
    with pytest.raises(OperantError, match="unknown corpus metric 'blue'"):
        corpus_metrics(["a"], [["a"]], ("blue",))
    assert distinct_n([], 2) == 0.0


# Combinations


def constant(value, name):
    return Reward(lambda prompt, completion: value, name, in_process=True)


def run_one(reward, row=None, **kwargs):
    with RewardRunner(reward, workers=0) as runner:
        return runner.run([(prompt("ab"), row or completion("ab"))], **kwargs)[0]


def test_sum_logs_each_part():
    reward = Sum([constant(2.0, "two"), constant([1.0, 0.0, 3.0], "dense")], [0.5, 2.0])
    trajectory = run_one(reward)
    assert trajectory.rewards.tolist() == [2, 0, 7] and trajectory.parts == {"two": 2.0, "dense": 4.0}
    assert reward(prompt(), completion("ab")).tolist() == [2, 0, 7]
    twice = run_one(Sum([constant(1.0, "same"), constant(2.0, "same")]))
    assert twice.parts == {"same": 1.0, "same_2": 2.0}


def test_a_missing_part_makes_the_whole_missing():
    for reward in (
        Sum([constant(1.0, "a"), constant(None, "b")]),
        Product([constant(0.0, "a"), constant(None, "b")]),
        Gate(constant(0.0, "a"), constant(None, "b")),
        RunningNorm(constant(None, "b")),
        Clip(constant(None, "b")),
    ):
        trajectory = run_one(reward)
        assert trajectory.missing.startswith("none") and not trajectory.observed.any()
        assert trajectory.parts["b"] is None and trajectory.parts.get("a", 1.0) is not None
    assert Sum([constant(None, "b")])(prompt(), completion("a")) is None


def test_a_total_with_an_unknown_token_is_unknown():
    half = constant([1.0, None, 2.0], "half")
    norm = RunningNorm(half)
    for reward in (Clip(half, 0, 9), Gate(half, constant(1.0, "a")), Gate(constant(1.0, "a"), half), norm,
                   Product([half, constant(1.0, "a")]), Sum([constant(1.0, "a"), Clip(half)])):  # fmt: skip
        with RewardRunner(reward, workers=0) as runner:
            (trajectory,) = runner.run([(prompt(), completion("ab"))])
            assert trajectory.missing == "partial: the total of a part with a missing token is not known"
            assert not trajectory.observed.any() and trajectory.parts["half"] == 3.0
            assert runner.counts == {"partial": 1}
        assert reward(prompt(), completion("ab")) is None
    assert norm.count == 0
    known = run_one(Sum([half, constant(1.0, "a")]))  # token by token
    assert known.observed.tolist() == [True, False, True] and known.rewards[known.observed].tolist() == [1, 3]


def test_product_gate_and_clip():
    assert run_one(Product([constant(0.5, "a"), constant(0.5, "b")])).rewards.tolist() == [0, 0, 0.25]
    assert run_one(Gate(constant(0.4, "a"), constant(2.0, "b"), closed=-1)).rewards.tolist() == [0, 0, -1]
    assert run_one(Gate(constant(0.4, "a"), constant(2.0, "b"), threshold=0.4)).rewards.tolist() == [0, 0, 2]
    assert run_one(Clip(constant(2.0, "a"), 0, 1)).rewards.tolist() == [0, 0, 1]
    assert run_one(Clip(constant(-2.0, "a"), 0, 1)).rewards.tolist() == [0, 0, 0]
    with pytest.raises(OperantError, match="sum the dense 'bleu' away"):
        Product([Bleu(dense=True), Repetition()])
    with pytest.raises(OperantError, match="one to each"):
        Sum([Repetition()], [1.0, 2.0])


def test_over_a_dense_part_only_the_last_token_learns_the_outcome():
    dense = Reward(lambda prompt, completion: [1.0, 2.0, 3.0], "d", dense=True, in_process=True)
    assert run_one(Gate(constant(0.0, "g"), dense)).rewards.tolist() == [1, 2, -3]
    assert run_one(Gate(constant(1.0, "g"), dense)).rewards.tolist() == [1, 2, 3]
    assert run_one(Clip(dense, 0, 4)).rewards.tolist() == [1, 2, 1]
    assert Clip(dense).dense and Sum([dense, constant(1, "c")]).dense and not Gate(dense, constant(1, "c")).dense


def test_running_normalisation_learns_in_training_only_and_resumes():
    values = iter([1.0, 3.0, 5.0, 7.0, 9.0, 9.0])
    norm = RunningNorm(Reward(lambda prompt, completion: next(values), "v", in_process=True))
    reward = Sum([norm])
    pairs = [(prompt(), completion("ab"))] * 2
    with RewardRunner(reward, workers=0) as runner:
        first = runner.run(pairs)
        assert [t.rewards.sum() for t in first] == pytest.approx([-1, 1])
        assert first[0].parts == {"v": 1.0}
        second = runner.run(pairs)
        deviation = np.std([1, 3, 5, 7])
        assert [t.rewards.sum() for t in second] == pytest.approx([1 / deviation, 3 / deviation])
        held_out = runner.run(pairs, update=False)
        assert [t.rewards.sum() for t in held_out] == pytest.approx([5 / deviation] * 2)
        state = runner.state_dict()
    other = RunningNorm(constant(0.0, "v"))
    with RewardRunner(Sum([other]), workers=0) as runner:
        runner.load_state_dict(state)
    assert (other.count, other.mean, other.squares) == (norm.count, norm.mean, norm.squares) == (4, 4.0, 20.0)
    with pytest.raises(OperantError), RewardRunner(RunningNorm(constant(0.0, "v")), workers=0) as runner:
        runner.load_state_dict(RewardRunner(constant(0.0, "v")).state_dict())


def test_held_out_rewards_are_paid_before_normalisation_wherever_it_stands():
    values = iter([2.0, 6.0, 8.0])
    norm = RunningNorm(Reward(lambda prompt, completion: next(values), "v", in_process=True))
    reward = Sum([Clip(norm, -9, 9), constant([1.0, 0.0, 0.0], "w")], [0.5, 2.0])
    with RewardRunner(reward, workers=0) as runner:
        runner.run([(prompt(), completion("ab"))] * 2)
        (held_out,) = runner.run([(prompt(), completion("ab"))], update=False, scaled=False)
    assert held_out.rewards.tolist() == [2, 0, 4] and held_out.parts == {"v": 8.0, "w": 1.0}
    assert (norm.count, norm.mean) == (2, 4.0)


# Streaming


class NoShouting:
    """Pays 0.1 a character and ends a completion at its first exclamation mark."""

    def start(self, prompt):
        return self

    def step(self, token, text):
        return Stop(-1.0) if "!" in text else 0.1 * len(text)


def test_streaming_rewards_replay_and_use_what_was_paid_while_sampling():
    rewards, stop = run_stream(NoShouting(), prompt(), completion("ab!cd"))
    assert rewards == pytest.approx([0.1, 0.1, -1, 0, 0, 0]) and stop == 2
    rewards, stop = run_stream(NoShouting(), prompt(), completion("ab"))
    assert rewards == pytest.approx([0.1, 0.1, 0.0]) and stop is None
    reward = as_reward(NoShouting())
    assert isinstance(reward, Streaming) and reward.streaming and reward.dense and reward.name == "NoShouting"
    row = completion("ab!cd")
    assert run_one(reward, row).rewards == pytest.approx([0.1, 0.1, -1, 0, 0, 0])
    row.stream_rewards = np.array([1, 2, 3, 4, 5, 6], dtype=np.float32)
    assert run_one(reward, row).rewards.tolist() == [1, 2, 3, 4, 5, 6]


class Counting:
    """Pays its number for every token and wants to end at token `last`."""

    def __init__(self, pays, last=99):
        self.pays, self.last, self.name = pays, last, f"pays{pays}"

    def start(self, prompt):
        fresh = Counting(self.pays, self.last)
        fresh.seen = 0
        return fresh

    def step(self, token, text):
        self.seen += 1
        return Stop(10 * self.pays) if self.seen == self.last else self.pays


def test_a_combination_streams_and_ends_when_a_part_asks():
    reward = Sum([Clip(Counting(1.0, last=3)), Length(target=3), Counting(2.0)], [0.5, 1.0, -1.0])
    assert reward.streaming and not Sum([Length(target=3)]).streaming
    session = reward.start(prompt())
    assert [session.step(0, "a"), session.step(0, "b")] == [0.5 - 2.0] * 2
    assert session.step(0, "c") == Stop(5.0 - 2.0)
    assert session.parts == {0: [1.0, 1.0, 10.0], 2: [2.0, 2.0, 2.0]}
    assert session.step(0, "d") == 0.5 - 2.0  # an audited row goes on; what it was paid does not
    assert session.parts == {0: [1.0, 1.0, 10.0, 0.0], 2: [2.0, 2.0, 2.0, 0.0]}


@pytest.mark.parametrize("workers", [0, 1])
def test_each_part_of_a_streamed_combination_is_paid_what_its_own_stream_said(workers):
    reward = Sum([Counting(1.0), RunningNorm(Counting(2.0))], [0.5, 1.0])
    row = completion("abc")
    row.stream_rewards = np.full(4, -7, np.float32)  # the combination's own record, which belongs to no part
    row.meta["stream_parts"] = {0: [1.0, 2.0, 3.0, 4.0], 1: [5.0, 5.0, 5.0, 5.0]}
    with RewardRunner(reward, workers=workers) as runner:
        (told,) = runner.run([(prompt(), row)], update=False)
    assert told.rewards == pytest.approx([5.5, 6.0, 6.5, 7.0]) and told.parts == {"pays1.0": 10.0, "pays2.0": 20.0}
    assert told.completion is row
    assert reward(prompt(), row) == pytest.approx([5.5, 6.0, 6.5, 7.0])


class Sluggish:
    """Sleeps, or loops and swallows what it can, at its second token."""

    def __init__(self, swallows=False):
        self.swallows = swallows

    def start(self, prompt):
        self.seen = 0
        return self

    def step(self, token, text):
        self.seen += 1
        begun = time.monotonic()
        while self.seen == 2 and time.monotonic() - begun < 20:
            if not self.swallows or time.monotonic() - begun > 0.4:
                time.sleep(20)
            try:
                time.sleep(20)
            except Exception:
                continue
        return 1.0


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="interrupting needs POSIX timers")
@pytest.mark.parametrize("swallows", [False, True])
def test_a_streaming_reward_that_hangs_is_interrupted(swallows):
    handler, mine = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)[0]
    begun = time.monotonic()
    session = Limited(Sluggish(swallows), 0.1).start(prompt())
    assert session.step(0, "a") == 1.0
    with pytest.raises(Exception, match=r"over 0\.1 s for one token"):
        session.step(0, "b")
    assert time.monotonic() - begun < 10
    assert session.step(0, "c") == 1.0
    assert signal.getsignal(signal.SIGALRM) is handler  # and somebody else's alarm goes on
    assert (signal.getitimer(signal.ITIMER_REAL)[0] > 0) == (mine > 0)


def test_in_another_thread_a_slow_step_is_noticed_afterwards():
    found = []

    def work():
        session = Limited(Sluggish(), 0.01).start(prompt())
        session.session.step = lambda token, text: time.sleep(0.05)
        try:
            session.step(0, "a")
        except Exception as error:
            found.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == ["over 0.01 s for one token"]


@pytest.mark.parametrize(
    ("fault", "reason", "told"),
    [
        ("StreamTimeout: over 3 s for one token", "timeout", "timeout: over 3 s for one token"),
        ("ValueError: a: b", "raised", "raised: ValueError: a: b"),
    ],
)
def test_a_stream_that_failed_while_sampling_is_missing_and_not_tried_again(fault, reason, told):
    row = completion("ab")
    row.meta["stream_fault"] = fault
    with RewardRunner(Counting(1.0), workers=0) as runner:
        (trajectory,) = runner.run([(prompt(), row)])
    assert trajectory.missing == told and not trajectory.observed.any() and runner.counts == {reason: 1}


def test_a_reward_says_which_metrics_it_optimises():
    def mine(prompt, completion):
        return 0.0

    mine.optimises = ("chrf", "bleu")
    streaming = Counting(1.0)
    streaming.optimises = "exact"
    assert optimised_metrics(as_reward(mine)) == ["bleu", "chrf"]
    assert optimised_metrics(Sum([Clip(mine), streaming, Length(target=3)])) == ["bleu", "chrf", "exact"]
    assert optimised_metrics(Reward(mine, optimises=("rougeL",))) == ["rougeL"]


# Names


def test_every_built_in_has_a_name():
    for name in reward_names():
        if name in ("model", "learned", "similarity", "judge"):  # these need a folder or an endpoint
            continue
        reward = reward_by_name("format(pattern='a')" if name == "format" else name)
        assert reward.name == name


def test_options_by_keyword_and_in_the_text():
    assert reward_by_name("bleu", dense=True, potential="prefix", tokenize="zh") == Bleu(True, "prefix", "zh")
    assert reward_by_name('bleu(tokenize="zh", dense=True)') == Bleu(dense=True, tokenize="zh")
    assert reward_by_name("bleu(tokenize=zh, dense=true)", dense=None) == Bleu(dense=True, tokenize="zh")
    assert reward_by_name("bleu(dense=False)", potential="prefix") == Bleu()
    assert reward_by_name("chrf++(beta=3)") == Chrf(word_order=2, beta=3)
    assert reward_by_name("rouge2") == Rouge(variant="2")
    assert reward_by_name("exact", dense=False) == Exact()


def test_sums_products_and_combinations():
    reward = reward_by_name("bleu + 0.2*length(target=4) - repetition * 0.5 + chrf++", dense=True)
    assert isinstance(reward, Sum) and reward.weights == [1.0, 0.2, -0.5, 1.0]
    assert [child.name for child in reward.children] == ["bleu", "length", "repetition", "chrf++"]
    assert [child.dense for child in reward.children] == [True, False, False, True]
    assert reward_by_name("2*(bleu - chrf)").weights == [2.0, -2.0]
    assert isinstance(reward_by_name("exact * repetition"), Product)
    gate = reward_by_name("gate(format(pattern='a:b.*'), bleu(dense=True), threshold=0.3)")
    assert isinstance(gate, Gate) and gate.threshold == 0.3 and gate.children[0].pattern == "a:b.*" and gate.dense
    clip = reward_by_name("clip(norm(chrf), -1, 2)")
    assert isinstance(clip, Clip) and (clip.low, clip.high) == (-1, 2) and isinstance(clip.children[0], RunningNorm)
    listed = reward_by_name(["chrf", {"name": "bleu", "weight": 0.5, "tokenize": "zh"}], dense=True)
    assert listed.weights == [1.0, 0.5] and listed.children[1] == Bleu(dense=True, tokenize="zh")


def test_module_function(tmp_path, monkeypatch):
    (tmp_path / "own_rewards.py").write_text(
        "def politeness(prompt, completion, weight=1.0):\n    return weight * completion.text.count('please')\n"
        "made = []\n"
        "class Shout:\n    def __init__(self, mark='!'):\n        self.mark = mark\n        made.append(mark)\n"
        "    def __call__(self, prompt, completion):\n        return float(self.mark in completion.text)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    reward = reward_by_name("own_rewards:politeness")
    assert reward.name == "politeness" and reward(prompt(), completion("please please")) == 2
    weighted = reward_by_name("own_rewards:politeness(weight=3) + own_rewards:Shout(mark='?')")
    trajectory = run_one(weighted, completion("please?"))
    assert trajectory.rewards[-1] == 4.0 and set(trajectory.parts) == {"politeness", "Shout"}
    # a class is made when the reward is, not to look what it can do
    assert has_potential("bleu + own_rewards:Shout") and not has_potential("own_rewards:Shout(mark='.')")
    assert sys.modules["own_rewards"].made == ["?"]
    with pytest.raises(OperantError, match=r"has no 'polite'; did you mean 'politeness'"):
        reward_by_name("own_rewards:polite")
    with pytest.raises(OperantError, match=r"no part of reward .* takes the option 'dense'"):
        reward_by_name("own_rewards:politeness", dense=True)


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("blue", {}, "unknown reward 'blue'; did you mean 'bleu'"),
        ("rougel", {}, "did you mean 'rougeL'"),
        ("qqqqq", {}, "use one of bleu"),
        ("bleu(tokenise='zh')", {}, "no option 'tokenise'; did you mean 'tokenize'"),
        ("bleu(tokenize='jp')", {}, "unknown tokenize 'jp'; use one of"),
        ("bleu(dense='yes')", {}, "option 'dense' of reward 'bleu' is a bool"),
        ("exact(dense=True)", {}, "no dense form"),
        ("exact", {"dense": True}, "takes the option 'dense'"),
        ("chrf", {"tokenise": "zh"}, "did you mean 'tokenize'"),
        ("bleu(", {}, "is not understood"),
        ("bleu('zh')", {}, "write name=value"),
        ("bleu / chrf", {}, "is not understood"),
        ("__import__('os').system('true')", {}, "is not understood"),
        ("format", {}, "needs a regular expression"),
        ("format(pattern='(')", {}, "broken pattern"),
        ("gate(bleu)", {}, "write gate"),
        ("clip(chrf, low=zh)", {}, "write clip(reward, 0, 1)"),
        ("repetition(n=0)", {}, "n is 0"),
        ("bleu(max_ngram_order=0)", {}, "max_ngram_order is 0"),
        ("fractions:Fraction(kk=2)", {}, "cannot make 'fractions:Fraction' (TypeError: "),
        ("zipfile:ZipFile(file='/none')", {}, "cannot make 'zipfile:ZipFile' (FileNotFoundError: [Errno 2]"),
        ("model(~/none)", {}, f"there is no reward model at {os.path.expanduser('~/none')};"),
        ("similarity(~/none)", {}, f"there is no model at {os.path.expanduser('~/none')}"),
        ("no_such_module_anywhere:f", {}, "cannot be imported"),
        ([], {}, "list of rewards is empty"),
        ([{"name": "bleu", "wieght": 2}], {}, "no option 'wieght'"),
        (3, {}, "must be a function"),
    ],
    ids=str,
)
def test_faults_are_one_line_with_the_fix(spec, options, message):
    with pytest.raises(OperantError) as error:
        reward_by_name(spec, **options)
    assert message in str(error.value) and "\n" not in str(error.value)
