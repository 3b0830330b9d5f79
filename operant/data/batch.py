"""From documents, pairs and trajectories to a `Batch`: padding, packing, masks, weights and the one denominator."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from operant.types import Batch, Bools, Completion, Doubles, EncoderContext, Ints, Trajectory

SMALLEST_PIECE = 1024  # padded tokens: below, one more pass costs more than the padding that it saves

Normalisation = Literal["per_completion", "per_token", "per_sequence_mean", "constant"]


def token_weights(mask: Tensor, normalisation: Normalisation, constant: float = 1.0) -> tuple[Tensor, float]:
    """Weights float[B, S] and the denominator, from action mask bool[B, S] with one completion a row.

    per_completion: Σ_i Σ_t / N, the unbiased gradient of the expected return. per_token: Σ_i Σ_t / Σ_i |y_i| (DAPO,
    fine-tuning). per_sequence_mean: Σ_i (1/|y_i|) Σ_t / N (GRPO; short completions weigh more per token).
    constant: Σ_i Σ_t / (N · constant) (Dr. GRPO, with the length limit).
    """
    weights = mask.to(torch.float32)
    lengths = weights.sum(1)
    rows = float((lengths > 0).sum())
    if normalisation == "per_completion":
        return weights, max(rows, 1.0)
    if normalisation == "per_token":
        return weights, max(float(lengths.sum()), 1.0)
    if normalisation == "per_sequence_mean":
        return weights / lengths.clamp(min=1)[:, None], max(rows, 1.0)
    return weights, max(rows * constant, 1.0)


def right_padded(rows: Sequence[Ints], pad_id: int) -> tuple[Tensor, Tensor]:
    """Rows int64[S_b] side by side: (tokens int64[B, S], mask bool[B, S], True on a row's own tokens)."""
    width = max((len(row) for row in rows), default=0)
    tokens, mask = np.full((len(rows), width), pad_id, np.int64), np.zeros((len(rows), width), np.bool_)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], mask[i, : len(row)] = row, True
    return torch.from_numpy(tokens), torch.from_numpy(mask)


def distinct_prompts(prompts: Sequence[Ints]) -> tuple[list[int], list[Ints]]:
    """(which distinct prompt each row has, the distinct prompts int64[P] in order of appearance)."""
    seen: dict[bytes, int] = {}
    distinct: list[Ints] = []
    row = []
    for prompt in prompts:
        key = prompt.tobytes()
        if key not in seen:
            seen[key] = len(distinct)
            distinct.append(prompt)
        row.append(seen[key])
    return row, distinct


def encoder_context(prompts: Sequence[Ints], pad_id: int) -> EncoderContext:
    """Each distinct prompt int64[P] once. Rows point at theirs, so the update too encodes a group's prompt once."""
    row, distinct = distinct_prompts(prompts)
    return EncoderContext(*right_padded(distinct, pad_id), torch.tensor(row))


def from_sequences(
    prompts: Sequence[Ints],
    completions: Sequence[Ints],
    *,
    encoder: bool,
    pad_id: int,
    sampled: Sequence[np.ndarray] | None = None,
    normalisation: Normalisation = "per_token",
    constant: float = 1.0,
) -> Batch:
    """One segment a row, right-padded: prompt and completion for a decoder; with an `encoder` the completion alone, and
    the prompts as its context.

    prompts, completions: int64[P] and int64[T] each. sampled: bool[T] each, the tokens that act; None for all of them.
    `action_mask` is True on tokens that act. normalisation, constant: as in `token_weights`.
    """
    offsets = [0 if encoder else len(p) for p in prompts]
    rows = list(completions) if encoder else [np.concatenate(pair) for pair in zip(prompts, completions, strict=True)]
    tokens, real = right_padded(rows, pad_id)
    columns = torch.arange(tokens.shape[1])[None]
    action = real & (columns >= torch.tensor(offsets)[:, None])
    if sampled is not None:
        for i, flags in enumerate(sampled):
            action[i, offsets[i] : offsets[i] + len(flags)] &= torch.from_numpy(np.asarray(flags, np.bool_))
    if not encoder:
        action[:, :1] = False  # nothing predicts a decoder's first token
    weights, denominator = token_weights(action, normalisation, constant)
    rows_index = torch.arange(len(rows))[:, None].expand_as(tokens)
    return Batch(
        tokens=tokens,
        position_ids=columns.expand_as(tokens).clone(),
        segment_ids=torch.where(real, rows_index, -1),
        action_mask=action,
        weights=weights,
        denominator=denominator,
        context=encoder_context(prompts, pad_id) if encoder else None,
        prompt_ids=torch.tensor(distinct_prompts(prompts)[0]),
        prompt_lengths=torch.tensor(offsets),
    )


def pack(documents: Sequence[Ints], length: int, pad_id: int) -> Batch:
    """Documents, int64[T] with their EOS, into rows of `length` columns, each document its own segment.

    Attention stays inside it and positions start again, so packing changes no log-probability. A longer document is cut
    into pieces.
    """
    pieces = [doc[i : i + length] for doc in documents for i in range(0, len(doc), length)]
    rows: list[list[Ints]] = []
    space: list[int] = []
    for piece in pieces:
        target = next((r for r in range(max(0, len(rows) - 16), len(rows)) if space[r] >= len(piece)), None)
        if target is None:
            rows.append([])
            space.append(length)
            target = len(rows) - 1
        rows[target].append(piece)
        space[target] -= len(piece)
    tokens = np.full((len(rows), length), pad_id, np.int64)
    positions = np.zeros((len(rows), length), np.int64)
    segments = np.full((len(rows), length), -1, np.int64)
    action = np.zeros((len(rows), length), np.bool_)
    number = 0
    for r, row in enumerate(rows):
        at = 0
        for piece in row:
            end = at + len(piece)
            tokens[r, at:end], positions[r, at:end], segments[r, at:end] = piece, np.arange(len(piece)), number
            action[r, at + 1 : end] = True
            at, number = end, number + 1
    mask = torch.from_numpy(action)
    return Batch(
        tokens=torch.from_numpy(tokens),
        position_ids=torch.from_numpy(positions),
        segment_ids=torch.from_numpy(segments),
        action_mask=mask,
        weights=mask.to(torch.float32),
        denominator=max(float(mask.sum()), 1.0),
    )


def from_trajectories(
    trajectories: Sequence[Trajectory],
    *,
    encoder: bool,
    pad_id: int,
    normalisation: Normalisation = "per_completion",
    constant: float = 1.0,
) -> Batch:
    """A batch of completions with their rewards and behaviour log-probs placed on the tokens they belong to.

    Advantages come later, from `credit` (see `scatter`). A completion is one row, but each turn of an
    encoder-decoder's episode is one of its own; weights and denominator are of whole completions all the same.
    """
    pieces = [
        (t, start, end)
        for t in trajectories
        for start, end in ((encoder and t.completion.turns) or [(0, len(t.completion.tokens))])
    ]
    completions = [t.completion for t, _, _ in pieces]
    batch = from_sequences(
        [np.concatenate([t.prompt.tokens, t.completion.tokens[:start]]) for t, start, _ in pieces],
        [t.completion.tokens[start:end] for t, start, end in pieces],
        encoder=encoder,
        pad_id=pad_id,
        sampled=[
            np.ones(end - start, np.bool_) if t.completion.sampled is None else t.completion.sampled[start:end]
            for t, start, end in pieces
        ],
        normalisation=normalisation,
        constant=constant,
    )
    batch.kind = "completions"
    temperatures = [c.sampling.temperature if c.sampling else 1.0 for c in completions]
    batch.temperature = torch.tensor([x if x > 0 else 1.0 for x in temperatures])
    offsets = [0 if encoder else len(t.prompt.tokens) for t, _, _ in pieces]
    if len(pieces) > len(trajectories):
        weights, batch.denominator = token_weights(completion_axes(trajectories)[1], normalisation, constant)
        batch.weights = scatter(batch, weights, trajectories)

    def column(values: Sequence[np.ndarray], dtype: torch.dtype) -> Tensor:
        out = torch.zeros(batch.tokens.shape, dtype=dtype)
        for i, (row, (_, start, end)) in enumerate(zip(values, pieces)):
            own = torch.from_numpy(np.ascontiguousarray(row[start:end])).to(dtype)
            out[i, offsets[i] : offsets[i] + len(own)] = own
        return out

    if all(c.behavior_logprobs is not None for c in completions):
        batch.behavior_logprobs = column([c.behavior_logprobs for c in completions], torch.float32)  # type: ignore[misc]
    batch.rewards = column([t.rewards for t, _, _ in pieces], torch.float64)
    batch.observed = column([t.observed for t, _, _ in pieces], torch.bool)
    return batch


def group_numbers(trajectories: Sequence[Trajectory]) -> Tensor:
    """Which prompt each trajectory answers, int64[N], numbered in order of appearance."""
    numbers: dict[str, int] = {}
    return torch.tensor([numbers.setdefault(t.prompt.id, len(numbers)) for t in trajectories])


def drawn(completion: Completion) -> Ints:
    """Places of the tokens that the policy drew, int64[K]: the axis of `credit`. Others are context: they cost no
    discount and are not taught."""
    flags = completion.sampled
    return np.arange(len(completion.tokens)) if flags is None else np.flatnonzero(flags)


def drawn_rewards(trajectory: Trajectory) -> tuple[Doubles, Bools]:
    """(rewards float64[K], observed bool[K]) of the drawn tokens. What stands on a token that the environment wrote was
    earned by the drawn one before it, and is paid there; before the first one nothing was earned."""
    places, rewards = drawn(trajectory.completion), np.where(trajectory.observed, trajectory.rewards, 0.0)
    if len(places) == len(rewards):
        return rewards, trajectory.observed
    owner = np.searchsorted(places, np.arange(len(rewards)), side="right") - 1
    earned, own = np.zeros(len(places)), owner >= 0
    np.add.at(earned, owner[own], rewards[own])
    seen = np.ones(len(places), np.bool_)
    np.logical_and.at(seen, owner[own], trajectory.observed[own])
    return earned, seen


def turn_discounts(trajectories: Sequence[Trajectory], gamma: float, gamma_turn: float) -> float | Tensor:
    """The discount from each drawn token to the next: γ, and γ·γ_turn from a turn's last to the next turn's first.

    A turn ends where the environment's tokens stand between two drawn ones. Returns γ itself, or float64[N, T] on the
    axis of `completion_axes` where turns are discounted too.
    """
    if gamma_turn == 1.0:
        return gamma
    places = [drawn(t.completion) for t in trajectories]
    out = torch.full((len(places), max((len(p) for p in places), default=0)), gamma, dtype=torch.float64)
    for i, at in enumerate(places):
        ends = np.flatnonzero(np.diff(at) > 1)
        out[i, torch.from_numpy(ends)] *= gamma_turn
    return out


def completion_axes(trajectories: Sequence[Trajectory]) -> tuple[Tensor, Tensor, Tensor]:
    """(rewards float64[N, T], mask bool[N, T], valid bool[N]): the drawn tokens of each trajectory, for `credit`.

    valid: every reward that the row's returns depend on is there, and the completion can be trained on.
    """
    width = max((len(drawn(t.completion)) for t in trajectories), default=0)
    rewards = torch.zeros(len(trajectories), width, dtype=torch.float64)
    mask = torch.zeros(len(trajectories), width, dtype=torch.bool)
    valid = torch.zeros(len(trajectories), dtype=torch.bool)
    for i, t in enumerate(trajectories):
        earned, _ = drawn_rewards(t)
        n = len(earned)
        rewards[i, :n] = torch.from_numpy(earned)
        mask[i, :n] = True
        valid[i] = bool(t.observed.all()) and n > 0 and t.completion.trainable
    return rewards, mask, valid


def locate_tokens(batch: Batch, trajectories: Sequence[Trajectory]) -> list[tuple[Ints, Ints, tuple[int, int]]]:
    """Where the drawn tokens of each trajectory stand in its batch: rows int64[K], columns int64[K], and the (row,
    column) after its last token."""
    found, row = [], 0
    for t in trajectories:
        places, turns = drawn(t.completion), t.completion.turns
        if batch.context is not None and turns:
            starts = np.array([start for start, _ in turns])
            turn = np.searchsorted(starts, places, side="right") - 1
            last = row + len(turns) - 1
            found.append((row + turn, places - starts[turn], (last, turns[-1][1] - turns[-1][0])))
            row = last + 1
        else:
            start = 0 if batch.context is not None else len(t.prompt.tokens)
            found.append((np.full(len(places), row), start + places, (row, start + len(t.completion.tokens))))
            row += 1
    return found


def scatter(batch: Batch, values: Tensor, trajectories: Sequence[Trajectory]) -> Tensor:
    """Values [N, T] on the axis of `completion_axes` → float32[B, S] on the batch's columns."""
    out = torch.zeros(batch.tokens.shape, dtype=torch.float32)
    for row, (rows, columns, _) in zip(values, locate_tokens(batch, trajectories), strict=True):
        out[rows, columns] = row[: len(rows)].to(torch.float32)
    return out * batch.action_mask.cpu()


def gather(batch: Batch, values: Tensor, trajectories: Sequence[Trajectory]) -> Tensor:
    """Values [B, S] on the batch's columns → float64[N, T] on the axis of `completion_axes`: undoes `scatter`."""
    found = locate_tokens(batch, trajectories)
    out = torch.zeros(len(trajectories), max((len(rows) for rows, _, _ in found), default=0), dtype=torch.float64)
    for i, (rows, columns, _) in enumerate(found):
        out[i, : len(rows)] = values[rows, columns].double()
    return out


def select_rows(batch: Batch, rows: Tensor) -> Batch:
    """The rows int64[K] of a batch with one segment a row, padding columns dropped; the denominator stays."""
    width = int((batch.segment_ids[rows] >= 0).sum(1).max()) if len(rows) else 0
    fields: dict[str, object] = {}
    for f in dataclasses.fields(batch):
        value = getattr(batch, f.name)
        if isinstance(value, Tensor):
            fields[f.name] = value[rows, :width] if value.dim() == 2 else value[rows]
    picked = dataclasses.replace(batch, **fields)  # type: ignore[arg-type]
    own = torch.arange(len(rows), device=rows.device)[:, None].expand(-1, width)
    picked.segment_ids = torch.where(picked.segment_ids >= 0, own, -1)
    if batch.context is not None:
        used, index = batch.context.row[rows].unique(return_inverse=True)
        mask = batch.context.mask[used]
        longest = int(mask.sum(1).max())
        picked.context = EncoderContext(batch.context.tokens[used, :longest], mask[:, :longest], index)
    return picked


def microbatches(batch: Batch, max_tokens: int, *, by_length: bool = False) -> Iterator[Batch]:
    """Cut a batch into pieces of at most `max_tokens` padded tokens; with one segment a row, rows of like length
    together. The pieces keep the batch's denominator, so their gradients sum to the batch's.

    by_length: part an encoder-decoder's rows also where they grow longer by a quarter, in pieces of at least
    SMALLEST_PIECE tokens, since it computes its padding. A decoder's policy lays its tokens out without any. For losses
    that are sums over tokens, and need no two rows together.
    """
    if int((batch.segment_ids.max(1).values != batch.segment_ids[:, 0]).sum()):
        size = max(1, max_tokens // batch.tokens.shape[1])  # packed rows are full: any of them will do
        columns = ("tokens", "position_ids", "segment_ids", "action_mask", "weights")
        for start in range(0, batch.tokens.shape[0], size):
            piece = {name: getattr(batch, name)[start : start + size] for name in columns}
            yield dataclasses.replace(batch, **piece)
        return
    lengths = (batch.segment_ids >= 0).sum(1)
    if batch.context is not None:
        lengths = lengths + batch.context.mask.sum(1)[batch.context.row]
    padded = int(lengths.max()) * len(lengths)
    by_length = by_length and batch.context is not None and padded > max(2 * SMALLEST_PIECE, 1.25 * int(lengths.sum()))
    if padded <= max_tokens and not by_length:
        yield batch
        return
    # completions of one prompt stay together, so that what they share is computed once here too; the two of a pair
    # are never parted, for one loss needs both
    rows = torch.arange(len(lengths), device=lengths.device)
    groups = batch.prompt_ids if batch.prompt_ids is not None else rows
    longest = torch.zeros(int(groups.max()) + 1, dtype=lengths.dtype, device=lengths.device)
    longest = longest.scatter_reduce(0, groups, lengths, "amax")
    units: dict[int, list[int]] = {}
    for row, unit in enumerate((batch.pair_ids if batch.pair_ids is not None else rows).tolist()):
        units.setdefault(unit, []).append(row)
    order = sorted(units.values(), key=lambda unit: (int(longest[groups[unit[0]]]), int(groups[unit[0]])))
    start = 0
    while start < len(order):
        chosen, stop = list(order[start]), start + 1
        while stop < len(order):
            width, before = int(longest[groups[order[stop][0]]]), int(longest[groups[chosen[-1]]])
            if width * (len(chosen) + len(order[stop])) > max_tokens:
                break
            shortest = int(longest[groups[chosen[0]]])
            if by_length and width > max(before, 1.25 * shortest) and before * len(chosen) >= SMALLEST_PIECE:
                break
            chosen += order[stop]
            stop += 1
        yield select_rows(batch, torch.tensor(chosen, device=batch.tokens.device))
        start = stop


def to_device(batch: Batch, device: torch.device) -> Batch:
    """A copy whose tensors live on `device` (float64 columns stay behind on MPS, which has none)."""
    moved: dict[str, object] = {}
    for f in dataclasses.fields(batch):
        value = getattr(batch, f.name)
        if isinstance(value, Tensor):
            if value.dtype == torch.float64 and device.type == "mps":
                value = value.float()
            moved[f.name] = value.to(device)
    if batch.context is not None:
        c = batch.context
        moved["context"] = EncoderContext(c.tokens.to(device), c.mask.to(device), c.row.to(device))
    return dataclasses.replace(batch, **moved)  # type: ignore[arg-type]
