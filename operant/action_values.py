"""Action values: Q of every token at every prefix, from the language model's own last hidden states."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from operant.types import OperantError

FILE = "action_values.safetensors"


class ActionValues(nn.Module):
    """Two estimates of Q(s, ·), one that learns and one that lags behind (van Hasselt et al. 2016): heads on a frozen
    language model π_ref.

        Q(s, ·) = W₂ gelu(W₁ norm(h(s))),   π(a|s) ∝ π_ref(a|s) exp(Q(s, a) / β)

    The value of the state cancels in π, so this is π_ref reweighted by exp(advantage / β), the policy that a KL to
    π_ref of weight β makes best (Peters et al. 2010). The heads begin at zero: nothing is reweighted until something
    is learned.
    float[…, width] → float[…, V].
    """

    def __init__(self, width: int, vocabulary: int, beta: float, seed: int = 0) -> None:
        super().__init__()
        self.beta = beta
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.online = nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, vocabulary)
            )
        last = self.online[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self._apart = False

    @torch.no_grad()
    def sync(self) -> None:
        """Let the lagging estimate be the learning one."""
        self.target.load_state_dict(self.online.state_dict())

    def reweighted(self, hidden: Tensor, logits: Tensor) -> Tensor | None:
        """π_ref's logits plus Q / β, or None inside `apart`."""
        if self._apart:
            return None
        values = self.online(hidden.to(next(self.online.parameters()).dtype))
        return logits + (values / self.beta).to(logits.dtype)

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """Inside, the language model is π_ref."""
        before, self._apart = self._apart, True
        try:
            yield
        finally:
            self._apart = before

    def save(self, folder: Path) -> None:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        save_file(tensors, folder / FILE, metadata={"beta": repr(self.beta)})

    def restore(self, folder: Path) -> None:
        """Put saved values in place. Raises OperantError when the folder has none, or of another shape."""
        if not (folder / FILE).exists():
            raise OperantError(f"{folder} has no action values ({FILE}); go on with the algorithm it was trained with")
        saved = load_file(folder / FILE)
        if {name: t.shape for name, t in saved.items()} != {name: t.shape for name, t in self.state_dict().items()}:
            raise OperantError(f"the action values in {folder} are another model's; give the folder it was saved with")
        self.load_state_dict(saved)


def saved_beta(folder: Path) -> float | None:
    """β of the action values that were saved in a folder, or None when it holds none."""
    if not (folder / FILE).exists():
        return None
    with safe_open(folder / FILE, framework="pt") as file:
        return float((file.metadata() or {}).get("beta", "1.0"))
