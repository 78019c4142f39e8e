"""The sale that `reservation serve --demo-sale` opens for a first trial of the service."""

from datetime import UTC, datetime, timedelta
from typing import Any, Final

from reservation.client.operator import OperatorClient, ServiceRefused, path_of

__all__ = ["DEMO_SALE_ID", "open_demo_sale"]

DEMO_SALE_ID: Final = "demo"

#: Long enough that a demo left running is still open later.
_OPEN_FOR: Final = timedelta(days=30)

#: Open a little before now: the clock that decides is Redis's.
_OPENED_BEFORE: Final = timedelta(minutes=1)

_ITEMS: Final = (
    {"sku": "hoodie", "name": "Hoodie", "price": 39_000, "total": 500, "limitPerBuyer": 2},
    {"sku": "mug", "name": "Mug", "price": 12_000, "total": 1_000, "limitPerBuyer": 4},
    {"sku": "print", "name": "Signed print", "price": 150_000, "total": 20, "limitPerBuyer": 1},
)


def open_demo_sale(url: str, admin_api_key: str) -> bool:
    """Create the demo sale unless it exists; True if it was created now."""
    with OperatorClient(url, admin_api_key, operator="demo") as client:
        path = path_of("v1", "admin", "sales", DEMO_SALE_ID)
        try:
            client.call("GET", path)
        except ServiceRefused as refused:
            if refused.code != "sale_not_found":
                raise
        else:
            return False
        client.call("PUT", path, body=_sale(datetime.now(UTC)))
        return True


def _sale(now: datetime) -> dict[str, Any]:
    return {
        "name": "Demo sale",
        "currency": "KRW",
        "opensAt": _text(now - _OPENED_BEFORE),
        "closesAt": _text(now + _OPEN_FOR),
        "holdSeconds": 600,
        "holdPolicy": "prepare",
        "items": list(_ITEMS),
    }


def _text(at: datetime) -> str:
    return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")
