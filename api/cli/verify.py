"""`reservation verify`: judge a recorded history."""

import time
from pathlib import Path
from typing import Final

import click
import msgspec
from rich_click import RichCommand

from api.cli.errors import REFUSED, CommandError
from reservation.verification.model.report import Judgement
from reservation.verification.verify import Unreadable
from reservation.verification.verify import verify as judge

__all__ = ["verify"]

#: The same as for wrong usage: the file is not a history.
_UNREADABLE: Final = 2


@click.command(cls=RichCommand)
@click.argument("history", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def verify(history: Path, *, as_json: bool) -> int:
    """Check a recorded history.

    The events in HISTORY are folded in their order, and every answer that a client got is held
    against them: nothing oversold, no answer that was true at no moment of its call, no money
    without a sale. Exit status 1 where anything is violated, 2 where the file is not a history.
    """
    began = time.perf_counter()
    try:
        judgement = judge(history)
    except Unreadable as error:
        raise CommandError(error, _UNREADABLE) from error
    seconds = time.perf_counter() - began
    if as_json:
        click.echo(msgspec.json.encode(judgement))
    else:
        _show(judgement, seconds)
    return 0 if judgement.ok else REFUSED


def _show(judgement: Judgement, seconds: float) -> None:
    rate = judgement.events / seconds if seconds else 0.0
    click.echo(f"events      {judgement.events} of {judgement.sales} sales, {rate:,.0f} a second")
    click.echo(
        f"operations  {judgement.operations}: {judgement.answers} responses checked, "
        f"{judgement.refusals} of them refusals; {judgement.unknown} with an unknown outcome, "
        f"{judgement.not_judged} without information about the sale"
    )
    if judgement.unacknowledged:
        click.echo(
            f"            {judgement.unacknowledged} of the responses: 202, the outcome not yet "
            "acknowledged by replicas"
        )
    click.echo(f"heads       {judgement.heads} observations of the sale's head")
    click.echo(
        f"at the end  {judgement.orders_compared} orders in SQL, {judgement.stock_compared} "
        f"counters and the money of {judgement.money_compared} orders compared; "
        f"{judgement.undecided} payments undecided"
    )
    for found in judgement.violations:
        click.echo(f"line {found.line}: {found.name}: {found.reason}")
    more = judgement.violation_count - len(judgement.violations)
    if more:
        click.echo(f"and {more} more")
    click.echo("no violation" if judgement.ok else f"{judgement.violation_count} violations")
