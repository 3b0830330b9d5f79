"""The loss of every sampled token, from the table's pure functions: surrogate, KL, entropy, corrections, values."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from operant.algorithms import objectives
from operant.algorithms.table import AlgorithmSettings
from operant.config import TrainConfig
from operant.models.head import Distributions, of_rows
from operant.models.policy import Policy, placed
from operant.types import Batch


def full_kl_of(acting: Distributions, reference: Distributions) -> Tensor:
    """`objectives.full_kl` of K tokens, float[K], in chunks where the logits are not at hand. The reference has no
    gradient."""
    return of_rows(lambda logits, given, part: (objectives.full_kl(logits, given),), acting, reference)[0]


class Surrogate:
    """A `learner.TokenLoss` for the algorithm of a run. `state["kl_coef"]` is the KL's weight as it stands now.

    logprobs and old are log π and log π_old of a micro-batch's tokens, float32[B, S]; each loss is float32[B, S].
    """

    def __init__(self, config: TrainConfig, settings: AlgorithmSettings, state: dict[str, Any]) -> None:
        self.config, self.settings, self.state = config, settings, state
        state.setdefault("kl_coef", config.kl_coef)

    def __call__(self, policy: Policy, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of every token of a micro-batch, and sums of what is logged."""
        config, mask = self.config, batch.action_mask
        if batch.kind == "supervised":  # the labelled pairs of sft_coef
            return config.sft_coef * objectives.negative_log_likelihood(policy.logprobs(batch).logprobs), {}
        if self.settings.algorithm.loss == "double_q":
            return self.value_loss(policy, batch)
        whole = batch.ref_logprobs is not None and config.kl_in == "loss" and config.kl_estimator == "full"
        acting = policy.acting(batch) if whole else None
        out = policy.logprobs(batch, "differentiable" if config.entropy_coef else "measured", acting)
        old = out.logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
        stats: dict[str, Tensor] = {"approx_kl": (objectives.kl_k3(old, out.logprobs) * mask).sum()}
        loss, clipped = self.policy_loss(batch, out.logprobs, old)
        if clipped is not None:
            stats["clipfrac"] = (clipped * mask).sum()
        if batch.behavior_logprobs is not None and config.temperature > 0:
            stats["sampler_gap"] = ((old - batch.behavior_logprobs) * mask).abs().sum()
            if not self.settings.algorithm.honours_stale:  # those have their own way with other distributions
                loss = loss * self.correction(policy, batch, old, stats)
        if out.entropy is not None:
            stats["entropy"] = (out.entropy * mask).sum()
            if config.entropy_coef:
                loss = loss - config.entropy_coef * out.entropy
        if batch.ref_logprobs is not None:
            stats["kl_ref"] = (objectives.kl_k1(out.logprobs, batch.ref_logprobs) * mask).sum()
            if config.kl_in == "loss":
                loss = loss + self.state["kl_coef"] * self.divergence(policy, batch, out.logprobs, acting)
        if batch.values is not None and batch.returns is not None:
            values = policy.values(batch)[:, :-1]
            value_loss = objectives.value_loss(values, batch.values, batch.returns, config.vf_clip)
            stats["value_loss"] = (value_loss.detach() * mask).sum()
            loss = loss + config.vf_coef * value_loss
        return loss, stats

    def value_loss(self, policy: Policy, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of Q(s, a) = V(s) + β log π/π_ref of the tokens, float32[B, S]; see `q_learning.QEstimator`."""
        assert batch.returns is not None and batch.ref_logprobs is not None
        out = policy.logprobs(batch, entropy="measured")
        values = policy.values(batch)[:, :-1]
        taken = objectives.action_value(values, out.logprobs, batch.ref_logprobs, self.config.q_beta)
        loss = objectives.q_loss(taken, batch.returns.to(taken.dtype)) * batch.action_mask
        assert out.entropy is not None
        return loss, {"entropy": (out.entropy * batch.action_mask).sum()}

    def policy_loss(self, batch: Batch, logprobs: Tensor, old: Tensor) -> tuple[Tensor, Tensor | None]:
        """(loss float32[B, S], clipped as 0/1 float32[B, S] or None)."""
        assert batch.advantages is not None
        low, high = self.settings.clip_low, self.settings.clip_high
        kind = self.settings.algorithm.loss
        if kind == "ppo_clip":
            return objectives.ppo_clip(logprobs, old, batch.advantages, low, high)
        if kind == "importance":
            return objectives.importance(logprobs, old, batch.advantages), None
        if kind == "gspo":
            return objectives.gspo(logprobs, old, batch.advantages, batch.action_mask, low, high)
        if kind == "cispo":
            return objectives.cispo(logprobs, old, batch.advantages, low, high)
        if kind == "topr":
            assert batch.behavior_logprobs is not None
            return objectives.topr(logprobs, batch.behavior_logprobs, batch.advantages, batch.action_mask)
        return objectives.reinforce(logprobs, batch.advantages), None

    def correction(self, policy: Policy, batch: Batch, old: Tensor, stats: dict[str, Tensor]) -> Tensor | float:
        """The weight float32[B, S] of what another distribution than the trainer's drew, by rounding or age; or 1."""
        weight: Tensor | float = 1.0
        assert batch.behavior_logprobs is not None
        if policy.dtype != "float32" and self.config.correction_cap > 0:
            weight = objectives.behavior_correction(old, batch.behavior_logprobs, self.config.correction_cap)
        if self.config.correction_band > 0:
            weight = weight * objectives.sequence_mask(
                old, batch.behavior_logprobs, batch.action_mask, self.config.correction_band
            ).expand_as(old)
        if isinstance(weight, Tensor):
            stats["correction"] = (weight * batch.action_mask).sum()
        return weight

    def divergence(self, policy: Policy, batch: Batch, logprobs: Tensor, acting: Distributions | None = None) -> Tensor:
        """The KL to the reference per token, float32[B, S], as `kl_estimator` says; acting: of `policy`, for "full"."""
        assert batch.ref_logprobs is not None
        if self.config.kl_estimator == "k2":
            return objectives.kl_k2(logprobs, batch.ref_logprobs)
        if self.config.kl_estimator == "k3":
            return objectives.kl_k3(logprobs, batch.ref_logprobs)
        assert acting is not None
        with policy.as_reference():
            reference = policy.acting(batch)
        return placed(batch, full_kl_of(acting, reference))
