"""What fits into memory: micro-batches that are cut, halved and sized, and layers that are computed again."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from program import Program
from torch import Tensor

from operant import cli
from operant.algorithms import learner as learning
from operant.algorithms.learner import Learner, Sgd, StepLoss, logprobs_of
from operant.algorithms.objectives import negative_log_likelihood
from operant.algorithms.trust_region import TrustRegion
from operant.models.folder import count_weights
from operant.models.memory import Way, bytes_kept, expect_room, expect_room_to_learn, free_memory, is_out_of_memory
from operant.models.policy import Policy
from operant.models.sampler import Sampler
from operant.types import Batch, OperantError, Prompt, Sampling

ANSWERS = [np.array([4, 5, 6, 8]), np.array([7, 5]), np.array([9, 11, 10, 12, 4]), np.array([8]), np.array([4, 9])]
PROMPTS = [np.array([5, 6, 7]), np.array([5, 6, 7]), np.array([9, 4]), np.array([9, 4]), np.array([12])]
RAN_OUT = (
    "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
)


def batch_for(policy: Policy) -> Batch:
    return policy.batch_of_sequences(PROMPTS, ANSWERS)


def likelihood(policy: Policy, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    logprobs = policy.logprobs(batch).logprobs
    return negative_log_likelihood(logprobs), {"seen": logprobs.detach().sum()}


class Memory:
    """A loss that runs out of memory with more than `rows` rows, in the middle of its backward pass if asked."""

    def __init__(self, rows: int, *, backward: bool = False, error: Callable[[str], Exception] = RuntimeError) -> None:
        self.rows, self.backward, self.error = rows, backward, error
        self.sizes: list[int] = []

    def __call__(self, policy: Policy, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        self.sizes.append(len(batch.tokens))
        loss, sums = likelihood(policy, batch)
        if len(batch.tokens) <= self.rows:
            return loss, sums
        if not self.backward:
            raise self.error(RAN_OUT)
        loss.register_hook(self.fail)
        # what is learned has a part of its gradient already when the rest runs out
        return loss + sum(p.sum() for p in policy.trainable_parameters()), sums

    def fail(self, gradient: Tensor) -> None:
        raise self.error(RAN_OUT)


def stepped(policy: Policy, loss: Any, **options: Any) -> tuple[Learner, Any, list[str]]:
    own = Learner(policy, lr=0.1, rule=Sgd(policy.trainable_parameters(), 0.1), **options)
    said: list[str] = []
    own.say = said.append
    return own, own.step([batch_for(policy)], loss), said


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("family", ["llama", "bart"])
def test_running_out_of_memory_halves_the_micro_batches_and_changes_nothing_else(
    family: str, backward: bool, make_policy: Callable[..., Policy]
) -> None:
    whole, parted = make_policy(family), make_policy(family)
    expected = stepped(whole, likelihood)[1]
    memory = Memory(2, backward=backward)
    own, found, said = stepped(parted, memory)
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)
    assert found.extra["seen"] == pytest.approx(expected.extra["seen"], rel=1e-5) and found.tokens == expected.tokens
    for name, weight in parted.model.named_parameters():
        torch.testing.assert_close(weight, dict(whole.model.named_parameters())[name], rtol=1e-4, atol=1e-6)
    assert len(said) == 1 and said[0].startswith("out of memory: micro-batches are smaller from here on")
    # the next step begins where this one ended, and says nothing more
    memory.sizes.clear()
    own.step([batch_for(parted)], memory)
    assert max(memory.sizes) <= 2 and len(said) == 1


def test_a_resumed_learner_goes_on_with_the_micro_batches_that_fitted(make_policy: Callable[..., Policy]) -> None:
    own = stepped(make_policy("llama"), Memory(2))[0]
    again = Learner(own.policy, lr=0.1, rule=Sgd(own.policy.trainable_parameters(), 0.1), sized=True)
    again.load_state_dict(copy.deepcopy(own.state_dict()))
    memory = Memory(2)
    again.step([batch_for(make_policy("llama"))], memory)
    assert max(memory.sizes) <= 2, "it ran out of memory a second time"


def test_a_row_that_does_not_fit_alone_is_one_line_and_the_weights_stay(make_policy: Callable[..., Policy]) -> None:
    policy = make_policy("llama")
    before = copy.deepcopy(policy.model.state_dict())
    with pytest.raises(OperantError, match=r"1 rows of \d tokens, which cannot be parted; use --activation_checkp"):
        stepped(policy, Memory(0, error=torch.OutOfMemoryError))
    assert all(torch.equal(before[name], weight) for name, weight in policy.model.state_dict().items())


def test_other_errors_are_not_taken_for_memory(make_policy: Callable[..., Policy]) -> None:
    with pytest.raises(ValueError, match="DefaultCPUAllocator"):
        stepped(make_policy("llama"), Memory(2, error=ValueError))
    assert not is_out_of_memory(RuntimeError("a shape is wrong")) and is_out_of_memory(MemoryError())


def test_log_probabilities_of_a_batch_that_does_not_fit_come_in_parts(
    make_policy: Callable[..., Policy], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy("llama")
    batch, plain = batch_for(policy), policy.logprobs
    expected = logprobs_of(policy, batch, 4096)

    def scarce(piece: Batch, *arguments: Any) -> Any:
        if len(piece.tokens) > 2:
            raise RuntimeError(RAN_OUT)
        return plain(piece, *arguments)

    monkeypatch.setattr(policy, "logprobs", scarce)
    torch.testing.assert_close(logprobs_of(policy, batch, 4096), expected)


def test_micro_batches_are_sized_by_what_is_free_and_by_the_model(
    make_policy: Callable[..., Policy], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice as much that is free is twice as many tokens; a model that keeps less has more."""
    policy = make_policy("llama")
    weights = sum(4 * p.numel() * p.element_size() for p in policy.trainable_parameters())
    rooms = []
    for megabytes, again in ((1, False), (2, False), (1, True)):
        monkeypatch.setattr(learning, "free_memory", lambda device, m=megabytes: weights + m * 10**6)
        policy.recomputes = again
        own = stepped(policy, likelihood, sized=True)[0]
        rooms.append(own.room.tokens)
    assert rooms[0] is not None and rooms[2] is not None
    assert rooms[1] == 2 * rooms[0] and rooms[2] > rooms[0]
    monkeypatch.setattr(learning, "free_memory", lambda device: weights + 40_000)
    own, _, said = stepped(make_policy("llama"), memory := Memory(9), sized=True)
    assert len(memory.sizes) > 2 and own.room.tokens in (1, 2, 4, 8, 16)
    assert len(said) == 1 and said[0].startswith("micro-batches of at most ")


def test_measuring_draws_nothing_that_the_step_would_have_drawn(make_policy: Callable[..., Policy]) -> None:
    plain, sized = (make_policy("gpt2", dropout=0.3) for _ in range(2))
    found = []
    for policy in (plain, sized):
        policy.model.train()
        torch.manual_seed(0)
        found.append(stepped(policy, likelihood, sized=policy is sized)[1].loss)
    assert found[0] == found[1]


def test_there_is_some_memory_free() -> None:
    free = free_memory(torch.device("cpu"))
    assert free is None or free > 2**20


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("family", ["gpt2", "llama", "t5", "bart"])
def test_recomputed_layers_have_the_same_gradients_and_keep_less(
    family: str, dropout: float, make_policy: Callable[..., Policy]
) -> None:
    """The tokens of the batch stand once, and attend in rows: in the backward pass too."""
    policy = make_policy(family, dropout=dropout)
    policy.model.train(dropout > 0)
    batch = batch_for(policy)
    found, kept = [], []
    for policy.recomputes in (False, True):
        torch.manual_seed(0)
        StepLoss(policy, [batch], likelihood)()
        found.append({name: p.grad for name, p in policy.model.named_parameters()})
        policy.model.zero_grad(set_to_none=True)
        kept.append(bytes_kept(lambda: policy.logprobs(batch).logprobs, policy.model.parameters()))
    for name, gradient in found[0].items():
        assert torch.equal(found[1][name], gradient), name
    assert kept[1] < 0.6 * kept[0], kept


def test_a_recomputed_model_still_decodes_and_a_trust_region_refuses_it(make_policy: Callable[..., Policy]) -> None:
    policy = make_policy("llama")
    expected = policy.prefill([PROMPTS[0]])[1]
    policy.recomputes = True
    assert torch.equal(policy.prefill([PROMPTS[0]])[1], expected)
    with pytest.raises(OperantError, match="leave --activation_checkpointing out"):
        TrustRegion(policy)


def test_the_program_says_in_one_line_that_memory_ran_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def sample(config: Any) -> None:
        raise RuntimeError(RAN_OUT)

    monkeypatch.setitem(cli.COMMANDS, "sample", sample)
    with pytest.raises(SystemExit, match="1"):
        cli.main(["sample", "--model", "nothing"])
    line = capsys.readouterr().err
    assert line.startswith("operant: out of memory; ") and line.count("\n") == 1


# --- a model that cannot fit -------------------------------------------------------------------------------------

CPU = torch.device("cpu")


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Let so many bytes of memory be free."""
    return lambda free: monkeypatch.setattr("operant.models.memory.free_memory", lambda device: int(free))


def headers_of(folder: Path, weights: int, files: int = 1) -> Path:
    """A folder whose safetensors files have the headers of so many float16 weights, and nothing that is on a disk."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    names = [f"model-{i}.safetensors" for i in range(files)] if files > 1 else ["model.safetensors"]
    for name in names:
        count = weights // files
        facts = {"w": {"dtype": "F16", "shape": [count], "data_offsets": [0, 2 * count]}}
        header = json.dumps(facts).encode()
        with (folder / name).open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + 2 * count)
    if files > 1:
        shards = {"weight_map": {f"w{i}": name for i, name in enumerate(names)}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(shards))
    return folder


def test_weights_are_counted_from_the_headers_of_files(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    policy = make_policy("llama")
    whole = sum(p.numel() for p in policy.model.parameters())
    policy.save(tmp_path / "whole")
    policy.add_lora(2)
    policy.save(tmp_path / "adapter")  # its base is in the folder
    again = Policy.load(tmp_path / "whole", device="cpu")
    again.add_lora(2)
    again.save(tmp_path / "beside")  # its base is the folder of before
    for name in ("whole", "adapter", "beside"):
        assert count_weights(tmp_path / name) == whole, name
    torch.save({"w": torch.zeros(1000)}, headers_of(tmp_path / "old", 8) / "pytorch_model.bin")
    (tmp_path / "old" / "model.safetensors").unlink()
    assert count_weights(tmp_path / "old") in range(1000, 1500)
    assert count_weights(headers_of(tmp_path / "parts", 7 * 10**9, files=4)) == 7 * 10**9
    (tmp_path / "parts" / "model-2.safetensors").unlink()
    assert count_weights(tmp_path / "parts") is None
    for name in (tmp_path / "none", "some/where", "no name"):
        assert count_weights(name) is None, name
    (tmp_path / "whole" / "model.safetensors").write_bytes(b"nothing")
    assert count_weights(tmp_path / "whole") is None


def test_what_cannot_fit_is_refused_with_what_would(only: Callable[[float], None], tmp_path: Path) -> None:
    big = headers_of(tmp_path / "big", 7 * 10**9)
    ways = [Way("", 20), Way("--lora_rank 8", 8)]
    only(140e9)
    expect_room(big, ways, CPU)
    only(139e9)
    with pytest.raises(OperantError) as found:
        expect_room(big, ways, CPU)
    assert str(found.value) == (
        f"{big} has 7.0 billion weights, which take 140.0 GB at least, and 139.0 GB of memory are free; --lora_rank 8 "
        "takes 56.0 GB"
    )
    only(20e9)
    with pytest.raises(OperantError, match=r"; a model of 2\.5 billion weights would fit with --lora_rank 8$"):
        expect_room(big, ways, CPU)
    expect_room(tmp_path / "none", ways, CPU)


@pytest.mark.parametrize(
    ("rank", "dtype", "gigabytes", "told"),
    [
        (0, "float32", 112, ""),
        (0, "float32", 111, "--lora_rank 8 takes 28.0 GB"),
        (0, "float32", 27, "--lora_rank 8 --dtype bf16-true takes 14.0 GB"),
        (8, "float32", 28, ""),
        (8, "float32", 27, "--dtype bf16-true takes 14.0 GB"),
        (8, "bf16-true", 14, ""),
        (8, "bf16-true", 7, "a model of 3.5 billion weights would fit"),
    ],
)
def test_a_stage_refuses_a_model_that_it_cannot_train(
    rank: int, dtype: str, gigabytes: float, told: str, only: Callable[[float], None], tmp_path: Path
) -> None:
    big = headers_of(tmp_path / "big", 7 * 10**9)
    only(gigabytes * 1e9)
    if not told:
        expect_room_to_learn(big, rank, dtype, CPU)
        return
    with pytest.raises(OperantError, match=f"; {told}$"):
        expect_room_to_learn(big, rank, dtype, CPU)


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("train --reward chrf --data ROWS --dev_data ROWS", "would fit with --lora_rank 8 --dtype bf16-true"),
        ("sft --data ROWS", "would fit with --lora_rank 8 --dtype bf16-true"),
        ("prefer --data ROWS", "would fit with --lora_rank 8 --dtype bf16-true"),
        ("serve --port 0", "a model of 2.5 billion weights would fit with --dtype bf16-true"),
        ("serve --port 0 --dtype bf16-true", "a model of 2.5 billion weights would fit"),
        (
            "serve --port 0 --lora_rank 0",
            "a model of 2.5 billion weights would fit with --lora_rank 8 --dtype bf16-true",
        ),
    ],
)
def test_the_program_says_before_loading_that_a_model_cannot_fit(
    command: str, told: str, only: Callable[[float], None], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b", "chosen": "b", "rejected": "c", "references": ["b"]}\n' * 4)
    big = headers_of(tmp_path / "big", 7 * 10**9)
    only(10e9)
    line = Program(capsys).fault(
        *command.replace("ROWS", str(rows)).split(), "--model", big, "--device", "cpu",
        *(["--root", tmp_path / "live"] if command.startswith("serve") else []),
    )  # fmt: skip
    assert f"{big} has 7.0 billion weights" in line and told in line and "of memory are free" in line


# --- weights in bf16 ---------------------------------------------------------------------------------------------


def half(make_policy: Callable[..., Policy], family: str, folder: Path, rank: int = 0) -> Policy:
    make_policy(family).save(folder)
    policy = Policy.load(folder, device="cpu", dtype="bf16-true")
    if rank:
        policy.add_lora(rank)
    policy.model.eval()
    return policy


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_weights_are_really_in_bf16_and_say_what_those_in_float32_say_as_nearly_as_they_can(
    family: str, make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    policy, exact = half(make_policy, family, tmp_path), make_policy(family)
    assert {p.dtype for p in policy.model.parameters()} == {torch.bfloat16}
    batch = batch_for(exact)
    found, expected = policy.logprobs(batch).logprobs, exact.logprobs(batch).logprobs
    assert found.dtype == torch.float32
    assert 0 < float((found - expected).abs().max().detach()) < 0.5
    # the sampler draws from what the learner learns
    sampling = Sampling(temperature=1.0, max_tokens=6, seed=3)
    completion = Sampler(policy).sample([Prompt("a", PROMPTS[0])], sampling)[0][0]
    with torch.no_grad():
        own = policy.logprobs(policy.batch_of_sequences([PROMPTS[0]], [completion.tokens])).logprobs[0]
    assert completion.behavior_logprobs is not None
    drawn = torch.from_numpy(completion.behavior_logprobs)
    torch.testing.assert_close(own[-len(drawn) :], drawn, rtol=0.05, atol=0.05)


def test_an_adapter_beside_weights_in_bf16_is_float32_learns_and_comes_back(
    make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    policy = half(make_policy, "llama", tmp_path / "base", rank=2)
    learned = policy.trainable_parameters()
    frozen = {name: p.clone() for name, p in policy.model.named_parameters() if not p.requires_grad}
    assert {p.dtype for p in learned} == {torch.float32} and {p.dtype for p in frozen.values()} == {torch.bfloat16}
    before = [p.detach().clone() for p in learned]
    batch = batch_for(policy)
    own = Learner(policy, lr=1e-2)
    losses = [own.step([batch], likelihood).loss for _ in range(3)]
    assert losses[2] < losses[0]
    assert any(not torch.equal(p, b) for p, b in zip(learned, before, strict=True))
    assert all(torch.equal(p, frozen[name]) for name, p in policy.model.named_parameters() if name in frozen)
    policy.save(tmp_path / "adapter")
    again = Policy.load(tmp_path / "adapter", device="cpu", dtype="bf16-true")
    again.model.eval()
    assert {p.dtype for p in again.trainable_parameters()} == {torch.float32}
    assert torch.equal(again.logprobs(batch).logprobs, policy.logprobs(batch).logprobs)
    assert not (tmp_path / "adapter" / "base").exists(), "the base was copied"


def test_what_needs_float32_weights_refuses_bf16_by_name(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    policy = half(make_policy, "llama", tmp_path)
    with pytest.raises(OperantError, match="too coarse to learn by small steps; add --lora_rank 8"):
        Learner(policy, lr=1e-2)
    with pytest.raises(OperantError, match="leave --dtype bf16-true out"), policy.full_precision():
        pass
