"""What instant reward buys on real data, beside controls that had the same wall time.

Two tasks (translation with an encoder-decoder, restaurant descriptions with a decoder-only model), two regimes (a tenth
of the labels, all of them), three seeds; and on the first seed with few labels, more algorithms beside them. Each cell
is one stage of the program, run as a user runs it, on one thread, its minutes counted in the processor's time. What is
there is skipped, and what was interrupted goes on, so the table can be made in pieces.

export OPERANT_DATA=…
python -m benchmarks.learning --jobs 2                        every cell that is missing, then the tables
python -m benchmarks.learning --tasks tatoeba --regimes few --seeds 0
python -m benchmarks.learning --list                          what is there and what is missing
python -m benchmarks.learning --write                         only write the tables into docs/results
"""

from __future__ import annotations

import json
import math
import random
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cells import RECORDS, ROOT, Cell, Records, carry_out, command_line, markdown, spread, write_section

RUNS = ROOT / "runs" / "learning"
RECORD = Records(RECORDS / "learning")
REGIMES = ("few", "all")
RATES = ("1e-4", "3e-4")  # tried on the first seed; the better one on the selection set is every seed's
SETTLED_RATES = ("3e-5", "1e-4")  # from weights that have settled at a lower rate
REWARD = "bleu + chrf"
FEW = 0.1
JUDGE_MINUTES = 2.5  # of pretraining for the language model that says how fluent answers are
CHOOSING = 200  # prompts that choose checkpoints and learning rates, held out of the training data


@dataclass(frozen=True, slots=True)
class Task:
    """A data set with the settings that every arm shares."""

    name: str
    data: str
    prompt: str
    reference: str
    select: int  # rows held out of the training data
    arch: str
    vocabulary: int
    max_length: int
    max_tokens: int
    batch: int
    pretrain_minutes: float
    minutes: dict[str, tuple[float, float, float]]  # by regime: at most for the base, a try of a learning rate, an arm
    settle: tuple[str, ...] = ()  # regimes in which the base goes on at SETTLING until it has stopped rising again


SETTLING = "3e-4"  # with all labels, English to German stops rising at 1e-3 long before it has learned what it can
SHORT = {"few": (4.0, 3.0, 6.0)}
TASKS = {
    t.name: t
    for t in (
        Task(
            "tatoeba",
            "tatoeba_ende",
            "en",
            "de",
            500,
            "mbart",
            2000,
            128,
            40,
            64,
            6,
            SHORT | {"all": (20, 4, 4)},
            ("all",),
        ),
        Task("e2e", "e2e_nlg", "mr", "refs", 200, "llama", 1000, 256, 80, 32, 3, SHORT | {"all": (6, 4, 4)}),
    )
}

ARMS = {
    "continued": "fine-tuned further",
    "terminal": "terminal reward",
    "dense": "dense reward",
}

#: Beside them with few labels, on the first seed, at the rate that terminal reward chose where none stands here. RLOO,
#: in the arms above, `reinforce dense` and `grpo` did best on the quickstart's task.
OTHERS: dict[str, dict[str, str]] = {
    "tatoeba": {
        "reinforce": "", "reinforce dense": "", "grpo": "", "ppo dense": "", "trpo dense": "",
        "double_q dense": "1e-2",
    },
    "e2e": {"reinforce": "", "reinforce dense": "", "grpo": ""},
}  # fmt: skip

#: Where reward was still rising after its minutes with few labels, the arms once more on the first seed, this long.
LONGER = {"tatoeba": 18.0}


# --- cells -----------------------------------------------------------------------------------------------------------


def cells(tasks: Sequence[str], regimes: Sequence[str], seeds: Sequence[int]) -> list[Cell]:
    """All cells in the order in which they are worth having: the arms of every seed hang on the first seed's sweep."""
    out = []
    for task in tasks:
        out += [Cell(f"{task}/pretrain"), Cell(f"{task}/judge")]
    for regime in regimes:
        for task in tasks:
            first, begin = f"{task}/{regime}/{seeds[0]}", start_of(task, regime)
            made = (f"{task}/pretrain", f"{task}/judge")
            out += starts(first, begin, made)
            out.append(Cell(f"{first}/variance", (f"{first}/{begin}",)))
            sweep = [f"{first}/{arm}@{rate}" for arm in ARMS for rate in rates_of(task, regime)]
            out += [Cell(name, (f"{first}/{begin}", f"{first}/variance")) for name in sweep]
            for seed in seeds:
                here = f"{task}/{regime}/{seed}"
                out += starts(here, begin, made)
                out += [Cell(f"{here}/{arm}", (f"{here}/{begin}", *sweep)) for arm in ARMS]
            if regime == "few":
                more = [*OTHERS[task], *(f"{arm} long" for arm in ARMS if task in LONGER)]
                out += [Cell(f"{first}/{arm}", (f"{first}/{begin}", *sweep)) for arm in more]
    return list({cell.name: cell for cell in out}.values())


def start_of(task: str, regime: str) -> str:
    """The cell whose model every arm starts from."""
    return "settled" if regime in TASKS[task].settle else "base"


def rates_of(task: str, regime: str) -> tuple[str, ...]:
    return SETTLED_RATES if start_of(task, regime) == "settled" else RATES


def starts(folder: str, begin: str, needs: tuple[str, ...]) -> list[Cell]:
    base = Cell(f"{folder}/base", needs)
    return [base] if begin == "base" else [base, Cell(f"{folder}/{begin}", (base.name,))]


def chosen_rate(task: str, regime: str, arm: str) -> str:
    """The learning rate whose BLEU on the selection set was higher in the first seed's sweep."""
    first = first_seed(task, regime)
    return max(
        rates_of(task, regime), key=lambda rate: RECORD.get(f"{task}/{regime}/{first}/{arm}@{rate}")["select_bleu"]
    )


def done(cell: Cell) -> bool:
    """Measured and, where others start from its weights, these are still there."""
    kept = cell.name.endswith(("/pretrain", "/judge", "/base", "/settled"))
    return RECORD.has(cell.name) and (not kept or (RUNS / cell.name / "model").exists())


def measure(name: str) -> None:
    """Run one cell to its end and keep what it gave."""
    parts = name.split("/")
    task = TASKS[parts[0]]
    data = prepare(task)
    if parts[1] == "pretrain":
        command = pretrain_command(task, data / "raw.jsonl", task.arch, task.pretrain_minutes)
    elif parts[1] == "judge":
        command = pretrain_command(task, data / "targets.jsonl", "llama", JUDGE_MINUTES)
    elif parts[3] == "variance":
        RECORD.put(name, variance(task, parts[1], int(parts[2]), data))
        return
    elif same := tried_as_long(task, parts[1], int(parts[2]), parts[3]):
        RECORD.put(name, RECORD.get(same))
        return
    else:
        command = stage_command(task, parts[1], int(parts[2]), parts[3], data)
    out = RUNS / name.replace(" ", "-")
    operant(command, out)
    facts = json.loads((out / "run.json").read_text(encoding="utf-8"))
    values: dict[str, Any] = {
        "command": shown(command), "seconds": facts["seconds"], "steps": facts["steps"],
        "best_step": facts["best_step"], "stop_reason": facts["stop_reason"],
    }  # fmt: skip
    if len(parts) > 2:
        values |= {"select_bleu": facts["best_value"], "dev": judged(task, out / "model"), "curve": curve(out)}
    RECORD.put(name, values)
    if len(parts) > 2 and parts[3] not in ("base", "settled"):
        shutil.rmtree(out / "checkpoints", ignore_errors=True)


def tried_as_long(task: Task, regime: str, seed: int, arm: str) -> str:
    """The cell that tried this arm's learning rate for as long as the arm itself has, or nothing."""
    _, trial, whole = task.minutes[regime]
    first = arm in ARMS and trial == whole and seed == first_seed(task.name, regime)
    return f"{task.name}/{regime}/{seed}/{arm}@{chosen_rate(task.name, regime, arm)}" if first else ""


def prepare(task: Task) -> Path:
    """The task's files under runs/: training rows in three cuts, and the rows that choose."""
    from operant.data.rows import load_rows

    folder = RUNS / task.name / "data"
    if (folder / "complete").exists():
        return folder
    rows = load_rows(task.data, split="train")
    train, select = rows[: -task.select], rows[-task.select :]

    def texts(row: dict[str, Any], *fields: str) -> list[dict[str, str]]:
        values = [row[f] for f in fields]
        return [{"text": text} for v in values for text in (v if isinstance(v, list) else [v])]

    write_rows(folder / "all.jsonl", train)
    write_rows(folder / "select.jsonl", select)
    write_rows(folder / "dev.jsonl", load_rows(task.data, split="dev"))
    write_rows(folder / "raw.jsonl", [t for row in train for t in texts(row, task.prompt, task.reference)])
    write_rows(folder / "targets.jsonl", [t for row in train for t in texts(row, task.reference)])
    (folder / "complete").touch()
    return folder


def labelled(data: Path, regime: str, seed: int) -> tuple[Path, Path]:
    """(labelled pairs, prompts whose references only the reward sees)."""
    if regime == "all":
        return data / "all.jsonl", data / "all.jsonl"
    few, rest = data / f"few-{seed}.jsonl", data / f"rest-{seed}.jsonl"
    if not rest.exists():
        rows = [json.loads(line) for line in (data / "all.jsonl").read_text(encoding="utf-8").splitlines()]
        random.Random(seed).shuffle(rows)
        count = round(FEW * len(rows))
        write_rows(few, rows[:count])
        write_rows(rest, rows[count:])
    return few, rest


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


# --- commands --------------------------------------------------------------------------------------------------------


def flags(**values: Any) -> list[str]:
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


COMMON = flags(threads=1, clock="cpu", tensorboard="false")


def pretrain_command(task: Task, data: Path, arch: str, minutes: float) -> list[str]:
    kind = flags(objective="infilling", noise_density=0.3, lr="2e-3", batch_tokens=1024) if arch == "mbart" else flags(
        batch_tokens=4096
    )  # fmt: skip
    return ["pretrain", *COMMON, *kind, *flags(
        data=data, text_field="text", arch=arch, size="tiny", vocab_size=task.vocabulary, dropout=0.1,
        max_length=task.max_length, steps=100_000, schedule="constant", max_minutes=minutes,
    )]  # fmt: skip


def stage_command(task: Task, regime: str, seed: int, cell: str, data: Path) -> list[str]:
    """The program's arguments for `base`, `settled` or an arm."""
    pairs, prompts = labelled(data, regime, seed)
    model = RUNS / task.name / "pretrain" / "model"
    fields = flags(
        seed=seed, dev_data=data / "select.jsonl", prompt_field=task.prompt, reference_field=task.reference,
        max_tokens=task.max_tokens, best_metric="bleu", eval_prompts=CHOOSING, keep=1,
    )  # fmt: skip
    tune = ["sft", *COMMON, *fields, *flags(data=pairs, batch_size=task.batch, steps=100_000)]
    folder = RUNS / task.name / regime / str(seed)
    if cell in ("base", "settled"):
        # until the BLEU of held-out completions, which rises longer than the dev loss falls, has stopped rising
        longest = task.minutes[regime][0]
        begin, rate = (model, "1e-3") if cell == "base" else (folder / "base" / "model", SETTLING)
        return [*tune, *flags(model=begin, lr=rate, eval_every=50, patience=8, max_minutes=longest)]
    arm, _, tried = cell.removesuffix(" long").partition("@")
    given = OTHERS[task.name].get(arm)
    rate = tried or given or chosen_rate(task.name, regime, arm if given is None else "terminal")
    minutes = LONGER[task.name] if cell.endswith(" long") else task.minutes[regime][1 if tried else 2]
    start = flags(model=folder / start_of(task.name, regime) / "model", lr=rate, max_minutes=minutes)
    if arm == "continued":
        return [*tune, *start, *flags(eval_every=50, patience=0)]
    command = ["train", *COMMON, *fields, *start, *flags(
        data=prompts, reward=REWARD, steps=100_000, eval_every=20, prompts_per_step=32, group_size=4, save_every=200,
        log_samples=0, reward_workers=0,
    )]  # fmt: skip
    if not arm.startswith("double_q"):  # which learns values alone
        command += flags(sft_data=pairs, sft_coef=0.5, sft_batch_size=32)
    if given is not None:
        command += flags(algorithm=arm.split()[0])
    if arm.endswith("dense"):
        choice = RECORD.get(f"{task.name}/{regime}/{first_seed(task.name, regime)}/variance")["choice"]
        beta = flags(beta=choice["beta"]) if given is None else []  # the others' own way to use a potential
        command += [*flags(dense="true", potential=choice["potential"]), *beta]
    else:
        command += flags(dense="false")
    return command


def first_seed(task: str, regime: str) -> int:
    """The seed whose variance chose the potential."""
    found = [int(path.name.split(".")[2]) for path in RECORD.folder.glob(f"{task}.{regime}.*.variance.json")]
    return min(found)


def operant(command: list[str], out: Path) -> None:
    """Run the program; a run that was cut short goes on from its last checkpoint."""
    finished = (out / "run.json").exists() and "stop_reason" in (out / "run.json").read_text(encoding="utf-8")
    if finished and (out / "model").exists():
        return
    again = ["--resume", "true"] if (out / "config.yaml").exists() else []
    program = str(Path(sys.executable).with_name("operant"))
    out.parent.mkdir(parents=True, exist_ok=True)
    with (out.parent / f"{out.name}.log").open("a", encoding="utf-8") as log:
        subprocess.run([program, *command, "--out", str(out), *again], check=True, stdout=log, stderr=log)


def shown(command: list[str]) -> str:
    """The command as it can be repeated in a fresh clone."""
    return "operant " + " ".join(part.replace(f"{ROOT}/", "") for part in command).replace(REWARD, f'"{REWARD}"')


# --- measurements ----------------------------------------------------------------------------------------------------


def judged(task: Task, model: Path) -> dict[str, float]:
    """Greedy completions of the dev prompts, on which nothing was chosen, under metrics and a language model."""
    import torch

    from operant.data.prompts import load_fitting_prompts
    from operant.data.rows import Fields, load_rows
    from operant.models.policy import Policy
    from operant.models.sampler import Sampler
    from operant.rl.evaluate import evaluate
    from operant.types import Sampling

    torch.set_num_threads(1)
    policy = Policy.load(model)
    policy.model.eval()
    prompts = load_fitting_prompts(
        load_rows(RUNS / task.name / "data" / "dev.jsonl"), policy,
        fields=Fields(prompt=task.prompt, references=task.reference),
    )  # fmt: skip
    greedy = Sampling(temperature=0.0, max_tokens=task.max_tokens)
    values, completions = evaluate(Sampler(policy, max_rows=256), prompts, sampling=greedy)
    return values | {"perplexity": perplexity(task, [c.text for c in completions])}


def perplexity(task: Task, texts: Sequence[str]) -> float:
    """Per token, under a small language model of the training targets that no reward has touched."""
    import torch

    from operant.models.policy import Policy

    judge = Policy.load(RUNS / task.name / "judge" / "model")
    judge.model.eval()
    start = judge.codec.encode("", eos=True)
    total, count = 0.0, 0
    with torch.no_grad():
        for i in range(0, len(texts), 64):
            rows = [judge.codec.encode(text, eos=True)[: judge.max_length - 1] for text in texts[i : i + 64]]
            batch = judge.batch_of_sequences([start] * len(rows), rows)
            total -= float(judge.logprobs(batch).logprobs.sum())
            count += int(batch.action_mask.sum())
    return math.exp(total / count)


def curve(out: Path) -> list[dict[str, float]]:
    """Held-out values over minutes and completions, on the selection set."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    begun, completions, points = rows[0]["seconds"], 0.0, []
    for row in rows:
        completions = row.get("train/completions", completions)
        if "eval/bleu" in row:
            points.append(
                {"minutes": round((row["seconds"] - begun) / 60, 3), "completions": completions, "step": row["step"]}
                | {k: round(row[f"eval/{k}"], 4) for k in ("bleu", "chrf", "reward") if f"eval/{k}" in row}
            )
    return points


def variance(task: Task, regime: str, seed: int, data: Path, batches: int = 32) -> dict[str, Any]:
    """The gradient's variance at the fine-tuned weights under each way to pay the same completions.

    One step's gradient g on 16 prompts with 4 completions each, `batches` times: trace of its covariance
    E|g|² − |E g|², the squared length of its mean, and how far each potential foretells the final reward.
    """
    import torch

    from operant.algorithms import credit
    from operant.algorithms.objectives import reinforce
    from operant.data.batch import completion_axes, group_numbers, scatter
    from operant.data.prompts import load_fitting_prompts
    from operant.data.rows import Fields, load_rows
    from operant.models.policy import Policy
    from operant.models.sampler import Sampler
    from operant.rewards import RewardRunner, potential_diagnostics, reward_by_name
    from operant.types import Sampling

    torch.set_num_threads(1)
    _, rest = labelled(data, regime, seed)
    policy = Policy.load(RUNS / task.name / regime / str(seed) / start_of(task.name, regime) / "model")
    policy.model.eval()
    fields = Fields(prompt=task.prompt, references=task.reference)
    prompts = load_fitting_prompts(load_rows(rest, limit=16 * batches), policy, fields=fields)
    sampler = Sampler(policy, max_rows=64)
    runners = {
        p: RewardRunner(reward_by_name(REWARD, dense=True, potential=p), workers=0) for p in ("prefix", "matched")
    }
    arms = ["terminal", *(f"{p} {b}" for p in runners for b in ("1", "fitted"))]
    sums: dict[str, Any] = dict.fromkeys(arms, 0.0)
    squares = dict.fromkeys(arms, 0.0)
    betas: dict[str, list[float]] = {p: [] for p in runners}
    foretold: dict[str, list[list[float]]] = {p: [] for p in runners}
    parameters = policy.trainable_parameters()
    for number in range(batches):
        chosen = prompts[16 * number : 16 * (number + 1)]
        groups = sampler.sample(chosen, Sampling(max_tokens=task.max_tokens, seed=number), 4)
        answered = [(p, c) for p, group in zip(chosen, groups) for c in group]
        for potential, runner in runners.items():
            trajectories = runner.run(answered)
            foretold[potential].append(potential_diagnostics(trajectories))
            batch = policy.batch_of(trajectories)
            rewards, mask, valid = completion_axes(trajectories)
            ids = group_numbers(trajectories)
            fitted = credit.fit_beta((rewards * mask).sum(1), credit.held_potential(rewards, mask), mask, ids, valid)
            betas[potential].append(float(fitted.mean()))
            ways: dict[str, Any] = {f"{potential} 1": 1.0, f"{potential} fitted": fitted}
            if potential == "prefix":
                ways["terminal"] = 0.0
            for arm, beta in ways.items():
                advantages, _ = credit.control_variate(rewards, mask, ids, valid, beta)
                loss = reinforce(policy.logprobs(batch).logprobs, scatter(batch, advantages, trajectories))
                gradient = torch.autograd.grad((loss * batch.weights).sum() / batch.denominator, parameters)
                flat = torch.cat([g.reshape(-1) for g in gradient]).double()
                sums[arm] = sums[arm] + flat
                squares[arm] += float(flat @ flat)
    for runner in runners.values():
        runner.close()
    found = {}
    for arm in arms:
        mean = sums[arm] / batches
        spread_ = (squares[arm] - batches * float(mean @ mean)) / (batches - 1)
        # |mean|² of few batches holds variance/batches of noise
        found[arm] = {"variance": spread_, "signal": max(0.0, float(mean @ mean) - spread_ / batches)}
    tenths = {
        p: [average([v for v in column if math.isfinite(v)]) for column in zip(*rows)] for p, rows in foretold.items()
    }
    potential, beta = min(arms[1:], key=lambda arm: found[arm]["variance"]).split()
    return {
        "arms": found, "beta": {p: statistics.fmean(b) for p, b in betas.items()}, "correlation": tenths,
        "batches": batches, "choice": {"potential": potential, "beta": "auto" if beta == "fitted" else float(beta)},
    }  # fmt: skip


def average(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


# --- tables ----------------------------------------------------------------------------------------------------------

COLUMNS = {"bleu": ("BLEU", 1), "chrf": ("chrF", 1), "rougeL": ("ROUGE-L", 3), "length": ("tokens", 1),
           "distinct2": ("distinct-2", 3), "perplexity": ("perplexity", 1)}  # fmt: skip


def seeds_of(task: str, regime: str) -> list[int]:
    """Seeds with their start and every arm measured."""
    begin = start_of(task, regime)
    found = sorted({int(p.name.split(".")[2]) for p in RECORD.folder.glob(f"{task}.{regime}.*.{begin}.json")})
    return [s for s in found if all(arm_record(task, regime, s, arm) for arm in ARMS)]


def arm_record(task: str, regime: str, seed: int, arm: str) -> dict[str, Any] | None:
    name = f"{task}/{regime}/{seed}/{arm}"
    return RECORD.get(name) if RECORD.has(name) else None


def dev_row(title: str, records: Sequence[dict[str, Any]]) -> list[str]:
    return [title, *(spread([r["dev"][k] for r in records], d) for k, (_, d) in COLUMNS.items())]


def table(task: str, regime: str) -> str:
    """One table with what follows from it, or nothing where no seed is whole."""
    seeds = seeds_of(task, regime)
    if not seeds:
        return ""
    base = [RECORD.get(f"{task}/{regime}/{s}/{start_of(task, regime)}") for s in seeds]
    arms = {arm: [r for s in seeds if (r := arm_record(task, regime, s, arm))] for arm in ARMS}
    rows = [dev_row("fine-tuned to its plateau", base)]
    rows += [dev_row(title, arms[arm]) for arm, title in ARMS.items()]
    top_cell = start_of(task, "all")
    oracle = [RECORD.get(n) for s in seeds if RECORD.has(n := f"{task}/all/{s}/{top_cell}")] if regime == "few" else []
    if oracle:
        rows.append(dev_row(f"oracle: fine-tuned on all pairs ({len(oracle)} seed{'s' * (len(oracle) > 1)})", oracle))
    lines = [markdown(["", *(title for title, _ in COLUMNS.values())], rows), ""]
    gains = {
        arm: [r["dev"]["bleu"] - c["dev"]["bleu"] for r, c in zip(arms[arm], arms["continued"])]
        for arm in ("terminal", "dense")
    }
    lines.append(
        "BLEU above fine-tuning further: " + "; ".join(f"{ARMS[a]} {spread(g)}" for a, g in gains.items()) + "."
    )
    if oracle:  # one may stand for all seeds
        top = statistics.median(r["dev"]["bleu"] for r in oracle)
        shares = {
            arm: [(r["dev"]["bleu"] - b["dev"]["bleu"]) / (top - b["dev"]["bleu"]) for r, b in zip(arms[arm], base)]
            for arm in ARMS
        }
        lines.append(
            "Share of the way to the oracle: " + "; ".join(f"{ARMS[a]} {spread(v, 2)}" for a, v in shares.items()) + "."
        )
    # terminal's best BLEU on the selection set: the completions until it, and until dense stood as high
    spent = [until(t["curve"], best_of(t)) for t in arms["terminal"]]
    needed = [until(d["curve"], best_of(t)) for t, d in zip(arms["terminal"], arms["dense"])]
    told = [n / max(1.0, s) for n, s in zip(needed, spent) if n is not None and s is not None]
    lines.append(
        f"Dense came to terminal's best BLEU on the selection set on {len(told)} of {len(seeds)} seeds"
        + (f", with {spread(told, 2)} times terminal's completions." if told else ".")
    )
    return "\n".join(lines)


def others_table(task: str) -> str:
    """The other algorithms beside the arms of the first seed."""
    regime = "few"
    if not any(RECORD.has(f"{task}/{regime}/{first_seed(task, regime)}/{arm}") for arm in OTHERS[task]):
        return ""
    first = f"{task}/{regime}/{first_seed(task, regime)}"
    titles = {"base": "fine-tuned to its plateau", "continued": "fine-tuned further", "terminal": "rloo",
              "dense": "rloo dense"} | {arm: arm for arm in OTHERS[task]}  # fmt: skip
    found = [(title, RECORD.get(f"{first}/{arm}")) for arm, title in titles.items() if RECORD.has(f"{first}/{arm}")]
    found.sort(key=lambda pair: -pair[1]["dev"]["bleu"])
    head = ["", *(title for title, _ in COLUMNS.values()), "steps"]
    return markdown(head, [[*dev_row(title, [record]), str(record["steps"])] for title, record in found])


def longer_table(task: str) -> str:
    """The arms of the first seed with more minutes, and how far they came to the oracle."""
    first = f"{task}/few/{first_seed(task, 'few')}"
    found = {arm: RECORD.get(f"{first}/{arm} long") for arm in ARMS if RECORD.has(f"{first}/{arm} long")}
    if not found:
        return ""
    text = markdown(
        ["", *(title for title, _ in COLUMNS.values())],
        [dev_row(f"{ARMS[arm]}, {LONGER[task]:g} minutes", [record]) for arm, record in found.items()],
    )
    if not RECORD.has(oracle := f"{task}/all/{first_seed(task, 'few')}/{start_of(task, 'all')}"):
        return text
    low, top = (RECORD.get(name)["dev"]["bleu"] for name in (f"{first}/base", oracle))
    shares = (f"{ARMS[arm]} {(record['dev']['bleu'] - low) / (top - low):.2f}" for arm, record in found.items())
    return f"{text}\n\nShare of the way to the oracle of that seed: {'; '.join(shares)}."


def best_of(record: dict[str, Any]) -> float:
    return max(point["bleu"] for point in record["curve"])


def until(points: Sequence[dict[str, float]], level: float) -> float | None:
    """Completions spent when the curve first stood at a level."""
    return next((p["completions"] for p in points if p["bleu"] >= level), None)


def variance_table(tasks: Sequence[str]) -> str:
    rows = []
    for task in tasks:
        for regime in REGIMES:
            for path in sorted(RECORD.folder.glob(f"{task}.{regime}.*.variance.json")):
                record = json.loads(path.read_text(encoding="utf-8"))
                plain = record["arms"]["terminal"]["variance"]
                for arm, values in record["arms"].items():
                    potential = arm.split()[0]
                    tenths = record["correlation"].get(potential)
                    rows.append([
                        f"{task}, {regime}: {arm}", f"{values['variance'] / plain:.2f}",
                        f"{values['signal'] / values['variance']:.3f}",
                        f"{record['beta'][potential]:.2f}" if "fitted" in arm else "",
                        " ".join(f"{tenths[i]:.2f}" for i in (2, 5, 8)) if tenths else "",
                    ])  # fmt: skip
    head = [
        "",
        "variance, of terminal's",
        "signal / variance",
        "β",
        "correlation of Φ with the reward at 0.2, 0.5, 0.8 of the length",
    ]
    return markdown(head, rows) if rows else ""


def levels(task: str, regime: str) -> str:
    """Completions and minutes until BLEU on the selection set first stood at a level, for the arms that get there."""
    seeds = seeds_of(task, regime)
    arms = {arm: [r for s in seeds if (r := arm_record(task, regime, s, arm))] for arm in ARMS}
    begin = statistics.median(r["curve"][0]["bleu"] for r in arms["terminal"])
    top = statistics.median(best_of(r) for rs in arms.values() for r in rs)
    marks = [round(begin + (top - begin) * share) for share in (1 / 3, 2 / 3, 1)]
    if len(set(marks)) < len(marks):
        return "No arm rose far enough for levels to be told apart."
    rows = []
    for arm, title in ARMS.items():
        row = [title]
        for mark in marks:
            points = [next((p for p in r["curve"] if p["bleu"] >= mark), None) for r in arms[arm]]
            there = [p for p in points if p is not None]
            told = f"{spread([p['minutes'] for p in there])} min" if there else "never"
            if there and arm != "continued":
                told += f", {spread([p['completions'] / 1000 for p in there])} k"
            row.append(told + (f" ({len(there)} of {len(points)})" if 0 < len(there) < len(points) else ""))
        rows.append(row)
    head = ["minutes and thousands of completions to BLEU", *map(str, marks)]
    return markdown(head, rows)


def plot(path: Path) -> None:
    """BLEU on the selection set over minutes, one line a seed and arm, one panel a table."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from PIL import Image

    panels = [(t, r) for t in TASKS for r in REGIMES if seeds_of(t, r)]
    if not panels:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.4 * columns, 3.0 * rows), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (task, regime) in zip(axes.flat, panels):
        for arm, color in zip(ARMS, ("#8a8a8a", "#d9822b", "#1f6feb")):
            for number, seed in enumerate(seeds_of(task, regime)):
                record = arm_record(task, regime, seed, arm)
                points = record["curve"] if record else []
                label = ARMS[arm] if number == 0 else None
                axis.plot([p["minutes"] for p in points], [p["bleu"] for p in points], color=color, label=label, lw=1.3)
        axis.set_title(
            f"{task}, {'a tenth of the labels' if regime == 'few' else 'all labels'}", fontsize=9, loc="left"
        )
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
        axis.set_xlabel("minutes", fontsize=8)
    for axis in axes[:, 0]:
        axis.set_ylabel("BLEU on the selection set", fontsize=8)
    axes.flat[0].legend(fontsize=7, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    with Image.open(path) as image:  # a few colours are enough
        small = image.convert("RGB").quantize(48)
    small.save(path, optimize=True)


def plot_first_page(path: Path) -> None:
    """The README's picture: descriptions with few labels, the median of the seeds and their spread, over minutes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    seeds = seeds_of("e2e", "few")
    curves = {arm: [arm_record("e2e", "few", seed, arm) for seed in seeds] for arm in ARMS}
    if not seeds or not all(all(found) for found in curves.values()):
        return
    figure, axis = plt.subplots(figsize=(6.4, 3.2))
    for (arm, title), color in zip(ARMS.items(), ("#8a8a8a", "#d9822b", "#1f6feb")):
        points = [record["curve"] for record in curves[arm] if record]
        minutes = np.linspace(0, min(curve[-1]["minutes"] for curve in points), 40)
        bleu = np.stack([np.interp(minutes, [p["minutes"] for p in c], [p["bleu"] for p in c]) for c in points])
        axis.fill_between(minutes, bleu.min(0), bleu.max(0), color=color, alpha=0.18, lw=0)
        axis.plot(minutes, np.median(bleu, 0), color=color, lw=2)
        axis.annotate(title, (minutes[-1], float(np.median(bleu, 0)[-1])), (6, -3), color=color, fontsize=10,
                      textcoords="offset points")  # fmt: skip
    axis.set_title(f"BLEU of held-out descriptions, {len(seeds)} seeds", fontsize=10, loc="left")
    axis.set_xlabel("minutes after fine-tuning stopped helping", fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=9)
    axis.set_xlim(0, minutes[-1] * 1.01)
    figure.tight_layout()
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def write() -> None:
    """The tables of what is there, into docs/results."""
    plot(ROOT / "docs" / "images" / "learning.png")
    plot_first_page(ROOT / "docs" / "images" / "reward.png")
    lines = []
    for task in TASKS:
        for regime in REGIMES:
            if text := table(task, regime):
                share = "a tenth of the labels" if regime == "few" else "all labels"
                lines += [
                    f"### {task}, {share}, seeds {', '.join(map(str, seeds_of(task, regime)))}",
                    "",
                    text,
                    "",
                    levels(task, regime),
                    "",
                ]
    for task in TASKS:
        if text := longer_table(task):
            lines += [f"### {task}: the arms with more time, a tenth of the labels, one seed", "", text, ""]
        if text := others_table(task):
            lines += [f"### {task}: more algorithms, a tenth of the labels, one seed", "", text, ""]
    if text := variance_table(list(TASKS)):
        lines += ["### The gradient's variance", "", text, ""]
    text = "\n".join(lines).strip()
    write_section("learning", text)
    print(text)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--regimes", nargs="+", choices=REGIMES, default=list(REGIMES))
    given = parser.parse_args()
    carry_out(
        given, "benchmarks.learning", cells=lambda: cells(given.tasks, given.regimes, given.seeds), done=done,
        measure=measure, write=write, records=RECORD, runs=RUNS,
    )  # fmt: skip


if __name__ == "__main__":
    main()
