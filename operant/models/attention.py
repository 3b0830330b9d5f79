"""What makes a Transformers model cheaper without changing what it computes: attention over rows whose tokens stand
once, the log-probabilities of chosen tokens, and GELU in one kernel; all with the same bits every time."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.activations import NewGELUActivation
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "operant_rows"
CHUNK = 2**18  # elements of logits worked on at once: they stay in the processor's cache


@dataclass(frozen=True)
class Picks:
    """Which of `count` rows are taken, one or several times: `take` picks them, and its gradient goes the way back.

    index: int64[K]. real: bool[K] or None, False where a pick is filling whose gradient is zero.

    The gradient of a row is the sum over its picks. On a CPU autograd's own way adds them in one order, and is a few
    percent faster. On CUDA it adds them with atomic operations, in an order that differs from run to run; made to keep
    one order, it sorts all K rows anew for each layer. There the way back is found once, from the indices, and
    followed by gathering alone.
    """

    index: Tensor
    count: int
    real: Tensor | None = None

    def take(self, rows: Tensor) -> Tensor:
        """rows: float[count, …]. Returns float[K, …]; differentiable twice."""
        return TakeRows.apply(rows, self) if rows.device.type == "cuda" else rows.index_select(0, self.index)

    @cached_property
    def back(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor, bool]:
        """first int64[count]: each row's first pick, any where `absent` bool[count] says there is none (None: all have
        one). several int64[M]: the rows that are taken several times. again int64[M, G]: their later picks, with
        `spare` bool[M, G] where there are fewer. And whether these rows are the first M of all."""
        picks = torch.arange(len(self.index), device=self.index.device)
        if self.real is not None:
            picks = picks[self.real]
        taken = self.index[picks]
        order = picks[torch.argsort(taken, stable=True)]
        counts = torch.bincount(taken, minlength=self.count)
        starts = counts.cumsum(0) - counts
        absent = counts == 0
        first = order[starts.clamp(max=len(order) - 1)]
        several = (counts > 1).nonzero()[:, 0]
        more = counts[several]
        step = torch.arange(1, max(1, int(counts.max())), device=order.device)[None]
        spare = step >= more[:, None]
        again = order[(starts[several][:, None] + step).clamp(max=len(order) - 1)]
        leading = bool((several == torch.arange(len(several), device=order.device)).all())
        return first, absent if bool(absent.any()) else None, several, again, spare, leading


class TakeRows(torch.autograd.Function):
    """`rows[picks.index]`, float[count, …] → float[K, …], with a gradient that is gathered."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, picks: Picks) -> Tensor:
        ctx.picks = picks
        return rows.index_select(0, picks.index)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        grad, picks = gradients[0].flatten(1), ctx.picks
        if not len(grad):
            return gradients[0].new_zeros(picks.count, *gradients[0].shape[1:]), None
        first, absent, several, again, spare, leading = picks.back
        out = grad.index_select(0, first)
        if absent is not None:
            out = out.masked_fill(absent[:, None], 0.0)
        if again.numel():
            later = grad.index_select(0, again.reshape(-1)).unflatten(0, again.shape)
            later = later.masked_fill(spare[..., None], 0.0).sum(1)
            if leading:
                out[: len(several)] += later
            else:
                out = out.index_add(0, several, later)
        return out.unflatten(1, gradients[0].shape[1:]), None


@dataclass(slots=True)
class RowLayout:
    """N tokens that stand in one row, and the (B, S) rows in which they attend.

    expand: for each of the B·S places the token there (any where there is none): a prompt that several rows share
    stands among the N once and in the rows several times. source: for each of the N tokens its place.
    inner: the model's own attention implementation. calls: how many layers attended.
    """

    expand: Picks
    source: Picks
    width: int
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
    width = layout.width

    def expanded(states: Tensor) -> Tensor:
        return layout.expand.take(states[0].transpose(0, 1)).unflatten(0, (-1, width)).transpose(1, 2)

    # padding stands behind the tokens that count, so causality alone keeps it out
    mask = None
    if layout.inner == "eager":
        low = torch.finfo(query.dtype).min
        mask = torch.full((1, 1, width, width), low, dtype=query.dtype, device=query.device).triu(1)
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(layout.inner, eager)
    output = attend(module, expanded(query), expanded(key), expanded(value), mask, **kwargs)[0]
    return layout.source.take(output.flatten(0, 1))[None], None


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
        for part in _row_chunks(logits):
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
        for part in _row_chunks(logits):
            torch.softmax(logits[part], -1, out=out[part]).mul_(-grad[part, None])
        return out.scatter_add_(-1, tokens[:, None], grad[:, None]), None, None


def _row_chunks(logits: Tensor) -> list[slice]:
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
