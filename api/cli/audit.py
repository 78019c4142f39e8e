"""`reservation audit SALE --repair`: repairs the audit's findings from the events."""

import click
import msgspec

from api.cli.errors import REFUSED, CommandError
from api.cli.local import run_locally
from reservation.application.recovery.repair import NotDrained, RepairReport
from reservation.bootstrap import Service
from reservation.workers.flusher import Flusher

__all__ = ["repair"]


def repair(sale_id: str, *, operator: str, yes: bool, as_json: bool) -> int:
    """Show the repairs; with `yes` apply them. Exit status 1 if a finding remains."""
    try:
        return run_locally(
            lambda service: _repair(service, sale_id, operator=operator, yes=yes, as_json=as_json)
        )
    except NotDrained as error:
        raise CommandError(error, REFUSED) from error


async def _repair(
    service: Service, sale_id: str, *, operator: str, yes: bool, as_json: bool
) -> int:
    flusher = Flusher(service.outbox, service.sql, on_alarm=_print_alarm, on_flushed=lambda _: None)

    async def drain(sale: str) -> None:
        while (await flusher.run_once(sale)).flushed:
            pass

    report = await service.repair.run(sale_id, operator=operator, drain=drain if yes else None)
    if as_json:
        click.echo(msgspec.json.encode(report))
    else:
        _print(report)
    return REFUSED if report.left else 0


def _print_alarm(name: str, **facts: object) -> None:
    click.echo(f"alarm: {name} {facts}", err=True)


def _print(report: RepairReport) -> None:
    name = report.sale_id
    if not report.problems:
        click.echo(f"{name}: no discrepancies, nothing to repair")
        return
    for problem in report.problems:
        click.echo(f"problem: {problem}")
    if not report.repaired:
        click.echo(
            f"{name}: a repair stops the sale for some seconds, flushes its events to SQL and "
            "restores every record from SQL; nothing was changed: add --yes"
        )
        return
    click.echo(f"{name}: restored, {report.orders} orders; open again")
    for problem in report.left:
        click.echo(f"left: {problem}")
    if report.left:
        click.echo(f"{name}: a repair cannot fix the remaining problems; see the runbook")
