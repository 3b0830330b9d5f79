"""The stages through the program: the whole circle on three kinds of model, run folders, resume, and killed saves."""

from __future__ import annotations

import dataclasses
import errno
import importlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import yaml
from forks import Forked
from program import ON_CPU, QUIET_RUN, Outcome, Program, pairs, read_rows, write_rows

import operant
from operant.algorithms.table import ALGORITHMS, STAGE_RATES
from operant.cli import main
from operant.config import PreferConfig, PretrainConfig, RewardModelConfig, SftConfig, TrainConfig
from operant.data.prompts import load_fitting_pairs
from operant.models.encoder import Encoder
from operant.models.policy import Policy, is_pretrained
from operant.run import checkpoint
from operant.run.run import Run
from operant.stages.pretrain import text_infilling
from operant.stages.supervised import all_texts
from operant.types import OperantError

TRAIN = (
    "--reward", "chrf", "--steps", 2, "--prompts_per_step", 3, "--group_size", 2, "--max_tokens", 6,
    "--eval_prompts", 3, "--eval_every", 1, "--log_samples", 2, *QUIET_RUN,
)  # fmt: skip


@pytest.fixture
def program(capsys: pytest.CaptureFixture[str]) -> Program:
    return Program(capsys)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_rows(tmp_path / "texts.jsonl", [{"text": f"{row['prompt']} {row['completion']}"} for row in pairs()])
    return write_rows(tmp_path / "pairs.jsonl", pairs())


@pytest.fixture
def model(make_policy: Any, tmp_path: Path) -> Path:
    make_policy("gpt2").save(tmp_path / "start")
    return tmp_path / "start"


Stage = Callable[[bool | Literal["settings"]], Any]


@pytest.fixture
def stages(make_policy: Any, model: Path, data: Path, tmp_path: Path) -> dict[str, Stage]:
    """Every stage in Python, on one optimizer step, as a function of `quiet`."""
    given: dict[str, Any] = {"steps": 1, "device": "cpu", "threads": 1, "tensorboard": False}
    learn = {**given, "data": str(data)}
    pretraining = {**learn, "text_field": "prompt", "vocab_size": 280, "max_length": 48}
    preferred = [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": f"no {row['prompt']}"} for row in pairs()
    ]
    preferences = str(write_rows(tmp_path / "preferences.jsonl", preferred))
    sampled: dict[str, Any] = {"prompts_per_step": 2, "group_size": 2, "max_tokens": 4, "eval_prompts": 2}
    rewarded = {**given, **sampled, "out": str(tmp_path / "train"), "overwrite": True}

    def fresh(name: str) -> dict[str, Any]:
        return {"out": str(tmp_path / name), "overwrite": True}

    def trained(quiet: Any) -> Any:
        prompts = operant.load_prompts(pairs(), (policy := make_policy("gpt2")).codec)
        return operant.train(policy, prompts[:4], "chrf", dev_prompts=prompts[4:6], quiet=quiet, **rewarded)

    return {
        "pretrain": lambda quiet: operant.pretrain(PretrainConfig(**pretraining, **fresh("p")), quiet=quiet),
        "masked": lambda quiet: operant.pretrain_masked(
            PretrainConfig(**pretraining, **fresh("m"), arch="bert"), quiet=quiet
        ),
        "sft": lambda quiet: operant.sft(
            SftConfig(**learn, **fresh("s"), model=str(model), max_prompt_tokens=8, too_long="truncate"), quiet=quiet
        ),
        "prefer": lambda quiet: operant.prefer(
            PreferConfig(**(learn | {"data": preferences}), **fresh("d"), model=str(model)), quiet=quiet
        ),
        "reward-model": lambda quiet: operant.train_reward_model(
            RewardModelConfig(**(learn | {"data": preferences}), **fresh("r"), model=str(model)), quiet=quiet
        ),
        "train": trained,
        "train_from": lambda quiet: operant.train_from(
            TrainConfig(
                **rewarded, data=str(data), model=str(model), sft_coef=0.1, sft_data=str(data), max_prompt_tokens=8,
                too_long="truncate",
            ),
            quiet=quiet,
        ),
    }  # fmt: skip


NAMES = ("pretrain", "masked", "sft", "prefer", "reward-model", "train", "train_from")
BEGINS = {
    "pretrain": "38 texts, 2 held out (the end of ", "masked": "38 texts, 2 held out (the end of ",
    "sft": "36 labelled pairs, 4 held out (the end of ", "prefer": "36 pairs, 4 held out (the end of ",
    "reward-model": "36 comparisons, 4 held out (the end of ", "train": "4 prompts, 2 held out; ",
    "train_from": "38 prompts, 2 held out (the end of ",
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_quiet_stage_prints_nothing(name: str, stages: dict[str, Stage], capfd: pytest.CaptureFixture[str]) -> None:
    stages[name](True)
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize("name", NAMES)
def test_a_stage_begins_with_what_it_has_before_it(
    name: str, stages: dict[str, Stage], capfd: pytest.CaptureFixture[str]
) -> None:
    stages[name]("settings")
    out, err = capfd.readouterr()
    first = next(line for line in err.splitlines() if " parameters, " in line)
    command = {"masked": "pretrain", "train_from": "train"}.get(name, name)
    assert first.startswith(f"{command}: {BEGINS[name]}") and first.endswith(" parameters, all trainable; cpu, float32")
    assert out == "" and "seed: 0" not in err


MADE = {
    "pretrain": 1e-3, "masked": 1e-3, "sft": 5e-4, "prefer": 2e-5, "reward-model": 3e-4, "train": 1e-4,
    "train_from": 1e-4,
}  # fmt: skip
FULL = {"sft": STAGE_RATES["sft"], "reward-model": STAGE_RATES["reward-model"], "prefer": ALGORITHMS["dpo"].rates}


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize("pretrained", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_auto_is_the_rate_of_what_is_trained_and_is_kept_and_said(
    name: str, pretrained: bool, stages: dict[str, Stage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A tiny model counts as made here. With the bound at nothing it counts as pretrained, and new ones do not."""
    if pretrained:
        monkeypatch.setattr("operant.models.policy.SMALL", 0)
    stages[name]("settings")
    out = {"pretrain": "p", "masked": "m", "sft": "s", "prefer": "d", "reward-model": "r"}.get(name, "train")
    rate = MADE[name]
    if pretrained and out not in ("p", "m"):
        rate = FULL.get(name, ALGORITHMS["rloo"].rates).full
        assert rate < MADE[name]
    assert yaml.safe_load((tmp_path / out / "config.yaml").read_text())["lr"] == rate
    what = "pretrained model" if rate < MADE[name] else "model made here"
    assert f"learning rate {rate:g}, for all weights of a {what} (--lr auto)" in capfd.readouterr().err
    logged = [row["train/lr"] for row in read_rows(tmp_path / out / "metrics.jsonl") if "train/lr" in row]
    assert 0 < logged[-1] <= rate


@pytest.mark.parametrize("given", [[], ["--lora_rank", 2]])
def test_an_adapter_on_a_pretrained_model_has_a_rate_of_its_own(
    given: list[Any], program: Program, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("operant.models.policy.SMALL", 0)
    for stage, rates, more in (
        ("train", ALGORITHMS["rloo"].rates, TRAIN),
        ("sft", STAGE_RATES["sft"], ("--steps", 1, "--max_tokens", 6, *QUIET_RUN)),
    ):
        out = tmp_path / stage
        done = program(stage, "--model", model, "--data", data, "--out", out, *given, *more)
        assert done.status == 0, done.err
        rate = rates.lora if given else rates.full
        assert yaml.safe_load((out / "config.yaml").read_text())["lr"] == rate
        what = "an adapter on" if given else "all weights of"
        assert f"learning rate {rate:g}, for {what} a pretrained model (--lr auto)" in done.err


def test_a_resumed_run_keeps_the_rate_that_it_began_with(
    program: Program, model: Path, data: Path, tmp_path: Path
) -> None:
    """What `auto` means has changed since: the number in config.yaml is the run's."""
    for stage, more in (("train", TRAIN), ("sft", ("--steps", 2, "--max_tokens", 6, *QUIET_RUN))):
        out = tmp_path / stage
        start = (stage, "--model", model, "--data", data, "--out", out, *more, "--warmup_steps", 0)
        program(*start)
        kept = yaml.safe_load((out / "config.yaml").read_text())
        (out / "config.yaml").write_text(yaml.safe_dump(kept | {"lr": 0.00123}))
        done = program(*start, "--steps", 3, "--resume", "true")
        assert done.status == 0, done.err
        logged = [row["train/lr"] for row in read_rows(out / "metrics.jsonl") if "train/lr" in row]
        assert logged == [kept["lr"], kept["lr"], 0.00123]
        assert yaml.safe_load((out / "config.yaml").read_text())["lr"] == 0.00123


def test_a_model_made_here_says_so_through_every_stage(
    program: Program, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("operant.models.policy.SMALL", 0)
    short = ("--steps", 1, "--max_length", 48, "--vocab_size", 280, *QUIET_RUN)
    program("pretrain", "--data", tmp_path / "texts.jsonl", "--out", tmp_path / "p", *short)
    begun = tmp_path / "p" / "model"
    program(
        "sft", "--model", begun, "--data", data, "--lora_rank", 2, "--out", tmp_path / "s", "--steps", 1, *QUIET_RUN
    )
    program("train", "--model", tmp_path / "s" / "model", "--data", data, "--out", tmp_path / "t", *TRAIN)
    for folder in ("p", "s", "t"):
        assert not is_pretrained(Policy.load(tmp_path / folder / "model", device="cpu").model)
    program("pretrain", "--arch", "bert", "--data", tmp_path / "texts.jsonl", "--out", tmp_path / "b", *short)
    encoder = Encoder.load(tmp_path / "b" / "model", device="cpu")
    assert not is_pretrained(encoder.model) and not is_pretrained(encoder.with_decoder().model)


def test_the_first_line_tells_what_of_the_model_is_trained(program: Program, model: Path, data: Path,
                                                           tmp_path: Path) -> None:  # fmt: skip
    outcome = program("sft", "--model", model, "--data", data, "--steps", 1, "--lora_rank", 2, "--out",
                      tmp_path / "run", *QUIET_RUN)  # fmt: skip
    (line,) = [line for line in outcome.err if " parameters, " in line]
    every, learned = (int(n.replace(",", "")) for n in re.findall(r"([\d,]+) (?:parameters|trainable)", line))
    assert 0 < learned < every / 4


def test_eval_takes_the_test_split_and_says_so(program: Program, model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    write_rows(folder / "dev.jsonl", pairs(5))
    command = ("eval", "--model", model, "--data", folder, "--max_tokens", 2, "--json", *ON_CPU)
    before = program(*command)
    assert f"eval: 5 rows of the dev split of {folder}; " in before.err[0]
    assert " parameters; cpu, float32" in before.err[0]
    write_rows(folder / "test.jsonl", pairs(3))
    after = program(*command)
    assert f"eval: 3 rows of the test split of {folder}; " in after.err[0]
    assert json.loads(after.out)["length"] > 0
    alone = program("eval", "--model", model, "--data", folder / "dev.jsonl", "--max_tokens", 2, *ON_CPU)
    assert f"eval: 5 rows of {folder / 'dev.jsonl'}; " in alone.err[0]


def test_rows_with_a_missing_cell_are_counted_where_they_are_left_out(
    program: Program, model: Path, tmp_path: Path
) -> None:
    rows = [*pairs(5), {"prompt": "red", "completion": float("nan")}]
    told = program("eval", "--model", model, "--data", write_rows(tmp_path / "a.jsonl", rows), "--max_tokens", 2,
                   *ON_CPU)  # fmt: skip
    assert "6 rows of " in told.err[0] and "(1 without references, which count in no metric" in told.err[0]
    texts = [{"text": float("nan")}, *({"text": row["prompt"]} for row in pairs(12))]
    told = program("pretrain", "--data", write_rows(tmp_path / "b.jsonl", texts), "--steps", 1, "--vocab_size", 280,
                   "--max_length", 16, "--batch_tokens", 32, "--out", tmp_path / "run", *QUIET_RUN)  # fmt: skip
    assert told.status == 0
    assert "1 of 13 rows have no text and were left out" in told.err


def whole(run: Path) -> None:
    """A finished run folder has all that it should."""
    assert isinstance(yaml.safe_load((run / "config.yaml").read_text()), dict)
    assert read_rows(run / "metrics.jsonl")
    assert (run / "model" / "config.json").exists() and (run / "model" / "tokenizer.json").exists()
    assert "</html>" in (run / "report.html").read_text()
    assert any(file.read_bytes().startswith(b"\x89PNG") for file in (run / "curves").glob("*.png"))
    latest = checkpoint.latest(run / "checkpoints")
    assert latest is not None and checkpoint.verify(latest) is None
    assert json.loads((run / "run.json").read_text())["stop_reason"]
    assert not [file for file in run.rglob(".*") if file.name != ".lock"]


@pytest.mark.parametrize(
    ("arch", "vocabulary"),
    [
        pytest.param("llama", 288, marks=pytest.mark.draws),
        ("gpt2", 288),
        pytest.param("t5", 376, marks=pytest.mark.draws("train")),
        ("mbart", 376),
    ],
)
def test_the_whole_circle(arch: str, vocabulary: int, program: Program, data: Path, tmp_path: Path) -> None:
    def ran(*arguments: object) -> Outcome:
        outcome = program(*arguments)
        assert outcome.status == 0, outcome
        return outcome

    pre, sft, run = tmp_path / "pretrain", tmp_path / "sft", tmp_path / "train"
    ran(
        "pretrain", "--data", tmp_path / "texts.jsonl", "--arch", arch, "--vocab_size", vocabulary, "--max_length", 48,
        "--steps", 2, "--batch_tokens", 128, "--accumulate", 2, "--eval_every", 1, "--out", pre, *QUIET_RUN,
    )  # fmt: skip
    told = ran(
        "sft", "--model", pre / "model", "--data", data, "--steps", 3, "--batch_size", 4, "--eval_every", 1,
        "--label_smoothing", 0.1, "--out", sft, *QUIET_RUN,
    )  # fmt: skip
    assert "dev loss" in told.out and str(sft / "model") in told.out
    told = ran("train", "--model", sft / "model", "--data", data, "--dense", "--out", run, *TRAIN)
    assert any(line.startswith("train in ") for line in told.err)  # the resolved configuration is shown
    assert "  reward: chrf" in told.err and "chrf" in told.out
    for folder in (pre, sft, run):
        whole(folder)
    assert len(read_rows(run / "samples.jsonl")) == 3 * 2
    losses = [row["train/loss"] for row in read_rows(sft / "metrics.jsonl") if "train/loss" in row]
    assert len(losses) == 3

    told = ran("eval", "--model", run / "model", "--data", data, "--limit", 4, "--max_tokens", 6, "--json", *ON_CPU)
    values = json.loads(told.out)
    assert {"bleu", "chrf", "rougeL", "exact", "length"} <= values.keys()
    told = ran(
        "sample", "--model", run / "model", "--prompt", "red cat", "--n", 2, "--max_tokens", 5, "--json", *ON_CPU
    )
    samples = [json.loads(line) for line in told.out.splitlines()]
    assert len(samples) == 2
    for row in samples:
        assert len(row["tokens"]) == len(row["behavior_logprobs"]) <= 5
        assert row["logprob"] == pytest.approx(sum(row["behavior_logprobs"]), abs=1e-3)  # at temperature 1


def test_the_reward_stage_runs_from_a_file_in_python(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = write_rows(tmp_path / "labelled.jsonl", [*pairs(4), {"prompt": "b" * 300, "completion": "c"}])
    settings = {
        "model": str(model), "data": str(data), "sft_data": str(long), "sft_coef": 0.5, "steps": 2,
        "prompts_per_step": 3, "group_size": 2, "max_tokens": 6, "eval_prompts": 3, "too_long": "skip", "seed": 5,
        "device": "cpu", "threads": 1, "tensorboard": False, "out": str(tmp_path / "run"),
    }  # fmt: skip
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(settings))
    config = operant.load_config(tmp_path / "train.yaml", operant.TrainConfig)
    seen: list[int] = []
    result = operant.train_from(config, callbacks=[lambda step, metrics: seen.append(step)], quiet="settings")
    assert "1 of 5 labelled pairs are too long and were left out" in capsys.readouterr().err
    assert seen == [1, 2] and result.steps == 2 and {"chrf", "reward"} <= result.best.keys()
    whole(tmp_path / "run")
    # what the run kept is such a file itself, and makes the same run again, which the program makes too
    again = operant.load_config(tmp_path / "run" / "config.yaml", operant.TrainConfig)
    operant.train_from(dataclasses.replace(again, out=str(tmp_path / "again")))
    main(["train", "--config", str(tmp_path / "train.yaml"), "--out", str(tmp_path / "program")])
    runs = [checkpoint.latest(tmp_path / name / "checkpoints") for name in ("run", "again", "program")]
    weights = [(run / "model" / "model.safetensors").read_bytes() for run in runs if run is not None]
    assert len(weights) == 3 and len(set(weights)) == 1


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, "--model is missing"),
        ({"model": "m"}, "no data given"),
        ({"model": "m", "data": "d", "environment": "e"}, "--environment takes the place of --data"),
        ({"model": "m", "data": "d", "logged": "l"}, "--logged takes the place of --data"),
        ({"steps": 0}, "steps is 0"),
    ],
)
def test_a_reward_stage_that_cannot_be_loaded(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(OperantError, match=told):
        operant.train_from(operant.TrainConfig(**settings))


def test_a_new_tokenizer_reads_nested_columns_and_chats() -> None:
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    rows = [{"id": 7, "translation": {"en": "one", "de": ["eins", None]}}, {"messages": chat}]
    assert all_texts(rows) == ["one", "eins", "user", "hi", "assistant", "yo"]


@pytest.mark.parametrize("length", [2, 3, 7, 40])
def test_infilling_hides_spans_behind_one_kind_of_mask_and_asks_for_the_whole_text(length: int) -> None:
    tokens, sentinels = np.arange(100, 100 + length), [5, 6, 7, 8, 9]
    for seed in range(20):
        source, target = text_infilling(tokens, sentinels, np.random.default_rng(seed))
        assert np.array_equal(target, tokens)
        kept = source[source != 5]
        assert np.isin(kept, tokens).all() and (np.diff(kept) > 0).all()  # the order stays
        assert 1 <= len(tokens) - len(kept) == max(1, round(0.3 * length)) and not np.isin(source, sentinels[1:]).any()
        assert not ((source[1:] == 5) & (source[:-1] == 5)).any()  # one mask for a whole span


def test_pretraining_by_an_objective_of_another_family_is_refused(program: Program, data: Path, tmp_path: Path) -> None:
    line = program.fault(
        "pretrain", "--data", data, "--text_field", "prompt", "--objective", "infilling", "--out", tmp_path / "run",
        "--vocab_size", 288, *QUIET_RUN,
    )  # fmt: skip
    assert "infilling" in line and "causal" in line


def test_a_lora_run_gives_a_folder_that_loads(program: Program, model: Path, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert program("train", "--model", model, "--data", data, "--lora_rank", 2, "--out", run, *TRAIN).status == 0
    assert Policy.load(run / "model", device="cpu").is_lora
    assert (
        program("eval", "--model", run / "model", "--data", data, "--limit", 2, "--max_tokens", 3, *ON_CPU).status == 0
    )


def test_the_first_checkpoint_names_its_base_and_the_model_is_a_link(
    program: Program, model: Path, data: Path, tmp_path: Path
) -> None:
    """Of whole weights two steps leave one copy."""
    run = tmp_path / "run"
    assert program("sft", "--model", model, "--data", data, "--steps", 2, "--eval_every", 1, "--batch_size", 4,
                   "--lr", 0.01, "--out", run, *QUIET_RUN).status == 0  # fmt: skip
    last = checkpoint.latest(run / "checkpoints")
    assert last is not None and last.name == "step-00000002"
    weights = {file.relative_to(run).as_posix(): file.stat().st_ino for file in run.rglob("model.safetensors")}
    saved = {name: inode for name, inode in weights.items() if name.startswith("checkpoints")}
    assert saved and all("step-00000000" not in name for name in saved)
    assert weights["model/model.safetensors"] in saved.values()
    assert not (run / "model" / "base.json").exists()
    first = Policy.load(run / "checkpoints" / "step-00000000" / "model", device="cpu") if len(saved) == 1 else None
    assert first is None or torch.equal(next(first.model.parameters()), next(Policy.load(model).model.parameters()))


def test_a_run_that_never_got_better_ends_with_the_weights_that_it_began_with(
    program: Program, model: Path, data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = ("sft", "--model", model, "--data", data, "--lr", 30, "--max_grad_norm", 1000, "--eval_every", 1,
               "--batch_size", 4, "--out", run, *QUIET_RUN)  # fmt: skip
    assert program(*command, "--steps", 1).status == 0
    best = json.loads((run / "run.json").read_text())
    assert best["best_step"] == 0 and not [*(run / "checkpoints").glob("step-00000000*/model/*.safetensors")]
    there, begun = run / "model" / "model.safetensors", model / "model.safetensors"
    assert there.read_bytes() == begun.read_bytes() and there.stat().st_ino == begun.stat().st_ino
    # and from that checkpoint, which has no weights of its own, a run goes on
    shutil.rmtree(next((run / "checkpoints").glob("step-00000001")))
    assert program(*command, "--steps", 1, "--resume").status == 0
    saved = checkpoint.latest(run / "checkpoints")
    assert saved is not None and saved.name == "step-00000001"
    for folder in (run / "checkpoints").glob("step-00000000*"):
        model.rename(tmp_path / "elsewhere")
        with pytest.raises(OperantError, match=r"the base of .*step-00000000.*, .*start from there, is gone"):
            Policy.load(folder / "model", device="cpu")
        (tmp_path / "elsewhere").rename(model)


def test_runs_with_lora_leave_adapters_alone_in_stage_after_stage(
    program: Program, model: Path, data: Path, tmp_path: Path
) -> None:
    sft, run = tmp_path / "sft", tmp_path / "run"
    short = ("--steps", 2, "--batch_size", 4, "--eval_every", 1, "--out", sft, *QUIET_RUN)
    assert program("sft", "--model", model, "--data", data, "--lora_rank", 2, *short).status == 0
    learn = ("--model", sft / "model", "--data", data, "--kl_coef", 0.1, "--out", run, *TRAIN)
    assert program("train", *learn).status == 0  # which goes on with the adapter; the reference is a second one
    weights = {file.name for folder in (sft, run) for file in folder.rglob("*.safetensors")}
    assert weights == {"adapter_model.safetensors"}
    base = json.loads((run / "model" / "base.json").read_text())
    assert (run / "model" / base["path"]).resolve() == model.resolve()
    assert program("train", *learn, "--steps", 3, "--resume").status == 0
    moved = tmp_path / "all"
    moved.mkdir()
    for folder in (model, sft, run):
        folder.rename(moved / folder.name)
    assert Policy.load(moved / "run" / "model", device="cpu").is_lora
    assert all(Policy.load(f, device="cpu").is_lora for f in (moved / "run" / "checkpoints").glob("step-*/model"))


def test_sample_reads_lines_and_eval_writes_them(
    program: Program, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = tmp_path / "lines.txt"
    lines.write_bytes("red cat\r\nblué dog\n\nlast".encode())
    with lines.open() as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        told = program("sample", "--model", model, "--max_tokens", 3, "--temperature", 0, "--json", *ON_CPU)
    assert [json.loads(line)["prompt"] for line in told.out.splitlines()] == ["red cat", "blué dog", "", "last"]
    kept = tmp_path / "answers.jsonl"
    told = program(
        "eval", "--model", model, "--data", data, "--limit", 3, "--max_tokens", 3, "--samples", kept, *ON_CPU
    )
    assert told.status == 0 and "bleu" in told.out
    rows = read_rows(kept)
    assert [row["references"] for row in rows] == [[row["completion"]] for row in pairs()[:3]]
    again = program("score", "--reward", "chrf", "--data", kept, "--json")  # what eval wrote, score reads
    assert len(again.out.splitlines()) == 3


def test_best_weights_are_the_result(program: Program, model: Path, data: Path, tmp_path: Path) -> None:
    """A rate that ruins the model: the first measurement stays the best, and its weights are the result."""
    out = tmp_path / "run"
    program("sft", "--model", model, "--data", data, "--steps", 3, "--lr", 5, "--warmup_steps", 0, "--batch_size", 4,
            "--eval_every", 1, "--out", out, *QUIET_RUN)  # fmt: skip
    start, result = (Policy.load(p, device="cpu").model.state_dict() for p in (model, out / "model"))
    assert all(torch.equal(start[name], result[name]) for name in start)


def test_fine_tuning_by_a_metric_of_its_completions(
    program: Program, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best step is the metric's, not the loss's, and patience counts it."""
    told = iter([{"chrf": 1.0}, {"chrf": 3.0}, {"chrf": 2.0}, {"chrf": 3.0}, {"chrf": 9.0}])
    asked = []

    def evaluate(sampler: Any, prompts: Any, **options: Any) -> tuple[dict[str, float], list[Any]]:
        assert not sampler.policy.model.training
        asked.append([prompt.references for prompt in prompts])
        return next(told), []

    monkeypatch.setattr(importlib.import_module("operant.stages.sft"), "evaluate", evaluate)
    out = tmp_path / "run"
    command = (
        "sft", "--model", model, "--data", data, "--dev_data", data, "--steps", 9, "--batch_size", 4, "--eval_every", 1,
        "--best_metric", "chrf", "--patience", 2, "--eval_prompts", 3, "--out", out, *QUIET_RUN,
    )  # fmt: skip
    assert program(*command).status == 0
    facts = json.loads((out / "run.json").read_text())
    assert facts["best_step"] == 1 and facts["best_value"] == 3.0 and facts["steps"] == 3
    assert "dev chrf" in facts["stop_reason"]
    assert asked[0] == [(row["completion"],) for row in pairs()[:3]]


def test_a_pair_that_is_too_long_keeps_its_answer(make_policy: Any) -> None:
    policy = make_policy("gpt2")  # of 48 tokens
    long, answer = "b" * 300, "a" * 9
    rows = [{"prompt": p, "completion": c} for p, c in ((long, answer), ("b", answer), ("b", long), (long, long))]
    truncate = SftConfig(too_long="truncate")
    cut, notes = load_fitting_pairs(rows, policy, truncate, "training")
    first, short, long_answer, both = cut
    assert len(first.prompt.tokens) + len(first.completion_tokens) == 48 == policy.max_length
    assert first.completion_text == answer and first.completion_tokens[-1] == policy.codec.eos_id
    assert policy.codec.decode(first.prompt.tokens).endswith("bb\n")
    assert short.completion_text == answer and policy.codec.decode(short.prompt.tokens) == "b\n"
    assert policy.codec.decode(long_answer.prompt.tokens) == "b\n"
    assert len(long_answer.prompt.tokens) + len(long_answer.completion_tokens) == 48
    assert len(both.prompt.tokens) == len(both.completion_tokens) == 24
    assert both.completion_text == policy.codec.decode(both.completion_tokens)
    assert notes == ["3 of 4 training pairs are too long and were cut"]


def test_pairs_that_are_left_out_or_empty_are_counted(make_policy: Any) -> None:
    policy, long, skip = make_policy("gpt2"), "b" * 300, SftConfig(too_long="skip")
    rows = [{"prompt": "a", "completion": ["c", long, ""]}, {"prompt": long, "completion": "c"}]
    pairs, notes = load_fitting_pairs(rows, policy, skip, "training")
    assert [(pair.prompt.text, pair.completion_text) for pair in pairs] == [("a", "c"), ("a", "")]
    assert notes[0] == "2 of 4 training pairs are too long and were left out"
    assert notes[1].startswith("1 of 4 training pairs have an empty completion") and len(notes) == 2
    with pytest.raises(OperantError, match="every training pair is too long"):
        load_fitting_pairs(rows[1:], policy, skip, "training")


def test_a_run_that_holds_nothing_out(program: Program, model: Path, data: Path, tmp_path: Path) -> None:
    line = program.fault(
        "sft", "--model", model, "--data", data, "--best_metric", "bleu", "--eval_prompts", 0, "--out", tmp_path / "no",
        "--steps", 1, *QUIET_RUN,
    )  # fmt: skip
    assert "--eval_prompts above 0" in line
    for held_out in ((), ("--dev_data", data)):
        out = tmp_path / f"run-{len(held_out)}"
        command = ("train", "--model", model, "--data", data, "--out", out, *TRAIN, *held_out, "--eval_prompts", 0)
        assert program(*command).status == 0
        assert not any(name.startswith("eval/") for row in read_rows(out / "metrics.jsonl") for name in row)


def test_the_target_ends_a_run(program: Program, model: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    program("train", "--model", model, "--data", data, "--target", "length>=0", "--out", out, *TRAIN)
    facts = json.loads((out / "run.json").read_text())
    assert "target" in facts["stop_reason"] and facts["steps"] == 0


def test_minutes_of_the_processor_do_not_pass_while_others_work(
    program: Program, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worked, passed = itertools.count(0, 1), itertools.count(0, 1000)
    monkeypatch.setattr(time, "process_time", lambda: float(next(worked)))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(passed)))
    command = ("train", "--model", model, "--data", data, *TRAIN, "--max_minutes", 1.5)
    assert program(*command, "--out", tmp_path / "wall").status == 0
    assert program(*command, "--out", tmp_path / "cpu", "--clock", "cpu").status == 0
    reasons = [json.loads((tmp_path / name / "run.json").read_text())["stop_reason"] for name in ("wall", "cpu")]
    assert "time limit" in reasons[0] and "steps done" in reasons[1]
    rows = read_rows(tmp_path / "cpu" / "metrics.jsonl")
    assert [row["seconds"] for row in rows] == sorted(row["seconds"] for row in rows) and rows[-1]["seconds"] < 90


# --- run folders -----------------------------------------------------------------------------------------------------


def test_a_used_folder_is_refused_and_unchanged(program: Program, model: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = ("train", "--model", model, "--data", data, "--out", out, *TRAIN)
    assert program(*command).status == 0
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert "--resume" in program.fault(*command)
    assert "lr" in program.fault(*command, "--resume", "--lr", 0.5)
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    assert program(*command, "--resume", "--steps", 3).status == 0
    assert json.loads((out / "run.json").read_text())["steps"] == 3
    assert program(*command, "--overwrite").status == 0
    assert json.loads((out / "run.json").read_text())["steps"] == 2


def test_a_folder_in_use_is_refused(program: Program, model: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    code = (
        "import sys, time\nfrom operant.run.runlog import RunFolder\n"
        f"folder = RunFolder.open({str(out)!r}, 'a: 1')\nprint('ready', flush=True)\ntime.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "ready\n"
        line = program.fault("train", "--model", model, "--data", data, "--out", out, "--overwrite", *TRAIN)
        holder.kill()
    assert "in use" in line


def test_resume_without_a_run(program: Program, model: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "nowhere"
    line = program.fault("train", "--model", model, "--data", data, "--resume", "--out", out, *TRAIN)
    assert "no run to resume" in line and not out.exists()


# --- saves that fail -------------------------------------------------------------------------------------------------


def full_disk_after(monkeypatch: pytest.MonkeyPatch, saves: int) -> None:
    """Every save of a checkpoint after the first `saves` meets a full disk, in the middle of writing."""
    real, done = Policy.save, [0]

    def save(self: Policy, path: str | Path, **named: Any) -> None:
        done[0] += 1
        real(self, path, **named)
        if done[0] > saves:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Policy, "save", save)


def test_a_disk_that_is_full_at_once(
    program: Program, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    full_disk_after(monkeypatch, 0)
    outcome = program("train", "--model", model, "--data", data, "--out", out, *TRAIN)
    faults = [line for line in outcome.err if line.startswith("operant: ")]
    assert outcome.status == 1 and len(faults) == 1 and "full" in faults[0] and not out.exists()
    assert not any("Traceback" in line for line in outcome.err)


def test_a_disk_that_fills_up(
    program: Program, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    command = ("sft", "--model", model, "--data", data, "--steps", 4, "--batch_size", 4, "--save_every", 1,
               "--eval_every", 100, "--out", out, *QUIET_RUN)  # fmt: skip
    with monkeypatch.context() as patched:
        full_disk_after(patched, 3)
        outcome = program(*command)
    faults = [line for line in outcome.err if line.startswith("operant: ")]
    assert outcome.status == 1 and len(faults) == 1 and "full" in faults[0]
    assert not [p for p in (out / "checkpoints").iterdir() if p.name.startswith(".")]  # nothing half-written
    last = checkpoint.latest(out / "checkpoints")
    assert last is not None and checkpoint.verify(last) is None
    assert program(*command, "--resume").status == 0
    assert json.loads((out / "run.json").read_text())["steps"] == 4


def test_killed_in_the_middle_of_a_save(program: Program, model: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = ["sft", "--model", model, "--data", data, "--steps", 4, "--batch_size", 4, "--save_every", 1,
               "--eval_every", 100, "--out", out, *QUIET_RUN]  # fmt: skip
    code = (
        "import os, signal\nfrom operant.models.policy import Policy\nfrom operant.cli import main\n"
        "real, done = Policy.save, []\n"
        "def save(self, path, **named):\n"
        "    real(self, path, **named)\n"
        "    done.append(path)\n"
        "    if len(done) == 4:\n"
        "        (path / 'model.safetensors').write_bytes(b'half')\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        f"Policy.save = save\nmain({[str(part) for part in command]!r})\n"
    )
    with Forked([sys.executable, "-c", code]) as killed:
        assert killed.wait() == -signal.SIGKILL
    last = checkpoint.latest(out / "checkpoints")
    assert last is not None and checkpoint.verify(last) is None
    assert json.loads((last / "state.json").read_text())["step"] == 1  # the save of step 2 was cut off
    assert program(*command, "--resume").status == 0
    whole(out)
    steps = [row["step"] for row in read_rows(out / "metrics.jsonl") if "train/loss" in row]
    assert steps == [1, 2, 3, 4]  # no step twice


@pytest.mark.parametrize("stage", ["sft", "train", "pretrain"])
def test_a_chain_of_commands_ends_with_a_ctrl_c_that_saved(
    stage: str, program: Program, data: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`operant sft … && operant train …` must not go on from half a model."""
    given = {
        "sft": ("--model", model, "--data", data, *QUIET_RUN),
        "train": ("--model", model, "--data", data, "--reference_field", "completion", *TRAIN),
        "pretrain": ("--model", model, "--data", tmp_path / "texts.jsonl", "--text_field", "text", *QUIET_RUN),
    }[stage]
    real = Run.record

    def pressed(self: Run, *arguments: Any, **named: Any) -> None:
        real(self, *arguments, **named)
        if self.step == 1:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(Run, "record", pressed)
        assert program(stage, *given, "--steps", 2, "--out", tmp_path / "run").status == 130
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["steps"] == 1 and facts["stop_reason"] == "interrupted; go on with --resume"
    assert (tmp_path / "run" / "model" / "config.json").exists()
    assert program(stage, *given, "--steps", 2, "--out", tmp_path / "run", "--resume").status == 0
