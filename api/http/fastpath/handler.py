"""Fast path of prepare: a complete request is answered without the framework.

The rules of a prepare are `PrepareEndpoint`'s, which the route uses as well. This module only reads
a request from the connection and writes its response. It leaves to the route each request whose
reading is not plain (a sale that is not cached, a repeated header, an unknown origin), and each one
whose checks have to wait for I/O. Its responses equal the route's byte for byte
(tests/http/test_fastpath_equivalence.py).
"""

import secrets
import time
from typing import Any, Final, Protocol

import msgspec
from litestar.config.cors import CORSConfig

from api.http.connection.head import HEAD_ENDS, Head
from api.http.fastpath.cpu_pressure import CpuPressure
from api.http.fastpath.load_shedding import LoadShedder, RejectedRequest
from api.http.fastpath.response_template import ANY_RESERVATION, BatchTemplate, ResponseTemplate
from api.http.middleware import RequestObservation
from api.http.prepare_endpoint import (
    CREATED,
    HELD_HEADERS,
    OPERATION,
    REPLAYED_HEADERS,
    PrepareCall,
    PrepareEndpoint,
    keep,
)
from api.http.problem_details import PROBLEM_JSON, render_error
from reservation.adapters.redis.prepare_queue import HoldCreated, SharedFields
from reservation.application.reservations.prepare import TOO_MANY, Prepared
from reservation.domain.errors import ReservationError
from reservation.domain.reservation import Reservation

__all__ = ["DirectRequest", "FastPrepareHandler"]


class DirectRequest(RejectedRequest, Protocol):
    """A complete request that waits for its only response: a status, and all bytes after it."""

    def answer(self, status: int, message: bytes) -> None:
        """Answer it in this turn of the loop."""
        ...


_PREFIX: Final = b"/v1/sales/"
_SUFFIX: Final = b"/reservations"
#: For the log: the sale's id is in none of its lines.
_PATH: Final = "/v1/sales/-/reservations"
#: Placeholder of the request id in a prepared refusal; drawn anew by each process.
_INSTANCE: Final = secrets.token_hex(16)


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
_HELD = _lines({**HELD_HEADERS, **_JSON})
_REPLAYED = _lines({**REPLAYED_HEADERS, **_JSON})
_ID_LINE: Final = b"x-request-id: "


class FastPrepareHandler:
    """Reads prepares from connections and writes their responses."""

    def __init__(self, endpoint: PrepareEndpoint, cors: CORSConfig | None) -> None:
        api = endpoint.api
        self.endpoint = endpoint
        self._check = endpoint.check
        self._begin = endpoint.begin
        self._api = api
        self._now_ms = api.service.clock.now_ms
        self._cached_sale = api.service.catalog.cached
        self._load_shedder = LoadShedder(CpuPressure().shortage)
        self._cors = cors
        self._cors_lines: dict[bytes, bytes] = {}
        #: For a response without an origin: a cache must keep those apart.
        self._no_origin = b"vary: Origin\r\n" if cors else b""
        #: By the fields that select a template; None after a single response so far.
        self._template_sources: dict[tuple[Any, ...], ResponseTemplate | None] = {}
        self._templates: dict[SharedFields, BatchTemplate] = {}
        #: By the refusal and the length of the request id.
        self._refusals: dict[tuple[Exception, int], Refusal] = {}
        # If responses have members that the template lacks, start-up fails, not each response.
        ResponseTemplate(api, ANY_RESERVATION, epoch="")

    @staticmethod
    def accepts(method: bytes, url: bytes) -> bool:
        """Whether the request line is that of a prepare."""
        return method == b"POST" and url.startswith(_PREFIX) and url.endswith(_SUFFIX)

    def take(self, head: Head, body: bytes, request: DirectRequest) -> bool:
        """Answer a complete request, now or later; False leaves it to the route.

        Args:
            head: of a request that `accepts` accepted.
            body: the whole of it.
            request: answered once, if this returns True.
        """
        began = time.perf_counter()
        fields = head.fields
        sale_id = head.target[len(_PREFIX) : -len(_SUFFIX)].decode()
        known = self._cached_sale(sale_id)
        cors = self._cors_of(fields) if b"origin" in fields else self._no_origin
        if known is None or cors is None or len(fields) != len(head.headers):
            return False
        call = PrepareCall(sale_id, fields, body, known)
        refusal = self._check(call)
        if refusal is not None and not isinstance(refusal, ReservationError):
            # Nothing is counted yet, so the route begins anew.
            return False
        observation = RequestObservation(fields.get(b"x-request-id", b""), began)
        if refusal is TOO_MANY:
            self._shed(TOO_MANY, observation, cors, request)
            return True
        prepare = FastPrepareRequest(self, observation, cors, request, known.epoch)
        if refusal is not None:
            prepare.end(refusal)
            return True
        try:
            if observation.span is None:
                self._begin(call, prepare.end)
            else:
                with observation.inside():
                    self._begin(call, prepare.end)
        except ReservationError as error:
            prepare.end(error)
        return True

    def _shed(
        self,
        refusal: ReservationError,
        observation: RequestObservation,
        cors: bytes,
        request: DirectRequest,
    ) -> None:
        """Answer without any I/O, and without delaying the admitted requests."""
        status, message = self.refused(refusal, cors, observation.request_id)
        self._load_shedder.add(request, status, message, lambda: observation.end(OPERATION, status))

    def _cors_of(self, fields: dict[bytes, bytes]) -> bytes | None:
        """The CORS headers for the request's origin; None if only the framework can decide."""
        origin = fields.get(b"origin")
        if origin is None or self._cors is None:
            return b""
        found = self._cors_lines.get(origin)
        if found is None and origin.decode("latin-1") in self._cors.allow_origins:
            found = self._cors_lines[origin] = _cors_lines(self._cors, origin)
        return found

    def created(self, created: HoldCreated, epoch: str) -> bytes:
        """The body for a reservation that was just made."""
        shared = created.shared
        if self._now_ms() >= shared.reservation.expires_at_ms:
            # The call took longer than the hold: the body must show that the hold has ended.
            return self._content_of(created, epoch)
        answers = self._templates.get(shared)
        if answers is None:
            source = self._template_source(shared.reservation, epoch)
            if source is None:
                return self._content_of(created, epoch)
            answers = source.of_call(shared.reservation)
            keep(self._templates, shared, answers)
        return answers.of(created)

    def _content_of(self, created: HoldCreated, epoch: str) -> bytes:
        prepared = Prepared(created.reservation(), epoch, replayed=False)
        return self.endpoint.content(prepared)

    def _template_source(self, shared: Reservation, epoch: str) -> ResponseTemplate | None:
        """The template for this wish, in this call and later ones; None for its first response."""
        key = (
            shared.sale_id,
            epoch,
            shared.status,
            shared.lines,
            shared.amount,
            shared.currency,
            shared.order_name,
        )
        if key not in self._template_sources:
            # A template costs as much as some responses, and may serve only this one.
            keep(self._template_sources, key, None)
            return None
        source = self._template_sources[key]
        if source is None:
            source = self._template_sources[key] = ResponseTemplate(self._api, shared, epoch)
        return source

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
                keep(self._refusals, key, refusal)
        return refusal.status, refusal.message(cors, its_id)


class FastPrepareRequest(msgspec.Struct):
    """One prepare on the fast path."""

    path: FastPrepareHandler
    observation: RequestObservation
    cors: bytes
    request: DirectRequest
    epoch: str

    def end(self, outcome: HoldCreated | Prepared | Exception) -> None:
        """Answer with the outcome, and record it."""
        status, message = self._response(outcome)
        self.request.answer(status, message)
        order_id = None
        if isinstance(outcome, HoldCreated):
            order_id = outcome.basket.order_id
        elif isinstance(outcome, Prepared):
            order_id = outcome.reservation.order_id
        self.observation.end(OPERATION, status, order_id)

    def _response(self, outcome: HoldCreated | Prepared | Exception) -> tuple[int, bytes]:
        try:
            if isinstance(outcome, HoldCreated):
                return CREATED, self._message(_HELD, self.path.created(outcome, self.epoch))
            if isinstance(outcome, Prepared):
                content = self.path.endpoint.content(outcome)
                return CREATED, self._message(_REPLAYED if outcome.replayed else _HELD, content)
        except Exception as error:  # noqa: BLE001 # loop top: others wait behind
            outcome = error
        return self.path.refused(outcome, self.cors, self.observation.request_id)

    def _message(self, lines: bytes, content: bytes) -> bytes:
        """A whole response; `lines` are the header lines shared by responses of its kind."""
        return b"%bcontent-length: %d\r\n%bx-request-id: %b\r\n\r\n%b" % (
            lines,
            len(content),
            self.cors,
            self.observation.request_id.encode(),
            content,
        )


def _refusal(outcome: Exception, id_length: int) -> Refusal:
    """A reusable refusal or bug, for request ids of this length."""
    status, content, headers = render_error(outcome, path=_PATH, instance=_INSTANCE)
    before, _, after = content.partition(_INSTANCE.encode())
    length = {"Content-Length": str(len(before) + id_length + len(after))}
    lines = _lines({**headers, "Content-Type": PROBLEM_JSON, **length})
    return Refusal(status, lines, HEAD_ENDS + before, after)


def _cors_lines(cors: CORSConfig, origin: bytes) -> bytes:
    """The same headers in the same order as the framework's middleware adds them."""
    headers = {name.lower(): value for name, value in cors.simple_headers.items()}
    headers["access-control-allow-origin"] = origin.decode("latin-1")
    headers["vary"] = "Origin"
    headers["access-control-allow-headers"] = ", ".join(sorted(set(cors.allow_headers)))
    headers["access-control-allow-methods"] = ", ".join(sorted(set(cors.allow_methods)))
    return _lines(headers)
