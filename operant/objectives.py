"""Losses per token, as pure functions of tensors of one shape (…,). Minimise them; a batch's weights do the summing."""

from __future__ import annotations

import torch
from torch import Tensor


def negative_log_likelihood(logprobs: Tensor) -> Tensor:
    """−log π(y_t): pretraining and supervised fine-tuning."""
    return -logprobs


def reinforce(logprobs: Tensor, advantages: Tensor) -> Tensor:
    """−A_t log π(y_t), whose gradient is −A_t ∇log π(y_t) (Williams 1992; Sutton et al. 2000)."""
    return -advantages.detach() * logprobs


def ppo_clip(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_low: float = 0.2, clip_high: float = 0.2
) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate (Schulman et al. 2017, eq. 7), per token.

        −min(ρ_t A_t, clip(ρ_t, 1 − clip_low, 1 + clip_high) A_t),  ρ_t = π(y_t) / π_old(y_t)

    Both log-probs are at the training temperature. Returns (loss, clipped as 0/1 float).
    """
    advantages = advantages.detach()
    ratio = (logprobs - old_logprobs.detach()).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -torch.minimum(ratio * advantages, clipped * advantages)
    outside = (ratio * advantages > clipped * advantages).to(loss.dtype)
    return loss, outside


def behavior_correction(old_logprobs: Tensor, behavior_logprobs: Tensor, cap: float = 2.0) -> Tensor:
    """Truncated importance weight min(π_old / μ, cap) from the distribution that was really sampled (Ionides 2008).

    1 where sampler and trainer agree. Truncation trades a bias for bounded variance; the loop reports its mean.
    """
    return (old_logprobs - behavior_logprobs).detach().exp().clamp(max=cap)


def kl_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log π − log π_ref at the sampled token: an unbiased estimate of KL(π‖π_ref) (Schulman 2020).

    Goes into the reward. As a loss term its on-policy gradient is zero in expectation, so it is not offered there.
    """
    return (logprobs - ref_logprobs).detach()


def kl_k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """½ (log π − log π_ref)²: its gradient on policy is an unbiased gradient of the per-token KL(π‖π_ref)."""
    return 0.5 * (logprobs - ref_logprobs.detach()) ** 2


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """e^d − 1 − d with d = log π_ref − log π: non-negative; as a loss its gradient is that of KL(π_ref‖π), the forward
    divergence. GRPO's published penalty (Shao et al. 2024, eq. 4)."""
    gap = ref_logprobs.detach() - logprobs
    return gap.exp() - 1 - gap


def full_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """KL(π‖π_ref) over the whole vocabulary: logits float[…, V] → float[…]. No sampling noise."""
    logp, ref = torch.log_softmax(logits, -1), torch.log_softmax(ref_logits, -1)
    return (logp.exp() * (logp - ref)).sum(-1)


def label_smoothed(logprobs: Tensor, mean_logprobs: Tensor, smoothing: float) -> Tensor:
    """(1 − ε) · NLL + ε · cross-entropy to the uniform distribution (Szegedy et al. 2016).

    mean_logprobs: the mean of log π over the vocabulary, same shape as logprobs.
    """
    return -(1 - smoothing) * logprobs - smoothing * mean_logprobs
