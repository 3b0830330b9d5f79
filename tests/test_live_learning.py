"""One rating moves its text the right way, within the budget; every event is told what became of it."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from live import MemoryStore, Stored, anchors_of, answered, logprob, reader_of

from operant.config import LiveConfig
from operant.live.learning import step
from operant.live.learning.anchors import asked_in_chat
from operant.live.learning.gate import divergence, fast_gate, off_policy_value, sense_gate, sense_metrics, slow_gate
from operant.live.learning.lesson import LearnerState, Lesson, prepare
from operant.live.learning.origin import Origin
from operant.live.learning.questions import QUESTIONS
from operant.live.learning.step import StepResult, new_learner, rating_loss, take_step
from operant.models.policy import Policy
from operant.types import Batch, OperantError

FAMILIES = ["gpt2", "t5"]
SOUND = {"repeated": 0.1, "length": 20.0, "empty": 0.0, "commonest": 0.125}
Make = Callable[..., Policy]


def read(policy: Policy, store: MemoryStore, config: LiveConfig | None = None, **options: Any) -> Lesson:
    events = options.pop("events", store.events_after(0, 1000))
    state = options.pop("state", LearnerState())
    config = config or LiveConfig()
    return prepare(events, reader_of(policy, store, config), state, config, seed=5, **options)


def learn(policy: Policy, store: MemoryStore, config: LiveConfig | None = None, **options: Any) -> StepResult:
    config = config or LiveConfig()
    return take_step(
        policy, new_learner(policy, config), read(policy, store, config, **options), anchors_of(policy), config
    )


def total(policy: Policy, stored: Stored) -> float:
    assert stored.completion is not None
    return float(logprob(policy, stored.prompt, stored.completion.tokens).sum())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("kind", "value", "up"),
    [("thumb", 1, True), ("thumb", -1, False), ("thumb", 0, False), ("score", 0.9, True), ("score", 0.2, False)],
)
def test_one_rating_moves_its_text_the_right_way(
    family: str, kind: str, value: float, up: bool, make_policy: Make
) -> None:
    policy = make_policy(family)
    store = answered(policy)
    event = store.add("c1", kind, value)
    before = total(policy, store.interactions["c1"])
    taught = learn(policy, store)
    after = total(policy, store.interactions["c1"])
    outcome = taught.outcomes[event.id]
    assert outcome.state == "used" and taught.moved
    assert (after > before + 1e-3) if up else (after < before - 1e-3)
    assert outcome.logprob_before == pytest.approx(before, abs=1e-3)
    assert outcome.logprob_after == pytest.approx(after, abs=1e-3)
    assert outcome.advantage == pytest.approx({1: 1.0, -1: -1.0, 0: -1.0, 0.9: 0.8, 0.2: -0.6}[value])


@pytest.mark.parametrize("family", FAMILIES)
def test_an_edit_raises_the_edited_text_over_the_original(family: str, make_policy: Make) -> None:
    policy = make_policy(family)
    store = answered(policy)
    event = store.add("c0", "edit", "the dog sat")
    stored = store.interactions["c0"]
    edited = policy.codec.encode("the dog sat", eos=True, target=family == "t5")
    old = float(logprob(policy, stored.prompt, edited).sum()), total(policy, stored)
    taught = learn(policy, store)
    new = float(logprob(policy, stored.prompt, edited).sum()), total(policy, stored)
    assert new[0] > old[0] + 1e-3
    assert new[0] - new[1] > old[0] - old[1] + 1e-3
    assert taught.outcomes[event.id].logprob_after == pytest.approx(new[0], abs=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_comparison_raises_the_chosen_text_over_the_other(family: str, make_policy: Make) -> None:
    policy = make_policy(family)
    store = answered(policy, 8)  # c0 and c4 answer the same words
    second = store.interactions["c4"]
    second.prompt = dataclasses.replace(second.prompt, id="another request")
    event = store.add("c4", "comparison", "c0")
    old = total(policy, second) - total(policy, store.interactions["c0"])
    taught = learn(policy, store)
    assert taught.outcomes[event.id].state == "used"
    assert total(policy, second) - total(policy, store.interactions["c0"]) > old + 1e-3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("value", [1.0, -1.0])
def test_a_span_gives_its_own_tokens_a_gradient_and_no_others(family: str, value: float, make_policy: Make) -> None:
    from operant.live.learning import step

    policy = make_policy(family)
    store = answered(policy, max_tokens=12)
    stored = next(s for s in store.interactions.values() if s.completion is not None and len(s.completion.text) > 6)
    completion = stored.completion
    assert completion is not None
    event = store.add(completion.id, "span", value, span=(2, 4))
    lesson = read(policy, store)
    (row,) = lesson.rated
    (first,) = np.flatnonzero(row.marked[:1] | (np.cumsum(row.marked) == 1))[:1]
    assert 0 < row.marked.sum() < len(completion.tokens)
    # the tokens are those that hold the characters
    covered = policy.codec.decode(completion.tokens[: first + row.marked.sum()])
    assert completion.text[:4] in covered and completion.text[:4] not in policy.codec.decode(completion.tokens[:first])
    config = LiveConfig()
    batch = step._rating_batch(policy, lesson.rated, config)
    logprobs = policy.logprobs(batch).logprobs.detach().requires_grad_()
    loss = (rating_loss(logprobs, batch, config.correction_band)[0] * batch.weights).sum()
    (gradient,) = torch.autograd.grad(loss, logprobs)
    start = 0 if family == "t5" else len(stored.prompt.tokens)
    own = gradient[0, start : start + len(row.marked)]
    assert torch.equal(own != 0, torch.from_numpy(row.marked))
    assert bool((own[torch.from_numpy(row.marked)] * value < 0).all())
    assert not bool(gradient[0, :start].any())
    old = logprob(policy, stored.prompt, completion.tokens)[row.marked].sum()
    taught = learn(policy, store)
    new = logprob(policy, stored.prompt, completion.tokens)[row.marked].sum()
    assert (new - old) * value > 1e-3
    assert taught.outcomes[event.id].logprob_after == pytest.approx(float(new), abs=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lr", [1e-4, 0.05, 1.0])
@pytest.mark.parametrize("budget", [1e-4, 0.02])
def test_the_step_stays_within_the_kl_budget_whatever_the_rating(
    family: str, lr: float, budget: float, make_policy: Make
) -> None:
    config = LiveConfig(lr=lr, kl_budget=budget)
    for kind, value in (("thumb", 1), ("thumb", -1), ("edit", "five four three")):
        policy = make_policy(family)
        store = answered(policy)
        store.add("c2", kind, value)
        anchors = anchors_of(policy)
        reference = anchors.logits(policy, 4096)
        taught = learn(policy, store, config)
        measured = divergence(anchors.logits(policy, 4096), reference)
        assert measured <= budget
        assert taught.moved and taught.kl == pytest.approx(measured, rel=1e-3, abs=1e-9)
        assert measured > 0
        if lr == 1.0:
            assert taught.scale < 1  # the budget, and not luck


def test_without_a_share_that_keeps_the_budget_nothing_moves_and_it_is_told(make_policy: Make) -> None:
    policy = make_policy("gpt2")
    store = answered(policy)
    event = store.add("c1", "thumb", 1)
    before = [p.detach().clone() for p in policy.trainable_parameters()]
    taught = learn(policy, store, LiveConfig(lr=1e-3, kl_budget=1e-300))
    assert not taught.moved
    assert all(torch.equal(a, b) for a, b in zip(before, policy.trainable_parameters(), strict=True))
    assert taught.outcomes[event.id].state == "unused" and "KL budget" in taught.outcomes[event.id].reason


def test_every_event_is_told_what_became_of_it(make_policy: Make) -> None:
    policy = make_policy("gpt2")
    store = answered(policy, 8)
    greedy = answered(policy, 2, temperature=0.0)
    store.interactions |= {"g0": greedy.interactions["c0"], "g1": greedy.interactions["c1"]}
    store.interactions["empty"] = Stored("empty", store.interactions["c0"].prompt, None)
    plain = store.interactions["c6"]
    assert plain.completion is not None
    store.interactions["blind"] = Stored(
        "blind", plain.prompt, dataclasses.replace(plain.completion, behavior_logprobs=None)
    )
    store.interactions["foreign"] = Stored(
        "foreign", plain.prompt, dataclasses.replace(plain.completion, tokenizer_hash="other")
    )
    expected = {
        store.add("c0", "thumb", 1).id: ("superseded", "a later one stands"),
        store.add("c0", "thumb", -1).id: ("used", ""),
        store.add("c1", "comment", "nice").id: ("unused", "comment teaches nothing"),
        store.add("nobody", "thumb", 1).id: ("unused", "completion unknown"),
        store.add("empty", "thumb", 1).id: ("unused", "tokens missing"),
        store.add("blind", "thumb", 1).id: ("unused", "log-probs missing"),
        store.add("foreign", "thumb", 1).id: ("unused", "completion of another tokenizer"),
        store.add("c1", "score", 0.5).id: ("unused", "advantage 0: the rating equals the baseline"),
        store.add("c1", "score", 7, source="bob").id: ("unused", "score outside 0 to 1"),
        store.add("c1", "thumb", "maybe", source="eve").id: ("unused", "thumb is neither up nor down"),
        store.add("g0", "thumb", -1).id: ("unused", "greedy completion has no propensity"),
        store.add("g1", "thumb", 1).id: ("used", ""),
        store.add("c2", "span", 1.0, span=(0, 9999)).id: ("unused", "span outside the text"),
        store.add("c2", "span", 5.0, span=(0, 1)).id: ("unused", "span value outside -1 to 1"),
        store.add("c2", "span", 1.0).id: ("unused", "span without characters"),
        store.add("c3", "comparison", "nobody").id: ("unused", "the other completion is unknown"),
        store.add("c3", "comparison", "c0").id: ("unused", "comparisons across prompts"),
        store.add("c3", "edit", "").id: ("unused", "edits that are empty"),
        store.add("c5", "edit", "word " * 200).id: ("unused", "longer than the model holds"),
        store.add("c4", "thumb", 1).id: ("unused", "retracted"),
        store.add("c4", "retract", None).id: ("unused", "takes back e20"),
        store.add("c7", "retract", None).id: ("unused", "there is nothing to take back"),
        store.add("c7", "retract", "e99").id: (
            "unused", "taken back after version 4 had learned from it; roll back to before that to forget it"
        ),
    }  # fmt: skip
    taught = learn(policy, store, learned={"e99": 4})
    assert {name: (o.state, o.reason) for name, o in taught.outcomes.items()} == expected


def test_a_step_that_nothing_teaches_leaves_everything_as_it_was(make_policy: Make) -> None:
    policy = make_policy("gpt2")
    store = answered(policy)
    store.add("c1", "comment", "hm")
    config = LiveConfig()
    learner = new_learner(policy, config)
    taught = take_step(policy, learner, read(policy, store), anchors_of(policy), config)
    assert not taught.moved and learner.steps == 0


def test_bad_ratings_weigh_at_most_one_and_none_once_the_policy_has_left(make_policy: Make) -> None:
    mask = torch.ones(4, 2, dtype=torch.bool)
    old = torch.tensor([[-5.0, -5.0], [-1.0, -1.0], [-1.0, -2.0], [-5.0, -5.0]])
    behavior = torch.tensor([[-1.0, -1.0], [-9.0, -9.0], [-1.0, -1.5], [-1.0, -1.0]])
    batch = Batch(
        tokens=torch.zeros(4, 2), position_ids=mask, segment_ids=mask, action_mask=mask, weights=mask, denominator=1.0,
        old_logprobs=old, behavior_logprobs=behavior, advantages=torch.tensor([[2.0], [-1.0], [-1.0], [-1.0]]),
    )  # fmt: skip
    loss, near = rating_loss(old, batch, band=1.0)
    assert near[:, 0].tolist() == [0, 1, 1, 0]
    # good: full weight, band or not; bad: min(π/μ, 1) per token, 0 below the band
    expected = [[10.0, 10.0], [-1.0, -1.0], [-1.0, -2.0 * math.exp(-0.5)], [0.0, 0.0]]
    assert torch.allclose(loss, torch.tensor(expected), atol=1e-6)


def test_a_bad_rating_of_a_text_that_is_no_longer_said_is_told(make_policy: Make) -> None:
    policy = make_policy("gpt2")
    store = answered(policy)
    stored = store.interactions["c0"]
    assert stored.completion is not None and stored.completion.behavior_logprobs is not None
    stored.completion.behavior_logprobs = stored.completion.behavior_logprobs + np.float32(3.0)
    event = store.add("c0", "thumb", -1)
    lesson = read(policy, store)
    config = LiveConfig()
    taught = take_step(policy, new_learner(policy, config), lesson, anchors_of(policy), config)
    assert not taught.moved and "moved too far" in taught.outcomes[event.id].reason
    assert lesson.state.memory == []


def test_the_baseline_is_used_first_and_updated_afterwards_per_route(make_policy: Make) -> None:
    policy = make_policy("gpt2")
    store = answered(policy)
    other = store.interactions["c3"]
    other.prompt = dataclasses.replace(other.prompt, task="translate")
    store.add("c0", "score", 1.0)
    store.add("c1", "score", 0.75)
    store.add("c3", "thumb", -1)
    lesson = read(policy, store, LiveConfig(baseline_rate=0.5), state=LearnerState({"talk": 0.2}))
    assert [r.reward for r in lesson.rated] == [1.0, 0.5, -1.0]  # what was said is kept beside what it teaches
    assert [round(r.advantage, 6) for r in lesson.rated] == [0.8, 0.3, -1.0]
    assert lesson.state.baselines == pytest.approx({"talk": 0.2 + 0.5 * (0.75 - 0.2), "translate": -0.5})


def test_a_later_opinion_or_a_retraction_ends_the_replay_of_an_earlier_one(make_policy: Make) -> None:
    policy = make_policy("gpt2")
    store = answered(policy)
    config = LiveConfig(replay_events=8)
    for name in ("c0", "c1", "c2"):
        store.add(name, "thumb", 1)
    first = read(policy, store, config)
    assert [m["event"]["id"] for m in first.state.memory] == ["e1", "e2", "e3"] and not first.rehearsed
    store.add("c0", "retract", None)
    store.add("c1", "score", 0.1)
    second = read(policy, store, config, events=store.events_after(3, 10), state=first.state)
    assert second.rehearsed == ["e3"] and second.forgotten == ["e1", "e2"]
    assert [m["event"]["id"] for m in second.state.memory] == ["e3", "e5"]
    assert [r.event.id for r in second.fresh] == ["e5"]
    rehearsed = next(r for r in second.rated if r.event.id == "e3")
    assert rehearsed.advantage == pytest.approx(1.0 - first.state.baselines["talk"])  # what it is worth by now
    taught = take_step(policy, new_learner(policy, config), second, anchors_of(policy), config)
    assert set(taught.outcomes) == {"e4", "e5"}


def test_praise_of_long_ago_does_not_turn_a_thumb_down_round(make_policy: Make) -> None:
    """Seven thumbs up on the very text that is now rated down: learned with them it would be said more often."""
    policy = make_policy("gpt2")
    store = answered(policy)
    for copy in range(7):
        store.interactions[f"c0-{copy}"] = store.interactions["c0"]
        store.add(f"c0-{copy}", "thumb", 1)
    config = LiveConfig(lr=0.1)
    learner, anchors = new_learner(policy, config), anchors_of(policy)
    first = read(policy, store, config)
    assert take_step(policy, learner, first, anchors, config).moved
    event = store.add("c0", "thumb", -1)
    second = read(policy, store, config, events=store.events_after(7, 10), state=first.state)
    assert len(second.rehearsed) == 7
    before = total(policy, store.interactions["c0"])
    taught = take_step(policy, learner, second, anchors, config)
    assert taught.moved and taught.outcomes[event.id].state == "used"
    assert total(policy, store.interactions["c0"]) < before - 1e-4


def test_no_source_outweighs_another_where_several_are_needed(make_policy: Make) -> None:
    policy = make_policy("gpt2")
    store = answered(policy)
    for name in ("c0", "c1", "c2"):
        store.add(name, "thumb", 1, source="loud")
    store.add("c3", "edit", "a cat", source="quiet")
    lesson = read(policy, store, LiveConfig(min_sources=2))
    assert [r.weight for r in lesson.fresh] == pytest.approx([2 / 3, 2 / 3, 2 / 3, 2.0])
    assert [r.weight for r in read(policy, store).fresh] == [1.0] * 4


def test_a_rating_is_not_paid_with_the_direction_of_earlier_ones(make_policy: Make) -> None:
    policy = make_policy("gpt2")
    store = answered(policy)
    config = LiveConfig(lr=1e-3)
    learner, anchors = new_learner(policy, config), anchors_of(policy)
    state = LearnerState()
    for value in (*[1] * 12, -1, 1):
        before = total(policy, store.interactions["c1"])
        store.add("c1", "thumb", value)
        lesson = read(policy, store, config, events=store.events_after(len(store.log) - 1, 1), state=state)
        state = lesson.state
        taught = take_step(policy, learner, lesson, anchors, config)
        assert taught.moved
        assert (total(policy, store.interactions["c1"]) - before) * value > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_the_pull_keeps_what_a_rating_says_nothing_of(family: str, make_policy: Make) -> None:
    """The same praise eight times over: with the pull the words around it stay nearer to what the anchor says."""
    left: dict[float, float] = {}
    kls: list[float] = []
    for kl_coef in (0.0, 0.3):
        policy = make_policy(family)
        bare, store = deepcopy(policy), answered(policy)
        origin = Origin(bare)
        config = LiveConfig(lr=0.01, kl_coef=kl_coef, kl_budget=10.0)
        learner, anchors, state = new_learner(policy, config), anchors_of(policy), LearnerState()
        begin = total(policy, store.interactions["c1"])
        for _ in range(8):
            store.add("c1", "thumb", 1)
            lesson = read(policy, store, config, events=store.events_after(len(store.log) - 1, 1), state=state)
            state = lesson.state
            taught = take_step(policy, learner, lesson, anchors, config, origin=origin)
            assert taught.moved and taught.stats is not None
            if kl_coef:
                kls.append(taught.stats.extra["kl_anchor"])
                assert 0 <= taught.stats.extra["unlikely"] <= 1
        assert total(policy, store.interactions["c1"]) > begin + 0.1
        left[kl_coef] = divergence(anchors.logits(policy, 4096), anchors.logits(bare, 4096))
    assert left[0.3] < 0.9 * left[0.0]
    assert kls[0] == pytest.approx(0, abs=1e-5) and kls[-1] > 1e-4  # of the answers that are learned from


@pytest.mark.parametrize("family", FAMILIES)
def test_the_pull_on_other_answers_keeps_what_nobody_rated(family: str, make_policy: Make) -> None:
    left: dict[float, float] = {}
    for anchor_coef in (0.0, 0.5):
        policy = make_policy(family)
        bare, store = deepcopy(policy), answered(policy)
        origin, others = Origin(bare), anchors_of(policy)
        config = LiveConfig(lr=1e-3, kl_coef=0.0, anchor_coef=anchor_coef, anchor_pulls=1, kl_budget=10.0)
        learner, state = new_learner(policy, config), LearnerState()
        begin = total(policy, store.interactions["c1"])
        for number in range(8):
            store.add("c1", "thumb", 1)
            lesson = read(policy, store, config, events=store.events_after(number, 1), state=state)
            state, pulled = lesson.state, others.some(policy, 1, seed=number)
            assert len(pulled.tokens) == 1
            assert take_step(policy, learner, lesson, others, config, origin=origin, pulled=pulled).moved
        assert total(policy, store.interactions["c1"]) > begin + 0.1
        left[anchor_coef] = divergence(others.logits(policy, 4096), others.logits(bare, 4096))
    assert left[0.5] < 0.9 * left[0.0]


def test_the_pull_on_other_answers_is_the_kl_of_each_of_their_tokens(make_policy: Make) -> None:
    policy, bare = make_policy("gpt2"), make_policy("gpt2")
    with torch.no_grad():
        for p in policy.model.parameters():
            p.mul_(1.1)
    others = anchors_of(bare)
    pulled = others.some(policy, 2, seed=0)
    with torch.no_grad():
        loss, extra = step._loss_of(LiveConfig(anchor_coef=0.5), Origin(bare), None)(policy, pulled)
    for prompt, answer in zip(others.prompts, others.answers, strict=True):
        row = [*prompt.tokens.tolist(), *answer.tolist()]
        at = pulled.tokens[:, : len(row)].tolist().index(row)
        of, to = (
            one.model(input_ids=torch.tensor([row])).logits[0, len(prompt.tokens) - 1 : -1].double().log_softmax(-1)
            for one in (policy, bare)
        )
        wanted = (0.5 * (of.exp() * (of - to)).sum(-1)).detach()
        assert torch.allclose(loss[at][pulled.action_mask[at]].double(), wanted, atol=1e-5)
        assert float(wanted.max()) > 1e-3
    assert extra == {} and float(loss[~pulled.action_mask].abs().sum()) == 0


@pytest.mark.parametrize(("options", "flag"), [({"score_low": 1.0}, "--score_low"), ({"beta": -0.1}, "--beta")])
def test_settings_that_turn_opinions_round_are_refused(options: dict[str, float], flag: str) -> None:
    with pytest.raises(OperantError, match=flag):
        prepare([], None, LearnerState(), LiveConfig(**options), seed=0)  # type: ignore[arg-type]


# --- the gates and the value of a candidate --------------------------------------------------------------------------


def test_the_divergence_is_that_of_the_new_policy_from_the_old() -> None:
    new, old = torch.tensor([[0.9, 0.1]]), torch.tensor([[0.5, 0.5]])
    expected = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    assert divergence(new.log(), old.log()) == pytest.approx(expected, rel=1e-6)


def test_the_fast_gate_names_each_limit_that_is_broken_and_nan_does_not_pass() -> None:
    torch.manual_seed(0)
    base, tokens = torch.randn(5, 7), torch.arange(5)
    limits = {"kl_budget": 0.1, "drift_budget": 0.1, "likelihood_drop": 0.1}
    assert fast_gate(base, base, base, tokens, kl_parent=0.0, **limits).passed
    moved = base + 3 * torch.randn(5, 7)
    verdict = fast_gate(moved, moved, moved, tokens, kl_parent=divergence(moved, base), **limits)
    assert not verdict.passed and "parent" in verdict.reason and "drift" not in verdict.reason
    verdict = fast_gate(moved, base, moved, tokens, kl_parent=0.0, **limits)
    assert "drift" in verdict.reason and "parent" not in verdict.reason
    worse = base.clone()
    worse[torch.arange(5), tokens] -= 2.0
    loose = {"kl_budget": 99.0, "drift_budget": 99.0, "likelihood_drop": 0.1}
    assert "lost" in fast_gate(worse, worse, base, tokens, kl_parent=0.0, **loose).reason
    better = base.clone()
    better[torch.arange(5), tokens] += 2.0
    assert fast_gate(better, better, base, tokens, kl_parent=0.0, **loose).passed
    assert not fast_gate(base * math.nan, base, base, tokens, kl_parent=0.0, **loose).passed
    assert not fast_gate(base, base, base, tokens, kl_parent=math.nan, **loose).passed


def test_the_slow_gate_lets_a_metric_lose_a_share_and_no_more() -> None:
    anchor = {"bleu": 40.0, "length": 12.0, "distinct2": 0.5}
    assert slow_gate({"bleu": 36.5, "length": 2.0, "distinct2": 0.5}, anchor, 0.1).passed
    assert "bleu" in slow_gate({"bleu": 35.9, "length": 12.0, "distinct2": 0.5}, anchor, 0.1).reason
    assert "bleu" in slow_gate({"distinct2": 0.5}, anchor, 0.1).reason


def test_sense_is_lost_by_answers_that_are_one_that_repeat_themselves_or_that_are_empty(chat_policy: Policy) -> None:
    asked = asked_in_chat(chat_policy, QUESTIONS[-8:], room=24)
    look = functools.partial(sense_metrics, prompts=asked, max_tokens=24, interrupted=lambda: False)
    before = look(chat_policy)
    assert sense_gate(before, before).passed
    ruined = deepcopy(chat_policy)
    with torch.no_grad():  # one token for ever, whatever was asked
        ruined.model.transformer.ln_f.weight.zero_()
        ruined.model.transformer.ln_f.bias.copy_(ruined.model.lm_head.weight[chat_policy.codec.encode("a")[0]])
    found = look(ruined)
    assert found["repeated"] > 0.9 and found["commonest"] == 1.0
    verdict = sense_gate(found, SOUND)
    assert not verdict.passed and "repeat themselves" in verdict.reason and "get one answer" in verdict.reason
    with torch.no_grad():  # nothing at all
        ruined.model.transformer.ln_f.bias.copy_(10 * ruined.model.lm_head.weight[chat_policy.codec.eos_id])
    verdict = sense_gate(look(ruined), SOUND)
    assert not verdict.passed and "are empty" in verdict.reason and "nearly nothing" in verdict.reason


@pytest.mark.parametrize(
    ("changed", "passed"),
    [
        ({"length": 8.0}, True), ({"length": 3.0}, False), ({"repeated": 0.3}, True), ({"repeated": 0.4}, False),
        ({"empty": 0.125}, True), ({"empty": 0.25}, False), ({"commonest": 0.5}, True), ({"commonest": 0.625}, False),
        ({"repeated": math.nan}, False),
    ],
)  # fmt: skip
def test_a_manner_keeps_its_sense(changed: dict[str, float], passed: bool) -> None:
    assert sense_gate(SOUND | changed, SOUND).passed == passed


def test_snips_is_the_candidates_value_where_everything_is_enumerated() -> None:
    """All texts of three tokens over four: logged as often as μ says them, SNIPS and IPS are E_π[r] exactly."""
    rng = np.random.default_rng(0)
    tables = rng.normal(size=(2, 4, 4, 4, 4))

    def logprob(which: int, text: tuple[int, ...]) -> float:
        logits = [tables[which][0, 0, 0], tables[which][text[0], 1, 1], tables[which][text[0], text[1], 2]]
        return sum(float(row[t] - np.log(np.exp(row).sum())) for row, t in zip(logits, text, strict=True))

    texts = list(itertools.product(range(4), repeat=3))
    reward = [float(len(set(text)) - text[0]) for text in texts]
    ours, theirs = ([logprob(which, text) for text in texts] for which in (0, 1))
    exact = sum(math.exp(p) * r for p, r in zip(ours, reward, strict=True))
    counts = [math.exp(p) for p in theirs]
    value = off_policy_value(reward, ours, theirs, counts=counts)
    assert value["snips"] == pytest.approx(exact, abs=1e-12) and value["ips"] == pytest.approx(exact, abs=1e-12)
    chi = sum(math.exp(2 * p - q) for p, q in zip(ours, theirs, strict=True))
    assert value["ess"] == pytest.approx(1 / chi)  # the share of a log that counts is 1 / E_μ[w²]
    # as a log of draws: within its own error, and an honest size
    drawn = rng.choice(len(texts), size=4000, p=np.array(counts) / sum(counts))
    some = off_policy_value(*([column[i] for i in drawn] for column in (reward, ours, theirs)))
    assert abs(some["snips"] - exact) < 4 * some["std_error"] < 0.5
    assert 0.7 < some["ess"] / (4000 / chi) < 1.5
    shifted = off_policy_value([r + 100 for r in reward], ours, theirs, counts=[n * 3 for n in counts])
    assert shifted["snips"] == pytest.approx(exact + 100)  # what plain IPS would not keep on a sample


def test_snips_of_the_policy_that_wrote_is_the_mean_and_no_log_is_an_error() -> None:
    value = off_policy_value([1.0, 0.0, 0.5], [-900.0, -901.0, -902.0], [-900.0, -901.0, -902.0])
    assert value["snips"] == pytest.approx(0.5) and value["ess"] == pytest.approx(3.0)
    with pytest.raises(OperantError, match="propensity"):
        off_policy_value([], [], [])
