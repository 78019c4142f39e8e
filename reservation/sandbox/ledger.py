"""The sandbox's ledger: payments, their states, and the append-only record of money moved."""

import heapq
import re
import secrets
from bisect import bisect_left
from collections.abc import Callable, Iterator
from datetime import datetime

import msgspec

from reservation.domain.clock import Clock, as_datetime, as_ms
from reservation.sandbox.journal import Journal
from reservation.sandbox.refusals import Refusal
from reservation.sandbox.state_records import (
    Cancellation,
    Change,
    Entry,
    Kind,
    Method,
    PaymentRecord,
    Replay,
)

__all__ = ["CancelRequest", "Ledger", "Outcome"]

#: Payments, and first answers, in memory at about 2 kB each: far above any load test.
RECORDS_MAX = 1_000_000
#: Time limit of a virtual account's deposit.
DEPOSIT_MS = 24 * 60 * 60 * 1000

#: Retention of a first answer.
REPLAY_MS = 15 * 24 * 60 * 60 * 1000

_ORDER_ID = re.compile(r"[A-Za-z0-9_-]{6,64}")
_AMOUNT_MAX = 9_999_999_999_999


class CancelRequest(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """The body of a cancel."""

    cancel_reason: str
    cancel_amount: int | None = None
    refundable_amount: int | None = None
    currency: str | None = None
    refund_receive_account: dict[str, str] | None = None


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """The effect of a call once it is written: nothing has happened yet."""

    payment: PaymentRecord
    entry: Entry | None = None
    #: Set where the payment changes although the caller is refused: a decline.
    refusal: Refusal | None = None


class Ledger:
    """Decides the effect of a call, then writes it to the journal.

    Each verb (`confirm`, `cancel`, ...) returns an `Outcome` or raises a `Refusal` and changes
    nothing; `commit` writes the outcome to the journal and takes it into memory. Between the two
    there must be no `await`.

    Args:
        clock: the sandbox's, which tests turn on.
        on_change: receives every payment after it was written.
    """

    def __init__(
        self, journal: Journal, clock: Clock, on_change: Callable[[PaymentRecord], None]
    ) -> None:
        self._journal = journal
        self._clock = clock
        self._on_change = on_change
        self._changes = 0
        self._payments: dict[str, PaymentRecord] = {}
        self._by_order: dict[str, list[str]] = {}
        self._entries: list[Entry] = []
        self._replays: dict[str, Replay] = {}
        self._lapsing: list[tuple[int, str]] = []

    def reload(self) -> int:
        """Load the journal; returns how far the clock had been advanced."""
        offset = 0
        for change in self._journal.replay():
            self._apply(change)
            offset = offset if change.clock_offset_ms is None else change.clock_offset_ms
        return offset

    @property
    def entries(self) -> list[Entry]:
        return self._entries

    def payments(self, order_id: str | None = None) -> Iterator[PaymentRecord]:
        """All payments, or those of one order, oldest first."""
        if order_id is None:
            return iter(self._payments.values())
        return (self._payments[key] for key in self._by_order.get(order_id, ()))

    def payment(self, payment_key: str) -> PaymentRecord:
        """The payment's current state."""
        record = self._payments.get(payment_key)
        if record is None:
            raise Refusal("NOT_FOUND_PAYMENT")
        return self._lapsed(record)

    def payment_of_order(self, order_id: str) -> PaymentRecord:
        """The order's payment: the last one that moved money, else simply the last."""
        records = [self._lapsed(record) for record in self.payments(order_id)]
        if not records:
            raise Refusal("NOT_FOUND_PAYMENT")
        approved = [record for record in records if record.approved_at_ms is not None]
        return (approved or records)[-1]

    def entries_between(self, start: datetime, end: datetime) -> list[Entry]:
        """Entries from `start` until before `end`."""
        first = bisect_left(self._entries, as_ms(start), key=lambda entry: entry.at_ms)
        last = bisect_left(self._entries, as_ms(end), key=lambda entry: entry.at_ms)
        return self._entries[first:last]

    def replay(self, key: str) -> Replay | None:
        """The first answer under an idempotency key, while it is kept."""
        found = self._replays.get(key)
        if found is not None and self._clock.now_ms() - found.at_ms > REPLAY_MS:
            del self._replays[key]
            return None
        return found

    def check_room(self) -> None:
        """Refuse a record above the limit. First answers expire after 15 days."""
        if max(len(self._payments), len(self._replays)) < RECORDS_MAX:
            return
        forgotten_ms = self._clock.now_ms() - REPLAY_MS
        self._replays = {
            key: replay for key, replay in self._replays.items() if replay.at_ms >= forgotten_ms
        }
        if max(len(self._payments), len(self._replays)) >= RECORDS_MAX:
            raise Refusal("COMMON_ERROR", "the sandbox is full: start it on a new directory")

    def open(
        self,
        *,
        order_id: str,
        order_name: str,
        amount: int,
        currency: str = "KRW",
        customer_key: str | None = None,
        success_url: str = "",
        fail_url: str = "",
    ) -> Outcome:
        """The payment window opens: READY."""
        if _ORDER_ID.fullmatch(order_id) is None or not 0 < amount <= _AMOUNT_MAX:
            raise Refusal("INVALID_REQUEST")
        self.check_room()
        now_ms = self._clock.now_ms()
        record = PaymentRecord(
            payment_key=_payment_key(now_ms),
            order_id=order_id,
            order_name=order_name,
            total_amount=amount,
            balance_amount=amount,
            currency=currency,
            status="READY",
            secret=f"ps_{secrets.token_urlsafe(15)}",
            requested_at_ms=now_ms,
            customer_key=customer_key,
            success_url=success_url,
            fail_url=fail_url,
        )
        return Outcome(payment=record)

    def authenticate(
        self, record: PaymentRecord, *, method: Method, decline: str | None = None
    ) -> Outcome:
        """The buyer proved the means of payment: IN_PROGRESS. No money has moved."""
        if record.status != "READY":
            raise Refusal("ALREADY_PROCESSED_PAYMENT")
        return Outcome(
            payment=msgspec.structs.replace(
                record,
                status="IN_PROGRESS",
                method=method,
                decline=decline,
                authenticated_at_ms=self._clock.now_ms(),
            )
        )

    def confirm(self, *, payment_key: str, order_id: str, amount: int) -> Outcome:
        """The one call that takes the money."""
        if _ORDER_ID.fullmatch(order_id) is None:
            raise Refusal("INVALID_REQUEST")
        record = self.payment(payment_key)
        if record.status in {"READY", "EXPIRED"}:
            raise Refusal("NOT_FOUND_PAYMENT_SESSION")
        if record.order_id != order_id:
            raise Refusal("FORBIDDEN_REQUEST")
        if record.status != "IN_PROGRESS":
            raise Refusal("ALREADY_PROCESSED_PAYMENT")
        if record.total_amount != amount:
            raise Refusal("INVALID_REQUEST", "결제 금액이 요청한 금액과 다릅니다.")
        if any(other.cancels for other in self.payments(order_id)):
            raise Refusal("DUPLICATED_ORDER_ID")
        if record.decline is not None:
            aborted = msgspec.structs.replace(record, status="ABORTED", failure=record.decline)
            return Outcome(payment=aborted, refusal=Refusal(record.decline))
        if record.method == "virtual_account":
            return self._issue_account(record)
        return self._approve(record, "charge")

    def cancel(self, payment_key: str, request: CancelRequest) -> Outcome:
        """Give money back, all or some; or close an unpaid virtual account."""
        record = self.payment(payment_key)
        if not 0 < len(request.cancel_reason) <= 200:
            raise Refusal("INVALID_REQUEST")
        if record.status == "CANCELED":
            raise Refusal("ALREADY_CANCELED_PAYMENT")
        if record.status not in {"DONE", "PARTIAL_CANCELED", "WAITING_FOR_DEPOSIT"}:
            raise Refusal("NOT_CANCELABLE_PAYMENT")
        amount = _cancel_amount(record, request)
        paid = record.status != "WAITING_FOR_DEPOSIT"
        _check_account(record, request)
        now_ms, key = self._clock.now_ms(), _transaction_key()
        left = record.balance_amount - amount
        cancel = Cancellation(
            amount=amount,
            reason=request.cancel_reason,
            at_ms=now_ms,
            transaction_key=key,
            refundable_after=left,
        )
        # A full cancel in one call is CANCELED; in several it stays PARTIAL_CANCELED.
        whole = amount == record.total_amount
        after = msgspec.structs.replace(
            record,
            status="CANCELED" if whole else "PARTIAL_CANCELED",
            balance_amount=left,
            last_transaction_key=key,
            cancels=(*record.cancels, cancel),
        )
        entry = self._entry(after, "cancel", amount, now_ms) if paid else None
        return Outcome(payment=after, entry=entry)

    def deposit(self, payment_key: str) -> Outcome:
        """A deposit into the virtual account."""
        record = self.payment(payment_key)
        due_at_ms = record.due_at_ms
        if record.status != "WAITING_FOR_DEPOSIT" or due_at_ms is None:
            raise Refusal("INVALID_REQUEST", "not a virtual account that awaits a deposit")
        if self._clock.now_ms() >= due_at_ms:
            raise Refusal("INVALID_REQUEST", "the bank closed this virtual account: it is past due")
        return self._approve(record, "deposit")

    def reverse_deposit(self, payment_key: str) -> Outcome:
        """The bank takes a deposit back: the account waits again."""
        record = self.payment(payment_key)
        if record.status != "DONE" or record.method != "virtual_account":
            raise Refusal("INVALID_REQUEST", "not a paid virtual account")
        after = msgspec.structs.replace(
            record,
            status="WAITING_FOR_DEPOSIT",
            approved_at_ms=None,
            last_transaction_key=_transaction_key(),
        )
        entry = self._entry(after, "deposit_reversed", after.total_amount, self._clock.now_ms())
        return Outcome(payment=after, entry=entry)

    def end_refund(self, payment_key: str, status: str) -> Outcome:
        """The bank's transfer of a refund to an account ends; the cancel stays as it is."""
        record = self.payment(payment_key)
        if record.due_at_ms is None or not (record.cancels and record.approved_at_ms):
            raise Refusal("INVALID_REQUEST", "not a refunded deposit")
        return Outcome(payment=msgspec.structs.replace(record, account_refund=status))

    def commit(self, outcome: Outcome | None = None, *, replay: Replay | None = None) -> None:
        """Write an outcome, and the answer under its idempotency key, as one change."""
        change = Change(
            number=self._changes + 1,
            payment=None if outcome is None else outcome.payment,
            entry=None if outcome is None else outcome.entry,
            replay=replay,
        )
        self._journal.append(change)
        self._apply(change)
        if outcome is not None:
            self._on_change(outcome.payment)

    def note_clock(self, offset_ms: int) -> None:
        """Write the clock's offset before it takes effect."""
        change = Change(number=self._changes + 1, clock_offset_ms=offset_ms)
        self._journal.append(change)
        self._apply(change)

    def lapse_due(self) -> None:
        """Expire all payments that are due."""
        now_ms = self._clock.now_ms()
        while self._lapsing and self._lapsing[0][0] <= now_ms:
            self._lapsed(self._payments[self._lapsing[0][1]])
            heapq.heappop(self._lapsing)

    def _apply(self, change: Change) -> None:
        self._changes = change.number
        if change.payment is not None:
            self._keep(change.payment)
        if change.entry is not None:
            self._entries.append(change.entry)
        if change.replay is not None:
            self._replays[change.replay.key] = change.replay

    def _keep(self, record: PaymentRecord) -> None:
        if record.payment_key not in self._payments:
            self._by_order.setdefault(record.order_id, []).append(record.payment_key)
        self._payments[record.payment_key] = record
        lapses_at_ms = record.lapses_at_ms()
        if lapses_at_ms is not None:
            heapq.heappush(self._lapsing, (lapses_at_ms, record.payment_key))

    def _lapsed(self, record: PaymentRecord) -> PaymentRecord:
        """The record; it becomes EXPIRED first if it is due."""
        lapses_at_ms = record.lapses_at_ms()
        if lapses_at_ms is None or self._clock.now_ms() < lapses_at_ms:
            return record
        expired = msgspec.structs.replace(record, status="EXPIRED", failure="EXPIRED_PAYMENT")
        self.commit(Outcome(payment=expired))
        return expired

    def _approve(self, record: PaymentRecord, kind: Kind) -> Outcome:
        now_ms = self._clock.now_ms()
        after = msgspec.structs.replace(
            record,
            status="DONE",
            approved_at_ms=now_ms,
            last_transaction_key=_transaction_key(),
        )
        entry = self._entry(after, kind, after.total_amount, now_ms)
        return Outcome(payment=after, entry=entry)

    def _issue_account(self, record: PaymentRecord) -> Outcome:
        after = msgspec.structs.replace(
            record,
            status="WAITING_FOR_DEPOSIT",
            due_at_ms=self._clock.now_ms() + DEPOSIT_MS,
            last_transaction_key=_transaction_key(),
        )
        return Outcome(payment=after)

    def _entry(self, record: PaymentRecord, kind: Kind, amount: int, at_ms: int) -> Entry:
        return Entry(
            seq=len(self._entries) + 1,
            at_ms=at_ms,
            kind=kind,
            payment_key=record.payment_key,
            order_id=record.order_id,
            amount=amount,
            transaction_key=record.last_transaction_key or "",
        )


def _cancel_amount(record: PaymentRecord, request: CancelRequest) -> int:
    """The amount of a cancel, or the refusal that it gets."""
    guard = request.refundable_amount
    if guard is not None and guard != record.balance_amount:
        raise Refusal("NOT_MATCHES_REFUNDABLE_AMOUNT")
    if request.currency not in {None, record.currency}:
        raise Refusal("INVALID_REQUEST")
    amount = record.balance_amount if request.cancel_amount is None else request.cancel_amount
    if amount > record.balance_amount or record.balance_amount == 0:
        raise Refusal("NOT_CANCELABLE_AMOUNT")
    if amount <= 0:
        raise Refusal("INVALID_REQUEST")
    if record.status == "WAITING_FOR_DEPOSIT" and amount != record.total_amount:
        raise Refusal("NOT_ALLOWED_PARTIAL_REFUND_WAITING_DEPOSIT")
    return amount


def _check_account(record: PaymentRecord, request: CancelRequest) -> None:
    """A paid virtual account needs an account for the refund; no other payment may have one."""
    account = request.refund_receive_account
    if record.method != "virtual_account" or record.status == "WAITING_FOR_DEPOSIT":
        if account is not None:
            raise Refusal("INVALID_REQUEST")
        return
    if account is None:
        raise Refusal("INVALID_REFUND_ACCOUNT_INFO")
    number = account.get("accountNumber", "")
    if not (number.isdecimal() and len(number) <= 20):
        raise Refusal("INVALID_REFUND_ACCOUNT_NUMBER")
    if not account.get("bank"):
        raise Refusal("INVALID_BANK")
    if not 0 < len(account.get("holderName", "")) <= 60:
        raise Refusal("INVALID_REFUND_ACCOUNT_INFO")


def _payment_key(now_ms: int) -> str:
    """Recognisable, with a tail that is not guessable: 80 random bits."""
    return f"tbox{as_datetime(now_ms):%Y%m%d%H%M%S}{secrets.token_hex(10)}"


def _transaction_key() -> str:
    return secrets.token_hex(16).upper()
