"""Learning rates for real pretrained models: what each stage reaches at each, and what it costs elsewhere.

The chat model of `make models` learns three tasks from a reward (restaurant descriptions and translations by chrF,
brief answers by a function), two of them from labels, and one from preferences; the encoder learns two reward models.
All weights and LoRA of rank 8, a dozen steps of eight completions, bf16 over float32 weights: enough to see a rate that
ruins a model and one that does not move it. Beside the task stand the drift (KL to the model as it began), the entropy,
distinct-2 and the likelihood of what the untouched model answers to unrelated questions; the texts are kept, to be
read.

export OPERANT_DATA=… OPERANT_MODELS=…                          models/ when the latter is not set
python -m benchmarks.rates                                      every cell that is missing, then the tables
python -m benchmarks.rates --cell train/describe/all/1e-05      one
python -m benchmarks.rates --list
python -m benchmarks.rates --write                              only write the tables into docs/real_models.md
"""

from __future__ import annotations

import gzip
import json
import math
import os
import re
import resource
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.cells import RECORDS, ROOT, Cell, Records, carry_out, command_line, markdown, write_section

RUNS = ROOT / "runs" / "rates"
RECORD = Records(RECORDS / "rates")
CHAT, ENCODER = "smollm2-135m-instruct", "all-minilm-l6-v2"
STEPS, WARMUP, COMPLETIONS, GROUP, HELD_OUT, MICRO = 12, 2, 8, 4, 10, 1024
LENGTHS = {"describe": 32, "translate": 16, "brief": 32}
RATES = {
    "train": {"all": (3e-6, 1e-5, 3e-5, 1e-4), "lora": (1e-4, 3e-4, 1e-3)},
    "sft": {"all": (1e-5, 3e-5, 1e-4, 5e-4), "lora": (1e-4, 3e-4, 1e-3)},
    "prefer": {"all": (1e-6, 5e-6, 2e-5), "lora": (2e-5, 1e-4, 3e-4)},
    "reward-model": {"all": (3e-5, 1e-4, 3e-4)},
}
TASKS = {
    "train": ("describe", "translate", "brief"),
    "sft": ("describe", "translate"),
    "prefer": ("choose",),
    "reward-model": ("sentiment", "choose"),
}
UNRELATED = (
    "What is the capital of Italy?",
    "Name three fruits.",
    "Why is the sky blue?",
    "Who wrote Romeo and Juliet?",
    "What do bees make?",
    "Give me one tip for sleeping well.",
)


def cells() -> list[Cell]:
    return [
        Cell(f"{stage}/{task}/{what}/{rate:.0e}")
        for stage, tasks in TASKS.items() for task in tasks for what, rates in RATES[stage].items() for rate in rates
    ]  # fmt: skip


# --- tasks -----------------------------------------------------------------------------------------------------------


def rows_of(task: str, split: str) -> list[dict[str, Any]]:
    """Rows with a chat as prompt, and with references, two answers, or a score, as the task has them."""
    folder = {
        "describe": "e2e_nlg", "translate": "tatoeba_ende", "sentiment": "sentiment_sentences",
    }.get(task, "pandalm_preferences")  # fmt: skip
    file = next((Path(os.environ["OPERANT_DATA"]) / folder).glob(f"{split}.jsonl*"))
    with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    if task == "describe":
        return [asking(f"Describe this restaurant in a sentence: {r['mr']}", references=r["refs"]) for r in rows]
    if task == "translate":
        return [asking(f"Translate into German: {r['en']}", references=[r["de"]]) for r in rows]
    if task == "sentiment":
        return rows
    if task == "brief":
        asked = dict.fromkeys(r["instruction"] for r in rows if not r["input"] and len(r["instruction"]) < 120)
        return [asking(text) for text in asked]
    return [
        asking(
            f"{r['instruction']}\n{r['input'] or ''}".strip(),
            chosen=str(r["response1" if r["label"] == 1 else "response2"]),
            rejected=str(r["response2" if r["label"] == 1 else "response1"]),
        )
        for r in rows
        if r["label"] and sum(len(str(r[k] or "")) for k in ("instruction", "input", "response1", "response2")) < 400
    ]


def asking(text: str, **columns: Any) -> dict[str, Any]:
    return {"prompt": [{"role": "user", "content": text}], **columns}


def brief(prompt: Any, completion: Any) -> float:
    """One sentence of at most fifteen words that ends as a sentence does."""
    text = completion.text.strip()
    words, ends = len(text.split()), len(re.findall(r"[.!?](?:\s|$)", text))
    return 0.5 * (ends == 1 and text[-1:] in ".!?") + 0.5 * max(0.0, 1 - max(0, words - 15) / 15) * (words > 2)


# --- one cell --------------------------------------------------------------------------------------------------------


class Looks:
    """What a policy says and knows, measured against the untouched model."""

    def __init__(self, task: str, reward: Any) -> None:
        from operant.data.prompts import load_fitting_prompts

        self.base = load_chat()
        self.reward, self.length = reward, LENGTHS.get(task, 36)
        rows = rows_of(task, "dev")[:HELD_OUT]
        self.prompts = load_fitting_prompts(rows, self.base, room=self.length)
        self.pairs = [row for row in rows if "chosen" in row]
        self.unrelated = load_fitting_prompts([asking(text) for text in UNRELATED], self.base, room=16)
        self.known = self.answers(self.base, self.unrelated, 16)

    def answers(self, policy: Any, prompts: Sequence[Any], length: int) -> list[Any]:
        from operant.types import Sampling

        policy.model.eval()
        sampling = Sampling(temperature=0.0, max_tokens=length)
        return [group[0] for group in writer(policy).sample(prompts, sampling)]

    def loglik(self, policy: Any, prompts: Sequence[Any], tokens: Sequence[Any]) -> list[tuple[float, int]]:
        """(log π of each completion, its tokens)."""
        from operant.algorithms.learner import logprobs_of

        batch = policy.batch_of_sequences([p.tokens for p in prompts], list(tokens))
        sums = logprobs_of(policy, batch, MICRO).sum(1).tolist()
        return list(zip(sums, map(len, tokens), strict=True))

    def nats(self, policy: Any, prompts: Sequence[Any], tokens: Sequence[Any]) -> float:
        rows = self.loglik(policy, prompts, tokens)
        return -sum(s for s, _ in rows) / sum(n for _, n in rows)

    def __call__(self, policy: Any) -> dict[str, Any]:
        from operant.rewards import RewardRunner
        from operant.rl.evaluate import evaluate
        from operant.types import Sampling

        policy.model.eval()
        sampling = Sampling(temperature=0.0, max_tokens=self.length)
        with RewardRunner(self.reward, workers=0) as runner:
            values, said = evaluate(writer(policy), self.prompts, sampling=sampling, runner=runner)
        told = [c.tokens for c in said]
        values["kl_ref"] = self.nats(self.base, self.prompts, told) - self.nats(policy, self.prompts, told)
        known = [c.tokens for c in self.known]
        values["forgotten"] = self.nats(policy, self.unrelated, known) - self.nats(self.base, self.unrelated, known)
        values["answers"] = len({c.text for c in said}) / len(said)
        now = self.answers(policy, self.unrelated, 16)
        return values | {
            "texts": [c.text for c in said[:5]],
            "unrelated": [f"{q} → {c.text}" for q, c in zip(UNRELATED, now, strict=True)],
        }

    def likelihood(self, policy: Any) -> dict[str, float]:
        """Nats per token of the references."""
        codec = policy.codec
        pairs = [(p, codec.encode_batch([p.references[0]], eos=True)[0]) for p in self.prompts if p.references]
        return {"loss": self.nats(policy, [p for p, _ in pairs], [t for _, t in pairs])} if pairs else {}

    def margins(self, policy: Any, beta: float = 0.1) -> dict[str, float]:
        """Of held-out pairs: how often, and by how much, the better answer gained on the worse one (DPO's margin)."""
        if not self.pairs:
            return {}
        sides = {}
        for side in ("chosen", "rejected"):
            tokens = policy.codec.encode_batch([row[side] for row in self.pairs], eos=True)
            now, then = (self.loglik(p, self.prompts, tokens) for p in (policy, self.base))
            sides[side] = [a - b for (a, _), (b, _) in zip(now, then, strict=True)]
        margins = [beta * (c - r) for c, r in zip(sides["chosen"], sides["rejected"], strict=True)]
        return {
            "margin": sum(margins) / len(margins),
            "accuracy": sum((m > 0) + 0.5 * (m == 0) for m in margins) / len(margins),
            "chosen_gain": sum(sides["chosen"]) / len(margins),
        }


def load_chat() -> Any:
    from operant.models.policy import Policy

    return Policy.load(Path(os.environ.get("OPERANT_MODELS", ROOT / "models")) / CHAT, device="cpu", dtype="bf16")


def writer(policy: Any) -> Any:
    """A sampler that casts the weights once for all tokens: autocast keeps casts of weights that could be trained."""
    import torch

    from operant.models.sampler import Sampler

    class Casting(Sampler):
        def sample(self, *arguments: Any, **options: Any) -> Any:
            frozen = [p for p in policy.model.parameters() if not p.requires_grad]
            for p in frozen:
                p.requires_grad_(True)
            try:
                with torch.autocast(policy.device.type, dtype=torch.bfloat16):
                    return super().sample(*arguments, **options)
            finally:
                for p in frozen:
                    p.requires_grad_(False)

    return Casting(policy)


def measure(name: str) -> None:
    stage, task, what, rate = name.split("/")
    out = RUNS / name
    shutil.rmtree(out, ignore_errors=True)
    begun = time.perf_counter()
    found = judge(task, float(rate), out) if stage == "reward-model" else learn(stage, task, what, float(rate), out)
    found["seconds"] = round(time.perf_counter() - begun, 1)
    found["gigabytes"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    RECORD.put(name, found)
    for heavy in ("checkpoints", "model"):
        shutil.rmtree(out / heavy, ignore_errors=True)


def learn(stage: str, task: str, what: str, rate: float, out: Path) -> dict[str, Any]:
    """A run of the chat model at one rate: the looks before and after, and the training numbers."""
    from operant.run.runlog import read_jsonl

    reward = brief if task == "brief" else "chrf" if stage != "prefer" else "length"
    look = Looks(task, named(reward, task))
    policy = load_chat()
    if what == "lora":
        policy.add_lora(8, seed=0)
    common: dict[str, Any] = {
        "out": str(out), "steps": STEPS, "lr": rate, "warmup_steps": WARMUP, "save_every": 10**6, "keep": 1,
        "tensorboard": False, "tokens_per_microbatch": MICRO, "eval_every": 10**6, "lora_rank": 8 * (what == "lora"),
    }  # fmt: skip
    before = look(policy) | look.likelihood(policy)
    rows = rows_of(task, "train")[: STEPS * COMPLETIONS]
    {"train": by_reward, "sft": by_labels, "prefer": by_pairs}[stage](policy, rows, reward, look.length, common)
    after = look(policy) | look.likelihood(policy) | look.margins(policy)
    steps = read_jsonl(out / "metrics.jsonl")
    curves = {
        key: [round(float(row[key]), 4) for row in steps if key in row]
        for key in ("train/reward_mean", "train/entropy", "train/distinct2", "train/loss", "train/grad_norm")
        if any(key in row for row in steps)
    }
    return {"before": before, "after": after, "curves": curves}


def named(reward: Any, task: str) -> Any:
    from operant.rewards import as_reward, reward_by_name

    if task == "choose":
        return as_reward(lambda prompt, completion: float(len(completion.text)))
    return reward_by_name(reward) if isinstance(reward, str) else as_reward(reward)


def by_reward(policy: Any, rows: list[Any], reward: Any, length: int, common: dict[str, Any]) -> None:
    from operant.config import TrainConfig
    from operant.data.prompts import load_fitting_prompts
    from operant.rl.loop import train

    prompts = load_fitting_prompts(rows, policy, room=length)
    config = TrainConfig(
        **common, prompts_per_step=COMPLETIONS // GROUP, group_size=GROUP, max_tokens=length, reward_workers=0
    )
    train(policy, prompts, reward, config, sampler=writer(policy), quiet=True)


def by_labels(policy: Any, rows: list[Any], reward: Any, length: int, common: dict[str, Any]) -> None:
    from operant.config import SftConfig
    from operant.data.prompts import load_fitting_pairs
    from operant.stages import sft

    config = SftConfig(**common, batch_size=COMPLETIONS)
    one = [row | {"references": row["references"][:1]} for row in rows]
    pairs, _ = load_fitting_pairs(one, policy, config, "training")
    sft(config, policy=policy, pairs=pairs, dev_pairs=[], quiet=True)


def by_pairs(policy: Any, rows: list[Any], reward: Any, length: int, common: dict[str, Any]) -> None:
    from operant.config import PreferConfig
    from operant.data.preferences import load_preferences
    from operant.data.prompts import PromptFormat
    from operant.stages import prefer

    config = PreferConfig(**common, batch_size=COMPLETIONS // 2, measure_kl=False)
    examples = load_preferences(rows, policy.codec, None, PromptFormat.fitting(policy, config))
    prefer(config, policy=policy, examples=examples, dev_examples=[], quiet=True)


def judge(task: str, rate: float, out: Path) -> dict[str, Any]:
    """A reward model on the encoder, at one rate: the held-out curve and what the best checkpoint reaches."""
    from operant.config import RewardModelConfig
    from operant.run.runlog import read_jsonl
    from operant.stages.reward_model import train_reward_model

    fields = {"kind": "regression", "completion_field": "text", "score_field": "label"} if task == "sentiment" else {}
    config = RewardModelConfig(
        **fields, out=str(out), steps=100, lr=rate, batch_size=16, eval_every=10, patience=0, tensorboard=False, keep=1,
        model=str(Path(os.environ.get("OPERANT_MODELS", ROOT / "models")) / ENCODER), tokens_per_microbatch=4096,
    )  # fmt: skip
    result = train_reward_model(
        config, rows=rows_of(task, "train")[:1600], dev_rows=rows_of(task, "dev")[:200], quiet=True
    )
    measure_name = "accuracy" if config.kind == "comparison" else "correlation"
    rows = read_jsonl(out / "metrics.jsonl")
    return {
        "curves": {
            name: [round(row[f"eval/{name}"], 4) for row in rows if f"eval/{name}" in row]
            for name in ("loss", measure_name)
        },
        "after": result.measured,
    }


# --- tables ----------------------------------------------------------------------------------------------------------


def numbers(name: str) -> list[str]:
    """A cell's line of the table."""
    _, task, what, rate = name.split("/")
    found = RECORD.get(name)
    before, after, curves = found["before"], found["after"], found["curves"]

    def change(key: str, digits: int = 2) -> str:
        if not math.isfinite(after.get(key, math.nan)):
            return "–"
        return f"{before.get(key, 0.0):.{digits}f} → {after[key]:.{digits}f}"

    entropy = curves.get("train/entropy")
    return [
        task, what, rate, change("reward") if task != "choose" else f"margin {after['margin']:+.2f}",
        change("bleu", 1) if task not in ("brief", "choose") else "–", change("loss"),
        f"{entropy[0]:.2f} → {entropy[-1]:.2f}" if entropy else "–", change("distinct2"), f"{after['kl_ref']:.2f}",
        f"{after['forgotten']:.2f}",
    ]  # fmt: skip


def write() -> None:
    head = [
        "task", "what is trained", "rate", "reward", "BLEU", "nats/token of references", "entropy", "distinct-2",
        "KL to the beginning", "forgotten, nats/token",
    ]  # fmt: skip
    parts = []
    for stage in ("train", "sft", "prefer"):
        there = [cell.name for cell in cells() if cell.name.startswith(f"{stage}/") and RECORD.has(cell.name)]
        if there:
            parts += [f"`{stage}`", markdown(head, [numbers(name) for name in there])]
    judged = [cell.name for cell in cells() if cell.name.startswith("reward-model/") and RECORD.has(cell.name)]
    if judged:
        lines = []
        for name in judged:
            curves = RECORD.get(name)["curves"]
            kind = next(key for key in curves if key != "loss")
            best = min(curves["loss"])
            lines.append([name.split("/")[1], name.split("/")[3], kind, f"{max(curves[kind]):.3f}",
                          f"{curves[kind][-1]:.3f}", f"{best:.3f}", f"{curves['loss'][-1]:.3f}"])  # fmt: skip
        parts += [
            "`reward-model`",
            markdown(["task", "rate", "measure", "its best", "its last", "least loss", "last loss"], lines),
        ]
    write_section("rates", "\n\n".join([*parts, f"Measured on {RECORD.machines()}."]), pages=ROOT / "docs")


def main() -> None:
    given = command_line(__doc__).parse_args()
    carry_out(
        given, "benchmarks.rates", cells=cells, done=lambda cell: RECORD.has(cell.name), measure=measure, write=write,
        records=RECORD, runs=RUNS,
    )  # fmt: skip


if __name__ == "__main__":
    main()
