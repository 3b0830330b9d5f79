"""A version is judged by ratings of what others wrote."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from live import answered
from program import Program

from operant.config import WorkerConfig
from operant.data.feedback_log import line_of
from operant.live.learning.off_policy import snips_values
from operant.live.learning.worker import Worker
from operant.models.policy import Policy
from operant.types import OperantError, Prompt


def cooled(policy: Policy, prompt: Prompt, tokens: np.ndarray, temperature: float) -> float:
    asked = prompt.tokens.tolist()
    with torch.no_grad():
        logits = policy.model(input_ids=torch.tensor([[*asked, *tokens.tolist()]])).logits[0, len(asked) - 1 : -1]
    chosen = (logits.double() / temperature).log_softmax(-1)[torch.arange(len(tokens)), torch.from_numpy(tokens)]
    return float(chosen.sum())


def test_who_wrote_is_worth_the_mean_and_who_learned_more(
    make_policy: Callable[..., Policy], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = make_policy("gpt2")
    policy.save(tmp_path / "model")
    store = answered(policy, 4, temperature=0.8)
    greedy = answered(policy, 1, temperature=0.0).interactions["c0"]
    assert greedy.completion is not None
    greedy.completion.id = "greedy"
    store.interactions["greedy"] = greedy
    config = WorkerConfig(
        root=str(tmp_path / "live"), model=str(tmp_path / "model"), device="cpu", anchor_rows=2, anchor_tokens=4
    )
    worker = Worker(config, store, lambda told: None)
    worker.start()
    with pytest.raises(OperantError, match="no rated answer has a propensity"):
        snips_values(worker.versions, [0], store, device="cpu")
    store.add("c0", "thumb", 1)
    assert worker.once() and worker.versions.pointer().version == 1
    for name, kind, value in (
        ("c1", "thumb", -1), ("c2", "score", 0.5), ("c3", "thumb", 1), ("c3", "retract", None), ("c1", "comment", "so"),
        ("greedy", "thumb", 1),
    ):  # fmt: skip
        store.add(name, kind, value)
    found = snips_values(worker.versions, [0, 1], store, device="cpu")
    first, second = found[0], found[1]
    assert first["rated"] == second["rated"] == 3  # c3 is taken back, and a greedy answer has no propensity
    assert first["mean"] == pytest.approx((1 - 1 + 0.5) / 3)
    assert first["snips"] == pytest.approx(first["mean"], abs=1e-4)
    assert first["ess"] == pytest.approx(3.0, abs=1e-3)
    assert second["snips"] > first["snips"] and second["ess"] < 3
    # by the definition, from the logits of the model's own call at the temperature of sampling
    learned = Policy.load(Path(worker.versions.get(1).path) / "model", device="cpu")
    weights = []
    for name in ("c0", "c1", "c2"):
        stored = store.interactions[name]
        assert stored.completion is not None and stored.completion.behavior_logprobs is not None
        ours = cooled(learned, stored.prompt, stored.completion.tokens, 0.8)
        weights.append(np.exp(ours - stored.completion.behavior_logprobs.astype(np.float64).sum()))
    expected = np.dot(weights, [1, -1, 0.5]) / np.sum(weights)
    assert second["snips"] == pytest.approx(expected, abs=1e-4)
    with pytest.raises(OperantError, match="not on disk"):
        snips_values(worker.versions, [7], store, device="cpu")
    lines = [line_of(x) for s in store.interactions.values() for x in (s.prompt, s.completion)]
    (tmp_path / "log.jsonl").write_text("".join(lines + [line_of(event) for event in store.log]))
    program = Program(capsys)
    asked = ("versions", "--root", tmp_path / "live", "--evaluate", "[0,1]", "--store", tmp_path / "log.jsonl")
    told = json.loads(program(*asked, "--json").out)
    assert told["1"]["snips"] == pytest.approx(second["snips"])
    assert "effective sample size 3.0 of 3 ratings" in program(*asked).out
