from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from operant.algorithms.estimator import Estimator, Rollout
from operant.algorithms.learner import Learner, logprobs_of
from operant.algorithms.q_learning import QEstimator
from operant.algorithms.surrogate import Surrogate
from operant.algorithms.table import ALGORITHMS, in_force, resolve, table
from operant.config import TrainConfig
from operant.data.batch import microbatches
from operant.models.policy import Policy
from operant.models.sampler import Sampler
from operant.rewards import reward_trajectory
from operant.rl.loop import update_rule
from operant.types import OperantError, Prompt, Sampling

OFTEN = {"group_size": 4}
REWARDED = [name for name, algorithm in ALGORITHMS.items() if algorithm.learns_from == "rewards"]


@pytest.mark.parametrize("logged", [None, "rows.jsonl"])
@pytest.mark.parametrize("name", REWARDED)
def test_what_is_kept_in_place_of_auto_makes_the_same_run(name: str, logged: str | None) -> None:
    """Every number that has a use is told; whatever else `auto` stands for may be given as it is kept."""
    if logged and not ALGORITHMS[name].honours_stale:
        return
    for dense in {False, ALGORITHMS[name].honours_dense}:
        config = TrainConfig(algorithm=name, dense=dense, logged=logged)
        settings = resolve(config, dense=dense)
        kept = in_force(config, settings, dense=dense)
        assert resolve(dataclasses.replace(config, **kept), dense=dense) == settings
        assert kept["lr"] == settings.lr
        assert {"clip_low", "baseline_shift"} <= kept.keys() or name == "double_q"
        assert ("lam" in kept) == (settings.baseline == "critic")
        assert "lr" not in in_force(dataclasses.replace(config, lr=0.5), settings, dense=dense)


@pytest.mark.parametrize(
    ("options", "dense", "baseline", "normalisation"),
    [
        ({"algorithm": "reinforce"}, False, "running", "per_completion"),
        ({"algorithm": "reinforce", "group_size": 1}, True, "running", "per_completion"),
        ({"algorithm": "rloo"}, False, "leave_one_out", "per_completion"),
        ({"algorithm": "rloo"}, True, "control_variate", "per_completion"),
        ({"algorithm": "rloo", "gamma": 0.9}, True, "position_leave_one_out", "per_completion"),
        ({"algorithm": "rloo", "gamma": 0.95}, False, "position_leave_one_out", "per_completion"),
        ({"algorithm": "rloo", "gamma": 0.95, "baseline": "leave_one_out"}, False, "leave_one_out", "per_completion"),
        ({"algorithm": "trpo", "gamma": 0.95}, False, "position_leave_one_out", "per_completion"),
        ({"algorithm": "trpo"}, False, "leave_one_out", "per_completion"),
        ({"algorithm": "trpo", "baseline": "running", "group_size": 1}, False, "running", "per_completion"),
        ({"algorithm": "trpo", "delta": 0.1}, True, "control_variate", "per_completion"),
        ({"algorithm": "grpo"}, False, "group_scaled", "per_sequence_mean"),
        ({"algorithm": "ppo", "epochs": 4}, False, "critic", "per_completion"),
        ({"algorithm": "ppo", "group_size": 1, "gamma": 0.9}, True, "critic", "per_completion"),
        ({"algorithm": "ppo", "baseline": "leave_one_out"}, False, "leave_one_out", "per_completion"),
        ({"algorithm": "ppo", "baseline": "control_variate"}, True, "control_variate", "per_completion"),
        ({"algorithm": "a2c", "group_size": 1}, True, "critic", "per_completion"),
        ({"algorithm": "dr_grpo", "epochs": 2}, False, "group_centred", "constant"),
        ({"algorithm": "dapo"}, False, "group_scaled", "per_token"),
        ({"algorithm": "gspo"}, False, "group_scaled", "per_sequence_mean"),
        ({"algorithm": "cispo"}, False, "group_scaled", "per_token"),
        ({"algorithm": "reinforce_pp", "group_size": 1, "gamma": 0.9}, True, "none", "per_token"),
        ({"algorithm": "remax", "group_size": 1}, True, "greedy", "per_completion"),
        ({"algorithm": "topr", "group_size": 1, "temperature": 0.0, "epochs": 3}, False, "route", "per_completion"),
        ({"algorithm": "areinforce", "group_size": 1, "temperature": 0.0}, False, "route", "per_completion"),
        ({"algorithm": "spo", "group_size": 1}, False, "route", "per_completion"),
        ({"algorithm": "ppo", "baseline": "batch", "normalisation": "constant"}, True, "batch", "constant"),
    ],
)
def test_auto_is_what_the_papers_say(options: dict[str, Any], dense: bool, baseline: str, normalisation: str) -> None:
    resolved = resolve(TrainConfig(**{**OFTEN, **options}), dense=dense)
    assert (resolved.baseline, resolved.normalisation) == (baseline, normalisation)
    assert resolved.algorithm is ALGORITHMS[options["algorithm"]]


@pytest.mark.parametrize(
    ("options", "dense", "told"),
    [
        ({"algorithm": "rlo"}, False, "did you mean 'rloo'"),
        ({"algorithm": "zzz"}, False, "there are: reinforce, rloo, trpo, grpo, dr_grpo,"),
        ({"baseline": "leave_one"}, False, "did you mean 'leave_one_out'"),
        ({"normalisation": "per_tokens"}, False, "did you mean 'per_token'"),
        ({"group_size": 1}, False, "--group_size 2"),
        ({"group_size": 1, "algorithm": "grpo"}, False, "--group_size 2"),
        ({"group_size": 1, "algorithm": "reinforce", "baseline": "position_leave_one_out"}, True, "--group_size 2"),
        ({"algorithm": "grpo"}, True, "sum a dense reward"),
        ({"algorithm": "rloo", "baseline": "group_scaled"}, True, "sum a dense reward"),
        ({"algorithm": "grpo", "gamma": 0.9}, False, "ignores the discount"),
        ({"algorithm": "rloo", "baseline": "group_scaled", "gamma": 0.9}, False, "ignores the discount"),
        ({"baseline": "control_variate"}, False, "add --dense"),
        ({"baseline": "control_variate", "gamma": 0.9}, True, "position_leave_one_out"),
        ({"algorithm": "rloo", "epochs": 2}, False, "--algorithm ppo"),
        ({"algorithm": "reinforce", "minibatches": 2}, False, "--algorithm ppo"),
        ({"top_p": 0.8}, False, "--top_p 1"),
        ({"top_k": 5}, False, "--top_k 0"),
        ({"temperature": 0.0}, False, "--temperature 1"),
        ({"algorithm": "grpo", "kl_in": "reward", "kl_coef": 0.1}, False, "--kl_in loss"),
        ({"gamma": 1.1}, False, "between 0 and 1"),
        ({"gamma": -0.1}, False, "between 0 and 1"),
        ({"group_size": 0}, False, "group_size is 0"),
        ({"prompts_per_step": 0}, False, "prompts_per_step is 0"),
        ({"steps": 0}, False, "steps is 0"),
        ({"max_tokens": 0}, False, "max_tokens is 0"),
        ({"beta": 0.5}, False, "beta"),
        ({"baseline": "critic"}, False, "rloo has no critic"),
        ({"critic": "shared"}, False, "leave --critic out"),
        ({"lam": 0.9}, False, "--algorithm ppo or a2c"),
        ({"critic_lr": 1e-3, "algorithm": "ppo", "baseline": "leave_one_out"}, False, "its own baseline"),
        ({"bootstrap": True, "algorithm": "grpo"}, False, "leave --bootstrap out"),
        ({"algorithm": "ppo", "lam": 1.5}, False, "lam is 1.5; it must be between 0 and 1"),
        ({"algorithm": "topr"}, True, "sum a dense reward"),
        ({"algorithm": "areinforce", "gamma": 0.9}, False, "ignores the discount"),
        ({"algorithm": "dr_grpo"}, True, "sum a dense reward"),
        ({"algorithm": "gspo", "group_size": 1}, False, "--group_size 2"),
        ({"algorithm": "ppo", "temperature": 0.0}, False, "--algorithm topr or --algorithm areinforce"),
        ({"algorithm": "topr", "temperature": 0.0, "group_size": 4}, False, "--group_size 1"),
        ({"algorithm": "a2c", "epochs": 2}, False, "no importance ratio"),
        ({"algorithm": "remax", "epochs": 2}, False, "no importance ratio"),
        ({"dynamic_sampling": True, "algorithm": "ppo"}, False, "--algorithm dapo"),
        ({"dynamic_rounds": 0}, False, "dynamic_rounds is 0"),
        ({"kl_target": 0.1}, False, "--kl_coef 0.05"),
        ({"baseline_shift": 0.1, "algorithm": "ppo"}, False, "a critic would undo it"),
        ({"baseline_shift": 0.1, "whiten": True}, False, "--whiten false"),
        ({"kl_in": "reward", "kl_coef": 0.1, "kl_estimator": "k3"}, False, "kl_estimator"),
        ({"algorithm": "trpo", "epochs": 2}, False, "one step a batch"),
        ({"algorithm": "trpo", "weight_decay": 0.1}, False, "no weight decay"),
        ({"algorithm": "trpo", "critic": "shared"}, False, "no critic"),
        ({"algorithm": "ppo", "delta": 0.02}, False, "use --algorithm trpo, or leave --delta out"),
        ({"cg_steps": 5}, False, "has no trust region"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(options: dict[str, Any], dense: bool, told: str) -> None:
    with pytest.raises(OperantError) as caught:
        resolve(TrainConfig(**{**OFTEN, **options}), dense=dense)
    assert told in str(caught.value) and "\n" not in str(caught.value)


def works(name: str, dense: bool = False, **options: Any) -> bool:
    try:
        resolve(TrainConfig(algorithm=name, **options), dense=dense)
    except OperantError:
        return False
    return True


@pytest.mark.parametrize("name", [a.name for a in ALGORITHMS.values() if a.learns_from == "rewards"])
def test_what_the_table_says_is_what_is_refused_and_what_runs(name: str) -> None:
    row = ALGORITHMS[name]
    assert works(name) and row.name == name
    assert works(name, dense=True) == ("dense" in row.honours)
    assert works(name, gamma=0.5) == ("gamma" in row.honours)
    assert works(name, group_size=1) == ("single" in row.honours) == ("group" not in row.needs)
    assert works(name, temperature=0.0, group_size=1) == ("greedy" in row.honours)
    assert works(name, epochs=2) == works(name, minibatches=2) == ("passes" in row.honours)
    assert works(name, critic="shared") == works(name, lam=0.9) == ("critic" in row.needs)
    assert "stale" not in row.honours or "passes" in row.honours


def share_of_even(tokens: np.ndarray) -> float:
    return float(np.mean(tokens % 2 == 0))


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5", "bart"])
@pytest.mark.parametrize("name", [a.name for a in ALGORITHMS.values() if a.learns_from == "rewards"])
def test_every_algorithm_steps_the_right_way_on_every_family(
    name: str, family: str, make_policy: Callable[..., Policy]
) -> None:
    """Sampling, credit, loss and update of each row of the table, with a decoder and with an encoder-decoder."""
    config = TrainConfig(algorithm=name, group_size=3, prompts_per_step=3, max_tokens=6, overlong_buffer=2)
    resolved = resolve(config, dense=False)
    policy = make_policy(family)
    if resolved.critic:
        policy.add_critic()
    if name == "double_q":
        policy.freeze_reference()
        policy.add_target_network()
    prompts = [Prompt(str(i), np.arange(40, 43 + i)) for i in range(3)]
    groups = Sampler(policy).sample(prompts, Sampling(max_tokens=6, seed=3), 3)
    rows = [
        reward_trajectory(prompt, c, "even", share_of_even(c.tokens))
        for prompt, group in zip(prompts, groups, strict=True)
        for c in group
    ]
    assert len({float(t.rewards.sum()) for t in rows}) > 1
    greedy = torch.full((len(rows), 6), 0.4, dtype=torch.float64)
    state: dict[str, Any] = {}
    estimator = QEstimator(policy, config, state) if name == "double_q" else Estimator(policy, config, resolved, state)
    batch, _ = estimator(Rollout(rows, rows, greedy=greedy))
    batch.old_logprobs = logprobs_of(policy, batch, 10_000)
    surrogate = Surrogate(config, resolved, state)

    @torch.no_grad()
    def measured() -> tuple[float, float]:
        """The loss, and Σ A log π, whose gradient is every policy-gradient loss's where the step begins."""
        loss = surrogate(policy, batch)[0] * batch.weights
        advantages = (
            torch.zeros_like(batch.weights) if batch.advantages is None else batch.advantages
        )  # of values: none
        gain = advantages * policy.logprobs(batch).logprobs * batch.weights
        return float(loss.sum() / batch.denominator), float(gain.double().sum())

    begun, (first, gain) = [p.detach().clone() for p in policy.trainable_parameters()], measured()
    learner = Learner(policy, lr=1e-4, rule=update_rule(policy, config, resolved))
    stats = learner.step(list(microbatches(batch, 40)), surrogate)
    assert (
        not stats.skipped
        and stats.tokens == int(batch.action_mask.sum())
        and stats.loss == pytest.approx(first, abs=1e-5)
    )
    after = measured()
    assert after[0] < first if name == "double_q" else after[1] > gain
    assert any(not torch.equal(a, b) for a, b in zip(begun, policy.trainable_parameters(), strict=True))


def test_the_papers_numbers_are_what_auto_means_and_a_given_one_wins() -> None:
    dapo = resolve(TrainConfig(algorithm="dapo", max_tokens=40), dense=False)
    assert (dapo.clip_low, dapo.clip_high, dapo.rounds, dapo.overlong_buffer) == (0.2, 0.28, 4, 8)
    plain = resolve(
        TrainConfig(algorithm="dapo", dynamic_sampling=False, overlong_buffer=0, clip_high=0.5), dense=False
    )
    assert (plain.clip_high, plain.rounds, plain.overlong_buffer) == (0.5, 1, 0)
    ppo, a2c = (resolve(TrainConfig(algorithm=n), dense=False) for n in ("ppo", "a2c"))
    assert (ppo.lam, ppo.whiten, ppo.critic, ppo.bootstrap) == (0.95, True, "separate", False)
    assert (a2c.lam, a2c.whiten, a2c.critic) == (1.0, False, "separate")
    free = resolve(TrainConfig(algorithm="ppo", baseline="leave_one_out"), dense=False)
    assert free.critic is None and not free.whiten  # what it was before there was a critic
    assert resolve(TrainConfig(algorithm="ppo"), dense=True).bootstrap
    assert resolve(TrainConfig(algorithm="areinforce"), dense=False).shift == 0.1
    assert resolve(TrainConfig(algorithm="areinforce", logged="log.jsonl"), dense=False).shift == pytest.approx(0.3)
    assert resolve(TrainConfig(algorithm="rloo", dynamic_sampling=True), dense=False).rounds == 4


def test_the_table_as_data_says_the_same() -> None:
    rows = {row["name"]: row for row in table()}
    assert list(rows) == list(ALGORITHMS)
    assert rows["dpo"]["needs"] == ["reference", "pairs"] and rows["kto"]["needs"] == ["reference"]
    assert "single" in rows["kto"]["honours"] and "single" not in rows["ipo"]["honours"]
    assert [n for n, row in rows.items() if row["from"] == "preferences"] == ["dpo", "ipo", "kto"]
    assert rows["ppo"]["needs"] == ["critic"] and rows["grpo"]["needs"] == ["group"]
    assert rows["remax"]["needs"] == ["greedy"] and rows["topr"]["honours"] == ["stale", "single", "greedy", "passes"]
    assert json.loads(json.dumps(rows)) == rows


@pytest.mark.parametrize("name", ["dpo", "ipo", "kto"])
def test_rewards_alone_are_no_preferences(name: str) -> None:
    with pytest.raises(OperantError, match=f"{name} learns from preferences.*operant prefer"):
        resolve(TrainConfig(algorithm=name), dense=False)
