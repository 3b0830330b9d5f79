"""Preference data: pairs (chosen, rejected), edits read as pairs, and single completions that are good or bad."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from operant.data.chat import Message, read_messages
from operant.data.prompts import Pair, PromptFormat, load_pairs
from operant.data.rows import Fields, Row, cell, find_column, is_chat, is_missing, no_column, text_of
from operant.data.text import Codec
from operant.types import Ints, OperantError, Prompt

__all__ = [
    "Preference", "Rating", "continues_texts", "good_or_bad", "load_preferences", "load_ratings", "reward_of",
    "share_of", "unpaired",
]  # fmt: skip

T = TypeVar("T")

_GOOD = ("true", "yes", "up", "good", "desirable", "1", "+1", "1.0", "👍")
_BAD = ("false", "no", "down", "bad", "undesirable", "0", "-1", "0.0", "-1.0", "👎")


@dataclass(frozen=True, slots=True)
class Preference:
    """Two completions of one prompt, int64[T] each, the first preferred. `time` is when it was said (0: unknown)."""

    prompt: Prompt
    chosen: Ints
    rejected: Ints
    time: float = 0.0


@dataclass(frozen=True, slots=True)
class Rating:
    """One completion, int64[T], that somebody found desirable or not. `time` is when it was said (0: unknown)."""

    prompt: Prompt
    tokens: Ints
    desirable: bool
    time: float = 0.0


def good_or_bad(value: Any) -> bool | None:
    """What a label or a thumb says: true, 1, +1 and up are good, false, 0, −1 and down bad; None is neither."""
    word = str(value).strip().lower()
    return word in _GOOD if word in _GOOD or word in _BAD else None


def share_of(kind: str, value: Any, low: float, high: float) -> float | None:
    """How good a thumb or a score finds a completion, in [0, 1]: a thumb 1 or 0, a score (score − low) / (high − low).

    None for what is neither, for a thumb that says nothing, and for a score outside low to high.
    """
    if kind == "thumb":
        good = good_or_bad(value)
        return None if good is None else float(good)
    if kind != "score":
        return None
    try:
        score = float(value)
    except (TypeError, ValueError):
        return None
    return (score - low) / (high - low) if low <= score <= high else None


def reward_of(kind: str, value: Any, low: float, high: float) -> float | None:
    """What a thumb or a score pays, in [−1, 1]: 2 share − 1, with None for None, and the share that `share_of` has."""
    share = share_of(kind, value, low, high)
    return None if share is None else 2 * share - 1


def unpaired(pairs: Sequence[Preference]) -> list[Rating]:
    """Each pair as two ratings: the chosen completion is desirable, the rejected one is not."""
    out: list[Rating] = []
    for pair in pairs:
        out += [
            Rating(pair.prompt, pair.chosen, True, pair.time),
            Rating(pair.prompt, pair.rejected, False, pair.time),
        ]
    return out


def load_preferences(
    rows: Sequence[Row],
    codec: Codec,
    fields: Fields | None = None,
    prompt_format: PromptFormat | None = None,
    *,
    max_tokens: int | None = None,
    **options: Any,
) -> list[Preference]:
    """Pairs of completions, one a row. An edit is such a pair: the edited text is chosen, the original rejected.

    The columns are `prompt, chosen, rejected` or `prompt, original, edited`, or those that `fields` names; all may be
    texts or chats. Without a prompt column, what both completions begin with is the prompt: the common messages of two
    chats, or of two texts the common words, after which no separator is written.

    Args:
        rows, codec, fields, prompt_format, options: as in `load_prompts`. `too_long` is of completions as well:
            "error", "skip" (leave the pair out) or "truncate" (cut both completions; pairs that are the same afterwards
            are left out).
        max_tokens: the longest completion of an encoder-decoder; of a decoder, prompt and completion together.

    Raises:
        OperantError: there are no pairs in the rows, both texts of a row are the same, the chosen one is empty, a
            value is no text, or a row is too long.
    """
    fields, written = fields or Fields(), dataclasses.replace(prompt_format or PromptFormat(), **options)
    made, implicit = _pair_rows(rows, fields)
    if implicit:  # both go on with a text, which is no message
        written = dataclasses.replace(written, separator="", chat=written.chat is True)
    pairs = load_pairs(made, codec, _made_fields(fields), written)
    out = []
    for chosen, rejected in zip(pairs[::2], pairs[1::2], strict=True):
        sides = [_tokens_within(side, max_tokens, written) for side in (chosen, rejected)]
        if sides[0] is not None and sides[1] is not None and not np.array_equal(sides[0], sides[1]):
            out.append(Preference(_without_references(chosen.prompt), sides[0], sides[1]))
    return _some(out, "pair", max_tokens)


def load_ratings(
    rows: Sequence[Row],
    codec: Codec,
    fields: Fields | None = None,
    prompt_format: PromptFormat | None = None,
    *,
    max_tokens: int | None = None,
    **options: Any,
) -> list[Rating]:
    """Completions that are each good or bad. Rows of pairs (see `load_preferences`) give two each.

    The columns are `prompt, completion, label` or those that `fields` names; a label is true or false, 1 or 0, +1 or
    −1, up or down. The arguments are those of `load_preferences`.

    Raises:
        OperantError: there are neither labels nor pairs, a label is neither good nor bad, a desirable completion is
            empty, a value is no text, or a row is too long.
    """
    fields, written = fields or Fields(), dataclasses.replace(prompt_format or PromptFormat(), **options)
    if not rows:
        raise OperantError("there are no rows: give data with at least one row")
    label = find_column(rows, "label", fields.label)
    answer = find_column(rows, "completion", fields.completion, "--completion_field")
    if label is None or answer is None:
        if all(find_column(rows, side, getattr(fields, side)) is not None for side in ("chosen", "rejected")):
            return unpaired(load_preferences(rows, codec, fields, written, max_tokens=max_tokens))
        missing, flag = ("label", "--label_field") if label is None else ("completion", "--completion_field")
        raise OperantError(no_column(rows, missing, missing, flag))
    made = _rated_rows(rows, _prompt_column(rows, fields), answer, label)
    out = []
    for pair in load_pairs(made, codec, _made_fields(fields), written):
        tokens = _tokens_within(pair, max_tokens, written)
        if tokens is not None:
            out.append(Rating(_without_references(pair.prompt), tokens, bool(pair.prompt.meta["desirable"])))
    return _some(out, "completion", max_tokens)


# -- rows


def continues_texts(rows: Sequence[Row], fields: Fields) -> bool:
    """Whether the prompts of pairs are what both completions begin with, so that they go on with a text."""
    chosen = find_column(rows, "chosen", fields.chosen)
    if chosen is None or _prompt_column(rows, fields) is not None:
        return False
    return any(isinstance(cell(row, chosen), str) for row in rows)


def _pair_rows(rows: Sequence[Row], fields: Fields) -> tuple[list[Row], bool]:
    """(rows with `prompt` and `completion`: [chosen, rejected], whether the prompts are part of the texts)."""
    if not rows:
        raise OperantError("there are no rows: give data with at least one row")
    chosen, rejected = (find_column(rows, side, getattr(fields, side)) for side in ("chosen", "rejected"))
    if chosen is None or rejected is None:
        single = find_column(rows, "label", fields.label) is not None
        missing = "chosen" if chosen is None else "rejected"
        hint = "; single ratings are learned with --algorithm kto" if single else ""
        raise OperantError(f"a preference needs pairs, and {no_column(rows, missing, missing)}{hint}")
    prompt = _prompt_column(rows, fields)
    made: list[Row] = []
    same: list[int] = []
    implicit = False
    for number, row in enumerate(rows, start=1):
        before, good = _answer(cell(row, chosen), chosen, number)
        before_rejected, bad = _answer(cell(row, rejected), rejected, number)
        if before != before_rejected:
            raise OperantError(
                f"row {number} continues two different chats in {chosen!r} and {rejected!r}: both must answer the same"
            )
        if good == bad:
            same.append(number)
            continue
        asked: Any
        if before:
            asked = list(before)
        elif prompt is None and isinstance(cell(row, chosen), str):
            implicit = True
            cut = _common_words(good, bad)
            asked, good, bad = good[:cut], good[cut:], bad[cut:]
            if not asked.strip():
                raise OperantError(
                    f"row {number} has no prompt: {chosen!r} and {rejected!r} begin with different words; "
                    "add a column prompt, or choose one with --prompt_field"
                )
        else:
            asked = _asked(row, prompt, number)
        _not_empty(good, chosen, number)
        made.append(_others(row, (prompt, chosen, rejected)) | {"prompt": asked, "completion": [good, bad]})
    if same:
        raise OperantError(
            f"{len(same)} of {len(rows)} rows have the same text in {chosen!r} and {rejected!r} (the first is row "
            f"{same[0]}): a preference needs two different completions; remove those rows"
        )
    return made, implicit


def _rated_rows(rows: Sequence[Row], prompt: str | None, answer: str, label: str) -> list[Row]:
    """Rows with `prompt`, `completion` and `desirable`: each has its label, since rows may be left out later."""
    made: list[Row] = []
    for number, row in enumerate(rows, start=1):
        history, text = _answer(cell(row, answer), answer, number)
        good = _read_label(cell(row, label), label, number)
        if good:
            _not_empty(text, answer, number)
        asked = list(history) if history else _asked(row, prompt, number)
        made.append(_others(row, (prompt, answer, label)) | {"prompt": asked, "completion": text, "desirable": good})
    return made


def _made_fields(fields: Fields) -> Fields:
    """The columns of the rows that `_pair_rows` and `_rated_rows` make."""
    return Fields(prompt="prompt", completion="completion", id=fields.id)


def _prompt_column(rows: Sequence[Row], fields: Fields) -> str | None:
    given = find_column(rows, "prompt", fields.prompt)
    return given if given is not None else find_column(rows, "messages", fields.messages)


def _asked(row: Row, prompt: str | None, number: int) -> Any:
    if prompt is None:
        raise OperantError(f"row {number} has no prompt: add a column prompt, or choose one with --prompt_field")
    return cell(row, prompt)


def _answer(value: Any, column: str, number: int) -> tuple[tuple[Message, ...], str]:
    """(messages before the answer, the answer): of a chat, its last message, which must be the assistant's."""
    if not is_chat(value):
        return (), text_of(value, column, number)
    turns = read_messages(value, f"row {number}, column {column!r}")
    if turns[-1]["role"] != "assistant":
        raise OperantError(
            f"row {number} has a chat in {column!r} that does not end with the assistant's message: add the answer"
        )
    if turns[-1].get("tool_calls"):
        raise OperantError(f"row {number} has tool calls as an answer in {column!r}: a preference is of texts")
    return tuple(turns[:-1]), turns[-1]["content"]


def _common_words(left: str, right: str) -> int:
    """How many characters both texts begin with, back to the last space: a word is not cut in two. 0 where what they
    share is the beginning of a word."""
    length = next((i for i, (a, b) in enumerate(zip(left, right)) if a != b), min(len(left), len(right)))
    space = next((i for i in range(length - 1, 0, -1) if left[i].isspace()), None)
    if space is not None:
        return space
    inside = (
        length > 0 and _of_a_word(left[length - 1]) and any(_of_a_word(t[length : length + 1]) for t in (left, right))
    )
    return 0 if inside else length


def _of_a_word(character: str) -> bool:
    """A letter or digit of a script that puts spaces between its words; before the Chinese and Japanese ones."""
    return character.isalnum() and character < "\u2e80"


def _not_empty(text: str, column: str, number: int) -> None:
    if not text.strip():
        raise OperantError(
            f"row {number} has an empty text in the column {column!r}, which would teach the policy to say nothing: "
            "mend or remove the row"
        )


def _read_label(value: Any, column: str, number: int) -> bool:
    good = good_or_bad(value)
    if good is None:
        word = str(value).strip()
        found = "nothing" if not word or is_missing(value) else repr(value)[:40]
        raise OperantError(
            f"row {number} has {found} in the column {column!r}, which is neither good nor bad: give true or false "
            "(or 1 and 0, up and down)"
        )
    return good


def _others(row: Row, used: Sequence[str | None]) -> Row:
    """The columns that say nothing of prompt and completions; they end in the prompt's `meta`."""
    taken = {name.split(".")[0] for name in used if name} | {
        "prompt", "messages", "completion", "references", "reference",
    }  # fmt: skip
    return {name: value for name, value in row.items() if name not in taken}


# -- lengths


def _tokens_within(pair: Pair, limit: int | None, written: PromptFormat) -> Ints | None:
    """The completion's tokens, int64[T], cut if they may be; None where the row is to be left out."""
    before = 0 if written.encoder else len(pair.prompt.tokens)
    if limit is None or before + len(pair.completion_tokens) <= limit:
        return pair.completion_tokens
    if written.too_long == "error":
        raise OperantError(
            f"row {pair.prompt.id} has {before + len(pair.completion_tokens)} tokens and the model holds {limit}; "
            "use --too_long skip or truncate"
        )
    return pair.completion_tokens[: limit - before] if written.too_long == "truncate" and limit > before else None


def _some(items: list[T], what: str, limit: int | None) -> list[T]:
    if not items:
        raise OperantError(f"every {what} is longer than {limit} tokens: give shorter texts, or --too_long truncate")
    return items


def _without_references(prompt: Prompt) -> Prompt:
    return dataclasses.replace(prompt, references=())
