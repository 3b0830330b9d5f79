"""One sampler for training and for live requests: rows join and leave between decode steps.

Randomness is a pure function of (seed, prompt, sample, position), so what a row says depends neither on the rows that
it shares a batch with nor on when it joined (up to the rounding of the logits), and a resumed run draws the same text.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from operant.models.cache import State
from operant.models.policy import LanguagePolicy
from operant.types import (
    Completion,
    OperantError,
    Prompt,
    Sampling,
    Stop,
    StopReason,
    StreamingReward,
    StreamingSession,
    TokenInfo,
)

_MASK64 = (1 << 64) - 1


def row_key(seed: int, prompt_id: str, sample: int) -> int:
    """The 64-bit key of one row's random numbers: the first 8 bytes of BLAKE2b over seed, prompt and sample number."""
    digest = hashlib.blake2b(f"{seed}\x00{prompt_id}\x00{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def uniform(key: int, position: int) -> float:
    """A number in [0, 1) from SplitMix64 (Steele et al. 2014) at counter `position`; 53 bits."""
    z = (key + (position + 1) * 0x9E3779B97F4A7C15) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return float((z ^ (z >> 31)) >> 11) * 2.0**-53


def behavior_logprobs(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, banned: Tensor | None = None
) -> Tensor:
    """The log-probabilities that tokens are really drawn from: bans, then temperature, top-k, top-p, renormalised.

    logits: float32[B, V]. temperature: float32[B], > 0. top_k: int64[B], 0 for off. top_p: float32[B], 1 for off
    (Holtzman et al. 2020: the smallest set whose probability reaches top_p). banned: bool[B, V] or None.
    Returns float32[B, V], −inf where a token cannot be drawn.
    """
    if banned is not None:
        logits = logits.masked_fill(banned, -torch.inf)
    logprobs = torch.log_softmax(logits / temperature[:, None], -1)
    if bool((top_k > 0).any()) or bool((top_p < 1.0).any()):
        logprobs = torch.log_softmax(logprobs.masked_fill(~_kept(logprobs, top_k, top_p), -torch.inf), -1)
    return logprobs


def _kept(logprobs: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """bool[B, V]: what top-k and top-p leave of float32[B, V]; of equals the first ones in the vocabulary.

    Only the best tokens are put in order, more of them where these do not reach top_p. To sort 16 rows of 49,152 takes
    0.1 s, at every token.
    """
    vocab = logprobs.shape[-1]
    by_rank, by_mass = (top_k > 0) & (top_k < vocab), top_p < 1.0
    most = torch.where(by_rank, top_k, vocab)[:, None]
    share = torch.where(by_mass, top_p, torch.inf)[:, None]
    open_ended = (by_mass & ~by_rank)[:, None]  # rows of which nobody knows how many stay
    width = max(1, int(torch.where(by_rank, top_k, 0).max()), 256 if bool(open_ended.any()) else 0)
    while True:
        ordered = logprobs.topk(min(width, vocab), -1).values
        better = ordered.exp().cumsum(-1) - ordered.exp()  # a token stays while that of all better ones is below top_p
        if width >= vocab or not bool((open_ended & (better[:, -1:] < share)).any()):
            break
        width *= 8
    keep = (torch.arange(ordered.shape[-1], device=logprobs.device) < most) & (better < share)
    keep[:, 0] = True
    count = keep.sum(-1, keepdim=True)
    least = ordered.gather(-1, count - 1)
    kept = logprobs >= least
    if bool((kept.sum(-1, keepdim=True) > count).any()):  # equals at the border
        equal = logprobs == least
        room = count - (logprobs > least).sum(-1, keepdim=True)
        kept &= ~equal | (equal.cumsum(-1) <= room)
    return kept | ~(by_rank | by_mass)[:, None]


def draw(logprobs: Tensor, uniforms: Tensor) -> Tensor:
    """Inverse-CDF sampling: the first token whose cumulative probability is above the uniform number.

    logprobs: float32[B, V], −inf where a token cannot be drawn. uniforms: float64[B] in [0, 1). Returns int64[B].
    """
    cumulative = logprobs.exp().cumsum(-1, dtype=torch.float64)
    target = uniforms[:, None].to(cumulative.device) * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, target, right=True)[:, 0].clamp_(max=logprobs.shape[-1] - 1)
    if bool(torch.isfinite(logprobs.gather(1, index[:, None])).all()):
        return index
    # rounding may land past the last token with probability; the last possible one is then meant
    last = logprobs.shape[-1] - 1 - torch.isfinite(logprobs).flip(-1).to(torch.uint8).argmax(-1)
    return torch.minimum(index, last)


@dataclass(slots=True)
class _Row:
    id: str
    prompt: Prompt
    sampling: Sampling
    key: int
    text: Any
    limit: int
    session: StreamingSession | None
    audited: bool
    alternatives: int
    tokens: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    behavior: list[float] = field(default_factory=list)
    model: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class _Queued:
    """A prompt whose completions have not all begun; `first` is the sample number of the next one."""

    prompt: Prompt
    sampling: Sampling
    ids: list[str]
    first: int
    stream: StreamingReward | None
    audit_fraction: float
    alternatives: int


class Sampler:
    """Continuous batching over one policy.

    The `SamplerProtocol` of this process.

    max_rows: rows decoded together. audit_fraction: of the rows that a streaming reward would end, this share runs on
    (unless a request gives its own), with `meta["would_stop_at"]` and `meta["stop_reward"]` noted, to estimate what
    early stops lose.
    An audited row is paid what it would have been paid had it ended; the rewards it would have gathered after that are
    summed in `meta["audited_return"]`.
    on_token: called with (completion id, the token) after each sampled token.
    """

    def __init__(
        self,
        policy: LanguagePolicy,
        *,
        max_rows: int = 128,
        version: int = 0,
        audit_fraction: float = 0.0,
        on_token: Callable[[str, TokenInfo], None] | None = None,
    ) -> None:
        self.policy = policy
        self.version = version
        self.max_rows = max_rows
        self.audit_fraction = audit_fraction
        self.on_token = on_token
        self.saved_tokens = 0  # decode steps that early stops made unnecessary, at most
        self._queue: deque[_Queued] = deque()
        self._rows: list[_Row] = []
        self._state: State | None = None
        self._stale = False
        self._sequence = 0

    # --- requests ------------------------------------------------------------------------------------------------

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
        """Ask for n completions of one prompt; returns their ids. The i-th is keyed `first_sample + i`.

        stream: a reward that is paid token by token and may end a row. audit_fraction: this share of the rows that it
        would end runs on; None takes the sampler's own. ids: names for the completions, n of them; None makes some.
        alternatives: how many of the likeliest tokens `on_token` gets at each place.

        Raises OperantError when the prompt is empty or leaves no room for a token.
        """
        check_room(self.policy, prompt, sampling.max_tokens)
        sampling = self._suppressing(sampling)
        if ids is None:
            ids = [f"{prompt.id}#{self._sequence + i}" for i in range(n)]
            self._sequence += n
        share = self.audit_fraction if audit_fraction is None else audit_fraction
        self._queue.append(_Queued(prompt, sampling, list(ids), first_sample, stream, share, alternatives))
        return list(ids)

    def _suppressing(self, sampling: Sampling) -> Sampling:
        """The settings with the bans of the model's generation_config, if they ask for these."""
        of = self.policy.generation
        if not sampling.suppress or not (of.banned or of.banned_first):
            return sampling
        return dataclasses.replace(
            sampling, banned=tuple(sorted({*sampling.banned, *of.banned})),
            banned_first=tuple(sorted({*sampling.banned_first, *of.banned_first})),
        )  # fmt: skip

    def cancel(self, completion_id: str) -> Completion | None:
        """Drop one completion. Returns what was written of it, or None if it had not begun or is unknown."""
        for request in self._queue:
            if completion_id in request.ids:
                request.ids.remove(completion_id)
                return None
        for index, row in enumerate(self._rows):
            if row.id == completion_id:
                self._keep([i for i in range(len(self._rows)) if i != index])
                return self._finish(row, "cancelled")
        return None

    @property
    def pending(self) -> int:
        """Completions asked for and not yet returned."""
        return len(self._rows) + sum(len(r.ids) for r in self._queue)

    def load(self, version: int, policy: LanguagePolicy | None = None) -> None:
        """Serve other weights from the next step on: rows under way are read again under them, no cache outlives its
        version. Call it with the same policy after its weights were updated in place."""
        self.version = version
        self.policy = policy or self.policy
        self._stale = True

    def absorb(self, other: Sampler) -> None:
        """Take over all that is under way in `other`: from the next step on it is read again under this one's weights.
        Call it between steps; the other one is idle after that."""
        self._queue.extend(other._queue)
        if other._rows:
            self._rows += other._rows
            self._stale = True
        other._queue.clear()
        other._rows, other._state = [], None

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

        A prompt that comes again gets the next samples: copies of the first ones would pass for independent samples in
        a group's baseline. stream, audit_fraction: as in `submit`. progress: called with the number of completions that
        just finished.

        Raises OperantError when a prompt is empty or leaves no room for a token, RuntimeError when something else is
        under way.
        """
        if self.pending:
            raise RuntimeError("sample() needs an idle sampler; use submit() and step() for overlapping requests")
        asked: Counter[str] = Counter()
        ids = []
        for prompt in prompts:
            first = n * asked[prompt.id]
            ids.append(
                self.submit(prompt, sampling, n, stream=stream, audit_fraction=audit_fraction, first_sample=first)
            )
            asked[prompt.id] += 1
        done: dict[str, Completion] = {}
        while self.pending:
            finished = self.step()
            done.update((c.id, c) for c in finished)
            if progress and finished:
                progress(len(finished))
        return [[done[i] for i in group] for group in ids]

    # --- one decode step -----------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> list[Completion]:
        """Admit what fits, draw one token for every row, return the completions that this finished.

        A completion's arrays run along its T tokens, as `Completion` says. Greedy ones have log-probabilities of 0.
        """
        if self._stale and self._rows:
            self._state, _ = self.policy.prefill(
                [row.prompt.tokens for row in self._rows], [np.array(row.tokens[:-1], np.int64) for row in self._rows]
            )
        self._stale = False
        logits: list[Tensor] = []
        if self._rows:
            assert self._state is not None
            fed = torch.tensor([row.tokens[-1] for row in self._rows], device=self._state.device)
            logits.append(self.policy.decode(self._state, fed))
        admitted = self._admit()
        if admitted is not None:
            state, first_logits = admitted
            logits.append(first_logits)
            self._state = state if self._state is None else self._state.join(state)
        if not self._rows:
            return []
        return self._draw(torch.cat(logits))

    def _admit(self) -> tuple[State, Tensor] | None:
        """Prefill each admitted prompt once and share it among its completions."""
        prompts: list[Prompt] = []
        copies: list[int] = []
        free = self.max_rows - len(self._rows)
        while self._queue and free > 0:
            request = self._queue[0]
            count = min(free, len(request.ids))
            for _ in range(count):
                completion_id = request.ids.pop(0)
                key = row_key(request.sampling.seed, request.prompt.id, request.first)
                request.first += 1
                session, meta = _start(request)
                self._rows.append(
                    _Row(
                        id=completion_id,
                        prompt=request.prompt,
                        sampling=request.sampling,
                        key=key,
                        text=self.policy.codec.incremental(),
                        limit=room(self.policy, request.prompt, request.sampling.max_tokens),
                        session=session,
                        meta=meta,
                        alternatives=request.alternatives,
                        audited=uniform(key ^ 0xA0D17, 0) < request.audit_fraction,
                    )
                )
            if count:
                prompts.append(request.prompt)
                copies.append(count)
            free -= count
            if not request.ids:
                self._queue.popleft()
        if not prompts:
            return None
        state, logits = self.policy.prefill([p.tokens for p in prompts])
        if any(c > 1 for c in copies):
            index = torch.repeat_interleave(torch.tensor(copies)).to(logits.device)
            return state.select(index), logits[index]
        return state, logits

    def _draw(self, logits: Tensor) -> list[Completion]:
        """The next token of every row from logits float32[B, V]; the completions that this finished."""
        rows, device = self._rows, logits.device
        model = torch.log_softmax(logits, -1)
        bans = [r.sampling.banned if r.tokens else r.sampling.banned + r.sampling.banned_first for r in rows]
        plain = all(
            r.sampling.temperature == 1 and r.sampling.top_p >= 1 and not r.sampling.top_k and not ban
            for r, ban in zip(rows, bans, strict=True)
        )
        if plain:
            behavior = model
        else:
            temperature = torch.tensor([r.sampling.temperature for r in rows], device=device)
            banned = None
            if any(bans):
                banned = torch.zeros(logits.shape, dtype=torch.bool, device=device)
                for i, ban in enumerate(bans):
                    banned[i, list(ban)] = True
            behavior = behavior_logprobs(
                logits,
                torch.where(temperature > 0, temperature, 1.0),
                torch.tensor([r.sampling.top_k if r.sampling.temperature > 0 else 1 for r in rows], device=device),
                torch.tensor([r.sampling.top_p for r in rows], device=device),
                banned,
            )
        uniforms = torch.tensor([uniform(r.key, len(r.tokens)) for r in rows], dtype=torch.float64)
        tokens = draw(behavior, uniforms)
        behavior_list = behavior.gather(1, tokens[:, None])[:, 0].tolist()
        model_list = model.gather(1, tokens[:, None])[:, 0].tolist() if not plain else list(behavior_list)
        drawn = tokens.tolist()
        if (first := self.policy.codec.first_id) is not None:
            for i in (i for i, r in enumerate(rows) if not r.tokens):  # nobody draws it, so it has no propensity
                drawn[i], behavior_list[i], model_list[i] = first, 0.0, 0.0
        likeliest = self._likeliest(model)
        finished: list[Completion] = []
        kept: list[int] = []
        for i, (row, token) in enumerate(zip(rows, drawn, strict=True)):
            piece = row.text.push(token)
            row.tokens.append(token)
            row.ends.append(len(row.text.text))
            row.behavior.append(behavior_list[i])
            row.model.append(model_list[i])
            row.versions.append(self.version)
            if self.on_token:
                others = likeliest[i] if likeliest else ()
                self.on_token(row.id, TokenInfo(token, piece, row.behavior[-1], row.model[-1], self.version, others))
            reason = self._stop_reason(row, token, piece)
            if reason is None:
                kept.append(i)
            else:
                finished.append(self._finish(row, reason))
        if len(kept) < len(rows):
            self._keep(kept)
        return finished

    def _likeliest(self, model: Tensor) -> list[tuple[tuple[int, float], ...]]:
        """For each row as many (token, log-prob) of `model`, float32[B, V], as it asked for; [] when none did."""
        most = max(row.alternatives for row in self._rows)
        if not most or self.on_token is None:
            return []
        values, tokens = model.topk(min(most, model.shape[-1]), -1)
        return [
            tuple(zip(ids[: row.alternatives], logprobs[: row.alternatives], strict=True))
            for row, ids, logprobs in zip(self._rows, tokens.tolist(), values.tolist(), strict=True)
        ]

    def _stop_reason(self, row: _Row, token: int, piece: str) -> StopReason | None:
        stopped = False
        if row.session is not None:
            stopped = self._stream(row, token, piece)
        if token in self.policy.codec.end_ids:
            return "eos"
        if stopped:
            return "reward"
        longest = max((len(s) for s in row.sampling.stop), default=0)
        if longest and piece:
            tail = row.text.text[-(longest + len(piece)) :]
            if any(s in tail for s in row.sampling.stop):
                return "stop"
        return "length" if len(row.tokens) >= row.limit else None

    def _stream(self, row: _Row, token: int, piece: str) -> bool:
        """Ask the row's streaming reward about its newest token; True to end the row.

        A session that raises is dropped, and the row's rewards are then missing, not zero.
        """
        try:
            answer: Any = row.session.step(token, piece)  # type: ignore[union-attr]
            ends = isinstance(answer, Stop)
            value = float("nan") if answer is None else float(answer.reward if ends else answer)
        except Exception as error:
            row.session, row.rewards = None, []
            row.meta["stream_fault"] = f"{type(error).__name__}: {error}"
            return False
        if "would_stop_at" in row.meta:
            # an audited row has had its terminal reward; what follows is only watched
            row.rewards.append(0.0)
            row.meta["audited_return"] += value
            return False
        row.rewards.append(value)
        if not ends:
            return False
        if row.audited:
            row.meta |= {"would_stop_at": len(row.tokens), "stop_reward": value, "audited_return": 0.0}
            return False
        self.saved_tokens += row.limit - len(row.tokens)
        return True

    @torch.inference_mode()  # the cache was made in it
    def _keep(self, index: list[int]) -> None:
        if index and not self._stale:
            assert self._state is not None
            index = self._state.keep(index)
        else:  # no row is left, or the next step reads them all again
            self._state = None
        self._rows = [self._rows[i] for i in index]

    def _finish(self, row: _Row, reason: StopReason) -> Completion:
        text, ends, reach = row.text.text, np.array(row.ends, np.int64), np.array(row.text.reach, np.int64)
        if reason == "stop":
            cut = min(i for i in (text.find(s) for s in row.sampling.stop) if i >= 0)
            text, ends, reach = text[:cut], np.minimum(ends, cut), np.minimum(reach, cut)
        else:
            text += row.text.finish()
        greedy = row.sampling.temperature == 0
        if (parts := getattr(row.session, "parts", None)) is not None:
            row.meta["stream_parts"] = parts  # what each part of a combination was paid
        return Completion(
            id=row.id,
            prompt_id=row.prompt.id,
            text=text,
            tokens=np.array(row.tokens, np.int64),
            text_ends=ends,
            text_reach=reach,
            behavior_logprobs=np.array(row.behavior, np.float32) * (0.0 if greedy else 1.0),
            model_logprobs=np.array(row.model, np.float32),
            sampled=np.arange(len(row.tokens)) >= (self.policy.codec.first_id is not None),
            policy_version=np.array(row.versions, np.int64),
            stop_reason=reason,
            truncated=reason == "length",
            sampling=row.sampling,
            tokenizer_hash=self.policy.codec.hash,
            template_hash=self.policy.codec.template_hash,
            stream_rewards=np.array(row.rewards, np.float32) if row.session is not None else None,
            meta=row.meta,
        )


def room(policy: LanguagePolicy, prompt: Prompt, max_tokens: int) -> int:
    """How many tokens a completion of this prompt may have; below 1 when the prompt does not fit."""
    used = len(prompt.tokens) if policy.family == "decoder" else 1
    fits = len(prompt.tokens) <= policy.max_length
    return min(max_tokens, policy.max_length - used) if fits else 0


def check_room(policy: LanguagePolicy, prompt: Prompt, max_tokens: int) -> None:
    """Raises OperantError when the prompt is empty or leaves no room for a token."""
    if len(prompt.tokens) == 0:
        raise OperantError(
            f"prompt {prompt.id!r} is empty, so nothing predicts its first token; give text or a separator"
        )
    if room(policy, prompt, max_tokens) < 1:
        raise OperantError(
            f"prompt {prompt.id!r} has {len(prompt.tokens)} tokens and the model's context {policy.max_length}; "
            "shorten it, or load it with --too_long truncate"
        )


def _start(request: _Queued) -> tuple[StreamingSession | None, dict[str, Any]]:
    """A session of the request's streaming reward, and the fault where it could not start one."""
    if request.stream is None:
        return None, {}
    try:
        return request.stream.start(request.prompt), {}
    except Exception as error:
        return None, {"stream_fault": f"{type(error).__name__}: {error}"}
