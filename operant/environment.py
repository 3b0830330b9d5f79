"""The public doorway of `operant.rl.environment`: importing it makes its environments known to Gymnasium."""

from operant.rl.environment import HigherLower, TextEnv

__all__ = ["HigherLower", "TextEnv"]
