from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forks import PATIENCE, Forked

import operant
from operant.run import checkpoint
from operant.run.files import STAGING, read_object, replace_file
from operant.run.runlog import RunFolder
from operant.types import OperantError

# The child saves steps 1, 2, 3 … whose files all hold the step, and acknowledges each on stdout. With a third argument
# it kills itself at that call of the functions that touch the disk, so that every gap between two of them is tried.
CHILD = """
import os, signal, sys
from pathlib import Path
from operant.run import checkpoint

folder, first, fatal = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
calls = 0

def deadly(function):
    def wrapped(*args, **kwargs):
        global calls
        calls += 1
        if calls == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return wrapped

if fatal:
    for name in ("fsync", "rename", "replace", "mkdir", "rmdir", "unlink"):
        setattr(os, name, deadly(getattr(os, name)))

def write(path):
    for name in ("weights.bin", "state.json", "deep/er.bin"):
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_bytes(str(step).encode().ljust(8) * 20_000)

for step in range(first, first + (2 if fatal else 10**6)):
    checkpoint.save(folder, step, write)
    print(step, flush=True)
    checkpoint.prune(folder, keep=1)
"""


def write_text(text: str):
    def write(path: Path) -> None:
        (path / "weights.bin").write_text(text)
        (path / "deep").mkdir()
        (path / "deep" / "state.json").write_text(text)

    return write


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def assert_whole(folder: Path, at_least: int) -> int:
    """The newest checkpoint is whole, all its files are of one step, and no acknowledged step is lost."""
    newest = checkpoint.latest(folder)
    if newest is None:
        assert at_least == 0
        return 0
    assert checkpoint.verify(newest) is None
    step = checkpoint.read(newest).step
    assert step >= at_least
    for name in ("weights.bin", "state.json", "deep/er.bin"):
        assert (newest / name).read_bytes() == str(step).encode().ljust(8) * 20_000
    return step


def run_child(folder: Path, first: int, fatal: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, str(folder), str(first), str(fatal)]
    environment = {**os.environ, "PYTHONPATH": str(Path(operant.__file__).parents[1])}
    return Forked(command, stdout=subprocess.PIPE, text=True, env=environment)


def test_saves_files_manifest_pointer_and_lineage(tmp_path: Path) -> None:
    first = checkpoint.save(tmp_path / "made" / "here", 7, write_text("a"), meta={"reward": 0.5})
    second = checkpoint.save(tmp_path / "made" / "here", 9, write_text("b"))
    assert (first.name, second.name) == ("step-00000007", "step-00000009")
    assert names(first.parent) == {"latest", "step-00000007", "step-00000009"}
    assert (first.parent / "latest").read_text() == "step-00000009\n"
    old, new = checkpoint.read(first), checkpoint.read(second)
    assert set(old.files) == {"weights.bin", "deep/state.json"}
    assert old.files["weights.bin"] == {
        "bytes": 1,
        "sha256": "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb",
    }
    assert (old.meta["reward"], old.parent, old.order) == (0.5, None, 1)
    assert (new.parent, new.order) == ("step-00000007", 2)
    assert old.sha256 != new.sha256
    assert checkpoint.latest(first.parent) == second


def test_same_content_has_the_same_hash(tmp_path: Path) -> None:
    one = checkpoint.read(checkpoint.save(tmp_path / "one", 1, write_text("x")))
    two = checkpoint.read(checkpoint.save(tmp_path / "two", 5, write_text("x")))
    assert one.sha256 == two.sha256


def test_a_folder_is_never_filled_twice(tmp_path: Path) -> None:
    first = checkpoint.save(tmp_path, 3, write_text("old"))
    again = checkpoint.save(tmp_path, 3, write_text("new"))
    assert again.name == "step-00000003-2"
    assert (first / "weights.bin").read_text() == "old"
    assert checkpoint.latest(tmp_path) == again


def test_nothing_saved_is_none(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None
    assert checkpoint.latest(tmp_path / "absent") is None
    assert checkpoint.list_checkpoints(tmp_path / "absent") == []


@pytest.mark.parametrize("harm", ["truncated", "flipped", "missing", "manifest", "manifest cut", "gone"])
def test_a_broken_newest_falls_back_to_the_one_before(
    tmp_path: Path, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2, 3):
        path = checkpoint.save(tmp_path, step, write_text(f"text of step {step}"))
    weights, manifest = path / "weights.bin", path / "manifest.json"
    if harm == "truncated":
        weights.write_bytes(weights.read_bytes()[:5])
    elif harm == "flipped":
        weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    elif harm == "missing":
        (path / "deep" / "state.json").unlink()
    elif harm == "manifest":
        manifest.unlink()
    elif harm == "manifest cut":
        manifest.write_bytes(manifest.read_bytes()[:40])
    else:
        shutil.rmtree(path)
    assert checkpoint.latest(tmp_path) == tmp_path / "step-00000002"
    assert "step-00000003" in caplog.text
    after = checkpoint.save(tmp_path, 3, write_text("again"))
    assert checkpoint.latest(tmp_path) == after


def test_a_manifest_made_to_fit_changed_weights_is_noticed(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 1, write_text("x"))
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "weights.bin").write_text("y")
    manifest["files"]["weights.bin"]["sha256"] = "a1fce4363854ff888cff4b8e7875d600c2682390412a8cf79b37d0b11148b0fa"
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert checkpoint.verify(path) == "manifest.json has been changed"


def test_the_pointer_decides_and_an_unpointed_newer_one_is_the_last_resort(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, write_text(str(step)))
    (tmp_path / "latest").write_text("step-00000002\n")
    assert checkpoint.latest(tmp_path) == tmp_path / "step-00000002"
    shutil.rmtree(tmp_path / "step-00000002")
    shutil.rmtree(tmp_path / "step-00000001")
    assert checkpoint.latest(tmp_path) == tmp_path / "step-00000003"


@pytest.mark.parametrize("pointer", ["../../etc", "", "step-00000009", "\x00\xff"])
def test_a_nonsense_pointer_does_not_mislead(tmp_path: Path, pointer: str) -> None:
    path = checkpoint.save(tmp_path, 4, write_text("x"))
    (tmp_path / "latest").write_text(pointer)
    assert checkpoint.latest(tmp_path) == path


def test_a_rolled_back_run_keeps_its_own_line(tmp_path: Path) -> None:
    """After a fall-back to step 1, later saves of lower steps are newer than the abandoned step 9."""
    checkpoint.save(tmp_path, 1, write_text("1"))
    checkpoint.save(tmp_path, 9, write_text("9"))
    (tmp_path / "latest").write_text("step-00000001\n")
    checkpoint.save(tmp_path, 2, write_text("2"))
    third = checkpoint.save(tmp_path, 3, write_text("3"))
    checkpoint.prune(tmp_path, keep=2)
    assert names(tmp_path) == {"latest", "step-00000002", "step-00000003"}
    assert checkpoint.latest(tmp_path) == third
    assert checkpoint.read(tmp_path / "step-00000002").parent == "step-00000001"


def test_sick_ones_are_never_gone_on_from_and_never_push_out_healthy_ones(tmp_path: Path) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path, step, write_text("fine"))
    for step in (3, 4, 5):
        checkpoint.save(tmp_path, step, write_text("nan"), healthy=False)
        checkpoint.prune(tmp_path, keep=2)
    assert names(tmp_path) == {"latest", "step-00000001", "step-00000002", "step-00000005"}
    assert (tmp_path / "latest").read_text() == "step-00000002\n"
    assert checkpoint.latest(tmp_path) == tmp_path / "step-00000002"


def test_only_sick_ones_is_none(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, write_text("nan"), healthy=False)
    assert checkpoint.latest(tmp_path) is None


def test_prune_keeps_the_newest_and_the_protected(tmp_path: Path) -> None:
    for step in range(1, 7):
        checkpoint.save(tmp_path, step, write_text(str(step)))
    gone = checkpoint.prune(tmp_path, keep=2, protect={tmp_path / "step-00000002"})
    assert [p.name for p in gone] == ["step-00000004", "step-00000003", "step-00000001"]
    assert names(tmp_path) == {"latest", "step-00000002", "step-00000005", "step-00000006"}
    assert checkpoint.prune(tmp_path, keep=1, protect=["step-00000002"]) == [tmp_path / "step-00000005"]
    with pytest.raises(ValueError, match="keep must be at least 1"):
        checkpoint.prune(tmp_path, keep=0)


def test_prune_keeps_what_the_pointer_names(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, write_text(str(step)))
    (tmp_path / "latest").write_text("step-00000001\n")
    checkpoint.prune(tmp_path, keep=1)
    assert names(tmp_path) == {"latest", "step-00000001", "step-00000003"}


def test_prune_does_not_count_damaged_ones(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, write_text("text"))
    (tmp_path / "step-00000003" / "weights.bin").write_text("")
    (tmp_path / "step-00000002" / "weights.bin").write_text("")
    checkpoint.prune(tmp_path, keep=1)
    assert checkpoint.latest(tmp_path) == tmp_path / "step-00000001"


@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyboardInterrupt()])
def test_a_failing_writer_leaves_nothing_and_its_error_comes_through(tmp_path: Path, error: BaseException) -> None:
    before = checkpoint.save(tmp_path, 1, write_text("x"))

    def write(path: Path) -> None:
        (path / "half").write_text("half")
        raise error

    with pytest.raises(type(error)):
        checkpoint.save(tmp_path, 2, write)
    assert names(tmp_path) == {"latest", "step-00000001"}
    assert checkpoint.latest(tmp_path) == before


def test_stale_staging_is_swept_by_the_next_save(tmp_path: Path) -> None:
    (tmp_path / ".staging-00000001-12" / "deep").mkdir(parents=True)
    (tmp_path / ".pruned-step-00000001-12").mkdir()
    (tmp_path / ".staging-latest-12").write_text("x")
    (tmp_path / ".keep-me").write_text("not ours")
    checkpoint.save(tmp_path, 1, write_text("x"))
    assert names(tmp_path) == {".keep-me", "latest", "step-00000001"}


def test_everything_is_synced_before_the_rename_and_the_pointer_is_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, str]] = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def watch_fsync(descriptor: int) -> None:
        events.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def watch_rename(source: str | Path, target: str | Path) -> None:
        events.append(("rename", str(target)))
        rename(source, target)

    def watch_replace(source: str | Path, target: str | Path) -> None:
        events.append(("replace", str(target)))
        replace(source, target)

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc to name the synced files")
    monkeypatch.setattr(os, "fsync", watch_fsync)
    monkeypatch.setattr(os, "rename", watch_rename)
    monkeypatch.setattr(os, "replace", watch_replace)
    path = checkpoint.save(tmp_path, 1, write_text("x"))
    staged = str(tmp_path / f".staging-00000001-{os.getpid()}")
    renamed = events.index(("rename", str(path)))
    synced = {name for kind, name in events[:renamed] if kind == "fsync"}
    tree = ("", "/weights.bin", "/deep", "/deep/state.json", "/manifest.json")
    assert synced == {staged + part for part in tree}
    assert events[renamed + 1] == ("fsync", str(tmp_path))
    assert events[-2:] == [("replace", str(tmp_path / "latest")), ("fsync", str(tmp_path))]


@pytest.mark.parametrize("call", range(1, 9))
def test_a_full_disk_at_any_sync_is_one_line_and_leaves_the_previous(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    checkpoint.save(tmp_path, 1, write_text("x"))
    calls = 0
    fsync = os.fsync

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OperantError, match=r"disk is full while saving step 2 .*--resume") as caught:
            checkpoint.save(tmp_path, 2, write_text("y"))
    assert "\n" not in str(caught.value)
    assert not [name for name in names(tmp_path) if name.startswith(".")]
    newest = checkpoint.latest(tmp_path)
    assert newest is not None
    assert checkpoint.read(newest).step in ({1} if call <= 5 else {1, 2})
    assert checkpoint.verify(tmp_path / "step-00000001") is None
    assert checkpoint.latest(checkpoint.save(tmp_path, 3, write_text("z")).parent) == tmp_path / "step-00000003"


@pytest.mark.parametrize(
    "fault",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_inside_the_writer_is_recognised_in_any_wrapping(tmp_path: Path, fault: Exception) -> None:
    def write(path: Path) -> None:
        (path / "half").write_text("half")
        try:
            raise fault
        except Exception as error:
            raise RuntimeError("could not save the weights") from error

    with pytest.raises(OperantError, match="disk is full"):
        checkpoint.save(tmp_path, 2, write)
    assert names(tmp_path) == set()


def test_a_bug_is_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    def write(path: Path) -> None:
        raise OSError(errno.ENOENT, "No such file or directory")

    with pytest.raises(FileNotFoundError):
        checkpoint.save(tmp_path, 2, write)


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """A file system of 1 MiB: the first checkpoint fits, the second does not, by plain writes and by torch's writer."""
    torch = pytest.importorskip("torch")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system here: {mounted.stderr.decode().strip()}")
    try:
        first = checkpoint.save(disk, 1, lambda path: (path / "w").write_bytes(b"x" * 300_000) and None)
        for write in (
            lambda path: (path / "w").write_bytes(b"x" * 2_000_000),
            lambda path: torch.save(torch.zeros(500_000), path / "w.pt"),
        ):
            with pytest.raises(OperantError, match="disk is full while saving step 2"):
                checkpoint.save(disk, 2, write)
            assert names(disk) == {"latest", "step-00000001"}
            assert checkpoint.latest(disk) == first
        assert checkpoint.latest(disk) == first
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: object, **kwargs: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", forbidden)
    with pytest.raises(OperantError, match=r"no permission to write .*choose another --out"):
        checkpoint.save(tmp_path / "absent", 1, write_text("x"))


@pytest.mark.skipif(os.name == "nt", reason="kill -9 is a POSIX signal")
def test_killed_at_every_point_of_a_save(tmp_path: Path) -> None:
    """Killed at each call that touches the disk in turn: the checkpoint before loads, and the next save works."""
    fatal, survived = 0, False
    while not survived:
        fatal += 1
        assert fatal < 100, "the child never finished"
        folder = tmp_path / f"killed-at-{fatal}"
        checkpoint.save(folder, 1, lambda path: None)
        shutil.rmtree(folder / "step-00000001")
        child = run_child(folder, 2, fatal)
        out, _ = child.communicate(timeout=PATIENCE)
        survived = child.returncode == 0
        assert survived or child.returncode == -signal.SIGKILL
        acknowledged = [int(line) for line in out.split()]
        step = assert_whole(folder, max(acknowledged, default=0))
        for visible in folder.glob("step-*"):
            assert checkpoint.verify(visible) is None
        after = checkpoint.save(folder, step + 1, write_text("after"))
        assert checkpoint.latest(folder) == after
        assert not [name for name in names(folder) if name.startswith(".")]
    assert fatal > 25


@pytest.mark.skipif(os.name == "nt", reason="kill -9 is a POSIX signal")
def test_killed_at_random_moments_loses_no_acknowledged_save(tmp_path: Path) -> None:
    step, generator = 0, random.Random(7)
    for _ in range(8):
        child = run_child(tmp_path, step + 1, 0)
        assert child.stdout is not None
        first = child.stdout.readline()
        time.sleep(generator.uniform(0.0, 0.05))
        child.send_signal(signal.SIGKILL)
        rest, _ = child.communicate(timeout=PATIENCE)
        acknowledged = [int(line) for line in (first + rest).split("\n")[:-1]]
        step = assert_whole(tmp_path, acknowledged[-1])
    assert step >= 8


def test_a_reader_during_saves_always_sees_a_whole_checkpoint(tmp_path: Path) -> None:
    child = run_child(tmp_path, 1, 0)
    try:
        assert child.stdout is not None
        child.stdout.readline()
        seen: list[int] = []
        while len(set(seen)) < 5:
            pointer = (tmp_path / "latest").read_text().strip()
            assert pointer.startswith("step-")
            seen.append(int(pointer.removeprefix("step-")))
        assert seen == sorted(seen)
    finally:
        child.kill()
        child.communicate(timeout=PATIENCE)


def test_a_disk_that_torch_filled_is_told_though_the_half_written_files_are_gone_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch's writer tells of its own position only, and what is removed afterwards frees the very space."""
    usage = shutil.disk_usage(tmp_path)

    def free(path: Path) -> object:
        staged = [p for p in tmp_path.rglob("half") if p.is_file()]
        return usage._replace(free=0 if staged else 1 << 30)

    monkeypatch.setattr(checkpoint.shutil, "disk_usage", free)

    def fill(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 662912 vs 662804")

    with pytest.raises(OperantError, match="the disk is full while saving step 3"):
        checkpoint.save(tmp_path, 3, fill)
    assert list(tmp_path.iterdir()) == []


def test_an_object_is_read_or_empty(tmp_path: Path) -> None:
    file = tmp_path / "facts.json"
    assert read_object(file) == {}
    for text in ("", "{", "[1]", "\x00"):
        file.write_text(text)
        assert read_object(file) == {}
    replace_file(file, '{"a": 1}')
    assert read_object(file) == {"a": 1}


def test_what_a_kill_left_of_a_small_file_goes_with_the_run_that_is_opened_next(tmp_path: Path) -> None:
    left = tmp_path / f"{STAGING}run.json-1-1"
    left.write_text("{")
    RunFolder.open(tmp_path, "a: 1").close()
    assert not left.exists()
