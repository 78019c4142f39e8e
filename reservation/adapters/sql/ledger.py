"""The ledger: the facade over all SQL of the service.

Each method is one transaction or one read. Writes are idempotent: a repeat returns the same answer
and has no effect.
"""

from collections.abc import Collection, Sequence

from reservation.adapters.sql import event_writer as events
from reservation.adapters.sql import history as stories
from reservation.adapters.sql import orders, payments, refunds, sales
from reservation.adapters.sql import payment_intents as intents
from reservation.adapters.sql import rebuild_queries as recovery
from reservation.adapters.sql.engine import Database
from reservation.adapters.sql.event_writer import ApplyOutcome
from reservation.adapters.sql.history import SaleFold
from reservation.adapters.sql.losses import LossLedger
from reservation.adapters.sql.orders import (
    PAGE_MAX,
    REBUILD_PAGE_MAX,
    HistoryRow,
    HolderRow,
    OrderRow,
)
from reservation.adapters.sql.payment_checks import PaymentChecks
from reservation.adapters.sql.payment_intents import (
    Intent,
    IntentOutcome,
    IntentRow,
    IntentWriter,
    VoidOutcome,
)
from reservation.adapters.sql.payments import AnswerRow, PaymentEvidence, PaymentRow, PaymentWriter
from reservation.adapters.sql.rebuild_queries import (
    ItemRow,
    SaleHead,
    UnmetIntent,
    UnpaidRow,
    UnsoldRow,
)
from reservation.adapters.sql.refunds import (
    Backlog,
    OtherRefund,
    RefundRecord,
    RefundReused,
    RefundWish,
)
from reservation.adapters.sql.sales import SaleRow
from reservation.domain.events import Event
from reservation.domain.states import LIVE, Status

__all__ = ["Ledger"]


class Ledger:
    """An open database.

    Any call may raise `sqlalchemy.exc.SQLAlchemyError` or `OSError` where the database is
    unreachable or does not respond in time. A write that raised may have happened; retry it to find
    out.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self.losses = LossLedger(database)
        self._intents = IntentWriter(database)
        self._payments = PaymentWriter(database)
        self.evidence = PaymentEvidence(database)
        self.checks = PaymentChecks(database)

    @classmethod
    async def open(cls, url: str) -> "Ledger":
        """Connect to `sqlite:///PATH` or `postgresql://...`, and migrate.

        Raises:
            ValueError: the URL is of neither kind.
        """
        return cls(await Database.open(url))

    async def connect(self) -> None:
        """Connect and migrate, as the first use does by itself."""
        await self._database.connect()

    async def aclose(self) -> None:
        """Finish writes in progress, and close the connections."""
        await self._intents.aclose()
        await self._payments.aclose()
        await self._database.aclose()

    async def schema_version(self) -> str:
        """The newest applied migration."""
        return await self._database.schema_version()

    async def check(self) -> None:
        """Check, with a write, that commits are durable; raises where they are not."""
        await self._database.check()

    async def known_sales(self) -> dict[str, str]:
        """Every sale and its epoch."""
        return await sales.known_sales(self._database)

    async def epoch_of(self, sale_id: str) -> str | None:
        """The sale's epoch, or None where SQL does not know it."""
        return await sales.epoch_of(self._database, sale_id)

    async def register_sale(self, sale_id: str, document: str, now_ms: int) -> tuple[str, bool]:
        """Register a sale before Redis has it; its epoch, and whether this call registered it."""
        return await sales.register_sale(self._database, sale_id, document, now_ms)

    async def renew_unbegun_sale(
        self, sale_id: str, document: str, made_before_ms: int
    ) -> str | None:
        """Begin another epoch of a sale that has only its registration; None where it has more."""
        return await sales.renew_unbegun_sale(self._database, sale_id, document, made_before_ms)

    async def sale_document(self, sale_id: str) -> str | None:
        """The operator's request that created the sale, JSON."""
        return await sales.sale_document(self._database, sale_id)

    async def sale(self, sale_id: str) -> SaleRow | None:
        """The sale's state after its last written event."""
        return await sales.sale_row(self._database, sale_id)

    async def set_epoch(self, sale_id: str, epoch: str, *, instead_of: str) -> None:
        """Begin another epoch of a sale; SaleRecovering where another rebuild has."""
        await sales.set_epoch(self._database, sale_id, epoch, instead_of=instead_of)

    async def cursor(self, sale_id: str) -> tuple[int, str]:
        """The number and the chain value of the last written event."""
        return await sales.cursor_of(self._database, sale_id)

    async def heads(self) -> dict[str, SaleHead]:
        """Every sale, its epoch and its last written event."""
        return await recovery.heads(self._database)

    async def listed_items(self, sale_id: str) -> dict[str, ItemRow]:
        """The items on sale with their counters, by SKU."""
        return await recovery.listed_items(self._database, sale_id)

    async def count_orders(self, sale_id: str, statuses: Collection[Status]) -> int:
        """The number of the sale's orders in these states."""
        return await recovery.count_orders(self._database, sale_id, statuses)

    async def payment_events(self, order_ids: Collection[str]) -> dict[str, list[Event]]:
        """The payment events of these orders, in order."""
        return await recovery.payment_events(self._database, order_ids)

    async def restocks(self, sale_id: str) -> list[str]:
        """The data of every restock of the sale, JSON."""
        return await recovery.restocks(self._database, sale_id)

    async def unmet_intents(
        self,
        sale_id: str | None = None,
        *,
        order_id: str | None = None,
        since_ms: int | None = None,
        before_ms: int | None = None,
    ) -> list[UnmetIntent]:
        """Payments that the PG may have been asked for, and whose end SQL does not know."""
        return await recovery.unmet_intents(
            self._database, sale_id, order_id=order_id, since_ms=since_ms, before_ms=before_ms
        )

    async def end_intents(self, order_id: str, payment_key: str, now_ms: int) -> None:
        """Mark a payment as decided although its order has no event of it."""
        await intents.end_intents(self._database, order_id, payment_key, now_ms)

    async def known_fence(self, order_id: str) -> int:
        """The highest fence that SQL has for the order: the next claim takes a higher one."""
        return await intents.known_fence(self._database, order_id)

    async def paid_unsold(self, sale_id: str, limit: int) -> list[UnsoldRow]:
        """DONE payments whose order is neither sold nor refunded."""
        return await recovery.paid_unsold(self._database, sale_id, limit)

    async def write_intent(
        self,
        *,
        order_id: str,
        sale_id: str,
        fence: int,
        payment_key: str,
        amount: int,
        currency: str,
        idempotency_key: str,
        now_ms: int,
        epoch: str | None = None,
        reservation: str | None = None,
    ) -> IntentOutcome:
        """Commit an intent; only after that may the call to the PG leave.

        Raises:
            BrokenInvariant: this fence has another intent.
        """
        return await self._intents.write(
            Intent(
                order_id=order_id,
                sale_id=sale_id,
                fence=fence,
                payment_key=payment_key,
                amount=amount,
                currency=currency,
                idempotency_key=idempotency_key,
                now_ms=now_ms,
                epoch=epoch,
                reservation=reservation,
            )
        )

    async def void_intent(
        self, *, order_id: str, sale_id: str, fence: int, now_ms: int
    ) -> VoidOutcome:
        """Void this fence, so that no intent can be written under it, unless one exists."""
        return await intents.void_intent(
            self._database, order_id=order_id, sale_id=sale_id, fence=fence, now_ms=now_ms
        )

    async def intend_cancel(
        self, *, order_id: str, sale_id: str, fence: int, payment_key: str, now_ms: int
    ) -> bool:
        """Bar a payment from being sold, before its cancel leaves; returns whether it is barred."""
        return await intents.intend_cancel(
            self._database,
            order_id=order_id,
            sale_id=sale_id,
            fence=fence,
            payment_key=payment_key,
            now_ms=now_ms,
        )

    async def is_cancel_intended(self, payment_key: str) -> bool:
        """Whether a cancel of this payment may have left."""
        return await intents.is_cancel_intended(self._database, payment_key)

    async def intents_of(self, order_id: str) -> list[IntentRow]:
        """The order's intents and voids, by fence."""
        return await intents.intents_of(self._database, order_id)

    async def attempt_owner(self, payment_key: str) -> str | None:
        """The order that a payment key belongs to."""
        return await intents.attempt_owner(self._database, payment_key)

    async def record_answer(
        self, *, order_id: str, payment_key: str, kind: str, answer: str, now_ms: int
    ) -> None:
        """Append an answer of the PG to the order's history: JSON text without secrets."""
        await self._payments.write(
            AnswerRow(
                order_id=order_id,
                payment_key=payment_key,
                kind=kind,
                answer=answer,
                created_at_ms=now_ms,
            )
        )

    async def bound_cancels(self, order_id: str, payment_key: str, *, refusals: bool) -> int:
        """Keys under which a cancel of this payment has a final answer, see `payments`."""
        return await payments.bound_cancels(
            self._database, order_id, payment_key, refusals=refusals
        )

    async def put_payment(self, payment: PaymentRow) -> None:
        """Store a payment as the PG shows it now."""
        await self._payments.write(payment)

    async def payment_of(self, order_id: str) -> PaymentRow | None:
        """The order's payment: the approved one, else the latest."""
        return await payments.payment_of(self._database, order_id)

    async def payment_by_key(self, payment_key: str) -> PaymentRow | None:
        """The payment with this key."""
        return await payments.payment_by_key(self._database, payment_key)

    async def begin_refund(
        self, wish: RefundWish, *, now_ms: int
    ) -> RefundRecord | RefundReused | OtherRefund:
        """Record a refund before the PG is asked; a repeat gets the existing one."""
        return await refunds.begin_refund(self._database, wish, now_ms=now_ms)

    async def lease_refund(
        self, record: RefundRecord, *, asks: bool, now_ms: int, until_ms: int
    ) -> RefundRecord | None:
        """Take the lease on a refund; None where another process holds it."""
        return await refunds.lease_refund(
            self._database, record, asks=asks, now_ms=now_ms, until_ms=until_ms
        )

    async def leave_refund(
        self, held: RefundRecord, *, code: str | None, unanswered: bool, now_ms: int
    ) -> None:
        """Release the lease on a refund, with the PG's last code."""
        await refunds.leave_refund(
            self._database, held, code=code, unanswered=unanswered, now_ms=now_ms
        )

    async def replace_refund(
        self, held: RefundRecord, wish: RefundWish, *, now_ms: int
    ) -> RefundRecord | RefundReused | None:
        """Replace a pending wish by another one, and end the lease on it."""
        return await refunds.replace_refund(self._database, held, wish, now_ms=now_ms)

    async def refund_backlog(self) -> Backlog:
        """The number of pending refunds, and when the oldest began."""
        return await refunds.backlog(self._database)

    async def refunds(
        self, *, status: str | None = None, cursor: str | None = None, limit: int = PAGE_MAX
    ) -> tuple[list[RefundRecord], str | None]:
        """A page of refunds and the cursor of the next: pending ones oldest first, others newest.

        Raises:
            ValueError: the cursor is invalid.
        """
        return await refunds.list_refunds(self._database, status=status, cursor=cursor, limit=limit)

    async def pending_refunds(self, limit: int) -> list[RefundRecord]:
        """Pending refunds, oldest first."""
        return await refunds.pending_refunds(self._database, limit)

    async def reopen_refunds(self, sale_id: str) -> None:
        """Make refunds pending again whose order a rebuild has sold again."""
        await refunds.reopen_refunds(self._database, sale_id)

    async def finish_refund(
        self, record: RefundRecord, *, status: str, code: str | None, now_ms: int
    ) -> None:
        """Record the outcome of a refund: `done` or `refused`."""
        await refunds.finish_refund(self._database, record, status=status, code=code, now_ms=now_ms)

    async def refund_of(self, order_id: str) -> RefundRecord | None:
        """The order's refund."""
        return await refunds.refund_of(self._database, order_id)

    async def apply(self, sale_id: str, batch: Sequence[Event]) -> ApplyOutcome:
        """Apply a batch of the sale's outbox, each event exactly once in effect."""
        return await events.apply(self._database, sale_id, batch)

    async def events(self, sale_id: str, after_seq: int, limit: int) -> list[Event]:
        """The sale's written events after this one, in order."""
        return await events.events_after(self._database, sale_id, after_seq=after_seq, limit=limit)

    async def order(self, order_id: str) -> OrderRow | None:
        """The order's state after its last written event."""
        return await orders.order(self._database, order_id)

    async def orders(
        self,
        *,
        sale_id: str | None = None,
        status: str | None = None,
        buyer_id: str | None = None,
        cursor: str | None = None,
        limit: int = PAGE_MAX,
    ) -> tuple[list[OrderRow], str | None]:
        """A page of orders, newest first, and the cursor of the next page.

        Raises:
            ValueError: the cursor is invalid.
        """
        return await orders.list_orders(
            self._database,
            sale_id=sale_id,
            status=status,
            buyer_id=buyer_id,
            cursor=cursor,
            limit=limit,
        )

    async def live_orders(
        self,
        sale_id: str,
        *,
        statuses: Collection[Status] = LIVE,
        after: str = "",
        limit: int = REBUILD_PAGE_MAX,
    ) -> list[OrderRow]:
        """A page of a sale's orders in these states, by id, for a rebuild."""
        return await orders.live_orders(
            self._database, sale_id, statuses=statuses, after=after, limit=limit
        )

    async def buyer_counts(self, sale_id: str, ids: Collection[str]) -> dict[str, dict[str, int]]:
        """Per buyer: item -> units held or bought, as the buyer's limit counts them."""
        return await orders.buyer_counts(self._database, sale_id, ids)

    async def confirmed_unpaid(self, sale_id: str, limit: int) -> list[UnpaidRow]:
        """CONFIRMED orders whose payment the PG does not show as done."""
        return await recovery.confirmed_unpaid(self._database, sale_id, limit)

    async def holders(self, sale_id: str, sku: str, limit: int) -> list[HolderRow]:
        """The buyers with the most held units of an item, bought units not counted."""
        return await orders.holders(self._database, sale_id, sku, limit)

    async def history(self, order_id: str) -> list[HistoryRow]:
        """An order's history, in time order."""
        return await stories.history(self._database, order_id)

    async def fold(self, sale_id: str) -> SaleFold | None:
        """The sale's counters up to its last written event, from one snapshot."""
        return await stories.fold(self._database, sale_id)
