"""Learning from preferences: DPO, IPO and KTO against the policy as the stage found it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from operant.algorithms.objectives import full_kl, kto_reference_point, preference_loss
from operant.algorithms.table import ALGORITHMS, nearest
from operant.config import PreferConfig
from operant.data.batch import from_sequences, microbatches, to_device
from operant.data.preferences import Preference, Rating, load_preferences, load_ratings, unpaired
from operant.data.replay import Replay, draw
from operant.data.rows import Fields, load_rows, load_split_rows, split_rows
from operant.models.policy import Policy
from operant.run.run import DataOrder, Run, mixed_seed
from operant.stages.supervised import StageResult, fit
from operant.types import Batch, Floats, Ints, OperantError, Prompt

METHODS = tuple(a.name for a in ALGORITHMS.values() if a.learns_from == "preferences")


@dataclass(slots=True)
class Answers:
    """Completions with the reference's log-probs of their tokens. Of pairs, 2i is the chosen one and 2i + 1 the
    rejected one of pair i; of ratings, each stands alone.

    reference: float32[T] each, None until `score` has seen it.
    """

    prompts: list[Prompt]
    tokens: list[Ints]
    good: list[bool]
    paired: bool
    reference: list[Floats | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reference = [None] * len(self.tokens)

    @classmethod
    def of(cls, examples: Sequence[Preference] | Sequence[Rating]) -> Answers:
        pairs = [e for e in examples if isinstance(e, Preference)]
        paired = len(pairs) == len(examples)
        ratings = unpaired(pairs) if paired else [e for e in examples if isinstance(e, Rating)]
        return cls([r.prompt for r in ratings], [r.tokens for r in ratings], [r.desirable for r in ratings], paired)

    def rows(self, examples: Sequence[int]) -> list[int]:
        """The completions of these examples (pairs or ratings)."""
        return [r for i in examples for r in (2 * i, 2 * i + 1)] if self.paired else list(examples)

    def batch(self, policy: Policy, rows: Sequence[int]) -> Batch:
        """A batch of completions; its denominator is the number of examples in it."""
        encoder = policy.family == "encoder-decoder"
        batch = from_sequences(
            [self.prompts[r].tokens for r in rows], [self.tokens[r] for r in rows], encoder=encoder,
            pad_id=policy.codec.pad_id, normalisation="per_completion",
        )  # fmt: skip
        batch.is_chosen = torch.tensor([self.good[r] for r in rows])
        batch.denominator = float(len(rows))
        if self.paired:
            batch.pair_ids = torch.arange(len(rows)) // 2
            batch.denominator = len(rows) / 2
        batch.ref_logprobs = torch.zeros(batch.tokens.shape)
        for i, r in enumerate(rows):
            reference = self.reference[r]
            if reference is not None:
                start = 0 if encoder else len(self.prompts[r].tokens)
                batch.ref_logprobs[i, start : start + len(reference)] = torch.from_numpy(reference)
        return batch

    @torch.no_grad()
    def score(self, policy: Policy, rows: Sequence[int], max_tokens: int) -> None:
        """Note the log-probs of these completions under the policy as it is now, which is the reference."""
        # which completions are computed together depends on no one's needs: rounding differs between batches, and a
        # run that is resumed with more steps needs more of them
        ordered = sorted(range(len(self.tokens)), key=lambda r: (self._length(r), r))
        needed, start = set(rows), 0
        encoder = policy.family == "encoder-decoder"
        while start < len(ordered):
            stop = start + 1
            while stop < len(ordered) and self._length(ordered[stop]) * (stop + 1 - start) <= max_tokens:
                stop += 1
            chunk, start = ordered[start:stop], stop
            if needed.isdisjoint(chunk):
                continue
            logprobs = policy.logprobs(to_device(self.batch(policy, chunk), policy.device)).logprobs.cpu().numpy()
            for i, r in enumerate(chunk):
                first = 0 if encoder else len(self.prompts[r].tokens)
                self.reference[r] = logprobs[i, first : first + len(self.tokens[r])].astype(np.float32)

    def _length(self, row: int) -> int:
        return len(self.prompts[row].tokens) + len(self.tokens[row])

    def strangers(self, policy: Policy, seed: int) -> Answers:
        """Each prompt with the completion of another one, for KTO's reference point: the next in an order keyed by the
        seed whose prompt is another. It belongs to the row for the whole run, so its reference is computed once.

        Raises OperantError when all prompts are the same.
        """
        keys = [prompt.tokens.tobytes() for prompt in self.prompts]
        if len(set(keys)) < 2:
            raise OperantError(
                "kto estimates its reference point from completions of other prompts, and all rows have the same "
                "prompt; give rows with several, or pairs and --algorithm dpo"
            )
        count = len(keys)
        order = np.random.default_rng(mixed_seed(seed, "strangers")).permutation(count).tolist()
        partner = [0] * count
        for place, row in enumerate(order):
            ahead = (order[(place + k) % count] for k in range(1, count))
            partner[row] = next(other for other in ahead if keys[other] != keys[row])
        room = policy.max_length
        tokens = []
        for row, other in enumerate(partner):
            taken = 0 if policy.family == "encoder-decoder" else len(self.prompts[row].tokens)
            tokens.append(self.tokens[other][: max(1, room - taken)])
        return Answers(self.prompts, tokens, self.good, paired=False)


def prefer(
    config: PreferConfig,
    *,
    policy: Policy | None = None,
    examples: Sequence[Preference] | Sequence[Rating] | None = None,
    dev_examples: Sequence[Preference] | Sequence[Rating] | None = None,
    replay: Replay | None = None,
    quiet: bool = False,
) -> StageResult[Policy]:
    """Learn from preferences until the held-out loss stops improving. What is not given is loaded as `config` says.

    The reference is the policy as it comes in; its log-probs are computed once, before the first step. DPO and IPO take
    pairs; KTO takes ratings, and pairs as two ratings each. With `replay`, batches are drawn from it. Dropout is off.

    Raises OperantError for an unknown algorithm, settings that it has no use for, missing or empty data, an empty
    replay, and ratings where pairs are needed.
    """
    check(config)
    with Run(config, "prefer", quiet=quiet) as run:
        if policy is None:
            if not config.model:
                raise OperantError("--model is missing; give a model folder or hub id to start from")
            policy = Policy.load(config.model, device=config.device, dtype=config.dtype)
            if config.lora_rank:
                policy.add_lora(config.lora_rank, seed=config.seed)
        policy.model.eval()
        drawn = examples is None and (replay is not None or config.replay is not None)
        if examples is None:
            examples, loaded = _loaded(config, policy, replay)
            dev_examples = loaded if dev_examples is None else dev_examples
        learned = _as_needed(config, examples)
        if not learned:
            raise OperantError("there are no preferences to learn from; check --data and --limit")
        held_out = _as_needed(config, dev_examples or [])
        for example in (*learned, *held_out):
            _check_fits(policy, example)
        per_step = min(config.batch_size, len(learned))
        order = DataOrder(len(learned), per_step, config.seed, "preferences")
        times = [example.time for example in learned]

        def taken(step: int) -> list[int]:
            """The examples of a step: a function of the step alone, so that a resumed run takes the same."""
            if not drawn:
                return order.take(step)
            return draw(times, per_step, seed=config.seed, step=step, half_life=3600 * config.half_life)

        return _learn(run, config, policy, learned, held_out, taken)


def check(config: PreferConfig) -> None:
    """Refuse what the algorithm has no use for, by name."""
    name = config.algorithm
    if name not in METHODS:
        raise OperantError(
            f"{name!r} does not learn from preferences{nearest(name, list(METHODS))} (there are: {', '.join(METHODS)})"
        )
    if not 0 < config.beta < math.inf:
        raise OperantError(f"beta is {config.beta}; it must be more than 0: correct --beta")
    if config.label_smoothing and name != "dpo":
        raise OperantError(f"{name} has no label smoothing; leave --label_smoothing out, or use --algorithm dpo")
    if name != "kto" and (config.desirable_weight, config.undesirable_weight) != (1.0, 1.0):
        raise OperantError(f"{name} weighs no single completions; leave the weights out, or use --algorithm kto")
    if config.data and config.replay:
        raise OperantError("both --data and --replay are given; leave one of them out")


def loss_settings(config: PreferConfig) -> dict[str, Any]:
    """What `preference_loss` takes from the configuration, by its parameters' names."""
    mean = config.logprob == "mean" or (config.logprob == "auto" and config.algorithm == "ipo")
    return {
        "algorithm": config.algorithm, "beta": config.beta, "mean": mean, "label_smoothing": config.label_smoothing,
        "kto_weights": (config.desirable_weight, config.undesirable_weight), "sft_coef": config.sft_coef,
    }  # fmt: skip


def _learn(
    run: Run,
    config: PreferConfig,
    policy: Policy,
    learned: Sequence[Preference] | Sequence[Rating],
    held_out: Sequence[Preference] | Sequence[Rating],
    taken: Callable[[int], list[int]],
) -> StageResult[Policy]:
    kto_point = config.algorithm == "kto"
    room = config.tokens_per_microbatch
    answers = Answers.of(learned)
    dev = Answers.of(held_out) if held_out else None
    needed = sorted({i for step in range(config.steps) for i in taken(step)})
    answers.score(policy, answers.rows(needed), room)
    strangers = answers.strangers(policy, config.seed) if kto_point else None
    dev_strangers = None
    if strangers is not None:
        strangers.score(policy, needed, room)
    if dev is not None:
        dev.score(policy, range(len(dev.tokens)), room)
        if kto_point and len({prompt.tokens.tobytes() for prompt in dev.prompts}) > 1:
            dev_strangers = dev.strangers(policy, config.seed)
            dev_strangers.score(policy, range(len(dev.tokens)), room)
        if config.measure_kl:
            policy.freeze_reference()

    @torch.no_grad()
    def point_of(others: Answers, rows: Sequence[int]) -> float:
        """KTO's z₀ over these rows, under the policy as it is now: one number for the whole optimizer step."""
        parts = []
        for piece in microbatches(others.batch(policy, rows), room):
            moved = to_device(piece, policy.device)
            assert moved.ref_logprobs is not None
            parts.append(torch.stack([policy.logprobs(moved).logprobs.sum(1), moved.ref_logprobs.sum(1)]))
        both = torch.cat(parts, 1)
        return float(kto_reference_point(both[0], both[1]))

    point = 0.0

    def batches(step: int) -> list[Batch]:
        nonlocal point
        chosen = taken(step)
        if strangers is not None:
            point = point_of(strangers, chosen)
        return list(microbatches(answers.batch(policy, answers.rows(chosen)), room))

    def loss_of(policy: Policy, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        token_loss, stats = preference_loss(
            policy.logprobs(batch).logprobs, batch, reference_point=point, **loss_settings(config)
        )
        if strangers is not None:
            stats["reference_point"] = point * stats["count"]
        return token_loss, stats

    @torch.no_grad()
    def measured() -> dict[str, float]:
        assert dev is not None
        policy.model.eval()
        at = point_of(dev_strangers, range(len(dev.tokens))) if dev_strangers is not None else 0.0
        sums: dict[str, float] = {}
        for piece in microbatches(dev.batch(policy, range(len(dev.tokens))), room):
            micro = to_device(piece, policy.device)
            logprobs = policy.logprobs(micro).logprobs
            token_loss, stats = preference_loss(logprobs, micro, reference_point=at, **loss_settings(config))
            assert micro.is_chosen is not None
            stats |= {
                "loss": (token_loss * micro.weights).sum(),
                "nll_good": -logprobs[micro.is_chosen].sum(),
                "tokens_good": micro.action_mask[micro.is_chosen].sum(),
            }
            if config.measure_kl:
                logits = policy.logits(micro)
                with policy.as_reference():
                    stats["kl_ref"] = full_kl(logits, policy.logits(micro))[micro.action_mask].sum()
                stats["tokens"] = micro.action_mask.sum()
            for name, value in stats.items():
                sums[name] = sums.get(name, 0.0) + float(value)
        values = {name: sums[name] / sums["count"] for name in ("loss", "accuracy", "margin")}
        if sums["tokens_good"]:
            values["nll_good"] = sums["nll_good"] / sums["tokens_good"]
        if config.measure_kl:
            values["kl_ref"] = sums["kl_ref"] / sums["tokens"]
        return values

    rate = ALGORITHMS[config.algorithm].lr if config.lr == "auto" else config.lr
    run.note(_told(config, learned, held_out))  # no earlier: a fault is the one line that is seen
    return fit(
        run, policy, config, steps=config.steps, lr=rate, warmup_steps=config.warmup_steps,
        schedule=config.schedule, batches=batches, dev=[], eval_every=config.eval_every, patience=config.patience,
        loss_of=loss_of, held_out=measured if dev is not None else None, dropout=False,
    )  # fmt: skip


# -- examples


def _as_needed(
    config: PreferConfig, examples: Sequence[Preference] | Sequence[Rating]
) -> Sequence[Preference] | Sequence[Rating]:
    """Pairs where the table says that they are needed, ratings elsewhere."""
    pairs = [e for e in examples if isinstance(e, Preference)]
    if ALGORITHMS[config.algorithm].pairs:
        if len(pairs) < len(examples):
            raise OperantError(f"{config.algorithm} learns from pairs, and ratings are given; use --algorithm kto")
        return pairs
    return unpaired(pairs) + [e for e in examples if isinstance(e, Rating)]


def _loaded(
    config: PreferConfig, policy: Policy, replay: Replay | None
) -> tuple[Sequence[Preference] | Sequence[Rating], Sequence[Preference] | Sequence[Rating]]:
    """(what to learn from, what is held out)."""
    encoder = policy.family == "encoder-decoder"
    fields = Fields(
        prompt=config.prompt_field, completion=config.completion_field, chosen=config.chosen_field,
        rejected=config.rejected_field, label=config.label_field,
    )  # fmt: skip

    def read(rows: list[dict[str, object]]) -> Sequence[Preference] | Sequence[Rating]:
        load = load_ratings if config.algorithm == "kto" else load_preferences
        return load(
            rows, policy.codec, fields, prefix=config.prefix, separator=config.separator, encoder=encoder,
            max_prompt_tokens=config.max_prompt_tokens or policy.max_length - (not encoder),
            max_tokens=policy.max_length, too_long=config.too_long,
        ) if rows else []  # fmt: skip

    if replay is None and config.replay is None:
        rows, dev_rows = load_split_rows(config.data, config.dev_data, config.limit, 0.1, 500)
        return read(rows), read(dev_rows)
    found = _from_replay(config, policy, replay if replay is not None else read_replay(str(config.replay)))
    if config.dev_data:
        return found, read(load_rows(config.dev_data, split="dev", limit=500))
    # the newest are held out: they say whether what was learned from the past foretells the future
    return split_rows(found, 0.1, 500)  # type: ignore[return-value]


def read_replay(path: str) -> Replay:
    """The replay in a file. Raises OperantError when it cannot be read."""
    try:
        with Path(path).expanduser().open(encoding="utf-8", newline="\n") as lines:
            return Replay.from_lines(lines)
    except (OSError, UnicodeDecodeError) as error:
        raise OperantError(f"the replay {path} cannot be read ({error}); give a file of feedback") from error


def _from_replay(config: PreferConfig, policy: Policy, replay: Replay) -> list[Preference] | list[Rating]:
    encoder = policy.family == "encoder-decoder"
    found: list[Preference] | list[Rating] = replay.preferences(policy.codec, encoder=encoder)
    left_out = dict(replay.left_out)
    if config.algorithm == "kto":
        found = unpaired(found) + replay.ratings(policy.codec, midpoint=config.midpoint)  # type: ignore[arg-type]
        left_out = {name: left_out.get(name, 0) + replay.left_out[name] for name in left_out | replay.left_out}
    kept = [e for e in found if _longest(e, encoder) <= policy.max_length]
    if len(kept) < len(found):
        left_out["rows longer than the model holds"] = len(found) - len(kept)
    if not kept:
        what = "rating, edit or comparison" if config.algorithm == "kto" else "edit or comparison"
        why = "".join(f"; left out: {count} {name}" for name, count in sorted(left_out.items()))
        also = "" if config.algorithm == "kto" else ", or use --algorithm kto if there are ratings"
        raise OperantError(f"the replay is empty: it holds no {what} to learn from{why}; collect feedback first{also}")
    return sorted(kept, key=lambda e: e.time)  # type: ignore[return-value]


def _check_fits(policy: Policy, example: Preference | Rating) -> None:
    """Raises OperantError for an example that the model cannot read."""
    length, prompt = _longest(example, policy.family == "encoder-decoder"), example.prompt
    if max(length, len(prompt.tokens)) > policy.max_length:
        raise OperantError(
            f"the example of prompt {prompt.id!r} has {max(length, len(prompt.tokens))} tokens and the model's context "
            f"{policy.max_length}; shorten it, or load it with too_long='truncate'"
        )
    sides = (example.chosen, example.rejected) if isinstance(example, Preference) else (example.tokens,)
    highest = max(int(row.max()) for row in (prompt.tokens, *sides) if len(row))
    if highest >= policy.vocabulary:
        raise OperantError(
            f"the example of prompt {prompt.id!r} holds the token {highest}, and the model knows 0 to "
            f"{policy.vocabulary - 1}; encode it with the model's own tokenizer"
        )


def _longest(example: Preference | Rating, encoder: bool) -> int:
    sides = (example.chosen, example.rejected) if isinstance(example, Preference) else (example.tokens,)
    return max(map(len, sides)) + (0 if encoder else len(example.prompt.tokens))


def _told(
    config: PreferConfig,
    learned: Sequence[Preference] | Sequence[Rating],
    held_out: Sequence[Preference] | Sequence[Rating],
) -> str:
    if config.algorithm != "kto":
        return f"{len(learned)} pairs to learn from, {len(held_out)} held out"
    good = sum(isinstance(e, Rating) and e.desirable for e in learned)
    bad = len(learned) - good
    told = f"{good} good and {bad} bad completions to learn from, {len(held_out)} held out"
    ratio = config.desirable_weight * good / max(config.undesirable_weight * bad, 1e-9)
    if not 1 <= ratio <= 4 / 3:
        # Ethayarajh et al. 2024, eq. 9
        told += f"; weighted they stand {ratio:.2f} to 1, and between 1 and 1.33 is advised (--undesirable_weight)"
    return told
