"""The gate before a version serves, and an estimate of its worth: KL on anchors, metrics, SNIPS."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from operant.algorithms.objectives import full_kl
from operant.config import LiveConfig
from operant.live.learning.anchors import Anchors
from operant.live.storage.versions import Versions
from operant.models.policy import LanguagePolicy, Policy
from operant.models.sampler import Sampler
from operant.rl.evaluate import distinct, evaluate
from operant.types import Completion, OperantError, Prompt, Sampling, TokenInfo

__all__ = [
    "Interrupted", "Verdict", "compare", "divergence", "divergences", "fast_gate", "likelihood", "off_policy_value",
    "sense_gate", "sense_metrics", "slow_gate", "slow_metrics",
]  # fmt: skip

CHUNK = 2**20  # logits in float64 at once: many more take twice as long
# metrics of `evaluate` that fall when a policy gets worse; the others only describe
_HIGHER_IS_BETTER = ("bleu", "chrf", "rougeL", "exact", "reward", "distinct2")
# what tells a model that falls apart from one that has learned a manner, against the anchor version
REPEATED = 0.25  # more of an answer that was there before in the same answer
SHORTER = 0.25  # of the length; who likes short answers may have them, but not none
EMPTY, ONE_ANSWER = 0.2, 0.5  # more answers without a word; the share of questions that get one and the same answer


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a version may serve, why not, and what was measured."""

    passed: bool
    reason: str
    numbers: dict[str, float] = field(default_factory=dict)


def divergence(logits: Tensor, ref_logits: Tensor) -> float:
    """Mean over tokens of KL(π‖π_ref) in nats: float32[K, V] each."""
    return float(divergences(logits, ref_logits).mean())


def divergences(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """KL(π‖π_ref) of each token, float64[K], from float32[K, V]. In float64: a small one is rounding in float32."""
    size = max(1, CHUNK // logits.shape[-1])
    pairs = zip(logits.split(size), ref_logits.split(size), strict=True)
    return torch.cat([full_kl(own.double(), theirs.double()) for own, theirs in pairs])


def likelihood(logits: Tensor, tokens: Tensor) -> float:
    """Mean log π of the tokens int64[K] in nats."""
    return float(logits.log_softmax(-1).gather(-1, tokens[:, None]).mean())


def fast_gate(
    logits: Tensor,
    since_logits: Tensor,
    anchor_logits: Tensor,
    tokens: Tensor,
    *,
    kl_parent: float,
    kl_budget: float,
    drift_budget: float,
    likelihood_drop: float,
) -> Verdict:
    """The gate of every publication, from logits float32[K, V] on the anchor answers tokens int64[K].

    Passes when KL(π‖π_parent) ≤ kl_budget, KL(π‖π_since) ≤ drift_budget (so that small steps cannot add up to a large
    one faster than is meant) and the answers' mean log-probability has lost at most likelihood_drop against the anchor
    version, however slowly. kl_parent: the first of these, in nats per token, as the step has measured it. since: the
    version that drift is measured from; it follows (`LiveConfig.drift_versions`).
    """
    drift = divergence(logits, since_logits)
    lost = likelihood(anchor_logits, tokens) - likelihood(logits, tokens)
    numbers = {"kl_parent": kl_parent, "kl_drift": drift, "likelihood_lost": lost}
    reasons = [
        f"{what} is {value:.4g}, over {limit:g}"
        for what, value, limit in (
            ("the KL to the parent", kl_parent, kl_budget),
            ("the KL to the version that drift is measured from", drift, drift_budget),
            ("the likelihood that the anchor answers lost", lost, likelihood_drop),
        )
        if not value <= limit  # so that NaN does not pass
    ]
    return Verdict(not reasons, "; ".join(reasons), numbers)


class Interrupted(Exception):
    """What the slow gate was looking at has to wait."""


def slow_metrics(
    policy: LanguagePolicy,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int = 64,
    interrupted: Callable[[], bool] = lambda: False,
) -> tuple[dict[str, float], list[Completion]]:
    """Greedy answers to held-out prompts, measured by `evaluate`: references' metrics where there are references.

    interrupted: asked after every few tokens.
    Raises Interrupted where it says so.
    """
    greedy, drawn = Sampling(temperature=0.0, max_tokens=max_tokens), 0

    def look(completion_id: str, token: TokenInfo) -> None:
        nonlocal drawn
        drawn += 1
        if drawn % 8 == 0 and interrupted():
            raise Interrupted

    return evaluate(Sampler(policy, max_rows=32, on_token=look), prompts, sampling=greedy)


def sense_metrics(
    policy: LanguagePolicy, prompts: Sequence[Prompt], *, max_tokens: int, interrupted: Callable[[], bool]
) -> dict[str, float]:
    """Greedy answers to different questions, by what shows a model that falls apart, whatever it was asked.

    repeated: the share of pairs of tokens that were there before in the same answer, a mean over answers. length:
    tokens, a mean. empty: the share of answers without a word. commonest: the share of the commonest answer.

    Raises Interrupted as `slow_metrics` does.
    """
    said = slow_metrics(policy, prompts, max_tokens=max_tokens, interrupted=interrupted)[1]
    texts = [completion.text.strip() for completion in said]
    return {
        "repeated": 1.0 - sum(distinct([completion.tokens]) for completion in said) / len(said),
        "length": sum(len(completion.tokens) for completion in said) / len(said),
        "empty": sum(not any(c.isalnum() for c in text) for text in texts) / len(said),
        "commonest": max(Counter(texts).values()) / len(said),
    }


def sense_gate(measured: Mapping[str, float], anchor: Mapping[str, float]) -> Verdict:
    """Whether answers to everyday questions still have the form of answers, beside those of the anchor version.

    A manner that people teach passes: other words, shorter or longer ones. Answers that repeat themselves, that are
    nearly nothing, or that are the same to all questions do not. measured, anchor: of `sense_metrics`.
    """
    limits = (
        ("repeated", "answers repeat themselves: the share of pairs of tokens that come again", 1, REPEATED),
        ("empty", "answers are empty: their share", 1, EMPTY),
        ("length", "answers are nearly nothing: their length in tokens", -1, (1 - SHORTER) * anchor["length"]),
        ("commonest", "different questions get one answer: its share", 1, max(0.0, ONE_ANSWER - anchor["commonest"])),
    )
    reasons = [
        f"{what} is {measured[name]:.2g}, where the anchor version's is {anchor[name]:.2g}"
        for name, what, worse, room in limits
        if not worse * (measured[name] - anchor[name]) <= room
    ]
    return Verdict(not reasons, "; ".join(reasons), {f"sense_{name}": value for name, value in measured.items()})


def slow_gate(measured: Mapping[str, float], anchor: Mapping[str, float], tolerance: float = 0.1) -> Verdict:
    """Whether generation got worse than the anchor version's: each metric that should be high may lose at most this
    share of its value there. A metric that can no longer be measured fails."""
    reasons = []
    for name in _HIGHER_IS_BETTER:
        if name in anchor and math.isfinite(anchor[name]):
            floor = anchor[name] - tolerance * abs(anchor[name])
            if not measured.get(name, math.nan) >= floor:
                reasons.append(f"{name} is {measured.get(name, math.nan):.4g}, under {floor:.4g}")
    return Verdict(not reasons, "; ".join(reasons), dict(measured))


def off_policy_value(
    rewards: Sequence[float] | Tensor,
    logprobs: Sequence[float] | Tensor,
    behavior_logprobs: Sequence[float] | Tensor,
    *,
    counts: Sequence[float] | Tensor | None = None,
) -> dict[str, float]:
    """What a candidate would be paid, from what others wrote and how it was rated: SNIPS (Swaminathan & Joachims 2015).

        snips = Σ w r / Σ w,  w = π(y|x) / μ(y|x);   ips = Σ w r / N;   ess = (Σ w)² / Σ w²  (Kong 1992)

    SNIPS is consistent and bounded by the rewards; its bias is of order 1/N. With a small effective sample size neither
    number says anything: read it first. `std_error` is SNIPS's by the delta method.

    Args:
        rewards: float[N], of each logged completion.
        logprobs: float[N], log π(y|x) under the candidate, summed over tokens, at the temperature of sampling.
        behavior_logprobs: float[N], log μ(y|x) as it was logged. Greedy completions have none and do not belong here.
        counts: float[N], how often each was logged; ones when not given.

    Raises OperantError when there is nothing to learn from.
    """
    r, ours, theirs = (torch.as_tensor(x, dtype=torch.float64) for x in (rewards, logprobs, behavior_logprobs))
    n = torch.ones_like(r) if counts is None else torch.as_tensor(counts, dtype=torch.float64)
    if not len(r) or not float(n.sum()) > 0:
        raise OperantError(
            "no rated completion with a propensity is there to judge the candidate by; collect some first"
        )
    log_ratio = ours - theirs
    top = log_ratio.max()  # a shift that cancels everywhere but in ips, where it is put back
    weight = (log_ratio - top).exp()
    total = (n * weight).sum()
    value = (n * weight * r).sum() / total
    error = (n * (weight * (r - value)) ** 2).sum().sqrt() / total
    return {
        "snips": float(value),
        "ips": float((n * weight * r).sum() * top.exp() / n.sum()),
        "ess": float(total**2 / (n * weight**2).sum()),
        "std_error": float(error),
    }


@torch.no_grad()
def compare(versions: Versions, one: int, other: int) -> dict[str, Any]:
    """Two versions on the anchor answers: KL(other‖one) and mean log-probability per token, and their common ancestor.

    Raises OperantError when one of them is not on disk.
    """
    policies = [Policy.load(Path(versions.get(v).path) / "model", device="cpu") for v in (one, other)]
    for policy in policies:
        policy.model.eval()
    anchors, room = Anchors.load(versions.root, policies[0]), LiveConfig().tokens_per_microbatch
    first, second = (anchors.logits(policy, room) for policy in policies)
    tokens, line = anchors.tokens(room), versions.ancestors(one)
    return {
        "versions": [one, other],
        "common_ancestor": next(v for v in versions.ancestors(other) if v in line),
        "kl": divergence(second, first),
        "likelihood": [likelihood(first, tokens), likelihood(second, tokens)],
    }
