"""From files and hub data sets to rows, and what stands in the columns of a row.

JSON Lines and CSV are read as they stand: a typed table would fill absent keys, turn "007" into 7 and lose the number
of a broken line. Parquet, Arrow folders and hub data sets come through `datasets`. Nothing is ever written beside the
user's data.
"""

from __future__ import annotations

import contextlib
import csv
import difflib
import glob
import gzip
import io
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from operant.data.chat import is_nothing, read_messages
from operant.data.hub import reached
from operant.data.text import looks_like_path
from operant.types import OperantError

__all__ = [
    "Fields",
    "Row",
    "data_files",
    "first_split",
    "held_out_source",
    "load_rows",
    "load_split_rows",
    "split_rows",
    "splits",
]

Row = dict[str, Any]
T = TypeVar("T")

SPLIT_NAMES = {
    "train": ("train", "training"),
    "dev": ("dev", "validation", "valid", "val", "eval"),
    "test": ("test",),
}
GUESSES = {
    "prompt": ("prompt",),
    "completion": ("completion",),
    "references": ("references", "reference"),
    "messages": ("messages", "conversations"),
    "text": ("text",),
    "chosen": ("chosen", "edited"),
    "rejected": ("rejected", "original"),
    "label": ("label", "thumb"),
}


@dataclass(frozen=True, slots=True)
class Fields:
    """Which column holds what. None takes the usual name where there is such a column.

    The usual names are `prompt`, `completion`, `references` or `reference`, `messages` or `conversations` and `text`;
    of preferences `chosen` or `edited`, `rejected` or `original`, `label` or `thumb`; `id` or `idx` names a row. A dot
    reaches into a nested column: `translation.de`. References default to the completion. Where there is no `prompt` and
    no chat, `instruction`, with `input` or `context` below it, is the prompt and `output` or `response` the completion.
    """

    prompt: str | None = None
    completion: str | None = None
    references: str | None = None
    messages: str | None = None
    text: str | None = None
    id: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    label: str | None = None


# -- rows


def load_rows(source: str | Path, split: str = "train", limit: int | None = None) -> list[Row]:
    """The rows of a data set, in order.

    Args:
        source: where it is, here or under the folder that the environment variable OPERANT_DATA names. A file
            (.jsonl, .json, .csv, .tsv, .txt, each also with .gz; .parquet), a folder that holds one or more of them
            for each split (`train.jsonl.gz`, `dev.jsonl`, `test-00000.parquet`, …) or is `save_to_disk`'s,
            or a hub id (`owner/name`, or `owner/name:config`). A .txt file is one row with one `text`.
        split: which split of a folder or hub data set; "dev" and "validation" are the same. A file has no splits and is
            given whole.
        limit: at most so many rows, the first ones.

    Raises:
        OperantError: nothing there, nothing in it, no such split, or it cannot be read (with the line).
    """
    if limit is not None and limit < 1:
        raise OperantError(f"limit {limit} leaves no rows: give at least 1, or leave it out")
    with _reachable(source):
        path = _place(source)
        if path.is_file():
            rows = _read_files([path], limit)
        elif path.is_dir():
            rows = _read_folder(path, split, limit)
        elif looks_like_path(str(source)) or _reader(path) is not None:
            raise OperantError(
                f"there is no data at {source}: give a file (.jsonl, .csv, .parquet), a folder or a hub id"
            )
        else:
            rows = _read_hub(str(source), split, limit)
    if not rows:
        raise OperantError(f"{source} holds no rows: give data with at least one row")
    return rows


def load_split_rows(
    data: str, dev_data: str | None, limit: int | None, share: float, most: int
) -> tuple[list[Row], list[Row]]:
    """(training rows, dev rows): `dev_data` if given, else the dev split of `data`, else its last `share` of rows.

    At most `most` dev rows; 0 holds nothing out. Raises OperantError where there is no data, or it cannot be read.
    """
    if not data:
        raise OperantError("no data given; add --data FILE (JSON Lines, CSV, Parquet, a folder or a hub data set)")
    rows = load_rows(data, split="train", limit=limit)
    if not most:
        return rows, []
    if dev_data:
        return rows, load_rows(dev_data, split="dev", limit=most)
    if "dev" in splits(data):
        return rows, load_rows(data, split="dev", limit=most)
    return split_rows(rows, share, most)


def held_out_source(data: str, dev_data: str | None) -> str:
    """Where `load_split_rows` takes the held-out rows from, in words.

    Raises OperantError for a folder that cannot be read.
    """
    if dev_data:
        return f"the dev split of {dev_data}" if "dev" in splits(dev_data) else dev_data
    return f"the dev split of {data}" if "dev" in splits(data) else f"the end of {data}"


def first_split(source: str | Path, *wanted: str) -> str:
    """The first of the wanted splits that a folder or hub data set holds; "" for a file, which has none.

    Where it holds none of them, the last wanted one: `load_rows` then says what there is.

    Raises OperantError for a folder that cannot be read.
    """
    with _reachable(source):
        if _place(source).is_file():
            return ""
    held = splits(source)
    return next((split for split in wanted if split in held), wanted[-1])


def split_rows(rows: Sequence[T], share: float, most: int) -> tuple[list[T], list[T]]:
    """(training rows, held-out rows): the last `share` of them, at most `most`, for data without a dev split."""
    count = min(most, max(1, int(len(rows) * share))) if len(rows) > 1 else 0
    return list(rows[: len(rows) - count]), list(rows[len(rows) - count :])


def splits(source: str | Path) -> list[str]:
    """The splits that a folder or hub data set holds, of "train", "dev" and "test". A file has none.

    Raises OperantError for a folder that cannot be read.
    """
    names: list[str] = []
    with _reachable(source):
        path = _place(source)
        if path.is_dir():
            saved = _saved_splits(path)
            names = saved if saved is not None else [_stem(file) for file in _data_files(path)]
        elif not (path.exists() or looks_like_path(str(source)) or _reader(path)):
            with contextlib.suppress(OperantError):  # out of reach: `load_rows` says so where it matters
                names = _hub_splits(str(source))
    return [split for split in SPLIT_NAMES if any(_is_split(name, split) for name in names)]


@contextlib.contextmanager
def _reachable(source: str | Path) -> Iterator[None]:
    """Folders that may not be read, names that are too long, loops of links: one line."""
    try:
        yield
    except OSError as error:
        shown = str(source) if len(str(source)) <= 200 else f"{str(source)[:200]}…"
        raise OperantError(f"{shown} cannot be read: give data that you may read ({error.strerror})") from error


def _place(source: str | Path) -> Path:
    """The path itself, or the one of that name under OPERANT_DATA if only that is there."""
    path = Path(source).expanduser()
    root = os.environ.get("OPERANT_DATA")
    if root and not path.is_absolute() and not path.exists() and (there := Path(root).expanduser() / path).exists():
        return there
    return path


def _stem(file: Path) -> str:
    return file.name.split(".", 1)[0]


def _is_split(name: str, split: str) -> bool:
    """`dev`, `dev-00000-of-00002` and `dev_1` are of the split "dev", `developers` is not."""
    wanted = next((names for names in SPLIT_NAMES.values() if split in names), (split,))
    return any(name == word or name.startswith((f"{word}-", f"{word}_")) for word in wanted)


def data_files(source: str | Path) -> list[Path]:
    """The files of a data set, in order: the file itself, all of a folder's, none of a hub data set's.

    Raises OperantError for a folder that cannot be read.
    """
    with _reachable(source):
        path = _place(source)
        if path.is_file():
            return [path]
        if not path.is_dir():
            return []
        if _saved_splits(path) is not None:
            return sorted(file for file in path.rglob("*.arrow") if file.is_file())
        return _data_files(path)


def _data_files(folder: Path) -> list[Path]:
    inside = [folder, folder / "data"]
    return sorted(f for place in inside if place.is_dir() for f in place.iterdir() if f.is_file() and _reader(f))


def _read_folder(folder: Path, split: str, limit: int | None) -> list[Row]:
    saved = _saved_splits(folder)
    if saved is not None:
        return _read_saved(folder, saved, split, limit)
    files = _data_files(folder)
    if not files:
        raise OperantError(f"the folder {folder} holds no data: put {split}.jsonl (or .csv, .parquet, .gz) into it")
    chosen = [file for file in files if _is_split(_stem(file), split)]
    if not chosen:
        names = ", ".join(file.name for file in files[:8])
        raise OperantError(
            f"the folder {folder} has no split {split!r} (it holds {names}): name a split or a file of it"
        )
    return _read_files(chosen, limit)


def _read_files(files: Sequence[Path], limit: int | None) -> list[Row]:
    rows: list[Row] = []
    for file in files:
        reader = _reader(file)
        if reader is None:
            raise OperantError(
                f"{file} is no data file that can be read: use .jsonl, .json, .csv, .tsv, .txt or .parquet"
            )
        left = None if limit is None else limit - len(rows)
        try:
            rows.extend(islice(reader(file), left))
        except UnicodeDecodeError as error:
            raise OperantError(f"{file} is not UTF-8: save it as UTF-8 ({error})") from error
        except (OSError, EOFError, zlib.error) as error:
            raise OperantError(f"{file} cannot be read: check that it is whole and readable ({error})") from error
    return rows


def _reader(file: Path) -> Callable[[Path], Iterable[Row]] | None:
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return _READERS.get(suffixes[-1]) if suffixes else None


def _open(file: Path) -> io.TextIOBase:
    if file.suffix.lower() == ".gz":
        return gzip.open(file, "rt", encoding="utf-8-sig", newline="")
    return file.open(encoding="utf-8-sig", newline="")


def _parsed(text: str, place: str) -> Any:
    """The value of a JSON text. Raises json.JSONDecodeError, and OperantError for JSON that Python cannot hold."""
    try:
        value = json.loads(text)
        if "\\ud" in text.lower():  # half of a surrogate pair is valid JSON and no text
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError:
        raise
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])[1:-1]
        raise OperantError(f"{place} holds half of a character ({half}): remove it or add its other half") from error
    except RecursionError as error:
        raise OperantError(f"{place} is nested too deeply: flatten or remove it") from error
    except ValueError as error:  # Python reads no number of more digits than this
        digits = sys.get_int_max_str_digits()
        raise OperantError(f"{place} holds a number of more than {digits} digits: write it as a text") from error
    return value


def _read_jsonl(file: Path) -> Iterator[Row]:
    with _open(file) as lines:
        # Split at newlines alone: a JSON string may hold U+2028 and its kin.
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = _parsed(line, f"{file}, line {number}")
            except json.JSONDecodeError as error:
                raise OperantError(
                    f"{file}, line {number} is no JSON: mend or remove that line ({error.msg}, column {error.colno})"
                ) from error
            if not isinstance(row, dict):
                raise OperantError(f'{file}, line {number} is no JSON object: each line must be like {{"prompt": "…"}}')
            yield row


def _read_json(file: Path) -> list[Row]:
    with _open(file) as stream:
        content = stream.read()
    if not content.strip():
        return []
    try:
        rows = _parsed(content, str(file))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # JSON Lines under the name .json is common.
            return list(_read_jsonl(file))
        raise OperantError(f"{file}, line {error.lineno} is no JSON: mend that line ({error.msg})") from error
    if isinstance(rows, dict):
        lists = [value for value in rows.values() if isinstance(value, list)]
        rows = lists[0] if len(rows) == 1 and lists else [rows]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise OperantError(f"{file} is no list of JSON objects: give a list of rows, or JSON Lines")
    return rows


_CSV_NAN = ("nan", "NaN", "NAN")


def _read_csv(file: Path, delimiter: str = ",") -> Iterator[Row]:
    with _open(file) as stream:
        csv.field_size_limit(2**31 - 1)  # the most that a C long holds everywhere; the default refuses long documents
        reader = csv.DictReader(stream, delimiter=delimiter, strict=True)
        try:
            names = reader.fieldnames or []
            for name in names:
                if names.count(name) > 1:
                    raise OperantError(f"{file} has two columns {name!r}: rename or remove one of them")
            for row in reader:
                if None in row or None in row.values():
                    raise OperantError(
                        f"{file}, line {reader.line_num} has not as many cells as the header: quote cells with commas"
                    )
                # what libraries that know no null write for one; of an empty cell its reader decides
                yield {name: None if text in _CSV_NAN else text for name, text in row.items()}
        except csv.Error as error:
            # DictReader's own line_num is that of the last row it gave
            line = reader.reader.line_num
            raise OperantError(f"{file}, line {line} is no CSV: mend that line ({error})") from error


def _read_tsv(file: Path) -> Iterator[Row]:
    return _read_csv(file, delimiter="\t")


def _read_text(file: Path) -> list[Row]:
    with _open(file) as stream:
        content = stream.read()
    return [{"text": content}] if content.strip() else []


def _read_parquet(file: Path) -> Iterator[Row]:
    with _quiet(f"{file} cannot be read as Parquet: write it again"):
        from datasets import load_dataset

        # Streaming reads the file where it lies and caches nothing.
        stream = load_dataset("parquet", data_files=glob.escape(str(file)), split="train", streaming=True)
        for row in stream:
            yield dict(row)


_READERS: dict[str, Callable[[Path], Iterable[Row]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".txt": _read_text,
    ".parquet": _read_parquet,
}


def _saved_splits(folder: Path) -> list[str] | None:
    """The splits of a folder that `save_to_disk` wrote ([] for a single set), or None for any other folder."""
    index = folder / "dataset_dict.json"
    if index.is_file():
        try:
            return [str(name) for name in json.loads(index.read_text(encoding="utf-8"))["splits"]]
        except (ValueError, KeyError, TypeError) as error:
            raise OperantError(f"{index} names no splits: write the folder again with save_to_disk") from error
    return [] if (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file() else None


def _read_saved(folder: Path, names: list[str], split: str, limit: int | None) -> list[Row]:
    name = next((name for name in names if _is_split(name, split)), None)
    if names and name is None:
        raise OperantError(f"{folder} has no split {split!r}: it has {', '.join(names)}")
    with _quiet(f"{folder} cannot be read: write it again with save_to_disk"):
        from datasets import load_from_disk

        data = load_from_disk(str(folder if name is None else folder / name))
        return [dict(row) for row in (data if limit is None else data.take(limit))]


_NO_HUB = "cannot load {} from the hub: give a file, a folder or the id of a data set"


def _hub_splits(source: str) -> list[str]:
    name, _, config = source.partition(":")
    with _quiet(_NO_HUB.format(source)), reached(source):
        from datasets import get_dataset_split_names

        return list(get_dataset_split_names(name, config or None))


def _read_hub(source: str, split: str, limit: int | None) -> list[Row]:
    name, _, config = source.partition(":")
    available = _hub_splits(source)
    with _quiet(_NO_HUB.format(source)), reached(source):
        from datasets import load_dataset

        chosen = split if split in available else next((word for word in available if _is_split(word, split)), None)
        if chosen is None:
            raise OperantError(f"{source} has no split {split!r}: it has {', '.join(available)}")
        data = load_dataset(name, config or None, split=chosen, streaming=limit is not None)
        return [dict(row) for row in (data if limit is None else data.take(limit))]


@contextlib.contextmanager
def _quiet(fault: str) -> Iterator[None]:
    """No progress bars of `datasets`; its faults, which are of many types, become one line."""
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging

    silent, loudness = are_progress_bars_disabled(), logging.get_verbosity()
    disable_progress_bars()
    logging.set_verbosity(logging.CRITICAL)  # it logs faults that it raises as well
    try:
        yield
    except OperantError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise OperantError(f"{fault} ({reason})") from error
    finally:
        logging.set_verbosity(loudness)
        if not silent:
            enable_progress_bars()


# -- columns

ABSENT: Any = object()


def cell(row: Row, column: str) -> Any:
    """The value of a column; None where a value is missing, `ABSENT` where the row has no such column. A dot reaches
    into nested rows."""
    if column in row:
        return None if is_missing(row[column]) else row[column]
    value: Any = row
    for part in column.split("."):
        if not isinstance(value, dict) or part not in value:
            return ABSENT
        value = value[part]
    return None if is_missing(value) else value


def is_missing(value: Any) -> bool:
    """Whether a cell holds no value: there is none, or `chat.is_nothing`."""
    return value is ABSENT or is_nothing(value)


def columns_of(rows: Sequence[Row]) -> list[str]:
    """Every column of the first rows, nested ones with a dot."""
    names: dict[str, None] = {}
    for row in rows[:100]:
        for name, value in row.items():
            names[name] = None
            if isinstance(value, dict):
                names.update({f"{name}.{inner}": None for inner in value})
    return list(names)


def find_column(rows: Sequence[Row], role: str, given: str | None, flag: str = "") -> str | None:
    """The column for a role: the given one, which must exist, or the first usual name that does.

    Raises OperantError, with the nearest name and the flag that chooses, when the given one does not exist.
    """
    if given is None:
        return next((name for name in GUESSES[role] if any(name in row for row in rows)), None)
    if any(cell(row, given) is not ABSENT for row in rows):
        return given
    raise OperantError(no_column(rows, role, given, flag))


def no_column(rows: Sequence[Row], role: str, wanted: str, flag: str = "") -> str:
    """The line that says that a column is not there, which is nearest, which there are, and how to choose."""
    columns = columns_of(rows)
    near = difflib.get_close_matches(wanted, columns, n=1) or difflib.get_close_matches(
        wanted.lower(), [column for column in columns if column == column.lower()], n=1
    )
    hint = f"did you mean {near[0]!r}? " if near else ""
    flag = flag or f"--{'reference' if role in ('references', 'completion') else role}_field"
    return f"there is no column {wanted!r}: {hint}the columns are {', '.join(columns[:20])}; choose with {flag}"


def text_of(value: Any, column: str, number: int) -> str:
    """The value as a text. Raises OperantError, naming the row, for what is none, a missing one included."""
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool) and not is_missing(value):
        return str(value)
    what = "nothing" if is_missing(value) else f"a {type(value).__name__}"
    raise OperantError(
        f"row {number} has {what} in the column {column!r} where a text is needed: mend or remove the row"
    )


def as_instructions(rows: Sequence[Row], fields: Fields) -> list[Row]:
    """Rows of instruction and output with `prompt` and `completion` in their place, other rows as they are, and all
    where `fields` names a column.

    Raises OperantError, naming the row, for an instruction or its input that is no text.
    """
    given = (fields.prompt, fields.messages, fields.completion, fields.references)
    if not rows or any(given) or any(name in row for row in rows for name in ("prompt", *GUESSES["messages"])):
        return list(rows)
    answer = next((name for name in ("output", "response") if name in rows[0]), None)
    if "instruction" not in rows[0] or answer is None or any("completion" in row for row in rows):
        return list(rows)
    below = next((name for name in ("input", "context") if name in rows[0]), "")
    made = []
    for number, row in enumerate(rows, start=1):
        asked = text_of(row.get("instruction"), "instruction", number)
        if (more := row.get(below)) and not is_missing(more):
            asked += f"\n\n{text_of(more, below, number)}"
        rest = {name: value for name, value in row.items() if name not in ("instruction", below, answer)}
        made.append({"prompt": asked, "completion": row.get(answer)} | rest)
    return made


def is_chat(value: Any) -> bool:
    """Whether a value is a list of messages."""
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(turn, dict) for turn in value)


def texts_of(value: Any, column: str, number: int) -> tuple[str, ...]:
    """One text, a list of them, or an assistant's message, as a tuple of texts; a missing value gives none."""
    if is_missing(value):
        return ()
    if is_chat(value):
        read = read_messages(value, f"row {number}, column {column!r}")
        return ("\n".join(turn["content"] for turn in read),)
    if isinstance(value, (list, tuple)):
        return tuple(text_of(item, column, number) for item in value if not is_missing(item))
    return (text_of(value, column, number),)
