from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from operant.data.preferences import load_preferences, load_ratings
from operant.data.prompts import load_pairs, load_prompts, load_texts
from operant.data.rows import Fields, load_rows, splits
from operant.data.text import Codec
from operant.types import OperantError

ROWS = [
    {"prompt": "one 🏠", "completion": "eins"},
    {"prompt": "two", "completion": "zwei"},
    {"prompt": "三", "completion": ""},
]


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec.train_bpe(["one two three eins zwei drei"] * 3, vocab_size=300)


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def damaged_gzip() -> bytes:
    """A file whose compressed bytes are impossible (a damaged one may also merely decompress to something else)."""
    whole = gzip.compress(b"".join(b'{"a": %d}\n' % i for i in range(99)), mtime=0)
    return whole[:10] + b"\xff" + whole[11:]  # a block of a type that there is not


def one_line(fault: pytest.ExceptionInfo[OperantError]) -> str:
    message = str(fault.value)
    assert "\n" not in message
    return message


# -- rows


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.ndjson", "a.json"])
def test_json_lines(tmp_path: Path, name: str) -> None:
    path = write_jsonl(tmp_path / name, ROWS)
    assert load_rows(path) == ROWS
    assert load_rows(str(path), limit=2) == ROWS[:2]
    assert [f.name for f in tmp_path.iterdir()] == [name]


def test_rows_keep_their_own_keys_and_odd_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes('\ufeff{"a": {"x": 1}}\r\n\n{"a": {"y": "\u2028"}}'.encode())
    assert load_rows(path) == [{"a": {"x": 1}}, {"a": {"y": "\u2028"}}]


@pytest.mark.parametrize("content", [ROWS, {"data": ROWS}])
def test_json(tmp_path: Path, content: object) -> None:
    (tmp_path / "a.json").write_text(json.dumps(content))
    assert load_rows(tmp_path / "a.json") == ROWS


def test_csv_keeps_texts(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('prompt,completion\n007,"NA, ""x"""\n"two\nlines",\n', encoding="utf-8")
    expected = [{"prompt": "007", "completion": 'NA, "x"'}, {"prompt": "two\nlines", "completion": ""}]
    assert load_rows(tmp_path / "a.csv") == expected
    (tmp_path / "a.tsv.gz").write_bytes(gzip.compress(b"prompt\tcompletion\na,b\tc\n"))
    assert load_rows(tmp_path / "a.tsv.gz") == [{"prompt": "a,b", "completion": "c"}]


def test_text_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo 你好\n", encoding="utf-8")
    assert load_rows(tmp_path / "a.txt") == [{"text": "one\n\ntwo 你好\n"}]


def test_parquet_in_an_awkward_folder_leaves_nothing_behind(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path / "my [data] *"
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "train-00000-of-00002.parquet")
    pq.write_table(pa.Table.from_pylist(ROWS[:1]), folder / "train-00001-of-00002.parquet")
    assert load_rows(folder) == [*ROWS, ROWS[0]]
    assert load_rows(folder / "train-00000-of-00002.parquet", limit=2) == ROWS[:2]
    assert len(list(folder.iterdir())) == 2
    (folder / "bad.parquet").write_bytes(b"no")
    with pytest.raises(OperantError, match="cannot be read as Parquet") as fault:
        load_rows(folder / "bad.parquet")
    one_line(fault)


def test_folder_with_splits(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl.gz", ROWS)
    write_jsonl(tmp_path / "dev.jsonl", ROWS[:1])
    (tmp_path / "README.md").write_text("no data")
    assert load_rows(tmp_path) == ROWS
    assert load_rows(tmp_path, "dev") == load_rows(tmp_path, "validation") == ROWS[:1]
    assert splits(tmp_path) == ["train", "dev"]
    assert splits(tmp_path / "dev.jsonl") == []
    with pytest.raises(OperantError, match=r"no split 'test' \(it holds dev\.jsonl, train\.jsonl\.gz\)"):
        load_rows(tmp_path, "test")


def test_split_names_are_whole_words(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "developers.jsonl", ROWS)
    write_jsonl(tmp_path / "dev_1.jsonl", ROWS[:1])
    write_jsonl(tmp_path / "data" / "valid-2.jsonl", ROWS[1:2])
    assert load_rows(tmp_path, "dev") == [ROWS[1], ROWS[0]]


def test_saved_data_set(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    DatasetDict({"train": Dataset.from_list(ROWS), "validation": Dataset.from_list(ROWS[:1])}).save_to_disk(tmp_path)
    assert load_rows(tmp_path, limit=2) == ROWS[:2]
    assert load_rows(tmp_path, "dev") == ROWS[:1]
    assert splits(tmp_path) == ["train", "dev"]
    assert load_rows(tmp_path / "train", "dev") == ROWS
    with pytest.raises(OperantError, match="no split 'test': it has train, validation"):
        load_rows(tmp_path, "test")


def test_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    calls = []

    def load_dataset(name: str, config: str | None, split: str, streaming: bool) -> datasets.Dataset:
        assert datasets.are_progress_bars_disabled()
        calls.append((name, config, split, streaming))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, config: ["train", "validation"])
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_rows("someone/some-set:main") == ROWS
    assert load_rows("someone/some-set", "dev", limit=1) == ROWS[:1]
    assert calls == [("someone/some-set", "main", "train", False), ("someone/some-set", None, "validation", True)]
    assert not datasets.are_progress_bars_disabled()
    assert splits("someone/some-set:main") == ["train", "dev"]
    with pytest.raises(OperantError, match="no split 'test': it has train, validation"):
        load_rows("someone/some-set", "test")

    def unreachable(name: str, config: str | None) -> list[str]:
        raise ConnectionError("offline\nmore")

    monkeypatch.setattr(datasets, "get_dataset_split_names", unreachable)
    with pytest.raises(OperantError, match=r"cannot load someone/some-set from the hub.*\(offline\)") as fault:
        load_rows("someone/some-set")
    one_line(fault)
    assert splits("someone/some-set") == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n\n{"a": \n', r"line 3 is no JSON"),
        ("a.jsonl", b'{"a": 1}\n[1]\n', r"line 2 is no JSON object"),
        ("a.jsonl", b"", "holds no rows"),
        ("a.jsonl", b"\n \n", "holds no rows"),
        ("a.jsonl", b'{"a": "\xff"}\n', "not UTF-8"),
        ("a.jsonl.gz", b"not gzip", "cannot be read"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 99, mtime=0)[:-9], "cannot be read"),
        ("a.json", b'[{"a": 1},\n{"a" 2}]', "line 2 is no JSON"),
        ("a.json", b'["a"]', "no list of JSON objects"),
        ("a.json", b"", "holds no rows"),
        ("a.csv", b"a,b\n1,2\n1,2,3\n", "line 3 has not as many cells"),
        ("a.csv", b"a,b\n1\n", "line 2 has not as many cells"),
        ("a.csv", b'a,b\n1,"2\n', "no CSV"),
        ("a.csv", b"a,b\n", "holds no rows"),
        ("a.csv", b'a,b\n1,2\n3,"4"5\n6,7\n', "line 3 is no CSV"),
        ("a.csv", b"a,b,b\n1,2,3\n", "two columns 'b'"),
        ("a.jsonl", b'{"a": "x"}\n{"a": ["cut \\uD83D"]}\n', r"line 2 holds half of a character \(\\ud83d\)"),
        ("a.json", b'[{"a": "cut \\ud83d"}]', "half of a character"),
        ("a.jsonl", b'{"a": ' + b"1" * 5000 + b"}", "line 1 holds a number of more than 4300 digits"),
        ("a.jsonl", b'{"a": ' + b"[" * 100_000, "line 1 is nested too deeply"),
        ("a.jsonl.gz", damaged_gzip(), "cannot be read: check that it is whole"),
        ("a.xyz", b"a", "no data file that can be read"),
    ],
)
def test_broken_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(OperantError, match=message) as fault:
        load_rows(tmp_path / name)
    assert str(tmp_path / name) in one_line(fault)


def test_whole_characters_and_long_cells_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": "\\ud83d\\ude00", "b": "\\\\ud83d"}\n')
    assert load_rows(tmp_path / "a.jsonl") == [{"a": "😀", "b": "\\ud83d"}]
    (tmp_path / "a.csv").write_text("a,b\n1," + "x" * 140_000 + "\n")
    assert load_rows(tmp_path / "a.csv") == [{"a": "1", "b": "x" * 140_000}]


@pytest.mark.parametrize("index", ["{}", "[]", "{"])
def test_a_saved_data_set_that_names_no_splits(tmp_path: Path, index: str) -> None:
    (tmp_path / "dataset_dict.json").write_text(index)
    asking: list[Callable[[Path], object]] = [load_rows, splits]
    for ask in asking:
        with pytest.raises(OperantError, match="names no splits: write the folder again") as fault:
            ask(tmp_path)
        one_line(fault)


def test_places_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places: list[Callable[[str], object]] = [load_rows, splits]
    for ask in places:
        with pytest.raises(OperantError, match="cannot be read: give data that you may read") as fault:
            ask("x" * 5000)
        assert len(one_line(fault)) < 400

    def forbidden(self: Path) -> None:  # whoever runs the tests may be root, who may read everything
        raise PermissionError(13, "Permission denied", str(self))

    for name in ("is_file", "iterdir"):
        with monkeypatch.context() as patched:
            patched.setattr(Path, name, forbidden)
            with pytest.raises(OperantError, match=r"cannot be read.*\(Permission denied\)") as fault:
                load_rows(tmp_path)
            one_line(fault)


def test_missing_data(tmp_path: Path) -> None:
    for source in [tmp_path / "no.jsonl", tmp_path / "no", "./no", "no.jsonl", "no/such/thing"]:
        with pytest.raises(OperantError, match="there is no data at"):
            load_rows(source)
    with pytest.raises(OperantError, match=r"holds no data: put train\.jsonl"):
        load_rows(tmp_path)
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(OperantError, match="limit 0"):
        load_rows(tmp_path, limit=0)


# -- prompts


def test_decoder_and_encoder_prompts(codec: Codec) -> None:
    prompts = load_prompts(ROWS, codec, task="count", prefix="say: ")
    assert [codec.decode(p.tokens) for p in prompts] == ["say: one 🏠\n", "say: two\n", "say: 三\n"]
    assert [p.text for p in prompts] == ["one 🏠", "two", "三"]
    assert prompts[0].references == ("eins",)
    assert prompts[0].task == "count"
    encoded = load_prompts(ROWS, codec, encoder=True)
    assert encoded[1].tokens.tolist() == [*codec.encode("two").tolist(), codec.eos_id]
    assert codec.decode(load_prompts(ROWS, codec, separator=" =>")[1].tokens) == "two =>"


def test_field_mapping_and_many_references(codec: Codec) -> None:
    rows = [
        {"en": "one", "t": {"de": ["eins", "ein", None]}, "slots": {"a": 1}, "n": 3},
        {"en": "two", "t": {"de": "zwei"}},
    ]
    prompts = load_prompts(rows, codec, Fields(prompt="en", references="t.de"))
    assert [p.references for p in prompts] == [("eins", "ein"), ("zwei",)]
    assert prompts[0].meta == {"slots": {"a": 1}, "n": 3}
    pairs = load_pairs(rows, codec, Fields(prompt="en", references="t.de"))
    assert [(p.prompt.text, p.completion_text) for p in pairs] == [("one", "eins"), ("one", "ein"), ("two", "zwei")]
    assert pairs[0].prompt is pairs[1].prompt
    only_completion = load_pairs(rows, codec, Fields(prompt="en", completion="t.de"))
    assert [p.completion_text for p in only_completion] == ["eins", "ein", "zwei"]


def test_usual_names(codec: Codec) -> None:
    rows = [{"prompt": "p", "completion": "c", "reference": "r"}]
    assert load_prompts(rows, codec)[0].references == ("r",)
    assert load_pairs(rows, codec)[0].completion_text == "c"
    assert load_prompts([{"prompt": 12, "references": 3.5}], codec)[0].references == ("3.5",)
    assert load_prompts([{"prompt": "p"}], codec)[0].references == ()


def test_ids(codec: Codec) -> None:
    assert [p.id for p in load_prompts([r | {"idx": i + 7} for i, r in enumerate(ROWS)], codec)] == ["7", "8", "9"]
    assert [p.id for p in load_prompts([r | {"key": r["prompt"]} for r in ROWS], codec, Fields(id="key"))][1] == "two"
    same = load_prompts([r | {"id": "x"} for r in [*ROWS, ROWS[0]]], codec)
    ids = [p.id for p in same]
    assert len(set(ids)) == 4
    assert ids == [p.id for p in load_prompts([*ROWS, ROWS[0]], codec)]
    assert ids[1] != load_prompts([ROWS[0], {"prompt": "other"}], codec)[1].id
    with pytest.raises(OperantError, match="no column 'kee': did you mean 'key'"):
        load_prompts([{"prompt": "a", "key": 1}], codec, Fields(id="kee"))


def test_chats(codec: Codec) -> None:
    user, answer = {"role": "user", "content": "one"}, {"role": "assistant", "content": "eins"}
    for row in ({"messages": [user, answer]}, {"prompt": [user], "completion": [answer]}):
        prompt = load_prompts([row], codec)[0]
        assert prompt.messages == (user,)
        assert prompt.text == "one"
        assert prompt.references == ("eins",)
        assert prompt.tokens.tolist() == codec.encode_prompt(messages=[user]).tolist()
        assert "eins" not in codec.decode(prompt.tokens)
        assert load_pairs([row], codec)[0].completion_text == "eins"
    with pytest.raises(OperantError, match="row 1 has nothing before the assistant"):
        load_prompts([{"messages": [answer]}], codec)
    with pytest.raises(OperantError, match="role 1 of a message is no text"):
        load_prompts([{"messages": [{"role": 1, "content": "hello"}]}], codec)
    with pytest.raises(OperantError, match="role"):
        load_prompts([{"messages": [{"user": "hello"}]}], codec)


def test_too_long_prompts(codec: Codec) -> None:
    rows = [{"prompt": "x" * n, "completion": "y"} for n in (3, 9, 12)]
    with pytest.raises(OperantError, match=r"2 of 3 prompts are longer than 5 tokens \(the longest has 13\)") as fault:
        load_prompts(rows, codec, max_prompt_tokens=5)
    assert "--max_prompt_tokens 13" in one_line(fault) and "--too_long skip or truncate" in str(fault.value)
    assert [p.text for p in load_prompts(rows, codec, max_prompt_tokens=5, too_long="skip")] == ["xxx"]
    assert len(load_prompts(rows, codec, max_prompt_tokens=13)) == 3
    cut = load_prompts(rows, codec, max_prompt_tokens=5, too_long="truncate")
    assert [codec.decode(p.tokens) for p in cut] == ["xxx\n", "xxxx\n", "xxxx\n"]
    assert [p.meta for p in cut] == [{}, {"truncated_prompt": True}, {"truncated_prompt": True}]
    encoded = load_prompts(rows, codec, max_prompt_tokens=5, too_long="truncate", encoder=True)
    assert [len(p.tokens) for p in encoded] == [4, 5, 5]
    assert all(p.tokens[-1] == codec.eos_id for p in encoded)
    with pytest.raises(OperantError, match="every prompt is longer than 2 tokens"):
        load_prompts(rows, codec, max_prompt_tokens=2, too_long="skip")
    with pytest.raises(OperantError, match="did you mean 'truncate'"):
        load_prompts(rows, codec, max_prompt_tokens=5, too_long="trunc")  # type: ignore[arg-type]


def test_wrong_field(codec: Codec) -> None:
    with pytest.raises(OperantError, match=r"no column 'promt': did you mean 'prompt'\? the columns are") as fault:
        load_prompts(ROWS, codec, Fields(prompt="promt"))
    assert "--prompt_field" in one_line(fault)
    with pytest.raises(OperantError, match="--reference_field"):
        load_prompts(ROWS, codec, Fields(references="refs"))
    with pytest.raises(OperantError, match="the columns are en, de; choose with --prompt_field"):
        load_prompts([{"en": "a", "de": "b"}], codec)
    with pytest.raises(OperantError, match="row 2 has nothing in the column 'prompt'"):
        load_prompts([{"prompt": "a"}, {"prompt": None}], codec)
    with pytest.raises(OperantError, match="row 1 has a dict in the column 'prompt'"):
        load_prompts([{"prompt": {"a": 1}}], codec)
    with pytest.raises(OperantError, match="no rows"):
        load_prompts([], codec)


# -- pairs and texts


def test_pairs_end_with_eos(codec: Codec) -> None:
    pairs = load_pairs(ROWS, codec)
    for pair, row in zip(pairs, ROWS, strict=True):
        assert pair.completion_text == row["completion"]
        assert pair.completion_tokens.tolist() == codec.encode(row["completion"], eos=True).tolist()
        assert pair.completion_tokens.dtype == np.int64
        assert pair.prompt.references == (row["completion"],)


def test_empty_cells_are_no_references(codec: Codec) -> None:
    rows = [{"prompt": "a", "references": ""}, {"prompt": "b", "references": [" ", "r"]}]
    assert [p.references for p in load_prompts(rows, codec)] == [(), ("r",)]
    assert load_prompts([{"prompt": "a", "completion": "c", "reference": ""}], codec)[0].references == ("c",)


def tables(folder: Path) -> dict[str, list[dict]]:
    """Two rows, of which the second has no answer, as each kind of table holds them."""
    import pandas
    import pyarrow
    import pyarrow.parquet

    nan = float("nan")
    (folder / "a.jsonl").write_text('{"prompt": "one", "reference": 1.5}\n{"prompt": "two", "reference": NaN}\n')
    (folder / "a.csv").write_text("prompt,reference\none,eins\ntwo,nan\n")
    columns = {"prompt": ["one", "two"], "reference": [1.5, nan]}
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "nan.parquet")
    pyarrow.parquet.write_table(pyarrow.table(columns | {"reference": ["eins", None]}), folder / "null.parquet")
    found = {name: load_rows(folder / name) for name in ("a.jsonl", "a.csv", "nan.parquet", "null.parquet")}
    for missing in (nan, None, np.float32("nan"), pandas.NA, pandas.NaT):
        frame = pandas.DataFrame(
            {"prompt": ["one", "two"], "reference": pandas.Series(["eins", missing], dtype=object)}
        )
        found[f"pandas {missing!r}"] = frame.to_dict("records")
    return found


def test_a_cell_that_is_not_a_number_is_missing_and_no_text(codec: Codec, tmp_path: Path) -> None:
    for name, rows in tables(tmp_path).items():
        first, second = load_prompts(rows, codec)
        assert first.references and second.references == (), name
        with pytest.raises(OperantError, match=r"row \S+ has no completion"):
            load_pairs(rows, codec)
        turned = [{"prompt": row["reference"], "completion": row["prompt"]} for row in rows]
        with pytest.raises(OperantError, match="row 2 has nothing in the column 'prompt'"):
            load_prompts(turned, codec)
        assert load_texts([{"text": row["reference"]} for row in rows]) == list(first.references), name
        listed = [{"prompt": "a", "references": [row["reference"] for row in rows]}]
        assert load_prompts(listed, codec)[0].references == first.references, name
        for side, other in (("chosen", "rejected"), ("rejected", "chosen")):
            pairs = [{"prompt": "a", side: row["reference"], other: "b"} for row in rows]
            with pytest.raises(OperantError, match=f"row 2 has nothing in the column '{side}'"):
                load_preferences(pairs, codec)
        rated = [{"prompt": "a", "completion": row["reference"], "label": True} for row in rows]
        with pytest.raises(OperantError, match="row 2 has nothing in the column 'completion'"):
            load_ratings(rated, codec)
        labels = [{"prompt": "a", "completion": "b", "label": label} for label in (True, rows[1]["reference"])]
        with pytest.raises(OperantError, match="row 2 has nothing in the column 'label'"):
            load_ratings(labels, codec)
        talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": rows[1]["reference"]}]
        with pytest.raises(OperantError, match="row 1, column 'messages', message 2 has nothing"):
            load_pairs([{"messages": talk}], codec)
    text = [{"prompt": "the word", "completion": "nan"}]  # a text that says so is one
    assert load_pairs(text, codec)[0].completion_text == "nan"


def test_too_long_completions(codec: Codec) -> None:
    rows = [{"prompt": "a", "completion": "y" * n} for n in (2, 8)]
    with pytest.raises(
        OperantError, match=r"1 of 2 completions are longer than 4 tokens .*the longest has 9.* --too_long"
    ):
        load_pairs(rows, codec, max_completion_tokens=4)
    assert len(load_pairs(rows, codec, max_completion_tokens=4, too_long="skip")) == 1
    cut = load_pairs(rows, codec, max_completion_tokens=4, too_long="truncate")[1]
    assert cut.completion_text == "yyyy"
    assert codec.eos_id not in cut.completion_tokens


def test_pairs_need_completions(codec: Codec) -> None:
    with pytest.raises(OperantError, match=r"row 5 has no completion: mend .*--reference_field .*prompt, id"):
        load_pairs([{"prompt": "a", "id": 5}], codec)


def test_texts() -> None:
    rows = [{"text": "one", "body": "x"}, {"text": "", "body": "y"}, {"text": None, "body": "z"}, {"text": "两"}]
    assert load_texts(rows) == ["one", "两"]
    assert load_texts(rows, Fields(text="body")) == ["x", "y", "z"]
    with pytest.raises(OperantError, match="no column 'txt': did you mean 'text'"):
        load_texts(rows, Fields(text="txt"))
    with pytest.raises(OperantError, match=r"no column 'text': the columns are prompt, completion; .*--text_field"):
        load_texts(ROWS)
    with pytest.raises(OperantError, match="every text in the column 'text' is empty"):
        load_texts([{"text": " "}])
    assert load_texts([{"text": ["a", " ", "b"]}, {"text": "c"}]) == ["a", "b", "c"]
    with pytest.raises(OperantError, match="row 1 has"):
        load_texts([{"text": {"a": 1}}])


def test_data_is_found_under_the_environments_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "store" / "tiny").mkdir(parents=True)
    (tmp_path / "store" / "tiny" / "train.jsonl").write_text('{"text": "there"}\n')
    (tmp_path / "store" / "tiny" / "dev.jsonl").write_text('{"text": "held out"}\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPERANT_DATA", str(tmp_path / "store"))
    assert load_rows("tiny") == [{"text": "there"}]
    assert splits("tiny") == ["train", "dev"]
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "train.jsonl").write_text('{"text": "here"}\n')
    assert load_rows("tiny") == [{"text": "here"}]  # what is at hand comes first
