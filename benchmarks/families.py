"""Every family of models that Transformers knows and operant was tried on, as a tiny model of its form, and the table
of what the check at load says of each: `python -m benchmarks.families` writes docs/models.md.

A family is added as one row of FAMILIES: the name that people know, Transformers' `model_type`, and the settings in
which its tiny model differs from SMALL.
"""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from operant.data.text import Codec
from operant.models.policy import Policy, is_masked
from operant.models.selfcheck import Paths, check
from operant.types import OperantError

PAGE = Path(__file__).parent.parent / "docs" / "models.md"
TEXTS = ["the cat sat on the mat", "a dog ran to the red house", "one two three four five"]
VOCABULARY = 320
WINDOW = 6  # tokens that attention looks back where a family has a window
# a setting that a family does not have is left out
SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "word_embed_proj_dim", "attention_hidden_size"), 32),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_experts_per_tok", "linear_num_key_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "rotary_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "state_size", "mamba_d_state"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("sliding_window", "attention_window", "attention_chunk_size", "attention_window_size"), WINDOW),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 64),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace"), 1),
    "mamba_n_heads": 8, "mamba_d_head": 8, "vocab_size": VOCABULARY, "query_pre_attn_scalar": 8, "logit_scale": 1.0,
    "initializer_range": 0.2, "init_std": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [8.0] * 4}


@dataclass(frozen=True, slots=True)
class Family:
    """name: as people know it. kind: Transformers' `model_type`. settings: in which it differs from SMALL."""

    name: str
    kind: str
    settings: dict[str, Any] = field(default_factory=dict)

    def model(self, seed: int = 0) -> Any:
        """A tiny model with random weights, in evaluation mode."""
        from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

        config = self.config()
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(seed)
            model = auto.from_config(config).eval()
            with torch.no_grad():  # weights that begin as zeros or ones would hide what depends on them
                for parameter in model.parameters():
                    if parameter.dim() == 1:
                        parameter.add_(0.1 * torch.randn(parameter.shape))
        return model

    def config(self) -> Any:
        """The configuration of the tiny model."""
        return configuration(self.kind, self.settings)


def configuration(kind: str, settings: dict[str, Any]) -> Any:
    """A configuration of this `model_type` with SMALL's settings, as far as it has them, and these.

    A dictionary for `text_config` and the like is a configuration of its own, made so too.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    made = CONFIG_MAPPING[kind]
    known = set(inspect.signature(made.__init__).parameters)
    known |= {name for base in made.__mro__ for name in getattr(base, "__annotations__", {})}
    given = {name: value for name, value in SMALL.items() if name in known} | settings
    for name, value in given.items():
        if isinstance(value, dict) and "model_type" in value:
            inner = dict(value)
            given[name] = configuration(inner.pop("model_type"), inner).to_dict()
    config = made(**given)
    if config.is_encoder_decoder:
        config.decoder_start_token_id = 2
    return config


def _hybrid(*kinds: str) -> dict[str, Any]:
    return {"layer_types": list(kinds), "num_hidden_layers": len(kinds)}


FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
FAMILIES = [
    Family("GPT-2", "gpt2"),
    Family("GPT-Neo", "gpt_neo", {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW}),
    Family("GPT-NeoX, Pythia", "gpt_neox"),
    Family("GPT-J", "gptj", {"rotary_dim": 4}),
    Family("StarCoder, SantaCoder", "gpt_bigcode"),
    Family("StarCoder 2", "starcoder2"),
    Family("CodeGen", "codegen", {"rotary_dim": 4}),
    Family("GPT-1", "openai-gpt"),
    Family("OPT", "opt"),
    Family("BLOOM", "bloom"),
    Family("MPT", "mpt"),
    Family("Falcon", "falcon"),
    Family("Falcon, ALiBi", "falcon", {"alibi": True}),
    Family("Falcon-H1", "falcon_h1", {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_expand": 2}),
    Family("Falcon-Mamba", "falcon_mamba"),
    Family("Llama, SmolLM, TinyLlama", "llama"),
    Family("Llama 4", "llama4_text", _hybrid("chunked_attention", FULL) | {"no_rope_layers": [1, 0]}),
    Family("SmolLM 3", "smollm3", {"no_rope_layers": [1, 0]}),
    Family("Mistral", "mistral"),
    Family("Mixtral", "mixtral"),
    Family("Ministral", "ministral"),
    Family("Qwen 2, Qwen 2.5", "qwen2"),
    Family("Qwen 2 with windows", "qwen2", {"use_sliding_window": True} | _hybrid(FULL, SLIDING)),
    Family("Qwen 2 MoE", "qwen2_moe"),
    Family("Qwen 3", "qwen3"),
    Family("Qwen 3 MoE", "qwen3_moe"),
    Family("Qwen3-Next", "qwen3_next", _hybrid(LINEAR, FULL)),
    Family("Qwen 3.5", "qwen3_5_text", _hybrid(LINEAR, FULL)),
    Family("Qwen 3.5, with pictures", "qwen3_5", {
        "text_config": {"model_type": "qwen3_5_text"} | _hybrid(LINEAR, FULL),
    }),
    Family("Qwen 3.5 MoE", "qwen3_5_moe_text", _hybrid(LINEAR, FULL)),
    Family("Gemma", "gemma"),
    Family("Gemma 2", "gemma2", _hybrid(SLIDING, FULL)),
    Family("Gemma 3", "gemma3_text", _hybrid(SLIDING, FULL)),
    Family("Gemma 3, with pictures", "gemma3", {
        "text_config": {"model_type": "gemma3_text"} | _hybrid(SLIDING, FULL),
        "vision_config": {"model_type": "siglip_vision_model", "image_size": 16, "patch_size": 8},
        "mm_tokens_per_image": 1, "image_token_index": 310, "boi_token_index": 311, "eoi_token_index": 312,
    }),
    Family("Phi-1, Phi-2", "phi"),
    Family("Phi-3, Phi-4", "phi3", {"sliding_window": None}),
    Family("Phi-3 with longrope", "phi3", {
        "sliding_window": None, "rope_parameters": LONG, "original_max_position_embeddings": 32,
    }),
    Family("Phi-3.5 MoE", "phimoe"),
    Family("StableLM", "stablelm"),
    Family("OLMo", "olmo"),
    Family("OLMo 2", "olmo2"),
    Family("OLMo 3", "olmo3", _hybrid(SLIDING, FULL)),
    Family("OLMoE", "olmoe"),
    Family("Command R", "cohere"),
    Family("Command R7B", "cohere2", _hybrid(SLIDING, FULL)),
    Family("Granite", "granite"),
    Family("Granite MoE", "granitemoe"),
    Family("Granite 4", "granitemoehybrid", _hybrid("mamba", "attention")),
    Family("DeepSeek V2", "deepseek_v2", {"num_key_value_heads": 4}),
    Family("DeepSeek V3", "deepseek_v3", {"num_key_value_heads": 4}),
    Family("GLM", "glm"),
    Family("GLM 4", "glm4"),
    Family("GPT-OSS", "gpt_oss", _hybrid(SLIDING, FULL)),
    Family("Nemotron", "nemotron"),
    Family("ERNIE 4.5", "ernie4_5"),
    Family("EXAONE 4", "exaone4", _hybrid(SLIDING, FULL)),
    Family("HunYuan", "hunyuan_v1_dense"),
    Family("Seed-OSS", "seed_oss"),
    Family("Arcee", "arcee"),
    Family("Apertus", "apertus"),
    Family("Helium", "helium"),
    Family("BitNet", "bitnet"),
    Family("Persimmon", "persimmon"),
    Family("XGLM", "xglm"),
    Family("BioGPT", "biogpt"),
    Family("MiniMax", "minimax", _hybrid(LINEAR, FULL)),
    Family("JetMoE", "jetmoe"),
    Family("nanochat", "nanochat"),
    Family("CTRL", "ctrl", {"dff": 48}),
    Family("XLNet", "xlnet"),
    Family("XLM", "xlm"),
    Family("LFM 2", "lfm2", _hybrid("conv", FULL)),
    Family("LFM 2 MoE", "lfm2_moe", _hybrid("conv", FULL)),
    Family("Jamba", "jamba", {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
                              "expert_layer_offset": 1, "use_mamba_kernels": False}),
    Family("Bamba", "bamba", {"attn_layer_indices": [1]}),
    Family("Nemotron-H", "nemotron_h", _hybrid("mamba", "attention", "mlp") | {
        "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1,
        "moe_shared_expert_intermediate_size": 16,
    }),
    Family("Mamba", "mamba"),
    Family("Mamba 2", "mamba2", {"num_heads": 8, "head_dim": 8, "n_groups": 1}),
    Family("RecurrentGemma, Griffin", "recurrent_gemma", {"block_types": ["recurrent", "attention"], "lru_width": 32}),
    Family("RWKV", "rwkv"),
    Family("xLSTM", "xlstm"),
    Family("T5", "t5"),
    Family("T5 1.1, FLAN-T5", "t5", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    Family("mT5", "mt5"),
    Family("UMT5", "umt5"),
    Family("LongT5", "longt5", {"local_radius": 3}),
    Family("Switch", "switch_transformers"),
    Family("T5Gemma", "t5gemma", {side: {"model_type": "t5_gemma_module"} | _hybrid(SLIDING, FULL)
                               for side in ("encoder", "decoder")}),
    Family("BART", "bart"),
    Family("mBART", "mbart"),
    Family("Marian", "marian"),
    Family("Pegasus", "pegasus"),
    Family("Pegasus-X", "pegasus_x", {"block_size": 4, "num_global_tokens": 2}),
    Family("BlenderBot", "blenderbot"),
    Family("PLBart", "plbart"),
    Family("MVP", "mvp"),
    Family("LED", "led"),
    Family("BigBird-Pegasus", "bigbird_pegasus"),
    Family("ProphetNet", "prophetnet"),
    Family("FSMT", "fsmt", {"langs": ["en", "de"], "src_vocab_size": VOCABULARY, "tgt_vocab_size": VOCABULARY}),
    Family("M2M-100, NLLB", "m2m_100"),
    Family("NLLB MoE", "nllb-moe", {"encoder_sparse_step": 2, "decoder_sparse_step": 2}),
    Family("BERT", "bert"),
    Family("RoBERTa", "roberta"),
    Family("ModernBERT", "modernbert-decoder"),
]  # fmt: skip


def checked(family: Family, codec: Codec) -> Paths | str:
    """What the check at load says of a tiny model of the family: its ways, or why it is refused."""
    config = family.config()
    if is_masked(config):
        return f"is a {config.model_type}, which reads and does not write; `operant sft` puts a decoder beside it"
    try:
        return check(Policy(family.model(), codec, device="cpu"))
    except OperantError as error:
        return str(error)


def tiny_codec() -> Codec:
    """The tokenizer of the tiny models."""
    return Codec.train_bpe(TEXTS * 3, vocab_size=VOCABULARY)


INTRODUCTION = """# Families of models

Written by `python -m benchmarks.families`; do not edit.

When a model is loaded, operant finds out whether it computes what the model itself computes. Two short rows are read
and written in each of its ways and compared with one pass of the model over each row alone, without padding, cache or
mask. Windows and chunks of attention are made so small meanwhile that the rows reach beyond them. What differs is not
used for this model; where no way is left, the model is refused in one line. So a family that is not in the table works
too, or is refused.

The check takes 1.6 s of one core's time for 135 million weights. What it finds is kept in `~/.cache/operant` (or
`$XDG_CACHE_HOME/operant`, or the folder that `OPERANT_CACHE` names), by a hash of the model's form: its configuration,
the shapes of its weights, and the versions of torch and Transformers. A second load, and every version that the model
becomes by learning, finds it there. Where that folder cannot be written the check is made at each load. Nothing is ever
written into the model's own folder. Models that operant itself made need no check.

## The table

Each row is a model of its family with random weights and two or three small layers, its windows %(window)s tokens wide.

- **yes**: rows are decoded together, or read together in a batch, as fast as operant can.
- **row by row**: one row at a time, as its layers keep states that rows of different lengths cannot share. It is right,
  and takes as long for sixteen rows as sixteen times one.
- **without a cache**: each new token reads the row again from its beginning. It is right, and slow for long texts.
- **packed texts one by one**: of rows that hold several texts (`pretrain`), each text is read by itself.

| family | `model_type` | decodes | learns |
|---|---|---|---|
"""
ENDING = """
Two limits belong to families and not to operant. A model with longrope (Phi-3 and Phi-4 with long contexts) reads all
of a text in another way from a boundary on (`original_max_position_embeddings`, 4,096 tokens mostly), so what it said
before the boundary has other odds behind it: operant ends its texts there. XLNet and models like BERT look at what
comes after, and are no decoders.

## Another family

1. Load one: `operant sample --model FOLDER --prompt "…"`. The line that it prints, or none, is what the table would
   say.
2. Add a row to `FAMILIES` in `benchmarks/families.py`: its name, Transformers' `model_type`, and the settings in which
   a tiny one differs from `SMALL`. `python -m benchmarks.families` writes this page again.
3. `pytest -m slow tests/test_selfcheck.py -k NAME` compares what is sampled and learned with Transformers' own pass in
   double precision, row by row.
4. To make a slow one fast: decoding together is `Policy.prefill` and `Policy._extend` in `operant/models/policy.py` and
   the cache in `operant/models/cache.py`; row by row is `operant/models/alone.py`. `operant/models/selfcheck.py` then
   finds out by itself that the faster way is right. A setting that bounds how far a layer looks is added to
   `BOUNDARIES` there.
"""


def page() -> str:
    """The text of docs/models.md."""
    codec = tiny_codec()
    rows = []
    for family in FAMILIES:
        found = checked(family, codec)
        if isinstance(found, str):
            said = f"refused: {found.partition(' (')[0]}", ""  # the number in brackets is of this model alone
        else:
            alone = "row by row" if found.cached else "row by row, without a cache"
            packed = found.packed or family.config().is_encoder_decoder
            read = "yes" if found.padded else "row by row"
            said = "yes" if found.together else alone, read if packed else f"{read}; packed texts one by one"
        rows.append(f"| {family.name} | `{family.kind}` | {said[0]} | {said[1]} |\n")
    return INTRODUCTION % {"window": WINDOW} + "".join(rows) + ENDING


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    PAGE.write_text(page(), encoding="utf-8")
