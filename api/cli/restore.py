"""`reservation restore`: load a backup, compare it with the gateway, and open the sales."""

import asyncio
import os
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Final

import click
import msgspec
from rich.markup import escape
from rich_click import RichCommand, RichGroup
from sqlalchemy.exc import SQLAlchemyError

from api.cli.backup import described, key_name, kind_of
from api.cli.errors import ALREADY_RUNNING, BAD_SETTING, REFUSED, UNREACHABLE, CommandError
from api.cli.local import run_locally, with_redis
from api.cli.output import show_differences
from api.cli.remote import operator_name
from api.server import log_config
from api.server.child_process import AlreadyRunning, alone_in
from reservation.adapters.redis.cluster import open_client
from reservation.adapters.redis.embedded.server import EmbeddedServerError
from reservation.adapters.redis.errors import StoreUnavailable, StoreUncertain
from reservation.adapters.redis.keys import Keys
from reservation.adapters.redis.running_processes import RunningProcesses
from reservation.adapters.redis.vouches import Vouches
from reservation.adapters.sql.backup_file import BackupDamaged, Manifest, open_backup
from reservation.adapters.sql.differences import Difference
from reservation.adapters.sql.dumps import DumpFailed, TargetNotEmpty, load, mark_in_place
from reservation.adapters.sql.errors import DatabaseUnfit
from reservation.adapters.sql.restores import RestoreRow, mark_restored
from reservation.application.reconciliation.comparison import ComparisonReport, ListUnavailable
from reservation.bootstrap import Service, sqlite_url
from reservation.config.settings import Settings, SettingsError
from reservation.domain.clock import SystemClock, as_datetime, as_ms

__all__ = ["restore"]

#: The locks of `reservation serve` in the data directory, one for each role.
_LOCKS: Final = ("lock", "lock-api", "lock-worker")
#: Longer than the life of a heartbeat: a process that ended leaves its last one.
EXPIRED_SECONDS: Final = 35.0
_POLL_SECONDS: Final = 1.0
_NEXT: Final = "The sales stay closed. Next: reservation restore compare"

_reason = click.option("--reason", required=True, help="Reason, recorded with the change.")
_operator = click.option(
    "--operator", help="Operator name, recorded with the change; default: your login."
)
_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


@click.group(cls=RichGroup)
def restore() -> None:
    """Restore SQL from a backup, and open the sales after a comparison.

    Load or mark while no process of the service runs, then compare, rebuild and open. Until then no
    hold and no payment begins.
    """


@restore.command("load", cls=RichCommand)
@click.argument(
    "path", metavar="FILE", type=click.Path(path_type=Path, exists=True, dir_okay=False)
)
@click.option(
    "--accept-other-key",
    is_flag=True,
    help="Accept that the service has another key of order ids than the backup.",
)
@_reason
@_operator
@_json
def load_backup(
    path: Path, reason: str, operator: str | None, *, accept_other_key: bool, as_json: bool
) -> None:
    """Load FILE into an empty database, and mark it as restored.

    Redis must answer, but may be empty. For PostgreSQL psql must be installed.
    """
    name = operator_name(operator)
    with _reported():
        settings = _settings()
        with open_backup(path) as backup:
            manifest = backup.manifest
            url = settings.database_url or sqlite_url(settings)
            _refuse_other_installation(settings, url, manifest, accept_other_key=accept_other_key)
            mark = partial(
                mark_restored,
                taken_at_ms=manifest.taken_at_ms,
                restored_at_ms=SystemClock().now_ms(),
                operator=name,
                reason=reason,
            )
            with _alone(settings.data_dir):
                asyncio.run(_without_processes(settings, lambda: load(url, backup, mark)))
    if as_json:
        click.echo(msgspec.json.encode(manifest))
    else:
        click.echo(f"Restored {path}: {described(manifest)}.\n{_NEXT}")


@restore.command("mark", cls=RichCommand)
@click.option(
    "--taken-at",
    required=True,
    metavar="TIME",
    help="The instant that the data is from, such as 2026-11-30T21:00:00+09:00.",
)
@_reason
@_operator
@_json
def mark(taken_at: str, reason: str, operator: str | None, *, as_json: bool) -> None:
    """Mark a database as restored that was restored by other means.

    For example by point-in-time recovery, a snapshot or a copied file.
    """
    name, taken_at_ms = operator_name(operator), _instant(taken_at)
    now_ms = SystemClock().now_ms()
    if taken_at_ms > now_ms:
        raise click.UsageError("--taken-at is in the future")
    with _reported():
        settings = _settings()
        url = settings.database_url or sqlite_url(settings)
        setter = partial(
            mark_restored,
            taken_at_ms=taken_at_ms,
            restored_at_ms=now_ms,
            operator=name,
            reason=reason,
        )
        with _alone(settings.data_dir):
            asyncio.run(_without_processes(settings, lambda: mark_in_place(url, setter)))
    at = as_datetime(taken_at_ms).isoformat(timespec="seconds")
    if as_json:
        click.echo(msgspec.json.encode({"takenAtMs": taken_at_ms, "restoredAtMs": now_ms}))
    else:
        click.echo(f"Marked the database as restored from {at}.\n{_NEXT}")


@restore.command("compare", cls=RichCommand)
@click.option(
    "--without-list",
    is_flag=True,
    help="The gateway cannot list its transactions: only save the events in Redis.",
)
@_json
def compare(*, without_list: bool, as_json: bool) -> int:
    """Compare the restored data with the gateway's list of transactions.

    Lists each payment that SQL lacks, with order, amount and state, and exits with 1 if an operator
    must settle one. May be repeated at any time, also after the sales were opened.
    """

    async def work(service: Service) -> int:
        report = await _compared(service, await _last(service), without_list=without_list)
        _show(report, as_json=as_json)
        return REFUSED if report.to_acknowledge else 0

    return _run(work)


@restore.command("open", cls=RichCommand)
@_reason
@_operator
@_json
def open_sales(reason: str, operator: str | None, *, as_json: bool) -> int:
    """Open the sales after a comparison, whose differences this acknowledges.

    Compares once more, and does not open if there is a difference that was not listed before.
    """
    name = operator_name(operator)

    async def work(service: Service) -> int:
        row = await _last(service)
        if row.opened_at_ms is not None:
            raise CommandError(f"the sales were opened by {row.opened_by} before")
        if row.compared_at_ms is None:
            raise CommandError("compare first: reservation restore compare")
        report = await _compared(service, row, without_list=row.without_list)
        unseen = [one for one in report.to_acknowledge if one.payment_key in report.new]
        if unseen or report.to_rebuild:
            _show(report, as_json=as_json)
        if unseen:
            raise CommandError(
                f"the sales were not opened: {len(unseen)} differences are new; check them, then "
                "repeat this command"
            )
        if report.to_rebuild:
            raise CommandError(
                f"the sales were not opened: rebuild {', '.join(report.to_rebuild)} first, so that "
                "their payments find their units"
            )
        now_ms = service.clock.now_ms()
        await service.sql.restores.open(row.number, at_ms=now_ms, operator=name, reason=reason)
        _show(report, as_json=as_json)
        if not as_json:
            click.echo("The sales are open; each sale that is recovering needs its rebuild.")
        return 0

    return _run(work)


def _run(work: Any) -> int:
    try:
        return run_locally(work)
    except ListUnavailable as error:
        raise CommandError(
            f"{error}; if the gateway cannot list: reservation restore compare --without-list",
            UNREACHABLE,
        ) from error


async def _last(service: Service) -> RestoreRow:
    row = await service.sql.restores.last()
    if row is None:
        raise CommandError("the database was never restored")
    return row


async def _compared(service: Service, row: RestoreRow, *, without_list: bool) -> ComparisonReport:
    return await service.comparison.run(row, without_list=without_list)


def _show(report: ComparisonReport, *, as_json: bool) -> None:
    if as_json:
        click.echo(msgspec.json.encode(report))
        return
    since = as_datetime(report.taken_at_ms).isoformat(timespec="seconds")
    click.echo(
        f"Compared {report.payments} payments at the gateway since {since}; {report.foreign} are "
        f"of other installations. Saved {report.events_saved} events from Redis."
    )
    for sale_id in report.unknown_sales:
        click.echo(f"Redis has sale {escape(sale_id)}, which began after the backup.")
    for sale_id in report.unreadable_sales:
        click.echo(f"Redis has events of sale {escape(sale_id)} that cannot be read.")
    placed = len(report.differences) - len(report.to_acknowledge)
    click.echo(f"Payments that the service settles after the rebuild: {placed}.")
    click.echo(f"Payments that an operator must settle: {len(report.to_acknowledge)}.")
    if report.to_acknowledge:
        show_differences(_rows(report.to_acknowledge))


def _rows(found: Sequence[Difference]) -> list[dict[str, Any]]:
    return [msgspec.to_builtins(one) for one in found]


def _refuse_other_installation(
    settings: Settings, url: str, manifest: Manifest, *, accept_other_key: bool
) -> None:
    if manifest.kind != kind_of(url):
        raise CommandError(
            f"the backup is of {manifest.kind}, and RESERVATION_DATABASE_URL names {kind_of(url)}",
            BAD_SETTING,
        )
    if manifest.order_id_key != key_name(settings) and not accept_other_key:
        raise CommandError(
            "the backup is of another installation: RESERVATION_ORDER_ID_KEY differs (in "
            "secrets.json of the data directory unless it is set)",
            BAD_SETTING,
        )


def _settings() -> Settings:
    settings = Settings.load(os.environ)
    log_config.configure(production=settings.production)
    return settings


@contextmanager
def _alone(data_dir: Path) -> Generator[None]:
    """Keep `reservation serve` from starting on this data directory meanwhile."""
    with ExitStack() as stack:
        for name in _LOCKS:
            stack.enter_context(alone_in(data_dir, name))
        yield


async def _without_processes(settings: Settings, work: Any) -> None:
    """Do the work while no process of the service runs, on any machine."""
    async with with_redis(settings) as reachable:
        clock = SystemClock()
        connections = open_client(reachable.redis_url, clock=clock)
        try:
            keys = Keys(settings.key_prefix)
            unguarded = connections.unguarded()
            await _wait_for_the_end_of_all(RunningProcesses(unguarded, keys))
            # A process that starts while SQL is down would trust the record of earlier comparisons.
            await Vouches(unguarded, keys).forget()
        finally:
            await connections.aclose()
    await work()


async def _wait_for_the_end_of_all(processes: RunningProcesses) -> None:
    """Wait until the heartbeats of ended processes have expired.

    Raises:
        CommandError: a process renews its heartbeat.
    """
    for _ in range(round(EXPIRED_SECONDS / _POLL_SECONDS)):
        if not await processes.all():
            return
        await asyncio.sleep(_POLL_SECONDS)
    if running := await processes.all():
        raise CommandError(
            f"stop the service first; running: {', '.join(map(str, running))}", ALREADY_RUNNING
        )


@contextmanager
def _reported() -> Generator[None]:
    """Each failure as one line with its exit status."""
    try:
        yield
    except SettingsError as error:
        raise CommandError(error, BAD_SETTING) from error
    except DatabaseUnfit as error:
        raise CommandError(f"RESERVATION_DATABASE_URL: {error}", BAD_SETTING) from error
    except AlreadyRunning as error:
        raise CommandError(error, ALREADY_RUNNING) from error
    except (BackupDamaged, TargetNotEmpty, DumpFailed) as error:
        raise CommandError(error, REFUSED) from error
    except (StoreUnavailable, StoreUncertain, EmbeddedServerError) as error:
        raise CommandError(f"Redis does not answer: {error}", UNREACHABLE) from error
    except ConnectionError as error:
        raise CommandError(f"SQL does not answer: {error}", UNREACHABLE) from error
    except SQLAlchemyError as error:
        raise CommandError(f"SQL does not answer: {type(error).__name__}", UNREACHABLE) from error
    except OSError as error:
        raise CommandError(f"the restore failed: {error}", REFUSED) from error


def _instant(text: str) -> int:
    try:
        at = datetime.fromisoformat(text)
    except ValueError as error:
        raise click.UsageError("--taken-at is not a time in RFC 3339") from error
    if at.tzinfo is None:
        raise click.UsageError("--taken-at needs an offset or Z")
    return as_ms(at)
