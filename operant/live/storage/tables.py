"""The tables of the store as they are today, and how values become columns."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from operant.config import install_line
from operant.types import OperantError

try:
    import sqlalchemy as sa
except ImportError as error:
    raise OperantError(f"the store needs SQLAlchemy: {install_line(extra='live')}") from error

__all__ = ["ARRAYS", "COMPLETIONS", "EVENTS", "OUTCOMES", "PROMPTS", "REVISION", "STEPS", "TABLES"]

REVISION = "0002"  # the last of `migrations`


class Document(sa.types.TypeDecorator[Any]):
    """Any JSON value as text. NUL and lone surrogates, which a model may well write, survive in both databases."""

    impl = sa.Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: sa.Dialect) -> str:
        """To the column."""
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        try:
            text.encode()
        except UnicodeEncodeError:
            text = json.dumps(value, separators=(",", ":"))
        return text

    def process_result_value(self, value: str | None, dialect: sa.Dialect) -> Any:
        """From the column."""
        return None if value is None else json.loads(value)


class Array(sa.types.TypeDecorator[NDArray[Any]]):
    """A vector as the bytes of `kept`, read back as `dtype`."""

    impl = sa.LargeBinary
    cache_ok = True

    def __init__(self, kept: str, dtype: DTypeLike) -> None:
        super().__init__()
        self.kept, self.dtype = kept, np.dtype(dtype)

    def process_bind_param(self, value: NDArray[Any] | None, dialect: sa.Dialect) -> bytes | None:
        """To the column."""
        return None if value is None else np.asarray(value).astype(self.kept).tobytes()

    def process_result_value(self, value: bytes | None, dialect: sa.Dialect) -> NDArray[Any] | None:
        """From the column."""
        return None if value is None else np.frombuffer(value, self.kept).astype(self.dtype)


def _ints() -> Array:
    return Array("<i4", np.int64)


def _floats() -> Array:
    return Array("<f4", np.float32)


TABLES = sa.MetaData()
PROMPTS = sa.Table(
    "prompts", TABLES,
    sa.Column("key", sa.LargeBinary, primary_key=True),  # SHA-256 of the whole prompt
    sa.Column("tokens", _ints(), nullable=False),
    sa.Column("body", Document, nullable=False),
)  # fmt: skip
ARRAYS = {
    "tokens": _ints(), "text_ends": _ints(), "text_reach": _ints(), "behavior_logprobs": _floats(),
    "model_logprobs": _floats(), "sampled": Array("?", np.bool_), "policy_version": _ints(),
    "stream_rewards": _floats(),
}  # fmt: skip
COMPLETIONS = sa.Table(
    "completions", TABLES,
    sa.Column("number", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True),
    sa.Column("id", sa.Text, nullable=False, unique=True),
    sa.Column("prompt", sa.LargeBinary, sa.ForeignKey(PROMPTS.c.key), index=True),
    sa.Column("status", sa.Text, nullable=False),
    sa.Column("route", Document, nullable=False),
    sa.Column("user", Document, nullable=False),
    sa.Column("model_version", sa.BigInteger, nullable=False),
    sa.Column("created", sa.Double, nullable=False),
    sa.Column("sampling", Document, nullable=False),
    sa.Column("request", Document, nullable=False),
    sa.Column("metadata", Document, nullable=False),
    sa.Column("answer", Document),
    *(sa.Column(name, kind) for name, kind in ARRAYS.items()),
)  # fmt: skip
EVENTS = sa.Table(
    "events", TABLES,
    sa.Column("offset", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("id", sa.Text, nullable=False, unique=True),
    sa.Column("completion_id", sa.Text, sa.ForeignKey(COMPLETIONS.c.id), nullable=False, index=True),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("value", Document, nullable=False),
    sa.Column("span_start", sa.BigInteger),
    sa.Column("span_end", sa.BigInteger),
    sa.Column("source", sa.Text, nullable=False),
    sa.Column("idempotency_key", sa.Text, nullable=False),
    sa.Column("body_hash", sa.Text, nullable=False),
    sa.Column("time", sa.Double, nullable=False),
    sa.Column("received", sa.Double, nullable=False),
    sa.Column("tags", Document, nullable=False),
    sa.UniqueConstraint("source", "idempotency_key"),
)  # fmt: skip
STEPS = sa.Table(
    "steps", TABLES,
    sa.Column("version", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("parent", sa.BigInteger, nullable=False),
    sa.Column("consumed_offset", sa.BigInteger, nullable=False),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("times", Document, nullable=False),
    sa.Column("served", sa.Double),
)  # fmt: skip
OUTCOMES = sa.Table(
    "outcomes", TABLES,
    sa.Column(
        "offset", sa.BigInteger, sa.ForeignKey(EVENTS.c.offset, ondelete="CASCADE"), primary_key=True,
        autoincrement=False,
    ),
    sa.Column("version", sa.BigInteger, sa.ForeignKey(STEPS.c.version), nullable=False, index=True),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("advantage", sa.Double),
    sa.Column("logprob_before", sa.Double),
    sa.Column("logprob_after", sa.Double),
)  # fmt: skip
