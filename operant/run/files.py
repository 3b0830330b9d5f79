"""Small files and folders that a crash cannot break: written beside their place, synced, renamed.

Everything that operant keeps on a disk and reads again goes through `replace_file` or through `checkpoint.save`.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

from operant.types import OperantError

__all__ = ["STAGING", "make_folder", "read_object", "replace_file", "storage_fault", "swap_folder", "sync", "sync_tree"]

#: How the hidden name of a file or folder begins until it is whole. `checkpoint.clean` removes what a kill leaves.
STAGING = ".staging-"
_FULL = (errno.ENOSPC, errno.EDQUOT)


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file. Empty where the file is missing, cannot be read, or holds anything else."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def replace_file(
    file: Path, text: str, *, private: bool = False, advice: str = "free some space there, or make it writable"
) -> None:
    """Write a small file so that a crash leaves the old text or the new one, on the disk when this returns.

    private: nobody but its owner may ever read it. advice: what the error tells the user to do.

    Raises:
        OperantError: the disk is full or the place cannot be written. The old text stands.
    """
    fresh = file.parent / f"{STAGING}{file.name}-{os.getpid()}-{threading.get_ident()}"
    try:
        make_folder(file.parent)
        if private:
            fresh.touch(mode=0o600)
        fresh.write_text(text, encoding="utf-8")
        sync(fresh)
        os.replace(fresh, file)
        sync(file.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            fresh.unlink(missing_ok=True)
        reason = storage_fault(error, file.parent)
        if reason is None:
            raise
        raise OperantError(f"{reason} while writing {file}; {advice}") from error


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, on the disk when this returns."""
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        sync(folder.parent)


def swap_folder(fresh: Path, target: Path) -> None:
    """Let a whole new folder stand where an old one may be, which is there until then."""
    old = target.with_name(f".{target.name}-old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.rename(target, old)
    try:
        os.rename(fresh, target)
    except OSError:
        if old.exists():
            os.rename(old, target)
        raise
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync_tree(folder: Path) -> None:
    """Bring a folder and everything in it to the disk."""
    for path in sorted(folder.rglob("*"), reverse=True):
        sync(path)
    sync(folder)


def sync(path: Path) -> None:
    """Bring one file, or the names in one folder, to the disk."""
    if path.is_dir() and os.name == "nt":  # Windows cannot open a folder; its rename is journalled by the file system
        return
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def storage_fault(error: BaseException, folder: Path) -> str | None:
    """Name the fault if the storage is to blame. Weight writers wrap the system's error in their own."""
    link: BaseException | None = error
    while link is not None:
        number, text = getattr(link, "errno", None), str(link)
        if number in _FULL or "No space left on device" in text or "os error 28" in text:
            return "the disk is full"
        if number == errno.EFBIG:
            return "a file grew over the size that this file system allows"
        if isinstance(link, OSError) and number in (errno.EACCES, errno.EPERM, errno.EROFS):
            return f"no permission to write ({os.strerror(number)})"
        # torch's zip writer reports only its own position after a short write.
        if isinstance(link, RuntimeError) and ("PytorchStreamWriter" in text or "unexpected pos" in text):
            with contextlib.suppress(OSError):
                if shutil.disk_usage(folder).free < 1 << 20:
                    return "the disk is full"
        link = link.__cause__ or link.__context__
    return None
