"""Fine-tuning on labelled pairs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import Tensor

from operant.algorithms.objectives import label_smoothed
from operant.config import PairFields, SftConfig
from operant.data.batch import from_sequences, microbatches
from operant.data.rows import Fields, Pair, load_pairs, load_rows, splits, truncated
from operant.models.policy import Policy
from operant.rl.evaluate import evaluate
from operant.run.run import DataOrder, Run
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
            pairs, notes = load_fitting_pairs(rows, policy, config, fields, "training")
            dev_pairs, more = load_fitting_pairs(dev_rows, policy, config, fields, "held-out")
            for note in [*notes, *more]:
                run.note(note)
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
        if asked and not (held_out and config.eval_prompts):
            raise OperantError(
                f"best_metric {config.best_metric} needs held-out pairs; give --dev_data, and --eval_prompts above 0"
            )
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
    """(training rows, dev rows): `dev_data` if given, else the dev split of `data`, else its last `share` of rows.

    At most `most` dev rows; 0 holds nothing out. Raises OperantError where there is no data, or it cannot be read.
    """
    if not data:
        raise OperantError("no data given; add --data FILE (JSON Lines, CSV, Parquet, a folder or a hub data set)")
    rows = load_rows(data, split="train", limit=limit)
    if not most:
        return rows, []
    if dev_data:
        return rows, load_rows(dev_data, split="dev", limit=most)
    if "dev" in splits(data):
        return rows, load_rows(data, split="dev", limit=most)
    return split_rows(rows, share, most)


def load_fitting_pairs(
    rows: Sequence[dict[str, object]], policy: Policy, config: PairFields, fields: Fields, which: str
) -> tuple[list[Pair], list[str]]:
    """(pairs that the model can hold, what was cut or left out or is empty). `which` names them in what is told.

    "truncate" cuts the prompt so that its completion has room, but to no less than half of the context.

    Raises OperantError as `load_pairs`, for a pair that is too long ("error"), and where none is left ("skip").
    """
    if not rows:
        return [], []
    encoder = policy.family == "encoder-decoder"
    longest = policy.max_length if encoder else policy.max_length - 1
    longest_prompt = config.max_prompt_tokens or longest
    skip = config.too_long == "skip"  # here and not by load_pairs, so that they are counted
    pairs = load_pairs(
        rows, policy.codec, fields, prefix=config.prefix, separator=config.separator, encoder=encoder,
        max_prompt_tokens=None if skip else longest_prompt, max_completion_tokens=None if skip else longest,
        too_long=config.too_long,
    )  # fmt: skip
    fitting = []
    for pair in pairs:
        prompt, tokens = pair.prompt, pair.completion_tokens
        fits = encoder or len(prompt.tokens) + len(tokens) <= policy.max_length
        if skip and not (fits and len(prompt.tokens) <= longest_prompt and len(tokens) <= longest):
            continue
        if not fits and config.too_long == "error":
            raise OperantError(
                f"pair {prompt.id} has {len(prompt.tokens) + len(tokens)} tokens and the "
                f"model holds {policy.max_length}; use --too_long skip or truncate, or a longer --max_length"
            )
        if not fits:
            room = max(policy.max_length - len(tokens), policy.max_length // 2)
            if len(prompt.tokens) > room:
                prompt = truncated(prompt, room, policy.codec, encoder)
            if len(tokens) > (left := policy.max_length - len(prompt.tokens)):
                tokens = tokens[:left]
                pair = dataclasses.replace(pair, completion_text=policy.codec.decode(tokens))
            pair = dataclasses.replace(pair, prompt=prompt, completion_tokens=tokens)
        fitting.append(pair)
    if not fitting:
        raise OperantError(
            f"every {which} pair is too long (the model holds {policy.max_length} tokens); "
            "give a model with a longer context, or --too_long truncate"
        )
    cut = sum(
        "truncated_prompt" in pair.prompt.meta or pair.completion_tokens[-1] != policy.codec.eos_id for pair in fitting
    )
    told = {
        "are too long and were left out": len(pairs) - len(fitting),
        "are too long and were cut": cut,
        "have an empty completion, which teaches the policy to say nothing": sum(
            not pair.completion_text.strip() for pair in fitting
        ),
    }
    return fitting, [f"{count} of {len(pairs)} {which} pairs {what}" for what, count in told.items() if count]
