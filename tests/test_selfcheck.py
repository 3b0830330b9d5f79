"""Families of models: what operant computes of each is what Transformers' own forward pass computes, row by row."""

from __future__ import annotations

import copy
import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import families
from benchmarks.families import FAMILIES, Family, checked, tiny_codec
from operant.data.batch import pack
from operant.data.text import Codec
from operant.models import selfcheck
from operant.models.policy import Policy
from operant.models.sampler import Sampler
from operant.models.selfcheck import Paths, check, find_paths
from operant.types import OperantError, Prompt, Sampling

NAMES = [family.name for family in FAMILIES]
# one of each kind: windows, two sorts of layers, states instead of caches, no layout, waves for positions, a wrapper
QUICK = ["Mistral", "Gemma 2", "Gemma 3, with pictures", "Qwen 3.5", "LFM 2", "Mamba", "Falcon", "Llama 4",
         "M2M-100, NLLB", "GPT-OSS", "Switch"]  # fmt: skip
SIZES = [(9, 7), (3, 12), (6, 5)]  # prompt and completion: within the windows of the tiny models, and beyond


@pytest.fixture(scope="module")
def tokens() -> Codec:
    return tiny_codec()


def family(name: str) -> Family:
    return FAMILIES[NAMES.index(name)]


def policy_of(name: str, codec: Codec) -> Policy:
    policy = Policy(family(name).model(), codec, device="cpu")
    policy.paths = check(policy)
    return policy


def true_logprobs(model: Any, prompt: np.ndarray, completion: np.ndarray) -> Tensor:
    """float64[T] from Transformers' own forward pass in double precision over this row alone."""
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            given = torch.tensor([[model.config.decoder_start_token_id, *completion[:-1].tolist()]])
            logits = model(input_ids=torch.from_numpy(prompt)[None], decoder_input_ids=given, use_cache=False).logits[0]
        else:
            whole = torch.from_numpy(np.concatenate([prompt, completion]))[None]
            logits = model(input_ids=whole, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits.double(), -1).gather(-1, torch.from_numpy(completion)[:, None])[:, 0]


def expect_true(policy: Policy) -> None:
    """Completions that the sampler drew, in rows that join and leave, have true log-probabilities: its own, those that
    the learner computes of them, and those of packed texts."""
    rng = np.random.default_rng(0)
    ids = np.arange(10, 250)
    prompts = [Prompt(id=str(i), tokens=rng.choice(ids, size)) for i, (size, _) in enumerate(SIZES)]
    sampler = Sampler(policy, max_rows=3)  # of six: the others join when these end
    for prompt, (_, length) in zip(prompts, SIZES, strict=True):
        sampler.submit(prompt, Sampling(max_tokens=length, seed=1), n=2)
    done = []
    while sampler.pending:
        done += sampler.step()
    asked = {prompt.id: prompt.tokens for prompt in prompts}
    try:
        model = copy.deepcopy(policy.model).double()
        true_logprobs(model, prompts[0].tokens, prompts[1].tokens)
    except RuntimeError:  # parts of it are float32 whatever it is
        model = policy.model
    true = [true_logprobs(model, asked[c.prompt_id], c.tokens) for c in done]
    for completion, expected in zip(done, true, strict=True):
        torch.testing.assert_close(torch.from_numpy(completion.model_logprobs).double(), expected, atol=2e-3, rtol=0)
    batch = policy.batch_of_sequences([asked[c.prompt_id] for c in done], [c.tokens for c in done])
    learned = policy.logprobs(batch).logprobs
    torch.testing.assert_close(learned[batch.action_mask].double(), torch.cat(true), atol=2e-3, rtol=0)
    learned.sum().backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in policy.trainable_parameters())
    if policy.has_encoder:
        return
    texts = [np.concatenate([asked[c.prompt_id], c.tokens]) for c in done]
    packed = pack(texts, 48, policy.codec.pad_id)
    assert packed.tokens.shape[0] < len(texts)
    out = policy.logprobs(packed).logprobs
    for number, text in enumerate(texts):
        row, columns = (packed.segment_ids == number).nonzero(as_tuple=True)
        expected = true_logprobs(model, text[:1], text[1:])
        torch.testing.assert_close(out[row, columns][1:].double(), expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize("name", QUICK)
def test_what_a_family_says_is_what_transformers_computes_row_by_row(name: str, tokens: Codec) -> None:
    expect_true(policy_of(name, tokens))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_family_is_true_or_refused_in_one_line(name: str, tokens: Codec) -> None:
    found = checked(family(name), tokens)
    if isinstance(found, str):
        assert "\n" not in found and len(found) < 250
        return
    policy = Policy(family(name).model(), tokens, device="cpu")
    policy.paths = found
    expect_true(policy)


def test_sixty_families_at_least_are_tried_and_stand_on_the_page() -> None:
    assert len(set(NAMES)) == len(NAMES) >= 60
    page = families.PAGE.read_text(encoding="utf-8")
    assert [name for name in NAMES if f"| {name} |" not in page] == []


@pytest.mark.slow
def test_the_page_is_what_the_command_writes() -> None:
    assert families.PAGE.read_text(encoding="utf-8") == families.page()


@pytest.mark.parametrize(
    ("name", "paths"),
    [
        ("Qwen 3.5", Paths(together=False, in_rows=False, packed=False)),
        ("LFM 2", Paths(together=False, in_rows=False, packed=False)),
        ("Falcon", Paths(in_rows=False)),
        ("Gemma 2", Paths()),
    ],
)
def test_the_ways_of_a_family(name: str, paths: Paths, tokens: Codec) -> None:
    assert check(Policy(family(name).model(), tokens, device="cpu")) == paths


def saved(name: str, codec: Codec, folder: Path) -> Path:
    Policy(family(name).model(), codec, device="cpu").save(folder)
    return folder


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where results are kept in this test; nothing is known yet."""
    monkeypatch.setenv("OPERANT_CACHE", str(tmp_path / "kept"))
    monkeypatch.setattr(selfcheck, "_FOUND", {})
    return tmp_path / "kept"


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The families that were checked."""
    done: list[str] = []

    def counted(policy: Policy) -> Paths:
        done.append(policy.config.model_type)
        return check(policy)

    monkeypatch.setattr(selfcheck, "check", counted)
    return done


def test_loading_finds_the_ways_once_and_keeps_them(
    kept: Path, checks: list[str], tokens: Codec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    folder = saved("LFM 2", tokens, tmp_path / "model")
    with caplog.at_level(logging.WARNING):
        policy = Policy.load(folder, device="cpu")
    assert policy.paths == Paths(together=False, in_rows=False, packed=False)
    assert caplog.messages == [f"{folder} is decoded row by row: the layers of a lfm2 need it"]
    with torch.no_grad():  # learning changes no form
        for parameter in policy.trainable_parameters():
            parameter.add_(0.01)
    policy.save(tmp_path / "learned")
    Policy.load(tmp_path / "learned", device="cpu")
    monkeypatch.setattr(selfcheck, "_FOUND", {})  # another process
    assert Policy.load(folder, device="cpu").paths == policy.paths
    assert checks == ["lfm2"]
    (file,) = (kept / "models").iterdir()
    file.write_text("{")  # broken: found out again
    monkeypatch.setattr(selfcheck, "_FOUND", {})
    assert Policy.load(folder, device="cpu").paths == policy.paths
    assert checks == ["lfm2", "lfm2"] and json.loads(file.read_text())["together"] is False


def test_another_form_is_checked_anew(kept: Path, tokens: Codec) -> None:
    one, other = (Policy(family(name).model(), tokens, device="cpu") for name in ("Falcon", "Falcon, ALiBi"))
    assert selfcheck.form_of(one) != selfcheck.form_of(other)
    assert selfcheck.form_of(one) == selfcheck.form_of(Policy(family("Falcon").model(seed=1), tokens, device="cpu"))


@pytest.mark.skipif(os.geteuid() == 0 and not Path("/proc/self/mem").exists(), reason="needs a folder it cannot write")
def test_a_folder_that_cannot_be_written_keeps_nothing_and_stops_nothing(
    kept: Path, checks: list[str], tokens: Codec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OPERANT_CACHE", str(tmp_path / "file"))  # a file: nothing can lie in it, whoever runs this
    folder = saved("Llama, SmolLM, TinyLlama", tokens, tmp_path / "model")
    before = sorted(path.name for path in folder.iterdir())
    for _ in range(2):
        assert Policy.load(folder, device="cpu").paths == Paths()
        monkeypatch.setattr(selfcheck, "_FOUND", {})
    assert checks == ["llama", "llama"]
    assert sorted(path.name for path in folder.iterdir()) == before


def test_a_family_that_looks_ahead_is_refused_in_one_line(kept: Path, tokens: Codec, tmp_path: Path) -> None:
    folder = saved("XLNet", tokens, tmp_path / "model")
    with pytest.raises(OperantError, match=r"is a xlnet, which operant cannot decode .*docs/models\.md") as caught:
        Policy.load(folder, device="cpu")
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_a_fault_in_each_way_is_found(tokens: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check is itself checked: what is broken is not taken."""
    policy = Policy(family("Mistral").model(), tokens, device="cpu")
    assert check(policy) == Paths()
    with monkeypatch.context() as patch:  # attention in one line of tokens knows of no window
        patch.setattr(Policy, "_window", property(lambda self: None))
        assert check(policy) == Paths(in_rows=False, packed=False)
    with monkeypatch.context() as patch:  # padding is read as text
        patch.setattr(Policy, "_attention", lambda self, batch: torch.ones_like(batch.tokens))
        assert not check(policy).packed
    extend = Policy._extend
    with monkeypatch.context() as patch:  # every row is one place further than it is

        def shifted(self: Policy, state: Any, tokens: Tensor, real: Tensor) -> Tensor:
            state.positions = state.positions + (state.mask.shape[1] > 0)
            return extend(self, state, tokens, real)

        patch.setattr(Policy, "_extend", shifted)
        assert check(policy) == Paths(together=False)


def test_memory_that_runs_out_is_no_fault_of_the_family(
    kept: Path, tokens: Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = Policy(family("Llama, SmolLM, TinyLlama").model(), tokens, device="cpu")

    def full(*arguments: Any, **named: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Policy, "prefill", full)
    with pytest.raises(torch.OutOfMemoryError):
        find_paths(policy, "here")
    assert not kept.exists()


def test_a_check_leaves_the_policy_as_it_was(tokens: Codec) -> None:
    policy = Policy(family("Gemma 2").model(), tokens, device="cpu")
    policy.model.train()
    before = copy.deepcopy(policy.model.state_dict())
    config, random = policy.config.to_dict(), torch.get_rng_state()
    check(policy)
    assert policy.model.training and policy.paths == Paths() and policy.config.to_dict() == config
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in policy.model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in policy.model.state_dict().items())


def test_a_model_with_longrope_reads_no_further_than_its_first_boundary(tokens: Codec) -> None:
    """Beyond it every token is read in another way, those before it too: what was drawn would have other odds."""
    policy = policy_of("Phi-3 with longrope", tokens)
    assert policy.config.max_position_embeddings == 64 and policy.max_length == 32
    expect_true(policy)
    prompt = Prompt(id="long", tokens=np.arange(10, 42))
    with pytest.raises(OperantError, match="32 tokens and the model's context 32"):
        Sampler(policy).submit(prompt, Sampling(max_tokens=4))
    (done,) = Sampler(policy).sample([Prompt(id="near", tokens=np.arange(10, 38))], Sampling(max_tokens=30))[0]
    assert len(done.tokens) <= 4


@pytest.mark.parametrize("name", ["LFM 2", "Switch"])
def test_a_family_that_is_read_row_by_row_learns_by_every_stage(name: str, tokens: Codec) -> None:
    """Logits of a batch, chunks of a large vocabulary and layers computed again are the same row by row."""
    policy = policy_of(name, tokens)
    batch = policy.batch_of_sequences([np.arange(20, 26), np.arange(30, 33)], [np.arange(40, 44), np.arange(50, 55)])
    expected = policy.logprobs(batch).logprobs
    with torch.no_grad():
        logits = policy.logits(batch)
    rows, columns = batch.action_mask.nonzero(as_tuple=True)
    picked = torch.log_softmax(logits[rows, columns], -1).gather(-1, batch.tokens[rows, columns][:, None])[:, 0]
    torch.testing.assert_close(picked, expected.detach()[rows, columns], atol=1e-4, rtol=0)
    if not policy.paths.padded:
        policy.add_critic()
        with pytest.raises(OperantError, match="without a critic"):
            policy.values(batch)
