from __future__ import annotations

import math

import pytest
import torch

from operant.algorithms import credit

ALL: list[credit.Baseline] = [
    "none", "running", "batch", "leave_one_out", "position_leave_one_out", "control_variate", "group_scaled",
    "group_centred", "greedy", "route",
]  # fmt: skip


def rows(*values: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, values))
    rewards = torch.tensor([v + [0.0] * (width - len(v)) for v in values], dtype=torch.float64)
    return rewards, torch.tensor([[True] * len(v) + [False] * (width - len(v)) for v in values])


def test_returns_by_hand() -> None:
    rewards, mask = rows([1.0, 2.0, 4.0], [8.0])
    assert credit.returns_to_go(rewards, mask).tolist() == [[7, 6, 4], [8, 0, 0]]
    assert credit.returns_to_go(rewards, mask, 0.5).tolist() == [[3, 4, 4], [8, 0, 0]]
    assert credit.returns_to_go(rewards, mask, 0.0).tolist() == [[1, 2, 4], [8, 0, 0]]


def test_what_stands_outside_the_mask_is_never_read() -> None:
    rewards, mask = rows([1.0, 2.0, 4.0], [8.0])
    junk = torch.where(mask, rewards, 99.0)
    for gamma in (1.0, 0.5):
        assert torch.equal(credit.returns_to_go(junk, mask, gamma), credit.returns_to_go(rewards, mask, gamma))


def test_discount_weights_by_hand() -> None:
    _, mask = rows([0.0] * 3, [0.0])
    assert credit.discount_weights(mask, 0.5).tolist() == [[1, 0.5, 0.25], [1, 0, 0]]
    steps = torch.tensor([[0.5, 0.25, 9.0], [9.0, 9.0, 9.0]])  # a discount a token; the last one's leads nowhere
    assert credit.discount_weights(mask, steps).tolist() == [[1, 0.5, 0.125], [1, 0, 0]]


def test_leave_one_out_by_hand() -> None:
    groups = torch.tensor([7, 7, 7, 2, 2])
    values = torch.tensor([1.0, 2.0, 6.0, 10.0, 20.0], dtype=torch.float64)
    out, usable = credit.leave_one_out(values, groups, torch.ones(5, dtype=torch.bool))
    assert out.tolist() == [1 - 4, 2 - 3.5, 6 - 1.5, -10, 10]
    assert usable.all()


def test_the_position_mean_counts_finished_rows_as_zero() -> None:
    rewards, mask = rows([1.0, 2.0, 4.0], [8.0], [3.0, 3.0])
    groups, valid = torch.zeros(3, dtype=torch.long), torch.ones(3, dtype=torch.bool)
    out, _, _ = credit.advantages(rewards, mask, groups, valid, baseline="position_leave_one_out")
    # returns: [7 6 4], [8 0 0], [6 3 0]
    assert out.tolist() == [[7 - 7, 6 - 1.5, 4 - 0], [8 - 6.5, 0, 0], [6 - 7.5, 3 - 3, 0]]


def test_the_control_variate_by_hand_and_its_two_ends() -> None:
    rewards, mask = rows([1.0, 2.0, 4.0], [8.0], [3.0, 3.0])
    groups, valid = torch.zeros(3, dtype=torch.long), torch.ones(3, dtype=torch.bool)
    # totals 7, 8, 6; paid before t: [0 1 3], [0 8 8], [0 3 6], the finished ones holding their total
    out, _ = credit.control_variate(rewards, mask, groups, valid, 0.5)
    assert out.tolist() == [
        [0, 0 - 0.5 * (1 - 5.5), 0 - 0.5 * (3 - 7)],
        [1.5, 0, 0],
        [-1.5, -1.5 - 0.5 * (3 - 4.5), 0],
    ]
    whole, _ = credit.control_variate(rewards, mask, groups, valid, 1.0)
    position, _, _ = credit.advantages(rewards, mask, groups, valid, baseline="position_leave_one_out")
    assert torch.allclose(whole, position, atol=1e-12)
    none, _ = credit.control_variate(rewards, mask, groups, valid, 0.0)
    assert torch.allclose(none, torch.tensor([0.0, 1.5, -1.5], dtype=torch.float64)[:, None] * mask, atol=1e-12)


def test_group_scaled_by_hand() -> None:
    values = torch.tensor([1.0, 3.0, 5.0, 5.0], dtype=torch.float64)
    groups, valid = torch.tensor([0, 0, 1, 1]), torch.ones(4, dtype=torch.bool)
    out = credit.group_centred(values, groups, valid)
    deviation = math.sqrt(2.0)  # n − 1
    assert out.tolist() == pytest.approx([-1 / (deviation + 1e-4), 1 / (deviation + 1e-4), 0, 0])
    assert credit.group_centred(values, groups, valid, scale=False).tolist() == [-1, 1, 0, 0]


def test_the_batch_baseline_leaves_the_own_prompt_out() -> None:
    rewards, mask = rows([1.0], [2.0], [5.0], [9.0])
    valid = torch.ones(4, dtype=torch.bool)
    out, _, _ = credit.advantages(rewards, mask, torch.tensor([0, 0, 1, 1]), valid, baseline="batch")
    assert out[:, 0].tolist() == [1 - 7, 2 - 7, 5 - 1.5, 9 - 1.5]
    out, _, _ = credit.advantages(rewards, mask, torch.zeros(4, dtype=torch.long), valid, baseline="batch")
    assert out[:, 0].tolist() == pytest.approx([1 - 16 / 3, 2 - 5, 5 - 4, 9 - 8 / 3])


def test_beta_is_fitted_on_the_other_groups_and_is_one_where_the_potential_foretells_all() -> None:
    # the return is what the first token paid: the potential after it foretells everything
    rewards, mask = rows([1.0, 0.0, 0.0], [5.0, 0.0, 0.0], [2.0, 0.0, 0.0], [9.0, 0.0, 0.0])
    groups, valid = torch.tensor([0, 0, 1, 1]), torch.ones(4, dtype=torch.bool)
    beta = credit.fit_beta(rewards.sum(1), credit.held_potential(rewards, mask), mask, groups, valid)
    assert beta.tolist() == pytest.approx([1.0] * 4)
    # group 1's potential is worthless, group 0's perfect: each is told by the other
    rewards[2:] = torch.tensor([[4.0, 0.0, -4.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    beta = credit.fit_beta(rewards.sum(1), credit.held_potential(rewards, mask), mask, groups, valid)
    assert beta.tolist() == pytest.approx([0.0, 0.0, 1.0, 1.0])
    one = torch.zeros(4, dtype=torch.long)
    alone = credit.fit_beta(rewards.sum(1), credit.held_potential(rewards, mask), mask, one, valid)
    assert alone.tolist() == [0.0] * 4


@pytest.mark.parametrize("baseline", ALL)
def test_a_missing_reward_teaches_nothing_and_reaches_no_other_row(baseline: credit.Baseline) -> None:
    rewards, mask = rows([1.0, 2.0], [4.0], [0.5, 0.25], [3.0, 1.0], [7.0])
    groups = torch.tensor([0, 0, 0, 1, 1])
    valid = torch.tensor([True, False, True, True, True])
    broken = rewards.clone()
    broken[1] = math.nan
    given = torch.tensor([0.1, 0.1, 0.1, 0.4, 0.4], dtype=torch.float64)
    against = {"running": torch.tensor([0.3, 0.2]), "control_variate": 0.7, "greedy": given, "route": given}
    out, returns, usable = credit.advantages(
        broken, mask, groups, valid, baseline=baseline, against=against.get(baseline)
    )
    assert torch.isfinite(out).all() and torch.isfinite(returns[valid]).all()
    assert out[1].tolist() == [0, 0] and usable.tolist() == valid.tolist()
    keep = valid.nonzero()[:, 0]
    kept = against | {"greedy": given[keep], "route": given[keep]}
    without, _, _ = credit.advantages(
        rewards[keep], mask[keep], groups[keep], valid[keep], baseline=baseline, against=kept.get(baseline)
    )
    assert torch.allclose(out[keep], without, atol=1e-12)


@pytest.mark.parametrize(
    "baseline", ["leave_one_out", "position_leave_one_out", "control_variate", "group_scaled", "group_centred"]
)
def test_a_row_whose_fellows_are_all_missing_is_not_usable(baseline: credit.Baseline) -> None:
    rewards, mask = rows([1.0, 2.0], [4.0], [3.0], [5.0])
    valid = torch.tensor([True, False, True, True])
    out, _, usable = credit.advantages(rewards, mask, torch.tensor([0, 0, 1, 1]), valid, baseline=baseline)
    assert usable.tolist() == [False, False, True, True]
    assert not out[:2].any() and out[2:, 0].all()


def test_returns_are_known_after_the_last_missing_reward() -> None:
    _, mask = rows([0.0] * 4, [0.0] * 2, [0.0] * 3, [0.0])
    observed = mask.clone()
    observed[0, 1] = observed[2, 2] = observed[3, 0] = False
    assert credit.known_returns(observed, mask).int().tolist() == [[0, 0, 1, 1], [1] * 4, [0, 0, 0, 1], [0] * 4]
    myopic = credit.known_returns(observed, mask, 0.0)
    assert myopic.int().tolist() == [[1, 0, 1, 1], [1] * 4, [1, 1, 0, 1], [0] * 4]


@pytest.mark.parametrize("baseline", ALL)
def test_a_row_with_one_missing_reward_keeps_its_later_tokens_where_the_baseline_can(baseline: credit.Baseline) -> None:
    rewards, mask = rows([1.0, 2.0, 4.0], [math.nan, 5.0, 3.0], [7.0])
    groups, observed = torch.zeros(3, dtype=torch.long), ~rewards.isnan()
    valid = credit.known_returns(observed, mask)
    against = {"running": torch.tensor([0.5]), "greedy": torch.full((3,), 0.5), "route": torch.full((3,), 0.5)}
    out, _, usable = credit.advantages(rewards, mask, groups, valid, baseline=baseline, against=against.get(baseline))
    assert torch.isfinite(out).all()
    if baseline == "position_leave_one_out":  # returns: [7 6 4], [? 8 3], [7 0 0]
        assert usable.int().tolist() == [[1, 1, 1], [0, 1, 1], [1, 1, 1]]
        assert out.tolist() == [[7 - 7, 6 - 4, 4 - 1.5], [0, 8 - 3, 3 - 2], [7 - 7, 0, 0]]
    elif baseline in credit.PER_POSITION:
        taken_off = 0.0 if baseline == "none" else 0.5
        assert out[1].tolist() == [0, 8 - taken_off, 3 - taken_off]
    else:  # needs every reward of the row
        assert not out[1].any() and usable.tolist() == [True, False, True]
        by_row = torch.tensor([True, False, True])
        assert torch.equal(out, credit.advantages(rewards, mask, groups, by_row, baseline=baseline)[0])


@pytest.mark.parametrize("baseline", ALL)
def test_padding_changes_nothing(baseline: credit.Baseline) -> None:
    rewards, mask = rows([1.0, 2.0], [4.0], [0.5, 0.25], [3.0])
    groups, valid = torch.tensor([0, 0, 1, 1]), torch.ones(4, dtype=torch.bool)
    given = torch.tensor([0.5, 0.5, 0.25, 0.25])
    against = {"running": torch.tensor([0.4, 0.1]), "control_variate": 0.6, "greedy": given, "route": given}
    options = {"baseline": baseline, "against": against.get(baseline)}
    narrow, _, _ = credit.advantages(rewards, mask, groups, valid, **options)
    pad = torch.nn.functional.pad
    wide, _, _ = credit.advantages(pad(rewards, (0, 3)), pad(mask, (0, 3)), groups, valid, **options)
    assert torch.equal(wide[:, :2], narrow) and not wide[:, 2:].any()


def test_the_running_baseline_is_taken_off_every_return_at_its_position() -> None:
    rewards, mask = rows([1.0, 2.0, 1.0], [4.0])
    groups, valid = torch.tensor([0, 1]), torch.ones(2, dtype=torch.bool)
    running = torch.tensor([0.5, 0.25])
    out, returns, _ = credit.advantages(rewards, mask, groups, valid, baseline="running", against=running)
    assert out.tolist() == [[3.5, 2.75, 0.75], [3.5, 0, 0]] and returns.tolist() == [[4, 3, 1], [4, 0, 0]]


def test_the_running_mean_is_kept_by_position_and_reads_earlier_steps_only() -> None:
    assert credit.running_baseline([], []).tolist() == [0.0]
    assert credit.running_baseline([0.0, 3.0], [0.0, 2.0]).tolist() == [0.0, 1.5]  # nobody came to the first
    returns = torch.tensor([[4.0, 3.0, 9.0], [2.0, 0.0, 0.0]])
    inside = torch.tensor([[True, True, False], [True, False, False]])
    sums, counts = credit.updated_running([], [], returns, inside, 0.5)
    assert (sums, counts) == ([6.0, 3.0, 0.0], [2.0, 1.0, 0.0])
    assert {type(number) for number in sums + counts} == {float}  # they are kept in JSON
    assert credit.running_baseline(sums, counts).tolist() == [3.0, 3.0, 3.0]  # nobody came to the third
    sums, counts = credit.updated_running(sums, counts, torch.tensor([[1.0]]), torch.tensor([[True]]), 0.5)
    assert (sums, counts) == ([4.0, 1.5, 0.0], [2.0, 0.5, 0.0])
    assert credit.running_baseline(sums, counts).tolist() == [2.0, 3.0, 3.0]


def test_a_greedy_fellow_is_taken_off_at_its_position_and_held_beyond_its_end() -> None:
    rewards, mask = rows([1.0, 2.0, 1.0], [0.0, 4.0])
    given = torch.tensor([[3.0, 2.0], [1.0, 1.0]])  # a dense and a terminal one
    out, _, _ = credit.advantages(
        rewards, mask, torch.arange(2), torch.ones(2, dtype=torch.bool), baseline="greedy", against=given
    )
    assert out.tolist() == [[4 - 3, 3 - 2, 1 - 2], [4 - 1, 4 - 1, 0]]


def test_a_given_baseline_is_taken_off_and_a_missing_one_leaves_its_row_out() -> None:
    rewards, mask = rows([1.0, 2.0], [4.0], [6.0])
    valid = torch.ones(3, dtype=torch.bool)
    given = torch.tensor([0.5, math.nan, 2.0], dtype=torch.float64)
    out, _, usable = credit.advantages(rewards, mask, torch.arange(3), valid, baseline="greedy", against=given)
    assert out.tolist() == [[2.5, 1.5], [0, 0], [4, 0]] and usable.tolist() == [True, False, True]


def test_a_shift_lowers_the_baseline_of_taught_tokens_only() -> None:
    rewards, mask = rows([1.0, 2.0], [4.0])
    valid = torch.tensor([True, False])
    out, _, _ = credit.advantages(
        rewards, mask, torch.arange(2), valid, baseline="running", against=torch.tensor([0.5]), shift=0.1
    )
    assert out.flatten().tolist() == pytest.approx([2.6, 1.6, 0, 0])


# --- the critic's advantages ------------------------------------------------------------------------------------------


def slow_gae(
    rewards: list[float], values: list[float], gamma: float, lam: float, bootstrap: float
) -> tuple[list[float], list[float]]:
    """Straight from the definition, as the λ-weighted mean of all k-step advantages, with nothing recursive."""
    n = len(rewards)
    values = [*values, bootstrap]

    def k_step(t: int, k: int) -> float:
        end = t + k
        return sum(gamma**i * rewards[t + i] for i in range(k)) + gamma**k * values[end] - values[t]

    out = []
    for t in range(n):
        longest = n - t
        total = sum((1 - lam) * lam ** (k - 1) * k_step(t, k) for k in range(1, longest))
        out.append(total + lam ** (longest - 1) * k_step(t, longest))
    return out, [a + v for a, v in zip(out, values, strict=False)]


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
@pytest.mark.parametrize("lam", [1.0, 0.95, 0.5, 0.0])
def test_gae_agrees_with_a_slow_one_from_the_definition(gamma: float, lam: float) -> None:
    generator = torch.Generator().manual_seed(4)
    lengths = [1, 5, 3, 4]
    mask = torch.arange(6)[None] < torch.tensor(lengths)[:, None]
    rewards, values = torch.randn(2, 4, 6, dtype=torch.float64, generator=generator)
    bootstrap = torch.tensor([0.0, 0.7, -0.4, 0.0], dtype=torch.float64)
    out, returns = credit.gae(rewards, values, mask, gamma=gamma, lam=lam, bootstrap=bootstrap)
    for i, n in enumerate(lengths):
        slow, slow_returns = slow_gae(rewards[i, :n].tolist(), values[i, :n].tolist(), gamma, lam, float(bootstrap[i]))
        assert out[i, :n].tolist() == pytest.approx(slow, abs=1e-12)
        assert returns[i, :n].tolist() == pytest.approx(slow_returns, abs=1e-12)
    assert not out[~mask].any() and not returns[~mask].any()


def test_gae_by_hand_at_a_real_end_and_at_the_limit() -> None:
    rewards, mask = rows([1.0, 2.0], [1.0, 2.0])
    values = torch.tensor([[0.5, 1.0], [0.5, 1.0]], dtype=torch.float64)
    out, returns = credit.gae(rewards, values, mask, gamma=0.5, lam=0.5, bootstrap=torch.tensor([0.0, 4.0]))
    # δ: 1 + 0.5·1 − 0.5 = 1, then 2 − 1 = 1; cut off by the limit, 2 + 0.5·4 − 1 = 3
    assert out.tolist() == [[1.25, 1.0], [1.75, 3.0]] and returns.tolist() == [[1.75, 2.0], [2.25, 4.0]]


def test_whitening_by_hand_reads_only_what_is_taught() -> None:
    values = torch.tensor([[1.0, 3.0, 99.0], [5.0, -7.0, 99.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert credit.whiten(values, mask).tolist() == [
        [pytest.approx(-1.0), 0.0, 0.0],
        [pytest.approx(1.0), 0.0, 0.0],
    ]
    assert not credit.whiten(values, torch.zeros_like(mask)).any()
    one = torch.zeros_like(mask)
    one[0, 0] = True
    assert not credit.whiten(values, one).any()


# --- dynamic sampling, over-long shaping, persistent baselines --------------------------------------------------------


def test_groups_of_equal_rewards_are_told_from_those_that_teach() -> None:
    totals = torch.tensor([1.0, 1.0, 0.0, 1.0, 2.0, 5.0, 3.0, math.nan], dtype=torch.float64)
    groups = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    valid = torch.tensor([True, True, True, True, True, False, True, False])
    keep = credit.rewards_differ(totals, groups, valid)
    assert keep.tolist() == [False, False, True, True, False, False, False, False]


def test_the_soft_punishment_of_long_answers_by_hand() -> None:
    lengths = torch.tensor([1, 12, 14, 16, 18, 20, 25])
    assert credit.overlong_penalty(lengths, 20, 8).tolist() == [0, 0, -0.25, -0.5, -0.75, -1, -1]
    assert not credit.overlong_penalty(lengths, 20, 0).any()


def test_a_routes_baseline_begins_at_the_midpoint_and_moves_only_after_use() -> None:
    table: dict[str, float] = {}
    routes, valid = ["a", "b", "a", "c"], torch.tensor([True, True, True, False])
    assert credit.route_baselines(table, routes, 0.5).tolist() == [0.5] * 4
    new = credit.updated_routes(table, routes, torch.tensor([1.0, 0.0, 0.0, math.nan]), valid, midpoint=0.5, rate=0.2)
    assert table == {} and new == {"a": 0.5, "b": pytest.approx(0.4)}
    newer = credit.updated_routes(new, ["a"], torch.tensor([1.0]), torch.tensor([True]), midpoint=0.5, rate=0.2)
    assert newer == {"a": pytest.approx(0.6), "b": pytest.approx(0.4)}
    assert credit.route_baselines(newer, ["b", "c", "a"], 0.5).tolist() == pytest.approx([0.4, 0.5, 0.6])
