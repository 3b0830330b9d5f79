"""Rewards of completions that are already in a file."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from operant.config import ScoreConfig
from operant.data.chat import read_messages
from operant.data.rows import cell, first_split, is_chat, is_missing, load_rows, text_of, texts_of
from operant.data.text import Codec
from operant.rewards.names import check_references, reward_by_name
from operant.rewards.runner import RewardRunner
from operant.types import Completion, Ints, OperantError, Prompt

# without a tokenizer a token is a word with the space before it; scripts without spaces go by character
WORD = re.compile(
    r"\s*(?:[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\s\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+)|\s+$"
)
PIECE = 256  # rows rewarded together


def score(config: ScoreConfig, note: Callable[[str], None] | None = None) -> Iterator[dict[str, Any]]:
    """One dict a row of `config.data`: id, completion, reward (None when missing, with `missing` saying why), parts of
    a combined reward, and with `dense` the tokens' texts and their `rewards`, which sum to reward − reward of ''.

    Of a folder or hub data set it takes the test split; without one the dev split, and without that the train split.
    note: called once, before the first row, with which split that is.

    Raises OperantError for missing data or fields, an unknown reward, and references that the reward needs.
    """
    if not config.data:
        raise OperantError("--data is missing; give rows with prompt, completion and references")
    reward = reward_by_name(
        config.reward,
        dense=config.dense or None,
        potential=config.potential if config.dense and config.potential != "auto" else None,
    )
    split = first_split(config.data, "test", "dev", "train")
    rows = load_rows(config.data, split=split or "train", limit=config.limit)
    codec = Codec.load(config.tokenizer) if config.tokenizer else None
    pairs = [_read_row(number, row, config, codec) for number, row in enumerate(rows)]
    check_references(reward, [prompt for prompt, _, _ in pairs])
    if split and note is not None:
        note(f"score: {len(rows):,} rows of the {split} split of {config.data}")
    with RewardRunner(reward, time_limit=config.reward_seconds) as runner:
        for start in range(0, len(pairs), PIECE):
            piece = pairs[start : start + PIECE]
            trajectories = runner.run([(prompt, completion) for prompt, completion, _ in piece], update=False)
            for (prompt, completion, texts), trajectory in zip(piece, trajectories, strict=True):
                seen = bool(trajectory.observed.all()) and trajectory.missing is None
                total = float(trajectory.rewards.sum()) if seen else None
                out: dict[str, Any] = {"id": prompt.id, "completion": completion.text, "reward": total}
                if len(trajectory.parts) > 1:
                    out["parts"] = trajectory.parts
                if config.dense:
                    out["tokens"] = texts
                    out["rewards"] = [
                        float(r) if o else None for r, o in zip(trajectory.rewards, trajectory.observed, strict=True)
                    ]
                    if seen and len(getattr(reward, "potentials", [])):
                        out["reward"] = float(reward.measure(completion.text, prompt.references))
                if trajectory.missing:
                    out["missing"] = trajectory.missing
                yield out


def _read_row(
    number: int, row: dict[str, Any], config: ScoreConfig, codec: Codec | None
) -> tuple[Prompt, Completion, list[str]]:
    """A row as a prompt, its completion, and the texts of the completion's tokens."""
    text = _column(
        row, config.completion_field, ("completion", "hypothesis", "output", "response"), "completion_field", number
    )
    if not isinstance(text, str):
        what = "missing" if is_missing(text) else f"{type(text).__name__}, not text"
        raise OperantError(f"row {number + 1}: the completion is {what}; mend the row, or choose --completion_field")
    question = (
        _column(row, config.prompt_field, (), "prompt_field", number) if config.prompt_field else row.get("prompt", "")
    )
    given = row.get(config.reference_field) if config.reference_field else row.get("references", row.get("reference"))
    if config.reference_field and config.reference_field not in row:
        _column(row, config.reference_field, (), "reference_field", number)
    references = texts_of(given, config.reference_field or "references", number + 1)
    name = next((str(row[key]) for key in ("id", "idx") if not is_missing(row.get(key))), str(number))
    if isinstance(row.get("tokens"), list) and all(isinstance(t, str) for t in row["tokens"]):
        pieces = list(row["tokens"])
        if "".join(pieces) != text:
            raise OperantError(f"row {number + 1}: its tokens do not spell its completion; leave `tokens` out")
        tokens, ends = np.arange(len(pieces), dtype=np.int64), _ends(pieces)
    elif codec is not None:
        tokens = codec.encode(text)
        text, ends = codec.text_and_ends(tokens)
        pieces = [text[a:b] for a, b in zip([0, *ends.tolist()], ends.tolist(), strict=False)]
    else:
        pieces = WORD.findall(text)
        tokens, ends = np.arange(len(pieces), dtype=np.int64), _ends(pieces)
    if not len(tokens):  # an empty answer has a reward too; it stands on the end-of-text token
        tokens, ends, pieces = np.zeros(1, np.int64), np.zeros(1, np.int64), [""]
    chat = tuple(read_messages(question, f"row {number + 1}")) if is_chat(question) else None
    asked = "" if is_missing(question) else chat[-1]["content"] if chat else text_of(question, "prompt", number + 1)
    prompt = Prompt(
        id=name, text=asked, messages=chat, tokens=np.zeros(0, np.int64), references=references, meta=row
    )  # fmt: skip
    return prompt, Completion(id=name, prompt_id=name, text=text, tokens=tokens, text_ends=ends), pieces


def _ends(pieces: list[str]) -> Ints:
    return np.cumsum([len(p) for p in pieces], dtype=np.int64)


def _column(row: dict[str, Any], given: str | None, usual: tuple[str, ...], flag: str, number: int) -> Any:
    import difflib

    names = (given,) if given else usual
    for name in names:
        if name in row:
            return cell(row, name)
    close = difflib.get_close_matches(str(names[0]), list(row), n=1)
    hint = f"; did you mean --{flag} {close[0]}?" if close else f"; choose with --{flag}"
    raise OperantError(f"row {number + 1} has no field {names[0]!r} (its fields: {', '.join(row)}){hint}")
