"""Pretraining on raw text: causal language modelling, or hidden spans for encoder-decoders."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch

from operant.config import PretrainConfig
from operant.data.batch import microbatches, pack
from operant.data.prompts import load_texts
from operant.data.rows import Fields, cell, find_column, held_out_source, is_missing, load_split_rows
from operant.models.policy import Policy
from operant.run.run import DataOrder, Quiet, Run, mixed_seed
from operant.stages.supervised import LikelihoodTask, StageResult, all_texts, fit, starting_policy
from operant.types import Batch, Ints, OperantError

SENTINELS = 100  # as T5 has


def span_corruption(
    tokens: Ints, sentinels: Sequence[int], rng: np.random.Generator, density: float = 0.15, mean_span: float = 3.0
) -> tuple[Ints, Ints]:
    """T5's denoising objective (Raffel et al. 2020, §3.1.4): hide random spans, ask for them back.

    tokens: int64[L], L ≥ 2. Returns (input, target), both int64 without EOS: the input has each hidden span replaced by
    one sentinel, the target has each sentinel followed by its span, and a last sentinel.
    """
    length = len(tokens)
    hidden = min(max(1, round(length * density)), length - 1)
    spans = min(max(1, round(hidden / mean_span)), hidden, length - hidden + 1, len(sentinels) - 1)

    def composition(total: int, parts: int) -> np.ndarray:
        cuts = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
        return np.diff(np.concatenate([[0], cuts, [total]]))

    # spans are apart by at least one token; before the first and after the last there may be none, so that a text too
    # short for more than one span is not always asked for its end
    noise, kept = composition(hidden, spans), composition(length - hidden + 2, spans + 1)
    kept[[0, -1]] -= 1
    source: list[np.ndarray] = []
    target: list[np.ndarray] = []
    at = 0
    for i in range(spans):
        mark = np.array([sentinels[i]], np.int64)
        source += [tokens[at : at + kept[i]], mark]
        at += int(kept[i])
        target += [mark, tokens[at : at + noise[i]]]
        at += int(noise[i])
    source.append(tokens[at:])
    return np.concatenate(source), np.concatenate([*target, [sentinels[spans]]]).astype(np.int64)


def text_infilling(
    tokens: Ints, sentinels: Sequence[int], rng: np.random.Generator, density: float = 0.3, mean_span: float = 3.0
) -> tuple[Ints, Ints]:
    """BART's denoising objective (Lewis et al. 2020, §2.2): each hidden span is one mask, the whole text is asked for.

    All masks are the first sentinel, so that nothing tells how many there are of them or how long they are. Without
    sentence permutation. tokens: int64[L], L ≥ 2. Returns (input, target), both int64; the target is `tokens`.
    """
    source, _ = span_corruption(tokens, [sentinels[0]] * (SENTINELS + 1), rng, density, mean_span)
    return source.astype(np.int64), tokens


def pretrain(
    config: PretrainConfig,
    *,
    policy: Policy | None = None,
    texts: Sequence[str] | None = None,
    dev_texts: Sequence[str] = (),
    quiet: Quiet = False,
) -> StageResult[Policy]:
    """Train a policy on raw text. What is not given is loaded as `config` says. See `pretrain_masked` for encoders.

    Raises OperantError for missing or empty data, a tokenizer without sentinels for an encoder-decoder, or an
    objective that the model has not.
    """
    with Run(config, "pretrain", quiet=quiet) as run:
        known, dev_texts, words = known_texts(config, texts, dev_texts, run.note)
        sentinels = SENTINELS if config.arch in ("t5", "mbart") else 0
        policy = policy or starting_policy(config, config, lambda: words or known, sentinels)
        own = ("spans", "infilling") if policy.has_encoder else ("causal",)
        if config.objective not in ("auto", *own):
            raise OperantError(
                f"--objective {config.objective} does not fit a {policy.family} model; it learns by {' or '.join(own)}"
                + (": leave --objective out, or choose --arch bert" if config.objective == "mlm" else "")
            )
        documents = policy.codec.encode_batch(known, eos=True)
        held_out = policy.codec.encode_batch(list(dev_texts), eos=True) if dev_texts else []
        block = min(config.block or policy.max_length, policy.max_length)
        source = "" if texts else held_out_source(config.data, config.dev_data)
        run.takes("texts", len(known), len(dev_texts), source, given=texts or ())
        task = _denoising if policy.has_encoder else _causal
        return fit(run, policy, task(policy, documents, held_out, block, config), config)


def known_texts(
    config: PretrainConfig, texts: Sequence[str] | None, dev_texts: Sequence[str], note: Callable[[str], None]
) -> tuple[list[str], Sequence[str], list[str]]:
    """(texts, held-out texts, every string of the rows they came from), loaded where none are given.

    note: called with how many rows have no text, if any have none.

    Raises OperantError when the data is missing, cannot be read, or holds no text.
    """
    words: list[str] = []
    if texts is None:
        rows, dev_rows = load_split_rows(config.data, config.dev_data, config.limit, 0.05, 500)
        fields = Fields(text=config.text_field)
        texts, words = load_texts(rows, fields), all_texts(rows)
        dev_texts = load_texts(dev_rows, fields) if dev_rows else []
        column = find_column(rows, "text", config.text_field)
        if bare := sum(is_missing(cell(row, str(column))) for row in (*rows, *dev_rows)):
            note(f"{bare} of {len(rows) + len(dev_rows)} rows have no text and were left out")
    if not texts:
        raise OperantError("there is no text to learn from; check --data and --limit")
    return list(texts), dev_texts, words


def accumulated(make: Callable[[int], Batch], config: PretrainConfig) -> Callable[[int], list[Batch]]:
    """step → micro-batches of its `accumulate` rounds, all with the denominator of the whole step."""
    accumulate = config.accumulate

    def batches(step: int) -> list[Batch]:
        rounds = [make(step * accumulate + i) for i in range(accumulate)]
        total = sum(b.denominator for b in rounds)
        whole = [dataclasses.replace(b, denominator=total) for b in rounds]
        return [piece for b in whole for piece in microbatches(b, config.tokens_per_microbatch)]

    return batches


def _causal(
    policy: Policy, documents: list[Ints], held_out: list[Ints], block: int, config: PretrainConfig
) -> LikelihoodTask:
    """Foretell each token of packed rows."""
    per_step = max(1, config.batch_tokens // block)
    packed = pack(_shuffled(documents, config.seed), block, policy.codec.pad_id)
    order = DataOrder(packed.tokens.shape[0], min(per_step, packed.tokens.shape[0]), config.seed, "blocks")
    dev = pack(held_out, block, policy.codec.pad_id) if held_out else None

    def rows_of(batch: Batch, rows: list[int]) -> Batch:
        index = torch.tensor(rows)
        columns = {
            name: getattr(batch, name)[index]
            for name in ("tokens", "position_ids", "segment_ids", "action_mask", "weights")
        }
        return dataclasses.replace(batch, **columns, denominator=max(float(columns["weights"].sum()), 1.0))

    count = dev.tokens.shape[0] if dev is not None else 0
    dev_batches = (
        [rows_of(dev, list(range(i, min(i + per_step, count)))) for i in range(0, count, per_step)] if dev else []
    )
    return LikelihoodTask(policy, accumulated(lambda number: rows_of(packed, order.take(number)), config), dev_batches)


def _denoising(
    policy: Policy, documents: list[Ints], held_out: list[Ints], block: int, config: PretrainConfig
) -> LikelihoodTask:
    """Say what stood in hidden spans of texts, which are corrupted anew in every epoch.

    Raises OperantError for a tokenizer without sentinels, and where every text is too short.
    """
    sentinels, mask = policy.codec.sentinel_ids, policy.codec.tokenizer.mask_token_id
    infilling = config.objective == "infilling"
    if infilling and not sentinels and mask is not None:
        sentinels = [int(mask)]
    if len(sentinels) < (1 if infilling else 2):
        raise OperantError(
            "span corruption needs a tokenizer with sentinels <extra_id_0> …; "
            f"leave --tokenizer out to train one that has them{'' if infilling else ', or use --objective infilling'}"
        )
    frame = policy.codec.encode_prompt("", encoder=True)  # what stands around a prompt stands around a text
    pieces = pieces_of(documents, block - len(frame), 2)
    mean = max(1, int(np.mean([len(p) for p in pieces])))
    per_step = max(1, min(config.batch_tokens // mean, len(pieces)))
    order = DataOrder(len(pieces), per_step, config.seed, "pieces")
    eos = np.array([policy.codec.eos_id], np.int64)
    corrupt = text_infilling if infilling else span_corruption

    def corrupted(chosen: list[Ints], seed: int) -> Batch:
        rng = np.random.default_rng(seed)
        both = [corrupt(p, sentinels, rng, config.noise_density, config.mean_span) for p in chosen]
        return policy.batch_of_sequences(
            [np.concatenate([frame[:-1], source, frame[-1:]]) for source, _ in both],
            [np.concatenate([target, eos]) for _, target in both],
        )

    dev_pieces = pieces_of(held_out, block - len(frame), 2)[:512]
    dev = [corrupted(dev_pieces[i : i + 64], mixed_seed(config.seed, "dev", i)) for i in range(0, len(dev_pieces), 64)]

    def make(number: int) -> Batch:
        return corrupted([pieces[i] for i in order.take(number)], mixed_seed(config.seed, "noise", number))

    return LikelihoodTask(policy, accumulated(make, config), dev)


def pieces_of(documents: list[Ints], size: int, least: int) -> list[Ints]:
    """Documents, int64[L] each, without their EOS, cut to `size` tokens; pieces of fewer than `least` have nothing to
    hide and are left out.

    Raises OperantError when there are documents and no piece is left.
    """
    cut = [doc[:-1][i : i + size] for doc in documents for i in range(0, len(doc) - 1, size)]
    pieces = [p for p in cut if len(p) >= least]
    if not pieces and documents:
        raise OperantError(f"every text is shorter than {least} tokens; give longer texts")
    return pieces


def _shuffled(documents: list[Ints], seed: int) -> list[Ints]:
    order = np.random.default_rng(mixed_seed(seed, "documents")).permutation(len(documents))
    return [documents[i] for i in order]


__all__ = ["accumulated", "known_texts", "pieces_of", "pretrain", "span_corruption"]
