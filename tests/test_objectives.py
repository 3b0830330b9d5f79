from __future__ import annotations

import math

import pytest
import torch
from torch import tensor

from operant import objectives

LOG2 = math.log(2.0)


def test_likelihood_and_reinforce_by_hand() -> None:
    logprobs = tensor([-1.0, -2.0], requires_grad=True)
    assert objectives.negative_log_likelihood(logprobs).tolist() == [1.0, 2.0]
    advantages = tensor([3.0, -0.5], requires_grad=True)
    loss = objectives.reinforce(logprobs, advantages)
    assert loss.tolist() == [3.0, -1.0]
    loss.sum().backward()
    assert logprobs.grad is not None and logprobs.grad.tolist() == [-3.0, 0.5]
    assert advantages.grad is None


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped", "slope"),
    [
        (1.0, 2.0, -2.0, 0, -2.0),
        (1.5, 2.0, -2.6, 1, 0.0),  # above 1 + 0.3 with a good token: no more push
        (0.5, 2.0, -1.0, 0, -1.0),  # below with a good token: pushed back up
        (0.5, -2.0, 1.6, 1, 0.0),  # below 1 − 0.2 with a bad token: no more push
        (1.5, -2.0, 3.0, 0, 3.0),
    ],
)
def test_the_clipped_surrogate_by_hand(ratio: float, advantage: float, loss: float, clipped: int, slope: float) -> None:
    logprobs = tensor([math.log(ratio) - 1.0], dtype=torch.float64, requires_grad=True)
    old = tensor([-1.0], dtype=torch.float64, requires_grad=True)
    value, outside = objectives.ppo_clip(logprobs, old, tensor([advantage], dtype=torch.float64), 0.2, 0.3)
    assert float(value.detach()) == pytest.approx(loss) and int(outside) == clipped
    value.sum().backward()
    assert logprobs.grad is not None and float(logprobs.grad) == pytest.approx(slope)
    assert old.grad is None


def test_kl_estimators_by_hand() -> None:
    logprobs, ref = tensor([-LOG2, -1.0], dtype=torch.float64), tensor([-3 * LOG2, -1.0], dtype=torch.float64)
    assert objectives.kl_k1(logprobs, ref).tolist() == pytest.approx([2 * LOG2, 0])
    assert objectives.kl_k2(logprobs, ref).tolist() == pytest.approx([2 * LOG2**2, 0])
    assert objectives.kl_k3(logprobs, ref).tolist() == pytest.approx([0.25 - 1 + 2 * LOG2, 0])


def test_the_full_kl_by_hand() -> None:
    p, q = tensor([[0.5, 0.5, 0.0]], dtype=torch.float64), tensor([[0.25, 0.5, 0.25]], dtype=torch.float64)
    value = objectives.full_kl((p + 1e-300).log(), q.log())
    assert float(value) == pytest.approx(0.5 * LOG2)
    assert float(objectives.full_kl(q.log() + 5, q.log() - 3)) == pytest.approx(0, abs=1e-12)


def test_the_correction_is_one_where_both_agree_and_is_cut_above() -> None:
    old = tensor([-1.0, -1.0, -3.0], requires_grad=True)
    weight = objectives.behavior_correction(old, tensor([-1.0, -4.0, -3.0 + LOG2]), cap=2.0)
    assert weight.tolist() == pytest.approx([1.0, 2.0, 0.5])
    assert not weight.requires_grad


def test_label_smoothing_is_the_cross_entropy_to_the_smoothed_target() -> None:
    logits = torch.randn(4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    target = tensor([0, 3, 6, 2])
    logp = torch.log_softmax(logits, -1)
    ours = objectives.label_smoothed(logp.gather(1, target[:, None])[:, 0], logp.mean(-1), 0.1)
    theirs = torch.nn.functional.cross_entropy(logits, target, label_smoothing=0.1, reduction="none")
    assert torch.allclose(ours, theirs)
