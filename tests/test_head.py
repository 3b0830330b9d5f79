"""Log-probabilities, entropies and divergences in chunks are those of all logits at once, gradients included."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from torch import Tensor

from operant.algorithms.surrogate import full_kl_of
from operant.data.batch import from_sequences
from operant.data.text import Codec
from operant.models import encoder, head, policy
from operant.models.encoder import Encoder
from operant.models.policy import Policy
from operant.types import Batch, EncoderContext

PROMPTS = [np.array([5, 6, 7]), np.array([5, 6, 7]), np.array([9, 4])]
ANSWERS = [np.array([4, 5, 6, 8]), np.array([7, 5]), np.array([9])]
HEADS = ("gpt2", "llama", "t5", "bart", "marian", "gemma2", "granite", "cohere")
ROWS = 2  # of a chunk


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch, codec: Codec) -> None:
    monkeypatch.setattr(policy, "WHOLE", 0)
    monkeypatch.setattr(encoder, "WHOLE", 0)
    monkeypatch.setattr(head, "CHUNK", ROWS * codec.vocab_size)


@pytest.fixture
def made(make_policy: Callable[..., Policy], codec: Codec) -> Callable[[str], Policy]:
    """A tiny model in float64 whose head is one of HEADS: plain, scaled before or after, shifted, or capped."""

    def make(kind: str) -> Policy:
        if kind not in ("gemma2", "granite", "cohere"):
            own = make_policy(kind)
        else:
            small = {
                "vocab_size": codec.vocab_size, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
                "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.4, "pad_token_id": 0,
                "bos_token_id": 1, "eos_token_id": 2,
            }  # fmt: skip
            torch.manual_seed(3)
            model: Any = {
                "gemma2": lambda: hf.Gemma2ForCausalLM(
                    hf.Gemma2Config(**small, head_dim=8, final_logit_softcapping=3.0, sliding_window=64)
                ),
                "granite": lambda: hf.GraniteForCausalLM(hf.GraniteConfig(**small, logits_scaling=4.0)),
                "cohere": lambda: hf.CohereForCausalLM(hf.CohereConfig(**small, logit_scale=0.25)),
            }[kind]()
            own = Policy(model.eval(), codec, device="cpu")
        own.model.double()
        return own

    return make


def batch_for(own: Policy) -> Batch:
    batch = from_sequences(PROMPTS, ANSWERS, encoder=own.has_encoder, pad_id=own.codec.pad_id)
    batch.temperature = torch.tensor([0.7, 1.0, 1.3], dtype=torch.float64)
    return batch


def plain_tables(own: Policy) -> list[Tensor]:
    """log π of every answer's tokens, float64[T, V] each: row by row, from nothing but the model's own logits."""
    tables = []
    for prompt, answer, temperature in zip(PROMPTS, ANSWERS, (0.7, 1.0, 1.3), strict=True):
        if own.has_encoder:
            start = [own.config.decoder_start_token_id, *answer[:-1].tolist()]
            given = {"input_ids": torch.tensor(prompt)[None], "decoder_input_ids": torch.tensor([start])}
            logits = own.model(**given).logits[0]
        else:
            whole = torch.tensor(np.concatenate([prompt, answer]))[None]
            logits = own.model(input_ids=whole).logits[0, len(prompt) - 1 : -1]
        tables.append(torch.log_softmax(logits / temperature, -1))
    return tables


def gradients(own: Policy, loss: Tensor) -> dict[str, Tensor]:
    names = {n: p for n, p in own.model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(names.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(names.items(), found, strict=True)}


def within(kind: str) -> dict[str, float]:
    """The tolerance: some normalise in float32 whatever their weights are."""
    whole = kind in ("gpt2", "bart", "marian")
    return {"rtol": 1e-8, "atol": 1e-9} if whole else {"rtol": 1e-4, "atol": 1e-5}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], kind: str) -> None:
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, **within(kind), msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("learned", ["all", "lora", "lora and head"])
@pytest.mark.parametrize("kind", HEADS)
def test_chunks_have_the_values_and_gradients_of_the_whole_table(
    kind: str, learned: str, made: Callable[[str], Policy], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = made(kind)
    if learned != "all":
        add_adapter(own, head=learned != "lora")
    sizes: list[int] = []
    own._base().get_output_embeddings().register_forward_pre_hook(lambda m, a: sizes.append(a[0][0].shape[0]))
    batch = batch_for(own)
    out = own.logprobs(batch, "differentiable")
    assert out.entropy is not None
    weights = torch.randn(out.logprobs.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = gradients(own, (weights * (out.logprobs + 0.3 * out.entropy)).sum())
    measured = own.logprobs(batch, "measured")
    assert sizes and max(sizes) <= max(ROWS, 4), "a chunk was larger than it may be"

    tables, loss = plain_tables(own), torch.zeros((), dtype=torch.float64)
    for row, (table, answer) in enumerate(zip(tables, ANSWERS, strict=True)):
        start = 0 if own.has_encoder else len(PROMPTS[row])
        places = slice(start, start + len(answer))
        picked, entropy = table[torch.arange(len(answer)), answer], -(table.exp() * table).sum(-1)
        torch.testing.assert_close(out.logprobs[row, places], picked, **within(kind))
        torch.testing.assert_close(out.entropy[row, places], entropy, **within(kind))
        assert measured.entropy is not None
        torch.testing.assert_close(measured.entropy[row, places], entropy, **within(kind))
        loss = loss + (weights[row, places] * (picked + 0.3 * entropy)).sum()
    assert_same(found, gradients(own, loss), kind)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("learned", ["all", "fresh adapter", "older adapter"])
def test_the_divergence_from_the_reference_is_whole_in_chunks_too(learned: str, made: Callable[[str], Policy]) -> None:
    """Also where the head has an adapter of its own, which the reference has not, or has as it was."""
    own = made("llama")
    if learned != "all":
        add_adapter(own, head=True, trained=learned == "older adapter")
    own.freeze_reference()
    before = [table.detach() for table in plain_tables(own)]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in own.trainable_parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    batch = batch_for(own)
    acting = own.acting(batch)
    with own.as_reference():
        reference = own.acting(batch)
    assert acting.logits is None and reference.logits is None
    kl = full_kl_of(acting, reference)
    weights = torch.randn(kl.shape, dtype=torch.float64, generator=generator)
    found = gradients(own, (weights * kl).sum())
    now = torch.cat(plain_tables(own))
    expected = (now.exp() * (now - torch.cat(before))).sum(-1)
    torch.testing.assert_close(kl, expected, **within("llama"))
    assert_same(found, gradients(own, (weights * expected).sum()), "llama")


def test_few_logits_are_computed_as_ever(made: Callable[[str], Policy]) -> None:
    own = made("llama")
    batch = batch_for(own)
    acting = own.acting(batch)
    assert acting.states is None and acting.logits is not None
    assert torch.equal(acting.logits, own.acting_logits(batch))


@pytest.mark.usefixtures("small_chunks")
def test_a_model_that_does_more_than_a_head_is_computed_whole_and_says_so(made: Callable[[str], Policy]) -> None:
    own = made("llama")
    plain = type(own.model).forward

    def shifted(self: Any, input_ids: Any = None, **named: Any) -> Any:
        output = plain(self, input_ids=input_ids, **named)
        output.logits = output.logits + input_ids.sum()  # no function of the last states
        output.logits[..., 0] = output.logits[..., 0] + input_ids.float().mean()
        return output

    own.model.forward = shifted.__get__(own.model)
    batch = batch_for(own)
    with pytest.warns(RuntimeWarning, match="llama cannot be computed in parts"):
        found = own.logprobs(batch).logprobs
    torch.testing.assert_close(found, own.logprobs(batch, acting=head.Distributions(own.acting_logits(batch))).logprobs)


@pytest.mark.usefixtures("small_chunks")
def test_masked_tokens_are_foretold_in_chunks(codec: Codec) -> None:
    own = Encoder.new("bert", "tiny", codec, max_length=32, device="cpu")
    tokens = torch.tensor([[4, 5, 6, 7], [8, 9, 4, 5]])
    mask = torch.ones_like(tokens, dtype=torch.bool)
    hidden = mask.clone()
    hidden[:, 0] = False
    masked = Batch(
        tokens=tokens, position_ids=torch.arange(4).expand(2, 4), segment_ids=torch.arange(2)[:, None].expand(2, 4),
        action_mask=hidden, weights=hidden.float(), denominator=1.0,
        context=EncoderContext(tokens, mask, torch.arange(2)),
    )  # fmt: skip
    own.model.eval()
    found = own.logprobs(masked).logprobs
    logits = own.model(input_ids=tokens, attention_mask=mask.long()).logits
    expected = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0] * hidden
    torch.testing.assert_close(found, expected)


def add_adapter(own: Policy, *, head: bool, trained: bool = True) -> None:
    """LoRA on all linear layers, and on the head if asked; trained: it changes what the model says."""
    from peft import LoraConfig, get_peft_model

    names = {n.split(".")[-1] for n, m in own.model.named_modules() if type(m).__name__ in ("Linear", "Conv1D")}
    output = next(n for n, m in own.model.named_modules() if m is own.model.get_output_embeddings())
    targets = sorted(names - {output} | ({output} if head else set()))
    options = {"fan_in_fan_out": own.config.model_type == "gpt2"}
    with warnings.catch_warnings():  # PEFT's, of tied heads, of GPT-2's two kinds of layers, and of an older name
        warnings.simplefilter("ignore")
        own.model = get_peft_model(own.model, LoraConfig(r=2, target_modules=targets, **options)).double()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in own.model.named_parameters():
            if "lora_B" in name and trained:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
