"""Stages that learn from text rather than from rewards; each a thin use of the one Learner."""

from operant.stages.pretrain import pretrain
from operant.stages.sft import sft

__all__ = ["pretrain", "sft"]
