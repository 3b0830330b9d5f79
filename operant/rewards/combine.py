"""Combinations of rewards. Each named part is logged on its own (`Trajectory.parts`, raw, before weights).

A combination is computed in the training process from its parts' token rewards, so its state lives in one place
whatever ran the parts. When a part is missing, so is the combination: the unknown summand of a sum is not zero.

Sums keep token rewards. The others act on the completion's total R, which is unknown where one token's reward is. Over
a dense part the tokens keep what they were paid and the last sampled token pays the difference to the new total.
Multiplying every token instead would let early rewards depend on what was written later, and a return-to-go that drops
them would be biased.

A combination with a streaming part streams: the part is paid while the text is written and may end it; the other parts
judge what there is then.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from operant.rewards.seam import as_reward, last_sampled, missing_trajectory, reward_trajectory
from operant.types import Completion, Doubles, OperantError, Prompt, Stop, StreamingSession, Trajectory


class Combination:
    """Base of all combinations: `children` are rewards, `combine` joins their trajectories of one batch.

    needs_total: whether it reads its parts' totals, which are unknown when one token's reward is.
    """

    needs_total = True
    batched = False
    in_process = True
    kind = "combination"

    def __init__(self, children: Sequence[Any]) -> None:
        self.children = [as_reward(child) for child in children]

    @property
    def name(self) -> str:
        return f"{self.kind}({', '.join(child.name for child in self.children)})"

    @property
    def dense(self) -> bool:
        return any(child.dense for child in self.children)

    @property
    def streaming(self) -> bool:
        return any(child.streaming for child in self.children)

    @property
    def cost(self) -> str:
        costs = {child.cost for child in self.children}
        order = ("unknown", "quadratic", "linear*reference", "linear")
        return next((cost for cost in order if cost in costs), "unknown")

    @property
    def needs_references(self) -> bool:
        return any(child.needs_references for child in self.children)

    def __call__(self, prompt: Prompt, completion: Completion) -> Doubles | None:
        """Token rewards float64[T] of one completion, None when a part is missing. Leaves running statistics alone."""
        rows = []
        for index, leaf in enumerate(leaves(self)):
            if leaf.batched:
                value = leaf([prompt], [completion])[0]
            else:
                value = leaf(prompt, streamed_by(completion, index) if leaf.streaming else completion)
            rows.append([reward_trajectory(prompt, completion, leaf.name, value)])
        (trajectory,) = combined(self, iter(rows), update=False)
        return None if trajectory.missing else trajectory.rewards

    def start(self, prompt: Prompt) -> StreamingSession:
        """One session of all streaming parts. What it pays is their weighted sum, for the sampler's record alone."""
        weights = list(self.leaf_weights())
        return _Sessions([(i, weights[i], leaf.start(prompt)) for i, leaf in enumerate(leaves(self)) if leaf.streaming])

    def leaf_weights(self) -> Iterator[float]:
        """What each leaf's token rewards are multiplied by, as far as the combination multiplies them."""
        for child, weight in zip(self.children, self._weights(), strict=True):
            inner = child.leaf_weights() if isinstance(child, Combination) else (1.0,)
            yield from (weight * value for value in inner)

    def _weights(self) -> Sequence[float]:
        return [1.0] * len(self.children)

    def combine(self, rows: Sequence[Sequence[Trajectory]], *, update: bool, scaled: bool = True) -> list[Trajectory]:
        """rows[k][i]: completion i under child k. `update`: let running statistics learn from this batch. `scaled`:
        normalise by them."""
        return [self._join(parts) for parts in zip(*rows, strict=True)]

    def _join(self, parts: Sequence[Trajectory]) -> Trajectory:
        merged = _merge_parts(parts)
        missing = next((part.missing for part in parts if part.missing), None)
        first = parts[0]
        if missing is None and not all(part.observed.any() for part in parts):
            missing = "none: a part observed no token"
        if missing is None and self.needs_total and not all(part.observed.all() for part in parts):
            missing = "partial: the total of a part with a missing token is not known"
        if missing is not None:
            gone = missing_trajectory(first.prompt, first.completion, self.name, missing)
            gone.parts = merged
            return gone
        observed = np.logical_and.reduce([part.observed for part in parts])
        rewards = np.where(observed, self._rewards(parts), np.nan)
        return Trajectory(first.prompt, first.completion, rewards, observed, merged, None)

    def _rewards(self, parts: Sequence[Trajectory]) -> Doubles:
        raise TypeError(f"{type(self).__name__} does not say how its parts join")

    def state_dict(self) -> dict[str, Any]:
        """Running statistics of this combination and those inside it, for exact resume."""
        return {"children": [child.state_dict() if isinstance(child, Combination) else None for child in self.children]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict()`. Raises OperantError when it belongs to another combination."""
        if len(state["children"]) != len(self.children):
            raise OperantError(
                f"the saved reward has {len(state['children'])} parts, not {len(self.children)}; use the same reward"
            )
        for child, saved in zip(self.children, state["children"], strict=True):
            if isinstance(child, Combination):
                if saved is None:
                    raise OperantError(f"the saved state has nothing for '{child.name}'; resume with the same reward")
                child.load_state_dict(saved)


class Sum(Combination):
    """Σ_k w_k · r_k, token by token.

    Raises OperantError for weights that are not finite, or not one for each reward.
    """

    kind = "sum"
    needs_total = False

    def __init__(self, children: Sequence[Any], weights: Sequence[float] | None = None) -> None:
        super().__init__(children)
        self.weights = [1.0] * len(self.children) if weights is None else [float(weight) for weight in weights]
        if not all(map(math.isfinite, self.weights)):
            raise OperantError(f"the weights of a sum are {self.weights}; give finite numbers")
        if not self.children or len(self.weights) != len(self.children):
            raise OperantError(
                f"a sum of {len(self.children)} rewards got {len(self.weights)} weights; give one to each"
            )

    def _weights(self) -> Sequence[float]:
        return self.weights

    def _rewards(self, parts: Sequence[Trajectory]) -> Doubles:
        total = np.zeros_like(parts[0].rewards)
        for weight, part in zip(self.weights, parts, strict=True):
            total += weight * part.rewards
        return total


class Product(Combination):
    """Π_k R_k of the totals, paid at the last sampled token.

    Raises OperantError for dense parts: a product would sum them away.
    """

    kind = "product"

    def __init__(self, children: Sequence[Any]) -> None:
        super().__init__(children)
        dense = [child.name for child in self.children if child.dense]
        if dense:
            raise OperantError(
                f"a product of rewards would sum the dense '{dense[0]}' away; use it without dense, or a gate"
            )

    def _rewards(self, parts: Sequence[Trajectory]) -> Doubles:
        rewards = np.zeros_like(parts[0].rewards)
        rewards[_end(parts[0].completion)] = math.prod(_total(part) for part in parts)
        return rewards


class Gate(Combination):
    """R of `reward` where `condition`'s total is at least `threshold`, else `closed`."""

    kind = "gate"

    def __init__(self, condition: Any, reward: Any, threshold: float = 0.5, closed: float = 0.0) -> None:
        super().__init__([condition, reward])
        self.threshold, self.closed = float(threshold), float(closed)

    @property
    def dense(self) -> bool:
        return bool(self.children[1].dense)

    def _rewards(self, parts: Sequence[Trajectory]) -> Doubles:
        condition, reward = parts
        total = _total(reward) if _total(condition) >= self.threshold else self.closed
        return _with_total(reward, total)


class Clip(Combination):
    """min(max(R, low), high). Raises OperantError when low is above high."""

    kind = "clip"

    def __init__(self, reward: Any, low: float = 0.0, high: float = 1.0) -> None:
        super().__init__([reward])
        self.low, self.high = float(low), float(high)
        if self.low > self.high:
            raise OperantError(f"clip's low {self.low} is above its high {self.high}; exchange them")

    def _rewards(self, parts: Sequence[Trajectory]) -> Doubles:
        return _with_total(parts[0], min(max(_total(parts[0]), self.low), self.high))


class RunningNorm(Combination):
    """(R − mean) / (std + ε) with mean and standard deviation over every completion seen so far (Welford 1962).

    A batch is added to the statistics before it is normalised. Token rewards are divided by the deviation and the last
    sampled token pays the mean's share. Held-out rewards are R itself and leave the statistics alone: on today's scale,
    those of different steps could not be compared. What stands around a norm, such as a clip, then acts on R too.
    `load_state_dict` raises OperantError for the state of another reward.
    """

    kind = "norm"

    def __init__(self, reward: Any, epsilon: float = 1e-8) -> None:
        super().__init__([reward])
        self.epsilon = float(epsilon)
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    @property
    def std(self) -> float:
        """Standard deviation of the totals seen; 1 until two different ones have been."""
        deviation = math.sqrt(self.squares / self.count) if self.count else 0.0
        return deviation if deviation > 1e-12 else 1.0

    def combine(self, rows: Sequence[Sequence[Trajectory]], *, update: bool, scaled: bool = True) -> list[Trajectory]:
        if update:
            for part in rows[0]:
                if part.missing is None and part.observed.all():
                    self._add(_total(part))
        return super().combine(rows, update=update, scaled=scaled) if scaled else list(rows[0])

    def _add(self, total: float) -> None:
        self.count += 1
        delta = total - self.mean
        self.mean += delta / self.count
        self.squares += delta * (total - self.mean)

    def _rewards(self, parts: Sequence[Trajectory]) -> Doubles:
        scale = self.std + self.epsilon
        rewards = parts[0].rewards / scale
        rewards[_end(parts[0].completion)] -= self.mean / scale
        return rewards

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What `state_dict` gave. Raises OperantError for the state of another reward."""
        super().load_state_dict(state)
        if "count" not in state:
            raise OperantError("the saved reward state is no running normalisation's; resume with the same reward")
        self.count, self.mean, self.squares = int(state["count"]), float(state["mean"]), float(state["squares"])


class _Sessions:
    """The streaming parts of a combination on one completion, which ends as soon as one of them asks.

    parts: what each was paid for every token up to the end, by its place among the leaves; 0 after it, for a text that
    goes on all the same.
    """

    def __init__(self, sessions: Sequence[tuple[int, float, StreamingSession]]) -> None:
        self.sessions = sessions
        self.parts: dict[int, list[float]] = {index: [] for index, _, _ in sessions}
        self._ended = False

    def step(self, token: int, text: str) -> float | Stop:
        total, ends = 0.0, False
        for index, weight, session in self.sessions:
            answer: Any = session.step(token, text)
            if hasattr(answer, "reward"):
                answer, ends = answer.reward, True
            value = math.nan if answer is None else float(answer)
            self.parts[index].append(0.0 if self._ended else value)
            total += weight * value
        self._ended = self._ended or ends
        return Stop(total) if ends else total


def leaves(reward: Any) -> Iterator[Any]:
    """The rewards at the ends of a combination's branches, in order; of any other reward, itself."""
    if isinstance(reward, Combination):
        for child in reward.children:
            yield from leaves(child)
    else:
        yield reward


def combined(reward: Any, rows: Iterator[list[Trajectory]], *, update: bool, scaled: bool = True) -> list[Trajectory]:
    """Trajectories of `reward` from those of its `leaves`, in their order; `update`, `scaled` as in
    `Combination.combine`."""
    if not isinstance(reward, Combination):
        return next(rows)
    parts = [combined(child, rows, update=update, scaled=scaled) for child in reward.children]
    return reward.combine(parts, update=update, scaled=scaled)


def streamed_by(completion: Completion, index: int) -> Completion:
    """The completion as leaf `index` knows it: what a combination's stream paid is split into its parts."""
    parts = completion.meta.get("stream_parts")
    if parts is None:
        return completion
    own = np.array(parts[index], np.float32) if index in parts else None
    return dataclasses.replace(completion, stream_rewards=own)


def optimised_metrics(reward: Any) -> list[str]:
    """The held-out metrics that the reward's parts say they optimise (attribute `optimises`), sorted."""
    names: set[str] = set()
    for leaf in leaves(reward):
        own = getattr(leaf, "optimises", ())
        names.update([own] if isinstance(own, str) else map(str, own))
    return sorted(names)


def _total(part: Trajectory) -> float:
    return float(part.rewards[part.observed].sum())


def _end(completion: Completion) -> int:
    end = last_sampled(completion)
    assert end is not None  # a completion without a sampled token has a missing reward and never comes here
    return end


def _with_total(part: Trajectory, total: float) -> Doubles:
    rewards = part.rewards.copy()
    rewards[_end(part.completion)] += total - _total(part)
    return rewards


def _merge_parts(parts: Sequence[Trajectory]) -> dict[str, float | None]:
    merged: dict[str, float | None] = {}
    for part in parts:
        for name, value in part.parts.items():
            unique, k = name, 2
            while unique in merged:
                unique, k = f"{name}_{k}", k + 1
            merged[unique] = value
    return merged
