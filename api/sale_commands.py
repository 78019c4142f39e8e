"""Commands that talk to a running service over HTTP, as its operator: `sale` and `audit`."""

import getpass
import os
import uuid
from collections.abc import Callable
from typing import IO, Any, Final, TypeVar

import click
import msgspec
from rich_click import RichCommand, RichGroup

from api import tables
from api.client import OperatorClient, ServiceRefused, ServiceUnreachable, path_of, read
from api.failures import BAD_SETTING, REFUSED, UNREACHABLE, Failure
from reservation.settings import ClientSettings, SettingsError

__all__ = ["audit", "sale"]

_Command = TypeVar("_Command", bound=Callable[..., Any])

#: `-5` is a number to `restock`, not an option.
_NEGATIVE_NUMBERS: Final = {"ignore_unknown_options": True}


def _calls_service(command: _Command) -> _Command:
    """The options of a command that talks to a running service."""
    as_json = click.option("--json", "as_json", is_flag=True, help="Print the service's answer.")
    url = click.option("--url", help="The service; by default RESERVATION_PUBLIC_URL.")
    return as_json(url(command))


def _changes_service(command: _Command) -> _Command:
    """Likewise, of one that changes something."""
    operator = click.option("--operator", help="Who does it, for the record; by default you.")
    return _calls_service(operator(command))


def _ask(
    call: Callable[[OperatorClient], bytes], *, url: str | None, operator: str | None = None
) -> bytes:
    """What the service answers to one call."""
    try:
        settings = ClientSettings.load(os.environ)
        name = operator or getpass.getuser()
        address = url or settings.public_url
        with OperatorClient(address, settings.admin_api_key, operator=name) as client:
            return call(client)
    except SettingsError as error:
        raise Failure(error, BAD_SETTING) from error
    except ServiceRefused as error:
        raise Failure(error, REFUSED) from error
    except ServiceUnreachable as error:
        raise Failure(error, UNREACHABLE) from error


def _print(answer: bytes, *, as_json: bool, show: Callable[[Any], None]) -> Any:
    """Print an answer, as it came or for people; gives its members."""
    try:
        members = read(answer)
        if as_json:
            click.echo(answer)
        else:
            show(members)
    except (ServiceRefused, LookupError, TypeError) as error:
        raise Failure(f"no reservation service answers like that: {error!r}") from error
    return members


@click.command(cls=RichCommand)
@click.argument("sale_id", metavar="SALE")
@_calls_service
def audit(sale_id: str, url: str | None, *, as_json: bool) -> int:
    """Check a sale's counters, and Redis against SQL.

    Exit status 1 where something does not agree. SQL being behind is no problem.
    """
    path = path_of("v1", "admin", "sales", sale_id, "audit")
    answer = _ask(lambda client: client.call("GET", path), url=url)
    found = _print(answer, as_json=as_json, show=tables.show_audit)
    return 0 if isinstance(found, dict) and found.get("ok") is True else REFUSED  # pyright: ignore[reportUnknownMemberType]


@click.group(cls=RichGroup)
def sale() -> None:
    """Create, look at and restock sales."""


@sale.command("create", cls=RichCommand)
@click.argument("file", type=click.File("rb"))
@click.option("--id", "sale_id", help="The sale's id; by default saleId in FILE.")
@_changes_service
def create_sale(
    file: IO[bytes], sale_id: str | None, url: str | None, operator: str | None, *, as_json: bool
) -> None:
    """Create the sale that FILE (- is stdin) describes in JSON.

    Its members are those of PUT /v1/admin/sales/SALE, and saleId. Nothing is changed where the
    sale is there already.
    """
    try:
        wanted = msgspec.json.decode(file.read(), type=dict[str, Any])
    except msgspec.MsgspecError as error:
        raise click.UsageError(f"{file.name} is not a JSON object: {error}") from error
    named = wanted.pop("saleId", None)
    name = sale_id or named
    if not isinstance(name, str) or not name:
        raise click.UsageError("name the sale: saleId in FILE, or --id")
    path = path_of("v1", "admin", "sales", name)
    answer = _ask(lambda client: client.call("PUT", path, body=wanted), url=url, operator=operator)
    _print(answer, as_json=as_json, show=tables.show_sale)


@sale.command("show", cls=RichCommand)
@click.argument("sale_id", metavar="SALE")
@_calls_service
def show_sale(sale_id: str, url: str | None, *, as_json: bool) -> None:
    """Show a sale with its counters."""
    path = path_of("v1", "admin", "sales", sale_id)
    answer = _ask(lambda client: client.call("GET", path), url=url)
    _print(answer, as_json=as_json, show=tables.show_sale)


@sale.command("list", cls=RichCommand)
@_calls_service
def list_sales(url: str | None, *, as_json: bool) -> None:
    """List the sales."""
    answer = _ask(lambda client: client.call("GET", path_of("v1", "sales")), url=url)
    _print(answer, as_json=as_json, show=tables.show_sales)


@sale.command("restock", cls=RichCommand, context_settings=_NEGATIVE_NUMBERS)
@click.argument("sale_id", metavar="SALE")
@click.argument("sku")
@click.argument("delta", type=int)
@click.option("--reason", required=True, help="Why, for the record.")
@click.option("--idempotency-key", help="Repeats an earlier call that got no answer.")
@_changes_service
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
            # It may have been done all the same; with this key it is done once.
            raise ServiceUnreachable(f"{error}; repeat with --idempotency-key {key}") from error

    _print(_ask(call, url=url, operator=operator), as_json=as_json, show=tables.show_sale)
