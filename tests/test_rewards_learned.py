"""Reward models and semantic similarity as rewards: by name, in batches, as ensembles, against a slow computation."""

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
from program import QUIET_RUN, Program, pairs, read_rows, write_rows
from transformers import AutoTokenizer

from operant.data.text import Codec
from operant.models.encoder import Encoder, masked_tokenizer
from operant.models.policy import Policy
from operant.models.reward_model import RewardFacts, RewardModel
from operant.rewards import RewardRunner, reward_by_name
from operant.rewards.learned import Learned, Similarity, greedy_match, inverse_document_frequency
from operant.types import Completion, OperantError, Prompt

Folder = Callable[..., Path]


@pytest.fixture(scope="module")
def masked_codec() -> Codec:
    return masked_tokenizer(TEXTS * 3, 300)


@pytest.fixture
def folder(masked_codec: Codec, tmp_path: Path) -> Folder:
    def make(kind: str, seed: int = 0, **facts: Any) -> Path:
        encoder = Encoder.new("bert", "tiny", masked_codec, max_length=32, seed=seed, device="cpu")
        path = tmp_path / f"{kind}-{seed}"
        RewardModel(encoder, RewardFacts(kind, **facts), seed=seed).save(path)
        return path

    return make


@pytest.fixture
def program(capsys: pytest.CaptureFixture[str]) -> Program:
    return Program(capsys)


def completion(codec: Codec, text: str) -> Completion:
    tokens = codec.encode(text, eos=True)
    whole, ends = codec.text_and_ends(tokens)
    return Completion("c", "p", whole, tokens, ends)


def asked(text: str = "the cat", *references: str) -> Prompt:
    return Prompt("p", np.zeros(1, np.int64), text=text, references=references)


def test_a_reward_model_is_a_reward_by_name(folder: Folder, codec: Codec) -> None:
    path = folder("comparison", mean=0.5, std=2.0)
    model = RewardModel.load(path, device="cpu")
    rows = [(asked(), completion(codec, text)) for text in ("a dog", "你好", "red")]
    readings = [r for r in model.read_all([(p.text, c.text) for p, c in rows]) if r is not None]
    want = np.concatenate(model.predict(readings))
    for spec in (f"model({path}, device=cpu)", f'learned(path="{path}", device="cpu")', f"2*model(path={path}) "):
        with RewardRunner(reward_by_name(spec)) as runner:
            found = [float(t.rewards.sum()) for t in runner.run(rows)]
        np.testing.assert_allclose(found, want * (2 if spec.startswith("2") else 1), rtol=1e-5)
    reward = Learned(path=str(path), device="cpu")
    reward([p for p, _ in rows], [c for _, c in rows])
    assert reward.spent["calls"] == 1 and reward.spent["completions"] == 3 and reward.spent["seconds"] > 0


def test_a_chat_is_read_message_by_message(folder: Folder, codec: Codec) -> None:
    reward = Learned(path=str(folder("regression")), device="cpu")
    messages = ({"role": "system", "content": "a"}, {"role": "user", "content": "b"})
    chat = Prompt("p", np.zeros(1, np.int64), text="b", messages=messages)
    answer = completion(codec, "red")
    assert reward([chat], [answer]) == pytest.approx(reward([asked("a\nb")], [answer]))
    assert reward([chat], [answer]) != pytest.approx(reward([asked("b")], [answer]))


def test_an_ensemble_trusts_less_what_its_members_do_not_agree_on(folder: Folder, codec: Codec) -> None:
    paths = [folder("comparison", seed) for seed in (1, 2, 3)]
    rows = [asked()] * 2, [completion(codec, text) for text in ("a dog", "red")]
    members = np.array([Learned(path=str(path), device="cpu")(*rows) for path in paths])
    joined = ", ".join(map(str, paths))
    together = reward_by_name(f"model({joined}, k=0.5, device=cpu)")(*rows)
    np.testing.assert_allclose(together, members.mean(0) - 0.5 * members.std(0), rtol=1e-6)
    dense = [folder("token", seed) for seed in (4, 5)]
    ones = [Learned(path=str(path), device="cpu") for path in dense]
    answer = completion(codec, "a dog ran")
    both = Learned(path=",".join(map(str, dense)), device="cpu")
    with RewardRunner(both) as runner:
        (trajectory,) = runner.run([(asked(), answer)])
    single = [sum(span.value for span in one([asked()], [answer])[0]) for one in ones]
    assert float(trajectory.rewards.sum()) == pytest.approx(np.mean(single), rel=1e-5)
    with pytest.raises(OperantError, match="take models of one kind"):
        Learned(path=f"{paths[0]},{dense[0]}")


def test_a_token_model_pays_the_policy_s_own_tokens(folder: Folder, codec: Codec) -> None:
    """The policy's tokenizer is another one than the reward model's."""
    path = folder("token")
    model = RewardModel.load(path, device="cpu")
    answer = completion(codec, "the cat 😀 sat")
    reading = model.read("the cat", answer.text)
    assert reading is not None and len(reading.text_ends) != len(answer.tokens)
    (values,) = model.predict([reading])
    reward = reward_by_name(f"model({path}, device=cpu)")
    assert reward.dense
    with RewardRunner(reward) as runner:
        (trajectory, empty) = runner.run([(asked(), answer), (asked(), completion(codec, ""))])
    assert float(trajectory.rewards.sum()) == pytest.approx(values.sum(), rel=1e-5)
    assert np.count_nonzero(trajectory.rewards) > 3
    assert empty.missing is None and np.count_nonzero(empty.rewards) == 1


def test_a_completion_that_does_not_fit_has_no_reward(folder: Folder, codec: Codec) -> None:
    reward = Learned(path=str(folder("comparison")), device="cpu")
    with RewardRunner(reward) as runner:
        short, long = runner.run([(asked(), completion(codec, "red")), (asked(), completion(codec, "a dog " * 40))])
        assert short.missing is None and long.missing is not None and not long.observed.any()
        assert runner.counts == {"too_long": 1} and "holds (32)" in runner.explain()


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("model(/nowhere/model)", "there is no reward model at /nowhere/model"),
        ("model", "needs a folder"),
        ("model(a/b, c=1)", "has no option 'c'"),
        ("similarity", "needs a folder"),
        ("similarity(/nowhere/model)", "there is no model at /nowhere/model"),
        ("similarity(gpt, by=best)", "use f1, precision or recall"),
        ("bleu(a/b)", "without a name"),
    ],
)
def test_wrong_specifications_are_one_line(spec: str, told: str) -> None:
    with pytest.raises(OperantError) as fault:
        reward_by_name(spec)
    assert told in str(fault.value) and "\n" not in str(fault.value)


def test_only_a_token_model_is_dense(folder: Folder) -> None:
    with pytest.raises(OperantError, match="pays whole completions"):
        reward_by_name(f"model({folder('comparison')}, dense=True)")


def test_quoted_text_in_a_reward_is_left_alone() -> None:
    reward = reward_by_name('format(pattern="(x/y) json:dumps")')
    assert reward.measure("(x/y) json:dumps", ()) in (0.0, 1.0) and "json:dumps" in reward.pattern


# --- similarity ------------------------------------------------------------------------------------------------------


def slow_match(candidate: np.ndarray, reference: np.ndarray, wc: list[float], wr: list[float]) -> tuple[float, ...]:
    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return sum(float(x) * float(y) for x, y in zip(a, b, strict=True)) / math.sqrt(
            sum(float(x) ** 2 for x in a) * sum(float(y) ** 2 for y in b)
        )

    recall = sum(w * max(cosine(r, c) for c in candidate) for r, w in zip(reference, wr, strict=True)) / sum(wr)
    precision = sum(w * max(cosine(c, r) for r in reference) for c, w in zip(candidate, wc, strict=True)) / sum(wc)
    return precision, recall, 2 * precision * recall / (precision + recall)


def test_matching_against_a_slow_computation() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(4, 6)) + 0.5, rng.normal(size=(7, 6)) + 0.5
    ta, tb = np.array([1, 2, 3, 9]), np.array([1, 1, 2, 5, 6, 7, 9])
    assert greedy_match(ta, a, tb, b) == pytest.approx(slow_match(a, b, [1.0] * 4, [1.0] * 7))
    idf = inverse_document_frequency([[1, 1, 2], [1, 5], [3, 6, 7]])
    assert idf[1] == pytest.approx(-math.log(3 / 4)) and idf[-1] == pytest.approx(math.log(4))  # two of three hold 1
    weigh = [[idf.get(t, idf[-1]) for t in row] for row in (ta.tolist(), tb.tolist())]
    assert greedy_match(ta, a, tb, b, idf) == pytest.approx(slow_match(a, b, *weigh))
    assert greedy_match(ta[:0], a[:0], tb, b) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_similarity_reads_the_encoder_alone(
    family: str, make_policy: Callable[..., Policy], masked_codec: Codec, codec: Codec, tmp_path: Path
) -> None:
    if family == "bert":
        Encoder.new("bert", "tiny", masked_codec, max_length=32, device="cpu").save(tmp_path / "m")
    else:
        make_policy(family).save(tmp_path / "m")
    encoder = Encoder.load(tmp_path / "m", device="cpu")

    def vectors(text: str) -> np.ndarray:
        tokens = encoder.framed(encoder.codec.encode(text))
        with torch.no_grad():
            hidden = encoder.model.base_model(input_ids=torch.from_numpy(tokens)[None]).last_hidden_state[0]
        return hidden[len(encoder.first) : len(tokens) - 1].numpy()

    prompts = [asked("x", "a dog ran", "the cat sat"), asked("x", "red house")]
    answers = [completion(codec, text) for text in ("the cat ran", "red house")]
    wanted = []
    for prompt, answer in zip(prompts, answers, strict=True):
        rows = [(vectors(answer.text), vectors(r)) for r in prompt.references]
        wanted.append(max(slow_match(a, b, [1.0] * len(a), [1.0] * len(b))[2] for a, b in rows))
    found = reward_by_name(f"similarity({tmp_path}/m, device=cpu)")(prompts, answers)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert found[1] == pytest.approx(1.0)
    texts = write_rows(tmp_path / "idf.jsonl", [{"text": t} for t in TEXTS])
    weighted = Similarity(path=str(tmp_path / "m"), device="cpu", idf=str(texts), by="recall")
    assert weighted(prompts, answers)[1] == pytest.approx(1.0)
    assert weighted(prompts, answers)[0] != pytest.approx(found[0])
    long = reward_by_name(f"similarity({tmp_path}/m, device=cpu)")
    with RewardRunner(long) as runner:
        runner.run([(asked("x", "red " * 60), answers[0]), (prompts[0], answers[0])])
    assert runner.counts == {"too_long": 1}
    with pytest.raises(OperantError, match="has none; add them"):
        weighted([asked()], answers[:1])


def test_a_policy_learns_from_a_reward_model_through_the_program(
    folder: Folder, make_policy: Callable[..., Policy], program: Program, tmp_path: Path
) -> None:
    make_policy("gpt2").save(tmp_path / "policy")
    data = write_rows(tmp_path / "prompts.jsonl", [{"prompt": row["prompt"]} for row in pairs(12)])
    for kind in ("comparison", "token"):
        path = folder(kind)
        told = program(
            "train", "--model", tmp_path / "policy", "--data", data, "--reward", f"model({path}, device=cpu)",
            "--steps", 2, "--prompts_per_step", 3, "--group_size", 2, "--max_tokens", 6, "--eval_prompts", 2,
            "--eval_every", 1, "--out", tmp_path / f"run-{kind}", *QUIET_RUN,
        )  # fmt: skip
        assert told.status == 0, told
        rows = read_rows(tmp_path / f"run-{kind}" / "metrics.jsonl")
        assert any("train/reward_mean" in row for row in rows)
        assert any(row.get("train/reward_spent/model/completions", 0) > 5 for row in rows)
    dense = program(
        "score", "--reward", f"model({folder('token')}, device=cpu)", "--dense", "--json", "--data",
        write_rows(tmp_path / "answers.jsonl", [{"prompt": "red", "completion": "cat dog"}]),
    )  # fmt: skip
    row = json.loads(dense.out)
    assert len(row["rewards"]) == 2 and sum(row["rewards"]) == pytest.approx(row["reward"])
    assert "pays whole completions" in program.fault(
        "score", "--reward", f"model({folder('comparison')})", "--dense", "--data", tmp_path / "answers.jsonl"
    )
    scored = program(
        "score", "--reward", f"model({path}, device=cpu)", "--data",
        write_rows(tmp_path / "answers.jsonl", [{"prompt": "red", "completion": "cat dog"}]), "--json",
    )  # fmt: skip
    assert scored.status == 0 and '"reward": ' in scored.out


# --- ordinary classifiers --------------------------------------------------------------------------------------------


def classifier(folder: Path, codec: Codec, family: str, labels: int) -> Any:
    import transformers as hf

    torch.manual_seed(5)
    sizes = {"vocab_size": codec.vocab_size, "num_labels": labels, "pad_token_id": codec.pad_id}
    if family == "bert":
        config: Any = hf.BertConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, initializer_range=0.5,
            max_position_embeddings=40, **sizes,
        )  # fmt: skip
        model: Any = hf.BertForSequenceClassification(config)
    else:
        config = hf.LlamaConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, intermediate_size=16,
            initializer_range=0.5, max_position_embeddings=80, **sizes,
        )  # fmt: skip
        model = hf.LlamaForSequenceClassification(config)
    model.eval().save_pretrained(folder)
    codec.save(folder)
    if family == "bert":  # saving leaves out which inputs its model takes
        file = folder / "tokenizer_config.json"
        names = {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}
        file.write_text(json.dumps(json.loads(file.read_text()) | names))
    return model


def pair_codec() -> Codec:
    codec = masked_tokenizer(TEXTS * 3, 300)
    codec.tokenizer.add_special_tokens({"sep_token": "<|eos|>", "cls_token": "<|bos|>"})
    from tokenizers.processors import TemplateProcessing

    codec.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A <|eos|>", pair="<|bos|> $A <|eos|> $B:1 <|eos|>:1",
        special_tokens=[("<|bos|>", codec.bos_id), ("<|eos|>", codec.eos_id)],
    )  # fmt: skip
    return Codec(codec.tokenizer)


def test_a_classifier_of_one_label_pays_its_logit_of_the_pair(codec: Codec, tmp_path: Path) -> None:
    model = classifier(tmp_path / "rm", pair_codec(), "bert", 1)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "rm")
    assert "token_type_ids" in tokenizer("a", "b")
    rows = [asked()] * 3 + [asked("")], [completion(codec, text) for text in ("a dog", "a dog ran to the", "", "red")]
    reward = reward_by_name(f"model({tmp_path / 'rm'}, device=cpu, max_tokens=20)")
    found = reward(*rows)
    for prompt, answer, value in zip(*rows, found, strict=True):
        texts = (prompt.text, answer.text) if prompt.text else (answer.text,)
        with torch.no_grad():
            want = model(**tokenizer(*texts, return_tensors="pt")).logits[0, 0]
        assert value == pytest.approx(float(want), abs=1e-5)
    assert len({round(value, 4) for value in found}) == 4
    with RewardRunner(reward) as runner:
        (long,) = runner.run([(asked(), completion(codec, "a dog ran " * 30))])
    assert long.missing is not None and long.missing.startswith("too_long")


def test_a_classifier_of_several_labels_pays_the_log_odds_of_the_named_one(codec: Codec, tmp_path: Path) -> None:
    model = classifier(tmp_path / "rm", pair_codec(), "bert", 3)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "rm")
    answer = completion(codec, "a dog")
    with torch.no_grad():
        shares = model(**tokenizer("the cat", "a dog", return_tensors="pt")).logits.double().softmax(-1)[0]
    for label in ("LABEL_1", "1"):
        (value,) = reward_by_name(f'model({tmp_path / "rm"}, label="{label}", device=cpu)')([asked()], [answer])
        assert value == pytest.approx(float((shares[1] / (1 - shares[1])).log()), abs=1e-4)
    for option, told in (("", "several labels"), (", label=good", "no label 'good'")):
        with pytest.raises(OperantError, match=f"{told}.*LABEL_0, LABEL_1, LABEL_2"):
            reward_by_name(f"model({tmp_path / 'rm'}{option})")


def test_a_classifier_with_a_template_reads_the_answer_as_the_end_of_the_chat(codec: Codec, tmp_path: Path) -> None:
    own = Codec.train_bpe(TEXTS * 3, vocab_size=288)
    own.tokenizer.chat_template = (
        "{% for m in messages %}<|bos|>{{ m['role'] }}: {{ m['content'] }}<|eos|>{% endfor %}"
        "{% if add_generation_prompt %}<|bos|>{% endif %}"
    )
    model = classifier(tmp_path / "rm", own, "llama", 1)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "rm")
    chat = ({"role": "system", "content": "red"}, {"role": "user", "content": "the cat"})
    prompts = [asked(), Prompt("p", np.zeros(1, np.int64), text="the cat", messages=chat)]
    answers = [completion(codec, "a dog"), completion(codec, "a dog ran")]
    reward = reward_by_name(f"model({tmp_path / 'rm'}, device=cpu)")
    before = [[{"role": "user", "content": "the cat"}], list(chat)]
    for turns, answer, value in zip(before, answers, reward(prompts, answers), strict=True):
        whole = tokenizer.apply_chat_template(
            [*turns, {"role": "assistant", "content": answer.text}],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        with torch.no_grad():
            assert value == pytest.approx(float(model(input_ids=whole["input_ids"]).logits[0, 0]), abs=1e-5)
