"""`reservation history`: a sale's whole past, a JSON object a line, as `verify` reads it."""

import sys
from typing import BinaryIO

import click
import msgspec
from rich_click import RichCommand

from api.on_the_spot import on_the_spot
from reservation.bootstrap import Service
from reservation.history import recorded

__all__ = ["history"]


@click.command(cls=RichCommand)
@click.argument("sale_id", metavar="SALE")
@click.option("--out", type=click.File("wb", lazy=True), help="A file; by default stdout.")
def history(sale_id: str, out: BinaryIO | None) -> int:
    """Write down the past of a sale.

    Every event of SALE, its counters and its orders, one JSON object a line: what `reservation
    verify` judges. It works on the settings of the service, whether that runs or not. It names
    buyers and payment keys: keep it as safe as the database.
    """
    return on_the_spot(lambda service: _write(service, sale_id, out or sys.stdout.buffer))


async def _write(service: Service, sale_id: str, file: BinaryIO) -> int:
    encoder = msgspec.json.Encoder()
    records = recorded(
        sale_id,
        sales=service.sale_store,
        ledger=service.ledger,
        outbox=service.outbox,
        clock=service.clock,
    )
    async for record in records:
        file.write(encoder.encode(record) + b"\n")
    file.flush()
    return 0
