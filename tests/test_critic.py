"""The critic: what its columns mean, for every family; what it moves; and that a saved one changes nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import FAMILIES
from torch import Tensor

from operant.algorithms.learner import Learner
from operant.data.batch import from_sequences, select_rows
from operant.models.critic import FILE
from operant.models.policy import Policy
from operant.types import Batch, OperantError

PROMPTS = [np.arange(40, 43), np.arange(50, 55), np.arange(40, 43)]
ANSWERS = [np.array([60, 61, 62, 63]), np.array([70, 71]), np.array([65, 61, 66])]


def batch_of(policy: Policy, prompts: list[np.ndarray] = PROMPTS, answers: list[np.ndarray] = ANSWERS) -> Batch:
    return from_sequences(
        prompts, answers, encoder=policy.family == "encoder-decoder", pad_id=policy.codec.pad_id
    )  # fmt: skip


def awake(policy: Policy, *, separate: bool = True) -> Policy:
    """With a head that is not zero, or every value would be."""
    policy.add_critic(separate=separate)
    assert policy.critic is not None
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        policy.critic.head.weight.copy_(torch.randn(policy.critic.head.weight.shape, generator=generator))
        policy.critic.head.bias.fill_(0.3)
    return policy


def loss_of(policy: Policy, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    return (policy.values(batch)[:, :-1] - 1.0) ** 2, {}


@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_column_is_the_value_of_what_stands_before_its_token(
    family: str, separate: bool, make_policy: Callable[..., Policy]
) -> None:
    policy = awake(make_policy(family), separate=separate)
    with torch.no_grad():
        whole = policy.values(batch_of(policy))
        assert whole.shape == (3, batch_of(policy).tokens.shape[1] + 1)
        for row, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
            offset = 0 if policy.family == "encoder-decoder" else len(prompt)
            seen = []
            for t in range(len(answer) + 1):  # after the last token too: what truncation bootstraps from
                column = offset + t
                cut = policy.values(batch_of(policy, [prompt], [answer[:t]]))
                torch.testing.assert_close(whole[row, column], cut[0, column], atol=2e-5, rtol=1e-4)
                seen.append(round(float(cut[0, column]), 4))
            assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_rows_and_padding_do_not_reach_each_other(family: str, make_policy: Callable[..., Policy]) -> None:
    policy = awake(make_policy(family))
    batch = batch_of(policy)
    with torch.no_grad():
        whole, one = policy.values(batch), policy.values(select_rows(batch, torch.tensor([1])))
    torch.testing.assert_close(whole[1, : one.shape[1]], one[0], atol=1e-5, rtol=1e-4)


def test_a_new_critic_thinks_nothing_better_than_another(make_policy: Callable[..., Policy]) -> None:
    policy = make_policy("gpt2")
    with pytest.raises(OperantError, match="--algorithm ppo"):
        policy.values(batch_of(policy))
    assert policy.critic_parameters() == []
    policy.add_critic()
    assert not policy.values(batch_of(policy)).any()


@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("family", ["llama", "bart"])
def test_only_a_shared_critic_moves_the_policy(family: str, separate: bool, make_policy: Callable[..., Policy]) -> None:
    policy = awake(make_policy(family), separate=separate)
    batch = batch_of(policy)
    before = [p.detach().clone() for p in policy.model.parameters()]
    with torch.no_grad():
        first = float(loss_of(policy, batch)[0].sum())
    learner = Learner(policy, lr=1e-2)
    for _ in range(20):
        learner.step([batch], loss_of)
    with torch.no_grad():
        assert float(loss_of(policy, batch)[0].sum()) < first / 2
    same = all(torch.equal(a, b) for a, b in zip(before, policy.model.parameters(), strict=True))
    assert same == separate


def test_the_critic_has_its_own_rate_and_its_own_clipping(make_policy: Callable[..., Policy]) -> None:
    def scaled(factor: float) -> tuple[list[Tensor], list[Tensor]]:
        policy = awake(make_policy("gpt2"))
        learner = Learner(policy, lr=1e-3, critic_lr=0.0, weight_decay=0.0, max_grad_norm=0.1)

        def loss(policy: Policy, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
            return -policy.logprobs(batch).logprobs + factor * loss_of(policy, batch)[0], {}

        critic = [p.detach().clone() for p in policy.critic_parameters()]
        learner.step([batch_of(policy)], loss)
        assert all(torch.equal(a, b) for a, b in zip(critic, policy.critic_parameters(), strict=True))
        return list(policy.model.parameters()), policy.critic_parameters()

    small, large = scaled(1.0)[0], scaled(1e6)[0]
    assert all(torch.equal(a, b) for a, b in zip(small, large, strict=True))


def test_a_sick_critic_skips_the_step(make_policy: Callable[..., Policy]) -> None:
    policy = awake(make_policy("gpt2"))
    learner = Learner(policy, lr=1e-2)
    handle = policy.critic_parameters()[0].register_hook(lambda gradient: gradient * float("nan"))
    stats = learner.step([batch_of(policy)], loss_of)
    handle.remove()
    assert stats.skipped and "critic" in stats.reason


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT's own loading uses what Transformers deprecates
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("family", ["gpt2", "t5", "bart"])
def test_it_is_saved_beside_the_model_and_restored_in_place(
    family: str, separate: bool, lora: bool, make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    def made() -> Policy:
        policy = make_policy(family)
        if lora:
            policy.add_lora(rank=2, seed=1)
        return awake(policy, separate=separate)

    policy = made()
    learner = Learner(policy, lr=1e-2)
    for _ in range(3):
        learner.step([batch_of(policy)], loss_of)
    policy.save(tmp_path / "m")
    assert (tmp_path / "m" / FILE).exists()
    other = made()
    kept = [p.data_ptr() for p in other.critic_parameters()]
    with torch.no_grad():
        wanted = policy.values(batch_of(policy))
        assert not torch.equal(other.values(batch_of(other)), wanted)
        other.restore(tmp_path / "m")
        assert torch.equal(other.values(batch_of(other)), wanted)
    assert kept == [p.data_ptr() for p in other.critic_parameters()]
    if not lora:
        auto = transformers.AutoModelForCausalLM if family == "gpt2" else transformers.AutoModelForSeq2SeqLM
        plain = auto.from_pretrained(str(tmp_path / "m"), dtype=torch.float32)
        for name, tensor in policy.model.state_dict().items():
            assert torch.equal(plain.state_dict()[name], tensor)
    assert Policy.load(tmp_path / "m", device="cpu").critic is None


@pytest.mark.parametrize("separate", [True, False])
def test_a_loaded_policy_goes_on_with_the_critic_that_lies_beside_it(
    separate: bool, make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    policy = awake(make_policy("gpt2"), separate=separate)
    policy.save(tmp_path / "m")
    with torch.no_grad():
        wanted = policy.values(batch_of(policy))
    again = Policy.load(tmp_path / "m", device="cpu")
    again.add_critic(separate=separate)
    assert torch.equal(again.values(batch_of(again)), wanted) and bool(wanted.any())
    other = Policy.load(tmp_path / "m", device="cpu")
    other.add_critic(separate=not separate)  # of another kind: from nothing
    assert not other.values(batch_of(other)).any()


def test_a_folder_without_a_critic_or_with_another_one_is_refused(
    make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    make_policy("gpt2").save(tmp_path / "plain")
    with pytest.raises(OperantError, match="no critic"):
        awake(make_policy("gpt2")).restore(tmp_path / "plain")
    awake(make_policy("gpt2"), separate=False).save(tmp_path / "shared")
    with pytest.raises(OperantError, match="--critic"):
        awake(make_policy("gpt2")).restore(tmp_path / "shared")
