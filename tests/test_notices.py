"""What a run's series are said to mean: collapse, and rewards that teach nothing."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import DEV, PROMPTS, assert_same_run, interrupted, logged, quick, settings, share_of_even

from operant.models.policy import Policy
from operant.rl.loop import train
from operant.run.notices import IN_A_ROW, Notice, Series, new_notices, notices
from operant.run.report import load_run, write_report
from operant.run.runlog import RunLog
from operant.types import Completion, Prompt

SIX = [Prompt(f"d{i}", torch.arange(50, 52 + i).numpy()) for i in range(6)]


def line(*values: float) -> Series:
    return list(enumerate(values))


@pytest.mark.parametrize(
    ("name", "kept", "lost"),
    [
        ("eval/kl_ref", line(0.0, 0.9), line(0.0, 1.1)),
        ("eval/distinct2", line(0.8, 0.41), line(0.8, 0.39)),
        ("train/distinct2", line(0.8, 0.41), line(0.8, 0.39)),
        ("train/entropy", line(2.8, 0.71), line(2.8, 0.65)),
        ("eval/commonest", line(0.1, 0.89), line(0.1, 1.0)),
        ("eval/commonest", line(1.0, 1.0), line(0.5, 0.9)),  # it had one answer before the run
        ("eval/nll_good", line(2.0, 2.9), line(2.0, 3.1)),
        ("eval/reward", line(0.5, 0.48), line(0.5, 0.47)),
        ("eval/reward", line(-0.5, -0.52), line(-0.5, -0.53)),
        ("eval/bleu", line(0.6, 0.6), line(0.6, 0.0)),
    ],
)  # fmt: skip
def test_each_sign_of_collapse_has_its_bound(name: str, kept: Series, lost: Series) -> None:
    assert notices({name: kept}, {"bleu"}) == []
    (found,) = notices({name: lost}, {"bleu"})
    assert found.kind == "collapse"


@pytest.mark.parametrize(
    ("margin", "nll_good", "holds"),
    [
        (line(0.0, 10.0), line(2.0, 2.6), True),
        (line(0.0, 10.0), line(2.0, 2.4), False),  # DPO lowers both likelihoods a little
        (line(0.0, 10.0), line(2.0, 1.0), False),
        (line(0.0, 4.9), line(2.0, 2.6), False),
    ],
)
def test_a_margin_that_explodes_is_a_sign_where_the_likelihood_falls(
    margin: Series, nll_good: Series, holds: bool
) -> None:
    found = notices({"eval/margin": margin, "eval/nll_good": nll_good})
    assert [notice.name for notice in found] == ["margin"] * holds


def test_a_metric_that_is_not_optimised_may_fall() -> None:
    assert notices({"eval/chrf": line(60.0, 10.0)}, {"bleu"}) == []


def test_long_series_are_compared_by_their_first_and_last_tenth() -> None:
    one_bad_step = [2.0] * 99 + [0.0]
    assert notices({"train/entropy": line(*one_bad_step)}) == []
    assert [n.name for n in notices({"train/entropy": line(*[2.0] * 50, *[0.1] * 50)})] == ["entropy"]


def test_a_number_that_is_not_finite_says_nothing() -> None:
    assert notices({"eval/kl_ref": line(0.0, float("nan")), "eval/reward": line(float("nan"))}) == []


def test_constant_rewards_and_groups_that_tie_are_named() -> None:
    same = {"train/reward_std": line(*[0.0] * IN_A_ROW), "train/reward_mean": line(*[0.25] * IN_A_ROW)}
    tied = {"train/tied": line(*[1.0] * IN_A_ROW)}
    assert [n.name for n in notices(same | tied)] == ["constant"]
    assert "0.25" in notices(same)[0].text
    # each prompt has a reward of its own, and all its completions get it
    differ = same | {"train/reward_std": line(*[0.3] * IN_A_ROW)}
    assert [n.name for n in notices(differ | tied)] == ["tied"]
    assert notices({name: values[1:] for name, values in (same | tied).items()}) == []
    assert notices({"train/tied": line(1.0, 1.0, 0.5, 1.0, 1.0)}) == []


def test_a_thing_is_told_once_for_as_long_as_it_holds() -> None:
    first, second = Notice("collapse", "entropy", "gone"), Notice("idle", "tied", "all")
    known: set[str] = set()
    assert new_notices([first], known) == [first]
    assert new_notices([first, second], known) == [second]
    assert new_notices([second], known) == []
    assert new_notices([first, second], known) == [first]


def test_the_log_remembers_what_an_earlier_process_logged(tmp_path: Path) -> None:
    with RunLog(tmp_path, tensorboard=False) as log:
        log.log(1, {"train/entropy": 2.0, "eval/bleu": float("nan"), "train/loss": 1.0})
        log.log(2, {"train/entropy": 1.0})
    with RunLog(tmp_path, tensorboard=False, resume_step=1) as log:
        log.log(2, {"train/entropy": 0.1})
        assert log.series["train/entropy"] == [(1, 2.0), (2, 0.1)]
        assert log.series["eval/bleu"][0][1] != log.series["eval/bleu"][0][1]
        assert "train/loss" not in log.series


# --- runs ------------------------------------------------------------------------------------------------------------


def first_token_is_7(prompt: Prompt, completion: Completion) -> float:
    return float(completion.tokens[0] == 7)


def test_a_run_that_collapses_is_told_on_the_terminal_and_in_the_report(
    make_policy: Callable[..., Policy], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = make_policy("gpt2")
    with torch.no_grad():  # flat enough to explore, and to fall a long way
        policy.model.transformer.wte.weight.mul_(0.2)
    config = settings(
        tmp_path / "run", steps=30, group_size=8, prompts_per_step=6, lr=5e-2, max_tokens=4, eval_every=10, threads=1
    )
    train(
        policy, PROMPTS, quick(lambda p, c: float((c.tokens == 70).mean())), config, dev_prompts=SIX, quiet="settings"
    )
    told = capsys.readouterr().err
    assert "signs of collapse: " in told and "the entropy is gone" in told and "far from the beginning" in told
    assert "one answer for 100% of the held-out prompts" in told
    assert told.count("the entropy is gone") == 1  # and not at every look
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "The policy shows signs of collapse" in page and "the entropy is gone" in page
    assert "No clear sign of hacking" not in page


def test_a_run_of_one_step_is_not_called_clean(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    config = settings(tmp_path / "run", steps=1, lr=1e-6)
    train(make_policy("gpt2"), PROMPTS, quick(share_of_even), config, dev_prompts=DEV, quiet=True)
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "1 step can say nothing about hacking or collapse" in page
    assert "Nothing measured here speaks" not in page and "No clear sign" not in page


def test_a_report_without_rewards_tells_of_collapse_too(tmp_path: Path) -> None:
    with RunLog(tmp_path, tensorboard=False) as log:
        for step, kl in ((0, 0.0), (25, 3.0)):
            log.log(step, {"eval/kl_ref": kl, "eval/loss": 0.1})
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "Sign of collapse" in page and "held-out KL 3 nats/token" in page


@pytest.mark.parametrize(
    ("options", "moves"),
    [
        ({}, False),
        ({"algorithm": "grpo", "epochs": 2}, False),
        ({"algorithm": "reinforce_pp"}, False),  # whitened
        ({"kl_coef": 0.1}, True),
        ({"entropy_coef": 0.1}, True),
        ({"algorithm": "ppo"}, True),  # the critic has something to learn
    ],
)
def test_a_step_in_which_all_rewards_tie_moves_nothing_without_need(
    options: dict[str, Any], moves: bool, make_policy: Callable[..., Policy], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The first steps differ, so that Adam has a momentum that would move the weights in the later ones."""
    steps, seen = 2 + IN_A_ROW, []

    def reward(prompt: Prompt, completion: Completion) -> float:
        seen.append(completion)
        return share_of_even(prompt, completion) if len(seen) <= 24 else 0.3

    config = settings(tmp_path / "run", steps=steps, lr=1e-2, **options)
    weights: list[dict[str, torch.Tensor]] = []

    def keep(step: int, metrics: dict[str, float]) -> None:
        weights.append({k: v.clone() for k, v in policy.model.state_dict().items()})

    policy = make_policy("gpt2")
    result = train(policy, PROMPTS, quick(reward), config, callbacks=[keep], quiet="settings")
    moved = [any(not torch.equal(a[k], b[k]) for k in a) for a, b in itertools.pairwise(weights)]
    assert moved == [True] + [moves] * IN_A_ROW
    assert result.steps == steps and len(logged(tmp_path / "run", "train/reward_mean")) == steps
    assert logged(tmp_path / "run", "train/tied")[-IN_A_ROW:] == [1.0] * IN_A_ROW
    idle = [float(n) for n in range(1, IN_A_ROW + 1)]
    assert logged(tmp_path / "run", "train/idle") == ([] if moves else idle)
    assert len(logged(tmp_path / "run", "train/entropy")) == (steps if moves else 2)
    told = capsys.readouterr().err
    assert f"every reward of the last {IN_A_ROW} steps was 0.3, which teaches nothing" in told
    report = load_run(tmp_path / "run")
    assert [n.name for n in notices(report.series)] == ["constant"]


def test_steps_without_an_update_resume_exactly(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    """With a schedule and a warm-up, which count optimizer steps, and steps that take none between others."""
    reward = quick(lambda p, c: float(c.tokens[0] % 2) if p.id in ("p0", "p1") else 0.5)
    options: dict[str, Any] = {
        "steps": 9, "prompts_per_step": 2, "schedule": "linear", "warmup_steps": 3, "save_every": 2
    }  # fmt: skip
    whole = settings(tmp_path / "whole", **options)
    train(make_policy("gpt2"), PROMPTS, reward, whole, quiet=True)
    idle = logged(tmp_path / "whole", "train/idle")
    assert 0 < len(set(idle)) < 9
    part = settings(tmp_path / "part", **options)
    train(make_policy("gpt2"), PROMPTS, reward, part, callbacks=[interrupted(5)], quiet=True)
    train(make_policy("gpt2"), PROMPTS, reward, settings(tmp_path / "part", **options, resume=True), quiet=True)
    assert_same_run(tmp_path / "whole", tmp_path / "part")
    assert logged(tmp_path / "part", "train/idle") == idle
