"""Held-out measurements: greedy completions under corpus metrics and, if there is one, the reward."""

from __future__ import annotations

import json
import math
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from operant.config import EvalConfig, SampleConfig
from operant.data.prompts import PromptFormat, load_fitting_prompts, settle_style
from operant.data.rows import first_split, load_rows
from operant.models.policy import Policy
from operant.models.sampler import Sampler
from operant.rewards import RewardRunner, corpus_metrics
from operant.run.run import model_in_words
from operant.types import Completion, Ints, OperantError, Prompt, SamplerProtocol, Sampling

FEWEST_PROMPTS = 5  # different ones, of which the share of the commonest answer says something


def evaluate(
    sampler: SamplerProtocol,
    prompts: Sequence[Prompt],
    *,
    sampling: Sampling,
    metrics: Sequence[str] = ("bleu", "chrf", "rougeL", "exact"),
    runner: RewardRunner | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[dict[str, float], list[Completion]]:
    """Answer every prompt once and measure the answers.

    sampler: what answers; nothing else may be under way in it. metrics: names of corpus metrics, computed where prompts
    have references. runner: the reward; a streaming one is paid while the answers are written, and ends none of them:
    what it would have ended is paid what was due by then. progress: called with how many answers just finished.

    Returns ({metric: value}, completions in the prompts' order). BLEU and chrF are on sacrebleu's scale of 0 to 100.
    exact, rougeL and reward are means, the reward before any running normalisation. length is in tokens, distinct2 the
    share of different bigrams. Reference metrics are left out when no prompt has references; a missing reward is left
    out of its mean.

    Raises OperantError when a prompt is empty or too long for the model, for an unknown metric, and when the reward's
    worker processes cannot be started.
    """
    stream = None if runner is None else runner.stream
    groups = sampler.sample(prompts, sampling, stream=stream, audit_fraction=1.0, progress=progress)
    completions = [group[0] for group in groups]
    values: dict[str, float] = {}
    referenced = [(p, c) for p, c in zip(prompts, completions, strict=True) if p.references]
    if referenced:
        texts, references = [c.text for _, c in referenced], [list(p.references) for p, _ in referenced]
        tokenize = bleu_tokenizer(references)
        values.update(corpus_metrics(texts, references, names=tuple(metrics), tokenize=tokenize))
    if runner is not None:
        trajectories = runner.run(list(zip(prompts, completions, strict=True)), update=False, scaled=False)
        seen = [float(t.rewards.sum()) for t in trajectories if t.observed.all()]
        values["reward"] = float(np.mean(seen)) if seen else math.nan
        values["reward_missing"] = float(len(trajectories) - len(seen))
    values["length"] = float(np.mean([len(c.tokens) for c in completions]))
    values["truncated"] = float(np.mean([c.truncated for c in completions]))
    if "distinct2" not in values:
        values["distinct2"] = distinct([c.tokens for c in completions])
    return values, completions


def evaluate_from(
    config: EvalConfig,
    progress: Callable[[int, int], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> dict[str, float]:
    """Measure a model as `config` says: {metric: value} of its answers to the prompts of `data`, as of `evaluate`.

    Of a folder or hub data set it takes the test split; the dev split where there is no test split. With
    `config.samples` the answers are written there, a row of JSON each. progress: called with (prompts answered, prompts
    in all). note: called before the first answer with what is measured: rows, split, parameters, device, dtype; and
    before that where prompts are written otherwise than the model was trained.

    Raises OperantError when no model or data is named, for what cannot be loaded or written, and for metrics that need
    references where no row has any.
    """
    if not config.model:
        raise OperantError("--model is missing; give a model folder or hub id")
    if not config.data:
        raise OperantError("--data is missing; give prompts with references")
    # unlike Path.is_dir, this is False also for a folder that may not be reached
    if config.samples and not os.path.isdir(Path(config.samples).absolute().parent):
        raise OperantError(f"{Path(config.samples).parent} is no folder to write to; choose another --samples")
    split = first_split(config.data, "test", "dev")
    rows = load_rows(config.data, split=split or "test", limit=config.limit)
    policy = Policy.load(config.model, device=config.device, dtype=config.dtype)
    policy.model.eval()
    for departure in settle_style(policy, config):
        if note is not None:
            note(departure)
    prompts = load_fitting_prompts(rows, policy, config, room=config.max_tokens)
    if config.metrics and not any(prompt.references for prompt in prompts):
        raise OperantError(
            f"no row of {config.data} has references to measure {', '.join(config.metrics)} by; "
            "choose with --reference_field, or give --metrics []"
        )
    if note is not None:
        part = f"{len(prompts):,} rows of {f'the {split} split of ' * bool(split)}{config.data}"
        bare = sum(not prompt.references for prompt in prompts) if config.metrics else 0
        left_out = f" ({bare} without references, which count in no metric that needs them)" if bare else ""
        note(f"eval: {part}{left_out}; {model_in_words(policy, policy.dtype)}")
    answered = 0

    def tell(more: int) -> None:
        nonlocal answered
        answered += more
        if progress is not None:
            progress(answered, len(prompts))

    sampling = Sampling(
        temperature=config.temperature, max_tokens=config.max_tokens, seed=config.seed, stop=tuple(config.stop)
    )
    values, completions = evaluate(
        Sampler(policy, max_rows=config.max_rows), prompts, sampling=sampling, metrics=config.metrics, progress=tell
    )
    if config.samples:
        _write_samples(config.samples, prompts, completions)
    return values


def _write_samples(path: str, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> None:
    try:
        with open(path, "w", encoding="utf-8") as file:
            for prompt, completion in zip(prompts, completions, strict=True):
                row = {"prompt": prompt.text, "completion": completion.text, "references": list(prompt.references)}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    except OSError as error:
        raise OperantError(f"cannot write {path} ({error.strerror}); choose another --samples") from error


def sample_from(
    config: SampleConfig, texts: Iterable[str], note: Callable[[str], None] | None = None
) -> Iterator[tuple[Prompt, Completion]]:
    """Each text as a prompt, with each of its `n` completions, as `config` says, in the texts' order.

    texts: read as rows become free; many are answered together. Where `texts.ready()` is there and False, the next one
        would have to be waited for, and what is under way is answered first.
    note: called where prompts are written otherwise than the model was trained.

    Raises OperantError when no model is named, and for a model or prompt that cannot be read.
    """
    if not config.model:
        raise OperantError("--model is missing; give a model folder or hub id")
    policy = Policy.load(config.model, device=config.device, dtype=config.dtype)
    policy.model.eval()
    written = PromptFormat.of(config, encoder=policy.has_encoder)
    for departure in settle_style(policy, config):
        if note is not None:
            note(departure)
    temperature, top_p, top_k = policy.generation.settings(
        config.temperature, config.top_p, config.top_k, chat=written.style(policy.codec).chat
    )
    sampling = Sampling(
        temperature=temperature, top_p=top_p, top_k=top_k, max_tokens=config.max_tokens, stop=tuple(config.stop),
        seed=config.seed,
    )  # fmt: skip
    prompts = (Prompt(id=str(i), text=t, tokens=written.encode(t, policy.codec)) for i, t in enumerate(texts))
    ready = getattr(texts, "ready", lambda: True)
    yield from _answered_in_order(Sampler(policy, max_rows=config.max_rows), prompts, sampling, config.n, ready)


def _answered_in_order(
    sampler: Sampler, prompts: Iterator[Prompt], sampling: Sampling, n: int, ready: Callable[[], bool]
) -> Iterator[tuple[Prompt, Completion]]:
    """Each prompt with each of its n completions, in order, each as soon as it is there and those before it are.

    Raises what `prompts` raises, after all that was asked before it.
    """
    waiting: deque[tuple[Prompt, str]] = deque()
    done: dict[str, Completion] = {}
    fault: OperantError | None = None
    left = True
    while left or waiting:
        while left and len(waiting) < 4 * sampler.max_rows and (not sampler.pending or ready()):
            try:
                prompt = next(prompts, None)
                ids = [] if prompt is None else sampler.submit(prompt, sampling, n)
            except OperantError as error:
                prompt, fault = None, error
            if prompt is None:
                left = False
            else:
                waiting.extend((prompt, name) for name in ids)
        done |= {completion.id: completion for completion in (sampler.step() if sampler.pending else ())}
        while waiting and waiting[0][1] in done:
            asked, name = waiting.popleft()
            yield asked, done.pop(name)
    if fault is not None:
        raise fault


def commonest_share(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> float | None:
    """The share of prompts that get the commonest answer; None where fewer than `FEWEST_PROMPTS` are different."""
    if len({prompt.tokens.tobytes() for prompt in prompts}) < FEWEST_PROMPTS:
        return None
    said = Counter(completion.tokens.tobytes() for completion in completions)
    return max(said.values()) / len(completions)


def bleu_tokenizer(references: Sequence[Sequence[str]]) -> str:
    """sacrebleu's tokenizer for the references' script: ja-mecab with kana, zh with Han characters, 13a otherwise."""
    text = "".join(r for row in references[:200] for r in row)
    if sum("\u3040" <= c <= "\u30ff" for c in text) > len(text) / 20:
        return "ja-mecab"
    return "zh" if sum("\u4e00" <= c <= "\u9fff" for c in text) > len(text) / 4 else "13a"


def distinct(rows: Sequence[Ints], n: int = 2) -> float:
    """Different n-grams over all n-grams (Li et al. 2016, distinct-n); 1 when there are none.

    rows: token ids, int64[T] each.
    """
    grams = [tuple(row[i : i + n].tolist()) for row in rows for i in range(len(row) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0
