"""A model's generation_config: where its texts begin and end, what it never says, and how it is meant to be sampled."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_model

from operant.config import SampleConfig, ServeConfig, TrainConfig
from operant.data.text import Codec
from operant.live.api.openai_requests import ChatRequest, TextRequest, completion_sampling
from operant.models.generation import Generation
from operant.models.policy import Policy
from operant.models.sampler import Sampler
from operant.rl.evaluate import sample_from
from operant.rl.rollouts import rollout_sampling
from operant.types import OperantError, Prompt, Sampling

PROMPT = Prompt("a", np.array([41, 52, 63, 74, 85], np.int64))
GREEDY = Sampling(temperature=0.0, max_tokens=10)


def policy_with(family: str, codec: Codec, **settings: Any) -> Policy:
    """A tiny model whose generation_config says this."""
    model = tiny_model(family, codec)
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    return Policy(model, codec, device="cpu")


def ours(policy: Policy, sampling: Sampling = GREEDY, n: int = 1) -> Any:
    return Sampler(policy).sample([PROMPT], sampling, n)[0]


def theirs(policy: Policy) -> list[int]:
    """What Transformers' generate writes."""
    row = torch.from_numpy(PROMPT.tokens)[None]
    out = policy.model.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=10, do_sample=False)
    return out[0, 1 if policy.has_encoder else row.shape[1] :].tolist()


@pytest.mark.parametrize("family", ["llama", "t5", "bart"])
def test_texts_end_at_every_end_token_as_in_generate(family: str, codec: Codec) -> None:
    free = ours(policy_with(family, codec))[0].tokens.tolist()
    end = next((t for t in free[2:] if t not in free[:2] and t != codec.eos_id), free[0])
    policy = policy_with(family, codec, eos_token_id=[codec.eos_id, end])
    (answer,) = ours(policy)
    assert answer.tokens.tolist() == free[: free.index(end) + 1] == theirs(policy)
    assert answer.stop_reason == "eos" and not answer.truncated
    assert policy.codec.end_ids == {codec.eos_id, end} and codec.end_ids == {codec.eos_id}


def test_end_tokens_come_with_a_saved_model(codec: Codec, tmp_path: Path) -> None:
    policy_with("llama", codec, eos_token_id=[codec.eos_id, 99]).save(tmp_path)
    assert Policy.load(tmp_path, device="cpu").codec.end_ids == {codec.eos_id, 99}


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_a_forced_first_token_is_written_and_was_not_drawn(family: str, codec: Codec) -> None:
    policy = policy_with(family, codec, forced_bos_token_id=70)
    (answer,) = ours(policy)
    assert answer.tokens.tolist() == theirs(policy) and answer.tokens[0] == 70
    for drawn in (answer, *ours(policy, dataclasses.replace(GREEDY, temperature=1.0), n=3)):
        assert drawn.sampled.tolist() == [False] + [True] * (len(drawn.tokens) - 1)
        assert drawn.behavior_logprobs[0] == 0 and (drawn.behavior_logprobs[1:] <= 0).all()
    # what it learns from has it too, so that it is asked the same way
    assert policy.codec.encode_answers(["one"])[0].tolist() == [70, *codec.encode("one", eos=True).tolist()]
    assert policy_with("llama", codec, forced_bos_token_id=70).codec.first_id is None  # as generate has it


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_suppressed_tokens_are_not_drawn_as_in_generate(family: str, codec: Codec) -> None:
    free = ours(policy_with(family, codec))[0].tokens.tolist()
    second = next((t for t in free if t != free[0]), free[0])
    for settings in (
        {"suppress_tokens": [free[0]]}, {"begin_suppress_tokens": [free[0]]}, {"bad_words_ids": [[second]]},
        {"suppress_tokens": [second], "begin_suppress_tokens": [free[0]], "bad_words_ids": [[free[0], second]]},
    ):  # fmt: skip
        policy = policy_with(family, codec, **settings)
        (answer,) = ours(policy)
        if len(settings) == 1:  # of words only those of one token are honoured
            assert answer.tokens.tolist() == theirs(policy), settings
        assert answer.tokens.tolist() != free
        banned = {*policy.generation.banned, *policy.generation.banned_first}
        assert {*answer.sampling.banned, *answer.sampling.banned_first} == banned  # the record says so


def test_what_is_learned_from_is_drawn_from_the_whole_distribution(codec: Codec) -> None:
    policy = policy_with("llama", codec, suppress_tokens=list(range(3, 280)), temperature=0.3, top_p=0.5, top_k=3)
    sampling = rollout_sampling(TrainConfig(max_tokens=10), seed=1)
    for answer in ours(policy, sampling, n=4):
        np.testing.assert_array_equal(answer.behavior_logprobs, answer.model_logprobs)
        assert answer.sampling.banned == ()
    allowed = ours(policy, dataclasses.replace(sampling, suppress=True), n=4)
    assert all(set(a.tokens.tolist()) <= {*range(3), *range(280, codec.vocab_size)} for a in allowed)
    assert all((a.behavior_logprobs >= a.model_logprobs - 1e-6).all() for a in allowed)


class Typed:
    """Lines that somebody types: the next one comes once the one before it is answered."""

    def __init__(self, lines: list[str]) -> None:
        self.lines, self.taken, self.answered = lines, 0, 0

    def __iter__(self) -> Iterator[str]:
        for line in self.lines:
            self.taken += 1
            yield line

    def ready(self) -> bool:
        return self.answered == self.taken


def test_lines_are_answered_together_in_their_order_and_as_they_come(
    codec: Codec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy_with("llama", codec).save(tmp_path)
    lines = ["the cat", "a dog", "one two three", "x", "the red house"]
    rows: list[int] = []
    prefill = Policy.prefill

    def counted(self: Policy, prompts: Any, *others: Any) -> Any:
        rows.append(len(prompts))
        return prefill(self, prompts, *others)

    monkeypatch.setattr(Policy, "prefill", counted)

    def answers(texts: Any, **options: Any) -> Iterator[tuple[str, list[int]]]:
        config = SampleConfig(model=str(tmp_path), max_tokens=9, device="cpu", seed=3, **options)
        return ((prompt.text, answer.tokens.tolist()) for prompt, answer in sample_from(config, texts))

    whole = list(answers(lines, n=2))
    assert rows == [5] and [text for text, _ in whole] == [line for line in lines for _ in range(2)]
    rows.clear()
    typed = Typed(lines)
    got = []
    for number, answer in enumerate(answers(typed, n=2), start=1):
        typed.answered = number // 2
        assert typed.taken == (number + 1) // 2  # nobody waits for a line while another is to be answered
        got.append(answer)
    assert got == whole and rows == [1] * 5
    rows.clear()
    assert list(answers(lines, n=2, max_rows=3)) == whole and max(rows) <= 3


def test_what_was_asked_before_a_fault_is_answered(codec: Codec, tmp_path: Path) -> None:
    policy_with("llama", codec).save(tmp_path)
    config = SampleConfig(model=str(tmp_path), max_tokens=4, device="cpu")
    answers = sample_from(config, ["the cat", "a dog", "long " * 60, "x"])
    assert [next(answers)[0].text, next(answers)[0].text] == ["the cat", "a dog"]
    with pytest.raises(OperantError, match="48"):
        next(answers)


def test_flags_come_before_the_makers_word_and_that_before_ours() -> None:
    silent, qwen = Generation(), Generation(temperature=0.6, top_p=0.8, top_k=20)
    assert silent.settings("auto", "auto", "auto", chat=False) == (1.0, 1.0, 0)
    assert silent.settings("auto", None, "auto", chat=True) == (0.7, 0.9, 0)
    assert silent.settings(1.0, "auto", "auto", chat=True) == (1.0, 1.0, 0)  # who says one knows what they do
    assert qwen.settings("auto", "auto", None, chat=True) == (0.6, 0.8, 20)
    assert qwen.settings(0.0, "auto", 0, chat=True) == (0.0, 0.8, 0)
    assert Generation(top_k=5).settings("auto", "auto", "auto", chat=True) == (1.0, 1.0, 5)


def test_sample_and_serve_draw_as_the_makers_say(codec: Codec, tmp_path: Path) -> None:
    policy_with("llama", codec, temperature=0.4, top_p=0.7, do_sample=True).save(tmp_path)
    for flags, wanted in (({}, (0.4, 0.7, 0)), ({"temperature": 0.9, "top_k": 7}, (0.9, 0.7, 7))):
        config = SampleConfig(model=str(tmp_path), max_tokens=2, device="cpu", **flags)
        ((_, answer),) = sample_from(config, ["the cat"])
        assert (answer.sampling.temperature, answer.sampling.top_p, answer.sampling.top_k) == wanted
    policy = Policy.load(tmp_path, device="cpu")

    def asked(flags: dict[str, Any], **body: Any) -> tuple[float, float, int]:
        service: Any = SimpleNamespace(
            config=ServeConfig(**flags), codec=policy.codec, generation=policy.generation,
            written=SimpleNamespace(style=lambda codec: codec.usual_style),
        )  # fmt: skip
        request = ChatRequest(model="default", messages=[{"role": "user", "content": "a"}], **body)
        text = TextRequest(model="default", prompt="a", **body)
        drawn = completion_sampling(request, service, 16)
        assert drawn == dataclasses.replace(completion_sampling(text, service, 16), seed=drawn.seed)
        return drawn.temperature, drawn.top_p, drawn.top_k

    assert asked({}) == (0.4, 0.7, 0)
    assert asked({"temperature": 0.5, "top_k": 3}) == (0.5, 0.7, 3)
    assert asked({"temperature": 0.5, "top_k": 3}, temperature=1.0, top_p=1.0, top_k=0) == (1.0, 1.0, 0)
    assert asked({}, temperature=0) == (0.0, 0.7, 0)
