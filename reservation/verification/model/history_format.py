"""History format: the calls and answers of each client, the events, and the final state.

One JSON object a line, distinguished by `kind`, in this order: `history` first, then each
`operation` and `head` in any order, then each `event` by its number, then `order`, `stock` and
`money` as they were found at the end, and the sale's `end`. Times are nanoseconds of one monotonic
clock that all clients share; all clients of a history therefore run on one machine.
"""

from typing import Final, Literal

import msgspec

__all__ = [
    "DECODER",
    "VERSION",
    "End",
    "EventLine",
    "Head",
    "History",
    "MoneyLine",
    "Operation",
    "OrderLine",
    "Record",
    "StockLine",
]

VERSION: Final = 1


class History(msgspec.Struct, tag_field="kind", tag="history", kw_only=True):
    """The first line: the clock of all other times, and the durability of the answers."""

    version: int
    #: The same moment on both clocks.
    unix_ms: int
    monotonic_ns: int
    #: Whether an outcome counts as known only once replicas of Redis have acknowledged it.
    replicas_acknowledge: bool = False


class Operation(
    msgspec.Struct, tag_field="kind", tag="operation", kw_only=True, omit_defaults=True, gc=False
):
    """One call of one client, and the answer to it."""

    sale: str
    client: str
    operation: Literal["prepare", "success", "fail", "release", "read", "refund"]
    invoked_ns: int
    #: Absent if there was no response.
    answered_ns: int | None = None
    buyer: str = ""
    #: The order of the request, or the one in the answer to a prepare.
    order: str = ""
    #: SKU and quantity of each line of a prepare.
    lines: list[tuple[str, int]] = []
    amount: int = 0
    payment_key: str = ""
    #: The HTTP status; 0 if there was no response.
    status: int = 0
    #: The error code of a refusal.
    code: str = ""
    #: The order's state in the answer.
    reported: str = msgspec.field(name="told", default="")
    #: The number of the event that the answer comes from, where it says so.
    seq: int = 0
    replayed: bool = False
    #: The details of a refusal.
    available: dict[str, int] = {}
    sku: str = ""
    limit: int = 0
    taken: int = 0
    expected_amount: int = 0


class Head(msgspec.Struct, tag_field="kind", tag="head", kw_only=True, omit_defaults=True):
    """The head of the sale, seen from outside, and its counters at that very number."""

    sale: str
    invoked_ns: int
    answered_ns: int
    seq: int
    #: `total`, `available`, `held` and `sold` of each item.
    stock: dict[str, tuple[int, int, int, int]] = {}


class EventLine(msgspec.Struct, tag_field="kind", tag="event", kw_only=True, gc=False):
    """One entry of the outbox."""

    sale: str
    seq: int
    event: str
    order: str
    at: int
    #: JSON text exactly as the script wrote it: the chain covers these bytes.
    data: str
    chain: str


class OrderLine(msgspec.Struct, tag_field="kind", tag="order", kw_only=True):
    """An order as SQL has it at the end."""

    sale: str
    order: str
    status: str
    amount: int


class StockLine(msgspec.Struct, tag_field="kind", tag="stock", kw_only=True):
    """An item's counters at the end."""

    sale: str
    sku: str
    total: int
    available: int
    held: int
    sold: int


class MoneyLine(msgspec.Struct, tag_field="kind", tag="money", kw_only=True):
    """One entry of the PG's ledger."""

    sale: str
    order: str
    #: `charge`, `deposit`, `deposit_reversed` or `cancel`.
    entry: Literal["charge", "deposit", "deposit_reversed", "cancel"]
    amount: int


class End(msgspec.Struct, tag_field="kind", tag="end", kw_only=True):
    """The last line of a sale: a history without it was cut off."""

    sale: str
    #: The last event's number.
    seq: int
    #: Whether all orders, all counters and the whole ledger precede it.
    orders: bool = False
    stock: bool = False
    money: bool = False


Record = History | Operation | Head | EventLine | OrderLine | StockLine | MoneyLine | End

DECODER: Final = msgspec.json.Decoder(Record)
