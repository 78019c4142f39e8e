"""Differences in SQL: payments that the gateway lists and SQL lacks, or has in another state."""

from collections.abc import Collection, Sequence
from enum import StrEnum
from typing import Any, Final

import msgspec
from sqlalchemy import RowMapping, exists, select, update

from reservation.adapters.sql.bulk import among, insert_into
from reservation.adapters.sql.engine import Database
from reservation.adapters.sql.tables import differences, orders, payment_attempts, restores
from reservation.domain.states import Status

__all__ = ["Difference", "DifferenceKind", "DifferenceRepository"]

#: An order in one of these was sold for its payment.
_SOLD = (Status.AWAITING_DEPOSIT, Status.CONFIRMED, Status.REFUNDED)


#: Differences of one transaction.
PAGE: Final = 500


class DifferenceKind(StrEnum):
    """The kinds of differences."""

    #: The service settles the payment itself, after the rebuild of its sale.
    SETTLED_LATER = "settled_later"
    #: SQL and Redis have no such order.
    UNKNOWN_ORDER = "unknown_order"
    #: The order was rebuilt without this payment: its units were gone, or the payment was listed
    #: later.
    NOT_PLACED = "not_placed"
    #: The order cannot be sold for this payment: another amount, another payment, or its sale is
    #: archived.
    OTHER_PAYMENT = "other_payment"
    #: SQL has the order as sold, and the gateway has given money back.
    GIVEN_BACK = "given_back"


class Difference(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """One payment."""

    gateway: str
    payment_key: str
    order_id: str
    kind: DifferenceKind
    #: Our state of the order; empty if SQL lacks it.
    ours: str
    #: The gateway's state of the payment, and the money that it still has.
    theirs: str
    amount: int
    currency: str
    found_at_ms: int


_COLUMNS = [differences.c[name] for name in Difference.__struct_fields__]


class DifferenceRepository:
    """Stores differences until they are settled."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def put(self, found: Sequence[Difference]) -> None:
        """Store the differences; one that was found before keeps its first time.

        They are independent of each other, so other writers get a turn after each page.
        """
        for start in range(0, len(found), PAGE):
            await self._put(found[start : start + PAGE])

    async def _put(self, found: Sequence[Difference]) -> None:
        async with self._database.write() as connection:
            statement = insert_into(connection.dialect.name, differences)
            changed = {
                name: statement.excluded[name]
                for name in ("order_id", "kind", "ours", "theirs", "amount", "currency", "state")
            }
            statement = statement.on_conflict_do_update(
                index_elements=["gateway", "payment_key"], set_=changed
            )
            rows = [
                msgspec.structs.asdict(one) | {"kind": one.kind.value, "state": "open"}
                for one in found
            ]
            await connection.execute(statement, rows)

    async def settle(self, payment_keys: Collection[str]) -> None:
        """Mark the differences of these payments as settled."""
        async with self._database.write() as connection:
            await connection.execute(
                update(differences)
                .where(among(connection, differences.c.payment_key, payment_keys))
                .values(state="settled")
            )

    async def list_open(self) -> list[Difference]:
        """The open differences, by order id."""
        async with self._database.read() as connection:
            found = await connection.execute(
                select(*_COLUMNS)
                .where(differences.c.state == "open")
                .order_by(differences.c.order_id, differences.c.payment_key)
            )
            return [_difference(row) for row in found.mappings()]

    async def has_order(self, order_id: str) -> bool:
        """Whether the gateway has money for this order that SQL cannot place."""
        return await self._any(order_id=order_id)

    async def is_left_to_operator(self, payment_key: str) -> bool:
        """Whether the payment must not be cancelled automatically, because SQL was restored.

        Its buyer may have seen the order as sold before the restore. That is so for a difference,
        and for a payment that SQL never requested: its intent may be among the lost ones. A
        difference whose order has been sold for the payment since does not count.
        """
        if await self._any(payment_key=payment_key):
            return True
        requested = select(payment_attempts.c.payment_key).where(
            payment_attempts.c.payment_key == payment_key
        )
        async with self._database.read() as connection:
            if (await connection.execute(select(restores.c.number).limit(1))).first() is None:
                return False
            return (await connection.execute(requested)).first() is None

    async def _any(self, **wanted: str) -> bool:
        sold = exists().where(
            orders.c.order_id == differences.c.order_id,
            orders.c.payment_key == differences.c.payment_key,
            orders.c.status.in_(sorted(_SOLD)),
        )
        conditions = [differences.c[name] == value for name, value in wanted.items()]
        async with self._database.read() as connection:
            found = await connection.execute(
                select(differences.c.payment_key)
                .where(differences.c.state == "open", ~sold, *conditions)
                .limit(1)
            )
            return found.first() is not None


def _difference(row: RowMapping) -> Difference:
    values: dict[str, Any] = {**row, "kind": DifferenceKind(row["kind"])}
    return Difference(**values)
