"""Every estimator's mean over all samples of a tiny policy, enumerated, against the exact policy gradient."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from operant import credit, objectives

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


@pytest.mark.parametrize("gamma", [1.0, 0.7, 0.0])
@pytest.mark.parametrize("baseline", ["none", "running", "leave_one_out", "position_leave_one_out"])
@pytest.mark.parametrize("kind", ["dense", "terminal"])
def test_with_discounted_states_the_mean_is_the_exact_gradient(
    world: World, baseline: credit.Baseline, gamma: float, kind: str
) -> None:
    rewards = world.rewards if kind == "dense" else terminal(world)

    def advantages(rows: Tensor, groups: Tensor) -> Tensor:
        return credit.advantages(
            rewards[rows], world.mask[rows], groups, everyone(rows),
            baseline=baseline, gamma=gamma, running=0.37, discount_state=True,
        )[0]  # fmt: skip

    assert close(of_groups(world, advantages), world.exact(rewards, gamma))


@pytest.mark.parametrize("baseline", ["none", "running", "leave_one_out", "position_leave_one_out"])
def test_without_discounted_states_the_bias_is_the_documented_one(world: World, baseline: credit.Baseline) -> None:
    def advantages(rows: Tensor, groups: Tensor) -> Tensor:
        return credit.advantages(
            world.rewards[rows], world.mask[rows], groups, everyone(rows), baseline=baseline, gamma=0.7, running=0.37
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
        return credit.advantages(
            rewards, mask, groups, valid, baseline=baseline, gamma=gamma, running=0.37, discount_state=True
        )[0]

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
            world.rewards[rows], world.mask[rows], groups, everyone(rows), baseline="control_variate", beta=beta
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
        return credit.advantages(rewards, mask, groups, everyone(rows), baseline="control_variate", beta=beta)[0]

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
        return credit.advantages(
            world.rewards[rows], world.mask[rows], torch.tensor(groups), everyone(rows),
            baseline="batch", gamma=gamma, discount_state=True,
        )[0]  # fmt: skip

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
