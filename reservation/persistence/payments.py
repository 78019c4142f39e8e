"""What the PG said: every answer for an order's history, and each payment as it stands."""

from typing import Final

import msgspec
from sqlalchemy import func, select

from reservation.persistence.bulk import insert_into
from reservation.persistence.database import Database
from reservation.persistence.tables import payment_answers, payments

__all__ = [
    "PaymentRow",
    "bound_answers",
    "payment_by_key",
    "payment_of",
    "put_payment",
    "record_answer",
]

#: How an answer that stays bound to its idempotency key is written in `payment_answers.answer`.
_BOUND: Final = '"bound_to_key":true'


class PaymentRow(msgspec.Struct, frozen=True, kw_only=True):
    """A payment as the PG showed it last."""

    payment_key: str
    order_id: str
    #: The PG's word.
    status: str
    total_amount: int
    balance_amount: int
    currency: str
    method: str | None = None
    approved_at_ms: int | None = None
    #: Of a virtual account: what a deposit's webhook must carry.
    secret: str | None = None
    due_at_ms: int | None = None
    updated_at_ms: int


_COLUMNS = [payments.c[name] for name in PaymentRow.__struct_fields__]


async def record_answer(
    database: Database, *, order_id: str, payment_key: str, kind: str, answer: str, now_ms: int
) -> None:
    """Append an answer of the PG: JSON text without secrets, as the caller has scrubbed it."""
    async with database.write() as connection:
        await connection.execute(
            payment_answers.insert().values(
                order_id=order_id,
                payment_key=payment_key,
                kind=kind,
                answer=answer,
                created_at_ms=now_ms,
            )
        )


async def bound_answers(database: Database, order_id: str, payment_key: str) -> int:
    """How many answers to confirms of this payment stay bound to the key that they came under."""
    async with database.read() as connection:
        found = await connection.execute(
            select(func.count())
            .select_from(payment_answers)
            .where(
                payment_answers.c.order_id == order_id,
                payment_answers.c.payment_key == payment_key,
                payment_answers.c.kind == "confirm",
                payment_answers.c.answer.contains(_BOUND, autoescape=True),
            )
        )
        return found.scalar_one()


async def put_payment(database: Database, payment: PaymentRow) -> None:
    """Keep the payment as the PG shows it now; an answer that is older changes nothing.

    What only some answers carry (method, approval, secret, due date) stays where it is absent.
    """
    values = msgspec.structs.asdict(payment)
    async with database.write() as connection:
        statement = insert_into(connection, payments)
        new = statement.excluded
        kept = ("method", "approved_at_ms", "secret", "due_at_ms")
        changed = ("status", "total_amount", "balance_amount", "currency", "updated_at_ms")
        await connection.execute(
            statement.on_conflict_do_update(
                index_elements=[payments.c.payment_key],
                set_={name: new[name] for name in changed}
                | {name: func.coalesce(new[name], payments.c[name]) for name in kept},
                where=(payments.c.order_id == new.order_id)
                & (payments.c.updated_at_ms <= new.updated_at_ms),
            ),
            values,
        )


async def payment_of(database: Database, order_id: str) -> PaymentRow | None:
    """The order's payment: the one that was approved, else the latest; None without any."""
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
