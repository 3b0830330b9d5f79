"""A reward that is dense by nature: syntax, paid at the token that keeps or breaks it.

The model writes nested lists with three kinds of brackets. A closing bracket that matches pays +1 at once, any token
that breaks the syntax −1 at once, and what is left open at the end −1 for each. The same rewards are learned from token
by token, with discounts γ, and summed up and paid at the end. Same weights to start from, same prompts, same seeds.

python -m benchmarks.dense                       three seeds, about 15 minutes on one core
python -m benchmarks.dense --seeds 0 --fresh
python -m benchmarks.dense --write               only write the table into docs/results
"""

from __future__ import annotations

import random
import shutil
from typing import Any

from benchmarks.cells import RECORDS, ROOT, Cell, Records, carry_out, command_line, markdown, spread, write_section
from operant.types import Prompt

RUNS = ROOT / "runs" / "dense"
RECORD = Records(RECORDS / "dense")
PAIRS = {")": "(", "]": "[", "}": "{"}
OPEN, ATOMS = "([{", "abc"
STEPS, TOKENS = 150, 40
LEVEL = 6.0
NOISE = 0.05  # share of wrong tokens in the raw text: with many, ending at once is all that any policy learns

# how the same rewards are paid: None is summed at the end, a number the discount γ of rewards at their tokens
ARMS: dict[str, float | None] = {
    "summed": None, "1": 1.0, "0.95": 0.95, "0.9": 0.9, "0.7": 0.7, "0.4": 0.4, "0": 0.0,
}  # fmt: skip


# --- the task --------------------------------------------------------------------------------------------------------


class Syntax:
    """The state of one text: which brackets are open, and whether the next element needs a comma."""

    def __init__(self) -> None:
        self.stack: list[str] = []
        self.element = False  # an element has just ended, so a comma or a closing bracket comes next

    def step(self, token: int, text: str) -> float:
        """Reward of the characters that a token wrote; one that is wrong pays −1 and is otherwise passed over."""
        return sum(self._character(c) for c in text)

    def _character(self, c: str) -> float:
        if c in OPEN:
            wrong = self.element
            self.stack.append(c)
            self.element = False
        elif c in ATOMS:
            wrong, self.element = self.element, True
        elif c == ",":
            wrong, self.element = not self.element or not self.stack, False
        elif c in PAIRS:
            if not self.stack or self.stack[-1] != PAIRS[c]:
                return -1.0
            self.stack.pop()
            self.element = True
            return 1.0
        else:
            wrong = True
        return -1.0 if wrong else 0.0


class Session(Syntax):
    """Syntax as a streaming reward; the token that ends the text pays for what it leaves open."""

    def __init__(self, prompt: Prompt, eos: int) -> None:
        super().__init__()
        self.eos = eos
        self.step(-1, prompt.text or "")

    def step(self, token: int, text: str) -> float:
        return super().step(token, text) - (len(self.stack) if token == self.eos else 0)


class ListSyntax:
    """The streaming reward."""

    name = "list syntax"

    def __init__(self, eos: int) -> None:
        self.eos = eos

    def start(self, prompt: Prompt) -> Session:
        return Session(prompt, self.eos)


def sentence(rng: random.Random, noise: float, depth: int = 0) -> str:
    """A nested list; each of its tokens is, with probability `noise`, another one."""
    kind = rng.choice(OPEN)
    parts = [
        sentence(rng, noise, depth + 1) if depth < 3 and rng.random() < 0.4 else rng.choice(ATOMS)
        for _ in range(rng.randint(0, 3))
    ]
    text = kind + ",".join(parts) + {v: k for k, v in PAIRS.items()}[kind]
    return "".join(rng.choice("([{)]},abc") if rng.random() < noise else c for c in text)


def prefix(rng: random.Random) -> str:
    """The beginning of a list, as a prompt."""
    return "".join(rng.choice(OPEN) for _ in range(rng.randint(1, 3)))


# --- cells -----------------------------------------------------------------------------------------------------------


def cells(seeds: list[int]) -> list[Cell]:
    bases = [Cell(f"{seed}/base") for seed in seeds]
    return bases + [Cell(f"{seed}/{arm}", (f"{seed}/base",)) for seed in seeds for arm in ARMS]


def done(cell: Cell) -> bool:
    return RECORD.has(cell.name) and (not cell.name.endswith("base") or (RUNS / cell.name / "model").exists())


def measure(name: str) -> None:
    import torch

    from operant import PretrainConfig, TrainConfig, train
    from operant.data.text import Codec
    from operant.models.policy import Policy
    from operant.rewards import Reward
    from operant.stages import pretrain

    torch.set_num_threads(1)
    seed_text, arm = name.split("/")
    seed, out = int(seed_text), RUNS / name
    rng = random.Random(seed)
    if arm == "base":
        texts = [sentence(rng, NOISE) for _ in range(4000)]
        codec = Codec.train_bpe(texts, vocab_size=259)  # bytes only: one character is one token
        policy = Policy.new("llama", "tiny", codec, max_length=64, seed=seed)
        result = pretrain(
            PretrainConfig(
                out=str(out), seed=seed, steps=500, batch_tokens=2048, lr=2e-3, eval_every=500, overwrite=True,
                tensorboard=False,
            ),
            policy=policy, texts=texts, dev_texts=[sentence(rng, NOISE) for _ in range(100)], quiet=True,
        )  # fmt: skip
        RECORD.put(name, {"dev_loss": result.dev_loss, "seconds": result.seconds})
        return
    policy = Policy.load(RUNS / f"{seed}/base/model")
    prompts = [Prompt(id=str(i), text=(t := prefix(rng)), tokens=policy.codec.encode(t)) for i in range(STEPS * 16)]
    dev = [Prompt(id=f"dev-{i}", text=(t := prefix(rng)), tokens=policy.codec.encode(t)) for i in range(100)]
    syntax, gamma = ListSyntax(policy.codec.eos_id), ARMS[arm]
    points: list[dict[str, float]] = []

    def watch(step: int, metrics: dict[str, float]) -> None:
        points.append({"step": step, "return": metrics["train/reward_mean"], "length": metrics["train/length"]})

    def summed(prompt: Prompt, completion: Any) -> float:
        from operant.rewards import run_stream

        return float(run_stream(syntax, prompt, completion)[0].sum())

    config = TrainConfig(
        out=str(out), seed=seed, steps=STEPS, prompts_per_step=16, group_size=4, max_tokens=TOKENS, lr=3e-4,
        gamma=1.0 if gamma is None else gamma, eval_every=STEPS, eval_prompts=100, overwrite=True, tensorboard=False,
        log_samples=4, reward_workers=0,
        baseline="leave_one_out" if gamma is None else "position_leave_one_out",
    )  # fmt: skip
    reward = Reward(summed, name="list syntax, summed") if gamma is None else syntax
    result = train(policy, prompts, reward, config, dev_prompts=dev, callbacks=[watch], quiet=True)
    RECORD.put(name, {"curve": points, "first": result.first, "last": result.best, "seconds": result.seconds})
    shutil.rmtree(out / "checkpoints", ignore_errors=True)


# --- the table -------------------------------------------------------------------------------------------------------


def mean_return(points: list[dict[str, float]], last: int) -> float:
    """Mean undiscounted return of the sampled completions of the ten steps that end at `last`."""
    return sum(p["return"] for p in points[last - 10 : last]) / 10


def write(seeds: list[int]) -> None:
    rows = []
    for arm in ARMS:
        curves = [RECORD.get(n)["curve"] for seed in seeds if RECORD.has(n := f"{seed}/{arm}")]
        if not curves:
            continue
        level = [until(c, LEVEL) for c in curves]
        told = spread([float(x) for x in level if x is not None], 0) if any(level) else ""
        missing = level.count(None)
        rows.append([
            "summed, paid at the end" if arm == "summed" else f"at its token, γ = {arm}",
            *(spread([mean_return(c, s) for c in curves], 2) for s in marks(curves)),
            told + (f" (not on {missing})" if missing else ""),
        ])  # fmt: skip
    if not rows:
        return
    head = ["", *(f"return at step {s}" for s in marks(curves)), f"steps to a return of {LEVEL:g}"]
    lines = [
        f"`python -m benchmarks.dense`, seeds {', '.join(map(str, seeds))}: undiscounted return of sampled "
        "completions, mean of the last ten steps; 64 completions a step.", "", markdown(head, rows),
    ]  # fmt: skip
    write_section("dense", "\n".join(lines))
    print("\n".join(lines))


def marks(curves: list[list[dict[str, float]]]) -> list[int]:
    steps = min(len(c) for c in curves)
    return [steps // 4, steps // 2, steps]


def until(points: list[dict[str, float]], level: float) -> int | None:
    return next((s for s in range(10, len(points) + 1) if mean_return(points, s) >= level), None)


def main() -> None:
    given = command_line(__doc__).parse_args()
    carry_out(
        given, "benchmarks.dense", cells=lambda: cells(given.seeds), done=done, measure=measure,
        write=lambda: write(given.seeds), records=RECORD, runs=RUNS,
    )  # fmt: skip


if __name__ == "__main__":
    main()
