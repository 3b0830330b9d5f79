from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FAMILIES, tiny_model
from torch import Tensor

from operant.data.batch import from_sequences, pack
from operant.data.text import Codec
from operant.models.policy import Policy, resolve_device
from operant.types import Batch, OperantError

PROMPTS = [np.array(p, np.int64) for p in ([41, 52, 63, 74, 85], [30], [33, 44, 55])]
COMPLETIONS = [np.array(c, np.int64) for c in ([50, 60], [70, 71, 72, 73, 74, 75], [80])]


def recomputed(model: Any, policy: Policy, prompt: np.ndarray, completion: np.ndarray) -> Tensor:
    """log-softmax float64[T, V] of one sequence alone: a plain forward without padding, cache or operant's code."""
    with torch.no_grad():
        if policy.family == "encoder-decoder":
            start = model.config.decoder_start_token_id
            decoder = torch.tensor([[start, *completion[:-1].tolist()]])
            logits = model(input_ids=torch.from_numpy(prompt)[None], decoder_input_ids=decoder).logits[0]
        else:
            logits = model(input_ids=torch.from_numpy(np.concatenate([prompt, completion]))[None]).logits[0]
            logits = logits[len(prompt) - 1 : -1]
    return torch.log_softmax(logits.double(), -1)


def double(policy: Policy) -> Any:
    return copy.deepcopy(policy.model).double().eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_batched_logprobs_are_those_of_each_sequence_alone(family: str, make_policy: Callable[..., Policy]) -> None:
    policy = make_policy(family)
    encoder = policy.family == "encoder-decoder"
    batch = from_sequences(PROMPTS, COMPLETIONS, encoder=encoder, pad_id=policy.codec.pad_id)
    out = policy.logprobs(batch, entropy=True)
    assert out.entropy is not None
    assert not out.logprobs[~batch.action_mask].any()
    model = double(policy)
    for i, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        table = recomputed(model, policy, prompt, completion)
        start = 0 if encoder else len(prompt)
        columns = slice(start, start + len(completion))
        expected = table[torch.arange(len(completion)), torch.from_numpy(completion)]
        assert torch.allclose(out.logprobs[i, columns].double(), expected, atol=1e-4)
        assert torch.allclose(out.entropy[i, columns].double(), -(table.exp() * table).sum(-1), atol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_logprobs_are_at_the_segments_temperature(family: str, make_policy: Callable[..., Policy]) -> None:
    policy = make_policy(family)
    encoder = policy.family == "encoder-decoder"
    batch = from_sequences(PROMPTS, COMPLETIONS, encoder=encoder, pad_id=policy.codec.pad_id)
    batch.temperature = torch.tensor([0.5, 1.0, 2.0])
    out = policy.logprobs(batch).logprobs
    for i, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        table = torch.log_softmax(recomputed(double(policy), policy, prompt, completion) / batch.temperature[i], -1)
        start = 0 if encoder else len(prompt)
        expected = table[torch.arange(len(completion)), torch.from_numpy(completion)]
        assert torch.allclose(out[i, start : start + len(completion)].double(), expected, atol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_sharing_a_groups_prompt_changes_neither_logprob_nor_gradient(
    family: str, attention: str, make_policy: Callable[..., Policy]
) -> None:
    policy = make_policy(family)
    policy.model.set_attn_implementation(attention)
    which = [0, 2, 0, 0, 1, 2]
    answers = [COMPLETIONS[i % 3] + i for i in range(6)]
    batch = from_sequences([PROMPTS[i] for i in which], answers, encoder=False, pad_id=policy.codec.pad_id)
    batch.temperature = torch.tensor([0.5, 1.0, 2.0, 1.0, 0.7, 1.0])
    calls = []
    handle = policy.model.register_forward_hook(
        lambda m, a, k, o: calls.append(k["input_ids"].numel()), with_kwargs=True
    )
    out = policy.logprobs(batch, entropy=True)
    handle.remove()
    assert calls == [sum(map(len, PROMPTS)) + sum(map(len, answers))]  # each of the three prompts once, no padding
    model = double(policy)
    for i, answer in enumerate(answers):
        prompt = PROMPTS[which[i]]
        table = torch.log_softmax(recomputed(model, policy, prompt, answer) / batch.temperature[i], -1)
        columns = slice(len(prompt), len(prompt) + len(answer))
        expected = table[torch.arange(len(answer)), torch.from_numpy(answer)]
        assert torch.allclose(out.logprobs[i, columns].double(), expected, atol=1e-4)
        assert out.entropy is not None
        assert torch.allclose(out.entropy[i, columns].double(), -(table.exp() * table).sum(-1), atol=1e-4)
    assert not out.logprobs[~batch.action_mask].any()

    def gradient(shared: bool) -> Tensor:
        policy.model.zero_grad()
        plain = copy.copy(batch)
        if not shared:
            plain.prompt_ids = None
        (policy.logprobs(plain).logprobs.sum() / 10).backward()
        return torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.grad is not None])

    whole, parts = gradient(False), gradient(True)
    assert float((whole - parts).norm() / whole.norm()) < 1e-4


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_what_prompts_begin_with_alike_is_computed_once(family: str, make_policy: Callable[..., Policy]) -> None:
    policy = make_policy(family)
    begin = np.arange(20) % 11 + 5
    ends = [[], [3], [3, 4, 5], [9, 4], [3]]  # the second prompt begins the third, and stands there twice
    prompts = [np.concatenate([begin, end]).astype(np.int64) for end in ends]
    prompts += [np.array([7, *begin]), begin[:15]]  # like none of them: from elsewhere, and too short to be worth it
    answers = [COMPLETIONS[i % 3] + i for i in range(len(prompts))]
    batch = from_sequences(prompts, answers, encoder=False, pad_id=policy.codec.pad_id)
    calls = []
    handle = policy.model.register_forward_hook(
        lambda m, a, k, o: calls.append(k["input_ids"].numel()), with_kwargs=True
    )
    out = policy.logprobs(batch).logprobs
    handle.remove()
    assert calls == [20 + 1 + 2 + 2 + 21 + 15 + sum(map(len, answers))]
    plain = copy.copy(batch)
    plain.prompt_ids = None
    model = double(policy)
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        table = torch.log_softmax(recomputed(model, policy, prompt, answer), -1)
        expected = table[torch.arange(len(answer)), torch.from_numpy(answer)]
        assert torch.allclose(out[i, len(prompt) : len(prompt) + len(answer)].double(), expected, atol=1e-4)
    gradients = []
    for one in (batch, plain):
        policy.model.zero_grad()
        (policy.logprobs(one).logprobs.sum() / 10).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.grad is not None]))
    assert float((gradients[0] - gradients[1]).norm() / gradients[1].norm()) < 1e-4


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_packing_changes_no_logprob(family: str, attention: str, make_policy: Callable[..., Policy]) -> None:
    policy = make_policy(family)
    policy.model.set_attn_implementation(attention)
    documents = [np.concatenate(pair) for pair in zip(PROMPTS, COMPLETIONS, strict=True)]
    packed = pack(documents, 11, policy.codec.pad_id)
    assert packed.tokens.shape[0] < len(documents)  # something shares a row
    out = policy.logprobs(packed).logprobs.detach()
    model = double(policy)
    for number in range(len(documents)):
        row, columns = (packed.segment_ids == number).nonzero(as_tuple=True)
        tokens = packed.tokens[row, columns].numpy()
        table = recomputed(model, policy, tokens[:1], tokens[1:])
        expected = table[torch.arange(len(tokens) - 1), torch.from_numpy(tokens[1:])]
        assert torch.allclose(out[row, columns][1:].double(), expected, atol=1e-4)
        assert float(out[row[0], columns[0]]) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_saving_and_loading_keeps_every_logprob_for_plain_transformers_too(
    family: str, make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    policy = make_policy(family)
    policy.save(tmp_path / "model")
    encoder = policy.family == "encoder-decoder"
    batch = from_sequences(PROMPTS, COMPLETIONS, encoder=encoder, pad_id=policy.codec.pad_id)
    loaded = Policy.load(tmp_path / "model", device="cpu")
    assert loaded.family == policy.family and loaded.codec.hash == policy.codec.hash
    assert torch.equal(loaded.logprobs(batch).logprobs, policy.logprobs(batch).logprobs)
    plain = (AutoModelForSeq2SeqLM if encoder else AutoModelForCausalLM).from_pretrained(tmp_path / "model").eval()
    mine = recomputed(policy.model, policy, PROMPTS[0], COMPLETIONS[0])
    assert torch.allclose(recomputed(plain, policy, PROMPTS[0], COMPLETIONS[0]), mine, atol=1e-6)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.decode(policy.codec.encode("the cat sat")) == "the cat sat"
    with torch.no_grad():
        for p in policy.trainable_parameters():
            p.add_(0.1)
    policy.restore(tmp_path / "model")
    assert torch.equal(loaded.logprobs(batch).logprobs, policy.logprobs(batch).logprobs)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_in_several_files_are_put_back_too(
    family: str, make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    policy = make_policy(family)
    policy.save(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    policy.model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert not (tmp_path / "model.safetensors").exists()
    before = [p.detach().clone() for p in policy.trainable_parameters()]
    shake(policy)
    policy.restore(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(before, policy.trainable_parameters(), strict=True))


def shake(policy: Policy, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in policy.trainable_parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5", "bart"])
def test_lora_trains_the_adapter_alone_and_its_folder_loads_in_peft(
    family: str, make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    policy = make_policy(family)
    encoder = policy.family == "encoder-decoder"
    batch = from_sequences(PROMPTS, COMPLETIONS, encoder=encoder, pad_id=policy.codec.pad_id)
    before = policy.logprobs(batch).logprobs.detach()
    full = sum(p.numel() for p in policy.model.parameters())
    policy.add_lora(rank=2)
    assert policy.is_lora and sum(p.numel() for p in policy.trainable_parameters()) < full / 2
    assert torch.allclose(policy.logprobs(batch).logprobs, before, atol=1e-5)
    shake(policy)
    after = policy.logprobs(batch).logprobs.detach()
    assert float((after - before).abs().max()) > 1e-2
    policy.save(tmp_path / "lora")
    loaded = Policy.load(tmp_path / "lora", device="cpu")
    assert loaded.is_lora and torch.allclose(loaded.logprobs(batch).logprobs, after, atol=1e-6)
    auto = AutoModelForSeq2SeqLM if encoder else AutoModelForCausalLM
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        peft = PeftModel.from_pretrained(auto.from_pretrained(tmp_path / "lora" / "base"), tmp_path / "lora").eval()
    assert torch.allclose(
        recomputed(peft, policy, PROMPTS[0], COMPLETIONS[0]),
        recomputed(policy.model, policy, PROMPTS[0], COMPLETIONS[0]), atol=1e-5,
    )  # fmt: skip
    shake(policy, seed=1)
    policy.restore(tmp_path / "lora")
    assert torch.allclose(policy.logprobs(batch).logprobs, after, atol=1e-6)


def test_a_lora_folder_can_be_moved(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    policy = make_policy("gpt2")
    policy.add_lora(rank=2)
    shake(policy)
    batch = from_sequences(PROMPTS, COMPLETIONS, encoder=False, pad_id=policy.codec.pad_id)
    expected = policy.logprobs(batch).logprobs.detach()
    policy.save(tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    assert torch.allclose(Policy.load(tmp_path / "there", device="cpu").logprobs(batch).logprobs, expected, atol=1e-6)


@pytest.mark.parametrize("lora", ["weights", "fresh adapter", "trained adapter"])
def test_the_reference_stays_as_it_was_frozen(lora: str, make_policy: Callable[..., Policy]) -> None:
    policy = make_policy("llama")
    batch = from_sequences(PROMPTS, COMPLETIONS, encoder=False, pad_id=policy.codec.pad_id)
    if lora != "weights":
        policy.add_lora(rank=2)
    if lora == "trained adapter":
        shake(policy)
    begin = policy.logprobs(batch).logprobs.detach()
    policy.freeze_reference()
    trainable = [name for name, p in policy.model.named_parameters() if p.requires_grad]
    assert trainable and not any("reference" in name for name in trainable)
    shake(policy, seed=1)
    moved = policy.logprobs(batch).logprobs
    assert float((moved - begin).abs().max().detach()) > 1e-2
    with policy.as_reference():
        reference = policy.logprobs(batch).logprobs
    assert torch.allclose(reference, begin, atol=1e-6) and not reference.requires_grad
    # and the policy is itself again, gradients included
    again = policy.logprobs(batch).logprobs
    assert torch.equal(again, moved)
    again.sum().backward()
    assert [name for name, p in policy.model.named_parameters() if p.requires_grad] == trainable
    assert all(p.grad is not None for p in policy.trainable_parameters())


def test_a_policy_without_a_frozen_reference_says_so(make_policy: Callable[..., Policy]) -> None:
    with pytest.raises(OperantError, match="freeze_reference"), make_policy("gpt2").as_reference():
        pass


@pytest.mark.parametrize("arch", ["gpt2", "llama", "t5", "mbart"])
def test_a_new_policy_is_the_same_for_the_same_seed_and_leaves_the_global_rng_alone(arch: str, codec: Codec) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again, other = (Policy.new(arch, "tiny", codec, max_length=32, seed=s, device="cpu") for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    weights = [dict(p.model.named_parameters()) for p in (first, again, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert any(not torch.equal(weights[0][name], weights[2][name]) for name in weights[0])
    assert first.max_length == 32


def test_bf16_runs_and_is_close_and_its_logprobs_are_float32(make_policy: Callable[..., Policy]) -> None:
    exact, half = make_policy("llama"), make_policy("llama", dtype="bf16")
    batch = from_sequences(PROMPTS, COMPLETIONS, encoder=False, pad_id=exact.codec.pad_id)
    with torch.no_grad():
        left, right = exact.logprobs(batch).logprobs, half.logprobs(batch).logprobs
    assert right.dtype == torch.float32
    assert 0 < float((left - right).abs().max()) < 0.3


def test_gradients_do_not_reach_into_padding_or_other_rows(make_policy: Callable[..., Policy]) -> None:
    policy = make_policy("gpt2")
    batch = from_sequences(PROMPTS, COMPLETIONS, encoder=False, pad_id=policy.codec.pad_id)
    junk = Batch(
        **{f: getattr(batch, f) for f in ("position_ids", "segment_ids", "action_mask", "weights", "denominator")},
        tokens=torch.where(batch.segment_ids >= 0, batch.tokens, 99),
    )
    assert torch.equal(policy.logprobs(junk).logprobs, policy.logprobs(batch).logprobs)


def test_faults_are_one_line_with_the_fix(codec: Codec, tmp_path: Path) -> None:
    with pytest.raises(OperantError, match="choose --arch"):
        Policy.new("gpt3", "tiny", codec)
    with pytest.raises(OperantError, match=r"no config\.json"):
        Policy.load(tmp_path)
    file = tmp_path / "weights.bin"
    file.write_bytes(b"")
    with pytest.raises(OperantError, match="is a file"):
        Policy.load(file)
    bare = tmp_path / "bare"
    tiny_model("gpt2", codec).save_pretrained(bare)
    with pytest.raises(OperantError, match="tokenizer") as caught:
        Policy.load(bare, device="cpu")
    assert "\n" not in str(caught.value)
    large = Codec.train_bpe(["some other words " * 3, "a b c d e f g"], vocab_size=400)
    model = tiny_model("gpt2", codec)
    model.resize_token_embeddings(100)
    with pytest.raises(OperantError, match=r"the tokenizer has .* tokens but the model only 100"):
        Policy(model, large, device="cpu")
    with pytest.raises(OperantError, match="--device auto"):
        resolve_device("cuda:77")
    with pytest.raises(OperantError, match="choose float32, bf16"):
        Policy(tiny_model("gpt2", codec), codec, device="cpu", dtype="fp8")
