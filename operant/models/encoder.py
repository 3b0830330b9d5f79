"""A language model as a reader: a vector for every token of a text, and BERT's masked language modelling.

A `Policy` writes; an `Encoder` only reads. It is any Transformers model: a BERT-like one, a decoder (each token sees
what is before it), or the encoder of an encoder-decoder. Reward models and semantic similarity stand on it.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from operant.data.batch import right_padded
from operant.data.text import Codec, looks_like_path
from operant.models.adapter import add_adapter, load_adapter, restore_adapter, save_adapter
from operant.models.folder import (
    ADAPTER,
    BASE,
    Base,
    expect_all_weights,
    find_base,
    holds,
    hub_base,
    name_base,
    open_to_others,
)  # fmt: skip
from operant.models.head import WHOLE, Distributions, of_rows
from operant.models.memory import computed_again
from operant.models.policy import (
    MADE_HERE,
    EntropyMode,
    Policy,
    TokenLogprobs,
    is_masked,
    placed,
    resolve_device,
    told_in_one_line,
)
from operant.types import Batch, Bools, Ints, OperantError

# (layers, heads, width, feed-forward width), as in policy.SIZES; `base` is the published size (Devlin et al. 2019).
ENCODER_SIZES: dict[str, dict[str, tuple[int, int, int, int]]] = {
    "bert": {"tiny": (4, 4, 128, 512), "small": (6, 8, 256, 1024), "base": (12, 12, 768, 3072)},
}

# whose layers are, weight for weight, those of BART's encoder
BERT_LIKE = ("bert", "roberta", "xlm-roberta", "camembert")


class Encoder:
    """A Transformers model with its tokenizer, for reading.

    `model` is the whole model with its language-modelling head, so that a saved folder is one that Transformers loads;
    `body` is the part that reads. `dtype` is "float32", or "bf16" for autocast over float32 weights.
    Raises OperantError for another dtype, for a device that is not there, and when the tokenizer has more tokens than
    the model.
    """

    def __init__(self, model: Any, codec: Codec, *, device: str = "auto", dtype: str = "float32") -> None:
        if dtype not in ("float32", "bf16"):
            raise OperantError(f"dtype {dtype!r} is not known; choose float32 or bf16")
        self.device, self.dtype = resolve_device(device), dtype
        self.model = model.to(self.device)
        self.codec = codec
        self.recomputes = False  # layers are computed again in the backward pass (`memory.computed_again`)
        self.config = model.config
        self._origin: Base | None = None  # where its weights, or those that its adapter is on, lie
        self.body: Any = model.get_encoder() if self.config.is_encoder_decoder else model.base_model
        self.causal = not self.config.is_encoder_decoder and not is_masked(self.config)
        vocabulary = int(model.get_input_embeddings().weight.shape[0])
        if codec.vocab_size > vocabulary:
            raise OperantError(
                f"the tokenizer has {codec.vocab_size} tokens but the model only {vocabulary}; "
                "load the tokenizer that belongs to this model"
            )
        tokenizer = codec.tokenizer
        first = tokenizer.cls_token_id if tokenizer.cls_token_id is not None else codec.bos_id
        self.first: Ints = np.asarray([] if first is None else [first], np.int64)
        last = tokenizer.sep_token_id
        self.last: Ints = np.asarray([codec.eos_id if last is None else last], np.int64)

    @classmethod
    def load(cls, source: str | Path, *, device: str = "auto", dtype: str = "float32") -> Encoder:
        """Load a folder that a stage or Transformers saved, or a hub id; an adapter is merged into its model.

        Raises OperantError when there is no such model, or it is no language model, or it has no tokenizer.
        """
        with told_in_one_line(source):
            encoder = cls._load_masked(source, device, dtype)
        if encoder is not None:
            return encoder
        policy = Policy.load(source, device="cpu")
        model = policy.model.merge_and_unload() if policy.is_lora else policy.model
        encoder = cls(model, policy.codec, device=device, dtype=dtype)
        encoder._origin = None if policy.is_lora else policy._origin
        return encoder

    @classmethod
    def _load_masked(cls, source: str | Path, device: str, dtype: str) -> Encoder | None:
        """Load a BERT-like model, with its adapter where it has one; None for any other, or where there is none."""
        from transformers import AutoConfig, AutoModelForMaskedLM

        folder = Path(source)
        on_base = (folder / ADAPTER).exists() or (folder / BASE).exists()
        if not on_base and not (folder / "config.json").exists() and (folder.exists() or looks_like_path(str(source))):
            return None
        origin = find_base(folder) if on_base else None
        there, named = (origin.source, origin.revision) if origin else (source, "")
        arguments: dict[str, Any] = {"trust_remote_code": False} | ({"revision": named} if named else {})
        config = AutoConfig.from_pretrained(there, **arguments)
        if not is_masked(config):
            return None
        model, loading = AutoModelForMaskedLM.from_pretrained(
            there, config=config, dtype=torch.float32, output_loading_info=True, **arguments
        )
        # an encoder of sentences has no head that unmasks tokens, and does without
        expect_all_weights(source, loading, needed=f"{model.base_model_prefix}.")
        if adapted := (folder / ADAPTER).exists():
            model = load_adapter(model, folder).merge_and_unload()
        encoder = cls(model, Codec.load(source), device=device, dtype=dtype)
        if not adapted:
            encoder._origin = origin or (Base(folder.resolve()) if folder.is_dir() else hub_base(str(source)))
        return encoder

    @classmethod
    def new(
        cls,
        arch: str,
        size: str,
        codec: Codec,
        *,
        max_length: int = 512,
        seed: int = 0,
        dropout: float = 0.0,
        device: str = "auto",
        dtype: str = "float32",
    ) -> Encoder:
        """A model with random weights: `bert` of size `tiny`, `small` or `base`, or any arch of `Policy.new`.

        Raises OperantError for an unknown arch or size.
        """
        if arch not in ENCODER_SIZES:
            policy = Policy.new(arch, size, codec, max_length=max_length, seed=seed, dropout=dropout, device="cpu")
            return cls(policy.model, codec, device=device, dtype=dtype)
        from transformers import BertConfig, BertForMaskedLM

        if size not in ENCODER_SIZES[arch]:
            raise OperantError(f"no {arch} of size {size!r}; choose --size {'|'.join(ENCODER_SIZES[arch])}")
        layers, heads, width, inner = ENCODER_SIZES[arch][size]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = BertForMaskedLM(
                BertConfig(
                    vocab_size=codec.vocab_size, hidden_size=width, num_hidden_layers=layers, intermediate_size=inner,
                    num_attention_heads=heads, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
                    max_position_embeddings=max_length, type_vocab_size=1, pad_token_id=codec.pad_id,
                    bos_token_id=codec.bos_id, eos_token_id=codec.eos_id,
                )
            )  # fmt: skip
        setattr(model.config, MADE_HERE, True)
        return cls(model, codec, device=device, dtype=dtype)

    def add_lora(
        self, rank: int, *, alpha: float = 0.0, targets: Sequence[str] = (), dropout: float = 0.0, seed: int = 0
    ) -> None:
        """Train a low-rank adapter instead of the weights (`adapter.add_adapter`), on top of one that is there.

        Raises OperantError when no layer is named as one of `targets`.
        """
        if self.is_lora:
            self.model, self._origin = self.model.merge_and_unload(), None
        self.model = add_adapter(self.model, rank, alpha=alpha, targets=targets, dropout=dropout, seed=seed)

    @property
    def is_lora(self) -> bool:
        return hasattr(self.model, "peft_config")

    def save(self, path: str | Path, *, by_name: bool = False) -> None:
        """Write a folder that plain Transformers loads; with LoRA the adapter, and the name of its base.

        by_name: where the weights are still those that were loaded, name them instead of writing them again.
        """
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        if self.is_lora:
            self._origin = save_adapter(self.model, folder, self._origin, self._save_base, self._prefix)
        elif by_name and self._origin is not None and holds(self._origin.place, self.model.state_dict()):
            self.config.save_pretrained(str(folder))
            name_base(self._origin, folder)
        else:
            self.model.save_pretrained(str(folder))
        self.codec.save(folder)
        open_to_others(folder)

    def _save_base(self, folder: Path, weights: dict[str, Tensor]) -> None:
        self.model.get_base_model().save_pretrained(str(folder), state_dict=weights)
        self.codec.save(folder)

    @property
    def _prefix(self) -> str:
        """What the names of the weights that read begin with; a folder without a head may have them without it."""
        model = self.model.get_base_model() if self.is_lora else self.model
        return f"{model.base_model_prefix}."

    def moved_to(self, path: str | Path) -> None:
        """What `save` wrote last lies there now: a base in it is taken along from there the next time."""
        self._origin = None if self._origin is None else self._origin.moved_to(Path(path))

    def restore(self, path: str | Path) -> None:
        """Put the weights that `save` wrote at `path` into this encoder, in place: optimizers keep their tensors.

        Raises OperantError for an adapter on another base, and when weights are missing.
        """
        folder = Path(path)
        if self.is_lora:
            restore_adapter(self.model, folder, self._origin)
            return
        there = find_base(folder).place if (folder / BASE).exists() else folder
        saved, loading = type(self.model).from_pretrained(str(there), dtype=torch.float32, output_loading_info=True)
        expect_all_weights(there, loading)
        self.model.load_state_dict(saved.state_dict())

    def with_decoder(self, *, seed: int = 0, dropout: float = 0.0) -> Policy:
        """An encoder-decoder of BART's form that begins from this encoder on both sides (Rothe et al. 2020, BERT2BERT).

        Its encoder computes what this one computes. Layer i of its decoder begins as layer i of the encoder, with an
        attention to what was read that begins from noise (`seed`); one table of embeddings serves both sides and the
        output. The head that unmasked tokens is left behind. Its tokenizer frames prompts as this encoder frames texts.
        Raises OperantError for an encoder whose layers are not BERT's.
        """
        kind, config = self.config.model_type, self.config
        if kind not in BERT_LIKE:
            raise OperantError(
                f"an encoder-decoder can begin from {', '.join(BERT_LIKE)}, whose layers are those of BART, and this "
                f"is a {kind}; give one of these, or --arch mbart for a new one"
            )
        from transformers import BartConfig, BartForConditionalGeneration

        tables, layers = self.body.embeddings, self.body.encoder.layer
        codec = _framing(self.codec, self.first, self.last)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = BartForConditionalGeneration(
                BartConfig(
                    vocab_size=tables.word_embeddings.weight.shape[0], d_model=self.width, encoder_layers=len(layers),
                    decoder_layers=len(layers), encoder_attention_heads=config.num_attention_heads,
                    decoder_attention_heads=config.num_attention_heads, encoder_ffn_dim=config.intermediate_size,
                    decoder_ffn_dim=config.intermediate_size, activation_function=config.hidden_act, dropout=dropout,
                    attention_dropout=dropout, activation_dropout=0.0, init_std=config.initializer_range,
                    max_position_embeddings=self.max_length, scale_embedding=True, forced_eos_token_id=None,
                    decoder_start_token_id=int(self.first[0]) if len(self.first) else codec.pad_id,
                    pad_token_id=codec.pad_id, bos_token_id=codec.bos_id, eos_token_id=codec.eos_id,
                )
            )  # fmt: skip
        if getattr(config, MADE_HERE, False):
            setattr(model.config, MADE_HERE, True)
        positions = tables.position_embeddings.weight[-self.max_length :] + tables.token_type_embeddings.weight[0]
        with torch.no_grad():
            model.model.shared.weight.copy_(tables.word_embeddings.weight)
            for side in (model.model.encoder, model.model.decoder):
                # BART's normalisation adds 1e-5 to the variance and BERT's less; small embeddings feel it, hence the
                # scale, which the normalisation undoes
                side.embed_positions.weight[side.embed_positions.offset :] = self.width**0.5 * positions
                side.layernorm_embedding.load_state_dict(tables.LayerNorm.state_dict())
                for layer, own in zip(side.layers, layers, strict=True):
                    for name in ("query", "key", "value"):
                        part = getattr(own.attention.self, name)
                        getattr(layer.self_attn, f"{name[0]}_proj").load_state_dict(part.state_dict())
                    for to, begun in (
                        (layer.self_attn.out_proj, own.attention.output.dense),
                        (layer.self_attn_layer_norm, own.attention.output.LayerNorm),
                        (layer.fc1, own.intermediate.dense),
                        (layer.fc2, own.output.dense),
                        (layer.final_layer_norm, own.output.LayerNorm),
                    ):
                        to.load_state_dict(begun.state_dict())
        return Policy(model, codec, device=str(self.device), dtype=self.dtype)

    # --- what it is ----------------------------------------------------------------------------------------------

    @property
    def width(self) -> int:
        """Size of the vectors."""
        return int(self.config.hidden_size)  # Transformers maps other spellings (d_model, n_embd) to this one

    @property
    def max_length(self) -> int:
        """Tokens that fit."""
        for name in ("max_position_embeddings", "n_positions"):
            value = getattr(self.config, name, None)
            if isinstance(value, int) and value > 0:
                table = getattr(getattr(self.body, "embeddings", None), "position_embeddings", None)
                padding = getattr(table, "padding_idx", None)  # RoBERTa counts positions from after its padding index
                return value if padding is None else value - padding - 1
        return 2**20

    @property
    def room(self) -> int:
        """Tokens of a text that fit between those around it."""
        return self.max_length - len(self.first) - len(self.last)

    @property
    def mask_id(self) -> int:
        """The token that hides another. Raises OperantError when the tokenizer has none."""
        mask = self.codec.tokenizer.mask_token_id
        if mask is None:
            raise OperantError(
                "masked language modelling needs a tokenizer with a mask token; leave --tokenizer out to train one"
            )
        return int(mask)

    def trainable_parameters(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def critic_parameters(self) -> list[nn.Parameter]:
        """None: an encoder has no critic."""
        return []

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        if self.dtype == "bf16":
            with torch.autocast(self.device.type, dtype=torch.bfloat16):
                yield
        else:
            yield

    # --- reading -------------------------------------------------------------------------------------------------

    def framed(self, tokens: Ints) -> Ints:
        """int64[T] between the tokens that the model expects around a text ([CLS] … [SEP], or BOS … EOS)."""
        return np.concatenate([self.first, tokens, self.last])

    def hidden(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """The last layer's vectors float32[B, S, width] of right-padded tokens int64[B, S], mask bool[B, S]."""
        again = self.recomputes and torch.is_grad_enabled()
        with (
            self.autocast(),
            computed_again(self.body, contextlib.nullcontext) if again else contextlib.nullcontext(),
        ):
            return self.body(input_ids=tokens, attention_mask=mask.long()).last_hidden_state.float()

    def logprobs(self, batch: Batch, entropy: EntropyMode = "none") -> TokenLogprobs:
        """log p(token_t | the corrupted text) at the hidden tokens, float32[B, S], zero elsewhere (Devlin et al. 2019).

        `batch.context` is the corrupted text and `batch.tokens` the true one, column for column; `action_mask` marks
        the tokens that were hidden. No entropy is computed.
        """
        assert batch.context is not None
        rows, columns = batch.action_mask.nonzero(as_tuple=True)
        source, tokens = batch.context.row[rows], batch.tokens[rows, columns]
        head = getattr(self.model, "cls", None) or getattr(self.model, "lm_head", None)
        if head is not None:  # the vocabulary is wide: only where a token is asked for
            acting = self._distributions(head, self.hidden(batch.context.tokens, batch.context.mask)[source, columns])
        else:
            with self.autocast():
                output = self.model(input_ids=batch.context.tokens, attention_mask=batch.context.mask.long())
            acting = Distributions(output.logits[source, columns].float())

        def picked(logits: Tensor, part: slice) -> tuple[Tensor]:
            return (logits.log_softmax(-1).gather(-1, tokens[part, None])[:, 0],)

        return TokenLogprobs(placed(batch, *of_rows(picked, acting)))

    def _distributions(self, head: Any, states: Tensor) -> Distributions:
        """What the head says of states float[K, width]: in chunks, where it is more than WHOLE logits."""

        def logits_of(rows: Tensor, part: slice) -> Tensor:
            with self.autocast():
                return head(rows).float()

        vocabulary = int(self.model.get_input_embeddings().weight.shape[0])
        if len(states) * vocabulary <= WHOLE:
            return Distributions(logits_of(states, slice(None)))
        return Distributions(None, states, logits_of, not self.trainable_parameters(), vocabulary)

    @torch.no_grad()
    def vectors(self, texts: Sequence[str], max_tokens: int = 8192) -> list[tuple[Ints, np.ndarray]]:
        """(tokens int64[T], vectors float32[T, width]) of each text, without the tokens around it, dropout off.

        max_tokens: padded tokens that go through the model at once. A text that the model cannot hold is cut at its
        end, and its T says so.
        """
        tokens = [row[: self.room] for row in self.codec.encode_batch(list(texts))]
        out: list[tuple[Ints, np.ndarray]] = [(row, np.zeros((0, self.width), np.float32)) for row in tokens]
        training = self.model.training
        self.model.eval()
        framed = [self.framed(row) for row in tokens]
        for chosen in by_length([len(row) for row in framed], max_tokens):
            padded, mask = right_padded([framed[i] for i in chosen], self.codec.pad_id)
            hidden = self.hidden(padded.to(self.device), mask.to(self.device)).cpu().numpy()
            for row, i in enumerate(chosen):
                begin = len(self.first)
                out[i] = (tokens[i], hidden[row, begin : begin + len(tokens[i])])
        self.model.train(training)
        return out


def is_encoder(source: str | Path) -> bool:
    """Whether a folder holds a BERT-like model."""
    from transformers import AutoConfig

    try:
        if not (Path(source) / "config.json").exists():
            return False
        return is_masked(AutoConfig.from_pretrained(source, trust_remote_code=False))
    except (OSError, ValueError):  # loading it says what is wrong
        return False


def _framing(codec: Codec, first: Ints, last: Ints) -> Codec:
    """The same tokenizer, which puts `first` before a prompt and `last` after it, if it does not so already."""
    framed = np.concatenate([first, last])
    if codec.encode_prompt("", encoder=True).tolist() == framed.tolist():
        return codec
    from tokenizers.processors import TemplateProcessing

    tokenizer = copy.deepcopy(codec.tokenizer)
    names = [tokenizer.convert_ids_to_tokens(int(i)) for i in framed]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=[*names[: len(first)], "$A", *names[len(first) :]],
        special_tokens=list(dict(zip(names, framed.tolist())).items()),
    )
    return Codec(tokenizer)


def masked_tokenizer(texts: Iterable[str], vocab_size: int) -> Codec:
    """A byte-level BPE (see `Codec.train_bpe`) that also has a mask token, `<extra_id_0>`."""
    codec = Codec.train_bpe(texts, vocab_size=vocab_size, sentinels=1)
    codec.tokenizer.add_special_tokens({"mask_token": "<extra_id_0>"})
    return Codec(codec.tokenizer)


def hide_tokens(
    tokens: Ints, rng: np.random.Generator, *, mask_id: int, vocabulary: Ints, density: float = 0.15
) -> tuple[Ints, Bools]:
    """BERT's corruption (Devlin et al. 2019, §3.1): of the tokens chosen, 80% become the mask, 10% a random token, 10% stay.

    tokens: int64[T], T ≥ 1. vocabulary: int64[V], the ids that a random token is drawn from. Returns (corrupted
    int64[T], chosen bool[T]); round(density · T) tokens are chosen, at least one.
    """  # noqa: E501
    chosen = np.zeros(len(tokens), np.bool_)
    count = min(len(tokens), max(1, round(len(tokens) * density)))
    chosen[rng.choice(len(tokens), count, replace=False)] = True
    draw = rng.random(len(tokens))
    corrupted = np.where(chosen & (draw < 0.8), mask_id, tokens)
    drawn = vocabulary[rng.integers(len(vocabulary), size=len(tokens))]
    return np.where(chosen & (draw >= 0.9), drawn, corrupted), chosen


def by_length(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Row numbers in pieces of at most `max_tokens` padded tokens (or one row), rows of like length together."""
    piece: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if piece and lengths[i] * (len(piece) + 1) > max_tokens:
            yield piece
            piece = []
        piece.append(i)
    if piece:
        yield piece


__all__ = ["ENCODER_SIZES", "Encoder", "by_length", "hide_tokens", "is_encoder", "masked_tokenizer"]
