"""Toss API: the PG's own endpoints."""

import asyncio
import hashlib
import hmac
import random
from base64 import b64decode, b64encode
from collections.abc import Callable
from datetime import datetime

import msgspec
from litestar import get, post
from litestar.handlers import HTTPRouteHandler
from litestar.params import FromPath
from litestar.response.base import ASGIResponse

from reservation.sandbox.faults import AFTER, BEFORE, Fault, FaultRequest, Operation
from reservation.sandbox.ledger import CancelRequest, Outcome
from reservation.sandbox.payment_format import KST, payment_view, transaction_view
from reservation.sandbox.refusals import Refusal
from reservation.sandbox.requests import AnyRequest, read_body
from reservation.sandbox.responses import (
    Reply,
    faulty_response,
    full_response,
    injected_response,
    refused,
)
from reservation.sandbox.state import Sandbox
from reservation.sandbox.state_records import PaymentRecord, Replay

__all__ = ["pg_routes"]

#: The PG's own limits.
_IDEMPOTENCY_KEY_CHARS = 300
_TRANSACTIONS_DEFAULT = 100
_TRANSACTIONS_MAX = 5000


class ConfirmRequest(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """The body of a confirm."""

    payment_key: str
    order_id: str
    amount: int


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """One call, decoded and authorised."""

    operation: Operation
    payment_key: str | None
    order_id: str | None
    perform: Callable[[], Outcome]
    #: The key of the first answer.
    replay_key: str | None = None


class CallHandler:
    """Handles a call: authentication, idempotency key, faults, answer."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox
        config = sandbox.config
        self._secret_key = config.secret_key.encode()
        self._authorization = "Basic " + b64encode(self._secret_key + b":").decode()
        self._tests = config.secret_key.startswith("test_")
        self._key_digest = hashlib.sha256(self._secret_key).hexdigest()[:8]
        #: Idempotency keys, and payments under confirm, whose call is in progress.
        self._busy: set[str] = set()
        self._encode = msgspec.json.Encoder().encode

    def check(self, request: AnyRequest) -> None:
        """Refuse a caller without rights, and a call that a test header marks for refusal."""
        given = request.headers.get("authorization", "")
        if given != self._authorization:
            self._check_authorization(given)
        code = request.headers.get("tosspayments-test-code")
        if code and self._tests:
            raise Refusal(code)

    def replay_key(self, request: AnyRequest) -> str | None:
        """The key under which an answer is kept. The body is not part of it, as with the PG."""
        key = request.headers.get("idempotency-key")
        if not key:
            return None
        if len(key) > _IDEMPOTENCY_KEY_CHARS:
            raise Refusal("INVALID_IDEMPOTENCY_KEY")
        return f"{request.method} {request.url.path} {self._key_digest} {key}"

    async def serve(self, call: Call) -> ASGIResponse:
        """Do one call and answer it, with its injected fault."""
        rule = self._sandbox.faults.pick(call.operation, call.payment_key, call.order_id)
        if rule is not None and rule.fault in BEFORE:
            return injected_response(rule.fault)
        reply = self._earlier(call)
        if reply is None:
            reply = await self._perform(call, rule)
        if rule is None or rule.fault not in AFTER:
            return full_response(reply)
        return faulty_response(reply, rule)

    def view(self, record: PaymentRecord) -> bytes:
        return self._encode(payment_view(record, now_ms=self._sandbox.clock.now_ms()))

    def _check_authorization(self, given: str) -> None:
        """The slow path to the same end, for the right refusal."""
        scheme, _, encoded = given.partition(" ")
        if scheme.lower() != "basic":
            raise Refusal("UNAUTHORIZED_KEY")
        try:
            name, colon, _ = b64decode(encoded, validate=True).partition(b":")
        except ValueError:
            raise Refusal("INCORRECT_BASIC_AUTH_FORMAT") from None
        if not colon:
            raise Refusal("INCORRECT_BASIC_AUTH_FORMAT")
        if not hmac.compare_digest(name, self._secret_key):
            raise Refusal("UNAUTHORIZED_KEY")

    def _earlier(self, call: Call) -> Reply | None:
        """The first answer under the call's idempotency key, or that it is not there yet."""
        if call.replay_key is None:
            return None
        if call.replay_key in self._busy:
            return refused(Refusal("IDEMPOTENT_REQUEST_PROCESSING"))
        kept = self._sandbox.ledger.replay(call.replay_key)
        return None if kept is None else Reply(kept.status, kept.body.encode())

    async def _perform(self, call: Call, rule: FaultRequest | None) -> Reply:
        """Do it, once no other call for the same payment is in progress."""
        confirming = f"confirm {call.payment_key}" if call.operation == "confirm" else None
        if confirming in self._busy:
            code = "FAILED_PAYMENT_INTERNAL_SYSTEM_PROCESSING"
            return refused(Refusal(code, "[S008] 기존 요청을 처리중입니다."))
        marks = {mark for mark in (confirming, call.replay_key) if mark is not None}
        self._busy |= marks
        try:
            await self._delay(rule)
            return self._commit(call, rule)
        finally:
            self._busy -= marks

    async def _delay(self, rule: FaultRequest | None) -> None:
        shortest, longest = self._sandbox.config.latency_ms
        if longest:
            await asyncio.sleep(random.uniform(shortest, longest) / 1000)  # noqa: S311 - a delay
        if rule is not None and rule.fault is Fault.HANG:
            await self._sandbox.faults.hang(rule.seconds)

    def _commit(self, call: Call, rule: FaultRequest | None) -> Reply:
        """Decide and write in one step: nothing else runs between the two."""
        ledger = self._sandbox.ledger
        outcome: Outcome | None = None
        try:
            if call.replay_key is not None:
                ledger.check_room()
            outcome = call.perform()
            reply = Reply(200, self.view(outcome.payment))
            if outcome.refusal is not None:
                reply = refused(outcome.refusal)
        except Refusal as refusal:
            reply = refused(refusal)
        if call.operation == "look_up":
            return reply
        # A 5xx is not kept: the PG has never been seen to keep one.
        error = rule is not None and rule.fault is Fault.ERROR_AFTER_COMMIT
        keep = call.replay_key is not None and reply.status < 500 and not error
        replay = self._replay(call.replay_key or "", reply) if keep else None
        if outcome is not None or replay is not None:
            ledger.commit(outcome, replay=replay)
        if outcome is not None and rule is not None and rule.fault is Fault.WEBHOOK_STORM:
            self._sandbox.webhooks.storm(outcome.payment)
        return reply

    def _replay(self, key: str, reply: Reply) -> Replay:
        now_ms = self._sandbox.clock.now_ms()
        return Replay(key=key, at_ms=now_ms, status=reply.status, body=reply.body.decode())


def pg_routes(sandbox: Sandbox) -> list[HTTPRouteHandler]:
    """The PG's five endpoints."""
    handler = CallHandler(sandbox)
    return [*_money_routes(sandbox, handler), *_look_up_routes(sandbox, handler)]


def _money_routes(sandbox: Sandbox, handler: CallHandler) -> list[HTTPRouteHandler]:
    decode_confirm = msgspec.json.Decoder(ConfirmRequest).decode
    decode_cancel = msgspec.json.Decoder(CancelRequest).decode

    @post("/v1/payments/confirm", status_code=200)
    async def confirm(request: AnyRequest) -> ASGIResponse:
        handler.check(request)
        replay_key = handler.replay_key(request)
        body = await read_body(request, decode_confirm)
        return await handler.serve(
            Call(
                operation="confirm",
                payment_key=body.payment_key,
                order_id=body.order_id,
                replay_key=replay_key,
                perform=lambda: sandbox.ledger.confirm(
                    payment_key=body.payment_key, order_id=body.order_id, amount=body.amount
                ),
            )
        )

    @post("/v1/payments/{payment_key:str}/cancel", status_code=200)
    async def cancel(request: AnyRequest, payment_key: FromPath[str]) -> ASGIResponse:
        handler.check(request)
        replay_key = handler.replay_key(request)
        body = await read_body(request, decode_cancel)
        return await handler.serve(
            Call(
                operation="cancel",
                payment_key=payment_key,
                order_id=_order_of(sandbox, payment_key),
                replay_key=replay_key,
                perform=lambda: sandbox.ledger.cancel(payment_key, body),
            )
        )

    return [confirm, cancel]


def _look_up_routes(sandbox: Sandbox, handler: CallHandler) -> list[HTTPRouteHandler]:
    @get("/v1/payments/{payment_key:str}")
    async def look_up(request: AnyRequest, payment_key: FromPath[str]) -> ASGIResponse:
        handler.check(request)
        return await handler.serve(
            Call(
                operation="look_up",
                payment_key=payment_key,
                order_id=_order_of(sandbox, payment_key),
                perform=lambda: Outcome(payment=sandbox.ledger.payment(payment_key)),
            )
        )

    @get("/v1/payments/orders/{order_id:str}")
    async def look_up_order(request: AnyRequest, order_id: FromPath[str]) -> ASGIResponse:
        handler.check(request)
        return await handler.serve(
            Call(
                operation="look_up",
                payment_key=None,
                order_id=order_id,
                perform=lambda: Outcome(payment=sandbox.ledger.payment_of_order(order_id)),
            )
        )

    @get("/v1/transactions", sync_to_thread=False)
    def transactions(request: AnyRequest) -> ASGIResponse:
        handler.check(request)
        return full_response(Reply(200, msgspec.json.encode(_transactions(sandbox, request))))

    return [look_up, look_up_order, transactions]


def _order_of(sandbox: Sandbox, payment_key: str) -> str | None:
    """The order of a payment, so that a fault for it hits the calls by key too."""
    try:
        return sandbox.ledger.payment(payment_key).order_id
    except Refusal:
        return None


def _transactions(sandbox: Sandbox, request: AnyRequest) -> list[dict[str, object]]:
    """Ledger entries in a span of time, oldest first, page by page."""
    query = request.query_params
    try:
        start, end = _instant(query.get("startDate")), _instant(query.get("endDate"))
        limit = int(query.get("limit", _TRANSACTIONS_DEFAULT))
    except (TypeError, ValueError):
        raise Refusal("INVALID_REQUEST") from None
    if not 0 < limit <= _TRANSACTIONS_MAX:
        raise Refusal("INVALID_REQUEST")
    entries = sandbox.ledger.entries_between(start, end)
    after = query.get("startingAfter")
    if after:
        place = [entry.transaction_key for entry in entries]
        entries = entries[place.index(after) + 1 :] if after in place else []
    payment = sandbox.ledger.payment
    return [transaction_view(entry, payment(entry.payment_key)) for entry in entries[:limit]]


def _instant(text: str | None) -> datetime:
    """A `yyyy-MM-ddThh:mm:ss`, in Korean time by default."""
    at = datetime.fromisoformat(text or "")
    return at if at.tzinfo else at.replace(tzinfo=KST)
