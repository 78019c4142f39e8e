"""`reservation history`: a sale's whole history, a JSON object a line, as `verify` reads it."""

import os
import stat
import sys
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import BinaryIO

import click
import msgspec
from rich_click import RichCommand

from api.cli.errors import CommandError
from api.cli.local import run_locally
from reservation.bootstrap import Service
from reservation.verification.export import recorded

__all__ = ["history"]


@click.command(cls=RichCommand)
@click.argument("sale_id", metavar="SALE")
@click.option(
    "--out",
    type=click.Path(dir_okay=False, allow_dash=True, path_type=Path),
    help="Output file, readable only by its owner; default stdout.",
)
def history(sale_id: str, out: Path | None) -> int:
    """Export the history of a sale.

    Every event of SALE, its counters and its orders, one JSON object a line: what `reservation
    verify` judges. It works on the settings of the service, whether that runs or not. It names
    buyers and payment keys: keep it as safe as the database.
    """
    return run_locally(lambda service: _write(service, sale_id, out))


async def _write(service: Service, sale_id: str, out: Path | None) -> int:
    encoder = msgspec.json.Encoder()
    records = recorded(
        sale_id,
        sales=service.sale_store,
        sql=service.sql,
        outbox=service.outbox,
        clock=service.clock,
    )
    file: BinaryIO | None = None
    with ExitStack() as stack:
        async for record in records:
            # Only with the first record: an unknown sale must not truncate a file.
            file = file or stack.enter_context(_opened(out))
            file.write(encoder.encode(record) + b"\n")
        if file is not None:
            file.flush()
    return 0


def _opened(out: Path | None) -> AbstractContextManager[BinaryIO]:
    """The file, truncated and readable only by its owner; a pipe or a device is left unchanged."""
    if out is None or str(out) == "-":
        return nullcontext(sys.stdout.buffer)
    try:
        descriptor = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            # An existing file may have been readable by others.
            os.fchmod(descriptor, 0o600)
    except OSError as error:
        raise CommandError(f"{out}: {error.strerror}") from error
    return os.fdopen(descriptor, "wb")
