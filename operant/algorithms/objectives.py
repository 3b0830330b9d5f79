"""Losses per token or per completion, pure functions of tensors of one shape. Minimise them; a batch's weights sum."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from operant.types import Batch


def negative_log_likelihood(logprobs: Tensor) -> Tensor:
    """−log π(y_t), float[B, S]: pretraining and supervised fine-tuning."""
    return -logprobs


def reinforce(logprobs: Tensor, advantages: Tensor) -> Tensor:
    """−A_t log π(y_t), whose gradient is −A_t ∇log π(y_t) (Williams 1992; Sutton et al. 2000). All float[B, S]."""
    return -advantages.detach() * logprobs


def importance(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor) -> Tensor:
    """TRPO's surrogate (Schulman et al. 2015, eq. 14), per token: −ρ_t A_t with ρ_t = π(y_t) / π_old(y_t).

    Where π is π_old its gradient is REINFORCE's; how far it holds is the trust region's matter, not the loss's.
    All float[B, S].
    """
    return -(logprobs - old_logprobs.detach()).exp() * advantages.detach()


def ppo_clip(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_low: float = 0.2, clip_high: float = 0.2
) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate (Schulman et al. 2017, eq. 7), per token.

        −min(ρ_t A_t, clip(ρ_t, 1 − clip_low, 1 + clip_high) A_t),  ρ_t = π(y_t) / π_old(y_t)

    All float[B, S], both log-probs at the training temperature. Returns (loss, clipped as 0/1), float[B, S].
    """
    advantages = advantages.detach()
    ratio = (logprobs - old_logprobs.detach()).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -torch.minimum(ratio * advantages, clipped * advantages)
    outside = (ratio * advantages > clipped * advantages).to(loss.dtype)
    return loss, outside


def sequence_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over each row's action tokens, as a column: float[B, S], bool[B, S] → float[B, 1]. One completion a row."""
    return (values * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)


def gspo(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """GSPO's surrogate (Zheng et al. 2025): one ratio a sequence, normalised by its length, and clipped.

        −min(s_i A, clip(s_i, 1 − clip_low, 1 + clip_high) A),  s_i = (π(y_i) / π_old(y_i))^(1/|y_i|)

    Each token carries the sequence's value with its own gradient (their GSPO-token). With one advantage a row and
    weights 1/|y_i| that is the same gradient. float[B, S]; mask: bool[B, S]. Returns (loss, clipped as 0/1 float), both
    float[B, S].
    """
    mean = sequence_mean(logprobs - old_logprobs, mask).detach()
    # the sequence's ratio in value, the token's own log-probability in gradient
    return ppo_clip(mean + logprobs - logprobs.detach(), torch.zeros_like(logprobs), advantages, clip_low, clip_high)


def cispo(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_low: float = 1.0, clip_high: float = 4.0
) -> tuple[Tensor, Tensor]:
    """CISPO (MiniMax-M1, 2025): REINFORCE with a clipped importance weight that has no gradient of its own.

        −sg(clip(ρ_t, 1 − clip_low, 1 + clip_high)) A_t log π(y_t)

    Clipping bounds a token's weight and never silences it, as PPO's does. clip_low = 1 leaves the lower side open.
    All float[B, S]. Returns (loss, clipped as 0/1), float[B, S].
    """
    ratio = (logprobs - old_logprobs).detach().exp()
    weight = ratio.clamp(1 - clip_low, 1 + clip_high)
    return weight * reinforce(logprobs, advantages), (weight != ratio).to(logprobs.dtype)


def topr(logprobs: Tensor, behavior_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """TOPR (Le Roux et al. 2025): off policy and stable without a KL, whoever wrote the completion.

        −w A log π,  w = 1 where A ≥ 0,  min(π(y) / μ(y), 1) over the whole sequence where A < 0, without gradient

    Good completions pull at full weight; bad ones push only as far as the policy still says them, so that nothing is
    driven to minus infinity. A greedy completion's μ is 1. float[B, S]. Returns (loss, cut as 0/1 float).
    """
    whole = ((logprobs - behavior_logprobs) * mask).sum(1, keepdim=True).detach().exp()
    weight = torch.where(advantages < 0, whole.clamp(max=1.0), torch.ones_like(logprobs))
    return weight * reinforce(logprobs, advantages), ((advantages < 0) & (whole > 1)).to(logprobs.dtype)


def sequence_mask(old_logprobs: Tensor, behavior_logprobs: Tensor, mask: Tensor, band: float) -> Tensor:
    """1 where the geometric mean of π_old / μ over a row lies within [1/(1 + band), 1 + band], else 0: float[B, 1].

    A completion that the policy has drifted too far from to learn from token by token is left out whole (the geometric
    mask of Liu et al. 2025, on mismatch between sampler and trainer). A guard against collapse, not a correction: what
    it leaves out is a bias of its own, larger than that of truncated weights where much is left out.
    """
    mean = sequence_mean(old_logprobs - behavior_logprobs, mask).detach()
    return (mean.abs() <= math.log1p(band)).to(old_logprobs.dtype)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float = 0.0) -> Tensor:
    """½ max((V − R)², (V_old + clip(V − V_old, ±clip) − R)²), the critic's loss per token; clip 0 is ½ (V − R)².

    The clipped form is that of PPO's first code (Dhariwal et al. 2017); R comes from `credit.gae`. All float[B, S].
    """
    loss = (values - returns.detach()) ** 2
    if clip > 0:
        near = old_values.detach() + (values - old_values.detach()).clamp(-clip, clip)
        loss = torch.maximum(loss, (near - returns.detach()) ** 2)
    return 0.5 * loss


def action_value(value: Tensor, logprobs: Tensor, reference: Tensor, beta: float) -> Tensor:
    """Q(s, a) = V(s) + β (log π(a|s) − log π_ref(a|s)): a policy as its own advantages (Schulman, Chen & Abbeel 2017,
    eq. 14). π is then π_ref reweighted by exp((Q − V) / β) and sums to one by itself.

    value: float[B, S], or float[K, 1] beside the log-probs of a whole vocabulary, float[K, V]. Returns float like them.
    """
    return value + beta * (logprobs - reference)


def supported(logits: Tensor, share: float) -> Tensor:
    """Tokens that a behaviour could have said: probability ≥ share · the likeliest's, bool like logits float[…, V]
    (BCQ's discrete form, Fujimoto et al. 2019)."""
    return logits >= logits.amax(-1, keepdim=True) + math.log(max(share, 1e-38))


def double_q_value(select: Tensor, judge: Tensor, allowed: Tensor) -> Tensor:
    """judge(s, argmax_{a allowed} select(s, a)): the double estimator of max_a Q (van Hasselt et al. 2016, eq. 4).

    With `select` as its own judge it is single Q-learning's max, which is too large by the luck of the estimates.
    select, judge: float[…, V]; allowed: bool[…, V], at least one in each row. Returns float[…].
    """
    best = select.masked_fill(~allowed, -torch.inf).argmax(-1, keepdim=True)
    return judge.gather(-1, best)[..., 0]


def q_loss(values: Tensor, targets: Tensor) -> Tensor:
    """½ (Q(s, a) − y)² per token, float[B, S]; the target gets no gradient."""
    return 0.5 * (values - targets.detach()) ** 2


def adapt_kl(coefficient: float, kl: float, target: float, rate: float = 0.1) -> float:
    """β ← β (1 + rate · clip(KL / target − 1, −0.2, 0.2)), the proportional controller of Ziegler et al. 2019 (2.2).

    target 0 leaves the coefficient fixed; so does a KL that is not a number.
    """
    if target <= 0 or not math.isfinite(kl):
        return coefficient
    return coefficient * (1 + rate * min(max(kl / target - 1, -0.2), 0.2))


def behavior_correction(old_logprobs: Tensor, behavior_logprobs: Tensor, cap: float = 2.0) -> Tensor:
    """Truncated importance weight min(π_old / μ, cap) from the distribution that was really sampled (Ionides 2008).

    All float[B, S]; 1 where sampler and trainer agree. Truncation trades a bias for bounded variance; the loop reports
    its mean.
    """
    return (old_logprobs - behavior_logprobs).detach().exp().clamp(max=cap)


def kl_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log π − log π_ref at the sampled token, float[B, S]: an unbiased estimate of KL(π‖π_ref) (Schulman 2020).

    Goes into the reward. As a loss term its on-policy gradient is zero in expectation, so it is not offered there.
    """
    return (logprobs - ref_logprobs).detach()


def kl_k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """½ (log π − log π_ref)², float[B, S]: its gradient on policy is an unbiased one of the per-token KL(π‖π_ref)."""
    return 0.5 * (logprobs - ref_logprobs.detach()) ** 2


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """e^d − 1 − d with d = log π_ref − log π: non-negative; as a loss its gradient is that of KL(π_ref‖π), the forward
    divergence. GRPO's published penalty (Shao et al. 2024, eq. 4). All float[B, S]."""
    gap = ref_logprobs.detach() - logprobs
    return gap.exp() - 1 - gap


def full_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """KL(π‖π_ref) over the whole vocabulary: logits float[…, V] → float[…]. No sampling noise."""
    logp, ref = torch.log_softmax(logits, -1), torch.log_softmax(ref_logits, -1)
    return (logp.exp() * (logp - ref)).sum(-1)


def label_smoothed(logprobs: Tensor, mean_logprobs: Tensor, smoothing: float) -> Tensor:
    """(1 − ε) · NLL + ε · cross-entropy to the uniform distribution (Szegedy et al. 2016).

    logprobs: float[B, S]; mean_logprobs: float[B, S], the mean of log π over the vocabulary. Returns float[B, S].
    """
    return -(1 - smoothing) * logprobs - smoothing * mean_logprobs


# --- preferences: one loss per pair or per completion, of sequence log-probs log π(y|x) = Σ_t log π(y_t) --------------


def dpo(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Direct preference optimisation (Rafailov et al. 2023, eq. 7), with label smoothing ε (cDPO, Mitchell 2023).

        −(1 − ε) log σ(β Δ) − ε log σ(−β Δ),  Δ = log π(y_w|x)/π_ref(y_w|x) − log π(y_l|x)/π_ref(y_l|x)

    All columns float[P], one entry a pair; the reference's are constants. ε is the share of labels that are wrong.
    """
    margin = beta * _log_ratio_gap(chosen, rejected, ref_chosen, ref_rejected)
    right, wrong = torch.nn.functional.logsigmoid(margin), torch.nn.functional.logsigmoid(-margin)
    return -(1 - label_smoothing) * right - label_smoothing * wrong


def ipo(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float = 0.1) -> Tensor:
    """Identity preference optimisation (Azar et al. 2023, eq. 17): (Δ − 1/(2β))², with DPO's Δ; β is their τ.

    The gap is pulled to 1/(2β) instead of to infinity. All columns float[P]: log-probs of sequences as in the paper's
    equation, or their means per token, which its authors used and which keep β apart from the length.
    """
    return (_log_ratio_gap(chosen, rejected, ref_chosen, ref_rejected) - 1 / (2 * beta)) ** 2


def kto(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    desirable: Tensor,
    kl: Tensor | float,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Kahneman–Tversky optimisation (Ethayarajh et al. 2024, eq. 8), from completions that are each good or bad.

        λ_D (1 − σ(β (r − z₀))) where desirable, λ_U (1 − σ(β (z₀ − r))) where not;  r = log π(y|x)/π_ref(y|x)

    logprobs, ref_logprobs: float[N], one entry a completion; desirable: bool[N]. kl: z₀ ≥ 0, the reference point, an
    estimate of KL(π‖π_ref) that gets no gradient (see `kto_reference_point`).
    """
    point = kl.detach() if isinstance(kl, Tensor) else kl
    gain = beta * (logprobs - ref_logprobs.detach() - point)
    value = torch.sigmoid(torch.where(desirable, gain, -gain))
    weight = torch.where(desirable, desirable_weight, undesirable_weight).to(value.dtype)
    return weight * (1 - value)


def kto_reference_point(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """z₀ = max(0, mean of log π(y'|x)/π_ref(y'|x)) over prompts x with completions y' of other prompts, float[M]
    (Ethayarajh et al. 2024, §4.1). Biased as an estimate of the KL, and cheap: nothing has to be sampled."""
    return (logprobs - ref_logprobs).mean().clamp(min=0).detach()


def preference_loss(
    logprobs: Tensor,
    batch: Batch,
    algorithm: Literal["dpo", "ipo", "kto"],
    *,
    beta: float,
    mean: bool = False,
    label_smoothing: float = 0.0,
    kto_weights: tuple[float, float] = (1.0, 1.0),
    reference_point: float = 0.0,
    sft_coef: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`dpo`, `ipo` or `kto` as a loss per token: each pair's, or for KTO each completion's, on one token of its batch.

    logprobs: float[B, S], the policy's, 0 outside the action mask. batch: has `ref_logprobs` float[B, S], `is_chosen`
    bool[B] and, for pairs (dpo, ipo), `pair_ids` int64[B]. mean: log π(y|x) is the mean over
    the completion's tokens, not their sum. kto_weights: (λ_D, λ_U). reference_point: KTO's z₀. sft_coef: weight of
    −log π(y_t), averaged over each good completion.

    Returns (float[B, S], sums). The loss of a pair stands on the last token of its chosen completion, so that
    Σ over tokens / denominator is the mean over pairs and a micro-batch of whole pairs adds its share. Sums over the
    `count` pairs or completions, each a scalar: `accuracy`, whether the implicit reward β log π/π_ref is on the right
    side (of the other completion's; for KTO, of the reference point's), and `margin`, by how much.
    """
    assert batch.ref_logprobs is not None and batch.is_chosen is not None
    lengths = batch.action_mask.sum(1).clamp(min=1)
    scale = lengths if mean else torch.ones_like(lengths)
    ours, reference = logprobs.sum(1) / scale, batch.ref_logprobs.sum(1) / scale
    good = batch.is_chosen
    if algorithm == "kto":
        rows = torch.arange(len(good), device=good.device)
        losses = kto(ours, reference, good, reference_point, beta, *kto_weights)
        margin = beta * (ours - reference - reference_point) * torch.where(good, 1.0, -1.0)
    else:
        assert batch.pair_ids is not None
        rows, other = (_rows_by_pair(batch.pair_ids, side) for side in (good, ~good))
        columns = (ours[rows], ours[other], reference[rows], reference[other])
        losses = dpo(*columns, beta, label_smoothing) if algorithm == "dpo" else ipo(*columns, beta)
        margin = beta * ((columns[0] - columns[1]) - (columns[2] - columns[3]))
    last = batch.action_mask.shape[1] - 1 - batch.action_mask.flip(1).long().argmax(1)
    token_loss = torch.zeros_like(logprobs).index_put((rows, last[rows]), losses.to(logprobs.dtype))
    if sft_coef:
        token_loss = token_loss - sft_coef * good[:, None] * logprobs / lengths[:, None]
    margin = margin.detach()
    right = (margin > 0).float() + 0.5 * (margin == 0).float()  # the reference itself is a coin, not always wrong
    count = torch.tensor(float(len(rows)))
    return token_loss, {"count": count, "accuracy": right.sum(), "margin": margin.sum()}


def _rows_by_pair(pair_ids: Tensor, side: Tensor) -> Tensor:
    """The rows where `side` bool[B] holds, in the order of their pairs: int64[P]."""
    rows = side.nonzero()[:, 0]
    return rows[pair_ids[rows].argsort()]


def _log_ratio_gap(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> Tensor:
    """Δ of `dpo`, float[P]: how much more than the reference the policy prefers the chosen completion, in nats."""
    return (chosen - rejected) - (ref_chosen - ref_rejected).detach()
