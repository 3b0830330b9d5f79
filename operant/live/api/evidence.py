"""The evidence of a trial: people's ratings for a canary, and for a shadow a reward that judges both versions."""

from __future__ import annotations

import asyncio
import contextlib

from operant.live.api.automatic import Automatic
from operant.live.api.service import ApiError, GenerationRequest, Listener, Service, Way
from operant.live.serving.canary import Canary, in_share, to_unit, version_of
from operant.live.storage.store import StoredCompletion
from operant.types import Completion, Feedback, OperantError, Prompt

__all__ = ["TrialEvidence"]


class TrialEvidence(Listener):
    """Brings what it hears to a canary, or with a reward to a shadow. `automatic` judges what a shadow writes."""

    def __init__(self, canary: Canary, automatic: Automatic | None = None) -> None:
        self.canary, self.automatic = canary, automatic

    async def on_rated(self, service: Service, event: Feedback, stored: StoredCompletion, way: Way) -> None:
        """Rewards are no evidence for a canary, and a rule's word is that of the person whose message it read."""
        if way != "reward":
            await asyncio.to_thread(
                self.canary.add_rating, event, stored, stored.user if way == "rule" else event.source
            )

    async def on_answered(
        self, service: Service, request: GenerationRequest, prompt: Prompt, completion: Completion
    ) -> None:
        """Let what is tried answer too, unseen, for a share of the answers of what serves, and let the reward judge
        both. Nothing of it is stored. An answer that is not to be had says nothing."""
        canary, automatic, config = self.canary, self.automatic, service.config
        if automatic is None or canary.kind != "shadow":
            return
        trial = await asyncio.to_thread(canary.trial)
        candidate = trial.candidate
        if candidate is None or version_of(completion) != trial.serving:
            return
        if not in_share(completion.id, candidate, config.shadow_share) or service.engine.stats()["queued"]:
            return  # people come first
        with contextlib.suppress(OperantError, ApiError, RuntimeError, asyncio.CancelledError):
            (future,) = service.engine.submit(
                prompt, request.sampling, ids=[f"shadow-{completion.id}"], preferred=candidate
            )
            unseen = await asyncio.wrap_future(future)
            if version_of(unseen) != candidate or unseen.stop_reason == "cancelled":
                return
            paid = [await automatic.score(prompt, answer) for answer in (unseen, completion)]
            rewards = [None if value is None else to_unit(value, config.score_low, config.score_high) for value in paid]
            candidates, servings = rewards
            if candidates is not None and servings is not None:
                await asyncio.to_thread(canary.add_difference, candidate, candidates - servings)
