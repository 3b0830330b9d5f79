"""A language model as a policy: load or make one, its log-probabilities, and its decode steps."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, cast

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from operant.data.batch import Normalisation, from_sequences, from_trajectories, to_device
from operant.data.hub import fetched, load_fault
from operant.data.text import Codec, looks_like_path
from operant.models import alone
from operant.models.adapter import (
    add_adapter,
    freeze_adapter,
    is_fresh,
    load_adapter,
    restore_adapter,
    save_adapter,
    turn_away,
)
from operant.models.attention import PickedLogprobs, Picks, RowLayout, attending_in_rows, one_kernel_gelu
from operant.models.cache import DecodeState, State
from operant.models.critic import Critic
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
from operant.models.generation import Generation, with_ends
from operant.models.gguf import load_gguf
from operant.models.head import WHOLE, Distributions, Tail, of_rows
from operant.models.memory import computed_again
from operant.models.selfcheck import Paths, find_paths
from operant.models.stem import Stem
from operant.types import Batch, Ints, OperantError, Trajectory

transformers.utils.logging.disable_progress_bar()  # a bar for every checkpoint would bury our own

T = TypeVar("T")
Family = Literal["decoder", "encoder-decoder"]
DTYPES = ("float32", "bf16", "bf16-true")
EntropyMode = Literal["none", "measured", "differentiable"]
TARGET_FILE = "lagging.safetensors"  # the name that older checkpoints have too
# read when CUDA's matrix library starts: with it a product has the same bits every time
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# (layers, heads, width, feed-forward width): `tiny` trains on a laptop in minutes, `base` is the published size.
SIZES: dict[str, dict[str, tuple[int, int, int, int]]] = {
    "gpt2": {"tiny": (4, 4, 128, 512), "small": (6, 8, 256, 1024), "base": (12, 12, 768, 3072)},
    "llama": {"tiny": (4, 4, 128, 384), "small": (6, 8, 256, 768), "base": (12, 12, 768, 2048)},
    "t5": {"tiny": (3, 4, 128, 384), "small": (4, 8, 256, 768), "base": (12, 12, 768, 2048)},
    "mbart": {"tiny": (3, 4, 192, 512), "small": (4, 8, 256, 768), "base": (6, 12, 768, 3072)},
}


#: In config.json of a model that begins from random weights here. Transformers keeps it through every later stage.
MADE_HERE = "made_by_operant"
#: Weights below which a model without that mark counts as made here too: the fixtures of tests, folders from before it.
SMALL = 10_000_000
ALIKE = 16  # tokens that prompts have to begin with alike, for these to be computed once


class LanguagePolicy(Protocol):
    """What the sampler and an evaluation need of a policy; the methods are `Policy`'s.

    prefill, decode: the next logits float32[B, V]. logprobs: float32[B, S].
    """

    @property
    def codec(self) -> Codec: ...

    @property
    def family(self) -> Family: ...

    @property
    def max_length(self) -> int: ...

    @property
    def generation(self) -> Generation: ...

    def prefill(self, prompts: Sequence[Ints], prefixes: Sequence[Ints] | None = None) -> tuple[State, Tensor]: ...

    def decode(self, state: Any, tokens: Tensor) -> Tensor: ...

    def logprobs(self, batch: Batch, entropy: EntropyMode = "none") -> TokenLogprobs: ...


@dataclass(slots=True)
class TokenLogprobs:
    """logprobs float32[B, S], zero where column t has no predecessor in its segment; entropy float32[B, S] or None."""

    logprobs: Tensor
    entropy: Tensor | None = None


def resolve_device(name: str) -> torch.device:
    """`auto` is CUDA, then MPS, then CPU. Raises OperantError for a device that is not there."""
    # cuDNN's attention compiles a plan for every new shape, and the cache's shape is new at every decode step: on an
    # H200 in bf16 sampling took 3 to 9 times as long with it
    torch.backends.cuda.enable_cudnn_sdp(False)
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise OperantError(
            f"device {name!r} cannot be used here ({str(error).splitlines()[0]}); try --device auto"
        ) from error
    return device


class Policy:
    """A Transformers model with its tokenizer.

    `dtype` is the precision of the matrix work: "float32", or "bf16" for autocast over float32 weights. With
    "bf16-true" the weights are bf16 themselves; those of an adapter stay float32.
    Raises OperantError for another dtype, for a device that is not there, and when the tokenizer has more tokens than
    the model.
    """

    def __init__(self, model: Any, codec: Codec, *, device: str = "auto", dtype: str = "float32") -> None:
        if dtype not in DTYPES:
            raise OperantError(f"dtype {dtype!r} is not known; choose {', '.join(DTYPES)}")
        self.device = resolve_device(device)
        self.dtype = dtype
        self.model = one_kernel_gelu(_halved(model) if dtype == "bf16-true" else model).to(self.device)
        self.family: Family = "encoder-decoder" if self.config.is_encoder_decoder else "decoder"
        settings = getattr(self._base(), "generation_config", None)
        self.generation = Generation.of(settings, self.vocabulary)
        self.codec = with_ends(codec, settings, encoder=self.has_encoder)
        self.critic: Critic | None = None
        self._target: nn.ModuleDict | None = None
        self._reference: Any = None  # a frozen model, or the name of a frozen adapter; None: the adapter switched off
        if codec.vocab_size > self.vocabulary:
            raise OperantError(
                f"the tokenizer has {codec.vocab_size} tokens but the model only {self.vocabulary}; "
                "load the tokenizer that belongs to this model"
            )
        self.recomputes = False  # layers are computed again in the backward pass (`memory.computed_again`)
        self._full_precision = False
        self._folder: Path | None = None  # where it was loaded from
        self._origin: Base | None = None  # where its weights, or those that its adapter is on, lie
        self.paths = Paths()  # `load` finds out which of them the model's family has
        self._attends_in_rows = True  # until a forward pass shows otherwise
        self._splits_head = True  # the same
        self._is_reference = False  # inside `as_reference`
        self._stem: Stem | None = None
        forward = inspect.signature(self._base().forward).parameters
        self._keeps_logits = "logits_to_keep" in forward
        self._takes_positions = "position_ids" in forward

    # --- making, loading, saving ---------------------------------------------------------------------------------

    @classmethod
    def load(cls, source: str | Path, *, device: str = "auto", dtype: str = "float32") -> Policy:
        """Load a model folder, a hub id or a GGUF file, with its PEFT adapter if it is one.

        Raises OperantError when there is no such model, when it is no language model, when it has no tokenizer, or when
        a file is not a whole GGUF.
        """

        path = Path(source)
        with told_in_one_line(source):
            if not path.exists() and looks_like_path(str(source)):
                raise OperantError(f"there is no model at {source}; give a folder that a stage or Transformers saved")
            if path.is_dir() and not any((path / name).exists() for name in ("config.json", ADAPTER)):
                files = sorted(path.glob("*.gguf"))
                instead = f"the file {files[0]}" if files else "a folder that a stage or Transformers saved"
                raise OperantError(f"{source} holds no model (no config.json); give {instead}")
            if path.is_file():
                model, tokenizer = load_gguf(path)
                policy = cls(model, Codec(tokenizer), device=device, dtype=dtype)
            elif (path / ADAPTER).exists() or (path / BASE).exists():
                policy = cls._load_on_base(path, device, dtype)
            else:
                policy = cls._load_whole(source, device, dtype)
        policy._folder = path if path.is_dir() else None
        if not getattr(policy.config, MADE_HERE, False):
            policy.paths = find_paths(policy, source)
        return policy

    @classmethod
    def _load_whole(
        cls, source: str | Path, device: str, dtype: str, *, revision: str = "", config: Any = None,
        codec: Codec | None = None,
    ) -> Policy:  # fmt: skip
        """Load a folder or hub id with all weights. config, codec: in place of those that are there."""
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

        named: dict[str, Any] = {"trust_remote_code": False} | ({"revision": revision} if revision else {})
        config = config or AutoConfig.from_pretrained(source, **named)
        if is_masked(config):  # Transformers would load it as a decoder that sees what comes after
            raise OperantError(
                f"{source} is a {config.model_type}, which reads and does not write; fine-tune it first "
                "(operant sft, which puts a decoder beside it), or give a decoder or encoder-decoder"
            )
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model, loading = auto.from_pretrained(
            source, config=config, dtype=torch.bfloat16 if dtype == "bf16-true" else torch.float32,
            output_loading_info=True, **named,
        )  # fmt: skip
        expect_all_weights(source, loading)
        policy = cls(model, codec or Codec.load(source), device=device, dtype=dtype)
        there = Path(source)
        policy._origin = Base(there.resolve()) if there.is_dir() else hub_base(str(source), revision)
        return policy

    @classmethod
    def _load_on_base(cls, folder: Path, device: str, dtype: str) -> Policy:
        """Load an adapter on the base that its folder names, or that base itself."""
        from transformers import AutoConfig

        base = find_base(folder)
        codec = Codec.load(folder) if (folder / "tokenizer_config.json").exists() else None
        if (folder / ADAPTER).exists():
            plain = cls._load_whole(base.source, "cpu", dtype, revision=base.revision, codec=codec)
            policy = cls(load_adapter(plain.model, folder), plain.codec, device=device, dtype=dtype)
        else:
            config = AutoConfig.from_pretrained(folder)
            policy = cls._load_whole(base.source, device, dtype, revision=base.revision, config=config, codec=codec)
        policy._origin = base
        return policy

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
    ) -> Policy:
        """A model with random weights: arch `gpt2`, `llama`, `t5` or `mbart`, size `tiny`, `small` or `base`.

        mbart, BART with the normalisation before each block, learns from nothing in far fewer steps than t5.
        Raises OperantError for another arch or size.
        """
        if arch not in SIZES or size not in SIZES[arch]:
            raise OperantError(
                f"no model {arch!r} of size {size!r}; choose --arch {'|'.join(SIZES)} "
                f"and --size {'|'.join(SIZES['gpt2'])}"
            )
        layers, heads, width, inner = SIZES[arch][size]
        ids: dict[str, Any] = {"pad_token_id": codec.pad_id, "eos_token_id": codec.eos_id, "bos_token_id": codec.bos_id}
        vocab = codec.vocab_size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: Any
            if arch == "gpt2":
                from transformers import GPT2Config, GPT2LMHeadModel

                model = GPT2LMHeadModel(
                    GPT2Config(
                        vocab_size=vocab, n_positions=max_length, n_embd=width, n_layer=layers, n_head=heads,
                        n_inner=inner, resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, **ids,
                    )
                )  # fmt: skip
            elif arch == "llama":
                from transformers import LlamaConfig, LlamaForCausalLM

                model = LlamaForCausalLM(
                    LlamaConfig(
                        vocab_size=vocab, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
                        num_attention_heads=heads, num_key_value_heads=max(1, heads // 2), attention_dropout=dropout,
                        max_position_embeddings=max_length, tie_word_embeddings=True, **ids,
                    )
                )  # fmt: skip
            elif arch == "mbart":
                from transformers import MBartConfig, MBartForConditionalGeneration

                model = MBartForConditionalGeneration(
                    MBartConfig(
                        vocab_size=vocab, d_model=width, encoder_layers=layers, decoder_layers=layers,
                        encoder_attention_heads=heads, decoder_attention_heads=heads, encoder_ffn_dim=inner,
                        decoder_ffn_dim=inner, dropout=dropout, attention_dropout=dropout, activation_dropout=0.0,
                        max_position_embeddings=max_length, scale_embedding=True, forced_eos_token_id=None,
                        decoder_start_token_id=codec.pad_id, **ids,
                    )
                )  # fmt: skip
            else:
                from transformers import T5Config, T5ForConditionalGeneration

                model = T5ForConditionalGeneration(
                    T5Config(
                        vocab_size=vocab, d_model=width, d_kv=width // heads, d_ff=inner, num_layers=layers,
                        num_decoder_layers=layers, num_heads=heads, dropout_rate=dropout, tie_word_embeddings=True,
                        feed_forward_proj="gated-gelu", decoder_start_token_id=codec.pad_id,
                        n_positions=max_length, **ids,
                    )
                )  # fmt: skip
        setattr(model.config, MADE_HERE, True)
        return cls(model, codec, device=device, dtype=dtype)

    def add_lora(
        self,
        rank: int = 8,
        alpha: float = 0.0,
        dropout: float = 0.0,
        seed: int = 0,
        targets: Sequence[str] = (),
        layers: int = 0,
    ) -> None:
        """Train a low-rank adapter instead of the weights (`adapter.add_adapter`).

        An adapter that is there already becomes a part of the weights that the new one is added to.
        Raises OperantError as `adapter.add_adapter` does.
        """
        self.merge_adapter()
        self.model = add_adapter(
            self.model, rank, alpha=alpha, targets=targets, layers=layers, dropout=dropout, seed=seed,
            task="SEQ_2_SEQ_LM" if self.has_encoder else "CAUSAL_LM",
        )  # fmt: skip

    def keep_stem(self) -> None:
        """Compute what lies below the first block that learns once a text, and keep it (`stem.Stem`).

        Nothing there may learn from now on. It changes the last bits of what is computed, where there is such a block.
        """
        self._stem = None if self.recomputes else Stem.of(self._base())

    @property
    def stem_depth(self) -> int:
        """How many blocks are read once a text, 0 without `keep_stem`."""
        return 0 if self._stem is None else self._stem.depth

    def turn_adapter_away(self, batches: Sequence[Batch], directions: int) -> None:
        """Let what these texts have in common teach a new adapter nothing (`adapter.turn_away`). One that was trained
        stays as it is."""
        if not (self.is_lora and is_fresh(self.model)):
            return
        moved = [to_device(batch, self.device) for batch in batches]
        stem, self._stem = self._stem, None  # together, texts share what they begin with
        try:
            turn_away(self.model, lambda: [self.logprobs(batch) for batch in moved], directions)
        finally:
            self._stem = stem

    def merge_adapter(self) -> None:
        """Make the adapter, where there is one, a part of the weights, which are all trained from now on."""
        if self.is_lora:
            self.model, self._origin = self.model.merge_and_unload().requires_grad_(True), None
            self._stem = None

    def twin(self) -> Policy:
        """A policy with an adapter of its own, equal to this one's now, on the same base: memory holds that once.

        It has no critic, reference or target network. Raises ValueError where there is no adapter.
        """
        if not self.is_lora:
            raise ValueError("all weights of this policy learn, so nothing can be shared")
        learned = {id(p) for p in self.trainable_parameters()}
        held = [*self.model.parameters(), *self.model.buffers()]
        twin = copy.copy(self)
        twin.model = copy.deepcopy(self.model, {id(t): t for t in held if id(t) not in learned})
        twin.critic = twin._target = twin._reference = None
        return twin

    def save(self, path: str | Path, *, by_name: bool = False) -> None:
        """Write a folder that plain Transformers loads; with LoRA an adapter that PEFT loads, and the name of its base.

        A base that lies in no folder of its own is written too, into `base`.
        by_name: where the weights are still those that were loaded, name them instead of writing them again.
        """
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        settings = getattr(self._base(), "generation_config", None)
        if settings is not None and self.codec.first_id is not None:
            settings.forced_bos_token_id = self.codec.first_id  # so that plain Transformers writes in that language
        if self.is_lora:
            self._origin = save_adapter(self.model, folder, self._origin, self._save_base)
        elif by_name and self._origin is not None and holds(self._origin.place, self.model.state_dict()):
            self.model.config.save_pretrained(str(folder))
            if self.model.can_generate():
                self.model.generation_config.save_pretrained(str(folder))
            name_base(self._origin, folder)
        else:
            self.model.save_pretrained(str(folder))
        self.codec.save(folder)
        if self.critic is not None:
            self.critic.save(folder)
        if self._target is not None:
            weights = {name: t.detach().cpu().clone() for name, t in self._target.state_dict().items()}
            save_file(weights, folder / TARGET_FILE)
        open_to_others(folder)

    def _save_base(self, folder: Path, weights: dict[str, Tensor]) -> None:
        self._base().save_pretrained(str(folder), state_dict=weights)
        self.codec.save(folder)

    def moved_to(self, path: str | Path) -> None:
        """What `save` wrote last lies there now: a base in it is taken along from there the next time."""
        self._origin = None if self._origin is None else self._origin.moved_to(Path(path))

    def restore(self, path: str | Path) -> None:
        """Put the weights that `save` wrote at `path` into this policy, in place: optimizers keep their tensors.

        Raises OperantError for an adapter on another base, and when weights are missing.
        """
        folder = Path(path)
        if self.is_lora:
            restore_adapter(self.model, folder, self._origin)
        else:
            self._restore_model(find_base(folder).place if (folder / BASE).exists() else folder)
        if self.critic is not None:
            self.critic.restore(folder)
        if self._target is not None:
            self._target.load_state_dict(load_file(folder / TARGET_FILE))

    def _restore_model(self, folder: Path) -> None:
        whole = folder / "model.safetensors"
        weights = load_file(whole) if whole.exists() else {}
        missing = self.model.state_dict().keys() - weights.keys()
        if missing <= set(self.model._tied_weights_keys or ()) and weights.keys() <= self.model.state_dict().keys():
            # a fifth of the time that making a second model takes; what is missing is tied to what is there
            self.model.load_state_dict(weights, strict=False)
        else:
            reader = type(self.model)
            saved, loading = reader.from_pretrained(str(folder), dtype=torch.float32, output_loading_info=True)
            expect_all_weights(folder, loading)
            self.model.load_state_dict(saved.state_dict())

    # --- what it is ----------------------------------------------------------------------------------------------

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def text_config(self) -> Any:
        """The part of `config` that is of the texts: all of it, but of a model that reads pictures or sounds too."""
        config = self._base().config
        return config if config.is_encoder_decoder else config.get_text_config(decoder=True)

    @property
    def _window(self) -> int | None:
        """How many tokens its shortest attention looks back, where that is not all of them."""
        config = self.text_config
        kinds = getattr(config, "layer_types", None)
        sliding = getattr(config, "sliding_window", None) if not kinds or "sliding_attention" in kinds else None
        chunk = getattr(config, "attention_chunk_size", None) if kinds and "chunked_attention" in kinds else None
        return min((size for size in (sliding, chunk) if size), default=None)

    @property
    def is_lora(self) -> bool:
        return hasattr(self.model, "peft_config")

    @property
    def max_length(self) -> int:
        """Tokens that fit: prompt and completion together, or each side of an encoder-decoder."""
        config = self.text_config
        for name in ("max_position_embeddings", "n_positions"):
            value = getattr(config, name, None)
            if isinstance(value, int) and value > 0:
                return min(value, _longrope_boundary(config) or value)
        return 2**20

    @property
    def vocabulary(self) -> int:
        """Token ids that the model knows: the tokenizer's, and those that its embeddings are padded with."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    def trainable_parameters(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def _base(self) -> Any:
        return self.model.get_base_model() if self.is_lora else self.model

    @contextlib.contextmanager
    def full_precision(self) -> Iterator[None]:
        """Inside, nothing is computed in half precision. Raises OperantError where the weights are in it."""
        if self.dtype == "bf16-true":
            raise OperantError("a trust region computes in float32; leave --dtype bf16-true out")
        self._full_precision = True
        try:
            yield
        finally:
            self._full_precision = False

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        if self.dtype == "bf16" and not self._full_precision:
            with torch.autocast(self.device.type, dtype=torch.bfloat16):
                yield
        else:
            yield

    # --- the reference policy ------------------------------------------------------------------------------------

    def freeze_reference(self) -> None:
        """Remember the policy as it is now, as the KL's reference.

        A fresh LoRA adapter adds nothing yet, so its reference is the same model with the adapter off; an adapter that
        was trained before is kept as a second, frozen adapter; full weights are copied.
        """
        if self.is_lora:
            self._reference = freeze_adapter(self.model)
        else:
            self._reference = copy.deepcopy(self.model).requires_grad_(False).eval()

    @contextlib.contextmanager
    def as_reference(self) -> Iterator[None]:
        """Inside, the policy computes with the reference's weights, without gradients.

        Raises OperantError when no reference was frozen.
        """
        current = self.model
        with torch.no_grad(), self._noted_as_reference():
            if self.is_lora and self._reference is None:
                with current.disable_adapter():
                    yield
            elif self.is_lora:
                current.set_adapter("reference")
                try:
                    yield
                finally:
                    current.set_adapter("default")
            else:
                if self._reference is None:
                    raise OperantError("no reference was frozen; call freeze_reference() before the first update")
                self.model = self._reference
                try:
                    yield
                finally:
                    self.model = current

    @contextlib.contextmanager
    def _noted_as_reference(self) -> Iterator[None]:
        self._is_reference = True
        try:
            yield
        finally:
            self._is_reference = False

    # --- the target network --------------------------------------------------------------------------------------

    def add_target_network(self) -> None:
        """Keep a copy of the weights, the critic's included, which lags behind them until `update_target_network`.

        It is saved and restored with the policy, in a file that plain Transformers does not look at.
        Raises OperantError for an adapter.
        """
        if self.is_lora:
            raise OperantError("a target network is kept of plain models alone; leave --lora_rank out")
        parts = {"model": self.model} | ({} if self.critic is None else {"critic": self.critic})
        self._target = nn.ModuleDict(copy.deepcopy(parts)).requires_grad_(False).eval()

    def update_target_network(self) -> None:
        """Let the target network be what the policy is now."""
        assert self._target is not None
        self._target["model"].load_state_dict(self.model.state_dict())
        if self.critic is not None:
            self._target["critic"].load_state_dict(self.critic.state_dict())

    @contextlib.contextmanager
    def as_target_network(self) -> Iterator[None]:
        """Inside, the policy and its critic compute with the target network's weights, without gradients."""
        assert self._target is not None
        now = self.model, self.critic
        self.model = self._target["model"]
        self.critic = cast(Critic, self._target["critic"]) if "critic" in self._target else None
        try:
            with torch.no_grad():
                yield
        finally:
            self.model, self.critic = now

    # --- the critic ----------------------------------------------------------------------------------------------

    def add_critic(self, *, separate: bool = True) -> None:
        """Give the policy a value head, on a trunk of its own or on the policy's (see `critic.Critic`).

        It is saved and restored with the policy, in a file that plain Transformers does not look at. A critic of this
        kind that lies in the folder that the policy was loaded from goes on from there.
        """
        self.critic = Critic(self.model, separate=separate)
        if self._folder is not None and self.critic.fits(self._folder):
            self.critic.restore(self._folder)

    def critic_parameters(self) -> list[nn.Parameter]:
        return [] if self.critic is None else list(self.critic.learned().values())

    def values(self, batch: Batch) -> Tensor:
        """V of every prefix, float32[B, S + 1]: column t is the state before token t, so that a row whose last token
        stands in column n − 1 has the value of what might follow in column n.

        Column 0 of a decoder has nothing to look at and is zero. Rows hold one segment each.
        Raises OperantError when there is no critic.
        """
        if self.critic is None:
            raise OperantError("this policy has no critic; call add_critic(), or use --algorithm ppo")
        if not self.paths.padded:
            raise OperantError(
                f"a critic reads rows together, and a {self.config.model_type} is read row by row; "
                "choose an algorithm without a critic"
            )
        start = self._decoder_start() if batch.context is not None else 0
        with self.autocast(), self._recomputing(self.critic.trunk):
            return _upcast(self.critic(self.model, batch, start, self._takes_positions))

    # --- batches -------------------------------------------------------------------------------------------------

    @property
    def has_encoder(self) -> bool:
        """Whether an encoder reads the prompts, so that the rows of a batch are completions alone."""
        return self.family == "encoder-decoder"

    def batch_of(
        self,
        trajectories: Sequence[Trajectory],
        *,
        normalisation: Normalisation = "per_completion",
        constant: float = 1.0,
    ) -> Batch:
        """Completions and what they were paid, laid out as this policy reads them (`data.batch.from_trajectories`)."""
        return from_trajectories(
            trajectories, encoder=self.has_encoder, pad_id=self.codec.pad_id, normalisation=normalisation,
            constant=constant,
        )  # fmt: skip

    def batch_of_sequences(
        self, prompts: Sequence[Ints], completions: Sequence[Ints], *, normalisation: Normalisation = "per_token"
    ) -> Batch:
        """Prompts int64[P] with a completion int64[T] each, laid out so too (`data.batch.from_sequences`)."""
        return from_sequences(
            prompts, completions, encoder=self.has_encoder, pad_id=self.codec.pad_id, normalisation=normalisation
        )

    # --- log-probabilities ---------------------------------------------------------------------------------------

    def logits(self, batch: Batch, keep_from: int = 0) -> Tensor:
        """Logits that predict columns keep_from … S−1, float32[B, S − keep_from, V]. This is where the shift lives.

        Column t is predicted from what stands before it: the decoder's column t−1, or the encoder-decoder's shifted
        input. Column 0 of a decoder has no predictor; its logits are zero.
        """
        with self.autocast():
            if not self._reads_together(batch):
                rows, at = (batch.segment_ids >= 0).nonzero(as_tuple=True)
                out = self._read_alone(batch, rows, at, self._head_at)
                out = out.masked_fill((at == 0)[:, None] & (batch.context is None), 0.0)
                return out.new_zeros(*batch.tokens.shape, out.shape[-1]).index_put((rows, at), out)[:, keep_from:]
            if batch.context is not None:
                return _upcast(self._forward(batch).logits[:, keep_from:])
            columns = batch.tokens.shape[1] - max(keep_from, 1) + 1  # one more than wanted: the last predicts nothing
            keep = {"logits_to_keep": columns} if self._keeps_logits else {}
            logits = _upcast(self._forward(batch, **keep).logits[:, -columns:-1])
            return logits if keep_from > 0 else torch.nn.functional.pad(logits, (0, 0, 1, 0))

    def _forward(self, batch: Batch, **arguments: Any) -> Any:
        """The model's output over the whole batch, padding included."""
        if batch.context is not None:
            start = torch.full_like(batch.tokens[:, :1], self._decoder_start())
            encoded = self._encode(batch.context.tokens, batch.context.mask)[batch.context.row]
            return self.model(
                encoder_outputs=BaseModelOutput(last_hidden_state=encoded),
                attention_mask=batch.context.mask[batch.context.row].long(),
                decoder_input_ids=torch.cat([start, batch.tokens[:, :-1]], 1),
                decoder_attention_mask=(batch.segment_ids >= 0).long(),
                use_cache=False,
            )
        if self._takes_positions:
            arguments["position_ids"] = batch.position_ids
        return self.model(input_ids=batch.tokens, attention_mask=self._attention(batch), use_cache=False, **arguments)

    def logprobs(
        self, batch: Batch, entropy: EntropyMode = "none", acting: Distributions | None = None
    ) -> TokenLogprobs:
        """log π(token_t | tokens before it in its segment, context), at the segment's temperature.

        acting: of `acting`, where it is known already.
        Returns float32[B, S], zero outside `action_mask`; and the entropy of the same distributions if asked,
        "measured" without a gradient, which saves two tensors of the vocabulary's size.
        """
        acted = batch.tokens[batch.action_mask]

        def picked(logits: Tensor, part: slice) -> tuple[Tensor, Tensor]:
            if entropy == "differentiable":
                normalised = torch.log_softmax(logits, -1)
                spread = -(normalised.exp() * normalised).sum(-1)
                return normalised.gather(-1, acted[part, None])[:, 0], spread
            return PickedLogprobs.apply(logits, acted[part], entropy != "none")

        logprobs, spread = of_rows(picked, self.acting(batch) if acting is None else acting)
        return TokenLogprobs(placed(batch, logprobs), None if entropy == "none" else placed(batch, spread))

    def acting(self, batch: Batch) -> Distributions:
        """The distributions of the K action tokens, row by row, at their segment's temperature.

        Where there are more than WHOLE logits they are not computed here, but chunk by chunk in `head.of_rows`. A model
        whose logits are not a function of its decoder's last states alone has no chunks, and is warned of once
        (RuntimeWarning).
        """
        rows, columns = batch.action_mask.nonzero(as_tuple=True)
        temperatures = self.temperatures(batch)
        if len(rows) * self.vocabulary > WHOLE and self._splits_head:
            split = self.split(batch)
            if split is not None:
                return split.at_temperature(temperatures)
            size = 4 * len(rows) * self.vocabulary / 1e9
            warnings.warn(
                f"the logits of a {self.config.model_type} cannot be computed in parts: {size:.1f} GB at once; if that "
                "is too much, lower --tokens_per_microbatch", RuntimeWarning, 2,
            )  # fmt: skip
        return Distributions(self._logits_at(batch, rows, columns)).at_temperature(temperatures)

    def split(self, batch: Batch) -> Distributions | None:
        """`acting` at temperature 1, as hidden states whose logits are computed when they are asked for.

        None for a model whose logits are not a function of its decoder's last states alone.
        """
        if not self._splits_head:
            return None
        tail = Tail(self._base())
        rows, columns = batch.action_mask.nonzero(as_tuple=True)
        states = self._read_at(batch, rows, columns, lambda places, run: self._states_at(tail, places, run))
        self._splits_head = states is not None
        return None if states is None else self._distributions(states, tail)

    def acting_logits(self, batch: Batch) -> Tensor:
        """Logits float32[K, V] that predict the K action tokens, row by row, at their segment's temperature.

        Only the tokens that act: the rest of a batch costs nothing from the last hidden state on.
        """
        rows, columns = batch.action_mask.nonzero(as_tuple=True)
        chosen = Distributions(self._logits_at(batch, rows, columns))
        return chosen.at_temperature(self.temperatures(batch)).rows

    def _logits_at(self, batch: Batch, rows: Tensor, columns: Tensor) -> Tensor:
        return self._read_at(batch, rows, columns, self._head_at)

    def temperatures(self, batch: Batch) -> Tensor | None:
        """Of the K action tokens, row by row, float32[K, 1]; None where all are 1."""
        if batch.temperature is None or not bool((batch.temperature != 1.0).any()):
            return None
        rows, columns = batch.action_mask.nonzero(as_tuple=True)
        return batch.temperature[batch.segment_ids[rows, columns]].clamp(min=1e-6)[:, None]

    def _distributions(self, states: Tensor, tail: Tail) -> Distributions:
        """With the logits of states float[K, D] as the policy, or the reference that it is at present, has them."""
        reference = self._is_reference

        def logits_of(rows: Tensor, part: slice) -> Tensor:
            # chunks are computed again in the backward pass, when no reference is in force
            again = reference and not self._is_reference
            with self.as_reference() if again else contextlib.nullcontext(), self.autocast():
                return _upcast(tail(rows))

        return Distributions(None, states, logits_of, tail.frozen, self.vocabulary)

    def _states_at(self, tail: Tail, places: Tensor, forward: Callable[[], Any]) -> Tensor | None:
        """Hidden states float[K, D] at flat places int64[K] of the (rows, columns) that `forward` computes; None where
        the model's own logits of the first of them are not those that `tail` gives."""

        def pick(states: Tensor) -> Tensor:
            flat = states.reshape(-1, states.shape[-1])
            return Picks(places, len(flat)).take(flat)

        with self.autocast():
            found = tail.states_at(pick, forward)
            if found is None:
                return None
            states, logits = found
            with torch.no_grad():
                fits = torch.equal(logits, tail(states[: len(logits)]))
        return states if fits else None

    def _read_at(
        self, batch: Batch, rows: Tensor, columns: Tensor, read: Callable[[Tensor, Callable[[], Any]], T]
    ) -> T:
        """`read` of a forward pass, and of the flat places in it that predict tokens (rows, columns).

        A decoder computes each distinct prompt once and no padding: all tokens stand in one row, and attention alone
        puts them back into rows.
        """
        width = batch.tokens.shape[1]
        if not self._reads_together(batch):
            return self._read_alone(batch, rows, columns, read)
        if batch.context is not None:
            with self._recomputing():
                return read(rows * width + columns, lambda: self._forward(batch))
        layout = self._layout(batch)
        if layout is not None:
            source, expand = layout
            own = self.text_config._attn_implementation
            picked = RowLayout(
                Picks(expand.reshape(-1), len(source), (batch.segment_ids >= 0).reshape(-1)),
                Picks(source, expand.numel()), width, own,
            )  # fmt: skip
            arguments = {
                "input_ids": batch.tokens.reshape(-1)[source][None],
                "position_ids": batch.position_ids.reshape(-1)[source][None],
                "use_cache": False,
            }
            config = self.text_config
            above = self._from_stem(batch, source)
            with above as skipped, attending_in_rows(config, picked) as used, self._recomputing(None, picked):
                chosen = read(expand[rows, columns - 1], lambda: self.model(**arguments))
            if used.calls == self._decoder_layers() - skipped:
                return chosen
            self._attends_in_rows = False  # a model with attention of its own, which let the rows see each other
        with self._from_stem(batch), self._recomputing():
            return read(rows * width + columns - 1, lambda: self._forward(batch))

    def _reads_together(self, batch: Batch) -> bool:
        """Whether the rows of a batch go through the model at once."""
        return self.paths.padded if batch.context is not None or _one_segment(batch) else self.paths.packed

    def _read_alone(
        self, batch: Batch, rows: Tensor, columns: Tensor, read: Callable[[Tensor, Callable[[], Any]], T]
    ) -> T:
        """`_read_at` of each row, or each segment of packed rows, by itself."""
        start = self._decoder_start() if batch.context is not None else 0
        with self._recomputing():
            found: list[Any] = [
                read(places, functools.partial(alone.forward, self.model, one, start))
                for one, places in alone.parts(batch, rows, columns)
            ]
        return cast(T, None if any(part is None for part in found) else torch.cat(found))

    @contextlib.contextmanager
    def _from_stem(self, batch: Batch, source: Tensor | None = None) -> Iterator[int]:
        """Inside, a pass begins above the stem, where there is one: yields how many blocks it leaves out.

        source: the flat places int64[N] of the tokens that are computed, in one row; None for the whole batch.
        """
        real = batch.segment_ids >= 0
        if self._stem is None or not _one_segment(batch):
            yield 0
            return
        base = self._base()
        with self.autocast():
            texts = self._stem.states(base, [row[known] for row, known in zip(batch.tokens, real, strict=True)])
        states = nn.utils.rnn.pad_sequence(texts, batch_first=True)
        states = torch.nn.functional.pad(states, (0, 0, 0, batch.tokens.shape[1] - states.shape[1]))
        with self._stem.given(base, states if source is None else states.flatten(0, 1)[source][None]):
            yield self._stem.depth

    @contextlib.contextmanager
    def _recomputing(self, trunk: Any = None, layout: RowLayout | None = None) -> Iterator[None]:
        """Inside, the layers of `trunk`, or of the policy's model, are computed again in the backward pass if
        `recomputes` says so, by the layout that was in force."""
        if not (self.recomputes and torch.is_grad_enabled()):
            yield
            return
        config = self.text_config

        def inside() -> contextlib.AbstractContextManager[Any]:
            return contextlib.nullcontext() if layout is None else attending_in_rows(config, layout)

        with computed_again(self.model if trunk is None else trunk, inside):
            yield

    def _layout(self, batch: Batch) -> tuple[Tensor, Tensor] | None:
        """Where the tokens of a decoder's batch stand when nothing is padded, no prompt is repeated, and neither is
        what prompts begin with alike (a chat's system turn), from ALIKE tokens on: their places in the flattened batch
        int64[N], those that several rows share first, and for every (row, column) the place among these N,
        int64[B, S].

        None where nothing would be saved, for packed rows, and for attention that cannot be laid out so.
        """
        ids, starts = batch.prompt_ids, batch.prompt_lengths
        if ids is None or starts is None or not self._takes_positions:
            return None
        if not self._attends_in_rows or not self.paths.in_rows:
            return None
        if self.text_config._attn_implementation not in ("sdpa", "eager"):
            return None
        rows, width = batch.tokens.shape
        if self._window and width > self._window:
            return None  # attention in rows knows of no window
        column = torch.arange(width, device=batch.tokens.device)[None]
        first: dict[int, int] = {}
        like = torch.tensor([first.setdefault(number, row) for row, number in enumerate(ids.tolist())])
        like = like.to(column.device)
        real, prompt = batch.segment_ids >= 0, column < starts[:, None]
        own = real & ~(prompt & (like != torch.arange(rows, device=column.device))[:, None])
        texts = {row: batch.tokens[row, : int(starts[row])].tolist() for row in first.values()}
        beginnings = alike(texts)
        for row, _, length in beginnings:
            own[row, :length] = False
        if int(own.sum()) == rows * width:
            return None
        place = (own.reshape(-1).cumsum(0) - 1).view(rows, width)
        for row, other, length in beginnings:
            place[row, :length] = place[other, :length]
        place = torch.where(prompt, place[like], place)
        shared = torch.bincount(place[real], minlength=int(own.sum())) > 1
        order = torch.argsort(~shared, stable=True)
        moved = torch.empty_like(order)
        moved[order] = torch.arange(len(order), device=order.device)
        return own.reshape(-1).nonzero()[order, 0], moved[place.clamp(min=0)] * real

    def _head_at(self, places: Tensor, forward: Callable[[], Any]) -> Tensor:
        """Logits float32[K, V] at flat places int64[K] of the (rows, columns) that `forward` computes.

        The head is applied to these alone. A hook, and not the head called from here, so that whatever the model does
        before and after its head (T5 scales, BART adds, Gemma caps) is still done.
        """
        taken: list[bool] = []

        def take(module: Any, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            taken.append(True)
            return (at_places(arguments[0])[None], *arguments[1:])

        def at_places(states: Tensor) -> Tensor:
            flat = states.reshape(-1, states.shape[-1])
            return Picks(places, len(flat)).take(flat)

        head = self._base().get_output_embeddings()
        handle = head.register_forward_pre_hook(take) if head is not None else None
        try:
            with self.autocast():
                logits = forward().logits
        finally:
            if handle is not None:
                handle.remove()
        return _upcast(logits[0] if taken else at_places(logits))

    def _attention(self, batch: Batch) -> Tensor | None:
        """bool[B, S] for one segment a row; bool[B, 1, S, S], causal inside each segment, for packed rows. None for
        packed rows wider than a window: Transformers then tells the segments apart by their positions, and it alone
        knows which layer has which window."""
        if _one_segment(batch):
            return (batch.segment_ids >= 0).long()
        same = batch.segment_ids[:, :, None] == batch.segment_ids[:, None, :]
        if self._window and same.shape[1] > self._window:
            return None
        causal = torch.ones(same.shape[1:], dtype=torch.bool, device=same.device).tril()
        return self._as_mask((same & causal)[:, None])

    def _as_mask(self, allowed: Tensor) -> Tensor:
        """bool[B, 1, S, S] in the form that the model's attention takes."""
        if self.text_config._attn_implementation == "eager":
            low = torch.finfo(torch.float32).min
            return torch.zeros(allowed.shape, device=allowed.device).masked_fill(~allowed, low)
        return allowed

    def _encode(self, tokens: Tensor, mask: Tensor) -> Tensor:
        encoder = self._base().get_encoder()
        return encoder(input_ids=tokens, attention_mask=mask.long()).last_hidden_state

    def _decoder_start(self) -> int:
        start = getattr(self.config, "decoder_start_token_id", None)
        if start is None:
            raise OperantError("the model's config has no decoder_start_token_id; set it in config.json")
        return int(start)

    # --- decoding ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Ints], prefixes: Sequence[Ints] | None = None) -> tuple[State, Tensor]:
        """Read prompts (and prefixes already written). Returns the rows' state and their next logits float32[B, V]."""
        before = [np.empty(0, np.int64)] * len(prompts) if prefixes is None else list(prefixes)
        if not self.paths.together:
            return self._prefill_alone(prompts, before)
        layers = self._decoder_layers()
        state = DecodeState.empty(len(prompts), layers, self.device, self.has_encoder)
        if self.has_encoder:
            width = max(1, max(len(p) for p in prompts))
            tokens = torch.full((len(prompts), width), self.codec.pad_id, dtype=torch.long)
            mask = torch.zeros(len(prompts), width, dtype=torch.bool)
            for row, prompt in enumerate(prompts):
                tokens[row, : len(prompt)] = torch.from_numpy(prompt)
                mask[row, : len(prompt)] = True
            state.encoder_mask = mask.to(self.device)
            with self.autocast():
                state.encoder_hidden = self._encode(tokens.to(self.device), state.encoder_mask)
            start = np.array([self._decoder_start()], np.int64)
            inputs = [np.concatenate([start, prefix]) for prefix in before]
        else:
            inputs = [np.concatenate([p, q]) for p, q in zip(prompts, before, strict=True)]
        width = max(len(row) for row in inputs)
        block = torch.full((len(inputs), width), self.codec.pad_id, dtype=torch.long)
        real = torch.zeros(len(inputs), width, dtype=torch.bool)
        for row, ids in enumerate(inputs):
            block[row, width - len(ids) :] = torch.from_numpy(ids)
            real[row, width - len(ids) :] = True
        return state, self._extend(state, block.to(self.device), real.to(self.device))

    def _prefill_alone(self, prompts: Sequence[Ints], before: Sequence[Ints]) -> tuple[State, Tensor]:
        """`prefill` of each row by itself."""
        given = [torch.from_numpy(prompt)[None].to(self.device) for prompt in prompts]
        written = [torch.from_numpy(prefix)[None].to(self.device) for prefix in before]
        if self.has_encoder:
            first = torch.tensor([[self._decoder_start()]], device=self.device)
            rows = [alone.Row(prompt, first[:, :0]) for prompt in given]
            written = [torch.cat([first, prefix], 1) for prefix in written]
        else:
            rows = [alone.Row(None, prompt[:, :0]) for prompt in given]
            written = [torch.cat(pair, 1) for pair in zip(given, written, strict=True)]
        state = alone.RowStates(rows)
        return state, self._extend_alone(state, written)

    def _extend_alone(self, state: alone.RowStates, tokens: Sequence[Tensor]) -> Tensor:
        with self.autocast():
            logits = [
                alone.extend(self.model, row, more, cached=self.paths.cached)
                for row, more in zip(state.each, tokens, strict=True)
            ]
        return _upcast(torch.stack(logits))

    @torch.no_grad()
    def decode(self, state: State, tokens: Tensor) -> Tensor:
        """Append tokens int64[B] to the rows of `state` (changed in place); the next logits, float32[B, V]."""
        if isinstance(state, alone.RowStates):
            return self._extend_alone(state, list(tokens[:, None, None].unbind()))
        assert isinstance(state, DecodeState)
        return self._extend(state, tokens[:, None], torch.ones_like(tokens, dtype=torch.bool)[:, None])

    def _extend(self, state: DecodeState, tokens: Tensor, real: Tensor) -> Tensor:
        positions = (state.positions[:, None] + real.long().cumsum(1) - 1).clamp(min=0)
        state.mask = torch.cat([state.mask, real], 1)
        state.positions = state.positions + real.sum(1)
        attention = state.mask.long()
        with self.autocast():
            if self.has_encoder:
                assert state.encoder_hidden is not None and state.encoder_mask is not None
                with _decoder_positions(self._base(), positions):
                    output = self.model(
                        encoder_outputs=BaseModelOutput(last_hidden_state=state.encoder_hidden),
                        attention_mask=state.encoder_mask.long(),
                        decoder_input_ids=tokens,
                        decoder_attention_mask=attention,
                        past_key_values=state.past_key_values(),
                        use_cache=True,
                    )
            else:
                arguments: dict[str, Any] = {"position_ids": positions} if self._takes_positions else {}
                if self._keeps_logits:
                    arguments["logits_to_keep"] = 1
                output = self.model(
                    input_ids=tokens,
                    attention_mask=attention,
                    past_key_values=state.past_key_values(),
                    use_cache=True,
                    **arguments,
                )
        return _upcast(output.logits[:, -1])

    def _decoder_layers(self) -> int:
        config = self.text_config
        for name in ("num_decoder_layers", "decoder_layers", "num_hidden_layers", "n_layer"):
            value = getattr(config, name, None)
            if isinstance(value, int) and (self.has_encoder or name in ("num_hidden_layers", "n_layer")):
                return value
        raise OperantError(f"the config of {config.model_type!r} does not say how many decoder layers there are")


def _one_segment(batch: Batch) -> bool:
    """Whether each row of a batch holds one text, and no several ones packed."""
    return bool(((batch.segment_ids == batch.segment_ids[:, :1]) | (batch.segment_ids < 0)).all())


def _longrope_boundary(config: Any) -> int | None:
    """The tokens from which on a model with longrope reads all of a text in another way, those before them too; None
    for other models. A text that grows across it has no log-probabilities that stay (Ding et al. 2024, Phi-3)."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(of_layers for of_layers in rope.values() if isinstance(of_layers, dict))]
    long = [kind.get("original_max_position_embeddings") for kind in kinds if kind.get("rope_type") == "longrope"]
    return min(filter(None, long), default=None)


@contextlib.contextmanager
def told_in_one_line(source: str | Path) -> Iterator[None]:
    """Inside, a model is loaded as `fetched` says, and whatever goes wrong becomes an OperantError of one line."""
    try:
        with fetched(source):
            yield
    except OperantError:
        raise
    except Exception as error:  # of many types: Transformers', safetensors', PEFT's, the hub client's
        raise OperantError(
            f"cannot load a model from {source} ({load_fault(error)}); give a folder that a stage or Transformers saved"
        ) from error


def is_large(model: Any) -> bool:
    """Whether a Transformers model has so many weights (`SMALL`) that time and memory are theirs."""
    return sum(p.numel() for p in model.parameters()) >= SMALL


def is_pretrained(model: Any) -> bool:
    """Whether a Transformers model was pretrained elsewhere, so that what it knows is to be kept.

    One that was made here says so in its configuration (`MADE_HERE`), whatever it has learned since; one without that
    mark was made elsewhere, unless it has fewer than `SMALL` weights.
    """
    if getattr(model.config, MADE_HERE, False):
        return False
    return is_large(model)


def is_masked(config: Any) -> bool:
    """Whether a Transformers configuration is of a BERT-like model, which is trained by masking."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    kind = config.model_type
    decodes = kind in CAUSAL and (kind not in MASKED or bool(getattr(config, "is_decoder", False)))
    return kind in MASKED and not config.is_encoder_decoder and not decodes


def _halved(model: Any) -> Any:
    """The weights in bf16, those of an adapter left out. What a model computes with beside them, such as the angles of
    its positions, keeps its precision."""
    for name, parameter in model.named_parameters():
        if parameter.dtype == torch.float32 and "lora_" not in name:
            parameter.data = parameter.data.to(torch.bfloat16)
    return model


def alike(texts: Mapping[int, Sequence[int]]) -> list[tuple[int, int, int]]:
    """(name, name of another, n) of each text that begins with the same n ≥ ALIKE tokens as another, which comes
    before it in the list where it is there too."""
    found, before = [], None
    for name in sorted(texts, key=lambda name: tuple(texts[name])):
        if before is not None:
            pairs = zip(texts[name], texts[before], strict=False)
            length = next((n for n, (own, theirs) in enumerate(pairs) if own != theirs), None)
            length = min(len(texts[name]), len(texts[before])) if length is None else length
            if length >= ALIKE:
                found.append((name, before, length))
        before = name
    return found


def placed(batch: Batch, values: Tensor) -> Tensor:
    """Values float[K] of the action tokens, row by row, on the batch's columns: float[B, S], zero elsewhere."""
    out = torch.zeros(batch.tokens.shape, dtype=values.dtype, device=values.device)
    return out.index_put(batch.action_mask.nonzero(as_tuple=True), values)


def _upcast(logits: Tensor) -> Tensor:
    """Half precision to float32; float64 stays, so that tests can recompute in it."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


@contextlib.contextmanager
def _decoder_positions(model: Any, positions: Tensor) -> Iterator[None]:
    """BART, Marian and NLLB number decoder positions by the cache's length; rows of different ages need their own."""
    embedding = getattr(model.get_decoder(), "embed_positions", None)
    if embedding is None:  # T5: relative positions, which left padding leaves as they are
        yield
        return

    def replace(module: Any, args: Any, output: Tensor) -> Tensor:
        if hasattr(module, "make_weights"):  # M2M-100 and NLLB: waves, after the place of the padding, as many as asked
            first = module.padding_idx + 1
            if (last := first + int(positions.max())) >= len(module.weights):
                module.make_weights(last + 1, module.embedding_dim, module.padding_idx)
            return module.weights[positions + first]
        return module.weight[positions + getattr(module, "offset", 0)]

    hook = embedding.register_forward_hook(replace)
    try:
        yield
    finally:
        hook.remove()
