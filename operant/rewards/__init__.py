"""Instant rewards: the seam, built-in metrics, dense rewards through potentials, combinations, the parallel runner."""

from __future__ import annotations

from operant.rewards.combine import Clip, Combination, Gate, Product, RunningNorm, Sum, optimised_metrics
from operant.rewards.metrics import (
    Bleu,
    Chrf,
    Edit,
    Exact,
    Format,
    Length,
    Metric,
    Repetition,
    Rouge,
    Ter,
    corpus_metrics,
    distinct_n,
)
from operant.rewards.names import check_references, has_potential, reward_by_name, reward_names
from operant.rewards.potentials import potential_diagnostics, potential_rewards, potential_values, potentials_before
from operant.rewards.runner import RewardRunner
from operant.rewards.seam import (
    Limited,
    Reward,
    RewardValue,
    Streaming,
    as_reward,
    last_sampled,
    replay,
    reward_trajectory,
)
from operant.types import Stop, StreamingReward, StreamingSession

__all__ = [
    "Bleu",
    "Chrf",
    "Clip",
    "Combination",
    "Edit",
    "Exact",
    "Format",
    "Gate",
    "Length",
    "Limited",
    "Metric",
    "Product",
    "Repetition",
    "Reward",
    "RewardRunner",
    "RewardValue",
    "Rouge",
    "RunningNorm",
    "Stop",
    "Streaming",
    "StreamingReward",
    "StreamingSession",
    "Sum",
    "Ter",
    "as_reward",
    "check_references",
    "corpus_metrics",
    "distinct_n",
    "has_potential",
    "last_sampled",
    "optimised_metrics",
    "potential_diagnostics",
    "potential_rewards",
    "potential_values",
    "potentials_before",
    "replay",
    "reward_by_name",
    "reward_names",
    "reward_trajectory",
]
