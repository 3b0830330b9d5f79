"""Preference data as it comes: pairs, edits, ratings, texts and chats, with and without a prompt."""

from __future__ import annotations

from typing import Any

import pytest

from operant.data.preferences import Preference, Rating, load_preferences, load_ratings, reward_of, share_of, unpaired
from operant.data.rows import Fields
from operant.data.text import Codec
from operant.types import OperantError

USER = {"role": "user", "content": "the cat"}
OTHER = {"role": "user", "content": "a dog"}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def texts(codec: Codec, pair: Preference) -> tuple[str, str, str]:
    assert pair.chosen[-1] == pair.rejected[-1] == codec.eos_id
    return tuple(codec.decode(part) for part in (pair.prompt.tokens, pair.chosen, pair.rejected))  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("row", "prompt", "chosen", "rejected"),
    [
        ({"prompt": "the cat", "chosen": "sat", "rejected": "ran"}, "the cat\n", "sat", "ran"),
        ({"prompt": "the cat", "original": "ran", "edited": "sat"}, "the cat\n", "sat", "ran"),
        ({"prompt": "the cat", "chosen": "sat", "rejected": ""}, "the cat\n", "sat", ""),
        ({"chosen": "the cat sat", "rejected": "the cat ran"}, "the cat", " sat", " ran"),
        ({"chosen": "the cat sat", "rejected": "the cat saw"}, "the cat", " sat", " saw"),
        ({"chosen": "the cat sat on", "rejected": "the cat sat"}, "the cat", " sat on", " sat"),
        ({"chosen": "你好世", "rejected": "你好界"}, "你好", "世", "界"),
    ],
)
def test_pairs_of_texts(codec: Codec, row: dict[str, Any], prompt: str, chosen: str, rejected: str) -> None:
    (pair,) = load_preferences([row], codec)
    assert texts(codec, pair) == (prompt, chosen, rejected)
    assert pair.prompt.references == ()


def test_pairs_of_chats_are_the_same_however_they_are_written(codec: Codec) -> None:
    explicit = {"prompt": [USER], "chosen": [said("sat")], "rejected": [said("ran")]}
    implicit = {"chosen": [USER, said("sat")], "rejected": [USER, said("ran")]}
    both = {"prompt": "the cat", "chosen": [USER, said("sat")], "rejected": [USER, said("ran")]}
    listed = {"messages": [USER], "chosen": "sat", "rejected": "ran"}
    made = [load_preferences([row], codec)[0] for row in (explicit, implicit, both, listed)]
    expected = codec.encode_prompt(messages=[USER]).tolist()
    for pair in made:
        assert pair.prompt.tokens.tolist() == expected and pair.prompt.messages == (USER,)
        assert texts(codec, pair)[1:] == ("sat", "ran")


def test_columns_may_have_any_name_and_the_others_are_kept(codec: Codec) -> None:
    rows = [{"id": f"r{i}", "q": "the cat", "good": f"sat {i}", "bad": "ran", "by": "me"} for i in range(2)]
    pairs = load_preferences(rows, codec, Fields(prompt="q", chosen="good", rejected="bad"), prefix="a ")
    assert [p.prompt.id for p in pairs] == ["r0", "r1"] and pairs[0].prompt.meta["by"] == "me"
    assert texts(codec, pairs[1]) == ("a the cat\n", "sat 1", "ran")


def test_an_encoder_gets_the_prompt_and_a_decoder_the_separator(codec: Codec) -> None:
    row = {"prompt": "the cat", "chosen": "sat", "rejected": "ran"}
    (pair,) = load_preferences([row], codec, encoder=True)
    assert pair.prompt.tokens[-1] == codec.eos_id and codec.decode(pair.prompt.tokens) == "the cat"


@pytest.mark.parametrize(
    ("label", "good"),
    [(True, True), (False, False), (1, True), (0, False), (-1, False), (1.0, True), ("up", True), ("False", False),
     ("👍", True), ("👎", False)],
)  # fmt: skip
def test_labels(codec: Codec, label: object, good: bool) -> None:
    rows = [{"prompt": "the cat", "completion": "sat", "label": label}]
    (rating,) = load_ratings(rows, codec)
    assert rating.desirable is good and codec.decode(rating.tokens) == "sat"
    assert codec.decode(rating.prompt.tokens) == "the cat\n"


def test_ratings_of_chats_and_of_pairs(codec: Codec) -> None:
    (rating,) = load_ratings([{"completion": [USER, said("sat")], "thumb": 1}], codec)
    assert rating.prompt.messages == (USER,) and codec.decode(rating.tokens) == "sat"
    pair = {"prompt": "the cat", "chosen": "sat", "rejected": "ran"}
    ratings = load_ratings([pair], codec)
    assert [(codec.decode(r.tokens), r.desirable) for r in ratings] == [("sat", True), ("ran", False)]
    assert [r.desirable for r in unpaired(load_preferences([pair], codec))] == [True, False]


def test_labels_stay_with_their_rows_when_rows_are_left_out(codec: Codec) -> None:
    rows = [
        {"prompt": "the cat " * 9, "completion": "sat", "label": 0},
        {"prompt": "a dog", "completion": "ran " * 30, "label": 0},
        {"prompt": "a dog", "completion": "ran", "label": 1},
    ]
    ratings = load_ratings(rows, codec, max_prompt_tokens=12, max_tokens=24, too_long="skip")
    assert [(codec.decode(r.tokens), r.desirable) for r in ratings] == [("ran", True)]


def test_long_rows(codec: Codec) -> None:
    row = {"prompt": "the cat", "chosen": "sat on the mat", "rejected": "ran"}
    length = len(codec.encode("the cat\n")) + len(codec.encode("sat on the mat", eos=True))
    assert len(load_preferences([row], codec, max_tokens=length)) == 1
    with pytest.raises(OperantError, match=r"has \d+ tokens and the model holds .*--too_long"):
        load_preferences([row], codec, max_tokens=length - 1)
    short = {"prompt": "a dog", "chosen": "ran", "rejected": "sat"}
    kept = load_preferences([row, short], codec, max_tokens=length - 1, too_long="skip")
    assert [codec.decode(p.chosen) for p in kept] == ["ran"]
    (cut,) = load_preferences([row], codec, max_tokens=length - 1, too_long="truncate")
    assert len(cut.prompt.tokens) + len(cut.chosen) == length - 1 and codec.eos_id not in cut.chosen
    alike = {"prompt": "the cat", "chosen": "sat on the mat", "rejected": "sat on the red house"}
    with pytest.raises(OperantError, match="every pair is longer"):  # nothing is left that differs
        load_preferences([alike], codec, max_tokens=len(codec.encode("the cat\n")) + 1, too_long="truncate")


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([], "no rows"),
        ([{"prompt": "a", "chosen": "b"}], "needs pairs, and there is no column 'rejected'"),
        ([{"prompt": "a", "completion": "b", "label": True}], "--algorithm kto"),
        ([{"prompt": "a", "choosen": "b", "rejected": "c"}], "did you mean 'choosen'"),
        ([{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "b", "rejected": "b"}],
         "1 of 2 rows have the same text in 'chosen' and 'rejected' (the first is row 2)"),
        ([{"prompt": "a", "chosen": " ", "rejected": "c"}], "row 1 has an empty text in the column 'chosen'"),
        ([{"prompt": "a", "chosen": None, "rejected": "c"}], "row 1 has nothing in the column 'chosen'"),
        ([{"prompt": "a", "chosen": "b"}, {"prompt": "a", "chosen": "b", "rejected": "c"}],
         "row 1 has nothing in the column 'rejected'"),
        ([{"chosen": "b", "rejected": "c"}], "row 1 has no prompt"),
        ([{"chosen": "cat sat", "rejected": "car sat"}], "row 1 has no prompt"),  # and not "ca"
        ([{"chosen": "Sure", "rejected": "Sorry"}], "row 1 has no prompt"),
        ([{"chosen": "cats", "rejected": "cat"}], "row 1 has no prompt"),
        ([{"chosen": [said("b")], "rejected": [said("c")]}], "row 1 has no prompt"),
        ([{"chosen": [USER, said("b")], "rejected": [OTHER, said("c")]}], "two different chats"),
        ([{"chosen": [USER], "rejected": [USER, said("c")]}], "does not end with the assistant's message"),
    ],
)  # fmt: skip
def test_bad_pairs_are_refused_in_one_line(codec: Codec, rows: list[dict[str, Any]], told: str) -> None:
    with pytest.raises(OperantError) as fault:
        load_preferences(rows, codec)
    assert told in str(fault.value) and "\n" not in str(fault.value)


@pytest.mark.parametrize(
    ("kind", "value", "share"),
    [
        ("thumb", 1, 1.0), ("thumb", "down", 0.0), ("thumb", "?", None), ("score", 1, 0.0), ("score", 3, 0.5),
        ("score", "4", 0.75), ("score", 5, 1.0), ("score", 0.9, None), ("score", 6, None), ("score", "nan", None),
        ("score", None, None), ("edit", "x", None),
    ],
)  # fmt: skip
def test_what_a_rating_pays(kind: str, value: Any, share: float | None) -> None:
    assert share_of(kind, value, 1, 5) == share
    assert reward_of(kind, value, 1, 5) == (None if share is None else 2 * share - 1)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": "a", "completion": "b"}, "there is no column 'label'"),
        ({"prompt": "a", "answer": "b", "label": 1}, "choose with --completion_field"),
        ({"prompt": "a", "completion": "b", "label": 0.5}, "row 1 has 0.5 in the column 'label'"),
        ({"prompt": "a", "completion": "b", "label": None}, "row 1 has nothing in the column 'label'"),
        ({"prompt": "a", "completion": "", "label": 1}, "row 1 has an empty text"),
        ({"completion": "b", "label": 1}, "row 1 has no prompt"),
    ],
)
def test_bad_ratings_are_refused_in_one_line(codec: Codec, row: dict[str, Any], told: str) -> None:
    with pytest.raises(OperantError) as fault:
        load_ratings([row], codec)
    assert told in str(fault.value) and "\n" not in str(fault.value)


def test_a_wrong_field_names_the_nearest(codec: Codec) -> None:
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    with pytest.raises(OperantError, match=r"did you mean 'chosen'\?.*--chosen_field"):
        load_preferences([row], codec, Fields(chosen="chose"))
    with pytest.raises(OperantError, match="--completion_field"):
        load_ratings([row | {"label": 1}], codec, Fields(completion="answer"))


def test_an_empty_completion_may_be_undesirable(codec: Codec) -> None:
    (rating,) = load_ratings([{"prompt": "a", "completion": "", "label": 0}], codec)
    assert isinstance(rating, Rating) and rating.tokens.tolist() == [codec.eos_id]
