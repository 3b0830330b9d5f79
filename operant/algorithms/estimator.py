"""From rewarded completions to a batch with advantages: the estimator of one run, on the table's pure functions."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from operant.algorithms import credit, objectives
from operant.algorithms.learner import logprobs_of, whole_batch
from operant.algorithms.table import SUMMING_BASELINES, AlgorithmSettings, resolve
from operant.config import TrainConfig
from operant.data.batch import (
    completion_axes,
    drawn,
    drawn_rewards,
    gather,
    group_numbers,
    locate_tokens,
    scatter,
    turn_discounts,
)
from operant.models.policy import Policy
from operant.types import Batch, OperantError, Trajectory

RUNNING_DECAY = 0.9  # of what earlier steps weigh in the running baseline


@dataclass(slots=True)
class Rollout:
    """A step's rewarded completions: those to learn from, and all that were seen on the way.

    greedy: float64[N, W], the returns-to-go of the greedy completion of each row's prompt; beyond its end the last one,
    NaN where the reward is missing; None when nobody asked. rounds: of sampling that it took.
    """

    trajectories: list[Trajectory]
    seen: list[Trajectory]
    greedy: Tensor | None = None
    rounds: int = 1


class Estimator:
    """Rewards → advantages, on the columns of the batch that is learned from.

    Its methods work on the axes of `credit`, N completions and T drawn tokens, and give the same meaning to the same
    name: rewards, penalty float64[N, T]; mask bool[N, T], a completion's tokens; groups int64[N], the prompt that each
    answers; valid bool[N], or bool[N, T], where the return is known. advantages and returns are float64[N, T].

    `state` holds what outlives a step and is saved with it: the running mean, each route's baseline, and whether a
    reward that was not declared dense has paid before a last token. From that step on `settings` is a dense reward's.
    """

    def __init__(self, policy: Policy, config: TrainConfig, settings: AlgorithmSettings, state: dict[str, Any]) -> None:
        self.policy, self.config, self.settings, self.state = policy, config, settings, state
        begun = {"running": [], "running_weight": [], "routes": {}, "dense": False, "kl_coef": config.kl_coef}
        self.gamma: float | Tensor = config.gamma
        for name, begin in begun.items():
            state.setdefault(name, begin)
        if state["dense"]:
            self.settings = self.dense_settings()

    def __call__(self, rollout: Rollout) -> tuple[Batch, dict[str, float]]:
        config, trajectories = self.config, rollout.trajectories
        rewards, mask, whole = completion_axes(trajectories)
        self.notice_dense(rewards, mask)
        settings = self.settings
        batch = self.policy.batch_of(
            trajectories, normalisation=settings.normalisation, constant=float(config.max_tokens)
        )
        metrics: dict[str, float] = {}
        if settings.overlong_buffer:
            rewards = rewards + self.overlong(mask, metrics)
        penalty = self.kl_penalty(batch, trajectories)
        self.gamma = turn_discounts(trajectories, config.gamma, config.gamma_turn)
        valid = self.known(batch, trajectories, mask, whole)
        if settings.baseline == "critic":
            advantages, returns, usable = self.against_critic(batch, trajectories, rewards + penalty, mask, valid)
            metrics["train/explained_variance"] = explained_variance(returns, advantages, mask & valid[:, None])
        else:
            advantages, returns, usable = self.against_baseline(rollout, rewards, mask, valid, metrics)
            advantages = advantages + self.of_penalty(trajectories, penalty, mask, valid)
        taught = (usable if usable.dim() == 2 else usable[:, None]) & mask
        metrics["train/advantage_std"] = float(advantages[mask].std()) if int(mask.sum()) > 1 else 0.0
        if settings.whiten:
            advantages = credit.whiten(advantages, taught)
        if config.discount_state:  # last, for whitening would bring the discounted tokens back to the others' size
            advantages = advantages * credit.discount_weights(mask, self.gamma)
        self.remember(trajectories, (rewards * mask).sum(1), whole)
        if settings.baseline == "running":
            known = mask & (usable if usable.dim() == 2 else usable[:, None])
            sums = self.state["running"], self.state["running_weight"]
            self.state["running"], self.state["running_weight"] = credit.updated_running(
                *sums, returns, known, RUNNING_DECAY
            )
        batch.advantages = scatter(batch, advantages, trajectories)
        batch.returns = scatter(batch, returns, trajectories)
        # missing rewards teach nothing; the denominator stays fixed
        batch.weights = batch.weights * scatter(batch, taught, trajectories)
        metrics["train/usable"] = float(taught.any(1).float().mean())
        return batch, metrics

    # --- rewards -------------------------------------------------------------------------------------------------

    def notice_dense(self, rewards: Tensor, mask: Tensor) -> None:
        """A function that pays per token without having said so must not be summed silently, nor compared with one
        number for all its tokens where it is for `auto` to say.

        rewards: float64[N, T]; mask: bool[N, T]. Raises OperantError where the algorithm would sum such rewards.
        """
        if self.state["dense"] or not bool((rewards * mask)[:, :-1].logical_and(mask[:, 1:]).any()):
            return
        if self.settings.baseline in SUMMING_BASELINES or not self.settings.algorithm.honours_dense:
            raise OperantError(
                f"{self.settings.algorithm.name} would sum the dense reward that the function returned; "
                "use --algorithm rloo or ppo"
            )
        settings = self.dense_settings()
        self.state["dense"] = settings != self.settings
        self.settings = settings

    def dense_settings(self) -> AlgorithmSettings:
        dense = resolve(self.config, dense=True)
        return dataclasses.replace(self.settings, baseline=dense.baseline, bootstrap=dense.bootstrap)

    def overlong(self, mask: Tensor, metrics: dict[str, float]) -> Tensor:
        """The penalty on length, on each row's last token: float64[N, T]."""
        lengths = mask.sum(1)
        penalty = credit.overlong_penalty(lengths, self.config.max_tokens, self.settings.overlong_buffer)
        metrics["train/overlong_penalty"] = self.config.overlong_penalty * float(penalty.mean())
        last = mask & ~torch.nn.functional.pad(mask[:, 1:], (0, 1))
        return last * (self.config.overlong_penalty * penalty)[:, None]

    def kl_penalty(self, batch: Batch, trajectories: list[Trajectory]) -> Tensor:
        """−β k1 per token where the KL is in the reward, else zeros: float64[N, T]."""
        if self.config.kl_coef > 0:
            with self.policy.as_reference():
                batch.ref_logprobs = self.logprobs(batch)
        if batch.ref_logprobs is None or self.config.kl_in != "reward":
            return torch.zeros(len(trajectories), max(len(drawn(t.completion)) for t in trajectories)).double()
        k1 = objectives.kl_k1(self.logprobs(batch), batch.ref_logprobs)
        return -self.state["kl_coef"] * gather(batch, k1, trajectories)

    def known(self, batch: Batch, trajectories: list[Trajectory], mask: Tensor, valid: Tensor) -> Tensor:
        """Rows bool[N] whose return is known, or positions bool[N, T] where the baseline can teach part of a row."""
        partly = any(0 < t.observed.sum() < len(t.observed) for t in trajectories)
        if self.settings.baseline not in credit.PER_POSITION or not partly:
            return valid
        observed = torch.zeros_like(mask)
        for i, t in enumerate(trajectories):
            seen = drawn_rewards(t)[1]
            observed[i, : len(seen)] = torch.from_numpy(seen)
        trainable = torch.tensor([[t.completion.trainable] for t in trajectories])
        return credit.known_returns(observed, mask, self.gamma) & trainable

    # --- advantages ----------------------------------------------------------------------------------------------

    def against_baseline(
        self, rollout: Rollout, rewards: Tensor, mask: Tensor, valid: Tensor, metrics: dict[str, float]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns less what other completions, or earlier ones, were paid.

        Returns (advantages float64[N, T], returns float64[N, T], usable, a bool like valid). What it found out goes
        into `metrics`.
        """
        groups = group_numbers(rollout.trajectories)
        against: float | Tensor | None = None
        if self.settings.baseline == "control_variate":
            against = self.coefficient(rewards, mask, groups, valid, metrics)
        elif self.settings.baseline == "greedy":
            against = rollout.greedy
        elif self.settings.baseline == "running":
            against = credit.running_baseline(self.state["running"], self.state["running_weight"])
        elif self.settings.baseline == "route":
            against = credit.route_baselines(
                self.state["routes"], self.routes(rollout.trajectories), self.config.reward_midpoint
            )
            metrics["train/route_baseline"] = float(against.mean())
        return credit.advantages(
            rewards, mask, groups, valid, baseline=self.settings.baseline, gamma=self.gamma,
            against=against, shift=self.settings.shift,
        )  # fmt: skip

    def of_penalty(self, trajectories: list[Trajectory], penalty: Tensor, mask: Tensor, valid: Tensor) -> Tensor:
        """The penalty's advantages, float64[N, T]. Advantages are linear in the reward, so it has a return and a
        baseline of its own beside the task's."""
        if not bool(penalty.any()):
            return penalty
        baseline = self.settings.baseline
        if baseline == "control_variate":
            baseline = "position_leave_one_out"
        elif baseline in ("running", "greedy", "route"):
            baseline = "none"  # what they remember is of the task's reward
        return credit.advantages(
            penalty, mask, group_numbers(trajectories), valid, baseline=baseline, gamma=self.gamma,
        )[0]  # fmt: skip

    def against_critic(
        self, batch: Batch, trajectories: list[Trajectory], rewards: Tensor, mask: Tensor, valid: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Generalised advantage estimation (Schulman et al. 2016): (advantages, returns, valid).

        The values, float32[B, S], stay with the batch for the critic's own loss.
        """
        values = self.values(batch)
        batch.values = values[:, :-1]
        of_row, after = gather(batch, values, trajectories), torch.zeros(len(mask), dtype=torch.float64)
        for i, (t, (_, _, end)) in enumerate(zip(trajectories, locate_tokens(batch, trajectories), strict=True)):
            if self.settings.bootstrap and t.completion.truncated:
                after[i] = values[end].double()
        advantages, returns = credit.gae(
            torch.where(valid[:, None], rewards, 0.0), of_row, mask,
            gamma=self.gamma, lam=self.settings.lam, bootstrap=after,
        )  # fmt: skip
        return advantages * valid[:, None], returns, valid

    def coefficient(
        self, rewards: Tensor, mask: Tensor, groups: Tensor, valid: Tensor, metrics: dict[str, float]
    ) -> float | Tensor:
        """β, as it was given, or float64[N] fitted on the other prompts; what it saves goes into `metrics`."""
        beta: float | Tensor = (
            credit.fit_beta((rewards * mask).sum(1), credit.held_potential(rewards, mask), mask, groups, valid)
            if self.config.beta == "auto"
            else float(self.config.beta)
        )
        plain, _ = credit.control_variate(rewards, mask, groups, valid, 0.0)
        varied, _ = credit.control_variate(rewards, mask, groups, valid, beta)
        full, _ = credit.control_variate(rewards, mask, groups, valid, 1.0)
        base = float((plain**2).sum())
        metrics["train/beta"] = float(torch.as_tensor(beta).mean())
        metrics["train/variance_ratio"] = float((varied**2).sum()) / base if base else 1.0
        metrics["train/variance_ratio_beta1"] = float((full**2).sum()) / base if base else 1.0
        return beta

    # --- what outlives the step ----------------------------------------------------------------------------------

    def routes(self, trajectories: list[Trajectory]) -> list[str]:
        return [t.prompt.id if self.config.route_by == "prompt" else t.prompt.task for t in trajectories]

    def remember(self, trajectories: list[Trajectory], totals: Tensor, valid: Tensor) -> None:
        """Bring the routes' exponential means, which this step has already read, up to the totals float64[N]."""
        if self.settings.baseline == "route":
            self.state["routes"] = credit.updated_routes(
                self.state["routes"], self.routes(trajectories), totals, valid,
                midpoint=self.config.reward_midpoint, rate=self.config.baseline_rate,
            )  # fmt: skip

    # --- the policy's numbers on the whole batch -----------------------------------------------------------------

    def logprobs(self, batch: Batch) -> Tensor:
        """float32[B, S] on the CPU."""
        return logprobs_of(self.policy, batch, self.config.tokens_per_microbatch)

    def values(self, batch: Batch) -> Tensor:
        """float32[B, S + 1] on the CPU; see `Policy.values`."""
        return whole_batch(self.policy, batch, lambda p, b: p.values(b), self.config.tokens_per_microbatch)


def explained_variance(returns: Tensor, advantages: Tensor, mask: Tensor) -> float:
    """1 − Var(R − V) / Var(R) over the tokens in `mask`: 1 for a critic that foretells all, 0 for one that knows only
    the mean. The advantage is R − V by construction of the returns; 0 where all returns are the same.

    returns, advantages: float64[N, T]; mask: bool[N, T].
    """
    if int(mask.sum()) < 2:
        return 0.0
    spread = float(returns[mask].var())
    return 1.0 - float(advantages[mask].var()) / spread if spread > 0 else 0.0
