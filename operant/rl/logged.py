"""Completions that were written before, by other weights or by people, as something to learn from.

A row of a log is read (`read_logged`), is of use to the algorithm (`with_propensities`), can be read by the policy
(`check_logged`) and has a reward (`judged`); then `Logged` takes the place of `Rollouts`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from operant.algorithms.estimator import Rollout
from operant.algorithms.table import Algorithm
from operant.config import TrainConfig
from operant.data.rows import is_missing
from operant.data.text import Codec
from operant.models.policy import Policy
from operant.models.sampler import room
from operant.rewards import RewardRunner, reward_trajectory
from operant.run.run import DataOrder
from operant.types import Completion, Floats, Ints, OperantError, Prompt, Trajectory

__all__ = ["Logged", "check_logged", "judged", "read_logged", "with_propensities"]


class Logged:
    """Takes the place of `Rollouts` where completions were written before: the next of them in an order of its own."""

    stream = None

    def __init__(self, config: TrainConfig, trajectories: Sequence[Trajectory], state: dict[str, Any]) -> None:
        self.trajectories = list(trajectories)
        count = config.prompts_per_step * config.group_size
        self.order = DataOrder(len(self.trajectories), count, config.seed, "logged")
        state.setdefault("drawn", 0)

    def take(self, step: int) -> Rollout:
        """`prompts_per_step` times `group_size` rows, which the step alone decides."""
        taken = [self.trajectories[i] for i in self.order.take(step)]
        return Rollout(taken, taken)


def read_logged(
    rows: Sequence[Mapping[str, Any]],
    prompts: Sequence[Prompt],
    codec: Codec,
    *,
    places: Sequence[int] | None = None,
    vocabulary: int | None = None,
) -> list[tuple[Prompt, Completion, Any]]:
    """(prompt, completion, reward or None) of each row of a log, for `train(logged=…)`.

    rows: each with `tokens` (T ids) or `completion` (a text, which is read with its end-of-text); with `reward` (a
    number, or T of them) if there is one; with `behavior_logprobs` (T numbers, in nats) if they are known. prompts:
    one a row; a row's `prompt_tokens`, if it has them, are what was asked, however the prompt's text is read now.
    places: the row (from 0) of each prompt, where some rows have none. vocabulary: ids that the model knows; None takes
    the tokenizer's.

    Raises OperantError, naming the row (from 1), for one without a completion, with ids of another tokenizer
    (`tokenizer_hash`) or outside the vocabulary, without a finite log-probability for each token, or with a text for a
    reward.
    """
    places = range(len(rows)) if places is None else places
    if len(places) != len(prompts):
        raise OperantError(f"the log has {len(places)} rows for {len(prompts)} prompts; give one for each")
    out = []
    for place, prompt in zip(places, prompts):
        row, name = rows[place], f"row {place + 1} of the log"
        known = codec.vocab_size if vocabulary is None else vocabulary
        if row.get("tokenizer_hash") not in (None, "", codec.hash) and (
            _given(row, "tokens") or _given(row, "prompt_tokens")
        ):
            raise OperantError(
                f"{name} was written with another tokenizer; give the model that wrote it, or leave its tokens, "
                "prompt_tokens and behavior_logprobs out, and its text is read anew"
            )
        if _given(row, "tokens"):
            tokens = _token_ids(row["tokens"], known, f"{name}: tokens")
        elif isinstance(row.get("completion"), str):
            chat = prompt.messages is not None or codec.usual_style.chat
            tokens = codec.encode_answers([row["completion"]], chat=chat, target=True)[0]
        else:
            raise OperantError(f"{name} has no completion; give a column completion, or tokens")
        behavior = None
        if not _blank(row.get("behavior_logprobs")):
            behavior = _logprobs(row["behavior_logprobs"], len(tokens), name)
        if _given(row, "prompt_tokens"):
            asked = _token_ids(row["prompt_tokens"], known, f"{name}: prompt_tokens")
            prompt = dataclasses.replace(prompt, tokens=asked)
        text, ends = codec.text_and_ends(tokens)
        completion = Completion(
            id=f"logged-{place + 1}", prompt_id=prompt.id, text=text, tokens=tokens, text_ends=ends,
            text_reach=codec.reach(tokens), sampled=np.ones(len(tokens), np.bool_), behavior_logprobs=behavior,
            policy_version=np.full(len(tokens), -1), truncated=bool(len(tokens)) and tokens[-1] not in codec.end_ids,
        )  # fmt: skip
        out.append((prompt, completion, _reward(row.get("reward"), name)))
    return out


def _given(row: Mapping[str, Any], column: str) -> bool:
    """Whether a row has something there: lists and arrays may be empty."""
    value = row.get(column)
    return value is not None and not is_missing(value) and (not hasattr(value, "__len__") or len(value) > 0)


def _blank(value: Any) -> bool:
    """Nothing, or the empty cell that CSV has for it."""
    return is_missing(value) or (isinstance(value, str) and not value.strip())


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
    return _all_finite(numbers, name)


def _all_finite(logprobs: Floats, name: str) -> Floats:
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
            _all_finite(completion.behavior_logprobs, completion.id)


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
        runner.tally(t)
    if trajectories and not any(t.observed.any() for t in trajectories):
        raise OperantError(
            f"no logged completion has a reward: {runner.explain()}; give a column reward, or --reward that can judge "
            "them"
        )
    return trajectories
