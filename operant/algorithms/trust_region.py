"""TRPO's update (Schulman et al. 2015): the natural gradient, as far as a bound on the KL lets it go."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from operant.algorithms import objectives
from operant.algorithms.learner import ClosureResult, StepLoss
from operant.data.batch import select_rows, to_device
from operant.models.policy import Policy
from operant.types import Batch, OperantError

FEWEST = 8  # completions that the Fisher matrix is taken from, however small the share of them


def conjugate_gradient(
    product: Callable[[Tensor], Tensor], target: Tensor, steps: int, tolerance: float = 1e-10
) -> tuple[Tensor, Tensor]:
    """x with A x ≈ b for a positive definite A that is known by its products alone (Hestenes & Stiefel 1952).

    product: v ↦ A v, float[P] → float[P]. target: b, float[P]. Ends after `steps` products, or once |b − A x|² ≤
    tolerance · |b|². Returns (x, b − A x); x = 0 where b is.
    """
    solution, residual = torch.zeros_like(target), target.clone()
    direction, square = residual.clone(), float(target @ target)
    first = square
    for _ in range(steps):
        if square <= tolerance * first:
            break
        image = product(direction)
        curvature = float(direction @ image)
        if not curvature > 0:  # rounding, or NaN: what was found so far is still a descent direction
            break
        length = square / curvature
        solution += length * direction
        residual -= length * image
        before, square = square, float(residual @ residual)
        direction = residual + (square / before) * direction
    return solution, residual


class TrustRegion:
    """An `UpdateRule`: maximise the surrogate within a mean KL of δ from the weights that the step began with.

        x ≈ (F + λI)⁻¹ g by conjugate gradient,   s = √(2δ / xᵀ(F + λI)x) · x   (Schulman et al. 2015, appendix C)

    g is the gradient of the step's objective, F the Fisher matrix, the Hessian of KL(π_old‖π_θ) at θ_old, taken from a
    share of the step's completions. Then s is tried, and shortened until KL(π_old‖π_θ) ≤ δ on all of them and the loss
    has fallen, both recomputed at the new weights: to where the KL, taken as quadratic, would be δ, and at least by
    half. When no length does, the old weights are put back bit for bit and the step is refused, with the reason.

    The KL is of the whole vocabulary, at the training temperature, in float32 whatever the policy's dtype. It is the
    mean over the action tokens of the step's sampled completions; supervised pairs beside them move the gradient and
    not the region. It keeps the old distributions of these tokens, float32[tokens, V].

    delta: δ, nats per token. damping: λ, which bounds the step where F is nearly singular. cg_steps: Fisher-vector
    products a step; each costs about two forward and two backward passes over the share. backtracks: tries of the line
    search. fisher_share: of the completions that F is taken from, evenly spaced, and at least FEWEST of them.
    Raises OperantError when the policy has no trainable weights, a critic, which has no place in the region, or
    recomputed layers.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        delta: float = 0.03,
        damping: float = 0.01,
        cg_steps: int = 10,
        backtracks: int = 10,
        fisher_share: float = 0.1,
    ) -> None:
        self.policy = policy
        self.parameters: list[nn.Parameter] = policy.trainable_parameters()
        if not self.parameters:
            raise OperantError("the policy has no trainable weights; unfreeze some or add LoRA with --lora_rank 8")
        if policy.critic_parameters():
            raise OperantError("a trust region moves the policy alone, and this one has a critic; use --algorithm ppo")
        if policy.recomputes:
            raise OperantError("a trust region differentiates twice; leave --activation_checkpointing out")
        self.delta, self.damping, self.cg_steps, self.backtracks = delta, damping, cg_steps, backtracks
        self.fisher_share = fisher_share
        self.accepted = self.refused = 0

    def step(self, closure: StepLoss) -> tuple[ClosureResult, float, str]:
        with self.policy.full_precision():
            result, norm, reason = self._step(closure)
        for parameter in self.parameters:
            parameter.grad = None
        result.notes |= {"accepted": float(not reason), "delta": self.delta}
        self.accepted += not reason
        self.refused += result.refused
        return result, norm, reason

    def _step(self, closure: StepLoss) -> tuple[ClosureResult, float, str]:
        for parameter in self.parameters:
            parameter.grad = None
        result = closure()
        descent = -self._flat([p.grad for p in self.parameters])
        norm = float(descent.norm())
        if not math.isfinite(result.loss):
            return result, norm, f"loss is {result.loss}"
        if not math.isfinite(norm):
            return result, norm, f"gradient norm is {norm}"
        batches = [to_device(b, self.policy.device) for b in closure.batches if b.kind == "completions"]
        if norm == 0.0 or not batches:
            result.refused = True
            return result, norm, "refused: the surrogate has no gradient"
        direction, quadratic, result.notes["cg_residual"] = self._natural(descent, batches)
        if not (math.isfinite(quadratic) and quadratic > 0):
            return result, norm, f"the curvature along the step is {quadratic}"
        direction *= math.sqrt(2 * self.delta / quadratic)
        result.refused = not self._search(closure, batches, direction, result)
        if result.refused:
            tries = f"none of {self.backtracks} steps"
            return result, norm, f"refused: {tries} stays within a KL of {self.delta:g} and improves the surrogate"
        return result, norm, ""

    def _natural(self, descent: Tensor, batches: list[Batch]) -> tuple[Tensor, float, float]:
        """(x ≈ (F + λI)⁻¹ g, xᵀ(F + λI)x, what is left of g over g)."""
        fisher = FisherProduct(self.policy, self.parameters, some_rows(batches, self.fisher_share))

        def damped(vector: Tensor) -> Tensor:
            return fisher(vector) + self.damping * vector

        direction, residual = conjugate_gradient(damped, descent, self.cg_steps)
        return direction, float(direction @ (descent - residual)), float(residual.norm() / descent.norm())

    def _search(self, closure: StepLoss, batches: list[Batch], direction: Tensor, result: ClosureResult) -> bool:
        """Move the weights to the first of ever shorter steps that keeps both promises, or put them back: True if
        moved."""
        begun = [p.detach().clone() for p in self.parameters]
        old = [self._distribution(batch) for batch in batches]
        share = 1.0
        for tried in range(1, self.backtracks + 1):
            self._place(begun, direction, share)
            kl = self._kl(batches, old)
            # the loss costs more than the KL: only asked inside the region
            gain = result.loss - closure(gradient=False).loss if kl <= self.delta else math.nan
            if kl <= self.delta and gain > 0:
                result.notes |= {"kl": kl, "surrogate_gain": gain, "line_search": float(tried)}
                if "approx_kl" in result.sums:  # on the loss's side the ratio was still one
                    result.sums["approx_kl"] = kl * result.counted
                return True
            # far outside the KL is no longer quadratic, so one jump is not to be trusted too far
            share *= min(0.5, max(0.1, 0.9 * math.sqrt(self.delta / kl))) if kl > 0 else 0.5
        with torch.no_grad():
            for parameter, value in zip(self.parameters, begun, strict=True):
                parameter.copy_(value)
        result.notes |= {"kl": 0.0, "surrogate_gain": 0.0, "line_search": float(self.backtracks)}
        return False

    @torch.no_grad()
    def _place(self, begun: list[Tensor], direction: Tensor, share: float) -> None:
        at = 0
        for parameter, value in zip(self.parameters, begun, strict=True):
            moved = direction[at : at + parameter.numel()].view_as(parameter)
            parameter.copy_(value + share * moved)
            at += parameter.numel()

    @torch.no_grad()
    def _distribution(self, batch: Batch) -> Tensor:
        return torch.log_softmax(self.policy.acting_logits(batch), -1)

    def _kl(self, batches: list[Batch], old: list[Tensor]) -> float:
        """Mean KL(π_old‖π_θ) per action token at the weights as they are; infinite where it is no number."""
        total, count = 0.0, 0
        # a small one is rounding in float32, and MPS has nothing else
        wide = torch.float32 if self.policy.device.type == "mps" else torch.float64
        for batch, before in zip(batches, old, strict=True):
            total += float(objectives.full_kl(before.to(wide), self._distribution(batch).to(wide)).sum())
            count += len(before)
        return total / count if math.isfinite(total) else math.inf

    def _flat(self, gradients: Sequence[Tensor | None]) -> Tensor:
        return _flattened(gradients, self.parameters)

    def state_dict(self) -> dict[str, Any]:
        return {"rule": "trust_region", "accepted": self.accepted, "refused": self.refused}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The counts that `state_dict` gave. Raises OperantError for the state of another optimizer."""
        if state.get("rule") != "trust_region":
            raise OperantError(
                "this checkpoint's optimizer is not a trust region; go on with the algorithm it was trained with"
            )
        self.accepted, self.refused = int(state["accepted"]), int(state["refused"])


def some_rows(batches: Sequence[Batch], share: float) -> list[Batch]:
    """Evenly spaced completions of each micro-batch, so many that they are a share of all, or FEWEST."""
    total = sum(len(batch.tokens) for batch in batches)
    share = min(1.0, max(share, FEWEST / total))
    picked = []
    for batch in batches:
        count = len(batch.tokens)
        wanted = max(1, round(share * count))
        index = torch.arange(wanted, device=batch.tokens.device) * count // wanted
        picked.append(batch if wanted == count else select_rows(batch, index))
    return picked


class FisherProduct:
    """v ↦ F v, F = mean over the action tokens of E_{a∼π}[∇log π(a) ∇log π(a)ᵀ], without ever forming F.

    F is the Hessian of the mean KL(π_old‖π_θ) at θ = θ_old, and F v the gradient of ⟨∇KL, v⟩ (Pearlmutter 1994). This
    needs the second derivative of attention, which fused kernels do not have: the plain one is used here. A single
    micro-batch keeps its graph from product to product; several are computed anew for each, so that memory stays that
    of one.

    batches: on the policy's device. Vectors are float[P], the trainable weights laid end to end.
    """

    def __init__(self, policy: Policy, parameters: Sequence[nn.Parameter], batches: Sequence[Batch]) -> None:
        self.policy, self.parameters, self.batches = policy, list(parameters), list(batches)
        self.tokens = sum(int(b.action_mask.sum()) for b in self.batches)
        self.kept = [self._gradient(self.batches[0])] if len(self.batches) == 1 else None

    def __call__(self, vector: Tensor) -> Tensor:
        total = torch.zeros_like(vector)
        pieces: list[Tensor] | Iterator[Tensor] = self.kept or (self._gradient(batch) for batch in self.batches)
        for gradient in pieces:
            second = torch.autograd.grad(
                gradient @ vector, self.parameters, retain_graph=self.kept is not None, allow_unused=True
            )
            total += _flattened(second, self.parameters)
        return total

    def _gradient(self, batch: Batch) -> Tensor:
        """∇_θ KL of one micro-batch's share of the mean, with its graph: its value is zero, its derivative is not."""
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            logits = self.policy.acting_logits(batch)
            kl = objectives.full_kl(logits.detach(), logits).sum() / self.tokens
            first = torch.autograd.grad(kl, self.parameters, create_graph=True, allow_unused=True)
        return _flattened(first, self.parameters)


def _flattened(gradients: Sequence[Tensor | None], parameters: Sequence[nn.Parameter]) -> Tensor:
    """Gradients laid end to end, zeros where a weight has none: float[P]."""
    return torch.cat(
        [torch.zeros_like(p).reshape(-1) if g is None else g.reshape(-1) for g, p in zip(gradients, parameters)]
    )
