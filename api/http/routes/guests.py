"""Guest sign-in: tokens for buyers without an account."""

from typing import Any

from litestar import Controller, Request, Response, post

from api.http.dependencies import api_of
from api.http.problem_details import documented
from api.http.schemas.base import ResponseModel
from reservation.domain.errors import RateLimited, ReservationNotFound

__all__ = ["GuestController"]


class GuestAnswer(ResponseModel, frozen=True, kw_only=True):
    """A buyer without an account."""

    buyer_id: str
    token: str


class GuestController(Controller):
    """Buyers without an account."""

    tags = ("Guests",)

    @post(
        "/v1/guests",
        operation_id="newGuest",
        responses=documented(ReservationNotFound, RateLimited),
    )
    async def new(self, request: Request[Any, Any, Any]) -> Response[GuestAnswer]:
        """A new buyer's id and token; only with `RESERVATION_AUTH=guest`."""
        api = api_of(request)
        if not api.guests.open:
            raise ReservationNotFound("Guest tokens are disabled; buyers sign in at the shop.")
        buyer_id, token = api.guests.new(api.peers.address(request))
        return Response(
            GuestAnswer(buyer_id=buyer_id, token=token),
            status_code=201,
            headers={"Cache-Control": "no-store"},
        )
