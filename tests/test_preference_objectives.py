"""DPO, IPO and KTO against their papers' formulas, written independently, and their gradients in float64."""

from __future__ import annotations

import pytest
import torch
from torch import tensor

from operant.algorithms import objectives


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


def test_ktos_reference_point_is_not_negative_and_gets_no_gradient() -> None:
    logprobs = tensor([1.0, 2.0, -1.0], requires_grad=True)
    point = objectives.kto_reference_point(logprobs, tensor([0.0, 0.0, 0.5]))
    assert float(point) == pytest.approx(0.5) and not point.requires_grad
    assert float(objectives.kto_reference_point(logprobs, tensor([5.0, 5.0, 5.0]))) == 0.0


def test_the_reference_gets_no_gradient() -> None:
    four = [tensor([1.0], requires_grad=True) for _ in range(4)]
    (objectives.dpo(*four) + objectives.ipo(*four)).sum().backward()
    assert four[0].grad is not None and four[2].grad is four[3].grad is None
