"""The payment gateway's interface: its calls, and every answer they may get.

Answers are values. Each one states the known facts about the money, and so the permitted next step:

    Answered       the PG showed the payment itself; `payment.status` is its state
    Declined       a refusal from the allow-list: this call moved no money
    PaymentMissing the PG does not have this payment (or no longer lets it be confirmed)
    OrderIdUsed    the PG has another payment of this order id: this call moved no money
    Misconfigured  our key, our request or our contract with the PG is wrong: an operator must act
    TryAgain       nothing was done by this call; the same call may be sent again
    Unknown        the outcome is unknown: ask the PG before deciding anything
"""

from collections.abc import Mapping
from datetime import datetime
from enum import StrEnum
from typing import Final, Protocol

import msgspec

__all__ = [
    "CANCELLED_PAYMENT",
    "ENDED_PAYMENT",
    "OPEN_PAYMENT",
    "Answer",
    "Answered",
    "Declined",
    "GatewayLimits",
    "Misconfigured",
    "OrderIdUsed",
    "Payment",
    "PaymentGateway",
    "PaymentMissing",
    "PaymentStatus",
    "RefundAccount",
    "Transaction",
    "TransactionList",
    "TransactionPage",
    "TryAgain",
    "Unknown",
    "VirtualAccount",
]


class PaymentStatus(StrEnum):
    """The PG's own states of a payment."""

    READY = "READY"
    IN_PROGRESS = "IN_PROGRESS"
    WAITING_FOR_DEPOSIT = "WAITING_FOR_DEPOSIT"
    DONE = "DONE"
    CANCELED = "CANCELED"
    PARTIAL_CANCELED = "PARTIAL_CANCELED"
    ABORTED = "ABORTED"
    EXPIRED = "EXPIRED"


#: A payment in one of these has money, or is an account that may still be paid into.
OPEN_PAYMENT: Final = frozenset(
    {PaymentStatus.DONE, PaymentStatus.PARTIAL_CANCELED, PaymentStatus.WAITING_FOR_DEPOSIT}
)
#: A cancel took place: of the whole payment, or of a part.
CANCELLED_PAYMENT: Final = frozenset({PaymentStatus.CANCELED, PaymentStatus.PARTIAL_CANCELED})
#: A payment in one of these can take no more money, or has given it back.
ENDED_PAYMENT: Final = frozenset(
    {PaymentStatus.CANCELED, PaymentStatus.ABORTED, PaymentStatus.EXPIRED}
)


class VirtualAccount(msgspec.Struct, frozen=True, kw_only=True):
    """The account that the PG opened for one payment: its buyer pays in there.

    It is shown to the buyer and the operators. It is not a secret of the service, but must not be
    logged.
    """

    #: The PG's code of the bank.
    bank: str
    account_number: str
    #: The name on the account.
    holder_name: str
    #: The PG's status of the bank's transfer of a refund, which comes days after the cancel.
    refund_status: str | None = None


class Payment(msgspec.Struct, frozen=True, kw_only=True):
    """A payment as the PG shows it. Amounts are integers in the currency's minor unit."""

    payment_key: str
    order_id: str
    #: The PG's status; kept as text because the PG may add one without notice.
    status: str
    total_amount: int
    #: The amount that can still be cancelled; 0 means the money went back in full.
    balance_amount: int
    currency: str
    method: str | None = None
    approved_at: datetime | None = None
    virtual_account: VirtualAccount | None = None
    #: Of a virtual account: when an unpaid one lapses.
    due_at: datetime | None = None
    #: Compared with the secret of a deposit webhook.
    secret: str | None = None
    failure_code: str | None = None


class RefundAccount(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """The account that a deposit is refunded to."""

    bank: str
    account_number: str
    holder_name: str


class GatewayLimits(msgspec.Struct, frozen=True, kw_only=True):
    """The payments that a gateway accepts."""

    #: Currency -> its smallest payment in minor units. Any other currency is refused.
    minimum_amounts: Mapping[str, int]
    #: The same for payments into a virtual account.
    minimum_account_amounts: Mapping[str, int]


class Answered(msgspec.Struct, frozen=True, tag=True):
    """The PG showed the payment; the caller still checks order, key, amount and currency."""

    payment: Payment


class Declined(msgspec.Struct, frozen=True, tag=True):
    """A refusal from the allow-list in `reservation.adapters.toss.error_codes`."""

    code: str
    message: str


class PaymentMissing(msgspec.Struct, frozen=True, tag=True):
    """A clean 404: no proof while a confirm of ours may still be running."""

    code: str


class OrderIdUsed(msgspec.Struct, frozen=True, tag=True):
    """A clean refusal: the order id has a payment already, this one's own success included."""

    code: str
    #: As in `Unknown`: always a clean 4xx.
    bound_to_key: bool = True


class Misconfigured(msgspec.Struct, frozen=True, tag=True):
    """The PG blames our request: keep the hold until a lookup shows the cause."""

    code: str
    message: str
    #: Whether the PG refused our API key itself, before it read the request.
    key_refused: bool = False
    #: As in `Unknown`: once our mistake is corrected, another try needs another key.
    bound_to_key: bool = False


class TryAgain(msgspec.Struct, frozen=True, tag=True):
    """Nothing was sent, or the same call is still running: send it again with the same key."""

    code: str


class Unknown(msgspec.Struct, frozen=True, tag=True):
    """A time-out, a broken connection, a 5xx, an unlisted code or an unreadable answer."""

    reason: str
    #: True if the PG gave a clean 4xx itself, which stays bound to the idempotency key:
    #: another try needs another key, after a lookup of the payment.
    bound_to_key: bool = False


Answer = Answered | Declined | PaymentMissing | OrderIdUsed | Misconfigured | TryAgain | Unknown


class Transaction(msgspec.Struct, frozen=True, kw_only=True):
    """One entry in the gateway's list: an approval, a deposit or a cancel of a payment."""

    #: The gateway's id of the entry, by which the next page begins.
    transaction_key: str
    payment_key: str
    order_id: str
    #: The status of the payment after the entry.
    status: str


class TransactionPage(msgspec.Struct, frozen=True, tag=True):
    """Entries in the gateway's order. A short page does not end the list, an empty one does."""

    transactions: tuple[Transaction, ...]


class TransactionList(Protocol):
    """A gateway that lists all transactions of the merchant, the service's or not."""

    async def list_transactions(
        self, *, since: datetime, until: datetime, after: str
    ) -> "TransactionPage | Answer":
        """One page of the transactions from `since` until before `until`.

        Args:
            since: the first instant; the gateway may round it down to a second.
            until: the end.
            after: the last entry of the page before; empty for the first page.

        Returns:
            The page; any other `Answer` but `Answered` and `Declined` if it was not read.
        """
        ...


class PaymentGateway(Protocol):
    """Two implementations: the Toss client, and a scripted one in the tests.

    A gateway that lists its transactions is a `TransactionList` as well.

    No call retries by itself or raises for a failure of the network or the PG; cancellation passes
    through. Calls take at most the client's own time-out.
    """

    @property
    def limits(self) -> GatewayLimits:
        """The payments that this gateway accepts."""
        ...

    async def confirm(
        self, *, payment_key: str, order_id: str, amount: int, idempotency_key: str
    ) -> Answer:
        """Ask the PG to move the money of one authenticated payment.

        Args:
            payment_key: the PG's id of this attempt, from the success URL; matches `PAYMENT_KEY`.
            order_id: the reservation's id.
            amount: the reservation's own total in minor units, never the URL's figure.
            idempotency_key: at most 300 characters; the PG ignores the body when it matches, so it
                belongs to exactly one payment attempt.

        Returns:
            Any `Answer`. `Answered` carries DONE or WAITING_FOR_DEPOSIT on success.
        """
        ...

    async def look_up(self, payment_key: str) -> Answer:
        """The payment with this key: any `Answer` but `Declined`. A failed one proves nothing."""
        ...

    async def look_up_order(self, order_id: str) -> Answer:
        """The PG's payment of this order, for use if no payment key is known."""
        ...

    async def cancel(
        self,
        *,
        payment_key: str,
        reason: str,
        idempotency_key: str,
        refund_account: RefundAccount | None = None,
    ) -> Answer:
        """Refund all of the money.

        Returns:
            `Answered` with the payment after the cancel; `Declined` if the PG refuses for good;
            `Unknown` if only `look_up` can decide (an earlier cancel of ours included).
        """
        ...

    async def aclose(self) -> None:
        """Close the connections."""
        ...
