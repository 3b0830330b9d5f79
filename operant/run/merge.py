"""An adapter added to its base: a plain folder, which needs neither PEFT nor the base."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from operant.config import MergeConfig
from operant.models.adapter import WEIGHTS
from operant.models.encoder import Encoder
from operant.models.folder import ADAPTER, BASE, find_base, weights_dtype
from operant.run.files import STAGING, make_folder, storage_fault, swap_folder, sync_tree
from operant.types import OperantError

__all__ = ["merge"]


def merge(config: MergeConfig) -> Path:
    """Write W + (alpha / rank) · B A in place of an adapter, in the precision that the base has on disk.

    The sum is taken in float32. The folder appears whole or not at all; a reward model stays one. Returns it.

    Raises OperantError when `config.model` holds no adapter, when its base is gone or another, when `config.out` is
    there and not to be replaced, and when it cannot be written.
    """
    source, out = Path(config.model), Path(config.out)
    if not (source / ADAPTER).is_file():
        raise OperantError(f"{config.model or '--model'} holds no adapter (no {ADAPTER}): there is nothing to merge")
    if out.exists() and not (config.overwrite and (out / "config.json").is_file()):
        hint = "add --overwrite, or " if (out / "config.json").is_file() else ""
        raise OperantError(f"{out} is there already; {hint}choose another --out")
    dtype = weights_dtype(find_base(source).place)
    merged = Encoder.load(source, device="cpu")  # any model: what reads is a part of what writes
    merged.model.to(dtype)
    staging = out.with_name(f"{STAGING}{out.name}-{os.getpid()}")
    try:
        make_folder(out.parent)
        shutil.rmtree(staging, ignore_errors=True)
        merged.save(staging)
        for file in source.iterdir():  # a reward model's head, how prompts are written
            if file.is_file() and file.name not in (ADAPTER, BASE, WEIGHTS) and not (staging / file.name).exists():
                shutil.copyfile(file, staging / file.name)
        sync_tree(staging)
        swap_folder(staging, out)
    except OSError as error:
        reason = storage_fault(error, out.parent) or str(error)
        raise OperantError(f"{reason} while writing {out}; free some space there, or choose another --out") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return out
