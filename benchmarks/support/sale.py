"""Sale of every contender, and its buyers: made before the clock runs."""

import base64
import hashlib
import hmac
import secrets
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import msgspec

from api.http.schemas.sales import SaleRequest
from reservation.bootstrap import opened
from reservation.client.operator import OperatorClient, path_of
from reservation.config.settings import Settings

__all__ = [
    "PRICE",
    "SALE_ID",
    "SKU",
    "put_directly",
    "put_over_http",
    "restock_over_http",
    "token_of",
    "write_buyers",
]

SALE_ID: Final = "bench"
SKU: Final = "hoodie"
PRICE: Final = 39_000

#: Never reached, even if a long run cycles through the buyers.
_LIMIT_PER_BUYER: Final = 1_000_000

#: No hold expires during a measurement, unless a benchmark wants that.
HOLD_SECONDS: Final = 24 * 3600

_TOKEN_SECONDS: Final = 24 * 3600


def document(stock: int, *, hold_seconds: int = HOLD_SECONDS) -> dict[str, Any]:
    """The sale document that an operator would PUT."""
    now = datetime.now(UTC)
    return {
        "name": "Benchmark",
        "currency": "KRW",
        "opensAt": (now - timedelta(minutes=1)).isoformat(),
        "closesAt": (now + timedelta(days=2)).isoformat(),
        "holdSeconds": hold_seconds,
        "holdPolicy": "prepare",
        "items": [
            {
                "sku": SKU,
                "name": "Hoodie",
                "price": PRICE,
                "total": stock,
                "limitPerBuyer": _LIMIT_PER_BUYER,
            }
        ],
    }


def put_over_http(url: str, admin_api_key: str, stock: int) -> None:
    """Create the sale at a running service."""
    with OperatorClient(url, admin_api_key, operator="benchmark") as client:
        client.call("PUT", path_of("v1", "admin", "sales", SALE_ID), body=document(stock))


def restock_over_http(url: str, admin_api_key: str, delta: int) -> None:
    """Add or withdraw units: without any, each buyer gets a sold-out refusal."""
    body = {"sku": SKU, "delta": delta, "reason": "the benchmark sells out, and goes on"}
    path = path_of("v1", "admin", "sales", SALE_ID, "stock")
    with OperatorClient(url, admin_api_key, operator="benchmark") as client:
        client.call("POST", path, body=body, idempotency_key=secrets.token_hex(8))


async def put_directly(settings: Settings, stock: int) -> None:
    """Create the sale in the Redis of a contender that has no operators."""
    change = msgspec.convert(document(stock), SaleRequest).change()
    async with opened(settings) as service:
        await service.sales.put(SALE_ID, change, if_match=None, operator="benchmark")


def write_buyers(path: Path, *, secret: str, count: int) -> None:
    """One line a buyer: the id and a token that is signed with the secret."""
    with path.open("w") as file:
        for number in range(count):
            buyer = f"buyer-{number:08d}"
            file.write(f"{buyer} {token_of(buyer, secret=secret)}\n")


def token_of(buyer: str, *, secret: str) -> str:
    """A buyer's token (HS256), as a shop would sign it."""
    claims = _base64url(f'{{"sub":"{buyer}","exp":{_ENDS_AT}}}'.encode())
    signed = f"{_HEADER}.{claims}"
    mac = hmac.digest(secret.encode(), signed.encode(), hashlib.sha256)
    return f"{signed}.{_base64url(mac)}"


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


#: The same for all buyers.
_HEADER: Final = _base64url(b'{"alg":"HS256","typ":"JWT"}')
_ENDS_AT: Final = int(time.time()) + _TOKEN_SECONDS
