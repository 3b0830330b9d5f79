"""Checkpoints that a crash cannot break: staged, synced, renamed, pointer last.

A checkpoint is a folder `step-00000123` with whatever the caller wrote and a `manifest.json` that names every file with
its size and sha256. It is filled under a hidden name beside its final place, every file and folder is synced, and one
rename makes it visible; the pointer file `latest` moves after that. So at any instant the pointer names a whole
checkpoint, and a process killed half-way leaves only hidden rubbish that the next save sweeps up. A folder is never
filled twice: saving a step again makes `step-00000123-2`.

One process writes a folder at a time (`runlog.RunFolder` holds the lock); any number may read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from operant.run.files import STAGING, make_folder, replace_file, storage_fault, sync, sync_tree
from operant.types import OperantError

__all__ = ["Checkpoint", "clean", "latest", "list_checkpoints", "prune", "read", "save", "verify"]

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
POINTER = "latest"
PRUNED = ".pruned-"
_NAME = re.compile(r"step-(\d{8,})(?:-(\d+))?")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a manifest says. `order` counts saves in the folder, `parent` names the checkpoint that this one grew from.

    `sha256` is the hash over all names and hashes of the files: two checkpoints with the same content share it.
    """

    path: Path
    step: int
    order: int
    healthy: bool
    parent: str | None
    sha256: str
    time: float
    meta: dict[str, Any]
    files: dict[str, dict[str, Any]]


def save(
    folder: Path,
    step: int,
    write: Callable[[Path], None],
    *,
    healthy: bool = True,
    meta: Mapping[str, Any] | None = None,
) -> Path:
    """Save one checkpoint so that it is wholly there or not there at all.

    Args:
        folder: holds all checkpoints of a run; made when missing.
        step: the optimizer steps behind these weights.
        write: fills the empty folder that it is given with files (weights, optimizer, generators, anything).
        healthy: False for weights not to go on from (non-finite loss, failed check). The pointer never moves to such a
            checkpoint, `latest` never returns it and `prune` never drops a healthy one for it.
        meta: JSON-able facts kept in the manifest. `parent` is filled in from the pointer unless given.

    Returns:
        The folder of the new checkpoint.

    Raises:
        OperantError: the disk is full or the place cannot be written. The checkpoints before it are untouched.
    """
    if step < 0:
        raise ValueError(f"step must not be negative, got {step}")
    folder = Path(folder)
    facts = dict(meta or {})
    staging = folder / f"{STAGING}{step:08d}-{os.getpid()}"
    try:
        make_folder(folder)
        clean(folder)
        facts.setdefault("parent", _pointer(folder))
        known = list_checkpoints(folder)
        target = _free_name(folder, step)
        staging.mkdir()
        write(staging)
        files = _describe(staging)
        manifest = {
            "step": step,
            "order": 1 + max((c.order for c in known), default=0),
            "healthy": healthy,
            "time": time.time(),
            "sha256": _digest(files),
            "meta": facts,
            "files": files,
        }
        (staging / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False), encoding="utf-8")
        sync_tree(staging)
        os.rename(staging, target)
        sync(folder)
        if healthy:
            replace_file(folder / POINTER, target.name + "\n")
    except BaseException as error:
        reason = storage_fault(error, folder)  # before the half-written files go: that frees the very space
        shutil.rmtree(staging, ignore_errors=True)
        if reason is None:
            raise
        raise OperantError(
            f"{reason} while saving step {step} in {folder}; the checkpoints before it are intact: "
            "free some space there, or choose another --out, and go on with --resume"
        ) from error
    return target


def latest(folder: Path) -> Path | None:
    """Return the newest checkpoint that is whole and healthy, or None when there is none.

    The pointer's checkpoint comes first, then the ones saved before it, newest first, then any saved after it (a crash
    between rename and pointer). Every file's size and sha256 is checked; a broken one is passed over with a warning.
    """
    folder = Path(folder)
    pointed = _pointer(folder)
    found = {c.path.name: c for c in list_checkpoints(folder)}
    limit = found[pointed].order if pointed in found else None
    ranked = sorted(found.values(), key=lambda c: (limit is None or c.order <= limit, c.order), reverse=True)
    if pointed is not None and pointed not in found:
        log.warning("checkpoint %s is missing or has no readable manifest; looking for an older one", folder / pointed)
    for checkpoint in ranked:
        if not checkpoint.healthy:
            continue
        fault = verify(checkpoint.path)
        if fault is None:
            return checkpoint.path
        log.warning("checkpoint %s is broken (%s); falling back to the one before it", checkpoint.path, fault)
    return None


def prune(folder: Path, keep: int = 2, protect: Iterable[str | Path] = ()) -> list[Path]:
    """Delete old checkpoints and return those deleted.

    Kept are the `keep` newest healthy ones, the pointer's, and everything in `protect` (names or paths, such as the
    best one). The newest unhealthy one is kept for the post-mortem if nothing healthy is newer. Unhealthy and visibly
    damaged checkpoints (a file missing or of the wrong size) never count towards `keep`.

    Raises:
        ValueError: `keep` is less than 1.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    folder = Path(folder)
    kept = {Path(p).name for p in protect}
    pointed = _pointer(folder)
    if pointed is not None:
        kept.add(pointed)
    everything = sorted(list_checkpoints(folder), key=lambda c: c.order, reverse=True)
    good = [c for c in everything if c.healthy and _sizes_fault(c) is None]
    kept.update(c.path.name for c in good[:keep])
    if everything and not everything[0].healthy:
        kept.add(everything[0].path.name)
    gone = []
    for checkpoint in everything:
        if checkpoint.path.name not in kept:
            delete(checkpoint.path)
            gone.append(checkpoint.path)
    if gone:
        sync(folder)
    return gone


def delete(path: Path) -> None:
    """Delete one checkpoint. It is hidden before it is emptied: a crash in between must not leave half of one under a
    real name."""
    grave = path.parent / f"{PRUNED}{path.name}-{os.getpid()}"
    os.rename(path, grave)
    shutil.rmtree(grave, ignore_errors=True)


def clean(folder: Path, *names: str) -> int:
    """Remove what killed saves and prunes left behind; return how many. Call it only while holding the run's lock.

    names: of the small files whose leftovers go, in a folder where others write too; all leftovers when left out.
    """
    prefixes = tuple(f"{STAGING}{name}-" for name in names) or (STAGING, PRUNED)
    leftovers = [p for p in Path(folder).glob(".*") if p.name.startswith(prefixes)]
    for path in leftovers:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return len(leftovers)


def list_checkpoints(folder: Path) -> list[Checkpoint]:
    """Return every checkpoint with a readable manifest, oldest save first. File contents are not checked."""
    folder = Path(folder)
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        if _NAME.fullmatch(path.name) and path.is_dir():
            with contextlib.suppress(OperantError):
                found.append(read(path))
    return sorted(found, key=lambda c: c.order)


def read(path: Path) -> Checkpoint:
    """Read the manifest of one checkpoint.

    Raises:
        OperantError: there is none, or it cannot be read.
    """
    path = Path(path)
    try:
        raw = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        return Checkpoint(
            path=path,
            step=int(raw["step"]),
            order=int(raw["order"]),
            healthy=bool(raw["healthy"]),
            parent=raw["meta"].get("parent"),
            sha256=str(raw["sha256"]),
            time=float(raw["time"]),
            meta=dict(raw["meta"]),
            files={str(name): dict(entry) for name, entry in raw["files"].items()},
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise OperantError(
            f"{path} is not a whole checkpoint (its {MANIFEST} cannot be read): name another step-… folder"
        ) from error


def verify(path: Path, within: str = "") -> str | None:
    """Check every file of a checkpoint against its manifest. Return None when it is whole, else what is wrong.

    within: read only the files of this folder in it; of the others, that they are there in their sizes.
    """
    try:
        checkpoint = read(path)
        fault = _sizes_fault(checkpoint)
        if fault is not None:
            return fault
        if _digest(checkpoint.files) != checkpoint.sha256:
            return f"{MANIFEST} has been changed"
        for name, entry in checkpoint.files.items():
            if name.startswith(within) and _hash(checkpoint.path / name) != entry["sha256"]:
                return f"{name} has been changed"
    except OperantError:
        return f"{MANIFEST} is missing or unreadable"
    except (OSError, KeyError) as error:
        return f"cannot be read: {error}"
    return None


def _sizes_fault(checkpoint: Checkpoint) -> str | None:
    for name, entry in checkpoint.files.items():
        file = checkpoint.path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != entry.get("bytes"):
            return f"{name} has {file.stat().st_size} bytes, not {entry.get('bytes')}"
    return None


def _free_name(folder: Path, step: int) -> Path:
    target, again = folder / f"step-{step:08d}", 1
    while target.exists():
        again += 1
        target = folder / f"step-{step:08d}-{again}"
    return target


def _describe(folder: Path) -> dict[str, dict[str, Any]]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {
        p.relative_to(folder).as_posix(): {"bytes": p.stat().st_size, "sha256": _hash(p)}
        for p in files
        if p.relative_to(folder).as_posix() != MANIFEST
    }


def _digest(files: Mapping[str, Mapping[str, Any]]) -> str:
    lines = "".join(f"{entry['sha256']}  {name}\n" for name, entry in sorted(files.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def _hash(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _pointer(folder: Path) -> str | None:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        name = (folder / POINTER).read_text(encoding="utf-8").strip()
        if _NAME.fullmatch(name):
            return name
    return None
