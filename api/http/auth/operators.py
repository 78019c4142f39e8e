"""Operators' identity: their own keys, or the admin API key with a name in `X-Operator`."""

import hmac
import math
import time
from typing import Final

import structlog

from api.http.auth.bearer import Connection, bearer_of
from api.http.auth.buyers import Buyers
from api.http.auth.client_address import ClientAddressResolver
from api.http.auth.operator_keys import OperatorKeys
from reservation.config.settings import Settings
from reservation.domain.errors import Forbidden, MalformedRequest, RateLimited, Unauthenticated
from reservation.domain.operators import (
    KEY_PREFIX,
    RIGHTS,
    Operator,
    Right,
    Role,
    digest_of_key,
    name_in_header,
)
from reservation.domain.rate_limit import Limiter, Rate

__all__ = ["Operators"]

log = structlog.get_logger(__name__)

#: Wrong operator keys from one address before it gets 429, and log lines about them.
_FAILED_SIGN_INS: Final = Rate(300, 60)
_SIGN_IN_LINES: Final = Rate(5, 1)
#: The holder of the admin API key.
_ADMIN: Final = Operator(role=Role.OWNER)


class Operators:
    """Authenticates operators, and checks the rights of their roles."""

    def __init__(
        self,
        settings: Settings,
        buyers: Buyers,
        peers: ClientAddressResolver,
        keys: OperatorKeys,
    ) -> None:
        # Digests have one length and are not chosen by the caller: no comparison shows a prefix.
        self._admin_digest = digest_of_key(settings.admin_api_key)
        self._name_required = settings.production
        self._buyers = buyers
        self._peers = peers
        self._failures = Limiter(_FAILED_SIGN_INS)
        self._lines = Limiter(_SIGN_IN_LINES)
        self.keys = keys

    async def admit(self, connection: Connection, right: Right) -> Operator:
        """The operator, if its role has the right.

        A valid key is accepted from any address, even one that has sent many wrong keys.

        Raises:
            Unauthenticated: no key, or an unknown or revoked one.
            RateLimited: too many wrong ones from this address.
            Forbidden: a role without the right, or a buyer's token.
            Unavailable: SQL does not answer, so a key cannot be checked.
        """
        given = bearer_of(connection) or ""
        operator = await self._operator_of(given)
        if operator is None:
            raise await self._refusal(connection, given)
        if right not in RIGHTS[operator.role]:
            raise Forbidden(
                f"The role {operator.role.value} lacks the right {right.value!r}.",
                role=operator.role.value,
                right=right.value,
            )
        return operator

    async def _operator_of(self, key: str) -> Operator | None:
        if hmac.compare_digest(digest_of_key(key), self._admin_digest):
            return _ADMIN
        return await self.keys.find(key) if key.startswith(KEY_PREFIX) else None

    async def _refusal(self, connection: Connection, given: str) -> Exception:
        try:
            await self._buyers.buyer(connection)
        except Unauthenticated:
            if given:
                self._count_failure(connection)
            return Unauthenticated("An operator's key is required.")
        return Forbidden("A buyer's token does not grant access to the operator endpoints.")

    def _count_failure(self, connection: Connection) -> None:
        address, now = self._peers.address(connection), time.monotonic()
        wait = self._failures.wait(address, now)
        if not self._lines.wait("", now):
            log.warning("operator_sign_in_failed", address=address, blocked=bool(wait))
        if wait:
            raise RateLimited(retryAfter=max(1, math.ceil(wait))) from None

    def name(self, connection: Connection, operator: Operator) -> str:
        """The operator's name, recorded with every change: the key's, or that of `X-Operator`.

        Raises:
            MalformedRequest: the header is required, and absent or malformed.
        """
        if operator.name is not None:
            return operator.name
        given = connection.headers.get("x-operator", "")
        if not given and not self._name_required:
            return "operator"
        name = name_in_header(given)
        if name is None:
            raise MalformedRequest(
                "X-Operator must be a name of 1 to 100 characters: printable ASCII, or UTF-8'' "
                "followed by percent-encoded UTF-8 (RFC 8187)."
            )
        return name
