"""The demo's verdict on the outcome of a buyer."""

from collections.abc import Callable

import httpx
import pytest

from reservation.verification.demo import Demo, DemoPlan

ORDER = {
    "orderId": "R0000000000000000000000000",
    "amount": 19_000,
    "token": "token",
    "payment": {
        "checkoutUrl": "http://pg.test/checkout",
        "successUrl": "http://shop.test/payments/success",
    },
}


async def declined_buyer(end: Callable[[], httpx.Response]) -> str:
    """The demo's record for a buyer with a declined card whose return answers this."""

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/_payments":
            return httpx.Response(200, json={"paymentKey": "key"})
        if request.url.path == "/payments/success":
            return end()
        return httpx.Response(201, json=ORDER)

    demo = Demo(
        DemoPlan(),
        service_url="http://shop.test",
        admin_key="operator",
        new_token=lambda: "buyer",
        progress=lambda _text, _count: None,
    )
    async with httpx.AsyncClient(transport=httpx.MockTransport(answer)) as demo._client:
        return await demo._buy(0, "decline")


async def test_a_declined_card_after_an_expired_hold_is_accepted() -> None:
    """A part of the service may be down for longer than the hold; nothing was charged."""
    end = lambda: httpx.Response(409, json={"code": "reservation_expired"})  # noqa: E731
    assert await declined_buyer(end) == "reservation_expired"


@pytest.mark.parametrize("status", ["CONFIRMED", "AWAITING_DEPOSIT"])
async def test_a_declined_card_ending_as_paid_is_reported(status: str) -> None:
    """The verdict reports it."""
    outcome = await declined_buyer(lambda: httpx.Response(200, json={"status": status}))
    assert outcome == f"a declined card ended as {status.lower()}"


async def test_a_declined_buyer_pays_with_another_card() -> None:
    """The first return is declined, the second is paid."""
    ends = iter(
        [
            httpx.Response(402, json={"code": "payment_declined"}),
            httpx.Response(200, json={"status": "CONFIRMED"}),
        ]
    )
    assert await declined_buyer(lambda: next(ends)) == "confirmed"
