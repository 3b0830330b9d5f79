"""Held-out measurements: greedy completions under corpus metrics and, if there is one, the reward."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from operant.rewards import RewardRunner, corpus_metrics
from operant.types import Completion, Ints, Prompt, SamplerProtocol, Sampling


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
