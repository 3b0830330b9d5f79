"""DPO, IPO and KTO against their papers' formulas, written independently, and their gradients in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import tensor

from operant.algorithms import objectives
from operant.data.batch import from_sequences


def columns(count: int, rows: int = 5, seed: int = 1) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(rows, dtype=torch.float64, generator=draw) * 3 - 8).requires_grad_(i < count - 2)
        for i in range(count)
    ]


def gradients(loss: torch.Tensor, *inputs: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss.sum(), inputs, retain_graph=True))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_dpo_is_its_papers_formula_and_so_is_its_gradient(smoothing: float) -> None:
    chosen, rejected, ref_chosen, ref_rejected = columns(4)
    beta = 0.3
    ours = objectives.dpo(chosen, rejected, ref_chosen, ref_rejected, beta, smoothing)
    # the paper's own form: probabilities and their ratios, a logistic function, no gap of logs
    odds = (chosen.exp() / ref_chosen.exp()) ** beta / (rejected.exp() / ref_rejected.exp()) ** beta
    right = odds / (1 + odds)
    theirs = -(1 - smoothing) * right.log() - smoothing * (1 - right).log()
    assert torch.allclose(ours, theirs, rtol=1e-9)
    for mine, other in zip(gradients(ours, chosen, rejected), gradients(theirs, chosen, rejected), strict=True):
        assert torch.allclose(mine, other, rtol=1e-8) and bool((mine != 0).all())
    # section 4: −β σ(r̂(y_l) − r̂(y_w)) (∇ log π(y_w) − ∇ log π(y_l)), for labels that are all right
    if not smoothing:
        gap = beta * ((rejected - ref_rejected) - (chosen - ref_chosen))
        assert torch.allclose(gradients(ours, chosen)[0], -beta / (1 + (-gap).exp()))


def test_ipo_is_its_papers_formula_and_so_is_its_gradient() -> None:
    chosen, rejected, ref_chosen, ref_rejected = columns(4)
    tau = 0.2
    ours = objectives.ipo(chosen, rejected, ref_chosen, ref_rejected, tau)
    h = torch.log(chosen.exp() * ref_rejected.exp() / (rejected.exp() * ref_chosen.exp()))
    theirs = (h - (1 / tau) / 2) ** 2
    assert torch.allclose(ours, theirs, rtol=1e-9)
    assert torch.allclose(gradients(ours, chosen)[0], 2 * (h - 2.5), rtol=1e-8)
    # at the target gap nothing is pushed any more, beyond it the push turns round
    at = objectives.ipo(tensor([2.5]), tensor([0.0]), tensor([0.0]), tensor([0.0]), tau)
    assert at.tolist() == [0.0]


def test_kto_is_its_papers_formula_and_so_is_its_gradient() -> None:
    logprobs, _, ref = columns(3, rows=6)
    desirable = tensor([True, False, True, True, False, False])
    beta, good, bad, point = 0.4, 1.5, 0.5, 0.7
    ours = objectives.kto(logprobs, ref, desirable, point, beta, good, bad)
    theirs = []
    for i, wanted in enumerate(desirable.tolist()):
        reward = torch.log(logprobs[i].exp() / ref[i].exp())
        if wanted:
            theirs.append(good - good / (1 + torch.exp(-beta * (reward - point))))
        else:
            theirs.append(bad - bad / (1 + torch.exp(-beta * (point - reward))))
    assert torch.allclose(ours, torch.stack(theirs), rtol=1e-9)
    mine, other = gradients(ours, logprobs)[0], gradients(torch.stack(theirs), logprobs)[0]
    assert torch.allclose(mine, other, rtol=1e-8)
    assert bool((mine[desirable] < 0).all()) and bool((mine[~desirable] > 0).all())


def test_kto_weighs_good_and_bad_ones_alike_unless_it_is_told_otherwise() -> None:
    even = objectives.kto(tensor([1.0, 1.0]), tensor([1.0, 1.0]), tensor([True, False]), 0.0)
    assert even.tolist() == [0.5, 0.5]


def test_ktos_reference_point_is_not_negative_and_gets_no_gradient() -> None:
    logprobs = tensor([1.0, 2.0, -1.0], requires_grad=True)
    point = objectives.kto_reference_point(logprobs, tensor([0.0, 0.0, 0.5]))
    assert float(point) == pytest.approx(0.5) and not point.requires_grad
    assert float(objectives.kto_reference_point(logprobs, tensor([5.0, 5.0, 5.0]))) == 0.0


def test_the_reference_gets_no_gradient() -> None:
    four = [tensor([1.0], requires_grad=True) for _ in range(4)]
    (objectives.dpo(*four) + objectives.ipo(*four)).sum().backward()
    assert four[0].grad is not None and four[2].grad is four[3].grad is None


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("algorithm", ["dpo", "ipo", "kto"])
def test_the_loss_of_a_pair_or_completion_stands_on_one_token_by_hand(algorithm: Any, mean: bool) -> None:
    """Two pairs whose rows are not in the order of their pairs, of a prompt with one token; 0 outside the mask."""
    completions = [np.array(c) for c in ([5, 6, 7], [5, 6], [5], [5, 6, 7])]
    batch = from_sequences([np.array([1])] * 4, completions, encoder=False, pad_id=0)
    batch.is_chosen, batch.pair_ids = tensor([True, True, False, False]), tensor([1, 0, 0, 1])
    batch.ref_logprobs = -0.5 * batch.action_mask.double()
    logprobs = -tensor([[1.0], [2.0], [4.0], [3.0]], dtype=torch.float64) * batch.action_mask
    token_loss, sums = objectives.preference_loss(logprobs, batch, algorithm, beta=0.5, mean=mean, reference_point=0.25)

    length = tensor([3.0, 2.0, 1.0, 3.0], dtype=torch.float64)
    scale = length if mean else torch.ones(4, dtype=torch.float64)
    ours, reference = -tensor([1.0, 2.0, 4.0, 3.0]) * length / scale, -0.5 * length / scale
    expected = torch.zeros_like(logprobs)
    gain = ours - reference
    if algorithm == "kto":
        values = objectives.kto(ours, reference, batch.is_chosen, 0.25, 0.5)
        expected[[0, 1, 2, 3], [3, 2, 1, 3]] = values
        margins = 0.5 * (gain - 0.25) * tensor([1.0, 1.0, -1.0, -1.0])
    else:
        loss = objectives.dpo if algorithm == "dpo" else objectives.ipo
        expected[0, 3] = loss(ours[0], ours[3], reference[0], reference[3], 0.5)
        expected[1, 2] = loss(ours[1], ours[2], reference[1], reference[2], 0.5)
        margins = 0.5 * (gain[:2] - gain[[3, 2]])
    assert torch.allclose(token_loss, expected)
    assert float(sums["count"]) == len(margins) and float(sums["accuracy"]) == int((margins > 0).sum())
    assert float(sums["margin"]) == pytest.approx(float(margins.sum()))
    # the likelihood of the good ones beside it, a mean over each one's tokens
    more, _ = objectives.preference_loss(
        logprobs, batch, algorithm, beta=0.5, mean=mean, reference_point=0.25, sft_coef=0.1
    )
    likelihood = -0.1 * logprobs / length[:, None] * batch.is_chosen[:, None]
    assert torch.allclose(more - token_loss, likelihood)


def test_the_reference_itself_is_right_half_of_the_time() -> None:
    batch = from_sequences([np.array([1])] * 2, [np.array([5, 6]), np.array([7])], encoder=False, pad_id=0)
    batch.is_chosen, batch.pair_ids = tensor([True, False]), tensor([0, 0])
    batch.ref_logprobs = -batch.action_mask.double()
    _, sums = objectives.preference_loss(batch.ref_logprobs, batch, "dpo", beta=0.5)
    assert {name: float(value) for name, value in sums.items()} == {"count": 1.0, "accuracy": 0.5, "margin": 0.0}
