"""The reward loop: sample, reward, credit, policy-gradient step, again, until the held-out target is met."""

from __future__ import annotations

import dataclasses
import math
import operator
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from operant import credit, objectives
from operant.algorithms import Recipe, nearest, resolve
from operant.batch import (
    completion_axes,
    from_sequences,
    from_trajectories,
    microbatches,
    place,
    select_rows,
    to_device,
)
from operant.config import TrainConfig
from operant.data import Pair
from operant.evaluate import distinct, evaluate
from operant.learner import Learner
from operant.policy import Policy
from operant.rewards import (
    Limited,
    RewardRunner,
    as_reward,
    check_references,
    optimised_metrics,
    potential_diagnostics,
    reward_by_name,
)
from operant.run import DataOrder, Run, mixed_seed
from operant.sampler import Sampler
from operant.types import Batch, Completion, OperantError, Prompt, Sampling, StepStats, Trajectory

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
    prompts: Sequence[Prompt],
    reward: Any,
    config: TrainConfig | None = None,
    *,
    dev_prompts: Sequence[Prompt] = (),
    pairs: Sequence[Pair] = (),
    callbacks: Sequence[Callback] = (),
    quiet: bool = False,
    **options: Any,
) -> TrainResult:
    """Improve a policy by policy gradient on a reward.

    policy: changed in place; afterwards it has the best weights by `config.best_metric` on `dev_prompts`.
    reward: any `reward(prompt, completion) -> float | one per token | spans | None`, or a name such as "chrf", which
        `config.dense` and `config.potential` complete.
    config: a TrainConfig; `options` replace single fields of it, such as `steps=200, out="runs/mine"`.
    pairs: labelled pairs for `sft_coef`. callbacks: called as (step, metrics) after each step, True stops.

    Raises OperantError for a combination that the algorithm cannot honour, for missing data, and when every reward of
    several steps in a row was missing.
    """
    config = dataclasses.replace(config or TrainConfig(), **options)
    if isinstance(reward, str):
        potential = None if config.potential == "auto" or not config.dense else config.potential
        config = dataclasses.replace(config, reward=reward)
        reward = reward_by_name(reward, dense=config.dense or None, potential=potential)
    else:
        config = dataclasses.replace(config, reward=as_reward(reward).name)  # what the run folder and report tell
    runner = RewardRunner(
        reward, workers=None if config.reward_workers < 0 else config.reward_workers, time_limit=config.reward_seconds
    )
    try:
        recipe = resolve(config, dense=runner.reward.dense)
        check_references(runner.reward, prompts)
        reached = _target(config.target)
        if not prompts:
            raise OperantError("there are no prompts to learn from; check --data and --limit")
        if config.sft_coef and not pairs:
            raise OperantError("sft_coef is set but there are no labelled pairs; give --sft_data, or --sft_coef 0")
        if config.target and not dev_prompts:
            raise OperantError("a target needs held-out prompts; give --dev_data, or leave --target out")
        if dev_prompts:
            _check_metric("--best_metric", config.best_metric, dev_prompts)
            if config.target:
                _check_metric("--target", re.split(r"[<>]", config.target)[0].strip(), dev_prompts)
        with Run(config, "train", quiet=quiet) as run:
            return _Loop(run, config, recipe, policy, list(prompts), runner, list(dev_prompts), list(pairs)).go(
                reached, callbacks
            )
    finally:
        runner.close()


class _Loop:
    """The state of one run of `train`; each method is one stage of a step."""

    def __init__(
        self,
        run: Run,
        config: TrainConfig,
        recipe: Recipe,
        policy: Policy,
        prompts: list[Prompt],
        runner: RewardRunner,
        dev_prompts: list[Prompt],
        pairs: list[Pair],
    ) -> None:
        self.run, self.config, self.recipe, self.policy, self.runner = run, config, recipe, policy, runner
        self.prompts, self.dev_prompts, self.pairs = prompts, dev_prompts[: config.eval_prompts], pairs
        policy.model.eval()  # dropout off: the sampler and the learner must be the same policy
        if config.kl_coef > 0 or dev_prompts:  # the held-out drift is against it too
            policy.freeze_reference()
        passes = config.epochs * config.minibatches
        self.learner = Learner(
            policy, lr=config.lr, weight_decay=config.weight_decay, max_grad_norm=config.max_grad_norm,
            warmup_steps=config.warmup_steps * passes, total_steps=config.steps * passes, schedule=config.schedule,
        )  # fmt: skip
        self.state: dict[str, Any] = {
            "running": 0.0, "running_weight": 0.0, "all_missing": 0, "rewards": {}, "first": {}, "best": {},
        }  # fmt: skip
        run.attach(policy, self.learner, self.state)
        if self.state["rewards"]:
            runner.load_state_dict(self.state["rewards"])
        self.sampler = Sampler(policy, max_rows=config.max_rows, version=run.step, audit_fraction=config.audit_fraction)
        self.sampler.saved_tokens = self.state.get("saved_tokens", 0)
        self.order = DataOrder(len(prompts), config.prompts_per_step, config.seed, "prompts")
        self.pair_order = DataOrder(max(1, len(pairs)), config.sft_batch_size, config.seed, "pairs")
        self.stream = Limited(runner.reward, config.reward_seconds) if runner.reward.streaming else None
        run.facts["optimises"] = optimised_metrics(runner.reward)
        self.best: dict[str, float] = self.state["best"]

    def go(self, reached: Callable[[dict[str, float]], bool], callbacks: Sequence[Callback]) -> TrainResult:
        if self.run.step == 0 and self.run.measured_step < 0:
            self.measure(reached)
        for step in self.run.steps(self.config.steps):
            begun = time.perf_counter()
            trajectories = self.roll_out(step)
            sampled_seconds = time.perf_counter() - begun
            batch, metrics = self.assign_credit(trajectories)
            stats = self.learn(batch, step)
            self.sampler.load(step + 1)
            metrics |= self.describe(trajectories, stats)
            metrics["train/sample_seconds"] = sampled_seconds
            metrics["train/tokens_per_second"] = stats.tokens / (time.perf_counter() - begun)
            shown: dict[str, float | str] = {
                "reward": metrics["train/reward_mean"],
                "entropy": stats.entropy,
                "length": metrics["train/length"],
            }
            self.run.record(stats, metrics, missing=dict(self.runner.counts), shown=shown)
            if self.run.step % self.config.eval_every == 0 or self.run.step == self.config.steps:
                self.measure(reached)
            answers = [callback(self.run.step, metrics) for callback in callbacks]  # every one is called
            if any(answers):
                self.run.stop("a callback asked to stop")
        if not self.run.failed and not self.run.interrupted and self.run.measured_step != self.run.step:
            self.last_look()
        self.run.restore_best()
        if self.run.failed:
            raise OperantError(self.run.failed)
        return TrainResult(
            policy=self.policy, out=self.run.folder.path, steps=self.run.step, seconds=self.run.seconds,
            stop_reason=self.run.stop_reason, best_step=self.run.best_step,
            first=self.state["first"], best=self.best,
        )  # fmt: skip

    # --- one step ------------------------------------------------------------------------------------------------

    def sampling(self, step: int) -> Sampling:
        return Sampling(
            temperature=self.config.temperature, top_p=self.config.top_p, top_k=self.config.top_k,
            max_tokens=self.config.max_tokens, stop=tuple(self.config.stop),
            seed=mixed_seed(self.config.seed, "sample", step),
        )  # fmt: skip

    def roll_out(self, step: int) -> list[Trajectory]:
        """Sample a group for each prompt of the step and reward it."""
        chosen = [self.prompts[i] for i in self.order.take(step)]
        groups = self.sampler.sample(chosen, self.sampling(step), self.config.group_size, stream=self.stream)
        answered = [(prompt, completion) for prompt, group in zip(chosen, groups, strict=True) for completion in group]
        trajectories = self.runner.run(answered)
        by_position = self.recipe.baseline in credit.PER_POSITION
        if any(t.observed.any() if by_position else t.observed.all() for t in trajectories):
            self.state["all_missing"] = 0
        else:
            self.state["all_missing"] += 1
            if self.state["all_missing"] >= 3 or step == 0:
                self.run.stop(f"every reward was missing: {self.runner.explain()}", failed=True)
        return trajectories

    def assign_credit(self, trajectories: list[Trajectory]) -> tuple[Batch, dict[str, float]]:
        """Rewards → advantages, placed on the batch's columns."""
        config, recipe = self.config, self.recipe
        batch = from_trajectories(
            trajectories, encoder=self.policy.family == "encoder-decoder", pad_id=self.policy.codec.pad_id,
            normalisation=recipe.normalisation, constant=float(config.max_tokens),
        )  # fmt: skip
        assert batch.group_ids is not None
        rewards, mask, valid = completion_axes(trajectories)
        metrics: dict[str, float] = {}
        if config.kl_coef > 0:
            batch.ref_logprobs = self.reference_logprobs(batch)
        if recipe.baseline == "group_scaled" and bool((rewards * mask)[:, :-1].logical_and(mask[:, 1:]).any()):
            raise OperantError(
                f"{recipe.algorithm.name} would sum the dense reward that the function returned; "
                "use --algorithm rloo or ppo"
            )
        beta: float | Tensor = 1.0
        if recipe.baseline == "control_variate":
            beta = self.coefficient(rewards, mask, batch.group_ids, valid, metrics)
        estimate: dict[str, Any] = {
            "baseline": recipe.baseline,
            "gamma": config.gamma,
            "discount_state": config.discount_state,
        }
        whole = valid
        if recipe.baseline in credit.PER_POSITION and any(0 < t.observed.sum() < len(t.observed) for t in trajectories):
            assert batch.observed is not None
            known = credit.known_returns(self.completion_columns(batch.observed, trajectories) > 0, mask, config.gamma)
            valid = known & torch.tensor([[t.completion.trainable] for t in trajectories])
        advantages, returns, usable = credit.advantages(
            rewards, mask, batch.group_ids, valid, running=self.state["running"], beta=beta, **estimate
        )
        if config.kl_coef > 0 and config.kl_in == "reward":
            # linear in the reward, so the penalty has its own return and baseline beside the task's
            k1 = self.completion_columns(objectives.kl_k1(self.logprobs(batch), batch.ref_logprobs), trajectories)  # type: ignore[arg-type]
            if recipe.baseline == "control_variate":
                estimate["baseline"] = "position_leave_one_out"
            advantages += credit.advantages(-config.kl_coef * k1, mask, batch.group_ids, valid, **estimate)[0]
        totals = returns[:, 0][whole]
        if len(totals):
            weight = 0.9 * self.state["running_weight"]  # an exponential mean, read before it is updated
            self.state["running"] = (weight * self.state["running"] + 0.1 * float(totals.mean())) / (weight + 0.1)
            self.state["running_weight"] = weight + 0.1
        batch.advantages = place(batch, advantages, trajectories)
        batch.returns = place(batch, returns, trajectories)
        # missing rewards teach nothing; the denominator stays fixed
        taught = (usable if usable.dim() == 2 else usable[:, None]) & mask
        batch.weights = batch.weights * place(batch, taught, trajectories)
        metrics["train/usable"] = float(taught.any(1).float().mean())
        metrics["train/advantage_std"] = float(advantages[mask].std()) if int(mask.sum()) > 1 else 0.0
        return batch, metrics

    def coefficient(
        self, rewards: Tensor, mask: Tensor, groups: Tensor, valid: Tensor, metrics: dict[str, float]
    ) -> float | Tensor:
        """β, given or fitted on the other prompts, and what it saves."""
        beta: float | Tensor = (
            credit.fit_beta((rewards * mask).sum(1), credit.held_potential(rewards, mask), mask, groups, valid)
            if self.config.beta == "auto"
            else float(self.config.beta)
        )
        plain, _ = credit.control_variate(rewards, mask, groups, valid, 0.0)
        varied, _ = credit.control_variate(rewards, mask, groups, valid, beta)
        full, _ = credit.control_variate(rewards, mask, groups, valid, 1.0)
        base = float((plain**2).sum())
        metrics["train/beta"] = float(torch.as_tensor(beta).mean())
        metrics["train/variance_ratio"] = float((varied**2).sum()) / base if base else 1.0
        metrics["train/variance_ratio_beta1"] = float((full**2).sum()) / base if base else 1.0
        return beta

    def learn(self, batch: Batch, step: int) -> StepStats:
        """One or, with a ratio, several optimizer steps on the batch."""
        config = self.config
        rows = batch.tokens.shape[0]
        passes = config.epochs * config.minibatches
        if passes > 1:
            batch.old_logprobs = self.logprobs(batch)
        if not config.sft_coef and not bool(batch.weights.any()):
            # no usable reward: Adam's momentum and weight decay must not move the weights either
            return StepStats(step=self.learner.steps, loss=0.0, grad_norm=0.0)
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
                taken.append(self.learner.step(micro, self.token_loss))
        stats = merged(taken)
        stats.coefficients |= {
            "kl_coef": config.kl_coef,
            "entropy_coef": config.entropy_coef,
            "sft_coef": config.sft_coef,
        }
        return stats

    def token_loss(self, policy: Policy, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of every token of a micro-batch, and sums of what is logged."""
        config, mask = self.config, batch.action_mask
        if batch.advantages is None:  # the supervised pairs of sft_coef
            return config.sft_coef * objectives.negative_log_likelihood(policy.logprobs(batch).logprobs), {}
        out = policy.logprobs(batch, entropy="differentiable" if config.entropy_coef else "measured")
        old = out.logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
        stats: dict[str, Tensor] = {"approx_kl": (objectives.kl_k3(old, out.logprobs) * mask).sum()}
        if self.recipe.algorithm.loss == "ppo_clip":
            loss, clipped = objectives.ppo_clip(out.logprobs, old, batch.advantages, config.clip_low, config.clip_high)
            stats["clipfrac"] = (clipped * mask).sum()
        else:
            loss = objectives.reinforce(out.logprobs, batch.advantages)
        if batch.behavior_logprobs is not None:
            gap = (old - batch.behavior_logprobs) * mask
            stats["sampler_gap"] = gap.abs().sum()
            if policy.dtype == "bf16" and config.correction_cap > 0:
                weight = objectives.behavior_correction(old, batch.behavior_logprobs, config.correction_cap)
                stats["correction"] = (weight * mask).sum()
                loss = loss * weight
        if out.entropy is not None:
            stats["entropy"] = (out.entropy * mask).sum()
            if config.entropy_coef:
                loss = loss - config.entropy_coef * out.entropy
        if batch.ref_logprobs is not None:
            stats["kl_ref"] = (objectives.kl_k1(out.logprobs, batch.ref_logprobs) * mask).sum()
            if config.kl_in == "loss":
                loss = loss + config.kl_coef * self.divergence(policy, batch, out.logprobs)
        return loss, stats

    def divergence(self, policy: Policy, batch: Batch, logprobs: Tensor) -> Tensor:
        assert batch.ref_logprobs is not None
        if self.config.kl_estimator == "k2":
            return objectives.kl_k2(logprobs, batch.ref_logprobs)
        if self.config.kl_estimator == "k3":
            return objectives.kl_k3(logprobs, batch.ref_logprobs)
        assert batch.temperature is not None
        temperature = batch.temperature[batch.segment_ids.clamp(min=0)][..., None]
        with policy.as_reference():
            reference = policy.logits(batch) / temperature
        return objectives.full_kl(policy.logits(batch) / temperature, reference) * batch.action_mask

    def supervised(self, step: int) -> Batch:
        chosen = [self.pairs[i] for i in self.pair_order.take(step)]
        return from_sequences(
            [p.prompt.tokens for p in chosen], [p.completion_tokens for p in chosen],
            encoder=self.policy.family == "encoder-decoder", pad_id=self.policy.codec.pad_id,
        )  # fmt: skip

    # --- log-probabilities outside the update --------------------------------------------------------------------

    @torch.no_grad()
    def logprobs(self, batch: Batch) -> Tensor:
        """float32[B, S] of the whole batch on the CPU, computed in micro-batches."""
        out = torch.zeros(batch.tokens.shape)
        numbers = torch.arange(batch.tokens.shape[0])
        whole = dataclasses.replace(batch, route=numbers)
        for micro in microbatches(whole, self.config.tokens_per_microbatch, by_length=True):
            assert micro.route is not None
            values = self.policy.logprobs(to_device(micro, self.policy.device)).logprobs.float().cpu()
            out[micro.route, : values.shape[1]] = values
        return out

    def reference_logprobs(self, batch: Batch) -> Tensor:
        with self.policy.as_reference():
            return self.logprobs(batch)

    def completion_columns(self, values: Tensor, trajectories: list[Trajectory]) -> Tensor:
        """[B, S] on the batch's columns → float64[N, T] on the completion's axis."""
        out = torch.zeros(len(trajectories), max(len(t.completion.tokens) for t in trajectories), dtype=torch.float64)
        for i, t in enumerate(trajectories):
            start = len(t.prompt.tokens) if self.policy.family == "decoder" else 0
            n = len(t.completion.tokens)
            out[i, :n] = values[i, start : start + n].double()
        return out

    # --- what is seen --------------------------------------------------------------------------------------------

    def describe(self, trajectories: list[Trajectory], stats: StepStats) -> dict[str, float]:
        seen = [t for t in trajectories if t.observed.all()]
        sums = [float(t.rewards.sum()) for t in seen]
        stats.reward_mean = float(np.mean(sums)) if sums else math.nan
        completions = [t.completion for t in trajectories]
        metrics = {
            "train/reward_mean": stats.reward_mean,
            "train/reward_std": float(np.std(sums)) if sums else math.nan,
            "train/approx_kl": stats.approx_kl,
            "train/clipfrac": stats.clipfrac,
            "train/entropy": stats.entropy,
            "train/length": float(np.mean([len(c.tokens) for c in completions])),
            "train/distinct2": distinct([c.tokens for c in completions]),
            "train/truncated": float(np.mean([c.truncated for c in completions])),
            "train/stopped": float(np.mean([c.stop_reason == "reward" for c in completions])),
            "train/completions": float((self.run.step + 1) * len(completions)),
        }
        metrics |= {f"train/{name}": value for name, value in stats.extra.items()}
        audited = [c.meta["audited_return"] for c in completions if "audited_return" in c.meta]
        if self.stream is not None:
            self.state["saved_tokens"] = self.sampler.saved_tokens
            metrics["train/saved_tokens"] = float(self.sampler.saved_tokens)
        if audited:
            metrics["train/audited_return"] = float(np.mean(audited))
        for part in seen[0].parts if seen else ():
            values = [t.parts[part] for t in seen if t.parts.get(part) is not None]
            metrics[f"train/reward/{part}"] = float(np.mean(values)) if values else math.nan  # type: ignore[arg-type]
        metrics |= {f"train/missing/{reason}": float(n) for reason, n in self.runner.counts.items()}
        if self.runner.reward.dense:
            for i, value in enumerate(potential_diagnostics(trajectories)):
                if math.isfinite(value):
                    metrics[f"train/phi_corr/{i}"] = value
        self.state["rewards"] = self.runner.state_dict()
        return metrics

    def measure(self, reached: Callable[[dict[str, float]], bool]) -> None:
        """Held-out evaluation; keeps the best weights and ends the run at the target."""
        if not self.dev_prompts:
            return
        self.run.measured_step = self.run.step
        values = self.look()
        if not self.state["first"]:
            self.state["first"] = values
        value = values[self.config.best_metric]
        if reached(values):
            self.run.stop(f"the target {self.config.target} is reached", decided=True)
        if math.isfinite(value) and value > self.run.best_value:
            self.state["best"] = self.best = values
            self.run.measured(value)

    def last_look(self) -> None:
        """After an early stop: are the newest weights the best?"""
        if self.dev_prompts:
            values = self.look()
            value = values[self.config.best_metric]
            if math.isfinite(value) and value > self.run.best_value:
                self.best = values
                self.run.crown(value)

    def look(self) -> dict[str, float]:
        """The optimised reward beside metrics that were not optimised, logged and shown."""
        sampling = Sampling(temperature=0.0, max_tokens=self.config.max_tokens, stop=tuple(self.config.stop))
        before = self.runner.state_dict()
        values, completions = evaluate(
            self.policy, self.dev_prompts, sampling=sampling, runner=self.runner, max_rows=self.config.max_rows
        )
        values["kl_ref"] = self.drift(completions)
        self.run.log.log(self.run.step, {f"eval/{name}": value for name, value in values.items()})
        self.keep_samples(completions)
        self.runner.load_state_dict(before)  # held-out rewards that are missing are told as eval/reward_missing
        told = ", ".join(f"{name} {values[name]:.4g}" for name in ("reward", "bleu", "chrf", "exact") if name in values)
        self.run.note(f"step {self.run.step}: held-out {told}")
        return values

    def drift(self, completions: Sequence[Completion]) -> float:
        """Mean log π/π_ref per token of the held-out (greedy) completions: how far the policy has moved."""
        rows = [(p, c) for p, c in zip(self.dev_prompts, completions, strict=True)][:64]
        batch = from_sequences(
            [p.tokens for p, _ in rows], [c.tokens for _, c in rows],
            encoder=self.policy.family == "encoder-decoder", pad_id=self.policy.codec.pad_id,
        )  # fmt: skip
        gap = (self.logprobs(batch) - self.reference_logprobs(batch)) * batch.action_mask
        return float(gap.sum() / batch.action_mask.sum().clamp(min=1))

    def keep_samples(self, completions: Sequence[Completion]) -> None:
        count = min(self.config.log_samples, len(completions))
        shown = list(zip(self.dev_prompts, completions, strict=True))[:count]
        rewards = self.runner.run(shown, update=False) if shown else []
        self.run.log.samples(
            self.run.step,
            [
                {
                    "prompt": p.text, "text": c.text, "references": list(p.references), "stop_reason": c.stop_reason,
                    "reward": float(t.rewards.sum()) if t.observed.all() else None,
                }
                for (p, c), t in zip(shown, rewards, strict=True)
            ],
        )  # fmt: skip


_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}


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


def _check_metric(flag: str, name: str, dev_prompts: Sequence[Prompt]) -> None:
    """Refuse the name of a held-out metric that will not be measured."""
    names = ["reward", "distinct2"] if flag == "--best_metric" else [
        "reward", "distinct2", "reward_missing", "length", "truncated", "kl_ref"
    ]  # fmt: skip
    if any(p.references for p in dev_prompts):
        names = ["bleu", "chrf", "rougeL", "exact", "distinct1", *names]
    if name not in names:
        raise OperantError(f"{flag} {name!r} is not measured{nearest(name, names)} (there are: {', '.join(names)})")


def _target(text: str | None) -> Callable[[dict[str, float]], bool]:
    """Read a target such as "bleu>=30". Raises OperantError when it is none."""
    if not text:
        return lambda values: False
    match = re.fullmatch(r"\s*([A-Za-z0-9_+]+)\s*(>=|<=|>|<)\s*(-?(?:\d+\.?\d*|\.\d+))\s*", text)
    if match is None:
        raise OperantError(f"target {text!r} cannot be read; write it like bleu>=30")
    name, sign, bound = match[1], _COMPARISONS[match[2]], float(match[3])

    def reached(values: dict[str, float]) -> bool:
        if name not in values:
            raise OperantError(f"the target's metric {name!r} is not measured; there are: {', '.join(values)}")
        return sign(values[name], bound)

    return reached
