"""CPU time of one hold in Python from its bytes to its answer's, without sockets and Redis.

python -m benchmarks.parts.path            by the fast path
python -m benchmarks.parts.path --route    by the framework's route: the difference is the gain

The protocol, the endpoint and the queue are the service's own; a stand-in for the store answers
each call at once as the script would. Next to `benchmarks.parts.steps`, which measures each step
alone, it shows the cost between them.
"""

import asyncio
import secrets
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, Final, cast

import hiredis
import uvicorn
import uvloop
from litestar import Litestar
from uvicorn.server import ServerState

from api.http.app import context_of, create_app
from api.http.connection.protocol import HttpProtocol
from api.http.fastpath.handler import FastPrepareHandler
from api.http.prepare_endpoint import PrepareEndpoint
from benchmarks.contenders.launcher import BUYERS_SECRET
from benchmarks.parts.steps import HELD, SALE, request_of
from benchmarks.support.sale import token_of
from reservation.application.sales.catalog import CachedSale
from reservation.bootstrap import Service, opened
from reservation.config.settings import Settings

__all__ = ["main"]

#: The concurrency of 64 connections: one half waits while the other is decided.
BATCH: Final = 32
BATCHES: Final = 64
ROUNDS: Final = 40


class Transport:
    """A connection that discards answers."""

    def write(self, _: bytes) -> None:
        return None

    def is_closing(self) -> bool:
        return False

    def pause_reading(self) -> None:
        return None

    def resume_reading(self) -> None:
        return None

    def get_extra_info(self, *_: object) -> None:
        return None


async def measure(data_dir: Path, *, fast_path: bool) -> list[float]:
    """Microseconds a hold, of each round."""
    environ = {
        "RESERVATION_DATA_DIR": str(data_dir),
        "RESERVATION_REDIS_URL": "redis://127.0.0.1:1",
        "RESERVATION_TOSS_API_URL": "http://127.0.0.1:1",
        "RESERVATION_AUTH": "jwt",
        "RESERVATION_JWT_SECRET": BUYERS_SECRET,
    }
    settings = Settings.load(environ, None)
    async with opened(settings) as service:
        _stub(service)
        application = create_app(settings)
        state = application.state
        state.api = api = context_of(settings, service)
        state.prepare_endpoint = endpoint = PrepareEndpoint(api)
        state.prepare_path = FastPrepareHandler(endpoint, None) if fast_path else None
        protocols = _protocols(application)
        return [await _round(protocols, number) for number in range(ROUNDS)]


def _stub(service: Service) -> None:
    known = CachedSale(SALE, SALE.epoch, 0.0)
    reader: Any = hiredis.Reader(encoding="utf-8")

    async def call(script: Any, keys: Sequence[str], args: Sequence[Any], **_: Any) -> Any:
        cast("Any", hiredis).pack_command(("EVALSHA", script.sha, len(keys), *keys, *args))
        count = int(args[12])
        reader.feed(b"*%d\r\n%b" % (count + 1, _HELD) + b":17\r\n" * count)
        await asyncio.sleep(0)
        return reader.gets()

    service.connections.call = call
    service.catalog.cached = lambda sale_id: known  # noqa: ARG005 - as the catalog calls it


def _reply(facts: Sequence[str | list[str]]) -> bytes:
    parts = [
        b"$%d\r\n%b\r\n" % (len(fact), fact.encode()) if isinstance(fact, str) else _reply(fact)
        for fact in facts
    ]
    return b"*%d\r\n" % len(parts) + b"".join(parts)


_HELD: Final = _reply(("held", *HELD))


def _protocols(application: Litestar) -> list[HttpProtocol]:
    config = uvicorn.Config(application, http=HttpProtocol, ws="none", log_config=None)
    config.load()
    config.loaded_app = cast("Any", application)
    state, made = ServerState(), list[HttpProtocol]()
    for _ in range(BATCH):
        protocol = HttpProtocol(config, state, {})
        protocol.connection_made(cast("Any", Transport()))
        made.append(protocol)
    return made


async def _round(protocols: list[HttpProtocol], number: int) -> float:
    """New buyers, each with a token that was not seen before."""
    buyers = [f"buyer-{number * BATCHES * BATCH + each:08d}" for each in range(BATCHES * BATCH)]
    requests = [request_of(token_of(buyer, secret=BUYERS_SECRET)) for buyer in buyers]
    began = time.process_time()
    for start in range(0, len(requests), BATCH):
        some = requests[start : start + BATCH]
        for protocol, request in zip(protocols, some, strict=True):
            protocol.data_received(request)
        last = protocols[-1]
        while last.waits_until is None:  # noqa: ASYNC110 - the loop's own turns are measured
            await asyncio.sleep(0)
    return (time.process_time() - began) / len(requests) * 1e6


def main() -> int:
    """Measure and print."""
    fast_path = "--route" not in sys.argv
    with tempfile.TemporaryDirectory(prefix=f"path-{secrets.token_hex(2)}") as data_dir:
        found = uvloop.run(measure(Path(data_dir), fast_path=fast_path))
    sys.stdout.write(f"{min(found):6.2f} us at best, {median(found):.2f} us in the middle\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
