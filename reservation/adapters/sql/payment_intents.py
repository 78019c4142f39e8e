"""Payment attempts and intents in SQL: committed before any request for money to the PG.

Two tables exclude double charges, regardless of which process comes first or how late:

    payment_attempts  one row per payment key    a key always belongs to one order; after its
                                                 cancel is recorded, it gets no new intent
    payment_intents   one row per order, fence   an intent or a void, whichever is first

The race of a caller of the PG and a settler that gives up on it, which these rows decide:
    caller:  INSERT intent -> WRITTEN -> confirm leaves
    settler:                 INSERT void -> INTENT_EXISTS: ask the PG how it ended
or
    settler: INSERT void -> VOIDED -> the stock goes back
    caller:                 INSERT intent -> VOIDED: no call

A cancel whose answer is lost may still take effect minutes later. So it is recorded before it
leaves, and from then on that payment is cancelled again rather than sold.

A rebuild that claims a payment again writes its intent again, under the fence of that claim. A
cancel that was decided before the claim finds it, and is not sent.
"""

from collections.abc import Sequence
from enum import Enum, auto
from functools import cache
from typing import Any, Final

import msgspec
from sqlalchemy import Connection, Executable, Select, and_, or_, select, union_all, update

from reservation.adapters.sql.bulk import among, insert_into, insert_new, is_among, texts
from reservation.adapters.sql.engine import Database
from reservation.adapters.sql.group_commit import GroupCommit
from reservation.adapters.sql.tables import orders, payment_attempts, payment_intents
from reservation.domain.errors import BrokenInvariant

__all__ = [
    "Intent",
    "IntentOutcome",
    "IntentRepository",
    "IntentRow",
    "UnmetIntent",
    "VoidOutcome",
]

#: Rows of one page. If the flusher has stopped, unmet intents are as many as payments.
UNMET_PAGE: Final = 5_000


class IntentOutcome(Enum):
    """Outcome of an intent. The first that applies."""

    #: The key was used for another order before: nothing was inserted.
    KEY_OF_ANOTHER_ORDER = auto()
    #: Committed now.
    WRITTEN = auto()
    #: The same intent was committed before: a repeat.
    ALREADY_WRITTEN = auto()
    #: The attempt is void, or its payment is being cancelled: do not confirm it.
    VOIDED = auto()
    #: Another payment of this order has an intent under the same fence: Redis lost that claim.
    FENCE_OF_ANOTHER_KEY = auto()


class VoidOutcome(Enum):
    """Outcome of a void."""

    #: No intent can be written under this fence any more.
    VOIDED = auto()
    #: An intent exists: a call may have left.
    INTENT_EXISTS = auto()


class Intent(msgspec.Struct, frozen=True, kw_only=True):
    """A request to the PG before it leaves: order, fence, payment key and amount."""

    order_id: str
    sale_id: str
    fence: int
    payment_key: str
    amount: int
    currency: str
    idempotency_key: str
    now_ms: int
    #: The epoch in which Redis has the claim.
    epoch: str | None = None
    #: The order, JSON.
    reservation: str | None = None


class IntentRow(msgspec.Struct, frozen=True, kw_only=True):
    """One row; a void has no key, no amount and no idempotency key."""

    order_id: str
    fence: int
    kind: str
    payment_key: str | None
    amount: int | None
    currency: str | None
    idempotency_key: str | None
    created_at_ms: int


class UnmetIntent(msgspec.Struct, frozen=True, kw_only=True):
    """A payment that may have been requested at the PG, without an outcome in SQL."""

    order_id: str
    sale_id: str
    fence: int
    payment_key: str
    amount: int
    created_at_ms: int
    #: The epoch in which Redis had the claim; None in intents older than this column.
    epoch: str | None
    #: The order, JSON; None likewise.
    reservation: str | None


_Name = tuple[str, int]
#: A row of `payment_attempts`, every column in order.
_Attempt = tuple[str, str, str, int, None]

_COLUMNS = [payment_intents.c[name] for name in IntentRow.__struct_fields__]


class IntentRepository:
    """Stores the payment attempts of orders, their intents and their voids.

    Concurrent intents share a transaction.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._group = GroupCommit[Intent, IntentOutcome](self._commit)
        self._fences = GroupCommit[str, int](self._known_fences)

    async def aclose(self) -> None:
        """Wait for writes in progress; no new ones may arrive."""
        await self._group.aclose()
        await self._fences.aclose()

    async def add(self, intent: Intent) -> IntentOutcome:
        """Commit and sync an intent; only after that may the call to the PG leave.

        Raises:
            BrokenInvariant: this fence has another intent.
            SQLAlchemyError, OSError: the outcome is unknown; retry the same call.
        """
        return await self._group.submit(intent)

    async def _commit(self, intents: Sequence[Intent]) -> list[IntentOutcome | Exception]:
        return await self._database.run_write(lambda connection: _write(connection, intents))

    async def void(self, *, order_id: str, sale_id: str, fence: int, now_ms: int) -> VoidOutcome:
        """Void this fence, so that no intent can be written under it, unless one exists."""
        row = (order_id, fence, sale_id, "void", None, None, None, None, now_ms, None, None, None)
        async with self._database.write() as connection:
            await connection.run_sync(insert_new, payment_intents, [row])
            found = await connection.execute(
                select(payment_intents.c.kind).where(
                    payment_intents.c.order_id == order_id, payment_intents.c.fence == fence
                )
            )
            kind = found.scalar_one()
        return VoidOutcome.VOIDED if kind == "void" else VoidOutcome.INTENT_EXISTS

    async def intend_cancel(
        self, *, order_id: str, sale_id: str, fence: int, payment_key: str, now_ms: int
    ) -> bool:
        """Permanently bar this payment from being sold, before its cancel is sent.

        Args:
            order_id: the payment's order.
            sale_id: its sale.
            fence: the order's, as last read by the caller.
            payment_key: the PG's id of the payment.
            now_ms: the present time.

        Returns:
            Whether it is barred now. False where the PG may have been asked for this money under a
            later fence, or a rebuild has claimed the payment again; or where the key is another
            order's: the caller must not cancel.
        """
        async with self._database.write() as connection:
            row = _attempt(payment_key, order_id, sale_id, now_ms)
            await connection.run_sync(_insert_attempts, [row])
            of_this_key = payment_attempts.c.payment_key == payment_key
            existing = (
                await connection.execute(
                    select(payment_attempts).where(of_this_key).with_for_update()
                )
            ).one()
            if existing.order_id != order_id:
                return False
            if existing.cancel_intended_at_ms is not None:
                return True
            later = select(payment_intents.c.fence).where(
                payment_intents.c.order_id == order_id,
                payment_intents.c.payment_key == payment_key,
                payment_intents.c.fence > fence,
            )
            if (await connection.execute(later.limit(1))).first() is not None:
                return False
            await connection.execute(
                update(payment_attempts).where(of_this_key).values(cancel_intended_at_ms=now_ms)
            )
            return True

    async def is_cancel_intended(self, payment_key: str) -> bool:
        """Whether a cancel of this payment may have left."""
        async with self._database.read() as connection:
            found = await connection.execute(
                select(payment_attempts.c.cancel_intended_at_ms).where(
                    payment_attempts.c.payment_key == payment_key
                )
            )
            return found.scalar_one_or_none() is not None

    async def mark_ended(self, order_id: str, payment_key: str, now_ms: int) -> None:
        """Mark a payment as decided although its order has no event of it."""
        async with self._database.write() as connection:
            await connection.execute(
                update(payment_intents)
                .where(
                    payment_intents.c.order_id == order_id,
                    payment_intents.c.payment_key == payment_key,
                    payment_intents.c.ended_at_ms.is_(None),
                )
                .values(ended_at_ms=now_ms)
            )

    async def list_by_order(self, order_id: str) -> list[IntentRow]:
        """The order's intents and voids, oldest first."""
        async with self._database.read() as connection:
            found = await connection.execute(
                select(*_COLUMNS)
                .where(payment_intents.c.order_id == order_id)
                .order_by(payment_intents.c.fence)
            )
            return [IntentRow(**row) for row in found.mappings()]

    async def list_unmet(
        self,
        sale_id: str | None = None,
        *,
        order_id: str | None = None,
        since_ms: int | None = None,
        before_ms: int | None = None,
    ) -> list[UnmetIntent]:
        """Payments that may have been requested at the PG, without an outcome in SQL.

        One intent for each order and payment key, the latest claim first.

        Args:
            sale_id: of this sale alone.
            order_id: of this order alone.
            since_ms: only intents created at or after this time.
            before_ms: only intents created before this time.
        """
        wanted = _unmet(sale_id, order_id)
        if since_ms is not None:
            wanted = wanted.where(payment_intents.c.created_at_ms >= since_ms)
        if before_ms is not None:
            wanted = wanted.where(payment_intents.c.created_at_ms < before_ms)
        latest: dict[tuple[str, str], UnmetIntent] = {}
        after = ("", 0)
        while True:
            page = await self._page_after(wanted, after)
            # In the order of the fences: the last intent of a payment wins.
            latest |= {(intent.order_id, intent.payment_key): intent for intent in page}
            if len(page) < UNMET_PAGE:
                return sorted(latest.values(), key=lambda intent: (intent.order_id, -intent.fence))
            after = (page[-1].order_id, page[-1].fence)

    async def _page_after(self, wanted: Select[Any], after: tuple[str, int]) -> list[UnmetIntent]:
        intents = payment_intents
        page = (
            wanted.where(
                or_(
                    intents.c.order_id > after[0],
                    and_(intents.c.order_id == after[0], intents.c.fence > after[1]),
                )
            )
            .order_by(intents.c.order_id, intents.c.fence)
            .limit(UNMET_PAGE)
        )
        async with self._database.read() as connection:
            found = await connection.execute(page)
            return [UnmetIntent(**row) for row in found.mappings()]

    async def known_fence(self, order_id: str) -> int:
        """The highest fence that SQL has for an order, in its row or in an intent; 0 for none."""
        return await self._fences.submit(order_id)

    async def _known_fences(self, order_ids: Sequence[str]) -> list[int]:
        highest = await self._database.run_read(lambda connection: _highest(connection, order_ids))
        return [highest.get(order_id, 0) for order_id in order_ids]

    async def owner(self, payment_key: str) -> str | None:
        """The order that a payment key belongs to, permanently; None if it was never used."""
        async with self._database.read() as connection:
            found = await connection.execute(
                select(payment_attempts.c.order_id).where(
                    payment_attempts.c.payment_key == payment_key
                )
            )
            return found.scalar_one_or_none()


@cache
def _fences(dialect: str) -> Executable:
    """The fences of these orders (`ids`), in their intents and their rows."""
    return union_all(
        *(
            select(table.c.order_id, table.c.fence).where(
                is_among(dialect, table.c.order_id, "ids")
            )
            for table in (payment_intents, orders)
        )
    )


@cache
def _attempts(dialect: str) -> Executable:
    """The attempts with these payment keys (`ids`), locked."""
    return (
        select(payment_attempts)
        .where(is_among(dialect, payment_attempts.c.payment_key, "ids"))
        # Serializes with `intend_cancel`: it waits until these intents are visible, or they wait
        # for it.
        .with_for_update(read=True)
    )


@cache
def _new_attempts(dialect: str) -> Executable:
    # No conflict target: an existing row may conflict on either unique index.
    return insert_into(dialect, payment_attempts).on_conflict_do_nothing()


@cache
def _new_intents(dialect: str) -> Executable:
    """Inserts intents; returns the names of the new ones."""
    return (
        insert_into(dialect, payment_intents)
        .on_conflict_do_nothing()
        .returning(payment_intents.c.order_id, payment_intents.c.fence)
    )


def _highest(connection: Connection, order_ids: Sequence[str]) -> dict[str, int]:
    highest: dict[str, int] = {}
    dialect = connection.dialect.name
    found = connection.execute(_fences(dialect), {"ids": texts(dialect, order_ids)})
    for order_id, fence in found:
        highest[order_id] = max(fence or 0, highest.get(order_id, 0))
    return highest


def _write(connection: Connection, intents: Sequence[Intent]) -> list[IntentOutcome | Exception]:
    """Write intents; returns the outcome of each, in order."""
    keys = _take_keys(connection, intents)
    ours = [intent for intent in intents if keys[intent.payment_key] == (intent.order_id, False)]
    written = _insert(connection, ours)
    existing = _existing(connection, ours) if len(written) < len(ours) else {}
    outcomes: list[IntentOutcome | Exception] = []
    for intent in intents:
        name = (intent.order_id, intent.fence)
        owner, to_be_cancelled = keys[intent.payment_key]
        if owner != intent.order_id:
            outcomes.append(IntentOutcome.KEY_OF_ANOTHER_ORDER)
        elif to_be_cancelled:
            outcomes.append(IntentOutcome.VOIDED)
        elif name in written:
            written.remove(name)  # A second one of this batch is a repeat.
            outcomes.append(IntentOutcome.WRITTEN)
        else:
            outcomes.append(_repeat(intent, existing[name]))
    return outcomes


def _take_keys(connection: Connection, intents: Sequence[Intent]) -> dict[str, tuple[str, bool]]:
    """Bind each free payment key to its order.

    Returns:
        For each key, its owner (order id), and whether its payment is being cancelled.
    """
    rows = {
        intent.payment_key: _attempt(
            intent.payment_key, intent.order_id, intent.sale_id, intent.now_ms
        )
        for intent in reversed(intents)
    }
    # A fixed lock order in all processes prevents deadlocks.
    _insert_attempts(connection, [rows[key] for key in sorted(rows)])
    dialect = connection.dialect.name
    found = connection.execute(_attempts(dialect), {"ids": texts(dialect, rows.keys())})
    return {row.payment_key: (row.order_id, row.cancel_intended_at_ms is not None) for row in found}


def _insert_attempts(connection: Connection, rows: Sequence[_Attempt]) -> None:
    names = [column.name for column in payment_attempts.columns]
    if rows:
        connection.execute(
            _new_attempts(connection.dialect.name),
            [dict(zip(names, row, strict=True)) for row in rows],
        )


def _attempt(payment_key: str, order_id: str, sale_id: str, now_ms: int) -> _Attempt:
    return payment_key, order_id, sale_id, now_ms, None


def _insert(connection: Connection, intents: Sequence[Intent]) -> set[_Name]:
    """Insert the new ones; returns their names."""
    if not intents:
        return set()
    rows: dict[_Name, dict[str, Any]] = {
        (intent.order_id, intent.fence): {
            "order_id": intent.order_id,
            "fence": intent.fence,
            "sale_id": intent.sale_id,
            "kind": "intent",
            "payment_key": intent.payment_key,
            "amount": intent.amount,
            "currency": intent.currency,
            "idempotency_key": intent.idempotency_key,
            "created_at_ms": intent.now_ms,
            "epoch": intent.epoch,
            "reservation": intent.reservation,
            "ended_at_ms": None,
        }
        for intent in reversed(intents)
    }
    found = connection.execute(
        _new_intents(connection.dialect.name), [rows[name] for name in sorted(rows)]
    )
    return {(row.order_id, row.fence) for row in found}


def _existing(connection: Connection, intents: Sequence[Intent]) -> dict[_Name, IntentRow]:
    order_ids = {intent.order_id for intent in intents}
    found = connection.execute(
        select(*_COLUMNS).where(among(connection, payment_intents.c.order_id, order_ids))
    )
    return {(row["order_id"], row["fence"]): IntentRow(**row) for row in found.mappings()}


def _repeat(intent: Intent, row: IntentRow) -> IntentOutcome | Exception:
    if row.kind == "void":
        return IntentOutcome.VOIDED
    ours = (intent.payment_key, intent.amount, intent.currency, intent.idempotency_key)
    if ours == (row.payment_key, row.amount, row.currency, row.idempotency_key):
        return IntentOutcome.ALREADY_WRITTEN
    if intent.payment_key != row.payment_key:
        # Redis lost a claim and reissued its fence: the other payment was first.
        return IntentOutcome.FENCE_OF_ANOTHER_KEY
    return BrokenInvariant(f"{intent.order_id} has another intent under fence {intent.fence}")


def _unmet(sale_id: str | None, order_id: str | None) -> Select[Any]:
    intents = payment_intents
    wanted = select(*(intents.c[name] for name in UnmetIntent.__struct_fields__)).where(
        intents.c.kind == "intent", intents.c.ended_at_ms.is_(None)
    )
    if sale_id is not None:
        wanted = wanted.where(intents.c.sale_id == sale_id)
    if order_id is not None:
        wanted = wanted.where(intents.c.order_id == order_id)
    return wanted
