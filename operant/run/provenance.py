"""Where a run's numbers come from: versions, commit, host, and hashes of its data and of the source of its reward."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import inspect
import itertools
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from operant.data.rows import data_files
from operant.rewards.combine import leaves
from operant.rewards.learned import ModelReward
from operant.types import OperantError

__all__ = ["Hash", "compare", "data_hash", "module_hashes", "provenance", "reward_hashes", "rows_hash", "source_hash"]

#: `sha256`, and in words what that is the digest `of`. Two are comparable where they are of the same.
Hash = dict[str, Any]

#: Settings that name data.
_DATA = ("data", "dev_data", "sft_data", "logged", "replay")
_IN_WORDS = {
    "data": "{}", "rows": "the rows given in Python", "template": "the chat template", "reward": "the source of {}",
}  # fmt: skip
#: Bytes of a file that are hashed whole. Of a larger one, its size and so many bytes at each end, half of this each.
WHOLE = 64 << 20


def provenance(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What run.json keeps of where a run was made.

    settings: of the run, by name. Data that cannot be read is left out: its stage says so.

    Returns `versions` (operant, python, torch, transformers), `commit` (of the working folder's git repository, or of
    the one that the package is in; `-dirty` ends it where files were changed; None outside of any), `host`, and `data`
    ({source: `data_hash`}).
    """
    sources = [str(settings[name]) for name in _DATA if settings.get(name)]
    hashes: dict[str, Any] = {}
    for source in sources:
        with contextlib.suppress(OSError, OperantError, ValueError):
            hashes[source] = data_hash(source)
    return {"versions": _versions(), "commit": _commit(), "host": platform.node(), "data": hashes}


def compare(facts: Mapping[str, Any], sources: Mapping[str, Mapping[str, Hash]]) -> tuple[list[str], list[str]]:
    """(what of the sources is not what a run.json says, in words; the kinds that it keeps no hash of).

    facts: a run.json. Where a run was resumed with other sources, the newest count. sources: {kind: {name: `Hash`}}, of
    the kinds data, rows, template and reward.
    """
    changed, unknown = [], []
    for kind, named in sources.items():
        kept = next((o[kind] for o in [*facts.get("resumed_from", [])[::-1], facts] if kind in o), None)
        if kept is None:
            unknown.append(kind)
            continue
        for name, one in named.items():
            before = kept.get(name, one)
            if before["of"] == one["of"] and before["sha256"] != one["sha256"]:
                changed.append(_IN_WORDS[kind].format(name))
    return changed, unknown


def data_hash(source: str) -> Hash:
    """{`sha256`, `of`, `bytes`, `files`} of a data set: its digest, and in words what that is the digest of.

    It is of the files' contents, in the order of their names. A file above `WHOLE` bytes counts by its size and its
    ends. A hub data set has its name hashed and nothing else.

    Raises OperantError or OSError for what cannot be read.
    """
    files = data_files(source)
    if not files:
        return {
            "sha256": hashlib.sha256(source.encode()).hexdigest(),
            "of": "its name on the hub",
            "bytes": 0,
            "files": 0,
        }
    return _files_hash(files)


def rows_hash(rows: Sequence[Any], most: int = 10_000) -> Hash:
    """The hash of rows that were made in Python: texts, numbers, arrays, and whatever holds these.

    Of more than `most` rows it is of so many, evenly spread, and of their number. What is none of these, such as a
    picture's own type, counts by the name of its type.
    """
    digest = hashlib.sha256(f"{len(rows)}\n".encode())
    chosen = range(len(rows)) if len(rows) <= most else np.linspace(0, len(rows) - 1, most).astype(int).tolist()
    for place in chosen:
        for part in _parts(rows[place]):
            digest.update(f"{len(part)}:".encode())
            digest.update(part)
    of = "its rows" if len(chosen) == len(rows) else f"{most:,} of its rows"
    return {"sha256": digest.hexdigest(), "of": of, "rows": len(rows)}


def reward_hashes(reward: Any) -> dict[str, Hash]:
    """The hash of each part of a reward that lies outside of operant, by the part's name.

    Of a function or class it is `source_hash`, of a reward model the contents of its folder. What a function imports
    from elsewhere, and what a closure holds, is not seen.
    """
    found: dict[str, Hash] = {}
    for leaf in leaves(reward):
        if isinstance(leaf, ModelReward):
            for folder in map(Path, getattr(leaf, "paths", (leaf.path,))):
                if folder.is_dir():
                    found[str(folder)] = _files_hash(sorted(file for file in folder.rglob("*") if file.is_file()))
        elif (one := source_hash(leaf)) is not None:
            found[str(leaf.name)] = one
    return found


def module_hashes(name: str) -> dict[str, Hash]:
    """{name: hash} of the file that the module in `module:attribute` is; nothing for a name without one."""
    module, colon, _ = name.partition(":")
    with contextlib.suppress(ImportError, ValueError, OSError):
        spec = importlib.util.find_spec(module) if colon else None
        if spec is not None and spec.origin and Path(spec.origin).is_file():
            return {name: _files_hash([Path(spec.origin)])}
    return {}


def source_hash(thing: Any) -> Hash | None:
    """The hash of the source that a function, a class or an object is made by; None where that is operant or unknown.

    It is of the whole file of its module, since a function rests on what stands beside it; in a program that runs as
    `__main__`, whose file holds the settings too, of the function's or the class's own lines.
    """
    made = _maker(thing)
    name = str(getattr(made, "__module__", "") or "")
    if not name or name.partition(".")[0] in ("operant", "builtins"):
        return None
    with contextlib.suppress(OSError, TypeError):
        file = getattr(sys.modules.get(name), "__file__", None)
        if name != "__main__" and file and Path(file).suffix == ".py":
            return _files_hash([Path(file)]) | {"of": "the file of its module"}
        return {"sha256": hashlib.sha256(inspect.getsource(made).encode()).hexdigest(), "of": "its own lines"}
    return None


def _maker(thing: Any) -> Any:
    """The function or class behind what wraps it."""
    while True:
        if isinstance(thing, functools.partial):
            thing = thing.func
        elif inspect.ismethod(thing):
            thing = thing.__func__
        elif hasattr(thing, "__wrapped__"):
            thing = thing.__wrapped__
        elif type(thing).__module__ == "operant.rewards.seam":  # what makes a function a reward
            thing = getattr(thing, "function", None) or getattr(thing, "reward", None)
        else:
            return thing if inspect.isfunction(thing) or inspect.isclass(thing) else type(thing)


def _parts(value: Any) -> Iterable[bytes]:
    """The bytes that tell a value from another one, piece by piece."""
    if isinstance(value, np.ndarray):
        yield str(value.dtype).encode()
        yield np.ascontiguousarray(value).tobytes()
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from itertools.chain.from_iterable(_parts(getattr(value, f.name)) for f in dataclasses.fields(value))
    elif isinstance(value, Mapping):
        yield f"{{{len(value)}".encode()
        yield from itertools.chain.from_iterable(_parts(one) for pair in value.items() for one in pair)
    elif isinstance(value, list | tuple):
        yield f"[{len(value)}".encode()
        yield from itertools.chain.from_iterable(map(_parts, value))
    elif value is None or isinstance(value, str | int | float):
        yield repr(value).encode("utf-8", "surrogatepass")
    else:
        yield type(value).__qualname__.encode()


def _files_hash(files: Sequence[Path]) -> Hash:
    digest, size, cut = hashlib.sha256(), 0, 0
    for file in files:
        length = file.stat().st_size
        size += length
        with file.open("rb") as stream:
            if length <= WHOLE:
                while part := stream.read(1 << 20):
                    digest.update(part)
                continue
            cut += 1
            digest.update(f"{length}\n".encode())
            digest.update(stream.read(WHOLE // 2))
            stream.seek(length - WHOLE // 2)
            digest.update(stream.read(WHOLE // 2))
    of = "the contents of its files"
    if cut:
        of += f", of {cut} above {WHOLE >> 20} MiB their sizes and the {WHOLE >> 21} MiB at each end"
    return {"sha256": digest.hexdigest(), "of": of, "bytes": size, "files": len(files)}


def _versions() -> dict[str, str]:
    from operant import __version__

    found = {"operant": __version__, "python": platform.python_version()}
    for name in ("torch", "transformers"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _commit() -> str | None:
    """The commit of the repository around the working folder, else of the one around the package."""
    for folder in (Path.cwd(), Path(__file__).parent):
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            described = subprocess.run(
                ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
                cwd=folder, capture_output=True, text=True, timeout=10, check=True,
            )  # fmt: skip
            return described.stdout.strip()
    return None
