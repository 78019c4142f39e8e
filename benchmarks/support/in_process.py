"""The service without HTTP: connected in this process to its own Valkey, with an open sale."""

import asyncio
import shutil
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from api.http.schemas.sales import SaleRequest
from benchmarks.support.sale import SALE_ID, document
from reservation.adapters.redis.embedded.server import EmbeddedServer
from reservation.bootstrap import Service, opened
from reservation.config.settings import Settings

__all__ = ["service_alone"]


@asynccontextmanager
async def service_alone(
    home: Path, *, stock: int, hold_seconds: int | None = None, database_url: str = ""
) -> AsyncGenerator[tuple[Service, EmbeddedServer]]:
    """The service and its Valkey; both are removed afterwards, with their files."""
    await asyncio.to_thread(_empty, home)
    valkey = EmbeddedServer(home / "redis")
    await valkey.start()
    try:
        environ = {
            "RESERVATION_DATA_DIR": str(home),
            "RESERVATION_REDIS_URL": valkey.url,
            "RESERVATION_DATABASE_URL": database_url,
        }
        async with opened(Settings.load(environ, None)) as service:
            body = document(stock) | ({"holdSeconds": hold_seconds} if hold_seconds else {})
            change = msgspec.convert(body, SaleRequest).change()
            await service.sales.put(SALE_ID, change, if_match=None, operator="benchmark")
            yield service, valkey
    finally:
        await valkey.stop()
        await asyncio.to_thread(shutil.rmtree, home, ignore_errors=True)


def _empty(home: Path) -> None:
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
