"""Buyers of a simulated sale: each lives one drawn life, and its calls are recorded."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

from tests.faults.simulation.clients import PG, Answer, Client

__all__ = ["live"]

#: A buyer's actions with a hold, and their weights.
_LIVES = {
    "pays": 40,
    "pays and reloads": 12,
    "pays twice at once": 8,
    "leaves": 8,
    "releases": 8,
    "fails": 5,
    "is declined": 8,
    "comes back late": 8,
    "tampers": 4,
    "makes up a key": 3,
    "transfers": 4,
    "releases while paying": 6,
}
#: Baskets, and their weights.
_BASKETS = (1, 1, 1, 1, 2, 2, 3)
#: Codes of a refused card.
_DECLINES = ("REJECT_CARD_COMPANY", "EXCEED_MAX_AMOUNT", "INVALID_REJECT_CARD")
#: The delay of a buyer who comes back late.
_LATE_SECONDS = 150.0


async def live(client: Client, *, opens_within: float) -> None:
    """One buyer, from the first read on."""
    await client.pause(opens_within)
    order = await _prepare(client)
    if order is None:
        return
    life = client.draw.choices(list(_LIVES), weights=list(_LIVES.values()))[0]
    client.town.count(f"buyer {life}")
    await client.pause(6.0)
    await _ACTS[life](client, order)
    if client.draw.random() < 0.4:
        await client.call("GET", f"/v1/reservations/{order['orderId']}")


async def _prepare(client: Client) -> dict[str, Any] | None:
    town, draw = client.town, client.draw
    count = draw.choice(_BASKETS)
    skus = draw.sample(sorted(town.prices), min(count, len(town.prices)))
    wanted = {sku: draw.choice((1, 1, 1, 2)) for sku in skus}
    lines = [{"sku": sku, "quantity": quantity} for sku, quantity in wanted.items()]
    amount = sum(town.prices[sku] * quantity for sku, quantity in wanted.items())
    if draw.random() < 0.02:
        amount += 1
    body: dict[str, Any] = {"items": lines, "amount": amount}
    # A refusal is not stored: the same key may be retried.
    key = (b"idempotency-key", f"key-{client.name}".encode())
    path = f"/v1/sales/{town.sale_id}/reservations"
    if draw.random() < 0.1:
        # A double click.
        both = [client.call("POST", path, body, key) for _ in range(2)]
        await asyncio.gather(*both)
    for _ in range(draw.choice((1, 1, 2))):
        answer = await client.call_until_sure("POST", path, body, key)
        if answer.status == 201:
            town.orders.append(answer.body)
            return answer.body if answer.body.get("payment") else None
        await client.pause(20.0)
    return None


async def _pay(client: Client, order: dict[str, Any], **more: Any) -> str | None:
    """Through the PG's page; the payment's key."""
    wish = {"orderId": order["orderId"], "amount": order["amount"], **more}
    answer = await client.call_until_sure("POST", "/_payments", wish, to=PG)
    return answer.body.get("paymentKey")


def _success(order: dict[str, Any], payment_key: str, **changes: str) -> str:
    query = {
        "paymentType": "NORMAL",
        "orderId": order["orderId"],
        "paymentKey": payment_key,
        "amount": str(order["amount"]),
    }
    return _with(order["payment"]["successUrl"], query | changes)


def _with(url: str, query: dict[str, str]) -> str:
    parts = urlsplit(url)
    return parts._replace(query=urlencode([*parse_qsl(parts.query), *query.items()])).geturl()


async def _open_success_url(client: Client, url: str) -> Answer:
    """Load the success page until it has an outcome, as buyers do."""
    answer = await client.call("GET", url)
    for _ in range(client.draw.choice((0, 2, 5))):
        if not answer.unsure and answer.status != 202:
            return answer
        await client.pause(5.0)
        answer = await client.call("GET", url)
    return answer


async def _pays(client: Client, order: dict[str, Any]) -> None:
    payment_key = await _pay(client, order)
    if payment_key:
        await _open_success_url(client, _success(order, payment_key))


async def _reloads(client: Client, order: dict[str, Any]) -> None:
    payment_key = await _pay(client, order)
    if payment_key:
        url = _success(order, payment_key)
        await asyncio.gather(
            *(_open_success_url(client, url) for _ in range(client.draw.randint(2, 4)))
        )
        await _open_success_url(client, url)


async def _pays_twice(client: Client, order: dict[str, Any]) -> None:
    keys = [await _pay(client, order), await _pay(client, order)]
    urls = [_success(order, key) for key in keys if key]
    await asyncio.gather(*(_open_success_url(client, url) for url in urls))


async def _leaves(client: Client, order: dict[str, Any]) -> None:
    del client, order


async def _releases(client: Client, order: dict[str, Any]) -> None:
    path = f"/v1/reservations/{order['orderId']}/release"
    token = (b"x-reservation-token", order["token"].encode())
    await client.call_until_sure("POST", path, None, token)
    if client.draw.random() < 0.3:
        # Changed its mind: another basket, by paying for this one after all.
        await _pays(client, order)


async def _fails(client: Client, order: dict[str, Any]) -> None:
    query = {"code": "PAY_PROCESS_CANCELED", "message": "no", "orderId": order["orderId"]}
    await client.call_until_sure("GET", _with(order["payment"]["failUrl"], query))


async def _is_declined(client: Client, order: dict[str, Any]) -> None:
    payment_key = await _pay(client, order, decline=client.draw.choice(_DECLINES))
    if payment_key:
        await _open_success_url(client, _success(order, payment_key))
    if client.draw.random() < 0.5:
        await _pays(client, order)


async def _late(client: Client, order: dict[str, Any]) -> None:
    payment_key = await _pay(client, order)
    await client.pause(_LATE_SECONDS)
    if payment_key:
        await _open_success_url(client, _success(order, payment_key))


async def _tampers(client: Client, order: dict[str, Any]) -> None:
    payment_key = await _pay(client, order)
    if payment_key is None:
        return
    await client.call("GET", _success(order, payment_key, amount="1"))
    strangers = [other for other in client.town.orders if other["orderId"] != order["orderId"]]
    if strangers:
        other = client.draw.choice(strangers)
        await client.call("GET", _success(order, payment_key, orderId=other["orderId"]))
        await client.call("POST", f"/v1/reservations/{other['orderId']}/release")
    await _open_success_url(client, _success(order, payment_key))


async def _makes_up(client: Client, order: dict[str, Any]) -> None:
    await _open_success_url(client, _success(order, f"madeup{client.draw.randrange(10**12)}"))
    if client.draw.random() < 0.5:
        await _pays(client, order)


async def _transfers(client: Client, order: dict[str, Any]) -> None:
    """A virtual account: taken or not, by the sale; the deposit comes sooner or later."""
    payment_key = await _pay(client, order, method="virtual_account")
    if payment_key is None:
        return
    await _open_success_url(client, _success(order, payment_key))
    # Sooner or later; where this one is refused, because there is no account yet, the operator
    # makes it in the end.
    client.town.accounts.append(payment_key)
    await client.pause(60.0)
    await client.call_until_sure("POST", "/_deposits", {"paymentKey": payment_key}, to=PG)


async def _releases_while_paying(client: Client, order: dict[str, Any]) -> None:
    payment_key = await _pay(client, order)
    if payment_key is None:
        return

    async def release() -> None:
        await client.pause(0.3)
        await client.call("POST", f"/v1/reservations/{order['orderId']}/release")

    await asyncio.gather(_open_success_url(client, _success(order, payment_key)), release())


_ACTS: dict[str, Callable[[Client, dict[str, Any]], Awaitable[None]]] = {
    "pays": _pays,
    "pays and reloads": _reloads,
    "pays twice at once": _pays_twice,
    "leaves": _leaves,
    "releases": _releases,
    "fails": _fails,
    "is declined": _is_declined,
    "comes back late": _late,
    "tampers": _tampers,
    "makes up a key": _makes_up,
    "transfers": _transfers,
    "releases while paying": _releases_while_paying,
}
