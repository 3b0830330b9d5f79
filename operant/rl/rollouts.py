"""The step's completions: which prompts, how many, how often, and their rewards."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from operant.algorithms import credit
from operant.algorithms.estimator import Rollout
from operant.algorithms.table import AlgorithmSettings
from operant.config import TrainConfig
from operant.data.batch import completion_axes, group_numbers
from operant.models.policy import Policy
from operant.models.sampler import check_room, room
from operant.rewards import RewardRunner
from operant.run.run import DataOrder, Run, mixed_seed
from operant.types import OperantError, Prompt, SamplerProtocol, Sampling, Trajectory


class Rollouts:
    """Samples and rewards. `state["drawn"]` counts the prompts taken so far and is saved with every step."""

    def __init__(
        self,
        run: Run,
        config: TrainConfig,
        settings: AlgorithmSettings,
        prompts: list[Prompt],
        sampler: SamplerProtocol,
        runner: RewardRunner,
        state: dict[str, Any],
    ) -> None:
        self.run, self.config, self.settings, self.prompts, self.sampler = run, config, settings, prompts, sampler
        self.runner, self.state = runner, state
        self.order = DataOrder(len(prompts), config.prompts_per_step, config.seed, "prompts")
        self.stream = runner.stream
        state.setdefault("drawn", run.step * config.prompts_per_step)
        state.setdefault("all_missing", 0)

    def take(self, step: int) -> Rollout:
        """A group for each prompt of the step; with dynamic sampling, until every group has different rewards."""
        kept: list[Trajectory] = []
        seen: list[Trajectory] = []
        rounds = 0
        while rounds < self.settings.rounds and (lacking := self.lacking(kept)) > 0:
            new = self.once(step, rounds, lacking)
            seen += new
            kept += informative(new) if self.settings.rounds > 1 else new
            rounds += 1
        self.note_missing(seen, step)
        # a step in which no group had different rewards teaches nothing and is still logged
        taken = kept or seen
        return Rollout(taken, seen, self.greedy(taken) if self.settings.baseline == "greedy" else None, rounds)

    def lacking(self, kept: list[Trajectory]) -> int:
        """Groups that the step still wants. A prompt that comes twice is two: counted by prompt, a step of more prompts
        than there are could never be full."""
        return self.config.prompts_per_step - len(kept) // self.config.group_size

    def once(self, step: int, number: int, count: int) -> list[Trajectory]:
        """The next `count` prompts with a rewarded group each; `number` counts the rounds of a step from 0."""
        chosen = [self.prompts[i] for i in self.order.slice(self.state["drawn"], count)]
        self.state["drawn"] += count
        # a prompt that comes again in a later round must not say the same again
        again = (number,) if number else ()
        groups = self.sampler.sample(
            chosen, rollout_sampling(self.config, mixed_seed(self.config.seed, "sample", step, *again)),
            self.config.group_size, stream=self.stream, audit_fraction=self.config.audit_fraction,
        )  # fmt: skip
        return self.runner.run([(p, c) for p, group in zip(chosen, groups, strict=True) for c in group])

    def greedy(self, trajectories: list[Trajectory]) -> Tensor:
        """Returns-to-go, float64[N, W], of the greedy completion of each row's prompt: see `Rollout.greedy`.

        The greedy completions themselves are not learned from. N: trajectories. W: the longest completion.
        """
        prompts = list({t.prompt.id: t.prompt for t in trajectories}.values())
        sampling = dataclasses.replace(rollout_sampling(self.config, 0), temperature=0.0)
        answers = self.sampler.sample(prompts, sampling, stream=self.stream, audit_fraction=self.config.audit_fraction)
        rewarded = self.runner.run([(p, a[0]) for p, a in zip(prompts, answers, strict=True)], update=False)
        rewards, mask, whole = completion_axes(rewarded)
        returns = credit.returns_to_go(torch.where(whole[:, None], rewards, math.nan), mask, self.config.gamma)
        own = {
            t.prompt.id: credit.held(row[: len(t.completion.tokens)], mask.shape[1])
            for t, row in zip(rewarded, returns, strict=True)
        }
        return torch.stack([own[t.prompt.id] for t in trajectories])

    def note_missing(self, trajectories: list[Trajectory], step: int) -> None:
        """Ends a run whose reward never answers."""
        # double Q-learning has no baseline, and needs every reward of a completion for its targets
        by_position = self.settings.baseline in credit.PER_POSITION and self.settings.algorithm.loss != "double_q"

        def teaches(t: Trajectory) -> bool:
            """Some return is known: any at γ = 0, else only those after the last reward that is missing."""
            if not by_position:
                return bool(t.observed.all())
            return bool(t.observed.any() and (self.config.gamma == 0.0 or t.observed[-1]))

        if any(map(teaches, trajectories)):
            self.state["all_missing"] = 0
            return
        self.state["all_missing"] += 1
        if self.state["all_missing"] >= 3 or step == 0:
            self.run.stop(f"every reward was missing: {self.runner.explain()}", failed=True)


def tied_share(trajectories: list[Trajectory]) -> float | None:
    """Share of the groups whose completions were all paid the same, of those with two and more that were paid.

    None where there is no such group. Of dense rewards both the sums and the sums of the amounts must be equal.
    """
    rewards, mask, valid = completion_axes(trajectories)
    groups = group_numbers(trajectories)
    counts = torch.bincount(groups[valid], minlength=int(groups.max()) + 1)
    paid = rewards * mask
    differ = credit.rewards_differ(paid.sum(1), groups, valid) | credit.rewards_differ(paid.abs().sum(1), groups, valid)
    several = counts > 1
    alike = several & (torch.bincount(groups[differ], minlength=len(counts)) == 0)
    return float(alike.sum() / several.sum()) if bool(several.any()) else None


def rollout_sampling(config: TrainConfig, seed: int) -> Sampling:
    """How a run draws what it learns from: from all that its policy would say, whatever its makers suppress."""
    return Sampling(
        temperature=config.temperature, top_p=config.top_p, top_k=config.top_k, max_tokens=config.max_tokens,
        stop=tuple(config.stop), seed=seed, suppress=False,
    )  # fmt: skip


def check_prompts(policy: Policy, prompts: Sequence[Prompt], max_tokens: int) -> int:
    """How many of the prompts leave a completion less than `max_tokens`.

    Raises OperantError for one that leaves no room at all, and for an id that names two different prompts: completions
    of one id are compared with each other.
    """
    known: dict[str, Prompt] = {}
    for prompt in prompts:
        check_room(policy, prompt, max_tokens)
        if not np.array_equal(known.setdefault(prompt.id, prompt).tokens, prompt.tokens):
            raise OperantError(
                f"prompt id {prompt.id!r} names two different prompts, whose completions would be compared with each "
                "other; give each an id of its own, such as dataclasses.replace(prompt, id=…)"
            )
    return sum(room(policy, prompt, max_tokens) < max_tokens for prompt in prompts)


def informative(trajectories: list[Trajectory]) -> list[Trajectory]:
    """Those whose prompt's completions have different rewards (`credit.rewards_differ`)."""
    rewards, mask, valid = completion_axes(trajectories)
    keep = credit.rewards_differ((rewards * mask).sum(1), group_numbers(trajectories), valid)
    teaching = {t.prompt.id for t, yes in zip(trajectories, keep.tolist(), strict=True) if yes}
    return [t for t in trajectories if t.prompt.id in teaching]
