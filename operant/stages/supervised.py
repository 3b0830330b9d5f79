"""What pretraining and fine-tuning share: batches in, likelihood up, the best dev loss kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from operant.algorithms.learner import Learner, TokenLoss, Trainable
from operant.algorithms.objectives import negative_log_likelihood
from operant.config import ModelConfig, RunConfig
from operant.data.batch import to_device
from operant.data.text import Codec
from operant.models.encoder import Encoder, is_encoder
from operant.models.policy import Policy
from operant.run.run import Run
from operant.types import Batch, OperantError

M = TypeVar("M", bound=Trainable)


@dataclass(slots=True)
class StageResult(Generic[M]):
    """The model with its best weights, and what the stage reached. dev_loss, the least, is in nats per token."""

    policy: M
    out: Path
    steps: int
    seconds: float
    stop_reason: str
    dev_loss: float


def likelihood_loss(policy: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """−log π(y_t) for every action token."""
    return negative_log_likelihood(policy.logprobs(batch).logprobs), {}


@torch.no_grad()
def mean_loss(policy: Any, batches: Sequence[Batch]) -> float:
    """Nats per action token over all batches, dropout off."""
    training = policy.model.training
    policy.model.eval()
    total, tokens = 0.0, 0
    for batch in batches:
        moved = to_device(batch, policy.device)
        total -= float(policy.logprobs(moved).logprobs.sum())
        tokens += int(moved.action_mask.sum())
    policy.model.train(training)
    return total / max(1, tokens)


def fit(
    run: Run,
    policy: M,
    config: RunConfig,
    *,
    steps: int,
    lr: float,
    warmup_steps: int,
    schedule: str,
    batches: Callable[[int], list[Batch]],
    dev: Sequence[Batch],
    eval_every: int,
    patience: int = 0,
    loss_of: TokenLoss = likelihood_loss,
    held_out: Callable[[], dict[str, float]] | None = None,
    best_metric: str = "loss",
    dropout: bool = True,
) -> StageResult[M]:
    """Minimise the loss of `batches(step)`; measure `dev` every `eval_every` steps, keep the best, stop after
    `patience` measurements without improvement (0: never).

    held_out: further held-out metrics, such as those of completions, and the `loss` where there is no `dev`.
    best_metric: "loss", the least, or one of them, the most. dropout: whether the model's is on while it learns.
    """
    learner = Learner(
        policy, lr=lr, weight_decay=config.weight_decay, max_grad_norm=config.max_grad_norm,
        warmup_steps=warmup_steps, total_steps=steps, schedule=schedule,  # type: ignore[arg-type]
    )  # fmt: skip
    state: dict[str, float] = {"stale": 0, "dev_loss": math.inf}
    run.attach(policy, learner, state)
    if not math.isfinite(state["dev_loss"] or math.inf):
        state["dev_loss"] = math.inf

    measurable = bool(dev) or held_out is not None

    def look() -> float:
        """Measure and tell; what is better is greater."""
        values: dict[str, float] = {}
        if dev:
            loss = mean_loss(policy, dev)
            values = {"loss": loss, "perplexity": math.exp(min(loss, 50.0))}
        further = held_out() if held_out is not None else {}
        values |= further
        state["dev_loss"] = min(values["loss"], state["dev_loss"])
        run.log.log(run.step, {f"eval/{name}": value for name, value in values.items()})
        value = -values["loss"] if best_metric == "loss" else values[best_metric]
        unit = " nats/token" if dev else ""
        shown = ([] if best_metric == "loss" else [best_metric]) if dev else [n for n in further if n != "loss"]
        told = "".join(f", {name} {values[name]:.4g}" for name in shown)
        better = " (best)" if value > run.best_value else ""
        run.note(f"step {run.step}: dev loss {values['loss']:.4f}{unit}{told}{better}")
        return value

    def measure() -> None:
        if not measurable:
            return
        value = look()
        run.measured_step = run.step
        improved = value > run.best_value
        state["stale"] = 0 if improved else state["stale"] + 1
        if patience and state["stale"] >= patience:
            measure_name = "dev loss" if best_metric == "loss" else f"dev {best_metric}"
            run.stop(f"the {measure_name} has not improved for {patience} measurements", decided=True)
        if improved:
            run.measured(value)

    if run.step == 0 and run.measured_step < 0:
        measure()
    for step in run.steps(steps):
        policy.model.train(dropout)
        stats = learner.step(batches(step), loss_of)
        speed = {"train/tokens_per_second": stats.tokens / max(stats.seconds, 1e-9)}
        run.record(
            stats,
            speed | {f"train/{name}": value for name, value in stats.extra.items()},
            shown={"loss": stats.loss, "lr": stats.coefficients["lr"]},
        )
        if run.step % eval_every == 0 or run.step == steps:
            measure()
    if not run.failed and not run.interrupted and run.measured_step != run.step:
        last = look() if measurable else -math.inf
        if last > run.best_value:
            run.promote_best(last)
    run.restore_best()
    policy.model.eval()
    if run.failed:
        raise OperantError(run.failed)
    return StageResult(policy, run.folder.path, run.step, run.seconds, run.stop_reason, state["dev_loss"])


def starting_policy(
    config: RunConfig, model: ModelConfig, texts: Callable[[], list[str]], sentinels: int = 0
) -> Policy:
    """Load `model.model`, with a decoder put beside it where it is an encoder, or make a new one whose tokenizer is
    loaded or trained on `texts()`."""
    if model.arch == "bert" and not model.model:
        raise OperantError(
            "bert reads and does not write: pretrain it (operant pretrain --arch bert) and give its folder to --model, "
            "which puts a decoder beside it; or choose --arch gpt2, llama, t5 or mbart here"
        )
    if model.model and is_encoder(model.model):
        encoder = Encoder.load(model.model, device=config.device, dtype=config.dtype)
        policy = encoder.with_decoder(seed=config.seed, dropout=model.dropout)
    elif model.model:
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
    if model.lora_rank:
        policy.add_lora(model.lora_rank, seed=config.seed)
    return policy


def all_texts(rows: object) -> list[str]:
    """Every string in the rows, those of nested columns and chats too, to train a tokenizer on: it must know the
    prompts as well as the answers."""
    if isinstance(rows, str):
        return [rows]
    inner = rows.values() if isinstance(rows, dict) else rows if isinstance(rows, list | tuple) else ()
    return [text for value in inner for text in all_texts(value)]
