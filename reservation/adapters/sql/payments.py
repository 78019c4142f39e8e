"""Payments in SQL: each payment's latest state, the PG's answers, and scheduled checks.

payments         one row per payment key      its state, as the PG showed it last
payment_answers  one row per answer           appended, for an order's history and as evidence
payment_checks   one row per payment key      a payment to look up again, with a due time: an
                                              ended attempt that no look-up has proven, an open
                                              virtual account, a cancel that the PG did not take
"""

from collections.abc import Collection, Sequence
from functools import cache
from typing import Any, Final, NamedTuple

import msgspec
from sqlalchemy import (
    ColumnElement,
    Connection,
    Insert,
    RowMapping,
    and_,
    case,
    delete,
    func,
    or_,
    select,
    update,
)

from reservation.adapters.sql.bulk import among, insert_into
from reservation.adapters.sql.engine import Database
from reservation.adapters.sql.group_commit import GroupCommit
from reservation.adapters.sql.tables import (
    orders,
    payment_answers,
    payment_attempts,
    payment_checks,
    payments,
)
from reservation.domain.clock import as_datetime, as_ms
from reservation.domain.payment_gateway import Payment, PaymentStatus, VirtualAccount
from reservation.domain.states import Status

__all__ = ["AnswerRow", "PaymentCheck", "PaymentRepository", "UnsoldRow"]

#: Look-ups read per payment: those of an hour at the settler's longest back-off.
LOOK_UPS_MAX: Final = 200
#: Marks an answer bound to its idempotency key, in `payment_answers.answer`.
_BOUND: Final = '"bound_to_key":true'
#: The other definite 4xx, which the PG also binds to the key.
_MISSING: Final = '"type":"PaymentMissing"'
_REFUSED: Final = '"type":"Declined"'
#: The answers after which a retry needs another idempotency key.
_ENDS_KEY: Final = (_BOUND, _MISSING, _REFUSED)


#: Orders that were sold for their payment and still are.
_SOLD_STATUSES: Final = (Status.AWAITING_DEPOSIT.value, Status.CONFIRMED.value)

_CANCELED: Final = PaymentStatus.CANCELED.value

#: Columns that only some answers carry: if absent, the stored value stays.
_KEPT: Final = (
    "method",
    "approved_at_ms",
    "secret",
    "due_at_ms",
    "account_bank",
    "account_number",
    "account_holder",
    "account_refund",
)
_NEW_ANSWERS: Final = payment_answers.insert()


class AnswerRow(msgspec.Struct, frozen=True, kw_only=True):
    """An answer of the PG: JSON text, scrubbed of secrets by the caller."""

    order_id: str
    payment_key: str
    kind: str
    answer: str
    created_at_ms: int


class _Shown(NamedTuple):
    """A payment as the PG showed it, when, and the answer to be stored with it."""

    payment: Payment
    at_ms: int
    answer: AnswerRow | None


class UnsoldRow(msgspec.Struct, frozen=True, kw_only=True):
    """A DONE payment whose order is not sold."""

    order_id: str
    payment_key: str
    #: The order's status in SQL; None if SQL has no such order.
    status: str | None


class PaymentCheck(msgspec.Struct, frozen=True, kw_only=True):
    """A payment to look up again, and when."""

    payment_key: str
    order_id: str
    due_at_ms: int
    #: Look-ups that the PG has answered since the payment was listed.
    looks: int


class PaymentRepository:
    """Stores payments, the PG's answers about them, and their scheduled checks.

    Concurrent writes of payments and answers share a transaction.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._group = GroupCommit[AnswerRow | _Shown, None](self._commit)

    async def aclose(self) -> None:
        """Wait for writes in progress; no new ones may arrive."""
        await self._group.aclose()

    async def put(self, payment: Payment, at_ms: int, *, answer: AnswerRow | None = None) -> None:
        """Store a payment as the PG showed it at this time, without its failure code.

        The answer that shows it, if given, is appended in the same transaction.

        A payment that is older than the stored one changes nothing, nor does one that is shown as
        anything else after it was cancelled. Fields that only some answers
        carry (method, approval, secret, due date, virtual account) keep their value if absent.

        Raises:
            SQLAlchemyError, OSError: the outcome is unknown; retry the same call, without the
                answer, which a repeat may append twice.
        """
        await self._group.submit(_Shown(payment, at_ms, answer))

    async def add_answer(self, answer: AnswerRow) -> None:
        """Append an answer of the PG to its order's history.

        Raises:
            SQLAlchemyError, OSError: the outcome is unknown; a repeat may append it twice.
        """
        await self._group.submit(answer)

    async def _commit(self, rows: Sequence[AnswerRow | _Shown]) -> list[None]:
        given = [row if isinstance(row, AnswerRow) else row.answer for row in rows]
        answers = [msgspec.structs.asdict(answer) for answer in given if answer is not None]
        shown = [row for row in rows if isinstance(row, _Shown)]
        # A fixed lock order in all processes prevents deadlocks.
        shown.sort(key=lambda row: row.payment.payment_key)
        values = [_columns_of(row.payment, row.at_ms) for row in shown]

        def write(connection: Connection) -> None:
            if answers:
                connection.execute(_NEW_ANSWERS, answers)
            if values:
                connection.execute(_kept(connection.dialect.name), values)

        await self._database.run_write(write)
        return [None] * len(rows)

    async def list_by_order(self, order_id: str) -> list[Payment]:
        """The order's payments that the PG has shown, the newest answer first."""
        async with self._database.read() as connection:
            found = await connection.execute(
                select(payments)
                .where(payments.c.order_id == order_id)
                .order_by(payments.c.updated_at_ms.desc(), payments.c.payment_key)
            )
            return [_payment(row) for row in found.mappings()]

    async def get(self, payment_key: str) -> Payment | None:
        """The payment with this key, or None."""
        async with self._database.read() as connection:
            found = await connection.execute(
                select(payments).where(payments.c.payment_key == payment_key)
            )
            row = found.mappings().one_or_none()
        return _payment(row) if row else None

    async def agreeing(self, payment_keys: Collection[str]) -> dict[str, tuple[str, str]]:
        """Those of these payments whose order agrees: the order id and the payment's status.

        An order agrees with a DONE payment if it is CONFIRMED by it; an order agrees with a payment
        in another state if it is not sold.
        """
        done = payments.c.status == PaymentStatus.DONE.value
        own = orders.c.payment_key == payments.c.payment_key
        async with self._database.read() as connection:
            found = await connection.execute(
                select(payments.c.payment_key, payments.c.order_id, payments.c.status)
                .join(orders, orders.c.order_id == payments.c.order_id)
                .where(
                    among(connection, payments.c.payment_key, payment_keys),
                    or_(
                        and_(done, own, orders.c.status == Status.CONFIRMED.value),
                        and_(~done, ~and_(own, orders.c.status.in_(_SOLD_STATUSES))),
                    ),
                )
            )
            return {row.payment_key: (row.order_id, row.status) for row in found}

    async def list_unsold(self, sale_id: str, limit: int) -> list[UnsoldRow]:
        """DONE payments of the sale whose order in SQL is not sold for them."""
        attempts = payment_attempts
        async with self._database.read() as connection:
            found = await connection.execute(
                select(payments.c.order_id, payments.c.payment_key, orders.c.status)
                .join(attempts, attempts.c.payment_key == payments.c.payment_key)
                .join(orders, orders.c.order_id == payments.c.order_id, isouter=True)
                .where(
                    attempts.c.sale_id == sale_id,
                    payments.c.status == "DONE",
                    orders.c.status.is_(None)
                    | (orders.c.status != Status.CONFIRMED.value)
                    | (orders.c.payment_key != payments.c.payment_key),
                )
                .order_by(payments.c.order_id)
                .limit(limit)
            )
            return [UnsoldRow(**row) for row in found.mappings()]

    async def count_bound_confirms(self, order_id: str, payment_key: str) -> int:
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
                            for one in _ENDS_KEY
                        )
                    ),
                )
            )
            return found.scalar_one()

    async def newest_done(self) -> str | None:
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

    async def count_bound_cancels(self, order_id: str, payment_key: str) -> int:
        """The number of idempotency keys under which a cancel of this payment has a bound answer.

        An answer names its attempt, so repeated answers to one key are equal and count once.
        """
        async with self._database.read() as connection:
            found = await connection.execute(
                select(func.count(payment_answers.c.answer.distinct())).where(
                    payment_answers.c.order_id == order_id,
                    payment_answers.c.payment_key == payment_key,
                    payment_answers.c.kind == "cancel",
                    or_(
                        *(
                            payment_answers.c.answer.contains(one, autoescape=True)
                            for one in _ENDS_KEY
                        )
                    ),
                )
            )
            return found.scalar_one()

    async def schedule_check(
        self, payment_key: str, order_id: str, due_at_ms: int, *, anew: bool = False
    ) -> int:
        """Schedule a check, due no later than this; returns the resulting due time.

        `anew` begins to count its look-ups again.
        """
        row = {"payment_key": payment_key, "order_id": order_id, "due_at_ms": due_at_ms, "looks": 0}
        async with self._database.write() as connection:
            statement = insert_into(connection.dialect.name, payment_checks)
            due, wanted = payment_checks.c.due_at_ms, statement.excluded.due_at_ms
            earlier = case((due > wanted, wanted), else_=due)
            await connection.execute(
                statement.on_conflict_do_update(
                    index_elements=[payment_checks.c.payment_key],
                    set_={"due_at_ms": earlier} | ({"looks": 0} if anew else {}),
                ),
                row,
            )
            found = await connection.execute(
                select(payment_checks.c.due_at_ms).where(
                    payment_checks.c.payment_key == payment_key
                )
            )
            return found.scalar_one()

    async def list_due_checks(self, now_ms: int, limit: int) -> list[PaymentCheck]:
        """Due payments, the longest overdue first."""
        async with self._database.read() as connection:
            found = await connection.execute(
                select(payment_checks)
                .where(payment_checks.c.due_at_ms <= now_ms)
                .order_by(payment_checks.c.due_at_ms)
                .limit(limit)
            )
            return [PaymentCheck(**row) for row in found.mappings()]

    async def lease_check(self, check: PaymentCheck, until_ms: int) -> PaymentCheck | None:
        """Lease a due check until then; None if another worker has it."""
        async with self._database.write() as connection:
            taken = await connection.execute(
                update(payment_checks).where(_is_unchanged(check)).values(due_at_ms=until_ms)
            )
        return msgspec.structs.replace(check, due_at_ms=until_ms) if taken.rowcount else None

    async def reschedule_check(self, check: PaymentCheck, due_at_ms: int, looks: int) -> None:
        """Reschedule a check, unless it was rescheduled since it was read."""
        async with self._database.write() as connection:
            await connection.execute(
                update(payment_checks)
                .where(_is_unchanged(check))
                .values(due_at_ms=due_at_ms, looks=looks)
            )

    async def remove_check(self, check: PaymentCheck) -> None:
        """Remove a finished check, unless it was rescheduled since it was read."""
        async with self._database.write() as connection:
            await connection.execute(delete(payment_checks).where(_is_unchanged(check)))


def _columns_of(payment: Payment, at_ms: int) -> dict[str, Any]:
    account = payment.virtual_account
    return {
        "payment_key": payment.payment_key,
        "order_id": payment.order_id,
        "status": payment.status,
        "total_amount": payment.total_amount,
        "balance_amount": payment.balance_amount,
        "currency": payment.currency,
        "method": payment.method,
        "approved_at_ms": as_ms(payment.approved_at) if payment.approved_at else None,
        "secret": payment.secret,
        "due_at_ms": as_ms(payment.due_at) if payment.due_at else None,
        "account_bank": account.bank if account else None,
        "account_number": account.account_number if account else None,
        "account_holder": account.holder_name if account else None,
        "account_refund": account.refund_status if account else None,
        "updated_at_ms": at_ms,
    }


def _payment(row: RowMapping) -> Payment:
    account = None
    if row["account_number"] is not None:
        account = VirtualAccount(
            bank=row["account_bank"] or "",
            account_number=row["account_number"],
            holder_name=row["account_holder"] or "",
            refund_status=row["account_refund"],
        )
    approved_at_ms, due_at_ms = row["approved_at_ms"], row["due_at_ms"]
    return Payment(
        payment_key=row["payment_key"],
        order_id=row["order_id"],
        status=row["status"],
        total_amount=row["total_amount"],
        balance_amount=row["balance_amount"],
        currency=row["currency"],
        method=row["method"],
        approved_at=None if approved_at_ms is None else as_datetime(approved_at_ms),
        virtual_account=account,
        due_at=None if due_at_ms is None else as_datetime(due_at_ms),
        secret=row["secret"],
    )


@cache
def _kept(dialect: str) -> Insert:
    statement = insert_into(dialect, payments)
    new = statement.excluded
    changed = ("status", "total_amount", "balance_amount", "currency", "updated_at_ms")
    return statement.on_conflict_do_update(
        index_elements=[payments.c.payment_key],
        set_={name: new[name] for name in changed}
        | {name: func.coalesce(new[name], payments.c[name]) for name in _KEPT},
        where=(payments.c.order_id == new.order_id)
        & (payments.c.updated_at_ms <= new.updated_at_ms)
        # A lookup may be answered before the cancel and stored after it.
        & ((payments.c.status != _CANCELED) | (new.status == _CANCELED)),
    )


def _is_unchanged(check: PaymentCheck) -> ColumnElement[bool]:
    """Optimistic lock: a webhook may reschedule a check in progress, which may miss its news."""
    return (payment_checks.c.payment_key == check.payment_key) & (
        payment_checks.c.due_at_ms == check.due_at_ms
    )
