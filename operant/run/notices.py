"""What a person should know about a run, read off its series: collapse, and rewards that teach nothing.

One pure function, which the terminal, the report and the page of `operant serve` share. It judges nothing by itself and
ends nothing: a reward may well be worth a model that says one thing. But nobody should find that out last.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = ["WATCHED", "Notice", "Series", "levels", "new_notices", "notices"]

#: (step, value) pairs, by step; values may be NaN.
Series = list[tuple[int, float]]

#: Nats per token from the policy that the stage began with. Runs of the quickstart that learn end between 0.2 and 0.6;
#: those whose learning rate ruins them pass 1.
KL_BOUND = 1.0
DISTINCT_HALVED = 0.5  # of the distinct-2 that the run began with
MARGIN = 5.0  # log-odds of a pair, of a probability of 0.993: what lies beyond teaches no preference
LOST = 0.5  # nats per token by which preferred completions become less likely while the margin is beyond that
ENTROPY_GONE = 0.25  # of the entropy that the run began with; runs that learn keep a third and more
ONE_ANSWER = 0.9  # share of the held-out prompts that get the commonest answer
FELL = 0.05  # of what the optimised metric was at the beginning
TIED = 0.9  # share of the groups whose rewards are all equal
IN_A_ROW = 5  # steps that are looked back at for rewards that teach nothing
SAME = 1e-9  # rewards that differ by less are equal

#: The series that `notices` reads, and `eval/NAME` of each metric that the reward optimises.
WATCHED = (
    "eval/kl_ref", "eval/distinct2", "eval/commonest", "eval/reward", "train/distinct2", "train/entropy",
    "train/reward_std", "train/reward_mean", "train/tied",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Notice:
    """One thing that a person should know.

    kind: "collapse", the policy is losing what it could; "idle", its rewards teach nothing. name: what it is about, the
    same in every step that it holds. text: with the numbers.
    """

    kind: Literal["collapse", "idle"]
    name: str
    text: str


def notices(series: Mapping[str, Series], optimised: Collection[str] = ()) -> list[Notice]:
    """What holds of a run as its series stand now, collapse first. Series that are missing say nothing.

    Collapse is a change from the first level to the last (`levels`): a held-out KL past `KL_BOUND`, distinct-2 halved,
    entropy gone, one answer for nearly all held-out prompts where there had been several, preferred completions that
    lost as much likelihood, or a fall of what is optimised. Idle are steps whose rewards are all the same, and groups
    that tie, over the last `IN_A_ROW` steps.

    series: by slash-named metric, such as a `RunRecord`'s. optimised: held-out metrics that the reward optimises, such
    as {"bleu"}, beside the reward itself.
    """
    return [*_collapse(series, optimised), *_idle(series)]


def new_notices(found: Iterable[Notice], known: set[str]) -> list[Notice]:
    """Those whose name is not in `known`, which then becomes the names of all that hold: what ended may come back."""
    every = list(found)
    new = [notice for notice in every if notice.name not in known]
    known.clear()
    known.update(notice.name for notice in every)
    return new


def levels(series: Series | None) -> tuple[float, float] | None:
    """First and last level of a series: single values of a short one, means over its first and last tenth else."""
    values = [v for _, v in series or () if math.isfinite(v)]
    if not values:
        return None
    size = max(1, len(values) // 10) if len(values) > 20 else 1
    return sum(values[:size]) / size, sum(values[-size:]) / size


def _collapse(series: Mapping[str, Series], optimised: Collection[str]) -> Iterable[Notice]:
    if (kl := levels(series.get("eval/kl_ref"))) and kl[1] > KL_BOUND:
        yield Notice("collapse", "kl_ref", f"far from the beginning, held-out KL {kl[1]:.3g} nats/token")
    distinct = levels(series.get("eval/distinct2")) or levels(series.get("train/distinct2"))
    if distinct and distinct[1] < DISTINCT_HALVED * distinct[0]:
        yield Notice("collapse", "distinct2", f"completions repeat themselves, distinct-2 {_change(distinct)}")
    entropy = levels(series.get("train/entropy"))
    if entropy and entropy[1] < ENTROPY_GONE * entropy[0]:
        yield Notice("collapse", "entropy", f"the entropy is gone, {_change(entropy)} nats/token")
    common = levels(series.get("eval/commonest"))
    if common and common[1] >= ONE_ANSWER > common[0]:
        yield Notice("collapse", "commonest", f"one answer for {common[1]:.0%} of the held-out prompts")
    good = levels(series.get("eval/nll_good"))
    if good and good[1] - good[0] > KL_BOUND:
        yield Notice("collapse", "nll_good", f"preferred completions became unlikely, {_change(good)} nats/token")
    margin = levels(series.get("eval/margin"))
    if margin and good and margin[1] > MARGIN and good[1] - good[0] > LOST:
        text = (
            f"pairs are learned by heart, margin {_change(margin)} while the preferred completion becomes less likely"
        )
        yield Notice("collapse", "margin", f"{text}, {_change(good)} nats/token")
    for name in dict.fromkeys(["reward", *sorted(optimised)]):
        value = levels(series.get(f"eval/{name}"))
        if value and value[0] - value[1] > FELL * abs(value[0]):
            yield Notice("collapse", f"falling {name}", f"held-out {name}, which is optimised, falls, {_change(value)}")


def _idle(series: Mapping[str, Series]) -> Iterable[Notice]:
    spread, mean, tied = (_tail(series.get(f"train/{name}")) for name in ("reward_std", "reward_mean", "tied"))
    if len(spread) == len(mean) == IN_A_ROW and all(v < SAME for v in spread) and max(mean) - min(mean) < SAME:
        yield Notice("idle", "constant", f"every reward of the last {IN_A_ROW} steps was {mean[-1]:.4g}")
    elif len(tied) == IN_A_ROW and min(tied) >= TIED:
        share = sum(tied) / IN_A_ROW
        yield Notice("idle", "tied", f"in {share:.0%} of the groups of the last {IN_A_ROW} steps all rewards are equal")


def _tail(series: Series | None) -> Sequence[float]:
    return [value for _, value in (series or ())[-IN_A_ROW:]]


def _change(change: tuple[float, float]) -> str:
    return f"{change[0]:.3g} → {change[1]:.3g}"
