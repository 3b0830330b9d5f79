"""From rows to prompts, pairs and texts, as the ids that a policy reads."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from operant.config import PairFields
from operant.data.rows import (
    ABSENT,
    Fields,
    Row,
    cell,
    columns_of,
    find_column,
    is_chat,
    is_missing,
    no_column,
    text_of,
    texts_of,
)
from operant.data.text import Codec
from operant.types import Ints, OperantError, Prompt

__all__ = [
    "Pair", "PromptFormat", "PromptReader", "TooLong", "load_fitting_pairs", "load_fitting_prompts", "load_pairs",
    "load_prompts", "load_texts", "row_ids", "truncated",
]  # fmt: skip

TooLong = Literal["error", "skip", "truncate"]


class PromptReader(Protocol):
    """What of a policy says which prompts fit it."""

    @property
    def codec(self) -> Codec:
        """Its tokenizer."""

    @property
    def family(self) -> Literal["decoder", "encoder-decoder"]:
        """Whether it reads prompt and completion as one text, or the prompt by itself."""

    @property
    def max_length(self) -> int:
        """Tokens that its context holds: of a decoder prompt and completion together, else of each."""


class Written(Protocol):
    """What of a configuration says how prompts are written; `max_prompt_tokens` of 0 is what the model can hold."""

    prefix: str
    separator: str
    max_prompt_tokens: int
    too_long: TooLong


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt with the completion to imitate. completion_tokens: int64[T], EOS last (unless it was cut off)."""

    prompt: Prompt
    completion_tokens: Ints
    completion_text: str


@dataclass(frozen=True, slots=True)
class _Question:
    """A row read: what is asked, what may be answered, and the row's other columns."""

    text: str
    messages: tuple[dict[str, str], ...] | None
    completions: tuple[str, ...]
    references: tuple[str, ...]
    meta: dict[str, Any]


def _questions(rows: Sequence[Row], fields: Fields) -> list[_Question]:
    if not rows:
        raise OperantError("there are no rows: give data with at least one row")
    prompt = find_column(rows, "prompt", fields.prompt)
    messages = find_column(rows, "messages", fields.messages)
    if fields.messages is not None and fields.prompt is None:
        prompt = None
    completion = find_column(rows, "completion", fields.completion)
    references = find_column(rows, "references", fields.references)
    if prompt is None and messages is None:
        raise OperantError(no_column(rows, "prompt", "prompt"))
    used = {column.split(".")[0] for column in (prompt, messages, completion, references) if column is not None}
    questions = []
    for number, row in enumerate(rows, start=1):
        asked = cell(row, prompt) if prompt is not None else cell(row, str(messages))
        column = str(prompt if prompt is not None else messages)
        answers = () if completion is None else texts_of(cell(row, completion), completion, number)
        chat: tuple[dict[str, str], ...] | None = None
        text = ""
        if is_chat(asked):
            turns = [{str(key): value for key, value in turn.items() if not is_missing(value)} for turn in asked]
            # The answer to a recorded chat is its last message, which the policy must not see.
            if turns[-1].get("role") == "assistant":
                answers = answers or (text_of(turns[-1].get("content"), column, number),)
                turns = turns[:-1]
            if not turns:
                raise OperantError(f"row {number} has nothing before the assistant's message: add the user's message")
            chat = tuple(turns)
            text = str(turns[-1].get("content", ""))
        else:
            text = text_of(asked, column, number)
        given = () if references is None else texts_of(cell(row, references), references, number)
        # CSV's empty cell is no reference: an empty answer would be right by it
        wanted = tuple(text for text in given if text.strip()) or answers
        meta = {key: value for key, value in row.items() if key not in used}
        questions.append(_Question(text, chat, answers, wanted, meta))
    return questions


def _row_names(rows: Sequence[Row], questions: Sequence[_Question], fields: Fields) -> list[str]:
    """A stable name for each row: its own where all are different, else a hash of its content and its place."""
    if fields.id is not None and all(cell(row, fields.id) is ABSENT for row in rows):
        raise OperantError(no_column(rows, "id", fields.id))
    for column in ("id", "idx") if fields.id is None else (fields.id,):
        values = [cell(row, column) for row in rows]
        if all(isinstance(value, (str, int)) and value != "" for value in values):
            names = [str(value) for value in values]
            if len(set(names)) == len(names):
                return names
    names = []
    for index, question in enumerate(questions):
        content = json.dumps([question.text, question.messages, question.references], ensure_ascii=False, default=str)
        names.append(f"{hashlib.sha256(content.encode('utf-8', 'surrogatepass')).hexdigest()[:12]}-{index}")
    return names


def row_ids(rows: Sequence[Row], fields: Fields | None = None) -> list[str]:
    """The `Prompt.id` of each row, also of those that `load_prompts` leaves out: all different.

    Raises OperantError when there are no rows, a column is missing, or a value is no text.
    """
    fields = fields or Fields()
    return _row_names(rows, _questions(rows, fields), fields)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptFormat:
    """How what is asked becomes the ids that a policy reads.

    prefix: written before each text prompt ("translate English to German: "). `Prompt.text` stays without it.
    separator: written after a decoder's text prompt, so that it can tell where the completion begins. Encoders' prompts
        end with EOS, chats end as their template says.
    encoder: the policy is an encoder-decoder.
    max_prompt_tokens: the longest prompt that the model takes; None sets no limit.
    too_long: "error", "skip" (leave the row out) or "truncate" (a decoder keeps the end of the prompt, an encoder the
        beginning and EOS).
    """

    prefix: str = ""
    separator: str = "\n"
    encoder: bool = False
    max_prompt_tokens: int | None = None
    too_long: TooLong = "error"

    @classmethod
    def fitting(cls, policy: PromptReader, config: Written | None = None, *, room: int = 1) -> PromptFormat:
        """The format of the prompts that a policy can hold, written as `config` says.

        room: tokens of a decoder's context that are left for the completion; an encoder's prompt shares it with none.
        """
        encoder = policy.family == "encoder-decoder"
        longest = policy.max_length if encoder else max(1, policy.max_length - room)
        if config is None:
            return cls(encoder=encoder, max_prompt_tokens=longest)
        return cls(
            prefix=config.prefix, separator=config.separator, encoder=encoder,
            max_prompt_tokens=config.max_prompt_tokens or longest, too_long=config.too_long,
        )  # fmt: skip

    def encode(self, text: str, codec: Codec) -> Ints:
        """The ids of a text prompt, int64[P]: prefix, text and, for a decoder, separator."""
        return codec.encode_prompt(f"{self.prefix}{text}{'' if self.encoder else self.separator}", encoder=self.encoder)


def load_prompts(
    rows: Sequence[Row],
    codec: Codec,
    fields: Fields | None = None,
    prompt_format: PromptFormat | None = None,
    *,
    task: str = "",
    **options: Any,
) -> list[Prompt]:
    """Prompts for the policy, with the references that only rewards and metrics see.

    Args:
        rows: from `load_rows`.
        codec: the policy's tokenizer.
        fields: which columns to read. A prompt is a text or a chat (a list of messages); of a chat that ends with the
            assistant's message, that message is the reference.
        prompt_format: how prompts are written, and the longest one.
        task: `Prompt.task` of all of them.
        options: replace single fields of `prompt_format`: `prefix` (""), `separator` (a newline), `encoder` (False;
            True for an encoder-decoder), `max_prompt_tokens` (None: no limit) and `too_long` ("error", "skip" or
            "truncate").

    Returns:
        One prompt a row, tokens int64[P]. `id` is the row's own id where ids are unique; `meta` holds the row's other
        columns.

    Raises:
        OperantError: a column is missing, a value is no text, or a prompt is too long.
    """
    written = dataclasses.replace(prompt_format or PromptFormat(), **options)
    return [prompt for prompt, _ in _answered(rows, codec, fields or Fields(), written, task)]


def load_fitting_prompts(
    rows: Sequence[Row],
    policy: PromptReader,
    config: PairFields | None = None,
    *,
    room: int = 1,
    **options: Any,
) -> list[Prompt]:
    """The prompts of rows that fit a policy, read and written as `config` says.

    Args:
        rows: from `load_rows`; none give no prompts.
        policy: who is asked.
        config: its columns and its format of prompts; None takes the usual ones.
        room: tokens of a decoder's context that are left for the completion.
        options: those of `load_prompts`, `fields` among them; they replace what `config` says.

    Raises:
        OperantError: a column is missing, a value is no text, or a prompt is too long.
    """
    if not rows:
        return []
    if config is not None:
        options.setdefault("fields", Fields(prompt=config.prompt_field, references=config.reference_field))
    written = PromptFormat.fitting(policy, config, room=room)
    return load_prompts(rows, policy.codec, prompt_format=written, **options)


def _answered(
    rows: Sequence[Row], codec: Codec, fields: Fields, written: PromptFormat, task: str
) -> list[tuple[Prompt, tuple[str, ...]]]:
    """Each row's prompt with the completions that stand beside it, none where its answers are references."""
    questions = _questions(rows, fields)
    made = []
    for question, name in zip(questions, _row_names(rows, questions, fields), strict=True):
        if question.messages is None:
            tokens = written.encode(question.text, codec)
        else:
            tokens = codec.encode_prompt(messages=question.messages, encoder=written.encoder)
        prompt = Prompt(
            id=name, tokens=tokens, text=question.text, messages=question.messages, references=question.references,
            task=task, meta=question.meta,
        )  # fmt: skip
        made.append((prompt, question.completions))
    limit = written.max_prompt_tokens
    if limit is None:
        return made
    _check_lengths("prompt", [len(prompt.tokens) for prompt, _ in made], limit, written.too_long)
    kept = []
    for prompt, completions in made:
        if len(prompt.tokens) > limit:
            if written.too_long == "skip":
                continue
            prompt = truncated(prompt, limit, codec, written.encoder)
        kept.append((prompt, completions))
    return kept


def _check_lengths(what: str, lengths: Sequence[int], limit: int, too_long: TooLong) -> None:
    if too_long not in ("error", "skip", "truncate"):
        near = difflib.get_close_matches(str(too_long), ("error", "skip", "truncate"), n=1, cutoff=0.0)
        raise OperantError(f"too_long {too_long!r} is unknown: did you mean {near[0]!r}?")
    if limit < 1:
        raise OperantError(f"max_{what}_tokens {limit} leaves no room: give at least 1")
    long = sum(length > limit for length in lengths)
    flag = f"--max_prompt_tokens {max(lengths, default=0)} if the model takes it"
    longer = f"give {flag}" if what == "prompt" else "give a model with a longer context"
    if long and too_long == "error":
        raise OperantError(
            f"{long} of {len(lengths)} {what}s are longer than {limit} tokens (the longest has {max(lengths)}):"
            f" {longer}, or --too_long skip or truncate"
        )
    if long == len(lengths) and too_long == "skip":
        raise OperantError(f"every {what} is longer than {limit} tokens: {longer}, or --too_long truncate")


def truncated(prompt: Prompt, limit: int, codec: Codec, encoder: bool) -> Prompt:
    """The prompt with at most `limit` tokens, int64[limit]: its end (and BOS) for a decoder, its beginning and EOS for
    an encoder. `meta` says so: `truncated_prompt`."""
    tokens = prompt.tokens
    if encoder:
        tokens = np.append(tokens[: limit - 1], codec.eos_id)
    elif tokens[0] == codec.bos_id and limit > 1:
        tokens = np.append(tokens[:1], tokens[len(tokens) - limit + 1 :])
    else:
        tokens = tokens[-limit:]
    return dataclasses.replace(prompt, tokens=tokens, meta=prompt.meta | {"truncated_prompt": True})


def load_pairs(
    rows: Sequence[Row],
    codec: Codec,
    fields: Fields | None = None,
    prompt_format: PromptFormat | None = None,
    *,
    task: str = "",
    max_completion_tokens: int | None = None,
    **options: Any,
) -> list[Pair]:
    """Prompts with completions to imitate. A row with several completions gives a pair for each.

    The completions are the completion column, or the last assistant's message of a chat, or else the references.

    Args:
        max_completion_tokens: the longest completion, EOS included. "truncate" cuts the end off, EOS with it, so that
            nothing teaches the policy to stop in the middle.

        The others are those of `load_prompts`.

    Raises:
        OperantError: as `load_prompts`, or a row has no completion.
    """
    written = dataclasses.replace(prompt_format or PromptFormat(), **options)
    made = _answered(rows, codec, fields or Fields(), written, task)
    owners: list[Prompt] = []
    texts: list[str] = []
    for prompt, completions in made:
        answers = completions or prompt.references
        if not answers:
            raise OperantError(
                f"row {prompt.id} has no completion: mend or remove it, or choose a column with --reference_field "
                f"(the columns are {', '.join(columns_of(rows)[:20])})"
            )
        owners.extend([prompt] * len(answers))
        texts.extend(answers)
    tokens = codec.encode_batch(texts, eos=True, target=written.encoder)
    if max_completion_tokens is not None:
        _check_lengths("completion", [len(row) for row in tokens], max_completion_tokens, written.too_long)
    pairs = []
    for prompt, text, row in zip(owners, texts, tokens, strict=True):
        if max_completion_tokens is not None and len(row) > max_completion_tokens:
            if written.too_long == "skip":
                continue
            pairs.append(Pair(prompt, row[:max_completion_tokens], codec.decode(row[:max_completion_tokens])))
        else:
            pairs.append(Pair(prompt, row, text))
    return pairs


def load_fitting_pairs(
    rows: Sequence[Row], policy: PromptReader, config: PairFields, which: str
) -> tuple[list[Pair], list[str]]:
    """(pairs that the model can hold, notes on what was cut, left out or empty). `which` names the pairs in the notes.

    "truncate" cuts the prompt so that its completion has room, but to no less than half of the context. No rows give no
    pairs.

    Raises OperantError as `load_pairs`, for a pair that is too long ("error"), and where none is left ("skip").
    """
    if not rows:
        return [], []
    written = PromptFormat.fitting(policy, config)
    longest = PromptFormat.fitting(policy).max_prompt_tokens
    skip = written.too_long == "skip"  # here and not by load_pairs, so that they are counted
    pairs = load_pairs(
        rows, policy.codec, Fields(prompt=config.prompt_field, completion=config.reference_field),
        dataclasses.replace(written, max_prompt_tokens=None) if skip else written,
        max_completion_tokens=None if skip else longest,
    )  # fmt: skip
    fitting = [fitted for pair in pairs if (fitted := _fitted(pair, policy, written)) is not None]
    if not fitting:
        raise OperantError(
            f"every {which} pair is too long (the model holds {policy.max_length} tokens); "
            "give a model with a longer context, or --too_long truncate"
        )
    cut = sum(
        "truncated_prompt" in pair.prompt.meta or pair.completion_tokens[-1] != policy.codec.eos_id for pair in fitting
    )
    counts = {
        "are too long and were left out": len(pairs) - len(fitting),
        "are too long and were cut": cut,
        "have an empty completion, which teaches the policy to say nothing": sum(
            not pair.completion_text.strip() for pair in fitting
        ),
    }
    return fitting, [f"{count} of {len(pairs)} {which} pairs {what}" for what, count in counts.items() if count]


def _fitted(pair: Pair, policy: PromptReader, written: PromptFormat) -> Pair | None:
    """The pair, cut if it may be; None where it is to be left out."""
    prompt, tokens = pair.prompt, pair.completion_tokens
    total = len(tokens) if written.encoder else len(prompt.tokens) + len(tokens)
    fits = total <= policy.max_length
    if written.too_long == "skip":
        assert written.max_prompt_tokens is not None
        return pair if fits and len(prompt.tokens) <= written.max_prompt_tokens else None
    if fits:
        return pair
    if written.too_long == "error":
        raise OperantError(
            f"pair {prompt.id} has {total} tokens and the model holds {policy.max_length}; "
            "use --too_long skip or truncate, or a longer --max_length"
        )
    room = max(policy.max_length - len(tokens), policy.max_length // 2)
    if len(prompt.tokens) > room:
        prompt = truncated(prompt, room, policy.codec, written.encoder)
    if len(tokens) > (left := policy.max_length - len(prompt.tokens)):
        return Pair(prompt, tokens[:left], policy.codec.decode(tokens[:left]))
    return dataclasses.replace(pair, prompt=prompt)


def load_texts(rows: Sequence[Row], fields: Fields | None = None) -> list[str]:
    """Raw texts to pretrain on; a list of texts is several. Empty or absent ones are left out.

    Raises:
        OperantError: there is no text column, a value is no text, or all texts are empty.
    """
    if not rows:
        raise OperantError("there are no rows: give data with at least one row")
    column = find_column(rows, "text", (fields or Fields()).text)
    if column is None:
        raise OperantError(no_column(rows, "text", "text"))
    texts: list[str] = []
    for number, row in enumerate(rows, start=1):
        value = cell(row, column)
        if value is not None and value is not ABSENT:
            texts.extend(
                texts_of(value, column, number) if isinstance(value, list) else [text_of(value, column, number)]
            )
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise OperantError(f"every text in the column {column!r} is empty: choose another with --text_field")
    return texts
