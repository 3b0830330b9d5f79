"""Stages: each loads what its configuration names, and learns from it with the one Learner."""

from operant.stages.masked import pretrain_masked, trains_encoder
from operant.stages.preference import prefer
from operant.stages.pretrain import pretrain
from operant.stages.reward_model import train_reward_model
from operant.stages.sft import sft
from operant.stages.train import train_from

__all__ = ["prefer", "pretrain", "pretrain_masked", "sft", "train_from", "train_reward_model", "trains_encoder"]
