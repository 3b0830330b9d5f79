"""Where a run comes from, and what a resumed run is compared with: data, chat template and the source of its reward."""

from __future__ import annotations

import hashlib
import importlib
import json
import platform
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from program import QUIET_RUN, Program, pairs, write_rows

import operant
from operant.config import SftConfig
from operant.data.prompts import load_pairs
from operant.models.policy import Policy
from operant.rewards import as_reward, reward_by_name
from operant.run import provenance
from operant.run.provenance import data_hash, reward_hashes, rows_hash, source_hash
from operant.stages.sft import sft
from operant.types import OperantError, Prompt

pytestmark = pytest.mark.usefixtures("no_report")


@pytest.fixture
def program(capsys: pytest.CaptureFixture[str]) -> Program:
    return Program(capsys)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "pairs.jsonl", pairs())


@pytest.fixture
def model(make_policy: Any, tmp_path: Path) -> Path:
    make_policy("gpt2").save(tmp_path / "start")
    return tmp_path / "start"


def test_a_run_keeps_where_it_comes_from(program: Program, model: Path, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = ("sft", "--model", model, "--data", data, "--steps", 1, "--out", run, *QUIET_RUN)
    assert program(*command).status == 0
    facts = json.loads((run / "run.json").read_text())
    assert facts["versions"].keys() == {"operant", "python", "torch", "transformers"}
    assert facts["versions"]["operant"] == operant.__version__ and facts["host"] == platform.node()
    assert facts["data"][str(data)]["sha256"] == hashlib.sha256(data.read_bytes()).hexdigest()
    assert facts["commit"] is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", facts["commit"])
    assert facts["template"]["chat"]["sha256"]


def test_a_run_whose_data_has_changed_is_resumed_only_when_that_is_accepted(
    program: Program, model: Path, data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = ("sft", "--model", model, "--data", data, "--out", run, *QUIET_RUN)
    assert program(*command, "--steps", 1).status == 0
    facts = json.loads((run / "run.json").read_text())
    with data.open("a") as rows:
        rows.write('{"prompt": "one", "completion": "more"}\n')
    fault = program.fault(*command, "--steps", 2, "--resume")
    assert f"{data} changed" in fault and "--accept_changes true" in fault
    assert json.loads((run / "run.json").read_text()) == facts, "a refusal writes nothing"
    assert program(*command, "--steps", 2, "--resume", "--accept_changes").status == 0
    resumed = json.loads((run / "run.json").read_text())
    assert resumed["data"] == facts["data"]
    assert [origin["data"] != facts["data"] for origin in resumed["resumed_from"]] == [True]
    # what was accepted is what the next start is compared with, and is no setting of the run
    assert program(*command, "--steps", 3, "--resume").status == 0
    assert yaml.safe_load((run / "config.yaml").read_text())["accept_changes"] is False


def test_a_run_without_hashes_goes_on_with_one_note(program: Program, model: Path, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = ("sft", "--model", model, "--data", data, "--out", run, *QUIET_RUN)
    assert program(*command, "--steps", 1).status == 0
    facts = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({k: v for k, v in facts.items() if k not in ("data", "template")}))
    outcome = program(*command, "--steps", 2, "--resume")
    assert outcome.status == 0
    (note,) = [line for line in outcome.err if "before runs kept hashes" in line]
    assert "of their data and template:" in note
    again = program(*command, "--steps", 3, "--resume")  # by now it has them
    assert again.status == 0 and not [line for line in again.err if "kept hashes" in line]
    data.write_text(data.read_text() * 2)
    assert "changed" in program.fault(*command, "--steps", 4, "--resume")


def test_another_chat_template_is_refused_on_resume(program: Program, model: Path, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = ("sft", "--model", model, "--data", data, "--out", run, *QUIET_RUN)
    assert program(*command, "--steps", 1).status == 0
    (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    outcome = program(*command, "--steps", 2, "--resume")
    assert outcome.status == 1
    assert "the chat template changed since it began" in outcome.err[-1]
    assert program(*command, "--steps", 2, "--resume", "--accept_changes").status == 0


def test_another_source_of_the_reward_is_refused_on_resume(
    program: Program, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    source = tmp_path / "politeness.py"

    def write(word: str) -> None:
        source.write_text(f"def polite(prompt, completion):\n    return float({word!r} in completion.text)\n")
        sys.modules.pop("politeness", None)
        importlib.invalidate_caches()

    run = tmp_path / "run"
    command = ("train", "--model", model, "--data", data, "--reward", "politeness:polite + 0.1*length(target=3)",
               "--algorithm", "rloo", "--max_tokens", 3, "--group_size", 2, "--prompts_per_step", 2, "--eval_prompts",
               0, "--reward_workers", 0, "--out", run, *QUIET_RUN)  # fmt: skip
    write("please")
    assert program(*command, "--steps", 1).status == 0
    assert list(json.loads((run / "run.json").read_text())["reward"]) == ["polite"]
    write("please!")
    outcome = program(*command, "--steps", 2, "--resume")
    assert outcome.status == 1 and "the source of polite changed since it began" in outcome.err[-1]
    write("please")
    assert program(*command, "--steps", 2, "--resume").status == 0


def test_rows_made_in_python_are_compared_by_content(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    def run(words: Sequence[str], **options: Any) -> None:
        policy = make_policy("gpt2")
        rows = [{"prompt": word, "completion": "two"} for word in words]
        config = SftConfig(out=str(tmp_path / "run"), device="cpu", tensorboard=False, **options)
        sft(config, policy=policy, pairs=load_pairs(rows, policy.codec), quiet=True)

    run(["one", "three"], steps=1)
    run(["one", "three"], steps=2, resume=True)
    with pytest.raises(OperantError, match="the rows given in Python changed"):
        run(["one", "four"], steps=3, resume=True)


def test_data_is_hashed_by_content_and_a_large_file_by_its_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("train", "dev"):
        write_rows(tmp_path / f"{name}.jsonl", pairs(4))
    both = data_hash(str(tmp_path))
    assert both["files"] == 2 and both["of"] == "the contents of its files"
    write_rows(tmp_path / "dev.jsonl", pairs(5))
    assert data_hash(str(tmp_path))["sha256"] != both["sha256"]
    monkeypatch.setattr(provenance, "WHOLE", 64)
    file = tmp_path / "dev.jsonl"
    large = data_hash(str(file))
    assert "of 1 above" in large["of"]
    whole_text = file.read_bytes()
    file.write_bytes(whole_text[:100] + b"?" + whole_text[101:])
    assert data_hash(str(file)) == large
    file.write_bytes(whole_text[:-1] + b"?")
    assert data_hash(str(file)) != large
    assert data_hash("owner/name")["of"] == "its name on the hub"


def test_the_hash_of_rows_is_of_what_they_hold() -> None:
    def prompt(token: int, **options: Any) -> Prompt:
        return Prompt("p", np.array([1, token]), text="a", **options)

    first = rows_hash([prompt(2), prompt(3)])
    assert first == rows_hash((prompt(2), prompt(3)))
    others = [
        [prompt(3), prompt(2)], [prompt(2)], [prompt(2), prompt(3, references=("x",))],
        [prompt(2), prompt(3, meta={"id": 1})], [],
    ]  # fmt: skip
    digests = {rows_hash(rows)["sha256"] for rows in others}
    assert len(digests) == len(others) and first["sha256"] not in digests
    assert rows_hash(["ab", "c"]) != rows_hash(["a", "bc"])
    many = rows_hash([str(i) for i in range(100)], most=10)
    assert "10 of its rows" in many["of"] and many["rows"] == 100
    assert many != rows_hash([str(i) for i in range(101)], most=10)


def own_lines(prompt: Any, completion: Any) -> float:
    return 1.0


def test_the_source_of_a_reward_is_found_behind_its_wrapping(monkeypatch: pytest.MonkeyPatch) -> None:
    import functools

    here = source_hash(own_lines)
    assert here is not None and here["sha256"] == hashlib.sha256(Path(__file__).read_bytes()).hexdigest()

    class Kept:
        name, dense, batched, streaming, in_process = "kept", False, False, False, True

        def __call__(self, prompt: Any, completion: Any) -> float:
            return 0.0

    assert (
        source_hash(as_reward(functools.partial(own_lines)))
        == here
        == source_hash(Kept())
        == source_hash(Kept().__call__)
    )
    assert reward_hashes(reward_by_name([own_lines, "chrf"])) == {"own_lines": here}
    assert reward_hashes(reward_by_name("chrf + 0.1*length(target=3)")) == {}
    monkeypatch.setattr(own_lines, "__module__", "__main__")  # whose file holds the settings of the run as well
    alone = source_hash(own_lines)
    assert alone is not None and alone["of"] == "its own lines" and alone["sha256"] != here["sha256"]
