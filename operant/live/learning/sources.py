"""Each source's feedback, what that feedback did, and how much it counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from operant.live.learning.lesson import LearnerState
from operant.live.storage.store import Store
from operant.live.storage.versions import Versions

__all__ = ["by_source"]


def by_source(store: Store, versions: Versions | None, *, score_low: float, score_high: float) -> list[dict[str, Any]]:
    """A row for each source, the most talkative first.

    {"source", "events", "pending", "used", "superseded", "unused", "reward", "reputation", "influence"}. reward: mean
    of its thumbs and scores on [−1, 1], None where there are none. influence: its share of what the version that serves
    was taught lately, of all sources' (`influence.after`), None while nobody's is kept, as on one person's own server.
    Both it and the reputation are None without `versions`.
    """
    state = None
    if versions is not None and versions.exists():
        state = LearnerState.load(Path(versions.current().path))
    trust = {} if state is None else state.reputations()
    whole = 0.0 if state is None else sum(state.influence.values())
    rows = []
    for row in store.sources(score_low=score_low, score_high=score_high):
        name = row["source"]
        row["reputation"] = None if state is None else trust.get(name, 1.0)
        row["influence"] = None if state is None or not whole else state.influence.get(name, 0.0) / whole
        rows.append(row)
    return rows
