"""Operators' identity: the admin key, and the name of the person in `X-Operator`."""

import hmac
import math
import re
import time
from typing import Final

import structlog

from api.http.auth.bearer import Connection, bearer_of
from api.http.auth.buyers import Buyers
from api.http.auth.client_address import ClientAddressResolver
from reservation.config.settings import Settings
from reservation.domain.errors import Forbidden, MalformedRequest, RateLimited, Unauthenticated
from reservation.domain.rate_limit import Limiter, Rate

__all__ = ["Operators"]

log = structlog.get_logger(__name__)

_OPERATOR = re.compile(r"[ -~]{1,100}")
#: Wrong operator keys from one address before it gets 429, and log lines about them.
_FAILED_SIGN_INS: Final = Rate(300, 60)
_SIGN_IN_LINES: Final = Rate(5, 1)


class Operators:
    """Authenticates operators by the admin key; `X-Operator` names the person."""

    def __init__(self, settings: Settings, buyers: Buyers, peers: ClientAddressResolver) -> None:
        self._key = settings.admin_api_key.encode()
        self._name_required = settings.production
        self._buyers = buyers
        self._peers = peers
        self._failures = Limiter(_FAILED_SIGN_INS)
        self._lines = Limiter(_SIGN_IN_LINES)

    async def check(self, connection: Connection) -> None:
        """Admit operators.

        The right key is accepted from any address, even one that has sent many wrong keys.

        Raises:
            Unauthenticated: no key, or a wrong one.
            RateLimited: too many wrong ones from this address.
            Forbidden: a buyer's token.
        """
        given = bearer_of(connection) or ""
        if hmac.compare_digest(given.encode(), self._key):
            return
        try:
            await self._buyers.buyer(connection)
        except Unauthenticated:
            if given:
                self._count_failure(connection)
            raise Unauthenticated("The admin API key is required.") from None
        raise Forbidden("A buyer's token does not grant access to the operator endpoints.")

    def _count_failure(self, connection: Connection) -> None:
        address, now = self._peers.address(connection), time.monotonic()
        wait = self._failures.wait(address, now)
        if not self._lines.wait("", now):
            log.warning("operator_sign_in_failed", address=address, blocked=bool(wait))
        if wait:
            raise RateLimited(retryAfter=max(1, math.ceil(wait))) from None

    def name(self, connection: Connection) -> str:
        """The operator's name, recorded with every change.

        Raises:
            MalformedRequest: absent in production, or malformed.
        """
        name = connection.headers.get("x-operator", "")
        if not name and not self._name_required:
            return "operator"
        if _OPERATOR.fullmatch(name) is None:
            raise MalformedRequest("X-Operator must be 1 to 100 printable ASCII characters.")
        return name
