"""A version serves everybody only on evidence: the test that is never wrong more often than it says, and over HTTP."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from forks import PATIENCE
from program import Program
from serving import Served, learning

from operant.config import ServeConfig
from operant.live.api.evidence import TrialEvidence
from operant.live.api.service import Way
from operant.live.api.versions_routes import RatedReply, TrialReply, VersionsReply
from operant.live.serve import live
from operant.live.serving.canary import MOST_OF_ONE, Bet, Canary, Trial, in_share, wager
from operant.live.storage.store import StoredCompletion
from operant.live.storage.versions import Pointer, Versions
from operant.models.policy import Policy
from operant.types import Completion, Feedback, OperantError, Prompt

ALPHA, RUNS, LENGTH = 0.05, 500, 150


# --- the gamblers -----------------------------------------------------------------------------------------------------


def reaching(draws: np.ndarray, bound: float) -> float:
    """The share of rows in which a gambler is ever as rich as 1/α. draws: float[runs, length]."""
    rich = 0
    for row in draws:
        bet = Bet()
        for x in row:
            bet = wager(bet, float(x) + bound)
            if bet.log_wealth >= -math.log(ALPHA):
                rich += 1
                break
    return rich / len(draws)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("margin", [0.0, 0.1])
def test_looked_at_after_every_pair_the_test_errs_no_more_often_than_it_says(share: float, margin: float) -> None:
    """Thumbs of two versions, of which one is worse by exactly the margin: the edge of the null."""
    rng = np.random.default_rng(7)
    ours = rng.random((RUNS, LENGTH)) < share - margin
    theirs = rng.random((RUNS, LENGTH)) < share
    error = reaching(ours.astype(float) - theirs, margin)
    assert error <= ALPHA + 2 * math.sqrt(ALPHA * (1 - ALPHA) / RUNS)


def test_it_finds_a_difference_that_is_there() -> None:
    rng = np.random.default_rng(8)
    ours, theirs = rng.random((100, LENGTH)) < 0.8, rng.random((100, LENGTH)) < 0.5
    assert reaching(ours.astype(float) - theirs, 0.1) > 0.95
    assert reaching(theirs.astype(float) - ours, 0.1) == 0.0


def test_a_wager_is_the_formula() -> None:
    bet = wager(wager(Bet(), 1.0), -0.5)
    # first nothing is known, so nothing is staked; then m = 1/2, v = (1/4 + 1)/2 − 1/4, λ = min(m / (v + m²), 1/2)
    assert bet == Bet(2, 0.5, 1.25, pytest.approx(math.log(1 - 0.5 * 0.5)))


def test_shares_are_stable_and_as_large_as_they_say() -> None:
    names = [f"user-{i}" for i in range(5000)]
    chosen = {name for name in names if in_share(name, 3, 0.2)}
    assert chosen == {name for name in names if in_share(name, 3, 0.2)} and chosen < {
        name for name in names if in_share(name, 3, 0.4)
    }
    assert len(chosen) / len(names) == pytest.approx(0.2, abs=0.02)
    assert chosen != {name for name in names if in_share(name, 4, 0.2)}
    assert not any(in_share(name, 3, 0.0) for name in names) and all(in_share(name, 3, 1.0) for name in names)


# --- trials -----------------------------------------------------------------------------------------------------------


class Line(Versions):
    """Versions of which each is the child of the one before it, without weights."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.root.mkdir(exist_ok=True)
        self.publish_number(0)

    def publish_number(self, number: int) -> None:
        self._write_pointer(Pointer(number, number, 0))

    def ancestors(self, version: int) -> list[int]:
        return list(range(version, -1, -1))

    def get(self, version: int) -> Any:
        return None


def rating(version: int, value: float, number: int, source: str) -> tuple[Feedback, StoredCompletion]:
    """A score of an answer to the user "u", and the answer, which `version` wrote."""
    tokens = np.array([1, 2])
    answer = Completion(f"c{number}", "p", "", tokens, tokens, policy_version=np.array([version, version]))
    stored = StoredCompletion(answer.id, Prompt("p", tokens=tokens), answer, "complete", "", "u", version, {}, {}, 0.0)
    return Feedback(f"e{number}", answer.id, "score", value, source, f"k{number}", 0.0), stored


def pay(canary: Canary, version: int, value: float, number: int, source: str = "") -> None:
    who = source or f"s{number}"
    canary.add_rating(*rating(version, value, number, who), who)


def test_a_better_one_is_promoted_and_a_worse_one_refused_by_name(tmp_path: Path) -> None:
    versions, changed = Line(tmp_path / "live"), []
    canary = Canary(versions, ServeConfig(canary_share=0.5), lambda: changed.append(1))
    assert canary.look() == (0, None) and canary.version_for("ann") is None
    versions.publish_number(1)
    assert canary.look() == (0, 1)
    versions.publish_number(2)  # learning goes on; what is tried stays what it is
    assert canary.look() == (0, 1) and {canary.version_for(f"u{i}") for i in range(30)} == {None, 1}
    number = 0
    while not changed:
        for version, value in ((1, 1.0), (0, 0.0)):
            pay(canary, version, value, number := number + 1)
    verdict = versions.verdict(1)
    assert verdict is not None and verdict["verdict"] == "promoted" and verdict["e_better"] >= 20
    assert (
        verdict["difference"] == 1.0
        and verdict["pairs"] == number // 2 < 20
        and "significance 0.05" in verdict["reason"]
    )
    assert canary.look() == (1, 2)  # and the next one, which had waited, is tried
    # a second process goes on where this one stopped
    other = Canary(versions, ServeConfig(canary_share=0.5), lambda: changed.append(1))
    while len(changed) < 2:
        for version, value in ((2, 0.2), (1, 0.9)):
            pay(other, version, value, number := number + 1)
    verdict = versions.verdict(2)
    assert (
        verdict is not None and verdict["verdict"] == "refused" and verdict["reason"].startswith("worse than version 1")
    )
    assert versions.pointer().version == 1  # learning goes on from what serves
    assert canary.look() == (1, None) and (canary.trial().promoted, canary.trial().refused) == (1, 1)


def test_what_says_neither_is_refused_in_the_end(tmp_path: Path) -> None:
    versions = Line(tmp_path / "live")
    canary = Canary(versions, ServeConfig(canary_share=0.5, canary_margin=0.0, canary_pairs=30))
    versions.publish_number(1)
    canary.look()
    for number in range(60):
        pay(canary, number % 2, 0.5, number)
    verdict = versions.verdict(1)
    assert verdict is not None and verdict["reason"].startswith("undecided") and verdict["pairs"] == 30


def test_a_score_out_of_scale_is_no_rating(tmp_path: Path) -> None:
    canary = Canary(versions := Line(tmp_path / "live"), ServeConfig(canary_share=0.5, score_low=1, score_high=5))
    versions.publish_number(1)
    canary.look()
    for number, value in enumerate((0.5, 9.0, math.nan, 3.0)):
        pay(canary, 1, value, number)
    assert canary.trial().rated == ["c3"]


def test_one_source_decides_nothing_and_an_answer_counts_once(tmp_path: Path) -> None:
    versions = Line(tmp_path / "live")
    canary = Canary(versions, ServeConfig(canary_share=0.5))
    versions.publish_number(1)
    canary.look()
    for number in range(400):
        pay(canary, number % 2, float(number % 2), number, source="mallory")
    assert canary.trial().candidate == 1 and canary.trial().summary()["pairs"] == MOST_OF_ONE // 2
    bet = Bet()
    for _ in range(MOST_OF_ONE):  # the most that one can say, each word set against another's
        bet = wager(bet, 1.1)
    assert bet.log_wealth < -math.log(ALPHA)
    before = canary.trial()
    pay(canary, 1, 1.0, 0)  # another's word on an answer that is counted
    pay(canary, 7, 1.0, 1000)  # an answer of neither
    assert canary.trial() == before


def test_people_are_told_from_the_servers_own_ratings_by_the_way_they_come_in(tmp_path: Path) -> None:
    """A key may be older than the rule that keeps the names of automatic sources: whoever holds it is a person."""
    versions = Line(tmp_path / "live")
    canary = Canary(versions, ServeConfig(canary_share=0.5))
    versions.publish_number(1)
    canary.look()
    ways: list[tuple[Way, str]] = [
        ("api", "reward:judge"),
        ("link", "rule:x"),
        ("rule", "rule:m:f"),
        ("reward", "reward:chrf"),
    ]
    for number, (way, source) in enumerate(ways):
        asyncio.run(TrialEvidence(canary).on_rated(cast(Any, None), *rating(1, 1.0, number, source), way))
    assert canary.trial().counted == {"reward:judge": 1, "rule:x": 1, "u": 1}


def test_how_far_a_trial_is_is_told_with_what_decides_it(tmp_path: Path) -> None:
    versions = Line(tmp_path / "live")
    canary = Canary(versions, ServeConfig(canary_share=0.25, canary_alpha=0.04, canary_margin=0.2, canary_pairs=9))
    versions.publish_number(1)
    canary.look()
    for number, (version, value) in enumerate([(1, 1.0), (1, 0.5), (1, 0.5), (0, 0.25), (0, 0.0)]):
        pay(canary, version, value, number)
    told = canary.summary()
    assert told["rated"] == {"serving": 2, "candidate": 3} and told["pairs"] == 2 and told["difference"] == 0.625
    assert (told["kind"], told["share"], told["margin"], told["most_pairs"]) == ("canary", 0.25, 0.2, 9)
    assert told["needed"] == 25 and told["e_worse"] == 1.0  # it has seen nothing to bet on
    assert told["e_better"] == pytest.approx(1 + 0.5 * (0.5 + 0.2))


def test_going_back_while_a_version_is_tried_leaves_what_serves_and_not_what_is_tried(tmp_path: Path) -> None:
    class Kept(Line):
        def _folders(self) -> set[int]:
            return {0, 1, 3, 4, 5}

    versions = Kept(tmp_path / "live")
    versions.publish_number(3)
    canary = Canary(versions, ServeConfig(canary_share=0.5))
    for number in (4, 5):
        versions.publish_number(number)
        assert canary.look() == (3, 4)
    versions.roll_back()
    assert canary.look() == (1, None)


def test_whoever_moves_versions_by_hand_ends_the_trial(tmp_path: Path) -> None:
    versions = Line(tmp_path / "live")
    canary = Canary(versions, ServeConfig(shadow_share=1.0, reward="length(target=4)"))
    versions.publish_number(1)
    assert canary.look() == (0, 1)
    canary.add_difference(1, 1.0)
    canary.add_difference(5, 1.0)  # of a version that is tried no more
    assert canary.trial().summary()["pairs"] == 1
    versions.promote(1)
    assert canary.look() == (1, None) and canary.trial() == Trial(1)
    versions.publish_number(2)
    assert canary.look() == (1, 2)
    # as forgetting does it: neither what was tried nor what served may serve any more
    beside = Versions(versions.root, beside=True)
    beside._write_pointer(Pointer(4, 9, 0))
    versions.serve_what_was_made_again()
    assert canary.look() == (4, None)


def test_a_trial_that_is_ended_by_hand_stays_ended_while_ratings_come_in(tmp_path: Path) -> None:
    """Ratings, a person and a learner that starts touch the trial at once; none fails, and none undoes another's."""
    versions = Line(tmp_path / "live")
    canary = Canary(versions, ServeConfig(shadow_share=1.0, reward="length(target=4)", canary_pairs=10**6))
    with ThreadPoolExecutor(4) as pool:
        for number in range(1, 9):
            versions.publish_number(number)
            assert canary.look()[1] == number
            judged = [pool.submit(canary.add_difference, number, 0.0) for _ in range(12)]
            cleaned = [pool.submit(versions.clean) for _ in range(12)]
            time.sleep(0.002 * number)
            versions.promote(number)
            for done in (*judged, *cleaned):
                done.result()
            assert versions.trial() == {"serving": number, "promoted": 0, "refused": 0}


def test_a_promotion_by_hand_and_a_verdict_do_not_interleave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = Line(tmp_path / "live")
    canary = Canary(versions, ServeConfig(shadow_share=1.0, reward="length(target=4)", canary_pairs=1))
    versions.publish_number(1)
    assert canary.look() == (0, 1)
    inside = versions._serve_at_once
    with ThreadPoolExecutor(1) as pool:

        def late(version: int) -> None:
            judged.append(pool.submit(canary.add_difference, 1, -1.0))  # would refuse what is being promoted
            time.sleep(0.2)
            inside(version)

        judged: list[Any] = []
        with monkeypatch.context() as patch:
            patch.setattr(versions, "_serve_at_once", late)
            versions.promote(1)
        judged[0].result()
    assert canary.look() == (1, None) and versions.pointer().version == 1


def test_nothing_is_decided_while_a_source_is_being_forgotten(tmp_path: Path) -> None:
    versions = Line(tmp_path / "live")
    canary = Canary(versions, ServeConfig(shadow_share=1.0, reward="length(target=4)", canary_pairs=1))
    versions.publish_number(1)
    assert canary.look() == (0, 1)
    versions.keep_plan({"source": "x", "number": 1, "stage": "asked"})
    canary.add_difference(1, -1.0)
    assert versions.verdict(1) is None
    versions.plan_file.unlink()
    canary.add_difference(1, -1.0)
    assert canary.look() == (0, None) and versions.verdict(1) is not None


# --- over HTTP --------------------------------------------------------------------------------------------------------


def ask(served: Served, user: str) -> dict[str, Any]:
    body = {"model": "default", "messages": [{"role": "user", "content": "the cat sat"}], "max_tokens": 4, "user": user}
    told: dict[str, Any] = served.http.post("/v1/chat/completions", json=body).json()
    return told


def until(holds: Callable[[], Any], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < end, what
        time.sleep(0.05)


def test_some_users_are_answered_by_what_is_tried_until_their_ratings_decide(
    policy: Policy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with learning(policy, tmp_path, canary_share=0.5, keep=20) as served:
        first = ask(served, "teacher")
        edit = {"completion_id": first["id"], "kind": "edit", "value": "a dog", "source": "teacher"}
        served.http.post("/v1/feedback", json=edit)
        told = lambda: served.http.get("/v1/versions").json()  # noqa: E731
        until(lambda: told()["trial"]["candidate"] == 1 and 1 in told()["resident"], "version 1 is tried")
        assert told()["current"] == 1 and told()["serving"] == 0
        assert VersionsReply.model_validate(told()).trial == TrialReply(
            serving=0, candidate=1, kind="canary", share=0.5, rated=RatedReply(serving=0, candidate=0), pairs=0,
            difference=None, e_better=1, e_worse=1, needed=20, margin=0.1, most_pairs=1000, promoted=0, refused=0,
        )  # fmt: skip
        answered = {user: ask(served, user) for user in [f"u{i}" for i in range(40)]}
        versions = {user: answer["operant"]["version"] for user, answer in answered.items()}
        assert set(versions.values()) == {0, 1} and versions["u0"] == ask(served, "u0")["operant"]["version"]
        stored = served.store.completion(next(a["id"] for u, a in answered.items() if versions[u] == 1))
        assert stored is not None and stored.completion is not None and set(stored.completion.policy_version) == {1}
        for user, answer in answered.items():  # all say that what is tried is the worse one
            body = {
                "completion_id": answer["id"],
                "kind": "score",
                "value": 0.1 if versions[user] else 0.9,
                "source": user,
            }
            served.http.post("/v1/feedback", json=body)
        until(
            lambda: any((row["trial"] or {}).get("verdict") == "refused" for row in told()["versions"]), "it is refused"
        )
        (refused,) = [row for row in told()["versions"] if row["version"] == 1]
        VersionsReply.model_validate(told())
        assert refused["trial"]["against"] == 0 and "worse than version 0" in refused["trial"]["reason"]
        assert told()["serving"] == 0 and ask(served, "u0")["operant"]["version"] != 1
        assert "operant_canary_refused 1.0" in served.http.get("/metrics").text
        shown = Program(capsys)("versions", "--root", served.service.versions.root).out
        assert "canary: refused, worse than version 0" in shown and "serving" in shown


def test_in_the_shadow_it_is_judged_and_nothing_of_it_is_stored(policy: Policy, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"shadow_share": 1.0, "reward": "length(target=4)", "keep": 20, "canary_pairs": 3}
    with learning(policy, tmp_path, **settings) as served:
        first = ask(served, "ann")
        until(lambda: served.store.counts()["used"] or served.store.counts()["unused"], "the reward has rated it")
        edit = {"completion_id": first["id"], "kind": "edit", "value": "a dog", "source": "ann"}
        served.http.post("/v1/feedback", json=edit)
        told = lambda: served.http.get("/v1/versions").json()  # noqa: E731
        until(lambda: told()["trial"]["candidate"] and len(told()["resident"]) == 2, "a version is tried")
        asked = 1
        while not any(row["trial"] for row in told()["versions"]):
            assert ask(served, "ann")["operant"]["version"] == told()["trial"]["serving"]
            asked += 1
            assert asked < 200
        (tried,) = [row for row in told()["versions"] if row["trial"]][:1]
        assert tried["trial"]["kind"] == "shadow" and tried["trial"]["pairs"] <= 3
        assert served.store.counts()["completions"] <= asked + 1
        assert not [name for name, _ in served.store.names() if name.startswith("shadow")]


def test_a_share_that_cannot_be_is_refused_and_none_ends_a_trial(policy: Policy, tmp_path: Path) -> None:
    policy.save(tmp_path / "model")
    here = {"root": str(tmp_path / "live"), "model": str(tmp_path / "model"), "device": "cpu", "anchor_rows": 2}
    with pytest.raises(OperantError, match="two ways"), live(ServeConfig(**here, canary_share=0.1, shadow_share=0.1)):
        pass
    with pytest.raises(OperantError, match="needs --reward"), live(ServeConfig(**here, shadow_share=0.1)):
        pass
    with learning(policy, tmp_path) as served:
        assert served.http.get("/v1/versions").json()["trial"] is None
        Canary(served.service.versions, ServeConfig(canary_share=0.1))
        assert json.loads((tmp_path / "live" / "trials" / "now.json").read_text())["serving"] == 0
    with learning(policy, tmp_path) as served:
        assert (
            served.http.get("/v1/versions").json()["trial"] is None
            and not (tmp_path / "live" / "trials" / "now.json").exists()
        )
