"""A judge's verdicts and their cost, in one SQLite file."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Sequence
from pathlib import Path

from operant.types import OperantError


class VerdictCache:
    """Verdicts and spending in one SQLite file (or in memory), for the threads of one process and for several.

    `spent`: {"requests", "tokens_in", "tokens_out", "cost"} over the file's life. Reservations are this process's.
    Raises OperantError when the file cannot be used.
    """

    def __init__(self, path: str = "") -> None:
        self.path = path
        self.lock = threading.Lock()
        self.held = [0, 0]
        try:
            if path:
                Path(path).expanduser().parent.mkdir(parents=True, exist_ok=True)
            where = str(Path(path).expanduser()) if path else ":memory:"
            self.db = sqlite3.connect(where, timeout=30.0, check_same_thread=False, isolation_level=None)
            self.db.execute("CREATE TABLE IF NOT EXISTS verdicts (key TEXT PRIMARY KEY, value REAL NOT NULL)")
            self.db.execute(
                "CREATE TABLE IF NOT EXISTS spent (id INTEGER PRIMARY KEY CHECK (id = 1), requests INTEGER NOT NULL, "
                "tokens_in INTEGER NOT NULL, tokens_out INTEGER NOT NULL, cost REAL NOT NULL)"
            )
            self.db.execute("INSERT OR IGNORE INTO spent VALUES (1, 0, 0, 0, 0.0)")
        except (OSError, sqlite3.Error) as error:
            raise OperantError(f"the judge's cache {path} cannot be used ({error}); choose another cache") from error

    def close(self) -> None:
        """Let go of the file."""
        self.db.close()

    @property
    def spent(self) -> dict[str, float]:
        """Requests, tokens and cost over the life of the file."""
        with self.lock:
            row = self.db.execute("SELECT requests, tokens_in, tokens_out, cost FROM spent").fetchone()
        return dict(zip(("requests", "tokens_in", "tokens_out", "cost"), row, strict=True))

    def look(self, keys: Sequence[str]) -> dict[str, float]:
        """The verdicts that are known."""
        known: dict[str, float] = {}
        with self.lock:
            for start in range(0, len(keys), 500):
                part = keys[start : start + 500]
                marks = ",".join("?" * len(part))
                known.update(
                    self.db.execute(f"SELECT key, value FROM verdicts WHERE key IN ({marks})", part).fetchall()
                )
        return known

    def keep(self, key: str, value: float) -> None:
        """Store a verdict in [0, 1]."""
        with self.lock:
            self.db.execute("INSERT OR REPLACE INTO verdicts VALUES (?, ?)", (key, value))

    def reserve(self, estimate: tuple[int, int], caps: tuple[int, float, tuple[float, float]]) -> bool:
        """Set the estimate (tokens in, out) aside; False when it would pass a cap together with what is under way."""
        most_tokens, most_cost, prices = caps
        with self.lock:
            tokens_in, tokens_out, cost = self.db.execute("SELECT tokens_in, tokens_out, cost FROM spent").fetchone()
            waiting = [held + new for held, new in zip(self.held, estimate, strict=True)]
            if most_tokens and tokens_in + tokens_out + sum(waiting) > most_tokens:
                return False
            if most_cost and cost + sum(n * p for n, p in zip(waiting, prices, strict=True)) > most_cost:
                return False
            self.held = waiting
            return True

    def settle(self, estimate: tuple[int, int], used: tuple[int, int], prices: tuple[float, float]) -> None:
        """Replace a reservation by what was used."""
        cost = sum(n * p for n, p in zip(used, prices, strict=True))
        with self.lock:
            self.held = [held - old for held, old in zip(self.held, estimate, strict=True)]
            self.db.execute(
                "UPDATE spent SET requests = requests + 1, tokens_in = tokens_in + ?, tokens_out = tokens_out + ?, "
                "cost = cost + ?",
                (*used, cost),
            )
