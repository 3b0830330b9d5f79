"""The data that flows through operant, and the protocols of its seams: plain containers, no logic.

Axes: B rows, S padded or packed length, N segments, T completion tokens, P prompt tokens.
Records of one prompt or completion are numpy arrays on the CPU; a `Batch` holds torch tensors on the policy's device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Bools = NDArray[np.bool_]

StopReason = Literal["eos", "stop", "length", "reward", "cancelled"]
BatchKind = Literal["supervised", "completions", "labels", "pairs", "edits", "scores"]


class OperantError(Exception):
    """A fault the user can mend. The message is one line and says how; the program prints it without a traceback."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the policy is asked. `references` are seen by rewards and metrics only, never by the policy.

    `tokens` (int64[P]) is what the policy conditions on: the decoder's prefix, or the encoder's input.
    """

    id: str
    tokens: Ints
    text: str = ""
    messages: tuple[dict[str, Any], ...] | None = None
    references: tuple[str, ...] = ()
    task: str = ""
    inputs: Any = None
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a completion is drawn. `temperature=0` is greedy decoding, which has no propensity: its log-probs are 0.

    banned, banned_first: tokens that are not drawn at all, or not as the first one. suppress: nor are those that the
    model's generation_config suppresses. What is learned from needs False: the gradient is of the whole distribution.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 64
    stop: tuple[str, ...] = ()
    banned: tuple[int, ...] = ()
    seed: int = 0
    banned_first: tuple[int, ...] = ()
    suppress: bool = True


@dataclass(slots=True)
class Completion:
    """What the policy answered. The token ids are the record; `text` is a view of them without special tokens.

    tokens: int64[T], the final EOS included when it was sampled.
    behavior_logprobs: float32[T], log-probability under the distribution really drawn from (temperature, top-p, top-k,
        bans), or None when unknown, which makes the completion untrainable.
    model_logprobs: float32[T], the same weights at temperature 1 with nothing cut off.
    text_ends: int64[T], how many characters of `text` are committed (decodable as whole characters) once token t is
        there. Non-decreasing; the last entry may be less than len(text) if the bytes of the last character are cut off.
    text_reach: int64[T], how many characters token t has begun, at least `text_ends`: a token may end one character and
        hold the first bytes of the next. None means that no token does.
    sampled: bool[T], False for tokens that the policy did not draw (forced or observed tokens).
    turns: [start, end) of the tokens of every turn of an encoder-decoder's episode: its decoder writes each anew, and
        its encoder reads all that stands before it, prompt, answers and observations. None where all is one text.
    policy_version: int64[T], the version whose weights drew token t.
    stop_reason: "eos" (an end, of `Codec.end_ids`), "stop" (a stop string), "length", "reward" (a streaming reward
        ended it) or "cancelled".
    truncated: True when the length limit, not the policy, ended the text.
    stream_rewards: float32[T] given by a streaming reward while the text was written, or None.
    """

    id: str
    prompt_id: str
    text: str
    tokens: Ints
    text_ends: Ints
    text_reach: Ints | None = None
    behavior_logprobs: Floats | None = None
    model_logprobs: Floats | None = None
    sampled: Bools | None = None
    policy_version: Ints | None = None
    stop_reason: StopReason = "eos"
    truncated: bool = False
    sampling: Sampling | None = None
    tokenizer_hash: str = ""
    template_hash: str = ""
    stream_rewards: Floats | None = None
    turns: tuple[tuple[int, int], ...] | None = None
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def trainable(self) -> bool:
        return self.behavior_logprobs is not None


@dataclass(frozen=True, slots=True)
class Span:
    """A reward on characters [start, end) of a completion's text (Python code points)."""

    start: int
    end: int
    value: float


@dataclass(frozen=True, slots=True)
class Feedback:
    """One append-only event about a completion. `time` is seconds since the epoch.

    `value` is a number for a score, 1 or −1 (up or down) for a thumb, the edited text for an edit. For a comparison it
    is the id of the completion that was not preferred. For a retraction it is the id of the event to take back, or None
    for all of the source's about the completion.
    """

    id: str
    completion_id: str
    kind: Literal["score", "thumb", "edit", "comparison", "span", "comment", "retract"]
    value: float | str | None
    source: str
    idempotency_key: str
    time: float
    span: tuple[int, int] | None = None


@dataclass(slots=True)
class Trajectory:
    """A completion with its token rewards. A sequence reward stands on the last sampled token.

    rewards: float64[T]; observed: bool[T], False where the reward is missing (never read as zero).
    parts: each named part of a combined reward, summed over tokens; None where missing. missing: the reason, if any.
    """

    prompt: Prompt
    completion: Completion
    rewards: Doubles
    observed: Bools
    parts: dict[str, float | None] = field(default_factory=dict)
    missing: str | None = None


@dataclass(slots=True)
class EncoderContext:
    """Encoder inputs of an encoder-decoder batch: each distinct prompt once.

    tokens: int64[C, P] right-padded; mask: bool[C, P]; row: int64[B], the context of decoder row b.
    """

    tokens: Tensor
    mask: Tensor
    row: Tensor


@dataclass(slots=True)
class Batch:
    """Rows of tokens to learn from. `kind` says what the rows are; a column that a kind has no use for is None.

    kind says what a loss makes of the rows:
        supervised: texts of others. Every action token is learned as it stands.
        completions: a policy's own, with `advantages`, or with `returns` alone where values are learned.
        labels: completions that are each good or bad (`is_chosen`).
        pairs: neighbouring rows, a chosen and a rejected completion of one prompt (`pair_ids`, `is_chosen`).
        edits: pairs whose chosen text a person wrote, so that it is learned as it stands too.
        scores: texts that a reward model reads, and what they were paid (`rewards`).

    The loss is Σ weights · token_loss / denominator. The denominator is that of a whole optimizer step, so that cutting
    a batch into micro-batches changes nothing.

    Columns of tokens. Column t describes token t; the one-place shift of logits lives in `Policy.logprobs` alone.
        tokens: int64[B, S], right-padded or packed.
        position_ids: int64[B, S], each segment's from 0 on.
        segment_ids: int64[B, S], which text a token belongs to, -1 on padding. Packed rows hold several, others one.
        action_mask: bool[B, S], the tokens that the policy answers for: a loss is of these.
        weights: float32[B, S], what each token's loss counts.
        behavior_logprobs: float32[B, S], log μ: of the distribution that was really drawn from.
        old_logprobs: float32[B, S], log π_old: of the policy as the step began.
        ref_logprobs: float32[B, S], log π_ref: of the frozen reference.
        rewards: float64[B, S], what each token was paid, NaN where that is missing.
        observed: bool[B, S], where `rewards` is known; of a rated text, the tokens that were meant.
        values: float32[B, S], the critic's V of the state before each token, as the step began.
        returns: float32[B, S], what a critic, or Q, should have said there.
        advantages: float32[B, S], A of each token.
    Columns of rows, all but the last of which need one segment a row.
        prompt_ids: int64[B]; rows of one number begin with the same prompt, which a policy then computes once.
        prompt_lengths: int64[B], how many tokens of the row are its prompt: 0 where an encoder reads it.
        temperature: float32[B], at which the row was drawn and is learned; 1 for all where it is None.
        pair_ids: int64[B], which pair the row is of.
        is_chosen: bool[B], the better one of its pair, or a good one.
        row_ids: int64[B], the row's number in the batch that this one was cut from.
    context: what an encoder reads beside the rows.
    """

    tokens: Tensor
    position_ids: Tensor
    segment_ids: Tensor
    action_mask: Tensor
    weights: Tensor
    denominator: float
    kind: BatchKind = "supervised"
    context: EncoderContext | None = None
    behavior_logprobs: Tensor | None = None
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    rewards: Tensor | None = None
    observed: Tensor | None = None
    values: Tensor | None = None
    returns: Tensor | None = None
    advantages: Tensor | None = None
    prompt_ids: Tensor | None = None
    prompt_lengths: Tensor | None = None
    temperature: Tensor | None = None
    pair_ids: Tensor | None = None
    is_chosen: Tensor | None = None
    row_ids: Tensor | None = None


@dataclass(slots=True)
class StepStats:
    """What one optimizer step did. `coefficients` are those that the loss really used; `extra` is also logged."""

    step: int
    loss: float
    grad_norm: float
    skipped: bool = False
    reason: str = ""
    approx_kl: float = 0.0
    clipfrac: float = 0.0
    entropy: float = 0.0
    reward_mean: float = float("nan")
    staleness: float = 0.0
    tokens: int = 0
    seconds: float = 0.0
    coefficients: dict[str, float] = field(default_factory=dict)
    extra: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PolicyVersion:
    """One published set of weights and where it came from."""

    version: int
    parent: int | None
    step: int
    path: str
    sha256: str
    consumed: tuple[str, ...] = ()
    verdict: str = ""


# --- seams: what others may put in the place of ours ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Stop:
    """A streaming reward's wish to end the completion here: a terminal, paid with `reward`."""

    reward: float = 0.0


class StreamingSession(Protocol):
    """One completion being judged while it is written."""

    def step(self, token: int, text: str) -> float | Stop:
        """The reward of `token`, which newly committed the characters `text` (empty inside a multi-token character)."""
        ...


@runtime_checkable
class StreamingReward(Protocol):
    """A reward that is paid while the text is being written. Each row has a session of its own.

    It runs where the sampling does, so a slow step slows every row: see `rewards.Limited` for its time limit.
    """

    def start(self, prompt: Prompt) -> StreamingSession: ...


@dataclass(frozen=True, slots=True)
class TokenInfo:
    """One sampled token: its log-probabilities as in `Completion`, the text that it committed, and the version that
    drew it.

    alternatives: (token id, log-probability at temperature 1) of the likeliest tokens in its place, best first, as
    many as were asked for.
    """

    token: int
    text: str
    behavior_logprob: float
    model_logprob: float
    version: int
    alternatives: tuple[tuple[int, float], ...] = ()


class SamplerProtocol(Protocol):
    """What decodes: completions are asked for, and come back with the log-probabilities that they were drawn with.

    `models.sampler.Sampler` decodes in this process; another engine may take its place (`operant.train(sampler=…)`).
    The reward loop needs `sample`, `load` and `saved_tokens`. The live engine needs the rest.
    """

    @property
    def pending(self) -> int:
        """Completions asked for and not yet returned."""
        ...

    @property
    def saved_tokens(self) -> int:
        """Decode steps that streaming rewards made unnecessary by ending rows early, at most, since the beginning."""
        ...

    def submit(
        self,
        prompt: Prompt,
        sampling: Sampling,
        n: int = 1,
        *,
        stream: StreamingReward | None = None,
        audit_fraction: float | None = None,
        first_sample: int = 0,
        ids: Sequence[str] | None = None,
        alternatives: int = 0,
    ) -> list[str]:
        """Ask for n completions of one prompt; returns their ids, which are `ids` where given.

        The i-th completion is drawn with random numbers keyed by (`sampling.seed`, the prompt's id, first_sample + i).
        stream: a reward that is paid token by token and may end a row. audit_fraction: this share of the rows that it
        would end runs on; None leaves the share to the sampler. alternatives: likeliest tokens reported at each place.

        Raises OperantError when the prompt is empty or leaves no room for a token.
        """
        ...

    def cancel(self, completion_id: str) -> Completion | None:
        """Drop one completion. Returns what was written of it, or None if it had not begun or is unknown."""
        ...

    def step(self) -> list[Completion]:
        """Draw one token for every row under way; returns the completions that this finished."""
        ...

    def load(self, version: int, policy: Any = None) -> None:
        """Draw with the weights of this version from the next step on, also what is under way.

        policy: the `LanguagePolicy` that holds them; None is the one that was loaded last, updated in place.
        """
        ...

    def absorb(self, other: Self) -> None:
        """Take over all that is under way in `other`, which is idle after that. Call it between steps."""
        ...

    def sample(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        n: int = 1,
        *,
        stream: StreamingReward | None = None,
        audit_fraction: float | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[list[Completion]]:
        """n completions of each prompt, in the prompts' order; nothing else may be under way.

        A prompt that comes again gets the next samples. stream, audit_fraction: as in `submit`. progress: called with
        the number of completions that just finished.
        """
        ...
