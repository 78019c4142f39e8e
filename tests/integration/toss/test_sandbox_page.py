"""The sandbox's payment page: its buttons and the redirects to the shop."""

import httpx
import pytest

from tests.integration.toss.checkout_page import Form, get_page, open_page, page_query, press
from tests.integration.toss.sandbox_steps import AMOUNT, MINUTE, code_of, status_of
from tests.support.sandbox import RunningSandbox


def test_an_unfinished_payment_expires_after_half_an_hour(
    own: RunningSandbox, order_id: str
) -> None:
    form = open_page(own, order_id)
    own.turn_clock(30 * MINUTE - 30)
    assert own.ledger(order_id)["payments"][0]["status"] == "READY"
    own.turn_clock(30)
    assert own.ledger(order_id)["payments"][0]["status"] == "EXPIRED"
    sent = press(own, form, "card")
    assert sent.path == "/v1/payments/toss/fail"
    assert sent.query["code"] == "PAY_PROCESS_ABORTED"


def test_the_page_shows_the_order_and_loads_nothing_from_elsewhere(
    sandbox: RunningSandbox, order_id: str
) -> None:
    response = get_page(sandbox, page_query(sandbox, order_id))
    form = Form(response.text)
    assert form.buttons == ["card", "virtual_account", "insufficient", "decline", "cancel"]
    assert "콘서트 &lt;티켓&gt; &amp; 1" in response.text
    assert "₩10,000" in response.text
    assert 'name="viewport"' in response.text
    assert not form.tags & {"script", "style", "img", "iframe"}
    assert "//" not in response.text.replace("<!doctype", "")
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "script-src" not in policy
    assert "unsafe" not in policy
    assert response.headers["referrer-policy"] == "no-referrer"
    style = httpx.get(f"{sandbox.url}/checkout.css", trust_env=False)
    assert style.headers["content-type"].startswith("text/css")
    assert "url(" not in style.text


def test_paying_redirects_to_the_success_url_and_keeps_its_query(
    sandbox: RunningSandbox, order_id: str
) -> None:
    sent = press(sandbox, open_page(sandbox, order_id), "card")
    payment_key = sent.query.pop("paymentKey")
    assert sent.path == "/v1/payments/toss/success"
    assert sent.query == {
        "token": "a.b-c_d",
        "paymentType": "NORMAL",
        "orderId": order_id,
        "amount": str(AMOUNT),
    }
    assert status_of(sandbox, payment_key) == "IN_PROGRESS"
    assert sandbox.ledger(order_id)["charged"] == 0
    confirmed = sandbox.confirm(payment_key, order_id, AMOUNT)
    assert (confirmed.status_code, confirmed.json()["orderName"]) == (200, "콘서트 <티켓> & 1")


def test_a_second_press_redirects_to_the_same_url(sandbox: RunningSandbox, order_id: str) -> None:
    form = open_page(sandbox, order_id)
    first, again = press(sandbox, form, "card"), press(sandbox, form, "card")
    assert first.query == again.query
    assert len(sandbox.ledger(order_id)["payments"]) == 1


def test_a_card_without_funds_is_declined_at_the_charge(
    sandbox: RunningSandbox, order_id: str
) -> None:
    sent = press(sandbox, open_page(sandbox, order_id), "insufficient")
    assert sent.path == "/v1/payments/toss/success"
    refused = sandbox.confirm(sent.query["paymentKey"], order_id, AMOUNT)
    assert code_of(refused) == (403, "REJECT_CARD_PAYMENT")


def test_a_virtual_account_waits_for_a_deposit(sandbox: RunningSandbox, order_id: str) -> None:
    sent = press(sandbox, open_page(sandbox, order_id), "virtual_account")
    payment = sandbox.confirm(sent.query["paymentKey"], order_id, AMOUNT).json()
    assert payment["status"] == "WAITING_FOR_DEPOSIT"


def test_a_card_refused_on_the_page_redirects_to_the_fail_url(
    sandbox: RunningSandbox, order_id: str
) -> None:
    form = open_page(sandbox, order_id)
    sent = press(sandbox, form, "decline")
    assert sent.path == "/v1/payments/toss/fail"
    assert sent.query.pop("message")
    assert sent.query == {"token": "e.f", "code": "REJECT_CARD_COMPANY", "orderId": order_id}
    # The window is still open: another card may be accepted.
    assert press(sandbox, form, "card").path == "/v1/payments/toss/success"


def test_cancelling_redirects_to_the_fail_url_without_the_order(
    sandbox: RunningSandbox, order_id: str
) -> None:
    sent = press(sandbox, open_page(sandbox, order_id), "cancel")
    assert sent.query["code"] == "PAY_PROCESS_CANCELED"
    assert "orderId" not in sent.query
    assert sandbox.ledger(order_id)["payments"][0]["status"] == "READY"


@pytest.mark.parametrize(
    "wrong",
    [
        {"clientKey": "test_gck_other"},
        {"amount": "1.5"},
        {"amount": "-1"},
        {"amount": "0"},
        {"amount": "٣"},
        {"orderId": "a/b"},
        {"orderName": ""},
        {"orderName": "x" * 101},
        {"customerKey": "a b"},
        {"currency": "won"},
        {"successUrl": "javascript:alert(1)"},
        {"successUrl": "//evil"},
        {"failUrl": "http://x/\r\nSet-Cookie: a=b"},
        {"failUrl": ""},
    ],
)
def test_an_invalid_page_request_explains_the_error(
    sandbox: RunningSandbox, order_id: str, wrong: dict[str, str]
) -> None:
    response = get_page(sandbox, page_query(sandbox, order_id, **wrong))
    assert response.status_code in {400, 401}
    assert "This payment cannot continue" in response.text
    assert Form(response.text).buttons == []
    assert sandbox.ledger(order_id)["payments"] == []


def test_an_unknown_button_or_payment_redirects_nowhere(
    sandbox: RunningSandbox, order_id: str
) -> None:
    form = open_page(sandbox, order_id)
    url = sandbox.url + form.action
    assert httpx.post(url, data={"action": "steal"}, trust_env=False).status_code == 400
    assert httpx.post(url, content=b"\xff\xfe", trust_env=False).status_code == 400
    without_page = sandbox.put_payment(f"{order_id}-2", AMOUNT)
    for payment_key in ("tboxnone", without_page):
        url = f"{sandbox.url}/checkout/{payment_key}"
        assert httpx.post(url, data={"action": "card"}, trust_env=False).status_code == 404
