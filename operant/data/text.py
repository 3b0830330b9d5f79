"""Text and token ids, both ways: tokenizers, chat templates, training a BPE, character spans and token spans.

The token ids are the record and text is a view of them, so everything here is about one question: which characters of
the text are settled once token t is there? A byte-level token may hold a third of a Chinese character or a quarter of
an emoji; `text_ends` counts whole characters only, and the span functions read nothing but that array.
"""

from __future__ import annotations

import codecs
import copy
import difflib
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from operant.data.chat import (
    STYLE_FILE,
    ChatText,
    ControlTokens,
    Message,
    PromptStyle,
    read_messages,
    render_chat,
    with_system,
)
from operant.data.hub import fetched, load_fault
from operant.types import Ints, OperantError

__all__ = ["Codec", "Incremental", "chars_to_tokens", "tokens_to_chars"]

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "source.spm",
)
CLASSES_WITHOUT_FILES = (
    "ByT5Tokenizer",
    "CanineTokenizer",
    "PerceiverTokenizer",
)  # Their vocabulary is Unicode itself.
REPLACEMENT = "\ufffd"
WINDOW = 8  # A character has at most four bytes: more tokens than this without one are broken, not unfinished.


def looks_like_path(name: str) -> bool:
    """True for a name meant as a path: hub ids are `name` or `owner/name`, and no owner is a folder here."""
    owner, slash, rest = name.partition("/")
    return name.startswith((".", "/", "~")) or "/" in rest or (bool(slash) and Path(owner).is_dir())


def chars_to_tokens(
    ends: Sequence[int] | Ints, start: int, end: int, reach: Sequence[int] | Ints | None = None
) -> tuple[int, int]:
    """The tokens that hold the characters [start, end): the smallest half-open token span that covers them.

    Token t holds bytes of the characters `[ends[t-1], reach[t])`, with `ends[-1] = 0`. So an emoji spread over three
    tokens maps to all three, also when the first of them holds the space before it as well.

    Without `reach` a token is taken to hold what it finished and, if it finished nothing, the next character. That is
    exact but where a token finishes one character and begins another: it then counts as the finished one's alone.
    Byte-level BPE likes to join a space with the first bytes of an emoji.

    Args:
        ends: int[T], non-decreasing, characters committed after token t (`Completion.text_ends`).
        start, end: character positions, 0 <= start <= end. Past the committed text lie the tokens of a cut-off tail.
        reach: int[T], characters of which token t or one before it holds a byte (`Codec.reach`).

    Returns:
        (t0, t1) with 0 <= t0 <= t1 <= T. An empty character span gives an empty token span.

    Raises:
        ValueError: start is negative or after end.
    """
    if start < 0 or end < start:
        raise ValueError(f"a character span needs 0 <= start <= end, got [{start}, {end})")
    total = len(ends)
    if reach is not None:
        first = int(np.searchsorted(reach, start, side="right"))
    elif start == 0:
        first = 0
    else:
        first = int(np.searchsorted(ends, start, side="left"))
        if first < total and int(ends[first]) == start:
            first += 1
    if end == start:
        return first, first
    last = min(int(np.searchsorted(ends, end, side="left")) + 1, total)
    return first, max(first, last)


def tokens_to_chars(ends: Sequence[int] | Ints, t0: int, t1: int) -> tuple[int, int]:
    """The characters that tokens [t0, t1) finished: `[ends[t0-1], ends[t1-1])`, with `ends[-1] = 0`.

    Args:
        ends: int[T], characters committed after token t.
        t0, t1: token positions, 0 <= t0 <= t1 <= T.

    Returns:
        (start, end), empty where the tokens finished no character.

    Raises:
        ValueError: the token span does not lie in [0, T].
    """
    if not 0 <= t0 <= t1 <= len(ends):
        raise ValueError(f"a token span needs 0 <= t0 <= t1 <= {len(ends)}, got [{t0}, {t1})")
    start = int(ends[t0 - 1]) if t0 > 0 else 0
    end = int(ends[t1 - 1]) if t1 > 0 else 0
    return start, max(start, end)


class Incremental(Protocol):
    """Decodes a completion while it is written. Made by `Codec.incremental()`; one per completion.

    ends, reach: int[T] so far, the characters committed after each token, and those begun.
    """

    ends: list[int]
    reach: list[int]

    @property
    def text(self) -> str:
        """The text committed so far: whole characters only."""

    def push(self, token: int) -> str:
        """Takes the next token and returns the text that it committed, often several characters or none."""

    def finish(self) -> str:
        """Returns what an unfinished last character reads as (a replacement character), or ''. Changes nothing."""


class _Committed:
    """The committed text, its length after each token, and that length with the character begun by then."""

    def __init__(self) -> None:
        self.ends: list[int] = []
        self.reach: list[int] = []
        self._pieces: list[str] = []
        self._length = 0

    @property
    def text(self) -> str:
        if len(self._pieces) > 1:
            self._pieces = ["".join(self._pieces)]
        return self._pieces[0] if self._pieces else ""

    def _commit(self, piece: str, begun: int) -> str:
        if piece:
            self._pieces.append(piece)
            self._length += len(piece)
        self.ends.append(self._length)
        self.reach.append(self._length + begun)
        return piece


class _ByteIncremental(_Committed):
    """Exact route: each token is a known string of bytes, and UTF-8 says when a character is whole."""

    def __init__(self, table: list[bytes], strip_left: int) -> None:
        super().__init__()
        self._table = table
        self._strip_left = strip_left
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        data = self._table[token] if 0 <= token < len(self._table) else b""
        while self._strip_left and data:
            if not data.startswith(b" "):
                self._strip_left = 0
            else:
                data = data[1:]
                self._strip_left -= 1
        piece = self._decoder.decode(data)
        return self._commit(piece, begun=bool(self._decoder.getstate()[0]))

    def finish(self) -> str:
        pending, _ = self._decoder.getstate()
        return pending.decode("utf-8", errors="replace")


class _WindowIncremental(_Committed):
    """Route for any other tokenizer: decode a short window twice and commit the difference.

    The window starts at the tokens of the last commit, so that the first new token is decoded in its context. A space
    that the tokenizer drops at the start of a text is dropped from both sides of the difference.
    """

    def __init__(self, codec: Codec) -> None:
        super().__init__()
        self._codec = codec
        self._context: list[int] = []
        self._new: list[int] = []
        self._begun = 0

    def push(self, token: int) -> str:
        if not self._codec.is_text(token):
            return self._commit("", self._begun)
        self._new.append(token)
        piece = self._difference()
        if len(self._new) < WINDOW and (not piece or piece.endswith(REPLACEMENT)):
            # The bytes of an unfinished character read as a replacement each, or as nothing: they are one character.
            self._begun = len(piece.rstrip(REPLACEMENT)) + 1
            return self._commit("", self._begun)
        self._context, self._new, self._begun = self._new, [], 0
        return self._commit(piece, begun=0)

    def finish(self) -> str:
        return self._difference() if self._new else ""

    def _difference(self) -> str:
        before = self._codec.decode_with_tokenizer(self._context)
        after = self._codec.decode_with_tokenizer(self._context + self._new)
        # Decoders may touch up the end of the context (a WordPiece space before a full stop): keep what was committed.
        return after[len(before) :]


class Codec:
    """A tokenizer with the few operations that operant needs, exact on any Unicode text.

    Byte-level BPE (GPT-2, Llama 3, Qwen, …) and byte-fallback (Llama 2, Gemma) tokenizers are decoded from their token
    bytes; all others through the tokenizer itself, a window at a time. The Transformers tokenizer is `.tokenizer`.

    style: how prompts are written for the model that it belongs to, as that was trained; None where nobody has said.
    first_id: the token that every text of the model begins with, such as a language's; None for none.

    Raises:
        OperantError: the tokenizer has no end-of-text token.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.style: PromptStyle | None = None
        self.first_id: int | None = None
        self._more_ends: frozenset[int] = frozenset()
        eos = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
        if eos is None:
            raise OperantError(
                "the tokenizer has no end-of-text token: set eos_token in its tokenizer_config.json and load it again"
            )
        self.eos_id: int = int(eos)
        self.bos_id: int | None = None if tokenizer.bos_token_id is None else int(tokenizer.bos_token_id)
        self.unk_id: int | None = None if tokenizer.unk_token_id is None else int(tokenizer.unk_token_id)
        self.pad_id: int = self.eos_id if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
        added = tokenizer.added_tokens_decoder
        self._added: dict[int, str] = {int(i): str(token.content) for i, token in added.items()}
        self.special_ids: frozenset[int] = frozenset(int(i) for i in tokenizer.all_special_ids) | frozenset(
            int(i) for i, token in added.items() if token.special
        )
        vocab = tokenizer.get_vocab()
        self._vocab: dict[str, int] = vocab
        self.vocab_size: int = max(len(tokenizer), 1 + max(vocab.values(), default=-1))
        sentinels: list[int] = []
        while (token := f"<extra_id_{len(sentinels)}>") in vocab:
            sentinels.append(int(vocab[token]))
        self.sentinel_ids: list[int] = sentinels

    # -- making, loading, saving

    @classmethod
    def load(cls, path: str | Path) -> Codec:
        """Loads the tokenizer of a model folder, or of a model on the Hugging Face hub.

        A PEFT adapter folder without a tokenizer gives its base model's.

        Raises:
            OperantError: no such folder or model, or the folder holds no tokenizer.
        """
        from transformers import AutoTokenizer

        name = str(path)
        folder = Path(name).expanduser()
        if folder.is_dir():
            name = str(folder)
            if not _holds_tokenizer(folder):
                if base := _read_object(folder / "adapter_config.json").get("base_model_name_or_path"):
                    base = folder / base if (folder / base).is_dir() else base
                    return cls.load(base)._styled_by(folder / STYLE_FILE)
                raise OperantError(
                    f"{path} holds no tokenizer: copy tokenizer.json and tokenizer_config.json of the model into it"
                )
        elif folder.exists() or looks_like_path(name):
            raise OperantError(f"{path} is not a model folder: give a folder with a tokenizer, or a hub id")
        try:
            with fetched(name):
                tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
                style = folder / STYLE_FILE if folder.is_dir() else _fetched(name, STYLE_FILE)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise OperantError(
                f"cannot load a tokenizer from {path}: give a folder that save_pretrained wrote, or a hub id"
                f" that can be reached ({load_fault(error)})"
            ) from error
        return cls(tokenizer)._styled_by(style)

    @classmethod
    def train_bpe(
        cls,
        texts: Iterable[str],
        vocab_size: int = 4096,
        special: tuple[str, str, str] = ("<|pad|>", "<|bos|>", "<|eos|>"),
        sentinels: int = 0,
        split_digits: bool = False,
        min_frequency: int = 2,
    ) -> Codec:
        """Trains a byte-level BPE (Sennrich et al. 2016; bytes as in GPT-2). All 256 bytes are in: any text encodes.

        Args:
            texts: the training text.
            vocab_size: at most so many tokens, special ones included; fewer when the text is small.
            special: names of the padding, beginning and end tokens, which become ids 0, 1 and 2.
            sentinels: how many `<extra_id_i>` tokens to add for span corruption (T5).
            split_digits: each digit its own token, which makes numbers easier to learn.
            min_frequency: a pair must be seen so often to become a token.

        Raises:
            OperantError: vocab_size leaves no room for the 256 bytes and the special tokens, or there is no text.
        """
        from transformers import PreTrainedTokenizerFast

        names = [*special, *(f"<extra_id_{i}>" for i in range(sentinels))]
        if vocab_size < 256 + len(names):
            raise OperantError(f"vocab_size {vocab_size} is too small: 256 bytes and {len(names)} special tokens need"
                               f" at least {256 + len(names)}")  # fmt: skip
        core = _trained_bpe(texts, vocab_size, names, split_digits, min_frequency)
        pad, bos, eos = special
        return cls(
            PreTrainedTokenizerFast(
                tokenizer_object=core, pad_token=pad, bos_token=bos, eos_token=eos, extra_special_tokens=names[3:],
                clean_up_tokenization_spaces=False,
            )
        )  # fmt: skip

    def save(self, path: str | Path) -> None:
        """Writes the tokenizer into a folder, in the form that plain Transformers loads, with its style beside it."""
        self.tokenizer.save_pretrained(str(path))
        if self.style is not None:
            self.style.write(Path(path))

    def in_style(self, style: PromptStyle | None) -> Codec:
        """The same tokenizer for a model whose prompts are written so.

        Raises:
            OperantError: it knows no such language.
        """
        if style == self.style:
            return self
        other = copy.copy(self)
        other.style = style
        if style is not None and (style.source_lang or style.target_lang):
            other._speak(style.source_lang, style.target_lang)
        return other

    def _speak(self, source: str, target: str) -> None:
        """Let prompts be in the language `source`, and answers begin with the token of `target`; "" leaves it so."""
        ids = {code: self._language(code) for code in (source, target) if code}
        self.tokenizer = copy.deepcopy(self.tokenizer)
        for place, code in (("src_lang", source), ("tgt_lang", target)):
            if code:
                setattr(self.tokenizer, place, code)
                self.tokenizer.init_kwargs[place] = code  # so that plain Transformers reads it from a saved folder
        if target:
            self.first_id = ids[target]
        for name in ("hash", "_control_tokens"):
            self.__dict__.pop(name, None)

    @property
    def lacks_target(self) -> bool:
        """Whether the model answers in many languages and nobody has said in which. mBART's decoders begin with it."""
        many = hasattr(self.tokenizer, "src_lang") and not type(self.tokenizer).__name__.startswith("MBartTokenizer")
        return many and self.first_id is None

    def _language(self, code: str) -> int:
        """The token of a language."""
        if not hasattr(self.tokenizer, "src_lang"):
            raise OperantError("the tokenizer tells no languages apart; leave --source_lang and --target_lang out")
        for name in (code, f"__{code}__"):  # M2M-100's
            if (found := self.tokenizer.convert_tokens_to_ids(name)) in self.special_ids and found != self.unk_id:
                return int(found)
        known = [self._added.get(i, "").strip("_") for i in sorted(self.special_ids)]
        near = difflib.get_close_matches(code, known, 3, 0.3) or [name for name in known if "<" not in name][:3]
        raise OperantError(f"the tokenizer knows no language {code!r}; it knows {', '.join(near)} and others")

    def ending_at(self, ends: Iterable[int], first: int | None = None) -> Codec:
        """The same tokenizer for a model whose texts also end at these tokens, and begin with `first` if it is one."""
        more = frozenset(ends) - {self.eos_id}
        if (more, first) == (self._more_ends, self.first_id):
            return self
        other = copy.copy(self)
        other._more_ends, other.first_id = more, first
        other.__dict__.pop("end_ids", None)
        return other

    def _styled_by(self, file: Path | None) -> Codec:
        return self if file is None or not file.is_file() else self.in_style(PromptStyle.read(file))

    # -- identity

    @cached_property
    def hash(self) -> str:
        """sha256 of the tokenizer's content; the same for a saved and loaded copy."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        content: Any
        if backend is not None:
            content = json.loads(backend.to_str())
            # Padding and truncation are settings of the last call, no part of what the tokenizer is.
            content.update(truncation=None, padding=None)
        else:
            content = {"vocab": sorted(self._vocab.items()), "class": type(self.tokenizer).__name__}
        special = {name: getattr(self, name) for name in ("pad_id", "bos_id", "eos_id")}
        return _sha256(json.dumps([content, special], sort_keys=True))

    @property
    def template_hash(self) -> str:
        """sha256 of the chat template in force: the tokenizer's own, or of how operant's default renders a chat."""
        own = self.tokenizer.chat_template
        if own:
            return _sha256(own if isinstance(own, str) else json.dumps(own, sort_keys=True))
        rendered = _sha256(json.dumps([self.render(EXAMPLE_CHAT), self.render(EXAMPLE_CHAT, generation_prompt=False)]))
        return FIRST_HASHES.get(rendered, rendered)

    @property
    def has_template(self) -> bool:
        """Whether the tokenizer has a chat template of its own."""
        return bool(self.tokenizer.chat_template)

    @property
    def usual_style(self) -> PromptStyle:
        """How prompts are written where nobody says: as the model was trained, or else by its chat template, if any."""
        return self.style or PromptStyle(chat=self.has_template)

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """The tokens at which a text ends: the end of text, of a turn in a chat, and those that the model names."""
        return self._more_ends | {self.eos_id, self.turn_end_id}

    @cached_property
    def turn_end_id(self) -> int:
        """The token that ends the assistant's turn in the chat template, or the end of text where it has none."""
        if not self.has_template:
            return self.eos_id
        chat = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
        try:
            rendered = self.chat_text(chat, generation_prompt=False, style=PromptStyle(chat=True)).text
        except OperantError:
            return self.eos_id
        ids = self.encode(rendered.rpartition("answer")[2], parse_special=True).tolist()
        return next((i for i in ids if i in self.special_ids), self.eos_id)

    # -- text to tokens

    def encode(self, text: str, eos: bool = False, target: bool = False, parse_special: bool = False) -> Ints:
        """Token ids of a text, int64[T].

        Args:
            text: any text. A special token's name in it (`<|eos|>` typed by a user) is plain text.
            eos: append the end-of-text token.
            target: the text is in the target language of a tokenizer that tells them apart (Marian).
            parse_special: read names of special tokens as special tokens.
        """
        return self.encode_batch([text], eos=eos, target=target, parse_special=parse_special)[0]

    def encode_batch(
        self, texts: Sequence[str], eos: bool = False, target: bool = False, parse_special: bool = False
    ) -> list[Ints]:
        """`encode` of many texts at once, int64[T] each, which is faster."""
        if not texts:
            return []
        given = {"text_target" if target else "text": list(texts)}
        rows = self.tokenizer(
            **given,
            add_special_tokens=False,
            split_special_tokens=not parse_special,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
        tail = [self.eos_id] if eos else []
        return [np.asarray([*row, *tail], dtype=np.int64) for row in rows]

    def encode_answers(self, texts: Sequence[str], *, chat: bool = False, target: bool = False) -> list[Ints]:
        """Token ids of what a policy answers, int64[T] each: as it writes them itself, its first token and an end.

        Args:
            texts: any texts. Names of special tokens in them are plain text.
            chat: they answer chats, whose template ends a turn in its own way.
            target: as of `encode`.
        """
        head = [] if self.first_id is None else [self.first_id]
        end = self.turn_end_id if chat else self.eos_id
        return [np.asarray([*head, *row, end], dtype=np.int64) for row in self.encode_batch(texts, target=target)]

    def encode_turn(
        self,
        messages: Sequence[Message],
        answer: Message,
        style: PromptStyle | None = None,
        tools: Sequence[Any] | None = None,
    ) -> Ints:
        """Token ids of an assistant's message that only the chat template can write, such as tool calls, int64[T].

        They follow what `encode_prompt` gives for the messages before it, and end with the turn.

        Raises:
            OperantError: the template refuses the messages, or does not write an answer after its own beginning of one.
        """
        head = self.chat_text(messages, tools=tools, style=style).text
        whole = self.chat_text([*messages, answer], generation_prompt=False, tools=tools, style=style)
        if not whole.text.startswith(head):
            raise OperantError(
                "the chat template writes this answer otherwise than it begins one, so it cannot be learned: leave the"
                " row out, or write the answer as a text"
            )
        ids = self._encode_pieces(whole.pieces, len(head))
        ends = [i for i, token in enumerate(ids) if token in (self.turn_end_id, self.eos_id)]
        return np.asarray(ids[: ends[0] + 1] if ends else [*ids, self.turn_end_id], dtype=np.int64)

    def encode_reply(self, text: str, style: PromptStyle | None = None, *, ended: bool = True) -> Ints:
        """Token ids of what stands between an assistant's turn and its next one when the user says `text`, int64[P].

        ended: the turn has written its own end.

        Raises:
            OperantError: the template refuses a chat of several turns.
        """
        answer = "answer" + _sha256(text)
        chat = [{"role": "user", "content": "question"}, {"role": "assistant", "content": answer}]
        pieces = self.chat_text([*chat, {"role": "user", "content": text}], style=style).pieces
        start = sum(len(piece) for piece, _ in pieces) - len("".join(piece for piece, _ in pieces).partition(answer)[2])
        ids = self._encode_pieces(pieces, start)
        return np.asarray(ids[1:] if ended and ids[:1] == [self.turn_end_id] else ids, dtype=np.int64)

    def _encode_pieces(self, pieces: Iterable[tuple[str, bool]], start: int = 0) -> list[int]:
        """Token ids of a `ChatText` from a character on."""
        ids: list[int] = []
        seen = 0
        for text, special in pieces:
            rest, seen = text[max(0, start - seen) :], seen + len(text)
            ids += self.encode(rest, parse_special=special).tolist() if rest else []
        return ids

    def encode_prompt(
        self,
        text: str | None = None,
        messages: Sequence[Message] | None = None,
        encoder: bool = False,
        *,
        style: PromptStyle | None = None,
        tools: Sequence[Any] | None = None,
    ) -> Ints:
        """Token ids of what a policy is asked, int64[P], with the special tokens that the model expects around it.

        Args:
            text: a plain prompt, exactly as it stands. The tokenizer's own beginning token is added where it has one
                (Llama's BOS).
            messages: a chat, `[{"role": …, "content": …}, …]`, rendered by the tokenizer's chat template (or a plain
                readable one) up to where the assistant begins to speak. No content becomes a control token.
            encoder: the prompt is an encoder's input and ends with EOS; otherwise it never does.
            style: of a chat, its system message and what else the template takes; None takes `usual_style`.
            tools: of a chat, the functions that may be called, as JSON schemas.

        Raises:
            OperantError: both or neither of text and messages are given, or the template refuses the messages.
        """
        if (text is None) == (messages is None):
            raise OperantError("a prompt is either a text or a list of messages: give exactly one of them")
        if messages is not None:
            ids = self._encode_pieces(self.chat_text(messages, tools=tools, style=style).pieces)
        else:
            ids = self.tokenizer(text, add_special_tokens=True, split_special_tokens=True, verbose=False)["input_ids"]
        if encoder and self.eos_id in ids[-2:-1] and ids[-1] in self.special_ids:
            return np.asarray(ids, dtype=np.int64)  # the end, and then the language (NLLB's older form, mBART)
        while ids and ids[-1] == self.eos_id and len(ids) > (ids[0] == self.bos_id):
            ids = ids[:-1]
        if encoder:
            ids = [*ids, self.eos_id]
        elif not ids:
            # A decoder must be given something to predict from.
            ids = [self.eos_id if self.bos_id is None else self.bos_id]
        return np.asarray(ids, dtype=np.int64)

    def chat_text(
        self,
        messages: Sequence[Message],
        generation_prompt: bool = True,
        *,
        tools: Sequence[Any] | None = None,
        style: PromptStyle | None = None,
    ) -> ChatText:
        """A chat under the tokenizer's template, or operant's default, with what people say kept from being control
        tokens. style, tools: as of `encode_prompt`.

        Raises:
            OperantError: a message lacks its role or content or holds what is no text, or the template refuses the chat
                or knows nothing of its tools.
        """
        style = style or self.usual_style
        chat = with_system(read_messages(messages), style.system)
        if not self.has_template:
            if tools or any(message.get("tool_calls") for message in chat):
                raise OperantError("a model without a chat template calls no tools: leave the row out")
            return ChatText(((default_template(chat, generation_prompt), False),))
        return self._control_tokens.apart(
            {"messages": chat, "tools": tools},
            lambda given: render_chat(
                self.tokenizer, given["messages"], generation_prompt=generation_prompt, tools=given["tools"],
                arguments=style.template_arguments,
            ),
        )  # fmt: skip

    def render(self, messages: Sequence[Message], generation_prompt: bool = True) -> str:
        """The text of `chat_text`, as a person reads it. Raises OperantError as that does."""
        return self.chat_text(messages, generation_prompt).text

    @cached_property
    def _control_tokens(self) -> ControlTokens:
        tokens = {int(i): token for i, token in self.tokenizer.added_tokens_decoder.items()}
        names = [str(tokens[i].content) if i in tokens else self.tokenizer.convert_ids_to_tokens(i)
                 for i in self.special_ids]  # fmt: skip
        rewritten = any(tokens[i].normalized for i in self.special_ids if i in tokens)
        return ControlTokens(names, self._hides_special if rewritten else None)

    def _hides_special(self, text: str) -> bool:
        """Whether the tokenizer finds more special tokens in a text where it may."""
        found, plain = (
            sum(int(i) in self.special_ids for i in self.encode(text, parse_special=parse)) for parse in (True, False)
        )
        return found > plain

    # -- tokens to text

    def is_text(self, token: int) -> bool:
        """False for special tokens and for ids that the tokenizer does not have (a model's padded vocabulary)."""
        return token not in self.special_ids and 0 <= token < self.vocab_size

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of the tokens, int[T]. Special tokens are dropped, spaces stay, broken bytes read as U+FFFD."""
        if self._token_bytes is None:
            return self.text_and_ends(tokens)[0]
        table, strip_left = self._token_bytes
        data = b"".join([table[token] for token in _as_ints(tokens) if 0 <= token < len(table)])
        kept = data.lstrip(b" ") if strip_left else data
        return data[min(strip_left, len(data) - len(kept)) :].decode("utf-8", errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes that a token stands for by itself, maybe a part of a character; b"" for special tokens."""
        if not self.is_text(token):
            return b""
        if self._token_bytes is None:
            return self.decode_with_tokenizer([token]).encode()
        return self._token_bytes[0][token]

    def text_and_ends(self, tokens: Iterable[int]) -> tuple[str, Ints]:
        """The text, and int64[T] how many of its characters are committed after each token.

        Committed characters are whole and never change later. The text of an unfinished last character (U+FFFD) is in
        the text and not in `ends`. Takes linear time.
        """
        decoder = self.incremental()
        for token in _as_ints(tokens):
            decoder.push(token)
        return decoder.text + decoder.finish(), np.asarray(decoder.ends, dtype=np.int64)

    def ends_in(self, text: str) -> Ints:
        """int64[T], how many characters of `text` itself are read after each token of `encode(text)`.

        Those of `text_and_ends` count the decoded text, which is another where the tokenizer rewrites what it reads:
        lower case, unknown words, other spaces.

        Raises:
            OperantError: the tokenizer is a slow one, which does not tell where a token stands.
        """
        if not self.tokenizer.is_fast:
            raise OperantError("the tokenizer rewrites text and does not tell where its tokens stand; use one with a"
                               " tokenizer.json, or one that keeps the text (byte-level BPE)")  # fmt: skip
        places = self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
        )["offset_mapping"]
        # each byte of a character has the character's place: the last of them finishes it
        ends = [min(end, after) for (_, end), (after, _) in itertools.pairwise([*places, (len(text), 0)])]
        return np.maximum.accumulate(np.asarray(ends, dtype=np.int64))

    def reach(self, tokens: Iterable[int]) -> Ints:
        """int64[T], of how many characters token t or one before it holds a byte (for `chars_to_tokens`)."""
        decoder = self.incremental()
        for token in _as_ints(tokens):
            decoder.push(token)
        return np.asarray(decoder.reach, dtype=np.int64)

    def incremental(self) -> Incremental:
        """A fresh decoder for one completion that is being written: push each token, get the text it committed."""
        if self._token_bytes is None:
            return _WindowIncremental(self)
        return _ByteIncremental(*self._token_bytes)

    def decode_with_tokenizer(self, tokens: list[int]) -> str:
        """The tokenizer's own decoding, without its clean-up of spaces."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    @cached_property
    def _token_bytes(self) -> tuple[list[bytes], int] | None:
        """Bytes of every token (b"" for special ones) and how many leading spaces the text loses; None if unknown."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None or backend.decoder is None:
            return None
        state = json.loads(backend.decoder.__getstate__())
        steps = state["decoders"] if state["type"] == "Sequence" else [state]
        kinds = {step["type"] for step in steps}
        byte_level = "ByteLevel" in kinds
        if not byte_level and not ("ByteFallback" in kinds and kinds <= {"Replace", "ByteFallback", "Fuse", "Strip"}):
            return None
        table = [b""] * self.vocab_size
        for token, index in self._vocab.items():
            if index in self.special_ids:
                continue
            if index in self._added:
                table[index] = self._added[index].encode()
            elif byte_level:
                table[index] = _byte_level_bytes(token)
            elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                table[index] = bytes([int(token[3:5], 16)])
            else:
                for step in steps:
                    if step["type"] == "Replace":
                        token = token.replace(step["pattern"].get("String", "▁"), step["content"])
                table[index] = token.encode()
        strip_left = sum(int(step["start"]) for step in steps if step["type"] == "Strip" and step["content"] == " ")
        return table, strip_left


def _trained_bpe(
    texts: Iterable[str], vocab_size: int, special: list[str], split_digits: bool, min_frequency: int
) -> Any:
    """The tokenizer of `Codec.train_bpe`, as the tokenizers library has it; `special` are its first ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    seen = 0

    def counted() -> Iterator[str]:
        nonlocal seen
        for text in texts:
            seen += bool(text)
            yield text

    core = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    core.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level]) if split_digits else byte_level
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=min_frequency, special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False,
    )  # fmt: skip
    core.train_from_iterator(counted(), trainer=trainer)
    if not seen:
        raise OperantError("there is no text to train a tokenizer on: give data with at least one non-empty text")
    return core


def default_template(messages: Sequence[Message], generation_prompt: bool) -> str:
    """A chat as a plain readable text, for tokenizers without a template of their own."""
    turns = [f"### {message['role'].capitalize()}\n{message['content']}\n\n" for message in messages]
    return "".join(turns) + ("### Assistant\n" if generation_prompt else "")


# what `Codec.template_hash` renders: every role, space at both ends of a content, and an empty one
EXAMPLE_CHAT = [
    {"role": "system", "content": " a b\n"}, {"role": "user", "content": "{c}"}, {"role": "assistant", "content": ""},
]  # fmt: skip

# hash of what the default template renders → the hash under which completions have recorded it from the first day on,
# which was of a text beside the code. Another rendering has a hash of its own.
FIRST_HASHES = {
    "6943d2e01dc24c512ddcdece9f612c5e6bd7490f720d44e85be9e7eb8bb7f0a0": (
        "7a183bb26a2a4e600bc698ce53c842fa2fd9419c8793e19f689cdd753e5a50b0"
    ),
}


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _read_object(file: Path) -> dict[str, Any]:
    """A JSON object from a file, {} where there is none that can be read."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _holds_tokenizer(folder: Path) -> bool:
    # Transformers would make an empty tokenizer of a folder without these, and say nothing.
    if any((folder / file).is_file() for file in TOKENIZER_FILES):
        return True
    return _read_object(folder / "tokenizer_config.json").get("tokenizer_class") in CLASSES_WITHOUT_FILES


def _fetched(name: str, file: str) -> Path | None:
    """A file of a model on the hub, None where it has none or is out of reach."""
    from transformers.utils import cached_file

    found = cached_file(
        name, file, _raise_exceptions_for_gated_repo=False, _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )  # fmt: skip
    return None if found is None else Path(found)


def _as_ints(tokens: Iterable[int]) -> list[int]:
    return tokens.tolist() if isinstance(tokens, np.ndarray) else [int(token) for token in tokens]


def _byte_level_alphabet() -> dict[str, int]:
    """The 256 printable characters that stand for bytes in a byte-level vocabulary (GPT-2, `bytes_to_unicode`)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(256 + n): byte for n, byte in enumerate(others)})
    return table


_ALPHABET = _byte_level_alphabet()


def _byte_level_bytes(token: str) -> bytes:
    try:
        return bytes([_ALPHABET[char] for char in token])
    except KeyError:
        return token.encode()
