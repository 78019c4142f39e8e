"""Pre-encoded response bodies for a batch of identical prepares.

They are cut out of a response as the route makes it, with marks in place of the individual members.
So the route alone defines the form of a response, and none of these can differ.

    ResponseTemplate  members shared by all orders of one wish
    BatchTemplate     members shared by the orders of one call: their times as well
"""

import re
import secrets
from collections.abc import Callable
from typing import Final

import msgspec

from api.http.dependencies import ApiContext
from api.http.schemas.reservations import ReservationAnswer
from reservation.adapters.redis.prepare_queue import HoldCreated
from reservation.domain.clock import as_wire
from reservation.domain.errors import BrokenInvariant
from reservation.domain.reservation import Line, Reservation
from reservation.domain.states import Status
from reservation.domain.tokens import Purpose

__all__ = ["ANY_RESERVATION", "BatchTemplate", "ResponseTemplate"]

#: Signs a token from the order id, the buyer's customer key and the number of its event.
Sign = Callable[[str, str, int], bytes]


def _mark() -> str:
    return secrets.token_hex(16)


#: Drawn anew by each process: no text of a shop or a buyer can equal them.
_ORDER: Final = _mark()
_CREATED: Final = _mark()
_UPDATED: Final = _mark()
_EXPIRES: Final = _mark()
_TOKEN: Final = _mark()
_CUSTOMER: Final = _mark()
_RETURN: Final = _mark()
_MARKS: Final = re.compile(
    f"({_ORDER}|{_CREATED}|{_UPDATED}|{_EXPIRES}|{_TOKEN}|{_CUSTOMER}|{_RETURN})".encode()
)
#: In the order of the response; the return token is in two URLs.
_PLACES: Final = [
    mark.encode()
    for mark in (_ORDER, _CREATED, _UPDATED, _EXPIRES, _TOKEN, _CUSTOMER, _RETURN, _RETURN)
]

_ENCODER: Final = msgspec.json.Encoder()

#: A reservation to test the template with.
ANY_RESERVATION: Final = Reservation(
    order_id="",
    sale_id="sale",
    buyer_id="",
    status=Status.HELD,
    lines=(Line(sku="sku", quantity=1, price=1),),
    amount=1,
    currency="KRW",
    order_name="name",
    created_at_ms=0,
    updated_at_ms=0,
    expires_at_ms=1,
    seq=0,
)


class ResponseTemplate:
    """Responses to one wish while the payment has not begun.

    Args:
        api: the application's context.
        shared: any of the reservations, but for the ids and the number (`HoldCreated.shared`).
        epoch: the sale's.
    """

    def __init__(self, api: ApiContext, shared: Reservation, epoch: str) -> None:
        self._api = api
        self._epoch = epoch
        answer = ReservationAnswer.of(
            msgspec.structs.replace(shared, order_id=_ORDER),
            now_ms=shared.created_at_ms,
            token=_TOKEN,
            payment=api.payment_with(_CUSTOMER, _RETURN),
        )
        answer = msgspec.structs.replace(
            answer, created_at=_CREATED, updated_at=_UPDATED, expires_at=_EXPIRES
        )
        parts = _MARKS.split(_ENCODER.encode(answer))
        if parts[1::2] != _PLACES:
            raise BrokenInvariant("a reservation response has unexpected members")
        self._begin, *self._to_times, self._to_token = parts[:9:2]
        self._rest = parts[10::2]

    def of_call(self, shared: Reservation) -> "BatchTemplate":
        """The responses to the reservations of one call.

        Args:
            shared: any of them, but for the ids and the number.
        """
        times = (shared.created_at_ms, shared.updated_at_ms, shared.expires_at_ms)
        shown = [
            before + as_wire(ms).encode() for before, ms in zip(self._to_times, times, strict=True)
        ]
        sign, sign_return = (
            self._api.service.signer.batch_signer(
                self._api.claims(shared, purpose, epoch=self._epoch, buyer="")
            ).sign
            for purpose in (Purpose.RESERVATION, Purpose.RETURN)
        )
        parts = (self._begin, b"".join((*shown, self._to_token)), *self._rest)
        return BatchTemplate(parts, self._api.service.order_ids.customer_key, sign, sign_return)


class BatchTemplate:
    """Responses to the holds of one call.

    Args:
        parts: the fixed text before, between and after the individual members.
        customer_key: the PG's name for a buyer.
        sign: makes the reservation token.
        sign_return: makes the return token from the payment page.
    """

    __slots__ = ("_customer_key", "_parts", "_sign", "_sign_return")

    def __init__(
        self,
        parts: tuple[bytes, ...],
        customer_key: Callable[[str], str],
        sign: Sign,
        sign_return: Sign,
    ) -> None:
        self._parts = parts
        self._customer_key = customer_key
        self._sign = sign
        self._sign_return = sign_return

    def of(self, made: HoldCreated) -> bytes:
        """The response to one of them."""
        order_id, seq = made.basket.order_id, made.seq
        customer_key = self._customer_key(made.basket.buyer_id)
        token = self._sign(order_id, customer_key, seq)
        return_token = self._sign_return(order_id, customer_key, seq)
        begin, to_token, to_customer, to_success, to_fail, end = self._parts
        return b"".join(
            (
                begin,
                order_id.encode(),
                to_token,
                token,
                to_customer,
                customer_key.encode(),
                to_success,
                return_token,
                to_fail,
                return_token,
                end,
            )
        )
