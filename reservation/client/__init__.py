"""Client library for a shop's own code: `Client`, and `AsyncClient` for asyncio.

    from reservation.client import Client, SoldOut

    with Client("https://stock.example", token=buyers_jwt) as stock:
        sale = stock.sale("winter")
        try:
            held = stock.prepare("winter", {"hoodie": 1}, amount=sale.price_of({"hoodie": 1}))
        except SoldOut as refusal:
            print("left:", refusal.facts["available"])

Every call is safe to repeat, so both retry after lost answers and temporary refusals (`Retries`): a
prepare carries an Idempotency-Key, and the same key and body always name the same order.
"""

from reservation.client.async_client import AsyncClient
from reservation.client.client import Client
from reservation.client.errors import (
    BuyerLimitExceeded,
    ClientError,
    NoAnswer,
    Refused,
    SoldOut,
)
from reservation.client.models import Item, Line, Payment, Reservation, Sale, VirtualAccount
from reservation.client.retries import Retries
from reservation.client.webhooks import InvalidWebhook, verify_webhook

__all__ = [
    "AsyncClient",
    "BuyerLimitExceeded",
    "Client",
    "ClientError",
    "InvalidWebhook",
    "Item",
    "Line",
    "NoAnswer",
    "Payment",
    "Refused",
    "Reservation",
    "Retries",
    "Sale",
    "SoldOut",
    "VirtualAccount",
    "verify_webhook",
]
