"""What lies in a model's folder: whole weights, or the name of the base whose weights it stands on.

    base/       weights that are nowhere else; they come along wherever the folder goes
    base.json   {"hub", "revision"}, or {"path", "sha256"}: the base by its hub id, or by where it is from here and the
                hash of its weights

An adapter's folder has one of the two. A folder with `config.json`, `base.json` and no weights is the base itself.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import shutil
import stat
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from operant.data.hub import reached
from operant.data.text import looks_like_path
from operant.types import OperantError

__all__ = [
    "ADAPTER", "BASE", "INNER", "Base", "call_base", "copy_linked", "count_weights", "expect_all_weights",
    "expect_base", "find_base", "hash_weights", "holds", "hub_base", "link_or_copy", "name_base", "open_to_others",
    "settle", "weight_files", "weights_dtype",
]  # fmt: skip

ADAPTER, BASE, INNER = "adapter_config.json", "base.json", "base"
_INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_WHOLE = ("model.safetensors", "pytorch_model.bin")
_HASHES: dict[tuple[int, int, int, int], str] = {}  # by (device, inode, size, time): links to one file share theirs


@dataclass(frozen=True, slots=True)
class Base:
    """Where the weights lie that a model began with.

    place: a folder or a GGUF file on this machine. hub, revision: by which a hub knows it; "" for none.
    inner: it lies in the adapter's own folder, and goes where that goes. sure: the model was compared with it.
    """

    place: Path
    hub: str = ""
    revision: str = ""
    inner: bool = False
    sure: bool = False

    @property
    def source(self) -> str:
        """What to load it by."""
        return self.hub or str(self.place)

    def moved_to(self, folder: Path) -> Base:
        """The same after the adapter's folder has moved there."""
        return dataclasses.replace(self, place=folder.resolve() / INNER) if self.inner else self


# --- weights in files ------------------------------------------------------------------------------------------------


def weight_files(place: Path) -> list[Path]:
    """The files of a folder that hold a model's weights, or the GGUF file itself; empty where there are none."""
    if place.is_file():
        return [place]
    for name in (*_INDICES, *_WHOLE):
        file = place / name
        if file.exists() and name in _WHOLE:
            return [file]
        if file.exists():
            shards: dict[str, str] = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
            return [place / shard for shard in sorted(set(shards.values()))]
    return []


def hash_weights(place: Path) -> str:
    """The sha256 of a model's weights: of their file, or of the lines "sha256  name" of several.

    A file is read once in a process, and again when its size or its time has changed.
    """
    files = weight_files(place)
    hashes = [_hash(file) for file in files]
    if len(files) == 1:
        return hashes[0]
    lines = "".join(f"{digest}  {file.name}\n" for digest, file in zip(hashes, files, strict=True))
    return hashlib.sha256(lines.encode()).hexdigest()


def _hash(file: Path) -> str:
    found = file.stat()
    known = found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
    if known not in _HASHES:
        with file.open("rb") as stream:
            _HASHES[known] = hashlib.file_digest(stream, "sha256").hexdigest()
    return _HASHES[known]


def holds(place: Path, weights: Mapping[str, Tensor], prefix: str = "") -> bool:
    """Whether the safetensors files of a folder hold exactly these weights, each in its own precision.

    weights: float[…] of any shape, by name. prefix: which the names in the files may lack. Of weights that share their
    memory one has to be there. Ends at the first weight that differs.
    """
    files = weight_files(place)
    if not files or any(file.suffix != ".safetensors" or not file.exists() for file in files):
        return False
    left, found = dict(weights), set()
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                mine = left.pop(name, left.pop(prefix + name, None))
                if mine is None:
                    continue
                if list(mine.shape) != opened.get_slice(name).get_shape():
                    return False
                if not torch.equal(opened.get_tensor(name).to(mine.dtype), mine.cpu()):
                    return False
                found.add(mine.data_ptr())
    return all(mine.data_ptr() in found for mine in left.values())


def weights_dtype(place: Path) -> torch.dtype:
    """The precision of most weights in a folder's safetensors files; float32 where there are none."""
    kinds: Counter[torch.dtype] = Counter()
    for file in weight_files(place):
        if file.suffix != ".safetensors":
            continue
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                tensor = opened.get_tensor(name)
                if tensor.is_floating_point():
                    kinds[tensor.dtype] += tensor.numel()
    return kinds.most_common(1)[0][0] if kinds else torch.float32


def count_weights(source: str | Path) -> int | None:
    """How many weights a folder's model has, or that of a hub id in the cache: of an adapter, those of its base.

    Read from the headers of safetensors files; a file of another kind is taken to hold float32. None where files are
    missing or cannot be read.
    """
    place = _place_of_weights(source)
    files = [] if place is None else weight_files(place)
    count = 0
    try:
        for file in files:
            if file.suffix != ".safetensors":
                count += file.stat().st_size // 4
                continue
            with safe_open(file, framework="pt") as opened:
                count += sum(math.prod(opened.get_slice(name).get_shape()) for name in opened.keys())  # noqa: SIM118
    except (OSError, SafetensorError):
        return None
    return count or None


def _place_of_weights(source: str | Path) -> Path | None:
    """The folder in which a model's weights lie, of an adapter its base's. It may be gone."""
    from huggingface_hub import try_to_load_from_cache

    folder, hub, revision = Path(source), "", None
    if os.path.isdir(folder):  # unlike Path's, false for an impossible name
        facts = _facts(folder)
        if (folder / ADAPTER).exists() and not facts:
            return folder / INNER if (folder / INNER).is_dir() else None
        if not facts.get("hub"):
            there = folder.resolve() / facts["path"] if facts else folder
            return there if there.exists() else folder / INNER
        hub, revision = facts["hub"], facts["revision"]
    elif not looks_like_path(str(source)):
        hub = str(source)
    try:
        found = try_to_load_from_cache(hub, "config.json", revision=revision) if hub else None
    except ValueError:  # no hub has such a name
        return None
    return Path(found).parent if isinstance(found, str) else None


def expect_all_weights(source: str | Path, loading: Mapping[str, Any], *, needed: str = "") -> None:
    """Refuse a model of which weights were not in its files: they would be random ones.

    loading: what Transformers says of the loading. needed: what the names of weights that may not be new begin with.
    Raises OperantError with one of the names, and one that the model has no place for.
    """
    missing = sorted(name for name in loading["missing_keys"] if name.startswith(needed))
    if missing:
        other = sorted(loading.get("unexpected_keys") or ())
        instead = f" (it has {other[0]}, which the model has no place for)" if other else ""
        raise OperantError(
            f"{source} lacks {len(missing)} of the model's weights, such as {missing[0]}{instead}; "
            "give a folder or file of the whole model"
        )


def open_to_others(folder: Path) -> None:
    """Let whoever may read a folder's configuration read its weights, which safetensors writes for the owner alone."""
    for file in folder.rglob("*.safetensors"):
        beside = next((file.parent / n for n in (ADAPTER, "config.json") if (file.parent / n).exists()), None)
        if beside is not None and _mode(file) != _mode(beside):
            file.chmod(_mode(beside))


def _mode(file: Path) -> int:
    return stat.S_IMODE(file.stat().st_mode)


# --- the base --------------------------------------------------------------------------------------------------------


def name_base(base: Base, folder: Path, final: Path | None = None) -> tuple[str, str | None]:
    """Write down in a folder what its base is. Returns what PEFT is to call it: (name or path, revision).

    final: where the folder will stand, from which the path is; itself when left out.
    """
    if base.hub:
        facts = {"hub": base.hub, "revision": base.revision}
    else:
        there = "base" if base.inner else _relative(base.place, final or folder)
        facts = {"path": there, "sha256": hash_weights(base.place)}
    _replace(folder / BASE, json.dumps(facts, indent=1))
    return (base.hub, base.revision or None) if base.hub else (facts["path"], None)


def find_base(folder: Path) -> Base:
    """The base that a folder names, as this version wrote it, an earlier one, or PEFT.

    Raises OperantError when it is gone or has other weights, by its name.
    """
    facts = _facts(folder)
    if not facts:
        return _find_base_of_peft(folder)
    if facts.get("hub"):
        return Base(_cached(facts["hub"], facts["revision"]), facts["hub"], facts["revision"])
    place, inner = folder.resolve() / facts["path"], folder / INNER
    if not place.exists() and inner.is_dir():
        place = inner
    wanted = facts["sha256"]
    if not weight_files(place):
        raise OperantError(
            f"the base of {folder}, {facts['path']} from there, is gone; put the model whose weights have the sha256 "
            f"{wanted[:12]}… back to {place}, or into {inner}"
        )
    if (found := hash_weights(place)) != wanted:
        raise OperantError(
            f"{place} is not the base that {folder} stands on: its weights have the sha256 {found[:12]}… and not "
            f"{wanted[:12]}…; put that model back there, or into {inner}"
        )
    return Base(place.resolve(), inner=place.resolve() == inner.resolve())


def expect_base(folder: Path, base: Base) -> None:
    """Refuse an adapter's folder that stands on another base than this one, where both are known.

    Raises OperantError when it does.
    """
    facts = _facts(folder)
    same = not facts or (
        (facts["hub"], facts["revision"]) == (base.hub, base.revision)
        if facts.get("hub")
        else facts["sha256"] == hash_weights(base.place)
    )
    if not same:
        raise OperantError(
            f"{folder} stands on another base than {base.source}, or that has changed since; give the one it began with"
        )


def _find_base_of_peft(folder: Path) -> Base:
    if (folder / INNER).is_dir():
        return Base(folder / INNER, inner=True)
    settings = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))
    name, revision = str(settings.get("base_model_name_or_path") or ""), settings.get("revision") or ""
    for place in (folder / name, Path(name)):
        if name and place.exists():
            return Base(place.resolve())
    if not name or looks_like_path(name):
        raise OperantError(
            f"the base of {folder}, {name or 'which it does not name'}, is gone; put the model into {folder / INNER}"
        )
    return Base(_cached(name, revision), name, revision)


def _facts(folder: Path) -> dict[str, str]:
    file = folder / BASE
    if not file.exists():
        return {}
    try:
        facts: dict[str, str] = json.loads(file.read_text(encoding="utf-8"))
        if not (facts.get("hub") or (facts["path"] and facts["sha256"])):
            raise ValueError("it names nothing")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise OperantError(f"{file} cannot be read ({error}); copy the folder again, whole") from error
    return facts


def hub_base(name: str, revision: str = "") -> Base:
    """A model that was loaded by its hub id, as it lies on this machine."""
    place = _cached(name, revision)
    return Base(place, name, revision or place.name)


def _cached(name: str, revision: str) -> Path:
    """The folder in which the hub's client keeps a model. Raises OperantError when it is not there nor to be had."""
    from transformers.utils import cached_file

    try:
        with reached(name):
            return Path(str(cached_file(name, "config.json", revision=revision or None))).parent
    except OSError as error:
        raise OperantError(
            f"the base {name} is not on this machine and the hub does not give it "
            f"({str(error).strip().splitlines()[0]}); go online once, or give a folder"
        ) from error


def _relative(place: Path, folder: Path) -> str:
    try:
        return Path(os.path.relpath(place.resolve(), folder.resolve())).as_posix()
    except ValueError:  # another drive of Windows
        return str(place.resolve())


# --- copies ----------------------------------------------------------------------------------------------------------


def link_or_copy(source: str | Path, target: str | Path) -> str:
    """Weights by a hard link where the disk allows one, everything else as a copy. A `shutil.copytree` function.

    Weights in a file that new ones would not have the mode of are copied too, and then have it.
    """
    source, target = Path(source).resolve(), Path(target)
    if source.suffix != ".safetensors":
        shutil.copyfile(source, target)
        return str(target)
    target.touch()
    usual = _mode(target)
    target.unlink()
    try:
        if _mode(source) != usual:
            raise OSError("its mode is another")
        os.link(source, target)
    except OSError:  # another disk, or one without links
        shutil.copyfile(source, target)
    return str(target)


def copy_linked(source: Path, target: Path) -> None:
    """Copy a folder, its weights as `link_or_copy` does."""
    shutil.copytree(source, target, copy_function=link_or_copy)


def settle(folder: Path, source: Path, final: Path) -> None:
    """Complete the copy `folder` of the model folder `source`, which will stand at `final`: an adapter names its base
    from there; what is its base gets the weights."""
    if not (source / BASE).exists():
        return
    base = find_base(source)
    if (folder / ADAPTER).exists():
        if not base.inner:
            call_base(folder, *name_base(base, folder, final))
        return
    for file in [*weight_files(base.place), *(base.place / name for name in _INDICES)]:
        if file.exists():
            link_or_copy(file, folder / file.name)
    (folder / BASE).unlink()


def call_base(folder: Path, name: str, revision: str | None) -> None:
    """Let an adapter's configuration call its base so, for PEFT."""
    settings = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))
    settings |= {"base_model_name_or_path": name, "revision": revision}
    _replace(folder / ADAPTER, json.dumps(settings, indent=2, sort_keys=True))


def _replace(file: Path, text: str) -> None:
    """Never through a link to another folder's file."""
    fresh = file.with_name(f".{file.name}-{os.getpid()}")
    fresh.write_text(text, encoding="utf-8")
    os.replace(fresh, file)
