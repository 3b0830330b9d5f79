"""A candidate version is tried on a share of the traffic, or in the shadow, and serves everybody only on evidence.

    canary   a stable hash of the user decides who is answered by the candidate; thumbs and scores are the evidence.
             The i-th rating of one of its answers is set against the i-th of one of the serving version's
    shadow   the candidate answers the same prompt as the serving version, is shown to nobody and learned from by
             nobody; an automatic reward judges both

Either way the evidence is a row of differences d in [−1, 1], candidate − serving, rewards scaled to [0, 1]. Two
gamblers bet on it (`wager`): one that the candidate is not worse by `margin` or more, one that it is worse. A fair game
makes nobody rich: under a null the wealth W is a nonnegative supermartingale with W_0 = 1, so that

    P(W_n ≥ 1/α for any n) ≤ α        (Ville 1939; Waudby-Smith & Ramdas 2024, "Estimating means by betting")

whatever the distribution and however often somebody looks. So the test is made after every difference: at W ≥ 1/α of
the first the candidate serves, at W ≥ 1/α of the second, or after so many differences without either, it is refused.

What is tried is `current`, where learning goes on; what serves is kept beside it (`Versions.trial`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from operant.config import ServeConfig
from operant.data.preferences import share_of
from operant.live.storage.store import StoredCompletion
from operant.live.storage.versions import Versions
from operant.types import Completion, Feedback, OperantError

__all__ = ["Bet", "Canary", "Trial", "in_share", "to_unit", "version_of", "wager"]

log = logging.getLogger(__name__)

MOST_OF_ONE = 5  # ratings of one source that count in one trial: alone they make nobody as rich as 1/0.05
STAKE = 0.5  # the largest share of the wealth that is staked


@dataclass(frozen=True, slots=True)
class Bet:
    """A gambler. log_wealth is ln W; total and squares are the sums of what was seen, and of its squares."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0
    log_wealth: float = 0.0


def wager(bet: Bet, x: float) -> Bet:
    """The gambler after one more observation x in [−2, 2] of which the null says that its mean is at most 0:

        W_n = W_{n−1} · (1 + λ_n x_n),   λ_n = clip(m / (v + m²), 0, ½)

    with m and v the mean and the variance of what was seen before, one observation of 0 and variance ¼ included
    (the approximate growth-optimal stake, Waudby-Smith & Ramdas 2024, section B.3). λ_n is chosen before x_n is seen,
    and 1 + λ x ≥ 0, so under the null E[W_n | past] ≤ W_{n−1}.
    """
    mean = bet.total / (bet.count + 1)
    variance = (0.25 + bet.squares) / (bet.count + 1) - mean**2
    stake = min(max(mean / (max(variance, 1e-6) + mean**2), 0.0), STAKE)
    return Bet(
        bet.count + 1, bet.total + x, bet.squares + x * x, bet.log_wealth + math.log(max(1 + stake * x, 1e-12))
    )  # fmt: skip


def in_share(name: str, salt: int, share: float) -> bool:
    """Whether somebody is in a share of everybody: the same answer for the same name and salt."""
    digest = hashlib.sha256(f"{salt}\x00{name}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:6], "big") < share * 2.0**48


def to_unit(value: float, low: float, high: float) -> float:
    """A reward between low and high, or beyond, in [0, 1]."""
    return min(1.0, max(0.0, (value - low) / (high - low)))


@dataclass(slots=True)
class Trial:
    """The file `trials/now.json`. candidate: what is tried against `serving`, if anything.

    better, worse: the two gamblers. waiting: ratings of each that have no counterpart yet. counted: ratings of each
    source; rated: the completions that are counted. promoted, refused: verdicts so far.
    """

    serving: int
    candidate: int | None = None
    better: dict[str, Any] = field(default_factory=lambda: dataclasses.asdict(Bet()))
    worse: dict[str, Any] = field(default_factory=lambda: dataclasses.asdict(Bet()))
    waiting: dict[str, list[float]] = field(default_factory=lambda: {"serving": [], "candidate": []})
    counted: dict[str, int] = field(default_factory=dict)
    rated: list[str] = field(default_factory=list)
    promoted: int = 0
    refused: int = 0

    def summary(self) -> dict[str, Any]:
        """How far it is, as plain data."""
        better, worse = Bet(**self.better), Bet(**self.worse)
        return {
            "serving": self.serving, "candidate": self.candidate, "pairs": worse.count,
            "difference": -worse.total / worse.count if worse.count else None,
            "e_better": math.exp(min(better.log_wealth, 700.0)), "e_worse": math.exp(min(worse.log_wealth, 700.0)),
            "promoted": self.promoted, "refused": self.refused,
        }  # fmt: skip


class Canary:
    """Tries versions of these, one at a time. Every method may be called from any thread.

    changed: called, from any thread, when another version is to serve.
    """

    def __init__(self, versions: Versions, config: ServeConfig, changed: Callable[[], None] = lambda: None) -> None:
        self.versions, self.config, self.changed = versions, config, changed
        self.kind: Literal["canary", "shadow"] = "canary" if config.canary_share else "shadow"
        self._now: tuple[int, int | None] = (versions.pointer().version, None)  # as `look` last saw it
        self._line: list[int] = []
        if versions.trial() is None:
            self._write(Trial(versions.pointer().version))

    def trial(self) -> Trial:
        """The trial as it is kept, or a new one where none is."""
        values = self.versions.trial()
        if values is None:  # somebody has removed the file
            return Trial(self.versions.pointer().version)
        return Trial(**values)

    def summary(self) -> dict[str, Any]:
        """The trial with its rules, as plain data: who is answered by what is tried, and what decides when."""
        trial, config = self.trial(), self.config
        summary = trial.summary()
        return summary | {
            "kind": self.kind, "share": config.canary_share or config.shadow_share,
            "rated": {name: summary["pairs"] + len(trial.waiting[name]) for name in ("serving", "candidate")},
            "needed": 1 / config.canary_alpha, "margin": config.canary_margin, "most_pairs": config.canary_pairs,
        }  # fmt: skip

    def look(self) -> tuple[int, int | None]:
        """(what serves, what is tried), after a look at what was published since."""
        with self.versions.trying():
            trial, current = self.trial(), self.versions.pointer().version
            if self.versions.forgetting():
                self._now = trial.serving, trial.candidate
                return self._now
            if self._line[:1] != [current]:
                self._line = self.versions.ancestors(current)
            line = self._line
            if trial.serving not in line:  # it was rolled back behind what serves
                trial = Trial(current, promoted=trial.promoted, refused=trial.refused)
                self._write(trial)
            elif trial.candidate is not None and trial.candidate not in line:
                trial = Trial(trial.serving, promoted=trial.promoted, refused=trial.refused)
                self._write(trial)
            if trial.candidate is None and current != trial.serving:
                trial.candidate = current
                self._write(trial)
                log.info("version %d is tried against version %d (%s)", current, trial.serving, self.kind)
            self._now = trial.serving, trial.candidate
            return self._now

    def version_for(self, user: str) -> int | None:
        """The candidate, for those who are answered by it; None for all others."""
        candidate = self._now[1]
        if candidate is None or self.kind != "canary" or not in_share(user, candidate, self.config.canary_share):
            return None
        return candidate

    def add_rating(self, event: Feedback, stored: StoredCompletion, who: str) -> None:
        """A rating has come, of any answer. who: the person whose word it is. Rewards are no evidence here: the shadow
        is for them."""
        config = self.config
        reward = share_of(event.kind, event.value, config.score_low, config.score_high)
        wrote = version_of(stored.completion)
        if self.kind != "canary" or reward is None or wrote is None or self.versions.pins().get(stored.user) == wrote:
            return
        with self.versions.trying():
            trial = self.trial()
            if trial.candidate is None or wrote not in (trial.serving, trial.candidate) or stored.id in trial.rated:
                return
            if self.versions.forgetting():  # what is decided now could not be carried out
                return
            if trial.counted.get(who, 0) >= MOST_OF_ONE:
                return
            trial.counted[who] = trial.counted.get(who, 0) + 1
            trial.rated.append(stored.id)
            trial.waiting["candidate" if wrote == trial.candidate else "serving"].append(reward)
            if all(trial.waiting.values()):
                ours, theirs = trial.waiting["candidate"].pop(0), trial.waiting["serving"].pop(0)
                self._bet(trial, ours - theirs)
            else:
                self._write(trial)

    def add_difference(self, candidate: int, difference: float) -> None:
        """Both have answered one prompt: the candidate's reward less that of the serving version, in [−1, 1]."""
        with self.versions.trying():
            trial = self.trial()
            if trial.candidate == candidate and not self.versions.forgetting():
                self._bet(trial, difference)

    def _bet(self, trial: Trial, difference: float) -> None:
        better = wager(Bet(**trial.better), difference + self.config.canary_margin)
        worse = wager(Bet(**trial.worse), -difference)
        trial.better, trial.worse = dataclasses.asdict(better), dataclasses.asdict(worse)
        enough = -math.log(self.config.canary_alpha)
        if better.log_wealth >= enough:
            self._decide(trial, True, f"not worse by {self.config.canary_margin:g} or more")
        elif worse.log_wealth >= enough:
            self._decide(trial, False, "worse")
        elif better.count >= self.config.canary_pairs:
            self._decide(trial, False, "undecided")
        else:
            self._write(trial)

    def _decide(self, trial: Trial, promoted: bool, what: str) -> None:
        summary = trial.summary()
        candidate = trial.candidate
        assert candidate is not None
        reason = (
            f"{what} than version {trial.serving} after {summary['pairs']} pairs (mean difference "
            f"{summary['difference']:+.3f}, significance {self.config.canary_alpha:g})"
        )
        verdict = "promoted" if promoted else "refused"
        self.versions.note_trial(
            candidate,
            {"verdict": verdict, "reason": reason, "kind": self.kind, "against": trial.serving, "time": time.time(),
             "alpha": self.config.canary_alpha, "margin": self.config.canary_margin,
             **{name: summary[name] for name in ("pairs", "difference", "e_better", "e_worse")}},
        )  # fmt: skip
        if not promoted:  # first, so that a kill in between tries no descendant of what was refused
            try:
                self.versions.roll_back(trial.serving)  # learning goes on from what serves
            except OperantError as error:
                log.warning("version %d serves on, but learning cannot go back to it: %s", trial.serving, error)
        serving = candidate if promoted else trial.serving
        self._write(Trial(serving, promoted=trial.promoted + promoted, refused=trial.refused + (not promoted)))
        self._now = serving, None
        log.info("version %d is %s: %s", candidate, verdict, reason)
        self.changed()

    def _write(self, trial: Trial) -> None:
        self.versions.keep_trial(dataclasses.asdict(trial))


def version_of(completion: Completion | None) -> int | None:
    """The one version that wrote an answer; None when it was several, or nothing was written."""
    if completion is None or completion.policy_version is None or not len(completion.policy_version):
        return None
    first = int(completion.policy_version[0])
    return first if (completion.policy_version == first).all() else None
