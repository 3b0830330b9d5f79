"""How often one key may ask and one source may rate: token buckets in memory, forgotten with the process."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

__all__ = ["Buckets", "RateLimits", "What"]

FEW = 10_000  # buckets beyond which those that are full again are dropped

What = Literal["chat", "feedback"]


class Buckets:
    """A token bucket for each name: it fills at `per_minute` / 60 a second up to `per_minute`, and begins full.

    0 is no limit. clock: seconds, never going back.
    """

    def __init__(self, per_minute: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_minute, self._clock = per_minute, clock
        self._levels: dict[str, tuple[float, float]] = {}  # name → (level, when)

    def take(self, name: str, cost: float = 1.0) -> float:
        """Take so much, and 0.0; or take nothing, and the seconds until one may.

        There has to be 1; what costs more leaves a debt, so that the mean rate holds and nothing is refused for ever.
        """
        if not self.per_minute:
            return 0.0
        now, rate = self._clock(), self.per_minute / 60
        level, when = self._levels.get(name, (self.per_minute, now))
        level = min(self.per_minute, level + rate * (now - when))
        needed = min(1.0, self.per_minute)
        if level < needed:
            self._levels[name] = (level, now)
            return (needed - level) / rate
        self._levels[name] = (level - cost, now)
        if len(self._levels) > FEW:
            full = self.per_minute
            self._levels = {n: (v, t) for n, (v, t) in self._levels.items() if v + rate * (now - t) < full}
        return 0.0


class RateLimits:
    """Who asks, and whose words come in, a minute: chats of a key and of a user of it, feedback of a source."""

    def __init__(self, chats: float, ratings: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._buckets: dict[What, Buckets] = {"chat": Buckets(chats, clock), "feedback": Buckets(ratings, clock)}

    def wait(self, what: What, name: str, cost: float = 1.0) -> float:
        """0.0 when it may, else the seconds until it may."""
        return self._buckets[what].take(name, cost)
