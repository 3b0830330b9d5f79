"""Numbered changes of the store's tables, each made once, in order, when a store is opened for writing.

A change never imports `tables.py`: it says what it does to the tables as they were then.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sqlalchemy import Connection

__all__ = ["upgrade"]


def upgrade(connection: Connection, revision: str) -> None:
    """Bring the tables to this revision, within the transaction that is open."""
    from alembic.operations import Operations
    from alembic.runtime.migration import MigrationContext
    from alembic.script import ScriptDirectory

    folder = str(Path(__file__).parent)
    scripts = ScriptDirectory(folder, version_locations=[folder])
    context = MigrationContext.configure(
        connection,
        opts={"fn": lambda now, _: scripts._upgrade_revs(revision, now), "render_as_batch": True},
    )
    with Operations.context(context):
        context.run_migrations()
