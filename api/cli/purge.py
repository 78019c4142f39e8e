"""`reservation purge`: removes from SQL the rows that old retired sales no longer need."""

import click
import msgspec
from rich_click import RichCommand

from api.cli.errors import BAD_SETTING, REFUSED, CommandError
from api.cli.local import run_locally
from api.cli.output import show_purges
from api.cli.remote import operator_name
from reservation.application.retention.purge import PurgeReport
from reservation.bootstrap import Service

__all__ = ["purge"]


@click.command(cls=RichCommand)
@click.argument("sale_id", metavar="[SALE]", required=False)
@click.option("--dry-run", is_flag=True, help="Print the rows that would go, and change nothing.")
@click.option("--reason", required=True, help="Reason, recorded with the change.")
@click.option("--operator", help="Operator name, recorded with the change; default: your login.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per sale.")
def purge(
    sale_id: str | None, reason: str, operator: str | None, *, dry_run: bool, as_json: bool
) -> int:
    """Remove from SQL the rows that retired sales no longer need.

    Takes SALE, or every sale that was retired RESERVATION_RETENTION_DAYS ago. Orders with a payment
    are kept, with all rows that accounting and late payments need. Exits with 1 if a sale is
    refused: it is live, was retired too recently, or has something in progress. The service may
    run.
    """
    name = operator_name(operator)

    async def work(service: Service) -> int:
        if not service.settings.retention_days:
            raise CommandError(
                "RESERVATION_RETENTION_DAYS is empty, so every sale keeps its rows", BAD_SETTING
            )
        reports: list[PurgeReport] = []
        sale_ids = [sale_id] if sale_id is not None else await service.purge.due()
        for one in sale_ids:
            if dry_run:
                reports.append(await service.purge.preview(one))
            else:
                reports.append(await service.purge.run(one, operator=name, reason=reason))
        if as_json:
            for report in reports:
                click.echo(msgspec.json.encode(report))
        else:
            show_purges([msgspec.to_builtins(report) for report in reports], dry_run=dry_run)
        return REFUSED if any(report.refusal for report in reports) else 0

    return run_locally(work)
