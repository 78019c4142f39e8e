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
@click.option(
    "--repair", "repairing", is_flag=True, help="Show the repairs that --yes would apply."
)
@click.option(
    "--yes", is_flag=True, help="With --repair: apply the repairs. The sale stops for seconds."
)
@calls_service
def audit(sale_id: str, url: str | None, *, repairing: bool, yes: bool, as_json: bool) -> int:
    """Check a sale's counters, and Redis against SQL.

    Exit status 1 if there are discrepancies; a lag of SQL is not one. --repair uses the service's
    settings, like `reservation rebuild`; the service need not run.
    """
    if repairing:
        from api.cli.audit import repair  # noqa: PLC0415 - seldom wanted, and slow to load

        return repair(sale_id, operator=operator_name(None), yes=yes, as_json=as_json)
    if yes:
        raise click.UsageError("--yes requires --repair")
    path = path_of("v1", "admin", "sales", sale_id, "audit")
    with working(f"{sale_id}: reading every order"):
        answer = ask(lambda client: client.call("GET", path), url=url)
    found = show_answer(answer, as_json=as_json, show=tables.show_audit)
    return 0 if isinstance(found, dict) and found.get("ok") is True else REFUSED  # pyright: ignore[reportUnknownMemberType]


@click.group(cls=RichGroup)
def sale() -> None:
    """Create, show, restock, pause, close and archive sales."""


@sale.command("create", cls=RichCommand)
@click.argument("file", type=click.File("rb"))
@click.option("--id", "sale_id", help="The sale's id; default: saleId in FILE.")
@changes_service
def create_sale(
    file: IO[bytes], sale_id: str | None, url: str | None, operator: str | None, *, as_json: bool
) -> None:
    """Create the sale that FILE (- is stdin) describes in JSON.

    FILE has the members of PUT /v1/admin/sales/SALE, and saleId. A sale that exists is left
    unchanged.
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
        raise click.UsageError("no sale id: set saleId in FILE or give --id")
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
    """List the sales: live ones first, then upcoming ones, then ended ones."""
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
    sale_id: str, action: str, reason: str, *, url: str | None, operator: str | None, as_json: bool
) -> None:
    path = path_of("v1", "admin", "sales", sale_id, action)
    answer = ask(
        lambda client: client.call("POST", path, body={"reason": reason}),
        url=url,
        operator=operator,
    )
    show_answer(answer, as_json=as_json, show=tables.show_sale)


@sale.command("pause", cls=RichCommand)
@click.argument("sale_id", metavar="SALE")
@click.option("--reason", required=True, help="Reason, recorded with the change.")
@changes_service
def pause(
    sale_id: str, reason: str, url: str | None, operator: str | None, *, as_json: bool
) -> None:
    """Stop new holds; existing holds and payments continue."""
    _switch(sale_id, "pause", reason, url=url, operator=operator, as_json=as_json)


@sale.command("resume", cls=RichCommand)
@click.argument("sale_id", metavar="SALE")
@click.option("--reason", required=True, help="Reason, recorded with the change.")
@changes_service
def resume(
    sale_id: str, reason: str, url: str | None, operator: str | None, *, as_json: bool
) -> None:
    """Accept new holds again."""
    _switch(sale_id, "resume", reason, url=url, operator=operator, as_json=as_json)


@sale.command("close", cls=RichCommand)
@click.argument("sale_id", metavar="SALE")
@click.option("--reason", required=True, help="Reason, recorded with the change.")
@changes_service
def close(
    sale_id: str, reason: str, url: str | None, operator: str | None, *, as_json: bool
) -> None:
    """End the sale permanently; started payments continue."""
    _switch(sale_id, "close", reason, url=url, operator=operator, as_json=as_json)


@sale.command("archive", cls=RichCommand)
@click.argument("sale_id", metavar="SALE")
@click.option("--reason", required=True, help="Reason, recorded with the change.")
@changes_service
def archive(
    sale_id: str, reason: str, url: str | None, operator: str | None, *, as_json: bool
) -> None:
    """Retire a closed or ended sale: SQL alone has it and its orders then.

    The worker retires each sale a day after its end.
    """
    _switch(sale_id, "archive", reason, url=url, operator=operator, as_json=as_json)


@sale.command("history", cls=RichCommand)
@click.argument("sale_id", metavar="SALE")
@click.option("--cursor", help="Cursor of the next page, from the previous page.")
@calls_service
def sale_history(sale_id: str, cursor: str | None, url: str | None, *, as_json: bool) -> None:
    """List the changes of a sale by operators, newest first: who, when and why."""
    answer = ask(lambda client: client.sale_history(sale_id, cursor=cursor), url=url)
    show_answer(answer, as_json=as_json, show=tables.show_sale_history)


@sale.command("restock", cls=RichCommand, context_settings=_NEGATIVE_NUMBERS)
@click.argument("sale_id", metavar="SALE")
@click.argument("sku")
@click.argument("delta", type=int)
@click.option("--reason", required=True, help="Reason, recorded with the change.")
@click.option(
    "--idempotency-key", help="Key of an earlier call that got no response, to repeat it."
)
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
    """Add DELTA units of SKU; a negative DELTA withdraws units."""
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
