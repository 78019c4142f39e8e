"""Wire schemas of reservations: a prepare, and a reservation as its buyer sees it."""

from functools import lru_cache
from typing import Annotated

from msgspec import Meta

from api.http.schemas.accounts import VirtualAccountAnswer
from api.http.schemas.base import WORDS, RequestModel, ResponseModel
from reservation.application.reservations.queries import DepositAccount
from reservation.domain.clock import as_wire
from reservation.domain.ids import SKU
from reservation.domain.reservation import Line, Reservation
from reservation.domain.sale import AMOUNT_MAX
from reservation.domain.states import Status

__all__ = ["PrepareRequest", "ReservationAnswer", "ReservationsAnswer"]

#: Lines of one basket: enough for one person's purchase, and a bound on the script's run time.
LINES_MAX = 20
#: Units of one line: above any buyer's limit that makes sense.
QUANTITY_MAX = 10_000
#: Cached lines of orders in their wire form.
_LINES_KEPT_MAX = 1_024


class PrepareLine(RequestModel, frozen=True, kw_only=True):
    """A quantity of one item."""

    sku: Annotated[str, Meta(pattern=SKU)]
    quantity: Annotated[int, Meta(ge=1, le=QUANTITY_MAX)]


class PrepareRequest(RequestModel, frozen=True, kw_only=True):
    """The buyer's basket, and the total that the page showed."""

    items: Annotated[list[PrepareLine], Meta(min_length=1, max_length=LINES_MAX)]
    amount: Annotated[
        int, Meta(ge=1, le=AMOUNT_MAX, description="Sum of price times quantity, in minor units.")
    ]
    order_name: Annotated[str, Meta(min_length=1, max_length=100, pattern=WORDS)] | None = None


class LineAnswer(ResponseModel, frozen=True, kw_only=True):
    """One line of a reservation, at its promised price."""

    sku: str
    quantity: int
    price: int


class PaymentAnswer(ResponseModel, frozen=True, kw_only=True):
    """The members that the storefront needs to open the PG's page."""

    provider: str
    client_key: str
    customer_key: str
    success_url: str
    fail_url: str
    #: The page's address, or null if the PG's own SDK opens it.
    checkout_url: str | None


class ReservationAnswer(ResponseModel, frozen=True, kw_only=True, omit_defaults=True):
    """A reservation as its buyer sees it."""

    order_id: str
    sale_id: str
    status: Status
    items: list[LineAnswer]
    amount: int
    currency: str
    order_name: str
    created_at: str
    updated_at: str
    expires_at: str
    #: Only in prepare's response: reads and releases this reservation.
    token: str | None = None
    #: Only for its buyer, while the payment has not begun.
    payment: PaymentAnswer | None = None
    #: While AWAITING_DEPOSIT.
    virtual_account: VirtualAccountAnswer | None = None

    @classmethod
    def of(
        cls,
        order: Reservation,
        *,
        now_ms: int,
        token: str | None = None,
        payment: PaymentAnswer | None = None,
        account: DepositAccount | None = None,
    ) -> "ReservationAnswer":
        """The reservation on the wire."""
        return cls(
            order_id=order.order_id,
            sale_id=order.sale_id,
            status=order.shown_status(now_ms),
            items=_line_answers(order.lines),
            amount=order.amount,
            currency=order.currency,
            order_name=order.order_name,
            created_at=as_wire(order.created_at_ms),
            updated_at=as_wire(order.updated_at_ms),
            expires_at=as_wire(order.expires_at_ms),
            token=token,
            payment=payment,
            virtual_account=VirtualAccountAnswer.of(account) if account else None,
        )


@lru_cache(maxsize=_LINES_KEPT_MAX)
def _line_answers(lines: tuple[Line, ...]) -> list[LineAnswer]:
    """The lines on the wire, cached: most orders of a sale have the same."""
    return [LineAnswer(sku=line.sku, quantity=line.quantity, price=line.price) for line in lines]


class ReservationsAnswer(ResponseModel, frozen=True, kw_only=True):
    """A buyer's reservations in one sale, newest first."""

    reservations: list[ReservationAnswer]
