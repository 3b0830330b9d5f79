"""The whole circle on a built-in task, offline: written-out English dates, times and amounts into Chinese.

A few labelled pairs, many prompts, and a reward that can judge an answer: the case that people have.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml

from operant.config import PretrainConfig, QuickstartConfig, SftConfig, TrainConfig, to_yaml
from operant.data.prompts import Pair, load_fitting_prompts, load_pairs
from operant.data.text import Codec
from operant.models.policy import Policy
from operant.models.sampler import Sampler
from operant.recipes.quickstart_task import Task, make_task
from operant.rl.evaluate import evaluate
from operant.rl.loop import TrainResult, train
from operant.run.files import read_object, replace_file
from operant.run.report import terminal_curve, write_report
from operant.run.runlog import FREE_KEYS, RunFolder, read_jsonl
from operant.stages import pretrain, sft
from operant.stages.supervised import StageResult
from operant.types import Completion, OperantError, Prompt, Sampling

REWARD = "chrf"
MAX_TOKENS = 32
METRICS = {"bleu": "BLEU", "chrf": "chrF", "exact": "exact match"}
TITLES = {
    "pretrained": "pretrained",
    "finetuned": "fine-tuned",
    "continued": "fine-tuned further",
    "rewarded": "with instant reward",
}
FOLDERS = {"pretrained": "pretrain", "finetuned": "finetune", "continued": "continue", "rewarded": "reward"}
CLOSED = "the circle is closed"  # why a finished run stopped
FINE_TUNING_STEPS = 600  # at most; it ends where the held-out chrF no longer rises
LOOK_EVERY = 40  # steps
PATIENCE = 3  # looks without a better chrF
CONTROL_STEPS = 240
REWARD_STEPS = 150
FEWEST_STEPS = REWARD_STEPS // 4  # of reward, from which something may be concluded


class Quickstart:
    """The circle on the built-in task; `prepare` ends with the fine-tuned policy, `run` goes all the way.

    `results` holds a row of the table for each stage that has ended. A circle that was cut off goes on after them, and
    within the stage that was under way.
    """

    def __init__(self, config: QuickstartConfig, out: Path, results: dict[str, dict[str, float]] | None = None) -> None:
        self.config, self.out = config, out
        self.task: Task = make_task(config.seed, labelled=config.labelled, prompts=config.prompts)
        self.results: dict[str, dict[str, float]] = dict(results or {})
        self.said: dict[str, list[Completion]] = {}  # of the rows that this process has measured
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
        """Settings that every stage is given; each has a folder of its name in `out`. The circle has the report."""
        return {
            "out": str(self.out / stage), "seed": self.config.seed, "device": self.config.device,
            "resume": (self.out / stage / "run.json").exists(), "report": False, "tensorboard": False, "keep": 1,
            "save_every": 100,
        }  # fmt: skip

    def prepare(self) -> None:
        """Pretrain and fine-tune."""
        self.stage(1, "pretrained", "a causal language model from nothing on raw text", self.pretrain)
        pairs = f"{self.config.labelled} labelled pairs until the held-out chrF stops rising"
        self.stage(2, "finetuned", pairs, lambda: self.fine_tune("finetune", FINE_TUNING_STEPS, patience=PATIENCE))

    def run(self) -> None:
        """Go all the way: prepare, then from the same start the control and the reward, and measure each."""
        self.prepare()
        self.stage(
            3, "continued", "the control, the same pairs for longer; its best by held-out chrF is kept",
            lambda: self.fine_tune("continue", CONTROL_STEPS),
        )  # fmt: skip
        self.stage(
            4, "rewarded", f"{REWARD} of its own answers to {self.config.prompts} prompts, and the pairs", self.reward
        )

    def stage(self, number: int, row: str, text: str, learn: Callable[[], StageResult[Any] | TrainResult]) -> None:
        """Learn, answer the test prompts, and keep what came of it as a row of the table, also on the disk.

        Raises KeyboardInterrupt after a Ctrl-C, which has saved.
        """
        if row in self.results:
            return
        _say(f"{number}/{len(TITLES)} {TITLES[row]}: {text}")
        if learn().stop_reason.startswith("interrupted"):
            raise KeyboardInterrupt
        values, self.said[row] = self.held_out(self.test)
        self.results[row] = {name: round(values[name] * (100 if name == "exact" else 1), 2) for name in METRICS}
        replace_file(self.out / "results.json", json.dumps(self.results, indent=1))
        _say("   " + ", ".join(f"{METRICS[name]} {value:.1f}" for name, value in self.results[row].items()))

    def pretrain(self) -> StageResult[Policy]:
        """A causal language model on raw text of both languages."""
        return pretrain(
            PretrainConfig(
                **self.options("pretrain"), steps=100, batch_tokens=4096, block=128, lr=2e-3, warmup_steps=20,
                eval_every=50,
            ),
            policy=self.policy, texts=self.raw, dev_texts=[row["prompt"] for row in self.task.dev], quiet="settings",
        )  # fmt: skip

    def fine_tune(self, stage: str, steps: int, patience: int = 0) -> StageResult[Policy]:
        """Fine-tune on the labelled pairs and keep the weights with the best held-out chrF.

        By the dev loss it would stop too early: memorising raises the loss while the answers still get better.
        """
        start = "pretrain" if stage == "finetune" else "finetune"
        self.policy.restore(self.out / start / "model")
        return sft(
            SftConfig(
                **self.options(stage), batch_size=64, lr=1e-3, warmup_steps=20, steps=steps, best_metric="chrf",
                eval_every=LOOK_EVERY, eval_prompts=len(self.dev), max_tokens=MAX_TOKENS, patience=patience,
                **self.limit(stage),
            ),
            policy=self.policy, pairs=self.pairs, dev_pairs=self.dev_pairs, quiet="settings",
        )  # fmt: skip

    def reward(self) -> TrainResult:
        """Learn from the reward of its own answers, from where fine-tuning had stopped helping."""
        start = self.out / "finetune" / "model"
        self.policy.restore(start)
        return train(
            self.policy, self.prompts(self.task.prompts), REWARD,
            TrainConfig(
                **self.options("reward"), model=str(start), dense=True, steps=REWARD_STEPS, group_size=4,
                prompts_per_step=32, sft_coef=0.6, sft_batch_size=32, lr=5e-4, schedule="linear",
                max_tokens=MAX_TOKENS, eval_every=25, **self.limit("reward"),
            ),
            dev_prompts=self.dev, pairs=self.pairs, quiet="settings",
        )  # fmt: skip

    def limit(self, stage: str) -> dict[str, Any]:
        """The processor time that the control and the reward may take. A busy machine takes longer, and no less."""
        return {} if stage == "finetune" else {"max_minutes": self.config.minutes, "clock": "cpu"}

    def held_out(self, prompts: list[Prompt]) -> tuple[dict[str, float], list[Completion]]:
        """({metric: value}, completions) of greedy answers."""
        return evaluate(
            Sampler(self.policy, max_rows=256), prompts, metrics=tuple(METRICS),
            sampling=Sampling(temperature=0.0, max_tokens=MAX_TOKENS),
        )  # fmt: skip

    def answers(self, row: str) -> list[Completion]:
        """What the policy of a row answers to the test prompts."""
        if row not in self.said:
            self.policy.restore(self.out / FOLDERS[row] / "model")
            _, self.said[row] = self.held_out(self.test)
        return self.said[row]


def quickstart(config: QuickstartConfig) -> dict[str, dict[str, float]]:
    """Run the circle, print and keep what came of it; the table as a dict, BLEU, chrF and exact match from 0 to 100.

    Writes results.json, report.html, curves/ and a folder per stage into `config.out`; the result is in its `model`.
    A circle that was cut off goes on where it was. One that is closed is printed again, and nothing in it changes.

    Raises OperantError for a folder with another run or one that cannot be written, and when a stage cannot go on;
    KeyboardInterrupt after a Ctrl-C, which has saved.
    """
    out = Path(config.out)
    if not config.overwrite and read_object(out / "run.json").get("stop_reason") == CLOSED:
        return _closed(config, out)
    begun, threads = time.perf_counter(), torch.get_num_threads()
    torch.set_num_threads(config.threads or free_cores())
    try:
        resume = not config.overwrite and (out / "config.yaml").exists()
        free = FREE_KEYS | {"reward", "minutes"}  # config.yaml names the reward for the report
        kept = dataclasses.replace(config, overwrite=False)
        with RunFolder.open(out, to_yaml(kept), resume=resume, overwrite=config.overwrite, free_keys=free) as folder:
            try:
                results = read_object(out / "results.json") if folder.resumed else {}
                circle = Quickstart(config, folder.path, results)
            except BaseException:
                if not folder.resumed:
                    folder.discard()  # nothing was learned: leave no half-made run in the way of the next try
                raise
            folder.keep()
            if folder.resumed:
                _say(f"going on with {out}, which was not finished (--overwrite starts again)")
            try:
                circle.run()
            except KeyboardInterrupt:
                _say("saved; the same command goes on from here")
                raise
            _close(circle, folder, time.perf_counter() - begun)
            return circle.results
    finally:
        torch.set_num_threads(threads)


def free_cores() -> int:
    """Cores that nobody keeps busy just now, at least one. On a busy core a second thread costs more than it brings."""
    cores = psutil.cpu_count() or 1
    return max(1, cores - round(psutil.cpu_percent(interval=0.3) / 100 * cores))


def _close(circle: Quickstart, folder: RunFolder, seconds: float) -> None:
    """Put the result together, write the report, and print the table."""
    out = folder.path
    shutil.copytree(out / "reward" / "model", out / "model", dirs_exist_ok=True)
    circle.task.save(out / "data")
    for name in ("metrics.jsonl", "samples.jsonl"):
        shutil.copy(out / "reward" / name, out / name)
    kept = dataclasses.replace(circle.config, overwrite=False)
    replace_file(out / "config.yaml", yaml.safe_dump({**yaml.safe_load(to_yaml(kept)), "reward": REWARD}))
    folder.finish(CLOSED, seconds=round(seconds, 1))
    report = write_report(out, title="Quickstart", rows=TITLES)
    _print_curve(out, circle.results)
    _print_answers(circle)
    _print_table(circle.config, out, circle.results)
    print(f"{seconds:.0f} seconds in all. Report: {report}")
    _print_next(out)


def _closed(config: QuickstartConfig, out: Path) -> dict[str, dict[str, float]]:
    """The table of a circle that is closed. Raises OperantError when it is another one than was asked for."""
    results: dict[str, dict[str, float]] = read_object(out / "results.json")
    kept = yaml.safe_load((out / "config.yaml").read_text(encoding="utf-8"))
    for name in ("seed", "labelled", "prompts"):
        if kept.get(name) != getattr(config, name):
            raise OperantError(
                f"{out} holds a finished quickstart with {name} {kept.get(name)}, not {getattr(config, name)}: choose "
                "another --out, or --overwrite"
            )
    _print_table(dataclasses.replace(config, minutes=kept["minutes"]), out, results)
    print(
        f"This circle is closed. To start again: operant quickstart --out {out}-2, or --overwrite if nothing serves it."
    )
    _print_next(out)
    return results


def _print_curve(out: Path, results: dict[str, dict[str, float]]) -> None:
    rows = [row for row in read_jsonl(out / "metrics.jsonl") if isinstance(row.get("eval/bleu"), float)]
    levels = {TITLES[name]: results[name]["bleu"] for name in ("finetuned", "continued")}
    print()
    print(
        terminal_curve(
            [row["step"] for row in rows], [row["eval/bleu"] for row in rows],
            title="BLEU on held-out prompts while learning from reward", levels=levels,
        )
    )  # fmt: skip


def _print_answers(circle: Quickstart) -> None:
    """A few test prompts that fine-tuning gets wrong."""
    before, after = circle.answers("finetuned"), circle.answers("rewarded")
    wrong = [i for i, prompt in enumerate(circle.test) if before[i].text not in prompt.references]
    print("\nAnswers to held-out prompts:")
    for i in (wrong or list(range(len(circle.test))))[:4]:
        print(f"  {circle.test[i].text}")
        print(f"    fine-tuned          {before[i].text}")
        print(f"    with instant reward {after[i].text}")
        print(f"    reference           {circle.test[i].references[0]}")


def _given(config: QuickstartConfig, out: Path) -> dict[str, str]:
    """What each row of the table was given, by what its stage did."""
    facts = {row: read_object(out / folder / "run.json") for row, folder in FOLDERS.items()}

    def steps(row: str) -> str:
        reason = str(facts[row].get("stop_reason", ""))
        if "has not improved" in reason:
            how = ", until held-out chrF no longer rose"
        else:
            how = "" if reason.startswith("all ") else f", cut short by {reason}"
        return f"{facts[row].get('steps', '?')} steps{how}"

    return {
        "pretrained": f"raw text of both languages, {steps('pretrained')}",
        "finetuned": f"{config.labelled} labelled pairs, {steps('finetuned')}",
        "continued": f"the same pairs, {steps('continued')} more; its best by held-out chrF",
        "rewarded": f"{config.prompts} prompts and their {REWARD} reward, and the pairs, {steps('rewarded')}",
    }


def _print_table(config: QuickstartConfig, out: Path, results: dict[str, dict[str, float]]) -> None:
    given = _given(config, out)
    print(f"\n{'on held-out prompts':26}" + "".join(f"{title:>13}" for title in METRICS.values()) + "  given")
    for name, values in results.items():
        print(f"{TITLES[name]:26}" + "".join(f"{values[metric]:13.1f}" for metric in METRICS) + f"  {given[name]}")
    made = read_object(out / FOLDERS["rewarded"] / "run.json").get("steps", REWARD_STEPS)
    if made < FEWEST_STEPS:
        print(f"\nOnly {made} reward steps of {REWARD_STEPS}: too few to conclude from. Give it more --minutes.")
    print(
        "\nOnly the reward saw the prompts' references. The last row learned from scores of its own answers, and from "
        "the labelled pairs that both fine-tuned rows had."
    )


def _print_next(out: Path) -> None:
    print(
        "\nTry next:\n"
        f'  operant sample --model {out}/model --prompt "Half past seven in the evening on the third of May"\n'
        f"  operant eval --model {out}/model --data {out}/data/test.jsonl\n"
        f"  operant train --model {out}/finetune/model --data {out}/data/prompts.jsonl --dev_data {out}/data/dev.jsonl "
        f'--reward "bleu(tokenize=zh)" --max_tokens {MAX_TOKENS} --steps 100 --out runs/mine\n'
        f"  operant serve --model {out}/model"
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
