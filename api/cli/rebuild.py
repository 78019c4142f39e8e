"""`reservation rebuild`: Redis from SQL, while the service runs or not."""

import contextlib
from collections.abc import Callable, Generator

import click
import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich_click import RichCommand

from api.cli.errors import REFUSED, CommandError
from api.cli.local import run_locally
from api.cli.remote import operator_name
from reservation.application.recovery.rebuild import NotLost, RebuildReport
from reservation.application.recovery.survivors import Uncertain
from reservation.bootstrap import Service

__all__ = ["rebuild"]


@click.command(cls=RichCommand)
@click.argument("sale_id", metavar="[SALE]", required=False)
@click.option(
    "--force",
    is_flag=True,
    help="Rebuild even if Redis is ahead; events from the first that SQL refuses on are lost.",
)
@click.option("--operator", help="Operator name, recorded with the change; default: your login.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per sale.")
def rebuild(sale_id: str | None, operator: str | None, *, force: bool, as_json: bool) -> int:
    """Restore sales in Redis from SQL.

    Restores SALE, or every sale that Redis has lost. Uses the service's settings; the service need
    not run. A sale on which Redis agrees with SQL is left unchanged; a sale of which Redis is ahead
    is refused (exit status 1).
    """
    if force and sale_id is None:
        raise click.UsageError("--force requires a SALE")
    try:
        return run_locally(
            lambda service: _rebuild_all(
                service,
                sale_id,
                operator=operator_name(operator),
                force=force,
                as_json=as_json,
            )
        )
    except (NotLost, Uncertain) as error:
        raise CommandError(error, REFUSED) from error


async def _rebuild_all(
    service: Service, sale_id: str | None, *, operator: str, force: bool, as_json: bool
) -> int:
    refused = 0
    sale_ids = [sale_id] if sale_id is not None else sorted(await service.sql.sales.heads())
    for one in sale_ids:
        try:
            report = await _rebuild_one(service, one, operator=operator, force=force)
        except NotLost:
            # Without SALE only lost sales are meant; with it, a sale that is not lost is an error.
            if sale_id is not None:
                raise
            continue
        _print(report, as_json=as_json)
        refused += bool(report.undecided)
    return REFUSED if refused else 0


async def _rebuild_one(
    service: Service, sale_id: str, *, operator: str, force: bool
) -> RebuildReport:
    with _progress(sale_id) as on_progress:
        return await service.rebuild.run(
            sale_id, operator=operator, force=force, on_progress=on_progress
        )


@contextlib.contextmanager
def _progress(sale_id: str) -> Generator[Callable[[int, int], None]]:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"{sale_id}: orders", total=None)

        def on_progress(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        yield on_progress


def _print(report: RebuildReport, *, as_json: bool) -> None:
    if as_json:
        click.echo(msgspec.json.encode(report))
        return
    name = report.sale_id
    if report.rebuilt:
        click.echo(f"{name}: {report.why}")
        click.echo(
            f"{name}: restored {report.orders} orders up to event {report.seq};"
            f" epoch {report.epoch}; open again"
        )
    else:
        click.echo(f"{name}: Redis agrees with SQL, nothing to do")
    for outcome, order_ids in (
        ("payment in progress; the settler resolves it with the PG", report.claimed),
        ("paid, but the order was lost; the payment was refunded", report.given_back),
        (
            "the order was lost and its payment is undecided; repeat this command in 15 minutes",
            report.undecided,
        ),
    ):
        for order_id in order_ids:
            click.echo(f"{name}: {order_id} {outcome}")
