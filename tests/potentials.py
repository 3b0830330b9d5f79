"""What a metric says after every character of a text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any


def prefixes(metric: Any, references: Sequence[str], text: str) -> Iterator[tuple[str, float]]:
    """(closed text, Φ) after every character."""
    tracker, reached = metric.tracker(references), set()
    for character in text:
        tracker.feed(character)
        if tracker.closed and tracker.closed not in reached:
            reached.add(tracker.closed)
            yield text[: tracker.closed], tracker.value()
