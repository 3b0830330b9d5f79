"""Fine-tuning on labelled pairs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import Tensor

from operant.algorithms.objectives import label_smoothed
from operant.config import SftConfig
from operant.data.batch import microbatches
from operant.data.prompts import Pair, PromptFormat, load_fitting_pairs, settle_style
from operant.data.rows import held_out_source, load_split_rows
from operant.models.head import of_rows
from operant.models.policy import Policy, placed
from operant.models.sampler import Sampler
from operant.rl.evaluate import evaluate
from operant.run.run import DataOrder, Quiet, Run, as_begun
from operant.stages.supervised import LikelihoodTask, Measures, StageResult, all_texts, fit, starting_policy
from operant.types import Batch, OperantError, Prompt, Sampling


def pairs_batch(pairs: Sequence[Pair], policy: Policy) -> Batch:
    """A batch of labelled pairs; the loss is on the completions' tokens, averaged per token."""
    return policy.batch_of_sequences([p.prompt.tokens for p in pairs], [p.completion_tokens for p in pairs])


def sft(
    config: SftConfig,
    *,
    policy: Policy | None = None,
    pairs: Sequence[Pair] | None = None,
    dev_pairs: Sequence[Pair] | None = None,
    quiet: Quiet = False,
) -> StageResult[Policy]:
    """Fine-tune until the held-out measure stops improving. What is not given is loaded as `config` says.

    Raises OperantError for missing or empty data, unknown fields, and answers or prompts that the model cannot hold.
    """
    config = as_begun(config)
    notes: list[str] = []
    source = ""
    from_files = policy is None or pairs is None
    if policy is None or pairs is None:
        rows, dev_rows = load_split_rows(config.data, config.dev_data, config.limit, 0.1, 500)
        policy = policy or starting_policy(config, config, lambda: all_texts(rows))
        notes += settle_style(policy, config)
        pairs, more = load_fitting_pairs(rows, policy, config, "training", train_on=config.train_on)
        dev_pairs, others = load_fitting_pairs(dev_rows, policy, config, "held-out", train_on=config.train_on)
        source = held_out_source(config.data, config.dev_data)
        notes += [*more, *others]
    style = PromptFormat.of(config).style(policy.codec)
    with Run(config, "sft", in_force=dataclasses.asdict(style), quiet=quiet) as run:
        for note in notes:
            run.note(note)
        if not pairs:
            raise OperantError("there are no pairs to learn from; check --data and --limit")
        run.takes("labelled pairs", len(pairs), len(dev_pairs or []), source, given=() if from_files else pairs)
        return fit(run, policy, FineTuningTask(policy, config, list(pairs), list(dev_pairs or [])), config)


class FineTuningTask(LikelihoodTask):
    """Raise the likelihood of the completions of labelled pairs, smoothed if asked for.

    Measured by the dev loss and, where the best is kept by another metric, by greedy completions of the held-out
    prompts.

    Raises OperantError where that metric has no held-out pairs.
    """

    def __init__(self, policy: Policy, config: SftConfig, pairs: list[Pair], held_out: list[Pair]) -> None:
        dev = [pairs_batch(held_out[i : i + 64], policy) for i in range(0, len(held_out), 64)]
        super().__init__(policy, self._make, dev)
        self.config, self.pairs = config, pairs
        self.best_metric, self.patience = config.best_metric, config.patience
        self.order = DataOrder(len(pairs), min(config.batch_size, len(pairs)), config.seed, "pairs")
        self.prompts = answered_prompts(held_out)[: config.eval_prompts] if config.best_metric != "loss" else []
        if config.best_metric != "loss" and not self.prompts:
            raise OperantError(
                f"best_metric {config.best_metric} needs held-out pairs; give --dev_data, and --eval_prompts above 0"
            )

    def _make(self, step: int) -> list[Batch]:
        batch = pairs_batch([self.pairs[i] for i in self.order.take(step)], self.model)
        return list(microbatches(batch, self.config.tokens_per_microbatch))

    def loss(self, model: Policy, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        if not self.config.label_smoothing:
            return super().loss(model, batch)
        tokens = batch.tokens[batch.action_mask]

        def picked(logits: Tensor, part: slice) -> tuple[Tensor, Tensor]:
            every = logits.log_softmax(-1)
            return every.gather(-1, tokens[part, None])[:, 0], every.mean(-1)

        logprobs, means = (placed(batch, column) for column in of_rows(picked, model.acting(batch)))
        return label_smoothed(logprobs, means, self.config.label_smoothing), {}

    def measure(self) -> Measures:
        measures = super().measure()
        if not self.prompts:
            return measures
        training = self.model.model.training
        self.model.model.eval()
        sampling = Sampling(temperature=0.0, max_tokens=self.config.max_tokens)
        completed, _ = evaluate(Sampler(self.model, max_rows=256), self.prompts, sampling=sampling)
        self.model.model.train(training)
        return measures | completed


def answered_prompts(pairs: Sequence[Pair]) -> list[Prompt]:
    """Each prompt once, its answers the references."""
    answers: dict[str, list[str]] = {}
    prompts: dict[str, Prompt] = {}
    for pair in pairs:
        prompts.setdefault(pair.prompt.id, pair.prompt)
        answers.setdefault(pair.prompt.id, []).append(pair.completion_text)
    return [dataclasses.replace(prompt, references=tuple(answers[name])) for name, prompt in prompts.items()]
