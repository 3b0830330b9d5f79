"""Whether operant computes what a model itself computes: found out when it is loaded, on two short rows.

What the model says of each row alone, in one pass of its own without padding, cache or mask, is the truth. Beside it
stand the ways in which operant reads and decodes: rows together in one cache, rows padded to a batch, rows in one line
of tokens, texts packed into a row. A way that raises or says something else is not taken for this family; a slower one
is. Windows and chunks of attention are made so small meanwhile that the rows reach beyond them.

The result depends on the model's form (its configuration, the shapes of its weights, the libraries), and on no value of
a weight, which every step of learning moves. It is kept by a hash of that form in a folder of the user's, so that a
model is checked once on a machine, and its versions with it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from torch import Tensor

from operant.data.batch import pack, to_device
from operant.models.memory import is_out_of_memory
from operant.types import Batch, Ints, OperantError

if TYPE_CHECKING:
    from operant.models.policy import Policy

__all__ = ["Paths", "cache_folder", "check", "find_paths", "form_of"]

logger = logging.getLogger(__name__)

CHECK = 1  # raised when the check finds out more: what was kept before no longer counts
# (tokens of the prompt, tokens of the completion) of the rows
LENGTHS = ((5, 4), (3, 3))
# settings that bound how far a layer looks or scales, and what they are made
BOUNDARIES = ("sliding_window", "attention_chunk_size", "attention_window_size", "floor_scale")
SHRUNK = 4
# how far two ways may differ, in the spread of the model's log-probabilities: rounding alone stays far below
TOLERANCE, TOLERANCE_IN_BF16 = 2e-3, 0.1


@dataclass(frozen=True, slots=True)
class Paths:
    """Which ways of reading and decoding a model's family has.

    together: rows decode in one cache. cached: a row that decodes alone has a cache. padded: rows are read as a padded
    batch. in_rows: they are read as one line of tokens, each distinct prompt once. packed: several texts share a row.
    """

    together: bool = True
    cached: bool = True
    padded: bool = True
    in_rows: bool = True
    packed: bool = True

    @property
    def slow(self) -> str:
        """What is slower than for most models, in half a line; "" for nothing."""
        decoded = "" if self.together else "decoded row by row" if self.cached else "decoded row by row without a cache"
        read = "" if self.padded else "read row by row"
        return " and ".join(part for part in (decoded, read) if part)


_FOUND: dict[str, Paths] = {}  # by the model's form


def find_paths(policy: Policy, source: str | Path) -> Paths:
    """The ways that a policy's model has, as `check` finds them or as they are known already.

    source: what it was loaded by, for what is said. A model that is slower than most is told of once, in one line.

    Raises OperantError when the model has none.
    """
    form = form_of(policy)
    if form in _FOUND:
        return _FOUND[form]
    found = _read(form)
    if found is None:
        try:
            found = check(policy)
        except OperantError as error:
            raise OperantError(f"{source} {error}; docs/models.md lists the families that operant reads") from error
        _write(form, found)
    if found.slow:
        logger.warning("%s is %s: the layers of a %s need it", source, found.slow, policy.config.model_type)
    _FOUND[form] = found
    return found


def check(policy: Policy) -> Paths:
    """Try each way of reading and decoding on two short rows, and take those that say what the model says.

    A model that says nothing finite is taken as it is. The policy is left as it was.

    Raises OperantError, in words that follow the model's name, when no way is left.
    """
    was, training = policy.paths, policy.model.training
    policy.model.eval()
    try:
        with policy.full_precision() if policy.dtype != "bf16-true" else contextlib.nullcontext():
            return _Check(policy).run()
    finally:
        policy.paths = was
        policy.model.train(training)


class _Check:
    """One run of the check."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.kind = policy.config.model_type
        self.tolerance = TOLERANCE_IN_BF16 if policy.dtype == "bf16-true" else TOLERANCE
        texts = _texts(policy)
        self.prompts = [text[:prompt] for text, (prompt, _) in zip(texts, LENGTHS, strict=True)]
        self.completions = [text[prompt:] for text, (prompt, _) in zip(texts, LENGTHS, strict=True)]

    def run(self) -> Paths:
        config = self.policy.text_config
        found = self._found()
        if found is not None and any(_bounds(config, name) for name in BOUNDARIES):
            with _shrunk(self.policy):
                beyond = self._found() or found
            found = Paths(
                *(getattr(found, part.name) and getattr(beyond, part.name) for part in dataclasses.fields(Paths))
            )
        return found or Paths()

    def _found(self) -> Paths | None:
        """The ways that say what the model says; None for a model that says nothing finite."""
        try:
            with torch.inference_mode():
                self.truth = [self._alone(p, c) for p, c in zip(self.prompts, self.completions, strict=True)]
        except Exception as error:  # of any type, out of a model's own code
            if is_out_of_memory(error):
                raise
            raise OperantError(f"is a {self.kind}, which does not read a plain text ({_fault(error)})") from error
        if not all(bool(torch.isfinite(truth).any(-1).all()) for truth in self.truth):
            return None
        return Paths(**self._decoding(), **self._reading())

    def _alone(self, prompt: Ints, completion: Ints) -> Tensor:
        """float64[T, V]: the model's own log-probabilities of one completion, without any of operant's ways."""
        policy = self.policy
        start = [policy._decoder_start()] if policy.has_encoder else []
        given = np.concatenate([start, completion[:-1]] if start else [prompt, completion]).astype(np.int64)
        ids = torch.from_numpy(given)[None].to(policy.device)
        with policy.autocast():
            if policy.has_encoder:
                read = torch.from_numpy(prompt)[None].to(policy.device)
                logits = policy.model(input_ids=read, decoder_input_ids=ids, use_cache=False).logits[0]
            else:
                logits = policy.model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        return torch.log_softmax(logits.double(), -1)

    def _decoding(self) -> dict[str, bool]:
        faults = []
        for way in ({"together": True}, {"together": False}, {"together": False, "cached": False}):
            self.policy.paths = Paths(**way)
            fault = self._fault_of(self._decode)
            if not fault:
                return {"together": way["together"], "cached": way.get("cached", True)}
            faults.append(fault)
        raise OperantError(f"is a {self.kind}, which operant cannot decode ({faults[-1]})")

    def _reading(self) -> dict[str, bool]:
        policy, ways = self.policy, {"padded": True, "packed": True, "in_rows": True}
        policy.paths = Paths(in_rows=False)
        if self._fault_of(self._read):
            ways["padded"] = ways["in_rows"] = False
            policy.paths = Paths(padded=False)
            if fault := self._fault_of(self._read):
                raise OperantError(f"is a {self.kind}, which operant cannot learn from ({fault})")
        if ways["in_rows"]:
            policy.paths = Paths()
            ways["in_rows"] = not self._fault_of(self._read_in_rows)
        if not policy.has_encoder:
            policy.paths = Paths()
            ways["packed"] = not self._fault_of(self._read_packed)
        return ways

    def _fault_of(self, way: Any) -> str:
        """What is wrong with one way, in half a line; "" for nothing."""
        try:
            error = way()
        except Exception as fault:  # of any type, out of a model's own code
            if is_out_of_memory(fault):
                raise
            return _fault(fault)
        return "" if error <= self.tolerance else f"its log-probabilities differ by {error:.2g} of their spread"

    def _decode(self) -> float:
        """Two rows begin together, one of them goes on twice, two join later, and they end at different times."""
        policy, answers = self.policy, self.completions
        said: list[tuple[int, int, Tensor]] = []  # (which row, the place in it, logits)

        def note(rows: list[tuple[int, int]], logits: Tensor) -> None:
            said.extend((which, place, row) for (which, place), row in zip(rows, logits, strict=True))

        with torch.inference_mode():
            state, logits = policy.prefill(self.prompts)
            rows = [(0, 0), (1, 0)]
            note(rows, logits)
            state, rows = state.select(torch.tensor([0, 1, 0], device=policy.device)), [(0, 0), (1, 0), (0, 0)]
            while rows:
                tokens = torch.tensor([int(answers[which][place]) for which, place in rows], device=policy.device)
                logits, rows = policy.decode(state, tokens), [(which, place + 1) for which, place in rows]
                note(rows, logits)
                if rows[0] == (0, 1):
                    late, first = policy.prefill(self.prompts[::-1], [answers[1][:0], answers[0][:2]])
                    state, rows = state.join(late), [*rows, (1, 0), (0, 2)]
                    note(rows[-2:], first)
                kept = [i for i, (which, place) in enumerate(rows) if place + 1 < len(answers[which])]
                if 0 < len(kept) < len(rows):
                    rows = [rows[i] for i in state.keep(kept)]
                elif not kept:
                    break
        return _difference([(row, self.truth[which][place]) for which, place, row in said])

    def _read(self) -> float:
        return self._compared(self.policy.batch_of_sequences(self.prompts, self.completions), [0, 1], learning=True)

    def _read_in_rows(self) -> float:
        """With a prompt that two rows share."""
        which = [0, 1, 0]
        prompts, completions = ([texts[i] for i in which] for texts in (self.prompts, self.completions))
        batch = self.policy.batch_of_sequences(prompts, completions)
        error = self._compared(batch, which)
        if not self.policy._attends_in_rows:  # it found out by itself that this family does not
            raise ValueError("its attention is its own")
        return error

    def _read_packed(self) -> float:
        texts = [np.concatenate(pair) for pair in zip(self.prompts, self.completions, strict=True)]
        batch = pack(texts, sum(map(len, texts)) + 2, self.policy.codec.pad_id)
        own = torch.zeros_like(batch.action_mask)
        for number, (prompt, completion) in enumerate(LENGTHS):
            columns = (batch.segment_ids[0] == number).nonzero()[:, 0]
            own[0, columns[prompt : prompt + completion]] = True
        batch.action_mask = own
        return self._compared(batch, [0, 1])

    def _compared(self, batch: Batch, which: list[int], *, learning: bool = False) -> float:
        """How far the log-probabilities of a batch, whose rows are `which`, are from the truth.

        learning: take their gradient too, as far as the first vector of weights, to see that it can be taken.
        """
        policy = self.policy
        learned = [p for p in policy.model.parameters() if p.requires_grad and p.dim() == 1] if learning else []
        with torch.enable_grad() if learned else torch.inference_mode():
            out = policy.logprobs(to_device(batch, policy.device)).logprobs
            if learned:
                (gradient,) = torch.autograd.grad(out.sum(), learned[:1], allow_unused=True)
                if gradient is not None and not bool(torch.isfinite(gradient).all()):
                    raise ValueError("its gradient is not finite")
        said = out.detach()[batch.action_mask.to(out.device)]
        truth = torch.cat([self.truth[i] for i in which])
        tokens = torch.from_numpy(np.concatenate([self.completions[i] for i in which])).to(truth.device)
        off = (said.double() - truth.gather(-1, tokens[:, None])[:, 0]).abs() / _spread(truth)
        return float(off.mean() if policy.dtype == "bf16-true" else off.max())


def _texts(policy: Policy) -> list[Ints]:
    """Ordinary token ids, int64[prompt + completion] each, spread over the vocabulary."""
    plain = np.setdiff1d(np.arange(min(policy.vocabulary, policy.codec.vocab_size)), list(policy.codec.special_ids))
    length = sum(map(sum, LENGTHS))
    if not len(plain):
        plain = np.arange(policy.vocabulary)
    chosen = plain[np.linspace(0, len(plain) - 1, length).astype(np.int64)]
    chosen = chosen[np.arange(length) * 7 % length]  # neighbours in the vocabulary are often alike
    first = sum(LENGTHS[0])
    return [chosen[:first].astype(np.int64), chosen[first:].astype(np.int64)]


def _difference(pairs: list[tuple[Tensor, Tensor]]) -> float:
    """How far logits are from true log-probabilities, in the spread of these: at the worst of the places."""
    said = torch.log_softmax(torch.stack([logits for logits, _ in pairs]).double(), -1)
    truth = torch.stack([row for _, row in pairs])
    finite = torch.isfinite(truth)
    off = (said - truth).masked_fill(~finite, 0.0).square().sum(-1) / finite.sum(-1)
    return float((off.sqrt() / _spread(truth)).max())


def _spread(truth: Tensor) -> Tensor:
    """The standard deviation of log-probabilities float64[N, V] over the vocabulary, float64[N]."""
    finite = torch.isfinite(truth)
    mean = truth.masked_fill(~finite, 0.0).sum(-1, keepdim=True) / finite.sum(-1, keepdim=True)
    off = (truth - mean).masked_fill(~finite, 0.0)
    return (off.square().sum(-1) / finite.sum(-1)).sqrt().clamp(min=1e-6)


def _bounds(config: Any, name: str) -> bool:
    value = getattr(config, name, None)
    return isinstance(value, int) and value > SHRUNK


@contextlib.contextmanager
def _shrunk(policy: Policy) -> Iterator[None]:
    """Inside, the model's windows and chunks of attention are `SHRUNK` tokens, where its layers ask for them anew."""
    config, changed = policy.text_config, []
    for name in BOUNDARIES:
        if not _bounds(config, name):
            continue
        value = getattr(config, name)
        holders = [m for m in policy.model.modules() if getattr(m, name, None) == value]
        changed += [(holder, name, value) for holder in (config, *holders)]
    try:
        for holder, name, _ in changed:
            setattr(holder, name, SHRUNK)
        yield
    finally:
        for holder, name, value in changed:
            setattr(holder, name, value)


def _fault(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]


# --- what is known already --------------------------------------------------------------------------------------------


def form_of(policy: Policy) -> str:
    """A hash of all that the check depends on: configuration, shapes of weights, device, precision and libraries."""
    config = policy.config.to_dict()
    for name in ("_name_or_path", "transformers_version", "dtype", "torch_dtype"):
        config.pop(name, None)
    shapes = sorted(str(tuple(p.shape)) for name, p in policy.model.named_parameters() if "lora_" not in name)
    facts = [
        CHECK, torch.__version__, transformers.__version__, policy.device.type, policy.dtype == "bf16-true",
        policy.text_config._attn_implementation, config, shapes,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def cache_folder() -> Path | None:
    """Where results are kept: $OPERANT_CACHE, or operant's folder in the user's cache. None where there is no home."""
    if given := os.environ.get("OPERANT_CACHE"):
        return Path(given)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "operant"
    except RuntimeError:  # no home
        return None


def _read(form: str) -> Paths | None:
    folder = cache_folder()
    try:
        if folder is None:
            return None
        return Paths(**json.loads((folder / "models" / f"{form}.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # none there, or not to be read: it is found out again
        return None


def _write(form: str, found: Paths) -> None:
    folder = cache_folder()
    if folder is None:
        return
    file = folder / "models" / f"{form}.json"
    fresh = file.with_name(f".{form}-{os.getpid()}")
    with contextlib.suppress(OSError):  # a folder that cannot be written costs two seconds at the next load
        file.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text(json.dumps(dataclasses.asdict(found)), encoding="utf-8")
        os.replace(fresh, file)
