"""Fast path of prepare: a complete request is answered without the framework.

It takes only unambiguous requests: a known sale, a valid token, a body and a key that fit. All
others, refusals of these included, go to the route (`api.http.routes.reservations`) untouched, so
that each rule of HTTP is in one place. Its responses equal the route's byte for byte
(tests/http/test_fastpath_equivalence.py).
"""

import math
import re
import secrets
import time
from typing import Any, Final, Protocol, TypeVar

import msgspec
from litestar.config.cors import CORSConfig

from api.http.auth.bearer import bearer_in
from api.http.connection.head import HEAD_ENDS, Head
from api.http.dependencies import ApiContext
from api.http.fastpath.cpu_pressure import CpuPressure
from api.http.fastpath.load_shedding import LoadShedder, RejectedRequest
from api.http.fastpath.response_template import ANY_RESERVATION, BatchTemplate, ResponseTemplate
from api.http.middleware import record, request_id
from api.http.problem_details import PROBLEM_JSON, render_error
from api.http.routes.reservations import PRIVATE, answer_of, is_admitted, wish_in
from api.http.schemas.reservations import PrepareRequest
from reservation.adapters.redis.prepare_queue import HoldCreated, SharedFields
from reservation.application.reservations.prepare import Done, Prepared
from reservation.application.sales.catalog import CachedSale
from reservation.domain.errors import (
    RateLimited,
    ReservationError,
    SkuNotFound,
    Unauthenticated,
)
from reservation.domain.ids import IDEMPOTENCY_KEY
from reservation.domain.reservation import Reservation, Wish
from reservation.telemetry import tracing

__all__ = ["Asked", "FastPrepareHandler"]


class Asked(RejectedRequest, Protocol):
    """A complete request that waits for its only response: a status, and all bytes after it."""

    def answer(self, status: int, message: bytes) -> None:
        """Answer it in this turn of the loop."""
        ...


_PREFIX: Final = b"/v1/sales/"
_SUFFIX: Final = b"/reservations"
#: For the log: the id of the sale is in none of its lines.
_PATH: Final = "/v1/sales/-/reservations"
_IDEMPOTENCY_KEY = re.compile(IDEMPOTENCY_KEY)
_OPERATION: Final = "prepareReservation"
_CREATED: Final = 201
#: Cached bodies, responses and refusals: those of a moment are alike.
_KEPT_MAX: Final = 256
#: Placeholder of the request id in a prepared refusal; drawn anew by each process.
_INSTANCE: Final = secrets.token_hex(16)

K = TypeVar("K")
V = TypeVar("V")


class Refusal(msgspec.Struct, frozen=True):
    """A reusable refusal, split at the request id."""

    status: int
    #: The header lines except those for CORS and the request id.
    lines: bytes
    between: bytes
    after: bytes

    def message(self, cors: bytes, its_id: str) -> bytes:
        """The response with this request id."""
        named = its_id.encode()
        return b"".join((self.lines, cors, _ID_LINE, named, self.between, named, self.after))


def _lines(headers: dict[str, str]) -> bytes:
    lines = (f"{name.lower()}: {value}\r\n" for name, value in headers.items())
    return "".join(lines).encode("latin-1")


_JSON: Final = {"Content-Type": "application/json"}
_HELD = _lines({**PRIVATE, **_JSON})
_REPLAYED = _lines({**PRIVATE, "Idempotent-Replayed": "true", **_JSON})
_ID_LINE: Final = b"x-request-id: "


class FastPrepareHandler:
    """Answers the unambiguous prepares."""

    def __init__(self, api: ApiContext, cors: CORSConfig | None) -> None:
        self._api = api
        self._now_ms = api.service.clock.now_ms
        self._monotonic = api.service.clock.monotonic
        self._at_hand = api.service.catalog.at_hand
        self._turned_away = api.service.preparation.turned_away
        self._prepares = api.prepares
        self._outside = LoadShedder(CpuPressure().shortage)
        self._body = msgspec.json.Decoder(PrepareRequest)
        self._answer = msgspec.json.Encoder()
        self._cors = cors
        self._cors_lines: dict[bytes, bytes] = {}
        #: For a response without an origin: a cache must keep those apart.
        self._no_origin = b"vary: Origin\r\n" if cors else b""
        #: By sale, its epoch, the version of its settings, whether admitted, and body.
        self._wishes: dict[tuple[str, str, int, bool, bytes], Wish] = {}
        #: By the fields that select a template; None after a single response so far.
        self._forms: dict[tuple[Any, ...], ResponseTemplate | None] = {}
        self._alike: dict[SharedFields, BatchTemplate] = {}
        #: By the refusal and the length of the request id.
        self._refusals: dict[tuple[Exception, int], Refusal] = {}
        # If responses have members that the template lacks, start-up fails, not each response.
        ResponseTemplate(api, ANY_RESERVATION, epoch="")

    @staticmethod
    def may_take(method: bytes, url: bytes) -> bool:
        """Whether the request line is that of a prepare."""
        return method == b"POST" and url.startswith(_PREFIX) and url.endswith(_SUFFIX)

    def take(self, head: Head, body: bytes, asked: Asked) -> bool:
        """Answer a complete request, now or later; False leaves it to the route.

        Args:
            head: of a request that `may_take` accepted.
            body: the whole of it.
            asked: answered once, if this returns True.
        """
        began = time.perf_counter()
        fields = head.fields
        known = self._at_hand(head.target[len(_PREFIX) : -len(_SUFFIX)].decode())
        cors = self._cors_of(fields) if b"origin" in fields else self._no_origin
        if known is None or cors is None or len(fields) != len(head.headers):
            return False
        its_id = request_id(fields.get(b"x-request-id", b""))
        turned_away = self._turned_away(known)
        if turned_away is not None:
            # Before any work that delays others: the refusal is the same for good and bad requests.
            self._turn_away(turned_away, began, its_id, cors, asked)
            return True
        try:
            buyer_id = self._buyer(fields)
            key = fields[b"idempotency-key"].decode("ascii")
            if buyer_id is None or _IDEMPOTENCY_KEY.fullmatch(key) is None:
                return False
            wish = self._wish(known, buyer_id, body, fields.get(b"x-sale-admission"))
        except (
            KeyError,
            Unauthenticated,
            UnicodeDecodeError,
            msgspec.MsgspecError,
            SkuNotFound,
        ):
            return False
        refusal = self.too_fast(buyer_id)
        if refusal is not None and self.may_be_replay(buyer_id):
            return False
        FastPrepareRequest(self, began, its_id, cors, asked, known).begin(
            buyer_id, key, wish, refusal
        )
        return True

    def _turn_away(
        self, refusal: ReservationError, began: float, its_id: str, cors: bytes, asked: Asked
    ) -> None:
        """Answer without any I/O, and without delaying the admitted requests."""
        status, message = self.refused(refusal, cors, its_id)
        span = None if tracing.tracer is None else tracing.tracer.request(its_id)

        def told() -> None:
            record(_OPERATION, status, time.perf_counter() - began, its_id)
            if span is not None and tracing.tracer is not None:
                tracing.tracer.answered(span, _OPERATION, status)

        self._outside.add(asked, status, message, told)

    def _buyer(self, fields: dict[bytes, bytes]) -> str | None:
        token = bearer_in(fields[b"authorization"].decode("latin-1"))
        return None if token is None else self._api.buyers.at_once(token)

    def _wish(self, known: CachedSale, buyer_id: str, body: bytes, admission: bytes | None) -> Wish:
        """The wish in the body; most bodies are alike, and are parsed once."""
        shown = None if admission is None else admission.decode("latin-1")
        admitted = is_admitted(self._api, known, buyer_id, shown)
        key = (known.sale.sale_id, known.epoch, known.sale.version, admitted, body)
        wish = self._wishes.get(key)
        if wish is None:
            wish = wish_in(known, self._body.decode(body), admitted=admitted)
            _keep(self._wishes, key, wish)
        return wish

    def _cors_of(self, fields: dict[bytes, bytes]) -> bytes | None:
        """The CORS headers for the request's origin; None if only the framework can decide."""
        origin = fields.get(b"origin")
        if origin is None or self._cors is None:
            return b""
        found = self._cors_lines.get(origin)
        if found is None and origin.decode("latin-1") in self._cors.allow_origins:
            found = self._cors_lines[origin] = _cors_lines(self._cors, origin)
        return found

    def too_fast(self, buyer_id: str) -> RateLimited | None:
        """Count one call of this buyer; the refusal if it exceeds the prepare rate."""
        wait = 0.0 if self._prepares is None else self._prepares.wait(buyer_id, self._monotonic())
        return RateLimited(retryAfter=max(1, math.ceil(wait))) if wait else None

    def may_be_replay(self, buyer_id: str) -> bool:
        """Whether the route may look up if a rate-limited call is a replay of a key."""
        replays = self._api.replays
        return replays is not None and replays.is_free(buyer_id, self._monotonic())

    def begin(self, known: CachedSale, buyer_id: str, key: str, wish: Wish, done: Done) -> None:
        """Queue the wish; raises the refusals that need no Redis."""
        self._api.service.preparation.begin(known, buyer_id, key, wish, done)

    def made(self, made: HoldCreated, epoch: str) -> bytes:
        """The body for a reservation that was just made."""
        alike = made.alike
        if self._now_ms() >= alike.reservation.expires_at_ms:
            # The call took longer than the hold: the body must show that the hold has ended.
            return self.found(Prepared(made.reservation(), epoch, replayed=False))
        answers = self._alike.get(alike)
        if answers is None:
            form = self._form(alike.reservation, epoch)
            if form is None:
                return self.found(Prepared(made.reservation(), epoch, replayed=False))
            answers = form.of_call(alike.reservation)
            _keep(self._alike, alike, answers)
        return answers.of(made)

    def _form(self, alike: Reservation, epoch: str) -> ResponseTemplate | None:
        """The template for this wish, in this call and later ones; None for its first response."""
        key = (
            alike.sale_id,
            epoch,
            alike.status,
            alike.lines,
            alike.amount,
            alike.currency,
            alike.order_name,
        )
        if key not in self._forms:
            # A template costs as much as some responses, and may serve only this one.
            _keep(self._forms, key, None)
            return None
        form = self._forms[key]
        if form is None:
            form = self._forms[key] = ResponseTemplate(self._api, alike, epoch)
        return form

    def found(self, prepared: Prepared) -> bytes:
        """The body for a reservation, new or replayed."""
        return self._answer.encode(answer_of(self._api, prepared))

    def refused(self, outcome: Exception, cors: bytes, its_id: str) -> tuple[int, bytes]:
        """Status and message of a refusal, or of a bug."""
        if not isinstance(outcome, ReservationError) or outcome.__traceback__ is not None:
            # A raised one belongs to a single caller, and its traceback references the connection.
            refusal = _refusal(outcome, len(its_id))
        else:
            key = outcome, len(its_id)
            refusal = self._refusals.get(key)
            if refusal is None:
                refusal = _refusal(outcome, len(its_id))
                _keep(self._refusals, key, refusal)
        return refusal.status, refusal.message(cors, its_id)


class FastPrepareRequest:
    """One prepare on the fast path."""

    __slots__ = ("_asked", "_began", "_cors", "_id", "_known", "_path", "_span")

    def __init__(
        self,
        path: FastPrepareHandler,
        began: float,
        its_id: str,
        cors: bytes,
        asked: Asked,
        known: CachedSale,
    ) -> None:
        self._path = path
        self._began = began
        self._id = its_id
        self._cors = cors
        self._asked = asked
        self._known = known
        self._span = None if tracing.tracer is None else tracing.tracer.request(its_id)

    def begin(self, buyer_id: str, key: str, wish: Wish, refusal: ReservationError | None) -> None:
        if refusal is not None:
            self._done(refusal)
            return
        try:
            if self._span is None or tracing.tracer is None:
                self._path.begin(self._known, buyer_id, key, wish, self._done)
            else:
                with tracing.tracer.inside(self._span):
                    self._path.begin(self._known, buyer_id, key, wish, self._done)
        except ReservationError as error:
            self._done(error)

    def _done(self, outcome: HoldCreated | Prepared | Exception) -> None:
        status, message = self._shown(outcome)
        self._asked.answer(status, message)
        record(_OPERATION, status, time.perf_counter() - self._began, self._id)
        if self._span is not None and tracing.tracer is not None:
            if isinstance(outcome, HoldCreated | Prepared):
                order = outcome.basket if isinstance(outcome, HoldCreated) else outcome.reservation
                tracing.tracer.note(self._span, order=order.order_id)
            tracing.tracer.answered(self._span, _OPERATION, status)

    def _shown(self, outcome: HoldCreated | Prepared | Exception) -> tuple[int, bytes]:
        try:
            if isinstance(outcome, HoldCreated):
                content = self._path.made(outcome, self._known.epoch)
                return _CREATED, self._message(_HELD, content)
            if isinstance(outcome, Prepared):
                content = self._path.found(outcome)
                return _CREATED, self._message(_REPLAYED if outcome.replayed else _HELD, content)
        except Exception as error:  # noqa: BLE001 # loop top: others wait behind
            outcome = error
        return self._path.refused(outcome, self._cors, self._id)

    def _message(self, lines: bytes, content: bytes) -> bytes:
        """A whole response; `lines` are the header lines shared by responses of its kind."""
        return b"%bcontent-length: %d\r\n%bx-request-id: %b\r\n\r\n%b" % (
            lines,
            len(content),
            self._cors,
            self._id.encode(),
            content,
        )


def _refusal(outcome: Exception, id_length: int) -> Refusal:
    """A reusable refusal or bug, for request ids of this length."""
    status, content, headers = render_error(outcome, path=_PATH, instance=_INSTANCE)
    before, _, after = content.partition(_INSTANCE.encode())
    length = {"Content-Length": str(len(before) + id_length + len(after))}
    lines = _lines({**headers, "Content-Type": PROBLEM_JSON, **length})
    return Refusal(status, lines, HEAD_ENDS + before, after)


def _keep(kept: dict[K, V], key: K, value: V) -> None:
    """Add to a cache; a full one is cleared as a whole, since no entry is worth much."""
    if len(kept) >= _KEPT_MAX:
        kept.clear()
    kept[key] = value


def _cors_lines(cors: CORSConfig, origin: bytes) -> bytes:
    """The same headers in the same order as the framework's middleware adds them."""
    headers = {name.lower(): value for name, value in cors.simple_headers.items()}
    headers["access-control-allow-origin"] = origin.decode("latin-1")
    headers["vary"] = "Origin"
    headers["access-control-allow-headers"] = ", ".join(sorted(set(cors.allow_headers)))
    headers["access-control-allow-methods"] = ", ".join(sorted(set(cors.allow_methods)))
    return _lines(headers)
