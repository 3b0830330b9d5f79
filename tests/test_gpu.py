"""On a GPU: the same numbers as on the CPU, and the same bits every time. Without one all of it is skipped."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FAMILIES
from live import answered

from operant.algorithms.table import ALGORITHMS
from operant.config import TrainConfig, WorkerConfig
from operant.data.batch import from_sequences, to_device
from operant.live.learning.execution import LoadedVersion, make_again
from operant.live.learning.worker import Worker
from operant.models.policy import Policy
from operant.models.sampler import Sampler
from operant.rewards import Reward
from operant.rl.loop import train
from operant.types import Completion, Prompt, Sampling

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
    pytest.mark.usefixtures("no_report"),
]
Make = Callable[..., Policy]
ASKED = [Prompt(f"p{i}", np.arange(40, 43 + i % 3), references=("x",)) for i in range(6)]


def even(prompt: Prompt, completion: Completion) -> list[float]:
    return [float(token % 2 == 0) for token in completion.tokens]


def run(policy: Policy, out: Path, **options: Any) -> dict[str, torch.Tensor]:
    given: dict[str, Any] = {
        "out": str(out), "steps": 6, "prompts_per_step": 4, "group_size": 4, "max_tokens": 8, "lr": 3e-3, "seed": 5,
        "tensorboard": False, "eval_every": 100, "save_every": 3, "log_samples": 0,
    } | options  # fmt: skip
    row = ALGORITHMS[given.get("algorithm", "rloo")]
    reward = even if row.honours_dense else lambda prompt, completion: float(np.mean(even(prompt, completion)))
    train(policy, ASKED, Reward(reward, in_process=True), TrainConfig(**given), quiet=True)
    return {name: t.detach().cpu() for name, t in policy.model.state_dict().items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_and_logprobs_are_those_of_the_cpu_in_float64(family: str, make_policy: Make) -> None:
    here, there = make_policy(family, device="cuda"), make_policy(family)
    asked, sampling = ASKED[:4], Sampling(max_tokens=12, seed=3)
    groups = Sampler(here, max_rows=5).sample(asked, sampling, 3)  # rows join and leave
    assert [[c.text for c in g] for g in groups] == [
        [c.text for c in g] for g in Sampler(there, max_rows=5).sample(asked, sampling, 3)
    ]
    completions = [c for group in groups for c in group]
    batch = from_sequences(
        [p.tokens for p in asked for _ in range(3)], [c.tokens for c in completions],
        encoder=here.family == "encoder-decoder", pad_id=here.codec.pad_id,
    )  # fmt: skip
    there.model.double()
    exact = there.logprobs(batch).logprobs[batch.action_mask].detach().numpy()
    on_gpu = to_device(batch, here.device)
    found = here.logprobs(on_gpu).logprobs[on_gpu.action_mask].detach().cpu().numpy()
    assert np.abs(found - exact).max() < 1e-4
    assert np.abs(np.concatenate([c.model_logprobs for c in completions]) - exact).max() < 1e-4


@pytest.mark.parametrize("dtype", ["float32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_that_was_cut_goes_on_bit_for_bit(family: str, dtype: str, make_policy: Make, tmp_path: Path) -> None:
    def fresh() -> Policy:
        return make_policy(family, device="cuda", dtype=dtype)

    whole = run(fresh(), tmp_path / "whole")
    run(fresh(), tmp_path / "cut", steps=3)
    again = run(fresh(), tmp_path / "cut", resume=True)
    start = fresh().model.state_dict()
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    assert any(not torch.equal(whole[name], start[name].cpu()) for name in whole)


@pytest.mark.parametrize("algorithm", [name for name, row in ALGORITHMS.items() if not row.reference])
def test_every_algorithm_learns_and_gives_the_same_bits(algorithm: str, make_policy: Make, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # an operation with an order of its own
        one, two = (
            run(make_policy("gpt2", device="cuda"), tmp_path / name, algorithm=algorithm, steps=3)
            for name in ("one", "two")
        )
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_a_rating_is_learned_and_replayed_bit_for_bit(family: str, make_policy: Make, tmp_path: Path) -> None:
    policy = make_policy(family, device="cuda")
    policy.save(tmp_path / "model")
    store = answered(policy)
    config = WorkerConfig(
        root=str(tmp_path / "live"), model=str(tmp_path / "model"), device="cuda", anchor_rows=3, anchor_tokens=6,
        lr=1e-3, replay_events=2,
    )  # fmt: skip
    worker = Worker(config, store, lambda told: None)
    worker.start()
    for name, kind, value in (("c0", "thumb", 1), ("c1", "edit", "the cat"), ("c2", "score", 0.1)):
        store.add(name, kind, value)
        assert worker.once()
    assert worker.versions.pointer().version == 3
    for version in (1, 2, 3):
        again = make_again(worker.versions, version, store, dataclasses.replace(config, lr=0.5))
        saved = LoadedVersion.load(worker.versions, version, 0, config).policy
        assert again.device.type == "cuda"
        for a, b in zip(again.model.parameters(), saved.model.parameters(), strict=True):
            assert torch.equal(a, b)
