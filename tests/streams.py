"""Streaming rewards that run in processes of their own, which import this file and little else."""

from __future__ import annotations

import time

from operant.rewards import Stop
from operant.types import Prompt


class UpToThree:
    """Pays 0.25 for each token and ends the row at the third; in every fourth row the first token takes too long."""

    name, optimises = "up-to-three", ("exact",)

    def __init__(self, slow: bool = False) -> None:
        self.slow, self.rows, self.seen = slow, 0, 0

    def start(self, prompt: Prompt) -> UpToThree:
        self.rows += 1
        return UpToThree(self.slow and self.rows % 4 == 0)

    def step(self, token: int, text: str) -> float | Stop:
        self.seen += 1
        if self.slow:
            time.sleep(30)
        return Stop(1.0) if self.seen == 3 else 0.25


class Slow:
    """Pays a half for each token, and takes its time for it."""

    name = "slow"

    def start(self, prompt: Prompt) -> Slow:
        return self

    def step(self, token: int, text: str) -> float:
        time.sleep(0.05)
        return 0.5
