"""`operant serve` under load and kill -9 of the server and its learner: nothing is lost, nothing is learned twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from operant.live.storage.versions import Versions
from operant.models.policy import Policy

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("rank", [0, 2])
def test_killed_at_each_moment_under_load_nothing_is_lost_nothing_learned_twice_and_the_disk_is_what_serves(
    rank: int, make_policy: Callable[..., Policy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All promises are checked by the campaign, after each kill. With a rank, what is swapped are adapters."""
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.crashes import PLAN, campaign

    make_policy("gpt2", context=128).save(tmp_path / "model")
    flags = (
        "--threads 1 --lr 0.0005 --anchor_rows 2 --anchor_tokens 6 --drift_budget 1000 --likelihood_drop 1000 "
        f"--keep 100000 --lora_rank {rank}"
    )
    found = campaign(tmp_path / "model", tmp_path / "live", kills=len(PLAN), flags=flags.split())
    assert len(found["rounds"]) == len(PLAN)
    assert found["feedback"] > len(PLAN) and found["answers"] > len(PLAN) and found["counts"]["used"] > 0
    published = [r for r in Versions(tmp_path / "live").records() if r.state == "published" and r.parent >= 0]
    assert found["made_again"] == len(published) > 0
