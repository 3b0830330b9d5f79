"""operant: teach a language model from rewards at the moment they arrive.

The public names load on first use, so that `import operant` and `operant --help` stay fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "Batch": "types",
    "Codec": "text",
    "Completion": "types",
    "Encoder": "encoder",
    "EvalConfig": "config",
    "Feedback": "types",
    "Fields": "data",
    "OperantError": "types",
    "Pair": "data",
    "Policy": "policy",
    "PreferConfig": "config",
    "Preference": "preferences",
    "PretrainConfig": "config",
    "Prompt": "types",
    "Rating": "preferences",
    "Replay": "replay",
    "RewardModel": "reward_model",
    "RewardModelConfig": "config",
    "SampleConfig": "config",
    "Sampler": "sampler",
    "Sampling": "types",
    "ScoreConfig": "config",
    "SftConfig": "config",
    "Span": "types",
    "TrainConfig": "config",
    "TrainResult": "loop",
    "Trajectory": "types",
    "corpus_metrics": "rewards",
    "load_pairs": "data",
    "load_preferences": "preferences",
    "load_prompts": "data",
    "load_ratings": "preferences",
    "load_rows": "data",
    "load_texts": "data",
    "prefer": "stages",
    "pretrain": "stages",
    "pretrain_masked": "stages",
    "reward_by_name": "rewards",
    "sft": "stages",
    "train": "loop",
    "train_reward_model": "stages",
}

__all__ = sorted([*_HOME, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'operant' has no attribute {name!r}")
    value = getattr(import_module(f"operant.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
