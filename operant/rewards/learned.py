"""Rewards that are models: those that `operant reward-model` trains, one or an ensemble, and semantic similarity.

Both run in this process, a whole batch at once on the model's device, and import torch only when they are first used.
"""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from operant.data.chat import read_messages
from operant.rewards.metrics import Metric
from operant.rewards.seam import Missing
from operant.types import Completion, Doubles, Ints, OperantError, Prompt, Span

if TYPE_CHECKING:
    from operant.models.classifier import Classifier
    from operant.models.encoder import Encoder
    from operant.models.reward_model import RewardModel


@dataclass(frozen=True)
class ModelReward(Metric):
    """What rewards that run a model share.

    path: the model's folder. device: auto, cpu, cuda, cuda:1 or mps. max_tokens: padded tokens that go through it at
    once. `spent` counts calls, completions and seconds, since a learned reward may cost more than the policy.

    Raises OperantError for a missing path and max_tokens below 1.
    """

    path: str = ""
    device: str = "auto"
    max_tokens: int = 8192

    batched: ClassVar[bool] = True
    needs_references: ClassVar[bool] = False
    positional: ClassVar[str] = "path"

    @cached_property
    def spent(self) -> dict[str, float]:
        return {"calls": 0, "completions": 0, "seconds": 0.0}

    def __post_init__(self) -> None:
        if not self.path:
            raise OperantError(f"reward '{self.name}' needs a folder; write {self.name}(runs/…/model)")
        if self.max_tokens < 1:
            raise OperantError(f"max_tokens of reward '{self.name}' is {self.max_tokens}; it must be at least 1")

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[Any]:  # type: ignore[override]
        begun = time.perf_counter()
        out = self.reward_batch(prompts, completions)
        self.spent["calls"] += 1
        self.spent["completions"] += len(completions)
        self.spent["seconds"] += time.perf_counter() - begun
        return out

    def reward_batch(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[Any]:
        """A reward for each completion, or `Missing`. Raises OperantError for prompts without needed references."""
        raise TypeError(f"{type(self).__name__} rewards nothing")


@dataclass(frozen=True)
class Learned(ModelReward):
    """The reward of a trained reward model, in the units of its training scores (log-odds after comparisons).

    path: its folder, or several separated by commas: an ensemble, whose reward is mean − k · std over its members
    (Coste et al. 2023), which trusts less what they do not agree on. k: 0 takes the mean. A `token` model pays every
    token; the others pay the whole completion. A completion that the model cannot hold has no reward (`too_long`).
    A folder or hub id with an ordinary sequence-classification checkpoint serves as well (`Classifier`); label: which
    of its labels pays, where it has several.

    Raises OperantError when a folder is missing or holds no reward model, or the members are of different kinds.
    """

    k: float = 0.0
    label: str = ""

    name: ClassVar[str] = "model"
    answers_dense: ClassVar[bool] = True
    classifies: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        from operant.models.classifier import is_classifier
        from operant.models.reward_model import holds_reward_model, read_facts

        kinds: dict[str, str] = {}
        for path in self.paths:
            other = not holds_reward_model(path) and is_classifier(path)
            kinds[path] = "classifier" if other else read_facts(path).kind
        if self.label and "classifier" not in kinds.values():
            raise OperantError(f"reward 'model' of {self.path} has no labels; leave label out")
        if (self.dense and "token" not in kinds.values()) or self.potential is not None:
            raise OperantError(
                f"reward 'model' of {self.path} pays whole completions; leave dense and potential out, "
                "or train one with operant reward-model --kind token"
            )
        if len(set(kinds.values())) > 1:
            listed = ", ".join(f"{path} is {kind}" for path, kind in kinds.items())
            raise OperantError(f"the members of an ensemble have different units ({listed}); take models of one kind")
        if not math.isfinite(self.k):
            raise OperantError(f"k of reward 'model' is {self.k}; give a finite number")
        # what the folders hold, so that nothing is asked for that they are not
        object.__setattr__(self, "dense", "token" in kinds.values())
        object.__setattr__(self, "classifies", "classifier" in kinds.values())
        if self.classifies:  # a wrong hub id, or a label that is not there, shows before a run begins
            _ = self.classifiers

    @property
    def paths(self) -> list[str]:
        return [os.path.expanduser(path.strip()) for path in self.path.split(",") if path.strip()]

    @cached_property
    def classifiers(self) -> list[Classifier]:
        from operant.models.classifier import Classifier

        return [Classifier.load(path, self.label, device=self.device) for path in self.paths]

    @cached_property
    def models(self) -> list[RewardModel]:
        from operant.models.reward_model import RewardModel

        return [RewardModel.load(path, device=self.device) for path in self.paths]

    def reward_batch(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[Any]:
        from operant.models.reward_model import Reading

        if self.classifies:
            rows = [self._classified(one, prompts, completions) for one in self.classifiers]
            return [self._together(own) for own in zip(*rows, strict=True)]
        pairs = [(prompt_text(p), c.text) for p, c in zip(prompts, completions, strict=True)]
        values: list[list[Any]] = []
        for model in self.models:
            readings = model.read_all(pairs)
            fitting = [(i, r) for i, r in enumerate(readings) if isinstance(r, Reading)]
            rewards = model.predict([r for _, r in fitting], self.max_tokens)
            limit = f"too_long: the completion has more tokens than the reward model holds ({model.encoder.max_length})"
            own: list[Any] = [Missing(limit)] * len(pairs)
            for (i, reading), value in zip(fitting, rewards, strict=True):
                own[i] = model.spans(reading, value) if self.dense else float(value[0])
                if self.dense and not own[i]:  # an empty text has no characters to pay
                    own[i] = float(value.sum())
            values.append(own)
        return [self._together(own) for own in zip(*values, strict=True)]

    def _classified(
        self, classifier: Classifier, prompts: Sequence[Prompt], completions: Sequence[Completion]
    ) -> list[Any]:
        readings = [
            classifier.read(read_messages(p.messages) if p.messages else (), p.text, c.text)
            for p, c in zip(prompts, completions, strict=True)
        ]
        fits = [i for i, one in enumerate(readings) if len(one["input_ids"]) <= classifier.max_length]
        out: list[Any] = [Missing(f"too_long: more tokens than the classifier holds ({classifier.max_length})")]
        out *= len(readings)
        for i, value in zip(fits, classifier.predict([readings[i] for i in fits], self.max_tokens), strict=True):
            out[i] = value
        return out

    def _together(self, own: Sequence[Any]) -> Any:
        missing = next((value for value in own if isinstance(value, Missing)), None)
        if missing is not None or len(own) == 1:
            return own[0] if missing is None else missing
        if isinstance(own[0], float):
            return float(np.mean(own) - self.k * np.std(own))
        # members may cut the text differently: character by character they can be compared
        size = max(span.end for span in own[0])
        rows = np.zeros((len(own), size))
        for row, spans in zip(rows, own, strict=True):
            for span in spans:
                row[span.start : span.end] = span.value / (span.end - span.start)
        joined = rows.mean(0) - self.k * rows.std(0)
        return [Span(i, i + 1, float(value)) for i, value in enumerate(joined)]


@dataclass(frozen=True)
class Similarity(ModelReward):
    """BERTScore's greedy matching (Zhang et al. 2020, §3) of a completion with its best reference.

        R = Σ_{x_i ∈ x} w(x_i) max_j x_i·y_j / Σ w(x_i),   P likewise from the completion y,   F1 = 2PR / (P + R)

    The vectors are of the encoder's last layer, of unit length; the tokens around the text are left out. path: the
    folder of any model (BERT-like, decoder, or encoder-decoder, whose encoder reads). by: f1, precision or recall. idf:
    a data file or folder; each token weighs −log((M_w + 1)/(M + 1)), M_w of whose M texts hold it, otherwise all weigh
    1. idf_field: the column of those texts. An empty completion scores 0. Not rescaled: values of an encoder trained on
    little lie close together, so look at their spread before you train on them. Where a text is more than the encoder
    can hold there is no reward (`too_long`).

    Raises OperantError for a missing folder or an unknown measure.
    """

    by: str = "f1"
    idf: str = ""
    idf_field: str = "text"

    name: ClassVar[str] = "similarity"
    needs_references: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        from pathlib import Path

        from operant.data.text import looks_like_path

        if self.dense or self.potential is not None:
            raise OperantError("reward 'similarity' has no dense form; leave dense and potential out")
        object.__setattr__(self, "path", os.path.expanduser(self.path))
        if self.by not in ("f1", "precision", "recall"):
            raise OperantError(f"by of reward 'similarity' is {self.by!r}; use f1, precision or recall")
        if looks_like_path(self.path) and not (Path(self.path) / "config.json").exists():
            raise OperantError(f"there is no model at {self.path} for reward 'similarity'; give an encoder's folder")

    @cached_property
    def encoder(self) -> Encoder:
        from operant.models.encoder import Encoder

        return Encoder.load(self.path, device=self.device)

    @cached_property
    def weights(self) -> dict[int, float] | None:
        """Inverse document frequency of each token of the idf texts; None without them."""
        if not self.idf:
            return None
        from operant.data.prompts import load_texts
        from operant.data.rows import Fields, load_rows

        texts = load_texts(load_rows(self.idf), Fields(text=self.idf_field))
        return inverse_document_frequency([row.tolist() for row in self.encoder.codec.encode_batch(texts)])

    def reward_batch(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[Any]:
        """The similarity of each completion to its references. Raises OperantError for a prompt that has none."""
        for prompt in prompts:
            if not prompt.references:
                raise OperantError(
                    f"reward 'similarity' compares with references and prompt '{prompt.id}' has none; add them"
                )
        texts = list(dict.fromkeys([c.text for c in completions] + [r for p in prompts for r in p.references]))
        sizes = dict(zip(texts, map(len, self.encoder.codec.encode_batch(texts)), strict=True))
        room = self.encoder.room
        read = dict(zip(texts, self.encoder.vectors(texts, self.max_tokens), strict=True))
        out: list[Any] = []
        for prompt, completion in zip(prompts, completions, strict=True):
            if max(sizes[text] for text in (completion.text, *prompt.references)) > room:
                out.append(Missing(f"too_long: completion or reference is more tokens than the encoder holds ({room})"))
                continue
            scores = [greedy_match(*read[completion.text], *read[r], self.weights) for r in prompt.references]
            best = max(scores, key=lambda score: score[2])
            out.append(best[("precision", "recall", "f1").index(self.by)])
        return out


def prompt_text(prompt: Prompt) -> str:
    """What a reward model reads of a prompt: its text, or of a chat its messages' texts, a line each."""
    if prompt.messages:
        return "\n".join(message["content"] for message in read_messages(prompt.messages))
    return prompt.text


def inverse_document_frequency(texts: Sequence[Sequence[int]]) -> dict[int, float]:
    """−log((M_w + 1)/(M + 1)) of each token w that is in M_w of the M texts; an unseen one's is under the key −1."""
    counts = Counter(token for text in texts for token in set(text))
    total = len(texts)
    known = {token: -math.log((count + 1) / (total + 1)) for token, count in counts.items()}
    return known | {-1: math.log(total + 1)}


def greedy_match(
    tokens: Ints, vectors: np.ndarray, other_tokens: Ints, others: np.ndarray, weights: dict[int, float] | None = None
) -> tuple[float, float, float]:
    """(precision, recall, F1) of a candidate's tokens int64[T], vectors float32[T, H], against a reference's.

    weights: idf by token, the key −1 for tokens that it does not have; None weighs all alike. 0 where either is empty.
    """
    if not len(tokens) or not len(other_tokens):
        return 0.0, 0.0, 0.0

    def unit(rows: np.ndarray) -> Doubles:
        wide = rows.astype(np.float64)
        return wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-12)

    def weigh(ids: Ints) -> Doubles:
        if weights is None:
            return np.ones(len(ids))
        return np.array([weights.get(int(i), weights[-1]) for i in ids])

    cosine = unit(vectors) @ unit(others).T

    def mean(best: Doubles, weight: Doubles) -> float:
        total = float(weight.sum())
        return float(best @ weight) / total if total > 0 else float(best.mean())

    precision, recall = mean(cosine.max(1), weigh(tokens)), mean(cosine.max(0), weigh(other_tokens))
    both = precision + recall
    return precision, recall, 2 * precision * recall / both if both > 0 else 0.0
