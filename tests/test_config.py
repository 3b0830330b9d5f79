"""Configurations: every setting described and every number in its range, by flag, by YAML and in Python."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import inspect
import math
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import pytest
import yaml
from program import Program

import operant
from operant import config as configs
from operant.cli import EXAMPLES
from operant.config import install_line
from operant.types import OperantError

COMMANDS = {name: cls for name, (cls, _, _) in EXAMPLES.items()}
CLASSES = [c for n, c in vars(configs).items() if n.endswith(("Config", "Fields")) and dataclasses.is_dataclass(c)]


def kinds(hint: Any, limited: bool = False) -> Iterator[tuple[type, bool]]:
    """Every plain type in a type, with whether it has been annotated; written apart from the module's own reading."""
    if get_origin(hint) is Annotated:
        base, *notes = get_args(hint)
        yield from kinds(base, any(type(note).__module__ == "annotated_types" for note in notes))
    elif get_args(hint) and not isinstance(get_args(hint)[0], str | int):
        for inner in get_args(hint):
            yield from kinds(inner)
    elif isinstance(hint, type):
        yield hint, limited


def numbers(cls: type) -> list[str]:
    return [n for n, t in configs.setting_types(cls).items() if {int, float} & {kind for kind, _ in kinds(t)}]


def test_the_program_is_what_is_tested() -> None:
    assert set(COMMANDS.values()) < set(CLASSES) and configs.WorkerConfig in CLASSES
    assert numbers(configs.VersionsConfig) == ["compare", "evaluate", "promote", "anchor", "version"]
    assert {"max_age_days", "max_bytes"} <= set(numbers(configs.FeedbackConfig)) & set(numbers(configs.ServeConfig))
    assert len(numbers(configs.TrainConfig)) > 50


@pytest.mark.parametrize("cls", CLASSES)
def test_defaults_are_valid_and_survive_yaml(cls: type) -> None:
    config = cls()
    configs.check_settings(config)
    assert cls(**yaml.safe_load(configs.to_yaml(config))) == config


@pytest.mark.parametrize("cls", CLASSES)
def test_a_configuration_is_read_from_a_file(cls: type, tmp_path: Path) -> None:
    (tmp_path / "kept.yaml").write_text(configs.to_yaml(cls()), encoding="utf-8")
    assert configs.load_config(tmp_path / "kept.yaml", cls) == cls()


def test_a_file_may_have_former_names_and_dashes(tmp_path: Path) -> None:
    (tmp_path / "old.yaml").write_text("max_sick_steps: 7\nprompt-field: en\nlr: 1e-4\n")
    config = configs.load_config(tmp_path / "old.yaml", configs.SftConfig)
    assert (config.max_nonfinite_steps, config.prompt_field, config.lr) == (7, "en", 1e-4)


@pytest.mark.parametrize(
    ("cls", "name", "own"),
    [
        (configs.TrainConfig, "learning_rate", "lr"), (configs.TrainConfig, "learn_rate", "lr"),
        (configs.TrainConfig, "batch_size", "prompts_per_step"), (configs.TrainConfig, "num_generations", "group_size"),
        (configs.TrainConfig, "max_new_tokens", "max_tokens"), (configs.TrainConfig, "num_train_epochs", "steps"),
        (configs.TrainConfig, "num_ppo_epochs", "epochs"), (configs.TrainConfig, "kl", "kl_coef"),
        (configs.TrainConfig, "output_dir", "out"), (configs.TrainConfig, "grup_size", "group_size"),
        (configs.SftConfig, "epochs", "steps"), (configs.SftConfig, "batch", "batch_size"),
        (configs.SftConfig, "num_generations", None), (configs.PreferConfig, "kl_coef", "beta"),
        (configs.PretrainConfig, "batch_size", "batch_tokens"), (configs.SampleConfig, "num_generations", "n"),
        (configs.LiveConfig, "learning_rate", "lr"), (configs.EvalConfig, "learning_rate", None),
        (configs.TrainConfig, "gibberish", None),
    ],
)  # fmt: skip
def test_a_name_from_elsewhere_is_answered_with_ours(cls: type, name: str, own: str | None) -> None:
    with pytest.raises(OperantError, match=f"^{cls.__name__} has no setting --{name}; ") as fault:
        cls(**{name: 1})
    assert (f"did you mean --{own}?" in str(fault.value)) == (own is not None)
    assert ("did you mean" in str(fault.value)) == (own is not None)


@pytest.mark.parametrize("cls", CLASSES)
def test_no_name_from_elsewhere_is_a_mystery_or_hides_a_setting(cls: type) -> None:
    """Whatever the table says, it never points at a setting that the configuration lacks."""
    fields = configs.setting_types(cls)
    for others in configs._ELSEWHERE.values():
        for name in others.split():
            assert name in fields or configs.meant_setting(name, cls) in {*fields, None}


def test_the_reward_stage_answers_a_wrong_keyword_in_one_line() -> None:
    with pytest.raises(OperantError, match="did you mean --lr"):
        operant.train(None, [], "chrf", learning_rate=1e-4)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("lrr: 3", "did you mean --lr"), ("learning-rate: 3", "did you mean --lr"),
        ("lr: fast", "lr"), ("lr: -1", "lr is -1.0"), ("- lr", "lr"), ("lr: [", "parsing"),
        (None, "No such file"), (b"\xff", "utf-8"), ("max_sick_steps: 7\nmax_nonfinite_steps: 8", "two names"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_configuration(text: str | bytes | None, told: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "c.yaml").write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(OperantError, match=told):
        configs.load_config(tmp_path / "c.yaml", configs.TrainConfig)


@pytest.mark.parametrize("cls", CLASSES)
def test_every_number_has_its_range_on_its_field(cls: type) -> None:
    for name, hint in configs.setting_types(cls).items():
        assert all(limited for kind, limited in kinds(hint) if kind in (int, float)), name


@pytest.mark.parametrize("hint", ["int", "float | None", "list[int]", "float | Literal['auto']", "Annotated[int, 'x']"])
def test_a_number_without_a_range_cannot_be_written(hint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong:
        pass

    Wrong.__module__ = configs.__name__
    Wrong.__annotations__ = {"amount": hint}
    Wrong.amount = None  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match=r"Wrong\.amount is a number without a range"):
        configs.settings(Wrong)


def outside(cls: type, setting: str) -> Any:
    """A value of the right kind that the setting refuses. Every number refuses an infinity at the least."""
    for value in (-2, 10**30, math.inf):
        given = [value] if "list" in configs.describe(configs.setting_types(cls)[setting]) else value
        try:
            cls(**{setting: given})
        except OperantError:
            return given
    raise AssertionError(f"{cls.__name__}.{setting} takes every number")


@pytest.mark.parametrize("cls", CLASSES)
def test_every_number_is_checked_in_python(cls: type) -> None:
    for setting in numbers(cls):
        for wrong in (outside(cls, setting), math.nan, math.inf, -math.inf, 10**400, "many", True, [1, "two"]):
            with pytest.raises(OperantError, match=rf"^{setting} is .*; it must be .*: correct --{setting}$"):
                cls(**{setting: wrong})
            config = cls()
            setattr(config, setting, wrong)
            with pytest.raises(OperantError, match=f"^{setting} is "):
                configs.check_settings(config)


@pytest.mark.parametrize("name", [name for name, cls in COMMANDS.items() if numbers(cls)])
def test_every_command_checks_its_numbers_whoever_gives_them(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """By flag, by YAML and in Python, in one line that names the flag. The command itself is never called."""
    program, cls, file = Program(capsys), COMMANDS[name], tmp_path / "given.yaml"
    for setting in numbers(cls):
        value = outside(cls, setting)
        with pytest.raises(OperantError, match=rf"{setting} is .*; it must be .*correct --{setting}$") as fault:
            cls(**{setting: value})
        assert "\n" not in str(fault.value)
        line = program.fault(name, f"--{setting}", str(value).replace("inf", ".inf"))  # as YAML spells it
        assert re.fullmatch(rf"{setting} is .*; it must be .*: correct --{setting}", line), line
        file.write_text(yaml.safe_dump({setting: value}))
        assert program.fault(name, "--config", file) == line


def test_every_setting_says_what_it_is() -> None:
    for name, cls in COMMANDS.items():
        told = "\n".join(inspect.getdoc(one) or "" for one in cls.__mro__)
        assert not [n for n in configs.setting_types(cls) if f"    {n}: " not in told], name


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"lr": -1}, "lr is -1; it must be 0 or more, or auto: correct --lr"),
        ({"steps": 1.5}, "steps is 1.5; it must be a whole number, 1 or more: correct --steps"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be more than 0 and at most 1: correct --top_p"),
        ({"seed": 2**63}, f"seed is {2**63}; it must be between 0 and 2^63 - 1: correct --seed"),
        ({"limit": 0}, "limit is 0; it must be 1 or more, or null: correct --limit"),
        ({"beta": math.inf}, "beta is inf; it must be finite, or auto: correct --beta"),
        ({"lam": "most"}, "lam is 'most'; it must be a number, between 0 and 1, or auto: correct --lam"),
        ({"stop": "END"}, "stop is 'END'; it must be a list of texts, each not empty: correct --stop"),
        ({"stop": ["a", ""]}, "stop is ['a', '']; it must be a list of texts, each not empty: correct --stop"),
    ],
)
def test_refusals_say_what_may_be(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(OperantError, match=f"^{re.escape(told)}$"):
        configs.TrainConfig(**settings)


@pytest.mark.parametrize(("block", "allowed"), [(0, True), (1, False), (2, True), (-2, False)])
def test_a_block_is_left_out_or_has_room_for_a_step(block: int, allowed: bool) -> None:
    if allowed:
        assert configs.PretrainConfig(block=block).block == block
    else:
        with pytest.raises(OperantError, match="it must be 2 or more, or 0"):
            configs.PretrainConfig(block=block)


def test_edges_are_allowed_and_kept_as_given() -> None:
    edges = {
        "gamma": 0.0, "top_p": 1.0, "seed": 2**63 - 1, "eval_prompts": 0, "log_samples": 0, "lr": 0.0,
        "reward_workers": -1, "limit": None, "stop": ["END"], "lam": "auto",
    }  # fmt: skip
    made = configs.TrainConfig(**edges)
    assert {name: getattr(made, name) for name in edges} == edges
    text = configs.PretrainConfig(max_length=2, mean_span=1.0)
    assert (text.max_length, text.mean_span) == (2, 1.0)


def test_former_names_are_read() -> None:
    assert configs.SftConfig(max_sick_steps=5).max_nonfinite_steps == 5  # type: ignore[call-arg]
    assert configs.current_names({"max-sick-steps": 5, "prompt-field": "en"}) == {
        "max_nonfinite_steps": 5, "prompt_field": "en",
    }  # fmt: skip
    with pytest.raises(OperantError, match="max_nonfinite_steps is given under two names"):
        configs.current_names({"max_sick_steps": 1, "max_nonfinite_steps": 2})


def test_what_a_stored_configuration_lacks_is_what_was_in_force() -> None:
    """A key younger than the run has its default, unless something else held before there was the key."""
    stored = dataclasses.asdict(configs.TrainConfig(lr=0.5))
    for young in ("fisher_share", "clock", "stop", "max_nonfinite_steps"):
        del stored[young]
    whole = configs.completed(configs.TrainConfig, stored | {"max_sick_steps": 7})
    assert whole == dataclasses.asdict(configs.TrainConfig(lr=0.5, fisher_share=1.0, max_nonfinite_steps=7))


# --- what is not installed --------------------------------------------------------------------------------------------


def test_an_extra_is_installed_by_the_packages_it_stands_for(monkeypatch: pytest.MonkeyPatch) -> None:
    start = f"{shlex.quote(sys.executable)} -m pip install "
    assert install_line("tensorboard") == f"{start}tensorboard"
    assert install_line(extra="gym") == f"{start}'gymnasium>=1.0'"
    assert install_line(extra="postgres") == f"{start}'psycopg[binary]>=3.2'"
    assert all(f"'{package}>=" in install_line(extra="live") for package in ("fastapi", "sqlalchemy", "alembic"))
    source = Path(operant.__file__).parent
    named = {name for f in source.rglob("*.py") for name in re.findall(r"install_line\(extra='(\w+)'\)", f.read_text())}
    assert named >= {"gym", "live", "postgres", "wandb"}
    assert all("=" in install_line(extra=name) for name in named)

    def requires(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", requires)
    assert install_line(extra="gym") == f"{start}'{source.resolve().parent}[gym]'"
