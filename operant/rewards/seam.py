"""The Reward seam: what a reward may be, and how what it returns becomes one reward per token.

A reward is any callable `reward(prompt, completion) -> float | sequence[float] | list[Span] | Missing | None`. These
optional attributes say more about it:

name: how it is logged (default: the function's name).
dense: True when it pays per token, so that estimators which would sum it away can be refused.
batched: True when it is called once as `reward(prompts, completions) -> list` with a value for each.
cost: how its time grows with the completion ("linear", "quadratic", "linear*reference", "unknown").
in_process: True when it is so cheap and so well behaved that sending it to a worker process would cost more.
needs_references: True when it compares with `prompt.references`.
optimises: names of held-out metrics that it pushes up by itself, such as ("bleu",): the report then does not take their
    rise for independent evidence. What the text of `--reward` names is found without it.

A reward that pickles is copied into every worker process, so what it remembers there is not shared. One with state is a
closure, which stays in this process, or says `in_process` and `batched`.

A streaming reward has `start(prompt)` instead, see `types.StreamingReward`.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from operant.data.text import chars_to_tokens
from operant.types import (
    Bools,
    Completion,
    Doubles,
    OperantError,
    Prompt,
    Span,
    Stop,
    StreamingReward,
    StreamingSession,
    Trajectory,
)


@dataclass(frozen=True, slots=True)
class Missing:
    """A reward that is not there, with why: "slug: detail", counted by the slug. None says the same without a why."""

    reason: str


RewardValue = float | Sequence[float] | Sequence[Span] | Missing | None


class StreamTimeout(Exception):
    """A call of a streaming reward was over its time limit."""


class Limited:
    """A streaming reward with `seconds` for each call; one over them raises StreamTimeout, which costs the row its
    reward and nothing else.

    In the main thread of a POSIX process a call is interrupted at the limit, in the middle of a loop or a sleep.
    Elsewhere, and inside extension code that does not return to the interpreter, it is noticed only afterwards.
    """

    def __init__(self, reward: StreamingReward, seconds: float) -> None:
        self.reward, self.seconds = reward, seconds

    def start(self, prompt: Prompt) -> _LimitedSession:
        return _LimitedSession(_call_within(self.seconds, self.reward.start, prompt), self.seconds)


class _LimitedSession:
    def __init__(self, session: StreamingSession, seconds: float) -> None:
        self.session, self.seconds = session, seconds

    @property
    def parts(self) -> Any:
        return getattr(self.session, "parts", None)

    def step(self, token: int, text: str) -> float | Stop:
        return _call_within(self.seconds, self.session.step, token, text)


def _call_within(seconds: float, call: Callable[..., Any], *args: Any) -> Any:
    """What `call(*args)` returns, interrupted at the limit where it can be. Raises StreamTimeout over it."""
    begun = time.monotonic()
    if hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread():
        armed = True

        def expire(number: int, frame: Any) -> None:
            if armed:
                raise StreamTimeout(f"over {seconds:g} s for one token")

        handler = signal.signal(signal.SIGALRM, expire)
        # again and again, for a reward that swallows the first
        remaining, interval = signal.setitimer(signal.ITIMER_REAL, seconds, max(seconds, 0.1))
        try:
            value = call(*args)
        finally:
            armed = False
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, signal.SIG_DFL if handler is None else handler)
            if remaining:  # somebody else's alarm goes on
                left = max(remaining - (time.monotonic() - begun), 1e-3)
                signal.setitimer(signal.ITIMER_REAL, left, interval)
    else:
        value = call(*args)
    if time.monotonic() - begun > seconds:
        raise StreamTimeout(f"over {seconds:g} s for one token")
    return value


class Reward:
    """A plain function with a name and what the runner needs to know about it (see the module's docstring).

    Raises OperantError when `function` cannot be called.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        name: str | None = None,
        *,
        dense: bool | None = None,
        batched: bool | None = None,
        cost: str | None = None,
        in_process: bool | None = None,
        needs_references: bool | None = None,
        optimises: Sequence[str] | None = None,
    ) -> None:
        if not callable(function):
            raise OperantError(f"a reward must be a function of (prompt, completion), not {type(function).__name__}")

        def attribute(key: str, given: Any, default: Any) -> Any:
            return getattr(function, key, default) if given is None else given

        self.function = function
        self.name: str = name or str(attribute("name", None, getattr(function, "__name__", type(function).__name__)))
        self.dense: bool = attribute("dense", dense, False)
        self.batched: bool = attribute("batched", batched, False)
        self.cost: str = attribute("cost", cost, "unknown")
        self.in_process: bool = attribute("in_process", in_process, False)
        self.needs_references: bool = attribute("needs_references", needs_references, False)
        self.optimises: Sequence[str] = attribute("optimises", optimises, ())
        self.streaming = False

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def __repr__(self) -> str:
        return f"Reward({self.name})"


class Streaming:
    """A streaming reward as a reward on finished completions.

    What was paid while sampling (`completion.stream_rewards`) is used as it is; without it the completion is replayed.
    """

    dense = True
    batched = False
    streaming = True
    in_process = False
    needs_references = False
    cost = "linear"

    def __init__(self, reward: StreamingReward, name: str | None = None) -> None:
        self.reward = reward
        self.name: str = name or getattr(reward, "name", None) or type(reward).__name__
        self.optimises: Sequence[str] = getattr(reward, "optimises", ())

    def start(self, prompt: Prompt) -> StreamingSession:
        return self.reward.start(prompt)

    def __call__(self, prompt: Prompt, completion: Completion) -> Sequence[float]:
        if completion.stream_rewards is not None:
            return [float(value) for value in completion.stream_rewards]
        rewards, _ = run_stream(self.reward, prompt, completion)
        return [float(value) for value in rewards]


def run_stream(reward: StreamingReward, prompt: Prompt, completion: Completion) -> tuple[Doubles, int | None]:
    """Run a streaming reward over a finished completion.

    Returns the rewards float64[T] and the position at which it asked to stop, or None; tokens after it pay nothing.
    """
    rewards = np.zeros(len(completion.tokens), dtype=np.float64)
    session = reward.start(prompt)
    begin = 0
    for t, (token, end) in enumerate(zip(completion.tokens, completion.text_ends, strict=True)):
        value = session.step(int(token), completion.text[begin : int(end)])
        begin = max(begin, int(end))
        if isinstance(value, Stop):
            rewards[t] = value.reward
            return rewards, t
        rewards[t] = value
    return rewards, None


def as_reward(reward: Any) -> Any:
    """Give a plain function or a streaming reward the attributes above; a reward that has them is returned as it is.

    Raises OperantError when it cannot be called.
    """
    if all(hasattr(reward, key) for key in ("name", "dense", "batched", "streaming", "in_process")):
        return reward
    if isinstance(reward, StreamingReward):
        return Streaming(reward)
    return Reward(reward)


def last_sampled(completion: Completion) -> int | None:
    """Position of the last token that the policy drew, or None when it drew none."""
    if completion.sampled is None:
        return len(completion.tokens) - 1 if len(completion.tokens) else None
    drawn = np.flatnonzero(completion.sampled)
    return int(drawn[-1]) if len(drawn) else None


def missing_trajectory(prompt: Prompt, completion: Completion, name: str, reason: str) -> Trajectory:
    """A trajectory without a reward: nothing observed, NaN in `rewards` so that reading it cannot pass for zero."""
    size = len(completion.tokens)
    unobserved = np.zeros(size, dtype=np.bool_)
    return Trajectory(prompt, completion, np.full(size, np.nan), unobserved, {name: None}, reason)


def reward_trajectory(prompt: Prompt, completion: Completion, name: str, value: Any) -> Trajectory:
    """Turn what a reward returned into a trajectory of token rewards float64[T], observed bool[T].

    A number stands on the last sampled token (every other token pays 0); a sequence of length T is taken as it is, None
    in it marking single unobserved tokens; a list of `Span` is spread equally over the sampled tokens of each span, an
    empty list being no span at all. Anything else is missing, with the reason as "slug: detail".
    """
    rewards, observed, reason = token_rewards(value, completion)
    if reason is not None:
        return missing_trajectory(prompt, completion, name, reason)
    return Trajectory(prompt, completion, rewards, observed, {name: float(rewards[observed].sum())}, None)


def token_rewards(value: Any, completion: Completion) -> tuple[Doubles, Bools, str | None]:
    """What `reward_trajectory` is made of: (rewards float64[T], observed bool[T], why there is no reward or None)."""
    size = len(completion.tokens)
    rewards, observed = np.zeros(size, dtype=np.float64), np.ones(size, dtype=np.bool_)
    end = last_sampled(completion)
    if value is None:
        return rewards, observed, "none: the reward returned None"
    if isinstance(value, Missing):
        return rewards, observed, value.reason
    if end is None:
        return rewards, observed, "no_tokens: the completion has no sampled token to carry a reward"
    if isinstance(value, (str, bytes, dict, set, frozenset)):  # a set has no order of tokens
        return rewards, observed, f"wrong_type: the reward returned {type(value).__name__}; return a number"
    if not isinstance(value, (list, tuple)) and getattr(value, "ndim", 0) == 0 and not isinstance(value, Iterable):
        try:
            rewards[end] = float(value)
        except (TypeError, ValueError, OverflowError):
            return rewards, observed, f"wrong_type: the reward returned {type(value).__name__}; return a number"
        return rewards, observed, _not_finite(rewards)
    if getattr(value, "ndim", None) == 0:
        rewards[end] = float(value)
        return rewards, observed, _not_finite(rewards)
    values = list(value)
    if all(isinstance(item, Span) for item in values):
        return _span_rewards(values, completion)
    if len(values) != size:
        return rewards, observed, f"wrong_length: {len(values)} rewards for {size} tokens; return one number or {size}"
    try:
        for t, item in enumerate(values):
            if item is None:
                observed[t] = False
            else:
                rewards[t] = float(item)
    except (TypeError, ValueError):
        return rewards, observed, f"wrong_type: a reward in the sequence is {type(item).__name__}; return numbers"
    if not observed.any():
        return rewards, observed, "none: every token's reward is None"
    reason = _not_finite(rewards)
    rewards[~observed] = np.nan
    return rewards, observed, reason


def _span_rewards(spans: list[Span], completion: Completion) -> tuple[Doubles, Bools, str | None]:
    size = len(completion.tokens)
    rewards, observed = np.zeros(size, dtype=np.float64), np.ones(size, dtype=np.bool_)
    for span in spans:
        if not 0 <= span.start < span.end <= len(completion.text):
            bounds = f"[{span.start}, {span.end}) in a text of {len(completion.text)} characters"
            return rewards, observed, f"bad_span: {bounds}; spans are half-open and count characters"
        first, stop = chars_to_tokens(completion.text_ends, span.start, span.end, completion.text_reach)
        covered = np.arange(first, stop)
        if completion.sampled is not None:
            covered = covered[completion.sampled[covered]]
        if not len(covered):
            return rewards, observed, f"bad_span: no sampled token covers characters [{span.start}, {span.end})"
        rewards[covered] += span.value / len(covered)
    return rewards, observed, _not_finite(rewards)


def _not_finite(rewards: Doubles) -> str | None:
    if np.isfinite(rewards).all():
        return None
    if np.isnan(rewards).any():
        return "nan: the reward is NaN"
    return f"infinite: the reward is {'+' if math.inf in rewards else '-'}infinity"
