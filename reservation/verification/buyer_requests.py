"""Requests of a buyer and the sandbox's page, as data: each kind is written once for all crowds."""

from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import urlencode

from reservation.verification.scenario_steps import Request

__all__ = [
    "Order",
    "authenticate_payment",
    "come_back",
    "deposit",
    "fail",
    "prepare",
    "proof_of",
    "read",
    "read_sale",
    "release",
    "sandbox_of",
    "success_url",
]

#: The answer to a prepare.
Order = dict[str, Any]

_AS_JSON: Final = {"Accept": "application/json"}
#: The PG's code for a buyer who left its page.
_CANCELED: Final = "PAY_PROCESS_CANCELED"


def read_sale(sale_id: str, headers: Mapping[str, str]) -> Request:
    """Read the sale, its items and their prices."""
    return Request(name="look", method="GET", url=f"/v1/sales/{sale_id}", headers=headers)


def prepare(
    sale_id: str,
    lines: Mapping[str, int],
    *,
    amount: int,
    key: str,
    headers: Mapping[str, str],
    cut_after_seconds: float | None = None,
) -> Request:
    """Request a hold on these quantities."""
    items = [{"sku": sku, "quantity": quantity} for sku, quantity in lines.items()]
    return Request(
        name="prepare",
        method="POST",
        url=f"/v1/sales/{sale_id}/reservations",
        headers={**headers, "Idempotency-Key": key},
        body={"items": items, "amount": amount},
        known=("amount_mismatch",),
        cut_after_seconds=cut_after_seconds,
    )


def sandbox_of(order: Order) -> str | None:
    """The sandbox's address in an order; none if the service has another PG than its own."""
    checkout: str | None = order["payment"].get("checkoutUrl")
    return None if checkout is None else checkout.removesuffix("/checkout")


def authenticate_payment(
    sandbox_url: str,
    order: Order,
    *,
    amount: int | None = None,
    method: str = "card",
    decline: str | None = None,
) -> Request:
    """Authenticate a payment at the sandbox without its page."""
    paid = order["amount"] if amount is None else amount
    body = {"orderId": order["orderId"], "amount": paid, "method": method}
    return Request(
        name="pay at the PG",
        method="POST",
        url=f"{sandbox_url}/_payments",
        body=body | ({"decline": decline} if decline else {}),
    )


def deposit(sandbox_url: str, payment_key: str) -> Request:
    """Pay into the virtual account of a payment."""
    return Request(
        name="deposit at the PG",
        method="POST",
        url=f"{sandbox_url}/_deposits",
        body={"paymentKey": payment_key},
    )


def success_url(order: Order, payment_key: str, **changes: str) -> str:
    """The URL to which the PG sends the browser after an authentication."""
    query = {
        "paymentType": "NORMAL",
        "orderId": order["orderId"],
        "paymentKey": payment_key,
        "amount": str(order["amount"]),
    }
    return _with_query(order["payment"]["successUrl"], query | changes)


def come_back(url: str, *known: str, name: str = "come back") -> Request:
    """Open the success URL."""
    return Request(name=name, method="GET", url=url, headers=_AS_JSON, known=known)


def fail(order: Order) -> Request:
    """Open the fail URL, as the PG does for a buyer who left its page."""
    query = {"code": _CANCELED, "message": "canceled", "orderId": order["orderId"]}
    url = _with_query(order["payment"]["failUrl"], query)
    return Request(name="fail", method="GET", url=url, headers=_AS_JSON)


def proof_of(order: Order) -> dict[str, str]:
    """The headers that prove the right to an order."""
    return {"X-Reservation-Token": order["token"]}


def read(
    order_id: str,
    headers: Mapping[str, str],
    *known: str,
    wait_seconds: int = 0,
    name: str = "read",
) -> Request:
    """Read an order; with a wait, answer when its payment has an outcome."""
    query = f"?wait={wait_seconds}" if wait_seconds else ""
    url = f"/v1/reservations/{order_id}{query}"
    return Request(name=name, method="GET", url=url, headers=headers, known=known)


def release(
    order_id: str, headers: Mapping[str, str], *known: str, name: str = "release"
) -> Request:
    """Give back a hold."""
    url = f"/v1/reservations/{order_id}/release"
    return Request(name=name, method="POST", url=url, headers=headers, known=known)


def _with_query(url: str, query: Mapping[str, str]) -> str:
    return f"{url}{'&' if '?' in url else '?'}{urlencode(query)}"
