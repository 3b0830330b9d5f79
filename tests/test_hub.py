"""What other libraries load: a hub that does not answer, models that need code of their own, and what is printed."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from program import ON_CPU, Program, write_rows

from operant.data import hub
from operant.data.rows import load_rows
from operant.data.text import Codec
from operant.models.encoder import Encoder, masked_tokenizer
from operant.models.policy import Policy
from operant.types import OperantError


@pytest.fixture
def program(capsys: pytest.CaptureFixture[str]) -> Program:
    return Program(capsys)


@pytest.fixture
def silent_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[int]]:
    """A hub that takes connections and never answers, behind an empty cache; what it has counts them."""
    listener = socket.create_server(("127.0.0.1", 0))
    taken: list[Any] = []

    def accept() -> None:
        while True:
            try:
                taken.append(listener.accept()[0])
            except OSError:
                return

    threading.Thread(target=accept, daemon=True).start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{listener.getsockname()[1]}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "SECONDS", 0.2)
    yield taken
    listener.close()
    for connection in taken:
        connection.close()


def test_a_hub_that_does_not_answer_is_asked_once_and_told_in_one_line(
    silent_hub: list[int], program: Program, tmp_path: Path
) -> None:
    told = program.fault("sample", "--model", "owner/name", "--prompt", "a", *ON_CPU)
    assert told.startswith("owner/name is no folder here and not in the cache, and http://127.0.0.1:")
    assert "does not answer" in told
    assert len(silent_hub) <= 1
    for load in (Policy.load, Encoder.load, Codec.load, load_rows):
        with pytest.raises(OperantError, match="does not answer"):
            load("owner/name")
    assert len(silent_hub) <= 5 and constants.HF_HUB_OFFLINE is False


def test_the_time_that_a_hub_is_waited_for() -> None:
    assert 1 <= hub.SECONDS <= 4


def test_what_is_in_the_cache_is_loaded_without_the_hub(
    silent_hub: list[int], make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    policy = make_policy("gpt2")
    cached = tmp_path / "cache" / "models--owner--name"
    policy.save(cached / "snapshots" / "1234")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("1234")
    loaded = Policy.load("owner/name", device="cpu")
    assert torch.equal(loaded.model.lm_head.weight, policy.model.lm_head.weight)
    assert len(silent_hub) <= 1 and constants.HF_HUB_OFFLINE is False


def needs_code(folder: Path, codec: Codec) -> Path:
    codec.save(folder)
    kinds = ("AutoConfig", "AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoTokenizer")
    settings = {"model_type": "of_their_own", "auto_map": {kind: f"theirs.{kind}" for kind in kinds}}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "theirs.py").write_text("raise SystemExit('this must not run')\n")
    return folder


def test_a_model_that_needs_code_of_its_own_is_refused_and_nothing_asked(
    codec: Codec, program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*_: Any) -> str:
        raise AssertionError("the person was asked")

    monkeypatch.setattr("builtins.input", asked)
    folder = needs_code(tmp_path / "theirs", codec)
    told = program.fault("sample", "--model", folder, "--prompt", "a", *ON_CPU)
    assert "it needs code of its own, which operant does not run" in told and str(folder) in told
    for load in (Policy.load, Encoder.load):
        with pytest.raises(OperantError, match="code of its own"):
            load(folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({"auto_map": {"AutoTokenizer": ["theirs.Slow", None]}, "tokenizer_class": "Theirs"}))
    with pytest.raises(OperantError, match="code of its own"):
        Codec.load(folder)


def test_only_what_operant_says_reaches_the_terminal(codec: Codec, tmp_path: Path) -> None:
    """An encoder without its head, of which Transformers makes a report, in a process of its own."""
    bare, data = tmp_path / "bare", write_rows(tmp_path / "a.jsonl", [{"completion": "a dog", "reference": "a cat"}])
    encoder = Encoder.new("bert", "tiny", masked_tokenizer(["a dog ran", "the cat"] * 3, 300), device="cpu")
    encoder.model.bert.save_pretrained(bare)
    encoder.codec.save(bare)
    (tmp_path / "loud.py").write_text(
        "import logging, warnings\n"
        "def loud(prompt, completion):\n"
        "    warnings.warn('a warning of theirs')\n"
        "    logging.getLogger('theirs').warning('a line of theirs')\n"
        "    logging.getLogger('operant.own').warning('a line of ours')\n"
        "    return 1.0\n"
        "loud.in_process = True\n"
    )
    command = [
        "-m",
        "operant.cli",
        "score",
        "--reward",
        f"similarity({bare}, device=cpu) + loud:loud",
        "--data",
        str(data),
    ]
    done = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": str(Path(hub.__file__).parents[2])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2
    assert [line for line in done.stderr.splitlines() if "a line of ours" not in line] == []
