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
from operant.algorithms import Algorithm, Recipe
from operant.batch import completion_axes, group_numbers
from operant.config import TrainConfig
from operant.estimate import Rollout
from operant.policy import Policy
from operant.rewards import Limited, RewardRunner, reward_trajectory
from operant.run import DataOrder, Run, mixed_seed
from operant.sampler import Sampler, check_room, room
from operant.text import Codec
from operant.types import Completion, Floats, Ints, OperantError, Prompt, Sampling, Trajectory


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
        while rounds < self.recipe.rounds and (lacking := self.lacking(kept)) > 0:
            new = self.once(step, rounds, lacking)
            seen += new
            kept += informative(new) if self.recipe.rounds > 1 else new
            rounds += 1
        self.note_missing(seen, step)
        # a step in which no group had different rewards teaches nothing and is still told
        taken = kept or seen
        return Rollout(taken, seen, self.greedy(taken) if self.recipe.baseline == "greedy" else None, rounds)

    def lacking(self, kept: list[Trajectory]) -> int:
        """Groups that the step still wants. A prompt that comes twice is two: counted by prompt, a step of more prompts
        than there are could never be full."""
        return self.config.prompts_per_step - len(kept) // self.config.group_size

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


def read_logged(
    rows: Sequence[Mapping[str, Any]],
    prompts: Sequence[Prompt],
    codec: Codec,
    *,
    places: Sequence[int] | None = None,
    vocabulary: int | None = None,
) -> list[tuple[Prompt, Completion, Any]]:
    """(prompt, completion, reward or None) of each row of a log, for `train(logged=…)`.

    rows: each with `tokens` or `completion` (a text, which is read with its end-of-text), `reward` (a number or one for
    each token) if there is one, and `behavior_logprobs` of its tokens if they are known. prompts: one a row; a row's
    `prompt_tokens`, if it has them, are what was asked, however the prompt's text is read now. places: the row (from 0)
    of each prompt, where some rows have none. vocabulary: ids that the model knows; None takes the tokenizer's.
    Raises OperantError, naming the row (from 1), for one without a completion, with ids that are none of this
    vocabulary or of another tokenizer (`tokenizer_hash`), with other than one finite log-probability a token, or with a
    text for a reward.
    """
    places = range(len(rows)) if places is None else places
    if len(places) != len(prompts):
        raise OperantError(f"the log has {len(places)} rows for {len(prompts)} prompts; give one for each")
    out = []
    for place, prompt in zip(places, prompts):
        row, name = rows[place], f"row {place + 1} of the log"
        known = codec.vocab_size if vocabulary is None else vocabulary
        if row.get("tokenizer_hash") not in (None, "", codec.hash) and (row.get("tokens") or row.get("prompt_tokens")):
            raise OperantError(
                f"{name} was written with another tokenizer; give the model that wrote it, or leave its tokens, "
                "prompt_tokens and behavior_logprobs out, and its text is read anew"
            )
        if row.get("tokens"):
            tokens = _token_ids(row["tokens"], known, f"{name}: tokens")
        elif isinstance(row.get("completion"), str):
            tokens = codec.encode(row["completion"], eos=True, target=True)
        else:
            raise OperantError(f"{name} has no completion; give a column completion, or tokens")
        behavior = None
        if not _blank(row.get("behavior_logprobs")):
            behavior = _logprobs(row["behavior_logprobs"], len(tokens), name)
        if row.get("prompt_tokens"):
            asked = _token_ids(row["prompt_tokens"], known, f"{name}: prompt_tokens")
            prompt = dataclasses.replace(prompt, tokens=asked)
        text, ends = codec.text_and_ends(tokens)
        completion = Completion(
            id=f"logged-{place + 1}", prompt_id=prompt.id, text=text, tokens=tokens, text_ends=ends,
            text_reach=codec.reach(tokens), sampled=np.ones(len(tokens), np.bool_), behavior_logprobs=behavior,
            policy_version=np.full(len(tokens), -1), truncated=bool(len(tokens)) and tokens[-1] != codec.eos_id,
        )  # fmt: skip
        out.append((prompt, completion, _reward(row.get("reward"), name)))
    return out


def _blank(value: Any) -> bool:
    """Nothing, or the empty cell that CSV has for it."""
    return value is None or (isinstance(value, str) and not value.strip())


def _token_ids(values: Any, vocabulary: int, name: str) -> Ints:
    try:
        numbers = np.asarray(values)
    except ValueError:  # lists of different lengths
        numbers = np.empty(0, np.object_)
    whole = numbers.dtype.kind in "iu" or (numbers.dtype.kind == "f" and bool((numbers == np.floor(numbers)).all()))
    if not whole or numbers.ndim != 1:
        raise OperantError(
            f"{name} are no list of whole numbers; give token ids in JSON Lines or Parquet, or leave them out"
        )
    return _known_ids(numbers.astype(np.int64), vocabulary, name)


def _known_ids(tokens: Ints, vocabulary: int, name: str) -> Ints:
    unknown = tokens[(tokens < 0) | (tokens >= vocabulary)]
    if len(unknown):
        raise OperantError(
            f"{name} hold the id {unknown[0]}, and the model knows 0 to {vocabulary - 1}; give the model that wrote "
            "them, or leave them out"
        )
    return tokens


def _logprobs(values: Any, size: int, name: str) -> Floats:
    try:
        numbers = np.asarray(values, np.float32)
    except (TypeError, ValueError):
        raise OperantError(f"{name}: behavior_logprobs are no list of numbers; give one for each token") from None
    if numbers.shape != (size,):
        count = len(numbers) if numbers.ndim else 1
        raise OperantError(f"{name} has {count} behavior_logprobs for {size} tokens; write the tokens beside them")
    return _finite(numbers, name)


def _finite(logprobs: Floats, name: str) -> Floats:
    if not np.isfinite(logprobs).all():
        raise OperantError(
            f"{name}: one of its behavior_logprobs is {logprobs[~np.isfinite(logprobs)][0]}; give a finite number for "
            "each token, or leave behavior_logprobs out"
        )
    return logprobs


def _reward(value: Any, name: str) -> Any:
    if _blank(value):
        return None
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        raise OperantError(f"{name} has the reward {value!r}; give a number, one for each token, or nothing") from None


def with_propensities(
    algorithm: Algorithm, logged: Sequence[tuple[Prompt, Completion, Any]]
) -> list[tuple[Prompt, Completion, Any]]:
    """The rows of a log that the algorithm can learn from: those with `behavior_logprobs`, if it needs these.

    Raises OperantError when no row is left.
    """
    if algorithm.loss == "double_q":
        return list(logged)
    kept = [row for row in logged if row[1].trainable]
    if logged and not kept:
        raise OperantError(
            f"{algorithm.name} learns by the probabilities that completions were written with, and no row of the log "
            "has behavior_logprobs (operant sample --json prints them); write them, or use --algorithm double_q"
        )
    return kept


def check_logged(policy: Policy, logged: Sequence[tuple[Prompt, Completion, Any]]) -> None:
    """Raises OperantError, naming the completion, where the policy cannot read one: ids that it does not know, more
    tokens than its context has, or log-probabilities that are not finite."""
    for prompt, completion, _ in logged:
        asked, written = len(prompt.tokens), len(completion.tokens)
        _known_ids(prompt.tokens, policy.vocabulary, f"{completion.id}: the tokens of its prompt")
        _known_ids(completion.tokens, policy.vocabulary, f"{completion.id}: its tokens")
        if room(policy, prompt, written) < written:
            raise OperantError(
                f"{completion.id} has {written} tokens after a prompt of {asked}, and the model's context is "
                f"{policy.max_length}; shorten it, or leave the row out"
            )
        if completion.behavior_logprobs is not None:
            _finite(completion.behavior_logprobs, completion.id)


def judged(logged: Sequence[tuple[Prompt, Completion, Any]], runner: RewardRunner) -> list[Trajectory]:
    """Rewards as the log has them, counted as the runner's own are; `runner` judges the rows that have none.

    Raises OperantError when there are rows and none has a reward.
    """
    asked = [(prompt, completion) for prompt, completion, value in logged if value is None]
    answers = iter(runner.run(asked))
    trajectories = []
    for prompt, completion, value in logged:
        if value is None:
            trajectories.append(next(answers))
            continue
        t = reward_trajectory(prompt, completion, "logged", value)
        trajectories.append(t)
        if t.missing is None and t.observed.all():
            runner.rewarded += 1
        else:
            detail = t.missing or "partial: some tokens of the completion have no reward"
            reason = detail.split(":", 1)[0]
            runner.counts[reason] += 1
            runner.details.setdefault(reason, detail)
    if trajectories and not any(t.observed.any() for t in trajectories):
        raise OperantError(
            f"no logged completion has a reward: {runner.explain()}; give a column reward, or --reward that can judge "
            "them"
        )
    return trajectories


def informative(trajectories: list[Trajectory]) -> list[Trajectory]:
    """Those whose prompt's completions have different rewards."""
    rewards, mask, valid = completion_axes(trajectories)
    keep = credit.informative((rewards * mask).sum(1), group_numbers(trajectories), valid)
    teaching = {t.prompt.id for t, yes in zip(trajectories, keep.tolist(), strict=True) if yes}
    return [t for t in trajectories if t.prompt.id in teaching]
