"""Properties that hold for any text, batch, reward or order of requests, searched by Hypothesis from fixed seeds."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import sacrebleu
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from potentials import prefixes
from rouge_score.rouge_scorer import RougeScorer

from operant.algorithms import credit
from operant.data.batch import (
    Normalisation,
    completion_axes,
    from_sequences,
    from_trajectories,
    microbatches,
    pack,
    scatter,
    select_rows,
)
from operant.data.text import Codec, chars_to_tokens, tokens_to_chars
from operant.models.policy import Policy
from operant.models.sampler import Sampler
from operant.rewards import Bleu, Chrf, Rouge
from operant.rewards.metrics import rouge_words
from operant.rewards.potentials import dense_rewards
from operant.types import Batch, Completion, Prompt, Sampling, Trajectory


def search(examples: int) -> settings:
    return settings(
        max_examples=examples, deadline=None, derandomize=True, database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
    )  # fmt: skip


AWKWARD = [
    *"ab .,!-'5\n\t\r\x00",
    "你", "好", "。", "한", "й", "é", "e\u0301", "👩‍👩‍👧", "👍🏽", "🏠", "\u200d", "\ufe0f", "\ufffd",
    "\u3000", "\u2028", "\u00a0", "𝔘", "\U0010ffff", "ß", "Σ", "’", "&amp;", "<|eos|>", "the ", "cat ", "我们",
]  # fmt: skip
texts = st.one_of(
    st.lists(st.sampled_from(AWKWARD), max_size=16).map("".join),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
)
CODEC = Codec.train_bpe(["the cat sat on 我们 的 🏠", "naïve 👍🏽 é ’ 你好。", "the cat "] * 4, vocab_size=300)


# --- text and tokens -------------------------------------------------------------------------------------------------


def assert_spans(tokens: np.ndarray) -> None:
    """Whatever the tokens: ends and reach climb, and every character lies in a span of tokens, spans in order."""
    text, ends = CODEC.text_and_ends(tokens)
    reach = CODEC.reach(tokens)
    assert text == CODEC.decode(tokens)
    assert len(ends) == len(reach) == len(tokens)
    assert (np.diff(ends) >= 0).all() and (np.diff(reach) >= 0).all() and (reach >= ends).all()
    if len(tokens):
        assert ends[0] >= 0 and ends[-1] <= len(text) <= reach[-1]
    before = (0, 0)
    for i in range(len(text)):
        t0, t1 = chars_to_tokens(ends, i, i + 1, reach)
        assert 0 <= t0 < t1 <= len(tokens), (text, i)
        assert t0 >= before[0] and t1 >= before[1]
        before = t0, t1
        if i < ends[-1]:
            a, b = tokens_to_chars(ends, t0, t1)
            assert a <= i < b
    for t in range(len(tokens)):  # and every token lies in the span of what it finished
        a, b = tokens_to_chars(ends, t, t + 1)
        if b > a:
            t0, t1 = chars_to_tokens(ends, a, b, reach)
            assert t0 <= t < t1
    streamed = CODEC.incremental()
    pieces = [streamed.push(int(token)) for token in tokens]
    assert "".join(pieces) == streamed.text and streamed.text + streamed.finish() == text
    assert streamed.ends == ends.tolist() and streamed.reach == reach.tolist()


@search(150)
@given(texts)
def test_every_character_of_a_text_belongs_to_tokens(text: str) -> None:
    tokens = CODEC.encode(text, eos=True)
    assert CODEC.decode(tokens) == text and tokens[-1] == CODEC.eos_id
    assert_spans(tokens)
    if text:
        ends, reach = CODEC.text_and_ends(tokens)[1], CODEC.reach(tokens)
        assert chars_to_tokens(ends, 0, len(text), reach) == (0, len(tokens) - 1)


@search(200)
@given(st.lists(st.integers(0, CODEC.vocab_size - 1), max_size=24))
def test_every_character_of_invalid_bytes_belongs_to_tokens(tokens: list[int]) -> None:
    """Any ids: half characters, stray continuation bytes, special tokens in the middle."""
    assert_spans(np.array(tokens, np.int64))


# --- batches ---------------------------------------------------------------------------------------------------------

rows = st.lists(st.integers(3, 60), min_size=1, max_size=9).map(lambda x: np.array(x, np.int64))


@st.composite
def groups_of(draw: st.DrawFn, most: int = 8) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """(number of the prompt, prompt, completion), prompts repeated in any order."""
    prompts = draw(st.lists(rows, min_size=1, max_size=3))
    chosen = draw(st.lists(st.integers(0, len(prompts) - 1), min_size=1, max_size=most))
    return [(i, prompts[i], draw(rows)) for i in chosen]


@st.composite
def trajectories_of(draw: st.DrawFn) -> list[Trajectory]:
    out = []
    for number, prompt, tokens in draw(groups_of()):
        n = len(tokens)
        flags = st.lists(st.booleans(), min_size=n, max_size=n).map(lambda x: np.array(x, np.bool_))
        observed = draw(st.one_of(st.just(np.ones(n, np.bool_)), flags))
        rewards = np.where(
            observed, np.array(draw(st.lists(st.integers(-9, 9), min_size=n, max_size=n)), float), np.nan
        )
        completion = Completion(
            str(len(out)), str(number), "", tokens, np.zeros(n, np.int64), sampled=draw(flags),
            behavior_logprobs=np.arange(n, dtype=np.float32) - n, truncated=draw(st.booleans()),
        )  # fmt: skip
        out.append(Trajectory(Prompt(str(number), prompt), completion, rewards, observed))
    return out


@search(80)
@given(trajectories_of(), st.booleans(), st.data())
def test_a_batch_loses_and_doubles_nothing(given_rows: list[Trajectory], encoder: bool, data: st.DataObject) -> None:
    """Each row's tokens, rewards and log-probs stand in its own columns, also after rows were picked and cut."""
    batch = from_trajectories(given_rows, encoder=encoder, pad_id=0)
    batch.row_ids = torch.arange(len(given_rows))
    picked = data.draw(st.permutations(range(len(given_rows))))[: data.draw(st.integers(1, len(given_rows)))]
    pieces = [batch, select_rows(batch, torch.tensor(picked)), *microbatches(batch, data.draw(st.integers(1, 80)))]
    seen: list[int] = []
    for number, piece in enumerate(pieces):
        assert piece.row_ids is not None and piece.rewards is not None and piece.observed is not None
        assert piece.behavior_logprobs is not None and piece.denominator == batch.denominator
        if number == 1:
            assert piece.row_ids.tolist() == picked
        if number > 1:
            seen += piece.row_ids.tolist()
        for k, i in enumerate(piece.row_ids.tolist()):
            t, start = given_rows[i], 0 if encoder else len(given_rows[i].prompt.tokens)
            whole = t.completion.tokens if encoder else np.concatenate([t.prompt.tokens, t.completion.tokens])
            assert piece.tokens[k, : len(whole)].tolist() == whole.tolist()
            real = piece.segment_ids[k] >= 0
            assert int(real.sum()) == len(whole) and not piece.action_mask[k, ~real].any()
            columns = slice(start, start + len(t.completion.tokens))
            assert piece.action_mask[k, columns].tolist() == t.completion.sampled.tolist()  # type: ignore[union-attr]
            assert not piece.action_mask[k, :start].any()
            assert piece.observed[k, columns].tolist() == t.observed.tolist()
            assert np.array_equal(piece.rewards[k, columns].numpy(), t.rewards, equal_nan=True)
            assert np.array_equal(piece.behavior_logprobs[k, columns].numpy(), t.completion.behavior_logprobs)
            assert piece.prompt_lengths is not None and int(piece.prompt_lengths[k]) == start
            if encoder:
                context = piece.context
                assert context is not None
                assert context.tokens[context.row[k], context.mask[context.row[k]]].tolist() == t.prompt.tokens.tolist()
    assert sorted(seen) == list(range(len(given_rows)))
    rewards, mask, valid = completion_axes(given_rows)
    back = scatter(batch, rewards, given_rows)
    for i, t in enumerate(given_rows):
        start, flags = 0 if encoder else len(t.prompt.tokens), t.completion.sampled
        assert flags is not None
        paid, last = np.zeros(len(flags)), -1
        for place_of, value in enumerate(np.where(t.observed, t.rewards, 0.0)):
            last = place_of if flags[place_of] else last
            if last >= 0:
                paid[last] += value
        np.testing.assert_allclose(back[i, start : start + len(flags)].numpy(), paid, rtol=1e-5, atol=1e-6)
        assert int(mask[i].sum()) == int(flags.sum())
        assert bool(valid[i]) == (bool(t.observed.all()) and bool(flags.any()))


@search(60)
@given(trajectories_of(), st.sampled_from(["per_completion", "per_token", "per_sequence_mean", "constant"]),
       st.booleans(), st.integers(1, 90))  # fmt: skip
def test_cutting_a_batch_leaves_the_loss_as_it_is(
    given_rows: list[Trajectory], normalisation: Normalisation, encoder: bool, most: int
) -> None:
    """Σ weights · loss / denominator over the pieces is the batch's, and weights are what the normalisation says."""
    batch = from_trajectories(given_rows, encoder=encoder, pad_id=0, normalisation=normalisation, constant=7.0)
    loss = torch.sin(batch.tokens.double() * (1 + batch.position_ids))

    def total(piece: Batch) -> float:
        own = torch.sin(piece.tokens.double() * (1 + piece.position_ids))
        return float((own * piece.weights).sum() / piece.denominator)

    assert sum(map(total, microbatches(batch, most))) == pytest.approx(total(batch), abs=1e-9)
    acted = [loss[i, batch.action_mask[i]] for i in range(len(given_rows)) if batch.action_mask[i].any()]
    if acted:
        expected = {
            "per_completion": sum(float(x.sum()) for x in acted) / len(acted),
            "per_token": float(torch.cat(acted).mean()),
            "per_sequence_mean": sum(float(x.mean()) for x in acted) / len(acted),
            "constant": sum(float(x.sum()) for x in acted) / (7.0 * len(acted)),
        }
        assert total(batch) == pytest.approx(expected[normalisation], abs=1e-6)


@search(12)
@given(st.lists(rows, min_size=1, max_size=6), st.integers(4, 14), st.sampled_from(["gpt2", "llama"]))
def test_packing_and_padding_change_no_logprob(
    make_policy: Callable[..., Policy], documents: list[np.ndarray], length: int, family: str
) -> None:
    policy = policies(make_policy, family)
    packed = pack(documents, length, policy.codec.pad_id)
    pieces = [d[i : i + length] for d in documents for i in range(0, len(d), length)]
    expected = {}
    for piece in pieces:
        alone = from_sequences([piece[:1]], [piece[1:]], encoder=False, pad_id=policy.codec.pad_id)
        expected[piece.tobytes()] = policy.logprobs(alone).logprobs[0, 1 : len(piece)]
    found = policy.logprobs(packed).logprobs
    for number in range(int(packed.segment_ids.max()) + 1):
        row, column = (packed.segment_ids == number).nonzero(as_tuple=True)
        piece = packed.tokens[row, column].numpy()
        assert torch.allclose(found[row, column][1:], expected[piece.tobytes()], atol=2e-4)
    padded = from_sequences([p[:1] for p in pieces], [p[1:] for p in pieces], encoder=False, pad_id=policy.codec.pad_id)
    for i, piece in enumerate(pieces):
        values = policy.logprobs(padded).logprobs[i, 1 : len(piece)]
        assert torch.allclose(values, expected[piece.tobytes()], atol=2e-4)


@search(12)
@given(groups_of(6), st.sampled_from(["gpt2", "llama"]))
def test_the_shared_prompt_layout_is_the_plain_layout(
    make_policy: Callable[..., Policy], group: list[tuple[int, np.ndarray, np.ndarray]], family: str
) -> None:
    policy = policies(make_policy, family)
    batch = from_sequences(
        [p for _, p, _ in group], [c for _, _, c in group], encoder=False, pad_id=policy.codec.pad_id
    )
    plain = copy.copy(batch)
    plain.prompt_ids = None
    shared, apart = policy.logprobs(batch, entropy="measured"), policy.logprobs(plain, entropy="measured")
    assert torch.allclose(shared.logprobs, apart.logprobs, atol=2e-4)
    assert shared.entropy is not None and apart.entropy is not None
    assert torch.allclose(shared.entropy * batch.action_mask, apart.entropy * batch.action_mask, atol=2e-4)


POLICIES: dict[str, Policy] = {}


def policies(make: Callable[..., Policy], family: str) -> Policy:
    if family not in POLICIES:
        POLICIES[family] = make(family)
    return POLICIES[family]


# --- potentials ------------------------------------------------------------------------------------------------------

METRICS = [
    metric(potential=potential, **options)
    for potential in ("prefix", "matched")
    for metric, options in (
        (Bleu, {}), (Bleu, {"tokenize": "zh"}), (Bleu, {"tokenize": "intl", "lowercase": True}), (Chrf, {}),
        (Chrf, {"word_order": 2}), (Rouge, {"variant": "1"}), (Rouge, {"variant": "2"}), (Rouge, {"variant": "L"}),
    )
]  # fmt: skip
references_of = st.lists(texts, min_size=1, max_size=2).map(tuple)


@search(150)
@given(st.sampled_from(METRICS), texts, references_of, st.data())
def test_dense_rewards_sum_to_what_the_metric_says(
    metric: Bleu | Chrf | Rouge, text: str, references: tuple[str, ...], data: st.DataObject
) -> None:
    """However the text is cut into tokens, Σ r_t = M(y) − M(''), and no token but the last pays for what is open."""
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    held = data.draw(st.booleans())  # the last characters are committed by no token: a cut-off tail
    ends = np.array([*cuts, cuts[-1] if held and cuts else len(text)], np.int64)
    completion = Completion("c", "p", text, np.arange(len(ends)), ends)
    rewards = dense_rewards(metric, references, completion)
    assert rewards.shape == (len(ends),) and np.isfinite(rewards).all()
    whole = metric.measure(text, references) - metric.measure("", references)
    assert float(rewards.sum()) == pytest.approx(whole, abs=1e-9)
    # what a token is paid depends on nothing that comes after it
    t = data.draw(st.integers(0, len(ends) - 1))
    shared = text[: int(ends[t - 1])] if t else ""
    longer = shared + data.draw(texts)
    other = Completion("d", "p", longer, np.arange(t + 1), np.array([*ends[:t], len(longer)], np.int64))
    assert np.array_equal(dense_rewards(metric, references, other)[:t], rewards[:t])


@search(60)
@given(texts, references_of, st.sampled_from(["13a", "zh", "intl", "char", "none"]), st.integers(0, 2))
def test_prefix_potentials_are_the_reference_libraries_on_every_prefix(
    text: str, references: tuple[str, ...], tokenize: str, word_order: int
) -> None:
    bleu = sacrebleu.BLEU(tokenize=tokenize, effective_order=True)
    for closed, value in prefixes(Bleu(potential="prefix", tokenize=tokenize), references, text + " a"):
        assert value == pytest.approx(bleu.sentence_score(closed, references).score / 100, abs=1e-9)
    chrf = sacrebleu.CHRF(word_order=word_order)
    for closed, value in prefixes(Chrf(potential="prefix", word_order=word_order), references, text + " a"):
        assert value == pytest.approx(chrf.sentence_score(closed, references).score / 100, abs=1e-9)

    class Words:
        def tokenize(self, words: str) -> list[str]:
            return rouge_words(words)

    for variant in ("1", "2", "L"):
        metric = Rouge(potential="prefix", variant=variant)
        rouge = RougeScorer([metric.name], tokenizer=Words())
        for closed, value in prefixes(metric, references, text + " a"):
            assert value == pytest.approx(rouge.score_multi(references, closed)[metric.name].fmeasure, abs=1e-9)


# --- credit ----------------------------------------------------------------------------------------------------------

UNBIASED: list[credit.Baseline] = [
    "none", "running", "batch", "leave_one_out", "position_leave_one_out", "control_variate",
]  # fmt: skip


@st.composite
def credit_of(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(rewards, mask, groups) of two groups or more."""
    lengths = draw(st.lists(st.integers(1, 5), min_size=4, max_size=9))
    width = max(lengths)
    numbers = st.lists(st.integers(-8, 8), min_size=width, max_size=width)
    rewards = torch.tensor([draw(numbers) for _ in lengths], dtype=torch.float64)
    mask = torch.arange(width)[None] < torch.tensor(lengths)[:, None]
    others = draw(st.lists(st.integers(0, 2), min_size=len(lengths) - 2, max_size=len(lengths) - 2))
    return rewards * mask, mask, torch.tensor([0, 1, *others])


def advantages(
    rewards: torch.Tensor, mask: torch.Tensor, groups: torch.Tensor, valid: torch.Tensor, baseline: credit.Baseline,
    gamma: float = 1.0,
) -> torch.Tensor:  # fmt: skip
    options = {} if baseline == "control_variate" else {"gamma": gamma}
    return credit.advantages(
        rewards,
        mask,
        groups,
        valid,
        baseline=baseline,
        against={"running": torch.tensor([0.3, 0.2], dtype=torch.float64), "control_variate": 0.6}.get(baseline),
        **options,
    )[0]


@search(100)
@given(credit_of(), st.sampled_from(UNBIASED), st.sampled_from([1.0, 0.5]), st.data())
def test_a_baseline_does_not_know_its_own_row(
    case: tuple[torch.Tensor, torch.Tensor, torch.Tensor], baseline: credit.Baseline, gamma: float, data: st.DataObject
) -> None:
    """What changes in row i changes its advantage by its own return alone, whatever its fellows got."""
    rewards, mask, groups = case
    valid = torch.ones(len(groups), dtype=torch.bool)
    i = data.draw(st.integers(0, len(groups) - 1))
    size = st.lists(st.integers(-8, 8), min_size=rewards.shape[1], max_size=rewards.shape[1])
    changed = rewards.clone()
    changed[i] = torch.tensor(data.draw(size), dtype=torch.float64) * mask[i]

    def moved(fellows: torch.Tensor) -> torch.Tensor:
        here, there = fellows.clone(), fellows.clone()
        here[i], there[i] = rewards[i], changed[i]
        return (
            advantages(there, mask, groups, valid, baseline, gamma)[i]
            - advantages(here, mask, groups, valid, baseline, gamma)[i]
        )

    others = torch.tensor([data.draw(size) for _ in groups], dtype=torch.float64) * mask
    assert torch.allclose(moved(rewards), moved(others), atol=1e-9)
    if baseline != "control_variate":
        usable = credit.advantages(rewards, mask, groups, valid, baseline=baseline, gamma=gamma)[2][i]
        own = credit.returns_to_go(changed - rewards, mask, gamma)[i]
        assert torch.allclose(moved(rewards), own * usable, atol=1e-9)


@search(100)
@given(credit_of(), st.sampled_from([*UNBIASED, "group_scaled"]), st.data())
def test_the_order_of_rows_and_the_names_of_groups_mean_nothing(
    case: tuple[torch.Tensor, torch.Tensor, torch.Tensor], baseline: credit.Baseline, data: st.DataObject
) -> None:
    rewards, mask, groups = case
    valid = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(groups), max_size=len(groups))))
    out = advantages(rewards, mask, groups, valid, baseline)
    order = torch.tensor(data.draw(st.permutations(range(len(groups)))))
    names = torch.tensor([7, 3, 11])
    again = advantages(rewards[order], mask[order], names[groups][order], valid[order], baseline)
    assert torch.allclose(again, out[order], atol=1e-9)
    # a missing row is as if it had not been sampled, and what stands in its place is never read
    junk = torch.where(valid[:, None], rewards, torch.nan)
    assert torch.equal(advantages(junk, mask, groups, valid, baseline), out)
    assert not out[~valid].any() and not out[~mask].any()
    if valid.any():
        kept = advantages(rewards[valid], mask[valid], groups[valid], valid[valid], baseline)
        assert torch.allclose(out[valid], kept, atol=1e-9)


@search(80)
@given(
    credit_of(),
    st.sampled_from(["none", "running", "position_leave_one_out"]),
    st.sampled_from([1.0, 0.5, 0.0]),
    st.data(),
)
def test_single_missing_rewards_are_never_read(
    case: tuple[torch.Tensor, torch.Tensor, torch.Tensor], baseline: credit.Baseline, gamma: float, data: st.DataObject
) -> None:
    rewards, mask, groups = case
    observed = torch.tensor(
        data.draw(st.lists(st.lists(st.booleans(), min_size=mask.shape[1], max_size=mask.shape[1]),
                           min_size=len(groups), max_size=len(groups)))
    )  # fmt: skip
    known = credit.known_returns(observed, mask, gamma)
    hidden = torch.where(observed & mask, rewards, torch.nan)
    means = torch.tensor([0.3, 0.2], dtype=torch.float64) if baseline == "running" else None
    out, _, usable = credit.advantages(hidden, mask, groups, known, baseline=baseline, gamma=gamma, against=means)
    assert torch.isfinite(out).all() and not out[~usable].any() and not (usable & ~known).any()
    for t in range(mask.shape[1]):  # position by position it is the estimator of the rows that are known there
        rest = known[:, t]
        whole = credit.advantages(
            torch.nan_to_num(hidden)[:, t:], mask[:, t:], groups, rest, baseline=baseline, gamma=gamma,
            against=None if means is None else means[min(t, 1) :],
        )[0][:, 0]  # fmt: skip
        assert torch.allclose(out[:, t], whole, atol=1e-9)


# --- the sampler -----------------------------------------------------------------------------------------------------

ASKED = [Prompt(f"p{i}", np.arange(40, 42 + i)) for i in range(4)]
DRAWN = [Sampling(max_tokens=5, seed=4), Sampling(max_tokens=7, seed=4, temperature=0.7)]


@search(12)
@given(st.sampled_from(["gpt2", "t5"]), st.integers(1, 4), st.data())
def test_the_order_of_joining_and_cancelling_changes_no_answer(
    make_policy: Callable[..., Policy], family: str, max_rows: int, data: st.DataObject
) -> None:
    policy = policies(make_policy, family)
    sampler = Sampler(policy, max_rows=max_rows)
    waiting = data.draw(st.permutations([(p, s, k) for p in range(4) for s in range(2) for k in range(2)]))[:8]
    asked: dict[str, tuple[int, int, int]] = {}
    done: dict[str, Completion] = {}
    cancelled: dict[str, Completion | None] = {}
    while waiting or sampler.pending:
        act = data.draw(st.sampled_from(["submit", "step", "step", "cancel"]))
        if act == "submit" and waiting:
            p, s, k = waiting.pop()
            (name,) = sampler.submit(ASKED[p], DRAWN[s], first_sample=k)
            asked[name] = (p, s, k)
        elif act == "cancel" and (alive := sorted(asked.keys() - done.keys() - cancelled.keys())):
            name = data.draw(st.sampled_from(alive))
            cancelled[name] = sampler.cancel(name)
        elif sampler.pending or not waiting:
            done |= {c.id: c for c in sampler.step()}
        elif act == "step":
            assert sampler.step() == []
    assert done.keys() | cancelled.keys() == asked.keys() and not done.keys() & cancelled.keys()
    for name, (p, s, k) in asked.items():
        expected = alone(policy, family, p, s, k)
        if name in done:
            assert done[name].tokens.tolist() == expected.tokens.tolist()
            assert done[name].stop_reason == expected.stop_reason and done[name].text == expected.text
            assert np.allclose(done[name].behavior_logprobs, expected.behavior_logprobs, atol=2e-4)
        elif (part := cancelled[name]) is not None:
            assert part.tokens.tolist() == expected.tokens[: len(part.tokens)].tolist()
            assert part.stop_reason == "cancelled" and len(part.tokens) < len(expected.tokens)


ALONE: dict[tuple[str, int, int, int], Completion] = {}


def alone(policy: Policy, family: str, p: int, s: int, k: int) -> Completion:
    """The answer of the only row of a sampler."""
    if (family, p, s, k) not in ALONE:
        sampler = Sampler(policy)
        sampler.submit(ASKED[p], DRAWN[s], first_sample=k)
        done: list[Completion] = []
        while sampler.pending:
            done += sampler.step()
        (ALONE[family, p, s, k],) = done
    return ALONE[family, p, s, k]
