"""Prepare over HTTP: the shape of a hold, and that the same key is the same reservation."""

import re
from datetime import UTC, datetime, timedelta

import pytest

from tests.support.service import Served, eventually, item, refused

#: An order id that the PG accepts.
PG_ORDER_ID = re.compile(r"[A-Za-z0-9_-]{6,64}")


def at(text: str) -> datetime:
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", text), text
    return datetime.fromisoformat(text)


def test_a_hold_contains_the_data_for_its_payment(served: Served) -> None:
    sale_id = served.sale()
    answer = served.prepare(sale_id, served.buyer(), items=[("a", 2)], amount=2000)
    assert answer.status_code == 201, answer.text
    assert "idempotent-replayed" not in answer.headers
    assert answer.headers["cache-control"] == "no-store"
    order = answer.json()
    assert order["saleId"] == sale_id
    assert order["status"] == "HELD"
    assert order["items"] == [{"sku": "a", "quantity": 2, "price": 1000}]
    assert (order["amount"], order["currency"]) == (2000, "KRW")
    payment = order["payment"]
    assert payment["provider"] == "toss"
    assert payment["clientKey"] == served.settings.toss_client_key
    assert re.fullmatch(r"[A-Za-z0-9_-]{32}", payment["customerKey"])
    base = f"{served.url}/v1/payments/toss"
    assert payment["successUrl"].startswith(f"{base}/success?token=")
    assert payment["failUrl"].startswith(f"{base}/fail?token=")
    assert payment["checkoutUrl"].startswith("http://")
    assert order["token"] not in payment["successUrl"]


def test_a_hold_lasts_for_the_sales_hold_seconds(served: Served) -> None:
    order = served.hold(served.sale(holdSeconds=90), served.buyer())
    lasts = at(order["expiresAt"]) - at(order["createdAt"])
    assert lasts.total_seconds() == 90


def test_held_units_are_no_longer_available(served: Served) -> None:
    sale_id = served.sale()
    served.hold(sale_id, served.buyer(), items=[("a", 3)], amount=3000)
    assert served.stock(sale_id) == (97, 3, 0)


def test_an_order_id_fits_the_pg_and_names_its_sale(served: Served) -> None:
    sale_id = served.sale()
    order_id = served.hold(sale_id, served.buyer())["orderId"]
    assert PG_ORDER_ID.fullmatch(order_id)
    assert order_id.startswith(f"{sale_id}-")
    # 24 characters of base64url are 144 bits.
    assert len(order_id.removeprefix(f"{sale_id}-")) >= 22


def test_a_customer_key_is_stable_and_unique_per_buyer(served: Served) -> None:
    sale_id, other_sale = served.sale(), served.sale()
    buyer_id, buyer = served.named_buyer()
    first = served.hold(sale_id, buyer)["payment"]["customerKey"]
    assert served.hold(other_sale, buyer)["payment"]["customerKey"] == first
    assert served.hold(sale_id, served.buyer())["payment"]["customerKey"] != first
    assert buyer_id not in first


def test_a_repeated_key_and_body_return_the_same_reservation(served: Served) -> None:
    sale_id, buyer = served.sale(), served.buyer()
    first = served.prepare(sale_id, buyer, key="k")
    again = served.prepare(sale_id, buyer, key="k")
    assert (first.status_code, again.status_code) == (201, 201)
    assert "idempotent-replayed" not in first.headers
    assert again.headers["idempotent-replayed"] == "true"
    assert again.json() == first.json()
    assert served.stock(sale_id) == (99, 1, 0)


def test_a_replay_shows_the_current_state_without_payment_data(served: Served) -> None:
    sale_id, buyer = served.sale(), served.buyer()
    order = served.hold(sale_id, buyer, key="k")
    assert served.release(order).status_code == 200
    again = served.prepare(sale_id, buyer, key="k")
    assert again.status_code == 201
    assert again.headers["idempotent-replayed"] == "true"
    assert again.json()["orderId"] == order["orderId"]
    assert again.json()["status"] == "RELEASED"
    assert "payment" not in again.json()
    assert "token" not in again.json()
    assert served.stock(sale_id) == (100, 0, 0)


def test_a_replay_of_a_paid_order_shows_it_as_paid(served: Served) -> None:
    sale_id, buyer = served.sale(), served.buyer()
    order = served.hold(sale_id, buyer, key="k")
    assert served.open_success_url(order, served.pay(order)).status_code == 200
    again = served.prepare(sale_id, buyer, key="k").json()
    assert (again["orderId"], again["status"]) == (order["orderId"], "CONFIRMED")
    assert "payment" not in again


@pytest.mark.parametrize(
    "other",
    [
        {"items": [("a", 2)], "amount": 2000},
        {"items": [("b", 1)]},
        {"amount": 1001},
        {"orderName": "Something else"},
    ],
    ids=["quantity", "item", "amount", "name"],
)
def test_a_key_reused_with_another_body_is_refused(served: Served, other: dict) -> None:
    sale_id, buyer = served.sale(items=[item("a"), item("b")]), served.buyer()
    served.hold(sale_id, buyer, key="k")
    refused(served.prepare(sale_id, buyer, key="k", **other), 422, "idempotency_key_reused")
    assert served.stock(sale_id) == (99, 1, 0)


def test_a_key_is_scoped_to_its_buyer_and_sale(served: Served) -> None:
    sale_id, other_sale, buyer = served.sale(), served.sale(), served.buyer()
    orders = [
        served.hold(sale_id, buyer, key="k"),
        served.hold(sale_id, served.buyer(), key="k"),
        served.hold(other_sale, buyer, key="k"),
    ]
    assert len({order["orderId"] for order in orders}) == 3


def test_a_refused_key_can_be_used_again(served: Served) -> None:
    sale_id = served.sale(items=[item("a", total=1)])
    buyer = served.buyer()
    order = served.hold(sale_id, served.buyer())
    refused(served.prepare(sale_id, buyer, key="k"), 409, "sold_out")
    served.release(order)
    assert served.prepare(sale_id, buyer, key="k").status_code == 201


def test_keys_of_any_printable_characters_are_accepted(served: Served) -> None:
    sale_id, buyer = served.sale(), served.buyer()
    for key in ("x" * 255, "k", 'a {"b"} ~!', "0"):
        order = served.hold(sale_id, buyer, key=key)
        assert served.hold(sale_id, buyer, key=key)["orderId"] == order["orderId"]


def test_two_lines_of_one_item_are_merged(served: Served) -> None:
    sale_id = served.sale()
    order = served.hold(sale_id, served.buyer(), items=[("a", 1), ("a", 2)], amount=3000)
    assert order["items"] == [{"sku": "a", "quantity": 3, "price": 1000}]
    assert served.stock(sale_id) == (97, 3, 0)


def test_a_basket_is_held_completely_or_not_at_all(served: Served) -> None:
    sale_id = served.sale(items=[item("a"), item("b", total=1)])
    answer = served.prepare(sale_id, served.buyer(), items=[("a", 1), ("b", 2)], amount=3000)
    problem = refused(answer, 409, "sold_out")
    assert problem["available"] == {"a": 100, "b": 1}
    assert served.stock(sale_id, "a") == (100, 0, 0)
    assert served.stock(sale_id, "b") == (1, 0, 0)


def test_a_basket_can_have_twenty_lines(served: Served) -> None:
    skus = [f"s{number}" for number in range(20)]
    sale_id = served.sale(items=[item(sku) for sku in skus])
    order = served.hold(sale_id, served.buyer(), items=[(sku, 1) for sku in skus], amount=20 * 1000)
    assert [line["sku"] for line in order["items"]] == skus


def test_an_unnamed_order_is_named_after_its_items(served: Served) -> None:
    sale_id = served.sale(items=[item("a", name="Blue mug"), item("b"), item("c")])
    buyer = served.buyer()
    assert served.hold(sale_id, buyer)["orderName"] == "Blue mug"
    three = [("a", 1), ("b", 1), ("c", 1)]
    assert served.hold(sale_id, buyer, items=three, amount=3000)["orderName"] == "Blue mug +2"


def test_a_default_order_name_is_truncated_to_the_pg_limit(served: Served) -> None:
    sale_id = served.sale(items=[item("a", name="m" * 200), item("b")])
    order = served.hold(sale_id, served.buyer(), items=[("a", 1), ("b", 1)], amount=2000)
    assert order["orderName"] == "m" * 97 + " +1"


def test_a_given_order_name_is_kept_unchanged(served: Served) -> None:
    name = '머그컵 "파랑" \\ {1} 외 1건'
    order = served.hold(served.sale(), served.buyer(), orderName=name)
    assert order["orderName"] == name
    assert served.get_reservation(order)["orderName"] == name


def test_a_buyers_limit_counts_held_units_and_frees_released_ones(served: Served) -> None:
    sale_id, buyer = served.sale(items=[item("a", limitPerBuyer=2)]), served.buyer()
    order = served.hold(sale_id, buyer, items=[("a", 2)], amount=2000)
    problem = refused(served.prepare(sale_id, buyer), 409, "buyer_limit_exceeded")
    assert problem["orderIds"] == [order["orderId"]]
    served.release(order)
    served.hold(sale_id, buyer, items=[("a", 2)], amount=2000)


def test_a_new_price_applies_to_new_prepares(served: Served) -> None:
    sale_id, buyer = served.sale(), served.buyer()
    order = served.hold(sale_id, buyer, key="k")
    shown = served.http.get(f"/v1/admin/sales/{sale_id}", headers=served.admin)
    changed = {**served.document(sale_id), "items": [item("a", price=1500)]}
    headers = {**served.admin, "If-Match": shown.headers["etag"]}
    answer = served.http.put(f"/v1/admin/sales/{sale_id}", json=changed, headers=headers)
    assert answer.status_code == 200, answer.text
    assert served.hold(sale_id, buyer, key="k")["amount"] == 1000
    problem = refused(served.prepare(sale_id, buyer), 409, "amount_mismatch")
    assert problem["expectedAmount"] == 1500
    assert served.open_success_url(order, served.pay(order)).json()["status"] == "CONFIRMED"
    assert served.ledger(order)["charged"] == 1000


def test_an_expired_hold_is_available_from_its_deadline(served: Served) -> None:
    sale_id = served.sale(holdSeconds=1, items=[item("a", total=1)])
    first = served.hold(sale_id, served.buyer())
    buyer = served.buyer()
    taken = eventually(
        lambda: served.prepare(sale_id, buyer, key="k"), lambda answer: answer.status_code == 201
    )
    late = at(taken.json()["createdAt"]) - at(first["expiresAt"])
    assert late.total_seconds() >= 0
    assert served.get_reservation(first)["status"] == "EXPIRED"
    assert served.audit(sale_id)["ok"]


def test_the_success_policy_prepares_without_a_hold(served: Served) -> None:
    sale_id = served.sale(holdPolicy="success")
    order = served.hold(sale_id, served.buyer())
    assert order["status"] == "PREPARED"
    assert order["payment"]
    assert order["token"]
    assert served.stock(sale_id) == (100, 0, 0)


def test_a_sale_with_admission_accepts_buyers_from_its_page(served: Served) -> None:
    sale_id, buyer = served.sale(requireAdmission=True), served.buyer()
    admission = served.http.get(f"/v1/sales/{sale_id}", headers=buyer).json()["admission"]
    served.hold(sale_id, {**buyer, "X-Sale-Admission": admission})


def test_anonymous_and_early_requests_get_no_admission(served: Served) -> None:
    """One anonymous read must not admit a crowd, nor be collected the day before."""
    sale_id, buyer = served.sale(requireAdmission=True), served.buyer()
    stale = {"Authorization": "Bearer not-a-token"}
    for headers in ({}, stale):
        answer = served.http.get(f"/v1/sales/{sale_id}", headers=headers)
        assert answer.status_code == 200
        assert "admission" not in answer.json()
    opens_at = datetime.now(UTC) + timedelta(hours=1)
    early = served.sale(requireAdmission=True, opensAt=opens_at.isoformat())
    assert "admission" not in served.http.get(f"/v1/sales/{early}", headers=buyer).json()


def test_an_admission_expires_when_the_opening_moves(served: Served) -> None:
    sale_id, buyer = served.sale(requireAdmission=True), served.buyer()
    path = f"/v1/sales/{sale_id}"
    admission = served.http.get(path, headers=buyer).json()["admission"]
    opens_at = datetime.now(UTC) - timedelta(seconds=1)
    changed = {**served.document(sale_id), "opensAt": opens_at.isoformat()}
    answer = served.http.put(
        f"/v1/admin/sales/{sale_id}",
        json=changed,
        headers={**served.admin, "If-Match": served.etag(sale_id)},
    )
    assert answer.status_code == 200, answer.text
    eventually(
        lambda: served.prepare(sale_id, {**buyer, "X-Sale-Admission": admission}),
        lambda found: found.status_code == 403,
    )
    admission = served.http.get(path, headers=buyer).json()["admission"]
    served.hold(sale_id, {**buyer, "X-Sale-Admission": admission})


def test_an_admission_of_another_buyer_or_sale_is_refused(served: Served) -> None:
    sale_id, other = served.sale(requireAdmission=True), served.sale(requireAdmission=True)
    theirs = served.http.get(f"/v1/sales/{sale_id}", headers=served.buyer()).json()["admission"]
    buyer = served.buyer()
    elsewhere = served.http.get(f"/v1/sales/{other}", headers=buyer).json()["admission"]
    for admission in (theirs, elsewhere, "made.up", ""):
        answer = served.prepare(sale_id, {**buyer, "X-Sale-Admission": admission})
        refused(answer, 403, "invalid_admission")
    assert served.stock(sale_id) == (100, 0, 0)


def test_a_guest_token_can_prepare(served: Served) -> None:
    answer = served.http.post("/v1/guests")
    assert answer.status_code == 201
    guest = answer.json()
    assert set(guest) == {"buyerId", "token"}
    sale_id = served.sale()
    buyer = {"Authorization": f"Bearer {guest['token']}"}
    order = served.hold(sale_id, buyer)
    assert (
        served.dump(sale_id)[f"rsv:{{{sale_id}}}:order:{order['orderId']}"]["buyer"]
        == (guest["buyerId"])
    )
