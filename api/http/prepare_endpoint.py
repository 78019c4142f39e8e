"""Prepare behind both of its fronts: the order of its refusals, its body and its response.

The Litestar route and the fast path differ only in how a request comes in and how its response goes
out. Both make a `PrepareCall` of it and pass it to `PrepareEndpoint.check`, which refuses in this
order:

    503 unavailable          load shedding, before any work that delays admitted requests
    401 unauthenticated      no valid token
    429 rate_limited         unless the call repeats a key that holds
    404 sale_not_found
    400 malformed_request    the key, then the body
    404 sku_not_found        and all further refusals, from the application and prepare.lua
"""

import math
import re
from collections.abc import Awaitable, Callable, Mapping
from copy import copy
from typing import Final, TypeVar

import msgspec

from api.http.auth.bearer import bearer_in
from api.http.dependencies import PRIVATE, SALE_ID, ApiContext, known_sale
from api.http.schemas.reservations import PrepareRequest, ReservationAnswer
from api.http.strict_json import decode_strictly
from reservation.application.reservations.prepare import Done, Prepared, wish_of
from reservation.application.sales.catalog import CachedSale
from reservation.domain.errors import (
    BrokenInvariant,
    MalformedRequest,
    RateLimited,
    ReservationError,
    Unauthenticated,
)
from reservation.domain.ids import IDEMPOTENCY_KEY
from reservation.domain.reservation import Wish, digest_of, merge_lines
from reservation.domain.states import Visibility
from reservation.domain.tokens import Purpose
from reservation.telemetry import tracing

__all__ = [
    "CREATED",
    "HELD_HEADERS",
    "OPERATION",
    "REPLAYED_HEADERS",
    "PrepareCall",
    "PrepareEndpoint",
    "answer_of",
    "keep",
]

#: The operation's name in metrics, traces and OpenAPI.
OPERATION: Final = "prepareReservation"
CREATED: Final = 201
#: Of a response with a new reservation, and of one with that of an earlier call.
HELD_HEADERS: Final = PRIVATE
REPLAYED_HEADERS: Final = {**PRIVATE, "Idempotent-Replayed": "true"}

_IDEMPOTENCY_KEY = re.compile(IDEMPOTENCY_KEY)
#: Shared by all calls without a token: it is returned and never raised.
_NO_TOKEN: Final = Unauthenticated()
_NOT_CHECKED: Final = "a call is queued that was not checked"
#: Entries of a cache of bodies or responses: those of a moment are alike.
_KEPT_MAX: Final = 256

K = TypeVar("K")
V = TypeVar("V")


class PrepareCall(msgspec.Struct):
    """One prepare as it arrived, and the results of its checks so far."""

    sale_id: str
    #: By name in lower case.
    fields: Mapping[bytes, bytes]
    #: None until `receive` has returned it.
    body: bytes | None
    known: CachedSale | None = None
    receive: Callable[[], Awaitable[bytes]] | None = None
    #: Empty until the token is verified; the token while that waits.
    buyer_id: str = ""
    token: str = ""
    is_within_rate: bool = False
    idempotency_key: str = ""
    wish: Wish | None = None


#: A check that waits for I/O; `PrepareEndpoint.check` is called again after it.
Step = Callable[[PrepareCall], Awaitable[None]]


class PrepareEndpoint:
    """The one implementation of a prepare over HTTP."""

    def __init__(self, api: ApiContext) -> None:
        self.api = api
        self._preparation = api.service.preparation
        self._shed = api.service.preparation.overload_refusal
        self._begin = api.service.preparation.begin
        self._cached_sale = api.service.catalog.cached
        self._buyer_of_cached = api.buyers.buyer_of_cached
        self._monotonic = api.service.clock.monotonic
        self._prepares = api.prepares
        self._encoder = msgspec.json.Encoder()
        #: By sale, its epoch, the version of its settings, whether admitted, and body.
        self._wishes: dict[tuple[str, str, int, bool, bytes], Wish] = {}

    def check(self, call: PrepareCall) -> ReservationError | Step | None:
        """Make all checks that precede the queue, as far as they need no I/O.

        Returns:
            None once the call may be queued; its refusal; or a step to await before the next
            `check`. If the sale and the body were given, no limit has counted a call that gets a
            step: it may as well be checked anew.
        """
        known = call.known or self._cached_sale(call.sale_id)
        if known is not None:
            refusal = self._shed(known)
            if refusal is not None:
                return refusal
        try:
            if not call.buyer_id:
                token = bearer_in(call.fields.get(b"authorization", b"").decode("latin-1"))
                if token is None:
                    return _NO_TOKEN
                buyer_id = self._buyer_of_cached(token)
                if buyer_id is None:
                    call.token = token
                    return self._verify
                call.buyer_id = buyer_id
            if not call.is_within_rate:
                limited = self._too_fast(call.buyer_id)
                if limited is not None:
                    return limited if self._is_no_replay(call.buyer_id) else self._admit_replay
                call.is_within_rate = True
            if known is None or known.sale.visibility is Visibility.DRAFT:
                return self._find_sale
            call.known = known
            if call.body is None:
                return self._receive
            call.idempotency_key = _key(call)
            admission = call.fields.get(b"x-sale-admission")
            call.wish = self.wish(known, call.buyer_id, call.body, admission)
        except ReservationError as error:
            return error
        return None

    async def admit(self, call: PrepareCall) -> None:
        """Make all checks that precede the queue, I/O included.

        Raises:
            ReservationError: the first refusal that applies.
        """
        while (result := self.check(call)) is not None:
            if isinstance(result, ReservationError):
                # One refusal is shared by many callers, so each raises a copy.
                raise copy(result)
            await result(call)

    def begin(self, call: PrepareCall, done: Done) -> None:
        """Queue a call that was checked in this turn of the loop; `done` gets its outcome once.

        Raises:
            ReservationError: a refusal that needs no Redis; `done` is not called then.
        """
        if call.known is None or call.wish is None:
            raise BrokenInvariant(_NOT_CHECKED)
        self._begin(call.known, call.buyer_id, call.idempotency_key, call.wish, done)

    async def prepare(self, call: PrepareCall) -> Prepared:
        """Queue a call that was admitted, and wait for its outcome.

        Raises:
            ReservationError: every refusal of `PrepareReservations.prepare`.
        """
        if call.known is None or call.wish is None:
            raise BrokenInvariant(_NOT_CHECKED)
        prepared = await self._preparation.prepare(
            call.known, call.buyer_id, call.idempotency_key, call.wish
        )
        if tracing.tracer is not None:
            tracing.tracer.note(order=prepared.reservation.order_id)
        return prepared

    def content(self, prepared: Prepared) -> bytes:
        """The response's body for a reservation, new or replayed."""
        return self._encoder.encode(answer_of(self.api, prepared))

    def wish(self, known: CachedSale, buyer_id: str, body: bytes, admission: bytes | None) -> Wish:
        """The wish in the body; most bodies are alike, and are decoded once.

        Raises:
            MalformedRequest: the body does not fit `PrepareRequest`.
            SkuNotFound: the sale does not have the first item.
        """
        service = self.api.service
        # The script reads whether the sale requires an admission.
        admitted = admission is not None and service.signer.admits(
            admission.decode("latin-1"), known.sale.page, buyer_id, now_ms=service.clock.now_ms()
        )
        key = (known.sale.sale_id, known.epoch, known.sale.version, admitted, body)
        wish = self._wishes.get(key)
        if wish is None:
            wish = _wish_in(known, decode_strictly(body, PrepareRequest), admitted=admitted)
            keep(self._wishes, key, wish)
        return wish

    # The checks of a call, and the steps that wait.

    async def _verify(self, call: PrepareCall) -> None:
        call.buyer_id = await self.api.buyers.verified(call.token)

    def _too_fast(self, buyer_id: str) -> RateLimited | None:
        """Count one call of this buyer; the refusal if it exceeds the prepare rate."""
        wait = 0.0 if self._prepares is None else self._prepares.wait(buyer_id, self._monotonic())
        return RateLimited(retryAfter=max(1, math.ceil(wait))) if wait else None

    def _is_no_replay(self, buyer_id: str) -> bool:
        """Whether a rate-limited call is refused without a look-up of its key."""
        replays = self.api.replays
        return replays is None or not replays.is_free(buyer_id, self._monotonic())

    async def _admit_replay(self, call: PrepareCall) -> None:
        """Let a rate-limited call pass if it repeats a key with the same body."""
        limited = self._too_fast(call.buyer_id)
        replays = self.api.replays
        if limited is not None and (
            replays is None
            or replays.wait(call.buyer_id, self._monotonic())
            or not await self._is_replay(call)
        ):
            raise limited
        call.is_within_rate = True

    async def _is_replay(self, call: PrepareCall) -> bool:
        """Whether the key has an order with this body; one look-up in Redis."""
        if SALE_ID.fullmatch(call.sale_id) is None:
            return False
        try:
            key, data = _key(call), decode_strictly(await _body(call), PrepareRequest)
        except MalformedRequest:
            return False
        lines = merge_lines((line.sku, line.quantity) for line in data.items)
        digest = digest_of(lines, data.amount, data.order_name)
        return await self._preparation.is_replay(call.sale_id, call.buyer_id, key, digest)

    async def _find_sale(self, call: PrepareCall) -> None:
        call.known = await known_sale(self.api, call.sale_id)

    async def _receive(self, call: PrepareCall) -> None:
        call.body = await _body(call)


def _key(call: PrepareCall) -> str:
    key = call.fields.get(b"idempotency-key", b"").decode("latin-1")
    if _IDEMPOTENCY_KEY.fullmatch(key) is None:
        raise MalformedRequest(
            "The header Idempotency-Key must have 1 to 255 printable ASCII characters."
        )
    return key


async def _body(call: PrepareCall) -> bytes:
    if call.body is not None:
        return call.body
    if call.receive is None:
        raise BrokenInvariant("a call has neither a body nor a way to receive it")
    return await call.receive()


def _wish_in(known: CachedSale, data: PrepareRequest, *, admitted: bool) -> Wish:
    items = [(line.sku, line.quantity) for line in data.items]
    return wish_of(known.sale, items, data.amount, order_name=data.order_name, admitted=admitted)


def answer_of(api: ApiContext, prepared: Prepared) -> ReservationAnswer:
    """Prepare's response: the reservation with all members needed to pay for it."""
    order = prepared.reservation
    epoch = prepared.epoch
    now_ms = api.service.clock.now_ms()
    payment = api.payment(order, epoch=epoch, now_ms=now_ms)
    token = None
    if payment is not None:
        token = api.token(
            order, Purpose.RESERVATION, epoch=epoch, customer_key=payment.customer_key
        )
    return ReservationAnswer.of(order, now_ms=now_ms, token=token, payment=payment)


def keep(kept: dict[K, V], key: K, value: V) -> None:
    """Add to a cache; a full one is cleared as a whole, since no entry is worth much."""
    if len(kept) >= _KEPT_MAX:
        kept.clear()
    kept[key] = value
