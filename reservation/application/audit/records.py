"""Record audit: every hash in Redis, field by field, against the hash that SQL would restore.

SQL lags Redis by a moment, and no two reads are of one instant. So a difference is read again. It
is a problem if it persists although both sides are at the same event of that order, or although SQL
has every event that Redis had at the first read.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import Final

import msgspec

from reservation.adapters.redis.audit_reader import AuditReader, OrderRecord
from reservation.adapters.redis.outbox import RedisOutbox
from reservation.adapters.redis.tombstones import TOMBSTONE_SEQ
from reservation.adapters.sql.orders import OrderRow
from reservation.adapters.sql.store import SqlStore
from reservation.application.audit.expected_records import (
    ENDED_KEPT_MS,
    has_payment_history,
    item_fields,
    order_fields,
    restock_fields,
    sale_fields,
    tombstone_of,
    with_codes,
)
from reservation.application.audit.orders import SET_OF
from reservation.domain.clock import Clock
from reservation.domain.errors import BrokenInvariant
from reservation.domain.events import Event
from reservation.domain.sale_settings import change_of
from reservation.domain.states import ENDED, LIVE, Status

__all__ = ["RecordAudit"]

#: Problems of one kind that are reported; the first ones suffice to find the cause.
PROBLEMS_MAX: Final = 20
#: Reads of a difference, and the pause between them: SQL is a fraction of a second behind; more is
#: reported as the lag.
COMPARISONS_MAX: Final = 40
READ_PAUSE_SECONDS: Final = 0.05
#: Orders of SQL compared at once.
PAGE_ORDERS: Final = 500
#: Entries of the outbox that are compared with SQL: all but one are trimmed soon.
KEPT_MAX: Final = 2_000
#: No lease is longer than this; a score far ahead would keep the settler away forever.
LEASE_MS_MAX: Final = 3_600_000
#: Fields of an order's hash that SQL does not have: the id of a call that may be retried.
_ONLY_IN_REDIS: Final = frozenset({"claim_id"})
#: The sale's fields that change with each event, which the comparison of heads and chains covers;
#: the creation time, which SQL sets an instant before Redis; and the worker's place in the events.
_NOT_COMPARED: Final = frozenset({"epoch", "seq", "chain", "created_at", TOMBSTONE_SEQ})
#: Maximum difference of those two instants: a call to Redis times out long before.
CREATED_MS_MAX: Final = 60_000

_Found = Mapping[str, str]


class _Comparison(msgspec.Struct, frozen=True):
    """The differences by subject, and the last event of each side."""

    problems: _Found
    #: The subjects that an event missing in SQL may explain.
    perhaps_late: Collection[str]
    redis_seq: int
    flushed_seq: int


class RecordAudit:
    """Audits the records of a sale."""

    def __init__(
        self, inspection: AuditReader, sql: SqlStore, outbox: RedisOutbox, *, clock: Clock
    ) -> None:
        self._inspection = inspection
        self._sql = sql
        self._outbox = outbox
        self._clock = clock

    async def compare(self, sale_id: str) -> tuple[str, ...]:
        """The differences, each in one sentence that names the key."""
        return (
            *await _persisting(lambda: self._compare_sale(sale_id)),
            *await self._orders(sale_id),
            *await self._kept_events(sale_id),
        )

    async def _compare_sale(self, sale_id: str) -> _Comparison:
        # Read before the rows, which are then at least as new.
        flushed = await self._flushed(sale_id)
        row = await self._sql.sales.get(sale_id)
        items = await self._sql.sales.list_items(sale_id)
        restocks = restock_fields(await self._sql.events.list_restocks(sale_id))
        found = await self._inspection.sale(sale_id, list(items))
        problems: dict[str, str] = {}
        if not found.listed:
            problems["list"] = (
                "the sale is missing in the set of all sales, so no worker processes it"
            )
        if row is not None and row.settings is not None:
            change, operator = change_of(row.settings)
            expected = sale_fields(row, change, operator, items)
            problems["sale"] = _difference("the sale", expected, found.sale, ignored=_NOT_COMPARED)
            created = found.sale.get("created_at")
            if abs(_number(created) - row.created_at_ms) > CREATED_MS_MAX:
                problems["created"] = (
                    f"the sale was created at {created}, in SQL at {row.created_at_ms}"
                )
        for sku, item in items.items():
            actual = {name: found.stocks[sku].get(name, "") for name in item_fields(item)}
            problems[sku] = _difference(f"{sku}", item_fields(item), actual)
        problems["operations"] = _difference("the applied operations", restocks, found.operations)
        return _Comparison(
            {key: problem for key, problem in problems.items() if problem},
            problems.keys(),
            _number(found.sale.get("seq")),
            flushed,
        )

    async def _flushed(self, sale_id: str) -> int:
        head = (await self._sql.sales.heads([sale_id])).get(sale_id)
        return head.seq if head else 0

    async def _orders(self, sale_id: str) -> list[str]:
        row = await self._sql.sales.get(sale_id)
        if row is None or row.settings is None:
            return []
        change, _ = change_of(row.settings)
        kept = self._clock.now_ms() < change.closes_at_ms + ENDED_KEPT_MS
        statuses = {*LIVE, Status.CONFIRMED, *(ENDED if kept else ())}
        problems: list[str] = []
        after = ""
        while rows := await self._sql.orders.scan(
            sale_id, statuses=statuses, after=after, limit=PAGE_ORDERS
        ):
            after = rows[-1].order_id
            different = (await self._compare(sale_id, rows, 0)).problems
            if different:
                problems += await _persisting(
                    lambda: self._compare_orders(sale_id, different)  # noqa: B023 - awaited here
                )
            if len(problems) >= PROBLEMS_MAX:
                break
        return problems[:PROBLEMS_MAX]

    async def _compare_orders(self, sale_id: str, order_ids: Collection[str]) -> _Comparison:
        # Read before the rows, which are then at least as new.
        flushed = await self._flushed(sale_id)
        rows = [await self._sql.orders.get(order_id) for order_id in order_ids]
        return await self._compare(sale_id, [row for row in rows if row is not None], flushed)

    async def _compare(self, sale_id: str, rows: Sequence[OrderRow], flushed: int) -> _Comparison:
        events_by_order = await self._sql.events.list_payment_events(
            [row.order_id for row in rows if has_payment_history(row)]
        )
        records = await self._inspection.records(
            sale_id,
            {row.order_id: (row.buyer_id, SET_OF.get(Status(row.status), "")) for row in rows},
        )
        # Read after the records: none of them is newer.
        head = await self._inspection.sale(sale_id, [])
        now_ms = self._clock.now_ms()
        problems = {
            row.order_id: problem
            for row in rows
            if (
                problem := _order_difference(
                    row, events_by_order.get(row.order_id, ()), records[row.order_id], now_ms=now_ms
                )
            )
        }
        late = {
            row.order_id
            for row in rows
            if (fields := records[row.order_id].fields) and fields.get("seq") != str(row.seq)
        }
        return _Comparison(problems, late, _number(head.sale.get("seq")), flushed)

    async def _kept_events(self, sale_id: str) -> list[str]:
        """Outbox entries that differ from SQL's copy."""
        flushed = await self._flushed(sale_id)
        try:
            outbox = await self._outbox.after(sale_id, 0, KEPT_MAX)
        except BrokenInvariant as error:
            return [str(error)]
        kept = [event for event in outbox if event.seq <= flushed]
        if not kept:
            return []
        written = await self._sql.events.list_after(sale_id, kept[0].seq - 1, len(kept))
        in_sql = {event.seq: event for event in written}
        return [
            f"event {event.seq} in the outbox differs from SQL"
            for event in kept
            if in_sql.get(event.seq) != event
        ][:PROBLEMS_MAX]


async def _persisting(compare_once: Callable[[], Awaitable[_Comparison]]) -> list[str]:
    """The differences that persist and cannot be explained by the lag."""
    first = await compare_once()
    open_problems = dict(first.problems)
    certain: dict[str, str] = {}
    for _ in range(COMPARISONS_MAX):
        if not open_problems:
            break
        await asyncio.sleep(READ_PAUSE_SECONDS)
        again = await compare_once()
        open_problems = {
            key: problem
            for key, problem in open_problems.items()
            if again.problems.get(key) == problem
        }
        caught_up = again.flushed_seq >= first.redis_seq
        certain |= {
            key: problem
            for key, problem in open_problems.items()
            if caught_up or key not in again.perhaps_late
        }
        open_problems = {
            key: problem for key, problem in open_problems.items() if key not in certain
        }
    return list(certain.values())


def _order_difference(
    row: OrderRow, payment_events: Sequence[Event], record: OrderRecord, *, now_ms: int
) -> str:
    """The difference between an order in Redis and in SQL; empty if there is none."""
    subject = f"order {row.order_id} (event {row.seq})"
    if record.tombstone is not None:
        return _tombstone_difference(subject, row, record)
    if not record.fields:
        return f"{subject} is {row.status} in SQL and missing in Redis"
    fields = with_codes(record.fields)
    different = _difference(
        subject, order_fields(row, payment_events), fields, ignored=_ONLY_IN_REDIS
    )
    if different:
        return different
    # `orders.py` checks whether it is in its set at all.
    place = SET_OF.get(Status(row.status), "")
    if place == "confirming":
        # A pause has a fraction.
        if _number((record.score or "").partition(".")[0]) > now_ms + LEASE_MS_MAX:
            return f"{subject} has a lease until {record.score}, beyond the longest lease"
    elif place:
        due = row.expires_at_ms if place == "deadlines" else row.due_at_ms or row.expires_at_ms
        if record.score not in (None, str(due)):
            return f"{subject} is in {place} with score {record.score}, expected {due}"
    if record.listed != str(row.created_at_ms):
        return (
            f"{subject} is in its buyer's list with score {record.listed}, expected "
            f"{row.created_at_ms}"
        )
    return ""


def _tombstone_difference(subject: str, row: OrderRow, record: OrderRecord) -> str:
    if record.fields:
        return f"{subject} is in Redis twice, as an order and as a tombstone"
    expected = tombstone_of(row)
    if expected is None or record.tombstone != expected.text:
        return f"{subject} is {row.status} in SQL, its tombstone is {record.tombstone!r}"
    if record.listed is not None:
        return f"{subject} has a tombstone and is still in its buyer's list"
    return ""


def _difference(
    subject: str,
    expected: Mapping[str, str],
    actual: Mapping[str, str],
    *,
    ignored: Collection[str] = (),
) -> str:
    """The fields in which two hashes differ, in one sentence; empty if there are none."""
    names = sorted((expected.keys() | actual.keys()) - set(ignored))
    wrong = [
        f"{name} is {actual.get(name, 'absent')!r}, SQL has {expected.get(name, 'none')!r}"
        for name in names
        if expected.get(name) != actual.get(name)
    ]
    return f"{subject}: {'; '.join(wrong)}" if wrong else ""


def _number(text: str | None) -> int:
    """A whole number; 0 if the text is not one."""
    return int(text) if text and text.isascii() and text.isdigit() else 0
