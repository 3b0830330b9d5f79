"""The loop that stages share: a task's batches in, its loss down, the weights kept that are best on held-out data."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from operant.algorithms.learner import Learner, Trainable
from operant.algorithms.objectives import negative_log_likelihood
from operant.algorithms.table import ALGORITHMS, STAGE_RATES, rate_in_words
from operant.config import ModelConfig, PreferConfig, PretrainConfig, RewardModelConfig, RunConfig, SftConfig
from operant.data.batch import to_device
from operant.data.text import Codec
from operant.models.adapter import adapt
from operant.models.encoder import Encoder, is_encoder
from operant.models.memory import expect_room_to_learn
from operant.models.policy import Policy, is_pretrained, resolve_device
from operant.run.run import Run
from operant.types import Batch, OperantError

M = TypeVar("M", bound=Trainable)

Measures = dict[str, float]
FitConfig = PretrainConfig | SftConfig | PreferConfig | RewardModelConfig


@dataclass(slots=True)
class StageResult(Generic[M]):
    """The model with its best weights, and what the stage reached. dev_loss, the least, is in nats per token."""

    policy: M
    out: Path
    steps: int
    seconds: float
    stop_reason: str
    dev_loss: float


class StageTask(ABC):
    """What a stage learns: the batches of each step, their loss, and how it is measured on held-out data.

    best_metric: what the best weights are kept by: "loss", the least, or another measured name, the most.
    patience: measurements without improvement after which the stage ends; 0 never ends it.
    dropout: whether the model's is on while it learns. unit: of the held-out loss, as it is shown.
    only_sound: weights that show a sign of collapse (`notices`) are not the best, whatever they measure.
    """

    best_metric: str = "loss"
    patience: int = 0
    dropout: bool = True
    unit: str = ""
    only_sound: bool = False

    @abstractmethod
    def batches(self, step: int) -> list[Batch]:
        """The micro-batches of an optimizer step, counted from 0, which share one denominator.

        A function of the step alone, so that a resumed run learns what the uninterrupted one would have.
        """

    def loss(self, model: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """A `learner.TokenLoss`: float[B, S] to be minimised, and sums to be logged. Here −log π(y_t)."""
        return negative_log_likelihood(model.logprobs(batch).logprobs), {}

    def measure(self) -> Measures:
        """Held-out measures of the model as it is now, `loss` among them; empty where nothing is held out."""
        return {}

    def samples(self) -> list[dict[str, Any]]:
        """Completions of the last measurement to be read, as samples.jsonl keeps them."""
        return []

    def shown(self, measures: Measures) -> list[str]:
        """Which measures stand beside the loss in the line of a measurement."""
        return [name for name in measures if name != "loss"]


class LikelihoodTask(StageTask):
    """Raise the likelihood of the action tokens of `make(step)`, measured as nats per token over the `dev` batches."""

    unit = " nats/token"

    def __init__(self, model: Any, make: Callable[[int], list[Batch]], dev: Sequence[Batch]) -> None:
        self.model, self.make, self.dev = model, make, dev

    def batches(self, step: int) -> list[Batch]:
        return self.make(step)

    def measure(self) -> Measures:
        if not self.dev:
            return {}
        loss = mean_loss(self.model, self.dev)
        return {"loss": loss, "perplexity": math.exp(min(loss, 50.0))}

    def shown(self, measures: Measures) -> list[str]:
        return [name for name in (self.best_metric,) if name != "loss"]


@torch.no_grad()
def mean_loss(policy: Any, batches: Sequence[Batch]) -> float:
    """Mean −log π(y_t) in nats per action token over all batches, dropout off."""
    training = policy.model.training
    policy.model.eval()
    total, tokens = 0.0, 0
    for batch in batches:
        moved = to_device(batch, policy.device)
        total -= float(policy.logprobs(moved).logprobs.sum())
        tokens += int(moved.action_mask.sum())
    policy.model.train(training)
    return total / max(1, tokens)


class EarlyStopping:
    """Measures a task on held-out data, keeps the best weights, and ends the run when they no longer improve.

    `state["stale"]`, measurements without improvement, and `state["dev_loss"]`, the least, are saved with the run.
    """

    def __init__(self, run: Run, task: StageTask, state: dict[str, float]) -> None:
        self.run, self.task, self.state = run, task, state

    def measure(self) -> None:
        """Measure; keep the weights if they are the best so far, and stop after `patience` that are not."""
        value = self._look()
        if value is None:
            return
        run, task = self.run, self.task
        run.measured_step = run.step
        improved = value > run.best_value
        self.state["stale"] = 0 if improved else self.state["stale"] + 1
        if task.patience and self.state["stale"] >= task.patience:
            name = "dev loss" if task.best_metric == "loss" else f"dev {task.best_metric}"
            sound = " of a sound policy" if task.only_sound and run.collapsed else ""
            run.stop(f"the {name}{sound} has not improved for {task.patience} measurements", decided=True)
        if improved:
            run.measured(value)

    def last_look(self) -> None:
        """After an early stop: are the newest weights the best?"""
        if self.run.failed or self.run.interrupted or self.run.measured_step == self.run.step:
            return
        value = self._look()
        if value is not None and value > self.run.best_value:
            self.run.promote_best(value)

    def _look(self) -> float | None:
        """Measure, log and show. Returns what the best weights are kept by, greater being better; None for nothing."""
        run, task = self.run, self.task
        measures = task.measure()
        if not measures:
            return None
        self.state["dev_loss"] = min(measures["loss"], self.state["dev_loss"])
        run.log.log(run.step, {f"eval/{name}": value for name, value in measures.items()})
        run.log.samples(run.step, task.samples())
        value = -measures["loss"] if task.best_metric == "loss" else measures[task.best_metric]
        broken = task.only_sound and run.collapsed
        beside = "".join(f", {name} {measures[name]:.4g}" for name in task.shown(measures))
        best = " (no longer sound: not kept)" if broken else " (best)" if value > run.best_value else ""
        run.note(f"step {run.step}: dev loss {measures['loss']:.4f}{task.unit}{beside}{best}")
        run.watch()
        return -math.inf if broken else value


def fit(run: Run, model: M, task: StageTask, config: FitConfig) -> StageResult[M]:
    """Learn `task` for `config.steps` optimizer steps, or until it no longer improves on held-out data.

    Measures every `config.eval_every` steps; the model comes back with the best weights, in eval mode. A learning rate
    that is `auto` becomes the stage's, for what is trained.

    Raises OperantError when too many steps in a row were non-finite, and when the run cannot be resumed.
    """
    rate, note = settled_rate(run, model)
    learner = Learner(
        model, lr=rate, weight_decay=config.weight_decay, max_grad_norm=config.max_grad_norm,
        warmup_steps=config.warmup_steps, total_steps=config.steps, schedule=config.schedule,
        sized=True,
    )  # fmt: skip
    model.recomputes = config.activation_checkpointing
    state: dict[str, float] = {"stale": 0, "dev_loss": math.inf}
    run.attach(model, learner, state)
    if note:
        run.note(note)
    if not math.isfinite(state["dev_loss"]):
        state["dev_loss"] = math.inf
    held_out = EarlyStopping(run, task, state)
    if run.step == 0 and run.measured_step < 0:
        held_out.measure()
    for step in run.steps(config.steps):
        model.model.train(task.dropout)
        stats = learner.step(task.batches(step), task.loss)
        speed = {"train/tokens_per_second": stats.tokens / max(stats.seconds, 1e-9)}
        run.record(
            stats,
            speed | {f"train/{name}": value for name, value in stats.extra.items()},
            shown={"loss": stats.loss, "lr": stats.coefficients["lr"]},
        )
        if run.step % config.eval_every == 0 or run.step == config.steps:
            held_out.measure()
    held_out.last_look()
    run.restore_best()
    model.model.eval()
    if run.failed:
        raise OperantError(run.failed)
    return StageResult(model, run.folder.path, run.step, run.seconds, run.stop_reason, state["dev_loss"])


def settled_rate(run: Run, model: Trainable) -> tuple[float, str]:
    """(the stage's learning rate, which takes the place of an `auto`; the line that says so, or nothing)."""
    config: Any = run.config
    if config.lr != "auto":
        return float(config.lr), ""
    rates = STAGE_RATES.get(run.stage) or ALGORITHMS[config.algorithm].rates
    pretrained, lora = is_pretrained(model.model), hasattr(model.model, "peft_config")
    rate = rates.of(pretrained=pretrained, lora=lora)
    run.settle(lr=rate)
    return rate, rate_in_words(rate, pretrained=pretrained, lora=lora)


def starting_policy(
    config: RunConfig, model: ModelConfig, texts: Callable[[], list[str]], sentinels: int = 0
) -> Policy:
    """Load `model.model`, with a decoder put beside it where it is an encoder, or make a new one whose tokenizer is
    loaded or trained on `texts()`.

    Raises OperantError for "bert", which cannot write, and when what is named cannot be loaded.
    """
    if model.arch == "bert" and not model.model:
        raise OperantError(
            "bert reads and does not write: pretrain it (operant pretrain --arch bert) and give its folder to --model, "
            "which puts a decoder beside it; or choose --arch gpt2, llama, t5 or mbart here"
        )
    if model.model and is_encoder(model.model):
        encoder = Encoder.load(model.model, device=config.device, dtype=config.dtype)
        policy = encoder.with_decoder(seed=config.seed, dropout=model.dropout)
    elif model.model:
        expect_room_to_learn(model.model, model.lora_rank, config.dtype, resolve_device(config.device))
        policy = Policy.load(model.model, device=config.device, dtype=config.dtype)
    else:
        codec = (
            Codec.load(model.tokenizer)
            if model.tokenizer
            else Codec.train_bpe(texts(), vocab_size=model.vocab_size, sentinels=sentinels)
        )
        policy = Policy.new(
            model.arch, model.size, codec, max_length=model.max_length, seed=config.seed, dropout=model.dropout,
            device=config.device, dtype=config.dtype,
        )  # fmt: skip
    adapt(policy, model, config.seed)
    return policy


def all_texts(rows: object) -> list[str]:
    """Every string in the rows, those of nested columns and chats too, to train a tokenizer on: it must know the
    prompts as well as the answers."""
    if isinstance(rows, str):
        return [rows]
    inner = rows.values() if isinstance(rows, dict) else rows if isinstance(rows, list | tuple) else ()
    return [text for value in inner for text in all_texts(value)]
