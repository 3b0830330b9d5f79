"""A seeded fault campaign: runs that are killed again and again, meet a full disk, or have rewards from hell.

Every run must end as the undisturbed one does, bit for bit, or with one clear line and a checkpoint that loads.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from program import pairs, read_rows, write_rows
from safetensors.torch import load_file

from operant.run import checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(os.name == "nt", reason="fork, SIGKILL and file size limits are POSIX"),
]

TESTS = Path(__file__).parent
STAGES = ("pretrain", "sft", "train")
KILLS = 18  # in each stage, beside those of whole processes
CLOCKS = ("time", "seconds", "train/seconds", "train/sample_seconds", "train/tokens_per_second")

REWARDS = """
import math, os, signal, time, zlib

def even(prompt, completion):
    return sum(int(token) % 2 == 0 for token in completion.tokens) / len(completion.tokens)

def chosen(prompt, completion):
    # a pure function of what was said, so that a resumed run meets the same fate
    return zlib.crc32(completion.tokens.tobytes()) % 4 == 0

FAULTS = {
    "none": lambda c: None,
    "raises": lambda c: {}["no such\\nkey"],
    "nan": lambda c: math.nan,
    "infinite": lambda c: -math.inf,
    "long": lambda c: [1.0] * (len(c.tokens) + 1),
    "text": lambda c: "1.0",
    "exits": lambda c: os._exit(3),
    "killed": lambda c: os.kill(os.getpid(), signal.SIGKILL),
    "hangs": lambda c: time.sleep(600),
}

def sometimes(kind):
    def reward(prompt, completion):
        return FAULTS[kind](completion) if chosen(prompt, completion) else even(prompt, completion)
    reward.__name__, reward.__qualname__ = f"some_{kind}", f"some_{kind}"
    return reward

def always(kind):
    def reward(prompt, completion):
        return FAULTS[kind](completion)
    reward.__name__, reward.__qualname__ = f"all_{kind}", f"all_{kind}"
    return reward

for kind in FAULTS:
    globals()[f"some_{kind}"], globals()[f"all_{kind}"] = sometimes(kind), always(kind)
"""


@dataclass
class Ended:
    status: int
    told: list[str]

    @property
    def fault(self) -> str:
        """The one line of a run that failed properly."""
        assert self.status == 1, self
        lines = [line for line in self.told if line.startswith("operant: ")]
        assert len(lines) == 1 and not any("Traceback" in line for line in self.told), self.told
        return lines[0].removeprefix("operant: ")


@dataclass
class Site:
    """A folder with data, a model for each stage, and a process that forks runs."""

    path: Path
    forks: subprocess.Popen[str]
    counts: dict[str, dict[str, int]] = field(default_factory=dict)

    def command(self, stage: str, out: Path, *options: object) -> list[str]:
        common = [
            stage, "--out", out, "--data", self.path / "data.jsonl", "--seed", 3, "--device", "cpu", "--threads", 1,
            "--tensorboard", "false", "--save_every", 2, "--eval_every", 2, "--lr", 1e-2,
        ]  # fmt: skip
        own: dict[str, list[object]] = {
            "pretrain": [
                "--text_field", "completion", "--steps", 6, "--batch_tokens", 64, "--accumulate", 2, "--block", 16,
                "--max_length", 40, "--vocab_size", 300, "--dropout", 0.1, "--schedule", "cosine",
            ],
            "sft": [
                "--model", self.path / "pretrain" / "model", "--steps", 6, "--batch_size", 4, "--patience", 3,
                "--best_metric", "chrf", "--eval_prompts", 3,
            ],
            "train": [
                "--model", self.path / "sft" / "model", "--steps", 5, "--prompts_per_step", 3, "--group_size", 3,
                "--max_tokens", 6, "--eval_prompts", 3, "--log_samples", 2, "--kl_coef", 0.05,
                "--reward", "norm(chrf(dense=True)) + 0.5*cursed:even", "--reward_workers", 0,
            ],
        }  # fmt: skip
        return [str(word) for word in (*common, *own[stage], *options)]

    def run(self, argv: list[str], **fate: Any) -> Ended:
        """One fork. fate: kind, number, after, action of `faults`."""
        assert self.forks.stdin is not None and self.forks.stdout is not None
        job = {"argv": argv, "cwd": str(self.path), "action": "kill", **fate}
        self.forks.stdin.write(json.dumps(job) + "\n")
        self.forks.stdin.flush()
        answer = json.loads(self.forks.stdout.readline())
        return Ended(answer["status"], answer["told"].splitlines())


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    path = tmp_path_factory.mktemp("site")
    write_rows(path / "data.jsonl", pairs())
    (path / "cursed.py").write_text(REWARDS)
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(path)]), "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    with subprocess.Popen(
        [sys.executable, str(TESTS / "faults.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=environment,
    ) as forks:  # fmt: skip
        made = Site(path, forks)
        for stage in STAGES:  # undisturbed
            ended = made.run(made.command(stage, path / stage), counts=str(path / "counts.json"))
            assert ended.status == 0, ended.told
            made.counts[stage] = json.loads((path / "counts.json").read_text())
        yield made
        assert forks.stdin is not None
        forks.stdin.close()


def same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


def without_clocks(path: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in CLOCKS} for row in read_rows(path)]


def assert_same_end(out: Path, undisturbed: Path, but: Callable[[str], bool] = lambda name: False) -> None:
    """Weights, optimizer, counters, log, samples, best model and the reason for stopping. but: metrics left out."""
    newest = [checkpoint.latest(folder / "checkpoints") for folder in (out, undisturbed)]
    assert newest[0] is not None and newest[1] is not None
    weights = [load_file(path / "model" / "model.safetensors") for path in newest]
    assert same(*weights)
    assert same(*(torch.load(path / "learner.pt", weights_only=True) for path in newest))
    states = [json.loads((path / "state.json").read_text()) for path in newest]
    for state in states:
        for clock in ("spent_seconds", "best_checkpoint"):  # a step saved twice has a name of its own
            state.pop(clock)
        if state["state"].get("rewards"):
            state["state"]["rewards"] = {k: v for k, v in state["state"]["rewards"].items() if not but(k)}
    assert states[0] == states[1]
    logs = [
        [{k: v for k, v in row.items() if not but(k)} for row in without_clocks(folder / "metrics.jsonl")]
        for folder in (out, undisturbed)
    ]
    assert logs[0] == logs[1]
    if (undisturbed / "samples.jsonl").exists():
        assert read_rows(out / "samples.jsonl") == read_rows(undisturbed / "samples.jsonl")
    assert same(*(load_file(folder / "model" / "model.safetensors") for folder in (out, undisturbed)))
    facts = [json.loads((folder / "run.json").read_text()) for folder in (out, undisturbed)]
    # killed after its last word, it is told so when it is resumed
    facts[0]["stop_reason"] = facts[0]["stop_reason"].replace("were already done", "done")
    for name in ("stop_reason", "steps", "best_step", "best_value", "updates", "failed"):
        assert facts[0][name] == facts[1][name], name


def assert_clean(out: Path) -> None:
    """Nothing half-made lies about after a run that ended."""
    assert [p.name for p in out.rglob(".*")] == [".lock"]
    for path in (out / "checkpoints").glob("step-*"):
        assert checkpoint.verify(path) is None


def going_on(out: Path) -> list[str]:
    """How a person goes on after a kill: --resume once something is there, else simply again."""
    begun = any((out / "checkpoints").glob("step-*"))
    return ["--resume"] if begun else []


@pytest.mark.parametrize("stage", STAGES)
def test_runs_killed_at_random_events_end_as_if_nothing_had_been(stage: str, site: Site) -> None:
    generator = random.Random(f"kill {stage}")
    kills: list[str] = []
    chain = 0
    while len(kills) < KILLS:
        chain += 1
        out = site.path / f"{stage}-killed-{chain}"
        options = ["--reward_workers", "1"] if stage == "train" and chain % 2 else []
        for _ in range(generator.randint(1, 5)):
            kind = generator.choice(sorted(k for k, n in site.counts[stage].items() if n))
            fate = {"number": generator.randint(1, site.counts[stage][kind]), "after": generator.random() < 0.5}
            ended = site.run(site.command(stage, out, *options, *going_on(out)), kind=kind, **fate)
            if ended.status == 0:
                break
            assert ended.status == -signal.SIGKILL, ended.told
            kills.append(kind)
            newest = checkpoint.latest(out / "checkpoints")
            assert (newest is not None) == any((out / "checkpoints").glob("step-*"))
        else:
            ended = site.run(site.command(stage, out, *options, *going_on(out)))
        assert ended.status == 0, (kills, ended.told)
        assert_same_end(out, site.path / stage)
        assert_clean(out)
    assert {"start", "disk", "log", "learn"} <= set(kills)
    assert stage != "train" or {"reward", "sample"} <= set(kills)


@pytest.mark.parametrize("stage", ["sft", "train"])
def test_the_program_itself_killed_at_random_moments(stage: str, site: Site) -> None:
    """As a user starts it, killed from outside at moments spread over how long it takes."""
    generator = random.Random(f"moments {stage}")
    out, calm = site.path / f"{stage}-program", site.path / f"{stage}-calm"
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(site.path)]), "OMP_NUM_THREADS": "1",
    }  # fmt: skip

    def start(folder: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "operant.cli", *site.command(stage, folder, *going_on(folder))]
        return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=site.path,
                                env=environment)  # fmt: skip

    whole = start(calm)
    told = whole.communicate()
    assert whole.returncode == 0, told
    killed = 0
    for lines in (generator.randint(0, 2), generator.randint(3, 5), generator.randint(6, 8)):
        child = start(out)
        log = out / "metrics.jsonl"
        while child.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") >= lines):
            time.sleep(0.01)
        time.sleep(generator.uniform(0, 0.1))
        child.kill()
        child.communicate()
        killed += child.returncode == -signal.SIGKILL
    last = start(out)
    told = last.communicate()
    assert last.returncode == 0, told
    assert killed >= 2
    assert_same_end(out, calm)
    assert "</html>" in (out / "report.html").read_text()


# --- full disks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_a_disk_that_fills_up_is_one_line_and_loses_nothing(stage: str, site: Site) -> None:
    """No file can grow any more from a random event on: the kernel refuses every write, whoever makes it (RLIMIT_FSIZE,
    which needs no rights and no file system of its own)."""
    generator = random.Random(f"full {stage}")
    told: list[str] = []
    for number in range(8):
        out = site.path / f"{stage}-full-{number}"
        kind = ("disk", "log", "learn", "start", "finish")[number % 5]
        fate = {"kind": kind, "number": generator.randint(1, site.counts[stage][kind]), "action": "full"}
        ended = site.run(site.command(stage, out), **fate)
        if ended.status != 0:
            told.append(ended.fault)
            if any((out / "checkpoints").glob("step-*")):
                assert checkpoint.latest(out / "checkpoints") is not None
        ended = site.run(site.command(stage, out, *(going_on(out) if ended.status else ["--overwrite"])))
        assert ended.status == 0, ended.told
        assert_same_end(out, site.path / stage)
        assert_clean(out)
    assert len(told) >= 5
    assert all("--resume" in line or "--out" in line for line in told), told


def test_a_small_disk_that_is_really_full(site: Site) -> None:
    """A file system that holds a checkpoint or two; more room, and the run goes on to the same end."""
    disk = site.path / "disk"
    disk.mkdir()
    one = sum(p.stat().st_size for p in next((site.path / "sft" / "checkpoints").glob("step-*")).rglob("*"))
    mount = ["mount", "-t", "tmpfs", "-o", f"size={int(2.5 * one)}", "tmpfs", str(disk)]
    done = subprocess.run(mount, capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount a small file system here: {done.stderr.decode().strip()}")
    try:
        out = disk / "run"
        line = site.run(site.command("sft", out)).fault
        assert "disk is full" in line and "--resume" in line
        assert checkpoint.latest(out / "checkpoints") is not None
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        assert site.run(site.command("sft", out, "--resume")).status == 0
        assert_same_end(out, site.path / "sft")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# --- rewards ---------------------------------------------------------------------------------------------------------

REASONS = {
    "none": "none", "raises": "raised", "nan": "nan", "infinite": "infinite", "long": "wrong_length",
    "text": "wrong_type", "exits": "crashed", "killed": "crashed", "hangs": "timeout",
}  # fmt: skip


def rewarded(site: Site, name: str, out: Path) -> list[str]:
    return site.command(
        "train", out, "--reward", f"cursed:{name}", "--reward_workers", 1, "--reward_seconds",
        2.0 if "hangs" in name else 60.0, "--steps", 3, "--algorithm", "rloo",
    )  # fmt: skip


@pytest.mark.parametrize("kind", [kind for kind in REASONS if kind != "none"])
def test_a_reward_that_sometimes_fails_is_as_if_it_had_said_nothing(kind: str, site: Site) -> None:
    """Whatever it does on a quarter of the completions, the run is the one whose reward returned None there."""
    calm, out = site.path / "some-none", site.path / f"some-{kind}"
    if not calm.exists():
        assert site.run(rewarded(site, "some_none", calm)).status == 0
    assert site.run(rewarded(site, f"some_{kind}", out)).status == 0
    assert_same_end(out, calm, but=lambda name: name in ("counts", "details") or "some_" in name or "missing/" in name)
    (missing, nothing) = (
        [row for row in read_rows(folder / "metrics.jsonl") if "train/loss" in row][-1] for folder in (out, calm)
    )
    count = nothing["train/missing/none"]
    assert 3 <= count <= 20
    assert missing[f"train/missing/{REASONS[kind]}"] == count
    assert missing["train/reward_mean"] == missing[f"train/reward/some_{kind}"] > 0.05


@pytest.mark.parametrize("kind", ["raises", "long", "exits", "killed", "hangs"])
def test_a_reward_that_always_fails_ends_the_run_with_its_reason(kind: str, site: Site) -> None:
    out = site.path / f"all-{kind}"
    argv = rewarded(site, f"all_{kind}", out)
    if kind == "hangs":
        argv += ["--reward_seconds", "0.2"]
    line = site.run(argv).fault
    assert "every reward was missing" in line and REASONS[kind] in line
    newest = checkpoint.latest(out / "checkpoints")
    assert newest is not None and (newest / "model" / "base.json").exists()  # the weights that it began with
    start = load_file(site.path / "sft" / "model" / "model.safetensors")
    assert same(load_file(out / "model" / "model.safetensors"), start)
    # nothing was learned, so the next try with a better reward just starts
    assert site.run(site.command("train", out)).status == 0
    assert_same_end(out, site.path / "train")
