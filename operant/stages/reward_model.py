"""Reward models: from scores, comparisons or labelled spans to a model that rewards completions."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from operant.config import RewardModelConfig
from operant.data.batch import microbatches
from operant.data.rows import Row, cell, find_column, held_out_source, is_chat, is_missing, load_split_rows, text_of
from operant.data.text import chars_to_tokens
from operant.models.adapter import adapt
from operant.models.reward_model import Reading, RewardFacts, RewardModel, reading_batch, reward_loss, write_facts
from operant.rewards.calibration import (
    brier_score,
    calibration_error,
    fit_affine,
    fit_temperature,
    log_loss,
    pearson,
    regression_slope,
    spearman,
)
from operant.run.files import replace_file
from operant.run.run import DataOrder, Quiet, Run
from operant.stages.masked import starting_encoder
from operant.stages.supervised import Measures, StageTask, all_texts, fit
from operant.types import Batch, Doubles, OperantError

_LABELS = {"comparison": "label_field", "regression": "score_field", "token": "span_field"}


@dataclass(slots=True)
class RewardModelResult:
    """The reward model with its best weights, calibrated, and what was measured on the held-out rows: a row of measures
    for the model and one for each baseline."""

    model: RewardModel
    out: Path
    steps: int
    seconds: float
    stop_reason: str
    measured: dict[str, Measures]


@dataclass(frozen=True, slots=True)
class Judgement:
    """One labelled row. readings: one completion, or the better and the worse of two. targets: float64, [1] a score,
    [T] token values (NaN where unlabelled), [0] for a comparison. first_won: whether the first column's won."""

    readings: tuple[Reading, ...]
    targets: Doubles
    first_won: bool = True

    @property
    def length(self) -> float:
        """Characters of the completion, or by how many the better one is longer."""
        sizes = [len(reading.text) for reading in self.readings]
        return float(sizes[0] - sizes[1] if len(sizes) == 2 else sizes[0])


def train_reward_model(
    config: RewardModelConfig,
    *,
    rows: Sequence[Row] | None = None,
    dev_rows: Sequence[Row] | None = None,
    quiet: Quiet = False,
) -> RewardModelResult:
    """Train until the held-out measure stops rising, keep the best, calibrate it on the held-out rows.

    Scores are normalised by the training rows' mean and deviation, which the saved model adds again. What is not given
    is loaded as `config` says. The report compares with two baselines fitted on the training rows: the completion's
    length, and the commonest answer (mean score, more frequent label).

    Raises OperantError for missing or empty data, unknown fields, values that are no labels, labels that are all the
    same, and completions that the model cannot hold.
    """
    with Run(config, "reward-model", quiet=quiet) as run:
        source, given = "", rows or ()
        if rows is None:
            source = held_out_source(config.data, config.dev_data) if dev_rows is None and config.data else ""
            rows, loaded = load_split_rows(config.data, config.dev_data, config.limit, 0.1, 500)
            dev_rows = loaded if dev_rows is None else dev_rows
        if not rows:
            raise OperantError("there are no rows to learn from; check --data and --limit")
        model = _starting_model(config, rows)
        facts = model.facts
        known, notes = read_judgements(rows, config, model, "training")
        held_out, more = read_judgements(dev_rows, config, model, "held-out") if dev_rows else ([], [])
        check_classes(known, config)
        if config.kind != "comparison":
            values = np.concatenate([j.targets[np.isfinite(j.targets)] for j in known])
            facts.mean, facts.std = float(values.mean()), float(values.std())
        what = "comparisons" if config.kind == "comparison" else "rated rows"
        run.takes(what, len(known), len(held_out), source, given=given)
        fit(run, model, RewardModelTask(model, config, known, held_out), config)
        for note in [*notes, *more]:
            run.note(note)
        measured: dict[str, Measures] = {}
        if held_out:
            measured = measure_and_calibrate(model, held_out, known)
            replace_file(run.folder.path / "results.json", json.dumps(measured, indent=1))
            run.log.samples(run.step, _sample_rows(model, held_out))
            if config.kind == "comparison" and measured["reward model"]["accuracy"] == 1.0:
                run.note(
                    f"all {len(held_out)} held-out comparisons come out right, so none says how sure a reward may be: "
                    f"its scale is bounded by their number, log-odds of about {math.log(len(held_out) + 1):.2g}"
                )
        facts.measured = measured
        result = RewardModelResult(model, run.folder.path, run.step, run.seconds, run.stop_reason, measured)
    # the run has put the best checkpoint's weights there; what was fitted after it belongs beside them
    write_facts(facts, result.out / "model")
    return result


def _starting_model(config: RewardModelConfig, rows: Sequence[Row]) -> RewardModel:
    """An untrained reward model on the encoder that `config` names, or on a new one."""
    encoder = starting_encoder(config, config.seed, config.device, config.dtype, all_texts(rows))
    adapt(encoder, config, config.seed)
    pool = config.pool if config.pool != "auto" else "last" if encoder.causal else "mean"
    return RewardModel(encoder, RewardFacts(config.kind, pool, config.separator), seed=config.seed)


class RewardModelTask(StageTask):
    """Foretell the labels of `known` judgements; measured on `held_out` ones by `quality` or the loss."""

    def __init__(
        self, model: RewardModel, config: RewardModelConfig, known: list[Judgement], held_out: list[Judgement]
    ) -> None:
        self.model, self.config, self.known, self.held_out = model, config, known, held_out
        self.best_metric = "loss" if config.best_by == "loss" else "quality"
        self.patience = config.patience
        self.order = DataOrder(len(known), min(config.batch_size, len(known)), config.seed, "judgements")

    def batches(self, step: int) -> list[Batch]:
        chosen = [self.known[i] for i in self.order.take(step)]
        return judgement_batches(chosen, self.model, self.config.tokens_per_microbatch)

    def loss(self, model: RewardModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return reward_loss(model, batch)

    def measure(self) -> Measures:
        if not self.held_out:
            return {}
        kind = self.config.kind
        found = measures(self.held_out, predicted(self.model, self.held_out), kind, self.known)
        main = "accuracy" if kind == "comparison" else "correlation"
        # on a few dozen rows many checkpoints are equally right: of those the one with the least loss is kept
        return found | {"quality": found[main] - 1e-6 * found["loss"]}


# --- rows ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Labelled:
    """The texts of row `number`, counted from 1: its prompt, and one completion or the better and the worse of two."""

    row: Row
    number: int
    prompt: str
    completions: tuple[str, ...]
    first_won: bool


def read_judgements(
    rows: Sequence[Row], config: RewardModelConfig, model: RewardModel, which: str
) -> tuple[list[Judgement], list[str]]:
    """(labelled rows as the model reads them, what was left out). `which` names the rows in messages.

    Raises OperantError naming the first faulty row, for a missing column, completions that are too long ("error"), and
    where no row is left.
    """
    _check_columns(rows, config)
    asks = config.prompt_field or ("prompt" if any("prompt" in row for row in rows) else None)
    read = [_labelled(row, number, asks, config) for number, row in enumerate(rows, start=1)]
    labelled = [row for row in read if row is not None]
    readings = iter(model.read_all([(row.prompt, text) for row in labelled for text in row.completions]))
    judgements: list[Judgement] = []
    for row in labelled:
        own = [next(readings) for _ in row.completions]
        whole = tuple(reading for reading in own if reading is not None)
        if len(whole) == len(own):
            judgements.append(Judgement(whole, _targets(row, whole[0], config), row.first_won))
    ties, long = len(read) - len(labelled), len(labelled) - len(judgements)
    if long and config.too_long == "error":
        raise OperantError(
            f"{long} of {len(labelled)} {which} rows have a completion of more tokens than the model holds "
            f"({model.encoder.max_length}); use --too_long skip, or a longer --max_length"
        )
    notes = [f"{ties} {which} rows are ties and were left out"] if ties else []
    notes += [f"{long} {which} rows are too long and were left out"] if long else []
    if not judgements:
        raise OperantError(f"no {which} row is left to learn from ({'; '.join(notes) or 'none given'}); check the data")
    return judgements, notes


def _completion_flags(config: RewardModelConfig) -> tuple[str, ...]:
    return ("chosen_field", "rejected_field") if config.kind == "comparison" else ("completion_field",)


def _check_columns(rows: Sequence[Row], config: RewardModelConfig) -> None:
    for flag in _completion_flags(config):
        find_column(rows, flag, getattr(config, flag), f"--{flag}")
    label = _LABELS[config.kind]
    if field := getattr(config, label):
        find_column(rows, label, field, f"--{label}")


def _labelled(row: Row, number: int, prompt_field: str | None, config: RewardModelConfig) -> _Labelled | None:
    """The texts of a row; None for a comparison that is a tie."""
    prompt = _text(row, prompt_field, number) if prompt_field else ""
    completions = tuple(_text(row, getattr(config, flag), number) for flag in _completion_flags(config))
    if config.kind != "comparison":
        return _Labelled(row, number, prompt, completions, True)
    label = _number_in(row, config.label_field, number) if config.label_field else 1
    if label not in (0, 1, 2):
        raise OperantError(f"row {number}: the label is {label:g}; it must be 1 (first is better), 2 or 0 (tie)")
    if label == 0 or completions[0] == completions[1]:
        return None
    return _Labelled(row, number, prompt, completions if label == 1 else completions[::-1], label == 1)


def _targets(labelled: _Labelled, reading: Reading, config: RewardModelConfig) -> Doubles:
    """`Judgement.targets` of a row."""
    sign = -1.0 if config.lower_is_better else 1.0
    if config.kind == "comparison":
        return np.zeros(0)
    if config.kind == "regression":
        return np.array([sign * _number_in(labelled.row, config.score_field, labelled.number)])
    values = np.zeros(len(reading.text_ends))
    for start, end, label in _spans(labelled, config):
        if not 0 <= start < end <= len(reading.text):
            raise OperantError(
                f"row {labelled.number}: a span covers [{start}, {end}) of a completion of {len(reading.text)} "
                "characters; spans are half-open and count characters"
            )
        first, stop = chars_to_tokens(reading.text_ends, start, end)
        if label is None:
            values[first:stop] = np.nan
        else:
            values[first:stop] += sign * label / max(1, stop - first)
    return values


def _spans(labelled: _Labelled, config: RewardModelConfig) -> list[tuple[int, int, float | None]]:
    """(start, end, value) of a row's labels, in characters of its completion; None where a token has no value."""
    labels = cell(labelled.row, config.span_field)
    if not isinstance(labels, list):
        raise OperantError(
            f"row {labelled.number} has no list in the column {config.span_field!r}; [] says that nothing is marked"
        )
    if is_missing(labelled.row.get("tokens")):
        return _char_spans(labels, labelled.number)
    return _token_spans(labelled.row["tokens"], labels, labelled.number, labelled.completions[0])


def _char_spans(labels: list[Any], number: int) -> list[tuple[int, int, float | None]]:
    spans: list[tuple[int, int, float | None]] = []
    for label in labels:
        given = [label.get(k) for k in ("start", "end", "value")] if isinstance(label, dict) else label
        if not (
            isinstance(given, list)
            and len(given) == 3
            and all(isinstance(x, int) and not isinstance(x, bool) for x in given[:2])
            and isinstance(given[2], int | float)
            and math.isfinite(given[2])
        ):
            raise OperantError(
                f'row {number}: {label!r} is no span; write {{"start": 0, "end": 4, "value": -1.0}} with finite values'
            )
        spans.append((given[0], given[1], float(given[2])))
    return spans


def _token_spans(tokens: Any, values: list[Any], number: int, completion: str) -> list[tuple[int, int, float | None]]:
    """What each of the row's own tokens was given, on its characters; None where it has no value."""
    if not isinstance(tokens, list) or "".join(map(str, tokens)) != completion:
        raise OperantError(f"row {number}: its tokens do not spell its completion; leave `tokens` out")
    if len(tokens) != len(values):
        raise OperantError(f"row {number}: {len(values)} token values for {len(tokens)} `tokens`; give one to each")
    spans: list[tuple[int, int, float | None]] = []
    at, carried = 0, 0.0
    for token, value in zip(tokens, values, strict=True):
        end = at + len(str(token))
        if value is not None and not (isinstance(value, int | float) and math.isfinite(value)):
            raise OperantError(f"row {number}: a token's value is {value!r}; give finite numbers, or null for none")
        if end > at:
            spans.append((at, end, None if value is None else value + carried))
            carried = 0.0
        else:  # the first bytes of the next character
            carried += value or 0.0
        at = end
    if spans and (last := spans[-1][2]) is not None:
        spans[-1] = (*spans[-1][:2], last + carried)
    return spans


def _text(row: Row, field: str, number: int) -> str:
    """A text, or of a chat its messages' texts, a line each, as a reward reads a chat prompt."""
    value = cell(row, field)
    turns = [turn.get("content") for turn in value] if is_chat(value) else [value]
    return "\n".join(text_of(turn, field, number) for turn in turns)


def _number_in(row: Row, field: str, number: int) -> float:
    """The number in a column of row `number`."""
    value = cell(row, field)
    try:
        found = math.nan if is_missing(value) or isinstance(value, list | dict) else float(value)
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        shown = "nothing" if is_missing(value) else repr(value)
        raise OperantError(f"row {number} has {shown} in the column {field!r}; give a finite number or remove the row")
    return found


def check_classes(known: Sequence[Judgement], config: RewardModelConfig) -> None:
    """Raises OperantError when all scores or token labels are the same: nothing can be learned from them."""
    if config.kind == "comparison":
        return
    values = np.unique(np.concatenate([j.targets[np.isfinite(j.targets)] for j in known]))
    if len(values) < 2:
        what = "token label" if config.kind == "token" else f"value of {config.score_field!r}"
        shown = f"{values[0]:g}" if len(values) else "missing"
        raise OperantError(f"every {what} is {shown}; a reward model needs at least two different ones")


# --- batches and measures --------------------------------------------------------------------------------------------


def judgement_batches(judgements: Sequence[Judgement], model: RewardModel, max_tokens: int) -> list[Batch]:
    """Micro-batches of one optimizer step; a pair stays together."""
    kind = model.facts.kind
    batch = reading_batch(
        [r for j in judgements for r in j.readings], model.encoder.codec.pad_id,
        targets=None if kind == "comparison" else [j.targets for j in judgements], kind=kind,
    )  # fmt: skip
    return list(microbatches(batch, max_tokens))


def predicted(model: RewardModel, judgements: Sequence[Judgement]) -> list[Doubles]:
    """Rewards of each judgement, float64: [2] better and worse, [1] a completion, [T] its tokens."""
    flat = model.predict([r for j in judgements for r in j.readings])
    each = len(judgements[0].readings)
    return [np.concatenate(flat[i * each : (i + 1) * each]) for i in range(len(judgements))]


def measures(
    judgements: Sequence[Judgement], rewards: Sequence[Doubles], kind: str, known: Sequence[Judgement]
) -> Measures:
    """Held-out measures of `rewards`, float64 as `predicted` gives them. `known` are the training judgements.

    comparison: accuracy (ties count half), loss in nats, brier, ece. Else: correlation (Pearson), rank_correlation
    (Spearman), rmse, loss (mean squared error in units of the training deviation); for scores of two values also
    accuracy, brier and ece of which it is.
    """
    if kind == "comparison":
        return _comparison_measures(np.array([r[0] - r[1] for r in rewards]))
    wanted, given = np.concatenate([j.targets for j in judgements]), np.concatenate(rewards)
    there = np.isfinite(wanted)
    wanted, given = wanted[there], given[there]
    training = np.concatenate([j.targets[np.isfinite(j.targets)] for j in known])
    error = float(np.mean((given - wanted) ** 2))
    found = {
        "correlation": pearson(given, wanted),
        "rank_correlation": spearman(given, wanted),
        "rmse": math.sqrt(error),
        "loss": error / max(float(training.var()), 1e-12),
    }
    classes = np.unique(training)
    return found | (_class_measures(given, wanted, classes) if kind == "regression" and len(classes) == 2 else {})


def _comparison_measures(margins: Doubles) -> Measures:
    """margins: float64[N], the reward of the better completion less the other's."""
    sure = 1.0 / (1.0 + np.exp(-np.abs(np.clip(margins, -500, 500))))
    right = np.where(margins == 0, 0.5, margins > 0)
    return {
        "accuracy": float(right.mean()),
        "loss": log_loss(margins),
        "brier": brier_score(np.where(margins > 0, sure, 1 - sure), np.ones(len(margins))),
        "ece": calibration_error(sure, right),
    }


def _class_measures(given: Doubles, wanted: Doubles, classes: Doubles) -> Measures:
    """Of scores that are one of two `classes` float64[2]: how well rewards float64[N] say which."""
    share = np.clip((given - classes[0]) / (classes[1] - classes[0]), 0, 1)
    is_high = (wanted == classes[1]).astype(float)
    sure = np.maximum(share, 1 - share)
    right = np.where(share == 0.5, 0.5, (share > 0.5) == (is_high == 1))
    return {
        "accuracy": float(right.mean()),
        "brier": brier_score(share, is_high),
        "ece": calibration_error(sure, right),
    }


def baselines(judgements: Sequence[Judgement], kind: str, known: Sequence[Judgement]) -> dict[str, Measures]:
    """The same measures of two baselines that read no text, both fitted on the training rows.

    length: the longer (or shorter) completion is better; or a least-squares line from length to score. majority: the
    column that more often holds the better completion; or the mean score.
    """
    if kind == "comparison":
        sign = 1.0 if sum(np.sign(j.length) for j in known) >= 0 else -1.0
        won = np.array([np.sign(sign * j.length) for j in judgements])
        first = sum(j.first_won for j in known) * 2 >= len(known)
        majority = float(np.mean([j.first_won == first for j in judgements]))
        ordered = any(not j.first_won for j in [*known, *judgements])
        # where the better one always stands first by construction, its place foretells nothing
        return {
            "length": {"accuracy": float(np.mean((won + 1) / 2))},
            "majority": {"accuracy": majority if ordered else 0.5},
        }
    lengths = np.concatenate([np.full(len(j.targets), j.length) for j in known])
    values = np.concatenate([j.targets for j in known])
    there = np.isfinite(values)
    x, y = lengths[there], values[there]
    slope = regression_slope(x, y)
    line = [np.full(len(j.targets), y.mean() + slope * (j.length - x.mean())) for j in judgements]
    flat = [np.full(len(j.targets), y.mean()) for j in judgements]
    keep = ("correlation", "rank_correlation", "rmse", "accuracy")
    rows = {"length": measures(judgements, line, kind, known), "majority": measures(judgements, flat, kind, known)}
    return {name: {k: v for k, v in row.items() if k in keep} for name, row in rows.items()}


def measure_and_calibrate(
    model: RewardModel, held_out: Sequence[Judgement], known: Sequence[Judgement]
) -> dict[str, Measures]:
    """Measure the model and the baselines; then fit the calibration on all held-out rows and leave it in the model.

    "calibrated" is cross-fitted: each half of the rows is measured with the calibration of the other half, so that it
    is no measure of its own fit.
    """
    kind, facts = model.facts.kind, model.facts
    raw = predicted(model, held_out)
    table = {"reward model": measures(held_out, raw, kind, known)}
    apply: list[Doubles] = list(raw)
    halves = [range(0, len(held_out), 2), range(1, len(held_out), 2)]
    if len(held_out) > 3:
        for own, other in (halves, halves[::-1]):
            scale, offset = _calibration([held_out[i] for i in other], [raw[i] for i in other], kind)
            for i in own:
                apply[i] = scale * raw[i] + offset
        table["calibrated"] = measures(held_out, apply, kind, known)
    facts.scale, facts.offset = _calibration(held_out, raw, kind)
    return table | baselines(held_out, kind, known)


def _calibration(judgements: Sequence[Judgement], rewards: Sequence[Doubles], kind: str) -> tuple[float, float]:
    if kind == "comparison":
        return 1.0 / fit_temperature(np.array([r[0] - r[1] for r in rewards])), 0.0
    wanted, given = np.concatenate([j.targets for j in judgements]), np.concatenate(rewards)
    there = np.isfinite(wanted)
    scale, offset = fit_affine(given[there], wanted[there])
    # held-out rows that foretell nothing must not make every reward the same
    return (scale, offset) if scale > 0 else (1.0, 0.0)


def _sample_rows(model: RewardModel, held_out: Sequence[Judgement], most: int = 8) -> list[dict[str, Any]]:
    """What samples.jsonl keeps of the first held-out judgements."""
    shown = held_out[:most]
    codec = model.encoder.codec
    rows = []
    for judgement, rewards in zip(shown, predicted(model, shown), strict=True):
        for i, reading in enumerate(judgement.readings):
            prompt = codec.decode(reading.tokens[: reading.begin])
            one = rewards[i] if len(judgement.readings) == 2 else rewards.sum()
            wanted = ["better", "worse"][i] if len(judgement.readings) == 2 else f"{np.nansum(judgement.targets):.3g}"
            rows.append({"prompt": prompt, "text": reading.text, "reward": float(one), "references": [wanted]})
    return rows
