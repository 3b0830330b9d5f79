"""How far a rating moves the weights, and how much each step looks at: what `auto` stands for, by the kind of weights
that learn, and where it is kept.

A root keeps the numbers that it began with (`pace.json`). Roots from before that file go on as they did.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from operant.config import LearnerConfig
from operant.models.policy import Policy, is_pretrained
from operant.models.stem import blocks_of
from operant.run.files import replace_file

__all__ = ["FULL", "LORA", "MADE_HERE", "Pace", "keep_pace", "settled"]

C = TypeVar("C", bound=LearnerConfig)


@dataclass(frozen=True, slots=True)
class Pace:
    """The settings of a learner that may be `auto`, as numbers."""

    lr: float
    kl_budget: float
    replay_events: int = 7
    anchor_tokens: int = 32
    anchor_coef: float = 0.0
    lora_layers: int = 0
    lora_orthogonal: int = 0

    @classmethod
    def of(cls, policy: Policy) -> Pace:
        """Of a model's kind: made here, all weights of a pretrained one, or an adapter on one."""
        if not is_pretrained(policy.model):
            return MADE_HERE
        return LORA if policy.is_lora else FULL


BEFORE = Pace(lr=0.01, kl_budget=0.02)  # of roots that began before they were written down
#: How they were chosen stands in docs/decisions.md.
MADE_HERE = Pace(lr=0.01, kl_budget=0.02)
LORA = Pace(lr=0.025, kl_budget=0.02, replay_events=3, anchor_tokens=16, lora_orthogonal=32)
FULL = Pace(lr=0.01, kl_budget=0.02, replay_events=3, anchor_tokens=16)


def keep_pace(root: Path, config: LearnerConfig, policy: Policy) -> None:
    """Write down in a root that begins what its settings are, `auto` resolved for this policy."""
    numbers = dataclasses.asdict(Pace.of(policy))
    numbers |= {name: value for name in numbers if (value := getattr(config, name)) != "auto"}
    numbers["lora_layers"] = upper_blocks(policy)
    replace_file(_file(root), json.dumps(numbers))


def upper_blocks(policy: Policy) -> int:
    """How many blocks next to the head learn, 0 where all do."""
    blocks = blocks_of(policy.model)
    return 0 if blocks is None or not policy.stem_depth else len(blocks) - policy.stem_depth


def settled(config: C, root: Path) -> C:
    """The configuration with what the root keeps where it says `auto`."""
    file = _file(root)
    kept = dataclasses.asdict(BEFORE) | (json.loads(file.read_text(encoding="utf-8")) if file.exists() else {})
    return dataclasses.replace(config, **{n: value for n, value in kept.items() if getattr(config, n) == "auto"})


def _file(root: Path) -> Path:
    return root / "pace.json"
