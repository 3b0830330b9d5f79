"""What makes a Transformers model cheaper without changing what it computes: attention over rows whose tokens stand
once, the log-probabilities of chosen tokens, and GELU in one kernel."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.activations import NewGELUActivation
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "operant_rows"
CHUNK = 2**18  # elements of logits worked on at once: they stay in the processor's cache


@dataclass(slots=True)
class RowLayout:
    """N tokens that stand in one row, and the (B, S) rows in which they attend.

    source: int64[N], the flat place in (B, S) of each token. expand: int64[B, S], the token at each place (any where
    there is none): a prompt that several rows share stands in `source` once and in `expand` several times.
    inner: the model's own attention implementation. calls: how many layers attended.
    """

    source: Tensor
    expand: Tensor
    inner: str
    calls: int = 0


_layout: ContextVar[RowLayout | None] = ContextVar("operant_layout", default=None)


@contextlib.contextmanager
def attending_in_rows(config: Any, layout: RowLayout) -> Iterator[RowLayout]:
    """Inside, models with this config attend by `layout`: causally in each of its rows."""
    token = _layout.set(layout)
    config._attn_implementation = NAME
    try:
        yield layout
    finally:
        config._attn_implementation = layout.inner
        _layout.reset(token)


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention for (1, heads, N, D) by the current layout; the output is (1, N, heads, D)."""
    layout = _layout.get()
    if layout is None:
        raise RuntimeError("a model is learned from in one thread and used in another; give each its own")
    layout.calls += 1
    rows, width = layout.expand.shape
    flat = layout.expand.reshape(-1)

    def expanded(states: Tensor) -> Tensor:
        return states[0].transpose(0, 1).index_select(0, flat).unflatten(0, (rows, width)).transpose(1, 2)

    # padding stands behind the tokens that count, so causality alone keeps it out
    mask = None
    if layout.inner == "eager":
        low = torch.finfo(query.dtype).min
        mask = torch.full((1, 1, width, width), low, dtype=query.dtype, device=query.device).triu(1)
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(layout.inner, eager)
    output = attend(module, expanded(query), expanded(key), expanded(value), mask, **kwargs)[0]
    return output.flatten(0, 1).index_select(0, layout.source)[None], None


AttentionInterface.register(NAME, _attend)


class PickedLogprobs(torch.autograd.Function):
    """log softmax(logits)[token] for each row, and the entropy of the rows (zero unless asked; it has no gradient).

    logits: float[K, V]. tokens: int64[K]. Keeps the logits alone for the backward pass, where plain autograd keeps two
    more tensors of the vocabulary's size; differentiable twice.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor, entropy: bool) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(logits, tokens)
        picked, spread = logits.new_zeros(len(tokens)), logits.new_zeros(len(tokens))
        for part in _parts(logits):
            logprobs = torch.log_softmax(logits[part], -1)
            picked[part] = logprobs.gather(-1, tokens[part, None])[:, 0]
            if entropy:
                spread[part] = -torch.linalg.vecdot(logprobs.exp(), logprobs)
        ctx.mark_non_differentiable(spread)
        return picked, spread

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        logits, tokens = ctx.saved_tensors
        grad = gradients[0]
        if torch.is_grad_enabled():  # a second derivative is wanted
            softmax = torch.softmax(logits, -1)
            return torch.scatter_add(-softmax * grad[:, None], -1, tokens[:, None], grad[:, None]), None, None
        out = torch.empty_like(logits)
        for part in _parts(logits):
            torch.softmax(logits[part], -1, out=out[part]).mul_(-grad[part, None])
        return out.scatter_add_(-1, tokens[:, None], grad[:, None]), None, None


def _parts(logits: Tensor) -> list[slice]:
    rows = max(1, CHUNK // logits.shape[-1]) if logits.device.type == "cpu" else max(1, len(logits))
    return [slice(at, at + rows) for at in range(0, len(logits), rows)]


def one_kernel_gelu(model: Any) -> Any:
    """Replace GPT-2's and T5's GELU, eight passes over memory, by torch's tanh approximation: the same formula
    (Hendrycks & Gimpel 2016) in one. Changed in place; weights and configuration stay as they are."""
    for module in model.modules():
        for name, child in module.named_children():
            if type(child) is NewGELUActivation:
                setattr(module, name, nn.GELU(approximate="tanh"))
    return model
