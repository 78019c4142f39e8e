"""Public types of events, in the event feed and in webhooks, derived from the outbox's events."""

from enum import StrEnum
from typing import Final

from reservation.domain.events import EventName
from reservation.domain.states import Status

__all__ = ["WEBHOOK_TYPES", "EventType", "type_of"]


class EventType(StrEnum):
    """The public type of a change of a reservation or a sale; docs/reference/events.md."""

    #: Its units are held: by a prepare, or when its buyer returned from the payment page.
    HELD = "reservation.held"
    #: It exists without stock: the sale holds stock only when the buyer returns.
    PREPARED = "reservation.prepared"
    #: Its buyer returned from the payment page; the units were held before.
    CONFIRMING = "reservation.confirming"
    #: Another process resumed its payment.
    TAKEN_OVER = "reservation.taken_over"
    #: Its payment attempt ended before money was requested.
    VOIDED = "reservation.voided"
    RELEASED = "reservation.released"
    EXPIRED = "reservation.expired"
    CONFIRMED = "order.confirmed"
    AWAITING_DEPOSIT = "order.awaiting_deposit"
    PARTIALLY_REFUNDED = "order.partially_refunded"
    REFUNDED = "order.refunded"
    #: An operator created or changed the sale.
    SALE_PUT = "sale.put"
    SALE_SWITCHED = "sale.switched"
    SALE_RESTOCKED = "sale.restocked"
    SALE_LENT = "sale.lent"
    SALE_BORROWED = "sale.borrowed"
    SALE_REBUILT = "sale.rebuilt"
    SALE_OPENED = "sale.opened"
    SALE_SOLD_OUT = "sale.sold_out"
    SALE_CLOSED = "sale.closed"


#: The types that a webhook endpoint can subscribe to.
WEBHOOK_TYPES: Final = (
    EventType.HELD,
    EventType.RELEASED,
    EventType.EXPIRED,
    EventType.CONFIRMED,
    EventType.AWAITING_DEPOSIT,
    EventType.PARTIALLY_REFUNDED,
    EventType.REFUNDED,
    EventType.SALE_OPENED,
    EventType.SALE_SOLD_OUT,
    EventType.SALE_CLOSED,
)

_OF_SALE: Final = {
    EventName.SALE_PUT: EventType.SALE_PUT,
    EventName.SALE_SWITCHED: EventType.SALE_SWITCHED,
    EventName.RESTOCKED: EventType.SALE_RESTOCKED,
    EventName.LENT: EventType.SALE_LENT,
    EventName.BORROWED: EventType.SALE_BORROWED,
    EventName.REBUILT: EventType.SALE_REBUILT,
}
#: An outbox event that refunds a part of an order leaves it CONFIRMED.
_PART: Final = "partially_refunded"
_BY_STATUS: Final = {
    Status.PREPARED: EventType.PREPARED,
    Status.HELD: EventType.HELD,
    Status.AWAITING_DEPOSIT: EventType.AWAITING_DEPOSIT,
    Status.CONFIRMED: EventType.CONFIRMED,
    Status.RELEASED: EventType.RELEASED,
    Status.EXPIRED: EventType.EXPIRED,
    Status.REFUNDED: EventType.REFUNDED,
}


def type_of(event: str, *, origin: str, to: str) -> str:
    """The public type of an outbox event.

    Args:
        event: its name.
        origin: the reservation's state before it; empty at its creation and for a sale's event.
        to: the reservation's state after it; empty for a sale's event.
    """
    of_sale = _OF_SALE.get(EventName(event)) if event in _EVENTS else None
    if of_sale is not None:
        return of_sale
    match event:
        case EventName.TAKEN_OVER:
            return EventType.TAKEN_OVER
        case EventName.VOIDED if to in (Status.HELD, Status.PREPARED):
            return EventType.VOIDED
        case EventName.CLAIMED:
            # A claim of a reservation without stock takes the stock.
            return EventType.CONFIRMING if origin == Status.HELD else EventType.HELD
        case str() if event == _PART:
            return EventType.PARTIALLY_REFUNDED
        case _:
            found = _BY_STATUS.get(Status(to)) if to in _STATUSES else None
            return found or f"reservation.{event}"


_EVENTS: Final = frozenset(EventName)
_STATUSES: Final = frozenset(Status)
