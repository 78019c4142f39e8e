"""Faults around Redis: our own processes, SQL, the PG, and operators' actions meanwhile."""

import asyncio
import random
import signal
import sqlite3
from contextlib import closing, suppress
from functools import partial

import asyncpg
import httpx

from reservation.sandbox.faults import Fault as PgFault
from tests.faults.chaos.environment import Stage, new_key, signal_all
from tests.faults.chaos.fault import Fault

__all__ = ["AROUND_FAULTS", "PROCESS_FAULTS", "UPGRADE_FAULTS"]

#: Operators' calls: they may meet any fault, and retry.
OPERATOR_TRIES = 5


async def kill(role: str, stage: Stage, _: random.Random) -> str:
    """SIGKILL to every process of this role; the supervisor starts others."""
    killed = signal_all(stage.parts(role), signal.SIGKILL)
    return f"{killed} processes" if killed else ""


async def freeze(role: str, stage: Stage, chance: random.Random) -> str:
    """SIGSTOP to one or all of this role, and later SIGCONT."""
    parts = stage.parts(role)
    chosen = chance.choice([parts[:1], parts])
    seconds = chance.choice([0.3, 1.0, 4.0])
    frozen = signal_all(chosen, signal.SIGSTOP)
    try:
        await asyncio.sleep(seconds)
    finally:
        signal_all(chosen, signal.SIGCONT)
    return f"{frozen} for {seconds} s" if frozen else ""


async def deploy(stage: Stage, _: random.Random) -> str:
    """SIGTERM to the supervisor under load, and a new start."""
    await stage.stop_service()
    return f"stopped and {await stage.start_service()}"


async def kill_supervisor(stage: Stage, _: random.Random) -> str:
    """SIGKILL to the supervisor: all its processes go with it."""
    await stage.stop_service(kill=True)
    return f"killed and {await stage.start_service()}"


async def lock_sql(stage: Stage, chance: random.Random) -> str:
    """Another writer holds a lock and does not release it: SQLite's, or that of the orders."""
    seconds = chance.choice([0.3, 2.0, 7.0])
    if url := stage.settings.database_url:
        try:
            connection = await asyncpg.connect(url)
            try:
                async with connection.transaction():
                    await connection.execute("LOCK TABLE orders IN EXCLUSIVE MODE")
                    await asyncio.sleep(seconds)
            finally:
                await connection.close()
        except (
            asyncpg.PostgresError,
            asyncpg.InterfaceError,
            asyncpg.InternalClientError,
            OSError,
        ):
            # Another fault has taken SQL away, and with it the lock.
            return ""
        return f"{seconds} s"

    def hold() -> sqlite3.Connection:
        file = stage.settings.data_dir / "orders.sqlite3"
        connection = sqlite3.connect(file, timeout=10, check_same_thread=False)
        connection.execute("BEGIN IMMEDIATE")
        return connection

    with closing(await asyncio.to_thread(hold)) as connection:
        await asyncio.sleep(seconds)
        connection.rollback()
    return f"{seconds} s"


async def pg_in_trouble(fault: PgFault, stage: Stage, chance: random.Random) -> str:
    """The PG has this fault in some of its calls for a while."""
    seconds = chance.uniform(2, 5)
    wish = {
        "fault": fault.value,
        "operations": chance.choice([["confirm"], ["confirm", "look_up"], ["confirm", "cancel"]]),
        "rate": chance.choice([0.2, 0.5, 1.0]),
        "seed": chance.getrandbits(31),
        "seconds": chance.choice([0.5, 5.0, 75.0]),
    }
    try:
        number = (await stage.ask_pg("POST", "/_faults", json=wish))["id"]
        await asyncio.sleep(seconds)
        rules = (await stage.ask_pg("GET", "/_faults"))["faults"]
        await stage.ask_pg("POST", "/_faults", json={"clear": True})
    except httpx.HTTPError:
        # The sandbox was killed meanwhile, and has forgotten its faults.
        return "cut short"
    met = next((rule["applied"] for rule in rules if rule["id"] == number), 0)
    return f"{met} calls in {seconds:.1f} s"


async def restock(stage: Stage, chance: random.Random) -> str:
    """More units, in the middle of the sale."""
    sku, delta = chance.choice("abc"), chance.choice([1, 5, 40])
    body = {"sku": sku, "delta": delta, "reason": "more came"}
    path = f"/v1/admin/sales/{stage.sale_id}/stock"
    return await _repeat(stage, path, body, f"{delta} of {sku}")


async def pause_sale(stage: Stage, chance: random.Random) -> str:
    """The sale is paused and resumed."""
    sale, seconds = stage.sale_id, chance.uniform(0.2, 1.5)
    effect = await _repeat(stage, f"/v1/admin/sales/{sale}/pause", {"reason": "a look"}, "paused")
    await asyncio.sleep(seconds)
    await _repeat(stage, f"/v1/admin/sales/{sale}/resume", {"reason": "all is well"}, "resumed")
    return f"{effect} for {seconds:.1f} s"


async def refund(stage: Stage, chance: random.Random) -> str:
    """Some sold orders are refunded, with or without restock."""
    try:
        query = {"saleId": stage.sale_id, "status": "CONFIRMED", "limit": "20"}
        found = await stage.operate("GET", "/v1/admin/orders", params=query)
    except httpx.HTTPError:
        return ""
    orders = found.json().get("orders", []) if found.status_code == 200 else []
    chosen = chance.sample(orders, min(len(orders), 3))
    for order in chosen:
        body = {"reason": "broken", "restock": chance.random() < 0.5}
        await _repeat(stage, f"/v1/admin/orders/{order['orderId']}/refund", body, "")
    return f"{len(chosen)} orders" if chosen else ""


async def _repeat(stage: Stage, path: str, body: dict[str, object], effect: str) -> str:
    headers = {"Idempotency-Key": new_key()}
    status = 0
    for _ in range(OPERATOR_TRIES):
        with suppress(httpx.HTTPError):
            status = (await stage.operate("POST", path, json=body, headers=headers)).status_code
        if status not in {0, 503}:
            break
        await asyncio.sleep(0.5)
    return f"{effect} ({status})".strip()


#: They exclude those of Redis: a start of the service needs a running Redis.
PROCESS_FAULTS = (
    Fault("the api is killed", 8, partial(kill, "api")),
    Fault("the api is frozen", 6, partial(freeze, "api")),
    Fault("the worker is killed", 8, partial(kill, "worker")),
    Fault("the worker is frozen", 6, partial(freeze, "worker")),
    Fault("the PG is killed", 5, partial(kill, "sandbox")),
    Fault("the PG is frozen", 4, partial(freeze, "sandbox")),
    Fault("everything is deployed anew", 2, deploy),
    Fault("the supervisor is killed", 2, kill_supervisor),
)

#: Where a released version runs beside the working tree.
UPGRADE_FAULTS = (Fault("a version is deployed", 80, deploy),)

AROUND_FAULTS = (
    Fault("SQL is locked", 16, lock_sql),
    Fault("an operator restocks", 4, restock),
    Fault("an operator pauses the sale", 3, pause_sale),
    Fault("an operator refunds", 8, refund),
    *(Fault(f"the PG: {one.value}", 4, partial(pg_in_trouble, one)) for one in PgFault),
)
