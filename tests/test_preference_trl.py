"""DPO's, IPO's and KTO's losses beside TRL's own code on the same tensors. Slow: TRL takes long to import."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from operant.algorithms import objectives

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

BETA = 0.25


@pytest.fixture(scope="module")
def trl() -> Any:
    return pytest.importorskip("trl", reason="TRL is not installed; pip install trl")


def token_columns(rows: int = 6, prompt: int = 3, longest: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probs float64[N, T] of the policy, of the reference, mask), of completions of several lengths."""
    draw = torch.Generator().manual_seed(5)
    lengths = torch.randint(1, longest + 1, (rows,), generator=draw)
    columns = torch.arange(prompt + longest)[None]
    mask = (columns >= prompt) & (columns < prompt + lengths[:, None])
    ours, theirs = (-3 * torch.rand(mask.shape, generator=draw, dtype=torch.float64) * mask for _ in range(2))
    return ours, theirs, mask


def stand_in(module: Any, ours: Tensor, theirs: Tensor, mask: Tensor, **more: Any) -> tuple[Any, Any]:
    """TRL's trainer with nothing but what its loss reads, and a model that answers with the given log-probs."""

    def model_of(logprobs: Tensor) -> Any:
        def model(**inputs: Any) -> Any:
            shape = logprobs[:, 1:].shape
            return SimpleNamespace(
                log_probs=logprobs[:, 1:], entropy=torch.zeros(shape), mean_logits=torch.zeros(shape),
                is_top1=torch.zeros(shape, dtype=torch.bool), loss=None,
            )  # fmt: skip

        return model

    accelerator = SimpleNamespace(
        device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x, unwrap_model=lambda m: m
    )
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False), accelerator=accelerator, aux_loss_enabled=False, ld_alpha=None,
        precompute_ref_logps=True, f_divergence_type="reverse_kl", beta=BETA, use_weighting=False, loss_weights=[1.0],
        _metrics={"eval": defaultdict(list)}, _total_train_tokens=0, label_smoothing=0.0, **more,
    )  # fmt: skip
    return trainer, model_of(ours)


def test_dpo_and_ipo_are_trls(trl: Any) -> None:
    from trl.trainer import dpo_trainer

    ours, theirs, mask = token_columns()
    sums = [x.sum(1).chunk(2) for x in (ours, theirs)]
    inputs = {
        "input_ids": torch.zeros(mask.shape, dtype=torch.long), "attention_mask": torch.ones_like(mask),
        "completion_mask": mask.long(), "ref_chosen_logps": sums[1][0], "ref_rejected_logps": sums[1][1],
    }  # fmt: skip
    lengths = mask.sum(1)
    means = [(x.sum(1) / lengths).chunk(2) for x in (ours, theirs)]
    mine = {
        "sigmoid": objectives.dpo(*sums[0], *sums[1], BETA),
        "ipo": objectives.ipo(*means[0], *means[1], BETA),
    }
    assert float((mine["sigmoid"] - mine["ipo"]).abs().min()) > 1e-3
    for name, losses in mine.items():
        trainer, model = stand_in(dpo_trainer, ours, theirs, mask, loss_types=[name])
        expected = dpo_trainer.DPOTrainer._compute_loss(trainer, model, inputs, False)
        assert float(losses.mean()) == pytest.approx(float(expected), abs=1e-5)


def test_kto_is_trls(trl: Any) -> None:
    from trl.trainer import kto_trainer

    ours, theirs, mask = token_columns()
    stranger, stranger_reference = -theirs.sum(1).flip(0) - 6, ours.sum(1) - 6
    label = torch.tensor([True, False, False, True, True, False])
    point = objectives.kto_reference_point(stranger, stranger_reference)
    assert float(point) > 0.1
    inputs = {
        "input_ids": torch.zeros(mask.shape, dtype=torch.long), "attention_mask": torch.ones_like(mask),
        "completion_mask": mask.long(), "label": label, "ref_logps": theirs.sum(1),
        "ref_KL_logps": stranger_reference,
    }  # fmt: skip
    trainer, model = stand_in(
        kto_trainer, ours, theirs, mask, calculate_KL=True, loss_type="kto", desirable_weight=1.3,
        undesirable_weight=0.8, _compute_kl_logps=lambda model, batch: stranger,
    )  # fmt: skip
    expected = kto_trainer.KTOTrainer._compute_loss(trainer, model, inputs, False)
    mine = objectives.kto(ours.sum(1), theirs.sum(1), label, point, BETA, 1.3, 0.8)
    assert float(mine.mean()) == pytest.approx(float(expected), abs=1e-5)
    assert float(objectives.kto(ours.sum(1), theirs.sum(1), label, 0.0, BETA, 1.3, 0.8).mean()) != pytest.approx(
        float(expected), abs=1e-4
    )
