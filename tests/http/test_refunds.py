"""Refunds over HTTP: the pending ones, their causes, and the answers to a correction."""

import secrets
from typing import Any

import httpx
import pytest

from tests.support.service import Served, eventually, refused

ACCOUNT = {"bank": "우리은행", "accountNumber": "110123456789", "holderName": "김토스"}


def sold(served: Served, sale_id: str) -> dict[str, Any]:
    order = served.hold(sale_id, served.buyer())
    assert served.open_success_url(order, served.pay(order)).json()["status"] == "CONFIRMED"
    return order


def paid_by_account(served: Served) -> dict[str, Any]:
    order = served.hold(served.sale(virtualAccounts=True), served.buyer())
    payment_key = served.pay(order, method="virtual_account")
    served.open_success_url(order, payment_key)
    served.sandbox(order, "/_deposits", {"paymentKey": payment_key})
    eventually(lambda: served.get_reservation(order)["status"], lambda seen: seen == "CONFIRMED")
    return order


def refund(served: Served, order: dict[str, Any], **wish: Any) -> httpx.Response:
    return served.http.post(
        f"/v1/admin/orders/{order['orderId']}/refund",
        json={"reason": "a test", "restock": True, **wish},
        headers={
            **served.admin,
            "X-Operator": "kim",
            "Idempotency-Key": secrets.token_hex(8),
        },
    )


def listed(served: Served, **query: Any) -> list[dict[str, Any]]:
    """All pages of the list."""
    found: list[dict[str, Any]] = []
    while True:
        answer = served.http.get("/v1/admin/refunds", params=query, headers=served.admin)
        page = answer.raise_for_status().json()
        found += page["refunds"]
        if page["nextCursor"] is None:
            return found
        query["cursor"] = page["nextCursor"]


def of(order: dict[str, Any], refunds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [one for one in refunds if one["orderId"] == order["orderId"]]


def story(served: Served, order: dict[str, Any]) -> dict[str, Any]:
    path = f"/v1/admin/orders/{order['orderId']}"
    answer = eventually(
        lambda: served.http.get(path, headers=served.admin), lambda found: found.is_success
    )
    return answer.json()


def test_a_pending_refund_is_listed_until_it_is_completed(served: Served) -> None:
    order = sold(served, served.sale())
    served.order_fault(order, "error_before_commit", operations=["cancel"], times=1000)
    answer = refund(served, order)
    assert (answer.status_code, answer.json()["code"]) == (202, "refund_pending")
    assert "INTERNAL" in answer.json()["providerCode"]
    (pending,) = of(order, listed(served, status="pending", limit=1))
    assert (pending["status"], pending["operator"], pending["reason"]) == (
        "pending",
        "kim",
        "a test",
    )
    assert pending["refundReceiveAccount"] is None
    detail = story(served, order)
    assert detail["refund"] | {"updatedAt": ""} == pending | {"updatedAt": ""}
    assert "a refund by kim is pending" in detail["next"]
    assert pending["providerCode"] in detail["next"]
    served.clear_faults(order)
    eventually(lambda: of(order, listed(served, status="done")), lambda found: len(found) == 1)
    assert of(order, listed(served, status="pending")) == []
    assert of(order, listed(served))[0]["providerCode"] is None


def test_the_metric_counts_pending_refunds(served: Served) -> None:
    def pending() -> float:
        lines = served.http.get("/metrics").text.splitlines()
        (line,) = [one for one in lines if one.startswith("reservation_pending_refunds ")]
        return float(line.split()[1])

    order = sold(served, served.sale())
    served.order_fault(order, "error_before_commit", operations=["cancel"], times=1000)
    assert refund(served, order).status_code == 202
    eventually(pending, lambda count: count >= 1)
    served.clear_faults(order)
    eventually(pending, lambda count: count == 0)


def test_a_different_request_during_a_refund_is_refused(served: Served) -> None:
    order = paid_by_account(served)
    # Its connection closes without a byte: it may be carried out.
    served.order_fault(order, "refuse", operations=["cancel", "look_up"], times=1000)
    assert refund(served, order, refundReceiveAccount=ACCOUNT).status_code == 202
    other = ACCOUNT | {"accountNumber": "220"}
    answer = refund(served, order, refundReceiveAccount=other)
    standing = refused(answer, 409, "refund_pending")["refund"]
    assert standing["refundReceiveAccount"] == ACCOUNT | {"bank": "20"}
    assert (standing["status"], standing["restock"], standing["operator"]) == (
        "pending",
        True,
        "kim",
    )
    # The same wish again is not a new refund.
    assert refund(served, order, refundReceiveAccount=ACCOUNT).status_code == 202
    served.clear_faults(order)
    eventually(
        lambda: served.get_reservation(order)["status"], lambda seen: seen == "REFUNDED", within=60
    )
    # SQL's row follows Redis: until then the refund counts as pending.
    eventually(lambda: story(served, order), lambda detail: detail["refund"]["status"] == "done")
    answer = refund(served, order, refundReceiveAccount=ACCOUNT, restock=False)
    assert refused(answer, 409, "not_refundable")["refund"]["status"] == "done"


def test_a_corrected_account_keeps_both_wishes_on_record(served: Served) -> None:
    order = paid_by_account(served)
    served.order_fault(order, "error_before_commit", operations=["cancel"], times=1000)
    assert refund(served, order, refundReceiveAccount=ACCOUNT).status_code == 202
    right = ACCOUNT | {"accountNumber": "220"}

    def corrected() -> bool:
        # While the worker requests the first one at the PG, that one is current.
        answer = refund(served, order, refundReceiveAccount=right)
        assert answer.status_code in {202, 409}, answer.text
        return answer.status_code == 202

    eventually(corrected, bool)
    (pending,) = of(order, listed(served, status="pending"))
    assert pending["refundReceiveAccount"]["accountNumber"] == "220"
    served.clear_faults(order)
    eventually(
        lambda: served.get_reservation(order)["status"], lambda seen: seen == "REFUNDED", within=60
    )

    def steps(detail: dict[str, Any]) -> list[str]:
        return [one["what"] for one in detail["history"] if one["kind"] == "refund"]

    detail = eventually(lambda: story(served, order), lambda one: steps(one)[-1] == "done")
    assert steps(detail) == ["begun", "replaced", "begun", "done"]
    assert detail["refund"]["status"] == "done"


@pytest.mark.parametrize("query", [{"status": "PENDING"}, {"cursor": "made-up"}, {"limit": 101}])
def test_an_invalid_query_of_refunds_is_refused(served: Served, query: dict[str, Any]) -> None:
    answer = served.http.get("/v1/admin/refunds", params=query, headers=served.admin)
    refused(answer, 400, "malformed_request")
