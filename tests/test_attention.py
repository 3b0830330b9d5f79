"""Cheaper attention, log-probabilities and GELU are still what they stand for."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers.activations import ACT2FN

from operant.data.batch import from_sequences
from operant.data.text import Codec
from operant.models import attention
from operant.models.attention import PickedLogprobs, Picks, TakeRows
from operant.models.policy import Policy

PROMPTS = [np.array([5, 6, 7]), np.array([9, 4])]


@pytest.mark.parametrize("chunk", [8, 2**18])
def test_picked_logprobs_have_the_values_and_both_derivatives_of_log_softmax(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "CHUNK", chunk)
    torch.manual_seed(0)
    logits = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    tokens = torch.tensor([0, 6, 3, 3, 1])
    picked, entropy = PickedLogprobs.apply(logits, tokens, True)
    table = torch.log_softmax(logits, -1)
    assert torch.allclose(picked, table[torch.arange(5), tokens])
    assert torch.allclose(entropy, -(table.exp() * table).sum(-1))
    assert not PickedLogprobs.apply(logits, tokens, False)[1].any()
    weights = torch.randn(5, dtype=torch.float64)
    expected = torch.autograd.grad((table[torch.arange(5), tokens] * weights).sum(), logits)[0]
    assert torch.allclose(torch.autograd.grad((picked * weights).sum(), logits)[0], expected)
    assert torch.autograd.gradgradcheck(lambda x: PickedLogprobs.apply(x, tokens, False)[0], [logits])


@pytest.mark.parametrize(
    ("index", "filling"),
    [
        ([2, 0, 2, 4, 2, 0], []),
        ([0, 1, 0, 2, 1, 0], []),
        ([3, 1, 0, 2, 4], []),
        ([1, 1, 1], []),
        ([2, 0, 0, 1, 0], [1, 4]),
        ([], []),
        ([0], []),
    ],
)
def test_picked_rows_have_the_values_and_both_derivatives_of_indexing(index: list[int], filling: list[int]) -> None:
    torch.manual_seed(0)
    rows = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    real = torch.tensor([i not in filling for i in range(len(index))], dtype=torch.bool)
    picks = Picks(torch.tensor(index, dtype=torch.long), 5, real if filling else None)
    assert torch.equal(picks.take(rows), rows[index]) and torch.equal(TakeRows.apply(rows, picks), rows[index])
    weights = torch.randn(len(index), 2, 3, dtype=torch.float64) * real[:, None, None]
    given, expected = (
        torch.autograd.grad((r * weights).sum(), rows)[0] for r in (TakeRows.apply(rows, picks), rows[index])
    )
    assert torch.allclose(given, expected)
    if index:
        weigh = real[:, None, None].double()
        assert torch.autograd.gradgradcheck(lambda x: (TakeRows.apply(x, picks) * weigh).sin(), [rows])


def test_a_model_whose_attention_cannot_be_laid_out_is_computed_row_by_row(
    make_policy: Callable[..., Policy], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy("gpt2")
    answers = [np.array([4, 5, 6, 8]), np.array([7, 5]), np.array([9])]
    batch = from_sequences([PROMPTS[i] for i in (0, 0, 1)], answers, encoder=False, pad_id=policy.codec.pad_id)
    expected = policy.logprobs(batch).logprobs
    layers = policy._decoder_layers()
    monkeypatch.setattr(policy, "_decoder_layers", lambda: layers + 1)  # one layer that never asked for the rows
    sizes: list[tuple[int, ...]] = []
    policy.model.register_forward_hook(lambda m, a, k, o: sizes.append(tuple(k["input_ids"].shape)), with_kwargs=True)
    for _ in range(2):
        assert torch.allclose(policy.logprobs(batch).logprobs, expected, atol=1e-5)
    assert sizes[1:] == [(3, 7), (3, 7)]  # seen once, remembered
    assert policy.model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("arch", ["gpt2", "t5"])
def test_gelu_in_one_kernel_is_the_same_function(arch: str, codec: Codec) -> None:
    policy = Policy.new(arch, "tiny", codec, device="cpu")
    kernels = [m for m in policy.model.modules() if isinstance(m, torch.nn.GELU)]
    assert kernels
    x = torch.linspace(-6, 6, 999)
    assert torch.allclose(kernels[0](x), ACT2FN["gelu_new"](x), atol=1e-6)
