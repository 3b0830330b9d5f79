"""A critic: the value of every prefix, by a linear head on the policy's own hidden states or on a trunk of its own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from operant.types import Batch, OperantError

FILE = "critic.safetensors"


class Critic(nn.Module):
    """V(s) = w·h(s) + b on the last hidden state h of a language model, for decoder-only and encoder-decoder models.

    separate: h comes from a copy of the policy's model that learns for itself (Ouyang et al. 2022), so that the value
    loss does not move the policy; otherwise from the policy's model, which costs no memory and shares what is learned.
    The head begins at zero: until it has learned, no prefix is thought better than another.
    """

    def __init__(self, model: Any, *, separate: bool = True) -> None:
        super().__init__()
        self.trunk = copy.deepcopy(model) if separate else None
        if self.trunk is not None:
            output = self.trunk.get_output_embeddings()
            if output is not None and output.weight is not self.trunk.get_input_embeddings().weight:
                output.requires_grad_(False)  # no value depends on it
        weight = model.get_input_embeddings().weight
        width = int(getattr(model.config, "hidden_size", weight.shape[1]))
        self.head = nn.Linear(width, 1, device=weight.device, dtype=weight.dtype)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.eval()

    @property
    def separate(self) -> bool:
        return self.trunk is not None

    def forward(self, model: Any, batch: Batch, start: int, positions: bool) -> Tensor:
        """Values float[B, S + 1] of rows with one segment each; see `Policy.values`.

        model: the policy's, whose trunk is read where the critic has none of its own. start: the id that a decoder
        beside an encoder begins with. positions: whether the model takes `position_ids`.
        """
        model = model if self.trunk is None else self.trunk
        base = model.get_base_model() if hasattr(model, "peft_config") else model
        real = (batch.segment_ids >= 0).long()
        if batch.context is not None:
            context = batch.context
            encoded = base.get_encoder()(input_ids=context.tokens, attention_mask=context.mask.long())
            hidden = base.get_decoder()(
                input_ids=torch.nn.functional.pad(batch.tokens, (1, 0), value=start),
                attention_mask=torch.nn.functional.pad(real, (1, 0), value=1),
                encoder_hidden_states=encoded.last_hidden_state[context.row],
                encoder_attention_mask=context.mask[context.row].long(),
                use_cache=False,
            ).last_hidden_state
        else:
            arguments = {"position_ids": batch.position_ids} if positions else {}
            hidden = base.get_decoder()(
                input_ids=batch.tokens, attention_mask=real, use_cache=False, **arguments
            ).last_hidden_state
        values = self.head(hidden.to(self.head.weight.dtype))[..., 0]
        return values if batch.context is not None else torch.nn.functional.pad(values, (1, 0))

    @torch.no_grad()
    def begin_at(self, value: float) -> None:
        """Let V begin at a value everywhere, such as the mean return, unless something was learned."""
        if not bool(self.head.weight.any()):
            self.head.bias.fill_(value)

    def learned(self) -> dict[str, nn.Parameter]:
        """The weights that learn, by name; tied ones once."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def save(self, folder: Path) -> None:
        """Write the weights into a file of their own beside the model's, which loads without them."""
        save_file({name: p.detach().cpu().contiguous() for name, p in self.learned().items()}, folder / FILE)

    def fits(self, folder: Path) -> bool:
        """Whether a folder holds a critic of this shape."""
        if not (folder / FILE).exists():
            return False
        with safe_open(folder / FILE, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        return shapes == {name: tuple(p.shape) for name, p in self.learned().items()}

    def restore(self, folder: Path) -> None:
        """Put saved weights in place. Raises OperantError when the folder has none, or of another shape."""
        if not (folder / FILE).exists():
            raise OperantError(
                f"{folder} has no critic ({FILE}); start anew, or go on with the algorithm that it was trained with"
            )
        saved = load_file(folder / FILE)
        mine = self.learned()
        if {name: t.shape for name, t in saved.items()} != {name: p.shape for name, p in mine.items()}:
            raise OperantError(f"the critic in {folder} has another shape; go on with the --critic it was trained with")
        with torch.no_grad():
            for name, parameter in mine.items():
                parameter.copy_(saved[name])
