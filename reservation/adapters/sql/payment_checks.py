"""Payments that are looked at once more later: a durable list with a due time for each.

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
    """One payment to look at."""

    payment_key: str
    order_id: str
    due_at_ms: int
    #: Look-ups that the PG has answered since it is on the list.
    looks: int


class PaymentChecks:
    """Reads and changes the list."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def schedule(self, payment_key: str, order_id: str, due_at_ms: int) -> int:
        """Put a payment on the list, due no later than this; when it is due there."""
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
        """Payments that are due, the longest first."""
        async with self._database.read() as connection:
            found = await connection.execute(
                select(payment_checks)
                .where(payment_checks.c.due_at_ms <= now_ms)
                .order_by(payment_checks.c.due_at_ms)
                .limit(limit)
            )
            return [PaymentCheck(**row) for row in found.mappings()]

    async def take(self, check: PaymentCheck, until_ms: int) -> PaymentCheck | None:
        """Keep a due payment from other workers until then; None where one of them has it."""
        async with self._database.write() as connection:
            taken = await connection.execute(
                update(payment_checks).where(_is_unchanged(check)).values(due_at_ms=until_ms)
            )
        return msgspec.structs.replace(check, due_at_ms=until_ms) if taken.rowcount else None

    async def put_off(self, check: PaymentCheck, due_at_ms: int, looks: int) -> None:
        """Look at it again then, unless an earlier look was asked for since it was read."""
        async with self._database.write() as connection:
            await connection.execute(
                update(payment_checks)
                .where(_is_unchanged(check))
                .values(due_at_ms=due_at_ms, looks=looks)
            )

    async def drop(self, check: PaymentCheck) -> None:
        """Nothing more is to be found out about it, unless another look was asked for since."""
        async with self._database.write() as connection:
            await connection.execute(delete(payment_checks).where(_is_unchanged(check)))


def _is_unchanged(check: PaymentCheck) -> ColumnElement[bool]:
    """A webhook may ask for another look while one is under way, which may not see its news."""
    return (payment_checks.c.payment_key == check.payment_key) & (
        payment_checks.c.due_at_ms == check.due_at_ms
    )
