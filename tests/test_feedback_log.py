"""The replay: events joined to completions, what supersedes what, lines that survive a crash, and draws by seed."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from program import QUIET_RUN, Program, read_rows

from operant.config import PreferConfig
from operant.data.feedback_log import FeedbackLog, draw_examples, draw_named, line_of
from operant.data.text import Codec
from operant.models.policy import Policy
from operant.stages.preference import prefer
from operant.types import Completion, Feedback, OperantError, Prompt, Sampling

TEXTS = {"c0": "sat on", "c1": "ran to", "c2": "sat", "c3": "the dog"}


def event(name: str, completion: str, kind: str, value: Any, source: str = "ann", time: float = 0.0) -> Feedback:
    return Feedback(name, completion, kind, value, source, f"key-{name}", time)  # type: ignore[arg-type]


def completion_of(codec: Codec, name: str, prompt: str, text: str, **more: Any) -> Completion:
    tokens = codec.encode(text, eos=True)
    logprobs = np.linspace(-3, -0.1, len(tokens)).astype(np.float32)
    return Completion(
        id=name, prompt_id=prompt, text=text, tokens=tokens, text_ends=np.arange(len(tokens)),
        behavior_logprobs=logprobs, tokenizer_hash=codec.hash, sampled=np.ones(len(tokens), np.bool_),
        sampling=Sampling(temperature=0.7, stop=("\n",), banned=(3,)), **more,
    )  # fmt: skip


def filled(codec: Codec, *events: Feedback) -> FeedbackLog:
    """Prompt p0 with completions c0, c1; p1 with c2, c3."""
    replay = FeedbackLog()
    for i in (0, 1):
        text = ("the cat", "a dog")[i]
        replay.add(Prompt(id=f"p{i}", tokens=codec.encode_prompt(text + "\n"), text=text, references=("x",)))
    for i, (name, text) in enumerate(TEXTS.items()):
        replay.add(completion_of(codec, name, f"p{i // 2}", text))
    replay.add(*events)
    return replay


def read(codec: Codec, replay: FeedbackLog) -> list[tuple[str, str, str]]:
    return [
        (pair.prompt.id, codec.decode(pair.chosen), codec.decode(pair.rejected)) for pair in replay.preferences(codec)
    ]


def test_an_edit_is_a_pair_and_so_is_a_comparison(codec: Codec) -> None:
    replay = filled(
        codec,
        event("e1", "c2", "edit", "sat on the mat", time=3),
        event("e2", "c0", "comparison", "c1", time=1),
        event("e3", "c0", "thumb", 1),
        event("e4", "c0", "comment", "nice"),
    )
    assert read(codec, replay) == [("p0", "sat on", "ran to"), ("p1", "sat on the mat", "sat")]
    pairs = replay.preferences(codec)
    assert [p.time for p in pairs] == [1, 3] and not replay.left_out
    assert pairs[1].rejected is replay.completions["c2"].tokens  # what was written is never tokenised again
    assert pairs[1].chosen[-1] == codec.eos_id


def test_thumbs_and_scores_are_ratings(codec: Codec) -> None:
    replay = filled(
        codec,
        event("e1", "c0", "thumb", 1, time=1),
        event("e2", "c1", "thumb", "down", time=2),
        event("e3", "c2", "score", 0.9, time=3),
        event("e4", "c3", "score", 0.1, time=4),
        event("e5", "c3", "score", 0.5, source="bob", time=5),
        event("e6", "c0", "edit", "sat on the mat", time=6),
    )
    ratings = replay.ratings(codec)
    assert [(codec.decode(r.tokens), r.desirable) for r in ratings] == [
        ("sat on", True), ("ran to", False), ("sat", True), ("the dog", False),
    ]  # fmt: skip
    assert replay.left_out == {"scores that are neither good nor bad": 1}
    assert [r.desirable for r in replay.ratings(codec, midpoint=0.05)][2:] == [True, True, True]


def test_later_opinions_of_the_same_person_supersede(codec: Codec) -> None:
    replay = filled(
        codec,
        event("e9", "c0", "thumb", 0, time=9),
        event("e1", "c0", "thumb", 1, time=1),
        event("e2", "c0", "score", 0.9, source="bob", time=2),
        event("e3", "c0", "comparison", "c1", time=3),
        event("e4", "c1", "comparison", "c0", time=4),
        event("e5", "c2", "edit", "sat on the mat", time=5),
        event("e6", "c2", "edit", "sat on the house", time=6),
    )
    assert [(r.time, r.desirable) for r in replay.ratings(codec)] == [(2, True), (9, False)]
    assert read(codec, replay) == [("p0", "ran to", "sat on"), ("p1", "sat on the house", "sat")]


@pytest.mark.parametrize(("value", "left"), [("e1", ["e2", "e3"]), (None, ["e3"])])
def test_a_retraction_takes_back(codec: Codec, value: str | None, left: list[str]) -> None:
    replay = filled(
        codec,
        event("e1", "c0", "thumb", 1, time=1),
        event("e2", "c0", "edit", "sat on the mat", time=2),
        event("e3", "c0", "thumb", 0, source="bob", time=3),
        event("e4", "c0", "retract", value, time=4),
    )
    assert [e.id for e in replay.standing()] == left
    replay.add(event("e5", "c0", "thumb", 1, time=5))
    assert [e.id for e in replay.standing()] == [*left, "e5"]


def test_what_cannot_be_used_is_counted(codec: Codec) -> None:
    replay = filled(
        codec,
        event("e1", "c0", "edit", "sat on"),
        event("e2", "c1", "edit", " "),
        event("e3", "gone", "edit", "x"),
        event("e4", "c0", "comparison", "c2"),
        event("e5", "c2", "comparison", "old"),
        event("e6", "mixed", "edit", "sat"),
    )
    replay.add(completion_of(codec, "old", "p1", "ran"), completion_of(codec, "mixed", "p1", "ran"))
    replay.completions["old"].tokenizer_hash = "another"
    replay.completions["mixed"].sampled[0] = False  # type: ignore[index]
    assert replay.preferences(codec) == []
    assert replay.left_out == Counter(
        {
            "edits that change nothing": 1, "edits that are empty": 1, "completions that are not there": 1,
            "comparisons across prompts": 1, "completions of another tokenizer": 1,
            "completions with tokens that the policy did not write": 1,
        }
    )  # fmt: skip


def same(left: Any, right: Any) -> bool:
    for field in dataclasses.fields(left):
        a, b = getattr(left, field.name), getattr(right, field.name)
        if isinstance(a, np.ndarray):
            if a.dtype != b.dtype or not np.array_equal(a, b):
                return False
        elif a != b or type(a) is not type(b):
            return False
    return True


def test_lines_give_back_every_record_exactly(codec: Codec) -> None:
    replay = filled(
        codec,
        event("e1", "c0", "edit", "你好\u2028\n", time=1.5),
        dataclasses.replace(event("e2", "c0", "span", -1.0), span=(0, 3)),
    )
    replay.add(Prompt(id="p2", tokens=np.array([3, 4]), messages=({"role": "user", "content": "hi"},), meta={"a": [1]}))
    lines = list(replay.lines())
    assert all(line.endswith("\n") and line.count("\n") == 1 for line in lines)
    again = FeedbackLog.from_lines(lines)
    for mine, theirs in (
        (replay.prompts, again.prompts), (replay.completions, again.completions), (replay.events, again.events),
    ):  # fmt: skip
        assert list(mine) == list(theirs) and all(same(mine[name], theirs[name]) for name in mine)
    assert list(again.lines()) == lines
    assert list(FeedbackLog.from_lines(lines * 2).lines()) == lines  # again changes nothing


def test_a_line_that_a_crash_cut_off_is_dropped_and_no_other(codec: Codec) -> None:
    lines = list(filled(codec, event("e1", "c0", "thumb", 1)).lines())
    cut = [*lines[:-1], lines[-1][:20]]
    assert list(FeedbackLog.from_lines(cut).lines()) == lines[:-1]
    for bad in ("{broken\n", '{"nothing": {}}\n', '{"prompt": {"id": 1}}\n', "[]\n", '{"prompt": 3}\n'):
        with pytest.raises(OperantError, match="line 2 of the feedback log") as fault:
            FeedbackLog.from_lines([lines[0], bad, *lines[1:]])
        assert "\n" not in str(fault.value)


def test_a_key_that_is_used_again_for_another_event_is_refused(codec: Codec) -> None:
    replay = filled(codec, event("e1", "c0", "thumb", 1))
    replay.add(dataclasses.replace(event("e1", "c0", "thumb", 1), id="e2", time=9.0))
    assert list(replay.events) == ["e1"]
    replay.add(dataclasses.replace(event("e1", "c0", "thumb", 0), id="e3", source="bob"))
    with pytest.raises(OperantError, match="idempotency key"):
        replay.add(event("e1", "c0", "thumb", 0))


def test_what_json_cannot_hold_is_refused() -> None:
    with pytest.raises(OperantError, match="inputs"):
        line_of(Prompt(id="p", tokens=np.array([1]), inputs=object()))
    with pytest.raises(OperantError, match="cannot be written as JSON"):
        line_of(Prompt(id="p", tokens=np.array([1]), meta={"a": object()}))


# --- draws -----------------------------------------------------------------------------------------------------------


def test_draws_depend_on_seed_and_step_alone() -> None:
    times = [float(i) for i in range(50)]
    for half_life in (0.0, 5.0):
        first = draw_examples(times, 8, seed=1, step=3, half_life=half_life)
        assert first == draw_examples(times, 8, seed=1, step=3, half_life=half_life)
        assert len(set(first)) == 8 and set(first) <= set(range(50))
        assert first != draw_examples(times, 8, seed=1, step=4, half_life=half_life)
        assert first != draw_examples(times, 8, seed=2, step=3, half_life=half_life)
        assert sorted(draw_examples(times, 99, seed=1, step=0, half_life=half_life)) == list(range(50))


@pytest.mark.parametrize(("half_life", "newer"), [(0.0, 0.5), (10.0, 2 / 3), (5.0, 4 / 5), (1e-3, 1.0)])
def test_recent_events_are_drawn_as_much_more_often_as_the_half_life_says(half_life: float, newer: float) -> None:
    picks = [draw_examples([1e9, 1e9 + 10.0], 1, seed=0, step=step, half_life=half_life)[0] for step in range(4000)]
    assert np.mean(picks) == pytest.approx(newer, abs=0.03)


def test_an_empty_replay_is_refused() -> None:
    with pytest.raises(OperantError, match="no feedback to draw from"):
        draw_examples([], 4, seed=0, step=0)


def test_a_named_draw_comes_in_the_same_order_whoever_else_is_there() -> None:
    names, times = [f"e{i}" for i in range(40)], [1e9 + 3600.0 * (i % 7) for i in range(40)]
    mine = [i for i in range(40) if i % 3]
    for half_life in (0.0, 7200.0):
        for seed in range(50):
            every = [i for i in draw_named(names, times, 40, seed=seed, half_life=half_life) if i % 3]
            alone = draw_named(
                [names[i] for i in mine], [times[i] for i in mine], 40, seed=seed, half_life=half_life
            )  # fmt: skip
            assert every == [mine[i] for i in alone]
            few = draw_named([names[i] for i in mine], [times[i] for i in mine], 5, seed=seed, half_life=half_life)
            assert few == alone[:5]
    assert len({draw_named(names, times, 1, seed=seed)[0] for seed in range(500)}) == 40
    assert draw_named([], [], 3, seed=0) == []


@pytest.mark.parametrize(("half_life", "share"), [(0.0, 0.5), (10.0, 2 / 3)])
def test_a_named_draw_is_as_likely_as_the_half_life_says(half_life: float, share: float) -> None:
    picks = [
        draw_named(["a", "b"], [1e9, 1e9 + 10.0], 1, seed=seed, half_life=half_life)[0] for seed in range(4000)
    ]  # fmt: skip
    assert np.mean(picks) == pytest.approx(share, abs=0.03)


# --- learning from it ------------------------------------------------------------------------------------------------


@pytest.fixture
def program(capsys: pytest.CaptureFixture[str]) -> Program:
    return Program(capsys)


def busy(codec: Codec) -> FeedbackLog:
    """Twelve prompts; people turn every `ran` into `sat` and thumb it down."""
    replay = FeedbackLog()
    for i in range(12):
        text = f"the {'cat dog mat house'.split()[i % 4]} {'one two three'.split()[i % 3]}"
        replay.add(Prompt(id=f"p{i}", tokens=codec.encode_prompt(text + "\n"), text=text))
        replay.add(completion_of(codec, f"c{i}", f"p{i}", "ran to"))
        replay.add(event(f"e{i}", f"c{i}", "edit", "sat on", time=60.0 * i))
        replay.add(event(f"t{i}", f"c{i}", "thumb", 0, time=60.0 * i + 1))
    return replay


@pytest.mark.parametrize("algorithm", ["dpo", "kto"])
def test_batches_are_filled_from_the_replay_and_resumed(
    algorithm: str, make_policy: Callable[..., Policy], codec: Codec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("operant.run.run.write_report", lambda folder: None)

    def learned(name: str, steps: int, resume: bool = False) -> list[float]:
        config = PreferConfig(
            out=str(tmp_path / name), device="cpu", tensorboard=False, steps=steps, batch_size=4, lr=0.01,
            warmup_steps=0, eval_every=2, half_life=0.05, algorithm=algorithm, resume=resume,
        )  # fmt: skip
        prefer(config, policy=make_policy("gpt2"), replay=busy(codec), quiet=True)
        rows = read_rows(tmp_path / name / "metrics.jsonl")
        assert all(row["eval/accuracy"] >= 0 for row in rows if "eval/loss" in row)
        return [row["train/loss"] for row in rows if "train/loss" in row]

    whole = learned("whole", 6)
    learned("cut", 3)
    assert learned("cut", 6, resume=True) == whole and len(whole) == 6
    assert whole[-1] < whole[0]


def test_the_program_learns_from_a_replay_and_refuses_an_empty_one(
    make_policy: Callable[..., Policy], codec: Codec, program: Program, tmp_path: Path
) -> None:
    make_policy("gpt2").save(tmp_path / "start")
    file, empty, thumbs = (tmp_path / f"{name}.jsonl" for name in ("replay", "empty", "thumbs"))
    replay = busy(codec)
    file.write_text("".join(replay.lines()), encoding="utf-8")
    empty.write_text("", encoding="utf-8")
    thumbs.write_text("".join(line for line in replay.lines() if '"edit"' not in line), encoding="utf-8")
    given = ("prefer", "--model", tmp_path / "start", "--out", tmp_path / "run", "--steps", 1, "--batch_size", 2)
    told = program.fault(*given, "--replay", empty, *QUIET_RUN)
    assert "the feedback log is empty" in told and not (tmp_path / "run").exists()
    assert "--algorithm kto" in program.fault(*given, "--replay", thumbs, *QUIET_RUN)
    assert "cannot be read" in program.fault(*given, "--replay", tmp_path / "none.jsonl", *QUIET_RUN)
    assert program(*given, "--replay", file, *QUIET_RUN).status == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["steps"] == 1
