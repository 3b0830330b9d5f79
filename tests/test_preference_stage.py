"""Learning from preferences: the gradient that is really applied, what is learned, and exact resume."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from program import QUIET_RUN, Program, read_rows, write_rows
from torch import Tensor

from operant.algorithms.objectives import preference_loss
from operant.config import PreferConfig
from operant.data.batch import microbatches
from operant.data.preferences import load_preferences, load_ratings, unpaired
from operant.models.policy import Policy
from operant.run import checkpoint
from operant.run.run import Run
from operant.stages.preference import Answers, loss_settings, prefer
from operant.types import OperantError

WORDS = "cat mat dog red house one two three four five".split()


def rows(count: int = 24) -> list[dict[str, str]]:
    """After any two words, `sat` is preferred to `ran`."""
    picked = [(WORDS[i % 10], WORDS[(i * 3 + i // 10) % 10]) for i in range(count)]
    return [{"prompt": f"the {a} {b}", "chosen": f"{a} sat", "rejected": f"{a} ran to"} for a, b in picked]


def settings(tmp_path: Path, **options: Any) -> PreferConfig:
    return PreferConfig(
        **{
            "out": str(tmp_path / "run"), "device": "cpu", "tensorboard": False, "steps": 30, "batch_size": 8,
            "lr": 0.01, "warmup_steps": 0, "eval_every": 10, "tokens_per_microbatch": 4096, "patience": 0,
            "eval_prompts": 0,
        }
        | options
    )  # fmt: skip


def sequence_logprobs(policy: Policy, example: Any, tokens: Sequence[int]) -> Tensor:
    """log π(y|x), float64, written with the model's own call and nothing of `batch` or `logprobs`."""
    prompt = example.prompt.tokens.tolist()
    model = policy.model
    if policy.family == "encoder-decoder":
        start = [model.config.decoder_start_token_id, *tokens[:-1]]
        logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([start])).logits[0]
    else:
        logits = model(input_ids=torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[torch.arange(len(tokens)), torch.tensor(tokens)].sum()


@pytest.mark.parametrize("family", ["gpt2", "t5"])
@pytest.mark.parametrize("algorithm", ["dpo", "ipo", "kto"])
def test_the_gradient_is_the_papers_however_the_batch_is_cut(
    family: str, algorithm: str, make_policy: Callable[..., Policy]
) -> None:
    policy = make_policy(family)
    policy.model.double()
    encoder = family == "t5"
    pairs = load_preferences(rows(5), policy.codec, encoder=encoder)
    config = PreferConfig(
        algorithm=algorithm, beta=0.3, desirable_weight=1.5 if algorithm == "kto" else 1.0, sft_coef=0.2,
        label_smoothing=0.1 if algorithm == "dpo" else 0.0,
    )  # fmt: skip
    answers = Answers.of(pairs if algorithm != "kto" else unpaired(pairs))
    examples = len(pairs) if answers.paired else 2 * len(pairs)
    answers.score(policy, range(len(answers.tokens)), 64)
    reference = copy.deepcopy(policy.model)
    with torch.no_grad():  # away from the reference, where every log-ratio is 0
        for parameter in policy.model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))

    def gradient(loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, list(policy.model.parameters()), allow_unused=True))

    # the paper's formula, pair by pair
    total = torch.zeros((), dtype=torch.float64)
    point, beta = 0.4, 0.3
    for pair in pairs:
        sides = []
        for tokens in (pair.chosen.tolist(), pair.rejected.tolist()):
            ours = sequence_logprobs(policy, pair, tokens)
            policy.model, kept = reference, policy.model
            theirs = sequence_logprobs(policy, pair, tokens).detach()
            policy.model = kept
            sides.append((ours, ours - theirs, len(tokens)))
        (likely, good, n_good), (_, bad, n_bad) = sides
        if algorithm == "dpo":
            total = total - 0.9 * torch.log(torch.sigmoid(beta * (good - bad)))
            total = total - 0.1 * torch.log(torch.sigmoid(beta * (bad - good)))
        elif algorithm == "ipo":
            total = total + (good / n_good - bad / n_bad - 1 / (2 * beta)) ** 2
        else:
            total = total + 1.5 * (1 - torch.sigmoid(beta * (good - point)))
            total = total + (1 - torch.sigmoid(beta * (point - bad)))
        total = total - 0.2 * likely / n_good
    expected = gradient(total / examples)

    whole = answers.batch(policy, range(len(answers.tokens)))
    for room in (10**6, 60, 1):
        pieces = list(microbatches(whole, room))
        assert (len(pieces) > 1) == (room < 10**6)
        summed: list[Tensor | None] = [None] * len(expected)
        for piece in pieces:
            token_loss, _ = preference_loss(
                policy.logprobs(piece).logprobs, piece, reference_point=point, **loss_settings(config)
            )
            for i, part in enumerate(gradient((token_loss * piece.weights).sum() / piece.denominator)):
                summed[i] = part if summed[i] is None else summed[i] + part
        for mine, theirs in zip(summed, expected, strict=True):
            assert (mine is None) == (theirs is None)
            if mine is not None:
                # the reference is kept in float32
                assert torch.allclose(mine, theirs, rtol=1e-4, atol=2e-6 * max(1.0, float(theirs.abs().max())))


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_the_reference_is_the_policy_as_it_was_found(family: str, make_policy: Callable[..., Policy]) -> None:
    policy = make_policy(family)
    answers = Answers.of(load_preferences(rows(6), policy.codec, encoder=family == "t5"))
    answers.score(policy, range(12), 50)
    batch = answers.batch(policy, range(12))
    assert torch.allclose(batch.ref_logprobs, policy.logprobs(batch).logprobs, atol=1e-5)
    token_loss, stats = preference_loss(policy.logprobs(batch).logprobs, batch, "dpo", beta=0.1)
    loss = float((token_loss * batch.weights).sum().detach() / batch.denominator)
    assert loss == pytest.approx(np.log(2), abs=1e-5)
    assert float(stats["count"]) == 6
    batch.ref_logprobs = policy.logprobs(batch).logprobs.detach()
    _, stats = preference_loss(policy.logprobs(batch).logprobs, batch, "dpo", beta=0.1)
    assert float(stats["accuracy"]) == 3.0 and float(stats["margin"]) == 0.0  # it prefers neither: a coin
    # one loss a pair, on the last token of the chosen completion
    places = token_loss.nonzero()
    assert places[:, 0].tolist() == [0, 2, 4, 6, 8, 10]
    assert bool((batch.tokens[places[:, 0], places[:, 1]] == policy.codec.eos_id).all())


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize("family", ["gpt2", "t5"])
@pytest.mark.parametrize("algorithm", ["dpo", "ipo", "kto"])
def test_a_tiny_policy_learns_a_preference(
    family: str, algorithm: str, make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    policy = make_policy(family)
    before = copy.deepcopy(policy)
    load = load_ratings if algorithm == "kto" else load_preferences
    made = load(rows(40), policy.codec, encoder=family == "t5")
    cut = 64 if algorithm == "kto" else 32
    config = settings(tmp_path, algorithm=algorithm, beta=0.2)
    result = prefer(config, policy=policy, examples=made[:cut], dev_examples=made[cut:], quiet=True)
    seen = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "eval/loss" in row]
    best = min(seen, key=lambda row: row["eval/loss"])
    assert best["eval/accuracy"] == 1.0 and best["eval/margin"] > 0.1
    assert seen[0]["eval/kl_ref"] == pytest.approx(0, abs=1e-5) and best["eval/kl_ref"] > 1e-4
    assert best["eval/loss"] == pytest.approx(result.dev_loss) and result.dev_loss < 0.9 * seen[0]["eval/loss"]
    # told apart from what the stage says of itself: held-out completions, before and after
    pairs = load_preferences(rows(40), policy.codec, encoder=family == "t5")[32:]

    def gaps(model: Policy) -> list[float]:
        with torch.no_grad():
            sides = [[float(sequence_logprobs(model, p, y.tolist())) for y in (p.chosen, p.rejected)] for p in pairs]
        return [chosen - rejected for chosen, rejected in sides]

    assert all(after > earlier + 0.3 for earlier, after in zip(gaps(before), gaps(result.policy), strict=True))


def learned(tmp_path: Path, make_policy: Callable[..., Policy], name: str, **options: Any) -> dict[str, Tensor]:
    policy = make_policy("gpt2")
    lora = options.pop("lora", 0)
    if lora:
        policy.add_lora(lora)
        if options.pop("trained", False):
            with torch.no_grad():
                for key, value in policy.model.named_parameters():
                    if "lora_B" in key:
                        value.normal_(0, 0.1, generator=torch.Generator().manual_seed(2))
    config = settings(tmp_path, steps=6, eval_every=2, save_every=1, eval_prompts=2, max_tokens=4, **options)
    config.out = str(tmp_path / name)
    load = load_ratings if config.algorithm == "kto" else load_preferences
    made = load(rows(16), policy.codec)
    prefer(config, policy=policy, examples=made[:12], dev_examples=made[12:], quiet=True)
    found = checkpoint.latest(tmp_path / name / "checkpoints")
    assert found is not None
    file = "adapter_model.safetensors" if lora else "model.safetensors"
    from safetensors.torch import load_file

    return load_file(found / "model" / file)


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize(
    "options",
    [{"algorithm": "dpo"}, {"algorithm": "ipo"}, {"algorithm": "kto"}, {"lora": 2}, {"lora": 2, "trained": True}],
)
def test_a_run_that_was_cut_goes_on_bit_for_bit(
    options: dict[str, Any], make_policy: Callable[..., Policy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = learned(tmp_path, make_policy, "whole", **options)
    real = Run.record

    def cut(self: Run, *arguments: Any, **named: Any) -> None:
        real(self, *arguments, **named)
        if self.step == 3:
            self.stop("cut")

    with monkeypatch.context() as patched:
        patched.setattr(Run, "record", cut)
        first = learned(tmp_path, make_policy, "cut", **options)
    assert any(not torch.equal(first[name], whole[name]) for name in whole)
    again = learned(tmp_path, make_policy, "cut", resume=True, **options)
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    losses = [
        [row["train/loss"] for row in read_rows(tmp_path / name / "metrics.jsonl") if "train/loss" in row]
        for name in ("whole", "cut")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    assert losses[0][0] != losses[0][-1]


@pytest.mark.usefixtures("no_report")
def test_an_adapter_that_was_trained_before_is_its_own_reference(
    make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    learned(tmp_path, make_policy, "run", lora=2, trained=True)
    seen = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "eval/loss" in row]
    assert seen[0]["eval/loss"] == pytest.approx(np.log(2), abs=1e-4)
    assert seen[0]["eval/kl_ref"] == pytest.approx(0, abs=1e-6) and seen[-1]["eval/kl_ref"] > 1e-5


@pytest.mark.usefixtures("no_report")
def test_a_policy_whose_texts_fall_apart_is_never_the_best(
    make_policy: Callable[..., Policy], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Held-out pairs are told apart better at every look, by a policy that repeats itself."""
    policy = make_policy("gpt2")
    before = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
    made = load_preferences(rows(40), policy.codec)
    config = settings(tmp_path, beta=0.2, eval_prompts=16, patience=2)
    result = prefer(config, policy=policy, examples=made[:32], dev_examples=made[32:], quiet="settings")
    told = capsys.readouterr().err
    seen = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "eval/loss" in row]
    losses, distinct = ([row[f"eval/{name}"] for row in seen] for name in ("loss", "distinct2"))
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.01
    assert all(later < 0.5 * distinct[0] for later in distinct[1:])
    assert result.stop_reason == "the dev loss of a sound policy has not improved for 2 measurements"
    assert json.loads((tmp_path / "run" / "run.json").read_text())["best_step"] == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in result.policy.model.state_dict().items())
    assert "signs of collapse: " in told and "completions repeat themselves" in told
    assert told.count("(no longer sound: not kept)") == 2 and told.count("(best)") == 1
    texts = read_rows(tmp_path / "run" / "samples.jsonl")
    assert {row["step"] for row in texts} == {0, 10, 20} and all(row["text"] for row in texts)


# --- KTO's reference point -------------------------------------------------------------------------------------------


def test_mismatched_completions_are_those_of_other_prompts_fixed_by_the_seed(
    make_policy: Callable[..., Policy],
) -> None:
    policy = make_policy("gpt2")
    made = load_ratings(rows(12) + [r | {"chosen": "a dog"} for r in rows(3)], policy.codec)  # shared prompts
    answers = Answers.of(made)
    once, again, other = (answers.mismatched(policy, seed) for seed in (1, 1, 2))
    owners: dict[bytes, set[bytes]] = {}
    for rating in made:
        owners.setdefault(rating.tokens.tobytes(), set()).add(rating.prompt.tokens.tobytes())
    for rating, tokens in zip(made, once.tokens, strict=True):
        assert owners[tokens.tobytes()] - {rating.prompt.tokens.tobytes()}
    assert all(np.array_equal(a, b) for a, b in zip(once.tokens, again.tokens, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(once.tokens, other.tokens, strict=True))


@pytest.mark.usefixtures("no_report")
def test_the_reference_point_is_of_the_whole_step_before_it(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    """Cutting the batch must not change it: the loss that is logged is the same for any size of micro-batch."""
    logged = []
    for room in (4096, 40):
        policy = make_policy("gpt2")
        made = load_ratings(rows(8), policy.codec)
        config = settings(
            tmp_path, algorithm="kto", steps=5, lr=0.02, tokens_per_microbatch=room, out=str(tmp_path / str(room))
        )
        prefer(config, policy=policy, examples=made, quiet=True)
        logged.append([r for r in read_rows(tmp_path / str(room) / "metrics.jsonl") if "train/loss" in r])
    for whole, cut in zip(*logged, strict=True):
        assert whole["train/loss"] == pytest.approx(cut["train/loss"], abs=1e-4)
        assert whole["train/reference_point"] == pytest.approx(cut["train/reference_point"], abs=1e-3)
    assert logged[0][0]["train/reference_point"] == pytest.approx(0, abs=1e-4)
    assert max(r["train/reference_point"] for r in logged[0]) > 0.01


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"algorithm": "dop"}, "did you mean 'dpo'"),
        ({"algorithm": "rloo"}, "does not learn from preferences"),
        ({"beta": 0.0}, "beta is 0.0"),
        ({"beta": float("nan")}, "beta is nan"),
        ({"algorithm": "ipo", "label_smoothing": 0.1}, "no label smoothing"),
        ({"desirable_weight": 2.0}, "--algorithm kto"),
        ({"data": "a.jsonl", "replay": "b.jsonl"}, "leave one of them out"),
    ],
)
def test_settings_without_a_use_are_refused(options: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(OperantError) as fault:
        prefer(settings(tmp_path, **options), quiet=True)
    assert told in str(fault.value) and "\n" not in str(fault.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_examples_that_the_model_cannot_read_are_refused(
    family: str, make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    policy = make_policy(family)
    made = load_preferences(rows(8), policy.codec, encoder=policy.family == "encoder-decoder")
    long = dataclasses.replace(made[0], rejected=np.full(60, 70))
    foreign = dataclasses.replace(made[0], chosen=np.array([policy.vocabulary]))
    for example, told in ((long, r"has \d+ tokens and the model's context 48"), (foreign, "holds the token 288")):
        for algorithm in ("dpo", "kto"):
            with pytest.raises(OperantError, match=told):
                prefer(settings(tmp_path, algorithm=algorithm), policy=policy, examples=[*made, example], quiet=True)


def test_ratings_where_pairs_are_needed(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    policy = make_policy("gpt2")
    with pytest.raises(OperantError, match="--algorithm kto"):
        prefer(settings(tmp_path), policy=policy, examples=load_ratings(rows(4), policy.codec), quiet=True)
    with pytest.raises(OperantError, match="no preferences"):
        prefer(settings(tmp_path), policy=policy, examples=[], quiet=True)
    one = [
        dataclasses.replace(r, prompt=made[0].prompt) for made in [load_ratings(rows(4), policy.codec)] for r in made
    ]
    with pytest.raises(OperantError, match="all rows have the same prompt"):
        prefer(settings(tmp_path, algorithm="kto"), policy=policy, examples=one, quiet=True)


# --- the program -----------------------------------------------------------------------------------------------------


@pytest.fixture
def program(capsys: pytest.CaptureFixture[str]) -> Program:
    return Program(capsys)


@pytest.fixture
def model(make_policy: Callable[..., Policy], tmp_path: Path) -> Path:
    make_policy("gpt2").save(tmp_path / "start")
    return tmp_path / "start"


@pytest.mark.draws
@pytest.mark.parametrize(("algorithm", "options"), [("dpo", ["--lora_rank", 2]), ("kto", [])])
def test_the_program_learns_and_reports(
    algorithm: str, options: list[Any], program: Program, model: Path, tmp_path: Path
) -> None:
    data = write_rows(tmp_path / "pairs.jsonl", rows())
    told = program(
        "prefer", "--model", model, "--data", data, "--algorithm", algorithm, "--steps", 3, "--batch_size", 4,
        "--eval_every", 1, "--out", tmp_path / "run", *options, *QUIET_RUN,
    )  # fmt: skip
    assert told.status == 0, told
    assert "accuracy" in told.out and "kl_ref" in told.out and str(tmp_path / "run" / "model") in told.out
    assert any("held out" in line for line in told.err)
    assert Policy.load(tmp_path / "run" / "model", device="cpu").is_lora == bool(options)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "share of right answers" in page and "Margin" in page and "KL" in page
    assert json.loads((tmp_path / "run" / "run.json").read_text())["steps"] == 3


@pytest.mark.parametrize(
    ("row", "options", "told"),
    [
        ({"prompt": "a", "completion": "b", "label": True}, [], "--algorithm kto"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, [], "the same text"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, ["--chosen_field", "chose"], "did you mean 'chosen'"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, ["--beta", 0], "beta is 0"),
        ({"prompt": "a", "chosen": "b " * 60, "rejected": "c"}, [], "--too_long"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, ["--algorithm", "kto"], "same prompt"),
    ],
)
def test_bad_data_is_one_line(
    row: dict[str, Any], options: list[Any], told: str, program: Program, model: Path, tmp_path: Path
) -> None:
    data = write_rows(tmp_path / "pairs.jsonl", [row, row])
    line = program.fault("prefer", "--model", model, "--data", data, "--out", tmp_path / "r", *options, *QUIET_RUN)
    assert told in line and not (tmp_path / "r").exists()


def test_what_is_missing_is_named(program: Program, model: Path, tmp_path: Path) -> None:
    assert "--model" in program.fault("prefer", "--data", "x.jsonl")
    assert "--replay" in program.fault("prefer", "--model", model)
    assert "no data" in program.fault(
        "prefer", "--model", model, "--data", tmp_path / "x.jsonl", "--out", tmp_path / "r"
    )
