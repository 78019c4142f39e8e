"""The ledger: everything that the service asks of SQL, at one door.

Each method is one transaction or one read. Those that write may be repeated: the answer is the same
and nothing happens twice.
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
    """SQL, opened.

    Any call may raise `sqlalchemy.exc.SQLAlchemyError` or `OSError` where the database cannot be
    reached or does not answer in time. A write that raised may have happened; repeat it to know.
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
        """Connect to `sqlite:///PATH` or `postgresql://...`, and bring the tables up to date.

        Raises:
            ValueError: the URL is of neither kind.
        """
        return cls(await Database.open(url))

    async def connect(self) -> None:
        """Connect and bring the tables up to date, as each use does by itself."""
        await self._database.connect()

    async def aclose(self) -> None:
        """Finish what is being written, and close the connections."""
        await self._intents.aclose()
        await self._payments.aclose()
        await self._database.aclose()

    async def schema_version(self) -> str:
        """The newest migration that was applied."""
        return await self._database.schema_version()

    async def check(self) -> None:
        """See, by writing, that what is written now would be kept; raises where it would not."""
        await self._database.check()

    async def known_sales(self) -> dict[str, str]:
        """Every sale and its epoch."""
        return await sales.known_sales(self._database)

    async def epoch_of(self, sale_id: str) -> str | None:
        """The sale's epoch, or None where SQL does not know it."""
        return await sales.epoch_of(self._database, sale_id)

    async def register_sale(self, sale_id: str, document: str, now_ms: int) -> tuple[str, bool]:
        """Make a sale known before Redis has it; its epoch, and whether this call made it."""
        return await sales.register_sale(self._database, sale_id, document, now_ms)

    async def renew_unbegun_sale(
        self, sale_id: str, document: str, made_before_ms: int
    ) -> str | None:
        """Another epoch for a sale of which nothing but its registration was written, or None."""
        return await sales.renew_unbegun_sale(self._database, sale_id, document, made_before_ms)

    async def sale_document(self, sale_id: str) -> str | None:
        """What the operator asked for when the sale was made, JSON."""
        return await sales.sale_document(self._database, sale_id)

    async def sale(self, sale_id: str) -> SaleRow | None:
        """The sale as its events have left it so far."""
        return await sales.sale_row(self._database, sale_id)

    async def set_epoch(self, sale_id: str, epoch: str, *, instead_of: str) -> None:
        """Begin another epoch of a sale; SaleRecovering where somebody else has."""
        await sales.set_epoch(self._database, sale_id, epoch, instead_of=instead_of)

    async def cursor(self, sale_id: str) -> tuple[int, str]:
        """The number and the chain value of the last event that is written."""
        return await sales.cursor_of(self._database, sale_id)

    async def heads(self) -> dict[str, SaleHead]:
        """Every sale, its epoch, and the last event of it that is written."""
        return await recovery.heads(self._database)

    async def listed_items(self, sale_id: str) -> dict[str, ItemRow]:
        """What is on sale with its counters, by SKU."""
        return await recovery.listed_items(self._database, sale_id)

    async def count_orders(self, sale_id: str, statuses: Collection[Status]) -> int:
        """How many orders of the sale are in these states."""
        return await recovery.count_orders(self._database, sale_id, statuses)

    async def payment_events(self, order_ids: Collection[str]) -> dict[str, list[Event]]:
        """What befell the payments of these orders, in order."""
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
        """Payments that may have been asked for and whose end SQL does not know."""
        return await recovery.unmet_intents(
            self._database, sale_id, order_id=order_id, since_ms=since_ms, before_ms=before_ms
        )

    async def end_intents(self, order_id: str, payment_key: str, now_ms: int) -> None:
        """Keep that a payment is decided although no event of its order says so."""
        await intents.end_intents(self._database, order_id, payment_key, now_ms)

    async def known_fence(self, order_id: str) -> int:
        """The highest fence that SQL has for the order: the next claim takes a higher one."""
        return await intents.known_fence(self._database, order_id)

    async def paid_unsold(self, sale_id: str, limit: int) -> list[UnsoldRow]:
        """Payments that are DONE and whose order is neither sold nor refunded."""
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
        """Commit an intent before the PG is asked; only then may the call leave.

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
        """Bar everybody from writing an intent under this fence, unless one stands."""
        return await intents.void_intent(
            self._database, order_id=order_id, sale_id=sale_id, fence=fence, now_ms=now_ms
        )

    async def intend_cancel(
        self, *, order_id: str, sale_id: str, fence: int, payment_key: str, now_ms: int
    ) -> bool:
        """Bar a payment from being sold before a cancel of it leaves; whether it is barred."""
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
        """Keys under which a cancel of this payment is answered for good, see `payments`."""
        return await payments.bound_cancels(
            self._database, order_id, payment_key, refusals=refusals
        )

    async def put_payment(self, payment: PaymentRow) -> None:
        """Keep a payment as the PG shows it now."""
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
        """Write a refund down before the PG is asked; a repeat gets the one that stands."""
        return await refunds.begin_refund(self._database, wish, now_ms=now_ms)

    async def lease_refund(
        self, record: RefundRecord, *, asks: bool, now_ms: int, until_ms: int
    ) -> RefundRecord | None:
        """Take the right to ask the PG for a refund; None where another has it."""
        return await refunds.lease_refund(
            self._database, record, asks=asks, now_ms=now_ms, until_ms=until_ms
        )

    async def leave_refund(
        self, held: RefundRecord, *, code: str | None, unanswered: bool, now_ms: int
    ) -> None:
        """Give the lease on a refund back, with the PG's last word."""
        await refunds.leave_refund(
            self._database, held, code=code, unanswered=unanswered, now_ms=now_ms
        )

    async def replace_refund(
        self, held: RefundRecord, wish: RefundWish, *, now_ms: int
    ) -> RefundRecord | RefundReused | None:
        """Let another wish take the place of a pending one, and end the lease on it."""
        return await refunds.replace_refund(self._database, held, wish, now_ms=now_ms)

    async def refund_backlog(self) -> Backlog:
        """How many refunds are pending, and since when."""
        return await refunds.backlog(self._database)

    async def refunds(
        self, *, status: str | None = None, cursor: str | None = None, limit: int = PAGE_MAX
    ) -> tuple[list[RefundRecord], str | None]:
        """A page of refunds and the cursor of the next: pending ones oldest first, others newest.

        Raises:
            ValueError: the cursor is none of ours.
        """
        return await refunds.list_refunds(self._database, status=status, cursor=cursor, limit=limit)

    async def pending_refunds(self, limit: int) -> list[RefundRecord]:
        """Refunds that nobody has finished, oldest first."""
        return await refunds.pending_refunds(self._database, limit)

    async def reopen_refunds(self, sale_id: str) -> None:
        """Make refunds pending again whose order a rebuild has sold again."""
        await refunds.reopen_refunds(self._database, sale_id)

    async def finish_refund(
        self, record: RefundRecord, *, status: str, code: str | None, now_ms: int
    ) -> None:
        """Write down how a refund ended: `done` or `refused`."""
        await refunds.finish_refund(self._database, record, status=status, code=code, now_ms=now_ms)

    async def refund_of(self, order_id: str) -> RefundRecord | None:
        """The order's refund."""
        return await refunds.refund_of(self._database, order_id)

    async def apply(self, sale_id: str, batch: Sequence[Event]) -> ApplyOutcome:
        """Write a batch of the sale's outbox, each event in effect exactly once."""
        return await events.apply(self._database, sale_id, batch)

    async def events(self, sale_id: str, after_seq: int, limit: int) -> list[Event]:
        """The sale's written events after this one, in order."""
        return await events.events_after(self._database, sale_id, after_seq=after_seq, limit=limit)

    async def order(self, order_id: str) -> OrderRow | None:
        """The order as its last written event left it."""
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
            ValueError: the cursor is none of ours.
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
        """Of these buyers: item -> units held or bought, as the buyer's limit counts them."""
        return await orders.buyer_counts(self._database, sale_id, ids)

    async def confirmed_unpaid(self, sale_id: str, limit: int) -> list[UnpaidRow]:
        """CONFIRMED orders whose payment the PG does not show as done."""
        return await recovery.confirmed_unpaid(self._database, sale_id, limit)

    async def holders(self, sale_id: str, sku: str, limit: int) -> list[HolderRow]:
        """Who holds most of an item now, bought units not counted."""
        return await orders.holders(self._database, sale_id, sku, limit)

    async def history(self, order_id: str) -> list[HistoryRow]:
        """Everything that happened to an order, in time order."""
        return await stories.history(self._database, order_id)

    async def fold(self, sale_id: str) -> SaleFold | None:
        """The sale's counters up to its last written event, all of one moment."""
        return await stories.fold(self._database, sale_id)
