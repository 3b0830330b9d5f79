"""How well a reward agrees with its target: correlation, calibration and its repair. Pure functions."""

from __future__ import annotations

import numpy as np

from operant.types import Doubles

__all__ = [
    "brier_score",
    "calibration_error",
    "fit_affine",
    "fit_temperature",
    "log_loss",
    "pearson",
    "regression_slope",
    "spearman",
]


def pearson(x: Doubles, y: Doubles, *, noise: float = 0.0, undefined: float = 0.0) -> float:
    """Pearson's correlation Σ(x − x̄)(y − ȳ) / √(Σ(x − x̄)² Σ(y − ȳ)²) of float[N] and float[N].

    `undefined` stands where either is constant, since nothing is foretold: its largest and smallest differ by no more
    than `noise`, which rounding may have left; or where there are fewer than two.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if len(x) < 2 or np.ptp(x) <= noise or np.ptp(y) <= noise:
        return undefined
    a, b = x - x.mean(), y - y.mean()
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def spearman(x: Doubles, y: Doubles) -> float:
    """Spearman's ρ of float[N] and float[N]: Pearson's correlation of the ranks, ties given their mean rank; 0 when
    either is constant."""
    return pearson(_ranks(x), _ranks(y))


def _ranks(x: Doubles) -> Doubles:
    values, inverse, counts = np.unique(np.asarray(x, np.float64), return_inverse=True, return_counts=True)
    mean_rank = np.cumsum(counts) - (counts - 1) / 2
    return mean_rank[inverse] if len(values) else np.zeros(0)


def brier_score(probabilities: Doubles, outcomes: Doubles) -> float:
    """Mean squared distance of probabilities float[N] in [0, 1] from outcomes 0 or 1 (Brier 1950); always ½
    gives ¼. outcomes: float[N]."""
    return float(np.mean((np.asarray(probabilities) - np.asarray(outcomes)) ** 2))


def log_loss(margins: Doubles) -> float:
    """Mean −log σ(m) over margins float[N] of the preferred over the other, in nats; always ½ gives log 2."""
    return float(np.mean(np.logaddexp(0.0, -np.asarray(margins, np.float64))))


def calibration_error(probabilities: Doubles, outcomes: Doubles, bins: int = 10) -> float:
    """Expected calibration error (Naeini et al. 2015): Σ_b |b|/N · |mean outcome in b − mean probability in b|.

    Bins of equal width over [0, 1]. probabilities, outcomes: float[N].
    """
    p, y = np.asarray(probabilities, np.float64), np.asarray(outcomes, np.float64)
    which = np.minimum((p * bins).astype(int), bins - 1)
    gaps = [abs(float(y[which == b].sum() - p[which == b].sum())) for b in range(bins)]
    return sum(gaps) / max(1, len(p))


def fit_temperature(margins: Doubles) -> float:
    """τ of temperature scaling (Guo et al. 2017) over margins float[N], with Platt's targets (1999, §2.2). It minimises

        −Σ t log σ(m/τ) + (1 − t) log σ(−m/τ),   t = (N + 1) / (N + 2)

    The targets are as if beside the N comparisons one more had been judged either way. Without them nothing bounds 1/τ
    where every margin is positive. With them N comparisons that are all right allow log-odds of about log(N + 1), and
    no certainty. Kept within [0.01, 100]: where the mean margin is not positive the best τ is infinite.
    """
    m = np.asarray(margins, np.float64)
    target = (len(m) + 1) / (len(m) + 2)
    low, high = np.log(0.01), np.log(100.0)
    for _ in range(60):  # the loss is convex in 1/τ: its derivative there, Σ m (σ(m/τ) − t), changes sign once
        middle = (low + high) / 2
        right = 1.0 / (1.0 + np.exp(-np.clip(m / np.exp(middle), -500, 500)))
        low, high = (low, middle) if np.sum(m * (target - right)) > 0 else (middle, high)
    return float(np.exp((low + high) / 2))


def regression_slope(x: Doubles, y: Doubles) -> float:
    """Slope of the least-squares line from x to y, Σ(x − x̄)(y − ȳ) / Σ(x − x̄)²; 0 where x is constant. float[N]."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    spread = float(np.sum((x - x.mean()) ** 2))
    return float(np.sum((x - x.mean()) * (y - y.mean()))) / spread if spread > 0 else 0.0


def fit_affine(predictions: Doubles, targets: Doubles) -> tuple[float, float]:
    """(a, b) that minimise Σ (a·prediction + b − target)², a not negative: it must not turn a ranking round.

    predictions, targets: float[N]. Constant predictions give (0, mean target).
    """
    x, y = np.asarray(predictions, np.float64), np.asarray(targets, np.float64)
    slope = max(0.0, regression_slope(x, y))
    return slope, float(y.mean() - slope * x.mean())
