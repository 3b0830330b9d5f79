"""Double Q-learning on tokens: completions in a replay buffer, and what each of their tokens should have been worth."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from operant.algorithms import credit, objectives
from operant.algorithms.estimator import Rollout
from operant.algorithms.learner import whole_batch
from operant.config import TrainConfig
from operant.data.batch import (
    completion_axes,
    drawn,
    drawn_rewards,
    gather,
    scatter,
    turn_discounts,
)
from operant.models.head import of_rows
from operant.models.policy import Policy
from operant.types import Batch, Completion, OperantError, Prompt, Sampling, Trajectory


@dataclass(slots=True)
class ReplayBuffer:
    """Completions with rewards and priorities, the oldest leaving when it is full.

    priority: α of Schaul et al. 2016; a completion is drawn with chance p_i^α / Σ p^α, p its mean |TD error| when it
    was drawn last, the largest so far until then. 0 is uniform. All of it can be written as JSON.
    """

    capacity: int
    priority: float
    rows: list[Trajectory]
    weights: list[float]

    @classmethod
    def empty(cls, capacity: int, priority: float) -> ReplayBuffer:
        return cls(capacity, priority, [], [])

    def add(self, trajectories: Iterable[Trajectory]) -> None:
        """Take in the completions whose rewards are all known; the others teach nothing."""
        for t in trajectories:
            if len(t.completion.tokens) and t.observed.all():
                self.rows.append(t)
                self.weights.append(max(self.weights, default=1.0))
        self.rows, self.weights = self.rows[-self.capacity :], self.weights[-self.capacity :]

    def draw(self, count: int, generator: np.random.Generator) -> tuple[list[int], Tensor]:
        """(places of `count` rows, their importance weights float32[count]).

        A weight is (N · P(i))⁻¹ over the largest of them. That undoes the bias of drawing some rows more often (β = 1
        of Schaul et al. 2016).
        """
        chance = np.maximum(np.array(self.weights), 1e-6) ** self.priority
        chance /= chance.sum()
        places = generator.choice(len(self.rows), size=count, p=chance)
        weights = 1.0 / (len(self.rows) * chance[places])
        return places.tolist(), torch.from_numpy(weights / weights.max()).float()

    def note(self, places: list[int], errors: Iterable[float]) -> None:
        """The rows' mean |TD error| as it is now."""
        for i, error in zip(places, errors, strict=True):
            self.weights[i] = error

    def to_json(self) -> list[dict[str, Any]]:
        """The rows with their priorities, as `load_json` reads them."""
        out = []
        for t, weight in zip(self.rows, self.weights, strict=True):
            rewards, _ = drawn_rewards(t)
            out.append(
                {
                    "id": t.prompt.id, "prompt": t.prompt.tokens.tolist(), "tokens": t.completion.tokens.tolist(),
                    "drawn": drawn(t.completion).tolist(), "rewards": rewards.tolist(),
                    "truncated": t.completion.truncated, "turns": t.completion.turns, "weight": weight,
                    "temperature": t.completion.sampling.temperature if t.completion.sampling else 1.0,
                }
            )  # fmt: skip
        return out

    def load_json(self, rows: list[dict[str, Any]]) -> None:
        """Put the rows of `to_json` in the place of what is here."""
        self.rows, self.weights = [], []
        for row in rows:
            tokens = np.array(row["tokens"], np.int64)
            places = np.array(row["drawn"], np.int64)
            sampled, rewards = np.zeros(len(tokens), np.bool_), np.zeros(len(tokens))
            sampled[places], rewards[places] = True, row["rewards"]
            completion = Completion(
                id=row["id"], prompt_id=row["id"], text="", tokens=tokens, text_ends=np.zeros(len(tokens), np.int64),
                sampled=sampled, truncated=row["truncated"],
                sampling=Sampling(temperature=row.get("temperature", 1.0)),
                turns=None if row["turns"] is None else tuple((start, end) for start, end in row["turns"]),
            )  # fmt: skip
            prompt = Prompt(row["id"], np.array(row["prompt"], np.int64))
            self.rows.append(Trajectory(prompt, completion, rewards, np.ones(len(tokens), np.bool_)))
            self.weights.append(row["weight"])


class QEstimator:
    """Takes the place of `estimate.Estimator`: rewarded completions go into the buffer, a batch of it comes out with
    the double estimator's n-step targets as `returns`.

        Q(s, a) = V(s) + β log π(a|s)/π_ref(a|s)
        y_t = Σ_{k<n} γ^k r_{t+k} + γ^n Q⁻(s_{t+n}, argmax_{a ∈ A(s)} Q(s_{t+n}, a))

    The policy is its own advantages and its critic is V. So the policy is π_ref reweighted by exp(A / β), the best one
    under a KL to π_ref of weight β (Peters et al. 2010). Q chooses and Q⁻, the target network's, judges, so that one
    network's luck does not count twice (van Hasselt et al. 2016). A(s) holds the argmax to what the behaviour could
    have said: tokens with π_ref(a|s) ≥ support · max π_ref, and the logged one (Fujimoto et al. 2019). Otherwise the
    argmax looks for errors where nothing was ever tried. After the last token comes nothing, also where the length
    limit cut it off: a reward of the text was paid for the cut one.

    `state["replay"]` is saved with every checkpoint; the target network with the policy, which must have one, a critic
    and a frozen reference. Raises OperantError for a log without one usable completion.
    """

    def __init__(
        self, policy: Policy, config: TrainConfig, state: dict[str, Any], logged: Iterable[Trajectory] = ()
    ) -> None:
        self.policy, self.config, self.state = policy, config, state
        rows = list(logged)
        self.offline = bool(rows)
        self.buffer = ReplayBuffer.empty(max(config.replay_capacity, len(rows)), config.priority)
        self.buffer.add(rows)
        if self.offline and not self.buffer.rows:
            raise OperantError(
                "no logged completion has a reward; give a column reward, or --reward that can judge them"
            )
        if "replay" in state:
            self.buffer.load_json(state["replay"])
        state.setdefault("q_batches", 0)
        state.setdefault("v_begun", state["q_batches"] > 0)

    def __call__(self, rollout: Rollout) -> tuple[Batch, dict[str, float]]:
        config = self.config
        if not self.offline:
            self.buffer.add(rollout.trajectories)
        number = self.state["q_batches"]
        first = bool(self.buffer.rows) and not self.state["v_begun"]
        if first:
            # until V knows the level of the reward, every token looks better than the average
            assert self.policy.critic is not None
            self.policy.critic.begin_at(float(np.mean([drawn_rewards(t)[0].sum() for t in self.buffer.rows])))
            self.state["v_begun"] = True
        if first or number % config.target_every == 0:
            self.policy.update_target_network()
        self.state["q_batches"] = number + 1
        metrics = {"train/replay": float(len(self.buffer.rows))}
        if not self.buffer.rows:  # every reward so far is missing: a batch that teaches nothing
            batch = self.policy.batch_of(rollout.trajectories, normalisation="per_token")
            batch.weights = torch.zeros_like(batch.weights)
            batch.returns = batch.ref_logprobs = torch.zeros_like(batch.weights)
            return batch, metrics
        generator = np.random.default_rng([config.seed, number])
        places, importance = self.buffer.draw(config.prompts_per_step * config.group_size, generator)
        rows = [self.buffer.rows[i] for i in places]
        batch = self.policy.batch_of(rows, normalisation="per_token")
        rewards, mask, _ = completion_axes(rows)
        judged, taken_now, reference = self.columns(batch).unbind(-1)
        batch.ref_logprobs = reference.contiguous()
        targets = credit.n_step_targets(
            rewards, gather(batch, judged, rows), mask, gamma=turn_discounts(rows, config.gamma, config.gamma_turn),
            steps=config.n_step,
        )  # fmt: skip
        taken = gather(batch, taken_now, rows)
        errors = ((taken - targets).abs() * mask).sum(1) / mask.sum(1).clamp(min=1)
        self.buffer.note(places, errors.tolist())
        batch.returns = scatter(batch, targets, rows)
        batch.weights = batch.weights * scatter(batch, importance[:, None].expand(mask.shape), rows)
        metrics["train/td_error"] = float(errors.mean())
        metrics["train/q_mean"] = float((taken * mask).sum() / mask.sum())
        metrics["train/target_mean"] = float((targets * mask).sum() / mask.sum())
        if config.priority or not self.offline:  # else the log itself is all that there is to know
            self.state["replay"] = self.buffer.to_json()
        return batch, metrics

    def columns(self, batch: Batch) -> Tensor:
        """Of every acting token, float32[B, S, 3]: the double estimator's value of the state before it, Q of the token
        itself, and its log π_ref."""
        beta, share = self.config.q_beta, self.config.support

        def compute(policy: Policy, micro: Batch) -> Tensor:
            where = micro.action_mask.nonzero(as_tuple=True)
            token = micro.tokens[where][:, None]

            def values() -> Tensor:
                """V of the states before the K acting tokens, float[K, 1]."""
                return policy.values(micro)[:, :-1][where][:, None]

            with policy.as_reference():
                reference = policy.acting(micro)
            online, v_online = policy.acting(micro), values()
            with policy.as_target_network():
                judge, v_judge = policy.acting(micro), values()

            def found(online: Tensor, reference: Tensor, judge: Tensor, part: slice) -> tuple[Tensor, ...]:
                given = reference.log_softmax(-1)
                q = objectives.action_value(v_online[part], online.log_softmax(-1), given, beta)
                judged = objectives.action_value(v_judge[part], judge.log_softmax(-1), given, beta)
                allowed = objectives.supported(given, share).scatter(-1, token[part], True)
                value = objectives.double_q_value(q, judged, allowed)
                return value, *(table.gather(-1, token[part])[:, 0] for table in (q, given))

            columns = torch.stack(of_rows(found, online, reference, judge), -1)
            out = torch.zeros(*micro.tokens.shape, 3, dtype=columns.dtype, device=columns.device)
            return out.index_put(where, columns)

        return whole_batch(self.policy, batch, compute, self.config.tokens_per_microbatch)
