from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FAMILIES

from operant.data.batch import from_trajectories
from operant.models.policy import Policy
from operant.models.sampler import Sampler, behavior_logprobs, draw, row_key, uniform
from operant.rewards import Stop
from operant.types import Completion, OperantError, Prompt, Sampling, Trajectory

PROMPTS = [
    Prompt("a", np.array([41, 52, 63, 74, 85], np.int64)),
    Prompt("b", np.array([30], np.int64)),
    Prompt("c", np.array([33, 44, 55], np.int64)),
]
FREE = Sampling(max_tokens=12, seed=7)
CUT = Sampling(max_tokens=12, seed=7, temperature=0.7, top_p=0.9, top_k=20, banned=(5, 60, 61))


def flat(groups: list[list[Completion]]) -> list[Completion]:
    return [c for group in groups for c in group]


def said(groups: list[list[Completion]]) -> list[list[int]]:
    return [c.tokens.tolist() for c in flat(groups)]


def model_table(model: Any, policy: Policy, prompt: Prompt, tokens: np.ndarray) -> np.ndarray:
    """log-softmax float64[T, V] of one completion by a plain forward: no padding, no cache, no batch."""
    with torch.no_grad():
        if policy.family == "encoder-decoder":
            decoder = torch.tensor([[model.config.decoder_start_token_id, *tokens[:-1].tolist()]])
            logits = model(input_ids=torch.from_numpy(prompt.tokens)[None], decoder_input_ids=decoder).logits[0]
        else:
            logits = model(input_ids=torch.from_numpy(np.concatenate([prompt.tokens, tokens]))[None]).logits[0]
            logits = logits[len(prompt.tokens) - 1 : -1]
    return torch.log_softmax(logits.double(), -1).numpy()


def cut_row(logp: np.ndarray, sampling: Sampling) -> np.ndarray:
    """What `Sampling` means, for one distribution, written out slowly."""
    weights = {k: math.exp(v / (sampling.temperature or 1.0)) for k, v in enumerate(logp) if k not in sampling.banned}
    total = sum(weights.values())
    ranked = sorted(((w / total, k) for k, w in weights.items()), reverse=True)
    if sampling.temperature == 0:
        ranked = ranked[:1]
    if sampling.top_k:
        ranked = ranked[: sampling.top_k]
    kept, reached = [], 0.0
    for chance, k in ranked:
        if reached >= sampling.top_p and sampling.top_p < 1:
            break
        kept.append((chance, k))
        reached += chance
    out = np.full(len(logp), -np.inf)
    for chance, k in kept:
        out[k] = math.log(chance / sum(c for c, _ in kept))
    return out


def test_top_k_and_top_p_keep_what_a_stable_sort_of_the_vocabulary_keeps() -> None:
    """Equals at the border too, of which the first in the vocabulary stay."""
    chance = torch.Generator().manual_seed(0)

    def some(rows: int, share: float) -> torch.Tensor:
        return torch.rand(rows, generator=chance) < share

    for trial in range(400):
        rows, vocab = 1 + trial % 5, (3, 7, 300, 2500)[trial % 4]
        logits = torch.randn(rows, vocab, generator=chance) * (0.01, 1.0, 5.0)[trial % 3]
        if trial % 2:
            logits = (logits * 2).round() / 2
        top_k = torch.randint(0, vocab + 3, (rows,), generator=chance)
        top_k[some(rows, 0.4)], top_k[some(rows, 0.2)] = 0, 1
        top_p = torch.rand(rows, generator=chance)
        top_p[some(rows, 0.4)] = 1.0
        banned = torch.rand(rows, vocab, generator=chance) < 0.3
        banned[:, 0] = False
        logprobs = torch.log_softmax(logits.masked_fill(banned, -torch.inf), -1)
        ordered, order = torch.sort(logprobs, dim=-1, descending=True, stable=True)
        better = ordered.exp().cumsum(-1) - ordered.exp()
        keep = torch.arange(vocab) < torch.where(top_k > 0, top_k, vocab)[:, None]
        keep &= (better < top_p[:, None]) | (top_p[:, None] == 1.0)
        keep[:, 0] = True
        kept = torch.zeros_like(keep).scatter(-1, order, keep) & ~banned
        got = behavior_logprobs(logits, torch.ones(rows), top_k, top_p, banned)
        assert torch.equal(torch.isfinite(got), kept), (trial, top_k, top_p)


@pytest.mark.parametrize("sampling", [FREE, CUT], ids=["free", "cut"])
@pytest.mark.parametrize("family", FAMILIES)
def test_both_logprobs_are_those_of_a_float64_recomputation(
    family: str, sampling: Sampling, make_policy: Callable[..., Policy]
) -> None:
    policy = make_policy(family)
    model = copy.deepcopy(policy.model).double().eval()
    sampler = Sampler(policy, max_rows=4)  # fewer than asked for: rows join while others are under way
    for prompt, group in zip(PROMPTS, sampler.sample(PROMPTS, sampling, 3), strict=True):
        for c in group:
            table = model_table(model, policy, prompt, c.tokens)
            at = np.arange(len(c.tokens)), c.tokens
            assert c.behavior_logprobs is not None and c.model_logprobs is not None
            assert np.allclose(c.model_logprobs, table[at], atol=1e-4)
            cut = np.stack([cut_row(row, sampling) for row in table])
            assert np.allclose(c.behavior_logprobs, cut[at], atol=1e-4)
            assert not set(c.tokens.tolist()) & set(sampling.banned)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_row_says_depends_on_no_other_row(family: str, make_policy: Callable[..., Policy]) -> None:
    policy = make_policy(family)
    expected = said(Sampler(policy).sample(PROMPTS, FREE, 3))
    assert len({tuple(t) for t in expected}) > 3
    for rows in (1, 2, 5):
        assert said(Sampler(policy, max_rows=rows).sample(PROMPTS, FREE, 3)) == expected
    backwards = Sampler(policy, max_rows=4).sample(PROMPTS[::-1], FREE, 3)
    assert said(backwards[::-1]) == expected
    alone = [said(Sampler(policy).sample([p], FREE, 3)) for p in PROMPTS]
    assert [t for group in alone for t in group] == expected
    sampler = Sampler(policy)
    late = [sampler.submit(PROMPTS[1], FREE, 1, first_sample=i)[0] for i in (2, 0, 1)]
    done: dict[str, list[int]] = {}
    while sampler.pending:
        done |= {c.id: c.tokens.tolist() for c in sampler.step()}
    assert [done[late[i]] for i in (1, 2, 0)] == expected[3:6]


def test_the_random_numbers_are_keyed_by_seed_prompt_sample_and_position() -> None:
    keys = {row_key(s, p, i) for s in (0, 1) for p in ("a", "b") for i in (0, 1)}
    assert len(keys) == 8
    numbers = np.array([uniform(row_key(0, "a", i), t) for i in range(100) for t in range(100)])
    assert len(set(numbers.tolist())) == 10_000 and numbers.min() >= 0 and numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 0.01
    assert np.allclose(np.histogram(numbers, 10, (0, 1))[0] / 1000, 1, atol=0.12)


def test_a_prompt_asked_twice_in_one_call_gets_samples_of_its_own(make_policy: Callable[..., Policy]) -> None:
    """Copies would count as independent fellows in the group's baseline."""
    policy = make_policy("gpt2")
    twice = said(Sampler(policy).sample([PROMPTS[0], PROMPTS[1], PROMPTS[0]], FREE, 2))
    four = said(Sampler(policy).sample([PROMPTS[0]], FREE, 4))
    assert twice[:2] + twice[4:] == four
    assert len({tuple(t) for t in four}) == 4


def test_drawing_inverts_the_distribution() -> None:
    logprobs = torch.tensor([[0.25, 0.0, 0.5, 0.25, 0.0]]).log().repeat(7, 1)
    uniforms = torch.tensor([0.0, 0.2499, 0.2501, 0.7499, 0.7501, 0.9999, 1 - 2.0**-53], dtype=torch.float64)
    assert draw(logprobs, uniforms).tolist() == [0, 0, 2, 2, 3, 3, 3]


def test_cutting_the_distribution_by_hand() -> None:
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log().repeat(5, 1)
    ones = torch.ones(5)
    banned = torch.zeros(5, 4, dtype=torch.bool)
    banned[4, 0] = True
    out = behavior_logprobs(
        logits,
        torch.tensor([1.0, 0.5, 1.0, 1.0, 1.0]),
        torch.tensor([0, 0, 2, 0, 0]),
        torch.tensor([1.0, 1.0, 1.0, 0.69, 0.3]) * ones,
        banned,
    ).exp()
    expected = [
        [0.4, 0.3, 0.2, 0.1],
        [16 / 30, 9 / 30, 4 / 30, 1 / 30],
        [4 / 7, 3 / 7, 0, 0],
        [4 / 7, 3 / 7, 0, 0],  # 0.4 alone is below 0.69: the token that crosses it stays
        [0, 1, 0, 0],
    ]
    assert torch.allclose(out, torch.tensor(expected), atol=1e-6)


def test_greedy_takes_the_best_and_has_no_propensity(make_policy: Callable[..., Policy]) -> None:
    policy = make_policy("gpt2")
    model = copy.deepcopy(policy.model).double().eval()
    first, second = flat(Sampler(policy).sample(PROMPTS[:1], Sampling(temperature=0.0, max_tokens=10), 2))
    assert first.tokens.tolist() == second.tokens.tolist()
    assert first.behavior_logprobs is not None and not first.behavior_logprobs.any()
    table = model_table(model, policy, PROMPTS[0], first.tokens)
    assert first.tokens.tolist() == table.argmax(1).tolist()
    assert np.allclose(first.model_logprobs, table.max(1), atol=1e-4)


def test_rows_of_different_sampling_decode_together(make_policy: Callable[..., Policy]) -> None:
    policy = make_policy("llama")
    greedy = Sampling(temperature=0.0, max_tokens=8)
    alone = [said(Sampler(policy).sample([PROMPTS[i]], s))[0] for i, s in ((0, greedy), (1, CUT), (2, FREE))]
    sampler = Sampler(policy)
    ids = [sampler.submit(PROMPTS[i], s)[0] for i, s in ((0, greedy), (1, CUT), (2, FREE))]
    done: dict[str, list[int]] = {}
    while sampler.pending:
        done |= {c.id: c.tokens.tolist() for c in sampler.step()}
    assert [done[i] for i in ids] == alone


def until_done(sampler: Sampler) -> dict[str, Completion]:
    done: dict[str, Completion] = {}
    while sampler.pending:
        done |= {c.id: c for c in sampler.step()}
    return done


@pytest.mark.parametrize("family", FAMILIES)
def test_new_weights_never_meet_an_old_cache(family: str, make_policy: Callable[..., Policy]) -> None:
    policy = make_policy(family)
    if family == "t5":
        ends = ()
    else:
        ends = (policy.codec.eos_id,)  # long rows: some are still under way when the weights change
    sampling = Sampling(max_tokens=10, seed=3, banned=ends)
    sampler = Sampler(policy, version=4)
    ids = [i for p in PROMPTS for i in sampler.submit(p, sampling, 2)]
    early: dict[str, Completion] = {}
    for _ in range(4):
        early |= {c.id: c for c in sampler.step()}
    with torch.no_grad():
        for p in policy.model.parameters():
            p.mul_(0.8)
    sampler.load(5)
    done = early | until_done(sampler)
    assert len(done) == len(ids)
    model = copy.deepcopy(policy.model).double().eval()
    checked = 0
    for number, i in enumerate(ids):
        c = done[i]
        assert c.policy_version is not None and c.model_logprobs is not None
        assert c.policy_version.tolist() == [4] * min(4, len(c.tokens)) + [5] * max(0, len(c.tokens) - 4)
        table = model_table(model, policy, PROMPTS[number // 2], c.tokens)
        expected = table[np.arange(len(c.tokens)), c.tokens]
        assert np.allclose(c.model_logprobs[4:], expected[4:], atol=1e-4)
        checked += len(c.tokens[4:])
    assert checked > 0


def test_cancelling_takes_one_row_out_and_leaves_the_others_alone(make_policy: Callable[..., Policy]) -> None:
    policy = make_policy("gpt2")
    sampling = Sampling(max_tokens=8, seed=1, banned=(policy.codec.eos_id,))
    expected = said(Sampler(policy).sample(PROMPTS, sampling))
    sampler = Sampler(policy, max_rows=2)
    ids = [sampler.submit(p, sampling)[0] for p in PROMPTS]
    for _ in range(3):
        assert sampler.step() == []
    partial = sampler.cancel(ids[0])
    assert partial is not None and partial.stop_reason == "cancelled" and not partial.truncated
    assert partial.tokens.tolist() == expected[0][:3]
    assert sampler.cancel(ids[0]) is None and sampler.cancel("nobody") is None
    done = until_done(sampler)
    assert [done[i].tokens.tolist() for i in ids[1:]] == expected[1:]
    waiting = Sampler(policy, max_rows=1)
    ids = [waiting.submit(p, sampling)[0] for p in PROMPTS[:2]]
    assert waiting.cancel(ids[1]) is None and waiting.pending == 1
    assert set(until_done(waiting)) == {ids[0]}


def test_why_a_row_ended_is_told(make_policy: Callable[..., Policy]) -> None:
    policy = make_policy("gpt2")
    eos = policy.codec.eos_id
    groups = Sampler(policy).sample(PROMPTS, Sampling(max_tokens=20, seed=2, top_k=0, temperature=3.0), 60)
    reasons = {c.stop_reason for c in flat(groups)}
    assert reasons == {"eos", "length"}
    for c in flat(groups):
        assert (c.tokens[-1] == eos) == (c.stop_reason == "eos")
        assert eos not in c.tokens[:-1]
        assert c.truncated == (c.stop_reason == "length")
        assert c.truncated == (len(c.tokens) == 20 and c.tokens[-1] != eos)
        text, ends = policy.codec.text_and_ends(c.tokens)
        assert c.text == text and c.text_ends.tolist() == ends.tolist()
        assert c.sampled is not None and c.sampled.all() and len(c.sampled) == len(c.tokens)
        assert c.tokenizer_hash == policy.codec.hash


def test_a_stop_string_ends_the_row_and_is_cut_from_its_text(make_policy: Callable[..., Policy]) -> None:
    policy = make_policy("gpt2")
    sampling = Sampling(max_tokens=20, seed=5, banned=(policy.codec.eos_id,))
    (whole,) = flat(Sampler(policy).sample(PROMPTS[:1], sampling))
    assert len(whole.text) > 6
    stop = whole.text[3:5]
    (stopped,) = flat(
        Sampler(policy).sample(
            PROMPTS[:1], Sampling(max_tokens=20, seed=5, banned=sampling.banned, stop=("never seen", stop))
        )
    )
    assert stopped.stop_reason == "stop" and not stopped.truncated
    assert stopped.text == whole.text[: whole.text.find(stop)]
    assert stopped.tokens.tolist() == whole.tokens[: len(stopped.tokens)].tolist()
    assert len(stopped.tokens) < len(whole.tokens)
    assert int(stopped.text_ends[-1]) == len(stopped.text)


class FromTheThird:
    """Pays 0.5 for each token and wants to stop at the third with −2."""

    def start(self, prompt: Prompt) -> FromTheThird:
        fresh = FromTheThird()
        fresh.count = 0
        return fresh

    def step(self, token: int, text: str) -> float | Stop:
        self.count += 1
        return Stop(-2.0) if self.count >= 3 else 0.5


def test_a_streaming_reward_ends_a_row_with_its_own_reward_and_no_eos(make_policy: Callable[..., Policy]) -> None:
    policy = make_policy("gpt2")
    sampling = Sampling(max_tokens=8, seed=1, banned=(policy.codec.eos_id,))
    plain = said(Sampler(policy).sample(PROMPTS, sampling, 2))
    sampler = Sampler(policy)
    groups = sampler.sample(PROMPTS, sampling, 2, stream=FromTheThird())
    assert all(len(group) == 2 for group in groups)
    for c, full in zip(flat(groups), plain, strict=True):
        assert c.stop_reason == "reward" and not c.truncated
        assert c.tokens.tolist() == full[:3]
        assert c.stream_rewards is not None and c.stream_rewards.tolist() == [0.5, 0.5, -2.0]
    assert sampler.saved_tokens == 6 * 5


def test_audited_rows_run_on_past_the_stop(make_policy: Callable[..., Policy]) -> None:
    policy = make_policy("gpt2")
    sampling = Sampling(max_tokens=8, seed=1, banned=(policy.codec.eos_id,))
    plain = said(Sampler(policy).sample(PROMPTS, sampling, 20))
    groups = Sampler(policy, audit_fraction=0.5).sample(PROMPTS, sampling, 20, stream=FromTheThird())
    asked = Sampler(policy).sample(PROMPTS, sampling, 20, stream=FromTheThird(), audit_fraction=0.5)
    assert said(asked) == said(groups)  # a request may say what share, too
    audited = [c for c in flat(groups) if c.meta]
    assert 15 < len(audited) < 45
    for c, full in zip(flat(groups), plain, strict=True):
        if c.meta:
            # paid as if it had ended; what it would have gathered after that is only noted
            assert c.meta == {"would_stop_at": 3, "stop_reward": -2.0, "audited_return": -2.0 * (len(c.tokens) - 3)}
            assert c.stream_rewards is not None and c.stream_rewards[2:].tolist() == [-2.0] + [0.0] * (
                len(c.tokens) - 3
            )
            assert c.tokens.tolist() == full and c.stop_reason == "length"
        else:
            assert c.stop_reason == "reward" and len(c.tokens) == 3


def test_every_token_is_told_as_it_is_sampled(make_policy: Callable[..., Policy]) -> None:
    heard: dict[str, list[tuple[int, str]]] = {}
    sampler = Sampler(
        make_policy("gpt2"), on_token=lambda i, drawn: heard.setdefault(i, []).append((drawn.token, drawn.text))
    )
    for c in flat(sampler.sample(PROMPTS, FREE)):
        assert [token for token, _ in heard[c.id]] == c.tokens.tolist()
        assert c.text.startswith("".join(text for _, text in heard[c.id]))


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_like_for_like_the_first_ratio_is_one_and_with_top_p_it_is_not(
    family: str, make_policy: Callable[..., Policy]
) -> None:
    policy = make_policy(family)

    def mean_ratio(sampling: Sampling) -> float:
        groups = Sampler(policy).sample(PROMPTS, sampling, 8)
        rows = [
            Trajectory(p, c, np.zeros(len(c.tokens)), np.ones(len(c.tokens), np.bool_))
            for p, group in zip(PROMPTS, groups, strict=True)
            for c in group
        ]
        batch = from_trajectories(rows, encoder=policy.family == "encoder-decoder", pad_id=policy.codec.pad_id)
        assert batch.behavior_logprobs is not None
        with torch.no_grad():
            ratio = (policy.logprobs(batch).logprobs - batch.behavior_logprobs).exp()[batch.action_mask]
        if sampling.top_p == 1:
            assert float((ratio - 1).abs().max()) < 1e-4
        return float(ratio.mean())

    assert mean_ratio(Sampling(max_tokens=8)) == pytest.approx(1, abs=1e-5)
    assert mean_ratio(Sampling(max_tokens=8, temperature=0.6)) == pytest.approx(1, abs=1e-5)
    assert 0.6 < mean_ratio(Sampling(max_tokens=8, top_p=0.8)) < 0.95


def test_bf16_samples_and_its_logprobs_are_near_the_trainers(make_policy: Callable[..., Policy]) -> None:
    policy = make_policy("llama", dtype="bf16")
    completions = flat(Sampler(policy).sample(PROMPTS, FREE, 4))
    rows = [
        Trajectory(
            next(p for p in PROMPTS if p.id == c.prompt_id),
            c,
            np.zeros(len(c.tokens)),
            np.ones(len(c.tokens), np.bool_),
        )
        for c in completions
    ]
    batch = from_trajectories(rows, encoder=False, pad_id=policy.codec.pad_id)
    assert batch.behavior_logprobs is not None
    with torch.no_grad():
        gap = (policy.logprobs(batch).logprobs - batch.behavior_logprobs)[batch.action_mask].abs()
    assert float(gap.mean()) < 0.05


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_that_the_model_cannot_hold_are_refused(family: str, make_policy: Callable[..., Policy]) -> None:
    policy = make_policy(family)  # a context of 48
    sampler = Sampler(policy)
    with pytest.raises(OperantError, match="too_long truncate"):
        sampler.submit(Prompt("long", np.full(49, 40, np.int64)), FREE)
    with pytest.raises(OperantError, match="empty"):
        sampler.submit(Prompt("empty", np.empty(0, np.int64)), FREE)
    assert sampler.pending == 0
    # what just fits is answered up to the context's end
    longest = 47 if policy.family == "decoder" else 48
    (c,) = flat(sampler.sample([Prompt("full", np.full(longest, 40, np.int64))], Sampling(max_tokens=90, seed=1)))
    assert len(c.tokens) == 1 if policy.family == "decoder" else len(c.tokens) <= 47


@pytest.mark.parametrize("where", ["start", "step"])
def test_a_streaming_reward_that_raises_is_missing_and_ends_nothing(
    where: str, make_policy: Callable[..., Policy]
) -> None:
    from operant.rewards import RewardRunner

    class Broken:
        def start(self, prompt: Prompt) -> Any:
            if where == "start":
                raise ValueError("boom")
            return self

        def step(self, token: int, text: str) -> float:
            raise ValueError("boom")

    broken = Broken()
    groups = Sampler(make_policy("gpt2")).sample(PROMPTS[:2], Sampling(max_tokens=4), 2, stream=broken)
    assert all(c.stream_rewards is None and "boom" in c.meta["stream_fault"] for c in flat(groups))
    with RewardRunner(broken, workers=0) as runner:
        trajectories = runner.run([(p, c) for p, group in zip(PROMPTS, groups) for c in group])
        assert not any(t.observed.any() for t in trajectories)
        assert runner.counts == {"raised": 4}


@pytest.mark.parametrize("kept", [[1, 3], [0, 1], [2], [0, 1, 2, 3]])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_end_leave_the_cache_of_the_others_as_it_was(
    family: str, kept: list[int], make_policy: Callable[..., Policy]
) -> None:
    policy = make_policy(family)
    prompts = [np.arange(3, 5 + n) for n in (1, 3, 28, 5)]  # without the third, most columns are padding
    fed = torch.tensor([7, 8, 9, 10])
    state, _ = policy.prefill(prompts)
    policy.decode(state, fed)
    expected, same = policy.decode(state, fed + 1)[kept], policy.prefill(prompts)[0]
    policy.decode(same, fed)
    order = same.keep(kept)
    assert sorted(order) == kept
    logits = policy.decode(same, (fed + 1)[order])
    assert torch.allclose(logits, expected[[kept.index(i) for i in order]], atol=1e-4)
    if policy.family == "decoder":
        assert same.mask.shape[1] == (32 if 2 in kept else 9 if kept == [1, 3] else 7)
