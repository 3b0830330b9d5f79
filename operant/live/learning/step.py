"""One step of the weights from what a handful of ratings, or one, taught (`operant.live.learning.lesson`).

Good tokens (A ≥ 0) are learned at full weight, whoever wrote them; bad ones weigh min(π/μ, 1) per token, and not at
all once the geometric mean of π/μ over the text is below 1/(1 + band) (TOPR, Le Roux et al. 2025, per token; the mask
of Liu et al. 2025, on its lower side: a text that is said more than when it was written may always be pushed down).
DPO's reference is the version that the step begins with. The step is scaled back until the mean KL on the anchor
answers is within its budget and what was just said is followed: so a rating moves its text in the right direction, or
nothing moves and the outcome says why. Each step is one along its own gradient, with no momentum and no scaling by
earlier ones; what steadies it is that some earlier ratings are rehearsed in every step, and what keeps the words that
nobody spoke of is a pull to the anchor version on the same answers: kl_coef · KL(π‖π_anchor) for each of their tokens;
and anchor_coef times the same on a few answers to questions that nobody rated, others in each step (learning without
forgetting, Li & Hoiem 2016).

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
from operant.algorithms.learner import Learner, Sgd, whole_batch
from operant.config import LiveConfig
from operant.data.batch import drawn, microbatches, scatter, to_device
from operant.live.learning.anchors import Anchors
from operant.live.learning.events import LessonRow, Paired, Rated
from operant.live.learning.gate import divergences
from operant.live.learning.lesson import Lesson, weight_of
from operant.live.learning.origin import Origin
from operant.live.storage.versions import Outcome
from operant.models.head import Distributions, of_rows
from operant.models.memory import is_out_of_memory
from operant.models.policy import Policy, placed
from operant.types import Batch, StepStats, Trajectory

__all__ = ["ARITHMETIC", "StepResult", "fingerprint", "new_learner", "rating_loss", "take_step"]

# The number of the arithmetic by which a live step is made: of the lesson, the loss, the policy's log-probs, the
# gradient step and the line search. Raise it with every change that may give another last bit. It is a part of the
# fingerprint, so that versions from before the change are then held to a tolerance and not to their bits.
ARITHMETIC = 3
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
    } | ({"stem": str(policy.stem_depth)} if policy.stem_depth else {})


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
    origin: Origin | None = None,
    pulled: Batch | None = None,
    anchor_logits: Tensor | None = None,
) -> StepResult:
    """One step of the weights, in place, and what became of each new event.

    origin: the anchor version, to which `config.kl_coef` pulls on the rated answers and `config.anchor_coef` on
    `pulled`; None leaves the pull out.
    anchor_logits: float32[K, V] of the weights as they are, on the anchor answers, where they are known already.

    When the step with rehearsed events does not follow what was said, one on the new events alone is made instead. The
    weights are as they were, bit for bit, when nothing is taught, when the step is not finite, or when no share of it
    keeps the KL budget and follows; the reason is then in each event's outcome.
    """
    outcomes, ahead = dict(lesson.outcomes), None
    if lesson.fresh:
        policy.model.eval()  # dropout would make the ratio and the replay of a record another one
        ahead = _read_ahead(policy, lesson, config)
        _look_up(policy, [*lesson.rated, *lesson.paired], config)
        if _leave_out_the_far(policy, lesson, outcomes, config):
            ahead = None
    if not lesson.fresh:
        return StepResult(outcomes, None, 0.0, 0.0)
    fresh = _batches(policy, [r for r in lesson.rated if r.fresh], [p for p in lesson.paired if p.fresh], config)
    rows = _in_the_order_of_batches(lesson.fresh)
    search = _LineSearch(policy, fresh, rows, anchors, config, anchor_logits)
    loss_of, reason = _loss_of(config, origin, ahead), ""
    also = [pulled] if pulled is not None and origin is not None else []
    for batches, tries in _attempts(policy, lesson, fresh, also, config):
        found, room = search.begin, config.tokens_per_microbatch
        stats = learner.step([micro for batch in batches for micro in microbatches(batch, room)], loss_of)
        reason = stats.reason
        if not reason:
            found = search.shorten(tries)
            reason = "" if found.scale else "no step within the KL budget moved the text the right way"
        if not reason:
            break
    for row, before, after in zip(rows, search.begin.logprobs, found.logprobs, strict=True):
        outcomes[row.event.id] = _outcome(row, reason, before, after)
    moved = (search.begin.logits, found.logits) if found.scale else None
    return StepResult(outcomes, stats, found.scale, found.kl, moved)


def _attempts(
    policy: Policy, lesson: Lesson, fresh: list[Batch], also: list[Batch], config: LiveConfig
) -> Iterator[tuple[list[Batch], int]]:
    """What steps are tried on, one after the other, and the tries that each has in the line search. also: in each."""
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


def _leave_out_the_far(policy: Policy, lesson: Lesson, outcomes: dict[str, Outcome], config: LiveConfig) -> bool:
    """Drop bad ratings whose text is below the band, so that a step does not wait for what it cannot move. Returns
    whether there were some."""
    bad = [row for row in lesson.rated if row.advantage < 0]
    if not bad:
        return False
    batch = _rating_batch(policy, bad, config)
    assert batch.old_logprobs is not None
    near = rating_loss(batch.old_logprobs, batch, config.correction_band)[1][:, 0].tolist()
    far = [row for row, inside in zip(bad, near, strict=True) if not inside]
    for row in far:
        lesson.rated.remove(row)
        if row.fresh:
            outcomes[row.event.id] = Outcome("unused", _FAR, advantage=row.advantage)
        else:
            lesson.rehearsed.remove(row.event.id)
    gone = {row.event.id for row in far}
    lesson.state.memory = [entry for entry in lesson.state.memory if entry["event"]["id"] not in gone]
    return bool(far)


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
    which is that it lowers the loss of the new events (backtracking line search).

    fresh: the new events as batches. rows: the same, one by one, in the order of the batches.
    """

    def __init__(
        self,
        policy: Policy,
        fresh: Sequence[Batch],
        rows: Sequence[LessonRow],
        anchors: Anchors,
        config: LiveConfig,
        logits: Tensor | None,
    ) -> None:
        self.policy, self.fresh, self.anchors, self.config = policy, fresh, anchors, config
        self.weights = [p.detach().clone() for p in policy.trainable_parameters()]
        self.loss = sum(_total(_known_logprobs(batch), batch, config) for batch in fresh)
        if logits is None:
            logits = anchors.logits(policy, config.tokens_per_microbatch)
        self.begin = _Point(0.0, 0.0, logits, [_as_it_was(row) for row in rows])

    def shorten(self, tries: int) -> _Point:
        """Keep the largest share of the step that was just made, or none of it after so many within the budget."""
        whole = [p.detach() - w for p, w in zip(self.policy.trainable_parameters(), self.weights, strict=True)]
        halvings = 0
        while halvings < HALVINGS:
            scale = 0.5**halvings
            self._move(w + scale * d for w, d in zip(self.weights, whole, strict=True))
            kl, logits = self._divergence()
            if logits is None:
                # KL grows with the square of a small step, or faster: what is in between is over the budget too
                excess = kl / self.config.kl_budget
                halvings += max(1, int(math.log2(excess) / 2)) if math.isfinite(excess) else 1
                continue
            loss, logprobs = _loss_and_logprobs(self.policy, self.fresh, self.config)
            if loss < self.loss:
                return _Point(scale, kl, logits, logprobs)
            halvings, tries = halvings + 1, tries - 1
            if not tries:
                break
        self._move(self.weights)
        return self.begin

    def _divergence(self) -> tuple[float, Tensor | None]:
        """The mean KL on the anchor answers from where the step began, and their logits now. Where it is over the
        budget a lower bound is enough, without the logits: no answer makes good what the others have moved."""
        pieces: list[Tensor] = []
        kls = self.begin.logits.new_empty(0, dtype=torch.float64)
        for piece in self.anchors.pieces(self.policy, self.config.tokens_per_microbatch):
            pieces.append(piece)
            before = self.begin.logits[len(kls) : len(kls) + len(piece)]
            kls = torch.cat([kls, divergences(piece, before)])
            bound = float(kls.sum()) / len(self.begin.logits)
            if not bound <= self.config.kl_budget * (1 + 1e-9):  # room for the rounding of the sum
                return bound, None
        kl = float(kls.mean())
        return kl, torch.cat(pieces) if kl <= self.config.kl_budget else None

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
    _look_up(policy, rated, config)
    assert batch.behavior_logprobs is not None
    batch.old_logprobs = batch.behavior_logprobs.clone()  # where nothing hangs on it
    for row, acts, old in zip(rated, batch.action_mask, batch.old_logprobs, strict=True):
        if row.logprobs is not None:
            old[acts] = row.logprobs
    return batch


@dataclass(slots=True)
class _Ahead:
    """A pass over the rated texts that was made before the step, with what its gradient needs. It is taken once."""

    tokens: Tensor
    acting: Distributions | None

    def take(self, batch: Batch) -> Distributions | None:
        """The distributions at the rows' temperatures, if the batch is of these texts."""
        if batch.kind != "completions" or not torch.equal(batch.tokens.cpu(), self.tokens):
            return None
        acting, self.acting = self.acting, None
        return acting


def _read_ahead(policy: Policy, lesson: Lesson, config: LiveConfig) -> _Ahead | None:
    """Look up the ratings in the pass that the step itself is made from, where that is one pass: no pairs beside them,
    and no more tokens than go through the model at once."""
    rated = lesson.rated
    if lesson.paired or not rated:
        return None
    batch = _texts_of_ratings(policy, rated)
    if sum(1 for _ in microbatches(batch, config.tokens_per_microbatch)) > 1:
        return None
    micro = to_device(batch, policy.device)
    bare = dataclasses.replace(micro, temperature=None)
    try:
        with torch.enable_grad():
            plain = policy.acting(bare)
            acting = plain.at_temperature(policy.temperatures(micro))
        with torch.no_grad():
            found = [policy.logprobs(bare, acting=one).logprobs.cpu() for one in (acting, plain)]
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None  # smaller pieces, one after the other, may fit
    for row, acts, own, other in zip(rated, batch.action_mask, *found, strict=True):
        row.logprobs, row.plain = own[acts], other[acts]
    return _Ahead(batch.tokens, acting)


def _texts_of_ratings(policy: Policy, rated: Sequence[Rated]) -> Batch:
    return policy.batch_of([Trajectory(r.prompt, r.completion, np.zeros(len(r.marked)), r.marked) for r in rated])


def _look_up(policy: Policy, rows: Sequence[LessonRow], config: LiveConfig) -> None:
    """Fill in what the policy says of these texts as the step begins."""
    unknown = [row for row in rows if row.logprobs is None]
    rated = [row for row in unknown if isinstance(row, Rated) and (row.fresh or row.advantage < 0)]
    if rated:
        batch = _texts_of_ratings(policy, rated)
        drawn_at, plain = _read(policy, batch, config)
        for row, acts, own, other in zip(rated, batch.action_mask, drawn_at, plain, strict=True):
            row.logprobs, row.plain = own[acts], other[acts]
    paired = [row for row in unknown if isinstance(row, Paired)]
    if paired:
        batch = _texts_of(policy, paired)
        said = [own[acts] for own, acts in zip(_read(policy, batch, config)[1], batch.action_mask, strict=True)]
        for pair, chosen, rejected in zip(paired, said[::2], said[1::2], strict=True):
            pair.logprobs = chosen, rejected


def _texts_of(policy: Policy, paired: Sequence[Paired]) -> Batch:
    """The texts of pairs as neighbouring rows, the chosen one first."""
    rows = [(p.pair.prompt, tokens) for p in paired for tokens in (p.pair.chosen, p.pair.rejected)]
    return policy.batch_of_sequences(
        [prompt.tokens for prompt, _ in rows], [tokens for _, tokens in rows], normalisation="per_completion"
    )


def _pair_batch(policy: Policy, paired: Sequence[Paired], config: LiveConfig) -> Batch:
    """Pairs as neighbouring rows, with this step's beginning as the reference."""
    batch = _texts_of(policy, paired)
    numbers = torch.arange(2 * len(paired))
    batch.is_chosen, batch.pair_ids = numbers % 2 == 0, numbers // 2
    batch.weights = batch.weights * torch.tensor([[p.weight] for p in paired for _ in range(2)])
    batch.kind = "edits" if paired[0].likelihood else "pairs"
    _look_up(policy, paired, config)
    batch.ref_logprobs = torch.zeros(batch.tokens.shape)
    known = [logprobs for row in paired for logprobs in row.logprobs or ()]
    for acts, own, logprobs in zip(batch.action_mask, batch.ref_logprobs, known, strict=True):
        own[acts] = logprobs
    return batch


def _loss_of_rows(logprobs: Tensor, batch: Batch, config: LiveConfig) -> Tensor:
    """The loss of ratings or of pairs, float[B, S]."""
    if batch.kind == "completions":
        return rating_loss(logprobs, batch, config.correction_band)[0]
    likelihood = config.sft_coef if batch.kind == "edits" else 0.0
    return objectives.preference_loss(logprobs, batch, "dpo", beta=config.beta, sft_coef=likelihood)[0]


def _loss_of(
    config: LiveConfig, origin: Origin | None, ahead: _Ahead | None
) -> Callable[[Policy, Batch], tuple[Tensor, dict[str, Tensor]]]:
    """The `learner.TokenLoss` of ratings and pairs, with the pull to the anchor version; and of that pull alone."""

    def loss_of(policy: Policy, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        if batch.kind == "supervised":
            assert origin is not None
            return config.anchor_coef * _pull_of(policy.acting(batch), origin.acting(batch), batch)[0], {}
        acting = (ahead.take(batch) if ahead is not None else None) or policy.acting(batch)
        if origin is None or not config.kl_coef:
            return _loss_of_rows(policy.logprobs(batch, acting=acting).logprobs, batch, config), {}
        logprobs = policy.logprobs(batch, acting=acting).logprobs
        pull, given = _pull_of(acting, origin.acting(batch), batch)
        extra = {}
        if batch.kind == "completions":  # texts that the policy wrote itself
            extra = {"kl_anchor": pull.detach().sum(), "unlikely": (given < math.log(UNLIKELY)).sum()}
        return _loss_of_rows(logprobs, batch, config) + config.kl_coef * pull, extra

    return loss_of


def _pull_of(acting: Distributions, theirs: Distributions, batch: Batch) -> tuple[Tensor, Tensor]:
    """KL(π‖π_anchor) of each token, and log π_anchor of it, which has no gradient: float32[B, S] each."""
    acted = batch.tokens[batch.action_mask]

    def both(logits: Tensor, given: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        chosen = given.gather(-1, acted[part, None])[:, 0] - given.logsumexp(-1)
        return objectives.full_kl(logits, given), chosen

    pull, given = of_rows(both, acting, theirs)
    return placed(batch, pull), placed(batch, given)


def _known_logprobs(batch: Batch) -> Tensor:
    """log π of a batch's tokens as the step began, float32[B, S]."""
    known = batch.old_logprobs if batch.kind == "completions" else batch.ref_logprobs
    assert known is not None
    return known


def _as_it_was(row: LessonRow) -> float:
    """log π of what an event is about as the step began, at temperature 1."""
    if isinstance(row, Paired):
        assert row.logprobs is not None
        return float(row.logprobs[0].double().sum())
    assert row.plain is not None
    meant = torch.from_numpy(row.marked[drawn(row.completion)])
    return float((row.plain.double() * meant).sum())


def _read(policy: Policy, batch: Batch, config: LiveConfig) -> tuple[Tensor, Tensor]:
    """log π of a batch's tokens at the temperatures that they were drawn at, and at 1: float32[B, S] each, of one pass
    of the model."""

    def both(policy: Policy, micro: Batch) -> Tensor:
        bare, temperatures = dataclasses.replace(micro, temperature=None), policy.temperatures(micro)
        acting = policy.acting(bare)
        plain = own = policy.logprobs(bare, acting=acting).logprobs
        if temperatures is not None:
            own = policy.logprobs(bare, acting=acting.at_temperature(temperatures)).logprobs
        return torch.stack([own, plain], -1)

    found = whole_batch(policy, batch, both, config.tokens_per_microbatch)
    return found[..., 0], found[..., 1]


def _total(logprobs: Tensor, batch: Batch, config: LiveConfig) -> float:
    """The loss that a step on the batch would lower, the pull left out."""
    return float((_loss_of_rows(logprobs, batch, config) * batch.weights).sum()) / batch.denominator


@torch.no_grad()
def _loss_and_logprobs(policy: Policy, batches: Sequence[Batch], config: LiveConfig) -> tuple[float, list[float]]:
    """Of new events: their `_total`, and log π of what each is about, at temperature 1 (see `Outcome`), in the order of
    the batches."""
    total, found = 0.0, list[float]()
    for batch in batches:
        logprobs, plain = _read(policy, batch, config)
        total += _total(logprobs, batch, config)
        if batch.is_chosen is not None:
            found += plain.double().sum(1)[batch.is_chosen].tolist()
        else:
            assert batch.observed is not None
            found += (plain.double() * batch.observed).sum(1).tolist()
    return total, found
