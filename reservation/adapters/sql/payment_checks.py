"""Scheduled payment checks: a durable list of payments to look up again, each with a due time.

payment_checks  one row per payment key   an ended attempt that no look-up has proven, an open
                                          virtual account, a cancel that the PG did not take
"""

import msgspec
from sqlalchemy import (
    BigInteger,
    Column,
    ColumnElement,
    Index,
    PrimaryKeyConstraint,
    Table,
    delete,
    select,
    update,
)

from reservation.adapters.sql.bulk import insert_into
from reservation.adapters.sql.engine import Database
from reservation.adapters.sql.tables import Id, metadata

__all__ = ["PaymentCheck", "PaymentChecks", "payment_checks"]

payment_checks = Table(
    "payment_checks",
    metadata,
    Column("payment_key", Id, nullable=False),
    Column("order_id", Id, nullable=False),
    Column("due_at_ms", BigInteger, nullable=False),
    Column("looks", BigInteger, nullable=False),
    PrimaryKeyConstraint("payment_key", name="pk_payment_checks"),
    Index("ix_payment_checks_due", "due_at_ms"),
)


class PaymentCheck(msgspec.Struct, frozen=True, kw_only=True):
    """One payment to check."""

    payment_key: str
    order_id: str
    due_at_ms: int
    #: Look-ups that the PG has answered since the payment was listed.
    looks: int


class PaymentChecks:
    """Reads and changes the list."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def schedule(self, payment_key: str, order_id: str, due_at_ms: int) -> int:
        """Schedule a check, due no later than this; returns the resulting due time."""
        row = {"payment_key": payment_key, "order_id": order_id, "due_at_ms": due_at_ms, "looks": 0}
        async with self._database.write() as connection:
            statement = insert_into(connection, payment_checks)
            earlier = payment_checks.c.due_at_ms > statement.excluded.due_at_ms
            await connection.execute(
                statement.on_conflict_do_update(
                    index_elements=[payment_checks.c.payment_key],
                    set_={"due_at_ms": statement.excluded.due_at_ms},
                    where=earlier,
                ),
                row,
            )
            found = await connection.execute(
                select(payment_checks.c.due_at_ms).where(
                    payment_checks.c.payment_key == payment_key
                )
            )
            return found.scalar_one()

    async def due(self, now_ms: int, limit: int) -> list[PaymentCheck]:
        """Due payments, the longest overdue first."""
        async with self._database.read() as connection:
            found = await connection.execute(
                select(payment_checks)
                .where(payment_checks.c.due_at_ms <= now_ms)
                .order_by(payment_checks.c.due_at_ms)
                .limit(limit)
            )
            return [PaymentCheck(**row) for row in found.mappings()]

    async def take(self, check: PaymentCheck, until_ms: int) -> PaymentCheck | None:
        """Lease a due payment until then; None where another worker has it."""
        async with self._database.write() as connection:
            taken = await connection.execute(
                update(payment_checks).where(_is_unchanged(check)).values(due_at_ms=until_ms)
            )
        return msgspec.structs.replace(check, due_at_ms=until_ms) if taken.rowcount else None

    async def put_off(self, check: PaymentCheck, due_at_ms: int, looks: int) -> None:
        """Reschedule a check, unless it was rescheduled since it was read."""
        async with self._database.write() as connection:
            await connection.execute(
                update(payment_checks)
                .where(_is_unchanged(check))
                .values(due_at_ms=due_at_ms, looks=looks)
            )

    async def drop(self, check: PaymentCheck) -> None:
        """Remove a finished check, unless it was rescheduled since it was read."""
        async with self._database.write() as connection:
            await connection.execute(delete(payment_checks).where(_is_unchanged(check)))


def _is_unchanged(check: PaymentCheck) -> ColumnElement[bool]:
    """Optimistic lock: a webhook may reschedule a check in progress, which may miss its news."""
    return (payment_checks.c.payment_key == check.payment_key) & (
        payment_checks.c.due_at_ms == check.due_at_ms
    )
