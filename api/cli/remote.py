"""Shared by commands that call a running service: options, the call, the printed response."""

import getpass
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from api.cli.errors import BAD_SETTING, REFUSED, UNREACHABLE, CommandError
from reservation.client.operator import OperatorClient, ServiceRefused, ServiceUnreachable, read
from reservation.config.settings import ClientSettings, SettingsError
from reservation.domain.operators import valid_name

__all__ = ["ask", "calls_service", "changes_service", "show_answer", "working"]

_Command = TypeVar("_Command", bound=Callable[..., Any])


def calls_service(command: _Command) -> _Command:
    """The options of a command that calls a running service."""
    as_json = click.option(
        "--json", "as_json", is_flag=True, help="Print the service's response as JSON."
    )
    url = click.option(
        "--url",
        help="URL of the service; default: the internal port's URL, if it is set, otherwise "
        "RESERVATION_PUBLIC_URL.",
    )
    return as_json(url(command))


def changes_service(command: _Command) -> _Command:
    """The options of such a command that makes a change."""
    operator = click.option(
        "--operator", help="Operator name, recorded with the change; default: your login."
    )
    return calls_service(operator(command))


def operator_name(given: str | None) -> str:
    """The name recorded with a change: the given one, or the login name.

    A user id without a name, or a login name with control characters, becomes `uid-N`.
    """
    if given is not None:
        name = valid_name(given)
        if name is None:
            raise click.UsageError("--operator must be 1-100 printable characters")
        return name
    try:
        login = getpass.getuser()
    except (KeyError, OSError):
        login = ""
    return valid_name(login) or f"uid-{os.getuid()}"


def ask(
    call: Callable[[OperatorClient], bytes], *, url: str | None, operator: str | None = None
) -> bytes:
    """The service's response to one call."""
    try:
        settings = ClientSettings.load(os.environ)
        name = operator_name(operator)
        address = url or settings.operator_url
        with OperatorClient(address, settings.admin_api_key, operator=name) as client:
            return call(client)
    except SettingsError as error:
        raise CommandError(error, BAD_SETTING) from error
    except ServiceRefused as error:
        raise CommandError(error, REFUSED) from error
    except ServiceUnreachable as error:
        raise CommandError(error, UNREACHABLE) from error


@contextmanager
def working(description: str) -> Generator[None]:
    """Show an indeterminate spinner on a terminal."""
    console = Console(stderr=True)
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        progress.add_task(description, total=None)
        yield


def show_answer(answer: bytes, *, as_json: bool, show: Callable[[Any], None]) -> Any:
    """Print a response, as received or as a table; returns its members."""
    try:
        members = read(answer)
        if as_json:
            click.echo(answer)
        else:
            show(members)
    except (ServiceRefused, LookupError, TypeError) as error:
        raise CommandError(
            f"the response is not one of a reservation service: {error!r}"
        ) from error
    return members
