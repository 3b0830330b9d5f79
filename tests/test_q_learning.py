"""Double Q-learning: what the double estimator is for, its targets, the replay, and text reweighted by the values."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from test_loop import DEV, PROMPTS, assert_same_run, logged, quick, settings, share_of_even
from torch import Tensor

from operant import credit, objectives
from operant.action_values import supported
from operant.algorithms import resolve
from operant.cli import main
from operant.config import TrainConfig
from operant.estimate import Rollout
from operant.loop import train
from operant.policy import Policy
from operant.q_learning import QEstimator, ReplayBuffer
from operant.rollouts import read_logged
from operant.sampler import Sampler
from operant.surrogate import Surrogate
from operant.types import Completion, OperantError, Prompt, Sampling, Trajectory

# --- the double estimator --------------------------------------------------------------------------------------------


def test_on_a_chain_single_q_overestimates_and_the_double_estimator_does_not() -> None:
    """Sutton & Barto's example 6.7: from the start, going left leads to eight actions that pay −0.1 on average with
    deviation 1. The value of being there is −0.1; the largest of eight noisy means is far above it."""
    generator = torch.Generator().manual_seed(0)
    runs, actions, visits = 400, 8, 10
    # two estimates from two halves of what was seen, as two networks at two times see other noise
    seen = -0.1 + torch.randn(runs, 2, visits, actions, generator=generator, dtype=torch.float64)
    left, right = seen.mean(2).unbind(1)
    both = seen.mean((1, 2))
    everything = torch.ones_like(left, dtype=torch.bool)

    def value_of_going_left(values: Tensor) -> float:
        rewards, mask = torch.zeros(runs, 2, dtype=torch.float64), torch.ones(runs, 2, dtype=torch.bool)
        ahead = torch.stack([torch.zeros_like(values), values], 1)
        return float(credit.n_step_targets(rewards, ahead, mask, gamma=1.0, steps=1)[:, 0].mean())

    single = value_of_going_left(objectives.double_q_value(both, both, everything))
    double = value_of_going_left(objectives.double_q_value(left, right, everything))
    assert single > 0.15  # it would go left, and lose
    assert abs(double + 0.1) < 0.05


def test_the_argmax_is_held_to_what_was_tried() -> None:
    logits = torch.log(torch.tensor([[0.6, 0.3, 0.09, 0.01]]))
    assert supported(logits, 0.1).tolist() == [[True, True, True, False]]
    assert supported(logits, 0.0).all() and int(supported(logits, 1.0).sum()) == 1
    select, judge = torch.tensor([[0.0, 1.0, 2.0, 9.0]]), torch.tensor([[5.0, 6.0, 7.0, 8.0]])
    assert objectives.double_q_value(select, judge, supported(logits, 0.1)).tolist() == [7.0]
    assert objectives.double_q_value(select, judge, supported(logits, 0.2)).tolist() == [6.0]


def test_targets_by_hand() -> None:
    rewards = torch.tensor([[1.0, 2.0, 4.0], [8.0, 9.0, 9.0]], dtype=torch.float64)
    values = torch.tensor([[10.0, 20.0, 30.0], [40.0, 9.0, 9.0]], dtype=torch.float64)
    mask = torch.tensor([[True] * 3, [True, False, False]])

    def targets(steps: int, gamma: float | Tensor = 0.5) -> list[list[float]]:
        return credit.n_step_targets(rewards, values, mask, gamma=gamma, steps=steps).tolist()

    assert targets(1) == [[1 + 10, 2 + 15, 4], [8, 0, 0]]
    assert targets(2) == [[1 + 1 + 7.5, 2 + 2, 4], [8, 0, 0]]
    returns = credit.returns_to_go(rewards, mask, 0.5).tolist()
    assert targets(3) == targets(9) == returns
    assert targets(1, torch.full((2, 3), 0.5, dtype=torch.float64)) == targets(1)


def test_the_loss_is_half_the_square_and_the_target_is_a_constant() -> None:
    values = torch.tensor([1.0, 2.0], requires_grad=True)
    targets = torch.tensor([3.0, 3.0], requires_grad=True)
    objectives.q_loss(values, targets).sum().backward()
    assert values.grad is not None and values.grad.tolist() == [-2.0, -1.0] and targets.grad is None


# --- the replay ------------------------------------------------------------------------------------------------------


def row(name: str, tokens: list[int], rewards: list[float]) -> Trajectory:
    completion = Completion(name, name, "", np.array(tokens), np.zeros(len(tokens), np.int64))
    return Trajectory(Prompt(name, np.array([40, 41])), completion, np.array(rewards), np.isfinite(rewards))


def test_the_replay_keeps_the_newest_and_draws_by_error() -> None:
    buffer = ReplayBuffer.empty(3, 1.0)
    buffer.add([row(str(i), [60 + i], [float(i)]) for i in range(5)] + [row("x", [60], [float("nan")])])
    assert [t.prompt.id for t in buffer.rows] == ["2", "3", "4"] and buffer.weights == [1.0] * 3
    buffer.note([0, 1, 2], [6.0, 3.0, 1.0])
    buffer.add([row("5", [65], [1.0])])
    assert buffer.weights == [3.0, 1.0, 6.0]  # what is new counts as the worst so far
    places, weights = buffer.draw(6000, np.random.default_rng(0))
    shares = np.bincount(places, minlength=3) / 6000
    np.testing.assert_allclose(shares, [0.3, 0.1, 0.6], atol=0.03)
    # weighing by the importance gives every row the same say again
    mass = np.bincount(places, weights=weights.numpy(), minlength=3)
    np.testing.assert_allclose(mass / mass.sum(), [1 / 3] * 3, atol=0.05)
    assert float(weights.max()) == 1.0
    uniform = ReplayBuffer.empty(3, 0.0)
    uniform.load_json(json.loads(json.dumps(buffer.to_json())))
    assert [t.rewards.tolist() for t in uniform.rows] == [t.rewards.tolist() for t in buffer.rows]
    assert uniform.weights == buffer.weights and uniform.rows[2].completion.tokens.tolist() == [65]
    assert (uniform.draw(50, np.random.default_rng(0))[1] == 1).all()


# --- the heads -------------------------------------------------------------------------------------------------------


def rows_of(policy: Policy, count: int = 2) -> list[Trajectory]:
    groups = Sampler(policy).sample(PROMPTS, Sampling(max_tokens=4, seed=1), count)
    return [
        Trajectory(p, c, np.linspace(-1, 1, len(c.tokens)), np.ones(len(c.tokens), np.bool_))
        for p, group in zip(PROMPTS, groups, strict=True)
        for c in group
    ]


def over_average(outputs: Tensor, logprobs: Tensor, support: float = 0.05) -> Tensor:
    """What a head says of every token, less π_ref's mean of it among those likely enough; of the others nothing."""
    out = torch.zeros_like(logprobs)
    for row, said, probability in zip(out, outputs, logprobs.exp(), strict=True):
        inside = [a for a in range(len(row)) if probability[a] >= support * probability.max()]
        mean = sum(probability[a] * said[a] for a in inside) / sum(probability[a] for a in inside)
        for a in inside:
            row[a] = said[a] - mean
    return out


def awake(policy: Policy, beta: float = 0.5) -> Policy:
    policy.add_action_values(beta)
    assert policy.action_values is not None
    torch.manual_seed(2)
    for head in (policy.action_values.online, policy.action_values.target):
        torch.nn.init.normal_(head[-1].weight, std=0.3)  # type: ignore[arg-type]
    return policy


@pytest.mark.parametrize("family", ["gpt2", "t5", "bart", "llama"])
def test_what_is_said_is_the_reference_reweighted_by_the_values(
    family: str, make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    bare, policy = make_policy(family), awake(make_policy(family))
    assert policy.action_values is not None
    rows = rows_of(policy)
    batch = QEstimator(policy, TrainConfig(), {}).batch_of(rows)
    assert batch.behavior_logprobs is not None
    with torch.no_grad():
        expected = torch.log_softmax(bare.acting_logits(batch), -1)
        logits, hidden = policy.acting_states(batch)
        torch.testing.assert_close(torch.log_softmax(logits, -1), expected, atol=1e-5, rtol=1e-4)
        reweighted = torch.log_softmax(expected + over_average(policy.action_values.online(hidden), expected) / 0.5, -1)
        said = torch.log_softmax(policy.acting_logits(batch), -1)
        torch.testing.assert_close(said, reweighted, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(said, expected, atol=1e-2)
        # the sampler and the learner have the same policy
        torch.testing.assert_close(policy.logprobs(batch).logprobs, batch.behavior_logprobs, atol=1e-4, rtol=1e-4)
        policy.freeze_reference()
        with policy.as_reference():
            torch.testing.assert_close(
                torch.log_softmax(policy.acting_logits(batch), -1), expected, atol=1e-5, rtol=1e-4
            )
        policy.save(tmp_path / "m")
        loaded = Policy.load(tmp_path / "m", device="cpu")
        torch.testing.assert_close(loaded.acting_logits(batch), policy.acting_logits(batch))
    assert loaded.action_values is not None and loaded.action_values.beta == 0.5
    assert {id(p) for p in policy.trainable_parameters()} == {id(p) for p in policy.action_values.online.parameters()}


def test_new_heads_say_what_the_model_said(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    bare, policy = make_policy("gpt2"), make_policy("gpt2")
    policy.add_action_values(0.1)
    batch = QEstimator(policy, TrainConfig(), {}).batch_of(rows_of(bare))
    with torch.no_grad():
        assert torch.equal(policy.acting_logits(batch), bare.acting_logits(batch))
    assert policy.action_values is not None
    with pytest.raises(OperantError, match="no action values"):
        policy.action_values.restore(tmp_path)
    lora = make_policy("gpt2")
    lora.add_lora(rank=2)
    with pytest.raises(OperantError, match="--lora_rank"):
        lora.add_action_values(0.1)


@pytest.mark.parametrize("family", ["gpt2", "bart"])
@pytest.mark.parametrize("priority", [0.0, 1.0])
def test_a_batch_has_the_double_estimators_targets(
    family: str, priority: float, make_policy: Callable[..., Policy]
) -> None:
    policy = awake(make_policy(family))
    values = policy.action_values
    assert values is not None
    torch.nn.init.normal_(values.online[-1].weight, std=0.5)  # type: ignore[arg-type]
    values.support = 0.2
    config = TrainConfig(
        algorithm="double_q", n_step=2, gamma=0.9, support=0.2, prompts_per_step=5, group_size=1, target_every=100,
        priority=priority,
    )  # fmt: skip
    rows = rows_of(policy)
    state = {"q_batches": 1}  # no sync on this one
    estimator = QEstimator(policy, config, state, rows)
    batch, metrics = estimator(Rollout(rows, rows))
    assert batch.returns is not None and batch.tokens.shape[0] == 5
    with torch.no_grad():
        logits, hidden = policy.acting_states(batch)
        likely = torch.log_softmax(logits, -1)
        online, target = (
            head(hidden)[:, -1:] + over_average(head(hidden), likely, 0.2) for head in (values.online, values.target)
        )
    k = 0
    for i in range(5):
        columns = batch.action_mask[i].nonzero()[:, 0].tolist()
        reward = [float(batch.rewards[i, c]) for c in columns]  # type: ignore[index]
        ahead = []
        for j, c in enumerate(columns):
            likely = logits[k + j].softmax(-1)
            choice = [a for a in range(len(likely)) if likely[a] >= 0.2 * likely.max() or a == int(batch.tokens[i, c])]
            best = max(choice, key=lambda a: float(online[k + j, a]))
            ahead.append(float(target[k + j, best]))
        for t, c in enumerate(columns):
            expected = sum(0.9**n * reward[t + n] for n in range(2) if t + n < len(columns))
            expected += 0.81 * ahead[t + 2] if t + 2 < len(columns) else 0.0
            assert float(batch.returns[i, c]) == pytest.approx(expected, abs=1e-4)
        k += len(columns)
    loss, _ = Surrogate(config, resolve(config, dense=False), {})(policy, batch)
    taken = online.gather(-1, batch.tokens[batch.action_mask][:, None])[:, 0]
    torch.testing.assert_close(loss[batch.action_mask], 0.5 * (taken - batch.returns[batch.action_mask]) ** 2)
    assert ("replay" in state) == (priority > 0) and metrics["train/td_error"] > 0


# --- learning --------------------------------------------------------------------------------------------------------


def flat(policy: Policy) -> Policy:
    with torch.no_grad():  # flat enough to explore
        policy.model.get_input_embeddings().weight.mul_(0.2)
    return policy


@pytest.mark.parametrize("family", ["gpt2", "bart"])
def test_it_learns_a_reward_while_it_writes(family: str, make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    config = settings(
        tmp_path / "run", algorithm="double_q", steps=30, prompts_per_step=6, group_size=6, lr=3e-3, q_beta=0.05,
        epochs=2, minibatches=2, target_every=2, n_step=3,
    )  # fmt: skip
    policy = flat(make_policy(family))
    trunk = [p.detach().clone() for p in policy.model.parameters()]
    train(policy, PROMPTS, quick(share_of_even), config, quiet=True)
    rewards = logged(tmp_path / "run", "train/reward_mean")
    assert np.mean(rewards[-4:]) > np.mean(rewards[:4]) + 0.15
    assert all(torch.equal(a, b) for a, b in zip(trunk, policy.model.parameters(), strict=True))
    assert logged(tmp_path / "run", "train/replay")[-1] == 30 * 36


def test_a_resumed_run_is_the_run_that_never_stopped(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    def run(name: str, steps: int, resume: bool = False) -> None:
        config = settings(
            tmp_path / name, algorithm="double_q", steps=steps, resume=resume, priority=1.0, replay_capacity=20,
            target_every=2,
        )  # fmt: skip
        train(make_policy("gpt2"), PROMPTS, quick(share_of_even), config, quiet=True)

    run("whole", 5)
    run("parts", 3)
    run("parts", 5, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def write_log(policy: Policy, path: Path, rewarded: bool = True) -> None:
    prompts = [Prompt(text, policy.codec.encode_prompt(f"{text}\n"), text=text) for text in ("one", "two", "three")]
    with path.open("w") as file:
        for prompt, group in zip(
            prompts, Sampler(policy).sample(prompts, Sampling(max_tokens=5, seed=4), 60), strict=True
        ):
            for c in group:
                assert c.behavior_logprobs is not None
                line = {
                    "prompt": prompt.text, "tokens": c.tokens.tolist(), "completion": c.text,
                    "behavior_logprobs": c.behavior_logprobs.tolist(), "reward": share_of_even(prompt, c),
                }  # fmt: skip
                if not rewarded:
                    del line["reward"]
                file.write(json.dumps(line) + "\n")


@pytest.mark.parametrize("algorithm", ["double_q", "topr"])
def test_a_log_alone_makes_the_policy_better(
    algorithm: str, make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    policy = flat(make_policy("gpt2"))
    policy.save(tmp_path / "start")
    write_log(policy, tmp_path / "log.jsonl")
    rate = {"double_q": ["--lr", "3e-3", "--q_beta", "0.05", "--target_every", "2"], "topr": ["--lr", "3e-3"]}
    main(
        [
            "train", "--model", str(tmp_path / "start"), "--logged", str(tmp_path / "log.jsonl"),
            "--algorithm", algorithm, "--steps", "40", "--prompts_per_step", "12", "--group_size", "2",
            "--device", "cpu", "--max_tokens", "5", "--out", str(tmp_path / "run"), "--tensorboard", "false",
            "--reward", "length", *rate[algorithm],
        ]
    )  # fmt: skip

    def worth(of: Policy) -> float:
        groups = Sampler(of).sample(DEV, Sampling(max_tokens=5, seed=9), 40)
        return float(np.mean([share_of_even(p, c) for p, g in zip(DEV, groups, strict=True) for c in g]))

    assert worth(Policy.load(tmp_path / "run" / "model", device="cpu")) > worth(policy) + 0.1


def test_a_log_is_read_or_refused_in_one_line(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    policy = make_policy("gpt2")
    prompt = Prompt("p", np.array([50]))
    codec = policy.codec
    [(_, completion, reward)] = read_logged([{"completion": "ab", "reward": 2}], [prompt], codec)
    assert completion.tokens.tolist() == codec.encode("ab", eos=True).tolist() and reward == 2
    assert not completion.trainable and not completion.truncated
    for row_, told in (
        ({"completion": 3}, "no completion"),
        ({"tokens": [5, 6], "behavior_logprobs": [0.0]}, "1 behavior_logprobs for 2 tokens"),
    ):
        with pytest.raises(OperantError, match=told):
            read_logged([row_], [prompt], codec)
    for options, told in [
        ({"algorithm": "rloo", "logged": "x"}, "--algorithm topr or --algorithm areinforce or --algorithm double_q"),
        ({"algorithm": "double_q", "logged": "x", "environment": "y"}, "one of them"),
        ({"algorithm": "double_q", "kl_coef": 0.1}, "no policy gradient"),
        ({"algorithm": "double_q", "lora_rank": 4}, "leave --lora_rank out"),
        ({"algorithm": "rloo", "q_beta": 0.2}, "no action values"),
    ]:
        with pytest.raises(OperantError, match=told):
            resolve(TrainConfig(**options), dense=False)
    unknown = [(prompt, completion, None)]
    with pytest.raises(OperantError, match="no logged completion has a reward"):
        train(
            policy, reward=quick(lambda p, c: None), logged=unknown, quiet=True,
            config=settings(tmp_path / "run", algorithm="double_q", logged="x"),
        )  # fmt: skip
