"""Action values: Q of every token at every prefix, from the language model's own last hidden states."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from operant.types import OperantError

FILE = "action_values.safetensors"


class ActionValues(nn.Module):
    """Two estimates of Q(s, ·), one that learns and one that lags behind (van Hasselt et al. 2016): heads on a frozen
    language model π_ref.

        (A(s, ·), V(s)) = W₂ gelu(W₁ norm(h(s)))
        Q(s, a) = V(s) + A(s, a) − Σ_{b∈S} π_ref(b|s) A(s, b) / Σ_{b∈S} π_ref(b|s),   a ∈ S(s); else V(s)
        π(a|s) ∝ π_ref(a|s) exp((Q(s, a) − V(s)) / β)

    The support S(s) holds the tokens with π_ref ≥ support · max π_ref. π is the policy that a
    KL to π_ref of weight β makes best (Peters et al. 2010). Advantages over a state's value (Wang et al. 2016, with
    π_ref's mean in place of the uniform one) matter here: what is paid for the tokens that were tried raises V, and a
    token that never was is worth as much as the average, neither nothing nor what the weights happen to say. The
    advantages begin at zero: nothing is reweighted until something is learned.
    A head maps float[…, width] → float[…, V + 1].
    """

    def __init__(self, width: int, vocabulary: int, beta: float, support: float = 0.05, seed: int = 0) -> None:
        super().__init__()
        self.beta, self.support = beta, support
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.online = nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, vocabulary + 1)
            )
        last = cast(nn.Linear, self.online[-1])
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self._apart = False

    @torch.no_grad()
    def sync(self) -> None:
        """Let the lagging estimate be the learning one."""
        self.target.load_state_dict(self.online.state_dict())

    @torch.no_grad()
    def begin_at(self, value: float) -> None:
        """Let V begin at a value everywhere, such as the mean return, unless something was learned: until the level is
        known, every token looks better (or worse) than the average."""
        if bool(cast(nn.Linear, self.online[-1]).weight.any()):
            return
        for head in (self.online, self.target):
            cast(nn.Linear, head[-1]).bias[-1] = value

    def reweighted(self, hidden: Tensor, logits: Tensor) -> Tensor | None:
        """π_ref's logits plus (Q − V) / β, or None inside `apart`."""
        if self._apart:
            return None
        advantages = self.online(hidden.to(next(self.online.parameters()).dtype))[..., :-1]
        return logits + (self._centred(advantages, logits) / self.beta).to(logits.dtype)

    def of(self, head: nn.Module, hidden: Tensor, logits: Tensor) -> Tensor:
        """Q(s, ·) float[K, V] by one of the heads, from float[K, width] and π_ref's logits float[K, V]."""
        advantages, state = head(hidden).split([logits.shape[-1], 1], -1)
        return state + self._centred(advantages, logits)

    def _centred(self, advantages: Tensor, logits: Tensor) -> Tensor:
        inside = supported(logits, self.support)
        weights = logits.to(advantages.dtype).masked_fill(~inside, -torch.inf).softmax(-1)
        return (advantages - (weights * advantages).sum(-1, keepdim=True)) * inside

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
        save_file(tensors, folder / FILE, metadata={"beta": repr(self.beta), "support": repr(self.support)})

    def restore(self, folder: Path) -> None:
        """Put saved values in place. Raises OperantError when the folder has none, or of another shape."""
        if not (folder / FILE).exists():
            raise OperantError(f"{folder} has no action values ({FILE}); go on with the algorithm it was trained with")
        saved = load_file(folder / FILE)
        if {name: t.shape for name, t in saved.items()} != {name: t.shape for name, t in self.state_dict().items()}:
            raise OperantError(f"the action values in {folder} are another model's; give the folder it was saved with")
        self.load_state_dict(saved)


def supported(logits: Tensor, share: float) -> Tensor:
    """Tokens that a behaviour could have said: probability ≥ share · the likeliest's, bool like logits float[…, V]
    (BCQ's discrete form, Fujimoto et al. 2019)."""
    return logits >= logits.amax(-1, keepdim=True) + math.log(max(share, 1e-38))


def saved_settings(folder: Path) -> tuple[float, float] | None:
    """(β, support) of the action values that were saved in a folder, or None when it holds none."""
    if not (folder / FILE).exists():
        return None
    with safe_open(folder / FILE, framework="pt") as file:
        told = file.metadata() or {}
        return float(told.get("beta", "1.0")), float(told.get("support", "0.05"))
