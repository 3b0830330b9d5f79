"""Held-out looks at a run: the optimised reward beside metrics that were not optimised, on held-out prompts."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

from operant.algorithms.learner import logprobs_of
from operant.algorithms.table import nearest
from operant.config import TrainConfig
from operant.models.policy import Policy
from operant.rewards import RewardRunner
from operant.rl.evaluate import commonest_share, evaluate
from operant.run.run import Run
from operant.types import Batch, Completion, OperantError, Prompt, SamplerProtocol, Sampling


class HeldOut:
    """Measures the policy on held-out prompts, tells and keeps what it finds, and ends the run at the target.

    `state["first"]` and `state["best"]` are saved with the run; `best` is also right after a last look.
    """

    def __init__(
        self,
        run: Run,
        config: TrainConfig,
        policy: Policy,
        sampler: SamplerProtocol,
        prompts: Sequence[Prompt],
        runner: RewardRunner,
        state: dict[str, Any],
    ) -> None:
        self.run, self.config, self.policy, self.sampler = run, config, policy, sampler
        self.runner, self.state = runner, state
        self.prompts = list(prompts)[: config.eval_prompts]
        self.reached = read_target(config.target)
        state.setdefault("first", {})
        self.best: dict[str, float] = state.setdefault("best", {})

    @property
    def active(self) -> bool:
        """Whether there is anything to measure."""
        return bool(self.prompts)

    def measure(self) -> None:
        """Held-out evaluation; keeps the best weights and ends the run at the target.

        Raises OperantError when the target's metric is not measured, and what `evaluate` raises.
        """
        if not self.active:
            return
        values = self.look()
        self.run.measured_step = self.run.step
        if not self.state["first"]:
            self.state["first"] = values
        value = values[self.config.best_metric]
        if self.reached(values):
            self.run.stop(f"the target {self.config.target} is reached", decided=True)
        if math.isfinite(value) and value > self.run.best_value:
            self.state["best"] = self.best = values
            self.run.measured(value)

    def last_look(self) -> None:
        """After an early stop: are the newest weights the best?"""
        if self.active and self.run.measured_step != self.run.step:
            values = self.look()
            value = values[self.config.best_metric]
            if math.isfinite(value) and value > self.run.best_value:
                self.best = values
                self.run.promote_best(value)

    def look(self) -> dict[str, float]:
        """The optimised reward beside metrics that were not optimised, logged and shown."""
        sampling = Sampling(temperature=0.0, max_tokens=self.config.max_tokens, stop=tuple(self.config.stop))
        before = self.runner.state_dict()
        values, completions = evaluate(self.sampler, self.prompts, sampling=sampling, runner=self.runner)
        values["kl_ref"] = self.drift(self.first_batch(completions))
        if (share := commonest_share(self.prompts, completions)) is not None:
            values["commonest"] = share
        self.run.log.log(self.run.step, {f"eval/{name}": value for name, value in values.items()})
        self.keep_samples(completions)
        self.runner.load_state_dict(before)  # held-out rewards that are missing are logged as eval/reward_missing
        summary = ", ".join(f"{name} {values[name]:.4g}" for name in _SUMMARY if name in values)
        self.run.note(f"step {self.run.step}: held-out {summary}")
        return values

    def first_batch(self, completions: Sequence[Completion]) -> Batch:
        """The first 64 prompts with their completions, as the learner reads them."""
        rows = list(zip(self.prompts, completions, strict=True))[:64]
        return self.policy.batch_of_sequences([p.tokens for p, _ in rows], [c.tokens for _, c in rows])

    def drift(self, batch: Batch) -> float:
        """Mean log π/π_ref over the drawn tokens of greedy completions, in nats: how far the policy has moved."""
        now = logprobs_of(self.policy, batch, self.config.tokens_per_microbatch)
        with self.policy.as_reference():
            then = logprobs_of(self.policy, batch, self.config.tokens_per_microbatch)
        return float(((now - then) * batch.action_mask).sum() / batch.action_mask.sum().clamp(min=1))

    def keep_samples(self, completions: Sequence[Completion]) -> None:
        """Log the first `log_samples` answers with their rewards."""
        count = min(self.config.log_samples, len(completions))
        shown = list(zip(self.prompts, completions, strict=True))[:count]
        rewards = self.runner.run(shown, update=False, scaled=False) if shown else []
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


_SUMMARY = ("reward", "bleu", "chrf", "exact")  # what the line of a look shows

_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}


def check_metric(flag: str, name: str, dev_prompts: Sequence[Prompt]) -> None:
    """Raises OperantError when held-out looks do not measure `name`; `flag` is the option that asks for it."""
    names = ["reward", "distinct2"] if flag == "--best_metric" else [
        "reward", "distinct2", "reward_missing", "length", "truncated", "kl_ref"
    ]  # fmt: skip
    if any(p.references for p in dev_prompts):
        names = ["bleu", "chrf", "rougeL", "exact", "distinct1", *names]
    check_measured(flag, name, names)


def check_measured(flag: str, name: str, names: list[str]) -> None:
    """Raises OperantError when `name` is not among the names of what is measured."""
    if name not in names:
        raise OperantError(f"{flag} {name!r} is not measured{nearest(name, names)} (there are: {', '.join(names)})")


def target_metric(text: str) -> str:
    """The metric's name in a target such as "bleu>=30"."""
    return re.split(r"[<>]", text)[0].strip()


def read_target(text: str | None) -> Callable[[dict[str, float]], bool]:
    """Whether measured values reach a target such as "bleu>=30", as a function of them; nothing reaches None.

    Raises OperantError when the target cannot be read, and so does the function when its metric is not measured.
    """
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
