"""Commands that end an order or look its payment up now: `release` and `resolve`."""

import click
from rich_click import RichCommand

from api.cli import output as tables
from api.cli.remote import ask, changes_service, show_answer

__all__ = ["release", "resolve"]


@click.command(cls=RichCommand)
@click.argument("order_id", metavar="ORDER")
@click.option("--reason", required=True, help="Reason, recorded with the change.")
@changes_service
def release(
    order_id: str, reason: str, url: str | None, operator: str | None, *, as_json: bool
) -> None:
    """Release the hold of an order.

    Its units return to the sale. The account of an order that awaits its deposit is cancelled at
    the PG first; if the deposit came meanwhile, the order is CONFIRMED. An order whose payment is
    in progress, or that is paid, is refused.
    """
    answer = ask(lambda client: client.release(order_id, reason=reason), url=url, operator=operator)
    show_answer(answer, as_json=as_json, show=tables.show_state)


@click.command(cls=RichCommand)
@click.argument("order_id", metavar="ORDER")
@click.option("--reason", required=True, help="Reason, recorded with the change.")
@changes_service
def resolve(
    order_id: str, reason: str, url: str | None, operator: str | None, *, as_json: bool
) -> None:
    """Look the payment of an order up at the PG now.

    Settles what the PG shows, for an order whose payment is in progress or that awaits its deposit.
    An order stays undecided while the PG shows neither money nor an end; settlement continues by
    itself.
    """
    answer = ask(lambda client: client.resolve(order_id, reason=reason), url=url, operator=operator)
    show_answer(answer, as_json=as_json, show=tables.show_state)
