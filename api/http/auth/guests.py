"""Guests: ids and tokens for buyers without an account at the shop."""

import math
import secrets
import time
from typing import Final

import jwt

from api.http.auth.jwt_claims import GUEST_AUDIENCE
from reservation.config.settings import Settings
from reservation.domain.errors import RateLimited
from reservation.domain.rate_limit import Limiter

__all__ = ["Guests", "new_guest_id"]

_GUEST_SECONDS: Final = 30 * 24 * 3600
#: 80 bits: among a thousand million guests the chance of a collision is one in a million.
_GUEST_ID_BYTES: Final = 10


def new_guest_id() -> str:
    """A guest's id: short, because three keys of each hold contain it, and not secret."""
    return f"g-{secrets.token_urlsafe(_GUEST_ID_BYTES)}"


class Guests:
    """Issues buyer tokens where the shop has none of its own."""

    def __init__(self, settings: Settings) -> None:
        self._secret = settings.jwt_secret
        self._limiter = Limiter(settings.guest_rate) if settings.guest_rate else None
        self.open = settings.auth == "guest"

    def new(self, address: str) -> tuple[str, str]:
        """A new buyer's id and token.

        Raises:
            RateLimited: too many from this address.
        """
        if self._limiter is not None:
            wait = self._limiter.wait(address, time.monotonic())
            if wait:
                raise RateLimited(retryAfter=max(1, math.ceil(wait)))
        buyer_id = new_guest_id()
        now = int(time.time())
        claims = {
            "sub": buyer_id,
            "iat": now,
            "exp": now + _GUEST_SECONDS,
            "aud": GUEST_AUDIENCE,
        }
        return buyer_id, jwt.encode(claims, self._secret, algorithm="HS256")
