"""Chats and prompts as the text that a model reads: how they are written, and what nobody may forge in them.

A chat template writes control tokens around what people say. Whoever types the name of such a token must not get the
token: contents and scaffold are tokenised apart (`ChatText.pieces`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

from operant.types import OperantError

__all__ = ["ChatText", "ControlTokens", "Message", "PromptStyle", "content_text", "read_messages", "render_chat"]

Message = dict[str, Any]

STYLE_FILE = "prompt_style.json"
# what ShareGPT calls the one who speaks → what templates call them
SPEAKERS = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "bot": "assistant", "model": "assistant", "observation": "tool", "function_response": "tool",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptStyle:
    """How prompts are written for a model. It is saved beside the model, so that every later stage writes them alike.

    chat: a text prompt is a user's message in the chat template. Otherwise it is prefix, text and separator.
    prefix: written before a text prompt, in a chat inside the user's message.
    separator: written after a decoder's text prompt where there is no chat.
    system: the system message of chats that have none; "" adds none.
    template_arguments: more that the chat template takes, such as {"enable_thinking": False}.
    source_lang, target_lang: the languages of what is asked and of what is answered, by the tokenizer's codes for them
        (NLLB's eng_Latn, M2M-100's en); "" leaves them as the model's makers set them.
    """

    chat: bool = False
    prefix: str = ""
    separator: str = "\n"
    system: str = ""
    template_arguments: dict[str, Any] = field(default_factory=dict)
    source_lang: str = ""
    target_lang: str = ""

    @classmethod
    def read(cls, file: Path) -> PromptStyle:
        """The style in a file that `write` wrote. Raises OperantError for anything else."""
        try:
            return cls(**json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise OperantError(
                f"{file} does not say how the model's prompts are written ({error}); copy it again from where the "
                "model was saved, or remove it"
            ) from error

    def write(self, folder: Path) -> None:
        """Save it in the folder of a model."""
        languages = ("source_lang", "target_lang")
        said = {n: value for n, value in dataclasses.asdict(self).items() if value or n not in languages}
        text = json.dumps(said, ensure_ascii=False, indent=1)
        (folder / STYLE_FILE).write_text(text + "\n", encoding="utf-8")

    def differences(self, other: PromptStyle) -> dict[str, tuple[Any, Any]]:
        """What differs, as {name: (here, there)}."""
        names = [f.name for f in dataclasses.fields(self)]
        return {n: (getattr(self, n), getattr(other, n)) for n in names if getattr(self, n) != getattr(other, n)}


# -- messages


def content_text(content: Any, place: str) -> str:
    """The text of a message's content: a text, or text parts, which are joined.

    place: where it stands, such as "row 3, message 2".
    Raises OperantError for nothing, and for parts that are no text.
    """
    if isinstance(content, str):
        return content
    if isinstance(content, (int, float)) and not isinstance(content, bool):
        return str(content)
    if content is None:
        raise OperantError(f"{place} has no content: give a text, or leave the row out")
    if not isinstance(content, (list, tuple)):
        raise OperantError(f"{place} has a {type(content).__name__} as its content: give a text, or leave the row out")
    texts = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        text = part.get("text") if isinstance(part, Mapping) else part
        if kind != "text" or not isinstance(text, str):
            raise OperantError(f"{place} has a part of type {str(kind)[:40]!r}, and a text model reads texts: leave"
                               " the row out")  # fmt: skip
        texts.append(text)
    return "".join(texts)


def read_messages(turns: Sequence[Any], place: str = "") -> list[Message]:
    """Messages as templates read them: each with a role and a text as its content.

    Parts of text are joined. Contents of nothing beside tool calls are "". ShareGPT's from and value are role and
    content. Entries of None are left out. The arguments of tool calls become objects where they are JSON. Reading what
    was read changes nothing.

    place: where they stand, such as "row 3".

    Raises OperantError, with the number of the message, for one without a role or content, and for a content that is
    no text.
    """
    read = []
    for number, turn in enumerate(turns, start=1):
        where = f"{place}, message {number}" if place else f"message {number}"
        if not isinstance(turn, Mapping):
            raise OperantError(f'{where} is no message: it needs "role" and "content"')
        message = {str(key): value for key, value in turn.items() if not is_nothing(value)}
        if "role" not in message and "from" in message:
            speaker = str(message.pop("from"))
            message["role"] = SPEAKERS.get(speaker, speaker)
            if "value" in message:
                message["content"] = message.pop("value")
        calls = message.get("tool_calls")
        if "role" in message and not ("content" in message or calls):
            raise OperantError(f'{where} has nothing as its "content": give a text, or leave the row out')
        if "role" not in message:
            raise OperantError(
                f'{where} needs "role" and "content", as in {{"role": "user", "content": "Hello"}}, and has '
                f"{', '.join(message) or 'nothing'}"
            )
        if not isinstance(message["role"], str):
            raise OperantError(
                f'the role {message["role"]!r} of a message is no text ({where}): give "user" or "assistant"'
            )
        message["content"] = content_text(message["content"], where) if "content" in message else ""
        if calls:
            message["tool_calls"] = [_read_call(call, where) for call in calls]
        else:
            message.pop("tool_calls", None)
        read.append(message)
    return read


def is_nothing(value: Any) -> bool:
    """Whether it is null, or what tables have in its place: NaN, and the NA and NaT of pandas."""
    if isinstance(value, Real):
        return bool(value != value)
    return value is None or type(value).__name__ in ("NAType", "NaTType")


def _read_call(call: Any, where: str) -> dict[str, Any]:
    """A tool call whose arguments are an object, as templates take them; OpenAI's are that object as a text."""
    if not isinstance(call, Mapping):
        raise OperantError(f"{where} has a tool call that is no object: mend or leave out the row")
    read = {str(key): value for key, value in call.items() if value is not None}
    function = read.get("function")
    if isinstance(function, Mapping):
        read["function"] = {str(key): value for key, value in function.items() if value is not None}
    holder = read["function"] if isinstance(function, Mapping) else read
    if isinstance(given := holder.get("arguments"), str):
        try:
            parsed = json.loads(given)
        except ValueError:
            parsed = None
        if isinstance(parsed, dict):
            holder["arguments"] = parsed
    return read


def with_system(messages: Sequence[Message], system: str) -> list[Message]:
    """The chat, begun by this system message where it has none."""
    if not system or (messages and messages[0]["role"] in ("system", "developer")):
        return list(messages)
    return [{"role": "system", "content": system}, *messages]


# -- rendering


def render_chat(
    tokenizer: Any,
    messages: Sequence[Message],
    *,
    generation_prompt: bool,
    tools: Sequence[Any] | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> str:
    """The text of a chat under a tokenizer's own template.

    Raises OperantError where the template refuses the messages, and for tools, tool calls or arguments that it does
    not know: it would leave them out without a word.
    """
    template = _template_of(tokenizer, tools)
    if tools and "tools" not in template:
        raise OperantError("the chat template of this model takes no tools: leave the column `tools` out")
    if "tool_calls" not in template and any(message.get("tool_calls") for message in messages):
        raise OperantError("the chat template of this model has no tool calls: leave the row out")
    for name in arguments or ():
        if not re.search(rf"\b{re.escape(name)}\b", template):
            raise OperantError(f"the chat template of this model has no argument {name!r}: see --template_arguments")
    try:
        rendered = tokenizer.apply_chat_template(
            [dict(message) for message in messages], tools=list(tools) if tools else None, tokenize=False,
            add_generation_prompt=generation_prompt, **(arguments or {}),
        )  # fmt: skip
    except Exception as error:  # Templates are programs of others: they raise whatever they like.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise OperantError(f"the chat template refuses these messages: mend their roles ({reason})") from error
    return str(rendered)


def _template_of(tokenizer: Any, tools: Sequence[Any] | None) -> str:
    """The source of the template that would be used; of several named ones, tools have one of their own."""
    try:
        return str(tokenizer.get_chat_template(tools=list(tools) if tools else None))
    except ValueError as error:
        raise OperantError(
            "the tokenizer has several chat templates and none is called default: name one so in its "
            f"chat_template ({str(error).splitlines()[0]})"
        ) from error


# -- what nobody may forge


@dataclass(frozen=True, slots=True)
class ChatText:
    """A rendered chat, cut where a content holds what would be read as a control token.

    pieces: (text, whether names of control tokens in it are control tokens).
    """

    pieces: tuple[tuple[str, bool], ...]

    @property
    def text(self) -> str:
        """The whole text, as a person reads it."""
        return "".join(text for text, _ in self.pieces)


class ControlTokens:
    """The names of a tokenizer's control tokens, found in what people say.

    names: the control tokens as texts. hidden: says of a text whether the tokenizer finds control tokens in it that are
    not there letter by letter, since it rewrites what it reads; None for one that does not.
    """

    def __init__(self, names: Sequence[str], hidden: Callable[[str], bool] | None = None) -> None:
        known = sorted({name for name in names if name}, key=len, reverse=True)
        self._hidden = hidden
        self._names = re.compile("|".join(map(re.escape, known)) or "(?!)")
        self._longest = len(known[0]) if known else 0
        self._heads = {name[i:] for name in known for i in range(1, len(name))}
        self._tails = {name[:i] for name in known for i in range(1, len(name))}

    def apart(self, chat: Any, render: Callable[[Any], str]) -> ChatText:
        """Render a chat so that nothing which its contents hold becomes a control token.

        The template reads the contents as they are, but for the names of control tokens in them, in whose place it
        sees a word. Where that word comes out, the name is put back as plain text. Beginnings and ends of contents are
        hidden likewise if they would make up a control token with what stands beside them.

        chat: messages and tools, in any nesting of dictionaries and lists. render: from such a chat to its text.
        """
        stem = self._stem(chat)
        hiding = _Hiding(stem)
        rendered = render(_mapped(chat, lambda text, key: self._masked(text, hiding)))
        if any(self._edges(text) != (0, 0) for text, key in _texts(chat) if key not in ("role", "type")):
            stricter = _Hiding(stem)
            other = render(
                _mapped(
                    chat,
                    lambda text, key: self._masked(text, stricter, edges=key not in ("role", "type")),
                )
            )
            # a template writes as many control tokens whatever is said: more than that come of what was said
            if self._names.findall(other) != self._names.findall(rendered):
                rendered, hiding = other, stricter
        return ChatText(hiding.pieces(rendered))

    def _stem(self, chat: Any) -> str:
        """A word that no content holds; the same chat has the same."""
        texts = "\x00".join(text for text, _ in _texts(chat))
        stem = ""
        while not stem or stem in texts:
            stem = "hidden" + hashlib.sha256((texts + stem).encode("utf-8", "surrogatepass")).hexdigest()[:16]
        return stem

    def _masked(self, text: str, hiding: _Hiding, *, edges: bool = False) -> str:
        """The text with words in the place of control tokens and, if asked, of parts of them at its ends."""
        if self._hidden is not None and self._hidden(self._names.sub("", text)):
            return hiding.word(text)
        head, tail = self._edges(text) if edges else (0, 0)
        start, end = len(text) - len(text.lstrip()) + head, len(text.rstrip()) - tail
        if start > end:  # the two ends overlap
            return hiding.word(text)
        inner = self._names.sub(lambda found: hiding.word(found[0]), text[start:end])
        before, after = text[start - head : start], text[end : end + tail]
        return "".join(
            (
                text[: start - head], hiding.word(before) if before else "", inner,
                hiding.word(after) if after else "", text[end + tail :],
            )
        )  # fmt: skip

    def _edges(self, text: str) -> tuple[int, int]:
        """How many characters at the text's begin, and at its end, would complete a control token outside of it."""
        bare = text.strip()
        most = range(min(self._longest - 1, len(bare)), 0, -1)
        head = next((k for k in most if bare[:k] in self._heads), 0)
        return head, next((k for k in most if bare[-k:] in self._tails), 0)


@dataclass(slots=True)
class _Hiding:
    """Words that stand in for texts."""

    stem: str
    texts: list[str] = field(default_factory=list)

    def word(self, text: str) -> str:
        self.texts.append(text)
        return f"{self.stem}x{len(self.texts) - 1}x"

    def pieces(self, rendered: str) -> tuple[tuple[str, bool], ...]:
        found = re.split(rf"{self.stem}x(\d+)x", rendered)
        pairs = [(self.texts[int(t)], False) if i % 2 else (t, True) for i, t in enumerate(found)]
        return tuple(pair for pair in pairs if pair[0])


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text in a nesting, names of entries too, with the name of the entry that it is."""
    if isinstance(value, str):
        yield value, key
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield str(name), "role"
            yield from _texts(inner, str(name))
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _texts(inner, key)


def _mapped(value: Any, change: Callable[[str, str], str], key: str = "") -> Any:
    """The same nesting with every text of `_texts` changed."""
    if isinstance(value, str):
        return change(value, key)
    if isinstance(value, Mapping):
        return {
            change(name, "role") if isinstance(name, str) else name: _mapped(inner, change, str(name))
            for name, inner in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_mapped(inner, change, key) for inner in value]
    return value
