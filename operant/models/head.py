"""What a model says of the next token, where tokens × vocabulary is more than memory should hold at once.

The last hidden states of a micro-batch are small, and each token's logits are a function of its own state. So what is
wanted of the logits (a log-probability, an entropy, a divergence) is computed chunk by chunk, forward and backward.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import BaseModelOutput, ModelOutput

WHOLE = 2**26  # logits that may be there at once, 256 MB in float32: a vocabulary of 4,096 for 16,384 tokens
CHUNK = 2**25  # logits of one chunk, where there are more

# (logits float[k, V] of one or several distributions, which of the K tokens they are of) → columns float[k], each of
# which depends on its own row alone
RowFunction = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Distributions:
    """The next-token distributions of K tokens: their logits, or the hidden states from which to compute them.

    logits: float[K, V], or None. states: float[K, D], with `tail`: float[k, D] → logits float[k, V] of the rows in a
    slice. frozen: whether no weight of the tail is learned. width: V, where there are states.
    """

    logits: Tensor | None = None
    states: Tensor | None = None
    tail: Callable[[Tensor, slice], Tensor] = field(default=lambda states, part: states)
    frozen: bool = True
    width: int = 0

    @property
    def rows(self) -> Tensor:
        """The logits float[K, V], or the states float[K, D] that stand in for them."""
        rows = self.logits if self.states is None else self.states
        assert rows is not None
        return rows

    @property
    def chunks(self) -> list[slice]:
        """The K tokens in pieces of at most CHUNK logits; one where the logits are there already."""
        count = len(self.rows)
        size = max(1, count if self.states is None else CHUNK // self.width)
        return [slice(at, at + size) for at in range(0, count, size)] or [slice(0, 0)]

    def at_temperature(self, temperatures: Tensor | None) -> Distributions:
        """The same at temperatures float[K, 1], by which the logits are divided; None for 1."""
        if temperatures is None:
            return self
        if self.logits is not None:
            return Distributions(self.logits / temperatures)
        return dataclasses.replace(self, tail=lambda rows, part: self.tail(rows, part) / temperatures[part])

    def logits_of(self, rows: Tensor, part: slice) -> Tensor:
        """Logits float[k, V] of rows `part`; rows: these rows of `self.rows`."""
        return rows if self.states is None else self.tail(rows, part)


def of_rows(function: RowFunction, *distributions: Distributions) -> tuple[Tensor, ...]:
    """`function` of the logits of every token, float[K] each, computed in chunks where the logits are not at hand.

    The gradient flows into the first of the distributions; the others, references, have none. A chunk is computed anew
    for it; but where no weight of the head is learned, each row's gradient is taken at once, which costs nothing more.
    """
    first = distributions[0]
    chunks = next((d.chunks for d in distributions if d.states is not None), first.chunks)
    others = distributions[1:]

    def compute(rows: Tensor, part: slice) -> tuple[Tensor, ...]:
        logits = [other.logits_of(other.rows[part], part) for other in others]
        return function(first.logits_of(rows, part), *logits, part)

    if len(chunks) == 1:
        return compute(first.rows, chunks[0])
    learns = torch.is_grad_enabled() and (first.rows.requires_grad or not first.frozen)
    pieces = []
    sizes = [len(range(*part.indices(len(first.rows)))) for part in chunks]
    for rows, part in zip(first.rows.split(sizes), chunks, strict=True):
        if not learns:
            pieces.append(compute(rows, part))
        elif first.frozen:
            pieces.append(_RowGradients.apply(rows, compute, part))
        else:
            pieces.append(checkpoint(compute, rows, part, use_reentrant=False, preserve_rng_state=False))
    return tuple(torch.cat(column) for column in zip(*pieces, strict=True))


class _RowGradients(torch.autograd.Function):
    """compute(rows, part), whose columns depend on one row each: so the gradient of a column's sum holds every row's
    own, and the backward pass scales it. It is taken while the chunk's logits are still there."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, compute: Callable[[Tensor, slice], tuple[Tensor, ...]], part: slice
    ) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            leaf = rows.detach().requires_grad_()
            columns = compute(leaf, part)
            learned = [column for column in columns if column.requires_grad]
            gradients = [
                torch.autograd.grad(column.sum(), leaf, retain_graph=column is not learned[-1]) for column in learned
            ]
        ctx.save_for_backward(*(gradient for (gradient,) in gradients))
        ctx.places = [i for i, column in enumerate(columns) if column.requires_grad]
        out = tuple(column.detach() for column in columns)
        ctx.mark_non_differentiable(*(out[i] for i in range(len(out)) if i not in ctx.places))
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        total: Tensor | None = None
        for place, own in zip(ctx.places, ctx.saved_tensors, strict=True):
            scaled = own * grads[place][:, None].to(own.dtype)
            total = scaled if total is None else total.add_(scaled)
        return total, None, None


class Tail:
    """What a Transformers language model does from its decoder's last hidden states on: the head, and whatever scales,
    shifts or caps the logits before and after it.

    It is the model's own `forward`, in which the decoder gives the states that it is told to.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.decoder = model, model.get_decoder()
        self.frozen = not any(p.requires_grad for p in self._learned())
        self._output: type[ModelOutput] | None = None

    def _learned(self) -> Iterator[nn.Parameter]:
        """The weights outside the decoder and the encoder, and a head that shares one of theirs."""
        head = self.model.get_output_embeddings()
        yield from head.parameters() if head is not None else ()
        inside = {id(p) for p in self.decoder.parameters()}
        if self.model.config.is_encoder_decoder:
            inside |= {id(p) for p in self.model.get_encoder().parameters()}
        yield from (p for p in self.model.parameters() if id(p) not in inside)

    def states_at(self, pick: Callable[[Tensor], Tensor], forward: Callable[[], Any]) -> tuple[Tensor, Tensor] | None:
        """(hidden states float[K, D] that `pick` takes from a pass of the decoder, the model's own logits float[n, V]
        of the first few); None where the decoder was not called once, or gave something else."""
        taken: list[Tensor] = []

        def take(module: Any, arguments: Any, output: Any) -> Any:
            states = getattr(output, "last_hidden_state", None)
            if not isinstance(output, ModelOutput) or states is None:
                taken.clear()
                return None
            self._output = type(output)
            taken.append(pick(states))
            return self._output(last_hidden_state=taken[-1][None, :4])

        handle = self.decoder.register_forward_hook(take)
        try:
            logits = forward().logits
        finally:
            handle.remove()
        return (taken[0], logits[0]) if len(taken) == 1 else None

    def __call__(self, states: Tensor) -> Tensor:
        """Logits float[k, V] of states float[k, D]."""
        assert self._output is not None
        given, count = self._output(last_hidden_state=states[None]), len(states)
        ids = torch.zeros(1, count, dtype=torch.long, device=states.device)
        arguments: dict[str, Any] = {"input_ids": ids}
        if self.model.config.is_encoder_decoder:
            read = BaseModelOutput(last_hidden_state=states[None, :1])
            arguments = {"decoder_input_ids": ids, "encoder_outputs": read}
        with _answering(self.decoder, given):
            return self.model(**arguments, use_cache=False).logits[0]


@contextlib.contextmanager
def _answering(module: Any, output: Any) -> Iterator[None]:
    """Inside, the module's forward pass is this output."""
    module.forward = lambda *arguments, **named: output
    try:
        yield
    finally:
        del module.forward
