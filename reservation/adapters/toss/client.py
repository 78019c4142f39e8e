"""The client of Toss Payments' core API v1: maps every outcome of a call to an `Answer`."""

import asyncio
import re
import time
from base64 import b64encode
from datetime import UTC, datetime, timedelta, timezone
from urllib.parse import quote, urlencode

import msgspec
import structlog

from reservation.adapters.toss.banks import bank_code
from reservation.adapters.toss.error_codes import Operation, answer_of_refusal
from reservation.adapters.toss.transport import (
    HttpRequest,
    HttpResponse,
    HttpTransport,
    NoResponse,
    NotSent,
)
from reservation.domain.ids import PAYMENT_KEY
from reservation.domain.payment_gateway import (
    Answer,
    Answered,
    GatewayLimits,
    Payment,
    PaymentGateway,
    RefundAccount,
    Transaction,
    TransactionList,
    TransactionPage,
    TryAgain,
    Unknown,
    VirtualAccount,
)
from reservation.telemetry import tracing

__all__ = ["TossGateway", "TossLimits", "parse_time"]

log = structlog.get_logger(__name__)

#: The PG's times may lack a UTC offset; then they are Korean time.
KST = timezone(timedelta(hours=9))

#: Maximum size of a response. A payment with fifty partial cancels is under 20 kB.
ANSWER_BYTES_MAX = 64 * 1024

#: Entries of one page of the list, and its maximum size: four times that of such a page.
PAGE_ENTRIES = 1_000
PAGE_BYTES_MAX = 2 * 1024 * 1024

#: Concurrent confirms in one process. Each may hang for the full minute, so this also bounds the
#: buyers that a silent PG keeps waiting; the others get `TryAgain`.
CONFIRMS_MAX = 256

#: Concurrent look-ups and cancels. They have their own connection pool, because the settler
#: needs look-ups while confirms hang.
LOOK_UPS_MAX = 64

#: The PG's length limits of a reason and of an idempotency key.
_REASON_CHARS = 200
_IDEMPOTENCY_KEY = re.compile(r"[!-~]{1,300}")
_PAYMENT_KEY = re.compile(PAYMENT_KEY)
_ORDER_ID = re.compile(r"[A-Za-z0-9_-]{6,64}")
_SECRET_KEY = re.compile(r"[!-9;-~]{1,200}")

#: Maximum length of the PG's trace id in our log; it is untrusted input.
_TRACE_CHARS = 100

#: Only won. The PG's amounts in other currencies are decimals of the major unit (19.5 dollars),
#: which nothing here converts. A card's minimum is 100 won.
_TAKES = GatewayLimits(minimum_amounts={"KRW": 100}, minimum_account_amounts={"KRW": 200})

#: Maximum length of a message in an answer; the PG's own limit is 510.
_MESSAGE_CHARS = 510
#: Maximum length of an account's bank, number and holder; the PG's own limits are 20, 20 and 100.
_SHOWN_CHARS = 100
_CODE = re.compile(r"[A-Za-z0-9_.-]{1,100}")


class TossLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Deadlines of calls, from the connection to the last byte of the response."""

    connect_seconds: float = 3.0
    #: Toss's documentation requires at least a minute.
    confirm_seconds: float = 60.0
    cancel_seconds: float = 60.0
    look_up_seconds: float = 10.0
    #: Toss's documentation requires a minute here, too.
    list_seconds: float = 60.0


class TossGateway(PaymentGateway, TransactionList):
    """A `PaymentGateway` over HTTP. Build it inside a running event loop and `aclose` it there.

    A confirm and a cancel are sent once. A response of more than `ANSWER_BYTES_MAX` is not read.

    Args:
        base_url: `https://api.tosspayments.com`, or a sandbox.
        secret_key: the PG's secret key, as issued.
        limits: shorter ones for tests.

    Raises:
        ValueError: the secret key has invalid characters, such as a byte order mark.
    """

    def __init__(self, *, base_url: str, secret_key: str, limits: TossLimits | None = None) -> None:
        if _SECRET_KEY.fullmatch(secret_key) is None:
            raise ValueError("the PG's secret key contains an invalid character")
        self._times = limits or TossLimits()
        self._base_url = base_url.rstrip("/")
        self._headers = {
            # The colon ends the user name; the password is empty.
            "authorization": "Basic " + b64encode(f"{secret_key}:".encode()).decode(),
            "accept": "application/json",
            # Without compression, a response cannot expand beyond the counted bytes.
            "accept-encoding": "identity",
            "user-agent": "stock-reservation",
        }
        wait = self._times.connect_seconds
        self._confirms = HttpTransport(connections_max=CONFIRMS_MAX, connect_seconds=wait)
        self._others = HttpTransport(connections_max=LOOK_UPS_MAX, connect_seconds=wait)

    def __repr__(self) -> str:
        return f"TossGateway({self._base_url})"

    @property
    def limits(self) -> GatewayLimits:
        return _TAKES

    async def confirm(
        self, *, payment_key: str, order_id: str, amount: int, idempotency_key: str
    ) -> Answer:
        _check(_PAYMENT_KEY, payment_key, "payment key")
        _check(_ORDER_ID, order_id, "order id")
        body = {"paymentKey": payment_key, "orderId": order_id, "amount": amount}
        request = self._post("/v1/payments/confirm", body, idempotency_key)
        limit_seconds = self._times.confirm_seconds
        return await self._ask(Operation.CONFIRM, self._confirms, request, limit_seconds)

    async def look_up(self, payment_key: str) -> Answer:
        _check(_PAYMENT_KEY, payment_key, "payment key")
        return await self._get(f"/v1/payments/{quote(payment_key, safe='')}")

    async def look_up_order(self, order_id: str) -> Answer:
        _check(_ORDER_ID, order_id, "order id")
        return await self._get(f"/v1/payments/orders/{quote(order_id, safe='')}")

    async def cancel(
        self,
        *,
        payment_key: str,
        reason: str,
        idempotency_key: str,
        refund_account: RefundAccount | None = None,
    ) -> Answer:
        _check(_PAYMENT_KEY, payment_key, "payment key")
        body: dict[str, object] = {"cancelReason": reason[:_REASON_CHARS]}
        if refund_account is not None:
            body["refundReceiveAccount"] = refund_account
        path = f"/v1/payments/{quote(payment_key, safe='')}/cancel"
        request = self._post(path, body, idempotency_key)
        limit_seconds = self._times.cancel_seconds
        return await self._ask(Operation.CANCEL, self._others, request, limit_seconds)

    async def list_transactions(
        self, *, since: datetime, until: datetime, after: str
    ) -> TransactionPage | Answer:
        query = {
            # Without an offset, as Toss documents them. It counts whole seconds.
            "startDate": f"{since.astimezone(KST):%Y-%m-%dT%H:%M:%S}",
            "endDate": f"{until.astimezone(KST) + timedelta(seconds=1):%Y-%m-%dT%H:%M:%S}",
            "limit": str(PAGE_ENTRIES),
        }
        if after:
            query["startingAfter"] = after
        request = self._request("GET", f"/v1/transactions?{urlencode(query)}", self._headers)
        try:
            async with asyncio.timeout(self._times.list_seconds):
                response = await self._others.send(request, bytes_max=PAGE_BYTES_MAX)
        except NotSent as error:
            return TryAgain(str(error))
        except TimeoutError:
            return Unknown("timeout")
        except NoResponse as error:
            return Unknown(str(error))
        if response.status != 200 or response.content is None:
            return _read_answer(Operation.LOOK_UP, response)
        return _page_of(response.content) or Unknown("200 unreadable list")

    async def aclose(self) -> None:
        await self._confirms.aclose()
        await self._others.aclose()

    def _post(self, path: str, body: object, idempotency_key: str) -> HttpRequest:
        _check(_IDEMPOTENCY_KEY, idempotency_key, "idempotency key")
        more = {"content-type": "application/json", "idempotency-key": idempotency_key}
        return self._request("POST", path, self._headers | more, _encode(body))

    async def _get(self, path: str) -> Answer:
        request = self._request("GET", path, self._headers)
        limit_seconds = self._times.look_up_seconds
        return await self._ask(Operation.LOOK_UP, self._others, request, limit_seconds)

    def _request(
        self, method: str, path: str, headers: dict[str, str], content: bytes | None = None
    ) -> HttpRequest:
        return HttpRequest(method, f"{self._base_url}{path}", headers, content)

    async def _ask(
        self,
        operation: Operation,
        transport: HttpTransport,
        request: HttpRequest,
        limit_seconds: float,
    ) -> Answer:
        """Send one request and map its outcome to an answer."""
        if tracing.tracer is None:
            return await self._send(operation, transport, request, limit_seconds)
        with tracing.tracer.step(f"pg {operation.value}", operation=operation.value) as span:
            answer = await self._send(operation, transport, request, limit_seconds)
            if span is not None:
                span.set_attribute("reservation.answer", type(answer).__name__)
            return answer

    async def _send(
        self,
        operation: Operation,
        transport: HttpTransport,
        request: HttpRequest,
        limit_seconds: float,
    ) -> Answer:
        began = time.monotonic()
        response: HttpResponse | None = None
        try:
            async with asyncio.timeout(limit_seconds):
                response = await transport.send(request, bytes_max=ANSWER_BYTES_MAX)
            answer = _read_answer(operation, response)
        except NotSent as error:
            answer = TryAgain(str(error))
        except TimeoutError:
            answer = Unknown("timeout")
        except NoResponse as error:
            answer = Unknown(str(error))
        log.debug(
            "toss_answered",
            operation=operation.value,
            answer=type(answer).__name__,
            status=response and response.status,
            trace_id=_trace_of(response),
            elapsed_ms=round((time.monotonic() - began) * 1000),
        )
        return answer


class _VirtualAccount(msgspec.Struct, frozen=True, rename="camel"):
    due_date: str | None = None
    # Display only, so an odd value must not make the payment unreadable.
    account_number: object = None
    bank_code: object = None
    #: Replaces the code in API versions before 2022-11-16.
    bank: object = None
    customer_name: object = None
    refund_status: object = None


class _Failure(msgspec.Struct, frozen=True):
    code: str | None = None


class _WirePayment(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """The fields of a payment that we use; others are ignored: the PG adds some without notice."""

    payment_key: str
    order_id: str
    status: str
    total_amount: int | float
    balance_amount: int | float
    currency: str
    method: str | None = None
    approved_at: str | None = None
    virtual_account: _VirtualAccount | None = None
    secret: str | None = None
    failure: _Failure | None = None


class _WireTransaction(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """The fields of a list's entry that we use."""

    transaction_key: str
    payment_key: str
    order_id: str
    status: str


class _Error(msgspec.Struct, frozen=True):
    code: str | None = None
    message: str | None = None


class _WireError(msgspec.Struct, frozen=True):
    """A refusal: `{"code","message"}`, according to some reports inside an `error` object."""

    code: str | None = None
    message: str | None = None
    error: _Error | None = None


#: Decoding errors: not JSON, JSON of another shape, not UTF-8, or nested too deeply.
_UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)

_encode = msgspec.json.Encoder().encode
_decode_payment = msgspec.json.Decoder(_WirePayment).decode
_decode_page = msgspec.json.Decoder(list[_WireTransaction]).decode
_decode_error = msgspec.json.Decoder(_WireError).decode


def _trace_of(response: HttpResponse | None) -> str:
    if response is None:
        return ""
    return response.headers.get("x-tosspayments-trace-id", "")[:_TRACE_CHARS]


def _read_answer(operation: Operation, response: HttpResponse) -> Answer:
    status, content = response.status, response.content
    if content is None:
        return Unknown(f"{status} oversized answer")
    if status == 200:
        payment = _payment_of(content)
        return Unknown("200 unreadable answer") if payment is None else Answered(payment)
    refusal = _refusal_of(content) if 400 <= status < 600 else None
    if refusal is None:
        return Unknown(f"{status} unreadable answer")
    code, message = refusal
    return answer_of_refusal(operation, status=status, code=code, message=message)


def _payment_of(content: bytes) -> Payment | None:
    try:
        wire = _decode_payment(content)
    except _UNREADABLE:
        return None
    total, balance = _whole(wire.total_amount), _whole(wire.balance_amount)
    if total is None or balance is None:
        return None
    account = wire.virtual_account
    return Payment(
        payment_key=wire.payment_key,
        order_id=wire.order_id,
        status=wire.status,
        total_amount=total,
        balance_amount=balance,
        currency=wire.currency,
        method=wire.method,
        approved_at=parse_time(wire.approved_at),
        virtual_account=None if account is None else _account_of(account),
        due_at=None if account is None else parse_time(account.due_date),
        secret=wire.secret,
        failure_code=None if wire.failure is None else wire.failure.code,
    )


def _page_of(content: bytes) -> TransactionPage | None:
    try:
        wire = _decode_page(content)
    except _UNREADABLE:
        return None
    return TransactionPage(
        tuple(
            Transaction(
                transaction_key=entry.transaction_key,
                payment_key=entry.payment_key,
                order_id=entry.order_id,
                status=entry.status,
            )
            for entry in wire
        )
    )


def _account_of(wire: _VirtualAccount) -> VirtualAccount | None:
    """The account for the buyer's deposit; None without an account number or a bank."""
    number, bank = _shown(wire.account_number), _shown(wire.bank_code) or _shown(wire.bank)
    if not number or not bank:
        return None
    return VirtualAccount(
        bank=bank_code(bank),
        account_number=number,
        holder_name=_shown(wire.customer_name),
        refund_status=_shown(wire.refund_status) or None,
    )


def _shown(value: object) -> str:
    """A display text of the PG; empty if it is not printable text."""
    if not isinstance(value, str) or not value.isprintable():
        return ""
    return value[:_SHOWN_CHARS]


def _whole(number: float) -> int | None:
    """A JSON number as an integer, in any notation; None if it is not a whole number."""
    if isinstance(number, int):
        return number
    return int(number) if number.is_integer() else None


def _refusal_of(content: bytes) -> tuple[str, str] | None:
    """Code and message of a readable refusal, else None."""
    try:
        wire = _decode_error(content)
    except _UNREADABLE:
        return None
    inner = wire.error or _Error()
    code = wire.code or inner.code
    if code is None or _CODE.fullmatch(code) is None:
        return None
    return code, (wire.message or inner.message or "")[:_MESSAGE_CHARS]


def parse_time(text: str | None) -> datetime | None:
    """An instant in UTC from any of the PG's formats; None if it is invalid."""
    if not text:
        return None
    try:
        at = datetime.fromisoformat(text)
        return (at if at.tzinfo else at.replace(tzinfo=KST)).astimezone(UTC)
    except (ValueError, OverflowError):
        return None


def _check(pattern: re.Pattern[str], text: str, name: str) -> None:
    """Defence against injection into a path or header; callers have validated the text before."""
    if pattern.fullmatch(text) is None:
        raise ValueError(f"invalid {name}: not sent to the PG")
