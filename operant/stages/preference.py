"""Learning from preferences: DPO, IPO and KTO against the policy as the stage found it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from operant.algorithms.objectives import kto_reference_point, preference_loss
from operant.algorithms.surrogate import full_kl_of
from operant.algorithms.table import ALGORITHMS, nearest
from operant.config import PreferConfig
from operant.data.batch import microbatches, to_device
from operant.data.feedback_log import FeedbackLog, draw_examples
from operant.data.preferences import (
    Preference,
    Rating,
    continues_texts,
    load_preferences,
    load_ratings,
    unpaired,
)
from operant.data.prompts import PromptFormat, settle_style
from operant.data.rows import Fields, Row, held_out_source, load_rows, load_split_rows, split_rows
from operant.models.adapter import adapt
from operant.models.memory import expect_room_to_learn
from operant.models.policy import Policy, resolve_device
from operant.models.sampler import Sampler
from operant.rl.evaluate import commonest_share, evaluate
from operant.run.run import DataOrder, Quiet, Run, as_begun, mixed_seed
from operant.stages.supervised import Measures, StageResult, StageTask, fit
from operant.types import Batch, Completion, Floats, Ints, OperantError, Prompt, Sampling

Examples = Sequence[Preference] | Sequence[Rating]  # pairs, or single completions that are good or bad
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
    def of(cls, examples: Examples) -> Answers:
        """The completions of pairs or of ratings, in their order."""
        pairs = [e for e in examples if isinstance(e, Preference)]
        paired = len(pairs) == len(examples)
        ratings = unpaired(pairs) if paired else [e for e in examples if isinstance(e, Rating)]
        return cls([r.prompt for r in ratings], [r.tokens for r in ratings], [r.desirable for r in ratings], paired)

    def rows(self, examples: Sequence[int]) -> list[int]:
        """The completions of these examples (pairs or ratings)."""
        return [r for i in examples for r in (2 * i, 2 * i + 1)] if self.paired else list(examples)

    def batch(self, policy: Policy, rows: Sequence[int]) -> Batch:
        """A batch of completions, one a row; its denominator is the number of examples in it.

        `ref_logprobs` float32[B, S] are 0 where the reference has not been computed, `is_chosen` is bool[B] and
        `pair_ids`, of pairs, int64[B].
        """
        batch = policy.batch_of_sequences(
            [self.prompts[r].tokens for r in rows], [self.tokens[r] for r in rows], normalisation="per_completion"
        )
        batch.is_chosen = torch.tensor([self.good[r] for r in rows])
        batch.kind, batch.denominator = "labels", float(len(rows))
        if self.paired:
            batch.kind = "pairs"
            batch.pair_ids = torch.arange(len(rows)) // 2
            batch.denominator = len(rows) / 2
        batch.ref_logprobs = torch.zeros(batch.tokens.shape)
        for i, r in enumerate(rows):
            reference = self.reference[r]
            if reference is not None:
                start = 0 if policy.has_encoder else len(self.prompts[r].tokens)
                batch.ref_logprobs[i, start : start + len(reference)] = torch.from_numpy(reference)
        return batch

    @torch.no_grad()
    def score(self, policy: Policy, rows: Sequence[int], max_tokens: int) -> None:
        """Note the log-probs of these completions under the policy as it is now, which is the reference."""
        # which completions are computed together depends on no one's needs: rounding differs between batches, and a
        # run that is resumed with more steps needs more of them
        ordered = sorted(range(len(self.tokens)), key=lambda r: (self._length(r), r))
        needed, start = set(rows), 0
        while start < len(ordered):
            stop = start + 1
            while stop < len(ordered) and self._length(ordered[stop]) * (stop + 1 - start) <= max_tokens:
                stop += 1
            chunk, start = ordered[start:stop], stop
            if needed.isdisjoint(chunk):
                continue
            logprobs = policy.logprobs(to_device(self.batch(policy, chunk), policy.device)).logprobs.cpu().numpy()
            for i, r in enumerate(chunk):
                first = 0 if policy.has_encoder else len(self.prompts[r].tokens)
                self.reference[r] = logprobs[i, first : first + len(self.tokens[r])].astype(np.float32)

    def _length(self, row: int) -> int:
        return len(self.prompts[row].tokens) + len(self.tokens[row])

    @property
    def has_several_prompts(self) -> bool:
        """Whether the completions belong to two different prompts at least."""
        return len({prompt.tokens.tobytes() for prompt in self.prompts}) > 1

    def mismatched(self, policy: Policy, seed: int) -> Answers:
        """Each prompt with the completion of another one, for KTO's reference point: the next in an order keyed by the
        seed whose prompt is another. It belongs to the row for the whole run, so its reference is computed once.

        Raises OperantError when all prompts are the same.
        """
        if not self.has_several_prompts:
            raise OperantError(
                "kto estimates its reference point from completions of other prompts, and all rows have the same "
                "prompt; give rows with several, or pairs and --algorithm dpo"
            )
        keys = [prompt.tokens.tobytes() for prompt in self.prompts]
        count = len(keys)
        order = np.random.default_rng(mixed_seed(seed, "strangers")).permutation(count).tolist()
        partner = [0] * count
        for place, row in enumerate(order):
            ahead = (order[(place + k) % count] for k in range(1, count))
            partner[row] = next(other for other in ahead if keys[other] != keys[row])
        room = policy.max_length
        tokens = []
        for row, other in enumerate(partner):
            taken = 0 if policy.has_encoder else len(self.prompts[row].tokens)
            tokens.append(self.tokens[other][: max(1, room - taken)])
        return Answers(self.prompts, tokens, self.good, paired=False)


def prefer(
    config: PreferConfig,
    *,
    policy: Policy | None = None,
    examples: Examples | None = None,
    dev_examples: Examples | None = None,
    replay: FeedbackLog | None = None,
    quiet: Quiet = False,
) -> StageResult[Policy]:
    """Learn from preferences until the held-out loss stops improving. What is not given is loaded as `config` says.

    The reference is the policy as it comes in; its log-probs are computed once, before the first step. DPO and IPO take
    pairs; KTO takes ratings, and pairs as two ratings each. With `replay`, a feedback log, batches are drawn from it.
    Dropout is off.

    Raises OperantError for an unknown algorithm, settings that it has no use for, missing or empty data, an empty
    feedback log, and ratings where pairs are needed.
    """
    _check_algorithm(config)
    config = as_begun(config)
    kept = {"logprob": "mean" if loss_settings(config)["mean"] else "sum"}
    if policy is None:
        if not config.model:
            raise OperantError("--model is missing; give a model folder or hub id to start from")
        expect_room_to_learn(config.model, config.lora_rank, config.dtype, resolve_device(config.device))
        policy = Policy.load(config.model, device=config.device, dtype=config.dtype)
        adapt(policy, config, config.seed)
    rows, dev_rows = _rows(config, replay) if examples is None else ([], [])
    if config.chat == "auto" and continues_texts(rows, _fields(config)):
        config = dataclasses.replace(config, chat=False, separator=config.separator or "")
    notes = settle_style(policy, config) if examples is None else []
    kept |= dataclasses.asdict(PromptFormat.of(config).style(policy.codec))
    with Run(config, "prefer", in_force=kept, quiet=quiet) as run:
        for note in notes:
            run.note(note)
        policy.model.eval()
        drawn = examples is None and (replay is not None or config.replay is not None)
        given, from_elsewhere = examples, dev_examples
        if examples is None:
            examples, loaded = _loaded(config, policy, replay, rows, dev_rows)
            dev_examples = loaded if dev_examples is None else dev_examples
        learned = _as_needed(config, examples)
        if not learned:
            raise OperantError("there are no preferences to learn from; check --data and --limit")
        held_out = _as_needed(config, dev_examples or [])
        for example in (*learned, *held_out):
            _check_fits(policy, example)
        task = PreferenceTask(policy, config, learned, held_out, _picked(config, learned, drawn))
        source = _source(config, replay) if given is None and from_elsewhere is None else ""
        run.takes(_counted(config, learned), len(learned), len(held_out), source, given=given or ())
        return fit(run, policy, task, config)


def _picked(config: PreferConfig, learned: Examples, drawn: bool) -> Callable[[int], list[int]]:
    """step → its examples: epoch after epoch, or drawn by their age."""
    per_step = min(config.batch_size, len(learned))
    if not drawn:
        return DataOrder(len(learned), per_step, config.seed, "preferences").take
    times = [example.time for example in learned]
    return lambda step: draw_examples(times, per_step, seed=config.seed, step=step, half_life=3600 * config.half_life)


def _check_algorithm(config: PreferConfig) -> None:
    """Raises OperantError, by name, for what the algorithm has no use for."""
    name = config.algorithm
    if name not in METHODS:
        raise OperantError(
            f"{name!r} does not learn from preferences{nearest(name, list(METHODS))} (there are: {', '.join(METHODS)})"
        )
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


class PreferenceTask(StageTask):
    """DPO, IPO or KTO against the policy as it is when the task is made: the reference's log-probs are computed then.

    pick: the examples of a step, a function of the step alone. Without held-out examples nothing is measured.

    Raises OperantError for KTO where all prompts are the same.
    """

    dropout = False
    only_sound = True  # pairs can be told apart, and held-out ones too, by a policy whose texts are garbage

    def __init__(
        self,
        policy: Policy,
        config: PreferConfig,
        learned: Examples,
        held_out: Examples,
        pick: Callable[[int], list[int]],
    ) -> None:
        self.policy, self.config, self.pick, self.patience = policy, config, pick, config.patience
        self.point = 0.0  # KTO's z₀ of the step that is being taken
        kto = config.algorithm == "kto"
        needed = sorted({i for step in range(config.steps) for i in pick(step)})
        self.answers = Answers.of(learned)
        self.mismatched = self.answers.mismatched(policy, config.seed) if kto else None
        self._score(self.answers, self.answers.rows(needed))
        self._score(self.mismatched, needed)
        self.held_out = Answers.of(held_out) if held_out else None
        self.asked = answerable(policy, self.held_out.prompts)[: config.eval_prompts] if self.held_out else []
        self.said: list[Completion] = []
        self.held_out_mismatched = None
        if self.held_out is not None:
            if kto and self.held_out.has_several_prompts:
                self.held_out_mismatched = self.held_out.mismatched(policy, config.seed)
            rows = range(len(self.held_out.tokens))
            self._score(self.held_out, rows)
            self._score(self.held_out_mismatched, rows)
            if config.measure_kl:
                policy.freeze_reference()

    def _score(self, answers: Answers | None, rows: Sequence[int]) -> None:
        if answers is not None:
            answers.score(self.policy, rows, self.config.tokens_per_microbatch)

    def _pieces(self, answers: Answers, rows: Sequence[int]) -> Iterator[Batch]:
        for piece in microbatches(answers.batch(self.policy, rows), self.config.tokens_per_microbatch):
            yield to_device(piece, self.policy.device)

    @torch.no_grad()
    def _reference_point(self, mismatched: Answers | None, rows: Sequence[int]) -> float:
        """KTO's z₀ over these rows, under the policy as it is now: one number for the whole optimizer step."""
        if mismatched is None:
            return 0.0
        parts = []
        for micro in self._pieces(mismatched, rows):
            assert micro.ref_logprobs is not None
            parts.append(torch.stack([self.policy.logprobs(micro).logprobs.sum(1), micro.ref_logprobs.sum(1)]))
        logprobs, reference = torch.cat(parts, 1)
        return float(kto_reference_point(logprobs, reference))

    def batches(self, step: int) -> list[Batch]:
        chosen = self.pick(step)
        self.point = self._reference_point(self.mismatched, chosen)
        batch = self.answers.batch(self.policy, self.answers.rows(chosen))
        return list(microbatches(batch, self.config.tokens_per_microbatch))

    def loss(self, model: Policy, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        token_loss, stats = preference_loss(
            model.logprobs(batch).logprobs, batch, reference_point=self.point, **loss_settings(self.config)
        )
        if self.mismatched is not None:
            stats["reference_point"] = self.point * stats["count"]
        return token_loss, stats

    @torch.no_grad()
    def measure(self) -> Measures:
        """loss, accuracy and margin per example; nll_good and kl_ref, the KL to the reference, in nats per token.

        Of greedy completions of `eval_prompts` prompts distinct2, length and the share of the commonest answer.
        """
        if self.held_out is None:
            return {}
        self.policy.model.eval()
        rows = range(len(self.held_out.tokens))
        point = self._reference_point(self.held_out_mismatched, rows)
        sums: Measures = {}
        for micro in self._pieces(self.held_out, rows):
            for name, value in self._sums(micro, point).items():
                sums[name] = sums.get(name, 0.0) + float(value)
        measures = {name: sums[name] / sums["count"] for name in ("loss", "accuracy", "margin")}
        if sums["tokens_good"]:
            measures["nll_good"] = sums["nll_good"] / sums["tokens_good"]
        if self.config.measure_kl:
            measures["kl_ref"] = sums["kl_ref"] / sums["tokens"]
        return measures | self._texts()

    def _texts(self) -> Measures:
        """What greedy completions of held-out prompts are like; they are kept for `samples`."""
        if not self.asked:
            return {}
        sampling = Sampling(temperature=0.0, max_tokens=self.config.max_tokens)
        measured, self.said = evaluate(Sampler(self.policy, max_rows=256), self.asked, sampling=sampling)
        found = {name: measured[name] for name in ("distinct2", "length")}
        share = commonest_share(self.asked, self.said)
        return found if share is None else found | {"commonest": share}

    def samples(self) -> list[dict[str, Any]]:
        return [
            {"prompt": prompt.text, "text": completion.text, "stop_reason": completion.stop_reason}
            for prompt, completion in zip(self.asked, self.said)
        ][:4]

    def _sums(self, micro: Batch, point: float) -> dict[str, Tensor]:
        assert micro.is_chosen is not None
        logprobs = self.policy.logprobs(micro).logprobs
        token_loss, sums = preference_loss(logprobs, micro, reference_point=point, **loss_settings(self.config))
        sums |= {
            "loss": (token_loss * micro.weights).sum(),
            "nll_good": -logprobs[micro.is_chosen].sum(),
            "tokens_good": micro.action_mask[micro.is_chosen].sum(),
        }
        if self.config.measure_kl:
            acting = self.policy.acting(micro)
            with self.policy.as_reference():
                reference = self.policy.acting(micro)
            sums["kl_ref"] = full_kl_of(acting, reference).sum()
            sums["tokens"] = micro.action_mask.sum()
        return sums


# -- examples


def answerable(policy: Policy, prompts: Sequence[Prompt]) -> list[Prompt]:
    """Each of the prompts once, without those that leave no token for an answer."""
    longest = policy.max_length if policy.has_encoder else policy.max_length - 1
    each = {prompt.tokens.tobytes(): prompt for prompt in prompts}
    return [prompt for prompt in each.values() if 0 < len(prompt.tokens) <= longest]


def _as_needed(config: PreferConfig, examples: Examples) -> Examples:
    """Pairs where the table says that they are needed, ratings elsewhere."""
    pairs = [e for e in examples if isinstance(e, Preference)]
    if ALGORITHMS[config.algorithm].pairs:
        if len(pairs) < len(examples):
            raise OperantError(f"{config.algorithm} learns from pairs, and ratings are given; use --algorithm kto")
        return pairs
    return unpaired(pairs) + [e for e in examples if isinstance(e, Rating)]


def _fields(config: PreferConfig) -> Fields:
    return Fields(
        prompt=config.prompt_field, completion=config.completion_field, chosen=config.chosen_field,
        rejected=config.rejected_field, label=config.label_field,
    )  # fmt: skip


def _rows(config: PreferConfig, replay: FeedbackLog | None) -> tuple[list[Row], list[Row]]:
    """(rows to learn from, none with a feedback log, and held-out rows)."""
    if replay is not None or config.replay is not None:
        return [], load_rows(config.dev_data, split="dev", limit=500) if config.dev_data else []
    if not config.data:
        raise OperantError("--data is missing; give pairs, edits or ratings, or --replay with a file of feedback")
    return load_split_rows(config.data, config.dev_data, config.limit, 0.1, 500)


def _loaded(
    config: PreferConfig, policy: Policy, replay: FeedbackLog | None, rows: list[Row], dev_rows: list[Row]
) -> tuple[Examples, Examples]:
    """(what to learn from, what is held out), of the rows and, if there is one, of the feedback log."""

    def read(rows: list[Row]) -> Examples:
        load = load_ratings if config.algorithm == "kto" else load_preferences
        return load(
            rows, policy.codec, _fields(config), PromptFormat.fitting(policy, config), max_tokens=policy.max_length
        ) if rows else []  # fmt: skip

    if replay is None and config.replay is None:
        return read(rows), read(dev_rows)
    found = _from_log(config, policy, replay if replay is not None else read_feedback_log(str(config.replay)))
    if config.dev_data:
        return found, read(dev_rows)
    # the newest are held out: they say whether what was learned from the past foretells the future
    return split_rows(found, 0.1, 500)  # type: ignore[return-value]


def read_feedback_log(path: str) -> FeedbackLog:
    """The feedback log in a file. Raises OperantError when it cannot be read."""
    try:
        with Path(path).expanduser().open(encoding="utf-8", newline="\n") as lines:
            return FeedbackLog.from_lines(lines)
    except (OSError, UnicodeDecodeError) as error:
        raise OperantError(f"the feedback log {path} cannot be read ({error}); give a file of feedback") from error


def _from_log(config: PreferConfig, policy: Policy, log: FeedbackLog) -> list[Preference] | list[Rating]:
    encoder = policy.has_encoder
    found: list[Preference] | list[Rating] = log.preferences(policy.codec, encoder=encoder)
    left_out = dict(log.left_out)
    if config.algorithm == "kto":
        found = unpaired(found) + log.ratings(policy.codec, midpoint=config.midpoint)  # type: ignore[arg-type]
        left_out = {name: left_out.get(name, 0) + log.left_out[name] for name in left_out | log.left_out}
    kept = [e for e in found if _longest(e, encoder) <= policy.max_length]
    if len(kept) < len(found):
        left_out["rows longer than the model holds"] = len(found) - len(kept)
    if not kept:
        what = "rating, edit or comparison" if config.algorithm == "kto" else "edit or comparison"
        why = "".join(f"; left out: {count} {name}" for name, count in sorted(left_out.items()))
        also = "" if config.algorithm == "kto" else ", or use --algorithm kto if there are ratings"
        raise OperantError(
            f"the feedback log is empty: it holds no {what} to learn from{why}; collect feedback first{also}"
        )
    return sorted(kept, key=lambda e: e.time)  # type: ignore[return-value]


def _check_fits(policy: Policy, example: Preference | Rating) -> None:
    """Raises OperantError for an example that the model cannot read."""
    length, prompt = _longest(example, policy.has_encoder), example.prompt
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


def _source(config: PreferConfig, replay: FeedbackLog | None) -> str:
    """Where `_loaded` takes the held-out rows from, in words."""
    if replay is None and config.replay is None:
        return held_out_source(config.data, config.dev_data)
    return held_out_source("", config.dev_data) if config.dev_data else "the newest of the log"


def _counted(config: PreferConfig, learned: Examples) -> str:
    """What is learned from, in words; of ratings how many say what, since KTO weighs them."""
    if config.algorithm != "kto":
        return "pairs"
    good = sum(isinstance(e, Rating) and e.desirable for e in learned)
    bad = len(learned) - good
    text = f"completions ({good:,} good, {bad:,} bad"
    ratio = config.desirable_weight * good / max(config.undesirable_weight * bad, 1e-9)
    if not 1 <= ratio <= 4 / 3:
        # Ethayarajh et al. 2024, eq. 9
        text += f"; weighted they stand {ratio:.2f} to 1, and between 1 and 1.33 is advised: --undesirable_weight"
    return f"{text})"
