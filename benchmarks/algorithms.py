"""Every algorithm on the quickstart's task: the same fine-tuned start, the same reward, the same time.

Defaults of each row of `operant algorithms`, but one learning rate for all policy gradients; nothing tuned.
Preference methods learn from pairs of the start's own samples, the best of four against the worst by the same reward.
"one" draws one completion a prompt, from four times as many; "logged" learns from a log of the start's completions;
"live" from the log of `operant serve`: 4,000 of its answers to the start's prompts, each rated over HTTP with one to
five stars that chrF gives, exported as a user exports them.

python -m benchmarks.algorithms                          three seeds, a minute a run
python -m benchmarks.algorithms --names rloo ppo --seeds 0 --jobs 2
python -m benchmarks.algorithms --write                  only write the table and the plot
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.cells import RECORDS, ROOT, Cell, Records, carry_out, command_line, markdown, spread, write_section

RUNS = ROOT / "runs" / "algorithms"
RECORD = Records(RECORDS / "algorithms")
MINUTES = 1.0
RATE = "2e-4"  # of policy gradients by Adam
OWN_RATE = ("trpo", "double_q", "dpo", "ipo", "kto")  # what they learn, or how they step, is something else
MAX_TOKENS = 32
# one completion a prompt, as many a step; and a log of the start's own completions in place of new ones
ONE = ["reinforce dense one", "reinforce_pp dense one", "spo one"]
LOGGED = ["topr logged", "areinforce logged", "double_q logged", "topr live", "double_q live"]
STARS = 5
SERVED_PROMPTS = 1000


def names() -> list[str]:
    """The table's rows, the dense form of those that honour it, and single completions and a log for some."""
    from operant.algorithms.table import ALGORITHMS

    rows = [n for name, a in ALGORITHMS.items() for n in ([name, f"{name} dense"] if dense_too(a) else [name])]
    return [*rows, *ONE, *LOGGED]


def dense_too(algorithm: Any) -> bool:
    return algorithm.learns_from == "rewards" and algorithm.honours_dense


def cells(given: list[str], seeds: list[int]) -> list[Cell]:
    bases = [Cell(f"{seed}/base") for seed in seeds]
    return bases + [Cell(f"{seed}/{name}", (f"{seed}/base",)) for seed in seeds for name in given]


def done(cell: Cell) -> bool:
    return RECORD.has(cell.name) and (not cell.name.endswith("base") or (RUNS / cell.name / "pairs.jsonl").exists())


def measure(name: str) -> None:
    seed, row = name.split("/")
    folder = RUNS / seed / "base"
    if row == "base":
        RECORD.put(name, start(int(seed), folder))
        return
    algorithm, *ways = row.split()
    out = RUNS / seed / row.replace(" ", "-")
    shutil.rmtree(out, ignore_errors=True)
    common = {
        "model": folder / "finetune" / "model", "seed": seed, "out": out, "threads": 1, "tensorboard": "false",
        "clock": "cpu", "max_minutes": MINUTES, "steps": 100_000, "lr": "auto" if algorithm in OWN_RATE else RATE,
        "algorithm": algorithm, "save_every": 100_000,
    }  # fmt: skip
    if algorithm in ("dpo", "ipo", "kto"):
        command = ["prefer", *flags(**common, data=folder / "pairs.jsonl", dev_data=folder / "dev_pairs.jsonl")]
    else:
        command = ["train", *flags(
            **common, dev_data=folder / "data" / "dev.jsonl", reward="chrf", max_tokens=MAX_TOKENS, eval_every=10,
            log_samples=0, reward_workers=0, dense="true" if "dense" in ways else "false",
        )]  # fmt: skip
        if "logged" in ways:
            command += flags(logged=logged(folder, int(seed)))
        elif "live" in ways:
            command += flags(logged=lived(folder, int(seed)))
            if algorithm == "double_q":
                command += flags(q_beta=0.2)  # of twice as wide a range of rewards, as --help says
        else:
            command += flags(data=folder / "data" / "prompts.jsonl")
        if "one" in ways:
            command += flags(group_size=1, prompts_per_step=128)
    operant(command)
    facts = json.loads((out / "run.json").read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    curve = [
        {"minutes": (r["seconds"] - rows[0]["seconds"]) / 60, "step": r["step"], "chrf": r["eval/chrf"]}
        for r in rows if "eval/chrf" in r
    ]  # fmt: skip
    completions = max((r["train/completions"] for r in rows if "train/completions" in r), default=0.0)
    RECORD.put(name, {
        "command": "operant " + " ".join(command).replace(f"{ROOT}/", ""), "test": judged(folder, out / "model"),
        "steps": facts["steps"], "completions": completions, "curve": curve,
    })  # fmt: skip


def flags(**values: Any) -> list[str]:
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def operant(command: list[str]) -> None:
    out = Path(command[command.index("--out") + 1])
    out.parent.mkdir(parents=True, exist_ok=True)
    with (out.parent / f"{out.name}.log").open("w", encoding="utf-8") as log:
        program = str(Path(sys.executable).with_name("operant"))
        subprocess.run([program, *command], check=True, stdout=log, stderr=log)


def start(seed: int, folder: Path) -> dict[str, Any]:
    """The quickstart's first two stages and its data, and preference pairs of what they left."""
    from operant.config import QuickstartConfig
    from operant.recipes.quickstart import Quickstart

    shutil.rmtree(folder, ignore_errors=True)
    circle = Quickstart(QuickstartConfig(seed=seed, out=str(folder), threads=1), folder)
    circle.prepare()
    circle.task.save(folder / "data")
    for rows, name in ((circle.task.prompts, "pairs"), (circle.task.dev, "dev_pairs")):
        preferences(circle, rows, folder / f"{name}.jsonl", seed)
    return {"test": judged(folder, folder / "finetune" / "model")}


def logged(folder: Path, seed: int) -> Path:
    """A log of the start: four completions of every second prompt, with their probabilities and rewards."""
    path = folder / "log.jsonl"
    if path.exists():
        return path
    import torch

    from operant.data.prompts import load_fitting_prompts
    from operant.data.rows import load_rows
    from operant.models.policy import Policy
    from operant.models.sampler import Sampler
    from operant.rewards import RewardRunner, reward_by_name
    from operant.types import Sampling

    torch.set_num_threads(1)
    policy = Policy.load(folder / "finetune" / "model")
    policy.model.eval()
    rows = load_rows(folder / "data" / "prompts.jsonl")[::2]
    prompts = load_fitting_prompts(rows, policy)
    groups = Sampler(policy, max_rows=256).sample(prompts, Sampling(max_tokens=MAX_TOKENS, seed=seed), 4)
    runner = RewardRunner(reward_by_name("chrf"), workers=0)
    scored = runner.run([(p, c) for p, group in zip(prompts, groups) for c in group])
    runner.close()
    with path.with_suffix(".part").open("w", encoding="utf-8") as file:
        for number, t in enumerate(scored):
            c = t.completion
            assert c.behavior_logprobs is not None
            line = {
                "prompt": rows[number // 4]["prompt"], "tokens": c.tokens.tolist(), "completion": c.text,
                "behavior_logprobs": c.behavior_logprobs.tolist(), "reward": float(t.rewards.sum()),
            }  # fmt: skip
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    path.with_suffix(".part").rename(path)
    return path


def lived(folder: Path, seed: int) -> Path:
    """The start is served and rated, and what the store then holds is exported. Nothing is learned meanwhile."""
    path = folder / "live-log"
    if path.exists():
        return path
    from concurrent.futures import ThreadPoolExecutor

    from benchmarks.pupil import Served
    from operant.data.prompts import load_prompts
    from operant.data.rows import load_rows
    from operant.data.text import Codec
    from operant.rewards import Chrf

    root = folder / "live"
    shutil.rmtree(root, ignore_errors=True)
    model = folder / "finetune" / "model"
    rows = load_rows(folder / "data" / "prompts.jsonl")[:SERVED_PROMPTS]
    prompts = load_prompts(rows, Codec.load(model))
    chrf = Chrf()
    program = Served(
        model, root, "", seed=seed, mode="shared", min_sources=1000, chat_rate=0, feedback_rate=0,
        score_low=1, score_high=STARS,
    )  # fmt: skip

    def ask_and_rate(number: int) -> None:
        asked = {
            "model": "default", "prompt": prompts[number].tokens.tolist(), "n": 4, "seed": number,
            "max_tokens": MAX_TOKENS, "temperature": 1.0,
        }  # fmt: skip
        told = program.http.post("/v1/completions", json=asked).raise_for_status().json()
        for choice in told["choices"]:
            stars = 1 + round((STARS - 1) * chrf.measure(choice["text"], prompts[number].references))
            body = {"completion_id": choice["completion_id"], "kind": "score", "value": stars}
            program.http.post("/v1/feedback", json=body).raise_for_status()

    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(ask_and_rate, range(len(prompts))))
    finally:
        program.close()
    part = path.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    export = flags(store=root / "store.db", export=part, form="rewards", score_low=1, score_high=STARS)
    subprocess.run([str(Path(sys.executable).with_name("operant")), "feedback", *export], check=True)
    part.rename(path)
    return path


def preferences(circle: Any, rows: list[dict[str, Any]], path: Path, seed: int) -> None:
    """The best against the worst of four samples for each prompt, by chrF; none where all are equal."""
    from operant.models.sampler import Sampler
    from operant.rewards import RewardRunner, reward_by_name
    from operant.types import Sampling

    circle.policy.model.eval()
    prompts = circle.prompts(rows)
    groups = Sampler(circle.policy, max_rows=256).sample(prompts, Sampling(max_tokens=MAX_TOKENS, seed=seed), 4)
    runner = RewardRunner(reward_by_name("chrf"), workers=0)
    scored = runner.run([(p, c) for p, group in zip(prompts, groups) for c in group])
    runner.close()
    lines = []
    for i, row in enumerate(rows):
        own = sorted(scored[4 * i : 4 * i + 4], key=lambda t: float(t.rewards.sum()))
        if own[0].rewards.sum() < own[-1].rewards.sum():
            best, worst = own[-1].completion.text, own[0].completion.text
            lines.append({"prompt": row["prompt"], "chosen": best, "rejected": worst})
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def judged(folder: Path, model: Path) -> dict[str, float]:
    """Greedy answers to the test prompts."""
    import torch

    from operant.data.prompts import load_fitting_prompts
    from operant.data.rows import load_rows
    from operant.models.policy import Policy
    from operant.models.sampler import Sampler
    from operant.rl.evaluate import evaluate
    from operant.types import Sampling

    torch.set_num_threads(1)
    policy = Policy.load(model)
    policy.model.eval()
    prompts = load_fitting_prompts(load_rows(folder / "data" / "test.jsonl"), policy)
    greedy = Sampling(temperature=0.0, max_tokens=MAX_TOKENS)
    return evaluate(Sampler(policy, max_rows=256), prompts, sampling=greedy)[0]


# --- table and plot --------------------------------------------------------------------------------------------------


def found(name: str) -> list[dict[str, Any]]:
    return [
        json.loads(p.read_text(encoding="utf-8"))
        for p in sorted(RECORD.folder.glob(f"*.{name.replace(' ', '-')}.json"))
    ]


def write() -> None:
    rows = []
    for name in ["base", *names()]:
        records = found(name)
        if records:
            tests = [r["test"] for r in records]
            rows.append((statistics.median(t["chrf"] for t in tests), [
                "fine-tuned, the start" if name == "base" else name, str(len(records)),
                spread([t["chrf"] for t in tests]), spread([t["bleu"] for t in tests]),
                spread([100 * t["exact"] for t in tests]), spread([t["length"] for t in tests]),
                "" if name == "base" else spread([r["steps"] for r in records], 0),
            ]))  # fmt: skip
    if not rows:
        return
    rows.sort(key=lambda row: -row[0])
    text = markdown(["", "seeds", "chrF", "BLEU", "exact match", "tokens", "steps"], [row for _, row in rows])
    plot(ROOT / "docs" / "images" / "algorithms.png")
    write_section("algorithms", text)
    print(text)


def plot(path: Path) -> None:
    """Held-out chrF over minutes: the median of the seeds, one line an algorithm."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn = {name: records for name in names() if (records := [r for r in found(name) if r["curve"]])}
    if not drawn:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = 4
    height = -(-len(drawn) // columns)
    figure, axes = plt.subplots(height, columns, figsize=(11, 2.1 * height), sharex=True, sharey=True, squeeze=False)
    flat = list(axes.flat)
    for axis, (name, records) in zip(flat, drawn.items()):
        for other in drawn.values():
            for record in other:
                axis.plot(*line(record), color="#dddddd", linewidth=0.7, antialiased=False)  # a third of the bytes
        for record in records:
            axis.plot(*line(record), color="#1f6feb", linewidth=1.4)
        axis.set_title(name, fontsize=9, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=7)
    for axis in flat[len(drawn) :]:
        axis.set_visible(False)
    figure.supxlabel("minutes", fontsize=9)
    figure.supylabel("held-out chrF", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def line(record: dict[str, Any]) -> tuple[list[float], list[float]]:
    return [p["minutes"] for p in record["curve"]], [p["chrf"] for p in record["curve"]]


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--names", nargs="+", help="which algorithms; all when left out")
    given = parser.parse_args()
    carry_out(
        given, "benchmarks.algorithms", cells=lambda: cells(given.names or names(), given.seeds), done=done,
        measure=measure, write=write, records=RECORD, runs=RUNS,
    )  # fmt: skip


if __name__ == "__main__":
    main()
