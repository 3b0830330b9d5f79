"""A scripted rater teaches the real chat model one style; what it was not asked about should stay.

The rater asks, reads an answer, and says with a thumb whether it likes it. `operant.live.learning.worker` learns each
thumb at once, in this process. Looked at after 0, 10, 30 and 100 thumbs:

    satisfaction   the share of liked answers to questions that nobody rated, drawn as people get them
    right          of fifty unrelated questions with known answers, greedy
    lost           of those that the model as it came in had right, how many are wrong now
    length         words of the answers
    distinct2      different pairs of tokens over all pairs
    KL             of the anchor answers, nats per token from the model as it came in

A condition is a list of words: `served` (as `operant serve` begins), `bare` (anchors that continue an end of text,
instead of answers to shipped questions), `halfwrong` (every thumb is a coin's), and settings of the learner, such as
lora_rank=0.

python -m benchmarks.rater                                                the settings that serve takes
python -m benchmarks.rater --conditions lr=0.1,kl_budget=0.01 --seeds 0 --ratings 30
python -m benchmarks.rater --texts                                        what the models say at the end
"""

from __future__ import annotations

import os
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.cells import RECORDS, ROOT, Cell, Records, carry_out, command_line, markdown, write_section
from benchmarks.rater_text import ASKED, FACTS, STYLES, UNSEEN, is_right

RUNS = ROOT / "runs" / "rater"
RECORD = Records(RECORDS / "rater")
MODEL = Path(os.environ.get("OPERANT_MODELS") or ROOT / "models") / "smollm2-135m-instruct"
RATINGS, LOOKS = 100, (10, 30, 100)
TOKENS, FACT_TOKENS = 24, 16
DRAWN = 4  # answers to each unseen question
CONDITIONS = ("served", "halfwrong")
SHOWN = 10


def cells(conditions: Sequence[str], styles: Sequence[str], seeds: Sequence[int], ratings: int) -> list[Cell]:
    found = [Cell(f"{seed}/base") for seed in seeds]
    return found + [
        Cell(f"{seed}/{style} {condition} {ratings}", (f"{seed}/base",))
        for condition in conditions for style in styles for seed in seeds
    ]  # fmt: skip


def measure(name: str) -> None:
    import torch

    torch.set_num_threads(1)
    number, what = name.split("/")
    if what == "base":
        RECORD.put(name, _looked_at(MODEL, list(STYLES), int(number)))
        return
    style, condition, ratings = what.split(" ")
    RECORD.put(name, taught(style, condition, int(ratings), int(number)))


# --- the rater --------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Answered:
    id: str
    prompt: Any
    completion: Any


@dataclass(slots=True)
class _Log:
    """What learning sees of a store."""

    answers: dict[str, _Answered] = field(default_factory=dict)
    events: list[Any] = field(default_factory=list)

    def completion(self, completion_id: str) -> _Answered | None:
        return self.answers.get(completion_id)

    def events_after(self, offset: int, limit: int) -> Sequence[tuple[int, Any]]:
        return list(enumerate(self.events, start=1))[offset : offset + limit]


def taught(style: str, condition: str, ratings: int, seed: int) -> dict[str, Any]:
    """One rater, from the first thumb to the last, with the looks on the way."""
    base = RECORD.get(f"{seed}/base")[style]
    rng = random.Random(f"rater {style} {seed}")
    RUNS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=RUNS) as scratch:
        log, told = _Log(), list[dict[str, Any]]()
        worker = _learner(Path(scratch), condition, log, seed, told)
        curve, seconds = [{"ratings": 0} | base], []
        for number in range(1, ratings + 1):
            answer = _ask(worker.current().policy, rng.choice(ASKED), 1000 * seed + number)
            log.answers[answer.id] = answer
            liked = rng.random() < 0.5 if "halfwrong" in condition.split(",") else STYLES[style](answer.completion.text)
            log.events.append(_thumb(answer.id, liked))
            began = time.monotonic()
            while worker.once():
                pass
            seconds.append(time.monotonic() - began)
            print(f"{number}: {seconds[-1]:.1f} s, {told[-1].get('gate') or told[-1].get('reason')}", flush=True)
            if number in LOOKS or number == ratings:
                there = Path(worker.versions.current().path) / "model"
                point = _looked_at(there, (style,), seed)[style]
                point["lost"] = sorted(set(base["right"]) - set(point["right"]))
                curve.append({"ratings": number} | point)
                shown = {name: value for name, value in point.items() if name not in ("texts", "right")}
                print(f"{style} {condition} {number} {shown} right {len(point['right'])}", flush=True)
        records = worker.versions.records()
    became = Counter(o.reason.split(" is ")[0] or o.state for r in records for o in r.outcomes.values())
    asked = {"style": style, "condition": condition}
    return asked | {
        "curve": curve,
        "became": dict(became),
        "seconds": statistics.median(seconds),
        "steps": _steps(told),
    }


def _learner(scratch: Path, condition: str, log: _Log, seed: int, told: list[dict[str, Any]]) -> Any:
    """A learner on a root of its own, begun as the condition says."""
    import yaml

    from operant.config import WorkerConfig
    from operant.live.learning.worker import Worker

    words = condition.split(",")
    given = [word.partition("=") for word in words if "=" in word]
    options: dict[str, Any] = {name: yaml.safe_load(value) for name, _, value in given}
    config = WorkerConfig(root=str(scratch / "live"), model=str(MODEL), device="cpu", seed=seed, keep=1, **options)
    worker = Worker(config, log, told.append)
    worker.start()
    if "bare" in words:
        _continue_nothing(worker)
    return worker


def _continue_nothing(worker: Any) -> None:
    """Give a root the anchors of a model without a template: what it says after an end of text."""
    import numpy as np

    from operant.live.learning.anchors import Anchors
    from operant.types import Prompt

    policy, config = worker.current().policy, worker.config
    bare = np.array([policy.codec.eos_id], np.int64)
    prompts = [Prompt(id=f"anchor-{i}", tokens=bare) for i in range(config.anchor_rows)]
    Anchors.of(policy, prompts, max_tokens=config.anchor_tokens, seed=config.seed).save(worker.versions.root)


def _ask(policy: Any, question: str, number: int) -> _Answered:
    from operant.data.prompts import load_prompts

    (prompt,) = load_prompts([{"prompt": question}], policy.codec)
    completion = _answers(policy, [prompt], TOKENS, seed=number)[0]
    return _Answered(f"answer-{number}", prompt, completion)


def _answers(
    policy: Any, prompts: Sequence[Any], tokens: int, *, seed: int = 0, greedy: bool = False, drawn: int = 1
) -> list[Any]:
    from operant.models.sampler import Sampler
    from operant.types import Sampling

    temperature, top_p, top_k = policy.generation.settings(0.0 if greedy else None, None, None, chat=True)
    sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, max_tokens=tokens, seed=seed)
    return [answer for group in Sampler(policy, max_rows=64).sample(prompts, sampling, drawn) for answer in group]


def _thumb(answer: str, liked: bool) -> Any:
    from operant.types import Feedback

    return Feedback(
        id=f"thumb-{answer}", completion_id=answer, kind="thumb", value=1 if liked else -1, source="rater",
        idempotency_key=answer, time=0.0,
    )  # fmt: skip


def _looked_at(model: Path, styles: Sequence[str], seed: int) -> dict[str, dict[str, Any]]:
    """What the weights in this folder say, by style. In bfloat16, which is what there is time for."""
    from operant.data.prompts import load_prompts
    from operant.live.learning.anchors import asked_in_chat
    from operant.live.learning.gate import sense_metrics
    from operant.live.learning.questions import QUESTIONS
    from operant.live.learning.worker import SENSE_TOKENS
    from operant.models.policy import Policy
    from operant.rl.evaluate import distinct

    policy = Policy.load(model, device="cpu", dtype="bf16-true")
    policy.model.eval()
    unseen = load_prompts([{"prompt": question} for question in UNSEEN], policy.codec)
    said = _answers(policy, unseen, TOKENS, seed=10_000 + seed, drawn=DRAWN)
    facts = load_prompts([{"prompt": question} for question, _ in FACTS], policy.codec)
    known = _answers(policy, facts, FACT_TOKENS, greedy=True)
    right = [question for (question, wanted), c in zip(FACTS, known, strict=True) if is_right(c.text, wanted)]
    texts = [c.text for c in said]
    watched = asked_in_chat(policy, QUESTIONS[-8:], room=SENSE_TOKENS)
    common = {
        "sense": sense_metrics(policy, watched, max_tokens=SENSE_TOKENS, interrupted=lambda: False),
        "right": right,
        "length": statistics.mean(len(text.split()) for text in texts),
        "distinct2": distinct([c.tokens for c in said]),
        "texts": [f"{q} → {c.text}" for q, c in zip(UNSEEN[:SHOWN], said[::DRAWN], strict=False)]
        + [f"{q} → {c.text}" for (q, _), c in zip(FACTS, known, strict=True)],
    }
    return {
        style: common | {"satisfaction": statistics.mean(float(STYLES[style](text)) for text in texts)}
        for style in styles
    }


def _steps(told: Sequence[dict[str, Any]]) -> dict[str, float]:
    """How the published steps were, in the middle, and how far the last one lies from the model as it came in."""
    gates = [line["gate"] for line in told if "gate" in line]
    if not gates:
        return {}
    middle = {name: statistics.median(gate[name] for gate in gates) for name in ("scale", "kl_parent")}
    return middle | {name: gates[-1][name] for name in ("kl_drift", "likelihood_lost")}


# --- table ------------------------------------------------------------------------------------------------------------


def write() -> None:
    rows = []
    measured = [(file.stem.partition(".")[0], RECORD.get(file.stem)) for file in RECORD.folder.glob("*.json")]
    cells = [(seed, record) for seed, record in measured if "curve" in record]
    shipped = {name: place for place, name in enumerate(CONDITIONS)}
    for seed, record in sorted(
        cells, key=lambda cell: (shipped.get(cell[1]["condition"], 9), cell[1]["style"], cell[1]["condition"], cell[0])
    ):
        curve = {point["ratings"]: point for point in record["curve"]}
        rows.append([
            f"{record['style']}: {record['condition'].replace(',', ', ')}", seed,
            *(f"{curve[n]['satisfaction']:.2f}" if n in curve else "" for n in (0, *LOOKS)),
            *(f"{len(curve[n]['right'])}" if n in curve else "" for n in (0, *LOOKS)),
            f"{curve[0]['length']:.0f} → {curve[max(curve)]['length']:.0f}",
            f"{curve[0]['distinct2']:.2f} → {curve[max(curve)]['distinct2']:.2f}",
            f"{len(curve[max(curve)]['lost'])}",
            f"{record['steps']['kl_drift']:.2f}",
            f"{record['became'].get('used', 0)} / {sum(record['became'].values())}",
        ])  # fmt: skip
    if not rows:
        return
    head = ["rater", "seed", *(f"liked {n}" for n in (0, *LOOKS)), *(f"right {n}" for n in (0, *LOOKS)), "words",
            "distinct-2", "lost", "KL", "used / thumbs"]  # fmt: skip
    write_section(
        "rater", f"`python -m benchmarks.rater`. {RECORD.machines()}.\n\n{markdown(head, rows)}", pages=ROOT / "docs"
    )


def show() -> None:
    for file in sorted(RECORD.folder.glob("*.json")):
        if not file.stem.endswith(".base"):
            print(file.stem)
            print("\n".join(f"  {text!r}" for text in RECORD.get(file.stem)["curve"][-1]["texts"]))


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--conditions", nargs="+", default=list(CONDITIONS))
    parser.add_argument("--styles", nargs="+", choices=STYLES, default=list(STYLES))
    parser.add_argument("--ratings", type=int, default=RATINGS)
    parser.add_argument("--texts", action="store_true", help="show what was said at the end of each cell")
    given = parser.parse_args()
    if given.texts:
        show()
        return
    carry_out(
        given, "benchmarks.rater",
        cells=lambda: cells(given.conditions, given.styles, given.seeds, given.ratings),
        done=lambda cell: RECORD.has(cell.name), measure=measure, write=write, records=RECORD, runs=RUNS,
    )  # fmt: skip


if __name__ == "__main__":
    main()
