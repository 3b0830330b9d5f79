from __future__ import annotations

import math

import pytest
import torch
from torch import tensor

from operant.algorithms import objectives

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


# --- sequence ratios, clipped weights, off-policy ---------------------------------------------------------------------


def rows_of(*values: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probs float64[B, S] with gradient, mask)."""
    width = max(map(len, values))
    padded = torch.tensor([v + [-9.0] * (width - len(v)) for v in values], dtype=torch.float64, requires_grad=True)
    return padded, torch.tensor([[True] * len(v) + [False] * (width - len(v)) for v in values])


def test_gspo_by_hand_and_its_gradient_is_that_of_the_papers_form() -> None:
    logprobs, mask = rows_of([-1.0, -2.0, -1.5], [-0.5, -0.25], [-2.0, -2.0])
    old = tensor([[-1.1, -1.7, -1.6], [-1.5, -1.25, 7.0], [-1.0, -1.0, 7.0]], dtype=torch.float64)
    advantages = tensor([2.0, 3.0, -1.0], dtype=torch.float64)
    loss, clipped = objectives.gspo(logprobs, old, advantages[:, None].expand(3, 3), mask, 0.2, 0.3)
    # mean log-ratios: (0.1 − 0.3 + 0.1) / 3, 1, −1
    s = [math.exp(-0.1 / 3), math.exp(1.0), math.exp(-1.0)]
    assert loss[0].tolist() == pytest.approx([-2 * s[0]] * 3)
    assert loss[1, :2].tolist() == pytest.approx([-3 * 1.3] * 2) and clipped[1, :2].tolist() == [1, 1]
    assert loss[2, :2].tolist() == pytest.approx([0.8] * 2) and clipped[0].tolist() == [0, 0, 0]
    length = mask.sum(1, keepdim=True)
    (loss * mask / length).sum().backward()
    ours = logprobs.grad
    free = logprobs.detach().clone().requires_grad_()
    ratio = (((free - old) * mask).sum(1) / length[:, 0]).exp()
    (-torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.3) * advantages)).sum().backward()
    assert ours is not None and free.grad is not None and torch.allclose(ours, free.grad, atol=1e-12)


@pytest.mark.parametrize(
    ("ratio", "advantage", "slope", "clipped"),
    [(1.0, 2.0, -2.0, 0), (9.0, 2.0, -10.0, 1), (0.1, 2.0, -0.2, 0), (9.0, -1.0, 5.0, 1), (0.1, -1.0, 0.1, 0)],
)
def test_cispo_bounds_a_tokens_weight_and_never_silences_it(
    ratio: float, advantage: float, slope: float, clipped: int
) -> None:
    logprobs = tensor([math.log(ratio) - 3.0], dtype=torch.float64, requires_grad=True)
    loss, outside = objectives.cispo(
        logprobs, tensor([-3.0], dtype=torch.float64), tensor([advantage], dtype=torch.float64)
    )
    loss.sum().backward()
    assert logprobs.grad is not None and float(logprobs.grad) == pytest.approx(slope) and int(outside) == clipped


def test_topr_by_hand() -> None:
    # ratios of whole sequences: e^0.5, e^−1, e^0.5, e^−1; advantages up, up, down, down
    logprobs, mask = rows_of([-1.0, -1.0], [-1.0, -1.0], [-1.0, -1.0], [-2.0])
    behavior = tensor([[-1.5, -1.0], [0.0, -1.0], [-1.5, -1.0], [-1.0, 5.0]], dtype=torch.float64)
    advantages = tensor([[2.0], [2.0], [-1.0], [-1.0]], dtype=torch.float64).expand(4, 2)
    loss, cut = objectives.topr(logprobs, behavior, advantages, mask)
    (loss * mask).sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad[:, 0].tolist() == pytest.approx([-2.0, -2.0, 1.0, math.exp(-1)])
    assert logprobs.grad[3, 1] == 0 and (cut * mask).sum(1).tolist() == [0, 0, 2, 0]


def test_what_a_policy_no_longer_says_is_pushed_no_further_by_topr_but_is_by_reinforce() -> None:
    logprobs, mask = rows_of([-30.0])
    advantages, behavior = tensor([[-1.0]], dtype=torch.float64), tensor([[-1.0]], dtype=torch.float64)
    objectives.topr(logprobs, behavior, advantages, mask)[0].sum().backward()
    assert logprobs.grad is not None and float(logprobs.grad) < 1e-12
    logprobs.grad = None
    objectives.reinforce(logprobs, advantages).sum().backward()
    assert float(logprobs.grad) == 1.0  # type: ignore[arg-type]


def test_a_completion_that_drifted_too_far_is_left_out_whole() -> None:
    old, mask = rows_of([-1.0, -1.0], [-1.0, -1.0], [-1.0])
    behavior = tensor([[-1.4, -0.6], [-1.6, -1.4], [-0.5, 9.0]], dtype=torch.float64)
    # geometric means: 1, e^0.5 = 1.65, e^−0.5 = 0.61
    assert objectives.sequence_mask(old, behavior, mask, 0.7).flatten().tolist() == [1, 1, 1]
    assert objectives.sequence_mask(old, behavior, mask, 0.6).flatten().tolist() == [1, 0, 0]
    assert not objectives.sequence_mask(old, behavior, mask, 0.6).requires_grad


def test_the_value_loss_by_hand() -> None:
    values = tensor([1.0, 1.0, 3.0], dtype=torch.float64, requires_grad=True)
    old, returns = tensor([0.5, 0.5, 0.5], dtype=torch.float64), tensor([2.0, 0.0, 2.0], dtype=torch.float64)
    assert objectives.value_loss(values, old, returns).tolist() == [0.5, 0.5, 0.5]
    # within 0.2 of 0.5 the values would be 0.7: further from 2, nearer to 0, further from 2
    loss = objectives.value_loss(values, old, returns, 0.2)
    assert loss.tolist() == pytest.approx([1.3**2 / 2, 0.5, 1.3**2 / 2])
    loss.sum().backward()
    assert values.grad is not None and values.grad.tolist() == [0.0, 1.0, 0.0]
    returns.requires_grad_()
    for clip in (0.0, 0.2):
        objectives.value_loss(values, old, returns, clip).sum().backward()
    assert returns.grad is None  # what the critic should have said is a constant


def test_the_loss_of_q_by_hand_and_its_target_is_a_constant() -> None:
    values, targets = tensor([3.0, 1.0], requires_grad=True), tensor([1.0, 2.0], requires_grad=True)
    loss = objectives.q_loss(values, targets)
    assert loss.tolist() == [2.0, 0.5]
    loss.sum().backward()
    assert values.grad is not None and values.grad.tolist() == [2.0, -1.0] and targets.grad is None


def test_the_kl_controller_by_hand_and_it_finds_its_target() -> None:
    assert objectives.adapt_kl(0.5, 3.0, 0.0) == 0.5
    assert objectives.adapt_kl(0.5, math.nan, 1.0) == 0.5
    assert objectives.adapt_kl(0.5, 1.1, 1.0) == pytest.approx(0.5 * 1.01)
    assert objectives.adapt_kl(0.5, 99.0, 1.0) == pytest.approx(0.5 * 1.02)
    assert objectives.adapt_kl(0.5, 0.0, 1.0) == pytest.approx(0.5 * 0.98)
    coefficient = 10.0
    for _ in range(500):  # a policy whose KL is what the penalty lets it be
        coefficient = objectives.adapt_kl(coefficient, 0.1 / coefficient, 0.05)
    assert coefficient == pytest.approx(2.0, rel=0.02)
