"""Double Q-learning: what the double estimator is for, its targets, its buffer, and text reweighted by the values."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import DEV, PROMPTS, assert_same_run, logged, quick, settings, share_of_even
from torch import Tensor

from operant.algorithms import credit, objectives
from operant.algorithms.estimator import Rollout
from operant.algorithms.q_learning import QEstimator, ReplayBuffer
from operant.algorithms.surrogate import Surrogate
from operant.algorithms.table import resolve
from operant.cli import main
from operant.config import TrainConfig
from operant.models.policy import Policy
from operant.models.sampler import Sampler
from operant.rewards.seam import missing_trajectory
from operant.rl.logged import read_logged
from operant.rl.loop import train
from operant.types import Batch, Completion, OperantError, Prompt, Sampling, Trajectory

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
    assert objectives.supported(logits, 0.1).tolist() == [[True, True, True, False]]
    assert objectives.supported(logits, 0.0).all() and int(objectives.supported(logits, 1.0).sum()) == 1
    select, judge = torch.tensor([[0.0, 1.0, 2.0, 9.0]]), torch.tensor([[5.0, 6.0, 7.0, 8.0]])
    assert objectives.double_q_value(select, judge, objectives.supported(logits, 0.1)).tolist() == [7.0]
    assert objectives.double_q_value(select, judge, objectives.supported(logits, 0.2)).tolist() == [6.0]


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


# --- the replay buffer -----------------------------------------------------------------------------------------------


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


def awake(policy: Policy) -> Policy:
    """As a run would begin, and then each part moved away from the others."""
    policy.freeze_reference()
    policy.add_critic()
    assert policy.critic is not None
    torch.manual_seed(2)
    torch.nn.init.normal_(policy.critic.head.weight, std=0.3)
    policy.add_target_network()
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    torch.nn.init.normal_(policy.critic.head.weight, std=0.3)
    return policy


@torch.no_grad()
def parts(policy: Policy, batch: Batch) -> tuple[Tensor, Tensor]:
    """(V float64[K], log π float64[K, V]) by the paths that compute every column."""
    where = batch.action_mask.nonzero(as_tuple=True)
    return policy.values(batch)[where].double(), policy.logits(batch)[where].double().log_softmax(-1)


@pytest.mark.parametrize("family", ["gpt2", "bart"])
def test_the_copy_lags_until_it_catches_up_and_is_saved_with_the_policy(
    family: str, make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    bare, policy = make_policy(family), awake(make_policy(family))
    batch = policy.batch_of(rows_of(policy), normalisation="per_token")
    with torch.no_grad():
        begun = bare.logits(batch)[batch.action_mask]
    now = parts(policy, batch)
    with policy.as_target_network():
        lag = parts(policy, batch)
    torch.testing.assert_close(lag[1], begun.double().log_softmax(-1), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(lag[1], now[1], atol=1e-2) and not torch.allclose(lag[0], now[0], atol=1e-2)
    policy.save(tmp_path / "m")
    policy.update_target_network()
    with policy.as_target_network():
        for ahead, behind in zip(now, parts(policy, batch), strict=True):
            torch.testing.assert_close(ahead, behind)
    policy.restore(tmp_path / "m")
    with policy.as_target_network():
        for old, restored in zip(lag, parts(policy, batch), strict=True):
            torch.testing.assert_close(old, restored)
    loaded = Policy.load(tmp_path / "m", device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(loaded.acting_logits(batch), policy.acting_logits(batch))
    lora = make_policy("gpt2")
    lora.add_lora(rank=2)
    with pytest.raises(OperantError, match="--lora_rank"):
        lora.add_target_network()


def test_at_first_every_token_is_worth_the_mean_return(make_policy: Callable[..., Policy]) -> None:
    policy = make_policy("gpt2")
    policy.freeze_reference()
    policy.add_critic()
    policy.add_target_network()
    rows = rows_of(policy)
    for t in rows:
        t.rewards[:] = 0
        t.rewards[-1] = 0.7
    batch, metrics = QEstimator(policy, TrainConfig(algorithm="double_q", n_step=2), {}, rows)(Rollout(rows, rows))
    assert metrics["train/q_mean"] == pytest.approx(0.7, abs=1e-5) and batch.returns is not None
    torch.testing.assert_close(batch.returns[batch.action_mask], torch.full((int(batch.action_mask.sum()),), 0.7))


def test_the_values_begin_at_the_first_returns_that_are_known(make_policy: Callable[..., Policy]) -> None:
    policy = make_policy("gpt2")
    policy.freeze_reference()
    policy.add_critic()
    policy.add_target_network()
    rows = rows_of(policy)
    unknown = [missing_trajectory(t.prompt, t.completion, "r", "none: not yet") for t in rows]
    for t in rows:
        t.rewards[:] = 0
        t.rewards[-1] = 0.7
    estimator = QEstimator(policy, TrainConfig(algorithm="double_q", n_step=2, target_every=10), {})
    batch, metrics = estimator(Rollout(unknown, unknown))
    assert metrics == {"train/replay": 0.0} and not batch.weights.any()
    batch, metrics = estimator(Rollout(rows, rows))
    assert metrics["train/q_mean"] == pytest.approx(0.7, abs=1e-5) and batch.returns is not None
    # the lagging copy too, which would have caught up only later
    torch.testing.assert_close(batch.returns[batch.action_mask], torch.full((int(batch.action_mask.sum()),), 0.7))


def test_a_policy_that_is_its_own_advantages_is_the_reference_reweighted() -> None:
    logprobs, reference = (torch.randn(2, 5, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    value = torch.tensor([[3.0], [-1.0]], dtype=torch.float64)
    q = objectives.action_value(value, logprobs, reference, 0.3)
    torch.testing.assert_close((reference + (q - value) / 0.3).log_softmax(-1), logprobs)
    torch.testing.assert_close(0.3 * torch.logsumexp(reference + q / 0.3, -1), value[:, 0])


@pytest.mark.parametrize("family", ["gpt2", "bart"])
@pytest.mark.parametrize("priority", [0.0, 1.0])
def test_a_batch_has_the_double_estimators_targets(
    family: str, priority: float, make_policy: Callable[..., Policy]
) -> None:
    policy = awake(make_policy(family))
    config = TrainConfig(
        algorithm="double_q", n_step=2, gamma=0.9, support=0.2, prompts_per_step=5, group_size=1, target_every=100,
        priority=priority, q_beta=0.4,
    )  # fmt: skip
    rows = rows_of(policy)
    state = {"q_batches": 1}  # no catching up on this one
    estimator = QEstimator(policy, config, state, rows)
    batch, metrics = estimator(Rollout(rows, rows))
    assert batch.returns is not None and batch.tokens.shape[0] == 5
    with policy.as_reference():
        reference = policy.logits(batch)[batch.action_mask].double().log_softmax(-1)

    def worth() -> Tensor:
        value, logprobs = parts(policy, batch)
        return value[:, None] + 0.4 * (logprobs - reference)

    online = worth()
    with policy.as_target_network():
        target = worth()
    k = 0
    for i in range(5):
        columns = batch.action_mask[i].nonzero()[:, 0].tolist()
        reward = [float(batch.rewards[i, c]) for c in columns]  # type: ignore[index]
        ahead = []
        for j, c in enumerate(columns):
            likely = reference[k + j].exp()
            choice = [a for a in range(len(likely)) if likely[a] >= 0.2 * likely.max() or a == int(batch.tokens[i, c])]
            best = max(choice, key=lambda a: float(online[k + j, a]))
            ahead.append(float(target[k + j, best]))
        for t, c in enumerate(columns):
            expected = sum(0.9**n * reward[t + n] for n in range(2) if t + n < len(columns))
            expected += 0.81 * ahead[t + 2] if t + 2 < len(columns) else 0.0
            assert float(batch.returns[i, c]) == pytest.approx(expected, abs=1e-3)
        k += len(columns)
    loss, _ = Surrogate(config, resolve(config, dense=False), {})(policy, batch)
    taken = online.gather(-1, batch.tokens[batch.action_mask][:, None])[:, 0].float()
    off = (taken - batch.returns[batch.action_mask]) ** 2
    torch.testing.assert_close(loss[batch.action_mask], 0.5 * off, atol=1e-3, rtol=1e-3)
    assert ("replay" in state) == (priority > 0) and metrics["train/td_error"] > 0


# --- learning --------------------------------------------------------------------------------------------------------


def flat(policy: Policy) -> Policy:
    with torch.no_grad():  # flat enough to explore
        policy.model.get_input_embeddings().weight.mul_(0.2)
    return policy


@pytest.mark.parametrize("family", ["gpt2", "bart"])
def test_it_learns_a_reward_while_it_writes(family: str, make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    config = settings(
        tmp_path / "run", algorithm="double_q", steps=24, prompts_per_step=6, group_size=6, lr=1e-2, q_beta=0.03,
        epochs=2, minibatches=2, target_every=2, n_step=3,
    )  # fmt: skip
    policy = flat(make_policy(family))
    train(policy, PROMPTS, quick(share_of_even), config, quiet=True)
    rewards = logged(tmp_path / "run", "train/reward_mean")
    assert np.mean(rewards[-4:]) > np.mean(rewards[:4]) + 0.15
    assert logged(tmp_path / "run", "train/replay")[-1] == 24 * 36


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_resumed_run_is_the_run_that_never_stopped(
    temperature: float, make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    def run(name: str, steps: int, resume: bool = False) -> None:
        config = settings(
            tmp_path / name, algorithm="double_q", steps=steps, resume=resume, priority=1.0, replay_capacity=20,
            target_every=2, temperature=temperature,
        )  # fmt: skip
        train(make_policy("gpt2"), PROMPTS, quick(share_of_even), config, quiet=True)

    run("whole", 5)
    run("parts", 3)
    run("parts", 5, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_completions_with_an_unknown_token_reward_are_no_rewards(
    make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    def after_the_first(prompt: Prompt, completion: Completion) -> list[float | None]:
        return [None, *(float(token % 2) for token in completion.tokens[1:])]

    config = settings(tmp_path / "run", algorithm="double_q", steps=5)
    with pytest.raises(OperantError, match=r"every reward was missing.*partial"):
        train(make_policy("gpt2"), PROMPTS, quick(after_the_first, dense=True), config, quiet=True)


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


def a_row(number: int = 0, **columns: Any) -> dict[str, Any]:
    """Of a log that is as it should be, but for `columns`; None leaves one out."""
    row = {"tokens": [40 + number, 44, 70], "reward": float(number % 2), "behavior_logprobs": [-1.0, -2.0, -1.5]}
    return {name: value for name, value in (row | columns).items() if value is not None}


def learn_from(
    policy: Policy, out: Path, rows: list[dict[str, Any]], algorithm: str = "topr", vocabulary: int | None = None
) -> None:
    asked = [PROMPTS[i % len(PROMPTS)] for i in range(len(rows))]
    train(
        policy, reward=quick(lambda p, c: None), config=settings(out, algorithm=algorithm, logged="x", steps=2),
        logged=read_logged(rows, asked, policy.codec, vocabulary=vocabulary),
    )  # fmt: skip


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"tokens": [40, 5000, 3]}, "row 3 of the log: tokens hold the id 5000, and the model knows 0 to"),
        ({"tokens": [40, -1, 3]}, "row 3 of the log: tokens hold the id -1"),
        ({"tokens": [40.7, 41, 3]}, "row 3 of the log: tokens are no list of whole numbers"),
        ({"tokens": ["a", "b", "c"]}, "row 3 of the log: tokens are no list of whole numbers"),
        ({"tokens": "[40, 41, 3]"}, "row 3 of the log: tokens are no list of whole numbers"),
        ({"prompt_tokens": [40, 5000]}, "row 3 of the log: prompt_tokens hold the id 5000"),
        ({"tokens": [40] * 80, "behavior_logprobs": [-1.0] * 80}, "logged-3 has 80 tokens.*the model's context is 48"),
        ({"prompt_tokens": [40] * 60}, "logged-3 has 3 tokens after a prompt of 60.*the model's context is 48"),
        ({"behavior_logprobs": [-1.0, float("nan"), -1.0]}, "row 3 of the log: one of its behavior_logprobs is nan"),
        ({"behavior_logprobs": [-1.0, None, -1.0]}, "row 3 of the log: one of its behavior_logprobs is nan"),
        ({"behavior_logprobs": ["a", "b", "c"]}, "row 3 of the log: behavior_logprobs are no list of numbers"),
        ({"behavior_logprobs": [-1.0]}, "row 3 of the log has 1 behavior_logprobs for 3 tokens"),
        ({"reward": "good"}, "row 3 of the log has the reward 'good'; give a number"),
        ({"tokenizer_hash": "another"}, "row 3 of the log was written with another tokenizer"),
    ],
)
def test_a_row_that_cannot_be_read_is_named(
    columns: dict[str, Any], told: str, family: str, make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    rows = [a_row(i, **(columns if i == 2 else {})) for i in range(12)]
    with pytest.raises(OperantError, match=told):
        learn_from(make_policy(family), tmp_path / "run", rows)
    assert not (tmp_path / "run").exists()


def test_ids_that_only_the_model_knows_are_no_ids_of_a_smaller_one(
    make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    policy = make_policy("gpt2")
    with pytest.raises(OperantError, match="logged-1: its tokens hold the id 5000"):
        learn_from(policy, tmp_path / "run", [a_row(tokens=[40, 5000, 3])], vocabulary=6000)


@pytest.mark.parametrize("algorithm", ["topr", "areinforce", "double_q"])
@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"reward": float("nan")}, r"no logged completion has a reward: 12 of 12 rewards are missing \(12 none\)"),
        ({"reward": ""}, r"no logged completion has a reward: 12 of 12 rewards are missing \(12 none\)"),
    ],
)
def test_a_log_without_one_reward_teaches_nothing_and_says_so(
    columns: dict[str, Any], told: str, algorithm: str, make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    with pytest.raises(OperantError, match=told):
        learn_from(make_policy("gpt2"), tmp_path / "run", [a_row(i, **columns) for i in range(12)], algorithm)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("algorithm", ["topr", "areinforce", "double_q"])
def test_rows_without_propensities_are_left_out_by_those_that_need_them(
    algorithm: str, make_policy: Callable[..., Policy], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixed = [a_row(i, **({} if i % 3 else {"behavior_logprobs": None})) for i in range(12)]
    none = [a_row(i, behavior_logprobs=None) for i in range(12)]
    learn_from(make_policy("gpt2"), tmp_path / "mixed", mixed, algorithm)
    told = capsys.readouterr().err.count("4 of 12 logged completions have no behavior_logprobs")
    assert told == (algorithm != "double_q")
    if algorithm == "double_q":
        learn_from(make_policy("gpt2"), tmp_path / "none", none, algorithm)
        return
    assert min(logged(tmp_path / "mixed", "train/usable")) == 1.0
    with pytest.raises(OperantError, match=f"{algorithm} learns by the probabilities.*no row of the log has behavior"):
        learn_from(make_policy("gpt2"), tmp_path / "none", none, algorithm)
    assert not (tmp_path / "none").exists()


def test_tokens_may_be_arrays(make_policy: Callable[..., Policy]) -> None:
    codec = make_policy("gpt2").codec
    row = {
        "tokens": np.array([70, 71]),
        "prompt_tokens": np.array([40, 41]),
        "behavior_logprobs": np.array([-1.0, -2.0]),
    }
    ((prompt, completion, _),) = read_logged([row], [PROMPTS[0]], codec)
    assert prompt.tokens.tolist() == [40, 41] and completion.tokens.tolist() == [70, 71]


def test_what_csv_gives_as_text_is_a_reward(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    policy = make_policy("gpt2")
    rows = [a_row(i, reward=f" {i / 4} ") for i in range(12)]
    assert [value for _, _, value in read_logged(rows, [PROMPTS[0]] * 12, policy.codec)] == [i / 4 for i in range(12)]
    learn_from(policy, tmp_path / "run", rows)
    assert logged(tmp_path / "run", "train/grad_norm")[0] > 0


def test_rows_whose_prompt_is_skipped_take_their_completion_with_them(
    make_policy: Callable[..., Policy], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the others are numbered as in the file."""
    make_policy("gpt2").save(tmp_path / "model")

    def learn(name: str, **columns: Any) -> None:
        rows = [a_row(i, prompt="the cat " * (20 if i == 1 else 1)) for i in range(6)]
        rows[4] |= columns
        (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        main(
            [
                "train", "--model", str(tmp_path / "model"), "--logged", str(tmp_path / "log.jsonl"), "--algorithm",
                "topr", "--too_long", "skip", "--max_tokens", "8", "--steps", "1", "--prompts_per_step", "5",
                "--group_size", "1", "--device", "cpu", "--out", str(tmp_path / name), "--tensorboard", "false",
                "--reward", "length",
            ]
        )  # fmt: skip

    learn("run")
    assert logged(tmp_path / "run", "train/reward_mean") == [pytest.approx(2 / 5)]  # of rows 0, 2, 3, 4, 5
    with pytest.raises(SystemExit):
        learn("odd", reward="good")
    assert "row 5 of the log has the reward 'good'" in capsys.readouterr().err


def test_what_is_sampled_is_a_log_of_the_same_tokenizer(
    make_policy: Callable[..., Policy], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = make_policy("gpt2")
    policy.save(tmp_path / "model")
    main(["sample", "--model", str(tmp_path / "model"), "--prompt", "the cat", "--max_tokens", "4", "--n", "2",
          "--device", "cpu", "--json"])  # fmt: skip
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["tokenizer_hash"] for row in rows] == [policy.codec.hash] * 2
    for prompt, completion, _ in read_logged(rows, [Prompt("p", np.array([50]))] * 2, policy.codec):
        assert prompt.tokens.tolist() == policy.codec.encode_prompt("the cat\n").tolist() and completion.trainable


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
