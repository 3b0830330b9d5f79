"""Prompts with answers on which every version is measured, written down once at the beginning of a root."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from operant.config import LearnerConfig
from operant.data.batch import microbatches, to_device
from operant.data.feedback_log import FeedbackLog, line_of
from operant.data.prompts import PromptFormat, given_style, load_fitting_prompts
from operant.data.rows import Fields, load_rows
from operant.live.learning.questions import QUESTIONS
from operant.models.policy import Policy
from operant.models.sampler import Sampler
from operant.run.files import replace_file
from operant.types import Batch, Completion, Ints, OperantError, Prompt, Sampling

__all__ = ["Anchors", "anchor_prompts", "asked_in_chat"]

_QUESTION = "question-"  # how the ids of shipped questions begin

PULLED = 32  # answers by which steps are pulled, beside the anchors; the shipped questions after them go to the gate
PIECE = 2**23  # logits, 32 MB: what a step that goes too far is known by, before the other anchors are read


class Anchors:
    """Prompts with answers on which every version is measured: what must not change much while one answer is rated.

    prompts, answers (int64[T] each): the same number of each; `ids` name them in the records.

    Raises OperantError when no answer has a token.
    """

    def __init__(self, policy: Policy, prompts: Sequence[Prompt], answers: Sequence[Ints]) -> None:
        if not prompts or not any(len(a) for a in answers):
            raise OperantError("there are no anchor answers to measure a step by; give --anchors with some prompts")
        kept = [(p, a) for p, a in zip(prompts, answers, strict=True) if len(a)]
        self.prompts = [p for p, _ in kept]
        self.answers = [a for _, a in kept]
        self.ids = [p.id for p in self.prompts]
        self.vocabulary = policy.vocabulary
        self.batch: Batch = policy.batch_of_sequences([p.tokens for p in self.prompts], self.answers)

    @classmethod
    def of(cls, policy: Policy, prompts: Sequence[Prompt], *, max_tokens: int = 32, seed: int = 0) -> Anchors:
        """The policy's own answers to these prompts: to shipped questions as people would get them, to others at
        temperature 1.

        Raises OperantError when no answer has a token.
        """
        temperature, top_p, top_k = 1.0, 1.0, 0
        if _are_questions(prompts):
            temperature, top_p, top_k = policy.generation.settings(None, None, None, chat=True)
        sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, max_tokens=max_tokens, seed=seed)
        groups = Sampler(policy).sample(prompts, sampling)
        return cls(policy, prompts, [g[0].tokens for g in groups])

    @classmethod
    def load(cls, root: Path, policy: Policy) -> Anchors:
        """Those of a root. Raises OperantError when a line of the file is no record."""
        return cls._read(_anchor_file(root), policy)

    @classmethod
    def load_pulled(cls, root: Path, policy: Policy) -> Anchors | None:
        """The answers of a root by which steps are pulled, None where it has none. Raises as `load` does."""
        file = _pulled_file(root)
        return cls._read(file, policy) if file.exists() else None

    @classmethod
    def _read(cls, path: Path, policy: Policy) -> Anchors:
        with path.open(encoding="utf-8") as file:
            kept = FeedbackLog.from_lines(file)
        answers = list(kept.completions.values())
        return cls(policy, [kept.prompts[a.prompt_id] for a in answers], [a.tokens for a in answers])

    def save(self, root: Path) -> None:
        """Write them down in a root, which is measured on them. Raises OperantError when a prompt cannot be written as
        JSON."""
        self._write(_anchor_file(root))

    def save_pulled(self, root: Path) -> None:
        """Write them down in a root, whose steps are pulled by them. Raises as `save` does."""
        self._write(_pulled_file(root))

    def _write(self, path: Path) -> None:
        lines = []
        for i, (prompt, answer) in enumerate(zip(self.prompts, self.answers, strict=True)):
            kept = Completion(f"anchor-answer-{i}", prompt.id, "", answer, np.zeros(len(answer), np.int64))
            lines += [line_of(dataclasses.replace(prompt, references=())), line_of(kept)]
        replace_file(path, "".join(lines))

    @property
    def are_questions(self) -> bool:
        """Whether they are answers to shipped questions, asked in the model's chat template."""
        return _are_questions(self.prompts)

    @torch.no_grad()
    def logits(self, policy: Policy, max_tokens: int) -> Tensor:
        """Logits that predict the answers' K tokens, float32[K, V] on the CPU, always in the same order."""
        return torch.cat(list(self.pieces(policy, max_tokens)))

    @torch.no_grad()
    def pieces(self, policy: Policy, max_tokens: int) -> Iterator[Tensor]:
        """`logits` of some answers after the other, about PIECE numbers at once."""
        for piece in self._parted(max_tokens):
            yield policy.acting_logits(to_device(piece, policy.device)).cpu()

    def tokens(self, max_tokens: int) -> Tensor:
        """The answers' tokens, int64[K], in the order of `logits`."""
        return torch.cat([piece.tokens[piece.action_mask] for piece in self._parted(max_tokens)])

    def some(self, policy: Policy, count: int, seed: int) -> Batch:
        """So many of them, drawn without replacement, as a batch in which each token weighs the same."""
        chosen = np.random.default_rng(seed).permutation(len(self.answers))[:count]
        return policy.batch_of_sequences(
            [self.prompts[i].tokens for i in chosen], [self.answers[i] for i in chosen],
            normalisation="per_completion",
        )  # fmt: skip

    def _parted(self, max_tokens: int) -> Iterator[Batch]:
        longest = int((self.batch.segment_ids >= 0).sum(1).max())
        rows = PIECE // (self.vocabulary * max(len(answer) for answer in self.answers))
        return microbatches(self.batch, min(max_tokens, max(1, rows) * longest))


def anchor_prompts(config: LearnerConfig, policy: Policy) -> tuple[list[Prompt], list[Prompt]]:
    """What a root is measured on, and by which answers its steps are pulled: rows of a file; else shipped questions, of
    a model that is asked in a chat template of its own; else nothing at all.

    Raises OperantError when the file is missing or has no such column.
    """
    asked = _asked(config, policy, config.anchor_rows + PULLED)
    return asked[: config.anchor_rows], asked[config.anchor_rows :]


def _asked(config: LearnerConfig, policy: Policy, count: int) -> list[Prompt]:
    assert config.anchor_tokens != "auto"
    if config.anchors:
        rows = load_rows(config.anchors, split="train", limit=count)
        return load_fitting_prompts(
            rows, policy, fields=Fields(prompt=config.prompt_field, references=config.reference_field),
            room=config.anchor_tokens, too_long="skip", **given_style(config),
        )  # fmt: skip
    if asked := asked_in_chat(policy, QUESTIONS, room=config.anchor_tokens)[:count]:
        return asked
    # what the model says of itself: an end of text is what stands before a text
    bare = np.array([policy.codec.eos_id], np.int64)
    return [Prompt(id=f"anchor-{i}", tokens=bare) for i in range(count)]


def asked_in_chat(policy: Policy, questions: Sequence[str], *, room: int) -> list[Prompt]:
    """Those of the shipped questions that fit the model, as it is asked in its chat template; [] where it has none.

    room: tokens that are left for an answer.
    """
    written = PromptFormat.fitting(policy, room=room)
    if not (policy.codec.has_template and written.style(policy.codec).chat):
        return []
    assert written.max_prompt_tokens is not None
    prompts = [
        Prompt(id=f"{_QUESTION}{QUESTIONS.index(q)}", text=q, tokens=written.encode(q, policy.codec)) for q in questions
    ]
    return [prompt for prompt in prompts if len(prompt.tokens) <= written.max_prompt_tokens]


def _are_questions(prompts: Sequence[Prompt]) -> bool:
    return all(prompt.id.startswith(_QUESTION) for prompt in prompts)


def _anchor_file(root: Path) -> Path:
    return root / "anchors.jsonl"


def _pulled_file(root: Path) -> Path:
    return root / "pulled.jsonl"
