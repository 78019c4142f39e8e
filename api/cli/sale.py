"""Commands that call a running service over HTTP, as its operator: `sale` and `audit`."""

import uuid
from typing import IO, Any, Final
from urllib.parse import quote

import click
import msgspec
from rich_click import RichCommand, RichGroup

from api.cli import output as tables
from api.cli.errors import REFUSED
from api.cli.remote import ask, calls_service, changes_service, operator_name, show_answer, working
from reservation.client.operator import OperatorClient, ServiceUnreachable, path_of

__all__ = ["audit", "sale"]

#: `-5` is a number to `restock`, not an option.
_NEGATIVE_NUMBERS: Final = {"ignore_unknown_options": True}


class _Page(msgspec.Struct, rename="camel"):
    sales: list[msgspec.Raw]
    next_cursor: str | None = None


@click.command(cls=RichCommand)
@click.argument("sale_id", metavar="SALE")
@click.option("--repair", "to_repair", is_flag=True, help="Show what would be put right.")
@click.option("--yes", is_flag=True, help="With --repair: do it. The sale stops for seconds.")
@calls_service
def audit(sale_id: str, url: str | None, *, to_repair: bool, yes: bool, as_json: bool) -> int:
    """Check a sale's counters, and Redis against SQL.

    Exit status 1 where something does not agree. SQL being behind is no problem. --repair works on
    the settings of the service, like `reservation rebuild`, whether that runs or not.
    """
    if to_repair:
        from api.cli.audit import repair  # noqa: PLC0415 - seldom wanted, and slow to load

        return repair(sale_id, operator=operator_name(None), yes=yes, as_json=as_json)
    if yes:
        raise click.UsageError("--yes goes with --repair")
    path = path_of("v1", "admin", "sales", sale_id, "audit")
    with working(f"{sale_id}: reading every order"):
        answer = ask(lambda client: client.call("GET", path), url=url)
    found = show_answer(answer, as_json=as_json, show=tables.show_audit)
    return 0 if isinstance(found, dict) and found.get("ok") is True else REFUSED  # pyright: ignore[reportUnknownMemberType]


@click.group(cls=RichGroup)
def sale() -> None:
    """Create, look at, restock, pause and close sales."""


@sale.command("create", cls=RichCommand)
@click.argument("file", type=click.File("rb"))
@click.option("--id", "sale_id", help="The sale's id; by default saleId in FILE.")
@changes_service
def create_sale(
    file: IO[bytes], sale_id: str | None, url: str | None, operator: str | None, *, as_json: bool
) -> None:
    """Create the sale that FILE (- is stdin) describes in JSON.

    Its members are those of PUT /v1/admin/sales/SALE, and saleId. Nothing is changed where the
    sale is there already.
    """
    try:
        # Editors on Windows begin a file with a byte order mark.
        wanted = msgspec.json.decode(file.read().decode("utf-8-sig"), type=dict[str, Any])
    except UnicodeDecodeError as error:
        raise click.UsageError(f"{file.name} is not UTF-8; save it as UTF-8") from error
    except msgspec.MsgspecError as error:
        raise click.UsageError(f"{file.name} is not a JSON object: {error}") from error
    named = wanted.pop("saleId", None)
    name = sale_id or named
    if not isinstance(name, str) or not name:
        raise click.UsageError("name the sale: saleId in FILE, or --id")
    path = path_of("v1", "admin", "sales", name)
    answer = ask(lambda client: client.call("PUT", path, body=wanted), url=url, operator=operator)
    show_answer(answer, as_json=as_json, show=tables.show_sale)


@sale.command("show", cls=RichCommand)
@click.argument("sale_id", metavar="SALE")
@calls_service
def show_sale(sale_id: str, url: str | None, *, as_json: bool) -> None:
    """Show a sale with its counters."""
    path = path_of("v1", "admin", "sales", sale_id)
    answer = ask(lambda client: client.call("GET", path), url=url)
    show_answer(answer, as_json=as_json, show=tables.show_sale)


@sale.command("list", cls=RichCommand)
@calls_service
def list_sales(url: str | None, *, as_json: bool) -> None:
    """List the sales: live ones first, then those to come, then those that are over."""
    answer = ask(_all_sales, url=url)
    show_answer(answer, as_json=as_json, show=tables.show_sales)


def _all_sales(client: OperatorClient) -> bytes:
    """All pages as one response of the same form; a single page as received."""
    path = path_of("v1", "sales")
    answer = client.call("GET", path)
    try:
        page = msgspec.json.decode(answer, type=_Page)
        if page.next_cursor is None:
            return answer
        sales = page.sales
        while page.next_cursor is not None and page.sales:
            cursor = quote(page.next_cursor, safe="")
            page = msgspec.json.decode(client.call("GET", f"{path}?cursor={cursor}"), type=_Page)
            sales += page.sales
    except msgspec.MsgspecError:
        # Another server's response: the command that prints it reports the error.
        return answer
    return msgspec.json.encode({"sales": sales, "nextCursor": None})


def _switch(
    sale_id: str, what: str, reason: str, *, url: str | None, operator: str | None, as_json: bool
) -> None:
    path = path_of("v1", "admin", "sales", sale_id, what)
    answer = ask(
        lambda client: client.call("POST", path, body={"reason": reason}),
        url=url,
        operator=operator,
    )
    show_answer(answer, as_json=as_json, show=tables.show_sale)


@sale.command("pause", cls=RichCommand)
@click.argument("sale_id", metavar="SALE")
@click.option("--reason", required=True, help="Why, for the record.")
@changes_service
def pause(
    sale_id: str, reason: str, url: str | None, operator: str | None, *, as_json: bool
) -> None:
    """Take no more holds; holds that stand and payments go on."""
    _switch(sale_id, "pause", reason, url=url, operator=operator, as_json=as_json)


@sale.command("resume", cls=RichCommand)
@click.argument("sale_id", metavar="SALE")
@click.option("--reason", required=True, help="Why, for the record.")
@changes_service
def resume(
    sale_id: str, reason: str, url: str | None, operator: str | None, *, as_json: bool
) -> None:
    """Take holds again."""
    _switch(sale_id, "resume", reason, url=url, operator=operator, as_json=as_json)


@sale.command("close", cls=RichCommand)
@click.argument("sale_id", metavar="SALE")
@click.option("--reason", required=True, help="Why, for the record.")
@changes_service
def close(
    sale_id: str, reason: str, url: str | None, operator: str | None, *, as_json: bool
) -> None:
    """End the sale for good; payments that have begun go on."""
    _switch(sale_id, "close", reason, url=url, operator=operator, as_json=as_json)


@sale.command("restock", cls=RichCommand, context_settings=_NEGATIVE_NUMBERS)
@click.argument("sale_id", metavar="SALE")
@click.argument("sku")
@click.argument("delta", type=int)
@click.option("--reason", required=True, help="Why, for the record.")
@click.option("--idempotency-key", help="Repeats an earlier call that got no answer.")
@changes_service
def restock(
    sale_id: str,
    sku: str,
    delta: int,
    reason: str,
    idempotency_key: str | None,
    url: str | None,
    operator: str | None,
    *,
    as_json: bool,
) -> None:
    """Add DELTA units of SKU, or withdraw them where it is negative."""
    key = idempotency_key or str(uuid.uuid4())
    body = {"sku": sku, "delta": delta, "reason": reason}
    path = path_of("v1", "admin", "sales", sale_id, "stock")

    def call(client: OperatorClient) -> bytes:
        try:
            return client.call("POST", path, body=body, idempotency_key=key)
        except ServiceUnreachable as error:
            # The change may have been made; with this key it is made once.
            raise ServiceUnreachable(f"{error}; repeat with --idempotency-key {key}") from error

    show_answer(ask(call, url=url, operator=operator), as_json=as_json, show=tables.show_sale)
