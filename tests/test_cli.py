"""The program's face: help, settings from YAML, and one line for every fault, with nothing left behind."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from forks import Forked
from program import ON_CPU, QUIET_RUN, Program, pairs, read_rows, write_rows

from operant import config as configs
from operant.cli import EXAMPLES, main
from operant.live.storage.store import Origin, Store
from operant.models.policy import Policy
from operant.types import Completion, Prompt

COMMANDS = list(EXAMPLES)


@pytest.fixture
def program(capsys: pytest.CaptureFixture[str]) -> Program:
    return Program(capsys)


@pytest.fixture(scope="module")
def model(make_policy: Callable[..., Policy], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "model"
    make_policy("llama").save(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "pairs.jsonl", pairs())


@pytest.fixture
def fault(program: Program, model: Path, data: Path, tmp_path: Path) -> Callable[..., str]:
    """Run a command that must fail with one line; no run folder may be left."""
    usual = {
        "pretrain": ("--data", data, "--text_field", "prompt", "--vocab_size", 280, "--steps", 1, *QUIET_RUN),
        "sft": ("--model", model, "--data", data, "--steps", 1, "--batch_size", 2, *QUIET_RUN),
        "train": ("--model", model, "--data", data, "--steps", 1, "--prompts_per_step", 2, "--group_size", 2,
                  "--max_tokens", 4, "--eval_prompts", 2, "--log_samples", 0, *QUIET_RUN),
        "eval": ("--model", model, "--data", data, "--max_tokens", 4, "--limit", 2, *ON_CPU),
        "sample": ("--model", model, "--prompt", "red", "--max_tokens", 4, *ON_CPU),
    }  # fmt: skip

    def run(command: str, *arguments: object) -> str:
        out = tmp_path / "out"
        where = ("--out", out) if command in ("pretrain", "sft", "train") and "--out" not in arguments else ()
        line = program.fault(command, *usual[command], *where, *arguments)
        assert not out.exists()
        return line

    return run


# --- help and settings -----------------------------------------------------------------------------------------------


def test_help_is_quick_and_shows_an_example() -> None:
    code = (
        "import sys\nfrom operant.cli import main\n"
        "for arguments in [['--help'], *([c, '--help'] for c in " + repr(COMMANDS) + "), ['--version']]:\n"
        "    try:\n        main(arguments)\n    except SystemExit as stop:\n        assert not stop.code, stop.code\n"
        "heavy = {'torch', 'transformers', 'datasets', 'peft', 'sacrebleu', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name, (_, summary, example) in EXAMPLES.items():
        assert re.search(rf"^\s+{name}\s+{re.escape(summary[:20])}", done.stdout, re.MULTILINE)
        assert done.stdout.count(f"  {example}") == 2  # in the program's help and in the command's
    assert "--group_size" in done.stdout and "completions per prompt" in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_what_most_people_need_and_all_on_request(command: str, program: Program) -> None:
    everything = configs.setting_types(EXAMPLES[command][0])
    short, long = (program(command, *words).out for words in (["--help"], ["-h", "all"]))
    for text in (short, long):
        assert text.rstrip().endswith(f"Example:\n  {EXAMPLES[command][2]}")
    shown = re.findall(r"^  --(\w+)", short, re.MULTILINE)
    assert 3 <= len(shown) <= 30 and {"config", "print_config"} <= set(shown)
    assert set(everything) <= set(re.findall(r"--(\w+)", long))
    assert (f"All {len(everything)} settings: operant {command} --help all" in short) == (len(everything) > 30)
    if command == "train":
        assert {"model", "data", "reward", "steps", "lr", "out"} <= set(shown) and "damping" not in shown
        assert "\nThe trust region of trpo:\n  --delta DELTA " in long and "(number, 0 or more, or auto;" in " ".join(
            long.split()
        )


def test_numbers_that_would_delete_answers_are_refused(program: Program, tmp_path: Path) -> None:
    """A store has lost all its answers to --max_age_days -1."""
    file = tmp_path / "store.db"
    with Store(file) as store:
        store.begin("c", Prompt("p", np.array([1]), text="hello"), None, Origin(created=1.0))
        store.complete(Completion("c", "p", "hi", np.array([2]), np.array([2])))
        kept = store.counts()
    for name, value in (("max_age_days", -1), ("max_bytes", -1), ("max_age_days", ".nan"), ("max_bytes", -(10**30))):
        line = program.fault("feedback", "--store", file, f"--{name}", value)
        assert f"{name} is " in line and f"it must be 0 or more: correct --{name}" in line
        root = tmp_path / "live"
        assert f"correct --{name}" in program.fault("serve", "--root", root, "--model", "m", f"--{name}", value)
        assert not root.exists()
    with Store(file) as store:
        assert store.counts() == kept and kept["completions"] == 1
        assert store.prune(max_age_s=1)["completions"] == 1  # it could have gone


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_are_understood(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import shlex

    seen: list[Any] = []
    monkeypatch.setitem(sys.modules["operant.cli"].COMMANDS, command, seen.append)
    main(shlex.split(EXAMPLES[command][2])[1:])
    assert isinstance(seen[0], EXAMPLES[command][0])


def test_flags_win_over_yaml_and_both_over_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setitem(sys.modules["operant.cli"].COMMANDS, "train", seen.append)
    file = tmp_path / "my.yaml"
    file.write_text('steps: 7\nlr: 0.25\ndense: true\nstop: ["\\n", END]\nbeta: 0.5\nreference-field: de\n')
    main(["train", "--config", str(file), "--steps", "9", "--prompt-field", "en", "--resume"])
    (config,) = seen
    assert (config.steps, config.lr, config.dense, config.stop, config.beta) == (9, 0.25, True, ["\n", "END"], 0.5)
    assert config.prompt_field == "en" and config.resume is True and config.group_size == 4
    assert config.reference_field == "de"
    main(
        [
            "train",
            "--dense",
            "false",
            "--prompt-field=de",
            "--max-sick-steps",
            "7",
            "--resume=true",
            "--overwrite",
            "--lr",
            "1e-4",
        ]
    )
    assert (seen[1].dense, seen[1].resume, seen[1].overwrite, seen[1].lr) == (False, True, True, 1e-4)
    assert (seen[1].prompt_field, seen[1].max_nonfinite_steps) == ("de", 7)


@pytest.mark.parametrize("word", ["# A heading", "null", "~", "#hashtag"])
@pytest.mark.parametrize(
    ("command", "setting"),
    [("sample", "prompt"), ("keys", "add"), ("keys", "remove"), ("versions", "pin"), ("versions", "unpin")],
)
def test_words_that_yaml_would_drop(command: str, setting: str, word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setitem(sys.modules["operant.cli"].COMMANDS, command, seen.append)
    main([command, f"--{setting}", word])
    assert getattr(seen[0], setting) == word


def test_bytes_that_are_no_text_and_a_locale_without_the_letters(
    program: Program, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    for errors in ("strict", "surrogateescape"):  # the latter without a locale
        with (tmp_path / "latin.txt").open(encoding="utf-8", errors=errors) as lines:
            monkeypatch.setattr(sys, "stdin", lines)
            assert "standard input is not UTF-8: convert it" in program.fault("sample", "--model", model, *ON_CPU)
    data = write_rows(tmp_path / "rows.jsonl", [{"completion": "你好"}])
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "cp1252"))
    main(["score", "--reward", "repetition", "--data", str(data), "--json"])
    sys.stdout.flush()
    assert "你好" in written.getvalue().decode("utf-8")


def test_print_config_gives_what_config_reads(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = program("train", "--steps", 3, "--reward", "0.5*chrf + exact", "--print_config")
    assert told.status == 0
    assert yaml.safe_load(told.out)["steps"] == 3
    file = tmp_path / "printed.yaml"
    file.write_text(told.out)
    seen: list[Any] = []
    monkeypatch.setitem(sys.modules["operant.cli"].COMMANDS, "train", seen.append)
    main(["train", "--config", str(file)])
    assert seen[0].steps == 3 and seen[0].reward == "0.5*chrf + exact"


def test_a_run_can_be_repeated_from_its_folder(program: Program, model: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = ("--steps", 2, "--batch_size", 4, "--eval_every", 1, "--seed", 3, *QUIET_RUN)
    assert program("sft", "--model", model, "--data", data, *options, "--out", out).status == 0
    assert program("sft", "--config", out / "config.yaml", "--out", tmp_path / "again").status == 0
    first, again = (read_rows(folder / "metrics.jsonl") for folder in (out, tmp_path / "again"))
    assert [row.get("train/loss") for row in first] == [row.get("train/loss") for row in again]


def test_no_arguments_show_the_help(program: Program) -> None:
    told = program()
    assert told.status == 0 and "quickstart" in told.out


# --- faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["trian"], "did you mean 'train'?"),
        (["nonsense"], "there are: pretrain"),
        (["--foo"], "--foo"),
        (["train", "--stepz", "3"], "did you mean --steps?"),
        (["train", "--learning_rate", "3"], "operant train has no setting --learning_rate; did you mean --lr?"),
        (["train", "--learning-rate=3"], "did you mean --lr?"),
        (["train", "--kl", "0.1"], "did you mean --kl_coef?"),
        (["sft", "--num_generations", "3"], "no setting --num_generations; see operant sft --help"),
        (["train", "--steps"], "--steps"),
        (["train", "--steps", "many"], "many"),
        (["train", "--steps", "1.5"], "1.5"),
        (["train", "--lr", "nan"], "lr"),
        (["train", "--lr=-1"], "lr is -1.0; it must be 0 or more, or auto: correct --lr"),
        (["train", "--max_sick_steps", "1", "--max_nonfinite_steps", "many"], "--max_nonfinite_steps"),
        (["train", "stray"], "stray"),
        (["train", "--kl_in", "los"], "reward | loss"),
        (["train"], "--model is missing"),
        (["sft"], "--data"),
        (["pretrain"], "--data"),
        (["eval"], "--model is missing"),
        (["score"], "--data is missing"),
        (["sample"], "--model is missing"),
        (["train", "--config", "no-such.yaml"], "no-such.yaml"),
    ],
)
def test_words_that_are_not_understood(arguments: list[str], told: str, program: Program, tmp_path: Path,
                                       monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert told in program.fault(*arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("steps: [1\n", "--help"),
        ("stepz: 3\n", "--steps"),
        ("learning_rate: 3\n", "did you mean --lr?"),
        ("- 1\n", "--help"),
        ("steps: x\n", "steps"),
    ],
)
def test_yaml_that_is_wrong(text: str, told: str, program: Program, tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(text)
    assert told in program.fault("train", "--config", tmp_path / "my.yaml")


CONTENT: list[tuple[str, bytes | None, str]] = [
    ("missing.jsonl", None, "there is no data at"),
    ("empty.jsonl", b"", "holds no rows"),
    ("blank.jsonl", b"\n\n", "holds no rows"),
    ("binary.jsonl", bytes(range(256)), "not UTF-8"),
    ("zeros.jsonl", bytes(64), "line 1 is no JSON"),
    ("cut.jsonl", b'{"prompt": "a", "completion": "b"}\n{"prompt": "a", "com', "line 2 is no JSON"),
    ("list.jsonl", b"[1, 2]\n", "line 1 is no JSON object"),
    ("null.jsonl", b'{"prompt": null, "completion": null}\n' * 3, "nothing in the column"),
    ("odd.csv", b"prompt,completion\na\n", "line 2"),
    ("odd.parquet", b"PAR1", "Parquet"),
    ("odd.jsonl.gz", b"no gzip", "cannot be read"),
    ("odd.docx", b"PK", "no data file"),
]


@pytest.mark.parametrize("command", ["sft", "train", "eval"])
@pytest.mark.parametrize(("name", "content", "told"), CONTENT)
def test_data_that_is_wrong(
    name: str, content: bytes | None, told: str, command: str, fault: Callable[..., str], tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert told in fault(command, "--data", tmp_path / name)


def test_folders_without_the_split(fault: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "holds no data" in fault("train", "--data", tmp_path / "empty")
    (tmp_path / "other").mkdir()
    write_rows(tmp_path / "other" / "things.jsonl", pairs(3))
    assert "no split 'train'" in fault("sft", "--data", tmp_path / "other")
    assert "there is no data" in fault("train", "--dev_data", tmp_path / "gone.jsonl")


@pytest.mark.parametrize("command", ["sft", "train", "eval"])
def test_a_wrong_field_names_the_nearest(command: str, fault: Callable[..., str]) -> None:
    line = fault(command, "--prompt_field", "promt")
    assert "did you mean 'prompt'?" in line and "--prompt_field" in line
    assert "--reference_field" in fault(command, "--reference-field", "nothing_like_it")


def test_other_columns(fault: Callable[..., str], tmp_path: Path) -> None:
    bare = write_rows(tmp_path / "bare.jsonl", [{"prompt": "a"}] * 4)
    assert "--reference_field" in fault("sft", "--data", bare)
    assert "needs references" in fault("train", "--data", bare)
    assert "--reference_field" in fault("eval", "--data", bare)
    assert "did you mean 'prompt'?" in fault("pretrain", "--text_field", "promt")
    blank = write_rows(tmp_path / "blank.jsonl", [{"prompt": "  "}] * 4)
    assert "is empty" in fault("pretrain", "--data", blank)


def test_prompts_longer_than_the_context(fault: Callable[..., str], tmp_path: Path) -> None:
    long = write_rows(tmp_path / "long.jsonl", [{"prompt": "red " * 90, "completion": "b"}] * 3)
    for command in ("sft", "train", "eval"):
        line = fault(command, "--data", long)
        assert "longer than" in line and "--too_long skip or truncate" in line
    assert "context" in fault("sample", "--prompt", "red " * 90)
    assert "longer than 1 tokens" in fault("train", "--max_tokens", 1000)
    answer = write_rows(tmp_path / "answer.jsonl", [{"prompt": "b", "completion": "red " * 90}] * 3)
    assert "--too_long skip or truncate" in fault("sft", "--data", answer)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--reward", "chrff"], "did you mean 'chrf'?"),
        (["--reward", ""], "not understood"),
        (["--algorithm", "rlo"], "did you mean 'rloo'?"),
        (["--baseline", "batsh"], "did you mean 'batch'?"),
        (["--group_size", 1], "--group_size 2 or more"),
        (["--group_size", 1, "--algorithm", "grpo"], "--group_size 2 or more"),
        (["--group_size", 0], "group_size is 0"),
        (["--steps", 0], "steps is 0"),
        (["--eval_every", 0], "eval_every is 0"),
        (["--save_every", -1], "save_every is -1"),
        (["--lr", -1], "lr is -1"),
        (["--max_tokens", -3], "max_tokens is -3"),
        (["--temperature", 0], "--temperature 1"),
        (["--top_p", 0.5], "--top_p 1"),
        (["--dense", "--algorithm", "grpo"], "--algorithm rloo or ppo"),
        (["--critic", "shared"], "rloo with baseline control_variate has no critic"),
        (["--algorithm", "ppo", "--gamma", 1.5], "gamma is 1.5"),
        (["--algorithm", "ppo", "--lam", -0.1], "lam is -0.1"),
        (["--algorithm", "gspo", "--clip_low", -1], "clip_low is -1"),
        (["--whiten", "perhaps"], "whiten"),
        (["--dense", "--reward", "exact"], "dense"),
        (["--target", "bleu"], "bleu>=30"),
        (["--target", "bleu>=."], "bleu>=30"),
        (["--sft_coef", 1], "--sft_data"),
        (["--device", "fridge"], "--device auto"),
        (["--out", ""], "--out"),
        (["--resume", "--overwrite"], "exclude each other"),
    ],
)
def test_settings_that_cannot_be(options: list[object], told: str, fault: Callable[..., str],
                                 tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert told in fault("train", *options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(fault: Callable[..., str], program: Program, tmp_path: Path) -> None:
    assert "--device auto" in fault("train", "--device", "cuda")
    assert "--device auto" in program.fault("quickstart", "--device", "cuda", "--labelled", 5, "--prompts", 5,
                                            "--out", tmp_path / "quick")  # fmt: skip
    assert not (tmp_path / "quick").exists()


@pytest.mark.parametrize("options", [["--target", "blue>=3"], ["--best_metric", "blue"]])
def test_metrics_that_are_not_measured(
    options: list[str], program: Program, model: Path, data: Path, tmp_path: Path
) -> None:
    """Found at the first held-out evaluation, before anything was learned: the folder is taken back."""
    out = tmp_path / "run"
    outcome = program("train", "--model", model, "--data", data, "--steps", 1, "--prompts_per_step", 2, "--max_tokens",
                      3, "--eval_prompts", 2, "--out", out, *QUIET_RUN, *options)  # fmt: skip
    faults = [line for line in outcome.err if line.startswith("operant: ")]
    assert outcome.status == 1 and len(faults) == 1 and "'blue'" in faults[0] and not out.exists()


@pytest.mark.parametrize("command", ["train", "sft", "eval", "sample"])
def test_models_that_are_none(command: str, fault: Callable[..., str], model: Path, tmp_path: Path) -> None:
    def broken(name: str, change: Callable[[Path], None]) -> Path:
        folder = tmp_path / name
        shutil.copytree(model, folder)
        change(folder)
        return folder

    bare = broken("bare", lambda f: [p.unlink() for p in f.glob("tokenizer*")])
    assert "holds no tokenizer" in fault(command, "--model", bare)
    assert "no model at" in fault(command, "--model", tmp_path / "gone")
    (tmp_path / "file").write_text("x")
    assert "is a file" in fault(command, "--model", tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert "holds no model" in fault(command, "--model", tmp_path / "empty")
    for name, content in {"model.safetensors": b"123", "config.json": b"{", "tokenizer.json": b"{"}.items():
        folder = broken(f"broken-{name}", lambda f, n=name, c=content: (f / n).write_bytes(c))
        assert "cannot load" in fault(command, "--model", folder)
    assert "cannot load" in fault(command, "--model", broken("light", lambda f: (f / "model.safetensors").unlink()))


MODULE = """
import math
def nan(prompt, completion): return math.nan
def long(prompt, completion): return [1.0] * (len(completion.tokens) + 1)
def raises(prompt, completion): raise ValueError("two\\nlines")
"""


@pytest.mark.parametrize(("name", "told"), [("nan", "NaN"), ("long", "return one number or"), ("raises", "two lines")])
def test_rewards_that_are_all_missing(
    name: str, told: str, program: Program, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run stops with the reason, and its folder is whole: the report tells it too."""
    module = f"faulty_{abs(hash(tmp_path))}"
    (tmp_path / f"{module}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    out = tmp_path / "run"
    outcome = program("train", "--model", model, "--data", data, "--reward", f"{module}:{name}", "--steps", 9,
                      "--prompts_per_step", 2, "--group_size", 2, "--max_tokens", 3, "--eval_prompts", 2,
                      "--reward_workers", 0, "--out", out, *QUIET_RUN)  # fmt: skip
    faults = [line for line in outcome.err if line.startswith("operant: ")]
    assert outcome.status == 1 and len(faults) == 1
    assert "every reward was missing" in faults[0] and told in faults[0]
    assert "every reward was missing" in json.loads((out / "run.json").read_text())["stop_reason"]
    assert "every reward was missing" in (out / "report.html").read_text()
    assert not [p for p in out.rglob(".*") if p.name != ".lock"]


def test_places_that_cannot_be_written(fault: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert "choose another --out" in fault("train", "--out", tmp_path / "file")
    assert "choose another --out" in fault("sft", "--out", tmp_path / "file" / "below")
    assert "choose another --samples" in fault("eval", "--samples", tmp_path / "gone" / "x.jsonl")
    assert "choose another --samples" in fault("eval", "--samples", tmp_path / ("x" * 300) / "x.jsonl")
    for command in ("sample", "sft"):
        assert "cannot load a model from" in fault(command, "--model", "./" + "x" * 300)
    assert (tmp_path / "file").read_text() == "x"
    if os.geteuid():
        (tmp_path / "closed").mkdir(mode=0o500)
        assert "choose another --out" in fault("train", "--out", tmp_path / "closed" / "run")


@pytest.mark.parametrize(
    "rows",
    [
        [{"prompt": "red cat", "completion": "cat red"}],
        [{"prompt": "", "completion": "b"}] * 3,
        [{"prompt": "a", "completion": ""}] * 3,
        [{"prompt": 3, "completion": 4}] * 3,
        [{"prompt": "\u2028\x00 😀", "completion": "\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16")}]
        * 3,
    ],
)
def test_odd_rows_that_are_fine(rows: list[dict[str, Any]], program: Program, model: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "odd.jsonl", rows)
    usual = ("--model", model, "--data", data, *QUIET_RUN, "--steps", 1)
    assert program("sft", *usual, "--batch_size", 2, "--out", tmp_path / "sft").status == 0
    done = program("train", *usual, "--prompts_per_step", 2, "--group_size", 2, "--max_tokens", 3,
                   "--out", tmp_path / "train")  # fmt: skip
    assert done.status == 0
    assert program("eval", "--model", model, "--data", data, "--max_tokens", 3, *ON_CPU).status == 0


# --- as a process ----------------------------------------------------------------------------------------------------


def test_the_process_ends_with_a_status_and_one_line(tmp_path: Path) -> None:
    with Forked(
        [sys.executable, "-m", "operant.cli", "train", "--model", str(tmp_path / "gone"), "--data", "gone.jsonl"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    ) as process:  # fmt: skip
        out, err = process.communicate()
    assert process.returncode == 1 and out == ""
    assert re.fullmatch(r"operant: [^\n]+\n", err)
    assert not list(tmp_path.iterdir())


def test_a_reward_beside_the_data_and_a_pipe_that_closes(tmp_path: Path) -> None:
    """`module:function` is found in the current folder, and `| head` is no fault."""
    (tmp_path / "mine.py").write_text("def reward(prompt, completion): return len(completion.text) / 10\n")
    write_rows(tmp_path / "a.jsonl", [{"completion": "x" * 10}] * 3000)
    command = f"{sys.executable} -m operant.cli score --reward mine:reward --data a.jsonl --json | head -n 1"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, cwd=tmp_path, check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    assert done.stderr == "" and json.loads(done.stdout)["reward"] == 1.0 and done.returncode == 0


def test_the_algorithms_are_told_readably_and_as_json(program: Program) -> None:
    from operant.algorithms.table import ALGORITHMS

    lines = program("algorithms").out.splitlines()
    assert [line.split()[0] for line in lines] == ["name", *ALGORITHMS]
    assert "critic" in next(line for line in lines if line.startswith("ppo "))
    rows = json.loads(program("algorithms", "--json").out)
    assert [row["name"] for row in rows] == list(ALGORITHMS)
    assert next(row for row in rows if row["name"] == "topr")["honours"] == ["stale", "single", "greedy", "passes"]
