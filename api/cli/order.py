"""Commands about orders and items, over HTTP, as the operator: `why`, `refund`, `refunds`."""

import uuid
from urllib.parse import urlencode

import click
from rich_click import RichCommand

from api.cli import output as tables
from api.cli.remote import ask, calls_service, changes_service, show_answer
from reservation.client.operator import OperatorClient, ServiceUnreachable, path_of

__all__ = ["refund", "refunds", "why"]


@click.command(cls=RichCommand)
@click.argument("what", metavar="ORDER|SALE/SKU")
@calls_service
def why(what: str, url: str | None, *, as_json: bool) -> None:
    """Explain an order, or where an item's units are.

    Of an order: everything that happened to it, with times and the PG's answers, and what comes
    next. Of an item: who holds its units and since when, and which holds end next.
    """
    sale_id, slash, sku = what.partition("/")
    if slash:
        path = path_of("v1", "admin", "sales", sale_id, "items", sku, "why")
        show = tables.show_item
    else:
        path = path_of("v1", "admin", "orders", what)
        show = tables.show_order
    answer = ask(lambda client: client.call("GET", path), url=url)
    show_answer(answer, as_json=as_json, show=show)


@click.command(cls=RichCommand)
@click.argument("order_id", metavar="ORDER")
@click.option("--reason", required=True, help="Why, for the record and for the PG.")
@click.option("--no-restock", is_flag=True, help="Keep the units out of the sale.")
@click.option("--bank", help="Of a deposit: the bank it goes back to, by code or name.")
@click.option("--account", help="Of a deposit: the account number it goes back to, digits alone.")
@click.option("--holder", help="Of a deposit: the holder of that account.")
@click.option("--idempotency-key", help="Repeats an earlier call that got no answer.")
@changes_service
def refund(
    order_id: str,
    reason: str,
    idempotency_key: str | None,
    bank: str | None,
    account: str | None,
    holder: str | None,
    url: str | None,
    operator: str | None,
    *,
    no_restock: bool,
    as_json: bool,
) -> None:
    """Give an order's money back.

    In full, and its units go back on sale. A refund that the PG has not answered yet is gone on
    with by the service itself. The deposit of a virtual account goes back to the account that
    --bank, --account and --holder name.
    """
    key = idempotency_key or str(uuid.uuid4())
    body: dict[str, object] = {"reason": reason, "restock": not no_restock}
    named = {"bank": bank, "accountNumber": account, "holderName": holder}
    if any(named.values()):
        if not all(named.values()):
            raise click.UsageError("--bank, --account and --holder go together")
        body["refundReceiveAccount"] = named
    path = path_of("v1", "admin", "orders", order_id, "refund")

    def call(client: OperatorClient) -> bytes:
        try:
            return client.call("POST", path, body=body, idempotency_key=key)
        except ServiceUnreachable as error:
            # The change may have been made; with this key it is made once.
            raise ServiceUnreachable(f"{error}; repeat with --idempotency-key {key}") from error

    answer = ask(call, url=url, operator=operator)
    show_answer(answer, as_json=as_json, show=tables.show_refund)


@click.command(cls=RichCommand)
@click.option(
    "--status",
    type=click.Choice(["pending", "done", "refused"]),
    default="pending",
    show_default=True,
    help="How they stand.",
)
@click.option("--cursor", help="The next page, as the page before names it.")
@calls_service
def refunds(status: str, cursor: str | None, url: str | None, *, as_json: bool) -> None:
    """List refunds, with the PG's last word on each.

    Pending ones come oldest first, others newest first.
    """
    query = urlencode({"status": status} | ({"cursor": cursor} if cursor else {}))
    path = f"{path_of('v1', 'admin', 'refunds')}?{query}"
    answer = ask(lambda client: client.call("GET", path), url=url)
    show_answer(answer, as_json=as_json, show=tables.show_refunds)
