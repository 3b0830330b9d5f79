"""Fine-tuning on labelled pairs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import Tensor

from operant.batch import from_sequences, microbatches
from operant.config import PairFields, SftConfig
from operant.data import Fields, Pair, load_pairs, load_rows, splits
from operant.evaluate import evaluate
from operant.objectives import label_smoothed
from operant.policy import Policy
from operant.run import DataOrder, Run
from operant.stages.supervised import StageResult, all_texts, fit, likelihood_loss, split_rows, starting_policy
from operant.types import Batch, OperantError, Prompt, Sampling


def pairs_batch(pairs: Sequence[Pair], policy: Policy) -> Batch:
    """A batch of labelled pairs; the loss is on the completions' tokens, averaged per token."""
    return from_sequences(
        [p.prompt.tokens for p in pairs], [p.completion_tokens for p in pairs],
        encoder=policy.family == "encoder-decoder", pad_id=policy.codec.pad_id,
    )  # fmt: skip


def sft(
    config: SftConfig,
    *,
    policy: Policy | None = None,
    pairs: Sequence[Pair] | None = None,
    dev_pairs: Sequence[Pair] | None = None,
    quiet: bool = False,
) -> StageResult[Policy]:
    """Fine-tune until the held-out measure stops improving. What is not given is loaded as `config` says.

    Raises OperantError for missing or empty data, unknown fields, and answers or prompts that the model cannot hold.
    """
    with Run(config, "sft", quiet=quiet) as run:
        if policy is None or pairs is None:
            rows, dev_rows = load_split_rows(config.data, config.dev_data, config.limit, 0.1, 500)
            fields = Fields(prompt=config.prompt_field, completion=config.reference_field)
            policy = policy or starting_policy(config, config, lambda: all_texts(rows))
            pairs, dev_pairs = (
                load_fitting_pairs(part, policy, config, fields) if part else [] for part in (rows, dev_rows)
            )
        if not pairs:
            raise OperantError("there are no pairs to learn from; check --data and --limit")
        learner_policy, train_pairs, held_out = policy, list(pairs), list(dev_pairs or [])
        order = DataOrder(len(train_pairs), min(config.batch_size, len(train_pairs)), config.seed, "pairs")

        def batches(step: int) -> list[Batch]:
            batch = pairs_batch([train_pairs[i] for i in order.take(step)], learner_policy)
            return list(microbatches(batch, config.tokens_per_microbatch))

        dev = [pairs_batch(held_out[i : i + 64], policy) for i in range(0, len(held_out), 64)]

        def smoothed(policy: Policy, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
            if not config.label_smoothing:
                return likelihood_loss(policy, batch)
            every = policy.logits(batch).log_softmax(-1)
            picked = every.gather(-1, batch.tokens[..., None])[..., 0] * batch.action_mask
            return label_smoothed(picked, every.mean(-1) * batch.action_mask, config.label_smoothing), {}

        asked = config.best_metric != "loss"
        if asked and not held_out:
            raise OperantError(f"best_metric {config.best_metric} needs held-out pairs; give --dev_data")
        prompts = answered_prompts(held_out)[: config.eval_prompts]
        sampling = Sampling(temperature=0.0, max_tokens=config.max_tokens)

        def generation() -> dict[str, float]:
            training = learner_policy.model.training
            learner_policy.model.eval()
            values, _ = evaluate(learner_policy, prompts, sampling=sampling)
            learner_policy.model.train(training)
            return values

        return fit(
            run, policy, config, steps=config.steps, lr=config.lr, warmup_steps=config.warmup_steps,
            schedule=config.schedule, batches=batches, dev=dev, eval_every=config.eval_every,
            patience=config.patience, loss_of=smoothed, held_out=generation if asked else None,
            best_metric=config.best_metric,
        )  # fmt: skip


def answered_prompts(pairs: Sequence[Pair]) -> list[Prompt]:
    """Each prompt once, its answers the references."""
    answers: dict[str, list[str]] = {}
    prompts: dict[str, Prompt] = {}
    for pair in pairs:
        prompts.setdefault(pair.prompt.id, pair.prompt)
        answers.setdefault(pair.prompt.id, []).append(pair.completion_text)
    return [dataclasses.replace(prompt, references=tuple(answers[name])) for name, prompt in prompts.items()]


def load_split_rows(
    data: str, dev_data: str | None, limit: int | None, share: float, most: int
) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """(training rows, dev rows): `dev_data` if given, else the dev split of `data`, else its last `share` of rows."""
    if not data:
        raise OperantError("no data given; add --data FILE (JSON Lines, CSV, Parquet, a folder or a hub data set)")
    rows = load_rows(data, split="train", limit=limit)
    if dev_data:
        return rows, load_rows(dev_data, split="dev", limit=most)
    if "dev" in splits(data):
        return rows, load_rows(data, split="dev", limit=most)
    return split_rows(rows, share, most)


def load_fitting_pairs(
    rows: Sequence[dict[str, object]], policy: Policy, config: PairFields, fields: Fields
) -> list[Pair]:
    encoder = policy.family == "encoder-decoder"
    longest = policy.max_length if encoder else policy.max_length - 1
    pairs = load_pairs(
        rows, policy.codec, fields, prefix=config.prefix, separator=config.separator, encoder=encoder,
        max_prompt_tokens=config.max_prompt_tokens or longest, too_long=config.too_long,
        max_completion_tokens=longest,
    )  # fmt: skip
    if encoder:
        return pairs
    fitting = []
    for pair in pairs:
        room = policy.max_length - len(pair.prompt.tokens)
        if len(pair.completion_tokens) <= room:
            fitting.append(pair)
        elif config.too_long == "error":
            raise OperantError(
                f"pair {pair.prompt.id} has {len(pair.prompt.tokens) + len(pair.completion_tokens)} tokens and the "
                f"model holds {policy.max_length}; use --too_long skip or truncate, or a longer --max_length"
            )
        elif config.too_long == "truncate" and room > 0:
            fitting.append(dataclasses.replace(pair, completion_tokens=pair.completion_tokens[:room]))
    return fitting
