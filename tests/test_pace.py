"""How far a rating moves the weights follows what learns, and a root keeps the numbers that it began with."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from live import answered

from operant.config import LiveConfig, WorkerConfig
from operant.live.learning import pace
from operant.live.learning.pace import FULL, LORA, MADE_HERE, Pace, keep_pace, settled
from operant.live.learning.worker import Worker
from operant.models.policy import Policy

Make = Callable[..., Policy]


def test_what_learns_says_what_auto_is(make_policy: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy("gpt2")
    assert Pace.of(policy) == MADE_HERE == Pace(LiveConfig().lr, LiveConfig().kl_budget)
    monkeypatch.setattr("operant.models.policy.SMALL", 1)  # as a model that others have pretrained
    assert Pace.of(policy) == FULL
    policy.add_lora(2)
    assert Pace.of(policy) == LORA
    policy.model.config.made_by_operant = True
    assert Pace.of(policy) == MADE_HERE


def test_a_root_keeps_the_numbers_that_it_began_with(
    make_policy: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, root = make_policy("gpt2"), tmp_path / "live"
    policy.save(tmp_path / "model")
    config = WorkerConfig(
        root=str(root), model=str(tmp_path / "model"), device="cpu", anchor_rows=3, anchor_tokens=6, kl_budget=0.03
    )
    assert config.lr == "auto"
    store = answered(policy)
    monkeypatch.setattr(pace, "MADE_HERE", Pace(lr=0.002, kl_budget=0.5))

    def learn(config: WorkerConfig, name: str) -> dict[str, Any]:
        worker = Worker(config, store, lambda line: None)
        worker.start()
        store.add(name, "thumb", 1)
        assert worker.once()
        return worker.versions.records()[-1].coefficients

    used = learn(config, "c0")
    assert (used["lr"], used["kl_budget"]) == (0.002, 0.03)
    kept = {
        "lr": 0.002,
        "kl_budget": 0.03,
        "replay_events": 7,
        "anchor_tokens": 6,
        "anchor_coef": 0.0,
        "lora_layers": 0,
        "lora_orthogonal": 0,
    }
    assert json.loads((root / "pace.json").read_text()) == kept
    monkeypatch.setattr(pace, "MADE_HERE", Pace(lr=0.9, kl_budget=0.9))  # a default that changed later
    used = learn(dataclasses.replace(config, kl_budget="auto", model=""), "c1")
    assert (used["lr"], used["kl_budget"]) == (0.002, 0.03)
    (root / "pace.json").write_text(json.dumps({"lr": 0.002, "kl_budget": 0.03}))  # of before there were others
    used = learn(dataclasses.replace(config, lr=0.004), "c2")  # what is said now counts now
    assert used["replay_events"] == 7
    assert (used["lr"], used["kl_budget"]) == (0.004, 0.03)


def test_a_root_without_them_goes_on_with_what_was_in_force_before(tmp_path: Path) -> None:
    there = settled(WorkerConfig(root=str(tmp_path), lr=0.7), tmp_path)
    assert (there.lr, there.kl_budget) == (0.7, 0.02)


def test_no_number_is_written_as_auto(make_policy: Make, tmp_path: Path) -> None:
    keep_pace(tmp_path, WorkerConfig(root=str(tmp_path)), make_policy("gpt2"))
    there = settled(WorkerConfig(root=str(tmp_path)), tmp_path)
    assert "auto" not in [getattr(there, field.name) for field in dataclasses.fields(Pace)]
