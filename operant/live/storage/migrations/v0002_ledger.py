"""The ledger: the learner's steps, and what became of each event in them."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_table(
        "steps",
        sa.Column("version", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("parent", sa.BigInteger, nullable=False),
        sa.Column("consumed_offset", sa.BigInteger, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("times", sa.Text, nullable=False),
        sa.Column("served", sa.Double),
    )
    op.create_table(
        "outcomes",
        sa.Column(
            "offset", sa.BigInteger, sa.ForeignKey("events.offset", ondelete="CASCADE"), primary_key=True,
            autoincrement=False,
        ),
        sa.Column("version", sa.BigInteger, sa.ForeignKey("steps.version"), nullable=False, index=True),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("advantage", sa.Double),
        sa.Column("logprob_before", sa.Double),
        sa.Column("logprob_after", sa.Double),
    )  # fmt: skip
