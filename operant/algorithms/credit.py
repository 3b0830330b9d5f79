"""Credit assignment: from token rewards to advantages. Pure functions of tensors.

Axes: N completions, T completion tokens (right-padded). `mask` bool[N, T] is True on a completion's tokens; `groups`
int64[N] says which completions answer the same prompt; `valid` bool[N] is False where a reward is missing: such a row
is taught nothing, and no baseline reads it. Where only some of a row's token rewards are missing, the baselines of
`PER_POSITION` take `valid` bool[N, T] from `known_returns`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

Baseline = Literal[
    "none", "running", "batch", "leave_one_out", "position_leave_one_out", "control_variate", "group_scaled",
    "group_centred", "greedy", "route", "critic",
]  # fmt: skip
#: Baselines that read nothing but returns-to-go from the same position on, and so can leave single positions out.
PER_POSITION: tuple[Baseline, ...] = ("none", "running", "position_leave_one_out", "greedy", "route")


def returns_to_go(rewards: Tensor, mask: Tensor, gamma: float | Tensor = 1.0) -> Tensor:
    """Discounted return from each token on: G_t = Σ_{k ≥ t} γ^{k−t} r_k (Sutton & Barto 2018, eq. 3.8).

    rewards: float[N, T], mask: bool[N, T]. gamma: γ, or float[N, T], the discount from each token to the next.
    Returns float[N, T], zero outside the mask.
    """
    rewards = rewards * mask
    if not isinstance(gamma, Tensor) and gamma == 1.0:
        return rewards.flip(1).cumsum(1).flip(1) * mask
    out = torch.zeros_like(rewards)
    running = torch.zeros_like(rewards[:, 0])
    for t in range(rewards.shape[1] - 1, -1, -1):
        running = rewards[:, t] + (gamma[:, t] if isinstance(gamma, Tensor) else gamma) * running
        out[:, t] = running
    return out * mask


def known_returns(observed: Tensor, mask: Tensor, gamma: float | Tensor = 1.0) -> Tensor:
    """Where the return-to-go depends on no missing reward: after the last unobserved one, bool[N, T].

    observed, mask: bool[N, T]. At γ = 0 a return is one reward, known where that is. A finished row's 0 is known, but a
    row with nothing observed counts nowhere. If being observed has nothing to do with what is written, the gradient of
    position t has the exact mean times the share of rows that are taught there.
    """
    hidden = mask & ~observed
    if isinstance(gamma, Tensor) or gamma != 0.0:
        hidden = hidden.flip(1).cumsum(1).flip(1) > 0
    return ~hidden & (observed & mask).any(1, keepdim=True)


def discount_weights(mask: Tensor, gamma: float | Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """γ^t for token t: the weight of each term in the exact gradient of Σ γ^t r_t (Thomas 2014). float[N, T].

    gamma: γ, or float[N, T], whose product over the tokens before is then the weight."""
    if isinstance(gamma, Tensor):
        before = torch.nn.functional.pad(gamma.to(dtype)[:, :-1], (1, 0), value=1.0)
        return before.cumprod(1) * mask
    steps = (mask.to(dtype).cumsum(1) - 1).clamp(min=0)
    return torch.pow(torch.as_tensor(gamma, dtype=dtype, device=mask.device), steps) * mask


def group_sums(values: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over each row's group, per row: values float[N, …] → (sums float[N, …], group index int64[N])."""
    _, index = groups.unique(return_inverse=True)
    count = int(index.max()) + 1 if len(index) else 0
    sums = torch.zeros((count, *values.shape[1:]), dtype=values.dtype, device=values.device).index_add(0, index, values)
    return sums[index], index


def leave_one_out(values: Tensor, groups: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """values_i − mean_{j ≠ i, j in i's group} values_j (Kool et al. 2019; RLOO, Ahmadian et al. 2024).

    values: float[N] or float[N, T]. With float[N, T] each position has its own mean, over all valid rows. A finished
    row counts with what it holds there (0 for a return-to-go), so the mean does not depend on row i's choices and is
    unbiased. Means over the rows still alive do depend on them, and are not offered. groups: int64[N]. valid: bool[N],
    or bool[N, T] with such values.
    Returns (float like values, usable like valid): a row that is alone in its group has no baseline and is not usable.
    """
    weight = valid.to(values.dtype).reshape(*valid.shape, *[1] * (values.dim() - valid.dim()))
    count, _ = group_sums(weight, groups)
    sums, _ = group_sums(values * weight, groups)
    others = count - weight
    usable = valid & (others >= 1).reshape(valid.shape)
    centred = values - (sums - values * weight) / others.clamp(min=1)
    return centred * usable.reshape(weight.shape).to(values.dtype), usable


def group_deviation(values: Tensor, groups: Tensor, valid: Tensor) -> Tensor:
    """Standard deviation (n − 1) of float[N] sequence returns within each group, per row; 0 for groups of one."""
    weight = valid.to(values.dtype)
    count, _ = group_sums(weight, groups)
    mean = group_sums(values * weight, groups)[0] / count.clamp(min=1)
    square, _ = group_sums(weight * (values - mean) ** 2, groups)
    return (square / (count - 1).clamp(min=1)).sqrt()


def group_centred(values: Tensor, groups: Tensor, valid: Tensor, scale: bool = True, eps: float = 1e-4) -> Tensor:
    """(values_i − mean_g) / (std_g + ε), GRPO's advantage (Shao et al. 2024, eq. 21 of arXiv 2402.03300v3).

    The mean includes row i, so the expected gradient is the exact one times (G − 1)/G before scaling. The division by
    the group's own deviation is a further bias, which no factor undoes. `scale=False` is Dr. GRPO (Liu et al. 2025).
    values: float[N]; groups: int64[N]; valid: bool[N]. Returns float[N], 0 where not valid.
    """
    weight = valid.to(values.dtype)
    count, _ = group_sums(weight, groups)
    mean = group_sums(values * weight, groups)[0] / count.clamp(min=1)
    centred = (values - mean) * weight
    return centred / (group_deviation(values, groups, valid) + eps) if scale else centred


def held_potential(rewards: Tensor, mask: Tensor) -> Tensor:
    """Φ_{t−1} − M('') at each token, from potential rewards r_t = Φ_t − Φ_{t−1}: their exclusive cumulative sum.

    A finished row holds its total M(y) − M('') after its last token. float[N, T], defined on all T columns.
    """
    summed = (rewards * mask).cumsum(1)
    return torch.nn.functional.pad(summed[:, :-1], (1, 0))


def fit_beta(returns: Tensor, potential: Tensor, mask: Tensor, groups: Tensor, valid: Tensor) -> Tensor:
    """The coefficient β of the control variate for each group, fitted on the other groups only.

    Least squares of the centred return on the centred potential, β_g = Σ_{h ≠ g} ⟨m, φ⟩ / Σ_{h ≠ g} ⟨φ, φ⟩, where m and
    φ are leave-one-out centred. What a row is taught does not enter its own β, so the gradient stays unbiased.
    returns: float[N]; potential, mask: [N, T]. Returns float[N], clipped to [0, 1.5]; 0 where no other group tells.
    """
    centred, usable = leave_one_out(returns, groups, valid)
    phi, _ = leave_one_out(potential, groups, valid)
    inside = mask & usable[:, None]
    top = (centred[:, None] * phi * inside).sum(1)
    bottom = (phi * phi * inside).sum(1)
    numerator = top.sum() - group_sums(top, groups)[0]
    denominator = bottom.sum() - group_sums(bottom, groups)[0]
    beta = torch.where(denominator > 1e-12, numerator / denominator.clamp(min=1e-12), torch.zeros_like(numerator))
    return beta.clamp(0.0, 1.5)


def control_variate(
    rewards: Tensor, mask: Tensor, groups: Tensor, valid: Tensor, beta: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Sequence return with the rewards already paid as a control variate, at γ = 1.

        A_{i,t} = (M_i − mean_{j≠i} M_j) − β (Φ_{i,t−1} − mean_{j≠i} Φ_{j,t−1})

    For potential rewards Φ_{t−1} is the potential up to M(''); for others the sum of the rewards before t. β = 0 is
    the sequence return with leave-one-out, β = 1 the return-to-go with position-wise leave-one-out. What was paid
    before token t does not depend on it, so every β that does not either has the same expected gradient and only the
    variance changes. beta: a number, or float[N] such as `fit_beta` gives.
    Returns (advantages float[N, T], usable bool[N]).
    """
    total, usable = leave_one_out((rewards * mask).sum(1), groups, valid)
    phi, _ = leave_one_out(held_potential(rewards, mask), groups, valid)
    coefficient = torch.as_tensor(beta, dtype=rewards.dtype, device=rewards.device).reshape(-1, 1)
    return (total[:, None] - coefficient * phi) * (mask & usable[:, None]), usable


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float | Tensor,
    lam: float,
    bootstrap: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16).

        δ_t = r_t + γ V_{t+1} − V_t,   A_t = Σ_k (γλ)^k δ_{t+k},   return_t = A_t + V_t

    V_t is the value of the state before token t. After the last token comes `bootstrap` float[N]: 0 where the text
    really ended (the default), the critic's value where only the length limit cut it off. λ = 1 is the return minus the
    value, unbiased whatever the values are; λ < 1 trusts the critic, and its bias is the critic's error.
    rewards, values: float[N, T]; mask: bool[N, T]. Returns (advantages, returns for the critic) float[N, T].
    """
    rewards, values = rewards * mask, values * mask
    after = torch.nn.functional.pad(values[:, 1:], (0, 1))
    if bootstrap is not None:
        last = mask & ~torch.nn.functional.pad(mask[:, 1:], (0, 1))
        after = torch.where(last, bootstrap[:, None].to(values.dtype), after)
    delta = (rewards + gamma * after - values) * mask
    estimate = returns_to_go(delta, mask, gamma * lam)
    return estimate, (estimate + values) * mask


def n_step_targets(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float | Tensor, steps: int) -> Tensor:
    """y_t = Σ_{k<n} γ^k r_{t+k} + γ^n V_{t+n}, with nothing after the last token (Sutton & Barto 2018, eq. 7.1).

    rewards, values: float[N, T], V_t of the state before token t; mask: bool[N, T]; gamma: γ, or float[N, T], the
    discount from each token to the next. steps: n; from the row's length on it is the return-to-go. float[N, T].
    """
    rewards, out = rewards * mask, values * mask
    for _ in range(min(steps, rewards.shape[1])):
        out = (rewards + gamma * torch.nn.functional.pad(out[:, 1:], (0, 1))) * mask
    return out


def whiten(advantages: Tensor, mask: Tensor, eps: float = 1e-8) -> Tensor:
    """(A − mean) / (std + ε) over all tokens of the batch that teach: float[N, T], mask bool[N, T].

    PPO's customary normalisation (Andrychowicz et al. 2021, C67) and REINFORCE++'s only baseline (Hu et al. 2025). The
    mean contains the row itself and the deviation is the batch's own: a bias of order 1 / batch, no factor apart.
    """
    count = mask.sum()
    if int(count) < 2:
        return torch.zeros_like(advantages)
    mean = (advantages * mask).sum() / count
    deviation = ((advantages - mean) ** 2 * mask).sum().div(count - 1).sqrt()
    return (advantages - mean) / (deviation + eps) * mask


def rewards_differ(totals: Tensor, groups: Tensor, valid: Tensor) -> Tensor:
    """Rows whose group has different rewards: those that DAPO's dynamic sampling keeps (Yu et al. 2025, eq. 11).

    Groups of equal rewards have no advantage; leaving them out makes the expected gradient that of the kept prompts,
    the whole one divided by the chance of keeping. totals: float[N] → bool[N].
    """
    return valid & (group_deviation(torch.where(valid, totals, 0.0), groups, valid) > 1e-9)


def overlong_penalty(lengths: Tensor, limit: int, buffer: int) -> Tensor:
    """DAPO's soft punishment (Yu et al. 2025, eq. 13): 0 up to limit − buffer tokens, then down linearly to −1.

    lengths: int64[N]. Returns float64[N].
    """
    if buffer <= 0:
        return torch.zeros(lengths.shape, dtype=torch.float64)
    return ((limit - buffer - lengths).double() / buffer).clamp(-1.0, 0.0)


def running_baseline(sums: Sequence[float], counts: Sequence[float]) -> Tensor:
    """The mean return-to-go of earlier steps at each position, float64[W]; see `updated_running`.

    A position that nobody has reached takes the number of the one before it, and 0 stands where nothing is known. It
    depends on earlier steps only, so the gradient stays unbiased. A dense reward needs a number for each position:
    what is left to be paid shrinks as a text goes on, and one number for all would punish its end for that.
    """
    out: list[float] = []
    for total, count in zip(sums, counts, strict=True):
        out.append(total / count if count > 0 else out[-1] if out else 0.0)
    return torch.tensor(out or [0.0], dtype=torch.float64)


def updated_running(
    sums: Sequence[float], counts: Sequence[float], returns: Tensor, inside: Tensor, decay: float
) -> tuple[list[float], list[float]]:
    """Sums and counts of the returns-to-go by position, earlier ones weighing `decay` of what they did.

    returns: float[N, T], inside: bool[N, T], the tokens whose return is known. To be called after `running_baseline`.
    """
    width = max(len(sums), returns.shape[1])
    new = []
    for earlier, now in ((sums, torch.where(inside, returns, 0.0).sum(0)), (counts, inside.sum(0))):
        old = [*earlier, *[0.0] * (width - len(earlier))]
        new.append([decay * a + b for a, b in zip(old, [*now.tolist(), *[0.0] * (width - now.shape[0])], strict=True)])
    return new[0], new[1]


def held(values: Tensor, width: int) -> Tensor:
    """The last axis cut to `width`, or filled up to it with its last number: float[…, W] → float[…, width]."""
    short = width - values.shape[-1]
    return (
        values[..., :width]
        if short <= 0
        else torch.cat([values, values[..., -1:].expand(*values.shape[:-1], short)], -1)
    )


def route_baselines(table: Mapping[str, float], routes: Sequence[str], midpoint: float) -> Tensor:
    """The persistent baseline of each row's route, `midpoint` for one that was never updated: float64[N].

    An exponential mean of earlier rewards (a value tracker such as SPO's, Xu & Ding 2025). It depends on earlier steps
    only, so the gradient stays unbiased with one completion a prompt.
    """
    return torch.tensor([table.get(route, midpoint) for route in routes], dtype=torch.float64)


def updated_routes(
    table: Mapping[str, float], routes: Sequence[str], totals: Tensor, valid: Tensor, *, midpoint: float, rate: float,
    weights: Sequence[float] | None = None,
) -> dict[str, float]:  # fmt: skip
    """The table after a batch: b ← b + rate · (mean reward of the route's valid rows − b). totals: float[N].

    weights: float[N], 0 or more, 1 for each when not given; the n rows of a route then move its baseline by
    rate · Σ w (R − b) / max(n, Σ w), so that rows that weigh little move it little.
    To be called after `route_baselines` was used. A new table; a route without a valid row keeps its number.
    """
    seen: dict[str, list[tuple[float, float]]] = {}
    given = [1.0] * len(routes) if weights is None else weights
    for route, total, usable, weight in zip(routes, totals.tolist(), valid.tolist(), given, strict=True):
        if usable:
            seen.setdefault(route, []).append((weight, total))
    new = dict(table)
    for route, rows in seen.items():
        old, whole = table.get(route, midpoint), max(float(len(rows)), sum(weight for weight, _ in rows))
        moved, mean = sum(weight for weight, _ in rows) / whole, sum(weight * total for weight, total in rows) / whole
        new[route] = old + rate * (mean - moved * old)
    return new


def advantages(
    rewards: Tensor,
    mask: Tensor,
    groups: Tensor,
    valid: Tensor,
    *,
    baseline: Baseline,
    gamma: float | Tensor = 1.0,
    against: float | Tensor | None = None,
    shift: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Advantages of every token under a baseline: (advantages float[N, T], returns float[N, T], usable like valid).

    rewards: float[N, T]; mask: bool[N, T]; groups: int64[N]. gamma: γ, or float[N, T], the discount from each token to
    the next. valid: bool[N]; or bool[N, T] of `known_returns`, which baselines outside `PER_POSITION` read row by row:
    a row with one unknown return is then not valid, and `usable` is bool[N].

    baseline, and what it reads as `against`; None where nothing is said of it:
        none: A = G_t.
        running: G_t − b_t. against: b float[W] of `running_baseline`, None at the first step (see `less_held`).
        batch: less the mean of the other prompts' sequence returns (see `less_other_groups`).
        leave_one_out: less the mean of the group's other sequence returns.
        position_leave_one_out: less the mean of their returns-to-go at the same position.
        control_variate: see there; γ = 1. against: β, a number or float[N]; None is 1.
        group_scaled, group_centred: one number for a whole row, see `group_centred`, with and without the deviation.
        greedy: less the return-to-go of the prompt's greedy completion at the same position (ReMax, Li et al. 2023,
            whose one number a prompt it is when the reward stands at the end). against: float[N, W].
        route: less the route's own. against: float[N] of `route_baselines`.
    Of greedy and route, a row with a number that is NaN is not usable. The critic's advantages are `gae`'s.

    shift lowers the baseline: off policy the update must push good completions up more than it pushes bad ones down
    (Arnal et al. 2025, δV = −shift); on policy any shift has the same mean. For the exact gradient of discounted
    returns, take `discount_weights` times the advantages.
    Raises ValueError for a baseline that is none of returns alone.
    """
    if valid.dim() == 2 and baseline not in PER_POSITION:
        valid = (valid | ~mask).all(1) & mask.any(1)
    inside = mask & _as_column(valid)
    rewards = torch.where(inside, rewards, torch.zeros_like(rewards))
    returns = returns_to_go(rewards, mask, gamma)
    totals = returns[:, 0] if returns.shape[1] else returns.sum(1)
    usable = valid
    if baseline == "none" or (baseline == "running" and against is None):
        out = returns
    elif baseline == "running":
        assert isinstance(against, Tensor)
        out, usable = less_held(returns, against, valid)
    elif baseline == "batch":
        out, usable = less_other_groups(returns, totals, groups, valid)
    elif baseline in ("greedy", "route"):
        assert isinstance(against, Tensor)
        out, usable = less_held(returns, against.reshape(len(returns), -1), valid)
    elif baseline in ("group_scaled", "group_centred"):
        out = group_centred(totals, groups, valid, scale=baseline == "group_scaled")[:, None].expand_as(returns)
        usable = valid & (group_sums(valid.to(returns.dtype), groups)[0] >= 2)
    elif baseline == "leave_one_out":
        centred, usable = leave_one_out(totals, groups, valid)
        out = returns - (totals - centred)[:, None]
    elif baseline == "position_leave_one_out":
        out, usable = leave_one_out(returns, groups, valid)
    elif baseline == "control_variate":
        out, usable = control_variate(rewards, mask, groups, valid, 1.0 if against is None else against)
    else:
        raise ValueError(f"{baseline!r} is no baseline of returns alone; a critic's advantages come from gae()")
    out = out + shift
    return torch.where(mask & _as_column(usable), out, torch.zeros_like(out)), returns, usable


def less_held(returns: Tensor, numbers: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Returns-to-go less a number a position, held at its last one beyond its end (`held`).

    returns: float[N, T]; numbers: float[W], or float[N, W], where NaN is a row without one; valid: bool[N] or
    bool[N, T]. Returns (float[N, T], usable like valid).
    """
    numbers = held(numbers.to(returns.dtype), returns.shape[1])
    known = numbers.isfinite().all(-1, keepdim=True)
    usable = valid & (known if valid.dim() == 2 or known.dim() == 1 else known[:, 0])
    return returns - torch.where(known, numbers, 0.0), usable


def less_other_groups(returns: Tensor, totals: Tensor, groups: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Returns-to-go less the mean sequence return of the batch's other groups, or of the other rows where there is
    one group: without a row's own group that mean says nothing of the row, and the gradient stays unbiased.

    returns: float[N, T]; totals: float[N], the sequence returns; groups: int64[N]; valid: bool[N].
    Returns (float[N, T], usable bool[N]).
    """
    weight = valid.to(returns.dtype)
    own_sum, _ = group_sums(totals * weight, groups)
    own_count, _ = group_sums(weight, groups)
    others = weight.sum() - own_count
    if bool((others >= 1).all()):
        return returns - (((totals * weight).sum() - own_sum) / others.clamp(min=1))[:, None], valid
    centred, usable = leave_one_out(totals, torch.zeros_like(groups), valid)
    return returns - (totals - centred)[:, None], usable


def _as_column(valid: Tensor) -> Tensor:
    """bool[N] as bool[N, 1]; bool[N, T] as it is."""
    return valid if valid.dim() == 2 else valid[:, None]
