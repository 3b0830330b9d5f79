"""The whole circle on a built-in task, offline: written-out English dates, times and amounts into Chinese.

A few labelled pairs, many prompts, and a reward that can judge an answer: the case that people have.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from operant.config import PretrainConfig, QuickstartConfig, SftConfig, TrainConfig, to_yaml
from operant.data.prompts import Pair, load_fitting_prompts, load_pairs
from operant.data.text import Codec
from operant.models.policy import Policy
from operant.models.sampler import Sampler
from operant.recipes.quickstart_task import Task, make_task
from operant.rl.evaluate import evaluate
from operant.rl.loop import train
from operant.run import checkpoint
from operant.run.report import terminal_curve, write_report
from operant.run.runlog import RunFolder, read_jsonl
from operant.stages import pretrain, sft
from operant.types import Completion, Prompt, Sampling

REWARD = "chrf"
MAX_TOKENS = 32
METRICS = {"bleu": "BLEU", "chrf": "chrF", "exact": "exact match"}
GIVEN = {
    "pretrained": "raw text of both languages",
    "finetuned": "{labelled} labelled pairs, to the plateau of the dev loss",
    "continued": "the same pairs for {minutes:g} min more; its best by dev chrF",
    "rewarded": "{prompts} prompts and their chrF reward, and the pairs, for {minutes:g} min",
}
TITLES = {
    "pretrained": "pretrained",
    "finetuned": "fine-tuned",
    "continued": "fine-tuned further",
    "rewarded": "with instant reward",
}


class Quickstart:
    """The circle on the built-in task; `prepare` ends with the fine-tuned policy, `run` goes all the way."""

    def __init__(self, config: QuickstartConfig, out: Path) -> None:
        self.config, self.out = config, out
        self.task: Task = make_task(config.seed, labelled=config.labelled, prompts=config.prompts)
        self.results: dict[str, dict[str, float]] = {}
        self.answers: dict[str, list[Completion]] = {}
        # raw text, and the prompts themselves, which anybody with many prompts may read
        self.raw = self.task.raw + [row["prompt"] for row in self.task.prompts]
        self.codec = Codec.train_bpe(self.raw, vocab_size=512)
        self.policy = Policy.new("llama", "tiny", self.codec, max_length=128, seed=config.seed, device=config.device)
        self.dev, self.test = self.prompts(self.task.dev), self.prompts(self.task.test)
        self.pairs, self.dev_pairs = self.labelled(self.task.labelled), self.labelled(self.task.dev)

    def prompts(self, rows: list[dict[str, Any]]) -> list[Prompt]:
        """What the policy is asked, with the references that only the reward and the metrics see."""
        return load_fitting_prompts(rows, self.policy)

    def labelled(self, rows: list[dict[str, Any]]) -> list[Pair]:
        """Prompts with the completions to imitate."""
        return load_pairs(rows, self.codec)

    def options(self, stage: str) -> dict[str, Any]:
        """Settings that every stage is given; each has a folder of its name in `out`."""
        return {
            "out": str(self.out / stage), "seed": self.config.seed, "overwrite": True, "device": self.config.device,
            "tensorboard": False, "save_every": 10**6,
        }  # fmt: skip

    def prepare(self) -> None:
        """Pretrain and fine-tune."""
        _say("1/4 pretrain: a causal language model from nothing on raw text")
        pretrain(
            PretrainConfig(
                **self.options("pretrain"), steps=100, batch_tokens=4096, block=128, lr=2e-3, warmup_steps=20,
                eval_every=50,
            ),
            policy=self.policy, texts=self.raw, dev_texts=[row["prompt"] for row in self.task.dev], quiet="settings",
        )  # fmt: skip
        self.measure("pretrained")

        _say(f"2/4 fine-tune on {self.config.labelled} labelled pairs until the dev loss stops improving")
        self.fine_tune("finetune", steps=1000, patience=3)
        self.measure("finetuned")

    def run(self) -> None:
        """Go all the way: prepare, then from the same start the control and the reward, and measure each."""
        self.prepare()
        minutes, start = self.config.minutes, self.out / "finetune" / "model"

        _say(f"3/4 the control: fine-tune further on the same pairs for {minutes:g} minutes")
        self.fine_tune("continue", steps=10**6, max_minutes=minutes)
        self.keep_better(start)
        self.measure("continued")

        _say(
            f"4/4 instant reward: {REWARD} of its answers to {self.config.prompts} prompts, and the pairs, "
            f"for {minutes:g} minutes"
        )
        self.policy.restore(start)
        train(
            self.policy, self.prompts(self.task.prompts), REWARD,
            TrainConfig(
                **self.options("reward"), model=str(start), dense=True, steps=10**6, max_minutes=minutes,
                group_size=4, prompts_per_step=32, sft_coef=0.3, sft_batch_size=32, lr=2e-4,
                max_tokens=MAX_TOKENS, eval_every=20,
            ),
            dev_prompts=self.dev, pairs=self.pairs, quiet="settings",
        )  # fmt: skip
        self.measure("rewarded")

    def fine_tune(self, stage: str, *, steps: int, patience: int = 0, max_minutes: float = 0.0) -> None:
        """Fine-tune on the labelled pairs for so many steps or minutes, or until the dev loss stops improving."""
        sft(
            SftConfig(
                **self.options(stage), batch_size=64, lr=1e-3, warmup_steps=20, eval_every=20, steps=steps,
                patience=patience, max_minutes=max_minutes,
            ),
            policy=self.policy, pairs=self.pairs, dev_pairs=self.dev_pairs, quiet="settings",
        )  # fmt: skip

    def keep_better(self, start: Path) -> None:
        """Of the further fine-tuning's start, best dev loss and end, the one with the highest dev chrF: memorising can
        raise the loss and still improve the answers, and the control shall be as strong as it can."""
        candidates = [start, self.out / "continue" / "model"]
        if (last := checkpoint.latest(self.out / "continue" / "checkpoints")) is not None:
            candidates.append(last / "model")
        values = []
        for candidate in candidates:
            self.policy.restore(candidate)
            values.append(self.held_out(self.dev)[0]["chrf"])
        self.policy.restore(candidates[values.index(max(values))])

    def held_out(self, prompts: list[Prompt]) -> tuple[dict[str, float], list[Completion]]:
        """({metric: value}, completions) of greedy answers."""
        return evaluate(
            Sampler(self.policy, max_rows=256), prompts, metrics=tuple(METRICS),
            sampling=Sampling(temperature=0.0, max_tokens=MAX_TOKENS),
        )  # fmt: skip

    def measure(self, row: str) -> None:
        """Answer the test prompts and keep what came of it as a row of the table."""
        values, self.answers[row] = self.held_out(self.test)
        self.results[row] = {name: round(values[name] * (100 if name == "exact" else 1), 2) for name in METRICS}
        _say("   " + ", ".join(f"{METRICS[name]} {value:.1f}" for name, value in self.results[row].items()))


def quickstart(config: QuickstartConfig) -> dict[str, dict[str, float]]:
    """Run the circle, print and keep what came of it; the table as a dict, BLEU, chrF and exact match from 0 to 100.

    Writes results.json, report.html, curves/ and a folder per stage into `config.out`; the result is in its `model`.

    Raises OperantError for a run folder that is there already or cannot be written, and when a stage cannot go on.
    """
    begun = time.perf_counter()
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads or os.cpu_count() or 1)
    try:
        with RunFolder.open(config.out, to_yaml(config), overwrite=config.overwrite) as folder:
            try:
                circle = Quickstart(config, folder.path)
            except BaseException:
                folder.discard()  # nothing was learned: leave no half-made run in the way of the next try
                raise
            folder.keep()
            circle.run()
            (folder.path / "results.json").write_text(json.dumps(circle.results, indent=1), encoding="utf-8")
            shutil.copytree(folder.path / "reward" / "model", folder.path / "model", dirs_exist_ok=True)
            circle.task.save(folder.path / "data")
            for name in ("metrics.jsonl", "samples.jsonl"):
                shutil.copy(folder.path / "reward" / name, folder.path / name)
            (folder.path / "config.yaml").write_text(
                yaml.safe_dump({**yaml.safe_load(to_yaml(config)), "reward": REWARD}), encoding="utf-8"
            )
            folder.finish("the circle is closed", seconds=round(time.perf_counter() - begun, 1))
            report = write_report(folder.path, title="Quickstart", rows=TITLES)
            _show(circle, config, folder.path, report, time.perf_counter() - begun)
            return circle.results
    finally:
        torch.set_num_threads(threads)


def _show(circle: Quickstart, config: QuickstartConfig, out: Path, report: Path, seconds: float) -> None:
    rows = [row for row in read_jsonl(out / "metrics.jsonl") if isinstance(row.get("eval/bleu"), float)]
    levels = {TITLES[name]: circle.results[name]["bleu"] for name in ("finetuned", "continued")}
    print()
    print(
        terminal_curve(
            [row["step"] for row in rows], [row["eval/bleu"] for row in rows],
            title="BLEU on held-out prompts while learning from reward", levels=levels,
        )
    )  # fmt: skip
    print("\nAnswers to held-out prompts:")
    interesting = [
        i for i, prompt in enumerate(circle.test)
        if circle.answers["finetuned"][i].text not in prompt.references
    ] or list(range(len(circle.test)))  # fmt: skip
    for i in interesting[:4]:
        print(f"  {circle.test[i].text}")
        print(f"    fine-tuned          {circle.answers['finetuned'][i].text}")
        print(f"    with instant reward {circle.answers['rewarded'][i].text}")
        print(f"    reference           {circle.test[i].references[0]}")
    print(
        f"\n{'on ' + str(len(circle.test)) + ' held-out prompts':26}"
        + "".join(f"{title:>13}" for title in METRICS.values())
        + "  given"
    )
    for name, values in circle.results.items():
        told = GIVEN[name].format(labelled=config.labelled, prompts=config.prompts, minutes=config.minutes)
        print(f"{TITLES[name]:26}" + "".join(f"{values[metric]:13.1f}" for metric in METRICS) + f"  {told}")
    print(
        "\nThe prompts' references were seen by the reward only: what the policy learned, it learned from scores of "
        f"its own answers.\n{seconds:.0f} seconds in all. Report: {report}\n\nTry next:\n"
        f'  operant sample --model {out}/model --prompt "Half past seven in the evening on the third of May"\n'
        f"  operant eval --model {out}/model --data {out}/data/test.jsonl\n"
        f"  operant train --model {out}/finetune/model --data {out}/data/prompts.jsonl --dev_data {out}/data/dev.jsonl "
        f'--reward "bleu(tokenize=zh)" --max_tokens {MAX_TOKENS} --steps 100 --out runs/mine\n'
        f"  operant serve --model {out}/model"
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
