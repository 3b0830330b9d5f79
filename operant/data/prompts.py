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

from operant.config import FormatFields, PairFields, setting_types
from operant.data.chat import Message, PromptStyle, read_messages
from operant.data.rows import (
    ABSENT,
    Fields,
    Row,
    as_instructions,
    cell,
    columns_of,
    find_column,
    is_chat,
    no_column,
    text_of,
    texts_of,
)
from operant.data.text import Codec
from operant.types import Ints, OperantError, Prompt

__all__ = [
    "Pair", "PromptFormat", "PromptReader", "TooLong", "departures", "given_style", "load_fitting_pairs",
    "load_fitting_prompts", "load_pairs", "load_prompts", "load_texts", "row_ids", "settle_style", "truncated",
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


class Styled(Protocol):
    """What of a policy says how its prompts are written."""

    codec: Codec


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt with the completion to imitate. completion_tokens: int64[T], EOS last (unless it was cut off)."""

    prompt: Prompt
    completion_tokens: Ints
    completion_text: str


@dataclass(frozen=True, slots=True)
class _Question:
    """A row read: what is asked, what may be answered, and the row's other columns.

    completions: texts, or messages that only a template can write. earlier: the places in `messages` of the assistant's
    earlier turns. tools: what a chat may call.
    """

    text: str
    messages: tuple[Message, ...] | None
    completions: tuple[str | Message, ...]
    references: tuple[str, ...]
    meta: dict[str, Any]
    tools: tuple[Any, ...] = ()

    @property
    def earlier(self) -> list[int]:
        return [i for i, turn in enumerate(self.messages or ()) if i and turn["role"] == "assistant"]


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
    column = str(messages if prompt is None else prompt)
    questions = []
    for number, row in enumerate(rows, start=1):
        asked = cell(row, column)
        answers = () if completion is None else _answers(cell(row, completion), completion, number)
        chat: tuple[Message, ...] | None = None
        if is_chat(asked):
            turns = read_messages(asked, f"row {number}, column {column!r}")
            # The answer to a recorded chat is its last message, which the policy must not see.
            if turns[-1]["role"] == "assistant":
                answers = answers or (_answer_of(turns[-1]),)
                turns = turns[:-1]
            if not turns:
                raise OperantError(f"row {number} has nothing before the assistant's message: add the user's message")
            chat, text = tuple(turns), turns[-1]["content"]
        else:
            text = text_of(asked, column, number)
        given = () if references is None else texts_of(cell(row, references), references, number)
        # CSV's empty cell is no reference: an empty answer would be right by it
        wanted = tuple(text for text in given if text.strip()) or tuple(a for a in answers if isinstance(a, str))
        meta = {key: value for key, value in row.items() if key not in used}
        questions.append(_Question(text, chat, answers, wanted, meta, _tools(row, number) if chat else ()))
    return questions


def _answers(value: Any, column: str, number: int) -> tuple[str | Message, ...]:
    """The completions in a cell: one text, a list of them, or an assistant's message."""
    if is_chat(value) and any(turn.get("tool_calls") for turn in value):
        turns = read_messages(value, f"row {number}, column {column!r}")
        if len(turns) > 1:
            raise OperantError(f"row {number} has several messages in {column!r}, one with tool calls: give one chat")
        return (turns[0],)
    return texts_of(value, column, number)


def _answer_of(turn: Message) -> str | Message:
    return turn if turn.get("tool_calls") else str(turn["content"])


def _tools(row: Row, number: int) -> tuple[Any, ...]:
    """The column `tools` of a chat: JSON schemas of functions, as a list or as its JSON."""
    given = row.get("tools")
    if isinstance(given, str):
        try:
            given = json.loads(given) if given.strip() else None
        except ValueError as error:
            raise OperantError(f"row {number} has no JSON in the column 'tools' ({error}): mend it") from error
    if not given:
        return ()
    if not isinstance(given, (list, tuple)) or not all(isinstance(tool, dict) for tool in given):
        raise OperantError(f"row {number} has a {type(given).__name__} in the column 'tools': give a list of objects")
    return tuple(given)


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
    rows = as_instructions(rows, fields)
    return _row_names(rows, _questions(rows, fields), fields)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptFormat:
    """How what is asked becomes the ids that a policy reads.

    None, and "auto", are as the policy was trained (`Codec.style`), or else as said here. `style` has all resolved.

    chat: a text prompt is a user's message in the chat template. "auto": where the tokenizer has a template.
    system: the system message of chats that have none. None: there is none.
    template_arguments: more that the template takes, such as {"enable_thinking": False}. None: nothing.
    prefix: written before each text prompt ("translate English to German: "). `Prompt.text` stays without it. None: "".
    separator: written after a decoder's text prompt where there is no chat, so that it can tell where the completion
        begins. Encoders' prompts end with EOS, chats end as their template says. None: a newline.
    source_lang, target_lang: as of `PromptStyle`; the codec that encodes is to be in that style. None: as they are.
    encoder: the policy is an encoder-decoder.
    max_prompt_tokens: the longest prompt that the model takes; None sets no limit.
    too_long: "error", "skip" (leave the row out) or "truncate" (a decoder keeps the end of the prompt, an encoder the
        beginning and EOS).
    """

    chat: bool | Literal["auto"] = "auto"
    system: str | None = None
    template_arguments: dict[str, Any] | None = None
    prefix: str | None = None
    separator: str | None = None
    source_lang: str | None = None
    target_lang: str | None = None
    encoder: bool = False
    max_prompt_tokens: int | None = None
    too_long: TooLong = "error"

    @classmethod
    def of(cls, config: FormatFields, **options: Any) -> PromptFormat:
        """The format that `config` says; `options` are further fields."""
        return cls(**given_style(config), **options)

    @classmethod
    def fitting(cls, policy: PromptReader, config: Any = None, *, room: int = 1) -> PromptFormat:
        """The format of the prompts that a policy can hold, written as `config` says.

        config: `FormatFields`, with `max_prompt_tokens` (0 is what the model can hold) and `too_long`; None takes the
            usual.
        room: tokens of a decoder's context that are left for the completion; an encoder's prompt shares it with none.
        """
        encoder = policy.family == "encoder-decoder"
        longest = policy.max_length if encoder else max(1, policy.max_length - room)
        if config is None:
            return cls(encoder=encoder, max_prompt_tokens=longest)
        return cls.of(
            config, encoder=encoder, max_prompt_tokens=config.max_prompt_tokens or longest, too_long=config.too_long
        )

    def style(self, codec: Codec) -> PromptStyle:
        """How prompts are written for the model of this codec: what is given here, and else as it was trained.

        Raises OperantError for a separator that a chat has no use for.
        """
        usual = codec.usual_style
        chat = usual.chat if self.chat == "auto" else self.chat
        if chat and self.chat == "auto" and self.separator not in (None, "\n", usual.separator):
            raise OperantError(
                f"--separator {self.separator!r} has no place in the model's chat template, in which prompts are "
                "written; leave it out, or give --chat false"
            )
        return PromptStyle(
            chat=chat,
            prefix=usual.prefix if self.prefix is None else self.prefix,
            separator="\n" if chat else usual.separator if self.separator is None else self.separator,
            system=usual.system if self.system is None else self.system,
            template_arguments=dict(
                usual.template_arguments if self.template_arguments is None else self.template_arguments
            ),
            source_lang=usual.source_lang if self.source_lang is None else self.source_lang,
            target_lang=usual.target_lang if self.target_lang is None else self.target_lang,
        )

    def encode(self, text: str, codec: Codec, tools: Sequence[Any] | None = None) -> Ints:
        """The ids of a text prompt, int64[P]: prefix, text and, for a decoder, separator; or a chat of one message."""
        style = self.style(codec)
        if style.chat:
            return self.encode_chat([{"role": "user", "content": style.prefix + text}], codec, tools)
        return codec.encode_prompt(
            f"{style.prefix}{text}{'' if self.encoder else style.separator}", encoder=self.encoder
        )

    def encode_chat(self, messages: Sequence[Message], codec: Codec, tools: Sequence[Any] | None = None) -> Ints:
        """The ids of a chat, int64[P], up to where the assistant begins to speak."""
        return codec.encode_prompt(messages=messages, encoder=self.encoder, style=self.style(codec), tools=tools)


def given_style(config: FormatFields) -> dict[str, Any]:
    """What a configuration says of how prompts are written, as keywords of `load_prompts`."""
    return {name: getattr(config, name) for name in setting_types(FormatFields)}


def settle_style(policy: Styled, config: FormatFields) -> list[str]:
    """Let the prompts of a policy be written as `config` says, from here on and wherever it is saved.

    Returns `departures` from how they were written before. Raises OperantError as `PromptFormat.style` does.
    """
    written = PromptFormat.of(config)
    notes = departures(policy.codec, written)
    policy.codec = policy.codec.in_style(written.style(policy.codec))
    if policy.codec.lacks_target:
        notes.append("the model answers in many languages and nobody says in which; give --target_lang")
    return notes


def departures(codec: Codec, written: PromptFormat) -> list[str]:
    """One line for a format that is not the one that the model of this codec was trained with; [] where it is."""
    if codec.style is None or not (found := written.style(codec).differences(codec.style)):
        return []
    here = " ".join(f"--{name} {json.dumps(now, ensure_ascii=False)}" for name, (now, _) in found.items())
    there = " ".join(f"--{name} {json.dumps(then, ensure_ascii=False)}" for name, (_, then) in found.items())
    return [f"prompts are written with {here}, and the model was trained with {there}"]


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
        options: replace single fields of `prompt_format`: `chat` ("auto"), `system`, `template_arguments`, `prefix` and
            `separator` (None: as the model was trained), `encoder` (False; True for an encoder-decoder),
            `max_prompt_tokens` (None: no limit) and `too_long` ("error", "skip" or "truncate").

    Returns:
        One prompt a row, tokens int64[P]. `id` is the row's own id where ids are unique; `meta` holds the row's other
        columns.

    Raises:
        OperantError: a column is missing, a value is no text, or a prompt is too long.
    """
    written = dataclasses.replace(prompt_format or PromptFormat(), **options)
    fields = fields or Fields()
    return [prompt for prompt, _ in _answered(as_instructions(rows, fields), codec, fields, written, task)]


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
    rows: Sequence[Row], codec: Codec, fields: Fields, written: PromptFormat, task: str, every_turn: bool = False
) -> list[tuple[Prompt, tuple[str | Ints, ...]]]:
    """Each row's prompt with the completions that stand beside it, none where its answers are references: texts, or
    the ids of what only a chat template can write.

    every_turn: the assistant's earlier turns too, each with the chat before it as its prompt.
    """
    questions = _questions(rows, fields)
    made: list[tuple[Prompt, tuple[str | Ints, ...]]] = []
    for number, (question, name) in enumerate(zip(questions, _row_names(rows, questions, fields), strict=True), 1):
        try:
            for place in question.earlier if every_turn else ():
                turns = question.messages or ()
                part = dataclasses.replace(
                    question, text=turns[place - 1]["content"], messages=turns[:place],
                    completions=(_answer_of(turns[place]),), references=(),
                )  # fmt: skip
                made.append(_written(part, f"{name}.{place}", codec, written, task))
            made.append(_written(question, name, codec, written, task))
        except OperantError as error:
            raise OperantError(f"row {number}: {error}") from error
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


def _written(
    question: _Question, name: str, codec: Codec, written: PromptFormat, task: str
) -> tuple[Prompt, tuple[str | Ints, ...]]:
    """The prompt of a question, and its completions."""
    if question.messages is None:
        tokens = written.encode(question.text, codec)
    else:
        tokens = written.encode_chat(question.messages, codec, question.tools)
    prompt = Prompt(
        id=name, tokens=tokens, text=question.text, messages=question.messages, references=question.references,
        task=task, meta=question.meta,
    )  # fmt: skip
    answers: list[str | Ints] = []
    for answer in question.completions:
        if isinstance(answer, str):
            answers.append(answer)
            continue
        asked = question.messages or [{"role": "user", "content": question.text}]
        answers.append(codec.encode_turn(asked, answer, written.style(codec), question.tools))
    return prompt, tuple(answers)


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
    train_on: Literal["all", "last"] = "last",
    **options: Any,
) -> list[Pair]:
    """Prompts with completions to imitate. A row with several completions gives a pair for each.

    The completions are the completion column, or the last assistant's message of a chat, or else the references.

    Args:
        train_on: "all" takes the assistant's earlier messages of a chat as well, each a pair of its own with what was
            said before it.
        max_completion_tokens: the longest completion, EOS included. "truncate" cuts the end off, EOS with it, so that
            nothing teaches the policy to stop in the middle.

        The others are those of `load_prompts`.

    Raises:
        OperantError: as `load_prompts`, or a row has no completion.
    """
    written = dataclasses.replace(prompt_format or PromptFormat(), **options)
    fields = fields or Fields()
    rows = as_instructions(rows, fields)
    made = _answered(rows, codec, fields, written, task, train_on == "all")
    owners: list[Prompt] = []
    found: list[str | Ints] = []
    for prompt, completions in made:
        answers = completions or prompt.references
        if not answers:
            raise OperantError(
                f"row {prompt.id} has no completion: mend or remove it, or choose a column with --reference_field "
                f"(the columns are {', '.join(columns_of(rows)[:20])})"
            )
        owners.extend([prompt] * len(answers))
        found.extend(answers)
    tokens = _encoded(found, owners, codec, written)
    texts = [answer if isinstance(answer, str) else codec.decode(answer) for answer in found]
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


def _encoded(
    answers: Sequence[str | Ints], owners: Sequence[Prompt], codec: Codec, written: PromptFormat
) -> list[Ints]:
    """The ids of answers to these prompts, int64[T] each: those of a chat end as its template ends a turn."""
    every = written.style(codec).chat
    chats = [every or owner.messages is not None for owner in owners]
    rows: list[Ints | None] = [None if isinstance(answer, str) else answer for answer in answers]
    for chat in (False, True):
        places = [i for i, answer in enumerate(answers) if isinstance(answer, str) and chats[i] == chat]
        texts = [str(answers[i]) for i in places]
        for i, row in zip(places, codec.encode_answers(texts, chat=chat, target=written.encoder), strict=True):
            rows[i] = row
    return [row for row in rows if row is not None]


def load_fitting_pairs(
    rows: Sequence[Row],
    policy: PromptReader,
    config: PairFields,
    which: str,
    *,
    train_on: Literal["all", "last"] = "last",
) -> tuple[list[Pair], list[str]]:
    """(pairs that the model can hold, notes on what was cut, left out or empty). `which` names the pairs in the notes.
    train_on: as of `load_pairs`.

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
        max_completion_tokens=None if skip else longest, train_on=train_on,
    )  # fmt: skip
    fitting = [fitted for pair in pairs if (fitted := _fitted(pair, policy, written)) is not None]
    if not fitting:
        raise OperantError(
            f"every {which} pair is too long (the model holds {policy.max_length} tokens); "
            "give a model with a longer context, or --too_long truncate"
        )
    cut = sum(
        "truncated_prompt" in pair.prompt.meta or pair.completion_tokens[-1] not in policy.codec.end_ids
        for pair in fitting
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
