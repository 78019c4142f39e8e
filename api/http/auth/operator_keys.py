"""Operators' keys: found by their hash in a copy of SQL's valid keys that is seconds old."""

import asyncio
import secrets
import time
from collections.abc import Callable, Mapping
from typing import Final

import structlog
from sqlalchemy.exc import SQLAlchemyError

from reservation.adapters.sql.errors import reason_of
from reservation.adapters.sql.operator_keys import OperatorKeyRecord, OperatorKeyRepository
from reservation.domain.clock import Clock
from reservation.domain.errors import KeyNotFound, TooManyKeys, Unavailable
from reservation.domain.operators import Operator, Role, digest_of_key, new_key

__all__ = ["OperatorKeys"]

log = structlog.get_logger(__name__)

#: Age at which the copy is read again, and the least age at which an unknown key has it read again:
#: so a wrong key costs no query of its own.
FRESH_SECONDS: Final = 2.0
FRESH_FOR_UNKNOWN_SECONDS: Final = 0.5
#: Age at which no key is accepted any more: a revoked one must not stay valid while SQL is away.
STALE_SECONDS: Final = 5.0
#: Pause after a failed read.
RETRY_SECONDS: Final = 0.5
_READ_SECONDS_MAX: Final = 2.0
_ID_BYTES: Final = 6
_HINT_CHARS: Final = 4
_ROLES: Final = frozenset(Role)


class OperatorKeys:
    """Creates, revokes and finds operators' keys.

    Args:
        repository: of the keys.
        clock: for the times of changes.
        monotonic: a clock in seconds that never goes back.
    """

    def __init__(
        self,
        repository: OperatorKeyRepository,
        *,
        clock: Clock,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._repository = repository
        self._clock = clock
        self._monotonic = monotonic
        self._operators: Mapping[str, Operator] = {}
        #: When the read of the copy began.
        self._read_at = float("-inf")
        self._failed_at = float("-inf")
        self._lock = asyncio.Lock()

    async def find(self, key: str) -> Operator | None:
        """The operator of a valid key; None if the key is unknown or revoked.

        Raises:
            Unavailable: SQL has not answered for `STALE_SECONDS`.
        """
        digest = digest_of_key(key)
        await self._refresh(FRESH_SECONDS)
        found = self._operators.get(digest)
        if found is None:
            # Another process may have created it just now.
            await self._refresh(FRESH_FOR_UNKNOWN_SECONDS)
            found = self._operators.get(digest)
        return found

    async def create(
        self, *, name: str, role: Role, reason: str, operator: str
    ) -> tuple[OperatorKeyRecord, str]:
        """Create a key; returns its record and the key, which is stored nowhere.

        Raises:
            TooManyKeys: too many keys are valid.
        """
        key = new_key()
        record = OperatorKeyRecord(
            key_id=f"k-{secrets.token_hex(_ID_BYTES)}",
            name=name,
            role=role.value,
            digest=digest_of_key(key),
            hint=key[-_HINT_CHARS:],
            created_by=operator,
            reason=reason,
            created_at_ms=self._clock.now_ms(),
        )
        if not await self._repository.add(record):
            raise TooManyKeys
        self._expire()
        log.info("operator_key_created", key_id=record.key_id, role=record.role, operator=operator)
        return record, key

    async def revoke(self, key_id: str, *, reason: str, operator: str) -> OperatorKeyRecord:
        """Revoke a key; a revoked one stays as it is.

        Raises:
            KeyNotFound: there is no such key.
        """
        revoked = await self._repository.revoke(
            key_id, operator=operator, reason=reason, now_ms=self._clock.now_ms()
        )
        if revoked is None:
            raise KeyNotFound
        self._expire()
        log.info("operator_key_revoked", key_id=key_id, operator=operator)
        return revoked

    def _expire(self) -> None:
        """Read the keys again before the next one is accepted."""
        self._read_at = float("-inf")

    async def _refresh(self, age_max: float) -> None:
        """Read the keys unless the copy is younger than this; one read at a time."""
        if self._age() < age_max:
            return
        async with self._lock:
            recently = self._monotonic() - self._failed_at < RETRY_SECONDS
            if self._age() >= age_max and not recently:
                await self._read()
        if self._age() >= STALE_SECONDS:
            raise Unavailable(
                "Operators' keys cannot be checked, because SQL does not answer.", retryAfter=1
            )

    async def _read(self) -> None:
        began = self._monotonic()
        try:
            async with asyncio.timeout(_READ_SECONDS_MAX):
                records = await self._repository.list_valid()
        except (SQLAlchemyError, OSError) as error:
            self._failed_at = self._monotonic()
            log.info("operator_keys_unread", reason=reason_of(error))
            return
        self._operators = {
            record.digest: Operator(role=Role(record.role), name=record.name)
            for record in records
            # A later version may have more roles; this one grants them nothing.
            if record.role in _ROLES
        }
        self._read_at = began

    def _age(self) -> float:
        return self._monotonic() - self._read_at
