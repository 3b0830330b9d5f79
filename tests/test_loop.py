"""The reward loop and the supervised stages: invariants of the first step, exact resume, and how runs end."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import TEXTS
from forks import PATIENCE, Forked
from runs import (
    DEV,
    PROMPTS,
    WANTED,
    assert_same_run,
    dense_even,
    dense_wanted,
    everything,
    interrupted,
    logged,
    quick,
    same,
    settings,
    share_of_even,
    share_of_wanted,
)
from streams import Slow, UpToThree

from operant.algorithms.learner import Adam
from operant.config import PretrainConfig, SftConfig
from operant.data.prompts import Pair
from operant.models.policy import Policy
from operant.models.sampler import Sampler
from operant.rewards import RewardRunner, RunningNorm, Sum
from operant.rl.evaluate import evaluate
from operant.rl.loop import TrainResult, check_request, train
from operant.stages import pretrain, sft, supervised
from operant.types import Completion, OperantError, Prompt, SamplerProtocol, Sampling

# --- the first step --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(
    ("family", "algorithm"), [("gpt2", "ppo"), ("t5", "rloo"), ("llama", "grpo"), ("bart", "reinforce")]
)
def test_on_the_first_step_the_ratio_is_one_and_the_kl_zero(
    family: str, algorithm: str, temperature: float, make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    train(
        make_policy(family), PROMPTS, quick(share_of_even), quiet=True,
        config=settings(tmp_path / "run", algorithm=algorithm, temperature=temperature, kl_coef=0.1, steps=3),
    )  # fmt: skip
    gap, kl, moved = (logged(tmp_path / "run", f"train/{k}") for k in ("sampler_gap", "kl_ref", "approx_kl"))
    assert gap[0] < 1e-5 and abs(kl[0]) < 1e-6 and abs(moved[0]) < 1e-9
    assert max(gap) < 1e-5  # the sampler has the new weights in every later step too
    assert any(abs(x) > 1e-6 for x in kl[1:])


def test_several_passes_start_at_ratio_one_and_then_move(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    config = settings(tmp_path / "run", algorithm="ppo", epochs=3, minibatches=2, steps=2, lr=1e-2)
    result = train(make_policy("gpt2"), PROMPTS, quick(share_of_even), config, quiet=True)
    assert result.steps == 2
    assert min(logged(tmp_path / "run", "train/approx_kl")) > 1e-6  # of the last pass
    assert max(logged(tmp_path / "run", "train/sampler_gap")) < 1e-5  # of the old weights


# --- learning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("algorithm", "options"),
    [
        ("rloo", {}),
        ("rloo", {"dense": True}),
        ("grpo", {"epochs": 2}),
        ("ppo", {"dense": True, "gamma": 0.9, "discount_state": True}),
        ("reinforce", {"kl_coef": 0.01, "kl_estimator": "full", "entropy_coef": 0.001}),
        ("rloo", {"kl_coef": 0.01, "kl_in": "reward", "dense": True}),
    ],
)
def test_a_reward_is_learned(
    algorithm: str, options: dict[str, Any], make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    options = dict(options)
    dense = options.pop("dense", False)
    reward = quick(dense_wanted, dense=True) if dense else quick(share_of_wanted)
    policy = make_policy("gpt2")
    with torch.no_grad():  # flat enough to explore
        policy.model.transformer.wte.weight.mul_(0.2)
    config = settings(
        tmp_path / "run",
        algorithm=algorithm,
        steps=25,
        group_size=8,
        prompts_per_step=6,
        lr=2e-2,
        max_tokens=4,
        **options,
    )
    train(policy, PROMPTS, reward, config, quiet=True)
    rewards = logged(tmp_path / "run", "train/reward_mean")
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.3


def test_a_normalised_reward_is_held_out_on_its_own_scale(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    def tenfold(prompt: Prompt, completion: Completion) -> float:
        return 10 * share_of_even(prompt, completion)

    def run(name: str, **options: Any) -> TrainResult:
        config = settings(
            tmp_path / name, steps=8, eval_every=4, save_every=4, keep=9, prompts_per_step=6, group_size=6, lr=1e-2,
            log_samples=len(DEV), **options,
        )  # fmt: skip
        reward = Sum([RunningNorm(quick(tenfold))], [2.0])
        return train(make_policy("gpt2"), PROMPTS, reward, config, dev_prompts=DEV, quiet=True)

    result = run("run")
    held_out = logged(tmp_path / "run", "eval/reward")
    assert held_out[-1] > held_out[0] and result.best_step > 0
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    for step, value in zip((0, 4, 8), held_out, strict=True):
        saved = max((tmp_path / "run" / "checkpoints").glob(f"step-{step:08d}*"))
        with RewardRunner(quick(tenfold), workers=0) as bare:
            values, _ = evaluate(
                Sampler(Policy.load(saved / "model", device="cpu")), DEV, runner=bare,
                sampling=Sampling(temperature=0.0, max_tokens=6),
            )  # fmt: skip
        assert value == pytest.approx(2 * values["reward"])
        assert np.mean([row["reward"] for row in samples if row["step"] == step]) == pytest.approx(value)
    reached = run("reached", target=f"reward>={np.mean(held_out)}")
    assert reached.steps > 0 and reached.stop_reason.startswith("the target")


# --- another engine --------------------------------------------------------------------------------------------------


class TwoAnswers(SamplerProtocol):
    """A sampler without a model: the first answer of a group is the wanted one, the others are another."""

    pending = saved_tokens = 0

    def __init__(self) -> None:
        self.loaded: list[Any] = []
        self.asked: list[Any] = []

    def load(self, version: int, policy: Any = None) -> None:
        self.loaded.append((version, policy))

    def sample(
        self, prompts: Any, sampling: Sampling, n: int = 1, *, stream: Any = None, audit_fraction: Any = None,
        progress: Any = None,
    ) -> list[list[Completion]]:  # fmt: skip
        self.asked.append((len(prompts), n, sampling.temperature, audit_fraction))
        self.saved_tokens += 5
        return [[self.answer(prompt, i, sampling) for i in range(n)] for prompt in prompts]

    def answer(self, prompt: Prompt, number: int, sampling: Sampling) -> Completion:
        tokens, drawn = np.full(3, WANTED - number), np.full(3, -1.0, np.float32)
        return Completion(
            f"{prompt.id}#{number}", prompt.id, "xyz", tokens, np.array([1, 2, 3]), behavior_logprobs=drawn,
            model_logprobs=drawn, sampled=np.ones(3, np.bool_), policy_version=np.zeros(3, np.int64), sampling=sampling,
        )  # fmt: skip


def test_another_sampler_takes_the_place_of_ours(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    policy, sampler = make_policy("gpt2"), TwoAnswers()
    config = settings(tmp_path / "run", steps=5, eval_every=5, kl_coef=0.01, audit_fraction=0.25)
    seen = [likelihood_of_wanted(policy)]
    train(
        policy, PROMPTS, quick(share_of_wanted), config, dev_prompts=DEV, sampler=sampler, quiet=True,
        callbacks=[lambda step, metrics: seen.append(likelihood_of_wanted(policy))],
    )  # fmt: skip
    assert len(seen) == 6 and seen[-1] > seen[0] + 0.1
    # the weights of every step, then what it wrote of them: one look, five rollouts, one look
    assert sampler.loaded == [(version, policy) for version in range(6)]
    assert sampler.asked == [(3, 1, 0.0, 1.0), *[(4, 3, 1.0, 0.25)] * 5, (3, 1, 0.0, 1.0)]
    assert logged(tmp_path / "run", "train/reward_mean") == pytest.approx([1 / 3] * 5)
    assert logged(tmp_path / "run", "eval/reward") == [1.0, 1.0]


def likelihood_of_wanted(policy: Policy) -> float:
    """log p of the wanted token after each prompt, the mean."""
    with torch.no_grad():
        _, logits = policy.prefill([p.tokens for p in PROMPTS])
    return float(torch.log_softmax(logits, -1)[:, WANTED].mean())


class Watching:
    """A streaming reward that never ends a completion."""

    def start(self, prompt: Prompt) -> Watching:
        return self

    def step(self, token: int, text: str) -> float:
        return float(token == WANTED)


def test_tokens_that_were_saved_are_counted_from_the_start_of_the_run(
    make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    """Over a resume, and whatever the sampler has done before."""
    used = TwoAnswers()
    used.saved_tokens = 1000
    for steps, sampler in ((2, used), (4, TwoAnswers())):
        config = settings(tmp_path / "run", steps=steps, resume=steps > 2, reward_workers=0)
        train(make_policy("gpt2"), PROMPTS, Watching(), config, sampler=sampler, quiet=True)
    assert logged(tmp_path / "run", "train/saved_tokens") == [5.0, 10.0, 15.0, 20.0]


def test_held_out_answers_are_measured_without_a_model() -> None:
    asked = [Prompt("a", np.arange(3), references=("xyz",)), Prompt("b", np.arange(3), references=("abc",))]
    with RewardRunner(quick(share_of_wanted), workers=0) as runner:
        values, answers = evaluate(
            TwoAnswers(), asked, sampling=Sampling(temperature=0.0), metrics=["exact"], runner=runner
        )
    assert [c.prompt_id for c in answers] == ["a", "b"]
    assert values["exact"] == 0.5 and values["reward"] == 1.0 and values["length"] == 3.0
    assert values["reward_missing"] == values["truncated"] == 0.0


def test_what_cannot_be_honoured_is_refused_before_anything_is_begun(
    make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    policy = make_policy("gpt2")
    config = settings(tmp_path / "run", max_tokens=46)
    request = check_request(policy, PROMPTS, quick(share_of_wanted), config, dev_prompts=DEV)
    assert request.reward.name == request.config.reward == "share_of_wanted" and request.config.dense is False
    # PROMPTS of 3, 4 and 5 tokens and DEV of 2, 3 and 4 in a context of 48
    assert request.notes == ["8 of 9 prompts leave less than 46 tokens for a completion (the model's context has 48)"]
    with pytest.raises(OperantError, match="needs held-out prompts"):
        check_request(policy, PROMPTS, "length", settings(tmp_path / "run", target="reward>=1"))
    assert not (tmp_path / "run").exists()


# --- exact resume ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop_at", [1, 3])
@pytest.mark.parametrize(
    ("family", "reward", "options"),
    [
        ("gpt2", lambda: quick(share_of_even), {"algorithm": "reinforce", "kl_coef": 0.05}),
        ("t5", lambda: RunningNorm(quick(share_of_even)), {"algorithm": "ppo", "epochs": 2, "minibatches": 2}),
        ("llama", lambda: quick(dense_even, dense=True), {"schedule": "cosine", "eval_every": 2}),
    ],
    ids=["running baseline", "running normalisation", "control variate"],
)
def test_the_loop_resumes_bit_for_bit(
    family: str, reward: Callable[[], Any], options: dict[str, Any], stop_at: int,
    make_policy: Callable[..., Policy], tmp_path: Path,
) -> None:  # fmt: skip
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(make_policy(family), PROMPTS, reward(), settings(whole, **options), dev_prompts=DEV, quiet=True)
    first = train(
        make_policy(family), PROMPTS, reward(), settings(parts, **options), dev_prompts=DEV, quiet=True,
        callbacks=[interrupted(stop_at)],
    )  # fmt: skip
    assert first.steps == stop_at and first.stop_reason == "a callback asked to stop"
    second = train(
        make_policy(family), PROMPTS, reward(), settings(parts, resume=True, **options), dev_prompts=DEV, quiet=True
    )
    assert second.steps == 6
    assert_same_run(whole, parts)
    for key in ("train/reward_mean", "train/loss", "train/kl_ref"):
        assert same(logged(whole, key), logged(parts, key))
    # where a run stops early it is looked at once more than a run that goes straight on
    assert set(logged(whole, "eval/reward")) <= set(logged(parts, "eval/reward"))
    assert len(set(logged(whole, "train/reward_mean"))) > 1 and logged(whole, "train/grad_norm")[0] > 0
    state = everything(whole)[2]["state"]
    if options.get("algorithm") == "reinforce":
        assert len(state["running"]) == len(state["running_weight"]) and state["running_weight"][0] > 0
    if isinstance(reward(), RunningNorm):
        assert state["rewards"]["reward"]["count"] == 6 * 12


def leaving(function: Callable[..., Any], call: int) -> Callable[..., Any]:
    """Raises what a second Ctrl-C raises when the function has done its `call`-th work."""
    calls = iter(range(1, 10_000))

    def wrapped(*arguments: Any, **options: Any) -> Any:
        answer = function(*arguments, **options)
        if next(calls) == call:
            raise KeyboardInterrupt
        return answer

    return wrapped


@pytest.mark.parametrize(
    ("where", "call", "saved"),
    [
        ("reward", 1, 0),  # of the held-out completions before the first step
        ("reward", 3 + 3 * 12 + 3 + 5, 2),  # sampling the fourth step
        ("reward", 3 + 3 * 12 + 2, 2),  # of the held-out completions after the third
        ("update", 4, 2),
    ],
)
def test_leaving_in_the_middle_of_a_step_saves_nothing_of_it(
    where: str, call: int, saved: int, make_policy: Callable[..., Policy], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def run(name: str, function: Callable[..., float] = share_of_even, resume: bool = False) -> None:
        train(
            make_policy("gpt2"), PROMPTS, RunningNorm(quick(function, name="even")), dev_prompts=DEV, quiet=True,
            config=settings(
                tmp_path / name, algorithm="reinforce", save_every=2, eval_every=3, resume=resume,
                accept_changes=resume,  # the reward that leaves is another one
            ),
        )  # fmt: skip

    run("whole")
    with monkeypatch.context() as patch:
        if where == "update":
            patch.setattr(Adam, "step", leaving(Adam.step, call))
        with pytest.raises(KeyboardInterrupt):
            run("parts", leaving(share_of_even, call if where == "reward" else 0))
    facts = json.loads((tmp_path / "parts" / "run.json").read_text())
    assert facts["steps"] == everything(tmp_path / "parts")[2]["step"] == saved
    assert (tmp_path / "parts" / "model").is_dir()
    if saved:
        assert facts["stop_reason"] == f"interrupted in the middle of a step; --resume goes on from step {saved}"
    run("parts", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    for key in ("train/reward_mean", "train/loss", "eval/reward"):
        assert same(logged(tmp_path / "whole", key), logged(tmp_path / "parts", key))


@pytest.mark.parametrize(("where", "saved"), [("update", 4), ("held out", 2)])
def test_leaving_a_supervised_stage_in_the_middle_of_a_step(
    where: str, saved: int, make_policy: Callable[..., Policy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(name: str, resume: bool = False) -> None:
        policy = make_policy("gpt2")
        config = SftConfig(
            out=str(tmp_path / name), batch_size=4, steps=6, eval_every=3, save_every=2, lr=3e-3, device="cpu",
            tensorboard=False, seed=2, resume=resume,
        )  # fmt: skip
        sft(config, policy=policy, pairs=pairs(policy), dev_pairs=pairs(policy)[:3], quiet=True)

    run("whole")
    with monkeypatch.context() as patch:
        if where == "update":
            patch.setattr(Adam, "step", leaving(Adam.step, 6))
        else:
            patch.setattr(supervised, "mean_loss", leaving(supervised.mean_loss, 2))
        with pytest.raises(KeyboardInterrupt):
            run("parts")
    assert everything(tmp_path / "parts")[2]["step"] == saved
    run("parts", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert same(logged(tmp_path / "whole", "eval/loss"), logged(tmp_path / "parts", "eval/loss"))


def pairs(policy: Policy) -> list[Pair]:
    eos = np.array([policy.codec.eos_id])
    return [
        Pair(Prompt(f"s{i}", np.arange(40, 43 + i % 3)), np.concatenate([np.arange(60, 62 + i % 4), eos]), "")
        for i in range(10)
    ]


@pytest.mark.parametrize("stage", ["sft", "pretrain", "denoising"])
def test_the_supervised_stages_resume_bit_for_bit_with_dropout(
    stage: str, make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    family = "t5" if stage == "denoising" else "gpt2"
    common = {"steps": 6, "eval_every": 2, "lr": 3e-3, "device": "cpu", "tensorboard": False, "seed": 2}

    def run(out: Path, limit: int | None = None, resume: bool = False) -> Policy:
        policy = make_policy(family, dropout=0.2)
        # stopping early by the number of steps would change the schedule; a callback on the learner does not
        with pytest.MonkeyPatch.context() as patch:
            if limit is not None:
                from operant.run.run import Run

                record = Run.record

                def stopping(self: Run, *args: Any, **kwargs: Any) -> None:
                    record(self, *args, **kwargs)
                    if self.step == limit:
                        self.stop("enough")

                patch.setattr(Run, "record", stopping)
            if stage == "sft":
                config = SftConfig(out=str(out), batch_size=4, resume=resume, schedule="cosine", **common)
                sft(config, policy=policy, pairs=pairs(policy)[:8], dev_pairs=pairs(policy)[8:], quiet=True)
            else:
                config = PretrainConfig(out=str(out), batch_tokens=64, accumulate=2, resume=resume, block=24, **common)
                pretrain(config, policy=policy, texts=TEXTS * 3, dev_texts=TEXTS[:2], quiet=True)
        return policy

    run(tmp_path / "whole")
    run(tmp_path / "parts", limit=3)
    run(tmp_path / "parts", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    losses = logged(tmp_path / "whole", "train/loss")
    assert len(losses) == 6 and losses == logged(tmp_path / "parts", "train/loss")
    # where a run stops early it is looked at once more than a run that goes straight on
    assert set(logged(tmp_path / "whole", "eval/loss")) <= set(logged(tmp_path / "parts", "eval/loss"))


def test_fine_tuning_fits_its_pairs(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    policy = make_policy("bart")
    config = SftConfig(
        out=str(tmp_path / "run"), steps=30, batch_size=8, lr=1e-2, device="cpu", tensorboard=False, eval_every=10,
        label_smoothing=0.05,
    )  # fmt: skip
    result = sft(config, policy=policy, pairs=pairs(policy), dev_pairs=pairs(policy), quiet=True)
    losses = logged(tmp_path / "run", "eval/loss")
    assert result.dev_loss == min(losses) < losses[0] / 2


# --- how runs end ----------------------------------------------------------------------------------------------------


@pytest.mark.draws
def test_a_run_whose_rewards_are_all_missing_stops_and_says_why(
    make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    def broken(prompt: Prompt, completion: Completion) -> float:
        raise KeyError("no such column")

    policy = make_policy("gpt2")
    before = [p.detach().clone() for p in policy.model.parameters()]
    with pytest.raises(OperantError, match=r"every reward was missing.*no such column"):
        train(policy, PROMPTS, quick(broken), settings(tmp_path / "run", weight_decay=0.0), quiet=True)
    assert all(torch.equal(a, b) for a, b in zip(before, policy.model.parameters(), strict=True))
    assert "every reward was missing" in json.loads((tmp_path / "run" / "run.json").read_text())["stop_reason"]
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.parametrize("report", [True, False])
def test_a_run_has_a_report_where_one_is_wanted(
    report: bool, make_policy: Callable[..., Policy], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    train(make_policy("gpt2"), PROMPTS, quick(share_of_even), settings(out, steps=1, report=report))
    assert (out / "report.html").exists() == report and bool(list((out / "curves").glob("*"))) == report
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.endswith(f"Model in {out}/model" + f", report in {out}/report.html" * report)


def test_some_missing_rewards_cost_only_their_rows(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    calls = iter(range(1000))

    def often(prompt: Prompt, completion: Completion) -> float | None:
        return None if next(calls) % 3 == 0 else share_of_even(prompt, completion)

    result = train(make_policy("gpt2"), PROMPTS, quick(often), settings(tmp_path / "run", steps=3), quiet=True)
    assert result.steps == 3
    assert logged(tmp_path / "run", "train/missing/none") == [4, 8, 12]
    assert logged(tmp_path / "run", "train/usable") == pytest.approx([2 / 3] * 3)
    assert all(math.isfinite(x) for x in logged(tmp_path / "run", "train/loss"))


@pytest.mark.parametrize("algorithm", ["rloo", "reinforce"])
def test_where_no_return_is_ever_known_the_run_says_so(
    algorithm: str, make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    def but_the_last(prompt: Prompt, completion: Completion) -> list[float | None]:
        return [*(1.0 for _ in completion.tokens[1:]), None]

    reward, config = quick(but_the_last, dense=True), settings(tmp_path / "run", algorithm=algorithm)
    with pytest.raises(OperantError, match="every reward was missing"):
        train(make_policy("gpt2"), PROMPTS, reward, config, quiet=True)
    if algorithm == "reinforce":  # each reward is its own return
        train(
            make_policy("gpt2"),
            PROMPTS,
            reward,
            settings(tmp_path / "near", algorithm=algorithm, gamma=0.0),
            quiet=True,
        )
        assert logged(tmp_path / "near", "train/grad_norm")[0] > 0


def test_held_out_prompts_need_references_where_the_reward_does(
    make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    bare = [Prompt("d0", np.arange(50, 53))]
    with pytest.raises(OperantError, match=r"reward 'chrf' needs references and 1 of 1 prompts have none.*d0"):
        train(make_policy("gpt2"), PROMPTS, "chrf", settings(tmp_path / "run"), dev_prompts=bare, quiet=True)


def test_prompts_may_come_from_a_generator(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    found = train(
        make_policy("gpt2"), (p for p in PROMPTS), quick(share_of_even), settings(tmp_path, steps=1), quiet=True
    )  # type: ignore[arg-type]
    assert found.steps == 1


@pytest.mark.parametrize(("baseline", "by_position"), [("position_leave_one_out", True), ("control_variate", False)])
def test_tokens_after_the_last_missing_reward_are_taught_where_the_baseline_allows(
    baseline: str, by_position: bool, make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    def after_the_first(prompt: Prompt, completion: Completion) -> list[float | None]:
        return [None, *(float(token % 2) for token in completion.tokens[1:])]

    config, reward = settings(tmp_path / "run", steps=2, baseline=baseline), quick(after_the_first, dense=True)
    if not by_position:
        with pytest.raises(OperantError, match="every reward was missing"):
            train(make_policy("gpt2"), PROMPTS, reward, config, quiet=True)
        return
    train(make_policy("gpt2"), PROMPTS, reward, config, quiet=True)
    assert logged(tmp_path / "run", "train/grad_norm")[0] > 0
    assert min(logged(tmp_path / "run", "train/usable")) > 0.5
    assert logged(tmp_path / "run", "train/missing/partial")


def test_rows_without_a_usable_reward_are_taught_nothing_at_all(
    make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    """One reward in a group has no fellow to be compared with; entropy and KL leave such rows alone too."""
    calls = iter(range(1000))
    policy = make_policy("gpt2")
    before = [p.detach().clone() for p in policy.model.parameters()]
    config = settings(
        tmp_path / "run",
        steps=2,
        prompts_per_step=1,
        entropy_coef=1.0,
        kl_coef=1.0,
        kl_estimator="full",
        weight_decay=0.0,
    )
    reward = quick(lambda p, c: 1.0 if next(calls) % 3 == 0 else None)
    assert train(policy, PROMPTS, reward, config, quiet=True).steps == 2
    assert logged(tmp_path / "run", "train/usable") == [0, 0]
    assert all(torch.equal(a, b) for a, b in zip(before, policy.model.parameters(), strict=True))


def test_a_target_that_is_reached_in_the_step_of_a_ctrl_c_ends_the_run_that_goes_on(
    make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    value, signals = [0.0], [signal.SIGINT]

    def later(prompt: Prompt, completion: Completion) -> float:
        if value[0] and signals:
            signal.raise_signal(signals.pop())
        return value[0]

    def rise(step: int, metrics: dict[str, float]) -> bool:
        value[0] = float(step >= 3)
        return False

    config = settings(tmp_path / "run", eval_every=2, target="reward>=1")
    first = train(make_policy("gpt2"), PROMPTS, quick(later), config, dev_prompts=DEV, callbacks=[rise], quiet=True)
    assert first.steps == 4 and first.stop_reason.startswith("interrupted")
    again = train(
        make_policy("gpt2"), PROMPTS, quick(later), config, dev_prompts=DEV, callbacks=[rise], resume=True, quiet=True
    )
    assert again.steps == 4 and again.stop_reason.startswith("the target")


def test_a_best_checkpoint_that_was_lost_costs_no_run(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    worth = [0.0]

    def falling(prompt: Prompt, completion: Completion) -> float:
        return worth[0] + 0.01 * share_of_even(prompt, completion)

    def fall(step: int, metrics: dict[str, float]) -> bool:
        worth[0] = -float(step)
        return False

    def run(**options: Any) -> TrainResult:
        config = settings(tmp_path / "run", eval_every=1, save_every=2, **options)
        return train(
            make_policy("gpt2"), PROMPTS, quick(falling), config, dev_prompts=DEV, callbacks=[fall], quiet=True
        )

    assert run(steps=4).best_step < 4
    for lost in sorted((tmp_path / "run" / "checkpoints").glob("step-*"))[:-1]:
        shutil.rmtree(lost)
    assert run(steps=6, resume=True).steps == 6
    assert json.loads((tmp_path / "run" / "run.json").read_text())["stop_reason"] == "all 6 steps done"


def test_a_streaming_part_of_a_sum_ends_rows_and_a_hanging_one_costs_only_its_rows(
    make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    """And what it says it optimises is in run.json, for the report."""
    out = tmp_path / "run"
    reward = Sum([UpToThree(slow=True), quick(share_of_even)], [2.0, 1.0])
    train(make_policy("gpt2"), PROMPTS, reward, settings(out, steps=2, reward_seconds=0.2), dev_prompts=DEV, quiet=True)
    assert max(logged(out, "train/stopped")) > 0.3
    assert logged(out, "train/missing/timeout") == [3, 6] and logged(out, "train/usable") == [0.75, 0.75]
    assert 0 < logged(out, "train/reward/up-to-three")[0] <= 1.5
    assert json.loads((out / "run.json").read_text())["optimises"] == ["exact"]


def test_a_streaming_reward_has_its_time_for_each_token_of_held_out_texts_too(
    make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    config = settings(out, steps=1, group_size=1, prompts_per_step=1, algorithm="reinforce", reward_seconds=0.2)
    train(make_policy("gpt2"), PROMPTS, Slow(), config, dev_prompts=DEV[:1], quiet=True)
    assert logged(out, "eval/reward") == [0.5 * length for length in logged(out, "eval/length")]
    assert max(logged(out, "eval/length")) * 0.05 > config.reward_seconds  # all together would be too slow


def test_every_token_carries_the_version_that_drew_it(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    versions: list[set[int]] = []

    def noting(prompt: Prompt, completion: Completion) -> float:
        assert completion.policy_version is not None
        versions.append(set(completion.policy_version.tolist()))
        return share_of_even(prompt, completion)

    train(make_policy("gpt2"), PROMPTS, quick(noting), settings(tmp_path / "run", steps=3), quiet=True)
    assert versions == [{step} for step in range(3) for _ in range(12)]


def test_a_run_keeps_the_numbers_in_force_and_resumes_by_what_it_kept(
    make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    """Also a run of before a key was there, or had its name, or when `auto` was kept."""
    file = tmp_path / "run" / "config.yaml"
    auto = {"lr": "auto", "algorithm": "trpo", "dense": False}

    def go_on(steps: int, change: Callable[[dict[str, Any]], None] = lambda kept: None, **options: Any) -> int:
        kept = yaml.safe_load(file.read_text())
        change(kept)
        file.write_text(yaml.safe_dump(kept))
        config = settings(tmp_path / "run", **{**auto, "steps": steps, "resume": True, **options})
        return train(make_policy("gpt2"), PROMPTS, quick(share_of_even), config, quiet=True).steps

    train(
        make_policy("gpt2"),
        PROMPTS,
        quick(share_of_even),
        settings(tmp_path / "run", **{**auto, "steps": 1}),
        quiet=True,
    )
    kept = yaml.safe_load(file.read_text())
    assert {name for name, value in kept.items() if value == "auto"} == {"potential", "beta", "lam", "critic"}
    assert kept["baseline"] == "leave_one_out" and isinstance(kept["clip_high"], float) and kept["lr"] == 1e-4
    assert go_on(2) == 2
    assert go_on(3, lr=1e-4, baseline="leave_one_out") == 3
    assert go_on(4, lambda kept: kept.update(auto, baseline="auto", clip_low="auto", bootstrap="auto")) == 4

    def age(kept: dict[str, Any]) -> None:
        del kept["fisher_share"], kept["clock"]
        kept["max_sick_steps"] = kept.pop("max_nonfinite_steps")

    with pytest.raises(OperantError, match=r"fisher_share: was 1\.0, now 0\.1"):
        go_on(5, age)
    assert go_on(5, fisher_share=1.0) == 5
    with pytest.raises(OperantError, match=r"lr: was 0\.0001, now 0\.5"):
        go_on(6, lr=0.5, fisher_share=1.0)


def test_sick_steps_are_skipped_counted_and_rolled_back(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    policy = make_policy("gpt2")
    before: list[torch.Tensor] = []

    def poison(step: int, metrics: dict[str, float]) -> bool:
        if step == 2 and not before:
            before.extend(p.detach().clone() for p in policy.model.parameters())
            # a hook, not a weight: what is rolled back must be told from what was poisoned
            policy.model.lm_head.register_forward_hook(
                lambda m, a, out: out * math.nan if torch.is_grad_enabled() else out
            )
        return False

    config = settings(tmp_path / "run", steps=20, save_every=2, max_nonfinite_steps=3)
    with pytest.raises(OperantError, match=r"3 steps in a row were non-finite.*rolled back to step 2"):
        train(policy, PROMPTS, quick(share_of_even), config, callbacks=[poison], quiet=True)
    assert all(torch.equal(a, b) for a, b in zip(before, policy.model.parameters(), strict=True))
    assert logged(tmp_path / "run", "train/skipped") == [1, 2, 3]


def test_the_target_and_callbacks_end_a_run_and_the_best_is_kept(
    make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    seen: list[int] = []

    def judged(prompt: Prompt, completion: Completion) -> float:
        """Held-out prompts are liked less and less after the second measurement."""
        if prompt.id.startswith("d"):
            return [0.1, 0.6, 0.2, 0.9][min(3, seen.count(1))]
        return share_of_even(prompt, completion)

    def count(step: int, metrics: dict[str, float]) -> None:
        seen.append(1)

    policy = make_policy("gpt2")
    config = settings(tmp_path / "run", steps=20, eval_every=1, target="reward>=0.9", eval_prompts=2)
    result = train(policy, PROMPTS, quick(judged), config, dev_prompts=DEV, callbacks=[count], quiet=True)
    # measured before a step's callback: after 0, 1, 2, 3, 4 steps the reward is 0.1, 0.1, 0.6, 0.2, 0.9
    assert logged(tmp_path / "run", "eval/reward") == pytest.approx([0.1, 0.1, 0.6, 0.2, 0.9])
    assert result.steps == 4 and result.stop_reason == "the target reward>=0.9 is reached"
    assert result.best_step == 4 and result.best["reward"] == pytest.approx(0.9)
    assert result.first["reward"] == pytest.approx(0.1)

    seen.clear()
    policy = make_policy("gpt2")
    config = settings(tmp_path / "best", steps=3, eval_every=1, weight_decay=0.0)
    result = train(policy, PROMPTS, quick(judged), config, dev_prompts=DEV, callbacks=[count], quiet=True)
    assert result.best_step == 2 and result.best["reward"] == pytest.approx(0.6)
    served = Policy.load(tmp_path / "best" / "model", device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(served.model.parameters(), policy.model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"target": "bleu=30"}, "write it like bleu>=30"),
        ({"target": "reward>=1"}, "--dev_data"),
        ({"sft_coef": 0.1}, "--sft_data"),
        ({"algorithm": "grpo", "group_size": 1}, "--group_size 2"),
    ],
)
def test_faults_are_found_before_anything_is_written(
    options: dict[str, Any], told: str, make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    with pytest.raises(OperantError, match=told):
        train(make_policy("gpt2"), PROMPTS, quick(share_of_even), settings(tmp_path / "run", **options), quiet=True)
    with pytest.raises(OperantError, match="no prompts"):
        train(make_policy("gpt2"), [], quick(share_of_even), settings(tmp_path / "run"), quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("prompts", "told"),
    [
        ([Prompt("p0", np.arange(40, 44))], "prompt id 'p0' names two different prompts"),
        ([Prompt("long", np.arange(40, 90))], "prompt 'long' has 50 tokens and the model's context 48"),
        ([Prompt("full", np.arange(40, 88))], "prompt 'full' has 48 tokens and the model's context 48"),
    ],
)
@pytest.mark.parametrize("held_out", [False, True])
def test_prompts_that_share_an_id_or_do_not_fit_are_found_before_anything_is_written(
    held_out: bool, prompts: list[Prompt], told: str, make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    asked, dev = (PROMPTS, [PROMPTS[0], *prompts]) if held_out else ([*PROMPTS, *prompts], DEV)
    with pytest.raises(OperantError, match=told):
        train(make_policy("gpt2"), asked, quick(share_of_even), settings(tmp_path / "run"), dev_prompts=dev, quiet=True)
    assert not (tmp_path / "run").exists()


def test_prompts_that_leave_little_room_are_told_once(
    make_policy: Callable[..., Policy], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tight = Prompt("tight", np.arange(40, 85))
    again = [PROMPTS[0], PROMPTS[0], Prompt("d0", PROMPTS[1].tokens)]  # the same prompt twice is fine
    config = settings(tmp_path / "run", steps=2)
    train(make_policy("gpt2"), [*again, tight], quick(share_of_even), config, dev_prompts=DEV)
    assert capsys.readouterr().err.count("1 of 7 prompts leave less than 6 tokens for a completion") == 1


def test_a_grouped_estimator_that_would_sum_a_dense_answer_refuses_it(
    make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    with pytest.raises(OperantError, match="would sum the dense reward"):
        train(
            make_policy("gpt2"), PROMPTS, quick(lambda p, c: [1.0] * len(c.tokens)), quiet=True,
            config=settings(tmp_path / "run", algorithm="grpo"),
        )  # fmt: skip


def test_supervised_pairs_join_the_reward_step(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    policy = make_policy("gpt2")
    labelled = pairs(policy)
    config = settings(tmp_path / "run", sft_coef=1.0, steps=15, lr=1e-2, sft_batch_size=10)

    def likelihood() -> float:
        from operant.stages.sft import pairs_batch
        from operant.stages.supervised import mean_loss

        return mean_loss(policy, [pairs_batch(labelled, policy)])

    before = likelihood()
    train(policy, PROMPTS, quick(lambda p, c: 0.0), config, pairs=labelled, quiet=True)
    assert likelihood() < before / 2


# --- signals ---------------------------------------------------------------------------------------------------------

PROGRAM = """
import sys
sys.path[:0] = {paths!r}
import numpy as np, torch
torch.set_num_threads(1)
from conftest import TEXTS, sketch, tiny_model
from runs import PROMPTS, quick, settings, share_of_even
from operant.rl.loop import train
from operant.models.policy import Policy
from operant.data.text import Codec
from operant.run import report
from pathlib import Path

report._figure = sketch  # as in every test

def hold(step, metrics):
    if step == {hold}:
        print("held", flush=True)
        sys.stdin.readline()

codec = Codec.train_bpe(TEXTS * 3, vocab_size=288, sentinels=4)
result = train(
    Policy(tiny_model("gpt2", codec), codec, device="cpu"), PROMPTS, quick(share_of_even), quiet=True, callbacks=[hold],
    config=settings(Path({out!r}), steps=8, resume={resume}, save_every=2),
)
print(result.stop_reason, flush=True)
"""


def start(out: Path, *, hold: int, resume: bool = False) -> subprocess.Popen[str]:
    """A run that waits after the step `hold`; returns once it does."""
    here = Path(__file__).parent
    code = PROGRAM.format(paths=[str(here), str(here.parent)], out=str(out), hold=hold, resume=resume)
    pipe = subprocess.PIPE
    process = Forked([sys.executable, "-c", code], stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    assert process.stdout is not None
    if process.stdout.readline() != "held\n":
        raise AssertionError(process.communicate()[1])
    return process


def test_ctrl_c_saves_and_kill_loses_no_checkpoint_and_both_resume_exactly(
    tmp_path: Path, make_policy: Callable[..., Policy]
) -> None:
    """What gets a signal is a process of its own; what runs to its end needs none."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"

    def run(out: Path, resume: bool = False) -> None:
        config = settings(out, steps=8, resume=resume, save_every=2)
        train(make_policy("gpt2"), PROMPTS, quick(share_of_even), config, quiet=True)

    run(whole)
    broken = start(parts, hold=1)
    broken.send_signal(signal.SIGINT)
    out, err = broken.communicate("\n", timeout=PATIENCE)
    assert broken.returncode == 0, err
    assert "interrupted" in out
    saved = json.loads((parts / "run.json").read_text())
    assert "interrupted" in saved["stop_reason"] and (parts / "model" / "model.safetensors").exists()

    killed = start(parts, hold=5, resume=True)
    killed.kill()
    killed.communicate(timeout=PATIENCE)
    assert killed.returncode == -signal.SIGKILL
    run(parts, resume=True)
    assert_same_run(whole, parts)
    assert same(logged(whole, "train/loss"), logged(parts, "train/loss"))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT's own loading uses what Transformers deprecates
def test_an_adapter_learns_resumes_and_loads_in_plain_peft(
    tmp_path: Path, make_policy: Callable[..., Policy], monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import AutoPeftModelForCausalLM

    def adapted() -> Policy:
        policy = make_policy("llama")
        policy.add_lora(rank=2, seed=1)
        return policy

    whole = settings(tmp_path / "whole", kl_coef=0.1, kl_estimator="full", temperature=0.8)
    policy = train(adapted(), PROMPTS, quick(share_of_even), whole, quiet=True).policy
    halves = settings(tmp_path / "halves", kl_coef=0.1, kl_estimator="full", temperature=0.8)
    train(adapted(), PROMPTS, quick(share_of_even), halves, steps=3, quiet=True)
    train(adapted(), PROMPTS, quick(share_of_even), halves, resume=True, quiet=True)
    adapters = [sorted((tmp_path / n / "checkpoints").glob("step-*"))[-1] / "model" for n in ("whole", "halves")]
    left, right = ((a / "adapter_model.safetensors").read_bytes() for a in adapters)
    assert left == right

    monkeypatch.chdir(tmp_path / "whole" / "model")  # PEFT looks for the base from where it runs
    loaded = AutoPeftModelForCausalLM.from_pretrained(".")
    tokens = torch.tensor([[5, 6, 7, 8]])
    policy.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(tokens).logits, policy.model(tokens).logits)
        with policy.model.disable_adapter():
            assert not torch.allclose(loaded(tokens).logits, policy.model(tokens).logits)


@pytest.mark.parametrize("options", [{"best_metric": "blue"}, {"target": "blue>=3"}])
def test_a_metric_that_is_not_measured_is_refused_before_the_run(
    tmp_path: Path, make_policy: Callable[..., Policy], options: dict[str, str]
) -> None:
    with pytest.raises(OperantError, match="'blue' is not measured; did you mean 'bleu'"):
        train(make_policy("gpt2"), PROMPTS, quick(share_of_even), settings(tmp_path / "r", **options), dev_prompts=DEV)
    assert not (tmp_path / "r").exists()


def test_the_last_steps_before_an_early_stop_count(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    config = settings(tmp_path, steps=50, eval_every=40, lr=1e-2)
    result = train(
        make_policy("gpt2"), PROMPTS, quick(share_of_wanted), config, dev_prompts=DEV, quiet=True,
        callbacks=[lambda step, metrics: step == 25],
    )  # fmt: skip
    assert result.best_step == 25 and result.best["reward"] > result.first["reward"]
    kept = Policy.load(tmp_path / "model", device="cpu")
    assert same(kept.model.state_dict(), result.policy.model.state_dict())


def test_a_step_without_any_reward_moves_nothing(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    policy = make_policy("gpt2")
    seen: list[dict[str, Any]] = []

    def reward(prompt: Prompt, completion: Completion) -> float | None:
        return None if len(seen) == 2 else share_of_even(prompt, completion)

    def watch(step: int, metrics: dict[str, float]) -> None:
        seen.append({name: t.clone() for name, t in policy.model.state_dict().items()})

    train(policy, PROMPTS, quick(reward), settings(tmp_path, steps=4, weight_decay=0.1), callbacks=[watch], quiet=True)
    assert not same(seen[0], seen[1]) and same(seen[1], seen[2]) and not same(seen[2], seen[3])


def test_the_schedule_spans_every_pass_of_every_step(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    config = settings(tmp_path, algorithm="ppo", epochs=2, minibatches=2, schedule="linear", warmup_steps=0, lr=1e-3)
    train(make_policy("gpt2"), PROMPTS, quick(share_of_even), config, quiet=True)
    rates = logged(tmp_path, "train/lr")
    assert rates == sorted(rates, reverse=True) and len(set(rates)) == 6 and rates[2] > 5e-4


def test_the_run_folder_tells_the_reward_that_was_given(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    train(make_policy("gpt2"), PROMPTS, quick(share_of_even), settings(tmp_path, steps=1), quiet=True)
    assert "reward: share_of_even" in (tmp_path / "config.yaml").read_text()


def test_a_decaying_rate_is_resumed_with_its_own_number_of_steps(
    make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    config = settings(tmp_path, schedule="cosine", steps=2)
    train(make_policy("gpt2"), PROMPTS, quick(share_of_even), config, quiet=True)
    with pytest.raises(OperantError, match="steps: was 2, now 4"):
        train(make_policy("gpt2"), PROMPTS, quick(share_of_even), config, steps=4, resume=True, quiet=True)
    constant = settings(tmp_path / "constant", steps=2)
    train(make_policy("gpt2"), PROMPTS, quick(share_of_even), constant, quiet=True)
    more = train(make_policy("gpt2"), PROMPTS, quick(share_of_even), constant, steps=4, resume=True, quiet=True)
    assert more.steps == 4
