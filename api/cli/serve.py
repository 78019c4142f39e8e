"""Commands that run a process here: `serve`, `sandbox`; and `completion`."""

import os
from typing import Final

import click
from click.shell_completion import get_completion_class
from rich_click import RichCommand

from api.cli.errors import ALREADY_RUNNING, BAD_SETTING, CommandError
from api.server import entrypoints as processes
from api.server import supervisor
from api.server.sockets import CannotServe
from reservation.config.settings import Settings, SettingsError

__all__ = ["completion", "sandbox", "serve"]

#: The variable through which shells request completions.
_COMPLETE_VARIABLE: Final = "_RESERVATION_COMPLETE"

#: The sandbox's port when it runs alone: next to the service's.
_SANDBOX_PORT: Final = 8001


@click.command(cls=RichCommand)
@click.option("--role", type=click.Choice(["api", "worker"]), help="Run only this role.")
@click.option("--demo-sale", is_flag=True, help="Open a demo sale once the service is ready.")
def serve(role: str | None, *, demo_sale: bool) -> int:
    """Run the service.

    The API, the worker and, where no URL names another, an embedded Valkey and the sandbox of the
    payment gateway. SIGTERM ends all of it within 10 seconds.
    """
    try:
        return supervisor.serve(
            Settings.load(os.environ), environ=os.environ, role=role, demo_sale=demo_sale
        )
    except SettingsError as error:
        raise CommandError(error, BAD_SETTING) from error
    except supervisor.AlreadyRunning as error:
        raise CommandError(error, ALREADY_RUNNING) from error


@click.command(cls=RichCommand)
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65_535),
    default=_SANDBOX_PORT,
    show_default=True,
    help="The port to listen on; 0 lets the system choose.",
)
def sandbox(host: str, port: int) -> int:
    """Run only the stand-in payment gateway.

    Prints the settings that point a service at it. Its journal is in the data directory.
    """
    try:
        return processes.sandbox_alone(Settings.load(os.environ), host=host, port=port)
    except SettingsError as error:
        raise CommandError(error, BAD_SETTING) from error
    except CannotServe as error:
        raise CommandError(error) from error


@click.command(cls=RichCommand)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the script that completes commands.

    Put it where the shell reads it: `reservation completion bash >> ~/.bashrc`, for zsh
    `~/.zshrc`, for fish `~/.config/fish/completions/reservation.fish`.
    """
    found = get_completion_class(shell)
    if found is None:
        raise click.UsageError(f"{shell} is not known")
    completes = found(context.find_root().command, {}, "reservation", _COMPLETE_VARIABLE)
    click.echo(completes.source())
