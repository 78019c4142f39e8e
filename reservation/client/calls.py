"""Each call as data: the request, and the parser of its response. No I/O."""

import secrets
from collections.abc import Mapping
from typing import Any, Final, Generic, TypeVar
from urllib.parse import quote

import httpx
import msgspec

from reservation.client.errors import NoAnswer, refusal
from reservation.client.models import Answer, Guest, Reservation, Reservations, Sale, Sales

__all__ = [
    "Call",
    "guest",
    "prepare",
    "read",
    "release",
    "reservation",
    "reservations",
    "sale",
    "sales",
]

A = TypeVar("A", bound=Answer)

#: A response to `wait` arrives this much later at most: the network's share.
_WAIT_MARGIN_SECONDS: Final = 10.0


class Call(msgspec.Struct, Generic[A], frozen=True, kw_only=True):
    """One request, complete but for the address and the buyer."""

    method: str
    path: str
    answers: type[A]
    headers: Mapping[str, str] = {}
    body: Any = None
    #: Seconds beyond the client's own limit that this call may take.
    patience: float = 0.0
    #: Whether the buyer's bearer token is sent; a reservation's own token replaces it.
    as_buyer: bool = True


class _Problem(msgspec.Struct):
    code: str
    detail: str = ""


def _path(*segments: str) -> str:
    return "/v1/" + "/".join(quote(segment, safe="") for segment in segments)


def guest() -> Call[Guest]:
    return Call(method="POST", path="/v1/guests", answers=Guest, as_buyer=False)


def sales(cursor: str | None) -> Call[Sales]:
    """A page of the list: the first one, or the one after a cursor."""
    path = "/v1/sales" if cursor is None else f"/v1/sales?cursor={quote(cursor, safe='')}"
    return Call(method="GET", path=path, answers=Sales)


def sale(sale_id: str) -> Call[Sale]:
    return Call(method="GET", path=_path("sales", sale_id), answers=Sale)


def prepare(
    sale_id: str,
    basket: Mapping[str, int],
    *,
    amount: int,
    order_name: str | None,
    key: str | None,
    admission: str | None,
) -> Call[Reservation]:
    """A prepare, with a random key if the caller has none."""
    body: dict[str, Any] = {
        "items": [{"sku": sku, "quantity": quantity} for sku, quantity in basket.items()],
        "amount": amount,
    }
    if order_name is not None:
        body["orderName"] = order_name
    headers = {"Idempotency-Key": key or secrets.token_urlsafe(16)}
    if admission is not None:
        headers["X-Sale-Admission"] = admission
    return Call(
        method="POST",
        path=_path("sales", sale_id, "reservations"),
        answers=Reservation,
        headers=headers,
        body=body,
    )


def reservations(sale_id: str) -> Call[Reservations]:
    return Call(method="GET", path=_path("sales", sale_id, "reservations"), answers=Reservations)


def reservation(order_id: str, *, token: str | None, wait: int) -> Call[Reservation]:
    """A read, as the buyer or by the reservation's own token; with `wait` a long poll."""
    path = _path("reservations", order_id)
    return Call(
        method="GET",
        path=f"{path}?wait={wait}" if wait else path,
        answers=Reservation,
        headers=_proof(token),
        patience=wait + _WAIT_MARGIN_SECONDS if wait else 0.0,
        as_buyer=token is None,
    )


def release(order_id: str, *, token: str | None) -> Call[Reservation]:
    return Call(
        method="POST",
        path=_path("reservations", order_id, "release"),
        answers=Reservation,
        headers=_proof(token),
        as_buyer=token is None,
    )


def _proof(token: str | None) -> dict[str, str]:
    return {} if token is None else {"X-Reservation-Token": token}


def read(call: Call[A], response: httpx.Response) -> A:
    """The parsed response.

    Raises:
        Refused: the service refused the call.
        NoAnswer: the response is not this service's, but a proxy's page for instance.
    """
    try:
        if response.is_success:
            return msgspec.json.decode(response.content, type=call.answers)
        problem = msgspec.json.decode(response.content, type=_Problem)
        facts = msgspec.json.decode(response.content, type=dict[str, Any])
    except msgspec.MsgspecError as error:
        status_text = f"{call.method} {call.path}: status {response.status_code}"
        raise NoAnswer(f"{status_text}, not a response of this service") from error
    raise refusal(problem.code, response.status_code, problem.detail, facts)
