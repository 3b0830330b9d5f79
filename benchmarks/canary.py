"""How often the trial of a version errs, and how many pairs of ratings it takes (`live.serving.canary`): a simulation.

Thumbs of two versions, of which what serves is liked in a share of its answers and the candidate in another; the
defaults of `operant serve --canary_share`, looked at after every pair. Needs seconds and no model.

python -m benchmarks.canary
"""

from __future__ import annotations

import argparse
import math

import numpy as np

from operant.config import ServeConfig
from operant.live.serving.canary import Bet, wager

RUNS, SEED = 1000, 0


def trial(liked: float, other: float, rng: np.random.Generator, config: ServeConfig) -> tuple[str, int]:
    """(verdict, pairs) of one trial: what serves is liked in `liked` of its answers, the candidate in `other`."""
    better, worse, enough = Bet(), Bet(), -math.log(config.canary_alpha)
    pairs = config.canary_pairs
    differences = (rng.random(pairs) < other).astype(float) - (rng.random(pairs) < liked)
    for number, difference in enumerate(differences.tolist(), start=1):
        better, worse = wager(better, difference + config.canary_margin), wager(worse, -difference)
        if better.log_wealth >= enough:
            return "promoted", number
        if worse.log_wealth >= enough:
            return "worse", number
    return "undecided", pairs


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    config = ServeConfig()
    print("| liked, serving | liked, candidate | promoted | refused as worse | undecided | pairs, median |")
    print("|---:|---:|---:|---:|---:|---:|")
    for liked in (0.5, 0.8):
        for change in (-0.3, -0.1, 0.0, 0.1, 0.2):
            rng = np.random.default_rng(SEED)
            told = [trial(liked, liked + change, rng, config) for _ in range(RUNS)]
            shares = [sum(verdict == name for verdict, _ in told) / RUNS for name in ("promoted", "worse", "undecided")]
            cells = " | ".join(f"{share:.3f}" for share in shares)
            median = float(np.median([pairs for _, pairs in told]))
            print(f"| {liked:g} | {liked + change:g} | {cells} | {median:.0f} |")


if __name__ == "__main__":
    main()
