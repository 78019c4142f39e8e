"""Commands about operators' keys: `key create`, `key list` and `key revoke`."""

import click
from rich_click import RichCommand, RichGroup

from api.cli import output as tables
from api.cli.remote import ask, calls_service, changes_service, show_answer
from reservation.domain.operators import Role

__all__ = ["key"]


@click.group(cls=RichGroup)
def key() -> None:
    """Create, list and revoke operators' keys."""


@key.command("create", cls=RichCommand)
@click.argument("name")
@click.option(
    "--role",
    required=True,
    type=click.Choice([role.value for role in Role]),
    help="viewer reads; support also releases, resolves and refunds orders; manager also changes "
    "sales and stock; owner may do everything.",
)
@click.option("--reason", default="", help="Reason, recorded with the key.")
@changes_service
def create_key(
    name: str, role: str, reason: str, url: str | None, operator: str | None, *, as_json: bool
) -> None:
    """Create a key for the operator NAME, and print it.

    The key is shown once: the service stores only its hash. NAME is recorded with each change that
    is made with the key.
    """
    answer = ask(
        lambda client: client.create_key(name, role=role, reason=reason), url=url, operator=operator
    )
    show_answer(answer, as_json=as_json, show=tables.show_new_key)


@key.command("list", cls=RichCommand)
@click.option("--cursor", help="Cursor of the next page, from the previous page.")
@calls_service
def list_keys(cursor: str | None, url: str | None, *, as_json: bool) -> None:
    """List keys, valid and revoked, newest first."""
    answer = ask(lambda client: client.list_keys(cursor=cursor), url=url)
    show_answer(answer, as_json=as_json, show=tables.show_keys)


@key.command("revoke", cls=RichCommand)
@click.argument("key_id", metavar="KEY")
@click.option("--reason", default="", help="Reason, recorded with the revocation.")
@changes_service
def revoke_key(
    key_id: str, reason: str, url: str | None, operator: str | None, *, as_json: bool
) -> None:
    """Revoke the key with the id KEY: every process refuses it within five seconds."""
    answer = ask(
        lambda client: client.revoke_key(key_id, reason=reason), url=url, operator=operator
    )
    show_answer(answer, as_json=as_json, show=tables.show_key)
