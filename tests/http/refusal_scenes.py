"""Refusal scenes: for each error code a request that a healthy service refuses with it."""

import secrets
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx

from reservation.domain.tokens import TOKEN_LIFE_MS, Claims, Purpose
from tests.support.service import Served, eventually, item, sale_document


def in_an_hour() -> str:
    return (datetime.now(UTC) + timedelta(hours=1)).isoformat()


def posted(served: Served, path: str, body: object, **headers: str) -> httpx.Response:
    return served.http.post(path, json=body, headers={**served.admin, **headers})


def switch(served: Served, sale_id: str, action: str) -> None:
    posted(served, f"/v1/admin/sales/{sale_id}/{action}", {"reason": "x"}).raise_for_status()


def ghost(served: Served, sale_id: str) -> dict[str, Any]:
    """A buyer's hold whose order was lost in a failure of the store."""
    order = served.hold(sale_id, served.buyer())
    now_ms = int(datetime.now(UTC).timestamp() * 1000)
    order_id = f"{sale_id}-{'g' * 24}"
    tokens = {
        purpose: served.signer.sign(
            Claims(purpose.value, sale_id, order_id, "c" * 32, 1000, now_ms + TOKEN_LIFE_MS, "e", 1)
        )
        for purpose in Purpose
    }
    success = f"{served.url}/v1/payments/toss/success?token={tokens[Purpose.RETURN]}"
    return {
        **order,
        "orderId": order_id,
        "token": tokens[Purpose.RESERVATION],
        "payment": {**order["payment"], "successUrl": success},
    }


def malformed_request(served: Served) -> httpx.Response:
    return served.prepare(served.sale(), served.buyer(), items=[("a", 0)])


def invalid_sale(served: Served) -> httpx.Response:
    document = sale_document(items=[])
    path = f"/v1/admin/sales/e-{secrets.token_hex(4)}"
    return served.http.put(path, json=document, headers=served.admin)


def unauthenticated(served: Served) -> httpx.Response:
    return served.prepare(served.sale(), {})


def payment_declined(served: Served) -> httpx.Response:
    order = served.hold(served.sale(), served.buyer())
    return served.open_success_url(order, served.pay(order, decline="EXCEED_MAX_AMOUNT"))


def forbidden(served: Served) -> httpx.Response:
    return served.http.get("/v1/admin/orders", headers=served.buyer())


def invalid_token(served: Served) -> httpx.Response:
    return served.http.get("/v1/payments/toss/success?token=x")


def invalid_admission(served: Served) -> httpx.Response:
    return served.prepare(served.sale(requireAdmission=True), served.buyer())


def sale_not_open(served: Served) -> httpx.Response:
    return served.prepare(served.sale(opensAt=in_an_hour()), served.buyer())


def sale_not_found(served: Served) -> httpx.Response:
    return served.prepare("nothing", served.buyer())


def sku_not_found(served: Served) -> httpx.Response:
    return served.prepare(served.sale(), served.buyer(), items=[("z", 1)])


def reservation_not_found(served: Served) -> httpx.Response:
    return served.http.get(f"/v1/reservations/x-{'a' * 24}", headers=served.buyer())


def sold_out(served: Served) -> httpx.Response:
    return served.prepare(served.sale(items=[item("a", total=0)]), served.buyer())


def buyer_limit_exceeded(served: Served) -> httpx.Response:
    sale_id = served.sale(items=[item("a", limitPerBuyer=1)])
    return served.prepare(sale_id, served.buyer(), items=[("a", 2)], amount=2000)


def amount_mismatch(served: Served) -> httpx.Response:
    return served.prepare(served.sale(), served.buyer(), amount=1)


def reservation_expired(served: Served) -> httpx.Response:
    sale_id = served.sale()
    order = served.hold(sale_id, served.buyer())
    payment_key = served.pay(order)
    served.release(order)
    switch(served, sale_id, "close")
    return served.open_success_url(order, payment_key)


def hold_lost(served: Served) -> httpx.Response:
    return served.open_success_url(ghost(served, served.sale()), "some-key")


def payment_in_progress(served: Served) -> httpx.Response:
    order = served.hold(served.sale(virtualAccounts=True), served.buyer())
    served.open_success_url(order, served.pay(order, method="virtual_account"))
    # A beacon cancels no account.
    path = f"/v1/reservations/{order['orderId']}/release"
    return served.http.post(path, content=order["token"], headers={"Content-Type": "text/plain"})


def already_confirmed(served: Served) -> httpx.Response:
    order = served.hold(served.sale(), served.buyer())
    served.open_success_url(order, served.pay(order))
    return served.release(order)


def total_too_low(served: Served) -> httpx.Response:
    sale_id = served.sale()
    served.hold(sale_id, served.buyer())
    return served.http.put(
        f"/v1/admin/sales/{sale_id}",
        json={**served.document(sale_id), "items": [item("a", total=0)]},
        headers={**served.admin, "If-Match": served.etag(sale_id)},
    )


def insufficient_available(served: Served) -> httpx.Response:
    body = {"sku": "a", "delta": -101, "reason": "x"}
    path = f"/v1/admin/sales/{served.sale()}/stock"
    return posted(served, path, body, **{"Idempotency-Key": "k"})


def not_refundable(served: Served) -> httpx.Response:
    order = served.hold(served.sale(), served.buyer())
    body = {"reason": "x", "restock": True}
    path = f"/v1/admin/orders/{order['orderId']}/refund"
    return posted(served, path, body, **{"Idempotency-Key": secrets.token_hex(8)})


def sale_closed(served: Served) -> httpx.Response:
    sale_id = served.sale()
    switch(served, sale_id, "close")
    return served.prepare(sale_id, served.buyer())


def precondition_failed(served: Served) -> httpx.Response:
    sale_id = served.sale()
    return served.http.put(
        f"/v1/admin/sales/{sale_id}",
        json=served.document(sale_id),
        headers={**served.admin, "If-Match": '"v9"'},
    )


def idempotency_key_reused(served: Served) -> httpx.Response:
    sale_id, buyer = served.sale(), served.buyer()
    served.hold(sale_id, buyer, key="k")
    return served.prepare(sale_id, buyer, key="k", items=[("a", 2)], amount=2000)


def refund_account_required(served: Served) -> httpx.Response:
    order = served.hold(served.sale(virtualAccounts=True), served.buyer())
    payment_key = served.pay(order, method="virtual_account")
    served.open_success_url(order, payment_key)
    served.sandbox(order, "/_deposits", {"paymentKey": payment_key})
    eventually(lambda: served.get_reservation(order)["status"], lambda seen: seen == "CONFIRMED")
    body = {"reason": "x", "restock": True}
    path = f"/v1/admin/orders/{order['orderId']}/refund"
    return posted(served, path, body, **{"Idempotency-Key": secrets.token_hex(8)})


def refund_pending(served: Served) -> httpx.Response:
    order = served.hold(served.sale(), served.buyer())
    served.open_success_url(order, served.pay(order))
    served.order_fault(order, "refuse", operations=["cancel", "look_up"], times=1000)
    path = f"/v1/admin/orders/{order['orderId']}/refund"
    try:
        for restock in (True, False):
            body = {"reason": "x", "restock": restock}
            key = {"Idempotency-Key": secrets.token_hex(8)}
            answer = posted(served, path, body, **key)
    finally:
        served.clear_faults(order)
    return answer


def precondition_required(served: Served) -> httpx.Response:
    sale_id = served.sale()
    document = {**served.document(sale_id), "name": "Other"}
    return served.http.put(f"/v1/admin/sales/{sale_id}", json=document, headers=served.admin)


def rate_limited(served: Served) -> httpx.Response:
    """More at once than the rate allows; on a slow machine it takes a few more."""
    sale_id, buyer = served.sale(), served.buyer()
    answer = served.prepare(sale_id, buyer, key="k")
    for _ in range(2_000):
        if answer.status_code == 429:
            break
        answer = served.prepare(sale_id, buyer, key="k")
    return answer


def too_many_orders(served: Served) -> httpx.Response:
    """A prepare / release loop: its orders are unpaid, and the next one is refused."""
    sale_id, buyer = served.sale(), served.buyer()
    for _ in range(20):
        order = served.hold(sale_id, buyer)
        path = f"/v1/reservations/{order['orderId']}/release"
        assert served.http.post(path, headers=buyer).status_code == 200
    # The burst may be used up as well, which a second cures and this does not.
    return eventually(
        lambda: served.prepare(sale_id, buyer),
        lambda answer: answer.json().get("code") != "rate_limited",
    )


def sale_paused(served: Served) -> httpx.Response:
    sale_id = served.sale()
    switch(served, sale_id, "pause")
    return served.prepare(sale_id, served.buyer())


def endpoint(served: Served, **members: Any) -> httpx.Response:
    body = {"url": "https://shop.example/", "events": ["*"], **members}
    return posted(served, "/v1/admin/webhook-endpoints", body)


def invalid_webhook_endpoint(served: Served) -> httpx.Response:
    return endpoint(served, url="https://127.0.0.1/")


def webhook_endpoint_not_found(served: Served) -> httpx.Response:
    return served.http.get("/v1/admin/webhook-endpoints/we_none", headers=served.admin)


def webhook_endpoint_disabled(served: Served) -> httpx.Response:
    made = endpoint(served, enabled=False).raise_for_status().json()
    return posted(served, f"/v1/admin/webhook-endpoints/{made['id']}/test", None)


def webhook_delivery_not_found(served: Served) -> httpx.Response:
    return posted(served, "/v1/admin/webhook-endpoints/deliveries/999999/resend", None)


def sale_not_settled(served: Served) -> httpx.Response:
    return posted(served, f"/v1/admin/sales/{served.sale()}/archive", {"reason": "x"})


def key_not_found(served: Served) -> httpx.Response:
    return served.http.delete("/v1/admin/keys/k-none", headers=served.admin)


#: A request for each code that a healthy service refuses with; the others need a failure.
SCENES: dict[str, Callable[[Served], httpx.Response]] = {
    scene.__name__: scene
    for scene in (
        malformed_request,
        invalid_sale,
        unauthenticated,
        payment_declined,
        forbidden,
        invalid_token,
        invalid_admission,
        sale_not_open,
        sale_not_found,
        sku_not_found,
        reservation_not_found,
        sold_out,
        buyer_limit_exceeded,
        amount_mismatch,
        reservation_expired,
        hold_lost,
        payment_in_progress,
        already_confirmed,
        total_too_low,
        sale_not_settled,
        invalid_webhook_endpoint,
        webhook_endpoint_not_found,
        webhook_endpoint_disabled,
        webhook_delivery_not_found,
        key_not_found,
        insufficient_available,
        not_refundable,
        sale_closed,
        precondition_failed,
        idempotency_key_reused,
        refund_account_required,
        refund_pending,
        precondition_required,
        rate_limited,
        too_many_orders,
        sale_paused,
    )
}


#: `upgrade_in_progress` needs an installation below its highest level, `too_many_keys` one with
#: five hundred keys.
FAILURES = {
    "sale_recovering",
    "unavailable",
    "outcome_unknown",
    "upgrade_in_progress",
    "too_many_keys",
}
