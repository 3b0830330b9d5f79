"""Configurations: every field described, YAML both ways, and numbers that no run can use."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from operant import config as configs
from operant.types import OperantError

STAGES = [
    configs.PretrainConfig, configs.SftConfig, configs.PreferConfig, configs.TrainConfig, configs.EvalConfig,
    configs.ScoreConfig, configs.SampleConfig, configs.QuickstartConfig, configs.LiveConfig, configs.WorkerConfig,
    configs.VersionsConfig,
]  # fmt: skip


@pytest.mark.parametrize("stage", STAGES)
def test_defaults_are_valid_and_survive_yaml(stage: type) -> None:
    config = stage()
    configs.check_numbers(config)
    assert stage(**yaml.safe_load(configs.to_yaml(config))) == config


@pytest.mark.parametrize("stage", STAGES)
def test_a_configuration_is_read_from_a_file(stage: type, tmp_path: Path) -> None:
    (tmp_path / "kept.yaml").write_text(configs.to_yaml(stage()), encoding="utf-8")
    assert configs.load_config(tmp_path / "kept.yaml", stage) == stage()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("lrr: 3", "lrr"), ("lr: fast", "lr"), ("lr: -1", "lr is -1.0"), ("- lr", "lr"), ("lr: [", "parsing"),
        (None, "No such file"), (b"\xff", "utf-8"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_configuration(text: str | bytes | None, told: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "c.yaml").write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(OperantError, match=told):
        configs.load_config(tmp_path / "c.yaml", configs.TrainConfig)


@pytest.mark.parametrize("stage", STAGES)
def test_every_field_of_a_number_has_a_range_or_needs_none(stage: type) -> None:
    """A new number without a range would let nonsense through: give it one, or name it here."""
    free: set[str] = {"beta"}
    numbers = {
        f.name for f in dataclasses.fields(stage)
        if isinstance(f.default, int | float) and not isinstance(f.default, bool)
    }  # fmt: skip
    assert numbers - set(configs._NUMBERS) <= free


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0), ("group_size", -1), ("lr", -0.1), ("lr", float("nan")), ("lr", float("inf")), ("gamma", 1.1),
        ("top_p", 0.0), ("seed", -1), ("seed", 2**63), ("eval_every", 0), ("keep", 0), ("max_grad_norm", 0.0),
        ("reward_seconds", 0.0), ("temperature", -1.0), ("limit", 0), ("threads", -1), ("reward_workers", -2),
    ],
)  # fmt: skip
def test_numbers_out_of_range_are_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(OperantError, match=re.escape(f"{name} is {value}; it must be ")) as fault:
        configs.check_numbers(configs.TrainConfig(**{name: value}))
    assert "\n" not in str(fault.value) and f"--{name}" in str(fault.value)


@pytest.mark.parametrize("value", ["END", [""], ["a", ""]])
def test_stop_strings_are_a_list_without_empty_ones(value: Any) -> None:
    """A text would stop at each of its letters, an empty one everywhere."""
    with pytest.raises(OperantError, match="must be a list of texts"):
        configs.check_numbers(configs.TrainConfig(stop=value))
    configs.check_numbers(configs.TrainConfig(stop=["END"]))


def test_edges_are_allowed() -> None:
    configs.check_numbers(
        configs.TrainConfig(
            gamma=0.0, top_p=1.0, seed=2**63 - 1, eval_prompts=0, log_samples=0, lr=0.0, reward_workers=-1, limit=None
        )
    )
    configs.check_numbers(configs.PretrainConfig(block=2, max_length=2, mean_span=1.0))
