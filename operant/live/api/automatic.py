"""A reward that rates every answer as soon as it is written: a metric, a judge, a learned model, any function.

It is off unless the server's settings name one. Its events are scores, with it as their source. The learner treats them
as a person's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

from operant.live.api.intake import find_completion, record
from operant.live.api.service import ApiError, GenerationRequest, Listener, Service
from operant.live.serving.access import automatic_source
from operant.live.storage.feedback import BadFeedback
from operant.rewards import RewardRunner, reward_by_name
from operant.types import Completion, OperantError, Prompt

__all__ = ["Automatic"]

log = logging.getLogger(__name__)


class Automatic(Listener):
    """The reward that `name` names (`rewards.reward_by_name`), one answer after the other. Close it to end its process.

    Raises OperantError when there is no such reward.
    """

    def __init__(self, name: Any) -> None:
        reward = reward_by_name(name)
        self.name = name if isinstance(name, str) else str(reward.name)
        self._runner = RewardRunner(reward, workers=1)
        self._turn = asyncio.Lock()

    def close(self) -> None:
        """End the reward's process."""
        self._runner.close()

    async def score(self, prompt: Prompt, completion: Completion) -> float | None:
        """The reward of an answer. A missing one is None, and the log says why."""
        async with self._turn:
            (rated,) = await asyncio.to_thread(self._runner.run, [(prompt, completion)])
        if rated.missing or not rated.observed.all():
            log.warning("the reward %s is missing for %s: %s", self.name, completion.id, rated.missing)
            return None
        return float(rated.rewards.sum())

    async def on_answered(
        self, service: Service, request: GenerationRequest, prompt: Prompt, completion: Completion
    ) -> None:
        """Rate an answer that is stored. A reward that is missing teaches nothing, and the log says why."""
        if not request.stored:
            return
        completion_id = completion.id
        with contextlib.suppress(asyncio.CancelledError):
            try:
                stored = await find_completion(service, completion_id)
                if stored is None or stored.completion is None:
                    return
                value = await self.score(stored.prompt, stored.completion)
                if value is None:
                    return
                body = {
                    "completion_id": completion_id, "kind": "score", "value": value,
                    "idempotency_key": f"{completion_id}-reward",
                }  # fmt: skip
                await record(service, body, stored, automatic_source("reward", self.name), "reward")
            except BadFeedback as error:
                log.warning("the reward %s is off the scale of scores for %s: %s", self.name, completion_id, error)
            except (OperantError, ApiError) as error:
                log.warning("the reward %s teaches nothing here: %s", self.name, error)
