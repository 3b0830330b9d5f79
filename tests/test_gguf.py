from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_model

from operant.data.batch import from_sequences
from operant.data.text import Codec
from operant.models.policy import Policy
from operant.types import OperantError

gguf = pytest.importorskip("gguf")

HEADS = {"attn_q": 4, "attn_k": 2}
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def in_llama_cpp(name: str, weight: np.ndarray) -> tuple[str, np.ndarray]:
    """A weight under llama.cpp's name, rows of queries and keys in its order."""
    name = name.removesuffix(".weight")
    if name in WHOLE:
        return f"{WHOLE[name]}.weight", weight
    _, _, layer, part = name.split(".", 3)
    short = NAMES[part]
    if heads := HEADS.get(short):
        rows, width = weight.shape
        weight = weight.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width)
    return f"blk.{layer}.{short}.weight", np.ascontiguousarray(weight)


def write_gguf(
    path: Path,
    model: Any,
    codec: Codec,
    *,
    arch: str = "llama",
    pre: str = "gpt-2",
    half: bool = False,
    leave: str = "",
) -> None:
    """A llama as llama.cpp's converter writes it; `leave`: the weight that is left out."""
    config, core = model.config, json.loads(codec.tokenizer.backend_tokenizer.to_str())["model"]
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    tokens = sorted(core["vocab"], key=core["vocab"].__getitem__)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if i in codec.special_ids else 1 for i in range(len(tokens))])
    writer.add_token_merges([" ".join(pair) for pair in core["merges"]])
    writer.add_bos_token_id(codec.bos_id)
    writer.add_eos_token_id(codec.eos_id)
    writer.add_pad_token_id(codec.pad_id)
    writer.add_chat_template("{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}")
    for name, weight in model.state_dict().items():
        named, values = in_llama_cpp(name, weight.numpy())
        if named != leave:
            writer.add_tensor(named, values.astype(np.float16 if half and values.ndim > 1 else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def write(codec: Codec, tmp_path: Path) -> Callable[..., Path]:
    def write(name: str = "tiny.gguf", **options: Any) -> Path:
        write_gguf(tmp_path / name, tiny_model("llama", codec), codec, **options)
        return tmp_path / name

    return write


def test_a_gguf_file_is_the_model_and_tokenizer_that_it_was_made_of(
    write: Callable[..., Path], codec: Codec, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    file, text = write(), "the cat sat on 12 mats, 你好 😀"
    loaded, made = Policy.load(file, device="cpu"), Policy(tiny_model("llama", codec), codec, device="cpu")
    assert loaded.codec.encode(text).tolist() == codec.encode(text).tolist()
    assert (loaded.codec.eos_id, loaded.codec.pad_id) == (codec.eos_id, codec.pad_id)
    batch = from_sequences([codec.encode("the cat")], [codec.encode(" sat on")], encoder=False, pad_id=codec.pad_id)
    torch.testing.assert_close(loaded.logprobs(batch).logprobs, made.logprobs(batch).logprobs, atol=1e-5, rtol=0)
    assert loaded.codec.render([{"role": "user", "content": "hi"}]) == "<user>hi"
    assert caplog.messages == ["tiny.gguf keeps 32 bits a weight (F32), now float32"]
    assert capfd.readouterr().err == ""  # no bar of Transformers


def test_what_was_read_from_a_gguf_trains_and_saves_like_any_other(
    write: Callable[..., Path], codec: Codec, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    policy = Policy.load(write(half=True), device="cpu")
    assert "(F16, also F32), now float32; what rounding lost does not come back" in caplog.messages[0]
    assert {p.dtype for p in policy.trainable_parameters()} == {torch.float32}
    policy.save(tmp_path / "folder")
    settings = json.loads((tmp_path / "folder" / "config.json").read_text("utf-8"))
    assert "quantization_config" not in settings and settings["dtype"] == "float32"
    again = Policy.load(tmp_path / "folder", device="cpu")
    batch = from_sequences([codec.encode("the cat")], [codec.encode(" sat on")], encoder=False, pad_id=codec.pad_id)
    assert torch.equal(again.logprobs(batch).logprobs, policy.logprobs(batch).logprobs)
    assert again.codec.hash == policy.codec.hash
    policy.add_lora(rank=2)
    policy.save(tmp_path / "adapter")
    assert Policy.load(tmp_path / "adapter", device="cpu").is_lora


def test_a_vocabulary_with_digits_apart_splits_the_spaces_before_a_number_too(write: Callable[..., Path]) -> None:
    def pieces(pre: str) -> list[str]:
        backend = Policy.load(write(pre=pre), device="cpu").codec.tokenizer.backend_tokenizer
        return [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str("is  42")]

    assert pieces("smollm") == ["is", "ĠĠ", "4", "2"]
    assert pieces("gpt-2") == ["is", "Ġ", "Ġ42"]


@pytest.mark.parametrize("kept", [10, 300, 30_000, -8])
def test_a_gguf_that_is_cut_off_is_named(kept: int, write: Callable[..., Path]) -> None:
    file = write()
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(OperantError, match=r"tiny\.gguf is cut off or damaged; fetch it again"):
        Policy.load(file, device="cpu")


def test_a_file_that_is_no_gguf_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"")
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 64)
    for name in ("model.gguf", "model.safetensors"):
        with pytest.raises(OperantError, match=rf"{name} is a file, but no GGUF; give the model's folder"):
            Policy.load(tmp_path / name, device="cpu")


def test_a_folder_of_a_gguf_says_to_give_the_file(write: Callable[..., Path]) -> None:
    file = write()
    with pytest.raises(OperantError, match=r"holds no model \(no config\.json\); give the file .*tiny\.gguf"):
        Policy.load(file.parent, device="cpu")


def test_an_architecture_that_cannot_be_read_is_named(write: Callable[..., Path]) -> None:
    with pytest.raises(OperantError, match="holds a mamba9, which Transformers cannot read from a GGUF"):
        Policy.load(write(arch="mamba9"), device="cpu")


def test_weights_that_the_file_lacks_are_named_and_never_made_up(write: Callable[..., Path]) -> None:
    file = write(leave="blk.1.ffn_down.weight")
    with pytest.raises(OperantError, match=r"lacks 1 of the model's weights, such as .*1\.mlp\.down_proj\.weight"):
        Policy.load(file, device="cpu")


def test_without_the_package_the_line_installs_it(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = write()
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(OperantError, match=r"needs the package gguf: .* -m pip install gguf"):
        Policy.load(file, device="cpu")
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
