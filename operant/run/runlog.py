"""The run folder and what is written into it while a run goes on.

```
runs/name/
  config.yaml      the resolved configuration
  run.json         when it started and finished, why it stopped, and where it comes from (`provenance`)
  metrics.jsonl    one JSON object a line: step, time, slash-named metrics
  samples.jsonl    completions kept for reading: step, prompt, text, reward …
  checkpoints/     see `checkpoint`
  model/           the best weights, as a folder that Transformers loads
  tensorboard/     the same metrics as event files
  curves/, report.html   see `report`
```
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import yaml
from filelock import FileLock, Timeout

from operant.config import install_line
from operant.run import checkpoint
from operant.run.files import read_object, replace_file
from operant.run.notices import WATCHED, Series
from operant.run.provenance import Hash, compare, provenance
from operant.types import OperantError

__all__ = ["FREE_KEYS", "Progress", "RunFolder", "RunLog", "read_jsonl"]

log = logging.getLogger(__name__)

#: Configuration keys that may differ on resume: how long, where and how loudly, never what is learned.
FREE_KEYS = frozenset(
    {
        "accept_changes",
        "clock",
        "config",
        "device",
        "keep",
        "log_samples",
        "max_minutes",
        "out",
        "overwrite",
        "report",
        "resume",
        "reward_seconds",
        "reward_workers",
        "save_every",
        "steps",
        "target",
        "tensorboard",
        "threads",
        "wandb",
        "workers",
    }
)

_LOCK = ".lock"
_ASIDE = ".replaced"  # the run that --overwrite replaces, until the new one has begun
_RUN_FILES = ("config.yaml", "run.json", "metrics.jsonl", "samples.jsonl", "results.json", "report.html")
_GO_ON = "free some space there, and go on from the last checkpoint with --resume"
_RUN_FOLDERS = ("checkpoints", "curves", "model", "tensorboard")


class RunFolder:
    """One run's folder, locked by this process until `close` (or the end of a `with` block, or of the process).

    Make it with `RunFolder.open`. `path`, `checkpoints` and `curves` are folders; `resumed` says whether the run had
    been started before, `finished` whether it had come to an end of its own that was written down; `config` is the
    resolved configuration as YAML. `unhashed`: of which kinds of sources a resumed run keeps no hash, being older.
    """

    def __init__(self, path: Path, config: str, *, resumed: bool, lock: FileLock) -> None:
        self.path = path
        self.config = config
        self.resumed = resumed
        self.finished = False
        self.unhashed: list[str] = []
        self._accept_changes = False
        self._earlier: str | None = None  # the run.json of a resumed run as it was found
        self._lock = lock
        self._new_parents: list[Path] = []  # folders above that were made for this run, the nearest first

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def curves(self) -> Path:
        return self.path / "curves"

    @classmethod
    def open(
        cls,
        out: str | Path,
        config_yaml: str,
        *,
        resume: bool = False,
        overwrite: bool = False,
        accept_changes: bool = False,
        free_keys: Collection[str] = FREE_KEYS,
        asked_yaml: str = "",
        current: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict,
    ) -> RunFolder:
        """Make or reopen a run folder and lock it. On a fault nothing in it has been changed.

        A run that took no step, killed or failed before its first, is no run: a new one takes its place. Where there is
        no run, nothing may stand that a run would write: it is the user's.

        Args:
            out: the folder; made when missing.
            config_yaml: the resolved configuration, a YAML mapping.
            resume: go on with the run in it, whose configuration must agree except in `free_keys`.
            overwrite: start again in place of the run in it, which is thrown away by `keep` and put back by `discard`.
                Files that operant did not write stay.
            accept_changes: go on although data, template or reward are not those that the run began with.
            free_keys: keys that may differ on resume: a dotted path (`data.limit`), or the last part of one.
            asked_yaml: the configuration as it was asked for, where `auto` may stand for a resolved value. On resume a
                key agrees when its stored value is either.
            current: reads a stored configuration of any age as today's (`config.completed`).

        Raises:
            OperantError: another process uses the folder; it holds a run and neither `resume` nor `overwrite` is set,
                or no run and something that one would replace; `resume` with no run in it, with another configuration
                or with data that has changed; the place is a file or not writable.
        """
        if resume and overwrite:
            raise OperantError("--resume and --overwrite exclude each other: give one of them")
        path, new_parents = _place_of(out, resume)
        lock = _acquire(path)
        try:
            agreement = _Agreement((config_yaml, asked_yaml or config_yaml), free_keys, current)
            resumed = _make_room(path, agreement, resume=resume, overwrite=overwrite)
            earlier = (path / "run.json").read_text(encoding="utf-8") if resumed else None
            finished, unhashed = _begin(path, config_yaml, resumed, accept_changes)
        except OSError as error:
            lock.release()
            raise OperantError(f"cannot write in {path} ({error.strerror or error}): choose another --out") from error
        except BaseException:
            lock.release()
            raise
        folder = cls(path, config_yaml, resumed=resumed, lock=lock)
        folder.finished, folder.unhashed = finished, unhashed
        folder._accept_changes, folder._earlier = accept_changes, earlier
        folder._new_parents = new_parents
        return folder

    def settle(self, resolved: Mapping[str, Any]) -> None:
        """Put values into config.yaml that were not known when the folder was opened.

        Raises OperantError when it cannot be written.
        """
        self.config = yaml.safe_dump(yaml.safe_load(self.config) | dict(resolved), sort_keys=False, allow_unicode=True)
        replace_file(self.path / "config.yaml", self.config, advice="choose another --out")

    def rests_on(self, sources: Mapping[str, Mapping[str, Hash]]) -> None:
        """Keep the hashes of what the run learns from, {kind: {name: `Hash`}}, beside those of its data.

        Raises OperantError where a resumed run began with others, unless changes are accepted; and when run.json cannot
        be written.
        """
        facts = read_object(self.path / "run.json")
        if not self.resumed:
            facts |= sources
        else:
            changed, unknown = compare(facts, sources)
            self.unhashed += unknown
            if changed and self._earlier is not None and not self._accept_changes:
                replace_file(self.path / "run.json", self._earlier)  # as if it had not been tried
            _refuse(self.path, changed, self._accept_changes)
            if not changed and not unknown:
                return
            facts["resumed_from"] = [*facts.get("resumed_from", []), sources]
        replace_file(self.path / "run.json", json.dumps(facts, indent=1, ensure_ascii=False), advice=_GO_ON)

    def finish(self, stop_reason: str, **facts: Any) -> None:
        """Record in run.json why the run stopped, and any other JSON-able fact worth keeping (best step, totals …).

        Raises OperantError when it cannot be written.
        """
        known = read_object(self.path / "run.json")
        known.update(facts, finished=time.time(), stop_reason=stop_reason)
        text = json.dumps(known, indent=1, ensure_ascii=False)
        replace_file(self.path / "run.json", text, advice=_GO_ON)

    def keep(self) -> None:
        """The run has begun: what it replaces is thrown away."""
        shutil.rmtree(self.path / _ASIDE, ignore_errors=True)

    def discard(self) -> None:
        """Take back a run that never began: remove what operant put here, the folder too if nothing else is in it. What
        it was to replace is there again."""
        _wipe(self.path)
        _put_back(self.path)
        self.close()
        with contextlib.suppress(OSError):
            (self.path / _LOCK).unlink(missing_ok=True)
            for folder in (self.path, *self._new_parents):
                folder.rmdir()  # refuses a folder that holds anything of the user's

    def close(self) -> None:
        """Give the lock back. Safe to call twice."""
        self._lock.release()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class RunLog:
    """Writes metrics and samples of one run, and shows its progress.

    Args:
        folder: a `RunFolder`, or a plain path.
        tensorboard: also write event files; skipped with a warning when the package is missing.
        wandb: the Weights & Biases project to log to as well, or None.
        resume_step: the step of the checkpoint that the run goes on from. Lines of later steps are dropped first, so
            that no step is logged twice; 0 drops all but step 0. None (a new run) keeps what is there.
        clock: the run's seconds so far, which each line of metrics.jsonl then holds beside the time of day.

    `series` holds what was logged of the metrics that `notices` reads, lines of an earlier process too.

    Raises:
        OperantError: `wandb` is asked for and not installed.
    """

    def __init__(
        self,
        folder: RunFolder | str | Path,
        *,
        tensorboard: bool = True,
        wandb: str | None = None,
        resume_step: int | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.path = folder.path if isinstance(folder, RunFolder) else Path(folder)
        self._clock = clock
        self.path.mkdir(parents=True, exist_ok=True)
        self._wandb = _start_wandb(wandb, self.path) if wandb else None
        try:
            for name in ("metrics.jsonl", "samples.jsonl"):
                _truncate(self.path / name, resume_step)
        except OSError as error:
            raise _unwritable(self.path, error) from error
        self.series: dict[str, Series] = {}
        for row in read_jsonl(self.path / "metrics.jsonl"):
            self._remember(int(row.get("step", 0)), row)
        self._metrics = (self.path / "metrics.jsonl").open("a", encoding="utf-8", buffering=1)
        self._samples: TextIO | None = None
        self._board = _start_tensorboard(self.path, resume_step) if tensorboard else None
        #: What is asked for and not written, in words; "" where all is.
        self.lacks = ""
        if tensorboard and self._board is None:
            self.lacks = f"TensorBoard files are not written: {install_line('tensorboard')}, or --tensorboard false"

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line to metrics.jsonl and the same numbers elsewhere. NaN and infinities are kept, as strings."""
        numbers = {name: float(value) for name, value in metrics.items()}
        row: dict[str, Any] = {"step": int(step), "time": round(time.time(), 3)}
        if self._clock is not None:
            row["seconds"] = round(self._clock(), 3)
        row.update((name, _jsonable(value)) for name, value in numbers.items())
        self._write(self._metrics, row)
        self._remember(int(step), numbers)
        if self._board is not None:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, int(step))
        if self._wandb is not None:
            self._wandb.log(numbers, step=int(step))

    def _remember(self, step: int, row: Mapping[str, Any]) -> None:
        for name, value in row.items():
            if name in WATCHED or name.startswith("eval/"):
                self.series.setdefault(name, []).append((step, float(value)))

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append completions to samples.jsonl. The report reads `prompt`, `text`, `reward`, `references` of a row."""
        if self._samples is None:
            self._samples = (self.path / "samples.jsonl").open("a", encoding="utf-8", buffering=1)
        for row in rows:
            self._write(self._samples, {"step": int(step), **_clean(row)})

    def _write(self, stream: TextIO, row: Mapping[str, Any]) -> None:
        try:
            stream.write(json.dumps(row, ensure_ascii=False, allow_nan=False, default=str) + "\n")
        except OSError as error:
            raise _unwritable(self.path, error) from error

    @contextlib.contextmanager
    def progress(
        self,
        total: int | None,
        description: str,
        *,
        start: int = 0,
        seconds: float | None = None,
        clock: Callable[[], float] | None = None,
        stream: TextIO | None = None,
        every: float = 10.0,
    ) -> Iterator[Progress]:
        """Show progress on stderr while the block runs: a live line on a terminal, else a plain line every few seconds.

        Args:
            total: steps in all, or None when unknown.
            description: what is going on, such as "train".
            start: steps that an earlier process has already done.
            seconds: the time limit, if there is one.
            clock: in seconds, what the limit is read off, such as the processor's time; the time of day when left out.
            stream: where to write instead of stderr.
            every: seconds between plain lines.
        """
        bar = Progress(total, description, start=start, seconds=seconds, clock=clock, stream=stream, every=every)
        try:
            yield bar
        finally:
            bar.close()

    def close(self) -> None:
        """Flush and close every file. Safe to call twice."""
        for stream in (self._metrics, self._samples):
            if stream is not None:
                try:
                    stream.close()
                except OSError as error:  # `log` has reported a full disk: no other error may hide that
                    log.warning("the last lines of %s are lost: %s", stream.name, error)
        if self._board is not None:
            self._board.close()
            self._board = None
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Progress:
    """A progress line: share done, steps/s, tokens/s, time left, then whatever the caller shows.

    `advance(n, tokens=…, shown={"reward": 0.31}, missing=Counter(timeout=2))`; `note(text)` prints a line above it.
    """

    def __init__(
        self,
        total: int | None,
        description: str,
        *,
        start: int = 0,
        seconds: float | None = None,
        clock: Callable[[], float] | None = None,
        stream: TextIO | None = None,
        every: float = 10.0,
    ) -> None:
        self.total, self.description, self.done, self._seconds = total, description, start, seconds
        self._stream = sys.stderr if stream is None else stream
        self._every = every
        self._begun = self._printed = time.monotonic()
        self._clock = clock or time.monotonic
        self._set_out = self._clock()
        self._first, self._tokens = start, 0
        self._shown: dict[str, str] = {}
        self._missing: dict[str, int] = {}
        self._live: Any = None
        self._task: Any = None
        if self._stream.isatty():
            self._live, self._task = _live_bar(self._stream, total, description, start)

    def advance(
        self,
        steps: int = 1,
        *,
        tokens: int = 0,
        shown: Mapping[str, float | str] | None = None,
        missing: Mapping[str, int] | None = None,
    ) -> None:
        """Count steps and tokens done. `shown` replaces values of the same name, an empty one takes it away; `missing`
        is all so far, by reason."""
        self.done += steps
        self._tokens += tokens
        for name, value in (shown or {}).items():
            self._shown[name] = value if isinstance(value, str) else f"{value:.4g}"
        if missing is not None:
            self._missing = {reason: n for reason, n in missing.items() if n}
        if self._live is not None:
            self._live.update(self._task, completed=self.done, total=self._expected()[0], rest=self._rest())
        elif time.monotonic() - self._printed >= self._every or self.done == self.total:
            self._print()

    def note(self, text: str) -> None:
        """Print one line without disturbing the progress line."""
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self._stream, flush=True)

    def line(self) -> str:
        """Return the line that a plain log would show now."""
        total, left = self._expected()
        about = "" if total == self.total else "~"
        share = "" if total is None else f"/{about}{total} ({self.done / max(total, 1):.0%})"
        ending = f"ETA {_clock(left)}" if left else f"elapsed {_clock(time.monotonic() - self._begun)}"
        parts = [f"{self.description} {self.done}{share}", ending]
        rest = self._rest()
        return " · ".join([*parts, rest] if rest else parts)

    def close(self) -> None:
        """Stop showing. The last state stays on the terminal, or is printed if it has not been yet."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        elif self.done != self._first and self.done != self.total:
            self._print()

    def _expected(self) -> tuple[int | None, float | None]:
        """(steps in all, seconds left), as far as can be told: a time limit may come before the last step."""
        fresh = self.done - self._first
        if fresh <= 0:
            return self.total, None
        each = max(time.monotonic() - self._begun, 1e-9) / fresh
        more = math.inf if self.total is None else self.total - self.done
        if self._seconds is not None:
            spent = max(self._clock() - self._set_out, 1e-9)
            allowed = max(0.0, self._seconds - spent) * fresh / spent
            if allowed < more:
                return self.done + round(allowed), each * allowed
        return self.total, None if self.total is None else each * more

    def _rest(self) -> str:
        elapsed = max(time.monotonic() - self._begun, 1e-9)
        parts = [f"{self._tokens / elapsed:,.0f} tokens/s"] if self._tokens else []
        parts += [f"{name} {value}" for name, value in self._shown.items() if value]
        if self._missing:
            parts.append("missing " + ", ".join(f"{reason} {n}" for reason, n in sorted(self._missing.items())))
        return " · ".join(parts)

    def _print(self) -> None:
        self._printed = time.monotonic()
        print(self.line(), file=self._stream, flush=True)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read JSON Lines written by `RunLog`. A last line cut off by a crash is left out; a missing file is empty."""
    rows: list[dict[str, Any]] = []
    with contextlib.suppress(FileNotFoundError), Path(path).open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            with contextlib.suppress(json.JSONDecodeError):
                row = json.loads(line)
                if isinstance(row, dict):
                    rows.append(row)
    return rows


def _unwritable(path: Path, error: OSError) -> OperantError:
    return OperantError(f"cannot write in {path} ({error.strerror or error}): {_GO_ON}")


def _place_of(out: str | Path, resume: bool) -> tuple[Path, list[Path]]:
    """(the folder, the folders above it that are to be made). Raises OperantError where no run can be."""
    if not str(out).strip():
        raise OperantError("--out is empty: give a folder for the run")
    path = Path(out)
    try:
        is_file = path.exists() and not path.is_dir()
        new_parents = [parent for parent in path.parents if not parent.exists()]
        there = _started(path) or (path / _ASIDE).exists()
    except OSError as error:  # a name that is too long, a folder that may not be looked into
        raise OperantError(f"cannot write in {path} ({error.strerror}): choose another --out") from error
    if is_file:
        raise OperantError(f"{path} is a file, not a folder: choose another --out")
    if resume and not there:
        raise OperantError(f"there is no run to resume in {path}: leave --resume out to start one, or correct --out")
    return path, new_parents


def _make_room(path: Path, agreement: _Agreement, *, resume: bool, overwrite: bool) -> bool:
    """Leave the run that is resumed, or nothing; True for the former. Raises OperantError for what must not go."""
    _settle(path)
    resumed = _started(path)
    mine = next((name for name in (*_RUN_FOLDERS, *_RUN_FILES) if (path / name).exists()), None)
    if mine is not None and not resumed:
        raise OperantError(
            f"{path} holds no run, but {mine}, which one would replace: choose another --out, or move it away"
        )
    if resumed and resume:
        agreement.check(path)
    elif resumed and _nothing_learned(path):
        _wipe(path)
    elif resumed and overwrite:
        _set_aside(path)
    elif resumed:
        raise OperantError(
            f"{path} already holds a run: go on with it by --resume, or choose another --out "
            "(--overwrite throws it away)"
        )
    _sweep(path)
    return resumed and resume


def _begin(path: Path, config_yaml: str, resumed: bool, accept_changes: bool) -> tuple[bool, list[str]]:
    """Write down that the run goes on, or begins. Returns (whether it had come to an end of its own, the kinds of
    sources that it keeps no hash of). Raises OperantError where its data has changed."""
    facts: dict[str, Any] = read_object(path / "run.json") if resumed else {"started": time.time()}
    # one that a person stopped goes on as if nobody had
    finished = "finished" in facts and not str(facts.get("stop_reason")).startswith("interrupted")
    if resumed:
        facts = {k: v for k, v in facts.items() if k not in ("finished", "stop_reason")}
        facts["resumed"] = [*facts.get("resumed", []), time.time()]
    settings = yaml.safe_load(config_yaml)
    origin = provenance(settings if isinstance(settings, dict) else {})
    unhashed: list[str] = []
    if resumed:
        changed, unhashed = compare(facts, {"data": origin["data"]})
        _refuse(path, changed, accept_changes)
    if not resumed:
        facts |= origin
    elif origin != {name: facts.get(name) for name in origin}:  # it goes on elsewhere, or by other code
        facts["resumed_from"] = [*facts.get("resumed_from", []), origin]
    another = "choose another --out"
    text = json.dumps(facts, indent=1, ensure_ascii=False)
    replace_file(path / "run.json", text, advice=another)  # first: it makes the rest a run's
    replace_file(path / "config.yaml", config_yaml, advice=another)
    for name in ("checkpoints", "curves"):
        (path / name).mkdir(exist_ok=True)
    return finished, unhashed


def _refuse(path: Path, changed: Sequence[str], accept_changes: bool) -> None:
    """Raises OperantError for sources that have changed, unless that is accepted."""
    if changed and not accept_changes:
        raise OperantError(
            f"cannot resume {path}: {' and '.join(changed)} changed since it began; put back what was there, "
            "choose another --out, or go on with what is there now by --accept_changes true"
        )


def _started(path: Path) -> bool:
    return (path / "run.json").exists()


def _set_aside(path: Path) -> None:
    shutil.rmtree(path / _ASIDE, ignore_errors=True)
    (path / _ASIDE).mkdir()
    # run.json first: without it what is left here is still the old run's
    for name in ("run.json", *_RUN_FOLDERS, *_RUN_FILES):
        if (path / name).exists():
            os.rename(path / name, path / _ASIDE / name)


def _put_back(path: Path) -> None:
    if (path / _ASIDE).is_dir():
        for name in (*_RUN_FOLDERS, *sorted(_RUN_FILES, key="run.json".__eq__)):  # run.json last
            if (path / _ASIDE / name).exists():
                os.rename(path / _ASIDE / name, path / name)
        shutil.rmtree(path / _ASIDE, ignore_errors=True)


def _settle(path: Path) -> None:
    """After a process that was killed while it replaced a run: the new one stays if it has begun, else the old one."""
    if (path / _ASIDE).is_dir():
        if _started(path) and not _nothing_learned(path):
            shutil.rmtree(path / _ASIDE, ignore_errors=True)
            return
        if _started(path):
            _wipe(path)
        _put_back(path)


def _nothing_learned(path: Path) -> bool:
    """True for what is left of a run that took no step: it failed before its first update, or was killed before it had
    written a checkpoint or a line of its log."""
    facts = read_object(path / "run.json")
    if "finished" in facts:
        return facts.get("failed") is True and facts.get("updates") == 0
    kept = [path / "model", path / "results.json", path / "report.html", *(path / "checkpoints").glob("step-*")]
    return not any(p.exists() for p in kept) and not any(
        (path / name).exists() and (path / name).stat().st_size for name in ("metrics.jsonl", "samples.jsonl")
    )


def _acquire(path: Path) -> FileLock:
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path / _LOCK)
        lock.acquire(timeout=0)
    except Timeout as error:
        holder = ""
        with contextlib.suppress(OSError, ValueError):
            holder = f" (process {int((path / _LOCK).read_text())})"
        raise OperantError(
            f"{path} is already in use by another run{holder}: wait for it, or choose another --out"
        ) from error
    except OSError as error:
        raise OperantError(f"cannot write in {path} ({error.strerror or error}): choose another --out") from error
    with contextlib.suppress(OSError):  # for the message only; the kernel's lock is what counts
        (path / _LOCK).write_text(str(os.getpid()))
    return lock


@dataclass(frozen=True, slots=True)
class _Agreement:
    """What the stored configuration of a resumed run must agree with: a text for each form of today's, which keys are
    free, and how a configuration of any age is read."""

    forms: tuple[str, ...]
    free_keys: Collection[str]
    current: Callable[[Mapping[str, Any]], Mapping[str, Any]]

    def check(self, path: Path) -> None:
        """Raises OperantError when the configuration in a run folder cannot be read, or is another one."""
        try:
            kept = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise OperantError(f"{path}/config.yaml cannot be read: start a new run with another --out") from error
        old = dict(_leaves(self.current(kept) if isinstance(kept, dict) else kept))
        forms = [dict(_leaves(yaml.safe_load(form))) for form in self.forms]
        absent = object()
        differing = [
            key
            for key in sorted(old.keys() | forms[0].keys())
            if all(old.get(key, absent) != form.get(key, absent) for form in forms)
            and key not in self.free_keys
            and key.rsplit(".", 1)[-1] not in self.free_keys
        ]
        if differing:
            changes = "; ".join(
                f"{key}: was {old.get(key, 'absent')!r}, now {forms[0].get(key, 'absent')!r}" for key in differing[:5]
            )
            more = f"; and {len(differing) - 5} more" if len(differing) > 5 else ""
            raise OperantError(
                f"cannot resume {path} with another configuration ({changes}{more}): "
                "give the old values, or choose another --out"
            )


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and (value or not prefix):
        for key, inner in value.items():
            yield from _leaves(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def _sweep(path: Path) -> None:
    """Remove what processes killed in the middle of a write have left; only with the lock in hand."""
    checkpoint.clean(path, *_RUN_FILES)
    for name in (*_RUN_FILES, *_RUN_FOLDERS):  # `run` copies folders under such names; files had them before 0.1
        for left in path.glob(f".{name}-*"):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)


def _wipe(path: Path) -> None:
    for name in _RUN_FOLDERS:
        shutil.rmtree(path / name, ignore_errors=True)
    for name in _RUN_FILES:
        (path / name).unlink(missing_ok=True)


def _truncate(path: Path, step: int | None) -> None:
    """Drop lines after `step` and a last line that a crash cut off."""
    if not path.exists():
        return
    rows = read_jsonl(path)
    kept = [row for row in rows if step is None or row.get("step", 0) <= step]
    whole = path.read_bytes()
    if len(kept) != whole.count(b"\n") or not whole.endswith(b"\n"):
        replace_file(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))


def _jsonable(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _clean(value: Any) -> Any:
    if isinstance(value, float):
        return _jsonable(value)
    if isinstance(value, Mapping):
        return {str(key): _clean(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(inner) for inner in value]
    if hasattr(value, "tolist"):  # numpy and torch
        return _clean(value.tolist())
    return value


def _start_tensorboard(path: Path, resume_step: int | None) -> Any:
    try:
        writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
    except ImportError:
        return None
    return writer(str(path / "tensorboard"), purge_step=None if resume_step is None else resume_step + 1)


def _start_wandb(project: str, path: Path) -> Any:
    try:
        wandb = importlib.import_module("wandb")
    except ImportError as error:
        raise OperantError(
            f"--wandb needs a package that is not installed: {install_line(extra='wandb')}; or leave it out"
        ) from error
    config = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8")) if _started(path) else None
    return wandb.init(project=project, dir=str(path), name=path.name, config=config, resume="allow")


def _live_bar(stream: TextIO, total: int | None, description: str, start: int) -> tuple[Any, Any]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    bar = Bar(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[rest]}"),
        console=Console(file=stream),
        refresh_per_second=4,
    )
    bar.start()
    return bar, bar.add_task(description, total=total, completed=start, rest="")


def _clock(seconds: float) -> str:
    minutes, second = divmod(int(seconds + 0.5), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
