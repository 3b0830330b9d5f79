"""Stages that learn from data rather than by sampling; each a thin use of the one Learner."""

from operant.stages.masked import pretrain_masked, wants_masked
from operant.stages.preference import prefer
from operant.stages.pretrain import pretrain
from operant.stages.reward_model import train_reward_model
from operant.stages.sft import sft

__all__ = ["prefer", "pretrain", "pretrain_masked", "sft", "train_reward_model", "wants_masked"]
