"""Encoders of every family, and masked language modelling."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TEXTS
from program import QUIET_RUN, Program, read_rows, write_rows

from operant.batch import from_sequences
from operant.encoder import Encoder, by_length, hide_tokens, masked_tokenizer, right_padded
from operant.policy import Policy
from operant.text import Codec
from operant.types import OperantError

WORDS = "red blue green cat dog house sun moon tree star".split()


@pytest.fixture(scope="module")
def masked_codec() -> Codec:
    return masked_tokenizer(TEXTS * 3, 300)


@pytest.fixture
def bert(masked_codec: Codec) -> Encoder:
    return Encoder.new("bert", "tiny", masked_codec, max_length=32, device="cpu")


@pytest.fixture
def program(capsys: pytest.CaptureFixture[str]) -> Program:
    return Program(capsys)


def test_hidden_tokens_follow_the_recipe() -> None:
    rng = np.random.default_rng(0)
    tokens = np.full(20_000, 7, np.int64)
    corrupted, chosen = hide_tokens(tokens, rng, mask_id=3, vocabulary=np.arange(10, 20), density=0.15)
    assert chosen.sum() == 3000
    assert (corrupted[~chosen] == 7).all()
    hidden = corrupted[chosen]
    assert np.mean(hidden == 3) == pytest.approx(0.8, abs=0.03)
    assert np.mean(hidden == 7) == pytest.approx(0.1, abs=0.03)
    assert np.mean(hidden >= 10) == pytest.approx(0.1, abs=0.03) and set(hidden) == {3, 7, *range(10, 20)}
    assert hide_tokens(tokens[:1], rng, mask_id=3, vocabulary=np.arange(10, 20))[1].tolist() == [True]


@torch.no_grad()
def test_masked_logprobs_are_the_model_s_own(bert: Encoder) -> None:
    codec = bert.codec
    true = [bert.framed(codec.encode(text)) for text in TEXTS[:2]]
    corrupted = [row.copy() for row in true]
    where = [np.zeros(len(row), np.bool_) for row in true]
    for row, flags in zip(corrupted, where, strict=True):
        row[2], flags[2] = bert.mask_id, True
    batch = from_sequences(corrupted, true, encoder=True, pad_id=codec.pad_id, sampled=where)
    found = bert.logprobs(batch).logprobs
    for i, row in enumerate(corrupted):
        logits = bert.model(input_ids=torch.from_numpy(row)[None]).logits[0, 2]  # alone, without padding
        assert float(found[i, 2]) == pytest.approx(float(logits.log_softmax(-1)[true[i][2]]), abs=1e-5)
    assert int((found != 0).sum()) == 2


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5", "bart", "bert"])
def test_vectors_do_not_depend_on_what_is_read_beside(
    family: str, make_policy: Callable[..., Policy], bert: Encoder, tmp_path: Path
) -> None:
    if family == "bert":
        bert.save(tmp_path)
    else:
        make_policy(family).save(tmp_path)
    encoder = Encoder.load(tmp_path, device="cpu")
    assert encoder.causal == (family in ("gpt2", "llama"))
    together = encoder.vectors(TEXTS, max_tokens=64)
    for text, (tokens, vectors) in zip(TEXTS, together, strict=True):
        assert vectors.shape == (len(tokens), encoder.width)
        (alone,) = encoder.vectors([text])
        np.testing.assert_allclose(alone[1], vectors, atol=1e-5)
        assert alone[0].tolist() == tokens.tolist() == encoder.codec.encode(text)[: len(tokens)].tolist()


def test_pieces_hold_every_row_once() -> None:
    lengths = [5, 1, 9, 3, 3, 20]
    pieces = list(by_length(lengths, 10))
    assert sorted(i for piece in pieces for i in piece) == list(range(6))
    assert all(len(piece) == 1 or max(lengths[i] for i in piece) * len(piece) <= 10 for piece in pieces)
    tokens, mask = right_padded([np.array([1, 2]), np.array([3])], 9)
    assert tokens.tolist() == [[1, 2], [3, 9]] and mask.tolist() == [[True, True], [True, False]]


def test_a_saved_encoder_is_one_of_transformers(bert: Encoder, tmp_path: Path) -> None:
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    bert.save(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).mask_token_id == bert.mask_id
    plain = AutoModelForMaskedLM.from_pretrained(tmp_path)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, bert.model.state_dict()[name])


def test_a_wordpiece_bert_is_read_between_cls_and_sep(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast

    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    tokenizer = BertTokenizerFast(str(tmp_path / "vocab.txt"))
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                        intermediate_size=16)  # fmt: skip
    BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    encoder = Encoder.load(tmp_path / "bert", device="cpu")
    framed = encoder.framed(encoder.codec.encode("red cat"))
    assert tokenizer.convert_ids_to_tokens(framed.tolist()) == ["[CLS]", "red", "cat", "[SEP]"]
    assert encoder.mask_id == tokenizer.mask_token_id


def sentences(count: int) -> list[dict[str, str]]:
    """The word tells the next one, so that a hidden one can be known from its neighbours."""
    return [{"text": " ".join(WORDS[(i + k) % len(WORDS)] for k in range(8))} for i in range(count)]


def test_pretraining_learns_what_is_hidden_and_resumes_exactly(program: Program, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "texts.jsonl", sentences(60))
    options = (
        "--arch", "bert", "--data", data, "--vocab_size", 300, "--max_length", 32, "--batch_tokens", 256, "--lr",
        "3e-3", "--warmup_steps", 3, "--eval_every", 6, "--schedule", "constant", *QUIET_RUN,
    )  # fmt: skip
    whole, half = tmp_path / "whole", tmp_path / "half"
    assert program("pretrain", *options, "--steps", 12, "--out", whole).status == 0
    losses = [row["eval/loss"] for row in read_rows(whole / "metrics.jsonl") if "eval/loss" in row]
    assert losses[-1] < losses[0] - 1.0
    assert program("pretrain", *options, "--steps", 6, "--out", half).status == 0
    assert program("pretrain", *options, "--steps", 12, "--out", half, "--resume").status == 0
    first, second = (Encoder.load(run / "model", device="cpu").model.state_dict() for run in (whole, half))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert "</html>" in (whole / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--arch", "gpt2", "--objective", "mlm"), "choose --arch bert"),
        (("--arch", "bert", "--objective", "causal"), "leave it out, or give mlm"),
        (("--arch", "bert", "--lora_rank", 4), "leave --lora_rank out"),
        (("--arch", "bert", "--block", 2), "larger --block"),
    ],
)
def test_objectives_that_do_not_fit_are_refused(
    arguments: tuple[Any, ...], told: str, program: Program, tmp_path: Path
) -> None:
    data = write_rows(tmp_path / "texts.jsonl", sentences(10))
    line = program.fault(
        "pretrain", "--data", data, "--vocab_size", 300, "--out", tmp_path / "run", *QUIET_RUN, *arguments
    )
    assert told in line and not (tmp_path / "run").exists()


def test_a_decoder_cannot_be_pretrained_by_masking(
    program: Program, make_policy: Callable[..., Policy], bert: Encoder, tmp_path: Path
) -> None:
    data = write_rows(tmp_path / "texts.jsonl", sentences(10))
    make_policy("gpt2").save(tmp_path / "gpt2")
    line = program.fault(
        "pretrain", "--model", tmp_path / "gpt2", "--objective", "mlm", "--data", data, "--out", tmp_path / "r",
        *QUIET_RUN,
    )  # fmt: skip
    assert "is for encoders" in line
    line = program.fault(
        "sft", "--arch", "bert", "--data", write_rows(tmp_path / "p.jsonl", [{"prompt": "a", "completion": "b"}] * 4),
        "--out", tmp_path / "r", *QUIET_RUN,
    )  # fmt: skip
    assert "bert reads and does not write" in line
    bert.save(tmp_path / "bert")
    with pytest.raises(OperantError, match="is a bert, which reads and does not write"):
        Policy.load(tmp_path / "bert", device="cpu")
    settings = json.loads((tmp_path / "bert" / "config.json").read_text())
    (tmp_path / "bert" / "config.json").write_text(json.dumps(settings | {"vocab_size": "many"}))
    with pytest.raises(OperantError, match="cannot load a model"):
        Encoder.load(tmp_path / "bert", device="cpu")
    with pytest.raises(OperantError, match="there is no model at"):
        Encoder.load(tmp_path / "nowhere", device="cpu")
    with pytest.raises(OperantError, match="mask token"):
        _ = Encoder(make_policy("gpt2").model, make_policy("gpt2").codec, device="cpu").mask_id
