"""The blocks of a decoder below the first in which something learns: what they make of a text never changes.

An adapter on the upper blocks alone leaves the hidden states that come out of the lower ones as they are, under every
version of its weights. So these are computed once a text and kept, and a pass over the text begins above them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Stem", "blocks_of"]

KEPT = 2**26  # bytes of hidden states: 280 answers of 60 tokens with their prompts, of a model of width 576


class Stem:
    """The first `depth` blocks of a decoder. None of their weights may learn while this is in use.

    Each text is read alone, so that its states do not hang on what it was read beside, nor on what is kept already.
    """

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self._kept: dict[bytes, Tensor] = {}
        self._size = 0
        self._wrap: Callable[[Tensor], Any] = _plain

    @classmethod
    def of(cls, model: Any) -> Stem | None:
        """What lies below the first block that learns; None where that is nothing, or where a pass that begins above
        it gives other bits than a whole one."""
        depth = _still(model)
        stem = cls(depth) if depth else None
        return stem if stem is not None and stem._fits(model) else None

    @torch.no_grad()
    def states(self, model: Any, rows: Sequence[Tensor]) -> list[Tensor]:
        """What the last of these blocks says of each text, int64[T] → float[T, D], read alone from position 0 on."""
        return [self._of_text(model, row) for row in rows]

    def _of_text(self, model: Any, text: Tensor) -> Tensor:
        key = text.cpu().numpy().tobytes()
        found = self._kept.pop(key, None)
        if found is None:
            found = self._read(model, text)
            self._size += found.nbytes
        self._kept[key] = found  # the newest last
        while self._size > KEPT and len(self._kept) > 1:
            self._size -= self._kept.pop(next(iter(self._kept))).nbytes
        return found

    def _read(self, model: Any, text: Tensor) -> Tensor:
        taken: list[Tensor] = []

        def take(module: Any, arguments: Any, output: Any) -> None:
            self._wrap = _plain if isinstance(output, Tensor) else _alone
            taken.append(output if isinstance(output, Tensor) else output[0])
            raise _Enough

        blocks = blocks_of(model)
        assert blocks is not None
        handle = blocks[self.depth - 1].register_forward_hook(take)
        try:
            model(**_alone_in_a_row(text))
        except _Enough:
            pass
        finally:
            handle.remove()
        return taken[0][0]

    @contextlib.contextmanager
    def given(self, model: Any, states: Tensor) -> Iterator[None]:
        """Inside, the model's blocks below give these states, float[B, N, D], of whatever they are asked."""
        blocks = blocks_of(model)
        assert blocks is not None
        below = list(blocks[: self.depth])
        for block in below:
            block.forward = lambda *arguments, **named: self._wrap(states)
        try:
            yield
        finally:
            for block in below:
                del block.forward

    @torch.no_grad()
    def _fits(self, model: Any) -> bool:
        text = torch.arange(8, device=model.device)
        try:
            states = self._read(model, text)
            self._read(model, text + 1)  # so that nothing is left of this text that a later block might look at
            with self.given(model, states[None]):
                above = model(**_alone_in_a_row(text)).logits
        except (IndexError, TypeError, AttributeError, RuntimeError):
            return False
        return torch.equal(above, model(**_alone_in_a_row(text)).logits)


class _Enough(Exception):
    """A pass has come as far as it has to."""


def blocks_of(model: Any) -> nn.ModuleList | None:
    """The blocks of a decoder, in the order in which it calls them; None where they are no single list, and for a
    model that has an encoder too."""
    count = getattr(model.config, "num_hidden_layers", None)
    if model.config.is_encoder_decoder or not count:
        return None
    lists = [m for m in model.get_decoder().modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    return lists[0] if len(lists) == 1 else None


def _still(model: Any) -> int:
    """How many blocks from the first on have nothing that learns, and nothing that learns before them."""
    blocks = blocks_of(model)
    if blocks is None or any(p.requires_grad for p in model.get_input_embeddings().parameters()):
        return 0
    learns = [any(p.requires_grad for p in block.parameters()) for block in blocks]
    return learns.index(True) if any(learns) else 0


def _alone_in_a_row(text: Tensor) -> dict[str, Any]:
    positions = torch.arange(len(text), device=text.device)
    return {"input_ids": text[None], "position_ids": positions[None], "use_cache": False}


def _plain(states: Tensor) -> Any:
    return states


def _alone(states: Tensor) -> Any:
    return (states,)
