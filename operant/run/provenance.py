"""Where a run's numbers come from: versions, commit, host, and a hash of the data that its configuration names."""

from __future__ import annotations

import contextlib
import hashlib
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from operant.data.rows import data_files
from operant.types import OperantError

__all__ = ["data_hash", "provenance"]

#: Settings that name data.
_DATA = ("data", "dev_data", "sft_data", "logged", "replay")
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


def data_hash(source: str) -> dict[str, Any]:
    """{`sha256`, `of`, `bytes`, `files`} of a data set: its digest, and in words what that is the digest of.

    It is of the files' contents, in the order of their names. A file above `WHOLE` bytes counts by its size and its
    ends. A hub data set has its name hashed and nothing else.

    Raises OperantError or OSError for what cannot be read.
    """
    digest, size, cut = hashlib.sha256(), 0, 0
    files = data_files(source)
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
    if not files:
        digest.update(source.encode())
        of = "its name on the hub"
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
            told = subprocess.run(
                ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
                cwd=folder, capture_output=True, text=True, timeout=10, check=True,
            )  # fmt: skip
            return told.stdout.strip()
    return None
