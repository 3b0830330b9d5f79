"""Reward models: what they read, their losses, training through the program, and bad data."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TEXTS
from program import QUIET_RUN, Program, read_rows, write_rows

from operant.config import RewardModelConfig
from operant.data.text import Codec
from operant.models.encoder import Encoder, masked_tokenizer
from operant.models.policy import Policy
from operant.models.reward_model import RewardFacts, RewardModel, bradley_terry, reading_batch, reward_loss
from operant.stages.reward_model import (
    Judgement,
    baselines,
    judgement_batches,
    measure_and_calibrate,
    measures,
    read_judgements,
)
from operant.types import OperantError

NOISE = "red blue green cat dog house sun moon".split()


@pytest.fixture
def program(capsys: pytest.CaptureFixture[str]) -> Program:
    return Program(capsys)


@pytest.fixture
def encoders(make_policy: Callable[..., Policy], tmp_path: Path) -> Callable[[str], Encoder]:
    def make(family: str) -> Encoder:
        if family == "bert":
            return Encoder.new("bert", "tiny", masked_tokenizer(TEXTS * 3, 300), max_length=48, device="cpu")
        make_policy(family).save(tmp_path / family)
        return Encoder.load(tmp_path / family, device="cpu")

    return make


def preferences(count: int) -> list[dict[str, str]]:
    """The answer that says `good` is better; lengths say nothing."""
    rows = []
    for i in range(count):
        words = [NOISE[(i * k + i // 5) % len(NOISE)] for k in (1, 3)]
        better, worse = [[*words, "good"], [*words, "bad"]]
        if i % 2:
            worse.append("sun")
        else:
            better.append("sun")
        rows.append({"prompt": words[0], "chosen": " ".join(better), "rejected": " ".join(worse)})
    return rows


def scored(count: int) -> list[dict[str, Any]]:
    return [
        row
        for pair in preferences(count)
        for row in (
            {"prompt": pair["prompt"], "completion": pair["chosen"], "score": 3.0},
            {"prompt": pair["prompt"], "completion": pair["rejected"], "score": -1.0},
        )
    ]


def spanned(count: int) -> list[dict[str, Any]]:
    """`bad` costs 2, wherever it stands."""
    rows = []
    for row in scored(count):
        at = row["completion"].find("bad")
        spans = [{"start": at, "end": at + 3, "value": -2.0}] if at >= 0 else []
        rows.append({"prompt": row["prompt"], "completion": row["completion"], "spans": spans})
    return rows


# --- reading and losses ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_a_reward_does_not_depend_on_its_batch_and_survives_saving(
    family: str, encoders: Callable[[str], Encoder], tmp_path: Path
) -> None:
    encoder = encoders(family)
    model = RewardModel(encoder, RewardFacts("comparison", "last" if encoder.causal else "mean"), seed=4)
    pairs = [("the cat", "sat"), ("", "你好"), ("a dog ran", "to the red house"), ("x", "")]
    readings = [r for r in model.read_all(pairs) if r is not None]
    assert len(readings) == 4
    together = np.concatenate(model.predict(readings))
    alone = np.concatenate([model.predict([r])[0] for r in readings])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert np.ptp(together) > 1e-3
    model.save(tmp_path / "rm")
    again = RewardModel.load(tmp_path / "rm", device="cpu")
    np.testing.assert_allclose(np.concatenate(again.predict(readings)), together, atol=1e-6)
    model.facts.scale, model.facts.mean, model.facts.std, model.facts.offset = 2.0, 1.0, 3.0, -1.0
    np.testing.assert_allclose(np.concatenate(model.predict(readings)), 2 * (1 + 3 * together) - 1, atol=1e-5)


def test_a_long_prompt_loses_its_beginning_and_a_long_completion_is_not_read(
    encoders: Callable[[str], Encoder],
) -> None:
    model = RewardModel(encoders("bert"), RewardFacts("comparison"))
    codec = model.encoder.codec
    reading = model.read("the cat sat on the mat " * 20 + "END", "a dog ran")
    assert reading is not None and len(reading.tokens) == model.encoder.max_length
    assert codec.decode(reading.tokens[: reading.begin]).endswith("END\n")
    assert codec.decode(reading.tokens[reading.begin :]) == "a dog ran" == reading.text
    assert model.read("x", "a dog ran " * 40) is None


def test_losses_are_those_of_the_papers(encoders: Callable[[str], Encoder]) -> None:
    assert bradley_terry(torch.tensor([1.0]), torch.tensor([-1.0])).item() == pytest.approx(math.log(1 + math.exp(-2)))
    for kind in ("comparison", "regression", "token"):
        model = RewardModel(encoders("bert"), RewardFacts(kind, mean=1.0, std=2.0), seed=1)
        readings = [r for r in model.read_all([("p", "red"), ("p", "blue"), ("q", "green cat"), ("q", "dog")]) if r]
        targets = None
        if kind == "regression":
            targets = [np.array([float(i)]) for i in range(4)]
        if kind == "token":
            targets = [np.arange(len(r.text_ends), dtype=float) for r in readings]
            targets[0][0] = np.nan
        batch = reading_batch(readings, 0, targets=targets, kind=kind)
        with torch.no_grad():
            loss, _ = reward_loss(model, batch)
            total = float((loss * batch.weights).sum() / batch.denominator)
            z = model.outputs(batch.tokens, batch.segment_ids >= 0, batch.action_mask).numpy()
        if kind == "comparison":
            want = np.mean([np.log1p(np.exp(z[1] - z[0])), np.log1p(np.exp(z[3] - z[2]))])
        elif kind == "regression":
            want = np.mean([(z[i] - (i - 1.0) / 2.0) ** 2 for i in range(4)])
        else:
            errors = []
            for row, (reading, wanted) in enumerate(zip(readings, targets or [], strict=True)):
                for k, value in enumerate(wanted):
                    if np.isfinite(value):
                        errors.append((z[row, reading.begin + k] - (value - 1.0) / 2.0) ** 2)
            want = np.mean(errors)
        assert total == pytest.approx(float(want), rel=1e-5)


def test_micro_batches_change_no_gradient(encoders: Callable[[str], Encoder]) -> None:
    model = RewardModel(encoders("bert"), RewardFacts("comparison"), seed=1)
    judgements, _ = read_judgements(preferences(6), RewardModelConfig(), model, "training")

    def gradient(max_tokens: int) -> tuple[int, torch.Tensor]:
        model.head.zero_grad()
        pieces = judgement_batches(judgements, model, max_tokens)
        for batch in pieces:
            loss, _ = reward_loss(model, batch)
            ((loss * batch.weights).sum() / batch.denominator).backward()
        assert model.head.weight.grad is not None
        return len(pieces), model.head.weight.grad.clone()

    (one, whole), (several, cut) = gradient(10_000), gradient(50)
    assert one == 1 and several > 2
    torch.testing.assert_close(whole, cut, atol=1e-6, rtol=1e-4)


def test_token_rewards_become_spans_of_the_text(encoders: Callable[[str], Encoder]) -> None:
    model = RewardModel(encoders("bert"), RewardFacts("token"))
    reading = model.read("p", "😀 naïve")
    assert reading is not None
    values = np.arange(1.0, len(reading.text_ends) + 1)
    spans = model.spans(reading, values)
    assert sum(span.value for span in spans) == pytest.approx(values.sum())
    assert [span.start for span in spans] == [0, *(span.end for span in spans[:-1])]
    assert spans[-1].end == len(reading.text)
    # the first bytes of the emoji are paid to it, the closing token to the last character
    one = model.read("", "a😀")
    assert one is not None and one.text_ends[1] == 1
    assert [span.value for span in model.spans(one, np.ones(len(one.text_ends)))] == [1, len(one.text_ends) - 1]
    empty = model.read("p", "")
    assert empty is not None and model.spans(empty, np.ones(1)) == []


@pytest.mark.parametrize("own_tokens", [False, True])
def test_what_labels_say_of_a_character_is_paid_to_it(encoders: Callable[[str], Encoder], own_tokens: bool) -> None:
    model = RewardModel(encoders("bert"), RewardFacts("token"))
    row: dict[str, Any] = {"completion": "他很坏人", "spans": [{"start": 2, "end": 3, "value": -1.0}]}
    if own_tokens:  # of which two are bytes without a character of their own
        row |= {"tokens": ["他", "很", "", "", "坏", "人"], "spans": [0, 0, -0.25, -0.25, -0.5, 0]}
    ((judgement,), _) = read_judgements([row], RewardModelConfig(kind="token"), model, "training")
    (reading,) = judgement.readings
    assert len(reading.text_ends) > 5  # characters of several tokens
    paid = {(span.start, span.end): span.value for span in model.spans(reading, judgement.targets)}
    assert paid == {(0, 1): 0.0, (1, 2): 0.0, (2, 3): pytest.approx(-1.0), (3, 4): 0.0}


def test_a_tokenizer_that_rewrites_text_pays_the_text_as_it_was() -> None:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "ba", "##d", ",", "!", "'", "s", "it"]
    core = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    core.normalizer, core.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    named = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **named)
    encoder = Encoder.new("bert", "tiny", Codec(tokenizer), max_length=48, device="cpu")
    model = RewardModel(encoder, RewardFacts("token"))
    text = "It's  GOOD😀, naïve  Bad! "
    row = {"completion": text, "spans": [{"start": text.index("Bad"), "end": text.index("!"), "value": -1.0}]}
    ((judgement,), _) = read_judgements([row], RewardModelConfig(kind="token"), model, "training")
    (reading,) = judgement.readings
    assert [int(t) for t in reading.tokens[np.r_[np.zeros(reading.begin), judgement.targets] != 0]] == [6, 7]
    paid = [(text[span.start : span.end], span.value) for span in model.spans(reading, judgement.targets) if span.value]
    assert paid == [("  Ba", -0.5), ("d", -0.5)]
    assert model.spans(reading, judgement.targets)[-1].end == len(text)
    tokenizer.__class__ = type("Slow", (PreTrainedTokenizerFast,), {"is_fast": False})
    with pytest.raises(OperantError, match="rewrites text"):
        model.read("", text)
    # whole completions have no places
    model.facts.kind = "regression"
    assert model.read("", text) is not None


# --- labels ----------------------------------------------------------------------------------------------------------


def test_labels_of_two_columns_in_any_order(encoders: Callable[[str], Encoder]) -> None:
    model = RewardModel(encoders("bert"), RewardFacts("comparison"))
    config = RewardModelConfig(chosen_field="a", rejected_field="b", label_field="label")
    rows = [{"a": "red", "b": "blue", "label": label} for label in (1, 2, 0, "2")] + [{"a": "x", "b": "x", "label": 1}]
    judgements, notes = read_judgements(rows, config, model, "training")
    assert [[r.text for r in j.readings] for j in judgements] == [["red", "blue"], ["blue", "red"], ["blue", "red"]]
    assert notes == ["2 training rows are ties and were left out"]
    table = baselines(judgements, "comparison", judgements)
    assert table["majority"]["accuracy"] == pytest.approx(2 / 3)  # "b" holds the better one more often
    assert table["length"]["accuracy"] == pytest.approx(2 / 3)  # and is longer


def test_chats_are_read_message_by_message(encoders: Callable[[str], Encoder]) -> None:
    model = RewardModel(encoders("bert"), RewardFacts("comparison"))
    chat = [{"role": "user", "content": "red"}, {"role": "user", "content": "cat"}]
    row = {"prompt": chat, "chosen": [{"role": "assistant", "content": "dog"}], "rejected": "sun"}
    plain = {"prompt": "red\ncat", "chosen": "dog", "rejected": "sun"}
    (a, b), _ = read_judgements([row, plain], RewardModelConfig(), model, "training")
    for x, y in zip(a.readings, b.readings, strict=True):
        assert x.tokens.tolist() == y.tokens.tolist() and x.begin == y.begin


def test_token_labels_from_spans_and_from_tokens(encoders: Callable[[str], Encoder]) -> None:
    model = RewardModel(encoders("bert"), RewardFacts("token"))
    config = RewardModelConfig(kind="token")
    spans = {"completion": "red cat", "tokens": None, "spans": [{"start": 4, "end": 7, "value": -3.0}]}
    tokens = {"completion": "red cat", "tokens": ["red", " cat", ""], "spans": [None, 1.0, 0.5]}
    (first, second), _ = read_judgements([spans, tokens], config, model, "training")
    (reading,) = first.readings
    ends = reading.text_ends
    inside = [0 if k == 0 else int(ends[k - 1]) for k in range(len(ends))]
    for j, total in ((first, -3.0), (second, 1.5)):
        assert np.nansum(j.targets) == pytest.approx(total)
    assert all((value != 0) == (end > 4 and begin < 7 and end > begin)
               for value, end, begin in zip(first.targets, ends, inside, strict=True))  # fmt: skip
    assert np.isnan(second.targets[0]) and not np.isnan(second.targets[-2])


def judged(texts: tuple[str, ...], target: float | None = None) -> Judgement:
    from operant.models.reward_model import Reading

    readings = tuple(Reading(np.zeros(1, np.int64), 0, text, np.array([len(text)])) for text in texts)
    return Judgement(readings, np.zeros(0) if target is None else np.array([target]))


def test_measures_by_hand() -> None:
    pairs = [judged(("long answer", "no"))] * 3 + [judged(("x", "longer"))]
    rewards = [np.array([1.0, 0.0]), np.array([0.0, 2.0]), np.array([1.0, 1.0]), np.array([3.0, 0.0])]
    found = measures(pairs, rewards, "comparison", pairs)
    assert found["accuracy"] == pytest.approx(2.5 / 4)
    sigma = [1 / (1 + math.exp(-m)) for m in (1.0, -2.0, 0.0, 3.0)]
    assert found["brier"] == pytest.approx(np.mean([(1 - p) ** 2 for p in sigma]))
    assert found["loss"] == pytest.approx(-np.mean(np.log(sigma)))
    assert baselines(pairs, "comparison", pairs) == {"length": {"accuracy": 0.75}, "majority": {"accuracy": 0.5}}
    rows = [judged(("a" * n,), 2.0 * n + 1) for n in (1, 2, 5)]
    table = baselines(rows, "regression", rows)
    assert table["length"]["correlation"] == pytest.approx(1.0) and table["length"]["rmse"] == pytest.approx(0.0)
    assert table["majority"]["correlation"] == 0.0
    assert table["majority"]["rmse"] == pytest.approx(np.std([3.0, 5.0, 11.0]))


def test_calibration_is_measured_on_the_other_half(
    encoders: Callable[[str], Encoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = RewardModel(encoders("bert"), RewardFacts("regression"))
    rng = np.random.default_rng(0)
    truth = rng.normal(size=40)
    raw = [np.array([10 * t + 5 + rng.normal()]) for t in truth]
    rows = [judged(("x",), t) for t in truth]
    monkeypatch.setattr("operant.stages.reward_model.predicted", lambda model, judgements: raw)
    table = measure_and_calibrate(model, rows, rows)
    assert table["reward model"]["rmse"] > 5 and table["calibrated"]["rmse"] < 0.3
    even, odd = range(0, 40, 2), range(1, 40, 2)
    want = np.zeros(40)
    for own, other in ((even, odd), (odd, even)):
        slope, offset = np.polyfit([raw[i][0] for i in other], truth[list(other)], 1)
        for i in own:
            want[i] = slope * raw[i][0] + offset
    assert table["calibrated"]["rmse"] == pytest.approx(float(np.sqrt(np.mean((want - truth) ** 2))))
    assert (model.facts.scale, model.facts.offset) == pytest.approx(tuple(np.polyfit([r[0] for r in raw], truth, 1)))


# --- through the program ---------------------------------------------------------------------------------------------

SMALL = ("--vocab_size", 300, "--max_length", 48, "--lr", "3e-3", "--warmup_steps", 2, "--batch_size", 16, *QUIET_RUN)


@pytest.mark.parametrize(
    ("kind", "arch"),
    [("comparison", "bert"), ("regression", "llama"), pytest.param("token", "bert", marks=pytest.mark.draws("whole"))],
)
def test_training_learns_beats_the_baselines_and_resumes_exactly(
    kind: str, arch: str, program: Program, tmp_path: Path
) -> None:
    make = {"comparison": preferences, "regression": scored, "token": spanned}[kind]
    data = write_rows(tmp_path / "rows.jsonl", make(60))
    options = ("--kind", kind, "--arch", arch, "--data", data, "--eval_every", 10, "--patience", 0, *SMALL)
    whole, half = tmp_path / "whole", tmp_path / "half"
    told = program("reward-model", *options, "--steps", 20, "--out", whole)
    assert told.status == 0, told
    assert "length" in told.out and "majority" in told.out and f"model({whole}/model)" in told.out
    facts = json.loads((whole / "model" / "reward_model.json").read_text())
    measured = json.loads((whole / "results.json").read_text())
    assert facts["measured"] == measured and facts["kind"] == kind
    main = "accuracy" if kind == "comparison" else "correlation"
    assert measured["reward model"][main] > 0.9 > 0.75 > measured["length"][main]
    assert "</html>" in (whole / "report.html").read_text() and "majority" in (whole / "report.html").read_text()
    assert [row for row in read_rows(whole / "metrics.jsonl") if f"eval/{main}" in row]
    assert program("reward-model", *options, "--steps", 10, "--out", half).status == 0
    assert program("reward-model", *options, "--steps", 20, "--out", half, "--resume").status == 0
    first, second = (RewardModel.load(run / "model", device="cpu") for run in (whole, half))
    for a, b in ((first.model, second.model), (first.head, second.head)):
        assert all(torch.equal(tensor, b.state_dict()[name]) for name, tensor in a.state_dict().items())
    assert first.facts == second.facts


@pytest.mark.parametrize("family", ["bert", "sentences", "gpt2", "t5"])
def test_an_adapter_learns_to_judge_and_is_saved_alone(
    family: str, encoders: Callable[[str], Encoder], program: Program, tmp_path: Path
) -> None:
    encoder = encoders("bert" if family == "sentences" else family)
    base = tmp_path / "base"
    encoder.save(base)
    if family == "sentences":  # as sentence-transformers saves one: without the head, and with shorter names
        (base / "model.safetensors").unlink()
        encoder.body.save_pretrained(base)
    rows = write_rows(tmp_path / "rows.jsonl", preferences(60))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    learn = ("reward-model", "--data", rows, "--model", base, "--lora_rank", 4, "--lora_dropout", 0.1, "--lr", 0.02,
             "--eval_every", 4, "--batch_size", 8, *QUIET_RUN)  # fmt: skip
    assert program(*learn, "--steps", 8, "--out", whole).status == 0
    assert program(*learn, "--steps", 4, "--out", parts).status == 0
    assert program(*learn, "--steps", 8, "--out", parts, "--resume").status == 0
    assert {f.name for f in whole.rglob("*.safetensors")} == {"adapter_model.safetensors", "reward_head.safetensors"}
    last = [run / "checkpoints" / "step-00000008" / "model" / "adapter_model.safetensors" for run in (whole, parts)]
    assert last[0].read_bytes() == last[1].read_bytes()
    results = json.loads((whole / "results.json").read_text())
    assert results["reward model"]["accuracy"] > 0.8
    learned = RewardModel.load(whole / "model", device="cpu")
    good, bad = learned.predict(learned.read_all([("red", "cat good"), ("red", "cat bad")]))
    assert good > bad
    program("merge", "--model", whole / "model", "--out", tmp_path / "merged")
    (tmp_path / "base").rename(tmp_path / "gone")
    with pytest.raises(OperantError, match=r"the base of .* is gone"):
        RewardModel.load(whole / "model", device="cpu")
    merged = RewardModel.load(tmp_path / "merged", device="cpu")
    assert np.allclose(merged.predict(merged.read_all([("red", "cat good")])), good, atol=1e-5)


def test_of_equally_right_checkpoints_the_surest_is_kept(program: Program, tmp_path: Path) -> None:
    """Every longer answer is better, which a model with random weights may well say by chance."""
    rows = [{"chosen": f"{word} good red", "rejected": word} for word in NOISE * 3]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    options = ("--data", data, "--dev_data", data, "--steps", 12, "--eval_every", 4, "--patience", 0)
    assert program("reward-model", *options, *SMALL, "--out", tmp_path / "run").status == 0
    looks = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "eval/accuracy" in row]
    right = [row for row in looks if row["eval/accuracy"] == max(r["eval/accuracy"] for r in looks)]
    assert len(right) > 1
    surest = min(right, key=lambda row: row["eval/loss"])
    assert json.loads((tmp_path / "run" / "run.json").read_text())["best_step"] == surest["step"] > right[0]["step"]


@pytest.mark.parametrize(
    ("rows", "options", "told"),
    [
        ([{"chosen": "a", "rejected": "b"}] * 4, ("--chosen_field", "chosn"), "did you mean 'chosen'? the columns are"),
        ([{"chosen": "a"}] * 4, (), "there is no column 'rejected'"),
        ([{"chosen": "a", "rejected": None}] * 4, (), "row 1 has nothing in the column 'rejected'"),
        ([{"chosen": "a", "rejected": "a"}] * 4, (), "no training row is left"),
        ([{"chosen": "a", "rejected": "b", "l": 3}] * 4, ("--label_field", "l"), "it must be 1 (first is better)"),
        ([{"completion": "a", "score": 1}] * 4, ("--kind", "regression"), "needs at least two different ones"),
        ([{"completion": "a", "score": math.nan}] * 4, ("--kind", "regression"), "row 1 has nothing in the column 'sc"),
        ([{"completion": "a", "score": "x"}] * 4, ("--kind", "regression"), "row 1 has 'x' in the column 'score'"),
        ([{"completion": "a", "score": None}] * 4, ("--kind", "regression"), "row 1 has nothing in the column 'score'"),
        ([{"prompt": "a", "completion": math.nan, "score": 1}] * 4, ("--kind", "regression"), "row 1 has nothing in"),
        ([{"completion": "a", "spans": []}] * 4, ("--kind", "token"), "every token label is 0"),
        ([{"completion": "a", "spans": [[0, 9, 1.0]]}] * 4, ("--kind", "token"), "covers [0, 9)"),
        ([{"completion": "a", "spans": [[0, 1, math.nan]]}] * 4, ("--kind", "token"), "is no span"),
        ([{"completion": "a", "spans": [1.0, 2.0], "tokens": ["a"]}] * 4, ("--kind", "token"), "give one to each"),
        ([{"completion": "a b", "spans": [0, -1.0], "tokens": ["a", "b"]}] * 4, ("--kind", "token"), "do not spell"),
        ([{"completion": "a b", "spans": [0], "tokens": 3}] * 4, ("--kind", "token"), "do not spell"),
        ([{"chosen": "a " * 99, "rejected": "b"}] * 4, (), "use --too_long skip"),
        ([{"chosen": "a " * 99, "rejected": "b"}] * 4, ("--too_long", "skip"), "4 training rows are too long"),
    ],
)  # fmt: skip
def test_bad_data_is_one_line_and_leaves_no_run(
    rows: list[dict[str, Any]], options: tuple[Any, ...], told: str, program: Program, tmp_path: Path
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", rows)
    line = program.fault(
        "reward-model", "--data", data, "--dev_data", data, "--out", tmp_path / "run", *SMALL, *options
    )
    assert told in line
    assert not (tmp_path / "run").exists()


def test_folders_that_are_no_reward_model(encoders: Callable[[str], Encoder], tmp_path: Path) -> None:
    with pytest.raises(OperantError, match="there is no reward model at"):
        RewardModel.load(tmp_path / "nowhere")
    encoders("bert").save(tmp_path / "plain")
    with pytest.raises(OperantError, match=r"holds no reward model .* train one with operant reward-model"):
        RewardModel.load(tmp_path / "plain")
    model = RewardModel(encoders("bert"), RewardFacts("comparison"))
    model.save(tmp_path / "run" / "model")
    with pytest.raises(OperantError, match=r"did you mean .*run/model"):
        RewardModel.load(tmp_path / "run")
    (tmp_path / "run" / "model" / "reward_head.safetensors").write_bytes(b"junk")
    with pytest.raises(OperantError, match=r"no usable reward_head\.safetensors"):
        RewardModel.load(tmp_path / "run" / "model", device="cpu")
    (tmp_path / "run" / "model" / "reward_model.json").write_text('{"kind": "vibes"}')
    with pytest.raises(OperantError, match="cannot be read"):
        RewardModel.load(tmp_path / "run" / "model")
