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
@click.argument("target", metavar="ORDER|SALE/SKU")
@calls_service
def why(target: str, url: str | None, *, as_json: bool) -> None:
    """Explain an order or the holders of an item's units.

    For an order: its history with times and the PG's answers, and its next step. For an item: the
    holders of its units and the next deadlines.
    """
    sale_id, slash, sku = target.partition("/")
    if slash:
        path = path_of("v1", "admin", "sales", sale_id, "items", sku, "why")
        show = tables.show_item
    else:
        path = path_of("v1", "admin", "orders", target)
        show = tables.show_order
    answer = ask(lambda client: client.call("GET", path), url=url)
    show_answer(answer, as_json=as_json, show=show)


@click.command(cls=RichCommand)
@click.argument("order_id", metavar="ORDER")
@click.option("--reason", required=True, help="Reason, recorded and sent to the PG.")
@click.option("--no-restock", is_flag=True, help="Do not return the units to the sale.")
@click.option("--bank", help="For deposits: bank of the refund account, by code or name.")
@click.option("--account", help="For deposits: number of the refund account, digits only.")
@click.option("--holder", help="For deposits: holder of the refund account.")
@click.option(
    "--idempotency-key", help="Key of an earlier call that got no response, to repeat it."
)
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
    """Refund an order.

    Refunds the full amount and returns the units to the sale. The service completes a refund that
    the PG has not answered yet. The deposit of a virtual account is refunded to the account given
    by --bank, --account and --holder.
    """
    key = idempotency_key or str(uuid.uuid4())
    body: dict[str, object] = {"reason": reason, "restock": not no_restock}
    named = {"bank": bank, "accountNumber": account, "holderName": holder}
    if any(named.values()):
        if not all(named.values()):
            raise click.UsageError("--bank, --account and --holder must be given together")
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
    help="Status of the refunds.",
)
@click.option("--cursor", help="Cursor of the next page, from the previous page.")
@calls_service
def refunds(status: str, cursor: str | None, url: str | None, *, as_json: bool) -> None:
    """List refunds with the PG's last answer to each.

    Pending refunds are listed oldest first, others newest first.
    """
    query = urlencode({"status": status} | ({"cursor": cursor} if cursor else {}))
    path = f"{path_of('v1', 'admin', 'refunds')}?{query}"
    answer = ask(lambda client: client.call("GET", path), url=url)
    show_answer(answer, as_json=as_json, show=tables.show_refunds)
