"""One learner for every stage: a loss per token in, new weights and what happened out."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from operant.data.batch import microbatches, to_device
from operant.models.memory import ENOUGH_ON_CPU, SHARE, bytes_kept, free_memory, is_out_of_memory
from operant.types import Batch, OperantError, StepStats

Schedule = Literal["constant", "cosine", "linear"]

# (what is trained, micro-batch on its device) → loss per token float[B, S] and sums over the micro-batch's action
# tokens, or over what `count` counts. A loss of a whole completion or pair stands on one of its tokens.
TokenLoss = Callable[[Any, Batch], tuple[Tensor, dict[str, Tensor]]]


class Trainable(Protocol):
    """What a Learner and a Run need of a policy, an encoder or a reward model."""

    recomputes: bool

    @property
    def device(self) -> torch.device: ...

    @property
    def model(self) -> Any: ...

    def trainable_parameters(self) -> list[nn.Parameter]: ...

    def critic_parameters(self) -> list[nn.Parameter]: ...

    def save(self, path: str | Path, *, by_name: bool = False) -> None: ...

    def moved_to(self, path: str | Path) -> None: ...

    def restore(self, path: str | Path) -> None: ...


@dataclass(slots=True)
class ClosureResult:
    """loss: of the whole step. sums: what is logged, over `counted` things. tokens: all action tokens.

    notes: numbers that the update rule reports of the step. refused: the rule kept the old weights although every
    number was finite.
    """

    loss: float
    sums: dict[str, float]
    tokens: int
    counted: int
    notes: dict[str, float] = field(default_factory=dict)
    refused: bool = False


@dataclass(slots=True)
class Room:
    """How many padded tokens fit into a model at once; None until something says so."""

    tokens: int | None = None

    def pieces(self, batches: Sequence[Batch]) -> list[Batch]:
        """The batches, cut where they are larger."""
        if self.tokens is None:
            return list(batches)
        return [piece for batch in batches for piece in microbatches(batch, self.tokens)]

    def halve(self, batches: Sequence[Batch]) -> None:
        """Let the largest of these batches be too large by half. Raises OperantError where it cannot be parted."""
        pieces = self.pieces(batches)
        largest = max(pieces, key=_padded)
        self.tokens = _padded(largest) // 2
        if len(self.pieces(batches)) == len(pieces):
            raise OperantError(
                f"out of memory with {len(largest.tokens)} rows of {largest.tokens.shape[1]} tokens, which cannot be "
                "parted; use --activation_checkpointing true, --lora_rank 8, shorter texts, or a smaller model"
            )


def _padded(batch: Batch) -> int:
    """Tokens that go through the model, padding among them."""
    return len(batch.tokens) * (batch.tokens.shape[1] + (batch.context.tokens.shape[1] if batch.context else 0))


@dataclass(frozen=True, slots=True)
class StepLoss:
    """The loss of one optimizer step, Σ weights · loss / denominator over micro-batches that share one denominator.

    Where memory runs out, `room` is halved, and the sum begins anew in smaller micro-batches.
    """

    policy: Trainable
    batches: Sequence[Batch]
    loss_of: TokenLoss
    room: Room = field(default_factory=Room)

    def __call__(self, gradient: bool = True) -> ClosureResult:
        """The loss as the weights are now; its gradient, unless `gradient` is False, becomes theirs, which had none.

        Raises OperantError when one completion alone is more than memory holds.
        """
        while True:
            try:
                return self._sum(gradient)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            # here, where the error and all the tensors that it holds are gone
            self.room.halve(self.batches)
            if gradient:
                for parameter in [*self.policy.trainable_parameters(), *self.policy.critic_parameters()]:
                    parameter.grad = None
            _let_go(self.policy.device)

    def _sum(self, gradient: bool) -> ClosureResult:
        total, tokens, counted = 0.0, 0, 0
        sums: dict[str, float] = {}
        with torch.set_grad_enabled(gradient):
            for batch in self.room.pieces(self.batches):
                micro = to_device(batch, self.policy.device)
                token_loss, stats = self.loss_of(self.policy, micro)
                loss = (token_loss * micro.weights).sum() / micro.denominator
                if gradient:
                    loss.backward()
                total += float(loss.detach())
                acted = int(micro.action_mask.sum())
                tokens += acted
                # supervised pairs beside the completions report nothing
                counted += int(stats.pop("count", acted)) if stats else 0
                for name, value in stats.items():
                    sums[name] = sums.get(name, 0.0) + float(value.detach())
        return ClosureResult(total, sums, tokens, counted)


class UpdateRule(Protocol):
    """How gradients become new weights. `step` returns (gradient norm before clipping, reason for skipping or '')."""

    def step(self, closure: StepLoss) -> tuple[ClosureResult, float, str]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def learning_rate(step: int, peak: float, warmup: int, total: int, schedule: Schedule, floor: float = 0.1) -> float:
    """Linear warm-up to `peak`, then constant, linear or cosine decay to floor · peak at `total` steps."""
    if step < warmup:
        return peak * (step + 1) / max(1, warmup)
    if schedule == "constant" or total <= warmup:
        return peak
    done = min(1.0, (step - warmup) / (total - warmup))
    shape = 0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1 - done
    return peak * (floor + (1 - floor) * shape)


class Adam:
    """AdamW (Loshchilov & Hutter 2019) with gradient-norm clipping; a non-finite step is skipped, never applied.

    Weight decay touches matrices only, as is customary. A critic's weights have their own rate and are clipped on their
    own: the size of a value's error must not decide how far the policy moves.
    Raises OperantError when there is no weight to train, or one in bf16.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        lr: float,
        *,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        max_grad_norm: float = 1.0,
        critic: Sequence[nn.Parameter] = (),
    ) -> None:
        self.parameters, self.critic = list(parameters), list(critic)
        if not self.parameters:
            raise OperantError("the policy has no trainable weights; unfreeze some or add LoRA with --lora_rank 8")
        if any(p.dtype == torch.bfloat16 for p in self.parameters):
            raise OperantError(
                "weights in bf16 are too coarse to learn by small steps; add --lora_rank 8, or use --dtype bf16"
            )
        self.max_grad_norm, self.momentum = max_grad_norm, betas[0] > 0
        groups = [
            {
                "params": [p for p in part if (p.dim() >= 2) == matrices],
                "weight_decay": weight_decay if matrices else 0.0,
            }
            for part in (self.parameters, self.critic)
            for matrices in (True, False)
        ]
        self._owners = [name for name, g in zip(("policy", "policy", "critic", "critic"), groups) if g["params"]]
        fused = all(p.device.type in ("cpu", "cuda") for p in self.parameters)
        self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, fused=fused)

    def set_lr(self, lr: float, critic_lr: float | None = None) -> None:
        for owner, group in zip(self._owners, self.optimizer.param_groups, strict=True):
            group["lr"] = lr if owner == "policy" or critic_lr is None else critic_lr

    def step(self, closure: StepLoss) -> tuple[ClosureResult, float, str]:
        self.optimizer.zero_grad(set_to_none=True)
        result = closure()
        norm = float(nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm))
        critic_norm = float(nn.utils.clip_grad_norm_(self.critic, self.max_grad_norm)) if self.critic else 0.0
        reason = ""
        if not math.isfinite(result.loss):
            reason = f"loss is {result.loss}"
        elif not math.isfinite(norm):
            reason = f"gradient norm is {norm}"
        elif not math.isfinite(critic_norm):
            reason = f"the critic's gradient norm is {critic_norm}"
        else:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return result, norm, reason

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's; with β₁ = 0 without the momentum, which is as large as the model and is overwritten next."""
        whole = self.optimizer.state_dict()
        if self.momentum:
            return whole
        kept = {i: {k: v for k, v in entry.items() if k != "exp_avg"} for i, entry in whole["state"].items()}
        return whole | {"state": kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not self.momentum:
            zero = {i: {"exp_avg": torch.zeros_like(e["exp_avg_sq"])} | e for i, e in state["state"].items()}
            state = state | {"state": zero}
        self.optimizer.load_state_dict(state)


class Sgd:
    """θ ← θ − lr · g, with |g| cut to max_grad_norm; a non-finite step is skipped, never applied. It has no memory.

    The gradient of one or a few completions mostly has a norm far above max_grad_norm. Each step then has the length
    lr · max_grad_norm, along the gradient and nowhere else. Adam's division by each weight's own second
    moment moves weights that the text hardly depends on as far as those that it depends on.
    Raises OperantError when there is no weight to train.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], lr: float, *, max_grad_norm: float = 1.0) -> None:
        self.parameters, self.lr, self.max_grad_norm = list(parameters), lr, max_grad_norm
        if not self.parameters:
            raise OperantError("the policy has no trainable weights; unfreeze some or add LoRA with --lora_rank 8")

    def set_lr(self, lr: float, critic_lr: float | None = None) -> None:
        """critic_lr is not read: this rule is given no critic."""
        self.lr = lr

    @torch.no_grad()
    def step(self, closure: StepLoss) -> tuple[ClosureResult, float, str]:
        self._forget()
        with torch.enable_grad():
            result = closure()
        norm = float(nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm))
        reason = ""
        if not math.isfinite(result.loss):
            reason = f"loss is {result.loss}"
        elif not math.isfinite(norm):
            reason = f"gradient norm is {norm}"
        else:
            for p in self.parameters:
                if p.grad is not None:
                    p.sub_(p.grad, alpha=self.lr)
        self._forget()
        return result, norm, reason

    def _forget(self) -> None:
        for p in self.parameters:
            p.grad = None

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes any: there is nothing to restore."""


@contextlib.contextmanager
def same_bits(device: torch.device) -> Iterator[None]:
    """Inside, sums over rows that share an index, and attention's gradient, add up in one order on a GPU as well.

    An operation that cannot raises RuntimeError. Elsewhere than on CUDA nothing changes.
    """
    if device.type != "cuda":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    options: Any = torch.utils.deterministic
    filling = options.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    options.fill_uninitialized_memory = False  # a check for bugs, which costs a pass over memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        options.fill_uninitialized_memory = filling


class Learner:
    """Applies an `UpdateRule` to a policy.

    `steps` counts every attempt, `skipped_in_row` the non-finite ones since the last that was taken. `room` is how much
    fits into memory: with `sized` it is measured before the first step, and it is halved where memory runs out all the
    same. `say` gets a line of what comes of that.
    """

    def __init__(
        self,
        policy: Trainable,
        *,
        lr: float,
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
        warmup_steps: int = 0,
        total_steps: int = 0,
        schedule: Schedule = "constant",
        critic_lr: float | None = None,
        rule: UpdateRule | None = None,
        sized: bool = False,
    ) -> None:
        self.policy = policy
        self.room, self._sized = Room(), sized
        self.say: Callable[[str], None] = lambda text: None
        self.critic_lr = lr if critic_lr is None else critic_lr
        self.lr, self.warmup_steps, self.total_steps, self.schedule = lr, warmup_steps, total_steps, schedule
        self.rule: UpdateRule = rule or Adam(
            policy.trainable_parameters(), lr, weight_decay=weight_decay, max_grad_norm=max_grad_norm,
            critic=policy.critic_parameters(),
        )  # fmt: skip
        self.steps = 0
        self.skipped = 0
        self.skipped_in_row = 0
        self._repeatable = True  # until the model shows otherwise
        self._ran_out = False

    def step(self, batches: Iterable[Batch], loss_of: TokenLoss) -> StepStats:
        """One optimizer step over micro-batches that share one denominator: Σ weights · loss / denominator.

        A non-finite loss or gradient leaves weights and optimizer as they were and is counted; so does a step that the
        rule refuses. The same step gives the same bits, on a GPU too; a model that has no such way there is warned of
        once (RuntimeWarning) and learns all the same.
        """
        begun = time.perf_counter()
        lr = learning_rate(self.steps, self.lr, self.warmup_steps, self.total_steps, self.schedule)
        coefficients = {}
        if isinstance(self.rule, (Adam, Sgd)):
            coefficients["lr"] = lr
            critic_lr = learning_rate(self.steps, self.critic_lr, self.warmup_steps, self.total_steps, self.schedule)
            self.rule.set_lr(lr, critic_lr)

        closure = StepLoss(self.policy, list(batches), loss_of, self.room)
        if self._sized:
            self._measure(closure)
        fitted = self.room.tokens
        result, norm, reason = self._apply(closure)
        if self.room.tokens != fitted and not self._ran_out:
            self._ran_out = True
            self.say(f"out of memory: micro-batches are smaller from here on, {self.room.tokens:,} tokens at most")
        self.steps += 1
        if reason:
            self.skipped += 1
            self.skipped_in_row += not result.refused
        else:
            self.skipped_in_row = 0
        means = {name: value / max(1, result.counted) for name, value in result.sums.items()}
        return StepStats(
            step=self.steps,
            loss=result.loss,
            grad_norm=norm,
            skipped=bool(reason),
            reason=reason,
            approx_kl=means.pop("approx_kl", 0.0),
            clipfrac=means.pop("clipfrac", 0.0),
            entropy=means.pop("entropy", 0.0),
            tokens=result.tokens,
            seconds=time.perf_counter() - begun,
            coefficients=coefficients,
            extra=means | result.notes,
        )

    def _measure(self, closure: StepLoss) -> None:
        """Find out how many tokens fit, from what the shortest row of the step keeps for its backward pass."""
        self._sized = False
        device, learned = self.policy.device, self.policy.trainable_parameters()
        free = free_memory(device)
        if free is None or not closure.batches:
            return
        probe = to_device(next(iter(microbatches(closure.batches[0], 1))), device)
        with torch.random.fork_rng():  # dropout: what the step draws must not depend on this
            kept = bytes_kept(lambda: closure.loss_of(self.policy, probe), self.policy.model.parameters())
        each = max(1.0, kept / _padded(probe))
        # a gradient and Adam's two moments of every weight that learns are still to come
        left = SHARE * (free - sum(4 * p.numel() * p.element_size() for p in learned))
        budget = min(left, ENOUGH_ON_CPU) if device.type == "cpu" else left
        # in powers of two, so that a little more or less that is free changes nothing
        self.room.tokens = 2 ** max(0, math.floor(math.log2(max(1.0, budget / each))))
        if any(_padded(batch) > self.room.tokens for batch in closure.batches):
            self.say(
                f"micro-batches of at most {self.room.tokens:,} tokens: each keeps {each / 1e6:.2f} MB, and "
                f"{free / 1e9:.1f} GB are free ({device})"
            )

    def _apply(self, closure: StepLoss) -> tuple[ClosureResult, float, str]:
        if self._repeatable:
            try:
                with same_bits(self.policy.device):
                    return self.rule.step(closure)
            except RuntimeError as error:
                if "deterministic" not in str(error):
                    raise
                # raised in a pass over the model, before any weight has moved
                what = str(error).splitlines()[0]
                warnings.warn(f"two runs on this GPU will differ in their last bits: {what}", RuntimeWarning, 3)
                self._repeatable = False
        return self.rule.step(closure)

    def state_dict(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "skipped": self.skipped,
            "skipped_in_row": self.skipped_in_row,
            "rule": self.rule.state_dict(),
        } | ({} if self.room.tokens is None else {"room": self.room.tokens})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps, self.skipped = state["steps"], state["skipped"]
        self.skipped_in_row = state["skipped_in_row"]
        self.room.tokens = state.get("room")  # a run that began without has none, and keeps its bits
        self._sized = self._sized and not self.steps
        self.rule.load_state_dict(state["rule"])


def _let_go(device: torch.device) -> None:
    """Give back what is cached of a failed pass."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@torch.no_grad()
def whole_batch(policy: Trainable, batch: Batch, compute: Callable[[Any, Batch], Tensor], max_tokens: int) -> Tensor:
    """A column of the whole batch, float32[B, …] on the CPU, computed in micro-batches without gradient.

    compute: (policy, micro-batch on its device) → float[b, s] or wider, or several columns, float[b, s, n]; what a
    narrower micro-batch leaves out is zero. Where memory runs out, the micro-batches are halved.
    Raises OperantError when one row alone is more than memory holds.
    """
    numbers = torch.arange(batch.tokens.shape[0])
    numbered, room = dataclasses.replace(batch, row_ids=numbers), Room(max_tokens)
    while True:
        try:
            pieces = _columns(policy, numbered, compute, room)
            break
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        room.halve([numbered])
        _let_go(policy.device)
    out = torch.zeros(len(numbers), max(values.shape[1] for _, values in pieces), *pieces[0][1].shape[2:])
    for rows, values in pieces:
        out[rows, : values.shape[1]] = values
    return out


def _columns(
    policy: Trainable, batch: Batch, compute: Callable[[Any, Batch], Tensor], room: Room
) -> list[tuple[Tensor, Tensor]]:
    """(row numbers int64[b], what `compute` says of them) of each micro-batch."""
    assert room.tokens is not None
    pieces: list[tuple[Tensor, Tensor]] = []
    for micro in microbatches(batch, room.tokens, by_length=True):
        assert micro.row_ids is not None
        pieces.append((micro.row_ids.cpu(), compute(policy, to_device(micro, policy.device)).float().cpu()))
    return pieces


def logprobs_of(policy: Trainable, batch: Batch, max_tokens: int) -> Tensor:
    """`Policy.logprobs` of the whole batch, float32[B, S] on the CPU."""
    return whole_batch(policy, batch, lambda p, b: p.logprobs(b).logprobs, max_tokens)
