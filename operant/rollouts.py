"""The step's completions: which prompts, how many, how often, and their rewards."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from operant import credit
from operant.algorithms import Recipe
from operant.batch import completion_axes, group_numbers
from operant.config import TrainConfig
from operant.estimate import Rollout
from operant.rewards import Limited, RewardRunner, reward_trajectory
from operant.run import DataOrder, Run, mixed_seed
from operant.sampler import Sampler
from operant.text import Codec
from operant.types import Completion, OperantError, Prompt, Sampling, Trajectory


class Rollouts:
    """Samples and rewards. `state["drawn"]` counts the prompts taken so far and is saved with every step."""

    def __init__(
        self,
        run: Run,
        config: TrainConfig,
        recipe: Recipe,
        prompts: list[Prompt],
        sampler: Sampler,
        runner: RewardRunner,
        state: dict[str, Any],
    ) -> None:
        self.run, self.config, self.recipe, self.prompts, self.sampler = run, config, recipe, prompts, sampler
        self.runner, self.state = runner, state
        self.order = DataOrder(len(prompts), config.prompts_per_step, config.seed, "prompts")
        self.stream = Limited(runner.reward, config.reward_seconds) if runner.reward.streaming else None
        state.setdefault("drawn", run.step * config.prompts_per_step)
        state.setdefault("all_missing", 0)

    def take(self, step: int) -> Rollout:
        """A group for each prompt of the step; with dynamic sampling, until every group has different rewards."""
        kept: list[Trajectory] = []
        seen: list[Trajectory] = []
        rounds = 0
        while rounds < self.recipe.rounds and (lacking := self.config.prompts_per_step - _groups(kept)) > 0:
            new = self.once(step, rounds, lacking)
            seen += new
            kept += informative(new) if self.recipe.rounds > 1 else new
            rounds += 1
        self.note_missing(seen, step)
        # a step in which no group had different rewards teaches nothing and is still told
        taken = kept or seen
        return Rollout(taken, seen, self.greedy(taken) if self.recipe.baseline == "greedy" else None, rounds)

    def once(self, step: int, number: int, count: int) -> list[Trajectory]:
        chosen = [self.prompts[i] for i in self.order.slice(self.state["drawn"], count)]
        self.state["drawn"] += count
        # a prompt that comes again in a later round must not say the same again
        again = (number,) if number else ()
        groups = self.sampler.sample(
            chosen, self.sampling(mixed_seed(self.config.seed, "sample", step, *again)), self.config.group_size,
            stream=self.stream,
        )  # fmt: skip
        return self.runner.run([(p, c) for p, group in zip(chosen, groups, strict=True) for c in group])

    def greedy(self, trajectories: list[Trajectory]) -> Tensor:
        """Returns-to-go of each row's prompt's greedy completion, which is not learned from: see `Rollout.greedy`."""
        prompts = list({t.prompt.id: t.prompt for t in trajectories}.values())
        sampling = dataclasses.replace(self.sampling(0), temperature=0.0)
        answers = self.sampler.sample(prompts, sampling, stream=self.stream)
        rewarded = self.runner.run([(p, a[0]) for p, a in zip(prompts, answers, strict=True)], update=False)
        rewards, mask, whole = completion_axes(rewarded)
        returns = credit.returns_to_go(torch.where(whole[:, None], rewards, math.nan), mask, self.config.gamma)
        own = {
            t.prompt.id: credit.held(row[: len(t.completion.tokens)], mask.shape[1])
            for t, row in zip(rewarded, returns, strict=True)
        }
        return torch.stack([own[t.prompt.id] for t in trajectories])

    def sampling(self, seed: int) -> Sampling:
        return Sampling(
            temperature=self.config.temperature, top_p=self.config.top_p, top_k=self.config.top_k,
            max_tokens=self.config.max_tokens, stop=tuple(self.config.stop), seed=seed,
        )  # fmt: skip

    def note_missing(self, trajectories: list[Trajectory], step: int) -> None:
        """Ends a run whose reward never answers."""
        # double Q-learning has no baseline, and needs every reward of a completion for its targets
        by_position = self.recipe.baseline in credit.PER_POSITION and self.recipe.algorithm.loss != "double_q"
        if any(t.observed.any() if by_position else t.observed.all() for t in trajectories):
            self.state["all_missing"] = 0
            return
        self.state["all_missing"] += 1
        if self.state["all_missing"] >= 3 or step == 0:
            self.run.stop(f"every reward was missing: {self.runner.explain()}", failed=True)


class Logged:
    """Takes the place of `Rollouts` where completions were written before: the next of them in an order of its own."""

    stream = None

    def __init__(self, config: TrainConfig, trajectories: Sequence[Trajectory], state: dict[str, Any]) -> None:
        self.trajectories = list(trajectories)
        count = config.prompts_per_step * config.group_size
        self.order = DataOrder(len(self.trajectories), count, config.seed, "logged")
        state.setdefault("drawn", 0)

    def take(self, step: int) -> Rollout:
        taken = [self.trajectories[i] for i in self.order.take(step)]
        return Rollout(taken, taken)


def read_logged(
    rows: Sequence[Mapping[str, Any]], prompts: Sequence[Prompt], codec: Codec
) -> list[tuple[Prompt, Completion, Any]]:
    """(prompt, completion, reward or None) of each row of a log, for `train(logged=…)`.

    rows: each with `tokens` or `completion` (a text, which is read with its end-of-text), `reward` (a number or one for
    each token) if there is one, and `behavior_logprobs` of its tokens if they are known. prompts: one a row; a row's
    `prompt_tokens`, if it has them, are what was asked, however the prompt's text is read now.
    Raises OperantError for a row without a completion, or with other than one log-probability a token.
    """
    out = []
    for number, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        if row.get("tokens"):
            tokens = np.array(row["tokens"], np.int64)
        elif isinstance(row.get("completion"), str):
            tokens = codec.encode(row["completion"], eos=True, target=True)
        else:
            raise OperantError(f"row {number} of the log has no completion; give a column completion, or tokens")
        behavior = row.get("behavior_logprobs")
        if behavior is not None and len(behavior) != len(tokens):
            raise OperantError(
                f"row {number} of the log has {len(behavior)} behavior_logprobs for {len(tokens)} tokens; "
                "write the tokens beside them"
            )
        if row.get("prompt_tokens"):
            prompt = dataclasses.replace(prompt, tokens=np.array(row["prompt_tokens"], np.int64))
        text, ends = codec.text_and_ends(tokens)
        completion = Completion(
            id=f"logged-{number}", prompt_id=prompt.id, text=text, tokens=tokens, text_ends=ends,
            text_reach=codec.reach(tokens), sampled=np.ones(len(tokens), np.bool_),
            behavior_logprobs=None if behavior is None else np.array(behavior, np.float32),
            policy_version=np.full(len(tokens), -1), truncated=bool(len(tokens)) and tokens[-1] != codec.eos_id,
        )  # fmt: skip
        out.append((prompt, completion, row.get("reward")))
    return out


def judged(logged: Sequence[tuple[Prompt, Completion, Any]], runner: RewardRunner) -> list[Trajectory]:
    """Rewards as the log has them; `runner` judges the rows that have none."""
    asked = [(prompt, completion) for prompt, completion, value in logged if value is None]
    answers = iter(runner.run(asked))
    return [
        next(answers) if value is None else reward_trajectory(prompt, completion, "logged", value)
        for prompt, completion, value in logged
    ]


def informative(trajectories: list[Trajectory]) -> list[Trajectory]:
    """Those whose prompt's completions have different rewards."""
    rewards, mask, valid = completion_axes(trajectories)
    keep = credit.informative((rewards * mask).sum(1), group_numbers(trajectories), valid)
    teaching = {t.prompt.id for t, yes in zip(trajectories, keep.tolist(), strict=True) if yes}
    return [t for t in trajectories if t.prompt.id in teaching]


def _groups(trajectories: list[Trajectory]) -> int:
    return len({t.prompt.id for t in trajectories})
