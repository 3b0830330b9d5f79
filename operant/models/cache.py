"""Key-value caches whose rows join and leave while decoding goes on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol, Self

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, EncoderDecoderCache

GROWTH = 64  # columns added when a cache is full: appending in place beats concatenating at every token


class State(Protocol):
    """What a policy remembers of rows that are being decoded: `DecodeState`, or `alone.RowStates`.

    select: the rows of int64[R], in that order, as often as they are named. keep: of these rows, those that it keeps
    and their new order. join: with the rows of another behind its own.
    """

    @property
    def rows(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    def select(self, index: Tensor) -> Self: ...

    def keep(self, index: list[int]) -> list[int]: ...

    def join(self, other: Self) -> Self: ...


class GrowingLayer(DynamicLayer):
    """One layer's keys and values float[B, H, L, D], appended in place in a buffer that grows by blocks."""

    def __init__(self) -> None:
        super().__init__()
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        self.length = 0

    @classmethod
    def of(cls, keys: Tensor, values: Tensor) -> GrowingLayer:
        """A layer that holds these keys and values, float[B, H, L, D] each."""
        layer = cls()
        layer.dtype, layer.device, layer.is_initialized = keys.dtype, keys.device, True
        layer._keys, layer._values, layer.length = keys, values, keys.shape[2]
        layer._view()
        return layer

    def _view(self) -> None:
        assert self._keys is not None and self._values is not None
        self.keys, self.values = self._keys[:, :, : self.length], self._values[:, :, : self.length]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self._keys is None or self._values is None:
            self._keys, self._values = key_states, value_states
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            self.length = key_states.shape[2]
        else:
            needed = self.length + key_states.shape[2]
            if needed > self._keys.shape[2]:
                room = needed - self.length + GROWTH
                self._keys = torch.nn.functional.pad(self._keys[:, :, : self.length], (0, 0, 0, room))
                self._values = torch.nn.functional.pad(self._values[:, :, : self.length], (0, 0, 0, room))
            self._keys[:, :, self.length : needed] = key_states
            self._values[:, :, self.length : needed] = value_states
            self.length = needed
        self._view()
        return self.keys, self.values

    def keep(self, holes: Tensor, movers: Tensor, rows: int) -> None:
        """Put rows `movers` where rows `holes` were, int64[k] each, and end after `rows` rows, in place."""
        assert self._keys is not None and self._values is not None
        if len(holes):
            self.keys[holes], self.values[holes] = self.keys[movers], self.values[movers]
        self._keys, self._values = self._keys[:rows], self._values[:rows]
        self._view()

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0


def _growing_cache(layers: list[GrowingLayer] | None = None, count: int = 0) -> DynamicCache:
    cache = DynamicCache()
    cache.layers = layers if layers is not None else [GrowingLayer() for _ in range(count)]
    cache.layer_class_to_replicate = GrowingLayer
    return cache


def _layers(cache: Any) -> list[GrowingLayer]:
    return cache.layers


def _pad(tensor: Tensor, dim: int, left: int = 0, right: int = 0) -> Tensor:
    if left == 0 and right == 0:
        return tensor
    widths = [0, 0] * (tensor.dim() - dim - 1) + [left, right]
    return torch.nn.functional.pad(tensor, widths)


@dataclass
class DecodeState:
    """The cache of B rows at different lengths, left-padded to one length L.

    mask: bool[B, L], True on real tokens. positions: int64[B], the position of the next token.
    encoder_hidden / encoder_mask: (B, P, D) and bool[B, P] for encoder-decoders; their keys and values are cached too.
    """

    cache: DynamicCache
    mask: Tensor
    positions: Tensor
    cross: DynamicCache | None = None
    encoder_hidden: Tensor | None = None
    encoder_mask: Tensor | None = None
    _paired: EncoderDecoderCache | None = field(default=None, repr=False)

    @classmethod
    def empty(cls, rows: int, layers: int, device: torch.device, encoder_decoder: bool) -> DecodeState:
        return cls(
            cache=_growing_cache(count=layers),
            mask=torch.zeros(rows, 0, dtype=torch.bool, device=device),
            positions=torch.zeros(rows, dtype=torch.long, device=device),
            cross=_growing_cache(count=layers) if encoder_decoder else None,
        )

    @property
    def rows(self) -> int:
        return self.mask.shape[0]

    @property
    def device(self) -> torch.device:
        return self.mask.device

    def past_key_values(self) -> DynamicCache | EncoderDecoderCache:
        """The cache in the form that a Transformers model takes."""
        if self.cross is None:
            return self.cache
        if self._paired is None:
            self._paired = EncoderDecoderCache(self.cache, self.cross)
        return self._paired

    def select(self, index: Tensor) -> DecodeState:
        """Keep rows `index` (int64[K], repeats allowed), and drop the columns that are padding in all of them."""
        mask = self.mask[index]
        used = mask.any(0)
        first = int(used.to(torch.uint8).argmax()) if bool(used.any()) else mask.shape[1]
        layers = [
            GrowingLayer.of(layer.keys[index, :, first:], layer.values[index, :, first:])
            for layer in _layers(self.cache)
        ]
        cross = None
        encoder_mask = self.encoder_mask
        encoder_hidden = self.encoder_hidden
        if self.cross is not None and encoder_mask is not None and encoder_hidden is not None:
            encoder_mask = encoder_mask[index]
            width = int(encoder_mask.sum(1).max()) if encoder_mask.shape[0] else 0
            encoder_mask, encoder_hidden = encoder_mask[:, :width], encoder_hidden[index, :width]
            cross = _growing_cache(
                [
                    GrowingLayer.of(layer.keys[index, :, :width], layer.values[index, :, :width])
                    for layer in _layers(self.cross)
                ]
            )
        return DecodeState(
            _growing_cache(layers), mask[:, first:], self.positions[index], cross, encoder_hidden, encoder_mask
        )

    def keep(self, index: list[int]) -> list[int]:
        """Keep rows `index` (ascending, no repeats) in place; their new order. The last rows move into the holes, so
        that a row that ends costs one row's copy and not the whole cache's. Padding that all rows have is left until
        it is a quarter of the columns."""
        count, device = len(index), self.mask.device
        kept = set(index)
        gone = [i for i in range(count) if i not in kept]
        late = [i for i in index if i >= count]
        order = list(range(count))
        for hole, mover in zip(gone, late, strict=True):
            order[hole] = mover
        picked = torch.tensor(order, device=device)
        self.mask, self.positions = self.mask[picked], self.positions[picked]
        holes, movers = torch.tensor(gone, device=device), torch.tensor(late, device=device)
        for cache in (self.cache, self.cross):
            for layer in _layers(cache) if cache is not None else ():
                layer.keep(holes, movers, count)
        if self.encoder_hidden is not None and self.encoder_mask is not None:
            self.encoder_hidden, self.encoder_mask = self.encoder_hidden[picked], self.encoder_mask[picked]
        padding = self.mask.shape[1] - int(self.mask.sum(1).max())
        if padding > max(GROWTH // 4, self.mask.shape[1] // 4):
            shorter = self.select(torch.arange(count, device=device))
            self.cache, self.mask, self.cross, self._paired = shorter.cache, shorter.mask, shorter.cross, None
            self.encoder_hidden, self.encoder_mask = shorter.encoder_hidden, shorter.encoder_mask
        return order

    def join(self, other: DecodeState) -> DecodeState:
        """The rows of both, the shorter cache padded on the left."""
        length = max(self.mask.shape[1], other.mask.shape[1])
        pads = [length - self.mask.shape[1], length - other.mask.shape[1]]
        both = (self, other)

        def cat(parts: list[Tensor], dim: int, right: bool = False) -> Tensor:
            size = max(p.shape[dim] for p in parts)
            return torch.cat(
                [
                    _pad(p, dim, right=size - p.shape[dim]) if right else _pad(p, dim, left=size - p.shape[dim])
                    for p in parts
                ]
            )

        layers = [
            GrowingLayer.of(cat([a.keys, b.keys], 2), cat([a.values, b.values], 2))
            for a, b in zip(_layers(self.cache), _layers(other.cache), strict=True)
        ]
        mask = torch.cat([_pad(s.mask, 1, left=pad) for s, pad in zip(both, pads, strict=True)])
        positions = torch.cat([s.positions for s in both])
        cross = encoder_hidden = encoder_mask = None
        if self.cross is not None and other.cross is not None:
            assert self.encoder_hidden is not None and other.encoder_hidden is not None
            assert self.encoder_mask is not None and other.encoder_mask is not None
            cross = _growing_cache(
                [
                    GrowingLayer.of(cat([a.keys, b.keys], 2, right=True), cat([a.values, b.values], 2, right=True))
                    for a, b in zip(_layers(self.cross), _layers(other.cross), strict=True)
                ]
            )
            encoder_hidden = cat([self.encoder_hidden, other.encoder_hidden], 1, right=True)
            encoder_mask = cat([self.encoder_mask, other.encoder_mask], 1, right=True)
        return DecodeState(_growing_cache(layers), mask, positions, cross, encoder_hidden, encoder_mask)
