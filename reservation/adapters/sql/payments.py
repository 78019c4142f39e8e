"""Payments in SQL: the PG's answers for an order's history, and each payment's latest state."""

from collections.abc import Sequence
from typing import Final

import msgspec
from sqlalchemy import Insert, func, or_, select
from sqlalchemy.ext.asyncio import AsyncConnection

from reservation.adapters.sql.bulk import insert_into
from reservation.adapters.sql.engine import Database
from reservation.adapters.sql.group_commit import GroupCommit
from reservation.adapters.sql.tables import payment_answers, payments

__all__ = [
    "AnswerRow",
    "PaymentEvidence",
    "PaymentRow",
    "PaymentWriter",
    "bound_cancels",
    "payment_by_key",
    "payment_of",
]

#: Look-ups read per payment: those of an hour at the settler's longest back-off.
LOOK_UPS_MAX: Final = 200
#: Marks an answer bound to its idempotency key, in `payment_answers.answer`.
_BOUND: Final = '"bound_to_key":true'
#: The other definite 4xx, which the PG also binds to the key.
_MISSING: Final = '"type":"PaymentMissing"'
_REFUSED: Final = '"type":"Declined"'


class PaymentRow(msgspec.Struct, frozen=True, kw_only=True):
    """A payment as last shown by the PG."""

    payment_key: str
    order_id: str
    #: The PG's status.
    status: str
    total_amount: int
    balance_amount: int
    currency: str
    method: str | None = None
    approved_at_ms: int | None = None
    #: Of a virtual account: the secret that a deposit's webhook must carry.
    secret: str | None = None
    due_at_ms: int | None = None
    #: The virtual account for the buyer's deposit.
    account_bank: str | None = None
    account_number: str | None = None
    account_holder: str | None = None
    #: The PG's status of the bank transfer of its refund.
    account_refund: str | None = None
    updated_at_ms: int


_COLUMNS = [payments.c[name] for name in PaymentRow.__struct_fields__]


class AnswerRow(msgspec.Struct, frozen=True, kw_only=True):
    """An answer of the PG: JSON text, scrubbed of secrets by the caller."""

    order_id: str
    payment_key: str
    kind: str
    answer: str
    created_at_ms: int


class PaymentWriter:
    """Writes answers and payments, concurrent ones in one transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._group = GroupCommit[AnswerRow | PaymentRow, None](self._commit)

    async def write(self, row: AnswerRow | PaymentRow) -> None:
        """Append an answer, or store a payment as the PG shows it now.

        A payment that is older than the stored one changes nothing. Fields that only some answers
        carry (method, approval, secret, due date, virtual account) keep their value where absent.

        Raises:
            SQLAlchemyError, OSError: the outcome is unknown.
        """
        await self._group.write(row)

    async def aclose(self) -> None:
        """Wait for writes in progress; no new ones may arrive."""
        await self._group.aclose()

    async def _commit(self, rows: Sequence[AnswerRow | PaymentRow]) -> list[None]:
        answers = [msgspec.structs.asdict(row) for row in rows if isinstance(row, AnswerRow)]
        shown = [row for row in rows if isinstance(row, PaymentRow)]
        # A fixed lock order in all processes prevents deadlocks.
        shown.sort(key=lambda row: row.payment_key)
        async with self._database.write() as connection:
            if answers:
                await connection.execute(payment_answers.insert(), answers)
            if shown:
                values = [msgspec.structs.asdict(row) for row in shown]
                await connection.execute(_kept(connection), values)
        return [None] * len(rows)


def _kept(connection: AsyncConnection) -> Insert:
    statement = insert_into(connection, payments)
    new = statement.excluded
    kept = (
        "method",
        "approved_at_ms",
        "secret",
        "due_at_ms",
        "account_bank",
        "account_number",
        "account_holder",
        "account_refund",
    )
    changed = ("status", "total_amount", "balance_amount", "currency", "updated_at_ms")
    return statement.on_conflict_do_update(
        index_elements=[payments.c.payment_key],
        set_={name: new[name] for name in changed}
        | {name: func.coalesce(new[name], payments.c[name]) for name in kept},
        where=(payments.c.order_id == new.order_id)
        & (payments.c.updated_at_ms <= new.updated_at_ms),
    )


class PaymentEvidence:
    """Evidence from the PG's past answers, for the next request and its answer."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def bound_answers(self, order_id: str, payment_key: str) -> int:
        """The number of this payment's confirm answers bound to their idempotency key."""
        async with self._database.read() as connection:
            found = await connection.execute(
                select(func.count())
                .select_from(payment_answers)
                .where(
                    payment_answers.c.order_id == order_id,
                    payment_answers.c.payment_key == payment_key,
                    payment_answers.c.kind == "confirm",
                    or_(
                        *(
                            payment_answers.c.answer.contains(one, autoescape=True)
                            for one in (_BOUND, _MISSING, _REFUSED)
                        )
                    ),
                )
            )
            return found.scalar_one()

    async def newest_done_payment(self) -> str | None:
        """The key of the DONE payment that was approved last, or None."""
        async with self._database.read() as connection:
            found = await connection.execute(
                select(payments.c.payment_key)
                .where(payments.c.status == "DONE")
                .order_by(payments.c.approved_at_ms.desc().nulls_last())
                .limit(1)
            )
            return found.scalar_one_or_none()

    async def missing_since(self, order_id: str, payment_key: str) -> int | None:
        """The start of the current run of 404s to look-ups of this payment; None without one."""
        async with self._database.read() as connection:
            found = await connection.execute(
                select(payment_answers.c.created_at_ms, payment_answers.c.answer)
                .where(
                    payment_answers.c.order_id == order_id,
                    payment_answers.c.payment_key == payment_key,
                    payment_answers.c.kind == "look_up",
                )
                .order_by(payment_answers.c.answer_id.desc())
                .limit(LOOK_UPS_MAX)
            )
            since: int | None = None
            for at_ms, answer in found:
                if _MISSING not in answer:
                    break
                since = at_ms
            return since


async def bound_cancels(
    database: Database, order_id: str, payment_key: str, *, refusals: bool
) -> int:
    """The number of idempotency keys under which a cancel of this payment has a bound answer.

    An answer names its attempt, so repeated answers to one key are equal and count once. `refusals`
    adds final refusals to the count.
    """
    bound = [_BOUND, _MISSING, *([_REFUSED] if refusals else [])]
    async with database.read() as connection:
        found = await connection.execute(
            select(func.count(payment_answers.c.answer.distinct())).where(
                payment_answers.c.order_id == order_id,
                payment_answers.c.payment_key == payment_key,
                payment_answers.c.kind == "cancel",
                or_(*(payment_answers.c.answer.contains(one, autoescape=True) for one in bound)),
            )
        )
        return found.scalar_one()


async def payment_of(database: Database, order_id: str) -> PaymentRow | None:
    """The order's payment: the approved one, else the latest; None without any."""
    async with database.read() as connection:
        found = await connection.execute(
            select(*_COLUMNS)
            .where(payments.c.order_id == order_id)
            .order_by(
                payments.c.approved_at_ms.desc().nulls_last(), payments.c.updated_at_ms.desc()
            )
            .limit(1)
        )
        row = found.mappings().one_or_none()
    return PaymentRow(**row) if row else None


async def payment_by_key(database: Database, payment_key: str) -> PaymentRow | None:
    """The payment with this key, or None."""
    async with database.read() as connection:
        found = await connection.execute(
            select(*_COLUMNS).where(payments.c.payment_key == payment_key)
        )
        row = found.mappings().one_or_none()
    return PaymentRow(**row) if row else None
