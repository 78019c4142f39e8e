"""Alembic's entry: migrates over the connection that `database.py` hands in."""

from alembic import context
from sqlalchemy import Connection

from reservation.adapters.sql.tables import metadata

connection: Connection = context.config.attributes["connection"]

context.configure(connection=connection, target_metadata=metadata)
# The caller has begun the transaction that holds the lock, and commits it: all or nothing.
context.run_migrations()
