"""A reward model: an encoder with a head that gives a prompt's completion one number, or each of its tokens one."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from operant.data.batch import right_padded
from operant.models.encoder import Encoder, by_length
from operant.models.folder import open_to_others
from operant.types import Batch, Doubles, Ints, OperantError, Span

FACTS, HEAD = "reward_model.json", "reward_head.safetensors"

Kind = Literal["regression", "comparison", "token"]
KINDS: tuple[Kind, ...] = ("regression", "comparison", "token")


@dataclass
class RewardFacts:
    """What a reward model's folder says beside its weights.

    kind: what it was trained on. pool: how one vector comes of a completion's: `mean` over its tokens, or the `last`.
    mean, std: of the training scores, which the head predicts in units of std. scale, offset: calibration on held-out
    data, applied last: r = scale · (mean + std · z) + offset. measured: what was measured on held-out data.
    """

    kind: Kind
    pool: str = "mean"
    separator: str = "\n"
    mean: float = 0.0
    std: float = 1.0
    scale: float = 1.0
    offset: float = 0.0
    measured: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Reading:
    """A prompt and completion as the model reads them: tokens int64[S], of which [begin, S) are the completion's and
    its closing token. text_ends int64[S − begin]: characters of the completion committed once that token is there."""

    tokens: Ints
    begin: int
    text: str
    text_ends: Ints


class RewardModel:
    """An encoder and a linear head on its last layer.

    The head starts as N(0, 1/(width + 1)) (Stiennon et al. 2020, appendix B). A causal model is read at the closing
    token, any other by the mean over the completion's tokens, which have seen the prompt.
    """

    def __init__(self, encoder: Encoder, facts: RewardFacts, *, seed: int = 0) -> None:
        self.encoder, self.facts = encoder, facts
        self.head = nn.Linear(encoder.width, 1)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.head.weight.copy_(torch.randn(1, encoder.width, generator=generator) / math.sqrt(encoder.width + 1))
            self.head.bias.zero_()
        self.head.to(encoder.device)

    # --- what a Learner and a Run need ---------------------------------------------------------------------------

    @property
    def model(self) -> Any:
        return self.encoder.model

    @property
    def device(self) -> torch.device:
        return self.encoder.device

    @property
    def recomputes(self) -> bool:
        return self.encoder.recomputes

    @recomputes.setter
    def recomputes(self, value: bool) -> None:
        self.encoder.recomputes = value

    def trainable_parameters(self) -> list[nn.Parameter]:
        used = [p for p in self.encoder.body.parameters() if p.requires_grad]
        return [*used, *self.head.parameters()]

    def critic_parameters(self) -> list[nn.Parameter]:
        """None: a reward model has no critic."""
        return []

    def save(self, path: str | Path, *, by_name: bool = False) -> None:
        """Write the encoder as Transformers or PEFT does (see `Encoder.save`), the head and the facts beside it."""
        from safetensors.torch import save_file

        self.encoder.save(path, by_name=by_name)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.head.state_dict().items()}
        save_file(tensors, Path(path) / HEAD)
        write_facts(self.facts, path)
        open_to_others(Path(path))

    def moved_to(self, path: str | Path) -> None:
        """What `save` wrote last lies there now."""
        self.encoder.moved_to(path)

    def restore(self, path: str | Path) -> None:
        """Put the weights that `save` wrote at `path` into this model, in place."""
        from safetensors.torch import load_file

        self.encoder.restore(path)
        self.head.load_state_dict(load_file(Path(path) / HEAD))

    @classmethod
    def load(cls, path: str | Path, *, device: str = "auto", dtype: str = "float32") -> RewardModel:
        """Load a folder that `operant reward-model` wrote.

        Raises OperantError when there is no such folder, or it holds no reward model.
        """
        from safetensors.torch import load_file

        facts = read_facts(path)
        model = cls(Encoder.load(path, device=device, dtype=dtype), facts)
        try:
            model.head.load_state_dict(load_file(Path(path) / HEAD))
        except Exception as error:  # safetensors raises its own, torch its own
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise OperantError(f"{path} has no usable {HEAD} ({reason}); train it again or copy it whole") from error
        model.model.eval()
        return model

    # --- reading -------------------------------------------------------------------------------------------------

    def read(self, prompt: str, completion: str) -> Reading | None:
        """The tokens of a prompt and completion, or None when the completion alone is more than the model can hold.

        [first] prompt separator completion [last]. A prompt that does not fit loses its beginning.
        """
        return self.read_all([(prompt, completion)])[0]

    def read_all(self, pairs: Sequence[tuple[str, str]]) -> list[Reading | None]:
        """`read` of many at once. Raises OperantError where a `token` model's slow tokenizer rewrites text."""
        codec, encoder = self.encoder.codec, self.encoder
        middle = codec.encode(self.facts.separator)
        if (encoder.codec.tokenizer.sep_token_id is not None and not encoder.causal) or not len(middle):
            middle = encoder.last
        prompts = codec.encode_batch([prompt for prompt, _ in pairs])
        answers = codec.encode_batch([answer for _, answer in pairs])
        readings: list[Reading | None] = []
        for (asked, given), prompt, answer in zip(pairs, prompts, answers, strict=True):
            left = np.concatenate([prompt, middle]) if asked else prompt[:0]
            room = encoder.max_length - len(encoder.first) - len(answer) - len(encoder.last)
            if room < 0:
                readings.append(None)
                continue
            left = left[max(0, len(left) - room) :]
            text, ends = codec.text_and_ends(answer)
            if self.facts.kind == "token" and text != given:  # labels have places in the given text
                text, ends = given, codec.ends_in(given)
            begin = len(encoder.first) + len(left)
            tokens = encoder.framed(np.concatenate([left, answer]))
            readings.append(Reading(tokens, begin, text, np.append(ends, len(text)).astype(np.int64)))
        return readings

    def outputs(self, tokens: Tensor, real: Tensor, mask: Tensor) -> Tensor:
        """The head's numbers z in units of the training scores: float32[B, S] for `token`, else float32[B].

        tokens: int64[B, S], right-padded. real: bool[B, S], no padding. mask: bool[B, S], the completion's tokens.
        """
        hidden = self.encoder.hidden(tokens, real)
        if self.facts.kind == "token":
            return self.head(hidden)[..., 0]
        if self.facts.pool == "last":
            columns = torch.arange(mask.shape[1], device=mask.device)
            at = (columns * mask).argmax(1)
            pooled = hidden[torch.arange(len(at), device=at.device), at]
        else:
            shares = mask.float() / mask.sum(1, keepdim=True)
            pooled = (hidden * shares[..., None]).sum(1)
        return self.head(pooled)[:, 0]

    @torch.no_grad()
    def predict(self, readings: Sequence[Reading], max_tokens: int = 8192) -> list[Doubles]:
        """Rewards float64: [1] a reading, or one for each of its completion's tokens; calibrated, dropout off."""
        training = self.model.training
        self.model.eval()
        out: list[Doubles] = [np.zeros(0)] * len(readings)
        for chosen in by_length([len(r.tokens) for r in readings], max_tokens):
            batch = reading_batch([readings[i] for i in chosen], self.encoder.codec.pad_id)
            columns = (batch.tokens, batch.segment_ids >= 0, batch.action_mask)
            raw = self.outputs(*(column.to(self.device) for column in columns)).cpu().double().numpy()
            rewards = self.facts.scale * (self.facts.mean + self.facts.std * raw) + self.facts.offset
            for row, i in enumerate(chosen):
                one = rewards[row]
                begin, end = readings[i].begin, len(readings[i].tokens)
                out[i] = one[begin:end] if self.facts.kind == "token" else np.array([one])
        self.model.train(training)
        return out

    def spans(self, reading: Reading, rewards: Doubles) -> list[Span]:
        """Token rewards as spans of the completion's characters, which any other tokenizer's tokens can be paid by.

        A token that commits no character is the beginning of the next one and adds to its span, as labels are placed;
        at the end (the closing token) to the last. No spans for an empty text.
        """
        spans: list[Span] = []
        begin, carried = 0, 0.0
        for end, value in zip(reading.text_ends.tolist(), rewards.tolist(), strict=True):
            if end > begin:
                spans.append(Span(begin, end, value + carried))
                begin, carried = end, 0.0
            else:
                carried += value
        if spans:
            spans[-1] = Span(spans[-1].start, spans[-1].end, spans[-1].value + carried)
        return spans


# --- losses ----------------------------------------------------------------------------------------------------------


def bradley_terry(chosen: Tensor, rejected: Tensor) -> Tensor:
    """−log σ(r_c − r_r), the negative log-likelihood of the preference (Bradley & Terry 1952; Stiennon et al. 2020).

    chosen, rejected: float[N]. Returns float[N].
    """
    return -functional.logsigmoid(chosen - rejected)


def squared_error(predictions: Tensor, targets: Tensor) -> Tensor:
    """(z − t)²: float[B] or float[B, S], both of one shape."""
    return (predictions - targets) ** 2


def reward_loss(model: RewardModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of the model's kind, float32[B, S], on the columns that `batch.weights` counts.

    regression: squared error of a completion against its `rewards` (on its last column), in units of the training
    scores. token: the same on every observed token. comparison: Bradley–Terry on the last column of the chosen row;
    rows of `is_chosen` are matched in order with the others.
    """
    z = model.outputs(batch.tokens, batch.segment_ids >= 0, batch.action_mask)
    facts = model.facts
    if facts.kind == "token":
        assert batch.rewards is not None
        return squared_error(z, (batch.rewards.float() - facts.mean) / facts.std), {}
    loss = torch.zeros(batch.tokens.shape, dtype=z.dtype, device=z.device)
    if facts.kind == "regression":
        assert batch.rewards is not None
        targets = (batch.rewards * batch.weights).sum(1).float()
        return loss + squared_error(z, (targets - facts.mean) / facts.std)[:, None], {}
    assert batch.is_chosen is not None
    rows = batch.is_chosen.nonzero()[:, 0]
    pair = bradley_terry(z[batch.is_chosen], z[~batch.is_chosen])
    return loss.index_put((rows,), pair[:, None].expand(-1, loss.shape[1])), {}


def reading_batch(
    readings: Sequence[Reading], pad_id: int, *, targets: Sequence[Doubles] | None = None, kind: Kind = "regression"
) -> Batch:
    """A batch of readings, one a row.

    targets: float64, one for each reading ([1]) or one for each completion token, NaN where there is none. For
    `comparison`, even rows are chosen and odd ones rejected.
    """
    tokens, real = right_padded([r.tokens for r in readings], pad_id)
    columns = torch.arange(tokens.shape[1])[None]
    begins = torch.tensor([r.begin for r in readings])[:, None]
    action = real & (columns >= begins)
    last = columns == real.sum(1, keepdim=True) - 1
    weights, rewards = last.float(), None
    if targets is not None:
        rewards = torch.zeros(tokens.shape, dtype=torch.float64)
        for row, (reading, values) in enumerate(zip(readings, targets, strict=True)):
            at = reading.begin if kind == "token" else len(reading.tokens) - 1
            rewards[row, at : at + len(values)] = torch.from_numpy(values)
        observed = torch.isfinite(rewards)
        rewards = torch.where(observed, rewards, 0.0)
        if kind == "token":
            weights = (action & observed).float()
    chosen = (torch.arange(len(readings)) % 2 == 0) if kind == "comparison" else None
    if chosen is not None:
        weights = weights * chosen[:, None]
    return Batch(
        tokens=tokens,
        position_ids=columns.expand_as(tokens).clone(),
        segment_ids=torch.where(real, torch.arange(len(readings))[:, None], -1),
        action_mask=action,
        weights=weights,
        denominator=max(float(weights.sum()), 1.0),
        kind="scores" if chosen is None else "pairs",
        rewards=rewards,
        is_chosen=chosen,
        pair_ids=None if chosen is None else torch.arange(len(readings)) // 2,
    )


# --- folders ---------------------------------------------------------------------------------------------------------


def holds_reward_model(path: str | Path) -> bool:
    """Whether a folder holds a model that `operant reward-model` trained."""
    return (Path(path) / FACTS).is_file()


def read_facts(path: str | Path) -> RewardFacts:
    """What a folder says of its reward model; loads no weights.

    Raises OperantError when there is no folder, or it holds no reward model.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise OperantError(f"there is no reward model at {path}; give the model folder of an operant reward-model run")
    inner = folder / "model" / FACTS
    if not (folder / FACTS).is_file():
        hint = f"; did you mean {folder / 'model'}?" if inner.is_file() else "; train one with operant reward-model"
        raise OperantError(f"{path} holds no reward model (no {FACTS}){hint}")
    try:
        raw = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        facts = RewardFacts(**raw)
        if facts.kind not in KINDS or facts.pool not in ("mean", "last"):
            raise ValueError(f"kind {facts.kind!r}, pool {facts.pool!r}")
    except (OSError, ValueError, TypeError) as error:
        raise OperantError(f"{folder / FACTS} cannot be read ({error}); train the reward model again") from error
    return facts


def write_facts(facts: RewardFacts, path: str | Path) -> None:
    """Write the facts into a folder, so that a crash leaves the old or the new ones."""
    target = Path(path) / FACTS
    fresh = target.with_name(f".{FACTS}-{os.getpid()}")
    fresh.write_text(json.dumps(asdict(facts), indent=1), encoding="utf-8")
    os.replace(fresh, target)
