"""A store in memory, and answers of a tiny policy, for the tests of the live loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from operant.config import LiveConfig
from operant.live.learning.anchors import Anchors
from operant.live.learning.events import EventReader
from operant.models.policy import Policy
from operant.models.sampler import Sampler
from operant.types import Completion, Feedback, Prompt, Sampling

PROMPTS = ("the cat sat", "a dog ran", "one two three", "the red house")


@dataclass
class Stored:
    id: str
    prompt: Prompt
    completion: Completion | None


@dataclass
class MemoryStore:
    """What learning sees of a store."""

    interactions: dict[str, Stored] = field(default_factory=dict)
    log: list[Feedback] = field(default_factory=list)

    def completion(self, completion_id: str) -> Stored | None:
        return self.interactions.get(completion_id)

    def events_after(self, offset: int, limit: int) -> Sequence[tuple[int, Feedback]]:
        return list(enumerate(self.log, start=1))[offset : offset + limit]

    def add(self, completion_id: str, kind: Any, value: Any, *, source: str = "ann", **options: Any) -> Feedback:
        number = len(self.log) + 1
        event = Feedback(
            id=f"e{number}", completion_id=completion_id, kind=kind, value=value, source=source,
            idempotency_key=f"k{number}", time=float(number), **options,
        )  # fmt: skip
        self.log.append(event)
        return event


def prompts(policy: Policy) -> list[Prompt]:
    encoder = policy.family == "encoder-decoder"
    return [
        Prompt(id=f"p{i}", text=text, tokens=policy.codec.encode_prompt(text, encoder=encoder), task="talk")
        for i, text in enumerate(PROMPTS)
    ]


def answered(policy: Policy, count: int = 4, **sampling: Any) -> MemoryStore:
    """Completions c0, c1, … of the policy."""
    store = MemoryStore()
    asked = [prompts(policy)[i % len(PROMPTS)] for i in range(count)]
    settings = Sampling(**({"max_tokens": 8, "seed": 1} | sampling))
    for i, (prompt, group) in enumerate(zip(asked, Sampler(policy).sample(asked, settings), strict=True)):
        completion = group[0]
        completion.id = f"c{i}"
        store.interactions[f"c{i}"] = Stored(completion.id, prompt, completion)
    return store


def reader_of(policy: Policy, store: MemoryStore, config: LiveConfig) -> EventReader:
    return EventReader(
        store.completion, policy.codec, config.score_low, config.score_high,
        encoder=policy.has_encoder, max_length=policy.max_length,
    )  # fmt: skip


def anchors_of(policy: Policy) -> Anchors:
    return Anchors.of(policy, prompts(policy)[:2], max_tokens=6, seed=9)


def logprob(policy: Policy, prompt: Prompt, tokens: Sequence[int]) -> np.ndarray:
    """log π of each token, float64[T], by the model's own call."""
    import torch

    def row(ids: Sequence[int]) -> torch.Tensor:
        return torch.tensor([ids], device=policy.device)

    tokens = [int(t) for t in tokens]
    asked = prompt.tokens.tolist()
    with torch.no_grad():
        if policy.family == "encoder-decoder":
            start = [policy.model.config.decoder_start_token_id, *tokens[:-1]]
            logits = policy.model(input_ids=row(asked), decoder_input_ids=row(start)).logits[0]
        else:
            logits = policy.model(input_ids=row([*asked, *tokens])).logits[0, len(asked) - 1 : -1]
    return logits.cpu().double().log_softmax(-1)[torch.arange(len(tokens)), torch.tensor(tokens)].numpy()
