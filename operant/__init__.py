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
    "Feedback": "types",
    "OperantError": "types",
    "Policy": "policy",
    "Prompt": "types",
    "Sampling": "types",
    "Span": "types",
    "TrainConfig": "config",
    "Trajectory": "types",
    "train": "loop",
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
