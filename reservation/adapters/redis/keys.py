"""Key names in Redis. All keys of a sale share its hash tag, so a script accesses one slot."""

import hashlib
from functools import lru_cache, partial
from typing import Final

from reservation.domain.certificate import PARTITIONS_MAX

__all__ = ["Keys", "SaleKeys", "buyer_field", "is_lane", "lane_of", "order_field", "partition_of"]

#: Sales whose key names are cached, at most 1 kB each; bounded because callers may invent ids.
SALES_KEPT_MAX: Final = 4_096
#: The name of a bucket of tombstones: 4,096 buckets keep a million of them in small hashes.
BUCKET_CHARS: Final = 3
#: An order's field in its bucket is the random part of its id.
ORDER_FIELD_CHARS: Final = 24
#: A buyer's field has another length, so that no order has the same field.
BUYER_FIELD_CHARS: Final = 16


class SaleKeys:
    """The keys of one sale. A buyer's id is always last, so no id can produce another key."""

    __slots__ = (
        "_tag",
        "all",
        "confirming",
        "deadlines",
        "deposits",
        "of_prepare",
        "operations",
        "outbox",
        "sale",
        "transfers",
    )

    def __init__(self, prefix: str, sale_id: str) -> None:
        self._tag = f"{prefix}:{{{sale_id}}}:"
        #: The common prefix of all keys of the sale.
        self.all = self._tag
        self.sale = self._tag + "sale"
        self.deadlines = self._tag + "deadlines"
        self.confirming = self._tag + "confirming"
        self.deposits = self._tag + "deposits"
        self.operations = self._tag + "operations"
        self.outbox = self._tag + "outbox"
        #: Only partitions have this key.
        self.transfers = self._tag + "transfers"
        #: The first keys of prepare.lua, in its order.
        self.of_prepare = (
            self.sale,
            self.deadlines,
            self.outbox,
            self.confirming,
            self.deposits,
        )

    def stock(self, sku: str) -> str:
        return f"{self._tag}stock:{sku}"

    def order(self, order_id: str) -> str:
        return f"{self._tag}order:{order_id}"

    def buyer(self, buyer_id: str) -> str:
        return f"{self._tag}buyer:{buyer_id}"

    def buyer_orders(self, buyer_id: str) -> str:
        return f"{self._tag}buyer-orders:{buyer_id}"

    def ended(self, buyer_id: str) -> str:
        """The bucket of the buyer's tombstones."""
        return f"{self._tag}ended:{_hash_of(buyer_id)[:BUCKET_CHARS]}"

    def all_ended(self) -> list[str]:
        """Every bucket of tombstones that the sale may have."""
        width = BUCKET_CHARS
        return [f"{self._tag}ended:{number:0{width}x}" for number in range(16**width)]

    def rate(self, buyer_id: str) -> str:
        return f"{self._tag}rate:{buyer_id}"

    def of_basket(self, order_id: str, buyer_id: str) -> tuple[str, str, str, str]:
        """A basket's own keys, in the order of prepare.lua."""
        # Inlined: a method call costs as much as its work.
        tag = self._tag
        return (
            f"{tag}order:{order_id}",
            f"{tag}buyer:{buyer_id}",
            f"{tag}buyer-orders:{buyer_id}",
            f"{tag}rate:{buyer_id}",
        )


def lane_of(sale_id: str, partition: int) -> str:
    """The lane of a partition: the id `S.p` of its keys, events and rows, in place of a sale's id.

    A sale's id has no dot, so no sale has the same id.

    Raises:
        ValueError: the partition number is out of range.
    """
    if not 0 <= partition < PARTITIONS_MAX:
        raise ValueError(f"partition {partition} is not in 0..{PARTITIONS_MAX - 1}")
    return f"{sale_id}.{partition}"


def is_lane(sale_id: str) -> bool:
    """Whether an id is that of a partition, and not of a whole sale."""
    return "." in sale_id


def partition_of(lane: str) -> tuple[str, int]:
    """The sale of a lane, and which of its partitions it is.

    Raises:
        ValueError: the id is that of a whole sale.
    """
    sale_id, _, partition = lane.partition(".")
    return sale_id, int(partition)


def order_field(order_id: str) -> str:
    """The order's field in its bucket of tombstones (lib/tombstones.lua)."""
    return order_id[-ORDER_FIELD_CHARS:]


def buyer_field(buyer_id: str) -> str:
    """The field that counts a buyer's tombstones in their bucket (lib/tombstones.lua)."""
    return _hash_of(buyer_id)[BUCKET_CHARS : BUCKET_CHARS + BUYER_FIELD_CHARS]


def _hash_of(buyer_id: str) -> str:
    # The only hash function in scripts; collisions are harmless.
    return hashlib.sha1(buyer_id.encode(), usedforsecurity=False).hexdigest()


class Keys:
    """All keys under one prefix, so that the service can share a server."""

    def __init__(self, prefix: str = "rsv") -> None:
        self._prefix = prefix
        #: The keys of a sale; the caller has checked the id (`domain.ids.SALE_ID`).
        self.of = lru_cache(SALES_KEPT_MAX)(partial(SaleKeys, prefix))
        #: The ids of all sales.
        self.sales = f"{prefix}:sales"
        #: The sales that were compared with SQL during this life of the server.
        self.vouched = f"{prefix}:vouched"
        #: The list of workers, which determines the share of each worker.
        self.workers = f"{prefix}:workers"
        #: Written by probes, which check whether replicas acknowledge changes.
        self.acks = f"{prefix}:acks"
        #: Written to measure the sync of the append-only file.
        self.sync = f"{prefix}:sync"

    @property
    def level(self) -> str:
        """The level of the installation, copied from SQL."""
        return f"{self._prefix}:level"

    def process(self, name: str) -> str:
        """A running process's heartbeat; `name` is HOST-PID."""
        return f"{self._prefix}:proc:{name}"
