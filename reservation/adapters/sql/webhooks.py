"""Webhook endpoints and their deliveries in SQL.

endpoint   has a position in the event feed: up to it, its deliveries exist
lease      one process at a time sends to an endpoint, so the deliveries of an order keep order
delivery   pending, then delivered or failed; the log is bounded
"""

from collections.abc import Collection, Sequence
from typing import Any, Final

import msgspec
from sqlalchemy import (
    Connection,
    RowMapping,
    and_,
    bindparam,
    case,
    delete,
    insert,
    or_,
    select,
    update,
)

from reservation.adapters.sql.bulk import among, insert_into
from reservation.adapters.sql.engine import Database
from reservation.adapters.sql.tables import webhook_deliveries, webhook_endpoints
from reservation.adapters.sql.webhook_rows import (
    DeliveryResult,
    DeliveryRow,
    EndpointChange,
    EndpointRow,
    NewDelivery,
    PendingDelivery,
)

__all__ = ["WebhookRepository"]

#: Rows that one prune removes at most.
PRUNE_BATCH: Final = 1_000


_ENDPOINT: Final = [
    column
    for column in webhook_endpoints.columns
    if column.name not in ("lease_holder", "lease_until_ms")
]
_DELIVERY: Final = [webhook_deliveries.c[name] for name in DeliveryRow.__struct_fields__]
_PENDING: Final = [webhook_deliveries.c[name] for name in PendingDelivery.__struct_fields__]
_RECORD: Final = (
    update(webhook_deliveries)
    .where(webhook_deliveries.c.delivery_id == bindparam("new_delivery_id"))
    .values(
        {
            name: bindparam(f"new_{name}")
            for name in DeliveryResult.__struct_fields__
            if name != "delivery_id"
        }
    )
)


class WebhookRepository:
    """Stores endpoints, leases them, and keeps the log of their deliveries."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, row: EndpointRow) -> None:
        """Add an endpoint; a repeat changes nothing."""
        values = msgspec.structs.asdict(row)
        values["events_json"] = _events_json(values.pop("events"))

        def add(connection: Connection) -> None:
            statement = insert_into(connection.dialect.name, webhook_endpoints)
            connection.execute(statement.values(values).on_conflict_do_nothing())

        await self._database.run_write(add)

    async def get(self, endpoint_id: str) -> EndpointRow | None:
        """The endpoint, or None."""
        async with self._database.read() as connection:
            found = await connection.execute(
                select(*_ENDPOINT).where(webhook_endpoints.c.endpoint_id == endpoint_id)
            )
            row = found.mappings().one_or_none()
        return _endpoint(row) if row else None

    async def list_all(self) -> list[EndpointRow]:
        """All endpoints, oldest first."""
        async with self._database.read() as connection:
            found = await connection.execute(
                select(*_ENDPOINT).order_by(
                    webhook_endpoints.c.created_at_ms, webhook_endpoints.c.endpoint_id
                )
            )
            return [_endpoint(row) for row in found.mappings()]

    async def change(self, endpoint_id: str, change: EndpointChange, now_ms: int) -> bool:
        """Replace an operator's settings; False if there is no such endpoint.

        An endpoint that is enabled again has not failed yet, and its deliveries are due.
        """
        values = msgspec.structs.asdict(change)
        values["events_json"] = _events_json(values.pop("events"))
        if change.enabled:
            values |= {"disabled_reason": None, "failing_since_ms": None}

        def write(connection: Connection) -> bool:
            was_enabled = connection.execute(
                select(webhook_endpoints.c.enabled)
                .where(webhook_endpoints.c.endpoint_id == endpoint_id)
                .with_for_update()
            ).scalar_one_or_none()
            if was_enabled is None:
                return False
            connection.execute(
                update(webhook_endpoints)
                .where(webhook_endpoints.c.endpoint_id == endpoint_id)
                .values(**values, updated_at_ms=now_ms)
            )
            if change.enabled and not was_enabled:
                _make_due(connection, endpoint_id, now_ms)
            return True

        return await self._database.run_write(write)

    async def rotate(self, endpoint_id: str, *, secret: str, until_ms: int, now_ms: int) -> bool:
        """Replace the secret; the one that receivers have signs too until that instant.

        A second rotation within that time leaves the first secret in place: the one between may
        never have arrived, if a response was lost and the call repeated.
        """
        has_old = webhook_endpoints.c.old_secret_until_ms > now_ms
        async with self._database.write() as connection:
            changed = await connection.execute(
                update(webhook_endpoints)
                .where(
                    webhook_endpoints.c.endpoint_id == endpoint_id,
                    webhook_endpoints.c.secret != secret,
                )
                .values(
                    old_secret=case(
                        (has_old, webhook_endpoints.c.old_secret), else_=webhook_endpoints.c.secret
                    ),
                    old_secret_until_ms=until_ms,
                    secret=secret,
                    updated_at_ms=now_ms,
                )
            )
        return changed.rowcount > 0

    async def remove(self, endpoint_id: str) -> bool:
        """Remove an endpoint with its log; False if there is none."""

        def remove(connection: Connection) -> bool:
            # A fan-out locks the endpoint first as well.
            connection.execute(
                select(webhook_endpoints.c.endpoint_id)
                .where(webhook_endpoints.c.endpoint_id == endpoint_id)
                .with_for_update()
            )
            connection.execute(
                delete(webhook_deliveries).where(webhook_deliveries.c.endpoint_id == endpoint_id)
            )
            removed = connection.execute(
                delete(webhook_endpoints).where(webhook_endpoints.c.endpoint_id == endpoint_id)
            )
            return removed.rowcount > 0

        return await self._database.run_write(remove)

    async def disable(self, endpoint_id: str, reason: str, now_ms: int) -> None:
        """Disable an endpoint; its pending deliveries wait until an operator enables it."""
        async with self._database.write() as connection:
            await connection.execute(
                update(webhook_endpoints)
                .where(webhook_endpoints.c.endpoint_id == endpoint_id)
                .values(enabled=False, disabled_reason=reason, updated_at_ms=now_ms)
            )

    async def replay(self, endpoint_id: str, after: int) -> bool:
        """Deliver all events with a higher id again; False if there is no such endpoint.

        Pending deliveries of these events are dropped, because they are made again.
        """

        def write(connection: Connection) -> bool:
            # The endpoint first, as in `fan_out`: an operator and a worker cannot deadlock.
            changed = connection.execute(
                update(webhook_endpoints)
                .where(webhook_endpoints.c.endpoint_id == endpoint_id)
                .values(
                    position=case(
                        (webhook_endpoints.c.position > after, after),
                        else_=webhook_endpoints.c.position,
                    )
                )
            )
            connection.execute(
                delete(webhook_deliveries).where(
                    webhook_deliveries.c.endpoint_id == endpoint_id,
                    webhook_deliveries.c.status == "pending",
                    webhook_deliveries.c.event_id > after,
                )
            )
            return changed.rowcount > 0

        return await self._database.run_write(write)

    async def lease(
        self, endpoint_ids: Collection[str], *, holder: str, now_ms: int, until_ms: int
    ) -> list[str]:
        """Take or renew the leases of enabled endpoints; those that this process has now."""
        if not endpoint_ids:
            return []

        def write(connection: Connection) -> list[str]:
            mine = and_(
                among(connection, webhook_endpoints.c.endpoint_id, list(endpoint_ids)),
                webhook_endpoints.c.enabled,
            )
            connection.execute(
                update(webhook_endpoints)
                .where(
                    mine,
                    or_(
                        webhook_endpoints.c.lease_holder == holder,
                        webhook_endpoints.c.lease_until_ms <= now_ms,
                    ),
                )
                .values(lease_holder=holder, lease_until_ms=until_ms)
            )
            found = connection.execute(
                select(webhook_endpoints.c.endpoint_id).where(
                    mine,
                    webhook_endpoints.c.lease_holder == holder,
                    webhook_endpoints.c.lease_until_ms == until_ms,
                )
            )
            return list(found.scalars())

        return await self._database.run_write(write)

    async def release(self, endpoint_ids: Collection[str], *, holder: str) -> None:
        """Give up leases, so that another process need not wait for their end."""
        if not endpoint_ids:
            return
        async with self._database.write() as connection:
            await connection.execute(
                update(webhook_endpoints)
                .where(
                    among(connection, webhook_endpoints.c.endpoint_id, list(endpoint_ids)),
                    webhook_endpoints.c.lease_holder == holder,
                )
                .values(lease_until_ms=0)
            )

    async def fan_out(
        self,
        endpoint_id: str,
        *,
        holder: str,
        position: int,
        to: int,
        added: Sequence[NewDelivery],
        now_ms: int,
    ) -> bool:
        """Add deliveries and move the endpoint's position; False if that has changed meanwhile."""
        rows = [
            {
                **msgspec.structs.asdict(one),
                "endpoint_id": endpoint_id,
                "status": "pending",
                "created_at_ms": now_ms,
                "next_at_ms": now_ms,
            }
            for one in added
        ]

        def write(connection: Connection) -> bool:
            moved = connection.execute(
                update(webhook_endpoints)
                .where(
                    webhook_endpoints.c.endpoint_id == endpoint_id,
                    webhook_endpoints.c.position == position,
                    webhook_endpoints.c.lease_holder == holder,
                )
                .values(position=to)
            )
            if moved.rowcount and rows:
                connection.execute(insert(webhook_deliveries), rows)
            return moved.rowcount > 0

        return await self._database.run_write(write)

    async def add_test(self, endpoint_id: str, added: NewDelivery, now_ms: int) -> DeliveryRow:
        """Add a delivery that belongs to no event."""
        values = {
            **msgspec.structs.asdict(added),
            "endpoint_id": endpoint_id,
            "status": "pending",
            "created_at_ms": now_ms,
            "next_at_ms": now_ms,
        }

        def write(connection: Connection) -> DeliveryRow:
            connection.execute(insert(webhook_deliveries).values(values))
            found = connection.execute(
                select(*_DELIVERY).where(
                    webhook_deliveries.c.endpoint_id == endpoint_id,
                    webhook_deliveries.c.message_id == added.message_id,
                )
            )
            return DeliveryRow(**found.mappings().one())

        return await self._database.run_write(write)

    async def list_pending(self, endpoint_id: str, limit: int) -> list[PendingDelivery]:
        """The pending deliveries in the order of their events."""
        async with self._database.read() as connection:
            found = await connection.execute(
                select(*_PENDING)
                .where(
                    webhook_deliveries.c.endpoint_id == endpoint_id,
                    webhook_deliveries.c.status == "pending",
                )
                .order_by(webhook_deliveries.c.event_id, webhook_deliveries.c.delivery_id)
                .limit(limit)
            )
            return [PendingDelivery(**row) for row in found.mappings()]

    async def record(
        self,
        endpoint_id: str,
        results: Sequence[DeliveryResult],
        *,
        failing_since_ms: int | None,
    ) -> None:
        """Store the results of attempts, and since when the endpoint has failed.

        A success leaves the other deliveries to their schedule: a receiver may refuse the webhooks
        of one order only, and each success would cost that order an attempt.
        """
        rows = [
            {f"new_{name}": value for name, value in msgspec.structs.asdict(result).items()}
            for result in results
        ]

        def write(connection: Connection) -> None:
            endpoint = connection.execute(
                select(webhook_endpoints.c.failing_since_ms)
                .where(webhook_endpoints.c.endpoint_id == endpoint_id)
                .with_for_update()
            ).one_or_none()
            if endpoint is None:
                return
            if rows:
                connection.execute(_RECORD, rows)
            if endpoint.failing_since_ms == failing_since_ms:
                return
            connection.execute(
                update(webhook_endpoints)
                .where(webhook_endpoints.c.endpoint_id == endpoint_id)
                .values(failing_since_ms=failing_since_ms)
            )

        await self._database.run_write(write)

    async def page(
        self, endpoint_id: str, *, status: str | None, before: int | None, limit: int
    ) -> list[DeliveryRow]:
        """Deliveries of an endpoint, newest first, with a lower id than `before`."""
        wanted = select(*_DELIVERY).where(webhook_deliveries.c.endpoint_id == endpoint_id)
        if status is not None:
            wanted = wanted.where(webhook_deliveries.c.status == status)
        if before is not None:
            wanted = wanted.where(webhook_deliveries.c.delivery_id < before)
        async with self._database.read() as connection:
            found = await connection.execute(
                wanted.order_by(webhook_deliveries.c.delivery_id.desc()).limit(limit)
            )
            return [DeliveryRow(**row) for row in found.mappings()]

    async def delivery(self, delivery_id: int) -> DeliveryRow | None:
        """The delivery, or None."""
        async with self._database.read() as connection:
            found = await connection.execute(
                select(*_DELIVERY).where(webhook_deliveries.c.delivery_id == delivery_id)
            )
            row = found.mappings().one_or_none()
        return DeliveryRow(**row) if row else None

    async def resend(self, delivery_id: int, now_ms: int) -> DeliveryRow | None:
        """Make a delivery pending and due, with all its attempts ahead; None if there is none."""

        def write(connection: Connection) -> DeliveryRow | None:
            connection.execute(
                update(webhook_deliveries)
                .where(webhook_deliveries.c.delivery_id == delivery_id)
                .values(status="pending", attempts=0, next_at_ms=now_ms)
            )
            found = connection.execute(
                select(*_DELIVERY).where(webhook_deliveries.c.delivery_id == delivery_id)
            )
            row = found.mappings().one_or_none()
            return DeliveryRow(**row) if row else None

        return await self._database.run_write(write)

    async def prune(self, endpoint_id: str, *, before_ms: int, keep: int) -> int:
        """Remove ended deliveries that are older, or beyond the newest `keep`; how many.

        A call removes a bounded number; repeat it while it removes some.
        """
        ended = and_(
            webhook_deliveries.c.endpoint_id == endpoint_id,
            webhook_deliveries.c.status != "pending",
        )

        def write(connection: Connection) -> int:
            oldest_kept = connection.execute(
                select(webhook_deliveries.c.delivery_id)
                .where(ended)
                .order_by(webhook_deliveries.c.delivery_id.desc())
                .limit(1)
                .offset(keep)
            ).scalar_one_or_none()
            found = connection.execute(
                select(webhook_deliveries.c.delivery_id)
                .where(
                    ended,
                    or_(
                        webhook_deliveries.c.created_at_ms < before_ms,
                        webhook_deliveries.c.delivery_id <= (oldest_kept or 0),
                    ),
                )
                .order_by(webhook_deliveries.c.delivery_id)
                .limit(PRUNE_BATCH)
            )
            ids = list(found.scalars())
            if ids:
                connection.execute(
                    delete(webhook_deliveries).where(webhook_deliveries.c.delivery_id.in_(ids))
                )
            return len(ids)

        return await self._database.run_write(write)


def _make_due(connection: Connection, endpoint_id: str, now_ms: int) -> None:
    connection.execute(
        update(webhook_deliveries)
        .where(
            webhook_deliveries.c.endpoint_id == endpoint_id,
            webhook_deliveries.c.status == "pending",
            webhook_deliveries.c.next_at_ms > now_ms,
        )
        .values(next_at_ms=now_ms)
    )


def _events_json(events: Sequence[str]) -> str:
    return msgspec.json.encode(list(events)).decode()


def _endpoint(row: RowMapping) -> EndpointRow:
    values: dict[str, Any] = dict(row)
    values["events"] = msgspec.json.decode(values.pop("events_json"), type=tuple[str, ...])
    return EndpointRow(**values)
