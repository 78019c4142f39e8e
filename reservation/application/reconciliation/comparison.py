"""Comparison of a restored database with the gateway's list of transactions.

    survivors   events that Redis still has and SQL lacks, as far as they follow SQL's last ones
    list        every transaction at the gateway since the backup
    match       each payment with its order in SQL, or with the copy of the order in Redis
    place       an intent for each payment whose order is known: the rebuild claims it again, and
                the settler decides it as any undecided payment
    report      every other payment, which is never cancelled automatically

Repeated runs write the same rows. The gateway may list a transaction late, so the sales are opened
only if another run, after the rebuild, finds nothing new.
"""

import asyncio
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Final

import msgspec
import structlog

from reservation.adapters.redis.outbox import UNREADABLE, RedisOutbox
from reservation.adapters.redis.reservation_store import ReservationStore
from reservation.adapters.redis.sale_store import SaleStore
from reservation.adapters.sql.differences import Difference, DifferenceKind
from reservation.adapters.sql.event_writer import ApplyKind
from reservation.adapters.sql.orders import OrderRow, as_reservation
from reservation.adapters.sql.payment_intents import Intent, UnmetIntent
from reservation.adapters.sql.restores import RestoreRow
from reservation.adapters.sql.store import SqlStore
from reservation.application.readiness.data_loss import DataLossDetector, is_under_way
from reservation.domain.clock import Clock, as_datetime
from reservation.domain.errors import SaleRecovering
from reservation.domain.idempotency_keys import confirm_key
from reservation.domain.ids import is_payment_key, sale_of
from reservation.domain.payment_gateway import (
    CANCELLED_PAYMENT,
    OPEN_PAYMENT,
    Answered,
    Payment,
    PaymentGateway,
    Transaction,
    TransactionList,
    TransactionPage,
)
from reservation.domain.reservation import Reservation
from reservation.domain.states import Status

__all__ = ["Comparison", "ComparisonReport", "ListUnavailable"]

log = structlog.get_logger(__name__)

GATEWAY: Final = "toss"
#: Transactions before the backup that are read as well: the clocks of the gateway and of this
#: machine differ, and SQL has nearly all of these payments.
OVERLAP: Final = timedelta(hours=1)
#: Payments that are matched with SQL in one step, and looked up at the gateway at a time.
MATCHED_AT_ONCE: Final = 500
LOOK_UPS_AT_ONCE: Final = 4
#: Attempts at one page or look-up while the gateway gives no answer, and the pause between two.
TRIES_MAX: Final = 5
RETRY_SECONDS: Final = 2.0
#: Pages of the list: ten million transactions.
PAGES_MAX: Final = 10_000
#: Events of one batch saved from Redis: as many as the flusher takes.
SURVIVORS_AT_ONCE: Final = 1_000

_SOLD: Final = (Status.AWAITING_DEPOSIT, Status.CONFIRMED)
#: States of an order in SQL from which any payment of it can take it to CONFIRMED.
_UNPAID: Final = (Status.PREPARED, Status.HELD, Status.RELEASED, Status.EXPIRED)
#: States of a copy in Redis that shows this payment as the order's own.
_PAID_COPY: Final = (Status.CONFIRMING, Status.AWAITING_DEPOSIT, Status.CONFIRMED)


class ListUnavailable(Exception):
    """The gateway did not list its transactions, or did not show a payment."""


class ComparisonReport(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """The result of a comparison."""

    taken_at_ms: int
    checked_to_ms: int
    #: Payments in the list, and those whose order id is not one of this service.
    payments: int
    foreign: int
    #: Events that Redis had and SQL lacked.
    events_saved: int
    #: Sales that Redis has and SQL lacks: they began after the backup.
    unknown_sales: tuple[str, ...]
    #: Sales whose events in Redis cannot be read: SQL has those before the first damaged one.
    unreadable_sales: tuple[str, ...]
    differences: tuple[Difference, ...]
    #: Payment keys of the differences that no earlier comparison found of this kind.
    new: tuple[str, ...]
    #: Sales with a payment that their rebuild must claim.
    to_rebuild: tuple[str, ...]

    @property
    def to_acknowledge(self) -> tuple[Difference, ...]:
        """The differences that only an operator can settle."""
        return tuple(
            one for one in self.differences if one.kind is not DifferenceKind.SETTLED_LATER
        )


class _Run(msgspec.Struct, frozen=True, kw_only=True):
    """One comparison, and the state of the sales whose payments the gateway lists."""

    restore: RestoreRow
    #: Sales that are not retired.
    live: frozenset[str]
    #: Sales that were rebuilt, and that Redis has as SQL does.
    rebuilt: frozenset[str]


class Comparison:
    """Compares SQL with the gateway after a restore.

    Args:
        sql: the restored data.
        store: reads the copies of orders in a Redis that survived.
        sales: the sales in Redis.
        outbox: the surviving events.
        data_loss: finds the sales that Redis has as SQL does.
        gateway: looks payments up.
        transactions: the gateway's list; None if the gateway has none.
        clock: the time.
    """

    def __init__(
        self,
        sql: SqlStore,
        store: ReservationStore,
        sales: SaleStore,
        outbox: RedisOutbox,
        data_loss: DataLossDetector,
        gateway: PaymentGateway,
        transactions: TransactionList | None,
        *,
        clock: Clock,
    ) -> None:
        self._sql = sql
        self._store = store
        self._sales = sales
        self._outbox = outbox
        self._data_loss = data_loss
        self._gateway = gateway
        self._transactions = transactions
        self._clock = clock

    async def run(self, restore: RestoreRow, *, without_list: bool = False) -> ComparisonReport:
        """Compare, store the differences, and record that the comparison took place.

        Args:
            restore: the last restore.
            without_list: save the surviving events only, because the gateway cannot list.

        Raises:
            ListUnavailable: the gateway gave no list, or no answer about a payment.
            StoreUnavailable, StoreUncertain, SQLAlchemyError, OSError: a server does not answer.
        """
        if self._transactions is None and not without_list:
            raise ListUnavailable("the gateway has no list of transactions")
        now_ms = self._clock.now_ms()
        before = {one.payment_key: one.kind for one in await self._sql.differences.list_open()}
        saved, unreadable = await self._save_survivors()
        epochs = await self._sql.sales.epochs()
        unknown = tuple(one for one in await self._sales.ids() if one not in epochs)
        listed: dict[str, Transaction] = {}
        if self._transactions is not None and not without_list:
            listed = await self._list(self._transactions, restore, now_ms)
        ours = {
            key: one
            for key, one in listed.items()
            if sale_of(one.order_id) is not None and is_payment_key(key)
        }
        run = await self._begin_run(restore, ours)
        found = await self._match(ours, run)
        differing = {one.payment_key: one.kind for one in found}
        await self._sql.differences.put(found)
        # A difference from an earlier restore may be missing in this list, and stays open.
        await self._sql.differences.settle((before.keys() & ours.keys()) - differing.keys())
        await self._sql.restores.note_comparison(
            restore.number, at_ms=now_ms, without_list=without_list
        )
        log.info("restore_compared", payments=len(listed), differences=len(found), events=saved)
        return ComparisonReport(
            taken_at_ms=restore.taken_at_ms,
            checked_to_ms=now_ms,
            payments=len(listed),
            foreign=len(listed) - len(ours),
            events_saved=saved,
            unknown_sales=unknown,
            unreadable_sales=unreadable,
            differences=tuple(sorted(found, key=lambda one: (one.order_id, one.payment_key))),
            new=tuple(sorted(key for key, kind in differing.items() if before.get(key) != kind)),
            to_rebuild=tuple(
                sorted(
                    {
                        sale_id
                        for one in found
                        if one.kind is DifferenceKind.SETTLED_LATER
                        and (sale_id := sale_of(one.order_id) or "") in run.live - run.rebuilt
                    }
                )
            ),
        )

    async def _begin_run(self, restore: RestoreRow, listed: Mapping[str, Transaction]) -> _Run:
        live = frozenset(await self._sql.sales.heads())
        named = {sale_of(one.order_id) or "" for one in listed.values()} & live
        rebuilt = {one for one in named if await self._data_loss.whole_epoch(one) is not None}
        return _Run(restore=restore, live=live, rebuilt=frozenset(rebuilt))

    async def _save_survivors(self) -> tuple[int, tuple[str, ...]]:
        """Write to SQL the events that follow its last one; the chain proves that they follow.

        Returns:
            The number of events, and the sales whose events cannot be read.
        """
        saved, unreadable = 0, list[str]()
        for sale_id, head in (await self._sql.sales.heads()).items():
            seq = head.seq
            while True:
                try:
                    events = await self._outbox.after(sale_id, seq, SURVIVORS_AT_ONCE)
                except UNREADABLE as error:
                    log.warning("surviving_events_unreadable", sale_id=sale_id, reason=str(error))
                    unreadable.append(sale_id)
                    break
                if not events:
                    break
                outcome = await self._sql.events.apply(sale_id, events)
                saved += outcome.written
                if outcome.kind is not ApplyKind.APPLIED:
                    log.info("surviving_events_end", sale_id=sale_id, kind=outcome.kind)
                    break
                seq = events[-1].seq
        return saved, tuple(unreadable)

    async def _list(
        self, source: TransactionList, restore: RestoreRow, now_ms: int
    ) -> dict[str, Transaction]:
        """The last transaction of each payment since the backup."""
        last: dict[str, Transaction] = {}
        since, until = as_datetime(restore.taken_at_ms) - OVERLAP, as_datetime(now_ms)
        after = ""
        for _ in range(PAGES_MAX):
            page = await self._page(source, since, until, after)
            if not page:
                return last
            for one in page:
                before = last.get(one.payment_key)
                differs = before is not None and before.status != one.status
                # The gateway need not list the latest entry last; a look-up shows the status.
                last[one.payment_key] = msgspec.structs.replace(one, status="") if differs else one
            if page[-1].transaction_key == after:
                raise ListUnavailable("the gateway returned the same page twice")
            after = page[-1].transaction_key
        raise ListUnavailable(f"the gateway's list has more than {PAGES_MAX} pages")

    async def _match(self, listed: Mapping[str, Transaction], run: _Run) -> list[Difference]:
        found: list[Difference] = []
        transactions = list(listed.values())
        for start in range(0, len(transactions), MATCHED_AT_ONCE):
            some = transactions[start : start + MATCHED_AT_ONCE]
            agreeing = await self._sql.payments.agreeing([one.payment_key for one in some])
            differing = [
                one for one in some if agreeing.get(one.payment_key) != (one.order_id, one.status)
            ]
            for first in range(0, len(differing), LOOK_UPS_AT_ONCE):
                payments = await self._look_up_all(differing[first : first + LOOK_UPS_AT_ONCE])
                # One after the other: an error leaves no write of another payment in progress.
                for payment in payments:
                    difference = await self._judge(payment, run)
                    if difference is not None:
                        found.append(difference)
        return found

    async def _look_up_all(self, transactions: Sequence[Transaction]) -> list[Payment]:
        """Look these payments up at once; the first error ends the other look-ups."""
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._look_up(one)) for one in transactions]
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from failed
        return [task.result() for task in tasks]

    async def _judge(self, payment: Payment, run: _Run) -> Difference | None:
        # The intent is read first: if it ends in between, the order shows the end.
        intent = await self._unmet_intent(payment)
        order = await self._sql.orders.get(payment.order_id)
        kind = await self._kind_of(payment, intent, order, run)
        return None if kind is None else self._difference(payment, order, kind)

    def _difference(
        self, payment: Payment, order: OrderRow | None, kind: DifferenceKind
    ) -> Difference:
        return Difference(
            gateway=GATEWAY,
            payment_key=payment.payment_key,
            order_id=payment.order_id,
            kind=kind,
            ours=order.status if order is not None else "",
            theirs=payment.status,
            amount=payment.balance_amount,
            currency=payment.currency,
            found_at_ms=self._clock.now_ms(),
        )

    async def _kind_of(
        self, payment: Payment, intent: UnmetIntent | None, order: OrderRow | None, run: _Run
    ) -> DifferenceKind | None:
        is_own = order is not None and order.payment_key == payment.payment_key
        if is_own and order is not None and order.status in _SOLD:
            # The worker looks it up and follows it.
            await self._sql.payments.schedule_check(
                payment.payment_key, order.order_id, self._clock.now_ms()
            )
        if payment.status not in OPEN_PAYMENT or payment.balance_amount == 0:
            return await self._kind_of_returned(order) if is_own else None
        if is_own and order is not None and order.status in _SOLD:
            partly = payment.status in CANCELLED_PAYMENT
            return DifferenceKind.GIVEN_BACK if partly else DifferenceKind.SETTLED_LATER
        if intent is not None and intent.created_at_ms > run.restore.restored_at_ms:
            return None  # The service is deciding it, as any payment since the restore.
        if intent is None:
            copy = await self._copy_of(payment) if order is None else as_reservation(order)
            if copy is None:
                return DifferenceKind.UNKNOWN_ORDER
            if not await self._can_be_sold(copy, payment, run, is_own=is_own or order is None):
                return DifferenceKind.OTHER_PAYMENT
            # The difference is stored first: otherwise a worker may cancel the payment as one
            # without an order. Its kind needs no operator, so another kind still counts as new.
            provisional = self._difference(payment, order, DifferenceKind.SETTLED_LATER)
            await self._sql.differences.put([provisional])
            intent = await self._place(copy, payment, run.restore)
        if intent is None or intent.sale_id not in run.live:
            return DifferenceKind.OTHER_PAYMENT
        if intent.sale_id in run.rebuilt:
            try:
                there = await self._store.read(payment.order_id)
            except SaleRecovering:
                # It lost its data again since; its rebuild claims the payment.
                return DifferenceKind.SETTLED_LATER
            if not is_under_way(intent, there):
                return DifferenceKind.NOT_PLACED
        return DifferenceKind.SETTLED_LATER

    async def _can_be_sold(
        self, order: Reservation, payment: Payment, run: _Run, *, is_own: bool
    ) -> bool:
        """Whether the order, which is not sold, can be sold for this payment."""
        if order.sale_id not in run.live or not _pays_for(payment, order.amount, order.currency):
            return False
        if order.status not in _UNPAID and not is_own:
            return False
        # An attempt that has ended is never sold.
        intents = await self._sql.intents.list_by_order(order.order_id)
        return all(one.payment_key != payment.payment_key for one in intents)

    async def _kind_of_returned(self, order: OrderRow | None) -> DifferenceKind | None:
        """The kind of a payment whose money went back; None if SQL has its order as unsold."""
        if order is None or order.status not in _SOLD:
            return None
        refund = await self._sql.refunds.get(order.order_id)
        is_ours = refund is not None and refund.status == "pending"
        return DifferenceKind.SETTLED_LATER if is_ours else DifferenceKind.GIVEN_BACK

    async def _copy_of(self, payment: Payment) -> Reservation | None:
        """The order in a Redis that survived, if it was sold, or being sold, for this payment."""
        sale_id = sale_of(payment.order_id) or ""
        if await self._sql.sales.epoch(sale_id) is None:
            return None
        try:
            copy = await self._store.read(payment.order_id)
        except SaleRecovering:
            return None
        if copy is None or copy.status not in _PAID_COPY:
            return None
        is_own = copy.payment_key == payment.payment_key
        return copy if is_own and _pays_for(payment, copy.amount, copy.currency) else None

    async def _unmet_intent(self, payment: Payment) -> UnmetIntent | None:
        """The intent of this payment, if it has no end in SQL."""
        unmet = await self._sql.intents.list_unmet(order_id=payment.order_id)
        return next((one for one in unmet if one.payment_key == payment.payment_key), None)

    async def _place(
        self, order: Reservation, payment: Payment, restore: RestoreRow
    ) -> UnmetIntent | None:
        """Write an intent, so that the rebuild claims the payment for its order."""
        await self._sql.intents.add(
            Intent(
                order_id=order.order_id,
                sale_id=order.sale_id,
                fence=await self._sql.intents.known_fence(order.order_id) + 1,
                payment_key=payment.payment_key,
                amount=order.amount,
                currency=order.currency,
                idempotency_key=confirm_key(payment.payment_key, 0),
                now_ms=restore.restored_at_ms,
                reservation=msgspec.json.encode(order).decode(),
            )
        )
        return await self._unmet_intent(payment)

    async def _page(
        self, source: TransactionList, since: datetime, until: datetime, after: str
    ) -> tuple[Transaction, ...]:
        answer = None
        for attempt in range(TRIES_MAX):
            if attempt:
                await asyncio.sleep(RETRY_SECONDS)
            answer = await source.list_transactions(since=since, until=until, after=after)
            if isinstance(answer, TransactionPage):
                return answer.transactions
        raise ListUnavailable(f"the gateway did not list its transactions: {answer}")

    async def _look_up(self, transaction: Transaction) -> Payment:
        answer = None
        for attempt in range(TRIES_MAX):
            if attempt:
                await asyncio.sleep(RETRY_SECONDS)
            answer = await self._gateway.look_up(transaction.payment_key)
            if (
                isinstance(answer, Answered)
                and answer.payment.payment_key == transaction.payment_key
                and answer.payment.order_id == transaction.order_id
            ):
                return answer.payment
        raise ListUnavailable(
            f"the gateway did not show a payment of order {transaction.order_id}: "
            f"{type(answer).__name__}"
        )


def _pays_for(payment: Payment, amount: int, currency: str) -> bool:
    """Whether the payment has this amount and currency, and nothing of it was cancelled."""
    return (payment.total_amount, payment.balance_amount, payment.currency) == (
        amount,
        amount,
        currency,
    )
