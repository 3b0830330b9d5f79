from __future__ import annotations

import contextlib
import copy
import math
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from operant.algorithms import learner as module
from operant.algorithms.learner import Adam, Learner, Sgd, learning_rate, same_bits
from operant.data.batch import from_sequences
from operant.models.policy import Policy
from operant.types import Batch, OperantError


def test_the_schedules_by_hand() -> None:
    warm = [learning_rate(s, 1.0, 4, 100, "constant") for s in range(6)]
    assert warm == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert learning_rate(0, 1.0, 0, 0, "cosine") == 1.0
    assert learning_rate(54, 2.0, 4, 104, "cosine") == pytest.approx(2 * (0.1 + 0.9 * 0.5))
    assert learning_rate(29, 2.0, 4, 104, "linear") == pytest.approx(2 * (0.1 + 0.9 * 0.75))
    for schedule in ("cosine", "linear"):
        values = [learning_rate(s, 1.0, 4, 104, schedule) for s in range(4, 200)]  # type: ignore[arg-type]
        assert values[0] == 1.0 and values == sorted(values, reverse=True)
        assert values[100] == pytest.approx(0.1) and values[-1] == pytest.approx(0.1)


def batch_of(policy: Policy, rows: int = 3) -> Batch:
    prompts = [np.arange(40, 43 + i) for i in range(rows)]
    completions = [np.arange(60, 62 + i) for i in range(rows)]
    return from_sequences(prompts, completions, encoder=False, pad_id=policy.codec.pad_id)


def likelihood(policy: Policy, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    out = policy.logprobs(batch)
    return -out.logprobs, {"approx_kl": batch.action_mask.sum() * 2.0, "kept": batch.action_mask.sum() * 3.0}


def weights(policy: Policy) -> list[Tensor]:
    return [p.detach().clone() for p in policy.model.parameters()]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_a_step_is_adamw_on_the_clipped_gradient_of_the_summed_loss(make_policy: Callable[..., Policy]) -> None:
    policy = make_policy("gpt2")
    policy.model.double()  # in float32 Adam makes steps of the rounding where the true gradient is zero
    mirror = copy.deepcopy(policy)
    learner = Learner(policy, lr=0.01, weight_decay=0.1, max_grad_norm=0.5)
    batch = batch_of(policy)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in mirror.model.parameters() if p.dim() >= 2], "weight_decay": 0.1},
            {"params": [p for p in mirror.model.parameters() if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=0.01, betas=(0.9, 0.95),
    )  # fmt: skip
    for _ in range(3):
        stats = learner.step([batch], likelihood)
        loss = -mirror.logprobs(batch).logprobs.sum() / batch.action_mask.sum()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(mirror.model.parameters(), 0.5)
        optimizer.step()
        assert stats.loss == pytest.approx(float(loss.detach()), rel=1e-5)
        assert stats.grad_norm == pytest.approx(float(norm), rel=1e-4) and stats.grad_norm > 0.5
    for left, right in zip(policy.model.parameters(), mirror.model.parameters(), strict=True):
        assert torch.allclose(left, right, atol=1e-6)
    assert stats.tokens == int(batch.action_mask.sum())
    assert stats.approx_kl == 2.0 and stats.extra == {"kept": 3.0}
    assert stats.coefficients == {"lr": 0.01} and stats.step == learner.steps == 3


def test_what_is_logged_is_averaged_over_the_tokens_that_report_it(make_policy: Callable[..., Policy]) -> None:
    """Supervised pairs mixed into a reward step must not dilute its KL and entropy."""
    policy = make_policy("gpt2")
    batch = batch_of(policy)
    silent = copy.copy(batch_of(policy))
    silent.kind = "labels"

    def loss(policy: Policy, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        token_loss, stats = likelihood(policy, batch)
        return token_loss, {} if batch.kind == "labels" else stats

    stats = Learner(policy, lr=0.01).step([batch, silent], loss)
    assert stats.approx_kl == 2.0 and stats.tokens == 2 * int(batch.action_mask.sum())


def test_a_loss_may_say_what_it_counts(make_policy: Callable[..., Policy]) -> None:
    policy = make_policy("gpt2")

    def loss(policy: Policy, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        rows = torch.tensor(float(len(batch.tokens)))
        return -policy.logprobs(batch).logprobs, {"count": rows, "margin": 5 * rows}

    stats = Learner(policy, lr=0.01).step([batch_of(policy, 3), batch_of(policy, 2)], loss)
    assert stats.extra == {"margin": 5.0}
    assert stats.approx_kl == stats.clipfrac == stats.entropy == 0.0  # what is not reported
    assert Learner(policy, lr=0.01).step([batch_of(policy, 1)], loss).extra == {"margin": 5.0}


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_non_finite_step_leaves_weights_and_optimizer_as_they_were(
    bad: str, make_policy: Callable[..., Policy]
) -> None:
    policy = make_policy("gpt2")
    learner = Learner(policy, lr=0.01)
    batch = batch_of(policy)

    def broken(policy: Policy, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        token_loss = -policy.logprobs(batch).logprobs
        if bad == "loss":
            return token_loss * math.nan, {}
        return token_loss * 0 + (token_loss * 0).abs().sqrt(), {}  # the slope of √ at 0 is infinite, the value is not

    learner.step([batch], likelihood)
    before, optimizer = weights(policy), copy.deepcopy(learner.rule.state_dict())
    for count in (1, 2):
        stats = learner.step([batch], broken)
        assert stats.skipped and ("loss" if bad == "loss" else "gradient") in stats.reason
        assert learner.skipped == learner.skipped_in_row == count
    assert same(before, weights(policy))
    after = learner.rule.state_dict()
    for key, values in optimizer["state"].items():
        assert all(torch.equal(v, after["state"][key][name]) for name, v in values.items())
    assert all(p.grad is None for p in policy.model.parameters())
    stats = learner.step([batch], likelihood)
    assert not stats.skipped and learner.skipped_in_row == 0 and learner.skipped == 2
    assert not same(before, weights(policy))


def test_one_non_finite_micro_batch_spoils_the_whole_step(make_policy: Callable[..., Policy]) -> None:
    policy = make_policy("gpt2")
    batch = batch_of(policy)
    before = weights(policy)
    calls: Iterator[float] = iter((1.0, math.inf, 1.0))
    stats = Learner(policy, lr=0.01).step([batch] * 3, lambda p, b: (-p.logprobs(b).logprobs * next(calls), {}))
    assert stats.skipped and same(before, weights(policy))


def test_its_state_goes_on_bit_for_bit(make_policy: Callable[..., Policy]) -> None:
    def fresh() -> tuple[Policy, Learner]:
        policy = make_policy("llama")
        return policy, Learner(policy, lr=0.01, warmup_steps=3, total_steps=9, schedule="cosine", weight_decay=0.1)

    policy, learner = fresh()
    batch = batch_of(policy)
    for _ in range(5):
        learner.step([batch], likelihood)
    second, resumed = fresh()
    for _ in range(2):
        resumed.step([batch], likelihood)
    third, again = fresh()
    third.model.load_state_dict(second.model.state_dict())
    again.load_state_dict(copy.deepcopy(resumed.state_dict()))
    for _ in range(3):
        again.step([batch], likelihood)
    assert same(weights(policy), weights(third))


def test_without_momentum_nothing_of_it_is_kept_and_it_goes_on_bit_for_bit(make_policy: Callable[..., Policy]) -> None:
    def learner_of(policy: Policy) -> Learner:
        return Learner(policy, lr=0.01, rule=Adam(policy.trainable_parameters(), 0.01, betas=(0.0, 0.99)))

    through, first = make_policy("gpt2"), make_policy("gpt2")
    whole, begun = learner_of(through), learner_of(first)
    batch = batch_of(through)
    for _ in range(4):
        whole.step([batch], likelihood)
    for _ in range(2):
        begun.step([batch], likelihood)
    state = begun.state_dict()
    assert all(set(entry) == {"step", "exp_avg_sq"} for entry in state["rule"]["state"].values())
    second = make_policy("gpt2")
    second.model.load_state_dict(first.model.state_dict())
    resumed = learner_of(second)
    resumed.load_state_dict(copy.deepcopy(state))
    for _ in range(2):
        resumed.step([batch], likelihood)
    assert same(weights(second), weights(through))


def test_nothing_to_train_is_refused(make_policy: Callable[..., Policy]) -> None:
    policy = make_policy("gpt2")
    policy.model.requires_grad_(False)
    with pytest.raises(OperantError, match="lora_rank"):
        Learner(policy, lr=0.1)


def test_a_plain_step_is_the_gradient_cut_to_its_longest_and_nothing_is_remembered(
    make_policy: Callable[..., Policy],
) -> None:
    policy = make_policy("gpt2")
    policy.model.double()
    before = weights(policy)
    rule = Sgd(policy.trainable_parameters(), 0.1, max_grad_norm=0.5)
    learner = Learner(policy, lr=0.2, rule=rule)
    stats = learner.step([batch_of(policy)], likelihood)
    assert stats.grad_norm > 0.5 and stats.coefficients["lr"] == 0.2
    moved = [b - a for a, b in zip(before, weights(policy), strict=True)]
    assert math.sqrt(sum(float(m.square().sum()) for m in moved)) == pytest.approx(0.2 * 0.5)
    assert rule.state_dict() == {} and all(p.grad is None for p in policy.trainable_parameters())
    # a gradient below the limit is taken as it is
    middle = weights(policy)
    rule.max_grad_norm = 1e9
    norm = learner.step([batch_of(policy)], likelihood).grad_norm
    moved = [b - a for a, b in zip(middle, weights(policy), strict=True)]
    assert math.sqrt(sum(float(m.square().sum()) for m in moved)) == pytest.approx(0.2 * norm)


def test_a_plain_step_that_is_not_finite_is_not_made(make_policy: Callable[..., Policy]) -> None:
    policy = make_policy("gpt2")
    before = weights(policy)
    learner = Learner(policy, lr=0.2, rule=Sgd(policy.trainable_parameters(), 0.2))
    stats = learner.step([batch_of(policy)], lambda p, b: (p.logprobs(b).logprobs * math.nan, {}))
    assert stats.skipped and "nan" in stats.reason and same(before, weights(policy))


def test_an_operation_that_keeps_no_order_is_told_once_and_used(
    make_policy: Callable[..., Policy], monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextlib.contextmanager
    def as_on_a_gpu(device: torch.device) -> Iterator[None]:
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)

    def loss(policy: Policy, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        torch.zeros(3).put_(torch.tensor([0]), torch.tensor([1.0]))  # has no fixed order anywhere
        return likelihood(policy, batch)

    policy = make_policy("gpt2")
    free = Learner(copy.deepcopy(policy), lr=1e-3)
    free.step([batch_of(policy)], loss)
    monkeypatch.setattr(module, "same_bits", as_on_a_gpu)
    learner = Learner(policy, lr=1e-3)
    with pytest.warns(RuntimeWarning, match=r"two runs on this GPU will differ in their last bits: put_"):
        assert not learner.step([batch_of(policy)], loss).skipped
    assert same(weights(policy), weights(free.policy))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not learner.step([batch_of(policy)], loss).skipped

    def faulty(policy: Policy, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        raise RuntimeError("a fault of its own")

    with pytest.raises(RuntimeError, match="a fault of its own"):
        Learner(policy, lr=1e-3).step([batch_of(policy)], faulty)


def test_one_order_is_asked_for_while_a_step_is_made_and_not_after() -> None:
    asked = torch.are_deterministic_algorithms_enabled
    with same_bits(torch.device("cpu")):
        assert not asked()

    def stopped() -> None:
        with same_bits(torch.device("cuda")):
            assert asked()
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        stopped()
    assert not asked() and torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with same_bits(torch.device("cuda")):
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert asked() and torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
