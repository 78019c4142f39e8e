"""State records of the sandbox: payments, money entries, first answers; and one change of them."""

from typing import Literal

import msgspec

__all__ = [
    "AUTHENTICATED_MS",
    "WINDOW_MS",
    "Cancellation",
    "Change",
    "Entry",
    "Kind",
    "Method",
    "PaymentRecord",
    "Replay",
]

Method = Literal["card", "virtual_account"]
Kind = Literal["charge", "deposit", "deposit_reversed", "cancel"]

#: From opening the window to the buyer's authentication.
WINDOW_MS = 30 * 60 * 1000
#: From the authentication to the confirm.
AUTHENTICATED_MS = 10 * 60 * 1000


class Cancellation(msgspec.Struct, frozen=True, kw_only=True):
    """One cancel of a payment, in full or in part."""

    amount: int
    reason: str
    at_ms: int
    transaction_key: str
    refundable_after: int


class PaymentRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A payment. It is replaced, never changed, so that a failed write leaves the old one."""

    payment_key: str
    order_id: str
    order_name: str
    total_amount: int
    balance_amount: int
    currency: str
    status: str
    secret: str
    requested_at_ms: int
    method: Method | None = None
    customer_key: str | None = None
    success_url: str = ""
    fail_url: str = ""
    #: The code of the coming refusal of its confirm.
    decline: str | None = None
    failure: str | None = None
    authenticated_at_ms: int | None = None
    approved_at_ms: int | None = None
    #: Of a virtual account.
    due_at_ms: int | None = None
    account_refund: str | None = None
    last_transaction_key: str | None = None
    cancels: tuple[Cancellation, ...] = ()

    def lapses_at_ms(self) -> int | None:
        """When this payment becomes EXPIRED, if it waits for a buyer."""
        if self.status == "READY":
            return self.requested_at_ms + WINDOW_MS
        if self.status == "IN_PROGRESS" and self.authenticated_at_ms is not None:
            return self.authenticated_at_ms + AUTHENTICATED_MS
        return None


class Entry(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """Money that moved. Amounts are positive; the kind gives the direction."""

    seq: int
    at_ms: int
    kind: Kind
    payment_key: str
    order_id: str
    amount: int
    transaction_key: str


class Replay(msgspec.Struct, frozen=True, kw_only=True):
    """The first answer under an idempotency key."""

    key: str
    at_ms: int
    status: int
    body: str


class Change(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """All changes of one call, written as one line so that they are atomic."""

    number: int
    payment: PaymentRecord | None = None
    entry: Entry | None = None
    replay: Replay | None = None
    #: Total offset of the sandbox's clock.
    clock_offset_ms: int | None = None
