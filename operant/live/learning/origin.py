"""The version that steps are pulled to, and what it says of the texts that it has read."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from operant.data.batch import select_rows
from operant.models.head import Distributions
from operant.models.policy import Policy
from operant.types import Batch

__all__ = ["Origin"]

KEPT = 512  # texts, the ones read last


class Origin:
    """A policy that does not learn. It reads each text once: its hidden states are kept, and are small.

    Each text is read alone, so that what is said of it does not hang on what it was read beside.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        policy.model.requires_grad_(False)
        self._read: dict[tuple[bytes, ...], Distributions] = {}

    @torch.no_grad()
    def acting(self, batch: Batch) -> Distributions:
        """The distributions of a batch's K action tokens, row by row, at their rows' temperatures."""
        rows = [self._of_row(batch, row) for row in range(len(batch.tokens))]
        known = [row for row in rows if row is not None and row.states is not None]
        if len(known) < len(rows):
            return self.policy.acting(batch)
        states = torch.cat([row.rows for row in known])
        return dataclasses.replace(known[0], states=states).at_temperature(self.policy.temperatures(batch))

    def _of_row(self, batch: Batch, row: int) -> Distributions | None:
        alone = select_rows(batch, torch.tensor([row], device=batch.tokens.device))
        columns: list[Tensor] = [alone.tokens, alone.action_mask]
        if alone.context is not None:
            columns += [alone.context.tokens, alone.context.mask]
        key = tuple(column.cpu().numpy().tobytes() for column in columns)
        found = self._read.pop(key, None) or self.policy.split(alone)
        if found is not None:
            self._read[key] = found  # the newest last
            if len(self._read) > KEPT:
                del self._read[next(iter(self._read))]
        return found
