"""The learner kept running, and what it publishes served: by whomever it is published, whatever fails."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forks import PATIENCE, Forked
from live import MemoryStore, answered, logprob, prompts

from operant.config import WorkerConfig
from operant.data.feedback_log import line_of
from operant.live.learning.events import FeedbackFile
from operant.live.learning.execution import load_like
from operant.live.learning.worker import Worker
from operant.live.serving import supervisor as module
from operant.live.serving.engine import RESIDENT, Busy, Engine
from operant.live.serving.supervisor import Supervisor, arguments_of
from operant.live.storage.versions import StepRecord, Versions
from operant.models.policy import Policy
from operant.run import checkpoint
from operant.types import Completion, OperantError, Sampling

Make = Callable[..., Policy]
# stands in for the learner: tells, and notes in a file, what reaches it
PARROT = """
import json, signal, sys
notes = open(sys.argv[1], "a", buffering=1)
def leave(*_):
    notes.write("told to stop\\n")
    sys.exit(0)
signal.signal(signal.SIGTERM, leave)
print(json.dumps({"ready": 0}), flush=True)
for line in sys.stdin:
    notes.write("poked" + line)
    print(json.dumps({"step": 1, "state": "nothing"}), flush=True)
"""


class Ledger:
    """What a store is told."""

    def __init__(self) -> None:
        self.records: list[StepRecord] = []
        self.serving: list[tuple[int, float]] = []
        self.fails = 0

    def reconcile(self, records: Iterable[StepRecord]) -> None:
        if self.fails:
            self.fails -= 1
            raise OperantError("the database is locked")
        self.records += records

    def served(self, version: int, at: float) -> None:
        self.serving.append((version, at))

    def forget(self, source: str) -> int:
        raise OperantError("nobody is forgotten here")


@dataclasses.dataclass
class Live:
    store: MemoryStore
    worker: Worker
    engine: Engine
    ledger: Ledger
    start: Callable[..., Supervisor]

    @property
    def versions(self) -> Versions:
        return self.worker.versions

    @property
    def root(self) -> Path:
        return self.versions.root

    def rate(self, *arguments: Any) -> None:
        """A version as another process publishes it."""
        self.store.add(*arguments)
        assert self.worker.once()

    def ask(self, name: str, **options: Any) -> Completion:
        policy = self.worker.current().policy
        sampling = Sampling(max_tokens=4, seed=1, banned=(policy.codec.eos_id,))
        return self.engine.submit(prompts(policy)[0], sampling, ids=[name], **options)[0].result(PATIENCE)


def until(holds: Callable[[], Any], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < end, what
        time.sleep(0.01)


@pytest.fixture
def make_live(tmp_path: Path, make_policy: Make, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Live]]:
    monkeypatch.setattr(module, "FIRST_PAUSE", 0.05)
    made: list[Any] = []

    def make(**options: Any) -> Live:
        policy = make_policy("gpt2")
        policy.save(tmp_path / "model")
        settings: dict[str, Any] = {
            "root": str(tmp_path / "live"), "model": str(tmp_path / "model"), "store": str(tmp_path / "log.jsonl"),
            "device": "cpu", "anchor_rows": 3, "anchor_tokens": 6, "lr": 1e-3, "threads": 1, "lora_rank": 0,
        }  # fmt: skip
        store, config = answered(policy), WorkerConfig(**(settings | options))
        worker = Worker(config, store, lambda told: None)
        worker.start()
        like = worker.current().policy.twin() if config.lora_rank else None
        engine = Engine(policy if like is None else worker.current().policy.twin(), 0)
        ledger = Ledger()
        parrot = [sys.executable, "-c", PARROT, str(tmp_path / "notes")]

        def start(command: list[str] | None = parrot, config: WorkerConfig = config, niceness: int = 10) -> Supervisor:
            made.append(Supervisor(config, engine, ledger, command=command, like=like, niceness=niceness))
            return made[-1]

        made.append(engine)
        return Live(store, worker, engine, ledger, start)

    yield make
    for one in reversed(made):
        one.close()


MakeLive = Callable[..., Live]


def test_what_is_published_or_rolled_back_by_another_process_is_served(make_live: MakeLive) -> None:
    live = make_live()
    supervisor = live.start()
    until(lambda: supervisor.state == "up", "the learner tells that it is ready")
    assert live.ask("a").policy_version.tolist() == [0] * 4  # type: ignore[union-attr]
    began = time.time()
    for version in (1, 2):
        live.rate("c1", "score", 0.9 + version / 100)
        until(lambda version=version: live.engine.stats()["version"] == version, "it is served")  # type: ignore[misc]
    said = live.ask("b")
    assert said.policy_version is not None and set(said.policy_version.tolist()) == {2}
    # with the weights that are on disk, not merely under their number
    policy = live.worker.current().policy
    assert said.model_logprobs is not None
    assert np.allclose(said.model_logprobs, logprob(policy, prompts(policy)[0], said.tokens.tolist()), atol=1e-4)
    Versions(live.root).roll_back()
    until(lambda: live.engine.stats()["version"] == 1, "the version before is served again")
    Versions(live.root).promote(0)
    until(lambda: live.engine.stats()["version"] == 0, "the first one is")
    assert set(live.ask("c").policy_version.tolist()) == {0}  # type: ignore[union-attr]
    until(lambda: [v for v, _ in live.ledger.serving] == [0, 1, 2, 1, 0], "the ledger knows what was served when")
    assert all(began <= at <= time.time() for _, at in live.ledger.serving[1:])
    assert [r.version for r in live.ledger.records] == [0, 1, 2]  # each record once


@pytest.mark.parametrize("rank", [0, 2])
def test_weights_are_read_into_a_policy_that_nobody_is_served_from(
    rank: int, make_live: MakeLive, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = make_live(lora_rank=rank, lr=0.1)
    made: list[Policy] = []

    def counted(*arguments: Any) -> Policy:
        made.append(load_like(*arguments))
        return made[-1]

    monkeypatch.setattr(module, "load_like", counted)
    supervisor = live.start()
    for version in range(1, 7):
        live.rate(f"c{version % 4}", "thumb", 1)
        until(lambda version=version: live.engine.stats()["version"] == version, "it is served")  # type: ignore[misc]
        said, policy = live.ask(f"a{version}"), live.worker.current().policy
        assert said.model_logprobs is not None
        assert np.allclose(said.model_logprobs, logprob(policy, prompts(policy)[0], said.tokens.tolist()), atol=1e-5)
    assert len(made) == RESIDENT + 1  # and then one is free
    assert supervisor.fault == ""
    if rank:  # all versions stand on one base
        held = [{p.data_ptr() for p in policy.model.parameters() if not p.requires_grad} for policy in made]
        assert held[0] and held[0] == held[1] == held[2]


def test_it_says_what_an_event_waits_for(make_live: MakeLive) -> None:
    live = make_live(min_sources=2)
    slow = "import json, sys; sys.stdin.readline(); print(json.dumps({'ready': 0}), flush=True); sys.stdin.read()"
    supervisor = live.start([sys.executable, "-c", slow])
    until(lambda: supervisor.alive, "it is started")
    assert supervisor.waits_for("e1") == "the learner, which is starting"
    supervisor.poke()
    until(lambda: supervisor.state == "up", "the learner tells that it is ready")
    assert supervisor.waits_for("e1") == "ratings of 2 sources"
    record = dataclasses.replace(live.versions.record(0), version=1, parent=0, events=["e1"], state="pending")
    live.versions.announce(record)
    assert supervisor.waits_for("e1") == "its step, which is being made"
    assert supervisor.waits_for("e2") == "the step before its own"
    live.versions.drop_pending()
    supervisor.config.min_sources = 1
    assert supervisor.waits_for("e2") == "its turn"
    supervisor._faults["learner"] = "the disk is full"
    assert supervisor.waits_for("e2").endswith("tries again: the disk is full")


@pytest.mark.parametrize(("threads", "policy"), [(1, "None"), (2, "passive")])
def test_the_learner_steps_back_as_far_as_it_is_told_and_several_threads_do_not_spin(
    threads: int, policy: str, make_live: MakeLive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    live, file = make_live(threads=threads), tmp_path / "policy"
    telling = (
        f"import json, os, sys; open({str(file)!r}, 'w').write(str(os.environ.get('OMP_WAIT_POLICY')));"
        "print(json.dumps({'ready': 0}), flush=True); sys.stdin.read()"
    )
    supervisor = live.start([sys.executable, "-c", telling], niceness=3)
    until(lambda: supervisor.state == "up", "the learner tells that it is ready")
    assert file.read_text() == policy
    assert supervisor.pid is not None and os.getpriority(os.PRIO_PROCESS, supervisor.pid) == 3


def test_the_learner_is_told_of_feedback_at_once_and_what_it_tells_reaches_the_ledger(
    make_live: MakeLive, tmp_path: Path
) -> None:
    live, notes = make_live(), tmp_path / "notes"
    supervisor = live.start()
    until(lambda: supervisor.state == "up", "the learner tells that it is ready")
    supervisor.poke()
    until(lambda: notes.read_text() == "poked\n", "it is told")
    supervisor.poke("answer-7")
    until(lambda: notes.read_text() == "poked\npokedanswer-7\n", "and of an answer")
    until(lambda: live.ledger.records, "the ledger has the first record")
    # a step that publishes nothing moves no pointer: the learner's line alone brings its record into the ledger
    live.rate("c1", "comment", "hm")
    time.sleep(2 * module.POLL_SECONDS)
    assert [r.version for r in live.ledger.records] == [0]
    supervisor.poke()
    until(lambda: [r.state for r in live.ledger.records] == ["published", "nothing"], "the ledger has it")
    for _ in range(100_000):  # more than a pipe holds, to a learner that does not read
        supervisor.poke()
        if notes.read_text().count("poked") > 5:
            break


def test_closing_lets_the_learner_end_its_step(make_live: MakeLive, tmp_path: Path) -> None:
    live = make_live()
    supervisor = live.start()
    until(lambda: supervisor.state == "up", "the learner tells that it is ready")
    pid = supervisor.pid
    supervisor.close()
    assert (tmp_path / "notes").read_text() == "told to stop\n"
    assert supervisor.state == "stopped" and not supervisor.alive and supervisor.pid is None and pid is not None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    supervisor.poke()  # nobody is there, and nothing is wrong with that
    supervisor.close()
    assert live.ask("a").stop_reason == "length"


def test_a_learner_that_does_not_stop_is_stopped(make_live: MakeLive, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STOP_SECONDS", 0.2)
    live = make_live()
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('{\"ready\": 0}', flush=True)"
    supervisor = live.start([sys.executable, "-c", deaf + "; time.sleep(600)"])
    until(lambda: supervisor.state == "up", "the learner tells that it is ready")
    supervisor.close()
    assert not supervisor.alive


def test_a_learner_that_dies_is_started_again_and_nobody_waits(
    make_live: MakeLive, caplog: pytest.LogCaptureFixture
) -> None:
    live = make_live()
    supervisor = live.start()
    until(lambda: supervisor.state == "up", "the learner tells that it is ready")
    first = supervisor.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    until(lambda: supervisor.state == "restarting" or supervisor.restarts, "its death is noticed")
    assert live.ask("a").stop_reason == "length"
    until(lambda: supervisor.state == "up", "another one is there")
    assert supervisor.pid not in (None, first) and supervisor.restarts == 1 and supervisor.fault == ""
    assert "the learner was killed by SIGKILL; it is started again in 0.05 s" in caplog.text


def test_a_learner_that_cannot_live_is_tried_less_and_less_often(
    make_live: MakeLive, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    live = make_live()
    broken = "import sys; print('a long story', file=sys.stderr); sys.exit('operant: no store; give --store')"
    supervisor = live.start([sys.executable, "-c", broken])
    until(lambda: supervisor.restarts >= 3, "it is started again")
    assert supervisor.fault.startswith("the learner ended with status 1: operant: no store; give --store")
    assert supervisor.state == "restarting"
    pauses = [
        float(r.getMessage().split(" in ")[-1].split()[0]) for r in caplog.records if "again in" in r.getMessage()
    ]
    assert pauses[:3] == [0.05, 0.1, 0.2]
    supervisor.close()
    missing = live.start([str(tmp_path / "no such program")])
    until(lambda: "cannot be started" in missing.fault, "it is told")
    assert live.ask("a").stop_reason == "length"


def test_faults_of_the_learner_are_told_until_it_goes_on(make_live: MakeLive) -> None:
    live = make_live()
    lines = [{"ready": 0}, {"error": "the disk is full"}, {"version": 1}]
    talking = (
        f"import sys\nfor line in {[json.dumps(line) for line in lines]}: print(line, flush=True); sys.stdin.readline()"
    )
    supervisor = live.start([sys.executable, "-c", talking])
    until(lambda: supervisor.state == "up", "the learner tells that it is ready")
    supervisor.poke()
    until(lambda: (supervisor.state, supervisor.fault) == ("failing", "the disk is full"), "the fault is told")
    supervisor.poke()
    until(lambda: (supervisor.state, supervisor.fault) == ("up", ""), "and mended")


@pytest.mark.parametrize("how", ["bytes", "missing", "config"])
def test_a_version_that_is_broken_is_not_served(
    how: str, make_live: MakeLive, caplog: pytest.LogCaptureFixture
) -> None:
    live = make_live()
    for score in (0.9, 0.95):
        live.rate("c1", "score", score)
    folder = Path(live.versions.get(2).path)
    weights = folder / "model" / "model.safetensors"
    if how == "bytes":
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
    elif how == "missing":
        weights.unlink()
    else:  # every hash is right, and yet it is no model
        (folder / "model" / "config.json").write_text("{}")
        files = checkpoint._describe(folder)
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest |= {"files": files, "sha256": checkpoint._digest(files)}
        (folder / "manifest.json").write_text(json.dumps(manifest))
    supervisor = live.start()
    until(lambda: supervisor.state == "failing", "the fault is told")
    assert live.engine.stats()["version"] == 0 and live.ask("a").stop_reason == "length"
    assert ("cannot load a model" if how == "config" else "version 2 is broken") in supervisor.fault
    with pytest.raises(OperantError):
        supervisor.make_resident(2)
    until(lambda: supervisor._faults["version"], "it is tried again")
    assert sum("serves on" in r.getMessage() for r in caplog.records) == 1  # told once, not at every try
    Versions(live.root).promote(1)
    until(lambda: live.engine.stats()["version"] == 1, "a whole one is served")
    until(lambda: supervisor.state == "up", "nothing is wrong any more")


def test_what_the_ledger_could_not_take_it_is_told_again(make_live: MakeLive) -> None:
    live = make_live()
    live.ledger.fails = 2
    supervisor = live.start()
    until(lambda: "locked" in supervisor.fault, "the fault is told")
    live.rate("c1", "thumb", 1)
    until(lambda: live.engine.stats()["version"] == 1, "it is served all the same")
    until(lambda: [v for v, _ in live.ledger.serving][-1:] == [1], "the ledger has caught up")
    assert [r.version for r in live.ledger.records] == [0, 1]
    until(lambda: not supervisor.fault, "and nothing is wrong any more")


def test_a_pinned_version_is_loaded_when_somebody_asks_for_it(make_live: MakeLive) -> None:
    live = make_live()
    supervisor = live.start()
    for version in (1, 2):
        live.rate("c1", "score", 0.9 + version / 100)
        until(lambda version=version: live.engine.stats()["version"] == version, "it is served")  # type: ignore[misc]
    assert live.engine.resident() == [1, 2]
    supervisor.make_resident(0)
    assert live.engine.resident() == [0, 2]
    supervisor.make_resident(0)
    c = live.ask("a", version=0)
    assert c.policy_version is not None and set(c.policy_version.tolist()) == {0}
    with pytest.raises(OperantError, match="not on disk"):
        supervisor.make_resident(9)


def test_there_may_be_no_room_for_a_pinned_version(make_live: MakeLive, monkeypatch: pytest.MonkeyPatch) -> None:
    live = make_live()
    supervisor = live.start()

    def full(version: int, policy: Policy) -> None:
        raise Busy("another pinned version is at work", 1.0)

    monkeypatch.setattr(live.engine, "add", full)
    live.rate("c1", "thumb", 1)
    live.rate("c2", "thumb", 1)
    until(lambda: live.engine.stats()["version"] == 2, "it is served")
    with pytest.raises(Busy):
        supervisor.make_resident(0 if 0 not in live.engine.resident() else 1)


def test_the_learners_command_line_says_every_setting(tmp_path: Path) -> None:
    import jsonargparse

    config = WorkerConfig(
        root=str(tmp_path / "a b"), model="m", lr=1e-4, kl_budget=0.5,
        score_low=-1.0, keep=7, watch_stdin=True, prompt_field="question", threads=1, seed=2**40, heldout="rows.jsonl",
    )  # fmt: skip
    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(WorkerConfig, as_group=False)
    assert WorkerConfig(**parser.parse_args(arguments_of(config)).as_dict()) == config
    assert arguments_of(WorkerConfig()) == []


def test_the_password_of_the_database_is_not_in_the_learners_command_line(make_live: MakeLive, tmp_path: Path) -> None:
    live, url = make_live(), "postgresql://me:s3cret@host/name"
    config = dataclasses.replace(live.worker.config, store=url)
    told = tmp_path / "told.json"
    script = f"import json, os, sys; json.dump([sys.argv, os.environ['OPERANT_STORE']], open({str(told)!r}, 'w'))"
    live.start([sys.executable, "-c", script, *arguments_of(config)], config)
    until(lambda: told.exists() and told.read_text().endswith("]"), "the learner is told where the store is")
    argv, found = json.loads(told.read_text())
    assert found == url and "s3cret" not in " ".join(argv)


def test_a_real_learner_teaches_what_is_served_and_survives_kill_9(
    make_live: MakeLive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live, log = make_live(), tmp_path / "log.jsonl"
    lines = []
    for stored in live.store.interactions.values():
        assert stored.completion is not None
        lines += [line_of(stored.prompt), line_of(stored.completion)]
    event = live.store.add("c0", "thumb", 1)
    log.write_text("".join([*lines, line_of(event)]))
    # a step that was announced and then cut off, as by kill -9 in its middle
    record = Worker(live.worker.config, FeedbackFile(log), lambda told: None)._next()
    assert record is not None
    live.versions.announce(record)
    monkeypatch.setattr("subprocess.Popen", Forked)
    supervisor = live.start(None)
    until(lambda: live.engine.stats()["version"] == 1, "the pending step is finished and served")
    until(lambda: [r.version for r in live.ledger.records] == [0, 1], "and in the ledger")
    assert live.ledger.records[1].outcomes[event.id].state == "used"

    def rate(name: str, value: int) -> None:
        with log.open("a") as file:
            file.write(line_of(live.store.add(name, "thumb", value)))
        supervisor.poke()

    rate("c1", 1)
    until(lambda: live.engine.stats()["version"] == 2, "a rating is served")
    first = supervisor.pid
    assert first is not None
    assert os.getpriority(os.PRIO_PROCESS, first) >= module.NICENESS
    os.kill(first, signal.SIGKILL)
    rate("c2", 1)
    assert live.ask("meanwhile").stop_reason == "length"
    until(lambda: live.engine.stats()["version"] == 3, "what came while it was gone is learned")
    until(lambda: len(live.ledger.records) == 4, "and in the ledger")
    used = [name for r in live.ledger.records for name, o in r.outcomes.items() if o.state == "used"]
    assert used == ["e1", "e2", "e3"] and supervisor.pid != first
