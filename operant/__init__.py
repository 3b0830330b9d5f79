"""operant: teach a language model from rewards at the moment they arrive.

The public names load on first use, so that `import operant` and `operant --help` stay fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "Batch": "types",
    "Codec": "data.text",
    "Completion": "types",
    "Encoder": "models.encoder",
    "EvalConfig": "config",
    "Feedback": "types",
    "FeedbackLog": "data.feedback_log",
    "Fields": "data.rows",
    "MergeConfig": "config",
    "OperantError": "types",
    "Pair": "data.prompts",
    "Policy": "models.policy",
    "PreferConfig": "config",
    "Preference": "data.preferences",
    "PretrainConfig": "config",
    "Prompt": "types",
    "Rating": "data.preferences",
    "Replay": "data.feedback_log",
    "RewardModel": "models.reward_model",
    "RewardModelConfig": "config",
    "SampleConfig": "config",
    "Sampler": "models.sampler",
    "Sampling": "types",
    "ScoreConfig": "config",
    "SftConfig": "config",
    "Span": "types",
    "TrainConfig": "config",
    "TrainResult": "rl.loop",
    "Trajectory": "types",
    "corpus_metrics": "rewards",
    "load_config": "config",
    "load_pairs": "data.prompts",
    "load_preferences": "data.preferences",
    "load_prompts": "data.prompts",
    "load_ratings": "data.preferences",
    "load_rows": "data.rows",
    "load_texts": "data.prompts",
    "merge": "run.merge",
    "prefer": "stages",
    "pretrain": "stages",
    "pretrain_masked": "stages",
    "reward_by_name": "rewards",
    "sft": "stages",
    "train": "rl.loop",
    "train_from": "stages",
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
