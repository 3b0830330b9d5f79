"""Prompts, completions and feedback."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_COUNTER = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    op.create_table(
        "prompts",
        sa.Column("key", sa.LargeBinary, primary_key=True),
        sa.Column("tokens", sa.LargeBinary, nullable=False),
        sa.Column("body", sa.Text, nullable=False),
    )
    op.create_table(
        "completions",
        sa.Column("number", _COUNTER, primary_key=True, autoincrement=True),
        sa.Column("id", sa.Text, nullable=False, unique=True),
        sa.Column("prompt", sa.LargeBinary, sa.ForeignKey("prompts.key"), index=True),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("route", sa.Text, nullable=False),
        sa.Column("user", sa.Text, nullable=False),
        sa.Column("model_version", sa.BigInteger, nullable=False),
        sa.Column("created", sa.Double, nullable=False),
        sa.Column("sampling", sa.Text, nullable=False),
        sa.Column("request", sa.Text, nullable=False),
        sa.Column("metadata", sa.Text, nullable=False),
        sa.Column("answer", sa.Text),
        sa.Column("tokens", sa.LargeBinary),
        sa.Column("text_ends", sa.LargeBinary),
        sa.Column("text_reach", sa.LargeBinary),
        sa.Column("behavior_logprobs", sa.LargeBinary),
        sa.Column("model_logprobs", sa.LargeBinary),
        sa.Column("sampled", sa.LargeBinary),
        sa.Column("policy_version", sa.LargeBinary),
        sa.Column("stream_rewards", sa.LargeBinary),
    )
    op.create_table(
        "events",
        sa.Column("offset", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("id", sa.Text, nullable=False, unique=True),
        sa.Column("completion_id", sa.Text, sa.ForeignKey("completions.id"), nullable=False, index=True),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("value", sa.Text, nullable=False),
        sa.Column("span_start", sa.BigInteger),
        sa.Column("span_end", sa.BigInteger),
        sa.Column("source", sa.Text, nullable=False),
        sa.Column("idempotency_key", sa.Text, nullable=False),
        sa.Column("body_hash", sa.Text, nullable=False),
        sa.Column("time", sa.Double, nullable=False),
        sa.Column("received", sa.Double, nullable=False),
        sa.Column("tags", sa.Text, nullable=False),
        sa.UniqueConstraint("source", "idempotency_key"),
    )
