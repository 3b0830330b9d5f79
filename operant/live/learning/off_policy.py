"""An estimate of a version's reward before it serves, from people's ratings of other versions' answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from operant.algorithms.learner import logprobs_of
from operant.config import LiveConfig
from operant.data.feedback_log import FeedbackLog
from operant.live.learning.events import EventSource
from operant.live.learning.gate import off_policy_value
from operant.live.storage.versions import Versions
from operant.models.policy import Policy
from operant.types import OperantError, Trajectory

__all__ = ["snips_values"]

PAGE = 1000


def snips_values(
    versions: Versions, numbers: Sequence[int], source: EventSource, *, device: str = "auto", limit: int = 1000
) -> dict[int, dict[str, float]]:
    """SNIPS of each version with its effective sample size (`gate.off_policy_value`), from the newest `limit` ratings.

    A rating is a thumb or a score that stands. Its answer has to have a propensity over the whole vocabulary: greedy
    ones and those drawn with top_p, top_k or bans are left out. `rated`: how many count; `mean`: what they were paid.

    Raises OperantError when no rated answer has a propensity, or a version is not on disk.
    """
    rows, rewards = _rated(source, limit)
    if not rows:
        raise OperantError(
            "no rated answer has a propensity to judge a version by; collect thumbs or scores of sampled answers first"
        )
    found: dict[int, dict[str, float]] = {}
    for number in numbers:
        policy = Policy.load(Path(versions.get(number).path) / "model", device=device)
        policy.model.eval()
        batch = policy.batch_of(rows)
        with torch.no_grad():
            logprobs = logprobs_of(policy, batch, LiveConfig().tokens_per_microbatch).double()
        assert batch.behavior_logprobs is not None
        acted = batch.action_mask.cpu()
        found[number] = off_policy_value(
            rewards, (logprobs * acted).sum(1), (batch.behavior_logprobs.cpu().double() * acted).sum(1)
        ) | {"rated": float(len(rows)), "mean": float(np.mean(rewards))}  # fmt: skip
    return found


def _rated(source: EventSource, limit: int) -> tuple[list[Trajectory], list[float]]:
    said, offset = FeedbackLog(), 0
    while page := source.events_after(offset, PAGE):
        said.add(*(event for _, event in page))
        offset = page[-1][0]
    rows: list[Trajectory] = []
    rewards: list[float] = []
    for event in reversed(said.standing()):
        if event.kind not in ("thumb", "score") or not isinstance(event.value, int | float) or len(rows) >= limit:
            continue
        stored: Any = source.completion(event.completion_id)
        completion = None if stored is None else stored.completion
        sampling = None if completion is None else completion.sampling
        if completion is None or sampling is None or not len(completion.tokens) or not completion.trainable:
            continue
        if sampling.temperature <= 0 or sampling.top_p < 1 or sampling.top_k or sampling.banned:
            continue
        length = len(completion.tokens)
        rows.append(Trajectory(stored.prompt, completion, np.zeros(length), np.ones(length, np.bool_)))
        rewards.append(float(event.value))
    return rows, rewards
