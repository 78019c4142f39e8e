"""Identifiers: their alphabets, and the derivation of an order id.

An order id is `SALE-TAIL`. The tail is 24 base64url characters (144 bits) of an HMAC over sale,
buyer and idempotency key, so the same request always names the same order, another buyer's id
cannot be guessed, and the sale (so the Redis slot) can be read off the id.
"""

import re

from reservation.domain import base64url
from reservation.domain.hmac_sha256 import Mac

__all__ = [
    "BUYER_ID",
    "IDEMPOTENCY_KEY",
    "ORDER_ID",
    "PAYMENT_KEY",
    "SALE_ID",
    "SKU",
    "OrderIds",
    "sale_of",
]

# Python's `$` also matches before a last newline, which no id has: hence `(?!\n)`.
SALE_ID = r"^[A-Za-z0-9_-]{1,32}$(?!\n)"
SKU = r"^[A-Za-z0-9_.-]{1,64}$(?!\n)"
#: 1-128 printable ASCII characters without space and braces: a brace would move the Redis slot.
BUYER_ID = r"^[!-z|~]{1,128}$(?!\n)"
IDEMPOTENCY_KEY = r"^[ -~]{1,255}$(?!\n)"
ORDER_ID = r"^[A-Za-z0-9_-]{1,32}-[A-Za-z0-9_-]{24}$(?!\n)"
#: The PG's ids become part of our URL paths, so the alphabet is closed.
PAYMENT_KEY = r"^[A-Za-z0-9_-]{1,200}$(?!\n)"

_TAIL_CHARS = 24
_TAIL_BYTES = 18
_ORDER_ID = re.compile(ORDER_ID)
_PAYMENT_KEY = re.compile(PAYMENT_KEY)


class OrderIds:
    """Derives order ids from the master key, which never rotates.

    The secret of a sale is derived only from the master key and the sale's id, so a rebuild of
    Redis and a change of the signing keys keep every order id (docs/adr/0004-order-ids.md).
    """

    def __init__(self, master_key: bytes) -> None:
        self._master = Mac(master_key)
        self._sale_macs: dict[str, Mac] = {}

    def order_id(self, *, sale_id: str, buyer_id: str, idempotency_key: str) -> str:
        """The id of the order that this buyer's key names in this sale."""
        mac = self._sale_macs.get(sale_id)
        if mac is None:
            mac = Mac(self._master.digest(b"order-ids\0" + sale_id.encode()))
            self._sale_macs[sale_id] = mac
        message = f"{len(buyer_id)}:{buyer_id}{idempotency_key}".encode()
        tail = mac.digest(message)[:_TAIL_BYTES]
        return f"{sale_id}-{base64url.encode(tail)}"

    def customer_key(self, buyer_id: str) -> str:
        """The PG's `customerKey`: 32 base64url characters that reveal nothing about the buyer."""
        mac = self._master.digest(b"customer\0" + buyer_id.encode())
        return base64url.encode(mac[:24])


def sale_of(order_id: str) -> str | None:
    """The sale in an order id, or None if it is not an order id."""
    if _ORDER_ID.fullmatch(order_id) is None:
        return None
    return order_id[: -_TAIL_CHARS - 1]


def is_payment_key(text: str) -> bool:
    """Whether this can be a payment key of the PG."""
    return _PAYMENT_KEY.fullmatch(text) is not None
