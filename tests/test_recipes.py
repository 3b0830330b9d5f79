"""Every algorithm in the whole loop: it learns, in both families; it resumes exactly; what it adds does as it says."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from runs import (
    DEV,
    PROMPTS,
    assert_same_run,
    dense_even,
    everything,
    interrupted,
    logged,
    quick,
    same,
    settings,
    share_of_even,
)
from safetensors.torch import load_file

from operant.algorithms.table import ALGORITHMS
from operant.models.critic import FILE
from operant.models.policy import Policy
from operant.rewards import Chrf
from operant.rl.loop import train
from operant.types import Completion, OperantError, Prompt, Span


@pytest.fixture(autouse=True)
def without_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """A report has tests of its own, and would take most of the time here."""
    monkeypatch.setattr("operant.run.run.write_report", lambda folder: None)


OWN: dict[str, dict[str, Any]] = {
    "grpo": {"epochs": 2}, "dr_grpo": {"epochs": 2}, "gspo": {"epochs": 2, "clip_low": 0.2, "clip_high": 0.2},
    "ppo": {"epochs": 2, "critic_lr": 1e-2}, "a2c": {"critic_lr": 1e-2}, "topr": {"epochs": 2},
    "dapo": {"overlong_buffer": 0}, "areinforce": {"epochs": 2}, "trpo": {"delta": 0.3, "steps": 24},  # no rate
    "double_q": {"q_beta": 0.03},  # the smaller, the further from where it began it may go
}  # fmt: skip


@pytest.mark.parametrize("family", ["gpt2", "t5"])
@pytest.mark.parametrize("algorithm", [a.name for a in ALGORITHMS.values() if a.learns_from == "rewards"])
def test_every_algorithm_raises_the_reward(
    algorithm: str, family: str, make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    """Those that may learn from one completion a prompt do."""
    single = "single" in ALGORITHMS[algorithm].honours
    given = {"steps": 12, "group_size": 1 if single else 6, "prompts_per_step": 36 if single else 6, "lr": 1e-2}
    config = settings(tmp_path / "run", algorithm=algorithm, max_tokens=4, **given | OWN.get(algorithm, {}))
    train(make_policy(family), PROMPTS, quick(share_of_even), config, quiet=True)
    rewards = logged(tmp_path / "run", "train/reward_mean")
    assert np.mean(rewards[-3:]) > np.mean(rewards[:2]) + 0.25


@pytest.mark.parametrize(
    ("reward", "options", "dense"),
    [
        ("chrf", {}, True),
        ("chrf + 0.1*length(target=3)", {}, True),
        ("length(target=3)", {}, False),  # nothing to split
        ("chrf", {"algorithm": "grpo"}, False),  # which would sum it up
        ("chrf", {"baseline": "group_centred"}, False),
        ("chrf", {"dense": False}, False),
    ],
)
def test_a_metric_is_paid_token_by_token_where_that_can_be(
    reward: str, options: dict[str, Any], dense: bool, make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    config = settings(tmp_path / "run", steps=1, reward_workers=0, **options)
    train(make_policy("gpt2"), PROMPTS, reward, config, quiet=True)
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["dense"] is dense


def spans_of_even(prompt: Prompt, completion: Completion) -> list[Span]:
    return [Span(i, i + 1, 0.1) for i in range(0, len(completion.text), 2)]


@pytest.mark.parametrize("function", [dense_even, spans_of_even])
def test_a_function_that_pays_per_token_is_estimated_so_whether_it_says_it_or_not(
    function: Callable[..., Any], make_policy: Callable[..., Policy], tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def run(name: str, reward: Any, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """(weights, state) of the last checkpoint."""
        train(make_policy("gpt2"), PROMPTS, reward, settings(tmp_path / name, steps=3, **options))
        weights, _, facts = everything(tmp_path / name)
        told = yaml.safe_load((tmp_path / name / "config.yaml").read_text())["dense"]
        assert told is (name not in ("undeclared", "one_number"))
        assert capsys.readouterr().err.count("pays per token and did not say so") == (name == "undeclared")
        return weights, facts["state"]

    monkeypatch.setitem(sys.modules, "mine", types.SimpleNamespace(pays=function))  # type: ignore[misc]
    declared, _ = run("declared", quick(function, dense=True))
    for name, reward, options in (
        ("undeclared", quick(function), {}),
        ("asked", quick(function), {"dense": True}),
        ("by_name", "mine:pays", {"dense": True, "reward_workers": 0}),
    ):
        weights, state = run(name, reward, **options)
        assert same(weights, declared) and state["dense"] is (name == "undeclared")
    # a baseline that is given by name is the one that is taken
    weights, _ = run("one_number", quick(function), baseline="leave_one_out")
    assert not same(weights, declared)


def test_a_reward_that_is_noticed_to_pay_per_token_is_resumed_bit_for_bit(
    make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    """Its first two steps pay at the end."""

    def later(calls: Any) -> Any:
        return quick(lambda p, c: dense_even(p, c) if next(calls) >= 24 else share_of_even(p, c))

    calls = iter(range(1000))
    train(make_policy("gpt2"), PROMPTS, later(iter(range(1000))), settings(tmp_path / "whole"), quiet=True)
    train(
        make_policy("gpt2"), PROMPTS, later(calls), settings(tmp_path / "parts"), quiet=True,
        callbacks=[interrupted(4)],
    )  # fmt: skip
    assert everything(tmp_path / "parts")[2]["state"]["dense"] is True
    train(make_policy("gpt2"), PROMPTS, later(calls), settings(tmp_path / "parts", resume=True), quiet=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert "train/beta" not in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()[1]
    assert len(logged(tmp_path / "whole", "train/beta")) == 4


def test_a_reward_that_pays_at_the_end_is_not_dense_for_the_asking(
    make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    for reward, told in ((Chrf(), "reward 'chrf' pays at the end"), ("length", "takes the option 'dense'")):
        with pytest.raises(OperantError, match=told):
            train(make_policy("gpt2"), PROMPTS, reward, settings(tmp_path / "run", dense=True), quiet=True)
    assert not (tmp_path / "run").exists()


def flat(policy: Policy) -> Policy:
    """Flat enough to explore."""
    with torch.no_grad():
        policy.model.transformer.wte.weight.mul_(0.2)
    return policy


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_a_critic_learns_to_foretell_a_dense_reward(
    critic: str, make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    config = settings(
        tmp_path, algorithm="ppo", critic=critic, steps=20, lr=1e-3, critic_lr=1e-2, group_size=1, prompts_per_step=36,
        gamma=0.9, epochs=2, vf_clip=0.5, max_tokens=6, bootstrap=False,
    )  # fmt: skip
    train(flat(make_policy("gpt2")), PROMPTS, quick(dense_even, dense=True), config, quiet=True)
    explained, loss = (logged(tmp_path, f"train/{key}") for key in ("explained_variance", "value_loss"))
    assert explained[0] == 0 and np.mean(explained[-5:]) > 0.2 and np.mean(loss[-5:]) < loss[0] / 2


def test_a_critic_follows_only_where_the_limit_cut_a_text_off(
    make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    """A critic that says 10 everywhere: cut rows are worth 10 more after their last token, ended ones are not."""
    from operant.algorithms.estimator import Estimator, Rollout
    from operant.algorithms.table import resolve
    from operant.types import Trajectory

    policy = make_policy("gpt2")
    policy.add_critic(separate=False)
    with torch.no_grad():
        policy.critic.head.bias.fill_(10.0)  # type: ignore[union-attr]

    def made(truncated: bool) -> Trajectory:
        completion = Completion(
            "c", "p0", "", np.array([60, 61]), np.array([0, 0]), behavior_logprobs=np.zeros(2, np.float32),
            stop_reason="length" if truncated else "eos", truncated=truncated,
        )  # fmt: skip
        return Trajectory(PROMPTS[0], completion, np.array([1.0, 2.0]), np.array([True, True]))

    rows = [made(False), made(True)]
    for bootstrap in (True, False):
        config = settings(tmp_path, algorithm="a2c", group_size=1, bootstrap=bootstrap, gamma=0.5)
        batch, _ = Estimator(policy, config, resolve(config, dense=True), {})(Rollout(rows, rows))
        assert batch.returns is not None and batch.advantages is not None
        start = len(PROMPTS[0].tokens)
        ended, cut = batch.returns[:, start : start + 2].tolist()
        assert ended == pytest.approx([2.0, 2.0])
        assert cut == pytest.approx([1 + 0.5 * 7, 7.0] if bootstrap else [2.0, 2.0])
        assert batch.advantages[0, start : start + 2].tolist() == pytest.approx([-8.0, -8.0])


@pytest.mark.parametrize(
    ("algorithm", "whiten"), [("reinforce_pp", True), ("reinforce_pp", False), ("ppo", True), ("rloo", False)]
)
def test_the_discount_of_the_state_comes_last(
    algorithm: str, whiten: bool, make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    """Whitening does not undo it, and a critic that knows nothing explains nothing."""
    from operant.algorithms.estimator import Estimator, Rollout
    from operant.algorithms.table import resolve
    from operant.rewards import reward_trajectory

    policy, gamma, size = make_policy("gpt2"), 0.8, 12
    policy.add_critic(separate=False)
    generator = np.random.default_rng(0)
    rows = []
    for i in range(8):
        completion = Completion(
            str(i), f"p{i // 4}", "", generator.integers(40, 80, size), np.zeros(size, np.int64),
            behavior_logprobs=np.full(size, -1.0, np.float32),
        )  # fmt: skip
        rows.append(reward_trajectory(PROMPTS[i // 4], completion, "any", generator.random(size).tolist()))

    def estimated(discount_state: bool) -> tuple[torch.Tensor, dict[str, float]]:
        config = settings(tmp_path, algorithm=algorithm, gamma=gamma, discount_state=discount_state, whiten=whiten)
        batch, metrics = Estimator(policy, config, resolve(config, dense=True), {})(Rollout(rows, rows))
        assert batch.advantages is not None
        return batch.advantages[batch.action_mask].reshape(len(rows), size), metrics

    (plain, _), (weighed, metrics) = estimated(False), estimated(True)
    torch.testing.assert_close(weighed, plain * gamma ** torch.arange(size))
    assert metrics.get("train/explained_variance", 0.0) == 0.0


def test_a_critic_leaves_rows_with_missing_rewards_alone(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    calls = iter(range(1000))

    def often(prompt: Prompt, completion: Completion) -> float | None:
        return None if next(calls) % 3 == 0 else share_of_even(prompt, completion)

    config = settings(tmp_path, algorithm="ppo", steps=3)
    train(make_policy("gpt2"), PROMPTS, quick(often), config, quiet=True)
    assert logged(tmp_path, "train/usable") == pytest.approx([2 / 3] * 3)
    assert all(np.isfinite(logged(tmp_path, "train/value_loss")))


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("gpt2", {"algorithm": "ppo", "epochs": 2, "minibatches": 2, "critic_lr": 1e-2, "kl_coef": 0.1,
                  "kl_target": 0.01, "kl_in": "reward"}),
        ("t5", {"algorithm": "a2c", "critic": "shared", "kl_coef": 0.1, "kl_target": 0.01}),
        ("llama", {"algorithm": "spo", "route_by": "prompt", "group_size": 1, "prompts_per_step": 8}),
        ("gpt2", {"algorithm": "dapo", "overlong_buffer": 3, "group_size": 2, "prompts_per_step": 3}),
        ("bart", {"algorithm": "remax", "group_size": 1, "prompts_per_step": 6}),
    ],
    ids=["ppo", "a2c", "spo", "dapo", "remax"],
)  # fmt: skip
def test_what_an_algorithm_remembers_is_resumed_bit_for_bit(
    family: str, options: dict[str, Any], make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    reward = quick(lambda p, c: float(c.tokens[0] % 2 == 0))  # equal often enough for dynamic sampling
    options = {"max_tokens": 4, **options}
    run = {"quiet": True, "dev_prompts": DEV}
    train(make_policy(family), PROMPTS, reward, settings(whole, **options), **run)
    train(make_policy(family), PROMPTS, reward, settings(parts, **options), callbacks=[interrupted(3)], **run)
    train(make_policy(family), PROMPTS, reward, settings(parts, resume=True, **options), **run)
    assert_same_run(whole, parts)
    newest = [sorted((out / "checkpoints").glob("step-*"))[-1] / "model" / FILE for out in (whole, parts)]
    state = everything(whole)[2]["state"]
    if ALGORITHMS[options["algorithm"]].baseline == "critic":
        assert same(load_file(newest[0]), load_file(newest[1])) and len(load_file(newest[0])) > 1
        assert state["kl_coef"] != 0.1
    if options["algorithm"] == "spo":
        assert set(state["routes"]) == {p.id for p in PROMPTS} and 0.5 not in state["routes"].values()
    if options["algorithm"] == "dapo":
        rounds = logged(whole, "train/rounds")
        assert max(rounds) > 1 and state["drawn"] > 6 * 3 and rounds == logged(parts, "train/rounds")


def test_dynamic_sampling_is_content_with_a_prompt_that_comes_twice(
    make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    always = iter(range(1000))
    config = settings(tmp_path / "run", algorithm="dapo", steps=3, overlong_buffer=0)
    train(make_policy("gpt2"), PROMPTS[:2], quick(lambda p, c: float(next(always))), config, quiet=True)
    assert logged(tmp_path / "run", "train/rounds") == [1.0] * 3
    assert logged(tmp_path / "run", "train/completions") == [12.0, 24.0, 36.0]


def test_dynamic_sampling_fills_the_batch_with_groups_that_differ(
    make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    """Prompts whose completions are all paid the same are left out and others take their place, up to the cap."""
    paid: list[str] = []

    def only_some(prompt: Prompt, completion: Completion) -> float:
        paid.append(prompt.id)
        return share_of_even(prompt, completion) if prompt.id in ("p1", "p4") else 1.0

    config = settings(tmp_path / "run", algorithm="dapo", prompts_per_step=2, steps=4, dynamic_rounds=8)
    train(make_policy("gpt2"), PROMPTS, quick(only_some), config, quiet=True)
    assert logged(tmp_path / "run", "train/usable") == [1.0] * 4
    assert min(logged(tmp_path / "run", "train/advantage_std")) > 0.5
    rounds = logged(tmp_path / "run", "train/rounds")
    assert all(1 <= r <= 8 for r in rounds) and max(rounds) > 1
    assert logged(tmp_path / "run", "train/completions")[-1] == len(paid)

    capped = settings(tmp_path / "none", algorithm="dapo", prompts_per_step=2, steps=2, dynamic_rounds=3, lr=0.1)
    policy = make_policy("gpt2")
    before = [p.detach().clone() for p in policy.model.parameters()]
    train(policy, PROMPTS, quick(lambda p, c: 1.0), capped, overlong_buffer=0, quiet=True)
    assert logged(tmp_path / "none", "train/rounds") == [3, 3]
    assert all(torch.equal(a, b) for a, b in zip(before, policy.model.parameters(), strict=True))


def test_a_prompt_that_comes_again_in_a_step_says_something_else(
    make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    heard: list[tuple[int, ...]] = []

    def noting(prompt: Prompt, completion: Completion) -> float:
        heard.append(tuple(completion.tokens.tolist()))
        return 1.0

    config = settings(tmp_path, algorithm="dapo", prompts_per_step=1, steps=1, dynamic_rounds=4, overlong_buffer=0)
    train(make_policy("gpt2"), PROMPTS[:1], quick(noting), config, quiet=True)
    assert len(heard) == 4 * 3 and len(set(heard)) == len(heard)


def test_remax_compares_with_the_greedy_completion_and_never_learns_from_it(
    make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    versions: list[float] = []

    def noting(prompt: Prompt, completion: Completion) -> float | None:
        assert completion.sampling is not None
        versions.append(completion.sampling.temperature)
        greedy = completion.sampling.temperature == 0
        if greedy and prompt.id == "p0":
            return None  # this prompt then has nothing to be compared with
        return 0.25 if greedy else 1.0

    config = settings(tmp_path, algorithm="remax", group_size=2, prompts_per_step=6, steps=1)
    train(make_policy("gpt2"), PROMPTS, quick(noting), config, quiet=True)
    assert versions.count(0) == 6 and versions.count(1) == 12
    assert logged(tmp_path, "train/usable") == pytest.approx([10 / 12])
    assert logged(tmp_path, "train/reward_mean") == [1.0]
    assert logged(tmp_path, "train/missing/none") == [1]


def test_the_overlong_penalty_stands_on_the_last_token_and_is_told(
    make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    """With nothing else to learn from, answers grow short enough to go unpunished."""
    config = settings(
        tmp_path, algorithm="rloo", steps=30, group_size=6, prompts_per_step=6, lr=2e-2, max_tokens=8,
        overlong_buffer=6, overlong_penalty=0.5,
    )  # fmt: skip
    train(flat(make_policy("gpt2")), PROMPTS, quick(lambda p, c: 1.0), config, quiet=True)
    penalties, lengths = logged(tmp_path, "train/overlong_penalty"), logged(tmp_path, "train/length")
    assert min(penalties) >= -0.5 and np.mean(penalties[-3:]) > np.mean(penalties[:3]) + 0.2
    assert np.mean(lengths[-3:]) < np.mean(lengths[:3]) - 2
    assert set(logged(tmp_path, "train/reward_mean")) == {1.0}


@pytest.mark.parametrize("algorithm", ["topr", "areinforce"])
def test_greedy_completions_teach_what_is_ratio_free(
    algorithm: str, make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    """Greedy answers paid for even tokens only are imitated where they earn and left where they do not."""
    policy = make_policy("gpt2")
    config = settings(
        tmp_path, algorithm=algorithm, temperature=0.0, group_size=1, prompts_per_step=6, steps=20, lr=3e-3,
        reward_midpoint=0.5,
    )  # fmt: skip
    train(policy, PROMPTS, quick(share_of_even), config, quiet=True)
    rewards = logged(tmp_path, "train/reward_mean")
    assert rewards[-1] > rewards[0]


def taught_by_what_was_said_before(policy: Policy, algorithm: str, out: Path, passes: int = 60) -> tuple[float, float]:
    """Learn only from completions that the first weights wrote; (gain in the mean log-prob of those above the mean
    reward, mean log-prob at the end of those below it), per completion."""
    from operant.algorithms.estimator import Estimator, Rollout
    from operant.algorithms.learner import Learner, logprobs_of
    from operant.algorithms.surrogate import Surrogate
    from operant.algorithms.table import resolve
    from operant.data.batch import completion_axes
    from operant.models.sampler import Sampler
    from operant.rewards import RewardRunner
    from operant.types import Sampling

    config = settings(out, algorithm=algorithm, group_size=1)
    groups = Sampler(policy).sample(PROMPTS, Sampling(max_tokens=4, seed=1), 8)
    runner = RewardRunner(quick(share_of_even))
    rows = runner.run([(p, c) for p, group in zip(PROMPTS, groups, strict=True) for c in group])
    runner.close()
    resolved, state = resolve(config, dense=False), {}
    estimator, surrogate = Estimator(policy, config, resolved, state), Surrogate(config, resolved, state)
    batch, _ = estimator(Rollout(rows, rows))
    rewards, mask, _ = completion_axes(rows)
    totals = (rewards * mask).sum(1)

    def said() -> torch.Tensor:
        return (logprobs_of(policy, batch, 10_000) * batch.action_mask).sum(1)

    before = said()
    learner = Learner(policy, lr=5e-3)
    for _ in range(passes):
        learner.step([batch], surrogate)
    good, bad = totals > 0.5, totals < 0.5
    return float((said() - before)[good].mean()), float(said()[bad].mean())


def test_stale_completions_teach_and_drive_nothing_to_minus_infinity(
    make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    """Sixty steps on what the first weights said. A bounded weight lets bad completions rest once they are not said any
    more; without a ratio, asymmetric REINFORCE pushes them on, and a surrogate without old log-probs more so."""
    gains, bad = {}, {}
    for name in ("topr", "areinforce", "spo"):
        gains[name], bad[name] = taught_by_what_was_said_before(make_policy("gpt2"), name, tmp_path / name)
    assert gains["topr"] > 5 and gains["areinforce"] > 5
    assert bad["topr"] > 0.7 * bad["areinforce"] and bad["areinforce"] > bad["spo"]  # measured: −31, −68, −87


def test_the_kl_controller_raises_and_lowers_the_penalty(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    coefficients = {}
    for target in (0.0, 1e-4, 10.0):
        out = tmp_path / str(target)
        config = settings(out, kl_target=target, kl_coef=0.02, steps=5, lr=1e-2)
        train(make_policy("gpt2"), PROMPTS, quick(share_of_even), config, quiet=True)
        coefficients[target] = logged(out, "train/kl_coef")
    assert coefficients[0.0] == [0.02] * 5
    # on the first step there is no KL yet, which lowers it by the most that a step may
    assert coefficients[1e-4][:2] == pytest.approx([0.02, 0.0196])
    assert coefficients[1e-4][-1] == pytest.approx(0.0196 * 1.02**3)
    assert coefficients[10.0] == pytest.approx([0.02 * 0.98**k for k in range(5)])


def test_a_band_leaves_out_completions_that_drifted(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    options = {"algorithm": "ppo", "baseline": "leave_one_out", "epochs": 1, "steps": 2}
    train(
        make_policy("gpt2"), PROMPTS, quick(share_of_even), quiet=True,
        config=settings(tmp_path / "wide", correction_band=0.1, **options),
    )  # fmt: skip
    assert logged(tmp_path / "wide", "train/correction") == [1.0, 1.0]  # on policy nothing has drifted


def test_a_dense_answer_that_was_not_announced_is_refused_where_it_would_be_summed(
    make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    for algorithm in ("dr_grpo", "topr"):
        with pytest.raises(OperantError, match=f"{algorithm} would sum the dense reward"):
            train(
                make_policy("gpt2"), PROMPTS, quick(lambda p, c: [1.0] * len(c.tokens)), quiet=True,
                config=settings(tmp_path / algorithm, algorithm=algorithm, max_tokens=6),
            )  # fmt: skip
