"""Reading and decoding one row at a time, for models whose layers keep states that rows of different lengths cannot
share: recurrent and convolutional layers, caches of their own form, or none.

Every row is what the model itself computes: no padding, no mask, and the cache that the model makes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from operant.types import Batch, EncoderContext

__all__ = ["Row", "RowStates", "extend", "forward", "parts"]

CACHES = ("past_key_values", "cache_params", "state")  # as models name what they remember: most, Mamba, RWKV


@dataclass(slots=True)
class Row:
    """What is known of one row that is being decoded.

    prompt: int64[1, P], what an encoder reads; None for a decoder. tokens: int64[1, L], what the decoder has read.
    memory: what the model remembers of it, by the name of the argument; empty to read the tokens again.
    """

    prompt: Tensor | None
    tokens: Tensor
    memory: dict[str, Any] = field(default_factory=dict)


class RowStates:
    """The states of B rows, each its own. The `State` of a model that decodes row by row."""

    def __init__(self, rows: list[Row]) -> None:
        self.each = rows

    @property
    def rows(self) -> int:
        return len(self.each)

    @property
    def device(self) -> torch.device:
        return self.each[0].tokens.device

    def select(self, index: Tensor) -> RowStates:
        """Rows `index` (int64[K], repeats allowed); a repeated one gets a memory of its own."""
        taken: set[int] = set()
        rows = []
        for i in index.tolist():
            rows.append(copy.deepcopy(self.each[i]) if i in taken else self.each[i])
            taken.add(i)
        return RowStates(rows)

    def keep(self, index: list[int]) -> list[int]:
        """Keep rows `index`, in this order, which is returned."""
        self.each = [self.each[i] for i in index]
        return index

    def join(self, other: RowStates) -> RowStates:
        """The rows of both."""
        return RowStates(self.each + other.each)


def extend(model: Any, row: Row, tokens: Tensor, *, cached: bool) -> Tensor:
    """Let a Transformers model read int64[1, T] more tokens of a row; the next logits, float[V].

    cached: the model remembers what it has read; otherwise it reads the row again from its beginning.
    """
    row.tokens = torch.cat([row.tokens, tokens], 1)
    given = tokens if cached else row.tokens
    arguments: dict[str, Any] = {"input_ids": given}
    if row.prompt is not None:
        arguments = {"input_ids": row.prompt, "decoder_input_ids": given}
    output = model(**arguments, **(row.memory if cached else {}), use_cache=cached)
    if cached:
        row.memory = {name: found for name in CACHES if (found := getattr(output, name, None)) is not None}
        encoded = getattr(output, "encoder_last_hidden_state", None)
        if encoded is not None:
            row.memory["encoder_outputs"] = BaseModelOutput(last_hidden_state=encoded)
        if not row.memory:
            raise ValueError("it gives nothing back that it remembers")
    return output.logits[0, -1]


def forward(model: Any, batch: Batch, start: int) -> Any:
    """The output of a Transformers model over one row without padding, from `parts`.

    start: the token that an encoder-decoder's texts begin with.
    """
    if batch.context is None:
        return model(input_ids=batch.tokens, use_cache=False)
    begun = torch.full_like(batch.tokens[:, :1], start)
    return model(
        input_ids=batch.context.tokens, decoder_input_ids=torch.cat([begun, batch.tokens[:, :-1]], 1), use_cache=False
    )


def parts(batch: Batch, rows: Tensor, columns: Tensor) -> Iterator[tuple[Batch, Tensor]]:
    """Each segment of a batch as a batch of its own, and the places in it, int64[k], that predict those of the tokens
    (rows int64[K], columns int64[K]) that are its own; in the order of these.

    Segments without such a token are left out, but for the first where there is none at all.
    """
    asked = batch.segment_ids[rows, columns].tolist()
    runs: list[tuple[int, int]] = []
    for place, segment in enumerate(asked):
        if place and segment == asked[place - 1] and rows[place] == rows[place - 1]:
            runs[-1] = (runs[-1][0], place + 1)
        else:
            runs.append((place, place + 1))
    for first, last in runs or [(0, 0)]:
        row = int(rows[first]) if last else 0
        segment = asked[first] if last else int(batch.segment_ids[row, 0])
        own = (batch.segment_ids[row] == segment).nonzero()[:, 0]
        begin, end = int(own[0]), int(own[-1]) + 1
        ahead = 0 if batch.context is not None else 1
        yield _cut(batch, row, begin, end), (columns[first:last] - begin - ahead).clamp(min=0)


def _cut(batch: Batch, row: int, begin: int, end: int) -> Batch:
    where = slice(row, row + 1), slice(begin, end)
    return Batch(
        tokens=batch.tokens[where], position_ids=batch.position_ids[where], segment_ids=batch.segment_ids[where],
        action_mask=batch.action_mask[where], weights=batch.weights[where], denominator=batch.denominator,
        context=None if batch.context is None else _read_by(batch.context, row),
    )  # fmt: skip


def _read_by(context: EncoderContext, row: int) -> EncoderContext:
    """What one row's encoder reads, without padding."""
    source = context.row[row]
    real = context.mask[source]
    return EncoderContext(
        tokens=context.tokens[source][real][None], mask=real[real][None], row=torch.zeros_like(context.row[:1])
    )
