"""The table of algorithms: what each is made of, needs and honours. The same table refuses what cannot be honoured."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal, get_args

from operant.batch import Normalisation
from operant.config import TrainConfig
from operant.credit import Baseline
from operant.types import OperantError

GROUP_BASELINES = ("leave_one_out", "position_leave_one_out", "control_variate", "group_scaled")


@dataclass(frozen=True, slots=True)
class Algorithm:
    """One row: the loss, the defaults that make it what its paper says, and what it honours.

    honours_dense: token rewards reach the tokens they belong to. honours_gamma: γ changes the returns.
    ratio: the loss has an importance ratio, so several passes over a batch are allowed and exact propensities needed.
    """

    name: str
    paper: str
    loss: Literal["reinforce", "ppo_clip"]
    baseline: Baseline
    dense_baseline: Baseline
    normalisation: Normalisation
    honours_dense: bool = True
    honours_gamma: bool = True
    ratio: bool = False


ALGORITHMS = {
    a.name: a
    for a in (
        Algorithm(
            "reinforce", "Williams 1992", "reinforce", "running", "running", "per_completion",
        ),
        Algorithm(
            "rloo", "Kool et al. 2019; Ahmadian et al. 2024", "reinforce", "leave_one_out", "control_variate",
            "per_completion",
        ),
        Algorithm(
            "grpo", "Shao et al. 2024", "ppo_clip", "group_scaled", "group_scaled", "per_sequence_mean",
            honours_dense=False, honours_gamma=False, ratio=True,
        ),
        Algorithm(
            "ppo", "Schulman et al. 2017", "ppo_clip", "leave_one_out", "control_variate", "per_completion", ratio=True,
        ),
    )
}  # fmt: skip


def nearest(name: str, names: list[str]) -> str:
    """', did you mean …' or nothing: the end of an error about an unknown name."""
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a run really uses, once every `auto` is resolved."""

    algorithm: Algorithm
    baseline: Baseline
    normalisation: Normalisation


def resolve(config: TrainConfig, *, dense: bool) -> Recipe:
    """Resolve the `auto` fields and refuse what the estimator cannot honour.

    dense: the reward pays per token.
    Raises OperantError, by name and with the fix, for each combination that would silently be another one.
    """
    if config.algorithm not in ALGORITHMS:
        raise OperantError(
            f"unknown algorithm {config.algorithm!r}{nearest(config.algorithm, list(ALGORITHMS))} "
            f"(there are: {', '.join(ALGORITHMS)})"
        )
    algorithm = ALGORITHMS[config.algorithm]
    baselines, normalisations = list(get_args(Baseline)), list(get_args(Normalisation))
    if config.baseline not in ("auto", *baselines):
        raise OperantError(f"unknown baseline {config.baseline!r}{nearest(config.baseline, baselines)}")
    if config.normalisation not in ("auto", *normalisations):
        raise OperantError(
            f"unknown normalisation {config.normalisation!r}{nearest(config.normalisation, normalisations)}"
        )
    baseline: Baseline = algorithm.dense_baseline if dense else algorithm.baseline
    if baseline == "control_variate" and config.gamma != 1.0:
        baseline = "position_leave_one_out"  # past rewards are a control variate for undiscounted returns only
    if config.baseline != "auto":
        baseline = config.baseline  # type: ignore[assignment]
    normalisation: Normalisation = algorithm.normalisation
    if config.normalisation != "auto":
        normalisation = config.normalisation  # type: ignore[assignment]
    recipe = Recipe(algorithm, baseline, normalisation)

    for name in ("group_size", "prompts_per_step", "epochs", "minibatches", "steps", "max_tokens"):
        if getattr(config, name) < 1:
            raise OperantError(f"{name} is {getattr(config, name)}; it must be at least 1")
    if not 0.0 <= config.gamma <= 1.0:
        raise OperantError(f"gamma is {config.gamma}; a discount lies between 0 and 1")
    if baseline in GROUP_BASELINES and config.group_size < 2:
        raise OperantError(
            f"{config.algorithm} with baseline {baseline} compares completions of one prompt, and group_size is 1; "
            "give --group_size 2 or more, or --algorithm reinforce"
        )
    sums_away = baseline == "group_scaled" or not algorithm.honours_dense
    if dense and sums_away:
        raise OperantError(
            f"{config.algorithm} (baseline {baseline}) would sum a dense reward into one number; "
            "use --algorithm rloo or ppo, or leave --dense out"
        )
    if config.gamma != 1.0 and (baseline == "group_scaled" or not algorithm.honours_gamma):
        raise OperantError(
            f"{config.algorithm} ignores the discount, and gamma is {config.gamma}; "
            "use --algorithm rloo or ppo, or --gamma 1"
        )
    if baseline == "control_variate" and not dense:
        raise OperantError(
            "baseline control_variate works on the token rewards of a dense reward; add --dense, "
            "or use --baseline leave_one_out"
        )
    if baseline == "control_variate" and config.gamma != 1.0:
        raise OperantError(
            f"the control variate holds at gamma 1 only, and gamma is {config.gamma}; "
            "use --baseline position_leave_one_out"
        )
    if (config.epochs > 1 or config.minibatches > 1) and not algorithm.ratio:
        raise OperantError(
            f"{config.algorithm} has no importance ratio, so it can learn from a batch once only; "
            "set --epochs 1 --minibatches 1, or use --algorithm ppo"
        )
    if config.top_p < 1.0 or config.top_k > 0:
        raise OperantError(
            "top_p or top_k cuts the distribution that completions are drawn from, so their log-probs are not the "
            "policy's and the gradient is biased; train with --top_p 1 --top_k 0 and cut only when serving"
        )
    if config.temperature <= 0:
        raise OperantError("greedy completions have no propensity to learn from; train with --temperature 1")
    if config.beta != "auto" and baseline != "control_variate":
        raise OperantError(
            f"baseline {baseline} has no coefficient, and beta is {config.beta}; use --beta auto, or --dense"
        )
    if config.kl_in == "reward" and config.kl_coef > 0 and config.kl_estimator != "k2":
        raise OperantError(
            f"the KL in the reward is always k1, and kl_estimator is {config.kl_estimator}; "
            "leave it out, or use --kl_in loss"
        )
    if config.kl_in == "reward" and baseline == "group_scaled" and config.kl_coef > 0:
        raise OperantError(f"{config.algorithm} would sum the per-token KL reward into one number; use --kl_in loss")
    return recipe
