"""The answers to holds that one call took alike: encoded once, then filled in for each of them.

They are cut out of an answer as the route makes it, with marks in place of what each has of its
own. So there is one place that says what an answer looks like, and none of these can differ.
"""

import re
import secrets
from typing import Final

import msgspec

from api.context import Api
from api.schemas import ReservationAnswer
from reservation.domain.errors import BrokenInvariant
from reservation.domain.reservation import Line, Reservation
from reservation.domain.states import Status
from reservation.domain.tokens import Purpose
from reservation.redis.batch import Made

__all__ = ["ANY_RESERVATION", "AnswersAlike"]


def _mark() -> str:
    return secrets.token_hex(16)


#: Drawn anew by each process: nothing that a shop or a buyer wrote is like that.
_ORDER: Final = _mark()
_TOKEN: Final = _mark()
_CUSTOMER: Final = _mark()
_RETURN: Final = _mark()
_MARKS: Final = re.compile(f"({_ORDER}|{_TOKEN}|{_CUSTOMER}|{_RETURN})".encode())
#: In the order in which an answer has them; the way back stands in two addresses.
_PLACES: Final = [mark.encode() for mark in (_ORDER, _TOKEN, _CUSTOMER, _RETURN, _RETURN)]

_ENCODER: Final = msgspec.json.Encoder()

#: What a form can be tried with.
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


class AnswersAlike:
    """Answers while the payment has not begun.

    Args:
        api: the application's context.
        alike: any of the reservations, but for the ids and the number (`Made.alike`).
        epoch: the sale's.
    """

    def __init__(self, api: Api, alike: Reservation, epoch: str) -> None:
        signer = api.service.signer
        self._customer_key = api.service.order_ids.customer_key
        self._token, self._return = (
            signer.alike(api.claims(alike, purpose, epoch=epoch, buyer=""))
            for purpose in (Purpose.RESERVATION, Purpose.RETURN)
        )
        content = _ENCODER.encode(
            ReservationAnswer.of(
                msgspec.structs.replace(alike, order_id=_ORDER),
                now_ms=alike.created_at_ms,
                token=_TOKEN,
                payment=api.payment_with(_CUSTOMER, _RETURN),
            )
        )
        parts = _MARKS.split(content)
        if parts[1::2] != _PLACES:
            raise BrokenInvariant("an answer to a hold has other members than it is known to have")
        self._parts = parts[::2]

    def of(self, made: Made) -> bytes:
        """The answer to one of them."""
        order_id, seq = made.basket.order_id, made.seq
        customer_key = self._customer_key(made.basket.buyer_id)
        token = self._token.sign(order_id, customer_key, seq)
        way_back = self._return.sign(order_id, customer_key, seq)
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
                way_back,
                to_fail,
                way_back,
                end,
            )
        )
