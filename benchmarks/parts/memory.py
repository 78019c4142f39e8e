"""Memory in Redis of one open hold, key by key, and of its tombstone, once SQL has the events."""

import asyncio
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from api.http.auth.guests import new_guest_id
from benchmarks.support.in_process import service_alone
from benchmarks.support.run import Goal, Run, Section
from benchmarks.support.sale import PRICE, SALE_ID, SKU
from reservation.adapters.redis.tombstones import TombstoneStore
from reservation.application.reservations.prepare import wish_of
from reservation.application.retention.tombstones import TombstoneRounds
from reservation.bootstrap import Service
from reservation.domain.payment import Cause, Reason
from reservation.workers.flusher import TRIM_SECONDS, Flusher

__all__ = ["measure"]

_HOLDS: Final = 100_000
_HOLDS_QUICK: Final = 2_000
#: Concurrent prepares: the queue makes full batches of them.
_AT_ONCE: Final = 1_000
#: Sampled keys of each kind.
_SAMPLE: Final = 500
_BYTES_WANTED: Final = 600
_TOMBSTONE_BYTES_WANTED: Final = 120
#: No order waits for its tombstone here.
_BEFORE_THE_DEADLINE_MS: Final = -24 * 3_600_000
#: The rate's keys live 50 ms: they are not part of an open hold.
_RATE_SECONDS: Final = 1.0
#: In KEYS of one sale, the prefixes of the kinds that each hold has of its own.
_PER_HOLD: Final = ("order", "buyer", "buyer-orders")


class Breakdown(msgspec.Struct, frozen=True):
    """Bytes of one hold."""

    holds: int
    #: The total growth of the server's memory.
    total: float
    by_key: dict[str, float]
    #: The growth of the server's data per order, once all of them have tombstones.
    tombstone: float
    #: The server's overhead on top of the values: its tables of keys, and the allocator's rounding.
    rest: float


def measure(run: Run) -> Section:
    """Through the service itself, so that it writes each key."""
    return _section(asyncio.run(_measure(run)))


async def _measure(run: Run) -> Breakdown:
    count = _HOLDS_QUICK if run.quick else _HOLDS
    async with service_alone(run.home / "memory", stock=count * 2) as (service, _):
        # The first orders create the shared parts: the scripts, the tables, the outbox's group.
        await _hold(service, 1)
        await _replace_all(service)
        data_before = await _used(service, "used_memory_dataset")
        await _hold(service, _AT_ONCE)
        await _flush(service)
        before = await _used(service)
        await _hold(service, count)
        run.say(f"memory  {count:,} holds taken")
        await _flush(service)
        await asyncio.sleep(_RATE_SECONDS)
        total = (await _used(service) - before) / count
        by_key = await _by_key(service, count + _AT_ONCE)
        await _replace_all(service)
        run.say("memory  all orders replaced by tombstones")
        data = await _used(service, "used_memory_dataset")
        tombstone = (data - data_before) / (count + _AT_ONCE)
    return Breakdown(count, total, by_key, tombstone, total - sum(by_key.values()))


async def _hold(service: Service, count: int) -> None:
    known = await service.catalog.get(SALE_ID)
    wish = wish_of(known.sale, [(SKU, 1)], PRICE)
    for first in range(0, count, _AT_ONCE):
        buyers = [new_guest_id() for _ in range(min(_AT_ONCE, count - first))]
        await asyncio.gather(
            *(service.preparation.prepare(known, buyer, "once", wish) for buyer in buyers)
        )


async def _flush(service: Service) -> None:
    flusher = Flusher(service.outbox, service.sql, on_alarm=_alarmed, on_flushed=lambda _: None)
    while (await flusher.run_once(SALE_ID)).flushed:
        continue
    # The flusher trims its entries only now and then; this is such a time.
    await asyncio.sleep(TRIM_SECONDS)
    await flusher.run_once(SALE_ID)


def _alarmed(name: str, **facts: object) -> None:
    raise RuntimeError(f"the flusher's alarm: {name} {facts}")


async def _replace_all(service: Service) -> None:
    """Release every hold, and replace the orders by tombstones at once."""
    epoch = (await service.catalog.get(SALE_ID)).epoch
    reason = Reason(Cause.BUYER)
    while held := await service.store.first_deadlines(SALE_ID, _AT_ONCE):
        orders = [one for one in await service.store.read_many(list(held)) if one]
        await asyncio.gather(
            *(service.store.release(order, epoch=epoch, reason=reason) for order in orders)
        )
    await _flush(service)
    store = TombstoneStore(service.connections, service.keys)
    rounds = TombstoneRounds(
        service.connections,
        store,
        service.sql,
        service.catalog,
        clock=service.clock,
        keep_ms=_BEFORE_THE_DEADLINE_MS,
    )
    seq, _ = await service.sql.events.cursor(SALE_ID)
    # A round that only passes other events replaces no order.
    while (await store.seqs([SALE_ID])).get(SALE_ID, 0) < seq:
        await rounds.run_once([SALE_ID], lambda _: seq)


async def _used(service: Service, name: str = "used_memory") -> int:
    [info] = await service.connections.pipeline([("INFO", "memory")])
    lines = info.splitlines() if isinstance(info, str) else [f"{k}:{v}" for k, v in info.items()]
    return next(int(line.split(":")[1]) for line in lines if line.startswith(f"{name}:"))


async def _by_key(service: Service, holds: int) -> dict[str, float]:
    keys = service.keys.of(SALE_ID)
    found: dict[str, float] = {}
    samples = await _sample(service)
    for kind, names in samples.items():
        sizes = await _sizes(service, names)
        found[kind] = sum(sizes) / len(sizes)
    [deadlines, outbox] = await _sizes(service, [keys.deadlines, keys.outbox])
    found["deadlines, its share"] = deadlines / holds
    found["outbox, its share"] = outbox / holds
    return found


async def _sample(service: Service) -> dict[str, list[str]]:
    """Some keys of each kind that every hold has."""
    prefix = service.keys.of(SALE_ID).all
    samples: dict[str, list[str]] = {}
    for kind in _PER_HOLD:
        cursor, names = "0", list[str]()
        while len(names) < _SAMPLE:
            command = ("SCAN", cursor, "MATCH", _glob(f"{prefix}{kind}:"), "COUNT", "1000")
            [(cursor, page)] = await service.connections.pipeline([command])
            names += page
            cursor = str(cursor)
            if cursor == "0":
                break
        if names:
            samples[kind] = names[:_SAMPLE]
    return samples


def _glob(prefix: str) -> str:
    return prefix.replace("[", "\\[") + "*"


async def _sizes(service: Service, names: Sequence[str]) -> list[int]:
    commands = [("MEMORY", "USAGE", name, "SAMPLES", "0") for name in names]
    replies: list[Any] = await service.connections.pipeline(commands)
    return [int(reply or 0) for reply in replies]


def _section(found: Breakdown) -> Section:
    rows = [[kind, f"{size:,.0f}"] for kind, size in found.by_key.items()]
    rows += [["everything else", f"{found.rest:,.0f}"], ["all", f"{found.total:,.0f}"]]
    rows.append(["its tombstone, all", f"{found.tombstone:,.0f}"])
    reached = found.total <= _BYTES_WANTED
    small = found.tombstone <= _TOMBSTONE_BYTES_WANTED
    return Section(
        title=f"Memory of one open hold in Redis, of {found.holds:,}, flushed",
        columns=["key", "bytes"],
        rows=rows,
        goals=[
            Goal(
                "memory of an open hold", f"{found.total:,.0f} B", f"<= {_BYTES_WANTED} B", reached
            ),
            Goal(
                "memory of a tombstone",
                f"{found.tombstone:,.0f} B",
                f"<= {_TOMBSTONE_BYTES_WANTED} B",
                small,
            ),
        ],
        data=found,
    )
