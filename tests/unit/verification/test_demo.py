"""The demo's verdict on the outcome of a buyer."""

from collections.abc import Callable

import httpx
import pytest

from reservation.verification import demo as demo_module
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


async def buyer(
    story: str, end: Callable[[], httpx.Response], number: int = 0
) -> tuple[str, list[str]]:
    """The demo's record for a buyer whose return or release answers this; its accusations."""

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/_payments":
            return httpx.Response(200, json={"paymentKey": "key"})
        if request.url.path == "/payments/success" or request.url.path.endswith("/release"):
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
        return await demo._buy(number, story), demo._accused


async def declined_buyer(end: Callable[[], httpx.Response]) -> str:
    """The same for a buyer with a declined card."""
    return (await buyer("decline", end))[0]


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


async def test_a_service_that_goes_silent_ends_the_demo_with_a_time_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The command reports it; an exception group would reach the terminal as a traceback."""

    def answer(request: httpx.Request) -> httpx.Response:
        if request.method == "PUT":
            return httpx.Response(201, json={})
        raise httpx.ConnectError("refused")

    client = httpx.AsyncClient
    monkeypatch.setattr(demo_module, "TRY_SECONDS", 0)
    monkeypatch.setattr(
        httpx, "AsyncClient", lambda **_: client(transport=httpx.MockTransport(answer))
    )
    demo = Demo(
        DemoPlan(buyers=3),
        service_url="http://shop.test",
        admin_key="operator",
        new_token=lambda: "buyer",
        progress=lambda _text, _count: None,
    )
    with pytest.raises(TimeoutError, match="does not answer"):
        await demo.run()


async def test_an_internal_error_is_a_fault_whatever_the_outcome() -> None:
    """The verdict reports it, even if a second load of the page ends well."""
    ends = iter([httpx.Response(500, json={"code": "internal_error"})])
    confirmed = httpx.Response(200, json={"status": "CONFIRMED"})
    outcome, accused = await buyer("refresh", lambda: next(ends, confirmed))
    assert outcome == "confirmed"
    (accusation,) = accused
    assert accusation.startswith("GET http://shop.test/payments/success?")
    assert accusation.endswith(" was answered 500")


@pytest.mark.parametrize(
    ("end", "outcomes"),
    [
        (httpx.Response(200, json={"status": "RELEASED"}), {"left", "left without a word"}),
        (
            httpx.Response(404, json={"code": "reservation_not_found"}),
            {"leaving answered reservation_not_found", "left without a word"},
        ),
    ],
)
async def test_a_leaving_buyer_gives_the_hold_back_or_not(
    end: httpx.Response, outcomes: set[str]
) -> None:
    found = {(await buyer("leave", lambda: end, number))[0] for number in range(10)}
    assert found == outcomes
