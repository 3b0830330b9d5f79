"""`operant score`: rewards of completions that are already in a file."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import sacrebleu
from program import Program, write_rows

AWKWARD = [
    {"prompt": "a", "completion": "the cat sat on the mat", "references": ["the cat sat on a mat"]},
    {"prompt": "b", "completion": "猫坐在垫子上。", "references": ["猫坐在垫子上面。", "一只猫坐着。"]},
    {"prompt": "c", "completion": "naïve 😀 café ", "references": ["naïve 😀 cafés"]},
    {"prompt": "d", "completion": "", "references": ["something"]},
    {"prompt": "e", "completion": "wholly different", "references": ["xyz"]},
]


@pytest.fixture
def program(capsys: pytest.CaptureFixture[str]) -> Program:
    return Program(capsys)


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "answers.jsonl", AWKWARD)


def scored(program: Program, *arguments: object) -> list[dict[str, Any]]:
    outcome = program("score", "--json", *arguments)
    assert outcome.status == 0, outcome
    return [json.loads(line) for line in outcome.out.splitlines()]


def test_rewards_are_sacrebleus(program: Program, answers: Path) -> None:
    rows = scored(program, "--reward", "chrf", "--data", answers)
    assert [row["completion"] for row in rows] == [row["completion"] for row in AWKWARD]
    for row, given in zip(rows, AWKWARD, strict=True):
        wanted = sacrebleu.sentence_chrf(str(given["completion"]), list(given["references"])).score / 100
        assert row["reward"] == pytest.approx(wanted, abs=1e-9)
        assert "rewards" not in row


@pytest.mark.parametrize("potential", ["prefix", "matched"])
@pytest.mark.parametrize("reward", ["chrf", "bleu", "rougeL", "chrf++", "bleu(tokenize=zh)"])
def test_dense_rewards_sum_to_the_reward_less_that_of_nothing(
    reward: str, potential: str, program: Program, answers: Path, tmp_path: Path
) -> None:
    rows = scored(program, "--reward", reward, "--dense", "--potential", potential, "--data", answers)
    nothing = write_rows(tmp_path / "nothing.jsonl", [{**row, "completion": ""} for row in AWKWARD])
    empty = [row["reward"] for row in scored(program, "--reward", reward, "--data", nothing)]
    plain = [row["reward"] for row in scored(program, "--reward", reward, "--data", answers)]
    for row, none, whole in zip(rows, empty, plain, strict=True):
        assert row["reward"] == pytest.approx(whole, abs=1e-9)
        assert math.fsum(row["rewards"]) == pytest.approx(row["reward"] - none, abs=1e-9)
        assert "".join(row["tokens"]) == row["completion"]
        assert len(row["tokens"]) == len(row["rewards"])
    assert len(rows[1]["tokens"]) == 7  # Chinese goes by character
    assert any(len({round(r, 6) for r in row["rewards"]}) > 1 for row in rows)  # really spread over the tokens


def test_tokens_of_a_tokenizer_and_of_the_row(program: Program, answers: Path, codec: Any, tmp_path: Path) -> None:
    codec.save(tmp_path / "tokenizer")
    rows = scored(program, "--reward", "chrf", "--dense", "--tokenizer", tmp_path / "tokenizer", "--data", answers)
    assert len(rows[2]["tokens"]) == len(codec.encode(AWKWARD[2]["completion"]))
    own = write_rows(tmp_path / "own.jsonl", [{**AWKWARD[0], "tokens": ["the cat", " sat on the mat"]}])
    assert scored(program, "--reward", "chrf", "--dense", "--data", own)[0]["tokens"] == ["the cat", " sat on the mat"]
    wrong = write_rows(tmp_path / "wrong.jsonl", [{**AWKWARD[0], "tokens": ["a dog"]}])
    assert "do not spell" in program.fault("score", "--reward", "chrf", "--data", wrong, "--json")


def test_a_number_is_read_as_a_text_and_other_references_are_refused_by_row(program: Program, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "x.jsonl", [{"completion": "5", "reference": 5}])
    assert scored(program, "--reward", "exact", "--data", data)[0]["reward"] == 1.0
    data = write_rows(tmp_path / "x.jsonl", [{"completion": "5", "references": {"a": 5}}])
    assert "row 1 has a dict in the column 'references'" in program.fault("score", "--json", "--data", data)


def test_a_missing_cell_is_refused_by_row_and_pays_nothing(program: Program, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"completion": "nan", "reference": "nan"}\n{"completion": "nan", "reference": NaN}\n')
    assert "references and 1 of 2 prompts have none" in program.fault("score", "--reward", "exact", "--data", file)
    file.write_text('{"completion": "nan", "reference": "nan"}\n{"completion": NaN, "reference": "nan"}\n')
    assert "row 2: the completion is missing" in program.fault("score", "--reward", "exact", "--data", file)
    file.write_text('{"prompt": NaN, "id": NaN, "completion": "nan", "reference": "nan"}\n')
    row = json.loads(program("score", "--reward", "exact", "--data", file, "--json").out)
    assert row["reward"] == 1.0 and row["id"] == "0"


def test_parts_fields_and_the_table(program: Program, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "x.jsonl", [{"q": "a", "answer": "one two", "gold": "one two", "idx": 7}])
    options = ("--data", data, "--completion_field", "answer", "--reference_field", "gold", "--prompt_field", "q")
    row = scored(program, "--reward", "exact + 0.5*repetition", *options)[0]
    assert row["id"] == "7" and row["parts"]["exact"] == 1.0 and set(row["parts"]) == {"exact", "repetition"}
    assert row["reward"] == pytest.approx(1.0 + 0.5 * row["parts"]["repetition"])
    table = program("score", "--reward", "exact", *options)
    assert table.status == 0 and "1.0000  one two" in table.out


def test_the_mean_and_what_is_missing_from_it(module: str, program: Program, answers: Path, tmp_path: Path) -> None:
    rows = [{"completion": text, "reference": "good"} for text in ("good", "bad", "none")]
    data = write_rows(tmp_path / "x.jsonl", rows)
    table = program("score", "--reward", f"{module}:graded", "--data", data)
    assert table.out.splitlines()[-1].split() == "0.5000 mean of 2 rows, 1 missing".split() and table.err == []
    told = program("score", "--reward", f"{module}:graded", "--data", data, "--json")
    assert len(told.out.splitlines()) == 3 and told.err[-1].split() == "0.5000 mean of 2 rows, 1 missing".split()
    nothing = program("score", "--reward", f"{module}:nothing", "--data", answers)
    assert nothing.out.splitlines()[-1].strip() == f"no mean: all {len(AWKWARD)} rows are missing"


def test_score_takes_the_test_split_and_says_so(program: Program, tmp_path: Path) -> None:
    for name, count in (("train", 3), ("dev", 2), ("test", 1)):
        write_rows(tmp_path / f"{name}.jsonl", [{"completion": "good", "reference": "good"}] * count)
    told = program("score", "--reward", "exact", "--data", tmp_path)
    assert told.err == [f"score: 1 rows of the test split of {tmp_path}"]
    assert told.out.splitlines()[-1].split() == "1.0000 mean of 1 rows, 0 missing".split()


MODULE = """
def graded(prompt, completion): return {"good": 1.0, "bad": 0.0}.get(completion.text)
import math
def half(prompt, completion): return 0.5
def nan(prompt, completion): return math.nan
def short(prompt, completion): return [1.0] * (len(completion.tokens) + 1)
def raises(prompt, completion): raise ValueError("two\\nlines")
def nothing(prompt, completion): return None
def asked(prompt, completion): return float((prompt.text, len(prompt.messages)) == ("you", 2))
def word(prompt, completion): return "good"
number = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"mine_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def test_a_chat_reaches_the_reward_as_a_chat(module: str, program: Program, tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "yo"}, {"type": "text", "text": "u"}]
    chat = [{"role": "system", "content": "be kind"}, {"role": "user", "content": parts}]
    data = write_rows(tmp_path / "chats.jsonl", [{"prompt": chat, "completion": "hi"}])
    assert [row["reward"] for row in scored(program, "--reward", f"{module}:asked", "--data", data)] == [1.0]
    data = write_rows(tmp_path / "odd.jsonl", [{"prompt": {"a": 1}, "completion": "hi"}])
    assert "row 1 has a dict in the column 'prompt'" in program.fault("score", "--reward", "length", "--data", data)


def test_a_function_of_ones_own_and_its_missing_rewards(module: str, program: Program, answers: Path) -> None:
    assert {row["reward"] for row in scored(program, "--reward", f"{module}:half", "--data", answers)} == {0.5}
    for function, reason in [("nan", "nan"), ("short", "wrong_length"), ("raises", "two lines"), ("nothing", "none"),
                             ("word", "wrong_type")]:  # fmt: skip
        for row in scored(program, "--reward", f"{module}:{function}", "--data", answers):
            assert row["reward"] is None and reason in row["missing"]


def test_faults(module: str, program: Program, answers: Path, tmp_path: Path) -> None:
    def fault(*arguments: object) -> str:
        return program.fault("score", "--json", "--data", answers, *arguments)

    (tmp_path / "broken_on_import.py").write_text("raise RuntimeError('went\\nwrong')")
    assert "did you mean 'chrf'?" in fault("--reward", "chrff")
    assert "raised RuntimeError" in fault("--reward", "broken_on_import:f")
    assert "cannot be imported" in fault("--reward", "no_such_module:f")
    assert "did you mean 'half'?" in fault("--reward", f"{module}:halff")
    assert "must be a function" in fault("--reward", f"{module}:number")
    assert "not understood" in fault("--reward", "chrf +")
    assert "finite" in fault("--reward", "1e400*chrf")
    assert "did you mean --completion_field completion?" in fault("--completion_field", "completon")
    assert "no field 'q'" in fault("--prompt_field", "q")
    assert "--data is missing" in program.fault("score")
    bare = write_rows(tmp_path / "bare.jsonl", [{"completion": "a"}])
    assert "needs references" in program.fault("score", "--data", bare)
    numbers = write_rows(tmp_path / "numbers.jsonl", [{"completion": 3}])
    assert "not text" in program.fault("score", "--reward", "length(target=3)", "--data", numbers)
