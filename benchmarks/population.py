"""A simulated population teaches a served model what it likes, one rating at a time.

`operant serve` runs as a user starts it; a rater asks over HTTP, rates over HTTP, and asks again once what the rating
taught is served. A small model (0.9 M parameters, made here from text that is made here) answers household questions in
many manners. One kind of rater at a time likes about a quarter of the answers, says so with a thumb, and is wrong one
time in ten. Four families of likings (how long, how it ends, how it is laid out, what is said besides), one
configuration for all: the defaults, with eight questions of the owner's own as anchors.

    satisfaction   the share of liked answers among 192 sampled ones, temperature 1, to questions that nobody rated
    sense          the share of answers in which every sentence is one that an answer to this question can have; of
                   liked before: the same among the answers of the model as it came in that the rater likes
    nats           mean −log p per token of held-out liked answers, of the generator: a perfect pupil's falls a little
    told           the control: the model as it came in, told the liking in the question; the best of three wordings

python -m benchmarks.population                        three seeds, every family, thumbs and mixed feedback
python -m benchmarks.population --families format --seeds 0 --kinds thumbs
python -m benchmarks.population --write                only write the table and the plot
"""

from __future__ import annotations

import itertools
import math
import random
import shutil
import statistics
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import crowd
from benchmarks.cells import RECORDS, ROOT, Cell, Records, carry_out, command_line, markdown, spread, write_section
from benchmarks.population_text import FAMILIES, Liking, answer, likings, questions, rows
from benchmarks.pupil import ANCHORS, MEASURED, Measure, Served, held_out, sampled, share

RUNS = ROOT / "runs" / "population"
RECORD = Records(RECORDS / "population")
KINDS = ("thumbs", "mixed")
RATINGS, EVERY = 300, 50
NOISE = 0.1
TEXTS, HELD_OUT = 12_000, 200
PRETRAIN_STEPS, SFT_STEPS = 50, 700


def cells(families: Sequence[str], kinds: Sequence[str], seeds: Sequence[int]) -> list[Cell]:
    found = []
    for seed in seeds:
        found += [Cell(f"{seed}/base"), Cell(f"{seed}/told", (f"{seed}/base",))]
    for kind in kinds:
        found += [Cell(f"{seed}/{family} {kind}", (f"{seed}/base",)) for seed in seeds for family in families]
    return found


def base(seed: int) -> Path:
    """The folder of a seed's model as it comes in."""
    return RUNS / f"base-{seed}"


def done(cell: Cell) -> bool:
    seed, _, what = cell.name.partition("/")
    return RECORD.has(cell.name) and (what != "base" or (base(int(seed)) / "model").exists())


def measure(name: str) -> None:
    import torch

    torch.set_num_threads(1)
    number, what = name.split("/")
    seed = int(number)
    if what == "base":
        RECORD.put(name, start(base(seed), seed))
    elif what == "told":
        RECORD.put(name, {liking.name: told(base(seed), liking) for liking in map(liking_of, FAMILIES, [seed] * 4)})
    else:
        family, kind = what.split(" ")
        if kind in crowd.INTRUDERS:
            RECORD.put(name, crowd.taught(base(seed) / "model", liking_of(family, seed), kind, seed))
        else:
            RECORD.put(name, taught(base(seed), liking_of(family, seed), kind, seed))


def liking_of(family: str, seed: int) -> Liking:
    """Another one for each seed, as far as the family has several."""
    members = likings(family)
    return members[seed % len(members)]


# --- the model as it comes in -----------------------------------------------------------------------------------------


def start(folder: Path, seed: int = 0) -> dict[str, Any]:
    """Pretrain on answers, fine-tune on questions with answers, and see what the model does before anybody rates it."""
    from operant.config import PretrainConfig, SftConfig
    from operant.data.prompts import load_pairs
    from operant.data.text import Codec
    from operant.models.policy import Policy
    from operant.stages import pretrain, sft

    shutil.rmtree(folder, ignore_errors=True)
    talk = list(itertools.islice(rows(seed), TEXTS + HELD_OUT))
    answers = [row["completion"] for row in talk]
    codec = Codec.train_bpe([f"{row['prompt']}\n{row['completion']}" for row in talk[: TEXTS // 2]], vocab_size=1024)
    policy = Policy.new("llama", "tiny", codec, max_length=160, seed=seed, device="cpu")
    common: dict[str, Any] = {
        "seed": seed, "overwrite": True, "device": "cpu", "tensorboard": False, "save_every": 10**6, "eval_every": 100,
        "warmup_steps": 20,
    }  # fmt: skip
    pretrain(
        PretrainConfig(
            **common, out=str(folder / "pretrain"), steps=PRETRAIN_STEPS, batch_tokens=4096, block=128, lr=2e-3
        ),
        policy=policy, texts=answers[: TEXTS // 2], dev_texts=answers[TEXTS:], quiet=True,
    )  # fmt: skip
    sft(
        SftConfig(**common, out=str(folder / "sft"), steps=SFT_STEPS, batch_size=48, lr=1e-3),
        policy=policy, pairs=load_pairs(talk[:TEXTS], codec), dev_pairs=load_pairs(talk[TEXTS:], codec), quiet=True,
    )  # fmt: skip
    policy.save(folder / "model")
    return {"parameters": sum(p.numel() for p in policy.trainable_parameters())}


# --- the control ------------------------------------------------------------------------------------------------------


def told(folder: Path, liking: Liking) -> dict[str, float]:
    """Satisfaction of the model as it came in, with each wording of the liking after the question, and with none."""
    from operant.data.prompts import load_fitting_prompts
    from operant.models.policy import Policy

    policy = Policy.load(folder / "model", device="cpu")
    policy.model.eval()
    found = {}
    for wish in ("", *liking.wishes):
        asked = [{"prompt": f"{question} {wish}".strip()} for question, _, _ in held_out(MEASURED)]
        found[wish] = share(map(liking.liked, sampled(policy, load_fitting_prompts(asked, policy))))
    return found


# --- the raters -------------------------------------------------------------------------------------------------------


class Rater:
    """Asks, reads, and says what is liked; wrong one time in ten."""

    def __init__(self, liking: Liking, kind: str, seed: int) -> None:
        self.liking, self.kind = liking, kind
        self.rng = random.Random(f"rater {liking.name} {seed}")
        self.asked = questions(held_out=False)

    def ask(self) -> tuple[tuple[str, str, str], str]:
        """What is asked (question, verb, thing), and how it will be rated. A comparison needs two answers."""
        means = "thumb" if self.kind == "thumbs" else self.rng.choice(("thumb", "thumb", "edit", "comparison"))
        return self.rng.choice(self.asked), means

    def rate(self, asked: tuple[str, str, str], means: str, answers: list[tuple[str, str]]) -> dict[str, Any]:
        """The body of the feedback. answers: (completion id, text), one, or two for a comparison."""
        wrong = self.rng.random() < NOISE
        liked = [self.liking.liked(text) for _, text in answers]
        if means == "comparison" and liked[0] != liked[1]:
            better = int(liked[1] != wrong)
            return {"completion_id": answers[better][0], "kind": "comparison", "value": answers[1 - better][0]}
        if means == "edit" and not liked[0] and not wrong:
            corrected = answer(self.rng, *asked[1:], self.liking)
            return {"completion_id": answers[0][0], "kind": "edit", "value": corrected}
        return {"completion_id": answers[0][0], "kind": "thumb", "value": 1 if liked[0] != wrong else -1}


# --- one rater teaches ------------------------------------------------------------------------------------------------


def taught(folder: Path, liking: Liking, kind: str, seed: int, **options: Any) -> dict[str, Any]:
    """One rater, from the first rating to the last, with the measurements on the way."""
    import json

    rater = Rater(liking, kind, seed)
    with tempfile.TemporaryDirectory() as scratch:
        anchors = Path(scratch) / "anchors.jsonl"
        some = random.Random("anchors").sample(questions(held_out=False), ANCHORS)
        anchors.write_text("".join(json.dumps({"prompt": q}) + "\n" for q, _, _ in some), encoding="utf-8")
        program = Served(folder / "model", Path(scratch) / "live", anchors, seed=seed, **options)
        try:
            look = Measure(program.policy().codec, liking)
            curve = [{"ratings": 0, **look(program.policy())}]
            became: Counter[str] = Counter()
            for number in range(1, RATINGS + 1):
                asked, means = rater.ask()
                answers = program.answers(asked[0], 2 if means == "comparison" else 1, 1000 * seed + number)
                became[program.rated(rater.rate(asked, means, answers))] += 1
                if number % EVERY == 0:
                    curve.append({"ratings": number, **look(program.policy())})
                    print(f"{liking.name} {kind} {curve[-1]}", flush=True)
        finally:
            program.close()
    return {"liking": liking.name, "became": dict(became), "curve": curve}


# --- table and plot ---------------------------------------------------------------------------------------------------


def found(what: str) -> dict[int, dict[str, Any]]:
    """The records of a cell by seed."""
    files = RECORD.folder.glob(f"*.{what.replace(' ', '-')}.json")
    seeds = sorted(int(file.name.split(".")[0]) for file in files)
    return {seed: RECORD.get(f"{seed}/{what}") for seed in seeds}


def write() -> None:
    crowds = {(family, kind): found(f"{family} {kind}") for family in FAMILIES for kind in crowd.INTRUDERS}
    if any(crowds.values()):
        write_section("crowd", f"{crowd.COMMAND}. {RECORD.machines()}.\n\n{crowd.table(crowds)}")
    texts = [table(kind) for kind in KINDS if any(found(f"{family} {kind}") for family in FAMILIES)]
    if not texts:
        return
    plot(ROOT / "docs" / "images" / "population.png")
    text = f"`python -m benchmarks.population`. {RECORD.machines()}.\n\n" + "\n\n".join(texts)
    write_section("population", text)
    print(text)


def told_best(seed: int, name: str) -> float:
    """What the control comes to with the best of its wordings; nan where it was not measured."""
    record: dict[str, Any] = RECORD.get(f"{seed}/told") if RECORD.has(f"{seed}/told") else {}
    return max(record.get(name, {"": math.nan}).values())


def table(kind: str) -> str:
    """A row for each rater: before, after, when 0.8 was reached, what it cost, and what the control comes to."""
    rows = []
    for family in FAMILIES:
        for seed, record in found(f"{family} {kind}").items():
            first, last = record["curve"][0], record["curve"][-1]
            reached = next((str(p["ratings"]) for p in record["curve"] if p["satisfaction"] >= 0.8), "never")
            control = told_best(seed, record["liking"])
            moved = [abs(last["others"][name] - first["others"][name]) for name in first["others"]]
            published, not_so = record["became"].get("published", 0), Counter(record["became"])
            not_so.pop("published", None)
            rows.append([
                f"{family}: {record['liking']}", str(seed), f"{first['satisfaction']:.2f}", f"{control:.2f}",
                f"{last['satisfaction']:.2f}", reached, f"{first['sense']:.2f} → {last['sense']:.2f}",
                f"{first['sense_of_liked']:.2f}",
                f"{first['nats']:.2f} → {last['nats']:.2f}", f"{statistics.mean(moved):.2f}",
                f"{published} / {sum(not_so.values())}",
            ])  # fmt: skip
    head = [
        f"{kind}", "seed", "before", "told", "after", "0.8 at", "sense", "of liked before", "nats", "others moved",
        "published / not",
    ]  # fmt: skip
    ended = [r["curve"][-1] for family in FAMILIES for r in found(f"{family} {kind}").values()]
    summary = (
        f"{sum(p['satisfaction'] >= 0.8 for p in ended)} of {len(ended)} end at 0.8 or more. After {RATINGS} ratings: "
        f"satisfaction {spread([p['satisfaction'] for p in ended], 2)}, sense {spread([p['sense'] for p in ended], 2)}."
    )
    return markdown(head, rows) + "\n\n" + summary


def plot(path: Path) -> None:
    """Satisfaction over ratings: a panel for each family, a line for each seed and kind, and the control."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(1, len(FAMILIES), figsize=(11, 2.9), sharex=True, sharey=True)
    for axis, family in zip(axes, FAMILIES, strict=True):
        for kind, colour in zip(KINDS, ("#1f6feb", "#e36209"), strict=True):
            for i, record in enumerate(found(f"{family} {kind}").values()):
                curve = record["curve"]
                axis.plot(
                    [p["ratings"] for p in curve], [p["satisfaction"] for p in curve], color=colour, linewidth=1.4,
                    label=kind if i == 0 else None,
                )  # fmt: skip
        controls = [told_best(seed, r["liking"]) for seed, r in found(f"{family} {KINDS[0]}").items()]
        for i, level in enumerate(controls):
            label = "told in the prompt" if i == 0 else None
            axis.axhline(level, color="#999999", linewidth=0.9, linestyle=":", label=label)
        axis.axhline(0.8, color="#cccccc", linewidth=0.7)
        axis.set_title(family, fontsize=9, loc="left")
        axis.set_ylim(0, 1.02)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=7)
    axes[0].legend(fontsize=7, frameon=False, loc="lower right")
    figure.supxlabel("ratings", fontsize=9)
    figure.supylabel("satisfaction", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--kinds", nargs="+", choices=(*KINDS, *crowd.INTRUDERS), default=list(KINDS))
    given = parser.parse_args()
    carry_out(
        given, "benchmarks.population", cells=lambda: cells(given.families, given.kinds, given.seeds), done=done,
        measure=measure, write=write, records=RECORD, runs=RUNS,
    )  # fmt: skip


if __name__ == "__main__":
    main()
