"""Commands about events and webhooks, over HTTP, as the operator: `events`, `webhook`."""

from urllib.parse import urlencode

import click
from rich_click import RichCommand, RichGroup

from api.cli import output as tables
from api.cli.remote import ask, calls_service, changes_service, show_answer
from reservation.client.operator import path_of

__all__ = ["events", "webhook"]


@click.command(cls=RichCommand)
@click.option("--after", default=0, show_default=True, help="Id after which to begin.")
@click.option("--sale", "sale_id", help="Only events of this sale.")
@click.option("--limit", default=100, show_default=True, help="Number of events, at most 1000.")
@click.option("--wait", default=0, help="Seconds to wait for an event, at most 25.")
@calls_service
def events(
    after: int, sale_id: str | None, limit: int, wait: int, url: str | None, *, as_json: bool
) -> None:
    """List events of the event feed.

    The last line has the --after of the next page.
    """
    query: dict[str, str | int] = {"after": after, "limit": limit, "wait": wait}
    if sale_id:
        query["saleId"] = sale_id
    path = f"{path_of('v1', 'admin', 'events')}?{urlencode(query)}"
    answer = ask(lambda client: client.call("GET", path), url=url)
    show_answer(answer, as_json=as_json, show=tables.show_events)


@click.group(cls=RichGroup)
def webhook() -> None:
    """Create, list, test and replay webhook endpoints."""


@webhook.command("list", cls=RichCommand)
@calls_service
def list_endpoints(url: str | None, *, as_json: bool) -> None:
    """List the webhook endpoints."""
    path = path_of("v1", "admin", "webhook-endpoints")
    answer = ask(lambda client: client.call("GET", path), url=url)
    show_answer(answer, as_json=as_json, show=tables.show_endpoints)


@webhook.command("create", cls=RichCommand)
@click.argument("address", metavar="URL")
@click.option(
    "--event", "kinds", multiple=True, default=["*"], help="Type of events; repeat for more."
)
@click.option("--sale", "sale_id", help="Only events of this sale.")
@click.option("--description", default="", help="Description, for people.")
@changes_service
def create(
    address: str,
    kinds: tuple[str, ...],
    sale_id: str | None,
    description: str,
    url: str | None,
    operator: str | None,
    *,
    as_json: bool,
) -> None:
    """Create a webhook endpoint.

    Prints its secret, which no later call returns.
    """
    body: dict[str, object] = {"url": address, "events": list(kinds), "description": description}
    if sale_id:
        body["saleId"] = sale_id
    path = path_of("v1", "admin", "webhook-endpoints")
    answer = ask(lambda client: client.call("POST", path, body=body), url=url, operator=operator)
    show_answer(answer, as_json=as_json, show=tables.show_new_endpoint)


@webhook.command("test", cls=RichCommand)
@click.argument("endpoint_id", metavar="ENDPOINT")
@calls_service
def test(endpoint_id: str, url: str | None, *, as_json: bool) -> None:
    """Send a test webhook.

    The log of deliveries shows its result within seconds.
    """
    path = path_of("v1", "admin", "webhook-endpoints", endpoint_id, "test")
    answer = ask(lambda client: client.call("POST", path), url=url)
    show_answer(answer, as_json=as_json, show=tables.show_delivery)


@webhook.command("replay", cls=RichCommand)
@click.argument("endpoint_id", metavar="ENDPOINT")
@click.option("--after", type=int, required=True, help="Id after which all events are repeated.")
@calls_service
def replay(endpoint_id: str, after: int, url: str | None, *, as_json: bool) -> None:
    """Deliver all events after an id of the event feed again."""
    path = path_of("v1", "admin", "webhook-endpoints", endpoint_id, "replay")
    answer = ask(lambda client: client.call("POST", path, body={"after": after}), url=url)
    show_answer(answer, as_json=as_json, show=tables.show_endpoint)
