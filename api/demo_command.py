"""The command `demo`: a whole flash sale against a running service, or one of its own."""

import asyncio
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import click
import httpx
import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich_click import RichCommand

from api.auth import Guests
from api.failures import BAD_SETTING, REFUSED, UNREACHABLE, Failure
from reservation.demo import Demo, DemoPlan, Verdict
from reservation.settings import Settings, SettingsError

__all__ = ["demo"]

#: A service of one's own: started, and migrated, on a busy machine.
START_SECONDS: Final = 60.0
STOP_SECONDS: Final = 15.0
LOOK_SECONDS: Final = 0.2


@click.command(cls=RichCommand)
@click.option("--buyers", type=click.IntRange(1, 1_000_000), default=1000, show_default=True)
@click.option("--stock", type=click.IntRange(0, 1_000_000), default=100, show_default=True)
@click.option("--hold-seconds", type=click.IntRange(1, 3600), default=20, show_default=True)
@click.option("--seed", type=int, default=1, show_default=True, help="Who leaves, who declines.")
@click.option("--url", help="A running service; without it, the one at RESERVATION_PUBLIC_URL.")
@click.option("--own", is_flag=True, help="Start a service for this demo alone.")
@click.option("--json", "as_json", is_flag=True, help="Print the verdict as JSON.")
def demo(
    *,
    buyers: int,
    stock: int,
    hold_seconds: int,
    seed: int,
    url: str | None,
    own: bool,
    as_json: bool,
) -> int:
    """Sell a whole sale before your eyes, then compare the books.

    Buyers fight for the pieces; some leave, some are declined and try another card, some load the
    result again and again. The verdict holds audit, orders and the sandbox's money ledger against
    each other. Exit status 0: all agree; 1: they do not.
    """
    plan = DemoPlan(buyers=buyers, stock=stock, hold_seconds=hold_seconds, seed=seed)
    try:
        settings = Settings.load(os.environ)
        address = url or settings.public_url
        if own or (url is None and not _answers(address)):
            with _own_service() as (own_settings, own_address):
                verdict = _run(plan, own_settings, own_address)
        elif not _answers(address):
            raise Failure(f"no service answers at {address}", UNREACHABLE)
        else:
            verdict = _run(plan, settings, address)
    except SettingsError as error:
        raise Failure(error, BAD_SETTING) from error
    except (httpx.HTTPError, TimeoutError) as error:
        raise Failure(f"the service cannot be used: {error}", UNREACHABLE) from error
    if as_json:
        click.echo(msgspec.json.encode(verdict).decode())
    else:
        _show(verdict)
    return 0 if verdict.ok else REFUSED


def _run(plan: DemoPlan, settings: Settings, address: str) -> Verdict:
    # The demo's buyers all come from one address, so they are not asked for at the door.
    guests = Guests(msgspec.structs.replace(settings, guest_rate=None))
    outcomes: Counter[str] = Counter()
    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[told]}"),
        console=console,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task("buyers", total=plan.buyers, told="")

        def tell(outcome: str, count: int) -> None:
            outcomes[outcome] += count
            told = "settling and flushing" if not count else _summary(outcomes)
            progress.update(task, advance=count, told=told)

        story = Demo(
            plan,
            service_url=address,
            admin_key=settings.admin_api_key,
            new_token=lambda: guests.new("")[1],
            progress=tell,
        )
        return asyncio.run(story.run())


def _summary(outcomes: Counter[str]) -> str:
    return "  ".join(f"{name} {count}" for name, count in outcomes.most_common(4))


def _show(verdict: Verdict) -> None:
    console = Console()
    table = Table("what", "how many", title=f"Sale {verdict.sale_id}")
    table.columns[1].justify = "right"
    for name, count in (
        ("buyers", verdict.buyers),
        ("pieces", verdict.stock),
        ("sold", verdict.sold),
        ("charged at the PG", verdict.charged),
        ("given back at the PG", verdict.cancelled),
        ("worth of confirmed orders", verdict.confirmed_amount),
    ):
        table.add_row(name, f"{count:,}")
    for outcome, count in verdict.outcomes.items():
        table.add_row(f"buyers: {outcome}", f"{count:,}")
    console.print(table)
    for problem in verdict.problems:
        console.print(f"[red]problem[/red]: {problem}", highlight=False)
    if verdict.ok:
        console.print(
            f"[green]clean[/green]: {verdict.sold} of {verdict.stock} sold, 0 oversold; "
            "stock, money and orders agree",
            highlight=False,
        )


def _answers(address: str) -> bool:
    try:
        return httpx.get(f"{address}/health/live", trust_env=False).is_success
    except httpx.HTTPError:
        return False


@contextmanager
def _own_service() -> Generator[tuple[Settings, str]]:
    """A service with a data directory of its own, ended with the demo."""
    with tempfile.TemporaryDirectory(prefix="reservation-demo-") as folder:
        environ = {
            name: value for name, value in os.environ.items() if not name.startswith("RESERVATION_")
        }
        environ |= {"RESERVATION_DATA_DIR": folder, "RESERVATION_PORT": str(_free_port())}
        settings = Settings.load(environ, dotenv_path=None)
        with Path(folder, "service.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "api.cli", "serve"],
                cwd=folder,
                env=environ,
                stdout=log,
                stderr=log,
            )
            try:
                _wait_until_ready(process, settings.public_url, Path(log.name))
                yield settings, settings.public_url
            finally:
                process.terminate()
                try:
                    process.wait(STOP_SECONDS)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_until_ready(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    give_up_at = time.monotonic() + START_SECONDS
    while time.monotonic() < give_up_at and process.poll() is None:
        # Nobody may listen yet: look again after the pause.
        with suppress(httpx.HTTPError):
            if httpx.get(f"{address}/health/ready", trust_env=False).is_success:
                return
        time.sleep(LOOK_SECONDS)
    tail = log.read_text(errors="replace").splitlines()[-1:] or ["it says nothing"]
    raise Failure(f"the demo's own service did not start: {tail[0]}", UNREACHABLE)
