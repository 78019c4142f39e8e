"""The command `demo`: a whole flash sale against a running service, or a temporary one."""

import asyncio
import os
from collections import Counter

import click
import httpx
import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich_click import RichCommand

from api.cli.errors import BAD_SETTING, REFUSED, UNREACHABLE, CommandError
from api.http.auth.guests import Guests
from api.server.temporary_service import TemporaryServiceFailed, is_reachable, temporary_service
from reservation.config.settings import Settings, SettingsError
from reservation.verification.demo import Demo, DemoPlan, Verdict

__all__ = ["demo"]


@click.command(cls=RichCommand)
@click.option(
    "--buyers",
    type=click.IntRange(1, 1_000_000),
    default=1000,
    show_default=True,
    help="Number of buyers.",
)
@click.option(
    "--stock",
    type=click.IntRange(0, 1_000_000),
    default=100,
    show_default=True,
    help="Number of units on sale.",
)
@click.option(
    "--hold-seconds",
    type=click.IntRange(1, 3600),
    default=20,
    show_default=True,
    help="Duration of a hold; the demo takes at least as long.",
)
@click.option(
    "--seed", type=int, default=1, show_default=True, help="Seed of the buyers' random behaviour."
)
@click.option("--url", help="URL of a running service; default RESERVATION_PUBLIC_URL.")
@click.option("--own", is_flag=True, help="Start a temporary service for this demo.")
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
    """Simulate a sale and check the result.

    Buyers compete for the units; some leave, some are declined and retry with another card, some
    reload the result repeatedly. The verdict compares the audit, the orders and the sandbox's
    ledger. Exit status 0: consistent; 1: discrepancies.
    """
    plan = DemoPlan(buyers=buyers, stock=stock, hold_seconds=hold_seconds, seed=seed)
    try:
        settings = Settings.load(os.environ)
        address = url or settings.operator_url
        if own or (url is None and not is_reachable(address)):
            with temporary_service("demo") as (own_settings, own_address):
                verdict = _run(plan, own_settings, own_address)
        elif not is_reachable(address):
            raise CommandError(f"no service is reachable at {address}", UNREACHABLE)
        else:
            verdict = _run(plan, settings, address)
    except SettingsError as error:
        raise CommandError(error, BAD_SETTING) from error
    except TemporaryServiceFailed as error:
        raise CommandError(error, UNREACHABLE) from error
    except (httpx.HTTPError, TimeoutError) as error:
        raise CommandError(f"the service failed: {error}", UNREACHABLE) from error
    if as_json:
        click.echo(msgspec.json.encode(verdict).decode())
    else:
        _show(verdict)
    return 0 if verdict.ok else REFUSED


def _run(plan: DemoPlan, settings: Settings, address: str) -> Verdict:
    # The demo's buyers all come from one address, so they do not sign in over HTTP.
    guests = Guests(msgspec.structs.replace(settings, guest_rate=None))
    outcomes: Counter[str] = Counter()
    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[progress_text]}"),
        console=console,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task("buyers", total=plan.buyers, progress_text="")

        def report_progress(outcome: str, count: int) -> None:
            outcomes[outcome] += count
            progress_text = "settling and flushing" if not count else _summary(outcomes)
            progress.update(task, advance=count, progress_text=progress_text)

        story = Demo(
            plan,
            service_url=address,
            admin_key=settings.admin_api_key,
            new_token=lambda: guests.new("")[1],
            progress=report_progress,
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
        ("units", verdict.stock),
        ("sold", verdict.sold),
        ("charged by the PG", verdict.charged),
        ("refunded by the PG", verdict.cancelled),
        ("total of confirmed orders", verdict.confirmed_amount),
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
