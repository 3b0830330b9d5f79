from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from operant.data.batch import (
    completion_axes,
    drawn_rewards,
    encoder_context,
    from_sequences,
    from_trajectories,
    gather,
    group_numbers,
    microbatches,
    pack,
    right_padded,
    scatter,
    select_rows,
    token_weights,
    turn_discounts,
)
from operant.models.policy import Policy
from operant.models.sampler import Sampler
from operant.types import Batch, Completion, Prompt, Sampling, Trajectory


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def test_weights_and_denominators_by_hand() -> None:
    mask = torch.tensor([[False, True, True, True], [False, True, False, False], [False] * 4])
    ones = mask.float()
    for name, weights, denominator in (
        ("per_completion", ones, 2.0),  # the empty row is no completion
        ("per_token", ones, 4.0),
        ("per_sequence_mean", torch.tensor([[0, 1 / 3, 1 / 3, 1 / 3], [0, 1, 0, 0], [0, 0, 0, 0]]), 2.0),
        ("constant", ones, 20.0),
    ):
        got, below = token_weights(mask, name, 10.0)  # type: ignore[arg-type]
        assert torch.allclose(got, weights) and below == denominator
    assert token_weights(mask, "constant")[1] == 2.0
    assert token_weights(mask[2:], "per_completion")[1] == token_weights(mask[2:], "per_token")[1] == 1.0


def test_no_rows_are_a_batch_of_nothing() -> None:
    tokens, mask = right_padded([], pad_id=9)
    assert tokens.shape == mask.shape == (0, 0) and tokens.dtype == torch.long and mask.dtype == torch.bool


def test_a_decoders_row_is_prompt_and_completion_and_acts_on_the_completion_alone() -> None:
    batch = from_sequences([ints(5, 6), ints(7)], [ints(8, 9, 1), ints(2)], encoder=False, pad_id=0)
    assert batch.tokens.tolist() == [[5, 6, 8, 9, 1], [7, 2, 0, 0, 0]]
    assert batch.action_mask.tolist() == [[False, False, True, True, True], [False, True, False, False, False]]
    assert batch.segment_ids.tolist() == [[0] * 5, [1, 1, -1, -1, -1]]
    assert batch.position_ids[0].tolist() == [0, 1, 2, 3, 4]
    assert batch.context is None and batch.denominator == 4


def test_an_encoder_decoders_row_is_the_completion_and_each_prompt_stands_once() -> None:
    batch = from_sequences([ints(5, 6), ints(7), ints(5, 6)], [ints(8, 1), ints(2), ints(3)], encoder=True, pad_id=0)
    assert batch.tokens.tolist() == [[8, 1], [2, 0], [3, 0]]
    assert batch.action_mask.tolist() == [[True, True], [True, False], [True, False]]
    assert batch.context is not None
    assert batch.context.tokens.tolist() == [[5, 6], [7, 0]] and batch.context.row.tolist() == [0, 1, 0]
    assert batch.context.mask.tolist() == [[True, True], [True, False]]


def test_tokens_that_were_not_sampled_are_not_acted_on() -> None:
    flags = [np.array([True, False, True])]
    for encoder in (False, True):
        batch = from_sequences([ints(5, 6)], [ints(8, 9, 1)], encoder=encoder, pad_id=0, sampled=flags)
        assert batch.action_mask[0].tolist()[-3:] == [True, False, True]
        assert batch.denominator == 2


def trajectory(prompt: str, tokens: list[int], rewards: list[float], **options: object) -> Trajectory:
    n = len(tokens)
    completion = Completion(
        f"{prompt}-{tokens}", prompt, "", ints(*tokens), np.zeros(n, np.int64),
        behavior_logprobs=-np.arange(1, n + 1, dtype=np.float32), sampled=np.ones(n, np.bool_),
        policy_version=np.full(n, 3), sampling=Sampling(temperature=0.5), **options,
    )  # fmt: skip
    observed = np.isfinite(rewards)
    return Trajectory(Prompt(prompt, ints(*range(10, 11 + len(prompt)))), completion, np.array(rewards), observed)


ROWS = [
    trajectory("a", [4, 5, 1], [0.5, -1.0, 2.0]),
    trajectory("bbb", [6, 1], [0.25, 8.0]),
    trajectory("a", [7], [np.nan], truncated=True),
]


@pytest.mark.parametrize("encoder", [False, True])
def test_rewards_and_logprobs_stand_on_the_token_they_belong_to(encoder: bool) -> None:
    batch = from_trajectories(ROWS, encoder=encoder, pad_id=0)
    assert batch.rewards is not None and batch.observed is not None and batch.behavior_logprobs is not None
    assert batch.temperature is not None and group_numbers(ROWS).tolist() == [0, 1, 0]
    for i, t in enumerate(ROWS):
        acted = batch.action_mask[i]
        assert batch.tokens[i, acted].tolist() == t.completion.tokens.tolist()
        assert np.array_equal(batch.rewards[i, acted].numpy(), t.rewards, equal_nan=True)
        assert batch.observed[i, acted].tolist() == t.observed.tolist()
        assert batch.behavior_logprobs[i, acted].tolist() == t.completion.behavior_logprobs.tolist()  # type: ignore[union-attr]
        assert not batch.rewards[i, ~acted].any() and not batch.behavior_logprobs[i, ~acted].any()
    assert batch.temperature.tolist() == [0.5] * 3
    assert batch.denominator == 3 and batch.kind == "completions"
    assert from_trajectories(ROWS, encoder=encoder, pad_id=0, normalisation="constant").denominator == 3
    ROWS[1].completion.sampling, kept = Sampling(temperature=0.0), ROWS[1].completion.sampling
    greedy = from_trajectories(ROWS, encoder=encoder, pad_id=0)
    ROWS[1].completion.sampling = kept
    assert greedy.temperature is not None and greedy.temperature.tolist() == [0.5, 1.0, 0.5]


@pytest.mark.parametrize("encoder", [False, True])
def test_credit_goes_to_the_completions_axis_and_back(encoder: bool) -> None:
    rewards, mask, valid = completion_axes(ROWS)
    assert rewards.tolist() == [[0.5, -1.0, 2.0], [0.25, 8.0, 0.0], [0.0, 0.0, 0.0]]  # unobserved is masked, not NaN
    assert mask.tolist() == [[True] * 3, [True, True, False], [True, False, False]]
    assert valid.tolist() == [True, True, False]
    batch = from_trajectories(ROWS, encoder=encoder, pad_id=0)
    values = torch.arange(9.0).reshape(3, 3) + 1
    placed = scatter(batch, values, ROWS)
    assert [placed[i, batch.action_mask[i]].tolist() for i in range(3)] == [[1, 2, 3], [4, 5], [7]]
    assert not placed[~batch.action_mask].any()


def test_a_completion_without_logprobs_is_not_taught() -> None:
    unknown = trajectory("a", [4], [1.0])
    unknown.completion.behavior_logprobs = None
    _, _, valid = completion_axes([ROWS[0], unknown])
    assert valid.tolist() == [True, False]
    assert from_trajectories([ROWS[0], unknown], encoder=False, pad_id=0).behavior_logprobs is None


def test_what_the_environment_wrote_is_context_and_its_reward_is_paid_to_the_drawn_token_before() -> None:
    """Two turns, [4 5] and [6 1], with what the environment said between them; a second row of one turn."""
    episode = trajectory("a", [4, 5, 8, 9, 6, 1], [1.0, 2.0, 4.0, np.nan, 8.0, 16.0])
    episode.completion.sampled = np.array([True, True, False, False, True, True])
    plain = trajectory("b", [7, 1], [0.5, 0.25])
    both = [plain, episode]
    earned, seen = drawn_rewards(episode)
    assert earned.tolist() == [1.0, 6.0, 8.0, 16.0] and seen.tolist() == [True, False, True, True]
    assert drawn_rewards(plain)[0].tolist() == [0.5, 0.25]
    rewards, mask, valid = completion_axes(both)
    assert rewards.tolist() == [[0.5, 0.25, 0.0, 0.0], [1.0, 6.0, 8.0, 16.0]]
    assert mask.sum(1).tolist() == [2, 4] and valid.tolist() == [True, False]
    assert turn_discounts(both, 0.5, 1.0) == 0.5
    discounts = turn_discounts(both, 0.5, 0.25)
    assert isinstance(discounts, torch.Tensor)
    assert discounts.tolist() == [[0.5] * 4, [0.5, 0.125, 0.5, 0.5]]

    values = torch.tensor([[1.0, 2.0, 0.0, 0.0], [3.0, 4.0, 5.0, 6.0]], dtype=torch.float64)
    batch = from_trajectories(both, encoder=False, pad_id=0)
    placed = scatter(batch, values, both)
    assert placed.tolist() == [[0, 0, 1, 2, 0, 0, 0, 0], [0, 0, 3, 4, 0, 0, 5, 6]]
    assert torch.equal(gather(batch, placed, both), values)
    # an encoder-decoder writes each turn anew, as a row of its own, and reads what stands before it
    episode.completion.turns = ((0, 2), (4, 6))
    batch = from_trajectories(both, encoder=True, pad_id=0)
    placed = scatter(batch, values, both)
    assert batch.tokens.tolist() == [[7, 1], [4, 5], [6, 1]] and placed.tolist() == [[1, 2], [3, 4], [5, 6]]
    assert torch.equal(gather(batch, placed, both), values) and batch.denominator == 2
    assert batch.context is not None and batch.context.row.tolist() == [0, 0, 1]  # the two prompts are equal
    assert batch.context.tokens[1].tolist() == [10, 11, 4, 5, 8, 9]


documents = st.lists(
    st.lists(st.integers(1, 50), min_size=1, max_size=20).map(lambda x: ints(*x)), min_size=1, max_size=30
)


@settings(max_examples=150, deadline=None)
@given(documents, st.integers(2, 12))
def test_packing_loses_and_invents_no_token(texts: list[np.ndarray], length: int) -> None:
    batch = pack(texts, length, 0)
    assert batch.tokens.shape[1] == length
    pieces = [p[i : i + length].tolist() for p in texts for i in range(0, len(p), length)]
    got = []
    for number in range(int(batch.segment_ids.max()) + 1):
        row, column = (batch.segment_ids == number).nonzero(as_tuple=True)
        assert len(set(row.tolist())) == 1
        assert column.tolist() == list(range(int(column[0]), int(column[0]) + len(column)))
        assert batch.position_ids[row, column].tolist() == list(range(len(column)))
        assert batch.action_mask[row, column].tolist() == [False] + [True] * (len(column) - 1)
        got.append(batch.tokens[row, column].tolist())
    assert sorted(got) == sorted(pieces)
    padding = batch.segment_ids < 0
    assert not batch.action_mask[padding].any() and not batch.tokens[padding].any()
    assert torch.equal(batch.weights, batch.action_mask.float())
    assert batch.denominator == max(1.0, float(batch.action_mask.sum()))


@settings(max_examples=60, deadline=None)
@given(documents, st.integers(1, 200), st.booleans())
def test_micro_batches_hold_every_row_once(texts: list[np.ndarray], most: int, encoder: bool) -> None:
    prompts = [ints(*range(1, 2 + i % 4)) for i in range(len(texts))]
    batch = from_sequences(prompts, texts, encoder=encoder, pad_id=0, normalisation="per_sequence_mean")
    batch.row_ids = torch.arange(len(texts))
    seen: list[int] = []
    for micro in microbatches(batch, most):
        assert micro.row_ids is not None and micro.denominator == batch.denominator
        widest = int((micro.segment_ids >= 0).sum(1).max())
        assert micro.tokens.shape[1] in (widest, batch.tokens.shape[1])
        sizes = (micro.segment_ids >= 0).sum(1)
        if micro.context is not None:
            sizes = sizes + micro.context.mask.sum(1)[micro.context.row]
        assert len(sizes) == 1 or len(sizes) * int(sizes.max()) <= most
        for k, i in enumerate(micro.row_ids.tolist()):
            acted = micro.action_mask[k]
            assert micro.tokens[k, acted].tolist() == batch.tokens[i, batch.action_mask[i]].tolist()
            assert torch.equal(micro.weights[k, acted], batch.weights[i, batch.action_mask[i]])
            if encoder:
                context = micro.context
                assert context is not None
                prompt = context.tokens[context.row[k], context.mask[context.row[k]]]
                assert prompt.tolist() == prompts[i].tolist()
        seen += micro.row_ids.tolist()
    assert sorted(seen) == list(range(len(texts)))


def test_an_encoder_decoders_rows_are_parted_by_length() -> None:
    lengths = [4] * 300 + [20] * 60
    prompts = [ints(1, 2 + i // 4) for i in range(360)]
    batch = from_sequences(prompts, [np.arange(n) + 3 for n in lengths], encoder=True, pad_id=0)
    batch.row_ids = torch.arange(360)
    assert len(list(microbatches(batch, 10**6))) == 1
    pieces = list(microbatches(batch, 10**6, by_length=True))
    assert [p.tokens.shape[1] for p in pieces] == [4, 20]
    assert torch.cat([p.row_ids for p in pieces if p.row_ids is not None]).tolist() == list(range(360))
    assert len(list(microbatches(select_rows(batch, torch.arange(300)), 10**6, by_length=True))) == 1


def test_equal_prompts_share_one_context_row() -> None:
    context = encoder_context([ints(1, 2), ints(1), ints(1, 2)], 0)
    assert context.tokens.shape == (2, 2)


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5", "bart"])
def test_cutting_a_batch_changes_no_gradient(family: str, make_policy: Callable[..., Policy]) -> None:
    policy = make_policy(family)
    prompts = [Prompt(str(i), ints(*range(40, 42 + i))) for i in range(4)]
    groups = Sampler(policy).sample(prompts, Sampling(max_tokens=9, temperature=0.8), 3)
    rows = [
        Trajectory(p, c, np.arange(len(c.tokens), dtype=float), np.ones(len(c.tokens), np.bool_))
        for p, group in zip(prompts, groups, strict=True)
        for c in group
    ]

    def gradient(batches: list[Batch]) -> torch.Tensor:
        policy.model.zero_grad()
        for b in batches:
            assert b.rewards is not None
            loss = -(policy.logprobs(b).logprobs * b.rewards.float() * b.weights).sum() / b.denominator
            loss.backward()
        return torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.grad is not None]).double()

    for normalisation in ("per_completion", "per_token", "per_sequence_mean"):
        batch = from_trajectories(
            rows, encoder=policy.family == "encoder-decoder", pad_id=policy.codec.pad_id, normalisation=normalisation
        )
        whole = gradient([copy.copy(batch)])
        pieces = list(microbatches(batch, 40))
        assert len(pieces) > 2
        cut = gradient(pieces)
        assert float((cut - whole).norm() / whole.norm()) < 1e-5
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
        shuffled = gradient([select_rows(batch, part) for part in order.chunk(5)])
        assert float((shuffled - whole).norm() / whole.norm()) < 1e-5


@pytest.mark.parametrize("encoder", [False, True])
def test_the_two_of_a_pair_are_never_parted(encoder: bool) -> None:
    prompts = [np.arange(1, 3 + i // 4) for i in range(12)]  # two pairs a prompt
    lengths = [2, 9, 5, 1, 7, 3, 3, 3, 8, 2, 1, 1]
    batch = from_sequences(prompts, [np.arange(n) + 20 for n in lengths], encoder=encoder, pad_id=0)
    batch.pair_ids = torch.arange(12) // 2
    batch.is_chosen = torch.arange(12) % 2 == 0
    for room in (1, 24, 40, 70):
        pieces = list(microbatches(batch, room))
        seen = [p for piece in pieces for p in piece.pair_ids.tolist()]
        assert sorted(seen) == batch.pair_ids.tolist() and len(pieces) > 1
        for piece in pieces:
            assert piece.denominator == batch.denominator
            ids = piece.pair_ids.tolist()
            assert ids[::2] == ids[1::2] and piece.is_chosen.tolist() == [True, False] * (len(ids) // 2)
