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
from torch import Tensor
from torch.nn import functional as F

from operant.data.batch import from_sequences, right_padded
from operant.data.text import Codec
from operant.models.encoder import Encoder, by_length, hide_tokens, masked_tokenizer
from operant.models.policy import Policy
from operant.models.sampler import Sampler
from operant.types import OperantError, Prompt, Sampling

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


@pytest.mark.draws("whole")
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


# --- encoder-decoders that begin from one -----------------------------------------------------------------------------


def shaken(encoder: Encoder, size: float = 0.2) -> Encoder:
    """Weights as if trained: no bias is zero and no normalisation plain."""
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in encoder.body.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return encoder


def by_hand(weights: dict[str, Tensor], heads: int, prompt: np.ndarray, answer: list[int], start: int) -> Tensor:
    """log π float64[T] of one answer: BART's equations (Lewis et al. 2020; Vaswani et al. 2017) and nothing else."""
    w = {name.removeprefix("model."): tensor.double() for name, tensor in weights.items()}
    table = w["shared.weight"]
    width = table.shape[1]

    def normal(x: Tensor, name: str) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def attend(x: Tensor, memory: Tensor, name: str, causal: bool) -> Tensor:
        q, k, v = (
            linear(part, f"{name}.{which}_proj").view(len(part), heads, -1).transpose(0, 1)
            for part, which in ((x, "q"), (memory, "k"), (memory, "v"))
        )
        logits = q @ k.transpose(1, 2) / (width / heads) ** 0.5
        if causal:
            logits = logits.masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), -torch.inf)
        return linear((logits.softmax(-1) @ v).transpose(0, 1).reshape(len(x), width), f"{name}.out_proj")

    def begin(tokens: Any, side: str) -> Tensor:
        x = table[torch.as_tensor(tokens)] * width**0.5 + w[f"{side}.embed_positions.weight"][2 : 2 + len(tokens)]
        return normal(x, f"{side}.layernorm_embedding")

    def layers(x: Tensor, side: str, memory: Tensor | None) -> Tensor:
        number = 0
        while f"{side}.layers.{number}.fc1.weight" in w:
            at = f"{side}.layers.{number}"
            x = normal(x + attend(x, x, f"{at}.self_attn", memory is not None), f"{at}.self_attn_layer_norm")
            if memory is not None:
                x = normal(x + attend(x, memory, f"{at}.encoder_attn", False), f"{at}.encoder_attn_layer_norm")
            x = normal(x + linear(F.gelu(linear(x, f"{at}.fc1")), f"{at}.fc2"), f"{at}.final_layer_norm")
            number += 1
        return x

    memory = layers(begin(prompt, "encoder"), "encoder", None)
    out = layers(begin([start, *answer[:-1]], "decoder"), "decoder", memory)
    return (out @ table.T).log_softmax(-1)[torch.arange(len(answer)), torch.tensor(answer)]


@torch.no_grad()
def test_an_encoder_decoder_begins_from_an_encoder_and_is_what_its_equations_say(bert: Encoder, tmp_path: Path) -> None:
    encoder = shaken(bert)
    policy = encoder.with_decoder(seed=1)
    assert policy.family == "encoder-decoder" and policy.max_length == encoder.max_length == 32
    # it reads as the encoder reads, tokens around the text included
    tokens = policy.codec.encode_prompt(TEXTS[0], encoder=True)
    assert tokens.tolist() == encoder.framed(encoder.codec.encode(TEXTS[0])).tolist()
    padded, mask = right_padded([tokens, tokens[:3]], policy.codec.pad_id)
    read = policy.model.get_encoder()(input_ids=padded, attention_mask=mask.long()).last_hidden_state
    torch.testing.assert_close(read[mask], encoder.hidden(padded, mask)[mask], atol=2e-4, rtol=1e-3)
    # layers of the decoder begin as the encoder's, all but what the encoder has not
    own = dict(policy.model.model.encoder.layers.named_parameters())
    decoder = policy.model.model.decoder.layers
    assert all(torch.equal(p, own[name]) for name, p in decoder.named_parameters() if "encoder_attn" not in name)
    assert float(decoder[0].encoder_attn.q_proj.weight.std()) == pytest.approx(0.02, rel=0.1)
    assert policy.model.get_output_embeddings().weight is policy.model.get_input_embeddings().weight
    # the numbers, by another road; the incremental decoder, the whole forward pass, and a saved copy
    with torch.no_grad():
        for layer in decoder:
            layer.encoder_attn.out_proj.weight.mul_(20)  # so that what was read counts for something
    policy.save(tmp_path)
    loaded = Policy.load(tmp_path, device="cpu")
    prompts = [Prompt(t, policy.codec.encode_prompt(t, encoder=True)) for t in TEXTS[:3]]
    answers = [g[0] for g in Sampler(policy).sample(prompts, Sampling(max_tokens=9, seed=2))]
    batch = from_sequences(
        [p.tokens for p in prompts], [a.tokens for a in answers], encoder=True, pad_id=policy.codec.pad_id
    )
    whole, saved = policy.logprobs(batch).logprobs, loaded.logprobs(batch).logprobs
    torch.testing.assert_close(whole, saved)
    start = int(encoder.first[0])
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        assert answer.behavior_logprobs is not None
        expected = by_hand(policy.model.state_dict(), 4, prompt.tokens, answer.tokens.tolist(), start)
        row = whole[i, : len(expected)].double()
        torch.testing.assert_close(row, expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(row, torch.from_numpy(answer.behavior_logprobs).double(), atol=1e-4, rtol=1e-4)
        other = by_hand(policy.model.state_dict(), 4, prompts[i - 1].tokens, answer.tokens.tolist(), start)
        assert not torch.allclose(expected, other, atol=1e-2)


@torch.no_grad()
def test_small_embeddings_are_read_alike_and_positions_begin_where_the_encoder_counts_them(masked_codec: Codec) -> None:
    import transformers as hf

    config = hf.RobertaConfig(
        vocab_size=masked_codec.vocab_size, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=26, type_vocab_size=1, pad_token_id=masked_codec.pad_id,
        bos_token_id=masked_codec.bos_id, eos_token_id=masked_codec.eos_id,
    )  # fmt: skip
    torch.manual_seed(0)
    for encoder in (
        Encoder(hf.RobertaForMaskedLM(config).eval(), masked_codec, device="cpu"),
        Encoder.new("bert", "tiny", masked_codec, max_length=32, device="cpu"),
    ):
        encoder = shaken(encoder, 0.01)
        policy = encoder.with_decoder()
        assert policy.max_length == encoder.max_length
        padded, mask = right_padded([encoder.framed(encoder.codec.encode(t)) for t in TEXTS[:2]], masked_codec.pad_id)
        read = policy.model.get_encoder()(input_ids=padded, attention_mask=mask.long()).last_hidden_state
        torch.testing.assert_close(read[mask], encoder.hidden(padded, mask)[mask], atol=3e-4, rtol=1e-3)
    electra = hf.ElectraForMaskedLM(hf.ElectraConfig(vocab_size=masked_codec.vocab_size, num_hidden_layers=1))
    with pytest.raises(OperantError, match=r"bert, roberta, .* and this is a electra"):
        Encoder(electra, masked_codec, device="cpu").with_decoder()


@pytest.mark.parametrize("infilling", [False, True])
def test_from_an_encoder_to_a_rewarded_writer_by_commands(infilling: bool, program: Program, tmp_path: Path) -> None:
    texts = write_rows(tmp_path / "texts.jsonl", sentences(40))
    pairs = write_rows(
        tmp_path / "pairs.jsonl", [{"prompt": w, "completion": f"{w} {w}"} for _ in range(4) for w in WORDS]
    )
    run = ("--lr", "3e-3", "--warmup_steps", 2, *QUIET_RUN)
    made = ("--arch", "bert", "--vocab_size", 300, "--max_length", 32, "--batch_tokens", 256, "--steps", 6)
    assert program("pretrain", "--data", texts, *made, "--out", tmp_path / "bert", *run).status == 0
    begin = tmp_path / "bert" / "model"
    line = program.fault("train", "--model", begin, "--data", pairs, "--out", tmp_path / "x", *QUIET_RUN)
    assert "fine-tune it first" in line
    if infilling:
        told = program.fault(
            "pretrain", "--model", begin, "--data", texts, "--objective", "spans", "--out", tmp_path / "y", *QUIET_RUN
        )
        assert "--objective infilling" in told
        more = ("--objective", "infilling", "--steps", 3, "--out", tmp_path / "both", *run)
        assert program("pretrain", "--model", begin, "--data", texts, *more).status == 0
        begin = tmp_path / "both" / "model"
    fine = ("--steps", 30, "--eval_every", 10, "--max_tokens", 8, "--out", tmp_path / "fine", *run)
    assert program("sft", "--model", begin, "--data", pairs, *fine).status == 0
    losses = [row["eval/loss"] for row in read_rows(tmp_path / "fine" / "metrics.jsonl") if "eval/loss" in row]
    assert losses[-1] < losses[0] - 1.0
    model = tmp_path / "fine" / "model"
    learn = (
        "--reward", "chrf", "--steps", 2, "--prompts_per_step", 4, "--group_size", 2, "--max_tokens", 6,
        "--eval_prompts", 4, "--algorithm",
    )  # fmt: skip
    for algorithm in ("rloo", "ppo"):
        out = tmp_path / algorithm
        done = program("train", "--model", model, "--data", pairs, *learn, algorithm, "--out", out, *QUIET_RUN)
        assert done.status == 0, done.err
    assert Policy.load(tmp_path / "rloo" / "model", device="cpu").config.model_type == "bart"
