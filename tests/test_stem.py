"""What lies below an adapter is read once a text, and a pass that begins above it says what a whole one says."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from torch import Tensor

from operant.data.text import Codec
from operant.models import stem
from operant.models.policy import Policy
from operant.models.stem import Stem, blocks_of
from operant.types import Batch, OperantError

FAMILIES = ("gpt2", "llama", "gemma2", "cohere", "qwen3")
PROMPTS = [np.array([5, 6, 7]), np.array([5, 6, 7]), np.array([9, 4]), np.arange(4, 24), np.arange(4, 25)]
ANSWERS = [np.array([4, 5, 6, 8]), np.array([7, 5]), np.array([9]), np.array([8, 8, 3]), np.array([6, 5])]


def model_of(kind: str, codec: Codec) -> Any:
    """Three blocks with random weights whose distributions are far from flat."""
    torch.manual_seed(3)
    if kind == "gpt2":
        sizes = {"n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 48}
        return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=codec.vocab_size, initializer_range=0.4, **sizes)).eval()
    made, config = {
        "llama": (hf.LlamaForCausalLM, hf.LlamaConfig),
        "gemma2": (hf.Gemma2ForCausalLM, hf.Gemma2Config),
        "cohere": (hf.CohereForCausalLM, hf.CohereConfig),
        "qwen3": (hf.Qwen3ForCausalLM, hf.Qwen3Config),
    }[kind]
    own = {"cohere": {"logit_scale": 0.25}, "gemma2": {"sliding_window": 48}}.get(kind, {})
    return made(
        config(
            vocab_size=codec.vocab_size, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
            num_attention_heads=2, num_key_value_heads=1, head_dim=8, initializer_range=0.4,
            max_position_embeddings=48, pad_token_id=0, bos_token_id=1, eos_token_id=2, **own,
        )
    ).eval()  # fmt: skip


@pytest.fixture
def adapted(codec: Codec) -> Callable[..., Policy]:
    """A policy with an adapter that adds something, in its last block alone unless it is said otherwise."""

    def make(kind: str = "llama", **options: Any) -> Policy:
        policy = Policy(model_of(kind, codec), codec, device="cpu")
        policy.add_lora(2, **({"layers": 1} | options))
        policy.model.eval()
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for p in policy.trainable_parameters():
                p.add_(torch.randn(p.shape, generator=generator) / 5)
        return policy

    return make


def batch_of(policy: Policy, *rows: int) -> Batch:
    chosen = rows or range(len(PROMPTS))
    return policy.batch_of_sequences([PROMPTS[i] for i in chosen], [ANSWERS[i] for i in chosen])


def said(policy: Policy, batch: Batch) -> tuple[Tensor, list[Tensor]]:
    """Log-probabilities, and the gradient of their sum."""
    logprobs = policy.logprobs(batch).logprobs
    return logprobs.detach(), list(torch.autograd.grad(logprobs.sum(), policy.trainable_parameters()))


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_pass_from_the_stem_says_and_teaches_what_a_whole_one_does(kind: str, adapted: Callable[..., Policy]) -> None:
    policy = adapted(kind)
    policy.model.double()
    batch = batch_of(policy)
    whole, gradients = said(policy, batch)
    policy.keep_stem()
    assert policy.stem_depth == 2
    for _ in range(2):  # read, and kept
        found, own = said(policy, batch)
        assert torch.allclose(found, whole, atol=1e-9)
        assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(own, gradients, strict=True))
    assert float(whole.abs().max()) > 1
    # whatever lets the rows stand side by side is left out
    policy._attends_in_rows = False
    assert torch.allclose(said(policy, batch)[0], whole, atol=1e-9)


@pytest.mark.parametrize("kind", FAMILIES)
def test_what_is_said_of_a_text_hangs_on_nothing_that_was_read_before(
    kind: str, adapted: Callable[..., Policy], monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh, used = adapted(kind), adapted(kind)
    fresh.keep_stem()
    used.keep_stem()
    for rows in ((4, 2), (3,), (1, 0, 3)):
        said(used, batch_of(used, *rows))
    assert torch.equal(said(fresh, batch_of(fresh))[0], said(used, batch_of(used))[0])
    monkeypatch.setattr(stem, "KEPT", 1)  # and not on what had to go
    small = adapted(kind)
    small.keep_stem()
    assert torch.equal(said(small, batch_of(small))[0], said(used, batch_of(used))[0])
    assert small._stem is not None and len(small._stem._kept) == 1


def test_each_text_is_read_once_by_all_that_stand_on_one_base(
    adapted: Callable[..., Policy], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    real = Stem._read
    monkeypatch.setattr(Stem, "_read", lambda self, model, text: read.append(len(text)) or real(self, model, text))
    policy = adapted()
    policy.keep_stem()
    other = policy.twin()
    other.model.requires_grad_(False)
    with torch.no_grad():
        for p in other.model.parameters():
            if p.data_ptr() not in {q.data_ptr() for q in policy.model.parameters()}:
                p.zero_()
    read.clear()
    first, batch = said(policy, batch_of(policy))[0], batch_of(policy)
    assert not torch.equal(other.logprobs(batch).logprobs, first)  # with an adapter of its own
    said(policy, batch_of(policy, 2, 3))
    assert read == [len(p) + len(a) for p, a in zip(PROMPTS, ANSWERS, strict=True)]


def test_where_everything_learns_there_is_no_stem(
    adapted: Callable[..., Policy], make_policy: Callable[..., Policy]
) -> None:
    for policy in (adapted(layers=0), adapted(layers=3), make_policy("llama"), make_policy("t5")):
        policy.keep_stem()
        assert policy.stem_depth == 0
    embedded = adapted()
    embedded.model.get_input_embeddings().requires_grad_(True)
    embedded.keep_stem()
    assert embedded.stem_depth == 0
    merged = adapted()
    merged.keep_stem()
    merged.merge_adapter()
    assert merged.stem_depth == 0


def test_a_model_that_looks_below_again_has_no_stem(adapted: Callable[..., Policy]) -> None:
    """As one does whose later blocks read what earlier ones computed."""
    policy = adapted()
    blocks = blocks_of(policy._base())
    assert blocks is not None
    seen: list[Tensor] = []
    blocks[0].self_attn.register_forward_hook(lambda module, given, output: seen.append(output[0]))
    blocks[2].register_forward_pre_hook(lambda module, given: (given[0] + seen[-1].mean(1, keepdim=True), *given[1:]))
    policy.keep_stem()
    assert policy.stem_depth == 0


def test_packed_rows_are_read_whole(adapted: Callable[..., Policy]) -> None:
    policy = adapted()
    batch = batch_of(policy, 3)
    half = torch.where(torch.arange(batch.tokens.shape[1]) < 10, 0, 1)[None]
    packed = dataclasses.replace(
        batch, segment_ids=half, position_ids=torch.where(half == 0, batch.position_ids, batch.position_ids - 10),
        prompt_ids=None, prompt_lengths=None,
    )  # fmt: skip
    whole = policy.logprobs(packed).logprobs
    policy.keep_stem()
    assert policy.stem_depth == 2 and torch.equal(policy.logprobs(packed).logprobs, whole)


def test_an_adapter_is_put_on_the_blocks_next_to_the_head(
    adapted: Callable[..., Policy], make_policy: Callable[..., Policy], tmp_path: Any
) -> None:
    def layers(policy: Policy) -> set[str]:
        names = [name for name, _ in policy.model.named_parameters() if "lora_A" in name]
        return {part for name in names for part in name.split(".") if part.isdigit()}

    assert layers(adapted(layers=2)) == {"1", "2"} and layers(adapted("gpt2", layers=1)) == {"2"}
    assert layers(adapted(layers=9)) == layers(adapted(layers=0)) == {"0", "1", "2"}
    some = adapted(layers=1, targets=["q_proj"])
    assert layers(some) == {"2"} and len(some.trainable_parameters()) == 2
    some.save(tmp_path / "some")
    assert layers(Policy.load(tmp_path / "some", device="cpu")) == {"2"}
    with pytest.raises(OperantError, match="no layer is named query"):
        adapted(layers=1, targets=["query"])
    with pytest.raises(OperantError, match="a t5 is no single row of blocks; leave --lora_layers out"):
        make_policy("t5").add_lora(2, layers=1)
