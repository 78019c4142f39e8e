"""Wire schema of a guest buyer."""

from api.http.schemas.base import ResponseModel

__all__ = ["GuestAnswer"]


class GuestAnswer(ResponseModel, frozen=True, kw_only=True):
    """A buyer without an account."""

    buyer_id: str
    token: str
