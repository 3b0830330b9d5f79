"""Pretraining of encoders: masked language modelling (Devlin et al. 2019) from raw text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from operant.config import PretrainConfig, StartConfig
from operant.data.batch import from_sequences
from operant.data.rows import held_out_source
from operant.data.text import Codec
from operant.models.encoder import ENCODER_SIZES, Encoder, hide_tokens, is_encoder, masked_tokenizer
from operant.run.run import DataOrder, Quiet, Run, mixed_seed
from operant.stages.pretrain import accumulated, known_texts, pieces_of
from operant.stages.supervised import LikelihoodTask, StageResult, fit
from operant.types import Batch, Ints, OperantError


def pretrain_masked(
    config: PretrainConfig,
    *,
    encoder: Encoder | None = None,
    texts: Sequence[str] | None = None,
    dev_texts: Sequence[str] = (),
    quiet: Quiet = False,
) -> StageResult[Encoder]:
    """Train an encoder to say which tokens were hidden from it. What is not given is loaded as `config` says.

    Tokens are hidden anew in every epoch. There is no next-sentence task, which does not help (Liu et al. 2019).
    Raises OperantError for missing or empty data, a model that is no encoder, or a tokenizer without a mask token.
    """
    with Run(config, "pretrain", quiet=quiet) as run:
        if config.objective not in ("auto", "mlm"):
            raise OperantError(f"--objective {config.objective} does not fit an encoder; leave it out, or give mlm")
        if config.lora_rank:
            raise OperantError("an encoder's weights are trained whole; leave --lora_rank out")
        known, dev_texts, words = known_texts(config, texts, dev_texts, run.note)
        encoder = encoder or starting_encoder(config, config.seed, config.device, config.dtype, words or known)
        if encoder.causal or encoder.config.is_encoder_decoder:
            raise OperantError(
                f"masked language modelling is for encoders, and {config.model} is a {encoder.config.model_type}; "
                "leave --objective out"
            )
        source = "" if texts else held_out_source(config.data, config.dev_data)
        run.takes("texts", len(known), len(dev_texts), source, given=texts or ())
        return fit(run, encoder, _masking(encoder, known, dev_texts, config), config)


def _masking(encoder: Encoder, known: list[str], dev_texts: Sequence[str], config: PretrainConfig) -> LikelihoodTask:
    """Say which tokens of the texts were hidden, each time others.

    Raises OperantError for rows without room for text, a tokenizer without a mask token, and where every text is empty.
    """
    codec, mask_id = encoder.codec, encoder.mask_id
    block = min(config.block or encoder.max_length, encoder.max_length)
    room = block - len(encoder.first) - len(encoder.last)
    if room < 1:
        raise OperantError(f"rows of {block} tokens leave no room for text; give a larger --block or --max_length")
    vocabulary = np.asarray([i for i in range(codec.vocab_size) if codec.is_text(i)], np.int64)
    pieces = pieces_of(codec.encode_batch(known, eos=True), room, 1)
    held_out = pieces_of(codec.encode_batch(list(dev_texts), eos=True), room, 1)[:512] if dev_texts else []
    per_step = max(1, min(config.batch_tokens // max(1, int(np.mean([len(p) for p in pieces]))), len(pieces)))
    order = DataOrder(len(pieces), per_step, config.seed, "pieces")

    def hidden(chosen: list[Ints], seed: int) -> Batch:
        rng = np.random.default_rng(seed)
        both = [
            hide_tokens(p, rng, mask_id=mask_id, vocabulary=vocabulary, density=config.noise_density) for p in chosen
        ]
        before, after = np.zeros(len(encoder.first), np.bool_), np.zeros(len(encoder.last), np.bool_)
        return from_sequences(
            [encoder.framed(corrupted) for corrupted, _ in both],
            [encoder.framed(piece) for piece in chosen],
            encoder=True, pad_id=codec.pad_id,
            sampled=[np.concatenate([before, where, after]) for _, where in both],
        )  # fmt: skip

    def make(number: int) -> Batch:
        return hidden([pieces[i] for i in order.take(number)], mixed_seed(config.seed, "noise", number))

    dev = [hidden(held_out[i : i + 64], mixed_seed(config.seed, "dev", i)) for i in range(0, len(held_out), 64)]
    return LikelihoodTask(encoder, accumulated(make, config), dev)


def starting_encoder(config: StartConfig, seed: int, device: str, dtype: str, texts: Sequence[str]) -> Encoder:
    """Load `config.model`, or make a new one whose tokenizer is loaded or trained on `texts`.

    Raises OperantError when what is named cannot be loaded, or the architecture is unknown.
    """
    if config.model:
        return Encoder.load(config.model, device=device, dtype=dtype)
    if config.tokenizer:
        codec = Codec.load(config.tokenizer)
    elif config.arch in ENCODER_SIZES:
        codec = masked_tokenizer(texts, config.vocab_size)
    else:
        codec = Codec.train_bpe(texts, vocab_size=config.vocab_size)
    return Encoder.new(
        config.arch, config.size, codec, max_length=config.max_length, seed=seed, dropout=config.dropout,
        device=device, dtype=dtype,
    )  # fmt: skip


def trains_encoder(config: PretrainConfig) -> bool:
    """Whether `operant pretrain` trains an encoder: it is asked for, or the model to go on from is one and no other
    objective is asked for (an encoder to begin from is not one to go on with: see `Encoder.with_decoder`)."""
    if config.model:
        return config.objective == "mlm" or (config.objective == "auto" and is_encoder(config.model))
    return config.arch in ENCODER_SIZES


__all__ = ["pretrain_masked", "starting_encoder", "trains_encoder"]
