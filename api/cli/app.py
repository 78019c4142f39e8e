"""The command line, `reservation COMMAND`: its table of commands and its error handling."""

import os
import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Any, Final, NoReturn, cast

import click
from rich_click import RichCommand, RichGroup

from api.cli.errors import REFUSED, CommandError

__all__ = ["cli", "main"]

#: The shells' exit status for a command that Ctrl-C ended.
_INTERRUPTED: Final = 130

#: Each command's module and its line in the list. Printing the list imports none of them.
_COMMANDS: Final = {
    "audit": ("api.cli.sale:audit", "Check a sale's counters, and Redis against SQL."),
    "backup": ("api.cli.backup:backup", "Write a backup of SQL to a file."),
    "completion": ("api.cli.serve:completion", "Print the script that completes commands."),
    "demo": (
        "api.cli.demo:demo",
        "Simulate a sale and check the result.",
    ),
    "events": ("api.cli.webhook:events", "List events of the event feed."),
    "history": ("api.cli.history:history", "Export the history of a sale."),
    "key": ("api.cli.key:key", "Create, list and revoke operators' keys."),
    "migrate": ("api.cli.migrate:migrate", "Apply pending migrations of SQL, and raise the level."),
    "purge": (
        "api.cli.purge:purge",
        "Remove from SQL the rows that retired sales no longer need.",
    ),
    "rebuild": ("api.cli.rebuild:rebuild", "Restore sales in Redis from SQL."),
    "refund": ("api.cli.order:refund", "Refund an order."),
    "refunds": ("api.cli.order:refunds", "List refunds with the PG's last answer to each."),
    "release": ("api.cli.order_requests:release", "Release the hold of an order."),
    "resolve": (
        "api.cli.order_requests:resolve",
        "Look the payment of an order up at the PG now.",
    ),
    "restore": (
        "api.cli.restore:restore",
        "Restore SQL from a backup, and open the sales after a comparison.",
    ),
    "sale": ("api.cli.sale:sale", "Create, show, restock, pause, close and archive sales."),
    "sandbox": ("api.cli.serve:sandbox", "Run only the stand-in payment gateway."),
    "serve": ("api.cli.serve:serve", "Run the service."),
    "verify": ("api.cli.verify:verify", "Check a recorded history."),
    "webhook": (
        "api.cli.webhook:webhook",
        "Create, list, test and replay webhook endpoints.",
    ),
    "why": ("api.cli.order:why", "Explain an order or the holders of an item's units."),
}


class _LazyGroup(RichGroup):
    """Lists commands by their one line; imports only the called one."""

    def __init__(self, *, lazy: Mapping[str, tuple[str, str]], **attributes: Any) -> None:
        super().__init__(**attributes)
        self._lazy = lazy

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return sorted(self._lazy)

    def get_command(
        self,
        ctx: click.Context,  # noqa: ARG002 - click's signature
        cmd_name: str,
    ) -> click.Command | None:
        if cmd_name not in self._lazy:
            return None
        return RichCommand(name=cmd_name, short_help=self._lazy[cmd_name][1])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name, listed, rest = super().resolve_command(ctx, args)
        if name is None or listed is None:
            return name, listed, rest
        module, _, attribute = self._lazy[name][0].partition(":")
        return name, cast("click.Command", getattr(import_module(module), attribute)), rest


def _version(context: click.Context, _parameter: click.Parameter, wanted: object) -> None:
    if wanted:
        click.echo(f"reservation {import_module('reservation').__version__}")
        context.exit()


@click.group(
    cls=_LazyGroup,
    lazy=_COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit status: 0 success, 1 problem found, 2 usage error, 69 service unreachable, 75 "
    "already running, 78 invalid setting.",
)
@click.option(
    "--version",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_version,
    help="Show the version and exit.",
)
def cli() -> None:
    """Stock reservation for flash sales.

    Settings come from RESERVATION_... in the environment or in .env.
    """


def main(arguments: list[str] | None = None) -> NoReturn:
    """The console script: every failure is one line on stderr and its own status."""
    try:
        status: object = cli.main(arguments, prog_name="reservation", standalone_mode=False)
        sys.stdout.flush()
    except CommandError as error:
        _fail(str(error), error.status)
    except click.ClickException as error:
        _fail(error.format_message(), error.exit_code)
    except click.Abort:
        sys.exit(_INTERRUPTED)
    except BrokenPipeError:
        # Buffered output would fail again when the interpreter flushes it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(REFUSED)
    sys.exit(status if isinstance(status, int) else 0)


def _fail(message: str, status: int) -> NoReturn:
    click.echo(f"reservation: {' '.join(message.split())}", err=True)
    sys.exit(status)


if __name__ == "__main__":
    main()
