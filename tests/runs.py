"""Prompts, rewards and settings of tiny runs of the reward loop, and what such a run left behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from operant.config import TrainConfig
from operant.rewards import Reward
from operant.types import Completion, Prompt

PROMPTS = [Prompt(f"p{i}", np.arange(40, 43 + i % 3), references=("x",)) for i in range(6)]
DEV = [Prompt(f"d{i}", np.arange(50, 52 + i), references=("x",)) for i in range(3)]
WANTED = 70


def share_of_wanted(prompt: Prompt, completion: Completion) -> float:
    return float(np.mean(completion.tokens == WANTED))


def share_of_even(prompt: Prompt, completion: Completion) -> float:
    """Varies from the first step on, whatever a model says."""
    return float(np.mean(completion.tokens % 2 == 0))


def dense_even(prompt: Prompt, completion: Completion) -> list[float]:
    return [float(token % 2 == 0) for token in completion.tokens]


def dense_wanted(prompt: Prompt, completion: Completion) -> list[float]:
    return [float(token == WANTED) for token in completion.tokens]


def quick(function: Callable[..., Any], **options: Any) -> Reward:
    """In this process: a test's reward needs no worker processes."""
    return Reward(function, in_process=True, **options)


def settings(out: Path, **options: Any) -> TrainConfig:
    return TrainConfig(
        **{
            "out": str(out), "steps": 6, "prompts_per_step": 4, "group_size": 3, "max_tokens": 6, "lr": 3e-3, "seed": 5,
            "device": "cpu", "tensorboard": False, "eval_every": 100, "save_every": 100, "log_samples": 0,
            **options,
        }
    )  # fmt: skip


def logged(out: Path, key: str) -> list[float]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row[key] for row in rows if key in row]


def everything(out: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """(weights, optimizer and counters, state) of the newest checkpoint."""
    from safetensors.torch import load_file

    newest = sorted((out / "checkpoints").glob("step-*"))[-1]
    facts = json.loads((newest / "state.json").read_text())
    for clock in ("spent_seconds",):
        facts.pop(clock)
    learner = torch.load(newest / "learner.pt", weights_only=True)
    return load_file(newest / "model" / "model.safetensors"), learner, facts


def same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right) or (left != left and right != right)


def assert_same_run(left: Path, right: Path) -> None:
    names = ("weights", "optimizer", "state")
    for name, a, b in zip(names, everything(left), everything(right), strict=True):
        assert same(a, b), name


def interrupted(step: int) -> Callable[[int, dict[str, float]], bool]:
    return lambda now, metrics: now == step
