"""Rewards. A reward is a function, a metric, a model or a judge; its result becomes one reward per token.

seam         what a reward may be, and how its value is placed on tokens: begin here to write one
names        rewards by name: the text of --reward
metrics      BLEU, chrF, TER, ROUGE and the others; potentials: the same paid token by token
learned      trained reward models and semantic similarity
judge        a language model as a judge; endpoint: its calls; verdicts: what it said and cost
combine      sums, products, gates, clipping, normalisation
runner       rewards in parallel under a time limit; worker: the process it starts
calibration  how well a reward foretells what it should
score        rewards of completions that are in a file
"""

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
    reward_trajectory,
    run_stream,
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
    "reward_by_name",
    "reward_names",
    "reward_trajectory",
    "run_stream",
]
