"""Held-out measurements: greedy completions under corpus metrics and, if there is one, the reward."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from operant.models.policy import LanguagePolicy
from operant.models.sampler import Sampler
from operant.rewards import RewardRunner, corpus_metrics
from operant.types import Completion, Prompt, Sampling, StreamingReward


def evaluate(
    policy: LanguagePolicy,
    prompts: Sequence[Prompt],
    *,
    sampling: Sampling,
    metrics: Sequence[str] = ("bleu", "chrf", "rougeL", "exact"),
    runner: RewardRunner | None = None,
    stream: StreamingReward | None = None,
    bleu_tokenize: str = "auto",
    max_rows: int = 256,
    progress: Callable[[int], None] | None = None,
) -> tuple[dict[str, float], list[Completion]]:
    """Answer every prompt once and measure the answers.

    Returns ({metric: value}, completions in the prompts' order). BLEU and chrF are on sacrebleu's scale of 0 to 100;
    exact, rougeL and reward are means, the reward before any running normalisation; length is in tokens; distinct2 the
    share of different bigrams. Reference metrics are left out when no prompt has references; a missing reward is left
    out of its mean. stream: a streaming reward to pay while the answers are written, which it does not end: what it
    would have ended is paid what was due by then. bleu_tokenize: one of sacrebleu's tokenizers, or "auto" for what the
    references are written in.
    """
    sampler = Sampler(policy, max_rows=max_rows, audit_fraction=1.0)
    completions = [group[0] for group in sampler.sample(prompts, sampling, stream=stream, progress=progress)]
    values: dict[str, float] = {}
    judged = [(p, c) for p, c in zip(prompts, completions, strict=True) if p.references]
    if judged:
        references = [list(p.references) for p, _ in judged]
        tokenize = bleu_tokenizer(references) if bleu_tokenize == "auto" else bleu_tokenize
        values.update(corpus_metrics([c.text for _, c in judged], references, names=tuple(metrics), tokenize=tokenize))
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


def distinct(rows: Sequence[np.ndarray], n: int = 2) -> float:
    """Different n-grams of tokens over all of them (Li et al. 2016); 1 when there are none."""
    grams = [tuple(row[i : i + n].tolist()) for row in rows for i in range(len(row) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0
