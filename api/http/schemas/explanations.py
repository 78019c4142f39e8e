"""Wire schemas that explain the counters of an item."""

from api.http.schemas.base import ResponseModel
from reservation.application.reservations.explain import SkuWhy, Waiting
from reservation.domain.clock import as_wire

__all__ = ["HolderAnswer", "SkuWhyAnswer", "WaitingAnswer"]


class HolderAnswer(ResponseModel, frozen=True, kw_only=True):
    """A buyer who holds units of an item."""

    buyer_id: str
    quantity: int
    orders: int
    since: str


class WaitingAnswer(ResponseModel, frozen=True, kw_only=True):
    """An order that holds units of an item, and the earliest time at which that may change."""

    order_id: str
    buyer_id: str
    status: str
    quantity: int
    since: str
    until: str

    @classmethod
    def of(cls, order: Waiting) -> "WaitingAnswer":
        """The order on the wire."""
        return cls(
            order_id=order.order_id,
            buyer_id=order.buyer_id,
            status=order.status.value,
            quantity=order.quantity,
            since=as_wire(order.since_ms),
            until=as_wire(order.until_ms),
        )


class SkuWhyAnswer(ResponseModel, frozen=True, kw_only=True):
    """The units of one item, and when they return or are settled."""

    sale_id: str
    sku: str
    total: int
    available: int
    held: int
    sold: int
    #: Most units first; sold units are not held.
    holders: list[HolderAnswer]
    next_deadlines: list[WaitingAnswer]
    #: Payments in progress; `until` is when the settler checks again.
    undecided: list[WaitingAnswer]

    @classmethod
    def of(cls, why: SkuWhy) -> "SkuWhyAnswer":
        """The explanation on the wire."""
        return cls(
            sale_id=why.sale_id,
            sku=why.item.sku,
            total=why.item.total,
            available=why.item.available,
            held=why.item.held,
            sold=why.item.sold,
            holders=[
                HolderAnswer(
                    buyer_id=holder.buyer_id,
                    quantity=holder.quantity,
                    orders=holder.orders,
                    since=as_wire(holder.since_ms),
                )
                for holder in why.holders
            ],
            next_deadlines=[WaitingAnswer.of(order) for order in why.next_deadlines],
            undecided=[WaitingAnswer.of(order) for order in why.undecided],
        )
