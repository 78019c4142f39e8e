"""Every key name in Redis: all keys of a sale share its hash tag, so a script touches one slot."""

from functools import lru_cache, partial
from typing import Final

__all__ = ["Keys", "SaleKeys"]

#: Sales whose key names are cached, at most 1 kB each; bounded because callers may invent ids.
SALES_KEPT_MAX: Final = 4_096


class SaleKeys:
    """The keys of one sale. Nothing follows a buyer's id, so no id can make another key."""

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
    )

    def __init__(self, prefix: str, sale_id: str) -> None:
        self._tag = f"{prefix}:{{{sale_id}}}:"
        #: Their common prefix.
        self.all = self._tag
        self.sale = self._tag + "sale"
        self.deadlines = self._tag + "deadlines"
        self.confirming = self._tag + "confirming"
        self.deposits = self._tag + "deposits"
        self.operations = self._tag + "operations"
        self.outbox = self._tag + "outbox"
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


class Keys:
    """All keys under one prefix, so that the service can share a server."""

    def __init__(self, prefix: str = "rsv") -> None:
        self._prefix = prefix
        #: The keys of a sale; the caller has checked the id (`domain.ids.SALE_ID`).
        self.of = lru_cache(SALES_KEPT_MAX)(partial(SaleKeys, prefix))
        #: The ids of all sales.
        self.sales = f"{prefix}:sales"
        #: The sales that were compared with SQL in this life of the server.
        self.vouched = f"{prefix}:vouched"
        #: The list of workers, which determines the share of each.
        self.workers = f"{prefix}:workers"

    @property
    def level(self) -> str:
        """The level of the installation, copied from SQL."""
        return f"{self._prefix}:level"

    def process(self, name: str) -> str:
        """A running process's heartbeat; `name` is HOST-PID."""
        return f"{self._prefix}:proc:{name}"
