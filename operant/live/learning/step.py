"""One step of the weights from what a handful of ratings, or one, taught (`operant.live.learning.lesson`).

Good tokens (A ≥ 0) are learned at full weight, whoever wrote them; bad ones weigh min(π/μ, 1) per token, and not at
all once the geometric mean of π/μ over the text is below 1/(1 + band) (TOPR, Le Roux et al. 2025, per token; the mask
of Liu et al. 2025, on its lower side: a text that is said more than when it was written may always be pushed down).
DPO's reference is the version that the step begins with. The step is scaled back until the mean KL on the anchor
answers is within its budget and what was just said is followed: so a rating moves its text in the right direction, or
nothing moves and it is told. Each step is one along its own gradient, with no momentum and no scaling by earlier ones;
what steadies it is that some earlier ratings are learned again in every step, and what keeps the words that nobody
spoke of is a pull to the anchor version on the same answers: kl_coef · KL(π‖π_anchor) for each of their tokens.

Nothing that learns here reads a clock, a file or a network.
"""

from __future__ import annotations

import dataclasses
import math
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import transformers
from torch import Tensor

from operant.algorithms import objectives
from operant.algorithms.learner import Learner, Sgd, logprobs_of
from operant.config import LiveConfig
from operant.data.batch import drawn, from_sequences, from_trajectories, microbatches, scatter
from operant.live.learning.gate import Anchors, divergence
from operant.live.learning.lesson import Lesson, Paired, Rated, weight_of
from operant.live.storage.versions import Outcome
from operant.models.policy import Policy
from operant.types import Batch, Ints, Prompt, StepStats, Trajectory

__all__ = ["ARITHMETIC", "Taught", "fingerprint", "new_learner", "rating_loss", "take_step"]

# The number of the arithmetic by which a live step is made: of the lesson, the loss, the policy's log-probs, the
# gradient step and the line search. Raise it with every change that may give another last bit. It is a part of the
# fingerprint, so that versions from before the change are then held to a tolerance and not to their bits.
ARITHMETIC = 1
HALVINGS = 24  # of a step, before it is given up
PATIENCE = 4  # tries with earlier events, before the new ones are learned alone
UNLIKELY = 1e-3  # a probability under the anchor version; tokens below it are counted
_FAR = "the policy has moved too far from this text to push it down"
_LESS = "its source is contradicted by others, or has nearly had its share of what was learned lately"


@dataclass(slots=True)
class Taught:
    """What a step did. scale: the share of the optimizer's step that was kept, 0 if the weights are as they were.

    `stats.extra` has, where there was a pull, two means over the tokens of the rated answers as the step began:
    `kl_anchor`, the KL to the anchor version in nats, and `unlikely`, the share to which it gives less than UNLIKELY.

    anchor_logits: on the anchor answers, before the step and after it, if it moved the weights.
    """

    outcomes: dict[str, Outcome]
    stats: StepStats | None
    scale: float
    kl: float
    anchor_logits: tuple[Tensor, Tensor] | None = None

    @property
    def moved(self) -> bool:
        return self.scale > 0


def fingerprint(policy: Policy) -> dict[str, str]:
    """What has to be the same for the same record to give the same weights to the last bit.

    A record of before `arithmetic` was written down has another fingerprint than every one of today.
    """
    return {
        "arithmetic": str(ARITHMETIC),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "machine": platform.machine(),
        "device": policy.device.type,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "dtype": policy.dtype,
    }


def new_learner(policy: Policy, config: LiveConfig) -> Learner:
    """The live learner's optimizer: plain gradient steps of a bounded length."""
    rule = Sgd(policy.trainable_parameters(), config.lr, max_grad_norm=config.max_grad_norm)
    return Learner(policy, lr=config.lr, rule=rule)


def rating_loss(logprobs: Tensor, batch: Batch, band: float) -> tuple[Tensor, Tensor]:
    """−w A log π per token, with the weight w of this module's head; and, per row, whether π/μ is not below the band.

    batch: has `advantages`, `old_logprobs` (π as the step began) and `behavior_logprobs` (μ), float[B, S]; w reads
    the last two alone, so that the loss of one batch is one function of the weights.
    Returns (float[B, S], float[B, 1]).
    """
    assert batch.advantages is not None and batch.old_logprobs is not None and batch.behavior_logprobs is not None
    ratio = objectives.sequence_mean(batch.old_logprobs - batch.behavior_logprobs, batch.action_mask)
    near = (ratio >= -math.log1p(band)).to(logprobs.dtype)
    down = objectives.behavior_correction(batch.old_logprobs, batch.behavior_logprobs, cap=1.0) * near
    weight = torch.where(batch.advantages < 0, down, torch.ones_like(down))
    return weight * objectives.reinforce(logprobs, batch.advantages), near


def take_step(
    policy: Policy,
    learner: Learner,
    lesson: Lesson,
    anchors: Anchors,
    config: LiveConfig,
    *,
    origin: Policy | None = None,
    anchor_logits: Tensor | None = None,
) -> Taught:
    """One step of the weights, in place, and what became of each new event.

    origin: the anchor version, to which `config.kl_coef` pulls; None leaves the pull out.
    anchor_logits: of the weights as they are, on the anchor answers, where they are known already.

    When the step with earlier events does not follow what was said, one on the new events alone is made instead. The
    weights are as they were, bit for bit, when nothing is taught, when the step is sick, or when no share of it keeps
    the KL budget and follows; the reason is then told for each event.
    """
    outcomes = dict(lesson.outcomes)
    if not lesson.taught:
        return Taught(outcomes, None, 0.0, 0.0)
    policy.model.eval()  # dropout would make the ratio and the replay of a record another one
    room = config.tokens_per_microbatch
    _leave_out_the_far(policy, lesson, outcomes, config)
    if not lesson.taught:
        return Taught(outcomes, None, 0.0, 0.0)
    fresh = _batches(policy, [r for r in lesson.rated if r.fresh], [p for p in lesson.paired if p.fresh], config)
    also = [anchors.batch] if config.anchor_coef else []
    steps = [([*fresh, *also], HALVINGS)]
    if lesson.replayed:  # what was learned before may pull the other way; then the new events are learned alone
        steps.insert(0, ([*_batches(policy, lesson.rated, lesson.paired, config), *also], PATIENCE))
    reference = anchors.logits(policy, room) if anchor_logits is None else anchor_logits
    # in the order of the batches
    new: list[Rated | Paired] = [r for r in lesson.rated if r.fresh] + sorted(
        (p for p in lesson.paired if p.fresh), key=lambda p: not p.likelihood
    )
    said, before = _said(policy, fresh, config)
    parameters = policy.trainable_parameters()
    start = [p.detach().clone() for p in parameters]
    for batches, patience in steps:
        stats = learner.step([m for batch in batches for m in microbatches(batch, room)], _loss_of(config, origin))
        scale, kl, logits, after, reason = 0.0, 0.0, reference, before, stats.reason
        if not reason:
            scale, kl, logits, after = _scaled_back(
                policy, start, fresh, said, before, anchors, reference, config, patience
            )
            reason = "" if scale else "no step within the KL budget moved the text the right way"
        if scale:
            break
    for row, was, now in zip(new, before, after, strict=True):
        advantage = row.advantage if isinstance(row, Rated) else None
        told = reason if reason or row.part > 0.995 else f"weighed {row.part:.2f}: {_LESS}"
        outcomes[row.event.id] = Outcome("unused" if reason else "used", told, advantage, was, now)
    return Taught(outcomes, stats, scale, kl, (reference, logits) if scale else None)


def _leave_out_the_far(policy: Policy, lesson: Lesson, outcomes: dict[str, Outcome], config: LiveConfig) -> None:
    """Drop bad ratings whose text is below the band, so that a step does not wait for what it cannot move."""
    far: list[Rated] = []
    for rows in ([r for r in lesson.rated if r.fresh], [r for r in lesson.rated if not r.fresh]):
        if not rows:
            continue
        batch = _rating_batch(policy, rows, config)
        assert batch.old_logprobs is not None
        near = rating_loss(batch.old_logprobs, batch, config.correction_band)[1][:, 0].tolist()
        far += [row for row, inside in zip(rows, near, strict=True) if row.advantage < 0 and not inside]
    for row in far:
        lesson.rated.remove(row)
        if row.fresh:
            outcomes[row.event.id] = Outcome("unused", _FAR, advantage=row.advantage)
        else:
            lesson.replayed.remove(row.event.id)
    gone = {row.event.id for row in far}
    lesson.state.memory = [entry for entry in lesson.state.memory if entry["event"]["id"] not in gone]


def _scaled_back(
    policy: Policy,
    start: Sequence[Tensor],
    fresh: Sequence[Batch],
    said: float,
    before: list[float],
    anchors: Anchors,
    reference: Tensor,
    config: LiveConfig,
    patience: int,
) -> tuple[float, float, Tensor, list[float]]:
    """Halve the step from `start` until it keeps the budget and follows, which is that the loss of the new events is
    below `said`; the share that is left, its KL and logits, and the log-probs of what is told (`before`: at the start).

    patience: tries within the budget before it is given up.
    """
    parameters = policy.trainable_parameters()
    whole = [p.detach() - s for p, s in zip(parameters, start, strict=True)]
    for halving in range(HALVINGS):
        scale = 0.5**halving
        with torch.no_grad():
            for p, s, d in zip(parameters, start, whole, strict=True):
                p.copy_(s + scale * d)
        logits = anchors.logits(policy, config.tokens_per_microbatch)
        kl = divergence(logits, reference)
        if kl <= config.kl_budget:
            says, after = _said(policy, fresh, config)
            if says < said:
                return scale, kl, logits, after
            patience -= 1
            if not patience:
                break
    with torch.no_grad():
        for p, s in zip(parameters, start, strict=True):
            p.copy_(s)
    return 0.0, 0.0, reference, before


def _batches(policy: Policy, rated: Sequence[Rated], paired: Sequence[Paired], config: LiveConfig) -> list[Batch]:
    """All rows, in batches with one denominator: the number of rows."""
    batches = [_rating_batch(policy, rated, config)] if rated else []
    for likelihood in (True, False):
        rows = [p for p in paired if p.likelihood == likelihood]
        if rows:
            batches.append(_pair_batch(policy, rows, config))
    for batch in batches:
        batch.denominator = float(len(rated) + len(paired))
    return batches


def _rating_batch(policy: Policy, rated: Sequence[Rated], config: LiveConfig) -> Batch:
    """Ratings as rows. Only marked tokens, those `observed`, have an advantage, which holds the row's weight too."""
    trajectories = [Trajectory(r.prompt, r.completion, np.zeros(len(r.marked)), r.marked) for r in rated]
    batch = from_trajectories(
        trajectories, encoder=policy.family == "encoder-decoder", pad_id=policy.codec.pad_id,
        normalisation="per_completion",
    )  # fmt: skip
    marked = torch.zeros(len(rated), max(len(r.marked) for r in rated))
    for i, row in enumerate(rated):
        taught = row.marked[drawn(row.completion)]
        marked[i, : len(taught)] = torch.from_numpy(taught)
    advantages = torch.tensor([[r.advantage * r.weight * weight_of(r, config)] for r in rated])
    batch.advantages = scatter(batch, marked * advantages, trajectories)
    if any(r.logprobs is None for r in rated):
        found = logprobs_of(policy, batch, config.tokens_per_microbatch)
        for row, acts, logprobs in zip(rated, batch.action_mask, found, strict=True):
            row.logprobs = logprobs[acts]
    batch.old_logprobs = torch.zeros(batch.tokens.shape)
    for row, acts, old in zip(rated, batch.action_mask, batch.old_logprobs, strict=True):
        assert row.logprobs is not None
        old[acts] = row.logprobs
    return batch


def _pair_batch(policy: Policy, paired: Sequence[Paired], config: LiveConfig) -> Batch:
    """Pairs as neighbouring rows, with this step's beginning as the reference."""
    rows = [(p.pair.prompt, tokens) for p in paired for tokens in (p.pair.chosen, p.pair.rejected)]
    batch = _plain_batch(policy, rows)
    batch.is_chosen = torch.arange(len(rows)) % 2 == 0
    batch.pair_ids = torch.arange(len(rows)) // 2
    batch.weights = batch.weights * torch.tensor([[p.weight] for p in paired for _ in range(2)])
    batch.kind = "edits" if paired[0].likelihood else "pairs"
    batch.ref_logprobs = logprobs_of(policy, batch, config.tokens_per_microbatch)
    return batch


def _plain_batch(policy: Policy, rows: Sequence[tuple[Prompt, Ints]]) -> Batch:
    return from_sequences(
        [prompt.tokens for prompt, _ in rows], [tokens for _, tokens in rows],
        encoder=policy.family == "encoder-decoder", pad_id=policy.codec.pad_id, normalisation="per_completion",
    )  # fmt: skip


def _loss_of_rows(logprobs: Tensor, batch: Batch, config: LiveConfig) -> Tensor:
    """The loss of ratings or of pairs, float[B, S]."""
    if batch.kind == "completions":
        return rating_loss(logprobs, batch, config.correction_band)[0]
    likelihood = config.sft_coef if batch.kind == "edits" else 0.0
    return objectives.preference_loss(logprobs, batch, "dpo", beta=config.beta, sft_coef=likelihood)[0]


def _loss_of(config: LiveConfig, origin: Policy | None) -> Callable[[Policy, Batch], tuple[Tensor, dict[str, Tensor]]]:
    """The `learner.TokenLoss` of ratings and pairs, with the pull to the anchor version; and of anchor answers."""

    def loss_of(policy: Policy, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        if batch.kind == "supervised":
            return config.anchor_coef * objectives.negative_log_likelihood(policy.logprobs(batch).logprobs), {}
        if origin is None or not config.kl_coef:
            return _loss_of_rows(policy.logprobs(batch).logprobs, batch, config), {}
        logits = policy.acting_logits(batch)
        logprobs = policy.logprobs(batch, logits=logits).logprobs
        with torch.no_grad():
            theirs = origin.acting_logits(batch)
        pull = torch.zeros_like(logprobs).masked_scatter(batch.action_mask, objectives.full_kl(logits, theirs))
        told = {}
        if batch.kind == "completions":  # texts that the policy wrote itself
            given = origin.logprobs(batch, logits=theirs).logprobs
            told = {"kl_anchor": pull.detach().sum(), "unlikely": (given < math.log(UNLIKELY)).sum()}
        return _loss_of_rows(logprobs, batch, config) + config.kl_coef * pull, told

    return loss_of


@torch.no_grad()
def _said(policy: Policy, batches: Sequence[Batch], config: LiveConfig) -> tuple[float, list[float]]:
    """Of new events: the loss that a step on them would lower, the pull left out; and log π of what each is about, at
    temperature 1 (see `Outcome`), in the order of the batches."""
    total, told = 0.0, list[float]()
    for batch in batches:
        logprobs = plain = logprobs_of(policy, batch, config.tokens_per_microbatch)
        if batch.temperature is not None and bool((batch.temperature != 1.0).any()):
            bare = dataclasses.replace(batch, temperature=None)
            plain = logprobs_of(policy, bare, config.tokens_per_microbatch)
        total += float((_loss_of_rows(logprobs, batch, config) * batch.weights).sum()) / batch.denominator
        if batch.is_chosen is not None:
            told += plain.double().sum(1)[batch.is_chosen].tolist()
        else:
            assert batch.observed is not None
            told += (plain.double() * batch.observed).sum(1).tolist()
    return total, told
