"""How often a key may ask and a source may rate, where many do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from serving import serving

from operant.live.serving import limits
from operant.live.serving.access import Keys
from operant.live.serving.limits import Buckets
from operant.models.policy import Policy

HELLO: Any = [{"role": "user", "content": "the cat sat"}]


def test_a_bucket_fills_at_its_rate_and_holds_a_minutes_worth() -> None:
    now = [0.0]
    buckets = Buckets(30, clock=lambda: now[0])
    assert [buckets.take("ann") for _ in range(30)] == [0.0] * 30
    assert buckets.take("ann") == pytest.approx(2.0) and buckets.take("bob") == 0.0
    now[0] = 1.5
    assert buckets.take("ann") == pytest.approx(0.5)
    now[0] = 2.0
    assert buckets.take("ann") == 0.0 and buckets.take("ann") > 0
    now[0] = 1e6  # it holds no more than a minute's
    assert sum(buckets.take("ann") == 0.0 for _ in range(100)) == 30


def test_what_costs_more_than_there_is_leaves_a_debt() -> None:
    now = [0.0]
    buckets = Buckets(60, clock=lambda: now[0])
    assert buckets.take("ann", cost=150) == 0.0
    assert buckets.take("ann") == pytest.approx(91.0)
    now[0] = 91.0
    assert buckets.take("ann") == 0.0
    slow = Buckets(0.5, clock=lambda: now[0])
    assert slow.take("ann") == 0.0 and slow.take("ann") == pytest.approx(120.0)
    assert all(Buckets(0).take("ann") == 0.0 for _ in range(1000))


def test_buckets_that_are_full_again_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(limits, "FEW", 10)
    buckets = Buckets(60, clock=lambda: now[0])
    for number in range(11):
        now[0] = 100.0 * number
        buckets.take(f"source {number}")
    assert list(buckets._levels) == ["source 10"]


def test_each_key_and_source_has_its_own_rate_and_is_told_when_to_come_again(
    make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    file = tmp_path / "keys.json"
    keys = {name: Keys(file).add(name, ["chat", "rate"]) for name in ("ann", "bob")}
    keys["boss"] = Keys(file).add("boss", ["operate"])
    settings: dict[str, Any] = {"mode": "shared", "chat_rate": 3, "feedback_rate": 2}
    with serving(make_policy("gpt2", context=128), tmp_path, keys=Keys(file), **settings) as served:
        ann, bob, boss = (served.client(keys[name]) for name in ("ann", "bob", "boss"))

        def ask(client: openai.OpenAI, **options: Any) -> Any:
            return client.chat.completions.create(model="default", messages=HELLO, max_tokens=4, **options)

        def rate(client: openai.OpenAI, name: str, **options: Any) -> Any:
            body = {"completion_id": name, "kind": "thumb", "value": 1} | options
            return client.post("/feedback", body=body, cast_to=httpx.Response)

        ids = [choice.completion_id for choice in ask(ann, n=2).choices] + [ask(ann).id]
        with pytest.raises(openai.RateLimitError, match="too much chat of 'ann'") as refused:
            ask(ann)
        assert 1 <= int(refused.value.response.headers["retry-after"]) <= 20
        assert refused.value.body["code"] == "rate_limit_exceeded" and refused.value.type == "rate_limit_error"
        assert served.store.counts()["completions"] == 3  # what was refused left no stub
        assert ask(bob).choices
        # an operator asks for others, and each of these has a rate of their own
        for _ in range(5):
            ask(boss)
        for _ in range(3):
            ask(boss, user="eve")
        with pytest.raises(openai.RateLimitError, match="boss/eve"):
            ask(boss, user="eve")
        ask(boss, user="dan")
        # feedback by each of the three ways counts for the source
        rate(ann, ids[0])
        ann.chat.completions.update(ids[2], metadata={"feedback": "up"})
        with pytest.raises(openai.RateLimitError, match="too much feedback of 'ann'"):
            rate(ann, ids[1])
        link = served.service.links.sign(ids[1], "ann")
        error = served.fault("POST", f"/f/{link}", 429, json={"kind": "thumb", "value": 1})
        assert error["type"] == "rate_limit_error"
        rate(bob, ids[1])
        rate(boss, ids[1], source="dan")
        rate(boss, ids[1], source="dan", value=-1)
        with pytest.raises(openai.RateLimitError, match="'dan'"):
            rate(boss, ids[1], source="dan")
        rate(boss, ids[1], source="eve")
        told = served.http.get("/metrics", headers={"Authorization": f"Bearer {keys['boss']}"}).text
        assert 'operant_limited_total{what="chat"} 2.0' in told
        assert 'operant_limited_total{what="feedback"} 3.0' in told


def test_nobodys_own_server_counts_what_they_say(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    with serving(make_policy("gpt2", context=128), tmp_path, chat_rate=1, feedback_rate=1) as served:
        for value in (1, -1, 1):
            served.rate(served.chat()["id"], "thumb", value)
        assert [event["value"] for event in served.http.get("/v1/feedback").json()["data"]] == [1, -1, 1]
        assert "operant_limited_total{" not in served.http.get("/metrics").text
