"""The estimators beside the code of others, on the same tensors: GAE beside Stable-Baselines3's rollout buffer, the
GRPO family beside TRL's trainer. Slow: both take long to import."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from operant.algorithms import credit, objectives
from operant.algorithms.surrogate import Surrogate
from operant.algorithms.table import ALGORITHMS, resolve
from operant.config import TrainConfig
from operant.data.batch import token_weights
from operant.types import Batch

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


# --- GAE -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("lam", [1.0, 0.95, 0.0])
def test_gae_agrees_with_stable_baselines(gamma: float, lam: float) -> None:
    """Each environment holds several completions in a row; the last is cut off in one and ends in the other."""
    buffers = pytest.importorskip(
        "stable_baselines3.common.buffers", reason="Stable-Baselines3 is not installed; pip install stable-baselines3"
    )
    from gymnasium import spaces

    lengths = [[3, 1, 4], [5, 2, 1]]
    total, last_value, cut = 8, [0.7, -0.3], [True, False]
    generator = np.random.default_rng(0)
    rewards, values = generator.normal(size=(2, total, 2)).astype(np.float32)
    starts = np.zeros((total, 2), np.float32)
    for e, row in enumerate(lengths):
        starts[np.cumsum([0, *row[:-1]]), e] = 1
    buffer = buffers.RolloutBuffer(total, spaces.Discrete(2), spaces.Discrete(2), gae_lambda=lam, gamma=gamma, n_envs=2)
    for t in range(total):
        buffer.add(
            np.zeros(2), np.zeros(2), rewards[t], starts[t], torch.from_numpy(values[t]), torch.zeros(2)
        )  # fmt: skip
    buffer.compute_returns_and_advantage(torch.tensor(last_value), np.array([not c for c in cut]))

    spans = [(e, sum(row[:i]), row[i], i == 2) for e, row in enumerate(lengths) for i in range(3)]
    mask = torch.arange(5)[None] < torch.tensor([[n] for _, _, n, _ in spans])
    ours_rewards, ours_values = torch.zeros(6, 5), torch.zeros(6, 5)
    bootstrap = torch.tensor([last_value[e] if last and cut[e] else 0.0 for e, _, _, last in spans])
    for i, (e, at, n, _) in enumerate(spans):
        ours_rewards[i, :n] = torch.from_numpy(rewards[at : at + n, e])
        ours_values[i, :n] = torch.from_numpy(values[at : at + n, e])
    advantages, returns = credit.gae(ours_rewards, ours_values, mask, gamma=gamma, lam=lam, bootstrap=bootstrap)
    for i, (e, at, n, _) in enumerate(spans):
        assert advantages[i, :n].tolist() == pytest.approx(buffer.advantages[at : at + n, e].tolist(), abs=1e-5)
        assert returns[i, :n].tolist() == pytest.approx(buffer.returns[at : at + n, e].tolist(), abs=1e-5)


# --- the GRPO family -------------------------------------------------------------------------------------------------

LIMIT = 7


@pytest.fixture(scope="module")
def trl() -> Any:
    pytest.importorskip("trl", reason="TRL is not installed; pip install trl")
    from trl.trainer import grpo_trainer

    return grpo_trainer


def stand_in(logprobs: Tensor, name: str, low: float, high: float, beta: float) -> Any:
    """TRL's trainer with nothing but what its loss reads."""
    return SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (logprobs, torch.zeros_like(logprobs), None),
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False,
        importance_sampling_level="sequence" if name == "gspo" else "token",
        loss_type={"gspo": "grpo"}.get(name, name), beta=beta, epsilon_low=low,
        epsilon_high=1 + high if name == "cispo" else high,  # TRL's is the cap itself there
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        model=SimpleNamespace(training=True), current_gradient_accumulation_steps=1, max_completion_length=LIMIT,
        accelerator=SimpleNamespace(
            num_processes=1, sync_gradients=True, gather=lambda x: x, reduce=lambda x, reduction: x
        ),
        _entropy_bonus_enabled=False, entropy_coef=0.0, _metrics={"train": defaultdict(list)},
    )  # fmt: skip


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "gspo", "cispo"])
def test_the_grpo_family_agrees_with_trl_in_loss_and_gradient(name: str, beta: float, trl: Any) -> None:
    row = ALGORITHMS[name]
    low, high = (0.1, 0.15) if name == "gspo" else row.clip  # wide enough that some sequences are within
    draw = torch.Generator().manual_seed(3)
    lengths = torch.tensor([1, 4, 7, 3, 2, 6, 5, 7])
    mask = torch.arange(LIMIT)[None] < lengths[:, None]
    old, reference = (-3 * torch.rand(mask.shape, generator=draw, dtype=torch.float64) for _ in range(2))
    now = old + 0.4 * torch.randn(mask.shape, generator=draw, dtype=torch.float64)
    rewards = torch.randn(8, generator=draw, dtype=torch.float64)
    rewards[2] = torch.nan  # a missing one
    valid, groups = ~rewards.isnan(), torch.arange(8) // 4

    theirs = now.clone().requires_grad_()
    mean = torch.nanmean(rewards.view(-1, 4), 1).repeat_interleave(4)
    advantages = rewards - mean
    if name != "dr_grpo":
        advantages = advantages / (trl.nanstd(rewards.view(-1, 4), dim=1).repeat_interleave(4) + 1e-4)
    counted = {
        "prompt_ids": torch.zeros(8, 1).long(), "prompt_mask": torch.ones(8, 1).long(),
        "completion_ids": torch.zeros(8, LIMIT).long(), "completion_mask": mask.long(),
        "advantages": torch.nan_to_num(advantages), "old_per_token_logps": old, "ref_per_token_logps": reference,
        "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    their_loss = trl.GRPOTrainer._compute_loss(stand_in(theirs, name, low, high, beta), None, counted)
    their_loss.backward()

    ours = now.clone().requires_grad_()
    paid = torch.zeros(mask.shape, dtype=torch.float64)
    paid[torch.arange(8), lengths - 1] = rewards
    mine, _, usable = credit.advantages(paid, mask, groups, valid, baseline=row.baseline)
    assert usable.tolist() == valid.tolist()
    weights, denominator = token_weights(mask, row.normalisation, LIMIT)
    batch = Batch(
        tokens=torch.zeros(mask.shape).long(), position_ids=torch.zeros(mask.shape).long(),
        segment_ids=torch.zeros(mask.shape).long(), action_mask=mask, weights=weights, denominator=denominator,
        advantages=mine, ref_logprobs=reference,
    )  # fmt: skip
    config = TrainConfig(algorithm=name, clip_low=low, clip_high=high, kl_coef=beta, kl_estimator="k3")
    surrogate = Surrogate(config, resolve(config, dense=False), {})
    loss, clipped = surrogate.policy_loss(batch, ours, old)
    loss = loss + beta * objectives.kl_k3(ours, reference)
    total = (loss * weights).sum() / denominator
    total.backward()
    assert float(total.detach()) == pytest.approx(float(their_loss.detach()), abs=1e-5)
    assert ours.grad is not None and theirs.grad is not None
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-5) and float(ours.grad.abs().max()) > 1e-3
    assert clipped is not None and (name == "cispo" or 0 < float((clipped * mask).sum()) < float(mask.sum()))
