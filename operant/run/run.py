"""The part that training stages share: folder, checkpoints, exact resume, Ctrl-C, limits, non-finite steps, report."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import yaml
from torch import nn

from operant.algorithms.learner import Learner, Trainable
from operant.config import LoraConfig, RunConfig, check_settings, completed, to_yaml
from operant.models.folder import copy_linked, settle
from operant.run import checkpoint
from operant.run.files import swap_folder
from operant.run.notices import new_notices, notices
from operant.run.provenance import Hash, rows_hash
from operant.run.report import write_report
from operant.run.runlog import FREE_KEYS, Progress, RunFolder, RunLog
from operant.types import OperantError, StepStats

#: Of a stage: print nothing at all, or "settings": leave out the configuration alone.
Quiet = bool | Literal["settings"]


def mixed_seed(*parts: object) -> int:
    """A seed below 2^63 from several parts, so that every step has its own and none depends on the steps before."""
    digest = hashlib.blake2b("\x00".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def model_in_words(model: Trainable, dtype: str, learned: Sequence[nn.Parameter] | None = None) -> str:
    """A model as a stage begins with it, such as "1,066,624 parameters, 16,384 trainable; cpu, float32".

    learned: the parameters that are trained; None says nothing of them.
    """
    every = {id(p): p.numel() for p in [*model.model.parameters(), *model.critic_parameters(), *(learned or ())]}
    words = f"{sum(every.values()):,} parameters"
    if learned is not None:
        count = sum({id(p): p.numel() for p in learned}.values())
        words += f", {'all' if count == sum(every.values()) else f'{count:,}'} trainable"
    return f"{words}; {model.device}, {dtype}"


C = TypeVar("C", bound=RunConfig)


#: Settings that may be `auto` or null, which a resumed run takes from what it began with.
BEGUN_WITH = ("lr", "chat", "system", "template_arguments", "prefix", "separator", "source_lang", "target_lang")


def as_begun(config: C) -> C:
    """A configuration whose learning rate and format of prompts, where they are `auto` or null and a run is resumed,
    are those that the run has: what `auto` means may have changed since. Everything else is as asked."""
    if not config.resume:
        return config
    open_ones = [name for name in BEGUN_WITH if getattr(config, name, 0) in ("auto", None)]
    try:
        kept = yaml.safe_load((Path(config.out) / "config.yaml").read_text(encoding="utf-8"))
        stored = completed(type(config), kept)
    except (OSError, yaml.YAMLError, AttributeError, OperantError):
        return config  # `Run` says what is wrong with the folder
    begun = {name: stored[name] for name in open_ones if stored.get(name) not in ("auto", None)}
    return dataclasses.replace(config, **begun)


class DataOrder:
    """Which rows a step takes: epoch after epoch in an order keyed by (seed, epoch). A pure function of the step."""

    def __init__(self, size: int, per_step: int, seed: int, name: str = "data") -> None:
        self.size, self.per_step, self.seed, self.name = size, per_step, seed, name
        self._epoch = -1
        self._order = np.empty(0, np.int64)

    def _at(self, index: int) -> int:
        epoch, within = divmod(index, self.size)
        if epoch != self._epoch:
            self._order = np.random.default_rng(mixed_seed(self.seed, self.name, epoch)).permutation(self.size)
            self._epoch = epoch
        return int(self._order[within])

    def take(self, step: int) -> list[int]:
        """Row numbers of step `step` (from 0)."""
        return self.slice(step * self.per_step, self.per_step)

    def slice(self, start: int, count: int) -> list[int]:
        """Row numbers of `count` places from `start` on, for steps that take different numbers of rows."""
        return [self._at(start + i) for i in range(count)]


class Run:
    """One training run. Use as a context manager:

        with Run(config, "train") as run:
            policy = …; learner = Learner(policy, …)
            run.takes("pairs", len(pairs), len(held_out))
            run.attach(policy, learner, state)      # state: a dict that checkpoints keep and resume fills in again
            for step in run.steps(config.steps):    # ends on Ctrl-C, at the time limit, or after run.stop(reason)
                stats = learner.step(…)
                run.record(stats, {"train/…": …})

    On leaving, the newest weights are saved, the best become `out/model`, and the report is written. A second Ctrl-C
    leaves in the middle of a step: nothing of that step is saved, and the newest checkpoint is what a resumed run goes
    on from.
    """

    def __init__(
        self, config: RunConfig, stage: str, *, in_force: Mapping[str, Any] | None = None, quiet: Quiet = False
    ) -> None:
        """`in_force`: settings that the stage has resolved, by name; the run folder keeps them in place of `auto`.
        `quiet`: print nothing at all; "settings" leaves out the configuration alone.

        Raises OperantError for settings out of range, and as `RunFolder.open` does.
        """
        check_settings(config)
        config = as_begun(config)
        self.config, self.stage = config, stage
        self.quiet, self._shows_settings = quiet is True, not quiet
        if config.threads:
            torch.set_num_threads(config.threads)
        # a decaying learning rate depends on the number of steps, which is then part of what is learned
        constant = getattr(config, "schedule", "constant") == "constant"
        # said of one start, and not of the run: the next start from this file must not throw it away
        kept = dataclasses.replace(config, resume=False, overwrite=False, accept_changes=False)
        settled = dict(in_force or {})
        if isinstance(config, LoraConfig):
            settled["lora_alpha"] = config.settled_alpha()
        self.folder = RunFolder.open(
            config.out, to_yaml(dataclasses.replace(kept, **settled)), asked_yaml=to_yaml(kept),
            current=functools.partial(completed, type(config)), resume=config.resume, overwrite=config.overwrite,
            accept_changes=config.accept_changes,
            free_keys=FREE_KEYS if constant else FREE_KEYS - {"steps"},
        )  # fmt: skip
        self.step = 0
        self.stop_reason = ""
        self.decided = ""
        self.failed: str | None = None
        self.best_value = -math.inf
        self.best_step = -1
        self.measured_step = -1  # the last step whose held-out measurement is in the log
        self.best_checkpoint: str | None = None
        self.spent_seconds = 0.0
        self.state: dict[str, Any] = {}
        self.facts: dict[str, Any] = {}  # more for run.json
        self._known_notices: set[str] = set()  # the names of those that hold
        self.log: RunLog
        self._data = ""  # what it learns from, in words
        self._sources: dict[str, Mapping[str, Hash]] = {}  # and the hashes of what no file of the configuration names
        self._now = time.process_time if config.clock == "cpu" else time.perf_counter
        self._begun = self._now()
        self._attached = self._logs = False
        self._inside = False  # a step has begun and not ended: what it has moved so far belongs to no step's end
        self._saved_step = -1
        self._interrupts = 0
        self.interrupted = False
        self.newest_is_best = False
        self._progress: Progress | None = None
        self._handler: Any = None

    # --- life ----------------------------------------------------------------------------------------------------

    def __enter__(self) -> Run:
        with contextlib.suppress(ValueError):  # only the main thread may take the signal
            self._handler = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            try:
                # a failed run has a report too
                if self._attached and (error is None or isinstance(error, KeyboardInterrupt) or self.failed):
                    if self._inside and isinstance(error, KeyboardInterrupt) and not self.failed:
                        self._back()
                    self._finish()
            finally:
                if self._logs:
                    self.log.close()
            left = self._attached and isinstance(error, KeyboardInterrupt)
            if error is not None and not left and not self.failed and self.step == 0 and not self.folder.resumed:
                # nothing was learned: leave no half-made run in the way of the next try
                self.folder.discard()
        finally:
            if self._handler is not None:
                signal.signal(signal.SIGINT, self._handler)
            self.folder.close()

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._interrupts += 1
        if self._interrupts > 1 or not self._attached:
            raise KeyboardInterrupt
        self.interrupted = True
        self.stop("interrupted; go on with --resume")
        if self._progress is not None:
            self._progress.note("Ctrl-C: finishing this step and saving (again to leave at once, without it)")

    def stop(self, reason: str, *, failed: bool = False, decided: bool = False) -> None:
        """End after the current step, with the reason in the report; `failed` makes the program's exit status 1.

        decided: by what was learned (a target, patience), not by a clock or a person. Call it before `measured`, whose
        checkpoint then knows: a run that is killed before it has finished ends there on resume too."""
        if decided and not self.failed and not self.decided:  # also where a person has stopped it in the same step
            self.decided = reason
        if not self.stop_reason:
            self.stop_reason = reason
            self.failed = reason if failed else None

    # --- attaching and resuming ----------------------------------------------------------------------------------

    def takes(
        self, what: str, rows: int, held_out: int, source: str = "", *, given: Sequence[Any] = (),
        reward: Mapping[str, Hash] | None = None,
    ) -> None:  # fmt: skip
        """Say how many rows, called `what`, the stage learns from and measures on. `source`: where the latter are from.
        `given`: the rows themselves, where they were made in Python. `reward`: hashes of its source.

        Call it before `attach`, which shows it, and compares with what a resumed run began with."""
        self._sources = {"rows": {"given": rows_hash(given)}} if len(given) else {}
        if reward is not None:
            self._sources["reward"] = reward
        apart = f"{held_out:,} held out" + (f" ({source})" if source else "") if held_out else "nothing held out"
        self._data = f"{rows:,} {what}, {apart}; "

    def settle(self, **resolved: Any) -> None:
        """Keep settings that are known only now, such as the learning rate of what was loaded, in place of `auto`.

        Call it before `attach`. Raises OperantError when they cannot be written."""
        self.config = dataclasses.replace(self.config, **resolved)
        self.folder.settle(resolved)

    def attach(self, policy: Trainable, learner: Learner, state: dict[str, Any]) -> None:
        """Name what checkpoints hold; on resume, fill it in from the last one.

        Raises OperantError when a resumed run began with another chat template, reward or rows.
        """
        self.policy, self.learner, self.state = policy, learner, state
        learner.say = self.note
        if codec := getattr(policy, "codec", None):
            self._sources["template"] = {"chat": {"sha256": codec.template_hash, "of": "its text"}}
        self.folder.rests_on(self._sources)
        # only now, so that a fault in the data or the model is the one line that is seen
        if self._shows_settings:
            self.note(f"{self.stage} in {self.folder.path} with:\n{_indented(self.folder.config)}")
        learned = [*policy.trainable_parameters(), *policy.critic_parameters()]
        dtype = getattr(policy, "dtype", self.config.dtype)
        self.note(f"{self.stage}: {self._data}{model_in_words(policy, dtype, learned)}")
        if self.folder.unhashed:
            self.note(
                f"{self.folder.path} was begun before runs kept hashes of their {' and '.join(self.folder.unhashed)}: "
                "whether what it learns from has changed since is not known"
            )
        resume_step: int | None = None
        found: Path | None = None
        if self.folder.resumed:
            checkpoint.clean(self.folder.checkpoints)
            found = checkpoint.latest(self.folder.checkpoints)
            resume_step = 0
            if found is not None:
                self._load(found)
                resume_step = self.step
            if resume_step == 0 and self.measured_step < 0:
                resume_step = -1  # saved before the first measurement, which will be logged again
        self.log = RunLog(
            self.folder, tensorboard=self.config.tensorboard, wandb=self.config.wandb, resume_step=resume_step,
            clock=lambda: self.seconds,
        )  # fmt: skip
        self._logs = True
        if self.log.lacks:
            self.note(self.log.lacks)
        if found is None:
            self.save()
        self.folder.keep()
        self._attached = True
        self._begun = self._now()

    def _load(self, path: Path) -> None:
        self.policy.restore(path / "model")
        saved = torch.load(path / "learner.pt", map_location=self.policy.device, weights_only=True)
        self.learner.load_state_dict(saved["learner"])
        self._recall(path)

    def _recall(self, path: Path) -> None:
        """The run's own facts as they were in a checkpoint."""
        facts = json.loads((path / "state.json").read_text(encoding="utf-8"))
        self.step = self._saved_step = int(facts["step"])
        self.best_value, self.best_step = facts["best_value"], facts["best_step"]
        if self.best_value is None:
            self.best_value = -math.inf
        # a checkpoint that is the best was written before it could know its own name
        self.best_checkpoint = path.name if self.best_step == self.step else facts["best_checkpoint"]
        self.measured_step = facts.get("measured_step", -1)
        if not self.folder.finished:
            self.stop_reason = self.decided = facts.get("decided", "")
        self.spent_seconds, self._begun = facts["spent_seconds"], self._now()
        self.state.clear()
        self.state.update(facts["state"])

    def save(self) -> Path:
        """A checkpoint of this instant: weights, optimizer, counters, `state`. Older ones go, never the best."""

        def write(folder: Path) -> None:
            self.policy.save(folder / "model", by_name=True)
            torch.save({"learner": self.learner.state_dict()}, folder / "learner.pt")
            facts = {
                "step": self.step,
                "best_value": self.best_value if math.isfinite(self.best_value) else None,
                "best_step": self.best_step,
                "best_checkpoint": self.best_checkpoint,
                "measured_step": self.measured_step,
                "decided": self.decided,
                "spent_seconds": self.seconds,
                "state": self.state,
            }
            (folder / "state.json").write_text(json.dumps(facts), encoding="utf-8")

        healthy = self.learner.skipped_in_row == 0
        path = checkpoint.save(self.folder.checkpoints, self.step, write, healthy=healthy, meta={"stage": self.stage})
        self.policy.moved_to(path / "model")
        self._saved_step = self.step
        protect = [self.best_checkpoint] if self.best_checkpoint else []
        checkpoint.prune(self.folder.checkpoints, self.config.keep, protect)
        return path

    @property
    def seconds(self) -> float:
        """Seconds of this run by the configured clock, earlier parts of a resumed one included."""
        return self.spent_seconds + self._now() - self._begun

    # --- the loop ------------------------------------------------------------------------------------------------

    def steps(self, total: int) -> Iterator[int]:
        """Step numbers from where the run stands to `total`. Seeds torch for each, so a resumed one is the same."""
        if self.step >= total:
            self.stop(f"all {total} steps {'were already done' if self.folder.finished else 'done'}")
        limit = 60 * self.config.max_minutes - self.seconds if self.config.max_minutes else None
        shown = self.log.progress(total, self.stage, start=self.step, seconds=limit, clock=self._now)
        with contextlib.nullcontext() if self.quiet else shown as progress:
            self._progress = progress
            while self.step < total and not self.stop_reason:
                torch.manual_seed(mixed_seed(self.config.seed, self.stage, self.step))
                self._inside = True
                yield self.step
                self._inside = False
                if self.config.max_minutes and self.seconds > 60 * self.config.max_minutes:
                    self.stop(f"the time limit of {self.config.max_minutes:g} minutes")
                if self.step % self.config.save_every == 0 and self.step != self._saved_step and not self.failed:
                    self.save()
            self._progress = None
        if not self.stop_reason:
            self.stop(f"all {total} steps done")
        # now, while the policy still has this step's weights: what follows may put the best ones back
        if self.step != self._saved_step and not self.failed:
            self.save()

    def record(
        self,
        stats: StepStats,
        metrics: dict[str, float],
        *,
        shown: dict[str, float | str] | None = None,
        missing: dict[str, int] | None = None,
    ) -> None:
        """Count a step, log it, and roll back when too many in a row were non-finite."""
        self.step += 1
        values = {"train/loss": stats.loss, "train/grad_norm": stats.grad_norm, "train/seconds": stats.seconds}
        values.update({f"train/{name}": value for name, value in stats.coefficients.items()})
        if stats.skipped:
            values["train/skipped"] = float(self.learner.skipped)
        self.log.log(self.step, values | metrics)
        if self._progress is not None:
            self._progress.advance(tokens=stats.tokens, shown=shown, missing=missing)
            if stats.skipped:
                in_row = self.learner.skipped_in_row
                self._progress.note(
                    f"step {self.step} skipped: {stats.reason}" + (f" ({in_row} in a row)" if in_row else "")
                )
        if self.learner.skipped_in_row >= self.config.max_nonfinite_steps:
            good = checkpoint.latest(self.folder.checkpoints)
            if good is not None:
                self._load(good)
            self.stop(
                f"{self.config.max_nonfinite_steps} steps in a row were non-finite ({stats.reason}); "
                f"rolled back to step {self.step}. Try a lower --lr",
                failed=True,
            )

    def watch(self) -> None:
        """Tell what `notices` finds in the run so far, each thing once for as long as it holds."""
        found = new_notices(notices(self.log.series, self.facts.get("optimises", ())), self._known_notices)
        if signs := [notice.text for notice in found if notice.kind == "collapse"]:
            self.note(f"step {self.step}: signs of collapse: {'; '.join(signs)}. Try a lower --lr")
        for notice in found:
            if notice.kind == "idle":
                self.note(f"step {self.step}: {notice.text}, which teaches nothing; check the reward")

    @property
    def collapsed(self) -> bool:
        """Whether the texts or the likelihoods of this step show a collapse: its weights are not to be kept as best.

        The distance from the beginning alone does not: a policy that leaves what it was taught to leave is far too.
        """
        found = notices(self.log.series, self.facts.get("optimises", ()))
        return any(notice.kind == "collapse" and notice.name != "kl_ref" for notice in found)

    def measured(self, value: float) -> bool:
        """Note a held-out measurement (higher is better); True when it is the best so far, which is then kept."""
        if not value > self.best_value:
            return False
        self.best_value, self.best_step = value, self.step
        self.best_checkpoint = self.save().name
        return True

    def promote_best(self, value: float) -> None:
        """A last look after an early stop found the newest weights to be the best: they become `out/model`. What a
        resumed run goes on from does not change, so that it is the run that never stopped."""
        self.newest_is_best, self.best_value, self.best_step = True, value, self.step

    def note(self, text: str) -> None:
        """Print one line, above the progress line where there is one; nothing in a quiet run."""
        if self._progress is not None:
            self._progress.note(text)
        elif not self.quiet:
            print(text, file=sys.stderr)

    def _back(self) -> None:
        """Forget the step that was left in its middle; what the weights are now is never saved."""
        self.step, self.stop_reason, self.decided = self._saved_step, "", ""
        newest = checkpoint.latest(self.folder.checkpoints)
        if newest is not None:
            self._recall(newest)
        if not self.decided:
            self.stop_reason = f"interrupted in the middle of a step; --resume goes on from step {self._saved_step}"

    def _finish(self) -> None:
        if not self.failed and self.step != self._saved_step:
            self.save()
        best = (
            self.folder.checkpoints / self.best_checkpoint if self.best_checkpoint and not self.newest_is_best else None
        )
        source = (
            best if best is not None and checkpoint.verify(best) is None else checkpoint.latest(self.folder.checkpoints)
        )
        if source is not None:
            _replace(source / "model", self.folder.path / "model")
        self.folder.finish(
            self.stop_reason or "left",
            steps=self.step,
            best_step=self.best_step if self.best_step >= 0 else self.step,
            best_value=self.best_value if math.isfinite(self.best_value) else None,
            seconds=round(self.seconds, 2),
            skipped_steps=self.learner.skipped,
            failed=bool(self.failed),
            updates=self.learner.steps,
            **self.facts,
        )
        written = ""
        if self.config.report:
            try:
                write_report(self.folder.path)
                written = f", report in {self.folder.path}/report.html"
            except Exception as error:  # a report that fails must not cost the run
                self.note(f"the report could not be written: {error}")
        self.note(f"{self.stage}: {self.stop_reason or 'left'}. Model in {self.folder.path}/model{written}")

    def restore_best(self) -> None:
        """Put the best checkpoint's weights into the policy."""
        if self.best_checkpoint and not self.newest_is_best:
            best = self.folder.checkpoints / self.best_checkpoint
            if fault := checkpoint.verify(best):
                self.note(f"the best checkpoint {best} is broken ({fault}); the newest weights are kept")
            else:
                self.policy.restore(best / "model")


def _replace(source: Path, target: Path) -> None:
    """Copy a model's folder so that the target is never half-written: a copy beside it, then two renames. Its weights
    are hard links where the disk allows."""
    staging = target.with_name(f".{target.name}-new-{os.getpid()}")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        copy_linked(source, staging)
        settle(staging, source, target)
        swap_folder(staging, target)
    except OSError as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise OperantError(
            f"cannot write {target} ({error.strerror}); the checkpoints are intact: free some space and use --resume"
        ) from error


def _indented(text: str) -> str:
    return "".join(f"  {line}\n" for line in text.splitlines())
