"""Every estimator's mean over all samples of a tiny policy, enumerated, against the exact policy gradient."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from operant.algorithms import credit, objectives

EOS = 2


@dataclass
class World:
    """A tabular policy over three tokens, in float64: one row of logits for every prefix.

    Rows finish early with EOS or at the length limit. Rewards are dense and depend on the prefix only.
    """

    length: int
    theta: Tensor
    tokens: Tensor  # int64[N, T]
    states: Tensor  # int64[N, T]
    mask: Tensor
    rewards: Tensor

    def logits(self, theta: Tensor | None = None) -> Tensor:
        return (self.theta if theta is None else theta)[self.states]

    def logprobs(self, theta: Tensor | None = None) -> Tensor:
        table = torch.log_softmax(self.logits(theta), -1)
        return torch.where(self.mask, table.gather(-1, self.tokens[..., None])[..., 0], 0.0)

    def probabilities(self) -> Tensor:
        return self.logprobs().sum(1).exp().detach()

    def gradient(self, value: Tensor) -> Tensor:
        return torch.autograd.grad(value, self.theta)[0]

    def exact(self, rewards: Tensor, gamma: float = 1.0) -> Tensor:
        """∇ Σ_y π(y) Σ_t γ^t r_t, differentiated through the probabilities themselves."""
        discounts = gamma ** torch.arange(self.length, dtype=torch.float64)
        returns = (rewards * self.mask * discounts).sum(1)
        return self.gradient((self.logprobs().sum(1).exp() * returns).sum())

    def undiscounted_states(self, gamma: float) -> Tensor:
        """Σ_s d(s) Σ_a ∇π(a|s) Q(s, a) with d not discounted: what leaving γ^t out estimates (Thomas 2014)."""
        by_prefix: dict[tuple[int, ...], float] = {}
        for row, n in zip(range(len(self.tokens)), self.mask.sum(1).tolist(), strict=True):
            for t in range(n):
                by_prefix[tuple(self.tokens[row, : t + 1].tolist())] = float(self.rewards[row, t])
        policy = torch.log_softmax(self.theta, -1).exp()
        chance = policy.detach()
        index = {s: i for i, s in enumerate(prefixes(self.length))}

        def q(prefix: tuple[int, ...], action: int) -> float:
            after = (*prefix, action)
            now = by_prefix[after]
            if action == EOS or len(after) == self.length:
                return now
            return now + gamma * sum(float(chance[index[after], a]) * q(after, a) for a in range(3))

        total = torch.zeros((), dtype=torch.float64)
        for prefix, i in index.items():
            reach = 1.0
            for t, action in enumerate(prefix):
                reach *= float(chance[index[prefix[:t]], action])
            total = total + reach * sum(policy[i, a] * q(prefix, a) for a in range(3))
        return self.gradient(total)


def prefixes(length: int) -> list[tuple[int, ...]]:
    return [p for n in range(length) for p in itertools.product((0, 1), repeat=n)]


def make_world(length: int = 3, seed: int = 0) -> World:
    generator = torch.Generator().manual_seed(seed)
    states = {p: i for i, p in enumerate(prefixes(length))}
    rows = [(*p, EOS) for p in states] + [(*p, a) for p in states if len(p) == length - 1 for a in (0, 1)]
    begun = dict.fromkeys(row[: i + 1] for row in rows for i in range(len(row)))
    reward_of = {prefix: float(torch.randn((), generator=generator)) for prefix in begun}
    shape = len(rows), length
    tokens, where = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    mask, rewards = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.float64)
    for i, row in enumerate(rows):
        for t, token in enumerate(row):
            tokens[i, t], where[i, t], mask[i, t], rewards[i, t] = token, states[row[:t]], True, reward_of[row[: t + 1]]
    theta = torch.randn(len(states), 3, dtype=torch.float64, generator=generator, requires_grad=True)
    return World(length, theta, tokens, where, mask, rewards)


@pytest.fixture(scope="module")
def world() -> World:
    return make_world()


def terminal(world: World) -> Tensor:
    """The same totals, paid on the last token."""
    out = torch.zeros_like(world.rewards)
    last = world.mask.sum(1) - 1
    out[torch.arange(len(out)), last] = (world.rewards * world.mask).sum(1)
    return out


def of_groups(world: World, advantages: Callable[[Tensor, Tensor], Tensor], size: int = 2) -> Tensor:
    """Exact mean of (1/G) Σ_i Σ_t A_{i,t} ∇ log π(y_{i,t}) over all groups, each an independent draw of `size` rows.

    advantages: (row numbers int64[groups · size], group ids) → A, for all groups at once.
    """
    combinations = torch.tensor(list(itertools.product(range(len(world.tokens)), repeat=size)))
    chance = world.probabilities()[combinations].prod(1)
    flat = combinations.reshape(-1)
    groups = torch.arange(len(combinations)).repeat_interleave(size)
    loss = objectives.reinforce(world.logprobs()[flat], advantages(flat, groups)).sum(1)
    return -world.gradient((chance.repeat_interleave(size) * loss).sum() / size)


def of_batches(world: World, advantages: Callable[[Tensor], Tensor], size: int) -> Tensor:
    """The same for estimators that look at the whole batch: one call for each batch of `size` rows."""
    chances, terms = [], []
    probabilities, logprobs = world.probabilities(), world.logprobs()
    for combination in itertools.product(range(len(world.tokens)), repeat=size):
        rows = torch.tensor(combination)
        chances.append(probabilities[rows].prod())
        terms.append((logprobs[rows] * advantages(rows)).sum() / size)
    return world.gradient((torch.stack(chances) * torch.stack(terms)).sum())


def close(left: Tensor, right: Tensor) -> bool:
    return torch.allclose(left, right, rtol=1e-9, atol=1e-11)


def everyone(rows: Tensor) -> Tensor:
    return torch.ones(len(rows), dtype=torch.bool)


def test_the_world_is_a_distribution_with_rows_of_every_length(world: World) -> None:
    assert float(world.probabilities().sum()) == pytest.approx(1.0, abs=1e-12)
    assert set(world.mask.sum(1).tolist()) == {1, 2, 3}


def discounted(rewards: Tensor, mask: Tensor, groups: Tensor, valid: Tensor, gamma: float, **options: Any) -> Tensor:
    """The advantages whose mean is the exact gradient: token t weighs γ^t."""
    found = credit.advantages(rewards, mask, groups, valid, gamma=gamma, **options)[0]
    return found * credit.discount_weights(mask, gamma)


def told(baseline: credit.Baseline) -> Tensor | None:
    """What earlier steps leave to the running baseline."""
    return torch.tensor([0.37, 0.21]) if baseline == "running" else None


@pytest.mark.parametrize("gamma", [1.0, 0.7, 0.0])
@pytest.mark.parametrize("baseline", ["none", "running", "leave_one_out", "position_leave_one_out"])
@pytest.mark.parametrize("kind", ["dense", "terminal"])
def test_with_discounted_states_the_mean_is_the_exact_gradient(
    world: World, baseline: credit.Baseline, gamma: float, kind: str
) -> None:
    rewards = world.rewards if kind == "dense" else terminal(world)

    def advantages(rows: Tensor, groups: Tensor) -> Tensor:
        return discounted(
            rewards[rows], world.mask[rows], groups, everyone(rows), gamma, baseline=baseline, against=told(baseline)
        )

    assert close(of_groups(world, advantages), world.exact(rewards, gamma))


@pytest.mark.parametrize("baseline", ["none", "running", "leave_one_out", "position_leave_one_out"])
def test_without_discounted_states_the_bias_is_the_documented_one(world: World, baseline: credit.Baseline) -> None:
    def advantages(rows: Tensor, groups: Tensor) -> Tensor:
        return credit.advantages(
            world.rewards[rows],
            world.mask[rows],
            groups,
            everyone(rows),
            baseline=baseline,
            gamma=0.7,
            against=told(baseline),
        )[0]

    mean = of_groups(world, advantages)
    assert close(mean, world.undiscounted_states(0.7))
    assert not close(mean, world.exact(world.rewards, 0.7))


@pytest.mark.parametrize("gamma", [1.0, 0.7, 0.0])
@pytest.mark.parametrize("baseline", credit.PER_POSITION)
def test_where_early_rewards_are_missing_later_positions_keep_their_exact_mean(
    world: World, baseline: credit.Baseline, gamma: float
) -> None:
    """The first two rewards of every third row are missing: positions 0 and 1 lose a third of their lessons, position 2
    none. The table has its own logits for every prefix, so position t's gradient is that of the prefixes of length t.
    """

    def advantages(rows: Tensor, groups: Tensor, read_as_zero: bool = False) -> Tensor:
        mask, observed = world.mask[rows], torch.ones_like(world.mask[rows])
        observed[2::3, :2] = False
        rewards = torch.where(observed, world.rewards[rows], 0.0 if read_as_zero else torch.nan)
        valid = everyone(rows) if read_as_zero else credit.known_returns(observed, mask, gamma)
        elsewhere = torch.full((len(rows),), 0.37, dtype=torch.float64)
        against = elsewhere if baseline in ("greedy", "route") else told(baseline)
        return discounted(rewards, mask, groups, valid, gamma, baseline=baseline, against=against)

    share = torch.tensor([2 / 3 if len(p) < 2 else 1.0 for p in prefixes(3)], dtype=torch.float64)[:, None]
    expected = world.exact(world.rewards, gamma) * share
    assert close(of_groups(world, advantages, 3), expected)
    if gamma:
        zeros = of_groups(world, lambda rows, groups: advantages(rows, groups, True), 3)
        assert not close(zeros, expected) and not close(zeros, world.exact(world.rewards, gamma))


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0, 1.5])
def test_every_fixed_coefficient_of_the_control_variate_has_the_exact_mean(world: World, beta: float) -> None:
    def advantages(rows: Tensor, groups: Tensor) -> Tensor:
        return credit.advantages(
            world.rewards[rows], world.mask[rows], groups, everyone(rows), baseline="control_variate", against=beta
        )[0]

    assert close(of_groups(world, advantages), world.exact(world.rewards))


def test_a_coefficient_fitted_on_the_other_prompts_has_the_exact_mean() -> None:
    world = make_world(length=2, seed=1)
    groups = torch.tensor([0, 0, 1, 1])
    betas = set()

    def advantages(rows: Tensor) -> Tensor:
        rewards, mask = world.rewards[rows], world.mask[rows]
        beta = credit.fit_beta(
            (rewards * mask).sum(1), credit.held_potential(rewards, mask), mask, groups, everyone(rows)
        )
        betas.update(round(float(b), 6) for b in beta)
        return credit.advantages(rewards, mask, groups, everyone(rows), baseline="control_variate", against=beta)[0]

    assert close(of_batches(world, advantages, 4), world.exact(world.rewards))
    assert len([b for b in betas if 0 < b < 1.5]) >= 3  # the fit did something


def test_a_coefficient_fitted_on_its_own_rows_would_be_biased() -> None:
    """Why `fit_beta` leaves the own group out: the enumeration notices when it does not."""
    world = make_world(length=2, seed=1)
    groups = torch.tensor([0, 0])

    def advantages(rows: Tensor) -> Tensor:
        rewards, mask = world.rewards[rows], world.mask[rows]
        total, _ = credit.leave_one_out((rewards * mask).sum(1), groups, everyone(rows))
        phi, _ = credit.leave_one_out(credit.held_potential(rewards, mask), groups, everyone(rows))
        bottom = (phi * phi * mask).sum()
        beta = float((total[:, None] * phi * mask).sum() / bottom) if float(bottom) > 1e-12 else 0.0
        return credit.control_variate(rewards, mask, groups, everyone(rows), beta)[0]

    assert not close(of_batches(world, advantages, 2), world.exact(world.rewards))


@pytest.mark.parametrize("groups", [[0, 1], [0, 0], [0, 1, 1]], ids=["two prompts", "one prompt", "uneven"])
@pytest.mark.parametrize("gamma", [1.0, 0.6])
def test_the_batch_baseline_has_the_exact_mean(groups: list[int], gamma: float) -> None:
    world = make_world(length=2, seed=2)

    def advantages(rows: Tensor) -> Tensor:
        return discounted(
            world.rewards[rows], world.mask[rows], torch.tensor(groups), everyone(rows), gamma, baseline="batch"
        )

    assert close(of_batches(world, advantages, len(groups)), world.exact(world.rewards, gamma))


@pytest.mark.parametrize("size", [2, 3])
def test_a_mean_that_includes_the_row_shrinks_the_gradient_as_documented(size: int) -> None:
    world = make_world(length=2)

    def advantages(rows: Tensor, groups: Tensor) -> Tensor:
        totals = (world.rewards * world.mask).sum(1)[rows]
        return credit.group_centred(totals, groups, everyone(rows), scale=False)[:, None] * world.mask[rows]

    assert close(of_groups(world, advantages, size), world.exact(world.rewards) * (size - 1) / size)


def test_dividing_by_the_groups_deviation_is_a_bias_that_no_factor_undoes(world: World) -> None:
    def advantages(rows: Tensor, groups: Tensor) -> Tensor:
        return credit.advantages(
            world.rewards[rows], world.mask[rows], groups, everyone(rows), baseline="group_scaled"
        )[0]

    mean, exact = of_groups(world, advantages), world.exact(world.rewards)
    factor = float((mean * exact).sum() / (exact * exact).sum())
    assert factor > 0 and not torch.allclose(mean, factor * exact, rtol=1e-2)


def test_the_clipped_surrogate_on_policy_has_the_same_gradient(world: World) -> None:
    advantages = credit.returns_to_go(world.rewards, world.mask)
    logprobs = world.logprobs()
    loss, clipped = objectives.ppo_clip(logprobs, logprobs.detach(), advantages)
    assert float(clipped.sum()) == 0
    assert close(-world.gradient((world.probabilities()[:, None] * loss).sum()), world.exact(world.rewards))


@pytest.mark.parametrize("surrogate", ["gspo", "cispo", "topr"])
def test_every_surrogate_on_policy_has_the_same_gradient(world: World, surrogate: str) -> None:
    """TOPR and CISPO of the sum over tokens; GSPO, which is defined with the mean over a row's tokens, of that mean."""
    totals = (world.rewards * world.mask).sum(1, keepdim=True).expand_as(world.rewards)
    logprobs, lengths = world.logprobs(), world.mask.sum(1)
    old = logprobs.detach()
    if surrogate == "gspo":
        loss = objectives.gspo(logprobs, old, totals, world.mask, 0.1, 0.1)[0] / lengths[:, None]
        value = world.probabilities() * totals[:, 0] / lengths
        expected = world.gradient((value * world.logprobs().sum(1)).sum())
        assert close(-world.gradient((world.probabilities()[:, None] * loss * world.mask).sum()), expected)
        return
    loss = (
        objectives.cispo(logprobs, old, totals)[0]
        if surrogate == "cispo"
        else objectives.topr(logprobs, old, totals, world.mask)[0]
    )
    mean = -world.gradient((world.probabilities()[:, None] * loss * world.mask).sum())
    assert close(mean, world.exact(world.rewards))


@pytest.mark.parametrize("baseline", ["greedy", "route"])
@pytest.mark.parametrize("kind", ["dense", "terminal"])
@pytest.mark.parametrize("gamma", [1.0, 0.7])
@pytest.mark.parametrize("shift", [0.0, 0.4])
def test_a_baseline_from_elsewhere_has_the_exact_mean_on_policy_with_any_shift(
    world: World, baseline: credit.Baseline, kind: str, gamma: float, shift: float
) -> None:
    """One completion a prompt is enough: a greedy completion's reward and a route's earlier ones depend on no draw."""
    rewards = world.rewards if kind == "dense" else terminal(world)

    def advantages(rows: Tensor, groups: Tensor) -> Tensor:
        return discounted(
            rewards[rows], world.mask[rows], groups, everyone(rows), gamma, baseline=baseline,
            against=torch.full((len(rows),), 0.61, dtype=torch.float64), shift=shift,
        )  # fmt: skip

    assert close(of_groups(world, advantages, size=1), world.exact(rewards, gamma))


@pytest.mark.parametrize("size", [2, 3])
def test_dr_grpos_mean_is_the_exact_gradient_but_for_a_known_factor(size: int) -> None:
    world = make_world(length=2)

    def advantages(rows: Tensor, groups: Tensor) -> Tensor:
        return credit.advantages(
            world.rewards[rows], world.mask[rows], groups, everyone(rows), baseline="group_centred"
        )[0]

    assert close(of_groups(world, advantages, size), world.exact(world.rewards) * (size - 1) / size)


def test_a_missing_reward_leaves_the_mean_of_the_rest_exact() -> None:
    """Three rows a group of which one's reward is missing whatever it says: the other two are as a group of two."""
    world = make_world(length=2)

    def advantages(rows: Tensor, groups: Tensor) -> Tensor:
        valid = torch.arange(len(rows)) % 3 != 1
        rewards = torch.where(valid[:, None], world.rewards[rows], torch.nan)
        return discounted(rewards, world.mask[rows], groups, valid, 0.8, baseline="position_leave_one_out")

    assert close(of_groups(world, advantages, 3), world.exact(world.rewards, 0.8) * 2 / 3)


def test_dynamic_sampling_divides_the_gradient_by_the_chance_of_keeping_a_group() -> None:
    """DAPO's kept groups, in proportion to how often they come: as documented, one factor a prompt."""
    world = make_world(length=2)
    totals = ((world.rewards * world.mask).sum(1) > 0).double()  # right or wrong
    pays = torch.zeros_like(world.rewards)
    pays[torch.arange(len(pays)), world.mask.sum(1) - 1] = totals
    pairs = torch.tensor(list(itertools.product(range(len(world.tokens)), repeat=2)))
    groups, flat = torch.arange(len(pairs)).repeat_interleave(2), pairs.reshape(-1)
    kept = credit.rewards_differ(totals[flat], groups, everyone(flat)).reshape(-1, 2)
    assert torch.equal(kept[:, 0], kept[:, 1])
    chance = world.probabilities()[pairs].prod(1)
    share = float(chance[kept[:, 0]].sum())
    assert 0.1 < share < 0.9

    advantages = credit.advantages(pays[flat], world.mask[flat], groups, everyone(flat), baseline="leave_one_out")[0]
    weight = (chance * kept[:, 0] / share).repeat_interleave(2)
    loss = objectives.reinforce(world.logprobs()[flat], advantages).sum(1)
    assert close(-world.gradient((weight * loss).sum() / 2), world.exact(pays) / share)


def test_whitening_over_the_batch_is_biased_and_the_bias_fades_with_its_size() -> None:
    """REINFORCE++: against the gradient over the deviation of all rewards, which is its limit for a large batch."""
    world = make_world(length=2, seed=3)
    probabilities, totals = world.probabilities(), (world.rewards * world.mask).sum(1)

    def mean_of(size: int) -> Tensor:
        def advantages(rows: Tensor) -> Tensor:
            plain = credit.advantages(
                terminal(world)[rows], world.mask[rows], torch.arange(len(rows)), everyone(rows), baseline="none"
            )[0]
            return credit.whiten(plain, world.mask[rows])

        return of_batches(world, advantages, size)

    weight = probabilities[:, None] * world.mask / (probabilities * world.mask.sum(1)).sum()
    spread = totals[:, None] * world.mask
    centre = float((weight * spread).sum())
    deviation = float((weight * (spread - centre) ** 2).sum()) ** 0.5
    limit = world.exact(world.rewards) / deviation
    errors = [float((mean_of(size) - limit).norm() / limit.norm()) for size in (2, 3, 4)]
    assert errors == sorted(errors, reverse=True) and 0.05 < errors[-1] < errors[0] * 0.8


# --- with a critic -------------------------------------------------------------------------------------------------


def exact_values(world: World, gamma: float) -> Tensor:
    """V^π of the state before each token, and in one more column of the state after the last one: float64[N, T + 1]."""
    p = torch.log_softmax(world.theta, -1).exp().detach()
    index = {s: i for i, s in enumerate(prefixes(world.length))}
    reward = {
        tuple(world.tokens[row, : t + 1].tolist()): float(world.rewards[row, t])
        for row in range(len(world.tokens))
        for t in range(int(world.mask[row].sum()))
    }

    def v(prefix: tuple[int, ...]) -> float:
        if len(prefix) == world.length or (prefix and prefix[-1] == EOS):
            return 0.0
        return sum(float(p[index[prefix], a]) * (reward[(*prefix, a)] + gamma * v((*prefix, a))) for a in range(3))

    out = torch.zeros(len(world.tokens), world.length + 1, dtype=torch.float64)
    for row, n in enumerate(world.mask.sum(1).tolist()):
        for t in range(n + 1):
            out[row, t] = v(tuple(world.tokens[row, :t].tolist()))
    return out


@pytest.mark.parametrize("gamma", [1.0, 0.7])
@pytest.mark.parametrize("lam", [1.0, 0.9, 0.0])
def test_with_a_perfect_critic_every_lambda_has_the_exact_mean(world: World, gamma: float, lam: float) -> None:
    values = exact_values(world, gamma)[:, :-1]
    advantages, returns = credit.gae(world.rewards, values, world.mask, gamma=gamma, lam=lam)
    weighed = advantages * credit.discount_weights(world.mask, gamma)
    loss = objectives.reinforce(world.logprobs(), weighed)
    assert close(loss_gradient(world, -loss), world.exact(world.rewards, gamma))
    if lam == 0.0:  # what the critic learns from is one step ahead, and in the mean right
        ahead = world.probabilities()[:, None] * world.mask * (returns - values)
        assert abs(float(ahead.sum())) < 1e-12


def test_a_wrong_critic_biases_lambda_below_one_and_never_lambda_one(world: World) -> None:
    wrong = torch.randn(world.rewards.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    # a critic sees the prefix only: the same for all rows that share it
    of_prefix = torch.randn(len(world.theta), dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    wrong = of_prefix[world.states]

    def mean(lam: float) -> Tensor:
        advantages, _ = credit.gae(world.rewards, wrong, world.mask, gamma=1.0, lam=lam)
        return loss_gradient(world, -objectives.reinforce(world.logprobs(), advantages))

    exact = world.exact(world.rewards)
    assert close(mean(1.0), exact)
    errors = [float((mean(lam) - exact).norm()) for lam in (1.0, 0.95, 0.5, 0.0)]
    assert errors == sorted(errors) and errors[1] > 1e-3


@pytest.mark.parametrize("lam", [1.0, 0.6])
def test_bootstrapping_at_the_limit_is_the_gradient_of_the_whole_text_and_leaving_it_out_is_not(
    world: World, lam: float
) -> None:
    """Rows cut off after two tokens of three: with the value of what follows, the first two are taught as in full."""
    values = exact_values(world, 1.0)
    cut = world.mask.clone()
    cut[:, 2] = False
    truncated = world.mask[:, 2]
    bootstrap = torch.where(truncated, values[:, 2], 0.0)

    def mean(bootstrap: Tensor) -> Tensor:
        advantages, _ = credit.gae(world.rewards, values[:, :3], cut, gamma=1.0, lam=lam, bootstrap=bootstrap)
        loss = objectives.reinforce(world.logprobs(), advantages) * cut
        return world.gradient(-(world.probabilities()[:, None] * loss).sum())

    early = torch.tensor([len(p) < 2 for p in prefixes(world.length)])
    exact = world.exact(world.rewards)[early]
    assert close(mean(bootstrap)[early], exact)
    assert not close(mean(torch.zeros_like(bootstrap))[early], exact)


# --- from another policy's completions ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def behavior(world: World) -> Tensor:
    """Another policy's table of logits: stale, or a person's."""
    noise = torch.randn(world.theta.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    return world.theta.detach() + 0.7 * noise


def off_policy(world: World, behavior: Tensor, loss: Tensor) -> Tensor:
    """−∇ of the mean of a loss over completions that `behavior` wrote."""
    chance = world.logprobs(behavior).sum(1).exp()
    return world.gradient(-(chance[:, None] * world.mask * loss).sum())


def test_topr_off_policy_has_the_mean_of_its_paper(world: World, behavior: Tensor) -> None:
    """Σ_y μ(y) A⁺ ∇log π(y) + Σ_y min(π, μ)(y) A⁻ ∇log π(y), written out without any ratio."""
    totals = (world.rewards * world.mask).sum(1)
    advantages = (totals - 0.2)[:, None].expand_as(world.rewards)
    mu, pi = world.logprobs(behavior).sum(1).exp(), world.probabilities()
    loss, _ = objectives.topr(world.logprobs(), world.logprobs(behavior), advantages, world.mask)
    weight = torch.where(totals > 0.2, mu, torch.minimum(pi, mu)) * (totals - 0.2)
    expected = world.gradient((weight * world.logprobs().sum(1)).sum())
    assert close(off_policy(world, behavior, loss), expected)
    assert not torch.allclose(expected, world.exact(world.rewards), rtol=0.05)  # another objective, not an estimator


def test_asymmetric_reinforce_off_policy_is_the_gradient_of_its_objective(world: World, behavior: Tensor) -> None:
    """J = E_μ[(r − V) log π(y)]: a lower V adds imitation of what was written, which no on-policy shift does."""
    mu, totals = world.logprobs(behavior).sum(1).exp(), (world.rewards * world.mask).sum(1)
    given = torch.full((len(totals),), float((mu * totals).sum()), dtype=torch.float64)
    means = []
    for shift in (0.0, 0.3):
        advantages = credit.advantages(
            terminal(world), world.mask, torch.arange(len(totals)), everyone(totals), baseline="route", against=given,
            shift=shift,
        )[0]  # fmt: skip
        means.append(off_policy(world, behavior, objectives.reinforce(world.logprobs(), advantages)))
        assert close(means[-1], world.gradient((mu * (totals - given + shift) * world.logprobs().sum(1)).sum()))
    imitation = world.gradient((mu * world.logprobs().sum(1)).sum())
    assert close(means[1] - means[0], 0.3 * imitation) and float(imitation.norm()) > 1e-3


def test_truncated_weights_lessen_the_bias_of_stale_completions_and_the_sequence_mask_adds_its_own(
    world: World, behavior: Tensor
) -> None:
    """Measured, not assumed: the relative error of the mean gradient, for weights 1, per token, masked, and exact."""
    advantages = credit.returns_to_go(world.rewards, world.mask)
    logprobs, mu = world.logprobs().detach(), world.logprobs(behavior)
    weights = objectives.behavior_correction(logprobs, mu, cap=2.0)
    band = objectives.sequence_mask(logprobs, mu, world.mask, 0.5)
    assert 0 < float(band.mean()) < 1
    whole = (logprobs - mu).sum(1, keepdim=True).exp()
    exact = world.exact(world.rewards)

    def error(weight: Tensor, writer: Tensor = behavior) -> float:
        loss = objectives.reinforce(world.logprobs(), advantages) * weight
        return float((off_policy(world, writer, loss) - exact).norm() / exact.norm())

    unweighted, truncated, masked = error(torch.ones(())), error(weights), error(weights * band)
    assert error(whole) < 1e-9  # the untruncated weight of the whole sequence is unbiased
    assert 0.01 < truncated < unweighted < masked  # 0.14, 0.48 and 0.89 here: a mask is a guard, not a correction
    near = world.theta.detach() + 0.01 * (behavior - world.theta.detach())
    assert error(objectives.behavior_correction(logprobs, world.logprobs(near), cap=2.0), near) < 0.02


# --- KL ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference(world: World) -> Tensor:
    return torch.randn(world.theta.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9))


def sequence_kl_gradient(world: World, reference: Tensor) -> Tensor:
    logprobs, ref = world.logprobs().sum(1), world.logprobs(reference).sum(1)
    return world.gradient((logprobs.exp() * (logprobs - ref)).sum())


def token_kl_gradient(world: World, reference: Tensor, forward: bool = False) -> Tensor:
    """∇ of KL(π‖π_ref), or forward KL(π_ref‖π), at every state, states weighed as π visits them."""
    p, q = torch.log_softmax(world.logits(), -1), torch.log_softmax(reference[world.states], -1)
    kl = (q.exp() * (q - p)).sum(-1) if forward else (p.exp() * (p - q)).sum(-1)
    return world.gradient((world.probabilities()[:, None] * world.mask * kl).sum())


def loss_gradient(world: World, loss: Tensor) -> Tensor:
    return world.gradient((world.probabilities()[:, None] * world.mask * loss).sum())


@pytest.mark.parametrize("baseline", ["none", "leave_one_out", "position_leave_one_out"])
def test_k1_in_the_reward_is_the_gradient_of_the_sequence_kl(
    world: World, reference: Tensor, baseline: credit.Baseline
) -> None:
    k1 = objectives.kl_k1(world.logprobs(), world.logprobs(reference))
    assert not k1.requires_grad

    def advantages(rows: Tensor, groups: Tensor) -> Tensor:
        return credit.advantages(-k1[rows], world.mask[rows], groups, everyone(rows), baseline=baseline)[0]

    assert close(-of_groups(world, advantages), sequence_kl_gradient(world, reference))


def test_k1_in_the_loss_would_teach_nothing_on_policy(world: World, reference: Tensor) -> None:
    gap = world.logprobs() - world.logprobs(reference)
    assert close(loss_gradient(world, gap), torch.zeros_like(world.theta))


def test_k2_in_the_loss_is_the_gradient_of_the_token_kl(world: World, reference: Tensor) -> None:
    loss = objectives.kl_k2(world.logprobs(), world.logprobs(reference))
    assert close(loss_gradient(world, loss), token_kl_gradient(world, reference))


def test_k3_in_the_loss_follows_the_forward_divergence(world: World, reference: Tensor) -> None:
    gradient = loss_gradient(world, objectives.kl_k3(world.logprobs(), world.logprobs(reference)))
    assert close(gradient, token_kl_gradient(world, reference, forward=True))
    assert not close(gradient, token_kl_gradient(world, reference))


def test_the_values_of_k1_and_k3_and_the_full_kl_agree_in_the_mean(world: World, reference: Tensor) -> None:
    p, q = world.logprobs().detach(), world.logprobs(reference)
    full = objectives.full_kl(world.logits().detach(), reference[world.states])
    weight = world.probabilities()[:, None] * world.mask
    expected = float((weight * full).sum())
    assert expected > 0.1
    assert float((weight * objectives.kl_k1(p, q)).sum()) == pytest.approx(expected, abs=1e-12)
    assert float((weight * objectives.kl_k3(p, q)).sum()) == pytest.approx(expected, abs=1e-12)


def test_the_full_kl_has_the_gradient_of_the_token_kl(world: World, reference: Tensor) -> None:
    loss = objectives.full_kl(world.logits(), reference[world.states])
    assert close(loss_gradient(world, loss), token_kl_gradient(world, reference))
