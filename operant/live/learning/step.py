"""One step of the weights from what a handful of ratings, or one, taught (`operant.live.learning.lesson`).

Good tokens (A ≥ 0) are learned at full weight, whoever wrote them; bad ones weigh min(π/μ, 1) per token, and not at
all once the geometric mean of π/μ over the text is below 1/(1 + band) (TOPR, Le Roux et al. 2025, per token; the mask
of Liu et al. 2025, on its lower side: a text that is said more than when it was written may always be pushed down).
DPO's reference is the version that the step begins with. The step is scaled back until the mean KL on the anchor
answers is within its budget and what was just said is followed: so a rating moves its text in the right direction, or
nothing moves and the outcome says why. Each step is one along its own gradient, with no momentum and no scaling by
earlier ones; what steadies it is that some earlier ratings are rehearsed in every step, and what keeps the words that
nobody spoke of is a pull to the anchor version on the same answers: kl_coef · KL(π‖π_anchor) for each of their tokens.

Nothing that learns here reads a clock, a file or a network.
"""

from __future__ import annotations

import dataclasses
import math
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import transformers
from torch import Tensor

from operant.algorithms import objectives
from operant.algorithms.learner import Learner, Sgd, logprobs_of
from operant.algorithms.surrogate import full_kl_of
from operant.config import LiveConfig
from operant.data.batch import drawn, microbatches, scatter
from operant.live.learning.anchors import Anchors
from operant.live.learning.events import LessonRow, Paired, Rated
from operant.live.learning.gate import divergence
from operant.live.learning.lesson import Lesson, weight_of
from operant.live.storage.versions import Outcome
from operant.models.policy import Policy, placed
from operant.types import Batch, StepStats, Trajectory

__all__ = ["ARITHMETIC", "StepResult", "fingerprint", "new_learner", "rating_loss", "take_step"]

# The number of the arithmetic by which a live step is made: of the lesson, the loss, the policy's log-probs, the
# gradient step and the line search. Raise it with every change that may give another last bit. It is a part of the
# fingerprint, so that versions from before the change are then held to a tolerance and not to their bits.
ARITHMETIC = 1
HALVINGS = 24  # of a step, before it is given up
PATIENCE = 4  # tries with rehearsed events, before the new ones are learned alone
UNLIKELY = 1e-3  # a probability under the anchor version; tokens below it are counted
_FAR = "the policy has moved too far from this text to push it down"
_LESS = "its source is contradicted by others, or has nearly had its share of what was learned lately"


@dataclass(slots=True)
class StepResult:
    """What a step did. scale: the share of the optimizer's step that was kept, 0 if the weights are as they were.
    kl: mean KL on the anchor answers from where the step began, in nats.

    `stats.extra` has, where there was a pull, two means over the tokens of the rated answers as the step began:
    `kl_anchor`, the KL to the anchor version in nats, and `unlikely`, the share to which it gives less than UNLIKELY.

    anchor_logits: float32[K, V] on the anchor answers, before the step and after it, if it moved the weights.
    """

    outcomes: dict[str, Outcome]
    stats: StepStats | None
    scale: float
    kl: float
    anchor_logits: tuple[Tensor, Tensor] | None = None

    @property
    def moved(self) -> bool:
        """Whether the weights are others than before."""
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
) -> StepResult:
    """One step of the weights, in place, and what became of each new event.

    origin: the anchor version, to which `config.kl_coef` pulls; None leaves the pull out.
    anchor_logits: float32[K, V] of the weights as they are, on the anchor answers, where they are known already.

    When the step with rehearsed events does not follow what was said, one on the new events alone is made instead. The
    weights are as they were, bit for bit, when nothing is taught, when the step is not finite, or when no share of it
    keeps the KL budget and follows; the reason is then in each event's outcome.
    """
    outcomes = dict(lesson.outcomes)
    if lesson.fresh:
        policy.model.eval()  # dropout would make the ratio and the replay of a record another one
        _leave_out_the_far(policy, lesson, outcomes, config)
    if not lesson.fresh:
        return StepResult(outcomes, None, 0.0, 0.0)
    fresh = _batches(policy, [r for r in lesson.rated if r.fresh], [p for p in lesson.paired if p.fresh], config)
    search = _LineSearch(policy, fresh, anchors, config, anchor_logits)
    loss_of, reason = _loss_of(config, origin), ""
    for batches, tries in _attempts(policy, lesson, fresh, anchors, config):
        found, room = search.begin, config.tokens_per_microbatch
        stats = learner.step([micro for batch in batches for micro in microbatches(batch, room)], loss_of)
        reason = stats.reason
        if not reason:
            found = search.shorten(tries)
            reason = "" if found.scale else "no step within the KL budget moved the text the right way"
        if not reason:
            break
    rows = _in_the_order_of_batches(lesson.fresh)
    for row, before, after in zip(rows, search.begin.logprobs, found.logprobs, strict=True):
        outcomes[row.event.id] = _outcome(row, reason, before, after)
    moved = (search.begin.logits, found.logits) if found.scale else None
    return StepResult(outcomes, stats, found.scale, found.kl, moved)


def _attempts(
    policy: Policy, lesson: Lesson, fresh: list[Batch], anchors: Anchors, config: LiveConfig
) -> Iterator[tuple[list[Batch], int]]:
    """What steps are tried on, one after the other, and the tries that each has in the line search."""
    also = [anchors.batch] if config.anchor_coef else []
    if lesson.rehearsed:  # what was learned before may pull the other way; then the new events are learned alone
        yield [*_batches(policy, lesson.rated, lesson.paired, config), *also], PATIENCE
    yield [*fresh, *also], HALVINGS


def _in_the_order_of_batches(rows: Sequence[LessonRow]) -> list[LessonRow]:
    return sorted(rows, key=lambda row: 0 if isinstance(row, Rated) else 1 if row.likelihood else 2)


def _outcome(row: LessonRow, reason: str, before: float, after: float) -> Outcome:
    """reason: why the step was not made, empty if it was. before, after: log π of the text, in nats."""
    advantage = row.advantage if isinstance(row, Rated) else None
    if reason:
        return Outcome("unused", reason, advantage, before, after)
    return Outcome("used", "" if row.part > 0.995 else f"weighed {row.part:.2f}: {_LESS}", advantage, before, after)


def _leave_out_the_far(policy: Policy, lesson: Lesson, outcomes: dict[str, Outcome], config: LiveConfig) -> None:
    """Drop bad ratings whose text is below the band, so that a step does not wait for what it cannot move.

    The log-probs of all ratings are looked up for it.
    """
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
            lesson.rehearsed.remove(row.event.id)
    gone = {row.event.id for row in far}
    lesson.state.memory = [entry for entry in lesson.state.memory if entry["event"]["id"] not in gone]


@dataclass(frozen=True, slots=True)
class _Point:
    """The weights at a share of the step. kl: of the anchor answers, from where the step began.

    logits: float32[K, V] on the anchor answers. logprobs: log π of what each new event is about.
    """

    scale: float
    kl: float
    logits: Tensor
    logprobs: list[float]


class _LineSearch:
    """Halves a step of the weights, from where they are when this is made, until it keeps the KL budget and follows,
    which is that it lowers the loss of the new events (backtracking line search)."""

    def __init__(
        self, policy: Policy, fresh: Sequence[Batch], anchors: Anchors, config: LiveConfig, logits: Tensor | None
    ) -> None:
        self.policy, self.fresh, self.anchors, self.config = policy, fresh, anchors, config
        self.weights = [p.detach().clone() for p in policy.trainable_parameters()]
        self.loss, logprobs = _loss_and_logprobs(policy, fresh, config)
        if logits is None:
            logits = anchors.logits(policy, config.tokens_per_microbatch)
        self.begin = _Point(0.0, 0.0, logits, logprobs)

    def shorten(self, tries: int) -> _Point:
        """Keep the largest share of the step that was just made, or none of it after so many within the budget."""
        whole = [p.detach() - w for p, w in zip(self.policy.trainable_parameters(), self.weights, strict=True)]
        for halving in range(HALVINGS):
            scale = 0.5**halving
            self._move(w + scale * d for w, d in zip(self.weights, whole, strict=True))
            logits = self.anchors.logits(self.policy, self.config.tokens_per_microbatch)
            kl = divergence(logits, self.begin.logits)
            if kl <= self.config.kl_budget:
                loss, logprobs = _loss_and_logprobs(self.policy, self.fresh, self.config)
                if loss < self.loss:
                    return _Point(scale, kl, logits, logprobs)
                tries -= 1
                if not tries:
                    break
        self._move(self.weights)
        return self.begin

    @torch.no_grad()
    def _move(self, weights: Iterable[Tensor]) -> None:
        for p, w in zip(self.policy.trainable_parameters(), weights, strict=True):
            p.copy_(w)


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
    batch = policy.batch_of(trajectories)
    marked = torch.zeros(len(rated), max(len(r.marked) for r in rated))
    for i, row in enumerate(rated):
        taught = row.marked[drawn(row.completion)]
        marked[i, : len(taught)] = torch.from_numpy(taught)
    advantages = torch.tensor([[r.advantage * r.weight * weight_of(r.event, r.advantage, config)] for r in rated])
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
    batch = policy.batch_of_sequences(
        [prompt.tokens for prompt, _ in rows], [tokens for _, tokens in rows], normalisation="per_completion"
    )
    batch.is_chosen = torch.arange(len(rows)) % 2 == 0
    batch.pair_ids = torch.arange(len(rows)) // 2
    batch.weights = batch.weights * torch.tensor([[p.weight] for p in paired for _ in range(2)])
    batch.kind = "edits" if paired[0].likelihood else "pairs"
    batch.ref_logprobs = logprobs_of(policy, batch, config.tokens_per_microbatch)
    return batch


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
        acting = policy.acting(batch)
        logprobs = policy.logprobs(batch, acting=acting).logprobs
        with torch.no_grad():
            theirs = origin.acting(batch)
        pull = placed(batch, full_kl_of(acting, theirs))
        extra = {}
        if batch.kind == "completions":  # texts that the policy wrote itself
            given = origin.logprobs(batch, acting=theirs).logprobs
            extra = {"kl_anchor": pull.detach().sum(), "unlikely": (given < math.log(UNLIKELY)).sum()}
        return _loss_of_rows(logprobs, batch, config) + config.kl_coef * pull, extra

    return loss_of


@torch.no_grad()
def _loss_and_logprobs(policy: Policy, batches: Sequence[Batch], config: LiveConfig) -> tuple[float, list[float]]:
    """Of new events: the loss that a step on them would lower, the pull left out; and log π of what each is about, at
    temperature 1 (see `Outcome`), in the order of the batches."""
    total, found = 0.0, list[float]()
    for batch in batches:
        logprobs = plain = logprobs_of(policy, batch, config.tokens_per_microbatch)
        if batch.temperature is not None and bool((batch.temperature != 1.0).any()):
            bare = dataclasses.replace(batch, temperature=None)
            plain = logprobs_of(policy, bare, config.tokens_per_microbatch)
        total += float((_loss_of_rows(logprobs, batch, config) * batch.weights).sum()) / batch.denominator
        if batch.is_chosen is not None:
            found += plain.double().sum(1)[batch.is_chosen].tolist()
        else:
            assert batch.observed is not None
            found += (plain.double() * batch.observed).sum(1).tolist()
    return total, found
