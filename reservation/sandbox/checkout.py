"""Checkout: the PG's payment page between our page and our success URL. Plain HTML forms."""

import html
import re
from collections.abc import Mapping
from pathlib import Path
from string import Template
from urllib.parse import parse_qs, urlencode, urlsplit, urlunsplit

import msgspec
from litestar import get, post
from litestar.handlers import HTTPRouteHandler
from litestar.params import FromPath
from litestar.response.base import ASGIResponse

from reservation.sandbox.refusals import Refusal
from reservation.sandbox.requests import AnyRequest
from reservation.sandbox.state import Sandbox
from reservation.sandbox.state_records import Method, PaymentRecord

__all__ = ["checkout_routes"]

_FOLDER = Path(__file__).parent
_PAGE = Template((_FOLDER / "checkout.html").read_text(encoding="utf-8"))
_STYLE = (_FOLDER / "checkout.css").read_bytes()

#: Forms may go to any site: a browser checks every redirect behind a form against this list, and
#: the shop redirects its buyer from successUrl to pages of any site.
_POLICY = (
    "default-src 'none'; style-src 'self'; img-src data:; base-uri 'none'; "
    "frame-ancestors 'none'; form-action 'self' http: https:"
)
_HEADERS = [
    ("content-security-policy", _POLICY),
    ("referrer-policy", "no-referrer"),
    ("x-content-type-options", "nosniff"),
    ("cache-control", "no-store"),
]

_CUSTOMER_KEY = re.compile(r"[A-Za-z0-9_=.@-]{2,50}")
_CURRENCY = re.compile(r"[A-Z]{3}")
_NAME_CHARS = 100
_URL_CHARS = 4000

#: Name of the button, its label, the effect. The order is that of the page.
_BUTTONS = (
    ("card", "main", "Pay by card", "Approved immediately"),
    ("virtual_account", "", "Virtual account", "Issue an account number for a later deposit"),
    ("insufficient", "", "Card without funds", "Accepted on this page, declined at the charge"),
    ("decline", "", "Card declined here", "The card company refuses on this page"),
    ("cancel", "plain", "Cancel and go back", ""),
)


class Checkout(msgspec.Struct, frozen=True, kw_only=True):
    """The payment request of the shop's page, validated."""

    order_id: str
    order_name: str
    amount: int
    currency: str
    customer_key: str
    success_url: str
    fail_url: str


def checkout_routes(sandbox: Sandbox) -> list[HTTPRouteHandler]:
    """The page, its style, and the targets of its buttons."""

    @get("/checkout", sync_to_thread=False)
    def page(request: AnyRequest) -> ASGIResponse:
        ledger = sandbox.ledger
        try:
            asked = _read_query(request.query_params, client_key=sandbox.config.client_key)
            opened = ledger.open(**msgspec.structs.asdict(asked))
        except Refusal as refusal:
            return _document("Payment cannot start", _error_page(refusal.message), refusal.status)
        ledger.commit(opened)
        return _document(f"Pay {asked.order_name}", _form(opened.payment))

    @get("/checkout.css", sync_to_thread=False)
    def style() -> ASGIResponse:
        headers = [("cache-control", "max-age=3600"), ("x-content-type-options", "nosniff")]
        return ASGIResponse(body=_STYLE, media_type="text/css", headers=headers)

    @post("/checkout/{payment_key:str}", status_code=303)
    async def press(request: AnyRequest, payment_key: FromPath[str]) -> ASGIResponse:
        form = parse_qs((await request.body()).decode("ascii", "replace"))
        button = form.get("action", [""])[0]
        try:
            target = _press(sandbox, sandbox.ledger.payment(payment_key), button)
        except Refusal as refusal:
            return _document(
                "Payment cannot continue", _error_page(refusal.message), refusal.status
            )
        return ASGIResponse(status_code=303, headers=[*_HEADERS, ("location", target)])

    return [page, style, press]


def _press(sandbox: Sandbox, record: PaymentRecord, button: str) -> str:
    """Do the button's action; returns the redirect's address."""
    if not record.success_url:
        raise Refusal("NOT_FOUND_PAYMENT")
    if record.status == "EXPIRED":
        return _fail_url(record, Refusal("PAY_PROCESS_ABORTED"))
    match button:
        case "card":
            return _authenticate(sandbox, record, "card")
        case "insufficient":
            return _authenticate(sandbox, record, "card", decline="REJECT_CARD_PAYMENT")
        case "virtual_account":
            return _authenticate(sandbox, record, "virtual_account")
        case "decline":
            return _fail_url(record, Refusal("REJECT_CARD_COMPANY"))
        case "cancel":
            return _fail_url(record, Refusal("PAY_PROCESS_CANCELED"))
        case _:
            raise Refusal("INVALID_REQUEST")


def _authenticate(
    sandbox: Sandbox, record: PaymentRecord, method: Method, decline: str | None = None
) -> str:
    """The buyer agreed. A second press after coming back leads to the same redirect and key."""
    if record.status == "READY":
        sandbox.ledger.commit(sandbox.ledger.authenticate(record, method=method, decline=decline))
    return _with_query(
        record.success_url,
        {
            "paymentType": "NORMAL",
            "orderId": record.order_id,
            "paymentKey": record.payment_key,
            "amount": str(record.total_amount),
        },
    )


def _fail_url(record: PaymentRecord, refusal: Refusal) -> str:
    query = {"code": refusal.code, "message": refusal.message}
    # For a buyer who cancels, the PG sends no order id.
    if refusal.code != "PAY_PROCESS_CANCELED":
        query["orderId"] = record.order_id
    return _with_query(record.fail_url, query)


def _with_query(url: str, query: dict[str, str]) -> str:
    """The address with further query parameters."""
    parts = urlsplit(url)
    joined = "&".join(part for part in (parts.query, urlencode(query)) if part)
    return urlunsplit(parts._replace(query=joined))


def _read_query(query: Mapping[str, str], *, client_key: str) -> Checkout:
    """Refuses every request that the PG's own script would refuse."""
    if query.get("clientKey") != client_key:
        raise Refusal("UNAUTHORIZED_KEY", "The client key is not the sandbox's client key.")
    amount = query.get("amount", "")
    if not (amount.isascii() and amount.isdecimal() and len(amount) <= 13):
        raise Refusal("INVALID_REQUEST", "The amount is not a whole number.")
    name = query.get("orderName", "")
    if not 0 < len(name) <= _NAME_CHARS:
        raise Refusal("INVALID_REQUEST", "The order name must have at most 100 characters.")
    customer_key = query.get("customerKey", "")
    if _CUSTOMER_KEY.fullmatch(customer_key) is None:
        raise Refusal("INVALID_REQUEST", "The customer key is invalid.")
    currency = query.get("currency", "KRW")
    if _CURRENCY.fullmatch(currency) is None:
        raise Refusal("INVALID_REQUEST", "The currency is invalid.")
    return Checkout(
        order_id=query.get("orderId", ""),
        order_name=name,
        amount=int(amount),
        currency=currency,
        customer_key=customer_key,
        success_url=_web_address(query, "successUrl"),
        fail_url=_web_address(query, "failUrl"),
    )


def _web_address(query: Mapping[str, str], name: str) -> str:
    url = query.get(name, "")
    try:
        parts = urlsplit(url)
        fine = parts.scheme in {"http", "https"} and bool(parts.hostname)
    except ValueError:
        fine = False
    if not fine or len(url) > _URL_CHARS or not url.isascii() or not url.isprintable():
        raise Refusal("INVALID_REQUEST", f"{name} is not an absolute URL.")
    return url


def _form(record: PaymentRecord) -> str:
    """Order, amount and buttons."""
    say = html.escape
    buttons = "\n".join(
        f'<button class="{kind}" name="action" value="{value}">'
        f"<strong>{say(words)}</strong>"
        + (f"<span>{say(hint)}</span>" if hint else "")
        + "</button>"
        for value, kind, words, hint in _BUTTONS
    )
    return (
        f"<header><h1>{say(record.order_name)}</h1>\n"
        f'<p class="amount">{say(_money(record.total_amount, record.currency))}</p></header>\n'
        f"<dl><dt>Order</dt><dd>{say(record.order_id)}</dd></dl>\n"
        f'<form method="post" action="/checkout/{record.payment_key}" aria-label="Payment">\n'
        f"{buttons}\n</form>\n"
        '<p class="quiet">This page stands in for the payment gateway. It asks for no card number '
        "and takes no money.</p>"
    )


def _error_page(sentence: str) -> str:
    return (
        "<h1>This payment cannot continue</h1>\n"
        f'<p class="quiet">{html.escape(sentence)}</p>\n'
        '<p class="quiet">Go back to the shop and start again. Nothing was charged.</p>'
    )


def _money(amount: int, currency: str) -> str:
    return f"₩{amount:,}" if currency == "KRW" else f"{amount:,} {currency}"


def _document(title: str, content: str, status: int = 200) -> ASGIResponse:
    page = _PAGE.substitute(title=html.escape(title), content=content)
    return ASGIResponse(
        body=page.encode(), media_type="text/html", status_code=status, headers=_HEADERS
    )
