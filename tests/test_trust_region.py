"""TRPO: the Fisher-vector product against the matrix itself, and what every step promises: δ kept, or nothing moved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from runs import PROMPTS, assert_same_run, logged, quick, settings, share_of_even
from torch import Tensor

from operant.algorithms import objectives
from operant.algorithms.learner import Learner, logprobs_of
from operant.algorithms.surrogate import Surrogate
from operant.algorithms.table import resolve
from operant.algorithms.trust_region import FEWEST, FisherProduct, TrustRegion, conjugate_gradient, some_rows
from operant.config import TrainConfig
from operant.data.batch import from_sequences, microbatches
from operant.models.policy import Policy
from operant.rl.loop import train
from operant.types import Batch, OperantError, StepStats

TRPO = TrainConfig(algorithm="trpo")


def batch_of(policy: Policy, seed: int = 0, rows: int = 4, temperature: float = 1.0) -> Batch:
    generator = np.random.default_rng(seed)
    prompts = [np.arange(40, 43)] * (rows // 2) + [np.arange(50, 55)] * (rows - rows // 2)
    answers = [generator.integers(40, 80, size=2 + i % 3) for i in range(rows)]
    batch = from_sequences(
        prompts, answers, encoder=policy.family == "encoder-decoder", pad_id=policy.codec.pad_id,
        normalisation="per_completion",
    )  # fmt: skip
    batch.kind = "completions"
    batch.temperature = torch.full((rows,), temperature)
    batch.advantages = torch.from_numpy(generator.normal(size=(rows, 1))).float() * batch.action_mask
    batch.old_logprobs = logprobs_of(policy, batch, 10_000)
    return batch


def surrogate(policy: Policy, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    return Surrogate(TRPO, resolve(TRPO, dense=False), {})(policy, batch)


def weights(policy: Policy) -> list[Tensor]:
    return [p.detach().clone() for p in policy.model.parameters()]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@torch.no_grad()
def distributions(policy: Policy, batch: Batch) -> Tensor:
    """By the path that computes every column, not the one that the rule uses."""
    assert batch.temperature is not None
    logits = policy.logits(batch)[batch.action_mask].double()
    rows = batch.action_mask.nonzero()[:, 0]
    return torch.log_softmax(logits / batch.temperature[rows, None].double(), -1)


def only(policy: Policy, name: str) -> Policy:
    """Few enough weights that learn for their Fisher matrix to be written down."""
    for full, parameter in policy.model.named_parameters():
        parameter.requires_grad_(full.endswith(name))
    return policy


# --- the pieces ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 12])
def test_conjugate_gradient_solves_what_a_solver_solves(size: int) -> None:
    torch.manual_seed(size)
    root = torch.randn(size, size, dtype=torch.float64)
    matrix, target = root @ root.T + 0.1 * torch.eye(size), torch.randn(size, dtype=torch.float64)
    calls = []

    def product(vector: Tensor) -> Tensor:
        calls.append(1)
        return matrix @ vector

    solution, residual = conjugate_gradient(product, target, 4 * size, 1e-24)
    torch.testing.assert_close(solution, torch.linalg.solve(matrix, target), rtol=1e-6, atol=1e-8)
    assert float(residual.norm()) < 1e-9
    solution, residual = conjugate_gradient(product, target, 2)
    torch.testing.assert_close(residual, target - matrix @ solution)
    assert not any(part.any() for part in conjugate_gradient(product, torch.zeros_like(target), 5))
    begun = len(calls)
    conjugate_gradient(product, target, 2)
    assert len(calls) - begun <= 2


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("gpt2", "h.0.attn.c_attn.bias"), ("llama", "layers.0.self_attn.k_proj.weight"),
        ("t5", "decoder.block.0.layer.1.EncDecAttention.q.weight"), ("bart", "encoder.layers.0.fc1.bias"),
    ],
)  # fmt: skip
def test_the_product_is_that_of_the_fisher_matrix(family: str, name: str, make_policy: Callable[..., Policy]) -> None:
    """F from its definition, E_a[∇log π(a) ∇log π(a)ᵀ], one gradient for each token and each word of the vocabulary."""
    policy = make_policy(family)
    policy.model.double()
    policy = only(policy, name)
    batch = batch_of(policy, rows=2, temperature=0.8)
    parameters = policy.trainable_parameters()
    assert 0 < sum(p.numel() for p in parameters) <= 300
    logprobs = torch.log_softmax(policy.acting_logits(batch), -1)
    flat = logprobs.reshape(-1)
    every = torch.eye(len(flat), dtype=flat.dtype)
    gradients = torch.autograd.grad(flat, parameters, every, retain_graph=True, is_grads_batched=True)
    scores = torch.cat([g.reshape(len(flat), -1) for g in gradients], 1)
    fisher = (scores * flat.detach().exp()[:, None]).T @ scores / len(logprobs)
    assert float(fisher.diagonal().min()) >= 0 and float(fisher.abs().max()) > 1e-5
    # Transformers normalises in float32 in two of the families, whatever the weights are in
    near = {"rtol": 1e-4, "atol": 1e-5} if family in ("llama", "t5") else {"rtol": 1e-7, "atol": 1e-12}
    pieces = list(microbatches(batch, 8))
    assert len(pieces) == 2
    for parts in ([batch], pieces):
        product = FisherProduct(policy, parameters, parts)
        torch.manual_seed(1)
        for _ in range(3):
            vector = torch.randn(len(fisher), dtype=torch.float64)
            torch.testing.assert_close(product(vector), fisher @ vector, **near)


def test_a_share_of_the_completions_is_spread_over_all_pieces(make_policy: Callable[..., Policy]) -> None:
    policy = make_policy("gpt2")
    batch = batch_of(policy, rows=40)
    parts = list(microbatches(batch, 60))
    assert len(parts) > 3
    picked = some_rows(parts, 0.25)
    assert sum(len(b.tokens) for b in picked) == pytest.approx(10, abs=len(parts))
    assert all(0 < len(few.tokens) < len(part.tokens) for few, part in zip(picked, parts, strict=True))
    rows = {tuple(row[row != 0].tolist()) for part in parts for row in part.tokens}
    assert all(tuple(row[row != 0].tolist()) in rows for few in picked for row in few.tokens)
    assert some_rows([batch], 1.0)[0] is batch and len(some_rows([batch], 0.01)[0].tokens) == FEWEST
    # both sides of the batch are in: they have prompts of their own
    assert {int(row[0]) for row in some_rows([batch], 0.2)[0].tokens} == {40, 50}


def test_where_the_step_begins_the_surrogates_gradient_is_reinforces() -> None:
    logprobs = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    advantages = torch.randn(3, 4, dtype=torch.float64)
    ours = torch.autograd.grad(objectives.importance(logprobs, logprobs.detach(), advantages).sum(), logprobs)[0]
    plain = torch.autograd.grad(objectives.reinforce(logprobs, advantages).sum(), logprobs)[0]
    torch.testing.assert_close(ours, plain)
    moved = objectives.importance(logprobs + 0.5, logprobs, advantages)
    torch.testing.assert_close(moved, -advantages * float(np.exp(0.5)))


# --- what a step promises --------------------------------------------------------------------------------------------


def take(
    policy: Policy, batch: Batch, loss: Any = surrogate, pieces: int = 10_000, **options: Any
) -> tuple[StepStats, float, float]:
    """One step; (what it tells, the KL and the surrogate's gain, both measured here)."""
    learner = Learner(policy, lr=0.0, rule=TrustRegion(policy, **options))
    before = distributions(policy, batch)

    def value() -> float:
        with torch.no_grad():
            token_loss, _ = loss(policy, batch)
        return float((token_loss * batch.weights).sum() / batch.denominator)

    first = value()
    stats = learner.step(list(microbatches(batch, pieces)), loss)
    kl = float(objectives.full_kl(before, distributions(policy, batch)).mean())
    return stats, kl, first - value()


@examples(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(
    family=st.sampled_from(["gpt2", "llama", "t5", "bart"]),
    delta=st.floats(1e-5, 1.0),
    damping=st.sampled_from([0.0, 1e-3, 0.1, 10.0]),
    cg_steps=st.integers(1, 4),
    backtracks=st.sampled_from([1, 2, 8]),
    seed=st.integers(0, 1000),
    temperature=st.sampled_from([1.0, 0.7]),
    rows=st.sampled_from([4, 24]),
)
def test_no_step_leaves_the_region_and_every_refusal_is_told(
    family: str, delta: float, damping: float, cg_steps: int, backtracks: int, seed: int, temperature: float, rows: int,
    make_policy: Callable[..., Policy],
) -> None:  # fmt: skip
    policy = make_policy(family)
    batch = batch_of(policy, seed, rows=rows, temperature=temperature)
    begun = weights(policy)
    stats, kl, gain = take(
        policy, batch, delta=delta, damping=damping, cg_steps=cg_steps, backtracks=backtracks, pieces=4 * rows,
        fisher_share=0.5,
    )  # fmt: skip
    assert stats.extra["accepted"] == (not stats.skipped)
    assert 1 <= stats.extra["line_search"] <= backtracks
    if stats.skipped:
        assert same(begun, weights(policy)) and kl == 0
        assert stats.reason.startswith("refused: ") and f"{delta:g}" in stats.reason
    else:
        assert kl <= delta * (1 + 1e-3) + 1e-7 and gain > -1e-6
        assert not same(begun, weights(policy)) and stats.reason == ""
        assert stats.extra["kl"] == stats.approx_kl == pytest.approx(kl, rel=1e-2, abs=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "t5"])
@pytest.mark.parametrize("lora", [False, True])
def test_a_step_goes_to_the_edge_of_the_region_and_improves(
    family: str, lora: bool, make_policy: Callable[..., Policy]
) -> None:
    policy = make_policy(family)
    if lora:
        policy.add_lora(rank=2, seed=1)
    stats, kl, gain = take(policy, batch_of(policy), delta=1e-3, damping=1e-3)
    assert not stats.skipped and 1e-4 < kl <= 1e-3 and gain > 1e-4
    assert stats.extra["surrogate_gain"] == pytest.approx(gain, rel=0.05)
    assert "lr" not in stats.coefficients and stats.extra["delta"] == 1e-3


def test_a_surrogate_that_falls_where_its_gradient_says_rise_is_refused(make_policy: Callable[..., Policy]) -> None:
    def lying(policy: Policy, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        loss, stats = surrogate(policy, batch)
        return 2 * loss.detach() - loss, stats  # its value, and the opposite gradient

    policy = make_policy("gpt2")
    batch = batch_of(policy)
    begun = weights(policy)
    stats, kl, _ = take(policy, batch, lying, delta=0.01)
    assert stats.skipped and stats.reason == (
        "refused: none of 10 steps stays within a KL of 0.01 and improves the surrogate"
    )
    assert same(begun, weights(policy)) and kl == 0 and stats.extra["accepted"] == 0
    assert all(p.grad is None for p in policy.model.parameters())


def test_refusals_are_counted_but_never_broken_and_a_number_that_is_none_is(make_policy: Callable[..., Policy]) -> None:
    policy = make_policy("gpt2")
    batch = batch_of(policy)
    learner = Learner(policy, lr=0.0, rule=TrustRegion(policy))
    still = batch_of(policy)
    assert still.advantages is not None
    still.advantages.zero_()
    stats = learner.step([still], surrogate)
    assert stats.skipped and "no gradient" in stats.reason
    assert (learner.skipped, learner.skipped_in_row) == (1, 0)
    begun = weights(policy)

    def broken(policy: Policy, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return surrogate(policy, batch)[0] * float("nan"), {}

    stats = learner.step([batch], broken)
    assert stats.skipped and "nan" in stats.reason and "refused" not in stats.reason
    assert (learner.skipped, learner.skipped_in_row) == (2, 1) and same(begun, weights(policy))


def test_supervised_pairs_move_the_gradient_and_not_the_region(make_policy: Callable[..., Policy]) -> None:
    policy = make_policy("gpt2")
    batch, pairs = batch_of(policy), batch_of(policy, seed=9)
    pairs.kind, pairs.advantages, pairs.old_logprobs = "supervised", None, None
    config = TrainConfig(algorithm="trpo", sft_coef=1.0)
    loss = Surrogate(config, resolve(config, dense=False), {})
    with torch.no_grad():
        first = float((loss(policy, pairs)[0] * pairs.weights).sum())
    before = distributions(policy, batch)
    stats = Learner(policy, lr=0.0, rule=TrustRegion(policy, delta=1e-3)).step([batch, pairs], loss)
    assert not stats.skipped
    kl = float(objectives.full_kl(before, distributions(policy, batch)).mean())
    assert stats.extra["kl"] == pytest.approx(kl, rel=1e-2) and kl <= 1e-3
    with torch.no_grad():
        assert float((loss(policy, pairs)[0] * pairs.weights).sum()) < first


def test_half_precision_is_left_for_the_step_and_taken_up_again(make_policy: Callable[..., Policy]) -> None:
    policy, plain = make_policy("gpt2", dtype="bf16"), make_policy("gpt2")
    batch = batch_of(plain)
    assert take(policy, batch, delta=1e-3)[0].extra["kl"] == take(plain, batch, delta=1e-3)[0].extra["kl"]
    assert policy.dtype == "bf16"
    half, full = policy.logprobs(batch).logprobs, plain.logprobs(batch).logprobs
    assert not torch.equal(half, full) and torch.allclose(half, full, atol=0.2)


def test_what_cannot_be_a_region_is_refused(make_policy: Callable[..., Policy]) -> None:
    policy = make_policy("gpt2")
    rule = TrustRegion(policy)
    with pytest.raises(OperantError, match="not a trust region"):
        rule.load_state_dict(Learner(policy, lr=1e-3).rule.state_dict())
    policy.add_critic()
    with pytest.raises(OperantError, match="critic"):
        TrustRegion(policy)
    frozen = make_policy("gpt2")
    frozen.model.requires_grad_(False)
    with pytest.raises(OperantError, match="no trainable weights"):
        TrustRegion(frozen)


# --- the loop --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "bart"])
def test_trpo_learns_a_reward_and_every_step_is_told(
    family: str, make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    policy = make_policy(family)
    with torch.no_grad():  # flat enough to explore
        policy.model.get_input_embeddings().weight.mul_(0.2)
    config = settings(
        tmp_path / "run", algorithm="trpo", delta=0.05, damping=0.01, steps=12, prompts_per_step=6, group_size=6
    )
    train(policy, PROMPTS, quick(share_of_even), config, quiet=True)
    rewards = logged(tmp_path / "run", "train/reward_mean")
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.15
    kl, accepted = (logged(tmp_path / "run", f"train/{name}") for name in ("kl", "accepted"))
    assert len(kl) == len(accepted) == 12 and 0 < max(kl) <= 0.05 * (1 + 1e-6)
    assert sum(accepted) >= 9 and len(logged(tmp_path / "run", "train/line_search")) == 12
    assert max(logged(tmp_path / "run", "train/sampler_gap")) < 1e-5


def test_a_resumed_run_is_the_run_that_never_stopped(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    def run(name: str, steps: int, resume: bool = False) -> None:
        config = settings(tmp_path / name, algorithm="trpo", steps=steps, resume=resume, kl_coef=0.05)
        train(make_policy("gpt2"), PROMPTS, quick(share_of_even), config, quiet=True)

    run("whole", 6)
    run("parts", 3)
    run("parts", 6, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_steps_that_are_all_refused_do_not_end_the_run(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    config = settings(tmp_path / "run", algorithm="trpo", steps=5, delta=1e-30)
    result = train(make_policy("gpt2"), PROMPTS, quick(share_of_even), config, quiet=True)
    assert result.steps == 5 and logged(tmp_path / "run", "train/accepted") == [0.0] * 5
    assert logged(tmp_path / "run", "train/skipped")[-1] == 5
