"""Alembic's environment: migrates over the connection that `engine.py` passes in."""

from alembic import context
from sqlalchemy import Connection

from reservation.adapters.sql.tables import metadata

if context.is_offline_mode():
    # The statements are printed and not executed.
    context.configure(
        dialect_name=context.config.attributes["dialect"],
        target_metadata=metadata,
        literal_binds=True,
    )
else:
    connection: Connection = context.config.attributes["connection"]
    context.configure(connection=connection, target_metadata=metadata)
# The caller begins and commits the transaction, which holds the lock: all or nothing.
context.run_migrations()
