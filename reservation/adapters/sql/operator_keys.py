"""Operators' keys in SQL: their names, roles and hashes, never the keys themselves."""

from typing import Final

import msgspec
from sqlalchemy import func, select, tuple_, update

from reservation.adapters.sql.engine import Database
from reservation.adapters.sql.paging import PAGE_MAX, cursor_of, place_of
from reservation.adapters.sql.tables import operator_keys

__all__ = ["KEYS_MAX", "OperatorKeyRecord", "OperatorKeyRepository"]

#: Keys that are valid at one time: every API process has all of them in memory.
KEYS_MAX: Final = 500


class OperatorKeyRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A key as SQL has it."""

    key_id: str
    name: str
    role: str
    #: The SHA-256 of the key, in hex.
    digest: str
    #: The last characters of the key.
    hint: str
    created_by: str
    #: Why it was created; empty if no reason was given.
    reason: str
    created_at_ms: int
    #: The members of its revocation; None while it is valid.
    revoked_at_ms: int | None = None
    revoked_by: str | None = None
    revoked_reason: str | None = None


_COLUMNS = [operator_keys.c[name] for name in OperatorKeyRecord.__struct_fields__]


class OperatorKeyRepository:
    """Stores operators' keys."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, record: OperatorKeyRecord) -> bool:
        """Add a key; false if `KEYS_MAX` keys are valid already. A repeat fails: it has no key."""
        async with self._database.write() as connection:
            valid = await connection.execute(
                select(func.count()).where(operator_keys.c.revoked_at_ms.is_(None))
            )
            if valid.scalar_one() >= KEYS_MAX:
                return False
            await connection.execute(
                operator_keys.insert().values(**msgspec.structs.asdict(record))
            )
            return True

    async def revoke(
        self, key_id: str, *, operator: str, reason: str, now_ms: int
    ) -> OperatorKeyRecord | None:
        """Revoke a key, and return it; None if there is none. A revoked key stays as it is."""
        of_key = operator_keys.c.key_id == key_id
        async with self._database.write() as connection:
            await connection.execute(
                update(operator_keys)
                .where(of_key, operator_keys.c.revoked_at_ms.is_(None))
                .values(revoked_at_ms=now_ms, revoked_by=operator, revoked_reason=reason)
            )
            found = await connection.execute(select(*_COLUMNS).where(of_key))
            row = found.mappings().one_or_none()
            return OperatorKeyRecord(**row) if row else None

    async def list_valid(self) -> list[OperatorKeyRecord]:
        """All keys that are not revoked."""
        async with self._database.read() as connection:
            found = await connection.execute(
                select(*_COLUMNS).where(operator_keys.c.revoked_at_ms.is_(None)).limit(KEYS_MAX)
            )
            return [OperatorKeyRecord(**row) for row in found.mappings()]

    async def page(
        self, *, cursor: str | None = None, limit: int = PAGE_MAX
    ) -> tuple[list[OperatorKeyRecord], str | None]:
        """A page of keys, newest first, and the cursor of the next one; None at the end.

        Raises:
            ValueError: the cursor is invalid.
        """
        limit = max(1, min(limit, PAGE_MAX))
        place = (operator_keys.c.created_at_ms, operator_keys.c.key_id)
        wanted = select(*_COLUMNS).limit(limit + 1).order_by(*(column.desc() for column in place))
        if cursor is not None:
            wanted = wanted.where(tuple_(*place) < tuple_(*place_of(cursor)))
        async with self._database.read() as connection:
            rows = (await connection.execute(wanted)).mappings()
            found = [OperatorKeyRecord(**row) for row in rows]
        page = found[:limit]
        more = len(found) > limit
        return page, cursor_of(page[-1].created_at_ms, page[-1].key_id) if more else None
