"""Wire schemas of the event feed."""

from typing import Any

from api.http.schemas.base import ResponseModel
from reservation.application.events.feed import FeedEvent, FeedPage
from reservation.domain.clock import as_wire

__all__ = ["EventAnswer", "EventsAnswer"]


class EventAnswer(ResponseModel, frozen=True, kw_only=True):
    """One event of the feed."""

    #: Rises with each event of the installation; a consumer stores it to detect repeats.
    id: int
    sale_id: str
    #: 0 in a sale of one partition.
    partition: int
    #: The number of the event in its partition.
    seq: int
    #: Of the sale; another one after a rebuild.
    epoch: str
    type: str
    at: str
    #: Null for a sale's event.
    order_id: str | None
    #: `reservation`, as it was after the event, and `change`, the event's own facts.
    data: dict[str, Any]

    @classmethod
    def of(cls, event: FeedEvent) -> "EventAnswer":
        """The event on the wire."""
        return cls(
            id=event.id,
            sale_id=event.sale_id,
            partition=event.partition,
            seq=event.seq,
            epoch=event.epoch,
            type=event.type,
            at=as_wire(event.at_ms),
            order_id=event.order_id,
            data=event.data,
        )


class EventsAnswer(ResponseModel, frozen=True, kw_only=True):
    """A page of events."""

    events: list[EventAnswer]
    #: The value of `after` for the next page.
    next: int

    @classmethod
    def of(cls, page: FeedPage) -> "EventsAnswer":
        """The page on the wire."""
        return cls(events=[EventAnswer.of(event) for event in page.events], next=page.next)
