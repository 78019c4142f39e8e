"""Python client against the service: its retries, and its shapes."""

import importlib
from typing import Any

import httpx
import msgspec
import pytest

from reservation.client import AsyncClient, Client, NoAnswer, Refused, Retries, SoldOut
from reservation.client import models as answers
from tests.support.service import Served, item

pytestmark = pytest.mark.e2e

AT_ONCE = Retries(first_seconds=0.0)
#: The OpenAPI schema behind each response model.
SCHEMAS = {
    answers.Guest: "GuestAnswer",
    answers.Item: "ItemAnswer",
    answers.Line: "LineAnswer",
    answers.Payment: "PaymentAnswer",
    answers.VirtualAccount: "VirtualAccountAnswer",
    answers.Reservation: "ReservationAnswer",
    answers.Reservations: "ReservationsAnswer",
    answers.Sale: "SaleAnswer",
    answers.Sales: "SalesAnswer",
}


class Losing(httpx.BaseTransport):
    """A network that loses calls on the way out or on the way back."""

    def __init__(self, *, requests: int = 0, replies: int = 0) -> None:
        self.requests, self.replies, self.sent = requests, replies, 0
        self._network = httpx.HTTPTransport()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        if self.requests:
            self.requests -= 1
            raise httpx.ConnectError("lost on the way out")
        response = self._network.handle_request(request)
        self.sent += 1
        if self.replies:
            self.replies -= 1
            response.close()
            raise httpx.ReadError("lost on the way back")
        return response

    def close(self) -> None:
        self._network.close()


def answering(*replies: httpx.Response) -> httpx.MockTransport:
    """A service that gives these answers in turn."""
    left = list(replies)
    return httpx.MockTransport(lambda _: left.pop(0))


def problem(status: int, code: str, **facts: Any) -> httpx.Response:
    return httpx.Response(status, json={"code": code, "detail": "No.", "instance": "r1", **facts})


def test_a_guest_can_hold_read_and_release(served: Served) -> None:
    sale_id = served.sale(items=[item("a"), item("b", price=700)])
    with Client(served.url) as stock:
        stock.become_guest()
        sale = stock.sale(sale_id)
        basket = {"a": 1, "b": 2}
        held = stock.prepare(sale_id, basket, amount=sale.price_of(basket), order_name="Two things")
        assert (held.status, held.amount, held.order_name) == ("HELD", 2400, "Two things")
        assert held.payment
        assert held.payment.success_url.startswith(served.url)
        assert [line.sku for line in held.items] == ["a", "b"]
        assert stock.reservations(sale_id)[0].order_id == held.order_id
        assert stock.reservation(held.order_id, wait=1).status == "HELD"
        assert stock.release(held.order_id).status == "RELEASED"
        assert sale_id in [sale.sale_id for sale in stock.sales()]
    with Client(served.url) as anybody:
        assert anybody.reservation(held.order_id, token=held.token).status == "RELEASED"


async def test_a_guest_can_hold_read_and_release_with_asyncio(served: Served) -> None:
    sale_id = served.sale()
    async with AsyncClient(served.url) as stock:
        await stock.become_guest()
        held = await stock.prepare(sale_id, {"a": 1}, amount=1000)
        assert (await stock.reservation(held.order_id)).status == "HELD"
        assert (await stock.release(held.order_id, token=held.token)).status == "RELEASED"
        assert (await stock.reservations(sale_id))[0].order_id == held.order_id
        with pytest.raises(Refused, match="sale_not_found"):
            await stock.sale("nowhere")


@pytest.mark.parametrize("lost", [{"requests": 3}, {"replies": 3}])
def test_a_prepare_with_a_lost_response_is_held_once(served: Served, lost: dict[str, int]) -> None:
    sale_id = served.sale()
    with Client(served.url) as guest:
        token = guest.become_guest().token
    network = Losing(**lost)
    with Client(served.url, token=token, retries=AT_ONCE, transport=network) as stock:
        held = stock.prepare(sale_id, {"a": 1}, amount=1000)
    assert held.status == "HELD"
    assert network.sent == 1 + lost.get("replies", 0)
    assert served.stock(sale_id) == (99, 1, 0)


def test_a_lasting_network_failure_raises_no_answer(served: Served) -> None:
    network = Losing(replies=99)
    with (
        Client(served.url, retries=AT_ONCE, transport=network) as stock,
        pytest.raises(NoAnswer, match="GET /v1/sales"),
    ):
        stock.sales()
    assert network.sent == AT_ONCE.attempts


def test_a_refusal_has_its_facts_and_is_not_retried(served: Served) -> None:
    sale_id = served.sale(items=[item("a", total=1, limitPerBuyer=5)])
    network = Losing()
    with Client(served.url, transport=network) as stock:
        stock.become_guest()
        with pytest.raises(SoldOut) as refused:
            stock.prepare(sale_id, {"a": 2}, amount=2000)
    assert refused.value.facts["available"] == {"a": 1}
    assert (refused.value.status, refused.value.code) == (409, "sold_out")
    assert refused.value.request_id
    assert network.sent == 2


@pytest.mark.parametrize("code", ["unavailable", "outcome_unknown", "rate_limited"])
def test_transient_errors_are_retried(code: str) -> None:
    service = answering(problem(503, code), httpx.Response(200, json={"sales": []}))
    with Client("http://stock", retries=AT_ONCE, transport=service) as stock:
        assert stock.sales() == ()


@pytest.mark.parametrize("code", ["sale_paused", "sale_closed", "unauthenticated"])
def test_permanent_errors_are_raised_without_a_retry(code: str) -> None:
    with (
        Client("http://stock", retries=AT_ONCE, transport=answering(problem(503, code))) as stock,
        pytest.raises(Refused, match=code),
    ):
        stock.sales()


def prepare_met_by(*replies: httpx.Response | httpx.TransportError) -> Exception:
    """The error of a prepare that meets these in turn."""
    left = list(replies)

    def reply(_: httpx.Request) -> httpx.Response:
        first = left.pop(0)
        if isinstance(first, httpx.TransportError):
            raise first
        return first

    retries = Retries(first_seconds=0.0, attempts=len(replies))
    with (
        Client("http://stock", retries=retries, transport=httpx.MockTransport(reply)) as stock,
        pytest.raises((NoAnswer, Refused)) as raised,
    ):
        stock.prepare("winter", {"a": 1}, amount=1000)
    assert not left
    return raised.value


@pytest.mark.parametrize(
    ("status", "code"),
    [(503, "unavailable"), (429, "rate_limited"), (503, "sale_recovering"), (503, "sale_paused")],
)
def test_a_lost_prepare_is_not_reported_as_a_temporary_refusal(status: int, code: str) -> None:
    refused = problem(status, code)
    assert isinstance(prepare_met_by(httpx.ReadError("lost"), refused), NoAnswer)
    error = prepare_met_by(problem(503, "outcome_unknown"), refused)
    assert isinstance(error, Refused)
    assert error.code == "outcome_unknown"


def test_a_final_refusal_is_raised_after_a_lost_response() -> None:
    error = prepare_met_by(httpx.ReadError("lost"), problem(409, "sold_out"))
    assert isinstance(error, SoldOut)


def test_a_long_retry_after_is_left_to_the_caller() -> None:
    service = answering(problem(429, "rate_limited", retryAfter=60))
    with (
        Client("http://stock", retries=AT_ONCE, transport=service) as stock,
        pytest.raises(Refused, match="rate_limited"),
    ):
        stock.sales()


def test_pauses_grow_up_to_a_bound_and_respect_retry_after() -> None:
    retries = Retries(first_seconds=1, longest_seconds=4)
    lost = NoAnswer("lost")
    for made, bound in ((1, 1), (2, 2), (3, 4), (4, 4)):
        pause = retries.pause(lost, made)
        assert pause is not None
        assert 0 <= pause <= bound
    assert retries.pause(lost, 5) is None
    asked = retries.pause(Refused("unavailable", 503, "", {"retryAfter": 3}), 1)
    assert asked is not None
    assert 3 <= asked <= 4


async def test_sales_of_all_pages_are_returned_together(served: Served) -> None:
    body = served.http.get("/v1/sales").json()["sales"][:1] or [
        served.http.get(f"/v1/sales/{served.sale()}").json()
    ]
    pages = {
        "": {"sales": body, "nextCursor": "a/b"},
        "a/b": {"sales": body, "nextCursor": None},
    }

    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json=pages[request.url.params.get("cursor", "")])

    transport = httpx.MockTransport(answer)
    with Client("http://shop", transport=transport) as stock:
        assert len(stock.sales()) == 2
    async with AsyncClient("http://shop", transport=transport) as stock:
        assert len(await stock.sales()) == 2


@pytest.mark.parametrize("page", ["<html>a proxy</html>", '{"sales": 7}', "[]"])
def test_a_response_of_another_server_raises_no_answer(page: str) -> None:
    once = Retries(attempts=1)
    with (
        Client(
            "http://stock", retries=once, transport=answering(httpx.Response(200, text=page))
        ) as stock,
        pytest.raises(NoAnswer, match="not a response of this service"),
    ):
        stock.sales()


@pytest.mark.parametrize("shape", SCHEMAS, ids=lambda shape: shape.__name__)
def test_the_client_models_match_the_openapi_document(served: Served, shape: type[Any]) -> None:
    document = served.http.get("/schema/openapi.json").json()["components"]["schemas"]
    schema = document[SCHEMAS[shape]]
    fields = {field.encode_name: field for field in msgspec.structs.fields(shape)}
    assert set(fields) == set(schema["properties"])
    required = {name for name, field in fields.items() if field.default is msgspec.NODEFAULT}
    # The members that the client requires are those that the service always sends.
    assert required <= set(schema["required"])


@pytest.mark.parametrize("former", ["answers", "asynchronous", "synchronous"])
def test_the_former_client_module_imports_with_a_warning(former: str) -> None:
    with pytest.warns(DeprecationWarning, match=f"reservation.client.{former} is now"):
        module = importlib.import_module(f"reservation.client.{former}")
    public = [getattr(module, name) for name in module.__all__]
    assert all(one.__module__.startswith("reservation.client.") for one in public)
