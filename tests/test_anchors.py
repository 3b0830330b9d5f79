"""What a root's versions are measured on: the model's own answers to shipped questions, rows of a file, or nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from operant.config import LearnerConfig
from operant.data.prompts import settle_style
from operant.live.learning.anchors import Anchors, anchor_prompts
from operant.live.learning.questions import QUESTIONS
from operant.models.policy import Policy
from operant.models.sampler import Sampler
from operant.types import Prompt, Sampling

Make = Callable[..., Policy]


def test_the_shipped_questions_are_all_different_and_some_are_chinese() -> None:
    assert 30 <= len(QUESTIONS) <= 50 and len(set(QUESTIONS)) == len(QUESTIONS)
    assert 3 <= sum(any("\u4e00" <= c <= "\u9fff" for c in question) for question in QUESTIONS) <= 8


def test_a_model_with_a_template_is_anchored_by_its_answers_to_shipped_questions(chat_policy: Policy) -> None:
    prompts, others = anchor_prompts(LearnerConfig(anchor_rows=4, anchor_tokens=32), chat_policy)
    assert [p.text for p in prompts] == list(QUESTIONS[:4])
    assert [p.text for p in others] == list(QUESTIONS[4:36])  # the gate has the last ones for itself
    assert [chat_policy.codec.decode(p.tokens) for p in prompts] == [f"<user>{q}\n<bot>" for q in QUESTIONS[:4]]
    anchors = Anchors.of(chat_policy, prompts, max_tokens=8, seed=3)
    assert anchors.are_questions
    as_served = Sampling(temperature=0.7, top_p=0.9, max_tokens=8, seed=3)
    for (said,), answer in zip(Sampler(chat_policy).sample(prompts, as_served), anchors.answers, strict=True):
        assert np.array_equal(said.tokens, answer)


@pytest.mark.parametrize("chat", ["auto", False])
def test_a_model_that_is_not_asked_in_a_template_is_anchored_by_what_it_says_unasked(
    chat: Any, make_policy: Make, chat_policy: Policy
) -> None:
    policy = make_policy("gpt2", context=256) if chat == "auto" else chat_policy
    config = LearnerConfig(anchor_rows=3, anchor_tokens=32, chat=chat)
    settle_style(policy, config)
    prompts, others = anchor_prompts(config, policy)
    assert len(others) == 32
    assert [(p.id, p.tokens.tolist()) for p in prompts] == [(f"anchor-{i}", [policy.codec.eos_id]) for i in range(3)]
    anchors = Anchors.of(policy, prompts, max_tokens=8, seed=3)
    assert not anchors.are_questions
    plain = Sampler(policy).sample(prompts, Sampling(max_tokens=8, seed=3))
    assert all(np.array_equal(said.tokens, a) for (said,), a in zip(plain, anchors.answers, strict=True))


def test_questions_that_a_short_context_cannot_hold_are_left_out(chat_policy: Policy, make_policy: Make) -> None:
    short = make_policy("gpt2", context=48)
    short.codec = chat_policy.codec
    fitting = [q for q in QUESTIONS if len(short.codec.encode(f"<user>{q}\n<bot>")) <= 48 - 8]
    assert 0 < len(fitting) < len(QUESTIONS)
    asked, others = anchor_prompts(LearnerConfig(anchor_rows=48, anchor_tokens=8), short)
    assert ([p.text for p in asked], others) == (fitting, [])
    assert anchor_prompts(LearnerConfig(anchor_tokens=47), short)[0][0].id == "anchor-0"  # none fits


def test_the_anchors_of_a_root_are_those_that_it_began_with(chat_policy: Policy, tmp_path: Path) -> None:
    unasked = [Prompt(id=f"anchor-{i}", tokens=np.array([chat_policy.codec.eos_id])) for i in range(2)]
    for asked in (True, False):
        config = LearnerConfig(anchor_rows=3, anchor_tokens=32)
        prompts = anchor_prompts(config, chat_policy)[0] if asked else unasked
        began = Anchors.of(chat_policy, prompts, max_tokens=8)
        began.save(tmp_path)
        kept = Anchors.load(tmp_path, chat_policy)
        assert kept.ids == began.ids and kept.are_questions == asked
        assert all(np.array_equal(a, b) for a, b in zip(kept.answers, began.answers, strict=True))
