"""The reward stage from its configuration: load what it names, and run the loop."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from operant.config import TrainConfig, check_settings
from operant.data.prompts import Pair, load_fitting_pairs, load_fitting_prompts, row_ids, settle_style
from operant.data.rows import Fields, Row, load_rows, load_split_rows
from operant.models.adapter import adapt
from operant.models.memory import expect_room_to_learn
from operant.models.policy import Policy, resolve_device
from operant.rl.logged import read_logged
from operant.rl.loop import Callback, TrainResult, train
from operant.run.run import Quiet, as_begun
from operant.types import Completion, OperantError, Prompt


def train_from(config: TrainConfig, *, callbacks: Sequence[Callback] = (), quiet: Quiet = False) -> TrainResult:
    """Improve a policy on a reward, all of it as `config` says: `train` with what it names loaded.

    config: `model` and `lora_rank` make the policy; `data`, `dev_data` and the columns the prompts and the held-out
        ones; `sft_data` the labelled pairs; or, in the place of `data`, `logged` a log, or `environment` episodes.
        `operant.load_config("train.yaml", operant.TrainConfig)` reads one from a file.
    callbacks: called as (step, metrics) after each step, True stops.
    quiet: print nothing; "settings" leaves out the configuration alone.

    Raises OperantError where `train` does, when no model or data is named or two sources of prompts are, and when what
    is named cannot be loaded.
    """
    check_settings(config)
    config = as_begun(config)
    if not config.model:
        raise OperantError("--model is missing; give a model folder or hub id to start from")
    rows, dev_rows = _rows(config)
    expect_room_to_learn(config.model, config.lora_rank, config.dtype, resolve_device(config.device))
    policy = Policy.load(config.model, device=config.device, dtype=config.dtype)
    adapt(policy, config, config.seed)
    departures = settle_style(policy, config)
    for note in departures if quiet is not True else ():
        print(note, file=sys.stderr)
    prompts, dev_prompts = (
        load_fitting_prompts(part, policy, config, room=config.max_tokens) for part in (rows, dev_rows)
    )
    return train(
        policy, [] if config.logged else prompts, None if config.environment else config.reward, config,
        dev_prompts=dev_prompts, pairs=_pairs(config, policy, quiet),
        logged=_logged(config, policy, rows, prompts) if config.logged else [], callbacks=callbacks, quiet=quiet,
    )  # fmt: skip


def _rows(config: TrainConfig) -> tuple[list[Row], list[Row]]:
    """(rows to learn from, held-out rows), none of the first with an environment."""
    if config.data and (config.environment or config.logged):
        flag = "--environment" if config.environment else "--logged"
        raise OperantError(
            f"{flag} takes the place of --data; leave one of them out (--dev_data measures beside a log)"
        )
    if config.logged:
        rows = load_rows(config.logged, limit=config.limit)
        measured = config.dev_data and config.eval_prompts
        return rows, load_rows(config.dev_data or "", split="dev", limit=config.eval_prompts) if measured else []
    if config.environment:
        return [], []
    return load_split_rows(config.data, config.dev_data, config.limit, 0.05, config.eval_prompts)


def _pairs(config: TrainConfig, policy: Policy, quiet: Quiet) -> list[Pair]:
    """The labelled pairs of `sft_data`. What was cut or left out of them is said, unless `quiet` is True."""
    if not config.sft_data:
        return []
    pairs, notes = load_fitting_pairs(load_rows(config.sft_data), policy, config, "labelled")
    for note in notes if quiet is not True else ():
        print(note, file=sys.stderr)
    return pairs


def _logged(
    config: TrainConfig, policy: Policy, rows: Sequence[Row], prompts: Sequence[Prompt]
) -> list[tuple[Prompt, Completion, Any]]:
    """The log's completions beside their prompts, of which `too_long` may have left some out."""
    names = row_ids(rows, Fields(prompt=config.prompt_field, references=config.reference_field))
    place = {name: i for i, name in enumerate(names)}
    return read_logged(rows, prompts, policy.codec, places=[place[p.id] for p in prompts], vocabulary=policy.vocabulary)
