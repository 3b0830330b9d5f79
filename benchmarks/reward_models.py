"""Reward models from nothing on small public sets, beside what length and the majority foretell.

python -m benchmarks.reward_models                measure what is missing, then write the tables into docs/results
python -m benchmarks.reward_models --write        write what is there

The data sets are found by name under the folder that OPERANT_DATA names. A cell trains on the training split less its
last 15% (at most 100 rows), which choose the checkpoint and calibrate, and is measured on the dev split, which neither
saw.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cells import RECORDS, ROOT, Cell, Records, carry_out, command_line, markdown, spread, write_section

RUNS = ROOT / "runs" / "reward-models"
RECORD = Records(RECORDS / "reward_models")
SEEDS = (0, 1, 2)
HELD_BACK, MOST_HELD_BACK = 0.15, 100


@dataclass(frozen=True, slots=True)
class Task:
    """A data set, how its rows are read, and how long is trained. `main`: the measure that is shown."""

    title: str
    kind: str
    main: str
    max_length: int
    batch_size: int
    steps: int


TASKS = {
    "pandalm_preferences": Task("PandaLM, which answer is better", "comparison", "accuracy", 256, 8, 40),
    "hh_rlhf_harmless": Task("HH harmless, which answer is better", "comparison", "accuracy", 256, 8, 40),
    "mt_ratings_mqm_ende": Task("MQM English → German, errors", "regression", "rank_correlation", 256, 8, 40),
    "sentiment_sentences": Task("Sentences, positive or negative", "regression", "accuracy", 64, 16, 200),
}


def rows_of(name: str, split: str) -> list[dict[str, Any]]:
    """The set's rows under the names that `operant reward-model` takes."""
    from operant.data.rows import load_rows

    rows = load_rows(name, split=split)
    if name == "pandalm_preferences":
        return [
            {"prompt": f"{r['instruction']}\n{r['input']}".strip(), "label": r["label"],
             "first": str(r["response1"]), "second": str(r["response2"])}
            for r in rows
        ]  # fmt: skip
    if name == "hh_rlhf_harmless":
        return [{"prompt": r["prompt"], "first": r["chosen"], "second": r["rejected"]} for r in rows]
    if name == "mt_ratings_mqm_ende":  # errors are few and heavy-tailed: the logarithm keeps one bad row from ruling
        import math

        return [{"prompt": r["src_en"], "completion": r["hyp_de"], "score": -math.log1p(r["mqm"])} for r in rows]
    return [{"completion": r["text"], "score": float(r["label"])} for r in rows]


def config_of(name: str, seed: int, out: Path) -> Any:
    from operant.config import RewardModelConfig

    task = TASKS[name]
    label = {"label_field": "label"} if name == "pandalm_preferences" else {}
    return RewardModelConfig(
        kind=task.kind, chosen_field="first", rejected_field="second", too_long="skip", vocab_size=4096,
        max_length=task.max_length, batch_size=task.batch_size, steps=task.steps, lr=5e-4, warmup_steps=10,
        eval_every=task.steps // 2, patience=0, dropout=0.1, seed=seed, threads=1, device="cpu", tensorboard=False,
        tokens_per_microbatch=2048, out=str(out), overwrite=True, save_every=10_000, **label,
    )  # fmt: skip


def measure(cell: str) -> None:
    name, seed = cell.split("/")
    from operant.models.reward_model import RewardModel
    from operant.stages.reward_model import baselines, measures, predicted, read_judgements, train_reward_model

    rows = rows_of(name, "train")
    cut = len(rows) - min(MOST_HELD_BACK, int(len(rows) * HELD_BACK))
    out = RUNS / cell.replace("/", "-")
    config = config_of(name, int(seed), out)
    result = train_reward_model(config, rows=rows[:cut], dev_rows=rows[cut:], quiet=True)
    trained = RewardModel.load(out / "model", device="cpu")
    known, _ = read_judgements(rows[:cut], config, trained, "training")
    test, left_out = read_judgements(rows_of(name, "dev"), config, trained, "test")
    kind = trained.facts.kind
    calibrated = measures(test, predicted(trained, test), kind, known)
    trained.facts.scale, trained.facts.offset = 1.0, 0.0
    raw = measures(test, predicted(trained, test), kind, known)
    values = {"raw": raw, "calibrated": calibrated} | baselines(test, kind, known)
    facts = {"training": len(known), "test": len(test), "left_out": left_out, "seconds": result.seconds}
    RECORD.put(cell, {"measures": values} | facts)
    shutil.rmtree(out / "checkpoints", ignore_errors=True)


def cells(seeds: Sequence[int]) -> list[Cell]:
    return [Cell(f"{name}/{seed}") for seed in seeds for name in TASKS]


def table() -> str:
    lines = []
    for name, task in TASKS.items():
        rows: list[list[str]] = []
        wanted = (
            ["accuracy", "ece", "brier"] if task.main == "accuracy" else ["rank_correlation", "correlation", "rmse"]
        )
        records = [RECORD.get(c) for seed in SEEDS if RECORD.has(c := f"{name}/{seed}")]
        if not records:
            continue
        for state, title in (("raw", "reward model"), ("calibrated", "reward model, calibrated")):
            cells_of = [spread([r["measures"][state][w] for r in records], 3) for w in wanted]
            rows.append([f"{title} ({len(records)} seeds)", *cells_of])
        for baseline in ("length", "majority"):
            values = records[0]["measures"][baseline]
            rows.append([baseline, *(f"{values[w]:.3f}" if w in values else "" for w in wanted)])
        kept = f"{records[0]['training']} training and {records[0]['test']} test rows"
        gone = f" ({'; '.join(records[0]['left_out'])})" if records[0]["left_out"] else ""
        lines += [f"**{task.title}** (`{name}`, {task.kind}): {kept}{gone}.", "", markdown(["", *wanted], rows), ""]
    return "\n".join(lines)


def write() -> None:
    lead = (
        "`python -m benchmarks.reward_models`: a BERT `tiny` (at most 1.4 M parameters) with its own tokenizer;\n"
        "median [lowest, highest] over seeds, on the dev split, which chose and calibrated nothing. Prompts lose\n"
        f"their beginning where both are more than the model's 256 tokens (64 for sentences). {RECORD.machines()}."
    )
    write_section("reward models", f"{lead}\n\n{table()}")


def main() -> None:
    given = command_line(__doc__, SEEDS).parse_args()
    carry_out(
        given, "benchmarks.reward_models", cells=lambda: cells(given.seeds), done=lambda cell: RECORD.has(cell.name),
        measure=measure, write=write, records=RECORD, runs=RUNS,
    )  # fmt: skip


if __name__ == "__main__":
    main()
