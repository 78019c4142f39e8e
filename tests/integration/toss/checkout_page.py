"""The sandbox's payment page as a browser without scripts uses it."""

from html.parser import HTMLParser
from urllib.parse import parse_qs, urlsplit

import httpx

from tests.integration.toss.sandbox_steps import AMOUNT
from tests.support.sandbox import RunningSandbox

SUCCESS = "http://127.0.0.1:9/v1/payments/toss/success?token=a.b-c_d"


FAIL = "http://127.0.0.1:9/v1/payments/toss/fail?token=e.f"


class Form(HTMLParser):
    """The target of the page's form and the names of its buttons."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.action = ""
        self.buttons: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.add(tag)
        assert not any(name.startswith("on") or name == "style" for name in found)
        if tag == "form":
            assert found["method"] == "post"
            self.action = found["action"] or ""
        if tag == "button":
            self.buttons.append(found["value"] or "")


class Sent:
    """The target of the browser's redirect."""

    def __init__(self, response: httpx.Response) -> None:
        assert response.status_code == 303, response.text
        parts = urlsplit(response.headers["location"])
        self.path = parts.path
        self.query = {name: values[0] for name, values in parse_qs(parts.query).items()}


def page_query(sandbox: RunningSandbox, order_id: str, **more: str) -> dict[str, str]:
    return {
        "clientKey": sandbox.client_key,
        "customerKey": "customer-1",
        "orderId": order_id,
        "orderName": "콘서트 <티켓> & 1",
        "amount": str(AMOUNT),
        "currency": "KRW",
        "successUrl": SUCCESS,
        "failUrl": FAIL,
    } | more


def get_page(sandbox: RunningSandbox, query: dict[str, str]) -> httpx.Response:
    return httpx.get(sandbox.checkout_url, params=query, trust_env=False)


def open_page(sandbox: RunningSandbox, order_id: str) -> Form:
    response = get_page(sandbox, page_query(sandbox, order_id))
    assert response.status_code == 200
    return Form(response.text)


def press(sandbox: RunningSandbox, form: Form, button: str) -> Sent:
    """Submit the form as a browser without JavaScript does."""
    url = sandbox.url + form.action
    return Sent(httpx.post(url, data={"action": button}, trust_env=False))
