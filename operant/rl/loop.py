"""The reward loop: sample, reward, credit, policy-gradient step, again, until the held-out target is met."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from operant.algorithms import objectives
from operant.algorithms.estimator import Estimator, Rollout
from operant.algorithms.learner import Learner, logprobs_of
from operant.algorithms.q_learning import QEstimator
from operant.algorithms.surrogate import Surrogate
from operant.algorithms.table import AlgorithmSettings, in_force, places_tokens, rate_in_words, resolve
from operant.algorithms.trust_region import TrustRegion
from operant.config import TrainConfig, current_names
from operant.data.batch import drawn, microbatches, select_rows
from operant.data.prompts import Pair, PromptFormat
from operant.data.rows import held_out_source
from operant.models.policy import Policy, is_pretrained
from operant.models.sampler import Sampler
from operant.rewards import (
    Reward,
    RewardRunner,
    as_reward,
    check_references,
    has_potential,
    optimised_metrics,
    potential_diagnostics,
    reward_by_name,
)
from operant.rl.episodes import Episodes, HeldOutEpisodes, check_episode_metric
from operant.rl.evaluate import distinct
from operant.rl.heldout import HeldOut, check_metric, read_target, target_metric
from operant.rl.logged import Logged, check_logged, judged, with_propensities
from operant.rl.rollouts import Rollouts, check_prompts, tied_share
from operant.run.notices import TIED
from operant.run.provenance import module_hashes, reward_hashes
from operant.run.run import DataOrder, Quiet, Run, as_begun, mixed_seed
from operant.types import Batch, Completion, OperantError, Prompt, SamplerProtocol, StepStats

ROUNDING = 1e-7  # of the largest return: an advantage below is none
CRITIC_RATE = 5.0  # a critic begins knowing nothing: its learning rate over the policy's, unless it is given

# (step, metrics of the step) → True to stop; called after every step
Callback = Callable[[int, dict[str, float]], bool | None]


@dataclass(slots=True)
class TrainResult:
    """Where the run is and what it reached. `best` holds the held-out metrics of the weights in `policy`."""

    policy: Policy
    out: Path
    steps: int
    seconds: float
    stop_reason: str
    best_step: int
    first: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)


def train(
    policy: Policy,
    prompts: Sequence[Prompt] = (),
    reward: Any = None,
    config: TrainConfig | None = None,
    *,
    dev_prompts: Sequence[Prompt] = (),
    pairs: Sequence[Pair] = (),
    logged: Sequence[tuple[Prompt, Completion, Any]] = (),
    sampler: SamplerProtocol | None = None,
    callbacks: Sequence[Callback] = (),
    quiet: Quiet = False,
    **options: Any,
) -> TrainResult:
    """Improve a policy by policy gradient on a reward.

    policy: changed in place; afterwards it has the best weights by `config.best_metric` on `dev_prompts`.
        With `config.environment` the policy plays its episodes instead, and there are neither prompts nor a reward.
    reward: any `reward(prompt, completion) -> float | one per token | spans | None`, or a name such as "chrf", which
        `config.dense` and `config.potential` complete. `dense=True` declares that a function pays per token; one that
        does without is noticed at the first step that it does.
    config: a TrainConfig; `options` replace single fields of it, such as `steps=200, out="runs/mine"`.
    pairs: labelled pairs for `sft_coef`. logged: completions that were written before, with a reward each or None, to
        learn from instead of new ones (see `logged.read_logged`); then there are no prompts.
    sampler: what writes the completions, idle, in place of our own; it is given each step's weights (`load`). Then
        `config.max_rows` is its own affair.
    callbacks: called as (step, metrics) after each step, True stops.
    quiet: print nothing; "settings" leaves out the configuration alone.

    Raises OperantError for what `check_request` refuses, when no logged completion has a reward, when `config.out`
    cannot be used, and when every reward of several steps in a row was missing.
    """
    config = as_begun(dataclasses.replace(config or TrainConfig(), **current_names(options)))
    request = check_request(policy, prompts, reward, config, dev_prompts=dev_prompts, pairs=pairs, logged=logged)
    config = request.config
    workers = None if config.reward_workers < 0 else config.reward_workers
    with (
        RewardRunner(request.reward, workers=workers, time_limit=config.reward_seconds) as runner,
        Run(config, "train", in_force=request.in_force, quiet=quiet) as run,
        contextlib.closing(_Loop(run, request, policy, runner, sampler)) as loop,
    ):
        for note in request.notes:
            run.note(note)
        return loop.go(callbacks)


@dataclass(slots=True)
class TrainRequest:
    """What `train` was asked for, checked and complete.

    config: with the reward's name and whether it is dense. in_force: what its `auto` settings are. reward: as the
    runner takes it. logged: the rows of a log that the algorithm can learn from. notes: what the person should know
    before it begins.
    """

    config: TrainConfig
    settings: AlgorithmSettings
    in_force: dict[str, Any]
    reward: Any
    prompts: list[Prompt]
    dev_prompts: list[Prompt]
    pairs: list[Pair]
    logged: list[tuple[Prompt, Completion, Any]]
    notes: list[str]


def check_request(
    policy: Policy,
    prompts: Sequence[Prompt],
    reward: Any,
    config: TrainConfig,
    *,
    dev_prompts: Sequence[Prompt] = (),
    pairs: Sequence[Pair] = (),
    logged: Sequence[tuple[Prompt, Completion, Any]] = (),
) -> TrainRequest:
    """Refuse by name what `train` cannot honour, before anything is begun. The arguments are those of `train`.

    Raises OperantError for a combination that the algorithm cannot honour, for missing data, and for measures that are
    not there; for prompts that do not fit the model or share an id; for a log that the policy cannot read or learn
    from.
    """
    prompts, dev_prompts, pairs, logged = list(prompts), list(dev_prompts), list(pairs), list(logged)
    if config.environment and (prompts or reward is not None or dev_prompts or pairs):
        raise OperantError("an environment asks and pays by itself; leave prompts and reward out, or --environment")
    config, reward = settled_reward(config, reward)
    pretrained = is_pretrained(policy.model)
    settings = resolve(config, dense=reward.dense, pretrained=pretrained, lora=policy.is_lora)
    looked_at = dev_prompts[: config.eval_prompts]
    for part in (prompts, looked_at):
        check_references(reward, part)
    if not prompts and not logged and not config.environment:
        raise OperantError("there are no prompts to learn from; check --data and --limit")
    if logged and (prompts or not config.logged):
        raise OperantError("a log takes the place of prompts; set config.logged to where it is from, leave prompts out")
    notes = []
    if config.lr == "auto" and settings.algorithm.rule == "adam":
        notes.append(rate_in_words(settings.lr, pretrained=pretrained, lora=policy.is_lora))
    usable = with_propensities(settings.algorithm, logged)
    if len(usable) < len(logged):
        notes.append(
            f"{len(logged) - len(usable)} of {len(logged)} logged completions have no behavior_logprobs, which "
            f"{config.algorithm} learns by, and are left out"
        )
    check_logged(policy, usable)
    check_references(reward, [prompt for prompt, _, value in usable if value is None])
    if tight := sum(check_prompts(policy, part, config.max_tokens) for part in (prompts, looked_at)):
        notes.append(
            f"{tight} of {len(prompts) + len(looked_at)} prompts leave less than {config.max_tokens} tokens for a "
            f"completion (the model's context has {policy.max_length})"
        )
    if config.sft_coef and not pairs:
        raise OperantError("sft_coef is set but there are no labelled pairs; give --sft_data, or --sft_coef 0")
    check_measures(config, dev_prompts)
    kept = in_force(config, settings, dense=reward.dense)
    kept |= dataclasses.asdict(PromptFormat.of(config).style(policy.codec))
    return TrainRequest(config, settings, kept, reward, prompts, dev_prompts, pairs, usable, notes)


def check_measures(config: TrainConfig, dev_prompts: Sequence[Prompt]) -> None:
    """Raises OperantError when the target cannot be read, or when held-out looks do not measure what the target and
    `best_metric` name."""
    read_target(config.target)
    if config.target and not dev_prompts and not config.environment:
        raise OperantError("a target needs held-out prompts; give --dev_data, or leave --target out")
    asked = {"--best_metric": config.best_metric}
    if config.target:
        asked["--target"] = target_metric(config.target)
    for flag, name in asked.items():
        if config.environment:
            check_episode_metric(flag, name)
        elif dev_prompts:
            check_metric(flag, name, dev_prompts)


class _Loop:
    """The state of one run of `train`; each method is one stage of a step."""

    def __init__(
        self, run: Run, request: TrainRequest, policy: Policy, runner: RewardRunner, sampler: SamplerProtocol | None
    ) -> None:
        config, settings = request.config, request.settings
        self.run, self.config, self.settings, self.policy, self.runner = run, config, settings, policy, runner
        self.pairs = request.pairs
        logged = judged(request.logged, runner)
        policy.model.eval()  # dropout off: the sampler and the learner must be the same policy
        policy.recomputes = config.activation_checkpointing
        learns_values = settings.algorithm.loss == "double_q"
        # the held-out drift is against the reference
        if config.kl_coef > 0 or request.dev_prompts or config.environment or learns_values:
            policy.freeze_reference()
        if settings.critic is not None:
            policy.add_critic(separate=settings.critic == "separate")
        if learns_values:
            policy.add_target_network()
        passes = config.epochs * config.minibatches
        self.learner = Learner(
            policy, lr=settings.lr, weight_decay=config.weight_decay, max_grad_norm=config.max_grad_norm,
            warmup_steps=config.warmup_steps * passes, total_steps=config.steps * passes, schedule=config.schedule,
            critic_lr=config.critic_lr or CRITIC_RATE * settings.lr, rule=update_rule(policy, config, settings),
            sized=True,
        )  # fmt: skip
        self.state: dict[str, Any] = {"rewards": {}}
        paid = module_hashes(config.environment) if config.environment else reward_hashes(request.reward)
        named = config.data or config.logged
        run.takes(*_counted(config, request), given=() if named else [*request.prompts, *request.logged], reward=paid)
        run.attach(policy, self.learner, self.state)
        if self.state["rewards"]:
            runner.load_state_dict(self.state["rewards"])
        self.sampler = Sampler(policy, max_rows=config.max_rows) if sampler is None else sampler
        self.sampler.load(run.step, policy)
        self.saved_before = self.state.get("saved_tokens", 0) - self.sampler.saved_tokens
        self.rollouts: Rollouts | Episodes | Logged
        self.held_out: HeldOut
        if config.environment:
            self.rollouts = Episodes(run, config, policy, self.sampler, runner, self.state)
            self.held_out = HeldOutEpisodes(run, config, policy, self.sampler, runner, self.state)
        else:
            self.rollouts = (
                Logged(config, logged, self.state)
                if logged
                else Rollouts(run, config, settings, request.prompts, self.sampler, runner, self.state)
            )
            self.held_out = HeldOut(run, config, policy, self.sampler, request.dev_prompts, runner, self.state)
        self.estimator: Estimator | QEstimator = (
            QEstimator(policy, config, self.state, logged)
            if learns_values
            else Estimator(policy, config, settings, self.state)
        )
        self.surrogate = Surrogate(config, settings, self.state)
        self.pair_order = DataOrder(max(1, len(self.pairs)), config.sft_batch_size, config.seed, "pairs")
        run.facts["optimises"] = optimised_metrics(runner.reward)

    def go(self, callbacks: Sequence[Callback]) -> TrainResult:
        """Every step of the run, with its held-out looks; the best weights are in the policy afterwards.

        Raises OperantError when the run failed: every reward of several steps in a row was missing.
        """
        if self.run.step == 0 and self.run.measured_step < 0:
            self.held_out.measure()
        for step in self.run.steps(self.config.steps):
            begun = time.perf_counter()
            rollout = self.rollouts.take(step)
            sampled_seconds = time.perf_counter() - begun
            batch, metrics = self.estimate(rollout)
            stats = self.learn(batch, step)
            self.sampler.load(step + 1, self.policy)
            metrics |= self.describe(rollout, stats)
            metrics["train/sample_seconds"] = sampled_seconds
            metrics["train/tokens_per_second"] = stats.tokens / (time.perf_counter() - begun)
            shown: dict[str, float | str] = {
                name: metrics[f"train/{key}"]
                for name, key in (("reward", "reward_mean"), ("entropy", "entropy"), ("length", "length"))
                if f"train/{key}" in metrics
            }
            tied = metrics.get("train/tied", 0.0)
            shown["ties"] = f"{tied:.0%}" if tied else ""
            self.run.record(stats, metrics, missing=dict(self.runner.counts), shown=shown)
            looks = self.run.step % self.config.eval_every == 0 or self.run.step == self.config.steps
            if looks:
                self.held_out.measure()
            if looks or tied >= TIED:
                self.run.watch()
            answers = [callback(self.run.step, metrics) for callback in callbacks]  # every one is called
            if any(answers):
                self.run.stop("a callback asked to stop")
        if not self.run.failed and not self.run.interrupted:
            self.held_out.last_look()
        self.run.restore_best()
        if self.run.failed:
            raise OperantError(self.run.failed)
        return TrainResult(
            policy=self.policy, out=self.run.folder.path, steps=self.run.step, seconds=self.run.seconds,
            stop_reason=self.run.stop_reason, best_step=self.run.best_step,
            first=self.state["first"], best=self.held_out.best,
        )  # fmt: skip

    def close(self) -> None:
        """Let go of the environments."""
        for part in (self.rollouts, self.held_out):
            if isinstance(part, (Episodes, HeldOutEpisodes)):
                part.player.close()

    # --- one step ------------------------------------------------------------------------------------------------

    def estimate(self, rollout: Rollout) -> tuple[Batch, dict[str, float]]:
        """The batch to learn from. Notes once that a reward turned out to pay per token."""
        before = self.state.get("dense")
        batch, metrics = self.estimator(rollout)
        if self.state.get("dense") != before:
            self.run.note(
                f"reward '{self.config.reward}' pays per token and did not say so: from here on it is estimated as a "
                "dense one. Say so with dense=True (--dense), or an attribute dense of the function"
            )
        return batch, metrics

    def learn(self, batch: Batch, step: int) -> StepStats:
        """One or, with a ratio, several optimizer steps on the batch; adapts the KL coefficient afterwards."""
        config = self.config
        if not self.teaches(batch):
            # Adam's momentum and weight decay must not move the weights either
            self.state["idle"] = self.state.get("idle", 0) + 1
            return StepStats(step=self.learner.steps, loss=0.0, grad_norm=0.0)
        rows = batch.tokens.shape[0]
        passes = config.epochs * config.minibatches
        region = self.settings.algorithm.rule == "trust_region"
        if passes > 1 or region:
            with self.policy.full_precision() if region else contextlib.nullcontext():
                batch.old_logprobs = logprobs_of(self.policy, batch, config.tokens_per_microbatch)
        taken: list[StepStats] = []
        for epoch in range(config.epochs):
            order = torch.from_numpy(
                np.random.default_rng(mixed_seed(config.seed, "rows", step, epoch)).permutation(rows)
            )
            for part in order.chunk(config.minibatches) if config.minibatches > 1 else [torch.arange(rows)]:
                piece = batch if len(part) == rows else select_rows(batch, part)
                if piece is not batch:
                    piece.denominator = batch.denominator * len(part) / rows
                micro = list(microbatches(piece, config.tokens_per_microbatch, by_length=True))
                if config.sft_coef:
                    micro += microbatches(self.supervised(self.learner.steps), config.tokens_per_microbatch)
                taken.append(self.learner.step(micro, self.surrogate))
        stats = merged(taken)
        stats.coefficients |= {
            "kl_coef": self.state["kl_coef"],
            "entropy_coef": config.entropy_coef,
            "sft_coef": config.sft_coef,
        }
        self.state["kl_coef"] = objectives.adapt_kl(
            self.state["kl_coef"], stats.extra.get("kl_ref", math.nan), config.kl_target
        )
        return stats

    def teaches(self, batch: Batch) -> bool:
        """Whether an update on the batch has a gradient: some usable reward, and an advantage that is not zero, or
        something else in the loss: pairs, the KL, the entropy, or values."""
        config = self.config
        if config.sft_coef:
            return True
        if not bool(batch.weights.any()):
            return False
        if batch.values is not None or self.settings.algorithm.loss == "double_q":
            return True
        if config.entropy_coef or (config.kl_in == "loss" and self.state["kl_coef"] > 0):
            return True
        assert batch.advantages is not None and batch.returns is not None
        # rewards that are equal leave what rounding does to their mean, which whitening makes larger
        least = ROUNDING * float(batch.returns.abs().max())
        return bool((batch.advantages.abs() * (batch.weights > 0) > least).any())

    def supervised(self, step: int) -> Batch:
        """The labelled pairs that `sft_coef` mixes into an optimizer step."""
        chosen = [self.pairs[i] for i in self.pair_order.take(step)]
        return self.policy.batch_of_sequences([p.prompt.tokens for p in chosen], [p.completion_tokens for p in chosen])

    # --- what is seen --------------------------------------------------------------------------------------------

    def describe(self, rollout: Rollout, stats: StepStats) -> dict[str, float]:
        """What a step's rewards, completions and update were like, under the log's names; sets `stats.reward_mean`."""
        trajectories = rollout.seen
        seen = [t for t in trajectories if t.observed.all()]
        sums = [float(t.rewards.sum()) for t in seen]
        stats.reward_mean = float(np.mean(sums)) if sums else math.nan
        completions = [t.completion for t in trajectories]
        metrics = {
            "train/reward_mean": stats.reward_mean,
            "train/reward_std": float(np.std(sums)) if sums else math.nan,
            "train/length": float(np.mean([len(drawn(c)) for c in completions])),
            "train/distinct2": distinct([c.tokens[drawn(c)] for c in completions]),
            "train/truncated": float(np.mean([c.truncated for c in completions])),
            "train/stopped": float(np.mean([c.stop_reason == "reward" for c in completions])),
            "train/completions": float(self.state["drawn"] * self.config.group_size),
            "train/rounds": float(rollout.rounds),
        }
        if stats.tokens:  # of a step without an update nothing is known
            moved = {"approx_kl": stats.approx_kl, "clipfrac": stats.clipfrac, "entropy": stats.entropy}
            metrics |= {f"train/{name}": value for name, value in moved.items()}
        if "idle" in self.state:
            metrics["train/idle"] = float(self.state["idle"])
        if (tied := tied_share(trajectories)) is not None:
            metrics["train/tied"] = tied
        metrics |= {f"train/{name}": value for name, value in stats.extra.items()}
        if self.config.environment:
            metrics["train/turns"] = float(np.mean([c.meta["turns"] for c in completions]))
        audited = [c.meta["audited_return"] for c in completions if "audited_return" in c.meta]
        if self.rollouts.stream is not None:
            self.state["saved_tokens"] = self.saved_before + self.sampler.saved_tokens
            metrics["train/saved_tokens"] = float(self.state["saved_tokens"])
        if audited:
            metrics["train/audited_return"] = float(np.mean(audited))
        for part in seen[0].parts if seen else ():
            values = [t.parts[part] for t in seen if t.parts.get(part) is not None]
            metrics[f"train/reward/{part}"] = float(np.mean(values)) if values else math.nan  # type: ignore[arg-type]
        metrics |= {f"train/missing/{reason}": float(n) for reason, n in self.runner.counts.items()}
        metrics |= {f"train/reward_spent/{name}": value for name, value in self.runner.spent().items()}
        if self.runner.reward.dense:
            for i, value in enumerate(potential_diagnostics(trajectories)):
                if math.isfinite(value):
                    metrics[f"train/phi_corr/{i}"] = value
        self.state["rewards"] = self.runner.state_dict()
        return metrics


def _counted(config: TrainConfig, request: TrainRequest) -> tuple[str, int, int, str]:
    """What is learned from, how much of it, how much is held out, and from where: as `Run.takes` says it."""
    held_out = min(len(request.dev_prompts), config.eval_prompts)
    source = held_out_source(config.data, config.dev_data) if config.data or config.dev_data else ""
    if config.environment:
        each = config.prompts_per_step * config.group_size
        return f"episodes of {config.environment} a step", each, config.eval_prompts, ""
    if request.logged:
        return "logged completions", len(request.logged), held_out, source
    return "prompts", len(request.prompts), held_out, source


def settled_reward(config: TrainConfig, reward: Any) -> tuple[TrainConfig, Any]:
    """(the configuration with the reward's name and whether it is dense, the reward as the runner takes it).

    reward: as in `train`.

    Raises OperantError when there is no reward, when its name is unknown, and when `dense` is asked of a reward that
    was made to pay at the end.
    """
    if config.environment:
        config = dataclasses.replace(config, reward=config.environment, dense=config.dense is True)
        reward = Reward(_paid_elsewhere, name=config.environment, dense=bool(config.dense), in_process=True)
    elif reward is None:
        raise OperantError("there is no reward to learn from; give one, or an environment")
    elif isinstance(reward, str):
        config = dataclasses.replace(config, reward=reward)
        reward = named_reward(config)
    else:  # its name is what the run folder and the report show
        reward = declared(as_reward(reward), config)
        config = dataclasses.replace(config, reward=reward.name)
    reward = as_reward(reward)
    return dataclasses.replace(config, dense=bool(reward.dense)), reward


def named_reward(config: TrainConfig) -> Any:
    """The reward that `config.reward` names, completed by `config.dense` and `config.potential`."""
    dense = has_potential(config.reward) and places_tokens(config) if config.dense == "auto" else config.dense
    potential = None if config.potential == "auto" or not dense else config.potential
    if config.dense is True and potential is None and not has_potential(config.reward):
        plain = reward_by_name(config.reward)
        if plain.dense or isinstance(plain, Reward):  # it pays tokens by itself
            return declared(plain, config)
    return reward_by_name(config.reward, dense=dense or None, potential=potential)


def declared(reward: Any, config: TrainConfig) -> Any:
    """The reward; a plain function as one that pays per token, if `config.dense` says so.

    Raises OperantError for a dense reward that is asked of one which was made to pay at the end.
    """
    if config.dense is not True or reward.dense:
        return reward
    if not isinstance(reward, Reward):
        raise OperantError(
            f"dense is true, and reward {reward.name!r} pays at the end; make it, or its parts, with dense=True"
        )
    reward = copy.copy(reward)
    reward.dense = True
    return reward


def _paid_elsewhere(prompt: Prompt, completion: Completion) -> None:
    """The reward of episodes, which their environment has paid while they were played."""


def update_rule(policy: Policy, config: TrainConfig, settings: AlgorithmSettings) -> TrustRegion | None:
    """The update rule of an algorithm that has one of its own; None leaves the learner its Adam."""
    if settings.algorithm.rule == "adam":
        return None
    return TrustRegion(
        policy, delta=config.delta, damping=config.damping, cg_steps=config.cg_steps, backtracks=config.backtracks,
        fisher_share=config.fisher_share,
    )  # fmt: skip


def merged(taken: Sequence[StepStats]) -> StepStats:
    """One report of a step's several optimizer steps: means weighted by tokens, sums of tokens and seconds, and the
    first reason for skipping."""
    if len(taken) == 1:
        return taken[0]
    tokens = sum(s.tokens for s in taken)

    def mean(values: Sequence[float]) -> float:
        return sum(v * s.tokens for v, s in zip(values, taken, strict=True)) / max(1, tokens)

    return StepStats(
        step=taken[-1].step, loss=mean([s.loss for s in taken]), grad_norm=mean([s.grad_norm for s in taken]),
        skipped=any(s.skipped for s in taken), reason=next((s.reason for s in taken if s.reason), ""),
        approx_kl=mean([s.approx_kl for s in taken]), clipfrac=mean([s.clipfrac for s in taken]),
        entropy=mean([s.entropy for s in taken]), tokens=tokens, seconds=sum(s.seconds for s in taken),
        coefficients=taken[-1].coefficients,
        extra={name: mean([s.extra.get(name, 0.0) for s in taken]) for name in taken[-1].extra},
    )  # fmt: skip
