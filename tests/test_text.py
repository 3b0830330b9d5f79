from __future__ import annotations

import copy
import hashlib
import json
import unicodedata
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from operant.data import text as text_module
from operant.data.text import Codec, chars_to_tokens, tokens_to_chars
from operant.types import OperantError

FAMILY = "👨‍👩‍👧‍👦"
TEXTS = [
    "hello world, hello there",
    "你好,世界。你好吗?",
    f"the {FAMILY} went home 🏠🏠",
    "cafe\u0301 naïve — Größe",
    "ab  c\n\n\td  ",
]
AWKWARD = [
    *TEXTS,
    "",
    " ",
    "\ufffd",
    "한국어 テスト",
    "𝔘𝔫𝔦",
    "👩🏽‍🚀🇩🇪",
    "e\u0301\u0323\u0302",
    "\u2028\x00\x7f",
    "<|eos|> <|pad|>",
]


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec.train_bpe(TEXTS * 3, vocab_size=320, sentinels=3)


def metaspace() -> Codec:
    core = Tokenizer(models.Unigram())
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    core.train_from_iterator(TEXTS * 3, trainer=trainer)
    return Codec(PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"))


def byte_fallback() -> Codec:
    """The shape of Llama 2: ▁ for spaces, unknown characters as <0xNN>, one leading space lost."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocab |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for piece in ["▁", *"helowrd", "▁hello"]:
        vocab.setdefault(piece, len(vocab))
    merges = [("▁", "h"), ("▁h", "e"), ("▁he", "l"), ("▁hel", "l"), ("▁hell", "o")]
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    core = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Codec(PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>"))


def wordpiece() -> Codec:
    vocab = {piece: i for i, piece in enumerate(["[PAD]", "[UNK]", "[SEP]", "un", "##able", "##s", ".", "hello", "世"])}
    core = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    return Codec(
        PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", sep_token="[SEP]")
    )


# -- encoding and decoding


@pytest.mark.parametrize("text", AWKWARD)
def test_bpe_round_trip(codec: Codec, text: str) -> None:
    tokens = codec.encode(text, eos=True)
    assert tokens.dtype == np.int64
    assert tokens[-1] == codec.eos_id
    assert not set(tokens[:-1].tolist()) & codec.special_ids
    assert codec.decode(tokens) == text
    assert codec.text_and_ends(tokens)[0] == text


@settings(max_examples=40, deadline=None)
@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=30))
def test_bpe_round_trip_of_any_text(text: str) -> None:
    codec = CODEC
    tokens = codec.encode(text)
    decoded, ends = codec.text_and_ends(tokens)
    assert decoded == text == codec.decode(tokens)
    # Definition: the characters that are whole in the bytes so far.
    data = text.encode()
    lengths = np.cumsum([len(codec._token_bytes[0][t]) for t in tokens], dtype=np.int64)
    assert ends.tolist() == [len(data[:n].decode(errors="ignore")) for n in lengths]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 330), max_size=25))
def test_any_tokens_decode_as_the_tokenizer_does(tokens: list[int]) -> None:
    codec = CODEC
    text, ends = codec.text_and_ends(tokens)
    known = [token for token in tokens if codec.is_text(token)]
    assert text == codec.decode(np.asarray(tokens, dtype=np.int64))
    assert text == codec.tokenizer.decode(known, clean_up_tokenization_spaces=False)
    assert np.all(np.diff(ends) >= 0)
    # What is committed never changes: it is the beginning of every longer decoding.
    for t, end in enumerate(ends):
        assert codec.decode(tokens[: t + 1]).startswith(text[:end])


CODEC = Codec.train_bpe(TEXTS * 3, vocab_size=320)


def test_an_unfinished_character_is_not_committed(codec: Codec) -> None:
    tokens = codec.encode("a𝔘")
    assert len(tokens) == 5  # a, and the four bytes of a character that training never saw
    for cut, expected in [(2, "a\ufffd"), (3, "a\ufffd"), (4, "a\ufffd"), (5, "a𝔘")]:
        text, ends = codec.text_and_ends(tokens[:cut])
        assert text == expected == codec.decode(tokens[:cut])
        assert ends.tolist() == [1, 1, 1, 1, 2][:cut]


def test_incremental_streams_what_it_commits(codec: Codec) -> None:
    text = f"hello 你好 {FAMILY} e\u0301"
    decoder = codec.incremental()
    pushed = ""
    for token in codec.encode(text, eos=True).tolist():
        pushed += decoder.push(token)
        assert decoder.text == pushed
        assert decoder.ends[-1] == len(pushed)
        assert "\ufffd" not in pushed
    assert pushed == text
    assert decoder.finish() == ""


def test_special_names_in_a_text_stay_text(codec: Codec) -> None:
    assert codec.eos_id not in codec.encode("say <|eos|> now")
    assert codec.encode("say <|eos|> now", parse_special=True).tolist().count(codec.eos_id) == 1
    assert codec.eos_id not in codec.encode("say <|eos|> now")  # the setting of one call does not leak into the next
    assert codec.encode_prompt("<|eos|>").tolist() == codec.encode("<|eos|>").tolist()


def test_encode_batch_is_encode(codec: Codec) -> None:
    for one, row in zip(AWKWARD, codec.encode_batch(AWKWARD, eos=True), strict=True):
        assert row.tolist() == codec.encode(one, eos=True).tolist()
    assert codec.encode_batch([]) == []


# -- other tokenizers


@pytest.mark.parametrize("make", [metaspace, byte_fallback])
@pytest.mark.parametrize("text", ["hello", " hello", "hello  hello ", "hello hello o", "hello \n hello"])
def test_other_tokenizers_decode_as_they_do(make, text: str) -> None:
    codec = make()
    tokens = codec.encode(text, eos=True)
    decoded, ends = codec.text_and_ends(tokens)
    assert decoded == codec.tokenizer.decode(tokens[:-1], clean_up_tokenization_spaces=False) == codec.decode(tokens)
    assert ends[-1] == len(decoded)
    for t, end in enumerate(ends):
        assert decoded[:end] == codec.decode(tokens[: t + 1])[:end]


def test_metaspace_knows_the_trained_text() -> None:
    codec = metaspace()
    assert codec._token_bytes is None
    text = "你好 hello 世界 🏠 the"
    tokens = codec.encode(text)
    decoded, ends = codec.text_and_ends(tokens)
    assert decoded == text
    assert ends[-1] == len(text)
    spans = [tokens_to_chars(ends, t, t + 1) for t in range(len(tokens))]
    assert "".join(text[a:b] for a, b in spans) == text


def test_byte_fallback_waits_for_whole_characters() -> None:
    codec = byte_fallback()
    text = "hello 你🏠 e\u0301"
    tokens = codec.encode(text)
    decoded, ends = codec.text_and_ends(tokens)
    assert decoded == text
    assert len(tokens) > len(text)
    t0, t1 = chars_to_tokens(ends, text.index("🏠"), text.index("🏠") + 1)
    assert t1 - t0 == 4
    assert codec.decode(tokens[t0:t1]) == "🏠"


def test_wordpiece_takes_sep_as_end_and_joins_pieces() -> None:
    codec = wordpiece()
    tokens = codec.encode("hello unable . 世", eos=True)
    text, ends = codec.text_and_ends(tokens)
    assert text == "hello unable. 世"
    assert ends.tolist() == [5, 8, 12, 13, 15, 15]


def test_window_route_is_bounded_when_nothing_decodes() -> None:
    codec = metaspace()
    sizes = []
    codec.decode_with_tokenizer = lambda tokens: sizes.append(len(tokens)) or ""  # type: ignore[method-assign]
    token = int(codec.encode("hello")[-1])
    text, ends = codec.text_and_ends([token] * 100)
    assert (text, ends.tolist()) == ("", [0] * 100)
    assert 8 <= max(sizes) <= 16


def test_no_end_token_is_refused() -> None:
    core = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(OperantError, match="eos_token"):
        Codec(PreTrainedTokenizerFast(tokenizer_object=core))


def test_pad_falls_back_to_eos() -> None:
    codec = byte_fallback()
    assert codec.pad_id == codec.eos_id == 2
    assert codec.bos_id == 1


# -- training, saving, loading


def test_trained_tokenizer(codec: Codec) -> None:
    assert (codec.pad_id, codec.bos_id, codec.eos_id) == (0, 1, 2)
    assert codec.sentinel_ids == [3, 4, 5]
    assert codec.special_ids == {0, 1, 2, 3, 4, 5}
    assert codec.vocab_size <= 320
    assert len(codec.encode("hello hello hello")) < len("hello hello hello")
    again = Codec.train_bpe(TEXTS * 3, vocab_size=320, sentinels=3)
    assert again.hash == codec.hash
    assert Codec.train_bpe(TEXTS * 3, vocab_size=300, sentinels=3).hash != codec.hash


def test_split_digits() -> None:
    texts = ["1234 1234 1234"] * 5
    assert len(Codec.train_bpe(texts, 300, split_digits=True).encode("1234")) == 4
    assert len(Codec.train_bpe(texts, 300).encode("1234")) < 4


def test_training_faults() -> None:
    with pytest.raises(OperantError, match="at least 259"):
        Codec.train_bpe(TEXTS, vocab_size=258)
    with pytest.raises(OperantError, match="no text"):
        Codec.train_bpe(["", ""])


def test_save_and_load(codec: Codec, tmp_path) -> None:
    codec.encode("x", parse_special=True)
    codec.save(tmp_path)
    loaded = Codec.load(tmp_path)
    for name in ("hash", "template_hash", "pad_id", "bos_id", "eos_id", "sentinel_ids", "special_ids", "vocab_size"):
        assert getattr(loaded, name) == getattr(codec, name), name
    for text in AWKWARD:
        assert loaded.encode(text).tolist() == codec.encode(text).tolist()


def test_adapter_folder_gives_its_base_tokenizer(codec: Codec, tmp_path) -> None:
    codec.save(tmp_path / "base")
    (tmp_path / "adapter").mkdir()
    config = {"base_model_name_or_path": str(tmp_path / "base")}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    assert Codec.load(tmp_path / "adapter").hash == codec.hash


def test_folder_without_tokenizer(tmp_path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(OperantError, match=r"no tokenizer: copy tokenizer\.json") as fault:
        Codec.load(tmp_path)
    assert "\n" not in str(fault.value)
    with pytest.raises(OperantError, match="not a model folder"):
        Codec.load(tmp_path / "absent")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(OperantError, match="cannot load a tokenizer") as fault:
        Codec.load(tmp_path)
    assert "\n" not in str(fault.value)


# -- prompts and chats


def test_prompt_ends(codec: Codec) -> None:
    plain = codec.encode("hello").tolist()
    assert codec.encode_prompt("hello").tolist() == plain
    assert codec.encode_prompt("hello", encoder=True).tolist() == [*plain, codec.eos_id]
    assert codec.encode_prompt("").tolist() == [codec.bos_id]
    assert codec.encode_prompt("", encoder=True).tolist() == [codec.eos_id]


def test_prompt_keeps_the_tokenizers_own_beginning(codec: Codec, tmp_path) -> None:
    from tokenizers import processors

    codec.save(tmp_path)
    other = Codec.load(tmp_path)
    other.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A <|eos|>", special_tokens=[("<|bos|>", 1), ("<|eos|>", 2)]
    )
    plain = other.encode("hello").tolist()
    assert plain == codec.encode("hello").tolist()
    assert other.encode_prompt("hello").tolist() == [1, *plain]
    assert other.encode_prompt("hello", encoder=True).tolist() == [1, *plain, 2]


CHAT = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "你好"}]


def test_default_template(codec: Codec) -> None:
    assert codec.render(CHAT) == "### System\nBe kind.\n\n### User\n你好\n\n### Assistant\n"
    assert codec.decode(codec.encode_prompt(messages=CHAT)) == codec.render(CHAT)


def test_the_hash_of_a_template_is_of_what_is_in_force(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    # completions have recorded this hash of the default template since the first day: it names the same template still
    first = "7a183bb26a2a4e600bc698ce53c842fa2fd9419c8793e19f689cdd753e5a50b0"
    assert codec.template_hash == first
    whole = text_module.default_template
    others: list[Any] = [
        lambda messages, begun: whole(messages, begun).replace("###", "##"),
        lambda messages, begun: whole(messages, begun).replace("User", "user"),
        lambda messages, begun: whole([m | {"content": m["content"].strip()} for m in messages], begun),
        lambda messages, begun: whole(messages, False),
        lambda messages, begun: whole(messages, True),
    ]
    hashes = {first}
    for other in others:
        monkeypatch.setattr(text_module, "default_template", other)
        hashes.add(codec.template_hash)
    assert len(hashes) == 1 + len(others)
    monkeypatch.undo()
    own = Codec(copy.deepcopy(codec.tokenizer))
    for template in ("{{ messages[0].content }}", "{{ messages[-1].content }}"):
        own.tokenizer.chat_template = template
        assert own.template_hash == hashlib.sha256(template.encode()).hexdigest()


def test_own_template(codec: Codec, tmp_path) -> None:
    codec.save(tmp_path)
    own = Codec.load(tmp_path)
    own.tokenizer.chat_template = (
        "{% for m in messages %}<|bos|>{{ m.role }}: {{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|bos|>assistant:{% endif %}"
    )
    tokens = Codec(own.tokenizer).encode_prompt(messages=CHAT).tolist()
    assert tokens.count(codec.bos_id) == 3
    assert codec.decode(tokens) == "system: Be kind.user: 你好assistant:"
    assert Codec(own.tokenizer).template_hash != codec.template_hash
    own.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(OperantError, match="roles must alternate"):
        own.encode_prompt(messages=CHAT)


def test_prompt_faults(codec: Codec) -> None:
    with pytest.raises(OperantError, match="exactly one"):
        codec.encode_prompt()
    with pytest.raises(OperantError, match="exactly one"):
        codec.encode_prompt("a", messages=CHAT)
    with pytest.raises(OperantError, match='message 1 has nothing as its "content"'):
        codec.encode_prompt(messages=[{"role": "user"}])
    with pytest.raises(OperantError, match='"role" and "content"'):
        codec.encode_prompt(messages=[{"content": "a"}])


# -- spans


def test_emoji_belongs_to_all_its_tokens() -> None:
    # tokens: "a" | 3 tokens of an emoji | "b " | "c"
    ends = [1, 1, 1, 2, 4, 5]
    assert chars_to_tokens(ends, 0, 1) == (0, 1)
    assert chars_to_tokens(ends, 1, 2) == (1, 4)
    assert chars_to_tokens(ends, 1, 3) == (1, 5)
    assert chars_to_tokens(ends, 2, 3) == chars_to_tokens(ends, 3, 4) == (4, 5)
    assert chars_to_tokens(ends, 0, 5) == (0, 6)
    assert chars_to_tokens(ends, 2, 2) == (4, 4)
    assert tokens_to_chars(ends, 1, 4) == (1, 2)
    assert tokens_to_chars(ends, 1, 3) == (1, 1)
    assert tokens_to_chars(ends, 0, 6) == (0, 5)
    assert tokens_to_chars(ends, 2, 2) == (1, 1)


def test_first_character_and_cut_off_tail() -> None:
    ends = [0, 0, 1, 2, 2]  # an emoji of three tokens, "b", and the first byte of a character that was cut off
    assert chars_to_tokens(ends, 0, 1) == (0, 3)
    assert chars_to_tokens(ends, 1, 2) == (3, 4)
    assert chars_to_tokens(ends, 2, 3) == (4, 5)
    assert chars_to_tokens(ends, 7, 9) == (5, 5)
    assert chars_to_tokens([], 0, 3) == (0, 0)
    assert tokens_to_chars([], 0, 0) == (0, 0)


def test_span_faults() -> None:
    for start, end in [(-1, 2), (3, 2)]:
        with pytest.raises(ValueError, match="character span"):
            chars_to_tokens([1, 2], start, end)
    for t0, t1 in [(-1, 1), (2, 1), (0, 3)]:
        with pytest.raises(ValueError, match="token span"):
            tokens_to_chars([1, 2], t0, t1)


@settings(max_examples=60, deadline=None)
@given(st.text(st.sampled_from([*"ab 你好é\u0301🏠", "\u200d", "👩", "𝔘"]), min_size=1, max_size=20), st.data())
def test_spans_round_trip(text: str, data: st.DataObject) -> None:
    codec = CODEC
    tokens = codec.encode(text, eos=True)
    _, ends = codec.text_and_ends(tokens)
    reach = codec.reach(tokens)
    start = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(start + 1, len(text)))
    t0, t1 = chars_to_tokens(ends, start, end, reach)
    assert text[start:end] in codec.decode(tokens[t0:t1])
    # Exactly the tokens that share a byte with these characters.
    stops = np.cumsum([len(codec._token_bytes[0][t]) for t in tokens])
    first, last = len(text[:start].encode()), len(text[:end].encode())
    shares = [
        t for t, stop in enumerate(stops) if stop > first and (stops[t - 1] if t else 0) < last and tokens[t] != 2
    ]
    assert (t0, t1) == (shares[0], shares[-1] + 1)
    # Without reach: every character is finished inside its span.
    a, b = tokens_to_chars(ends, *chars_to_tokens(ends, start, end))
    assert a <= start < end <= b
    # A token span that begins and ends between characters comes back as it was.
    for u, v in [(0, t1), chars_to_tokens(ends, a, b)]:
        assert tokens_to_chars(ends, *chars_to_tokens(ends, *tokens_to_chars(ends, u, v))) == tokens_to_chars(
            ends, u, v
        )


def test_a_token_may_hold_a_space_and_the_first_bytes_of_an_emoji() -> None:
    codec = Codec.train_bpe([" 🏠", " 🏡", " 🏢"] * 9, vocab_size=262)
    tokens = codec.encode("a 🏠")
    data = [codec._token_bytes[0][t] for t in tokens]
    assert b"".join(data).decode() == "a 🏠" and any(d.startswith(b" ") and len(d) > 1 for d in data)
    _, ends = codec.text_and_ends(tokens)
    assert chars_to_tokens(ends, 2, 3, codec.reach(tokens)) == (1, len(tokens))
    assert chars_to_tokens(ends, 1, 2, codec.reach(tokens)) == (1, 2)


@pytest.mark.parametrize("make", [metaspace, byte_fallback, wordpiece])
def test_reach_of_other_tokenizers(make) -> None:
    codec = make()
    tokens = codec.encode("hello hello", eos=True)
    text, ends = codec.text_and_ends(tokens)
    reach = codec.reach(tokens)
    assert np.all(reach >= ends)
    assert np.all(np.diff(reach) >= 0)
    t0, t1 = chars_to_tokens(ends, 6, 11, reach)
    assert codec.decode(tokens[t0:t1]).strip() == "hello"
    assert chars_to_tokens(ends, 0, len(text), reach)[1] == len(tokens) - 1


def test_combining_and_joined_characters_are_code_points(codec: Codec) -> None:
    text = f"x e\u0301 {FAMILY}!"
    tokens = codec.encode(text)
    _, ends = codec.text_and_ends(tokens)
    assert ends[-1] == len(text)
    at = text.index("\u0301")
    assert unicodedata.combining(text[at])
    t0, t1 = chars_to_tokens(ends, text.index(FAMILY), text.index("!"), codec.reach(tokens))
    assert codec.decode(tokens[t0:t1]).strip(" !") == FAMILY


def test_tokenizer_without_fast_backend(tmp_path) -> None:
    from transformers import ByT5Tokenizer

    codec = Codec(ByT5Tokenizer(extra_ids=3))
    text = "hello 你🏠 e\u0301"
    tokens = codec.encode(text, eos=True)
    decoded, ends = codec.text_and_ends(tokens)
    assert len(tokens) == len(text.encode()) + 1
    assert decoded == text == codec.decode(tokens)
    assert ends.tolist() == [len(text.encode()[:n].decode(errors="ignore")) for n in range(1, len(tokens))] + [
        len(text)
    ]
    at = text.index("🏠")
    assert chars_to_tokens(ends, at, at + 1, codec.reach(tokens)) == (9, 13)
    assert codec.sentinel_ids and len(codec.sentinel_ids) == 3
    codec.save(tmp_path)
    assert Codec.load(tmp_path).hash == codec.hash
