"""Measures of agreement, against hand-worked numbers and slow independent computations."""

from __future__ import annotations

import numpy as np
import pytest

from operant.rewards.calibration import (
    brier_score,
    calibration_error,
    fit_affine,
    fit_temperature,
    log_loss,
    pearson,
    spearman,
)


def test_correlations_against_numpy_and_by_hand() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=50), rng.normal(size=50)
    assert pearson(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1])
    # ranks of x: 1, 2.5, 2.5, 4; of y: 4, 3, 2, 1
    assert spearman([1, 5, 5, 9], [8, 7, 6, 5]) == pytest.approx(np.corrcoef([1, 2.5, 2.5, 4], [4, 3, 2, 1])[0, 1])
    assert spearman(x, np.exp(x)) == pytest.approx(1.0)
    assert np.isnan(pearson([1.0, 1.0 + 1e-15], [0.0, 1.0], noise=1e-12, undefined=np.nan))
    assert pearson([1.0, 1.0], [0.0, 1.0]) == 0.0 and pearson([1.0], [2.0]) == 0.0


def test_calibration_error_by_hand() -> None:
    # bin [0.6, 0.7): mean 0.65, outcome 0.5, two of four; bin [0.9, 1]: mean 0.95, outcome 1, two of four
    assert calibration_error([0.6, 0.7 - 1e-9, 0.9, 1.0], [1, 0, 1, 1]) == pytest.approx(0.5 * 0.15 + 0.5 * 0.05)
    assert brier_score([0.5, 1.0], [1, 0]) == pytest.approx((0.25 + 1) / 2)
    assert log_loss([0.0, 0.0]) == pytest.approx(np.log(2))
    assert log_loss([-1000.0]) == pytest.approx(1000.0)  # no overflow


def test_temperature_is_the_best_on_a_grid() -> None:
    rng = np.random.default_rng(1)
    true = rng.normal(size=400)
    signs = np.where(rng.random(400) < 1 / (1 + np.exp(-true)), 1, -1)
    margins = 5 * true * signs  # five times too sure
    best = fit_temperature(margins)
    grid = np.geomspace(0.1, 50, 400)
    # as if one more comparison of 402 had been judged either way, at every margin
    losses = [401 / 402 * log_loss(margins / t) + 1 / 402 * log_loss(-margins / t) for t in grid]
    assert best == pytest.approx(grid[np.argmin(losses)], rel=0.03)
    assert 3 < best < 8
    assert best == pytest.approx(grid[np.argmin([log_loss(margins / t) for t in grid])], rel=0.1)
    assert fit_temperature([-1.0, -2.0, 0.5]) == pytest.approx(100.0)  # worse than chance


@pytest.mark.parametrize("count", [1, 20, 500])
def test_comparisons_that_are_all_right_allow_no_certainty(count: int) -> None:
    """Nothing in them says how sure a reward may be; their number does."""
    for size in (0.3, 4.0):
        assert size / fit_temperature(np.full(count, size)) == pytest.approx(np.log(count + 1))
    spread = np.random.default_rng(3).exponential(size=count) + 0.01
    scaled = spread / fit_temperature(spread)
    assert log_loss(scaled) < np.log(2)
    assert scaled.mean() < 4 * np.log(count + 1)


def test_affine_is_least_squares_and_never_turns_round() -> None:
    rng = np.random.default_rng(2)
    x = rng.normal(size=30)
    y = 3 * x + 1 + rng.normal(size=30)
    assert fit_affine(x, y) == pytest.approx(tuple(np.polyfit(x, y, 1)))
    assert fit_affine(x, -x) == pytest.approx((0.0, float(-x.mean())))
    assert fit_affine([2.0, 2.0], [1.0, 3.0]) == (0.0, 2.0)
