"""The pupil of the population: a served program that learns from ratings, and how what it says is measured."""

from __future__ import annotations

import math
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.cells import ROOT
from benchmarks.population_text import FAMILIES, Liking, answer, likings, makes_sense, questions

__all__ = ["ANCHORS", "MEASURED", "Measure", "Served", "held_out", "sampled", "share"]

MEASURED = 192  # held-out questions that are answered at each look
ANCHORS = 8  # questions of its own that the owner gives to measure steps on
MAX_TOKENS = 96


def held_out(count: int) -> list[tuple[str, str, str]]:
    """Questions about things that nobody is asked about while learning; the same for every seed."""
    return random.Random("held out").sample(questions(held_out=True), count)


class Measure:
    """Looks at a policy's sampled answers to held-out questions."""

    def __init__(self, codec: Any, liking: Liking, count: int = MEASURED) -> None:
        import numpy as np

        from operant.data.batch import from_sequences
        from operant.data.prompts import load_prompts

        self.liking, self.asked = liking, held_out(count)
        self.prompts = load_prompts([{"prompt": question} for question, _, _ in self.asked], codec)
        rng = random.Random("liked answers")
        liked = [codec.encode(answer(rng, verb, thing, liking)) for _, verb, thing in self.asked]
        self.liked = from_sequences(
            [p.tokens for p in self.prompts], [np.append(tokens, codec.eos_id) for tokens in liked], encoder=False,
            pad_id=codec.pad_id, normalisation="per_token",
        )  # fmt: skip

    def __call__(self, policy: Any) -> dict[str, Any]:
        from operant.algorithms.learner import logprobs_of

        policy.model.eval()
        texts = sampled(policy, self.prompts)
        logprobs = logprobs_of(policy, self.liked, 8192)
        sound = [makes_sense(text, *asked[1:]) for text, asked in zip(texts, self.asked, strict=True)]
        return {
            "satisfaction": share(self.liking.liked(text) for text in texts),
            "sense": share(sound),
            "sense_of_liked": share(s for s, text in zip(sound, texts, strict=True) if self.liking.liked(text)),
            "words": statistics.mean(len(text.split()) for text in texts),
            "nats": -float((logprobs * self.liked.action_mask).sum() / self.liked.action_mask.sum()),
            "others": {
                liking.name: share(map(liking.liked, texts)) for family in FAMILIES for liking in likings(family)
                if family != self.liking.family
            },
            "texts": texts[:3],
        }  # fmt: skip


def sampled(policy: Any, prompts: Sequence[Any]) -> list[str]:
    from operant.models.sampler import Sampler
    from operant.types import Sampling

    groups = Sampler(policy, max_rows=64).sample(prompts, Sampling(max_tokens=MAX_TOKENS, seed=3))
    return [group[0].text for group in groups]


def share(true: Any) -> float:
    found = [float(x) for x in true]
    return statistics.mean(found) if found else math.nan


class Served:
    """`operant serve` in a process of its own, talked to over HTTP."""

    def __init__(self, model: Path, root: Path, anchors: Path, **options: Any) -> None:
        import httpx

        self.root = root
        settings = {
            "model": model, "root": root, "anchors": anchors, "port": 0, "device": "cpu", "threads": 1,
            "max_tokens": MAX_TOKENS, **options,
        }  # fmt: skip
        command = [sys.executable, "-m", "operant.cli", "serve"]
        command += [part for name, value in settings.items() for part in (f"--{name}", str(value))]
        self.log = (root.parent / "serve.log").open("w", encoding="utf-8")
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=self.log, text=True)
        assert self.process.stdout is not None
        said = self.process.stdout.readline()
        if " learns at " not in said:
            self.close()
            raise SystemExit((root.parent / "serve.log").read_text(encoding="utf-8"))
        self.http = httpx.Client(base_url=said.split(" learns at ")[1].split("/v1")[0], timeout=120)

    def answers(self, question: str, count: int, seed: int) -> list[tuple[str, str]]:
        body = {
            "model": "default", "messages": [{"role": "user", "content": question}], "n": count, "seed": seed,
            "temperature": 1.0, "max_tokens": MAX_TOKENS,
        }  # fmt: skip
        told = self.http.post("/v1/chat/completions", json=body).raise_for_status().json()
        return [(choice["completion_id"], choice["message"]["content"]) for choice in told["choices"]]

    def rated(self, body: dict[str, Any]) -> str:
        """Give the feedback and wait until what it taught is served; what became of it, in a few words."""
        receipt = self.http.post("/v1/feedback", json=body).raise_for_status().json()
        until = time.monotonic() + 120
        while time.monotonic() < until:
            story = self.http.get(f"/v1/feedback/{receipt['id']}", params={"wait": 30}).raise_for_status().json()
            if story["state"] not in ("pending", "used"):
                return f"{story['state']}: {story['reason'].split(' is ')[0]}"
            if story["state"] == "used" and "served" in story["times"]:
                return "published"
        raise SystemExit(f"rating {receipt['id']} was not learned in two minutes; see {self.log.name}")

    def policy(self) -> Any:
        """The weights that serve."""
        from operant.live.storage.versions import Versions
        from operant.models.policy import Policy

        return Policy.load(Path(Versions(self.root).current().path) / "model", device="cpu")

    def close(self) -> None:
        self.process.terminate()
        self.process.communicate()
        self.log.close()
