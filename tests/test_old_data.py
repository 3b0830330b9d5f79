"""What an earlier commit has written stays readable: training runs, a live root with its store, a quickstart.

The archives in tests/old were made by old/make.py, which says by which commit. Everything goes through the program, the
public names of the package and HTTP, so that nothing here hangs on where a module is. Names on disk and on the wire are
compared one by one: a new one may come beside the old ones, but none of them may go.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from forks import PATIENCE, Forked
from program import ON_CPU, Program, main, read_rows

import operant
from operant.config import current_names

OLD = Path(__file__).parent / "old"
SAME_PACKAGE = os.environ | {
    "PYTHONPATH": str(Path(operant.__file__).parents[1]), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1",
}  # fmt: skip
COMMANDS = {
    "ppo": "train", "double_q": "train", "areinforce": "train", "trpo": "train", "sft": "sft", "dpo": "prefer",
    "kto": "prefer", "judge": "reward-model", "pretrain": "pretrain",
}  # fmt: skip
STOPPED, WISH = 3, 6  # steps
# what is measured of time is another every time
CLOCKS = ("time", "seconds", "train/seconds", "train/sample_seconds", "train/tokens_per_second", "train/reward_spent/")


@pytest.fixture
def program(capsys: pytest.CaptureFixture[str]) -> Program:
    return Program(capsys)


def unpack(name: str, folder: Path) -> None:
    with tarfile.open(OLD / f"{name}.tar.xz") as archive:
        archive.extractall(folder, filter="data")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the program is run in: the paths in what is old are relative to it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def runs(here: Path) -> Path:
    unpack("runs", here)
    return here


@pytest.fixture
def root(here: Path) -> Path:
    """Of a live server."""
    unpack("live", here)
    return here / "live"


@pytest.fixture
def answered(root: Path) -> Any:
    """What the old server has answered."""
    return json.loads((root.parent / "answered.json").read_text(encoding="utf-8"))


def check_within(old: Any, new: Any, where: str = "") -> None:
    """All that was there is there, under its old name and with its old value. More may have come."""
    if isinstance(old, dict):
        assert isinstance(new, dict) and old.keys() <= new.keys(), (where, old, new)
        for name, value in old.items():
            if name != "feedback_url":  # is signed anew every time
                check_within(value, new[name], f"{where}/{name}")
    elif isinstance(old, list):
        assert isinstance(new, list) and len(old) == len(new), (where, old, new)
        for number, value in enumerate(old):
            check_within(value, new[number], f"{where}/{number}")
    elif isinstance(old, float):
        assert new == pytest.approx(old, rel=1e-6), where
    else:
        assert new == old, (where, old, new)


def check_names(old: Any, new: Any, where: str = "") -> None:
    """Every name that was there is there; the values may be others."""
    if isinstance(old, dict):
        assert isinstance(new, dict) and old.keys() <= new.keys(), (where, old, new)
        for name, value in old.items():
            check_names(value, new[name], f"{where}/{name}")
    elif isinstance(old, list) and old and isinstance(new, list) and new:
        check_names(old[0], new[0], f"{where}/0")


# --- training runs ----------------------------------------------------------------------------------------------------


def measured(file: Path) -> dict[int, dict[str, Any]]:
    """Step → all that was logged of it, without what clocks say."""
    found: dict[int, dict[str, Any]] = {}
    for row in read_rows(file):
        found.setdefault(row["step"], {}).update(
            {name: value for name, value in row.items() if not name.startswith(CLOCKS)}
        )
    return found


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize("name", COMMANDS)
def test_a_run_goes_on_as_if_nothing_had_interrupted_it(name: str, program: Program, runs: Path) -> None:
    """A coefficient, an optimizer's moment or a counter that was not read would change what is learned."""
    config = yaml.safe_load((runs / name / "config.yaml").read_text(encoding="utf-8"))
    facts = json.loads((runs / name / "run.json").read_text(encoding="utf-8"))
    assert (facts["steps"], config["steps"]) == (STOPPED, WISH)
    outcome = program(COMMANDS[name], "--config", f"{name}/config.yaml", "--resume")
    assert outcome.status == 0, outcome
    now = json.loads((runs / name / "run.json").read_text(encoding="utf-8"))
    assert facts.keys() | {"resumed"} <= now.keys() and now["steps"] == WISH
    kept = yaml.safe_load((runs / name / "config.yaml").read_text(encoding="utf-8"))
    assert current_names(config).keys() <= kept.keys()
    saved = sorted((runs / name / "checkpoints").glob("step-*"))
    assert saved[-1].name == (runs / name / "checkpoints" / "latest").read_text().strip() == f"step-{WISH:08d}"
    assert (saved[-1] / "model" / "lagging.safetensors").exists() == (name == "double_q")
    # another processor adds numbers in another order
    whole, resumed = (measured(runs / file) for file in (f"uninterrupted/{name}.jsonl", f"{name}/metrics.jsonl"))
    assert resumed.keys() == whole.keys() and max(whole) == WISH
    for step, values in whole.items():
        assert values.keys() <= resumed[step].keys(), (step, values.keys() - resumed[step].keys())
        # conjugate gradients carry such differences from step to step until other tokens are drawn; a trust region
        # remembers nothing but weights and settings, which the first step shows
        if name != "trpo" or step <= STOPPED + 1:
            there = {metric: resumed[step][metric] for metric in values}
            assert there == pytest.approx(values, rel=2e-3, abs=1e-4), step


@pytest.mark.draws
def test_an_old_log_is_drawn_with_the_results_beside_it(program: Program, runs: Path) -> None:
    """The report is of all steps, those of the old log too. A quickstart's results are told wherever they lie."""
    unpack("quickstart", runs)
    results = json.loads((runs / "quickstart" / "results.json").read_text(encoding="utf-8"))
    assert list(results) == ["pretrained", "finetuned", "continued", "rewarded"]
    shutil.copy(runs / "quickstart" / "results.json", runs / "ppo" / "results.json")
    before = read_rows(runs / "ppo" / "metrics.jsonl")
    assert program("train", "--config", "ppo/config.yaml", "--resume").status == 0
    assert read_rows(runs / "ppo" / "metrics.jsonl")[: len(before)] == before
    page = (runs / "ppo" / "report.html").read_text(encoding="utf-8")
    assert "</html>" in page and list((runs / "ppo" / "curves").glob("*.png"))
    for name, row in results.items():
        assert name in page and row.keys() == {"bleu", "chrf", "exact"}


def test_the_models_of_old_runs_write_and_are_measured(program: Program, runs: Path) -> None:
    for name in ("ppo/model", "double_q/checkpoints/step-00000003/model", "dpo/model"):
        told = program("sample", "--model", name, "--prompt", "red cat", "--max_tokens", 4, "--json", *ON_CPU)
        row = json.loads(told.out)
        assert row["prompt"] == "red cat" and len(row["tokens"]) == len(row["behavior_logprobs"]) <= 4
    told = program("eval", "--model", "sft/model", "--data", "dev.jsonl", "--max_tokens", 6, "--json", *ON_CPU)
    assert {"bleu", "chrf", "rougeL", "exact", "length"} <= json.loads(told.out).keys()
    (runs / "answers.jsonl").write_text('{"prompt": "red cat", "completion": "cat red"}\n')
    told = program("score", "--reward", "model(judge/model)", "--data", "answers.jsonl", "--json")
    assert isinstance(json.loads(told.out)["reward"], float), told
    assert operant.Policy.load("areinforce/model", device="cpu").family == "decoder"
    assert operant.RewardModel.load("judge/model", device="cpu").facts.kind == "comparison"


@pytest.mark.usefixtures("no_report")
def test_a_config_without_a_newer_key_resumes(program: Program, runs: Path) -> None:
    """A key that an old config.yaml lacks counts as the value that was in force before the key existed.

    As if `correction_band` were new: what was in force is that no completion is left out, which its default says. This
    needs the comparison on --resume to fill in what the file lacks; the commit that made the run refused it.
    """
    file = runs / "areinforce" / "config.yaml"
    config = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert config.pop("correction_band") == 0.0
    file.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    given = ("train", "--config", "areinforce/config.yaml", "--resume")
    told = program(*given, "--correction_band", 0.3)  # which was not in force
    assert told.status == 1 and "correction_band" in told.err[-1], told
    assert program(*given).status == 0
    assert json.loads((runs / "areinforce" / "run.json").read_text(encoding="utf-8"))["steps"] == WISH


@pytest.mark.usefixtures("no_report")
def test_a_quickstart_is_gone_on_from_as_it_said(program: Program, here: Path) -> None:
    """The commands that it printed under `Try next` work in its folders."""
    unpack("quickstart", here)
    data = Path("quickstart/data")
    told = program(
        "eval", "--model", "quickstart/model", "--data", data / "test.jsonl", "--max_tokens", 4, "--json", *ON_CPU
    )
    assert "bleu" in json.loads(told.out)
    told = program(
        "train", "--model", "quickstart/finetune/model", "--data", data / "prompts.jsonl", "--dev_data",
        data / "dev.jsonl", "--reward", "bleu(tokenize=zh)", "--reward_workers", 0, "--max_tokens", 4, "--steps", 1,
        "--prompts_per_step", 2, "--group_size", 2, "--out", "mine", "--tensorboard", "false", *ON_CPU,
    )  # fmt: skip
    assert told.status == 0, told
    before = (here / "quickstart" / "results.json").read_bytes()
    assert "with seed 2, not 0" in program.fault("quickstart", "--out", "quickstart")
    told = program("quickstart", "--out", "quickstart", "--seed", 2, "--labelled", 8, "--prompts", 12)
    assert told.status == 0 and "This circle is closed" in told.out
    assert (here / "quickstart" / "results.json").read_bytes() == before


# --- a live root ------------------------------------------------------------------------------------------------------


class Server:
    """`operant serve` on a root, as a process of its own, and whoever talks to it."""

    def __init__(self, root: Path, keys: dict[str, str], *settings: str) -> None:
        command = [
            sys.executable, "-c", f"from {main.__module__} import main; main()", "serve", "--root", root.name,
            "--port", "0", "--threads", "1", "--rest", "0", "--lr", "0.02", "--keep", "20", "--drift_budget", "1000",
            "--likelihood_drop", "1000", "--drain_seconds", "1", *ON_CPU, *settings,
        ]  # fmt: skip
        self.keys = keys
        self.process = Forked(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=SAME_PACKAGE, cwd=root.parent
        )
        assert self.process.stdout is not None
        said = self.process.stdout.readline()
        assert "learns at http://127.0.0.1:" in said, (said, self.process.communicate())
        self.http = httpx.Client(base_url=said.split("learns at ")[1].split("/v1")[0], timeout=PATIENCE)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()
        self.process.terminate()
        self.process.communicate(timeout=PATIENCE)

    def ask(self, method: str, path: str, body: Any = None, *, as_: str = "op", status: int = 200) -> Any:
        answer = self.http.request(method, path, json=body, headers={"Authorization": f"Bearer {self.keys[as_]}"})
        assert answer.status_code == status, (path, answer.text)
        return answer.json()

    def chat(self, **more: Any) -> Any:
        body = {"model": "default", "messages": [{"role": "user", "content": "moon"}], "max_tokens": 6} | more
        return self.ask("POST", "/v1/chat/completions", body, as_="ann")

    def learned(self, name: str) -> Any:
        """What became of an event, once that is known. One that waits for a trial is learned and not served."""
        until = time.monotonic() + PATIENCE
        while (told := self.ask("GET", f"/v1/feedback/{name}"))["state"] == "pending":
            assert time.monotonic() < until, told
            time.sleep(0.05)
        return told


def by(rows: list[dict[str, Any]], name: str) -> dict[Any, dict[str, Any]]:
    return {row[name]: row for row in rows}


@pytest.mark.timeout(2 * PATIENCE)
def test_an_old_root_is_served_and_learned_from(root: Path, answered: Any) -> None:
    old = answered["get"]
    with Server(root, answered["keys"], "--canary_share", "0.5", "--canary_alpha", "0.4") as served:
        # the step that was announced when its learner died is made, on what it was announced for
        late = served.learned("fb-late")
        assert (late["state"], late["version"]) == ("used", 32), late
        now = {path: served.ask("GET", path) for path in old}
        # what was said and answered is there, word for word
        for path in now:
            check_names(old[path], now[path], path)
            if "/completions" in path or path.startswith("/v1/forget"):
                check_within(old[path], now[path], path)
        stories = by(now["/v1/feedback?limit=1000"]["data"], "id")
        for story in old["/v1/feedback?limit=1000"]["data"]:
            then = {key: value for key, value in story.items() if key not in ("seconds", "told")}
            check_within(then, stories[story["id"]])  # a version that was not served yet may have been since
        assert {row["kind"] for row in stories.values()} == {
            "thumb", "score", "edit", "comparison", "span", "comment", "retract",
        }  # fmt: skip
        # every version with what the gates and the trial have said of it
        rows = [by(told["/v1/versions"]["versions"], "version") for told in (old, now)]
        for number, row in rows[0].items():
            check_within(row, rows[1][number], f"version {number}")
        assert any((row["trial"] or {}).get("verdict") == "refused" for row in rows[1].values())
        assert any(row["slow"] for row in rows[1].values())
        told = now["/v1/versions"]
        for name in ("pins", "anchor", "serving", "trial"):  # the trial goes on where it was
            check_within(old["/v1/versions"][name], told[name], name)
        assert told["current"] == 32 and by(told["versions"], "version")[32]["parent"] == 30
        assert by(now["/v1/sources"]["data"], "source").keys() == by(old["/v1/sources"]["data"], "source").keys()
        # keys, receipts and signed links are good; a link that is too old is told from one of another root
        again = {"completion_id": answered["receipt"]["completion_id"], "kind": "comment", "value": "so it is"}
        told = served.ask("POST", "/v1/feedback", again | {"idempotency_key": "last"}, as_="ann")
        today = {"state": "unused", "duplicate": True, "waiting_for": ""}  # the last is told since
        assert told == {**answered["receipt"], **today}
        link = answered["chat"]["operant"]["feedback_url"].partition("/f/")[2]
        assert served.http.get(f"/f/{link}").status_code in (200, 410)
        assert served.http.get(f"/f/{link[:-3]}AAA").status_code == 404
        check_names(answered["fault"], served.ask("GET", "/v1/feedback/none", status=404))
        # it learns on from there
        chat = served.chat(logprobs=True, temperature=0.8, seed=2)
        check_names(answered["chat"], chat)
        assert chat["operant"]["version"] in (old["/v1/versions"]["serving"], old["/v1/versions"]["trial"]["candidate"])
        body = {"completion_id": chat["id"], "kind": "edit", "value": "the moon", "source": "ann"}
        receipt = served.ask("POST", "/v1/feedback", body, as_="ann")
        check_names(answered["receipt"], receipt)
        story = served.learned(receipt["id"])
        assert (story["state"], story["version"]) == ("used", 33), story
        assert served.ask("POST", "/v1/versions/33/promote") == {"current": 33, "serving": 33}
        assert served.chat()["operant"]["version"] == 33


def test_old_versions_are_made_again_from_their_records(root: Path, program: Program) -> None:
    told = program("replay", "--verify", "--root", "live", "--json", "--device", "cpu")
    rows = json.loads(told.out)["versions"]
    assert len(rows) >= 2
    for row in rows:
        assert row["difference"] <= 1e-4, row
    # processors of one kind may differ in the last bits, which is no fault of the record
    close = all(row["difference"] == 0.0 or not row["same_fingerprint"] for row in rows)
    assert told.status == (0 if close else 1), told


@pytest.mark.usefixtures("no_report")
def test_old_versions_and_feedback_are_listed_compared_and_exported(
    root: Path, program: Program, answered: Any
) -> None:
    told = json.loads(program("versions", "--root", "live", "--json").out)
    old = answered["get"]["/v1/versions"]
    check_within({name: old[name] for name in ("current", "anchor", "pins", "versions")}, told)
    check_within({name: old["trial"][name] for name in ("serving", "candidate")}, told["trial"])
    told = json.loads(program("versions", "--root", "live", "--compare", "[0, 30]", "--json").out)
    assert told["common_ancestor"] == 0 and told["kl"] > 0
    told = json.loads(program("versions", "--root", "live", "--evaluate", "[30]", "--json").out)
    assert told["30"].keys() >= {"snips", "ess", "rated", "mean", "std_error"}
    told = json.loads(program("feedback", "--store", "live/store.db", "--json").out)
    sources = by(told["sources"], "source")
    assert sources.keys() == by(answered["get"]["/v1/sources"]["data"], "source").keys()
    assert told["pending"] == 1 and sources["bob"]["pending"] == 1 and told["events"] == 28
    told = json.loads(program("feedback", "--store", "live/store.db", "--event", "fb-late", "--json").out)
    assert told["state"] == "pending" and told["event"]["source"] == "bob"
    keys = json.loads(program("keys", "--root", "live", "--json").out)["keys"]
    assert {row["name"]: row["roles"] for row in keys} == {
        "ann": ["chat", "rate"], "bob": ["chat", "rate"], "op": ["chat", "rate", "operate"],
    }  # fmt: skip
    for form in ("lines", "events", "pairs", "ratings", "rewards"):
        out = "replay.jsonl" if form == "lines" else form
        given = ("--store", "live/store.db", "--form", form, "--export", out)
        assert program("feedback", *given).status == 0, form
    # and what was exported is learned from
    options = ("--steps", 1, "--batch_size", 2, "--tensorboard", "false", *ON_CPU)
    assert program("prefer", "--model", "start", "--replay", "replay.jsonl", "--out", "run", *options).status == 0


@pytest.mark.timeout(2 * PATIENCE)
def test_a_source_is_forgotten_in_an_old_root(root: Path, program: Program, answered: Any) -> None:
    told = json.loads(program("forget", "--root", "live", "--source", "bob", "--json", "--device", "cpu").out)
    assert told["events"] == 6 and told["redone"] > 3 and 30 in told["dropped"]
    left = json.loads(program("feedback", "--store", "live/store.db", "--json").out)["sources"]
    assert by(left, "source").keys() == by(answered["get"]["/v1/sources"]["data"], "source").keys() - {"bob"}
    assert "nothing of a source 'bob'" in program.fault("forget", "--root", "live", "--source", "bob")
    with Server(root, answered["keys"]) as served:
        now = served.ask("GET", "/v1/versions")
        assert now["current"] == now["serving"] == told["current"] > 32 and now["trial"] is None
        assert served.chat()["operant"]["version"] == told["current"]
        rows = served.ask("GET", "/v1/feedback?limit=1000")["data"]
        assert len(rows) == 28 and "bob" not in json.dumps(rows)
        check_within(answered["get"]["/v1/forget/1"], served.ask("GET", "/v1/forget/1"))
